"""Draw the next batches while this one is computed.

A batch of this house is a pure function of its step and of what is in force when it is
drawn (stages of a curriculum, say). So a thread may draw it early, and nobody can tell:
what was drawn for another state of things is thrown away, and what was not drawn yet is
drawn at once. There is nothing to save and nothing to restore, and a resumed run draws
the same batches as one that was never stopped.

    draws = Prefetch(draw, num_steps=1000, depth=2)
    batch = draws.batch(step, key)       # draw(step, key), while step + 1 is begun

Threads help where the trainer waits for a device, because it sleeps then. On a CPU
whose cores all compute nothing is won: `depth=0` draws in the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, final

from castwise.errors import SettingsError

Batch = TypeVar("Batch")
Key = TypeVar("Key", bound=Hashable)


@final
class Prefetch(Generic[Key, Batch]):
    """Batches by step and key, the next ones begun ahead of time.

    Args:
        draw: Makes the batch of a step under a key, in any thread and any order.
        num_steps: Steps of the run; nothing is drawn behind them.
        depth: Batches that are drawn ahead; 0 for none.
        num_workers: Threads that draw. Default: 1.

    Threads end with this object.

    Raises:
        SettingsError: A depth below 0, or no thread to draw with.
    """

    def __init__(
        self,
        draw: Callable[[int, Key], Batch],
        *,
        num_steps: int,
        depth: int,
        num_workers: int = 1,
    ) -> None:
        if depth < 0 or num_workers < 1:
            raise SettingsError(
                f"prefetching needs a depth of at least 0 and a thread, got depth "
                f"{depth} and {num_workers} threads; draw with depth 0 for none ahead"
            )
        self._draw = draw
        self._num_steps = num_steps
        self._depth = depth
        self._pool = ThreadPoolExecutor(num_workers, "prefetch") if depth else None
        self._begun: dict[tuple[int, Key], Future[Batch]] = {}

    def batch(self, step: int, key: Key) -> Batch:
        """Return the batch of a step, and begin the ones behind it.

        Raises:
            Exception: What `draw` raised for this step, in whichever thread.
        """
        if self._pool is None:
            return self._draw(step, key)
        begun = self._begun.pop((step, key), None)
        wanted = [
            (later, key)
            for later in range(step + 1, step + 1 + self._depth)
            if later < self._num_steps
        ]
        for stale in self._begun.keys() - set(wanted):
            self._begun.pop(stale).cancel()
        for each in wanted:
            if each not in self._begun:
                self._begun[each] = self._pool.submit(self._draw, *each)
        return self._draw(step, key) if begun is None else begun.result()
