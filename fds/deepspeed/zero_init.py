"""`zero.Init`: modules whose parameters are made where they are stored."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fds.deepspeed.deferred import Deferred
from fds.leaves import MAKE, Leaves, made
from fds.sharding import collectives
from fds.sharding.mesh import Axis, mesh
from fds.sharding.zero import shard_of

HOME = "fds_home"  # attribute of a parameter whose values are elsewhere: where


class Init:
    """A context in which a module is built without its parameters: they are on the meta device, and their initialisation is written down (`deferred.py`).

    The parameters that `fds.functionalize` returns for it are made leaf by leaf, as the constructor would have made them, when `program.place` or
    `step.init` asks for them, so that at no time a rank has more than what it stores, and one site. `parameters(module)` is the same without a program.

    Random values depend on rank 0's `torch.initial_seed()` and on the number of the operator in the constructor, and are the same on every rank and
    mesh; they are not those that the constructor would have drawn from a running generator.

    Args:
        module: an existing module: each rank keeps 1/n of every parameter of rank 0's, and the module has it on the meta device from then on.
        data_parallel_group: over whose ranks what `GatheredParameters` has written is split, until it is placed. Default: all. `mpu.get_data_parallel_group()`
            and `sequence_data_parallel_group` say the same.
        dtype: of the floating parameters. Default: the constructor's own. DeepSpeed's is float16: here the chain says what is computed with
            (`fds.cast`), and what is stored is the master copy.
        remote_device: "cpu", "none" or None, which are the same, as leaves are made in host memory and live where the program places them.
        config_dict_or_path, config: read by `initialize` and not here, since where parameters live is no property of the module.
        mem_efficient_linear: nothing to choose: `fds.checkpoint` after `fds.shard` keeps no weight for backward.
        enabled: False: the context does nothing.

    Raises `ValueError` for what belongs to the chain (`pin_memory`, `zero_param_parallel_group`, `zero_quantized_weights`,
    `zero_quantized_nontrainable_weights`, `param_swapper`, `tensor_overrides`, another `remote_device`), and inside of the block for a constructor that reads
    numbers out of tensors that are not there.

    >>> with Init():
    ...     layer = nn.Linear(3, 2)
    >>> layer.weight.device.type, parameters(layer)["weight"].shape
    ('meta', torch.Size([2, 3]))
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        _refuse("remote_device", remote_device not in (None, "none", "cpu"), "chain offload(store): parameters go there when they are placed")  # fmt: skip
        _refuse("pin_memory", pin_memory, "chain offload(HostStore()), which pins what it keeps")
        _refuse("zero_param_parallel_group", zero_param_parallel_group is not None, "hpZ is an order: chain(shard(local), checkpoint(), shard(node))")  # fmt: skip
        _refuse("zero_quantized_weights", zero_quantized_weights, 'chain(shard(axis), quantized(weights="int8"))')
        _refuse("zero_quantized_nontrainable_weights", zero_quantized_nontrainable_weights, 'quantize_frozen("int8") before shard')  # fmt: skip
        _refuse("param_swapper", param_swapper is not None, "chain offload(store)")
        _refuse("tensor_overrides", tensor_overrides is not None, "dtype= for parameters; buffers keep what the constructor gives them")  # fmt: skip
        groups = [g for g in (data_parallel_group, sequence_data_parallel_group, mpu and mpu.get_data_parallel_group()) if g is not None]  # fmt: skip
        if len({id(g) for g in groups}) > 1:
            raise ValueError("zero.Init: data_parallel_group, sequence_data_parallel_group and mpu name different groups; give one")  # fmt: skip
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"zero.Init: dtype={dtype}, required a floating dtype, or None")
        self.enabled, self.dtype = enabled, dtype
        self._group = groups[0] if groups else None
        self._home: _Made | None = None
        self._handles: list[Any] = []
        self._found: list[nn.Parameter] = []
        if module is not None and enabled:
            self._home = self._start()
            for p in dict.fromkeys(module.parameters()):
                self._take_away(p)

    def __enter__(self) -> "Init":
        if self.enabled:
            self._home = home = self._start()
            self._handles = [
                hooks.register_module_parameter_registration_hook(self._registered),
                hooks.register_module_buffer_registration_hook(self._registered_buffer),
            ]
            home.record.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.enabled and self._home is not None:
            for p in self._found if error[0] is None else ():
                self._convert(p, self._home)
            self._home.record.__exit__(*error)
            for h in self._handles:
                h.remove()
            self._handles, self._found = [], []

    def _convert(self, p: nn.Parameter, home: "_Made") -> None:
        """Its constructor has initialised it in its own dtype, and what comes of that is rounded."""
        if self.dtype is not None and p.is_floating_point() and p.dtype != self.dtype:
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().to(self.dtype), requires_grad=p.requires_grad))
            _tag(p, home)

    def _start(self) -> "_Made":
        axis = mesh(dp=-1)["dp"] if self._group is None else _axis(self._group)
        seed = [torch.initial_seed()]
        if axis.size > 1:
            group = collectives.process_group(axis.group)
            dist.broadcast_object_list(seed, src=dist.get_global_rank(group, 0), group=group)
        return _Made(Deferred(), axis, seed[0])

    def _registered(self, module: nn.Module, name: str, p: Any) -> Any:
        home = self._home
        if p is None or home is None or getattr(p, HOME, None) is not None:
            return None
        self._found.append(p)
        _tag(p, home)
        return None

    def _registered_buffer(self, module: nn.Module, name: str, x: Any) -> None:
        if isinstance(x, Tensor) and self._home is not None:
            _tag(x, self._home)

    def _take_away(self, p: nn.Parameter) -> None:
        home = self._home
        assert home is not None
        value = p.detach() if self.dtype is None or not p.is_floating_point() else p.detach().to(self.dtype)
        if home.axis.size > 1:
            value = value.clone(memory_format=torch.contiguous_format)
            dist.broadcast(value, src=dist.get_global_rank(home.group, 0), group=home.group)
        away = nn.Parameter(torch.empty_like(value, device="meta", memory_format=torch.contiguous_format), requires_grad=p.requires_grad)  # fmt: skip
        home.write([away], [value])
        torch.utils.swap_tensors(p, away)
        _tag(p, home)


