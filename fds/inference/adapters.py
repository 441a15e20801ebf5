"""Many low-rank adapters in one batch: each row has its own, beside the same base weights (S-LoRA; Sheng et al. 2023, arXiv:2311.03285).

    y_r = g_i * (W x_r + s_i B_i (A_i x_r)) + bias,  i = the adapter of row r

g is 1, but for DoRA m / |W + s B A|, a number for each output: adapters of both kinds go in one batch. Nothing is fused, so nothing is rounded into the base, and a row's adapter is data: another choice is another tensor, not another graph.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.files import Directory, read_json, read_tensors
from fds.frame import Apply, Wrap
from fds.lora import Lora, adapter_names, adapting, gain_of, names_in_files, targets_of
from fds.program import Lens, Program, Stored
from fds.transform import Transform, direct
from fds.tree import Params

NONE = -1


@direct
def adapters(count: int, *, rank: int, targets: str | Iterable[str], rows: int = 64) -> Transform:
    """Room for `count` adapters of up to `rank` beside the chosen linear layers, and for a choice of one for each of up to `rows` rows.

        serve = adapters(2, rank=16, targets=["*.q_proj", "*.v_proj"])(program)
        stored = load_adapter(serve, serve.place(params), 0, "french/")
        stored = choose(serve, stored, [0, 1, NONE, 0])
        fds.generate(serve, stored, ids, max_new_tokens=32)

    They are zero until `load_adapter`, and no row has one until `choose`. Inputs of layers have the rows first, as transformers' models have them.

    Law: a row's output is that of a program with its adapter alone (`lora`), to rounding. `restore` gives the base.

    Raises `ValueError` for a number below 1, and for a target that names no linear layer.
    """
    for name, value in (("count", count), ("rank", rank), ("rows", rows)):
        tree.positive(f"adapters: {name}", value)
    settings = Lora(rank, float(rank), targets)
    options = {"count": count, "rank": rank, "targets": settings.printed, "rows": rows}
    return adapting("adapters", settings, options, partial(_lens, settings, count, rows), _beside)


def _names(weight: str) -> tuple[str, str, str, str, str]:
    """A [count, rank, in], B [count, out, rank], s [count], g [count, out], and the adapter of each row [rows]."""
    a, b = adapter_names(weight)
    module = weight.removesuffix(".weight")
    return a, b, f"{module}.lora_scales", f"{module}.lora_gains", f"{module}.lora_rows"


def _lens(settings: Lora, count: int, rows: int, p: Program) -> Lens:
    targets, transposed = targets_of(settings, p), p.marks.get("transposed", frozenset())

    def put(params: Params) -> Params:
        out = {k: v.detach() for k, v in params.items()}
        for name in targets:
            w = params[name]
            width, features = w.shape if name in transposed else w.shape[::-1]
            made = (
                w.new_zeros(count, settings.rank, width), w.new_zeros(count, features, settings.rank),
                torch.zeros(count, device=w.device), torch.ones(count, features, device=w.device), torch.full((rows,), NONE, dtype=torch.int64, device=w.device),
            )  # fmt: skip
            out |= dict(zip(_names(name), made, strict=True))
        return out

    def base(stored: Params) -> Params:
        return {k: v for k, v in stored.items() if k not in own}

    own = {n for name in targets for n in _names(name)}
    return Lens(put, lambda stored: stored, restore=base)


def _beside(weight: str, transposed: bool) -> Wrap:
    """A and B lie as in a linear layer, whichever way the weight does."""
    names, bias = _names(weight), f"{weight.removesuffix('.weight')}.bias"

    def wrap(apply: Apply) -> Apply:
        def run(leaves: Params, x: Tensor) -> Tensor:
            a, b, scales, gains, rows = (leaves[n] for n in names)
            y = apply({k: v for k, v in leaves.items() if k not in names}, x)
            if x.dim() < 3 or len(x) > len(rows):
                raise ValueError(
                    f"adapters: {weight.removesuffix('.weight')} is called with {tuple(x.shape)}, required [rows, tokens, features] of at most {len(rows)} rows; raise rows="
                )
            index = rows[: len(x)]
            mine = index.clamp(min=0)
            none = (index < 0)[:, None, None]
            gain = gains[mine].to(x.dtype)[:, None].masked_fill(none, 1.0)
            scale = scales[mine].to(x.dtype)[:, None, None].masked_fill(none, 0.0)
            own = y if leaves.get(bias) is None else y - leaves[bias]  # what the weights make
            low = scale * ((x.flatten(1, -2) @ a[mine].mT) @ b[mine].mT)
            return y + ((gain - 1.0) * own.flatten(1, -2) + gain * low).view(y.shape)

        return run

    return wrap


def choose(program: Program, stored: Stored, index: Sequence[int] | Tensor) -> Stored:
    """`stored` with an adapter for each row of the batches to come, `NONE` (-1) for the base alone; what is not named has none. `stored` is not written.

    Raises `ValueError` for a program without `adapters`, more rows than it has room for, and an adapter that it has not.
    """
    options = _options(program)
    numbers: list[Any] = index.tolist() if isinstance(index, Tensor) else list(index)
    if not all(isinstance(x, Integral) and not isinstance(x, bool) for x in numbers):
        raise ValueError(
            f"choose: index={index!r}, required whole numbers, one for each row: an adapter, or -1 for none"
        )
    given = torch.tensor(numbers, dtype=torch.int64)
    if len(given) > options["rows"]:
        raise ValueError(f"choose: {len(given)} rows, this program has room for {options['rows']}; raise rows= of adapters(...)")  # fmt: skip
    if len(given) and (int(given.min()) < NONE or int(given.max()) >= options["count"]):
        raise ValueError(f"choose: adapters {int(given.min())} to {int(given.max())}, this program has 0 to {options['count'] - 1}, and -1 for none")  # fmt: skip
    rows = F.pad(given, (0, options["rows"] - len(given)), value=NONE)
    return {s: {k: rows.to(v.device) if k.endswith(".lora_rows") else v for k, v in part.items()} for s, part in stored.items()}  # fmt: skip


def load_adapter(program: Program, stored: Stored, slot: int, directory: Directory) -> Stored:
    """`stored` with the adapter of a PEFT directory in a slot. `stored` is not written.

    Its own rank (up to the program's; the rest is zero), alpha, rsLoRA and DoRA. Raises `ValueError` for what is no LoRA, per-module ranks, a larger rank, modules that the
    program has no adapters for, tensors of other shapes, a slot that it has not, and files that cannot be read.
    """
    options, folder = _options(program), Path(directory)
    if type(slot) is not int or not 0 <= slot < options["count"]:
        raise ValueError(f"load_adapter: slot {slot!r}, this program has 0 to {options['count'] - 1}")
    settings = _settings(folder / "adapter_config.json")
    if settings.rank > options["rank"]:
        raise ValueError(f"{folder}/adapter_config.json: r is {settings.rank}, the program's adapters(rank={options['rank']}); raise it")  # fmt: skip
    found = {k.removeprefix("base_model.model."): v for k, v in read_tensors(folder / "adapter_model.safetensors").items()}  # fmt: skip
    if not found:
        raise ValueError(f"{folder}/adapter_model.safetensors: no tensors in it, and so no adapter")
    known = _known(program, settings.dora)
    for k in found:
        if k not in known:
            raise ValueError(f"{folder}: {k!r} is not adapted in this program; {tree.suggest(k, known)}; check adapters(targets=...)")  # fmt: skip
    return {s: part | _slot(program.sites[s], part, slot, settings, found, folder) for s, part in stored.items()}


def _settings(path: Path) -> Lora:
    """What a PEFT file says of an adapter."""
    config = read_json(path)
    for key, fine, want in (
        ("peft_type", lambda v: v in (None, "LORA"), "'LORA'"),
        ("r", lambda v: type(v) is int and v > 0, "a whole number >= 1"),
        ("lora_alpha", lambda v: isinstance(v, int | float) and isfinite(v), "a number"),
        ("bias", lambda v: v in (None, "none"), "'none', as biases that were trained are not read"),
        *((key, lambda v: not v, "none: it cannot be served beside others; fuse this adapter into weights of its own") for key in ("rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")),
    ):  # fmt: skip
        if not fine(config.get(key)):
            raise ValueError(f"{path}: {key}={config.get(key)!r}, required {want}")
    return Lora(config["r"], float(config["lora_alpha"]), (), rslora=bool(config.get("use_rslora")), dora=bool(config.get("use_dora")))  # fmt: skip


def _weights(p: Program) -> list[str]:
    """The adapted weights of a site."""
    return [f"{k.removesuffix('.lora_rows')}.weight" for k in p.spec if k.endswith(".lora_rows")]


def _known(program: Program, dora: bool) -> set[str]:
    """The leaves that a file may hold."""
    return {n for p in program.sites.values() for w in _weights(p) for n in names_in_files(w, dora)}


def _slot(p: Program, part: Params, slot: int, settings: Lora, found: Params, folder: Path) -> Params:
    """The changed leaves of a site."""
    out: Params = {}
    for weight in _weights(p):
        a, b, scales, gains, _ = _names(weight)
        given = [found.get(n) for n in names_in_files(weight, settings.dora)]
        here = [x for x in given if x is not None]
        if here and len(here) < len(given):
            missing = names_in_files(weight, settings.dora)[given.index(None)]
            raise ValueError(f"{folder}: adapter leaf {missing!r} is missing; the file is not whole")
        (_, width), (features, _) = (part[n][slot].shape for n in (a, b))
        for n, x, want in zip(names_in_files(weight, settings.dora), here, ((settings.rank, width), (features, settings.rank), (features,)), strict=False):  # fmt: skip
            if tuple(x.shape) != want:
                raise ValueError(f"{folder}: {n!r} is {tuple(x.shape)}, required {want}; was it trained on this model, with r={settings.rank}?")  # fmt: skip
        gain = torch.ones_like(part[gains][slot])
        if here and settings.dora:
            whole = p.before("adapters", part)[1][weight]
            gain = gain_of(settings, whole, here, weight in p.marks["transposed"]).to(gain)
        changed = {scales: torch.tensor(settings.scale if here else 0.0), gains: gain}
        changed |= {n: _padded(x, part[n][slot]) for n, x in zip((a, b), given[:2], strict=True)}
        for k, x in changed.items():
            out[k] = part[k].clone()
            out[k][slot] = x
    return out


def _padded(x: Tensor | None, like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    if x is not None:
        out[: x.shape[0], : x.shape[1]] = x.to(like)
    return out


def _options(program: Program) -> dict[str, Any]:
    for i, t in enumerate(program.history):
        if t.name != "adapters":
            continue
        weights = [w for p in program.sites.values() for w in _weights(p)]
        if not weights or any(
            n not in p.spec or p.spec[n].dim() != 3
            for p in program.sites.values()
            for w in _weights(p)
            for n in adapter_names(w)
        ):
            raise ValueError(f"adapters: {program.history[i + 1 :]!r} behind adapters(...) store them in another form; choose and load before these, by a program without them")  # fmt: skip
        return dict(t.options)
    raise ValueError(f"no transformation 'adapters' in this program; {tree.suggest('adapters', {t.name for t in program.history})}")  # fmt: skip


__all__ = ["NONE", "adapters", "choose", "load_adapter"]
