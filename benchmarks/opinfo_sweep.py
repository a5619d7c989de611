"""Count operators that crash because of their formats, under two kinds of region.

PyTorch describes its own operators, with sample inputs, in the OpInfo database. Every
sample that runs in fp32 is run again with some inputs in a low format, once inside
`torch.autocast` and once inside `castwise.autocast`, forward and backward. An operator
fails when any of its samples raises.

    python benchmarks/opinfo_sweep.py --fmt bf16 --samples 3 --json sweep.json

Needs `expecttest`, which PyTorch's own test tools import.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from castwise.autocast import autocast
from castwise.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CASES = {
    "all": lambda _position: True,
    "first": lambda position: position == 0,
    "rest": lambda position: position > 0,
    "second": lambda position: position == 1,
}
"""Which of a sample's floating tensors go to the low format."""

REGIONS: dict[str, Callable[[str], AbstractContextManager[Any]]] = {
    "torch.autocast": lambda fmt: torch.autocast("cpu", dtype_of(fmt)),
    "castwise": lambda fmt: autocast("cpu", fmt),
}
"""What is compared."""


@dataclass(kw_only=True)
class Tally:
    """What one region did with one case."""

    num_forward: int = 0
    """Operators with at least one sample of this case."""

    num_backward: int = 0
    """Operators of these that are differentiable."""

    forward: dict[str, str] = field(default_factory=dict)
    """Operator that failed -> first error."""

    backward: dict[str, str] = field(default_factory=dict)
    """Operator whose forward worked and whose backward failed -> first error."""


def operators(names: Iterable[str] = ()) -> list[Any]:
    """The OpInfos that run in fp32 on a CPU, or those that are named."""
    from torch.testing._internal import common_methods_invocations  # noqa: PLC0415 -- takes seconds and needs expecttest

    wanted = set(names)
    return [
        info
        for info in common_methods_invocations.op_db
        if torch.float32 in info.dtypes
        and (not wanted or info.formatted_name in wanted or info.name in wanted)
    ]


def sweep(
    infos: Iterable[Any],
    *,
    fmt: str,
    num_samples: int,
    cases: Iterable[str] = CASES,
    regions: Iterable[str] = REGIONS,
    in_place: bool = False,
) -> dict[str, dict[str, Tally]]:
    """Run every operator; returns case -> region -> tally."""
    found = {case: {region: Tally() for region in regions} for case in cases}
    for info in infos:
        op = info.inplace_variant if in_place else info.op
        if op is None:
            continue
        samples = list(_samples(info, op, num_samples))
        for case, tallies in found.items():
            mixed = [s for s in samples if case == "all" or s.num_floating > 1]
            if not mixed:
                continue
            for region, tally in tallies.items():
                _count(tally, info, op, mixed, (case, region, fmt), in_place=in_place)
    return found


@dataclass(frozen=True, kw_only=True)
class _Sample:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_floating: int
    differentiable: bool

    def cast(self, case: str, low: torch.dtype) -> tuple[tuple[Any, ...], Any]:
        """Fresh arguments in the formats of the case."""
        position = itertools.count()

        def cast_one(value: Any) -> Any:
            if not _is_floating(value):
                return value
            return _copy_of(value, low if CASES[case](next(position)) else value.dtype)

        return tree_map(cast_one, (self.args, self.kwargs))


def _samples(info: Any, op: Callable[..., Any], limit: int) -> Iterator[_Sample]:
    """The samples that work in fp32 on their own."""
    torch.manual_seed(0)
    given = info.sample_inputs("cpu", torch.float32, requires_grad=False)
    for sample in itertools.islice(given, limit):
        args = (sample.input, *sample.args)
        plain = _Sample(
            args=args,
            kwargs=sample.kwargs,
            num_floating=sum(map(_is_floating, tree_leaves((args, sample.kwargs)))),
            differentiable=False,
        )
        if _error(op, plain, "all", torch.float32, nullcontext()) is not None:
            continue
        differentiable = info.supports_autograd and not _error(
            op, plain, "all", torch.float32, nullcontext(), backward=True
        )
        yield _Sample(
            args=plain.args,
            kwargs=plain.kwargs,
            num_floating=plain.num_floating,
            differentiable=differentiable,
        )


