from __future__ import annotations

import subprocess
import sys

import pytest

from castwise.errors import RuleError
from castwise.policy.ops import (
    CATEGORIES,
    DEFAULT_TABLE,
    OUTER_OPERATORS,
    OperatorEntry,
    OperatorGroup,
    OperatorTable,
    operator_name,
)


@pytest.mark.parametrize(
    ("op", "category"),
    [
        ("linear", "low"),
        ("scaled_dot_product_attention", "low"),
        ("softmax", "fp32"),
        ("layer_norm", "fp32"),
        ("index_put", "widest"),
        ("relu", "as_is"),
    ],
)
def test_the_default_table_decides(op: str, category: str) -> None:
    """Matrix products run low, sums and norms in fp32, the rest as it comes."""
    assert DEFAULT_TABLE.category(op) == category


@pytest.mark.parametrize("name", ["softmax", "aten::softmax.int", "aten.softmax.int"])
def test_overloads_and_namespaces_share_one_entry(name: str) -> None:
    """An operator may be named as the profiler, the dispatcher or a person does."""
    assert operator_name(name) == "softmax"
    assert DEFAULT_TABLE.category(name) == "fp32"


def test_an_inner_operator_follows_the_outer_one() -> None:
    """`vmap` decomposes softmax first: the rule on softmax must still hold."""
    table = DEFAULT_TABLE.with_category("softmax", "as_is", "measured harmless")
    assert table.category("_softmax") == "as_is"
    assert table.explain("_softmax") == (
        "_softmax: as_is (through softmax: measured harmless)"
    )


def test_an_own_entry_beats_the_outer_one() -> None:
    """A rule on the inner operator is more exact than one on the outer."""
    table = DEFAULT_TABLE.with_category("_softmax", "low", "a test")
    assert (table.category("softmax"), table.category("_softmax")) == ("fp32", "low")


def test_outer_operators_are_not_inner_ones_themselves() -> None:
    """Inheritance is one step deep, so that explain names the deciding entry."""
    assert not set(OUTER_OPERATORS) & set(OUTER_OPERATORS.values())


def test_a_table_is_changed_by_making_another() -> None:
    """The default is shared by everybody and must never change."""
    before = DEFAULT_TABLE.digest()
    table = DEFAULT_TABLE.with_category("aten::linear.default", "fp32", "a test")
    assert table.category("linear") == "fp32"
    assert DEFAULT_TABLE.category("linear") == "low"
    assert DEFAULT_TABLE.digest() == before != table.digest()
    assert len(table.entries) == len(DEFAULT_TABLE.entries)


def test_the_digest_is_of_what_the_table_does() -> None:
    """Compiled code is cached by the digest: reasons must not recompile."""
    one = DEFAULT_TABLE.with_category("linear", "fp32", "one reason")
    two = DEFAULT_TABLE.with_category("linear", "fp32", "another")
    assert one.digest() == two.digest()


def test_an_entry_that_only_restates_the_default_keeps_the_digest() -> None:
    """`as_is` is what an absent entry means."""
    assert (
        DEFAULT_TABLE.with_category("relu", "as_is", "said aloud").digest()
        == DEFAULT_TABLE.digest()
    )


def test_explain_names_category_and_reason() -> None:
    """A person asks why an operator runs as it does."""
    assert DEFAULT_TABLE.explain("linear").startswith("linear: low (matrix products")
    assert "no entry" in DEFAULT_TABLE.explain("relu")


def test_tables_are_values() -> None:
    """Equal contents are equal, hash alike and survive a copy."""
    again = OperatorTable(entries=tuple(DEFAULT_TABLE.entries))
    assert again == DEFAULT_TABLE
    assert hash(again) == hash(DEFAULT_TABLE)


def test_every_entry_has_a_reason() -> None:
    """An operator nobody can defend does not belong in the table."""
    assert all(entry.because for entry in DEFAULT_TABLE.entries)
    assert {entry.category for entry in DEFAULT_TABLE.entries} <= set(CATEGORIES)


def test_an_operator_in_two_groups_is_refused() -> None:
    """Two categories for one operator contradict each other."""
    low = OperatorGroup(category="low", because="a", ops="mm bmm")
    high = OperatorGroup(category="fp32", because="b", ops="exp mm")
    with pytest.raises(RuleError, match="'mm' needs one category, got low and fp32"):
        OperatorTable.of(low, high)


def test_an_unknown_category_is_refused() -> None:
    """The message lists the categories there are."""
    with pytest.raises(RuleError, match="low, fp32, widest, as_is, got 'half'"):
        DEFAULT_TABLE.with_category("mm", "half", "a test")  # type: ignore[arg-type]


def test_an_overload_is_no_entry() -> None:
    """Overloads inherit; an entry for one of them would never be found."""
    with pytest.raises(RuleError, match="write 'softmax'"):
        OperatorEntry(op="softmax.int", category="low", because="a test")


def test_unsorted_entries_are_refused() -> None:
    """Lookup is by bisection."""
    with pytest.raises(RuleError, match="sorted"):
        OperatorTable(entries=DEFAULT_TABLE.entries[::-1])


def test_the_room_loads_no_torch() -> None:
    """A policy is read by tools that must answer at once."""
    code = "import sys, castwise.policy.ops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