def _refuse(name: str, given: bool, fix: str) -> None:
    if given:
        raise ValueError(f"zero.Init: {name} is not there, as it belongs to the chain; use {fix}")


def _tag(x: Tensor, home: Any) -> None:
    setattr(x, HOME, home)
    if isinstance(home, _Made):
        setattr(x, MAKE, home.make)


def _axis(group: Any) -> Axis:
    size = dist.get_world_size(group)
    return Axis("dp", size, dist.get_rank(group), group.group_name if size > 1 else "")


@attrs.frozen(eq=False)
class _Made:
    """The home of what was built under `Init`: a record of its initialisation, and each rank's part of what was written since."""

    record: Deferred
    axis: Axis
    seed: int

    @property
    def group(self) -> Any:
        return collectives.process_group(self.axis.group) if self.axis.size > 1 else None

    def read(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        return [self.make("a parameter", p) for p in params]

    def make(self, name: str, x: Tensor) -> Tensor:
        return self.record.make(x, self.seed, name) if self.record.knows(x) else x.detach().clone()

    def write(self, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        for p, value in zip(params, values, strict=True):
            if not p.is_meta:
                p.detach().copy_(value)
                continue
            self.record.put(p, _joined(shard_of([value], self.axis), self.axis, p.shape))


def _joined(part: Tensor, axis: Axis, shape: torch.Size) -> Any:
    return lambda: collectives.gather(part, axis)[: shape.numel()].view(shape)


def parameters(module: nn.Module) -> Leaves:
    """The parameters and buffers of a module that was built under `Init`, by name, each made when it is asked for. `fds.functionalize` returns them as well.

    Leaves that are real are handed out as they are. All ranks have to ask for the same leaves in the same order, as `program.place` does.

    Raises `ValueError`, when asked for it, for a leaf on the meta device that no `Init` made, or that nothing initialises.
    """
    names: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, x in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        found.setdefault(names.setdefault(id(x), name), x)

    def make(name: str) -> Tensor:
        x = made(name, found[name])
        if x.is_meta:
            raise ValueError(
                f"{name}: on the meta device, and not built under zero.Init; use fds.init_params(program) or fds.load(path, program)"
            )
        return x

    return Leaves(list(found), make, f"{type(module).__name__}, built under zero.Init")
