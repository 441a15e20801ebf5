"""The optimizer pair, and how pairs combine.

An `Optimizer` is two pure functions, as in optax: `init(params) -> state` and `update(grads, state, params, norm=...) -> (updates, state)`;
the new parameters are ``params + updates``. States are named tuples and dictionaries of tensors. Hyperparameters are 0-D tensors in the state,
so a new learning rate is new data, not a new graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import optree
import torch
from torch import Tensor

from fds import tree

Norm = Callable[[Any], Tensor]


class Axis(Protocol):
    """A mesh axis, as far as an optimizer has to know one."""

    @property
    def size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def stride(self) -> int: ...
    def sum(self, x: Tensor) -> Tensor: ...


class Update(Protocol):
    """How an optimizer's `update` is called."""

    def __call__(self, grads: Any, state: Any, params: Any, *, norm: Norm = ...) -> tuple[Any, Any]: ...


class Step(Protocol):
    """How an optimizer's `step` is called. Its result is None where it has no way of its own for these tensors, which it then leaves alone."""

    def __call__(
        self, grads: Any, state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool
    ) -> tuple[Any, Any] | None: ...


class Member(NamedTuple):
    """An optimizer inside of another one.

    * `path`: where its state is in the other's; several members may have states of one kind, each for some of the parameters
    * `name`: tells it from members of another kind
    * `params`: the tree of parameters that it is for
    * `host`: its state is in host memory
    * `window`: where the tensors of its state are, if they are in a store
    * `carried`: its state is a rank's own, and begins at zero under another layout
    """

    path: tuple[int | str, ...]
    name: str
    tx: "Optimizer"
    params: Any
    host: bool = False
    window: Any = None
    carried: bool = False


def _as_they_are(grads: Any) -> Any:
    return grads


class Optimizer(NamedTuple):
    """A pair of pure functions over any tree of tensors.

    * `init(params) -> state`
    * `update(grads, state, params, norm=f) -> (updates, state)`. `norm(grads)` is the global L2 norm; the caller passes one that is right
      over shards. The default is that of the tree alone.
    * `reduce(grads) -> grads`: gradients as `update` takes them. `sharded` reduce-scatters here; then leaves are split over `axis`.
    * `step(grads, state, params, norm=f, ok=ok, donated=d) -> (params, state)`: update and addition at once; nothing changes where the 0-D bool
      `ok` is False. With `donated` it may write over `state` and `params`. See `guarded_step`.
    * `stream`: of `streamed`, which takes handles in place of parameters; plans ask it what is where.
    * `members(params)`: of an optimizer made of others: which state is whose, for a tree with a `fds.layout.Part` in place of each parameter.
      None: a rule, whose state is made from the tree of parameters alone. Files ask it what belongs to which leaf.
    * `whole`: it looks at leaves as wholes (their norms, their rows), so that it has to be given them uncut.
    * `named`: it looks at the names of leaves, so that it has to be given the whole tree.
    * `local`: `reduce` leaves gradients the rank's own; `update` itself reduces over `axis`. Their norm is a root mean square over the ranks.
    """

    init: Callable[[Any], Any]
    update: Update
    reduce: Callable[[Any], Any] = _as_they_are
    axis: Axis | None = None
    step: Step | None = None
    stream: Any = None
    members: Callable[[Any], Sequence[Member]] | None = None
    whole: bool = False
    named: bool = False
    local: bool = False


def guarded_step(tx: Optimizer, grads: Any, state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any]:  # fmt: skip
    """New parameters and state where `ok`, the old ones where not. With `donated` they may be written over the old ones."""
    done = None if tx.step is None else tx.step(grads, state, params, norm=norm, ok=ok, donated=donated)
    if done is not None:
        return done
    updates, new = tx.update(grads, state, params, norm=norm)
    return chosen(ok, apply_updates(params, updates), params), chosen(ok, new, state)


def chosen(ok: Tensor, new: Any, old: Any) -> Any:
    """Leaf by leaf, `new` where `ok`, else `old`."""
    return tree.map(lambda a, b: torch.where(ok.to(b.device), a, b), new, old)


