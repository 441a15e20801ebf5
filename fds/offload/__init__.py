"""Where parameters live: `offload`; the stores; asynchronous file I/O."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.layout import Held, joined
from fds.offload.handles import FETCH, SHAPE, Home, Window, forget, hold, read_gradient, record
from fds.offload.store import FileStore, HostStore, Reference, StoreError
from fds.program import Lens, Program, same
from fds.sharding.zero import unflatten
from fds.transform import Transform, direct, parameters
from fds.tree import Params

__all__ = [
    "FileStore",
    "HostStore",
    "Reference",
    "StoreError",
    "compute_device",
    "forget",
    "offload",
    "read_gradient",
    "record",
    "to_host",
]


def compute_device() -> torch.device:
    """Where calls run: the accelerator if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_host(x: Tensor) -> Tensor:
    """`x` in host memory, page-locked where there is a CUDA device to copy to."""
    return x.to("cpu").pin_memory() if torch.cuda.is_available() and not x.is_meta else x if x.is_meta else x.to("cpu")


@direct
def offload(
    store: str | HostStore | FileStore = "cpu",
    *,
    match: str | Iterable[str] = "*",
    min_bytes: int = 0,
    ratio: float = 1.0,
    window: int = 2,
    groups: Mapping[str, Iterable[str]] | None = None,
) -> Transform:
    """Keep parameters away from the device, and bring them where they are used, site by site.

    Args:
        store: a `FileStore` or `HostStore`: the stored tree has handles (three numbers) in place of the parameters of a site, one for each dtype.
            Gradients are written to the store too. Train with ``optim.streamed(tx)``, which reads and writes both. Or "cpu": the stored tree
            holds the parameters themselves in host memory; on a machine without an accelerator the host *is* the device, and nothing moves.
        match: patterns of the leaves that go; what is not named stays.
        min_bytes: smaller leaves stay.
        ratio: the part of a site's bytes that goes, whole leaves in their order: between 0 and 1, some of it stays on the device.
        window: sites that are read ahead of their use, in the order of the last time, and as many written behind. Not for "cpu".
        groups: as of `shard`: leaves of different groups do not share a buffer in the store (`optim.grouped`).

    Later in the chain than `shard`, `cast` and `lora`: what they store is what goes. Before `checkpoint`: then what was fetched is dropped after
    the call, and fetched again in backward; else it stays until then.

    Law: bitwise the same values as without it. A state of handles is spent by the next step, donated or not.

    Raises `ValueError` for an unknown store, a pattern that matches nothing, a ratio out of [0, 1], a negative size or window.
    """
    if isinstance(store, str) and store != "cpu":
        raise ValueError(
            f"offload: store {store!r} is unknown; {tree.suggest(str(store), ['cpu'])}, or a FileStore or HostStore"
        )
    if not 0.0 <= ratio <= 1.0 or min_bytes < 0 or window < 0:
        raise ValueError(
            f"offload: ratio={ratio!r}, min_bytes={min_bytes!r}, window={window!r}; required a ratio in [0, 1], and the others >= 0"
        )
    apart = {g: (p,) if isinstance(p, str) else tuple(p) for g, p in (groups or {}).items()}
    patterns = [match] if isinstance(match, str) else list(match)
    given: dict[str, Any] = {
        "match": (match, "*"),
        "min_bytes": (min_bytes, 0),
        "ratio": (ratio, 1.0),
        "window": (window, 2),
        "groups": (apart, {}),
    }
    options = {"store": store} | {k: v for k, (v, default) in given.items() if v != default}

    def check(program: Program) -> None:
        leaves = [tree.qualified(s, k) for s, p in (program.sites or {"": program}).items() for k in parameters(p)]
        tree.select(leaves, patterns, what="offload: match")

    def chosen(p: Program) -> list[str]:
        spec = {
            k: v
            for k, v in parameters(p).items()
            if any(tree.matches(g, k) for g in patterns) and v.nbytes >= min_bytes
        }
        left, names = ratio * sum(v.nbytes for v in spec.values()), list[str]()
        for k, v in spec.items():
            if v.nbytes <= left + 1e-6:
                names.append(k)
                left -= v.nbytes
        return names

    ahead = None if isinstance(store, str) else Window(store, window)

    def lens(p: Program) -> Lens | None:
        names = chosen(p)
        return (_moved(names) if ahead is None else _away(p, names, ahead, apart)) if names else None

    return Transform(
        "offload",
        tuple(options.items()),
        lens=lens,
        check=check,
        provides=frozenset(["offload", "layout"]),
        conflicts=frozenset(["offload", "whole"]),
    )


def _moved(names: list[str]) -> Lens:
    """In host memory as they are."""

    def put(params: Params) -> Params:
        return {k: to_host(v) if k in names else v for k, v in params.items()}

    def get(stored: Params) -> Params:
        device: Any = compute_device()
        return {k: v if v.is_meta or k not in names else v.to(device, non_blocking=True) for k, v in stored.items()}

    return Lens(put, get, layout=same, host=frozenset(names))


def _away(p: Program, names: list[str], window: Window, apart: Mapping[str, tuple[str, ...]]) -> Lens:
    """In a store: one flat buffer for the leaves of one dtype, trainability, sharding and group, so that a site is one read."""
    spec = parameters(p)
    groups: dict[str, list[str]] = {}
    splits = list(dict.fromkeys([(), *(p.axes.get(k, ()) for k in names)]))
    for k in names:
        leaf, split = spec[k], splits.index(p.axes.get(k, ()))
        kind = ["offload", str(leaf.dtype).removeprefix("torch.")]
        kind += [f"split{split}"] if split else []
        group = tree.group_of(k, apart) if apart and leaf.requires_grad else None
        kind += [] if group is None else [group]
        groups.setdefault(".".join(kind if leaf.requires_grad else [*kind, "frozen"]), []).append(k)
    device: Any = compute_device()
    sizes = {key: sum(spec[k].numel() for k in members) for key, members in groups.items()}

    def put(params: Params) -> Params:
        out = {k: v for k, v in params.items() if k not in names}
        for key, members in groups.items():
            leaves = [params[k] for k in members]
            trainable = any(x.requires_grad for x in leaves)
            if leaves[0].is_meta:
                out[key] = torch.empty(SHAPE, dtype=torch.float64, device="meta").requires_grad_(trainable)
            else:
                out[key] = hold(window, members[0], torch.cat([x.reshape(-1) for x in leaves])).requires_grad_(
                    trainable
                )
        window.settle()
        return out

    def get(stored: Params) -> Params:
        out = {k: v for k, v in stored.items() if k not in groups}
        for key, members in groups.items():
            shapes = {k: spec[k].shape for k in members}
            out |= unflatten(FETCH(stored[key], [sizes[key]], spec[members[0]].dtype, device), shapes)
        return {k: out[k] for k in spec}

    def layout(held: Held) -> Held:
        gone = {
            key: joined([(spec[k].numel(), held[k]) for k in members], 0, sizes[key]) for key, members in groups.items()
        }
        return {k: v for k, v in held.items() if k not in names} | gone

    axes = {key: p.axes.get(members[0], ()) for key, members in groups.items()}
    homes = {key: Home(window, (sizes[key],), spec[members[0]].dtype) for key, members in groups.items()}
    return Lens(put, get, axes={k: v for k, v in axes.items() if v}, handles=homes, layout=layout)
