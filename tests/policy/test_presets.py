from __future__ import annotations

from pathlib import Path

import pytest

import castwise.policy.presets as presets_room
from castwise.errors import PolicyError
from castwise.policy import PHASES, PRESETS, Policy, preset

FOLDER = Path(presets_room.__file__).parent


def test_every_preset_is_a_file_and_every_file_a_preset() -> None:
    """The files are the presets; none is listed that is not there."""
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_carries_its_name_and_says_why_it_is(name: str) -> None:
    """Each file begins with the comment that teaches it, and round-trips."""
    policy = preset(name)
    assert policy.name == name
    assert policy.where == f"preset {name}"
    assert Policy.parse(policy.to_yaml()) == policy
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "full", "predict"),
    [
        ("32-true", "fp32", "fp32"),
        ("64-true", "fp64", "fp64"),
        ("16-true", "fp16", "fp16"),
        ("bf16-true", "bf16", "bf16"),
        ("16-mixed", "p=fp32,c=fp16,o=fp16,r=fp32", "p=fp32,c=fp16,o=fp16,r=fp32"),
        ("bf16-mixed", "p=fp32,c=bf16,o=bf16,r=fp32", "p=fp32,c=bf16,o=bf16,r=fp32"),
        ("conservative", "fp32", "fp32"),
        ("default", "fp32", "p=fp32,c=bf16,o=bf16,r=fp32"),
        ("aggressive", "p=fp32,c=bf16,o=bf16,r=fp32", "p=fp32,c=bf16,o=bf16,r=fp32"),
    ],
)
def test_a_preset_says_what_its_name_promises(
    name: str, full: str, predict: str
) -> None:
    """Only `default` tells the phases apart, and no preset lowers fp32 weights."""
    policy = preset(name)
    for phase in PHASES:
        expected = predict if phase == "predict" else full
        assert str(policy.base_precision(phase=phase)) == expected


def test_transformer_engine_is_refused_with_its_reason() -> None:
    """A name that Lightning knows is not mapped to something it is not."""
    with pytest.raises(PolicyError, match="kernels of Transformer Engine"):
        preset("transformer-engine")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bf16_mixed", "did you mean bf16-mixed?"),
        ("", "need one of the presets 32-true"),
        ("../../secret", "for a file use Policy.load"),
    ],
)
def test_an_unknown_preset_is_refused_with_the_list(name: str, says: str) -> None:
    """The message lists the presets and offers the nearest."""
    with pytest.raises(PolicyError) as caught:
        preset(name)
    assert says in str(caught.value)
