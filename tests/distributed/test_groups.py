from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from castwise.distributed.formats import Gather, WeightFormats, mixed_precision
from castwise.distributed.groups import plan_groups
from castwise.errors import IslandError, SettingsError
from castwise.islands import module_facts
from castwise.policy import Policy, Precision, preset


class Block(nn.Module):
    """A norm, attention of torch's own, and products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.up = nn.Linear(6, 23)
        self.down = nn.Linear(23, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then widen and narrow."""
        normed = self.norm(x)
        mixed, _ = self.attention(normed, normed, normed)
        out: torch.Tensor = self.down(self.up(mixed).relu())
        return out


class Net(nn.Module):
    """A tied embedding, blocks, a solver with blocks of its own, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.solver = Block()
        self.solver.steps = nn.ModuleList([nn.Linear(6, 6, bias=False)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed, run the blocks and the solver, and read out."""
        hidden = self.embed(x)
        for block in (*self.blocks, self.solver, *self.solver.steps):
            hidden = block(hidden)
        out: torch.Tensor = self.head(hidden)
        return out


FP32 = ("fp32", "fp32", "fp32")
LOW = ("fp32", "bf16", "fp32")


def groups(
    policy: Policy,
    model: nn.Module | None = None,
    *,
    units: list[str] | None = None,
    gather: Gather = "low",
) -> dict[str, tuple[str, str, str]]:
    """The module of each group -> stored, gathered, reduced."""
    model = model or Net()
    planned = plan_groups(model, policy.bind(module_facts(model)), units, gather)
    assert sum(each.num_weights for each in planned) == sum(
        weight.numel() for weight in model.parameters()
    )
    found = {each.fqn: each.formats for each in planned}
    return {k: (v.stored, v.gathered, v.reduced) for k, v in found.items()}


def test_products_travel_low_and_the_rest_as_it_is_stored() -> None:
    """The attention of torch uses its projection without calling it: one group."""
    found = groups(preset("bf16-mixed"), nn.ModuleList([Block()]).append(Block()))
    expected = {"": FP32}
    for at in "01":
        expected |= {at: LOW, f"{at}.norm": FP32, f"{at}.attention": FP32}
    assert found == expected


def test_a_shared_weight_is_gathered_around_all_that_share_it() -> None:
    """An embedding needs fp32, so its tied head may not be rounded either."""
    found = groups(preset("bf16-mixed"))
    assert found[""] == FP32
    assert "embed" not in found
    assert "head" not in found
    assert found["blocks.1"] == LOW


