"""Optimizers whose state, and whose parameters, are in a store: `streamed`."""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator
from fds.offload import handles
from fds.offload.handles import SHAPE, Window
from fds.optim.base import Norm, Optimizer, check_like, guarded_step

_STEPS: "weakref.WeakValueDictionary[int, _Stream]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def streamed(tx: Optimizer, store: Any, *, window: int = 2) -> Optimizer:
    """Keep the state of `tx` in a store, and update leaf by leaf: what `tx` needs of a leaf is read ahead, what it changed is written behind.

    Parameters may be tensors or handles (`fds.offload`), whose gradients are in a store as well. At most `window` leaves are on their way
    in and as many out, so that memory does not grow with the model.

    `tx` has to treat leaves independently, apart from the norm that it is given; all rules of `fds.optim` do. A `sharded` one goes outside.

    Law: bitwise the steps of `tx` (a leaf here is a site's flat buffer where parameters are offloaded: a norm is summed in another order).
    A state is spent by the next step. `ValueError` for a `tx` that is sharded, and for `update`, which has no way to say where parameters go.
    """
    if tx.axis is not None:
        raise ValueError("streamed: a sharded optimizer inside; turn it round: sharded(streamed(tx, store), axis)")
    if window < 0:
        raise ValueError(f"streamed: window={window!r}, required >= 0")
    stream = _Stream(tx, Window(store, max(window, 1)), window)

    def update(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> Any:
        raise ValueError(
            "streamed: no updates to add: parameters may be in a store; use fds.train_step, or tx.step(...)"
        )

    return Optimizer(stream.init, update, step=stream)


class _Stream:
    """The optimizer's `step`."""

    takes_handles = True

    def __init__(self, tx: Optimizer, window: Window, ahead: int) -> None:
        self.tx, self.window, self.ahead = tx, window, ahead
        self.number = next(_NUMBERS)
        _STEPS[self.number] = self

    def init(self, params: Any) -> list[Any]:
        """For each parameter the state of `tx`, with handles in place of tensors of one dimension and more."""
        return [self._init_leaf(p) for p in optree.tree_leaves(params)]

    def _init_leaf(self, p: Tensor) -> Any:
        full = self.tx.init(handles.read(p) if handles.is_handle(p) else p)

        def away(t: Tensor) -> Tensor:
            if not t.dim():
                return t
            if t.is_meta:
                return torch.empty(SHAPE, dtype=torch.float64, device="meta")
            return handles.hold(self.window, "state", t)

        state = tree.map(away, full)
        self.window.settle()
        return state

    def __call__(self, grads: Any, state: list[Any], params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, list[Any]]:  # fmt: skip
        leaves, spec = optree.tree_flatten(params)
        check_like(grads, params)
        inner = tree.flat(state)
        if not donated:
            leaves, inner = [t.clone() for t in leaves], [t.clone() for t in inner]
        _STEP(self.number, tree.leaves(grads), inner, leaves, norm(grads), ok, donated)
        return optree.tree_unflatten(spec, leaves), tree.rebuild(state, iter(inner))

    def run(self, grads: list[Tensor], inner: list[Tensor], leaves: list[Tensor], norm: Tensor, ok: Tensor, donated: bool) -> None:  # fmt: skip
        each = len(inner) // max(len(leaves), 1)
        parts = [inner[i * each : (i + 1) * each] for i in range(len(leaves))]
        windows = {self.window, *(handles.find(p).window for p in leaves if handles.is_handle(p))}
        if not bool(ok):
            for p, g in zip(leaves, grads, strict=True):
                if handles.is_handle(p):
                    handles.drop_gradient(p, g)
            return
        work = iter(zip(leaves, grads, parts, strict=True))
        coming: deque[tuple[Any, Callable[[], Any]]] = deque()
        try:
            while True:
                while len(coming) <= self.ahead and (job := next(work, None)) is not None:
                    coming.append((job, self._begin(*job)))
                if not coming:
                    break
                (p, _, state), wait = coming.popleft()
                self._finish(p, state, *wait(), norm, donated)
            for w in windows:
                w.settle()
        finally:
            for w in windows:
                w.boundary()

    def _begin(self, p: Tensor, g: Tensor, state: Sequence[Tensor]) -> Callable[[], Any]:
        """Begin to read a leaf, its gradient and its state; the function waits for them."""

        def reading(t: Tensor) -> Callable[[], Tensor]:
            if not handles.is_handle(t):
                return lambda: t
            held = handles.find(t)
            coming = held.window.begin(held)
            return lambda: handles.waited(held.key, coming)

        gradient = handles.take_gradient(p, g) if handles.is_handle(p) else lambda: g
        jobs = [reading(p), gradient, *map(reading, state)]
        return lambda: [f() for f in jobs]

    def _finish(self, p: Tensor, state: Sequence[Tensor], param: Tensor, grad: Tensor, *rest: Any) -> None:
        *values, norm, donated = rest
        like = self.tx.init(param.to("meta"))
        yes = torch.ones((), dtype=torch.bool)
        own = tree.rebuild(like, iter([v.clone() if not v.dim() and not donated else v for v in values]))
        new, kept = guarded_step(self.tx, grad, own, param, norm=lambda _: norm, ok=yes, donated=donated)
        _write(p, param, new)
        for old, value, after in zip(state, values, tree.flat(kept), strict=True):
            _write(old, value, after)


def _write(home: Tensor, before: Tensor, after: Tensor) -> None:
    """`after` in the place of `home`: the handle of a new generation in its numbers, or the tensor itself."""
    if handles.is_handle(home):
        home.detach().copy_(handles.rewrite(home, after.detach()))
    elif after is not home:
        home.detach().copy_(after)


def _run(number: int, grads: list[Tensor], state: list[Tensor], params: list[Tensor], norm: Tensor, ok: Tensor, donated: bool) -> None:  # fmt: skip
    with torch.no_grad():
        _STEPS[number].run(grads, state, params, norm, ok, donated)


_STEP = opaque_operator(
    "streamed_step",
    "(int number, Tensor[] grads, Tensor(a!)[] state, Tensor(b!)[] params, Tensor norm, Tensor ok, bool donated) -> ()",
    _run,
)
