"""Configurations drawn at random and mutated: each builds, or is an error that names a key. None raises anything else."""

import json
import warnings
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fds.deepspeed import DeepSpeedConfig, DeepSpeedConfigError
from fds.deepspeed.account import abstract
from fds.deepspeed.fields import default_of, keys_of
from fds.deepspeed.schema.methods import OPTIMIZERS, SCHEDULERS
from fds.deepspeed.schema.top import MISTAKEN, Top

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 4096), st.sampled_from([5e8, 1e-4, 0.5, -1.0, float("nan"), float("inf"), 10**400, "auto", "cpu", "nvme", "bf16", "", "Adam", [], {}, [1], {"enabled": True}]),
    st.dictionaries(st.sampled_from(["enabled", "type", "params", "stage", "x"]), st.sampled_from([True, 1, "auto", None]), max_size=2),
)  # fmt: skip
BATCH = st.sampled_from([{"train_batch_size": 8}, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}])  # fmt: skip
LEGAL: dict[str, list[Any]] = {
    "stage": [0, 1, 2, 3], "device": ["none", "cpu", "nvme"], "nvme_path": [None, "/tmp/x"], "type": [*OPTIMIZERS, *SCHEDULERS], "dtype": ["bf16", "fp16"], "zero_hpz_partition_size": [1, 2],
    "communication_data_type": [None, "bf16"], "schedule_type": ["fixed_linear"],
}  # fmt: skip


@st.composite
def sections(draw: st.DrawFn, cls: type[Any], path: str = "") -> dict[str, Any]:
    """Some keys of a section, mostly with values that are legal by themselves."""
    keys = keys_of(cls)
    found: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(list(keys)), max_size=4, unique=True)):
        key = keys[name]
        written = draw(st.sampled_from([name, name, name, *key.aliases, *key.deprecated]))
        if path in ("optimizer", "scheduler"):
            continue
        if key.section is not None:
            found[written] = draw(methods(name) if name in ("optimizer", "scheduler") else sections(key.section, name))
        elif type(default := default_of(cls, name)) is bool:
            found[written] = draw(st.booleans())
        elif name in LEGAL:
            found[written] = draw(st.sampled_from(LEGAL[name]))
        else:
            found[written] = draw(st.sampled_from([default, default, "auto", 4, 2.0]))
    return found


def methods(name: str) -> st.SearchStrategy[dict[str, Any]]:
    table = OPTIMIZERS if name == "optimizer" else SCHEDULERS

    def params(type: str) -> st.SearchStrategy[dict[str, Any]]:
        known = table[type]
        values = st.dictionaries(st.sampled_from(list(known)), st.sampled_from(["auto", 1e-3, 10, [0.9, 0.99], True]), max_size=3)  # fmt: skip
        return values.map(lambda p: {"type": type, "params": {k: known[k][0] if isinstance(v, bool) else v for k, v in p.items()}})  # fmt: skip

    return st.sampled_from(list(table)).flatmap(params)


def places(config: Any) -> list[tuple[dict[Any, Any], Any]]:
    """Every key of nested dictionaries, with the one that has it."""
    found: list[tuple[dict[Any, Any], Any]] = []
    for k, v in config.items():
        found += [(config, k), *(places(v) if isinstance(v, dict) else [])]
    return found


@st.composite
def mutated(draw: st.DrawFn) -> dict[Any, Any]:
    config: dict[Any, Any] = {**draw(sections(Top)), **draw(BATCH)}
    for name in ("optimizer", "scheduler"):
        config |= {name: draw(methods(name))} if draw(st.booleans()) else {}
    config = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(0, 3))):
        at = places(config)
        if not at:
            break
        where, key = at[draw(st.integers(0, len(at) - 1))]
        match draw(st.sampled_from(["value", "name", "gone", "odd key", "mistaken"])):
            case "value":
                where[key] = deepcopy(draw(ODD))
            case "name":
                where[f"{str(key)[:-1]}"] = where.pop(key)
            case "gone":
                del where[key]
            case "odd key":
                where[draw(st.sampled_from([3, None, "", "auto", "a.b", ("x",)]))] = deepcopy(draw(ODD))
            case _:
                where[draw(st.sampled_from(sorted(MISTAKEN))).split(".")[-1]] = deepcopy(draw(ODD))
    return config


SEEN = {"built": 0, "refused": 0, "steps": 0}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def _step(config: DeepSpeedConfig) -> None:
    """The train step that it means, without values or ranks; what cannot be names a key here too. (Tensor parallelism wants a model that has a plan.)"""
    if config.optimizer.type and config.tensor_parallel.autotp_size < 2:
        try:
            abstract(config, Blocks())
        except DeepSpeedConfigError as error:
            assert error.keys and all(k in str(error) for k in error.keys), str(error)
        SEEN["steps"] += 1


@settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(config=mutated(), world=st.sampled_from([1, 2, 4]), mode=st.sampled_from(["error", "error", "warn"]))
def check(config: dict[Any, Any], world: int, mode: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = DeepSpeedConfig.load(config, world_size=world, on_unsupported=mode)
    except DeepSpeedConfigError as error:
        assert error.keys and all(k in str(error) for k in error.keys), str(error)
        SEEN["refused"] += 1
        return
    ranks = built.data_parallel_size
    assert built.train_batch_size == built.train_micro_batch_size_per_gpu * built.gradient_accumulation_steps * ranks
    _step(built)
    own = {k for k, key in keys_of(Top).items() if key.auto == "value"} | {"data_types"}  # "auto" is a value of theirs
    assert '"auto"' not in json.dumps({k: v for k, v in built.to_dict().items() if k not in own})
    assert DeepSpeedConfig.load(built.to_dict(), world_size=world) == built
    SEEN["built"] += 1


def test_each_builds_or_names_a_key() -> None:
    SEEN.update(dict.fromkeys(SEEN, 0))
    check()
    assert SEEN["built"] >= 75 and SEEN["refused"] >= 75 and SEEN["steps"] >= 20, (
        SEEN
    )  # else the draw says nothing about one of them
