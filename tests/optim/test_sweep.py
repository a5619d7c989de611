from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from castwise import torch_threads
from castwise.errors import SettingsError, WeightStorageError
from castwise.optim import (
    SGD,
    AdamW,
    Lion,
    SweepSettings,
    hold_weights,
)
from castwise.optim.sweep import SweepOptimizer

SHAPES = ((1,), (63,), (1000,), (37, 139), (70001,))

RULES = [
    pytest.param(AdamW, {"weight_decay": 0.1}, id="adamw"),
    pytest.param(SGD, {}, id="sgd"),
    pytest.param(
        SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}, id="sgd-momentum"
    ),
    pytest.param(SGD, {"momentum": 0.9, "nesterov": True}, id="sgd-nesterov"),
    pytest.param(Lion, {"weight_decay": 0.1, "maximize": True}, id="lion"),
]


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    lot = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=lot)) for s in SHAPES]


def _set_gradients(
    parameters: list[torch.nn.Parameter],
    step: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
) -> None:
    lot = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        spread = torch.randn(parameter.shape, generator=lot).exp()
        gradient = torch.randn(parameter.shape, generator=lot) * spread * scale
        parameter.grad = None
        parameter.grad_dtype = dtype
        parameter.grad = gradient.to(dtype)


def _run(
    kind: type[SweepOptimizer],
    keywords: dict[str, Any],
    settings: SweepSettings,
    *,
    num_steps: int = 3,
    dtype: torch.dtype = torch.float32,
    split: bool = False,
) -> tuple[dict[str, torch.Tensor], SweepOptimizer]:
    parameters = _parameters()
    optimizer = kind(parameters, settings=settings, **keywords)
    held = hold_weights(optimizer) if split else None
    for step in range(num_steps):
        _set_gradients(parameters, step, dtype)
        optimizer.step()
    module = torch.nn.ParameterList(parameters)
    weights = module.state_dict() if held is None else held.fp32_weights(module)
    return weights, optimizer


def _assert_same(left: Any, right: Any) -> None:
    assert left[0].keys() == right[0].keys()
    for name in left[0]:
        assert torch.equal(left[0][name], right[0][name]), name
    states = left[1].state_dict()["state"], right[1].state_dict()["state"]
    for place, state in states[0].items():
        for key, value in state.items():
            same = torch.as_tensor(value), torch.as_tensor(states[1][place][key])
            assert torch.equal(*same), (place, key)


@pytest.mark.parametrize(("kind", "keywords"), RULES)
@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", [False, True])
def test_machine_code_equals_the_twin_bit_by_bit(
    kind: type[SweepOptimizer],
    keywords: dict[str, Any],
    states: Any,
    dtype: torch.dtype,
    *,
    split: bool,
) -> None:
    """Weights and states agree in every bit, whatever the formats."""
    results = [
        _run(
            kind,
            keywords,
            SweepSettings(states=states, backend=backend, min_8bit_size=0),
            dtype=dtype,
            split=split,
        )
        for backend in ("machine", "twin")
    ]
    _assert_same(*results)


@pytest.mark.parametrize(
    ("ours", "theirs", "keywords"),
    [
        (AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
    ],
)
def test_the_sweep_gives_what_torch_gives_up_to_rounding(
    ours: Any, theirs: Any, keywords: dict[str, Any]
) -> None:
    """Twenty steps of torch's optimizer and of ours, in fp64 and fp32."""
    mine, exact = _parameters(), [torch.nn.Parameter(p.double()) for p in _parameters()]
    optimizer, reference = ours(mine, **keywords), theirs(exact, **keywords)
    for step in range(20):
        _set_gradients(mine, step)
        for parameter, source in zip(exact, mine, strict=True):
            assert source.grad is not None
            parameter.grad = source.grad.double()
        optimizer.step()
        reference.step()
    for parameter, source in zip(exact, mine, strict=True):
        error = (source.double() - parameter).abs()
        # 20 steps of a few roundings each, of the weight and of the update
        assert torch.all(error <= 20 * 2**-22 * (parameter.abs() + 1))


def test_lion_moves_every_weight_by_the_learning_rate() -> None:
    """The update of Lion is a sign, so that its size is known."""
    parameter = torch.nn.Parameter(torch.zeros(5))
    optimizer = Lion([parameter], lr=0.5)
    parameter.grad = torch.tensor([1.0, -2.0, 0.0, 1e-30, -0.0])
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.tensor([-0.5, 0.5, 0.0, -0.5, 0.0]))


