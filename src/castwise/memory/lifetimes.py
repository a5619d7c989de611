"""When each piece of memory of a step is born and dies, counted to the byte.

    ledger = Ledger(model)
    ledger.name(parameter, kind="weights", module="head")  # what stands there already
    with ledger:
        ...                                                # forward, backward, update
    lifetimes = ledger.lifetimes()
    lifetimes.peak()                                       # the instant that holds most

The ledger is a dispatch mode. It sees what operators return, real or fake, and keeps a
weak reference to the storage behind: views and in-place operators make no new storage,
and the death of a storage is heard the moment it happens. So the same ledger measures a
real step and foretells one under fake tensors, to the same byte.

What it cannot see, because it is no tensor at that level: memory that a kernel takes
and gives back within one operator (copies inside of a reduction, im2col), what oneDNN
and cuBLAS keep for themselves, the rounding of an allocator to its blocks, and whatever
a graph compiled by Inductor makes inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.dtypes import DTYPES

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

Kind = Literal[
    "weights",
    "storage",
    "buffers",
    "states",
    "beside",
    "batch",
    "gradients",
    "casts",
    "saved",
    "exchange",
    "working",
]
"""What a piece of memory is for; `KINDS` says it in words."""

KINDS: Mapping[str, str] = {
    "weights": "weights as the model computes with them",
    "storage": "what stands beside weights in 16 bits: masters, remainders",
    "buffers": "buffers of modules",
    "states": "states of the optimizer",
    "beside": "what the caller says stands there besides, such as averages",
    "batch": "the batch, and constants that the loss or the model refer to",
    "gradients": "gradients of the weights",
    "casts": "weights cast to another format for the length of the step",
    "saved": "activations held from the forward for the backward",
    "exchange": "on the way between processes: gathered weights, gradients, buckets",
    "working": "results that live within a forward, a backward or an update",
}
"""Every kind of memory, and what it is."""

STANDING = ("weights", "storage", "buffers", "states", "beside", "batch")
"""Kinds that stand there before the step begins and after it has ended."""

Stage = Literal["before", "forward", "recompute", "backward", "update"]
"""Part of a step; a recompute is a forward that a backward asked for."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPIES = frozenset({"_to_copy", "copy_"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One storage: what it is for, where it came from, and when it lived."""

    num_bytes: int
    """Its size."""

    kind: str
    """One of `KINDS`."""

    module: str
    """fqn of the module that made it; empty for what is outside of every module."""

    format: str
    """Format of the tensor that it was made for, or PyTorch's name of another dtype."""

    op: str
    """The operator that made it; empty for what stood there before."""

    stage: str
    """The part of the step that it was made in."""

    born: int
    """Instant of its birth, counted in births and deaths; 0: before the step."""

    died: int | None
    """Instant of its death; none: it outlived the step."""

    is_saved: bool = False
    """Whether autograd saved it for the backward, as `saved_tensors_hooks` count."""

    def alive(self, instant: int) -> bool:
        """Whether it lived at an instant, the one of its birth included."""
        return self.born <= instant and (self.died is None or instant < self.died)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifetimes:
    """Every allocation of a step, in order of birth."""

    allocations: tuple[Allocation, ...]
    """All of them."""

    marks: Mapping[str, int]
    """Instants by name: `backward` begins, `update` begins, the `end`."""

    def curve(self) -> list[int]:
        """Return the bytes held after each instant, from 0."""
        changes = [0] * (self.marks["end"] + 1)
        for each in self.allocations:
            changes[each.born] += each.num_bytes
            if each.died is not None:
                changes[each.died] -= each.num_bytes
        held, total = [], 0
        for change in changes:
            total += change
            held.append(total)
        return held

    def peak(self, first: int = 0, last: int | None = None) -> tuple[int, int]:
        """Return the earliest instant that holds most, and the bytes that it holds."""
        curve = self.curve()
        last = len(curve) - 1 if last is None else last
        instant = max(range(first, last + 1), key=lambda at: (curve[at], -at))
        return instant, curve[instant]

    def alive(self, instant: int) -> Iterator[Allocation]:
        """Yield what lived at an instant."""
        return (each for each in self.allocations if each.alive(instant))

    def born_at(self, instant: int) -> Allocation | None:
        """Return what was born at an instant; none where something died."""
        if instant == 0:
            return None
        return next((a for a in self.allocations if a.born == instant), None)

    def saved_bytes(self) -> int:
        """Return what autograd saved, each storage once.

        Weights, buffers and the batch are saved too, and cost nothing more.
        """
        return sum(
            each.num_bytes
            for each in self.allocations
            if each.is_saved and each.kind not in STANDING
        )