def test_layers_that_share_weights_are_no_units() -> None:
    """Whichever ran first would take the weight away from the other."""
    model = nn.Sequential(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    model[0][1].weight = model[0][0].weight  # type: ignore[index]
    assert groups(preset("bf16-mixed"), model) == {"": LOW}


def test_islands_are_groups_of_their_own_and_reduce_in_their_format() -> None:
    """Also under bf16-true, whose r=bf16 an island does not take over."""
    policy = preset("bf16-true").with_rule(
        module="solver", precision="p=fp32,c=fp32,o=bf16"
    )
    low = ("bf16", "bf16", "bf16")
    found = groups(policy)
    assert found == {
        "": low,
        "blocks.0": low,
        "blocks.1": low,
        "solver": FP32,
        "solver.steps.0": FP32,
    }
    stated = policy.with_rule(module="blocks.0", precision="p=fp32,c=fp32,r=bf16")
    assert groups(stated)["blocks.0"] == ("fp32", "fp32", "bf16")


def test_an_island_whose_weights_are_cast_is_one_group() -> None:
    """fp64 over fp32 weights casts all of them when the island begins."""
    rule = preset("bf16-mixed").with_rule(module="solver", precision="c=fp64,o=fp32")
    found = groups(rule)
    assert found["solver"] == FP32
    assert "solver.steps.0" not in found
    held = preset("bf16-mixed").with_rule(module="solver", precision="fp64")
    found = groups(held)
    assert found["solver"] == found["solver.steps.0"] == ("fp64", "fp64", "fp64")


def test_weights_that_fit_into_no_group_are_refused() -> None:
    """A cast island needs all its weights at once, in one stored format."""
    policy = (
        preset("bf16-mixed")
        .with_rule(module="solver.norm", precision="p=bf16")
        .with_rule(module="solver", precision="c=fp64,o=fp32")
    )
    with pytest.raises(IslandError, match=r"'solver.norm' .*bf16.* give both one p="):
        groups(policy)


def test_formats_that_differ_split_a_unit() -> None:
    """FSDP2 wants one stored and one reduced format in a group."""
    policy = preset("bf16-true").with_rule(type="LayerNorm", precision="p=fp32")
    found = groups(policy)
    assert found["blocks.0.norm"] == FP32
    assert found["blocks.0"] == ("bf16", "bf16", "bf16")


def test_the_operator_table_and_every_phase_decide_what_may_travel_low() -> None:
    """A weight is rounded for its journey only where every product rounds it."""
    table = preset("bf16-mixed").with_rule(op="linear", precision="c=fp32")
    assert set(groups(table).values()) == {FP32}
    phases = preset("bf16-mixed").with_phase_precision("correct", "c=fp32,o=fp32")
    assert set(groups(phases).values()) == {FP32}
    assert set(groups(preset("bf16-mixed"), gather="stored").values()) == {FP32}


def test_weights_of_reparametrized_products_do_not_travel_low() -> None:
    """What is normalised before the product must not be rounded before that."""
    policy = preset("bf16-mixed")
    plain, changed = nn.Linear(5, 3), nn.Linear(5, 3)
    nn.utils.parametrizations.weight_norm(changed)
    assert groups(policy, nn.Sequential(plain)) == {"": LOW}
    assert set(groups(policy, nn.Sequential(changed)).values()) == {FP32}
    changed = nn.Linear(5, 3)
    changed.register_parameter("low_rank", nn.Parameter(torch.ones(5, 1)))
    assert groups(policy, nn.Sequential(changed)) == {"": FP32}


def test_complex_weights_stay_as_they_are() -> None:
    """A cast to a real format would drop half of them."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    planned = plan_groups(
        model, preset("bf16-mixed").bind(module_facts(model)), None, "low"
    )
    words = {each.fqn: each.formats.mixed_precision() for each in planned}
    assert words["1"] == MixedPrecisionPolicy(cast_forward_inputs=False)


def test_the_caller_may_name_units() -> None:
    """Instead of the members of lists; a glob that names nothing is an error."""
    found = groups(preset("bf16-mixed"), units=["*.up"])
    assert "blocks.0" not in found
    assert found["blocks.0.up"] == LOW
    with pytest.raises(SettingsError, match=r"'layers\.\*' names none"):
        groups(preset("bf16-mixed"), units=["layers.*"])


def test_each_group_says_why_it_is_one() -> None:
    """For a person who wonders about the number of messages."""
    model = Net()
    policy = preset("bf16-mixed").with_rule(module="solver", precision="fp32")
    planned = plan_groups(model, policy.bind(module_facts(model)), None, "low")
    because = {each.fqn: each.because for each in planned}
    assert because["solver"] == "an island"
    assert because["blocks.1"] == "a member of 'blocks'"
    assert because["blocks.1.norm"] == "its weights are needed in fp32"
    assert str(planned[0]).startswith("the whole model: 66 numbers stored in fp32")


def test_a_policy_is_said_in_the_words_of_fsdp2() -> None:
    """With casts by FSDP2 for loops without islands, and without them in ours."""
    precision = Precision.parse("p=fp32,c=bf16,o=fp32,r=fp32")
    assert mixed_precision(precision) == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
        cast_forward_inputs=True,
    )
    formats = WeightFormats(stored="fp32", gathered="bf16", reduced="fp32")
    assert formats.mixed_precision() == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
