from __future__ import annotations

import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from castwise import torch_threads
from castwise.errors import SettingsError, SolverError
from castwise.layers import reference, resolvent_kernel, resolvent_solve
from castwise.layers.legacy_gradients import resolvent_diagonal_with_legacy_gradient
from castwise.layers.resolvent import ResolventPrecision, resolvent_diagonal

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def chain(num_sites: int, *, batch: int = 3, eta: float = 1.0, seed: int = 0) -> Inputs:
    """Return a random float64 chain with uneven couplings."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d = 2 * draw(batch, num_sites)
    b = 0.5 + torch.rand(batch, max(num_sites - 1, 0), generator=generator).double()
    return d, b, b.flip(-1) + 0.25, torch.tensor(0.3 + 1j * eta)


@pytest.fixture(params=["kernel", "kernel in tiles", "numpy", "torch"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with every tier of the CPU, the kernel whole and in tiles."""
    if request.param in {"numpy", "torch"}:
        monkeypatch.setattr(resolvent_solve, "_kernel_fits", lambda _: False)
    else:
        assert resolvent_solve.kernel_available().value
    if request.param == "kernel in tiles":
        monkeypatch.setattr(resolvent_kernel, "WHOLE", 0)
        monkeypatch.setattr(resolvent_kernel, "TILE", 16)
    if request.param == "torch":  # as on a device that NumPy cannot reach
        monkeypatch.setattr(resolvent_solve, "_in_numpy", lambda _: False)
    return str(request.param)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_sites", [0, 1, 2, 3, 8, 63, 128, 129, 300])
