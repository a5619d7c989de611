"""Text out of checkpoints: `castwise sample`, for either model."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from castwise.checkpoints import save_checkpoint
from castwise.cli import root
from castwise.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    SettingsError,
)
from castwise.recipes.language.sampling import (
    SamplingSettings,
    continue_text,
    sample_text,
)
from castwise.recipes.language.tokenizer import ByteTokenizer

RECIPES = [
    "resolvent_lm",
    pytest.param(
        "soliton_lm",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("lightning") is None, reason="lightning is missing"
        ),
    ),
]


class Fixed(nn.Module):
    """Says the same about every next token, and keeps what it was shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.shown: list[list[int]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[1, T, V]`."""
        self.shown.append(tokens[0].tolist())
        return self.logits.expand(1, tokens.shape[1], -1)


def logits_of(chances: dict[int, float]) -> Tensor:
    """Return logits of 257 tokens."""
    logits = torch.full((257,), -30.0)
    for token, chance in chances.items():
        logits[token] = math.log(chance)
    return logits


def draw(model: nn.Module, prompt: str = "", **how: Any) -> list[int]:
    """Return the tokens after a prompt."""
    return list(
        continue_text(
            model,
            ByteTokenizer(),
            prompt,
            length=5,
            settings=SamplingSettings(**how),
        )
    )


def test_without_a_temperature_the_likeliest_token_is_taken() -> None:
    """Every time."""
    model = Fixed(logits_of({65: 0.5, 66: 0.4}))
    assert draw(model, num_tokens=20, temperature=0.0) == [65] * 20


def test_draws_follow_the_distribution_and_the_seed() -> None:
    """Temperature 1, no top-k."""
    model = Fixed(logits_of({65: 0.6, 66: 0.3, 67: 0.1}))
    how = {"num_tokens": 3000, "temperature": 1.0, "top_k": 0}
    one = draw(model, **how, seed=1)
    counts = Counter(one)
    for token, chance in ((65, 0.6), (66, 0.3), (67, 0.1)):
        assert counts[token] / 3000 == pytest.approx(chance, abs=0.04)
    assert one == draw(model, **how, seed=1)
    assert one != draw(model, **how, seed=2)


def test_top_k_leaves_the_others_out() -> None:
    """However likely they are together."""
    model = Fixed(logits_of({65: 0.3, 66: 0.3, 67: 0.2, 68: 0.2}))
    assert set(draw(model, num_tokens=200, temperature=1.0, top_k=2)) == {65, 66}


def test_a_text_ends_with_its_document() -> None:
    """The end is no part of it."""
    model = Fixed(logits_of({256: 1.0}))
    assert draw(model, num_tokens=10) == []


def test_the_model_is_shown_the_prompt_and_no_more_than_it_can_see() -> None:
    """A document begins after an end; a long one loses its beginning."""
    model = Fixed(logits_of({65: 1.0}))
    draw(model, prompt="xyz", num_tokens=3, temperature=0.0)
    assert model.shown == [
        [256, 120, 121, 122],
        [256, 120, 121, 122, 65],
        [120, 121, 122, 65, 65],
    ]


def test_sampling_leaves_the_mode_of_the_model() -> None:
    """It may be asked in the middle of training."""
    model = Fixed(logits_of({65: 1.0})).train()
    settings = SamplingSettings(num_tokens=2)
    text = sample_text(model, ByteTokenizer(), "b", length=9, settings=settings)
    assert text == "bAA"
    assert model.training


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"temperature": math.inf}])
def test_settings_without_a_meaning_are_refused(how: dict[str, float]) -> None:
    """One sentence."""
    with pytest.raises(SettingsError, match="0 or more"):
        SamplingSettings(**how)  # type: ignore[arg-type]


def train(folder: Path, recipe: str) -> Path:
    """Train for two steps; return the folder of the run."""
    config = folder / "small.yaml"
    sizes = "  dim: 16\n  num_blocks: 2\n  num_heads: 2\n  hidden: 12\n"
    config.write_text(
        f"text:\n  sequence_length: 16\n  batch_size: 2\nmodel:\n{sizes}"
        "training:\n  num_steps: 2\n  num_validation: 2\n"
    )
    out = folder / recipe
    flags = ["--config", str(config), "--out", str(out), "--data", str(folder / "d")]
    call = ["train", recipe, *flags, "--precision", "bf16-mixed"]
    result = CliRunner().invoke(root, call, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module", params=RECIPES)
def out(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of either recipe."""
    return train(tmp_path_factory.mktemp("runs"), request.param)


def test_either_model_writes_from_its_checkpoint(out: Path) -> None:
    """From a file or the folder of a run; the same seed writes the same."""
    (file,) = (out / "checkpoints").glob("*.safetensors")
    how = ["--prompt", "The for", "--tokens", "30", "--seed", "4"]
    texts = [
        CliRunner().invoke(root, ["sample", str(place), *how], catch_exceptions=False)
        for place in (file, out, out / "checkpoints")
    ]
    assert [one.exit_code for one in texts] == [0, 0, 0]
    assert len({one.output for one in texts}) == 1
    assert texts[0].output.startswith("The for")
    other = CliRunner().invoke(root, ["sample", str(out), *how[:4], "--count", "2"])
    assert other.output.count("The for") == 2
    assert texts[0].output not in other.output


def test_a_loaded_model_says_what_was_trained(out: Path) -> None:
    """Its weights are those of the checkpoint, bit by bit."""
    from castwise.checkpoints import load_checkpoint
    from castwise.recipes.language_models import load_model

    (file,) = (out / "checkpoints").glob("*.safetensors")
    loaded = load_model(file)
    tree = load_checkpoint(file, kind=f"{out.name} run")
    stored = tree["lightning"]["state_dict"] if "lightning" in tree else tree["model"]
    held = loaded.model.state_dict()
    assert len(held) == len(stored)
    for name, weight in stored.items():
        assert torch.equal(held[name.removeprefix("model.")], weight), name


def test_files_that_are_no_such_checkpoint_are_refused(tmp_path: Path) -> None:
    """A pickle is never opened, a changed bit is seen, another kind is named."""
    pickled = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}}, pickled)
    other = tmp_path / "b.safetensors"
    save_checkpoint(other, {"model": {}}, kind="kenken run")
    broken = tmp_path / "c.safetensors"
    broken.write_bytes(other.read_bytes()[:-1] + b"?")
    for path, error, message in (
        (pickled, ForeignCheckpointError, "a.ckpt"),
        (other, ForeignCheckpointError, "kind 'kenken run'"),
        (broken, DamagedCheckpointError, "c.safetensors"),
        (tmp_path, CheckpointError, "no checkpoint of a language model"),
    ):
        with pytest.raises(error, match=message):
            CliRunner().invoke(root, ["sample", str(path)], catch_exceptions=False)
