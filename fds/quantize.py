"""`quantize_frozen`: frozen parameters stored in blocks of codes, and what every lens that quantises has to check and to declare."""

from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.program import Lens, Program
from fds.transform import Transform, direct, parameters
from fds.tree import Params


@direct
def quantize_frozen(format: str = "int8", *, block: int = 128, threshold: int = 1024) -> Transform:
    """Store frozen parameters in blocks of codes; they are dequantised where they are used (the base of LoRA, as in QLoRA).

    Each leaf becomes ``<name>.<format>`` and ``<name>.scales``. Under a later `shard` codes and scales are what goes over the wire: 1 + 2 / `block`
    of a byte per element and more, in place of 4. A later `cast` changes the scales' dtype, and that of what comes out.

    Args:
        format: "int8", "int4", "e4m3" or "e5m2" (`fds.kernels.block_quantize`).
        block: neighbours with one scale: 32, 64, ..., 1024. Blocks run over the rows of a leaf.
        threshold: leaves of fewer elements stay as they are.

    Law: ``restore(place(p)) == p`` within `tol`, relative to the largest number of the block. Placing again what was restored changes nothing.
    Dettmers et al. 2023, arXiv:2305.14314; DeepSpeed's ``zero_quantized_nontrainable_weights``.

    Raises:
        ValueError: an unknown format or block; no frozen leaf of `threshold` elements (put it after `lora`, which freezes the base).

    >>> import fds
    >>> program, params = fds.functionalize(torch.nn.Linear(64, 32).requires_grad_(False))
    >>> small = quantize_frozen()(program)
    >>> [(k, v.dtype, tuple(v.shape)) for k, v in small.spec[""].items()][1:]
    [('weight.int8', torch.int8, (2048,)), ('weight.scales', torch.float32, (16,))]
    """
    check_formats("quantize_frozen", block, format=format)
    if threshold < 0:
        raise ValueError(f"quantize_frozen: threshold {threshold}, required a number of elements >= 0")
    options: dict[str, Any] = {"format": format}
    options |= ({"block": block} if block != 128 else {}) | ({"threshold": threshold} if threshold != 1024 else {})

    def chosen(p: Program) -> list[str]:
        found = {k: v for k, v in parameters(p).items() if not v.requires_grad and v.is_floating_point()}
        return [k for k, v in found.items() if v.numel() >= threshold]

    def check(program: Program) -> None:
        if not any(chosen(p) for p in program.sites.values()):
            raise ValueError(
                f"quantize_frozen: no frozen leaf of {threshold} elements or more; put it after lora(...), which freezes the base, freeze parameters by requires_grad_(False), or lower threshold="
            )

    return Transform(
        "quantize_frozen",
        tuple(options.items()),
        lens=lambda p: _lens(p, chosen(p), format, block),
        check=check,
        provides=frozenset(["quantize_frozen"]),
        conflicts=frozenset(["quantize_frozen", "flat", "whole"]),
    )


def _lens(p: Program, names: list[str], format: str, block: int) -> Lens | None:
    from fds.kernels.quantize import block_dequantize, block_quantize

    spec = parameters(p)
    for k in names:
        check_dtype("quantize_frozen", k, spec[k].dtype)

    def put(params: Params) -> Params:
        out = {k: v for k, v in params.items() if k not in names}
        for k in names:
            codes, scales = block_quantize(params[k].reshape(-1), format=format, block=block)
            out |= {_codes(k): codes, _scales(k): scales.to(params[k].dtype)}
        return out

    def get(stored: Params) -> Params:
        out: Params = {}
        for k, leaf in spec.items():
            out[k] = opened(stored[_codes(k)], stored[_scales(k)], leaf.shape) if k in names else stored[k]
        return out

    def opened(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
        steps, options = scales.to(torch.bfloat16), {"format": format, "block": block, "length": shape.numel()}
        return block_dequantize(codes, steps, dtype=scales.dtype, **options).view(shape)

    def _codes(leaf: str) -> str:
        return f"{leaf}.{format}"

    def _scales(leaf: str) -> str:
        return f"{leaf}.scales"

    axes = {part: p.axes[k] for k in names if k in p.axes for part in (_codes(k), _scales(k))}
    return Lens(put, get, max(tolerance(format, spec[k].dtype) for k in names), axes=axes) if names else None


def check_formats(name: str, block: int, **formats: str | None) -> None:
    """Raise `ValueError` unless `formats` (None: not quantised) and `block` are such as `block_quantize` takes."""
    from fds.kernels.quantize import BLOCKS, FORMATS  # imports Triton, which takes a while

    for what, format in formats.items():
        if format is not None and format not in FORMATS:
            raise ValueError(f"{name}: {what}={format!r} is unknown; {tree.suggest(str(format), FORMATS)}")
    if block not in BLOCKS:
        raise ValueError(f"{name}: block={block!r}, required one of {', '.join(map(str, BLOCKS))}")


def check_dtype(name: str, leaf: str, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless numbers of `dtype` can be quantised."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: {leaf} is {dtype}, required float32, bfloat16 or float16; name the leaves that are by at(pattern, {name}(...))"
        )


def tolerance(format: str, dtype: torch.dtype) -> float:
    """The largest error of a dequantised number of `dtype`, relative to the largest number of its block.

    Half a step: the largest code is `limit`, and a scale is rounded to bfloat16; 8-bit floats have steps of their own largest number.

    >>> round(tolerance("int8", torch.float32), 5), round(tolerance("e4m3", torch.float32), 5)
    (0.00395, 0.0625)
    """
    from fds.kernels.quantize import FORMATS

    f = FORMATS[format]
    return ((1 + 2.0**-8) / (2 * f.limit) if f.limit else 2.0 ** -(f.mantissa + 1)) + torch.finfo(dtype).eps
