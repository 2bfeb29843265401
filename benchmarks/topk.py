"""kernels.cosine_topk on a CPU beside all installed peers, and beside the bare matrix product.

    python -m benchmarks.topk                            # all cases on 1 thread; results/topk.csv
    python -m benchmarks.topk --threads 2 --cases 4096x200000x64
    python -m benchmarks.topk --table results/README.md  # writes the table between its marks

Each contender is a process of its own that holds the same unit vectors. The processes search one
after another, round by round, so that a change of the machine's speed affects all. Times are
processor times of the whole process, which other programs disturb least; the CSV file has wall
times too. Short searches are repeated, with other queries each time: with the same ones, the
processor would learn to predict branches that depend on their values. Memory is the growth of the
process's peak from the first call to the last. A peer's index is built beforehand, and
normalisation is not counted: all are given unit vectors. `product` is the product in tiles of
1,024 rows by 512 queries without any selection: the lower limit of an exhaustive search.
"""

import argparse
import csv
import gc
import importlib.metadata
import importlib.util
import io
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.shared import fill, output, positive, processor

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    "1x300x64",
    "2x300x64",
    "10x300x64",
    "10x1000x64",
    "300x300x64",
    "8x2000x64",
    "300x3000x64",
    "100x20000x64",
    "1x200000x64",
    "4096x200000x64",
    "4096x200000x64 clustered",
    "4096x200000x64 sorted",
    "4096x200000x64 copies",
    "4096x200000x64 alike",
    "4096x200000x64 equal",
    "4096x200000x256",
    "512x50000x768",
    "4096x1400000x64",
)
KINDS = ("random", "clustered", "sorted", "copies", "alike", "equal")
K = 6
MODULES = {"faiss": "faiss", "scikit-learn": "sklearn", "usearch": "usearch"}
PACKAGES = {
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "usearch": "usearch",
    "numpy": "numpy",
    "torch": "torch",
}
# Pairs above which a contender is left out.
SLOW = {"usearch": 2**25, "scikit-learn": 2**30, "numpy": 2**30}
AT_LEAST = 0.1  # seconds of a measurement: short searches are repeated
BATCHES, OTHERS = 100, 2**22  # of other queries; pairs of all of them together
BLOCK, SLAB = 512, 1024  # queries and index rows of a tile
COLUMNS = (
    "case",
    "k",
    "threads",
    "contender",
    "cpu_ms",
    "wall_ms",
    "to_product",  # of cpu_ms, median over rounds
    "wall_to_product",
    "extra_mb",
    "same_rows_percent",
    "rounds",
    "machine",
    "versions",
    "date",
)
KEY = ("case", "k", "threads", "machine")


class Died(RuntimeError):
    """The process of a contender has ended; the message is one sentence."""


def a_case(text):
    if not re.fullmatch(rf"[1-9]\d*x[1-9]\d*x[1-9]\d*( ({'|'.join(KINDS)}))?", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not QxGxD or 'QxGxD KIND' with whole numbers above 0 and a KIND of "
            f"{', '.join(KINDS)}: give one"
        )
    return text


