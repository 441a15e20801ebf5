"""Where a configuration comes from: a dictionary, the path of a JSON or HJSON file, or base64 of its text."""

import base64
import contextlib
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
        return _copied(source)
    if not isinstance(source, str | os.PathLike):
        raise DeepSpeedConfigError(
            f"ds_config: got {type(source).__name__}, required a dictionary, a path (str or Path) of a JSON or HJSON file, or base64 of JSON"
        )
    text, where = _text(source)
    return _parsed(text, where)


def _copied(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {k: _copied(v) for k, v in x.items()}  # pyright: ignore[reportUnknownVariableType]
    return [_copied(v) for v in x] if isinstance(x, list) else x  # pyright: ignore[reportUnknownVariableType]


def _text(source: Any) -> tuple[str, str]:
    try:
        there = os.path.exists(source)
    except ValueError:  # a zero byte
        there = False
    if there:
        try:
            return Path(source).read_text(encoding="utf-8"), str(source)
        except (OSError, UnicodeDecodeError) as error:
            raise DeepSpeedConfigError(f"ds_config: {source}: cannot be read: {error}") from error
    if isinstance(source, str):
        with contextlib.suppress(ValueError):  # binascii.Error and UnicodeDecodeError are such
            # urlsafe, as DeepSpeed's launcher encodes it; the other alphabet too
            raw = base64.b64decode(source.translate(str.maketrans("-_", "+/")), validate=True)
            return raw.decode("utf-8"), "base64"
    other = ", and it is not base64 of JSON" if isinstance(source, str) else ""
    raise DeepSpeedConfigError(f"ds_config: {str(source)[:200]!r}: there is no such file{other}")


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(text, object_pairs_hook=_unique)
    except DeepSpeedConfigError:
        raise
    except ValueError as error:  # not JSON, or a number of too many digits
        found = _hjson(text, where, error)
    except RecursionError as error:
        raise DeepSpeedConfigError(f"ds_config: {where}: nested too deeply") from error
    if not isinstance(found, dict):
        raise DeepSpeedConfigError(f"ds_config: {where}: holds {type(found).__name__}, required an object {{ }}")
    return found  # pyright: ignore[reportUnknownVariableType]


def _hjson(text: str, where: str, error: ValueError) -> Any:
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
