"""Files of others: Hugging Face safetensors and PEFT adapters. The state of a run is in `run_state.py`.

Where files belong together, one rename decides which count: of the index, or of the single file of weights. The `config.json` of a model
and the `adapter_config.json` of adapters are files of their own beside them, as their readers want it; they change between two saves only
if the model does.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fds import tree
from fds.files import (
    Directory,
    flush_folder,
    prepare,
    rank,
    read_json,
    read_tensors,
    together,
    write,
    write_json,
    write_tensors,
)
from fds.program import Program
from fds.tree import Params, Stored

_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"


# --- Hugging Face ---


def save(directory: Directory, program: Program, stored: Stored, *, max_shard_size: int = 2_000_000_000) -> None:
    """Write the logical parameters as Hugging Face safetensors with `config.json`; `transformers` loads the directory.

    Sites are restored one after the other, so that at most `max_shard_size` bytes (and one site) are in memory at a time. Non-persistent buffers are not
    written; tied leaves once. With `lora` in the program the weights are the fused ones (`save_adapters` writes the adapters alone).
    Every rank has to call it; rank 0 writes.
    """
    folder = prepare(directory)
    core: Any = program.origin.core
    stamp = uuid.uuid4().hex[:8]
    files: dict[str, list[str]] = {}
    for i, part in enumerate(_parts(program, stored, max_shard_size)):
        name = f"model-{stamp}-{i:05d}.safetensors"
        files[name] = list(part)
        with together(f"save({folder})"):
            if rank() == 0:
                write_tensors(folder / name, part)
    size = sum(tree.nbytes(p.origin.spec) for p in program.sites.values())
    with together(f"save({folder})"):
        if rank() == 0:
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
    write(folder / "config.json", lambda aside: aside.write_text(type(core.config).from_dict(config).to_json_string()))
    generation = getattr(core.module, "generation_config", None)
    if generation is not None:
        write(folder / "generation_config.json", lambda aside: aside.write_text(generation.to_json_string()))


def _publish(folder: Path, files: dict[str, list[str]], size: int) -> None:
    """Make the written files the ones that readers find. One rename decides: of the single file, or of the index."""
    old = [f for f in folder.glob("model-*.safetensors") if f.name not in files]
    if len(files) == 1:
        os.replace(folder / next(iter(files)), folder / _MODEL)
        (folder / _INDEX).unlink(missing_ok=True)
    else:
        write_json(
            folder / _INDEX,
            {"metadata": {"total_size": size}, "weight_map": {k: f for f, names in files.items() for k in names}},
        )
        (folder / _MODEL).unlink(missing_ok=True)
    for f in old:
        f.unlink(missing_ok=True)
    flush_folder(folder)


def load(directory: Directory, program: Program) -> Params:
    """The logical parameters in a directory written by `save` or by transformers' `save_pretrained`; ``program.place`` takes them.

    Non-persistent buffers, which files do not hold, come from the module that the program was made from.

    Raises:
        ValueError: no such files, a truncated or foreign file, missing or unknown leaves, another shape or dtype; names the first.
    """
    folder, core = Path(directory), program.origin.core
    if (folder / _MODEL).is_file():
        found = read_tensors(folder / _MODEL)
    elif (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
        found = {k: v for name in names for k, v in read_tensors(folder / name).items()}
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
    folder = prepare(directory)
    inner, adapters = _adapters(program, stored)
    weights = [k.replace(".lora_A.weight", ".weight") for k in adapters if ".lora_A." in k]
    with together(f"save_adapters({folder})"):
        if rank() == 0:
            settings, config = inner.history[-1].settings, getattr(program.origin.core, "config", None)  # type: ignore[attr-defined]
            write_tensors(
                folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in adapters.items()}
            )
            write_json(folder / "adapter_config.json", {
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
    config, found = read_json(folder / "adapter_config.json"), read_tensors(folder / "adapter_model.safetensors")
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


__all__ = ["load", "load_adapters", "save", "save_adapters"]
