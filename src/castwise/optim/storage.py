"""How a weight of 16 bits keeps what the update needs and 16 bits cannot hold.

A bf16 number has 8 significant bits: adding an update smaller than half a unit of its
last place, 0.2 % of the weight at worst, changes nothing. A weight of 1.0 trained at a
learning rate of 1e-4 stands still for ever. Each storage keeps the weight that the
model computes with in 16 bits and finds the lost bits another place:

    name        beside the weight     bytes   the update happens to
    master      fp32 copy             6       the copy: exact fp32
    split       int16 remainder       4       weight and remainder together: exact fp32
    split8      int8 remainder        3       the same, 16 of fp32's 24 bits
    kahan       16-bit compensation   4       weight plus compensation
    stochastic  nothing               2       the weight, rounded up or down by lot
    plain       nothing               2       the weight, and small updates are lost

`split` and `master` give the same numbers; `pieces` draws the bits of `split`. `kahan`
is compensated summation (Kahan 1965; Zamirai et al. 2020, arXiv 2010.06192, use it and
stochastic rounding for bf16 weights). A storage knows one tensor at a time and no
optimizer; `holding` puts it under one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, TypeAlias, final

import torch

from castwise.dtypes import format_of
from castwise.errors import SettingsError, WeightStorageError
from castwise.formats import parse_format
from castwise.optim.pieces import join_8, join_16, split_8, split_16
from castwise.rounding import cast_stochastic

Extras: TypeAlias = dict[str, torch.Tensor]
"""What a storage keeps beside one weight, by name."""

_LARGE = 1 << 14  # elements: below it, torch's operators stay in the cache

_MIXER = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: spreads small integers apart


class WeightStorage(ABC):
    """A way to hold weights; holds nothing itself but its settings."""

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]] = ("bf16", "fp16")
    """The formats in which the model may see the weight."""

    bytes_beside: ClassVar[int]
    """Bytes per parameter beside the 16-bit weight."""

    @abstractmethod
    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Write `weight` for the first time and return what stands beside it.

        Args:
            full: The weight in fp32.
            weight: The weight that the model sees, in 16 bits, written.
            index: Place of the parameter in its optimizer.
        """

    @abstractmethod
    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Return the fp32 weight that the optimizer is to update in place."""

    @abstractmethod
    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Write an updated fp32 weight back into `weight` and `extras`, in place."""


@final
class MasterStorage(WeightStorage):
    """An fp32 copy of the weight, which the 16-bit weight is rounded from."""

    name = "master"
    bytes_beside = 4

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Copy the fp32 weight."""
        del index
        weight.copy_(full)
        return {"master": full.clone()}

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Return the master itself: it is updated where it lies."""
        del weight
        return extras["master"]

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Round the master into the weight."""
        if full.data_ptr() != extras["master"].data_ptr():
            extras["master"].copy_(full)
        weight.copy_(full)


@final
class SplitStorage(WeightStorage):
    """The bf16 weight and 16 remaining bits, together the exact fp32 weight."""

    name = "split"
    formats = ("bf16",)
    bytes_beside = 2

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Split the weight."""
        del index
        low = torch.empty_like(weight, dtype=torch.int16)
        split_16(full, weight, low)
        return {"remainder": low}

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Join the pieces."""
        low = extras["remainder"]
        if is_worth_machine_code(weight, low):
            from castwise.optim import machine_table  # noqa: PLC0415 -- imports numba

            return machine_table.join(weight, low)
        return join_16(weight, low)

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Split the weight again."""
        low = extras["remainder"]
        if is_worth_machine_code(full, weight, low):
            from castwise.optim import machine_table  # noqa: PLC0415 -- imports numba

            machine_table.split(full, weight, low)
        else:
            split_16(full, weight, low)


