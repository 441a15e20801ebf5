"""`quantized`: what `shard` sends goes over the wire in blocks of 8-bit or 4-bit codes (ZeRO++), with error feedback (LoCo).

It stands outside of `shard` and stores what `shard` stores. On its way in, a flat buffer becomes something that brings its own gather along:
codes and scales of a rank's part, as one message; the parts are dequantised where they arrive. Its derivative is that of an exact gather
(straight through), or its quantised transpose: every rank quantises its n parts of the gradient, one all-to-all, a sum in float32.

What quantising takes from a gradient is added to the next one, so it is state, and backward has to hand it out. A backward pass returns
nothing but gradients: so the error is a stored leaf, which the gather takes and does not read, and whose gradient is its next value
(`Lens.carries`). That is pure, holds under recompute and the compiler, and is saved with the parameters. An optimizer could keep the error
only if it reduced the gradients, which under `shard` come out of backward reduced.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from fds._torch import opaque_operator, operator
from fds.program import Carry, Lens, Program, same
from fds.quantize import check_dtype, check_formats, tolerance
from fds.sharding.collectives import collective, gather_op, scatter_op
from fds.transform import Transform, direct, parameters
from fds.tree import Params


@attrs.frozen
class ErrorFeedback:
    """What quantising takes from a gradient g is added to later ones: ``e' = beta e + (1 - beta) (g + e - Q(g + e))``, Q(g + e) is sent.

    Law: what was sent adds up to the gradients, less ``e / (1 - beta)``: nothing is lost, some of it is late.

    * `beta`: the share of the error that stays; 0 is the classic form, in which all that is missing goes with the next gradient.
    * `reset`: after so many backward passes the error begins at zero again.

    DeepSpeed's ``err_beta`` and ``reset_T``. Xie et al. 2024, arXiv:2407.04480; Seide et al. 2014 (the classic form).
    """

    beta: float = 0.8
    reset: int = 1024

    def __attrs_post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"ErrorFeedback: beta={self.beta!r}, required 0 <= beta < 1")
        if not isinstance(self.reset, int) or self.reset < 2:
            raise ValueError(f"ErrorFeedback: reset={self.reset!r}, required a number of backward passes >= 2")


@direct
def quantized(
    *,
    weights: str | None = None,
    gradients: str | None = None,
    block: int = 128,
    feedback: ErrorFeedback | None = None,
) -> Transform:
    """Send the weights that `shard` gathers, the gradients that it reduces, or both, in blocks of codes. Comes directly after `shard`.

    Args:
        weights: "int8", "int4", "e4m3" or "e5m2" (`fds.kernels.block_quantize`); None: as they are. Of trainable leaves; for frozen ones put
            `quantize_frozen` before `shard`, which stores them in codes as well. Gradients pass straight through: the gathered weights are
            rounded, what is stored is not.
        gradients: the same formats. The mean or sum over ranks is taken in float32, after one all-to-all.
        block: neighbours with one scale: 32, 64, ..., 1024. Blocks run over the flat buffer: norms and biases share one with their neighbours,
            unless ``shard(axis, threshold=...)`` keeps them out of it.
        feedback: keep what gradients lose, and add it to later ones. Takes 2 bytes per parameter on every rank: each has an error of its own for
            all parameters.

    On the wire, of m elements and b blocks: m + 2 b bytes for 8 bits, m / 2 + 2 b for 4. On one rank nothing is sent, and nothing changes.
    Works under `torch.func`, `vmap` and `jvp`; a second derivative only while gradients are not quantised (`ValueError`).

    Law: gathered weights are within `tol` of the stored ones, relative to the largest in their block; `restore` is exact.
    Wang et al. 2023, arXiv:2306.10209, sections 3.1 and 3.3 (with one level of all-to-all).

    Raises:
        ValueError: nothing to quantise; an unknown format or block; `feedback` without `gradients`; not directly after `shard`.

    >>> import fds
    >>> dp = fds.sharding.mesh(dp=1)["dp"]
    >>> fds.chain(fds.shard(dp), fds.quantized(weights="int8", gradients="int4"), fds.cast("bfloat16"), fds.checkpoint()).parts[1]
    quantized(weights='int8', gradients='int4')
    """
    check_formats("quantized", block, weights=weights, gradients=gradients)
    if weights is None and gradients is None:
        raise ValueError("quantized: nothing to quantise; give weights='int8', gradients='int4', or both")
    if feedback is not None and gradients is None:
        raise ValueError("quantized: feedback is of quantised gradients; give gradients='int4', or leave feedback out")
    given = {"weights": weights, "gradients": gradients, "block": block if block != 128 else None, "feedback": feedback}
    options = {k: v for k, v in given.items() if v is not None}

    def check(program: Program) -> None:
        last = program.history[-1] if program.history else None
        if last is None or "flat" not in last.provides or len(last.axes) != 1:
            raise ValueError(
                f"{t!r} has to come directly after a shard over one axis, whose messages it quantises; this program has {list(program.history) or 'no transformations'}; the order that works: chain(..., shard(axis), {t!r}, ...)"
            )

    t = Transform(
        "quantized",
        tuple(options.items()),
        lens=lambda p: _lens(p, weights or "", gradients or "", block, feedback),
        check=check,
        provides=frozenset(["quantized", "layout"]),
        conflicts=frozenset(["quantized", "whole"]),
    )
    return t


# --- the lens ---


@attrs.frozen(eq=False)
class _Wired:
    """A flat buffer that brings its own gather along (`collectives.Gatherable`)."""

    x: Tensor
    error: Tensor | None
    passes: Tensor | None
    settings: tuple[str, str, int, float]  # formats of weights and gradients, block, beta

    def gathered(self, axis: Any, mean: bool) -> Tensor:
        return quantized_gather(self.x, self.error, self.passes, axis.size, axis.group, mean, *self.settings)


def _lens(p: Program, weights: str, gradients: str, block: int, feedback: ErrorFeedback | None) -> Lens | None:
    (axis,) = p.history[-1].axes
    names = [k for k, v in parameters(p).items() if v.requires_grad and axis in p.axes.get(k, ())]
    if not names:
        return None
    for k in names:
        check_dtype("quantized", k, p.spec[k].dtype)
    beta, reset = (0.0, 0) if feedback is None else attrs.astuple(feedback)
    kept = names if feedback is not None else []
    carries: dict[str, Carry] = {_error(k): partial(_next_error, k, reset) for k in kept}
    carries |= {_passes(k): partial(_next_passes, k, reset) for k in kept}

    def put(params: Params) -> Params:
        out = dict(params)
        for k in kept:
            shapes = {_error(k): (params[k].numel() * axis.size, torch.bfloat16), _passes(k): ((), torch.float32)}
            for leaf, (shape, dtype) in shapes.items():
                zeros = torch.zeros(shape, dtype=dtype, device=params[k].device)
                out[leaf] = zeros.requires_grad_(params[k].requires_grad)
        return out

    def get(stored: Params) -> Any:
        settings = weights, gradients, block, beta
        wired = {k: _Wired(stored[k], stored.get(_error(k)), stored.get(_passes(k)), settings) for k in names}
        return {**restore(stored), **wired}

    def restore(stored: Params) -> Params:
        return {k: v for k, v in stored.items() if k not in carries}

    tol = max(tolerance(weights, p.spec[k].dtype) for k in names) if weights else 0.0
    axes = {leaf: p.axes[k] for k in kept for leaf in (_error(k), _passes(k))}
    return Lens(put, get, tol, restore, axes=axes, layout=same, carries=carries)


def _error(key: str) -> str:
    """What the last gradients of a buffer lost on this rank, [n m] bfloat16. Its gradient is the sum of its next values over the uses of a site."""
    return f"{key}.error"


def _passes(key: str) -> str:
    """Backward passes since the error was zero, 0-D float32. Its gradient is the number of uses."""
    return f"{key}.passes"


def _next_passes(key: str, reset: int, values: Params, cotangents: Params) -> Tensor:
    passes = values[_passes(key)] + (cotangents[_passes(key)] > 0)
    return torch.where(passes < reset, passes, 0.0)


def _next_error(key: str, reset: int, values: Params, cotangents: Params) -> Tensor:
    """The mean over uses: a site that is called twice compensates twice. Unchanged without any."""
    uses = cotangents[_passes(key)]
    new = torch.where(uses > 0, cotangents[_error(key)] / uses.clamp(min=1), values[_error(key)])
    return torch.where(_next_passes(key, reset, values, cotangents) > 0, new, 0.0)


# --- messages ---


def _message(codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The bytes of codes and scales, side by side in each of so many rows."""
    return torch.cat([x.contiguous().view(torch.uint8).reshape(rows, -1) for x in (codes, scales)], 1)


