"""The page of a language model's run, arranged from its journal and facts.

Everything comes in as values; this room computes no measure and runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castwise.numerics.census import FormatCensus
from castwise.recipes.hybrid_story import hybrid_story
from castwise.recipes.precision_story import precision_story
from castwise.recipes.scale_story import scale_markers, scale_story
from castwise.report import (
    Column,
    DataTable,
    Fact,
    Facts,
    Lines,
    Note,
    Report,
    Section,
    Series,
    Tile,
    Verdict,
    write_report,
)
from castwise.training.journal import Record

MIB = 2**20
RESIDUAL_GOAL = 1e-4

_MEANINGS = {
    "residual": "Largest relative residual of a token, over all layers.",
    "unitarity": "Largest entry of U^H U - I, over all layers.",
    "norm": "Largest relative change of the squared norm of a token.",
    "sparsity": "Share of negligible output entries.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Everything that the report of a run tells."""

    title: str
    """What was trained, in a few words."""

    facts: Mapping[str, Any]
    """What stands in the checkpoints."""

    records: tuple[Record, ...]
    """Every line of the journal."""

    sample: str
    """Some text that the model wrote."""

    def of(self, event: str) -> list[Record]:
        """Return the journal's lines of one event."""
        return [record for record in self.records if record.event == event]

    @property
    def last(self) -> Mapping[str, Any]:
        """The values of the last epoch."""
        return self.of("epoch")[-1].values


def write_run_report(evidence: Evidence, path: Path) -> None:
    """Write `report.html`, and `report.json` beside it.

    Raises:
        StorageError: If they cannot be written.
    """
    write_report(build_report(evidence), path)


def build_report(evidence: Evidence) -> Report:
    """Arrange the evidence for a reader."""
    facts = evidence.facts
    training = facts["settings"]["training"]
    return Report(
        title=evidence.title,
        subtitle=(
            f"{facts['num_parameters']:,} weights, seed {training['seed']}, "
            f"{training['num_steps']} steps on {facts['device']} with "
            f"{facts['num_threads']} threads"
        ),
        verdict=_verdict(evidence),
        tiles=_tiles(evidence),
        sections=(
            Section(title="Training", blocks=_training(evidence)),
            Section(title="Sensitive layers", blocks=_health(evidence)),
            Section(title="Precision", blocks=precision_story(evidence.facts)),
            *hybrid_story(evidence.records),
            Section(title="Memory", blocks=_memory(evidence)),
            Section(title="A sample", blocks=(Note(text=evidence.sample or "(none)"),)),
            Section(title="Settings", blocks=_settings(evidence)),
        ),
        footer="; ".join(f"{n} {version}" for n, version in facts["versions"].items()),
    )


def _verdict(evidence: Evidence) -> Verdict:
    last = evidence.last
    text = (
        f"Validation loss {last['validation_loss']:.3f} nats per token, "
        f"{last['validation_bits_per_byte']:.3f} bits per byte."
    )
    residuals = _values(evidence.records, "residual")
    if not residuals:
        return Verdict(text=text, because="this variant has no sensitive layer")
    largest = max(residuals, key=lambda one: math.inf if math.isnan(one) else one)
    return Verdict(
        text=text,
        mark="good" if largest < RESIDUAL_GOAL else "warning",
        because=(
            f"largest residual of the sensitive layers at any time {largest:.1e}; the "
            f"goal is {RESIDUAL_GOAL:.0e}"
        ),
    )


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [
        float(record.values[name])
        for record in records
        if record.event == "train" and name in record.values
    ]


