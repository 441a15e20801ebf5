"""Rules written over parameters and state in one pass, as steps that own their state use them on a CPU.

One operator updates all leaves. A compiler would make a loop for each and look for fusions between every two: for 57 leaves 60 s of compiling
where the operator takes none, and 17 ms a step where it takes 8 (6.5M parameters, 2 cores).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fds._torch import fused_adamw, fused_sgd, opaque_operator

_DTYPES = (torch.float32, torch.float64)


def fits(params: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether the operators take these leaves: on the CPU, of one dtype each, float32 or float64."""
    return bool(params) and all(
        p.device.type == "cpu" and p.dtype in _DTYPES and all(t.dtype == p.dtype for t in rest)
        for p, *rest in zip(params, *others, strict=True)
    )


def _adamw(params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], *rest: Tensor) -> None:
    rate, b1, b2, eps, weight_decay, count, ok = rest
    hyper = {"lr": rate, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": weight_decay}
    p, g, m, v = (_whole(x) for x in (params, grads, mu, nu))
    with torch.no_grad():
        fused_adamw(p, g, m, v, count, ok, **{k: x.item() for k, x in hyper.items()})
        _back([*params, *mu, *nu], [*p, *m, *v])


def _sgd(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rate: Tensor, momentum: Tensor, weight_decay: Tensor, nesterov: bool, ok: Tensor) -> None:  # fmt: skip
    hyper = {"lr": rate.item(), "momentum": momentum.item(), "weight_decay": weight_decay.item()}
    p, g, m = (_whole(x) for x in (params, grads, buffers))
    with torch.no_grad():
        fused_sgd(p, g, m, ok, nesterov=nesterov, **hyper)
        _back([*params, *buffers], [*p, *m])


def _whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous: torch's kernels read and write memory in its order."""
    return [t.contiguous() for t in tensors]


def _back(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for a, b in zip(old, new, strict=True):
        if a is not b:
            a.copy_(b)


adamw = opaque_operator(
    "adamw_in_place",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] mu, Tensor(c!)[] nu, Tensor rate, Tensor b1, Tensor b2, Tensor eps, Tensor weight_decay, Tensor count, Tensor ok) -> ()",
    _adamw,
)
sgd = opaque_operator(
    "sgd_in_place",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor rate, Tensor momentum, Tensor weight_decay, bool nesterov, Tensor ok) -> ()",
    _sgd,
)
