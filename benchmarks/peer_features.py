"""What benchmarks/peers.py asks of every tool: one function for each feature.

Each function makes a small model, has a tool of peer_tools.py set it up, runs it and
measures what came out, so that no answer rests on a tool's word. An answer is `yes`,
`partly` or `no`, with a figure or with the first words of what the tool raised.

    table                softmax, norms and sums go to fp32 on a CPU, as on CUDA
    operator, named      who may change what: an operator, a module by its name
    island, wide_island  one module held wider than its surroundings, unedited
    ...
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from peer_tools import Absent, Ready, Tool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from castwise.autocast import uninstall
from castwise.numerics.census import observe

Verdict = Literal["yes", "partly", "no"]
WIDTH = 33
NUM_OVERFLOWS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came out when a tool was asked for a feature."""

    verdict: Verdict
    """Whether it has the feature."""

    figure: str
    """What was measured, or why there is nothing to measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """One row of the table."""

    title: str
    """What a user wants."""

    probe: Callable[[Tool], Answer]
    """Exercises a tool."""

    test: str
    """The test of castwise that holds it: file::name."""

    paddle: Answer
    """What the documentation of paddle.amp says; not executed."""


class Delicate(nn.Module):
    """A product that notes what it was computed in, and how far off it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.product = torch.float32
        self.error = 0.0
        self.switch = ""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; the numbers beside are computed in fp64 outside of any region."""
        y = x @ self.weight
        if not torch.compiler.is_compiling():
            self._note(x.detach(), y.detach())
        return y

    def _note(self, x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            exact = x.double() @ self.weight.detach().double()
            self.error = float((y.double() - exact).norm() / exact.norm())
        self.product = y.dtype
        self.switch = str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


class Net(nn.Module):
    """A delicate module between two others."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.delicate = nn.LayerNorm(WIDTH), Delicate()

    def forward(self, x: Tensor) -> Tensor:
        """Low, delicate, low."""
        y: Tensor
        if self.recompute:
            y = checkpoint(self.run, x, use_reentrant=False)
        else:
            y = self.run(x)
        return y

    def run(self, x: Tensor) -> Tensor:
        """The three of them."""
        h = self.between(self.norm(self.into(x)).softmax(-1))
        y: Tensor = self.out(h)
        return y

    def between(self, x: Tensor) -> Tensor:
        """The delicate one."""
        y: Tensor = self.delicate(x)
        return y


class Edited(Net):
    """The same with autocast switched off by hand in its code."""

    def between(self, x: Tensor) -> Tensor:
        """What PyTorch's documentation tells to write."""
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.delicate(x.float())
        return y


def table(tool: Tool) -> Answer:
    """PyTorch's own test cases for CUDA, run on a CPU."""
    from torch.testing._internal.autocast_test_lists import AutocastTestLists  # noqa: PLC0415 -- needs expecttest

    lists = AutocastTestLists(torch.device("cpu"))  # type: ignore[no-untyped-call]
    expected = {"fp16": torch.bfloat16, "fp32": torch.float32, "promote": torch.float32}
    good = tried = 0
    for kind in ("torch_fp16", "nn_fp16", "torch_fp32", "nn_fp32"):
        for case in getattr(lists, kind):
            if case[0].startswith(("cudnn_", "_thnn_")) or case[0] == "einsum":
                continue  # needs CUDA, or is written down otherwise
            tried += 1
            good += _format_of(tool, case) == expected[kind.split("_")[1]]
    verdict: Verdict = "yes" if good == tried else "no"
    return Answer(verdict=verdict, figure=f"{good} of {tried} operators")


