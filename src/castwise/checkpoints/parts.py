"""A checkpoint in parts: a folder to which every rank of a sharded run writes its own.

    0007-step-1200.sharded/
        index.safetensors       the tree, and where each part of each tensor lies
        part-00000.safetensors  what rank 0 holds of the sharded tensors
        part-00001.safetensors  what rank 1 holds

`torch.distributed.checkpoint` plans who writes and who reads what, so that a folder
saved by N ranks is loaded by any M. Its own files are pickles, which run what stands in
them; here each file is a castwise checkpoint of plain tensors under a digest, and the
index is JSON. The index names the digest of every part, so that files of two
checkpoints cannot be mixed up.

The folder is written under a name with a dot. When each file is on the disk (fsync) and
the index names it, the folder is renamed: it appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import warnings
from concurrent.futures import Future as Pending
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import (
    StorageReader,
    StorageWriter,
    WriteResult,
)
from torch.distributed.tensor import DTensor, Shard, empty
from torch.futures import Future

from castwise.checkpoints.container import (
    CheckpointFacts,
    describe_checkpoint,
    read_checkpoint,
    read_leaves,
    save_checkpoint,
    stated_digest,
)
from castwise.checkpoints.durable import storage_error, sync_folder
from castwise.checkpoints.tree import torch_dtype
from castwise.errors import (
    CastwiseError,
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from castwise.checkpoints.container import Scalar

SUFFIX = ".sharded"
INDEX = "index.safetensors"
PART_KIND = "part of a sharded checkpoint"
_PART = "castwise: part of a sharded tensor"


def begin_save(
    folder: Path,
    tree: Any,
    *,
    kind: str,
    label: Mapping[str, Scalar],
    group: ProcessGroup,
) -> Pending[Any]:
    """Take a tree as it is now, and write it while the run goes on.

    Every rank calls it with its own tree: sharded tensors are written by those who hold
    them, everything else by the first rank of the group.

    Args:
        folder: What shall appear; its parent exists.
        tree: As for `save_checkpoint`, with `DTensor` leaves cut along one mesh axis.
        kind: What the tree is.
        label: Small facts for `describe_checkpoint`.
        group: A gloo group that nothing else uses, since a thread works with it.

    Returns:
        Done when the folder stands on the disk; give it to `finish_save`.

    Raises:
        CheckpointError: A tensor is sharded in a way that cannot be written.
    """
    parts: dict[str, DTensor] = {}
    document = _apart(tree, (), parts)
    writer = _Writer(folder, document, dict(_dims(parts)), kind, label, group.rank())
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False
    )
    saving = async_save(
        dict(parts),
        storage_writer=writer,
        planner=planner,
        process_group=group,
        async_stager=_Staged(),
    )
    assert isinstance(saving, Pending)
    return saving


def finish_save(saving: Pending[Any]) -> None:
    """Wait until a checkpoint stands on the disk.

    Raises:
        CastwiseError: A rank could not write; nothing has appeared.
    """
    try:
        saving.result()
    except CheckpointException as error:
        raise _first_failure(error) from error


def load_parts(
    folder: Path,
    *,
    kind: str,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
) -> Any:
    """Read a tree back, bit for bit; run nothing that stands in the files.

    Args:
        folder: What `begin_save` wrote, by any number of ranks.
        kind: What the tree must be.
        mesh: One axis of processes that all call, over which sharded tensors are cut
            anew. Default: tensors come back whole, on the CPU.
        group: Of the mesh, over gloo. Default: the default group.

    Raises:
        DamagedCheckpointError: A file is missing, altered, or of another checkpoint.
        ForeignCheckpointError: Another kind of checkpoint.
        NewerCheckpointError: Written by a later version of the format.
        StorageError: Not readable.
    """
    facts, tree = read_parts(folder, mesh=mesh, group=group)
    if facts.kind != kind:
        raise ForeignCheckpointError(
            f"{folder} holds a checkpoint of kind {facts.kind!r}, need {kind!r}; "
            "choose a checkpoint that this command wrote"
        )
    return tree


def read_parts(
    folder: Path,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
) -> tuple[CheckpointFacts, Any]:
    """Read facts and tree of a folder of any kind; arguments as for `load_parts`."""
    if not (folder / INDEX).exists():
        raise DamagedCheckpointError(
            f"{folder} is damaged: it has no index; use an earlier checkpoint"
        )
    facts, index = read_checkpoint(folder / INDEX)
    try:
        places: dict[str, Any] = index["parts"]
        whole = {name: _room(place, mesh) for name, place in places.items()}
        reader = _Reader(folder, index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedCheckpointError(
            f"{folder} is damaged: its index does not describe parts; use an earlier "
            "checkpoint"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is one process, when it is
            load(
                whole,
                storage_reader=reader,
                planner=DefaultLoadPlanner(
                    flatten_state_dict=False, flatten_sharded_tensors=False
                ),
                process_group=group,
                no_dist=mesh is None,
            )
    except CheckpointException as error:
        raise _first_failure(error) from error
    return facts, _together(index["tree"], whole)


def describe_parts(folder: Path) -> CheckpointFacts:
    """Read what a folder says about itself, as `describe_checkpoint` does of a file."""
    if not (folder / INDEX).exists():
        raise DamagedCheckpointError(
            f"{folder} is damaged: it has no index; use an earlier checkpoint"
        )
    return describe_checkpoint(folder / INDEX)


def _apart(value: Any, path: tuple[str, ...], parts: dict[str, DTensor]) -> Any:
    """Copy a tree, with names in place of sharded tensors."""
    if isinstance(value, DTensor):
        stem = name = "/".join(path)
        while name in parts:
            name = f"{stem}#{len(parts)}"
        parts[name] = _copied(value)
        return {_PART: name}
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in {list, tuple}:
        items = (_apart(one, (*path, str(i)), parts) for i, one in enumerate(value))
        return type(value)(items)
    if isinstance(value, dict):
        pairs = ((k, _apart(v, (*path, str(k)), parts)) for k, v in value.items())
        return type(value)(pairs) if type(value) is dict else _ordered(value, pairs)
    return value


def _copied(tensor: DTensor) -> DTensor:
    """Copy what this rank holds to the CPU; it may not be written to meanwhile.

    The stager of torch 2.13 does so for most tensors, and refuses empty ones of some.
    """
    part = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor(part, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]  # noqa: SLF001 -- from_local would move it back to its GPU


def _ordered(value: dict[Any, Any], pairs: Any) -> Any:
    """A model's state dict is an ordered one with an attribute; keep its type."""
    made = type(value)()
    made.update(pairs)
    return made