@final
class Split8Storage(WeightStorage):
    """The bf16 weight and 8 remaining bits: 16 significant bits together."""

    name = "split8"
    formats = ("bf16",)
    bytes_beside = 1

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Split the weight."""
        del index
        low = torch.empty_like(weight, dtype=torch.int8)
        split_8(full, weight, low)
        return {"remainder8": low}

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Join the pieces."""
        return join_8(weight, extras["remainder8"])

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Split the weight again."""
        split_8(full, weight, extras["remainder8"])


@final
class KahanStorage(WeightStorage):
    """The weight and, in the same format, what its rounding lost."""

    name = "kahan"
    bytes_beside = 2

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Round the weight and keep the rest."""
        del index
        extras = {"compensation": torch.empty_like(weight)}
        self.part(full, weight, extras)
        return extras

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Add what was lost."""
        return weight.float().add_(extras["compensation"])

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Round, and keep what the rounding lost."""
        weight.copy_(full)
        lost = full - weight.float()
        # A weight past the largest number is infinite, and inf - inf is NaN.
        extras["compensation"].copy_(torch.where(weight.isfinite(), lost, 0.0))


@final
class StochasticStorage(WeightStorage):
    """The weight alone, rounded to either neighbour, the likelier the nearer.

    What the update lost in one step it gains in another, on average. The lots of a step
    come from a seed, the place of the parameter and a count that is saved with it, so
    that a resumed run draws what the uninterrupted one would have drawn.
    """

    name = "stochastic"
    bytes_beside = 0

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Round to nearest once, and start counting."""
        weight.copy_(full)
        return {"draws": torch.tensor([index, 0], dtype=torch.int64)}

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Return the weight itself, in fp32."""
        del extras
        return weight.float()

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Round by lot."""
        index, count = extras["draws"].tolist()
        extras["draws"][1] += 1
        lot = torch.Generator(weight.device)
        key = (((self.seed * _MIXER + index) * _MIXER) + count) * _MIXER
        lot.manual_seed(key & (2**63 - 1))
        weight.copy_(cast_stochastic(full, format_of(weight.dtype), generator=lot))


@final
class PlainStorage(WeightStorage):
    """The weight alone, rounded to nearest: what an update is too small for is lost."""

    name = "plain"
    bytes_beside = 0

    def begin(self, full: torch.Tensor, weight: torch.Tensor, index: int) -> Extras:
        """Round the weight."""
        del index
        weight.copy_(full)
        return {}

    def join(self, weight: torch.Tensor, extras: Extras) -> torch.Tensor:
        """Return the weight itself, in fp32."""
        del extras
        return weight.float()

    def part(self, full: torch.Tensor, weight: torch.Tensor, extras: Extras) -> None:
        """Round the weight."""
        del extras
        weight.copy_(full)


STORAGES: Mapping[str, type[WeightStorage]] = MappingProxyType(
    {
        storage.name: storage
        for storage in (
            MasterStorage,
            SplitStorage,
            Split8Storage,
            KahanStorage,
            StochasticStorage,
            PlainStorage,
        )
    }
)
"""Every storage by its name."""


def is_worth_machine_code(*tensors: torch.Tensor) -> bool:
    """Return whether operators of torch would walk through memory many times."""
    return all(
        each.device.type == "cpu" and each.is_contiguous() and each.numel() >= _LARGE
        for each in tensors
    )


def make_storage(
    name: str, fmt: str = "bf16", *, seed: int = 0, accept_lost_updates: bool = False
) -> WeightStorage:
    """Return the storage of a name, or say why it may not hold that format.

    Args:
        name: One of `STORAGES`.
        fmt: The format in which the model sees the weights (default: bf16).
        seed: Seed of the lots of stochastic rounding (default: 0).
        accept_lost_updates: The caller knows what `plain` does (default: False).

    Raises:
        SettingsError: There is no such storage.
        WeightStorageError: The storage cannot hold the format, or loses updates
            without having been asked to.
    """
    if name not in STORAGES:
        raise SettingsError(
            f"need a weight storage out of {', '.join(STORAGES)}; got {name!r}"
        )
    kind = STORAGES[name]
    if fmt not in kind.formats:
        raise WeightStorageError(
            f"storage {name} holds weights in {' or '.join(kind.formats)}; got {fmt}; "
            f"take master or kahan for {fmt}"
        )
    if kind is PlainStorage and not accept_lost_updates:
        least = parse_format(fmt).eps / 4  # half the spacing just below a power of two
        raise WeightStorageError(
            f"storage plain loses, without a word, updates below {least:.1e} to "
            f"{2 * least:.1e} of their weight; take split, or pass "
            "accept_lost_updates=True"
        )
    return StochasticStorage(seed) if kind is StochasticStorage else kind()
