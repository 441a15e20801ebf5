"""Many low-rank adapters in one batch: each row has its own, beside the same base weights (S-LoRA; Sheng et al. 2023, arXiv:2311.03285).

    y_r = W x_r + s_i B_i (A_i x_r),  i = the adapter of row r

Nothing is fused, so nothing is rounded into the base, and a row's adapter is data: another choice is another tensor, not another graph.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.files import Directory, read_json, read_tensors
from fds.frame import Apply
from fds.lora import Lora, adapter_names, check_targets, targets_of
from fds.program import Lens, Program, Stored
from fds.transform import Transform, around_site, direct
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
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    for name, value in (("count", count), ("rank", rank), ("rows", rows)):
        if type(value) is not int or value < 1:
            raise ValueError(f"adapters: {name}={value!r}, required a whole number >= 1")
    settings = Lora(rank, float(rank), targets)
    options: dict[str, Any] = {"count": count, "rank": rank, "targets": targets[0] if len(targets) == 1 else targets, "rows": rows}  # fmt: skip
    return _Adapters(
        "adapters",
        tuple(options.items()),
        lens=lambda p: _lens(settings, count, rows, p),
        provides=frozenset(["adapters"]),
        conflicts=frozenset(["flat", "adapters", "tensor", "whole"]),
        check=partial(check_targets, settings),
        settings=settings,
    )


@attrs.frozen(repr=False)
class _Adapters(Transform):
    settings: Lora = attrs.field(kw_only=True)

    def _on_site(self, site: str, p: Program) -> Program:
        found = targets_of(self.settings, p)
        new = super()._on_site(site, p)
        for name in found:
            new = around_site(site, new, partial(_beside, _names(name)), name.rpartition(".")[0])
        return new


def _names(weight: str) -> tuple[str, str, str, str]:
    a, b = adapter_names(weight)
    module = weight.removesuffix(".weight")
    return a, b, f"{module}.lora_scales", f"{module}.lora_rows"


def _lens(settings: Lora, count: int, rows: int, p: Program) -> Lens:
    targets, transposed = targets_of(settings, p), p.marks.get("transposed", frozenset())

    def put(params: Params) -> Params:
        out = {k: v.detach() for k, v in params.items()}
        for name in targets:
            w = params[name]
            width, features = w.shape if name in transposed else w.shape[::-1]
            made = (
                w.new_zeros(count, settings.rank, width), w.new_zeros(count, features, settings.rank),
                torch.zeros(count, device=w.device), torch.full((rows,), NONE, dtype=torch.int64, device=w.device),
            )  # fmt: skip
            out |= dict(zip(_names(name), made, strict=True))
        return out

    def base(stored: Params) -> Params:
        return {k: v for k, v in stored.items() if k not in own}

    own = {n for name in targets for n in _names(name)}
    return Lens(put, lambda stored: stored, restore=base)


def _beside(names: tuple[str, str, str, str], apply: Apply) -> Apply:
    def run(leaves: Params, x: Tensor) -> Tensor:
        a, b, scales, rows = (leaves[n] for n in names)
        y = apply({k: v for k, v in leaves.items() if k not in names}, x)
        if x.dim() < 3 or len(x) > len(rows):
            raise ValueError(
                f"adapters: {names[0].partition('.lora_A')[0]} is called with {tuple(x.shape)}, required [rows, tokens, features] of at most {len(rows)} rows; raise rows="
            )
        index = rows[: len(x)]
        mine = index.clamp(min=0)
        scale = torch.where(index < 0, 0.0, scales[mine]).to(x.dtype)[:, None, None]
        return y + scale * ((x.flatten(1, -2) @ a[mine].mT) @ b[mine].mT).view(y.shape)

    return run


def choose(program: Program, stored: Stored, index: Sequence[int] | Tensor) -> Stored:
    """`stored` with an adapter for each row of the batches to come, `NONE` (-1) for the base alone; what is not named has none. `stored` is not written.

    Raises `ValueError` for a program without `adapters`, more rows than it has room for, and an adapter that it has not.
    """
    options = _options(program)
    given = torch.as_tensor(index, dtype=torch.int64)
    if given.dim() != 1 or len(given) > options["rows"]:
        raise ValueError(f"choose: {tuple(given.shape)} for {options['rows']} rows; raise rows= of adapters(...)")
    if len(given) and (int(given.min()) < NONE or int(given.max()) >= options["count"]):
        raise ValueError(f"choose: adapters {int(given.min())} to {int(given.max())}, this program has 0 to {options['count'] - 1}, and -1 for none")  # fmt: skip
    rows = F.pad(given, (0, options["rows"] - len(given)), value=NONE)
    return {s: {k: rows.to(v.device) if k.endswith(".lora_rows") else v for k, v in part.items()} for s, part in stored.items()}  # fmt: skip


def load_adapter(program: Program, stored: Stored, slot: int, directory: Directory) -> Stored:
    """`stored` with the adapter of a PEFT directory in a slot. `stored` is not written.

    Its own rank (up to the program's; the rest is zero), alpha and rsLoRA. Raises `ValueError` for DoRA, per-module ranks, a larger rank, modules that the program
    has no adapters for, a slot that it has not, and files that cannot be read.
    """
    options, folder = _options(program), Path(directory)
    if not 0 <= slot < options["count"]:
        raise ValueError(f"load_adapter: slot {slot}, this program has 0 to {options['count'] - 1}")
    config = read_json(folder / "adapter_config.json")
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"{folder}/adapter_config.json: {key}={config[key]!r} cannot be served beside others; fuse this adapter into weights of its own")  # fmt: skip
    rank = config["r"]
    scale = Lora(rank, float(config["lora_alpha"]), (), rslora=bool(config.get("use_rslora"))).scale
    if rank > options["rank"]:
        raise ValueError(f"{folder}/adapter_config.json: r is {rank}, the program's adapters(rank={options['rank']}); raise it")  # fmt: skip
    found = {k.removeprefix("base_model.model."): v for k, v in read_tensors(folder / "adapter_model.safetensors").items()}  # fmt: skip
    known = {k for part in stored.values() for k in part if ".lora_A." in k or ".lora_B." in k}
    for k in found:
        if k not in known:
            raise ValueError(f"{folder}: {k!r} is not adapted in this program; {tree.suggest(k, known)}; check adapters(targets=...)")  # fmt: skip
    out: Stored = {}
    for s, part in stored.items():
        new = dict(part)
        for k, v in part.items():
            if k.endswith(".lora_scales"):
                here = f"{k.removesuffix('.lora_scales')}.lora_A.weight" in found
                new[k] = v.index_fill(0, torch.tensor([slot], device=v.device), scale if here else 0.0)
            elif k in known:
                whole = torch.zeros_like(v[slot])
                if (x := found.get(k)) is not None:
                    whole[: x.shape[0], : x.shape[1]] = x.to(whole)
                new[k] = v.clone()
                new[k][slot] = whole
        out[s] = new
    return out


def _options(program: Program) -> dict[str, Any]:
    for t in program.history:
        if t.name == "adapters":
            return dict(t.options)
    raise ValueError(f"no transformation 'adapters' in this program; {tree.suggest('adapters', {t.name for t in program.history})}")  # fmt: skip


__all__ = ["NONE", "adapters", "choose", "load_adapter"]
