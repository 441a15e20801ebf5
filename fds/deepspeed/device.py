"""`OnDevice`: tensors and modules made on a device and in a dtype."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FLOATS: frozenset[Any] = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.linspace, torch.logspace, torch.empty_strided}
)  # fmt: skip


class OnDevice:
    """A context in which modules and tensors are made on `device`, and those of floating point in `dtype`.

    With "meta" nothing is allocated: give the module to `fds.functionalize`, and its leaves come from `fds.init_params` or `fds.load`, site by site.

    Args:
        dtype: of floating tensors that name none themselves; None: torch's default. (DeepSpeed converts those that name one as well.)
        device: of all tensors that name none themselves.
        enabled: False: the context does nothing.

    It acts on the thread that enters it, nests, and patches nothing, where DeepSpeed replaces `torch.empty` and others for the process. The legacy constructor
    ``torch.Tensor(2, 3)`` is seen by no mode of torch's: it makes float32 on the CPU as ever.

    >>> with OnDevice(torch.bfloat16, device="meta"):
    ...     layer = torch.nn.Linear(2, 3)
    >>> layer.weight.device.type, layer.weight.dtype
    ('meta', torch.bfloat16)
    """

    def __init__(self, dtype: torch.dtype | None, device: "torch.device | str" = "meta", enabled: bool = True) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"OnDevice: dtype={dtype!r}, required a floating dtype, as torch.bfloat16, or None")
        self.dtype, self.device, self.enabled = dtype, torch.device(device), enabled
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> "OnDevice":
        stack = ExitStack()
        if self.enabled:
            stack.enter_context(self.device)
            if self.dtype is not None:
                stack.enter_context(_Floating(self.dtype))
        self._stacks.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stacks.pop().close()


class _Floating(TorchFunctionMode):
    """What a factory makes in torch's default dtype, it makes in this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FLOATS and kwargs.get("dtype") is None and kwargs.get("out") is None:
            fill = kwargs.get("fill_value", args[1] if len(args) > 1 else 0.0) if func is torch.full else 0.0
            if isinstance(fill, float) or (isinstance(fill, Tensor) and fill.is_floating_point()):
                kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)
