"""Retrieval metrics (paper section 4): R@1 and mMP@k from embeddings, labels and domains.
Copy with: torch, numpy, kernels/.

    retrieval_metrics(queries, index, exclude=None, k=5)   both Embeddings -> Metrics

An index image is relevant to a query if it shares a label with the query AND is of the same domain.
A query that is itself in the index is excluded by its row there, never by its rank.
Q queries, G index rows, D width.
"""

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels import cosine_topk

QUERY_BLOCK = 2**14  # queries whose neighbours' labels are compared at a time
DEFINITIONS = """\
R@1: the nearest neighbour shares a class with the query, in the same domain.
mMP@5: with n such images in the index, their share among the first min(n, 5) neighbours.
Means over queries, then over domains; in %."""


class Embeddings(NamedTuple):
    vectors: torch.Tensor  # (N, D), any norm
    labels: Sequence  # N 64-bit ints, or sequences of them where an image has several classes
    domains: Sequence[str]  # N


class Metrics(NamedTuple):
    recall_at_1: float  # in [0, 1], mean over each domain's queries, then over domains
    mmp_at_k: float
    per_query_recall: torch.Tensor  # (Q,) float64, 0 or 1
    per_query_mmp: torch.Tensor  # (Q,) float64 in [0, 1]
    neighbours: torch.Tensor  # (Q, k) int64 index rows, nearest first; -1 where there are no more
    similarities: torch.Tensor  # (Q, k) float32, their cosines; -inf where there are no more
    relevant: torch.Tensor  # (Q,) int64, number of relevant index rows, without excluded ones


class Classes(NamedTuple):
    """The classes of N images, a class being a pair of domain and label."""

    ids: np.ndarray  # (L,) int64 in 0..C-1, those of an image ascending and distinct
    starts: np.ndarray  # (N + 1,): image i has ids[starts[i]:starts[i + 1]]


def retrieval_metrics(
    queries: Embeddings,
    index: Embeddings,
    *,
    exclude: torch.Tensor | np.ndarray | None = None,
    k: int = 5,
    search: Callable = cosine_topk,
) -> Metrics:
    """R@1 and mMP@k of `queries` searched in `index`.

    exclude: (Q,) or (Q, E) integers, index rows that each query may not return, or -1: those of the
    query's own image. search: kernels.cosine_topk or a function with the same result.
    R@1 is 1 if the nearest neighbour is relevant. mMP@k: with n relevant rows in the index, not
    counting excluded ones, the number of relevant rows among the first min(n, k) neighbours divided
    by min(n, k); n = 0 gives 0 and counts. Rows of equal similarity rank in ascending order.
    Raises ValueError for lengths, shapes or values that do not fit.
    Source: mMP@k as in UnED (arXiv:2309.01858), but with exclusion by identity.
    """
    vectors = [torch.as_tensor(side.vectors) for side in (queries, index)]
    for name, side, rows in zip(("queries", "index"), (queries, index), vectors):
        if not len(rows) == len(side.labels) == len(side.domains):
            raise ValueError(
                f"{name} have {len(rows)} vectors, {len(side.labels)} labels and "
                f"{len(side.domains)} domains: give one of each per image"
            )
    if not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"k is {k}: it must be a whole number, 1 or more")
    if not len(vectors[0]):
        raise ValueError("there are no queries: give at least one")
    excluded = excluded_rows(exclude, *map(len, vectors))

    query_classes, index_classes, domains = classes_of(queries, index)
    counts = relevant_counts(query_classes, index_classes)
    counts -= shares_class(query_classes, index_classes, excluded).sum(1)
    n = np.minimum(counts, k)[:, None]  # (Q, 1)
    similarities, neighbours = nearest(*vectors, excluded, k, search)  # (Q, k)
    relevant = shares_class(query_classes, index_classes, neighbours)  # (Q, k) bool
    recall = relevant[:, 0].astype(float)
    mmp = (relevant & (np.arange(k) < n)).sum(1) / np.maximum(n, 1)[:, 0]
    means = [domain_mean(values, domains) for values in (recall, mmp)]
    per_query = recall, mmp, neighbours, similarities, counts
    return Metrics(*means, *map(torch.from_numpy, per_query))


def domain_mean(values, domains) -> float:
    """Mean over each domain's queries, then over domains."""
    return float(np.mean([values[domains == domain].mean() for domain in np.unique(domains)]))


def excluded_rows(exclude, query_count, index_count):
    """(Q, E) int64, each row of the index once per query, padded with -1."""
    if exclude is None:
        return np.full((query_count, 1), -1)
    rows = torch.as_tensor(exclude).cpu()
    rows = rows[:, None] if rows.ndim == 1 else rows
    if (
        rows.ndim != 2
        or len(rows) != query_count
        or rows.dtype == torch.bool
        or (rows.is_floating_point() or rows.is_complex())
    ):
        raise ValueError(
            f"exclude is {tuple(rows.shape)} {rows.dtype}: it must hold integers, one or several "
            f"for each of the {query_count} queries"
        )
    rows = np.sort(rows.long().numpy(), axis=1)
    outside = rows[(rows < -1) | (rows >= index_count)]
    if outside.size:
        raise ValueError(
            f"exclude holds {outside[0]}: it must hold rows of the index, which has {index_count}, "
            "or -1"
        )
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
    return rows


