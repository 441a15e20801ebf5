"""Checkpoints that DeepSpeed wrote, ZeRO 1 to 3 and its universal format, for any mesh: `load_state`, `load`. Not imported with fds.

    latest                                              the newest tag (latest_universal: of the universal format)
    global_step5/
      mp_rank_00_model_states.pt                        ZeRO 1, 2: shapes in order, buffers, frozen leaves
      zero_pp_rank_<r>_mp_rank_00_model_states.pt       ZeRO 3: the same, of every rank
      [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt    flat parts of fp32 parameters and moments
    global_step5_universal/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt

DeepSpeed pickles objects of its own beside the tensors. Nothing of them is run: torch reads tensors and plain values only (`weights_only`), and
the few classes in `_INERT` as empty stand-ins. Files are mapped, not read: a leaf is joined when its turn comes, one at a time.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.checkpoint import transient_leaves
from fds.files import Directory, together
from fds.layout import Box, Layout, Part, whole
from fds.leaves import Leaves
from fds.offload import compute_device, forget, handles
from fds.optim.slots import slots
from fds.program import Program
from fds.state_entries import Entry
from fds.state_entries import entries as list_entries
from fds.train import TrainState, TrainStep
from fds.transform import parameters

Read = Callable[[], Tensor]
_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MOMENT = re.compile(r"optimizer/(?:[^/]+/)*?moments/(mu|nu)/(.+)")


def load_state(directory: Directory, step: TrainStep, *, tag: str | None = None) -> TrainState:
    """The state of a DeepSpeed run, laid out as `step` wants it: parameters in float32, AdamW's moments, counts of steps. On every rank.

    The mesh, the chain (but for `lora`) and the placement of the optimizer are the step's own; its rule is `optim.adamw`. Its hyperparameters are
    its own too, as is the seed of dropout: DeepSpeed's learning rate, betas and loss scale are not read. Leaves go by the model's names.

    Args:
        directory: what ``engine.save_checkpoint`` wrote to, or one of its folders. Also what `ds_to_universal` wrote.
        tag: the folder in it. Default: what the file `latest` names, else `latest_universal`.

    Raises:
        ValueError: no such checkpoint; files missing, damaged, or with objects that are not read (they are named); leaves missing or surplus (all
            are listed) or of another shape; an optimizer with other state than Adam's; parts of tensor-parallel ranks (convert those to universal).
    """
    what, states = f"deepspeed_files.load_state({directory})", list[TrainState]()
    with together(what):
        source = _source(directory, tag, step.program)
        trainable = {k for k, x in _spec(step.program).items() if x.requires_grad}
        source.check({"fp32": _spec(step.program).keys(), "exp_avg": trainable, "exp_avg_sq": trainable})
        numbers, entries = _numbers(step, source), list_entries(step, compute_device())
        states.append(tree.rebuild(step.spec, (_filled(e, source, numbers) for e in entries)))
        for window in {id(e.window): e.window for e in entries if e.window is not None}.values():
            window.settle()
    return states[0]


def load(directory: Directory, program: Program, *, tag: str | None = None) -> Leaves:
    """The logical parameters of a DeepSpeed checkpoint; ``program.place`` takes them, site by site. See `load_state`.

    ``fds.save(out, program, program.place(load(directory, program)))`` makes Hugging Face files of it.
    """
    source, spec = _source(directory, tag, program.origin), _spec(program.origin)
    source.check({"fp32": spec.keys()})
    return Leaves(program.order, lambda name: _exact(source.read("fp32", name, spec[name].shape), spec[name].dtype, name), str(source.folder))  # fmt: skip


# --- what the files hold ---


@attrs.frozen(eq=False)
class _Source:
    """A checkpoint: how to read its leaves, by the program's names and by kind."""

    folder: Path
    leaves: Mapping[str, Mapping[str, Read]]
    updates: int  # of the parameters
    steps: int  # that were tried
    skipped: int
    transient: Mapping[str, Tensor] = {}  # leaves that no file holds
    last: dict[tuple[str, str], Tensor] = attrs.field(init=False, factory=dict[tuple[str, str], Tensor])

    def read(self, kind: str, name: str, shape: Sequence[int]) -> Tensor:
        """A whole leaf."""
        if name in self.transient:
            return self.transient[name]
        if (kind, name) not in self.last:  # a leaf may be asked for in many pieces
            self.last.clear()
            self.last[kind, name] = self.leaves[name][kind]()
        x = self.last[kind, name]
        if tuple(x.shape) not in (tuple(shape), (prod(shape),)):  # ZeRO 3's universal files are flat
            raise ValueError(
                f"{self.folder}: {name!r} has {tuple(x.shape)}, required {tuple(shape)}; it is another model's"
            )
        return x.reshape(tuple(shape))

    def check(self, wanted: Mapping[str, Iterable[str]]) -> None:
        """Raise `ValueError` that lists the leaves missing and surplus, unless there are those that are wanted."""
        missing, surplus = list[str](), list[str]()
        for kind, names in wanted.items():
            want = {k for k in names if k not in self.transient}
            have = {k for k, kinds in self.leaves.items() if kind in kinds and k not in self.transient}
            of = "" if kind == "fp32" else f" ({kind})"
            missing += [k + of for k in sorted(want - have)]
            surplus += [k + of for k in sorted(have - want)]
        if missing or surplus:
            raise ValueError(
                f"{self.folder}: the leaves are not those of the program; missing: {', '.join(missing) or 'none'}; surplus: {', '.join(surplus) or 'none'}; make the module that was trained, with the same leaves frozen"
            )


