from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from castwise.errors import SettingsError, SolverError
from castwise.layers import chebyshev, reference
from castwise.layers.cayley import CayleyPropagator, as_planes, cayley_blocks
from castwise.layers.cayley_health import HealthProbe, sparsity, unitarity
from castwise.layers.conjugate_gradient import Outcome
from castwise.layers.hamiltonian import GraphHamiltonian, apply_laplacian
from castwise.layers.ieee_products import ieee_products
from castwise.layers.phase_rotation import rotate
from castwise.policy import preset
from castwise.training.step import prepare

SOLVERS = ("explicit", "iterative", "chebyshev")


def wave(*shape: int, seed: int = 0) -> Tensor:
    """Return a random complex64 state that is the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex64, generator=generator)


def original(layer: CayleyPropagator, psi: Tensor) -> Tensor:
    """Run the layer's equations densely in complex128."""
    turned = reference.phase_rotation(psi, layer.envelope)
    k = layer.hamiltonian.dense()
    return turned @ reference.cayley_unitary(k, layer.dt / 2).T


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    """Return the relative L2 error."""
    assert found is not None
    assert expected is not None
    return ((found.to(expected) - expected).norm() / expected.norm()).item()


def deviation(before: Tensor, after: Tensor) -> float:
    """Return the largest relative change of a token's squared norm, in fp64."""
    old = before.to(torch.complex128).abs().square().sum(-1)
    new = after.to(torch.complex128).abs().square().sum(-1)
    return (new / old - 1).abs().max().item()


@pytest.mark.parametrize("sparsity_", [2, 3, 8, 24])
@pytest.mark.parametrize("dim", [3, 4, 8, 16, 65])
def test_the_hamiltonian_is_a_graph_laplacian(dim: int, sparsity_: int) -> None:
    """Symmetric, H 1 = 0, positive, bounded; no self loop, no edge twice in a scale."""
    h = GraphHamiltonian(dim, sparsity=sparsity_, long_range=0.7)
    dense = h.dense()
    assert torch.equal(dense, dense.T)
    assert (dense @ torch.ones(dim).double()).abs().max() < 1e-13
    values = torch.linalg.eigvalsh(dense.detach())
    assert values[0] > -1e-12
    assert values[-1] <= h.largest_eigenvalue_bound() * (1 + 1e-12)
    i, j = h.edges()
    assert (i != j).all()
    first = {frozenset(e) for e in h.edges().T.tolist()}
    assert len(first) == h.edges().shape[1]
    rings, pairs = h.edge_weights(torch.float64)
    slow = reference.graph_laplacian(
        dim, h.edges(), torch.cat((rings.flatten(), pairs)).detach()
    )
    torch.testing.assert_close(dense.detach(), slow, rtol=0, atol=1e-13)
    x = wave(5, dim).real.double()
    torch.testing.assert_close(
        apply_laplacian(x, rings, pairs, h.pairs), x @ dense, rtol=0, atol=1e-12
    )


def test_long_range_edges_exist() -> None:
    """A small world for every even sparsity too, where the original had a bare ring."""
    h = GraphHamiltonian(64, sparsity=6, long_range=0.5)
    assert h.pairs.shape[1] == 32
    apart = (h.pairs[1] - h.pairs[0]).abs()
    assert torch.minimum(apart, 64 - apart).min() > 12


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e4, 1e6])
def test_the_blocks_are_unitary_at_any_strength(scale: float) -> None:
    """2e-7 stored in fp32 at ordinary strength; 1e-6 up to |K| = 1e4 and beyond."""
    h = GraphHamiltonian(64).dense().detach()
    k = scale * h / torch.linalg.eigvalsh(h)[-1]
    c, s = (block.float().double() for block in cayley_blocks(k))
    u = torch.complex(c + torch.eye(64), -s)
    error = (u.mH @ u - torch.eye(64)).abs().max().item()
    assert error <= (2e-7 if scale <= 1 else 1e-6)
    exact = reference.cayley_unitary(k, 1.0)
    assert (u - exact).abs().max() < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dt", [0.02, 0.1])
