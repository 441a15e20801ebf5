"""From plain dictionaries to sections: strict at every level, all problems at once."""

import inspect
from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed.fields import Key, default_of, keys_of
from fds.deepspeed.schema.methods import MUP, OPTIMIZERS, REQUIRED, SCHEDULERS, Params, named
from fds.deepspeed.schema.top import MISTAKEN, Top
from fds.tree import suggest


@attrs.define
class Reader:
    """What was found on the way: problems as (keys, text), values that ask for what fds does not have, old names, and the paths that were given."""

    problems: list[tuple[tuple[str, ...], str]] = attrs.field(factory=list)
    unsupported: list[tuple[str, str]] = attrs.field(factory=list)
    deprecated: list[str] = attrs.field(factory=list)
    given: set[str] = attrs.field(factory=set)

    def problem(self, text: str, *keys: str) -> None:
        """Note one; the keys come first in its line."""
        self.problems.append((keys, f"{', '.join(keys)}: {text}"))

    def values(self, cls: type[Any], raw: Any, path: str = "") -> dict[str, Any]:
        """The values of the keys of section `cls` that are given in `raw`."""
        if raw is None:
            return {}
        if not isinstance(raw, Mapping):
            self.problem(f"given {raw!r}, required a section {{ }}", path or "ds_config")
            return {}
        found: dict[str, Any] = {}
        keys = keys_of(cls)
        for name, (written, value) in self._names(keys, raw, path).items():  # pyright: ignore[reportUnknownArgumentType]
            where = _join(path, name)
            self.given.add(where)
            key = keys[name]
            if key.section is not None:
                found[name] = key.section(**self.values(key.section, value, where))
                continue
            assert key.kind is not None
            try:
                found[name] = key.kind.read(value)
            except (ValueError, TypeError, OverflowError) as error:
                detail = f" ({error})" if str(error).startswith("key ") else ""
                self.problem(f"given {short(value)}, allowed {key.kind.says}{detail}", _join(path, written))
        self._refused(cls, keys, found, path)
        return found

    def _names(self, keys: Mapping[str, Key], raw: Mapping[Any, Any], path: str) -> dict[str, tuple[str, Any]]:
        """What is given, by the key's own name, with the name that was written."""
        own = {alias: name for name, k in keys.items() for alias in (name, *k.aliases, *k.deprecated)}
        found: dict[str, tuple[str, Any]] = {}
        for written, value in raw.items():
            if not isinstance(written, str) or written not in own:
                self.problem(unknown(written, path, own), _join(path, str(written)))
                continue
            name = own[written]
            if name in found:
                self.problem("two names of one key; give one of them", _join(path, found[name][0]), _join(path, written))  # fmt: skip
            if written in keys[name].deprecated:
                self.deprecated.append(f"{_join(path, written)} is deprecated; its name is {name}")
            found[name] = written, value
        return found

    def _refused(self, cls: type[Any], keys: Mapping[str, Key], found: dict[str, Any], path: str) -> None:
        """Note the values that ask for what fds does not have, and take the defaults in their place. What is switched off asks for nothing."""
        if "enabled" in keys and not found.get("enabled", default_of(cls, "enabled")):
            return
        for name, key in keys.items():
            if key.status == "no" and name in found and key.asks(found[name]):
                self.unsupported.append((_join(path, name), f"{short(found[name])} has no effect in fds: {key.text}"))
                found[name] = default_of(cls, name)

    def method(self, section: str, type: str | None, params: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """The canonical name of an optimizer or a schedule, and its parameters, checked."""
        table = OPTIMIZERS if section == "optimizer" else SCHEDULERS
        if type is None:
            if params:
                self.problem(f"given without {section}.type", f"{section}.params")
            return None, {}
        name = named(type, table)
        if name is None:
            self._no_method(section, type, table)
            return type, dict(params)
        return name, self._params(f"{section}.params", name, table[name], params)

    def _no_method(self, section: str, type: str, table: Mapping[str, Params]) -> None:
        import torch

        module: Any = torch.optim if section == "optimizer" else torch.optim.lr_scheduler
        where = f"{section}.type"
        if section == "optimizer" and type.lower() in [n.lower() for n in MUP]:
            self.problem(
                f"{type!r} is not there (a rate for each width): give initialize an optimizer of your own", where
            )
        elif inspect.isclass(getattr(module, type, None)):
            if section == "optimizer":
                self.problem(f"{type!r} is torch's and not one of fds's: give initialize an instance of it, or one of {', '.join(table)}", where)  # fmt: skip
        else:
            self.problem(f"{type!r} is unknown; {suggest(type, table)}", where)

    def _params(self, path: str, method: str, table: Params, params: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in params.items():
            where = _join(path, str(name))
            self.given.add(where)
            if name not in table:
                hint = MISTAKEN.get(where)
                self.problem(hint or f"{method} has no such parameter; {suggest(str(name), table)}", where)
                continue
            try:
                found[name] = table[name][1].read(value)
            except (ValueError, TypeError, OverflowError):
                self.problem(f"given {short(value)}, allowed {table[name][1].says}", where)
        for name in REQUIRED.get(method, ()):
            if name not in params:
                self.problem(f"{method} needs it, and it is not given", _join(path, name))
        return found


def unknown(name: Any, path: str, names: Mapping[str, str]) -> str:
    """What to say of a key that a section does not have: what it was taken for, the nearest one here, or the section that has it."""
    if not isinstance(name, str):
        return f"a key has to be a string, not {type(name).__name__}"
    if hint := MISTAKEN.get(_join(path, name)):
        return hint
    words = suggest(name, names)
    if not words.startswith("did you mean"):
        elsewhere = [p for p in _paths() if p.rsplit(".", 1)[-1] == name]
        words = f"did you mean {elsewhere[0]!r}?" if elsewhere else words
    return f"unknown key; {words}"


def _paths() -> list[str]:
    """Every path of a configuration."""

    def below(cls: type[Any], path: str) -> list[str]:
        found: list[str] = []
        for name, key in keys_of(cls).items():
            where = _join(path, name)
            found += [where, *(below(key.section, where) if key.section is not None else [])]
        return found

    return below(Top, "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def short(value: Any) -> str:
    """A value in an error, not longer than a line."""
    words = repr(value)
    return words if len(words) <= 80 else words[:77] + "..."
