"""The cheapest cut between two sides of a network: Dinic's algorithm.

E. A. Dinic, 1970: find all shortest ways from the source to the sink that have room
left, fill them, and begin again. When no way is left, what the source still reaches is
its side of a cheapest cut.
"""

from __future__ import annotations

from collections import deque

UNLIMITED = 1 << 60
"""The capacity of an edge that is never cut."""


class Network:
    """A directed network with capacities, a source and a sink."""

    SOURCE, SINK = 0, 1

    def __init__(self) -> None:
        self._to: list[int] = []
        self._room: list[int] = []
        self._edges: list[list[int]] = [[], []]

    def add_vertex(self) -> int:
        """Add a vertex and return its number."""
        self._edges.append([])
        return len(self._edges) - 1

    def add_edge(self, start: int, end: int, capacity: int) -> None:
        """Add an edge; it is cut where its start is with the source, its end not."""
        for vertex, to, room in ((start, end, capacity), (end, start, 0)):
            self._edges[vertex].append(len(self._to))
            self._to.append(to)
            self._room.append(room)

    def source_side(self) -> set[int]:
        """The vertices on the source's side of a cheapest cut."""
        while True:
            levels = self._levels()
            if levels[self.SINK] < 0:
                return {vertex for vertex, level in enumerate(levels) if level >= 0}
            self._fill(levels)

    def _levels(self) -> list[int]:
        """How many edges with room lead from the source to each vertex; -1: none."""
        levels = [-1] * len(self._edges)
        levels[self.SOURCE] = 0
        waiting = deque([self.SOURCE])
        while waiting:
            vertex = waiting.popleft()
            for edge in self._edges[vertex]:
                to = self._to[edge]
                if self._room[edge] and levels[to] < 0:
                    levels[to] = levels[vertex] + 1
                    waiting.append(to)
        return levels

    def _fill(self, levels: list[int]) -> None:
        """Fill every way that goes one level up with each edge."""
        at = [0] * len(self._edges)
        way: list[int] = []
        vertex = self.SOURCE
        while True:
            if vertex == self.SINK:
                least = min(self._room[edge] for edge in way)
                for edge in way:
                    self._room[edge] -= least
                    self._room[edge ^ 1] += least
                way.clear()
                vertex = self.SOURCE
                continue
            onward = self._next_edge(vertex, levels, at)
            if onward is not None:
                way.append(onward)
                vertex = self._to[onward]
            elif way:  # a dead end: step back, and never come here again
                levels[vertex] = -1
                vertex = self._to[way.pop() ^ 1]
            else:
                return

    def _next_edge(self, vertex: int, levels: list[int], at: list[int]) -> int | None:
        edges = self._edges[vertex]
        while at[vertex] < len(edges):
            edge = edges[at[vertex]]
            if self._room[edge] and levels[self._to[edge]] == levels[vertex] + 1:
                return edge
            at[vertex] += 1
        return None
