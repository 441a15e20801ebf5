"""`DeepSpeedConfig`: a ds_config as DeepSpeed's users write it, read strictly."""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed import batch, checks, sources
from fds.deepspeed.auto import Facts, Resolved, resolve
from fds.deepspeed.errors import DeepSpeedConfigError, UnsupportedKeyWarning
from fds.deepspeed.fields import default_of, keys_of
from fds.deepspeed.reading import Reader, short
from fds.deepspeed.schema.top import Top
from fds.tree import suggest


@attrs.frozen(kw_only=True, init=False, repr=False)
class DeepSpeedConfig(Top):
    """A configuration with DeepSpeed's names, defaults and aliases. Attributes are its keys: ``config.zero_optimization.stage``.

    Strict at every level. An unknown key is an error with its path and the nearest known one; so is a value of another type, a key or an alias
    that is given twice, and keys that contradict each other. A key that has no effect in fds is an error that says what to do instead, unless
    it has the value that asks for nothing. All that is wrong comes in one error.

    After reading, the batch triangle is closed: `train_batch_size`, `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` are whole
    numbers, and so is `data_parallel_size`.

    Args:
        config: a dictionary; the path of a JSON or HJSON file (str or Path); or JSON in base64.
        mpu: an object with ``get_data_parallel_world_size()``; what it says is the number of data-parallel ranks.
        mesh_device: a mesh of torch with a dimension "data_parallel"; the same.
        world_size: ranks of the job. Default: those of the running process group, else 1.
        on_unsupported: "error", or "warn" for a key that has no effect in fds: `UnsupportedKeyWarning`, and the key's default in its place.
        auto: answers for keys that are "auto", by path: ``{"optimizer.params.lr": 5e-5}``.
        model: a module or a configuration of transformers; "auto" of sizes and dtypes comes from it.

    Raises `DeepSpeedConfigError` (a `ValueError`), which names the keys, in its message and as `keys`; and nothing else.

    >>> config = DeepSpeedConfig({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, world_size=2)
    >>> config.gradient_accumulation_steps, config.zero_optimization.stage, config.gradient_clipping
    (4, 0, 1.0)
    >>> DeepSpeedConfig({"train_batch_size": 32, "grandient_clipping": 0.5})
    Traceback (most recent call last):
    fds.deepspeed.errors.DeepSpeedConfigError: ds_config: grandient_clipping: unknown key; did you mean 'gradient_clipping'?
    """

    world_size: int = 1  # ranks of the job
    given: frozenset[str] = attrs.field(
        default=frozenset(), eq=False
    )  # the paths that were written down, sections and keys
    resolved: tuple[Resolved, ...] = attrs.field(
        default=(), eq=False
    )  # what "auto" and the batch triangle became, and why
    unsupported: tuple[str, ...] = attrs.field(
        default=(), eq=False
    )  # keys that have no effect, under on_unsupported="warn"
    source: Mapping[str, Any] = attrs.field(factory=dict, eq=False)  # as it was given

    def __init__(
        self,
        config: Any,
        mpu: Any = None,
        mesh_device: Any = None,
        *,
        world_size: int | None = None,
        on_unsupported: str = "error",
        auto: Mapping[str, Any] | None = None,
        model: Any = None,
    ) -> None:
        if on_unsupported not in ("error", "warn"):
            raise ValueError(f"on_unsupported={on_unsupported!r}; {suggest(str(on_unsupported), ['error', 'warn'])}")
        source = sources.read(config)
        world, data = _ranks(world_size, mpu, mesh_device)
        values = _read(source, world, data, on_unsupported, auto, model)
        self.__attrs_init__(**values, world_size=world, source=source)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        world_size: int | None = 1,
        on_unsupported: str = "error",
        auto: Mapping[str, Any] | None = None,
        model: Any = None,
    ) -> "DeepSpeedConfig":
        """The configuration for so many ranks, whatever process group runs; see the class."""
        return cls(source, world_size=world_size, on_unsupported=on_unsupported, auto=auto, model=model)

    def to_dict(self) -> dict[str, Any]:
        """The keys that were given or differ from their default, resolved; `DeepSpeedConfig` reads it again to an equal configuration."""
        return _given(self, Top, "", self.given)

    def __str__(self) -> str:
        """What differs from the defaults or was given, as JSON, and behind it what was resolved."""
        lines = [json.dumps(self.to_dict(), indent=2, default=str)]
        lines += [f"# {r}" for r in self.resolved] + [f"# no effect: {u}" for u in self.unsupported]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"DeepSpeedConfig({self.to_dict()!r}, world_size={self.world_size})"


def _read(source: Mapping[str, Any], world: int, ranks: int | None, on_unsupported: str, auto: Mapping[str, Any] | None, model: Any) -> dict[str, Any]:  # fmt: skip
    """The fields of a configuration, or the error with all that is wrong."""
    plain = _renamed_stage(source)
    config, found, left = resolve(plain, auto, Facts() if model is None else Facts.of(model))
    reader = Reader()
    for key, text in left:
        reader.problem(text, key)
    values = reader.values(Top, config)
    for name in ("optimizer", "scheduler"):
        if (part := values.get(name)) is not None:
            type, params = reader.method(name, part.type, part.params)
            values[name] = attrs.evolve(part, type=type, params=params)
    _offload_of_old(values, reader)
    data = _data_ranks(values, world, ranks)
    closed = _closed(values, world, data, reader, config)
    if not reader.problems:
        top = Top(**values)
        for keys, text in checks.every(top, world, data):
            reader.problem(text, *keys)
    refused = [f"{k}: {text}" for k, text in reader.unsupported]
    if reader.problems or (refused and on_unsupported == "error"):
        raise _error(reader, on_unsupported)
    for text in refused:
        warnings.warn(f"ds_config: {text}", UnsupportedKeyWarning, stacklevel=5)
    for text in reader.deprecated:
        warnings.warn(f"ds_config: {text}", DeprecationWarning, stacklevel=5)
    words = values.get("vocabulary_size")
    if words and words % 8:
        warnings.warn(f"ds_config: vocabulary_size: {words} is no multiple of 8: matrix units may not be used for it", stacklevel=5)  # fmt: skip
    return {**values, "resolved": (*found, *closed), "given": frozenset(reader.given), "unsupported": tuple(refused)}


