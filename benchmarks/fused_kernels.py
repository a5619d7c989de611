"""Where compiled code leaves speed at mixed precision: norms that cast, and clipping.

Each row is one piece of work, done by operators (eager), by the kernels that Inductor
generates for the same lines (compiled), and by castwise, in turns in one process:

    layer_norm, rms_norm    fp32 rows in, bf16 out, forward and backward
    clip, fp32 and bf16     gradients divided by a loss scale, checked, clipped

Eager clipping is what `torch.amp.GradScaler` and `clip_grad_norm_` do. Times are CPU
time of one thread; ratios are of neighbouring turns, medians with quartiles, and eager
stands beside itself once more to show what they mean. Errors are relative, against the
float64 original: of outputs and of all gradients, and of the clipped gradients.

    python benchmarks/fused_kernels.py --json docs/accepted/fused_kernels.json --page
    python benchmarks/fused_kernels.py --turns 3 --rows 64 --dim 63
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from page_tables import filled, markdown
from small_lm import head_of_record
from torch import Tensor

from castwise.layers.low_norm import layer_norm, normed, rms_norm
from castwise.optim.unscale_clip import unscale_and_clip

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
SCALE, MAX_NORM = 8.0, 1.0
EAGER, AGAIN, COMPILED, OURS = "eager", "eager again", "compiled", "castwise"

Ways = dict[str, Callable[[], Any]]


def norms(args: argparse.Namespace, *, centred: bool) -> dict[str, Any]:
    """One norm, forward and backward, in every way."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(args.rows, args.dim, generator=draws).requires_grad_()
    w = torch.randn(args.dim, generator=draws).requires_grad_()
    b = torch.randn(args.dim, generator=draws).requires_grad_()
    grad = torch.randn(args.rows, args.dim, generator=draws).bfloat16()
    given = (x, w, b) if centred else (x, w)

    def layer_cast(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (args.dim,), w, b, 1e-5).bfloat16()

    def rms_cast(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (args.dim,), w, 1e-5).bfloat16()

    plain = layer_cast if centred else rms_cast
    ours = layer_norm if centred else rms_norm

    def step(run: Callable[..., Tensor]) -> list[Tensor]:
        y = run(*given)
        return [y.detach(), *torch.autograd.grad(y, given, grad)]

    exact = [each.detach().double().requires_grad_() for each in (x, w, b)]
    y = normed(exact[0], exact[1], exact[2] if centred else None, 1e-5, centred=centred)
    wanted = [y.detach(), *torch.autograd.grad(y, exact[: len(given)], grad.double())]
    compiled = torch.compile(plain)
    runs = {EAGER: plain, AGAIN: plain, COMPILED: compiled}
    ways: Ways = {name: lambda run=run: step(run) for name, run in runs.items()}
    ways[OURS] = lambda: step(lambda *given: ours(*given, eps=1e-5))
    errors = {name: _error(run(), wanted) for name, run in ways.items()}
    return {**_in_turns(ways, args.turns), "errors": errors}


def clipping(args: argparse.Namespace, fmt: torch.dtype) -> dict[str, Any]:
    """Gradients of a small transformer, unscaled, checked and clipped."""
    draws = torch.Generator().manual_seed(0)
    width = args.width
    shapes = [(width, width)] * 16 + [(4 * width, width)] * 4 + [(width,)] * 20
    kept = [torch.randn(each, generator=draws).to(fmt) for each in shapes]
    work = [each.clone() for each in kept]
    found_inf, inverse = torch.zeros(()), torch.tensor(1 / SCALE)

    def eager() -> None:
        found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(work, found_inf, inverse)
        if not found_inf.item():
            norm = torch.nn.utils.get_total_norm(work)
            torch._foreach_mul_(work, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))

    def lines(gradients: list[Tensor], inverse: Tensor) -> Tensor:
        sums = [(each.float() * inverse).square().sum() for each in gradients]
        norm = torch.stack(sums).sum().sqrt()
        factor = inverse * (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(norm.isfinite(), factor, 1.0)
        for each in gradients:
            each.mul_(factor)
        return norm

    generated = torch.compile(lines)
    ways: Ways = {
        EAGER: eager,
        AGAIN: eager,
        COMPILED: lambda: generated(work, inverse).item(),
        OURS: lambda: unscale_and_clip(work, scale=SCALE, max_norm=MAX_NORM),
    }
    wide = [each.double() / SCALE for each in kept]
    norm = math.sqrt(sum(float(each.square().sum()) for each in wide))
    wanted = [each * min(1.0, MAX_NORM / (norm + 1e-6)) for each in wide]

    def again() -> None:
        for each, before in zip(work, kept, strict=True):
            each.copy_(before)

    errors = {}
    for name, run in ways.items():
        again()
        run()
        errors[name] = _error(work, wanted)
    return {**_in_turns(ways, args.turns, again), "errors": errors}


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of any tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _in_turns(
    ways: Ways, turns: int, before: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Times of each way, and ratios to eager in the same turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name in list(ways)[:: 1 - turn % 2 * 2]:
            before()
            start = time.process_time()
            ways[name]()
            if turn >= 2:  # the first turns compile and warm
                taken[name].append(time.process_time() - start)
    rows = {}
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(times, taken[EAGER], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "fastest_milliseconds": 1e3 * min(times),
            "ratio": middle,
            "quartiles": [low, high],
        }
    pairs = zip(taken[OURS], taken[COMPILED], strict=True)
    return {
        "ways": rows,
        "ours_over_compiled": statistics.median(a / b for a, b in pairs),
    }


COLUMNS = ("work", "way", "time", "fastest", "over eager (quartiles)", "error")


def table(record: Mapping[str, Any]) -> str:
    """The table of the page."""
    rows = []
    for work, found in record["work"].items():
        for way, row in found["ways"].items():
            low, high = row["quartiles"]
            rows.append(
                (
                    work,
                    way,
                    f"{row['milliseconds']:.2f} ms",
                    f"{row['fastest_milliseconds']:.2f} ms",
                    f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
                    f"{found['errors'][way]:.1e}",
                )
            )
    return markdown(COLUMNS, rows)


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--width", type=int, default=512, help="of the gradients")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write docs/kernels.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = {
        "layer_norm": norms(args, centred=True),
        "rms_norm": norms(args, centred=False),
        "clip, fp32": clipping(args, torch.float32),
        "clip, bf16": clipping(args, torch.bfloat16),
    }
    record = {**head_of_record(args), "work": work}
    print(table(record))
    for name, found in work.items():
        print(f"{name}: castwise over compiled {found['ours_over_compiled']:.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), {"fused_kernels": table(record)}))


if __name__ == "__main__":
    main()
