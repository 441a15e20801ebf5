"""Low-rank adapters as a lens: W is stored as {W, A, B} and seen as W + s * B @ A.

With `dora` it is stored as {W, A, B, m} and seen as rows of the lengths m in the directions of W + s * B @ A.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.frame import FRAME, Apply, Wrap
from fds.program import Lens, Program
from fds.randomness import dropout
from fds.transform import Transform, around_site, chain, direct, parameters, whole
from fds.tree import Params


def _tuple(targets: str | Iterable[str]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) or not isinstance(targets, Iterable) else tuple(targets)


@attrs.frozen
class Lora:
    """The settings of adapters, as PEFT names them."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = attrs.field(converter=_tuple)
    dropout: float = 0.0
    rslora: bool = False
    seed: int = 0
    dora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def printed(self) -> Any:
        """The targets as somebody would write them."""
        return self.targets[0] if len(self.targets) == 1 else self.targets


@attrs.frozen(repr=False)
class Adapting(Transform):
    """A transformation that stores adapters at the linear layers that its settings name: what `lora` and `inference.adapters` share."""

    settings: Lora = attrs.field(kw_only=True)
    # weight, and whether it is [in, out] -> a wrapper of its layer's call; None: the lens does it all
    beside: Callable[[str, bool], Wrap] | None = attrs.field(kw_only=True, eq=False)

    def _on_site(self, site: str, p: Program) -> Program:
        new = super()._on_site(site, p)
        for name in targets_of(self.settings, p) if self.beside else ():
            assert self.beside is not None
            wrap = self.beside(name, name in p.marks.get("transposed", ()))
            new = around_site(site, new, wrap, name.rpartition(".")[0])
        return new


def adapting(
    name: str, settings: Lora, options: Mapping[str, Any], lens: Callable[[Program], Lens], beside: Callable[[str, bool], Wrap] | None = None,
) -> Adapting:  # fmt: skip
    """The transformation `name`: one to a program, before anything that splits or joins leaves; targets are checked."""
    if not settings.targets or not all(isinstance(x, str) for x in settings.targets):
        raise ValueError(f"{name}: targets={settings.printed!r}, required a pattern or several, as '*.q_proj'")
    return Adapting(
        name, tuple(options.items()), lens=lens, provides=frozenset([name]), conflicts=frozenset(["flat", name, "tensor", "whole"]),
        check=partial(check_targets, name, settings), settings=settings, beside=beside,
    )  # fmt: skip


@direct
def lora(
    *,
    rank: int,
    targets: str | Iterable[str],
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
) -> Transform:
    """Freeze every parameter and train low-rank adapters of the chosen weights instead: W' = W + s * B @ A.

    Args:
        rank: rows of A [rank, in] and columns of B [out, rank].
        targets: patterns of modules or leaves; each has to match, and only 2-D weights of linear layers (and GPT-2's Conv1D) can be adapted.
        alpha: s = alpha / rank. Default: rank, so s = 1.
        dropout: on the adapter's input in training mode; then the adapter runs beside the layer, ``y + s * (drop(x) A^T) B^T``.
        rslora: s = alpha / sqrt(rank).
        dora: train the length of each output's weights too: W' = m * V / |V|, V = W + s * B @ A, with m [out] and |V| by row. |V| is a
            constant to the gradient, as the paper proposes and PEFT does it. A layer that `tensor_parallel` splits by inputs sums |V|^2
            over its ranks.
        seed: of the initial A (Kaiming uniform, as in PEFT; B is zero, m is |W|), per leaf, so that every rank and layout starts alike.

    W' is computed in float32 at least and rounded once to W's dtype.

    Law: ``restore(place(p)) == p``, as B starts at zero; `restore` of trained parameters gives the fused weights.
    Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353.
    """
    tree.positive("lora: rank", rank)
    for name, value, fine, want in (
        ("alpha", rank if alpha is None else alpha, math.isfinite, "finite"),
        ("dropout", dropout, lambda p: 0.0 <= p < 1.0, "0 <= dropout < 1"),
    ):  # fmt: skip
        if not isinstance(value, int | float) or not fine(value):
            raise ValueError(f"lora: {name}={value!r}, required a number, {want}")
    settings = Lora(rank, float(rank if alpha is None else alpha), targets, dropout, rslora, seed, dora)
    options: dict[str, Any] = {"rank": rank, "targets": settings.printed, "alpha": settings.alpha}
    more = (("dropout", dropout), ("rslora", rslora), ("dora", dora), ("seed", seed))
    options |= {k: v for k, v in more if v}
    # With dropout the adapter is applied beside the layer, which finds A and B among its leaves.
    beside = partial(_beside, settings) if dropout else None
    return adapting("lora", settings, options, partial(_lens, settings), beside)


