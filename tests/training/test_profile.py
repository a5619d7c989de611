"""A profile of a window of steps: by module, by format, and what ran too wide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

import castwise as cw
from castwise.errors import DataError, SettingsError
from castwise.training.profile import StepWindow, profile_steps
from castwise.training.trace_table import DATA, UPDATE, read_trace, span_of, table_of
from memory_models import Gpt, gpt_batch, token_loss


def trained(
    folder: Path | None, window: StepWindow, policy: cw.Policy, steps: int = 4
) -> tuple[dict[str, torch.Tensor], object]:
    """Train some steps, profiled or not; weights and profile."""
    torch.manual_seed(3)
    model, (x, y) = Gpt(width=32, depth=2), gpt_batch()
    run = cw.prepare(model, torch.optim.AdamW(model.parameters()), policy)

    def loop() -> None:
        for _ in range(steps):
            with run.step() as step:
                with record_function(span_of(DATA)):
                    batch = x.clone()
                step.backward(token_loss(model(batch), y))

    if folder is None:
        loop()
        return model.state_dict(), None
    with profile_steps(run, folder, window) as profile:
        loop()
    assert all(not m._forward_hooks for n, m in model.named_modules() if n)
    assert not run.watchers
    return model.state_dict(), profile


@pytest.mark.parametrize("preset", ["bf16-mixed", "32-true"])
def test_a_profiled_run_computes_the_same_bits(preset: str, tmp_path: Path) -> None:
    """And writes a trace, a table and the same as JSON."""
    policy = cw.preset(preset)
    window = StepWindow(first=1, num_steps=2)
    plain, _ = trained(None, window, policy)
    found, profile = trained(tmp_path / "p", window, policy)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    table = profile.table
    assert table.num_steps == 2
    assert table.step_ms > 0
    assert json.loads((tmp_path / "p/profile.json").read_text()) == json.loads(
        json.dumps(table.record())
    )
    assert (tmp_path / "p/profile.txt").read_text() == table.text() + "\n"
    assert (tmp_path / "p/trace.json.gz").stat().st_size > 1000


def test_time_and_bytes_are_told_by_module_and_format(tmp_path: Path) -> None:
    """Backward operators count for the module whose forward they undo."""
    _, profile = trained(tmp_path, StepWindow(first=1), cw.preset("bf16-mixed"))
    modules = {share.name: share for share in profile.table.modules}
    assert {"blocks.0.up", "blocks.1.qkv", "head", DATA, UPDATE} <= modules.keys()
    up = modules["blocks.0.up"]
    rows, width = 3 * 17, 32
    forward = 2 * (rows * width + width * 4 * width + 4 * width)  # bf16 x, w and bias
    assert up.read_mb * 1e6 > 2.5 * forward  # two products of the backward as well
    formats = {share.name for share in profile.table.formats}
    assert {"bf16", "fp32", "fp32->bf16", "bf16->fp32"} <= formats
    assert profile.table.num_casts > 20
    assert profile.table.data_ms > 0
    assert profile.table.wide == ()


def test_what_ran_wide_although_the_policy_says_low_is_named(tmp_path: Path) -> None:
    """A product of the user's own that switches autocast off, and no other."""
    torch.manual_seed(3)
    model, (x, y) = Gpt(width=32, depth=2), gpt_batch()
    own = model.blocks[1].up.forward

    def wide(value: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return own(value.float())

    model.blocks[1].up.forward = wide
    run = cw.prepare(
        model, torch.optim.AdamW(model.parameters()), cw.preset("bf16-mixed")
    )
    window = StepWindow(first=0, num_steps=1)
    with profile_steps(run, tmp_path, window) as profile, run.step() as step:
        step.backward(token_loss(model(x), y))
    assert profile.table is not None
    assert {each.module for each in profile.table.wide} == {"blocks.1.up"}
    assert {each.op for each in profile.table.wide} == {"addmm", "mm"}
    assert all(
        (each.format, each.promised) == ("fp32", "bf16") for each in profile.table.wide
    )
    assert "addmm of blocks.1.up: fp32 instead of bf16" in profile.table.text()


def test_a_run_that_ends_within_the_window_still_has_a_table(tmp_path: Path) -> None:
    """Of the steps that were made; one that never comes to it has none."""
    policy = cw.preset("32-true")
    _, profile = trained(tmp_path, StepWindow(first=2, num_steps=9), policy, steps=4)
    assert profile.table.num_steps == 2
    _, profile = trained(tmp_path, StepWindow(first=50), policy, steps=2)
    assert profile.table is None


def event(name: str, start: float, duration: float, **args: object) -> dict:
    """One operator of a made-up trace."""
    category = "user_annotation" if name.startswith("castwise") else "cpu_op"
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": args.pop("tid", 1),
        "ts": start,
        "dur": duration,
        "args": {key.replace("_", " "): value for key, value in args.items()},
    }


def test_self_times_nodes_and_kernels_add_up() -> None:
    """A trace of five events, worked out by hand."""
    floats = {"Input_type": ["float"], "Input_Dims": [[2, 3]]}
    events = [
        event(span_of("a"), 0, 100),
        event("aten::linear", 10, 50, Sequence_number=7, **floats),
        event("aten::addmm", 20, 30, Sequence_number=7, **floats),
        event(
            "autograd::engine::evaluate_function: AddmmBackward0",
            200,
            40,
            Sequence_number=7,
            tid=2,
        ),
        event("aten::mm", 210, 25, tid=2, **floats),
        event("aten::add", 300, 10, **floats),
    ]

    def promise(fqn: str, op: str) -> str | None:
        return "bf16" if fqn == "a" and op != "add" else None

    table = table_of(events, num_steps=1, promise=promise)
    modules = {share.name: share for share in table.modules}
    assert modules["a"].milliseconds == pytest.approx((20 + 30 + 15 + 25) / 1e3)
    assert modules["(outside)"].milliseconds == pytest.approx(0.010)
    assert modules["a"].read_mb == pytest.approx(2 * 24 / 1e6)
    assert {(each.op, each.num_calls) for each in table.wide} == {
        ("addmm", 1),
        ("mm", 1),
    }
    assert table.step_ms == pytest.approx(0.310)


@pytest.mark.parametrize("text", ["10", "a:b", "3:0", "-1:2", ""])
def test_a_window_that_is_none_is_refused(text: str) -> None:
    """The message shows how one is written."""
    with pytest.raises(SettingsError, match="--profile 10:3"):
        StepWindow.parse(text)


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    """Damaged or foreign."""
    path = tmp_path / "trace.json"
    path.write_text('{"events": []}')
    with pytest.raises(DataError, match="is no trace"):
        read_trace(path, num_steps=1)
