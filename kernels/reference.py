"""The definition of cosine_topk, in float64 and by brute force: the oracle of every backend.

    score(q, r) = rint(2^24 <q, r> / (|q| |r|)) in float64, 0 if a norm is 0. The three sums are
        folded in an order that depends on D alone: a pair has the same score in any block or batch
    topk(queries (Q, D), index (G, D), k, exclude (Q, E)) -> (Q, k) int64 keys
    best(queries, index, query (n,), row (n,), k, exclude) -> (Q, k) keys, the given pairs alone
    result(keys) -> scores (Q, k) float32, rows (Q, k) int64
    merged(parts, firsts, k) -> the same, from searches of consecutive parts of an index

Rounding errors cannot order equal vectors, since scores are multiples of 2^-24, the spacing of
float32 between 0.5 and 1. A key packs (score, row) into one int64 that sorts as the result must:
no two keys are equal, and torch.topk has no ties to break. Copy with: torch only.
"""

import torch
import torch.nn.functional as F

QUERY_BLOCK, INDEX_BLOCK = 1024, 2048  # 16 MB of float64 scores
ROWS_BLOCK = 2**20  # values, 8 MB of float64: rows of such a block
PAIR_BLOCK = 2**16  # values: pairs scored at a time, times D
ONE = 2**24  # the score 1
NOTHING = -(2**63)  # a key below that of any score


def double(rows):
    """Rows (..., D) in float64, scaled so that the squares of their norms are finite."""
    if rows.dtype != torch.float64 or not rows.shape[-1]:
        return rows.double()  # the range of the other types is small enough
    largest = rows.abs().amax(dim=-1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0)


def _folded(products):
    """(..., D) -> (...): the sum, by adding the second half to the first. Overwrites `products`."""
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
    """Scores of pairs: (n, 1, D) and (n, m, D) -> (n, m) float64, whole numbers in -ONE..ONE."""
    queries, rows = double(queries), double(rows)
    norms = _folded(queries * queries).sqrt() * _folded(rows * rows).sqrt()
    return (ONE * _folded(queries * rows) / torch.where(norms > 0, norms, 1.0)).round_()


def as_keys(scores, rows):
    return (scores.long() << 32) + (2**32 - 1 - rows)


def result(keys):
    """Overwrites `keys`."""
    scores = torch.cat([(part >> 32).float() for part in keys.split(2**16)]).div_(ONE)
    return scores, keys.bitwise_and_(2**32 - 1).neg_().add_(2**32 - 1)


def merged(parts, firsts, k):
    """The result for an index from results (scores, rows) for its parts, which begin at the rows
    `firsts` and have min(k, rows left in the part) columns or more."""
    pairs = zip(parts, firsts)
    keys = [as_keys(ONE * scores.double(), rows + first) for (scores, rows), first in pairs]
    return result(torch.cat(keys, dim=1).topk(k, dim=1).values)


def _rounded(exact, queries, rows):
    """2^24 times cosines (q, m) with rounding errors of float64 -> scores. Overwrites `exact`.
    A pair too close to the middle between two whole numbers is scored anew, from queries (q, D)
    and rows (m, D), or (q, m, D) if each query has its own."""
    width = max(1, queries.shape[1])
    found = exact.round()
    doubtful = exact.sub_(found).abs_() > 0.5 - ONE * (2 * width + 16) * 2.0**-52
    places = doubtful.nonzero()
    parts = places.split(max(1, PAIR_BLOCK // width)) if len(places) else ()
    for query, row in (part.T for part in parts):
        near = rows[query, row] if rows.ndim == 3 else rows[row]
        found[query, row] = scores(queries[query, None], near[:, None])[:, 0]
    return found


def best(queries, index, query, row, k, exclude):
    """The k best keys, descending, of each query among distinct pairs (n,) of queries and rows,
    sorted by query. NOTHING where a query has fewer than k."""
    unit = double(queries)
    norms = torch.linalg.vector_norm(unit, dim=1)
    keys = torch.empty_like(row)
    step = max(1, PAIR_BLOCK // max(1, queries.shape[1]))
    for q, r, out in zip(query.split(step), row.split(step), keys.split(step)):
        near = index.index_select(0, r.to(index.device)).to(queries.device)
        wide = double(near)
        both = norms[q] * torch.linalg.vector_norm(wide, dim=1)
        exact = ONE * (unit.index_select(0, q) * wide).sum(1) / both.masked_fill_(both == 0, 1)
        exact = _rounded(exact[:, None], queries.index_select(0, q), near[:, None])
        out.copy_(as_keys(exact[:, 0], r))
    for column in exclude.T:
        keys[column[query] == row] = NOTHING
    counts = torch.bincount(query, minlength=len(queries))
    columns = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    table = keys.new_full((len(queries), max(k, int(counts.max()))), NOTHING)
    table[query, columns] = keys
    return table.topk(k, dim=1).values


def topk(queries, index, k, exclude):
    """The k best keys, descending, of each query among all rows."""
    device, width = queries.device, max(1, queries.shape[1])
    keys = torch.full((len(queries), k), NOTHING, dtype=torch.int64, device=device)
    height, length = (min(n, ROWS_BLOCK // width + 1) for n in (QUERY_BLOCK, INDEX_BLOCK))
    for top in range(0, len(queries), height):
        block, kept = queries[top : top + height], keys[top : top + height]
        unit = ONE * F.normalize(double(block), dim=1, eps=1e-300)  # (q, D) float64
        for left in range(0, len(index), length):
            slab = index[left : left + length].to(device)
            exact = unit @ F.normalize(double(slab), dim=1, eps=1e-300).T  # (q, g)
            part = _rounded(exact, block, slab)
            column = exclude[top : top + height] - left  # (q, E)
            query, which = ((column >= 0) & (column < len(slab))).nonzero(as_tuple=True)
            part[query, column[query, which]] = -2 * ONE
            # Queries whose best new score beats their k-th so far. At equality, that one stays.
            changed = (part.amax(1) > (kept[:, -1] >> 32)).nonzero()[:, 0]
            if len(changed):
                found = as_keys(part[changed], torch.arange(len(slab), device=device) + left)
                found = found.topk(min(k, len(slab)), dim=1).values
                kept[changed] = torch.cat([kept[changed], found], dim=1).topk(k, dim=1).values
    return keys
