"""Files: Hugging Face safetensors, PEFT adapters, and the state of a run.

Nothing is ever unpickled. Every file is written aside, flushed to the disk, and renamed, so that a kill at any moment leaves the old file
or the new. Where files belong together, one rename decides which count: of the manifest, of the index, of the single file of weights. The
`config.json` of a model and the `adapter_config.json` of adapters are files of their own beside them, as their readers want it; they
change between two saves only if the model does.
"""

import json
import os
import re
import shutil
import struct
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fds import tree
from fds.offload import handles
from fds.program import Program
from fds.train import TrainState, TrainStep
from fds.tree import Params, Stored

Directory = str | os.PathLike[str]

_ASIDE = ".writing-"  # begins the names of folders with files that are not finished
_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"


# --- writing and reading one file ---


def _write(path: Path, write: Any) -> None:
    """Let ``write(temporary path)`` make the file, flush it, and give it its name."""
    # A folder, since safetensors writes to a temporary file beside the one it is given, which a kill leaves there.
    folder = tempfile.mkdtemp(prefix=_ASIDE, dir=path.parent)
    aside = Path(folder) / path.name
    try:
        write(aside)
        with open(aside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    own = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    seen: set[int] = set()
    for k, v in own.items():  # the format knows no shared storage
        if v.untyped_storage().data_ptr() in seen or v.untyped_storage().nbytes() != v.numel() * v.element_size():
            own[k] = v.clone()
        seen.add(own[k].untyped_storage().data_ptr())
    _write(path, lambda aside: save_file(own, aside, metadata={"format": "pt"}))


def _write_json(path: Path, data: Any) -> None:
    _write(path, lambda aside: aside.write_text(json.dumps(data, indent=2)))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own. `ValueError` for a truncated or foreign file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({_diagnosis(path)}): {error}; write it again, or take an older one"
        ) from error


