"""The train step: a pure function ``(state, batch) -> (state, metrics)``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from fds import losses, tree
from fds.compiling import traced
from fds.frame import scoped, with_updates
from fds.grad import value_and_grad
from fds.layout import whole
from fds.leaves import Handed
from fds.loss_scale import DynamicLossScale, LossScale, as_loss_scale, unscaled
from fds.lowering import lowered
from fds.offload.handles import SCALED as scaled_handle
from fds.offload.handles import SQUARE as square_of_handle
from fds.optim import Optimizer
from fds.optim.base import chosen, guarded_step
from fds.program import Axis, Program, in_mesh_order
from fds.randomness import fold
from fds.transform import Split, Transform
from fds.tree import Params, Stored

Batch = Mapping[str, Tensor]
Loss = Callable[[Program, Any, Any], Tensor | tuple[Tensor, dict[str, Tensor]]]


class NonFiniteError(ValueError):
    """The loss or a gradient was not finite, and `on_nonfinite` says "raise"."""


class TrainState(NamedTuple):
    """All that a step carries on: a tree of tensors."""

    params: Stored  # stored parameters and buffers
    optimizer: Any
    step: Tensor  # 0-D int64: calls so far, skipped ones included
    rng: Tensor  # 0-D int64: the seed of all dropout
    skipped: Tensor  # 0-D int64: steps left out because something was not finite
    loss_scale: Any = ()  # the state of a dynamic loss scale; empty without one


@attrs.frozen(eq=False)
class TrainStep:
    """See `train_step`."""

    program: Program
    tx: Optimizer
    loss: Loss
    microbatches: int
    on_nonfinite: str
    seed: int
    hold: Axis | None
    loss_scale: LossScale | None = None
    region: Callable[..., tuple[list[Tensor], dict[str, Any]]] = attrs.field(init=False, repr=False)
    over: Callable[..., dict[str, Any]] = attrs.field(init=False, repr=False)  # writes the new state over the old
    spec: TrainState = attrs.field(init=False, repr=False)  # the abstract state: meta tensors

    def __attrs_post_init__(self) -> None:
        # Lists and dictionaries only at the border of the traced region: Dynamo cannot build named tuples there (torch 2.13).
        def region(leaves: list[Tensor], batch: Batch) -> tuple[list[Tensor], dict[str, Any]]:
            state, metrics = _step(self, tree.rebuild(self.spec, iter(leaves)), batch, donated=False)
            return tree.flat(state), metrics

        def over(leaves: list[Tensor], batch: Batch) -> dict[str, Any]:
            state, metrics = _step(self, tree.rebuild(self.spec, iter(leaves)), batch, donated=True)
            for old, new in zip(leaves, tree.flat(state), strict=True):
                if new is not old:
                    old.copy_(new)  # inside the graph: Inductor writes in place, no second copy of the state exists
            return metrics

        object.__setattr__(self, "region", traced(region))
        object.__setattr__(self, "over", traced(over))
        object.__setattr__(self, "spec", self._state(self.program.spec))

    def init(self, params: Mapping[str, Tensor]) -> TrainState:
        """The state before the first step, from logical parameters. Its tensors are its own: `params` may be thrown away or kept."""
        given = Handed(params)
        stored = self.program.place(given)
        with torch.no_grad():
            for part in stored.values():  # leaf by leaf, so that what was read or made site by site is not there twice
                for k, t in part.items():
                    part[k] = t.clone() if t.is_meta or given.shares(t) else t.detach()
        return self._state(stored)

    def _state(self, stored: Stored) -> TrainState:
        zero = torch.zeros((), dtype=torch.int64)
        scale = () if self.loss_scale is None else self.loss_scale.init()
        optimizer = self.tx.init(self.program.trainable(stored))
        return TrainState(stored, optimizer, zero, zero + self.seed, zero.clone(), scale)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        if torch.compiler.is_compiling():
            new, metrics = self.region(tree.flat_as(self.spec, state, what="state"), batch)
            return tree.rebuild(self.spec, iter(new)), metrics
        new, metrics = lowered(self.region)(self.check(state, batch), batch)
        return self.report(tree.rebuild(self.spec, iter(new)), metrics)

    @property
    def data_axes(self) -> tuple[Axis, ...]:
        """The axes over which ranks see different rows: the program's, and that of a sharded optimizer."""
        return in_mesh_order([*self.program.data_axes, *([self.tx.axis] if self.tx.axis is not None else [])])

    @property
    def reductions(self) -> tuple[Transform, ...]:
        """The transformations that the step does its own way, once for all microbatches: no lens comes after them, so that what they gather is
        what is stored, and what they reduce its gradients. Last one first."""
        found: list[Transform] = []
        for t in reversed(self.program.history):
            if t.reduction is not None and (t.hold is None or self.hold in t.axes):
                found.append(t)
            if t.rewrite is not None or (t.lens is not None and (t.reduction is None or t.hold is not None)):
                break
        return tuple(found)

    @property
    def deferred(self) -> tuple[Axis, ...]:
        """The axes of `reductions`: calls of the program leave the work over them to the step (`Frame.deferred`)."""
        return tuple(a for t in self.reductions for a in t.axes)

    def scale(self, state: TrainState) -> Tensor | None:
        """What the next loss is multiplied by; None: nothing."""
        return None if self.loss_scale is None else self.loss_scale.scale(state.loss_scale)

    def check(self, state: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """The leaves of `state`. `ValueError` for a state of another program, a donated state, or a batch that does not divide."""
        if not isinstance(state, TrainState):
            raise ValueError(
                f"train step: state is {type(state).__name__}, required the TrainState that step.init(params) or the last step returned"
            )
        tree.check_like(state.params, self.program.spec, what="the state")
        leaves, rest = tree.flat_as(self.spec, state, what="state"), tree.flat(self.spec[1:])
        for spec, leaf in zip(rest, leaves[-len(rest) :], strict=True):
            tree.check_leaf("a leaf of the optimizer's state", leaf, spec, what="the state")
        for name, x in batch.items():
            if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] % self.microbatches or not x.shape[0]:
                got = f"{x.shape[0]} rows" if isinstance(x, Tensor) and x.dim() else repr(x)
                raise ValueError(
                    f"batch[{name!r}]: {got} do not divide into {self.microbatches} microbatches; change the batch or microbatches="
                )
        return leaves

    def report(self, state: TrainState, metrics: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """`state` and `metrics` as they are; with ``on_nonfinite="raise"``, an error for a step that was skipped, but for what a scale can mend."""
        if self.on_nonfinite == "raise" and bool(metrics["was_skipped"]) and not self._mended(metrics):
            leaves = [k for k, bad in metrics["nonfinite"].items() if bool(bad)]
            scale = f", at a loss scale of {float(metrics['loss_scale']):g}" if self.loss_scale is not None else ""
            raise NonFiniteError(
                f"step {int(state.step) - 1}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}{scale}; not finite: {', '.join(leaves) or 'the loss'}; the parameters are unchanged; lower the learning rate, or on_nonfinite='skip'"
            )
        return state, metrics

    def _mended(self, metrics: dict[str, Any]) -> bool:
        """Whether a lower loss scale may be all that is missing."""
        dynamic = self.loss_scale is not None and self.loss_scale.dynamic
        return dynamic and not bool(metrics["scale_at_minimum"]) and bool(torch.isfinite(metrics["loss"]))


def train_step(
    program: Program,
    tx: Optimizer,
    *,
    loss: Loss = losses.causal_lm,
    microbatches: int = 1,
    on_nonfinite: str = "skip",
    seed: int = 0,
    hold: Axis | None = None,
    loss_scale: DynamicLossScale | float | None = None,
) -> TrainStep:
    """A pure train step: ``step.init(params) -> state``, ``step(state, batch) -> (state, metrics)``. Compile it with `fds.compile`.

    Args:
        program: what to train, with its transformations; `tx` updates its trainable leaves.
        loss: ``loss(program, stored, batch) -> scalar`` or ``(scalar, dict of 0-D metrics)``. A mean over rows is averaged over microbatches
            and ranks; a loss with a `weight(batch)`, as `losses.causal_lm` has, gives the exact mean over the global batch's terms. Its
            further metrics are averaged in the same way.
        microbatches: parts that a batch's rows are cut into; gradients are summed over them.
        on_nonfinite: "skip" a step whose loss or gradient is not finite (counted in ``metrics["skipped"]``, parameters and optimizer
            unchanged), or "raise" `NonFiniteError`.
        seed: of all dropout; masks depend on it, the step, and the row's place in the global batch.
        hold: the axis of a `shard` that is the last transformation to change what is stored: its gathers and reductions are done once per
            step, not in every microbatch, for the memory of what it gathers and of its gradients. The loss sees `stored` gathered.
        loss_scale: for float16: a number, or `DynamicLossScale`, that the loss is multiplied by before differentiation. Gradients are summed and
            reduced multiplied, and divided again in float32, before norm, clipping and update; a dynamic scale is lowered by steps that
            overflow, and "raise" then raises only what a lower scale cannot mend: at its minimum, or where the loss itself is not finite.

    metrics: ``loss`` (global mean) and ``grad_norm`` (0-D float32; of `optim.onebit_adam` and its like the root mean square over ranks), ``skipped`` (0-D int64, total),
    ``was_skipped`` (0-D bool), ``nonfinite`` ({leaf: 0-D bool}), and what the loss added. With `loss_scale`: ``loss_scale``, of this step (0-D float32); if it is dynamic,
    ``scale_at_minimum``: this step overflowed, and the scale cannot be lowered any more (0-D bool).

    Law: n ranks or microbatches follow one process on the global batch.
    """
    if microbatches < 1:
        raise ValueError(f"train_step: microbatches={microbatches}, required >= 1")
    if on_nonfinite not in ("skip", "raise"):
        raise ValueError(f"train_step: on_nonfinite={on_nonfinite!r}; {tree.suggest(on_nonfinite, ['skip', 'raise'])}")
    if not any(x.requires_grad for x in tree.named(program.spec).values()):
        raise ValueError(
            "train_step: the program has no trainable leaf (after fuse_lora, or all frozen); train the program before fusing"
        )
    if tx.axis is not None and (tx.axis in program.data_axes or any(p.axes for p in program.sites.values())):
        raise ValueError(
            f"train_step: optim.sharded over {tx.axis!r} is for parameters that every rank holds whole; this program's {list(program.history)} reduces its gradients already; pass the optimizer without sharded()"
        )
    if tx.stream is None:
        away = [tree.qualified(s, k) for s, p in program.sites.items() for k in p.handles if p.spec[k].requires_grad]
        if away:
            raise ValueError(
                f"train_step: the parameters behind {away[0]!r} are in a store, and this optimizer would update their handles; use optim.streamed(tx, store)"
            )
    if tx.whole and (cut := _cut(program)):
        raise ValueError(
            f"train_step: the parameters in {cut!r} are parts of leaves, or several of them, and this optimizer (LAMB, Muon, a partition) looks at whole ones by name; split its state instead: optim.sharded(tx, axis), without shard, offload or tensor_parallel"
        )
    scaling = as_loss_scale(loss_scale)
    fed_back = [tree.qualified(s, k) for s, p in program.sites.items() for k in p.carries]
    if fed_back and scaling is not None and scaling.dynamic:
        raise ValueError(
            f"train_step: {fed_back[0]!r} is an error of gradients as they were scaled, and loss_scale={loss_scale!r} changes their scale; give a number, or quantized(...) without feedback="
        )
    step = TrainStep(program, tx, loss, microbatches, on_nonfinite, seed, hold, scaling)
    if hold is not None and not any(t.hold is not None for t in step.reductions):
        raise ValueError(
            f"train_step: hold={hold!r}, required the axis of a shard that no other lens comes after; this program has {list(program.history)}; the order that works: chain(..., shard({hold!r}))"
        )
    return step


def _cut(program: Program) -> str:
    """A trainable stored leaf that is not one logical leaf as it is; empty if there is none."""
    for s, p in program.sites.items():
        held = None if p.layout is None else p.layout.boxes
        for k, leaf in p.spec.items():
            plain = held is None or k not in held or held[k] == whole(k, leaf.shape)
            if leaf.requires_grad and (k in p.handles or k in p.axes or not plain):
                return tree.qualified(s, k)
    return ""


def _step(step: TrainStep, state: TrainState, batch: Batch, donated: bool) -> tuple[TrainState, dict[str, Any]]:
    value, local, updates, aux = _accumulate(step, state, batch, step.scale(state))
    return apply_gradients(step, state, value, local, updates, aux, donated=donated)


def apply_gradients(
    step: TrainStep,
    state: TrainState,
    value: Tensor,
    local: Stored,
    updates: Stored,
    aux: Mapping[str, Tensor],
    *,
    donated: bool,
) -> tuple[TrainState, dict[str, Any]]:
    """The second half of a step, of what all microbatches gave: the loss, this rank's gradients (taken apart), new buffers and further metrics.

    Who has made the gradients by another way than ``step.loss`` goes on here. They are of calls under ``scoped(deferred=step.deferred)``, and of
    losses times ``step.scale(state)``.
    """
    program, tx, scaling, scale = step.program, step.tx, step.loss_scale, step.scale(state)
    grads = _reduced(step, local)
    old = program.trainable(state.params)
    if scale is not None:
        grads = _unscaled(step, grads, old, 1 / scale)
    squares = _squares(step, grads, old)
    names, by_leaf = _by_leaf(step, local, squares)
    del local
    norm = squares[1].sum().sqrt()
    ok = torch.isfinite(value) & torch.isfinite(norm)

    def norm_of(g: Any) -> Tensor:  # what a chain has scaled before has another norm
        return norm if g is grads else _squares(step, g, old)[1].sum().sqrt()

    trained, optimizer = guarded_step(tx, grads, state.optimizer, old, norm=norm_of, ok=ok, donated=donated)
    buffers = {s: chosen(ok, part, {k: state.params[s][k] for k in part}) for s, part in updates.items()}
    params = {
        s: {k: trained[s].get(k, buffers.get(s, {}).get(k, v)) for k, v in part.items()}
        for s, part in state.params.items()
    }
    skipped, bad = state.skipped + ~ok, ~torch.isfinite(by_leaf)
    if scaling is not None:
        bad &= (
            ~ok
        )  # a sharded optimizer's leaves are looked at as they are scaled: their squares may be too large, and they not
    metrics: dict[str, Any] = {
        "loss": value,
        "grad_norm": norm,
        "skipped": skipped.clone(),
        "was_skipped": ~ok,
        "nonfinite": dict(zip(names, bad.unbind(), strict=True)),
    }
    scaled = state.loss_scale
    if scaling is not None and scale is not None:
        metrics["loss_scale"] = scale.clone()  # the state's own number is written over, where it is donated
        scaled = scaling.update(scaled, ~ok)
        if scaling.dynamic:
            metrics["scale_at_minimum"] = ~ok & scaling.at_minimum(state.loss_scale)
    state = TrainState(params, optimizer, state.step + 1, state.rng.clone(), skipped, scaled)
    if taken := metrics.keys() & aux.keys():
        raise ValueError(f"train_step: the loss returned a metric {min(taken)!r}, a name of the step's own; rename it")
    return state, {**metrics, **aux}


def _accumulate(step: TrainStep, state: TrainState, batch: Batch, scale: Tensor | None) -> tuple[Tensor, Stored, Stored, dict[str, Tensor]]:  # fmt: skip
    """Loss, gradients, updated buffers and further metrics of all microbatches; each microbatch's part is weighed so that the sum is the mean.

    The gradients are those of the loss times `scale`.
    """
    m, axes = step.microbatches, step.data_axes
    parts = [{k: x.chunk(m)[i] for k, x in batch.items()} for i in range(m)]
    shares = _shares(step, parts)
    seed, block = fold(state.rng, state.step), block_of(axes)
    value, grads, updates, aux = torch.zeros(()), None, dict[str, Params](), dict[str, Tensor]()
    held, carried = _held(step, state.params), dict[str, Params]()
    for i, part in enumerate(parts):
        params = {s: {**leaves, **updates.get(s, {}), **carried.get(s, {})} for s, leaves in held.items()}
        with scoped(seed=seed, block=block * m + i):
            (_, (v, extra, new)), g = value_and_grad(_with_aux(step, shares[i], scale), has_aux=True, wrt=step.program)(
                params, part
            )
        carried = step.program.carry(params, g)
        g = step.program.trainable(g)  # frozen leaves' zeros take no memory until they are added
        grads = g if grads is None else tree.map(torch.add, grads, g)
        value, updates = value + v.float(), new or updates
        aux = {k: aux.get(k, 0.0) + x * shares[i] for k, x in extra.items()}
    assert grads is not None
    updates = mean_over(updates, axes)
    kept = {s: {**updates.get(s, {}), **carried.get(s, {})} for s in {**updates, **carried}}
    return mean_over(value, axes), grads, kept, mean_over(aux, axes)


def _with_aux(step: TrainStep, share: Tensor | float, scale: Tensor | None) -> Callable[..., Any]:
    """``f(stored, batch) -> (what to differentiate, (its value unscaled, further metrics, updated buffers))``."""

    def f(stored: Stored, batch: Batch) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor], Stored]]:
        out: Tensor | tuple[Tensor, dict[str, Tensor]]
        with scoped(deferred=step.deferred):
            out, updates = with_updates(step.loss)(step.program, stored, batch)
        value, extra = out if isinstance(out, tuple) else (out, {})
        value = value * share
        return value if scale is None else scaled_by(value, scale), (value, extra, updates)

    return f