def chain(*optimizers: Optimizer) -> Optimizer:
    """Apply optimizers one after the other, each to the updates of the one before. ``chain()`` passes gradients through.

    A `sharded` optimizer cannot stand in a chain: shard the chain, ``sharded(chain(...), axis)``, so that every part sees the shards. One that
    reduces gradients itself (`onebit_adam`) comes last; before it, only what takes gradients alone (clipping, scaling).
    """
    if any(o.axis is not None and not o.local for o in optimizers):
        raise ValueError(
            "optim.chain: a sharded optimizer inside of a chain; shard the whole, as in sharded(chain(clip_by_global_norm(1.0), adamw(1e-3)), axis)"
        )
    if any(o.local for o in optimizers[:-1]):
        raise ValueError(
            "optim.chain: an optimizer that reduces gradients itself before others, which would then see each rank's own; the order that works: chain(clip_by_global_norm(1.0), onebit_adam(...))"
        )
    flags: dict[str, Any] = {"whole": any(o.whole for o in optimizers), "named": any(o.named for o in optimizers)}
    if optimizers and optimizers[-1].local:
        flags |= {"reduce": optimizers[-1].reduce, "axis": optimizers[-1].axis, "local": True}

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(o.init(params) for o in optimizers)

    def update(
        grads: Any, state: tuple[Any, ...], params: Any, *, norm: Norm = tree.norm
    ) -> tuple[Any, tuple[Any, ...]]:
        states: list[Any] = []  # not list[Any](): Dynamo cannot call that
        for o, s in zip(optimizers, state, strict=True):
            grads, s = o.update(grads, s, params, norm=norm)
            states.append(s)
        return grads, tuple(states)

    def members(params: Any) -> list[Member]:
        return [Member((i,), str(i), o, params) for i, o in enumerate(optimizers)]

    last = optimizers[-1].step if optimizers else None
    if last is None:
        return Optimizer(init, update, members=members, **flags)

    def step(
        grads: Any, state: tuple[Any, ...], params: Any, *, norm: Norm, ok: Tensor, donated: bool
    ) -> tuple[Any, Any] | None:
        states: list[Any] = []
        for o, s in zip(optimizers[:-1], state, strict=False):
            grads, new = o.update(grads, s, params, norm=norm)
            states.append(chosen(ok, new, s))
        done = last(grads, state[-1], params, norm=norm, ok=ok, donated=donated)
        return None if done is None else (done[0], (*states, done[1]))

    return Optimizer(init, update, step=step, members=members, **flags)


