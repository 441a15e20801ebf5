"""`zero.GatheredParameters`: parameters whole for the time of a block; and the same of a state as pure functions."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fds import tree
from fds.deepspeed.zero_init import HOME
from fds.frame import FRAME
from fds.layout import Part, whole
from fds.program import Program
from fds.transform import parameters as parameters_of
from fds.tree import Params, Stored


class Home(Protocol):
    """Where the values of parameters are that a module has only in name."""

    @property
    def group(self) -> Any: ...
    def read(self, params: Sequence[nn.Parameter]) -> list[Tensor]: ...
    def write(self, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None: ...


def gathered(program: Program, stored: Stored, patterns: str | Iterable[str]) -> Params:
    """The logical leaves that the patterns name, whole, on every rank; one site at a time is whole. Every rank has to call it."""
    names = tree.select(program.order, patterns, what="gathered")
    of = _sites(program, names)
    out: Params = {}
    for s, own in of.items():
        full = program.sites[s].restore(stored[s])
        out |= {k: full[k].detach().clone() for k in own}
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
    kinds = {k: (x.shape, x.dtype) for k, x in own.items()}
    if layout is not None and (
        layout.boxes is None or kinds != {k: (x.shape, x.dtype) for k, x in layout.spec.items()}
    ):
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
        _set_home(p, home)


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

    In the forward of a module that a program runs it does nothing: what the running site uses is there. To write there is an error.

    >>> from fds.deepspeed.zero import Init, parameters
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
        if FRAME.get().running is not None:  # a module of a program has its leaves while it runs
            _check_running(given, modifier_rank)
            given = []
        for p in given:
            if not isinstance(p, nn.Parameter):
                raise ValueError(f"GatheredParameters: {type(p).__name__} is no parameter; pass module.parameters(), or zero.leaves(engine, pattern)")  # fmt: skip
        self.params = list(dict.fromkeys(given)) if enabled else []
        self.modifier_rank = modifier_rank
        self._away: list[tuple[nn.Parameter, nn.Parameter]] = []  # whole now; what it was
        self._before: list[Any] = []

    def __enter__(self) -> list[nn.Parameter]:
        for p in self.params:
            if getattr(p, HOME, None) is _GATHERED:
                raise ValueError(f"GatheredParameters: a parameter {tuple(p.shape)} is gathered by an outer block already; gather it once")  # fmt: skip
            if p.is_meta and getattr(p, HOME, None) is None:
                raise ValueError(f"GatheredParameters: a parameter {tuple(p.shape)} on the meta device, made by no zero.Init and attached to no engine")  # fmt: skip
        for home, params in self._homes().items():
            for p, value in zip(params, home.read(params) if home is not None else params, strict=True):
                if home is None:
                    continue
                real = nn.Parameter(value, requires_grad=p.requires_grad)
                _swap(p, real)
                self._away.append((p, real))
        self._homes_of = {id(p): getattr(away, HOME) for p, away in self._away}
        for p, _ in self._away:
            _set_home(p, _GATHERED)
        self._before = [_digest(p) for p, _ in self._away]
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

    def _homes(self) -> dict[Home | None, list[nn.Parameter]]:
        found: dict[Home | None, list[nn.Parameter]] = {}
        for p in self.params:
            found.setdefault(getattr(p, HOME, None), []).append(p)
        return found

    def _check_unwritten(self) -> None:
        for (p, _), before in zip(self._away, self._before, strict=True):
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
            if home is None:
                p.detach().copy_(value)
        return value


def _set_home(p: nn.Parameter, home: Any) -> None:
    setattr(p, HOME, home)


def _check_running(given: Sequence[Tensor], modifier_rank: int | None) -> None:
    if modifier_rank is not None:
        raise ValueError("GatheredParameters: a write inside of a program's call; write between calls, to the state")
    for p in given:
        if p.is_meta:
            raise ValueError(
                f"GatheredParameters: a parameter {tuple(p.shape)} of another site than the one that runs; pass functionalize(sites=...) blocks that hold what they use"
            )


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
