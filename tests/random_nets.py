"""Random programs with views, writes, breaks and grad modes, to find stale casts by.

A program is the text of a function: one line after the other makes a new value from
earlier ones, sees one otherwise, or writes to one in place. `RandomNet(seed).source`
shows it. It runs as a module, captured or not, in any format. Numbers stay near one, so
that errors stay near a rounding of the format.
"""

from __future__ import annotations

import random
import textwrap

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn

ROWS, WIDTH = 4, 8

MAKES = {
    "linear": "F.linear({a}, {w})",
    "matmul": "({a} @ {b}.mT) @ ({w}[:ROWS] * 0.5)",
    "add": "({a} + {b}) * 0.5",
    "mul": "{a} * {b}.tanh()",
    "gelu": "F.gelu({a})",
    "softmax": "{a}.softmax(-1) * WIDTH",
    "norm": "F.layer_norm({a}, (WIDTH,))",
    "clone": "{a}.clone()",
    "type": "torch.sigmoid({a}).to({w}.dtype) * 2",
    "where": "torch.where({w}[0] > 0, {a}, {b})",
    "cat": "torch.cat(({a}[:, : WIDTH // 2], {b}[:, WIDTH // 2 :]), -1)",
    "parameter": "{a} * 0.5 + {w}[0]",
    "like": "torch.ones_like({a}) * 0.5 + {a}",
    "detached": "F.linear({a}.detach(), {w}.detach())",
    "without": "without_gradients({a}, {w})",
    "rms": "{a} * ({a}.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()",
}
"""Make a new value from two others and a weight."""

SEES = {
    "half": "torch.cat(({a}[:, : WIDTH // 2], {a}[:, : WIDTH // 2]), -1)",
    "rows": "{a}[[1, 0, 3, 2]]",
    "turned": "{a}.transpose(0, 1).mT",
    "chunked": "torch.cat({a}.chunk(2, -1)[::-1], -1)",
    "flat": "{a}.reshape(-1).view(ROWS, WIDTH)",
    "expanded": "{a}[:1].expand(ROWS, WIDTH) + {a}",
}
"""See a value otherwise; most are aliases of it, some of them read back."""

WRITES = {
    "add_": "{t}.add_({b}, alpha=0.5)",
    "mul_": "{t}.mul_(1.5)",
    "relu_": "F.relu({t}, inplace=True)",
    "slice_": "{t}[1:3] = {b}[:2]",
    "view_add_": "{t}[:, ::2].add_(1.0)",
    "turned_mul_": "{t}.transpose(0, 1)[2:].mul_(-1.0)",
    "copy_": "{t}[0].copy_({b}[1])",
    "fill_": "{t}[:, 3].fill_(0.25)",
    "iadd": "{t} += {b}",
    "index_": "{t}[torch.tensor([0, 2])] = {b}[:2] * 0.5",
}
"""Write to a value in place, some through a view of it."""

AVERAGE = "average_"
"""Write to a buffer."""


def without_gradients(a: Tensor, weight: Tensor) -> Tensor:
    """A product that no gradient passes."""
    with torch.no_grad():
        return F.linear(a, weight)


class RandomNet(nn.Module):
    """A random program as a module."""

    average: Tensor

    def __init__(
        self, seed: int, *, length: int = 14, with_breaks: bool = False
    ) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.source = _program(draw, length, with_breaks=with_breaks)
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            for _ in range(3)
        )
        self.register_buffer("average", torch.randn(WIDTH, generator=generator))
        names = {"torch": torch, "F": F, "ROWS": ROWS, "WIDTH": WIDTH}
        names["without_gradients"] = without_gradients
        code = compile(self.source, f"<random program {seed}>", "exec")
        exec(code, names)  # noqa: S102 -- our own text; a loop over instructions takes Dynamo twice as long
        self.program = names["program"]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the program; it hands out some of its values, aliases among them."""
        a, b, c = (self.weights[i] for i in range(3))  # Dynamo of 2.11 takes no star
        return self.program(x, a, b, c, self.average)


def _program(draw: random.Random, length: int, *, with_breaks: bool) -> str:
    """The text of a program."""
    kinds = [*MAKES, *MAKES, *SEES, *WRITES, AVERAGE]
    break_at = draw.randrange(length) if with_breaks else length
    values, lines = ["v0", "v1"], ["v0 = x * 1.0", "v1 = x + 0.5"]
    for at in range(length):
        if at == break_at:
            lines.append("torch._dynamo.graph_break()")
        op, a, b = draw.choice(kinds), draw.choice(values), draw.choice(values)
        lines += _instruction(op, a, b, f"w{draw.randrange(3)}", values)
    chosen = ", ".join(draw.choice(values) for _ in range(3))
    last = values[-1]
    lines.append(f"return {chosen}, {last}.abs().sum(), F.linear({last}, w0)")
    body = textwrap.indent("\n".join(lines), "    ")
    return f"def program(x, w0, w1, w2, average):\n{body}\n"


def _instruction(op: str, a: str, b: str, weight: str, values: list[str]) -> list[str]:
    """The lines of one instruction; what it makes is added to the values."""
    name = f"v{len(values)}"
    if op in WRITES:
        early, view = f"v{len(values) + 1}", f"v{len(values) + 2}"
        values += [name, early, view]
        return [
            f"{name} = {a}.clone()",
            f"{early} = F.linear({name}, w1.detach())",
            WRITES[op].format(t=name, b=b),
            f"{view} = {name}.view(ROWS, WIDTH)",
        ]
    values.append(name)
    if op == AVERAGE:
        write = f"average.mul_(0.5).add_({b}.detach().mean(0), alpha=0.5)"
        return [write, f"{name} = {a} + average"]
    text = {**MAKES, **SEES}[op]
    return [f"{name} = {text.format(a=a, b=b, w=weight)}"]
