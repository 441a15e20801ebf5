"""Write a transformation: weights stored in 8 bits, seen by the model in full precision. A lens is two functions and a law.

python examples/write_a_lens.py
"""

import torch
import transformers

import fds


def int8(*, min_size=1024):
    """Store every large matrix as int8 with one scale per row (absolute maximum / 127). They are frozen: integers take no gradient.

    Law: get(put(p)) == p within half a step of the scale, 1/254 of the row's largest element.
    """

    def make(spec):  # spec: {name: meta tensor} of one site; the same code runs on it to find the stored shapes
        names = [n for n, leaf in spec.items() if leaf.dim() == 2 and leaf.numel() >= min_size]
        if not names:
            return None

        def put(params):
            out = {n: p for n, p in params.items() if n not in names}
            for n in names:
                scale = params[n].detach().abs().amax(1, keepdim=True) / 127
                out[f"{n}.int8"] = (params[n].detach() / scale).round().to(torch.int8)
                out[f"{n}.scale"] = scale
            return out

        def get(stored):
            out = {n: leaf for n, leaf in stored.items() if not n.endswith((".int8", ".scale"))}
            for n in names:
                out[n] = stored[f"{n}.int8"] * stored[f"{n}.scale"]
            return out

        return fds.Lens(put, get, tol=1 / 254)

    return fds.through(make, name="int8", options={"min_size": min_size}, provides=["int8"], conflicts=["int8"])


config = transformers.LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
)
program, params = fds.functionalize(transformers.LlamaForCausalLM(config).eval())
small = int8()(program)
print(program, small, sep="\n")

stored = small.place(params)
back = small.restore(stored)
error = max(
    float(((back[n] - p).abs().amax(-1) / p.abs().amax(-1).clamp(min=1e-9)).max())
    for n, p in params.items()
    if p.dim() == 2
)
print(f"largest error {error:.5f} of a row's largest element; declared {small.tol:.5f}")
assert error <= small.tol * 1.001

ids = torch.randint(0, 512, (4, 16))
with torch.no_grad():
    exact, close = program(program.place(params), input_ids=ids).logits, small(stored, input_ids=ids).logits
print(f"logits differ by {float((exact - close).norm() / exact.norm()):.4f} relative")

# It composes: trainable adapters on a quantised, sharded base, with recompute. The order is the policy.
mesh = fds.sharding.mesh(dp=-1)
train = fds.chain(fds.lora(rank=4, targets="*_proj"), int8(), fds.shard(mesh["dp"]), fds.checkpoint())(program)
step = fds.train_step(train, fds.optim.adamw(1e-2))
state, losses = step.init(params), []
for _ in range(10):
    state, metrics = step(state, {"input_ids": ids})
    losses.append(float(metrics["loss"]))
print(train, f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", sep="\n")
assert losses[-1] < losses[0] - 0.1