def test_forward_and_gradients_agree_with_the_original(solver: str, dt: float) -> None:
    """5e-7 forward (1e-6 for solvers with a tolerance), gradients 2e-6."""
    layer = CayleyPropagator(96, dt=dt, solver=solver)
    exact = CayleyPropagator(96, dt=dt).double()
    exact.load_state_dict(layer.state_dict())
    psi = wave(3, 33, 96)
    mine, its = psi.clone().requires_grad_(), psi.to(torch.complex128).requires_grad_()
    out, expected = layer(mine), original(exact, its)
    upstream = wave(3, 33, 96, seed=1)
    out.backward(upstream)
    expected.backward(upstream.to(torch.complex128))
    assert relative(out, expected) <= (5e-7 if solver == "explicit" else 1e-6)
    assert relative(mine.grad, its.grad) <= 2e-6
    for (name, one), other in zip(
        layer.named_parameters(), exact.parameters(), strict=True
    ):
        assert relative(one.grad, other.grad) <= 2e-6, name


@pytest.mark.parametrize("solver", SOLVERS)
def test_norm_and_residual_hold_at_the_fp32_floor(solver: str) -> None:
    """Norm within 1e-6; residual within 1e-6 of the layer's own right-hand side."""
    layer = CayleyPropagator(64, solver=solver)
    psi = wave(5, 40, 64)
    assert deviation(psi, layer(psi)) <= 1e-6
    solution = layer.solve_step(psi)
    assert solution.outcome is Outcome.CONVERGED
    assert solution.residual.max() <= 1e-6
    assert torch.equal(solution.x, layer(psi))


@pytest.mark.parametrize("dt", [1e-2, 1.0, 1e2, 1e4])
def test_the_explicit_step_holds_at_any_time_step(dt: float) -> None:
    """Backward error stays at the fp32 floor, for random and for smooth states."""
    layer = CayleyPropagator(64, dt=dt)
    smooth = torch.polar(torch.ones(64), torch.arange(64) * 0.1).expand(3, 64)
    k = (dt / 2 * layer.hamiltonian.dense()).detach()
    size = torch.linalg.matrix_norm(k, 2) + 1
    for psi in (wave(3, 64), smooth):
        rhs = layer.rotated(as_planes(psi)).detach()
        out = layer.step(rhs).detach()
        error = layer.residual(rhs, out).detach()
        assert (error / size).max() <= 5e-7
        assert deviation(psi, layer(psi)) <= 1e-6


def test_a_deep_stack_stays_unitary() -> None:
    """16 layers, dt 0.1, sparsity 8: plain CG on the skew block reached 1.45e9 here."""
    stack = nn.Sequential(
        *(CayleyPropagator(256, dt=0.1, sparsity=8, seed=s) for s in range(16))
    )
    psi = wave(2, 16, 256)
    assert deviation(psi, stack(psi)) <= 1e-5


def test_rotation_gradients_are_exact() -> None:
    """Hand-written backward against finite differences, clamped damping included."""
    planes = torch.stack((wave(3, 6).real, wave(3, 6).imag)).double()
    planes[:, 0, 0] = 4.0
    envelope = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
    gradcheck(
        lambda p, e: rotate(p, e, sharpness=0.7),
        (planes.requires_grad_(), envelope.requires_grad_()),
    )
    psi = torch.complex(planes[0], planes[1])
    expected = reference.phase_rotation(psi, envelope, sharpness=0.7)
    out = rotate(planes, envelope, sharpness=0.7)
    torch.testing.assert_close(torch.complex(out[0], out[1]), expected)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-4, 1e4])
def test_rotation_keeps_the_norm_of_any_token(size: float) -> None:
    """Tiny and empty tokens too, without NaN in output or gradient."""
    planes = (size * as_planes(wave(4, 32))).requires_grad_()
    out = rotate(planes, torch.full((32,), 0.3))
    torch.testing.assert_close(
        out.square().sum((0, -1)), planes.square().sum((0, -1)), rtol=1e-6, atol=0
    )
    out.sum().backward()
    assert planes.grad is not None
    assert torch.isfinite(planes.grad).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_layer_gradients_pass_finite_differences(solver: str) -> None:
    """In float64, D = 6, through every parameter."""
    layer = CayleyPropagator(6, solver=solver, sparsity=2, tolerance=1e-13).double()
    names = [name for name, _ in layer.named_parameters()]

    def run(psi: Tensor, *values: Tensor) -> Tensor:
        out = torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (psi,)
        )
        return torch.view_as_real(out)

    psi = wave(2, 6).to(torch.complex128).requires_grad_()
    gradcheck(run, (psi, *(p.detach().requires_grad_() for p in layer.parameters())))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fmt", [torch.bfloat16, torch.float16])
