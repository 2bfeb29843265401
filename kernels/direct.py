"""cosine_topk of few pairs, whose float32 scores are all kept: by numpy, whose calls cost less than torch's.

    of_many(queries, index, precise, k, exclude, product) -> scores (Q, k), rows (Q, k), as reference.result, or None
    of_one(the same)                                      -> the same, of one query in float32
    in_parts(rows, index) -> rows @ index.T, for `product`

Pairs no further below a query's k-th best in float32 than the noise are scored in float64. None where that is no use.
Copy with: kernels/reference.py, torch, numpy.
"""

import math

import numpy as np
import torch

from kernels import reference
from kernels.reference import ONE

least, most = (
    np.minimum.reduce,
    np.maximum.reduce,
)  # a call of min() or max() takes twice as long, for a few values
UNTHREADED = (
    2**19 - 1
)  # values of pairs: as many OpenBLAS, which is numpy's, multiplies without threads
PAIRS = (
    2**18
)  # values of the pairs that float32 leaves, if these are many more than asked for: 2 MB in float64
SHIFT = np.array(
    1.5 * 2.0**28
)  # added to a float64 and subtracted: rounds it to 2^-24, and leaves no -0
TINY = np.array(1e-300)  # an array, since numpy takes twice as long for a Python number


def of_one(queries, index, precise, k, exclude, product):
    """of_many, of one query (1, D), where every call of numpy counts."""
    total, width = index.shape
    with np.errstate(all="ignore"):
        norms = _norms(index, index)
    unit = queries[0].astype(np.float64)
    asked = math.sqrt(unit.dot(unit)) or 1.0
    if norms is None or not 1e-15 < asked < 1e15:
        return None
    unit /= asked
    cosines = product(queries[0])  # but for the query's norm, which changes no order
    cosines /= norms
    if exclude is not None and exclude[0] >= 0:
        cosines[exclude[0]] = -np.inf
    maxima, several = cosines, total
    if (
        total > 4096 and total >= 32 * k
    ):  # the k-th best of groups' maxima is not above that of all, nor far below
        several = total // 8
        maxima = most(cosines[: 8 * several].reshape(8, several))
    else:
        maxima = cosines.copy()
    maxima.partition(several - k)
    row = (cosines >= maxima[several - k] - _noise(width) * asked).nonzero()[0]
    scores = _scores(queries, precise, unit, None, row)
    order = (-scores).argsort(kind="stable")[None, :k]  # rows ascend already
    return scores[order].astype(np.float32), row[order]


def of_many(queries, index, precise, k, exclude, product):
    """Arrays (Q, D) float32 or float64, (G, D) float32, and the rows as given, the same or float64; product(rows), which is
    rows @ index.T and may be overwritten -> scores (Q, k) float32, descending, and rows (Q, k) int64.

    All pairs that float32 does not rule out are scored in float64: those no further below the query's k-th best than its noise.
    None where that is no use: where too many are that near, and for rows whose norm strains float32 or is not finite.
    """
    (count, width), total = queries.shape, index.shape[0]
    unit = _double(queries)
    with np.errstate(all="ignore"):
        norms, asked = _norms(index, precise), _norms(unit, unit)
    if norms is None or asked is None:
        return None
    unit /= asked[:, None]
    cosines = product(unit.astype(np.float32, order="C"))
    cosines /= norms
    if exclude is not None:
        barred = np.flatnonzero(exclude >= 0)
        cosines[barred, exclude[barred]] = -np.inf
    if (
        count * total > 4096 and total >= 32 * k
    ):  # the k-th best of groups' maxima is not above that of all, nor far below
        several = total // 8
        maxima = (
            torch.from_numpy(cosines)[:, : 8 * several].unflatten(1, (8, several)).amax(1).numpy()
        )
    else:
        several, maxima = total, cosines.copy()
    maxima.partition(several - k)
    near = (cosines >= maxima[:, several - k, None] - _noise(width)).ravel().nonzero()[0]
    if near.size > max((4 * k + 16) * count, PAIRS // width):
        return None
    query, row = np.divmod(near, total)
    scores = _scores(queries, precise, unit, query, row)
    order = (3.0 * query - scores).argsort(
        kind="stable"
    )  # by the query, then by the score, then by the row
    if near.size > count * k:
        order = order[query.searchsorted(np.arange(count))[:, None] + np.arange(k)]
    order = order.reshape(count, k)
    return scores[order].astype(np.float32), row[order]


def in_parts(rows, index):
    """rows (D,) or (q, D) @ index.T, in parts that numpy takes no threads for."""
    step = max(1, UNTHREADED // rows.size)
    if len(index) <= step:
        return rows.dot(index.T)
    products = np.empty((*rows.shape[:-1], len(index)), np.float32)
    for top in range(0, len(index), step):
        np.matmul(rows, index[top : top + step].T, out=products[..., top : top + step])
    return products


def _noise(width):
    """By how much two cosines of rows (D,), their norms and a product in float32, can be off together."""
    return (3 * width + 40) * 2.0**-24


def _scores(queries, index, unit, query, row):
    """reference.scores / ONE, (n,) float64, of queries[query] and index[row]; `unit` are the queries as float64 unit rows (Q, D),
    or where `query` is None their only one, (D,)."""
    width = index.shape[1]
    step = max(1, 2**15 // width)  # pairs whose float64 values stay in the cache
    if row.size > step:
        parts = (slice(top, top + step) for top in range(0, row.size, step))
        return np.concatenate(
            [
                _scores(queries, index, unit, query if query is None else query[part], row[part])
                for part in parts
            ]
        )
    wide = _double(index.take(row, 0))
    squares = np.vecdot(wide, wide)
    squares += TINY
    exact = wide.dot(unit) if query is None else np.vecdot(wide, unit.take(query, 0))
    exact /= np.sqrt(squares, squares)
    scores = exact + SHIFT
    scores -= SHIFT
    exact -= scores
    doubt = np.abs(exact, exact)
    if doubt[doubt.argmax()] > (sure := 2.0**-25 - (2 * width + 16) * 2.0**-52):
        some = (doubt > sure).nonzero()[0]
        asked = queries[np.zeros_like(some) if query is None else query[some]]
        scores[some] = (
            reference.scores(
                *(torch.from_numpy(side)[:, None] for side in (asked, index[row[some]]))
            )[:, 0]
            / ONE
            + 0.0
        )
    return scores


def _double(rows):
    """reference.double, a copy."""
    if rows.dtype == np.float32:
        return rows.astype(np.float64)
    largest = most(np.abs(rows), axis=1, keepdims=True)
    return rows / np.where(largest > 0, largest, 1.0)


def _norms(rows, given):
    """(n, D) -> (n,), 1 for a row of zeros alone, as it was given; None where one strains float32 or is not finite."""
    squares = np.vecdot(rows, rows)
    smallest = squares[squares.argmin()]  # NaN if there is one
    if smallest == 0:
        zero = squares == 0
        smallest = 0 if given[zero].any() else least(squares, where=~zero, initial=1)
        squares[zero] = 1
    return (
        np.sqrt(squares, squares) if smallest > 1e-30 and squares[squares.argmax()] < 1e30 else None
    )
