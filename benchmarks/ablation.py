"""Trains every system of the paper and every ablation over several seeds, and writes their tables.

    python -m benchmarks.ablation --data DIR                    trains what is missing
    python -m benchmarks.ablation --data DIR --rows usc udon    only these rows
    python -m benchmarks.ablation --tables results/README.md    writes the tables, trains nothing

A row of benchmarks/rows.py is `python udon.py train` with its options: one run per seed, each on
one thread, two at a time. The result of a row and seed is results/ablation/<row>/seed<N>.json; an
interrupted run is resumed from its checkpoint in runs/ablation/. All rows see the same number of
training images, the specialists of all domains together, unless their names say twice.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint
import data
import udon
from benchmarks import rows, tables
from benchmarks.shared import positive
from evaluate import METRICS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "results" / "ablation", ROOT / "runs" / "ablation"
TIMES = ROOT / "results" / "step_times.json"


def call(*arguments: object, log: Path) -> None:
    """Runs a command line of the project on one thread; its output is appended to `log`. Raises
    data.InputError if it fails."""
    arguments = [str(argument) for argument in arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, *arguments]
        status = subprocess.call(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    if status:
        raise data.InputError(
            f"{' '.join(arguments)} ended with status {status}: fix what the end of {log} says and "
            "start again; finished runs are kept"
        )


def train(directory: Path, options: list) -> dict:
    """The test results of the run in `directory`, which is started or resumed unless finished."""
    if not (directory / "test.json").exists():
        resumable = (directory / "last.pt").exists()
        arguments = ["--resume"] if resumable else options
        call("udon.py", "train", "--out", directory, *arguments, log=directory.with_suffix(".log"))
    return json.loads((directory / "test.json").read_text(encoding="utf-8"))


class Grid:
    """All rows on one data directory; `run(row, seed)` writes one result. Rows that serve as
    teachers are trained once, even if several threads need them."""

    def __init__(self, root: str, results: Path, runs: Path):
        self.root, self.results, self.runs = root, results, runs
        benchmark = data.Benchmark(root)
        self.splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
        self.locks, self.lock = {}, threading.Lock()

    def run(self, row: str, seed: int) -> None:
        """Trains and evaluates one row with one seed, unless its result exists."""
        target = self.results / row / f"seed{seed}.json"
        if target.exists():
            return
        print(f"{time.strftime('%H:%M:%S')} {row} seed {seed}", flush=True)
        directory, parts = self.trained(row, seed)
        command = ["python udon.py train", *self.options(row, seed)]
        result = {"row": row, "seed": seed, "command": " ".join(map(str, command))}
        result |= combined(parts) | {"further": {}}
        if not row.startswith("specialists"):
            config = (directory / "config.json").read_text(encoding="utf-8")
            result["config"] = json.loads(config)
            has_teachers = result["config"]["weights"][0] > 0
            result["further"] = self.further(row, directory, has_teachers)
        result["version"] = version()
        result["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs, one thread per run"
        result["date"] = time.strftime("%Y-%m-%d")
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(target, json.loads(relative(json.dumps(result), self.root)))
        recall = 100 * result["mean"]["recall_at_1"]
        print(f"{time.strftime('%H:%M:%S')} {row} seed {seed}: R@1 {recall:.2f}", flush=True)

    def options(self, row: str, seed: int) -> list:
        """Options of `python udon.py train` for one row and seed."""
        options = ["--data", self.root, "--seed", seed, "--workers", 0]
        options += f"{rows.START} {rows.ROWS[row].options}".split()
        if teachers := rows.ROWS[row].teachers:
            path = self.runs / teachers / f"seed{seed}"
            one_each = teachers.startswith("specialists")
            options += ["--teachers", path if one_each else path / "best.pt"]
        return options

    def trained(self, row: str, seed: int) -> tuple[Path, dict[str, dict]]:
        """Directory and test results of the runs of one row and seed: one run, {row: results}, or
        for specialists one run per domain, {domain: results}."""
        with self.lock:
            lock = self.locks.setdefault((row, seed), threading.Lock())
        with lock:
            directory, options = self.runs / row / f"seed{seed}", self.options(row, seed)
            if teachers := rows.ROWS[row].teachers:
                self.trained(teachers, seed)
            if not row.startswith("specialists"):
                return directory, {row: train(directory, options)}
            parts = {}
            for domain in self.splits:
                share = self.share(domain, rows.ROWS[row].length)
                own = [*options, "--domains", domain, *share]
                parts[domain] = train(directory / domain, own)
            return directory, parts

    def share(self, domain: str, length: int = 1) -> list:
        """Options that divide the steps, frozen steps and validations of a row, times `length`,
        equally between the specialists of the domains."""
        config = rows.config_of(rows.BASELINE)
        whole = udon.build_run(config, self.splits)
        alone = udon.build_run(config, {domain: self.splits[domain]})
        count = len(self.splits)
        frozen_steps = length * whole.frozen_steps / count
        return [
            *("--steps", length * whole.steps // count),
            *("--frozen-epochs", frozen_steps / alone.steps_per_epoch),
            *("--val-every", max(1, length * whole.steps_per_epoch // count)),
        ]

    def further(self, row: str, directory: Path, has_teachers: bool) -> dict[str, dict]:
        """Results of a main row with other embeddings and indexes, {"<embedding>-<index>": ...}."""
        if rows.ROWS[row].seeds != rows.MAIN_SEEDS or row == "teachers":
            return {}
        pairs = [("student", "separate"), ("backbone", "merged")]
        if has_teachers:
            pairs.append(("teacher", "separate"))
        results = {}
        for embedding, index in pairs:
            file = directory / f"{embedding}-{index}.json"
            options = ["--embedding", embedding, "--index", index, "--json", file]
            log = directory.with_suffix(".log")
            call("evaluate.py", directory / "best.pt", *options, log=log)
            measured = json.loads(file.read_text(encoding="utf-8"))
            results[f"{embedding}-{index}"] = {name: measured[name] for name in ("mean", "domains")}
        return results


def relative(text: str, root: str) -> str:
    """`text` without the directories of this machine."""
    return text.replace(root, Path(root).name).replace(f"{ROOT}{os.sep}", "")


def combined(parts: dict[str, dict]) -> dict:
    """One result for the runs of a row: that of its only run, or of all specialists."""
    if len(parts) == 1:
        (result,) = parts.values()
        return result | {"backbone": result["backbone"]["mean"]}
    results = parts.values()
    domains = {domain: result["domains"][domain] for domain, result in parts.items()}
    means = {name: statistics.fmean(r[name] for r in domains.values()) for name in METRICS}
    parameters = {
        name: sum(result["parameters"][name] for result in results)
        for name in ("trained", "inference")
    }
    return {
        "mean": means,
        "domains": domains,
        "index": "separate",
        "embedding": "student",
        "method": "specialists",
        "parameters": parameters,
        "images": {domain: result["images"][domain] for domain, result in parts.items()},
        "seconds": sum(result["seconds"] for result in results),
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
    }


def version() -> str:
    """The commit of the code, followed by + if Python files differ from it."""

    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "*.py")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def run_all(grid: Grid, jobs: list[tuple[str, int]], parallel: int, program: str) -> None:
    """Runs the jobs, `parallel` at a time. After a failure no further job is started."""
    failures = []

    def run(row, seed):
        try:
            if not failures:
                grid.run(row, seed)
        except BaseException as error:
            failures.append(error)
            # Reported at once, because the other job may take hours to end.
            if len(failures) == 1 and isinstance(error, udon.USER_ERRORS):
                print(f"{program}: {error}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        for job in jobs:
            pool.submit(run, *job)
    if failures:
        raise SystemExit(2) if isinstance(failures[0], udon.USER_ERRORS) else failures[0]


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(
        description="Trains the rows of the ablation that are missing, or writes their tables."
    )
    parser.add_argument("--data", metavar="DIR", help="data directory of all rows")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=rows.ROWS,
        default=list(rows.ROWS),
        metavar="ROW",
        help="train these only",
    )
    parser.add_argument("--seeds", type=positive, help="train at most so many seeds of each row")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory of results (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="logs and checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--times",
        type=Path,
        default=TIMES,
        help="times of the steps, as step_overhead.py writes them (default: %(default)s)",
    )
    parser.add_argument(
        "--parallel", type=int, choices=(1, 2), default=2, help="runs at a time (default: 2)"
    )
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="FILE",
        help="write the tables into this file, between the lines <!-- ablation --> and "
        "<!-- end of ablation -->, and train nothing",
    )
    return parser


def write_tables(options: argparse.Namespace) -> None:
    def text():
        results = tables.read(options.results)
        return tables.ablation_tables(results, tables.read_times(options.times))

    tables.write(options.tables, "ablation", text)


def train_rows(options: argparse.Namespace, program: str) -> None:
    """Trains what is missing: the main rows first, seed by seed."""
    for name in ("results", "runs"):
        directory = getattr(options, name)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise data.InputError(
                f"--{name} {directory} cannot be made ({error.strerror}): give another directory"
            ) from None
    root = str(Path(options.data).resolve())
    grid = Grid(root, options.results.resolve(), options.runs.resolve())
    limit = options.seeds or rows.MAIN_SEEDS
    seeds = {row: range(min(rows.ROWS[row].seeds, limit)) for row in options.rows}
    jobs = [(row, seed) for row in options.rows for seed in seeds[row]]
    jobs.sort(key=lambda job: (rows.ROWS[job[0]].seeds != rows.MAIN_SEEDS, job[1]))
    run_all(grid, jobs, options.parallel, program)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if not options.tables and not options.data:
        parser.error("--data is missing: give the directory that the rows are trained on")
    with parser.sentences(udon.USER_ERRORS):
        if options.tables:
            write_tables(options)
        else:
            train_rows(options, parser.prog)


if __name__ == "__main__":
    main()
