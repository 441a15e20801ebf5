"""`zero.Init`, `zero.GatheredParameters` and the memory estimates: DeepSpeed's names over parameters that are stored, and never whole.

    with fds.zero.Init():
        model = Model()  # nothing is allocated; what the constructor does to its parameters is written down
    program, params = fds.functionalize(model)  # `params` makes a leaf when it is asked for one
    stored = fds.shard(program, mesh["dp"]).place(params)  # site by site: a rank has its part, and one site

`GatheredParameters` shows parameters whole for the time of a block, and brings back what one rank has written. It takes what `Init` made, and the leaves of a
running state: those of a module that `attach` has tied to it, or `leaves(owner, pattern)`. Without a context manager the same is two pure functions:

    w = zero.gathered(program, stored, "*.norm.weight")  # {name: whole tensor}
    stored = zero.scattered(program, stored, {k: 2 * v for k, v in w.items()})
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fds import tree
from fds.deepspeed.deferred import Deferred
from fds.deepspeed.needs import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from fds.leaves import MAKE, Leaves, made
from fds.program import Program
from fds.sharding import collectives
from fds.sharding.mesh import Axis, mesh
from fds.sharding.zero import shard_of
from fds.transform import parameters as parameters_of
from fds.tree import Params, Stored

__all__ = [
    "GatheredParameters",
    "Init",
    "attach",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "gathered",
    "leaves",
    "parameters",
    "scattered",
]  # fmt: skip

_HOME = "fds_home"  # attribute of a parameter whose values are elsewhere: where


class Home(Protocol):
    """Where the values of parameters are that a module has only in name."""

    @property
    def group(self) -> Any: ...
    def read(self, params: Sequence[nn.Parameter]) -> list[Tensor]: ...
    def write(self, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None: ...


class Init:
    """A context in which a module is built without its parameters: they are on the meta device, and their initialisation is written down (`deferred.py`).

    The parameters that `fds.functionalize` returns for it are made leaf by leaf, as the constructor would have made them, when `program.place` or `step.init` asks
    for them, so that at no time a rank has more than what it stores, and one site. `parameters(module)` is the same without a program. Random values depend on rank 0's `torch.initial_seed()` and on the number of the operator in the
    constructor, and are the same on every rank and mesh; they are not those that the constructor would have drawn from a running generator.

    Args:
        module: an existing module: each rank keeps 1/n of every parameter, and the module has it on the meta device from then on. All ranks have to have the same.
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
        self._converted: dict[int, tuple[Tensor, nn.Parameter]] = {}
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
            self._home.record.__exit__(*error)
            for h in self._handles:
                h.remove()
            self._handles, self._converted = [], {}

    def _start(self) -> "_Made":
        axis = mesh(dp=-1)["dp"] if self._group is None else _axis(self._group)
        seed = [torch.initial_seed()]
        if axis.size > 1:
            group = collectives.process_group(axis.group)
            dist.broadcast_object_list(seed, src=dist.get_global_rank(group, 0), group=group)
        return _Made(Deferred(), axis, seed[0])

    def _registered(self, module: nn.Module, name: str, p: Any) -> Any:
        home = self._home
        if p is None or home is None or getattr(p, _HOME, None) is not None:
            return None
        if self.dtype is not None and p.is_floating_point() and p.dtype != self.dtype:
            if id(p) not in self._converted:  # tied parameters are registered more than once
                new = nn.Parameter(p.detach().to(self.dtype), requires_grad=p.requires_grad)
                self._converted[id(p)] = (p, new)
                _tag(new, home)
            return self._converted[id(p)][1]
        _tag(p, home)
        return None

    def _registered_buffer(self, module: nn.Module, name: str, x: Any) -> None:
        if isinstance(x, Tensor) and self._home is not None:
            _tag(x, self._home)

    def _take_away(self, p: nn.Parameter) -> None:
        home = self._home
        assert home is not None
        value = p.detach() if self.dtype is None or not p.is_floating_point() else p.detach().to(self.dtype)
        away = nn.Parameter(torch.empty_like(value, device="meta", memory_format=torch.contiguous_format), requires_grad=p.requires_grad)  # fmt: skip
        home.write([away], [value])
        torch.utils.swap_tensors(p, away)
        _tag(p, home)


def _refuse(name: str, given: bool, fix: str) -> None:
    if given:
        raise ValueError(f"zero.Init: {name} is not there, as it belongs to the chain; use {fix}")


def _tag(x: Tensor, home: Any) -> None:
    setattr(x, _HOME, home)
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
        return self.record.make(x, self.seed, name) if self.record.knows(x) else x.detach()

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


# --- the leaves of a state ---


