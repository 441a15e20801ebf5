"""Optimizers whose state, and whose parameters, are in a store: `streamed`."""

import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import optree
import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator
from fds.layout import Part
from fds.offload import handles
from fds.offload.handles import SHAPE, Window
from fds.optim.base import Member, Norm, Optimizer, check_like, guarded_step

_STREAMS: "weakref.WeakValueDictionary[int, Stream]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def streamed(tx: Optimizer, store: Any, *, window: int = 2, min_bytes: int = 2**16) -> Optimizer:
    """Keep the state of `tx` in a store, and update leaf by leaf: what `tx` needs of a leaf is read ahead, what it changed is written behind.

    Parameters may be tensors or handles (`fds.offload`), whose gradients are in a store as well. At most `window` leaves are on their way
    in and as many out, so that memory does not grow with the model. A step does not wait for its last writes: the next one does, and is told
    of an error. Leaves are visited forwards and backwards in turn, so that the last `window` of a step are there when the next begins, and
    a `FileStore` with a `budget` finds what it kept.

    Parameters of less than `min_bytes` (biases, norms) are updated together, and their state stays in memory: a file each would cost more time
    than it saves memory.

    `tx` has to treat leaves independently, apart from the norm that it is given; all rules of `fds.optim` do. A `sharded` one goes outside; its
    shards are one leaf, which no window can cut: with `fds.shard` each site is one.

    Law: bitwise the steps of `tx` (a leaf here is a site's flat buffer where parameters are offloaded: a norm is summed in another order).
    A state is spent by the next step. `ValueError` for a `tx` that is sharded, and for `update`, which has no way to say where parameters go.
    """
    if tx.axis is not None:
        raise ValueError("streamed: a sharded optimizer inside; turn it round: sharded(streamed(tx, store), axis)")
    if window < 0 or min_bytes < 0:
        raise ValueError(f"streamed: window={window!r}, min_bytes={min_bytes!r}, required >= 0")
    stream = Stream(tx, Window(store, max(window, 1)), window, min_bytes)

    def update(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> Any:
        raise ValueError(
            "streamed: no updates to add: parameters may be in a store; use fds.train_step, or tx.step(...)"
        )

    return Optimizer(stream.init, update, step=stream, stream=stream, members=stream.members)


@attrs.frozen
class _Part:
    """Leaves that are updated together: their numbers, and how many tensors their state has, from the flat state's `start` on."""

    leaves: list[int]
    start: int
    size: int


class Stream:
    """The optimizer's `step`."""

    def __init__(self, tx: Optimizer, window: Window, ahead: int, min_bytes: int) -> None:
        self.tx, self.window, self.ahead, self.min_bytes = tx, window, ahead, min_bytes
        self.number = next(_NUMBERS)
        self.backwards = False
        self.kept: OrderedDict[int, dict[str, tuple[Any, Tensor]]] = (
            OrderedDict()
        )  # by part: tensors by key, with their references
        self.likes: dict[int, Any] = {}
        _STREAMS[self.number] = self

    def groups(self, leaves: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of leaves that are updated together: the small ones first, then each of the others."""
        small = [i for i, p in enumerate(leaves) if not handles.may_be_handle(p) and p.nbytes < self.min_bytes]
        return [*([small] if small else []), *([i] for i in range(len(leaves)) if i not in set(small))]

    def init(self, params: Any) -> list[Any]:
        """For each group the state of `tx`: with handles in place of tensors of one dimension and more, but for the small leaves."""
        leaves = optree.tree_leaves(params)
        return [self._init_group([leaves[i] for i in g]) for g in self.groups(leaves)]

    def _init_group(self, leaves: list[Tensor]) -> Any:
        full = self.tx.init([handles.read(p) if handles.is_handle(p) else p for p in leaves])
        if not self.is_away(leaves):
            return full

        def away(t: Tensor) -> Tensor:
            if not t.dim():
                return t
            if t.is_meta:
                return torch.empty(SHAPE, dtype=torch.float64, device="meta")
            return handles.hold(self.window, "state", t)

        state = tree.map(away, full)
        self.window.settle()
        return state

    def members(self, params: Any) -> list[Member]:
        """Each group's state, with the window of those that are in the store."""
        parts: list[Part] = optree.tree_leaves(params)
        groups = [[parts[i] for i in g] for g in self.groups([p.stored for p in parts])]
        away = [self.window if self.is_away([p.stored for p in g]) else None for g in groups]
        return [Member((i,), "", self.tx, g, window=w) for i, (g, w) in enumerate(zip(groups, away, strict=True))]

    def is_away(self, leaves: Sequence[Tensor]) -> bool:
        """Whether the state of a group is in the store."""
        return any(handles.may_be_handle(p) or p.nbytes >= self.min_bytes for p in leaves)

    def __call__(self, grads: Any, state: list[Any], params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, list[Any]]:  # fmt: skip
        leaves, spec = optree.tree_flatten(params)
        check_like(grads, params)
        inner, sizes = tree.flat(state), [len(tree.flat(s)) for s in state]
        if not donated:
            leaves, inner = [t.clone() for t in leaves], [t.clone() for t in inner]
        _STEP(self.number, tree.leaves(grads), inner, sizes, leaves, norm(grads), ok, donated)
        return optree.tree_unflatten(spec, leaves), tree.rebuild(state, iter(inner))

    def run(self, grads: list[Tensor], inner: list[Tensor], sizes: list[int], leaves: list[Tensor], norm: Tensor, ok: Tensor, donated: bool) -> None:  # fmt: skip
        starts = itertools.accumulate(sizes, initial=0)
        parts = [_Part(*each) for each in zip(self.groups(leaves), starts, sizes, strict=False)]
        away = [p for p in leaves if handles.is_handle(p)]
        if not bool(ok):
            for p, g in zip(leaves, grads, strict=True):
                if handles.is_handle(p):
                    handles.drop_gradient(p, g)
            return
        order = list(enumerate(parts))
        work = iter(reversed(order) if self.backwards else order)
        self.backwards = not self.backwards
        coming: deque[tuple[int, _Part, Callable[[], Any]]] = deque()
        try:
            while True:
                while len(coming) <= self.ahead and (job := next(work, None)) is not None:
                    coming.append((*job, self._begin(*job, leaves, grads, inner)))
                if not coming:
                    break
                i, part, wait = coming.popleft()
                self._finish(i, part, leaves, inner, wait(), norm, donated)
        finally:
            for w in {self.window, *(handles.find(p).window for p in away)}:
                w.boundary()

    def _begin(self, i: int, part: _Part, leaves: list[Tensor], grads: list[Tensor], inner: list[Tensor]) -> Callable[[], Any]:  # fmt: skip
        """Begin to read parameters, gradients and state; the function waits for them."""
        kept = self.kept.pop(i, {})

        def reading(t: Tensor) -> Callable[[], Tensor]:
            if not handles.is_handle(t):
                return lambda: t
            held = handles.find(t)
            known = kept.get(held.key)
            if known is not None and known[0] is held.reference:
                handles.waited(held.key, known[0])  # written by now: it may be changed
                return lambda: known[1]
            coming = held.window.begin(held)
            return lambda: handles.waited(held.key, coming)

        def gradient(p: Tensor, g: Tensor) -> Callable[[], Tensor]:
            return handles.take_gradient(p, g) if handles.is_handle(p) else lambda: g

        jobs = [
            [reading(leaves[k]) for k in part.leaves],
            [gradient(leaves[k], grads[k]) for k in part.leaves],
            [reading(t) for t in inner[part.start : part.start + part.size]],
        ]
        return lambda: [[f() for f in job] for job in jobs]

    def _finish(self, i: int, part: _Part, leaves: list[Tensor], inner: list[Tensor], read: list[list[Tensor]], norm: Tensor, donated: bool) -> None:  # fmt: skip
        params, grads, values = read
        if part.size not in self.likes:
            self.likes[part.size] = self.tx.init([p.to("meta") for p in params])
        own = [v.clone() if not v.dim() and not donated else v for v in values]
        yes = torch.ones((), dtype=torch.bool)
        state = tree.rebuild(self.likes[part.size], iter(own))
        new, state = guarded_step(self.tx, grads, state, params, norm=lambda _: norm, ok=yes, donated=donated)
        homes = [*(leaves[k] for k in part.leaves), *inner[part.start : part.start + part.size]]
        kept: dict[str, tuple[Any, Tensor]] = {}
        for home, before, after in zip(homes, [*params, *values], [*new, *tree.flat(state)], strict=True):
            _write(home, before, after)
            if handles.is_handle(home):
                held = handles.find(home)
                kept[held.key] = held.reference, after.detach()
        if kept and self.ahead:
            self.kept[i] = kept
            while len(self.kept) > self.ahead:
                self.kept.popitem(last=False)


def _write(home: Tensor, before: Tensor, after: Tensor) -> None:
    """`after` in the place of `home`: the handle of a new generation in its numbers, or the tensor itself."""
    if handles.is_handle(home):
        home.detach().copy_(handles.rewrite(home, after.detach()))
    elif after is not home:
        home.detach().copy_(after)


def _run(number: int, grads: list[Tensor], state: list[Tensor], sizes: list[int], params: list[Tensor], norm: Tensor, ok: Tensor, donated: bool) -> None:  # fmt: skip
    with torch.no_grad():
        _STREAMS[number].run(grads, state, sizes, params, norm, ok, donated)


_STEP = opaque_operator(
    "streamed_step",
    "(int number, Tensor[] grads, Tensor(a!)[] state, int[] sizes, Tensor(b!)[] params, Tensor norm, Tensor ok, bool donated) -> ()",
    _run,
)
