"""Every operator under every transformation, against its reference. A new operator is a row of `operators()` and needs no test here."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fds.kernels

OPERATORS = fds.kernels.operators()
SMOOTH = [n for n, o in OPERATORS.items() if o.differentiable]


def arguments(name, dtype=torch.float64, seed=0):
    """Arguments, and the places of those that take gradients."""
    op = OPERATORS[name]
    args = op.example(seed, dtype)
    return op, args, [i for i in op.differentiable if args[i] is not None]


def scalar(f, args, places):
    """`f` as a scalar function of its differentiable arguments: its floating results, weighed at random."""

    def run(*tensors):
        full = list(args)
        for i, t in zip(places, tensors, strict=True):
            full[i] = t
        out = f(*full)
        total = 0.0
        for k, o in enumerate(out if isinstance(out, tuple) else (out,)):
            if o.is_floating_point() and o.numel():
                weights = torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape)
                total = total + (k + 1) * (weights * o + 0.1 * o.square()).sum()
        return total

    return run


def near(got, want, tolerance=1e-9):
    got, want = ([x for x in t if isinstance(x, Tensor)] if isinstance(t, tuple | list) else [t] for t in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert torch.allclose(
            g, w, rtol=tolerance, atol=tolerance * float(w.abs().max() if w.numel() else 0) + 1e-12
        ), (g - w).abs().max()


def both(name):
    """The scalar function by the operator and by its reference, and where to take it."""
    op, args, places = arguments(name)
    x = tuple(args[i] for i in places)
    return scalar(op, args, places), scalar(op.reference, args, places), x, tuple(range(len(x)))


@pytest.mark.parametrize("name", OPERATORS)
def test_values(name):
    op, args, _ = arguments(name)
    near(op(*args), op.reference(*args))
    near(torch.compile(op, fullgraph=True, backend="aot_eager")(*args), op.reference(*args))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    op, args, places = arguments(name, torch.float32)
    args = [a.clone().requires_grad_() if i in places else a for i, a in enumerate(args)]
    torch.library.opcheck(op.run, tuple(args))


@pytest.mark.parametrize("name", SMOOTH)
def test_first_derivatives(name):
    f, g, x, every = both(name)
    want = grad(g, argnums=every)(*x)
    near(grad(f, argnums=every)(*x), want)
    near(vjp(f, *x)[1](torch.ones((), dtype=x[0].dtype)), want)
    near(make_fx(grad(f, argnums=every))(*x)(*x), want)
    leaves = [t.clone().requires_grad_() for t in x]
    near(torch.autograd.grad(f(*leaves), leaves), want)
    tangents = tuple(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in x)
    near(jvp(f, x, tangents), jvp(g, x, tangents))


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives(name):
    f, g, x, every = both(name)

    def second(h):
        return lambda *x: sum((d * d).sum() for d in grad(h, argnums=every)(*x))

    want = grad(second(g), argnums=every)(*x)
    near(grad(second(f), argnums=every)(*x), want, 1e-8)
    leaves = [t.clone().requires_grad_() for t in x]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    near(torch.autograd.grad(sum((d * d).sum() for d in first), leaves), want, 1e-8)
    tangents = tuple(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in x)
    near(jvp(grad(f, argnums=every), x, tangents)[1], jvp(grad(g, argnums=every), x, tangents)[1], 1e-8)


@pytest.mark.parametrize("name", SMOOTH)
def test_vmap(name):
    f, g, x, every = both(name)
    rows = tuple(torch.stack([t, 2 * t, -t]) for t in x)
    near(vmap(f)(*rows), vmap(g)(*rows))
    near(vmap(grad(f, argnums=every))(*rows), vmap(grad(g, argnums=every))(*rows))
    dims = (0,) + (None,) * (len(x) - 1)
    near(vmap(grad(f, argnums=every), dims)(rows[0], *x[1:]), vmap(grad(g, argnums=every), dims)(rows[0], *x[1:]))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("how", ["backward", "grad", "vmap(grad)", "jvp"])
def test_strict_compile(name, how):
    """Where torch 2.13 drops the backward of an `autograd.Function` without a word."""
    f, g, x, every = both(name)
    tangents = tuple(torch.ones_like(t) for t in x)

    def made(h):
        if how == "backward":
            return lambda *x: torch.autograd.grad(h(*(leaves := [t.clone().requires_grad_() for t in x])), leaves)
        if how == "grad":
            return grad(h, argnums=every)
        if how == "vmap(grad)":
            return lambda *x: vmap(grad(h, argnums=every))(*(torch.stack([t, -t]) for t in x))
        return lambda *x: jvp(h, x, tangents)[1]

    if how == "backward":
        leaves = [t.clone().requires_grad_() for t in x]
        near(torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves), made(g)(*x))
    else:
        near(torch.compile(made(f), fullgraph=True, backend="aot_eager")(*x), made(g)(*x))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_bits_twice(name):
    op, args, _ = arguments(name, torch.float32)
    a, b = op(*args), op(*args)
    assert all(
        torch.equal(x, y)
        for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_it_says_what_it_is(name):
    op = OPERATORS[name]
    assert op.formula and op.why and name in repr(op)


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'linear_cross_entropy'"):
        fds.kernels.registry.find("linear_crossentropy")
