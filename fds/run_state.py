"""The state of a run: `save_state` and `load_state`, for any mesh.

What is written does not depend on how a run was laid out: leaves under their names as they were before `shard`, `replicate`, `offload`,
`optim.sharded`, `optim.offloaded` and `optim.streamed`, in pieces, each by a rank that holds it. So a state goes on under another number of
ranks, another placement, with or without a store. What changes values or names (`cast`, `lora`) is recorded and has to be the same.

    state.json        which saves there are, newest last, and what a killed run left behind
    1000/             one save, named by its tag
      manifest.json   step, chain, extra data; for each leaf its shape, dtype and pieces
      rank-00000.safetensors, ...

One rename decides: that of `state.json`. It names a folder before anything is written to it, and counts it when all of it is on the disk.
"""

import atexit
import json
import logging
import math
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fds import tree
from fds.files import Directory, agreed, prepare, rank, ranks, read_json, together, write_json
from fds.offload import compute_device
from fds.offload.blocks import Outcome
from fds.program import Program
from fds.state_entries import Entry
from fds.state_entries import entries as list_entries
from fds.train import TrainState, TrainStep

LOG = logging.getLogger("fds.run_state")

_LIST, _FORMAT = "state.json", 2
_RUNNING: list[Outcome[None]] = []  # the save in the background, one at most: its ranks talk over one process group
_GROUPS: list[Any] = []  # [all ranks, the gloo group for saves in the background]


