"""Updates of flat buffers against `torch.optim`, `fds.optim` and formulas in float64."""

import pytest
import torch
from torch.func import grad

from fds import optim
from fds.kernels.optimizer import adamw_update, lion_update, sgd_update
from fds.kernels.rounding import stochastic_round

LOW = [torch.bfloat16, torch.float16]


def tensors(*shape, count=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


def steps(rule, update, n=4, **kwargs):
    """Parameters of `n` steps by a rule of `fds.optim`, and by an update."""
    p, *grads = tensors(7, 5, count=n + 1)
    mine, state, kept = p, rule.init(p), None
    for t, g in enumerate(grads, 1):
        u, state = rule.update(g, state, p)
        p = optim.apply_updates(p, u)
        mine, kept = update(mine, g, kept, t)
    return p, mine


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_has_the_bits_of_the_rule(decay):
    def update(p, g, kept, t):
        new, *kept = adamw_update(p, g, *(kept or [torch.zeros_like(p)] * 2), rate=0.01, count=t, weight_decay=decay)
        return new, kept

    p, mine = steps(optim.adamw(0.01, weight_decay=decay), update)
    assert torch.equal(p, mine)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_has_the_bits_of_the_rule_and_of_torch(momentum, nesterov):
    def update(p, g, kept, t):
        buffer = torch.zeros_like(p) if kept is None and momentum else kept
        return sgd_update(p, g, buffer, rate=0.1, momentum=momentum, weight_decay=0.01, nesterov=nesterov)

    p, mine = steps(optim.sgd(0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01), update)
    assert torch.equal(p, mine)
    x, *grads = tensors(7, 5, count=5)
    leaf = torch.nn.Parameter(x)
    theirs = torch.optim.SGD([leaf], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    for leaf.grad in grads:
        theirs.step()
    assert torch.allclose(mine, leaf, atol=1e-6)


def test_adamw_in_float64_is_that_of_torch():
    p, *grads = tensors(40, count=6, dtype=torch.float64)
    leaf, mine, mu, nu = torch.nn.Parameter(p.clone()), p, torch.zeros_like(p), torch.zeros_like(p)
    theirs = torch.optim.AdamW([leaf], lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    for t, leaf.grad in enumerate(grads, 1):
        theirs.step()
        kw = {"rate": 1e-2, "b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
        mine, mu, nu = adamw_update(mine, leaf.grad, mu, nu, count=t, **kw)
    assert torch.allclose(mine, leaf, rtol=1e-14)


def exact_lion(p, g, m, rate, b1, b2, decay):
    p, g, m = p.double(), g.double(), m.double()
    return p - rate * ((b1 * m + (1 - b1) * g).sign() + decay * p), b2 * m + (1 - b2) * g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
def test_lion(dtype):
    p, g, m = tensors(200, count=3, dtype=dtype)
    m = m.to(torch.float64 if dtype == torch.float64 else torch.float32)
    got = lion_update(p, g, m, rate=0.01, b1=0.8, b2=0.9, weight_decay=0.1)
    want = exact_lion(p, g, m, 0.01, 0.8, 0.9, 0.1)
    assert got[0].dtype == dtype and got[1].dtype == m.dtype
    for x, y, d in zip(got, want, (dtype, m.dtype), strict=True):
        assert torch.allclose(x.double(), y, rtol=2 * torch.finfo(d).eps, atol=2 * torch.finfo(d).eps)


@pytest.mark.parametrize("grad_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_parameters_are_rounded_once(dtype, grad_dtype):
    p, g = tensors(300, dtype=dtype)
    m, v = tensors(300)
    g, v = g.to(grad_dtype), v.abs()
    new, *kept = adamw_update(p, g, m, v, rate=0.01, count=5, weight_decay=0.1)
    wide, *same = adamw_update(p.float(), g.float(), m, v, rate=0.01, count=5, weight_decay=0.1)
    assert torch.equal(new, wide.to(dtype)) and all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))
    new, buffer = sgd_update(p, g, m, rate=0.01, momentum=0.9, weight_decay=0.1)
    wide, same = sgd_update(p.float(), g.float(), m, rate=0.01, momentum=0.9, weight_decay=0.1)
    assert torch.equal(new, wide.to(dtype)) and torch.equal(buffer, same)


def test_the_copy():
    p, g, m, v = tensors(300, count=4)
    kw = {"rate": 0.01, "count": 3}
    for dtype in LOW:
        new, _, _, low = adamw_update(p, g, m, v.abs(), copy=dtype, **kw)
        assert torch.equal(low, new.to(dtype))
    new, _, _, low = adamw_update(p, g, m, v.abs(), copy=torch.bfloat16, seed=9, leaf=2, **kw)
    assert torch.equal(low, stochastic_round(new, 9, step=3, leaf=2)) and not torch.equal(low, new.bfloat16())
    assert torch.equal(new, adamw_update(p, g, m, v.abs(), **kw)[0])
    assert len(lion_update(p, g, m, rate=0.1, copy=torch.float16)) == 3
    new, none, low = sgd_update(p, g, None, rate=0.1, copy=torch.float16)
    assert none is None and torch.equal(low, new.half())


def test_random_rounding_moves_what_rounding_to_the_nearest_leaves():
    n, t = 4096, 64
    near, moved, g = torch.ones(n).bfloat16(), torch.ones(n).bfloat16(), torch.ones(n)
    for i in range(t):  # steps of 2^-12; half a step of bfloat16 below 1 is 2^-9
        near = sgd_update(near, g, None, rate=2.0**-12)[0]
        moved = sgd_update(moved, g, None, rate=2.0**-12, seed=0, count=i)[0]
    assert (near == 1).all()
    assert abs(float(moved.float().mean()) - (1 - t * 2.0**-12)) < 4 * 2.0**-9 * (t / n) ** 0.5


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0, 2), (5, 3)])
def test_shapes(shape):
    p, g, m = tensors(*shape, count=3)
    for out in (
        adamw_update(p, g, m, m.abs(), rate=0.1, count=1, copy=torch.bfloat16),
        lion_update(p, g, m, rate=0.1),
        sgd_update(p, g, m, rate=0.1),
    ):
        assert all(o.shape == shape and o.is_contiguous() for o in out)


