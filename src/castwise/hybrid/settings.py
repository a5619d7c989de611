"""What a hybrid run is told, checked when it is told, and its builder.

settings = (
    HybridSettings.builder()
    .max_predict_steps(50)
    .confidence_threshold(0.60)
    .mixed_precision_config(MixedPrecisionConfig.aggressive())
    .build()
)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, final, get_args

import yaml

from castwise.errors import SettingsError
from castwise.hybrid.phase_precision import MixedPrecisionConfig
from castwise.hybrid.phases import PhaseLengths
from castwise.hybrid.predictor import Predictor
from castwise.hybrid.predictors import make_predictor
from castwise.hybrid.resting_states import Place

Mode = Literal["jump", "stepwise"]
"""Predict all at once, or batch by batch with a forward each."""

Verification = Literal["paired", "none"]
"""Two forwards on a fresh batch, or nothing."""

LengthRule = Literal["rule", "arms"]
"""Longer after a landing and shorter after a refusal, or a bandit over lengths."""

_LEAST = {
    "warmup_steps": 1,
    "full_steps": 1,
    "max_predict_steps": 1,
    "min_predict_steps": 1,
    "correct_steps": 0,
    "max_consecutive": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridSettings:
    """When to predict, how far, and when to believe it."""

    warmup_steps: int = 100
    """Real steps before anything is predicted."""

    full_steps: int = 20
    """Real steps between two questions whether to predict; also a window's length."""

    max_predict_steps: int = 80
    """The farthest that is ever predicted."""

    min_predict_steps: int = 5
    """The nearest that is worth a try."""

    correct_steps: int = 5
    """Real steps at a landing point, which teach the gains; 0 for none."""

    confidence_threshold: float = 0.60
    """The gate opens at this back-test; below 0.4 a line mostly misleads."""

    max_consecutive: int = 5
    """Predict phases that may follow each other without a full phase between them."""

    predictor: str = "window_line"
    """One of `castwise.hybrid.predictors.PREDICTORS`."""

    predictor_options: Mapping[str, float] = field(default_factory=dict)
    """The predictor's own settings; its window is `full_steps` unless given here."""

    mode: Mode = "jump"
    """`jump`, or `stepwise`: 1/horizon of the way with each batch, and a forward."""

    verification: Verification = "paired"
    """`none` believes every proposal: for outer optimizers and for controls."""

    verification_z: float = 1.0
    """Standard errors by which the loss has to fall; 0 where a batch is all data."""

    late_rollback: bool = True
    """Whether a landing is taken back if the loss leaves its course right after it."""

    divergence_threshold: float = 8.0
    """Evidence at which the monitor becomes cautious; twice that is an alarm."""

    phase_length: LengthRule = "rule"
    """What decides how far to predict; `arms` knows the arm of not predicting."""

    predict_states: Place = "stay"
    """Where optimizer states are in predict: on the `host`, on `disk`, or as ever."""

    mixed_precision_config: MixedPrecisionConfig = field(
        default_factory=MixedPrecisionConfig.default
    )
    """Formats by phase."""

    observe_formats: bool = False
    """Whether the first step of every phase is watched operator by operator."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SettingsError: Need, got and remedy.
        """
        self._check_counts()
        self._check_numbers()
        self._check_kinds()
        self.make_predictor()

    @staticmethod
    def builder() -> HybridSettingsBuilder:
        """Return a builder with every setting at its default."""
        return HybridSettingsBuilder()

    def make_predictor(self) -> Predictor:
        """Return a new predictor of the kind that is set."""
        return make_predictor(
            self.predictor, self.predictor_options, window=self.full_steps
        )

    def phase_lengths(self) -> PhaseLengths:
        """Return what the table of transitions compares with."""
        return PhaseLengths(
            warmup_steps=self.warmup_steps,
            full_steps=self.full_steps,
            correct_steps=self.correct_steps,
            confidence_threshold=self.confidence_threshold,
            max_consecutive=self.max_consecutive,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `from_dict` builds equal settings."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["predictor_options"] = dict(self.predictor_options)
        values["mixed_precision_config"] = self.mixed_precision_config.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build settings from plain values; what is left out stays at its default.

        Raises:
            SettingsError: A key is unknown or a value has no meaning.
        """
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SettingsError(f"a hybrid run has no setting {name!r}{hint}")
        given = dict(values)
        for name, kind in (
            ("mixed_precision_config", MixedPrecisionConfig.from_dict),
            ("predictor_options", dict),
        ):
            if name in given and not isinstance(given[name], Mapping):
                raise SettingsError(
                    f"{name} needs keys and values, got {given[name]!r}"
                )
            if name in given:
                given[name] = kind(given[name])
        return cls(**given)

    def to_yaml(self) -> str:
        """Return the text that `from_yaml` reads back as equal settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read settings from the text of a YAML file.

        Raises:
            SettingsError: It is no YAML of keys and values, or a value is wrong.
        """
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            first = " ".join(str(error).split())
            raise SettingsError(f"the settings are no valid YAML: {first}") from None
        if not isinstance(values, Mapping):
            raise SettingsError(
                "the settings need lines such as full_steps: 20, got "
                f"{type(values).__name__}"
            )
        return cls.from_dict(values)

    def _check_counts(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SettingsError(
                    f"{name} needs to be a whole number of {least} or more, got "
                    f"{value!r}; it counts steps"
                )
        if self.min_predict_steps > self.max_predict_steps:
            raise SettingsError(
                f"min_predict_steps needs to be at most max_predict_steps="
                f"{self.max_predict_steps}, got {self.min_predict_steps}; lower it"
            )

    def _check_numbers(self) -> None:
        at_threshold, z = self.confidence_threshold, self.verification_z
        evidence = self.divergence_threshold
        for name, value, holds, need in (
            (
                "confidence_threshold",
                at_threshold,
                _is_number(at_threshold) and 0 < at_threshold < 1,
                "lie between 0 and 1",
            ),
            ("verification_z", z, _is_number(z) and z >= 0, "be 0 or more"),
            (
                "divergence_threshold",
                evidence,
                _is_number(evidence) and evidence > 0,
                "be above 0",
            ),
        ):
            if not holds:
                default = type(self).__dataclass_fields__[name].default
                raise SettingsError(
                    f"{name} needs to {need}, got {value!r}; its default is {default}"
                )

    def _check_kinds(self) -> None:
        for name, allowed in (
            ("mode", Mode),
            ("verification", Verification),
            ("phase_length", LengthRule),
            ("predict_states", Place),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise SettingsError(
                    f"{name} needs {' or '.join(get_args(allowed))}, got "
                    f"{getattr(self, name)!r}"
                )
        for name in ("late_rollback", "observe_formats"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(
                    f"{name} needs true or false, got {getattr(self, name)!r}"
                )
        if not isinstance(self.mixed_precision_config, MixedPrecisionConfig):
            raise SettingsError(
                "mixed_precision_config needs a MixedPrecisionConfig, got "
                f"{type(self.mixed_precision_config).__name__}; take one of default(), "
                "conservative() and aggressive()"
            )


@final
class HybridSettingsBuilder:
    """Settings one call at a time; nothing is checked before `build`."""

    def __init__(self) -> None:
        self._given: dict[str, Any] = {}

    def _with(self, **values: Any) -> Self:
        self._given.update(values)
        return self

    def warmup_steps(self, count: int) -> Self:
        """Set the real steps before anything is predicted."""
        return self._with(warmup_steps=count)

    def full_steps(self, count: int) -> Self:
        """Set the real steps between two questions whether to predict."""
        return self._with(full_steps=count)

    def max_predict_steps(self, count: int) -> Self:
        """Set the farthest that is ever predicted."""
        return self._with(max_predict_steps=count)

    def min_predict_steps(self, count: int) -> Self:
        """Set the nearest that is worth a try."""
        return self._with(min_predict_steps=count)

    def correct_steps(self, count: int) -> Self:
        """Set the real steps at a landing point."""
        return self._with(correct_steps=count)

    def confidence_threshold(self, cosine: float) -> Self:
        """Set where the gate opens."""
        return self._with(confidence_threshold=cosine)

    def max_consecutive(self, count: int) -> Self:
        """Set how many predict phases may lack a full phase between them."""
        return self._with(max_consecutive=count)

    def predictor(self, name: str, **options: float) -> Self:
        """Choose the predictor and its own settings."""
        return self._with(predictor=name, predictor_options=options)

    def mode(self, mode: Mode) -> Self:
        """Choose `jump` or `stepwise`."""
        return self._with(mode=mode)

    def verification(self, kind: Verification, *, z: float = 1.0) -> Self:
        """Choose how proposals are verified."""
        return self._with(verification=kind, verification_z=z)

    def late_rollback(self, on: bool) -> Self:
        """Choose whether a landing can be taken back."""
        return self._with(late_rollback=on)

    def divergence_threshold(self, evidence: float) -> Self:
        """Set where the divergence monitor becomes cautious."""
        return self._with(divergence_threshold=evidence)

    def phase_length(self, rule: LengthRule) -> Self:
        """Choose what decides how far to predict."""
        return self._with(phase_length=rule)

    def predict_states(self, place: Place) -> Self:
        """Choose where optimizer states are in predict."""
        return self._with(predict_states=place)

    def mixed_precision_config(self, config: MixedPrecisionConfig) -> Self:
        """Set the formats of the phases."""
        return self._with(mixed_precision_config=config)

    def observe_formats(self, on: bool) -> Self:
        """Choose whether formats are observed in every phase."""
        return self._with(observe_formats=on)

    def build(self) -> HybridSettings:
        """Return the settings.

        Raises:
            SettingsError: One of them has no meaning.
        """
        return HybridSettings(**self._given)


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]
