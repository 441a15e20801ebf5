"""What a key of a ds_config is: the values it takes, its default, its other names, and what fds does with it.

A section is a frozen attrs class whose fields are made by `key` and `section`. From them come the reader, the nearest names in
errors, and the table in docs/deepspeed.md, so that none can differ from another.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

_KEY = "fds.deepspeed"


@attrs.frozen
class Kind:
    """Values that a key takes: `says` them in words, and `read` gives the value to keep, or raises `ValueError`."""

    says: str
    read: Callable[[Any], Any]


@attrs.frozen
class Key:
    """One key of a section.

    status: "yes" (fds does it), "design" (any legal value, and none changes what is computed: `text` says what fds does instead), or "no" (only
        values that ask for nothing; `text` says what to do instead).
    asks: whether a value asks for something; for "no".
    aliases: other names that mean the same; `deprecated` ones are reported.
    auto: "resolve" ("auto" stands for a value, which the pass finds), "value" ("auto" is a value of the key's own), or "given" (it stands for
        a value that only the caller has: no default would be right).
    """

    kind: Kind | None
    status: str
    text: str
    section: type[Any] | None = None
    asks: Callable[[Any], bool] = bool
    aliases: tuple[str, ...] = ()
    deprecated: tuple[str, ...] = ()
    auto: str = "resolve"


def key(
    default: Any,
    kind: Kind,
    status: str,
    text: str,
    *,
    neutral: Collection[Any] = (),
    aliases: tuple[str, ...] = (),
    deprecated: tuple[str, ...] = (),
    auto: str = "resolve",
) -> Any:
    """A field for a key with a value. `neutral`: values besides the default that ask for nothing."""
    nothing = [default, *neutral]
    made = Key(kind, status, text, None, lambda v: v not in nothing, aliases, deprecated, auto)
    options: dict[str, Any] = {"factory": default.copy} if isinstance(default, dict | list) else {"default": default}
    return attrs.field(metadata={_KEY: made}, **options)


def section(cls: type[Any], text: str = "", *, status: str = "yes", aliases: tuple[str, ...] = ()) -> Any:
    """A field for a section of its own."""
    return attrs.field(factory=cls, metadata={_KEY: Key(None, status, text, cls, aliases=aliases)})


def off(names: str, text: str, *, on: bool = False) -> Any:
    """A field for a whole section that fds does not have: null, or switched off, is all that it takes.

    `names`: its keys. `on`: whether DeepSpeed takes a section that does not say "enabled" as switched on.
    """
    known = names.split()

    def read(value: Any) -> Any:
        if value is None:
            return None
        given = as_mapping(value)
        for name in given:
            if name not in known:
                from fds.tree import suggest

                raise ValueError(f"key {name!r} is unknown; {suggest(str(name), known)}")
        return dict(given)

    def asks(value: Any) -> bool:
        if on or "enabled" not in known:
            return value is not None and (on or bool(value)) and value.get("enabled", True) is not False
        return bool(value) and value.get("enabled", False) is not False

    kind = Kind('a section with "enabled": false, or nothing' if "enabled" in known else "nothing", read)
    return attrs.field(default=None, metadata={_KEY: Key(kind, "no", text, asks=asks, auto="value")})


def keys_of(cls: type[Any]) -> dict[str, Key]:
    """The keys of a section by name, in order."""
    return {f.name: f.metadata[_KEY] for f in attrs.fields(cls) if _KEY in f.metadata}


def default_of(cls: type[Any], name: str) -> Any:
    """The value of a key that is not given; of a section, its record of defaults."""
    default = getattr(attrs.fields(cls), name).default
    return default.factory() if isinstance(default, attrs.Factory) else default  # pyright: ignore[reportArgumentType]


def as_mapping(value: Any) -> Mapping[str, Any]:
    """`value`, if it is a dictionary; else `ValueError`."""
    if not isinstance(value, Mapping):
        raise ValueError("required a section { }")
    return value  # pyright: ignore[reportUnknownVariableType]


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("not a truth value")
    return value


def _number(value: Any) -> float | int:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


BOOLEAN = Kind("true or false", _boolean)
TEXT = Kind("a string", _string)
MAPPING = Kind("a section { }", lambda v: dict(as_mapping(v)))
PATH = Kind("a path", lambda v: str(v) if hasattr(v, "__fspath__") else _string(v))


def _never(value: Any) -> None:
    if value != math.inf:
        raise ValueError("not infinity")


NEVER = Kind("infinity", _never)


def integer(low: int | None = None, of: int = 1) -> Kind:
    """Whole numbers, as 5 or 5e8, at least `low`, multiples of `of`.

    >>> integer(1).read(5e8)
    500000000
    """

    def read(value: Any) -> int:
        found = _number(value)
        if found != int(found) or (low is not None and found < low) or found % of:
            raise ValueError("not such a number")
        return int(found)

    says = "a whole number" + ("" if low is None else f" >= {low}")
    return Kind(says if of == 1 else f"{says}, a multiple of {of:,}", read)


def number(low: float | None = None, high: float | None = None, *, below: float | None = None, above: float | None = None) -> Kind:  # fmt: skip
    """Finite numbers: at least `low`, at most `high`, less than `below`, more than `above`.

    >>> number(0, below=1).says
    'a number >= 0 and < 1'
    """
    bounds = [(">=", low), (">", above), ("<=", high), ("<", below)]
    says = " and ".join(f"{op} {limit}" for op, limit in bounds if limit is not None)

    def read(value: Any) -> float | int:
        found = _number(value)
        wrong = (low is not None and found < low) or (high is not None and found > high)
        if wrong or (below is not None and found >= below) or (above is not None and found <= above):
            raise ValueError("out of range")
        return found

    return Kind("a number" + (f" {says}" if says else ""), read)


def one_of(*allowed: Any, any_case: bool = False) -> Kind:
    """One of some values; with `any_case`, however its letters are written.

    >>> one_of("WARN", "FAIL", any_case=True).read("Fail")
    'FAIL'
    """

    def read(value: Any) -> Any:
        for a in allowed:
            same = any_case and isinstance(value, str) and isinstance(a, str) and value.lower() == a.lower()
            if same or (type(value) is type(a) and value == a):
                return a
        raise ValueError("not one of them")

    words = [f'"{a}"' if isinstance(a, str) else str(a) for a in allowed]
    return Kind(words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1], read)


def maybe(kind: Kind) -> Kind:
    """A kind, or null.

    >>> maybe(BOOLEAN).says
    'true or false, or null'
    """
    return Kind(f"{kind.says}, or null", lambda v: None if v is None else kind.read(v))


def listing(kind: Kind, length: int | None = None) -> Kind:
    """A list of a kind; one of its values alone is not one.

    >>> listing(number(), 2).read([0.9, 0.999])
    [0.9, 0.999]
    """

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise ValueError("not a list")
        found = [kind.read(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        if length is not None and len(found) != length:
            raise ValueError("not of this length")
        return found

    return Kind(f"a list of {'' if length is None else f'{length} times '}{kind.says}", read)


def either(*kinds: Kind) -> Kind:
    """The first kind that takes a value."""

    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError:
                continue
        raise ValueError("none of them")

    return Kind(", or ".join(k.says for k in kinds), read)