def unit_vectors(queries, index, width, kind):
    """(Q, D), (G, D) float32 unit rows; unless they are random, queries are near index rows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, points = (torch.empty(n, width).normal_(generator=generator) for n in (index, queries))
    spread = {"clustered": 0.3, "copies": 0, "alike": 0.01}.get(kind)
    if spread is not None:  # a thousand clusters, or ten copies of each row
        clusters = -(-index // 10) if kind == "copies" else 1000
        centres = torch.randn(clusters, width, generator=generator)
        chosen = torch.randint(0, clusters, (index,), generator=generator)
        for part, places in zip(rows.split(4096), chosen.split(4096)):
            part.mul_(spread).add_(centres[places])
        chosen = torch.randint(0, clusters, (queries,), generator=generator)
        points = (spread or 0.3) * points + centres[chosen]
    if kind == "equal":
        rows[:] = rows[0]
    for part in (*rows.split(4096), *points.split(4096)):
        part /= part.norm(dim=1, keepdim=True)
    if kind == "sorted":  # ever closer to all queries
        points = torch.nn.functional.normalize(0.1 * points + rows[0], dim=1)
        rows = rows[(rows @ rows[0]).argsort()]
    return points, rows


# Contenders: functions of batches of queries (Q, D), an index (G, D) and k -> a function that
# searches for the queries of batches[number] and returns the rows (Q, k), or None.


def product(batches, index, k):
    import torch

    tile = torch.empty(SLAB, min(BLOCK, len(batches[0])))

    def search(number):
        for block in batches[number].split(BLOCK):
            columns = block.T.contiguous()
            for slab in index.split(SLAB):
                out = tile[: len(slab)]
                if len(block) < tile.shape[1]:
                    out = out[:, : len(block)]
                torch.mm(slab, columns, out=out)

    return search


def ours(batches, index, k):
    from kernels import cosine_topk

    return lambda number: cosine_topk(batches[number], index, k)[1]


def torch_formula(batches, index, k):
    import torch
    from torch.nn.functional import normalize

    def search(number):
        unit = normalize(index)
        blocks = batches[number].split(BLOCK)
        found = [(normalize(block) @ unit.T).topk(k).indices for block in blocks]
        return torch.cat(found) if len(found) > 1 else found[0]

    return search


def torch_tiles(batches, index, k):
    import torch

    def search(number):
        found = []
        for block in batches[number].split(BLOCK):
            values = torch.empty(len(block), 0)
            rows = torch.empty(len(block), 0, dtype=torch.int64)
            for left in range(0, len(index), 16 * SLAB):
                scores = block @ index[left : left + 16 * SLAB].T
                best = scores.topk(min(k, scores.shape[1]))
                values = torch.cat([values, best.values], 1)
                values, order = values.topk(min(k, values.shape[1]))
                rows = torch.cat([rows, best.indices + left], 1).gather(1, order)
            found.append(rows)
        return torch.cat(found)

    return search


def numpy_partition(batches, index, k):
    batches, index = [queries.numpy() for queries in batches], index.numpy()

    def search(number):
        found = []
        for top in range(0, len(batches[number]), BLOCK):
            scores = batches[number][top : top + BLOCK] @ index.T
            rows = np.argpartition(scores, -k, axis=1)[:, -k:]
            order = np.argsort(-np.take_along_axis(scores, rows, 1), axis=1)
            found.append(np.take_along_axis(rows, order, 1))
        return np.concatenate(found)

    return search


def faiss_flat(batches, index, k):
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(index.shape[1])
    flat.add(index.numpy())
    return lambda number: flat.search(batches[number].numpy(), k)[1]


def scikit_learn(batches, index, k):
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine")
    neighbours.fit(index.numpy())
    return lambda number: neighbours.kneighbors(batches[number].numpy(), return_distance=False)


def usearch_exact(batches, index, k):
    import torch
    import usearch.index

    def search(number):
        metric, threads = usearch.index.MetricKind.IP, torch.get_num_threads()
        sides = index.numpy(), batches[number].numpy()
        return usearch.index.search(*sides, k, metric, exact=True, threads=threads).keys

    return search


CONTENDERS = {
    "product": product,
    "ours": ours,
    "faiss": faiss_flat,
    "torch": torch_formula,
    "torch, tiles": torch_tiles,
    "numpy": numpy_partition,
    "scikit-learn": scikit_learn,
    "usearch": usearch_exact,
}


def start(*arguments):
    """The process of a contender. If it fails, the reason is sent as text."""
    try:
        serve(*arguments)
    except Exception as error:
        arguments[-1].send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def serve(name, case, k, threads, pipe):
    """Answers "go" by (processor seconds, wall seconds) of a search, the end by rows, memory."""
    import torch

    torch.set_num_threads(threads)
    shape, _, kind = case.partition(" ")
    count, size, width = map(int, shape.split("x"))
    batches = max(1, min(BATCHES, OTHERS // (count * size)))
    queries, index = unit_vectors(count * batches, size, width, kind)
    search = CONTENDERS[name](queries.split(count), index, k)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        search(0)
        started = time.perf_counter()
        search(0)
        calls = max(1, round(AT_LEAST / (time.perf_counter() - started)))
        pipe.send(None)
        while pipe.recv() == "go":
            cpu, wall = time.process_time(), time.perf_counter()
            for number in range(calls):
                search(number % batches)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            pipe.send((cpu / calls, wall / calls))
        rows = search(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 1024
    pipe.send((None if rows is None else np.asarray(rows), peak * unit))


def ask(name, case, worker, message=None):
    """The next answer of a contender, to a message or to being started. Raises Died."""
    process, pipe, _ = worker
    try:
        if message:
            pipe.send(message)
        answer = pipe.recv()
    except (EOFError, OSError):  # killed, for its memory for example
        process.join()
        answer = f"exit status {process.exitcode}"
    if isinstance(answer, str):
        raise Died(
            f"the process of {name} died in case {case} ({answer}): give a smaller case, or leave "
            f"{name} out by --contenders"
        )
    return answer


def measure(case, options, contenders):
    """-> rows of the CSV file, one for each contender."""
    pairs = int(case.split("x")[0]) * int(case.split("x")[1])
    contenders = [name for name in contenders if pairs <= SLOW.get(name, pairs)]
    context, workers = multiprocessing.get_context("spawn"), {}
    try:
        for name in contenders:
            pipe, remote = context.Pipe()
            arguments = name, case, options.k, options.threads, remote
            process = context.Process(target=start, args=arguments, daemon=True)
            process.start()
            remote.close()
            workers[name] = process, pipe, []
            ask(name, case, workers[name])  # ready: one after another
        for turn in range(options.rounds):
            first = turn % len(contenders)
            for name in contenders[first:] + contenders[:first]:
                workers[name][2].append(ask(name, case, workers[name], "go"))
        ends = {name: ask(name, case, worker, "end") for name, worker in workers.items()}
    finally:
        for process, *_ in workers.values():
            process.terminate()
    times = {name: worker[2] for name, worker in workers.items()}
    rows = [csv_row(case, options, name, times, ends) for name in workers]
    for row in rows:
        print(
            f"{row['case']:28}{row['contender']:14}{row['cpu_ms']:>10} ms{row['wall_ms']:>10} ms "
            f"wall{row['to_product']:>9}{row['wall_to_product']:>9} wall{row['extra_mb']:>7} MB"
            f"{row['same_rows_percent']:>8}",
            flush=True,
        )
    return rows


def csv_row(case, options, name, times, ends):
    rows, memory = ends[name]
    cpu, wall = zip(*times[name])
    ratios = [
        [taken[i] / floor[i] for taken, floor in zip(times[name], times["product"])] for i in (0, 1)
    ]
    equal = "" if rows is None else f"{100 * (rows == ends['ours'][0]).mean():.2f}"
    return {
        "case": case,
        "k": str(options.k),
        "threads": str(options.threads),
        "contender": name,
        "cpu_ms": f"{1e3 * statistics.median(cpu):.4g}",
        "wall_ms": f"{1e3 * statistics.median(wall):.4g}",
        "to_product": f"{statistics.median(ratios[0]):.3f}",
        "wall_to_product": f"{statistics.median(ratios[1]):.3f}",
        "extra_mb": f"{memory / 1e6:.0f}",
        "same_rows_percent": equal,
        "rounds": str(options.rounds),
        "machine": this_machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def this_machine():
    """The CPU, and the instructions to which the environment limits the libraries."""
    limit = os.environ.get("MKL_ENABLE_INSTRUCTIONS")
    return f"{processor()}, {os.cpu_count()} processors" + (f", {limit} only" if limit else "")


def versions():
    return "; ".join(
        f"{package} {importlib.metadata.version(package)}"
        for module, package in PACKAGES.items()
        if importlib.util.find_spec(module)
    )


def written(path):
    """The rows of a CSV file, if there is one. Raises ValueError for a file of another origin."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as lines:
        try:
            rows = list(csv.DictReader(lines, strict=True))
        except (csv.Error, UnicodeDecodeError):
            rows = [{}]
    if not all(tuple(row) == COLUMNS and None not in row.values() for row in rows):
        raise ValueError(
            f"--out {path} is not a table of this program, whose columns are "
            f"{', '.join(COLUMNS)}: give another file"
        )
    return rows


