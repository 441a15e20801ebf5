"""What an engine writes and reads: checkpoints, whole weights, a module with the weights of a state."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fds import tree
from fds.deepspeed.logging import log_dist
from fds.files import agreed, prepare, rank, together, write
from fds.program import Program
from fds.run_state import load_extra, load_state, save_state
from fds.tree import Params, Stored

if TYPE_CHECKING:
    from fds.deepspeed.engine import Engine

_LATEST = "latest"  # DeepSpeed's file with the newest tag; scripts look for it


def save_checkpoint(engine: "Engine", save_dir: Any, tag: Any, client_state: Any, save_latest: bool, exclude_frozen: bool) -> bool:  # fmt: skip
    """Write the engine's state (`fds.save_state`): parameters, optimizer, loss scale, counters, schedulers, the position in the data. On every rank.

    Any number of ranks, stage and offload goes on from it. With the name of the folder in ``latest``, as DeepSpeed has it, unless `save_latest` is False.

    Args:
        tag: the folder. Default: ``global_step<n>``.
        client_state: plain JSON values, which `load_checkpoint` returns.
        exclude_frozen: `ValueError`: a state has all parameters; `fds.save_adapters` writes what was trained of LoRA.
    """
    if exclude_frozen:
        raise ValueError("save_checkpoint: exclude_frozen_parameters=True: a checkpoint has all of the state; for the trained part alone: engine.save_16bit_model(..., exclude_frozen_parameters=True)")  # fmt: skip
    step = engine._trained("save_checkpoint")
    if engine._pending.backwards or engine.micro_steps % engine.gradient_accumulation_steps():
        log_dist("save_checkpoint: in the middle of an accumulation; its gradients so far are not in the checkpoint", ranks=[0])  # fmt: skip
    name = f"global_step{engine.global_steps}" if tag is None else str(tag)
    loader = getattr(engine.training_dataloader, "state_dict", None)
    extra = {
        "client_state": dict(client_state or {}),
        "counters": {k: getattr(engine, k) for k in ("global_steps", "skipped_steps", "global_samples")},
        "optimizer": None if engine.optimizer is None else _numbers(engine.optimizer.state_dict()),
        "lr_scheduler": _scheduler_state(engine),
        "data": loader() if callable(loader) else None,
    }
    save_state(save_dir, step, engine._pushed(), tag=name, extra=extra)
    if save_latest:
        with together(f"save_checkpoint({save_dir})"):
            if rank() == 0:
                write(Path(save_dir) / _LATEST, lambda aside: aside.write_text(name))
    return True


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def _scheduler_state(engine: "Engine") -> Any:
    """What of a scheduler's state is plain values: functions, as of LambdaLR, come from the script again."""
    if engine.lr_scheduler is None or not hasattr(engine.lr_scheduler, "state_dict"):
        return None
    found: dict[str, Any] = {}
    for k, v in engine.lr_scheduler.state_dict().items():
        try:
            found[k] = json.loads(json.dumps(v))
        except TypeError:
            continue
    return found


