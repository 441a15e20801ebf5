"""Files: how they are written, read and found damaged, alone and together with other ranks.

Nothing is ever unpickled. Every file is written aside, flushed to the disk, and renamed, so that a kill at any moment leaves the old file
or the new.
"""

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Directory = str | os.PathLike[str]

_LENGTH = struct.Struct("<Q")  # of the header, in a safetensors file
_ASIDE = ".writing-"  # begins the names of folders with files that are not finished


def write(path: Path, make: Any) -> None:
    """Let ``make(temporary path)`` make the file, flush it, and give it its name."""
    with replacing(path) as aside:
        make(aside)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file; after the block it is flushed and given its name. After an error there is nothing new."""
    # A folder, since safetensors writes to a temporary file beside the one it is given, which a kill leaves there.
    folder = tempfile.mkdtemp(prefix=_ASIDE, dir=path.parent)
    aside = Path(folder) / path.name
    try:
        yield aside
        with open(aside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make new names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of these tensors."""
    from safetensors.torch import save_file

    own = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    seen: set[int] = set()
    for k, v in own.items():  # the format knows no shared storage
        if v.untyped_storage().data_ptr() in seen or v.untyped_storage().nbytes() != v.numel() * v.element_size():
            own[k] = v.clone()
        seen.add(own[k].untyped_storage().data_ptr())
    write(path, lambda aside: save_file(own, aside, metadata={"format": "pt"}))


@contextmanager
def tensor_file(path: Path, spec: Mapping[str, Tensor]) -> Iterator[Callable[[str, Tensor], None]]:
    """A safetensors file of tensors like those of `spec`, which ``add(name, tensor)`` takes one by one, in that order."""
    left = iter(spec.items())

    with replacing(path) as aside, open(aside, "wb") as f:
        f.write(tensor_header((k, x.dtype, x.shape) for k, x in spec.items()))

        def add(name: str, x: Tensor) -> None:
            expected, like = next(left, ("no more", x))
            if (name, x.dtype, x.shape) != (expected, like.dtype, like.shape):
                raise ValueError(
                    f"{path}: {name} {x.dtype} {tuple(x.shape)}, required {expected} {like.dtype} {tuple(like.shape)}"
                )
            f.write(tensor_bytes(x.detach().to("cpu").contiguous()))

        yield add
        for name, _ in left:
            raise ValueError(f"{path}: {name} was not given")


def tensor_header(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], multiple: int = 8) -> bytes:
    """The header of a safetensors file of tensors by name, dtype and shape: its length in 8 bytes, then JSON, padded to a multiple."""
    found, at = dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        found[name] = {"dtype": _dtype_name(dtype), "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(found).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % multiple)
    return _LENGTH.pack(len(text)) + text


def tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where a safetensors file has each tensor: from which byte of the file to which. `ValueError` if it is no such file."""
    with open(path, "rb") as f:
        start = f.read(_LENGTH.size)
        (length,) = _LENGTH.unpack(start) if len(start) == _LENGTH.size else (0,)
        text = f.read(length) if 0 < length <= path.stat().st_size else b""
    try:
        entries = json.loads(text)
        at = _LENGTH.size + length
        return {k: (at + e["data_offsets"][0], at + e["data_offsets"][1]) for k, e in entries.items() if k != "__metadata__"}  # fmt: skip
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors file: its header is damaged ({error!r})") from None


def _dtype_name(dtype: torch.dtype, known: dict[torch.dtype, str] = {}) -> str:  # noqa: B006 (a cache)
    from safetensors.torch import save

    if dtype not in known:  # the library has no public table, but writes the name
        known[dtype] = json.loads(save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"]
    return known[dtype]


def tensor_bytes(x: Tensor) -> Any:
    """The bytes of a contiguous tensor in host memory."""
    return x.reshape(-1).view(torch.uint8).numpy()


def write_json(path: Path, data: Any) -> None:
    """A JSON file."""
    write(path, lambda aside: aside.write_text(json.dumps(data, indent=2)))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, as `open_tensors` gives them."""
    found = open_tensors(path)
    return {k: found.get_tensor(k) for k in found.keys()}  # noqa: SIM118 (no mapping)


def open_tensors(path: Path) -> Any:
    """A safetensors file: its ``keys()``, and ``get_tensor(key)``, a private map of the file, read when it is looked at.

    Raises `ValueError` for a truncated or foreign file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({diagnosis(path)}): {error}; write it again, or take an older one"
        ) from error


def diagnosis(path: Path) -> str:
    """What is wrong with a file that should be safetensors."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            return (
                f"{size} bytes, and the header asks for {length}"
                if len(head) == 8
                else f"{size} bytes, shorter than a header"
            )
        try:
            entries = json.loads(f.read(length))
            expected = (
                8 + length + max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{size} bytes, and no safetensors header"
    return f"{size} bytes, {expected} expected"


def read_json(path: Path) -> Any:
    """What is in a JSON file. `ValueError` for one that cannot be read."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


# --- with other ranks ---


def rank() -> int:
    """This process's number in the job; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks() -> int:
    """Processes in the job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def prepare(directory: Directory) -> Path:
    """The directory, made if need be, without what killed runs left in it."""
    folder = Path(directory)
    with together(str(folder)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file, required a directory")
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            for leftover in folder.glob(f"{_ASIDE}*"):
                shutil.rmtree(leftover, ignore_errors=True)
    return folder


@contextmanager
def together(what: str) -> Iterator[None]:
    """A part of the work that every rank does by itself: if it fails on one, it fails on all, and none waits for ever."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    said: list[str | None] = [None] * ranks()
    if ranks() > 1:
        dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(r, s) for r, s in enumerate(said) if s is not None]
    if failed:
        raise ValueError(f"{what}: rank {failed[0][0]} failed: {failed[0][1]}")


def agreed(value: str) -> str:
    """Rank 0's value, on every rank."""
    values = [value]
    if ranks() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
