"""Optimizers over ranks against one process: gradients of each rank by number, and a few updates either way."""

import torch

from fds import optim, tree
from fds.sharding import collectives
from fds.sharding.mesh import Axis

ONE = Axis("dp", 1, 0, "")
STEPS = 4


def gradients(params, step, rank):
    """A rank's own, of a step."""
    g = torch.Generator().manual_seed(10 * step + rank)
    return tree.map(lambda p: torch.randn(p.shape, generator=g).to(p.dtype), params)


def mean_gradients(params, step, n):
    """The mean over n ranks, summed in float32."""
    parts = [gradients(params, step, r) for r in range(n)]
    return tree.map(lambda *g: (sum(x.float() for x in g) / n).to(g[0].dtype), *parts)


def whole(tx, params, n, steps=range(STEPS)):
    """Parameters after updates by the mean gradients of n ranks, on one process."""
    p, state = params, tx.init(params)
    for i in steps:
        updates, state = tx.update(mean_gradients(params, i, n), state, p)
        p = optim.apply_updates(p, updates)
    return p


def split(tx, params, axis, *, compiled=False):
    """The same by this rank's own gradients: parameters, the leaves of the state, what the last step sent."""
    state = tx.init(params)

    def step(p, leaves, g):
        updates, new = tx.update(tx.reduce(g), tree.rebuild(state, iter(leaves)), p)
        return optim.apply_updates(p, updates), tree.flat(new)

    torch._dynamo.reset()  # `step` is one code object for all callers, and other sizes would be a guess at dynamic ones
    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    p, leaves = params, tree.flat(state)
    for i in range(STEPS):
        with collectives.record() as traffic:
            p, leaves = step(p, leaves, gradients(params, i, axis.rank))
    return p, leaves, traffic


def close(got, want, ulps):
    """Equal within so many last bits; updates of bfloat16 are rounded before they are gathered."""
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=ulps * eps, atol=ulps * eps)


def same(a, b):
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
