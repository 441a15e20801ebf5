"""Optimizers whose state, and whose parameters, are in a store: `streamed`."""

import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import attrs
import optree
import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator
from fds.offload import handles
from fds.offload.handles import SHAPE, Window
from fds.optim.base import Norm, Optimizer, check_like, guarded_step

_STREAMS: "weakref.WeakValueDictionary[int, Stream]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def streamed(tx: Optimizer, store: Any, *, window: int = 2, bucket_bytes: int = 2**24) -> Optimizer:
    """Keep the state of `tx` in a store, and update in buckets: what `tx` needs for one is read ahead, what it changed is written behind.

    A bucket is leaves one after the other until their state has `bucket_bytes`; its state is one buffer for each dtype, read and written at
    once. Parameters may be tensors, or handles (`fds.offload`), whose gradients are in a store as well; each handle is a bucket. At most
    `window` buckets are on their way in and as many out, so that memory does not grow with the model.

    A step does not wait for its last writes: the next one does, and is told of an error. Buckets are visited forwards and backwards in turn,
    so that the last `window` of a step are there when the next update begins, and a `FileStore` with a `budget` finds what it kept.

    `tx` has to treat leaves independently, apart from the norm that it is given; all rules of `fds.optim` do. A `sharded` one goes outside; its
    shards are one leaf, which no bucket cuts: `fds.shard` makes one of each site.

    Law: bitwise the steps of `tx` (a leaf here is a site's flat buffer where parameters are offloaded: a norm is summed in another order).
    A state is spent by the next step. `ValueError` for a `tx` that is sharded, and for `update`, which has no way to say where parameters go.
    """
    if tx.axis is not None:
        raise ValueError("streamed: a sharded optimizer inside; turn it round: sharded(streamed(tx, store), axis)")
    if window < 0 or bucket_bytes < 0:
        raise ValueError(f"streamed: window={window!r}, bucket_bytes={bucket_bytes!r}, required >= 0")
    stream = Stream(tx, Window(store, max(window, 1)), window, bucket_bytes)

    def update(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> Any:
        raise ValueError(
            "streamed: no updates to add: parameters may be in a store; use fds.train_step, or tx.step(...)"
        )

    return Optimizer(stream.init, update, step=stream, stream=stream)


@attrs.frozen(eq=False)
class _Bucket:
    """A bucket of one step: its number, and what of it is in the state: handles by dtype, and the tensors of no dimension."""

    number: int
    params: list[Tensor]
    grads: list[Tensor]
    away: list[Tensor]
    scalars: list[Tensor]

    @property
    def homes(self) -> list[Tensor]:
        return [*self.away, *(p for p in self.params if handles.is_handle(p))]


class Stream:
    """The optimizer's `step`."""

    def __init__(self, tx: Optimizer, window: Window, ahead: int, bucket_bytes: int) -> None:
        self.tx, self.window, self.ahead, self.bucket_bytes = tx, window, ahead, bucket_bytes
        self.number = next(_NUMBERS)
        self.backwards = False
        self.kept: OrderedDict[int, dict[str, tuple[Future[Any], Tensor]]] = OrderedDict()  # the last buckets, by key
        self.likes: dict[tuple[Any, ...], Any] = {}
        _STREAMS[self.number] = self

    def buckets(self, params: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the leaves in each bucket. By shapes and dtypes alone, so that abstract parameters give the same."""
        found: list[list[int]] = []
        room = 0
        for i, p in enumerate(params):
            alone = handles.may_be_handle(p)
            if alone or room <= 0:
                found.append([])
                room = 0 if alone else self.bucket_bytes
            found[-1].append(i)
            room -= 0 if alone else self.state_nbytes([p])
        return found

    def state_nbytes(self, params: Sequence[Tensor]) -> int:
        """Bytes of state in the store."""
        return sum(t.nbytes for t in tree.flat(self.like(params)) if t.dim())

    def like(self, params: Sequence[Tensor]) -> Any:
        """The state of `tx` for such parameters, abstract."""
        kind = tuple((p.shape, p.dtype) for p in params)
        if kind not in self.likes:
            self.likes[kind] = self.tx.init([torch.empty(shape, dtype=d, device="meta") for shape, d in kind])
        return self.likes[kind]

    def init(self, params: Any) -> list[Any]:
        """For each bucket ``([handle of each dtype], state of tx)``, with ``()`` in place of the tensors that the handles stand for."""
        leaves = optree.tree_leaves(params)
        return [self._init_bucket([leaves[i] for i in bucket]) for bucket in self.buckets(leaves)]

    def _init_bucket(self, leaves: list[Tensor]) -> Any:
        full = self.tx.init([handles.read(p) if handles.is_handle(p) else p for p in leaves])
        parts: dict[torch.dtype, list[Tensor]] = {}  # in the order of their first tensors
        for t in tree.flat(full):
            if t.dim():
                parts.setdefault(t.dtype, []).append(t.reshape(-1))
        away = [self._hold(flat) for flat in parts.values()]
        self.window.settle()
        return away, tree.map(lambda t: () if t.dim() else t, full)

    def _hold(self, parts: list[Tensor]) -> Tensor:
        if parts[0].is_meta:
            return torch.empty(SHAPE, dtype=torch.float64, device="meta")
        return handles.hold(self.window, "state", torch.cat(parts))

    def __call__(self, grads: Any, state: list[Any], params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, list[Any]]:  # fmt: skip
        leaves, spec = optree.tree_flatten(params)
        check_like(grads, params)
        inner = tree.flat(state)
        sizes = [n for away, scalars in state for n in (len(away), len(tree.flat(scalars)))]
        if not donated:
            leaves, inner = [t.clone() for t in leaves], [t.clone() for t in inner]
        _STEP(self.number, tree.leaves(grads), inner, sizes, leaves, norm(grads), ok, donated)
        return optree.tree_unflatten(spec, leaves), tree.rebuild(state, iter(inner))

    def run(self, grads: list[Tensor], inner: list[Tensor], sizes: list[int], leaves: list[Tensor], norm: Tensor, ok: Tensor, donated: bool) -> None:  # fmt: skip
        """One step: writes new handles and numbers over `inner` and `leaves`, which are the caller's own."""
        if not bool(ok):
            for p, g in zip(leaves, grads, strict=True):
                if handles.is_handle(p):
                    handles.drop_gradient(p, g)
            return
        rest, counts = iter(inner), iter(sizes)
        order = [
            _Bucket(i, [leaves[k] for k in of], [grads[k] for k in of], _take(rest, next(counts)), _take(rest, next(counts)))
            for i, of in enumerate(self.buckets(leaves))
        ]  # fmt: skip
        work = iter(order[::-1] if self.backwards else order)
        self.backwards = not self.backwards
        coming: deque[tuple[_Bucket, Callable[[], Any]]] = deque()
        try:
            while True:
                while len(coming) <= self.ahead and (bucket := next(work, None)) is not None:
                    coming.append((bucket, self._begin(bucket)))
                if not coming:
                    break
                bucket, wait = coming.popleft()
                params, grad, flats = wait()
                self._finish(bucket, params, grad, flats, norm, donated)
        finally:
            for w in {self.window, *(handles.find(h).window for b in order for h in b.homes)}:
                w.boundary()

    def _begin(self, bucket: _Bucket) -> Callable[[], Any]:
        """Begin to read parameters, gradients and state; the function waits for them."""
        kept = self.kept.pop(bucket.number, {})

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
            [reading(p) for p in bucket.params],
            list(map(gradient, bucket.params, bucket.grads)),
            [reading(t) for t in bucket.away],
        ]
        return lambda: [[f() for f in job] for job in jobs]

    def _finish(self, bucket: _Bucket, params: list[Tensor], grads: list[Tensor], flats: list[Tensor], norm: Tensor, donated: bool) -> None:  # fmt: skip
        like = self.like(params)
        parts = {flat.dtype: _cut(flat, like) for flat in flats}
        scalars = iter(bucket.scalars)
        values = [next(parts[t.dtype]) if t.dim() else next(scalars) for t in tree.flat(like)]
        yes = torch.ones((), dtype=torch.bool)
        new, state = guarded_step(self.tx, grads, tree.rebuild(like, iter(values)), params, norm=lambda _: norm, ok=yes, donated=donated)  # fmt: skip
        for old, value in zip(values, tree.flat(state), strict=True):
            if value is not old:
                old.copy_(value)
        written = list(zip(bucket.away, flats, strict=True))
        for home, old, value in zip(bucket.params, params, new, strict=True):
            if handles.is_handle(home):
                written.append((home, value.detach()))
            elif value is not old:
                old.copy_(value)
        kept = self.kept[bucket.number] = dict[str, tuple[Future[Any], Tensor]]()
        for home, x in written:  # a new generation: its numbers over those of the handle
            home.detach().copy_(handles.rewrite(home, x))
            held = handles.find(home)
            kept[held.key] = held.reference, x
        while len(self.kept) > self.ahead:
            self.kept.popitem(last=False)


def _take(values: Iterator[Tensor], n: int) -> list[Tensor]:
    return list(itertools.islice(values, n))


def _cut(flat: Tensor, like: Any) -> Iterator[Tensor]:
    """Views of a buffer: one for each tensor of its dtype."""
    shapes = [t.shape for t in tree.flat(like) if t.dim() and t.dtype == flat.dtype]
    parts: Sequence[Tensor] = torch.split(flat, [s.numel() for s in shapes])
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _run(number: int, grads: list[Tensor], state: list[Tensor], sizes: list[int], params: list[Tensor], norm: Tensor, ok: Tensor, donated: bool) -> None:  # fmt: skip
    with torch.no_grad():
        _STREAMS[number].run(grads, state, sizes, params, norm, ok, donated)


_STEP = opaque_operator(
    "streamed_step",
    "(int number, Tensor[] grads, Tensor(a!)[] state, int[] sizes, Tensor(b!)[] params, Tensor norm, Tensor ok, bool donated) -> ()",
    _run,
)