def _format_of(tool: Tool, case: tuple[Any, ...]) -> torch.dtype | None:
    name, args, *more = case
    kwargs = next((item for item in more if isinstance(item, dict)), {})
    places = (torch, torch._C._nn, nn.functional, torch.ops.aten)  # noqa: SLF001 -- where the lists look
    function = next(getattr(p, name) for p in places if hasattr(p, name))
    try:
        with tool.region(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function(*args, **kwargs)
    except RuntimeError:
        return None
    first = found[0] if isinstance(found, (tuple, list)) else found
    dtype: torch.dtype = first.dtype
    return dtype


def operator(tool: Tool) -> Answer:
    """Three operators put into fp32 from Python, and compiled code that follows."""
    torch.compiler.reset()
    x, w = torch.randn(3, 5).bfloat16(), torch.randn(5, 5)
    run = torch.compile(lambda x: x.tanh(), backend="aot_eager")
    calls: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "tanh": ("tanh", x.tanh),
        "overrules linear": ("linear", lambda: nn.functional.linear(x, w)),
        "keywords": ("gelu", lambda: nn.functional.gelu(x, approximate="tanh")),
        "compiled code": ("tanh", lambda: run(x)),
    }
    with tool.region():
        before = {call().dtype for _, call in calls.values()}
    assert before == {torch.bfloat16}
    failed = [name for name, (op, call) in calls.items() if not _goes(tool, op, call)]
    torch.compiler.reset()
    if not failed:
        return Answer(verdict="yes", figure=f"{len(calls)} of {len(calls)} cases")
    left = len(calls) - len(failed)
    return Answer(
        verdict="partly" if left else "no",
        figure=f"{left} of {len(calls)} cases; not: {', '.join(failed)}",
    )


def _goes(tool: Tool, op: str, call: Callable[[], Tensor]) -> bool:
    try:
        with tool.operator_in_fp32(op):
            return call().dtype == torch.float32
    except Exception:  # noqa: BLE001 -- whatever it raises, the operator does not go
        return False


def named(tool: Tool) -> Answer:
    """A pattern of names chooses modules, and a typing error does not pass."""
    chosen = tool.named(Net(), "out")
    try:
        tool.named(Net(), "oot")
    except Absent:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever it raises is the answer
        return Answer(
            verdict="yes",
            figure=f"{chosen} module; a typing error is {type(error).__name__}",
        )
    return Answer(verdict="partly", figure=f"{chosen} module; a typing error is silent")


def island(tool: Tool) -> Answer:
    """A product in fp32 inside bf16."""
    return _island(tool, "fp32", torch.float32, 1e-6)


def wide_island(tool: Tool) -> Answer:
    """A product in fp64 inside bf16."""
    return _island(tool, "fp64", torch.float64, 1e-14)


def _island(tool: Tool, fmt: str, dtype: torch.dtype, bound: float) -> Answer:
    torch.manual_seed(0)
    net = Net()
    ready = tool.held(net, "delicate", fmt)
    _step(ready, torch.randn(7, WIDTH))
    delicate = net.delicate
    inside = delicate.product == dtype and delicate.error < bound
    return Answer(
        verdict="yes" if inside else "no",
        figure=f"in {_name(delicate.product)}, error {delicate.error:.0g}",
    )


def switch(tool: Tool) -> Answer:
    """An island's fp32 products are IEEE while the process lets them be rounded."""
    torch.manual_seed(0)
    net = Net()
    ready = tool.held(net, "delicate", "fp32")
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        _step(ready, torch.randn(7, WIDTH))
    finally:
        matmul.fp32_precision = before
    seen = net.delicate.switch
    return Answer(
        verdict="yes" if seen == "ieee" else "no", figure=f"switch inside: {seen}"
    )


def narrow_island(tool: Tool) -> Answer:
    """A product in fp8_e4m3 where the hardware has none, as far off as 4 bits are."""
    torch.manual_seed(0)
    net = Net()
    ready = tool.held(net, "delicate", "fp8_e4m3")
    _step(ready, torch.randn(7, WIDTH))
    inside = 1e-2 < net.delicate.error < 1e-1
    how = "emulated" if inside else f"in {_name(net.delicate.product)}"
    return Answer(
        verdict="yes" if inside else "no",
        figure=f"{how}, error {net.delicate.error:.0g}",
    )


def stale(tool: Tool) -> Answer:
    """A weight doubled in place between two products of one region."""
    weight, x = nn.Parameter(torch.eye(5)), torch.ones(3, 5)
    with tool.region():
        first = nn.functional.linear(x, weight)
        with torch.no_grad():
            weight.mul_(2)
        second = nn.functional.linear(x, weight)
    fresh = torch.equal(second, 2 * first)
    return Answer(
        verdict="yes" if fresh else "no",
        figure="is cast again" if fresh else "the old cast is used",
    )


