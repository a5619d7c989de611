"""What a stage rule asks of each operator: one format forward, another one backward.

A rule such as `stage: backward, precision: c=fp32` on a module that computes in bf16
gives each operator of the module a pair of formats, by the operator table:

    module computes     the table says low    otherwise
    bf16 or fp16        that format           fp32
    fp32 or fp64        that format           that format

read once for the forward, and once for the backward. Values of the module are held in
fp32, or in fp64 where its backward computes in fp64, so that no gradient on its way is
held in less than what computes it. An operator whose pair is the held format twice is
left as it is; every other one is taken apart (see `apart`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F  # noqa: N812 -- its name everywhere

from castwise.dtypes import dtype_of, format_of
from castwise.errors import PolicyError
from castwise.graph import operators
from castwise.graph.values import storages
from castwise.islands.border import LOW

if TYPE_CHECKING:
    import torch
    from torch import fx

    from castwise.policy.ops import Category

_DROPOUT_AT = {"scaled_dot_product_attention": 4}
"""Where the probability of a dropout stands, in functions without a signature."""

_RECURRENT = frozenset({"gru", "lstm", "rnn_relu", "rnn_tanh"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Apart:
    """The formats of one operator whose stages differ."""

    forward: torch.dtype
    """What its forward computes in."""

    backward: torch.dtype
    """What its backward computes in."""

    held: torch.dtype
    """What its inputs come in, and its results go out in."""

    def __str__(self) -> str:
        return f"{format_of(self.forward)}, its backward in {format_of(self.backward)}"


def held_in(backward: str) -> str:
    """What the values of a module are held in, by the format of its backward."""
    return "fp64" if backward == "fp64" else "fp32"


def formats_apart(category: Category, forward: str, backward: str) -> Apart | None:
    """The formats of an operator's stages; none where both are the held one."""
    held = held_in(backward)
    found = [
        compute if compute not in LOW or category == "low" else "fp32"
        for compute in (forward, backward)
    ]
    if found == [held, held]:
        return None
    one, other = map(dtype_of, found)
    return Apart(forward=one, backward=other, held=dtype_of(held))


def is_view(node: fx.Node) -> bool:
    """Whether a node hands out memory of an input: nothing is computed."""
    own = storages(node)
    return any(own & storages(source) for source in node.all_input_nodes)


def check_repeatable(node: fx.Node, name: str, module: str) -> None:
    """Refuse an operator that cannot be run again for its backward.

    Raises:
        PolicyError: It draws random numbers, or keeps states of its own.
    """
    if name in _RECURRENT:
        problem = "is a recurrent layer"
    elif _drops(node, name):
        problem = "draws random numbers"
    else:
        return
    raise PolicyError(
        f"a plan runs an operator again for a backward of its own, but {node.name} "
        f"({name}) in {module!r} {problem}; leave out the rule's stage, or use "
        "castwise.prepare"
    )


def _drops(node: fx.Node, name: str) -> bool:
    """Whether a call drops values at random."""
    at = _DROPOUT_AT.get(name)
    if at is not None:
        given = node.args[at] if at < len(node.args) else 0.0
        return bool(node.kwargs.get("dropout_p", given))
    if "dropout" not in name and name not in operators.COMPOSITES:
        return False
    asked = _arguments(node, name)
    if asked is None:
        return True  # whatever it is, it has dropout in its name
    probability = asked.get("p", asked.get("dropout_p", 0.5))
    return bool(probability) and bool(asked.get("training", asked.get("train", True)))


def _arguments(node: fx.Node, name: str) -> dict[str, Any] | None:
    """The arguments of a call by name, those left out included."""
    function = getattr(F, name, None)
    if function is None or node.op != "call_function":
        return None
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return dict(bound.arguments)
