from __future__ import annotations

import pytest
import torch

from castwise.dtypes import DTYPES, dtype_of, format_of, supports
from castwise.errors import FormatError, UnsupportedFormatError
from castwise.formats import FORMATS


@pytest.mark.parametrize("name", DTYPES)
def test_names_and_dtypes_go_both_ways(name: str) -> None:
    """A storable format and its dtype name each other."""
    assert format_of(dtype_of(name)) == name
    assert dtype_of(FORMATS[name]) is DTYPES[name]


def test_tf32_has_no_dtype_and_the_error_says_what_to_hold() -> None:
    """Nobody can hold tf32; fp32 is what it is held in."""
    with pytest.raises(UnsupportedFormatError, match="hold fp32 and compute in tf32"):
        dtype_of("tf32")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_a_dtype_that_holds_no_format_is_refused(dtype: torch.dtype) -> None:
    """Integers and complex numbers are none of the formats."""
    with pytest.raises(FormatError, match=f"got {dtype}"):
        format_of(dtype)


@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16"])
def test_a_cpu_computes_in_what_its_product_showed(name: str) -> None:
    """The answer comes from a product that ran."""
    decision = supports("cpu", name)
    assert decision.value
    assert decision.because == f"a product in {name} on cpu ran and was right"


def test_fp16_on_a_cpu_runs_and_is_called_slow() -> None:
    """fp16 is no error on a CPU; the reason warns of what it costs."""
    decision = supports(torch.device("cpu"), "fp16")
    assert decision.value
    assert "slowly" in decision.because


@pytest.mark.parametrize(
    ("device", "name", "because"),
    [
        ("cpu", "tf32", "compute in fp32"),
        ("cpu", "fp8_e4m3", "compute in bf16"),
        ("cpu", "fp8_e5m2", "emulated"),
        ("nonsense", "fp32", "torch knows no device nonsense"),
        ("cuda:99", "bf16", "fails"),
        ("meta", "fp32", "fails"),
    ],
)
def test_what_cannot_compute_says_why(device: str, name: str, because: str) -> None:
    """No exception leaves the question; the reason names cause or remedy."""
    decision = supports(device, name)
    assert not decision.value
    assert because in decision.because
    assert "\n" not in decision.because


def test_asking_changes_no_global_state_and_is_remembered() -> None:
    """Switches, default dtype, random state and grad mode are as before."""

    def state() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_rng_state().sum().item(),
        )

    before = state()
    with torch.autocast("cpu", torch.bfloat16):
        answers = [supports("cpu", name) for name in FORMATS]
        again = [supports("cpu", name) for name in FORMATS]
    assert state() == before
    assert all(one is two for one, two in zip(answers, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_answers_for_every_format(name: str) -> None:
    """On CUDA, 16 bits and more compute; fp8 is emulated; tf32 asks the capability."""
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    expected = {"tf32": ampere, "fp8_e4m3": False, "fp8_e5m2": False}
    assert supports("cuda", name).value == expected.get(name, True)
