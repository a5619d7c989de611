"""The originals: dense, slow, plain, in float64 and complex128.

Everything fast in this folder must agree with this room in outputs and in gradients.
So this room imports none of its neighbours, uses no trick, and forms the matrices that
the fast rooms avoid. Gradients come from autograd through these very lines.

    resolvent   G = (T - z I)^-1 for tridiagonal T, and its diagonal
    Cayley      U = (I + i K)^-1 (I - i K),  K = half_step * H,  H a graph Laplacian
    rotation    psi -> s * psi * exp(i phi(I)) / envelope(I), norm of each token kept
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tridiagonal(diagonal: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Form the dense matrix T with T[i, i+1] = upper[i] and T[i+1, i] = lower[i]."""
    return (
        torch.diag_embed(diagonal)
        + torch.diag_embed(upper.expand(*diagonal.shape[:-1], -1), offset=1)
        + torch.diag_embed(lower.expand(*diagonal.shape[:-1], -1), offset=-1)
    )


def resolvent_diagonal(
    diagonal: Tensor, upper: Tensor, lower: Tensor, z: Tensor
) -> Tensor:
    """Compute diag((T - z I)^-1) by inverting the dense matrix in complex128.

    Args:
        diagonal: `[..., N]`, real or complex.
        upper: couplings of site i to i+1, broadcastable to `[..., N-1]`.
        lower: couplings of site i+1 to i, broadcastable to `[..., N-1]`.
        z: complex, a scalar or broadcastable to `[...]`.

    Returns:
        `[..., N]` complex128.
    """
    num_sites = diagonal.shape[-1]
    if num_sites == 0:
        return diagonal.to(torch.complex128)
    wide = [part.to(torch.complex128) for part in (diagonal, upper, lower)]
    eye = torch.eye(num_sites, dtype=torch.complex128, device=diagonal.device)
    matrix = tridiagonal(*wide) - z.to(torch.complex128)[..., None, None] * eye
    inverse: Tensor = torch.linalg.inv(matrix)
    return inverse.diagonal(dim1=-2, dim2=-1)


def causal_resolvent_diagonal(
    diagonal: Tensor, upper: Tensor, lower: Tensor, z: Tensor
) -> Tensor:
    """Compute, for each site, the last resolvent entry of the chain that ends there."""
    entries = [
        resolvent_diagonal(
            diagonal[..., : end + 1], upper[..., :end], lower[..., :end], z
        )[..., -1]
        for end in range(diagonal.shape[-1])
    ]
    if not entries:
        return diagonal.to(torch.complex128)
    return torch.stack(entries, dim=-1)


def graph_laplacian(num_sites: int, edges: Tensor, weights: Tensor) -> Tensor:
    """Form Deg - Adj in float64, one edge at a time.

    Args:
        num_sites: number of sites D.
        edges: `[2, E]` integer pairs, each undirected edge once.
        weights: `[E]`, positive.
    """
    matrix = torch.zeros(num_sites, num_sites, dtype=torch.float64)
    for (i, j), weight in zip(edges.T.tolist(), weights.double(), strict=True):
        part = torch.zeros_like(matrix)
        part[i, i] = part[j, j] = 1.0
        part[i, j] = part[j, i] = -1.0
        matrix = matrix + weight * part
    return matrix


def cayley_unitary(hamiltonian: Tensor, half_step: float) -> Tensor:
    """Form U = (I + i K)^-1 (I - i K) with K = half_step * hamiltonian, complex128."""
    scaled = half_step * hamiltonian.double()
    eye = torch.eye(len(scaled), dtype=torch.complex128, device=scaled.device)
    unitary: Tensor = torch.linalg.solve(eye + 1j * scaled, eye - 1j * scaled)
    return unitary


def phase_rotation(
    psi: Tensor, envelope: Tensor, *, sharpness: float = 1.0, floor: float = 1e-6
) -> Tensor:
    """Rotate each site by a phase of its intensity, damp peaks, keep the token norm.

    Args:
        psi: `[..., D]` complex.
        envelope: `[D]` real, strength of the damping.
        sharpness: rate at which the phase turns with intensity.
        floor: least mean intensity that a token is normalised by.
    """
    psi = psi.to(torch.complex128)
    power = psi.real**2 + psi.imag**2
    intensity = power / power.mean(-1, keepdim=True).clamp_min(floor)
    phase = math.pi * (1 - 2 * torch.exp(-sharpness * intensity))
    damping = (1 + envelope.double().abs() * intensity**2).clamp_max(10.0)
    shaped = psi * torch.polar(1 / damping, phase)
    norm = (shaped.real**2 + shaped.imag**2).sum(-1, keepdim=True)
    stretch = torch.where(norm > 0, power.sum(-1, keepdim=True) / norm, 1.0).sqrt()
    return shaped * stretch