def _diagnosis(path: Path) -> str:
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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def _prepare(directory: Directory) -> Path:
    """The directory, made if need be, without what killed runs left in it."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, required a directory")
    folder.mkdir(parents=True, exist_ok=True)
    if _rank() == 0:
        for leftover in folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    _barrier()
    return folder


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _barrier() -> None:
    if _ranks() > 1:
        dist.barrier()


# --- Hugging Face ---


def save(directory: Directory, program: Program, stored: Stored, *, max_shard_size: int = 2_000_000_000) -> None:
    """Write the logical parameters as Hugging Face safetensors with `config.json`; `transformers` loads the directory.

    Sites are restored one after the other, so that at most `max_shard_size` bytes (and one site) are in memory at a time. Non-persistent buffers are not
    written; tied leaves once. With `lora` in the program the weights are the fused ones (`save_adapters` writes the adapters alone).
    Every rank has to call it; rank 0 writes.
    """
    folder = _prepare(directory)
    core: Any = program.origin.core
    stamp = uuid.uuid4().hex[:8]
    files: dict[str, list[str]] = {}
    for i, part in enumerate(_parts(program, stored, max_shard_size)):
        name = f"model-{stamp}-{i:05d}.safetensors"
        files[name] = list(part)
        with _together(f"save({folder})"):
            if _rank() == 0:
                _write_tensors(folder / name, part)
    size = sum(tree.nbytes(p.origin.spec) for p in program.sites.values())
    with _together(f"save({folder})"):
        if _rank() == 0:
            if getattr(core, "config", None) is not None:
                _write_config(folder, core)
            _publish(folder, files, size)


def _parts(program: Program, stored: Stored, limit: int) -> Iterator[Params]:
    part: Params = {}
    for s, p in program.sites.items():
        for name, leaf in p.restore(stored[s]).items():
            if name in program.marks["transient"]:
                continue
            if part and tree.nbytes(part) + leaf.numel() * leaf.element_size() > limit:
                yield part
                part = {}
            part[name] = leaf
    yield part


def _write_config(folder: Path, core: Any) -> None:
    config = core.config.to_dict()
    config["architectures"] = [type(core.module).__name__]
    _write(folder / "config.json", lambda aside: aside.write_text(type(core.config).from_dict(config).to_json_string()))
    generation = getattr(core.module, "generation_config", None)
    if generation is not None:
        _write(folder / "generation_config.json", lambda aside: aside.write_text(generation.to_json_string()))


def _publish(folder: Path, files: dict[str, list[str]], size: int) -> None:
    """Make the written files the ones that readers find. One rename decides: of the single file, or of the index."""
    old = [f for f in folder.glob("model-*.safetensors") if f.name not in files]
    if len(files) == 1:
        os.replace(folder / next(iter(files)), folder / _MODEL)
        (folder / _INDEX).unlink(missing_ok=True)
    else:
        _write_json(
            folder / _INDEX,
            {"metadata": {"total_size": size}, "weight_map": {k: f for f, names in files.items() for k in names}},
        )
        (folder / _MODEL).unlink(missing_ok=True)
    for f in old:
        f.unlink(missing_ok=True)
    _flush_folder(folder)


def load(directory: Directory, program: Program) -> Params:
    """The logical parameters in a directory written by `save` or by transformers' `save_pretrained`; ``program.place`` takes them.

    Non-persistent buffers, which files do not hold, come from the module that the program was made from.

    Raises:
        ValueError: no such files, a truncated or foreign file, missing or unknown leaves, another shape or dtype; names the first.
    """
    folder, core = Path(directory), program.origin.core
    if (folder / _MODEL).is_file():
        found = _read_tensors(folder / _MODEL)
    elif (folder / _INDEX).is_file():
        names = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
        found = {k: v for name in names for k, v in _read_tensors(folder / name).items()}
    else:
        raise ValueError(
            f"{folder}: no {_MODEL} and no {_INDEX} in it; give the directory that fds.save or save_pretrained wrote"
        )
    return _complete(found, program, core, folder)


def _complete(found: dict[str, Tensor], program: Program, core: Any, folder: Path) -> Params:
    spec = {k: v for p in program.sites.values() for k, v in p.origin.spec.items()}
    params = {core.first_name(k): v for k, v in found.items()}
    params |= {k: v for k, v in core.transient().items() if k not in params}
    meta = next((k for k, v in params.items() if v.is_meta), None)
    if meta is not None:
        raise ValueError(
            f"{folder}: {meta!r} is in no file and was on the meta device; functionalize a module whose buffers are real"
        )
    missing, unknown = [k for k in spec if k not in params], [k for k in params if k not in spec]
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ValueError(
            f"{folder}: leaf {name!r} is {'missing' if missing else 'unknown'} ({len(missing)} missing, {len(unknown)} unknown); {tree.suggest(name, unknown if missing else spec)}"
        )
    for k, v in spec.items():
        tree.check_leaf(k, params[k], v, what=str(folder))
    return {k: params[k] for k in program.order}


# --- adapters ---


def save_adapters(directory: Directory, program: Program, stored: Stored) -> None:
    """Write the adapters of a program with `lora` in PEFT's format; `PeftModel.from_pretrained` loads them. Every rank has to call it."""
    folder = _prepare(directory)
    inner, adapters = _adapters(program, stored)
    weights = [k.replace(".lora_A.weight", ".weight") for k in adapters if ".lora_A." in k]
    with _together(f"save_adapters({folder})"):
        if _rank() == 0:
            settings, config = inner.history[-1].settings, getattr(program.origin.core, "config", None)  # type: ignore[attr-defined]
            _write_tensors(
                folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in adapters.items()}
            )
            _write_json(folder / "adapter_config.json", {
                "peft_type": "LORA", "task_type": None, "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "use_rslora": settings.rslora,
                "use_dora": False, "bias": "none", "target_modules": [w.removesuffix(".weight") for w in weights], "inference_mode": True,
                "fan_in_fan_out": any(w in program.marks["transposed"] for w in weights), "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
            })  # fmt: skip


def _adapters(program: Program, stored: Stored) -> tuple[Program, Params]:
    inner, early = program.before("lora", stored)
    return inner, {k: v for part in early.values() for k, v in part.items() if ".lora_A." in k or ".lora_B." in k}


