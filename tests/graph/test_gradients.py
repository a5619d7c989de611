from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn

import castwise as cw
from castwise.errors import TargetError
from castwise.graph import GradientFlow, gradient_flow
from castwise.graph.gradients import GradientCounter
from graph_cases import WIDTH, Attention, Llama, Tied


def rows(*shape: int) -> Tensor:
    """The same numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def flow_of(model: nn.Module, x: Tensor, **settings: object) -> GradientFlow:
    """The gradient flow of a mean of squares."""
    torch.compiler.reset()
    return gradient_flow(model, (x, torch.zeros_like(x)), F.mse_loss, **settings)  # type: ignore[arg-type]


def test_the_gradients_of_weights_are_those_of_autograd() -> None:
    """Every weight is there under its name, with the exponent of its largest number."""
    torch.manual_seed(0)
    model, x = Llama(), rows(2, 7, WIDTH)
    flow = flow_of(model, x, sample=None)
    F.mse_loss(model(x), torch.zeros_like(x)).backward()
    counted = {node.name: node for node in flow.nodes}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        top = math.frexp(float(weight.grad.abs().max()))[1] - 1
        assert counted[name].histogram.highest == top
        assert counted[name].num_elements == weight.numel()
        assert counted[name].op == "weight"


def test_a_sample_tells_what_all_numbers_tell() -> None:
    """Of every gradient: shares at any scale, and the largest exponent nearly."""
    torch.manual_seed(0)
    model, x, sample = Llama(), rows(3, 61, WIDTH), 512
    every, some = (flow_of(model, x, sample=n) for n in (None, sample))
    assert [node.name for node in every.nodes] == [node.name for node in some.nodes]
    assert max(node.histogram.total for node in some.nodes) == sample
    for whole, part in zip(every.nodes, some.nodes, strict=True):
        assert whole.histogram.total == whole.num_elements == part.num_elements
        assert whole.is_noise == part.is_noise
        if whole.num_elements <= sample:
            assert whole.histogram == part.histogram
            continue
        assert whole.histogram.highest is not None
        assert part.histogram.highest is not None
        assert 0 <= whole.histogram.highest - part.histogram.highest <= 2
        for scale in (2.0**8, 2.0**4, 1.0, 2.0**-4, 2.0**-8, 2.0**-12):
            # half a standard deviation of a share is at most 1 / 4 sqrt(512 / 8)
            assert part.shares("fp16", scale) == pytest.approx(
                whole.shares("fp16", scale), abs=0.1
            )


class Halves(nn.Module):
    """One weight in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The same layer before and behind a break."""
        h = self.layer(x)
        torch._dynamo.graph_break()
        return self.layer(h)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
@pytest.mark.parametrize("sample", [None, 4096])
def test_every_step_counts_each_gradient_once(sample: int | None) -> None:
    """Steps leave no hook behind, and graphs that share a weight share its row."""
    torch.compiler.reset()
    model = Halves()
    counter = GradientCounter(model, cw.preset("16-mixed"), sample)
    run = torch.compile(model, backend=counter)
    for num_steps in (1, 2, 3):
        run(rows(5, WIDTH)).sum().backward()
        flow = counter.flow()
        totals = {node.name: node.histogram.total for node in flow.nodes}
        assert totals["layer.weight"] == WIDTH * WIDTH, num_steps
        assert totals["layer.bias"] == WIDTH
        assert {node.num_elements for node in flow.nodes} == {
            5 * WIDTH,
            WIDTH,
            WIDTH * WIDTH,
        }


def test_a_gradient_scales_with_the_loss() -> None:
    """All that is counted is linear in the scale: exponents move together."""
    torch.manual_seed(0)
    model, x = Llama(), rows(2, 7, WIDTH)
    torch.compiler.reset()
    one = gradient_flow(model, (x, x * 0), F.mse_loss)
    torch.compiler.reset()
    large = gradient_flow(model, (x, x * 0), lambda y, t: 1024 * F.mse_loss(y, t))
    found = {node.name: node.histogram.highest for node in large.nodes}
    for node in one.telling:
        assert node.histogram.highest is not None
        assert found[node.name] == node.histogram.highest + 10


def test_the_bias_of_keys_is_told_as_noise() -> None:
    """Softmax sees no constant added to its scores: that gradient is rounding."""
    torch.manual_seed(0)

    class Separate(Attention):
        """Queries, keys and values by layers of their own."""

        def __init__(self) -> None:
            super().__init__("boolean")
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in "qkv")

        def forward(self, x: Tensor) -> Tensor:
            """Attention of one head."""
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    flow = flow_of(Separate(), rows(2, 7, WIDTH))
    assert [node.name for node in flow.nodes if node.is_noise] == ["k.bias"]
    assert "k.bias" not in {node.name for node in flow.telling}


def test_the_loss_sets_no_scale() -> None:
    """The gradient of the loss is one, in fp32; a scale is set by what comes low."""
    torch.compiler.reset()
    torch.manual_seed(0)
    tokens = torch.randint(31, (3, 7))
    flow = gradient_flow(Tied(), (tokens, None), lambda loss, _: loss)
    assert max(node.histogram.highest or 0 for node in flow.nodes) == 0
    assert flow.highest is not None
    assert flow.highest < -2
    scale = flow.suggest_scale()
    assert scale.value == min(flow.largest_scale() / 8, 2.0**24)
    assert flow.overflow(scale.value) == 0
    assert flow.overflow(flow.largest_scale() * 2) > 0
    assert flow.underflow(1.0) >= flow.underflow(scale.value)
    assert "bits are left as a margin" in scale.because


def test_a_suggested_scale_trains_fp16_without_a_skip() -> None:
    """At the scale that one batch suggests, no later gradient is infinite."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Tied()
    batches = [torch.randint(31, (3, 7)) for _ in range(7)]
    scale = gradient_flow(model, (batches[0], None), lambda loss, _: loss)
    factor = scale.suggest_scale().value
    compiled = cw.compile(model, "16-mixed", inner="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for tokens in 3 * batches:
        optimizer.zero_grad()
        loss = compiled(tokens)
        (loss * factor).backward()
        for weight in model.parameters():
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            weight.grad /= factor
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-7:]) < sum(losses[:7])


def test_gradients_that_are_not_finite_suggest_nothing() -> None:
    """A model that is broken in fp32 is for a diagnosis, not for a scale."""
    torch.compiler.reset()
    flow = gradient_flow(
        nn.Linear(3, 3), (rows(2, 3), None), lambda y, _: (y * math.inf).sum()
    )
    with pytest.raises(TargetError, match="need finite gradients"):
        flow.suggest_scale()


def test_where_nothing_is_low_no_scale_is_needed() -> None:
    """In fp32 a loss scale has no work to do, and the suggestion says so."""
    torch.manual_seed(0)
    flow = flow_of(Llama(), rows(2, 7, WIDTH), policy="32-true")
    assert not flow.telling
    assert flow.suggest_scale().value == 1
    assert "comes in a low format" in flow.summary()


def test_a_flow_is_read_by_module_and_from_its_record() -> None:
    """Findings go to reports as plain values, by module."""
    torch.manual_seed(0)
    flow = flow_of(Llama(), rows(2, 7, WIDTH))
    assert GradientFlow.from_record(flow.record()) == flow
    assert {node.module for node in flow.select("gate").nodes} == {"gate"}
    assert "gate" in flow.by_module()
    assert set(flow.formats(2.0**10)["gate.weight"]) >= {"bf16"}
    assert "gradients" in flow.summary()
