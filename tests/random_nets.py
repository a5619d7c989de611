"""Random programs with views, writes, breaks and grad modes, to find stale casts by.

A program is a list of instructions over values of one shape; each names an operator
and which earlier values it takes. It runs as a module, captured or not, in any format.
Numbers stay near one, so that errors stay near a rounding of the format.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn

ROWS, WIDTH = 4, 8


def _detached(a: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(a, weight)


def _chunked(a: Tensor) -> Tensor:
    left, right = a.chunk(2, -1)
    return torch.cat((right, left), -1)


def _iadd(target: Tensor, b: Tensor) -> None:
    target += b


def _slice(target: Tensor, b: Tensor) -> None:
    target[1:3] = b[:2]


def _index(target: Tensor, b: Tensor) -> None:
    target[torch.tensor([0, 2])] = b[:2] * 0.5


MAKES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda a, _, weight: F.linear(a, weight),
    "matmul": lambda a, b, weight: (a @ b.mT) @ (weight[:ROWS] * 0.5),
    "add": lambda a, b, _: (a + b) * 0.5,
    "mul": lambda a, b, _: a * b.tanh(),
    "gelu": lambda a, _, __: F.gelu(a),
    "softmax": lambda a, _, __: a.softmax(-1) * WIDTH,
    "norm": lambda a, _, __: F.layer_norm(a, (WIDTH,)),
    "clone": lambda a, _, __: a.clone(),
    "type": lambda a, _, weight: torch.sigmoid(a).to(weight.dtype) * 2,
    "where": lambda a, b, weight: torch.where(weight[0] > 0, a, b),
    "cat": lambda a, b, _: torch.cat((a[:, : WIDTH // 2], b[:, WIDTH // 2 :]), -1),
    "parameter": lambda a, _, weight: a * 0.5 + weight[0],
    "like": lambda a, _, __: torch.ones_like(a) * 0.5 + a,
    "detached": _detached,
    "rms": lambda a, _, __: a * (a.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt(),
}
"""Make a new value from two others and a weight."""

SEES: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda a: torch.cat((a[:, : WIDTH // 2], a[:, : WIDTH // 2]), -1),
    "rows": lambda a: a[[1, 0, 3, 2]],
    "turned": lambda a: a.transpose(0, 1).mT,
    "chunked": _chunked,
    "flat": lambda a: a.reshape(-1).view(ROWS, WIDTH),
    "expanded": lambda a: a[:1].expand(ROWS, WIDTH) + a,
}
"""See a value otherwise; most are aliases of it, some of them read back."""

WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add_": lambda target, b: target.add_(b, alpha=0.5),
    "mul_": lambda target, _: target.mul_(1.5),
    "relu_": lambda target, _: F.relu(target, inplace=True),
    "slice_": _slice,
    "view_add_": lambda target, _: target[:, ::2].add_(1.0),
    "turned_mul_": lambda target, _: target.transpose(0, 1)[2:].mul_(-1.0),
    "copy_": lambda target, b: target[0].copy_(b[1]),
    "fill_": lambda target, _: target[:, 3].fill_(0.25),
    "iadd": _iadd,
    "index_": _index,
}
"""Write to a value in place, some through a view of it."""

AVERAGE = "average_"
"""Write to a buffer."""


@dataclass(frozen=True)
class Instruction:
    """One operator and the values it takes."""

    op: str
    first: int
    second: int


class RandomNet(nn.Module):
    """A random program as a module."""

    average: Tensor

    def __init__(
        self, seed: int, *, length: int = 14, with_breaks: bool = False
    ) -> None:
        super().__init__()
        draw = random.Random(seed)
        kinds = [*MAKES, *MAKES, *SEES, *WRITES, AVERAGE]
        self.program = [
            Instruction(draw.choice(kinds), draw.randrange(99), draw.randrange(99))
            for _ in range(length)
        ]
        self.break_at = draw.randrange(length) if with_breaks else length
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            for _ in range(3)
        )
        self.register_buffer("average", torch.randn(WIDTH, generator=generator))
        self.outputs = [draw.randrange(99) for _ in range(3)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the program; hand out some of its values, aliases among them."""
        values = [x * 1.0, x + 0.5]
        self.run(self.program[: self.break_at], values)
        if self.break_at < len(self.program):
            torch._dynamo.graph_break()
            self.run(self.program[self.break_at :], values)
        chosen = [values[each % len(values)] for each in self.outputs]
        return (*chosen, values[-1].abs().sum(), F.linear(values[-1], self.weights[0]))

    def run(self, program: list[Instruction], values: list[Tensor]) -> None:
        """Run a part of the program."""
        for step in program:
            a, b = values[step.first % len(values)], values[step.second % len(values)]
            if step.op in MAKES:
                values.append(MAKES[step.op](a, b, self.weights[step.second % 3]))
            elif step.op in SEES:
                values.append(SEES[step.op](a))
            else:
                self.write(step.op, a, b, values)

    def write(self, op: str, a: Tensor, b: Tensor, values: list[Tensor]) -> None:
        """Write to a copy of a value, which is read before and after, or a buffer."""
        if op == AVERAGE:
            self.average.mul_(0.5).add_(b.detach().mean(0), alpha=0.5)
            values.append(a + self.average)
            return
        target = a.clone()
        early = F.linear(target, self.weights[1].detach())
        WRITES[op](target, b)
        values += [target, early, target.view(ROWS, WIDTH)]
