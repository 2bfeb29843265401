"""cosine_topk on a CPU: little more than a float32 product, and the reference's result bit for bit.

For a block of queries and a chunk of the index:
1. Each tile of float32 scores is reduced to the maxima of groups of 16 rows, 16 tiles to the
   maxima of 16 groups. The rows of a group are a stride apart: neighbours, which are often alike,
   fall into different groups.
2. Maxima belong to distinct rows. The (k + E)-th largest of all seen so far, less the error bound
   of float32, is therefore not above the float32 score of any row of the result.
3. Only groups whose maxima reach this bound are searched further: their rows are gathered and
   scored in float32, or where they are too many, their tiles are computed once more.
The reference ranks the rows that reach the bound by float64 scores, and a query with thousands of
them as a whole. Copy with: the folder kernels/, torch.
"""

import functools
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import reference

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # torch.compile's linear layer
FANOUT = 16  # rows in a group, groups in a group of groups
TILE, BLOCK = 1024, 512  # index rows and queries of a tile: 2 MB of float32 scores
CHUNK = 2**18  # index rows of a chunk, over all threads: 36 MB of maxima
PREPARED = 2**23  # values, 32 MB: rows of a tile, which few queries make longer
GATHERED = 2**18  # values, 1 MB: rows that are gathered at a time
GATHERING = 32  # rows of a product that cost as much as one gathered row
READ, RANKED = 2**13, 128  # groups read from a tile, queries left to the reference, at a time
SURVIVORS = 1024  # rows per query, or 4 k, that the reference scores one by one
# Multiplications: the reference up to FEW, threads from THREADED, the faster product from TIMED.
FEW, THREADED, TIMED = 2**23, 2**24, 2**30

_entering, _inside = threading.Lock(), []  # of _single_threaded