def _count(
    tally: Tally,
    info: Any,
    op: Callable[..., Any],
    samples: list[_Sample],
    where: tuple[str, str, str],
    *,
    in_place: bool,
) -> None:
    case, region, fmt = where
    low, name = dtype_of(fmt), info.formatted_name
    differentiable = [s for s in samples if s.differentiable and not in_place]
    tally.num_forward += 1
    tally.num_backward += bool(differentiable)
    for sample in samples:
        error = _error(op, sample, case, low, REGIONS[region](fmt))
        if error is not None:
            tally.forward.setdefault(name, error)
    for sample in differentiable if name not in tally.forward else ():
        error = _error(op, sample, case, low, REGIONS[region](fmt), backward=True)
        if error is not None:
            tally.backward.setdefault(name, error)


def _error(
    op: Callable[..., Any],
    sample: _Sample,
    case: str,
    low: torch.dtype,
    region: AbstractContextManager[Any],
    *,
    backward: bool = False,
) -> str | None:
    """The first line of what the call raises, if it raises."""
    args, kwargs = sample.cast(case, low)
    leaves = [value for value in tree_leaves((args, kwargs)) if _is_floating(value)]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    torch.manual_seed(0)
    try:
        with region:
            result = op(*args, **kwargs)
        if backward:
            _backward(result, leaves)
    except Exception as error:  # noqa: BLE001 -- counting whatever is raised is the job
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _backward(result: Any, leaves: list[torch.Tensor]) -> None:
    outputs = [out for out in tree_leaves(result) if _has_graph(out)]
    if not outputs:
        raise RuntimeError("no output has a gradient")
    torch.autograd.grad(
        outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _copy_of(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers and strides; a view stays a view of a whole storage."""
    if value.layout != torch.strided:
        return value.detach().to(dtype, copy=True)
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    copy = storage.to(dtype, copy=True)
    return copy.as_strided(value.shape, value.stride(), value.storage_offset()).detach()


def table(found: dict[str, dict[str, Tally]], fmt: str) -> str:
    """The counts as text."""
    lines = [f"{'inputs in ' + fmt:<16}{'region':<16}{'forward':>16}{'backward':>16}"]
    for case, tallies in found.items():
        for region, tally in tallies.items():
            forward = f"{len(tally.forward)} of {tally.num_forward}"
            backward = f"{len(tally.backward)} of {tally.num_backward}"
            lines.append(f"{case:<16}{region:<16}{forward:>16}{backward:>16}")
    return "\n".join(lines)


def main() -> int:
    """Sweep, print the table, and fail when castwise fails anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fmt", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--samples", type=int, default=3, help="samples an operator")
    parser.add_argument("--ops", nargs="*", default=[], help="only these operators")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--regions", nargs="*", default=list(REGIONS), choices=REGIONS)
    parser.add_argument("--in-place", action="store_true", help="in-place variants")
    parser.add_argument("--json", help="write counts and errors to this file")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    found = sweep(
        operators(settings.ops),
        fmt=settings.fmt,
        num_samples=settings.samples,
        cases=settings.cases,
        regions=settings.regions,
        in_place=settings.in_place,
    )
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(table(found, settings.fmt))
    failed = {
        f"{case} {stage} {name}": error
        for case, tallies in found.items()
        for stage in ("forward", "backward")
        for name, error in getattr(tallies.get("castwise", Tally()), stage).items()
    }
    for where, error in failed.items():
        print(f"castwise fails: {where}: {error}", file=sys.stderr)
    if settings.json:
        record = {
            case: {region: asdict(tally) for region, tally in tallies.items()}
            for case, tallies in found.items()
        }
        with open(settings.json, "w") as file:  # noqa: PTH123 -- a script
            json.dump({"fmt": settings.fmt, "cases": record}, file, indent=1)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
