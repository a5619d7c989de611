import math
import random
import struct
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castwise.checkpoints import load_checkpoint, save_checkpoint
from castwise.checkpoints.tree import _TORCH_DTYPES, decode, encode
from castwise.errors import CheckpointError


def assert_identical(a: Any, b: Any) -> None:
    """Types, structure, order of keys and every bit agree."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert [type(key) for key in a] == [type(key) for key in b]
        assert list(map(repr, a)) == list(map(repr, b))
        for x, y in zip(a.values(), b.values(), strict=True):
            assert_identical(x, y)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert raw(a) == raw(b)
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype.str, a.shape) == (b.dtype.str, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, float):
        assert struct.pack(">d", a) == struct.pack(">d", b)
    else:
        assert a == b


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes in memory order."""
    if not tensor.numel():
        return b""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def round_trip(tree: Any) -> Any:
    """Encode and decode in memory."""
    document, blobs = encode(tree)
    contents = {blob.name: blob.fetch().copy() for blob in blobs}
    return decode(document, lambda name: contents[name].copy())


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern may come up: NaN payloads, subnormals, both zeros."""
    num_bytes = math.prod(shape) * dtype.itemsize
    bits = torch.empty(num_bytes, dtype=torch.uint8).random_()
    if dtype is torch.bool:
        bits &= 1
    return bits.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", sorted(_TORCH_DTYPES))
def test_every_torch_dtype_round_trips_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Every dtype, at odd sizes, 0-d, empty, through a file."""
    torch.manual_seed(7)
    dtype = _TORCH_DTYPES[name]
    tree = {
        "odd": random_bits(dtype, 3, 7, 1),
        "zero_d": random_bits(dtype),
        "empty": random_bits(dtype, 0, 5),
        "long": random_bits(dtype, 1000),
    }
    path = save_checkpoint(tmp_path / "c", tree, kind="test")
    assert_identical(tree, load_checkpoint(path, kind="test"))


def test_the_table_of_dtypes_holds_every_format_of_training() -> None:
    """A table built from torch must not lose what training needs."""
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "complex128", "bool"):
        assert name in _TORCH_DTYPES
    assert not any(name.startswith("q") for name in _TORCH_DTYPES)


def test_views_are_stored_by_their_elements() -> None:
    """Non-contiguous, expanded, conjugated, negated views and parameters."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    z = torch.randn(5, dtype=torch.complex64)
    tree = [base.t(), base[::2, 1::3], base[:1].expand(3, 6), z.conj(), z.conj().imag]
    for before, after in zip(tree, round_trip(tree), strict=True):
        assert after.is_contiguous()
        assert raw(before) == raw(after)
    after = round_trip(torch.nn.Parameter(base))
    assert type(after) is torch.Tensor
    assert not after.requires_grad


def test_tied_weights_are_one_tensor_again() -> None:
    """Aliases share one blob; different views of one storage stay apart and exact."""
    weight = torch.randn(3, 5)
    tied = torch.nn.Parameter(weight)
    tree = {"embedding": tied, "head": tied.detach(), "row": weight[1], "t": weight.t()}
    _, blobs = encode(tree)
    assert [blob.name for blob in blobs] == ["embedding", "row", "t"]
    loaded = round_trip(tree)
    assert loaded["embedding"] is loaded["head"]
    assert torch.equal(loaded["row"], weight[1])
    assert torch.equal(loaded["t"], weight.t())


def test_a_loaded_tensor_owns_writable_memory() -> None:
    """Training continues in place on what was loaded."""
    loaded = round_trip({"a": torch.ones(3), "b": np.ones(3)})
    loaded["a"].add_(1)
    loaded["b"] += 1
    assert loaded["a"].tolist() == loaded["b"].tolist() == [2, 2, 2]


def test_random_states_continue_the_same_streams() -> None:
    """Python's, numpy's (both kinds) and torch's generators."""
    generator = np.random.default_rng(5)
    legacy = np.random.RandomState(5)
    python = random.Random(5)
    tree = {
        "generator": generator.bit_generator.state,
        "legacy": legacy.get_state(),
        "python": python.getstate(),
        "torch": torch.get_rng_state(),
    }
    loaded = round_trip(tree)
    assert_identical(tree, loaded)
    expected = (generator.random(3), legacy.rand(3), python.random(), torch.rand(3))
    generator.bit_generator.state = loaded["generator"]
    legacy.set_state(loaded["legacy"])
    python.setstate(loaded["python"])
    torch.set_rng_state(loaded["torch"])
    again = (generator.random(3), legacy.rand(3), python.random(), torch.rand(3))
    for a, b in zip(expected, again, strict=True):
        assert np.array_equal(a, b)


def test_an_optimizer_state_comes_back_with_its_integer_keys() -> None:
    """`optimizer.state_dict()` is the hardest tree that training makes."""
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    loaded = round_trip(state)
    assert_identical(state, loaded)
    assert type(loaded["model"]) is OrderedDict
    assert list(loaded["optimizer"]["state"]) == [0, 1]
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def test_paths_that_collide_stay_apart() -> None:
    """Keys may hold slashes, dots, equal texts of other types, or nothing."""
    tree = {
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        1: torch.tensor(3),
        "1": torch.tensor(4),
        "": torch.tensor(5),
        "__metadata__": torch.tensor(6),
        "\ud800\n": torch.tensor(7),
        (1, None): torch.tensor(8),
        None: torch.tensor(9),
        2.5: torch.tensor(10),
        float("-inf"): torch.tensor(11),
    }
    assert_identical(tree, round_trip(tree))


class Colour(IntEnum):
    """A subclass of int."""

    RED = 1


class Pair(NamedTuple):
    """A subclass of tuple."""

    a: int
    b: int


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Pair(1, 2),
        {1, 2},
        object(),
        torch.float32,
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        np.array([object()]),
        np.zeros(2, dtype=[("x", "f4")]),
        lambda: 0,
        1 + 2j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_come_back_is_refused_by_name(value: Any) -> None:
    """The message says the type and the place; nothing is converted in silence."""
    with pytest.raises(CheckpointError, match=r"got .* at deep/1/x"):
        encode({"deep": [0, {"x": value}]})


def test_a_tree_that_contains_itself_is_refused() -> None:
    """No recursion error leaves the room."""
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(CheckpointError, match="at most 100 levels"):
        encode(knot)


def _seeded(seed: int, dtype: str, shape: list[int]) -> torch.Tensor:
    torch.manual_seed(seed)
    return random_bits(_TORCH_DTYPES[dtype], *shape)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**20, max_value=10**400)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text()
    | st.binary(max_size=40)
)
leaves = scalars | st.builds(
    _seeded,
    st.integers(0, 2**20),
    st.sampled_from(sorted(_TORCH_DTYPES)),
    st.lists(st.integers(0, 3), max_size=3),
)
arrays = st.builds(
    lambda code, values: np.array(values, dtype="u1").astype(code),
    st.sampled_from(["<f4", ">f4", "<u2", "?", "c16", "S3", "<U2", "m8[s]", "f2"]),
    st.lists(st.integers(0, 200), max_size=5),
)
keys = st.none() | st.booleans() | st.integers() | st.text() | st.floats(width=32)
trees = st.recursive(
    leaves | arrays | arrays.filter(len).map(lambda a: a[0]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys | st.tuples(keys, keys), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(tree=trees)
def test_any_tree_round_trips_bit_for_bit(
    tree: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through a file, whatever nests in whatever."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_checkpoint(path, tree, kind="test")
    assert_identical(tree, load_checkpoint(path, kind="test"))
