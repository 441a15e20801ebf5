"""Where a configuration comes from: a dictionary, the path of a JSON or HJSON file, or base64 of its text."""

import base64
import binascii
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fds.deepspeed.errors import DeepSpeedConfigError


def read(source: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries, a copy of its own.

    Raises `DeepSpeedConfigError`: no such file and no base64, not JSON or HJSON (with the line), a key twice, or no object at the top.

    >>> read("eyJ0cmFpbl9iYXRjaF9zaXplIjogOH0=")
    {'train_batch_size': 8}
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(source, str | os.PathLike):
        raise DeepSpeedConfigError(
            f"ds_config: got {type(source).__name__}, required a dictionary, a path (str or Path) of a JSON or HJSON file, or base64 of JSON"
        )
    text, where = _text(source)
    return _parsed(text, where)


def _text(source: Any) -> tuple[str, str]:
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
        there = path.exists()
    except (OSError, ValueError) as error:  # a name too long for a path is base64; what cannot be read is an error
        if path_like(source):
            raise DeepSpeedConfigError(f"ds_config: {source}: {error}") from error
        there = False
    if isinstance(source, str) and not there:
        try:
            # urlsafe, as DeepSpeed's launcher encodes it; the other alphabet too
            raw = base64.b64decode(source.translate(str.maketrans("-_", "+/")), validate=True)
            return raw.decode("utf-8"), "base64"
        except (binascii.Error, UnicodeDecodeError, ValueError):
            pass
    what = "is a directory" if there else "there is no such file" + (", and it is not base64 of JSON" if isinstance(source, str) else "")  # fmt: skip
    raise DeepSpeedConfigError(f"ds_config: {str(source)[:200]!r}: {what}")


def path_like(source: Any) -> bool:
    """Whether a source was meant as a path: a Path, or text that looks like one."""
    return not isinstance(source, str) or source.endswith((".json", ".hjson"))


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        found = _hjson(text, where, error)
    except RecursionError as error:
        raise DeepSpeedConfigError(f"ds_config: {where}: nested too deeply") from error
    if not isinstance(found, dict):
        raise DeepSpeedConfigError(f"ds_config: {where}: holds {type(found).__name__}, required an object {{ }}")
    return found  # pyright: ignore[reportUnknownVariableType]


def _hjson(text: str, where: str, error: json.JSONDecodeError) -> Any:
    try:
        import hjson  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
    except ImportError:
        raise DeepSpeedConfigError(
            f"ds_config: {where}: not JSON: {error}; if it is HJSON (comments, no quotes): pip install hjson"
        ) from error
    try:
        return hjson.loads(text, object_pairs_hook=_unique)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except DeepSpeedConfigError:
        raise
    except ValueError as other:
        raise DeepSpeedConfigError(f"ds_config: {where}: neither JSON ({error}) nor HJSON ({other})") from other


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [k for k, _ in pairs]
        twice = sorted({k for k in names if names.count(k) > 1})
        raise DeepSpeedConfigError(f"ds_config: given more than once in one section: {', '.join(twice)}", twice)
    return found
