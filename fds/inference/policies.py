"""Rules by which the operators of `fds.kernels` take the place of a model's own modules, family by family.

A rule is a pattern of module paths and an operator: ``at("*norm", use("rms_norm"))``. It is applied where the operator gives the module's values on random
numbers, which `use` looks at, and nowhere else. What it did is in the program's history, as of any transformation; dropping the rules drops
those transformations.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import attrs

from fds import tree
from fds.program import Program
from fds.transform import at, chain

INFERENCE_GENERIC_MODE, INFERENCE_SPECIALIZED_MODE = "generic", "specialized"
MODES = (INFERENCE_GENERIC_MODE, INFERENCE_SPECIALIZED_MODE)


@attrs.frozen
class Rule:
    """Modules whose path matches `pattern` are computed by `operator`."""

    pattern: str
    operator: str


@attrs.frozen
class Policy:
    """The rules of a family, by transformers' name of it (``config.model_type``). `decoder`: it generates text."""

    family: str
    rules: tuple[Rule, ...]
    decoder: bool = True


def _policy(families: str, *rules: str, decoder: bool = True) -> dict[str, Policy]:
    made = tuple(Rule(*r.split(" ")) for r in rules)
    return {f: Policy(f, made, decoder) for f in families.split()}


_NORM, _GATED = "*norm rms_norm", "*.mlp swiglu"
_POLICIES: dict[str, Policy] = {
    **_policy("llama qwen2 qwen3 mistral", _NORM, _GATED),
    **_policy("gemma2 gemma3_text", _NORM, "*.mlp geglu"),
    **_policy("phi3 mixtral qwen3_moe", _NORM),
    **_policy("gpt2 gptj gpt_neo", "*ln_[12f] layer_norm"),
    **_policy("gpt_neox opt", "*layer*norm layer_norm"),
    **_policy("bloom falcon", "*layernorm* layer_norm", "*ln_f layer_norm"),
    **_policy("bert roberta distilbert", "*[lL]ayer*[nN]orm layer_norm", decoder=False),
    **_policy(
        "clip clip_text_model clip_vision_model", "*layer_norm? layer_norm", "*layrnorm layer_norm", decoder=False
    ),
    **_policy("t5 mt5", "*layer_norm rms_norm"),
    **_policy("bart mbart pegasus marian", "*layer*norm* layer_norm"),
}


def policies() -> Mapping[str, Policy]:
    """The families that there are rules for.

    >>> [r.operator for r in policies()["llama"].rules]
    ['rms_norm', 'swiglu']
    """
    return dict(_POLICIES)


@attrs.frozen
class Found:
    """What a rule comes to in a program: the modules it is for, and those it is not for, with the reason."""

    rule: Rule
    replaced: tuple[str, ...]
    left: Mapping[str, str]


@attrs.frozen
class Report:
    """What rules come to in a program. Printed, a line for each rule."""

    family: str
    found: tuple[Found, ...]

    def __str__(self) -> str:
        if not self.found:
            return f"{self.family}: no rules; every module as it is"
        lines = [f"{self.family}:"]
        for f in self.found:
            lines.append(f"  {f.rule.pattern} by {f.rule.operator}: {len(f.replaced)} modules")
            lines += [f"    not {name}: {why}" for name, why in f.left.items()]
        return "\n".join(lines)


def family_of(program: Program) -> str:
    """transformers' name of the model's family; the class's where it has none."""
    core: Any = program.origin.core
    config = getattr(core, "config", None)
    return getattr(config, "model_type", "") or type(getattr(core, "module", core)).__name__


def report(program: Program) -> Report:
    """What the rules of the model's family match in it, what they do not, and why."""
    from fds.kernels.inject import fits  # imports Triton, which takes a while

    core: Any = program.origin.core
    policy = _POLICIES.get(family_of(program))
    names = [name for name, _ in core.module.named_modules() if name]
    found: list[Found] = []
    for rule in policy.rules if policy else ():
        replaced: list[str] = []
        left: dict[str, str] = {}
        for name in (n for n in names if fnmatchcase(n, rule.pattern)):
            why = fits(rule.operator, core, name)
            replaced += [] if why else [name]
            left |= {name: why} if why else {}
        found.append(Found(rule, tuple(replaced), left))
    return Report(family_of(program), tuple(found))


def replace_transformer_layer(program: Program, mode: str = INFERENCE_SPECIALIZED_MODE) -> Program:
    """The program with the rules of its family applied; in "generic" mode the program as it is, for any model.

    Raises `ValueError` for another mode, and in "specialized" mode for a family without rules and for one of which nothing matches.
    """
    if mode not in MODES:
        raise ValueError(f"inference mode {mode!r} is unknown; {tree.suggest(str(mode), MODES)}")
    if mode == INFERENCE_GENERIC_MODE:
        return program
    from fds.kernels.inject import use  # imports Triton, which takes a while

    found = report(program)
    if not found.found:
        raise ValueError(
            f"inference mode 'specialized': no rules for {found.family!r}; {tree.suggest(found.family, _POLICIES)}, or mode='generic'"
        )
    chosen = [at(name, use(f.rule.operator)) for f in found.found for name in f.replaced]
    if not chosen:
        raise ValueError(
            f"inference mode 'specialized': nothing to replace; mode='generic' leaves modules as they are\n{found}"
        )
    return chain(*chosen)(program)


def revert_transformer_layer(program: Program) -> Program:
    """The program without the operators that took modules' places: by rules, and by `use`."""
    kept = [t for t in program.history if not _uses(t)]
    return chain(*kept)(program.origin)


def _uses(t: Any) -> bool:
    inner = dict(t.options).get("transform", t)
    return getattr(inner, "name", "") == "use"