def load_adapters(directory: Directory, program: Program, stored: Stored) -> Stored:
    """`stored` with the adapters of a PEFT directory; the base weights are the same as in `stored`, which is not written.

    Raises:
        ValueError: rank, alpha or rsLoRA differ from the program's ``lora(...)``; adapters for other modules; unreadable files.
    """
    folder = Path(directory)
    config, found = _read_json(folder / "adapter_config.json"), _read_tensors(folder / "adapter_model.safetensors")
    inner, early = program.before("lora", stored)
    settings: Any = inner.history[-1].settings  # type: ignore[attr-defined]
    for key, want, absent in (
        ("r", settings.rank, None),
        ("lora_alpha", settings.alpha, None),
        ("use_rslora", settings.rslora, False),
        ("use_dora", False, False),
        ("rank_pattern", {}, {}),
        ("alpha_pattern", {}, {}),
    ):
        got = config.get(key, absent)
        if got != want:
            raise ValueError(
                f"{folder}/adapter_config.json: {key} is {got!r}, the program's {inner.history[-1]!r} has {want!r}; make the program with the adapter's settings"
            )
    given = {k.removeprefix("base_model.model."): v for k, v in found.items()}
    _, known = _adapters(program, stored)
    for k in given.keys() ^ known.keys():
        raise ValueError(
            f"{folder}: adapter leaf {k!r} is {'unknown to the program' if k in given else 'missing'}; {tree.suggest(k, known if k in given else given)}; check lora(targets=...)"
        )
    for k, v in known.items():
        tree.check_leaf(k, given[k].to(v.dtype), v, what=str(folder))
    new = {s: {k: given[k].to(v) if k in given else v for k, v in part.items()} for s, part in early.items()}
    return program.after(inner, new)


# --- the state of a run ---


def save_state(directory: Directory, step: TrainStep, state: TrainState) -> None:
    """Write a `TrainState`, every rank its own part; `load_state` goes on from it on the same mesh.

    Tensors in a store (`offload`, `optim.streamed`) are read and written one at a time, a file each.

    The manifest `state.json` is renamed last and decides which files count; those of older saves are removed after that. Every rank has
    to call it.
    """
    folder = _prepare(directory)
    stamp = _agreed(uuid.uuid4().hex)
    name, leaves = f"state-{stamp}-rank{_rank()}", dict(_paths(state))
    with _together(f"save_state({folder})"):
        away = [k for k, v in leaves.items() if handles.is_handle(v)]
        _write_tensors(folder / f"{name}.safetensors", {k: v for k, v in leaves.items() if k not in away})
        for i, k in enumerate(away):  # one at a time: together they are larger than memory
            _write_tensors(folder / f"{name}-{i}.safetensors", {k: handles.read(leaves[k])})
    with _together(f"save_state({folder})"):
        if _rank() == 0:
            _publish_state(folder, stamp, step, state)


def _publish_state(folder: Path, stamp: str, step: TrainStep, state: TrainState) -> None:
    sizes = {f.name: f.stat().st_size for f in folder.glob(f"state-{stamp}-rank*.safetensors")}
    _write_json(
        folder / "state.json",
        {
            "format": 1,
            "ranks": _ranks(),
            "step": int(state.step),
            "program": _chain(step),
            "accelerator": [k for k, v in _paths(state) if v.device.type != "cpu"],
            "files": sizes,
        },
    )
    for f in folder.glob("state-*.safetensors"):
        if f.name not in sizes:
            f.unlink(missing_ok=True)


def load_state(directory: Directory, step: TrainStep) -> TrainState:
    """The state in a directory written by `save_state` for the same program, optimizer and number of ranks.

    Raises:
        ValueError: no checkpoint there; another number of ranks; a truncated or foreign file; a leaf missing, unknown or of another shape.
    """
    with _together(f"load_state({directory})"):
        return _load_state(Path(directory), step)