def stateless(f: Callable[[Any, Any], Any]) -> Optimizer:
    """An optimizer from a function ``f(grads, params) -> updates``."""

    def init(params: Any) -> tuple[()]:
        return ()

    def update(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, Any]:
        return f(grads, params), state

    return Optimizer(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """``params + updates``, added in the wider dtype of the two and rounded once to the parameter's, leaf by leaf.

    >>> apply_updates({"w": torch.ones(1)}, {"w": torch.full((1,), 0.5)})
    {'w': tensor([1.5000])}
    """
    return tree.map(lambda p, u: (p + u).to(p.dtype), params, updates)


# --- hyperparameters ---

Hyper = dict[str, Tensor]
Schedule = Callable[[Tensor], Tensor]


def hyperparams(**values: float | Tensor | Schedule) -> Hyper:
    """0-D float64 tensors of the numbers among `values`.

    float64, so that 1 - 0.999 keeps its digits; a 0-D tensor does not change the dtype of what it multiplies.
    """
    return {k: torch.as_tensor(v, dtype=torch.float64).clone() for k, v in values.items() if not callable(v)}


# Hyperparameters that have to be below something; all have to be finite and >= 0.
_BELOW = {"momentum": 1.0, "b1": 1.0, "b2": 1.0, "coeff_beta": 1.0, "factor_threshold": 1.0}


def checked(name: str, value: Any) -> Any:
    """`value` if it is a schedule, a number in range or a 0-D tensor of one; else `ValueError`."""
    if callable(value):
        return value
    below = _BELOW.get(name, float("inf"))
    if not isinstance(value, (int, float, Tensor)) or (isinstance(value, Tensor) and value.dim() != 0):
        raise ValueError(f"{name}={value!r}, required a number or a 0-D tensor")
    if not 0.0 <= float(value) < below:
        raise ValueError(f"{name}={value!r}, required 0 <= {name} < {below:g}")
    return value


def check_like(grads: Any, params: Any) -> None:
    """Raise `ValueError` that names the leaf unless `grads` has the leaves and shapes of `params`: broadcasting would hide it."""
    got, want = tree.leaves(grads), tree.leaves(params)
    if len(got) == len(want) and all(g.shape == p.shape for g, p in zip(got, want, strict=True)):
        return
    given, known = _shapes(grads), _shapes(params)
    name = sorted(given.items() ^ known.items())[0][0]
    raise ValueError(
        f"{name}: gradient {given.get(name, 'missing')}, parameter {known.get(name, 'missing')}; both trees have the same leaves and shapes"
    )


def _shapes(x: Any) -> dict[str, tuple[int, ...]]:
    return dict(zip(names(x), (tuple(leaf.shape) for leaf in tree.leaves(x)), strict=True))


def names(x: Any) -> list[str]:
    """The name of each leaf, in order: that of the leaf alone where it says its site, else its path."""
    return [name for name, _ in by_name(x)]


def by_name(x: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """The leaves with their names, in optree's order. Plain Python: Dynamo cannot follow optree where subtrees are left out (torch 2.13).

    >>> by_name({"h.0": {"h.0.up": 1, "norm": 2}, "": {"w": [3, 4]}})
    [('/w/0', 3), ('/w/1', 4), ('h.0.up', 1), ('h.0/norm', 2)]
    """
    parts = _parts(x)
    if parts is None:
        return [(_name(path), x)]
    return [leaf for k, v in parts for leaf in by_name(v, (*path, k))]


def refilled(x: Any, leaves: Mapping[str, Any], path: tuple[str, ...] = ()) -> Any:
    """The tree with other leaves, by name; ``()``, nothing, where there is none, and in place of what has none below.

    >>> refilled({"a": {"b": 1}, "c": [2, 3]}, {"c/1": 4})
    {'a': (), 'c': [(), 4]}
    """
    parts = _parts(x)
    if parts is None:
        return leaves.get(_name(path), ())
    below = by_name(x, path)
    if below and not any(name in leaves for name, _ in below):
        return ()  # not a dictionary of nothing, which Dynamo takes for a constant that it cannot flatten
    if tree.is_mapping(x):
        return {k: refilled(v, leaves, (*path, str(k))) for k, v in x.items()}
    new = [refilled(v, leaves, (*path, k)) for k, v in parts]
    return type(x)(*new) if hasattr(x, "_fields") else type(x)(new)


def _parts(x: Any) -> list[tuple[str, Any]] | None:
    """What is directly below; None for a leaf."""
    if tree.is_mapping(x):
        return [(str(k), x[k]) for k in sorted(x)]
    if isinstance(x, list | tuple):
        return [(str(i), v) for i, v in enumerate(cast("Sequence[Any]", x))]
    return [] if x is None else None


def _name(path: tuple[str, ...]) -> str:
    return tree.qualified(*path) if len(path) == 2 else "/".join(path)


def get_hyperparams(state: Any) -> dict[str, float]:
    """All hyperparameters in an optimizer's state, as numbers; on equal names the outermost part of a chain wins."""
    found: dict[str, float] = {}
    for hyper in _hypers(state):
        for k, v in hyper.items():
            found.setdefault(k, float(v))
    return found


def set_hyperparams(state: Any, **values: float | Tensor) -> Any:
    """The same state with other hyperparameters, for example ``set_hyperparams(state, learning_rate=1e-4)``.

    Raises `ValueError` for a name that no part of the state has (a learning rate that is a schedule has no entry), and for a value out of range.

    >>> from fds import optim
    >>> state = optim.sgd(0.1).init({"w": torch.zeros(1)})
    >>> get_hyperparams(set_hyperparams(state, learning_rate=0.5))["learning_rate"]
    0.5
    """
    known = get_hyperparams(state)
    for name in values:
        if name not in known:
            raise ValueError(f"set_hyperparams: no hyperparameter {name!r} in this state; {tree.suggest(name, known)}")

        checked(name, values[name])

    def replace(x: Any) -> Any:
        if _is_hyper(x):
            return x._replace(
                hyper={
                    k: torch.as_tensor(values[k], dtype=v.dtype, device=v.device).clone() if k in values else v
                    for k, v in x.hyper.items()
                }
            )
        return x

    return optree.tree_map(replace, state, is_leaf=_is_hyper)


def _is_hyper(x: Any) -> bool:
    return "hyper" in getattr(x, "_fields", ()) and isinstance(x, tuple)


def _hypers(state: Any) -> list[Mapping[str, Tensor]]:
    return [x.hyper for x in optree.tree_leaves(state, is_leaf=_is_hyper) if _is_hyper(x)]
