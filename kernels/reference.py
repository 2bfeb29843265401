"""What cosine_topk computes, in float64 and by brute force: the oracle of every backend, and the last word on their candidates.

    score(q, r) = rint(2^24 <q, r> / (|q| |r|)) in float64, the three sums of products folded in an order that D alone decides:
    the same bits wherever a pair stands, in whatever block, batch or thread; 0 where a norm is 0
    topk(queries, index, k, exclude) -> (Q, k) int64 keys, all pairs scored
    best(queries, index, rows, k, exclude) -> (Q, k) keys, the given rows of each query scored
    result(keys) -> scores (Q, k) float32, rows (Q, k) int64
    merged(parts, firsts, k) -> the same, of the results of searches in consecutive parts of an index

Scores are whole multiples of 2^-24, the spacing of float32 between 0.5 and 1: rounding noise cannot order equal vectors. A key
packs (score, row) into one int64 that orders as the result must: the score above the complement of the row. No two keys are
equal, so torch.topk, which leaves the order of ties open, has no ties to break.    Copy with: torch only.
"""

import torch
import torch.nn.functional as F

QUERY_BLOCK, INDEX_BLOCK = 1024, 2048  # 16 MB of float64 scores
ROWS_BLOCK = 2**20  # values, 8 MB of float64: of these queries, or rows, no more
RESULT_BLOCK = 2**16  # queries, whose keys are unpacked at a time
PAIR_BLOCK = 2**19  # values, 4 MB of float64: pairs scored at a time, times D
ONE = 2**24  # the score 1
NOTHING = -(2**63)  # a key below that of any score


def double(rows):
    """Rows (..., D) in float64, none so large or small that the square of its norm leaves it."""
    if rows.dtype != torch.float64 or not rows.shape[-1]:
        return rows.double()  # of the other types not even the extremes do
    largest = rows.abs().amax(dim=-1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0)


def _folded(products):
    """(..., D) -> (...): the sum, by adding the second half to the first. Overwrites its argument. D = 0 gives 0."""
    width = products.shape[-1]
    if not width:
        return products.sum(-1)
    while width > 1:
        half = width // 2
        products[..., :half] += products[..., half : 2 * half]
        if width % 2:
            products[..., 0] += products[..., width - 1]
        width = half
    return products[..., 0]


def scores(queries, rows):
    """Scores of pairs: (n, 1, D) and (n, m, D), of any type -> (n, m) float64, whole numbers from -ONE to ONE."""
    queries, rows = double(queries), double(rows)
    norms = _folded(queries * queries).sqrt() * _folded(rows * rows).sqrt()
    return (ONE * _folded(queries * rows) / torch.where(norms > 0, norms, 1.0)).round_()


def as_keys(scores, rows):
    return (scores.long() << 32) + (2**32 - 1 - rows)


def result(keys):
    """Overwrites its argument."""
    scores = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    for part, out in zip(keys.split(RESULT_BLOCK), scores.split(RESULT_BLOCK)):
        out.copy_(part >> 32).div_(ONE)
        part.bitwise_and_(2**32 - 1).neg_().add_(2**32 - 1)
    return scores, keys


def merged(parts, firsts, k):
    """Results (scores, rows) of the parts of an index, each with at least min(k, what is left of it) columns, and the row at
    which each part begins -> the result of the whole index, bit for bit. For several GPUs or processes."""
    return result(
        torch.cat(
            [
                as_keys(ONE * scores.double(), rows + first)
                for (scores, rows), first in zip(parts, firsts)
            ],
            dim=1,
        )
        .topk(k, dim=1)
        .values
    )


def _rounded(exact, width, scored):
    """2^24 times cosines, off by the rounding noise of float64, overwritten -> scores: where the noise leaves a doubt because a
    value lies too near the middle of two whole numbers, what `scored` says of the pairs at these places."""
    part = exact.round()
    doubtful = (exact.sub_(part).abs_() > 0.5 - ONE * (2 * width + 16) * 2.0**-52).nonzero()
    for places in doubtful.split(max(1, PAIR_BLOCK // max(1, width))) if len(doubtful) else ():
        part[places[:, 0], places[:, 1]] = scored(*places.T)
    return part


def best(queries, index, rows, k, exclude=None):
    """The k best keys, descending, of each query's rows (Q, m), m >= k and none twice; a row -1 is none."""
    keys, width = (
        torch.empty(len(queries), k, dtype=torch.int64, device=queries.device),
        queries.shape[1],
    )
    step = max(1, PAIR_BLOCK // max(1, rows.shape[1] * width))
    several = max(1, PAIR_BLOCK // max(1, width))  # rows, where one query's are too many
    for top in range(0, len(queries), step):
        block, mine = queries[top : top + step], rows[top : top + step]
        asked = double(block)
        lengths = torch.linalg.vector_norm(asked, dim=1, keepdim=True)
        found = torch.empty_like(mine)
        for part, out in zip(mine.split(several, dim=1), found.split(several, dim=1)):
            near = (
                index.index_select(0, part.clamp(min=0).flatten().to(index.device))
                .view(*part.shape, width)
                .to(queries.device)
            )
            wide = double(near)
            norms = lengths * torch.linalg.vector_norm(wide, dim=2)  # (q, m)
            exact = (
                (asked[:, None] @ wide.mT)[:, 0].mul_(ONE).div_(norms.masked_fill_(norms == 0, 1.0))
            )
            out.copy_(
                as_keys(
                    _rounded(
                        exact, width, lambda q, m: scores(block[q, None], near[q, m, None])[:, 0]
                    ),
                    part,
                )
            )
        barred = (
            mine < 0 if exclude is None else (mine < 0) | (mine == exclude[top : top + step, None])
        )
        keys[top : top + step] = found.masked_fill_(barred, NOTHING).topk(k, dim=1).values
    return keys


def topk(queries, index, k, exclude=None):
    """The k best keys, descending, by a float64 product: where it lies too near the middle of two whole numbers for its own
    rounding noise to leave no doubt, the pair is scored anew."""
    device, width = queries.device, queries.shape[1]
    keys = torch.full((len(queries), k), NOTHING, dtype=torch.int64, device=device)
    several, many = (
        max(1, min(block, ROWS_BLOCK // max(1, width))) for block in (QUERY_BLOCK, INDEX_BLOCK)
    )
    for top in range(0, len(queries), several):
        block = queries[top : top + several]
        unit = ONE * F.normalize(double(block), dim=1, eps=1e-300)  # (q, D) float64
        mine = keys[top : top + several]  # a view
        for left in range(0, len(index), many):
            slab = index[left : left + many].to(device)
            exact = unit @ F.normalize(double(slab), dim=1, eps=1e-300).T  # (q, g)
            part = _rounded(exact, width, lambda q, g: scores(block[q, None], slab[g, None])[:, 0])
            if exclude is not None:
                column = exclude[top : top + several] - left
                here = ((column >= 0) & (column < part.shape[1])).nonzero()[:, 0]
                part[here, column[here]] = -2 * ONE
            # Only a query whose best new score beats its k-th so far can change (at equality the earlier row stays).
            changed = (part.amax(1) > (mine[:, -1] >> 32)).nonzero()[:, 0]
            if len(changed):
                rows = torch.arange(left, left + part.shape[1], device=device)
                found = as_keys(part[changed], rows)
                found = found.topk(min(k, found.shape[1]), dim=1).values
                mine[changed] = torch.cat([mine[changed], found], dim=1).topk(k, dim=1).values
    return keys
