"""What this machine and this installation offer to fds: ``python -m fds.report``.

Versions, the device, which implementation each kernel takes here, asynchronous file I/O, communication back ends, optional packages. It starts nothing
and writes no file.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from fds.accelerator import Accelerator, get_accelerator

_OPTIONAL = {"transformers": "models, generation", "tokenizers": "text", "peft": "adapter files", "tensorboard": "monitor", "wandb": "monitor", "comet-ml": "monitor", "hjson": "configurations with comments", "rich": "tables, progress", "matplotlib": "figures"}  # fmt: skip

Section = dict[str, str]


def report() -> dict[str, Section]:
    """Everything, by section and name.

    >>> list(report())
    ['versions', 'device', 'kernels', 'file I/O', 'communication', 'optional packages']
    """
    device = get_accelerator()
    return {
        "versions": versions(),
        "device": _device(device),
        "kernels": kernels(device),
        "file I/O": _file_io(),
        "communication": communication(device),
        "optional packages": {
            name: f"{_version(name) or 'not installed'} ({what})" for name, what in _OPTIONAL.items()
        },
    }


def versions() -> Section:
    """Of fds, Python and what fds stands on."""
    import fds
    from fds.version import __git_branch__, __git_hash__

    commit = f"{__git_hash__}, branch {__git_branch__}" if __git_hash__ else "not known (a checkout, not a wheel)"
    found = {"fds": fds.__version__, "fds is at": str(Path(fds.__file__).parent), "fds was built from": commit}
    found |= {"Python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__}
    toolkit = torch.version.cuda or torch.version.hip
    found["torch was built for"] = f"{'ROCm' if torch.version.hip else 'CUDA'} {toolkit}" if toolkit else "processors"
    return found | {name: _version(name) or "not installed" for name in ("triton", "optree", "attrs", "safetensors")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: Accelerator) -> Section:
    dtypes = ", ".join(str(t).removeprefix("torch.") for t in device.supported_dtypes())
    found = {"accelerator": device.name, "devices": str(device.device_count()), "computes in": dtypes}
    found["bfloat16 without detours"] = "yes" if device.is_bf16_supported() and not _emulates_bf16(device) else "no"
    if device.name == "cuda":
        for i in range(device.device_count()):
            found[f"device {i}"] = f"{torch.cuda.get_device_name(i)}, {device.total_memory(i) / 2**30:.1f} GiB"
    else:
        found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
        found["memory"] = f"{device.total_memory() / 2**30:.1f} GiB, {device.available_memory() / 2**30:.1f} GiB free"
    shared = Path("/dev/shm")
    if shared.exists():
        space = os.statvfs(shared)
        found["shared memory (/dev/shm)"] = f"{space.f_frsize * space.f_blocks / 2**30:.1f} GiB"
    return found


def _emulates_bf16(device: Accelerator) -> bool:
    from fds.lowering import emulated

    return device.name == "cpu" and torch.bfloat16 in emulated()


def kernels(device: Accelerator) -> Section:
    """Which implementation every operator of fds takes on this device.

    >>> kernels(Accelerator("cpu"))["rms_norm"]
    'reference'
    """
    from fds.kernels import operators
    from fds.kernels.registry import INTERPRETED

    triton = "Triton, interpreted" if INTERPRETED else "Triton"
    runs = device.is_triton_supported() or INTERPRETED
    return {name: triton if runs and op.kernels else "reference" for name, op in sorted(operators().items())}


def _file_io() -> Section:
    """fds has one way, and what of it the system offers: threads were measured faster than libaio and io_uring, which it does not use."""
    return {
        "engine": "threads (tune them: python -m fds.offload.tune)",
        "preadv, pwritev": "yes" if hasattr(os, "preadv") else "no: this system lacks them",
        "O_DIRECT": "yes, where the file system takes it" if hasattr(os, "O_DIRECT") else "no: through the page cache",
        "GPUDirect Storage": "no: everything passes through host memory",
    }


def communication(device: Accelerator) -> Section:
    """Which back ends torch has here."""
    if not dist.is_available():
        return {"torch.distributed": "not in this build of torch"}
    found = {"of this device": device.communication_backend_name()}
    for name in ("nccl", "gloo", "mpi", "ucc", "xccl"):
        found[name] = "yes" if dist.is_backend_available(name) else "no"
    if dist.is_nccl_available() and torch.cuda.is_available():
        from torch.cuda import nccl

        found["nccl"] = ".".join(str(n) for n in nccl.version())
    return found


# --- printing ---


def plain(found: Mapping[str, Section]) -> str:
    """The report as text.

    >>> print(plain({"device": {"accelerator": "cpu", "devices": "1"}}))
    device
      accelerator  cpu
      devices      1
    """
    lines: list[str] = []
    for title, section in found.items():
        width = max(len(k) for k in section)
        lines += [title, *(f"  {k:<{width}}  {v}" for k, v in section.items())]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fds.report", description="What this machine offers to fds.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--plain", action="store_true", help="without a table, also where rich is installed")
    options = parser.parse_args(arguments)
    found = report()
    if options.json:
        print(json.dumps(found, indent=2))
    elif options.plain or importlib.util.find_spec("rich") is None:
        print(plain(found))
    else:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for title, section in found.items():
            table = Table("", title=title, title_justify="left", show_header=False)
            for row in section.items():
                table.add_row(*row)
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
