"""Two processes that talk over gloo, or more, for tests of what is distributed.

    def scene(rank: int, name: str) -> dict[str, Any]: ...

    def test_something(two_ranks: TwoRanks) -> None:
        zero, one = two_ranks(scene, "bf16-mixed")

The processes start at the first scene of a session and are used again, because starting
them costs seconds. A scene is a function of a test file, found there by its name; what
it returns must be plain values and tensors. Nothing can hang: whoever does not answer
in time is killed, and so are both where one of them fails.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

SECONDS = 100
"""How long a scene may take; generous, because machines may be busy."""


class TwoRanks:
    """The processes, and what they are asked to do."""

    def __init__(self, num_ranks: int = 2) -> None:
        self._num_ranks = num_ranks
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __call__(
        self, scene: Callable[..., Any], *args: Any, seconds: float = SECONDS
    ) -> tuple[Any, ...]:
        """Play a scene on all ranks; returns what they returned."""
        if not self._processes:
            self._start()
        path = scene.__code__.co_filename
        for connection in self._connections:
            connection.send((path, scene.__qualname__, args))
        try:
            return tuple(self._answers(time.monotonic() + seconds))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes, by force if need be; the next scene starts new ones."""
        for connection in self._connections:
            connection.close()  # who waits for a scene ends by that
        for process in self._processes:
            process.join(1)
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="castwise-two-ranks-")  # noqa: S306 -- gloo makes the file itself
        for rank in range(self._num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self._num_ranks, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _answers(self, deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self._num_ranks:
            for rank, connection in enumerate(self._connections):
                if rank in answers or not connection.poll(0.01):
                    continue
                fine, answer = connection.recv()
                assert fine, f"rank {rank} failed:\n{answer}"
                answers[rank] = torch.load(io.BytesIO(answer), weights_only=False)
            assert time.monotonic() < deadline, f"only ranks {list(answers)} answered"
        return [answers[rank] for rank in range(self._num_ranks)]


def _work(rank: int, num_ranks: int, store: str, connection: Connection) -> None:
    """Play scenes until there are no more."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=SECONDS),
    )
    while True:
        try:
            path, name, args = connection.recv()
        except EOFError:
            distributed.destroy_process_group()
            return
        try:
            torch.manual_seed(0)
            answer = io.BytesIO()
            torch.save(getattr(_module(path), name)(rank, *args), answer)
            connection.send((True, answer.getvalue()))
        except BaseException:  # noqa: BLE001 -- carried to the test, which fails by it
            connection.send((False, traceback.format_exc()))


def _module(path: str) -> Any:
    """The test file that a scene stands in, loaded once."""
    name = f"scenes_of_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
