"""`tensor_parallel`: the linear layers of a model split over ranks, with the collectives that join their work."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fds._torch import named_modules, registries
from fds.frame import FRAME, Apply, Head, Wrap
from fds.program import Core, Lens, Program
from fds.sharding import collectives
from fds.sharding.cuts import SUMMED, Cut, Heads, Range, even, scaled, side_by_side
from fds.sharding.mesh import Axis
from fds.sharding.plans import plan_of
from fds.transform import Transform, direct, parameters, wrapped_calls
from fds.tree import Params


@direct
def tensor_parallel(axis: Axis, plan: Mapping[str, str] | None = None, *, sequence: bool = False) -> Transform:
    """Split the linear layers over the ranks of `axis`, which compute every call together. All of them get the same rows.

    Column-parallel layers have a part of the output features each, the row-parallel ones behind them a part of the input features, and sum
    their outputs; attention is split by whole heads, embeddings and output layer by words. `losses.causal_lm` never gathers the logits; a
    call of the program does. Apply it before `shard(mesh["dp"])` and after `lora`.

    Args:
        axis: a mesh axis, ``mesh["tp"]``. Sizes need not divide: the first ranks get a feature or a head more. With fewer key-value heads
            than ranks those are stored whole on every rank.
        plan: style of layers (and of parameters) by pattern of whole paths, ``{"*.q_proj": "column", "*.o_proj": "row"}``. Default: the
            model's own (transformers), else by the names of the layers. `sharding.plan_of(module)` prints what would be done, and
            `sharding.STYLES` explains the styles.
        sequence: split the activations between the layers along the sequence as well: all-gather before and reduce-scatter behind a pair of
            layers in the place of all-reduce, as many bytes, 1/n of the activations of norms and residuals. Its length has to divide by n.

    Dropout of what is split draws other numbers on every rank, so training with it follows one process in distribution only.

    Law: ``restore(place(p)) == p``; values and gradients equal one process.
    Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.
    """
    options: dict[str, Any] = {"axis": axis}
    options |= {"plan": dict(plan)} if plan is not None else {}
    options |= {"sequence": True} if sequence else {}
    return _TensorParallel(
        "tensor_parallel",
        tuple(options.items()),
        provides=frozenset(["tensor"]),
        conflicts=frozenset(["tensor", "flat", "whole"]),
        shared=(axis,),
        axis=axis,
        plan=plan,
        sequence=sequence,
    )


@attrs.frozen(repr=False)
class _TensorParallel(Transform):
    """The transformation with its settings; applied, it is bound to the layout of the program's module."""

    axis: Axis = attrs.field(kw_only=True)
    plan: Mapping[str, str] | None = attrs.field(kw_only=True, eq=False)
    sequence: bool = attrs.field(kw_only=True)
    layout: "_Layout | None" = attrs.field(default=None, kw_only=True, eq=False)

    def __call__(self, program: Program) -> Program:
        core = program.core
        if core is None:
            raise ValueError("tensor_parallel: this program was not made from a module")
        layout = _Layout.of(core, self.axis, self.plan, self.sequence)
        return Transform.__call__(attrs.evolve(self, layout=layout, lens=partial(_lens, layout)), program)

    def _on_site(self, site: str, p: Program) -> Program:
        layout, core = self.layout, p.core
        assert layout is not None and core is not None
        new = super()._on_site(site, p)
        inside = set(core.modules(site))
        new = wrapped_calls(new, {path: w for path, w in layout.calls().items() if path in inside})
        return attrs.evolve(new, apply=layout.around(site, new.apply))


# --- parameters ---


def _lens(layout: "_Layout", p: Program) -> Lens | None:
    axis, spec = layout.axis, parameters(p)
    cuts = {k: cut for k in spec if (cut := layout.cut_of(k)) is not None}
    if not cuts:
        return None
    for k, v in spec.items():
        want = layout.shapes.get(k)
        if want is not None and v.shape != want:
            raise ValueError(
                f"tensor_parallel: {k} is stored as {tuple(v.shape)}, required {tuple(want)} as in the module; apply tensor_parallel before what changes it ({p.stack[-1]!r})"
            )

    def put(params: Params) -> Params:
        return {k: cuts[k].take(v, axis.rank) if k in cuts and not cuts[k].whole else v for k, v in params.items()}

    def get(stored: Params) -> Params:
        return {k: cuts[k].used(v, axis) if k in cuts else v for k, v in stored.items()}

    def restore(stored: Params) -> Params:
        return {k: cuts[k].restore(v, axis) if k in cuts else v for k, v in stored.items()}

    split = {k: (*p.axes.get(k, ()), axis) for k, cut in cuts.items() if not cut.whole and axis.size > 1}
    return Lens(put, get, restore=restore, axes=split)