def gathered(program: Program, stored: Stored, patterns: str | Iterable[str]) -> Params:
    """The logical leaves that the patterns name, whole, on every rank; one site at a time is whole. Every rank has to call it."""
    names = tree.select(program.order, patterns, what="gathered")
    of = _sites(program, names)
    out: Params = {}
    for s, own in of.items():
        whole = program.sites[s].restore(stored[s])
        out |= {k: whole[k].detach().clone() for k in own}
    return {k: out[k] for k in names}


def scattered(program: Program, stored: Stored, values: Mapping[str, Tensor]) -> Stored:
    """`stored` with other values of these leaves, which every rank gives whole and equal. `stored` is not changed; what is not named is shared with it.

    Raises `ValueError` for an unknown leaf, another shape or dtype, and under a transformation that does not store leaves as they are (`lora`, `quantize_frozen`).
    """
    unknown = [k for k in values if k not in set(program.order)]
    if unknown:
        raise ValueError(f"scattered: leaf {unknown[0]!r} is unknown; {tree.suggest(unknown[0], program.order)}")
    out = dict(stored)
    for s, own in _sites(program, list(values)).items():
        p = program.sites[s]
        _check_kept(p, own[0])
        for k in own:
            tree.check_leaf(k, values[k], p.origin.spec[k], what="scattered: the value")
        out[s] = p.place({**p.restore(stored[s]), **{k: values[k] for k in own}})
    return out


def _sites(program: Program, names: Sequence[str]) -> dict[str, list[str]]:
    owner = {k: s for s, p in program.sites.items() for k in p.origin.spec}
    found: dict[str, list[str]] = {}
    for k in names:
        found.setdefault(owner[k], []).append(k)
    return found


def _check_kept(p: Program, leaf: str) -> None:
    """That what is stored holds the site's leaves themselves, wherever their elements are."""
    layout, own = p.layout, parameters_of(p.origin)
    if layout is not None and (layout.boxes is None or layout.spec.keys() != own.keys()):
        raise ValueError(
            f"{leaf}: cannot be written under {list(p.stack)}, one of which stores something else than the leaves; write before it is placed, or into program.without(...)'s parameters"
        )


