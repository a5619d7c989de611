"""How operators treat formats, as the planner sees them: which follow, move, decide.

The operator table says which operators compute low, which in fp32, and which in the
widest of their inputs. All others are left alone, and there the planner has a choice:

    follows    the result has the format of the inputs: gelu, dropout, batch_norm
    promotes   one that takes inputs of several formats, and widens: add, mul
    moves      a follower that commutes with rounding: views, cat, relu
    decides    the result is no number but a decision: argmax, comparisons
    like       makes a new tensor after the shape of another: zeros_like
    reads      asks for a shape, never for a number

An operator that is on none of these lists is *opaque*: it runs in the formats that it
was captured in, which is always right, and the plan names it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from castwise.policy.ops import operator_name

if TYPE_CHECKING:
    from torch import fx


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names("""
    T cat chunk clone contiguous detach diagonal flatten flip getitem hsplit mT
    moveaxis movedim narrow neg permute ravel relu reshape reshape_as roll select split
    split_with_sizes squeeze stack swapaxes swapdims t tensor_split transpose tril triu
    unbind unflatten unsqueeze view view_as vsplit
    """)
"""Rounding before them or after them gives the same numbers."""

PROMOTES = frozenset({"add", "div", "mul", "sub"})
"""They take inputs of several formats, and the result is as wide as the widest."""

FOLLOWS = (
    MOVES
    | PROMOTES
    | _names("""
        abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d
        adaptive_max_pool2d addcmul alpha_dropout amax amin atan avg_pool1d avg_pool2d
        batch_norm broadcast_to ceil celu clamp clamp_max clamp_min cos dropout
        dropout1d dropout2d dropout3d elu embedding erf expand expand_as
        feature_alpha_dropout feature_dropout floor gather gelu glu hardshrink
        hardsigmoid hardswish hardtanh index_add index_select instance_norm leaky_relu
        lerp logsigmoid masked_fill max max_pool1d max_pool2d maximum mean min minimum
        mish nan_to_num pad pixel_shuffle pixel_unshuffle relu6 repeat
        repeat_interleave round scatter scatter_add selu sigmoid sign silu sin
        softshrink softsign sort sqrt square std take_along_dim tanh tanhshrink
        threshold tile topk trunc unfold var where
        """)
)
"""The result has the format of the inputs; sums inside of them run in fp32."""

IN_PLACE = _names("""
    abs add addcmul clamp clamp_max clamp_min copy div dropout elu fill hardsigmoid
    hardswish hardtanh index_add leaky_relu lerp masked_fill mul neg relu relu6 scatter
    scatter_add setitem sigmoid silu sqrt square sub tanh zero
    """)
"""Written forms that run in whatever format the written tensor has."""

DECIDES = _names("""
    all any argmax argmin argsort bucketize count_nonzero eq equal ge gt isfinite isinf
    isnan isneginf isposinf le lt ne nonzero signbit searchsorted
    """)
"""A rounded input may turn their answer, so they see what autocast would give them."""

LIKE = _names("""
    empty_like full_like new_empty new_full new_ones new_zeros ones_like rand_like
    randn_like zeros_like
    """)
"""They read no number of their input; they take the captured dtype by name."""

COMPOSITES = _names("multi_head_attention_forward")
"""Functions that call several operators: they run in a region of autocast."""

AFTER_SHAPE = _names("expand_as reshape_as view_as")
"""They ask for the shape of their second argument, and for no number of it."""

READS = _names("""
    dim dtype device is_complex is_contiguous is_cuda is_floating_point layout ndim
    ndimension nelement numel requires_grad shape size stride sym_numel sym_size
    sym_stride
    """)
"""They ask for a property that the format does not change."""

CASTS = _names("bfloat16 cdouble cfloat cpu cuda double float half to type type_as")
"""Formats and devices that the model names itself."""

KEPT_ARGUMENTS = {
    "batch_norm": ("running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("running_mean", "running_var", "weight", "bias"),
    "scaled_dot_product_attention": ("attn_mask",),
}
"""Arguments that stay in fp32 beside a low input: statistics, affine weights, masks,
whose largest negative numbers are infinite in bf16."""

STATISTICS = frozenset({"batch_norm", "instance_norm"})
"""They write to statistics that they are given."""

_POSITIONS = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask"),
}

# another spelling -> the name that the table and the lists above use
_SPELLINGS = {
    "__add__": "add",
    "__mul__": "mul",
    "__radd__": "add",
    "__rmul__": "mul",
    "__sub__": "sub",
    "__truediv__": "div",
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "cross_entropy": "cross_entropy_loss",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "interpolate": "upsample_bilinear2d",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "normalize": "norm",
    "not_equal": "ne",
    "softmin": "softmax",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
}

_WRITTEN = {
    "iadd": "add",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "setitem": "setitem",
}

_INPLACE_AT = {"dropout": 3, "relu": 1, "silu": 1, "relu6": 1, "elu": 2}
"""Position of the argument `inplace` where a function takes it by position."""


def name_of(node: fx.Node) -> str:
    """The operator's name as the table spells it, without the mark of writing."""
    return _named(node)[0]


def writes_first(node: fx.Node) -> bool:
    """Whether a call writes to its first argument."""
    name, written = _named(node)
    if written:
        return True
    if node.kwargs.get("inplace") is True:
        return True
    at = _INPLACE_AT.get(name, len(node.args))
    return at < len(node.args) and node.args[at] is True


def is_higher_order(node: fx.Node) -> bool:
    """Whether a call runs graphs of its own."""
    return isinstance(node.target, HigherOrderOperator)


def kept_inputs(node: fx.Node, name: str) -> set[fx.Node]:
    """The inputs of a call that stay in fp32 whatever the others are in."""
    positions = _POSITIONS.get(name, ())
    given: dict[str, Any] = dict(zip(positions, node.args, strict=False))
    given.update(node.kwargs)
    kept = {given.get(each) for each in KEPT_ARGUMENTS.get(name, ())}
    return {each for each in node.all_input_nodes if each in kept}


def _named(node: fx.Node) -> tuple[str, bool]:
    target = node.target
    if node.op == "call_method":
        name = str(target)
    elif isinstance(target, (OpOverload, OpOverloadPacket)):
        name = _of_overload(target)
    elif target is getattr and len(node.args) > 1:
        name = str(node.args[1])
    else:
        name = str(getattr(target, "__name__", target))
    if target is operator.setitem or name in _WRITTEN:
        return _WRITTEN[name], True
    if name.endswith("_") and not name.endswith("__"):
        bare = name.removesuffix("_")
        return _SPELLINGS.get(bare, bare), True
    return _SPELLINGS.get(name, name), False


def _of_overload(target: OpOverload | OpOverloadPacket) -> str:
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return operator_name(str(packet._qualified_op_name))  # noqa: SLF001 -- the public text drops the namespace