def test_every_length_agrees_with_the_dense_inverse(
    num_sites: int, causal: bool
) -> None:
    """Uneven couplings included: b_i c_i in the wrong place shows at N = 3."""
    d, b, c, z = chain(num_sites)
    if causal and num_sites > 130:
        pytest.skip("the original inverts every leading block")
    original = (
        reference.causal_resolvent_diagonal if causal else reference.resolvent_diagonal
    )
    expected = original(d, b, c, z)
    out = resolvent_diagonal(d, b, c, z, causal=causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    narrow = resolvent_diagonal(
        d.float(),
        b.float(),
        c.float(),
        z,
        causal=causal,
        precision=ResolventPrecision(forward="fp32"),
    )
    assert narrow.dtype == torch.complex64
    torch.testing.assert_close(narrow.to(expected), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("num_sites", [1000, 8192, 65536, 100_001])
def test_no_length_overflows(num_sites: int) -> None:
    """The determinant recursion overflows at site 115 (fp32) and 950 (fp64)."""
    rows = 2 if num_sites > 10_000 else 8
    d, _, _, z = chain(num_sites, batch=rows)
    one = torch.ones(num_sites - 1)
    wide = resolvent_diagonal(d, one, one, z)
    narrow = resolvent_diagonal(
        d.float(), one, one, z, precision=ResolventPrecision(forward="fp32")
    )
    assert torch.isfinite(torch.view_as_real(narrow)).all()
    assert (narrow != 0).all()
    assert (narrow - wide).abs().max() <= 1e-6


def test_an_endless_clean_chain_has_the_known_response() -> None:
    """Inside a free chain G = 1 / sqrt((d - z)^2 - 4), with Im G > 0."""
    d, one = torch.full((1, 4096), -2.0).double(), torch.ones(4095)
    out = resolvent_diagonal(d, one, one, 1j)[0, 500:-500]
    a = -2 - 1j
    exact = 1 / (a * a - 4) ** 0.5
    exact = exact if exact.imag > 0 else -exact
    assert (out - exact).abs().max() < 1e-12


@pytest.mark.parametrize("eta", [1.0, 0.1, 0.01])
def test_entries_stay_below_one_over_eta(eta: float) -> None:
    """For couplings of one sign |G| <= 1 / eta and Im G > 0."""
    d, b, _, z = chain(777, eta=eta)
    out = resolvent_diagonal(d.float(), b.float(), b.float(), z)
    assert (out.imag > 0).all()
    assert out.abs().max() <= (1 + 1e-5) / eta


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_sites", [1, 2, 3, 7, 16])
def test_gradients_are_exact_to_second_order(num_sites: int, causal: bool) -> None:
    """Finite differences confirm d, upper, lower and z, real chains."""
    d, b, c, _ = chain(num_sites, batch=2)
    b = b[:1]
    z = torch.tensor([0.3 + 1j, 0.1 + 0.5j])
    args = [x.clone().requires_grad_() for x in (d, b, c, z.to(torch.complex128))]
    gradcheck(lambda *x: resolvent_diagonal(*x, causal=causal), args)
    if num_sites <= 3:
        gradgradcheck(lambda *x: resolvent_diagonal(*x, causal=causal), args)


def test_gradients_of_complex_chains_are_exact() -> None:
    """Complex diagonals and couplings obey PyTorch's conjugate convention."""
    d, b, c, _ = chain(4, batch=1)
    args = [(x + 0.1j * x.flip(-1)).requires_grad_() for x in (d, b, c)] + [
        torch.tensor(3j, dtype=torch.complex128, requires_grad=True)
    ]
    gradcheck(resolvent_diagonal, args)
    gradgradcheck(resolvent_diagonal, args)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("eta", [1.0, 0.1])
def test_gradients_agree_with_autograd_through_the_dense_inverse(eta: float) -> None:
    """Cut bonds (b_i = 0, c_i = 0) included: no 0 / 0 anywhere."""
    d, b, c, z = chain(300, eta=eta)
    b[:, 5] = 0
    c[:, 9] = 0
    found, expected = [], []
    for function, into in (
        (resolvent_diagonal, found),
        (reference.resolvent_diagonal, expected),
    ):
        args = [x.clone().requires_grad_() for x in (d, b, c, z.to(torch.complex128))]
        out = function(*args)
        upstream = torch.polar(torch.ones(300).double(), torch.arange(300).double())
        out.backward(upstream.expand_as(out))
        into += [x.grad for x in args]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


def test_the_imaginary_part_has_the_right_sign() -> None:
    """At N = 1, d = 0.7, z = 1j: d Im G / d d = -0.630602."""
    d = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    resolvent_diagonal(d, d[:0], d[:0], 1j).imag.sum().backward()
    assert d.grad is not None
    assert d.grad.item() == pytest.approx(-0.630602, abs=1e-6)


def test_lanes_of_fp32_compute_what_lanes_of_fp64_do() -> None:
    """All formats in and out, couplings by row, more rows than two arms hold."""
    d, b, c, z = chain(75, batch=21)
    wide = d.clone().requires_grad_()
    exact = resolvent_diagonal(wide, b, c, z, causal=True)
    upstream = torch.polar(torch.ones(75).double(), torch.arange(75).double())
    exact.backward(upstream.expand_as(exact))
    precision = ResolventPrecision(forward="fp32", backward="fp32", tolerance=1.0)
    for inputs in ((d, b, c), (d.float(), b.float(), c.float())):
        leaf = inputs[0].clone().requires_grad_()
        out = resolvent_diagonal(leaf, *inputs[1:], z, precision=precision, causal=True)
        out.backward(upstream.expand_as(out).to(out.dtype))
        assert (out - exact).abs().max() <= 1e-6
        assert leaf.grad is not None
        assert wide.grad is not None
        assert (leaf.grad - wide.grad).abs().max() <= 1e-5 * wide.grad.abs().max()


def test_rows_are_independent() -> None:
    """A row does not know its neighbours, its strides, or its place in the batch."""
    d, b, c, z = chain(333, batch=19)
    whole = resolvent_diagonal(d, b, c, z)
    for row in (0, 7, 8, 15, 18):
        single = resolvent_diagonal(d[row], b[row], c[row], z)
        torch.testing.assert_close(single, whole[row], rtol=1e-15, atol=1e-15)
    strided = d.T.contiguous().T
    assert torch.equal(resolvent_diagonal(strided, b, c, z), whole)
    shared = resolvent_diagonal(d, b[:1].expand_as(b), c[:1], z)
    torch.testing.assert_close(shared, resolvent_diagonal(d, b[0], c[0], z))


def test_a_large_result_is_like_its_rows() -> None:
    """From 4 MiB on memory is taken another way: same numbers, on whole lines."""
    d, _, _, z = chain(65_541, batch=9)
    d = d.float().requires_grad_()
    one = torch.ones(65_540)
    out = resolvent_diagonal(d, one, one, z)
    assert out.nbytes > resolvent_solve.HUGE
    assert out.data_ptr() % 64 == 0
    out.imag.sum().backward()
    assert d.grad is not None
    for row in (0, 8):
        leaf = d.detach()[row].requires_grad_()
        single = resolvent_diagonal(leaf, one, one, z)
        single.imag.sum().backward()
        assert torch.equal(single, out[row])
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, d.grad[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_lines_past_the_caches_hold_the_same(dtype: torch.dtype) -> None:
    """Rows of whole lines, and in the second register one row for all lanes."""
    d, _, _, z = chain(65_600, batch=9)
    d, one = d.to(dtype).requires_grad_(), torch.ones(65_599)
    out = resolvent_diagonal(d, one, one, z)
    upstream = torch.polar(torch.ones(65_600), torch.arange(65_600.0))
    out.backward(upstream.expand_as(out).to(out.dtype))
    assert d.grad is not None
    for row in range(9):
        leaf = d.detach()[row].requires_grad_()
        single = resolvent_diagonal(leaf, one, one, z)
        single.backward(upstream.to(out.dtype))
        assert torch.equal(single, out[row])
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, d.grad[row])


def results(
    inputs: Inputs, *, causal: bool, threads: int, precision: ResolventPrecision
) -> list[Tensor]:
    """Return G and all gradients, computed in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = resolvent_diagonal(*leaves, causal=causal, precision=precision)
        upstream = torch.polar(torch.ones(69), torch.arange(69.0))
        out.backward(upstream.expand_as(out).to(out.dtype))
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_threads_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, *, causal: bool, own: bool, lent: bool
) -> None:
    """Rows that fill no register, couplings by row and shared, torch's threads or not.

    One row has a zero pivot, where there is a way around it: it is found, and solved,
    whoever walked it.
    """
    monkeypatch.setattr(resolvent_solve, "WORTH_A_THREAD", 1)
    if not lent:
        monkeypatch.setattr(torch_threads, "openmp", lambda: None)
    wide = ResolventPrecision(forward="fp64")
    narrow = ResolventPrecision(forward="fp32", backward="fp32", tolerance=math.inf)
    for precision in (wide, narrow):
        d, b, c = (x.float() for x in chain(69, batch=43)[:3])
        if not own:
            b, c = b[0], c[:1]
        z = torch.full((43,), 0.3 + 1j, dtype=torch.complex128)
        if not causal:
            z[37], d[37, 0] = 0, 0
        found = [
            results((d, b, c, z), causal=causal, threads=threads, precision=precision)
            for threads in (1, 2, 3)
        ]
        assert len(found[0]) == 5
        for alone, two, three in zip(*found, strict=True):
            assert torch.isfinite(torch.view_as_real(alone + 0j)).all()
            assert torch.equal(alone, two)
            assert torch.equal(alone, three)


def test_a_fork_computes_after_its_parent_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads do not come along into a forked child; the answer does."""
    monkeypatch.setattr(resolvent_solve, "WORTH_A_THREAD", 1)
    inputs = chain(69, batch=43)
    precision = ResolventPrecision()
    expected = results(inputs, causal=False, threads=2, precision=precision)[0]
    child = os.fork()
    if child == 0:
        out = results(inputs, causal=False, threads=2, precision=precision)[0]
        os._exit(0 if torch.equal(out, expected) else 1)
    deadline = time.monotonic() + 60
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 0


def test_z_may_differ_by_layer_and_batch() -> None:
    """Leading dimensions broadcast like everywhere in PyTorch."""
    d, b, c, _ = chain(20, batch=6)
    d = d.reshape(2, 3, 20)
    z = torch.tensor([[1j], [0.5 + 2j]])
    out = resolvent_diagonal(d, b[0], c.reshape(2, 3, 19), z)
    expected = reference.resolvent_diagonal(
        d, b[0].expand(2, 3, 19), c.reshape(2, 3, 19), z.expand(2, 3)
    )
    torch.testing.assert_close(out, expected)


def test_symmetries_of_the_resolvent_hold() -> None:
    """Translation, scaling, reversal and conjugation."""
    d, b, c, z = chain(50)
    z = z.to(torch.complex128)
    out = resolvent_diagonal(d, b, c, z)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(resolvent_diagonal(d + 2, b, c, z + 2), out, **close)
    scaled = resolvent_diagonal(3 * d, 3 * b, 3 * c, 3 * z)
    torch.testing.assert_close(3 * scaled, out, **close)
    turned = resolvent_diagonal(d.flip(-1), c.flip(-1), b.flip(-1), z).flip(-1)
    torch.testing.assert_close(turned, out, **close)
    mirrored = resolvent_diagonal(d, b, c, z.conj())
    torch.testing.assert_close(mirrored.conj().resolve_conj(), out, **close)


def test_a_cut_bond_separates_two_chains() -> None:
    """With b_i = 0 the halves do not know each other."""
    d, b, c, z = chain(40)
    b[:, 19] = 0
    out = resolvent_diagonal(d, b, c, z)
    left = resolvent_diagonal(d[:, :20], b[:, :19], c[:, :19], z)
    right = resolvent_diagonal(d[:, 20:], b[:, 20:], c[:, 20:], z)
    torch.testing.assert_close(out, torch.cat((left, right), -1), rtol=0, atol=1e-15)


@pytest.mark.usefixtures("tier")
def test_zero_pivots_are_solved_by_projective_pairs() -> None:
    """Negative couplings and real z, where ratios divide by zero."""
    d = torch.tensor([[0, 0, 0.5]], dtype=torch.float64)
    b, c = torch.ones(2).double(), torch.tensor([-1.0, 1.0]).double()
    out = resolvent_diagonal(d, b, c, 1j)
    torch.testing.assert_close(out, torch.tensor([[-0.5 + 2j, -0.5 + 1j, 0]]).to(out))
    d = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    out = resolvent_diagonal(d, b[:1], b[:1], 0.0)
    assert torch.equal(out, torch.zeros_like(out))
    out.real.sum().backward()
    expected = torch.func.grad(
        lambda x: reference.resolvent_diagonal(
            x, b[:1][None], b[:1][None], torch.zeros(1)
        ).real.sum()
    )(d.detach())
    torch.testing.assert_close(d.grad, expected)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1e-17, 0.5, 1.0]), min_size=2, max_size=9),
    st.integers(0, 2**31),
)
def test_near_zero_pivots_lose_nothing(entries: list[float], seed: int) -> None:
    """At real z tiny pivots come and go; entries agree with a pivoting solver."""
    d = torch.tensor([entries], dtype=torch.float64)
    b = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], len(d[0]) - 1))
    matrix = reference.tridiagonal(d, b[None], b.flip(0)[None])
    if torch.linalg.cond(matrix) > 1e6:
        return
    out = resolvent_diagonal(d, b, b.flip(0), 0.0)
    exact = torch.linalg.inv(matrix).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(out, exact.to(out), rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("tiny", [1e-5, 1e-9, 1e-17])
def test_tiny_pivots_lose_no_digits(tiny: float) -> None:
    """Rounding of one division of size 1 / tiny is not allowed into G or gradients."""
    d = torch.tensor([[tiny, 0.25, -0.75, 0.5, tiny]], dtype=torch.float64)
    b, c = torch.full((4,), 0.5).double(), torch.tensor([0.5, -0.5, 0.25, 0.5]).double()
    args, others = (
        [x.clone().requires_grad_() for x in (d, b[None], c[None])] for _ in range(2)
    )
    out = resolvent_diagonal(*args, 0.0)
    exact = reference.resolvent_diagonal(*others, torch.zeros(1))
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)
    for each in (out, exact):
        (each * torch.arange(1.0, 6.0)).real.sum().backward()
    for one, other in zip(args, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("tier")
def test_a_singular_matrix_is_refused() -> None:
    """At an eigenvalue there is no resolvent, and no number stands in for it."""
    d = torch.zeros(1, 1)
    with pytest.raises(SolverError, match="singular at site 0"):
        resolvent_diagonal(d, d[:, :0], d[:, :0], 0.0)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_come_out_non_finite(bad: float) -> None:
    """A loss scale can only react to an overflow that it sees."""
    d, b, c, z = (x.float() if x.is_floating_point() else x for x in chain(70))
    d.requires_grad_()
    out = resolvent_diagonal(d, b, c, z)
    upstream = torch.ones_like(out)
    upstream[1, 30] = bad
    out.backward(upstream)
    assert d.grad is not None
    assert not torch.isfinite(d.grad[1]).any()
    assert torch.isfinite(d.grad[[0, 2]]).all()
    broken = d.detach().clone()
    broken[1, 30] = float("nan")
    assert torch.isnan(resolvent_diagonal(broken, b, c, z)[1].real).any()


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("storage", ["recompute", "fp32", "fp16"])
def test_the_backward_is_linear_in_the_loss_scale(storage: str) -> None:
    """backward(2^k g) / 2^k equals backward(g) bit by bit: no clamp hides anywhere."""
    d, b, c, z = (x.float() if x.is_floating_point() else x for x in chain(70))
    grads = []
    for scale in (1.0, 2.0**16):
        leaf = d.clone().requires_grad_()
        out = resolvent_diagonal(
            leaf, b, c, z, precision=ResolventPrecision(storage=storage)
        )
        (out * (0.01 - 0.02j) * scale).real.sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad / scale)
    assert torch.equal(*grads)


