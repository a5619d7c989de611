from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, fx

from castwise.graph import operators
from castwise.policy.ops import DEFAULT_TABLE


def test_every_operator_on_the_lists_exists() -> None:
    """A name that PyTorch does not have would be a promise that nothing keeps."""
    lists = (
        operators.FOLLOWS,
        operators.IN_PLACE,
        operators.DECIDES,
        operators.LIKE,
        operators.CASTS,
        operators.COMPOSITES,
        operators.AFTER_SHAPE,
    )
    places = (torch, Tensor, F, torch.ops.aten)
    own = {"getitem", "setitem"}
    for name in frozenset().union(*lists) - own:
        assert any(hasattr(place, name) for place in places), name


def test_the_lists_do_not_contradict_the_operator_table() -> None:
    """What the table casts does not follow; what must agree in format may."""
    for name in operators.FOLLOWS | operators.DECIDES | operators.LIKE:
        assert DEFAULT_TABLE.category(name) in {"as_is", "widest"}, name


def named(function: object, *args: object, **kwargs: object) -> tuple[str, bool]:
    """Name a call, and say whether it writes."""
    graph = fx.Graph()
    first = graph.placeholder("x")
    made = (
        graph.call_method(function, (first, *args), kwargs)
        if isinstance(function, str)
        else graph.call_function(function, (first, *args), kwargs)  # type: ignore[arg-type]
    )
    return operators.name_of(made), operators.writes_first(made)


def test_spellings_of_one_operator_have_one_name() -> None:
    """Methods, functions, overloads and operators of Python are named alike."""
    import operator

    assert named("add", 1) == named(torch.add, 1) == ("add", False)
    assert named(operator.add, 1) == named(torch.ops.aten.add.Tensor, 1)
    assert named(operator.truediv, 2) == named("true_divide", 2) == ("div", False)
    assert named(F.cross_entropy, 1) == ("cross_entropy_loss", False)
    assert named(getattr, "T") == ("T", False)


def test_writes_are_seen_in_every_spelling() -> None:
    """By underscore, by operator, by keyword and by position."""
    import operator

    for call in (
        named("relu_"),
        named(F.relu, inplace=True),
        named(F.relu, True),
        named(torch.relu_),
    ):
        assert call == ("relu", True)
    assert named(operator.iadd, 1) == named("add_", 1) == ("add", True)
    assert named(operator.setitem, 0, 1.0) == ("setitem", True)
    assert named("__add__", 1) == ("add", False)
