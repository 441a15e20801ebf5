"""The BERT layer as a pure function of named values, and what of them a backward pass keeps: the computing behind `DeepSpeedTransformerLayer`.

Post-norm (`pre_layer_norm=False`), with H hidden and I intermediate features, h heads, for B rows of S tokens:

| value | is | shape |
|---|---|---|
| `input` | the layer's | B S H |
| `qkv` | linear(`input`) | 3 B h S H/h |
| `probs` | softmax(query . key / sqrt(H/h) + mask) | B h S S |
| `probs_dropped` | dropout(`probs`), by `attn_keep` | B h S S |
| `context` | `probs_dropped` . value | B S H |
| `attn_res` | `input` + dropout(linear(`context`)), by `attn_output_keep` | B S H |
| `ff1_inp` | norm(`attn_res`) | B S H |
| `gelu_inp` | linear(`ff1_inp`) | B S I |
| `ff2_inp` | gelu(`gelu_inp`) | B S I |
| `out_res` | `ff1_inp` + dropout(linear(`ff2_inp`)), by `layer_output_keep` | B S H |
| the output | norm(`out_res`) | B S H |

Pre-norm: `inp_norm` = norm(`input`) goes into `qkv`, and the output is `attn_res` + dropout(linear(`ff2_inp`)).

All of these are kept for backward, and nothing else. A value that a policy names is not: who needs it in backward makes it again, elementwise, from one
that is kept, so that no product of matrices runs twice.

| option | not kept | made again from |
|---|---|---|
| `gelu_checkpoint` | `ff2_inp` | `gelu_inp` |
| `attn_dropout_checkpoint` | `probs_dropped` | `probs` and the mask |
| `normalize_invertible` | of a norm inside of the layer, input and output | the normalised value, before weight and bias; one for two |
| `stochastic_mode` | `attn_keep`, `attn_output_keep`, `layer_output_keep` | their seeds |

DeepSpeed's `normalize_invertible` keeps a norm's output and divides by its weight. That loses digits where a weight is small, and everything where it is 0,
so the value between the two is kept here, for the same bytes. The last norm of a post-norm layer is the exception: its output is
the next layer's, and its input is kept. DeepSpeed saves that one too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fds.frame import FRAME
from fds.randomness import fold, next_seed, uniform


class Options(Protocol):
    """What of a configuration the computing depends on."""

    @property
    def heads(self) -> int: ...
    @property
    def attn_dropout_ratio(self) -> float: ...
    @property
    def hidden_dropout_ratio(self) -> float: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def pre_layer_norm(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def gelu_approximate(self) -> str: ...
    @property
    def normalize_invertible(self) -> bool: ...
    @property
    def gelu_checkpoint(self) -> bool: ...
    @property
    def attn_dropout_checkpoint(self) -> bool: ...
    @property
    def stochastic_mode(self) -> bool: ...


class Value(NamedTuple):
    """A named value. With `make`, who uses it keeps `kept` for backward in its place, and calls ``make(*kept)``."""

    x: Tensor
    make: Callable[..., Tensor] | None = None
    kept: tuple[Tensor, ...] = ()


class _Draw(NamedTuple):
    """Which elements one dropout keeps: those whose number, by this seed, is at least `ratio`."""

    seed: Tensor
    block: Tensor
    ratio: float


def bert_layer(p: Mapping[str, Tensor], hidden: Tensor, mask: Tensor | None, o: Options, *, training: bool) -> Tensor:
    """The layer's output, [B, S, H], from its parameters by name, hidden states [B, S, H], and a mask.

    `mask` broadcasts to [B, h, S, S]: floating, added to the scores; or bool, True where a token is seen.
    """
    norm = partial(_norm, eps=o.layer_norm_eps)
    attn_drop, output_drop, layer_drop = _draws(o, training)
    x = norm(hidden, p["norm_w"], p["norm_b"], o.normalize_invertible) if o.pre_layer_norm else Value(hidden)
    context = _attention(x, p["attn_qkvw"], p["attn_qkvb"], mask, attn_drop, o)
    attn_res = hidden + _dropout(F.linear(context, p["attn_ow"], p["attn_ob"]), output_drop, o.stochastic_mode).x
    ff1_inp = norm(attn_res, p["attn_nw"], p["attn_nb"], o.normalize_invertible)
    gelu_inp = _linear(ff1_inp, p["inter_w"], p["inter_b"])
    gelu = partial(F.gelu, approximate=o.gelu_approximate)
    ff2_inp = Value(gelu(gelu_inp), gelu, (gelu_inp,)) if o.gelu_checkpoint else Value(gelu(gelu_inp))
    out = _dropout(_linear(ff2_inp, p["output_w"], p["output_b"]), layer_drop, o.stochastic_mode).x
    if o.pre_layer_norm:
        return attn_res + out
    return norm(ff1_inp.x + out, p["norm_w"], p["norm_b"], False).x


def kept_bytes(hidden: int, intermediate: int, o: Options, rows: int, length: int, *, itemsize: int = 4, training: bool = True) -> dict[str, int]:  # fmt: skip
    """Bytes that one call keeps for its backward, by value, beside parameters and the mask. Sums are exact in float32."""
    h, wide, scores = rows * length * hidden * itemsize, rows * length * intermediate * itemsize, rows * o.heads * length**2  # fmt: skip
    statistic = rows * length * 4
    attn, output = (training and r > 0 for r in (o.attn_dropout_ratio, o.hidden_dropout_ratio))

    def normed(before: str, after: str) -> dict[str, int]:
        if o.normalize_invertible:
            return {f"{after}_normalised": h, f"{after}_statistics": statistic}
        return {before: h, after: h, f"{after}_statistics": 2 * statistic}

    keeps = {"attn_keep": attn * scores, "attn_output_keep": output * h // itemsize, "layer_output_keep": output * h // itemsize}  # fmt: skip
    if o.stochastic_mode:
        keeps = {k: 8 * bool(v) for k, v in keeps.items()}  # a seed each, and where in the batch the rows are
        keeps["place"] = 8 * any(keeps.values())
    return {
        **(normed("input", "inp_norm") if o.pre_layer_norm else {"input": h}),
        "qkv": 3 * h,
        "probs": scores * itemsize,
        **({} if o.attn_dropout_checkpoint or not attn else {"probs_dropped": scores * itemsize}),
        "context": h,
        **normed("attn_res", "ff1_inp"),
        "gelu_inp": wide,
        **({} if o.gelu_checkpoint else {"ff2_inp": wide}),
        **({} if o.pre_layer_norm else {"out_res": h, "out_statistics": 2 * statistic}),
        **{k: v for k, v in keeps.items() if v},
    }


def _draws(o: Options, training: bool) -> list[_Draw | None]:
    """Of the attention's, its output's and the layer's output's dropout: counted as the Hugging Face layer's three draws are."""
    ratios = [r if training else 0.0 for r in (o.attn_dropout_ratio, o.hidden_dropout_ratio, o.hidden_dropout_ratio)]
    if not any(ratios):
        return [None] * 3
    frame = FRAME.get()
    own = None if frame.seed is not None else torch.randint(2**31 - 1, ())  # outside of a program: torch's generator
    block = torch.as_tensor(0 if own is not None else frame.block)
    found: list[_Draw | None] = []
    for i, ratio in enumerate(ratios):
        if not ratio:
            found.append(None)
            continue
        seed = next_seed() if own is None else fold(own, i)
        found.append(_Draw(seed if o.seed < 0 else fold(seed, o.seed), block, ratio))
    return found


