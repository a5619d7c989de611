"""The recipe's curricula: defaults, files, what they draw, and resuming in a stage."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castwise.checkpoints import load_checkpoint
from castwise.errors import CastwiseError, SettingsError
from castwise.recipes.kenken.curricula import (
    curriculum_of,
    default_text,
    mixture_in_force,
    parse_curriculum,
)
from castwise.recipes.kenken.settings import PRESETS, settings_of
from castwise.recipes.kenken.task import mixture_of
from castwise.training.journal import read_journal

TINY = settings_of("tiny", {})
FILE = """
castwise: 1
dimensions:
  mode:
    stages:
    - {name: plain, modes: {standard: 1}, advance: epoch >= 1}
    - {name: all, modes: {standard: 1, zero: 1, negative: 2}, rehearsal: 0.2}
"""


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_default_curriculum_of_every_preset_reads_and_ends_at_the_run(
    preset: str,
) -> None:
    """Its last stages are the settings of the run, and nothing is left out."""
    settings = settings_of(preset, {"walked": ("size", "mode", "fill")})
    curriculum = curriculum_of(settings)
    plain = mixture_of(settings)
    for step in range(100):
        curriculum.observe(step, {"stage_solved": 1.0})
    last = mixture_in_force(plain, curriculum)
    assert dict(zip(last.sizes, last.size_shares, strict=True)) == pytest.approx(
        dict(zip(plain.sizes, plain.size_shares, strict=True))
    )
    assert set(last.modes) == set(plain.modes)
    assert last.fills == plain.fills


def test_without_a_flag_nothing_is_walked() -> None:
    """The user's own settings stay in force."""
    curriculum = curriculum_of(TINY)
    assert not curriculum.dimensions
    assert mixture_in_force(mixture_of(TINY), curriculum) == mixture_of(TINY)


def test_one_dimension_alone_leaves_the_others_as_the_user_set_them() -> None:
    """In earlier code a disabled dimension jumped to its hardest stage."""
    settings = settings_of("tiny", {"walked": ("mode",)})
    mixture = mixture_in_force(mixture_of(settings), curriculum_of(settings))
    assert [str(mode) for mode in mixture.modes] == ["standard"]
    assert mixture.fills == mixture_of(settings).fills
    assert mixture.sizes == mixture_of(settings).sizes


def test_rehearsal_blends_the_stages() -> None:
    """Shares are those of the stages, weighed; they sum to one."""
    curriculum = parse_curriculum(FILE, TINY)
    curriculum.observe(1, {})
    mixture = mixture_in_force(mixture_of(TINY), curriculum)
    shares = {
        str(mode): share
        for mode, share in zip(mixture.modes, mixture.mode_shares, strict=True)
    }
    assert shares == pytest.approx({"standard": 0.4, "zero": 0.2, "negative": 0.4})


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("castwise: 1", "castwise: 2", "need castwise: 1, got 2"),
        ("modes: {standard: 1}", "modes: {standart: 1}", "did you mean standard"),
        ("modes: {standard: 1}", "modes: {}", "needs items and weights"),
        ("modes: {standard: 1}", "modes: {standard: -1}", "needs items and weights"),
        ("advance: epoch", "advance: solvd", "no measure solvd"),
        ("advance: epoch >= 1", "advance: epoch", "one of >= <= > <"),
        ("advance: epoch >= 1", "min_epochs: 1", "would never end"),
        ("rehearsal: 0.2", "rehearsal: 1.2", "rehearsal needs a share"),
        ("rehearsal: 0.2", "rehearsal: much", "rehearsal needs a number"),
        ("rehearsal: 0.2", "sizes: {3: 1}", "unknown key sizes"),
        ("  mode:", "  modes:", "unknown key modes .did you mean mode"),
        ("dimensions:\n", "dimensions: [\n", "no YAML"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(
    before: str, after: str, says: str
) -> None:
    """Before the first step, in one sentence."""
    assert before in FILE
    with pytest.raises(SettingsError, match=says) as caught:
        parse_curriculum(FILE.replace(before, after), TINY, where="mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_stage_may_only_name_what_the_run_has() -> None:
    """Sizes come with --sizes: their puzzles must be made."""
    text = "castwise: 1\ndimensions: {size: {stages: [{sizes: [3, 9]}]}}"
    with pytest.raises(SettingsError, match="size 9 is none of the run"):
        parse_curriculum(text, TINY)


@given(st.text(max_size=80) | st.sampled_from([FILE, default_text(TINY)]), st.data())
def test_no_text_breaks_the_reader(text: str, data: st.DataObject) -> None:
    """Any text, and any file with a piece cut out, reads or is refused clearly."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    try:
        parse_curriculum(text[:start] + text[end:], TINY)
    except CastwiseError:
        return


def train(
    *flags: str, out: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Train the tiny preset in a process of its own."""
    command = [sys.executable, "-m", "castwise", "train", "kenken", "--preset", "tiny"]
    command += ["--dtype", "fp32", "--threads", "1", "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.mark.slow
def test_a_run_walks_its_stages_and_a_resumed_run_walks_the_same(
    tmp_path: Path,
) -> None:
    """Whole against cut in the middle: the same weights, bit by bit, and history."""
    path = tmp_path / "stages.yaml"
    path.write_text(FILE)
    flags = ("--curriculum", str(path), "--evaluate-every", "4", "--steps", "12")
    flags += ("--checkpoint-every", "2")
    train(*flags, out=tmp_path / "whole")
    cut = tmp_path / "cut"
    train(*flags, out=cut)
    for late in sorted(cut.glob("checkpoints/*.safetensors"))[1:]:
        late.unlink()  # as if it had been killed after step 8, in the second stage
    train("--resume", out=cut)
    trees = []
    for folder in (tmp_path / "whole", cut):
        newest = max(folder.glob("checkpoints/*step-12*"))
        trees.append(load_checkpoint(newest, kind="kenken run"))
        changes = [r for r in read_journal(folder) if r.event == "stage"]
        assert [r.step for r in changes] == [4]
        assert changes[0].values["after"] == "all"
        assert not changes[0].values["forced"]
    first, second = trees
    assert first["task"] == second["task"]
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name]), name


def test_a_bad_curriculum_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Exit code 2, one sentence, no run folder with checkpoints."""
    path = tmp_path / "stages.yaml"
    path.write_text(FILE.replace("epoch", "solvd"))
    done = train("--curriculum", str(path), out=tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "no measure solvd" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


def test_a_file_whose_stages_outlast_the_run_is_refused() -> None:
    """Nobody trains for hours to learn that the last stage never came."""
    text = FILE.replace("advance: epoch >= 1", "max_epochs: 2")
    settings = replace(TINY, curriculum_text=text, num_steps=2, evaluate_every=1)
    with pytest.raises(SettingsError, match=r"the run has 2; shorten them by"):
        curriculum_of(settings)
