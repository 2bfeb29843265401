"""kernels.cosine_topk on a CPU beside every peer that is installed, in turn, and beside the bare matrix product.

    python benchmarks/topk.py                          # all cases on 1 thread; writes results/topk.csv, a case at a time
    python benchmarks/topk.py --threads 2 --cases 4096x200000x64
    python benchmarks/topk.py --table README.md        # writes the table of results/topk.csv between the marks in the README

Each contender is a process of its own that holds the same unit vectors and computes when it is told to; they are told one after
another, round by round, so that a change of the machine's speed meets all. Time is processor time of the whole process, which
others on the machine disturb least. A short search is repeated, each time with other queries: with the same ones the processor
would foresee branches that depend on their values, as it cannot in use. Memory is what its peak grew by from the first call to
the last. A peer's own building of an index is not counted, nor is normalisation: it is handed unit vectors. `product` selects
nothing: it is the floor.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shared import fill, output, positive, processor  # noqa: E402

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
CONTENDERS = (
    "product",
    "ours",
    "faiss",
    "torch",
    "torch, tiles",
    "numpy",
    "scikit-learn",
    "usearch",
)
MODULES = {"faiss": "faiss", "scikit-learn": "sklearn", "usearch": "usearch"}
PACKAGES = {
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "usearch": "usearch",
    "numpy": "numpy",
    "torch": "torch",
}
SLOW = {
    "usearch": 2**25,
    "scikit-learn": 2**30,
    "numpy": 2**30,
}  # pairs, above which a contender is left out
AT_LEAST = 0.1  # seconds of a measurement: short calls are repeated,
BATCHES, OTHERS = 100, 2**22  # with other queries, no more than so many pairs
BLOCK, SLAB = 512, 1024  # queries, index rows of a tile
COLUMNS = (
    "case",
    "k",
    "threads",
    "contender",
    "cpu_ms",
    "wall_ms",
    "to_product",
    "extra_mb",
    "same_rows_percent",
    "rounds",
    "machine",
    "versions",
    "date",
)


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
    """(Q, D), (G, D) float32 unit rows, the queries near rows of the index unless they are random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, asked = (torch.empty(n, width).normal_(generator=generator) for n in (index, queries))
    spread = {
        "clustered": 0.3,
        "copies": 0,
        "alike": 0.01,
    }  # ten copies of each row, else a thousand clusters
    if kind in spread:
        centres = torch.randn(
            -(-index // 10) if kind == "copies" else 1000, width, generator=generator
        )
        chosen = torch.randint(0, len(centres), (index,), generator=generator)
        for top in range(0, index, 4096):
            rows[top : top + 4096] = (
                rows[top : top + 4096] * spread[kind] + centres[chosen[top : top + 4096]]
            )
        asked = (spread[kind] or 0.3) * asked + centres[
            torch.randint(0, len(centres), (queries,), generator=generator)
        ]
    if kind == "equal":
        rows[:] = rows[0]
    for part in (*rows.split(4096), *asked.split(4096)):
        part /= part.norm(dim=1, keepdim=True)
    if kind == "sorted":  # ever nearer to all queries
        asked = torch.nn.functional.normalize(0.1 * asked + rows[0], dim=1)
        order = (rows @ rows[0]).argsort()
        rows = rows[order]
    return asked, rows


def contender(name, batches, index, k):
    """-> a function that searches for the queries (Q, D) of batches[number], and returns the rows (Q, k) or None."""
    import torch

    if name == "product":
        tile = torch.empty(SLAB, min(BLOCK, len(batches[0])))

        def product(number):
            for block in batches[number].split(BLOCK):
                columns = block.T.contiguous()
                for slab in index.split(SLAB):
                    torch.mm(
                        slab,
                        columns,
                        out=tile[: len(slab), : len(block)]
                        if len(block) < BLOCK
                        else tile[: len(slab)],
                    )

        return product
    if name == "ours":
        from kernels import cosine_topk

        return lambda number: cosine_topk(batches[number], index, k)[1]
    if name == "torch":

        def formula(number):
            unit = torch.nn.functional.normalize(index)
            found = [
                (torch.nn.functional.normalize(block) @ unit.T).topk(k).indices
                for block in batches[number].split(BLOCK)
            ]
            return torch.cat(found) if len(found) > 1 else found[0]

        return formula
    if name == "torch, tiles":

        def tiles(number):
            found = []
            for block in batches[number].split(BLOCK):
                values = torch.empty(len(block), 0)
                rows = torch.empty(len(block), 0, dtype=torch.int64)
                for left in range(0, len(index), 16 * SLAB):
                    best = (block @ index[left : left + 16 * SLAB].T).topk(
                        min(k, len(index) - left)
                    )
                    values, order = torch.cat([values, best.values], 1).topk(
                        min(k, values.shape[1] + best.values.shape[1])
                    )
                    rows = torch.cat([rows, best.indices + left], 1).gather(1, order)
                found.append(rows)
            return torch.cat(found)

        return tiles
    a, b = [queries.numpy() for queries in batches], index.numpy()
    if name == "numpy":

        def partition(number):
            found = []
            for top in range(0, len(a[number]), BLOCK):
                scores = a[number][top : top + BLOCK] @ b.T
                rows = np.argpartition(scores, -k, axis=1)[:, -k:]
                order = np.argsort(-np.take_along_axis(scores, rows, 1), axis=1)
                found.append(np.take_along_axis(rows, order, 1))
            return np.concatenate(found)

        return partition
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexFlatIP(b.shape[1])
        flat.add(b)
        return lambda number: flat.search(a[number], k)[1]
    if name == "scikit-learn":
        from sklearn.neighbors import NearestNeighbors

        neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(b)
        return lambda number: neighbours.kneighbors(a[number], return_distance=False)
    import usearch.index

    return lambda number: (
        usearch.index.search(
            b,
            a[number],
            k,
            usearch.index.MetricKind.IP,
            exact=True,
            threads=torch.get_num_threads(),
        ).keys
    )


def start(*arguments):
    """A contender's process. Why it cannot go on is sent as text."""
    try:
        serve(*arguments)
    except Exception as error:
        arguments[-1].send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


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
            f"the process of {name} died in case {case} ({answer}): give a smaller case, or leave {name} out by "
            "--contenders"
        )
    return answer


