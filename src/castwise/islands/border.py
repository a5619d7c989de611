"""What happens when control crosses into an island and out again.

A low island enters `torch.autocast` in its format. Which operators run low there, says
the operator table, if a region of `castwise.autocast` stands around the model, as it
does in `run.step()`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from castwise.dtypes import DTYPES
from castwise.errors import IslandError
from castwise.fp8_products import CARRIER, FP8, products_in, served
from castwise.islands.crossing import Crossing, Rounding, tensors_in
from castwise.islands.eager import out_of_graphs
from castwise.islands.lending import cast_weights
from castwise.islands.own_backward import run_with_own_backward
from castwise.islands.passage import is_second
from castwise.islands.products import BackwardHold, Products, ProductsHold
from castwise.islands.swap import island_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

LOW = ("bf16", "fp16")
"""Formats for which autocast chooses by operator; in wider ones nothing is cast."""

# formats that no tensor is computed in -> what holds their numbers
_HELD_IN = {"tf32": "fp32", **dict.fromkeys(FP8, CARRIER)}

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class Border:
    """One island in one phase: the formats inside, and how to come and go."""

    compute: str
    """What operators run in; floating inputs are cast to it."""

    output: str | None
    """What floating outputs are cast to; `None` hands them out as they are computed."""

    device_type: str
    """Whose autocast and whose switches are meant."""

    casts_weights: bool = False
    """Whether weights are held in another format, and are cast for each forward."""

    is_within_fp8: bool = False
    """Whether an island in fp8 stands around it."""

    is_inner: bool = False
    """Whether the island around does all that is needed, but in a recompute."""

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Cast in, run the module's own forward inside, cast out."""
        if self.compute in FP8 or self.output in FP8 or self.is_within_fp8:
            return run_in_eager_mode(self._run, module, forward, args, kwargs)
        return self._run(module, forward, args, kwargs)

    def _run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self.is_inner:
            with self.weights_cast(module), self._operators():
                return forward(module, *args, **kwargs)
        dtype = self.dtype_inside
        inward = Crossing(dtype)
        args = tuple(map(inward.values, args))
        kwargs = {name: inward.values(value) for name, value in kwargs.items()}
        with self.weights_cast(module), self._operators():
            if self._products is None or torch.compiler.is_compiling():
                outputs = forward(module, *args, **kwargs)
            else:
                with ProductsHold(self.device_type, self._products):
                    outputs = forward(module, *args, **kwargs)
                self._hold_backward(inward.made, outputs)
        return outputs if self.output is None else self._handed_out(outputs)

    def _handed_out(self, outputs: Any) -> Any:
        assert self.output is not None
        if self.output in FP8:
            return Rounding(self.output).values(outputs)
        return Crossing(DTYPES[self.output]).values(outputs)

    @property
    def _products(self) -> Products | None:
        if self.compute == "fp32":
            return "ieee"
        return "tf32" if self.compute == "tf32" else None

    @contextlib.contextmanager
    def _fp8(self) -> Iterator[None]:
        """Round operands of products as this island says, in bf16."""
        fmt = self.compute if self.compute in FP8 else None
        if fmt is not None and self.device_type not in served:
            raise IslandError(
                f"products in {fmt} are emulated by the kernels of a region, and none "
                f"was entered on {self.device_type}; run the model in run.step(), or "
                "in castwise.autocast.autocast(..., fp8=True)"
            )
        with products_in(fmt), self._autocast():
            yield

    def _operators(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute in FP8 or self.is_within_fp8:
            return self._fp8()
        return self._autocast()

    def _autocast(self) -> torch.autocast:
        low = CARRIER if self.compute in FP8 else self.compute
        if low in LOW:
            return torch.autocast(self.device_type, dtype=DTYPES[low])
        return torch.autocast(self.device_type, enabled=False)

    @property
    def dtype_inside(self) -> torch.dtype:
        """What a tensor is held in while operators compute in a format."""
        return DTYPES[_HELD_IN.get(self.compute, self.compute)]

    def weights_cast(
        self, module: nn.Module
    ) -> contextlib.AbstractContextManager[None]:
        """Let the module see its weights in the format that it computes in."""
        if not self.casts_weights:
            return _NOTHING
        return cast_weights(list(_inhabitants(module)), self.dtype_inside)

    def _hold_backward(self, cast: Sequence[torch.Tensor], outputs: Any) -> None:
        assert self._products is not None
        if not torch.is_grad_enabled():
            return
        hold = BackwardHold(self.device_type, self._products)
        for output in tensors_in(outputs):
            hold.enter_at(output)
        for tensor in cast:
            hold.leave_at(tensor)


@out_of_graphs("products in fp8 are emulated (castwise)")
def run_in_eager_mode(run: Callable[..., Any], *args: Any) -> Any:
    """Run what cannot be captured."""
    return run(*args)


class PhaseNow:
    """The phase that a model is in; every island of one model looks at the same one."""

    __slots__ = ("phase",)

    def __init__(self, phase: str) -> None:
        self.phase = phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Island:
    """A module held in another precision than its surroundings, phase by phase."""

    fqn: str
    """Where the module stood when the policy was applied."""

    borders: Mapping[str, Border | None]
    """Phase -> its border, or none where the module is as its surroundings are."""

    now: PhaseNow
    """The phase that decides."""

    second: Mapping[str, Border | None] = field(default_factory=dict)
    """Phase -> its border while gradients are computed in a precision of their own;
    empty where no module around it has a backward of its own."""

    own_backward: frozenset[str] = frozenset()
    """The phases in which its backward runs in another precision than its forward."""

    @property
    def border(self) -> Border | None:
        """The border in force."""
        if self.second and is_second():
            return self.second_border
        return self.borders[self.now.phase]

    @property
    def is_run_again(self) -> bool:
        """Whether its backward runs in a precision of its own, in this phase."""
        return self.now.phase in self.own_backward

    @property
    def second_border(self) -> Border | None:
        """The border while gradients are computed in a precision of their own."""
        return self.second.get(self.now.phase)

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module's own forward as the policy says."""
        if self.own_backward and self.is_run_again and not is_second():
            return run_with_own_backward(self, module, forward, args, kwargs)
        return self.run_inside(module, forward, args, kwargs)

    def run_inside(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module's own forward inside of the border in force."""
        border = self.border
        if border is None:
            return forward(module, *args, **kwargs)
        return border.run(module, forward, args, kwargs)


def _inhabitants(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and those below it, without the islands among them."""
    yield module
    for child in module.children():
        island = island_of(child)
        if island is None or island.border is None or island.border.is_inner:
            yield from _inhabitants(child)