def test_strides():
    p, g, m, v = (t.mT for t in tensors(6, 5, count=4))
    row = g[:, :1].expand(5, 6)
    got = adamw_update(p, row, m, v.abs(), rate=0.1, count=1)
    want = adamw_update(*(t.contiguous() for t in (p, row, m, v.abs())), rate=0.1, count=1)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))


def test_nothing_is_written_over():
    args = tensors(9, count=4)
    before = [a.clone() for a in args]
    out = adamw_update(*args[:3], args[3].abs(), rate=0.0, count=1, copy=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in (*out, *args)}
    assert len(storages) == len(out) + len(args)


def test_nan_and_inf():
    p, m = torch.ones(4), torch.zeros(4)
    g = torch.tensor([1.0, torch.nan, torch.inf, 0.0])
    new, mu, nu = adamw_update(p, g, m, m, rate=0.5, count=1)
    assert new.isnan().tolist() == [False, True, True, False] and abs(new[0] - 0.5) < 1e-6 and new[3] == 1
    assert mu.isfinite().tolist() == nu.isfinite().tolist() == [True, False, False, True]
    new, mu = lion_update(p, g, m, rate=0.5)
    assert new.isnan().tolist() == [False, True, False, False] and new.tolist()[2:] == [0.5, 1.0] and mu[2] == torch.inf
    assert sgd_update(p, g, None, rate=0.5)[0].isfinite().tolist() == [True, False, False, True]
    assert adamw_update(p, torch.zeros(4), m, torch.full((4,), torch.nan), rate=0.5, count=1)[0].isnan().all()


