"""Nested Python values as a JSON document plus blobs of bytes, and back bit for bit.

What JSON can say exactly stands as itself: None, bool, str, list, int of 64 bits,
finite float. Everything else is an object of one key, its tag:

    {"dict": [[key, value], ...]}      any allowed keys, order kept; also ordered_dict
    {"tuple": [value, ...]}
    {"int": "0x..."}                   wider than 64 bits
    {"float": "7ff8000000000000"}      inf and nan, as their 64 bits
    {"bytes": name}                    a blob
    {"tensor": [name, dtype, shape]}   a blob; also ndarray, and scalar (numpy's)

Types are matched exactly: a subclass (an enum, a named tuple, a sharded tensor) would
come back as its base, so it is refused by name instead. Tensors come back on the CPU,
contiguous, detached. Leaves that alias the same elements of one storage (tied weights)
share one blob, and are one tensor again after loading; overlapping but different views
are stored apart, each exact.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from castwise.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

MAX_DEPTH = 100
"""Levels of nesting; beyond it lies a tree that contains itself."""

# torch or numpy dtype -> its name in a safetensors header; what is absent goes as U8
_SAFETENSORS_NAMES = {
    "bool": "BOOL",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}

_NUMPY_KINDS = "biufcSUmM"  # what lies in memory as plain bytes; no objects, no records

_LEGACY_PREFIXES = ("quint", "qint", "bits")  # need a quantizer, not only bytes

_TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and not str(dtype).removeprefix("torch.").startswith(_LEGACY_PREFIXES)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """The bytes of one leaf, fetched from its device only when they are written."""

    name: str
    """The path of the leaf in the tree, unique in its file."""

    dtype: str
    """What a safetensors reader will make of the bytes."""

    shape: tuple[int, ...]
    """What a safetensors reader will make of the bytes."""

    num_bytes: int
    """Length."""

    fetch: Callable[[], NDArray[np.uint8]]
    """Returns the bytes, one-dimensional."""


def encode(tree: Any) -> tuple[Any, list[Blob]]:
    """Split a tree into a JSON document and the blobs that it names.

    Raises:
        CheckpointError: A value has a type that cannot come back as it was.
    """
    encoder = _Encoder()
    return encoder.encode(tree, ()), list(encoder.blobs.values())


@dataclass
class _Encoder:
    blobs: dict[str, Blob] = field(default_factory=dict)
    aliases: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise CheckpointError(
                f"a checkpoint tree needs at most {MAX_DEPTH} levels, got more at "
                f"{_spell(path[:4])}/...; flatten it, or remove a value that contains "
                "itself"
            )
        kind = type(value)
        if value is None or kind in {bool, str}:
            return value
        if kind in {int, float}:
            return _number(value)
        if kind is list:
            return self._items(value, path)
        if kind is tuple:
            return {"tuple": self._items(value, path)}
        if kind in {dict, OrderedDict}:
            tag = "dict" if kind is dict else "ordered_dict"
            return {tag: self._pairs(value, path)}
        return self._leaf(value, path)

    def _items(self, values: Any, path: tuple[str, ...]) -> list[Any]:
        return [self.encode(v, (*path, str(i))) for i, v in enumerate(values)]

    def _pairs(self, values: Mapping[Any, Any], path: tuple[str, ...]) -> list[Any]:
        return [
            [self.encode(key, (*path, "key")), self.encode(v, (*path, str(key)))]
            for key, v in values.items()
        ]

    def _leaf(self, value: Any, path: tuple[str, ...]) -> Any:
        if type(value) in {torch.Tensor, torch.nn.Parameter}:
            return self._tensor(value.detach(), path)
        if type(value) is bytes:
            return {"bytes": self._add(path, "U8", (len(value),), len(value), value)}
        plain = isinstance(value, np.generic) or type(value) is np.ndarray
        if plain and value.dtype.kind in _NUMPY_KINDS:
            tag = "scalar" if isinstance(value, np.generic) else "ndarray"
            return self._ndarray(tag, np.asarray(value), path)
        raise CheckpointError(
            "a checkpoint holds None, bool, int, float, str, bytes, list, tuple, dict, "
            f"dense tensors and numpy arrays, got {kind_of(value)} at {_spell(path)}; "
            "store its plain value instead"
        )

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> Any:
        dtype = str(tensor.dtype).removeprefix("torch.")
        dense = tensor.layout is torch.strided and tensor.device.type != "meta"
        if not dense or dtype not in _TORCH_DTYPES:
            raise CheckpointError(
                f"a checkpoint needs dense tensors that hold their values, got "
                f"{kind_of(tensor)} at {_spell(path)}; convert it first"
            )
        shape = tuple(tensor.shape)
        alias = (
            tensor.device,
            tensor.untyped_storage().data_ptr(),
            *(tensor.storage_offset(), shape, tensor.stride(), dtype),
            *(tensor.is_conj(), tensor.is_neg()),
        )
        name = self.aliases.get(alias) if tensor.numel() else None
        if name is None:
            size = tensor.numel() * tensor.itemsize
            name = self._add(path, dtype, shape, size, tensor)
            self.aliases[alias] = name
        return {"tensor": [name, dtype, list(shape)]}

    def _ndarray(self, tag: str, array: NDArray[Any], path: tuple[str, ...]) -> Any:
        native = array.dtype.name if array.dtype.isnative else ""
        name = self._add(path, native, array.shape, array.nbytes, array)
        return {tag: [name, array.dtype.str, list(array.shape)]}

    def _add(
        self,
        path: tuple[str, ...],
        dtype: str,
        shape: tuple[int, ...],
        num_bytes: int,
        value: Any,
    ) -> str:
        name = stem = _spell(path)
        while name in self.blobs or name == "__metadata__":
            name = f"{stem}#{len(self.blobs)}"
        public = _SAFETENSORS_NAMES.get(dtype, "U8")
        self.blobs[name] = Blob(
            name=name,
            dtype=public,
            shape=shape if dtype in _SAFETENSORS_NAMES else (num_bytes,),
            num_bytes=num_bytes,
            fetch=lambda: _bytes_of(value),
        )
        return name


def _number(value: float) -> Any:
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    finite = math.isfinite(value)
    return value if finite else {"float": struct.pack(">d", value).hex()}


def _bytes_of(value: Any) -> NDArray[np.uint8]:
    """Return the bytes of a leaf in memory order; no copy where none is needed."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    if isinstance(value, torch.Tensor):
        if not value.numel():
            return np.empty(0, np.uint8)
        plain = value.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return plain.view(torch.uint8).numpy()
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def decode(document: Any, fetch: Callable[[str], NDArray[np.uint8]]) -> Any:
    """Rebuild the tree that `encode` took apart.

    Args:
        document: The JSON document.
        fetch: Returns the bytes of a blob, one-dimensional, writable and owned.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The document is none of ours.
    """
    return _Decoder(fetch).decode(document)