def save_state(
    directory: Directory,
    step: TrainStep,
    state: TrainState,
    *,
    tag: str | None = None,
    keep: int | None = None,
    asynchronous: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Future[None] | None:
    """Write a `TrainState`; `load_state` goes on from it, on the same mesh or any other. Every rank has to call it, with the same arguments.

    Each rank writes a part of what it holds, piece by piece; tensors in a store (`offload`, `optim.streamed`) are read one at a time. A kill at any
    moment leaves the newest complete save the one that is loaded.

    Args:
        tag: the name of the save, and of its folder. Default: the number of the step. A save with the same tag is replaced when the new one
            is complete.
        keep: so many saves stay, the newest ones; older ones are removed when the new one is complete. Default: all.
        asynchronous: copy the state to host memory, write it in the background, and return a future. The step may go on, donated states
            too. An error is raised by the future; by the next save, if nobody has asked the future. The next save waits for this one.
        extra: plain JSON values, the same on every rank, as the position in the data; `load_extra` returns them.

    Raises:
        ValueError: arguments that differ between ranks, a tag that is no plain name, `extra` that JSON does not hold, a donated state; with
            `asynchronous`, tensors in a store, which memory may not hold.
        OSError: what the disk says.
    """
    from fds.state_files import Saver, Writer

    what = f"save_state({directory})"
    manifest: dict[str, Any] = {}
    entries: list[Entry] = []
    tensors: dict[str, Any] = {}
    with together(what):
        _check_step(what, step)
        _settle()
        leaves = step.check(state, {})
        entries = list_entries(step, torch.device("meta"))
        tensors = {e.path: x for e, x in zip(entries, leaves, strict=True)}
        away = [e.path for e in entries if e.window is not None]
        if asynchronous and away:
            raise ValueError(
                f"{what}: {away[0]!r} is in a store, and asynchronous=True would copy it to memory; leave asynchronous=True out"
            )
        manifest = {
            "format": _FORMAT,
            "tag": str(int(state.step)) if tag is None else _checked_tag(tag),
            "step": int(state.step),
            "ranks": ranks(),
            "program": _chain(step.program),
            "accelerator": _on_accelerator(entries, tensors),
            "extra": _checked_extra(extra),
        }
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ValueError(f"{what}: keep={keep!r}, required a number of saves >= 1, or None for all")
        tree.switch(f"{what}: asynchronous", asynchronous)
    _check_same(what, {**manifest, "keep": keep, "asynchronous": asynchronous})
    _check_replicas(what, step, entries, tensors)
    folder, name = prepare(directory), ""
    with together(what):
        name = _begin(folder, manifest["tag"]) if rank() == 0 else ""
    name = agreed(name)
    writer = Writer(folder / name, manifest, lambda crc: _publish(folder, name, manifest, crc, keep))
    return _write(what, tensors, writer, Saver(entries), asynchronous)


def load_state(directory: Directory, step: TrainStep, *, tag: str | None = None) -> TrainState:
    """The newest state that `save_state` wrote to a directory (or the one called `tag`), laid out as `step` wants it.

    The step's mesh, `shard`, `replicate`, `offload`, `checkpoint` and the placement of its optimizer are its own; the model, all other
    transformations and the optimizer are those that the state was saved under. A rank reads the pieces that it needs, at most 64 MiB ahead.

    Raises:
        ValueError: no such save; another chain; leaves missing, surplus or of another shape or dtype; a truncated or altered file.
    """
    import torch.distributed.checkpoint as dcp

    from fds.state_files import Loader, Reader

    what, folder, found = f"load_state({directory})", Path(directory), ""
    manifest: dict[str, Any] = {}
    entries: list[Entry] = []
    state: list[TrainState] = []
    with together(what):
        _check_step(what, step)
        _settle()
        found = json.dumps(_find(folder, tag)) if rank() == 0 else ""
    save = json.loads(agreed(found))
    with together(what):
        manifest = _manifest(folder / save["folder"], save["crc"])
        if manifest["program"] != _chain(step.program):
            raise ValueError(
                f"{folder / save['folder']}: saved under {manifest['program']}, this program is {_chain(step.program)} (but for its layout); make the step with the same chain, or restore the parameters and step.init them"
            )
        entries = list_entries(step, _home(manifest, folder))
    loader, reader = Loader(entries, folder / save["folder"]), Reader(folder / save["folder"], manifest)
    with _plain_errors(what):
        dcp.load({}, storage_reader=reader, planner=loader, no_dist=ranks() == 1)
    with together(what):
        state.append(tree.rebuild(step.spec, iter(loader.result())))
        for window in {id(e.window): e.window for e in entries if e.window is not None}.values():
            window.settle()
    return state[0]


def load_extra(directory: Directory, *, tag: str | None = None) -> dict[str, Any]:
    """The `extra` that the newest save in a directory (or the one called `tag`) was written with; empty if it had none."""
    finish_saves()
    save = _find(Path(directory), tag)
    return _manifest(Path(directory) / save["folder"], save["crc"])["extra"]


# --- what a state was made by, and where ---


def _check_step(what: str, step: Any) -> None:
    if not isinstance(getattr(step, "spec", None), TrainState):
        raise ValueError(
            f"{what}: step is a {type(step).__name__}, required what fds.train_step returned, or fds.compile of that"
        )


def _chain(program: Program) -> list[str]:
    """The transformations that the parameters' values and names depend on: not layouts, not wrappers of calls."""
    return [repr(t) for t in program.history if (t.lens or t.rewrite) and not t.provides & {"layout", "whole"}]


def _on_accelerator(entries: list[Entry], tensors: Mapping[str, Any]) -> bool:
    """Whether what has no place of its own is on one."""
    own = [tensors[e.path] for e in entries if e.device.type == "meta" and e.window is None]
    return any(x.device.type != "cpu" for x in own) if own else compute_device().type != "cpu"


def _home(manifest: Mapping[str, Any], folder: Path) -> torch.device:
    device = compute_device()
    if manifest["accelerator"] and device.type == "cpu":
        raise ValueError(f"{folder}: the run was on an accelerator, and there is none here; resume where there is one")
    return device if manifest["accelerator"] else torch.device("cpu")


# --- which saves there are ---


def _saves(folder: Path) -> dict[str, Any]:
    """What `state.json` says."""
    path = folder / _LIST
    if not path.is_file():
        return {"format": _FORMAT, "saves": [], "unfinished": []}
    listed = read_json(path)
    if not isinstance(listed, dict) or listed.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: not a list of saves in format {_FORMAT}; give the directory that fds.save_state wrote"
        )
    for name in [*listed["unfinished"], *(s["folder"] for s in listed["saves"])]:
        _checked_tag(name)  # folders of these names are removed
    return listed


