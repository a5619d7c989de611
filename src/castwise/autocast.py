"""Put the operator table into force: the same casts on every device.

    with autocast("cpu", "bf16"):
        loss = loss_fn(model(x), y)
    loss.backward()

`torch.autocast` does the base. Where its list for the device has no entry for an
operator, or another one than the table, a kernel of `castwise.autocast_kernels` stands
in at the dispatcher's Autocast key. Kernels are registered once per process, at the
first entry (some 0.1 s), and stay; outside of a region they do what PyTorch does.

When is the table in force? Three states of PyTorch decide, because each is kept by one
of the tools that call an operator later or elsewhere:

*   The *mark*: inside a region, autocast is also enabled for the device type `ipu`, in
    a dtype that stands for the table. No tensor lives there, so nothing computes
    differently, but `torch.compile` guards every device's autocast state: code compiled
    without a table, or under another one, is never taken for code under this one.
*   A recompute runs in a backward pass, outside of the region and maybe in another
    thread. Checkpointing restores `torch.autocast` there, but not the mark. Being in a
    backward pass with the cast cache off, which our regions set and checkpointing
    restores, tells it from a foreign `torch.autocast`.
*   The cast cache is off in a region. It would keep a stale cast when a weight changes
    in place, and would add up the gradients of a shared weight in the low format.

One table is in force at a time in the process: a recompute has no way to name its own.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch._functorch.config
import torch.compiler.config

from castwise.autocast_kernels import (
    BATCH_NORMS,
    LOW_DTYPES,
    OperatorKernel,
    autocast_key,
    needs_kernel,
)
from castwise.dtypes import dtype_of, format_of
from castwise.errors import (
    PolicyError,
    RuleError,
    SettingsError,
    UnsupportedFormatError,
)
from castwise.fp8_products import served
from castwise.policy.ops import (
    DEFAULT_TABLE,
    FP8_PRODUCTS,
    OUTER_OPERATORS,
    OperatorTable,
    operator_name,
)

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from castwise.formats import Format
    from castwise.policy.ops import Category

DEVICE_TYPES = ("cpu", "cuda")
"""Where the table can be put into force."""

_MARK_DEVICE = "ipu"
_MARK_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex32,
    torch.complex64,
    torch.complex128,
)

# Where PyTorch has an autocast kernel, its category is the one of our default table,
# except here. "as_is" stands for its refusal of binary_cross_entropy; recurrent layers
# are cast further in, by the kernel of _cudnn_rnn, which keeps their flat weights.
_NATIVE_EXCEPTIONS: dict[tuple[str, str], Category] = {
    ("cuda", "binary_cross_entropy"): "as_is",
    ("cuda", "grid_sampler"): "widest",
}
_CAST_BY_CUDNN = frozenset({"gru", "lstm", "rnn_relu", "rnn_tanh"})


@contextmanager
def autocast(
    device_type: str,
    fmt: str | Format,
    table: OperatorTable = DEFAULT_TABLE,
    *,
    enabled: bool = True,
    fp8: bool = False,
) -> Iterator[None]:
    """Run operators in the formats that the table gives them.

    Args:
        device_type: `cpu` or `cuda`; tensors of other devices are left alone.
        fmt: The low format, `bf16` or `fp16`.
        table: The operator table.
        enabled: With False, a region in which nothing is cast.
        fp8: Whether islands in the region compute in fp8, which products must emulate.

    Raises:
        UnsupportedFormatError: The format is not a low one.
        RuleError: The table names an operator that PyTorch does not have.
        PolicyError: Another table is in force in this process.
    """
    dtype = dtype_of(fmt)
    if dtype not in LOW_DTYPES:
        raise UnsupportedFormatError(
            f"a region needs the low format bf16 or fp16, got {format_of(dtype)}; "
            "for wider formats leave autocast off or use an island"
        )
    if not enabled:
        with torch.autocast(device_type, dtype, enabled=False):
            yield
        return
    mark = _SWITCHBOARD.enter(device_type, table, fp8=fp8)
    try:
        with (
            _marked(mark.dtype),
            _compiled_apart(mark.digest),
            torch.autocast(device_type, dtype, cache_enabled=False),
        ):
            yield
    finally:
        _SWITCHBOARD.leave()


def install(device_type: str, table: OperatorTable = DEFAULT_TABLE) -> None:
    """Register a table's kernels ahead of the first region, and check its names.

    Raises:
        RuleError: The table names an operator that PyTorch does not have.
        PolicyError: Another table is in force in this process.
    """
    _SWITCHBOARD.enter(device_type, table)
    _SWITCHBOARD.leave()


def uninstall() -> None:
    """Take every kernel out of PyTorch's dispatcher.

    A backward pass that still has to recompute would do so without the table.

    Raises:
        PolicyError: A region is open.
    """
    _SWITCHBOARD.clear()


def installed_table() -> OperatorTable | None:
    """The table of the last region, which a recompute follows, if any."""
    return _SWITCHBOARD.table


def check_operators(table: OperatorTable) -> None:
    """Refuse a table that names operators which PyTorch does not have.

    Raises:
        RuleError: With the nearest names that it has.
    """
    for entry in table.entries:
        # An entry of the default table may be newer than the PyTorch at hand.
        if entry not in DEFAULT_TABLE.entries and not _overloads(entry.op):
            near = difflib.get_close_matches(entry.op, _operator_names(), n=3)
            meant = ", ".join(near) or "an ATen name such as softmax"
            raise RuleError(
                f"the operator table needs operators of PyTorch, got {entry.op!r} "
                f"({entry.because}); did you mean {meant}?"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """What stands for a table where code is compiled."""

    dtype: torch.dtype
    digest: str


class _Switchboard:
    """The kernels in the dispatcher, the table that they follow, and who uses it."""

    def __init__(self) -> None:
        self.table: OperatorTable | None = None
        self._lock = threading.Lock()
        self._num_regions = 0
        self._libraries: dict[str, torch.library.Library] = {}
        self._kernels: dict[tuple[str, str], OperatorKernel] = {}
        self._served: dict[str, OperatorTable] = {}
        self._marks: dict[str, _Mark] = {}
        self._mark: _Mark | None = None

    def enter(
        self, device_type: str, table: OperatorTable, *, fp8: bool = False
    ) -> _Mark:
        """Follow the table on a device; returns what stands for it."""
        if device_type not in DEVICE_TYPES:
            raise SettingsError(
                f"the operator table works on {' and '.join(DEVICE_TYPES)}, got "
                f"device type {device_type!r}; move the model to one of them"
            )
        with self._lock:
            if self._num_regions and self.table != table:
                self._refuse_second(table)
            if fp8 and device_type not in served:
                self._served.pop(device_type, None)
                served.add(device_type)
            if self._served.get(device_type) is not table:
                _define_late_operators()
                check_operators(table)
                self._serve(device_type, table)
            if self._mark is None or self.table is not table:
                self.table, self._mark = table, self._mark_of(table)
            self._num_regions += 1
            return self._mark

    def leave(self) -> None:
        """Count one region less; kernels stay, for recomputes."""
        with self._lock:
            self._num_regions -= 1

    def clear(self) -> None:
        """Undo every registration."""
        with self._lock:
            if self._num_regions:
                raise PolicyError(
                    f"no table can be uninstalled while {self._num_regions} region(s) "
                    "are open; leave them first"
                )
            for library in self._libraries.values():
                library._destroy()  # type: ignore[no-untyped-call]  # noqa: SLF001 -- the only way to undo a registration at once
            self._libraries.clear()
            self._kernels.clear()
            self._served.clear()
            served.clear()
            self.table = self._mark = None

    def _refuse_second(self, table: OperatorTable) -> None:
        assert self.table is not None
        other = set(self.table.entries) ^ set(table.entries)
        raise PolicyError(
            "one operator table can be in force at a time in a process, got a second "
            f"one that differs in {', '.join(sorted({entry.op for entry in other}))}; "
            "leave the first region before, or give both the same table"
        )

    def _serve(self, device_type: str, table: OperatorTable) -> None:
        """Make a device's kernels follow the table, registering what is missing."""
        before = self._served.get(device_type)
        for name, category in _changes(before, table).items():
            for op in (*_overloads(name), *_overloads(f"{name}_")):
                self._set(op, name, device_type, category)
        self._served[device_type] = table

    def _set(
        self, op: OpOverload, name: str, device_type: str, category: Category
    ) -> None:
        kernel = self._kernels.get((device_type, _name_of(op)))
        if kernel is None:
            native = _native_category(op, name, device_type)
            emulates = name in FP8_PRODUCTS and device_type in served
            if _suffices(native, category) and not (emulates or name in BATCH_NORMS):
                return
            if native is None and not needs_kernel(op, category):
                return
            kernel = OperatorKernel(op, device_type, in_force=_in_force)
            self._register(op, kernel, device_type)
        kernel.follow(category)

    def _register(
        self, op: OpOverload, kernel: OperatorKernel, device_type: str
    ) -> None:
        namespace = op.namespace
        if namespace not in self._libraries:
            self._libraries[namespace] = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            # Standing in for a kernel of PyTorch is what we mean to do.
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously reg")
            self._libraries[namespace].impl(  # type: ignore[no-untyped-call]
                op, kernel, autocast_key(device_type), with_keyset=True
            )
        self._kernels[device_type, _name_of(op)] = kernel

    def _mark_of(self, table: OperatorTable) -> _Mark:
        digest = table.digest()
        if digest not in self._marks:
            if len(self._marks) == len(_MARK_DTYPES):
                self._marks.clear()
                _forget_compiled_code()
            dtype = _MARK_DTYPES[len(self._marks)]
            self._marks[digest] = _Mark(dtype=dtype, digest=digest)
        return self._marks[digest]


