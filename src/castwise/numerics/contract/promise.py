"""What a policy promises for one call of an operator, and whether the call kept it.

In a module that computes in fp32 or wider, every operator is promised that format. In a
module that computes low, the operator table promises:

    low      products run in the low format, what belongs to them in it or in fp32
    fp32     all floating inputs are fp32
    widest   all floating inputs have one format
    as_is    formats that the policy, the batch or the weights brought in, no others

Products of a module in fp8 are promised operands that are numbers of that format, with
a scale for each tensor; gradients meet them in fp8_e5m2. Since they are emulated, and
held in bf16, their numbers are looked at. Its other operators are promised what a bf16
module is.

A backward operator is promised the format of the operator that it differentiates. Where
a rule gives the backward of a module a compute format of its own, that holds instead,
for the backward operators and for all that the module computes again for them. What an
operator calls inside of itself is judged by the outer one that the source names.
Complex inputs count as the real format of their digits. Nobody decided a custom
operator without an entry in the table, a product that no entry covers, and a cast by
hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from castwise.fp8_products import CARRIER, FP8, GRADIENT
from castwise.islands.border import LOW
from castwise.islands.layout import governing_fqn
from castwise.numerics.operator_call import CAST, OperatorCall
from castwise.policy.ops import FP8_PRODUCTS, operator_name

if TYPE_CHECKING:
    from castwise.numerics.call_site import CallSite
    from castwise.policy.bound import BoundPolicy

Kind = Literal["exact", "fp8", "low", "one", "inputs", "undecided"]
"""How a promise is judged: see the categories above; `exact` is fp32 or an island's."""

PolicyStage = Literal["forward", "backward"]
"""The stage whose rules decide."""

_STAGES: tuple[PolicyStage, ...] = ("forward", "backward")

_Place = tuple[str | None, PolicyStage]
"""A module, none outside of the model, and a stage."""

HAND_CASTS = frozenset(
    {
        "as_tensor",
        "asarray",
        "bfloat16",
        "cdouble",
        "cfloat",
        "chalf",
        "double",
        "float",
        "half",
        "new_tensor",
        "to",
        "type",
        "type_as",
    }
)
"""Names by which a source changes formats itself."""

_REAL = {"complex32": "fp16", "complex64": "fp32", "complex128": "fp64"}

_HANDED_OUT_IN = {"tf32": "fp32", **dict.fromkeys(FP8, CARRIER)}

# An operator that PyTorch reaches from inside, or a function around one, as the table
# knows it; those of `policy.ops.OUTER_OPERATORS` come on top.
_INSIDE = {
    "_cdist_forward": "cdist",
    "_cudnn_rnn": "lstm",
    "_embedding_bag": "embedding_bag",
    "_fft_c2c": "fft_fft",
    "_fft_c2r": "fft_irfft",
    "_fft_r2c": "fft_rfft",
    "_fused_rms_norm": "rms_norm",
    "_linalg_det": "linalg_det",
    "_linalg_eigh": "linalg_eigh",
    "_linalg_slogdet": "linalg_slogdet",
    "_linalg_solve_ex": "linalg_solve",
    "_linalg_svd": "linalg_svd",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable": "scaled_dot_product_attention",
    "cross_entropy": "cross_entropy_loss",
    "miopen_rnn": "lstm",
    "mkldnn_convolution": "convolution",
    "nll_loss2d_forward": "nll_loss2d",
    "nll_loss_forward": "nll_loss",
}