def _apart(message: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a message, with the dtypes and shapes of those given."""
    width = codes.nbytes // len(message)
    first, second = message[:, :width].reshape(-1), message[:, width:].reshape(-1)
    return first.view(codes.dtype).view(codes.shape), second.view(scales.dtype).view(scales.shape)


def _gather_codes(codes: Tensor, scales: Tensor, n: int, group: str) -> tuple[Tensor, Tensor]:
    got = gather_op(_message(codes, scales, 1).view(-1), n, group, False).view(n, -1)
    return _apart(got, codes.expand(n, *codes.shape), scales.expand(n, *scales.shape))


def _exchange_codes(codes: Tensor, scales: Tensor, n: int, group: str) -> tuple[Tensor, Tensor]:
    message = _message(codes, scales, n)
    got = torch.empty_like(message)
    with collective("all_to_all", message, group) as ranks:
        dist.all_to_all_single(got.view(-1), message.view(-1), group=ranks)
    return _apart(got, codes, scales)


# Codes and scales of this rank -> those of all, a rank a row; and rows for the others -> rows from them.
_CODES = "(Tensor codes, Tensor scales, int n, str group) -> (Tensor, Tensor)"
GATHER_CODES = opaque_operator(
    "gather_codes",
    _CODES,
    _gather_codes,
    lambda codes, scales, n, group: (codes.new_empty((n, *codes.shape)), scales.new_empty((n, *scales.shape))),
)
EXCHANGE_CODES = opaque_operator(
    "exchange_codes",
    _CODES,
    _exchange_codes,
    lambda codes, scales, n, group: (codes.new_empty(codes.shape), scales.new_empty(scales.shape)),
)


# --- operators ---


def _side_by_side(parts: Tensor) -> Tensor:
    """Parts of the ranks [n, ..., m] -> [..., n m]."""
    return parts.movedim(0, -2).flatten(-2)


def _by_rank(x: Tensor, n: int) -> Tensor:
    """[..., n m] -> parts for the ranks [n, ..., m]."""
    return x.unflatten(-1, (n, -1)).movedim(-2, 0)


def _exact_gather(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    return _side_by_side(gather_op(x.reshape(-1), n, group, mean).view(n, *x.shape))


def _exact_scatter(g: Tensor, n: int, group: str, mean: bool) -> Tensor:
    parts = _by_rank(g, n)
    return scatter_op(parts.reshape(-1), n, group, mean).view(parts.shape[1:])


def _gather(x: Tensor, error: Any, passes: Any, n: int, group: str, mean: bool, weights: str, gradients: str, block: int, beta: float) -> Tensor:  # fmt: skip
    from fds.kernels.quantize import block_dequantize, block_quantize

    if not weights:
        return _exact_gather(x, n, group, mean)
    codes, scales = GATHER_CODES(*block_quantize(x, format=weights, block=block), n, group)
    parts = block_dequantize(codes, scales, format=weights, block=block, length=x.shape[-1], dtype=x.dtype)
    return _side_by_side(parts)


def _scatter(g: Tensor, error: Tensor | None, n: int, group: str, mean: bool, format: str, block: int, beta: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fds.kernels.quantize import block_dequantize, block_quantize

    parts = _by_rank(g, n).float()
    if error is not None:
        parts = parts + _by_rank(error, n).float()
    options: dict[str, Any] = {"format": format, "block": block}
    own = block_quantize(parts, **options)
    options["length"] = parts.shape[-1]
    total = block_dequantize(*EXCHANGE_CODES(*own, n, group), **options).sum(0)
    out = (total / n if mean else total).to(g.dtype)
    if error is None:
        return out, g.new_empty((*g.shape[:-1], 0))
    lost = parts - block_dequantize(*own, **options)
    new = beta * _by_rank(error, n).float() + (1 - beta) * lost
    return out, _side_by_side(new).to(error.dtype)


def _scatter_shapes(g: Tensor, error: Tensor | None, n: int, *_: Any) -> tuple[Tensor, Tensor]:
    lead, m = g.shape[:-1], g.shape[-1] // n
    return g.new_empty((*lead, m)), g.new_empty((*lead, 0)) if error is None else error.new_empty(g.shape)


def _batched(name: str) -> Callable[..., Any]:
    """A vmap rule: the batch is one more leading dimension, and one message."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        full = [
            a if not isinstance(a, Tensor) else a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
            for a, d in zip(args, dims, strict=True)
        ]
        out = getattr(torch.ops.fds, name).default(*full)
        return (out, 0) if isinstance(out, Tensor) else (out, (0,) * len(out))

    return rule


