"""Write an operator: a formula, a Triton kernel for it, and every transformation of torch works on it.

    python examples/write_an_operator.py

On a CPU the reference runs, and is fused by the compiler; on CUDA the kernel does.
"""

import torch
from torch import Tensor

import fds
from fds.kernels import Configured, define, jit, launch, tl


def reference(x: Tensor, slope: float) -> Tensor:
    """Squared ReLU with a slope (So et al. 2021, arXiv:2109.08668)."""
    return slope * x.clamp(min=0.0).square()


def reference_backward(cotangents, inputs, outputs, needs):
    (g,), (x, slope) = cotangents, inputs
    return (2 * slope * x.clamp(min=0.0) * g,)


@jit
def kernel(X, Y, n, slope, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(X + at, mask=at < n, other=0.0).to(tl.float32), 0.0)
    tl.store(Y + at, (slope * x * x).to(Y.dtype.element_ty), mask=at < n)


def on_cuda(x: Tensor, slope: float) -> Tensor:
    y = torch.empty_like(x)
    launch(kernel, (-(-x.numel() // 1024),), x, y, x.numel(), slope, BLOCK=1024)
    return y


def example(seed: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype), 0.5


relu2 = define(
    "relu2",
    "(Tensor x, float slope) -> Tensor",
    formula="slope * max(x, 0)^2",
    why="an example",
    reference=reference,
    backward=reference_backward,
    differentiable=("x",),
    kernel=on_cuda,
    kernels=[Configured(kernel, {"X": "*bf16", "Y": "*bf16", "n": "i32", "slope": "fp32"}, {"BLOCK": 1024})],
    example=example,
)


if __name__ == "__main__":
    x, slope = relu2.example(0, torch.float32)
    f = lambda x: relu2(x, slope).sum()  # noqa: E731
    g = lambda x: reference(x, slope).sum()  # noqa: E731
    for name, run in {
        "value": lambda f: f(x),
        "func.grad": lambda f: torch.func.grad(f)(x),
        "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(f))(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (x,))[1],
        "grad(grad)": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x),
        "compile(func.grad)": lambda f: torch.compile(torch.func.grad(f), fullgraph=True)(x),
    }.items():
        assert torch.allclose(run(f), run(g)), name
        print(f"{name:20} equals the reference")

    from fds.kernels.aot import compiled  # no GPU is needed to see what the kernel costs on one

    print(f"on sm_90: {compiled(relu2.kernels[0], 90)}")
    print(f"fds {fds.__version__}: {relu2!r}")
