"""GRPO on a task with a checkable answer: a tiny Llama, from random weights, learns to add, sharded over two ranks.

    torchrun --standalone --nproc-per-node 2 examples/grpo.py

Every step: each rank draws problems, samples a group of answers to each with the training weights, rewards those that are right, and takes one step
towards what was better than its group's mean (Shao et al. 2024, arXiv:2402.03300, without its KL term). Draws the reward.

An answer is right or wrong as a whole: all its tokens share one advantage, and a reward for each right digit would be earned by the easy one alone.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fds
from fds.inference import hybrid

TOKENS = "0123456789+="


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), max_position_embeddings=16, **sizes))


def problems(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts like "8+4=" [count, 4], and what should follow, "12" [count, 2]."""
    a, b = torch.randint(10, (2, count), generator=torch.Generator().manual_seed(seed))
    plus, equals = (torch.full((count,), TOKENS.index(c)) for c in "+=")
    return torch.stack([a, plus, b, equals], 1), torch.stack([(a + b) // 10, (a + b) % 10], 1)


def logprobs(program: fds.Program, stored: dict, ids: Tensor, new: int) -> Tensor:
    """Of the last `new` tokens of rows: float32 [rows, new]."""
    logits = program(stored, input_ids=ids).logits[:, -new - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, ids[:, -new:, None])[..., 0]


def loss(program: fds.Program, stored: dict, batch: dict) -> Tensor:
    """The clipped objective: each token's probability against that of its sampling, times the advantage of its answer."""
    ratio = (logprobs(program, stored, batch["ids"], batch["sampled"].shape[1]) - batch["sampled"]).exp()
    advantage = batch["advantage"][:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def draw(rewards: list[float], seconds: list[float], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    smooth = torch.tensor(rewards).unfold(0, min(20, len(rewards)), 1).mean(1)
    axes.plot(rewards, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(range(len(rewards) - len(smooth), len(rewards)), smooth, color="tab:blue")
    axes.set(
        xlabel=f"steps ({seconds[-1] - seconds[0]:.0f} s in all)", ylabel="share of answers that are right", ylim=(0, 1)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--problems", type=int, default=32, help="of a rank, in each step")
    parser.add_argument("--group", type=int, default=16, help="answers to each problem")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("out/grpo.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    axis = fds.sharding.mesh(dp=-1)["dp"]
    program, params = fds.functionalize(model())
    train = fds.shard(program, axis)
    rate = fds.optim.warmup_cosine(args.rate, warmup_steps=0, total_steps=args.steps)
    tx = fds.optim.chain(fds.optim.clip_by_global_norm(1.0), fds.optim.adamw(rate))
    step = fds.compile(fds.train_step(train, tx, loss=loss))
    state, engine = step.init(params), hybrid(train, max_out_tokens=16)
    rewards, seconds, furthest = list[float](), [time.perf_counter()], 0.0
    for i in range(args.steps):
        prompts, answers = problems(args.problems, i * axis.size + axis.rank)
        out = engine.generate(
            state.params, prompts, max_new_tokens=2, temperature=1.0, n=args.group, seed=i, compile=False, details=True
        )
        right = (out.tokens[:, -2:] == answers.repeat_interleave(args.group, 0)).all(1).float()
        group = right.view(-1, args.group)
        advantage = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
        if i % 100 == 0:  # rollouts are the training program's own
            with torch.no_grad():
                own = logprobs(train, state.params, out.tokens, 2)
            torch.testing.assert_close(out.logprobs, own, rtol=1e-5, atol=1e-5)
            furthest = max(furthest, float((own - out.logprobs).abs().max()))
        with engine.measured("train"):
            batch = {"ids": out.tokens, "sampled": out.logprobs, "advantage": advantage.reshape(-1)}
            state, _ = step(state, batch)
        rewards.append(float(axis.sum(right.mean()) / axis.size))
        seconds.append(time.perf_counter())
        if axis.rank == 0 and (i % 50 == 0 or i + 1 == args.steps):
            print(f"step {i}: reward {rewards[-1]:.3f}, {seconds[-1] - seconds[0]:.0f} s", flush=True)
    if axis.rank == 0:
        print(engine.statistics())
        print(f"log-probabilities of rollouts against the training program's: {furthest:.1e} apart at most")
        draw(rewards, seconds, args.out)


if __name__ == "__main__":
    main()
