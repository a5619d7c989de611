"""The tape of a step: how its losses came about, by reference, to be run again.

    with run.step() as step:
        out = model(x)              # a call of the model: its inputs, the random state
        loss = loss_fn(out, y)      # functions of torch that were called from here on
        step.backward(loss)         # the loss, as the result of one of those

It is kept for the length of one step and read only if that step is skipped. Tensors
that the step made are remembered by where they were made and not held; inputs are held,
which the loop does as well. Those of earlier losses of the same step are let go when
all of them pass `ROOM` bytes.

Not on the tape, so that such a loss cannot run again: what `torch.compile` ran, calls
of parts of the model instead of the model, functions of autograd of one's own in the
loss, and what comes after `LENGTH` calls. A step may be given the computation itself
instead (`run.step(again=...)`).
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from castwise.errors import StepError

if TYPE_CHECKING:
    from types import FrameType

    from torch import nn

Call = Callable[[str, Callable[..., Any], Any, Any], Any]
"""Calls a function with arguments and keywords, for a line of the user's code."""

ROOM = 64 << 20
"""Bytes of inputs that are kept for losses before the last one."""

LENGTH = 256
"""Calls that are kept; a loss that takes more costs no more than these."""

_DEPTH = 5  # how deep tensors may hide in what a model returns

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1] / "training"))


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that an entry of the tape made."""

    entry: int
    place: int


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A tensor with a gradient that nobody saw being made."""


