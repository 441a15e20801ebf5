"""The section "zero_optimization"."""

import sys
from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed.fields import (
    BOOLEAN,
    MAPPING,
    PATH,
    TEXT,
    Kind,
    either,
    integer,
    key,
    listing,
    maybe,
    number,
    off,
    one_of,
    section,
)  # fmt: skip

_MOE = [
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
]
_NAMES = either(listing(TEXT), Kind(TEXT.says, lambda v: [TEXT.read(v)]))
_PINNED = "`HostStore` takes page-locked memory where there is CUDA, and lends buffers again"
_SIZED = "buffers have the size of what is moved; none can be too small"

# A key is a line.
# fmt: off


@attrs.frozen(kw_only=True)
class OffloadParam:
    """ "zero_optimization.offload_param"."""

    device: str = key("none", one_of("none", "cpu", "nvme"), "yes", "`offload(store)` before `checkpoint()`: a `HostStore` for cpu, a `FileStore` for nvme; stage 3")
    nvme_path: str | None = key(None, maybe(PATH), "yes", "`FileStore(path)`: a directory of the run's own below it, locked; needed by nvme")
    buffer_count: int = key(5, integer(0), "yes", "`offload(store, window=...)`: sites that are read ahead")
    buffer_size: int = key(100_000_000, integer(0), "design", _SIZED)
    max_in_cpu: int = key(1_000_000_000, integer(0), "yes", "`FileStore(budget=...)`: what was used last stays in host memory as well, so many elements in the stored dtype; only if given")
    pin_memory: bool = key(True, BOOLEAN, "design", _PINNED)


@attrs.frozen(kw_only=True)
class OffloadOptimizer:
    """ "zero_optimization.offload_optimizer"."""

    device: str = key("none", one_of("none", "cpu", "nvme"), "yes", "`optim.streamed(tx, store)`: a `HostStore` for cpu (stages 1 to 3), a `FileStore` for nvme (stage 3)")
    nvme_path: str | None = key(None, maybe(PATH), "yes", "`FileStore(path)`: a directory of the run's own below it, locked; needed by nvme")
    buffer_count: int = key(4, integer(0), "design", _SIZED + "; `optim.streamed` counts the states of a rule by itself")
    pin_memory: bool = key(True, BOOLEAN, "design", _PINNED)
    pipeline_read: bool = key(False, BOOLEAN, "design", "buckets are always read ahead of their update")
    pipeline_write: bool = key(False, BOOLEAN, "design", "buckets are always written behind their update")
    fast_init: bool = key(False, BOOLEAN, "design", "the state of a bucket is written once, when it is made")
    ratio: float = key(1.0, number(0, 1), "no", "all of the state goes; for a part of it write the chain, with `optim.streamed` for it")
    super_offload: bool = key(False, BOOLEAN, "no", "leave it out: `optim.streamed` overlaps the update with reads and writes on any host")
    cpuadam_cores_perc: float = key(0.8, number(0, 1), "design", "belongs to super_offload; the update's threads are torch's (OMP_NUM_THREADS)")


@attrs.frozen(kw_only=True)
class LeafModule:
    """ "zero_optimization.leaf_module"."""

    classes: list[str] = key(_MOE, _NAMES, "design", "a site (a transformer block) is gathered as a whole, whatever runs in it; `functionalize(sites=...)`")
    names: list[str] = key([], _NAMES, "design", "as classes")
    name_suffixes: list[str] = key([], _NAMES, "design", "as classes")


