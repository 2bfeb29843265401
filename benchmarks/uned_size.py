"""Evaluation at the size of UnED: 241,986 queries in a merged index of 1,397,126 rows, eight domains, made-up unit vectors.

    python benchmarks/uned_size.py                     # writes results/uned_size.json

A row is its class's centre plus noise, normalised. Domains have UnED's sizes; where UnED searches a split in itself, the queries
are rows of the index, and each is excluded from its own result. What retrieval_metrics does beside the search is timed on one
thread, by calling it again with the search's results at hand, in processor time, which other programs hardly change. Some
queries go through a Python loop over queries too, the usual way to compute these metrics, which must say the same of each.
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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from shared import machine, natural, output, positive  # noqa: E402

import evaluate  # noqa: E402

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
CLASS = 6  # rows of the index in a class, on average
NOISE = 1.0  # standard deviation of each coordinate; the centres' is 1
BLOCK = 2**16  # rows made at a time
REPEATS = 5  # of what is not the search


def shares(sizes, total):
    """`total` cut in proportion to the sizes, whole numbers."""
    return np.diff(np.round(np.cumsum([0, *sizes]) * (total / sum(sizes))).astype(int)).tolist()


def fill(rows, centres, labels, generator):
    """Rows (N, D) of the classes (N,)."""
    for block, mine in zip(rows.split(BLOCK), torch.from_numpy(labels).split(BLOCK)):
        block.normal_(0, NOISE, generator=generator).add_(centres[mine])
        block /= torch.linalg.vector_norm(block, dim=1, keepdim=True)


def made_up(q, g, dim, seed):
    """-> queries, index (evaluate.Embeddings), exclude (q,). Labels begin at 0 in each domain."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    vectors, labels = (
        (torch.empty(q, dim), torch.empty(g, dim)),
        (np.empty(q, dtype=int), np.empty(g, dtype=int)),
    )
    sizes = [shares(side, total) for side, total in zip(zip(*UNED.values()), (q, g))]
    exclude, ends = np.full(q, -1), (0, 0)
    for (queries, index), *counts in zip(UNED.values(), *sizes):
        mine, theirs = (slice(end, end + count) for end, count in zip(ends, counts))
        ends = mine.stop, theirs.stop
        classes = counts[1] // CLASS + 1
        centres = torch.randn(classes, dim, generator=generator)
        labels[1][theirs] = rng.integers(0, classes, counts[1])
        fill(vectors[1][theirs], centres, labels[1][theirs], generator)
        if queries == index and counts[1]:  # all rows of the domain, or as many as asked for
            exclude[mine] = theirs.start + np.arange(counts[0]) * counts[1] // max(1, counts[0])
            vectors[0][mine], labels[0][mine] = vectors[1][exclude[mine]], labels[1][exclude[mine]]
        else:
            labels[0][mine] = rng.integers(0, classes, counts[0])
            fill(vectors[0][mine], centres, labels[0][mine], generator)
    domains = [
        [domain for domain, count in zip(UNED, side) for _ in range(count)] for side in sizes
    ]
    return *(evaluate.Embeddings(*side) for side in zip(vectors, labels, domains)), exclude


def loop(queries, index, exclude, neighbours, some):
    """Yields R@1 and mMP of one query after another."""
    for q in some:
        same = np.flatnonzero(index.labels == queries.labels[q]).tolist()
        relevant = {
            row for row in same if index.domains[row] == queries.domains[q] and row != exclude[q]
        }
        found = [row in relevant for row in neighbours[q].tolist()]
        n = min(len(relevant), len(found))
        yield float(found[0]), sum(found[:n]) / max(1, n)


def main():
    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=positive, default=QUERIES)
    parser.add_argument("--index", type=positive, default=INDEX)
    parser.add_argument("--dim", type=positive, default=64)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--looped",
        type=positive,
        default=2000,
        help="queries that go through the loop too (default: %(default)s)",
    )
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "uned_size.json"))
    options = parser.parse_args()
    of, threads = machine("cpu"), torch.get_num_threads()
    queries, index, exclude = made_up(options.queries, options.index, options.dim, options.seed)

    results, searching, beside = [], [], []

    def search(*arguments, **further):
        started = time.perf_counter()
        results.append(topk(*arguments, **further))
        searching.append(time.perf_counter() - started)
        return results[-1]

    topk = evaluate.cosine_topk
    with patch.object(evaluate, "cosine_topk", search):
        metrics = evaluate.retrieval_metrics(queries, index, exclude=exclude)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    torch.set_num_threads(1)
    for _ in range(REPEATS):
        with patch.object(evaluate, "cosine_topk", side_effect=results):
            started = time.process_time()
            again = evaluate.retrieval_metrics(queries, index, exclude=exclude)
            beside.append(time.process_time() - started)
        assert again[:2] == metrics[:2] and all(map(torch.equal, again[2:], metrics[2:]))
    torch.set_num_threads(threads)

    some = np.linspace(0, options.queries - 1, min(options.looped, options.queries)).astype(int)
    started = time.process_time()
    looped = list(loop(queries, index, exclude, metrics.neighbours, some))
    looping = time.process_time() - started
    assert looped == list(
        zip(metrics.per_query_recall[some].tolist(), metrics.per_query_mmp[some].tolist())
    )

    result = {
        "command": f"python benchmarks/uned_size.py --queries {options.queries} --index {options.index} --dim {options.dim} "
        f"--seed {options.seed} --looped {options.looped}",
        "machine": of,
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "queries": options.queries,
        "excluded": int((exclude >= 0).sum()),
        "index": options.index,
        "dim": options.dim,
        "search_seconds": round(sum(searching), 2),
        "beside_search_us_per_query": round(1e6 * statistics.median(beside) / options.queries, 3),
        "beside_search_seconds": [round(seconds, 4) for seconds in beside],
        "loop_us_per_query": round(1e6 * looping / len(some), 1),
        "queries_equal_to_loop": len(some),
        "peak_memory_mb": round(memory / 1e6),
        "recall_at_1": metrics.recall_at_1,
        "mmp_at_5": metrics.mmp_at_k,
    }
    evaluate.write_json(options.out, result)
    print(
        f"{options.queries:,} queries in {options.index:,} rows of {options.dim}: R@1 {100 * metrics.recall_at_1:.2f}, mMP@5 "
        f"{100 * metrics.mmp_at_k:.2f}; search {result['search_seconds']} s on {threads} threads; all else "
        f"{result['beside_search_us_per_query']} us of processor time a query on one thread (median of {REPEATS}); a loop, which "
        f"says the same of {len(some):,} queries, {result['loop_us_per_query']} us; {result['peak_memory_mb']:,} MB; {of}"
    )


if __name__ == "__main__":
    main()
