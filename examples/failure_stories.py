"""Two failures that were blamed on low precision, as targets for `castwise diagnose`.

    castwise diagnose examples/failure_stories.py:unitary_steps --limit 0.01
    castwise diagnose examples/failure_stories.py:determinants --preset 32-true

In the first a unitary step was solved by conjugate gradients and the norm grew by nine
orders of magnitude; bf16 was blamed. In the second the diagonal of an inverse came out
as zero; "FP16" was blamed, which stood for complex64. docs/diagnose.md tells both.
"""

import torch
from torch import nn


def ring_laplacian(width: int, reach: int, generator: torch.Generator) -> torch.Tensor:
    """L = Deg - Adj of a ring whose edges reach that far and weigh about 0.7."""
    adjacency = torch.zeros(width, width)
    places = torch.arange(width)
    for offset in range(1, reach + 1):
        weights = nn.functional.softplus(0.1 * torch.randn(width, generator=generator))
        adjacency[places, (places + offset) % width] += weights
        adjacency[(places + offset) % width, places] += weights
    return torch.diag(adjacency.sum(1)) - adjacency


class UnitarySteps(nn.Module):
    """16 steps of (I + i d H) out = (I - i d H) psi, solved as the original did.

    On the real block of I + i d H, which is I plus something skew, p.Ap is p.p for
    every p, so that plain conjugate gradients take steps that mean nothing.
    """

    def __init__(
        self, width: int = 256, num_layers: int = 16, num_iterations: int = 3
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(42)
        scales = [ring_laplacian(width, 4 * 2**s, generator) for s in range(3)]
        self.hamiltonian = nn.Parameter(torch.stack(scales).mean(0))
        self.half_step = 0.05
        self.num_layers, self.num_iterations = num_layers, num_iterations

    def forward(self, psi: torch.Tensor) -> torch.Tensor:
        """Take all steps. psi: [tokens, 2, width], real and imaginary part."""
        for _ in range(self.num_layers):
            psi = self.solve(psi - self.times_i(psi))
        return psi

    def times_i(self, psi: torch.Tensor) -> torch.Tensor:
        """I d H psi for real and imaginary part."""
        real, imaginary = (psi @ (self.half_step * self.hamiltonian)).unbind(-2)
        return torch.stack([-imaginary, real], -2)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Run plain conjugate gradients, a fixed number of iterations."""
        x = torch.zeros_like(right)
        residual = right
        direction, square = residual, residual.square().sum((-2, -1), keepdim=True)
        for _ in range(self.num_iterations):
            image = direction + self.times_i(direction)
            curvature = (direction * image).sum((-2, -1), keepdim=True)
            step = square / (curvature + 1e-12)
            x = x + step * direction
            residual = residual - step * image
            next_square = residual.square().sum((-2, -1), keepdim=True)
            direction = residual + next_square / (square + 1e-12) * direction
            square = next_square
        return x


def norm_deviation(out: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
    """How far a step is from unitary: 0 for one that is."""
    ratio = out.square().sum((-2, -1)) / psi.square().sum((-2, -1))
    return (ratio - 1).abs().mean()


def unitary_steps(
    num_iterations: int = 3, width: int = 256
) -> tuple[UnitarySteps, list[tuple[torch.Tensor, torch.Tensor]], object]:
    """Return the first story: model, batches, and the deviation as the loss."""
    psi = torch.randn(8, 2, width, generator=torch.Generator().manual_seed(0))
    model = UnitarySteps(width, num_iterations=num_iterations)
    return model, [(psi, psi)], norm_deviation


class Determinants(nn.Module):
    """Diagonal of (T - z I)^-1 by products of determinants that are never rescaled."""

    def forward(self, diagonal: torch.Tensor) -> torch.Tensor:
        """G_i = theta_i phi_i / theta_N for couplings of 1 and z = 1j, as (re, im)."""
        a = torch.complex(diagonal, -torch.ones_like(diagonal))
        num_sites = a.shape[-1]
        theta = [torch.ones_like(a[..., 0]), a[..., 0]]
        phi = [torch.ones_like(a[..., 0]), a[..., -1]]
        for i in range(1, num_sites):
            theta.append(a[..., i] * theta[i] - theta[i - 1])
            phi.append(a[..., num_sites - 1 - i] * phi[i] - phi[i - 1])
        entries = [
            theta[i] * phi[num_sites - 1 - i] / theta[num_sites]
            for i in range(num_sites)
        ]
        g = torch.view_as_real(torch.stack(entries, -1))
        return torch.where(torch.isfinite(g), g, torch.zeros_like(g))


def determinants(
    num_sites: int = 128,
) -> tuple[Determinants, list[tuple[torch.Tensor, torch.Tensor]], object]:
    """Return the second story: model, batches, loss."""
    generator = torch.Generator().manual_seed(0)
    diagonal = 2 * torch.randn(8, num_sites, generator=generator)
    target = torch.zeros(8, num_sites, 2)
    return Determinants(), [(diagonal, target)], nn.functional.mse_loss


def determinants_of_a_long_chain() -> tuple[
    Determinants, list[tuple[torch.Tensor, torch.Tensor]], object
]:
    """Return the second story at 1024 sites, where float64 overflows as well."""
    return determinants(1024)