# Namespaces of PyTorch's own operators; the table's `as_is` is meant for them.
_OF_PYTORCH = frozenset(
    {
        "_c10d_functional",
        "_c10d_functional_autograd",
        "_quantized",
        "aten",
        "c10d",
        "fsdp",
        "inductor",
        "mkl",
        "mkldnn",
        "onednn",
        "prim",
        "prims",
        "profiler",
        "quantized",
        "rngprims",
        "torch_nn",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What one call was promised."""

    kind: Kind
    """How it is judged."""

    format: str
    """The format promised, or `widest`, `as_is`, `undecided`."""

    by: str
    """The rule or entry that promises it."""


class Promises:
    """The promises of one policy on one model, in one phase."""

    def __init__(self, bound: BoundPolicy, phase: str, brought: frozenset[str]) -> None:
        self._bound = bound
        self._phase = phase
        self._table = bound.policy.operator_table(phase)
        self._computes: dict[_Place, str] = {}
        self._known: dict[tuple[_Place, str, str | None, bool], Promise] = {}
        self._allowed = brought | self._formats_of_policy()

    def forward(
        self,
        call: OperatorCall,
        site: CallSite,
        *,
        in_place: bool,
        stage: PolicyStage = "forward",
    ) -> Promise:
        """Look up what a call in a forward or a recompute was promised.

        Args:
            call: What was called.
            site: From where.
            in_place: Whether it writes to one of its inputs.
            stage: The one whose rules hold; `backward` where a module is run again
                for a backward of its own.
        """
        place = site.module, stage
        named = None if in_place or call.op == CAST else site.call
        if in_place or site.names_dtype:
            return self._free(place, "it follows the tensor or dtype= that it names")
        key = place, call.op, named, call.num_flops > 0
        if key not in self._known:
            self._known[key] = self._promise(*key)
        return self._known[key]

    def of_derivative(
        self, call: OperatorCall, site: CallSite, *, in_place: bool
    ) -> Promise:
        """Look up what was promised for the backward of a call in a forward."""
        forward = self.forward(call, site, in_place=in_place, stage="backward")
        if forward.kind in {"exact", "fp8", "low", "inputs"}:
            return forward
        place: _Place = site.module, "backward"
        return self._free(place, "it differentiates what stays as it is")

    def custom_backward(self, call: OperatorCall, site: CallSite) -> Promise:
        """Look up what a call in the backward of a custom function was promised."""
        place: _Place = site.module, "backward"
        if call.num_flops or self._compute(place) not in LOW:
            return self.forward(call, site, in_place=False, stage="backward")
        return self._free(place, "the table is not in force in a backward")

    def graph_backward(self, call: OperatorCall, site: CallSite) -> Promise:
        """Look up what a node of a captured backward graph was promised.

        The source name that the node kept is that of the forward operator.
        """
        return self.of_derivative(call, site, in_place=False)

    def engine(self) -> Promise:
        """What the engine of autograd is promised where it adds up gradients."""
        return Promise(kind="inputs", format="as_is", by="autograd adds up gradients")

    def fault(self, call: OperatorCall, site: CallSite, promise: Promise) -> str | None:
        """Say in which way a call broke its promise, if it did."""
        if call.op == CAST:
            return self._fault_of_cast(site)
        ran = {_REAL.get(fmt, fmt) for fmt in call.formats}
        if site.module is None:  # no border casts what a caller brings to the loss
            ran = _promoted(ran)
        if promise.kind == "undecided":
            return (
                f"nobody decided its format: {promise.by}; give it an entry by a rule "
                f"with op: {call.op}"
            )
        kept = {
            "exact": ran == {promise.format},
            "fp8": ran <= {promise.format, GRADIENT} if call.num_flops else True,
            "low": self._kept_low(call, ran, promise.format),
            "one": len(ran) == 1,
            "inputs": ran <= self._allowed_in(site.module),
        }
        if kept[promise.kind]:
            return None
        return f"promised {promise.format} by {promise.by}, but ran in {call.format}"

    def compute_of(self, module: str | None) -> str:
        """The compute format of a module; of the surroundings outside of the model."""
        return self._asked((module, "forward"))

    def _promise(
        self, place: _Place, op: str, named: str | None, is_product: bool
    ) -> Promise:
        compute = self._compute(place)
        if compute not in LOW:
            held = "fp32" if compute == "tf32" and not is_product else compute
            return Promise(kind="exact", format=held, by=self._reason(place))
        entries = map(self._entry_name, filter(None, (named, op)))
        entry = next((name for name in entries if self._table.entry(name)), None)
        if entry is None:
            return self._without_entry(place, op, is_product)
        asked = self._asked(place)
        is_low = self._table.category(entry) == "low"
        if asked in FP8 and entry in FP8_PRODUCTS and is_low:
            by = f"{self._reason(place)}; emulated in {compute}"
            return Promise(kind="fp8", format=asked, by=by)
        return self._by_table(place, entry, compute)

    def _without_entry(self, place: _Place, op: str, is_product: bool) -> Promise:
        namespace = op.partition("::")[0] if "::" in op else "aten"
        if is_product or namespace not in _OF_PYTORCH:
            by = "the operator table has no entry for it"
            return Promise(kind="undecided", format="undecided", by=by)
        return self._free(place, "the operator table leaves it as it is")

    def _by_table(self, place: _Place, entry: str, compute: str) -> Promise:
        category, by = self._table.category(entry), self._table.explain(entry)
        if category == "low":
            return Promise(
                kind="low", format=compute, by=f"{self._reason(place)}; {by}"
            )
        if category == "fp32":
            return Promise(kind="exact", format="fp32", by=by)
        if category == "widest":
            return Promise(kind="one", format="widest", by=by)
        return self._free(place, by)

    def _free(self, place: _Place, by: str) -> Promise:
        compute = self._compute(place)
        if compute not in LOW and compute != "tf32":
            return Promise(kind="exact", format=compute, by=self._reason(place))
        return Promise(kind="inputs", format="as_is", by=by)

    def _fault_of_cast(self, site: CallSite) -> str | None:
        if site.author != "user" or site.call not in HAND_CASTS:
            return None
        if self._table.entry("to") is not None or self._table.entry(site.call):
            return None
        return (
            f".{site.call}() casts by hand, and no rule decided that; make the module "
            "an island by a rule, or allow casts by hand with a rule op: to"
        )

    def _kept_low(self, call: OperatorCall, ran: set[str], low: str) -> bool:
        """Statistics that go with a low product, such as a logsumexp, are in fp32."""
        is_low = call.num_flops > 0 or self._table.category(call.op) == "low"
        return ran <= {low, "fp32"} and (low in ran or not is_low)

    def _entry_name(self, name: str) -> str:
        bare = operator_name(name)
        return bare if self._table.entry(bare) else _INSIDE.get(bare, bare)

    def _compute(self, place: _Place) -> str:
        """What operators of a module run in; bf16 where it emulates fp8."""
        asked = self._asked(place)
        return CARRIER if asked in FP8 else asked

    def _asked(self, place: _Place) -> str:
        if place not in self._computes:
            self._computes[place] = self._compute_by_policy(*place)
        return self._computes[place]

    def _compute_by_policy(self, module: str | None, stage: PolicyStage) -> str:
        if module is None:  # the loss follows the forward: no rule can name it
            compute = self._bound.policy.base_precision(phase=self._phase).compute
        else:
            fqn = governing_fqn(module)
            found = self._bound.precision_of(fqn, stage=stage, phase=self._phase)
            compute = found.compute
        assert compute is not None
        return compute

    def _reason(self, place: _Place) -> str:
        module, stage = place
        rule = None
        if module is not None:
            fqn = governing_fqn(module)
            rule = self._bound.rule_of(fqn, stage=stage, phase=self._phase)
        compute = self._asked(place)
        if rule is None:
            return f"the default of {self._bound.policy.name} (c={compute})"
        because = f", because {rule.because}" if rule.because else ""
        return f"{rule.label} (c={compute}{because})"

    def _formats_of_policy(self) -> frozenset[str]:
        """Formats that modules hand out to each other."""
        found = set()
        for fqn, stage in product(self._bound.governing, _STAGES):
            precision = self._bound.precision_of(fqn, stage=stage, phase=self._phase)
            assert precision.output is not None
            found.add(_HANDED_OUT_IN.get(precision.output, precision.output))
        return frozenset(found)

    def _allowed_in(self, module: str | None) -> frozenset[str]:
        computes = {self._compute((module, stage)) for stage in _STAGES}
        return self._allowed | computes | {"fp32", "tf32"}


def _promoted(formats: set[str]) -> set[str]:
    """What fp32 beside fp64 is computed in; low formats are not widened unsaid."""
    return {"fp64"} if formats == {"fp32", "fp64"} else formats
