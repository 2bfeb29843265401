"""cosine_topk in Triton: the scores never leave the chip, the reference ranks what they select.

    topk(queries, index, k, exclude, precision="tf32" | "ieee") -> (Q, k) int64 keys, as reference.topk

1. select: a program holds a block of queries and its `keep` > k best rows so far, while a part of the index streams past it in
   tiles; a tile's scores (tensor cores, float32 sums, norms taken on the way) enter one maximum per query at a time, and only
   while some query's maximum beats the worst it holds: after the first tiles hardly ever.
2. merge: the parts' best rows of a query become its `keep` best.
3. The reference scores these rows. If its k-th score is above the worst of the kept ones by more than the precision's noise, no
   other row can belong to the result; queries of which that cannot be said go to the reference whole.
Copy with: reference.py, torch, triton.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import reference
from kernels.reference import ONE

# By the bytes of a value: queries, index rows and dimensions of a tile, warps, stages. Not tuned: no GPU has run them yet.
TILES = {4: (64, 64, 32, 4, 3), 2: (64, 128, 64, 4, 3)}
PROGRAMS = 264                 # as many at least, by splitting the index: two for each of an H100's processors
LARGEST_K, LARGEST_WIDTH = 64, 1024


@triton.jit
def select(queries, index, exclude, best, rows, q_count, g_count, part, q_stride, q_step, g_stride, g_step,
           D: tl.constexpr, KEEP: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    q = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)                        # (BQ,)
    start = tl.program_id(1).to(tl.int64) * part                                     # rows of the index, int64: G D may pass 2^31
    end = tl.minimum(start + part, g_count)
    barred = tl.load(exclude + q, mask=q < q_count, other=-1)
    d, slot = tl.arange(0, BD), tl.arange(0, KEEP)
    held = tl.full((BQ, KEEP), float("-inf"), tl.float32)
    held_rows = tl.full((BQ, KEEP), -1, tl.int32)                                    # counted from start
    for left in range(0, (end - start).to(tl.int32), BG):
        column = left + tl.arange(0, BG)                                             # (BG,) int32
        g = start + column
        scores = tl.zeros((BQ, BG), tl.float32)
        q_norm, g_norm = tl.zeros((BQ,), tl.float32), tl.zeros((BG,), tl.float32)
        for at in range(0, D, BD):
            inside = at + d < D
            a = tl.load(queries + q[:, None] * q_stride + (at + d)[None, :] * q_step,                # (BQ, BD)
                        mask=(q < q_count)[:, None] & inside[None, :], other=0.0)
            b = tl.load(index + g[:, None] * g_stride + (at + d)[None, :] * g_step,                  # (BG, BD)
                        mask=(g < end)[:, None] & inside[None, :], other=0.0)
            q_norm += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
            g_norm += tl.sum(b.to(tl.float32) * b.to(tl.float32), axis=1)
            scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
        q_norm, g_norm = tl.where(q_norm > 0, q_norm, 1.0), tl.where(g_norm > 0, g_norm, 1.0)
        scores = scores / (tl.sqrt(q_norm)[:, None] * tl.sqrt(g_norm)[None, :])
        scores = tl.where((g < end)[None, :] & (g[None, :] != barred[:, None]), scores, float("-inf"))
        top, where = tl.max(scores, axis=1, return_indices=True)
        worst, place = tl.min(held, axis=1, return_indices=True)
        while tl.max((top > worst).to(tl.int32), axis=0) > 0:
            here = (slot[None, :] == place[:, None]) & (top > worst)[:, None]
            held = tl.where(here, top[:, None], held)
            held_rows = tl.where(here, (left + where)[:, None], held_rows)
            scores = tl.where(tl.arange(0, BG)[None, :] == where[:, None], float("-inf"), scores)
            top, where = tl.max(scores, axis=1, return_indices=True)
            worst, place = tl.min(held, axis=1, return_indices=True)
    out = (q[:, None] * tl.num_programs(1) + tl.program_id(1)) * KEEP + slot[None, :]
    tl.store(best + out, held, mask=(q < q_count)[:, None])
    tl.store(rows + out, tl.where(held_rows < 0, -1, start + held_rows), mask=(q < q_count)[:, None])


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
    if k > LARGEST_K or not 1 <= queries.shape[1] <= LARGEST_WIDTH:
        raise ValueError(f"k is {k}, and the rows have {queries.shape[1]} values: the triton backend takes k to {LARGEST_K} and "
                         f"1 to {LARGEST_WIDTH} values; use backend 'torch'")
    exclude = torch.full((len(queries),), -1, device=queries.device) if exclude is None else exclude
    keys = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    same = queries.dtype if queries.dtype == index.dtype else torch.float32
    there = _tame(index.to(queries.device), same)
    for top in range(0, len(queries), 2**14):
        part = slice(top, top + 2**14)
        kept, worst = _selected(_tame(queries[part], same), there, k, exclude[part], precision)
        keys[part] = reference.best(queries[part], index, kept, k, exclude[part])
        # The noise of a score that is 2^24 times: of the sums, and of values that tensor cores cut to 10 bits behind the point.
        noise = 3 * queries.shape[1] + 40 + (2.0**16 if precision == "tf32" and there.element_size() == 4 else 0)
        unsure = ((keys[part][:, -1] >> 32) <= worst.double() * ONE + noise).nonzero()[:, 0]
        if len(unsure):
            keys[part][unsure] = reference.topk(queries[part][unsure], index, k, exclude[part][unsure])
    return keys


def _tame(rows, dtype):
    """Rows as the kernel takes them: no squared norm may leave float32, and float64 does not go in."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if dtype == torch.float64 or not ((norms == 0) | (norms > 1e-12) & (norms < 1e12)).all():
        return F.normalize(reference.double(rows), dim=1, eps=1e-300).float()
    return rows.to(dtype)


def _selected(queries, index, k, exclude, precision):
    """-> rows (q, keep) int64, -1 where there is none, and (q,) the worst of their scores, -inf if none was left out."""
    if queries.dtype != index.dtype:
        queries, index = queries.float(), index.float()
    bq, bg, bd, warps, stages = TILES[index.element_size()]
    keep, blocks = triton.next_power_of_2(k + 8), triton.cdiv(len(queries), bq)
    parts = max(1, min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(len(index), 16 * bg), 64))
    size = triton.cdiv(triton.cdiv(len(index), parts), bg) * bg
    parts = triton.cdiv(len(index), size)
    best = torch.empty(len(queries), parts, keep, device=queries.device)
    rows = torch.empty(len(queries), parts, keep, dtype=torch.int64, device=queries.device)
    select[(blocks, parts)](queries, index, exclude, best, rows, len(queries), len(index), size, *queries.stride(), *index.stride(),
                            D=queries.shape[1], KEEP=keep, BQ=bq, BG=bg, BD=bd, PRECISION=precision, num_warps=warps,
                            num_stages=stages)
    kept, worst = torch.empty_like(rows[:, 0]), torch.empty_like(best[:, 0, 0])
    merge[(len(queries),)](best, rows, worst, kept, parts, KEEP=keep, WIDTH=triton.next_power_of_2(parts * keep))
    return kept, worst