def topk(queries, index, k, exclude):
    (count, width), total = queries.shape, len(index)
    work, needed = count * total * width, min(total, k + exclude.shape[1])
    if work <= FEW or 2 * FANOUT * needed > total:
        return reference.topk(queries, index, k, exclude)
    keys = torch.empty(count, k, dtype=torch.int64)
    with _single_threaded() as threads, ThreadPoolExecutor(threads, "", _use_one_thread) as pool:
        spread = pool.map if threads > 1 and work >= THREADED else map
        normalise = _normaliser(index, spread)
        onednn = ONEDNN is not None and work >= TIMED and _onednn_is_faster()
        chunk = max(CHUNK // threads, 4 * FANOUT * needed)  # index rows
        size = -(-count // (-(-count // (BLOCK * threads)) * threads))  # an equal share each
        parts = iter([slice(top, top + size) for top in range(0, count, size)])

        def search(_):
            buffers = {}  # of this thread, for all its blocks
            for part in parts:
                block = _Block(queries[part], index, k, exclude[part], normalise, onednn, buffers)
                keys[part] = block.keys(chunk)

        list(spread(search, range(threads)))
    return keys


@contextmanager
def _single_threaded():
    """Products of full precision on one thread each. Yields the number of threads before. The
    settings are the process's: the first search to enter changes them, the last restores them."""
    product = torch.backends.mkldnn.matmul
    with _entering:
        if not _inside:
            before, product.fp32_precision = product.fp32_precision, "none"  # none: inherited
            state = torch.get_num_threads(), "none" if product.fp32_precision == before else before
            product.fp32_precision = "ieee"
        _inside.append(_inside[0] if _inside else state)
        threads, precision = _inside[0]
        _use_one_thread()
    try:
        yield threads
    finally:
        with _entering:
            _inside.pop()
            torch.set_num_threads(threads)
            if not _inside:
                product.fp32_precision = precision


def _use_one_thread():
    torch.get_num_threads()  # takes over the process's number, as a thread's first operation would
    torch.set_num_threads(1)


@functools.cache
def _onednn_is_faster():
    """Than torch.mm, which is MKL's: twice on some AMD processors, but its output is allocated."""
    rows, queries = (torch.rand(n, 64, dtype=torch.float32) for n in (TILE, BLOCK))
    columns, tile = queries.T.contiguous(), rows.new_empty(TILE, BLOCK)
    onednn = timeit.repeat(lambda: ONEDNN(rows, queries, None, "none", [], ""), number=1, repeat=7)
    mkl = timeit.repeat(lambda: torch.mm(rows, columns, out=tile), number=1, repeat=7)
    return min(onednn) < min(mkl)


def _normaliser(index, spread):
    """A function: rows (n, D) of the index -> float32 rows, norms 1 within 2^-20 or 0."""
    parts = index.split(max(1, GATHERED // index.shape[1]))
    norms = torch.cat([*spread(lambda rows: torch.linalg.vector_norm(rows.float(), dim=1), parts)])
    if index.dtype == torch.float32 and index.is_contiguous():
        if (norms - 1).abs().max() < 2**-20:
            return _unchanged
    zero = norms == 0
    tame = zero | (norms > 1e-15) & (norms < 1e15)  # their squares are in float32's range
    if index.dtype == torch.float64 or not tame.all() or index[zero].any():
        return _normalised
    return lambda rows: F.normalize(rows.float(), dim=1, eps=1e-20).contiguous()


def _unchanged(rows):
    return rows


def _normalised(rows):
    return F.normalize(reference.double(rows), dim=1, eps=1e-300).float().contiguous()


class _Block:
    """A block of queries: q queries, their bounds, and the rows that reach them. A tile is `size`
    rows of the index; a group, 16 of them that are `stride` rows apart."""

    def __init__(self, queries, index, k, exclude, normalise, onednn, buffers):
        self.queries, self.index, self.k, self.exclude = queries, index, k, exclude
        self.normalise, self.onednn, self.buffers = normalise, onednn, buffers
        self.unit = _normalised(queries)  # (q, D)
        self.columns = self.unit.T.contiguous()
        (self.count, self.width), self.total = queries.shape, len(index)
        self.best = self.unit.new_empty(self.count, 0)  # (q, k + E) largest maxima
        self.counts = torch.zeros(self.count, dtype=torch.int64)  # rows that reach the bound
        self.limit, self.found = max(SURVIVORS, 4 * k), []  # query * 2^32 + row

    def keys(self, chunk):
        size = min(TILE * max(1, BLOCK // self.count), max(TILE, PREPARED // self.width))
        tiles = -(-self.total // size)
        self.stride = -(-self.total // (tiles * FANOUT))
        self.size = self.stride * FANOUT
        tiles = -(-self.total // self.size)
        step = -(-tiles // -(-tiles * self.size // chunk))
        for first in range(0, tiles, step):
            self.search(first, min(step, tiles - first))
        return self.ranked()

    def buffer(self, name, rows):
        """(rows, q) float32, uninitialised. The first use is the largest."""
        size = rows * self.count
        return self.buffers.setdefault(name, self.unit.new_empty(size))[:size].view(rows, -1)

    def tile(self, number):
        """Scores (size, q) of the rows of a tile, -inf beyond the last row of the index."""
        rows = self.normalise(self.index[number * self.size : (number + 1) * self.size])
        if self.onednn and len(rows) == self.size:
            return ONEDNN(rows, self.unit, None, "none", [], "")
        scores = self.buffer("scores", self.size)
        torch.mm(rows, self.columns, out=scores[: len(rows)])
        scores[len(rows) :] = -torch.inf
        return scores

    def search(self, first, tiles):
        """Adds the rows of consecutive tiles that reach the bounds."""
        needed, fanout = min(self.total, self.k + self.exclude.shape[1]), min(FANOUT, tiles)
        parents = -(-tiles // fanout)
        groups = self.buffer("groups", parents * fanout * self.stride)
        parts = groups.split(self.stride)  # of a tile each
        groups[tiles * self.stride :] = -torch.inf
        for i in range(tiles):
            torch.amax(self.tile(first + i).view(FANOUT, self.stride, -1), 0, out=parts[i])
        supergroups = groups.view(parents, fanout, self.stride, -1).amax(1).flatten(0, 1)
        maxima = supergroups if len(supergroups) >= 4 * needed else groups
        self.best = torch.cat([self.best, maxima.T], dim=1).topk(needed, dim=1).values
        error = (3 * self.width + 40) * 2.0**-24  # of a difference of float32 scores
        bounds = (self.best[:, -1].double() - error).clamp(min=-2).float()  # above -inf
        self.bounds = bounds.masked_fill_(self.counts > self.limit, torch.inf)
        most = tiles * self.size * self.count // (FANOUT * GATHERING)  # groups worth gathering
        group, query = (supergroups >= self.bounds).nonzero(as_tuple=True)
        if len(group) <= most:
            group = self.members(group, fanout)  # (n, fanout)
            reached = groups[group, query[:, None]] >= self.bounds[query, None]
            parent, member = reached.nonzero(as_tuple=True)
            group, query = group[parent, member], query[parent]
        if len(group) <= most:
            return self.gather(first * self.size, group, query)
        for i in range(tiles):
            pairs = (parts[i] >= self.bounds).nonzero()
            tile = self.tile(first + i).view(FANOUT, self.stride, -1) if len(pairs) else None
            for group, query in (part.T for part in pairs.split(READ) if len(part)):
                scores = tile[:, group, query]  # (16, n)
                member, pair = (scores >= self.bounds[query]).nonzero(as_tuple=True)
                row = (first + i) * self.size + member * self.stride + group[pair]
                self.add(query[pair], row)

    def members(self, nodes, fanout):
        """(n,) -> (n, fanout): rows of groups, or groups of groups."""
        firsts = nodes // self.stride * fanout * self.stride + nodes % self.stride
        return firsts[:, None] + self.stride * torch.arange(fanout)

    def gather(self, left, groups, queries):
        """Adds rows of pairs (n,) of groups, of a chunk that begins at row `left`, and queries."""
        step = max(1, GATHERED // (FANOUT * self.width))
        for group, query in zip(groups.split(step), queries.split(step)):
            rows = (self.members(group, FANOUT) + left).flatten()  # (16 n,)
            near = self.index.index_select(0, rows.clamp(max=self.total - 1))
            near = self.normalise(near).view(-1, FANOUT, self.width)
            scores = torch.bmm(self.unit.index_select(0, query)[:, None], near.mT)[:, 0]
            reached = scores >= self.bounds.index_select(0, query)[:, None]
            found = (reached.flatten() & (rows < self.total)).nonzero()[:, 0]
            self.add(query[found // FANOUT], rows[found])

    def add(self, query, row):
        self.found.append((query << 32) + row)
        self.counts += torch.bincount(query, minlength=self.count)
        self.bounds[self.counts > self.limit] = torch.inf  # left to the reference

    def ranked(self):
        many = self.counts > self.limit
        pairs = torch.cat([part[~many[part >> 32]] for part in self.found]).sort().values
        query, row = pairs >> 32, pairs & (2**32 - 1)
        keys = reference.best(self.queries, self.index, query, row, self.k, self.exclude)
        for some in many.nonzero()[:, 0].split(RANKED):
            keys[some] = reference.topk(self.queries[some], self.index, self.k, self.exclude[some])
        return keys
