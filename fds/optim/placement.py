"""Where optimizer state lives: split over ranks (`sharded`, ZeRO-1/2), or in host memory (`offloaded`)."""

from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.layout import Part
from fds.optim.base import Axis, Member, Norm, Optimizer, check_like
from fds.sharding import collectives
from fds.sharding.zero import shard_boxes


def sharded(tx: Optimizer, axis: Axis) -> Optimizer:
    """Keep 1/n of the state on each of the n ranks, for parameters that every rank holds whole (ZeRO-1; with the reduced gradients, ZeRO-2).

    Gradients come in local to the rank (of its own mean loss) and are reduce-scattered to their mean, one flat shard per dtype; the rank
    updates its shard, and the updates are gathered. Traffic: 2 x parameters per step.
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.

    Raises `ValueError` for a `tx` that is sharded already, and for gradients that did not go through `reduce`.
    """
    if tx.axis is not None:
        raise ValueError(
            "sharded: the optimizer inside is sharded already; shard it once, outermost: sharded(tx, axis)"
        )

    def reduce(grads: Any) -> dict[str, Tensor]:
        return {k: collectives.scatter(flat, axis, reduce="mean") for k, flat in _flat(grads, axis.size).items()}

    def own(params: Any) -> dict[str, Tensor]:
        return {k: flat.chunk(axis.size)[axis.rank].clone() for k, flat in _flat(params, axis.size).items()}

    def init(params: Any) -> Any:
        return tx.init(own(params))

    def norm_over(grads: Any) -> Tensor:
        return axis.sum(tree.square_sum(tree.leaves(grads))).sqrt()

    def update(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm = norm_over) -> tuple[Any, Any]:
        mine = own(params)
        _check_shards(grads, mine)
        updates, state = tx.update(grads, state, mine, norm=norm)
        gathered = {k: collectives.gather(u.to(mine[k].dtype), axis) for k, u in updates.items()}
        return _unflat(gathered, params), state

    def step(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any] | None:  # fmt: skip
        mine = own(params)
        _check_shards(grads, mine)
        done = None if tx.step is None else tx.step(grads, state, mine, norm=norm, ok=ok, donated=donated)
        if done is None:
            return None
        return _unflat({k: collectives.gather(v, axis) for k, v in done[0].items()}, params), done[1]

    def members(params: Any) -> list[Member]:
        parts: list[Part] = optree.tree_leaves(params)
        return [
            Member((), "", tx, {k: _shard([parts[i] for i in where], k, axis) for k, where in _groups(params).items()})
        ]

    return Optimizer(init, update, reduce, axis, step if tx.step is not None else None, tx.stream, members)


def _shard(parts: list[Part], key: str, axis: Axis) -> Part:
    """What this rank has of the parameters of one dtype."""
    size = -(-sum(p.held.numel() for p in parts) // axis.size)
    own = torch.empty(size, dtype=parts[0].dtype, device="meta")
    boxes = shard_boxes([(p.held.numel(), p.boxes) for p in parts], axis)
    return Part(key, own, own, boxes, f"{axis.rank} of {axis.size}", all(p.host for p in parts))


def _check_shards(grads: Any, mine: dict[str, Tensor]) -> None:
    got = {k: tuple(v.shape) for k, v in grads.items() if isinstance(v, Tensor)}
    want = {k: tuple(v.shape) for k, v in mine.items()}
    if got != want:
        raise ValueError(
            f"sharded: gradients {got or sorted(grads)}, required shards {want}; pass tx.reduce(grads), of gradients in the parameters' dtypes"
        )


def _groups(params: Any) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, leaf in enumerate(optree.tree_leaves(params)):
        groups.setdefault(str(leaf.dtype).removeprefix("torch."), []).append(i)
    return groups


def _flat(params: Any, n: int) -> dict[str, Tensor]:
    """One vector per dtype, padded to a multiple of n."""
    leaves = optree.tree_leaves(params)
    joined = {k: torch.cat([leaves[i].reshape(-1) for i in where]) for k, where in _groups(params).items()}
    return {k: F.pad(v, (0, -v.numel() % n)) for k, v in joined.items()}


def _unflat(flat: dict[str, Tensor], params: Any) -> Any:
    leaves, spec = optree.tree_flatten(params)
    for k, where in _groups(params).items():
        sizes = [leaves[i].numel() for i in where]
        parts = torch.split(flat[k], [*sizes, flat[k].numel() - sum(sizes)])
        for i, part in zip(where, parts, strict=False):
            leaves[i] = part.view(leaves[i].shape)
    return optree.tree_unflatten(spec, leaves)


def offloaded(tx: Optimizer, device: str = "cpu") -> Optimizer:
    """Keep the state in host memory (page-locked beside CUDA); each leaf's state visits the device for its own update.

    `tx` has to treat leaves independently, apart from the norm it is given; all rules of `fds.optim` do. A `sharded` one goes outside:
    ``sharded(offloaded(tx), axis)``. On a machine without an accelerator the host is the device, and nothing moves.
    """
    if device != "cpu":
        raise ValueError(f"offloaded: device {device!r} is unknown; {tree.suggest(device, ['cpu'])}")
    if tx.axis is not None:
        raise ValueError("offloaded: a sharded optimizer inside; turn it round: sharded(offloaded(tx), axis)")

    def init(params: Any) -> list[Any]:
        return [tree.map(_host, tx.init(p)) for p in optree.tree_leaves(params)]

    def update(grads: Any, state: list[Any], params: Any, *, norm: Norm = tree.norm) -> tuple[Any, list[Any]]:
        check_like(grads, params)
        flat, spec = optree.tree_flatten(params)
        known = norm(grads)
        updates: list[Tensor] = []
        states: list[Any] = []
        for p, g, s in zip(flat, optree.tree_leaves(grads), state, strict=True):
            u, s = tx.update(g, tree.map(lambda t, d=p.device: t.to(d, non_blocking=True), s), p, norm=lambda _: known)
            updates.append(u)
            states.append(tree.map(_host, s))
        return optree.tree_unflatten(spec, updates), states

    def members(params: Any) -> list[Member]:
        return [Member((i,), "", tx, p, host=True) for i, p in enumerate(optree.tree_leaves(params))]

    return Optimizer(init, update, members=members)


def _host(x: Tensor) -> Tensor:
    """`x` in host memory; counts and hyperparameters too: every piece of state has one home. Page-locked, except inside of a compiled region."""
    if x.is_meta:
        return x
    if x.is_cuda and not torch.compiler.is_compiling():
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x)
    return x.to("cpu")
