"""A learned graph Laplacian over the channels, at several scales.

    H = sum_s softmax(mix)_s L_s,    L_s = Deg - Adj,   Adj_ij = softplus(weight) > 0

Each scale is a ring that couples every channel to its next neighbours, twice as far at
every scale; long-range edges make it a small world (Watts and Strogatz 1998). H is
real, symmetric, positive semi-definite, H 1 = 0, and its spectrum lies below twice the
largest degree (Gershgorin). No edge joins a channel with itself, and no long-range edge
repeats a ring, however few channels there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from castwise.errors import SettingsError


class GraphHamiltonian(nn.Module):
    """The Laplacian, as a dense matrix or as a product with vectors.

    Args:
        num_sites: number of channels D, at least 3.
        sparsity: neighbours of a channel on the first ring, both sides together.
        num_scales: number of rings; ring s reaches 2^s times as far.
        long_range: long-range edges per channel.
        seed: of the weights and the long-range edges.
    """

    pairs: Tensor

    def __init__(
        self,
        num_sites: int,
        *,
        sparsity: int = 6,
        num_scales: int = 3,
        long_range: float = 0.5,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if num_sites < 3 or sparsity < 2 or num_scales < 1 or long_range < 0:
            raise SettingsError(
                "GraphHamiltonian needs num_sites >= 3, sparsity >= 2, num_scales >= 1"
                f" and long_range >= 0; got {num_sites}, {sparsity}, {num_scales},"
                f" {long_range}."
            )
        self.num_sites = num_sites
        generator = torch.Generator().manual_seed(seed)
        reach = [
            min(sparsity // 2 * 2**scale, (num_sites - 1) // 2)
            for scale in range(num_scales)
        ]
        self.ring_weights = nn.ParameterList(
            nn.Parameter(0.1 * torch.randn(offsets, num_sites, generator=generator))
            for offsets in reach
        )
        pairs = long_range_pairs(
            num_sites, max(reach), round(long_range * num_sites), generator
        )
        self.register_buffer("pairs", pairs)
        self.pair_weights = nn.Parameter(
            0.1 * torch.randn(pairs.shape[1], generator=generator)
        )
        self.mix = nn.Parameter(torch.zeros(num_scales))

    def edge_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return positive weights: of the rings `[offset - 1, D]`, of the pairs `[E]`.

        Entry `[o - 1, i]` couples channel i with channel i + o, modulo D.
        """
        mix = torch.softmax(self.mix.to(dtype), 0)
        widest = max(len(ring) for ring in self.ring_weights)
        rings = torch.zeros(widest, self.num_sites, dtype=dtype, device=mix.device)
        for share, ring in zip(mix, self.ring_weights, strict=True):
            weighted = share * softplus(ring.to(dtype))
            rings = rings + nn.functional.pad(weighted, (0, 0, 0, widest - len(ring)))
        return rings, mix[0] * softplus(self.pair_weights.to(dtype))

    def edges(self) -> Tensor:
        """Return `[2, E]`: ring edges in the order of their weights, then pairs."""
        widest = max(len(ring) for ring in self.ring_weights)
        site = torch.arange(self.num_sites, device=self.pairs.device)
        offset = torch.arange(1, widest + 1, device=self.pairs.device)
        far = (site + offset[:, None]) % self.num_sites
        ring = torch.stack((site.expand_as(far).flatten(), far.flatten()))
        return torch.cat((ring, self.pairs), dim=1)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Form H `[D, D]`, differentiable in every weight."""
        rings, pairs = self.edge_weights(dtype)
        weights = torch.cat((rings.flatten(), pairs))
        i, j = self.edges()
        size = self.num_sites
        off = torch.zeros(size * size, dtype=dtype, device=weights.device)
        off = off.index_add(0, i * size + j, weights).view(size, size)
        adjacency = off + off.T
        return torch.diag(adjacency.sum(0)) - adjacency

    def largest_eigenvalue_bound(self) -> Tensor:
        """Return twice the largest degree, a bound on every eigenvalue (Gershgorin)."""
        with torch.no_grad():
            rings, pairs = self.edge_weights(torch.float64)
            ones = torch.arange(1, len(rings) + 1, device=rings.device)
            site = torch.arange(self.num_sites, device=rings.device)
            behind = (site - ones[:, None]) % self.num_sites
            degree = (rings + rings.gather(1, behind)).sum(0)
            for end in self.pairs:
                degree = degree.index_add(0, end, pairs)
            return 2 * degree.max()


def long_range_pairs(
    num_sites: int, reach: int, count: int, generator: torch.Generator
) -> Tensor:
    """Draw distinct pairs of channels that the ring of this reach does not join."""
    i, j = torch.triu_indices(num_sites, num_sites, offset=1)
    apart = torch.minimum(j - i, num_sites - (j - i)) > reach
    candidates = torch.stack((i[apart], j[apart]))
    chosen = torch.randperm(candidates.shape[1], generator=generator)[:count]
    return candidates[:, chosen.sort().values]


def apply_laplacian(
    x: Tensor, rings: Tensor, pair_weights: Tensor, pairs: Tensor
) -> Tensor:
    """Compute H x along the last dimension from flows through the edges.

    What leaves one channel enters another, so that H 1 = 0 and the sum of H x is zero
    to rounding. Work is O(D) per offset: for channels by the thousand.
    """
    total = torch.zeros_like(x)
    for offset, weights in enumerate(rings, start=1):
        flow = weights * (x - x.roll(-offset, -1))
        total = total + flow - flow.roll(offset, -1)
    if pairs.shape[1]:
        flow = pair_weights * (x[..., pairs[0]] - x[..., pairs[1]])
        total = total.index_add(-1, pairs[0], flow)
        total = total.index_add(-1, pairs[1], -flow)
    return total