def _together(value: Any, parts: Mapping[str, torch.Tensor]) -> Any:
    """Put sharded tensors back to where their names stand."""
    if type(value) in {list, tuple}:
        return type(value)(_together(one, parts) for one in value)
    if isinstance(value, dict):
        if value.keys() == {_PART}:
            return parts[value[_PART]]
        return _ordered(value, ((k, _together(v, parts)) for k, v in value.items()))
    return value


def _dims(parts: Mapping[str, DTensor]) -> Mapping[str, int | None]:
    """Return the dim along which each tensor is cut; None where it is repeated."""
    found: dict[str, int | None] = {}
    for name, part in parts.items():
        cut = [p.dim for p in part.placements if isinstance(p, Shard)]
        if len(cut) > 1 or any(p.is_partial() for p in part.placements):
            raise CheckpointError(
                f"{name!r} is laid out as {part.placements}, and a checkpoint needs "
                "tensors that are cut along one dim at most; redistribute it first"
            )
        found[name] = cut[0] if cut else None
    return found


def _room(place: Mapping[str, Any], mesh: DeviceMesh | None) -> torch.Tensor:
    """Return a tensor to read into: whole, or cut over a mesh."""
    size, dtype = list(place["size"]), torch_dtype(place["dtype"])
    if mesh is None or place["dim"] is None:
        return torch.empty(size, dtype=dtype)
    return empty(
        *size, dtype=dtype, device_mesh=mesh, placements=[Shard(int(place["dim"]))]
    )


def _first_failure(error: CheckpointException) -> CastwiseError:
    """Return what went wrong on the lowest rank, as a sentence."""
    rank, (found, _) = min(error.failures.items())
    if isinstance(found, CastwiseError):
        return type(found)(f"rank {rank}: {found}" if rank else str(found))
    what = " ".join(str(found).split())
    return CheckpointError(
        f"a checkpoint in parts failed on rank {rank}: {type(found).__name__}: {what}; "
        "use an earlier checkpoint"
    )


