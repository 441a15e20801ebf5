"""`tensor_parallel`: the linear layers of a model split over ranks, with the collectives that join their work."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs

from fds import tree
from fds.frame import Apply, scoped
from fds.layout import Held
from fds.program import Lens, Program
from fds.sharding.mesh import Axis, check_axis
from fds.sharding.split import Split
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
    check_axis("tensor_parallel", axis)
    if plan is not None and not isinstance(plan, Mapping):
        raise ValueError(f"tensor_parallel: plan={plan!r}, required styles by pattern, as {{'*.up_proj': 'column', '*.down_proj': 'row'}}")  # fmt: skip
    tree.switch("tensor_parallel: sequence", sequence)
    options: dict[str, Any] = {"axis": axis}
    options |= {"plan": dict(plan)} if plan is not None else {}
    options |= {"sequence": True} if sequence else {}
    return _TensorParallel(
        "tensor_parallel",
        tuple(options.items()),
        provides=frozenset(["tensor", "layout"]),
        conflicts=frozenset(["tensor", "flat", "whole"]),
        shared=(axis,),
        axis=axis,
        plan=plan,
        sequence=sequence,
    )


@attrs.frozen(repr=False)
class _TensorParallel(Transform):
    """The transformation with its settings; applied, it is bound to how the program's module is split."""

    axis: Axis = attrs.field(kw_only=True)
    plan: Mapping[str, str] | None = attrs.field(kw_only=True, eq=False)
    sequence: bool = attrs.field(kw_only=True)
    split: Split | None = attrs.field(default=None, kw_only=True, eq=False)

    def __call__(self, program: Program) -> Program:
        core = program.core
        if core is None:
            raise ValueError("tensor_parallel: this program was not made from a module")
        if any(t.name == "adapters" for t in program.history):
            raise ValueError(
                "tensor_parallel: adapters(...) of rows are not split over ranks; give every rank the whole model and rows of its own, or fuse one adapter: fuse_lora()"
            )
        split = Split.of(core, self.axis, self.plan, self.sequence)
        return Transform.__call__(attrs.evolve(self, split=split, lens=partial(_lens, split)), program)

    def _on_site(self, site: str, p: Program) -> Program:
        split, core = self.split, p.core
        assert split is not None and core is not None
        new = super()._on_site(site, p)
        inside = set(core.modules(site))
        new = wrapped_calls(new, {path: w for path, w in split.wrappers().items() if path in inside})
        return attrs.evolve(new, apply=split.around(site, _with_rows(split.rows(p.spec), new.apply)))


def _with_rows(rows: Mapping[str, Axis], apply: Apply) -> Apply:
    """Tell the lenses before this one which weights' rows are split."""
    if not rows:
        return apply

    def run(*args: Any, **kwargs: Any) -> Any:
        with scoped(rows=rows):
            return apply(*args, **kwargs)

    return run


def _lens(split: Split, p: Program) -> Lens | None:
    axis, spec = split.axis, parameters(p)
    cuts = {k: cut for k in spec if (cut := split.cut_of(k)) is not None}
    if not cuts:
        return None
    for k, v in spec.items():
        want = split.shapes.get(k)
        if want is not None and v.shape != want:
            raise ValueError(
                f"tensor_parallel: {k} is stored as {tuple(v.shape)}, required {tuple(want)} as in the module; the order that works: chain(tensor_parallel(...), {p.stack[-1]!r})"
            )

    def put(params: Params) -> Params:
        return {k: cuts[k].take(v, axis.rank) if k in cuts and not cuts[k].whole else v for k, v in params.items()}

    def get(stored: Params) -> Params:
        return {k: cuts[k].used(v, axis) if k in cuts else v for k, v in stored.items()}

    def restore(stored: Params) -> Params:
        return {k: cuts[k].restore(v, axis) if k in cuts else v for k, v in stored.items()}

    def layout(held: Held) -> Held:
        return {k: cuts[k].boxes(held[k], axis.rank) if k in cuts else held[k] for k in spec}

    axes = {k: (*p.axes.get(k, ()), axis) for k, cut in cuts.items() if not cut.whole and axis.size > 1}
    return Lens(put, get, restore=restore, axes=axes, layout=layout)
