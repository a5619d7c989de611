"""Random numbers drawn once, and used again in another format.

The generator's state alone does not bring them back: `randn` in fp64 draws other
numbers than `randn` in bf16 from the same state. So what was drawn is kept, and handed
out again, call by call, in the format that is asked for.

    with rewound(states):
        with Record() as record:  run the forward as it ran
        with Replay(record.drawn): run it in another format

Where an operator mixes what it draws with numbers that it is given, only dropout can be
repeated; the others are refused by name.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.errors import IslandError
from castwise.policy.ops import operator_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch._ops import OpOverload

# Operators whose result does not depend on the digits of a floating input, but for the
# rare draw that lies between two probabilities.
_DRAWN = frozenset(
    {
        "bernoulli",
        "binomial",
        "multinomial",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "randperm",
    }
)


class RandomStates:
    """The states of the generators that a module may draw from."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        on_cuda = {t.device.index for t in tensors if t.is_cuda}
        self._cuda = {index: torch.cuda.get_rng_state(index) for index in on_cuda}

    def have_moved(self) -> bool:
        """Whether anything was drawn since."""
        if not torch.equal(self._cpu, torch.get_rng_state()):
            return True
        return any(
            not torch.equal(state, torch.cuda.get_rng_state(device))
            for device, state in self._cuda.items()
        )

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Draw from here, and leave the generators afterwards as they were before."""
        with torch.random.fork_rng(list(self._cuda)):
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)
            yield


class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what random operators draw, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = _name_of(func)
            _refuse_mixed(func, name)
            kept = result[1] if name == "native_dropout" else result
            self.drawn.append((name, kept.detach().clone()))
        return result


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands out what was drawn before instead of drawing.

    Args:
        drawn: What a `Record` kept.
    """

    def __init__(self, drawn: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = iter(drawn)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = _name_of(func)
        kept = self._next(name)
        if name == "native_dropout":
            x, p, training = args
            if not training:
                return x.clone(), kept
            return x * kept * (0.0 if p == 1 else 1 / (1 - p)), kept
        if func._schema.is_mutable:  # noqa: SLF001 -- the schema has no public name
            return args[0].copy_(kept)
        dtype = kwargs.get("dtype") or (
            args[0].dtype if args and isinstance(args[0], torch.Tensor) else kept.dtype
        )
        return kept.to(dtype if kept.is_floating_point() else kept.dtype)

    def _next(self, name: str) -> torch.Tensor:
        before, kept = next(self._drawn, ("nothing", torch.empty(0)))
        if before != name:
            raise IslandError(
                f"a module with its own backward draws random numbers by {name}, "
                f"where its forward drew by {before}; let it draw by the same "
                "operators in every format, or leave out the rule's stage"
            )
        return kept


def _name_of(func: OpOverload) -> str:
    return operator_name(func._schema.name)  # noqa: SLF001 -- as above


def _refuse_mixed(func: OpOverload, name: str) -> None:
    fills = func._schema.is_mutable and name.endswith("_")  # noqa: SLF001 -- as above
    if not (fills or name in _DRAWN or name == "native_dropout"):
        raise IslandError(
            f"a module with its own backward draws random numbers by {name}, "
            "which mixes them with its inputs and cannot be repeated in another "
            "format; draw by dropout, rand or randn, or leave out the rule's stage"
        )
