"""`kernels.use`: a model's modules by operators."""

import laws
import pytest
import torch
import zoo

import fds
from fds.kernels import use


@pytest.mark.parametrize(
    ("family", "pattern", "name"),
    [
        ("llama", "*norm", "rms_norm"),
        ("llama", "*.input_layernorm", "rms_norm"),
        ("gemma3", "*layernorm", "rms_norm"),  # stored less one
        ("gpt2", "*.ln_?", "layer_norm"),
        ("llama", "*.mlp", "swiglu"),
        ("gemma3", "*.mlp", "geglu"),
    ],
)
@pytest.mark.parametrize("chain", [(), (fds.checkpoint(),)])
def test_values_and_gradients(family, pattern, name, chain):
    program, params = fds.functionalize(zoo.build(family))
    used = fds.chain(fds.at(pattern, use(name)), *chain)(program)
    assert f"use(name='{name}')" in repr(used)
    rows = zoo.batch(family)

    def gradient(p):
        return fds.value_and_grad(lambda s, b: zoo.loss(p, s, b))(p.place(params), rows)

    (value, grads), (want, wanted) = gradient(used), gradient(program)
    assert torch.allclose(value, want, rtol=1e-5) and laws.distance(used.restore(grads), program.restore(wanted)) < 1e-4
    calls = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen(), torch.no_grad():
        used(used.place(params), **{k: v for k, v in rows.items() if k != "labels"})
    assert any(c.startswith("fds.") for c in calls)


def test_what_does_not_fit_is_refused():
    program, _ = fds.functionalize(zoo.build("llama"))
    for transform, words in [
        (lambda: fds.at("*.mlp", use("rms_norm")), "computes something else"),
        (lambda: fds.at("*norm", use("layer_norm")), "computes something else"),
        (lambda: fds.at("*.mlp", use("geglu")), "computes something else"),
        (lambda: use("rms_norm"), "which modules"),
        (lambda: fds.at("*norm", use("rmsnorm")), "did you mean 'rms_norm'"),
    ]:
        with pytest.raises(ValueError, match=words):
            transform()(program)
