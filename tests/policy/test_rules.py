from __future__ import annotations

import pytest

from castwise.errors import PolicyError, RuleError
from castwise.policy import DEFAULT_TABLE, Policy, Precision, Rule, preset

MIXED = Policy(name="mixed").with_default("p=fp32,c=bf16,o=bf16,r=fp32")


def test_a_policy_is_built_in_python_and_never_changed() -> None:
    """Each step returns another policy, and reads like its sentence."""
    policy = (
        preset("default")
        .with_phase_precision("predict", "fp16")
        .with_phase_precision("correct", "c=bf16")
        .with_rule(module="*.propagator", precision="fp32", because="residual 1e-7")
        .with_loss_scale("static:1024")
    )
    said = [(rule.phase, rule.module, rule.value) for rule in policy.rules]
    assert said == [
        (None, "*.propagator", "fp32"),  # an island holds in every phase
        ("predict", None, "fp16"),  # in the place of the preset's own
        ("correct", None, "c=bf16"),
    ]
    assert policy.loss_scale == "static:1024"
    assert preset("default").rules[0].value == "c=bf16,o=bf16"


def test_a_precision_may_be_given_as_text_or_as_itself() -> None:
    """Both mean the same rule."""
    text = MIXED.with_rule(module="a", precision="c=fp32")
    value = MIXED.with_rule(module="a", precision=Precision(compute="fp32"))
    assert text == value


def test_an_added_rule_comes_last_among_its_kind() -> None:
    """Rules on modules keep their order and stand before the last ones on phases."""
    policy = (
        MIXED.with_phase_precision("predict", "fp16")
        .with_rule(op="exp", precision="c=fp32")
        .with_rule(module="a", precision="fp32")
        .with_rule(stage="update", precision="fp64")
        .with_rule(type="B", precision="fp32")
    )
    kinds = [rule.module or rule.type or rule.op or rule.stage for rule in policy.rules]
    assert kinds == ["a", "B", None, "exp", "update"]


def test_two_rules_from_python_contradict_with_both_lines() -> None:
    """The place of a rule that is built in Python is the line that built it."""
    policy = MIXED.with_rule(module="a", precision="fp32")
    with pytest.raises(RuleError) as caught:
        policy.with_rule(module="a", precision="bf16")
    assert str(caught.value).count("test_rules.py:") == 2


@pytest.mark.parametrize("phase", ["eval", ""])
def test_an_unknown_phase_is_refused(phase: str) -> None:
    """The message lists the phases."""
    with pytest.raises(RuleError, match="one of warmup, full, predict, correct"):
        MIXED.with_phase_precision(phase, "bf16")


def test_two_rules_with_the_same_keys_and_different_values_contradict() -> None:
    """Both lines are named; the second could never hold."""
    text = """\
castwise: 1
default: bf16
rules:
  - module: solver.*
    phase: full
    precision: fp32
  - module: head
    precision: fp32
  - phase: full
    module: solver.*
    precision: c=fp32
"""
    with pytest.raises(RuleError) as caught:
        Policy.parse(text, where="policy.yaml")
    assert "policy.yaml:9: " in str(caught.value)
    assert "policy.yaml:4: " in str(caught.value)
    assert "says c=fp32" in str(caught.value)


def test_a_rule_said_twice_is_no_contradiction() -> None:
    """Nothing different is asked for; other keys are another rule."""
    policy = MIXED.with_rule(module="a", precision="fp32")
    policy = policy.with_rule(module="a", precision="fp32")
    policy = policy.with_rule(module="a", stage="backward", precision="fp64")
    assert len(policy.rules) == 3


def test_the_base_precision_follows_the_phase_and_looks_at_no_module() -> None:
    """It is what the run as a whole computes in."""
    policy = MIXED.with_rule(module="*", precision="fp64").with_phase_precision(
        "predict", "fp16"
    )
    assert policy.base_precision() == MIXED.default
    assert str(policy.base_precision(phase="predict")) == "p=fp32,c=fp16,o=fp16,r=fp16"


