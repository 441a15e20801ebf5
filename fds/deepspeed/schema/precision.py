"""The sections about dtypes: "fp16", "bf16", "torch_autocast", "data_types"."""

import attrs
import torch

from fds.deepspeed.fields import BOOLEAN, TEXT, Kind, either, integer, key, listing, maybe, number, one_of

_SHORT = maybe(one_of("fp32", "fp16", "bf16"))
_NAMES = {"float16": ("fp16", "half"), "bfloat16": ("bf16",), "float32": ("fp32", "float")}


def _dtype(value: object) -> str:
    named = str(value).removeprefix("torch.")
    for name, others in _NAMES.items():
        if isinstance(value, str | torch.dtype) and named in (name, *others):
            return name
    raise ValueError("not one of them")


DTYPE = Kind(", ".join(f'"{n}"' for name, others in _NAMES.items() for n in (name, *others)), _dtype)

# A key is a line.
# fmt: off


@attrs.frozen(kw_only=True)
class FP16:
    """ "fp16"."""

    enabled: bool = key(False, BOOLEAN, "yes", "`cast(torch.float16)` outside of what is stored, float32 masters, a loss scale")
    auto_cast: bool = key(False, BOOLEAN, "design", "`cast` casts the floating inputs of the model, always")
    loss_scale: float = key(0, number(0), "yes", "0: `DynamicLossScale`; else this one for good (`train_step(loss_scale=...)`)")
    initial_scale_power: int = key(16, integer(0), "yes", "`DynamicLossScale(initial_power=...)`")
    loss_scale_window: int = key(1000, integer(1), "yes", "`DynamicLossScale(window=...)`")
    hysteresis: int = key(2, integer(1), "yes", "`DynamicLossScale(hysteresis=...)`")
    consecutive_hysteresis: bool = key(False, BOOLEAN, "yes", "`DynamicLossScale(consecutive_hysteresis=...)`")
    min_loss_scale: float = key(1, number(above=0), "yes", "`DynamicLossScale(minimum=...)`; at it, steps are skipped and counted, and the run goes on")
    fp16_master_weights_and_grads: bool = key(False, BOOLEAN, "no", "masters are float32")


@attrs.frozen(kw_only=True)
class BF16:
    """ "bf16"."""

    enabled: bool = key(False, BOOLEAN, "yes", "`cast(torch.bfloat16)` outside of `shard` (stages 0 and 3), `optim.with_master` (1 and 2); float32 masters")
    immediate_grad_update: bool = key(False, BOOLEAN, "design", "gradients of microbatches are added as they come")
    check_grad_overflow: bool = key(True, BOOLEAN, "no", 'a step that is not finite is always skipped, counted (`metrics["skipped"]`), and its leaves are named (`metrics["nonfinite"]`)')
    bf16_master_weights_and_grads: bool = key(False, BOOLEAN, "no", "masters are float32; for bfloat16 without masters write the chain: `optim.adamw(rounding_seed=...)` rounds at random")
    bf16_optimizer_states: bool = key(False, BOOLEAN, "no", "moments have the masters' dtype; `optim.adamw8bit` has them in 8 bits")


@attrs.frozen(kw_only=True)
class TorchAutocast:
    """ "torch_autocast"."""

    enabled: bool = key(False, BOOLEAN, "yes", "the model's call runs in `torch.autocast`; parameters, gradients and the wire stay float32")
    dtype: str | None = key(None, maybe(DTYPE), "yes", "of the autocast; null: bfloat16. float16 has a loss scale by the numbers of torch.amp.GradScaler")
    lower_precision_safe_modules: list[str] | None = key(None, maybe(listing(TEXT)), "no", "which operators run in the lower dtype is torch's list; modules are not asked")


@attrs.frozen(kw_only=True)
class DataTypes:
    """ "data_types"."""

    grad_accum_dtype: str | None = key(None, _SHORT, "yes", "fp32: masters on every rank at stages 1, 2 too; bf16: what they have there with bf16; another is refused")
    param_dtype: str | None = key(None, _SHORT, "no", "the model's dtype is the one that it comes in; computing in another: bf16.enabled or fp16.enabled")
    buffer_dtype: str | None = key(None, _SHORT, "no", "buffers keep their dtype; convert the model's before")
    keep_in_fp32_modules: str | list[str] = key("auto", either(one_of("auto"), listing(TEXT)), "design", "buffers are never cast", auto="value")