@pytest.mark.parametrize(("kind", "keywords"), RULES)
def test_split_weights_are_swept_as_fp32_weights_are(
    kind: type[SweepOptimizer], keywords: dict[str, Any]
) -> None:
    """The same gradients give the same exact weights, in 4 bytes instead of 6."""
    plain = _run(kind, keywords, SweepSettings(), dtype=torch.bfloat16, num_steps=9)
    split = _run(
        kind, keywords, SweepSettings(), dtype=torch.bfloat16, num_steps=9, split=True
    )
    for name, weight in plain[0].items():
        assert torch.equal(split[0][name], weight), name


@pytest.mark.parametrize("backend", ["machine", "twin"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_poisoned_gradient_lands_nowhere_and_is_named(
    backend: Any, poison: float, states: Any
) -> None:
    """Weights, moments and counts stay bit by bit; the parameter is named."""
    names = [f"layer{place}.weight" for place in range(len(SHAPES))]
    parameters = _parameters()
    optimizer = AdamW(
        zip(names, parameters, strict=True),
        settings=SweepSettings(backend=backend, states=states),
    )
    held = hold_weights(optimizer)
    _set_gradients(parameters, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    weights = held.fp32_weights(torch.nn.ParameterList(parameters))
    _set_gradients(parameters, 1, torch.bfloat16)
    assert parameters[4].grad is not None
    parameters[4].grad[65_999] = poison
    optimizer.step()
    assert not optimizer.outcome.stepped
    assert optimizer.outcome.nonfinite == ("layer4.weight",)
    assert "layer4.weight" in str(optimizer.outcome)
    after = optimizer.state_dict()
    for place, state in before["state"].items():
        for key, value in state.items():
            now = torch.as_tensor(after["state"][place][key])
            assert torch.equal(torch.as_tensor(value), now)
    told = held.fp32_weights(torch.nn.ParameterList(parameters))
    assert all(torch.equal(told[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1023, 65_538, 200_003])
def test_an_infinity_is_seen_wherever_it_lies(dtype: torch.dtype, size: int) -> None:
    """The largest finite numbers of both signs pass; one infinity or NaN does not."""
    parameter = torch.nn.Parameter(torch.ones(size))
    optimizer = AdamW([parameter])
    largest = torch.finfo(dtype).max
    signs = 1 - 2 * (torch.arange(size) % 2)
    parameter.grad_dtype = dtype
    parameter.grad = (largest * signs.double()).to(dtype)
    optimizer.step()
    assert optimizer.outcome.stepped
    assert optimizer.outcome.norm is None
    for place in {0, size // 2, size - 1}:
        for poison in (math.inf, -math.inf, math.nan, -math.nan):
            bad = parameter.grad.clone()
            bad[place] = poison
            kept, parameter.grad = parameter.grad, bad
            optimizer.step()
            assert not optimizer.outcome.stepped
            parameter.grad = kept


@pytest.mark.parametrize("backend", ["machine", "twin"])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_unchecked_infinity_stays_where_it_is(
    backend: Any, states: Any, momentum: float
) -> None:
    """Without the check it spoils its own weight, or its block of 256, and no other."""
    parameter = torch.nn.Parameter(torch.ones(5000))
    settings = SweepSettings(
        backend=backend, states=states, min_8bit_size=0, check_finite=False
    )
    optimizer = SGD([parameter], lr=0.5, momentum=momentum, settings=settings)
    gradient = torch.ones(5000)
    gradient[300] = math.inf
    for _ in range(2):
        parameter.grad = gradient.clone()
        optimizer.step()
    good = parameter.detach().isfinite()
    spoilt = slice(256, 512) if states == "8bit" and momentum else slice(300, 301)
    assert not good[300]
    assert good[: spoilt.start].all()
    assert good[spoilt.stop :].all()


@pytest.mark.parametrize("backend", ["machine", "twin"])
def test_unscaling_and_clipping_happen_inside_the_sweep(backend: Any) -> None:
    """A scaled gradient, clipped in the sweep, is torch's unscaled, clipped one."""
    theirs, ours = _parameters(), _parameters()
    settings = SweepSettings(max_norm=0.5, backend=backend)
    reference = torch.optim.SGD(theirs, lr=1.0)
    optimizer = SGD(ours, lr=1.0, settings=settings)
    for step in range(3):
        _set_gradients(theirs, step)
        _set_gradients(ours, step, scale=1024.0)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        reference.step()
        optimizer.step(scale=1024.0)
        assert optimizer.outcome.norm == pytest.approx(norm.item(), rel=1e-5)
    for mine, exact in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


def test_finite_gradients_whose_squares_overflow_are_no_overflow() -> None:
    """1e30 is a finite gradient; its square is not a finite fp32 number."""
    for backend in ("machine", "twin"):
        parameter = torch.nn.Parameter(torch.zeros(2001))
        settings = SweepSettings(max_norm=1.0, backend=backend)  # type: ignore[arg-type]
        optimizer = SGD([parameter], lr=1.0, settings=settings)
        parameter.grad = torch.full_like(parameter, 1e30)
        optimizer.step()
        assert optimizer.outcome.stepped
        assert optimizer.outcome.norm == pytest.approx(1e30 * 2001**0.5, rel=1e-5)
        assert parameter.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_the_grad_scaler_of_torch_drives_the_sweep() -> None:
    """GradScaler leaves unscaling and skipping to the sweep, and both happen."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.zeros(3))
    optimizer.zero_grad()
    scaler.scale(parameter.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.zeros(3))
    assert not optimizer.outcome.stepped
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("weight", ["fp32", "split"])
def test_the_update_works_on_many_numbers_at_once(weight: str) -> None:
    """LLVM vectorises the loop over all arrays; alone it would not dare to."""
    from numba import njit, types

    from castwise.optim import machine

    bits, numbers = (types.Array(kind, 1, "C") for kind in (types.int16, types.float32))
    high = numbers if weight == "fp32" else bits
    loop = njit(error_model="numpy")(machine._adamw.py_func)
    arrays = bits, numbers, numbers, high, bits, numbers
    loop.compile((types.int64, *arrays))
    (code,) = loop.inspect_llvm().values()
    assert re.search(r"call <\d+ x float> @llvm\.sqrt", code)


def test_threads_change_no_bit() -> None:
    """Chunks are summed in their own order, whoever computed them."""
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            parameter = torch.nn.Parameter(torch.zeros(3_000_017))
            lot = torch.Generator().manual_seed(0)
            settings = SweepSettings(max_norm=1.0, states="8bit")
            optimizer = AdamW([parameter], settings=settings)
            parameter.grad = torch.randn(parameter.shape, generator=lot)
            optimizer.step()
            results.append((parameter.detach().clone(), optimizer.outcome.norm))
    finally:
        torch.set_num_threads(before)
    for weight, norm in results[1:]:
        assert torch.equal(weight, results[0][0])
        assert norm == results[0][1]


@pytest.mark.parametrize("lent", [True, False])
def test_threads_of_torch_and_of_python_do_the_same(
    monkeypatch: pytest.MonkeyPatch, *, lent: bool
) -> None:
    """Where torch has no OpenMP threads to lend, and in a fork, a pool does it."""
    if lent and torch_threads.openmp() is None:
        pytest.skip("torch is built without OpenMP here")
    if not lent:
        monkeypatch.setattr(torch_threads, "openmp", lambda: None)
    before = torch.get_num_threads()
    weights = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            parameter = torch.nn.Parameter(torch.zeros(2_000_003))
            optimizer = AdamW([parameter])
            hold_weights(optimizer)
            for poison in (1.0, math.inf, 1.0):
                lot = torch.Generator().manual_seed(0)
                gradient = torch.randn(parameter.shape, generator=lot).bfloat16()
                gradient[1_999_999] *= poison
                parameter.grad = gradient
                optimizer.step()
                assert optimizer.outcome.stepped == (poison == 1.0)
            weights.append(parameter.detach().clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*weights)
    assert weights[0].count_nonzero() > 1_999_000


def test_layouts_other_than_contiguous_are_swept_right() -> None:
    """Channels-last weights with gradients in another layout give the same numbers."""
    plain = torch.nn.Parameter(torch.randn(5, 3, 4, 7))
    last = torch.nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    gradient = torch.randn(5, 3, 4, 7)
    for parameter in (plain, last):
        optimizer = AdamW([parameter], lr=0.1)
        hold_weights(optimizer)
        parameter.grad = gradient.bfloat16()
        optimizer.step()
    assert torch.equal(plain, last)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
def test_a_resumed_sweep_continues_bit_by_bit(kind: Any, states: Any) -> None:
    """Codes, scales and counts survive a state dict, and so does the split weight."""
    keywords = {"momentum": 0.9} if kind is SGD else {}
    settings = SweepSettings(states=states, min_8bit_size=0)
    runs = []
    for seed in (0, 1):
        parameters = _parameters(seed)
        optimizer = kind(parameters, settings=settings, **keywords)
        runs.append((parameters, optimizer, hold_weights(optimizer)))
    (ours, optimizer, held), (again, resumed, held_again) = runs
    for step in range(4):
        _set_gradients(ours, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for target, source in zip(again, ours, strict=True):
        with torch.no_grad():
            target.copy_(source)
    resumed.load_state_dict(saved)
    for step in range(4, 8):
        for parameters, stepper in ((ours, optimizer), (again, resumed)):
            _set_gradients(parameters, step)
            stepper.step()
    modules = [torch.nn.ParameterList(each) for each in (ours, again)]
    left = held.fp32_weights(modules[0]), optimizer
    right = held_again.fp32_weights(modules[1]), resumed
    _assert_same(left, right)


def test_the_states_of_torch_can_be_continued() -> None:
    """A run of torch.optim.AdamW goes on in ours, within rounding."""
    theirs, ours = _parameters(), _parameters()
    reference, optimizer = torch.optim.AdamW(theirs, lr=0.1), AdamW(ours, lr=0.1)
    for step in range(3):
        _set_gradients(theirs, step)
        reference.step()
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert optimizer.state[ours[0]]["step"] == 3
    with torch.no_grad():
        for mine, exact in zip(ours, theirs, strict=True):
            mine.copy_(exact)
    for parameters, stepper in ((theirs, reference), (ours, optimizer)):
        _set_gradients(parameters, 3)
        stepper.step()
    for mine, exact in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-6, atol=1e-6)


def test_states_exist_from_construction() -> None:
    """All ranks and all steps save the same keys."""
    optimizer = AdamW(_parameters(), settings=SweepSettings(states="8bit"))
    keys = [sorted(state) for state in optimizer.state_dict()["state"].values()]
    assert len(keys) == len(SHAPES)
    assert keys[4] == [
        "exp_avg",
        "exp_avg_signed_quadratic",
        "exp_avg_sq",
        "exp_avg_sq_quartic",
        "step",
    ]
    assert keys[0] == ["exp_avg", "exp_avg_sq", "step"]


def test_what_cannot_be_swept_is_refused() -> None:
    """Each refusal says what came and what to do."""
    wave = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(WeightStorageError, match="complex64"):
        AdamW([wave])
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(WeightStorageError, match="SparseAdam"):
        optimizer.step()
    bare = torch.nn.Parameter(torch.randn(3).bfloat16())
    optimizer = AdamW([bare])
    bare.grad = torch.ones_like(bare)
    with pytest.raises(WeightStorageError, match="hold_weights"):
        optimizer.step()
    with pytest.raises(SettingsError, match="betas"):
        AdamW([bare], betas=(1.5, 0.9))
    with pytest.raises(SettingsError, match="machine"):
        SweepSettings(backend="fast")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="nesterov"):
        SGD([bare], nesterov=True)
    one = AdamW(_parameters(), settings=SweepSettings(states="8bit"))
    other = AdamW(_parameters())
    with pytest.raises(WeightStorageError, match="same kind"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("backend", ["machine", "twin"])
def test_gradients_released_in_the_backward_are_swept_one_by_one(backend: Any) -> None:
    """Released or not, the exact weights are the same; a check or clip forbids it."""
    settings = SweepSettings(check_finite=False, backend=backend)
    weights = []
    for release in (False, True):
        parameters = _parameters()
        optimizer = AdamW(parameters, lr=1e-2, settings=settings)
        held = hold_weights(optimizer, release_gradients=release)
        for step in range(3):
            lot = torch.Generator().manual_seed(step)
            loss = torch.zeros(())
            for parameter in parameters:
                pull = torch.randn(parameter.shape, generator=lot)
                loss = loss + ((parameter - pull.bfloat16()) ** 2).float().sum()
            loss.backward()
            assert all((p.grad is None) == release for p in parameters)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(held.fp32_weights(torch.nn.ParameterList(parameters)))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(WeightStorageError, match="one parameter at a time"):
        hold_weights(AdamW(_parameters()), release_gradients=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_the_compiled_twin_agrees_with_the_twin(kind: Any) -> None:
    """What runs on CUDA, compiled here for the CPU, differs by roundings at most."""
    torch.compiler.reset()  # others here have used up its recompilations
    settings = [
        SweepSettings(states="8bit", min_8bit_size=2000, backend=backend)
        for backend in ("compiled", "twin")
    ]
    compiled, twin = (
        _run(kind, {}, each, dtype=torch.bfloat16, split=True)[0] for each in settings
    )
    for name, weight in twin.items():
        # A fused multiply-add may move a code by one: 1 / 127 of an update of 1e-3.
        assert torch.allclose(compiled[name], weight, rtol=1e-6, atol=1e-4), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
def test_the_sweep_on_cuda_agrees_with_the_cpu(kind: Any) -> None:
    """The same update on both devices, within roundings."""
    weights = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(p.to(device)) for p in _parameters()]
        optimizer = kind(parameters, lr=1e-2)
        held = hold_weights(optimizer)
        for step in range(5):
            cpu = _parameters()
            _set_gradients(cpu, step, torch.bfloat16)
            for parameter, source in zip(parameters, cpu, strict=True):
                assert source.grad is not None
                parameter.grad = source.grad.to(device)
            optimizer.step()
        weights.append(held.fp32_weights(torch.nn.ParameterList(parameters)))
    for name, weight in weights[0].items():
        assert torch.allclose(weights[1][name].cpu(), weight, rtol=1e-5, atol=1e-6)


def test_a_forked_child_sweeps_without_the_threads_of_its_parent() -> None:
    """OpenMP threads do not come along with a fork; a pool of its own steps there."""
    script = """
import os, torch
from castwise.optim import AdamW
torch.set_num_threads(2)
parameter = torch.nn.Parameter(torch.zeros(1_500_000))
optimizer = AdamW([parameter])
parameter.grad = torch.ones_like(parameter)
optimizer.step()
child = os.fork()
if child == 0:
    optimizer.step()
    os._exit(0 if optimizer.state[parameter]["step"] == 2 else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert done.returncode == 0
