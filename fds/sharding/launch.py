"""Start a function on several local ranks, without a launcher on the command line."""

import os
import sys
from collections.abc import Callable
from typing import Any


def launch(main: Callable[[Any], None], args: Any, *, ranks: int | None = None) -> None:
    """Run ``main(args)`` on `ranks` local processes (default: ``args.ranks``), each with the environment that `torchrun` would give it.

    Under `torchrun` already, or with 0 or 1 ranks, it simply calls `main`. When one rank fails the others are stopped, and its error is
    raised here. `main` has to be importable (defined at the top of a module).
    """
    count = getattr(args, "ranks", 1) if ranks is None else ranks
    if count <= 1 or "WORLD_SIZE" in os.environ:
        main(args)
        return
    import torch.distributed as dist
    import torch.multiprocessing as multiprocessing

    # This process keeps the store, as torchrun's agent does: a port that was found free could be another's by the time rank 0 listens there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_rank, (main, args, count, store.port), nprocs=count)


def _rank(rank: int, main: Callable[[Any], None], args: Any, count: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        main(args)
    finally:
        if dist.is_initialized():
            _finish_saves()
            dist.destroy_process_group()


def _finish_saves() -> None:
    """A save in the background (`fds.save_state`) needs the process group. Not imported: where nothing has saved, there is nothing to wait for."""
    if (run_state := sys.modules.get("fds.run_state")) is not None:
        run_state.finish_saves()
