"""Files of others: Hugging Face safetensors and PEFT adapters. The state of a run is in `run_state.py`.

Where files belong together, one rename decides which count: of the index, or of the single file of weights. The `config.json` of a model
and the `adapter_config.json` of adapters are files of their own beside them, as their readers want it; they change between two saves only
if the model does.
"""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.files import (
    Directory,
    flush_folder,
    open_tensors,
    prepare,
    rank,
    read_json,
    read_tensors,
    tensor_file,
    together,
    write,
    write_json,
    write_tensors,
)
from fds.initial import initialised
from fds.leaves import Leaves
from fds.lora import is_adapter
from fds.program import Program
from fds.tree import Params, Stored

_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"


# --- Hugging Face ---


def save(directory: Directory, program: Program, stored: Stored, *, max_shard_size: int = 2_000_000_000) -> None:
    """Write the logical parameters as Hugging Face safetensors with `config.json`; `transformers` loads the directory.

    Under any mesh: sites are restored one after the other, so that no rank holds the whole leaves of more than one, and written as they come, in
    files of at most `max_shard_size` bytes (or one leaf). Non-persistent buffers are not written; tied leaves once. With `lora` in the program the
    weights are the fused ones (`save_adapters` writes the adapters alone). Every rank has to call it; rank 0 writes.
    """
    tree.positive("save: max_shard_size", max_shard_size)
    folder, what = prepare(directory), f"save({directory})"
    files = _files(program, max_shard_size)
    first = {next(iter(spec)): name for name, spec in files.items() if spec}
    with ExitStack() as writing:  # one file at a time
        add: Any = None
        for s, p in program.sites.items():
            leaves = p.restore(stored[s])
            with together(what):
                for k in _written(p) if rank() == 0 else ():
                    if k in first:
                        writing.close()  # the file before is complete
                        add = writing.enter_context(tensor_file(folder / first[k], files[first[k]]))
                    add(k, leaves[k])
            del leaves
        with together(what):
            writing.close()
            if rank() == 0:
                _write_config(folder, program.origin.core)
                _publish(folder, files)


def _written(p: Program) -> Params:
    """The leaves of a site that files hold."""
    return {k: v for k, v in p.origin.spec.items() if k not in p.marks["transient"]}


def _files(program: Program, limit: int) -> dict[str, Params]:
    """Names of files, and the spec of what goes into each, in order."""
    stamp, files, size = uuid.uuid4().hex[:8], list[Params](), limit
    for k, v in (kv for p in program.sites.values() for kv in _written(p).items()):
        if size + v.nbytes > limit or not files:
            files.append({})
            size = 0
        files[-1][k] = v
        size += v.nbytes
    return {f"model-{stamp}-{i:05d}.safetensors": spec for i, spec in enumerate(files)}


def _write_config(folder: Path, core: Any) -> None:
    if getattr(core, "config", None) is None:
        return
    config = core.config.to_dict()
    config["architectures"] = [type(core.module).__name__]
    write(folder / "config.json", lambda aside: aside.write_text(type(core.config).from_dict(config).to_json_string()))
    generation = getattr(core.module, "generation_config", None)
    if generation is not None:
        write(folder / "generation_config.json", lambda aside: aside.write_text(generation.to_json_string()))


def _publish(folder: Path, files: Mapping[str, Params]) -> None:
    """Make the written files the ones that readers find. One rename decides: of the single file, or of the index."""
    old = [f for f in folder.glob("model-*.safetensors") if f.name not in files]
    if len(files) == 1:
        os.replace(folder / next(iter(files)), folder / _MODEL)
        (folder / _INDEX).unlink(missing_ok=True)
    else:
        write_json(
            folder / _INDEX,
            {
                "metadata": {"total_size": tree.nbytes(dict(files))},
                "weight_map": {k: f for f, spec in files.items() for k in spec},
            },
        )
        (folder / _MODEL).unlink(missing_ok=True)
    for f in old:
        f.unlink(missing_ok=True)
    flush_folder(folder)


