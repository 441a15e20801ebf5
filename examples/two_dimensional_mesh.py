"""ZeRO-3 and tensor parallelism on a 2 x 2 mesh; then the run goes on, from the same files, on two ranks with ZeRO-3 alone.

python examples/two_dimensional_mesh.py
"""

import argparse

import torch
import transformers

import fds


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))


def rows(i):
    """The global batch of a step: tokens that count upwards, from anywhere."""
    start = torch.randint(256, (8, 1), generator=torch.Generator().manual_seed(i))
    return (start + torch.arange(32)) % 256


def main(args):
    mesh = fds.sharding.mesh(dp=-1, tp=args.tp)
    dp, tp = mesh["dp"], mesh["tp"]
    program, params = fds.functionalize(model())
    train = fds.chain(
        fds.tensor_parallel(tp),  # every layer split over `tp`, whose ranks see the same rows
        fds.shard(dp),  # what is left of it, split over `dp`
        fds.checkpoint(),
    )(program)
    step = fds.train_step(train, fds.optim.chain(fds.optim.clip_by_global_norm(1.0), fds.optim.adamw(3e-3)))
    state = fds.load_state(args.out, step) if args.resume else step.init(params)
    first = fds.load_extra(args.out)["next"] if args.resume else 0
    for i in range(first, first + args.steps):
        state, metrics = step(state, {"input_ids": rows(i).chunk(dp.size)[dp.rank]})
        if mesh.rank == 0 and i % 5 == 4:
            print(f"dp={dp.size} tp={tp.size}  step {i + 1}  loss {float(metrics['loss']):.4f}", flush=True)
    fds.save_state(args.out, step, state, extra={"next": first + args.steps})
    if mesh.rank == 0:
        held, whole = fds.tree.nbytes(state.params), sum(p.nbytes for p in params.values())
        print(f"dp={dp.size} tp={tp.size}  each rank holds {held:,} of {whole:,} bytes of parameters", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps on each mesh")
    parser.add_argument("--out", default="out/mesh", help="folder for the state of the run")
    args = parser.parse_args()
    for args.ranks, args.tp, args.resume in ((4, 2, False), (2, 1, True)):
        fds.launch(main, args)
