"""Any module as a pure function: values, gradients, Hessian-vector products, in eager and compiled.

python examples/differentiate.py
"""

import torch
from torch import nn

import fds

model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
x, y = torch.randn(32, 8), torch.randn(32, 1)

program, params = fds.functionalize(model)  # params: {"0.weight": ..., "0.bias": ..., ...}
stored = program.place(params)
print(program)


def loss(stored, x, y):
    return (program(stored, x) - y).square().mean()


# Values and gradients; the same as the module's own.
value, grads = fds.value_and_grad(loss)(stored, x, y)
want = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
restored = program.restore(grads)
assert all(torch.equal(restored[n], g) for (n, _), g in zip(model.named_parameters(), want, strict=True))

# torch.func works on a program as on any function: here a Hessian-vector product.
vector = fds.tree.map(torch.randn_like, stored)
_, product = torch.func.jvp(torch.func.grad(lambda s: loss(s, x, y)), (stored,), (vector,))
print(
    "v . H v =",
    float(sum((a * b).sum() for a, b in zip(fds.tree.leaves(vector), fds.tree.leaves(product), strict=True))),
)

# Transformations do not change what is computed, only how it is stored and when it moves.
small = fds.chain(fds.shard(fds.sharding.mesh(dp=-1)["dp"]), fds.at("2", fds.checkpoint()))(program)
print(small)
flat = small.place(params)
assert torch.equal(small(flat, x), model(x))

# One graph for everything, inside your own torch.compile.
compiled = torch.compile(fds.value_and_grad(lambda s, x, y: (small(s, x) - y).square().mean()), fullgraph=True)
value_again, _ = compiled(flat, x, y)
print("eager", float(value), "compiled", float(value_again))
assert torch.allclose(value, value_again)
