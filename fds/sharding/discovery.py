"""Who is this process in its job: what launchers put into the environment, read by a pure function of it."""

import json
import re
from collections.abc import Callable, Mapping

import attrs

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
DEFAULT_AML_MASTER_PORT = 54965
DEFAULT_AML_NCCL_SOCKET_IFNAME = "^docker0,lo"

_AML_PORT_ON_SEVERAL_NODES = 6105  # of Azure ML's own recipe, as 54965 on one node
_EXPLICIT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOCAL = "127.0.0.1"
_Found = tuple[str, int]  # a variable and its number


@attrs.frozen
class Place:
    """One process's place in a job, and how the ranks meet: rank 0 listens at `master_addr`:`master_port`.

    `launcher` says who told; `defaults` are further variables that the platform needs, where nobody has set them.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    defaults: Mapping[str, str] = attrs.Factory(dict)

    @property
    def variables(self) -> dict[str, str]:
        """What to set in the environment, so that torch finds it there."""
        values = (self.rank, self.world_size, self.local_rank, self.master_addr, self.master_port)
        return {**self.defaults, **{name: str(value) for name, value in zip(_EXPLICIT, values, strict=True)}}


@attrs.frozen
class _Launcher:
    """The variables of a launcher; each field holds the names that mean it, the first one found counts."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()

    @property
    def needed(self) -> dict[str, tuple[str, ...]]:
        return {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}


_OPEN_MPI = _Launcher("Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",))  # fmt: skip
_MVAPICH = _Launcher("MVAPICH", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",))  # fmt: skip
# MPICH and Intel MPI; on Cray machines PALS starts the processes.
_PMI = _Launcher("PMI", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"), ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE"))  # fmt: skip
_SLURM = _Launcher("Slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",))
_SLURM_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")
_SLURM_HOSTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")


def discover(env: Mapping[str, str], *, port: int = TORCH_DISTRIBUTED_DEFAULT_PORT, platforms: bool = True) -> Place | None:  # fmt: skip
    """The place that `env` gives to a process, or None where nothing was launched: a single process.

    torchrun's five variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) decide when all are there. Else the first of Azure ML,
    SageMaker, Open MPI, MVAPICH, PMI (MPICH, Intel MPI) and Slurm that has left its variables gives what is missing, and has to agree with
    those of the five that are set. A process of a Slurm job that `srun` did not start (the batch script itself) is a single process.

    Args:
        env: variables, such as `os.environ`; an empty value counts as unset.
        port: of rank 0, where neither MASTER_PORT nor the platform names one.
        platforms: False: look at torchrun's variables only.

    Raises:
        ValueError: variables are missing, are no numbers, or contradict each other; it names them.

    >>> discover({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"})
    Place(launcher='Slurm', rank=3, world_size=4, local_rank=1, master_addr='gpu07', master_port=29500, defaults={})
    >>> discover({}) is None
    True
    """
    env = {name: value for name, value in env.items() if value != ""}
    launcher = None if all(name in env for name in _EXPLICIT) or not platforms else _launcher(env)
    if launcher is None:
        return _explicit(env, port)
    _complete(env, launcher.needed, launcher.name)
    found = {name: _found(env, names) for name, names in launcher.needed.items()}
    for name, (source, value) in found.items():
        if name in env and _number(env, name) != value:
            raise ValueError(
                f"{name}={env[name]}, but {source}={value} ({launcher.name}); unset {name}, or set all of {', '.join(_EXPLICIT)}"
            )
    rank, world_size, local_rank = (value for _, value in found.values())
    local_size = next((_found(env, (n,)) for n in launcher.local_size if n in env), None)
    _consistent(found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], local_size)
    one_node = world_size == 1 or (local_size is not None and local_size[1] == world_size)
    name, host, usual_port, defaults = _meeting(env, launcher, world_size, one_node, port)
    address = env["MASTER_ADDR"] if "MASTER_ADDR" in env else host()
    return Place(name, rank, world_size, local_rank, address, _port(env, usual_port), defaults)


