"""The kernels of `attention.py`: for a piece of a row's keys, and for all pieces of it; their launch; what is compiled ahead of time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fds.kernels.registry import Configured
from fds.kernels.triton_or_not import jit, launch, tl

SPLIT = 256  # keys of a piece: the results of 8 query heads are 3 % of the bytes of its keys and values
PIECES = 128  # at most for each row: nearly one for each multiprocessor where there is one row of one head
LONGEST = 2**30  # keys of a row, and so a window that leaves out none: lengths of pieces are 32-bit integers


@jit
def _span(LENGTHS, STARTS, row, tokens, keys, window, HAS_STARTS: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """What a row sees: its first key, where it ends, the length of its pieces, and whether its length can be."""
    end = tl.load(LENGTHS + row)
    start = end * 0
    if HAS_STARTS:
        start += tl.load(STARTS + row)
    right = (end >= 0) & (end <= keys) & (start >= 0)
    end = tl.where(right, end, 0).to(tl.int32)
    first = tl.where(right, tl.maximum(start, end - tokens + 1 - window), 0).to(tl.int32)
    piece = tl.full((), SPLIT, tl.int32)
    while piece * PIECES < end - first:
        piece *= 2
    return first, end, piece, right


@jit
def _rows(X, at, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows `at` of a matrix of `WIDTH` columns; zeros where there is none."""
    column = tl.arange(0, BLOCK)
    mask = there[:, None]
    if BLOCK > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(X + at[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)


@jit
def pieces_kernel(QUERY, KEY, VALUE, TABLE, LENGTHS, STARTS, SLOPES, OUT, WEIGHTED, MOST, TOTAL,
                  groups, tokens, rows, keys, pages, columns, tiles, programs, pieces, window, scale, softcap,
                  D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_SLOPES: tl.constexpr, SOFTCAP: tl.constexpr,
                  WHOLE: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Every `programs`-th piece of one row and one key head, for a tile of the `rows` = query heads x tokens that look at it.

    `WHOLE`: no row has more than one piece, and what comes out is the result.
    """
    share = tl.program_id(0) % programs
    tile = tl.program_id(0) // programs % tiles
    owner = tl.program_id(0) // programs // tiles  # row of the batch, and key head
    batch, group = owner // groups, owner % groups
    first, end, piece, right = _span(LENGTHS, STARTS, batch, tokens, keys, window, HAS_STARTS, SPLIT, PIECES)
    owner = owner.to(tl.int64)
    head = group if PAGE else owner * keys  # where the keys of this head begin
    KEY += head * D
    VALUE += head * DV
    TABLE += batch.to(tl.int64) * columns
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _rows(QUERY, owner * rows + m, m < rows, D, BLOCK_D)
    position = end - tokens + m % tokens
    steep = 2 / softcap if SOFTCAP else 0.0
    slope = tl.full([BLOCK_M], 0.0, tl.float32)
    if HAS_SLOPES:
        slope = tl.load(SLOPES + group * (rows // tokens) + m // tokens, mask=m < rows, other=0.0).to(tl.float32)
    count = 1 if WHOLE else (end - first + piece - 1) // piece
    for i in range(share, count, programs):
        begin = first + i * piece
        stop = tl.minimum(begin + piece, end)
        most = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.full([BLOCK_M], 0.0, tl.float32)
        weighted = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
        for block in range(begin, stop, BLOCK_N):
            n = block + tl.arange(0, BLOCK_N)
            there = n < stop
            known = there
            if PAGE:
                page = tl.load(TABLE + n // PAGE, mask=there, other=0)
                known = (page >= 0) & (page < pages)
                at = (page.to(tl.int64) * PAGE + n % PAGE) * groups
                x = tl.dot(q, tl.trans(_rows(KEY, at, there & known, D, BLOCK_D)), input_precision="ieee") * scale
                v = _rows(VALUE, at, there & known, DV, BLOCK_DV)
            else:
                x = tl.dot(q, tl.trans(_rows(KEY, n, there, D, BLOCK_D)), input_precision="ieee") * scale
                v = _rows(VALUE, n, there, DV, BLOCK_DV)
            if SOFTCAP:
                x = softcap * (1 - 2 / (tl.exp(x * steep) + 1))
            back = position[:, None] - n[None, :]
            if HAS_SLOPES:
                x -= slope[:, None] * back
            if PAGE:
                x = tl.where(known[None, :], x, float("nan"))
            x = tl.where((back >= 0) & (back < window) & there[None, :], x, -float("inf"))
            new = tl.maximum(most, tl.max(x, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            old, p = tl.exp(most - shift), tl.exp(x - shift[:, None])
            total = total * old + tl.sum(p, 1)
            weighted = tl.dot(p.to(v.dtype), v, weighted * old[:, None], input_precision="ieee")
            most = new
        column = tl.arange(0, BLOCK_DV)
        mask = (m < rows)[:, None] & (column < DV)[None, :]
        if WHOLE:
            out = tl.where(right, weighted / tl.where(total == 0, 1.0, total)[:, None], float("nan"))
            tl.store(OUT + (owner * rows + m)[:, None] * DV + column[None, :], out.to(OUT.dtype.element_ty), mask=mask)
        else:
            to = (owner * pieces + i) * rows + m
            tl.store(WEIGHTED + to[:, None] * DV + column[None, :], weighted, mask=mask)
            tl.store(MOST + to, most, mask=m < rows)
            tl.store(TOTAL + to, total, mask=m < rows)


@jit
def combine_kernel(WEIGHTED, MOST, TOTAL, LENGTHS, STARTS, OUT, groups, tokens, rows, keys, pieces, window,
                   DV: tl.constexpr, HAS_STARTS: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """The pieces of one query head and token, as one."""
    owner, m = tl.program_id(0) // rows, tl.program_id(0) % rows
    first, end, piece, right = _span(LENGTHS, STARTS, owner // groups, tokens, keys, window, HAS_STARTS, SPLIT, PIECES)
    owner = owner.to(tl.int64)
    count = (end - first + piece - 1) // piece
    every = tl.arange(0, PIECES)
    here = (owner * pieces + every) * rows + m
    most = tl.load(MOST + here, mask=every < count, other=-float("inf"))
    top = tl.max(most, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    # A choice between product and sum: nobody may make them one rounding in one compilation and two in another.
    total = tl.load(TOTAL + here, mask=every < count, other=0.0) * tl.exp(most - top)
    total = tl.sum(tl.where(every < count, total, 0.0), 0)
    weighted = tl.full([BLOCK_DV], 0.0, tl.float32)
    for begin in range(0, count, TILE):
        i = begin + tl.arange(0, TILE)
        at = (owner * pieces + i) * rows + m
        weight = tl.exp(tl.load(MOST + at, mask=i < count, other=-float("inf")) - top)
        part = weight[:, None] * _rows(WEIGHTED, at, i < count, DV, BLOCK_DV)
        weighted += tl.sum(tl.where((i < count)[:, None], part, 0.0), 0)
    out = tl.where(right, weighted / tl.where(total == 0, 1.0, total), float("nan"))
    column = tl.arange(0, BLOCK_DV)
    tl.store(OUT + (owner * rows + m) * DV + column, out.to(OUT.dtype.element_ty), mask=column < DV)


# --- launcher ---


def _choice(dtype: torch.dtype, rows: Any, d: int, dv: int, paged: bool) -> tuple[dict[str, int], int, int]:
    """Tile sizes, warps and stages: of a head alone, nothing of the batch. Rows beyond a tile's read their keys from the L2 cache."""
    wide, full = max(d, dv) > 128, dtype == torch.float32
    block_m = 4 if full else (16 if rows <= 16 else 32)  # float32 takes no matrix unit, which wants 16 rows
    block_d, block_dv = (next(n for n in (16, 32, 64, 128, 256) if n >= width) for width in (d, dv))
    blocks = {"BLOCK_M": block_m, "BLOCK_N": (64 >> full) >> wide, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
    warps = 4 if block_m == 16 and not wide else 8
    return blocks, warps, 5 if paged else 3  # both keep two tiles under way: page numbers are waited for first


def _programs(device: torch.device, tasks: Any, pieces: Any) -> Any:
    """How many programs share the pieces of a row: eight in all for each multiprocessor, so that no long row is left for last."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(pieces, -(-8 * processors // tasks)))


def _tile(width: int) -> int:
    """Pieces that are combined at a time: as many as fit into registers, since each turn waits for memory."""
    return min(PIECES, 8192 // width)


def run(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, lengths: Tensor, starts: Tensor | None, slopes: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    b, heads, tokens, d, dv = *query.shape[:3], int(query.shape[3]), int(value.shape[3])
    if table is None:
        groups, keys, page, pages, columns = key.shape[1], key.shape[2], 0, 0, 0
    else:
        (pages, page, groups), columns = key.shape[:3], table.shape[1]
        keys = columns * page
    out = query.new_empty(b, heads, tokens, dv)
    if b == 0 or heads == 0 or tokens == 0:
        return out
    rows = heads // groups * tokens
    blocks, warps, stages = _choice(query.dtype, rows, d, dv, page > 0)
    pieces = min(PIECES, -(-(min(keys, window + tokens - 1) if window else keys) // SPLIT))
    whole = bool(pieces <= 1)
    tiles = -(-rows // blocks["BLOCK_M"])
    programs = 1 if whole else _programs(query.device, b * groups * tiles, pieces)
    # Where there is no second pass, `query` stands for what is neither read nor written.
    weighted = query if whole else query.new_empty(b * groups, pieces, rows, dv, dtype=torch.float32)
    most, total = (query, query) if whole else (weighted.new_empty(b * groups, pieces, rows) for _ in range(2))
    limits = {"HAS_STARTS": starts is not None, "SPLIT": SPLIT, "PIECES": PIECES}
    begins, window = lengths if starts is None else starts, min(window or LONGEST, LONGEST)
    launch(
        pieces_kernel, (b * groups * tiles * programs,), query, key, value, lengths if table is None else table, lengths, begins,
        query if slopes is None else slopes, out, weighted, most, total,
        groups, tokens, rows, keys, pages, columns, tiles, programs, pieces, window, scale, softcap,
        D=d, DV=dv, PAGE=int(page), HAS_SLOPES=slopes is not None, SOFTCAP=bool(softcap), WHOLE=whole, **limits, **blocks,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not whole:
        launch(
            combine_kernel, (b * groups * rows,), weighted, most, total, lengths, begins, out, groups, tokens, rows, keys, pieces, window,
            DV=dv, TILE=_tile(blocks["BLOCK_DV"]), BLOCK_DV=blocks["BLOCK_DV"], **limits, num_warps=4,
        )  # fmt: skip
    return out


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SIZES = dict.fromkeys(("groups", "tokens", "rows", "keys", "pages", "columns", "tiles", "programs", "pieces", "window"), "i32")  # fmt: skip
_TYPES = dict.fromkeys(("LENGTHS", "STARTS"), "*i32") | dict.fromkeys(("WEIGHTED", "MOST", "TOTAL"), "*fp32") | _SIZES


def _configured(dtype: torch.dtype, rows: int, d: int, page: int = 0, options: bool = False, whole: bool = False) -> Configured:  # fmt: skip
    blocks, warps, stages = _choice(dtype, rows, d, d, page > 0)
    types = _TYPES | dict.fromkeys(("QUERY", "KEY", "VALUE", "OUT"), f"*{_NAMES[dtype]}")
    types |= {"TABLE": "*i32", "SLOPES": "*fp32", "scale": "fp32", "softcap": "fp32"}
    flags = {"HAS_STARTS": options, "HAS_SLOPES": options, "SOFTCAP": options, "WHOLE": whole}
    constants = {"D": d, "DV": d, "PAGE": page, **flags, "SPLIT": SPLIT, "PIECES": PIECES, **blocks}
    low = () if dtype == torch.float32 else ("mma.", f"cvt.rn.{_NAMES[dtype].replace('fp', 'f')}")
    return Configured(pieces_kernel, types, constants, warps, stages, contains=("cp.async.cg", *low))


def configurations(page: int) -> Iterator[Configured]:
    """Every tile size, with all options where registers are short. Heads of 256 in pages alone, which take more of them."""
    low = torch.bfloat16
    yield _configured(low, 16, 128, page)
    yield _configured(low, 32, 128, page, options=True)
    if page:
        yield from (_configured(low, rows, 256, page, options=True) for rows in (16, 32))
        yield _configured(torch.float32, 4, 256, page, options=True)
        return
    yield _configured(torch.float32, 4, 128, options=True)
    yield _configured(torch.float16, 16, 80, whole=True)
    constants = {"DV": 128, "HAS_STARTS": True, "SPLIT": SPLIT, "PIECES": PIECES, "TILE": _tile(128), "BLOCK_DV": 128}
    yield Configured(combine_kernel, _TYPES | {"OUT": "*bf16"}, constants, contains=("cvt.rn.bf16",))
