from __future__ import annotations

import itertools
import random

import pytest

from castwise.graph.flow import UNLIMITED, Network


def cut_of(edges: list[tuple[int, int, int]], side: set[int]) -> int:
    """What is cut where `side` is with the source."""
    return sum(room for a, b, room in edges if a in side and b not in side)


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_cheaper(seed: int) -> None:
    """Of all cuts of a small network, none is cheaper than the one that is found."""
    draw = random.Random(seed)
    network = Network()
    vertices = [0, 1, *(network.add_vertex() for _ in range(6))]
    edges = [
        (a, b, draw.choice([1, 2, 5, 9, UNLIMITED]))
        for a, b in itertools.permutations(vertices, 2)
        if b != Network.SOURCE and a != Network.SINK and draw.random() < 0.4
    ]
    edges = [e for e in edges if e[:2] != (Network.SOURCE, Network.SINK)]
    for edge in edges:
        network.add_edge(*edge)
    found = network.source_side()
    inner = vertices[2:]
    every = (
        {
            Network.SOURCE,
            *(v for v, inside in zip(inner, chosen, strict=True) if inside),
        }
        for chosen in itertools.product((False, True), repeat=len(inner))
    )
    assert Network.SOURCE in found
    assert Network.SINK not in found
    assert cut_of(edges, found) == min(cut_of(edges, side) for side in every)
