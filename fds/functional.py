"""From modules to programs: `functionalize`.

The user's module is copied once, without its tensors, to a private skeleton on the meta device. A call swaps leaves into the skeleton's
registries, runs the original forward, and swaps them out again. Where a block is called, a dispatcher looks in the frame for the program
that answers there; this is how transformations act on blocks without a hook or a patch on anybody's module.
"""

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fds import tree
from fds._torch import named_modules, registries, relist_weights, transient_buffers, writes_statistics
from fds.frame import FRAME, Draws, Head, scoped
from fds.program import Mutated, Program, assemble
from fds.randomness import randomness
from fds.tree import Params

_NESTED = "{name}: {cls} checkpoints inside itself, which recomputes with the wrong weights in a pure function; turn it off ({fix}) and use fds.checkpoint()"


def functionalize(module: nn.Module, *, sites: str | Iterable[str] | None = None) -> tuple[Program, Params]:
    """Make a module into a pure program and its parameters: ``program(program.place(params), *args) == module(*args)``.

    Args:
        module: any `nn.Module`, also on the meta device. It is not changed, then or later; `params` are its own tensors, detached.
        sites: patterns of the module paths at which transformations act. Default: the model's transformer blocks (its
            `_no_split_modules`, else its `GradientCheckpointingLayer`s, else the children of its longest `nn.ModuleList`).

    Returns:
        The program, and ``{path: tensor}`` of all parameters and buffers, non-persistent ones included. Tied leaves appear once, under
        their first name. Parameters with ``requires_grad=False`` are frozen in the program. Key-value caches are off in it
        (`generate` turns them on); training mode is the module's own (see `Program.train`).

    Raises:
        ValueError: not a module; a module that checkpoints inside itself; a pattern of `sites` that matches nothing.

    >>> import fds, torch
    >>> program, params = fds.functionalize(torch.nn.Linear(2, 3))
    >>> {k: tuple(v.shape) for k, v in params.items()}
    {'weight': (3, 2), 'bias': (3,)}
    """
    _check_module(module)
    leaves = _Leaves.of(module)
    paths = _find_sites(module) if sites is None else _select_sites(module, sites)
    return ModuleCore(module, leaves.light(), paths).program, dict(leaves.tensors)


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"functionalize: got {type(module).__name__}, required a torch.nn.Module; build the model first, then pass it here"
        )
    for name, m in named_modules(module):
        if getattr(m, "gradient_checkpointing", False):
            raise ValueError(
                _NESTED.format(
                    name=name or "module", cls=type(m).__name__, fix="model.gradient_checkpointing_disable()"
                )
            )


@attrs.frozen
class _Leaves:
    """The leaves of a module: each tensor once, under its first name, with all the names it goes by."""

    tensors: dict[str, Tensor]
    first: dict[str, str]  # any name -> first name
    marks: dict[str, frozenset[str]]

    def light(self) -> "_Leaves":
        """What a program keeps: real tensors only of what no file holds. Anything more would keep the whole model alive on every rank."""
        kept = {k: t if k in self.marks["transient"] else _abstract(t) for k, t in self.tensors.items()}
        return attrs.evolve(self, tensors=kept)

    @staticmethod
    def of(module: nn.Module) -> "_Leaves":
        known: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        first: dict[str, str] = {}
        parameters = list(module.named_parameters(remove_duplicate=False))
        for name, t in [*parameters, *module.named_buffers(remove_duplicate=False)]:
            first[name] = known.setdefault(id(t), name)
            tensors.setdefault(first[name], t.detach())
        buffers = tensors.keys() - {first[n] for n, _ in parameters}
        return _Leaves(
            tensors,
            first,
            {
                "buffer": frozenset(buffers),
                "transient": _transient(module) & frozenset(tensors),
                "transposed": _transposed(module, first),
                "lookup": frozenset(
                    first[f"{p}.weight"]
                    for p, m in named_modules(module)
                    if isinstance(m, nn.Embedding | nn.EmbeddingBag)
                ),
            },
        )


