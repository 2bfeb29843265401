"""cosine_topk in Triton: the scores never leave the chip, the reference ranks what they select.

1. A program holds a block of queries and their `keep` > k best rows so far, while a part
   of the index streams past in tiles. The scores of a tile (tensor cores, float32 sums, norms
   computed on the way) enter one maximum per query at a time, and only while the maximum of some
   query beats the worst row that it holds: after the first tiles, seldom. Excluded rows are
   rejected there; the queries' norms divide the kept scores at the end.
2. The reference scores the `keep` best rows of all parts. If its k-th score is above the worst of
   theirs by more than the error bound of the precision, no other row can belong to the result.
   Other queries are searched again without tf32, and if that does not suffice, by the reference.
Copy with: the folder kernels/, torch, triton.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import reference
from kernels.reference import ONE

# Queries, index rows and dimensions of a tile, for aligned rows of which few are kept, D up to the
# tile's; the same, D above; others, which take more registers. Not tuned on a GPU yet (2026-11).
TILES = {
    "tf32": ((128, 64, 64), (128, 64, 32), (64, 32, 16)),
    "ieee": ((64, 32, 16), (64, 32, 16), (32, 32, 16)),  # without tensor cores
    "half": ((128, 64, 64), (128, 64, 64), (64, 64, 32)),
}
LAUNCH = {  # 256 threads; without maxnreg ptxas may spill to fit two programs on a processor
    "cuda": dict(num_warps=8, num_stages=3, maxnreg=255),
    "hip": dict(num_warps=4, num_stages=2),
}
FEW = 32  # kept rows
PROGRAMS = 264  # at least, by splitting the index: two for each multiprocessor of an H100
MERGED = 4096  # at most so many rows of a query, from all parts
QUERIES = 2**14  # searched at a time
HIP = bool(torch.version.hip)


@triton.jit
def tile(matrix, rows, inside, at, stride, step, D: tl.constexpr, BD: tl.constexpr):
    """(rows, BD): values from dimension `at` on, 0 outside. int64 offsets: G D may exceed 2^31."""
    d = at + tl.arange(0, BD).to(tl.int64)
    places = matrix + rows[:, None] * stride + d[None, :] * step
    return tl.load(places, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def squares(rows):
    return tl.sum(rows.to(tl.float32) * rows.to(tl.float32), axis=1)


@triton.jit
def select(
    queries,  # (Q, D)
    index,  # (G, D)
    exclude,  # (Q, E) int64, -1 for none
    best,  # (Q, parts, KEEP) float32, written: scores, -inf for none
    rows,  # (Q, parts, KEEP) int64, written: their rows, -1 for none
    q_count,  # Q
    g_count,  # G
    e_count,  # E
    part,  # index rows of a part
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
    known = q < q_count
    slot, columns = tl.arange(0, KEEP), tl.arange(0, BG)
    start = tl.program_id(1).to(tl.int64) * part
    count = (tl.minimum(start + part, g_count) - start).to(tl.int32)
    q_norm = tl.zeros((BQ,), tl.float32)
    for at in range(0, D, BD):
        q_norm += squares(tile(queries, q, known, at, q_stride, q_step, D, BD))
    if D <= BD:
        a = tile(queries, q, known, 0, q_stride, q_step, D, BD)  # (BQ, BD), stays
    held = tl.full((BQ, KEEP), float("-inf"), tl.float32)
    held_rows = tl.full((BQ, KEEP), -1, tl.int32)  # counted from start
    worst = tl.full((BQ,), float("-inf"), tl.float32)
    place = tl.zeros((BQ,), tl.int32)  # of the worst
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
        # Cosines times the query's norm, which does not affect the order.
        scores *= (1 / tl.sqrt(tl.where(g_norm > 0, g_norm, 1.0)))[None, :]
        scores += tl.where(inside, 0.0, float("-inf"))[None, :]
        top = tl.max(scores, axis=1)
        # The condition repeats that of the loop: a loop around another one is not pipelined.
        if tl.max((top > worst).to(tl.int32), axis=0) > 0:
            while tl.max((top > worst).to(tl.int32), axis=0) > 0:
                where = tl.argmax(scores, axis=1)
                enters = top > worst
                for e in range(e_count):
                    excluded = tl.load(exclude + q * e_count + e, mask=known, other=-1) - start
                    enters = enters & (left + where != excluded)
                replaced = (slot[None, :] == place[:, None]) & enters[:, None]
                held = tl.where(replaced, top[:, None], held)
                held_rows = tl.where(replaced, (left + where)[:, None], held_rows)
                worst, place = tl.min(held, axis=1, return_indices=True)
                scores = tl.where(columns[None, :] == where[:, None], float("-inf"), scores)
                top = tl.max(scores, axis=1)
    held = held / tl.sqrt(tl.where(q_norm > 0, q_norm, 1.0))[:, None]
    out = (q[:, None] * tl.num_programs(1) + tl.program_id(1)) * KEEP + slot[None, :]
    tl.store(best + out, held, mask=known[:, None])
    tl.store(rows + out, tl.where(held_rows < 0, -1, start + held_rows), mask=known[:, None])


def topk(queries, index, k, exclude, precision="tf32"):
    keys = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    sides = _tame(queries), _tame(index.to(queries.device))
    sides = sides if sides[0].dtype == sides[1].dtype else [side.float() for side in sides]
    uses_tf32 = precision == "tf32" and sides[0].dtype == torch.float32
    for top in range(0, len(queries), QUERIES):
        block, excluded = queries[top : top + QUERIES], exclude[top : top + QUERIES]
        tame = sides[0][top : top + QUERIES]
        unsure = torch.arange(len(block), device=queries.device)
        for attempt in ("tf32", "ieee") if uses_tf32 else (precision,):
            kept, worst = _selected(tame[unsure], sides[1], k, excluded[unsure], attempt)
            query, slot = (kept >= 0).nonzero(as_tuple=True)
            row = kept[query, slot]
            found = reference.best(block[unsure], index, query, row, k, excluded[unsure])
            keys[top + unsure] = found
            # Of 2^24 scores, by the sums, and by tf32, which cuts both factors to 10 bits.
            error = 3 * queries.shape[1] + 40 + 2.0**15 * (uses_tf32 and attempt == "tf32")
            unsure = unsure[(found[:, -1] >> 32) <= worst.double() * ONE + error]
            if not len(unsure):
                break
        else:
            keys[top + unsure] = reference.topk(block[unsure], index, k, excluded[unsure])
    return keys


def _tame(rows):
    """Rows for the kernel, which takes no float64 and squared norms within float32's range."""
    parts = rows.split(2**14)  # at most 128 MB in float64
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]
    tame = ((norms := torch.cat(norms)) == 0) | (norms > 1e-12) & (norms < 1e12)
    if rows.dtype != torch.float64 and tame.all():
        return rows
    unit = [F.normalize(reference.double(part), dim=1, eps=1e-300).float() for part in parts]
    return torch.cat(unit)