def test_the_guard_keeps_every_bit_under_autocast(
    solver: str, fmt: torch.dtype
) -> None:
    """Forward and backward, complex inputs and 16-bit real ones."""
    layer = CayleyPropagator(32, solver=solver)

    def run(psi: Tensor) -> tuple[Tensor, Tensor]:
        leaf = psi.clone().requires_grad_()
        out = layer(leaf)
        (grad,) = torch.autograd.grad(out.abs().sum(), leaf)
        return out, grad

    psi = wave(4, 32)
    plain = run(psi)
    with torch.autocast("cpu", dtype=fmt):
        guarded = run(psi)
        low = layer(psi.real.to(fmt))
    assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))
    assert torch.equal(low, layer(psi.real.to(fmt).float()))


def test_without_the_guard_bf16_costs_three_orders_of_magnitude() -> None:
    """The honest figure: about 1e-7 against 1e-4, not 1 against 1e9."""
    psi = wave(8, 256)
    errors = {}
    for guarded in (True, False):
        layer = CayleyPropagator(256, guarded=guarded)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            rhs = layer.rotated(as_planes(psi))
            errors[guarded] = layer.residual(rhs, layer.step(rhs)).max().item()
    assert errors[True] <= 1e-6
    assert errors[False] >= 1e3 * errors[True]


def test_product_switches_do_not_reach_the_layer() -> None:
    """The CPU multiplies in bf16 under `medium`; the layer does not, and restores."""
    layer, psi = CayleyPropagator(64), wave(50, 64)
    plain = layer(psi)
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        assert torch.equal(layer(psi), plain)
        assert switch.fp32_precision == "bf16"
        with pytest.raises(ZeroDivisionError), ieee_products("cpu"):
            assert switch.fp32_precision == "ieee"
            _ = 1 / 0
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before


def test_calls_share_no_state() -> None:
    """Two forwards, one backward; a repeated call gives the same bits; copies part."""
    layer = CayleyPropagator(32, solver="iterative")
    one, two = wave(3, 32).requires_grad_(), wave(5, 32, seed=1).requires_grad_()
    first = layer(one)
    kept = first.detach().clone()
    second = layer(two)
    (first.abs().sum() + second.abs().sum()).backward()
    assert torch.equal(first, kept)
    assert torch.equal(layer(one), first)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(one), first)
    assert torch.equal(layer(one), first)