def test_gradients_through_two_updates():
    """Of the learning rate and of the start, against the same formulas in `fds.optim`."""
    p, a, b = tensors(6, count=3, dtype=torch.float64)
    a[0] = b[0] = 0.0  # an average of squares that is 0: no NaN comes of it

    def mine(rate, p):
        mu = nu = torch.zeros_like(p)
        for t, g in enumerate((a, b), 1):
            p, mu, nu = adamw_update(p, g * p, mu, nu, rate=rate, count=t, weight_decay=0.1, eps=1e-3)
        return p.square().sum()

    def rule(rate, p):
        tx = optim.adamw(lambda _: rate, weight_decay=0.1, eps=1e-3)
        state = tx.init(p)
        for g in (a, b):
            u, state = tx.update(g * p, state, p)
            p = p + u
        return p.square().sum()

    rate = torch.tensor(0.1, dtype=torch.float64)
    got, want = grad(mine, argnums=(0, 1))(rate, p), grad(rule, argnums=(0, 1))(rate, p)
    assert torch.allclose(got[0], want[0]) or want[0].isnan()
    assert torch.allclose(got[1][1:], want[1][1:]) and got[1].isfinite().all()


def test_a_copy_passes_gradients_as_a_cast():
    p, g, m, v = tensors(6, count=4)
    for seed in (None, 3):
        d = grad(
            lambda p, s=seed: (
                adamw_update(p, g, m, v.abs(), rate=0.1, count=1, weight_decay=0.5, copy=torch.bfloat16, seed=s)[3]
                .float()
                .sum()
            )
        )(p)
        assert torch.allclose(d, torch.full_like(d, 0.95))


def test_a_new_value_is_not_a_new_graph():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    f = torch.compile(
        lambda p, g, m, v, rate, count: adamw_update(p, g, m, v, rate=rate, count=count),
        backend=counter,
        fullgraph=True,
    )
    p, g, m, v = tensors(6, count=4)
    for rate, count in ((0.1, 1), (0.01, 2), (0.001, 3)):
        f(p, g, m, v.abs(), torch.tensor(rate, dtype=torch.float64), torch.tensor(count))
    assert counter.frame_count == 1


def test_bad_arguments():
    p = torch.ones(3)
    kw = {"rate": 0.1, "count": 1}
    with pytest.raises(ValueError, match=r"adamw_update: grad \(4,\) on cpu, required \(3,\) on cpu, as the parameter"):
        adamw_update(p, torch.ones(4), p, p, **kw)
    with pytest.raises(
        ValueError,
        match=r"adamw_update: mu torch.bfloat16, required torch.float32 beside a parameter of torch.bfloat16",
    ):
        adamw_update(p.bfloat16(), p, p.bfloat16(), p, **kw)
    with pytest.raises(ValueError, match=r"param torch.int64, required a floating dtype"):
        adamw_update(p.long(), p, p, p, **kw)
    with pytest.raises(
        ValueError, match=r"rate \(1,\) torch.float32 on cpu, required a number, or a 0-D floating tensor"
    ):
        adamw_update(p, p, p, p, rate=torch.ones(1), count=1)
    with pytest.raises(ValueError, match=r"copy='float64', required torch.bfloat16, torch.float16 or None"):
        lion_update(p, p, p, rate=0.1, copy=torch.float64)
    with pytest.raises(
        ValueError, match=r"a copy in float16 of a parameter in torch.bfloat16, required a float32 parameter"
    ):
        lion_update(p.bfloat16(), p, p, rate=0.1, copy=torch.float16)
    with pytest.raises(
        ValueError,
        match=r"a seed, and nothing to round at random in param torch.float32, copy float16; use torch.bfloat16",
    ):
        lion_update(p, p, p, rate=0.1, copy=torch.float16, seed=0)
    with pytest.raises(ValueError, match=r"momentum=0.9, nesterov=False without a buffer; give zeros"):
        sgd_update(p, p, None, rate=0.1, momentum=0.9)
    with pytest.raises(
        ValueError, match=r"adamw_update: b1 takes no gradient \(only param, grad, mu, nu, rate, weight_decay do\)"
    ):
        grad(lambda b: adamw_update(p, p, p, p, b1=b, **kw)[0].sum())(torch.tensor(0.9))
