"""cosine_topk on a CPU at the speed of a float32 matrix product, with the reference's result bit for bit.

    topk(queries, index, k, exclude) -> (Q, k) int64 keys, as reference.topk

1. The index in chunks, normalised to float32 once for all queries. Queries in blocks, spread over threads whose products are
   single-threaded (on a busy machine threads inside a product wait for each other far longer than they compute).
2. A tile of float32 scores, slab @ block.T, is reduced at once to the maxima of groups of 16 consecutive rows; these to those of
   16 groups. The k largest values lie in the k groups of largest maxima, these in the k supergroups of largest maxima.
3. From each of the `keep` > k best groups all rows are scored again, and the best `keep` of them by the reference.
4. Float32 is off by less than `noise`: if the reference's k-th score is above the best discarded float32 score by more, no
   discarded row can belong to the result. A query of which that cannot be said has a bound all the same, the k-th score so far:
   a second product finds all rows that reach it, but for the noise, and the reference scores these.
5. Where many of the first queries are in doubt, the index is full of copies, and only its distinct rows are searched, before copies
   are put back into the result; or of rows much alike, and the bounds come from a sample of it. Where k is large, or rows are wide
   or few, the groups' maxima give the bounds, since scoring the rows of the best groups would cost more than the second product.
Few pairs, or few rows, are not grouped: direct.py scores what float32 leaves of them, unless too much is alike.
Copy with: the folder kernels/, torch, numpy.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import direct, reference
from kernels.reference import NOTHING, ONE

# oneDNN's product, by the operator that torch.compile emits for linear layers. On AMD processors torch.mm, which is MKL's, takes
# twice as long with AVX-512 and a tenth longer with AVX2 (torch 2.13, 2026-11).
LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)
GROUP = 16  # rows; also groups in a supergroup
QUERY_BLOCK = 736  # queries of a tile: rows a power of two apart would crowd into the same places of the cache
TILE = 512 * QUERY_BLOCK  # values, 1.5 MB
TILES = 8  # whose group maxima stay there too until they are reduced to those of supergroups
CHUNK = 2**18  # rows of the index at a time
MAXIMA = 3 * 2**17  # rows, of all threads' chunks together: 72 MB of group maxima
NORMALISED = (
    2**23
)  # values, 32 MB: where the index must be normalised first, no more of it at a time
PREPARED = (
    2**19
)  # values, 2 MB: rows normalised at a time; in less, threads would wait for each other
STATE = 2**20  # best groups of all queries that are on their way through the index together: 12 MB
GATHERED = (
    2**18
)  # values, 1 MB: rows of the best groups, scored again; of one query up to 8 times more
PRODUCT = 2**27  # values of few pairs: a millisecond
FEW = 2**20  # values of all pairs: up to these numpy's products take less time than others
DIRECT = 8192  # rows: so few are not grouped
SCORES = 2**20  # float32, 4 MB: of all pairs, if they are no more; else of so few rows at a time
SPARE = 2  # groups kept more than k
WANTED = 2**22  # values of a block of queries' best rows, or groups' rows: 32 MB of their numbers
GATHERING = 40  # rows of a product, and one more for each 8 values, in whose time a row is gathered and scored again
ALIKE = 2048  # rows that may be as good as a query's k-th, as float32 sees it, and 16 k more


_entering, _inside = (
    threading.Lock(),
    [],
)  # of _single_threaded, which changes what belongs to the whole process


@contextmanager
def _single_threaded():
    """Products of full precision on one thread each; yields how many there were. The first call in sets both, the last one out
    resets both."""
    product = torch.backends.mkldnn.matmul
    with _entering:
        if not _inside:
            before, product.fp32_precision = product.fp32_precision, "none"  # none: inherited
            state = torch.get_num_threads(), "none" if product.fp32_precision == before else before
            product.fp32_precision = "ieee"
        else:
            state = _inside[0]
        _inside.append(state)
        torch.set_num_threads(1)
    try:
        yield state[0]
    finally:
        with _entering:
            _inside.pop()
            torch.set_num_threads(state[0])
            if not _inside:
                product.fp32_precision = state[1]


def few(queries, index, k, exclude=None):
    """reference.result for few pairs, which are not worth threads; None for others, and where direct.py gives up."""
    (count, width), total = queries.shape, index.shape[0]
    copied = not index.is_contiguous() or index.dtype != torch.float32
    if (
        not (0 < count * total <= SCORES and 0 < count * total * width <= PRODUCT)
        or copied
        and total * width > NORMALISED
    ):
        return None
    rows = index.float().contiguous() if copied else index
    a, b, barred = _values(queries), rows.numpy(), None if exclude is None else exclude.numpy()
    precise = b if index.dtype != torch.float64 else _values(index)
    alone = count == 1 and a.dtype == b.dtype and precise is b
    search = direct.of_one if alone else direct.of_many
    if count * b.size <= FEW:
        found = search(a, b, precise, k, barred, lambda left: direct.in_parts(left, b))
    else:
        with _single_threaded():
            product = rows.mv if alone else _product(rows, _Memory())
            found = search(
                a, b, precise, k, barred, lambda left: product(torch.from_numpy(left)).numpy()
            )
    return found and (torch.from_numpy(found[0]), torch.from_numpy(found[1]))


def _values(rows):
    """As direct.py takes them: float64 as they are, others in float32."""
    return (
        (rows if rows.dtype in (torch.float32, torch.float64) else rows.float())
        .contiguous()
        .numpy()
    )


def topk(queries, index, k, exclude=None):
    keep, width = k + SPARE, queries.shape[1]
    if not len(queries) or len(index) < 4 * keep or not width:
        return reference.topk(queries, index, k, exclude)
    few_rows = (
        len(index) <= DIRECT and index.numel() <= NORMALISED and len(queries) * len(index) > SCORES
    )  # few() gave up else
    with _single_threaded() as threads, ThreadPoolExecutor(threads) as workers:

        def spread(search, items):  # a thread costs more than a short search
            return (
                workers.map(search, items) if threads > 1 and len(items) > 1 else map(search, items)
            )

        keys = _through_few_rows(queries, index, k, exclude, threads, spread) if few_rows else None
        return _topk(queries, index, k, exclude, threads, spread) if keys is None else keys


def _through_few_rows(queries, index, k, exclude, threads, spread):
    """(Q, k) keys by direct.of_many, None where it gives up."""
    rows, precise = index.float().contiguous(), _values(index)
    keys, given_up = torch.empty(len(queries), k, dtype=torch.int64), []
    size = max(
        1, min(SCORES // len(index), NORMALISED // 4 // index.shape[1], -(-len(queries) // threads))
    )
    product = _product(rows, _Memory())

    def search(top):
        if given_up:
            return
        mine, barred = (
            queries[top : top + size],
            None if exclude is None else exclude[top : top + size].numpy(),
        )
        found = direct.of_many(
            _values(mine),
            rows.numpy(),
            precise,
            k,
            barred,
            lambda unit: product(torch.from_numpy(unit)).numpy(),
        )
        if found:
            keys[top : top + size] = reference.as_keys(
                ONE * torch.from_numpy(found[0]), torch.from_numpy(found[1])
            )
        else:
            given_up.append(top)

    list(spread(search, range(0, len(queries), size)))
    return None if given_up else keys


def _topk(queries, index, k, exclude, threads, spread):
    keys, copies = torch.empty(len(queries), k, dtype=torch.int64), None
    top, size = 0, max(QUERY_BLOCK, STATE // (k + SPARE))
    while top < len(queries):
        part = slice(top, top + size)
        block, barred = queries[part], None if exclude is None else exclude[part]
        found = None if copies else _through(block, index, None, k, barred, threads, spread)
        if found is None or found[1] is not None and found[1].double().mean() < 7 / 8:
            copies = copies or _copies(index)
            if len(copies[1]) < 3 / 4 * len(index):
                found = _through_distinct(block, index, copies, k, barred, threads, spread)
            elif found is None:  # alike, but no copies: bounds from a sample
                found = (
                    _through(block, index, _sample(index, k), k, barred, threads, spread)[0],
                    None,
                )
        mine, sure = keys[part], found[1]
        mine[:] = found[0]
        unsure = torch.arange(len(mine)) if sure is None else (~sure).nonzero()[:, 0]
        most = max(1, WANTED // (ALIKE + 16 * k))
        for some in unsure.chunk(-(-len(unsure) // most)) if len(unsure) else ():
            mine[some] = _above(
                block[some],
                index,
                mine[some, -1] >> 32,
                k,
                None if barred is None else barred[some],
                threads,
                spread,
            )
        top += size
    return keys


def _sample(index, k):
    """A sixteenth of the rows, ascending; all, where the rows that reach its bound, some 16 k, would be too much to score."""
    size = len(index) // 16 if 16 * k * index.shape[1] <= GATHERED else len(index)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    return order[: max(size, 4 * (k + SPARE))].sort().values


def _normalised(rows, out=None):
    """(..., D) of any type -> float32 unit rows, each value off by (D / 2 + 3) * 2^-24 of itself at most. `out` may be `rows`."""
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if not (
        (norms > 1e-15) & (norms < 1e15)
    ).all():  # its square, or a value's, strains float32; or it is 0
        wide, norms = F.normalize(reference.double(rows), dim=-1, eps=1e-300).float(), 1
    if wide.dtype == torch.float64:
        wide, norms = (wide / norms).float(), 1
    return torch.div(wide, norms, out=out)


def _is_unit(rows, spread):
    """Are they float32 rows that can be multiplied as they are, norms within 2^-20 of 1?"""

    def near(top):
        return (torch.linalg.vector_norm(rows[top : top + 8192], dim=1) - 1).abs().max() < 2**-20

    return (
        rows.dtype == torch.float32
        and rows.is_contiguous()
        and all(spread(near, range(0, len(rows), 8192)))
    )


def _through(queries, index, among, k, exclude, threads, spread, bounds=True):
    """Queries against the rows `among` (ascending) of the index, None is all -> (Q, k) keys, (Q,) bool: are they sure?
    None where the best rows of many of the first queries are too much alike, before the others pay for it.
    Where scoring the best groups' rows would cost more than another product, and `bounds` are enough, None for `sure`: the k-th
    scores are no less."""
    keep, width, rows = k + SPARE, queries.shape[1], len(index) if among is None else len(among)
    heavy = GROUP * keep * width > 8 * GATHERED
    noise = 2 * width + 40  # of scores that are 2^24 times
    whole = (
        rows - rows % GROUP**2 if rows > GROUP * (keep + GROUP) else 0
    )  # the others are the tail
    size = min(QUERY_BLOCK, -(-len(queries) // threads), max(1, WANTED // 2 // (GROUP * keep)))
    probe = -(
        -size // 8
    )  # queries of the first blocks, if all the others are to hear what they find
    probes = probe * threads if among is None and len(queries) >= 2 * threads * size else 0
    begins = [*range(0, probes, probe), *range(probes, len(queries), size)]
    blocks = [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(queries)])]
    groups = torch.zeros(len(queries), keep if whole else 0, dtype=torch.int64)
    maxima = torch.full((len(queries), keep), -torch.inf, dtype=torch.float32)
    keys, sure = (
        torch.empty(len(queries), k, dtype=torch.int64),
        torch.empty(len(queries), dtype=torch.bool),
    )
    memory = _Memory()

    def take(places, out=None):
        """The normalised rows of the index at places, a slice or a tensor, of the rows that are searched."""
        places = places if among is None else among[places]
        if isinstance(places, slice) or index.dtype != torch.float32:
            return _normalised(index[places], out)
        rows = torch.index_select(
            index, 0, places.flatten(), out=memory("rows", places.numel(), width)
        )
        return (rows if is_unit else _normalised(rows, out=rows if out is None else out)).view(
            *places.shape, width
        )

    is_unit = among is None and _is_unit(index, spread)
    for left, part in _chunks(index, whole, take, is_unit, threads, spread):

        def reduce(block):
            best, where = _best_groups(_normalised(queries[block]), part, keep, memory)
            best, order = torch.cat([maxima[block], best], dim=1).topk(keep, dim=1)
            groups[block] = torch.cat([groups[block], where + left // GROUP], dim=1).gather(
                1, order
            )
            maxima[block] = best

        first = blocks[:threads] if among is None and not left and not heavy else []
        list(spread(reduce, first))
        for block in first:  # rows much alike: no distance between the best groups
            if (
                (maxima[block][:, k - 1] - maxima[block][:, -1]) * ONE < noise
            ).double().mean() > 1 / 8:
                return None
        list(spread(reduce, blocks[len(first) :]))
    if whole and bounds and (heavy or GROUP * keep * (GATHERING + width // 8) > rows):
        best = (
            maxima[:, k - 1 if exclude is None else k].double() * ONE - noise
        )  # one may be of the excluded
        return reference.as_keys(best.floor()[:, None], 0), None
    tail = take(slice(whole, rows)).clone()  # it may lie in memory
    size = max(1, min(size, SCORES // (keep * GROUP + len(tail))))

    def rank(block):
        """The rows of the best groups, and those of no whole group, by float32; the best of these by the reference."""
        mine = queries[block]
        unit = _normalised(mine)  # (q, D)
        places = (groups[block][:, :, None] * GROUP + torch.arange(GROUP)).flatten(
            1
        )  # (q, keep * GROUP)
        scores = torch.empty(len(mine), places.shape[1] + len(tail), dtype=torch.float32)
        several = max(1, GATHERED // max(1, places.shape[1] * width))
        for top in range(0, len(mine) if whole else 0, several):
            some = slice(top, top + several)
            scores[some, : places.shape[1]] = (unit[some, None] @ take(places[some]).mT)[
                :, 0
            ]  # (1 x D) @ (D x m): fast
        torch.mm(unit, tail.T, out=scores[:, places.shape[1] :])
        places = torch.cat([places, torch.arange(whole, rows).expand(len(mine), -1)], dim=1)
        scores, order = scores.topk(keep, dim=1)
        places = places.gather(1, order)
        chosen = places if among is None else among[places]
        keys[block] = reference.best(
            mine, index, chosen, k, None if exclude is None else exclude[block]
        )
        discarded = torch.maximum(maxima[block][:, -1], scores[:, -1]).double() * ONE + noise
        sure[block] = (keys[block][:, -1] >> 32) > discarded

    list(
        spread(
            rank,
            [
                slice(top, min(top + size, b.stop))
                for b in blocks
                for top in range(b.start, b.stop, size)
            ],
        )
    )
    return keys, sure


def _above(queries, index, least, k, exclude, threads, spread):
    """(Q, k) keys, where it is known that the k-th scores are no less than `least`, (Q,) int64: all rows that float32 does not put
    below it are scored by the reference. That costs another product, however many they are, but for queries with too many."""
    width, limit = queries.shape[1], ALIKE + 16 * k
    bounds = (
        (least - (2 * width + 41)).double() / ONE
    ).float()  # the noise, and the rounding of the bound
    size = -(-len(queries) // max(threads, -(-len(queries) // QUERY_BLOCK)))
    blocks = [slice(top, min(top + size, len(queries))) for top in range(0, len(queries), size)]
    # A block's pairs, query * 2^32 + row: in one place that grows, or they would lie between tiles and tear the memory to pieces.
    pairs, filled = (
        [torch.empty(256 * size, dtype=torch.int64) for _ in blocks],
        [0 for _ in blocks],
    )
    counts, keys = (
        torch.zeros(len(queries), dtype=torch.int64),
        torch.empty(len(queries), k, dtype=torch.int64),
    )
    memory = _Memory()

    def take(places, out):
        _normalised(index[places], out)

    for left, part in _chunks(index, len(index), take, _is_unit(index, spread), threads, spread):

        def collect(number):
            block, counted = blocks[number], filled[number]
            for query, row in _at_least(_normalised(queries[block]), part, bounds[block], memory):
                end = filled[number] + len(row)
                if end > len(pairs[number]):
                    pairs[number] = torch.cat([pairs[number], torch.empty(end, dtype=torch.int64)])
                torch.add(query << 32, row + left, out=pairs[number][filled[number] : end])
                filled[number] = end
                if end - counted > limit or not len(row):
                    counts[block] += torch.bincount(
                        pairs[number][counted:end] >> 32, minlength=len(counts[block])
                    )
                    bounds[block][counts[block] > limit], counted = torch.inf, end

        list(spread(collect, range(len(blocks))))

    def rank(number):
        block, mine = blocks[number], counts[blocks[number]]
        found = pairs[number][: filled[number]].sort().values
        query, pairs[number] = found >> 32, None
        places = torch.full((len(mine), max(k, int(mine.max()))), -1, dtype=torch.int64)
        places[query, torch.arange(len(query)) - (mine.cumsum(0) - mine)[query]] = found & (
            2**32 - 1
        )
        few = (mine <= limit).sum()
        for some in (
            mine.argsort()[:few].split(32) if few else ()
        ):  # queries of about as many rows together
            barred = None if exclude is None else exclude[block][some]
            keys[block][some] = reference.best(
                queries[block][some], index, places[some, : max(k, mine[some[-1]])], k, barred
            )

    def anew(some):
        keys[some] = reference.topk(
            queries[some], index, k, None if exclude is None else exclude[some]
        )

    list(spread(rank, range(len(blocks))))
    many = (counts > limit).nonzero()[:, 0]
    list(spread(anew, many.chunk(threads) if len(many) else ()))
    return keys


def _at_least(queries, rows, bounds, memory):
    """Unit rows (q, D), (n, D), bounds (q,), which may grow meanwhile -> pairs of float32 cosines that reach them, a tile's at a
    time: numbers of queries, and of rows; none in the end."""
    count, product = len(queries), _product(queries, memory)
    slab = max(GROUP, 2 * TILE // count // GROUP * GROUP)
    for top in range(0, len(rows), slab):
        tile = product(rows[top : top + slab])  # (n, q)
        whole = len(tile) // GROUP * GROUP
        groups = tile[:whole].view(-1, GROUP, count)
        if whole:
            group, query = (groups.amax(1) >= bounds).nonzero(as_tuple=True)
            where, member = (groups[group, :, query] >= bounds[query, None]).nonzero(as_tuple=True)
            yield query[where], top + group[where] * GROUP + member
    row, query = (tile[whole:] >= bounds).nonzero(as_tuple=True)
    yield query, top + whole + row
    yield row[:0], row[:0]


def _chunks(index, rows, take, is_unit, threads, spread):
    """The first `rows` rows, a chunk at a time, as the number of its first one and float32 unit rows, good until the next: if the
    index is_unit its own, else those that take(slice, out) puts into `out`."""
    step = min(CHUNK, MAXIMA // threads, CHUNK if is_unit else NORMALISED // index.shape[1])
    chunks = -(-rows // max(step, GROUP**2)) or 1
    step = -(-rows // chunks // GROUP**2) * GROUP**2 or 1
    several = max(1, PREPARED // index.shape[1])
    chunk = None if is_unit else torch.empty(min(step, rows), index.shape[1], dtype=torch.float32)
    for left in range(0, rows, step):
        part = (index[left:rows] if is_unit else chunk[: rows - left])[:step]

        def prepare(top):
            slab = part[top : top + several]
            take(slice(left + top, left + top + len(slab)), out=slab)

        if not is_unit:
            list(spread(prepare, range(0, len(part), several)))
        yield left, part


def _copies(index):
    """Rows of equal values, found by a sum of some values' bits: the rows sorted by (first of its kind, row), and where a kind
    begins. Copies between which others of the same sum lie count as several kinds."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[index.element_size()]
    some = index[:, :: -(-index.shape[1] // 64)]
    factors = torch.randint(
        -(2**62), 2**62, (some.shape[1],), generator=torch.Generator().manual_seed(0)
    )
    sums = torch.empty(len(index), dtype=torch.int64)
    for top in range(0, len(index), 4096):
        bits = (some[top : top + 4096] + 0).view(integers)  # + 0: -0 equals 0
        sums[top : top + 4096] = (bits.long() * factors).sum(1)
    sums, order = sums.sort(stable=True)
    new = torch.ones(len(index), dtype=torch.bool)
    new[1:] = sums[1:] != sums[:-1]
    for places in (
        (~new).nonzero()[:, 0].split(max(1, PREPARED // index.shape[1]))
    ):  # a sum alone proves nothing
        new[places] = (index[order[places]] != index[order[places - 1]]).any(1)
    return order, new.nonzero()[:, 0]


def _through_distinct(queries, index, copies, k, exclude, threads, spread):
    """_through, where the index has copies: the k + 1 best kinds (one may hold nothing but an excluded row), then their rows."""
    order, begins = copies
    ends = torch.cat([begins[1:], torch.tensor([len(order)])])
    firsts, kinds = order[begins].sort()  # ascending rows
    several = min(k + 1, len(firsts))
    if len(firsts) < 4 * (several + SPARE):
        found = reference.topk(queries, index[firsts], several)
        sure = torch.ones(len(queries), dtype=torch.bool)
        found = reference.as_keys(found >> 32, firsts[2**32 - 1 - (found & (2**32 - 1))])
    else:
        found, sure = _through(queries, index, firsts, several, None, threads, spread, bounds=False)
    keys = torch.empty(len(queries), k, dtype=torch.int64)
    step = max(1, GATHERED // (k + 1) ** 2)
    for top in range(0, len(queries), step):
        part = found[top : top + step]
        kind = kinds[torch.searchsorted(firsts, 2**32 - 1 - (part & (2**32 - 1)))]  # (q, k + 1)
        member = begins[kind][:, :, None] + torch.arange(k + 1)  # (q, k + 1, k + 1)
        rows = order[member.clamp(max=len(order) - 1)]
        barred = member >= ends[kind][:, :, None]
        if exclude is not None:
            barred |= rows == exclude[top : top + step, None, None]
        expanded = reference.as_keys((part >> 32)[:, :, None], rows).masked_fill_(barred, NOTHING)
        keys[top : top + step] = expanded.flatten(1).topk(k, dim=1).values
    return keys, sure


def _best_groups(queries, index, keep, memory):
    """Unit rows (q, D), (n GROUP², D) -> the `keep` best groups' maxima (q, keep), descending, and numbers; -inf where no more."""
    count = len(queries)
    slab, product = max(GROUP**2, TILE // count // GROUP**2 * GROUP**2), _product(queries, memory)
    maxima, supers = (
        memory("maxima", len(index) // GROUP, count),
        memory("supers", len(index) // GROUP**2, count),
    )
    several = TILES * slab
    for part, best, best_of_best in zip(
        index.split(several), maxima.split(several // GROUP), supers.split(several // GROUP**2)
    ):
        for rows, groups in zip(part.split(slab), best.split(slab // GROUP)):
            torch.amax(product(rows).view(-1, GROUP, count), dim=1, out=groups)
        torch.amax(best.view(-1, GROUP, count), dim=1, out=best_of_best)
    best = supers.T.contiguous().topk(min(keep, len(supers)), dim=1, sorted=False).indices
    members = (best[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)  # (q, keep * GROUP)
    values, order = maxima.T.gather(1, members).topk(min(keep, members.shape[1]), dim=1)
    return values, members.gather(1, order)


def _product(right, memory):
    """A function: rows (n, D) -> rows @ right.T (n, m), all float32, good until it is called again in the same thread."""
    right = right.contiguous()  # or oneDNN takes hundreds of times as long
    if LINEAR:
        return lambda rows: LINEAR(rows, right, None, "none", [], "")
    columns = right.T.contiguous()
    return lambda rows: torch.mm(rows, columns, out=memory("tile", len(rows), len(right)))


class _Memory(threading.local):
    """memory(name, *shape) -> float32, not cleared: the thread's own, handed out again and again; new pages cost a tenth of all."""

    def __call__(self, name, *shape):
        size, buffer = math.prod(shape), getattr(self, name, None)
        if buffer is None or buffer.numel() < size:
            setattr(self, name, torch.empty(size, dtype=torch.float32))
        return getattr(self, name)[:size].view(shape)
