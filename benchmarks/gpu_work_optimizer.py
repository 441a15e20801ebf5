"""What `gpu.py` times of optimizers: one flat buffer of 2^28 parameters, its update in one launch."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_work import Floor, Work, compared
from torch import Tensor

import fds.kernels

N = 2**28
Contenders = dict[str, Callable[[], Any]]


def buffers(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(N, device="cuda").to(dtype) for _ in range(count)]


def eager_and_compiled(name: str, f: Callable[[], Any], args: tuple[Any, ...]) -> Contenders:
    """The operator beside its own formula in aten. Eager needs 12 tensors of the buffer's size and more: 16 GB."""
    op = fds.kernels.operators()[name]
    return {**compared(f, op.reference, args), "fds": f}


def numbers(*values: float) -> list[Tensor]:
    return [torch.full((), v, dtype=torch.float64, device="cuda") for v in values]


def key(copy: str, seed: int | None) -> tuple[Any, ...]:
    count = torch.tensor(3, device="cuda")
    return count, copy, None if seed is None else torch.tensor(seed, device="cuda"), 0


def adamw(copy: str = "bfloat16", seed: int | None = None) -> tuple[Contenders, Floor]:
    p, mu, nu = buffers(3)
    (g,) = buffers(1, torch.bfloat16)
    args = (p, g, mu, nu, *numbers(1e-3, 0.9, 0.999, 1e-8, 0.1), *key(copy, seed))
    op = fds.kernels.operators()["adamw_update"]
    found = eager_and_compiled("adamw_update", lambda: op(*args), args)
    steps, wide = torch.tensor(3.0, device="cuda"), g.float()
    options: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    options |= {"amsgrad": False, "maximize": False}
    # In place, float32 gradients, no copy: 28 bytes a parameter as well.
    found["torch fused"] = lambda: torch._fused_adamw_([p], [wide], [mu], [nu], [], [steps], **options)
    return found, Floor(N * (26 + (2 if copy else 0)))


def lion() -> tuple[Contenders, Floor]:
    p, mu = buffers(2)
    (g,) = buffers(1, torch.bfloat16)
    args = (p, g, mu, *numbers(1e-4, 0.9, 0.99, 0.1), *key("bfloat16", None))
    op = fds.kernels.operators()["lion_update"]
    return eager_and_compiled("lion_update", lambda: op(*args), args), Floor(N * 20)


def sgd() -> tuple[Contenders, Floor]:
    p, m = buffers(2)
    (g,) = buffers(1, torch.bfloat16)
    args = (p, g, m, *numbers(1e-2, 0.9, 0.0), False, *key("bfloat16", None))
    op = fds.kernels.operators()["sgd_update"]
    return eager_and_compiled("sgd_update", lambda: op(*args), args), Floor(N * 20)


def lamb(half: str) -> tuple[Contenders, Floor]:
    """300 leaves."""
    p, mu, nu = buffers(3)
    (g,) = buffers(1, torch.bfloat16)
    starts, hyper = torch.arange(300, device="cuda") * (N // 300), numbers(0.9, 0.999, 1e-6, 0.1)
    moments, apply = (fds.kernels.operators()[f"lamb_{n}"] for n in ("moments", "apply"))
    count, squares = torch.tensor(3, device="cuda"), torch.ones(2, 300, device="cuda")
    if half == "moments":
        return {"fds": lambda: moments(p, g, mu, nu, starts, *hyper, count)}, Floor(N * 22)
    args = (p, mu, nu, squares, starts, *numbers(1e-3), *hyper, *key("bfloat16", None))
    return {"fds": lambda: apply(*args)}, Floor(N * 18)


def eight_bits() -> tuple[Contenders, Floor]:
    (p,) = buffers(1)
    (g,) = buffers(1, torch.bfloat16)
    q, scale = torch.zeros(N, dtype=torch.int8, device="cuda"), torch.rand(N // 256, device="cuda")

    def f() -> Any:
        return fds.kernels.adamw8bit_update(
            p, g, q, q.view(torch.uint8), scale, scale, rate=1e-3, count=3, copy=torch.bfloat16
        )

    return {"fds": f}, Floor(N * (16 + 16 / 256))


def rounding() -> tuple[Contenders, Floor]:
    (x,) = buffers(1)
    op = fds.kernels.operators()["stochastic_round"]
    args = (x, torch.tensor(0, device="cuda"), torch.tensor(3, device="cuda"), 0)
    compiled = torch.compile(op.reference)
    return {"fds": lambda: op(*args), "compiled": lambda: compiled(*args)}, Floor(6 * N)


WORK = [
    Work("AdamW, 2^28 float32, bf16 gradient and copy", "adamw_update", adamw),
    Work("AdamW, the same, copy rounded at random", "adamw_update", lambda: adamw(seed=0)),
    Work("Lion, 2^28 float32, bf16 gradient and copy", "lion_update", lion),
    Work("SGD with momentum, 2^28 float32, bf16 gradient and copy", "sgd_update", sgd),
    Work(
        "LAMB's moments and norms, 2^28 float32 in 300 leaves, bf16 gradient", "lamb_moments", lambda: lamb("moments")
    ),
    Work("LAMB's step, 2^28 float32 in 300 leaves, bf16 copy", "lamb_apply", lambda: lamb("apply")),
    Work("AdamW, moments of 8 bits, 2^28 float32, bf16 gradient and copy", "adamw8bit_update", eight_bits),
    Work("rounding at random, 2^28 float32 to bf16", "stochastic_round", rounding),
]