def test_recompute_gives_the_same_gradient() -> None:
    """Activation checkpointing runs the layer again inside the backward."""
    layer = CayleyPropagator(32)
    grads = []
    for recompute in (False, True):
        psi = wave(3, 32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = (
                torch.utils.checkpoint.checkpoint(layer, psi, use_reentrant=False)
                if recompute
                else layer(psi)
            )
        out.abs().sum().backward()
        grads.append(psi.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("half_width", [1e-3, 0.05, 0.3, 2.0])
def test_the_chebyshev_bound_holds_and_is_tight(half_width: float) -> None:
    """On a fine grid of the spectrum the error is below the bound, not far below."""
    spectrum = torch.linspace(0, 2 * half_width, 1001, dtype=torch.float64)
    exact = 1 / (1 + 1j * spectrum)
    ones = torch.stack((torch.ones(1001), torch.zeros(1001))).double()
    for degree in (1, 2, 4, 8, 16):
        bound = chebyshev.error_bound(half_width, degree)
        if bound < 1e-13:
            continue
        found = chebyshev.apply_series(
            lambda v: v * spectrum, ones, half_width, degree, 1
        )
        error = (torch.complex(found[0], found[1]) - exact).abs().max()
        assert bound / 10 < error <= bound * (1 + 1e-9)


def test_the_degree_follows_the_spectrum_or_is_refused() -> None:
    """Weights that grow raise the degree; beyond 200 terms the message says so."""
    layer = CayleyPropagator(32, solver="chebyshev")
    psi = wave(3, 32)
    before = layer.solve_step(psi).num_steps
    with torch.no_grad():
        for ring in layer.hamiltonian.ring_weights:
            ring.add_(2.0)
    after = layer.solve_step(psi)
    assert after.num_steps > before
    assert after.residual.max() <= 1e-6
    layer.dt = 1e4
    with pytest.raises(SolverError, match="solver='explicit'"):
        layer(psi)
    failed = layer.solve_step(psi)
    assert failed.outcome is Outcome.MAX_STEPS_REACHED
    assert torch.isnan(failed.residual).all()


def test_an_iterative_solver_that_stops_short_says_so() -> None:
    """|K| = 1e4 in fp32 is beyond CG; the layer raises, the solution is named."""
    layer = CayleyPropagator(32, solver="iterative", dt=1e4)
    with pytest.raises(SolverError, match="Conjugate gradients ended with"):
        layer(wave(3, 32))
    solution = layer.solve_step(wave(3, 32))
    assert solution.outcome in {Outcome.MAX_STEPS_REACHED, Outcome.BREAKDOWN}
    assert solution.residual.max() > 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_overflow_upstream_is_passed_on(solver: str) -> None:
    """A loss scale must see it."""
    layer = CayleyPropagator(16, solver=solver)
    psi = wave(3, 16).requires_grad_()
    out = layer(psi)
    out.backward(torch.full_like(out, float("inf")))
    assert psi.grad is not None
    assert not torch.isfinite(torch.view_as_real(psi.grad)).any()


def test_settings_are_checked() -> None:
    """A misspelled solver is not silently another one."""
    with pytest.raises(SettingsError, match="'cg'"):
        CayleyPropagator(8, solver="cg")
    with pytest.raises(SettingsError, match="num_sites >= 3"):
        GraphHamiltonian(2)


def test_health_sees_the_precision_that_training_uses() -> None:
    """Measured inside autocast, an unguarded layer is worse than a guarded one."""
    found = {}
    for guarded in (True, False):
        model = nn.Sequential(CayleyPropagator(64, guarded=guarded))
        probe = HealthProbe(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(wave(3, 64))
        found[guarded] = probe.read()["0"]
        assert probe.read() == {}
        probe.remove()
    assert found[True].residual <= 1e-6
    assert found[True].unitarity <= 5e-7
    assert found[True].norm <= 1e-6
    assert found[False].residual > 1e3 * found[True].residual
    assert found[False].unitarity > 1e2 * found[True].unitarity
    assert not found[True].messages


def test_health_is_nan_with_a_message_where_it_cannot_be_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never 0, which would look perfect."""
    layer = CayleyPropagator(16)
    probe = HealthProbe(layer, interval=2)
    layer(wave(3, 16) * float("nan"))
    health = probe.read()[""]
    assert health.residual != health.residual
    assert health.norm != health.norm
    assert any(text.startswith("norm is NaN") for text in health.messages)
    layer(wave(3, 16))  # not this one: interval 2
    assert probe.read() == {}

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("no residual today")

    monkeypatch.setattr(CayleyPropagator, "residual", broken)
    layer(wave(3, 16))
    health = probe.read()[""]
    assert health.residual != health.residual
    assert "residual cannot be computed: no residual today" in health.messages
    assert health.norm <= 1e-6


def test_sparsity_counts_exactly() -> None:
    """One-hot rows of 8 are 7/8 sparse; top-2 rows 6/8."""
    assert sparsity(torch.eye(8)[:3]) == 7 / 8
    top = torch.zeros(5, 8, dtype=torch.complex64)
    top[:, :2] = 1j
    assert sparsity(top) == 6 / 8


def test_unitarity_of_a_broken_step_is_large() -> None:
    """The measure can fail: scale the step by 1.01 and it reads 0.02."""
    layer = CayleyPropagator(16)
    step = layer.step
    layer.step = lambda planes: 1.01 * step(planes)  # type: ignore[method-assign]
    assert unitarity(layer).item() == pytest.approx(0.0201, rel=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_compiled_model_gives_the_same_bits(solver: str) -> None:
    """The layer runs eagerly between two graphs, its probe too."""
    layer = nn.Sequential(CayleyPropagator(16, solver=solver))
    probe = HealthProbe(layer)
    psi = wave(3, 16)
    expected = layer(psi)
    compiled = torch.compile(layer, backend="aot_eager")
    leaf = psi.clone().requires_grad_()
    out = compiled(leaf)
    out.abs().sum().backward()
    assert torch.equal(out, expected)
    assert leaf.grad is not None
    assert probe.read()["0"].residual <= 1e-6


def test_unitarity_is_measured_inside_an_island_on_the_layer_itself() -> None:
    """The probe asks the layer as the policy runs it, not as its surroundings run."""
    torch.manual_seed(0)
    layer = CayleyPropagator(32, guarded=False)
    model = nn.Sequential(nn.Linear(32, 32), layer)
    found = []
    for policy in (
        preset("bf16-mixed"),
        preset("bf16-mixed").with_rule(module="1", precision="fp32", because="a test"),
    ):
        run = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
        probe = HealthProbe(model)
        with run.region():
            model(torch.randn(5, 32))
        found.append(probe.read()["1"].unitarity)
        probe.remove()
        run.remove()
    assert found[0] > 1e-3
    assert found[1] < 3e-7
