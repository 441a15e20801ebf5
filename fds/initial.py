"""Parameters as a module initialises them, made site by site: `init_params`. For modules that were built on the meta device.

What is run is what the module's own constructor would have run: ``reset_parameters`` of every module (torch's convention), then
``_init_weights(module)`` of the model around it (transformers' convention), from the inside to the outside. Only the leaves of one site are
real meanwhile; writes to the others, on the meta device, do nothing.
"""

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fds import tree
from fds._torch import named_modules, registries
from fds.leaves import Leaves
from fds.program import Program
from fds.tree import Params

Values = Callable[[str, Tensor], Tensor | None]


def init_params(
    program: Program, *, seed: int = 0, values: Values | None = None, device: torch.device | str = "cpu"
) -> Leaves:
    """The parameters of a program as its module initialises them; ``program.place`` or ``step.init`` takes them, site by site.

    So a module built under ``torch.device("meta")`` comes to be sharded: at no time a rank has more than what it stores, and one site. Buffers
    that the module has with values (built on a real device) are kept.

    Args:
        seed: of all leaves. Values depend on it and on a leaf's module, not on the mesh, nor on the order in which they are asked for.
        values: ``values(name, leaf)`` gives the values of a leaf like the meta tensor `leaf`, or None to leave it to the module. It may draw from
            torch's generator, which is seeded by `seed` and `name`.
        device: where leaves are handed out. They are made in host memory, so that they are the same everywhere.

    Raises:
        ValueError: when asked for a leaf that nothing initialises (a parameter or buffer that only a constructor computes); names all of the site.

    >>> import fds
    >>> with torch.device("meta"):
    ...     module = nn.Linear(3, 2)
    >>> program, _ = fds.functionalize(module)
    >>> stored = program.place(fds.init_params(program, seed=1))
    >>> bool((stored[""]["weight"].abs() < 3**-0.5).all())  # as nn.Linear draws them
    True
    """
    core: Any = program.origin.core
    if core is None:
        raise ValueError("init_params: this program was not made from a module")
    sites = {s: p.origin.spec for s, p in program.sites.items()}
    owner = {k: s for s, spec in sites.items() for k in spec}
    known: Params = {k: x for k, x in core.transient().items() if not x.is_meta}
    fresh: Params = {}  # of one site: those that nobody has asked for yet

    def make(name: str) -> Tensor:
        if name in known:
            return known[name].to(device)
        if name not in fresh:
            fresh.clear()
            spec = {k: v for k, v in sites[owner[name]].items() if k not in known}
            fresh.update(_of_site(core, owner[name], spec, seed, values))
        return fresh.pop(name).to(device)

    return Leaves(program.order, make, f"{core!r}, initialised by seed {seed}")


def _of_site(core: Any, site: str, spec: Params, seed: int, values: Values | None) -> Params:
    given: Params = {}
    for name, leaf in spec.items() if values is not None else ():
        with seeded(f"{seed}:{name}"), torch.no_grad():
            x = values(name, leaf.detach()) if values is not None else None
        if x is not None:
            tree.check_leaf(name, x, leaf, what="init_params: what values() gave")
            given[name] = x.detach()
    rest = {k: v for k, v in spec.items() if k not in given}
    return given | initialised(core, site, rest, seed, "init_params", "give them by values=lambda name, leaf: ...")


def initialised(core: Any, site: str, spec: Mapping[str, Tensor], seed: int, what: str, fix: str) -> Params:
    """These leaves of a site as the module initialises them. `ValueError` that says `fix` for those that it does not."""
    modules = dict(named_modules(core.module))
    slots = {name: (path, registry, key) for path, m in modules.items() for registry in registries(m) for key in registry if (name := f"{path}.{key}".lstrip(".")) in spec}  # fmt: skip
    inside = {path for path, _, _ in slots.values()}
    paths = [p for p in modules if any(p == i or i.startswith(p + ".") or not p for i in inside)]
    paths.sort(key=lambda p: -len(p.split(".")) if p else 0)  # from the inside to the outside
    held = {name: registry[key] for name, (_, registry, key) in slots.items()}
    out: Params = {}
    versions: dict[str, int] = {}
    try:
        for name, (_, registry, key) in slots.items():
            registry[key] = x = _blank(spec[name])
            versions[name] = x._version
        with torch.no_grad(), torch.device("cpu"):
            for run in _reset, _init_weights:
                for path in paths:
                    of = path if path.startswith(site + ".") or path == site else f"{path} for {site}"
                    with seeded(f"{seed}:{of}"):
                        run(modules, path)
        for name, (_, registry, key) in slots.items():
            out[name] = registry[key].detach()
            tree.check_leaf(name, out[name], spec[name], what=f"{what}: what the module initialises")
    finally:
        for name, (_, registry, key) in slots.items():
            registry[key] = held[name]
    unset = [k for k, x in out.items() if not _written(x, versions[k])]
    if unset:
        raise ValueError(
            f"{what}: nothing initialises {', '.join(map(repr, unset))}: no reset_parameters() of a module and no _init_weights(module) of {core!r} writes to them (all of them); {fix}"
        )
    return out


def _reset(modules: Mapping[str, nn.Module], path: str) -> None:
    """What torch's modules do at the end of their constructors."""
    m: Any = modules[path]
    reset = getattr(m, "reset_parameters", None) or getattr(m, "_reset_parameters", None)
    if callable(reset):
        reset()


def _init_weights(modules: Mapping[str, nn.Module], path: str) -> None:
    """What the model around a module does to it; where models are inside of each other, the innermost one."""
    around = path
    while True:
        initialise: Any = getattr(modules[around], "_init_weights", None)
        if callable(initialise) and _takes_one(initialise):
            initialise(modules[path])
            return
        if not around:
            return
        around = around.rpartition(".")[0]


def _takes_one(f: Callable[..., Any]) -> bool:
    try:
        inspect.signature(f).bind(None)
    except TypeError:
        return False
    return True


@contextmanager
def seeded(what: str) -> Iterator[None]:
    """Torch's generator for host memory, which the initialisers of modules draw from, at a place of its own; put back afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(zlib.crc32(what.encode()))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _blank(leaf: Tensor) -> Tensor:
    """A real tensor in the place of a leaf, that shows what was not written: NaN, or the smallest number."""
    x = torch.full(leaf.shape, _unwritten(leaf.dtype), dtype=leaf.dtype, device="cpu")
    return nn.Parameter(x, requires_grad=leaf.requires_grad) if isinstance(leaf, nn.Parameter) else x


def _unwritten(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return dtype != torch.bool and torch.iinfo(dtype).min


def _written(x: Tensor, version: int) -> bool:
    if x.is_floating_point() or x.is_complex():
        return not bool(x.isnan().any())
    return not x.numel() or x._version != version or bool((x != _unwritten(x.dtype)).any())
