"""Tiny models of many families, each with a batch of four rows and the module path of a linear layer in its blocks."""

import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

VOCABULARY = 97
_BASE = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


class ConvNet(nn.Module):
    """Convolutions and BatchNorm; no transformer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, pixels):
        for block in self.blocks:
            pixels = pixels + block(pixels)
        return self.head(pixels.mean((-2, -1)))


FAMILIES = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_BASE)), "*.q_proj"),
    "llama-tied": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_BASE, tie_word_embeddings=True)), "*.q_proj"),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_BASE, head_dim=8)), "*.q_proj"),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**_BASE, sliding_window=8)), "*.q_proj"),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_BASE, head_dim=8, sliding_window=8)), "*.q_proj"),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **_IDS)), "*.c_attn"),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32, **_IDS)), "*.q_proj"),
    "bloom": (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_IDS)), "*.query_key_value"),
    "falcon": (lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_IDS)), "*.query_key_value"),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_BASE, num_local_experts=4, experts_implementation="batched_mm")), "*.q_proj"),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)), "*.query"),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **_IDS)), "*.q"),
    "convnet": (ConvNet, "head"),
}  # fmt: skip

_EAGER = dict(attn_implementation="eager")
_SEQ2SEQ = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
                max_position_embeddings=96, forced_eos_token_id=None, **_IDS)  # fmt: skip
# For serving alone, beside those above.
SERVED = {
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_BASE)),
    "qwen2-sliding": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "llama3": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_BASE, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16})),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_BASE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, **_EAGER)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_BASE, sliding_window=8)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4, **_IDS)),
    "gpt-neo": lambda: tf.GPTNeoForCausalLM(tf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8, max_position_embeddings=128, **_IDS)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128, **_IDS)),
    "falcon-alibi": lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **_IDS)),
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **_IDS)),
    "t5-eager": lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, feed_forward_proj="gated-gelu", **_IDS, **_EAGER)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_SEQ2SEQ, decoder_start_token_id=2)),
    "mbart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**_SEQ2SEQ, decoder_start_token_id=5, scale_embedding=True)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_SEQ2SEQ, decoder_start_token_id=0)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_SEQ2SEQ, decoder_start_token_id=0)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_BASE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, experts_implementation="batched_mm")),
}  # fmt: skip

ENCODED = ("t5", "t5-eager", "mt5", "bart", "mbart", "pegasus", "marian")  # with an encoder and a decoder


def build(family, *, training=False):
    """The model of a family, always with the same weights."""
    torch.manual_seed(0)
    model = (SERVED[family] if family in SERVED else FAMILIES[family][0])().train(training)
    with torch.no_grad():  # no leaf may be zero or one throughout: such a leaf hides a wrong gradient
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model


def lively(model, noise=0.4):
    """The model with weights whose greedy text goes on changing: with small ones, and the embedding for the output layer, it says one word again and again."""
    generator, embedding = torch.Generator().manual_seed(7), model.get_input_embeddings().weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and p is not embedding:
                p.add_(noise * torch.randn(p.shape, generator=generator))
            elif p.dim() == 1 and name.endswith("weight"):
                p.mul_(torch.randn(p.shape, generator=generator).sign())
    return model


def batch(family, rows=4, *, seed=1):
    """Keyword arguments of the model's forward."""
    generator = torch.Generator().manual_seed(seed)
    if family == "convnet":
        return {"pixels": torch.randn(rows, 4, 6, 6, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)[:, :7]} if family in ENCODED else {})}


def loss_of(out):
    """A mean over rows that every family has: minus the log-probability of one class."""
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return -F.log_softmax(logits.float(), -1)[..., 3].mean()


def loss(program, stored, batch):
    return loss_of(program(stored, **batch))


def reference(family, rows, *, training=False):
    """Loss and gradients by name of the plain module on a batch."""
    model = build(family, training=training)
    value = loss_of(model(**rows))
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(names, grads, strict=True))