def _attention(x: Value, w: Tensor, b: Tensor, mask: Tensor | None, draw: _Draw | None, o: Options) -> Tensor:
    rows, length, hidden = x.x.shape
    size = hidden // o.heads
    # One buffer for all three, in the order in which the products read it: else each product would keep a copy of its own.
    qkv = _linear(x, w, b).view(rows, length, 3, o.heads, size).permute(2, 0, 3, 1, 4).contiguous()
    query, key, value = qkv.unbind(0)
    scores = (query @ key.transpose(-1, -2)) * size**-0.5
    if mask is not None:
        scores = scores + _added(mask, scores.dtype)
    probs = torch.softmax(scores, -1)
    dropped = _dropout(probs, draw, o.stochastic_mode)
    kept = dropped if o.attn_dropout_checkpoint else Value(dropped.x)
    context = kept.x @ value if kept.make is None else _MatMul.apply(kept.make, kept.x, value, *kept.kept)
    return context.transpose(1, 2).reshape(rows, length, hidden)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _dropout(x: Tensor, draw: _Draw | None, redraw: bool) -> Value:
    if draw is None:
        return Value(x)
    if redraw:
        kept = (x, draw.seed, draw.block)
        return Value(_Redrawn.apply(draw.ratio, *kept), partial(_redrawn, draw.ratio), kept)
    keep = _keep(draw.ratio, x, draw.seed, draw.block)
    return Value(_where(draw.ratio, x, keep), partial(_where, draw.ratio), (x, keep))


