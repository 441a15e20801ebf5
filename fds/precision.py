"""`cast`: compute in another dtype than parameters are stored in. `autocast`: let torch choose it for each operator."""

from collections.abc import Iterable
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fds import tree
from fds.frame import Apply, scoped
from fds.program import Lens, Program, same
from fds.transform import Transform, around, direct, parameters, through
from fds.tree import Params


@direct
def cast(dtype: torch.dtype | str, *, keep: str | Iterable[str] = (), stored: bool = False) -> Transform:
    """Compute with parameters in `dtype`; what is stored stays as it was, so the master weights are the stored ones.

    Gradients come back in the stored dtype. Outside of `shard` (later in the chain) the wire carries `dtype`; inside of it, the stored
    dtype. Floating-point arguments of the model are cast as well; buffers are not.

    Args:
        dtype: a floating dtype or its name, ``"bfloat16"``.
        keep: patterns of leaves that stay in the stored dtype (``"*norm*"``).
        stored: store `dtype` as well, as serving does; to train, see `optim.with_master`. Then `restore` gives the rounded values.

    Law: `restore` is exact, but with `stored`; `get` declares the dtype's epsilon as tolerance.
    """
    dtype = _dtype(dtype, "cast")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    options: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), **({"keep": keep} if keep else {})}
    options |= {"stored": True} if stored else {}

    def make(spec: Params) -> Lens | None:
        changed = {
            k
            for k, v in spec.items()
            if v.is_floating_point() and v.dtype != dtype and not any(tree.matches(p, k) for p in keep)
        }
        if not changed:
            return None

        def low(params: Params) -> Params:
            return {k: v.to(dtype) if k in changed else v for k, v in params.items()}

        def wide(params: Params) -> Params:
            return {k: v.to(spec[k].dtype) for k, v in params.items()}

        put, get, restore = (low, same, wide) if stored else (same, low, same)
        return Lens(put=put, get=get, restore=restore, tol=torch.finfo(dtype).eps, layout=same)

    def check(program: Program) -> None:
        if keep:
            tree.select(
                [k for p in (program.sites or {"": program}).values() for k in parameters(p)],
                keep,
                what="cast(keep=...)",
            )

    lens = through(make, name="cast", options=options, conflicts=["whole"], check=check)
    inputs = around(lambda apply: _cast_inputs(apply, dtype), name="cast", scope="root")
    return attrs.evolve(lens, wrap=inputs.wrap, scope="root")


@direct
def autocast(dtype: torch.dtype | str = "bfloat16") -> Transform:
    """Run the model's modules in `torch.autocast`: matrix products in `dtype`, what needs it (softmax, norms, losses) in float32, as torch's lists say.

    Parameters, gradients and the wire have the stored dtype; each use of a weight converts it. Wherever it stands in a chain, recompute runs
    in it too, and a loss that takes the output layer over (`losses.causal_lm`) calls it as autocast would. ``"float16"`` wants a
    `loss_scale` in training. ``at(pattern, autocast())`` is for the calls of some modules.

    Law: values and gradients are those of the module called in ``torch.autocast(device, dtype, cache_enabled=False)``, bitwise in eager.

    Raises `ValueError` for another dtype than bfloat16 and float16.
    """
    low = _dtype(dtype, "autocast")
    if low not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast: {dtype!r}, required bfloat16 or float16")

    def wrap(apply: Apply) -> Apply:
        def run(stored: Params, *args: Any, **kwargs: Any) -> Any:
            with scoped(autocast=low):
                return apply(stored, *args, **kwargs)

        return run

    options = {"dtype": str(low).removeprefix("torch.")}
    return around(wrap, name="autocast", scope="root", options=options, provides=["autocast"], conflicts=["autocast", "whole"])  # fmt: skip


@direct
def freeze() -> Transform:
    """The same program with nothing trainable, as serving has it.

    >>> import fds
    >>> program, _ = fds.functionalize(torch.nn.Linear(2, 2))
    >>> [x.requires_grad for x in freeze(program).spec[""].values()]
    [False, False]
    """

    def make(spec: Params) -> Lens:
        def put(params: Params) -> Params:
            return {k: v.detach() for k, v in params.items()}

        return Lens(put=put, get=same, restore=same, layout=same)

    return through(make, name="freeze", conflicts=["whole"])


def _dtype(dtype: torch.dtype | str, what: str) -> torch.dtype:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        names = ["bfloat16", "float16", "float32", "float64"]
        raise ValueError(f"{what}: {dtype!r} is not a floating dtype; {tree.suggest(str(dtype), names)}")
    return named


def _cast_inputs(apply: Apply, dtype: torch.dtype) -> Apply:
    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def run(stored: Params, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(convert, (args, kwargs))
        return apply(stored, *args, **kwargs)

    return run
