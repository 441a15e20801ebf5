"""Meshes, collectives, and the transformations that split parameters over ranks."""

from fds.sharding.collectives import Traffic, record
from fds.sharding.launch import launch
from fds.sharding.mesh import Axis, Mesh, mesh
from fds.sharding.zero import replicate, shard

__all__ = ["Axis", "Mesh", "Traffic", "launch", "mesh", "record", "replicate", "shard"]
