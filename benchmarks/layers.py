"""Accuracy and time of the sensitive layers, against float64 and against their rivals.

    python benchmarks/layers.py overflow      the determinant recursion at growing N
    python benchmarks/layers.py skew-cg       CG on a skew block, 16 layers, pure fp32
    python benchmarks/layers.py resolvent     error and time of every tier
    python benchmarks/layers.py goals         how much faster than what they replace
    python benchmarks/layers.py gradients     error of exact, stored, legacy gradients
    python benchmarks/layers.py cayley        error and time of every solver
    python benchmarks/layers.py               all of them

Times are medians after a warm-up, rivals and ours alternating, in milliseconds. A turn
is one call, which finds the caches full of the rivals' data; `goals` also shows turns
of 20 ms, in which a short call finds its own.

Everything runs in OMP_NUM_THREADS threads, one if that is not set: ours, torch's, and
the copy that shows the bandwidth. What is written by hand, and NumPy, has one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy.linalg
import torch
from layer_originals import (
    HandwrittenResolvent,
    OriginalResolvent,
    complex_lu,
    damped_chebyshev,
    determinant_diagonal,
    handwritten_simd,
    handwritten_simd_gradient,
    skew_cg,
)
from torch import Tensor, nn

from castwise.layers import kept_blocks, reference, resolvent_solve
from castwise.layers.cayley import CayleyPropagator, as_planes
from castwise.layers.legacy_gradients import resolvent_diagonal_with_legacy_gradient
from castwise.layers.resolvent import ResolventPrecision, resolvent_diagonal


def times(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int = 15,
    budget: float = 4.0,
    turn: float = 0.0,
) -> dict[str, float]:
    """Return the median of each contender in milliseconds, their turns alternating.

    A turn is at least one call, and lasts at least so many milliseconds.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    began = time.perf_counter()
    for _ in range(repeats):
        for name, run in contenders.items():
            spent = 0.0
            while not spent or spent < turn:
                start = time.perf_counter()
                run()
                measured[name].append((time.perf_counter() - start) * 1e3)
                spent += measured[name][-1]
        if time.perf_counter() - began > budget:
            break
    return {name: statistics.median(values) for name, values in measured.items()}


