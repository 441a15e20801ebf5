"""The keys at the top of a ds_config."""

from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed.fields import BOOLEAN, NEVER, either, integer, key, maybe, number, off, one_of, section
from fds.deepspeed.schema.methods import Optimizer, Scheduler
from fds.deepspeed.schema.precision import BF16, FP16, DataTypes, TorchAutocast
from fds.deepspeed.schema.tools import (
    AIO,
    ActivationCheckpointing,
    Checkpoint,
    Comet,
    CommsLogger,
    Compile,
    CSVMonitor,
    CurriculumLearning,
    FlopsProfiler,
    HybridEngine,
    JsonlMonitor,
    TensorBoard,
    TensorParallel,
    Timers,
    WandB,
)  # fmt: skip
from fds.deepspeed.schema.zero import ZeroOptimization

_COMM = one_of("fp32", "fp16", "bf16", any_case=True)

# A key is a line.
# fmt: off


@attrs.frozen(kw_only=True)
class Top:
    """All keys of a configuration; see `fds.deepspeed.config.DeepSpeedConfig`."""

    train_batch_size: int = key(None, maybe(integer(1)), "yes", "rows of a step, over all ranks: micro x accumulation x data-parallel ranks; two of the three give the third")
    train_micro_batch_size_per_gpu: int = key(None, maybe(integer(1)), "yes", "rows of a rank in one forward and backward")
    gradient_accumulation_steps: int = key(None, maybe(integer(1)), "yes", "`train_step(microbatches=...)`")
    managed_gradient_accumulation: bool = key(True, BOOLEAN, "no", "to decide yourself when to update, call the pure functions: `fds.value_and_grad` and the optimizer's update")
    gradient_clipping: float = key(1.0, number(0), "yes", "`optim.clip_by_global_norm` over all ranks; 0: none")
    optimizer: Optimizer = section(Optimizer)
    scheduler: Scheduler = section(Scheduler)
    fp16: FP16 = section(FP16)
    bf16: BF16 = section(BF16, aliases=("bfloat16",))
    torch_autocast: TorchAutocast = section(TorchAutocast)
    data_types: DataTypes = section(DataTypes)
    zero_optimization: ZeroOptimization = section(ZeroOptimization)
    zero_allow_untested_optimizer: bool = key(False, BOOLEAN, "design", "any (init, update) pair is sharded; one that looks across leaves or elements says so")
    zero_force_ds_cpu_optimizer: bool = key(True, BOOLEAN, "design", "any (init, update) pair is streamed; one that looks across leaves is refused")
    aio: AIO = section(AIO)
    activation_checkpointing: ActivationCheckpointing = section(ActivationCheckpointing)
    hybrid_engine: HybridEngine = section(HybridEngine)
    tensor_parallel: TensorParallel = section(TensorParallel)
    compile: Compile = section(Compile)
    checkpoint: Checkpoint = section(Checkpoint)
    curriculum_learning: CurriculumLearning = section(CurriculumLearning)
    steps_per_print: int | None = key(None, maybe(either(integer(1), NEVER)), "yes", "a line on rank 0 every so many steps; null or infinity (accelerate): never")
    wall_clock_breakdown: bool = key(False, BOOLEAN, "yes", "times of phases: a line after each step")
    memory_breakdown: bool = key(False, BOOLEAN, "yes", "memory: a line after each step")
    dump_state: bool = key(False, BOOLEAN, "yes", "rank 0 prints the resolved configuration")
    log_level: str | None = key(None, maybe(one_of("debug", "info", "warning", "error", "critical", any_case=True)), "yes", "of fds's logger")
    tensorboard: TensorBoard = section(TensorBoard)
    wandb: WandB = section(WandB)
    comet: Comet = section(Comet)
    csv_monitor: CSVMonitor = section(CSVMonitor)
    jsonl_monitor: JsonlMonitor = section(JsonlMonitor)
    comms_logger: CommsLogger = section(CommsLogger)
    flops_profiler: FlopsProfiler = section(FlopsProfiler)
    timers: Timers = section(Timers)
    dataloader_drop_last: bool = key(False, BOOLEAN, "yes", "rows at the end that fill no batch are left out")
    communication_data_type: str | None = key(None, maybe(_COMM), "yes", "of gradients on the wire, by the place of `cast`: stored dtype or compute dtype; another is refused")
    seq_parallel_communication_data_type: str = key("fp32", _COMM, "no", "no sequence parallelism over ranks yet")
    prescale_gradients: bool = key(False, BOOLEAN, "design", "a mean is a sum over ranks, scaled once")
    gradient_predivide_factor: float = key(1.0, number(above=0), "design", "a mean is a sum over ranks, scaled once")
    gradient_allreduce_op: str = key("mean", one_of("mean", "sum", any_case=True), "yes", '`shard(reduce=...)`, `replicate(reduce=...)`: stages 0 and 3')
    data_parallel_size: int = key(None, maybe(integer(1)), "yes", "ranks with rows of their own; checked, and found if left out")
    sequence_parallel_size: int = key(None, maybe(integer(1)), "no", "no sequence parallelism over ranks yet; `tensor_parallel(sequence=True)` splits activations", neutral=[1])
    vocabulary_size: int | None = key(None, maybe(integer(1)), "design", "a warning, as in DeepSpeed, if it is no multiple of 8")
    disable_python_gc: bool = key(False, BOOLEAN, "no", "call gc.disable() in your script")
    disable_allgather: bool = key(False, BOOLEAN, "no", "parameters that are updated in parts have to be gathered; leave it out")
    sparse_gradients: bool = key(False, BOOLEAN, "no", "gradients of embeddings are dense; leave it out")
    graph_harvesting: bool = key(False, BOOLEAN, "no", "give the compiled step a mode: `fds.compile(step, mode=...)`")
    use_data_before_expert_parallelism: bool = key(False, BOOLEAN, "no", "no expert parallelism yet")
    amp: Mapping[str, Any] | None = off("enabled opt_level loss_scale keep_batchnorm_fp32 min_loss_scale max_loss_scale cast_model_type patch_torch_functions cast_model_outputs master_weights", "Apex is gone; bf16, fp16 or torch_autocast")
    pipeline: Mapping[str, Any] | None = off("stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned use_reentrant", "no pipelines yet; shard (stage 3), tensor_parallel")
    expert_parallel: Mapping[str, Any] | None = off("enabled autoep_size preset_model expert_tensor_parallel_size validate_folding_routing async_split_plan moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts shared_experts_pattern shared_experts_gate_pattern expert_activation", "no expert parallelism yet; `tensor_parallel` splits experts")
    elasticity: Mapping[str, Any] | None = off("enabled max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time prefer_larger_batch ignore_non_elastic_batch_info version num_gpus_per_node model_parallel_size", "states go on with any number of ranks: torchrun's --max-restarts, and `load_checkpoint` (examples/elastic.py)")
    autotuning: Mapping[str, Any] | None = off("enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric metric_path tuner_type tuner_early_stopping tuner_num_trials mp_size max_train_batch_size min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes arg_mappings model_info model_info_path", "`python -m fds.deepspeed.explain` gives memory and traffic of a configuration before it runs")
    compression_training: Mapping[str, Any] | None = off("layer_reduction weight_quantization activation_quantization sparse_pruning row_pruning head_pruning channel_pruning", "`quantize_frozen` for frozen weights; no pruning")
    data_efficiency: Mapping[str, Any] | None = off("enabled seed data_sampling data_routing", "a curriculum by length: curriculum_learning; no analysed data sets, no random layer-token drop")
    progressive_layer_drop: Mapping[str, Any] | None = off("enabled theta gamma", "leave it out")
    eigenvalue: Mapping[str, Any] | None = off("enabled verbose max_iter tol stability gas_boundary_resolution layer_name layer_num", "`torch.func.jvp` and `vjp` of a program give Hessian products")
    quantize_training: Mapping[str, Any] | None = off("enabled quantize_bits quantize_schedule quantize_groups fp16_mixed_quantize quantize_verbose quantize_algo quantize_eigenvalue", "`quantize_frozen` for frozen weights")
    weight_quantization: Mapping[str, Any] | None = off("enabled num_bits q_type q_groups quantized_initialization post_init_quant", "`init_inference(quant=...)`, or `quantize_frozen`", on=True)
    sparse_attention: Mapping[str, Any] | None = off("mode block different_layout_per_head num_local_blocks num_global_blocks attention horizontal_global_attention num_different_global_patterns num_random_blocks local_window_blocks global_block_indices global_block_end_indices num_sliding_window_blocks", "a model's own sliding windows; leave it out")
    nebula: Mapping[str, Any] | None = off("enabled load_path persistent_storage_path persistent_time_interval num_of_version_in_retention enable_nebula_load", "`save_state(asynchronous=True, keep=...)`")
    datastates_ckpt: Mapping[str, Any] | None = off("enabled host_cache_size parser_threads", "`save_state(asynchronous=True)`")


# What is written in documentation, or in old configurations, and was never read or is not any more; with what to write.
MISTAKEN = {
    "aio.thread_count": "DeepSpeed documents this key and ignores it; its code reads intra_op_parallelism",
    "zero_optimization.grad_hooks": "DeepSpeed documents this key and has no such field; leave it out",
    "elasticity.prefer_large_batch": "DeepSpeed documents this key and ignores it; its code reads prefer_larger_batch",
    "bf16.check_overflow": "the key is check_grad_overflow",
    "activation_checkpointing.partitioned_activations": "the key is partition_activations",
    "fp32_allreduce": 'the key is "communication_data_type": "fp32"',
    "zero_optimization.stage3_gather_fp16_weights": "the key is stage3_gather_16bit_weights_on_model_save",
    "max_grad_norm": "the key is gradient_clipping",
    "optimizer.params.max_grad_norm": "DeepSpeed refuses it too; the key is gradient_clipping, at the top",
    "train_micro_batch_size": "the key is train_micro_batch_size_per_gpu",
    "micro_batch_size": "the key is train_micro_batch_size_per_gpu",
}

__all__ = ["MISTAKEN", "Top"]