def _source(directory: Directory, tag: str | None, program: Program) -> _Source:
    folder = _folder(Path(directory), tag)
    found, updates, model = _universal(folder) if (folder / "zero").is_dir() else _zero(folder)
    core: Any = program.origin.core
    leaves: dict[str, Mapping[str, Read]] = {}
    for name, kinds in found.items():
        first = core.first_name(name)
        if name == first or first not in found:
            leaves[first] = kinds
    steps, skipped = (int(_of(model, k, folder)) for k in ("global_steps", "skipped_steps"))
    return _Source(folder, leaves, updates, steps, skipped, transient_leaves(program, str(folder)))


def _folder(root: Path, tag: str | None) -> Path:
    latest = [f for n in ("latest", "latest_universal") if (f := root / n).is_file()]
    if tag is None and latest:
        tag = latest[0].read_text().strip()
    if tag is not None and (tag in ("", "..") or "/" in tag):
        raise ValueError(f"{root}: tag {tag!r}, required the plain name of a folder, as 'global_step1000'")
    folder = root if tag is None else root / tag
    if not (folder / "zero").is_dir() and not any(folder.glob("*_optim_states.pt")):
        raise ValueError(
            f"{folder}: no checkpoint of DeepSpeed's ZeRO (no *_optim_states.pt, no zero/); give the directory that engine.save_checkpoint wrote to, or a tag in it"
        )
    return folder


def _zero(folder: Path) -> tuple[dict[str, dict[str, Read]], int, Mapping[str, Any]]:
    """Leaves of a ZeRO checkpoint, in parts of each rank."""
    found = ((f, _OPTIMIZER_FILE.fullmatch(f.name)) for f in folder.glob("*_optim_states.pt"))
    named = sorted((int(m[1]), int(m[2]), f) for f, m in found if m)
    split = [f.name for _, tensor_rank, f in named if tensor_rank]
    if split or not named:
        raise ValueError(
            f"{folder}: {split[0] if split else 'other files than ZeRO has'}: parts of tensor-parallel or expert ranks are not read; convert the checkpoint by DeepSpeed's ds_to_universal"
        )
    files = [f for *_, f in named]
    states = [_of(_read(f), "optimizer_state_dict", f) for f in files]
    count = states[0].get("partition_count")
    world = max(count) if isinstance(count, list | tuple) else count
    if world != len(files) or [r for r, *_ in named] != list(range(world)):
        raise ValueError(f"{folder}: optimizer states of {len(files)} ranks, {world} expected; copy the missing files")
    three = "fp32_flat_groups" in states[0]
    flat, inner = ("fp32_flat_groups", "optimizer_state_dict") if three else ("single_partition_of_fp32_groups", "base_optimizer_state")  # fmt: skip
    model = _read(folder / f"{'zero_pp_rank_0_' * three}mp_rank_00_model_states.pt")
    leaves: dict[str, dict[str, Read]] = {}
    for i, shapes in enumerate(_of(model, "param_shapes", folder)):
        ranks = list(zip(states, files, strict=True))
        adam = [_of(_of(s, inner, f), "state", f).get(i, {}) for s, f in ranks]
        parts = {"fp32": [_of(s, flat, f)[i] for s, f in ranks]}
        parts |= {kind: [_of(a, kind, f) for a, f in zip(adam, files, strict=True)] for kind in _KINDS[1:]}
        gaps = [0] * len(shapes) if not states[0].get("param_alignment_paddings") else states[0]["param_alignment_paddings"][i]  # fmt: skip
        size, at = max(x.numel() for each in parts.values() for x in each), 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            n = prod(shape)
            spans = _of_each(at, n, world) if three else _along(at, n, size, world)
            leaves[name] = {kind: partial(_joined, x, spans, shape, f"{folder}: {name}") for kind, x in parts.items()}
            at += ceil(n / world) if three else n + gap
    return leaves | _rest(folder, model, leaves, three), _updates(_of(states[0], inner, files[0]), folder), model