def scaled_by(value: Tensor, scale: Tensor) -> Tensor:
    """A loss times the scale, in float32: its product may be more than float16 holds."""
    return (value.float() if value.element_size() < 4 else value) * scale.to(value.device)


def _unscaled(step: TrainStep, grads: Any, params: Stored, inverse: Tensor) -> Any:
    """Gradients of the loss itself. `grads` is taken apart leaf by leaf, so that they take the place of the others."""
    if step.tx.axis is not None:
        return {k: unscaled(grads.pop(k), inverse) for k in list(grads)}

    def one(s: str, k: str, g: Tensor) -> Tensor:
        return scaled_handle(params[s][k], g, inverse) if k in step.program.sites[s].handles else unscaled(g, inverse)

    return {s: {k: one(s, k, part.pop(k)) for k in list(part)} for s, part in grads.items()}


def _held(step: TrainStep, stored: Stored) -> Stored:
    """What the microbatches of a step are called with."""
    sites = step.program.sites
    for t in step.reductions:
        if t.hold is not None:
            stored = {s: t.hold(sites[s].axes, part) for s, part in stored.items()}
    return stored


def _reduced(step: TrainStep, local: Stored) -> Any:
    """This rank's gradients as the optimizer takes them, reduced over all ranks: one pass, however many microbatches they are the sum of.

    First over the axis of a sharded optimizer, which leaves less to reduce over the others. Else `local` is taken apart, site by site, so that
    the reduced gradients take the place of the others.
    """

    def reduced(split: Split, grads: Params) -> Params:
        for t in step.reductions:
            grads = t.reduction(split, grads) if t.reduction is not None else grads
        return grads

    if step.tx.axis is not None:
        return reduced({}, step.tx.reduce(local))
    sites = step.program.sites
    return step.tx.reduce({s: reduced(sites[s].axes, local.pop(s)) for s in list(local)})


