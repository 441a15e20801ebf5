"""`DeepSpeedTransformerLayer` and `DeepSpeedTransformerConfig`: the BERT training layer under DeepSpeed's names. What it computes is in `bert.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fds import tree
from fds.deepspeed.bert import bert_layer, kept_bytes

_HF = {
    "attn_qkvw": ("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight"),
    "attn_qkvb": ("attention.self.query.bias", "attention.self.key.bias", "attention.self.value.bias"),
    "attn_ow": ("attention.output.dense.weight",),
    "attn_ob": ("attention.output.dense.bias",),
    "inter_w": ("intermediate.dense.weight",),
    "inter_b": ("intermediate.dense.bias",),
    "output_w": ("output.dense.weight",),
    "output_b": ("output.dense.bias",),
}
_HF_POST = {"attn_n": "attention.output.LayerNorm", "norm_": "output.LayerNorm"}
_HF_PRE = {"attn_n": "intermediate.LayerNorm", "norm_": "attention.LayerNorm"}  # RoBERTa-PreLayerNorm


@attrs.frozen
class DeepSpeedTransformerConfig:
    """The layer's configuration: DeepSpeed's fields, order and defaults. -1 is "not given"; the layer says what it needs.

    * `hidden_size`, `intermediate_size` (default: four times that), `heads`, `layer_norm_eps`; `attn_dropout_ratio`, `hidden_dropout_ratio`: in [0, 1].
    * `num_hidden_layers`, `initializer_range`: of the normal distribution that weights are drawn from; with `adjust_init_range` divided by
      ``sqrt(2 * num_hidden_layers)`` for the two matrices that write to the residual stream (in DeepSpeed only where `local_rank` is 0).
    * `pre_layer_norm`: where the norms are. `training`: the mode that the layer begins in. `return_tuple`: return ``(output,)``.
    * `fp16`: compute in float16 whatever parameters and inputs are in; the output comes back in the input's dtype.
    * `seed`: >= 0 is mixed into the seed of every dropout mask. Masks are drawn from the program's seed (`fds.with_seed`, `train_step`), else from one
      number of torch's generator per call; they are never a counter's.
    * `normalize_invertible`, `gelu_checkpoint`, `attn_dropout_checkpoint`, `stochastic_mode`: what is not kept for backward; see `bert.py`, and
      `kept_bytes` for what each saves. In DeepSpeed `stochastic_mode` is a build of the kernels that rounds more often and repeats less exactly; there is no
      such build here. What it chooses here is how the masks are held: drawn again from their seeds, with the same values.
    * `local_rank`: >= 0 makes the parameters on that device of the accelerator, where there is one. It sets no device for the process.
    * `batch_size`: nothing is allocated by it, and any number of rows goes in.

    Beside DeepSpeed's: `gelu_approximate`, "none" (as Hugging Face's BERT) or "tanh" (as DeepSpeed's kernel, which differs by up to 5e-4).

    >>> DeepSpeedTransformerConfig(hidden_size=64, heads=4).intermediate_size
    256
    """

    batch_size: int = -1
    hidden_size: int = -1
    intermediate_size: int = -1
    heads: int = -1
    attn_dropout_ratio: float = -1
    hidden_dropout_ratio: float = -1
    num_hidden_layers: int = -1
    initializer_range: float = -1
    layer_norm_eps: float = 1e-12
    local_rank: int = -1
    seed: int = -1
    fp16: bool = False
    pre_layer_norm: bool = True
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    adjust_init_range: bool = True
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False
    return_tuple: bool = False
    training: bool = True
    gelu_approximate: str = attrs.field(default="none", kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.intermediate_size <= 0:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> "DeepSpeedTransformerConfig":
        """From fields by name; `ValueError` for a name that is none."""
        known = [f.name for f in attrs.fields(cls)]
        for key in json_object:
            if key not in known:
                raise ValueError(f"DeepSpeedTransformerConfig: {key!r} is no field; {tree.suggest(key, known)}")
        return cls(**json_object)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> "DeepSpeedTransformerConfig":
        """From a JSON file in UTF-8, UTF-16 (as DeepSpeed reads it) or UTF-32."""
        return cls.from_dict(json.loads(Path(json_file).read_bytes()))

    def check(self) -> None:
        """`ValueError` for what no layer can have; names the field."""
        required = {
            "hidden_size": ("a positive whole number", self.hidden_size > 0),
            "heads": (f"a number that divides hidden_size={self.hidden_size}", self.heads > 0 and not self.hidden_size % self.heads),
            "attn_dropout_ratio": ("a number from 0 to 1", 0 <= self.attn_dropout_ratio <= 1),
            "hidden_dropout_ratio": ("a number from 0 to 1", 0 <= self.hidden_dropout_ratio <= 1),
            "gelu_approximate": ("'none' or 'tanh'", self.gelu_approximate in ("none", "tanh")),
        }  # fmt: skip
        for name, (what, fits) in required.items():
            if not fits:
                raise ValueError(f"DeepSpeedTransformerConfig: {name}={getattr(self, name)!r}, required {what}")

    def kept_bytes(self, rows: int, length: int, *, itemsize: int = 4, training: bool = True) -> dict[str, int]:
        """Bytes of activations that a call on `rows` rows of `length` tokens keeps for its backward, by named value (`bert.py`).

        >>> config = DeepSpeedTransformerConfig(hidden_size=8, heads=2, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
        >>> less = attrs.evolve(config, gelu_checkpoint=True)
        >>> sum(config.kept_bytes(3, 5).values()) - sum(less.kept_bytes(3, 5).values())  # ff2_inp
        1920
        """
        self.check()
        return kept_bytes(self.hidden_size, self.intermediate_size, self, rows, length, itemsize=itemsize, training=training)  # fmt: skip


class DeepSpeedTransformerLayer(nn.Module):
    """A BERT layer, pre- or post-norm, with DeepSpeed's parameters and options; equal to the Hugging Face layer with its weights (`from_hugging_face`).

    ``layer(hidden_states, attention_mask)``: [B, S, H] to the same; the mask is added to the scores, or bool with True for what is seen, and broadcasts to
    [B, heads, S, S]. A plain `nn.Module`, with no state outside of itself: `fds.functionalize`, `torch.func` and compilers take it as any other.

    Args:
        initial_weights, initial_biases: of query, key, value, attention output, attention norm, intermediate, output, norm: both or neither. (DeepSpeed sets
            the first three biases to zero; here they are used. None leaves one zero.)

    Law: the memory options change no value and no gradient, beyond the rounding of one norm under `normalize_invertible`.

    >>> config = DeepSpeedTransformerConfig(hidden_size=8, heads=2, attn_dropout_ratio=0.0, hidden_dropout_ratio=0.0, num_hidden_layers=2, initializer_range=0.02)
    >>> DeepSpeedTransformerLayer(config)(torch.ones(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    attn_qkvw: Tensor
    attn_qkvb: Tensor

    def __init__(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        device = _device(config.local_rank)
        for name, shape in _shapes(config).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device)))
        if initial_weights is None and initial_biases is None:
            self.init_transformer_weights(config.adjust_init_range)
        else:
            self._set(initial_weights, initial_biases)
        self.train(config.training)

    def init_transformer_weights(self, adjust_init_range: bool = False) -> None:
        """Draw the weights, from a normal distribution; biases 0, norms 1 and 0."""
        c = self.config
        if c.initializer_range < 0 or (adjust_init_range and c.num_hidden_layers < 1):
            name = "initializer_range" if c.initializer_range < 0 else "num_hidden_layers"
            raise ValueError(
                f"DeepSpeedTransformerConfig: {name}={getattr(c, name)}, required to draw weights{' with adjust_init_range' * (name != 'initializer_range')}; give it, or initial_weights"
            )
        output = c.initializer_range / math.sqrt(2.0 * c.num_hidden_layers) if adjust_init_range else c.initializer_range  # fmt: skip
        deviations = {"attn_qkvw": c.initializer_range, "attn_ow": output, "inter_w": c.initializer_range, "output_w": output}  # fmt: skip
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in deviations:
                    p.normal_(std=deviations[name])
                else:
                    p.fill_(1.0 if name in ("attn_nw", "norm_w") else 0.0)

    def reset_parameters(self) -> None:
        """What `fds.init_params` calls for a layer on the meta device."""
        self.init_transformer_weights(self.config.adjust_init_range)

    def _set(self, weights: Sequence[Tensor] | None, biases: Sequence[Tensor | None] | None) -> None:
        if weights is None or biases is None or len(weights) != 8 or len(biases) != 8:
            given = {k: None if v is None else len(v) for k, v in (("weights", weights), ("biases", biases))}
            raise ValueError(f"DeepSpeedTransformerLayer: initial {given}, required 8 of each, or neither")
        filled = [torch.zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        values: dict[str, Tensor] = {}
        for suffix, xs in ("w", weights), ("b", filled):
            names = [f"attn_o{suffix}", f"attn_n{suffix}", f"inter_{suffix}", f"output_{suffix}", f"norm_{suffix}"]
            values |= {f"attn_qkv{suffix}": torch.cat([x.detach() for x in xs[:3]]), **dict(zip(names, xs[3:], strict=True))}  # fmt: skip
        self._load(values, "initial_weights")

    def _load(self, values: Mapping[str, Tensor], what: str) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                if values[name].shape != p.shape:
                    raise ValueError(
                        f"{name}: {what} gives {tuple(values[name].shape)}, required {tuple(p.shape)} (hidden_size={self.config.hidden_size}, intermediate_size={self.config.intermediate_size})"
                    )
                p.copy_(values[name])

    def load_hugging_face(self, layer: "nn.Module | Mapping[str, Tensor]") -> None:
        """Take over the weights of a `BertLayer` (post-norm; RoBERTa's and ELECTRA's are the same) or `RobertaPreLayerNormLayer` (pre-norm), or its state dict."""
        self._load(from_hugging_face(layer, self.config.pre_layer_norm), "the Hugging Face layer")

    @classmethod
    def from_hugging_face(cls, layer: nn.Module, **options: Any) -> "DeepSpeedTransformerLayer":
        """This layer with the weights, the sizes, the dropout, the dtype, device and mode of a Hugging Face layer; `options` are fields of the configuration.

        Raises `ValueError` for a layer that computes something else: cross-attention, a causal mask, or another activation than GELU.
        """
        of: Any = layer
        names = dict(layer.named_modules())
        attention = names.get("attention.self")
        if attention is None or "intermediate.dense" not in names or "crossattention" in names:
            raise ValueError(
                f"from_hugging_face: {type(layer).__name__} is no BertLayer or RobertaPreLayerNormLayer without cross-attention; it has {sorted(n for n in names if n and '.' not in n)}"
            )
        if getattr(attention, "is_causal", False):
            raise ValueError("from_hugging_face: this layer is a decoder's (is_causal), required an encoder's")
        activation = type(of.intermediate.intermediate_act_fn).__name__
        if activation not in ("GELUActivation", "GELUTanh", "NewGELUActivation", "PytorchGELUTanh"):
            raise ValueError(
                f"from_hugging_face: activation {activation}, required GELU (hidden_act='gelu', or 'gelu_new' and 'gelu_pytorch_tanh' by tanh)"
            )
        weight: Tensor = of.intermediate.dense.weight
        found: dict[str, Any] = {
            "hidden_size": weight.shape[1],
            "intermediate_size": weight.shape[0],
            "heads": of.attention.self.num_attention_heads,
            "attn_dropout_ratio": of.attention.self.dropout.p,
            "hidden_dropout_ratio": of.output.dropout.p,
            "layer_norm_eps": (of.intermediate if "intermediate.LayerNorm" in names else of.output).LayerNorm.eps,
            "pre_layer_norm": "intermediate.LayerNorm" in names,
            "gelu_approximate": "none" if activation == "GELUActivation" else "tanh",
            "training": layer.training,
        }
        config = DeepSpeedTransformerConfig.from_dict({**found, **options})
        weights = from_hugging_face(layer, config.pre_layer_norm)
        with torch.device(weight.device):
            new = cls(attrs.evolve(config, initializer_range=0.0, num_hidden_layers=max(config.num_hidden_layers, 1)))
        new.config = config
        new.to(weight.dtype)._load(weights, "the Hugging Face layer")
        return new

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: None = None,
        layer_head_mask: None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_value: None = None,
        output_attentions: bool = False,
        grads: None = None,
        **others: Any,
    ) -> Any:
        """Arguments after the mask are those of other layers in its place: `ValueError` for one that is not None or False."""
        named = {"head_mask": head_mask, "layer_head_mask": layer_head_mask, "encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask,
                 "past_key_value": past_key_value, "output_attentions": output_attentions, "grads": grads, **others}  # fmt: skip
        for name, x in named.items():
            if x is not None and x is not False and not (name == "use_cache" and self.training is False):
                raise ValueError(
                    f"DeepSpeedTransformerLayer: {name} is not there; leave it out, or use the model's own layer"
                )
        params = dict(self.named_parameters())
        x = hidden_states
        if self.config.fp16:
            x, params = x.half(), {k: v.half() for k, v in params.items()}
        out = bert_layer(params, x, attention_mask, self.config, training=self.training).to(hidden_states.dtype)
        return (out,) if self.config.return_tuple else out

    def extra_repr(self) -> str:
        return repr(self.config)


def from_hugging_face(layer: nn.Module | Mapping[str, Tensor], pre_layer_norm: bool = False) -> dict[str, Tensor]:
    """The parameters of a `DeepSpeedTransformerLayer` from those of a Hugging Face layer, or from its state dict."""
    state: Mapping[str, Any] = layer.state_dict() if isinstance(layer, nn.Module) else layer
    norms = _HF_PRE if pre_layer_norm else _HF_POST
    names = {**_HF, **{f"{k}{s}": (f"{v}.{w}",) for k, v in norms.items() for s, w in (("w", "weight"), ("b", "bias"))}}
    missing = [n for parts in names.values() for n in parts if n not in state]
    if missing:
        raise ValueError(
            f"from_hugging_face: no {missing[0]!r} in the layer ({len(missing)} missing); {tree.suggest(missing[0], state)}; pre_layer_norm={pre_layer_norm} reads a {'RobertaPreLayerNormLayer' if pre_layer_norm else 'BertLayer'}"
        )
    return {k: torch.cat([state[n].detach() for n in parts]) for k, parts in names.items()}


def _shapes(c: DeepSpeedTransformerConfig) -> dict[str, tuple[int, ...]]:
    h, i = c.hidden_size, c.intermediate_size
    return {"attn_qkvw": (3 * h, h), "attn_qkvb": (3 * h,), "attn_ow": (h, h), "attn_ob": (h,), "attn_nw": (h,), "attn_nb": (h,),
            "inter_w": (i, h), "inter_b": (i,), "output_w": (h, i), "output_b": (h,), "norm_w": (h,), "norm_b": (h,)}  # fmt: skip


def _device(local_rank: int) -> torch.device | None:
    """Where the configuration wants parameters; None: where torch makes them (also under ``torch.device("meta")``)."""
    if local_rank < 0 or not torch.accelerator.is_available() or torch.get_default_device().type == "meta":
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else torch.device(accelerator.type, local_rank)