def _error(reader: Reader, on_unsupported: str) -> DeepSpeedConfigError:
    lines = [text for _, text in reader.problems]
    keys = [k for names, _ in reader.problems for k in names]
    if on_unsupported == "error":
        lines += [f"{k}: {text}" for k, text in reader.unsupported]
        keys += [k for k, _ in reader.unsupported]
        if reader.unsupported:
            lines.append('(on_unsupported="warn" goes on without what has no effect)')
    text = lines[0] if len(lines) == 1 else "\n  ".join(["", *lines])
    return DeepSpeedConfigError(f"ds_config: {text}", list(dict.fromkeys(keys)))


def _renamed_stage(source: Mapping[str, Any]) -> dict[str, Any]:
    """The oldest form, ``"zero_optimization": true``, as a section."""
    old = source.get("zero_optimization")
    return {**source, "zero_optimization": {"stage": int(old)}} if isinstance(old, bool) else dict(source)


def _offload_of_old(values: dict[str, Any], reader: Reader) -> None:
    """cpu_offload and cpu_offload_param as the sections that came after them."""
    zero = values.get("zero_optimization")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        asked = getattr(zero, old, None)
        if asked is None:
            continue
        reader.deprecated.append(f'zero_optimization.{old} is deprecated; write "{new}": {{"device": "cpu"}}')
        if f"zero_optimization.{new}" in reader.given:
            reader.problem("an old and a new way to say the same; give the new one", f"zero_optimization.{old}", f"zero_optimization.{new}")  # fmt: skip
        elif asked:
            section = attrs.evolve(getattr(zero, new), device="cpu")
            zero = values["zero_optimization"] = attrs.evolve(zero, **{new: section, old: None})


def _data_ranks(values: Mapping[str, Any], world: int, known: int | None) -> int:
    """Ranks with rows of their own: those that `mpu` or a mesh knows, else all of them by groups of tensor parallelism."""
    return max(world // _tensor(values), 1) if known is None else known


def _tensor(values: Mapping[str, Any]) -> int:
    section = values.get("tensor_parallel")
    return 1 if section is None else max(section.autotp_size, 1)


def _closed(values: dict[str, Any], world: int, data: int, reader: Reader, config: Mapping[str, Any]) -> list[Resolved]:
    """Close the batch triangle in `values`; what was found for it."""
    if any(k in config and k not in values for k in batch.KEYS):  # has its problem already
        return []
    given = [values.get(k) for k in batch.KEYS]
    try:
        triangle = batch.closed(*given, ranks=data)
    except DeepSpeedConfigError as error:
        reader.problems.append((error.keys, str(error)))
        return []
    values |= dict(zip(batch.KEYS, triangle, strict=True))
    why = f"rows of a step = rows of a microbatch x microbatches x {data} data-parallel rank{'s' * (data > 1)}"
    new = [Resolved(k, v, why) for k, v, old in zip(batch.KEYS, triangle, given, strict=True) if old is None]
    if values.get("data_parallel_size") is None:
        tp = _tensor(values)
        values["data_parallel_size"] = data
        groups = f" in groups of {tp}" if tp > 1 else ""
        new.append(Resolved("data_parallel_size", data, f"{world} rank{'s' * (world > 1)}{groups}"))
    return new


def _ranks(world: int | None, mpu: Any, mesh: Any) -> tuple[int, int | None]:
    """Ranks of the job, and data-parallel ones as far as `mpu` or a mesh knows."""
    import torch.distributed as dist

    if world is None:
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if type(world) is not int or world < 1:
        raise DeepSpeedConfigError(f"ds_config: world_size={short(world)}, required a whole number >= 1", ["world_size"])  # fmt: skip
    if mpu is not None:
        if not hasattr(mpu, "get_data_parallel_world_size"):
            raise DeepSpeedConfigError(f"ds_config: mpu {type(mpu).__name__} has no get_data_parallel_world_size()", ["mpu"])  # fmt: skip
        return world, int(mpu.get_data_parallel_world_size())
    if mesh is not None:
        names = tuple(getattr(mesh, "mesh_dim_names", None) or ())
        if "data_parallel" not in names:
            raise DeepSpeedConfigError(f"ds_config: mesh_device has dimensions {names}, required one named 'data_parallel'", ["mesh_device"])  # fmt: skip
        return world, int(mesh.size(names.index("data_parallel")))
    return world, None


def _given(record: Any, cls: type[Any], path: str, given: frozenset[str]) -> dict[str, Any]:
    """The keys that were given or are not the default."""
    found: dict[str, Any] = {}
    for name, key in keys_of(cls).items():
        value, where = getattr(record, name), f"{path}.{name}" if path else name
        if key.section is not None:
            part = _given(value, key.section, where, given)
            if part or where in given:
                found[name] = part
        elif where in given or value != default_of(cls, name):
            found[name] = value
    return found
