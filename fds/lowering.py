"""How train steps, and all that fds compiles, multiply bfloat16 and float16 matrices on processors without instructions for them, and with."""

import platform
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_PLAIN = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_FEW, _WHOLE = 4, 2**14  # rows, and elements of a weight
_ATTENDED = (
    2**22
)  # weights of an attention: with more of them, 16 MiB in float32, passes over them take longer than the kernel
_WORTH = (
    8  # multiply-adds per element of the three matrices from which converting them pays (measured break-even: 3 to 5)
)


def emulated() -> frozenset[torch.dtype]:
    """The dtypes whose products this processor emulates, at a fraction of its float32 speed. Known for x86 only."""
    return frozenset(d for d, there in _instructions().items() if not there)


def native() -> frozenset[torch.dtype]:
    """The low-precision dtypes that this processor has instructions for: products several times as fast as in float32. Known for x86 only."""
    return frozenset(d for d, there in _instructions().items() if there)


def _instructions() -> dict[torch.dtype, bool]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}
    has = torch.cpu.get_capabilities()
    return {d: any(has.get(n) for n in names) for d, names in _INSTRUCTIONS.items()}


def lowered(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with its low-precision products by way of float32, where the processor would emulate them."""
    return _under(f, WideProducts, emulated())


def by_products(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, to be compiled, with the gradient of attention by products, where the processor is good at those of low precision."""
    return _under(f, AttentionByProducts, native())


def _under(f: Callable[..., Any], mode: Callable[[frozenset[torch.dtype]], TorchDispatchMode], dtypes: frozenset[torch.dtype]) -> Callable[..., Any]:  # fmt: skip
    if not dtypes:
        return f

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode(dtypes):
            return f(*args, **kwargs)

    return run


class WideProducts(TorchDispatchMode):
    """Computes matrix products and attention of the given dtypes in float32 and rounds the result once.

    That is what the hardware instructions compute as well: exact products, summed in float32. Products too small to pay for the
    conversion (decoding one token) stay as they are.
    """

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.dtypes = dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = self._worth(func, args)
        if dtype is None:
            return func(*args, **kwargs)
        args, kwargs = _converted((args, kwargs), dtype, torch.float32)
        out = func(*args, **kwargs)
        if func is _ATTENTION:
            return out[0].to(dtype), out[1]  # the second, of sums of exponentials, is float32 for every dtype
        return _converted(out, torch.float32, dtype)

    def _worth(self, func: Any, args: tuple[Any, ...]) -> torch.dtype | None:
        """The dtype to convert from, if `func` is a product of a slow dtype and worth it: [.., m, k] by [.., k, n]."""
        if func in _PRODUCTS:
            a, b = args[-2:]
            m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        elif func is _ATTENTION or func is _ATTENTION_BACKWARD:
            a, b = args[:2] if func is _ATTENTION else args[1:3]
            m, k, n = a.shape[-2], a.shape[-1], b.shape[-2]
        else:
            return None
        slow = a.device.type == "cpu" and a.dtype in self.dtypes
        return a.dtype if slow and _pays(m, k, n) else None


class AttentionByProducts(TorchDispatchMode):
    """Computes the gradient of attention by five batched products and what lies between them, for the given dtypes.

    torch's CPU kernel for it does not use the processor's low-precision products: 17 ms where this, compiled, takes 7 (bfloat16, 32 heads of
    [256, 64], one core). The weights exist as a whole meanwhile, so attention with more than `_ATTENDED` of them stays with the kernel. Dao et al.
    2022, arXiv:2205.14135, appendix B.2.
    """

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.dtypes = dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION_BACKWARD:
            g, q, k, v, out, lse, dropout, causal = args
            if self._worth(q, k, v, dropout):
                return _attention_gradient(g, q, k, v, out, lse, causal, **kwargs)
        return func(*args, **kwargs)

    def _worth(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
        if q.device.type != "cpu" or q.dtype not in self.dtypes or dropout or q.shape[:2] != k.shape[:2]:
            return False
        size: Any = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return isinstance(size, int) and size <= _ATTENDED


def _attention_gradient(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of softmax(scale q k^T + mask) v by q, k, v, from the logsumexp of every row: all [rows, heads, length, width], lse without the last."""
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    x = (q @ k.mT).float() * factor
    if attn_mask is not None:
        x = x + attn_mask  # additive: the kernel takes no other
    if causal:
        x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    p = torch.where(x == float("-inf"), 0.0, (x - lse[..., None]).exp())  # also in a row that sees nothing
    share = (g.float() * out.float()).sum(-1, keepdim=True)
    d = (p * ((g @ v.mT).float() - share) * factor).to(q.dtype)
    return d @ k, d.mT @ q, p.to(q.dtype).mT @ g


def _pays(m: Any, k: Any, n: Any) -> bool:
    """A size that the compiler does not know counts as large: a matter of speed is not worth a guard."""
    known = isinstance(m, int) and isinstance(k, int) and isinstance(n, int)
    return not known or m * k * n >= _WORTH * (m * k + k * n + m * n)


def _converted(x: Any, source: torch.dtype, target: torch.dtype) -> Any:
    def convert(t: Any) -> Any:
        return t.to(target) if isinstance(t, Tensor) and t.dtype == source else t

    return pytree.tree_map(convert, x)


def few_rows(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, to be compiled, with its products of few rows by whole weights, and its attention of few queries, as decoding has them, as sums that the
    compiler writes itself.

    A matrix library packs and blocks for reuse that is not there: on two cores oneDNN and MKL read weights at 16 to 27 GB/s, the generated loop at 33
    to 37 of the 40 that the memory gives (bfloat16, weights of 768 x 768 to 32000 x 768). Accelerators have kernels of their own.
    """

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        with FewRows():
            return f(*args, **kwargs)

    return run


class FewRows(TorchDispatchMode):
    """Writes products of up to `_FEW` rows on a CPU, and attention of as many queries, as sums over float32 products, rounded once.

    torch's kernel for attention works by blocks of queries, and takes keys and values repeated for all heads: a copy for each token.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION and _few_queries(*args):
            return _attended(*args[:3], **(kwargs or {}))
        if func not in _PLAIN or kwargs or not _reads_weights(*args[-2:]):
            return func(*args, **(kwargs or {}))
        a, b = (x.float() for x in args[-2:])
        # [n, m, k], so that a row of the weight is in the cache for all rows of `a`; else the weight is read along its columns.
        out = (b.t()[:, None] * a).sum(-1).t() if b.stride(0) == 1 else (a[:, :, None] * b).sum(1)
        return (out if func is _PLAIN[0] else out + args[0]).to(args[-1].dtype)


def _few_queries(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False) -> bool:
    few: Any = q.shape[2]
    return q.device.type == "cpu" and q.dtype in _NARROW and not dropout and not causal and isinstance(few, int) and few <= _FEW  # fmt: skip


def _attended(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale q k^T + mask) v and the logsumexp of every row: q [rows, heads, few, width], k and v [rows, heads, slots, width]."""
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    # As a view by strides it is written down; else the compiler turns queries by their positions anew for every key.
    q = q.contiguous()
    q = q.as_strided(q.shape, q.stride())
    x = (q.float()[:, :, :, None] * k.float()[:, :, None]).sum(-1) * factor
    if attn_mask is not None:
        x = x + attn_mask  # additive: the kernel takes no other
    p = x.softmax(-1)
    return (p[..., None] * v.float()[:, :, None]).sum(-2).to(q.dtype), x.logsumexp(-1)


def _reads_weights(a: Tensor, b: Tensor) -> bool:
    """Whether the time of a product [m, k] by [k, n] is that of reading `b`."""
    sizes: tuple[Any, ...] = (a.shape[0], *b.shape)
    if a.device.type != "cpu" or a.dtype not in _NARROW or not all(isinstance(n, int) for n in sizes):
        return False
    return sizes[0] <= _FEW and b.numel() >= _WHOLE and 1 in b.stride()
