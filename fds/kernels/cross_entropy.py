"""Cross-entropy of a linear layer, without its logits.

    x = h W^T + b;  x' = c tanh(x / c);  lse = log sum_v exp x'_v
    loss = lse - (1 - e) x'_t - e mean_v x'_v + z lse^2;  entropy = lse - sum_v p_v x'_v

The rows are taken in chunks: as many logits exist at a time as fit into `CHUNK` bytes or into the bytes of W in float32, whichever is more,
whatever the number of rows. (Every chunk reads W and reads and writes its gradient: with a fixed size, 40 rows of 49k words, that took 3.6
times as long as all rows at once.) The products stay with the library that is best at them; the kernel does all that lies between them, in two
passes over a chunk.

Two operators. `linear_cross_entropy` gives every row's loss, and computes the logits again in backward (8 N V H multiply-adds with the
gradients). `linear_cross_entropy_sum` is for a weighted sum, whose gradient it computes along the way (6 N V H).
On a CPU the products are of float32; the sum's are of the hidden states' dtype where the processor has instructions for it, and so its logits
and their gradients are rounded, as they are in a model that returns its logits.
Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.
"""

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from fds._torch import inside_functorch
from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl
from fds.lowering import native

CHUNK = 2**24  # bytes of float32 logits at a time on a CPU; 16 times as many on a GPU, so that products fill it
IGNORED = -100
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the rows' loss, logsumexp, entropy


@attrs.frozen
class Terms:
    """What a row's loss is made of besides its logits."""

    ignore_index: int
    softcap: float
    label_smoothing: float
    z_loss: float


@attrs.frozen
class _Arithmetic:
    """How a chunk is computed: in aten, or by kernels."""

    operand: Callable[[Tensor], Tensor]  # a matrix as the products take it
    logits: Callable[[Tensor, Tensor], Tensor]  # [n, H], [V, H] -> [n, V]
    rows: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    accumulate: Callable[[Tensor | None, Tensor, Tensor], Tensor]  # sum + d^T h


