from __future__ import annotations

from typing import Any

import pytest

from castwise.errors import RuleError
from castwise.policy.keys import ModuleFacts, Rule
from castwise.policy.precision import FP32, Precision

NORM = ModuleFacts(
    fqn="encoder.layers.0.norm",
    types=("RMSNorm", "my.model.RMSNorm", "Norm", "Module", "torch.nn.Module"),
)


def rule(**keys: Any) -> Rule:
    """A rule with these keys and some precision."""
    return Rule(**{"precision": FP32, "where": "policy.yaml:7"} | keys)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"module": "encoder.layers.0.norm"}, True),
        ({"module": "*.norm"}, True),
        ({"module": "encoder.*"}, True),
        ({"module": "*"}, True),
        ({"module": "encoder"}, True),  # what contains it
        ({"module": "encoder.layers.[0-3]"}, True),
        ({"module": "norm"}, False),
        ({"module": "Encoder*"}, False),
        ({"module": "encoder.layers.1*"}, False),
        ({"module": r"re:.*\.\d+\.norm"}, True),
        ({"module": r"re:encoder\.layers\.\d+"}, True),  # what contains it
        ({"module": r"re:norm"}, False),  # the whole fqn must match
        ({"type": "RMSNorm"}, True),
        ({"type": "Norm"}, True),  # a class above it
        ({"type": "torch.nn.Module"}, True),
        ({"type": "*Norm"}, True),
        ({"type": "rmsnorm"}, False),
        ({"type": "LayerNorm"}, False),
        ({"predicate": lambda facts: facts.fqn.endswith("norm")}, True),
        ({"predicate": lambda _facts: False}, False),
        ({"module": "encoder", "type": "Norm"}, True),
        ({"module": "decoder", "type": "Norm"}, False),
        ({"module": "encoder", "type": "Linear"}, False),
        ({"phase": "predict"}, True),
    ],
)
def test_a_rule_names_a_module_when_all_its_keys_match(
    keys: dict[str, Any], names: bool
) -> None:
    """Globs cross dots, classes match with their bases, predicates see the facts."""
    assert rule(**keys).names(NORM) is names


def test_the_root_is_the_empty_fqn_and_only_a_star_names_it() -> None:
    """A rule on everything includes the model itself."""
    root = ModuleFacts(fqn="")
    assert rule(module="*").names(root)
    assert rule(module="re:").names(root)
    assert not rule(module="?*").names(root)


def test_stage_and_phase_limit_when_a_rule_holds() -> None:
    """Without them it holds always."""
    assert rule(module="*").holds_always
    assert rule(module="*").holds_in("backward", "predict")
    limited = rule(stage="backward", phase="full")
    assert not limited.holds_always
    assert limited.holds_in("backward", "full")
    assert not limited.holds_in("forward", "full")
    assert not limited.holds_in("backward", "correct")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "at least one key"),
        ({"module": ""}, "module is empty"),
        ({"module": "a\nb"}, "one line of printable text"),
        ({"type": " a"}, "without outer spaces"),
        ({"module": "a", "because": "x\ud800"}, "printable"),
        ({"stage": "forwards"}, "one of forward, backward, update"),
        ({"phase": "eval"}, "one of warmup, full, predict, correct"),
        ({"module": "re:("}, "no regular expression"),
        ({"module": "re:[[a]"}, "no regular expression"),  # re warns only
        ({"module": "re:a{4294967296}"}, "no regular expression"),
        ({"module": "a", "category": "low"}, "needs the key op"),
        ({"op": "softmax", "module": "a"}, "in the whole model"),
        ({"op": "softmax", "stage": "backward"}, "in every stage"),
        ({"op": "softmax", "category": "hi"}, "low, fp32, widest, as_is"),
        ({"op": "softmax", "category": "low"}, "got both"),
        (
            {"op": "softmax", "precision": Precision.parse("c=fp32,o=bf16")},
            "an operator only computes; write c=",
        ),
        (
            {"stage": "backward", "precision": Precision.parse("p=fp64,c=fp64")},
            "leave out p=fp64",
        ),
    ],
)
def test_an_impossible_rule_is_refused_at_its_line(
    keys: dict[str, Any], says: str
) -> None:
    """The message begins with the rule's place and gives the remedy."""
    with pytest.raises(RuleError) as caught:
        rule(**keys)
    assert str(caught.value).startswith("policy.yaml:7: ")
    assert says in str(caught.value)


def test_where_takes_no_part_in_equality_and_the_label_names_the_keys() -> None:
    """The same rule from two files is the same rule."""
    one = rule(module="a", type="B", phase="full")
    other = Rule(module="a", type="B", phase="full", precision=FP32, where="x:1")
    assert one == other
    assert one.label == "policy.yaml:7: rule [module a, type B, phase full]"


def test_a_value_is_written_as_precision_or_category() -> None:
    """Messages quote what the file says."""
    assert rule(module="a").value == "fp32"
    assert Rule(op="softmax", category="widest").value == "widest"
