"""The tables of the page on plans, from the record of `benchmarks/graph.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page_tables import filled, markdown

PAGE = Path(__file__).parents[1] / "docs" / "graph.md"
NAMES = {
    "lm": "transformer LM, width 256, B8 T128",
    "llama": "Llama-like, width 256, B8 T128",
    "vit": "ViT, width 192, B8",
    "conv": "conv net with squeeze and excitation, B8",
    "kenken": "KenKen, small, 8 loops",
    "soliton": "soliton LM, B8 T128",
    "resolvent": "resolvent LM, B8 T128",
}
"""How each model is called on the page, in its order."""

Row = tuple[str, ...]


def write_page(record: dict[str, Any]) -> None:
    """Fill the tables of the page."""
    PAGE.write_text(filled(PAGE.read_text(), tables(record)))


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Every table by its name."""
    return {
        "plans": markdown(
            ("model", "", "casts", "MB cast", "MB saved", "gradient error"),
            list(_counts(record["counts"])),
        ),
        "plans_ahead": markdown(
            ("model", "", *("casts, forward", "MB", "casts, backward", "MB")),
            list(_ahead(record["casts, ahead of time"])),
        ),
        "plans_times": markdown(
            ("model", "runs", "torch.autocast", "plan", "torch.autocast again"),
            list(_times(record)),
        ),
        "plans_inference": markdown(
            ("model", *("torch.autocast", "plan", "kept weights", "autocast again")),
            list(_inference(record["inference"])),
        ),
        "gradient_flow": markdown(
            (
                "model",
                "largest gradient",
                "nothing overflows fp16 up to",
                "suggested scale",
                "lost at scale 1, at 2^10, worst gradient",
            ),
            list(_flows(record["gradient flow"])),
        ),
        "gradient_flow_times": markdown(
            ("model", "step", "a sample counted", "all counted", "step again"),
            list(_flow_times(record["gradient flow"])),
        ),
    }


def _counts(record: dict[str, Any]) -> Iterator[Row]:
    for key, name in NAMES.items():
        if key not in record:
            continue
        model = record[key]
        for way in ("torch.autocast", "plan"):
            cost = model[way]
            cast, saved = (
                _with_change(cost[f"bytes_{what}"], model["torch.autocast"], what)
                for what in ("cast", "saved")
            )
            error = f"{cost['gradient_error']:.3e}".replace("e-0", "e-")
            shown = name if way == "torch.autocast" else ""
            yield shown, way, str(cost["num_casts"]), cast, saved, error


def _with_change(num_bytes: int, rival: dict[str, int], what: str) -> str:
    """Megabytes, and how many more or fewer than the rival's."""
    text, change = f"{num_bytes / 1e6:.3g}", num_bytes / rival[f"bytes_{what}"] - 1
    return text if not change else f"{text} ({100 * change:+.1f} %)"


def _ahead(record: dict[str, Any]) -> Iterator[Row]:
    for key, name in NAMES.items():
        if key not in record:
            continue
        for way, found in record[key].items():
            cells = (
                str(found[f"casts, {stage}"])
                if what == "casts"
                else f"{found[f'bytes, {stage}'] / 1e6:.3g}"
                for stage in ("forward", "backward")
                for what in ("casts", "bytes")
            )
            yield name if way == "torch.autocast" else "", way, *cells


def _times(record: dict[str, Any]) -> Iterator[Row]:
    kinds = {"eager": "operator by operator", "inductor": "generated kernels"}
    for inner, runs in kinds.items():
        found = record.get(f"times, {inner}", {})
        for key, name in NAMES.items():
            if key in found:
                model = found[key]
                base = f"{model['torch.autocast, ms']:.0f} ms"
                ratios = (
                    _with_quartiles(
                        model[f"{way}, ratio"], model[f"{way}, quartiles of ratios"]
                    )
                    for way in ("plan", "torch.autocast again")
                )
                yield name.partition(",")[0], runs, base, *ratios


def _inference(record: dict[str, Any]) -> Iterator[Row]:
    ways = ("plan", "plan, kept weights", "torch.autocast again")
    for key, found in record.items():
        if key in NAMES:
            ratios = (
                _with_quartiles(
                    found[f"{way}, ratio"], found[f"{way}, quartiles of ratios"]
                )
                for way in ways
            )
            base = f"{found['torch.autocast, ms']:.1f} ms"
            yield NAMES[key].partition(",")[0], base, *ratios


def _with_quartiles(ratio: float, quartiles: list[float]) -> str:
    return f"{ratio:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]"


def _flows(record: dict[str, Any]) -> Iterator[Row]:
    for key, name in NAMES.items():
        if key in record:
            flow = record[key]
            lost = map(_percent, flow["lost at scale 1, at 2^10"])
            yield (
                name.partition(",")[0],
                f"2^{flow['largest gradient']:.0f}",
                f"2^{flow['largest scale']:.0f}",
                f"2^{flow['suggested scale']:.0f}",
                ", ".join(lost),
            )


def _percent(share: float) -> str:
    """A share in words, with two digits at most."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _flow_times(record: dict[str, Any]) -> Iterator[Row]:
    ways = ("sampled", "counted whole", "plain again")
    for key, name in NAMES.items():
        if key in record:
            found = record[key]
            ratios = (
                _with_quartiles(
                    found[f"slow-down, {way}"], found[f"slow-down, {way}, quartiles"]
                )
                for way in ways
            )
            yield name.partition(",")[0], f"{found['plain, ms']:.0f} ms", *ratios
