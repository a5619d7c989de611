"""Is the resolvent diagonal accurate? Against the dense inverse, gradients included.

Earlier code of this layer had a function of this name and these keys, which compared
the layer with itself: all six figures were exactly zero, and would have been for a
layer that returns nothing but zeros. Here the reference inverts the dense matrix in
complex128, and what cannot be right does not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from castwise.errors import SettingsError
from castwise.layers import reference
from castwise.layers.resolvent import resolvent_diagonal
from castwise.numerics.error import absolute_error, share_zero
from castwise.numerics.validate.plain_function import validate_function

THRESHOLD = 1e-4
"""The largest absolute error of an entry, and relative error of a gradient."""


def validate_mixed_precision_accuracy(
    batch_size: int = 8,
    seq_len: int = 128,
    num_samples: int = 100,
    device: str | torch.device = "cpu",
    *,
    candidate: Callable[..., torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the resolvent diagonal with the dense inverse on random chains.

    Chains are d = 2 * randn, b = c = 1, and z = 1j.

    Args:
        batch_size: Chains in one sample.
        seq_len: Sites of a chain; the dense inverse costs its cube.
        num_samples: How many samples are drawn.
        device: Where.
        candidate: What is validated: a function of diagonal, upper, lower and z.
            Default: `castwise.layers.resolvent.resolvent_diagonal`.
        seed: Of the chains.

    Returns:
        `max_error_{mean,std,max}` and `relative_error_{mean,std,max}` over samples,
        `gradient_error_max` (relative, of all arguments), `share_nonfinite`,
        `share_zero`, `reference`, `threshold`, and `passed` with `because`.

    Raises:
        SettingsError: A size is less than 1.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("seq_len", seq_len),
        ("num_samples", num_samples),
    ):
        if value < 1:
            raise SettingsError(f"{name} is at least 1, got {value}")
    function = candidate or _resolvent
    chains = list(_chains(batch_size, seq_len, num_samples, device, seed))
    report = validate_function(
        function, reference.resolvent_diagonal, chains, k=0.0, tolerance=THRESHOLD
    )
    with torch.no_grad():
        pairs = [
            (function(*chain), reference.resolvent_diagonal(*chain)) for chain in chains
        ]
    errors = [absolute_error(*pair) for pair in pairs]
    relative = [_largest_relative(*pair) for pair in pairs]
    reasons = list(report.faults())
    if not max(errors) < THRESHOLD:
        reasons.append(f"an entry is off by {max(errors):.3g}")
    gradients = [each.measures for each in report.results if each.name != "output"]
    return {
        **_spread("max_error", errors),
        **_spread("relative_error", relative),
        "gradient_error_max": gradients[0].relative if gradients else None,
        "share_nonfinite": report.results[0].measures.nonfinite,
        "share_zero": max(share_zero(got) for got, _ in pairs),
        "reference": "dense inverse in complex128",
        "threshold": THRESHOLD,
        "passed": not reasons,
        "because": "; ".join(reasons) or "every measure is within the threshold",
    }


def _resolvent(
    diagonal: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = resolvent_diagonal(diagonal, upper, lower, z)
    return out


def _chains(
    batch_size: int, seq_len: int, num_samples: int, device: Any, seed: int
) -> Any:
    generator = torch.Generator(device).manual_seed(seed)
    ones = torch.ones(seq_len - 1, device=device)
    z = torch.tensor(1j, device=device)
    for _ in range(num_samples):
        shape = batch_size, seq_len
        noise = torch.randn(shape, generator=generator, device=device)
        yield 2 * noise, ones, ones, z


def _largest_relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative error of a single entry."""
    return float(((got - wanted).abs() / (wanted.abs() + 1e-9)).max())


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return {
        f"{name}_mean": float(found.mean()),
        f"{name}_std": float(found.std(correction=0)),
        f"{name}_max": float(found.max()),
    }