def _transient(module: nn.Module) -> frozenset[str]:
    return frozenset(f"{p}.{k}".lstrip(".") for p, m in named_modules(module) for k in transient_buffers(m))


def _transposed(module: nn.Module, first: Mapping[str, str]) -> frozenset[str]:
    """Weights stored as [in, out]: transformers' Conv1D, known by name so that the core does not import transformers."""
    return frozenset(
        first[f"{p}.weight"] for p, m in named_modules(module) if type(m).__name__ == "Conv1D" and hasattr(m, "nf")
    )


def _output_layer(module: nn.Module) -> str | None:
    """The path of the plain linear layer that a language model ends with (transformers names it), or None."""
    ask = getattr(module, "get_output_embeddings", None)
    layer = ask() if callable(ask) else None
    return next((n for n, m in named_modules(module) if m is layer), None) if type(layer) is nn.Linear else None


def _hand_over(layer: nn.Module, hidden: Tensor) -> Tensor:
    parameters, _ = registries(layer)
    weight, bias = parameters["weight"], parameters["bias"]
    if (low := FRAME.get().autocast) is not None:  # as the layer would have been called with
        hidden, weight, bias = hidden.to(low), weight.to(low), None if bias is None else bias.to(low)
    logits = hidden.new_zeros(()).expand(*hidden.shape[:-1], weight.shape[0])
    heads = FRAME.get().heads
    assert heads is not None
    heads.append(Head(hidden, weight, bias, logits))
    return logits


