"""A bandit over phase lengths, one of whose arms is not to predict.

    net of a try = credited - paid

in real steps: `credited` ones that the fall of the loss was worth at the pace before,
and `paid` ones that verification cost, a forward being a third of a step, with the
corrective steps that a late rollback lost. Not to predict costs and brings 0. Chosen is
the arm with the largest

    mean net + mean paid * sqrt(log(1 + asked) / tries of the arm)

(after Auer, Cesa-Bianchi and Fischer 2002), or none if that is not above 0. So an arm
that brings nothing is tried when log(asked) passes the number of its tries: ever more
rarely. Means forget, half at each try, so that an arm is found again when the run has
changed. Costs are counted and not timed: a resumed run, and every process of one,
chooses the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from castwise.hybrid.phase_length import PhaseLength

ARMS = (5, 10, 20, 40, 80)
"""Lengths to choose among, beside 0."""

_MEMORY = 0.5


@dataclass(kw_only=True, slots=True)
class _Arm:
    num_tries: int = 0
    net: float = 0.0
    paid: float = 0.0

    def promise(self, num_asked: int) -> float:
        """Return what a try may bring, in steps."""
        if not self.num_tries:
            return math.inf
        hope = math.sqrt(math.log1p(num_asked) / self.num_tries)
        return self.net + self.paid * hope

    def learn(self, *, credited: float, paid: float) -> None:
        past = _MEMORY if self.num_tries else 0.0
        self.num_tries += 1
        self.net = past * self.net + (1 - past) * (credited - paid)
        self.paid = past * self.paid + (1 - past) * paid


@final
class Arms(PhaseLength):
    """Chooses a length, or none, by what lengths have brought.

    Args:
        least: Shorter arms are left out.
        most: Longer arms are left out; itself an arm.
        full_steps: Ignored; the length of a full phase is not chosen.
    """

    def __init__(self, *, least: int, most: int, full_steps: int) -> None:
        del full_steps
        inside = {arm for arm in ARMS if least <= arm <= most}
        self.lengths: Sequence[int] = sorted(inside | {most})
        self._arms = {length: _Arm() for length in self.lengths}
        self._num_asked = 0
        self._chosen = self.lengths[0]
        self._longest = most

    @property
    def length(self) -> int:
        """Steps of the arm that was chosen."""
        return self._chosen

    @property
    def cooling(self) -> int:
        """Nothing: the arm 0 is the pause."""
        return 0

    def decline(self) -> str:
        """Choose an arm; the arm 0 declines."""
        self._num_asked += 1
        allowed = [each for each in self.lengths if each <= self._longest]
        self._longest = self.lengths[-1]
        best = max(allowed, key=self._promise)
        if self._promise(best) <= 0.0:
            arm = self._arms[best]
            return (
                f"not to predict is the best arm: {best} steps, the next best, brought "
                f"{arm.net:+.2g} steps in {arm.num_tries} tries"
            )
        self._chosen = best
        return ""

    def count_real_step(self) -> None:
        """Take no notice: tries are counted when they end."""

    def accepted(self, *, credited: float, paid: float) -> None:
        """Reward the arm by what the landing brought, and not beyond belief."""
        worth = max(0.0, min(credited, 2.0 * self._chosen))
        self._arms[self._chosen].learn(credited=worth, paid=paid)

    def refused(self, *, paid: float) -> None:
        """Charge the arm with what was paid for nothing."""
        self._arms[self._chosen].learn(credited=0.0, paid=paid)

    def shorten(self) -> None:
        """Leave longer arms out of the next choice."""
        self._longest = self._chosen

    def _promise(self, length: int) -> float:
        return self._arms[length].promise(self._num_asked)

    def state_dict(self) -> dict[str, Any]:
        """Return tries, means and the choice, as plain values."""
        return {
            "arms": [asdict(self._arms[length]) for length in self.lengths],
            "num_asked": self._num_asked,
            "chosen": self._chosen,
            "longest": self._longest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._arms = {
            length: _Arm(**values)
            for length, values in zip(self.lengths, state["arms"], strict=True)
        }
        self._num_asked, self._chosen = int(state["num_asked"]), int(state["chosen"])
        self._longest = int(state["longest"])
