"""Policies by name: the YAML files of this folder, which are also its examples.

Seven names are those of Lightning's `precision=`, so that a run moves over without
thinking; three are for a run with phases. A run without phases is all `full`.

    32-true, 64-true, 16-true, bf16-true   weights, operators and outputs in one format
    16-mixed, bf16-mixed                   operators low, weights fp32
    transformer-engine                     refused: it needs kernels that are not here
    conservative                           fp32 in every phase
    default                                bf16 while predicting, fp32 otherwise
    aggressive                             bf16 in every phase over fp32 weights
"""

from __future__ import annotations

from importlib import resources

from castwise.errors import PolicyError
from castwise.policy.rules import Policy
from castwise.wording import did_you_mean, shown

PRESETS = (
    "32-true",
    "64-true",
    "16-true",
    "bf16-true",
    "16-mixed",
    "bf16-mixed",
    "conservative",
    "default",
    "aggressive",
)
"""Every preset that `preset` returns."""

_REFUSED = {
    "transformer-engine": (
        "its fp8 products run in the kernels of Transformer Engine, which castwise "
        "does not drive; take bf16-mixed, or emulate fp8 by a policy with c=fp8_e4m3"
    )
}


def preset(name: str) -> Policy:
    """Return the policy of that name.

    Raises:
        PolicyError: There is none, or it is refused with its reason.
    """
    if name in _REFUSED:
        raise PolicyError(f"the preset {name} is refused: {_REFUSED[name]}")
    if name not in PRESETS:
        raise PolicyError(
            f"need one of the presets {', '.join(PRESETS)}; got {shown(name)}"
            f"{did_you_mean(name, PRESETS)}; for a file use Policy.load"
        )
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text("utf-8")
    return Policy.parse(text, where=f"preset {name}")