@dataclass(slots=True)
class _Block:
    """An allocation that is still being written about."""

    num_bytes: int
    kind: str
    module: str
    format: str
    op: str
    stage: str
    born: int
    died: int | None = None
    is_saved: bool = False
    key: int = field(default=0)


class Ledger(TorchDispatchMode):
    """Writes down every storage that operators make while it is entered.

    Args:
        model: Whose modules are named; hooks stand on it until the ledger is left.
        resizes: Look for storages that change their size, as those of FSDP2 do; takes
            a look at every living storage at every operator. Default: false.
    """

    def __init__(self, model: nn.Module, *, resizes: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._resizes = resizes
        self._blocks: list[_Block] = []
        self._living: dict[int, tuple[_Block, weakref.ref[Any]]] = {}
        self._instant = 0
        self._marks: dict[str, int] = {}
        self._stage: Stage = "before"
        self._modules: list[str] = []
        self._module_of_node: dict[int, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._saving = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Self:
        for fqn, module in self._model.named_modules():
            self._hooks += _follow(module, fqn, self._modules)
        self._saving.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        self._stage = "forward"
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._saving.__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._marks["end"] = self._instant

    def name(
        self, tensor: torch.Tensor, *, kind: Kind, module: str | None = None
    ) -> None:
        """Say what a tensor is for; a new one stood there before the step began."""
        for storage, dtype in _storages(tensor):
            block = self._found(storage)
            if block is None:
                block = self._add(storage, dtype, kind=kind, op="")
            block.kind = kind
            if module is not None:
                block.module = module

    def name_all(self, value: Any, *, kind: Kind) -> None:
        """Say what all tensors are for that are within a value."""
        for tensor in tensors_within(value):
            self.name(tensor, kind=kind)

    def stand(self, num_bytes: int, *, kind: Kind, module: str, fmt: str) -> None:
        """Count memory that no tensor here stands for."""
        self._blocks.append(
            _Block(num_bytes, kind, module, fmt, op="", stage="before", born=0)
        )

    def begin(self, stage: Stage) -> None:
        """Let a part of the step begin."""
        self._stage = stage
        self._marks[stage] = self._instant

    def lifetimes(self) -> Lifetimes:
        """Return what was written down; the ledger must have been left."""
        turn = self._marks.get("backward", self._marks["end"])
        for block in self._blocks:
            held = block.born <= turn and (block.died is None or turn < block.died)
            if block.kind == "working" and held and block.stage == "forward":
                block.kind = "saved"
            elif block.kind == "casts" and not held:
                block.kind = "working"
        return Lifetimes(
            allocations=tuple(map(_finished, self._blocks)), marks=dict(self._marks)
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._resizes:
            self._notice_resizes()
        for tensor in _tensors((args, kwargs)):
            self._notice(tensor)
        result = func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]  # noqa: SLF001 -- no public name
        kind: Kind = "working"
        if name in _COPIES and self._reads_weight(args):
            kind = "casts"
        module = self._module_now()
        for tensor in _tensors(result):
            for storage, dtype in _storages(tensor):
                if self._found(storage) is None:
                    self._add(storage, dtype, kind=kind, op=name, module=module)
        return result

    def _notice(self, tensor: torch.Tensor) -> None:
        """Count what comes from outside and was not named: it stood there before.

        Unless storages are resized: then it may have been empty until now.
        """
        kind: Kind = "exchange" if self._resizes else "batch"
        op = "resize" if self._resizes else ""
        for storage, dtype in _storages(tensor):
            if self._found(storage) is None:
                self._add(storage, dtype, kind=kind, op=op)

    def _notice_resizes(self) -> None:
        """Bury what has another size now, and let it be born again."""
        for key, (block, reference) in list(self._living.items()):
            storage = reference()
            if storage is None or storage.nbytes() == block.num_bytes:
                continue
            self._instant += 1
            block.died = self._instant
            again = replace(
                block, num_bytes=storage.nbytes(), born=self._instant, died=None
            )
            self._blocks.append(again)
            self._living[key] = again, weakref.ref(storage, self._death_of(again))

    def _reads_weight(self, args: Sequence[Any]) -> bool:
        if self._stage != "forward" and not self._modules:
            return False
        for tensor in _tensors(args[:1]):
            for storage, _ in _storages(tensor):
                block = self._found(storage)
                return block is not None and block.kind == "weights"
        return False

    def _module_now(self) -> str:
        """The module that runs, or whose forward the backward undoes."""
        if self._modules:
            module = self._modules[-1]
            if self._stage == "forward":
                made = torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001 -- as profilers do
                self._module_of_node.setdefault(made, module)
            return module
        node: Any = torch._C._current_autograd_node()  # noqa: SLF001 -- no public name
        number = -1 if node is None else node._sequence_nr()  # noqa: SLF001 -- as above
        return self._module_of_node.get(number, "")

    def _found(self, storage: torch.UntypedStorage) -> _Block | None:
        found = self._living.get(storage._cdata)  # noqa: SLF001 -- the only name of a storage
        return None if found is None else found[0]

    def _add(
        self,
        storage: torch.UntypedStorage,
        dtype: torch.dtype,
        *,
        kind: Kind,
        op: str,
        module: str = "",
    ) -> _Block:
        stage: Stage = self._stage if op else "before"
        if stage == "backward" and self._modules:
            stage = "recompute"
        if op:
            self._instant += 1
        block = _Block(
            num_bytes=storage.nbytes(),
            kind=kind,
            module=module,
            format=_format_name(dtype),
            op=op,
            stage=stage,
            born=self._instant if op else 0,
            key=storage._cdata,  # noqa: SLF001 -- as above
        )
        self._blocks.append(block)
        self._living[block.key] = block, weakref.ref(storage, self._death_of(block))
        return block

    def _death_of(self, block: _Block) -> Callable[[weakref.ref[Any]], None]:
        own = weakref.ref(self)  # storages may outlive the ledger

        def died(_: weakref.ref[Any]) -> None:
            ledger = own()
            if ledger is not None:
                ledger._bury(block)  # noqa: SLF001 -- its own

        return died

    def _bury(self, block: _Block) -> None:
        if "end" in self._marks:
            return
        del self._living[block.key]
        self._instant += 1
        block.died = self._instant

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        for storage, dtype in _storages(tensor):
            block = self._found(storage)
            if block is None:
                block = self._add(storage, dtype, kind="batch", op="")
            block.is_saved = True
        return tensor


def tensors_within(value: Any, depth: int = 6) -> Iterator[torch.Tensor]:
    """Yield the tensors within tuples, dicts and objects of one's own."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors_within(each, depth - 1)
    elif depth and isinstance(value, dict):
        yield from tensors_within(list(value.values()), depth)
    elif depth and not callable(value):
        slots = getattr(type(value), "__slots__", ())
        names = {*getattr(value, "__dict__", ()), *slots}
        found = [getattr(value, name, None) for name in sorted(names)]
        yield from tensors_within(found, depth - 1)


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _follow(
    module: nn.Module, fqn: str, running: list[str]
) -> tuple[RemovableHandle, RemovableHandle]:
    """Let a list end with the module that runs, whatever ends its forward."""

    def enter(*_: Any) -> None:
        running.append(fqn)

    def leave(*_: Any) -> None:
        running.pop()

    return (
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    )


def _finished(block: _Block) -> Allocation:
    return Allocation(
        num_bytes=block.num_bytes,
        kind=block.kind,
        module=block.module,
        format=block.format,
        op=block.op,
        stage=block.stage,
        born=block.born,
        died=block.died,
        is_saved=block.is_saved,
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


def _storages(
    tensor: torch.Tensor,
) -> Iterator[tuple[torch.UntypedStorage, torch.dtype]]:
    """Yield the storages behind a tensor; a wrapper (DTensor) has more inside."""
    if tensor.layout is not torch.strided:
        if tensor.is_sparse:
            raw = tensor._values(), tensor._indices()  # noqa: SLF001 -- as stored
            for part in raw:
                yield part.untyped_storage(), part.dtype
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.untyped_storage(), tensor.dtype
        return
    names, _ = flatten()
    for name in names:  # some wrappers list what is no tensor, such as a mesh
        inner = getattr(tensor, name)
        if isinstance(inner, torch.Tensor):
            yield from _storages(inner)


def _format_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))