@dataclass(slots=True)
class _Entry:
    """One call: of the model, or of a function of torch."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    where: str
    grad: bool
    autocast: bool
    random_state: list[torch.Tensor] | None
    in_place: bool


class Tape(TorchFunctionMode):
    """Listens to one model in the steps of one run."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._model = model
        self._device = device
        self._is_open = self._listens = False
        self._depth = 0
        self._random_states: list[torch.Tensor] = []
        self._pending: _Entry | None = None
        self._forget()
        before = model.register_forward_pre_hook(_Before(self), with_kwargs=True)
        self._hooks = [before, model.register_forward_hook(_After(self))]

    def open(self, *, listens: bool = True) -> None:
        """Begin a step; one that was given its computation needs no tape."""
        self._forget()
        self._depth = torch._C._len_torch_function_stack()  # noqa: SLF001 -- no public name
        self._random_states = [] if listens else _random_states(self._device)
        self._is_open = listens

    def rewind(self) -> None:
        """Put the random state of the beginning of the step back."""
        _set_random_states(self._device, self._random_states)

    def close(self) -> None:
        """End a step, and let go of everything that was held for it."""
        self._mute()
        self._is_open = False
        self._forget()

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember how a loss came about; called before its backward."""
        self._mute()
        if self._is_open:
            self._losses.append(self._known(loss))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def losses(self, call: Call) -> Iterator[torch.Tensor]:
        """Compute the losses of the open step again, one after the other.

        Args:
            call: Calls a function that the user's code called at a line.

        Raises:
            StepError: A loss did not come about by what is on the tape.
        """
        self._mute()
        self._is_open = False  # what runs again is not recorded again
        for loss in self._losses:
            if not isinstance(loss, _Made):
                raise StepError(
                    "the computation of the loss was not seen (a compiled model, parts "
                    "of the model called by themselves, or a custom function); give it "
                    "to the step: run.step(again=lambda: loss_fn(model(x), y))"
                )
            yield self._again(loss, call)

    def is_of(self, module: nn.Module) -> bool:
        """Whether a module is the model itself, and no replica of it."""
        return module is self._model

    # What is heard

    def before_model(self, args: Any, kwargs: Any) -> None:
        """Note a call of the model; called by its hook."""
        if not self._is_open or not torch.is_grad_enabled():
            return
        self._mute()
        if self._losses and self._held > ROOM:
            self._forget(but_losses=True)
        entry = self._entry(self._model, args, kwargs)
        entry.random_state = _random_states(self._device)
        self._pending = entry

    def after_model(self, result: Any) -> None:
        """Note what the model returned, and listen to what becomes of it."""
        entry, self._pending = self._pending, None
        if entry is None or not self._is_open:
            return
        self._append(entry, result)
        if torch._C._len_torch_function_stack() == self._depth:  # noqa: SLF001 -- as above
            self.__enter__()  # type: ignore[no-untyped-call]
            self._listens = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling() or len(self._entries) > LENGTH:
            return result
        name = getattr(func, "__name__", "")
        in_place = _is_in_place(name, kwargs)
        if in_place or _has_tensor(result):
            entry = self._entry(func, args, kwargs)
            entry.in_place = in_place
            self._append(entry, args[0] if in_place and args else result)
        return result

    def _mute(self) -> None:
        """Stop listening, unless somebody else listens above us."""
        if not self._listens:
            return
        at = torch._C._len_torch_function_stack()  # noqa: SLF001 -- no public name
        if at and torch._C._get_function_stack_at(at - 1) is self:  # noqa: SLF001 -- as above
            self.__exit__(None, None, None)
            self._listens = False

    def _forget(self, *, but_losses: bool = False) -> None:
        self._losses: list[_Made | _Unknown | torch.Tensor]
        self._losses = [_Unknown()] * len(self._losses) if but_losses else []
        self._entries: list[_Entry] = []
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], _Made]] = {}
        self._held = 0
        self._pending = None

    def _entry(self, func: Callable[..., Any], args: Any, kwargs: Any) -> _Entry:
        return _Entry(
            func=func,
            args=self._encoded(args),
            kwargs=self._encoded(kwargs),
            where=_line_of_user(sys._getframe(2)),  # noqa: SLF001 -- the only fast way
            grad=torch.is_grad_enabled(),
            autocast=torch.is_autocast_enabled(self._device.type),
            random_state=None,
            in_place=False,
        )

    def _append(self, entry: _Entry, result: Any) -> None:
        number = len(self._entries)
        if number == LENGTH:  # what comes now, nobody saw
            self._made.clear()
        self._entries.append(entry)
        for place, tensor in enumerate(tensors_in(result)):
            self._made[id(tensor)] = weakref.ref(tensor), _Made(number, place)

    def _known(self, tensor: torch.Tensor) -> _Made | _Unknown | torch.Tensor:
        reference, made = self._made.get(id(tensor), (None, None))
        if made is not None and reference is not None and reference() is tensor:
            return made
        if tensor.grad_fn is not None:
            return _Unknown()
        self._held += tensor.numel() * tensor.itemsize
        return tensor

    def _encoded(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._known(value)
        if type(value) in {tuple, list}:
            return type(value)(self._encoded(each) for each in value)
        if type(value) is dict:
            return {name: self._encoded(each) for name, each in value.items()}
        return value

    # What is run again

    def _again(self, loss: _Made, call: Call) -> torch.Tensor:
        results: dict[int, list[torch.Tensor]] = {}
        for number in sorted(self._needed(loss)):
            entry = self._entries[number]
            args, kwargs = (
                _decoded(each, results) for each in (entry.args, entry.kwargs)
            )
            with self._surroundings(entry):
                result = call(entry.where, entry.func, args, kwargs)
            results[number] = list(tensors_in(args[0] if entry.in_place else result))
        return results[loss.entry][loss.place]

    def _needed(self, loss: _Made) -> set[int]:
        """The entries that a loss depends on; whatever else ran is left alone."""
        needed: set[int] = set()
        pending = [loss.entry]
        while pending:
            number = pending.pop()
            if number in needed:
                continue
            needed.add(number)
            entry = self._entries[number]
            for each in _leaves((entry.args, entry.kwargs)):
                if isinstance(each, _Unknown):
                    raise StepError(
                        f"{entry.where} uses a tensor that was not seen being made; "
                        "give the computation to the step: run.step(again=...)"
                    )
                if isinstance(each, _Made):
                    pending.append(each.entry)
            first = entry.args[0] if entry.args else None
            if entry.in_place and not isinstance(first, _Made):
                raise StepError(
                    f"{entry.where} writes into a tensor from before the step, and "
                    "would write twice"
                )
        return needed

    @contextlib.contextmanager
    def _surroundings(self, entry: _Entry) -> Iterator[None]:
        kind = self._device.type
        if entry.random_state is not None:
            _set_random_states(self._device, entry.random_state)
        off = torch.is_autocast_enabled(kind) and not entry.autocast
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(entry.grad))
            if off:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


class _Hook:
    """A hook that a copy of the model does not inherit, and that can be pickled."""

    def __init__(self, tape: Tape | None = None) -> None:
        self._tape = tape

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._tape is None:
            return
        if self._tape.is_of(module):
            self._tape.before_model(args, kwargs)


class _After(_Hook):
    def __call__(self, module: nn.Module, _: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or self._tape is None:
            return
        if self._tape.is_of(module):
            self._tape.after_model(result)


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result, those in objects of one's own included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each, depth - 1)
    elif depth and isinstance(value, dict):
        yield from tensors_in(list(value.values()), depth)
    elif depth and hasattr(value, "__dict__") and not callable(value):
        yield from tensors_in(vars(value), depth - 1)


def _has_tensor(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    written = name.endswith("_") and not name.endswith("__")
    augmented = name in {"__setitem__", "__set__"} or (
        name.startswith("__i") and name not in {"__invert__", "__index__", "__int__"}
    )
    return written or augmented or kwargs.get("out") is not None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _decoded(value: Any, results: dict[int, list[torch.Tensor]]) -> Any:
    if isinstance(value, _Made):
        return results[value.entry][value.place]
    if type(value) in {tuple, list}:
        return type(value)(_decoded(each, results) for each in value)
    if type(value) is dict:
        return {name: _decoded(each, results) for name, each in value.items()}
    return value


def _line_of_user(frame: FrameType | None) -> str:
    """`file:line` of the nearest frame that is neither torch's nor ours."""
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None:
        return "unknown"
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