class _Decoder:
    def __init__(self, fetch: Callable[[str], NDArray[np.uint8]]) -> None:
        self._fetch = fetch
        self._tensors: dict[str, torch.Tensor] = {}  # tied leaves become one again

    def decode(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        ((tag, value),) = node.items()
        return getattr(self, f"_decode_{tag}")(value)

    def _decode_dict(self, pairs: list[Any]) -> dict[Any, Any]:
        return {self.decode(key): self.decode(value) for key, value in pairs}

    def _decode_ordered_dict(self, pairs: list[Any]) -> OrderedDict[Any, Any]:
        return OrderedDict(self._decode_dict(pairs))

    def _decode_tuple(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(self.decode(items))

    def _decode_int(self, text: str) -> int:
        return int(text, 16)

    def _decode_float(self, bits: str) -> float:
        (value,) = struct.unpack(">d", bytes.fromhex(bits))
        return float(value)

    def _decode_bytes(self, name: str) -> bytes:
        return self._fetch(name).tobytes()

    def _decode_tensor(self, leaf: list[Any]) -> torch.Tensor:
        name, dtype, shape = leaf
        if name not in self._tensors:
            raw = torch.from_numpy(self._fetch(name))
            if not len(raw):  # numpy's empty array has no stride that torch can view
                raw = torch.empty(0, dtype=raw.dtype)
            self._tensors[name] = raw.view(_TORCH_DTYPES[dtype]).reshape(shape)
        return self._tensors[name]

    def _decode_ndarray(self, leaf: list[Any]) -> NDArray[Any]:
        name, dtype, shape = leaf
        if np.dtype(dtype).kind not in _NUMPY_KINDS:
            raise ValueError(f"{dtype} does not lie in memory as plain bytes")
        return np.ndarray(shape, dtype, buffer=self._fetch(name).data)

    def _decode_scalar(self, leaf: list[Any]) -> np.generic:
        return cast("np.generic", self._decode_ndarray(leaf)[()])


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name as it stands in a tree.

    Raises:
        KeyError: There is none of that name.
    """
    return _TORCH_DTYPES[name]


def kind_of(value: Any) -> str:
    """Name the type of a value as a person knows it."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        layout = str(value.layout).removeprefix("torch.")
        return f"a {layout} {type(value).__name__} of {dtype} on {value.device.type}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def _spell(path: tuple[str, ...]) -> str:
    """Spell the path of a leaf, so that any safetensors reader accepts it as a name."""
    text = "/".join(path) or "tree"
    return "".join(c if c.isprintable() else "?" for c in text)
