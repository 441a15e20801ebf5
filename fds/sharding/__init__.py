"""Meshes, collectives, and the transformations that split parameters over ranks."""

from fds.sharding.comm import init_distributed
from fds.sharding.comms_log import CommsLogger, CommsRow, CommsSummary, Traffic, record
from fds.sharding.launch import launch
from fds.sharding.liveness import RankError
from fds.sharding.mesh import Axis, Mesh, mesh
from fds.sharding.plans import STYLES, Plan, plan_of
from fds.sharding.quantized import ErrorFeedback, quantized
from fds.sharding.tensor import tensor_parallel
from fds.sharding.zero import Zero, replicate, shard, zero

__all__ = [
    "STYLES",
    "Axis",
    "CommsLogger",
    "CommsRow",
    "CommsSummary",
    "ErrorFeedback",
    "Mesh",
    "Plan",
    "RankError",
    "Traffic",
    "Zero",
    "init_distributed",
    "launch",
    "mesh",
    "plan_of",
    "quantized",
    "record",
    "replicate",
    "shard",
    "tensor_parallel",
    "zero",
]
