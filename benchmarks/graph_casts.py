"""Casts that are left when forward and backward are captured ahead of time.

    python benchmarks/graph.py --ahead

Between Dynamo and code, AOTAutograd makes the backward, joins what is computed twice
and decides what is kept; many casts that run in eager are gone then. What Inductor
would be given is taken here, under `torch.autocast` and by a plan, and its casts are
counted, with the bytes that they read and write. Nothing is generated, so that this
takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from castwise.graph.capture import PARAMETER
from castwise.graph.planner import plan_graph
from castwise.graph.regions import widened
from castwise.graph.settings import Surroundings
from castwise.policy import preset

CASTS = frozenset({"prims.convert_element_type.default", "aten._to_copy.default"})


def casts_ahead(
    model: nn.Module, batch: tuple[Any, ...], loss_fn: Callable[[Any, Any], Any]
) -> dict[str, dict[str, int]]:
    """Casts and their bytes, by stage, under `torch.autocast` and by a plan."""
    found = {}
    for way in ("torch.autocast", "plan"):
        torch.compiler.reset()
        fresh = copy.deepcopy(model)
        count = _Count()
        backend = count.backend if way != "plan" else _planning(fresh, count.backend)
        run = torch.compile(fresh, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "plan"):
            out = widened(run(*batch[:-1]))
        loss_fn(out, batch[-1]).backward()
        found[way] = count.found
    return found


def _planning(model: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """A backend that plans a graph before it is captured ahead of time."""
    surroundings = Surroundings.of(model, preset("bf16-mixed"))

    def plan_and_capture(module: fx.GraphModule, examples: list[Any]) -> Any:
        inputs = (node for node in module.graph.nodes if node.op == "placeholder")
        for node, example in zip(inputs, examples, strict=True):
            node.meta[PARAMETER] = isinstance(example, nn.Parameter)
        plan_graph(module, surroundings, "graph")
        return backend(module, examples)

    return plan_and_capture


class _Count:
    """Counts the casts of the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        stages = ("forward", "backward")
        self.found = {
            f"{what}, {at}": 0 for at in stages for what in ("casts", "bytes")
        }
        self.backend = aot_autograd(
            fw_compiler=lambda module, _: self._run(module, "forward"),
            bw_compiler=lambda module, _: self._run(module, "backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def _run(self, module: fx.GraphModule, stage: str) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if str(node.target) not in CASTS:
                continue
            before, after = node.args[0].meta["val"], node.meta["val"]
            if before.dtype == after.dtype or not (
                before.is_floating_point() and after.is_floating_point()
            ):
                continue
            moved = before.itemsize + after.itemsize
            self.found[f"casts, {stage}"] += 1
            self.found[f"bytes, {stage}"] += math.prod(after.shape) * moved
        return make_boxed_func(module.forward)