def _key(index: MetadataIndex) -> str:
    """Name a part of a tensor, by where in it the part begins."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


class _Staged(AsyncStager):
    """Stages nothing: what comes was copied when the tree was taken apart."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return it as it is."""
        return state_dict

    def synchronize_staging(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Writer(StorageWriter):
    """Writes what a plan asks of this rank, and as coordinator the index."""

    def __init__(
        self,
        folder: Path,
        document: Any,
        dims: Mapping[str, int | None],
        kind: str,
        label: Mapping[str, Scalar],
        rank: int,
    ) -> None:
        self._folder, self._document, self._dims = folder, document, dims
        self._kind, self._label, self._rank = kind, label, rank
        self._temporary = folder.with_name(f".{folder.name}.part")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer is used once."""

    def set_up_storage_writer(
        self,
        is_coordinator: bool,
        **_: Any,
    ) -> None:
        """Make the folder, before any rank writes."""
        if is_coordinator:
            try:
                self._temporary.mkdir()
            except OSError as error:
                raise storage_error("create", self._temporary, error) from error

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take it as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Take it as it is."""
        return plans

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> Future[list[WriteResult]]:
        """Write the parts of this rank into one file, durably."""
        parts, results = {}, []
        name = f"part-{self._rank:05d}.safetensors"
        for item in plan.items:
            part = planner.resolve_data(item)
            assert isinstance(part, torch.Tensor)
            parts[_key(item.index)] = part.detach()
        if parts:
            save_checkpoint(self._temporary / name, parts, kind=PART_KIND)
            digest = stated_digest(self._temporary / name)
            results = [
                WriteResult(
                    index=item.index, size_in_bytes=0, storage_data=(name, digest)
                )
                for item in plan.items
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, and let the folder appear; the coordinator alone."""
        written = {_key(r.index): r.storage_data for each in results for r in each}
        parts = {}
        for fqn, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [
                (list(c.offsets), list(c.sizes), written[key][0])
                for c in stored.chunks
                if (key := _key(MetadataIndex(fqn, c.offsets))) in written
            ]
            parts[fqn] = {
                "dtype": str(stored.properties.dtype).removeprefix("torch."),
                "size": list(stored.size),
                "dim": self._dims[fqn],
                "chunks": chunks,
            }
        index = {
            "tree": self._document,
            "parts": parts,
            "digests": dict(written.values()),
        }
        save_checkpoint(
            self._temporary / INDEX, index, kind=self._kind, label=self._label
        )
        try:
            self._temporary.rename(self._folder)
            sync_folder(self._folder.parent)
        except OSError as error:
            raise storage_error("write", self._folder, error) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse to be found by a name: a writer is made for one folder."""
        del checkpoint_id
        return False


class _Reader(StorageReader):
    """Reads what a plan asks of this rank."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self._folder = folder
        self._digests: dict[str, str] = dict(index["digests"])
        self._files: dict[str, str] = {}
        self._metadata = Metadata(state_dict_metadata={})
        for fqn, place in index["parts"].items():
            chunks = []
            for offsets, sizes, name in place["chunks"]:
                if name not in self._digests:
                    raise ValueError(f"{name} has no digest")
                offset = torch.Size(offsets)
                self._files[_key(MetadataIndex(fqn, offset))] = name
                chunks.append(
                    ChunkStorageMetadata(offsets=offset, sizes=torch.Size(sizes))
                )
            self._metadata.state_dict_metadata[fqn] = TensorStorageMetadata(
                properties=TensorProperties(dtype=torch_dtype(place["dtype"])),
                size=torch.Size(place["size"]),
                chunks=chunks,
            )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader is used once."""

    def read_metadata(self, **_: Any) -> Metadata:
        """Return what the index says."""
        return self._metadata

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,
        **_: Any,
    ) -> None:
        """Do nothing: all is known from the index."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take it as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take it as it is."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each file of which this rank needs something, once."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[_key(item.storage_index)], []).append(item)
        for name, items in by_file.items():
            path = self._folder / name
            if not path.exists():
                raise DamagedCheckpointError(
                    f"{self._folder} is damaged: it lacks {name}; use an earlier "
                    "checkpoint"
                )
            stored = read_leaves(path, {_key(item.storage_index) for item in items})
            if stated_digest(path) != self._digests[name]:
                raise DamagedCheckpointError(
                    f"{path} belongs to another checkpoint; use an earlier one"
                )
            for item in items:
                part = stored[_key(item.storage_index)]
                for dim, (begin, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    part = part.narrow(dim, begin, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse to be found by a name: a reader is made for one folder."""
        del checkpoint_id
        return False


def remove_folder(folder: Path) -> None:
    """Let go of a folder: it vanishes at once, and its files after that.

    Raises:
        StorageError: The system refused.
    """
    going = folder.with_name(f".{folder.name}.part")
    try:
        folder.rename(going)
        shutil.rmtree(going)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("remove", folder, error) from error


def remove_stale_folders(parent: Path) -> None:
    """Delete what killed runs left half; a run that saves here must not be saving."""
    for each in parent.glob(f".*{SUFFIX}.part"):
        shutil.rmtree(each, ignore_errors=True)
