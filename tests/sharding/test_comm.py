"""Start-up, and what happens when a rank goes: jobs of real processes, which see nothing but a launcher's variables."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fds
from fds._torch import get_timeout
from fds.sharding import comm, liveness
from fds.sharding.discovery import _EXPLICIT
from fds.sharding.launch import _free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def job(n, launcher, task, *args, ranks=None):
    """Run ``task(*args)`` of this file on n fresh processes; (stdout, stderr, exit status) of the first `ranks`, the others are killed then."""
    port = str(_free_port())
    base = {k: v for k, v in os.environ.items() if k not in _EXPLICIT}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": port}
    base |= {"torchrun": {"MASTER_ADDR": "127.0.0.1"}, "Open MPI": {"OMPI_COMM_WORLD_LOCAL_SIZE": str(n)}, "Slurm": {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}}[launcher]  # fmt: skip
    rank, world, local = LAUNCHERS[launcher]
    command = [sys.executable, __file__, task, *map(str, args)]
    workers = [
        subprocess.Popen(
            command, env=base | {rank: str(r), world: str(n), local: str(r)}, stdout=-1, stderr=-1, text=True
        )
        for r in range(n)
    ]
    try:
        return [(*w.communicate(timeout=240), w.returncode) for w in workers[:ranks]]
    finally:
        for w in workers:
            w.kill()
            w.communicate()


# --- what the ranks run ---


def lose(gone):
    """Rank `gone` ends before the second sum; the others leave with an error, as an ordinary script does."""
    fds.init_distributed(timeout=timedelta(seconds=60))
    axis = fds.sharding.mesh(dp=-1)["dp"]
    x = torch.ones(4, requires_grad=True)
    assert axis.sum(x).tolist() == [axis.size] * 4
    for address in liveness._WATCH[0].addresses:  # whoever scans ports; it has to change nothing
        with socket.create_connection(address) as s:
            s.sendall(b'GET / HTTP/1.1\n\xff\n[]\n{"rank": 99, "gone": [1]}\n{"rank": 3, "gone": "x"}\n')
    dist.barrier()
    if axis.rank == int(gone):
        os._exit(7)
    began = time.monotonic()
    try:
        axis.sum(x)
    except fds.sharding.RankError as error:
        names = {k: os.environ[k] for k in _EXPLICIT}
        print(json.dumps({"gone": error.gone, "text": str(error), "took": time.monotonic() - began, "env": names}))
        raise


def stall():
    """Rank 1 is busy for longer than the timeout of a group that is not the first of the job."""
    fds.init_distributed(timeout=timedelta(seconds=2), init_method="env://")
    axis = fds.sharding.mesh(dp=2, tp=1)["dp"]
    axis.barrier()
    if axis.rank == 1:
        time.sleep(600)
    began = time.monotonic()
    try:
        torch.autograd.grad(fds.sharding.collectives.gather(torch.ones(2, requires_grad=True), axis).sum(), [])
    except fds.sharding.RankError as error:
        print(json.dumps({"gone": error.gone, "silent": error.silent, "took": time.monotonic() - began}))
    os._exit(0)


# --- tests ---


@pytest.mark.parametrize(("n", "gone", "launcher"), [(2, 0, "Open MPI"), (4, 1, "Slurm")])
def test_a_rank_that_ends_is_named_by_all_the_others(n, gone, launcher):
    for rank, (out, err, status) in enumerate(job(n, launcher, "lose", gone)):
        if rank == gone:
            assert status == 7
            continue
        assert status == 1, err
        said = json.loads(out)
        assert said["gone"] == [gone]  # also on ranks that waited for a survivor, and when rank 0 kept the store
        assert f"total on rank {rank}: rank {gone} of {n} is gone" in said["text"]
        assert said["took"] < 30  # of 60 s until the timeout
        host = "localhost" if launcher == "Slurm" else "127.0.0.1"
        assert [said["env"][k] for k in _EXPLICIT[:4]] == [str(rank), str(n), str(rank), host]


def test_a_rank_that_does_not_join_is_told_from_one_that_is_gone():
    ((out, err, _),) = job(2, "torchrun", "stall", ranks=1)
    assert out, err
    said = json.loads(out)
    assert said["gone"] == [] and said["silent"] == [1]
    assert said["took"] < 60


@pytest.fixture
def alone(monkeypatch):
    for name in _EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_single_process_gets_a_group_of_its_own(alone):
    fds.init_distributed(timeout=timedelta(minutes=7))
    assert (dist.get_rank(), dist.get_world_size(), get_timeout()) == (0, 1, timedelta(minutes=7))
    assert fds.sharding.mesh(dp=1).size == 1
    fds.init_distributed("gloo", rank=0, world_size=1, timeout=timedelta(minutes=8))
    assert get_timeout() == timedelta(minutes=8)
    with pytest.raises(ValueError, match="'mpi', but a process group is running on gloo"):
        fds.init_distributed("mpi")
    with pytest.raises(ValueError, match=r"rank 1 of 2, but the running .* rank 0 of 1"):
        fds.init_distributed(rank=1, world_size=2)


def test_init_method_and_arguments(alone, tmp_path, caplog):
    caplog.set_level("INFO", "fds.sharding")
    fds.init_distributed(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    assert dist.get_world_size() == 1 and "MASTER_ADDR" not in os.environ
    assert "1 ranks" in caplog.text and "file://" in caplog.text


def test_wrong_arguments(alone):
    for kwargs, message in [
        ({"rank": 0}, "rank 0, world_size -1: give both"),
        ({"timeout": 30}, "timeout: 30, required"),
        ({"timeout": timedelta(0)}, "required a positive"),
        ({"rank": 0, "world_size": 2}, "MASTER_ADDR, MASTER_PORT missing"),
        ({"dist_backend": "ncl"}, "'ncl' is unknown; did you mean 'nccl'"),
        ({"dist_backend": "undefined"}, "is unknown"),
        ({"dist_backend": "cpu:gloo,cuda:nccl"}, "'nccl'.*(not available|needs a CUDA device)"),
        ({"dist_backend": "MPI"}, "'mpi' is not available .* with MPI"),
        ({"dist_backend": "ccl"}, "install oneccl_bindings_for_pytorch"),
        ({"dist_backend": "hccl"}, "install torch_npu"),
        ({"dist_backend": "sccl"}, "'sccl' is not available .* vendor's package"),
    ]:
        with pytest.raises(ValueError, match=message):
            fds.init_distributed(**kwargs)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there nccl is chosen")
def test_the_back_end_without_cuda():
    assert comm._backend(None) == "gloo"


def test_timeouts(monkeypatch):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert comm.default_pg_timeout == timedelta(minutes=30) and comm.TORCH_DISTRIBUTED_DEFAULT_PORT == 29500
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "0.5")
    assert comm.default_pg_timeout == timedelta(seconds=30)
    for bad in ("ten", "0", "-1", "inf", ""):
        with pytest.raises(ValueError, match=f"DEEPSPEED_TIMEOUT={bad!r}"):
            comm.default_timeout({"DEEPSPEED_TIMEOUT": bad})


def test_only_failures_of_the_network_are_explained():
    with pytest.raises(RuntimeError, match="shapes") as caught, liveness.explained("total"):
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
