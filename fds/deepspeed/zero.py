"""`zero.Init`, `zero.GatheredParameters` and the memory estimates: DeepSpeed's names over parameters that are stored, and never whole.

    with fds.zero.Init():
        model = Model()  # nothing is allocated; what the constructor does to its parameters is written down
    program, params = fds.functionalize(model)  # `params` makes a leaf when it is asked for one
    stored = fds.shard(program, mesh["dp"]).place(params)  # site by site: a rank has its part, and one site

`GatheredParameters` shows parameters whole for the time of a block, and brings back what one rank has written. It takes what `Init` made, and the leaves of a
running state: those of a module that `attach` has tied to it, or `leaves(owner, pattern)`. Without a context manager the same is two pure functions:

    w = zero.gathered(program, stored, "*.norm.weight")  # {name: whole tensor}
    stored = zero.scattered(program, stored, {k: 2 * v for k, v in w.items()})
"""

from fds.deepspeed.needs import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from fds.deepspeed.zero_gather import GatheredParameters, attach, gathered, leaves, scattered
from fds.deepspeed.zero_init import Init, parameters

__all__ = [
    "GatheredParameters",
    "Init",
    "attach",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "gathered",
    "leaves",
    "parameters",
    "scattered",
]  # fmt: skip