def write(path, rows):
    """Writes the whole file or nothing."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    table.writerows(rows)
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def table(rows):
    """Markdown: milliseconds of the product, every contender's time in products, our memory."""
    present = {row["contender"] for row in rows} - {"product"}
    names = [name for name in CONTENDERS if name in present]
    header = ["queries x rows x width", "threads", "product, ms", *names, "memory of ours, MB"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for key in dict.fromkeys(tuple(row[name] for name in KEY) for row in rows):
        case = {row["contender"]: row for row in rows if tuple(row[name] for name in KEY) == key}
        ratios = {name: float(case[name]["to_product"]) for name in names if name in case}
        best = min(ratios.values())
        shown = {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
        shown |= {name: f"**{shown[name]}**" for name in shown if ratios[name] == best}
        label = key[0] + f", k = {key[1]}" * (key[1] != str(K))
        label += f" ({key[3].split(', ')[-1]})" * key[3].endswith(" only")
        cells = [label, key[2], case["product"]["cpu_ms"]]
        cells += [shown.get(name, "") for name in names] + [case["ours"]["extra_mb"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def command_line():
    import data  # late: the processes of the contenders do not need it

    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        type=a_case,
        default=CASES,
        metavar="QxGxD[ KIND]",
        help=f"KIND: {', '.join(KINDS)} (default: random); quote the two together",
    )
    parser.add_argument("--k", type=positive, default=K)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=9)
    peers = list(CONTENDERS)[2:]
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=peers,
        metavar="NAME",
        help=f"besides product and ours, of {', '.join(peers)} (default: all installed ones)",
    )
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "topk.csv"))
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="write the table into this file, between its marks, and measure nothing",
    )
    return parser


