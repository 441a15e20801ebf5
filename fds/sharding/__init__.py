"""Meshes, collectives, and the transformations that split parameters over ranks."""

from fds.sharding.collectives import Traffic, record
from fds.sharding.launch import launch
from fds.sharding.mesh import Axis, Mesh, mesh
from fds.sharding.plans import STYLES, Plan, plan_of
from fds.sharding.tensor import tensor_parallel
from fds.sharding.zero import replicate, shard

__all__ = [
    "STYLES",
    "Axis",
    "Mesh",
    "Plan",
    "Traffic",
    "launch",
    "mesh",
    "plan_of",
    "record",
    "replicate",
    "shard",
    "tensor_parallel",
]