def _aligned(rows):
    """Whether 16 bytes of a row can be loaded at once."""
    return rows.stride(1) == 1 and (rows.shape[1] | rows.stride(0) | rows.data_ptr()) % 16 == 0


def _tile_sizes(kind, width, easy):
    resident, stepwise, other = TILES[kind]
    return other if not easy else resident if width <= resident[2] else stepwise


def _selected(queries, index, k, exclude, precision):
    """-> rows (q, keep) int64, -1 for none, and (q,) the worst of their scores."""
    (count, width), exclude = queries.shape, exclude.contiguous()
    keep = triton.next_power_of_2(k + 8)
    easy = keep <= FEW and _aligned(queries) and _aligned(index)
    bq, bg, bd = _tile_sizes("half" if index.element_size() == 2 else precision, width, easy)
    blocks = triton.cdiv(count, bq)
    parts = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(len(index), 16 * bg), MERGED // keep)
    parts = max(parts, triton.cdiv(len(index), 2**30))  # rows of a part are counted in int32
    size = triton.cdiv(triton.cdiv(len(index), parts), bg) * bg
    parts = triton.cdiv(len(index), size)
    best = torch.empty(count, parts, keep, dtype=torch.float32, device=queries.device)
    rows = torch.empty(count, parts, keep, dtype=torch.int64, device=queries.device)
    tensors, sizes = (queries, index, exclude, best, rows), (count, len(index), exclude.shape[1])
    constants = dict(D=width, KEEP=keep, BQ=bq, BG=bg, BD=bd, PRECISION=precision)
    strides, launch = (*queries.stride(), *index.stride()), LAUNCH["hip" if HIP else "cuda"]
    select[(blocks, parts)](*tensors, *sizes, size, *strides, **constants, **launch)
    best, places = best.flatten(1).topk(keep, dim=1)
    return rows.flatten(1).gather(1, places), best[:, -1]
