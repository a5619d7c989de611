from __future__ import annotations

import pytest
import torch
from torch import nn

from castwise.layers.resolvent_mixing import ResolventMixing


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_layer_sees_only_the_past(causal: bool, length: int) -> None:
    """Changing the last token changes earlier outputs only when it may look ahead."""
    torch.manual_seed(0)
    layer = ResolventMixing(16, causal=causal)
    x = torch.randn(2, length, 16)
    y = x.clone()
    y[:, -1] += 1
    change = (layer(x) - layer(y)).abs().amax((0, 2))
    assert change[-1] > 1e-4
    if length > 1:
        assert (change[:-1] == 0).all() == causal


def test_every_parameter_learns() -> None:
    """Z and the coupling too, which earlier code left out."""
    layer = ResolventMixing(8, num_heads=3)
    layer(torch.randn(2, 33, 8)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_guard_keeps_the_potential_in_fp32() -> None:
    """Under autocast the guarded layer keeps its bits, the other loses three digits."""
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    errors = {}
    for guarded in (True, False):
        torch.manual_seed(1)
        layer = ResolventMixing(32, guarded=guarded, eta=0.3)
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors[guarded] = (layer(x).float() - plain).abs().max().item()
    assert errors[True] == 0
    assert errors[False] > 1e-3


def test_a_small_model_learns_with_it() -> None:
    """Copy the previous token: impossible without mixing, easy with it."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 2, (16, 48))
    model = nn.Sequential(nn.Embedding(2, 16), ResolventMixing(16), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(150):
        logits = model(tokens)[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].ravel())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# Dynamo reads .grad of the tensors that enter the graph after a break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_gives_the_same_gradient() -> None:
    """The resolvent runs eagerly between two graphs."""
    layer = ResolventMixing(8)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 33, 8)
    grads = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
