"""Programs that build something, as values: what is printed is what is run, so that the two cannot differ.

An expression has a `source`, runnable Python, and a `value`; a `Recipe` is a list of named ones, in order.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

# What lines call by a short name.
_MODULES = {
    "aio": "fds.offload.aio",
    "batches": "fds.deepspeed.batches",
    "modules": "fds.deepspeed.modules",
    "optimizers": "fds.deepspeed.optimizers",
    "schedules": "fds.deepspeed.schedules",
}


@attrs.frozen
class Name:
    """An earlier line's value, or an item or attribute of it: ``Name("mesh", ("dp",))`` is ``mesh["dp"]``."""

    name: str
    items: tuple[str, ...] = ()
    attribute: str = ""

    def source(self) -> str:
        return self.name + "".join(f'["{i}"]' for i in self.items) + (f".{self.attribute}" if self.attribute else "")

    def value(self, names: Mapping[str, Any]) -> Any:
        found = names[self.name]
        for i in self.items:
            found = found[i]
        return getattr(found, self.attribute) if self.attribute else found


@attrs.frozen
class Call:
    """A call of a function or method: a dotted path into `fds`, into a module of `_MODULES`, or into an earlier line's value.

    >>> print(source(Call("fds.optim.sgd", 0.1, momentum=0.9)))
    fds.optim.sgd(0.1, momentum=0.9)
    """

    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __init__(self, function: str, *args: Any, **kwargs: Any) -> None:
        self.__attrs_init__(function, args, kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def source(self) -> str:
        given = [source(a) for a in self.args] + [f"{k}={source(v)}" for k, v in self.kwargs.items()]
        return f"{self.function}({', '.join(given)})"

    def value(self, names: Mapping[str, Any]) -> Any:
        args = [value(a, names) for a in self.args]
        return _resolved(self.function, names)(*args, **{k: value(v, names) for k, v in self.kwargs.items()})


@attrs.frozen
class Reference:
    """A function itself, by its dotted path."""

    path: str

    def source(self) -> str:
        return self.path

    def value(self, names: Mapping[str, Any]) -> Any:
        return _resolved(self.path, names)


def _resolved(path: str, names: Mapping[str, Any]) -> Any:
    first, *rest = path.split(".")
    found = names[first] if first in names else importlib.import_module(_MODULES.get(first, first))
    for part in rest:
        found = getattr(found, part)
    return found


def source(x: Any) -> str:
    """Python for a value of plain data and expressions."""
    if isinstance(x, Name | Call | Reference):
        return x.source()
    if isinstance(x, dict):
        return "{" + ", ".join(f"{source(k)}: {source(v)}" for k, v in x.items()) + "}"  # pyright: ignore[reportUnknownVariableType]
    if isinstance(x, list):
        return "[" + ", ".join(map(source, x)) + "]"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(x, tuple):
        return "(" + ", ".join(map(source, x)) + ("," if len(x) == 1 else "") + ")"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(x, str):
        return '"' + x.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(x)


def value(x: Any, names: Mapping[str, Any]) -> Any:
    """The value of plain data and expressions, with the values of earlier lines."""
    if isinstance(x, Name | Call | Reference):
        return x.value(names)
    if isinstance(x, dict):
        return {k: value(v, names) for k, v in x.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(x, list | tuple):
        return type(x)(value(v, names) for v in x)  # pyright: ignore[reportUnknownVariableType]
    return x


@attrs.frozen
class Line:
    """``names = expression``, with a remark."""

    names: tuple[str, ...]
    expression: Any
    remark: str = ""

    def source(self) -> str:
        text = f"{', '.join(self.names)} = {self._long() if len(source(self.expression)) > 96 else source(self.expression)}"
        if not self.remark:
            return text
        return f"# {self.remark}\n{text}" if "\n" in text or len(text) > 60 else f"{text}  # {self.remark}"

    def _long(self) -> str:
        """A call with each argument on a line of its own."""
        call = self.expression
        if isinstance(call, dict):
            return "{\n" + "".join(f"    {source(k)}: {source(v)},\n" for k, v in call.items()) + "}"  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(call, Call):
            return source(call)
        given = [source(a) for a in call.args] + [f"{k}={source(v)}" for k, v in call.kwargs.items()]
        return f"{call.function}(\n" + "".join(f"    {g},\n" for g in given) + ")"


@attrs.frozen
class Recipe:
    """Lines in order. `build` runs them; `source` prints them as a program that needs the names in `given`."""

    lines: tuple[Line, ...]
    given: tuple[str, ...] = ("model",)

    def source(self) -> str:
        text = "\n".join(line.source() for line in self.lines) + "\n"
        used = [_MODULES[m].rpartition(".") for m in _MODULES if re.search(rf"(?<![.\w]){m}\.", text)]
        packages = {p: sorted(m for q, _, m in used if q == p) for p, _, _ in used}
        torch = "import torch\n\n" if re.search(r"(?<![.\w])torch\.", text) else ""
        return (
            torch
            + "import fds\n"
            + "".join(f"from {p} import {', '.join(m)}\n" for p, m in packages.items())
            + "\n"
            + text
        )

    def build(self, **given: Any) -> dict[str, Any]:
        """The values of all lines, by name."""
        names = dict(given)
        for line in self.lines:
            found = value(line.expression, names)
            if len(line.names) == 1:
                names[line.names[0]] = found
            else:
                names.update(zip(line.names, found, strict=True))
        return names

    def __getitem__(self, name: str) -> Any:
        """The expression of a line."""
        return next(line.expression for line in self.lines if name in line.names)

    def replaced(self, name: str, expression: Any) -> "Recipe":
        lines: Sequence[Line] = [attrs.evolve(x, expression=expression) if name in x.names else x for x in self.lines]
        return attrs.evolve(self, lines=tuple(lines))
