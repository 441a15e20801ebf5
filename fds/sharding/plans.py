"""Plans of tensor parallelism: which layer is split how. From transformers' own plans, from rules over names and shapes, or by pattern."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import attrs
from torch import nn

from fds import tree
from fds._torch import named_modules, registries

STYLES = {
    "column": "weight split by output features; input whole, output split",
    "column_gather": "as column, the output joined",
    "row": "weight split by input features; input split, outputs summed",
    "row_split": "as row, of a whole input",
    "packed_column": "two weights one after the other (gate and up), each split by output features",
    "fused_qkv": "query, key and value weights one after the other, each split by heads",
    "interleaved_qkv": "query, key and value weights head by head, split by heads",
    "heads": "a table with one column per head, split by heads",
    "embedding": "a table split by words",
    "embedding_column": "a table split by features, the output joined",
    "experts": "a module of experts, whose own parameters are split; outputs summed",
    "partial": "whole, but works on what is split (a norm of each head); gradients are summed",
    "replicate": "whole",
}

_TRANSFORMERS = {
    "colwise": "column",
    "colwise_rep": "column_gather",
    "colwise_gather_output": "column_gather",
    "rowwise": "row",
    "rowwise_rep": "row_split",
    "rowwise_split_input": "row_split",
    "packed_colwise": "packed_column",
    "embedding_rowwise": "embedding",
    "vocab_parallel_rowwise": "embedding",
    "embedding_colwise": "embedding_column",
    "replicated_with_grad_allreduce": "partial",
    "sequence_parallel": "replicate",  # a norm; tensor_parallel(sequence=True) is what splits activations
    "moe_tp_experts": "experts",
    "replicate": "replicate",
}

# By the end of a module's path, the longer first: GPT-2, GPT-NeoX, GPT-J, OPT, BLOOM, Falcon, BERT, DistilBERT, T5, and those named like Llama.
_RULES = {
    "query_key_value": "interleaved_qkv",
    "c_attn": "fused_qkv",
    "relative_attention_bias": "heads",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin"), "column"),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "fc_in", "c_fc", "lin1", "wi", "wi_0", "wi_1", "dense_h_to_4h", "intermediate.dense"), "column"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "o", "attention.dense", "self_attention.dense", "attention.output.dense"), "row"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "c_proj", "lin2", "wo", "dense_4h_to_h", "output.dense"), "row"),
}  # fmt: skip


@attrs.frozen
class Plan:
    """The style of every split layer (or parameter) of a module, by path; print it to review it."""

    styles: Mapping[str, str]
    source: str  # where it came from

    def __str__(self) -> str:
        numbered: dict[tuple[str, str], int] = {}
        for path, style in self.styles.items():
            key = re.sub(r"\.\d+(?=\.|$)", ".*", path), style
            numbered[key] = numbered.get(key, 0) + 1
        width = max((len(path) for path, _ in numbered), default=0)
        lines = [f"  {path:{width}}  {style:15}  x {count}" for (path, style), count in numbered.items()]
        return "\n".join([f"tensor parallel plan ({self.source})", *lines])


def plan_of(module: nn.Module, plan: Mapping[str, str] | None = None) -> Plan:
    """The plan for `module`: `plan` by pattern, else the model's own (transformers' ``_tp_plan``), else by rules over names.

    Raises:
        ValueError: a style that is unknown; a pattern that matches nothing; a model for which there is neither plan nor rule.

    >>> import transformers
    >>> config = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    >>> print(plan_of(transformers.GPT2LMHeadModel(config)))
    tensor parallel plan (by the names of the layers)
      transformer.wte              embedding        x 1
      transformer.h.*.attn.c_attn  fused_qkv        x 2
      transformer.h.*.attn.c_proj  row              x 2
      transformer.h.*.mlp.c_fc     column           x 2
      transformer.h.*.mlp.c_proj   row              x 2
      lm_head                      column_gather    x 1
    """
    names = _names(module)
    own: Mapping[str, str] | None = getattr(module, "_tp_plan", None)
    if plan is not None:
        found, source = _by_pattern(plan, names), "given"
    elif own:
        found, source = _of_transformers(own, names, type(module).__name__), "the model's own"
    else:
        found, source = _by_rule(module), "by the names of the layers"
    if not found and plan is not None:
        raise ValueError("tensor_parallel(plan=...): the plan names no layer; leave it out for the model's own, or one by the names of its layers")  # fmt: skip
    if not found:
        raise ValueError(
            f"tensor_parallel: {type(module).__name__} has no plan of its own, and none of its layers has a name that the rules know; give one, as plan={{'*.up_proj': 'column', '*.down_proj': 'row'}}; styles: {', '.join(STYLES)}"
        )
    if plan is None:
        found = {**_ends(module), **found}
    return Plan({n: found[n] for n in names if n in found}, source)


def _names(module: nn.Module) -> list[str]:
    """The paths of modules and of parameters."""
    own: dict[str, None] = {}
    for path, m in named_modules(module):
        own.setdefault(path)
        for key in registries(m)[0]:
            own.setdefault(f"{path}.{key}".lstrip("."))
    return [n for n in own if n]


def _by_pattern(plan: Mapping[str, str], names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(
                f"tensor_parallel: style {style!r} of {pattern!r} is unknown; {tree.suggest(style, STYLES)}"
            )
        chosen = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
        if not chosen:
            tree.select(names, pattern, what="tensor_parallel(plan=...)")  # an error, with the nearest names
            raise ValueError(
                f"tensor_parallel(plan=...): pattern {pattern!r} names no module or parameter; it has to match a whole path"
            )
        found |= dict.fromkeys(chosen, style)
    return found


def _of_transformers(plan: Mapping[str, str], names: list[str], model: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in _TRANSFORMERS:
            raise ValueError(
                f"tensor_parallel: style {style!r} of {pattern!r} in the plan of {model} is not supported; supported: {', '.join(_TRANSFORMERS)}; give a plan of your own, as plan={{'*.q_proj': 'column', ...}}"
            )
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        found |= {n: _TRANSFORMERS[style] for n in names if expression.fullmatch(n)}
    return found


def _by_rule(module: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, m in named_modules(module):
        weight = registries(m)[0].get("weight")
        if weight is None or weight.dim() != 2 or not re.search(r"\.\d+\.", path):  # layers of numbered blocks
            continue
        ends = [end for end in _RULES if path.endswith("." + end)]
        style = _RULES[max(ends, key=len)] if ends else ""
        if style and (style == "heads") == isinstance(m, nn.Embedding):
            found[path] = style
    return found


def _ends(module: Any) -> dict[str, str]:
    """Input embeddings and output layer, where the model names them."""
    found: dict[str, str] = {}
    for ask, kind, style in (
        ("get_input_embeddings", nn.Embedding, "embedding"),
        ("get_output_embeddings", nn.Linear, "column_gather"),
    ):
        layer = getattr(module, ask, lambda: None)()
        if not isinstance(layer, kind):
            continue
        weight = registries(layer)[0]["weight"]
        found |= {
            n: style
            for n, m in named_modules(module)
            if isinstance(m, kind) and registries(m)[0].get("weight") is weight
        }
    return found
