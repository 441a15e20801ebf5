"""Meshes, collectives, and the transformations that split parameters over ranks."""

from fds.sharding.comm import init_distributed
from fds.sharding.comms_log import CommsLogger, CommsRow, CommsSummary, Traffic, record
from fds.sharding.launch import launch
from fds.sharding.liveness import RankError
from fds.sharding.mesh import Axis, Mesh, mesh
from fds.sharding.zero import replicate, shard

__all__ = [
    "Axis",
    "CommsLogger",
    "CommsRow",
    "CommsSummary",
    "Mesh",
    "RankError",
    "Traffic",
    "init_distributed",
    "launch",
    "mesh",
    "record",
    "replicate",
    "shard",
]
