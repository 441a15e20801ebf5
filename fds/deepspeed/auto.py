"""What "auto" stands for: a pass over the configuration before anything is checked, which says what each became, and why.

In DeepSpeed the one that calls it (transformers, accelerate) has to fill these in; what is left is dropped in some sections and breaks in others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fds.deepspeed.batch import KEYS
from fds.deepspeed.fields import default_of, keys_of
from fds.deepspeed.schema.methods import OPTIMIZERS, SCHEDULERS, named
from fds.deepspeed.schema.top import Top

# What only the caller knows, though DeepSpeed's constructors have a default: a wrong guess changes the training, and nobody would see it.
_CALLERS = ("lr", "muon_lr", "adam_lr", "total_num_steps", "warmup_num_steps", "cycle_min_lr", "cycle_max_lr")


class Resolved(NamedTuple):
    """A value that was not written down: the key, what it became, and why."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.why}"


class Facts(NamedTuple):
    """What is known of the model: the width of its hidden states, and the dtype of its parameters; None: not known."""

    hidden_size: int | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, model: Any) -> "Facts":
        """Of a module, or of a configuration of transformers (several widths: the largest).

        >>> import torch
        >>> Facts.of(torch.nn.Linear(2, 2))
        Facts(hidden_size=None, dtype='float32')
        """
        config = getattr(model, "config", model)
        text = getattr(config, "text_config", None) or config
        sizes = getattr(text, "hidden_sizes", None) or [getattr(text, "hidden_size", None)]
        whole = [n for n in sizes if isinstance(n, int)]
        parameters = getattr(model, "parameters", None)
        leaf = next((p for p in parameters() if p.is_floating_point()), None) if callable(parameters) else None  # pyright: ignore[reportUnknownVariableType, reportGeneralTypeIssues, reportUnknownMemberType]
        dtype = getattr(text, "dtype", None) if leaf is None else leaf.dtype  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return cls(max(whole, default=None), None if dtype is None else str(dtype).removeprefix("torch."))  # pyright: ignore[reportUnknownArgumentType]


class Resolution(NamedTuple):
    """A configuration without "auto"; what was resolved; and the keys for which nothing was found, with what to do."""

    config: dict[str, Any]
    resolved: tuple[Resolved, ...]
    left: tuple[tuple[str, str], ...]


def resolve(config: Mapping[str, Any], answers: Mapping[str, Any] | None = None, facts: Facts = Facts()) -> Resolution:  # noqa: B008
    """Replace every "auto": by the caller's answer for the key, by what the model or other keys say, or by DeepSpeed's default.

    Args:
        answers: values by path, ``{"optimizer.params.lr": 5e-5}``. Only keys that are "auto" are looked up.
        facts: of the model.

    "auto" in the batch triangle is taken out here, and the triangle gives the number.

    >>> resolve({"gradient_clipping": "auto"}).resolved
    (Resolved(key='gradient_clipping', value=1.0, why="DeepSpeed's default"),)
    """
    walk = _Walk(config, answers or {}, facts)
    out = walk.section(Top, config, "")
    unused = [k for k in walk.answers if k not in walk.asked]
    left = [*walk.left, *((k, 'answered in auto=, and it is not "auto" in the configuration') for k in unused)]
    return Resolution(out, tuple(walk.found), tuple(left))


class _Walk:
    def __init__(self, config: Mapping[str, Any], answers: Mapping[str, Any], facts: Facts) -> None:
        self.config, self.answers, self.facts = config, answers, facts
        self.asked: set[str] = set()
        self.found: list[Resolved] = []
        self.left: list[tuple[str, str]] = []

    def section(self, cls: type[Any], raw: Mapping[str, Any], path: str) -> dict[str, Any]:
        keys = {alias: (name, k) for name, k in keys_of(cls).items() for alias in (name, *k.aliases, *k.deprecated)}
        out: dict[str, Any] = {}
        for written, value in raw.items():
            name, key = keys.get(written, (written, None))
            where = f"{path}.{name}" if path else name
            if key is not None and key.section is not None and isinstance(value, Mapping):
                out[written] = self.section(key.section, value, where)  # pyright: ignore[reportUnknownArgumentType]
            elif where in ("optimizer.params", "scheduler.params") and isinstance(value, Mapping):
                out[written] = self.params(value, where.split(".")[0], raw.get("type"))  # pyright: ignore[reportUnknownArgumentType]
            elif value == "auto" and key is not None and key.auto != "value":
                self.put(out, written, where, lambda c=cls, n=name, k=key: _default(c, n, k.auto))
            else:
                out[written] = value
        return out

    def params(self, raw: Mapping[str, Any], section: str, type: Any) -> dict[str, Any]:
        table = OPTIMIZERS if section == "optimizer" else SCHEDULERS
        method = named(type, table) if isinstance(type, str) else None
        known = table.get(method, {}) if method else {}
        out: dict[str, Any] = {}
        for name, value in raw.items():
            default = known[name][0] if name in known and name not in _CALLERS else None
            if value == "auto" and (name in known or not method):
                self.put(out, name, f"{section}.params.{name}", lambda d=default: None if d is None else (d, f"{method}'s default"))  # fmt: skip
            else:
                out[name] = value
        return out

    def put(self, out: dict[str, Any], written: str, where: str, default: Callable[[], tuple[Any, str] | None]) -> None:
        self.asked.add(where)
        if where in self.answers:
            out[written] = self.answers[where]
            self.found.append(Resolved(where, self.answers[where], "answered in auto="))
        elif where in KEYS:
            return  # the triangle gives it
        elif (got := self.rule(where) or default()) is not None:
            out[written] = got[0]
            self.found.append(Resolved(where, *got))
        else:
            self.left.append((where, f'"auto", and nothing here can say what it is; give the value, or load(..., auto={{"{where}": ...}})'))  # fmt: skip

    def rule(self, where: str) -> tuple[Any, str] | None:
        """What the model or another key says; None: nothing."""
        n, dtype = self.facts.hidden_size, self.facts.dtype
        sizes: dict[str, Callable[[int], int]] = {
            "zero_optimization.reduce_bucket_size": lambda n: n * n,
            "zero_optimization.stage3_prefetch_bucket_size": lambda n: int(0.9 * n * n),
            "zero_optimization.stage3_param_persistence_threshold": lambda n: 10 * n,
        }
        if where in sizes and n is not None:
            return sizes[where](n), f"of the model's hidden size {n}, as transformers does"
        if where in ("bf16.enabled", "fp16.enabled") and dtype is not None:
            mine = {"bf16.enabled": "bfloat16", "fp16.enabled": "float16"}[where]
            return dtype == mine, f"the model's parameters are {dtype}"
        if where == "scheduler.params.warmup_max_lr":
            params = _part(_part(self.config, "optimizer"), "params")
            rate = self.answers.get("optimizer.params.lr", params.get("lr"))
            return None if rate in (None, "auto") else (rate, "the optimizer's lr")
        return None


def _part(x: Any, name: str) -> Mapping[str, Any]:
    found = x.get(name) if isinstance(x, Mapping) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return found if isinstance(found, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]


def _default(cls: type[Any], name: str, auto: str) -> tuple[Any, str] | None:
    return None if auto == "given" else (default_of(cls, name), "DeepSpeed's default")
