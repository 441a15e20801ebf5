"""Trees of tensors: walking, selecting by name, naming what is wrong.

Two shapes of tree run through fds. `Params` is flat, ``{"model.layers.0.mlp.up_proj.weight": tensor}``: the logical view, named as the
module names its leaves. `Stored` has one more level, the site: ``{"": {...}, "model.layers.0": {...}}``.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, overload

import optree
import torch
from torch import Tensor

from fds._torch import each_norm, inside_functorch, opaque_operator

Params = dict[str, Tensor]
Stored = dict[str, dict[str, Tensor]]


@overload
def map(f: Callable[[Tensor], Any], tree: Any) -> Any: ...
@overload
def map(f: Callable[[Tensor, Tensor], Any], tree: Any, other: Any, /) -> Any: ...
@overload
def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any: ...
def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `f` to every leaf of `tree` (and to the leaves at the same place in `rest`).

    >>> map(lambda x: x + 1, {"a": 1, "b": (2, 3)})
    {'a': 2, 'b': (3, 4)}
    """
    return optree.tree_map(f, tree, *rest)


def leaves(tree: Any) -> list[Any]:
    """The leaves of `tree`, in optree's order (dictionary keys sorted).

    >>> leaves({"b": 2, "a": [1]})
    [1, 2]
    """
    return optree.tree_leaves(tree)


def is_mapping(x: Any) -> TypeGuard[Mapping[str, Any]]:
    """``isinstance(x, Mapping)``, with names for keys; to a type checker the bare test says nothing about what is inside."""
    return isinstance(x, Mapping)


