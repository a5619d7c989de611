"""How the weights of one module are held, sent and summed when several processes share.

    stored     in the optimizer, each process its rows: the policy's `param`
    gathered   as the rows travel before a forward, and as the forward finds them
    reduced    as gradients travel while they are summed: the policy's `reduce`

The last two are `param_dtype` and `reduce_dtype` of FSDP2. A weight is gathered in the
low format only where nothing but products read it, in modules such as `nn.Linear`: the
operator table rounds it there anyway, so the bits are those of one process and half as
many travel. A norm, an embedding or a module of one's own gets its weights as they are
stored. What FSDP2 can cast besides, inputs and outputs, the borders of islands cast.

Where the deciding rule leaves `reduce` open, gradients are never summed in fewer bits
than their weight is stored in: an fp32 island inside `bf16-true` sums in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch.distributed.fsdp import MixedPrecisionPolicy

from castwise.dtypes import dtype_of
from castwise.formats import FORMATS
from castwise.islands.border import LOW
from castwise.islands.swap import own_class
from castwise.policy.keys import PHASES

if TYPE_CHECKING:
    from torch import nn

    from castwise.policy.bound import BoundPolicy
    from castwise.policy.precision import Precision

Gather = Literal["low", "stored"]
"""Whether weights that only products read travel in the low format, or as stored."""

COMPLEX = "complex"
"""What complex weights are stored, gathered and reduced in: their own format."""

# module class -> the operator that alone reads its weights
_PRODUCTS = {
    "torch.nn.modules.linear.Linear": "linear",
    "torch.nn.modules.conv.Conv1d": "conv1d",
    "torch.nn.modules.conv.Conv2d": "conv2d",
    "torch.nn.modules.conv.Conv3d": "conv3d",
    "torch.nn.modules.conv.ConvTranspose1d": "conv_transpose1d",
    "torch.nn.modules.conv.ConvTranspose2d": "conv_transpose2d",
    "torch.nn.modules.conv.ConvTranspose3d": "conv_transpose3d",
    "transformers.pytorch_utils.Conv1D": "addmm",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormats:
    """The formats of the weights of one module, or of one group of modules."""

    stored: str
    """What the optimizer holds."""

    gathered: str
    """What travels before a forward."""

    reduced: str
    """What gradients are summed in."""

    def mixed_precision(self) -> MixedPrecisionPolicy:
        """Say it in the words of FSDP2; islands cast their inputs and outputs."""
        if self.stored == COMPLEX:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(
            param_dtype=dtype_of(self.gathered),
            reduce_dtype=dtype_of(self.reduced),
            cast_forward_inputs=False,
        )


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """Say a full precision in the words of FSDP2, for loops without islands.

    FSDP2 then casts inputs and outputs of the module itself, and every weight, those of
    norms as well; operators are not told apart.
    """
    assert precision.is_full
    compute = "fp32" if precision.compute == "tf32" else precision.compute
    return MixedPrecisionPolicy(
        param_dtype=dtype_of(str(compute)),
        reduce_dtype=dtype_of(str(precision.reduce)),
        output_dtype=dtype_of(str(precision.output)),
        cast_forward_inputs=True,
    )


def formats_of(
    module: nn.Module, fqn: str, bound: BoundPolicy, gather: Gather
) -> WeightFormats:
    """Return how the weights that a module owns itself are held, sent and summed."""
    if any(weight.is_complex() for weight in module.parameters(recurse=False)):
        return WeightFormats(stored=COMPLEX, gathered=COMPLEX, reduced=COMPLEX)
    stored = bound.precision_of(fqn).param
    assert stored is not None
    low = _low_format(module, fqn, bound) if gather == "low" else None
    narrower = low is not None and bits_of(low) < bits_of(stored)
    return WeightFormats(
        stored=stored,
        gathered=low if low is not None and narrower else stored,
        reduced=reduced_in(fqn, bound),
    )


def reduced_in(fqn: str, bound: BoundPolicy) -> str:
    """Return what the gradients of a module are summed in, in whatever phase."""
    stored = bound.precision_of(fqn).param
    assert stored is not None
    candidates = []
    for phase in PHASES:
        asked = bound.precision_of(fqn, phase=phase).reduce
        rule = bound.rule_of(fqn, phase=phase)
        assert asked is not None
        candidates.append(asked)
        if rule is not None and rule.precision.reduce is None:
            candidates.append(stored)
    return max(candidates, key=bits_of)


def bits_of(fmt: str) -> int:
    """How many bits a number takes."""
    return FORMATS[fmt].bits


def _low_format(module: nn.Module, fqn: str, bound: BoundPolicy) -> str | None:
    """The one low format in which products alone read the weights of a module."""
    cls = own_class(module)
    op = _PRODUCTS.get(f"{cls.__module__}.{cls.__qualname__}")
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if op is None or not names <= {"weight", "bias"} or "forward" in vars(module):
        return None  # weight_norm, LoRA and patches compute with what they find
    computes = {
        bound.precision_of(fqn, stage=stage, phase=phase).compute
        for phase in PHASES
        for stage in ("forward", "backward")
    }
    tables = map(bound.policy.operator_table, PHASES)
    if len(computes) > 1 or any(table.category(op) != "low" for table in tables):
        return None
    compute = computes.pop()
    return compute if compute in LOW else None
