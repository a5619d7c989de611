"""A target: what evidence is gathered on. A model, some batches, a loss.

On the command line it is written `file.py:function`. The function takes nothing and
returns a `Target`, or `(model, batches, loss_fn)`, or `(model, batches, loss_fn,
optimizer)`:

    batches    tuples of the model's inputs and, last, the target of the loss
    loss_fn    from the model's output and that target to a scalar

The file is the user's own code and is executed, as `python file.py` would execute it;
nothing else ever is. Whatever goes wrong in it is told with its line.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from castwise.errors import TargetError

LossFn = Callable[[Any, Any], torch.Tensor]
Batch = Sequence[Any]

FORM = "(model, batches, loss_fn), the same with an optimizer, or a Target"
_WITHOUT_OPTIMIZER, _WITH_OPTIMIZER = 3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A model with batches and a loss, and perhaps the optimizer that trains it."""

    model: nn.Module
    """The unedited model."""

    batches: tuple[Batch, ...]
    """Each the model's inputs and, last, the target of the loss; at least one."""

    loss_fn: LossFn
    """From the model's output and the target to a scalar."""

    optimizer: torch.optim.Optimizer | None = None
    """What updates the weights, where that matters."""

    name: str = "target"
    """How it is called in reports."""


def checked_batches(
    batches: Iterable[Batch], *, what: str, at_least: int = 0
) -> tuple[Batch, ...]:
    """Return batches as a tuple.

    Args:
        batches: Tuples of the model's inputs and, last, the target.
        what: Who needs them, such as "a contract".
        at_least: How many there must be.

    Raises:
        TargetError: There are fewer, or one is not such a tuple.
    """
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        raise TargetError(
            f"{what} needs batches of (inputs..., target), got a "
            f"{type(batches).__name__}; give an iterable such as [(x, y)]"
        )
    found = tuple(batches)
    if len(found) < at_least:
        raise TargetError(f"{what} needs at least {at_least} batches, got {len(found)}")
    for batch in found:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TargetError(
                f"{what} needs batches of (inputs..., target), got one that is a "
                f"{type(batch).__name__}; give an iterable such as [(x, y)]"
            )
    return found


def checked_loss(loss: Any, *, what: str) -> torch.Tensor:
    """Return a loss that can be differentiated.

    Raises:
        TargetError: It is no scalar, or depends on no weight.
    """
    is_scalar = isinstance(loss, torch.Tensor) and loss.numel() == 1
    if not is_scalar or not loss.requires_grad:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
        came = "no gradient" if is_scalar else came or type(loss).__name__
        raise TargetError(
            f"{what} needs a loss of one number that depends on the weights, got "
            f"{came}; return a scalar tensor from loss_fn"
        )
    found: torch.Tensor = loss
    return found


def load_target(text: str) -> Target:
    """Run the function that a text `file.py:function` names.

    Raises:
        TargetError: Text, file, function or what it returns is not as needed, or the
            user's code raised; the message names the line.
    """
    path_text, colon, function = text.rpartition(":")
    path = Path(path_text)
    if not colon or path.suffix != ".py" or not function.isidentifier():
        raise TargetError(
            f"a target is written file.py:function, got {text!r}; `castwise init` "
            "writes an example"
        )
    if not path.is_file():
        raise TargetError(f"no file {path} for the target {text}")
    build = getattr(_module_of(path), function, None)
    if not callable(build):
        raise TargetError(f"{path} has no function {function!r}")
    return _target_of(_guarded(build, path, f"{function}()"), text)


def _module_of(path: Path) -> Any:
    """Import a file by its path; what lies beside it can be imported from it."""
    name = f"castwise_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    loader = spec.loader
    _guarded(lambda: loader.exec_module(module), path, "importing it")
    return module


def _guarded(call: Callable[[], Any], path: Path, doing: str) -> Any:
    """Call the user's code; tell what it raised, and where, in one sentence."""
    try:
        return call()
    except TargetError:
        raise
    except Exception as error:
        line = _line_in(path, error)
        what = f"{type(error).__name__}: {error}".strip().rstrip(".")
        raise TargetError(f"{path}{line}, {doing}: {what}") from error


def _line_in(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    own = str(path.resolve())
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == own]
    return f":{lines[-1]}" if lines else ""


def _target_of(value: Any, text: str) -> Target:
    if isinstance(value, Target):
        value = value.model, value.batches, value.loss_fn, value.optimizer
    if not isinstance(value, tuple) or len(value) not in {
        _WITHOUT_OPTIMIZER,
        _WITH_OPTIMIZER,
    }:
        raise TargetError(
            f"{text} must return {FORM}, got {type(value).__name__}"
            + (f" of {len(value)}" if isinstance(value, tuple) else "")
        )
    model, batches, loss_fn = value[:_WITHOUT_OPTIMIZER]
    optimizer = value[_WITHOUT_OPTIMIZER] if len(value) == _WITH_OPTIMIZER else None
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{text} must return a torch.nn.Module first, got {type(model).__name__}"
        )
    if not callable(loss_fn):
        raise TargetError(
            f"{text} must return a callable loss_fn third, got {type(loss_fn).__name__}"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TargetError(
            f"{text} must return a torch.optim.Optimizer fourth, got "
            f"{type(optimizer).__name__}"
        )
    return Target(
        model=model,
        batches=checked_batches(batches, what=text, at_least=1),
        loss_fn=loss_fn,
        optimizer=optimizer,
        name=text,
    )