# --- reference ---


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(x: Tensor, target: Tensor, terms: Terms, gradients: Gradients | None, forward: bool, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Loss, logsumexp, entropy [n] and gradient [n, V] of a chunk of logits."""
    e, z, cap = terms.label_smoothing, terms.z_loss, terms.softcap
    x = cap * (x / cap).tanh() if cap else x
    lse = x.logsumexp(-1)
    seen = target != terms.ignore_index
    place = target.where(seen, 0)[:, None]
    empty = lse.new_empty(0)
    loss = spread = empty
    if forward:
        loss = lse - (1 - e) * x.gather(1, place)[:, 0]
        loss = loss - e * x.mean(-1) if e else loss
        loss = (loss + z * lse.square() if z else loss).where(seen, 0)
    if gradients is None and not entropy:
        return loss, lse, empty, None
    p = (x - lse[:, None]).exp_()
    if entropy:
        spread = lse - (p * x).nan_to_num(0.0).sum(-1)  # a logit of -inf has probability 0
    if gradients is None:
        return loss, lse, spread, None
    g = torch.zeros_like(lse) if gradients[0] is None else gradients[0].where(seen, 0)
    heat = g * (1 + 2 * z * lse) if z else g
    d = p * (heat if gradients[1] is None else heat + gradients[1])[:, None]
    d = d - (e / x.shape[-1]) * g[:, None] if e else d
    if gradients[2] is not None:
        d = d - (gradients[2][:, None] * p * (x - lse[:, None] + spread[:, None])).nan_to_num(0.0)
    del p
    d = d.scatter_add_(1, place, -(1 - e) * g[:, None])
    return loss, lse, spread, d * (1 - (x / cap).square()) if cap else d


def _aten(hidden: Tensor) -> _Arithmetic:
    wide = _wide(hidden.dtype)

    def accumulate(total: Tensor | None, d: Tensor, h: Tensor) -> Tensor:
        return d.mT @ h if total is None else torch.addmm(total, d.mT, h)

    return _Arithmetic(lambda t: t.to(wide), lambda h, w: h @ w.mT, _rows, accumulate)


def _native(hidden: Tensor) -> _Arithmetic:
    """Products of the hidden states' own dtype, each rounded, where that is what the processor is good at: four times as fast as in float32."""
    if hidden.device.type != "cpu" or hidden.dtype not in native():
        return _aten(hidden)
    low = hidden.dtype

    def rows(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        loss, lse, spread, d = _rows(*args)
        return loss, lse, spread, None if d is None else d.to(low)

    def accumulate(total: Tensor | None, d: Tensor, h: Tensor) -> Tensor:
        part = (d.mT @ h).float()
        return part if total is None else total.add_(part)

    return _Arithmetic(lambda t: t.to(low), lambda h, w: (h @ w.mT).float(), rows, accumulate)


# --- kernel ---


@jit
def rows_kernel(X, D, TARGET, G_LOSS, G_LSE, G_ENTROPY, LOSS, LSE, ENTROPY, columns, softcap, smoothing, z, ignore_index,
                SOFTCAP: tl.constexpr, FORWARD: tl.constexpr, GRADIENT: tl.constexpr, HAS_LSE: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row of logits: its loss, logsumexp and entropy, then its gradient. The second pass finds the row in the cache."""
    row = tl.program_id(0).to(tl.int64)
    X += row * columns
    target = tl.load(TARGET + row)
    seen = target != ignore_index
    most, total, plain, weighted, chosen = -float("inf"), 0.0, 0.0, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < columns, other=-float("inf"))
        if SOFTCAP:
            x = tl.where(at < columns, softcap * (1 - 2 / (tl.exp(2 * x / softcap) + 1)), -float("inf"))
        new = tl.maximum(most, tl.max(x, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        old, p = tl.exp(most - shift), tl.exp(x - shift)
        total = total * old + tl.sum(p, 0)
        weighted = weighted * old + tl.sum(tl.where(p > 0, p * x, 0.0), 0)
        plain += tl.sum(tl.where(at < columns, x, 0.0), 0)  # pyright: ignore[reportOperatorIssue]
        chosen += tl.sum(tl.where(at == target, x, 0.0), 0)  # pyright: ignore[reportOperatorIssue]
        most = new
    lse = most + tl.log(total)
    entropy = lse - weighted / total
    if FORWARD:
        loss = lse - (1 - smoothing) * chosen + z * lse * lse
        loss -= tl.where(smoothing > 0, smoothing * plain / columns, 0.0)
        loss = tl.where((target >= 0) & (target < columns), loss, float("nan"))  # aten raises; a kernel cannot
        tl.store(LOSS + row, tl.where(seen, loss, 0.0))
        tl.store(LSE + row, lse)
        tl.store(ENTROPY + row, entropy)
    if GRADIENT:
        D += row * columns
        g = tl.where(seen, tl.load(G_LOSS + row), 0.0)
        heat = g * (1 + 2 * z * lse)
        if HAS_LSE:
            heat += tl.load(G_LSE + row)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(X + at, mask=at < columns, other=-float("inf"))
            if SOFTCAP:
                x = softcap * (1 - 2 / (tl.exp(2 * x / softcap) + 1))
            p = tl.exp(x - lse)
            d = p * heat - smoothing * g / columns
            d -= tl.where(at == target, (1 - smoothing) * g, 0.0)
            if HAS_ENTROPY:
                d -= tl.load(G_ENTROPY + row) * tl.where(p > 0, p * (x - lse + entropy), 0.0)
            if SOFTCAP:
                d *= 1 - (x / softcap) * (x / softcap)
            tl.store(D + at, d.to(D.dtype.element_ty), mask=at < columns)


_BLOCK, _WARPS = 4096, 8


def _launched(dtype: torch.dtype) -> Callable[..., Any]:
    def rows(x: Tensor, target: Tensor, terms: Terms, gradients: Gradients | None, forward: bool, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        n, columns = x.shape
        loss, lse, spread = (x.new_empty(n) for _ in range(3))
        d = x if gradients is None else torch.empty_like(x, dtype=dtype)
        zero = x.new_zeros(n) if gradients is not None and gradients[0] is None else lse
        g = [zero if t is None else t.contiguous() for t in gradients or (None, None, None)]
        launch(
            rows_kernel, (n,), x, d, target, *g, loss, lse, spread, columns,
            terms.softcap, terms.label_smoothing, terms.z_loss, terms.ignore_index,
            SOFTCAP=bool(terms.softcap), FORWARD=forward, GRADIENT=gradients is not None, HAS_LSE=gradients is not None and gradients[1] is not None,
            HAS_ENTROPY=gradients is not None and gradients[2] is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        return loss, lse, spread if entropy else lse.new_empty(0), None if gradients is None else d

    return rows


def _triton(hidden: Tensor) -> _Arithmetic:
    """Low-precision products with float32 results, rounded once more only where a gradient goes into the next product."""
    low = hidden.dtype
    if not hidden.is_cuda or low == torch.float32:  # interpreted, or float32 throughout
        wide = _aten(hidden)
        return attrs.evolve(wide, rows=_launched(torch.float32))

    def accumulate(total: Tensor | None, d: Tensor, h: Tensor) -> Tensor:
        if total is None:
            return torch.mm(d.mT, h, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
        return torch.addmm(total, d.mT, h, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]

    return _Arithmetic(
        operand=lambda t: t.to(low),
        logits=lambda h, w: torch.mm(h, w.mT, out_dtype=torch.float32),  # pyright: ignore[reportCallIssue]
        rows=_launched(low),
        accumulate=accumulate,
    )


def _configurations() -> Iterator[Configured]:
    def configured(d: str, **flags: bool) -> Configured:
        types = dict.fromkeys(("X", "G_LOSS", "G_LSE", "G_ENTROPY", "LOSS", "LSE", "ENTROPY"), "*fp32")
        types |= {
            "D": d,
            "TARGET": "*i64",
            "columns": "i32",
            "softcap": "fp32",
            "smoothing": "fp32",
            "z": "fp32",
            "ignore_index": "i32",
        }
        constants = dict.fromkeys(("SOFTCAP", "FORWARD", "GRADIENT", "HAS_LSE", "HAS_ENTROPY"), False) | flags
        return Configured(rows_kernel, types, {**constants, "BLOCK": _BLOCK}, warps=_WARPS, aligned=("columns",))

    yield configured("*fp32", FORWARD=True)
    for d in ("*bf16", "*fp16", "*fp32"):
        yield configured(d, FORWARD=True, GRADIENT=True)
    yield configured("*bf16", GRADIENT=True, SOFTCAP=True, HAS_LSE=True, HAS_ENTROPY=True)


# --- over chunks ---


def chunks(rows: int, weight: Tensor) -> Iterator[slice]:
    """Slices of rows, equal but for the last, for a head [V, H]."""
    budget = CHUNK * 16 if weight.is_cuda else CHUNK
    n = max(1, min(rows, max(budget // (4 * max(len(weight), 1)), weight.shape[1])))
    return (slice(i, min(i + n, rows)) for i in range(0, rows, n))


@attrs.define
class _Gradient:
    """Gradients by hidden states, weight and bias, collected over chunks; what nobody needs is left out."""

    by: _Arithmetic
    needs: list[bool]
    w: Tensor
    hidden: list[Tensor] = attrs.field(factory=list[Tensor])
    weight: Tensor | None = None
    bias: Tensor | None = None

    def add(self, d: Tensor | None, h: Tensor) -> None:
        assert d is not None
        if self.needs[0]:
            self.hidden.append(d @ self.w)
        if self.needs[1]:
            self.weight = self.by.accumulate(self.weight, d, h)
        if self.needs[2]:
            part = d.sum(0, dtype=_wide(d.dtype))
            self.bias = part if self.bias is None else self.bias + part

    def results(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        found = (torch.cat(self.hidden) if self.hidden else None, self.weight, self.bias)
        return tuple(
            (torch.zeros_like(x) if g is None else g.to(x.dtype)) if n and x is not None else None
            for g, n, x in zip(found, self.needs, (hidden, weight, bias), strict=True)
        )


def _each(by: _Arithmetic, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """The chunks: their slice, hidden states, logits, targets."""
    w = by.operand(weight)
    for part in chunks(len(hidden), weight):
        h = by.operand(hidden[part])
        x = by.logits(h, w)
        yield part, h, x if bias is None else x + bias.to(x.dtype), target[part]


def _forward(by: _Arithmetic, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    terms, entropy = Terms(*rest[:4]), rest[4]
    parts = [by.rows(x, t, terms, None, True, entropy)[:3] for _, _, x, t in _each(by, hidden, weight, bias, target)]
    if not parts:
        return tuple(hidden.new_empty(0, dtype=_wide(hidden.dtype)) for _ in range(3))  # pyright: ignore[reportReturnType]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))  # pyright: ignore[reportReturnType]


def _backward(by: _Arithmetic, cotangents: tuple[Tensor | None, ...], inputs: tuple[Any, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:  # fmt: skip
    hidden, weight, bias, target, *rest = inputs
    terms, entropy = Terms(*rest[:4]), rest[4] and cotangents[2] is not None
    out = _Gradient(by, needs, by.operand(weight))
    for part, h, x, t in _each(by, hidden, weight, bias, target):
        g = [None if c is None else c[part].to(x.dtype) for c in cotangents]
        out.add(by.rows(x, t, terms, (g[0], g[1], g[2] if entropy else None), False, entropy)[3], h)
    return out.results(hidden, weight, bias)


def _sum(by: _Arithmetic, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    terms, needs = Terms(*rest[:4]), rest[4]
    out, total = _Gradient(by, needs, by.operand(weight)), hidden.new_zeros((), dtype=_wide(hidden.dtype))
    for part, h, x, t in _each(by, hidden, weight, bias, target):
        g = scale[part].to(x.dtype)
        loss, _, _, d = by.rows(x, t, terms, (g, None, None), True, False)
        del x
        total = total + (loss * g).sum()
        out.add(d, h)
        del d
    return total, *(hidden.new_empty(0) if g is None else g for g in out.results(hidden, weight, bias))


def _sum_backward(
    cotangents: tuple[Tensor | None, ...], inputs: Any, outputs: tuple[Tensor, ...], needs: list[bool]
) -> Any:
    """The gradients are among the outputs."""
    g = cotangents[0]
    return tuple(
        d * (0.0 if g is None else g.to(d.dtype)) if n else None for d, n in zip(outputs[1:], needs, strict=True)
    )


# --- operators ---


def _supports(hidden: Any, weight: Any, bias: Any, target: Any, *rest: Any) -> None:
    name = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; required [rows, width] and [vocabulary, width]"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"{name}: target {tuple(target.shape)} {target.dtype}, required {(len(hidden),)} torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)}, required {(len(weight),)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"{name}: hidden {hidden.dtype}, weight {weight.dtype}; required one floating dtype of both; cast one of them"
        )
    if hidden.is_cuda and hidden.dtype == torch.float64:
        raise ValueError(f"{name}: float64 on CUDA; the nearest supported dtype is float32")


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((5, 16), (37, 16), (37,)))
    target = torch.randint(37, (5,), generator=g)
    target[1] = IGNORED
    return hidden, weight, bias, target, IGNORED, 3.0, 0.1, 1e-2, True


_WHY = "logits of 16k rows and 152k words are 10 GB in float32, written and read five times; a compiler does not split a product by rows"
_TERMS = "int ignore_index, float softcap, float label_smoothing, float z_loss"

each_row = define(
    "linear_cross_entropy",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {_TERMS}, bool entropy) -> (Tensor, Tensor, Tensor)",
    formula="loss, logsumexp, entropy of softmax(h W^T + b), for each row",
    why=_WHY,
    reference=lambda hidden, *rest: _forward(_aten(hidden), hidden, *rest),
    kernel=lambda hidden, *rest: _forward(_triton(hidden), hidden, *rest),
    backward=lambda cotangents, inputs, outputs, needs: _backward(_aten(inputs[0]), cotangents, inputs, needs),
    backward_kernel=lambda cotangents, inputs, outputs, needs: _backward(_triton(inputs[0]), cotangents, inputs, needs),
    differentiable=("hidden", "weight", "bias"),
    supports=_supports,
    example=_example,
    kernels=tuple(_configurations()),
)

_weighted_sum = define(
    "linear_cross_entropy_sum",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor scale, {_TERMS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    formula="sum_n scale_n loss_n, and its gradients by h, W, b",
    why=_WHY,
    reference=lambda hidden, *rest: _sum(_native(hidden), hidden, *rest),
    kernel=lambda hidden, *rest: _sum(_triton(hidden), hidden, *rest),
    backward=_sum_backward,
    first_order=(0,),
    differentiable=("hidden", "weight", "bias"),
    supports=lambda h, w, b, t, scale, *rest: _supports(h, w, b, t),
    example=lambda seed, dtype: (
        *(e := _example(seed, dtype))[:4],
        torch.linspace(0.1, 1.0, 5),
        *e[4:8],
        [True, True, True],
    ),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    ignore_index: int = IGNORED,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` with `target`, in float32, without the logits.

    Args:
        hidden: [..., H]; weight: [V, H]; bias: [V]; target: [...] int64, `ignore_index` where there is none.
        scale: [...]: give the sum of the losses times `scale`, a scalar, whose gradient is computed along the way: a third less work than
            each row's loss by itself. For the mean, ``scale = (target != -100) / count``. No gradient flows to `scale`.
        softcap: ``c tanh(x / c)`` of the logits (Gemma 2); 0 for none.
        label_smoothing: share of the target that is spread over all words.
        z_loss: weight of the squared logsumexp (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Returns: [...] float32, 0 where ignored; or with `scale` a 0-D float32 tensor.

    >>> h, w, t = torch.randn(4, 8), torch.randn(16, 8), torch.tensor([1, 2, -100, 3])
    >>> loss = linear_cross_entropy(h, w, t)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(h @ w.T, t, reduction="none"), atol=1e-6)
    True
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    terms = (ignore_index, softcap, label_smoothing, z_loss)
    _check(*terms)
    if scale is None:
        return each_row(flat, weight, bias, targets, *terms, False)[0].view(target.shape)
    if not torch.is_grad_enabled():
        return (each_row(flat, weight, bias, targets, *terms, False)[0] * scale.reshape(-1)).sum()
    needs = [x is not None and (x.requires_grad or inside_functorch()) for x in (hidden, weight, bias)]
    return _weighted_sum(flat, weight, bias, targets, scale.reshape(-1), *terms, needs)[0]


def linear_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `target` under ``softmax((hidden @ weight.T + bias) / temperature)``, and the entropies; both [...] float32.

    What policy gradients need of a language model, without its logits. Shapes as in `linear_cross_entropy`.

    >>> h, w = torch.zeros(1, 8), torch.randn(16, 8)
    >>> log_p, entropy = linear_log_probabilities(h, w, torch.tensor([3]))
    >>> bool(torch.isclose(log_p.exp() * 16, torch.ones(1))), bool(torch.isclose(entropy.exp(), torch.tensor([16.0])))
    (True, True)
    """
    if not temperature > 0 or (softcap and temperature != 1.0):
        raise ValueError(f"linear_log_probabilities: temperature={temperature!r}, required > 0, and 1 with a softcap")
    flat = (hidden / temperature if temperature != 1.0 else hidden).reshape(-1, hidden.shape[-1])
    bias = bias / temperature if bias is not None and temperature != 1.0 else bias
    loss, _, entropy = each_row(flat, weight, bias, target.reshape(-1), IGNORED, softcap, 0.0, 0.0, True)
    return -loss.view(target.shape), entropy.view(target.shape)


def _check(ignore_index: int, softcap: float, label_smoothing: float, z_loss: float) -> None:
    for name, value, most in (
        ("softcap", softcap, float("inf")),
        ("label_smoothing", label_smoothing, 1.0),
        ("z_loss", z_loss, float("inf")),
    ):
        if not 0.0 <= value <= most:
            raise ValueError(f"linear_cross_entropy: {name}={value!r}, required 0 <= {name} <= {most}")
