"""What `--hybrid` asked for, turned into the settings of a hybrid run, for any recipe.

    --hybrid                 phases as they come: fp32, predictions in bf16
    --hybrid aggressive      bf16 in every phase, or `conservative`: fp32 in every phase
    --hybrid FILE            the YAML of `HybridSettings.to_yaml`

A precision flag beside it (`--dtype bf16`) holds in every phase that computes gradients
and that the settings leave open; where they leave none open, the two contradict each
other. The short names let a tenth of the run warm up, and no more than 100 steps.

This room imports torch: a command fetches it when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from castwise.checkpoints.contradictions import refuse_contradictions
from castwise.errors import SettingsError, StorageError
from castwise.hybrid import HybridSettings, MixedPrecisionConfig
from castwise.hybrid.phases import Phase
from castwise.policy import Policy
from castwise.wording import did_you_mean

SHORT_NAMES = ("default", "conservative", "aggressive")
"""What `--hybrid` knows without a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridChoice:
    """The hybrid flag of one command."""

    asked: str | None = None
    """A short name or the path of a file; none for a plain run."""

    def __post_init__(self) -> None:
        """Refuse what is neither.

        Raises:
            SettingsError: There is no such name and no such file.
        """
        if self.asked is None or self.asked in SHORT_NAMES:
            return
        if not Path(self.asked).is_file():
            raise SettingsError(
                f"--hybrid needs {', '.join(SHORT_NAMES)} or a YAML file of settings; "
                f"got {self.asked!r}{did_you_mean(self.asked, SHORT_NAMES)}."
            )

    @property
    def is_given(self) -> bool:
        """Whether a hybrid run was asked for."""
        return self.asked is not None

    def settings(
        self, *, num_steps: int, base: Policy, base_is_given: bool
    ) -> HybridSettings | None:
        """Return the settings of the run; none for a plain one.

        Args:
            num_steps: Steps of the whole run.
            base: The policy that the precision flags ask for.
            base_is_given: Whether one of them was given.

        Raises:
            SettingsError: Flags contradict each other, or the file is wrong.
            StorageError: The file cannot be read.
        """
        if self.asked is None:
            return None
        found = self._settings(num_steps)
        if not base_is_given:
            return found
        return replace(
            found,
            mixed_precision_config=self._under(base, found.mixed_precision_config),
        )

    def refuse_other(
        self, facts: Mapping[str, Any], *, num_steps: int, where: Path
    ) -> None:
        """Refuse to go on with a run in other phases than it was begun in.

        Args:
            facts: Of the stored run.
            num_steps: Steps of the whole run.
            where: The checkpoint.

        Raises:
            ContradictionError: The flag was given, and the stored run differs.
        """
        if not self.is_given:
            return
        stored = facts.get("hybrid")
        if stored is None:
            refuse_contradictions(
                {"--hybrid": self.asked}, {"--hybrid": "a plain run"}, where=where
            )
        given = facts["asked_by"].startswith("--")
        base = Policy.parse(facts["policy"], where=str(where))
        mine = self.settings(num_steps=num_steps, base=base, base_is_given=given)
        assert mine is not None, "it is given"
        refuse_contradictions(mine.to_dict(), dict(stored or {}), where=where)

    def _settings(self, num_steps: int) -> HybridSettings:
        assert self.asked is not None, "asked before"
        if self.asked not in SHORT_NAMES:
            return _from_file(Path(self.asked))
        config = {
            "default": MixedPrecisionConfig.default,
            "conservative": MixedPrecisionConfig.conservative,
            "aggressive": MixedPrecisionConfig.aggressive,
        }[self.asked]()
        return HybridSettings(
            warmup_steps=max(1, min(100, num_steps // 10)),
            mixed_precision_config=config,
            observe_formats=True,
        )

    def _under(
        self, base: Policy, config: MixedPrecisionConfig
    ) -> MixedPrecisionConfig:
        """Let the precision flag decide where the settings leave a phase open."""
        if not (config.enabled and config.auto_recommend):
            raise SettingsError(
                f"--hybrid {self.asked} sets the format of every phase, and a "
                "precision flag sets it too; keep one of them."
            )
        for phase in Phase:
            if phase.computes_backward and phase not in config.phase_precisions:
                fmt = base.base_precision(phase=phase.value).compute or "fp32"
                config = config.with_phase_precision(phase, fmt)
        return config


def joined_policy(settings: HybridSettings | None, base: Policy) -> Policy:
    """Return the policy of a run: the base, with the formats of phases over it."""
    if settings is None:
        return base
    return settings.mixed_precision_config.policy(over=base)


def stored_settings(facts: Mapping[str, Any]) -> HybridSettings | None:
    """Return the hybrid settings of a stored run, from the facts of its checkpoint."""
    stored = facts.get("hybrid")
    if stored is None:  # a plain run, or one of an earlier version
        return None
    return HybridSettings.from_dict(stored)


def _from_file(path: Path) -> HybridSettings:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--hybrid {path} cannot be read: {error}") from error
    try:
        return HybridSettings.from_yaml(text)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