class _Running:
    """The home of the leaves of a state: ``owner.program`` and ``owner.state``, whose `params` are replaced by a write."""

    group = None

    def __init__(self, owner: Any, names: Mapping[int, str], tx: Any) -> None:
        self._owner, self._names, self._tx = weakref.ref(owner), names, tx

    @property
    def owner(self) -> Any:
        owner = self._owner()
        if owner is None:
            raise ValueError("GatheredParameters: the engine that these parameters belong to is gone; keep a reference to it")  # fmt: skip
        return owner

    def read(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        names = [self._names[id(p)] for p in params]
        values = gathered(self.owner.program, self.owner.state.params, names)
        return [values[k] for k in names]

    def write(self, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        owner = self.owner
        if self._tx is not None and _has_master(self._tx, owner.program.trainable(owner.program.spec)):
            raise ValueError(
                "GatheredParameters: the optimizer has a float32 copy of the parameters (with_master), which the write would not reach and the next step would write over; write before the optimizer is made, or store masters: cast('bfloat16') in the chain"
            )
        new = dict(zip([self._names[id(p)] for p in params], values, strict=True))
        owner.state = owner.state._replace(params=scattered(owner.program, owner.state.params, new))


def _has_master(tx: Any, params: Any) -> bool:
    members = [] if tx.members is None else tx.members(tree.map(_part, params))
    return any(m.name == "master" or (m.tx is not tx and _has_master(m.tx, m.params)) for m in members)


def _part(x: Any) -> Any:
    from fds.layout import Part, whole

    return Part("", x, x, whole("", x.shape)) if isinstance(x, Tensor) else x


def attach(module: nn.Module, owner: Any, tx: Any = None) -> None:
    """Tie a module's parameters to the leaves of the same name of ``owner.program`` and ``owner.state``, so that `GatheredParameters` finds their values.

    The owner is held weakly. `tx`: its optimizer, which is asked whether it has copies that a write would not reach.
    """
    params = {name: p for name, p in module.named_parameters() if name in set(owner.program.order)}
    _tie(params, owner, tx)


def leaves(owner: Any, patterns: str | Iterable[str], tx: Any = None) -> list[nn.Parameter]:
    """Parameters on the meta device that stand for leaves of ``owner.program`` and ``owner.state``; for `GatheredParameters`."""
    program: Program = owner.program
    spec = {k: v for p in program.sites.values() for k, v in p.origin.spec.items()}
    names = tree.select([k for k in program.order if k not in program.marks["buffer"]], patterns, what="leaves")
    made = {k: nn.Parameter(torch.empty_like(spec[k], device="meta"), requires_grad=spec[k].requires_grad) for k in names}  # fmt: skip
    _tie(made, owner, tx)
    return list(made.values())


def _tie(params: Mapping[str, nn.Parameter], owner: Any, tx: Any) -> None:
    home = _Running(owner, {id(p): k for k, p in params.items()}, tx)
    for p in params.values():
        _tag(p, home)


class GatheredParameters:
    """A context in which parameters are whole on every rank; what rank `modifier_rank` has written to them is theirs afterwards, on all ranks.

    Every rank has to enter and to leave it. The parameters are real objects of the module inside of the block, and again only names outside. Gives the list of
    them. A parameter that is whole already stays so, and is broadcast too.

    Args:
        params: one parameter, or an iterable of them: of a module built under `Init`, of one that was `attach`ed, or `leaves(owner, pattern)`.
        modifier_rank: the rank, in the group that holds the parameters, whose values count. None: nobody writes.
        fwd_module: nothing to register, as the parameters of a program are its arguments wherever they are used.
        enabled: False: the context does nothing.

    Raises:
        ValueError: on leaving, for a parameter that was written to without `modifier_rank` (DeepSpeed loses the write); on entering, for one
            that an outer block has gathered, and for what is no parameter. After an exception inside of the block nothing is written.

    >>> with Init():
    ...     layer = nn.Linear(3, 2)
    >>> with GatheredParameters(layer.weight, modifier_rank=0):
    ...     _ = nn.init.ones_(layer.weight)
    >>> parameters(layer)["weight"].sum()
    tensor(6.)
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, Tensor) else list(params)
        for p in given:
            if not isinstance(p, nn.Parameter):
                raise ValueError(f"GatheredParameters: {type(p).__name__} is no parameter; pass module.parameters(), or zero.leaves(engine, pattern)")  # fmt: skip
        self.params = list(dict.fromkeys(given)) if enabled else []
        self.modifier_rank = modifier_rank
        self._away: list[tuple[nn.Parameter, nn.Parameter]] = []  # whole now; what it was
        self._before: list[Any] = []

    def __enter__(self) -> list[nn.Parameter]:
        for p in self.params:
            if getattr(p, _HOME, None) is _GATHERED:
                raise ValueError(f"GatheredParameters: a parameter {tuple(p.shape)} is gathered by an outer block already; gather it once")  # fmt: skip
            if p.is_meta and getattr(p, _HOME, None) is None:
                raise ValueError(f"GatheredParameters: a parameter {tuple(p.shape)} on the meta device, made by no zero.Init and attached to no engine")  # fmt: skip
        for home, params in self._homes().items():
            for p, value in zip(params, home.read(params) if home is not None else params, strict=True):
                if home is None:
                    continue
                whole = nn.Parameter(value, requires_grad=p.requires_grad)
                _swap(p, whole)
                self._away.append((p, whole))
        self._homes_of = {id(p): getattr(away, _HOME) for p, away in self._away}
        for p, _ in self._away:
            _tag(p, _GATHERED)
        self._before = [_digest(p) for p in self.params]
        return self.params

    def __exit__(self, kind: Any, *error: Any) -> None:
        values: dict[int, Tensor] = {}
        try:
            if kind is None:
                if self.modifier_rank is None:
                    self._check_unwritten()
                else:
                    values = {id(p): self._of_modifier(p) for p in self.params}
        finally:
            for p, away in self._away:
                _swap(p, away)
            self._away = []
        if values:
            for home, params in self._homes().items():
                if home is not None:
                    home.write(params, [values[id(p)] for p in params])

    def _homes(self) -> dict[Any, list[nn.Parameter]]:
        found: dict[Any, list[nn.Parameter]] = {}
        for p in self.params:
            found.setdefault(getattr(p, _HOME, None), []).append(p)
        return found

    def _check_unwritten(self) -> None:
        for p, before in zip(self.params, self._before, strict=True):
            if _digest(p) != before:
                raise ValueError(
                    f"GatheredParameters: a parameter {tuple(p.shape)} was written to, and without modifier_rank the write would be lost; give modifier_rank=0 on every rank"
                )

    def _of_modifier(self, p: nn.Parameter) -> Tensor:
        value = p.detach().contiguous()
        home = self._homes_of.get(id(p))
        group = None if home is None else home.group
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            src = self.modifier_rank if group is None else dist.get_global_rank(group, self.modifier_rank)  # pyright: ignore[reportArgumentType]
            dist.broadcast(value, src=src, group=group)
        return value


class _Gathered:
    """In the place of a home, while a parameter is whole."""


_GATHERED = _Gathered()


def _swap(p: nn.Parameter, other: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, other)


def _digest(x: Tensor) -> tuple[Any, ...]:
    """Numbers that tell values apart: a hash, which equal numbers cancel out of, and a sum."""
    x = x.detach()
    if not x.numel():
        return ()
    return int(torch.hash_tensor(x).view(torch.int64)), float(x.double().sum()).hex()