@direct
def fuse_lora() -> Transform:
    """The same program with the adapters fused into the weights: stored W' as `lora` computes it, one rounding, nothing trainable.

    ``relayout(train, fuse_lora()(train))(stored)`` gives its parameters. The base weights are never written: to go on training, go on
    with `stored`. Sites without adapters are the same tensors in both.
    """

    def rewrite(program: Program) -> Program:
        done = [
            attrs.evolve(t, name="fused_lora", lens=_frozen, provides=frozenset(), beside=None)
            if isinstance(t, Adapting) and t.name == "lora"
            else t
            for t in program.history
        ]
        return chain(*done)(program.origin)

    return attrs.evolve(whole(rewrite, name="fuse_lora", requires=["lora"], conflicts=["whole"]), rewrite=rewrite)


def check_targets(what: str, settings: Lora, program: Program) -> None:
    """Raise `ValueError` unless every pattern names a weight of a linear layer."""
    spec = {k: v for p in (program.sites or {"": program}).values() for k, v in parameters(p).items()}
    lookup = program.marks.get("lookup", frozenset())
    for pattern in settings.targets:
        chosen = tree.select(spec, pattern, what=f"{what} targets")
        if not any(_is_linear(k, spec[k], lookup) for k in chosen):
            first = chosen[0]
            raise ValueError(
                f"{what} targets: {pattern!r} matches no weight of a linear layer ({first} is {'an embedding' if first in lookup else tuple(spec[first].shape)}); name linear layers, as '*.q_proj'"
            )


def _is_linear(name: str, leaf: Tensor, lookup: frozenset[str]) -> bool:
    return leaf.dim() == 2 and name.endswith("weight") and name not in lookup


def targets_of(settings: Lora, p: Program) -> list[str]:
    """The weights at a site that the settings name."""
    return [
        k
        for k, v in parameters(p).items()
        if _is_linear(k, v, p.marks.get("lookup", frozenset())) and any(tree.matches(t, k) for t in settings.targets)
    ]


def adapter_names(weight: str) -> tuple[str, str]:
    """The names of A and B beside a weight, as PEFT files have them.

    >>> adapter_names("h.0.q_proj.weight")
    ('h.0.q_proj.lora_A.weight', 'h.0.q_proj.lora_B.weight')
    """
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def names_in_files(weight: str, dora: bool) -> tuple[str, ...]:
    """The names of A, B, and with DoRA m, of a weight."""
    magnitude = f"{weight.removesuffix('.weight')}.lora_magnitude_vector"
    return (*adapter_names(weight), *([magnitude] if dora else []))


def is_adapter(leaf: str) -> bool:
    """Whether a leaf belongs to an adapter that files hold."""
    return leaf.endswith((".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"))


def _initial(settings: Lora, name: str, weight: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """A, B, and with DoRA m."""
    out, width = weight.shape[::-1] if transposed else weight.shape
    a = torch.empty(settings.rank, width, dtype=weight.dtype, device=weight.device)
    if not a.is_meta:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed}:{name}".encode()))
        bound = 1 / math.sqrt(width)  # Kaiming uniform with a = sqrt(5), as nn.Linear
        a = torch.empty(a.shape).uniform_(-bound, bound, generator=generator).to(weight)
    b = weight.new_zeros(out, settings.rank)
    if not settings.dora:
        return a, b
    return a, b, _lengths(weight.to(_wide(weight)), transposed).to(weight.dtype)


