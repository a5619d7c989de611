"""The Triton tier of the resolvent: interpreted on the CPU, compiled for GPUs.

Triton is optional and large; without it these tests are skipped. Run by itself, this
file compares the interpreted kernels with the dense original.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from castwise.layers import reference, resolvent_solve
from castwise.layers.odd_even import linear_scan
from castwise.layers.resolvent import resolvent_diagonal

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton"
)


def compare(num_sites: int, *, causal: bool, complex_chain: bool) -> None:
    """Hold diagonal and gradients of the star tier against the dense inverse."""
    lot = torch.Generator().manual_seed(num_sites)

    def draw(*shape: int) -> torch.Tensor:
        dtype = torch.complex128 if complex_chain else torch.float64
        return torch.randn(*shape, dtype=dtype, generator=lot)

    d = 2 * draw(3, num_sites)
    b, c = (1 + 0.3 * draw(3, num_sites - 1) for _ in range(2))
    original = (
        reference.causal_resolvent_diagonal if causal else reference.resolvent_diagonal
    )
    z = torch.tensor(0.3 + 2.5j, dtype=torch.complex128)
    inputs = [[x.clone().requires_grad_() for x in (d, b, c, z)] for _ in range(2)]
    with mock.patch.multiple(
        resolvent_solve, _kernel_fits=lambda _: False, _star_fits=lambda _: True
    ):
        found = resolvent_diagonal(*inputs[0], causal=causal)
        expected = original(*inputs[1])
        upstream = torch.randn(found.shape, dtype=found.dtype, generator=lot)
        found.backward(upstream)
        expected.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(*inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def compare_recurrence() -> None:
    """Hold the interpreted recurrence against the one in plain torch."""
    from castwise.layers import star_scan

    factor, source = (0.5 * torch.randn(2, 3, 301, dtype=torch.cfloat) for _ in "ab")
    found = star_scan.linear_scan(factor, source)
    torch.testing.assert_close(found, linear_scan(factor, source), atol=1e-5, rtol=0)


@needs_triton
def test_the_interpreted_kernels_agree_with_the_dense_original() -> None:
    """In its own process: triton asks for the interpreter when it is imported."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("number", ["fp32", "fp64"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(number: str) -> None:
    """Both kernels become machine code for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from castwise.layers import star_scan

    address = f"*{number}"
    kernels = [
        (
            star_scan._recurrence_rows,
            {"factor": address, "source": address, "out": address, "length": "i32"},
            {"block": star_scan.BLOCK},
        )
    ]
    signature = {"a": address, "k": address, "out": address}
    signature |= {"length": "i32", "k_stride": "i32"}
    kernels += [
        (
            star_scan._pivot_rows,
            signature,
            {"from_right": side, "block": star_scan.BLOCK},
        )
        for side in (False, True)
    ]
    for kernel, kinds, constants in kernels:
        every = kinds | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=every, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_triton
@pytest.mark.parametrize("num_sites", [1, 2, 129, 5000])
def test_a_gpu_agrees_with_the_cpu(num_sites: int) -> None:
    """Diagonal and gradient, in fp32 where that is good enough."""
    d = 2 * torch.randn(5, num_sites)
    one = torch.ones(num_sites - 1)
    here = d.clone().requires_grad_()
    there = d.cuda().requires_grad_()
    expected = resolvent_diagonal(here, one, one, 1j)
    found = resolvent_diagonal(there, one.cuda(), one.cuda(), 1j)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
    expected.abs().square().sum().backward()
    found.abs().square().sum().backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-5)


def test_without_triton_or_a_gpu_plain_torch_answers() -> None:
    """The reason is told."""
    assert "cuda" in resolvent_solve.star_available("cpu").because


if __name__ == "__main__":
    compare_recurrence()
    for length in (1, 2, 5, 129, 260):
        for imaginary in (False, True):
            compare(length, causal=False, complex_chain=imaginary)
    for length in (1, 2, 5):
        compare(length, causal=True, complex_chain=False)
