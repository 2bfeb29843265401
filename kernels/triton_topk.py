"""cosine_topk in Triton: the scores never leave the chip, the reference ranks what they select.

    topk(queries, index, k, exclude, precision="tf32" | "ieee") -> (Q, k) int64 keys, as reference.topk

1. select: a program holds a block of queries and its `keep` > k best rows so far, while a part of the index streams past it in
   tiles; a tile's scores (tensor cores, float32 sums, norms taken on the way) enter one maximum per query at a time, and only
   while some query's maximum beats the worst it holds: after the first tiles seldom. What need not be done for every score
   is not: the query's norm divides the kept ones in the end, an excluded row is turned away where it would enter.
2. merge: the parts' best rows of a query become its `keep` best.
3. The reference scores these rows. If its k-th score is above the worst of the kept ones by more than the precision's noise, no
   other row can belong to the result. Queries of which that cannot be said are searched again without tf32, and those of which it
   cannot be said even then by the reference.
Copy with: the folder kernels/, torch, triton.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import reference
from kernels.reference import ONE

# Queries, index rows and dimensions of a tile, by what limits it: where rows are aligned and few are kept, for D up to the tile's
# and above; and elsewhere, where addresses and what is kept take more registers. Not tuned: no GPU has run them yet (2026-11).
TILES = {
    "tf32": ((128, 64, 64), (128, 64, 32), (64, 32, 16)),
    "ieee": ((64, 32, 16), (64, 32, 16), (32, 32, 16)),  # without tensor cores
    "half": ((128, 64, 64), (128, 64, 64), (64, 64, 32)),
}
LAUNCH = {  # 256 threads; without maxnreg ptxas may spill for the sake of a second program on a processor
    "cuda": dict(num_warps=8, num_stages=3, maxnreg=255),
    "hip": dict(num_warps=4, num_stages=2),
}
FEW = 32
PROGRAMS = 264  # as many at least, by splitting the index: two for each of an H100's processors
MERGED = 4096  # rows of a query that the second kernel holds at a time
LARGEST_K, LARGEST_WIDTH = 64, 1024


@triton.jit
def tile(matrix, rows, inside, at, stride, step, D: tl.constexpr, BD: tl.constexpr):
    """BD values from dimension `at` of each row, 0 where there is none. int64 offsets: G D may pass 2^31."""
    d = at + tl.arange(0, BD).to(tl.int64)
    return tl.load(
        matrix + rows[:, None] * stride + d[None, :] * step,
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def squares(rows):
    return tl.sum(rows.to(tl.float32) * rows.to(tl.float32), axis=1)


@triton.jit
def select(
    queries,
    index,
    exclude,
    best,
    rows,
    q_count,
    g_count,
    part,
    q_stride,
    q_step,
    g_stride,
    g_step,
    D: tl.constexpr,
    KEEP: tl.constexpr,
    BQ: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)  # (BQ,) int64
    known, slot, columns = q < q_count, tl.arange(0, KEEP), tl.arange(0, BG)
    start = tl.program_id(1).to(tl.int64) * part
    count = (tl.minimum(start + part, g_count) - start).to(tl.int32)
    barred = tl.load(exclude + q, mask=known, other=-1) - start
    q_norm = tl.zeros((BQ,), tl.float32)
    for at in range(0, D, BD):
        q_norm += squares(tile(queries, q, known, at, q_stride, q_step, D, BD))
    if D <= BD:
        a = tile(queries, q, known, 0, q_stride, q_step, D, BD)  # (BQ, BD), stays
    held, worst = (
        tl.full((BQ, KEEP), float("-inf"), tl.float32),
        tl.full((BQ,), float("-inf"), tl.float32),
    )
    held_rows, place = (
        tl.full((BQ, KEEP), -1, tl.int32),
        tl.zeros((BQ,), tl.int32),
    )  # rows are counted from start
    for left in range(0, count, BG):
        inside = left + columns < count
        g = start + left + columns  # (BG,) int64
        if D <= BD:
            b = tile(index, g, inside, 0, g_stride, g_step, D, BD)  # (BG, BD)
            g_norm = squares(b)
            scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            scores, g_norm = tl.zeros((BQ, BG), tl.float32), tl.zeros((BG,), tl.float32)
            for at in range(0, D, BD):
                a = tile(queries, q, known, at, q_stride, q_step, D, BD)
                b = tile(index, g, inside, at, g_stride, g_step, D, BD)
                g_norm += squares(b)
                scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
        # Cosines, but for the query's norm, which changes no order.
        scores = (
            scores * (1 / tl.sqrt(tl.where(g_norm > 0, g_norm, 1.0)))[None, :]
            + tl.where(inside, 0.0, float("-inf"))[None, :]
        )
        top = tl.max(scores, axis=1)
        if (
            tl.max((top > worst).to(tl.int32), axis=0) > 0
        ):  # next to the while: a loop with a loop in it is not pipelined
            while tl.max((top > worst).to(tl.int32), axis=0) > 0:
                where = tl.argmax(scores, axis=1)
                enters = (top > worst) & (left + where != barred)
                here = (slot[None, :] == place[:, None]) & enters[:, None]
                held = tl.where(here, top[:, None], held)
                held_rows = tl.where(here, (left + where)[:, None], held_rows)
                worst, place = tl.min(held, axis=1, return_indices=True)
                scores = tl.where(columns[None, :] == where[:, None], float("-inf"), scores)
                top = tl.max(scores, axis=1)
    held = held / tl.sqrt(tl.where(q_norm > 0, q_norm, 1.0))[:, None]
    out = (q[:, None] * tl.num_programs(1) + tl.program_id(1)) * KEEP + slot[None, :]
    tl.store(best + out, held, mask=known[:, None])
    tl.store(rows + out, tl.where(held_rows < 0, -1, start + held_rows), mask=known[:, None])


@triton.jit
def merge(best, rows, worst, kept, parts, KEEP: tl.constexpr, WIDTH: tl.constexpr):
    """A query's (parts, KEEP) -> its KEEP best rows, and the worst score among them. WIDTH: parts * KEEP up to a power of two."""
    q = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, WIDTH)
    inside = slot < parts * KEEP
    scores = tl.load(best + q * parts * KEEP + slot, mask=inside, other=float("-inf"))
    top = tl.full((), float("-inf"), tl.float32)
    for i in range(KEEP):
        top, where = tl.max(scores, axis=0, return_indices=True)
        row = tl.load(rows + q * parts * KEEP + where)
        tl.store(kept + q * KEEP + i, tl.where(top > float("-inf"), row, -1))
        scores = tl.where(slot == where, float("-inf"), scores)
    tl.store(worst + q, top)


