"""Recompute: keep what goes into a block, and run the block again for its backward.

    recomputed = recompute(model, every=2)       # nothing in the model is edited
    ...                                          # train
    recomputed.remove()                          # and nothing is left behind

Without it the activations of all blocks wait for the backward pass at the same time;
with it those of one block, for the price of a second forward. Gradients are the same
bit by bit: a block runs again in the formats of its first run (autocast, islands), with
the same random numbers, and with its buffers as they were. Afterwards the buffers are
put back, so that the running statistics of a norm do not learn from a batch twice,
which they do under `torch.utils.checkpoint` alone.

The mechanism is torch's non-reentrant checkpoint around `forward`. It lives in the
instance, so classes, hooks, `state_dict` keys and islands stay as they are, whatever is
put on the model first, a policy or this.

What a *block* is where none is named: what stands in a `ModuleList`, `ModuleDict` or
`Sequential` and has modules of its own. Blocks inside of blocks do not count.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from castwise.errors import SettingsError
from castwise.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_FORWARD = "forward"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def recompute(
    model: nn.Module,
    *,
    every: int | None = None,
    modules: Sequence[str] | None = None,
) -> Recomputed:
    """Run modules again in the backward pass instead of keeping their activations.

    Args:
        model: Any module tree; its code stays as it is.
        every: Recompute the first of every so many blocks. Default: 1, all blocks.
        modules: Globs on fqns (`*` crosses dots), instead of blocks. What stands below
            a module that is recomputed is recomputed with it, once.

    Returns:
        What was done; its `remove` undoes it.

    Raises:
        SettingsError: The model has no blocks, a glob matches nothing, both or a count
            below 1 were given, or a module is recomputed already.
    """
    if every is not None and modules is not None:
        raise SettingsError(
            "recompute chooses by every= or by modules=, and both were given; keep one"
        )
    if every is not None and every < 1:
        raise SettingsError(f"recompute needs every >= 1, got {every}; 1 takes all")
    if modules is not None:
        chosen = _named(model, modules)
    else:
        chosen = blocks_of(model, what="recompute")[:: every or 1]
    return recompute_modules(model, chosen)


def recompute_modules(model: nn.Module, fqns: Sequence[str]) -> Recomputed:
    """Recompute exactly these modules.

    Raises:
        SettingsError: A module is recomputed already.
    """
    found = [(fqn, model.get_submodule(fqn)) for fqn in fqns]
    for fqn, module in found:
        if is_recomputed(module):
            raise SettingsError(
                f"{fqn or 'the model'} is recomputed already; remove the recompute in "
                "force before another one is chosen"
            )
    for _, module in found:
        own = module.__dict__.get(_FORWARD)
        module.__dict__[_FORWARD] = _RunAgain(module, own)
    return Recomputed(model=model, modules=tuple(fqns))


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputed:
    """Modules that are recomputed; made by `recompute`."""

    model: nn.Module
    """The model that they stand in."""

    modules: tuple[str, ...]
    """Their fqns, in the order of the model."""

    def remove(self) -> None:
        """Keep activations as before; a second call does nothing."""
        for fqn in self.modules:
            module = self.model.get_submodule(fqn)
            again = module.__dict__.get(_FORWARD)
            if isinstance(again, _RunAgain):
                del module.__dict__[_FORWARD]
                if again.own is not None:
                    module.__dict__[_FORWARD] = again.own

    def __enter__(self) -> Self:
        """Return itself: the recompute holds within a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.remove()

    def summary(self) -> str:
        """One line for a log."""
        shown = ", ".join(fqn or "the model" for fqn in self.modules[:4])
        more = len(self.modules) - 4
        return f"recompute {shown}" + (f" and {more} more" if more > 0 else "")


def is_recomputed(module: nn.Module) -> bool:
    """Whether a recompute stands on this very module."""
    return isinstance(module.__dict__.get(_FORWARD), _RunAgain)


