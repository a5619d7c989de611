from __future__ import annotations

import re

import pytest

from castwise.errors import PolicyError, UnmatchedRuleError
from castwise.policy import ModuleFacts, Policy

FACTS = [
    ModuleFacts(fqn=fqn, types=types)
    for fqn, types in (
        ("", ("Net", "Module")),
        ("encoder", ("Sequential", "Module")),
        ("encoder.0", ("Block", "Module")),
        ("encoder.0.norm", ("RMSNorm", "Norm", "Module")),
        ("encoder.0.linear", ("Linear", "Module")),
        ("solver", ("Solver", "Module")),
        ("solver.scan", ("Scan", "Module")),
        ("solver.scan.norm", ("RMSNorm", "Norm", "Module")),
        ("head", ("Linear", "Module")),
    )
]
MIXED = Policy(name="mixed").with_default("p=fp32,c=bf16,o=bf16,r=fp32")


def test_the_first_rule_that_matches_wins() -> None:
    """Order is precedence: the same two rules the other way round say the other."""
    norm = {"type": "Norm", "precision": "c=fp32"}
    encoder = {"module": "encoder", "precision": "c=fp16"}
    norm_first = MIXED.with_rule(**norm).with_rule(**encoder).bind(FACTS)
    encoder_first = MIXED.with_rule(**encoder).with_rule(**norm).bind(FACTS)
    assert norm_first.precision_of("encoder.0.norm").compute == "fp32"
    assert encoder_first.precision_of("encoder.0.norm").compute == "fp16"
    assert norm_first.precision_of("encoder.0.linear").compute == "fp16"
    assert norm_first.precision_of("head").compute == "bf16"


def test_a_rule_governs_everything_below_what_it_names() -> None:
    """An island on the solver holds for the scan's norm too, by name and by class."""
    for keys in ({"module": "solver"}, {"type": "Solver"}):
        bound = MIXED.with_rule(**keys, precision="fp32").bind(FACTS)
        assert str(bound.precision_of("solver.scan.norm")) == "fp32"
        assert bound.rule_of("solver.scan.norm") is bound.policy.rules[0]
        assert bound.rule_of("encoder.0.norm") is None


def test_open_fields_come_from_the_module_around_not_from_the_default() -> None:
    """A norm inside an fp64 island hands fp64 on, not the default's bf16."""
    policy = MIXED.with_rule(type="Norm", precision="c=fp32").with_rule(
        module="solver", precision="fp64"
    )
    bound = policy.bind(FACTS)
    assert str(bound.precision_of("solver.scan.norm")) == "p=fp64,c=fp32,o=fp64,r=fp64"
    assert str(bound.precision_of("encoder.0.norm")) == "p=fp32,c=fp32,o=bf16,r=fp32"


def test_as_is_takes_a_module_out_of_a_later_rule() -> None:
    """A rule that leaves everything open still wins."""
    policy = MIXED.with_rule(module="solver.scan", precision="as_is").with_rule(
        module="*.norm", precision="fp32"
    )
    bound = policy.bind(FACTS)
    assert bound.precision_of("solver.scan.norm") == MIXED.default
    assert str(bound.precision_of("encoder.0.norm")) == "fp32"


def test_stage_and_phase_choose_the_rule_but_never_the_format_of_weights() -> None:
    """Weights have one storage for the whole run."""
    policy = MIXED.with_rule(
        module="solver", stage="backward", precision="fp64"
    ).with_phase_precision("predict", "fp16")
    bound = policy.bind(FACTS)

    def said(stage: str, phase: str) -> str:
        return str(bound.precision_of("solver.scan", stage=stage, phase=phase))

    assert said("forward", "full") == "p=fp32,c=bf16,o=bf16,r=fp32"
    assert said("backward", "full") == "p=fp32,c=fp64,o=fp64,r=fp64"
    assert said("forward", "predict") == "p=fp32,c=fp16,o=fp16,r=fp16"
    assert said("backward", "predict") == "p=fp32,c=fp64,o=fp64,r=fp64"
    weights = policy.with_rule(module="solver", precision="p=bf16").bind(FACTS)
    for phase in ("full", "predict"):
        assert weights.precision_of("solver", phase=phase).param == "bf16"


def test_a_default_with_open_fields_is_filled_with_fp32() -> None:
    """Every precision that comes out is full."""
    bound = Policy().with_default("c=bf16").bind(FACTS)
    assert str(bound.precision_of("head")) == "p=fp32,c=bf16,o=fp32,r=fp32"


@pytest.mark.parametrize(
    ("keys", "near"),
    [
        ({"module": "encodr.0.norm"}, "did you mean encoder.0.norm?"),
        ({"module": "norm"}, "matches none of the 9 modules"),
        ({"type": "RMSNrom"}, "did you mean RMSNorm?"),
        ({"module": "head", "type": "Norm"}, "matches none"),
        ({"module": "re:enc"}, "matches none"),
        ({"module": "nothing", "phase": "predict"}, "matches none"),
        ({"predicate": lambda facts: len(facts.fqn) > 99}, "matches none"),
    ],
)
def test_a_rule_that_names_no_module_is_an_error(
    keys: dict[str, str], near: str
) -> None:
    """A typing mistake must not silently leave a module in bf16."""
    policy = MIXED.with_rule(module="head", precision="fp32").with_rule(
        **keys, precision="fp64"
    )
    with pytest.raises(UnmatchedRuleError) as caught:
        policy.bind(FACTS)
    assert re.match(r"test_bound\.py:\d+: rule \[", str(caught.value))
    assert near in str(caught.value)


