"""What will be trained, in which precision: from a config and flags, or a checkpoint.

A resumed run has the settings, the policy and the tokenizer of its checkpoint. What is
said on the command line all the same must not contradict them.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import castwise
from castwise.checkpoints import refuse_contradictions
from castwise.decision import Decision
from castwise.errors import SettingsError
from castwise.policy import Policy
from castwise.recipes.language.config import (
    describe,
    field_types,
    read_config,
    settings_from,
)
from castwise.recipes.language.settings import TextSettings, TrainingSettings
from castwise.recipes.language.supply import TokenSupply
from castwise.recipes.language.tokenizer import Tokenizer, tokenizer_of
from castwise.recipes.launch import BEFORE
from castwise.recipes.precision_choice import PrecisionChoice

DEFAULT_PRECISION = "bf16-mixed"
SIGNAL_CODES = {"SIGINT": 130, "SIGTERM": 143}
_WIDE = ("fp64",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is a recipe's own."""

    name: str
    """As on the command line."""

    kind: str
    """Of its checkpoints."""

    model: type
    """Its model settings."""

    island: str
    """The modules that a policy has to protect."""

    because: str
    """Why, in one clause."""

    def sections(self) -> dict[str, type]:
        """Return the sections of its config."""
        return {
            "text": TextSettings,
            "model": self.model,
            "training": TrainingSettings,
        }


_UNKNOWN_BEFORE = {
    "average": "none",
    "average_decay": 0.99,
    "average_every": 10,
    "average_count": 8,
}
"""What earlier runs had without saying so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything but precision and place."""

    text: TextSettings
    """Which text."""

    model: Any
    """The recipe's own."""

    training: TrainingSettings
    """How long."""

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return plain data: what a checkpoint holds."""
        return {name: describe(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the flags say."""

    config: Path | None
    """A config file; None: the defaults."""

    changes: Mapping[str, Mapping[str, Any]]
    """Values by section and field, laid over the config."""

    choice: PrecisionChoice
    """The precision flags."""

    islands: bool = True
    """Whether the recipe protects its sensitive layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be trained."""

    settings: Settings
    """Everything but precision and place."""

    policy: Decision[Policy]
    """The precision in force, islands included, and by which flag."""

    fallback: str | None
    """Format to use instead of one that the device cannot do."""

    tokenizer: Tokenizer | None
    """That of the checkpoint; None: it is still to be learned."""

    tree: Mapping[str, Any] | None
    """The checkpoint to go on from, if any."""


def plan_anew(recipe: Recipe, asked: Asked) -> Plan:
    """Plan a run from its config and flags.

    Raises:
        SettingsError: A key or value has no meaning.
        PolicyError: The precision is unknown or the policy malformed.
        StorageError: A file cannot be read.
    """
    settings = _settings(recipe, asked)
    found = asked.choice.policy(otherwise=DEFAULT_PRECISION)
    policy = found.value
    because = found.because
    if asked.islands and settings.model.variant == "layer":
        policy = protected(policy, recipe)
    elif not asked.islands:
        because = f"{because}, --no-islands"
    return Plan(
        settings=settings,
        policy=Decision(policy, because),
        fallback=asked.choice.fallback,
        tokenizer=None,
        tree=None,
    )


def protected(policy: Policy, recipe: Recipe) -> Policy:
    """Return a policy that also holds the sensitive layers in fp32, or wider."""
    if policy.default.compute in _WIDE:
        return policy
    return policy.with_rule(
        module=recipe.island, precision="fp32", because=recipe.because
    )