def blocks_of(model: nn.Module, *, what: str) -> list[str]:
    """List the fqns of a model's blocks, in the order of the model.

    Args:
        model: Any module tree.
        what: Who needs them, for the message.

    Raises:
        SettingsError: There are none.
    """
    found = list(_blocks_below(model, ""))
    if not found:
        raise SettingsError(
            f"{what} looks for blocks, modules with modules of their own in a "
            f"ModuleList, ModuleDict or Sequential, and {type(model).__name__} has "
            "none; name modules, such as modules=['encoder']"
        )
    return found


def _blocks_below(module: nn.Module, prefix: str) -> Iterator[str]:
    inside = isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        fqn = f"{prefix}{name}"
        is_bare = isinstance(child, nn.ModuleList | nn.ModuleDict)  # never called
        if inside and not is_bare and next(child.children(), None) is not None:
            yield fqn
        else:
            yield from _blocks_below(child, f"{fqn}.")


def _named(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """List the outermost modules that the globs match."""
    fqns = [fqn for fqn, _ in model.named_modules()]
    for glob in globs:
        if not any(fnmatchcase(fqn, glob) for fqn in fqns):
            raise SettingsError(
                f"recompute finds no module {glob!r} in {type(model).__name__}"
                f"{did_you_mean(glob, fqns, cutoff=0.5)}; correct it or leave it out"
            )
    chosen: list[str] = []
    for fqn in fqns:
        if any(
            fqn == above or fqn.startswith(f"{above}.") for above in chosen if above
        ):
            continue
        if any(fnmatchcase(fqn, glob) for glob in globs):
            bare = isinstance(model.get_submodule(fqn), nn.ModuleList | nn.ModuleDict)
            if not bare:  # a list is never called; what stands in it is
                chosen.append(fqn)
        if chosen == [""]:
            break
    return chosen


@final
class _RunAgain:
    """Stands as `forward` in a module that is recomputed.

    A class and no closure, so that the model can still be copied and pickled.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own  # a forward that somebody had put into the instance before
        self.calls_class = own is None  # what islands ask before they change the class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        # looked up at each call: a policy may have made the module an island since
        forward = self.own or functools.partial(type(module).forward, module)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # a graph knows which buffers it writes
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        run = _Passage(module, forward, structure)
        # The first weight says which device's random state to keep, even where the
        # inputs hide in objects that torch does not look into.
        return checkpoint(run, _first_weight(module), *leaves, use_reentrant=False)


@final
class _Passage:
    """One call of a module that is recomputed: its first run, and those that follow."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], structure: Any
    ) -> None:
        self._module = module
        self._forward = forward
        self._structure = structure
        self._before: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, _: torch.Tensor | None, *leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        if self._before is not None:
            with _rewound(self._before):
                return self._forward(*args, **kwargs)
        kept = [
            (buffer, buffer._version, buffer.detach().clone())  # noqa: SLF001 -- no public name
            for buffer in self._module.buffers()
        ]
        written = _running_statistics(self._module)
        outputs = self._forward(*args, **kwargs)
        self._before = [
            (buffer, before)
            for buffer, version, before in kept
            if buffer._version != version or id(buffer) in written  # noqa: SLF001 -- as above
        ]
        return outputs


@contextlib.contextmanager
def _rewound(before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Give buffers their earlier contents, and the later ones back at the end.

    Through `.data`, so that autograd does not take it for a change of what it saved.
    """
    after = [buffer.detach().clone() for buffer, _ in before]
    for buffer, content in before:
        buffer.data.copy_(content)
    try:
        yield
    finally:
        for (buffer, _), content in zip(before, after, strict=True):
            buffer.data.copy_(content)


def _running_statistics(module: nn.Module) -> set[int]:
    """Buffers of norms in train mode, which they write without telling autograd."""
    return {
        id(buffer)
        for each in module.modules()
        if isinstance(each, _NormBase) and each.training
        for buffer in each.buffers(recurse=False)
    }


def _first_weight(module: nn.Module) -> torch.Tensor | None:
    weight = next(module.parameters(), None)
    return weight if weight is not None else next(module.buffers(), None)