def _load_state(folder: Path, step: TrainStep) -> TrainState:
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder}: no checkpoint (no state.json); give the directory that fds.save_state wrote")
    manifest = _read_json(folder / "state.json")
    if manifest.get("format") != 1 or manifest.get("ranks") != _ranks():
        raise ValueError(
            f"{folder}: written by {manifest.get('ranks')} ranks (format {manifest.get('format')}), this job has {_ranks()}; start as many ranks (another mesh is not supported yet)"
        )
    path, spec, found = folder / "state.json", dict(_paths(step.spec)), dict[str, Tensor]()
    for name, away in _own_files(manifest["files"]):
        path = folder / name
        if path.is_file() and path.stat().st_size != manifest["files"][name]:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, {manifest['files'][name]} expected; the file is truncated or was replaced"
            )
        for k, v in _read_tensors(path).items():
            found[k] = _put_away(k, v, step, path).requires_grad_(v.requires_grad) if away else v
    for k in spec.keys() ^ found.keys():
        raise ValueError(
            f"{path}: leaf {k!r} is {'missing' if k in spec else 'unknown'}; {tree.suggest(k, found if k in spec else spec)}; the state belongs to {manifest['program']}, this program is {_chain(step)}"
        )
    for k, v in spec.items():
        tree.check_leaf(k, found[k], v, what=str(path))
    if manifest["program"] != _chain(step):
        raise ValueError(
            f"{path}: saved under {manifest['program']}, this program is {_chain(step)}; make the step with the same chain, or restore the parameters and step.init them"
        )
    away = set(manifest["accelerator"])
    if away and not torch.cuda.is_available():
        raise ValueError(
            f"{path}: {min(away)!r} was on an accelerator, and there is none here; resume where there is one"
        )
    return tree.rebuild(step.spec, iter([found[k].cuda() if k in away else found[k] for k in spec]))


def _chain(step: TrainStep) -> list[str]:
    """The program's transformations, whatever store they use: that is another one in every run."""
    return [re.sub(r"store=<\w+ [^>]*>", "store", repr(t)) for t in step.program.history]


def _own_files(names: Iterable[str]) -> list[tuple[str, bool]]:
    """Of the files of a state those of this rank, and whether what is in them was in a store."""
    ours = re.compile(rf"-rank{_rank()}(-\d+)?\.safetensors$")
    return [(f, found[1] is not None) for f in sorted(names) if (found := ours.search(f))]


def _put_away(path: str, x: Tensor, step: TrainStep, file: Path) -> Tensor:
    """A handle of `x` in the store where the step keeps the leaf."""
    kind, site, *rest = path.split("/", 2)
    home = step.program.sites[site].handles.get(rest[0]) if kind == "params" and site in step.program.sites else None
    if home is not None:
        tree.check_leaf(path, x, torch.empty(home.shape, dtype=home.dtype, device="meta"), what=str(file))
        return handles.hold(home.window, rest[0], x)
    if kind == "optimizer" and step.tx.stream is not None:
        return handles.hold(step.tx.stream.window, "state", x)
    raise ValueError(
        f"{file}: {path!r} was in a store, and this step keeps it in memory; make the step with the same offload(store) and optim.streamed"
    )


@contextmanager
def _together(what: str) -> Iterator[None]:
    """A part of the work that every rank does by itself: if it fails on one, it fails on all, and none waits for ever."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    said: list[str | None] = [None] * _ranks()
    if _ranks() > 1:
        dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(r, s) for r, s in enumerate(said) if s is not None]
    if failed:
        raise ValueError(f"{what}: rank {failed[0][0]} failed: {failed[0][1]}")


def _agreed(value: str) -> str:
    """Rank 0's value, on every rank."""
    values = [value]
    if _ranks() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _paths(x: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a state by path, in the order of `tree.flat`."""
    if isinstance(x, Tensor):
        yield prefix, x
        return
    parts = x.items() if isinstance(x, dict) else zip(getattr(x, "_fields", range(len(x))), x, strict=True)
    for k, v in parts:
        yield from _paths(v, f"{prefix}/{k}" if prefix else str(k))


__all__ = ["load", "load_adapters", "load_state", "save", "save_adapters", "save_state"]