def detached(x: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return x.detach() if isinstance(x, Tensor) else x


def flat(tree: Any) -> list[Tensor]:
    """The tensors of nested dictionaries, lists and (named) tuples, in order; plain Python, so that Dynamo can follow it."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if is_mapping(tree) else tree
    return [x for part in parts for x in flat(part)]


def flat_as(like: Any, tree: Any, *, what: str, path: str = "") -> list[Tensor]:
    """The tensors of `tree` in the order of `like`: dictionaries by key, whatever their own order. `ValueError` where the two differ in shape."""
    if isinstance(like, Tensor):
        if not isinstance(tree, Tensor):
            raise ValueError(
                f"{what}{path}: {type(tree).__name__} instead of a tensor; it belongs to another program or optimizer"
            )
        return [tree]
    keys: list[Any] = list(like) if is_mapping(like) else list(range(len(like)))
    fits = tree.keys() == like.keys() if is_mapping(like) and is_mapping(tree) else type(tree) is type(like)
    if not fits or len(tree) != len(like):
        raise ValueError(
            f"{what}{path}: {type(tree).__name__} of {len(tree) if hasattr(tree, '__len__') else 1} where {type(like).__name__} of {len(like)} was expected; it belongs to another program or optimizer"
        )
    return [x for k in keys for x in flat_as(like[k], tree[k], what=what, path=f"{path}[{k!r}]")]


def paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors of nested dictionaries, lists and (named) tuples with the keys that lead to them, in the order of `flat`.

    >>> [path for path, _ in paths({"a": [torch.zeros(1), torch.ones(1)]})]
    [('a', '0'), ('a', '1')]
    """
    if isinstance(tree, Tensor):
        yield path, tree
        return
    parts = tree.items() if is_mapping(tree) else zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
    for k, v in parts:
        yield from paths(v, (*path, str(k)))


def rebuild(like: Any, values: Iterator[Tensor]) -> Any:
    """The tree `like` with its tensors replaced by `values`, in the order of `flat`."""
    if isinstance(like, Tensor):
        return next(values)
    if is_mapping(like):
        return {k: rebuild(v, values) for k, v in like.items()}
    parts = [rebuild(v, values) for v in like]
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def named(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The leaves of a stored tree under one name each: ``site/leaf``, or the leaf alone where its name says its site.

    >>> named({"": {"norm.weight": 1}, "h.0": {"h.0.up.weight": 2, "shard.float32": 3}})
    {'norm.weight': 1, 'h.0.up.weight': 2, 'h.0/shard.float32': 3}
    """
    return {qualified(site, k): v for site, part in stored.items() for k, v in part.items()}


def qualified(site: str, name: str) -> str:
    """The unique name of leaf `name` at `site`."""
    return name if not site or name.startswith(site + ".") else f"{site}/{name}"


def nbytes(tree: Any) -> int:
    """Bytes of all tensors of `tree`; expanded (stride-0) dimensions count once, as they hold no memory.

    >>> nbytes({"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.bfloat16)})
    20
    """
    return sum(_held(x) * x.element_size() for x in leaves(tree) if isinstance(x, Tensor))


def _held(x: Tensor) -> int:
    n = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n


def norm(tree: Any) -> Tensor:
    """Global L2 norm over all leaves, accumulated in float32; a 0-D float32 tensor.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return square_sum(leaves(tree)).sqrt()


def square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements, accumulated in float32; a 0-D tensor (0 for no tensors)."""
    tensors = list(tensors)
    return square_sums(tensors).sum() if tensors else torch.zeros(())


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor: [n] float32, on the first one's device.

    One call for all of them, also in compiled code: a compiler would make a slow loop for each (14 ms for 6.5M elements in 57 leaves on a CPU,
    where the library's dot products take 1.6).

    >>> square_sums([torch.tensor([3.0, 4.0]), torch.zeros(0)])
    tensor([25.,  0.])
    """
    if inside_functorch() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return torch.stack([t.float().square().sum().to(tensors[0].device) for t in tensors])
    return _SQUARE_SUMS(list(tensors))


def _square_sums(tensors: list[Tensor]) -> Tensor:
    if all(t.is_cuda for t in tensors):
        return torch.stack(each_norm(tensors)).square()
    flat = [t.float().reshape(-1) for t in tensors]
    return torch.stack([torch.dot(x, x).to(tensors[0].device) for x in flat])


def _square_sums_shape(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.float32)


_SQUARE_SUMS = opaque_operator("square_sums", "(Tensor[] tensors) -> Tensor", _square_sums, _square_sums_shape)


def compact(moved: Params, *, keep: Params) -> Params:
    """`moved` with small leaves copied out of large buffers that nothing else in it needs, as a norm's out of a gathered one whose weights were made anew.

    A buffer that belongs to `keep` is left alone; so is one of which more is used than is not, as copies would cost more than they free.

    >>> small = compact({"a": torch.zeros(100)[:10]}, keep={})["a"]
    >>> small.untyped_storage().nbytes()
    40
    """
    kept = {x.untyped_storage().data_ptr() for x in keep.values()}
    used: dict[int, int] = {}  # bytes by buffer
    for x in moved.values():
        where = x.untyped_storage().data_ptr()
        used[where] = used.get(where, 0) + x.nbytes

    def small(x: Tensor) -> bool:
        buffer = x.untyped_storage()
        return buffer.data_ptr() not in kept and 2 * used[buffer.data_ptr()] <= buffer.nbytes()

    found = {k: x.clone() for k, x in moved.items() if small(x)}
    return {**moved, **found} if found else moved


def matches(pattern: str, leaf: str) -> bool:
    """Whether the shell pattern names the leaf itself or a module that contains it.

    >>> matches("*.[qv]_proj", "model.layers.0.self_attn.q_proj.weight"), matches("*.q_proj", "model.layers.0.mlp.up_proj.weight")
    (True, False)
    """
    parts = leaf.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def group_of(name: str, groups: Mapping[str, Iterable[str]]) -> str | None:
    """The first group with a pattern for a leaf, or, of a flat buffer, the one that its name ends with; None where there is none.

    >>> groups = {"plain": ["*.bias", "*norm*"], "rest": ["*"]}
    >>> [group_of(k, groups) for k in ("h.0.bias", "h.0.weight", "shard.float32.rest")]
    ['plain', 'rest', 'rest']
    """
    made = name.startswith(("shard.", "offload.")) and name.rpartition(".")[2]
    if made:
        return made if made in groups else None
    return next((g for g, patterns in groups.items() if any(matches(p, name) for p in patterns)), None)


def select(names: Iterable[str], patterns: str | Iterable[str], *, what: str) -> list[str]:
    """The names that at least one pattern matches, in order; every pattern has to match something.

    Raises `ValueError` with the nearest existing names for a pattern that matches nothing: a selection that is silently empty is the
    commonest way to train nothing.

    >>> select(["h.0.up.weight", "h.0.down.weight"], "*.up", what="targets")
    ['h.0.up.weight']
    """
    names = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(matches(pattern, n) for n in names):
            raise ValueError(f"{what}: pattern {pattern!r} matches no leaf; {_near(pattern, names)}")
    return [n for n in names if any(matches(p, n) for p in patterns)]


def _near(pattern: str, names: list[str]) -> str:
    """The closest names to a pattern that matched nothing: whole paths first, then their last parts."""
    paths = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
    tails = {p.rsplit(".", 1)[-1] for p in paths if not p.rsplit(".", 1)[-1].isdigit()}
    wanted = pattern.strip("*.?")
    close = difflib.get_close_matches(wanted, sorted(paths), 3, 0.75) or difflib.get_close_matches(
        wanted.rsplit(".", 1)[-1], sorted(tails), 3, 0.4
    )
    return (
        f"did you mean {' or '.join(repr('*.' + c if c in tails else c) for c in close)}?"
        if close
        else f"there are {', '.join(sorted(tails)[:12])}"
    )


def suggest(given: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a word near an allowed one, else the list of what is allowed.

    >>> suggest("mena", ["mean", "sum"])
    "did you mean 'mean'?"
    """
    allowed = sorted(allowed)
    close = difflib.get_close_matches(given, allowed, 1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed) or 'none'}"


def positive(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a whole number from 1 on.

    >>> positive("rows", 0)
    Traceback (most recent call last):
    ...
    ValueError: rows=0, required a whole number >= 1
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}, required a whole number >= 1")


def switch(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a boolean: "no" would be true.

    >>> switch("fuse", "no")
    Traceback (most recent call last):
    ...
    ValueError: fuse='no', required True or False
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}, required True or False")


def check_like(
    tree: Mapping[str, Mapping[str, Tensor]], spec: Mapping[str, Mapping[str, Tensor]], *, what: str
) -> None:
    """Raise `ValueError` unless `tree` has the sites, leaves, shapes and dtypes of `spec`; names the first leaf that differs."""
    got, want = named(tree), named(spec)
    missing, surplus = want.keys() - got.keys(), got.keys() - want.keys()
    if missing or surplus:
        name = sorted(missing or surplus)[0]
        raise ValueError(
            f"{what}: leaf {name!r} is {'missing' if missing else 'unknown'} ({len(missing)} missing, {len(surplus)} surplus of {len(want)}); {suggest(name, (surplus if missing else missing) or want)}"
        )
    for name, leaf in want.items():
        check_leaf(name, got[name], leaf, what=what)


def check_leaf(name: str, got: Tensor, want: Tensor, *, what: str) -> None:
    """Raise `ValueError` unless `got` has the shape and dtype of `want`."""
    if got.shape == want.shape and got.dtype == want.dtype:
        return
    if got.numel() == 0 and want.numel() > 0:
        raise ValueError(
            f"{name}: {what} was donated to a compiled step and holds nothing any more; go on with the state the step returned, or compile with donate=False"
        )
    raise ValueError(
        f"{name}: {what} has {tuple(got.shape)} {got.dtype}, required {tuple(want.shape)} {want.dtype}; was it made for another program?"
    )
