"""The files of a run's state: torch's distributed checkpoints (DCP) over safetensors and JSON.

DCP plans who writes what (a piece that several ranks hold is written by one) and which pieces answer a read under another layout. Its own
files have a pickle in them, and its safetensors writer takes one piece of a leaf per file and holds a file in memory, so planners and
storage are these: every rank streams its pieces past the page cache into one safetensors file that any reader of the format can open;
``manifest.json`` says which box of which leaf each is, with its CRC-32.
"""

import itertools
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from fds.files import flush_folder, rank, ranks, tensor_bytes, tensor_header, tensor_places
from fds.layout import Box
from fds.offload import handles
from fds.offload.aio import HUGE, Engine, empty
from fds.offload.blocks import ALIGN
from fds.state_entries import CARRIED, Entry

MANIFEST = "manifest.json"
AHEAD = 64 << 20  # bytes of pieces on their way to the disk, or from it, besides the one at hand


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def checksum(x: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor_bytes(x))


def checksums(entries: list[Entry], tensors: Mapping[str, Tensor]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Of every piece of a state that this rank holds, by leaf and offsets. Tensors in a store are read one at a time."""
    found = dict[tuple[str, tuple[int, ...]], int]()
    for e in entries:
        x = tensors[e.path]
        x = handles.read(x) if handles.is_handle(x) else x
        found |= {(b.leaf, b.offsets): checksum(e.view(x, b).detach().to("cpu").contiguous()) for b in e.boxes}
    return found


class _Coming:
    """Requests of an engine that are not done, the first one first, and what to do when each is."""

    def __init__(self) -> None:
        self.requests, self.nbytes = deque[tuple[int, Future[Any], Callable[[], None] | None]](), 0

    def add(self, nbytes: int, future: Future[Any], then: Callable[[], None] | None = None) -> None:
        self.requests.append((nbytes, future, then))
        self.nbytes += nbytes

    def wait(self, most: int) -> None:
        """Until fewer bytes than that are on their way. Raises errors."""
        while self.requests and self.nbytes >= most:
            nbytes, future, then = self.requests.popleft()
            future.result()
            self.nbytes -= nbytes
            if then is not None:
                then()


# --- writing ---


class Saver(dcp.DefaultSavePlanner):
    """Plans the writing of a state ``{path: tensor}``. Handles are read one at a time, when their turn comes."""

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__(flatten_state_dict=False)
        self.entries = entries
        self.sources: dict[MetadataIndex, tuple[Entry, Box]] = {}
        self.last: tuple[str, Tensor] | None = None

    def set_up_planner(self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False) -> None:  # fmt: skip
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self) -> dcp.SavePlan:
        items = list[WriteItem]()
        for entry in self.entries:
            for box in entry.boxes:
                index = MetadataIndex(box.leaf, box.offsets)
                if index in self.sources:
                    self._check_equal(entry, box, *self.sources[index])
                    continue
                self.sources[index] = entry, box
                data = TensorWriteData(_chunk(box), TensorProperties(entry.dtype), torch.Size(entry.leaves[box.leaf]))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = dcp.SavePlan(items)
        return self.plan

    def _check_equal(self, entry: Entry, box: Box, other: Entry, first: Box) -> None:
        """Numbers that every part of a divided state has, as a count of updates, are written once."""
        a, b = entry.view(self._tensor(entry), box), other.view(self._tensor(other), first)
        if a.shape != b.shape or not torch.equal(a.cpu(), b.cpu()):
            raise ValueError(
                f"{box.leaf}: {entry.path} and {other.path} differ, and another layout has one place for both; give all parts of the state the same value"
            )

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        entry, box = self.sources[write_item.index]
        return entry.view(self._tensor(entry), box).detach().to("cpu").contiguous()

    def _tensor(self, entry: Entry) -> Tensor:
        x = self.state_dict[entry.path]
        if not handles.is_handle(x):
            return x
        if self.last is None or self.last[0] != entry.path:
            self.last = None  # one at a time: together they are larger than memory
            self.last = entry.path, handles.read(x)
        return self.last[1]


def without_group(what: str) -> ValueError:
    """The error of a save in the background whose ranks cannot reach each other any more."""
    return ValueError(
        f"{what}: the process group has ended before the save in the background has; wait for its future, future.result(), before dist.destroy_process_group()"
    )


@attrs.frozen
class Written:
    """Where a piece is: the file, its name there, its checksum."""

    file: str
    key: str
    crc: int


class Writer(StorageWriter):
    """Writes the pieces of a plan to `folder`; ``published(crc of the manifest)`` is called on one rank when all is on the disk.

    It is made where the process group is known to run. In the background that may have ended, and DCP would take each rank for a job of its own.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], published: Any) -> None:
        self.folder, self.manifest, self.published = folder, manifest, published
        self.rank, self.ranks = rank(), ranks()

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank has its file. Raises `ValueError` if the ranks of this writer cannot be reached any more."""
        if ranks() != self.ranks:
            raise without_group(str(self.folder))

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # folders are given to the constructor

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> TorchFuture[list[WriteResult]]:
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(
            list(self._write(f"rank-{self.rank:05d}.safetensors", plan.items, planner)) if plan.items else []
        )
        return done

    def _write(self, file: str, items: list[WriteItem], planner: dcp.SavePlanner) -> Iterator[WriteResult]:
        """Write a file. While a piece is on its way, its checksum is computed and the next one is made."""
        path, coming = self.folder / file, _Coming()
        items = sorted(items, key=_is_ragged)  # whole pages first: so they stay at the beginning of pages
        head = _header(items)
        with open(path, "wb") as f, Engine(say=False) as engine:
            f.write(head)
            f.flush()
            at = len(head)
            for item in items:
                x: Any = planner.resolve_data(item)
                coming.add(x.nbytes, engine.write(path, x, offset=at))
                at += x.nbytes
                yield WriteResult(item.index, x.nbytes, Written(file, _key(item), checksum(x)))
                del x  # as soon as it is written
                coming.wait(AHEAD)
            coming.wait(0)
            os.fsync(f.fileno())

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {r.index: r.storage_data for each in results for r in each}
        leaves = dict[str, Any]()
        for name, leaf in metadata.state_dict_metadata.items():
            assert isinstance(leaf, TensorStorageMetadata)
            at = [where[MetadataIndex(name, c.offsets)] for c in leaf.chunks]
            pieces = [[w.file, w.key, list(c.offsets), list(c.sizes), w.crc] for w, c in zip(at, leaf.chunks, strict=True)]  # fmt: skip
            leaves[name] = {"dtype": _name(leaf.properties.dtype), "shape": list(leaf.size), "pieces": pieces}
        files = {w.file: (self.folder / w.file).stat().st_size for w in where.values()}
        text = json.dumps({**self.manifest, "files": files, "leaves": leaves}, indent=1).encode()
        with open(self.folder / MANIFEST, "wb") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        flush_folder(self.folder)
        self.published(zlib.crc32(text))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(item: WriteItem) -> str:
    """A piece's name in its file: the leaf's; with the box behind it, as one would index it, where it is not the whole leaf."""
    data = item.tensor_data
    assert data is not None
    if data.chunk.sizes == data.size:
        return item.index.fqn
    box = ",".join(f"{o}:{o + s}" for o, s in zip(data.chunk.offsets, data.chunk.sizes, strict=True))
    return f"{item.index.fqn}[{box}]"


def _header(items: list[WriteItem]) -> bytes:
    """The header of a safetensors file with these pieces, whole pages long."""
    data: list[Any] = [item.tensor_data for item in items]
    return tensor_header(
        ((_key(i), d.properties.dtype, d.chunk.sizes) for i, d in zip(items, data, strict=True)), ALIGN
    )


def _is_ragged(item: WriteItem) -> bool:
    data: Any = item.tensor_data
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize % ALIGN != 0


# --- reading ---


@attrs.frozen
class Piece(Written):
    """Where a piece is, and what."""

    dtype: torch.dtype
    sizes: torch.Size

    @property
    def nbytes(self) -> int:
        return self.sizes.numel() * self.dtype.itemsize


class Reader(StorageReader):
    """Reads pieces from `folder` by its manifest. A file or a piece that is not as it was written is an error that names it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.pieces: dict[MetadataIndex, Piece] = {}
        self.files: dict[str, dict[str, tuple[int, int]]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget: a reader reads once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        leaves = dict[str, Any]()
        for name, leaf in self.manifest["leaves"].items():
            dtype: torch.dtype = getattr(torch, leaf["dtype"])
            chunks = list[ChunkStorageMetadata]()
            for file, key, offsets, sizes, crc in leaf["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self.pieces[MetadataIndex(name, offsets)] = Piece(file, key, crc, dtype, torch.Size(sizes))
            leaves[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(leaf["shape"]), chunks)
        return Metadata(leaves)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Files are opened when they are needed."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # folders are given to the constructor

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> TorchFuture[None]:
        coming = _Coming()
        with Engine(say=False) as engine:
            for index, items in itertools.groupby(plan.items, key=lambda item: item.storage_index):
                self._read(index, list(items), planner, engine, coming)
                coming.wait(AHEAD)
            coming.wait(0)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done

    def _read(self, index: MetadataIndex, items: list[Any], planner: Any, engine: Engine, coming: _Coming) -> None:
        """Read a piece: to where it belongs, if that is one place in host memory."""
        piece = self.pieces[index]
        path, at = self.folder / piece.file, self._place(piece)
        target = planner.resolve_tensor(items[0])
        direct = items[0].lengths == piece.sizes and target.device.type == "cpu" and target.is_contiguous()
        x = target if direct else empty(piece.nbytes).view(piece.dtype).view(piece.sizes)

        def arrived() -> None:
            if checksum(x) != piece.crc:
                raise ValueError(
                    f"{path}: {index.fqn!r} at {list(index.offset or ())} is not what was written (CRC-32 {checksum(x):08x}, {piece.crc:08x} expected); the file was altered: take an older save"
                )
            for item in items:
                target = planner.resolve_tensor(item)
                if not direct:
                    target.copy_(
                        x[tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))]
                    )
                planner.commit_tensor(item, target)

        coming.add(piece.nbytes, engine.read(path, x, offset=at), arrived)

    def _place(self, piece: Piece) -> int:
        """Where a piece begins in its file."""
        path = self.folder / piece.file
        start, stop = self._open(path).get(piece.key, (0, 0))
        if stop - start != piece.nbytes:
            raise ValueError(
                f"{path}: {stop - start} bytes of {piece.key!r}, {piece.nbytes} expected; the file was altered: take an older save"
            )
        return start

    def _open(self, path: Path) -> dict[str, tuple[int, int]]:
        """Where the file has each piece."""
        if path.name not in self.files:
            expected = self.manifest["files"].get(path.name)
            if not path.is_file() or path.stat().st_size != expected:
                got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
                raise ValueError(
                    f"{path}: {got}, {expected} bytes expected; the file is truncated or was replaced: take an older save"
                )
            self.files[path.name] = tensor_places(path)
        return self.files[path.name]


