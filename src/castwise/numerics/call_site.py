"""Where an operator was called from: the module, the source line, the name used there.

In eager code Python's own frames know it. The innermost one called the operator, and
the bytecode at which it stands says by what name (`half`, `linear`, `@`). Its module is
the nearest `self` that belongs to the model. Nothing is hooked and nothing is patched,
so the code that is watched is the code that runs.

A graph that `torch.compile` captured runs as generated code, in which each line is one
node; the node remembers the module, the line and the name that it was captured from.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import re
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from types import CodeType, FrameType

Author = Literal["user", "torch", "border", "table"]
"""Whose code called the operator: a border of an island, or a kernel of the table."""

_Kind = Literal["user", "torch", "border", "table", "graph", "passage", "witness"]

_TORCH = str(Path(torch.__file__).parent)
_CASTWISE = str(Path(__file__).parents[1])
_INSTALLED = (
    Path(torch.__file__).parents[1],
    *{Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")},
)

# Whose code a file is, by the first prefix that fits; layers and recipes of castwise
# are models like those of any user.
_KINDS: dict[str, _Kind] = {
    "<eval_with_key>": "graph",
    f"{_TORCH}/_compile.py": "passage",
    f"{_TORCH}/_dynamo/eval_frame.py": "passage",
    f"{_TORCH}/_functorch/autograd_function.py": "passage",
    f"{_TORCH}/_higher_order_ops/": "passage",
    f"{_TORCH}/_ops.py": "passage",
    f"{_TORCH}/_prims/rng_prims.py": "passage",
    f"{_TORCH}/autograd/function.py": "passage",
    f"{_TORCH}/fx/interpreter.py": "passage",
    f"{_TORCH}/": "torch",
    f"{_CASTWISE}/autocast_kernels.py": "table",
    f"{_CASTWISE}/graph/apart.py": "passage",
    f"{_CASTWISE}/graph/regions.py": "passage",
    f"{_CASTWISE}/numerics/replay.py": "passage",
    f"{_CASTWISE}/numerics/": "witness",
    f"{_CASTWISE}/layers/": "user",
    f"{_CASTWISE}/recipes/": "user",
    f"{_CASTWISE}/": "border",
}

_OPERATORS = {ast.MatMult: "matmul", ast.Pow: "pow"}
_STACK_ENTRY = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_SUBMODULE = re.compile(r"\._modules\['(?P<name>\w+)'\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSite:
    """Where one call of an operator comes from."""

    module: str | None
    """fqn of the innermost module; none outside of the model."""

    where: str
    """`file:line` of the user's code, or of PyTorch's where there is no other."""

    call: str | None
    """The name that the source calls it by, as the operator table spells names."""

    names_dtype: bool
    """Whether the call gives `dtype=`, and so decides for itself."""

    author: Author
    """Whose code it is."""

    graph_of: str | None = None
    """fqn of the compiled module, where the call was part of a captured graph."""

    traced_in: Literal["forward", "backward"] | None = None
    """The stage that a node of a graph captured ahead of time comes from; it may run in
    the other one, where that saves memory."""


class CallSites:
    """Finds call sites in one model."""

    def __init__(self, model: nn.Module) -> None:
        self._fqns: dict[int, str] = {}
        for fqn, module in model.named_modules():
            self._fqns.setdefault(id(module), without_wrapper(fqn))
        self._calls: dict[tuple[CodeType, int], tuple[str | None, bool]] = {}
        self._nodes: dict[tuple[CodeType, int], tuple[str | None, CallSite]] = {}

    def here(self, graph_of: str | None = None) -> CallSite:
        """Find the site of the call that is being dispatched.

        Args:
            graph_of: The compiled module whose backward runs, if one does.
        """
        frame, author = _caller(sys._getframe(1))  # noqa: SLF001 -- the public way is slower by a hundred times
        if frame is None:
            return _NOWHERE
        if _kind(frame) == "graph":
            return self._in_graph(frame, graph_of)
        call, names_dtype = self._call_at(frame)
        module, where = self._surroundings(frame)
        return CallSite(
            module=module,
            where=where or _shown(frame.f_code.co_filename, frame.f_lineno),
            call=call,
            names_dtype=names_dtype,
            author=author,
        )

    def _surroundings(self, frame: FrameType | None) -> tuple[str | None, str | None]:
        """The nearest module, and the nearest line of a user, from a frame outwards."""
        module = where = None
        while frame is not None and (module is None or where is None):
            kind = _kind(frame)
            if kind == "witness":
                break
            if where is None and kind == "user":
                where = _shown(frame.f_code.co_filename, frame.f_lineno)
            if module is None:
                module = self._module_of(frame)
            frame = frame.f_back
        return module, where

    def _module_of(self, frame: FrameType) -> str | None:
        code = frame.f_code
        if not code.co_argcount:
            return None
        owner = frame.f_locals.get(code.co_varnames[0])
        return self._fqns.get(id(owner)) if isinstance(owner, nn.Module) else None

    def _call_at(self, frame: FrameType) -> tuple[str | None, bool]:
        key = frame.f_code, frame.f_lasti
        if key not in self._calls:
            self._calls[key] = _called_name(frame)
        return self._calls[key]

    def _in_graph(self, frame: FrameType, graph_of: str | None) -> CallSite:
        key = frame.f_code, frame.f_lineno
        if key not in self._nodes:
            self._nodes[key] = self._site_of_node(_node_at(frame))
        path, site = self._nodes[key]
        outer = self._surroundings(frame.f_back)[0] if graph_of is None else graph_of
        module = site.module if outer is None or path is None else _join(outer, path)
        return replace(site, module=module, graph_of=outer or "")

    def _site_of_node(self, node: Any) -> tuple[str | None, CallSite]:
        """Path below the compiled module, and the site as far as the node knows it."""
        meta = _meta_of(node)
        stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
        sources = meta.get("source_fn_stack") or meta.get("fwd_source_fn_stack") or ()
        path: str | None = ""
        module = None
        if stack:
            key, (text, _) = list(stack.items())[-1]
            path = _path_below_self(text)
            module = self._fqns.get(int(str(key).partition("@")[0]))
        where, author = _where_of_node(meta.get("stack_trace") or "")
        call = _source_name(*sources[-1]) if sources else None
        return path, CallSite(
            module=module,
            where=where,
            call=call,
            names_dtype=False,
            author=author,
            traced_in=_TAGS.get(meta.get("partitioner_tag")),
        )


_TAGS: dict[Any, Literal["forward", "backward"]] = {
    "is_forward": "forward",
    "is_backward": "backward",
}

_NOWHERE = CallSite(
    module=None, where="unknown", call=None, names_dtype=False, author="torch"
)


def is_of_user(file: str) -> bool:
    """Whether a file is neither PyTorch's nor part of what castwise puts around it."""
    return _kind_of_file(file) == "user"


