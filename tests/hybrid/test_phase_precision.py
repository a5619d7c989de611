"""Formats by phase: presets, precedence, the estimate, and the policy they make."""

from __future__ import annotations

import pytest

from castwise.errors import FormatError, PhaseError, SettingsError
from castwise.hybrid import MixedPrecisionConfig
from castwise.policy import PHASES, Policy, preset

EXAMPLE = {"warmup": 0.1, "full": 0.2, "predict": 0.6, "correct": 0.1}


def formats(config: MixedPrecisionConfig) -> list[str]:
    """What the four phases compute in."""
    return [config.precision_for_phase(phase) for phase in PHASES]


def test_default_predicts_in_bf16() -> None:
    """Whatever computes a gradient stays in fp32."""
    config = MixedPrecisionConfig.default()
    assert formats(config) == ["fp32", "fp32", "bf16", "fp32"]
    assert config == MixedPrecisionConfig()


def test_conservative_is_fp32_whatever_is_set() -> None:
    """Switched off, nothing else counts."""
    config = MixedPrecisionConfig.conservative()
    assert not config.enabled
    assert formats(config.with_phase_precision("full", "bf16")) == ["fp32"] * 4


def test_aggressive_really_differs_from_default() -> None:
    """bf16 in every phase, corrections included, over fp32 weights."""
    config = MixedPrecisionConfig.aggressive()
    assert formats(config) == ["bf16"] * 4
    assert config.policy().base_precision(phase="correct").param == "fp32"


def test_what_is_set_goes_before_what_is_recommended_before_the_default() -> None:
    """Explicit > recommended > default."""
    config = MixedPrecisionConfig(default_precision="fp16")
    assert formats(config) == ["fp32", "fp32", "bf16", "fp32"]
    config.auto_recommend = False
    assert formats(config) == ["fp16"] * 4
    config.set_phase_precision("full", "bf16")
    assert formats(config) == ["fp16", "bf16", "fp16", "fp16"]


def test_with_leaves_the_original_alone() -> None:
    """`with_` returns, `set_` changes."""
    config = MixedPrecisionConfig.default()
    other = config.with_phase_precision("predict", "fp16").with_phase_precision(
        "full", "fp32"
    )
    assert config.phase_precisions == {}
    assert formats(other) == ["fp32", "fp32", "fp16", "fp32"]


def test_the_example_uses_70_percent() -> None:
    """0.1 + 0.2 + 0.6 / 2 + 0.1, with predictions in bf16."""
    used = MixedPrecisionConfig.default().estimate_memory_savings(EXAMPLE)
    assert used == pytest.approx(0.70, abs=1e-6)


def test_shares_need_not_add_up_to_one() -> None:
    """Left-out phases do not count; steps are as good as shares."""
    config = MixedPrecisionConfig.default()
    assert config.estimate_memory_savings({"predict": 3.0, "full": 1.0}) == 0.625
    assert config.estimate_memory_savings({"predict": 17}) == 0.5
    assert config.estimate_memory_savings({}) == 1.0
    assert config.estimate_memory_savings({"full": 0.0}) == 1.0
    conservative = MixedPrecisionConfig.conservative()
    assert conservative.estimate_memory_savings(EXAMPLE) == 1.0
    assert MixedPrecisionConfig.aggressive().estimate_memory_savings(EXAMPLE) == 0.5


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    """The message names the phase."""
    with pytest.raises(SettingsError, match="share of full"):
        MixedPrecisionConfig().estimate_memory_savings({"predict": 1.0, "full": share})


def test_unknown_phases_and_formats_are_refused() -> None:
    """Each with the list of those there are."""
    config = MixedPrecisionConfig()
    with pytest.raises(PhaseError, match="warmup, full, predict, correct"):
        config.set_phase_precision("train", "bf16")
    with pytest.raises(FormatError, match="bf16"):
        config.set_phase_precision("full", "bf61")
    with pytest.raises(SettingsError, match="emulated"):
        config.set_phase_precision("full", "fp8_e4m3")
    with pytest.raises(PhaseError):
        config.estimate_memory_savings({"train": 1.0})


def test_plain_values_round_trip() -> None:
    """Every field off its default."""
    config = MixedPrecisionConfig(
        enabled=False,
        default_precision="bf16",
        phase_precisions={"full": "fp16"},  # type: ignore[dict-item]
        auto_recommend=False,
    )
    assert MixedPrecisionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enable": True}, "no key 'enable'"),
        ({"enabled": "yes"}, "true or false"),
        ({"phase_precisions": "bf16"}, "lines such as"),
    ],
)
def test_malformed_values_are_refused(values: dict[str, object], message: str) -> None:
    """What a YAML file may hold."""
    with pytest.raises(SettingsError, match=message):
        MixedPrecisionConfig.from_dict(values)


@pytest.mark.parametrize("name", ["default", "conservative", "aggressive"])
def test_presets_agree_with_the_policies_of_their_names(name: str) -> None:
    """One meaning for one word."""
    mine = getattr(MixedPrecisionConfig, name)().policy()
    for phase in PHASES:
        own = mine.base_precision(phase=phase)
        theirs = preset(name).base_precision(phase=phase)
        assert (own.param, own.compute, own.output) == (
            theirs.param,
            theirs.compute,
            theirs.output,
        )


def test_islands_of_a_policy_hold_in_every_phase() -> None:
    """Rules on phases come after rules on modules."""
    base = Policy(name="mine").with_rule(module="solver", precision="fp32")
    policy = MixedPrecisionConfig.aggressive().policy(over=base)
    assert [rule.module for rule in policy.rules] == ["solver", *[None] * 4]
    assert policy.base_precision(phase="full").compute == "bf16"


def test_fp16_with_a_backward_asks_for_a_loss_scale() -> None:
    """fp16 predictions need none, fp16 gradients do."""
    config = MixedPrecisionConfig.conservative()
    config.enabled = True
    low = config.with_phase_precision("predict", "fp16").policy()
    assert low.decide_loss_scale().value == "none"
    low = config.with_phase_precision("correct", "fp16").policy()
    assert low.decide_loss_scale().value == "dynamic"
