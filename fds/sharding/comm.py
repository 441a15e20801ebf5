"""Start-up: `init_distributed` finds the job, chooses the back end, and starts torch's process group."""

import importlib
import logging
import math
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from fds import tree
from fds._torch import default_store, set_timeout
from fds.sharding import liveness
from fds.sharding.discovery import TORCH_DISTRIBUTED_DEFAULT_PORT, Place, discover

LOG = logging.getLogger("fds.sharding")

default_pg_timeout: timedelta  # computed when it is asked for: see `__getattr__`

# Back ends by name: what registers them with torch where torch itself does not have them, and what to do if they are missing.
_BACKENDS: dict[str, tuple[tuple[str, ...], str]] = {
    "nccl": ((), "install a CUDA or ROCm build of torch"),
    "gloo": ((), "install a build of torch with gloo"),
    "mpi": ((), "build torch from source on a machine with MPI; ranks that mpirun has started can use gloo or nccl"),
    "ccl": (("oneccl_bindings_for_pytorch",), "install oneccl_bindings_for_pytorch (Intel)"),
    "hccl": (("torch_npu", "habana_frameworks.torch.distributed.hccl"), "install torch_npu (Ascend), or Habana's habana_frameworks"),
    "sccl": ((), "import the vendor's package that registers it with torch.distributed first"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "default_pg_timeout":
        return default_timeout(os.environ)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def default_timeout(env: Mapping[str, str]) -> timedelta:
    """DEEPSPEED_TIMEOUT minutes, by default 30.

    >>> default_timeout({"DEEPSPEED_TIMEOUT": "10"})
    datetime.timedelta(seconds=600)
    """
    text = env.get("DEEPSPEED_TIMEOUT", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise ValueError(f"DEEPSPEED_TIMEOUT={text!r}, required a number of minutes > 0")
    return timedelta(minutes=minutes)


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start `torch.distributed`'s process group, on every rank of the job; `fds.sharding.mesh` calls it where it is needed.

    Who this process is, `discover` reads from the environment (torchrun, MPI, Slurm, Azure ML, SageMaker); what it finds is set there as
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and on CUDA the local rank's device becomes the current one. A process that
    nothing has launched gets a group of its own.

    A group that is running already is adopted: `dist_backend`, `rank` and `world_size` have to fit it, a `timeout` is set on it, and
    `init_method` has nothing left to do. Every rank has to make the call then as well, since ranks exchange the addresses by which a
    failed collective finds the rank that is gone (`fds.sharding.RankError`; what is possible stands at `fds.sharding.liveness.explained`).

    Args:
        dist_backend: nccl, gloo, mpi, ccl, hccl, sccl, or any that is registered with torch; or by device, ``"cpu:gloo,cuda:nccl"``, which is
            the default beside CUDA, since what `offload` keeps in host memory is summed there. Default elsewhere: gloo.
        auto_mpi_discovery: look for MPI, Slurm, Azure ML and SageMaker too; False: for torchrun's variables only.
        distributed_port: rank 0's port, where neither MASTER_PORT nor the platform names one.
        verbose: log what was found on rank 0, to the logger "fds.sharding" at level INFO.
        timeout: of every operation of the group, and of waiting for all ranks at the start. Default: `default_pg_timeout`,
            DEEPSPEED_TIMEOUT minutes or 30.
        init_method: how ranks meet, a URL of torch (``tcp://host:port``, ``file:///shared/file``). Default: at MASTER_ADDR:MASTER_PORT.
        rank, world_size: of this process, in place of what the environment says; both or neither.

    Raises:
        ValueError: variables or arguments are missing or contradict each other, or the back end is unknown or not available here.
    """
    if not dist.is_available():
        raise ValueError("init_distributed: this build of torch has no torch.distributed; install one that has it")
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ValueError(f"timeout: {timeout!r}, required a positive datetime.timedelta")
    if type(distributed_port) is not int or not 0 < distributed_port < 1 << 16:
        raise ValueError(f"distributed_port: {distributed_port!r}, required 1 to 65535")
    if (rank < 0) != (world_size < 0):
        raise ValueError(f"rank {rank}, world_size {world_size}: give both, or neither")
    if dist.is_initialized():
        _adopt(dist_backend, timeout, rank, world_size)
        return
    init_method = None if init_method == "env://" else init_method
    backend = _backend(dist_backend)
    timeout = timeout or default_timeout(os.environ)
    place = _place(init_method, rank, world_size, distributed_port, auto_mpi_discovery)
    if place is None:
        place = Place("nothing: a single process", 0, 1, 0, "127.0.0.1", distributed_port)
    else:
        unknown = ("MASTER_ADDR", "MASTER_PORT") if init_method else ()  # and a local rank that nobody has told
        unknown += ("LOCAL_RANK",) if init_method and rank >= 0 else ()
        os.environ.update({k: v for k, v in place.variables.items() if k not in unknown})
    _take_device(place.local_rank)
    if verbose and place.rank == 0:
        where = init_method or f"{place.master_addr}:{place.master_port}"
        LOG.info("%d ranks by %s, back end %s, meeting at %s, timeout %s", place.world_size, place.launcher, backend, where, timeout)  # fmt: skip
    if backend == "mpi":
        dist.init_process_group("mpi", timeout=timeout)  # MPI counts its ranks itself
        return
    alone = place.world_size == 1 and init_method is None
    meet: dict[str, Any] = {"init_method": init_method or "env://"}
    if alone:
        meet = {"store": dist.HashStore()}
    elif init_method is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        meet = {"store": _agents_store(place, timeout)}
    dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, timeout=timeout, **meet)
    _watch(urlparse(init_method).hostname if init_method else place.master_addr)


def world_size(env: Mapping[str, str] | None = None) -> int:
    """Ranks of the job: of the running process group, else by the environment; 1 where nothing was launched."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    place = discover(os.environ if env is None else env)
    return place.world_size if place else 1


def _place(init_method: str | None, rank: int, world_size: int, port: int, platforms: bool) -> Place | None:
    env = dict(os.environ)
    if rank >= 0:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if init_method and not torch.cuda.is_available():  # only CUDA's device needs it
            env.setdefault("LOCAL_RANK", "0")
    if init_method:  # `discover` shall not look for a host that is given
        url = urlparse(init_method)
        env |= {"MASTER_ADDR": url.hostname or "127.0.0.1", "MASTER_PORT": str(url.port or port)}
    return discover(env, port=port, platforms=platforms)


def _adopt(backend: str | None, timeout: timedelta | None, rank: int, world_size: int) -> None:
    """Hold the arguments against the group that is running."""
    running = {part.rpartition(":")[2] for part in dist.get_backend_config().split(",")}
    asked = _names(backend) if backend else set()
    if not asked <= running:
        raise ValueError(
            f"dist_backend: {backend!r}, but a process group is running on {', '.join(sorted(running))}; leave dist_backend out, or destroy that group"
        )
    have = (dist.get_rank(), dist.get_world_size())
    if rank >= 0 and (rank, world_size) != have:
        raise ValueError(
            f"rank {rank} of {world_size}, but the running process group has this as rank {have[0]} of {have[1]}"
        )
    if timeout is not None:
        set_timeout(timeout)
    if not liveness.watched():
        _watch(os.environ.get("MASTER_ADDR"))


def _agents_store(place: Place, timeout: timedelta) -> Any:
    """torchrun's store, with keys of this start's own.

    It outlives the workers. A worker that torchrun starts again would find the addresses of dead ones there, and wait for them (torch 2.13).
    """
    store = dist.TCPStore(place.master_addr, place.master_port, place.world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _watch(master: str | None) -> None:
    store = default_store()
    if dist.get_world_size() > 1 and store is not None:
        liveness.watch(store, dist.get_rank(), dist.get_world_size(), master)


def _take_device(local_rank: int) -> None:
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if 1 < count <= local_rank:
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but {count} CUDA devices are visible; start at most {count} ranks per node, or widen CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank if count > 1 else 0)  # launchers may show each rank its own device only


def _names(backend: str) -> set[str]:
    return {part.rpartition(":")[2].strip().lower() for part in backend.split(",")}


def _backend(name: str | None) -> str:
    """The back end to use, which is available."""
    if name is None:
        return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    registered = cast("list[str]", dist.Backend.backend_list)
    for part in _names(name):
        plugins, remedy = _BACKENDS.get(part, ((), "it is registered with torch, but not built in"))
        if part not in _BACKENDS and (part not in registered or part == dist.Backend.UNDEFINED):
            raise ValueError(
                f"dist_backend: {name!r} is unknown; {tree.suggest(part, {*_BACKENDS, *registered} - {'undefined'})}"
            )
        if not _available(part, plugins):
            raise ValueError(
                f"dist_backend: {part!r} is not available with torch {torch.__version__}; {remedy}, or leave dist_backend out"
            )
        if part == "nccl" and not torch.cuda.is_available():
            raise ValueError(
                "dist_backend: 'nccl' needs a CUDA device, and none is visible (CUDA_VISIBLE_DEVICES); use 'gloo', or leave it out"
            )
    return name.lower()


def _available(name: str, plugins: tuple[str, ...]) -> bool:
    for plugin in plugins:
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            if not plugin.startswith(error.name or " "):
                raise
    return name in cast("list[str]", dist.Backend.backend_list) and dist.is_backend_available(name)
