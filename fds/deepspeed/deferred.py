"""Initialisation that is written down instead of done: `Deferred`, behind `zero.Init`.

Inside of the mode, tensors are made on the meta device, and every operator that writes to one of them is recorded. `make` runs what a leaf depends
on, and nothing else: so a module's constructor, whatever it does to its parameters, has its effect one leaf at a time, where the leaf is stored.

A tensor is known by its storage and its place in it, so that views, ``.data``, `nn.Parameter` and `detach` need no rule of their own. Random
operators draw from a generator that is seeded by the seed given to `make` and the operator's number: the same values on every rank, in any order.

To the constructor such tensors seem to be in host memory. Literals (`torch.tensor`), ranges, and constants of fewer than `SMALL` elements are
real, for constructors that read them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fds.initial import seeded

aten: Any = torch.ops.aten
_IS_META: Any = torch.Tensor.is_meta
_DEVICE: Any = torch.Tensor.device
SMALL = 1024
_BLANK = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}  # fmt: skip
_RANDOM = {aten.rand.default, aten.randn.default, aten.rand_like.default, aten.randn_like.default}
_CONSTANT = {aten.zeros.default, aten.ones.default, aten.full.default, aten.eye.default, aten.eye.m,
             aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}  # fmt: skip


@attrs.frozen
class _View:
    """A tensor: its storage, by number, and its place in it."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@attrs.frozen(eq=False)
class _Op:
    number: int
    func: Callable[..., Any]
    args: Any  # with views for tensors that are not there
    kwargs: dict[str, Any]
    outs: list[Any]
    reads: frozenset[int]
    writes: frozenset[int]
    blank: bool = False  # makes memory that holds nothing
    whole: bool = False  # what was in it before is of no consequence


