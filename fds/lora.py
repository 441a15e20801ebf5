"""Low-rank adapters as a lens: W is stored as {W, A, B} and seen as W + s * B @ A."""

import math
import zlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.frame import Apply
from fds.program import Lens, Program
from fds.randomness import dropout
from fds.transform import Transform, around_site, chain, direct, parameters, whole
from fds.tree import Params


@attrs.frozen
class Lora:
    """The settings of a `lora` transformation, as PEFT names them."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@direct
def lora(
    *,
    rank: int,
    targets: str | Iterable[str],
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> Transform:
    """Freeze every parameter and train low-rank adapters of the chosen weights instead: W' = W + s * B @ A.

    Args:
        rank: rows of A [rank, in] and columns of B [out, rank].
        targets: patterns of modules or leaves; each has to match, and only 2-D weights of linear layers (and GPT-2's Conv1D) can be adapted.
        alpha: s = alpha / rank. Default: rank, so s = 1.
        dropout: on the adapter's input in training mode; then the adapter runs beside the layer, ``y + s * (drop(x) A^T) B^T``.
        rslora: s = alpha / sqrt(rank).
        seed: of the initial A (Kaiming uniform, as in PEFT; B is zero), per leaf, so that every rank and layout starts alike.

    Law: ``restore(place(p)) == p``, as B starts at zero; `restore` of trained parameters gives the fused weights.
    Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    settings = Lora(rank, float(rank if alpha is None else alpha), targets, dropout, rslora, seed)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora: rank={rank!r}, required a whole number >= 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora: dropout={dropout!r}, required 0 <= dropout < 1")
    options: dict[str, Any] = {
        "rank": rank,
        "targets": targets[0] if len(targets) == 1 else targets,
        "alpha": settings.alpha,
    }
    options |= {k: v for k, v in (("dropout", dropout), ("rslora", rslora), ("seed", seed)) if v}
    return _Lora(
        "lora",
        tuple(options.items()),
        lens=partial(_lens, settings),
        provides=frozenset(["lora"]),
        conflicts=frozenset(["flat", "lora", "tensor", "whole"]),
        check=partial(check_targets, settings),
        settings=settings,
    )


@attrs.frozen(repr=False)
class _Lora(Transform):
    """A transformation with its settings at hand, and a wrapper per adapted layer where there is dropout."""

    settings: Lora = attrs.field(kw_only=True)

    def _on_site(self, site: str, p: Program) -> Program:
        targets = targets_of(self.settings, p)
        new = super()._on_site(site, p)
        if self.name == "lora" and self.settings.dropout:
            for name in targets:
                wrap = partial(_beside, self.settings, name, name in p.marks["transposed"])
                new = around_site(site, new, wrap, name.rpartition(".")[0])
        return new


@direct
def fuse_lora() -> Transform:
    """The same program with the adapters fused into the weights: stored W' = W + s * B @ A, one rounding, nothing trainable.

    ``relayout(train, fuse_lora()(train))(stored)`` gives its parameters. The base weights are never written: to go on training, go on
    with `stored`. Sites without adapters are the same tensors in both.
    """

    def rewrite(program: Program) -> Program:
        done = [
            attrs.evolve(t, name="fused_lora", lens=_frozen, provides=frozenset()) if t.name == "lora" else t
            for t in program.history
        ]
        return chain(*done)(program.origin)

    return attrs.evolve(whole(rewrite, name="fuse_lora", requires=["lora"], conflicts=["whole"]), rewrite=rewrite)


def check_targets(settings: Lora, program: Program) -> None:
    """Raise `ValueError` unless every pattern names a weight of a linear layer."""
    spec = {k: v for p in (program.sites or {"": program}).values() for k, v in parameters(p).items()}
    lookup = program.marks.get("lookup", frozenset())
    for pattern in settings.targets:
        chosen = tree.select(spec, pattern, what="lora targets")
        if not any(_is_linear(k, spec[k], lookup) for k in chosen):
            first = chosen[0]
            raise ValueError(
                f"lora targets: {pattern!r} matches no weight of a linear layer ({first} is {'an embedding' if first in lookup else tuple(spec[first].shape)}); name linear layers, as '*.q_proj'"
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


def _initial(settings: Lora, name: str, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    out, width = weight.shape[::-1] if transposed else weight.shape
    a = torch.empty(settings.rank, width, dtype=weight.dtype, device=weight.device)
    if not a.is_meta:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed}:{name}".encode()))
        bound = 1 / math.sqrt(width)  # Kaiming uniform with a = sqrt(5), as nn.Linear
        a = torch.empty(a.shape).uniform_(-bound, bound, generator=generator).to(weight)
    return a, weight.new_zeros(out, settings.rank)


def _delta(settings: Lora, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    product = settings.scale * (b @ a)
    return product.T if transposed else product


def _lens(settings: Lora, p: Program) -> Lens:
    targets, transposed = targets_of(settings, p), p.marks.get("transposed", frozenset())

    def put(params: Params) -> Params:
        out = {k: v.detach() for k, v in params.items()}
        for name in targets:
            a, b = _initial(settings, name, params[name], name in transposed)
            out |= dict(
                zip(adapter_names(name), (a.requires_grad_(a.is_meta), b.requires_grad_(b.is_meta)), strict=True)
            )
        return out

    def fused(stored: Params) -> Params:
        out = dict(stored)
        for name in targets:
            a, b = (out.pop(n) for n in adapter_names(name))
            out[name] = stored[name] + _delta(settings, a, b, name in transposed)
        return out

    # With dropout the adapter is applied beside the layer, which finds A and B among its leaves.
    return Lens(put, (lambda stored: stored) if settings.dropout else fused, restore=fused)


def _frozen(p: Program) -> Lens:
    return Lens(lambda params: {k: v.detach() for k, v in params.items()}, lambda stored: stored)


def _beside(settings: Lora, name: str, transposed: bool, apply: Apply) -> Apply:
    """y = layer(x) + s * (drop(x) A^T) B^T."""
    names = adapter_names(name)

    def run(leaves: Params, x: Tensor) -> Tensor:
        a, b = (leaves[n] for n in names)
        y = apply({k: v for k, v in leaves.items() if k not in names}, x)
        return y + settings.scale * F.linear(F.linear(dropout(x, settings.dropout), a), b)

    return run