def plan_from(
    recipe: Recipe, asked: Asked, tree: Mapping[str, Any], where: Path
) -> Plan:
    """Plan to go on from a checkpoint.

    Raises:
        ContradictionError: A flag says something else than the checkpoint.
        SettingsError: It was written by another version.
    """
    facts = tree["facts"]
    settings = stored_settings(recipe, facts)
    _refuse_other_flags(recipe, asked, settings, facts, where)
    return Plan(
        settings=settings,
        policy=Decision(
            Policy.parse(facts["policy"], where=str(where)), facts["asked_by"]
        ),
        fallback=facts["fallback"],
        tokenizer=tokenizer_of(facts["tokenizer"]),
        tree=tree,
    )


def stored_settings(recipe: Recipe, facts: Mapping[str, Any]) -> Settings:
    """Return the settings that stand in a checkpoint.

    Raises:
        SettingsError: They are those of another version.
    """
    stored = dict(facts["settings"])
    stored["training"] = {**_UNKNOWN_BEFORE, **stored.get("training", {})}
    return Settings(
        **{
            name: settings_from(kind, stored.get(name, {}))
            for name, kind in recipe.sections().items()
        }
    )


def facts_of(
    recipe: Recipe,
    plan: Plan,
    supply: TokenSupply,
    device: Decision[torch.device],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect what a checkpoint and the report must hold about a run.

    Args:
        recipe: Which one.
        plan: What is trained.
        supply: On which tokens.
        device: Where.
        measured: What is known only now: formats in force, sizes.
    """
    return {
        "recipe": recipe.name,
        "settings": plan.settings.describe(),
        "tokenizer": supply.tokenizer.describe(),
        "vocab_size": supply.tokenizer.vocab_size,
        "policy": plan.policy.value.to_yaml(),
        "asked_by": plan.policy.because,
        "fallback": plan.fallback,
        "device": str(device.value),
        "device_because": device.because,
        "num_threads": torch.get_num_threads(),
        "data": dict(supply.digests),
        "versions": {
            "castwise": castwise.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        **measured,
    }


def changes_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs from a checkpoint and may change the last bits."""
    before = {**BEFORE, **before}
    names = ("versions", "num_threads", "device", "data", "effective")
    return [
        f"Note: {name} differs from the checkpoint; the run goes on, but not bit for "
        "bit as it would have."
        for name in (*names, *BEFORE)
        if before.get(name) != now.get(name, before.get(name))
    ]


def _settings(recipe: Recipe, asked: Asked) -> Settings:
    sections = recipe.sections()
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if asked.config is not None:
        values = read_config(asked.config, sections)
    for section, changes in asked.changes.items():
        values[section] = {**values[section], **changes}
    made = {name: kind(**values[name]) for name, kind in sections.items()}
    training = made["training"]
    short = {
        name: min(getattr(training, name), training.num_steps)
        for name in ("evaluate_every", "checkpoint_every")
        if name not in values["training"]
    }
    if "num_warmup" not in values["training"]:
        short["num_warmup"] = min(training.num_warmup, training.num_steps // 10)
    made["training"] = replace(training, **short)
    return Settings(**made)


def _refuse_other_flags(
    recipe: Recipe,
    asked: Asked,
    settings: Settings,
    facts: Mapping[str, Any],
    where: Path,
) -> None:
    """Compare only what was said on the command line with what is stored."""
    if asked.config is not None:
        given = read_config(asked.config, recipe.sections())
    else:
        given = {name: {} for name in recipe.sections()}
    for section, changes in asked.changes.items():
        given[section] = {**given[section], **changes}
    said: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    for section, values in given.items():
        for name, value in values.items():
            if name not in field_types(recipe.sections()[section]):
                raise SettingsError(f"{section} has no setting {name}")
            said[f"{section}.{name}"] = value
            stored[f"{section}.{name}"] = getattr(getattr(settings, section), name)
    before = Policy.parse(facts["policy"], where=str(where))
    if asked.choice.is_given:
        policy = asked.choice.policy(otherwise=DEFAULT_PRECISION)
        flag = policy.because.split()[0]
        said[flag], stored[flag] = policy.value.name, before.name
    refuse_contradictions(said, stored, where=where)
