"""`cast(stored=True)` and `freeze`: what serving stores."""

import pytest
import torch
import zoo

import fds
from fds import tree


@pytest.mark.parametrize("more", [[], ["shard"]])
def test_weights_are_stored_in_the_dtype(more):
    program, params = fds.functionalize(zoo.build("llama"))
    axis = fds.sharding.mesh(dp=-1)["dp"]
    low = fds.chain(fds.cast("bfloat16", stored=True), *[fds.shard(axis)] * len(more))(program)
    stored = low.place(params)
    assert tree.nbytes(stored) < 0.51 * tree.nbytes(params) + 64
    back = low.restore(stored)
    for k, p in params.items():
        assert back[k].dtype == p.dtype
        torch.testing.assert_close(back[k], p, rtol=low.tol, atol=0)
    again = low.place(back)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(stored), strict=True))


def test_it_computes_what_cast_computes():
    program, params = fds.functionalize(zoo.build("llama"))
    rows = zoo.batch("llama")
    low, wide = fds.cast("bfloat16", stored=True)(program), fds.cast("bfloat16")(program)
    assert torch.equal(low(low.place(params), **rows).logits, wide(wide.place(params), **rows).logits)


def test_nothing_is_trainable_after_freeze():
    program, params = fds.functionalize(zoo.build("llama"))
    still = fds.freeze(program)
    assert not any(x.requires_grad for x in tree.leaves(still.spec))
    stored = still.place(params)
    assert all(torch.equal(a, b) for a, b in zip(still.restore(stored).values(), params.values(), strict=True))
    assert torch.equal(still(stored, **zoo.batch("llama")).logits, program(program.place(params), **zoo.batch("llama")).logits)  # fmt: skip
    with pytest.raises(ValueError, match="no trainable leaf"):
        fds.train_step(still, fds.optim.sgd(0.1))
