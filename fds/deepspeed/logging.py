"""What the front door says while it runs: `logger` and `log_dist`."""

import logging
import sys
from collections.abc import Iterable

from fds.files import rank


class _Visible(logging.Handler):
    """Writes to standard output as long as the application has not set up logging: lines are seen without a setting, and never twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stdout.write(self.format(record) + "\n")
            sys.stdout.flush()


def _make() -> logging.Logger:
    made = logging.getLogger("fds.deepspeed")
    if not made.handlers:
        handler = _Visible()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        made.addHandler(handler)
        made.setLevel(logging.INFO)
    return made


logger = _make()
"""The logger of the front door, ``logging.getLogger("fds.deepspeed")``, at level INFO."""


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log `message` as ``[Rank r] message`` on the given ranks; a job of one process is rank 0.

    Args:
        ranks: who logs. None, or -1 among them: every rank. (DeepSpeed logs nothing for None once ranks are connected.)
        level: as in `logging`.

    Raises:
        ValueError: `ranks` that are no whole numbers, or beyond the job.

    >>> log_dist("only there", ranks=[0], level=logging.DEBUG)
    """
    from fds.files import ranks as count

    chosen = None if ranks is None else list(ranks)
    for r in chosen or []:
        if not isinstance(r, int) or isinstance(r, bool) or r < -1:
            raise ValueError(f"log_dist: ranks={chosen!r}, required whole numbers from 0, or -1 for every rank")
    if chosen is None or -1 in chosen or rank() in chosen:
        logger.log(level, "[Rank %d] %s", rank(), message)
    elif not chosen or min(chosen) >= count():
        raise ValueError(f"log_dist: ranks={chosen!r} are none of this job's {count()} ranks; use ranks=[0]")


__all__ = ["log_dist", "logger"]