def topk(queries, index, k, exclude=None, precision="tf32"):
    if precision not in ("tf32", "ieee"):
        raise ValueError(f"precision {precision!r} is unknown: use 'tf32' or 'ieee'")
    if k > LARGEST_K or not 1 <= queries.shape[1] <= LARGEST_WIDTH:
        raise ValueError(
            f"k is {k}, and the rows have {queries.shape[1]} values: the triton backend takes k to {LARGEST_K} and "
            f"1 to {LARGEST_WIDTH} values; use backend 'torch'"
        )
    exclude = (
        torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
        if exclude is None
        else exclude.contiguous()
    )
    keys = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    same = queries.dtype if queries.dtype == index.dtype else torch.float32
    there = _tame(index.to(queries.device), same)
    for top in range(0, len(queries), 2**14):
        mine, barred = queries[top : top + 2**14], exclude[top : top + 2**14]
        block = _tame(mine, same)
        if block.dtype != there.dtype:
            block, there = block.float(), there.float()
        cut = precision == "tf32" and there.dtype == torch.float32
        unsure = torch.arange(len(mine), device=queries.device)
        for attempt in ("tf32", "ieee") if cut else (precision,):
            kept, worst = _selected(block[unsure], there, k, barred[unsure], attempt)
            found = reference.best(mine[unsure], index, kept, k, barred[unsure])
            keys[top + unsure] = found
            # The noise of a score that is 2^24 times: of the sums, and of the two values of a product that tf32 cuts to 10 bits.
            noise = 3 * queries.shape[1] + 40 + 2.0**15 * (cut and attempt == "tf32")
            unsure = unsure[(found[:, -1] >> 32) <= worst.double() * ONE + noise]
            if not len(unsure):
                break
        else:
            keys[top + unsure] = reference.topk(mine[unsure], index, k, barred[unsure])
    return keys


def _tame(rows, dtype):
    """Rows as the kernel takes them: no squared norm may leave float32, and float64 does not go in."""
    parts = rows.split(2**14)  # at most 128 MB in float64
    norms = torch.cat(
        [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]
    )
    if dtype == torch.float64 or not ((norms == 0) | (norms > 1e-12) & (norms < 1e12)).all():
        return torch.cat(
            [F.normalize(reference.double(part), dim=1, eps=1e-300).float() for part in parts]
        )
    return rows.to(dtype)


def _aligned(rows):
    """Do 16 bytes of a row lie together, so that they can be loaded at once?"""
    return rows.stride(1) == 1 and (rows.shape[1] | rows.stride(0) | rows.data_ptr()) % 16 == 0


def _tile_sizes(kind, width, easy):
    resident, stepwise, other = TILES[kind]
    return other if not easy else resident if width <= resident[2] else stepwise


def _selected(queries, index, k, exclude, precision):
    """-> rows (q, keep) int64, -1 where there is none, and (q,) the worst of their scores, -inf if none was left out."""
    keep = triton.next_power_of_2(k + 8)
    easy = keep <= FEW and _aligned(queries) and _aligned(index)
    bq, bg, bd = _tile_sizes(
        "half" if index.element_size() == 2 else precision, queries.shape[1], easy
    )
    blocks = triton.cdiv(len(queries), bq)
    parts = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(len(index), 16 * bg), MERGED // keep)
    parts = max(parts, triton.cdiv(len(index), 2**30))  # a part's rows are counted in int32
    size = triton.cdiv(triton.cdiv(len(index), parts), bg) * bg
    parts = triton.cdiv(len(index), size)
    best = torch.empty(len(queries), parts, keep, dtype=torch.float32, device=queries.device)
    rows = torch.empty(len(queries), parts, keep, dtype=torch.int64, device=queries.device)
    select[(blocks, parts)](
        queries,
        index,
        exclude,
        best,
        rows,
        len(queries),
        len(index),
        size,
        *queries.stride(),
        *index.stride(),
        D=queries.shape[1],
        KEEP=keep,
        BQ=bq,
        BG=bg,
        BD=bd,
        PRECISION=precision,
        **LAUNCH["hip" if torch.version.hip else "cuda"],
    )
    kept, worst = torch.empty_like(rows[:, 0]), torch.empty_like(best[:, 0, 0])
    merge[(len(queries),)](
        best, rows, worst, kept, parts, KEEP=keep, WIDTH=triton.next_power_of_2(parts * keep)
    )
    return kept, worst
