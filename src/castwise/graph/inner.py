"""What runs a planned graph, and in which format it keeps values for its backward.

eager       runs the graph operator by operator
aot_eager   as eager, forward and backward captured ahead of time
inductor    generates kernels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from castwise.errors import SettingsError

if TYPE_CHECKING:
    from torch import fx

    from castwise.memory.saves import SavesBill

Inner = Literal["inductor", "aot_eager", "eager"]
"""What runs a planned graph."""

INNER: tuple[Inner, ...] = get_args(Inner)
"""Every inner compiler."""

Compile = Callable[["fx.GraphModule", list[Any]], Any]
"""From a graph and its inputs to what runs it."""


def inner_compiler(inner: Inner, saves: str | None) -> tuple[Compile, list[SavesBill]]:
    """Return what compiles graphs, and where it writes what they keep.

    Args:
        inner: What runs a graph.
        saves: The format of what is kept for a backward; none leaves it as it is, and
            so does `eager`, where autograd keeps it (`castwise.store_saves`).

    Raises:
        SettingsError: There is no such compiler.
    """
    if inner not in INNER:
        raise SettingsError(
            f"an inner compiler is one of {', '.join(INNER)}, got {inner!r}"
        )
    if inner == "eager":
        return lambda module, _: module.forward, []
    if saves is None:
        from torch._dynamo.backends.registry import lookup_backend  # noqa: PLC0415 -- loads Dynamo

        return lookup_backend(inner), []
    return _storing_inductor(saves) if inner == "inductor" else _storing_aot(saves)


def _storing_inductor(saves: str) -> tuple[Compile, list[SavesBill]]:
    import torch._functorch.config as functorch_config  # noqa: PLC0415 -- loads Inductor
    import torch._inductor.config as inductor_config  # noqa: PLC0415 -- as above
    from torch._functorch.partitioners import (  # noqa: PLC0415 -- as above
        min_cut_rematerialization_partition,
    )
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 -- as above
    from torch._inductor.decomposition import select_decomp_table  # noqa: PLC0415 -- as above

    from castwise.graph.saved_values import StoringPartition  # noqa: PLC0415 -- as above

    cut = inductor_config.custom_partitioner_fn or min_cut_rematerialization_partition
    partition = StoringPartition(saves, cut, select_decomp_table())

    def compile_(module: fx.GraphModule, inputs: list[Any]) -> Any:
        # generated code is cached; a joint graph that is not cut again has no bill
        with (
            functorch_config.patch(enable_autograd_cache=False),
            inductor_config.patch(custom_partitioner_fn=partition),
        ):
            return compile_fx(module, inputs)

    return compile_, partition.bills


def _storing_aot(saves: str) -> tuple[Compile, list[SavesBill]]:
    from torch._dynamo.backends.common import aot_autograd  # noqa: PLC0415 -- loads AOTAutograd
    from torch._functorch._aot_autograd.utils import (  # noqa: PLC0415 -- as above
        make_boxed_func,
    )
    from torch._functorch.partitioners import (  # noqa: PLC0415 -- as above
        min_cut_rematerialization_partition,
    )

    from castwise.graph.saved_values import StoringPartition  # noqa: PLC0415 -- as above

    partition = StoringPartition(saves, min_cut_rematerialization_partition)
    compile_ = aot_autograd(
        fw_compiler=lambda module, _: make_boxed_func(module.forward),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return compile_, partition.bills
