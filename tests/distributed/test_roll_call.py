"""Who is there, and whether all mean the same; without any process group."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed import HashStore

import castwise as cw
from castwise.distributed.roll_call import RollCall, credentials, first_difference
from castwise.errors import RanksError, SettingsError
from shared_net import net, policy_of


def told_by(model: nn.Module, name: str = "bf16-mixed fp32", **settings: Any) -> Any:
    """The credentials of a rank."""
    return credentials(model, policy_of(name), settings=settings)


def play(told: list[Any], num_ranks: int, timeout: float = 20.0) -> list[str]:
    """Let threads be ranks; what each of them ended with."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=timeout))
    ended = ["hung"] * len(told)

    def rank_of(rank: int) -> None:
        call = RollCall(store=store, rank=rank, num_ranks=num_ranks, timeout=timeout)
        try:
            call.meet()
            call.agree(told[rank])
        except RanksError as error:
            ended[rank] = str(error)
        else:
            ended[rank] = "fine"

    threads = [threading.Thread(target=rank_of, args=(r,)) for r in range(len(told))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    return ended


def test_ranks_that_mean_the_same_go_on() -> None:
    """Also where they have other weights: DDP sends those of rank 0 round."""
    assert play([told_by(net(), batch_size=64) for _ in range(3)], 3) == ["fine"] * 3


def test_the_rank_that_differs_is_named_once() -> None:
    """Rank 0 says which and in what; the others refer to it, and all end."""
    usual = told_by(net())
    ended = play([usual, usual, told_by(net(), "16-mixed fp32")], 3)
    assert "rank 2 and rank 0 must have the same policy" in ended[0]
    assert "c=fp16" in ended[0]
    assert "c=bf16" in ended[0]
    assert (
        ended[1:] == ["rank 0 says in what the ranks differ; this rank stops too"] * 2
    )


def test_every_kind_of_difference_is_told() -> None:
    """Versions, settings, weights and buffers by their lines; most ranks are right."""
    usual = told_by(net(), batch_size=64)
    wide, bare = net(), net()
    wide.leave.double()
    del bare.blocks[1].table
    older = {**usual, "versions": ["castwise 0.0.9", *usual["versions"][1:]]}
    cases = {
        "versions: rank 0 has 'castwise 0.0.9'": older,
        "settings: rank 0 has 'batch_size = 32'": told_by(net(), batch_size=32),
        "weights: rank 0 has 'leave.weight float64 (3, 7)'": told_by(
            wide, batch_size=64
        ),
        "buffers: rank 0 has 'nothing'": told_by(bare, batch_size=64),
    }
    for expected, odd in cases.items():
        found = first_difference([odd, usual, usual, odd | {"more": []}])
        assert found is not None
        assert expected.split(": ", 1)[1] in found
        assert f"the same {expected.split(':')[0]}" in found
    assert first_difference([usual, usual]) is None
    assert json.loads(json.dumps(usual)) == usual


def test_missing_ranks_are_named_in_time() -> None:
    """Two of four came; nobody waits longer than the timeout."""
    started = time.monotonic()
    ended = play([told_by(net())] * 2, 4, timeout=0.5)
    assert time.monotonic() - started < 20
    assert "ranks 2, 3 are missing" in ended[0]
    assert "within 0.5 s" in ended[0]
    assert ended[1] == "rank 0 says which ranks are missing; this rank stops too"


SCRIPT = """
import sys
import castwise as cw
from castwise.distributed.roll_call import RollCall, credentials
from torch import distributed, nn
try:
    call = RollCall.by_environment(timeout=float(sys.argv[1]))
    call.meet()
    policy = cw.preset(sys.argv[2])
    call.agree(credentials(nn.Linear(3, 2), policy))
    distributed.init_process_group(
        "gloo", store=call.store, rank=call.rank, world_size=call.num_ranks)
    distributed.barrier()
    distributed.destroy_process_group()
except cw.CastwiseError as error:
    sys.exit(f"told: {error}")
"""


def launch(tmp_path: Path, presets: dict[int, str], timeout: float) -> dict[int, str]:
    """Start ranks of three as programs of their own; what they said, and how ended."""
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    running = {
        rank: subprocess.Popen(
            [sys.executable, str(script), str(timeout), name],
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in presets.items()
    }
    try:
        said = {
            rank: each.communicate(timeout=100)[1] for rank, each in running.items()
        }
    finally:
        for each in running.values():
            each.kill()
    return {
        rank: f"{running[rank].returncode}: "
        + next((line for line in text.splitlines() if "told:" in line), "")
        for rank, text in said.items()
    }


def test_processes_that_differ_end_together(tmp_path: Path) -> None:
    """Over sockets: the store outlives rank 0's answer, and nobody hangs."""
    names = {0: "bf16-mixed", 1: "bf16-mixed", 2: "16-mixed"}
    ended = launch(tmp_path, names, 60)
    assert ended[0].startswith("1: told: rank 2 and rank 0 must have the same policy")
    assert ended[1] == ended[2]
    assert ended[1].startswith("1: told: rank 0 says in what")


@pytest.mark.slow
def test_processes_without_one_of_them_end_in_time(tmp_path: Path) -> None:
    """Rank 1 never starts; and where all start, a process group follows."""
    ended = launch(tmp_path, {0: "bf16-mixed", 2: "bf16-mixed"}, 15)
    assert "rank 1 is missing" in ended[0]
    assert ended[2].startswith("1: told: rank 0 says which")
    fine = launch(tmp_path, dict.fromkeys(range(3), "bf16-mixed"), 60)
    assert fine == dict.fromkeys(range(3), "0: ")


def test_settings_that_mean_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks outside of the world, no time, no environment."""
    call = RollCall(store=HashStore(), rank=0, num_ranks=1)
    for change in ({"rank": 1}, {"rank": -1}, {"timeout": 0.0}):
        with pytest.raises(SettingsError, match="roll call needs"):
            replace(call, **change)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SettingsError, match="MASTER_ADDR"):
        RollCall.by_environment()
    assert cw.preset("bf16-mixed").to_yaml() == cw.preset("bf16-mixed").to_yaml()
