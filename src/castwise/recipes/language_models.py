"""Both language models, out of their checkpoints.

A checkpoint is a safetensors file of plain data; its kind says which recipe wrote it,
and no code of it is run. What is saved by Lightning and what is saved by castwise's own
trainer differ in where the weights lie, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from castwise.checkpoints import CheckpointShelf, describe_checkpoint, load_checkpoint
from castwise.errors import CheckpointError, ForeignCheckpointError
from castwise.recipes.language.plan import stored_settings
from castwise.recipes.language.sampling import SamplingSettings, sample_text
from castwise.recipes.language.tokenizer import Tokenizer, tokenizer_of
from castwise.recipes.resolvent_lm import model as resolvent_lm
from castwise.recipes.soliton_lm import model as soliton_lm

_LIGHTNING_PREFIX = "model."


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that can write."""

    model: nn.Module
    """In eval mode, in fp32, on the CPU."""

    tokenizer: Tokenizer
    """Its own."""

    length: int
    """Tokens that it was trained to see."""

    facts: Mapping[str, Any]
    """What the checkpoint says about its run."""


def load_model(path: Path) -> LoadedModel:
    """Load a language model from a checkpoint, or from the folder of a run.

    Raises:
        CheckpointError: There is none, or it is damaged or of another kind.
        MissingExtraError: Its tokenizer needs a package.
    """
    file = _file_of(path)
    kind = describe_checkpoint(file).kind
    recipes = {
        each.RECIPE.kind: (each.RECIPE, each.build_model)
        for each in (resolvent_lm, soliton_lm)
    }
    if kind not in recipes:
        raise ForeignCheckpointError(
            f"{file} holds a checkpoint of kind {kind!r}, and only language models "
            f"write text; choose one of kind {' or '.join(recipes)}"
        )
    recipe, build = recipes[kind]
    tree = load_checkpoint(file, kind=kind)
    settings = stored_settings(recipe, tree["facts"])
    tokenizer = tokenizer_of(tree["facts"]["tokenizer"])
    length = settings.text.sequence_length
    model = build(settings.model, tokenizer.vocab_size, length)
    weights = _weights_of(tree)
    try:
        model.load_state_dict({name: one.float() for name, one in weights.items()})
    except RuntimeError as error:
        raise ForeignCheckpointError(
            f"{file} fits another model: {' '.join(str(error).split())[:200]}; use the "
            "version of castwise that wrote it"
        ) from error
    return LoadedModel(
        model=model.eval(), tokenizer=tokenizer, length=length, facts=tree["facts"]
    )


def write(loaded: LoadedModel, prompt: str, **how: Any) -> str:
    """Return a prompt and what a model makes of it.

    Args:
        loaded: The model.
        prompt: What comes before.
        how: Fields of `SamplingSettings`.
    """
    return sample_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        length=loaded.length,
        settings=SamplingSettings(**how),
    )


def _file_of(path: Path) -> Path:
    if not path.is_dir() or path.suffix == ".sharded":
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for each in (resolvent_lm, soliton_lm):
        shelf = CheckpointShelf(folder=folder, kind=each.RECIPE.kind)
        try:
            found = shelf.best().value or shelf.latest().value
        except ForeignCheckpointError:
            continue
        if found is not None:
            return found.path
    raise CheckpointError(
        f"{path} holds no checkpoint of a language model; name a file, or a run's "
        "folder such as runs/resolvent_lm/001"
    )


def _weights_of(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    if "lightning" not in tree:
        found: dict[str, Tensor] = tree["model"]
        return found
    return {
        name.removeprefix(_LIGHTNING_PREFIX): weight
        for name, weight in tree["lightning"]["state_dict"].items()
    }