class Rotary(nn.Module):
    """A rotary table beside a weight."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        exponent = torch.arange(0, 64, 2) / 64
        self.register_buffer("inv_freq", 10000.0**-exponent)

    def forward(self, x: Tensor) -> Tensor:
        """Use the weight."""
        y: Tensor = self.into(x)
        return y


def buffers(tool: Tool) -> Answer:
    """A rotary table in a model whose weights are held in bf16."""
    model = Rotary()
    exact = model.inv_freq.double()
    weight = tool.lowered(model).get_parameter("into.weight")
    assert weight.dtype == torch.bfloat16
    off = float(4095 * (model.inv_freq.double() - exact).abs().max())
    return Answer(
        verdict="yes" if off < 1e-3 else "no",
        figure=f"phase at position 4095 off by {off:.2g} rad",
    )


def phases(tool: Tool) -> Answer:
    """Precision changed between steps, compiled, and changed back."""
    torch.compiler.reset()
    torch.manual_seed(0)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        forward: Callable[..., Any] = graph.forward
        return forward

    net = Net()
    model, low, high = tool.switched(net)
    run = torch.compile(model, backend=count)
    x, seen = torch.randn(7, WIDTH), []
    for region in (low, high, low, high, low):
        with region():
            run(x)
            model(x)
        seen.append(_name(net.delicate.product))
    torch.compiler.reset()
    if seen != ["bf16", "fp32", "bf16", "fp32", "bf16"]:
        return Answer(verdict="no", figure=f"stays in {seen[1]}")
    alone = tool.name == "castwise"
    return Answer(
        verdict="yes" if alone else "partly",
        figure=f"{'any rule' if alone else 'whole model, by hand'}; "
        f"{len(graphs)} graphs for 5 switches",
    )


def recipe(tool: Tool) -> Answer:
    """All that the tool was told, written down and read back."""
    return Answer(
        verdict="yes", figure=f"{len(tool.recipe().splitlines())} lines of YAML"
    )


class Squared(torch.autograd.Function):
    """y = x w w, in the newer form, with a context set up apart."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        """Two products."""
        return (x @ w) @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the inputs."""
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """By hand."""
        (x, w), (g,) = ctx.saved_tensors, gradients
        return g @ w.mT @ w.mT, x.mT @ (g @ w.mT) + (x @ w).mT @ g


class Decorated(Squared):
    """What PyTorch offers for it."""

    forward = staticmethod(
        torch.amp.custom_fwd(
            Squared.forward, device_type="cpu", cast_inputs=torch.float32
        )
    )
    backward = staticmethod(torch.amp.custom_bwd(Squared.backward, device_type="cpu"))


class Custom(Delicate):
    """A delicate module whose products are a custom function."""

    function: Any = Squared

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        y: Tensor = self.function.apply(x, self.weight)
        self.product = y.dtype
        return y


def custom_function(tool: Tool) -> Answer:
    """A custom function with setup_context in fp32 inside bf16 (pytorch#132388)."""
    torch.manual_seed(0)
    net = Net()
    net.delicate = Custom()
    if tool.name != "castwise":
        net.delicate.function = Decorated
    ready = tool.held(net, "delicate", "fp32")
    _step(ready, torch.randn(7, WIDTH))
    gradient = net.delicate.weight.grad
    holds = net.delicate.product == torch.float32 and gradient is not None
    return Answer(
        verdict="yes" if holds else "no", figure=f"in {_name(net.delicate.product)}"
    )


def compiled(tool: Tool) -> Answer:
    """Gradients of a compiled island against those of the eager one."""
    torch.compiler.reset()
    torch.manual_seed(0)
    unedited = tool.name == "castwise"
    net = Net() if unedited else Edited()
    ready = tool.held(net, "delicate", "fp32") if unedited else tool.ready(net)
    fast = replace(ready, model=torch.compile(ready.model, backend="aot_eager"))
    x = torch.randn(7, WIDTH)
    eager, found = _gradient(ready, net, x), _gradient(fast, net, x)
    off = float((eager - found).norm() / eager.norm())
    torch.compiler.reset()
    return Answer(
        verdict="yes" if off == 0 else "no",
        figure=f"gradients {'equal' if off == 0 else f'off by {off:.0e}'}"
        + ("" if unedited else ", model edited"),
    )


