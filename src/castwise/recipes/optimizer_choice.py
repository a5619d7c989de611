"""Which optimizer a person asked for, turned into one that steps: ours and others'.

    choice = OptimizerChoice(name="bnb8bit", fallback="adamw8bit")
    chosen = choice.decide(otherwise="torch")    # Decision: the name, and why it is it
    optimizer = build_optimizer(chosen.value, groups, lr=1e-3, betas=(0.9, 0.95))

Ours and torch's always run. Others' implementations are optional packages: one that is
missing is an error with a remedy, and is replaced only where `--optimizer-fallback`
names a substitute, which is then recorded like every choice that was made for the user.

Learning rates are given as for AdamW, which `rate` in the table turns into that of the
optimizer: Lion moves every weight by its rate and wants about a tenth (Chen et al. 2023
advise 3 to 10 times less), SGD has no second moment to divide by and wants more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from castwise.decision import Decision
from castwise.errors import MissingExtraError, SettingsError
from castwise.wording import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

Groups: TypeAlias = Iterable[dict[str, Any]]
"""Parameter groups, each with its own `weight_decay`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerEntry:
    """One optimizer by its name on the command line."""

    meaning: str
    """What a person reads about it."""

    make: Callable[[Any, Groups, float, tuple[float, float]], torch.optim.Optimizer]
    """Builds it from its module, groups, learning rate and betas."""

    module: str
    """Where it comes from."""

    package: str | None = None
    """What `pip install` must bring for it; None: nothing more than castwise."""

    rate: float = 1.0
    """Its learning rate, as a multiple of AdamW's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerChoice:
    """The optimizer flags of one command."""

    name: str | None = None
    """What `--optimizer` asked for."""

    fallback: str | None = None
    """What `--optimizer-fallback` allows instead, where a package is missing."""

    def __post_init__(self) -> None:
        """Refuse names that the table lacks.

        Raises:
            SettingsError: Naming the flag and the table's names.
        """
        flags = (("--optimizer", self.name), ("--optimizer-fallback", self.fallback))
        for flag, name in flags:
            if name is not None and name not in OPTIMIZERS:
                raise SettingsError(
                    f"{flag} needs one of {', '.join(OPTIMIZERS)}; got {name!r}"
                    f"{did_you_mean(name, OPTIMIZERS)}."
                )

    def decide(self, *, otherwise: str) -> Decision[str]:
        """Return the optimizer to use, and why.

        Args:
            otherwise: What to use when no flag was given.

        Raises:
            MissingExtraError: Its package is missing or broken, and no fallback was
                allowed, or that of the fallback is missing too.
        """
        if self.name is None:
            return Decision(otherwise, "the recipe's own choice")
        missing = _why_missing(self.name)
        if missing is None:
            return Decision(self.name, f"--optimizer {self.name}")
        if self.fallback is None:
            raise MissingExtraError(
                f"--optimizer {self.name} {missing}; run `pip install "
                f"{OPTIMIZERS[self.name].package}`, or name a substitute with "
                "--optimizer-fallback, such as adamw8bit."
            )
        also = _why_missing(self.fallback)
        if also is not None:
            raise MissingExtraError(
                f"--optimizer {self.name} {missing}, and --optimizer-fallback "
                f"{self.fallback} {also}; name one of castwise's own."
            )
        return Decision(
            self.fallback,
            f"--optimizer-fallback instead of {self.name}, which {missing}",
        )


def refuse_missing(name: str) -> None:
    """Refuse to go on with an optimizer whose package is gone.

    Raises:
        MissingExtraError: It cannot be imported here.
    """
    missing = _why_missing(name)
    if missing is not None:
        raise MissingExtraError(
            f"this run was stepped by {name}, which {missing}; run `pip install "
            f"{OPTIMIZERS[name].package}` to go on with it."
        )


def build_optimizer(
    name: str, groups: Groups, *, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return the optimizer of a name.

    Args:
        name: One of `OPTIMIZERS`, with its package in place (see `decide`).
        groups: Parameter groups; `weight_decay` of each is as for AdamW.
        lr: Learning rate as for AdamW.
        betas: AdamW's decay rates; others take what fits them.
    """
    entry = OPTIMIZERS[name]
    module = importlib.import_module(entry.module)
    scaled = [
        # What decays by lr times weight_decay shall decay as fast as AdamW does.
        {**group, "weight_decay": group.get("weight_decay", 0.0) / entry.rate}
        for group in groups
    ]
    return entry.make(module, scaled, lr * entry.rate, betas)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices decay; norms, biases and embeddings do not."""
    from torch import nn  # noqa: PLC0415 -- `castwise --help` waits for no torch

    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        decays = parameter.ndim > 1 and id(parameter) not in embeddings
        (matrices if decays else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _why_missing(name: str) -> str | None:
    """Say why an optimizer cannot be had here; None: it can."""
    entry = OPTIMIZERS[name]
    if entry.package is None:
        return None
    try:
        importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        root = entry.module.partition(".")[0]
        if error.name == root:
            return f"needs the package {entry.package}, which is not installed"
        return f"needs {error.name}, which is not installed"
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        return f"has a package {entry.package} that does not load ({reason})"
    return None


def _torch_adamw(
    module: Any, groups: Groups, lr: float, betas: tuple[float, float]
) -> Any:
    return module.AdamW(groups, lr=lr, betas=betas, fused=True)


def _ours(kind: str, states: str, **more: Any) -> Callable[..., Any]:
    def make(module: Any, groups: Groups, lr: float, betas: tuple[float, float]) -> Any:
        # The run has checked and clipped the gradients before it calls the step.
        settings = module.SweepSettings(states=states, check_finite=False)
        keywords = dict(more)
        if kind == "AdamW":
            keywords["betas"] = betas
        return getattr(module, kind)(groups, lr=lr, settings=settings, **keywords)

    return make


def _others(kind: str, **more: Any) -> Callable[..., Any]:
    def make(module: Any, groups: Groups, lr: float, betas: tuple[float, float]) -> Any:
        return getattr(module, kind)(groups, lr=lr, betas=betas, **more)

    return make


_MOMENTUM = {"momentum": 0.9, "nesterov": True}
_CASTWISE, _TORCHAO = "castwise.optim", "torchao.optim"

OPTIMIZERS: Mapping[str, OptimizerEntry] = MappingProxyType(
    {
        "torch": OptimizerEntry(
            meaning="torch's fused AdamW", make=_torch_adamw, module="torch.optim"
        ),
        "adamw": OptimizerEntry(
            meaning="castwise's AdamW in one sweep",
            make=_ours("AdamW", "fp32"),
            module=_CASTWISE,
        ),
        "adamw8bit": OptimizerEntry(
            meaning="the same with moments in 8 bits",
            make=_ours("AdamW", "8bit"),
            module=_CASTWISE,
        ),
        "sgd": OptimizerEntry(
            meaning="SGD with Nesterov's momentum",
            make=_ours("SGD", "fp32", **_MOMENTUM),
            module=_CASTWISE,
            rate=10.0,
        ),
        "sgd8bit": OptimizerEntry(
            meaning="the same with momentum in 8 bits",
            make=_ours("SGD", "8bit", **_MOMENTUM),
            module=_CASTWISE,
            rate=10.0,
        ),
        "lion": OptimizerEntry(
            meaning="Lion", make=_ours("Lion", "fp32"), module=_CASTWISE, rate=0.1
        ),
        "lion8bit": OptimizerEntry(
            meaning="Lion with momentum in 8 bits",
            make=_ours("Lion", "8bit"),
            module=_CASTWISE,
            rate=0.1,
        ),
        "bnb8bit": OptimizerEntry(
            meaning="AdamW8bit of bitsandbytes",
            make=_others("AdamW8bit"),
            module="bitsandbytes.optim",
            package="bitsandbytes",
        ),
        "torchao8bit": OptimizerEntry(
            meaning="AdamW8bit of torchao",
            make=_others("AdamW8bit"),
            module=_TORCHAO,
            package="torchao",
        ),
        "torchao4bit": OptimizerEntry(
            meaning="AdamW4bit of torchao",
            make=_others("AdamW4bit"),
            module=_TORCHAO,
            package="torchao",
        ),
        "torchaofp8": OptimizerEntry(
            meaning="AdamWFp8 of torchao",
            make=_others("AdamWFp8"),
            module=_TORCHAO,
            package="torchao",
        ),
        "optimi": OptimizerEntry(
            meaning="AdamW of optimi",
            make=_others("AdamW"),
            module="optimi",
            package="torch-optimi",
        ),
    }
)
"""Every optimizer of the command line by its name."""
