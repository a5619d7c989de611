import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castwise.errors import SettingsError
from castwise.memory import monitor as room
from castwise.memory.monitor import MemoryMonitor, steady_allocator

MB = 10**6


@pytest.fixture
def monitor() -> MemoryMonitor:
    """A monitor of this process, whose peak the kernel can reset."""
    found = MemoryMonitor("cpu")
    if not found.resettable:
        pytest.skip("the kernel does not let this process reset its peak")
    return found


def spike() -> None:
    """Hold 200 MB for a moment; every page is written."""
    torch.ones(50 * 10**6, dtype=torch.float32)


def test_a_planted_spike_is_seen_in_its_epoch_and_gone_in_the_next(
    monitor: MemoryMonitor,
) -> None:
    """200 MB in the second of three epochs."""
    for epoch in (1, 2, 3):
        with monitor.span(f"epoch {epoch}"):
            if epoch == 2:
                spike()
    first, second, third = monitor.readings
    assert second.peak_bytes >= first.peak_bytes + 190 * MB
    assert abs(third.peak_bytes - first.peak_bytes) <= 20 * MB
    assert second.now_bytes <= first.now_bytes + 20 * MB
    assert [reading.name for reading in monitor.readings] == [
        "epoch 1",
        "epoch 2",
        "epoch 3",
    ]
    assert all(reading.resettable for reading in monitor.readings)


def test_the_outer_span_keeps_the_peak_of_what_runs_within(
    monitor: MemoryMonitor,
) -> None:
    """Neither an inner span nor a reset makes the outer one forget."""
    with monitor.span("run"):
        before = monitor.now_bytes()
        spike()
        monitor.reset_peak()
        assert monitor.peak_bytes() <= before + 20 * MB
        with monitor.span("quiet"):
            pass
    quiet, run = monitor.readings
    assert run.peak_bytes >= before + 190 * MB
    assert quiet.peak_bytes <= before + 20 * MB


def test_a_span_that_fails_is_still_read(monitor: MemoryMonitor) -> None:
    """The reading of the step that ran out of memory is the one that matters."""
    with pytest.raises(RuntimeError), monitor.span("broken"):
        raise RuntimeError
    with monitor.span("after"):
        pass
    assert [reading.name for reading in monitor.readings] == ["broken", "after"]


class Glutton(torch.nn.Module):
    """Holds 200 MB for a moment, as no other module of its net does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what came."""
        spike()
        return x


def test_the_module_that_takes_the_memory_is_told_apart(monitor: MemoryMonitor) -> None:
    """By the peak of its own forward, and of those that hold it; hooks go away."""
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3), Glutton())
    net = torch.nn.Sequential(inner, torch.nn.Linear(3, 3))
    before = monitor.now_bytes()
    with monitor.modules(net):
        net(torch.ones(2, 3)).sum().backward()
    net(torch.ones(2, 3))
    peaks = {each.name: each.peak_bytes - before for each in monitor.readings}
    assert list(peaks) == ["0.0", "0.1", "0", "1", "(model)"]
    assert {name for name, peak in peaks.items() if peak >= 190 * MB} == {
        "0.1",
        "0",
        "(model)",
    }
    assert max(peaks["0.0"], peaks["1"]) <= 20 * MB


def test_a_module_that_fails_closes_its_span(monitor: MemoryMonitor) -> None:
    """And those around it, so that later spans are not inside of them."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(4, 4))
    with pytest.raises(RuntimeError), monitor.modules(net):
        net(torch.ones(2, 3))
    with monitor.span("after"):
        pass
    names = [reading.name for reading in monitor.readings]
    assert names == ["0", "1", "(model)", "after"]


def test_what_is_held_counts_as_now(monitor: MemoryMonitor) -> None:
    """Now follows a tensor that stays, and falls when it goes."""
    before = monitor.now_bytes()
    held = torch.ones(25 * 10**6)
    assert monitor.now_bytes() >= before + 95 * MB
    del held
    assert monitor.now_bytes() <= before + 10 * MB


def test_without_clear_refs_the_reading_says_that_its_peak_never_falls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A closed door is flagged, not hidden."""
    monkeypatch.setattr(room, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    closed = MemoryMonitor("cpu")
    assert not closed.resettable
    assert "never falls" in closed.source.because
    with closed.span("all"):
        spike()
    with closed.span("after"):
        pass
    assert closed.readings[1].peak_bytes >= closed.readings[1].now_bytes + 150 * MB
    assert not closed.readings[1].resettable
    monkeypatch.setattr(room, "_STATUS", tmp_path / "missing")
    assert closed.now_bytes() == closed.peak_bytes() > 0


CHURN = """
import sys, torch
from castwise.memory.monitor import MemoryMonitor, steady_allocator
if sys.argv[1] == "steady":
    assert steady_allocator().value
monitor = MemoryMonitor()
before = monitor.now_bytes()
pins = []
for _ in range(3):   # blocks below 32 MiB, with small ones that pin the heap between
    blocks = []
    for _ in range(20):
        blocks.append(torch.ones(2**21))
        pins.append(torch.ones(2**14))
    del blocks
print((monitor.now_bytes() - before) // 10**6)
"""


def test_the_steady_allocator_gives_freed_blocks_back() -> None:
    """160 MB in blocks of 8 MB: without it most of them stay resident."""

    def left(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CHURN, how],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(done.stdout)

    assert left("steady") <= 16
    assert left("plain") >= 60  # else glibc has changed and the fix is not needed


def test_an_unknown_device_is_refused() -> None:
    """No figure is better than a wrong one."""
    with pytest.raises(SettingsError, match="needs a cpu or cuda device, got meta"):
        MemoryMonitor("meta")
    assert "128 KiB" in steady_allocator().because


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_planted_spike_on_cuda_is_seen_in_its_epoch_and_gone_in_the_next() -> None:
    """The allocator's statistics, exact to its rounding."""
    monitor = MemoryMonitor("cuda")
    assert monitor.resettable
    held = torch.ones(10**6, device="cuda")
    for epoch in (1, 2, 3):
        with monitor.span(f"epoch {epoch}"):
            if epoch == 2:
                torch.ones(50 * 10**6, device="cuda")
    first, second, third = (reading.peak_bytes for reading in monitor.readings)
    assert first == third >= held.nbytes
    assert 200 * MB <= second - first <= 203 * MB
