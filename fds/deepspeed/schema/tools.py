"""Sections about what a run writes, measures, saves and reads; and activation checkpointing, the hybrid engine, tensor parallelism, compiling."""

from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed.fields import (
    BOOLEAN,
    MAPPING,
    PATH,
    TEXT,
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
from fds.deepspeed.schema.precision import DTYPE

# A key is a line.
# fmt: off


@attrs.frozen(kw_only=True)
class TensorBoard:
    """ "tensorboard"."""

    enabled: bool = key(False, BOOLEAN, "yes", "rank 0 writes Train/Samples/{train_loss, lr, loss_scale}; needs the package tensorboard")
    output_path: str = key("", PATH, "yes", "its directory")
    job_name: str = key("DeepSpeedJobName", TEXT, "yes", "a directory below output_path")


@attrs.frozen(kw_only=True)
class WandB:
    """ "wandb"."""

    enabled: bool = key(False, BOOLEAN, "yes", "as tensorboard; needs the package wandb")
    group: str | None = key(None, maybe(TEXT), "yes", "of the run")
    team: str | None = key(None, maybe(TEXT), "yes", "the entity of the run")
    project: str = key("deepspeed", TEXT, "yes", "of the run")


@attrs.frozen(kw_only=True)
class Comet:
    """ "comet"."""

    enabled: bool = key(False, BOOLEAN, "yes", "as tensorboard; needs the package comet_ml")
    samples_log_interval: int = key(100, integer(1), "yes", "samples between two reports")
    project: str | None = key(None, maybe(TEXT), "yes", "of the experiment")
    workspace: str | None = key(None, maybe(TEXT), "yes", "of the experiment")
    api_key: str | None = key(None, maybe(TEXT), "yes", "better in the environment: COMET_API_KEY")
    experiment_name: str | None = key(None, maybe(TEXT), "yes", "of the experiment")
    experiment_key: str | None = key(None, maybe(TEXT), "yes", "of the experiment")
    online: bool | None = key(None, maybe(BOOLEAN), "yes", "of the experiment")
    mode: str | None = key(None, maybe(one_of("get", "create", "get_or_create")), "yes", "of the experiment")


@attrs.frozen(kw_only=True)
class CSVMonitor:
    """ "csv_monitor"."""

    enabled: bool = key(False, BOOLEAN, "yes", "as tensorboard, a file for each name")
    output_path: str = key("", PATH, "yes", "its directory")
    job_name: str = key("DeepSpeedJobName", TEXT, "yes", "a directory below output_path")


@attrs.frozen(kw_only=True)
class JsonlMonitor:
    """ "jsonl_monitor"."""

    enabled: bool = key(False, BOOLEAN, "yes", "as tensorboard, a line of JSON for each event; a section of fds's own")
    output_path: str = key("", PATH, "yes", "its directory")
    job_name: str = key("DeepSpeedJobName", TEXT, "yes", "a directory below output_path")


@attrs.frozen(kw_only=True)
class CommsLogger:
    """ "comms_logger"."""

    enabled: bool = key(False, BOOLEAN, "yes", "`sharding.CommsLogger`; false is off (DeepSpeed: the section's presence is on)")
    verbose: bool = key(False, BOOLEAN, "yes", "a line for each call")
    prof_all: bool = key(True, BOOLEAN, "yes", "all operations; else those of prof_ops")
    prof_ops: list[str] = key([], listing(TEXT), "yes", "names of operations; an unknown one is an error")
    debug: bool = key(False, BOOLEAN, "yes", "callers apart, by name")


@attrs.frozen(kw_only=True)
class FlopsProfiler:
    """ "flops_profiler"."""

    enabled: bool = key(False, BOOLEAN, "yes", "FLOPs by module from the graph, at one step")
    recompute_fwd_factor: float = key(0.0, number(0), "design", "what is recomputed is in the graph, and is counted")
    profile_step: int = key(1, integer(0), "yes", "the step that is profiled")
    module_depth: int = key(-1, integer(-1), "yes", "of the modules that are printed; -1: all")
    top_modules: int = key(1, integer(1), "yes", "so many at each depth")
    detailed: bool = key(True, BOOLEAN, "yes", "a line for each module")
    output_file: str | None = key(None, maybe(PATH), "yes", "in place of standard output")


@attrs.frozen(kw_only=True)
class Throughput:
    """ "timers.throughput"."""

    enabled: bool = key(True, BOOLEAN, "yes", "samples per second in the line of steps_per_print")
    synchronized: bool = key(True, BOOLEAN, "design", "the line is printed where the loss is read, which waits for the device")


@attrs.frozen(kw_only=True)
class Timers:
    """ "timers"."""

    throughput: Throughput = section(Throughput)


@attrs.frozen(kw_only=True)
class AIO:
    """ "aio"."""

    block_size: int = key(1_048_576, integer(1, 4096), "yes", "`FileStore(settings=...)`: bytes of one system call, a multiple of 4,096")
    queue_depth: int = key(8, integer(1), "yes", "blocks in flight for each submitter")
    intra_op_parallelism: int = key(1, integer(1), "yes", "submitters (`thread_count` in DeepSpeed's documentation, which its code does not read)")
    single_submit: bool = key(False, BOOLEAN, "yes", "one block at a time")
    overlap_events: bool = key(True, BOOLEAN, "yes", "a finished block makes room at once")
    use_gds: bool = key(False, BOOLEAN, "no", "everything passes through host memory")


@attrs.frozen(kw_only=True)
class ActivationCheckpointing:
    """ "activation_checkpointing"."""

    partition_activations: bool = key(False, BOOLEAN, "no", "`tensor_parallel(sequence=True)` splits the activations between layers, in a chain of your own")
    cpu_checkpointing: bool = key(False, BOOLEAN, "yes", "`checkpoint(store=HostStore())`: the inputs of blocks in host memory")
    contiguous_memory_optimization: bool = key(False, BOOLEAN, "design", "saved inputs are one buffer for each site already")
    number_checkpoints: int | None = key(None, maybe(integer(1)), "design", "belongs to contiguous_memory_optimization; each site is recomputed")
    synchronize_checkpoint_boundary: bool = key(False, BOOLEAN, "design", "recompute is in the graph, in its order")
    profile: bool = key(False, BOOLEAN, "no", "profile the step: wall_clock_breakdown, or torch's profiler")


@attrs.frozen(kw_only=True)
class HybridEngine:
    """ "hybrid_engine"."""

    enabled: bool = key(False, BOOLEAN, "yes", "`engine.generate` by `inference.hybrid(train)`; the training weights are never written")
    max_out_tokens: int = key(512, integer(1), "yes", "`hybrid(max_out_tokens=...)`, of prompt and new ones together")
    inference_tp_size: int = key(1, integer(1), "yes", "`hybrid(inference_tp_size=...)`; has to divide the ranks")
    release_inference_cache: bool = key(False, BOOLEAN, "yes", "`hybrid(release_inference_cache=...)`")
    pin_parameters: bool = key(True, BOOLEAN, "yes", "`hybrid(pin_parameters=...)`")
    tp_gather_partition_size: int = key(8, integer(1), "yes", "`hybrid(tp_gather_partition_size=...)`: sites that are whole at a time")
    enable_cuda_graph: bool = key(False, BOOLEAN, "no", "decode steps are compiled; for CUDA graphs use `init_inference(enable_cuda_graph=True)`")


@attrs.frozen(kw_only=True)
class TPGroup:
    """ "tensor_parallel.tp"."""

    tp_size: int = key(1, integer(1), "yes", "has to be autotp_size, or 1")
    tp_grain_size: int = key(1, integer(1), "design", "sizes need not divide: the first ranks get a feature or a head more")
    mpu: None = key(None, one_of(None), "no", "meshes are torch's: give mesh_param to initialize")
    tp_group: None = key(None, one_of(None), "no", "meshes are torch's: give mesh_param to initialize")


@attrs.frozen(kw_only=True)
class TensorParallel:
    """ "tensor_parallel"."""

    autotp_size: int = key(0, integer(0), "yes", '`tensor_parallel(mesh["tp"])` over so many ranks, before everything else; with all stages (at 1 and 2 parameters are in shards too, as at 3); a mesh with nodes is not there')
    preset_model: str | None = key(None, maybe(one_of("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3")), "design", "the plan is the model's own (transformers), else by the names of its layers; `sharding.plan_of(module)` prints it")
    partition_config: Mapping[str, Any] | None = key(None, maybe(MAPPING), "no", 'write the chain: `tensor_parallel(mesh["tp"], plan={"*.q_proj": "column", "*.o_proj": "row"})`')
    tp_overlap_comm: bool = key(False, BOOLEAN, "design", "as zero_optimization.overlap_comm")
    dtype: Any = key("float16", DTYPE, "no", "the dtype is that of fp16, bf16 or the model; leave it out")
    tp: TPGroup = section(TPGroup, aliases=("tensor_parallel",))
    vocab_parallel_lm_head: bool | None = key(None, maybe(BOOLEAN), "no", "the output layer follows the plan; its loss never gathers the logits")
    vocab_parallel_ce_backend: str = key("torch", one_of("torch", "liger"), "no", "`losses.causal_lm` has its own")
    injection_policy_tuple: Any = key(None, maybe(listing(TEXT)), "no", "see partition_config")
    keep_module_on_host: bool = key(False, BOOLEAN, "no", "leaves are placed one at a time; build large models under torch.device('meta') and `load`")
    replace_with_kernel_inject: bool = key(False, BOOLEAN, "no", "write the chain: `at(pattern, use(operator))`", aliases=("kernel_inject",))


@attrs.frozen(kw_only=True)
class Compile:
    """ "compile"."""

    deepcompile: bool = key(False, BOOLEAN, "yes", "`fds.compile(step)`: forward, backward, collectives and update in one graph, at all stages")
    autoep_non_moe: bool = key(False, BOOLEAN, "no", "no AutoEP")
    free_activation: bool = key(False, BOOLEAN, "design", "what a graph no longer uses is freed in it")
    free_activation_threshold: int = key(10 * 1024 * 1024, integer(0), "design", "as free_activation")
    offload_activation: bool = key(False, BOOLEAN, "no", "activation_checkpointing.cpu_checkpointing, or `checkpoint(store=...)`")
    offload_activation_pin_memory: bool = key(True, BOOLEAN, "design", "as offload_param.pin_memory")
    offload_opt_states: bool = key(False, BOOLEAN, "no", "zero_optimization.offload_optimizer")
    offload_parameters: bool = key(False, BOOLEAN, "no", "zero_optimization.offload_param")
    double_buffer: bool = key(True, BOOLEAN, "design", "one site ahead, as `compile(step, prefetch=...)` says")
    symmetric_memory: bool = key(False, BOOLEAN, "no", "collectives are torch.distributed's")
    debug_log: bool = key(False, BOOLEAN, "no", "TORCH_LOGS=graph_code prints graphs")
    sync_before_reduce: bool = key(False, BOOLEAN, "no", "a debugging aid of DeepSpeed's; TORCH_LOGS and a `CommsLogger` are here")
    sync_after_reduce: bool = key(False, BOOLEAN, "no", "as sync_before_reduce")
    sync_before_allgather: bool = key(False, BOOLEAN, "no", "as sync_before_reduce")
    sync_after_allgather: bool = key(False, BOOLEAN, "no", "as sync_before_reduce")
    keep_int_input_tensors: bool = key(True, BOOLEAN, "design", "no graph is profiled with stored inputs")
    keep_all_input_tensors: bool = key(False, BOOLEAN, "design", "no graph is profiled with stored inputs")
    passes: list[str] | None = key(None, maybe(listing(one_of("z1", "z3", "autosp", "autotp"))), "no", "the chain says what is in the graph; leave it out")


@attrs.frozen(kw_only=True)
class ParallelWrite:
    """ "checkpoint.parallel_write"."""

    pipeline_stage: bool = key(False, BOOLEAN, "design", "each rank writes what it holds")


@attrs.frozen(kw_only=True)
class Checkpoint:
    """ "checkpoint"."""

    tag_validation: str = key("WARN", one_of("IGNORE", "WARN", "FAIL", any_case=True), "design", "a state has one index for all ranks: a tag that differs is always an error")
    load_universal: bool = key(False, BOOLEAN, "design", "`load_checkpoint` sees what a directory holds, and reads any number of ranks")
    use_node_local_storage: bool = key(False, BOOLEAN, "no", "give save_checkpoint a directory that all ranks see")
    checkpoint_serialization: bool = key(True, BOOLEAN, "design", "states are safetensors with an index; nothing is pickled")
    parallel_write: ParallelWrite = section(ParallelWrite)
    writer: Mapping[str, Any] | None = off("type io_buffer_size io_buffer_double show_statistics data_parallel decoupled io_multiplier", "states are always written past the page cache; in the background with `save_state(asynchronous=True)`")


_STEPS = either(integer(1), listing(integer(1)))


@attrs.frozen(kw_only=True)
class ScheduleConfig:
    """ "curriculum_learning.schedule_config"."""

    total_curriculum_step: int | None = key(None, maybe(integer(1)), "yes", "steps from min_difficulty to max_difficulty; for fixed_linear and fixed_root", auto="given")
    difficulty_step: int | None = key(None, maybe(integer(1)), "yes", "difficulties are multiples of it; for fixed_linear and fixed_root", auto="given")
    root_degree: float | None = key(None, maybe(number(above=0)), "yes", "for fixed_root", auto="given")
    difficulty: list[int] | None = key(None, maybe(listing(integer(1))), "yes", "for fixed_discrete", auto="given")
    max_step: list[int] | None = key(None, maybe(listing(integer(1))), "yes", "for fixed_discrete: one less than difficulty has", auto="given")


@attrs.frozen(kw_only=True)
class CurriculumLearning:
    """ "curriculum_learning"."""

    enabled: bool = key(False, BOOLEAN, "yes", "batches are cut to a length that grows with the step")
    curriculum_type: str = key("seqlen", one_of("seqlen"), "yes", "the length of sequences is the only one")
    min_difficulty: int | None = key(None, maybe(integer(1)), "yes", "tokens at the first step", auto="given")
    max_difficulty: int | None = key(None, maybe(integer(1)), "yes", "tokens at the last", auto="given")
    schedule_type: str | None = key(None, maybe(one_of("fixed_linear", "fixed_root", "fixed_discrete")), "yes", "how it grows; a function of your own (DeepSpeed's custom): fds.deepspeed's data loader takes one", auto="given")
    schedule_config: ScheduleConfig = section(ScheduleConfig)


__all__ = [
    "AIO", "ActivationCheckpointing", "CSVMonitor", "Checkpoint", "Comet", "CommsLogger", "Compile", "CurriculumLearning", "FlopsProfiler", "HybridEngine", "JsonlMonitor", "TensorBoard",
    "TensorParallel", "Timers", "WandB",
]  # fmt: skip