_SWITCHBOARD = _Switchboard()


def _changes(before: OperatorTable | None, after: OperatorTable) -> dict[str, Category]:
    """The operators whose category is another one after; all of them at first."""
    earlier = () if before is None else before.entries
    names = {entry.op for entry in (*earlier, *after.entries)} | set(OUTER_OPERATORS)
    return {
        name: after.category(name)
        for name in sorted(names | BATCH_NORMS)
        if before is None or before.category(name) != after.category(name)
    }


def _in_force() -> bool:
    """Whether the running call belongs to one of our regions, or to its recompute."""
    if torch.is_autocast_enabled(_MARK_DEVICE):
        return True
    in_backward = torch._C._current_graph_task_id() >= 0  # noqa: SLF001 -- no public way to ask
    return in_backward and not torch.is_autocast_cache_enabled()


@contextmanager
def _marked(mark: torch.dtype) -> Iterator[None]:
    before = torch.get_autocast_dtype(_MARK_DEVICE)
    enabled = torch.is_autocast_enabled(_MARK_DEVICE)
    torch.set_autocast_enabled(_MARK_DEVICE, True)
    torch.set_autocast_dtype(_MARK_DEVICE, mark)
    try:
        yield
    finally:
        torch.set_autocast_enabled(_MARK_DEVICE, enabled)
        torch.set_autocast_dtype(_MARK_DEVICE, before)


