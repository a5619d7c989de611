"""A backward in a precision of its own: run the module again in it, and differentiate.

Gradients cannot simply be computed in another format than the values that a forward
kept: the engine of autograd casts each of them back to the format of the tensor that it
belongs to, so whatever was gained in one operator is rounded away before the next. The
backward of such a module therefore keeps nothing of its forward but the inputs:

    forward     y = f(x, w)                    in the forward's precision, without graph
    backward    y' = f(x, w), then x', w' = d(y' . g)    all in the backward's precision

What comes out is the gradient of the module's function at the inputs and weights as
they are held, with each product and sum of it in the backward's format. It is handed on
in the formats of the inputs and of the weights. Buffers, train or eval mode, random
numbers and phase are those of the forward, and the module is afterwards what it was.

The price is a second forward, and a third where the first one drew random numbers. The
gain in memory is that of recompute: no activation inside of the module is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from castwise.errors import IslandError
from castwise.islands.crossing import PutBack, TakeOut, complex_of
from castwise.islands.draws import RandomStates, Record, Replay
from castwise.islands.eager import out_of_graphs
from castwise.islands.facts import shown
from castwise.islands.lending import Slots, lent, lock, slots_of
from castwise.islands.passage import passing
from castwise.islands.swap import island_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from castwise.islands.border import Border, Island

Forward = Callable[..., Any]
"""The module's own forward, as a function of the module and its arguments."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""An output of the second run, and the gradient that arrived for it."""