def load_checkpoint(engine: "Engine", load_dir: Any, tag: Any, strict: bool, optimizer: bool, scheduler: bool, module_only: bool, custom: Any) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
    """Go on from a checkpoint, fds's or DeepSpeed's own (ZeRO 1 to 3, universal): the folder, and the `client_state` it was saved with.

    A directory without any checkpoint gives ``(None, None)`` and a line in the log, as in DeepSpeed: scripts ask so whether to begin anew. All else that
    does not fit is an error.

    Args:
        tag: of the checkpoint. Default: what ``latest`` names.
        optimizer, scheduler: False: the optimizer begins anew; schedulers and counters begin anew. The configuration's scheduler is a function of the
            optimizer's count of updates, and one of them alone is a `ValueError`; a scheduler of the client's is apart from it.
        module_only: the parameters alone; all else begins anew.
        strict, custom: anything but True and None is a `ValueError`.
    """
    if strict is not True or custom is not None:
        raise ValueError("load_checkpoint: load_module_strict=False and custom_load_fn are not there; take what fits with fds.load_state or fds.load, and engine.state")  # fmt: skip
    step = engine._trained("load_checkpoint")
    if engine.config.scheduler.type and engine._scheduled is None and optimizer is not scheduler and not module_only:
        raise ValueError(f"load_checkpoint: load_optimizer_states={optimizer}, load_lr_scheduler_states={scheduler}: the configuration's scheduler, {engine.config.scheduler.type}, is a function of the optimizer's count of updates; give both the same, or a scheduler of torch's as lr_scheduler=")  # fmt: skip
    folder, found = Path(load_dir), ""
    with together(f"load_checkpoint({load_dir})"):
        found = _find(folder, tag) if rank() == 0 else ""
    kind, name = agreed(found).split(":", 1) if (found := agreed(found)) else ("", "")
    if not kind:
        log_dist(f"load_checkpoint: no checkpoint in {folder}: nothing was loaded", ranks=[0])
        return None, None
    extra: dict[str, Any] = {}
    if kind == "fds":
        state, extra = load_state(folder, step, tag=name), load_extra(folder, tag=name)
    else:
        from fds import deepspeed_files

        state = deepspeed_files.load_state(folder, step, tag=name)
    engine.zero_grad()
    if module_only or not optimizer:
        fresh = step._state(state.params)
        state = state._replace(optimizer=fresh.optimizer, loss_scale=fresh.loss_scale)
        state = fresh if module_only else state
    engine.state, engine.metrics, engine._fresh = state, {}, None
    known = {"global_steps": int(state.step), "skipped_steps": int(state.skipped), "global_samples": int(state.step) * engine.train_batch_size()}  # fmt: skip
    again = module_only or not scheduler
    for k, v in (extra.get("counters") or known).items():
        setattr(engine, k, 0 if again else v)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    _resume_numbers(engine, extra, scheduler=scheduler and not module_only, optimizer=optimizer and not module_only)
    data = extra.get("data")
    if data is not None and not module_only and hasattr(engine.training_dataloader, "load_state_dict"):
        engine.training_dataloader.load_state_dict(data)
        engine._endless = None
    return str(folder / name), extra.get("client_state", {})


def _resume_numbers(engine: "Engine", extra: Mapping[str, Any], *, scheduler: bool, optimizer: bool) -> None:
    if engine.optimizer is None or engine._hyper is None:
        return
    if optimizer and extra.get("optimizer"):
        engine.optimizer.load_state_dict(extra["optimizer"])
    if scheduler and engine._scheduled is not None and engine.lr_scheduler is not None and extra.get("lr_scheduler"):
        engine.lr_scheduler.load_state_dict(extra["lr_scheduler"])
    engine._hyper.forget()
    engine._show()


def _find(folder: Path, tag: Any) -> str:
    """ "fds:<tag>" or "deepspeed:<tag>"; empty where there is none."""
    own = (folder / "state.json").is_file()
    name = None if tag is None else str(tag)
    if name is None:
        for latest in (_LATEST, "latest_universal"):
            if (folder / latest).is_file():
                name = (folder / latest).read_text().strip()
                break
    if name is None:
        return ""
    if own and (folder / name / "manifest.json").is_file():
        return f"fds:{name}"
    if own and not (folder / name).exists():
        raise ValueError(f"load_checkpoint({folder}): no checkpoint {name!r}; {tree.suggest(name, [p.parent.name for p in folder.glob('*/manifest.json')])}")  # fmt: skip
    if not (folder / name).is_dir():
        raise ValueError(f"load_checkpoint({folder}): no checkpoint {name!r} in it")
    return f"deepspeed:{name}"


# --- whole weights ---