def _shares(step: TrainStep, parts: Sequence[Batch]) -> list[Tensor | float]:
    """What each microbatch's mean counts for in this rank's mean, such that the mean over ranks is that over all terms."""
    weigh = getattr(step.loss, "weight", None)
    if weigh is None:
        return [1.0 / len(parts)] * len(parts)
    weights = torch.stack([weigh(p) for p in parts]).float()
    total, ranks = weights.sum(), 1
    for a in step.data_axes:
        total, ranks = a.sum(total), ranks * a.size
    return list((weights * ranks / total.clamp(min=1)).unbind())


def block_of(axes: tuple[Axis, ...]) -> int:
    """This rank's place among those that see different rows."""
    block = 0
    for a in axes:
        block = block * a.size + a.rank
    return block


def mean_over(x: Any, axes: tuple[Axis, ...]) -> Any:
    """Mean of the floating leaves over the data axes (buffers as integer counts are the same everywhere)."""
    for a in axes:
        x = tree.map(lambda t, a=a: a.sum(t) / a.size if t.is_floating_point() else t, x)
    return x


def _squares(step: TrainStep, grads: Any, params: Stored) -> tuple[list[str], Tensor]:
    """Names of the gradient's leaves, and the sum of squares of each, over all the ranks it is split over: [leaves] float32."""
    if step.tx.axis is not None:
        names, sums = _summed(grads, dict.fromkeys(grads, (step.tx.axis,)))
        return names, sums / step.tx.axis.size if step.tx.local else sums
    sites = step.program.sites
    split = {s: {k: sites[s].axes.get(k, ()) for k in part} for s, part in grads.items()}
    away = {tree.qualified(s, k): params[s][k] for s, part in grads.items() for k in part if k in sites[s].handles}
    return _summed(tree.named(grads), tree.named(split), away)


