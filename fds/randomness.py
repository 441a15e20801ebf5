"""Dropout as a pure function of an explicit seed.

A counter-based generator: the mask of an element depends on the seed, the site, the number of the draw in it, and the element's place in
the global batch (rows first). So recompute, another number of ranks and microbatches see the same mask, and nothing global is drawn from.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fds.frame import FRAME

_MASK = 0xFFFFFFFF
# A 32-bit integer hash in int64 lanes: two xor-shift-multiply rounds. The multiplier is below 2^31 so that no product overflows 63 bits.
_MULTIPLIER = 0x45D9F3B


def mix(x: Tensor, key: Tensor | int) -> Tensor:
    """Hash int64 `x` (taken modulo 2^32) with `key`; uniform in [0, 2^32), elementwise."""
    x = (x ^ key) & _MASK
    for _ in range(2):
        x = (((x >> 16) ^ x) * _MULTIPLIER) & _MASK
    return (x >> 16) ^ x


def fold(seed: Tensor, *data: Tensor | int) -> Tensor:
    """A new seed from a seed and numbers (step, site, draw).

    >>> bool(fold(torch.tensor(1), 2) == fold(torch.tensor(1), 3))
    False
    """
    for d in data:
        seed = mix(mix(seed, 0x9E3779B9), d)
    return seed


def uniform(
    seed: Tensor, shape: torch.Size | list[int], *, block: Tensor | int = 0, device: torch.device | None = None
) -> Tensor:
    """float32 in [0, 1) of the given shape; `block` numbers the slice of the global batch that the leading dimension is."""
    n = math.prod(shape)
    place = torch.arange(n, device=device) + block * n
    key = fold(seed, place >> 32)
    return (mix(mix(place, key), fold(seed, 0x51ED27)) >> 8).view(shape) * 2.0**-24


def next_seed() -> Tensor:
    """The seed of the running site's next draw, which is counted; 0-D int64. Only where the frame has a seed."""
    frame = FRAME.get()
    assert frame.seed is not None
    frame.draws.count += 1
    part = [frame.draws.part] if frame.draws.part else []
    return fold(frame.seed, frame.salt, frame.draws.count, *part)


class _Seeded(TorchFunctionMode):
    """Answers the random functions that models use, from the frame's seed; refuses those that it knows and cannot seed."""

    def draw(self, shape: torch.Size | list[int], device: torch.device, *, rows: bool = True) -> Tensor:
        return uniform(next_seed(), shape, block=FRAME.get().block if rows else 0, device=device)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        keep = self.draw(x.shape, x.device) >= p
        return x * keep.to(x.dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if dropout_p == 0.0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        # As torch's own attention: a row without any key to look at (left padding) gives zeros, not NaN.
        return self.dropout(torch._safe_softmax(scores, -1), dropout_p) @ value

    def rand(self, *shape: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("generator") is not None:
            return torch.rand(*shape, **kwargs)
        shape = kwargs.get("size", shape)
        shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else tuple(shape)
        # A number by itself is the same for all rows (a layer is dropped or not); more than one dimension begins with the rows.
        return self.draw(list(shape), kwargs.get("device") or torch.get_default_device(), rows=len(shape) > 1).to(
            kwargs.get("dtype") or torch.get_default_dtype()
        )

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = "" if _inner_dropout(func, args, kwargs) else _RANDOM.get(func)
        if name is None:
            return func(*args, **kwargs)
        if FRAME.get().seed is None:
            return _unseeded(func, args, kwargs, FRAME.get().recomputed)
        if name == "":
            raise ValueError(
                f"{getattr(func, '__name__', func)}: no seeded form of this random function; call the program without a seed (and without checkpoint), or use dropout"
            )
        return getattr(self, name)(*args, **kwargs)


_RANDOM: dict[Any, str] = {
    F.dropout: "dropout", torch.dropout: "dropout", F.scaled_dot_product_attention: "attention", torch.rand: "rand",
    **{f: "" for f in (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.bernoulli, torch.randn, torch.randint, torch.rand_like,
                       torch.randn_like, torch.multinomial, torch.normal, torch.randperm, torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.uniform_, torch.Tensor.normal_,
                       torch.Tensor.exponential_, torch.Tensor.random_, torch.Tensor.multinomial, torch.Tensor.cauchy_, torch.Tensor.geometric_, torch.Tensor.log_normal_,
                       F.gumbel_softmax)},
}  # fmt: skip


def _inner_dropout(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether this is a function of many parts with dropout inside, where nobody can seed it."""
    name = getattr(func, "__name__", "")
    if func is F.multi_head_attention_forward:
        return kwargs.get("training", True) and kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0) > 0
    if func is F.rrelu:
        return kwargs.get("training", args[3] if len(args) > 3 else False)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        drop, training = args[5:7] if isinstance(args[3], bool) else args[6:8]  # unpacked, packed sequences
        return training and drop > 0
    return False


def _unseeded(func: Callable[..., Any], args: Any, kwargs: Any, recomputed: bool) -> Any:
    """Without a seed a module draws from torch's generator, which recompute would draw from twice."""
    active = {F.dropout: lambda: kwargs.get("training", args[2] if len(args) > 2 else True) and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0,
              F.scaled_dot_product_attention: lambda: kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0}.get(func, lambda: True)()  # fmt: skip
    if recomputed and active:
        raise ValueError(
            f"{getattr(func, '__name__', func)}: randomness under checkpoint() needs an explicit seed, or recompute draws another mask; use train_step, or fds.with_seed(f)(seed, ...)"
        )
    return func(*args, **kwargs)


@contextmanager
def randomness(training: bool) -> Iterator[None]:
    """Take the module's randomness from the frame for the time of a call, where the frame has something to say."""
    frame = FRAME.get()
    if not training or (frame.seed is None and not frame.recomputed):
        yield
        return
    with _Seeded():
        yield


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that belongs to a transformation: it follows the module's training mode and the frame's seed."""
    frame = FRAME.get()
    if not frame.training or p == 0.0:
        return x
    with randomness(True):  # in recompute no module is running that would have turned it on
        return F.dropout(x, p, True)
