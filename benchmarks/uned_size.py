"""Retrieval metrics at the size of UnED: 241,986 queries, 1,397,126 index rows, eight domains.

    python -m benchmarks.uned_size                      # writes results/uned_size.json

The vectors are synthetic: a row is the centre of its class plus noise, normalised. The domains
have UnED's sizes. Where UnED searches a split in itself, the queries are rows of the index, and
each is excluded from its own result. The time of retrieval_metrics beside the search is measured
on one thread by calling it again with the results of the search, in processor time, which other
programs hardly affect. For some queries, a Python loop, the usual way to compute these metrics,
must give the same values.
"""

import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import checkpoint
import data
import metrics
from benchmarks.shared import machine, natural, output, positive

ROOT = Path(__file__).parents[1]
UNED = {
    "food2k": (9_979, 9_979),
    "cars": (8_131, 8_131),
    "sop": (60_502, 60_502),
    "inshop": (14_218, 12_612),  # of the test
    "inat": (136_093, 136_093),
    "met": (1_003, 397_121),
    "gldv2": (1_129, 761_757),
    "rp2k": (10_931, 10_931),
}  # queries, index
QUERIES, INDEX = (sum(side) for side in zip(*UNED.values()))
CLASS = 6  # index rows of a class, on average
NOISE = 1.0  # standard deviation of each coordinate; the centres' is 1
BLOCK = 2**16  # rows generated at a time
REPEATS = 5  # of the measurement beside the search


def shares(sizes, total):
    """Whole numbers in proportion to the sizes, with sum `total`."""
    return np.diff(np.round(np.cumsum([0, *sizes]) * (total / sum(sizes))).astype(int)).tolist()


def fill(rows, centres, labels, generator):
    """Rows (N, D) of the classes (N,)."""
    for block, classes in zip(rows.split(BLOCK), torch.from_numpy(labels).split(BLOCK)):
        block.normal_(0, NOISE, generator=generator).add_(centres[classes])
        block /= torch.linalg.vector_norm(block, dim=1, keepdim=True)


def synthetic(q, g, dim, seed):
    """-> queries, index (metrics.Embeddings), exclude (q,). Labels begin at 0 in each domain."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    vectors = torch.empty(q, dim), torch.empty(g, dim)
    labels = np.empty(q, dtype=int), np.empty(g, dtype=int)
    sizes = [shares(side, total) for side, total in zip(zip(*UNED.values()), (q, g))]
    exclude, ends = np.full(q, -1), (0, 0)
    for (queries, index), *counts in zip(UNED.values(), *sizes):
        asking, indexed = (slice(end, end + count) for end, count in zip(ends, counts))
        ends = asking.stop, indexed.stop
        classes = counts[1] // CLASS + 1
        centres = torch.randn(classes, dim, generator=generator)
        labels[1][indexed] = rng.integers(0, classes, counts[1])
        fill(vectors[1][indexed], centres, labels[1][indexed], generator)
        if queries == index and counts[1]:  # rows of the domain, evenly spaced
            rows = indexed.start + np.arange(counts[0]) * counts[1] // max(1, counts[0])
            exclude[asking] = rows
            vectors[0][asking], labels[0][asking] = vectors[1][rows], labels[1][rows]
        else:
            labels[0][asking] = rng.integers(0, classes, counts[0])
            fill(vectors[0][asking], centres, labels[0][asking], generator)
    domains = [[domain for domain, n in zip(UNED, side) for _ in range(n)] for side in sizes]
    return *(metrics.Embeddings(*side) for side in zip(vectors, labels, domains)), exclude


def loop(queries, index, exclude, neighbours, sample):
    """Yields R@1 and mMP of one query after another."""
    for q in sample:
        same = np.flatnonzero(index.labels == queries.labels[q]).tolist()
        relevant = {
            row for row in same if index.domains[row] == queries.domains[q] and row != exclude[q]
        }
        found = [row in relevant for row in neighbours[q].tolist()]
        n = min(len(relevant), len(found))
        yield float(found[0]), sum(found[:n]) / max(1, n)


def command_line():
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=positive, default=QUERIES)
    parser.add_argument("--index", type=positive, default=INDEX)
    parser.add_argument("--dim", type=positive, default=64)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--looped",
        type=positive,
        default=2000,
        help="queries that are also evaluated by the loop (default: %(default)s)",
    )
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "uned_size.json"))
    return parser


def searched(queries, index, exclude):
    """-> Metrics, seconds of the search, bytes of the process's peak, seconds beside the search."""
    results, seconds, beside = [], [], []
    topk = metrics.cosine_topk

    def timed_topk(*arguments, **options):
        started = time.perf_counter()
        results.append(topk(*arguments, **options))
        seconds.append(time.perf_counter() - started)
        return results[-1]

    with patch.object(metrics, "cosine_topk", timed_topk):
        found = metrics.retrieval_metrics(queries, index, exclude=exclude)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(REPEATS):
        with patch.object(metrics, "cosine_topk", side_effect=results):
            started = time.process_time()
            again = metrics.retrieval_metrics(queries, index, exclude=exclude)
            beside.append(time.process_time() - started)
        assert again[:2] == found[:2] and all(map(torch.equal, again[2:], found[2:]))
    torch.set_num_threads(threads)
    return found, sum(seconds), memory, beside


def main():
    options = command_line().parse_args()
    queries, index, exclude = synthetic(options.queries, options.index, options.dim, options.seed)
    found, seconds, memory, beside = searched(queries, index, exclude)

    sample = np.linspace(0, options.queries - 1, min(options.looped, options.queries)).astype(int)
    started = time.process_time()
    looped = list(loop(queries, index, exclude, found.neighbours, sample))
    looping = time.process_time() - started
    pairs = zip(found.per_query_recall[sample].tolist(), found.per_query_mmp[sample].tolist())
    assert looped == list(pairs)

    arguments = f"--queries {options.queries} --index {options.index} --dim {options.dim}"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    result = {
        "command": f"python -m benchmarks.uned_size {arguments} --seed {options.seed} "
        f"--looped {options.looped}",
        "machine": machine("cpu"),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "queries": options.queries,
        "excluded": int((exclude >= 0).sum()),
        "index": options.index,
        "dim": options.dim,
        "search_seconds": round(seconds, 2),
        "beside_search_us_per_query": round(1e6 * statistics.median(beside) / options.queries, 3),
        "beside_search_seconds": [round(seconds, 4) for seconds in beside],
        "loop_us_per_query": round(1e6 * looping / len(sample), 1),
        "queries_equal_to_loop": len(sample),
        "peak_memory_mb": round(memory / 1e6),
        "recall_at_1": found.recall_at_1,
        "mmp_at_5": found.mmp_at_k,
    }
    checkpoint.write_json(options.out, result)
    print(
        f"{options.queries:,} queries, {options.index:,} index rows, D = {options.dim}\n"
        f"R@1 {100 * found.recall_at_1:.2f}, mMP@5 {100 * found.mmp_at_k:.2f}\n"
        f"search: {result['search_seconds']} s on {result['threads']} threads, peak memory "
        f"{result['peak_memory_mb']:,} MB\n"
        f"metrics beside the search: {result['beside_search_us_per_query']} us of processor time "
        f"per query (median of {REPEATS})\n"
        f"loop, equal for {len(sample):,} queries: {result['loop_us_per_query']} us per query\n"
        f"{result['machine']}"
    )


if __name__ == "__main__":
    main()
