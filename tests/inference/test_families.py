"""Every family's greedy text is that of transformers: several prompts, padded on either side, 64 tokens, in every mode and every kind of cache."""

import pytest
import torch
import zoo

import fds
from fds.inference import CacheConfig, Decoding, replace_transformer_layer
from fds.inference import cache as caches

CAUSAL = ["llama", "llama-tied", "llama3", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gptj", "gpt-neo", "gpt-neox", "opt", "bloom", "falcon",
          "falcon-alibi", "mixtral", "qwen3-moe"]  # fmt: skip
ENCODED = list(zoo.ENCODED)
ABSOLUTE = ("bart", "mbart", "pegasus", "marian")  # encoders of theirs count padding on the left as positions
NEW = 64


def prompts(side="left"):
    """Three rows, the last two padded."""
    ids = torch.randint(3, zoo.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    ids = ids.masked_fill(mask == 0, 0)
    order = mask.argsort(dim=1, descending=side == "right", stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def theirs(model, family):
    """The new tokens of transformers' greedy search."""
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids, mask = prompts("right" if family in ABSOLUTE else "left")
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=NEW, pad_token_id=0)  # fmt: skip
    return out[:, -NEW:]


def kinds(family):
    return [CacheConfig(kind, page=8) for kind in ("static", "paged", "sliding") if (family, kind) != ("gpt-neo", "sliding")]  # fmt: skip


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODED])
def test_greedy_equals_transformers(family):
    model = zoo.lively(zoo.build(family), 2.0 if family == "marian" else 0.4)
    want = theirs(model, family)
    assert len(want.unique()) > 3, "one word again and again would tell little"
    program, params = fds.functionalize(model)
    for mode, chosen in (("generic", program), ("specialized", replace_transformer_layer(program))):
        stored = chosen.place(params)
        for kind in kinds(family):
            for side in ("left", "right") if kind.kind == "static" else ("left",):
                got = fds.generate(chosen, stored, *prompts(side), max_new_tokens=NEW, compile=False, cache=kind)
                assert torch.equal(got[:, -NEW:], want), (mode, kind, side)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODED])
def test_int8_is_near(family):
    """Logits behind prompts and behind each of eight tokens: within 2% of the largest."""
    program, params = fds.functionalize(zoo.build(family))
    stored = program.place(params)
    ids, _ = prompts("right")
    lengths = torch.tensor([9, 6, 3])
    begin = torch.full((3, 1), 5) if family in ENCODED else None
    found = {}
    for kind in ("static", *(f"{k.kind}-int8" for k in kinds(family))):
        d = Decoding.of(program, kind)
        logits, cache = d.prefill(stored, ids, lengths, 64, caches.tables(d.config, [64] * 3, 64), begin)
        found[kind] = [logits]
        for token in prompts()[0].T[:8]:
            logits, cache = d.step(stored, cache, token[:, None])
            found[kind].append(logits[:, 0])
    exact = torch.stack(found.pop("static"))
    for kind, logits in found.items():
        off = (torch.stack(logits) - exact).abs().max() / exact.abs().max()
        assert 0 < off < 0.02, (kind, float(off))
