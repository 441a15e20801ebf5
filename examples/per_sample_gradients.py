"""Per-sample gradients of a sharded model: vmap(grad) through the gather. Two ranks, each holding half of every gradient.

python examples/per_sample_gradients.py
"""

import argparse

import torch
import transformers

import fds


def main(args):
    axis = fds.sharding.mesh(dp=-1)["dp"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    program, params = fds.functionalize(model)
    ids = torch.randint(0, 128, (6, 12))  # the same rows on every rank: the gather's gradient is a mean over ranks

    def per_sample(program, stored):
        floats = {s: {k: v for k, v in part.items() if v.is_floating_point()} for s, part in stored.items()}

        def loss(stored, row):
            logits = program(stored, input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits
            return torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(floats, ids)

    sharded = fds.shard(axis)(program)
    mine = per_sample(sharded, sharded.place(params))
    squares = torch.stack([g.flatten(1).square().sum(1) for g in fds.tree.leaves(mine)]).sum(0)
    norms = axis.sum(squares).sqrt()  # each rank has 1/n of every sample's gradient

    # Against the plain way: one backward per row.
    for i, row in enumerate(ids):
        logits = model(input_ids=row[None]).logits
        grads = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits[0, :-1], row[1:]), list(model.parameters())
        )
        want = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        assert torch.allclose(norms[i], want, rtol=1e-4), (i, float(norms[i]), float(want))
    if axis.rank == 0:
        held = sum(g[0].numel() for g in fds.tree.leaves(mine))
        print(
            f"gradient norms of {len(ids)} rows: {[round(float(n), 4) for n in norms]}; {held:,} of {sum(p.numel() for p in model.parameters()):,} elements per row on this rank"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start")
    fds.launch(main, parser.parse_args())
