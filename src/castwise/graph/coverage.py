"""What no captured graph has: operators that Dynamo left to Python, by module.

Dynamo skips a frame that it cannot capture, and says nothing: the model runs, and a
plan that covers nothing of it would look fine. So the first call of a compiled model is
watched below autograd. Operators that run outside of captured graphs are named with
their module. A module of which nothing was captured falls back to autocast with the
same operator table; one that was captured in part keeps its other part in fp32.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.autocast import autocast
from castwise.graph.plan import Uncovered
from castwise.graph.regions import widened
from castwise.islands.border import LOW
from castwise.islands.eager import out_of_graphs
from castwise.numerics.call_site import CallSites
from castwise.numerics.operator_call import CAST, describe, floating

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from castwise.policy.ops import OperatorTable

_INSIDE = threading.local()


def covered(run: Callable[..., Any]) -> Callable[..., Any]:
    """Mark what a callable runs as part of a captured graph."""

    def run_covered(*args: Any) -> Any:
        before = getattr(_INSIDE, "graph", False)
        _INSIDE.graph = True
        _INSIDE.num_runs = num_graphs_run() + 1
        try:
            return run(*args)
        finally:
            _INSIDE.graph = before

    return run_covered


def num_graphs_run() -> int:
    """How many captured graphs have run in this thread."""
    return int(getattr(_INSIDE, "num_runs", 0))


class CoverageWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that run outside of captured graphs, by module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sites = CallSites(model)
        self.found: dict[str, dict[str, None]] = defaultdict(dict)
        """fqn of a module -> the operators that it ran outside."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as compiled code; otherwise Dynamo would step aside."""
        return True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not getattr(_INSIDE, "graph", False) and hasattr(func, "_schema"):
            self._see(func, args, kwargs, result)
        return result

    def _see(
        self, func: OpOverload, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        if any(isinstance(t, FakeTensor) for t in floating((args, kwargs))):
            return  # a graph is being captured, nothing runs
        call = describe(func, args, kwargs, result)
        if call is not None and call.op != CAST:
            self.found[self._sites.here().module or ""][call.op] = None


class Fallback:
    """The forward of a module that no graph has: under autocast, as it is in Python.

    It stands on the instance, where `nn.Module` looks for `forward` first.
    """

    def __init__(
        self, module: nn.Module, device_type: str, fmt: str, table: OperatorTable
    ) -> None:
        self._module = module
        self._device_type = device_type
        self._fmt = fmt
        self._table = table

    @property
    def is_low(self) -> bool:
        """Whether it runs under autocast; else as it is written."""
        return self._fmt in LOW

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's class under autocast."""
        return _run_fallback(self, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cast as the operator table says; what goes out is as it was captured."""
        module = self._module
        region = (
            autocast(self._device_type, self._fmt, self._table)
            if self.is_low
            else contextlib.nullcontext()
        )
        with region:
            result = type(module).forward(module, *args, **kwargs)
        return widened(result)


@out_of_graphs("no graph could be captured of this module")
def _run_fallback(
    fallback: Fallback, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return fallback.run(args, kwargs)


def fall_back(
    model: nn.Module,
    watch: CoverageWatch,
    captured: set[str],
    fallback_of: Callable[[nn.Module, str], Fallback],
) -> tuple[Uncovered, ...]:
    """Give every module of which nothing was captured its fallback, and name all.

    Args:
        model: The model.
        watch: What ran outside of graphs.
        captured: Modules that captured nodes come from.
        fallback_of: Makes the fallback of a module.
    """
    found = []
    for fqn, ops in watch.found.items():
        module = model.get_submodule(fqn)
        fallback = fallback_of(module, fqn)
        if fqn and fqn not in captured and fallback.is_low:
            install(module, fallback)
        stands_in = module.__dict__.get("forward")
        falls = isinstance(stands_in, Fallback) and stands_in.is_low
        treatment = "autocast" if falls else "fp32"
        found.append(Uncovered(module=fqn, ops=tuple(ops), treatment=treatment))
    return tuple(found)


def install(module: nn.Module, fallback: Fallback) -> None:
    """Give a module its fallback, unless the instance has a forward of its own."""
    if "forward" not in module.__dict__:
        module.__dict__["forward"] = fallback
