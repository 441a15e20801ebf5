"""What this build of fds is: version, and the commit it was built from.

The commit is written into a wheel when it is built (`setup.py`). A checkout has none: nothing runs git at import.
"""

import importlib
from typing import Any


def _built(name: str) -> str | None:
    try:
        build: Any = importlib.import_module("fds._build")
    except ModuleNotFoundError:
        return None
    return getattr(build, name)


__git_hash__ = _built("GIT_HASH")
__git_branch__ = _built("GIT_BRANCH")


def version_parts(version: str) -> tuple[int, int, int]:
    """Major, minor and patch of a version, whatever is appended to it.

    >>> version_parts("0.19.8+cpu")
    (0, 19, 8)
    """
    major, minor, patch = version.split("+")[0].split(".")[:3]
    digits = patch[: next((i for i, c in enumerate(patch) if not c.isdigit()), len(patch))]
    return int(major), int(minor), int(digits or 0)


def is_compile_supported() -> bool:
    """Whether `fds.compile` works here: torch has `torch.compile` for this Python.

    >>> is_compile_supported()
    True
    """
    from torch._dynamo import is_dynamo_supported  # costs seconds to import

    return bool(is_dynamo_supported())


__all__ = ["__git_branch__", "__git_hash__", "is_compile_supported", "version_parts"]