def weights(program: Program, stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Logical parameters and buffers by name, site by site. Every rank has to ask for all of them."""
    for s, p in program.sites.items():
        yield from p.restore(stored[s]).items()


def state_dict(engine: "Engine", *, exclude_frozen_parameters: bool = False, dtype: torch.dtype | None = None) -> dict[str, Tensor]:  # fmt: skip
    """Whole weights in host memory on rank 0, as ``module.state_dict()`` names them; nothing on other ranks."""
    program, found = engine.program, dict[str, Tensor]()
    origin: Any = program.origin.core
    spec = {k: v for p in program.sites.values() for k, v in p.origin.spec.items()}
    buffers = program.marks.get("buffer", frozenset())
    for k, x in weights(program, engine.state.params):
        frozen = k not in buffers and not spec[k].requires_grad
        if rank() == 0 and k not in program.marks["transient"] and not (exclude_frozen_parameters and frozen):
            low = dtype is not None and x.is_floating_point()
            found[k] = x.detach().to("cpu", dtype if low else x.dtype, copy=True)
    if rank() != 0:
        return {}
    names = [k for k in origin.module.state_dict() if origin.first_name(k) in found]
    return {k: found[origin.first_name(k)] for k in names}


def save_16bit_model(engine: "Engine", save_dir: Any, save_filename: str, exclude_frozen: bool) -> bool:
    """Write all weights, whole, in the 16 bits that the run computes in (bfloat16 without fp16), to one file: ``.safetensors``, else torch's format.

    At stage 3 too, whatever ``stage3_gather_16bit_weights_on_model_save`` says. Every rank has to call it; rank 0 writes.
    """
    folder = prepare(save_dir)
    dtype = torch.float16 if engine.fp16_enabled() else torch.bfloat16
    found = state_dict(engine, exclude_frozen_parameters=exclude_frozen, dtype=dtype)
    with together(f"save_16bit_model({folder})"):
        if rank() == 0:
            write(folder / save_filename, lambda aside: _write(found, aside, save_filename))
    return True


def _write(found: dict[str, Tensor], path: Path, name: str) -> None:
    if not name.endswith(".safetensors"):
        torch.save(found, path)
        return
    from safetensors.torch import save_file

    once: dict[int, str] = {}
    first = {k: once.setdefault(x.data_ptr(), k) for k, x in found.items()}  # the format has no two names of one tensor
    save_file({k: x.contiguous() for k, x in found.items() if first[k] == k}, path)


def write_into(module: nn.Module, program: Program, stored: Stored) -> None:
    """Copy a state's weights into a module of the same architecture."""
    origin: Any = program.origin.core
    own = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    known = dict(weights(program, stored))
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(known[origin.first_name(name)])


def materialized(program: Program, stored: Stored) -> nn.Module:
    """A module like the program's, with the weights of a state, in memory of its own."""
    origin: Any = program.origin.core
    known: Params = dict(weights(program, stored))
    memo: dict[int, Any] = {}
    for name, meta in [*origin.module.named_parameters(), *origin.module.named_buffers()]:
        real = known[origin.first_name(name)].detach().clone()
        memo[id(meta)] = nn.Parameter(real, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else real  # fmt: skip
    return copy.deepcopy(origin.module, memo)


# --- data ---


def loader(engine: "Engine", dataset: Any, *, collate_fn: Any = None, **options: Any) -> Any:
    """A loader of this rank's microbatches."""
    from fds.deepspeed.data import loader_for

    place = {"rank": 0, "ranks": 1}
    for a in engine.axes:
        place = {"rank": place["rank"] * a.size + a.rank, "ranks": place["ranks"] * a.size}
    return loader_for(dataset, engine.config, collate_fn=collate_fn, **{**place, **options})


__all__ = ["load_checkpoint", "loader", "materialized", "save_16bit_model", "save_checkpoint", "state_dict", "weights", "write_into"]  # fmt: skip
