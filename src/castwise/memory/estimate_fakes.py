"""A model, its batch and its optimizer once more, with shapes but without numbers.

    with fake_mode(device):
        copy = fake_model(model, device)
        batch = fake_like(batch, device)
        twin = fake_optimizer(optimizer, copy, device)

A fake tensor has everything but memory. Models on the meta device, which never had any,
become fakes on a real device, because kernels are chosen by device: on `meta`,
attention would be followed along a path that no device takes.

A few of torch's fake kernels promise another format than the kernel on the CPU returns;
`CpuKernels` puts that right, so that saved activations are right to the byte.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.dtypes import format_of
from castwise.errors import SettingsError, TargetError
from castwise.memory.lifetimes import tensors_within
from castwise.optim.holding import HeldWeights
from castwise.optim.joined import HeldParameter, Joined
from castwise.optim.storage import (
    Extras,
    SplitStorage,
    StochasticStorage,
    WeightStorage,
    is_worth_machine_code,
)
from castwise.rounding import cast_stochastic

Twins: TypeAlias = Mapping[int, torch.Tensor]
"""id of a tensor -> its fake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeModel:
    """A model without numbers."""

    module: nn.Module
    """The copy; everything but its tensors is what the original has."""

    twins: Twins
    """The fakes of the weights and buffers, by the id of the original."""


@contextmanager
def fake_mode(device: torch.device) -> Iterator[None]:
    """Let every operator make fakes, in the formats that the device really returns."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        if device.type != "cpu":
            yield
            return
        with CpuKernels():  # type: ignore[no-untyped-call]
            yield


def fake_model(model: nn.Module, device: torch.device) -> FakeModel:
    """Copy a model without copying a number.

    Raises:
        TargetError: The model cannot be copied.
    """
    twins: dict[int, Any] = {}
    for weight in model.parameters():
        twins[id(weight)] = nn.Parameter(
            _fake(weight, device), requires_grad=weight.requires_grad
        )
    for buffer in model.buffers():
        twins[id(buffer)] = _fake(buffer, device)
    memo: dict[int, Any] = dict(twins)
    for each in model.modules():  # tensors that are plain attributes
        for tensor in tensors_within(list(vars(each).values())):
            memo.setdefault(id(tensor), _fake(tensor, device))
    try:
        module = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TargetError(
            f"an estimate needs a model that can be copied, and {type(model).__name__} "
            f"cannot: {error}; estimate the part of it that can"
        ) from error
    return FakeModel(module=module, twins=twins)


def fake_like(value: Any, device: torch.device) -> Any:
    """Copy anything that holds tensors, with fakes in their places.

    Raises:
        TargetError: It cannot be copied.
    """
    memo: dict[int, Any] = {
        id(each): _fake(each, device) for each in tensors_within(value)
    }
    try:
        return copy.deepcopy(value, memo)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TargetError(
            f"an estimate needs a batch that can be copied, got a "
            f"{type(value).__name__}: {error}; give tensors, tuples and dicts of them"
        ) from error


def fake_optimizer(
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer],
    model: FakeModel,
    device: torch.device,
) -> Optimizer:
    """Return an optimizer of the same kind over the fakes, with the same states.

    Raises:
        SettingsError: It steps a parameter that the model does not have.
    """
    if not isinstance(optimizer, Optimizer):
        return optimizer(list(model.module.parameters()))
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    for patched in ("step", "add_param_group"):  # a hold, or a schedule that counts
        vars(twin).pop(patched, None)
    if vars(twin).get("remainder_of") is not None:
        vars(twin)["remainder_of"] = None
    twin.param_groups = [
        {**group, "params": [_twin_of(each, model.twins) for each in group["params"]]}
        for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    for weight, state in optimizer.state.items():
        twin.state[_twin_of(weight, model.twins)] = {
            name: _fake_state(each, device) for name, each in state.items()
        }
    return twin


class FakeHold(HeldWeights):
    """A hold over fakes: it asks for no addresses."""

    def _take(self, parameters: Any) -> None:
        for parameter in parameters:
            held_in = self._choose(parameter)
            if held_in is not None and id(parameter) not in self._held:
                storage = FakeStorage(held_in.storage)
                self._take_one(parameter, storage, held_in.fmt)

    def _is_swept(self, held: HeldParameter) -> bool:
        storage = held.storage
        assert isinstance(storage, FakeStorage)
        return self._sweeps and isinstance(storage.real, SplitStorage)

    def all_joined(self) -> AbstractContextManager[Joined]:
        """Let all weights be fp32 that a sweep does not join by itself."""
        return self._joined(self._held.values())


class FakeStorage(WeightStorage):
    """A storage over fakes: makes what the real one makes, and reads no number."""

    name = "fake"
    bytes_beside = 0

    def __init__(self, real: WeightStorage) -> None:
        self.real = real

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Make what stands beside the weight."""
        return self.real.begin(full, weight, index)

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Make the fp32 weight."""
        if self._in_machine_code(weight):
            return torch.empty_like(weight, dtype=torch.float32)
        return self.real.join(weight, extras)

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Make what the real storage makes on the way back, and let go of it."""
        if self._in_machine_code(weight):
            return
        if "master" in extras:
            weight.copy_(full)
        elif isinstance(self.real, StochasticStorage):
            weight.copy_(cast_stochastic(full, format_of(weight.dtype)))  # any lots
        else:
            self.real.part(full, weight, extras)

    def _in_machine_code(self, weight: torch.Tensor) -> bool:
        return isinstance(self.real, SplitStorage) and is_worth_machine_code(weight)


class CpuKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts right what fake kernels do otherwise than those of the CPU.

    Norms of a 16-bit input beside fp32 weights hand their moments out in fp32; the fake
    kernels promise them in the format of the input.

    Integers that depend on no input, such as positions and masks made of them, are
    computed: models branch on them, and would take another way without numbers.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_known = _is_known(func, args, kwargs)
        if is_known and func in _ANSWERS:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _NORMS:
            held = [each for each in args[1:5] if isinstance(each, torch.Tensor)]
            wide = held[0].dtype if held else args[0].dtype
            output, *moments = result
            return (output, *(each.to(wide) for each in moments))
        if is_known and _is_countable(result):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return result


def _is_known(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether all that goes in has numbers, and nothing is written or drawn."""
    if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:  # noqa: SLF001 -- no public name
        return False
    given = list(tensors_within((args, kwargs)))
    if not given:
        return func in _SOURCES
    return all(_is_whole(each) and not isinstance(each, FakeTensor) for each in given)


def _is_countable(result: Any) -> bool:
    """Whether a result is of whole numbers, and small enough to be computed."""
    return (
        isinstance(result, FakeTensor)
        and result.device.type == "cpu"
        and _is_whole(result)
        and result.numel() <= _COUNTABLE
    )


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


_COUNTABLE = 1 << 22
_ANSWERS = frozenset(
    {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}  # noqa: SLF001 -- what item() calls
)
_SOURCES = frozenset(
    {
        torch.ops.aten.arange.default,
        torch.ops.aten.arange.start,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.ones.default,
        torch.ops.aten.zeros.default,
        torch.ops.aten.full.default,
    }
)
_NORMS = frozenset(
    {
        torch.ops.aten.native_layer_norm.default,
        torch.ops.aten.native_batch_norm.default,
        torch.ops.aten.native_group_norm.default,
    }
)


def _twin_of(weight: torch.Tensor, twins: Twins) -> torch.Tensor:
    if id(weight) not in twins:
        raise SettingsError(
            f"an estimate needs the optimizer of this model, and a parameter of shape "
            f"{list(weight.shape)} is not one of its weights; build the optimizer from "
            "model.parameters()"
        )
    return twins[id(weight)]


def _fake_state(state: Any, device: torch.device) -> Any:
    """Make the fake of a state; counts of steps keep their number, which is read."""
    if not isinstance(state, torch.Tensor):
        return state
    if state.dim() or state.device.type != "cpu":
        return _fake(state, device)
    with unset_fake_temporarily():
        number = state.item()
    return torch.tensor(number, dtype=state.dtype)


def _fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Make the fake of a tensor; 0-dim ones on the CPU stay there."""
    where = (
        tensor.device if tensor.dim() == 0 and tensor.device.type == "cpu" else device
    )
    if tensor.layout is not torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=where)
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where
    )
    return made.requires_grad_() if tensor.requires_grad else made