def _tiles(evidence: Evidence) -> tuple[Tile, ...]:
    last, facts = evidence.last, evidence.facts
    census = FormatCensus.from_record(facts["effective"])
    shares = census.product_shares()
    tiles = [
        Tile(
            name="validation loss",
            value=f"{last['validation_loss']:.3f}",
            detail=f"{last['validation_bits_per_byte']:.3f} bits per byte",
        ),
        Tile(
            name="effective precision",
            value=census.effective or "none",
            detail=", ".join(f"{s:.0%} {name}" for name, s in shares.items())
            + " of product flops",
        ),
        Tile(name="time", value=f"{last['train_seconds']:.0f} s"),
        Tile(name="peak memory", value=f"{_peak(evidence):.0f} MiB"),
    ]
    residuals = _values(evidence.records, "residual")
    if residuals:
        tiles.insert(
            1,
            Tile(
                name="largest residual",
                value=f"{max(residuals):.1e}",
                mark="good" if max(residuals) < RESIDUAL_GOAL else "warning",
            ),
        )
    return tuple(tiles)


def _peak(evidence: Evidence) -> float:
    return max(float(r.values["train_peak_mib"]) for r in evidence.of("epoch"))


def _series(name: str, records: Sequence[Record], value: str) -> Series:
    chosen = [record for record in records if value in record.values]
    return Series(
        name=name,
        xs=tuple(float(record.step) for record in chosen),
        ys=tuple(float(record.values[value]) for record in chosen),
    )


def _training(evidence: Evidence) -> tuple[Lines | DataTable, ...]:
    train, epochs, skips = (evidence.of(e) for e in ("train", "epoch", "skip"))
    return (
        Lines(
            title="Loss",
            series=(
                _series("training batch", train, "loss"),
                _series("validation", epochs, "validation_loss"),
            ),
            y_label="nats per token",
            markers=scale_markers(skips),
        ),
        Lines(
            title="Time of one step",
            series=(_series("median between two lines", train, "step_ms"),),
            y_label="ms",
        ),
        Lines(
            title="Learning rate",
            series=(_series("learning rate", train, "learning_rate"),),
        ),
        *scale_story(evidence.records),
    )


def _health(evidence: Evidence) -> tuple[Lines | Note, ...]:
    train, epochs = evidence.of("train"), evidence.of("epoch")
    lines = tuple(
        Lines(
            title=name.capitalize(),
            series=(
                _series("training batch", train, name),
                _series("validation", epochs, f"validation_{name}"),
            ),
            log_y=name != "sparsity",
            caption=meaning,
        )
        for name, meaning in _MEANINGS.items()
        if any(name in record.values for record in train)
    )
    return lines or (Note(text="This variant has no sensitive layer."),)


def _memory(evidence: Evidence) -> tuple[Lines | DataTable, ...]:
    epochs = evidence.of("epoch")
    return (
        Lines(
            title="Memory",
            series=(
                _series("now", evidence.of("train"), "memory_mib"),
                _series("peak", evidence.of("train"), "memory_peak_mib"),
            ),
            y_label="MiB",
        ),
        DataTable(
            title="Peaks by epoch",
            caption="Of the whole process on a CPU, of the allocator on a GPU.",
            columns=(
                Column(name="step"),
                Column(name="peak in training", spelling="bytes"),
                Column(name="peak in evaluation", spelling="bytes"),
            ),
            rows=tuple(
                (
                    float(record.step),
                    MIB * float(record.values["train_peak_mib"]),
                    MIB * float(record.values["evaluate_peak_mib"]),
                )
                for record in epochs
            ),
            folded=True,
        ),
    )


def _settings(evidence: Evidence) -> tuple[Facts, ...]:
    facts = evidence.facts
    return (
        *(
            Facts(
                title=section,
                facts=tuple(
                    Fact(name=name, value=str(value)) for name, value in values.items()
                ),
            )
            for section, values in facts["settings"].items()
        ),
        Facts(
            title="Data",
            facts=tuple(
                Fact(name=name, value=digest) for name, digest in facts["data"].items()
            ),
        ),
        Facts(
            title="Policy",
            facts=(Fact(name="policy.yaml", value=facts["policy"]),),
        ),
    )