def serve(name, case, k, threads, pipe):
    """Answers each message by (processor seconds, wall seconds) of a call, and the last by rows, memory."""
    import torch

    torch.set_num_threads(threads)
    shape, _, kind = case.partition(" ")
    count, size, width = map(int, shape.split("x"))
    queries, index = unit_vectors(
        count * max(1, min(BATCHES, OTHERS // (count * size))), size, width, kind
    )
    batches = queries.split(count)
    search = contender(name, batches, index, k)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        search(0)
        started = time.perf_counter()
        search(0)
        calls = max(1, round(AT_LEAST / (time.perf_counter() - started)))
        pipe.send(None)
        while pipe.recv() == "go":
            started = time.process_time(), time.perf_counter()
            for number in range(calls):
                search(number % len(batches))
            pipe.send(
                (
                    (time.process_time() - started[0]) / calls,
                    (time.perf_counter() - started[1]) / calls,
                )
            )
        rows = search(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send(
        (
            None if rows is None else np.asarray(rows),
            peak * (1 if sys.platform == "darwin" else 1024),
        )
    )


def measure(case, options, contenders):
    """-> rows of the CSV file, a contender each."""
    pairs = int(case.split("x")[0]) * int(case.split("x")[1])
    contenders = [name for name in contenders if pairs <= SLOW.get(name, pairs)]
    context, workers = multiprocessing.get_context("spawn"), {}
    try:
        for name in contenders:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=start, args=(name, case, options.k, options.threads, theirs), daemon=True
            )
            process.start()
            theirs.close()
            workers[name] = process, ours, []
            ask(name, case, workers[name])  # ready: one after another, or they would crowd
        for turn in range(options.rounds):
            for name in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
                workers[name][2].append(ask(name, case, workers[name], "go"))
        ends = {name: ask(name, case, worker, "end") for name, worker in workers.items()}
    finally:
        for process, *_ in workers.values():
            process.terminate()
    exact, lines = ends["ours"][0], []
    for name, (_, _, taken) in workers.items():
        rows, peak = ends[name]
        equal = "" if rows is None else f"{100 * (rows == exact).mean():.2f}"
        ratio = statistics.median(
            cpu / floor for (cpu, _), (floor, _) in zip(taken, workers["product"][2])
        )
        lines.append(
            {
                "case": case,
                "k": options.k,
                "threads": options.threads,
                "contender": name,
                "cpu_ms": f"{1e3 * statistics.median(cpu for cpu, _ in taken):.4g}",
                "wall_ms": f"{1e3 * statistics.median(wall for _, wall in taken):.4g}",
                "to_product": f"{ratio:.3f}",
                "extra_mb": f"{peak / 1e6:.0f}",
                "same_rows_percent": equal,
                "rounds": options.rounds,
                "machine": f"{processor()}, {os.cpu_count()} processors",
                "versions": versions(),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
        print(
            f"{case:28}{name:14}{lines[-1]['cpu_ms']:>10} ms{lines[-1]['wall_ms']:>10} ms wall{lines[-1]['to_product']:>9}"
            f"{lines[-1]['extra_mb']:>7} MB{equal:>8}",
            flush=True,
        )
    return lines


def versions():
    return "; ".join(
        f"{package} {importlib.metadata.version(package)}"
        for module, package in PACKAGES.items()
        if importlib.util.find_spec(module)
    )


def written(path):
    """The rows of a CSV file, none if there is none. Raises ValueError for a file that `write` did not write."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as lines:
        try:
            rows = list(csv.DictReader(lines, strict=True))
        except (csv.Error, UnicodeDecodeError):
            rows = [{}]
    if not all(tuple(row) == COLUMNS and None not in row.values() for row in rows):
        raise ValueError(
            f"--out {path} is not a table of this program, whose columns are {', '.join(COLUMNS)}: give another file"
        )
    return rows


def write(path, rows):
    """Writes all of the file or nothing."""
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
    """The README's table: milliseconds of the product, how often as much each contender takes, memory of ours."""
    names = [
        name
        for name in CONTENDERS
        if any(row["contender"] == name for row in rows) and name != "product"
    ]
    lines = [
        "| queries x rows x width | threads | product, ms | "
        + " | ".join(names)
        + " | memory of ours, MB |",
        "|---" * (len(names) + 4) + "|",
    ]
    for case, threads in dict.fromkeys((row["case"], row["threads"]) for row in rows):
        of = {
            row["contender"]: row
            for row in rows
            if (row["case"], row["threads"]) == (case, threads)
        }
        best = min(float(row["to_product"]) for name, row in of.items() if name != "product")
        cells = []
        for name in names:
            ratio = float(of[name]["to_product"]) if name in of else None
            cells.append(
                "" if ratio is None else f"**{ratio:.2f}**" if ratio == best else f"{ratio:.2f}"
            )
        lines.append(
            f"| {case} | {threads} | {of['product']['cpu_ms']} | {' | '.join(cells)} | {of['ours']['extra_mb']} |"
        )
    return "\n".join(lines) + "\n"


def main():
    import evaluate  # here: the contenders' processes need none of it

    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        type=a_case,
        default=CASES,
        metavar="QxGxD[ KIND]",
        help=f"KIND: {', '.join(KINDS)} (default: random); quote the two together",
    )
    parser.add_argument("--k", type=positive, default=6)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS[2:],
        metavar="NAME",
        help=f"besides product and ours, of {', '.join(CONTENDERS[2:])} (default: all that are installed)",
    )
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "topk.csv"))
    parser.add_argument(
        "--table",
        type=Path,
        metavar="README",
        help="write the table into this file, between its marks, and measure nothing",
    )
    options = parser.parse_args()
    try:
        rows = written(options.out)
    except ValueError as error:
        parser.error(str(error))
    if options.table:
        if not rows:
            parser.error(
                f"--out {options.out} holds no rows to make a table of: measure first, or give another file"
            )
        try:
            fill(options.table, "topk", lambda: table(rows))
        except ValueError as error:
            parser.error(f"--table {error}")
        return
    for case in options.cases:
        if options.k > (index := int(case.split("x")[1])):
            parser.error(
                f"--k {options.k} is above the {index} rows of the index of case {case}: give that or less"
            )
    for name in options.contenders or ():
        if name in MODULES and not importlib.util.find_spec(MODULES[name]):
            parser.error(
                f"--contenders {name} is not installed: pip install {PACKAGES[MODULES[name]]}, or leave it out"
            )
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes to be started
    installed = [
        name
        for name in CONTENDERS
        if name not in MODULES or importlib.util.find_spec(MODULES[name])
    ]
    contenders = (
        ["product", "ours", *dict.fromkeys(options.contenders)] if options.contenders else installed
    )
    for case in options.cases:
        try:
            measured = measure(case, options, contenders)
        except Died as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        kept = [
            row
            for row in written(options.out)
            if (row["case"], row["k"], row["threads"])
            != (case, str(options.k), str(options.threads))
        ]
        write(options.out, kept + measured)


if __name__ == "__main__":
    main()