# --- layout ---

_KEYS = ("k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin")
_FULL: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("fds_fan_out", default=None)


@attrs.define(eq=False)
class _Layout:
    """What every leaf and every call of a module becomes on this rank."""

    core: Core
    axis: Axis
    sequence: bool
    modules: dict[str, nn.Module]
    shapes: dict[str, torch.Size]
    cuts: dict[str, Cut] = attrs.field(factory=dict[str, Cut])
    wraps: dict[str, list[Wrap]] = attrs.field(factory=dict[str, list[Wrap]])
    attention: dict[str, Heads] = attrs.field(factory=dict[str, Heads])  # by path of the module that has the heads
    columns: list[str] = attrs.field(factory=list[str])  # paths of column-parallel layers

    @staticmethod
    def of(core: Core, axis: Axis, plan: Mapping[str, str] | None, sequence: bool) -> "_Layout":
        modules = dict(named_modules(core.module))
        shapes = {core.first_name(f"{n}.{k}".lstrip(".")): p.shape for n, m in modules.items() for k, p in registries(m)[0].items() if p is not None}  # fmt: skip
        layout = _Layout(core, axis, sequence, modules, shapes)
        styles = plan_of(core.module, plan).styles
        for path, style in styles.items():
            getattr(layout, style)(path)
        layout._check_neighbours(styles)
        layout._tied_embeddings(styles)
        layout._enter(styles)
        for path, heads in layout.attention.items():
            layout._wrap(path, partial(_with_heads, layout, path, heads))
        return layout

    def calls(self) -> dict[str, Wrap]:
        """The wrappers of every module's call, as one."""
        return {path: partial(reduce, lambda apply, w: w(apply), wraps) for path, wraps in self.wraps.items()}

    def error(self, path: str, text: str) -> ValueError:
        return ValueError(f"tensor_parallel: {path}: {text}")

    def cut_of(self, leaf: str) -> Cut | None:
        """The cut of a stored leaf: of the module, or of an adapter beside a linear layer."""
        base, adapter = re.sub(r"\.lora_[AB]\.weight$", ".weight", leaf), leaf[-8:-7]
        cut = self.cuts.get(base)
        if base == leaf or cut is None:
            inside = any(leaf.startswith(s + ".") for s in self.core.sites)
            return SUMMED if cut is None and self.sequence and inside else cut
        if not cut.ranges:
            return cut
        by_output = cut.dim == self._output_dim(base.removesuffix(".weight"))
        if by_output != (adapter == "B"):
            return SUMMED  # every rank has a part of the work that it does
        return attrs.evolve(cut, dim=0 if by_output else 1)

    # --- styles: one method each ---

    def column(self, path: str) -> None:
        leaf, dim = self._weight(path)
        size = self.shapes[leaf][dim]
        heads = self._heads(path)
        if heads is None:
            self._cut_columns(path, Cut(dim, scaled(self._even(path, size), 1)))
        elif path.rpartition(".")[2] in _KEYS:
            count = max(h for part in heads.keys for h in part) + 1
            unit = self._unit(path, size, count, "key-value heads")
            self._cut_columns(path, Cut(dim, heads.key_ranges(unit), heads.repeated))
        else:
            self._cut_columns(path, Cut(dim, scaled(heads.queries, self._query_unit(path, size, heads))))

    def column_gather(self, path: str) -> None:
        leaf, dim = self._weight(path)
        cut = Cut(dim, scaled(self._even(path, self.shapes[leaf][dim]), 1))
        self._cut_columns(path, cut, listed=False)
        self._wrap(path, partial(_gathered, self, path, cut.sizes()))

    def packed_column(self, path: str) -> None:
        leaf, dim = self._weight(path)
        size = self.shapes[leaf][dim]
        if size % 2:
            raise self.error(leaf, f"{size} output features are not two equal parts")
        half = self._even(path, size // 2)
        self._cut_columns(path, Cut(dim, side_by_side(scaled(half, 1), scaled(half, 1, offset=size // 2))))

    def fused_qkv(self, path: str) -> None:
        leaf, dim = self._weight(path)
        heads, size = self._required_heads(path), self.shapes[leaf][dim]
        queries, keys = sum(n for _, n in heads.queries), max(h for part in heads.keys for h in part) + 1
        unit = self._unit(path, size, queries + 2 * keys, "query, key and value heads")
        parts = (
            scaled(heads.queries, unit),
            *(heads.key_ranges(unit, offset=(queries + i * keys) * unit) for i in (0, 1)),
        )
        self._cut_columns(path, Cut(dim, side_by_side(*parts), heads.repeated))

    def interleaved_qkv(self, path: str) -> None:
        heads = self._required_heads(path)
        keys = max(h for part in heads.keys for h in part) + 1
        if keys == 1 and self.axis.size > 1:  # multi-query attention: the one key and value come last
            return self.fused_qkv(path)
        if heads.repeated:
            raise self.error(path, f"{keys} key-value heads over {self.axis.size} ranks; sizes that work: 1 to {keys}")
        leaf, dim = self._weight(path)
        unit = self._unit(path, self.shapes[leaf][dim], keys, "groups of heads")
        self._cut_columns(path, Cut(dim, heads.key_ranges(unit)))

    def heads(self, path: str) -> None:
        heads, leaf = self._required_heads(path), self.core.first_name(f"{path}.weight")
        self._set(leaf, Cut(1, scaled(heads.queries, 1)))

    def row(self, path: str) -> None:
        cut = self._cut_row(path)
        if path in self.modules:
            self._wrap(path, partial(_row, self, path))
        assert cut.ranges

    def row_split(self, path: str) -> None:
        sizes = self._cut_row(path).sizes()
        self._wrap(path, partial(_row, self, path))
        self._wrap(path, lambda apply: lambda leaves, x: apply(leaves, collectives.split(x, self.axis, dim=-1, sizes=sizes)))

    def embedding(self, path: str) -> None:
        leaf = self.core.first_name(f"{path}.weight")
        if getattr(self.modules[path], "max_norm", None) is not None:
            raise self.error(path, "an embedding with max_norm writes to its weight; leave it out of the plan")
        self._set(leaf, Cut(0, scaled(self._even(path, self.shapes[leaf][0]), 1)))
        self._wrap(path, partial(_embedding, self, path))

    def embedding_column(self, path: str) -> None:
        leaf = self.core.first_name(f"{path}.weight")
        cut = Cut(1, scaled(self._even(path, self.shapes[leaf][1]), 1))
        self._set(leaf, cut)
        self._wrap(path, lambda apply: lambda leaves, ids: collectives.join(apply(leaves, ids), self.axis, dim=-1, sizes=cut.sizes()))

    def experts(self, path: str) -> None:
        if self.sequence or getattr(self.modules[path], "is_transposed", False):
            raise self.error(path, "experts with transposed weights, or with sequence=True, are not supported")
        self._wrap(path, partial(_experts, self.axis))

    def partial(self, path: str) -> None:
        for key in registries(self.modules[path])[0]:
            self._set(self.core.first_name(f"{path}.{key}"), SUMMED)

    def replicate(self, path: str) -> None:
        """Nothing to do."""

    # --- helpers of the styles ---

    def _set(self, leaf: str, cut: Cut) -> None:
        if self.cuts.setdefault(leaf, cut) != cut:
            raise self.error(leaf, "two layers share this weight, and the plan splits them in different ways; give both one style")

    def _wrap(self, path: str, wrap: Wrap) -> None:
        if any(s.startswith(path + ".") for s in self.core.sites):
            raise self.error(path, "this module contains the model's blocks; name layers inside of them")
        self.wraps.setdefault(path, []).append(wrap)

    def _output_dim(self, path: str) -> int:
        return 1 if type(self.modules.get(path)).__name__ == "Conv1D" else 0

    def _weight(self, path: str) -> tuple[str, int]:
        """The weight of a layer and its dimension of output features; a parameter by itself is [..., out, in]."""
        if path not in self.modules:
            return self.core.first_name(path), len(self.shapes[self.core.first_name(path)]) - 2
        weight = registries(self.modules[path])[0].get("weight")
        if weight is None or weight.dim() != 2 or isinstance(self.modules[path], nn.Embedding):
            raise self.error(path, f"{type(self.modules[path]).__name__} is not a linear layer with a 2-D weight")
        return self.core.first_name(f"{path}.weight"), self._output_dim(path)

    def _even(self, path: str, size: int) -> list[Range]:
        if size < self.axis.size:
            raise self.error(path, f"{size} features over {self.axis.size} ranks; sizes that work: 1 to {size}")
        return even(size, self.axis.size)

    def _unit(self, path: str, size: int, count: int, what: str) -> int:
        if size % count:
            raise self.error(path, f"{size} features are not {count} {what} of one size")
        return size // count

    def _query_unit(self, path: str, size: int, heads: Heads) -> int:
        return self._unit(path, size, sum(n for _, n in heads.queries), "heads")

    def _cut_columns(self, path: str, cut: Cut, *, listed: bool = True) -> None:
        leaf, _ = self._weight(path)
        self._set(leaf, cut)
        if path not in self.modules:
            return
        if registries(self.modules[path])[0].get("bias") is not None:
            self._set(self.core.first_name(f"{path}.bias"), attrs.evolve(cut, dim=0))
        if listed:
            self.columns.append(path)

    def _cut_row(self, path: str) -> Cut:
        leaf, out = self._weight(path)
        dim = out + 1 if path not in self.modules else 1 - out
        size, heads = self.shapes[leaf][dim], self._heads(path)
        ranges = scaled(self._even(path, size), 1) if heads is None else scaled(heads.queries, self._query_unit(path, size, heads))
        self._set(leaf, Cut(dim, ranges))
        return self.cuts[leaf]

    def _heads(self, path: str) -> Heads | None:
        """The heads of the attention that a layer belongs to, or None outside of attention."""
        config: Any = getattr(self.core.module, "config", None)
        if config is None or not re.search(r"attn|attention", path, re.IGNORECASE):
            return None
        text, parent = config.get_text_config(), path.rpartition(".")[0]
        module: Any = self.modules.get(parent)
        queries = getattr(text, "num_attention_heads", None)
        if queries is None:
            return None
        keys = getattr(module, "num_kv_heads", None) or getattr(text, "num_key_value_heads", None) or queries
        group = getattr(module, "num_key_value_groups", queries // keys)
        if queries % keys or group * keys != queries:
            raise self.error(path, f"{queries} query heads and {keys} key-value heads do not go with groups of {group}")
        return Heads.of(queries, keys, self.axis.size, partial(self.error, path))

    def _required_heads(self, path: str) -> Heads:
        heads = self._heads(path)
        if heads is None:
            raise self.error(path, "the number of heads is not known (no transformers configuration, or not in an attention module); use style 'column'")
        return heads

    def _tied_embeddings(self, styles: Mapping[str, str]) -> None:
        """An embedding whose weight is split by words for another layer looks up in a part of it."""
        for path, m in self.modules.items():
            if isinstance(m, nn.Embedding) and path not in styles and self.core.first_name(f"{path}.weight") in self.cuts:
                self.embedding(path)

    def _check_neighbours(self, styles: Mapping[str, str]) -> None:
        """A parameter among column layers that the plan does not name (a norm of each head) would get a part of its gradient only."""
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in self.columns):
            for path in self._owners(parent):
                if path not in styles and not any(s.startswith(path + ".") for s in styles):
                    raise self.error(
                        path, f"the plan splits layers of {parent} and does not say what becomes of this {type(self.modules[path]).__name__}; add {path!r}: 'partial' if it works on what they make, 'replicate' if on what goes into them"
                    )

    def _owners(self, path: str) -> list[str]:
        """The modules with parameters inside of a module that is not a block."""
        if path in self.core.sites or not path:
            return []
        return [n for n, m in self.modules.items() if n.startswith(path + ".") and registries(m)[0]]

    # --- calls ---

    def _enter(self, styles: Mapping[str, str]) -> None:
        """Where whole activations go into split work: at the column layers, or with `sequence` at the module around them."""
        entered: dict[str, None] = {}
        for path in self.columns:
            parent = path.rpartition(".")[0]
            if self._heads(path) is not None:
                heads = self._heads(path)
                assert heads is not None
                self.attention.setdefault(parent, heads)
            if hasattr(self.modules[path], "nf"):  # transformers' Conv1D keeps its number of output features
                leaf, dim = self._weight(path)
                self._wrap(path, partial(_with, self.core, path, {"nf": self.cuts[leaf].sizes()[self.axis.rank]}))
            if self.sequence:
                entered[parent if self._is_region(parent, styles) else path] = None
            else:
                self._wrap(path, partial(_column, self.axis))
        for path in entered:
            self._wrap(path, partial(_gathered_input, self.axis))
        if self.sequence:
            self._check_stack()

    def _is_region(self, path: str, styles: Mapping[str, str]) -> bool:
        """Whether all parameters inside of a module belong to split layers, so that its whole input goes to them."""
        inside = self._owners(path)
        return bool(inside) and all(styles.get(n, "replicate") != "replicate" for n in inside)

    def _check_stack(self) -> None:
        stacks = {s.rpartition(".")[0] for s in self.core.sites}
        if len(stacks) != 1:
            raise ValueError(
                f"tensor_parallel(sequence=True): the model's blocks ({', '.join(sorted(stacks))}) are not one stack, so there is no place to split and join the sequence; use sequence=False, or name one stack in functionalize(sites=...)"
            )

    def around(self, site: str, apply: Apply) -> Apply:
        """The call of a site: with `sequence`, the first one splits its input and the last one joins its output."""
        if not site:
            return _without_hidden_states(apply) if self.sequence else apply
        if not self.sequence:
            return _shared(apply)
        first, last = site == self.core.sites[0], site == self.core.sites[-1]
        return partial(_along_sequence, self.axis, first, last, apply)


def _shared(apply: Apply) -> Apply:
    """Layers of one block that take the same input take it through one `fan_out`: one all-reduce in backward for query, key and value."""

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _FULL.set([])
        try:
            return apply(*args, **kwargs)
        finally:
            _FULL.reset(token)

    return run


def _fan_out(x: Tensor, axis: Axis) -> Tensor:
    last = _FULL.get()
    if last is None:
        return collectives.fan_out(x, axis)
    if not last or last[0][0] is not x:
        last[:] = [(x, collectives.fan_out(x, axis))]
    return last[0][1]


def _part(axis: Axis | None) -> None:
    """From here on the block's activations are this rank's part (of `axis`), or whole: dropout draws accordingly."""
    FRAME.get().draws.part = 0 if axis is None or axis.size == 1 else axis.rank + 1


def _column(axis: Axis, apply: Apply) -> Apply:
    def run(leaves: Params, x: Tensor) -> Tensor:
        _part(None)
        y = apply(leaves, _fan_out(x, axis))
        _part(axis)
        return y

    return run


def _gathered(layout: _Layout, path: str, sizes: list[int], apply: Apply) -> Apply:
    axis, core = layout.axis, layout.core
    weight, bias = (core.first_name(f"{path}.{k}") for k in ("weight", "bias"))

    def run(leaves: Params, x: Tensor) -> Tensor:
        x, frame = collectives.fan_out(x, axis), FRAME.get()
        if path == core.head and frame.heads is not None and len(frame.wraps[path]) == 1:
            logits = x.new_zeros(()).expand(*x.shape[:-1], sum(sizes))
            first = sum(sizes[: axis.rank])
            frame.heads.append(Head(x, leaves[weight], leaves.get(bias), logits, axis, first))
            return logits
        return collectives.join(apply(leaves, x), axis, dim=-1, sizes=sizes)

    return run


def _row(layout: _Layout, path: str, apply: Apply) -> Apply:
    """The sum of the ranks' products, and the bias once."""
    name = layout.core.first_name(f"{path}.bias")
    takes_none = isinstance(layout.modules[path], nn.Linear)  # Conv1D adds its bias, whatever it is

    def run(leaves: Params, x: Tensor) -> Tensor:
        bias = leaves.get(name)
        if bias is None:
            return _summed(apply(leaves, x), layout)
        nothing: Any = None if takes_none else torch.zeros_like(bias)
        return _summed(apply({**leaves, name: nothing}, x), layout) + bias

    return run


def _summed(y: Tensor, layout: _Layout) -> Tensor:
    if layout.sequence:
        return collectives.scatter_along(y, layout.axis, y.dim() - 2)
    _part(None)
    return collectives.fan_in(y, layout.axis)


def _embedding(layout: _Layout, path: str, apply: Apply) -> Apply:
    axis, leaf = layout.axis, layout.core.first_name(f"{path}.weight")
    ((first, count),) = layout.cuts[leaf].ranges[axis.rank]
    padding = getattr(layout.modules[path], "padding_idx", None)
    mine = None if padding is None or not first <= padding < first + count else padding - first

    def run(leaves: Params, ids: Tensor) -> Tensor:
        here = (ids >= first) & (ids < first + count)
        with _changed(layout.core.part(path), {} if padding is None else {"padding_idx": mine}):
            found = apply(leaves, (ids - first).where(here, 0))
        return collectives.fan_in(found.where(here[..., None], 0.0), axis)

    return run


def _experts(axis: Axis, apply: Apply) -> Apply:
    def run(leaves: Params, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = ([_out(x, axis) for x in args], {k: _out(x, axis) for k, x in kwargs.items()})
        return collectives.fan_in(apply(leaves, *args, **kwargs), axis)

    return run


def _out(x: Any, axis: Axis) -> Any:
    return collectives.fan_out(x, axis) if isinstance(x, Tensor) and x.is_floating_point() else x


# --- attention ---


@contextmanager
def _changed(module: nn.Module, values: Mapping[str, Any]) -> Generator[None]:
    """`module` with other attributes for the time of a call."""
    held = {k: getattr(module, k) for k in values}
    try:
        for k, v in values.items():
            setattr(module, k, v)
        yield
    finally:
        for k, v in held.items():
            setattr(module, k, v)


def _with(core: Core, path: str, values: Mapping[str, Any], apply: Apply) -> Apply:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _changed(core.part(path), values):
            return apply(*args, **kwargs)

    return run


def _with_heads(layout: _Layout, path: str, heads: Heads, apply: Apply) -> Apply:
    """The attention's own numbers of heads are this rank's for the time of a call, and ALiBi's slopes are those of its heads."""
    module: Any = layout.modules[path]
    start, count = heads.queries[layout.axis.rank]
    total, keys = sum(n for _, n in heads.queries), len(heads.keys[layout.axis.rank])
    values: dict[str, int] = {}
    for name in ("num_heads", "n_heads", "n_head", "num_attention_heads"):
        values |= {name: count} if getattr(module, name, None) == total else {}
    values |= {n: keys for n in ("num_kv_heads", "num_key_value_heads") if hasattr(module, n)}
    values |= {"num_key_value_groups": count // keys} if hasattr(module, "num_key_value_groups") else {}
    for name in ("split_size", "all_head_size", "inner_dim"):
        size = getattr(module, name, None)
        values |= {name: size // total * count} if size else {}

    apply = _with(layout.core, path, values, apply)

    def run(*args: Any, **kwargs: Any) -> Any:
        if (alibi := kwargs.get("alibi")) is not None:  # [rows * heads, ...]
            kwargs["alibi"] = alibi.unflatten(0, (-1, total)).narrow(1, start, count).flatten(0, 1)
        return apply(*args, **kwargs)

    return run


# --- sequence parallelism ---

_INPUTS = ("hidden_states", "x", "input", "inputs")


def _gathered_input(axis: Axis, apply: Apply) -> Apply:
    """The module's input, split along the sequence (the last dimension but one), whole."""

    def run(leaves: Params, *args: Any, **kwargs: Any) -> Any:
        if args:
            return apply(leaves, collectives.gather_along(args[0], axis, args[0].dim() - 2), *args[1:], **kwargs)
        name = next((n for n in _INPUTS if n in kwargs), None)
        if name is None:
            raise ValueError(f"tensor_parallel(sequence=True): a module is called with {sorted(kwargs)}, none of {', '.join(_INPUTS)}; use sequence=False")
        return apply(leaves, **{**kwargs, name: collectives.gather_along(kwargs[name], axis, kwargs[name].dim() - 2)})

    return run


def _along_sequence(axis: Axis, first: bool, last: bool, apply: Apply, leaves: Params, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A block's call on [rows, length / n, width]."""
    if first and x.shape[1] % axis.size:
        raise ValueError(
            f"tensor_parallel(sequence=True): a sequence of {x.shape[1]} does not divide by {axis.size} ranks; pad it, or use sequence=False"
        )
    x = collectives.split(x, axis, dim=1) if first else x
    _part(axis)
    out = apply(leaves, x, *args, **kwargs)
    y = out[0] if isinstance(out, tuple) else out
    if y.shape != x.shape:
        raise ValueError(f"tensor_parallel(sequence=True): a block makes {tuple(y.shape)} of {tuple(x.shape)}; it works on the whole sequence outside of its split layers; use sequence=False")
    y = collectives.join(y, axis, dim=1) if last else y
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _without_hidden_states(apply: Apply) -> Apply:
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_hidden_states"):
            raise ValueError("tensor_parallel(sequence=True): output_hidden_states would give parts of the sequence; use sequence=False")
        return apply(*args, **kwargs)

    return run