@pytest.mark.parametrize("fmt", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_resolvent_alone(fmt: torch.dtype) -> None:
    """The same bits with and without autocast; a 16-bit diagonal computes in fp32."""
    d, b, c, z = (x.float() if x.is_floating_point() else x for x in chain(70))
    plain = resolvent_diagonal(d, b, c, z)
    with torch.autocast("cpu", dtype=fmt):
        assert torch.equal(resolvent_diagonal(d, b, c, z), plain)
        leaf = d.to(fmt).requires_grad_()
        out = resolvent_diagonal(leaf, b, c, z)
        out.imag.sum().backward()
    assert out.dtype == torch.complex64
    assert leaf.grad is not None
    assert leaf.grad.dtype == fmt
    bound = 3 * torch.finfo(fmt).eps * d.abs().max().item()
    assert (out - plain).abs().max() <= bound


def test_small_imaginary_parts_upgrade_fp32_to_fp64() -> None:
    """On a clean chain in the band at eta = 0.001, fp32 would lose four digits."""
    d = torch.full((2, 2048), -2.0)
    one = torch.ones(2047)
    z = -2 + 0.001j
    exact = resolvent_diagonal(d.double(), one, one, z)
    upgraded = resolvent_diagonal(
        d, one, one, z, precision=ResolventPrecision(forward="fp32")
    )
    stubborn = resolvent_diagonal(
        d, one, one, z, precision=ResolventPrecision(forward="fp32", tolerance=1.0)
    )
    scale = exact.abs().max()
    assert (upgraded - exact).abs().max() <= 1e-6 * scale
    assert (stubborn - exact).abs().max() > (upgraded - exact).abs().max() * 10


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize(
    ("storage", "bound"),
    [("recompute", 1e-6), ("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 8e-3)],
)
def test_storage_keeps_its_declared_bytes_and_its_error(
    storage: str, bound: float
) -> None:
    """Bytes are counted on what autograd holds; error is relative L2 at eta = 1."""
    d, b, c, z = (x.float() if x.is_floating_point() else x for x in chain(128))
    precision = ResolventPrecision(storage=storage, backward="fp32")
    held: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        held.append(x)
        return x

    leaf = d.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = resolvent_diagonal(leaf, b, c, z, precision=precision)
    inputs = {d.numel(), b.numel(), z.numel(), z.expand(3).numel()}
    extra = [x for x in held if x.numel() not in inputs]
    assert sum(x.nbytes for x in extra) == precision.stored_bytes_per_site * d.numel()
    upstream = torch.randn(
        3, 128, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)
    )
    out.backward(upstream)
    wide = d.double().requires_grad_()
    reference.resolvent_diagonal(wide, b, c, z).backward(upstream.to(torch.complex128))
    assert wide.grad is not None
    assert leaf.grad is not None
    assert (leaf.grad - wide.grad).norm() <= bound * wide.grad.norm()


def test_storage_that_would_overflow_keeps_fp32_and_says_so() -> None:
    """1 / eta beyond 65,504 does not fit fp16."""
    d = torch.zeros(1, 1, requires_grad=True)
    precision = ResolventPrecision(storage="fp16")
    with pytest.warns(RuntimeWarning, match="too large to keep in fp16"):
        out = resolvent_diagonal(d, d[:, :0], d[:, :0], 1e-5j, precision=precision)
    out.real.sum().backward()
    assert d.grad is not None
    assert d.grad.item() == pytest.approx(-1e10 * -1, rel=1e-5)


def test_legacy_gradients_are_what_their_page_says() -> None:
    """The diagonal-only one is an approximation; the unconjugated one points away."""
    d, _, _, _ = chain(128, batch=64)
    d = -2 + d.clamp(-3, 3)
    one = torch.ones(127)
    upstream = torch.randn(
        64, 128, dtype=torch.complex128, generator=torch.Generator().manual_seed(2)
    )

    def cosine(name: str) -> float:
        leaf, exact = d.clone().requires_grad_(), d.clone().requires_grad_()
        resolvent_diagonal_with_legacy_gradient(
            leaf, one, one, 1j, gradient=name
        ).backward(upstream)
        resolvent_diagonal(exact, one, one, 1j).backward(upstream)
        assert leaf.grad is not None
        assert exact.grad is not None
        return torch.cosine_similarity(leaf.grad.ravel(), exact.grad.ravel(), 0).item()

    assert 0.9 < cosine("diagonal") < 0.97
    assert abs(cosine("unconjugated")) < 0.2
    assert cosine("blend") < 0.8
    with pytest.raises(SettingsError, match="got 'exact'"):
        resolvent_diagonal_with_legacy_gradient(d, one, one, 1j, gradient="exact")


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The message names what came."""
    d = torch.zeros(2, 5)
    with pytest.raises(SettingsError, match="upper with 4 entries"):
        resolvent_diagonal(d, torch.zeros(5), torch.zeros(4), 1j)
    with pytest.raises(SettingsError, match="z broadcastable"):
        resolvent_diagonal(d, torch.zeros(4), torch.zeros(4), torch.ones(3) * 1j)
    with pytest.raises(SettingsError, match="forward"):
        ResolventPrecision(forward="fp16")
    with pytest.raises(SettingsError, match="tolerance"):
        ResolventPrecision(tolerance=0)


def test_without_numba_plain_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler changes the speed, never the answer, and has its reason."""
    d, b, c, z = chain(30)
    expected = resolvent_diagonal(d, b, c, z)
    resolvent_solve.kernel_available.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    for name in ("castwise.layers.resolvent_kernel",):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.delattr("castwise.layers.resolvent_kernel", raising=False)
    try:
        assert "numba" in resolvent_solve.kernel_available().because
        assert not resolvent_solve.kernel_available().value
        torch.testing.assert_close(resolvent_diagonal(d, b, c, z), expected)
    finally:
        resolvent_solve.kernel_available.cache_clear()
