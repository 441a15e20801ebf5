"""``python -m fds.deepspeed.explain ds_config.json --model NAME``: what a configuration means, before it runs.

The resolved configuration; the chain as runnable Python; memory on a rank and traffic of a step; and where defaults are not what they seem.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fds.deepspeed.account import abstract, drifts, memory, traffic
from fds.deepspeed.chain import recipe
from fds.deepspeed.config import DeepSpeedConfig
from fds.deepspeed.errors import DeepSpeedConfigError


def explain(config: DeepSpeedConfig, model: nn.Module) -> str:
    """The explanation of a configuration for a model, whose leaves may be on the meta device."""
    made, parts = recipe(config, model), [f"# Configuration, {config.world_size} rank{'s' * (config.world_size > 1)}\n{config}"]  # fmt: skip
    parts.append(f"# Chain\n{made.source()}".rstrip())
    if config.optimizer.type:
        step = abstract(config, model)
        parts += [_memory(config, step), _traffic(config, step)]
    else:
        parts.append(
            "# Memory and traffic\nof the optimizer that initialize is given; there is none in the configuration"
        )
    found = list(drifts(config))
    parts.append("# Not what it seems\n" + ("\n".join(f"* {d}" for d in found) or "nothing"))
    return "\n\n".join(parts) + "\n"


def _memory(config: DeepSpeedConfig, step: Any) -> str:
    m = memory(config, step)
    rows = [
        ("parameters", m.parameters, m.where_parameters),
        ("gradients", m.gradients, m.where_parameters),
        (f"optimizer state ({config.optimizer.type})", m.optimizer, m.where_optimizer),
        ("weights in use, at most", m.in_use, "device"),
    ]
    lines = [f"{name:34}{_mib(n):>14}  {where}" for name, n, where in rows]
    return "\n".join(["# Memory of a rank, without activations", *lines, f"{'on the device':34}{_mib(m.device):>14}"])


def _traffic(config: DeepSpeedConfig, step: Any) -> str:
    rows = [f"{m.operation:16}{m.axis:8}{_mib(m.nbytes):>14}{'' if m.exact else '  before it is quantised'}" for m in traffic(config, step)]  # fmt: skip
    return "\n".join(["# Traffic of a step: whole buffers, each rank", *(rows or ["none: one rank"])])


def _mib(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"


def model_of(name: str, dtype: str = "float32") -> nn.Module:
    """A model on the meta device: by its name at Hugging Face, or the path of its configuration or directory.

    `ValueError` if transformers does not know it.
    """
    import transformers

    path = Path(name)
    try:
        if path.suffix == ".json":
            read = json.loads(path.read_text())
            config = transformers.AutoConfig.for_model(**read)
        else:
            config = transformers.AutoConfig.from_pretrained(name)
        kind = transformers.AutoModelForCausalLM if type(config) in transformers.AutoModelForCausalLM._model_mapping else transformers.AutoModel  # fmt: skip
        with torch.device("meta"):
            return kind.from_config(config, dtype=getattr(torch, dtype))
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"--model {name}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 for a configuration or model that is none, which is said."""
    parser = argparse.ArgumentParser(prog="python -m fds.deepspeed.explain", description="What a ds_config means.")
    parser.add_argument("config", help="JSON, HJSON, or base64")
    parser.add_argument("--model", required=True, help="a name at Hugging Face, a directory, or a config.json")
    parser.add_argument("--world", type=int, default=1, help="ranks")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model's parameters")  # fmt: skip
    parser.add_argument("--auto", action="append", default=[], metavar="KEY=VALUE", help='answer for an "auto"; VALUE is JSON')  # fmt: skip
    parser.add_argument("--warn", action="store_true", help="go on with keys that have no effect in fds")
    given = parser.parse_args(arguments)
    try:
        model = model_of(given.model, given.dtype)
        mode = "warn" if given.warn else "error"
        config = DeepSpeedConfig(given.config, world_size=given.world, on_unsupported=mode, auto=_answers(given.auto), model=model)  # fmt: skip
        print(explain(config, model), end="")
    except ValueError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    return 0


def _answers(given: list[str]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        key, mark, value = text.partition("=")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise DeepSpeedConfigError(f"--auto {text}: required KEY=VALUE with JSON for VALUE", [key]) from error
        if not mark:
            raise DeepSpeedConfigError(f"--auto {text}: required KEY=VALUE", [key])
    return found


if __name__ == "__main__":
    sys.exit(main())