def _save(ctx: Any, args: tuple[Any, ...], out: Any) -> None:
    ctx.save_for_backward(*args[1:3])
    ctx.constants = args[3:]


def _gather_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    error, passes = ctx.saved_tensors
    n, group, mean, _, gradients, block, beta = ctx.constants
    constants = [None] * len(ctx.constants)
    if not gradients:
        return _exact_scatter(g, n, group, mean), None, None, *constants
    part, new = quantized_scatter(g, error, n, group, mean, gradients, block, beta)
    if error is None:
        return part, None, None, *constants
    return part, new, torch.ones_like(passes), *constants


def _gather_jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
    n, group, mean = ctx.constants[:3]
    return None if tangent is None else _exact_gather(tangent, n, group, mean)


def _refused(*_: Any) -> Any:
    raise ValueError(
        "quantized: a gradient that went over the wire in codes has no derivative; for second derivatives use quantized(weights=...) without gradients="
    )


def _nothing(*_: Any) -> None:
    """Nothing to save."""


quantized_scatter = operator(
    "quantized_scatter",
    "(Tensor g, Tensor? error, int n, str group, bool mean, str format, int block, float beta) -> (Tensor, Tensor)",
    primitive=_scatter,
    fake=_scatter_shapes,
    batch=_batched("quantized_scatter"),
    save=_nothing,
    backward=_refused,
    jvp=_refused,
    inline=True,
)
quantized_gather = operator(
    "quantized_gather",
    "(Tensor x, Tensor? error, Tensor? passes, int n, str group, bool mean, str weights, str gradients, int block, float beta) -> Tensor",
    primitive=_gather,
    fake=lambda x, error, passes, n, *_: x.new_empty((*x.shape[:-1], n * x.shape[-1])),
    batch=_batched("quantized_gather"),
    save=_save,
    backward=_gather_backward,
    jvp=_gather_jvp,
    inline=True,
)