@attrs.frozen(kw_only=True)
class ZeroOptimization:
    """ "zero_optimization"."""

    stage: int = key(0, one_of(0, 1, 2, 3), "yes", "`sharding.zero(stage, axis)`: 0 `replicate`, 1 and 2 `optim.sharded`, 3 `shard`")
    contiguous_gradients: bool = key(True, BOOLEAN, "design", "a site's gradients are one flat buffer (stage 3), or go to the wire in buckets")
    reduce_scatter: bool = key(True, BOOLEAN, "design", "stages 1 to 3 always reduce-scatter: the same sums, fewer bytes")
    reduce_bucket_size: int = key(500_000_000, integer(1), "design", "stages 1, 2: messages of 32 MiB (`optim.sharded(bucket_bytes=...)`); else a site is a message. No bit depends on it")
    use_multi_rank_bucket_allreduce: bool = key(True, BOOLEAN, "design", "stages 1 to 3 always reduce-scatter")
    allgather_partitions: bool = key(True, BOOLEAN, "design", "stages 1 to 3 always all-gather")
    allgather_bucket_size: int = key(500_000_000, integer(0), "design", "as reduce_bucket_size")
    overlap_comm: bool | None = key(None, maybe(BOOLEAN), "design", "a compiled step overlaps reductions with the next site (`compile(step, overlap=...)`), an eager one does not; no bit depends on it")
    compute_grad_norm: bool = key(True, BOOLEAN, "design", "the step always has the norm: a metric, and how non-finite gradients are found")
    load_from_fp32_weights: bool = key(True, BOOLEAN, "design", "masters are what is stored, and what is saved and loaded")
    elastic_checkpoint: bool = key(False, BOOLEAN, "design", "`load_state` reads any number of ranks")
    offload_param: OffloadParam = section(OffloadParam)
    offload_optimizer: OffloadOptimizer = section(OffloadOptimizer)
    zenflow: Mapping[str, Any] | None = off("topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch", "leave it out: an update that is late on some parameters is another optimizer; offload_optimizer streams the exact one", on=True)
    sub_group_size: int = key(1_000_000_000, integer(0), "design", "`optim.streamed` updates in buckets of 16 MiB; in memory an update copies no state. No bit depends on it")
    cpu_offload: bool | None = key(None, maybe(BOOLEAN), "yes", "deprecated: offload_optimizer.device = cpu")
    cpu_offload_param: bool | None = key(None, maybe(BOOLEAN), "yes", "deprecated: offload_param.device = cpu")
    cpu_offload_use_pin_memory: bool | None = key(None, maybe(BOOLEAN), "design", "deprecated, and read by nobody in DeepSpeed either: offload_*.pin_memory")
    stage3_prefetch_bucket_size: int = key(50_000_000, integer(0), "design", "a compiled step gathers one site ahead (`compile(step, prefetch=...)`), an eager one where it is called; no bit depends on it", aliases=("prefetch_bucket_size",))
    stage3_param_persistence_threshold: int = key(100_000, integer(0), "yes", "`shard(threshold=...)` if given; else 0, since small leaves travel in their site's buffer and cost no message", aliases=("param_persistence_threshold",))
    stage3_model_persistence_threshold: int = key(sys.maxsize, integer(0), "no", "no cap on what stage3_param_persistence_threshold keeps; lower that one", aliases=("model_persistence_threshold",))
    stage3_max_live_parameters: int = key(1_000_000_000, integer(0), "yes", "a larger model gets `checkpoint('matmul')`: gathered weights do not stay until backward", aliases=("max_live_parameters",))
    stage3_max_reuse_distance: int = key(1_000_000_000, integer(0), "yes", "as stage3_max_live_parameters", aliases=("max_reuse_distance",))
    stage3_gather_16bit_weights_on_model_save: bool = key(False, BOOLEAN, "design", "`save_16bit_model` always writes whole leaves, and never nothing", aliases=("gather_16bit_weights_on_model_save",), deprecated=("stage3_gather_fp16_weights_on_model_save",))
    stage3_module_granularity_threshold: int = key(0, integer(0), "design", "a site is gathered as a whole; `functionalize(sites=...)`", aliases=("module_granularity_threshold",))
    stage3_use_all_reduce_for_fetch_params: bool = key(False, BOOLEAN, "design", "a site is one all-gather of one buffer: nothing to concatenate", aliases=("use_all_reduce_for_fetch_params",))
    stage3_allgather_sequential: bool = key(False, BOOLEAN, "design", "a site is one all-gather of one buffer: nothing to concatenate", aliases=("allgather_sequential",))
    ignore_unused_parameters: bool = key(True, BOOLEAN, "no", "an unused leaf's gradient is zero, never an error; look at metrics or `value_and_grad` to find it")
    legacy_stage1: bool = key(False, BOOLEAN, "no", "DeepSpeed has refused it for years; leave it out")
    round_robin_gradients: bool = key(False, BOOLEAN, "design", "shards are equal parts of one buffer")
    parameter_alignment: bool = key(False, BOOLEAN, "design", "operators take unaligned views")
    zero_hpz_partition_size: int = key(1, integer(0), "yes", "`chain(shard(local), checkpoint(), shard(node))`: backward gathers inside of the node, of so many ranks; stage 3", neutral=[0])
    zero_quantized_weights: bool = key(False, BOOLEAN, "yes", '`quantized(weights="int8")` after `shard`; stage 3')
    zero_quantized_nontrainable_weights: bool = key(False, BOOLEAN, "yes", '`quantize_frozen("int8")` before `shard`; stage 3')
    zero_quantized_gradients: bool = key(False, BOOLEAN, "yes", '`quantized(gradients="int4")` after `shard`; stage 3')
    zeropp_loco_param: Mapping[str, Any] | None = key(None, maybe(MAPPING), "yes", "`quantized(feedback=ErrorFeedback(beta=err_beta, reset=reset_T))`; needs zero_quantized_gradients")
    mics_shard_size: int = key(-1, either(one_of(-1), integer(1)), "yes", "`zero(3, local, replicas=node)` over a mesh of two axes; stage 3")
    mics_hierarchical_params_gather: bool = key(False, BOOLEAN, "no", "write the chain: `chain(shard(local), shard(near), replicate(far))`")
    memory_efficient_linear: bool = key(True, BOOLEAN, "design", "`checkpoint()` after `shard` saves no weight; nothing is patched")
    pipeline_loading_checkpoint: bool = key(False, BOOLEAN, "design", "states are always read in pieces, while others are placed")
    override_module_apply: bool = key(True, BOOLEAN, "design", "no module is patched")
    log_trace_cache_warnings: bool = key(False, BOOLEAN, "design", "there is no trace: what is gathered when is in the program")
    enable_sanity_checks: bool = key(False, BOOLEAN, "design", "what these find cannot be done to a program; the checks there are, are always on")
    save_muon_momentum_buffer_in_memory: bool = key(False, BOOLEAN, "no", "leave it out: with nvme all of the optimizer's state is in files; keep it in memory with offload_optimizer.device = none")
    leaf_module: LeafModule = section(LeafModule)
