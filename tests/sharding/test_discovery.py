"""What launchers put into the environment, by table: the place that comes of it, or the error."""

import pytest

from fds.sharding.discovery import discover

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "7000"}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ONE_NODE = {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}  # fmt: skip
AML = {**MPI, "AZUREML_EXPERIMENT_ID": "x", "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000", "AZ_BATCHAI_MPI_MASTER_NODE": "10.0.0.5"}  # fmt: skip
SAGEMAKER = {**MPI, "SM_TRAINING_ENV": "{}", "SM_HOSTS": '["algo-2", "algo-1"]'}


def without(env, *names):
    return {k: v for k, v in env.items() if k not in names}


@pytest.mark.parametrize(
    ("env", "launcher", "place"),
    [
        (TORCHRUN, "torchrun", "3 4 1 n0:7000"),
        (TORCHRUN | SLURM | {"SLURM_PROCID": "0"}, "torchrun", "3 4 1 n0:7000"),  # torchrun under srun
        ({"WORLD_SIZE": "1"}, "torchrun", "0 1 0 127.0.0.1:29500"),
        (MPI | {"MASTER_ADDR": "n0"}, "Open MPI", "3 4 1 n0:29500"),
        (MPI | {"MASTER_ADDR": "n0", "MASTER_PORT": "7001", "RANK": "3", "LOCAL_RANK": ""}, "Open MPI", "3 4 1 n0:7001"),
        (MPI | ONE_NODE, "Open MPI", "3 4 3 127.0.0.1:29500"),
        ({k.replace("OMPI_COMM", "MV2_COMM"): v for k, v in (MPI | ONE_NODE).items()}, "MVAPICH", "3 4 3 127.0.0.1:29500"),
        (PMI | {"MASTER_ADDR": "n0"}, "PMI", "3 4 1 n0:29500"),
        (PMI | {"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}, "PMI", "3 4 3 127.0.0.1:29500"),
        (PMI | SLURM | {"SLURM_PROCID": "1", "MASTER_ADDR": "n0"}, "PMI", "3 4 1 n0:29500"),  # mpirun in a Slurm job
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "Slurm", "3 4 1 gpu07:29500"),  # srun --mpi=pmi2
        (SLURM, "Slurm", "3 4 1 gpu07:29500"),
        (SLURM | {"SLURM_JOB_NODELIST": "a1-ib[2,5-7]-x[01-02],b"}, "Slurm", "3 4 1 a1-ib2-x01:29500"),
        (SLURM | {"SLURM_JOB_NODELIST": "login,gpu1"}, "Slurm", "3 4 1 login:29500"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu08"}, "Slurm", "3 4 1 gpu08:29500"),  # a step on some of the nodes
        (SLURM | {"SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4"}, "Slurm", "3 4 1 gpu07:29500"),
        (SLURM | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}, "Slurm", "3 4 1 gpu07:29500"),
        (without(SLURM, "SLURM_JOB_NODELIST", "SLURM_STEP_ID") | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}, "Slurm", "3 4 1 10.0.0.1:29500"),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "Slurm", "0 1 0 gpu07:29500"),  # salloc's interactive step
        (SLURM | {"MASTER_ADDR": "n9", "MASTER_PORT": "1"}, "Slurm", "3 4 1 n9:1"),
        (AML, "Azure ML", "3 4 1 10.0.0.4:6105"),
        (AML | {"MASTER_PORT": "7002"}, "Azure ML", "3 4 1 10.0.0.4:7002"),
        (AML | ONE_NODE, "Azure ML", "3 4 3 10.0.0.5:54965"),
        (AML | {"DLTS_JOB_ID": "1", "MASTER_ADDR": "n0"}, "Open MPI", "3 4 1 n0:29500"),
        (SAGEMAKER, "SageMaker", "3 4 1 algo-1:29500"),
        (SAGEMAKER | {"SM_MASTER_ADDR": "algo-3", "SM_MASTER_PORT": "7777"}, "SageMaker", "3 4 1 algo-3:7777"),
    ],
)  # fmt: skip
def test_places(env, launcher, place):
    got = discover(env)
    assert got.launcher == launcher
    assert f"{got.rank} {got.world_size} {got.local_rank} {got.master_addr}:{got.master_port}" == place
    assert [got.variables[k] for k in TORCHRUN] == place.replace(":", " ").split()


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"MASTER_ADDR": "n0", "LOCAL_RANK": "0"},
        without(SLURM, "SLURM_STEP_ID"),  # the batch script, and `salloc`'s shell
        {"SM_TRAINING_ENV": "{}", "SM_HOSTS": '["algo-1"]'},
        {"AZUREML_EXPERIMENT_ID": "x"},
    ],
)
def test_a_single_process(env):
    assert discover(env) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing beside RANK=0, WORLD_SIZE=2"),
        ({"RANK": "0"}, "^WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        (without(TORCHRUN, "LOCAL_RANK"), "^LOCAL_RANK missing .*alone on its node has LOCAL_RANK=0"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4, WORLD_SIZE=4: ranks go from 0 to 3"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x', required a whole number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE=1, LOCAL_RANK=1"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000, required 1 to 65535"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1, WORLD_SIZE=1"),
        (MPI | {"RANK": "1"}, r"RANK=1, but OMPI_COMM_WORLD_RANK=3 \(Open MPI\); unset RANK"),
        (SLURM | {"WORLD_SIZE": "1"}, "WORLD_SIZE=1, but SLURM_NTASKS=4"),
        (MPI, r"MASTER_ADDR is missing.*OMPI_COMM_WORLD_LOCAL_SIZE=2.*mpirun -x MASTER_ADDR"),
        (without(MPI, "OMPI_COMM_WORLD_SIZE"), "^OMPI_COMM_WORLD_SIZE missing beside OMPI_COMM_WORLD_RANK=3"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "9"}, "OMPI_COMM_WORLD_LOCAL_SIZE=9, .*OMPI_COMM_WORLD_SIZE=4"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "4"}, "OMPI_COMM_WORLD_LOCAL_RANK=4, OMPI_COMM_WORLD_RANK=3"),
        (without(PMI, "MPI_LOCALRANKID"), "MPI_LOCALRANKID or PALS_LOCAL_RANKID missing"),
        (without(SLURM, "SLURM_NTASKS"), "SLURM_STEP_NUM_TASKS or SLURM_NTASKS missing"),
        (without(SLURM, "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST or SLURM_JOB_NODELIST .* MASTER_ADDR"),
        (SLURM | {"SLURM_JOB_NODELIST": "gpu[07"}, r"SLURM_JOB_NODELIST='gpu\[07' is no list"),
        (without(AML, "AZ_BATCH_MASTER_NODE"), "AZ_BATCH_MASTER_NODE is missing"),
        (SAGEMAKER | {"SM_HOSTS": "algo-1"}, "SM_HOSTS='algo-1' is no list in JSON"),
        ({"SM_HOSTS": '["a", "b"]'}, "SM_HOSTS names 2 hosts.*OMPI_COMM_WORLD_RANK"),
    ],
)  # fmt: skip
def test_what_is_incomplete_or_contradicts_itself(env, message):
    with pytest.raises(ValueError, match=message):
        discover(env)


def test_azure_needs_its_network_interfaces():
    assert discover(AML).variables["NCCL_SOCKET_IFNAME"] == "^docker0,lo"
    assert discover(AML | {"NCCL_SOCKET_IFNAME": "eth0"}).variables["NCCL_SOCKET_IFNAME"] == "eth0"


def test_port_and_platforms():
    assert discover(SLURM, port=5).master_port == 5
    assert discover(SLURM, platforms=False) is None
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        discover(SLURM | {"RANK": "3"}, platforms=False)


def test_the_environment_is_left_alone():
    env = dict(AML)
    discover(env)
    assert env == AML
