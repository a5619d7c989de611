from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.errors import IslandError, PolicyDocumentError, RuleError
from castwise.integrations.hosted import HostedPolicy
from castwise.integrations.model_border import BorderedModel
from castwise.islands import apply_policy, module_facts
from castwise.loss_scale import NoScale
from castwise.policy.rules import Policy

HEAD = "castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n"


def read(rules: str, head: str = HEAD) -> Policy:
    """A policy as a file says it."""
    return Policy.parse(f"{head}rules:\n{rules}", where="policy.yaml")


def model() -> nn.Sequential:
    """Two linear layers by name."""
    return nn.Sequential(OrderedDict(enter=nn.Linear(5, 5), solver=nn.Linear(5, 5)))


def put(target: nn.Module, policy: Policy) -> None:
    """Bind and apply."""
    apply_policy(target, policy.bind(module_facts(target)), "cpu")


def test_two_rules_that_contradict_name_both_lines() -> None:
    """The same keys and another value: which of them was meant?"""
    rules = (
        "  - module: solver\n    precision: fp32\n"
        "  - module: solver\n    precision: c=bf16\n"
    )
    with pytest.raises(
        RuleError,
        match=r"policy.yaml:6: rule .* says c=bf16, and policy.yaml:4: rule .* says "
        r"fp32 for the same keys; keep one of them",
    ):
        read(rules)


def test_an_island_whose_weights_belong_to_a_bf16_module_too_names_its_line() -> None:
    """Tied weights can be held in one format only."""
    tied = model()
    tied.solver.weight = tied.enter.weight
    policy = read(
        "  - module: solver\n    precision: fp32\n", f"{HEAD[:11]}\ndefault: bf16\n"
    )
    with pytest.raises(
        IslandError,
        match=r"'enter' and 'solver' share the weight 'solver.weight', .* in fp32 by "
        r"policy.yaml:4: rule .module solver.; give both the same p=, and let c= diff",
    ):
        put(tied, policy)
    assert tied.solver.weight.dtype is torch.float32, "nothing was changed"


@pytest.mark.parametrize("precision", ["c=fp8_e4m3", "o=fp8_e5m2"])
def test_fp8_without_support_and_without_emulation_names_its_line(
    precision: str,
) -> None:
    """And both remedies."""
    policy = read(
        f"  - module: solver\n    precision: {precision}\n",
        f"{HEAD}emulation: refused\n",
    )
    with pytest.raises(
        IslandError,
        match=r"'solver': policy.yaml:5: rule .* asks for fp8_e.m.*write bf16, or "
        r"emulation: allowed",
    ):
        put(model(), policy)


def test_an_answer_to_emulation_that_there_is_none_of_names_its_line() -> None:
    """In the file and in Python."""
    with pytest.raises(
        PolicyDocumentError,
        match=r"policy.yaml:3: emulation needs one of allowed, refused, got 'refuse'",
    ):
        read("  - module: a\n    precision: fp32\n", f"{HEAD}emulation: refuse\n")
    with pytest.raises(PolicyDocumentError, match="emulation needs one of"):
        Policy(emulation="never")


@pytest.mark.parametrize("way", ["prepare", "contract"])
def test_an_unknown_operator_names_its_line_and_what_was_meant(way: str) -> None:
    """A rule on an operator that PyTorch does not have would never hold."""
    policy = read("  - op: sofmax\n    precision: c=fp32\n")
    target = model()
    batch = (torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(
        RuleError, match=r"got 'sofmax' .*policy.yaml:4: rule .*did you mean softmax"
    ):
        if way == "prepare":
            run = cw.prepare(target, torch.optim.SGD(target.parameters()), policy)
            with run.step() as step:
                step.backward(target(batch[0]).sum())
        else:
            cw.contract(target, [batch], nn.functional.mse_loss, policy)


def test_a_guest_refuses_a_backward_of_the_whole_model() -> None:
    """In another loop the loss scale enters at the root; the model is left alone."""
    policy = read("  - stage: backward\n    precision: fp64\n")
    target = model()
    with pytest.raises(IslandError, match="the whole model has a backward of its own"):
        BorderedModel(target, HostedPolicy(policy), torch.device("cpu"), NoScale())
    assert type(target) is nn.Sequential


UPDATES = [
    ("fp32", "p=fp32,c=bf16,o=bf16,r=fp32", None, True),
    ("fp64", "p=fp64,c=bf16,o=bf16,r=fp32", None, True),
    ("fp32", "bf16", None, True),
    ("fp32", "bf16", "split", True),
    ("fp32", "bf16", "master", True),
    ("fp32", "fp16", "master", True),
    ("bf16", "bf16", "plain", True),
    ("bf16", "bf16", "stochastic", True),
    ("fp32", "bf16", "plain", False),
    ("fp32", "bf16", "kahan", False),
    ("bf16", "bf16", "split", False),
    ("fp64", "p=fp32,c=bf16,o=bf16,r=fp32", None, False),
    ("bf16", "p=fp32,c=bf16,o=bf16,r=fp32", None, False),
]


@pytest.mark.parametrize(("asked", "default", "storage", "holds"), UPDATES)
def test_an_update_runs_in_the_format_that_weights_are_held_in(
    asked: str, default: str, storage: str | None, *, holds: bool
) -> None:
    """A rule on the stage `update` is kept by storage and `p=`, or refused by line."""
    stored = f"storage: {storage}\n" if storage else ""
    policy = read(
        f"  - module: solver\n    stage: update\n    precision: {asked}\n",
        f"castwise: 1\ndefault: {default}\n{stored}",
    )
    if holds:
        put(model(), policy)
        return
    with pytest.raises(
        IslandError,
        match=rf"'solver': policy.yaml:\d: rule .*stage update. updates weights in "
        rf"{asked}, but they are held in .* give p={asked} in a rule without a stage",
    ):
        put(model(), policy)
