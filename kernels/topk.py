"""Exact top-k by cosine similarity, streamed on both sides.

    cosine_topk(queries (Q, D), index (G, D), k, exclude=None, backend="auto") -> scores (Q, k) float32, rows (Q, k) int64

The torch path below is the CPU path, and the reference that every other backend is checked against.
"""

import torch
import torch.nn.functional as F

QUERY_BLOCK, INDEX_BLOCK = 1024, 2048     # 16 MB of float64 scores

# Scores are whole multiples of 2^-24, the spacing of float32 between 0.5 and 1: rounding noise cannot order equal vectors. A
# key packs (score, row) into one int64 that orders as the result must: the score above the complement of the row. No two keys
# are equal, so topk, which leaves the order of ties open, has no ties to break.
ONE = 2**24                               # the score 1
NOTHING = -(2**63)                        # a key below that of any score


def cosine_topk(queries, index, k, *, exclude=None, backend="auto"):
    """The k rows of `index` most similar to each query: exhaustive search, similarities told apart down to 2^-24.

    queries (Q, D), index (G, D): floating point, any norm (rows are L2-normalised inside; a zero row has similarity 0 to all).
    exclude: (Q,) integers, an index row that each query may not return, or -1.
    Returns scores (Q, k) float32 in [-1, 1], descending, and rows (Q, k) int64 on the queries' device. Rows of equal score come
    in ascending order. Scores are computed in float64 and rounded to multiples of 2^-24, so that rounding noise does not order
    equal vectors (unless their cosine is within 1e-9 of the middle between two multiples). Memory: O((Q + G) D + Q k)
    and one block of 1024 x 2048 scores; never Q x G.
    backend: "torch", "auto" (the fastest there is; torch so far), "triton" (not built yet).
    Raises ValueError for shapes, types or values that do not fit, and for k above the number of rows left to a query.
    """
    queries, index = torch.as_tensor(queries), torch.as_tensor(index)
    if backend == "triton":
        raise NotImplementedError("backend 'triton' is not built yet: use 'auto' or 'torch'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend {backend!r} is unknown: use 'auto', 'torch' or 'triton'")
    exclude = _validated(queries, index, k, exclude)
    return _torch_topk(queries, index, int(k), exclude)


def _validated(queries, index, k, exclude):
    for name, matrix in (("queries", queries), ("index", index)):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(f"{name} are {tuple(matrix.shape)} {matrix.dtype}: they must be two-dimensional and floating point")
        finite = matrix.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(f"{name} row {int((~finite).nonzero()[0])} holds a value that is not finite: all must be")
    if queries.shape[1] != index.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, the index has {index.shape[1]}: they must have the same")
    left = len(index)
    if exclude is not None:
        exclude = torch.as_tensor(exclude, device=queries.device)
        if exclude.shape != queries.shape[:1] or exclude.is_floating_point() or exclude.dtype == torch.bool:
            raise ValueError(f"exclude is {tuple(exclude.shape)} {exclude.dtype}: it must hold one integer for each of the "
                             f"{len(queries)} queries")
        exclude = exclude.long()
        outside = (exclude < -1) | (exclude >= len(index))
        if outside.any():
            raise ValueError(f"exclude holds {int(exclude[outside][0])}: it must hold rows of the index, 0 to "
                             f"{len(index) - 1}, or -1")
        left -= int((exclude >= 0).any())
    if k != int(k) or not 1 <= k <= left:
        raise ValueError(f"k is {k}: it must be from 1 to {left}, the rows of the index less the excluded one")
    return exclude


def _unit(rows):
    """Rows (n, D) of any norm -> float64 unit rows; by the largest value first, whose square would not fit float64."""
    rows = rows.double()
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    return F.normalize(rows / torch.where(largest > 0, largest, 1.0), dim=1)


def _torch_topk(queries, index, k, exclude):
    device = queries.device
    best = torch.full((len(queries), k), NOTHING, dtype=torch.int64, device=device)                # (Q, k) keys
    for top in range(0, len(queries), QUERY_BLOCK):
        unit = ONE * _unit(queries[top:top + QUERY_BLOCK])                                         # (q, D) float64
        mine = best[top:top + QUERY_BLOCK]                                                         # a view
        for left in range(0, len(index), INDEX_BLOCK):
            part = (unit @ _unit(index[left:left + INDEX_BLOCK].to(device)).T).round_()            # (q, g)
            if exclude is not None:
                column = exclude[top:top + QUERY_BLOCK] - left
                here = ((column >= 0) & (column < part.shape[1])).nonzero()[:, 0]
                part[here, column[here]] = -2 * ONE
            # Only a query whose best new score beats its k-th so far can change (at equality the earlier row stays).
            changed = (part.amax(1) > (mine[:, -1] >> 32)).nonzero()[:, 0]
            if len(changed):
                rows = torch.arange(left, left + part.shape[1], device=device)
                keys = (part[changed].long() << 32) + (2**32 - 1 - rows)
                keys = keys.topk(min(k, keys.shape[1]), dim=1).values
                mine[changed] = torch.cat([mine[changed], keys], dim=1).topk(k, dim=1).values
    return ((best >> 32) / ONE).float(), 2**32 - 1 - (best & (2**32 - 1))