def _find(folder: Path, tag: str | None) -> dict[str, Any]:
    """The newest save, or the one with this tag."""
    tag = None if tag is None else _checked_tag(tag)
    if not (folder / _LIST).is_file():
        raise ValueError(f"{folder}: no checkpoint (no {_LIST}); give the directory that fds.save_state wrote")
    saves = _saves(folder)["saves"]
    found = [s for s in saves if tag is None or s["tag"] == tag]
    if not found:
        tags = [s["tag"] for s in saves]
        raise ValueError(
            f"{folder}: no checkpoint" + ("" if tag is None else f" {tag!r}; {tree.suggest(tag, tags)}")
            if tags
            else f"{folder}: no checkpoint: no save was ever completed"
        )
    return found[-1]


def _manifest(folder: Path, crc: int) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the save is damaged: take another one by its tag") from error
    if zlib.crc32(text) != crc:
        raise ValueError(f"{path}: not what was written; it was altered or truncated: take another save by its tag")
    return json.loads(text)


def _begin(folder: Path, tag: str) -> str:
    """A new folder for a save, named in the list before it is there; what earlier saves left unfinished is removed."""
    listed = _saves(folder)
    for name in listed["unfinished"]:
        shutil.rmtree(folder / name, ignore_errors=True)
    names = [tag, *(f"{tag}.{i}" for i in range(1, len(listed["saves"]) + 2))]
    name = next((n for n in names if not (folder / n).exists()), None)
    if name is None:
        raise ValueError(f"{folder}: {tag!r} and folders like it are in the way, and are no saves; use another tag")
    write_json(folder / _LIST, {**listed, "unfinished": [name]})
    (folder / name).mkdir()
    return name


def _publish(folder: Path, name: str, manifest: Mapping[str, Any], crc: int, keep: int | None) -> None:
    """Count the save, and remove those that it replaces."""
    listed = _saves(folder)["saves"]
    new = {"tag": manifest["tag"], "step": manifest["step"], "folder": name, "crc": crc}
    saves = [*(s for s in listed if s["tag"] != new["tag"]), new][-(keep or 0) :]
    gone = [s["folder"] for s in listed if s not in saves]
    write_json(folder / _LIST, {"format": _FORMAT, "saves": saves, "unfinished": gone})
    for old in gone:
        shutil.rmtree(folder / old, ignore_errors=True)


def _checked_tag(tag: Any) -> str:
    if not isinstance(tag, str) or tag in ("", _LIST) or tag[0] == "." or any(c in tag for c in "/\\\0"):
        raise ValueError(f"tag={tag!r}, required a plain name for a folder, as '1000' or 'best'")
    return tag


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(extra or {})
    try:
        same = json.loads(json.dumps(given, allow_nan=False)) == given
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra: JSON does not hold it: {error}; give numbers, strings, lists and dictionaries"
        ) from None
    if not same:
        raise ValueError(
            "extra: JSON gives something else back (a tuple comes back as a list, a number as a key as a string); give plain JSON values"
        )
    return given


# --- writing, here or in the background ---


def _check_same(what: str, mine: dict[str, Any]) -> None:
    """Raise `ValueError` unless every rank was given the same."""
    given: list[Any] = [None] * ranks()
    if ranks() > 1:
        dist.all_gather_object(given, mine)
    for r, theirs in enumerate(given):
        for k, v in mine.items():
            if theirs is not None and theirs[k] != v:
                raise ValueError(
                    f"{what}: {k} is {v!r} on rank {rank()} and {theirs[k]!r} on rank {r}; call it with the same on every rank"
                )


