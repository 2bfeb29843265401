"""cosine_topk on a CPU: little more than a float32 product, and the reference's result bit for bit.

    topk(queries (Q, D), index (G, D), k, exclude (Q, E) or None) -> (Q, k) int64 keys

For a block of queries and a chunk of the index:
1. Each tile of float32 scores is reduced to the maxima of groups of 16 rows, and 16 tiles to the
   maxima of 16 groups. The rows of a group are a stride apart: neighbours, which are often
   alike, fall into different groups.
2. The maxima belong to distinct rows. The (k + E)-th largest of all seen so far, less the error
   bound of float32, is therefore not above the float32 score of any row of the result.
3. Only groups whose maxima reach this bound are searched further. Their rows are gathered and
   scored in float32, or where they are too many, their tiles are computed once more.
In the end, the reference scores the rows that reached the bound in float64 and ranks them. The
bound depends on blocks, chunks and threads; the result does not. A query with thousands of such
rows is left to the reference as a whole. Copy with: the folder kernels/, torch.
"""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import reference

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # torch.compile's linear layer
FANOUT = 16  # rows in a group, groups in a group of groups
TILE, BLOCK = 1024, 512  # index rows and queries of a tile: 2 MB of float32 scores
CHUNK = 2**18  # index rows of a chunk, over all threads: 36 MB of maxima
WHOLE = 2**22  # scores: with so many or fewer, the index is a single tile
PREPARED = 2**23  # values: rows of a single tile that must be normalised first
GATHERED = 2**18  # values of rows that are gathered at a time: 1 MB
GATHERING = 32  # rows of a product that cost as much as one gathered row
SURVIVORS = 2048  # rows per query, and 16 k more, that the reference scores one by one
RANKED = 128  # queries whose rows are ranked together
FEW = 2**23  # multiplications: with so many or fewer, the reference is faster
THREADED, TIMED = 2**24, 2**30  # multiplications worth threads, worth choosing the product

_entering, _inside = threading.Lock(), []  # of _single_threaded