def without_wrapper(fqn: str) -> str:
    """The name of a module without what `torch.compile` puts around a model."""
    return ".".join(part for part in fqn.split(".") if part != "_orig_mod")


def _caller(frame: FrameType | None) -> tuple[FrameType | None, Author]:
    """The innermost frame that is neither ours nor the dispatcher's."""
    author: Author | None = None
    while frame is not None:
        kind = _kind(frame)
        if kind == "table":
            author = "table"
        elif kind not in {"passage", "witness"} and not _is_another_mode(frame):
            break
        frame = frame.f_back
    if frame is None:
        return None, "torch"
    if author is None:
        found = _kind(frame)
        author = found if found in {"user", "torch", "border"} else "torch"
    assert author is not None
    return frame, author


def _is_another_mode(frame: FrameType) -> bool:
    """Whether a frame is that of a dispatch mode between the caller and the witness."""
    return frame.f_code.co_name == "__torch_dispatch__"


_kinds: dict[str, _Kind] = {}


def _kind(frame: FrameType) -> _Kind:
    file = frame.f_code.co_filename
    kind = _kinds.get(file)
    if kind is None:
        kind = _kinds.setdefault(file, _kind_of_file(file))
    return kind


def _kind_of_file(file: str) -> _Kind:
    kinds = (kind for prefix, kind in _KINDS.items() if file.startswith(prefix))
    return next(kinds, "user")