def _keep(ratio: float, x: Tensor, seed: Tensor, block: Tensor) -> Tensor:
    return uniform(seed, x.shape, block=block, device=x.device) >= ratio


def _where(ratio: float, x: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, x * (1.0 / (1.0 - ratio) if ratio < 1.0 else 0.0), 0.0)


def _redrawn(ratio: float, x: Tensor, seed: Tensor, block: Tensor) -> Tensor:
    return _where(ratio, x, _keep(ratio, x, seed, block))


def _linear(v: Value, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(v.x, w, b) if v.make is None else _Linear.apply(v.make, v.x, w, b, *v.kept)


def _norm(x: Tensor, w: Tensor, b: Tensor, invertible: bool, *, eps: float) -> Value:
    if not invertible:
        return Value(F.layer_norm(x, w.shape, w, b, eps))
    n = _Normalise.apply(x, eps)[0]
    return Value(_affine(n, w, b), _affine, (n, w, b))


def _affine(n: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return n * w + b


# Functions that keep something else than torch's own would. What a `make` returns depends on its arguments alone, so that further derivatives are right too.


class _Linear(torch.autograd.Function):
    """``F.linear(x, w, b)``, where x is ``make(*kept)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(make: Any, x: Tensor, w: Tensor, b: Tensor, *kept: Tensor) -> Tensor:
        return F.linear(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.make, w, kept = inputs[0], inputs[2], inputs[4:]
        ctx.save_for_backward(w, *kept)
        ctx.save_for_forward(w, *kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        (g,), (w, *kept) = cotangents, ctx.saved_tensors
        rows, needs = g.flatten(0, -2), ctx.needs_input_grad
        return (
            None,
            g @ w,
            rows.transpose(0, 1) @ ctx.make(*kept).flatten(0, -2) if needs[2] else None,
            rows.sum(0) if needs[3] else None,
            *[None] * len(kept),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, x, w, b, *_ = tangents
        weight, *kept = ctx.saved_tensors
        out = F.linear(x, weight, b)
        return out if w is None else out + F.linear(ctx.make(*kept), w)


class _MatMul(torch.autograd.Function):
    """``x @ y``, where x is ``make(*kept)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(make: Any, x: Tensor, y: Tensor, *kept: Tensor) -> Tensor:
        return x @ y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.make, y, kept = inputs[0], inputs[2], inputs[3:]
        ctx.save_for_backward(y, *kept)
        ctx.save_for_forward(y, *kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        (g,), (y, *kept) = cotangents, ctx.saved_tensors
        return (
            None,
            g @ y.transpose(-1, -2),
            ctx.make(*kept).transpose(-1, -2) @ g,
            *[None] * len(kept),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, x, y, *_ = tangents
        right, *kept = ctx.saved_tensors
        return x @ right + ctx.make(*kept) @ y


class _Redrawn(torch.autograd.Function):
    """Dropout that keeps the seed of its mask. Linear in x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ratio: float, x: Tensor, seed: Tensor, block: Tensor) -> Tensor:
        return _redrawn(ratio, x, seed, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ratio, _, seed, block = inputs
        ctx.save_for_backward(seed, block)
        ctx.save_for_forward(seed, block)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        return None, _redrawn(ctx.ratio, cotangents[0], *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _redrawn(ctx.ratio, tangents[1], *ctx.saved_tensors)


class _Normalise(torch.autograd.Function):
    """(n, r) with r = 1 / sqrt(variance + eps) and n = (x - mean) r, over the last dimension; keeps n and r."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        n, _, r = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return n, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        (g, gr), (n, r) = cotangents, ctx.saved_tensors
        centred = g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)
        return (r * centred - gr * r * r * n / n.shape[-1]).to(n.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, (n, r) = tangents[0], ctx.saved_tensors
        along = (x * n).mean(-1, keepdim=True)
        return (r * (x - x.mean(-1, keepdim=True) - n * along)).to(n.dtype), -r * r * along
