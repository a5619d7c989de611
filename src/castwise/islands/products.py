"""How fp32 matrix products are computed while an island runs: IEEE, or TF32.

PyTorch lets a process trade the digits of fp32 matrix products for speed: on CUDA in
TF32, on a CPU through oneDNN in bf16 or TF32. The switches (`fp32_precision` and the
older `allow_tf32`, which reads and writes the same state) belong to the whole process,
so an island must set them while its operators run and put them back afterwards.

A forward is bracketed by a `with` block. A backward has no block: the engine runs it
later, from anywhere. `BackwardHold` is therefore hooked to the island's outputs, where
the engine enters, and to the inputs that were cast, where it leaves; whatever remains
is put back when the engine finishes. The engine owns the hold through its queue of
callbacks and drops it when a backward dies, and dropping it puts the switches back too.

While several holds are active the latest one decides. The derivative of a derivative
(`create_graph=True`) is not held. Compiled code reads the switches when it runs;
nothing here touches them while a graph is captured.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch.autograd import Variable

if TYPE_CHECKING:
    from types import TracebackType

Products = Literal["ieee", "tf32"]
"""What fp32 matrix products are rounded to before they are multiplied."""

_backends: Any = torch.backends  # its submodules carry no types


class _CublasSwitch:
    """The switch of CUDA's products, old and new name together.

    Written under the new name alone, PyTorch would refuse to read the old one, which
    kernels and the guards of compiled code do.
    """

    @property
    def fp32_precision(self) -> str:
        """What it is, under the new name."""
        value: str = _backends.cuda.matmul.fp32_precision
        return value

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        medium = self._was_medium()
        _backends.cuda.matmul.allow_tf32 = value == "tf32"
        if medium:
            self._held_medium = True
        elif value == "tf32" and self._held_medium:
            self._held_medium = False
            on_cpu = _backends.mkldnn.matmul.fp32_precision
            torch.set_float32_matmul_precision("medium")  # noqa: TID251 -- puts back what the user chose
            _backends.mkldnn.matmul.fp32_precision = on_cpu
        _backends.cuda.matmul.fp32_precision = value

    _held_medium = False

    @staticmethod
    def _was_medium() -> bool:
        try:
            return torch.get_float32_matmul_precision() == "medium"
        except RuntimeError:  # the old and the new name disagree
            return False


class _CudnnSwitch:
    """A switch of cuDNN, old and new name together; the old one is for both of them."""

    def __init__(self, switch: Any) -> None:
        self._switch = switch

    @property
    def fp32_precision(self) -> str:
        """What it is, under the new name."""
        value: str = self._switch.fp32_precision
        return value

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        if self._switch is _backends.cudnn.conv:  # written first
            _backends.cudnn.allow_tf32 = value == "tf32"
        self._switch.fp32_precision = value


# device type -> the switches of matrix products, convolutions and recurrent layers,
# each with the switch it inherits from while it is itself "none"
_SWITCHES: dict[str, tuple[tuple[Any, Any], ...]] = {
    "cpu": tuple(
        (switch, _backends.mkldnn)
        for switch in (
            _backends.mkldnn.matmul,
            _backends.mkldnn.conv,
            _backends.mkldnn.rnn,
        )
    ),
    "cuda": (
        (_CublasSwitch(), _backends),
        (_CudnnSwitch(_backends.cudnn.conv), _backends.cudnn),
        (_CudnnSwitch(_backends.cudnn.rnn), _backends.cudnn),
    ),
}

_IEEE = ("ieee", "none")

_lock = threading.RLock()
_tickets = itertools.count()
_active: dict[str, dict[int, Products]] = {device: {} for device in _SWITCHES}
_before: dict[str, list[str]] = {}


def products_now(device_type: str) -> tuple[str, ...]:
    """Read the switches of matrix products, convolutions and recurrent layers."""
    return tuple(switch.fp32_precision for switch, _ in _SWITCHES.get(device_type, ()))


def _are_ieee(device_type: str) -> bool:
    """Whether there is nothing to hold; unset, only cuDNN may round its inputs."""
    return all(
        switch.fp32_precision in (("ieee",) if parent is _backends.cudnn else _IEEE)
        for switch, parent in _SWITCHES[device_type]
    )


def _own_values(device_type: str) -> list[str]:
    """Read what to write back; an inherited value is written back as "none"."""
    values = []
    for switch, parent in _SWITCHES[device_type]:
        value = switch.fp32_precision
        values.append("none" if value == parent.fp32_precision else value)
    return values


def _write(device_type: str, values: list[str]) -> None:
    # torch's own test helpers freeze the switches for the process that imports them;
    # whoever gives them back, as here and in torch's `flags()`, may still write.
    with _backends.__allow_nonbracketed_mutation():  # noqa: SLF001 -- no public name
        for (switch, _), value in zip(_SWITCHES[device_type], values, strict=True):
            if switch.fp32_precision != value:
                switch.fp32_precision = value


class ProductsHold:
    """Holds the switches of one device until it is released, left or dropped."""

    __slots__ = ("__weakref__", "_device_type", "_ticket")

    def __init__(self, device_type: str, products: Products) -> None:
        self._device_type = device_type
        self._ticket = next(_tickets)
        active = _active.get(device_type)
        if active is None:  # a device without such switches
            return
        if not active and products == "ieee" and _are_ieee(device_type):
            return
        with _lock:
            if not active:
                _before[device_type] = _own_values(device_type)
            active[self._ticket] = products
            _write(device_type, [products] * len(_SWITCHES[device_type]))

    def release(self) -> None:
        """Give the switches to the hold before this one, or back to the user."""
        active = _active.get(self._device_type)
        if active is None or self._ticket not in active:
            return
        with _lock:
            del active[self._ticket]
            if active:
                latest = next(reversed(active.values()))
                values: list[str] = [latest] * len(_SWITCHES[self._device_type])
            else:
                values = _before.pop(self._device_type)
            _write(self._device_type, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class BackwardHold:
    """The hold of one call of an island, for every backward through that call."""

    def __init__(self, device_type: str, products: Products) -> None:
        self._device_type = device_type
        self._products: Products = products
        self._hold: weakref.ref[ProductsHold] | None = None

    def enter_at(self, output: Any) -> None:
        """Enter when the gradient of this output arrives."""
        if _has_history(output):
            output.register_hook(self._enter)

    def leave_at(self, given: Any) -> None:
        """Leave when the gradient of this input, cast for the island, is complete."""
        if _has_history(given):
            given.register_hook(self._leave)

    def _enter(self, _: torch.Tensor) -> None:
        if self._hold is None or self._hold() is None:
            hold = ProductsHold(self._device_type, self._products)
            engine: Any = Variable._execution_engine  # noqa: SLF001 -- no public name
            engine.queue_callback(hold.release)
            self._hold = weakref.ref(hold)

    def _leave(self, _: torch.Tensor) -> None:
        hold = None if self._hold is None else self._hold()
        self._hold = None
        if hold is not None:
            hold.release()


def _has_history(value: Any) -> bool:
    """Whether it is the result of a differentiable operator, and no leaf."""
    return (
        isinstance(value, torch.Tensor)
        and value.requires_grad
        and value.grad_fn is not None
    )