def recomputed(tool: Tool) -> Answer:
    """A checkpointed model whose backward runs outside of the region."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        net = Net(recompute=again)
        ready = (
            tool.held(net, "delicate", "fp32")
            if tool.name == "castwise"
            else tool.ready(net)
        )
        found.append(_gradient(ready, net, torch.randn(7, WIDTH)))
    same = torch.equal(*found)
    return Answer(verdict="yes" if same else "no", figure="same bits" if same else "")


def distributed(tool: Tool) -> Answer:
    """DistributedDataParallel, as a group of one process."""
    with _one_process():
        found = []
        for parallel in (False, True):
            torch.manual_seed(0)
            net = Net()
            ready = tool.ready(net)
            model = nn.parallel.DistributedDataParallel(net) if parallel else net
            region = ready.region if ready.run else tool.region
            wrapped = Ready(model=model, region=region)
            found.append(_gradient(wrapped, net, torch.randn(7, WIDTH)))
    same = torch.equal(*found)
    return Answer(
        verdict="yes" if same else "no", figure="same bits" if same else "other bits"
    )


def sharded(tool: Tool) -> Answer:
    """An fp32 island inside bf16 in a model that `fully_shard` cut up."""
    torch.manual_seed(0)
    with _one_process():
        net = Net()
        ready = tool.sharded(net, "delicate")
        _step(ready, torch.randn(7, WIDTH))
        inside = net.delicate.product == torch.float32 and net.delicate.error < 1e-6
    by_hand = "" if ready.run else ", each module by hand"
    verdict: Verdict = "yes" if ready.run else "partly"
    return Answer(
        verdict=verdict if inside else "no",
        figure=f"in {_name(net.delicate.product)}{by_hand}",
    )


@contextmanager
def _one_process() -> Iterator[None]:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def proof(tool: Tool) -> Answer:
    """A module switches autocast off where nobody allowed it; who notices?"""
    torch.manual_seed(0)
    said = tool.proved(tool.ready(Edited()), torch.randn(7, WIDTH))
    names = "delicate" in said
    return Answer(
        verdict="yes" if names else "no",
        figure="names module, operator and line" if names else "nothing is said",
    )


def floor(tool: Tool) -> Answer:
    """A gradient that is infinite in every step."""
    scale, said = tool.overflowing(NUM_OVERFLOWS)
    stopped = "weight" in said
    return Answer(
        verdict="yes" if stopped else "no",
        figure=f"scale {scale:g} after {NUM_OVERFLOWS} steps"
        if not stopped
        else f"stops at scale {scale:g}, names the parameter",
    )


def stages(tool: Tool) -> Answer:
    """Backward in another format than forward, module by module, in eager mode."""
    if tool.name != "castwise":
        raise Absent("no way to say it")
    from castwise.errors import CastwiseError  # noqa: PLC0415 -- beside its use
    from castwise.policy import preset  # noqa: PLC0415 -- beside its use
    from castwise.training.step import prepare  # noqa: PLC0415 -- beside its use

    net = Net()
    policy = preset("bf16-mixed").with_rule(
        module="delicate", stage="backward", precision="c=fp32"
    )
    try:
        run = prepare(net, torch.optim.SGD(net.parameters()), policy)
    except CastwiseError:
        return Answer(verdict="no", figure="can be said, but is refused in eager mode")
    ready = Ready(model=net, region=run.region)
    census = observe(lambda: _step(ready, torch.randn(7, WIDTH)))
    # In forward mm is the delicate product (others add a bias), and the note's in fp64.
    forward = set(census.formats_of("mm", "forward")) - {"fp64"}
    backward = set(census.formats_of("mm", "backward"))
    holds = forward == {"bf16"} and "fp32" in backward
    return Answer(
        verdict="yes" if holds else "no",
        figure=f"forward in {', '.join(sorted(forward))}, "
        f"backward {'too' if 'fp32' not in backward else 'in fp32'}",
    )


def _step(ready: Ready, x: Tensor) -> None:
    with ready.region():
        loss = ready.model(x).float().square().mean()
    ready.backward(loss)


def _gradient(ready: Ready, net: Net, x: Tensor) -> Tensor:
    net.zero_grad()
    _step(ready, x)
    assert net.delicate.weight.grad is not None
    return net.delicate.weight.grad.clone()


def _name(dtype: torch.dtype) -> str:
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    return names[dtype]


def answer(feature: Feature, tool: Tool) -> Answer:
    """Ask a tool; what it raises is an answer too."""
    uninstall()  # no tool meets the kernels of another
    try:
        return feature.probe(tool)
    except Absent as reason:
        return Answer(verdict="no", figure=str(reason))
    except Exception as error:  # noqa: BLE001 -- a tool that raises does not have it
        first = str(error).splitlines()[0].partition(",")[0]
        return Answer(verdict="no", figure=f"{type(error).__name__}: {first}")