def _find_sites(module: nn.Module) -> list[str]:
    blocks = {c for m in module.modules() for c in (getattr(m, "_no_split_modules", None) or ())}
    named = [(n, m) for n, m in named_modules(module) if n]
    found = [n for n, m in named if type(m).__name__ in blocks]
    found = found or [n for n, m in named if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    if not found:
        lists = [(n, m) for n, m in named if isinstance(m, nn.ModuleList)]
        longest = max(lists, key=lambda x: len(x[1]), default=None)
        found = [f"{longest[0]}.{i}" for i in range(len(longest[1]))] if longest else []
    return [n for n in found if not any(n.startswith(o + ".") for o in found)]


def _select_sites(module: nn.Module, patterns: str | Iterable[str]) -> list[str]:
    names = [n for n, _ in named_modules(module) if n]
    found = [n for n in tree.select(names, patterns, what="sites")]
    return [n for n in found if not any(n.startswith(o + ".") for o in found)]


@attrs.frozen
class _Slot:
    """A place in a module's registry that a leaf goes into for the time of a call."""

    registry: dict[str, Any]
    key: str
    leaf: str
    buffer: bool
    written: bool = (
        False  # by an operator that does not count it as a change (batch normalisation's running statistics)
    )


class ModuleCore:
    """The skeleton of a module, and the calls into it. One per (module, training mode); shared by all programs made from it."""

    def __init__(self, module: nn.Module, leaves: _Leaves, sites: list[str]) -> None:
        memo = {id(t): _abstract(t) for t in [*module.parameters(), *module.buffers()]}
        self._pristine = copy.deepcopy(module, dict(memo))
        self.skeleton = copy.deepcopy(module, dict(memo))
        self._leaves, self.sites = leaves, sites
        self._modules = dict(named_modules(self.skeleton))
        self._forwards: dict[str, Callable[..., Any]] = {}
        self._slots: dict[str, list[_Slot]] = {}
        for m in self._modules.values():
            config: Any = getattr(m, "config", None)
            if getattr(config, "use_cache", None):
                config.use_cache = False
        self.owner = self._owners()
        self.head: str | None = _output_layer(self.skeleton)
        for path in [*sites, *([self.head] if self.head is not None else [])]:
            self.intercept(path)
        self.program = self._program(memo)

    def __repr__(self) -> str:
        return type(self.skeleton).__name__

    @property
    def config(self) -> Any:
        """The model's own configuration object (transformers), or None."""
        return getattr(self._pristine, "config", None)

    @property
    def module(self) -> nn.Module:
        """The module on the meta device, untouched: for its class, configuration and attributes."""
        return self._pristine

    def part(self, path: str) -> nn.Module:
        """The skeleton's module at `path`, for a wrapper that changes an attribute of it (a number of heads) for the time of a call."""
        return self._modules[path]

    def first_name(self, name: str) -> str:
        """The name under which a leaf is kept, for any name it goes by."""
        return self._leaves.first.get(name, name)

    def transient(self) -> Params:
        """The buffers that files do not hold, as they were in the module."""
        return {k: self._leaves.tensors[k] for k in self._leaves.marks["transient"]}

    def with_training(self, training: bool) -> Program:
        if self._pristine.training == training and all(m.training == training for m in self._pristine.modules()):
            return self.program
        module = copy.deepcopy(
            self._pristine, {id(t): t for t in [*self._pristine.parameters(), *self._pristine.buffers()]}
        )
        return ModuleCore(module.train(training), self._leaves, self.sites).program

    def modules(self, site: str) -> list[str]:
        """Paths of the modules strictly inside of a site (for the root: outside of all sites)."""
        inside = [m for m in self._modules if m and (m.startswith(site + ".") if site else True)]
        return inside if site else [m for m in inside if not any(m == s or m.startswith(s + ".") for s in self.sites)]

    def _owners(self) -> dict[str, str]:
        """The site of every leaf: the one that contains all of its names, else the root."""
        owner: dict[str, str] = {}
        for name, first in self._leaves.first.items():
            site = next((s for s in self.sites if name.startswith(s + ".")), "")
            owner[first] = site if owner.get(first, site) == site else ""
        return owner

    def _program(self, memo: Mapping[int, Tensor]) -> Program:
        spec = {
            self._leaves.first[n]: t for n, t in [*self._pristine.named_parameters(), *self._pristine.named_buffers()]
        }
        blank = Program(
            {}, _identity, _identity, _identity, marks=self._leaves.marks, core=self, order=tuple(self._leaves.tensors)
        )
        own = {s: {n: spec[n] for n in self._leaves.tensors if self.owner[n] == s} for s in ["", *self.sites]}
        return assemble({s: self._site(s, own[s], blank) for s in own}, blank)

    def _site(self, site: str, spec: Params, blank: Program) -> Program:
        def place(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            for name, leaf in spec.items():
                tree.check_leaf(name, params[name], leaf, what="place")
            return params

        def apply(leaves: Params, *args: Any, _borrowed: Params | None = None, **kwargs: Any) -> Any:
            return self.call(site, {**leaves, **(_borrowed or {})}, *args, **kwargs)

        return attrs.evolve(blank, spec=spec, place=place, apply=apply)

    # --- calls ---

    def intercept(self, path: str) -> None:
        """Let the frame answer calls of the module at `path`; without an answer the module's own forward runs."""
        if path in self._forwards:
            return
        module = self._modules[path]
        self._forwards[path] = module.forward

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            frame = FRAME.get()
            if path in frame.sites:
                return self._enter_site(path, args, kwargs)
            if path in frame.wraps:
                return self._enter_wrapped(path, args, kwargs)
            if path == self.head and frame.heads is not None and not kwargs:
                return _hand_over(module, *args)
            return self._forwards[path](*args, **kwargs)

        module.forward = dispatch

    def _enter_site(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = FRAME.get()
        frame.calls[path] = frame.calls.get(path, 0) + 1
        apply, stored = frame.sites[path]
        borrowed = {s.leaf: frame.leaves[s.leaf] for s in self._slots_of(path) if self.owner[s.leaf] != path}
        if borrowed:  # explicit, so that recompute can differentiate by what a site is tied to
            kwargs["_borrowed"] = borrowed
        if path in frame.pending:
            stored = {**stored, **frame.pending[path]}
        with scoped(salt=zlib.crc32(f"{path}#{frame.calls[path]}".encode()), calls={}, draws=Draws()):
            out = apply(stored, *args, **kwargs)
        if not isinstance(out, Mutated):
            return out
        frame.pending.setdefault(path, {}).update(out.updates)
        return out.out

    def _enter_wrapped(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module inside a site through its wrappers, handing it the leaves that are swapped in right now."""
        frame, slots = FRAME.get(), self._slots_of(path)
        leaves = {s.leaf: s.registry[s.key] for s in slots}
        leaves |= {k: v for k, v in frame.leaves.items() if k.startswith(path + ".") and k not in leaves}

        def call(leaves: Params, *args: Any, **kwargs: Any) -> Any:
            return self.call(path, leaves, *args, **kwargs)

        apply = call
        for wrap in frame.wraps[path]:
            apply = wrap(apply)
        out = apply(leaves, *args, **kwargs)
        if isinstance(out, Mutated):
            for s in slots:
                if s.leaf in out.updates:
                    s.registry[s.key] = out.updates[s.leaf]
            return out.out
        return out

    def _slots_of(self, path: str) -> list[_Slot]:
        if path not in self._slots:
            self._slots[path] = list(self._find_slots(path))
        return self._slots[path]

    def _find_slots(self, path: str) -> Iterable[_Slot]:
        for name in [path, *self.modules(path)]:
            m = self._modules[name]
            for registry, buffer in zip(registries(m), (False, True), strict=True):
                for key, t in registry.items():
                    if t is not None:
                        leaf = self._leaves.first[f"{name}.{key}".lstrip(".")]
                        yield _Slot(registry, key, leaf, buffer, buffer and writes_statistics(m))

    def call(self, path: str, leaves: Params, *args: Any, **kwargs: Any) -> Any:
        """Run the module at `path` with `leaves` in its registries. Buffers are copied first: a forward may write to them."""
        module, slots = self._modules[path], self._slots_of(path)
        self._check_extras(path, leaves, slots)
        held = [s.registry[s.key] for s in slots]
        copies: dict[str, tuple[Tensor, int]] = {}
        for s in slots:
            s.registry[s.key] = leaf = leaves[s.leaf]
            if s.buffer:
                s.registry[s.key] = leaf = leaf.detach().clone()
                copies[s.leaf] = (leaf, leaf._version)
        _refresh_flat_weights(module)
        try:
            with scoped(leaves=leaves, training=module.training), randomness(module.training), _autocast(leaves):
                out = self._forwards[path](*args, **kwargs) if path in self._forwards else module(*args, **kwargs)
            updates = {s.leaf: s.registry[s.key] for s in slots if s.buffer and _changed(s, *copies[s.leaf])}
        finally:
            for s, t in zip(slots, held, strict=True):
                s.registry[s.key] = t
            _refresh_flat_weights(module)
        return Mutated(out, updates) if updates else out

    def _check_extras(self, path: str, leaves: Params, slots: list[_Slot]) -> None:
        """A leaf that no slot takes has to belong to a wrapped module, which takes it out itself."""
        wraps = FRAME.get().wraps
        known = {s.leaf for s in slots}
        for name in leaves:
            if name not in known and self.owner.get(name) != path and not any(name.startswith(w + ".") for w in wraps):
                raise ValueError(
                    f"{name}: no parameter of {path or repr(self)} takes this leaf; the outermost `get` has to return the names that the module declares"
                )


def _changed(slot: _Slot, copy: Tensor, version: int) -> bool:
    return slot.written or slot.registry[slot.key] is not copy or copy._version != version


def _autocast(leaves: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """`torch.autocast` as the frame says. Without its cache of converted weights, which would outlive a trace."""
    low = FRAME.get().autocast
    if low is None:
        return nullcontext()
    device = next((t.device.type for t in leaves.values() if not t.is_meta), "cpu")
    return torch.autocast(device, dtype=low, cache_enabled=False)


def _identity(x: Any) -> Any:
    return x


def _abstract(t: Tensor) -> Tensor:
    meta = torch.empty(t.shape, dtype=t.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else meta


def _refresh_flat_weights(module: nn.Module) -> None:
    """Recurrent layers keep a second list of their weights; point it at what is in the registry now."""
    if not isinstance(module, nn.RNNBase) and not any(isinstance(m, nn.RNNBase) for m in module.children()):
        return
    for m in module.modules():
        if isinstance(m, nn.RNNBase):
            relist_weights(m)