@contextmanager
def _compiled_apart(digest: str) -> Iterator[None]:
    """What is compiled in a region stays apart from what is compiled elsewhere.

    The caches on disk outlive the mark, so they get the digest as a key. The backward
    graph is traced without autocast, as backward runs in eager mode: otherwise products
    of an fp32 island have low gradients (pytorch#179804).
    """
    compiler, functorch = torch.compiler.config, torch._functorch.config  # noqa: SLF001 -- where the switch is
    tag, backward = compiler.cache_key_tag, functorch.backward_pass_autocast
    compiler.cache_key_tag = f"{tag}castwise-{digest}"
    functorch.backward_pass_autocast = "off"  # noqa: S105 -- a pass, not a word
    try:
        yield
    finally:
        compiler.cache_key_tag = tag
        functorch.backward_pass_autocast = backward


def _forget_compiled_code() -> None:
    """Marks are used again: guards can no longer tell the tables apart."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # noqa: SLF001 -- its public name, torch.compiler.reset, loads it


def _define_late_operators() -> None:
    """PyTorch 2.13 defines some operators in a module that it loads when needed."""
    with suppress(ImportError):
        importlib.import_module("torch.nn.modules.linear_cross_entropy")


def _native_category(op: OpOverload, name: str, device_type: str) -> Category | None:
    """What PyTorch's own autocast does with an operator, if it does anything."""
    if device_type == "cuda" and name in _CAST_BY_CUDNN:
        return "low"
    key = autocast_key(device_type)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_name_of(op), key):  # noqa: SLF001 -- no public way to ask
        return None
    return _NATIVE_EXCEPTIONS.get((device_type, name), DEFAULT_TABLE.category(name))


def _overloads(name: str) -> tuple[OpOverload, ...]:
    """The overloads of an operator that the dispatcher knows."""
    namespace, _, bare = name.rpartition("::")
    packet = getattr(getattr(torch.ops, namespace or "aten"), bare, None)
    if packet is None:
        return ()
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    # Overloads of TorchScript alone, such as einsum.sublist, take no kernel.
    return tuple(op for op in overloads if torch._C._dispatch_has_kernel(_name_of(op)))  # noqa: SLF001 -- no public way to ask


def _suffices(native: Category | None, category: Category) -> bool:
    """Whether PyTorch's own kernel does; its widest refuses bf16 beside fp16."""
    return category == (native or "as_is") and native != "widest"


def _name_of(op: OpOverload) -> str:
    name: str = op.name()  # type: ignore[no-untyped-call]
    return name


def _operator_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()  # noqa: SLF001 -- no public way to ask
    return sorted({operator_name(name) for name in names})
