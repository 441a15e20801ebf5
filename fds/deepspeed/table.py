"""The tables in docs/deepspeed.md, from the schema: ``python -m fds.deepspeed.table docs/deepspeed.md`` writes them between their marks."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fds.deepspeed.fields import Key, default_of, keys_of
from fds.deepspeed.schema.methods import OPTIMIZERS, REQUIRED, SCHEDULERS, Params
from fds.deepspeed.schema.top import MISTAKEN, Top

BEGIN, END = "<!-- keys:begin -->", "<!-- keys:end -->"


def tables() -> str:
    """Every key with its default and what fds does, a table for each section; then optimizers, schedules, and names that are mistaken for keys."""
    parts = ["### At the top\n", *_rows(Top)]
    for path, cls in _sections(Top, ""):
        parts += [f'\n### "{path}"\n', *_rows(cls)]
    parts += ["\n### Optimizers\n", *_methods(OPTIMIZERS), "\n### Schedules\n", *_methods(SCHEDULERS)]
    parts += ["\n### Not keys\n", "| written | what to do |", "|---|---|"]
    parts += [f"| `{k}` | {text} |" for k, text in MISTAKEN.items()]
    return "\n".join(parts) + "\n"


def written(text: str) -> str:
    """A document with the tables between its marks replaced. `ValueError` if the marks are not there."""
    before, mark, rest = text.partition(BEGIN)
    _, other, after = rest.partition(END)
    if not mark or not other:
        raise ValueError(f"table: the marks {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n{tables()}{END}{after}"


def _rows(cls: type[Any]) -> Iterator[str]:
    yield "| key | default | in fds |"
    yield "|---|---|---|"
    for name, key in keys_of(cls).items():
        if key.section is None:
            names = ", ".join(f"`{n}`" for n in (name, *key.aliases, *key.deprecated))
            yield f"| {names} | {_default(default_of(cls, name))} | {_does(key)} |"


def _does(key: Key) -> str:
    text = key.text.replace("|", "\\|")
    return {"yes": text, "design": f"*no effect by design*: {text}", "no": f"**not there**: {text}"}[key.status]


def _default(value: Any) -> str:
    if value == sys.maxsize:
        return "2^63 - 1"
    words = "" if value is None else json.dumps(value)
    return f"`{words}`" if 0 < len(words) <= 40 else words and "see DeepSpeed"


def _sections(cls: type[Any], path: str) -> Iterator[tuple[str, type[Any]]]:
    for name, key in keys_of(cls).items():
        if key.section is not None:
            where = f"{path}.{name}" if path else name
            yield where, key.section
            yield from _sections(key.section, where)


def _methods(table: Mapping[str, Params]) -> Iterator[str]:
    yield "| type | parameters and defaults |"
    yield "|---|---|"
    for name, params in table.items():
        needed = REQUIRED.get(name, ())
        words = [f"`{k}`" + (" (required)" if k in needed else "" if d is None else f" {json.dumps(d)}") for k, (d, _) in params.items()]  # fmt: skip
        yield f"| {name} | {', '.join(words)} |"


def main() -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(description="The tables of DeepSpeed's keys.")
    parser.add_argument("path", nargs="?", type=Path, help="the document to write them into; else they are printed")
    path = parser.parse_args().path
    if path is None:
        print(tables())
    else:
        path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