def write_table(parser, options):
    rows = written(options.out)
    if not rows:
        parser.error(f"--out {options.out} holds no rows for a table: measure first")
    try:
        fill(options.table, "topk", lambda: table(rows))
    except ValueError as error:
        parser.error(f"--table {error}")


def check(parser, options):
    for case in options.cases:
        if options.k > (index := int(case.split("x")[1])):
            parser.error(
                f"--k {options.k} is above the {index} rows of the index of case {case}: give "
                "that or less"
            )
    for name in options.contenders or ():
        if name in MODULES and not importlib.util.find_spec(MODULES[name]):
            package = PACKAGES[MODULES[name]]
            parser.error(
                f"--contenders {name} is not installed: pip install {package}, or leave it out"
            )


def main():
    parser = command_line()
    options = parser.parse_args()
    try:
        written(options.out)
    except ValueError as error:
        parser.error(str(error))
    if options.table:
        return write_table(parser, options)
    check(parser, options)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes of the contenders
    peers = options.contenders or [
        name
        for name in list(CONTENDERS)[2:]
        if name not in MODULES or importlib.util.find_spec(MODULES[name])
    ]
    for case in options.cases:
        try:
            measured = measure(case, options, ["product", "ours", *dict.fromkeys(peers)])
        except Died as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        replaced = {tuple(row[name] for name in KEY) for row in measured}
        rows = written(options.out)
        kept = [row for row in rows if tuple(row[name] for name in KEY) not in replaced]
        write(options.out, kept + measured)


if __name__ == "__main__":
    main()