@out_of_graphs("the module has a backward in a precision of its own (castwise)")
def run_with_own_backward(
    island: Island,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a module in its forward's precision, ready for a backward in another one."""
    if not torch.is_grad_enabled():
        return island.run_inside(module, forward, args, kwargs)
    if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 -- no public way to ask
        raise IslandError(
            f"{shown(island.fqn)} has a backward of its own, which the transforms of "
            "torch.func cannot pass; leave out the rule's stage, or use torch.autograd"
        )
    call = _Call(island, module, forward)
    tensors = call.take_out(args, kwargs)
    if not any(tensor.requires_grad for tensor in tensors):
        return island.run_inside(module, forward, args, kwargs)
    flat = _OwnBackward.apply(call, args, kwargs, *tensors)  # type: ignore[no-untyped-call]
    return PutBack(flat).values(call.outputs)


class _OwnBackward(torch.autograd.Function):
    """Stands for the whole module in the graph of its surroundings."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, args: Any, kwargs: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run the module without a graph; keep its inputs and weights."""
        outputs = call.run(args, kwargs, tensors)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        exact = (t for t in outputs if not (t.is_floating_point() or t.is_complex()))
        ctx.mark_non_differentiable(*exact)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        """Run the module again with a graph, and differentiate it."""
        needed = ctx.needs_input_grad[3:]
        found = ctx.call.differentiate(ctx.saved_tensors, needed, gradients)
        return None, None, None, *found


class _Call:
    """One call of the module: all that its backward needs, but for the tensors."""

    def __init__(self, island: Island, module: nn.Module, forward: Forward) -> None:
        self._island, self._module, self._forward = island, module, forward
        self._phase = island.now.phase
        self._state = _ModuleState(module)
        self._places: Any = None
        self.outputs: Any = None
        """What the forward returned, with places instead of tensors."""

    def take_out(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """List the tensors that the module reads, each once; keep their places."""
        taken = TakeOut()
        self._places = taken.values([args, kwargs, slots_of(self._state.owners)])
        return taken.tensors

    def run(
        self, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Run the forward; returns the tensors of its outputs, each once."""
        self._autocast = _Autocast.now(self._border.device_type)
        random = RandomStates(tensors)
        with lock, passing("forward"):
            self._state.remember()
            outputs = self._island.run_inside(self._module, self._forward, args, kwargs)
        self._random = random if random.have_moved() else None
        taken = TakeOut()
        self.outputs = taken.values(outputs)
        # no views: autograd lets nobody change a view in place that was made here
        return tuple(tensor.detach() for tensor in taken.tensors)

    def differentiate(
        self,
        tensors: Sequence[torch.Tensor],
        needed: Sequence[bool],
        gradients: Sequence[torch.Tensor | None],
    ) -> Iterator[torch.Tensor | None]:
        """Run the module again in the backward's precision; return its gradients."""
        keeps_graph = torch.is_grad_enabled()  # these gradients get differentiated, too
        inputs = [
            _stand_in(tensor, keeps_graph=keeps_graph) if need else tensor
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        ours = [t for t, need in zip(inputs, needed, strict=True) if need]
        args, kwargs, weights = PutBack(inputs).values(self._places)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock)
            stack.enter_context(_phase(self._island, self._phase))
            draws = self._draws(args, kwargs, weights)
            stack.enter_context(passing("again"))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._state.restored(weights, self._border))
            stack.enter_context(self._border.weights_cast(self._module))
            stack.enter_context(self._autocast.off())
            with draws:
                outputs = self._island.run_inside(
                    self._module, self._forward, args, kwargs
                )
            pairs = self._pairs(outputs, gradients)
            self._refuse_foreign(pairs, ours)
            stack.enter_context(passing("gradient"))
            found = iter(_gradients(pairs, ours, keeps_graph=keeps_graph))
        return (next(found) if need else None for need in needed)

    @property
    def _border(self) -> Border:
        """The module's border while it is run again."""
        border = self._island.second[self._phase]
        assert border is not None
        return border

    def _draws(
        self, args: Any, kwargs: Any, weights: Slots
    ) -> contextlib.AbstractContextManager[Any]:
        """The forward's random numbers, found by running it as it ran."""
        if self._random is None:
            return contextlib.nullcontext()
        with (
            torch.no_grad(),
            passing("forward"),
            self._state.restored(weights),
            self._autocast.as_it_was(),
            self._random.rewound(),
            Record() as record,
        ):
            self._island.run_inside(self._module, self._forward, args, kwargs)
        return Replay(record.drawn)

    def _pairs(
        self, outputs: Any, gradients: Sequence[torch.Tensor | None]
    ) -> list[Pair]:
        taken = TakeOut()
        taken.values(outputs)
        if len(taken.tensors) != len(gradients):
            raise IslandError(
                f"{shown(self._island.fqn)} returned {len(gradients)} tensors, and "
                f"{len(taken.tensors)} when it was run again for its backward; make "
                "forward a function of its inputs, or leave out the rule's stage"
            )
        return [
            (output, gradient.to(output.dtype))
            for output, gradient in zip(taken.tensors, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]

    def _refuse_foreign(self, pairs: list[Pair], ours: list[torch.Tensor]) -> None:
        """Refuse to lose the gradient of a weight that is not the module's own."""
        known = {id(tensor) for tensor in ours}
        met = {tensor.grad_fn for tensor in ours}
        pending: list[Any] = [output.grad_fn for output, _ in pairs]
        while pending:
            node = pending.pop()
            if node is None or node in met:
                continue
            met.add(node)
            weight = getattr(node, "variable", None)  # of the nodes that end a graph
            if weight is not None and id(weight) not in known:
                raise IslandError(
                    f"{shown(self._island.fqn)} has a backward of its own, but uses a "
                    f"weight of shape {tuple(weight.shape)} that is not its own, whose "
                    "gradient would be lost; hand it to forward as an argument, or "
                    "leave out the rule's stage"
                )
            pending.extend(following for following, _ in node.next_functions)


class _ModuleState:
    """Buffers and modes of a module and of those below it, as a forward found them."""

    def __init__(self, module: nn.Module) -> None:
        self.owners = list(module.modules())
        """The module itself, and those below it."""
        self._module = module
        self._buffers: list[dict[str, torch.Tensor | None]] = []
        self._training: list[bool] = []

    def remember(self) -> None:
        """Copy what the forward may change."""
        self._training = [owner.training for owner in self.owners]
        self._buffers = [
            {name: None if b is None else b.clone() for name, b in _buffers(owner)}
            for owner in self.owners
        ]

    @contextlib.contextmanager
    def restored(self, weights: Slots, border: Border | None = None) -> Iterator[None]:
        """Bring the module back to the forward's state, and then to today's.

        Args:
            weights: What to see as weights.
            border: Where it runs wider than its buffers are held, they go up with it.
        """
        before = [(owner.training, dict(_buffers(owner))) for owner in self.owners]
        dtypes = {} if border is None else dict(_dtypes_inside(self._module, border))
        try:
            for owner, training, buffers in zip(
                self.owners, self._training, self._buffers, strict=True
            ):
                owner.training = training
                dtype = dtypes.get(owner)
                owner._buffers.update(  # noqa: SLF001 -- assignment by name would check and copy
                    {name: _raised(buffer, dtype) for name, buffer in buffers.items()}
                )
            with lent(self.owners, weights):
                yield
        finally:
            for owner, (training, kept) in zip(self.owners, before, strict=True):
                owner.training = training
                owner._buffers.update(kept)  # noqa: SLF001 -- as above


@dataclass(frozen=True, kw_only=True, slots=True)
class _Autocast:
    """The state of autocast around a call."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def now(cls, device_type: str) -> _Autocast:
        return cls(
            device_type=device_type,
            enabled=torch.is_autocast_enabled(device_type),
            dtype=torch.get_autocast_dtype(device_type),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )

    def as_it_was(self) -> torch.autocast:
        return torch.autocast(
            self.device_type,
            dtype=self.dtype,
            enabled=self.enabled,
            cache_enabled=self.cache_enabled,
        )

    def off(self) -> torch.autocast:
        """Off, but for the switch by which kernels know a recompute of our regions."""
        return torch.autocast(
            self.device_type, enabled=False, cache_enabled=self.cache_enabled
        )


def _buffers(owner: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    yield from owner._buffers.items()  # noqa: SLF001 -- its own, not those below it


def _dtypes_inside(
    module: nn.Module, border: Border
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Yield each module with the dtype that it computes in when it is run again."""
    yield module, border.dtype_inside
    for child in module.children():
        island = island_of(child)
        own = None if island is None else island.second_border
        yield from _dtypes_inside(child, own or border)


def _raised(
    buffer: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor | None:
    """A buffer for one run: never narrower, and never the one that is kept."""
    if buffer is None or not (buffer.is_floating_point() or buffer.is_complex()):
        return None if buffer is None else buffer.clone()
    wanted = dtype or buffer.dtype
    if buffer.is_complex():
        wanted = complex_of(wanted)
    wider = wanted.itemsize > buffer.dtype.itemsize
    return buffer.to(wanted if wider else buffer.dtype, copy=True)


def _stand_in(tensor: torch.Tensor, *, keeps_graph: bool) -> torch.Tensor:
    """A tensor of its own for the second run, whose gradient is asked for."""
    if keeps_graph:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _gradients(
    pairs: list[Pair], inputs: list[torch.Tensor], *, keeps_graph: bool
) -> Sequence[torch.Tensor | None]:
    if not pairs:
        return [None] * len(inputs)
    outputs = [output for output, _ in pairs]
    arrived = [gradient for _, gradient in pairs]
    if keeps_graph:
        return torch.autograd.grad(
            outputs, inputs, arrived, allow_unused=True, create_graph=True
        )
    # The stand-ins are leaves. Re-entrant checkpoints inside refuse autograd.grad.
    torch.autograd.backward(outputs, arrived)
    return [tensor.grad for tensor in inputs]


@contextlib.contextmanager
def _phase(island: Island, phase: str) -> Iterator[None]:
    """Let a model be in the phase of the forward again."""
    before, island.now.phase = island.now.phase, phase
    try:
        yield
    finally:
        island.now.phase = before
