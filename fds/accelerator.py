"""The device that a program runs on, under one set of names: `get_accelerator`.

A thin value over torch's own modules (`torch.cuda`, `torch.xpu`, ..., `torch.accelerator`), for scripts that ask DeepSpeed's accelerator.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree

# What registers a device with torch, where torch itself does not have it; and the variable that says which devices a process sees.
_PLUGINS: dict[str, str | None] = {
    "cuda": None,
    "cpu": None,
    "xpu": None,
    "mps": None,
    "npu": "torch_npu",
    "hpu": "habana_frameworks.torch",
    "mlu": "torch_mlu",
    "sdaa": "torch_sdaa",
    "supa": "torch_supa",
}
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES", "hpu": "HABANA_VISIBLE_MODULES", "mlu": "MLU_VISIBLE_DEVICES"}  # fmt: skip
# Torch's Metal module has other names for what it counts.
_MPS = {"memory_allocated": "current_allocated_memory", "memory_reserved": "driver_allocated_memory"}


def get_accelerator() -> "Accelerator":
    """The accelerator of this process: the one named by FDS_ACCELERATOR or DS_ACCELERATOR, else torch's current one, else the processor.

    Raises:
        ValueError: an unknown name; a device that is not here, or whose plugin is not installed; the two variables differ.

    >>> get_accelerator().is_available()
    True
    """
    name = chosen(os.environ)
    found = torch.accelerator.current_accelerator(check_available=True)  # a build for CUDA runs where no GPU is, too
    return of(name or ("cpu" if found is None else found.type), asked=name is not None)


def chosen(env: Mapping[str, str]) -> str | None:
    """The device type that the environment asks for, or None.

    >>> chosen({"DS_ACCELERATOR": "cpu"})
    'cpu'
    """
    named = {k: env[k] for k in ("FDS_ACCELERATOR", "DS_ACCELERATOR") if k in env}
    if len(set(named.values())) > 1:
        raise ValueError(f"{named}: two accelerators; set one of the two variables, or both to the same")
    for variable, name in named.items():
        if name not in _PLUGINS:
            raise ValueError(f"{variable}={name!r} is unknown; {tree.suggest(name, _PLUGINS)}")
        return name
    return None


@cache
def of(name: str, *, asked: bool = True) -> "Accelerator":
    """The accelerator of this device type, after a look whether it is here."""
    plugin = _PLUGINS.get(name)
    if plugin is not None:
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise ValueError(f"accelerator {name!r}: needs {plugin}, which is not installed ({error})") from error
    accelerator = Accelerator(name)
    if asked and not accelerator.is_available():
        raise ValueError(
            f"accelerator {name!r}: torch {torch.__version__} sees no such device here; unset FDS_ACCELERATOR and DS_ACCELERATOR, or set 'cpu'"
        )
    return accelerator


@attrs.frozen
class Accelerator:
    """One type of device. Methods take a device's index, by default the current one's; memory is in bytes.

    What the device's module in torch lacks is an error that names it. On a processor, memory is that of the process.
    """

    name: str  # torch's device type: "cuda", "cpu", "xpu", "mps", "npu", ...

    # --- devices ---

    def device_name(self, device_index: int | None = None) -> str:
        """``"cuda"``, or ``"cuda:1"`` with an index; a processor has none."""
        return self.name if device_index is None or self.name == "cpu" else f"{self.name}:{device_index}"

    def current_device(self) -> int:
        """The index of the current device."""
        return 0 if self.name in ("cpu", "mps") else int(self._module.current_device())

    def current_device_name(self) -> str:
        """``"cuda:0"``; ``"cpu"``."""
        return self.device_name(self.current_device())

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which this device is the current one."""
        if device_index is None or self.name in ("cpu", "mps"):
            self._check_single(device_index)
            return nullcontext()
        return self._ask("device", device_index)

    def set_device(self, device_index: int) -> None:
        if self.name in ("cpu", "mps"):
            self._check_single(device_index)
        else:
            self._ask("set_device", device_index)

    def is_available(self) -> bool:
        return self.name == "cpu" or bool(self._module.is_available())

    def device_count(self) -> int:
        """Devices that this process sees; the processors of a machine are one."""
        return 1 if self.name == "cpu" else int(self._ask("device_count"))

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait until the device has done all that it was given."""
        if self.name == "mps":
            self._ask("synchronize")
        elif self.name != "cpu":
            self._ask("synchronize", device_index)

    def is_synchronized_device(self) -> bool:
        """Whether calls return when their work is done, as on a processor."""
        return self.name == "cpu"

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.name

    def visible_devices_envs(self) -> list[str]:
        """The variables that say which devices a process sees."""
        return [_VISIBLE[self.name]] if self.name in _VISIBLE else []

    # --- streams ---

    @property
    def Stream(self) -> Any:
        return self._attribute("Stream")

    @property
    def Event(self) -> Any:
        return self._attribute("Event")

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context whose work goes to `stream`."""
        return self._ask("stream", stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return self._ask("current_stream", *self._index(device_index))

    def default_stream(self, device_index: int | None = None) -> Any:
        return self.current_stream() if self.name == "cpu" else self._ask("default_stream", *self._index(device_index))

    # --- random numbers ---

    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator (torch's own, on a processor)."""
        torch.manual_seed(seed) if self.name == "cpu" else self._ask("manual_seed", seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices."""
        self.manual_seed(seed) if self.name in ("cpu", "mps") else self._ask("manual_seed_all", seed)

    def initial_seed(self) -> int:
        return torch.initial_seed() if self.name == "cpu" else int(self._ask("initial_seed"))

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        return torch.get_rng_state() if self.name == "cpu" else self._ask("get_rng_state", *self._index(device_index))

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        if self.name == "cpu":
            torch.set_rng_state(new_state)
        else:
            self._ask("set_rng_state", new_state, *self._index(device_index))

    # --- memory ---

    def empty_cache(self) -> None:
        if self.name != "cpu":
            self._ask("empty_cache")

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes that tensors hold now; on a processor, what is resident of the process."""
        return _resident() if self.name == "cpu" else int(self._ask("memory_allocated", *self._index(device_index)))

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most that it was; on a processor, since the process began."""
        return (
            _most_resident()
            if self.name == "cpu"
            else int(self._ask("max_memory_allocated", *self._index(device_index)))
        )

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes that torch holds of the device, in use or not."""
        return _resident() if self.name == "cpu" else int(self._ask("memory_reserved", *self._index(device_index)))

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return (
            _most_resident()
            if self.name == "cpu"
            else int(self._ask("max_memory_reserved", *self._index(device_index)))
        )

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Begin the peaks anew. A processor's peak is the operating system's, which has no such thing: an error there."""
        self._ask("reset_peak_memory_stats", *self._index(device_index))

    def reset_max_memory_allocated(self, device_index: int | None = None) -> None:
        self.reset_peak_memory_stats(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        return self._ask("memory_stats", *self._index(device_index))

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device; on a processor, of the machine."""
        if self.name == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.name == "mps":
            return int(self._ask("recommended_max_memory"))
        return int(self._ask("get_device_properties", *(self._index(device_index) or (0,))).total_memory)

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device that nobody has."""
        if self.name == "cpu":
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.name == "mps":
            return self.total_memory() - self.memory_allocated()
        return int(self._ask("mem_get_info", *self._index(device_index))[0])

    def pin_memory(self, tensor: Tensor) -> Tensor:
        """`tensor` in page-locked host memory, from which copies to the device run by themselves; itself on a processor."""
        return tensor if self.name == "cpu" else tensor.pin_memory()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    # --- what it can do ---

    def supported_dtypes(self) -> list[torch.dtype]:
        return [t for t in (torch.float32, torch.float16, torch.bfloat16) if _computes(self.name, t)]

    def is_bf16_supported(self) -> bool:
        """Whether it computes in bfloat16, and not by way of something else: on CUDA, what torch says; elsewhere a product is tried."""
        if self.name == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return _computes(self.name, torch.bfloat16)

    def is_fp16_supported(self) -> bool:
        return _computes(self.name, torch.float16)

    def is_fp64_supported(self) -> bool:
        return _computes(self.name, torch.float64)

    def is_triton_supported(self) -> bool:
        """Whether fds's kernels run on it; elsewhere operators take their references."""
        from fds.kernels.triton_or_not import triton

        return self.name == "cuda" and triton is not None

    def communication_backend_name(self) -> str:
        """The back end of `torch.distributed` for tensors of this device: ``"nccl"``, ``"gloo"``, ..."""
        import torch.distributed as dist

        return dist.get_default_backend_for_device(self.name)

    def get_compile_backend(self) -> str:
        """What `torch.compile` compiles by where nothing else is asked for."""
        return "inductor"

    def range_push(self, msg: str) -> None:
        """Open a named range in the device's profiler (NVTX); where there is none, nothing is to be marked."""
        if self.name == "cuda":
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self) -> None:
        if self.name == "cuda":
            torch.cuda.nvtx.range_pop()

    # --- torch's module ---

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.name)

    def _attribute(self, attribute: str) -> Any:
        called = _MPS.get(attribute, attribute) if self.name == "mps" else attribute
        if not hasattr(self._module, called):
            raise ValueError(
                f"accelerator {self.name!r}: torch.{self.name} has no {called} in torch {torch.__version__}"
            )
        return getattr(self._module, called)

    def _ask(self, attribute: str, *args: Any) -> Any:
        return self._attribute(attribute)(*args)

    def _index(self, index: int | None) -> tuple[int, ...]:
        if self.name in ("cpu", "mps"):
            self._check_single(index)
            return ()
        return () if index is None else (index,)

    def _check_single(self, index: int | None) -> None:
        if index not in (None, 0):
            raise ValueError(f"accelerator {self.name!r}: device {index}, and there is one; leave the index out")


@cache
def _computes(name: str, dtype: torch.dtype) -> bool:
    """Whether a product in this dtype is computed on the device at all: tried once."""
    try:
        x = torch.ones(8, 8, dtype=dtype, device=name)
        return bool(torch.isfinite((x @ x).float()).all())
    except (RuntimeError, TypeError):  # torch's two ways to say that there is no such kernel, or no such dtype
        return False


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(
        f"accelerator 'cpu': {sys.platform} has no /proc that says what is resident; use max_memory_allocated"
    )


def _most_resident() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes on Linux, bytes on macOS


__all__ = ["Accelerator", "get_accelerator"]
