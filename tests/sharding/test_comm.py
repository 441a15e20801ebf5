"""Start-up, and what happens when a rank goes: jobs of real processes, which see nothing but a launcher's variables."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

import fds
from fds._torch import get_timeout
from fds.sharding import collectives, comm, liveness
from fds.sharding.discovery import _EXPLICIT

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def job(n, launcher, task, *args, first=None):
    """Run ``task(*args)`` of this file on n fresh processes; (stdout, stderr, exit status) of the `first` ones, the others are killed then."""
    port = str(ranks.free_port())
    base = {k: v for k, v in os.environ.items() if k not in _EXPLICIT}
    base |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_PORT": port,
    }
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
        return [(*w.communicate(timeout=240), w.returncode) for w in workers[:first]]
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
    """Rank 1 is busy for longer than the timeout."""
    fds.init_distributed(timeout=timedelta(seconds=200), init_method="env://")  # a busy machine may start one rank late
    dist.barrier()
    fds.init_distributed(timeout=timedelta(seconds=4))
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
    ((out, err, _),) = job(2, "torchrun", "stall", first=1)
    assert out, err
    said = json.loads(out)
    assert said["gone"] == [] and said["silent"] == [1]
    assert said["took"] < 60


@pytest.fixture
def alone(monkeypatch):
    for name in _EXPLICIT:
        monkeypatch.setenv(name, "")  # so that what a test sets there is gone after it
        monkeypatch.delenv(name)
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
        ({"distributed_port": "29500"}, "distributed_port: '29500', required 1 to 65535"),
        ({"distributed_port": 0}, "distributed_port: 0, required"),
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


def groups_of_a_mesh():
    groups = [collectives.process_group(a.group) for a in fds.sharding.mesh(dp=2, tp=2).axes.values()]
    assert dist.group.WORLD not in groups
    assert liveness.watched() and all(
        liveness._WATCH[0].addresses
    )  # torch started this job's group, `mesh` has taken it over
    return [g._get_backend(torch.device("cpu")).options._timeout for g in groups]


def test_the_groups_of_a_mesh_have_the_timeout_of_the_job_and_ranks_know_each_other():
    assert ranks.run(4, groups_of_a_mesh) == [[timedelta(minutes=5)] * 2] * 4  # of tests/ranks.py; torch's own is 30


def test_only_failures_of_the_network_are_explained():
    with pytest.raises(RuntimeError, match="shapes") as caught, liveness.explained("total"):
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError


def test_what_one_rank_has_found_it_tells_and_hears():
    """Rank 1 of three left no address; rank 2, played here, knows that it is gone, and tells rank 0."""
    told = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        here = liveness._listen("127.0.0.1", 3)

        def play():
            line, _ = other.accept()
            with line, line.makefile() as lines, socket.create_connection(here) as s:
                told.append(json.loads(lines.readline()))
                s.sendall(b'{"rank": 2, "gone": [1]}\n')
                told.append(json.loads(lines.readline()))

        player = threading.Thread(target=play, daemon=True)
        player.start()
        watch = liveness._Watch(lambda: None, 0, [here, None, other.getsockname()])
        assert liveness._search(watch) == {1}
        player.join(20)
    assert told == [{"rank": 0, "gone": []}, {"rank": 0, "gone": [1]}]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