def load(directory: Directory, program: Program, *, device: torch.device | str = "cpu") -> Leaves:
    """The logical parameters in a directory written by `save` or by transformers' `save_pretrained`; ``program.place`` or ``step.init`` takes them.

    They are read when they are asked for, site by site: of a module built under ``torch.device("meta")`` no rank ever holds the whole. On a
    CPU they are private maps of the files: what `place` leaves out, as `shard` does, is not read, and what it stores as it is stays a map;
    ``step.init`` copies that. Non-persistent buffers, which files do not hold, come from the module, or are initialised as it does.

    Raises:
        ValueError: no such files, a truncated or foreign file, missing or unknown leaves, another shape or dtype; names the first.
    """
    folder = Path(directory)
    core: Any = program.origin.core
    if (folder / _MODEL).is_file():
        names = [_MODEL]
    elif (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
    else:
        raise ValueError(
            f"{folder}: no {_MODEL} and no {_INDEX} in it; give the directory that fds.save or save_pretrained wrote"
        )
    where: dict[str, tuple[Any, str]] = {}
    for file in (open_tensors(folder / name) for name in names):
        where |= {core.first_name(k): (file, k) for k in file.keys()}  # noqa: SIM118 (no mapping)
    transient = {k: x for k, x in transient_leaves(program, str(folder)).items() if k not in where}
    _check(folder, program, where, transient)

    def make(name: str) -> Tensor:
        if name in transient:
            return transient[name].to(device)
        file, key = where[name]
        return file.get_tensor(key).to(device)

    return Leaves(program.order, make, str(folder))


def transient_leaves(program: Program, what: str) -> Params:
    """The buffers that no file holds: those of the module, or, where it is on the meta device, as it initialises them."""
    core: Any = program.origin.core
    found = dict(core.transient())
    for s, p in program.sites.items():
        missing = {k: v for k, v in p.origin.spec.items() if k in found and found[k].is_meta}
        if missing:
            fix = "functionalize a module whose non-persistent buffers are real"
            found |= initialised(core, s, missing, 0, what, fix)
    return found


def _check(folder: Path, program: Program, where: Mapping[str, tuple[Any, str]], transient: Params) -> None:
    spec = {k: v for p in program.sites.values() for k, v in p.origin.spec.items()}
    given = where.keys() | transient.keys()
    missing, unknown = [k for k in spec if k not in given], [k for k in where if k not in spec]
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ValueError(
            f"{folder}: leaf {name!r} is {'missing' if missing else 'unknown'} ({len(missing)} missing, {len(unknown)} unknown); {tree.suggest(name, unknown if missing else spec)}"
        )
    for k, (file, key) in where.items():
        tree.check_leaf(k, file.get_tensor(key), spec[k], what=str(folder))


# --- adapters ---


def save_adapters(directory: Directory, program: Program, stored: Stored) -> None:
    """Write the adapters of a program with `lora` in PEFT's format; `PeftModel.from_pretrained` loads them. Every rank has to call it."""
    folder = prepare(directory)
    settings, adapters = _lora_of(program).settings, _adapters(program, stored)
    weights = [k.replace(".lora_A.weight", ".weight") for k in adapters if ".lora_A." in k]
    with together(f"save_adapters({folder})"):
        if rank() == 0:
            config = getattr(program.origin.core, "config", None)
            write_tensors(
                folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in adapters.items()}
            )
            write_json(folder / "adapter_config.json", {
                "peft_type": "LORA", "task_type": None, "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "use_rslora": settings.rslora,
                "use_dora": settings.dora, "bias": "none", "target_modules": [w.removesuffix(".weight") for w in weights], "inference_mode": True,
                "fan_in_fan_out": any(w in program.marks["transposed"] for w in weights), "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
            })  # fmt: skip


def _lora_of(program: Program) -> Any:
    """The program's `lora`, with its settings."""
    found: list[Any] = [t for t in program.history if t.name == "lora"]
    if not found:
        raise ValueError(
            f"no transformation 'lora' in this program; {tree.suggest('lora', {t.name for t in program.history})}"
        )
    return found[0]


def _early(program: Program, stored: Stored) -> Iterator[tuple[str, Program, Program, Params]]:
    """Site by site, its program, that just after `lora`, and what is stored there, of which only one site exists at a time."""
    for s, p in program.sites.items():
        yield s, p, *p.before("lora", stored[s])


def _adapters(program: Program, stored: Stored) -> Params:
    """All adapters, whole."""
    return {k: v.clone() for *_, part in _early(program, stored) for k, v in part.items() if is_adapter(k)}


def load_adapters(directory: Directory, program: Program, stored: Stored) -> Stored:
    """`stored` with the adapters of a PEFT directory; the base weights are the same as in `stored`, which is not written.

    Raises:
        ValueError: rank, alpha, rsLoRA or DoRA differ from the program's ``lora(...)``; adapters for other modules; unreadable files.
    """
    folder = Path(directory)
    config, found = read_json(folder / "adapter_config.json"), read_tensors(folder / "adapter_model.safetensors")
    lora = _lora_of(program)
    settings = lora.settings
    for key, want, absent in (
        ("r", settings.rank, None),
        ("lora_alpha", settings.alpha, None),
        ("use_rslora", settings.rslora, False),
        ("use_dora", settings.dora, False),
        ("rank_pattern", {}, {}),
        ("alpha_pattern", {}, {}),
    ):
        got = config.get(key, absent)
        if got != want:
            raise ValueError(
                f"{folder}/adapter_config.json: {key} is {got!r}, the program's {lora!r} has {want!r}; make the program with the adapter's settings"
            )
    given = {k.removeprefix("base_model.model."): v for k, v in found.items()}
    known = {k: v for p in program.sites.values() for k, v in _at_lora(p).spec.items() if is_adapter(k)}
    for k in given.keys() ^ known.keys():
        raise ValueError(
            f"{folder}: adapter leaf {k!r} is {'unknown to the program' if k in given else 'missing'}; {tree.suggest(k, known if k in given else given)}; check lora(targets=...)"
        )
    for k, v in known.items():
        tree.check_leaf(k, given[k].to(v.dtype), v, what=str(folder))
    new: Stored = {}
    for s, p, inner, part in _early(program, stored):
        new[s] = p.after(inner, {k: given[k].to(v) if k in given else v for k, v in part.items()})
    return new


def _at_lora(p: Program) -> Program:
    """The program of a site just after `lora`."""
    while p.history[-1].name != "lora" and p.inner is not None:
        p = p.inner
    return p


__all__ = ["load", "load_adapters", "save", "save_adapters"]