def table(title: str, head: list[str], rows: list[list[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        print("| " + " | ".join(cells) + " |", flush=True)


def chain(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the chain of the original's validator: d = 2 randn, b = c = 1."""
    generator = torch.Generator().manual_seed(length)
    return 2 * torch.randn(rows, length, generator=generator), torch.ones(length - 1)


def overflow() -> None:
    """Run the determinant recursion until it breaks, beside the ratio form."""
    z = torch.tensor(1j, dtype=torch.complex128)
    rows: list[list[object]] = []
    for length in (64, 128, 512, 1024, 2048):
        d, one = chain(4, length)
        exact = resolvent_diagonal(d.double(), one, one, z)
        row: list[object] = [length]
        for dtype in (torch.complex64, torch.complex128):
            run = torch.vmap(determinant_diagonal, in_dims=(0, None, None, None))
            out = run(*(x.to(dtype) for x in (d, one, one, z)))
            row.append((out - exact).abs().max().item())
            row.append(f"{(out == 0).double().mean().item():.0%}")
        for arithmetic in ("fp32", "fp64"):
            narrow = resolvent_diagonal(
                d, one, one, z, precision=ResolventPrecision(forward=arithmetic)
            )
            row.append((narrow - exact).abs().max().item())
        rows.append(row)
    table(
        "Largest error of G, d = 2 randn, b = c = 1, z = 1j (|G| <= 1)",
        [
            "N",
            "determinants c64",
            "zeros",
            "determinants c128",
            "zeros",
            "ratio fp32",
            "ratio fp64 (stored c64)",
        ],
        rows,
    )


def skew_cg_story() -> None:
    """Send a state through 16 layers in pure fp32, solved in both ways."""
    psi = torch.randn(
        64, 256, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)
    )
    stack = nn.ModuleList(
        CayleyPropagator(256, sparsity=8, long_range=0, seed=s) for s in range(16)
    )

    def change(out: Tensor) -> float:
        ratio = out.to(torch.complex128).abs().square().sum(-1)
        before = psi.to(torch.complex128).abs().square().sum(-1)
        return (ratio / before - 1).abs().mean().item()

    rows: list[list[object]] = []
    for steps in (3, 8, 20, 50):
        out = psi
        with torch.no_grad():
            for layer in stack:
                out = skew_cg(layer.hamiltonian.dense(torch.float32), out, 0.05, steps)
        rows.append([f"CG on I + skew, {steps} steps", change(out)])
    for solver in ("explicit", "iterative", "chebyshev"):
        out = psi
        for layer in stack:
            layer.solver = solver
            with torch.no_grad():
                out = layer(out)
        rows.append([f"castwise, {solver}", change(out)])
    table(
        "Mean | ||out||^2 / ||in||^2 - 1 | after 16 layers, dt 0.1, pure fp32",
        ["solver", "norm deviation"],
        rows,
    )


def resolvent() -> None:
    """Measure every tier: error at growing N, then times."""
    z = torch.tensor(1j, dtype=torch.complex128)
    _mpmath_check()
    names = {
        "kernel fp64": "kernel",
        "kernel fp32": "fp32 kernel",
        "without compiler": "without compiler",
        "handwritten numba": "handwritten numba, bare loop",
        "handwritten numba as a layer": "the same as a layer",
        "original vmap form": "determinants under vmap",
    }
    rows: list[list[object]] = []
    for batch, length in ((8, 128), (8, 1024), (8, 65536), (64, 8192), (64, 65536)):
        d, one = chain(batch, length)
        for each in _resolvent_contenders(d, one, z):
            what = next(iter(each)).split(",")[0]
            kept = {n.removeprefix(f"{what}, "): run for n, run in each.items()}
            kept = {n: run for n, run in kept.items() if n in names}
            if d.numel() > FEW_SITES:
                del kept["without compiler"]
            found = times(kept, repeats=9)
            rows.append([f"{batch} x {length:,}", what])
            rows[-1] += [found.get(name, "") for name in names]
    table(
        f"Milliseconds, one call a turn; a copy moves {_copy_speed() / 1e6:.1f} GB/s",
        ["B x N", "what", *names.values()],
        rows,
    )


FEW_SITES = 1 << 20  # beyond, a call without compiler takes a second


def _copy_speed() -> float:
    """Return how many bytes a millisecond a copy into memory at hand moves."""
    source = torch.randn(40_000_000)
    target = torch.empty_like(source)
    return 2 * source.nbytes / times({"": lambda: target.copy_(source)})[""]


def goals() -> None:
    """Set the layers beside what they replace: ratios, and what is wanted."""
    _short_goals()
    _large_goals()
    rows: list[list[object]] = []
    for name, wanted in (("Chebyshev 16", 4.0), ("LU", 1.5)):
        ratio = _cayley_ratio(name)
        rows.append(
            [f"original, {name} / ours", ratio, wanted, _holds([ratio], wanted)]
        )
    table(
        "Cayley layer, 1,024 tokens, D = 256, forward and backward",
        ["what", "ratio", "wanted", "holds"],
        rows,
    )


def _holds(ratios: list[float], wanted: float) -> str:
    """Say of each ratio whether it is at least what is wanted."""
    return ", ".join("yes" if ratio >= wanted else "no" for ratio in ratios)


def _short_goals() -> None:
    """Compare short chains, called over and over, and each after its rivals."""
    z = torch.tensor(1j, dtype=torch.complex128)
    both = _resolvent_contenders(*chain(8, 1024), z)[1]
    columns: list[dict[str, float]] = []
    for turn, name in ((20.0, "20 ms a turn"), (0.0, "one call a turn")):
        found = times(both, repeats=25, budget=20.0, turn=turn)
        columns.append({what[6:]: value for what, value in found.items()})
        told = ", ".join(f"{what} {v:.3f} ms" for what, v in columns[-1].items())
        print(f"8 x 1,024, forward and backward, {name}: {told}")
    rows: list[list[object]] = []
    for its, ours, wanted in (
        ("original vmap form", "kernel fp64", 100),
        ("original vmap form", "without compiler", 30),
        ("handwritten numba as a layer", "kernel fp64", 1),
    ):
        ratios = [found[its] / found[ours] for found in columns]
        rows.append([f"{its} / {ours}", *ratios, wanted, _holds(ratios, wanted)])
    bare, theirs = _bare(8, 1024)
    found = times({"ours": bare, "theirs": theirs}, repeats=200, turn=2.0)
    ratio = found["theirs"] / found["ours"]
    name = "handwritten loops / kernel, no autograd around either"
    rows.append([name, ratio, "", 1, _holds([ratio], 1)])
    table(
        "8 x 1,024, forward and backward",
        ["", "called over and over", "one call a turn", "wanted", "holds"],
        rows,
    )


def _large_goals() -> None:
    """Compare large batches with a copy, with torch's writing, and with a loop."""
    z = torch.tensor(1j, dtype=torch.complex128)
    speed = _copy_speed()
    print(
        f"\nA copy into memory at hand moves {speed / 1e6:.1f} GB/s in"
        f" {torch.get_num_threads()} thread(s). Results of 1 MiB and more come in"
        " memory that is kept from call to call, unless it says fresh;"
        " torch.complex gets new pages above 32 MiB."
    )
    rows: list[list[object]] = []
    for batch, length in ((64, 8192), (64, 65536)):
        d, one = chain(batch, length)

        def line(what: str, ratios: list[float], wanted: float) -> None:
            holds = _holds(ratios, wanted)
            rows.append([f"{batch} x {length:,}", what, *ratios, wanted, holds])  # noqa: B023 -- called at once

        forward, both = _resolvent_contenders(d, one, z)
        forward |= {
            f"{name}, fresh": _fresh(forward[name])
            for name in ("forward, kernel fp64", "forward, kernel fp32")
        }
        forward["torch.complex"] = lambda d=d: torch.complex(d, d)
        for what, each in (("forward", forward), ("both", both)):
            kept = {n: run for n, run in each.items() if "compiler" not in n}
            found = times(kept, repeats=9, budget=8.0)
            # d and G; then d, the upstream gradient and that of d
            floor = (12 if what == "forward" else 28) * d.numel() / speed
            layer = found[f"{what}, handwritten numba as a layer"]
            ours = [found[f"{what}, kernel {x}"] for x in ("fp64", "fp32")]
            line(f"{what}: copying as many bytes", [floor / x for x in ours], 0.25)
            line(f"{what}: handwritten as a layer", [layer / x for x in ours], 1)
            if what == "both":
                continue
            ours = [found[f"forward, kernel {x}, fresh"] for x in ("fp64", "fp32")]
            line("forward, fresh: copying", [floor / x for x in ours], 0.25)
            written = [found["torch.complex"] / x for x in ours]
            line("forward, fresh: torch.complex(d, d)", written, 0.25)
    table(
        "Time of what is named / ours",
        ["B x N", "what", "fp64", "fp32", "wanted", "holds"],
        rows,
    )


def _fresh(run: Callable[[], Any]) -> Callable[[], Any]:
    """Have a large result written into memory that nobody has used."""

    def released() -> None:
        kept_blocks.release()
        run()

    return released


def _bare(rows: int, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return forward and backward of both kernels on inputs as each wants them."""
    d, one = chain(rows, length)
    upstream = torch.randn(rows, length, dtype=torch.complex64)
    z = torch.full((rows,), 1j, dtype=torch.complex128)
    chain_ = resolvent_solve.Chain(d=d, k=one[None], z=z, causal=False)
    held = resolvent_solve._kernel_tensors(chain_, wide=True)  # noqa: SLF001 -- to time what it calls
    run = resolvent_solve._run_kernel  # noqa: SLF001 -- as above
    out, site = torch.empty_like(upstream), torch.empty_like(d)
    point = torch.empty_like(z)

    def ours() -> None:
        run(chain_, True, held, out)
        run(chain_, True, held, site, grad=upstream, point=point)

    return ours, _resolvent_contenders(d, one, z[0])[1]["both, handwritten numba"]


def _cayley_ratio(rival: str) -> float:
    """Time forward and backward of a whole layer, 1,024 tokens, D = 256."""
    psi = torch.randn(1024, 256, dtype=torch.complex64)
    upstream = torch.ones_like(psi)

    def both(run: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: run(psi.clone().requires_grad_()).backward(upstream)

    contenders = _cayley_contenders(0.1)
    ours = next(run for name, _, run in contenders if name == "explicit")
    its = next(run for name, _, run in contenders if rival in name)
    found = times({"ours": both(ours), "its": both(its)}, repeats=9, budget=12.0)
    return found["its"] / found["ours"]


def _mpmath_check() -> None:
    """Compare with 60 digits, where mpmath is installed."""
    try:
        import mpmath  # noqa: PLC0415 -- optional
    except ImportError:
        print("mpmath is not installed: the 60-digit check is left out")
        return
    mpmath.mp.dps = 60
    rows: list[list[object]] = []
    for length in (128, 1024, 65536):
        d, one = chain(1, length)
        u, w = [], []
        a = [mpmath.mpc(x, -1) for x in d[0].double().tolist()]
        for x in a:
            u.append(x - 1 / u[-1] if u else x)
        for x in reversed(a):
            w.append(x - 1 / w[-1] if w else x)
        exact = np.array(
            [complex(1 / (p + q - x)) for p, q, x in zip(u, w[::-1], a, strict=True)]
        )
        row: list[object] = [length]
        for wide in (d.double(), d):
            precision = ResolventPrecision(forward="fp32")
            out = resolvent_diagonal(wide, one, one, 1j, precision=precision)
            row.append(float(np.abs(out.numpy()[0] - exact).max()))
        chain_ = resolvent_solve.Chain(
            d=d.double(),
            k=one[None].double(),
            z=torch.tensor([1j], dtype=torch.complex128),
            causal=False,
        )
        out, _ = resolvent_solve.diagonal_and_bonds(
            chain_.a(wide=True), chain_.k.to(torch.complex128)
        )
        row.append(float(np.abs(out.numpy()[0] - exact).max()))
        rows.append(row)
    table(
        "Largest error against 60-digit mpmath, z = 1j",
        ["N", "kernel fp64", "kernel fp32", "odd-even fp64"],
        rows,
    )


def _resolvent_contenders(
    d: Tensor, one: Tensor, z: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Return what to time, forward alone and forward with backward."""
    batch, length = d.shape
    upstream = torch.randn(batch, length, dtype=torch.complex64)
    features = torch.view_as_real(upstream)
    rows = one.expand(batch, length - 1)
    a_re, a_im = d.double().T.contiguous().numpy(), np.full((length, batch), -1.0)
    source = features.double().permute(1, 2, 0).contiguous().numpy()
    source[:, 1] *= -1
    out = np.empty((batch, length, 2), np.float32)
    site = np.empty((batch, length), np.float32)
    pivots, store = np.empty((length, 2, batch)), np.empty((length, 8, batch))
    k = np.ones(length - 1)

    def plain(run: Callable[[], Any]) -> Callable[[], Any]:
        """Hold the kernel back while a plain-torch contender runs."""

        def held() -> None:
            fits, resolvent_solve._kernel_fits = (  # noqa: SLF001 -- to time the tier
                resolvent_solve._kernel_fits,  # noqa: SLF001 -- as above
                lambda _: False,
            )
            try:
                run()
            finally:
                resolvent_solve._kernel_fits = fits  # noqa: SLF001 -- as above

        return held

    def ours(arithmetic: str) -> Callable[[], Any]:
        precision = ResolventPrecision(forward=arithmetic, tolerance=1.0)

        def run() -> None:
            leaf = d.clone().requires_grad_()
            resolvent_diagonal(leaf, one, one, z, precision=precision).backward(
                upstream
            )

        return run

    def original() -> None:
        leaf = d.clone().requires_grad_()
        OriginalResolvent.apply(leaf, rows, rows, z).backward(features)

    def handwritten() -> None:
        handwritten_simd(a_re, a_im, k, out, pivots)
        handwritten_simd_gradient(a_re, a_im, k, source, site, store)

    def layered() -> None:
        leaf = d.clone().requires_grad_()
        HandwrittenResolvent.apply(leaf, one, complex(z)).backward(upstream)

    forward: dict[str, Callable[[], Any]] = {
        "forward, kernel fp64": lambda: resolvent_diagonal(d, one, one, z),
        "forward, kernel fp32": lambda: resolvent_diagonal(
            d,
            one,
            one,
            z,
            precision=ResolventPrecision(forward="fp32", tolerance=1.0),
        ),
        "forward, handwritten numba": lambda: handwritten_simd(
            a_re, a_im, k, out, pivots
        ),
        "forward, handwritten numba as a layer": lambda: HandwrittenResolvent.apply(
            d, one, complex(z)
        ),
        "forward, without compiler": plain(lambda: resolvent_diagonal(d, one, one, z)),
    }
    if length <= 1024:
        forward["one row, all right-hand sides, solve_banded"] = lambda: _banded(d[0])
    both: dict[str, Callable[[], Any]] = {
        "both, kernel fp64": ours("fp64"),
        "both, kernel fp32": ours("fp32"),
        "both, handwritten numba": handwritten,
        "both, handwritten numba as a layer": layered,
        "both, without compiler": plain(ours("fp64")),
    }
    if length <= 1024:
        both["both, original vmap form"] = original
    return forward, both


def _banded(d: Tensor) -> Any:
    """Solve for the whole inverse with LAPACK's banded solver: no O(N) way there."""
    length = len(d)
    bands = np.ones((3, length), complex)
    bands[1] = d.numpy() - 1j
    return scipy.linalg.solve_banded((1, 1), bands, np.eye(length)).diagonal()


def gradients() -> None:
    """Compare exact, stored and legacy gradients with the dense inverse."""
    d = -2 + chain(64, 128)[0].div(2).clamp(-3, 3)
    one = torch.ones(127)
    upstream = torch.randn(
        64, 128, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)
    )
    rows: list[list[object]] = []
    for eta in (1.0, 0.1):
        z = torch.tensor(eta * 1j)
        wide = d.double().requires_grad_()
        reference.resolvent_diagonal(wide, one, one, z).backward(upstream)
        assert wide.grad is not None

        def compare(name: str, out: Tensor, leaf: Tensor, bytes_: object) -> None:
            (grad,) = torch.autograd.grad(out, leaf, upstream)
            exact = wide.grad  # noqa: B023 -- called at once
            cosine = torch.cosine_similarity(
                grad.double().ravel(), exact.ravel(), dim=0
            )
            error = (grad - exact).norm() / exact.norm()
            rows.append([eta, name, bytes_, cosine.item(), error.item()])  # noqa: B023 -- called at once

        for storage in ("recompute", "fp32", "fp16", "bf16"):
            for backward in ("fp64", "fp32"):
                precision = ResolventPrecision(storage=storage, backward=backward)
                leaf = d.clone().requires_grad_()
                out = resolvent_diagonal(leaf, one, one, z, precision=precision)
                name = f"{storage}, backward {backward}"
                compare(name, out, leaf, precision.stored_bytes_per_site)
        for legacy in ("diagonal", "unconjugated", "hypothesis-7", "blend"):
            leaf = d.clone().requires_grad_()
            out = resolvent_diagonal_with_legacy_gradient(
                leaf, one, one, z, gradient=legacy
            )
            compare(f"legacy {legacy}", out, leaf, 8)
    table(
        "Gradient of d, N = 128, against autograd through the dense inverse",
        ["eta", "what", "bytes kept per site", "cosine", "relative L2 error"],
        rows,
    )


def cayley() -> None:
    """Measure every solver of the propagator: accuracy, then time."""
    rows: list[list[object]] = []
    psi = torch.randn(
        1024, 256, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)
    )
    for dt in (0.02, 0.1):
        for name, layer, run in _cayley_contenders(dt):
            mine = psi[:128].clone().requires_grad_()
            its = psi[:128].to(torch.complex128).requires_grad_()
            turned = reference.phase_rotation(its, layer.envelope)
            k = layer.hamiltonian.dense()
            exact = turned @ reference.cayley_unitary(k, dt / 2).T
            out = run(mine)
            upstream = torch.randn(
                128,
                256,
                dtype=torch.complex64,
                generator=torch.Generator().manual_seed(1),
            )
            layer.zero_grad()
            exact.backward(upstream.to(torch.complex128))
            edges = layer.hamiltonian.ring_weights[0].grad
            layer.zero_grad()
            out.backward(upstream)
            rhs = layer.rotated(as_planes(psi[:128]))
            planes = torch.stack((out.real, out.imag)).detach()
            rows.append(
                [
                    dt,
                    name,
                    ((out - exact).norm() / exact.norm()).item(),
                    layer.residual(rhs, planes).max().item(),
                    ((mine.grad - its.grad).norm() / its.grad.norm()).item(),
                    (
                        (layer.hamiltonian.ring_weights[0].grad - edges).norm()
                        / edges.norm()
                    ).item(),
                ]
            )
    table(
        "Accuracy, D = 256, against complex128",
        ["dt", "what", "output", "residual", "gradient psi", "gradient edges"],
        rows,
    )

    def both(run: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        upstream = torch.ones_like(psi)

        def step() -> None:
            leaf = psi.clone().requires_grad_()
            run(leaf).backward(upstream)

        return step

    contenders = _cayley_contenders(0.1)
    forward = times({name: (lambda run=run: run(psi)) for name, _, run in contenders})
    full = times({name: both(run) for name, _, run in contenders}, budget=20.0)
    table(
        "Time of the layer, 1,024 tokens, D = 256, dt 0.1",
        ["what", "forward ms", "forward + backward ms", "times explicit"],
        [[n, forward[n], full[n], full[n] / full["explicit"]] for n in full],
    )
    _large_dimension()


def _large_dimension() -> None:
    """Time explicit against iterative where a dense matrix grows heavy."""
    rows: list[list[object]] = []
    for dim, tokens in ((512, 256), (1024, 256), (1024, 1024), (2048, 256)):
        psi = torch.randn(tokens, dim, dtype=torch.complex64)
        found = times(
            {
                solver: _trained(
                    CayleyPropagator(dim, dt=0.1, solver=solver, long_range=0.1), psi
                )
                for solver in ("explicit", "iterative", "chebyshev")
            },
            repeats=3,
            budget=10.0,
        )
        ratio = found["iterative"] / found["explicit"]
        rows.append([dim, tokens, *found.values(), ratio])
    table(
        "Forward + backward, dt 0.1, ms",
        ["D", "tokens", "explicit", "iterative", "chebyshev", "iterative / explicit"],
        rows,
    )


def _trained(layer: nn.Module, psi: Tensor) -> Callable[[], Any]:
    """Return a forward and backward of a layer."""
    return lambda: layer(psi.clone().requires_grad_()).real.sum().backward()


def _cayley_contenders(
    dt: float,
) -> list[tuple[str, CayleyPropagator, Callable[[Tensor], Tensor]]]:
    """Return our solvers and the originals around the same rotation and graph."""
    found: list[tuple[str, CayleyPropagator, Callable[[Tensor], Tensor]]] = []
    for solver in ("explicit", "iterative", "chebyshev"):
        layer = CayleyPropagator(256, dt=dt, solver=solver, long_range=0)
        found.append((solver, layer, layer))
    layer = CayleyPropagator(256, dt=dt, long_range=0)

    def rotated(psi: Tensor) -> Tensor:
        power = psi.real**2 + psi.imag**2
        intensity = power / power.mean(-1, keepdim=True).clamp_min(1e-6)
        phase = torch.pi * (1 - 2 * torch.exp(-intensity))
        re = psi.real * torch.cos(phase) - psi.imag * torch.sin(phase)
        im = psi.real * torch.sin(phase) + psi.imag * torch.cos(phase)
        damping = (1 + layer.envelope.abs() * intensity**2).clamp_max(10)
        re, im = re / damping, im / damping
        stretch = power.sum(-1, keepdim=True) + 1e-8
        stretch = (stretch / ((re**2 + im**2).sum(-1, keepdim=True) + 1e-8)).sqrt()
        return torch.complex(re * stretch, im * stretch)

    def kpm(psi: Tensor) -> Tensor:
        largest = layer.hamiltonian.largest_eigenvalue_bound().item()
        h = layer.hamiltonian.dense(torch.float32)
        return damped_chebyshev(h, rotated(psi), dt / 2, 16, largest)

    def lu(psi: Tensor) -> Tensor:
        return complex_lu(layer.hamiltonian.dense(), rotated(psi), dt / 2)

    found.append(("original: Chebyshev 16 with Jackson damping", layer, kpm))
    found.append(("original: complex128 LU", layer, lu))
    return found


STORIES = {
    "overflow": overflow,
    "skew-cg": skew_cg_story,
    "resolvent": resolvent,
    "goals": goals,
    "gradients": gradients,
    "cayley": cayley,
}


def main() -> None:
    """Run the named tables, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(STORIES))
    names = parser.parse_args().names or list(STORIES)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()}"
        f" thread(s), {torch.backends.cpu.get_cpu_capability()}"
    )
    for name in names:
        if name not in STORIES:
            parser.error(f"need one of {', '.join(STORIES)}; got {name!r}")
        STORIES[name]()


if __name__ == "__main__":
    main()
