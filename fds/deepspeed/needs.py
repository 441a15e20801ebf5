"""`estimate_zero2_model_states_mem_needs` and its family: bytes of parameters, gradients and optimizer state under fds's chains, by closed form.

Mixed precision with AdamW, as DeepSpeed's estimates assume. P: all parameters, L: those of the largest site, n: ranks. On a rank:

| | stage 2 | stage 3 |
|---|---|---|
| chain | `optim.sharded(optim.with_master(adamw), dp)`, module in bfloat16 | `shard(dp)`, `cast("bfloat16")`, `checkpoint()` |
| parameters | 2 P | 4 P/n: the masters, in shards |
| optimizer | 12 P/n: copy, two moments | 8 P/n: two moments |
| gradients | 2 P, until the step's one reduce-scatter | 4 P/n |
| a site in use | | 4 L: parameters and gradients in bfloat16 |

The first two are the state between steps, and exact but for padding to n elements for each buffer and a count (`tests/deepspeed/test_zero_surface.py`).

Against DeepSpeed's formulas, with its 18 P/n for gradients in both precisions, masters and moments:

* stage 2: 4 P + 12 P/n here, 2 P + 18 P/n there: the same at three ranks, and more here above. Gradients are whole on a rank until they are reduced, once per step.
* stage 3: 4 L + 16 P/n here, 4 L + 18 P/n there, which counts the float16 parameters beside their masters. L is a site here (a transformer block, gathered as a whole,
  or what is outside of all blocks), and the largest single module's own parameters there.
* offloaded parameters (``offload(store)``, ``optim.streamed``) leave nothing on the device but sites in use: the window reads one ahead.
* a model of tied or meta parameters is counted once per parameter here; DeepSpeed tells parameters apart by address, which on the meta device is 0 for all.
"""

from typing import Any, NamedTuple

from torch import nn

from fds.functional import functionalize


class States(NamedTuple):
    """Bytes on one rank."""

    parameters: int
    optimizer: int
    gradients: int
    site: int  # in use at once


def states(stage: int, total_params: int, largest_layer_params: int = 0, *, ranks: int = 1) -> States:
    """What a rank has of each, wherever that is: the table above.

    >>> states(3, 1000, 100, ranks=2)
    States(parameters=2000, optimizer=4000, gradients=2000, site=400)
    """
    if stage not in (2, 3):
        raise ValueError(f"states: stage={stage}, required 2 or 3")
    if ranks < 1 or total_params < 0:
        raise ValueError(f"states: {total_params} parameters on {ranks} ranks; required at least 0 on at least 1")
    part = -(-total_params // ranks)
    if stage == 2:
        return States(2 * total_params, 12 * part, 2 * total_params, 0)
    return States(4 * part, 8 * part, 4 * part, 4 * largest_layer_params)


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Bytes of host memory per node, and of device memory per rank: (cpu, gpu).

    With `cpu_offload` the optimizer's state is in host memory, and the device has parameters and gradients. Without it the host has the module that the
    state is made from, in float32, once per process. `additional_buffer_factor` is on the host's part.
    """
    s = states(2, total_params, ranks=num_gpus_per_node * num_nodes)
    device = s.parameters + s.gradients + (0 if cpu_offload else s.optimizer)
    host = s.optimizer * num_gpus_per_node if cpu_offload else 0
    return int(max(host, 4 * total_params * num_gpus_per_node) * additional_buffer_factor), device


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Bytes of host memory per node, of device memory per rank, and of the largest site in use: (cpu, gpu, largest).

    With `cpu_offload` the optimizer's state is in host memory; with `cpu_offload_params` as well, parameters and gradients too. `zero_init`: the module was built
    under `zero.Init`, so that the host has one site of it at a time in the beginning, and not the whole model once per process.

    Raises `ValueError` for `cpu_offload_params` without `cpu_offload`: parameters in a store are updated where they are.
    """
    if cpu_offload_params and not cpu_offload:
        raise ValueError(
            "estimate_zero3_model_states_mem_needs: cpu_offload_params without cpu_offload; parameters in a store take their optimizer with them: cpu_offload=True, or cpu_offload_params=False"
        )
    s = states(3, total_params, largest_layer_params, ranks=num_gpus_per_node * num_nodes)
    away = (s.optimizer if cpu_offload else 0) + (s.parameters + s.gradients if cpu_offload_params else 0)
    device = s.parameters + s.gradients + s.optimizer - away + s.site
    built = 4 * (largest_layer_params if zero_init else total_params) * num_gpus_per_node
    return int(max(away * num_gpus_per_node, built) * additional_buffer_factor), device, s.site


def sizes(model: nn.Module) -> tuple[int, int]:
    """The number of parameters of a model (tied ones once), and of its largest site. On the meta device too."""
    program, _ = functionalize(model)
    own = {s: sum(v.numel() for k, v in p.spec.items() if k not in p.marks["buffer"]) for s, p in program.sites.items()}
    return sum(own.values()), max(own.values())


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the estimates for a model, with and without offload."""
    total = sizes(model)[0]
    estimate_zero2_model_states_mem_needs_all_cold(total, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the estimates for a number of parameters, with and without offload."""
    rows: list[tuple[int, int, dict[str, Any]]] = []
    for offload in (True, False):
        cpu, gpu = estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor)  # fmt: skip
        rows.append((cpu, gpu, {"offload_optimizer": _where(offload)}))
    _print(2, total_params, None, num_gpus_per_node, num_nodes, rows)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the estimates for a model, for every kind of offload."""
    total, largest = sizes(model)
    estimate_zero3_model_states_mem_needs_all_cold(total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor)  # fmt: skip


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the estimates for numbers of parameters, for every kind of offload."""
    rows: list[tuple[int, int, dict[str, Any]]] = []
    for offload, params in ((True, True), (True, False), (False, False)):
        for init in (True, False):
            cpu, gpu, _ = estimate_zero3_model_states_mem_needs(total_params, largest_layer_params, num_gpus_per_node, num_nodes, offload, params, init, additional_buffer_factor)  # fmt: skip
            rows.append((cpu, gpu, {"offload_param": _where(params), "offload_optimizer": _where(offload), "zero_init": int(init)}))  # fmt: skip
    _print(3, total_params, largest_layer_params, num_gpus_per_node, num_nodes, rows)


def _where(away: bool) -> str:
    return "cpu" if away else "none"


def _print(stage: int, total: int, largest: int | None, gpus: int, nodes: int, rows: list[tuple[int, int, dict[str, Any]]]) -> None:  # fmt: skip
    """One line for each combination; GB are 2**30 bytes."""
    of = "" if largest is None else f", {largest / 1e6:.1f}M in the largest site"
    print(f"ZeRO-{stage}: parameters, gradients and AdamW's state of {total / 1e6:.1f}M parameters{of}; {nodes} x {gpus} ranks; without activations")  # fmt: skip
    print(f"{'host/node':>12}  {'device/rank':>12}")
    for cpu, gpu, options in rows:
        chosen = ", ".join(f"{k}={v}" for k, v in options.items())
        print(f"{cpu / 2**30:9.2f} GB  {gpu / 2**30:9.2f} GB  {chosen}")