def test_rules_without_keys_on_modules_match_any_model() -> None:
    """A phase or an operator needs no module to match."""
    policy = MIXED.with_phase_precision("predict", "bf16").with_rule(
        op="softmax", precision="c=fp32"
    )
    assert policy.bind([]).precision_of("", phase="predict").output == "bf16"


def test_an_unknown_module_is_refused_with_the_nearest() -> None:
    """Asking for a module that is not there is a mistake, not the default."""
    bound = MIXED.bind(FACTS)
    for ask in (bound.precision_of, bound.rule_of, bound.explain):
        with pytest.raises(PolicyError, match=r"did you mean encoder\.0\.norm"):
            ask("encoder.0.nrm")


def test_an_unknown_stage_or_phase_is_refused() -> None:
    """A wrong word must not silently answer with the default."""
    bound = MIXED.bind(FACTS)
    with pytest.raises(PolicyError, match="one of forward, backward, update"):
        bound.precision_of("head", stage="eval")
    with pytest.raises(PolicyError, match="one of warmup, full, predict, correct"):
        bound.rule_of("head", phase="training")


def test_explain_names_the_deciding_rule_its_line_and_its_reason() -> None:
    """One line as usual, and one for each time that another rule decides."""
    text = """\
castwise: 1
name: solver
default: p=fp32,c=bf16,o=bf16,r=fp32
rules:
  - module: solver.*
    stage: backward
    precision: fp64
    because: the adjoint loses 9 digits in fp32
  - phase: predict
    precision: c=fp16
"""
    bound = Policy.parse(text, where="policy.yaml").bind(FACTS)
    assert bound.explain("solver.scan").splitlines() == [
        "solver.scan: p=fp32,c=bf16,o=bf16,r=fp32 by the default of solver",
        (
            "solver.scan in backward: p=fp32,c=fp64,o=fp64,r=fp64 by policy.yaml:5: "
            "rule [module solver.*, stage backward], "
            "because the adjoint loses 9 digits in fp32"
        ),
        (
            "solver.scan in predict forward and update: p=fp32,c=fp16,o=bf16,r=fp32 "
            "by policy.yaml:9: rule [phase predict]"
        ),
    ]
    assert bound.explain("").startswith("the whole model: p=fp32,c=bf16")


def test_explain_op_names_the_rule_or_the_entry_of_the_table() -> None:
    """An operator's rule and the table's own reason read alike."""
    policy = MIXED.with_rule(op="exp", category="as_is", because="its input is below 1")
    bound = policy.bind(FACTS)
    assert "exp: as_is" in bound.explain_op("exp")
    assert "its input is below 1" in bound.explain_op("exp")
    assert "test_bound.py:" in bound.explain_op("exp")
    assert bound.explain_op("softmax").startswith("softmax: fp32")


def test_the_storage_of_weights_follows_the_rules_upwards() -> None:
    """A rule on a module stores what is below it; the policy stores the rest."""
    policy = (
        Policy(name="low", storage="split8")
        .with_default("bf16")
        .with_rule(module="encoder.0.norm", precision="fp32")
        .with_rule(module="encoder", storage="kahan", because="measured 1e-4")
        .with_rule(module="solver", precision="p=fp16", storage="master")
    )
    bound = policy.bind(FACTS)
    names = ("head", "encoder.0.linear", "encoder.0.norm", "solver.scan.norm", "")
    found = {fqn: bound.storage_of(fqn).value for fqn in names}
    assert found == {
        "head": "split8",
        "encoder.0.linear": "kahan",
        "encoder.0.norm": None,
        "solver.scan.norm": "master",
        "": "split8",
    }
    assert bound.explain("encoder.0.linear").endswith(
        "because measured 1e-4; weights stored as kahan (measured 1e-4)"
    )
    assert "weights" not in bound.explain("encoder.0.norm")


@pytest.mark.parametrize(
    ("fmt", "storage"), [("bf16", "split"), ("fp16", "master"), ("fp32", None)]
)
def test_no_update_is_lost_unless_somebody_asks_for_it(
    fmt: str, storage: str | None
) -> None:
    """Where the policy says nothing, 16-bit weights keep what 16 bits cannot hold."""
    silent = Policy(name="low").with_default(fmt)
    assert silent.bind(FACTS).storage_of("head").value == storage
    if storage is not None:
        assert "would lose updates" in silent.bind(FACTS).storage_of("head").because
        asked = silent.with_storage("plain").bind(FACTS).storage_of("head")
        assert asked.value == "plain"
        assert asked.because.startswith("low says so; weights will lose updates below")
