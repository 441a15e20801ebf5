"""`Engine.generate`: text with the weights of the training state, by `inference.hybrid`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fds import tree
from fds.inference.hybrid import hybrid

if TYPE_CHECKING:
    from fds.deepspeed.engine import Engine

_OWN = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "pad_token_id", "stop_strings", "tokenizer", "n", "seed", "cache", "compile", "on_token", "details", "draft")  # fmt: skip
# What transformers' generate is often given, with the values that ask for nothing more than is done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"synced_gpus": (True, False, None), "use_cache": (True, None), "num_beams": (1, None), "min_length": (0, None), "bos_token_id": (), "return_dict_in_generate": (False, None)}  # fmt: skip


def generate(engine: "Engine", input_ids: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """See `Engine.generate`. `ValueError` for an option that is unknown, or that asks for what is not there (beams)."""
    given = _translated(engine, input_ids, options)
    if engine._hybrid is None:  # not configured: nothing is kept from call to call, and no length is too long
        engine._hybrid = hybrid(engine.program, max_out_tokens=2**31, release_inference_cache=True, pin_parameters=False)  # fmt: skip
    with torch.no_grad():
        return engine._hybrid.generate(engine.state.params, input_ids, attention_mask, **given)


def _translated(engine: "Engine", input_ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Transformers' names and defaults as fds's."""
    given = dict(options)
    for name, neutral in _NEUTRAL.items():
        if name in given and (not neutral or given[name] in neutral):
            given.pop(name)
    longest, sampled = given.pop("max_length", None), given.pop("do_sample", None)
    for name in given:
        if name not in _OWN:
            raise ValueError(f"generate: {name}={given[name]!r} is not there; {tree.suggest(name, [*_OWN, 'max_length', 'do_sample'])}")  # fmt: skip
    if longest is not None and "max_new_tokens" not in given:
        given["max_new_tokens"] = int(longest) - input_ids.shape[-1]
    if given.get("max_new_tokens") is None or given["max_new_tokens"] < 1:
        raise ValueError(f"generate: max_new_tokens={given.get('max_new_tokens')!r}, max_length={longest!r} of prompt and new ones: required at least one new token")  # fmt: skip
    if sampled is False:
        given["temperature"] = 0.0
    elif sampled and not given.get("temperature"):
        given["temperature"] = 1.0
    config: Any = getattr(engine.program.origin.core, "config", None)
    if "eos_token_id" not in given and getattr(config, "eos_token_id", None) is not None:
        given["eos_token_id"] = config.eos_token_id
    if sampled and "seed" not in given:
        given["seed"] = int(torch.randint(2**31, ()))  # transformers draws from torch's generator too
    return given
