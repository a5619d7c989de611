"""Puts a weight storage under any optimizer, without touching the optimizer's code.

The model keeps its `Parameter` objects and computes in 16 bits. For the length of one
`optimizer.step()` a parameter's data are its exact fp32 weight and its gradient is in
fp32, so the optimizer sees what it would see in fp32 training, makes its states in
fp32, and writes its update into fp32; then the storage takes the weight apart again:

    p.data   bf16 -> join -> fp32 -> the optimizer's own step -> part -> bf16
    p.grad   bf16 ---------> fp32 -> read ---------------------> the same bf16 tensor

An optimizer that treats each parameter by itself (every one of torch but LBFGS) is
stepped a few parameters at a time, so that the fp32 copies of a step never stand in
memory together. One of which that is not known is stepped whole. Either way no fp32
copy outlives the step, unless the storage is `master`, whose point that is. Our own
optimizers join and part split weights themselves (`sweep`); no copy is made at all.

`optimizer.step`, `state_dict`, `load_state_dict` and `add_param_group` are called as
ever. A state dict holds every state in its own format, and what the storage keeps
beside the weight; loading it restores both bit by bit, where torch alone casts the
states to the format of the weight (pytorch#43706).

Sharded parameters (FSDP2) are held shard by shard: hold them after `fully_shard` and
before the first forward. Complex and fp64 parameters are refused (name them in `keep`),
and so are differentiable optimizers. What is written into a parameter by others
(`load_state_dict` of a model, a clamp under `no_grad`) is noticed and becomes the
weight; what is written behind torch's back through `p.data` is not.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch.optim import Optimizer

from castwise.decision import Decision
from castwise.dtypes import dtype_of
from castwise.errors import SettingsError, WeightStorageError
from castwise.optim.bites import bites, is_parameter_wise
from castwise.optim.joined import (
    HeldParameter,
    Joined,
    check_parameters,
    raise_states,
)
from castwise.optim.replicas import refuse_replicas
from castwise.optim.shards import change_format, is_sharded, local, sharded_like
from castwise.optim.state_formats import StateFormats
from castwise.optim.storage import (
    Extras,
    SplitStorage,
    WeightStorage,
    make_storage,
)
from castwise.optim.sweep import SweepOptimizer


class HeldIn(NamedTuple):
    """How one parameter is to be held."""

    storage: WeightStorage
    """What keeps the bits that 16 do not hold."""

    fmt: str = "bf16"
    """The format that the model computes with."""


Choose: TypeAlias = Callable[[torch.nn.Parameter], HeldIn | None]
"""Says of any parameter how it is to be held; None leaves it as it is."""


def hold_weights(
    optimizer: Optimizer,
    storage: str = "split",
    *,
    fmt: str = "bf16",
    grad_format: Literal["fp32"] | None = None,
    keep: Iterable[torch.nn.Parameter] = (),
    release_gradients: bool = False,
    accept_lost_updates: bool = False,
    seed: int = 0,
) -> HeldWeights:
    """Hold the weights of an optimizer in 16 bits from now on.

    Args:
        optimizer: Any optimizer, before or after its first step; it and its parameters
            keep their identity.
        storage: Where the bits go that 16 do not hold, one of
            `castwise.optim.STORAGES` (default: split).
        fmt: Format of the weights in the model (default: bf16).
        grad_format: Format in which gradients are accumulated; fp32 keeps the digits of
            many small batches and costs 2 bytes (default: that of the weights).
        keep: Parameters that stay as they are, such as those of an fp32 island.
        release_gradients: Update each parameter in the backward, as soon as its
            gradient is complete, and free the gradient (default: False).
        accept_lost_updates: Allow the storage `plain` (default: False).
        seed: Seed of the lots of the storage `stochastic` (default: 0).

    Returns:
        The hold; `remove()` gives the parameters back in fp32.

    Raises:
        SettingsError: A setting has a value that does not exist or fit.
        WeightStorageError: A parameter or the optimizer cannot be held.
    """
    kind = make_storage(
        storage, fmt, seed=seed, accept_lost_updates=accept_lost_updates
    )
    kept = frozenset(id(parameter) for parameter in keep)
    held_in = HeldIn(kind, fmt)
    return HeldWeights(
        optimizer,
        lambda parameter: None if id(parameter) in kept else held_in,
        grad_format=grad_format,
        release_gradients=release_gradients,
    )


def held_weights_of(optimizer: Optimizer) -> HeldWeights | None:
    """Return the hold that is in force under an optimizer, if there is one."""
    step = optimizer.__dict__.get("step")
    held = getattr(step, "held_by_castwise", None)
    return held if isinstance(held, HeldWeights) else None


class HeldWeights:
    """Weight storages in force under an optimizer; made by `hold_weights`.

    Args:
        optimizer: The optimizer.
        choose: How each of its parameters is to be held, now and when groups are added.
        grad_format: As in `hold_weights` (default: None).
        release_gradients: As in `hold_weights` (default: False).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        choose: Choose,
        *,
        grad_format: str | None = None,
        release_gradients: bool = False,
    ) -> None:
        if grad_format not in (None, "fp32"):
            raise SettingsError(
                f"need grad_format fp32 or None, the format of the weights; "
                f"got {grad_format!r}"
            )
        self.optimizer = optimizer
        self._choose = choose
        self._grad_format = grad_format
        self._release_gradients = release_gradients
        self._is_alone = False  # known at the first gradient that is released
        self._held: dict[int, HeldParameter] = {}
        self._hooks: list[Any] = []
        self._stepped = False
        self._sweeps = isinstance(optimizer, SweepOptimizer)
        self._check_optimizer()
        self._take(self._parameters())
        if self._sweeps:
            cast("SweepOptimizer", optimizer).remainder_of = self._remainder_of
        self._inner_step = optimizer.step
        self._inner_add = optimizer.add_param_group
        self._patch()
        self._formats = StateFormats(optimizer, self._extras_of, self._load_extras)

    @property
    def storages(self) -> dict[str, int]:
        """How many numbers each storage holds, by its name."""
        found: Counter[str] = Counter()
        for held in self._held.values():
            found[held.storage.name] += held.parameter.numel()
        return dict(found)

    def storage_of(self, parameter: torch.Tensor) -> str | None:
        """Return the name of the storage that holds a parameter, if one does."""
        held = self._held.get(id(parameter))
        return None if held is None else held.storage.name

    def beside(self, parameter: torch.Tensor) -> Extras:
        """Return what stands beside a weight, by name; nothing where it is not held."""
        held = self._held.get(id(parameter))
        return {} if held is None else dict(held.extras)

    def full_of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return one exact weight in fp32, only to read; None where it is not held."""
        held = self._held.get(id(parameter))
        if held is None:
            return None
        held.notice_foreign_write()
        return held.full()

    @torch.no_grad()
    def write_full(self, parameter: torch.Tensor, full: torch.Tensor) -> None:
        """Make an fp32 tensor the weight of a held parameter, as an update does."""
        held = self._held[id(parameter)]
        held.storage.part(full, held.weight, held.extras)
        held.remember_version()

    def full_from(
        self, parameter: torch.Tensor, weight: torch.Tensor, extras: Extras
    ) -> torch.Tensor:
        """Return the fp32 weight that copies of both of its pieces stood for."""
        return self._held[id(parameter)].storage.join(weight, extras)

    @torch.no_grad()
    def put_back(
        self, parameter: torch.Tensor, weight: torch.Tensor, extras: Extras
    ) -> None:
        """Make copies of both pieces of a weight the weight again, bit by bit."""
        held = self._held[id(parameter)]
        held.weight.copy_(weight)
        for name, value in extras.items():
            held.extras[name].copy_(value)
        held.remember_version()

    @property
    def parameter_wise(self) -> Decision[bool]:
        """Whether the optimizer is stepped a few parameters at a time, and why."""
        return is_parameter_wise(self.optimizer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the optimizer's own step on the exact weights.

        Args:
            closure: Evaluates the loss again, on the 16-bit weights (default: None).
            **kwargs: Whatever the optimizer's step takes besides.

        Returns:
            What the optimizer's step returns.
        """
        self._notice_foreign_writes()
        self._stepped = True
        every = list(self._held.values())
        if self._sweeps:
            if closure is not None and not all(map(self._is_swept, every)):
                raise WeightStorageError(
                    f"{type(self.optimizer).__name__} takes a closure with split "
                    "weights only; call backward before the step instead"
                )
            with self._joined(every):
                return self._inner_step(closure, **kwargs)
        if closure is None and self.parameter_wise.value:
            for group, bite in bites(self.optimizer):
                self._step_bite(group, bite, kwargs)
            return None
        if closure is None:
            with self._joined(every):
                return self._inner_step(**kwargs)
        with self._joined(every) as change:
            return self._inner_step(change.closure(closure), **kwargs)

    def fp32_weights(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the state dict of a module with its exact weights in fp32.

        It is what a run in fp32 would save: anybody can load it.
        """
        self._notice_foreign_writes()
        weights: dict[str, torch.Tensor] = dict(module.state_dict(keep_vars=True))
        for name, value in weights.items():
            held = self._held.get(id(value))
            weights[name] = (
                value.detach()
                if held is None
                else sharded_like(value, held.full().clone())
            )
        return weights

    @torch.no_grad()
    def load_fp32_weights(
        self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Load a state dict, keeping every bit of its weights in fp32.

        A sharded module takes weights that are sharded as its own are.

        Raises:
            RuntimeError: Names or shapes do not fit, as in `load_state_dict`.
        """
        module.load_state_dict(dict(weights))
        for name, value in module.state_dict(keep_vars=True).items():
            held = self._held.get(id(value))
            if held is not None:
                part = local(weights[name]).detach()
                held.begin(part.to(held.weight.device, torch.float32))

    def remove(self) -> None:
        """Give the parameters back in fp32 and the optimizer as it was.

        Raises:
            WeightStorageError: A parameter is sharded, and FSDP2 works with its format.
        """
        if self._stepped and any(held.own is None for held in self._held.values()):
            raise WeightStorageError(
                "sharded parameters keep their format for the life of FSDP2; take "
                "fp32_weights() into a new model instead"
            )
        self._notice_foreign_writes()
        for held in self._held.values():
            full = held.full()
            if held.own is None:
                change_format(held.parameter, torch.float32, held.storage.name)
                local(held.parameter).detach().copy_(full)
                continue
            gradient, held.parameter.grad = held.parameter.grad, None
            held.parameter.grad_dtype = None
            held.parameter.data = full
            held.parameter.grad = None if gradient is None else gradient.float()
        self._held.clear()
        if self._sweeps:
            cast("SweepOptimizer", self.optimizer).remainder_of = None
        self._formats.remove()
        for hook in self._hooks:
            hook.remove()
        for name in ("step", "add_param_group"):
            del self.optimizer.__dict__[name]
        for name, inner in self._shadowed.items():
            self.optimizer.__dict__[name] = inner

    def bytes_per_parameter(self) -> float:
        """Return the measured bytes of weights and what stands beside them, here."""
        total = sum(
            tensor.numel() * tensor.element_size()
            for held in self._held.values()
            for tensor in (held.weight, *held.extras.values())
        )
        return total / max(1, sum(h.weight.numel() for h in self._held.values()))

    def _check_optimizer(self) -> None:
        """Refuse optimizers that must see more than a step."""
        name = type(self.optimizer).__name__
        if any(group.get("differentiable") for group in self.optimizer.param_groups):
            raise WeightStorageError(
                f"need an optimizer that does not record its own step; got {name} with "
                "differentiable=True; hold its weights in fp32"
            )
        if held_weights_of(self.optimizer) is not None:
            raise WeightStorageError(
                f"the weights of this {name} are held already; call remove() on that "
                "hold first"
            )
        if self._release_gradients and not self.parameter_wise.value:
            raise WeightStorageError(
                "release_gradients needs an optimizer that can be stepped one "
                f"parameter at a time; {self.parameter_wise.because}"
            )

    def _parameters(self) -> list[torch.nn.Parameter]:
        groups = self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def _take(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Hold parameters that are not held yet, where the choice is to hold them."""
        chosen = [(p, self._choose(p)) for p in parameters if id(p) not in self._held]
        new = [(p, held_in) for p, held_in in chosen if held_in is not None]
        check_parameters([(p, h.storage) for p, h in new], len(self._held))
        for parameter, held_in in new:
            self._take_one(parameter, *held_in)

    def _take_one(
        self, parameter: torch.nn.Parameter, storage: WeightStorage, fmt: str
    ) -> None:
        full = local(parameter).detach().float()
        gradient, parameter.grad = parameter.grad, None
        own = None
        if is_sharded(parameter):
            if self._grad_format is not None:
                raise WeightStorageError(
                    "sharded parameters get their gradients from FSDP2, in the format "
                    "of the weights; sum them in fp32 by MixedPrecisionPolicy("
                    "reduce_dtype=torch.float32) instead of grad_format"
                )
            change_format(parameter, dtype_of(fmt), storage.name)
        else:
            own = torch.empty_like(parameter, dtype=dtype_of(fmt)).detach()
            parameter.data = own
        held = HeldParameter(parameter, storage, own, place=len(self._held) + 1)
        self._held[id(parameter)] = held
        held.begin(full)
        if self._grad_format is not None:
            parameter.grad_dtype = torch.float32
        if gradient is not None:
            parameter.grad = gradient.to(parameter.grad_dtype)
        raise_states(self.optimizer.state.get(parameter), parameter.shape)
        if self._release_gradients:
            register: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(register(self._step_one))

    def _is_swept(self, held: HeldParameter) -> bool:
        """Return whether the optimizer joins and parts the weight itself."""
        return self._sweeps and isinstance(held.storage, SplitStorage)

    def _notice_foreign_writes(self) -> None:
        """Take over weights that somebody wrote into the parameters since the step."""
        for held in self._held.values():
            held.notice_foreign_write()

    def _patch(self) -> None:
        """Stand in for the optimizer's own `step` and `add_param_group`."""
        own = self.optimizer.__dict__
        patched = ("step", "add_param_group")
        self._shadowed = {name: own[name] for name in patched if name in own}

        @functools.wraps(self._inner_step)
        def step(
            _: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any
        ) -> Any:
            return self.step(closure, **kwargs)

        @functools.wraps(self._inner_add)
        def add_param_group(_: Optimizer, param_group: dict[str, Any]) -> None:
            self._inner_add(param_group)
            self._take(self._parameters())

        step.__dict__["held_by_castwise"] = self
        own["step"] = MethodType(step, self.optimizer)
        own["add_param_group"] = MethodType(add_param_group, self.optimizer)

    def _step_bite(
        self,
        group: dict[str, Any],
        bite: list[torch.nn.Parameter],
        kwargs: dict[str, Any],
    ) -> None:
        """Step some parameters of a group, as if the optimizer had no others."""
        optimizer = self.optimizer
        groups, parameters = optimizer.param_groups, group["params"]
        held = [self._held[id(p)] for p in bite if id(p) in self._held]
        try:
            optimizer.param_groups = [group]
            group["params"] = bite
            with self._joined(held):
                self._inner_step(**kwargs)
        finally:
            group["params"] = parameters
            optimizer.param_groups = groups

    @torch.no_grad()
    def _step_one(self, parameter: torch.Tensor) -> None:
        """Step a parameter in the backward and free its gradient."""
        if not self._is_alone:
            refuse_replicas(parameter)
            self._is_alone = True
        self._notice_foreign_writes()
        self._stepped = True
        for group in self.optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                self._step_bite(group, [parameter], {})  # type: ignore[list-item]
        parameter.grad = None

    @contextmanager
    def _joined(self, held: Iterable[HeldParameter]) -> Iterator[Joined]:
        """Let parameters be fp32, and part them again whatever happens."""
        held = list(held)
        others = [each for each in held if not self._is_swept(each)]
        change = Joined(self.optimizer, others)
        change.join()
        try:
            yield change
        finally:
            change.part()
            for each in held:
                each.remember_version()

    def _remainder_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the lower 16 bits of a weight, for an optimizer that joins itself."""
        return self._held[id(parameter)].extras["remainder"]

    def _extras_of(self, parameter: torch.Tensor) -> Extras:
        """Return what a state dict is to hold of a parameter."""
        held = self._held.get(id(parameter))
        return {} if held is None else held.saved()

    def _load_extras(self, parameter: torch.Tensor, saved: Extras) -> None:
        """Take what a state dict held of a parameter."""
        held = self._held.get(id(parameter))
        if held is not None:
            held.load(saved)