def _along(at: int, n: int, size: int, world: int) -> list[tuple[int, int]]:
    """ZeRO 1, 2: where elements `at` to at + n of all ranks' flat tensors of `size`, one behind the other, lie in each of them.

    >>> _along(3, 6, 5, 3)
    [(3, 5), (0, 4), (0, 0)]
    """
    spans = [(max(at - r * size, 0), min(at + n - r * size, size)) for r in range(world)]
    return [(a, b) if a < b else (0, 0) for a, b in spans]


def _of_each(at: int, n: int, world: int) -> list[tuple[int, int]]:
    """ZeRO 3: every rank has 1/world of each leaf, rounded up, from `at` on.

    >>> _of_each(7, 5, 2)
    [(7, 10), (7, 9)]
    """
    share = ceil(n / world)
    return [(at, at + min(max(n - r * share, 0), share)) for r in range(world)]


def _joined(flat: Sequence[Tensor], spans: Sequence[tuple[int, int]], shape: Sequence[int], what: str) -> Tensor:
    parts = [x.reshape(-1)[a:b] for x, (a, b) in zip(flat, spans, strict=True) if a < b]
    if sum(x.numel() for x in parts) != prod(shape):
        raise ValueError(f"{what}: the files hold {sum(x.numel() for x in parts)} of its {prod(shape)} elements")
    return (parts[0] if len(parts) == 1 else torch.cat([*parts, flat[0].reshape(-1)[:0]])).view(tuple(shape))


def _rest(folder: Path, model: Mapping[str, Any], known: Iterable[str], three: bool) -> dict[str, dict[str, Read]]:
    """What the optimizer does not have: buffers, and frozen leaves, in the precision that they were used in."""
    module, aliases, taken = model["module"], model.get("shared_params") or {}, set(known)
    names = model["buffer_names"] if three else [k for k in module if k not in aliases]
    found: dict[str, dict[str, Read]] = {k: {"fp32": partial(module.get, k)} for k in names if k not in taken}
    if three and model.get("frozen_param_shapes"):
        files = sorted(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=lambda f: int(f.name.split("_")[3]))  # fmt: skip
        parts = [_read(f)["frozen_param_fragments"] for f in files]
        for name, shape in model["frozen_param_shapes"].items():
            spans = _of_each(0, prod(shape), len(files))
            found[name] = {"fp32": partial(_joined, [p[name] for p in parts], spans, shape, f"{folder}: {name}")}
    return found


def _universal(folder: Path) -> tuple[dict[str, dict[str, Read]], int, Mapping[str, Any]]:
    """Leaves of a universal checkpoint, in files of each leaf."""
    homes = [d for d in sorted((folder / "zero").iterdir()) if d.is_dir()]
    leaves = {d.name: {k: partial(_param, d / f"{k}.pt") for k in _KINDS if (d / f"{k}.pt").is_file()} for d in homes}
    models = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=lambda f: (len(f.name), f.name))
    model = _read(models[0] if models else folder / "mp_rank_00_model_states.pt")
    steps = {int(_read_any(f)) for d in homes if (f := d / "step.pt").is_file()}
    if steps:
        updates = _only(steps, folder)
    else:
        state = _read(folder / "zero" / "optimizer_state.pt")
        updates = _updates(state.get("optimizer_state_dict", state), folder)
    return leaves | _rest(folder, model, leaves, models[0].name.startswith("zero_pp")), updates, model


def _param(path: Path) -> Tensor:
    found = _read_any(path)
    return found["param"] if isinstance(found, dict) else found


def _updates(optimizer: Mapping[str, Any], folder: Path) -> int:
    """How often Adam updated: in the state of each parameter, or in the groups (FusedAdam)."""
    places = [*optimizer.get("state", {}).values(), *optimizer.get("param_groups", ())]
    return _only({int(x["step"]) for x in places if "step" in x}, folder)


