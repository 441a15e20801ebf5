"""Meshes of ranks, over `torch.distributed`'s `DeviceMesh`: `mesh(dp=2)["dp"]` is the `Axis` that transformations take."""

import math
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from fds import tree
from fds._torch import get_timeout, set_timeout
from fds.sharding import collectives, comm


@attrs.frozen
class Axis:
    """One axis of a mesh, as seen by this rank: its size, the rank's place on it, and the *name* of its process group.

    A value without process handles: it prints, compares, and goes into transformations and compiled graphs.
    """

    name: str
    size: int
    rank: int = attrs.field(eq=False, repr=False)
    group: str = attrs.field(repr=False, default="")
    stride: int = attrs.field(eq=False, repr=False, default=1)  # ranks of the mesh from one of the axis to its next

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the axis, on every rank."""
        return collectives.total(x, self)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over the axis, on every rank."""
        return self.sum(x) / self.size

    def barrier(self) -> None:
        """Wait until every rank of the axis is here."""
        if self.size > 1:
            with collectives.collective("barrier", torch.empty(0), self.group) as ranks:
                dist.barrier(group=ranks)


def check_axis(what: str, axis: Any) -> None:
    """`ValueError` for something else than an axis of a mesh, as the mesh itself."""
    if not isinstance(axis, Axis):
        raise ValueError(f"{what}: got {axis!r}, required an axis of a mesh, as in {what}(mesh['dp'])")


class Mesh:
    """Named axes over the ranks of a job: ``mesh["dp"]`` is an `Axis`; ``mesh.device`` is this rank's device."""

    def __init__(self, axes: dict[str, Axis], device: torch.device) -> None:
        self.axes, self.device = axes, device

    def __getitem__(self, name: str) -> Axis:
        if name not in self.axes:
            raise ValueError(f"mesh: no axis {name!r}; {tree.suggest(name, self.axes)}")
        return self.axes[name]

    @property
    def size(self) -> int:
        """Ranks in the mesh."""
        return math.prod(a.size for a in self.axes.values())

    @property
    def rank(self) -> int:
        """This process's place in the mesh, counted along the last axis first."""
        rank = 0
        for a in self.axes.values():
            rank = rank * a.size + a.rank
        return rank

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{a.name}={a.size}' for a in self.axes.values())})"


def mesh(**sizes: int) -> Mesh:
    """A mesh of the job's ranks, for example ``mesh(dp=2)`` or ``mesh(dp=-1, tp=2)``; one size may be -1, "what is left".

    In a job of several ranks it starts the process group if nobody has (`fds.init_distributed`: torchrun, MPI, Slurm and others). In a single
    process it needs no group at all.

    Raises:
        ValueError: the sizes do not multiply to the number of ranks.

    >>> mesh(dp=1)["dp"]
    Axis(name='dp', size=1)
    """
    world = _start()
    sizes = _resolve(sizes, world)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if world == 1:
        return Mesh({n: Axis(n, 1, 0) for n in sizes}, device)
    from torch.distributed.device_mesh import init_device_mesh  # costs import time, needed only with several ranks

    ranks = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    strides = [math.prod(list(sizes.values())[i + 1 :]) for i in range(len(sizes))]
    return Mesh({n: _axis(ranks, n, size, s) for (n, size), s in zip(sizes.items(), strides, strict=True)}, device)


def _axis(ranks: Any, name: str, size: int, stride: int) -> Axis:
    group = ranks.get_group(name)
    timeout = get_timeout()
    if timeout is not None:
        set_timeout(timeout, group)  # torch gives every group but the first its own default
    return Axis(name, size, dist.get_rank(group), group.group_name if size > 1 else "", stride)


def _start() -> int:
    """The number of ranks, with the process group running if there is more than one."""
    ranks = comm.world_size()
    if ranks > 1:
        comm.init_distributed()
    return ranks


def _resolve(sizes: dict[str, int], world: int) -> dict[str, int]:
    if not sizes:
        raise ValueError("mesh: no axis given; name at least one, as in mesh(dp=-1)")
    bad = {n: s for n, s in sizes.items() if not isinstance(s, int) or (s < 1 and s != -1)}
    free = [n for n, s in sizes.items() if s == -1]
    if bad or len(free) > 1:
        raise ValueError(f"mesh: sizes {sizes}: each has to be a positive whole number, and at most one -1")
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if world % fixed or (not free and fixed != world):
        raise ValueError(
            f"mesh: sizes {sizes} multiply to {fixed}, the job has {world} rank{'s'[: world > 1]}; start it with `torchrun --nproc-per-node {fixed}`, or use {next(iter(sizes))}=-1"
        )
    return {n: world // fixed if s == -1 else s for n, s in sizes.items()}
