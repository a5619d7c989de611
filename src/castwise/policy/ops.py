"""The operator table: which format each operator computes in, on every device.

`torch.autocast` keeps one list of operators per device, and the lists differ: on a
CPU it leaves softmax, norms, exp and sum in bf16, on CUDA it does not. Here is one
table for all devices, so that a CPU run rehearses a CUDA run. The categories:

    low      floating inputs are cast to the region's low format (bf16 or fp16)
    fp32     low inputs are cast to fp32
    widest   floating inputs are cast to the widest format among them
    as_is    inputs are left alone

fp64 and complex inputs are never cast by the table; islands decide those.

Operators go by their ATen name without overload (`softmax`, not `softmax.int`), and
custom operators by namespace and name (`mylib::scan`). An operator that PyTorch reaches
from inside another one (`_softmax` under `vmap`) takes the category of the outer one
unless it has an entry of its own. An in-place operator follows the format of the tensor
it writes to, whatever the table says.

The table says, `castwise.autocast` does: whether a name exists is asked there.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal, get_args

from castwise.errors import RuleError

Category = Literal["low", "fp32", "widest", "as_is"]
"""How an operator treats the formats of its floating inputs."""

CATEGORIES: tuple[Category, ...] = get_args(Category)
"""Every category, in the order of the opening docstring."""

OUTER_OPERATORS = {
    "_euclidean_dist": "cdist",
    "_log_softmax": "log_softmax",
    "_safe_softmax": "softmax",
    "_softmax": "softmax",
    "linalg_cholesky_ex": "linalg_cholesky",
    "linalg_inv_ex": "linalg_inv",
    "linalg_lu_factor_ex": "linalg_lu_factor",
    "linalg_solve_ex": "linalg_solve",
    "native_group_norm": "group_norm",
    "native_layer_norm": "layer_norm",
}
"""An operator that PyTorch reaches from inside -> the one that people name."""


FP8_PRODUCTS = frozenset(
    {
        "_addmm_activation",
        "_convolution",
        "addbmm",
        "addmm",
        "addmv",
        "baddbmm",
        "bmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
        "einsum",
        "linear",
        "matmul",
        "mm",
        "mv",
    }
)
"""Products that run in fp8 in a module that computes in it; its other low operators,
such as recurrent layers and fused attention, run in bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorEntry:
    """One operator, its category and the reason."""

    op: str
    """ATen name without overload; custom operators with their namespace."""

    category: Category
    """How the operator treats the formats of its inputs."""

    because: str
    """One clause that a person can check."""

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise RuleError(
                f"operator {self.op!r} needs one of the categories "
                f"{', '.join(CATEGORIES)}, got {self.category!r}; name one of them"
            )
        if self.op != operator_name(self.op) or not self.op:
            raise RuleError(
                f"an entry needs the bare name of an operator, got {self.op!r}; "
                f"write {operator_name(self.op)!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorTable:
    """One category for every operator; hashable, changed by `with_category`."""

    entries: tuple[OperatorEntry, ...]
    """Sorted by operator, each operator once; whatever is absent is `as_is`."""

    def __post_init__(self) -> None:
        names = [entry.op for entry in self.entries]
        if names != sorted(set(names)):
            raise RuleError(
                "an operator table needs its entries sorted by name and each name "
                "once; build it with OperatorTable.of"
            )

    @classmethod
    def of(cls, *groups: OperatorGroup) -> OperatorTable:
        """Build a table from groups; an operator in two groups is an error."""
        found: dict[str, OperatorEntry] = {}
        for group in groups:
            for op in group.ops.split():
                if op in found:
                    raise RuleError(
                        f"operator {op!r} needs one category, got "
                        f"{found[op].category} and {group.category}; drop one"
                    )
                found[op] = OperatorEntry(
                    op=op, category=group.category, because=group.because
                )
        return cls(entries=tuple(found[op] for op in sorted(found)))

    def entry(self, op: str) -> OperatorEntry | None:
        """The entry that decides for an operator, or none."""
        name = operator_name(op)
        found = self._own_entry(name)
        if found is None and name in OUTER_OPERATORS:
            found = self._own_entry(OUTER_OPERATORS[name])
        return found

    def _own_entry(self, name: str) -> OperatorEntry | None:
        at = bisect_left(self.entries, name, key=attrgetter("op"))
        if at < len(self.entries) and self.entries[at].op == name:
            return self.entries[at]
        return None

    def category(self, op: str) -> Category:
        """The category of an operator."""
        entry = self.entry(op)
        return "as_is" if entry is None else entry.category

    def explain(self, op: str) -> str:
        """One line: the category, the entry that decides, and its reason."""
        name = operator_name(op)
        entry = self.entry(name)
        if entry is None:
            return f"{name}: as_is (no entry; it runs in the formats of its inputs)"
        through = "" if entry.op == name else f"through {entry.op}: "
        return f"{name}: {entry.category} ({through}{entry.because})"

    def with_category(self, op: str, category: Category, because: str) -> OperatorTable:
        """A table in which `op` has another category, and the rest is the same."""
        name = operator_name(op)
        new = OperatorEntry(op=name, category=category, because=because)
        others = [entry for entry in self.entries if entry.op != name]
        return replace(self, entries=tuple(sorted([*others, new], key=_by_name)))

    def digest(self) -> str:
        """A short hash of what the table does: categories, not reasons."""
        text = "".join(
            f"{entry.op} {entry.category}\n"
            for entry in self.entries
            if entry.category != "as_is" or entry.op in OUTER_OPERATORS
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorGroup:
    """Operators that share a category and its reason."""

    category: Category
    """The category of every operator in the group."""

    because: str
    """The reason for all of them."""

    ops: str
    """Names, separated by white space."""


def operator_name(op: str) -> str:
    """The bare name: `aten::softmax.int` and `aten.softmax` are both `softmax`.

    Custom operators keep their namespace: `mylib::scan`.
    """
    return op.removeprefix("aten::").removeprefix("aten.").split(".", 1)[0]


_by_name = attrgetter("op")


DEFAULT_TABLE = OperatorTable.of(
    OperatorGroup(
        category="low",
        because="matrix products are where low precision pays; they accumulate in fp32",
        ops="""
        _addmm_activation _native_multi_head_attention
        _scaled_dot_product_flash_attention addbmm addmm addmv addr baddbmm bmm
        chain_matmul einsum linalg_multi_dot linalg_vecdot linear matmul mm mv
        scaled_dot_product_attention
        """,
    ),
    OperatorGroup(
        category="low",
        because="convolutions are matrix products",
        ops="""
        _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
        conv_transpose3d convolution cudnn_convolution cudnn_convolution_transpose
        """,
    ),
    OperatorGroup(
        category="low",
        because="recurrent layers are matrix products between gates",
        ops="""
        _thnn_fused_gru_cell _thnn_fused_lstm_cell gru gru_cell lstm lstm_cell
        mkldnn_rnn_layer rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
        """,
    ),
    OperatorGroup(
        category="low",
        because="its weight must have the format of its input",
        ops="prelu",
    ),
    OperatorGroup(
        category="fp32",
        because="amplifies the rounding of its input",
        ops="""
        acos asin cosh erfinv exp expm1 log log10 log1p log2 pow reciprocal rsqrt sinh
        softplus tan
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="a long sum whose result must not be rounded to 8 bits",
        ops="""
        cumprod cumsum log_softmax logsumexp prod softmax sum trace
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="normalises by a sum of squares",
        ops="""
        cosine_similarity frobenius_norm group_norm layer_norm linalg_matrix_norm
        linalg_vector_norm norm nuclear_norm renorm rms_norm
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="differences of nearly equal numbers",
        ops="cdist dist pdist",
    ),
    OperatorGroup(
        category="fp32",
        because="the loss is the one number that every gradient hangs on",
        ops="""
        binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss
        cross_entropy_loss ctc_loss hinge_embedding_loss huber_loss kl_div l1_loss
        margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
        multilabel_margin_loss_forward nll_loss nll_loss2d poisson_nll_loss
        smooth_l1_loss soft_margin_loss triplet_margin_loss
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="interpolation weights need more digits than bf16 has",
        ops="""
        _grid_sampler_2d_cpu_fallback _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        grid_sampler grid_sampler_2d grid_sampler_3d upsample_bicubic2d
        upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_trilinear3d
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="a factorisation or spectral transform: no low kernel, and unstable",
        ops="""
        _lu_with_info cholesky cholesky_inverse cholesky_solve complex fft_fft fft_fft2
        fft_fftn fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ihfft
        fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
        fft_rfftn geqrf inverse linalg_cholesky linalg_cholesky_ex linalg_cond
        linalg_det linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
        linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor
        linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor
        linalg_lu_factor_ex linalg_lu_solve linalg_matrix_rank linalg_pinv linalg_qr
        linalg_slogdet linalg_solve linalg_solve_triangular linalg_svd linalg_svdvals
        linalg_tensorinv linalg_tensorsolve linalg_vander logdet lu_solve orgqr ormqr
        pinverse polar qr stft svd triangular_solve view_as_complex
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="has no low kernel on a CPU",
        ops="""
        adaptive_avg_pool3d adaptive_max_pool3d avg_pool3d
        fake_quantize_per_tensor_affine fractional_max_pool2d fractional_max_pool3d
        histogram histogramdd max_pool3d max_unpool2d max_unpool3d nanquantile
        quantile reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
        replication_pad3d rrelu sparse_sampled_addmm
        """,
    ),
    OperatorGroup(
        category="fp32",
        because="a special function: no low kernel, and its argument is amplified",
        ops="""
        special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0
        special_bessel_y1 special_chebyshev_polynomial_t
        special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_erfcx special_hermite_polynomial_h
        special_hermite_polynomial_he special_i1 special_i1e
        special_laguerre_polynomial_l special_legendre_polynomial_p special_log_ndtr
        special_modified_bessel_i0 special_modified_bessel_i1
        special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri
        special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
        special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
        special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w
        special_spherical_bessel_j0 special_zeta
        """,
    ),
    OperatorGroup(
        category="widest",
        because="refuses, or wrongly rounds, inputs of different formats",
        ops="""
        _chunk_cat _log_softmax_backward_data _softmax_backward_data _sparse_mm addcdiv
        addcmul allclose atan2 bilinear cat cross dot embedding_bag heaviside index_add
        index_copy index_put index_reduce isclose lerp linalg_cross masked_scatter
        meshgrid put scatter scatter_add scatter_reduce stack tensordot
        torch_nn::_linear_cross_entropy_batch_chunked
        torch_nn::_linear_cross_entropy_batch_chunked_no_reduction vdot
        """,
    ),
)
"""The table in force unless a policy says otherwise."""