def _only(steps: set[int], folder: Path) -> int:
    if len(steps) != 1:
        raise ValueError(f"{folder}: counts of updates {sorted(steps)}, required one of an Adam for all leaves")
    return steps.pop()


# --- reading ---


class _Inert:
    """In the place of an object of DeepSpeed's: it takes what it is made with, and does nothing."""

    def __new__(cls, *args: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


# What ZeRO's files have beside tensors and plain values.
_INERT: list[Any] = [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]


def _read_any(path: Path) -> Any:
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with safe_globals(_INERT):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            try:
                refused = sorted(get_unsafe_globals_in_checkpoint(path))
            except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError):
                refused = []
            if refused:
                raise ValueError(
                    f"{path}: has {', '.join(refused)} in it, and only tensors, plain values and DeepSpeed's {', '.join(n.rpartition('.')[2] for _, n in _INERT)} are read, for a pickle can run code; save the checkpoint without them (client_state)"
                ) from None
            raise ValueError(f"{path}: not a complete file of torch.save: {error}; copy it again") from error


def _read(path: Path) -> dict[str, Any]:
    found = _read_any(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {type(found).__name__} in it, required a dictionary as DeepSpeed writes it")
    return found


def _of(found: Any, key: str, where: Path) -> Any:
    if not isinstance(found, Mapping) or key not in found:
        raise ValueError(
            f"{where}: no {key!r} in it ({', '.join(map(str, found)) or 'nothing'}); required a ZeRO checkpoint of an Adam optimizer"
        )
    return found[key]


# --- what the step wants ---


def _spec(program: Program) -> dict[str, Tensor]:
    """Parameters as they were before the first layout, and buffers, under unique names: meta tensors."""
    found = dict[str, Tensor]()
    for s, p in program.sites.items():
        layout = p.layout or Layout.plain(parameters(p))
        buffers = {k: x for k, x in p.spec.items() if k in p.marks["buffer"]}
        found |= {tree.qualified(s, k): x for k, x in {**layout.spec, **buffers}.items()}
    return found


def _numbers(step: TrainStep, source: _Source) -> dict[str, Tensor]:
    """The numbers of a state that belong to no leaf, by their names: counts, and hyperparameters as the optimizer begins with."""
    x = torch.zeros(1)
    state = step.tx.init({"": {"x": x}})
    known = {path: v.clone() for path, v in tree.paths(state) if not v.dim()}
    forget(state)  # of a streamed one
    like = Part("x", x.to("meta"), x.to("meta"), whole("x", (1,)))
    found = list(slots(step.tx, {"": {"x": like}}))
    moments = sorted(s.name.rpartition("/")[2] for s in found if s.part is not None)
    if moments != ["mu", "nu"]:
        raise ValueError(
            f"{source.folder}: it has Adam's two moments of every parameter, and the step's optimizer has {', '.join(moments) or 'none'}; use optim.adamw"
        )
    numbers = {f"optimizer/{s.name}": known[s.path] for s in found if s.part is None}
    numbers = {k: torch.tensor(source.updates) if k.endswith("/updates") else v for k, v in numbers.items()}
    counts = {"step": source.steps, "rng": step.seed, "skipped": source.skipped}
    return numbers | {k: torch.tensor(v) for k, v in counts.items()}


def _filled(e: Entry, source: _Source, numbers: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the state."""
    x = torch.zeros(e.shape, dtype=e.dtype, device=e.device)
    for box in e.boxes:
        e.view(x, box).copy_(_values(box, e, source, numbers))
    return x if e.window is None else handles.hold(e.window, e.path.rpartition("/")[2], x)


def _values(box: Box, e: Entry, source: _Source, numbers: Mapping[str, Tensor]) -> Tensor:
    if box.leaf in numbers:
        return numbers[box.leaf]
    moment = _MOMENT.fullmatch(box.leaf)
    kind = "fp32" if moment is None else {"mu": "exp_avg", "nu": "exp_avg_sq"}[moment[1]]
    name = box.leaf.removeprefix("params/") if moment is None else moment[2]
    found = source.read(kind, name, e.leaves[box.leaf])
    return _exact(found[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))], e.dtype, box.leaf)


def _exact(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`x` in another dtype. `ValueError` where that does not hold its values."""
    y = x.to(dtype)
    if x.dtype != dtype and not torch.equal(y.to(x.dtype), x):
        raise ValueError(
            f"{name}: {x.dtype} in the checkpoint, {dtype} in the program, which does not hold its values; make the module in float32, and compute in {dtype} by fds.cast"
        )
    return y
