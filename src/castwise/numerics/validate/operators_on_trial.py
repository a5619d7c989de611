"""Operators on trial: each one alone, on the inputs that it should have had.

An operator that is handed a wrong input returns a wrong output and is innocent. So the
reference run is recorded, and every operator of the candidate is run a second time on
what the *reference* fed it, rounded to the formats in which the candidate calls it:

    error   of that result against the reference's own
    floor   of the same operator on the same inputs in fp32

Where there is no counterpart (another kernel was chosen, or it is a backward, whose
inputs are gradients) the candidate's own inputs are taken, and the operator is run on
them in float64 for comparison.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from castwise.numerics.call_site import CallSite, CallSites
from castwise.numerics.error import NoiseRule, relative_error, share_flushed, tensors_of
from castwise.numerics.operator_call import (
    CAST,
    OperatorCall,
    Stage,
    describe,
    is_view,
    stage_now,
)
from castwise.numerics.replay import SameDraws, is_random
from castwise.policy.ops import operator_name

_WITHOUT_ROUNDING = frozenset(
    {"clone", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
    | {"zero_", "zeros_like", "ones_like", "fill_", "full", "full_like", "detach_"}
)

Basis = Literal["reference", "own"]
"""Whose inputs an operator was tried on."""

_Key = tuple[str, str | None, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorError:
    """All calls of one operator from one line, each tried alone."""

    op: str
    """ATen name without overload."""

    module: str | None
    """fqn of the module; none outside of the model."""

    stage: Stage
    """Where the calls belong."""

    where: str
    """`file:line`; in a backward, that of the forward operator."""

    format: str
    """The formats of its inputs in the candidate."""

    basis: Basis
    """Whose inputs it was tried on."""

    num_calls: int
    """How often it was tried."""

    error: float
    """Largest relative error of a result."""

    floor: float
    """Largest relative error of the same in fp32."""

    flushed: float
    """Largest share of results that became zero and should not be."""

    def joined(self, other: OperatorError) -> OperatorError:
        """The same operator over both."""
        return replace(
            self,
            num_calls=self.num_calls + other.num_calls,
            error=max(self.error, other.error),
            floor=max(self.floor, other.floor),
            flushed=max(self.flushed, other.flushed),
        )

    def holds(self, rule: NoiseRule) -> bool:
        """Whether its own error is allowed."""
        return rule.holds(self.error, self.floor)

    def __str__(self) -> str:
        place = f"{self.module}: " if self.module else ""
        return (
            f"{place}{self.op} in {self.stage} at {self.where}: {self.error:.2e} in "
            f"{self.format}, {self.floor:.2e} in fp32"
        )


def joined(errors: Iterable[OperatorError]) -> tuple[OperatorError, ...]:
    """The same operators from the same lines, each once."""
    found: dict[tuple[Any, ...], OperatorError] = {}
    for each in errors:
        key = each.op, each.module, each.stage, each.where, each.format, each.basis
        found[key] = found[key].joined(each) if key in found else each
    return tuple(found.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recorded:
    """One call of the reference run."""

    leaves: list[Any]
    result: Any
    versions: tuple[int, ...]

    def inputs(self) -> list[Any] | None:
        """What it was called with; none if that was written to since."""
        versions = tuple(each._version for each in _tensors(self.leaves))  # noqa: SLF001 -- no public way to ask
        return self.leaves if versions == self.versions else None


class ReferenceOperators(SameDraws):  # type: ignore[no-untyped-call]
    """Records what every forward operator of a reference read and wrote."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self._sites = CallSites(nn.Module() if model is None else model)
        self._calls: dict[_Key, list[_Recorded]] = defaultdict(list)
        self._num_taken: dict[_Key, int] = defaultdict(int)

    def take(self, key: _Key) -> _Recorded | None:
        """Return the next call under a key."""
        calls, at = self._calls.get(key, []), self._num_taken[key]
        self._num_taken[key] += 1
        return calls[at] if at < len(calls) else None

    def rewind(self) -> None:
        """Begin again with the first call under every key."""
        self._num_taken.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_plain = _is_tried(func) and stage_now() == "forward"
        given = _unwritten(func, args) if is_plain else args
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if is_plain:
            call = describe(func, args, kwargs, result, counts_flops=False)
            if call is not None and call.op != CAST:
                self._keep(call, given, kwargs, result)
        return result

    def _keep(
        self,
        call: OperatorCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        site = self._sites.here()
        leaves, _ = tree_flatten((args, kwargs))
        self._calls[call.op, site.module, site.where].append(
            _Recorded(
                leaves=leaves,
                result=tree_map(_kept, result),
                versions=tuple(each._version for each in _tensors(leaves)),  # noqa: SLF001 -- no public way to ask
            )
        )


class _Tally:
    """What the calls under one key came to."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.error = self.floor = self.flushed = 0.0

    def add(self, error: float, floor: float, flushed: float) -> None:
        self.num_calls += 1
        self.error = max(self.error, error)
        self.floor = max(self.floor, floor)
        self.flushed = max(self.flushed, flushed)


class OperatorsOnTrial(SameDraws):  # type: ignore[no-untyped-call]
    """Tries every operator of a candidate alone while the candidate runs."""

    def __init__(
        self,
        model: nn.Module | None,
        recorded: ReferenceOperators | None = None,
    ) -> None:
        """Make a mode to run the candidate under.

        Args:
            model: The candidate, whose modules are named.
            recorded: The reference, already run on the same batch.
        """
        super().__init__()
        self._sites = CallSites(nn.Module() if model is None else model)
        self.recorded = recorded
        """The reference that operators are tried on."""
        self._origins: dict[int, CallSite] = {}
        self._tallies: dict[tuple[Any, ...], _Tally] = {}
        self.untried: dict[str, None] = {}
        """Operators that could not run alone, in order of first appearance."""

    def errors(self) -> tuple[OperatorError, ...]:
        """What was found so far, in order of first appearance."""
        return tuple(
            OperatorError(
                op=op,
                module=module,
                stage=stage,
                where=where,
                format=fmt,
                basis=basis,
                num_calls=tally.num_calls,
                error=tally.error,
                floor=tally.floor,
                flushed=tally.flushed,
            )
            for (op, module, stage, where, fmt, basis), tally in self._tallies.items()
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_tried(func):
            return self._pass(func, types, args, kwargs)
        given = _unwritten(func, args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        call = describe(func, args, kwargs, result, counts_flops=False)
        if call is not None and not _has_fake((given, result)):
            self._try(func, call, given, kwargs, result)
        return result

    def _pass(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if stage_now() != "backward" and not isinstance(func, HigherOrderOperator):
            number = torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001 -- no public way to ask
            if number not in self._origins:
                self._origins[number] = self._sites.here()
        return result

    def _try(
        self,
        func: Any,
        call: OperatorCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        stage = stage_now()
        site = self._site(stage)
        recorded = None
        if call.op != CAST and self.recorded is not None and stage == "forward":
            recorded = self.recorded.take((call.op, site.module, site.where))
        found = _trial(func, args, kwargs, result, recorded)
        if found is None:
            self.untried[call.op] = None
            return
        basis, error, floor, flushed = found
        place = call.op, site.module, stage, site.where, call.format, basis
        self._tallies.setdefault(place, _Tally()).add(error, floor, flushed)

    def _site(self, stage: Stage) -> CallSite:
        if stage != "backward":
            site = self._sites.here()
            number = torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001 -- no public way to ask
            self._origins.setdefault(number, site)
            return site
        node = torch._C._current_autograd_node()  # noqa: SLF001 -- no public way to ask
        origin = self._origins.get(node._sequence_nr()) if node is not None else None  # noqa: SLF001 -- as above
        return origin or self._sites.here()


@functools.cache
def _is_tried(func: Any) -> bool:
    return (
        not isinstance(func, HigherOrderOperator)
        and operator_name(func._schema.name) not in _WITHOUT_ROUNDING  # noqa: SLF001 -- the schema has no public name
        and not is_view(func)
        and not is_random(func)
    )


def _unwritten(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments as they are before the operator writes to its first one."""
    is_mutable = func._schema.is_mutable  # noqa: SLF001 -- the schema has no public name
    if not is_mutable or not args or not isinstance(args[0], torch.Tensor):
        return args
    return (args[0].clone(), *args[1:])


def _trial(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    recorded: _Recorded | None,
) -> tuple[Basis, float, float, float] | None:
    """Run an operator alone; none where it cannot be, as with kernels without fp64."""
    leaves, spec = tree_flatten((args, kwargs))
    fed = None if recorded is None else recorded.inputs()
    basis: Basis = "own"
    if fed is not None and _alike(leaves, fed):
        basis = "reference"
    else:
        fed = leaves

    def run(cast: Any) -> Any:
        given, named = tree_unflatten(list(map(cast, leaves, fed)), spec)
        # Any operator comes here, with arguments in other formats than it was given;
        # what one without such a kernel raises is its own choice.
        try:
            return func(*given, **named)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:  # untried
            raise _CannotRunAloneError from error

    try:
        if basis == "reference":
            assert recorded is not None
            wanted, got = recorded.result, run(_as_candidate)
        else:
            wanted, got = run(_as_wide), result
        wanted, got = list(_compared(wanted)), list(_compared(got))
        if [each.shape for each in wanted] != [each.shape for each in got]:
            return None
        error = _worst(got, wanted)
        is_narrow = any(t.dtype.itemsize < _itemsize_fp32(t) for t in _tensors(leaves))
        floor = _worst(list(_compared(run(_as_fp32))), wanted) if is_narrow else error
    except _CannotRunAloneError:  # the verdict names it: not tried alone
        return None
    return basis, error, floor, max(map(share_flushed, got, wanted), default=0.0)


class _CannotRunAloneError(Exception):
    """An operator has no kernel for what a trial gives it."""


def _as_candidate(candidate: Any, fed: Any) -> Any:
    if not isinstance(candidate, torch.Tensor):
        return candidate
    return fed.to(candidate.dtype, copy=True)


def _as_wide(_: Any, fed: Any) -> Any:
    if isinstance(fed, torch.Tensor):
        return fed.to(_wide_dtype(fed), copy=True)
    return _wide_number_format(fed)


def _as_fp32(_: Any, fed: Any) -> Any:
    if not isinstance(fed, torch.Tensor):
        return torch.float32 if fed in _LOW else fed
    if fed.is_complex():
        return fed.to(torch.complex64, copy=True)
    return fed.to(torch.float32, copy=True) if fed.is_floating_point() else fed.clone()


_LOW = (torch.bfloat16, torch.float16)


def _wide_number_format(value: Any) -> Any:
    """A dtype among the arguments, as `sum(dtype=)` has it, is widened as well."""
    if not isinstance(value, torch.dtype):
        return value
    if value.is_complex:
        return torch.complex128
    return torch.float64 if value.is_floating_point else value


def _wide_dtype(values: torch.Tensor) -> torch.dtype:
    if values.is_complex():
        return torch.complex128
    return torch.float64 if values.is_floating_point() else values.dtype


def _itemsize_fp32(values: torch.Tensor) -> int:
    if values.is_complex():
        return 8
    return 4 if values.is_floating_point() else 0


def _alike(leaves: list[Any], fed: list[Any]) -> bool:
    """Whether two calls have the same arguments, but for formats."""
    return len(leaves) == len(fed) and all(
        other.shape == one.shape
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        else type(one) is type(other)
        for one, other in zip(leaves, fed, strict=True)
    )


def _worst(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(map(relative_error, got, wanted), default=0.0)


def _compared(result: Any) -> Iterator[torch.Tensor]:
    """Results that are compared one by one; a mean must not hide what it centres."""
    for _, each in tensors_of(result if isinstance(result, tuple) else (result,)):
        if each.numel():
            yield each


def _tensors(leaves: list[Any]) -> Iterator[torch.Tensor]:
    return (each for each in leaves if isinstance(each, torch.Tensor))


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _has_fake(values: Any) -> bool:
    leaves, _ = tree_flatten(values)
    return any(isinstance(each, FakeTensor) for each in leaves)
