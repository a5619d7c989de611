from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from castwise.autocast import autocast
from castwise.islands.products import ProductsHold
from castwise.numerics.census import FormatCensus, FormatCount, observe


class Block(nn.Module):
    """A norm, an attention and a multilayer perceptron, of odd sizes."""

    def __init__(self, width: int = 15) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within each row."""
        q, k, v = self.into(self.norm(x)).chunk(3, -1)
        weights = (q @ k.mT).softmax(-1)
        return x + self.out(weights @ v)


def one_pass(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A forward in a bf16 region and a backward outside of it."""

    def call() -> None:
        with autocast("cpu", "bf16"):
            loss = model(x).square().mean()
        loss.backward()

    return call


def test_the_effective_format_is_what_ran() -> None:
    """Products run in bf16, softmax and norms in fp32, forward and backward."""
    census = observe(one_pass(Block(), torch.randn(2, 7, 15)))
    assert census.effective == "bf16"
    assert census.product_shares() == {"bf16": 1.0}
    assert census.formats_of("softmax") == ("fp32",)
    assert census.formats_of("layer_norm", "forward") == ("fp32",)
    assert census.product_shares("backward") == {"bf16": 1.0}
    assert census.num_casts > 0


def test_without_a_region_everything_is_fp32() -> None:
    """A run that was asked for bf16 and fell back must not look like bf16."""
    model, x = Block(), torch.randn(2, 7, 15)
    census = observe(lambda: model(x).sum().backward())
    assert census.product_shares() == {"fp32": 1.0}
    assert census.num_casts == 0


def test_flops_are_those_of_the_products() -> None:
    """A product of m x k with k x n takes 2 m k n operations, twice that backward."""
    linear, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    census = observe(lambda: linear(x).sum().backward())
    flops = {
        stage: sum(count.num_flops for count in census.select(stage=stage))
        for stage in ("forward", "backward")
    }
    assert flops == {"forward": 2 * 3 * 5 * 7, "backward": 2 * 2 * 3 * 5 * 7}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_is_seen_apart(*, reentrant: bool) -> None:
    """A recomputed forward runs in the formats of the first one."""
    model, x = Block(), torch.randn(2, 7, 15, requires_grad=True)

    def call() -> None:
        with autocast("cpu", "bf16"):
            y = checkpoint(model, x, use_reentrant=reentrant)
            loss = y.square().mean()
        loss.backward()

    census = observe(call)
    for op in ("addmm", "bmm", "softmax", "layer_norm"):
        forward, again = (
            census.select(op=op, stage=s) for s in ("forward", "recompute")
        )
        assert [c.format for c in forward] == [c.format for c in again]
        assert again
    assert census.product_shares("recompute") == {"bf16": 1.0}


def test_the_update_is_a_stage_of_its_own() -> None:
    """An optimizer step is neither forward nor backward."""
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def call() -> None:
        model(x).sum().backward()
        optimizer.step()

    census = observe(call)
    assert census.select(stage="update")
    assert not {c.op for c in census.select(stage="forward")} & {
        "_foreach_add_",
        "add_",
    }


def test_casts_say_from_where_to_where() -> None:
    """Bytes of casts are what a planner removes."""
    x = torch.randn(4, 5)
    census = observe(lambda: x.bfloat16().float())
    assert {c.format for c in census.select(op="cast")} == {"fp32->bf16", "bf16->fp32"}
    assert sum(c.num_bytes for c in census.counts) == 2 * (4 + 2) * 20


def test_mixed_inputs_are_named_as_such() -> None:
    """An operator that promotes by itself has inputs of several formats."""
    x = torch.randn(3)
    census = observe(lambda: x + x.bfloat16())
    assert census.formats_of("add") == ("bf16+fp32",)


def test_scalars_and_views_are_no_formats() -> None:
    """Multiplying by a number or transposing decides nothing."""
    x, scale = torch.randn(3, 4), torch.tensor(2.0, dtype=torch.float64)
    census = observe(lambda: (x.T * 3.0).mul(scale))
    assert census.formats_of("mul") == ("fp32",)
    assert {c.op for c in census.counts} == {"mul"}


def test_other_dtypes_keep_their_names() -> None:
    """A complex product is neither fp32 nor lost."""
    z = torch.randn(3, 3, dtype=torch.complex64)
    assert observe(lambda: z @ z).effective == "complex64"


def test_products_that_the_switches_round_are_not_fp32() -> None:
    """fp32 tensors whose products are rounded to tf32 compute in tf32."""
    x = torch.randn(3, 3)
    with ProductsHold("cpu", "tf32"):
        census = observe(lambda: x @ x)
    assert census.effective == "tf32"
    assert observe(lambda: x @ x).effective == "fp32"


def test_observing_changes_no_bit() -> None:
    """What was proved must be what runs unobserved."""
    model, x = Block(), torch.randn(2, 7, 15)
    one_pass(model, x)()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    observe(one_pass(model, x))
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(before) == len(after) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_summary_is_one_line() -> None:
    """The line that stands in the log and the report."""
    line = observe(one_pass(Block(), torch.randn(2, 7, 15))).summary()
    assert line.startswith("matrix products bf16 100.0 % of ")
    assert "softmax fp32" in line
    assert "layer_norm fp32" in line
    assert "casts" in line
    assert "\n" not in line


def test_nothing_observed_says_so() -> None:
    """Zero coverage must not read like success."""
    census = observe(lambda: None)
    assert census.effective is None
    assert census.summary() == "no operator was observed"


def test_a_census_survives_json() -> None:
    """Records go into metrics, checkpoints and reports."""
    census = observe(one_pass(Block(), torch.randn(2, 7, 15)))
    again = FormatCensus.from_record(json.loads(json.dumps(census.record())))
    assert again == census
    odd = FormatCensus(
        counts=(
            FormatCount(
                op="mm",
                format="fp64",
                stage="update",
                num_calls=3,
                num_bytes=5,
                num_flops=7,
            ),
        )
    )
    assert FormatCensus.from_record(odd.record()) == odd


def test_the_observer_leaves_after_an_exception() -> None:
    """A failing step must not be observed for ever."""

    def fail() -> None:
        raise KeyError("in the step")

    with pytest.raises(KeyError):
        observe(fail)
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None