def nearest(queries, index, excluded, k, search):
    """-> (Q, k) float32 cosines with the most similar rows of the index, and (Q, k) int64, these
    rows; -inf and -1 where no more are left to a query."""
    similarities = np.full((len(queries), k), -np.inf, dtype=np.float32)
    neighbours = np.full((len(queries), k), -1)
    available = len(index) - (excluded >= 0).sum(1)  # (Q,)
    for count in np.unique(np.minimum(available, k)):  # more than one only for a small index
        group = np.flatnonzero(np.minimum(available, k) == count)
        if count > 0:
            part = queries if len(group) == len(queries) else queries[group]
            scores, rows = search(part, index, int(count), exclude=excluded[group])
            similarities[group, :count] = scores.cpu().numpy()
            neighbours[group, :count] = rows.cpu().numpy()
    return similarities, neighbours


def classes_of(queries, index):
    """-> Classes of the queries and of the index, and the queries' domains, (Q,) int64."""
    domains = domain_ids([*queries.domains, *index.domains])
    sides = [flat_labels(side.labels) for side in (queries, index)]
    labels = np.concatenate([values for values, _ in sides])
    lengths = np.concatenate([lengths for _, lengths in sides])
    images = np.repeat(np.arange(len(lengths)), lengths)
    ids = consecutive(consecutive(labels) * (domains.max() + 1) + domains[images])
    count = ids.max(initial=0) + 1
    images, ids = np.divmod(np.unique(images * count + ids), count)  # each class once per image
    starts = np.searchsorted(images, np.arange(len(lengths) + 1))
    cut = len(queries.labels)
    query_classes = Classes(ids[: starts[cut]], starts[: cut + 1])
    return query_classes, Classes(ids[starts[cut] :], starts[cut:] - starts[cut]), domains[:cut]


def domain_ids(domains):
    """(N,) int64: a number for each image's domain, from 0 on."""
    numbers = {}
    for domain in dict.fromkeys(domains):
        if not isinstance(domain, str):
            raise ValueError(f"domains hold {domain!r}: they must be strings")
        numbers[domain] = len(numbers)
    return np.fromiter(map(numbers.__getitem__, domains), np.int64, len(domains))


def flat_labels(labels):
    """-> all labels, (L,) int64, and how many each image has, (N,) int64."""
    try:
        array = np.asarray(labels)
    except ValueError:  # images with different numbers of labels
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "iu" and len(array) == len(labels) and array.max(initial=0) < 2**63:
        lengths = np.full(len(array), array[:1].size)
        return array.reshape(-1).astype(np.int64), lengths
    several = [
        label if np.ndim(label) or isinstance(label, (set, frozenset)) else (label,)
        for label in labels
    ]
    lengths = np.fromiter(map(len, several), np.int64, len(several))
    try:
        values = [operator.index(label) for labels in several for label in labels]
        return np.array(values, dtype=np.int64), lengths
    except (TypeError, OverflowError) as error:
        raise ValueError(f"labels must be whole numbers of at most 64 bits ({error})") from None


def consecutive(values):
    """Equal values as equal numbers from 0 on; torch's unique takes half the time of numpy's."""
    return torch.unique(torch.from_numpy(values), return_inverse=True)[1].numpy()


def relevant_counts(queries: Classes, index: Classes):
    """(Q,) int64: the number of index rows that share a class with each query."""
    count = max(queries.ids.max(initial=-1), index.ids.max(initial=-1)) + 1
    order = np.argsort(index.ids, kind="stable")
    rows = np.repeat(np.arange(len(index.starts) - 1), np.diff(index.starts))[order]
    ends = np.cumsum(np.bincount(index.ids, minlength=count))
    begins = np.concatenate([[0], ends])[:-1]
    sums = np.concatenate([[0], np.cumsum((ends - begins)[queries.ids])])
    counts = np.diff(sums[queries.starts])
    if (np.diff(index.starts) > 1).any():  # a row may share several classes with a query
        for query in np.flatnonzero(np.diff(queries.starts) > 1):
            ids = queries.ids[queries.starts[query] : queries.starts[query + 1]]
            shared = [rows[begins[i] : ends[i]] for i in ids]
            counts[query] = len(np.unique(np.concatenate(shared)))
    return counts


def shares_class(queries: Classes, index: Classes, rows):
    """(Q, m) bool: whether each query shares a class with index rows (Q, m); False for row -1."""
    count = max(queries.ids.max(initial=0), index.ids.max(initial=0)) + 1
    owners = np.repeat(np.arange(len(rows)), np.diff(queries.starts))
    keys = owners * count + queries.ids  # ascending
    shared = np.zeros(rows.size, dtype=bool)
    for top in range(0, len(rows), QUERY_BLOCK):
        block = rows[top : top + QUERY_BLOCK]
        pairs = np.flatnonzero(block >= 0)
        starts, ends = (index.starts[block.ravel()[pairs] + i] for i in (0, 1))
        lengths = ends - starts
        pairs = np.repeat(pairs, lengths)  # one entry per pair and class of its index row
        offsets = np.arange(len(pairs)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        wanted = (top + pairs // rows.shape[1]) * count
        wanted += index.ids[np.repeat(starts, lengths) + offsets]
        places = np.searchsorted(keys, wanted)
        found = places < len(keys)
        found[found] = keys[places[found]] == wanted[found]
        shared[top * rows.shape[1] + pairs[found]] = True
    return shared.reshape(rows.shape)