def _wide(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _lengths(weight: Tensor, transposed: bool, axis: Any = None) -> Tensor:
    """The norm of the weights of each output [out]. `axis`: over whose ranks these weights are split."""
    lengths = torch.linalg.vector_norm(weight, dim=0 if transposed else 1)
    if axis is None:
        return lengths
    from fds.sharding import collectives

    return collectives.total(lengths.square(), axis).sqrt()


def _adapted(settings: Lora, name: str, leaves: Params, transposed: bool, *, traced: bool = True) -> Tensor:
    """W', in float32 at least. Not `traced`: nothing is recorded, and one tensor made."""
    a, b, *magnitude = (leaves[n] for n in names_in_files(name, settings.dora))
    v = _direction(settings, leaves[name], a, b, transposed, traced=traced)
    if not settings.dora:
        return v
    gain = _gain(magnitude[0], v, transposed, FRAME.get().rows.get(name))
    gain = gain if transposed else gain[:, None]
    return v * gain if traced else v.mul_(gain)


def _direction(settings: Lora, weight: Tensor, a: Tensor, b: Tensor, transposed: bool, *, traced: bool) -> Tensor:
    """W + s * B @ A, in float32 at least."""
    wide = _wide(weight, a, b)
    a, b = a.to(wide), b.to(wide)
    product = a.T @ b.T if transposed else b @ a
    return weight.to(wide) + settings.scale * product if traced else product.mul_(settings.scale).add_(weight)


def _gain(magnitude: Tensor, v: Tensor, transposed: bool, axis: Any = None) -> Tensor:
    """m / |V| [out]: 1 to the bit where |V| rounds to m, as it does at the start."""
    lengths = _lengths(v.detach(), transposed, axis).to(magnitude.dtype).to(v.dtype)
    return magnitude.to(v.dtype) / lengths.where(lengths != 0, 1.0)  # a row of zeros has no direction: it stays zero


def gain_of(settings: Lora, weight: Tensor, adapter: Sequence[Tensor], transposed: bool) -> Tensor:
    """DoRA's m / |W + s * B @ A| [out] of a whole weight, given A, B and m."""
    a, b, magnitude = adapter
    return _gain(magnitude, _direction(settings, weight, a, b, transposed, traced=False), transposed)


def _lens(settings: Lora, p: Program) -> Lens:
    targets, transposed = targets_of(settings, p), p.marks.get("transposed", frozenset())

    def put(params: Params) -> Params:
        out = {k: v.detach() for k, v in params.items()}
        for name in targets:
            made = (x.requires_grad_(x.is_meta) for x in _initial(settings, name, params[name], name in transposed))
            out |= dict(zip(names_in_files(name, settings.dora), made, strict=True))
        return out

    def fused(stored: Params, traced: bool = True) -> Params:
        changed = {k: _adapted(settings, k, stored, k in transposed, traced=traced) for k in targets}
        return {k: changed.get(k, v).to(v.dtype) for k, v in stored.items() if k not in own}

    own = {n for name in targets for n in names_in_files(name, settings.dora)}
    return Lens(put, (lambda stored: stored) if settings.dropout else fused, restore=partial(fused, traced=False))


def _frozen(p: Program) -> Lens:
    return Lens(lambda params: {k: v.detach() for k, v in params.items()}, lambda stored: stored)


def _beside(settings: Lora, name: str, transposed: bool) -> Wrap:
    """y = layer(x) + s * (drop(x) A^T) B^T; with DoRA y = layer(x) + W' drop(x) - W drop(x)."""
    names = names_in_files(name, settings.dora)

    def wrap(apply: Apply) -> Apply:
        def run(leaves: Params, x: Tensor) -> Tensor:
            y, dropped = apply({k: v for k, v in leaves.items() if k not in names}, x), dropout(x, settings.dropout)
            if settings.dora:
                change = (_adapted(settings, name, leaves, transposed) - leaves[name]).to(dropped.dtype)
                return y + F.linear(dropped, change.T if transposed else change)
            a, b = (leaves[n] for n in names)
            return y + settings.scale * F.linear(F.linear(dropped, a), b)

        return run

    return wrap
