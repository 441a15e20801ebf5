"""`use`: a model's own modules computed by an operator."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fds import tree
from fds.frame import Apply
from fds.kernels.glu import geglu, swiglu
from fds.kernels.norms import layer_norm, rms_norm
from fds.transform import Transform, around, direct

Call = Callable[[dict[str, Tensor], Tensor], Tensor]  # (the module's leaves by their names in it, x) -> y


def _epsilon(module: nn.Module) -> float | None:
    return next(
        (getattr(module, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(module, n, None), float)), None
    )


def _rms(offset: float) -> Callable[[nn.Module], Call | None]:
    def form(module: nn.Module) -> Call | None:
        eps = _epsilon(module)
        return None if eps is None else lambda leaves, x: rms_norm(x, leaves["weight"], eps=eps, offset=offset)

    return form


def _layer(module: nn.Module) -> Call | None:
    eps = _epsilon(module)
    return None if eps is None else lambda leaves, x: layer_norm(x, leaves["weight"], leaves.get("bias"), eps=eps)


def _gated(unit: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module], Call | None]:
    def run(leaves: dict[str, Tensor], x: Tensor) -> Tensor:
        gate, up, down = ((leaves[f"{n}_proj.weight"], leaves.get(f"{n}_proj.bias")) for n in ("gate", "up", "down"))
        return F.linear(unit(F.linear(x, *gate), F.linear(x, *up)), *down)

    return lambda module: run


# The forms that a module may have; the one that gives its values is taken.
_FORMS: dict[str, tuple[Callable[[nn.Module], Call | None], ...]] = {
    "rms_norm": (_rms(0.0), _rms(1.0)),
    "layer_norm": (_layer,),
    "swiglu": (_gated(swiglu),),
    "geglu": (_gated(geglu), _gated(lambda gate, up: geglu(gate, up, approximate="tanh"))),
}


@direct
def use(name: str) -> Transform:
    """Compute modules by operator `name`, in place of their own forward: ``at("*norm", use("rms_norm"))(program)``.

    Names: "rms_norm", "layer_norm" (norms), "swiglu", "geglu" (gated feed-forward layers with gate_proj, up_proj, down_proj).

    Each module that the pattern of `at` names is compared with the operator on random numbers, when the transformation is applied.
    `ValueError` for one that computes something else, and without `at`.

    Law: values and gradients are those of the program without it, to the rounding of the dtype.
    """
    if name not in _FORMS:
        raise ValueError(f"kernels.use: {name!r} replaces no module; {tree.suggest(name, _FORMS)}")
    return around(_Use(name), name="use", options={"name": name}, conflicts=["whole"])


@attrs.frozen
class _Use:
    """The wrapper of a module's call, once it knows which module."""

    name: str

    def __call__(self, apply: Apply) -> Apply:
        raise ValueError(f"kernels.use({self.name!r}): which modules? as in at('*norm', use({self.name!r}))")

    def bind(self, core: Any, path: str) -> Callable[[Apply], Apply]:
        call, names = _call(self.name, core, path)
        if call is None:
            raise ValueError(
                f"kernels.use({self.name!r}): {path} ({type(core.module.get_submodule(path)).__name__}) computes something else; narrow the pattern of at(...) to the modules that it fits"
            )

        def run(leaves: dict[str, Tensor], x: Tensor) -> Tensor:
            return call({n: leaves[full] for n, full in names.items()}, x)

        return lambda apply: run


def _call(name: str, core: Any, path: str) -> tuple[Call | None, dict[str, str]]:
    """The form of an operator that gives a module's values, and the names of the module's leaves."""
    module = core.module.get_submodule(path)
    names = {n: core.first_name(f"{path}.{n}") for n, _ in module.named_parameters()}
    forms = (form(module) for form in _FORMS[name])
    return next((c for c in forms if c and _agrees(core, path, module, names, c)), None), names


def fits(name: str, core: Any, path: str) -> str:
    """Why operator `name` cannot take the place of the module at `path`; empty if it can."""
    module, (call, _) = core.module.get_submodule(path), _call(name, core, path)
    if call is not None:
        return ""
    kind = type(module).__name__
    return f"{kind} has no parameters" if not list(module.parameters()) else f"{kind} gives other values than {name}"


def _agrees(core: Any, path: str, module: nn.Module, names: dict[str, str], call: Call) -> bool:
    """Whether `call` gives the module's values, on random numbers."""
    g = torch.Generator().manual_seed(0)
    own = {n: torch.randn(p.shape, generator=g) for n, p in module.named_parameters()}
    if not own:
        return False
    x = torch.randn(3, next(iter(own.values())).shape[-1], generator=g)
    leaves = {names[n]: t for n, t in own.items()}
    leaves |= {core.first_name(f"{path}.{n}"): torch.zeros_like(b, device="cpu") for n, b in module.named_buffers()}
    try:
        with torch.no_grad():
            got, want = call(own, x), core.call(path, leaves, x)
    except (KeyError, TypeError, ValueError, RuntimeError):  # it has other parameters or arguments
        return False
    return isinstance(want, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