def test_op_rules_are_laid_over_the_operator_table_first_one_on_top() -> None:
    """The first rule on an operator wins here too; what no rule names stays."""
    policy = (
        MIXED.with_rule(op="softmax", category="low", because="measured 1e-3")
        .with_rule(op="softmax", phase="predict", precision="c=fp32")
        .with_rule(op="matmul", phase="predict", precision="c=fp32")
        .with_rule(op="gelu", precision="c=bf16")
        .with_rule(op="exp", precision="as_is")
    )
    full, predict = policy.operator_table(), policy.operator_table("predict")
    assert DEFAULT_TABLE.category("softmax") == "fp32"
    assert full.category("softmax") == predict.category("softmax") == "low"
    assert full.category("matmul") == DEFAULT_TABLE.category("matmul") == "low"
    assert predict.category("matmul") == "fp32"
    assert full.category("gelu") == "low"
    assert full.category("exp") == "as_is"
    assert full.category("log") == DEFAULT_TABLE.category("log")
    assert "measured 1e-3" in full.explain("softmax")
    assert MIXED.operator_table() == DEFAULT_TABLE


@pytest.mark.parametrize("compute", ["fp64", "fp16", "tf32", "fp8_e4m3"])
def test_an_op_rule_gives_fp32_or_the_low_format_of_the_modules(compute: str) -> None:
    """A table has one low format; anything else needs a rule on the module."""
    policy = MIXED.with_rule(op="softmax", precision=f"c={compute}")
    with pytest.raises(
        RuleError, match=r"test_rules\.py:\d+: .*\(bf16\).*category: low"
    ):
        policy.operator_table()


@pytest.mark.parametrize(
    ("policy", "expected", "because"),
    [
        (preset("16-mixed"), "dynamic", "fp16 computes in a phase with a backward"),
        (preset("16-true"), "dynamic", "6.0e-08"),
        (preset("bf16-mixed"), "none", "exponent range of fp32"),
        (preset("32-true"), "none", "exponent range of fp32"),
        (preset("default").with_phase_precision("predict", "fp16"), "none", "fp32"),
        (preset("default").with_phase_precision("full", "fp16"), "dynamic", "full"),
        (MIXED.with_rule(module="a", precision="c=fp16"), "dynamic", "fp16"),
        (
            MIXED.with_rule(module="a", stage="backward", precision="c=fp8_e5m2"),
            "none",
            "fp8 is scaled tensor by tensor",
        ),
        (
            MIXED.with_rule(module="a", phase="predict", precision="c=fp16"),
            "none",
            "fp32",
        ),
        (
            MIXED.with_rule(module="a", stage="update", precision="c=fp16"),
            "none",
            "fp32",
        ),
        (preset("16-mixed").with_loss_scale("none"), "none", "says so"),
        (MIXED.with_loss_scale("static:1024"), "static:1024", "says so"),
    ],
)
def test_the_loss_scale_is_decided_with_its_reason(
    policy: Policy, expected: str, because: str
) -> None:
    """Dynamic where a backward runs in few exponent bits, unless the policy says."""
    decision = policy.decide_loss_scale()
    assert decision.value == expected
    assert because in decision.because


@pytest.mark.parametrize(
    "text", ["", "static", "static:", "static:0", "static:nan", "static:-2", "off", "1"]
)
def test_a_wrong_loss_scale_is_refused(text: str) -> None:
    """The message says what there is."""
    with pytest.raises(PolicyError, match=r"none, dynamic or static:<number above 0>"):
        MIXED.with_loss_scale(text)


def test_a_policy_is_hashable_and_equal_by_what_it_says() -> None:
    """Where it came from makes no difference."""
    one = Policy.parse("castwise: 1\ndefault: fp32\n", where="a.yaml")
    other = Policy.parse("castwise: 1\ndefault: p=fp32,c=fp32\n", where="b.yaml")
    assert hash(one) == hash(Policy.parse(one.to_yaml()))
    assert one == Policy()
    assert one != other  # an open field is not the same text
    assert isinstance(MIXED.with_rule(module="a", precision="fp32").rules[0], Rule)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"module": "a", "storage": "splt"}, "storage needs one of master, split"),
        ({"module": "a", "phase": "full", "storage": "split"}, "in the whole run"),
        ({"op": "exp", "storage": "split"}, "in a rule on modules alone"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(
    keys: dict[str, str], message: str
) -> None:
    """Weights are stored in one way in the whole run, and operators store nothing."""
    with pytest.raises(RuleError, match=message):
        Policy().with_rule(**keys)
    with pytest.raises(PolicyError, match="storage needs one of"):
        Policy().with_storage("none")


def test_two_storages_for_the_same_modules_contradict_each_other() -> None:
    """The message says both, with the storage that each asks for."""
    policy = Policy().with_rule(module="a", storage="split")
    with pytest.raises(RuleError, match=r"storage kahan.*storage split"):
        policy.with_rule(module="a", storage="kahan")