def _explicit(env: Mapping[str, str], port: int) -> Place | None:
    """The place by torchrun's variables alone."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    alone = env.get("WORLD_SIZE") == "1"
    if not alone:
        _complete(env, {name: (name,) for name in _EXPLICIT}, "the environment")
    rank, world_size, local_rank = ((n, _number(env, n, "0")) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = ("LOCAL_WORLD_SIZE", _number(env, "LOCAL_WORLD_SIZE")) if "LOCAL_WORLD_SIZE" in env else None
    _consistent(rank, world_size, local_rank, local_size)
    return Place("torchrun", rank[1], world_size[1], local_rank[1], env.get("MASTER_ADDR", _LOCAL), _port(env, port))


def _launcher(env: Mapping[str, str]) -> _Launcher | None:
    for launcher in (_OPEN_MPI, _MVAPICH, _PMI):
        if any(name in env for names in launcher.needed.values() for name in names):
            # srun speaks PMI itself (--mpi=pmi2); under mpirun in a Slurm job the two count differently.
            if launcher is _PMI and _srun(env) and env.get("PMI_RANK") == env["SLURM_PROCID"]:
                return _SLURM
            return launcher
    hosts = _sagemaker_hosts(env) if "SM_HOSTS" in env else []
    if len(hosts) > 1 and "RANK" not in env and "WORLD_SIZE" not in env:
        raise ValueError(
            f"SM_HOSTS names {len(hosts)} hosts, but neither RANK and WORLD_SIZE nor OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE are set; "
            'give the SageMaker estimator a distribution, as in distribution={"mpi": {"enabled": True}}'
        )
    return _SLURM if _srun(env) else None


def _srun(env: Mapping[str, str]) -> bool:
    """Whether this is a task of a Slurm step. A batch script has SLURM_PROCID and SLURM_NTASKS as well, and is alone."""
    return "SLURM_PROCID" in env and any(name in env for name in _SLURM_STEP)


def _meeting(
    env: Mapping[str, str], launcher: _Launcher, size: int, one_node: bool, port: int
) -> tuple[str, Callable[[], str], int, dict[str, str]]:
    """(name of the platform, function that gives rank 0's host, port, further variables)."""
    if launcher is _SLURM:
        return "Slurm", lambda: _first_host(env), port, {}
    if launcher is _OPEN_MPI and "AZUREML_EXPERIMENT_ID" in env and "DLTS_JOB_ID" not in env:
        source = "AZ_BATCHAI_MPI_MASTER_NODE" if one_node else "AZ_BATCH_MASTER_NODE"
        further = {"NCCL_SOCKET_IFNAME": env.get("NCCL_SOCKET_IFNAME", DEFAULT_AML_NCCL_SOCKET_IFNAME)}
        usual = DEFAULT_AML_MASTER_PORT if one_node else _AML_PORT_ON_SEVERAL_NODES
        return "Azure ML", lambda: _host(env, source, "Azure ML").split(":")[0], usual, further
    if launcher is _OPEN_MPI and ("SM_TRAINING_ENV" in env or "SM_HOSTS" in env):
        usual = _number(env, "SM_MASTER_PORT", str(port))
        return "SageMaker", lambda: _LOCAL if one_node else _sagemaker_host(env), usual, {}

    def host() -> str:
        if one_node:
            return _LOCAL
        raise ValueError(
            f"MASTER_ADDR is missing: {launcher.name} started {size} ranks, not all on one node ({launcher.local_size[0]}="
            f"{env.get(launcher.local_size[0], 'unset')}), and names no host of rank 0; export MASTER_ADDR=<its host> for every rank, with Open MPI by `mpirun -x MASTER_ADDR=...`"
        )

    return launcher.name, host, port, {}


def _sagemaker_host(env: Mapping[str, str]) -> str:
    return env["SM_MASTER_ADDR"] if "SM_MASTER_ADDR" in env else min(_sagemaker_hosts(env))


def _sagemaker_hosts(env: Mapping[str, str]) -> list[str]:
    text = _host(env, "SM_HOSTS", "SageMaker")
    try:
        return [str(host) for host in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'SM_HOSTS={text!r} is no list in JSON like \'["algo-1", "algo-2"]\'; set MASTER_ADDR'
        ) from error


def _host(env: Mapping[str, str], name: str, who: str) -> str:
    if name not in env:
        raise ValueError(f"{name} is missing, which names the host of rank 0 under {who}; set it, or MASTER_ADDR")
    return env[name]


def _first_host(env: Mapping[str, str]) -> str:
    """The first host of a Slurm step: ``gpu[07-09,12],login`` -> ``gpu07``. Slurm puts task 0 there.

    The node that `srun` was called on (SLURM_LAUNCH_NODE_IPADDR) may run no task, so it comes last.
    """
    name = next((n for n in _SLURM_HOSTS if n in env), None)
    if name is None:
        raise ValueError(
            f"{' or '.join(_SLURM_HOSTS)}: one is needed to find the host of rank 0; set it, or MASTER_ADDR"
        )
    if name == "SLURM_LAUNCH_NODE_IPADDR":
        return env[name]
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+(?=,|$)", env[name])
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else ""
    if not host or set("[],") & set(host):
        raise ValueError(f"{name}={env[name]!r} is no list of hosts like 'gpu[07-09,12],gpu20'; set MASTER_ADDR")
    return host


def _found(env: Mapping[str, str], names: tuple[str, ...]) -> _Found:
    name = next(n for n in names if n in env)
    return name, _number(env, name)


def _complete(env: Mapping[str, str], needed: Mapping[str, tuple[str, ...]], who: str) -> None:
    missing = [" or ".join(names) for names in needed.values() if not any(n in env for n in names)]
    if missing:
        there = [f"{n}={env[n]}" for names in needed.values() for n in names if n in env]
        hint = "; a rank that is alone on its node has LOCAL_RANK=0" if missing == ["LOCAL_RANK"] else ""
        raise ValueError(
            f"{', '.join(missing)} missing beside {', '.join(there)} ({who}); set {'it' if len(missing) == 1 else 'them'}, or start the job with torchrun{hint}"
        )


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    text = env.get(name, default)
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ValueError(f"{name}={text!r}, required a whole number >= 0")
    return int(text)


def _port(env: Mapping[str, str], usual: int) -> int:
    port = _number(env, "MASTER_PORT", str(usual))
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port}, required 1 to 65535")
    return port


def _consistent(rank: _Found, world_size: _Found, local_rank: _Found, local_size: _Found | None) -> None:
    """Raise unless the numbers can be true together; each comes with the variable that gave it."""
    shown = ["=".join(map(str, pair)) for pair in (rank, world_size, local_rank)]
    if rank[1] >= world_size[1]:
        raise ValueError(f"{shown[0]}, {shown[1]}: ranks go from 0 to {max(world_size[1] - 1, 0)}")
    if local_rank[1] > rank[1]:
        raise ValueError(
            f"{shown[2]}, {shown[0]}: a rank counts the lower ranks of its node, and there are only {rank[1]} lower ones"
        )
    if local_size is not None and not local_rank[1] < local_size[1] <= world_size[1]:
        raise ValueError(
            f"{local_size[0]}={local_size[1]}, {shown[2]}, {shown[1]}: required {local_rank[0]} < {local_size[0]} <= {world_size[0]}"
        )