def _called_name(frame: FrameType) -> tuple[str | None, bool]:
    """What the source at a frame's instruction calls, and whether with `dtype=`."""
    positions = itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    first, last, start, end = next(positions)
    if first is None or last is None or start is None or end is None:
        return None, False
    file = frame.f_code.co_filename
    lines = [linecache.getline(file, number) for number in range(first, last + 1)]
    # columns count bytes
    encoded = [line.encode() for line in lines]
    encoded[-1] = encoded[-1][:end]
    encoded[0] = encoded[0][start:]
    try:
        text = b"".join(encoded).decode()
        node = ast.parse(f"({text})", mode="eval").body
    except (SyntaxError, UnicodeDecodeError):
        return None, False
    return _name_of_expression(node, frame)


def _name_of_expression(node: ast.expr, frame: FrameType) -> tuple[str | None, bool]:
    if isinstance(node, ast.BinOp):
        return _OPERATORS.get(type(node.op)), False
    if not isinstance(node, ast.Call):
        return None, False
    names_dtype = any(
        keyword.arg == "dtype"
        and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is None
        )
        for keyword in node.keywords
    )
    if isinstance(node.func, ast.Attribute):
        return node.func.attr, names_dtype
    if isinstance(node.func, ast.Name):
        known = frame.f_globals.get(node.func.id)
        return getattr(known, "__name__", node.func.id), names_dtype
    return None, names_dtype


def _node_at(frame: FrameType) -> Any:
    """The node of a captured graph whose line a frame of its code stands at."""
    module = frame.f_locals.get("self")
    lines: dict[int, int | None] | None = getattr(module, "_lineno_map", None)
    if module is None or lines is None:
        return None
    at = lines.get(frame.f_lineno - getattr(module, "_prologue_start", 0))
    return None if at is None else list(module.graph.nodes)[at]


def _meta_of(node: Any) -> dict[str, Any]:
    """What a node remembers; one that AOTAutograd put in asks what it is fed by."""
    if node is None or "stack_trace" in node.meta:
        return {} if node is None else node.meta
    known = [each.meta for each in node.all_input_nodes if "stack_trace" in each.meta]
    return {
        name: known[-1][name]
        for name in ("nn_module_stack", "fwd_nn_module_stack", "stack_trace")
        if known and name in known[-1]
    }


def _path_below_self(text: str) -> str | None:
    """`L['self'].blocks.0` is `blocks.0`; none for a module that is no attribute."""
    root, bracket, rest = text.partition("]")
    if not bracket or not root.startswith("L["):
        return None
    return _SUBMODULE.sub(r".\g<name>", rest).lstrip(".")


def _where_of_node(trace: str) -> tuple[str, Author]:
    entries = [(m["file"], int(m["line"])) for m in _STACK_ENTRY.finditer(trace)]
    if not entries:
        return "unknown", "torch"
    kinds = [_kind_of_file(file) for file, _ in entries]
    users = [
        entry for entry, kind in zip(entries, kinds, strict=True) if kind == "user"
    ]
    last: Author = kinds[-1] if kinds[-1] in {"user", "border"} else "torch"
    return _shown(*(users or entries)[-1]), last


def _source_name(name: str, target: Any) -> str:
    """The name under which Dynamo saw a function called."""
    if isinstance(target, str):
        return target
    if inspect.isclass(target) or not hasattr(target, "__name__"):
        return re.sub(r"_\d+$", "", name)
    return str(target.__name__)


def _join(outer: str, path: str) -> str:
    return f"{outer}.{path}" if outer and path else outer or path


@functools.cache
def _shown(file: str, line: int) -> str:
    return f"{shown_file(file)}:{line}"


def shown_file(file: str) -> str:
    """Name a file as short as it stays clear, and the same on every machine.

    Installed code goes by its package, other code below the working folder if it is.
    """
    path = Path(file)
    for root in (*_INSTALLED, Path.cwd(), Path(_CASTWISE).parent):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return file


def is_below(module: str | None, fqn: str) -> bool:
    """Whether a module is the named one, or inside of it."""
    if module is None:
        return False
    return not fqn or module == fqn or module.startswith(f"{fqn}.")
