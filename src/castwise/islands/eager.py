"""Calls that `torch.compile` leaves out of its graphs, and captures nothing inside of.

Dynamo cannot capture a backward that differentiates, nor products that are emulated.
Functions marked here stand between two graphs, and run there as in eager mode; under
`fullgraph=True` Dynamo refuses them and gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])


def out_of_graphs(because: str) -> Callable[[F], F]:
    """Mark a function; what `torch.compiler.disable` does, without loading Dynamo."""

    def mark(function: F) -> F:
        vars(function)["_torchdynamo_disable"] = True
        vars(function)["_torchdynamo_disable_msg"] = because
        eval_frame.set_code_exec_strategy(
            function.__code__,
            eval_frame._FrameExecStrategy(  # noqa: SLF001 -- the public ways load Dynamo
                eval_frame._FrameAction.SKIP,  # noqa: SLF001 -- as above
                eval_frame._FrameAction.SKIP,  # noqa: SLF001 -- as above
            ),
        )
        return function

    return mark
