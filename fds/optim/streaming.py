"""Optimizers whose state, and whose parameters, are in a store: `streamed`."""

import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import attrs
import optree
import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator
from fds.layout import Part
from fds.offload import handles
from fds.offload.handles import SHAPE, Held, Window
from fds.optim.base import Member, Norm, Optimizer, check_like, guarded_step

_STREAMS: "weakref.WeakValueDictionary[int, Stream]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def streamed(tx: Optimizer, store: Any, *, window: int = 2, bucket_bytes: int = 2**24) -> Optimizer:
    """Keep the state of `tx` in a store, and update in buckets: what `tx` needs for one is read ahead, what it changed is written behind.

    A bucket is leaves one after the other until their state has `bucket_bytes`; its state is one buffer for each dtype, read and written at
    once. Parameters may be tensors, or handles (`fds.offload`), whose gradients are in a store as well; each handle is a bucket. At most
    `window` buckets are on their way in and as many out, so that memory does not grow with the model.

    Parameters that are handles are updated in the background, in the order in which they were placed, while the next step's forward pass waits
    for each of them by itself. Of others the next step waits for the last writes; their buckets are visited forwards and backwards in turn, so
    that the last `window` of a step are there when the next update begins, and a `FileStore` with a `budget` finds what it kept. Either way
    an error of a write is raised by who uses what was to be written, at the latest by the next step.

    `tx` has to treat leaves independently, apart from the norm that it is given; all rules of `fds.optim` do. A `sharded` one goes outside; its
    shards are one leaf, which no bucket cuts: `fds.shard` makes one of each site.

    Law: bitwise the steps of `tx` (a leaf here is a site's flat buffer where parameters are offloaded: a norm is summed in another order).
    A state is spent by the next step. `ValueError` for a `tx` that is sharded, and for `update`, which has no way to say where parameters go.
    """
    if tx.axis is not None:
        raise ValueError(
            "streamed: an optimizer inside that reduces gradients itself, whose messages are of all leaves; leave streamed() out"
            if tx.local
            else "streamed: a sharded optimizer inside; turn it round: sharded(streamed(tx, store), axis)"
        )
    if tx.named:
        raise ValueError(
            "streamed: a partition inside, which has to see the names of all leaves; turn it round: partition({label: streamed(tx, store), ...}, labels)"
        )
    if window < 0 or bucket_bytes < 0:
        raise ValueError(f"streamed: window={window!r}, bucket_bytes={bucket_bytes!r}, required >= 0")
    stream = Stream(tx, Window(store, max(window, 1)), window, bucket_bytes)

    def update(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> Any:
        raise ValueError(
            "streamed: no updates to add: parameters may be in a store; use fds.train_step, or tx.step(...)"
        )

    return Optimizer(stream.init, update, step=stream, stream=stream, members=stream.members, whole=tx.whole)


@attrs.define(eq=False)
class _Bucket:
    """A bucket of one step: what of it is in the state (handles, and tensors of no dimension), and what is to be read and written."""

    number: int
    params: list[Tensor]
    grads: list[Tensor]
    away: list[Tensor]
    scalars: list[Tensor]
    read: Callable[[], Callable[[], list[list[Tensor]]]] = attrs.field(init=False)  # begins to; the function waits
    homes: list[tuple[Held, Future[Any]]] = attrs.field(init=False)  # of `away` and of the parameters that are handles
    gradients: list[Held] = attrs.field(init=False)  # in the store
    stored: list[bool] = attrs.field(
        init=False
    )  # which parameters are; the tensors here may be donated, and empty when a later update runs
    expected: list[Tensor] = attrs.field(init=False)  # `scalars` after the update, as far as that was told already


class Stream:
    """The optimizer's `step`."""

    def __init__(self, tx: Optimizer, window: Window, ahead: int, bucket_bytes: int) -> None:
        self.tx, self.window, self.ahead, self.bucket_bytes = tx, window, ahead, bucket_bytes
        self.number = next(_NUMBERS)
        self.backwards = False
        self.thread: threading.Thread | None = None
        self.promised: list[Future[Any]] = []  # by the last step
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

    def members(self, params: Any) -> list[Member]:
        """Each bucket's state, for a tree of parts."""
        parts: list[Part] = optree.tree_leaves(params)
        found = self.buckets([p.stored for p in parts])
        return [Member((i,), "", self.tx, [parts[k] for k in of], window=self.window) for i, of in enumerate(found)]

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
        self.wait()
        norm = norm.clone()  # a compiler may use its memory again while a later update runs
        if not bool(ok):
            for p, g in zip(leaves, grads, strict=True):
                if handles.is_handle(p):
                    handles.drop_gradient(p, g)
            return
        rest, counts = iter(inner), iter(sizes)
        buckets = [
            _Bucket(i, [leaves[k] for k in of], [grads[k] for k in of], _take(rest, next(counts)), _take(rest, next(counts)))
            for i, of in enumerate(self.buckets(leaves))
        ]  # fmt: skip
        windows = {self.window, *(handles.find(p).window for p in leaves if handles.is_handle(p))}
        later = [b for b in buckets if all(handles.is_handle(p) for p in b.params)]
        # As they were placed: nearly as they are used.
        later.sort(key=lambda b: min(handles.find(p).number for p in b.params))
        now = [b for b in buckets if b not in later]
        for b in buckets:
            self._claim(b, norm, later=b in later)
        for w in windows:
            w.boundary()
        self.promised = [p for b in buckets for _, p in b.homes]
        try:
            self._update(now[::-1] if self.backwards else now, norm, donated)
        except BaseException as error:
            _break(buckets, error)
            raise
        self.backwards = not self.backwards
        if later:
            self.thread = threading.Thread(target=self._work, args=(later, norm, donated), name="fds-update")
            self.thread.start()

    def wait(self) -> None:
        """Until the last step is written. Raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        promised, self.promised = self.promised, []
        for p in promised:
            p.result()

    def _claim(self, bucket: _Bucket, norm: Tensor, *, later: bool) -> None:
        """Note what is to be read, promise what will be written, and with `later` write the numbers of the new state already."""
        kept = self.kept.pop(bucket.number, {})

        def reading(t: Tensor) -> Callable[[], Callable[[], Tensor]]:
            if not handles.is_handle(t):
                return lambda: lambda: t
            held = handles.find(t)
            old = held.reference
            known = kept.get(held.key)
            if known is not None and known[0] is old:
                return lambda: lambda: known[1]
            return lambda: partial(handles.waited, held.key, held.window.begin(held.key, old))

        def gradient(p: Tensor, g: Tensor) -> Callable[[], Callable[[], Tensor]]:
            if not handles.is_handle(p):
                return lambda: lambda: g
            parts = handles.claim_gradient(p, g)
            bucket.gradients += parts
            return lambda: handles.sum_of(parts)

        bucket.gradients, bucket.stored = [], [handles.is_handle(p) for p in bucket.params]
        jobs = [
            list(map(reading, bucket.params)),
            list(map(gradient, bucket.params, bucket.grads)),
            list(map(reading, bucket.away)),
        ]

        def read() -> Callable[[], list[list[Tensor]]]:
            begun = [[f() for f in job] for job in jobs]
            return lambda: [[f() for f in job] for job in begun]

        bucket.read, bucket.expected = read, []
        if later:
            self._count(bucket, norm)
        homes = [*bucket.away, *(p for p in bucket.params if handles.is_handle(p))]
        bucket.homes = [(handles.find(h), handles.promise(h)) for h in homes]

    def _count(self, bucket: _Bucket, norm: Tensor) -> None:
        """The numbers of the new state: they do not depend on the leaves, and are told before those are read."""
        held = [handles.find(p) for p in bucket.params]
        params = [torch.empty(h.shape, dtype=h.dtype, device="meta") for h in held]
        old = [v.clone() for v in bucket.scalars]
        like = self.like(params)
        rest = iter(old)
        state = tree.rebuild(like, iter([t if t.dim() else next(rest) for t in tree.flat(like)]))
        _, new = guarded_step(self.tx, params, state, params, norm=lambda _: norm, ok=_YES, donated=False)
        for home, value in zip(bucket.scalars, (t for t in tree.flat(new) if not t.dim()), strict=True):
            home.copy_(value)
            bucket.expected.append(value)
        bucket.scalars = old

    def _work(self, buckets: list[_Bucket], norm: Tensor, donated: bool) -> None:
        """In a thread: the next step's forward pass waits for each site by itself."""
        try:
            with torch.no_grad():
                self._update(buckets, norm, donated)
        except BaseException as error:
            _break(buckets, error)

    def _update(self, buckets: Sequence[_Bucket], norm: Tensor, donated: bool) -> None:
        """Bucket by bucket: read ahead, update, write behind."""
        coming: deque[tuple[_Bucket, Callable[[], list[list[Tensor]]]]] = deque()
        work = iter(buckets)
        while True:
            while len(coming) <= self.ahead and (bucket := next(work, None)) is not None:
                coming.append((bucket, bucket.read()))
            if not coming:
                return
            bucket, wait = coming.popleft()
            self._finish(bucket, *wait(), norm=norm, donated=donated)

    def _finish(self, bucket: _Bucket, params: list[Tensor], grads: list[Tensor], flats: list[Tensor], *, norm: Tensor, donated: bool) -> None:  # fmt: skip
        like = self.like(params)
        parts = {flat.dtype: _cut(flat, like) for flat in flats}
        scalars = iter(bucket.scalars)
        values = [next(parts[t.dtype]) if t.dim() else next(scalars) for t in tree.flat(like)]
        state = tree.rebuild(like, iter(values))
        new, state = guarded_step(self.tx, grads, state, params, norm=lambda _: norm, ok=_YES, donated=donated)
        for old, value in zip(values, tree.flat(state), strict=True):
            if value is not old:
                old.copy_(value)
        for told, value in zip(bucket.expected, (v for v in values if not v.dim()), strict=False):
            if not torch.equal(told, value):
                raise ValueError(
                    f"streamed: a number of the state became {value.item()}, and {told.item()} for a parameter without values: this rule does not treat leaves independently; use it without offload(store)"
                )
        written = list(flats)
        for stored, old, value in zip(bucket.stored, params, new, strict=True):
            if stored:
                written.append(value.detach())
            elif value is not old:
                old.copy_(value)
        for (held, promised), x in zip(bucket.homes, written, strict=True):
            handles.fulfil(held, promised, x)
        for part in bucket.gradients:
            handles.delete(part)
        if not any(bucket.stored):
            self.kept[bucket.number] = {h.key: (p, x) for (h, p), x in zip(bucket.homes, written, strict=True)}
            while len(self.kept) > self.ahead:
                self.kept.popitem(last=False)


_YES = torch.ones((), dtype=torch.bool)


def _break(buckets: Sequence[_Bucket], error: BaseException) -> None:
    """Tell whoever waits for what was promised."""
    for b in buckets:
        for _, promised in b.homes:
            if not promised.done():
                promised.set_exception(error)


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
