"""What is alive, in bytes."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fds


class Live(TorchDispatchMode):
    """The largest number of bytes in storages that are alive at once: those of `tensors` and those that operators return."""

    def __init__(self, tensors):
        super().__init__()
        self.peak, self.alive = 0, {}
        self.see(tensors)

    def see(self, tree):
        for t in fds.tree.leaves(tree):
            if isinstance(t, torch.Tensor):
                self.alive.setdefault(StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes())
        self.alive = {r: n for r, n in self.alive.items() if not r.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out