def topk(queries, index, k, exclude=None):
    (count, width), total = queries.shape, len(index)
    if count * total * width <= FEW:
        return reference.topk(queries, index, k, exclude)
    keys = torch.empty(count, k, dtype=torch.int64)
    work = count * total * width
    with _single_threaded() as threads, ThreadPoolExecutor(threads, "", _use_one_thread) as pool:
        threads = threads if work >= THREADED else 1
        spread = pool.map if threads > 1 else map
        onednn = ONEDNN is not None and work >= TIMED and _onednn_is_faster()
        search = _Search(queries, index, k, exclude, spread, threads, onednn)
        size = -(-count // (-(-count // (BLOCK * threads)) * threads))  # an equal share each

        def rank(top):
            block = slice(top, top + size)
            keys[block] = search.keys(block)

        list(spread(rank, range(0, count, size)))
    return keys


@contextmanager
def _single_threaded():
    """Products of full precision on one thread each. Yields the number of threads before.

    Both settings belong to the process: the first search to enter changes them, the last one to
    leave restores them.
    """
    product = torch.backends.mkldnn.matmul
    with _entering:
        if not _inside:
            before, product.fp32_precision = product.fp32_precision, "none"  # none: inherited
            state = torch.get_num_threads(), "none" if product.fp32_precision == before else before
            product.fp32_precision = "ieee"
        else:
            state = _inside[0]
        _inside.append(state)
        _use_one_thread()
    try:
        yield state[0]
    finally:
        with _entering:
            _inside.pop()
            torch.set_num_threads(state[0])
            if not _inside:
                product.fp32_precision = state[1]


def _use_one_thread():
    """In the calling Python thread, for good: a thread takes over torch's global number at its
    first operation, and another search may restore that number at any time."""
    torch.get_num_threads()  # takes over the global number
    torch.set_num_threads(1)


@functools.cache
def _onednn_is_faster():
    """Whether oneDNN's product of a tile takes less time than torch.mm, which is MKL's.

    On some AMD processors it takes half the time, on others, and with AVX2 alone, about as much
    or more: it allocates its output at every call.
    """
    rows, queries = torch.rand(TILE, 64), torch.rand(BLOCK, 64)
    columns, tile = queries.T.contiguous(), torch.empty(TILE, BLOCK)
    times = {True: [], False: []}
    for _ in range(7):
        for onednn, product in (
            (True, lambda: ONEDNN(rows, queries, None, "none", [], "")),
            (False, lambda: torch.mm(rows, columns, out=tile)),
        ):
            start = time.perf_counter()
            product()
            times[onednn].append(time.perf_counter() - start)
    return min(times[True]) < min(times[False])


def _normalised(rows):
    """Rows (n, D) of any type -> float32 unit rows, each value off by 2^-24 of itself at most."""
    return F.normalize(reference.double(rows), dim=1, eps=1e-300).float()


class _UnitRows:
    """The rows of an index as float32 vectors whose norms are 1 within 2^-20, or 0."""

    def __init__(self, index, spread):
        self.index = index
        step = max(1, GATHERED // index.shape[1])
        norms = torch.cat([*spread(self.norms, index.split(step))])  # (G,)
        zero = norms == 0
        tame = zero | (norms > 1e-15) & (norms < 1e15)  # their squares are in float32's range
        self.precise = index.dtype == torch.float64 or not tame.all() or bool(index[zero].any())
        self.ready = index.dtype == torch.float32 and index.is_contiguous()
        self.ready &= bool((norms - 1).abs().max() < 2**-20)
        self.scale = (1 / norms.masked_fill(zero, 1))[:, None]

    @staticmethod
    def norms(rows):
        return torch.linalg.vector_norm(rows.float(), dim=1)

    def __getitem__(self, places):
        """(n, D) contiguous: the rows at a slice."""
        rows = self.index[places]
        return rows if self.ready else self.unit(rows, places)

    def gathered(self, places, out):
        """(n, D): the rows at places (n,) int64; `out` is (n, D) float32, which may be used."""
        if not self.ready:
            return self.unit(self.index.index_select(0, places), places)
        return torch.index_select(self.index, 0, places, out=out)

    def unit(self, rows, places):
        if self.precise:
            return _normalised(rows).contiguous()
        return (rows.float() * self.scale[places]).contiguous()


class _Memory(threading.local):
    """memory(name, *shape) -> float32, uninitialised: each thread's own, reused at every call."""

    def __call__(self, name, *shape):
        size = shape[0] * shape[1]
        buffer = getattr(self, name, None)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32)
            setattr(self, name, buffer)
        return buffer[:size].view(shape)


class _Search:
    """What blocks of queries have in common."""

    def __init__(self, queries, index, k, exclude, spread, threads, onednn):
        self.queries, self.index, self.k, self.exclude = queries, index, k, exclude
        self.rows, self.onednn, self.memory = _UnitRows(index, spread), onednn, _Memory()
        self.error = (3 * queries.shape[1] + 40) * 2.0**-24  # of a difference of float32 scores
        self.limit = SURVIVORS + 16 * k
        self.needed = min(len(index), k + (0 if exclude is None else exclude.shape[1]))
        self.chunk = max(CHUNK // threads, 4 * FANOUT * self.needed)  # index rows
        self.fits = self.rows.ready or index.numel() <= PREPARED

    def keys(self, where):
        """The keys (q, k) of the queries at a slice."""
        queries, total = self.queries[where], len(self.index)
        exclude = None if self.exclude is None else self.exclude[where]
        whole = len(queries) * total <= WHOLE and self.fits
        if not whole and 2 * FANOUT * self.needed > total:
            return reference.topk(queries, self.index, self.k, exclude)
        if whole:
            block = _Block(self, queries, total)
            block.search_tile()
        else:
            longest = max(TILE, PREPARED // queries.shape[1])
            block = _Block(self, queries, min(longest, TILE * max(1, BLOCK // len(queries))))
            block.search_chunks()
        return block.ranked(queries, exclude)


class _Block:
    """A block of queries: q queries, their bounds, and the rows that reach them.

    A tile is `size` rows of the index, a group the 16 of them that are `stride` rows apart. Group
    number n belongs to tile n // stride.
    """

    def __init__(self, search, queries, size):
        self.search = search
        self.unit = _normalised(queries)  # (q, D)
        self.columns = self.unit.T.contiguous()
        self.count, total = len(queries), len(search.index)
        tiles = -(-total // size)
        self.stride = -(-total // (tiles * FANOUT))
        self.size = self.stride * FANOUT
        self.best = torch.empty(self.count, 0, dtype=torch.float32)  # (q, k + E) largest maxima
        self.bounds = torch.empty(self.count, dtype=torch.float32)
        self.counts = torch.zeros(self.count, dtype=torch.int64)  # rows that reach the bound
        self.found = []  # query * 2^32 + row

    def tile(self, number):
        """Scores (size, q) of the rows of a tile, -inf beyond the last row of the index."""
        rows = self.search.rows[number * self.size : (number + 1) * self.size]
        scores = self.search.memory("tile", self.size, self.count)
        if self.search.onednn:
            product = ONEDNN(rows, self.unit, None, "none", [], "")
            if len(rows) == self.size:
                return product
            scores[: len(rows)] = product
        else:
            torch.mm(rows, self.columns, out=scores[: len(rows)])
        scores[len(rows) :] = -torch.inf
        return scores

    def search_tile(self):
        """Searches an index that is a single tile."""
        tile = self.tile(0)
        groups = tile.view(FANOUT, self.stride, -1).amax(0)
        self.raise_bounds(groups if self.stride >= 2 * self.search.needed else tile)
        self.read(0, tile, groups)

    def search_chunks(self):
        tiles = -(-len(self.search.index) // self.size)
        step = -(-tiles // -(-tiles * self.size // self.search.chunk))
        for first in range(0, tiles, step):
            self.search_chunk(first, min(step, tiles - first))

    def search_chunk(self, first, tiles):
        """Searches consecutive tiles."""
        stride, count, memory = self.stride, self.count, self.search.memory
        parents = -(-tiles // FANOUT)
        groups = memory("groups", parents * FANOUT * stride, count)
        groups[tiles * stride :] = -torch.inf
        supergroups = memory("supergroups", parents * stride, count)
        family = FANOUT * stride  # groups of a row of supergroups
        for i in range(tiles):
            out = groups[i * stride : (i + 1) * stride]
            torch.amax(self.tile(first + i).view(FANOUT, stride, count), 0, out=out)
            if i % FANOUT == FANOUT - 1 or i == tiles - 1:
                part = groups[i // FANOUT * family :][:family].view(FANOUT, stride, count)
                torch.amax(part, 0, out=supergroups[i // FANOUT * stride :][:stride])
        enough = len(supergroups) >= 4 * self.search.needed
        self.raise_bounds(supergroups if enough else groups)
        most = tiles * self.size * count // (FANOUT * GATHERING)  # groups worth gathering
        node, query = (supergroups >= self.bounds).nonzero(as_tuple=True)
        if len(node) <= most:
            node = self.members(node)  # (n, 16)
            parent, member = (groups[node, query[:, None]] >= self.bounds[query, None]).nonzero(
                as_tuple=True
            )
            node, query = node[parent, member], query[parent]
        if len(node) <= most:
            self.gather(first, node, query)
        else:
            for i in range(tiles):
                part = groups[i * stride : (i + 1) * stride]
                if (part >= self.bounds).any():
                    self.read(first + i, self.tile(first + i), part)

    def members(self, nodes):
        """(n,) -> (n, 16): rows of groups, or groups of groups."""
        firsts = nodes // self.stride * self.size + nodes % self.stride
        return firsts[:, None] + self.stride * torch.arange(FANOUT)

    def raise_bounds(self, maxima):
        """With maxima (n, q) of distinct rows."""
        best = torch.cat([self.best, maxima.T], dim=1)
        self.best = best.topk(self.search.needed, dim=1).values
        bounds = (self.best[:, -1].double() - self.search.error).clamp(min=-2)  # above -inf
        self.bounds = torch.where(self.counts > self.search.limit, torch.inf, bounds).float()

    def gather(self, first, groups, queries):
        """Adds the rows of pairs (n,) of groups, counted from a tile's first, and queries."""
        search, width, total = self.search, self.unit.shape[1], len(self.search.index)
        step = max(1, GATHERED // (FANOUT * width))
        for group, query in zip(groups.split(step), queries.split(step)):
            places = self.members(group) + first * self.size  # (n, 16)
            near = search.memory("near", places.numel(), width)
            near = search.rows.gathered(places.flatten().clamp_(max=total - 1), near)
            unit = self.unit.index_select(0, query)[:, None]  # (n, 1, D)
            scores = torch.bmm(unit, near.view(-1, FANOUT, width).mT)[:, 0]
            reached = scores >= self.bounds.index_select(0, query)[:, None]
            found = reached.flatten().nonzero()[:, 0]
            row = places.flatten().index_select(0, found)
            query = query.index_select(0, found // FANOUT)
            self.add(query[row < total], row[row < total])

    def read(self, number, tile, groups):
        """Adds the rows of a tile (size, q), whose groups' maxima are given, (stride, q)."""
        group, query = (groups >= self.bounds).nonzero(as_tuple=True)
        scores = tile.view(FANOUT, self.stride, -1)[:, group, query]  # (16, n)
        member, pair = (scores >= self.bounds[query]).nonzero(as_tuple=True)
        self.add(query[pair], number * self.size + member * self.stride + group[pair])

    def add(self, query, row):
        self.found.append((query << 32) + row)
        self.counts += torch.bincount(query, minlength=self.count)
        if self.counts.max() > self.search.limit:  # these queries are left to the reference
            self.bounds[self.counts > self.search.limit] = torch.inf

    def ranked(self, queries, exclude):
        """The keys (q, k) of the queries, from all rows found."""
        search, limit = self.search, self.search.limit
        keys = torch.empty(self.count, search.k, dtype=torch.int64)
        pairs = torch.cat(self.found).sort().values
        pairs = pairs[(self.counts <= limit)[pairs >> 32]]
        counts = self.counts.where(self.counts <= limit, 0)
        rows = torch.full((self.count, max(search.k, int(counts.max()))), -1)
        columns = torch.arange(len(pairs)) - (counts.cumsum(0) - counts)[pairs >> 32]
        rows[pairs >> 32, columns] = pairs & (2**32 - 1)
        for part in counts.argsort().split(RANKED):  # of similar counts
            few = part[counts[part] > 0]
            if len(few):
                width = max(search.k, int(counts[few].max()))
                excluded = None if exclude is None else exclude[few]
                keys[few] = reference.best(
                    queries[few], search.index, rows[few, :width], search.k, excluded
                )
        many = (self.counts > limit).nonzero()[:, 0]
        if len(many):
            excluded = None if exclude is None else exclude[many]
            keys[many] = reference.topk(queries[many], search.index, search.k, excluded)
        return keys