class Loader(dcp.LoadPlanner):
    """Plans the reading of a state; its tensors are in `tensors`, in the order of `entries`, as they become complete."""

    def __init__(self, entries: list[Entry], folder: Path) -> None:
        self.entries, self.folder = entries, folder
        self.tensors: dict[int, Tensor] = {}
        self.coming: dict[int, Tensor] = {}
        self.left = [sum(b.numel for b in e.boxes) for e in entries]

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> dcp.LoadPlan:
        known, items = self.metadata.state_dict_metadata, list[Any]()
        wanted = {name for e in self.entries for name in e.leaves}
        for i, e in enumerate(self.entries):
            for name in dict.fromkeys(b.leaf for b in e.boxes):
                leaf: Any = known.get(name)
                if name.startswith(CARRIED) and (leaf is None or tuple(leaf.size) != e.leaves[name]):
                    self.left[i] = 0  # another layout: zeros
                elif leaf is not None:
                    self._check(name, leaf, e)
                    items += self._reads(i, e, name, leaf)
        return dcp.LoadPlan(items, planner_data=wanted)

    def _check(self, name: str, leaf: TensorStorageMetadata, e: Entry) -> None:
        got, want = (tuple(leaf.size), leaf.properties.dtype), (e.leaves[name], e.dtype)
        if got != want:
            raise ValueError(
                f"{self.folder}: {name!r} has {got[0]} {got[1]}, required {want[0]} {want[1]}; the state belongs to another model or optimizer"
            )

    def _reads(self, i: int, e: Entry, name: str, leaf: TensorStorageMetadata) -> Iterator[Any]:
        own = [k for k, b in enumerate(e.boxes) if b.leaf == name]
        for item in create_read_items_for_chunk_list(name, leaf, [_chunk(e.boxes[k]) for k in own]):
            at = own[item.dest_index.index or 0]
            yield replace(item, dest_index=MetadataIndex(str(i), e.boxes[at].offsets, at))

    def create_global_plan(self, global_plan: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        wanted = _lasting(name for p in global_plan for name in p.planner_data)
        known = _lasting(self.metadata.state_dict_metadata)
        if wanted != known:
            missing, surplus = (_listed(wanted - known), _listed(known - wanted))
            raise ValueError(
                f"{self.folder}: the files hold another state than this step's; missing: {missing}; surplus: {surplus}; make the step with the model, the chain and the optimizer that it was saved with ('k of n' in a name: state in blocks, as of adamw8bit, which goes on under the same layout only)"
            )
        return global_plan

    def finish_plan(self, central_plan: dcp.LoadPlan) -> dcp.LoadPlan:
        for i, left in enumerate(self.left):
            if left == 0:  # padding, and what has no elements
                self._complete(i)
        return central_plan

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"{self.folder}: {read_item.dest_index.fqn!r} is no tensor")

    def resolve_tensor(self, read_item: Any) -> Tensor:
        i = int(read_item.dest_index.fqn)
        e, box = self.entries[i], self.entries[i].boxes[read_item.dest_index.index]
        x = e.view(self._coming(i), box)
        for d, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            x = x.narrow(d, start, length)
        return x

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        i = int(read_item.dest_index.fqn)
        self.left[i] -= tensor.numel()
        if self.left[i] == 0:
            self._complete(i)

    def _coming(self, i: int) -> Tensor:
        if i not in self.coming:
            e = self.entries[i]
            self.coming[i] = _room(e) if self.left[i] == math.prod(e.shape) else torch.zeros(e.shape, dtype=e.dtype, device=e.device)  # fmt: skip
        return self.coming[i]

    def _complete(self, i: int) -> None:
        x, e = self._coming(i), self.entries[i]
        del self.coming[i]
        self.tensors[i] = x if e.window is None else handles.hold(e.window, e.path.rpartition("/")[2], x)

    def result(self) -> list[Tensor]:
        """All tensors. `ValueError` if the files have holes."""
        if self.coming:
            e = self.entries[min(self.coming)]
            raise ValueError(f"{self.folder}: the files do not hold all of {e.path!r}; take an older save")
        return [self.tensors[i] for i in range(len(self.entries))]


def _room(e: Entry) -> Tensor:
    """For an entry that is read whole. On huge pages where it is large: the disk took half the time to fill them."""
    nbytes = math.prod(e.shape) * e.dtype.itemsize
    if e.device.type != "cpu" or nbytes < HUGE:
        return torch.empty(e.shape, dtype=e.dtype, device=e.device)
    return empty(nbytes).view(e.dtype).view(e.shape)


def _lasting(names: Iterable[str]) -> set[str]:
    """Those that go on under every layout."""
    return {name for name in names if not name.startswith(CARRIED)}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
