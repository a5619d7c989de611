from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from castwise.autocast import (
    _MARK_DTYPES,
    _native_category,
    _Switchboard,
    autocast,
    check_operators,
    install,
    installed_table,
    uninstall,
)
from castwise.errors import (
    PolicyError,
    RuleError,
    SettingsError,
    UnsupportedFormatError,
)
from castwise.policy.ops import DEFAULT_TABLE

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NO_EXP = DEFAULT_TABLE.with_category("exp", "as_is", "a test")


@pytest.fixture(autouse=True)
def _no_table_left() -> Iterator[None]:
    yield
    uninstall()


def low(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Numbers in a low format."""
    return torch.randn(*shape).to(dtype)


# --- what the table says is what runs ---


@pytest.mark.parametrize(("fmt", "dtype"), [("bf16", BF16), ("fp16", FP16)])
def test_products_run_low_and_sums_in_fp32(fmt: str, dtype: torch.dtype) -> None:
    """The same on a CPU as on CUDA, in either low format."""
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    with autocast("cpu", fmt):
        h = F.linear(x, w)
        assert h.dtype == (x @ w).dtype == torch.mv(w, x[0]).dtype == dtype
        for y in (
            h.softmax(-1),
            F.layer_norm(h, (5,)),
            h.exp(),
            h.sum(),
            h.pow(2),
            h.norm(),
            F.cross_entropy(h, torch.tensor([0, 1, 2])),
        ):
            assert y.dtype == FP32
        assert F.relu(h).dtype == h.mean().dtype == dtype


CUDA_LISTS = [
    ("torch_fp16", BF16, 20),
    ("nn_fp16", BF16, 1),
    ("torch_fp32", FP32, 40),
    ("nn_fp32", FP32, 8),
    ("torch_need_autocast_promote", FP32, 10),
]


@pytest.mark.parametrize(("kind", "expected", "at_least"), CUDA_LISTS)
def test_pytorchs_list_for_cuda_holds_on_a_cpu(
    kind: str, expected: torch.dtype, at_least: int
) -> None:
    """A CPU run rehearses a CUDA run: PyTorch's own CUDA test cases, on a CPU."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.autocast_test_lists import AutocastTestLists

    cases = getattr(AutocastTestLists(torch.device("cpu")), kind)
    tried = 0
    for name, args, *more in cases:
        kwargs = next((item for item in more if isinstance(item, dict)), {})
        if name.startswith(("cudnn_", "_thnn_")) or name == "einsum":
            continue  # needs CUDA, or is written down otherwise
        with autocast("cpu", "bf16"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = _find(name)(*args, **kwargs)
        y = y[0] if isinstance(y, (tuple, list)) else y
        assert y.dtype == expected, f"{name} ran in {y.dtype}"
        tried += 1
    assert tried >= at_least


def _find(name: str) -> Callable[..., Any]:
    for place in (torch, torch._C._nn, F, torch.ops.aten):
        if hasattr(place, name):
            found: Callable[..., Any] = getattr(place, name)
            return found
    raise AttributeError(name)


def test_mixed_inputs_go_to_the_widest() -> None:
    """bf16 beside fp16 goes to fp32, which holds both."""
    with autocast("cpu", "bf16"):
        assert torch.cat([low(3), low(3)]).dtype == BF16
        assert torch.cat([low(3), torch.randn(3)]).dtype == FP32
        assert torch.cat([low(3), low(3, dtype=FP16)]).dtype == FP32
        assert torch.dot(low(3), torch.randn(3)).dtype == FP32


def test_fp64_and_complex_are_never_cast() -> None:
    """Islands decide these; the table must not take digits."""
    with autocast("cpu", "bf16"):
        x = torch.randn(3, 3, dtype=FP64)
        assert (x @ x).dtype == x.softmax(-1).dtype == FP64
        z = torch.randn(3, 3, dtype=torch.complex64)
        assert (z @ z).dtype == torch.complex64


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_low(kind: Callable[..., nn.Module]) -> None:
    """torch.autocast on a CPU runs LSTM in bf16 and GRU in fp32."""
    layer, x = kind(5, 7), torch.randn(4, 2, 5)
    with autocast("cpu", "bf16"):
        y, _ = layer(x)
    y.float().sum().backward()
    assert y.dtype == BF16
    assert all(p.grad is not None and p.grad.dtype == FP32 for p in layer.parameters())


def test_a_user_changes_the_table() -> None:
    """An operator of PyTorch's own list is overruled as well as one that it lacks."""
    table = DEFAULT_TABLE.with_category("linear", "fp32", "a test")
    table = table.with_category("softmax", "as_is", "a test")
    table = table.with_category("relu", "fp32", "a test")
    x, w = low(3, 5), torch.randn(5, 5)
    with autocast("cpu", "bf16", table):
        assert F.linear(x, w).dtype == FP32
        assert x.softmax(-1).dtype == BF16
        assert F.relu(x).dtype == FP32
        assert (x @ w).dtype == BF16
    with autocast("cpu", "bf16"):
        assert F.linear(x, w).dtype == BF16
        assert x.softmax(-1).dtype == FP32
        assert F.relu(x).dtype == BF16


def test_a_custom_operator_is_in_the_table_by_its_name() -> None:
    """Users' operators need no C++ either."""

    @torch.library.custom_op("castwise_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    table = DEFAULT_TABLE.with_category("castwise_test::double", "fp32", "a test")
    with autocast("cpu", "bf16", table):
        assert double(low(3)).dtype == FP32
    assert double(low(3)).dtype == BF16


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_no_operator_of_pytorch_crashes_for_its_formats(
    fmt: str, tmp_path: Path
) -> None:
    """Under torch.autocast 56 of 672 do with low inputs, and 58 of 212 with mixed."""
    pytest.importorskip("expecttest")
    script = Path(__file__).parents[1] / "benchmarks" / "opinfo_sweep.py"
    flags = f"--fmt {fmt} --cases all first --regions castwise --json".split()
    file = tmp_path / "sweep.json"
    subprocess.run([sys.executable, str(script), *flags, str(file)], check=True)
    cases = json.loads(file.read_text())["cases"]
    assert cases["all"]["castwise"]["num_forward"] > 600
    assert cases["first"]["castwise"]["num_forward"] > 180
    for case in cases.values():
        assert case["castwise"]["forward"] == case["castwise"]["backward"] == {}


# --- the forms of an operator ---


def test_dtype_given_by_the_caller_decides() -> None:
    """`dtype=` is the caller's word; casting first would change the sum."""
    with autocast("cpu", "bf16"):
        assert low(3).softmax(0, dtype=FP64).dtype == FP64
        assert low(3).sum(dtype=BF16).dtype == BF16
        assert torch.masked.norm(low(3, 3), 2.0, dim=1).dtype == BF16


def test_in_place_follows_self() -> None:
    """An in-place operator cannot change the format of what it writes to."""
    wide, narrow = torch.zeros(3), torch.zeros(3, dtype=BF16)
    index = torch.tensor([0, 1, 2])
    with autocast("cpu", "bf16"):
        wide.index_add_(0, index, torch.ones(3, dtype=BF16))
        narrow.index_add_(0, index, torch.ones(3))
        narrow.addcmul_(torch.ones(3), torch.ones(3, dtype=FP64))
        matrix = torch.zeros(3, 3)
        matrix.addmm_(low(3, 3), torch.eye(3))
    assert wide.tolist() == [1, 1, 1]
    assert narrow.tolist() == [2, 2, 2]
    assert (wide.dtype, narrow.dtype) == (FP32, BF16)
    assert matrix.abs().sum() > 0


def test_out_follows_out() -> None:
    """`out=` names the format of the result."""
    out = torch.empty(3, 3)
    with autocast("cpu", "bf16"):
        torch.mm(low(3, 3), torch.eye(3), out=out)
    assert out.dtype == FP32
    assert out.abs().sum() > 0


BATCH_NORM_FORMATS = [
    (x, affine, mean, var)
    for x in (FP32, BF16)
    for affine in (None, FP32, BF16)
    for mean in (FP32, BF16)
    for var in (FP32, BF16)
]


@pytest.mark.parametrize("category", ["as_is", "fp32", "low"])
@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
def test_running_statistics_are_updated_in_every_mixture_of_formats(
    norm: Callable[..., Tensor], category: Any
) -> None:
    """A cast of the statistics would take the update and be thrown away, silently."""
    table = DEFAULT_TABLE.with_category(norm.__name__, category, "a test")
    data = torch.randn(8, 3, 5) * 2 + 1
    expected_mean, expected_var = torch.zeros(3), torch.ones(3)
    name = "training" if norm is F.batch_norm else "use_input_stats"
    norm(data, expected_mean, expected_var, **{name: True})
    for x, affine, mean_format, var_format in BATCH_NORM_FORMATS:
        mean, var = torch.zeros(3).to(mean_format), torch.ones(3).to(var_format)
        weight = None if affine is None else torch.ones(3, dtype=affine)
        with autocast("cpu", "bf16", table):
            norm(data.to(x), mean, var, weight, weight, **{name: True})
        torch.testing.assert_close(mean.float(), expected_mean, rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(var.float(), expected_var, rtol=2e-2, atol=1e-3)


def test_evaluation_does_not_touch_running_statistics() -> None:
    """Writing back what did not change would still spoil a saved tensor."""
    mean, var = torch.zeros(3, dtype=BF16), torch.ones(3)
    versions = mean._version, var._version
    with autocast("cpu", "bf16"):
        y = F.batch_norm(low(4, 3).requires_grad_(), mean, var)
    y.float().sum().backward()
    assert (mean._version, var._version) == versions


def test_gradients_come_back_in_the_format_of_what_went_in() -> None:
    """Casts are part of the graph."""
    w = torch.randn(5, 5, requires_grad=True)
    x = low(3, 5).requires_grad_()
    with autocast("cpu", "bf16"):
        F.linear(x, w).softmax(-1).square().sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert (x.grad.dtype, w.grad.dtype) == (BF16, FP32)


# --- torch.func ---


def test_vmap_decomposes_first() -> None:
    """Under vmap softmax arrives as _softmax, and must be in fp32 all the same."""
    x = low(4, 5)
    with autocast("cpu", "bf16"):
        y = torch.func.vmap(lambda row: row.softmax(0))(x)
        z = torch.func.vmap(lambda row: row.log_softmax(0))(x)
        assert torch.equal(y, x.float().softmax(1))
        assert torch.equal(z, x.float().log_softmax(1))
        n = torch.func.vmap(lambda row: F.layer_norm(row, (5,)))(x)
        assert n.dtype == FP32


def test_func_grad_sees_the_same_formats() -> None:
    """The gradient of a transformed function is the gradient of the function."""
    w, x = torch.randn(5, 5), torch.randn(3, 5)
    seen = []

    def loss(w: Tensor) -> Tensor:
        p = F.linear(x, w).softmax(-1)
        seen.append(p.dtype)
        return p.square().sum()

    leaf = w.clone().requires_grad_()
    with autocast("cpu", "bf16"):
        transformed = torch.func.grad(loss)(w)
        loss(leaf).backward()
    assert seen == [FP32, FP32]
    assert leaf.grad is not None
    torch.testing.assert_close(transformed, leaf.grad, rtol=2**-7, atol=2**-9)


# --- outside of a region nothing changes ---


def test_outside_of_a_region_no_bit_changes() -> None:
    """Registered kernels are idle in plain code and in a foreign torch.autocast."""
    table = DEFAULT_TABLE.with_category("linear", "fp32", "a test")
    table = table.with_category("cat", "low", "a test")
    table = table.with_category("prod", "as_is", "a test")
    x, w = torch.randn(3, 5), torch.randn(5, 5)

    def everything() -> list[Tensor]:
        h = F.linear(x, w)
        stats = torch.zeros(5), torch.ones(5)
        return [
            h,
            h.softmax(-1),
            h.exp(),
            h.sum(),
            h.prod(),
            torch.einsum("ij,ij->i", h, h),
            F.layer_norm(h, (5,)),
            F.batch_norm(h, *stats, training=True),
            *stats,
            torch.cat([h, x]),
            nn.functional.mse_loss(h, h * 2),
        ]

    def foreign() -> list[Tensor]:
        with torch.autocast("cpu", BF16):
            return everything()

    plain, cast = everything(), foreign()
    with autocast("cpu", "bf16", table):
        inside = everything()
    assert inside[0].dtype == FP32
    assert inside[4].dtype == FP32
    _assert_same_bits(everything(), plain)
    _assert_same_bits(foreign(), cast)


def _assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_disabled_region_casts_nothing() -> None:
    """Also inside another region, where it is what an fp32 island uses."""
    x = low(3)
    with autocast("cpu", "bf16"):
        with autocast("cpu", "bf16", enabled=False):
            assert x.exp().dtype == BF16
            assert (torch.eye(3) @ torch.eye(3)).dtype == FP32
        assert x.exp().dtype == FP32


def test_an_inner_torch_autocast_obeys_the_table() -> None:
    """Libraries that open torch.autocast themselves are governed inside our region."""
    with autocast("cpu", "bf16"), torch.autocast("cpu", FP16):
        assert low(3).exp().dtype == FP32
        assert (torch.eye(3) @ torch.eye(3)).dtype == FP16


def test_an_exception_leaves_no_trace() -> None:
    """Every switch is as it was, and the region is counted as left."""
    before = _switches()
    with pytest.raises(KeyError), autocast("cpu", "bf16"):
        raise KeyError
    assert _switches() == before
    uninstall()


def _switches() -> tuple[Any, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("ipu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("ipu"),
        torch.is_autocast_cache_enabled(),
        torch.compiler.config.cache_key_tag,
        torch._functorch.config.backward_pass_autocast,
    )


@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_that_we_stand_in_for_keep_their_cache_outside(fp8: bool) -> None:
    """One cast for every use of a weight, and gradients added up behind it."""

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.linspace(0.1, 1, 9).view(3, 3).requires_grad_()
        x = torch.linspace(-1, 1, 6).view(2, 3).sin()
        with torch.autocast("cpu", BF16):
            out = F.linear(F.linear(x, weight), weight)
            with torch.no_grad():
                weight.mul_(2)  # goes unseen by a cast that is kept
            out = out + F.linear(x, weight)
        out.sum().backward()
        assert weight.grad is not None
        return out.detach(), weight.grad

    uninstall()
    expected = found()
    table = DEFAULT_TABLE.with_category("linear", "fp32", "a test")
    with autocast("cpu", "bf16", table=table, fp8=fp8):
        assert F.linear(torch.eye(3), torch.eye(3)).dtype == FP32
    for ours, theirs in zip(found(), expected, strict=True):
        assert torch.equal(ours, theirs)
    uninstall()


def test_uninstall_restores_the_dispatcher() -> None:
    """The kernels of PyTorch come back, and none of ours stays."""

    def registered() -> set[str]:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        names = torch._C._dispatch_get_all_op_names()
        keys = ("AutocastCPU", "AutocastCUDA")
        return {f"{k} {n}" for n in names for k in keys if has(n, k)}

    before = registered()
    install("cpu", DEFAULT_TABLE.with_category("linear", "fp32", "a test"))
    install("cuda", DEFAULT_TABLE.with_category("linear", "fp32", "a test"))
    during = registered()
    assert "AutocastCPU aten::softmax.int" in during - before
    assert "AutocastCUDA aten::linalg_det" in during - before
    uninstall()
    assert registered() == before
    assert installed_table() is None
    with torch.autocast("cpu", BF16):
        assert F.linear(torch.eye(3), torch.eye(3)).dtype == BF16


def test_cuda_is_served_wherever_a_cpu_is() -> None:
    """One table: every overload that has a kernel on a CPU has one on CUDA."""
    install("cpu")
    install("cuda")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = torch._C._dispatch_get_all_op_names()
    only = {n for n in names if has(n, "AutocastCPU") and not has(n, "AutocastCUDA")}
    recurrent = {"lstm", "gru", "rnn_tanh", "rnn_relu"}  # cast inside _cudnn_rnn there
    assert {n.removeprefix("aten::").split(".")[0] for n in only} <= recurrent


def test_pytorchs_own_kernels_do_what_the_default_table_says() -> None:
    """Where PyTorch has a kernel we keep it: it must be of the category we think."""
    ops = torch.ops.aten
    x, wide = low(3, 3), torch.randn(3, 3)
    calls: dict[str, tuple[Any, Callable[[], Tensor]]] = {
        "matmul": (ops.matmul.default, lambda: wide @ wide),
        "prod": (ops.prod.default, x.prod),
        "cat": (ops.cat.default, lambda: torch.cat([x, wide])),
        "mse_loss": (ops.mse_loss.default, lambda: F.mse_loss(x, x)),
        "linalg_inv": (ops.linalg_inv.default, lambda: torch.linalg.inv(x)),
        "trace": (ops.trace.default, x.trace),
    }
    results = {"low": BF16, "fp32": FP32, "widest": FP32}
    for name, (op, call) in calls.items():
        category = _native_category(op, name, "cpu")
        with torch.autocast("cpu", BF16):
            assert category is not None
            assert call().dtype == results[category], name


# --- recompute: outside of the region, in another thread ---


class Deep(nn.Module):
    """Two layers whose operators differ between the table and PyTorch's list."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Mix products with operators that the table holds in fp32."""
        h = F.layer_norm(self.into(x), (7,)).exp()
        return self.out(h).softmax(-1)


def gradients(
    model: nn.Module, forward: Callable[[], Tensor], *, thread: bool = False
) -> list[Tensor]:
    """Of a forward in a region and a backward outside of it."""
    model.zero_grad()
    with autocast("cpu", "bf16"):
        loss = forward().square().sum()
    errors: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward()
        except BaseException as error:  # noqa: BLE001 -- carried to the main thread
            errors.append(error)

    if thread:
        worker = threading.Thread(target=backward)
        worker.start()
        worker.join()
    else:
        backward()
    assert not errors, errors
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_outside_of_the_region_runs_in_the_same_formats(
    *, reentrant: bool, thread: bool
) -> None:
    """Gradients with and without checkpointing are the same bits."""
    model, x = Deep(), torch.randn(3, 5, requires_grad=True)
    expected = gradients(model, lambda: model(x))
    found = gradients(
        model, lambda: checkpoint(model, x, use_reentrant=reentrant), thread=thread
    )
    assert len(found) == 4
    _assert_same_bits(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_foreign_recompute_is_left_alone(*, reentrant: bool) -> None:
    """A model checkpointed under torch.autocast alone must not meet our kernels."""
    model, x = Deep(), torch.randn(3, 5, requires_grad=True)
    install("cpu")

    def run(forward: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = forward().square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    _assert_same_bits(
        run(lambda: checkpoint(model, x, use_reentrant=reentrant)),
        run(lambda: model(x)),
    )


# --- the cast cache ---


def test_gradients_of_a_shared_weight_add_up_in_fp32() -> None:
    """1 + 2^-9 is lost in bf16, which has 8 bits."""
    w = nn.Parameter(torch.ones(1, 1))
    with autocast("cpu", "bf16"):
        y = F.linear(torch.ones(1, 1), w).float()
        z = F.linear(torch.full((1, 1), 2.0**-9), w).float()
        (y + z).sum().backward()
    assert w.grad is not None
    assert w.grad.item() == 1 + 2.0**-9


# --- mistakes ---


def test_an_unknown_operator_is_refused_with_its_neighbours() -> None:
    """A typing error in a policy must not silently mean nothing."""
    table = DEFAULT_TABLE.with_category("sotfmax", "fp32", "a test")
    with pytest.raises(
        RuleError, match=r"got 'sotfmax' \(a test\); did you mean softmax"
    ):
        check_operators(table)
    with pytest.raises(RuleError, match="sotfmax"), autocast("cpu", "bf16", table):
        pass


def test_two_tables_at_once_are_refused() -> None:
    """A recompute could not know which of them was meant."""
    with (
        autocast("cpu", "bf16"),
        pytest.raises(PolicyError, match="differs in exp;"),
        autocast("cpu", "bf16", NO_EXP),
    ):
        pass
    with autocast("cpu", "bf16", NO_EXP):
        assert low(3).exp().dtype == BF16


def test_an_open_region_cannot_be_uninstalled() -> None:
    """It would go on without its table."""
    with autocast("cpu", "bf16"), pytest.raises(PolicyError, match="1 region"):
        uninstall()


@pytest.mark.parametrize("fmt", ["fp32", "fp64", "fp8_e4m3"])
def test_only_low_formats_make_a_region(fmt: str) -> None:
    """The message says what to do instead."""
    with (
        pytest.raises(UnsupportedFormatError, match=f"got {fmt}.*island"),
        autocast("cpu", fmt),
    ):
        pass


def test_another_device_is_refused() -> None:
    """The table is not in force where nobody registered it."""
    with pytest.raises(SettingsError, match="'mps'"), autocast("mps", "bf16"):
        pass


def test_regions_nest_and_run_in_threads() -> None:
    """The same table in several threads, and a region in a region."""
    failed: list[str] = []

    def work() -> None:
        for _ in range(20):
            with autocast("cpu", "bf16"), autocast("cpu", "bf16"):
                if low(3).exp().dtype != FP32:
                    failed.append("inside")
            if low(3).exp().dtype != BF16:
                failed.append("outside")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    uninstall()


# --- torch.compile ---


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The whole function as one graph, run by AOTAutograd without a code generator."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.usefixtures("_fresh_compiler")
def test_code_compiled_without_the_table_is_not_taken_inside() -> None:
    """Stale code, first way: nothing else tells the two regions apart."""
    run = compiled(lambda x: x.exp())
    x = low(3)
    with torch.autocast("cpu", BF16, cache_enabled=False):
        assert run(x).dtype == BF16
    with autocast("cpu", "bf16"):
        assert run(x).dtype == FP32
    with torch.autocast("cpu", BF16, cache_enabled=False):
        assert run(x).dtype == BF16
    assert run(x).dtype == BF16


@pytest.mark.usefixtures("_fresh_compiler")
def test_code_compiled_under_another_table_is_not_taken() -> None:
    """And each table's code is kept: switching back compiles nothing."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: x.exp(), backend=counter, fullgraph=True)
    for _ in range(3):
        with autocast("cpu", "bf16"):
            assert run(low(3)).dtype == FP32
        with autocast("cpu", "bf16", NO_EXP):
            assert run(low(3)).dtype == BF16
    assert counter.frame_count == 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_more_tables_than_marks_still_never_take_stale_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the marks are used up, compiled code is forgotten."""
    monkeypatch.setattr("castwise.autocast._SWITCHBOARD", _Switchboard())
    run = compiled(lambda x: x.exp())
    tables = [DEFAULT_TABLE]
    for name in ("abs", "ceil", "cos", "floor", "neg", "relu", "sign", "sin"):
        table = DEFAULT_TABLE.with_category(name, "fp32", "a test")
        tables += [table, table.with_category("exp", "as_is", "a test")]
    first, again = tables[0], tables[len(_MARK_DTYPES)]
    assert first.category("exp") != again.category("exp"), "they share a mark"
    with torch._dynamo.config.patch(recompile_limit=len(tables)):
        for table in tables:
            expected = FP32 if table.category("exp") == "fp32" else BF16
            with autocast("cpu", "bf16", table):
                assert run(low(3)).dtype == expected
    uninstall()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_the_cache_on_disk_keeps_tables_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Stale code, second way: a new process gives the same mark to another table."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = low(3)
    for table, expected in ((DEFAULT_TABLE, FP32), (NO_EXP, BF16)):
        torch.compiler.reset()
        monkeypatch.setattr("castwise.autocast._SWITCHBOARD", _Switchboard())
        with autocast("cpu", "bf16", table):
            run = torch.compile(lambda x: x.exp() * 1, fullgraph=True)
            assert run(x).dtype == expected
        uninstall()


@pytest.mark.usefixtures("_fresh_compiler")
def test_an_fp32_island_has_fp32_gradients_when_compiled() -> None:
    """pytorch#179804; stale code, third way: the switch must be set at the compile."""
    island, x = nn.Linear(5, 5), torch.randn(3, 5)

    def loss() -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = island(x)
        return y.square().sum()

    def gradient(call: Callable[[], Tensor]) -> Tensor:
        island.zero_grad()
        with autocast("cpu", "bf16"):
            result = call()
        result.backward()
        assert island.weight.grad is not None
        return island.weight.grad.clone()

    run = compiled(loss)
    with torch.autocast("cpu", BF16):
        run().backward()  # compiled once with the backward in bf16, as PyTorch does
    assert torch.equal(gradient(run), gradient(loss))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_gradients_are_the_eager_ones() -> None:
    """The kernels are traced through: one graph, no break, the same bits."""
    model, x = Deep(), torch.randn(3, 5)
    expected = gradients(model, lambda: model(x))
    run = compiled(model)
    _assert_same_bits(gradients(model, lambda: run(x)), expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_recomputes_in_the_same_formats() -> None:
    """A checkpoint around compiled code recomputes outside of the region."""
    model, x = Deep(), torch.randn(3, 5, requires_grad=True)
    expected = gradients(model, lambda: model(x))
    run = compiled(model)
    found = gradients(model, lambda: checkpoint(run, x, use_reentrant=False))
    _assert_same_bits(found, expected)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_frame_that_dynamo_gives_up_runs_as_in_eager_code() -> None:
    """Dynamo must not go on to capture the kernels that such a frame calls."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scan = nn.LSTM(7, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.scan(x)[0]
            return out

    model, x = Recurrent(), torch.randn(2, 3, 7)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager")
    with autocast("cpu", "bf16"):
        eager, given_up = model(x), run(x)
    given_up.float().square().mean().backward()
    assert given_up.dtype is torch.bfloat16
    assert torch.equal(given_up, eager)


def test_a_number_may_stand_for_a_tensor_once_an_operator_has_a_kernel() -> None:
    """The counter of a batch norm goes on counting, in autocast and outside."""
    low = DEFAULT_TABLE.with_category("add", "low", "a test")
    counter, x = torch.tensor(0), torch.ones(3, dtype=BF16)
    with autocast("cpu", "bf16", low):
        counter.add_(1)
        assert (x + 1).dtype == BF16
    counter.add_(1)
    assert int(counter) == 2
    assert (x + 1).dtype == BF16
