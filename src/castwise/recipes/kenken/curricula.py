"""Curricula of this recipe: over sizes, modes and fills, by default or from a file.

    castwise: 1
    rewarm: 20                # updates of a new rise of the learning rate; optional
    dimensions:
      mode:
        smoothing: 0.3
        stages:
          - {name: plain,  modes: {standard: 1}, advance: stage_solved >= 0.9 for 2,
             max_epochs: 6}
          - {name: zero,   modes: {standard: 1, zero: 1}, advance: epoch >= 2}
          - {name: all,    modes: {standard: 1, zero: 1, negative: 2}, rehearsal: 0.2}

A dimension is size, mode or fill. A stage of `size` names `sizes` and their weights, of
`mode` `modes` and theirs, of `fill` the chance `empty` of an empty grid and the range
`reveal` of the chance that a cell is shown. A dimension that is not walked keeps the
settings of the run. Stages shorten and lengthen training only through what is drawn:
a batch stays a pure function of (seed, step) and the stages in force.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from castwise.errors import SettingsError, StorageError
from castwise.recipes.kenken.alphabets import Mode, parse_mode
from castwise.recipes.kenken.batches import Fill, Mixture
from castwise.recipes.kenken.settings import DIMENSIONS, KenKenSettings
from castwise.training.conditions import parse_condition
from castwise.training.curriculum import Curriculum, Dimension, Stage
from castwise.wording import did_you_mean

STAGE_SOLVED, STAGE_LOSS = "stage_solved", "stage_loss"
SOLVED, LOSS = "solved", "validation_loss"
MEASURES = (STAGE_SOLVED, STAGE_LOSS, SOLVED, LOSS)

Weights = dict[Any, float]


def default_text(settings: KenKenSettings) -> str:
    """Return the default curriculum over all dimensions, as its file would say it.

    Early stages are short and later ones rehearse the earlier: stages of equal length
    without rehearsal hurt what comes last (`docs/curriculum.md` has the figures).
    """
    lines = {
        "size": _default_sizes(settings),
        "mode": _default_modes(settings),
        "fill": _default_fills(settings),
    }
    dimensions = {name: {"stages": stages} for name, stages in lines.items()}
    tree = {"castwise": 1, "dimensions": dimensions}
    return yaml.safe_dump(tree, sort_keys=False)


def _lengths(settings: KenKenSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the first and the second stage end: a fifth, then a seventh of the run."""
    epochs = -(-settings.num_steps // settings.evaluate_every)
    done = f"{STAGE_SOLVED} >= 0.95"
    return (
        {"advance": done, "max_epochs": max(1, round(0.2 * epochs))},
        {"advance": done, "max_epochs": max(1, round(0.15 * epochs))},
    )


def _default_sizes(settings: KenKenSettings) -> list[dict[str, Any]]:
    first, _ = _lengths(settings)
    shares = dict(zip(settings.sizes, settings.size_shares, strict=True))
    whole = {"name": "all", "sizes": shares}
    small = sorted(shares)[: -(-len(shares) // 2)]
    if len(small) == len(shares):
        return [whole]
    return [{"name": "small", "sizes": dict.fromkeys(small, 1), **first}, whole]


def _default_modes(settings: KenKenSettings) -> list[dict[str, Any]]:
    shares = dict(zip(settings.modes, settings.mode_shares, strict=True))
    stages: list[dict[str, Any]] = []
    for number, name in enumerate(settings.modes[:-1], 1):
        length = _lengths(settings)[min(number, 2) - 1]
        weights = dict.fromkeys(settings.modes[:number], 1)
        stages.append({"name": f"with {name}", "modes": weights, **length})
        if number > 1:
            stages[-1]["rehearsal"] = 0.2
    return [*stages, {"name": "all", "modes": shares}]


def _default_fills(settings: KenKenSettings) -> list[dict[str, Any]]:
    """Lower bounds fall and the upper one stays: what was learnt is kept alive."""
    first, second = _lengths(settings)
    top, empty = settings.max_reveal, settings.empty_share
    return [
        {"name": "many", "empty": 0.0, "reveal": [top / 2, top], **first},
        {"name": "some", "empty": empty / 2, "reveal": [top / 4, top], **second},
        {"name": "any", "empty": empty, "reveal": [0.0, top]},
    ]


def curriculum_of(settings: KenKenSettings) -> Curriculum:
    """Return the curriculum of a run: from its file, or the default one.

    Raises:
        SettingsError: The file's text is no curriculum of this run, or its stages last
            longer than the run.
    """
    text, walked = settings.curriculum_text, settings.walked
    if text:
        curriculum = parse_curriculum(text, settings, enabled=walked or None)
        curriculum.check_length(-(-settings.num_steps // settings.evaluate_every))
        return curriculum
    return parse_curriculum(default_text(settings), settings, enabled=walked)


def read_curriculum_file(path: Path) -> str:
    """Return the text of a curriculum file.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"the curriculum {path} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error


def parse_curriculum(
    text: str,
    settings: KenKenSettings,
    *,
    enabled: tuple[str, ...] | None = None,
    where: str = "the curriculum",
) -> Curriculum:
    """Read a curriculum.

    Args:
        text: The YAML document.
        settings: Of the run; stages may only name its sizes and modes.
        enabled: Dimensions to walk; None for all that the text has.
        where: How messages call the text.

    Raises:
        SettingsError: Naming the place and what is needed there.
    """
    reader = _Reader(settings)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise SettingsError(f"{where}{line}: no YAML: {problem}") from error
    except RecursionError as error:
        raise SettingsError(f"{where}: nested too deep") from error
    top = _mapping(tree, where, ("castwise", "rewarm", "dimensions"))
    if top.get("castwise") != 1:
        raise SettingsError(
            f"{where}: need castwise: 1, got {top.get('castwise')!r}; this castwise "
            "reads version 1 only"
        )
    lines = _mapping(top.get("dimensions"), f"{where}, dimensions", DIMENSIONS)
    dimensions = [
        reader.dimension(name, value, f"{where}, {name}")
        for name, value in lines.items()
    ]
    num_rewarm = _whole(top, "rewarm", where) or 0
    curriculum = Curriculum(dimensions, enabled, num_rewarm=num_rewarm)
    curriculum.check_measures(MEASURES)
    return curriculum


def mixture_in_force(mixture: Mixture, curriculum: Curriculum) -> Mixture:
    """Return the mixture of a run with the stages in force laid over it."""
    changes: dict[str, Any] = {}
    if curriculum.stage("size") is not None:
        sizes = _blended(curriculum, "size")
        changes |= {"sizes": tuple(sizes), "size_shares": tuple(sizes.values())}
    if curriculum.stage("mode") is not None:
        modes = _blended(curriculum, "mode")
        changes |= {"modes": tuple(modes), "mode_shares": tuple(modes.values())}
    if curriculum.stage("fill") is not None:
        changes["fills"] = tuple(
            replace(stage.value, share=share)
            for stage, share in curriculum.shares("fill")
        )
    return replace(mixture, **changes)


def _blended(curriculum: Curriculum, name: str) -> Weights:
    """Sum the weights of the stages of a dimension, each times its share."""
    total: Weights = {}
    for stage, share in curriculum.shares(name):
        for item, weight in stage.value.items():
            total[item] = total.get(item, 0.0) + share * weight
    return total


class _Reader:
    """Reads stages against the settings of one run."""

    def __init__(self, settings: KenKenSettings) -> None:
        self._settings = settings
        self._values: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
            "size": (("sizes",), self._sizes),
            "mode": (("modes",), self._modes),
            "fill": (("empty", "reveal"), self._fill),
        }

    def dimension(self, name: str, tree: Any, where: str) -> Dimension:
        entries = _mapping(tree, where, ("smoothing", "hysteresis", "stages"))
        stages = entries.get("stages")
        if not isinstance(stages, list):
            raise SettingsError(f"{where}: stages needs a list, got {_kind(stages)}")
        return Dimension(
            name=name,
            stages=tuple(
                self._stage(name, stage, f"{where}, stage {number}")
                for number, stage in enumerate(stages, 1)
            ),
            smoothing=_number(entries, "smoothing", 0.0, where),
            hysteresis=_number(entries, "hysteresis", 0.0, where),
        )

    def _stage(self, dimension: str, tree: Any, where: str) -> Stage:
        own, read = self._values[dimension]
        common = ("name", "advance", "regress", "min_epochs", "max_epochs", "rehearsal")
        entries = _mapping(tree, where, (*common, *own))
        conditions = {
            key: parse_condition(str(entries[key]))
            for key in ("advance", "regress")
            if key in entries
        }
        return Stage(
            name=str(entries.get("name", where.rpartition(" ")[2])),
            value=read(entries, where),
            min_epochs=_whole(entries, "min_epochs", where) or 1,
            max_epochs=_whole(entries, "max_epochs", where),
            rehearsal=_number(entries, "rehearsal", 0.0, where),
            **conditions,
        )

    def _sizes(self, entries: Mapping[str, Any], where: str) -> Weights:
        weights = _weights(entries.get("sizes"), f"{where}, sizes")
        for size in weights:
            if size not in self._settings.sizes:
                known = ", ".join(map(str, self._settings.sizes))
                raise SettingsError(
                    f"{where}: size {size} is none of the run, which has {known}; add "
                    "it with --sizes"
                )
        return weights

    def _modes(self, entries: Mapping[str, Any], where: str) -> dict[Mode, float]:
        weights = _weights(entries.get("modes"), f"{where}, modes")
        known = self._settings.modes
        for mode in weights:
            if mode not in known:
                raise SettingsError(
                    f"{where}: mode {mode} is none of the run"
                    f"{did_you_mean(str(mode), known)}, which has {', '.join(known)}; "
                    "add it with --modes"
                )
        return {parse_mode(mode): weight for mode, weight in weights.items()}

    def _fill(self, entries: Mapping[str, Any], where: str) -> Fill:
        reveal = entries.get("reveal")
        if not isinstance(reveal, list) or len(reveal) != 2:
            raise SettingsError(
                f"{where}: reveal needs two chances such as [0.1, 0.7], got "
                f"{_kind(reveal)}"
            )
        low, high = (_number({"reveal": end}, "reveal", 0.0, where) for end in reveal)
        empty = _number(entries, "empty", 0.0, where)
        try:
            return Fill(empty_share=empty, reveal=(low, high))
        except SettingsError as error:
            raise SettingsError(f"{where}: {error}") from error


def _mapping(tree: Any, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(tree, dict) or not tree:
        raise SettingsError(
            f"{where} needs keys and values, got {_kind(tree)}; it has "
            f"{', '.join(known)}"
        )
    for key in tree:
        if key not in known:
            raise SettingsError(
                f"{where}: unknown key {key}{did_you_mean(str(key), known)}; it has "
                f"{', '.join(known)}"
            )
    return tree


def _weights(tree: Any, where: str) -> Weights:
    """Read weights, or a list whose items weigh the same; they are made to sum to 1."""
    if isinstance(tree, list):
        tree = dict.fromkeys(tree, 1)
    good = isinstance(tree, dict) and all(
        isinstance(w, (int, float)) and 0 <= w < float("inf") for w in tree.values()
    )
    if not good or not sum(tree.values()) > 0:
        raise SettingsError(
            f"{where} needs items and weights of at least 0 such as {{4: 1, 5: 2}}, "
            f"got {_kind(tree)}"
        )
    total = sum(tree.values())
    return {item: weight / total for item, weight in tree.items() if weight}


def _number(
    entries: Mapping[str, Any], key: str, otherwise: float, where: str
) -> float:
    value = entries.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingsError(f"{where}: {key} needs a number, got {_kind(value)}")
    return float(value)


def _whole(entries: Mapping[str, Any], key: str, where: str) -> int | None:
    value = entries.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{where}: {key} needs a whole number, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        kind = type(value).__name__
        return f"{kind} {value!r}"[:60] if value else f"an empty {kind}"
    return repr(value)[:40]
