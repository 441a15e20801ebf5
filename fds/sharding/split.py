"""From a plan to what every leaf and every call of a module becomes on a rank: `Split`."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import nn

from fds._torch import named_modules, registries
from fds.frame import Apply, Wrap
from fds.program import Core
from fds.sharding import calls, collectives
from fds.sharding.cuts import SUMMED, Cut, Heads, Range, even, scaled, side_by_side
from fds.sharding.mesh import Axis
from fds.sharding.plans import plan_of

_OF_PARAMETERS = ("column", "packed_column", "row", "replicate")
_ALONG_SEQUENCE = ("column", "packed_column", "fused_qkv", "interleaved_qkv", "row", "partial", "replicate")
_COLUMNS = ("column", "packed_column", "fused_qkv", "interleaved_qkv")
_KEYS = ("k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin")


@attrs.define(eq=False)
class Split:
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
    def of(core: Core, axis: Axis, plan: Mapping[str, str] | None, sequence: bool) -> "Split":
        modules = dict(named_modules(core.module))
        shapes = {core.first_name(f"{n}.{k}".lstrip(".")): p.shape for n, m in modules.items() for k, p in registries(m)[0].items() if p is not None}  # fmt: skip
        split = Split(core, axis, sequence, modules, shapes)
        if sequence:
            split._check_stack()
        styles = plan_of(core.module, plan).styles
        for path, style in styles.items():
            split._check_style(path, style, styles)
            cut: Any = getattr(split, style)
            cut(path)
        split._check_neighbours(styles)
        split._check_pairs(styles)
        split._tied_embeddings(styles)
        split._enter(styles)
        for path, heads in split.attention.items():
            split._wrap(path, partial(calls.with_heads, core, axis, path, heads))
        return split

    def wrappers(self) -> dict[str, Wrap]:
        """The wrappers of every module's call, as one."""
        return {path: partial(_inside_out, wraps) for path, wraps in self.wraps.items()}

    def error(self, path: str, text: str) -> ValueError:
        return ValueError(f"tensor_parallel: {path}: {text}")

    def cut_of(self, leaf: str) -> Cut | None:
        """The cut of a stored leaf: of the module, or of an adapter beside a linear layer."""
        base = re.sub(r"\.lora_([AB]\.weight|magnitude_vector)$", ".weight", leaf)
        cut = self.cuts.get(base)
        if base == leaf or cut is None:
            inside = any(leaf.startswith(s + ".") for s in self.core.sites)
            return SUMMED if cut is None and self.sequence and inside else cut
        if not cut.ranges:
            return cut
        by_output = cut.dim == self._output_dim(base.removesuffix(".weight"))
        if by_output == leaf.endswith(".lora_A.weight"):  # B and a magnitude have the outputs, A the inputs
            return SUMMED  # every rank has a part of the work that it does
        return attrs.evolve(cut, dim=0 if by_output else 1)

    def rows(self, leaves: Iterable[str]) -> dict[str, Axis]:
        """The weights among `leaves` that are split by inputs and have a magnitude, which is that of whole rows."""
        names = set(leaves)
        weights = [k for k in names if f"{k.removesuffix('.weight')}.lora_magnitude_vector" in names]
        return {k: self.axis for k in weights if (cut := self.cuts.get(k)) is not None and cut.ranges and cut.dim != self._output_dim(k.removesuffix(".weight"))}  # fmt: skip

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
        self._wrap(path, partial(calls.gathered, self.core, self.axis, path, cut.sizes()))

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
        sizes = self._cut_row(path).sizes()
        if path in self.modules:
            self._wrap(path, partial(calls.row, self.core, self.axis, self.sequence, path, sizes[self.axis.rank]))

    def row_split(self, path: str) -> None:
        self.row(path)
        sizes = self._cut_row(path).sizes()
        self._wrap(
            path, lambda apply: lambda leaves, x: apply(leaves, collectives.split(x, self.axis, dim=-1, sizes=sizes))
        )

    def embedding(self, path: str) -> None:
        leaf = self.core.first_name(f"{path}.weight")
        if self.modules[path].max_norm is not None:
            raise self.error(path, "an embedding with max_norm writes to its weight; leave it out of the plan")
        words = self._even(path, self.shapes[leaf][0])
        self._set(leaf, Cut(0, scaled(words, 1)))
        self._wrap(
            path, partial(calls.embedding, self.core, self.axis, path, words[self.axis.rank], self.shapes[leaf][0])
        )

    def embedding_column(self, path: str) -> None:
        leaf = self.core.first_name(f"{path}.weight")
        cut = Cut(1, scaled(self._even(path, self.shapes[leaf][1]), 1))
        self._set(leaf, cut)
        self._wrap(
            path,
            lambda apply: (
                lambda leaves, ids: collectives.join(apply(leaves, ids), self.axis, dim=-1, sizes=cut.sizes())
            ),
        )

    def experts(self, path: str) -> None:
        if getattr(self.modules[path], "is_transposed", False):
            raise self.error(
                path,
                "experts with transposed weights [in, out] are not supported; leave them out of a plan of your own",
            )
        self._wrap(path, partial(calls.experts, self.axis))

    def partial(self, path: str) -> None:
        for key in registries(self.modules[path])[0]:
            self._set(self.core.first_name(f"{path}.{key}"), SUMMED)

    def replicate(self, path: str) -> None:
        if path in self.modules and self._is_linear(path):
            self._wrap(path, partial(calls.whole, self.axis, path, self._inputs(path)))

    # --- helpers of the styles ---

    def _check_style(self, path: str, style: str, styles: Mapping[str, str]) -> None:
        if path not in self.modules and (
            style not in _OF_PARAMETERS or styles.get(path.rpartition(".")[0]) != "experts"
        ):
            raise self.error(
                path, f"{style!r} of a parameter by itself is for experts; name the layer, {path.rpartition('.')[0]!r}"
            )
        if style in ("embedding", "embedding_column", "heads") and not isinstance(self.modules[path], nn.Embedding):
            raise self.error(path, f"{style!r} is for an nn.Embedding, not a {type(self.modules[path]).__name__}")
        inside = any(path.startswith(s + ".") for s in self.core.sites)
        if self.sequence and inside and style not in _ALONG_SEQUENCE:
            raise self.error(path, f"style {style!r} does not work on a part of the sequence; use sequence=False")

    def _set(self, leaf: str, cut: Cut) -> None:
        if self.cuts.setdefault(leaf, cut) != cut:
            raise self.error(
                leaf, "two layers share this weight, and the plan splits them in different ways; give both one style"
            )

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

    def _inputs(self, path: str) -> int:
        """Input features of a linear layer."""
        leaf, out = self._weight(path)
        return self.shapes[leaf][1 - out]

    def _is_linear(self, path: str) -> bool:
        return isinstance(self.modules[path], nn.Linear) or self._output_dim(path) == 1

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
        if hasattr(self.modules[path], "nf"):  # transformers' Conv1D keeps its number of output features
            self._wrap(path, partial(calls.with_values, self.core, path, {"nf": cut.sizes()[self.axis.rank]}))
        if listed:
            self.columns.append(path)

    def _cut_row(self, path: str) -> Cut:
        leaf, out = self._weight(path)
        dim = out + 1 if path not in self.modules else 1 - out
        size, heads = self.shapes[leaf][dim], self._heads(path)
        ranges = (
            scaled(self._even(path, size), 1)
            if heads is None
            else scaled(heads.queries, self._query_unit(path, size, heads))
        )
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
            raise self.error(
                path,
                "the number of heads is not known (no transformers configuration, or not in an attention module); use style 'column'",
            )
        return heads

    def _tied_embeddings(self, styles: Mapping[str, str]) -> None:
        """An embedding whose weight is split by words for another layer looks up in a part of it."""
        for path, m in self.modules.items():
            if (
                isinstance(m, nn.Embedding)
                and path not in styles
                and self.core.first_name(f"{path}.weight") in self.cuts
            ):
                self.embedding(path)

    def _check_neighbours(self, styles: Mapping[str, str]) -> None:
        """A parameter among column layers that the plan does not name (a norm of each head) would get a part of its gradient only."""
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in self.columns):
            for path in self._owners(parent):
                if path not in styles and not any(s.startswith(path + ".") for s in styles):
                    raise self.error(
                        path,
                        f"the plan splits layers of {parent} and does not say what becomes of this {type(self.modules[path]).__name__}; add {path!r}: 'partial' if it works on what they make, 'replicate' if on what goes into them",
                    )

    def _check_pairs(self, styles: Mapping[str, str]) -> None:
        """What column layers split stays so until row layers sum it: a block, and what is outside of blocks, has both or neither."""
        of: dict[str, dict[str, str]] = {}  # by block, a layer of each kind
        for path, style in styles.items():
            kind = "columns" if style in _COLUMNS else "rows" if style in ("row", "row_split") else style
            if path in self.modules:
                of.setdefault(next((s for s in self.core.sites if path.startswith(s + ".")), ""), {}).setdefault(kind, path)  # fmt: skip
        for block, found in of.items():
            where = f"of {block}" if block else "outside of the model's blocks"
            if "columns" in found and "rows" not in found:
                raise self.error(found["columns"], f"its output stays split, as the plan has no 'row' layer {where}; add one behind it, or name this one 'column_gather'")  # fmt: skip
            if "rows" in found and "columns" not in found and styles[found["rows"]] == "row":
                raise self.error(found["rows"], f"its input is whole, as the plan has no 'column' layer {where}; add one before it, or name this one 'row_split'")  # fmt: skip

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
            if (heads := self._heads(path)) is not None:
                self.attention.setdefault(parent, heads)
            if self.sequence:
                entered[parent if self._is_region(parent, styles) else path] = None
            else:
                self._wrap(path, partial(calls.column, self.axis, path, self._inputs(path)))
        for path in entered:
            self._wrap(path, partial(calls.gathered_input, self.axis))

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
            return calls.without_hidden_states(apply) if self.sequence else apply
        if not self.sequence:
            return calls.shared(apply)
        first, last = site == self.core.sites[0], site == self.core.sites[-1]
        return partial(calls.along_sequence, self.axis, first, last, apply)


def _inside_out(wraps: list[Wrap], apply: Apply) -> Apply:
    for wrap in wraps:
        apply = wrap(apply)
    return apply
