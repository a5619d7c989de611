"""Tables of the pages, written from the records in docs/accepted.

`tables` makes those of docs/peers.md from what benchmarks/peers.py measured, `cost` the
one of docs/operator_table.md from what benchmarks/autocast.py measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_COLUMNS = ("castwise", "torch.autocast", "Lightning", "Accelerate", "paddle.amp")
_INPUTS = {
    "all": "all",
    "first": "only the first",
    "rest": "all but the first",
    "second": "only the second",
}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown, for every part that the record has."""
    makers = {
        "features": _features,
        "figures": _figures,
        "crashes": _crashes,
        "casts": _casts,
        "eager": _times,
        "compiled": _times,
        "contract": _contract,
    }
    parts = {**record, "figures": record["features"]}
    return {
        name: _table(*maker(parts[name]["rows"])) + _note(parts[name])
        for name, maker in makers.items()
        if name in parts
    }


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _note(part: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in part["versions"].items())
    threads = "one thread" if part["threads"] == 1 else f"{part['threads']} threads"
    return (
        f"Taken {part['date']} with {versions}; {threads} of {part['cores']} cores, "
        f"{part['processor']}.\n\n"
    )


def _features(rows: list[dict[str, Any]]) -> tuple[Iterable[str], Any]:
    header = ["", *_COLUMNS[:-1], "paddle.amp (documentation)", "test of castwise"]
    return header, (
        [
            row["feature"],
            *(_verdict(row["answers"][name]["verdict"]) for name in _COLUMNS),
            f"`{row['test'].rpartition('/')[2].partition('::')[0]}`",
        ]
        for row in rows
    )


def _verdict(verdict: str) -> str:
    return "**yes**" if verdict == "yes" else verdict


def _figures(rows: list[dict[str, Any]]) -> tuple[Iterable[str], Any]:
    return ["", *_COLUMNS], (
        [row["feature"], *(row["answers"][name]["figure"] for name in _COLUMNS)]
        for row in rows
    )


def _crashes(rows: list[dict[str, Any]]) -> tuple[Iterable[str], Any]:
    header = ["format", "inputs in it", "region", "forward", "backward"]
    return header, (
        [
            row["format"],
            _INPUTS[row["inputs"]],
            row["tool"],
            f"{row['forward']} of {row['forward_of']}",
            f"{row['backward']} of {row['backward_of']}",
        ]
        for row in rows
    )


def _casts(rows: list[dict[str, Any]]) -> tuple[Iterable[str], Any]:
    header = ["attention", "tool", "casts", "MB", "products in bf16", "softmax in"]
    return header, (
        [
            row["attention"],
            row["tool"],
            str(row["casts"]),
            f"{row['megabytes']:.1f}",
            f"{100 * row['low_share']:.1f} %",
            row["softmax"] or "(fused)",
        ]
        for row in rows
    )


def _times(rows: list[dict[str, Any]]) -> tuple[Iterable[str], Any]:
    header = ["batch, length", "attention", "tool", "ratio", "quartiles", "ms"]
    return header, (
        [
            row["shape"],
            row["attention"],
            row["tool"],
            f"{row['ratio']:.2f}",
            f"{row['lower_quartile']:.2f}-{row['upper_quartile']:.2f}",
            f"{row['milliseconds']:.1f}",
        ]
        for row in rows
    )


def _contract(rows: list[dict[str, Any]]) -> tuple[Iterable[str], Any]:
    return ["batch, length", "times a step", "quartiles", "ms"], (
        [
            row["shape"],
            f"{row['ratio']:.2f}",
            f"{row['lower_quartile']:.2f}-{row['upper_quartile']:.2f}",
            f"{row['milliseconds']:.0f}",
        ]
        for row in rows
    )


_KINDS = ("eager", "eager, blocks kept", "compiled")


def cost(record: dict[str, Any]) -> str:
    """The price of the table against torch.autocast, pair by pair."""
    kinds = [kind for kind in _KINDS if kind in record]
    header = ["batch, length", "attention: castwise / torch.autocast"]
    for kind in kinds:
        header += [kind, "quartiles"]
    rows = []
    for pair in record["eager"]["steps"]:
        shape, _, attentions = pair.partition(", ")
        row = [shape, attentions.replace(" against ", " / ")]
        for kind in kinds:
            step = record[kind]["steps"].get(pair)
            row += ["", ""] if step is None else _ratio(step)
        rows.append(row)
    return _table(header, rows)


def _ratio(step: dict[str, Any]) -> list[str]:
    low, high = step["lower_quartile"], step["upper_quartile"]
    return [f"**{step['ratio']:.2f}**", f"{low:.2f}-{high:.2f}"]
