r"""Probes: how much the rounding of each unit disturbs the whole gradient.

Rounding in unit m disturbs the gradient along a direction z of the weights by

    a_m = <d gy, delta_m> + <d x, eps_m> + <z, omega_m>

where gy is the gradient of its outputs, x its inputs, and d their change when the
weights move along z. A probe measures d gy and d x as a secant: an ordinary forward and
backward at W + h z. With random signs z the mean of a_m^2 over probes estimates the
squared error of the gradient that unit m causes, without cross-talk between units; one
probe serves all units and all formats. For outputs the direction is one of the outputs
and a second backward gives <v, d out / d y_m>, so no secant is needed there.

The step h is of the size of rounding noise, not a tangent: then what jumps counts by
how often it jumps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from castwise.numerics.search.bench import Bench
from castwise.numerics.search.isolation import Rounding
from castwise.numerics.search.reference_step import Captured, Decision, Watch
from castwise.numerics.search.structure import flat, floating_in
from castwise.numerics.search.unit_play import weights_of
from castwise.numerics.search.units import Unit
from castwise.numerics.search.visits import Visitor, Visits

STEP = 1e-3
"""How far a probe moves the weights, relative to their usual size."""

_DISTANT = 0x9E3779B97F4A7C15  # keeps the streams of neighbouring seeds apart


def directions(bench: Bench, probe: int, seed: int) -> list[torch.Tensor]:
    """Random signs for every weight, a function of seed and probe alone."""
    generator = torch.Generator().manual_seed(seed * 1000 + probe + _DISTANT % 2**31)
    return [_signs(flat(weight).numel(), generator) for weight in bench.weights]


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    bits = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8)
    return bits * 2 - 1


def step_size(bench: Bench) -> float:
    """How far a probe moves each weight: small beside the smaller of the weights."""
    sizes = sorted(
        size
        for weight in bench.weights
        if (size := float(flat(weight).square().mean().sqrt())) > 0
    )
    return STEP * (sizes[len(sizes) // 4] if sizes else 1.0)


Key = tuple[str, str]
"""Unit and candidate."""


class Stacks:
    """The changes of all candidates, laid side by side for products with one tensor.

    Args:
        roundings: Unit and candidate -> what it changes.
    """

    def __init__(self, roundings: Mapping[Key, Rounding]) -> None:
        by_unit: defaultdict[str, list[tuple[Key, Rounding]]] = defaultdict(list)
        for key, rounding in roundings.items():
            by_unit[key[0]].append((key, rounding))
        self.keys = {fqn: [key for key, _ in each] for fqn, each in by_unit.items()}
        self._outputs: dict[tuple[str, int, int], torch.Tensor] = {}
        self._inputs: dict[tuple[str, int, int], torch.Tensor] = {}
        for fqn, each in by_unit.items():
            first = each[0][1]
            for at, deltas in enumerate(first.deltas):
                for place in range(len(deltas)):
                    rows = [rounding.deltas[at][place] for _, rounding in each]
                    self._outputs[fqn, at, place] = torch.stack(rows)
            for at, epsilons in enumerate(first.epsilons):
                for place, known in enumerate(epsilons):
                    found = [r.epsilons[at][place] for _, r in each]
                    if known is not None and all(e is not None for e in found):
                        rows = [e for e in found if e is not None]
                        self._inputs[fqn, at, place] = torch.stack(rows)

    def of_output(self, fqn: str, at: int, place: int) -> torch.Tensor | None:
        """The deltas of an output, one row for each candidate."""
        return self._outputs.get((fqn, at, place))

    def of_input(self, fqn: str, at: int, place: int) -> torch.Tensor | None:
        """The epsilons of an input, one row for each candidate."""
        return self._inputs.get((fqn, at, place))


class _Products(Visitor):
    """Adds up products with all changes while a model runs forward and backward."""

    def __init__(self, stacks: Stacks) -> None:
        self._stacks = stacks
        self.sums: dict[str, torch.Tensor] = {}
        self.odd: set[str] = set()
        self.num_terms: dict[str, int] = defaultdict(int)

    def enters(self, fqn: str, at: int, inputs: tuple[Any, ...]) -> None:
        if fqn in self._stacks.keys:
            for place, tensor in enumerate(floating_in(*inputs)):
                self._add(fqn, self._stacks.of_input(fqn, at, place), tensor)

    def gradient(self, fqn: str, at: int, place: int, value: torch.Tensor) -> None:
        if fqn in self._stacks.keys:
            self._add(fqn, self._stacks.of_output(fqn, at, place), value)

    def _add(self, fqn: str, rows: torch.Tensor | None, tensor: torch.Tensor) -> None:
        if rows is None:
            return
        values = flat(tensor)
        if values.numel() != rows.shape[1]:
            self.odd.add(fqn)  # it was given another amount of work this time
            return
        self.num_terms[fqn] += 1
        product = rows @ values
        self.sums[fqn] = self.sums.get(fqn, torch.zeros_like(product)) + product


class _Outputs(_Products):
    """The same for the second backward, from the output; inputs take no part."""

    def enters(self, fqn: str, at: int, inputs: tuple[Any, ...]) -> None:
        del fqn, at, inputs


class _Switch(Visitor):
    """Hands calls on to whoever is listening now."""

    def __init__(self, listener: Visitor) -> None:
        self.listener = listener

    def enters(self, fqn: str, at: int, inputs: tuple[Any, ...]) -> None:
        self.listener.enters(fqn, at, inputs)

    def gradient(self, fqn: str, at: int, place: int, value: torch.Tensor) -> None:
        self.listener.gradient(fqn, at, place, value)


def weight_products(
    module: nn.Module,
    rounding: Rounding,
    signs: Sequence[Sequence[torch.Tensor]],
    places: Mapping[int, int],
) -> list[float]:
    """<z, omega> for every probe.

    Args:
        module: The unit.
        rounding: What a candidate changes in it.
        signs: For every probe the directions of all weights.
        places: Identity of a weight -> its place among all.
    """
    totals = [0.0] * len(signs)
    for weight, omega in zip(weights_of(module), rounding.omegas, strict=True):
        if omega is None:
            continue
        place = places[id(weight)]
        for probe, direction in enumerate(signs):
            totals[probe] += float(direction[place].to(omega.dtype) @ omega)
    return totals


class Prober:
    """Runs probes, one at a time, in the reference format.

    Args:
        bench: Where the model stands.
        captured: The reference step.
        stacks: What all candidates change.
        seed: Of the directions.
        with_outputs: Whether products with the output are wanted too.
    """

    def __init__(
        self,
        bench: Bench,
        captured: Captured,
        stacks: Stacks,
        *,
        seed: int,
        with_outputs: bool,
    ) -> None:
        self._bench, self._captured, self._stacks = bench, captured, stacks
        self._seed, self._with_outputs = seed, with_outputs
        self._step = step_size(bench)
        self._still = self._products_at_rest()

    def _products_at_rest(self) -> _Products:
        """The products of the reference step, from what was captured."""
        still = _Products(self._stacks)
        for fqn in self._stacks.keys:
            for at, call in enumerate(self._captured.calls[fqn]):
                still.enters(fqn, at, call.inputs)
                for place, gradient in enumerate(call.gradients):
                    if gradient is not None:
                        still.gradient(fqn, at, place, gradient)
        return still

    def run(self, probe: int) -> tuple[dict[Key, float], dict[Key, float], list[bool]]:
        """Run one probe.

        Returns:
            Secant products for the gradient, products for the output, and for each
            decision of the reference step whether it turned over.
        """
        bench, signs = self._bench, directions(self._bench, probe, self._seed)
        moved, outward = _Products(self._stacks), _Outputs(self._stacks)
        switch = _Switch(moved)
        visits = Visits(bench.model, switch)
        watch = Watch(visits)
        batch = bench.in_reference(bench.batches[0])
        with bench.under(bench.reference) as region:
            rest = [weight.data for weight in bench.weights]
            try:
                for weight, sign in zip(bench.weights, signs, strict=True):
                    _move(weight, sign, self._step)
                with visits.watched(), watch:
                    bench.num_steps += 1
                    output, loss = bench.forward(region, batch)
                    if self._with_outputs:
                        switch.listener = outward
                        _pull(output, probe, self._seed)
                        switch.listener = moved
                    loss.backward()  # type: ignore[no-untyped-call]
            finally:
                bench.taken_gradients()
                for weight, data in zip(bench.weights, rest, strict=True):
                    weight.data = data
        return (
            self._secants(moved),
            self._by_key(outward),
            _turned(self._captured.decisions, watch.decisions),
        )

    def _secants(self, moved: _Products) -> dict[Key, float]:
        found: dict[Key, float] = {}
        for fqn, keys in self._stacks.keys.items():
            same = moved.num_terms[fqn] == self._still.num_terms[fqn]
            if fqn in moved.odd or not same:
                continue
            if not self._still.num_terms[fqn]:
                found.update(dict.fromkeys(keys, 0.0))
                continue
            change = (moved.sums[fqn] - self._still.sums[fqn]) / self._step
            found.update(zip(keys, change.tolist(), strict=True))
        return found

    def _by_key(self, products: _Products) -> dict[Key, float]:
        return {
            key: value
            for fqn, sums in products.sums.items()
            if fqn not in products.odd
            for key, value in zip(self._stacks.keys[fqn], sums.tolist(), strict=True)
        }


def _move(weight: nn.Parameter, sign: torch.Tensor, step: float) -> None:
    """Give a weight new memory in which it stands a step away."""
    moved = weight.data.clone()
    numbers = torch.view_as_real(moved) if moved.is_complex() else moved
    numbers.view(-1).add_(sign.to(numbers), alpha=step)
    weight.data = moved


def _pull(output: Any, probe: int, seed: int) -> None:
    """Run backward from the output along random signs; the graph stays."""
    generator = torch.Generator().manual_seed(seed * 1000 + probe + 500)
    tensors = [each for each in floating_in(output) if each.requires_grad]
    signs = [
        _signs(flat(each).numel(), generator).to(each.device, torch.float64)
        for each in tensors
    ]
    pulls = [
        torch.view_as_complex(sign.view(*each.shape, 2)).to(each.dtype)
        if each.is_complex()
        else sign.view(each.shape).to(each.dtype)
        for each, sign in zip(tensors, signs, strict=True)
    ]
    torch.autograd.backward(tensors, pulls, retain_graph=True)


def _turned(before: Sequence[Decision], after: Sequence[Decision]) -> list[bool]:
    if len(before) != len(after):
        return [True] * len(before)
    return [
        one.result.shape != other.result.shape
        or not torch.equal(one.result, other.result)
        for one, other in zip(before, after, strict=True)
    ]


def find_unstable(
    decisions: Sequence[Decision], turned: Sequence[Sequence[bool]]
) -> dict[str, str]:
    """Module -> the decision that turned over in a probe."""
    found: dict[str, str] = {}
    for at, decision in enumerate(decisions):
        if any(each[at] for each in turned):
            for module in decision.modules:
                found.setdefault(module, decision.op)
    return found


def unit_of(fqn: str, units: Sequence[Unit]) -> str | None:
    """The innermost unit that a module is, or is in."""
    names = {unit.fqn for unit in units}
    while fqn not in names:
        if not fqn:
            return None
        fqn = fqn.rpartition(".")[0]
    return fqn
