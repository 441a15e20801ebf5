"""What is raised for a configuration of DeepSpeed's that cannot be meant."""

from collections.abc import Sequence


class DeepSpeedConfigError(ValueError):
    """A configuration that is not accepted; `keys` are the paths of the keys that it is about, as "zero_optimization.stage".

    One error has all that was found, a line for each problem.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class UnsupportedKeyWarning(UserWarning):
    """A key of DeepSpeed's that has no effect in fds was given, and `on_unsupported` is "warn"."""