def _check_replicas(what: str, step: TrainStep, entries: list[Entry], tensors: Mapping[str, Any]) -> None:
    """Raise `ValueError` if ranks hold different values of one piece, of which one rank's would be written.

    Where the step reduces over all ranks of the job, or they compute one call together, what they hold is the same by construction, and
    nothing is compared.
    """
    axes = dict.fromkeys([*step.data_axes, *(a for t in step.program.history for a in t.shared)])
    if math.prod(a.size for a in axes) >= ranks():
        return
    from fds.state_files import checksums

    mine: dict[tuple[str, tuple[int, ...]], int] = {}
    with together(what):
        mine = checksums(entries, tensors)
    given: list[Any] = [None] * ranks()
    dist.all_gather_object(given, mine)
    first: dict[Any, int] = {}
    for r, theirs in enumerate(given):
        for piece, crc in theirs.items():
            other = first.setdefault(piece, r)
            if given[other][piece] != crc:
                raise ValueError(
                    f"{what}: {piece[0]!r} is not the same on ranks {other} and {r}, which both hold it: no transformation of this program reduces over all {ranks()} ranks ({list(step.program.history)}); put shard(axis) or replicate(axis) into its chain, or use optim.sharded(tx, axis); or give these ranks the same rows and the same seed"
                )


def _write(what: str, tensors: dict[str, Any], writer: Any, planner: Any, asynchronous: bool) -> Outcome[None] | None:
    import torch.distributed.checkpoint as dcp

    from fds.state_files import without_group

    if not asynchronous:
        with _plain_errors(what):
            dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=ranks() == 1)
        return None
    outcome: Outcome[None] = Outcome()
    outcome.set_running_or_notify_cancel()
    world = ranks()

    def done(future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            outcome.set_result(None)
        else:
            lost = without_group(what)
            lost.__cause__ = error
            outcome.set_exception(_plain(error, what) if ranks() == world else lost)

    group = _background_group()
    with _plain_errors(what):
        future: Any = dcp.async_save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=ranks() == 1)  # fmt: skip
    _RUNNING.append(outcome)
    atexit.unregister(_last_words)
    atexit.register(_last_words)  # the thread is over then: Python waits for it before
    future.add_done_callback(done)
    return outcome


def finish_saves() -> None:
    """Wait for the save in the background, if there is one. Its error is raised by `save_state` or `load_state`, or said when the process ends."""
    wait(_RUNNING)


def _last_words() -> None:
    """At the end of a process: the error of a save in the background that nobody has asked about."""
    for outcome in _RUNNING:
        if outcome.done() and not outcome.asked and (error := outcome.exception()) is not None:
            LOG.error("the last save in the background failed: %s: %s", type(error).__name__, error)


def _settle() -> None:
    """Wait for the save in the background; raise its error unless its future was asked."""
    while _RUNNING:
        outcome = _RUNNING.pop()
        wait([outcome])
        if not outcome.asked:
            outcome.result()


def _background_group() -> Any:
    """A process group of its own: the step's collectives go on meanwhile."""
    if ranks() == 1:
        return None
    if not _GROUPS or _GROUPS[0] is not dist.group.WORLD:
        _GROUPS[:] = [dist.group.WORLD, dist.new_group(backend="gloo")]
    return _GROUPS[1]


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """A rank's own error as it is, another's as `ValueError`; DCP raises one that no ``except Exception`` sees."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group
            yield
    except CheckpointException as error:
        raise _plain(error, what) from None


def _plain(error: BaseException, what: str) -> BaseException:
    failures: dict[int, Any] = getattr(error, "failures", {})
    if rank() in failures:
        return failures[rank()][0]
    if failures:
        r, (cause, _) = min(failures.items())
        return ValueError(f"{what}: rank {r} failed: {type(cause).__name__}: {cause}")
    return error


__all__ = ["load_extra", "load_state", "save_state"]