class Deferred(TorchDispatchMode):
    """The record, and the mode that writes it."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # storage -> its number
        self._held: list[Tensor] = []  # a tensor of every storage, so that none is another one's successor
        self._ops: dict[int, list[_Op]] = {}  # storage -> the operators that write to it
        self._count = 0
        self._pretence = _Pretence(self)

    def knows(self, x: Tensor) -> bool:
        """Whether `x` was made here."""
        return x.layout == torch.strided and x.untyped_storage()._cdata in self._numbers

    def __enter__(self) -> Any:
        self._pretence.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._pretence.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = pytree.tree_flatten((args, kwargs))
        if not any(isinstance(x, Tensor) and self.knows(x) for x in flat) and not _made_here(func, args, kwargs):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            raise ValueError(
                "zero.Init: the constructor reads a number out of a tensor that is not there yet (item(), tolist(), bool()); compute it from Python numbers or torch.tensor, or build this module outside of zero.Init"
            )
        if kwargs.get("generator") is not None:
            raise ValueError(
                "zero.Init: generator= in an initialisation; its draws depend on the order of calls, and leaves are made in another; leave it out (zero.parameters(module, seed=...))"
            )
        mutated = _mutated(func, args, kwargs)
        real = [x for x in mutated if not self.knows(x)]
        if real:
            raise ValueError(
                f"zero.Init: {func} writes what is not there yet to a real tensor {tuple(real[0].shape)} {real[0].dtype} made outside; build it inside as well"
            )
        before = {x.untyped_storage()._cdata for x in flat if isinstance(x, Tensor) and self.knows(x)}
        metas = [_on_meta(x) for x in flat]
        meta_args, meta_kwargs = pytree.tree_unflatten(metas, spec)
        out = func(
            *meta_args, **({**meta_kwargs, "device": torch.device("meta")} if _has_device(func) else meta_kwargs)
        )
        outs = [o for o in pytree.tree_leaves(out) if isinstance(o, Tensor)]
        fresh = [o for o in outs if o.untyped_storage()._cdata not in before]
        if fresh or mutated:
            self._write_down(func, flat, spec, outs, [*fresh, *mutated], func in _BLANK)
        return out

    def _write_down(self, func: Any, flat: list[Any], spec: Any, outs: list[Tensor], written: list[Tensor], blank: bool) -> None:  # fmt: skip
        for o in written:
            if o.untyped_storage()._cdata not in self._numbers:
                self._numbers[o.untyped_storage()._cdata] = len(self._held)
                self._held.append(o.detach())
        kept = [self._frozen(x) for x in flat]
        args, kwargs = pytree.tree_unflatten(kept, spec)
        if _has_device(func):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        views = [x for x in kept if isinstance(x, _View)]
        self._add(_Op(self._count, func, args, kwargs, [self._view(o) for o in outs], frozenset(v.storage for v in views),
                      frozenset(self._view(o).storage for o in written), blank))  # fmt: skip

    def _add(self, op: _Op) -> None:
        self._count += 1
        for s in op.writes:
            if op.whole:
                self._ops[s] = []
            self._ops.setdefault(s, []).append(op)

    def _frozen(self, x: Any) -> Any:
        """An argument as the record keeps it: what is not there by its place, and of what is there a copy."""
        if not isinstance(x, Tensor):
            return x
        return self._view(x) if self.knows(x) else x.detach().clone()

    def _view(self, x: Tensor) -> _View:
        number = self._numbers[x.untyped_storage()._cdata]
        return _View(number, x.dtype, tuple(x.shape), tuple(x.stride()), int(x.storage_offset()))

    def put(self, x: Tensor, value: Callable[[], Tensor]) -> None:
        """From now on the tensor is what `value()` gives, whatever came before."""
        if not self.knows(x):
            self._numbers[x.untyped_storage()._cdata] = len(self._held)
            self._held.append(x.detach())
        view = self._view(x)
        covers = view.size == tuple(self._held[view.storage].shape) and x.is_contiguous()
        self._add(_Op(self._count, lambda t: t.copy_(value()), (view,), {}, [], frozenset(), frozenset([view.storage]), whole=covers))  # fmt: skip

    def make(self, x: Tensor, seed: int, name: str) -> Tensor:
        """The values of a tensor that was made here, in host memory.

        Raises `ValueError` for one that nothing has written to.
        """
        target = self._view(x)
        ops = self._needed(target.storage)
        if x.numel() and all(op.blank for op in ops if target.storage in op.writes):
            raise ValueError(
                f"{name}: nothing initialises this leaf: its module leaves it as torch.empty makes it; write it in the constructor, or by GatheredParameters(..., modifier_rank=0), or load it (fds.load)"
            )
        there: dict[int, torch.UntypedStorage] = {}

        def real(v: Any) -> Any:
            if not isinstance(v, _View):
                return v
            if v.storage not in there:
                there[v.storage] = torch.UntypedStorage(self._held[v.storage].untyped_storage().nbytes())
            return torch.empty(0, dtype=v.dtype).set_(there[v.storage], v.offset, v.size, v.stride)

        with torch.no_grad(), torch.device("cpu"):
            for op in ops:
                args, kwargs = pytree.tree_map(real, (op.args, op.kwargs), is_leaf=lambda a: isinstance(a, _View))
                with seeded(f"{seed}:{op.number}"):
                    out = [o for o in pytree.tree_leaves(op.func(*args, **kwargs)) if isinstance(o, Tensor)]
                for o, v in zip(out, op.outs, strict=False):
                    if v.storage not in there:
                        real(v).copy_(o)
            return real(target)

    def _needed(self, storage: int) -> list[_Op]:
        """What has to run, in order, for the values of a storage."""
        found: dict[int, _Op] = {}
        until: dict[int, int] = {}
        left = [(storage, self._count)]
        while left:
            s, bound = left.pop()
            if until.get(s, -1) >= bound:
                continue
            first, until[s] = until.get(s, -1), bound
            for op in self._ops.get(s, []):
                if first <= op.number < bound and op.number not in found:
                    found[op.number] = op
                    left += [(r, op.number) for r in op.reads]
        return [found[n] for n in sorted(found)]


class _Pretence(TorchFunctionMode):
    """What is not there says that it is in host memory: initialisers ask, and leave out what is on the meta device (`torch.nn.init.orthogonal_`)."""

    def __init__(self, record: Deferred) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func in (_IS_META.__get__, _DEVICE.__get__)
        if asked and self.record.knows(args[0]):
            return False if func == _IS_META.__get__ else torch.device("cpu")
        return func(*args, **(kwargs or {}))


def _made_here(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether this makes a tensor in host memory that may be large, or is random, or holds nothing."""
    if func not in _BLANK and func not in _RANDOM and func not in _CONSTANT:
        return False
    like = next((a for a in args if isinstance(a, Tensor)), None)
    device = kwargs.get("device") or (torch.device("cpu") if like is None else like.device)
    if torch.device(device).type != "cpu":
        return False
    if func not in _CONSTANT:
        return True
    sizes = like.shape if like is not None else args[0] if isinstance(args[0], list | tuple) else args[:2]
    return torch.Size([int(n) for n in sizes if isinstance(n, int)]).numel() >= SMALL


def _mutated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    found: list[Tensor] = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            x = args[i] if i < len(args) else kwargs.get(a.name)
            found += [t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)]
    return found


def _has_device(func: Any) -> bool:
    return any(a.name == "device" for a in func._schema.arguments)


def _on_meta(x: Any) -> Any:
    return x if not isinstance(x, Tensor) or x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")  # fmt: skip