def _by_leaf(step: TrainStep, local: Stored, squares: tuple[list[str], Tensor]) -> tuple[list[str], Tensor]:
    """`squares` under the names of leaves: a sharded optimizer has flat buffers, so there the ranks' own gradients are looked at."""
    if step.tx.axis is None:
        return squares
    leaves, axes = tree.named(local), (step.tx.axis, *(a for t in step.reductions for a in t.axes))
    return _summed(leaves, dict.fromkeys(leaves, axes))


def _summed(leaves: Mapping[str, Tensor], over: Mapping[str, tuple[Axis, ...]], away: Mapping[str, Tensor] | None = None) -> tuple[list[str], Tensor]:  # fmt: skip
    """The sum of squares of every leaf, over its axes; one small reduction per set of axes. `away`: the parameters of those that are handles.

    One vector all the way: a stack of many scalars took Inductor a hundred seconds to compile (57 leaves, torch 2.13).
    """
    names: list[str] = []
    sums: list[Tensor] = []
    away = away or {}
    for axes in dict.fromkeys(over.values()):
        here = [k for k in leaves if over[k] == axes and k not in away]
        there = [k for k in leaves if over[k] == axes and k in away]
        keys = here + there
        parts = [tree.square_sums([leaves[k] for k in here])] if here else []
        part = torch.cat([*parts, *(square_of_handle(away[k], leaves[k]) for k in there)])
        for a in axes:
            part = a.sum(part)
        names, sums = names + keys, [*sums, part]
    return names, torch.cat(sums)
