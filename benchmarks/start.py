"""Heads and classifiers that start from the training images, beside those that start at random.

    python -m benchmarks.start --data DIR...                    trains what is missing
    python -m benchmarks.start --cut DIR OUT --images 10        a smaller data set: OUT holds the
        [--classes 25] [--domains D...]                         first images of the first classes
    python -m benchmarks.start --table results/README.md        writes the tables, trains nothing

Each data set is trained with every method and several seeds, with random heads, with heads that
start from images, and with fewer steps that train the heads alone; all else as the defaults were
then (rows.SCHEDULE), on one thread. The result is
results/start/<data set>/<method>-<start>/seed<N>.json; an interrupted run is resumed from its
checkpoint in runs/start/.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import data
import udon
from benchmarks import ablation, shared, tables
from benchmarks.rows import SCHEDULE, UDON_JOINT
from benchmarks.shared import positive
from checkpoint import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "results" / "start", ROOT / "runs" / "start"
METHODS = {
    "udon-joint": UDON_JOINT,
    "udon": "--method udon",
    "usc": "--method usc",
    "ujc": "--method ujc",
}
STARTS = {  # the last is that of the presets mini and micro
    "lecun": "--student-init lecun --frozen-epochs 1",
    "pca": "--student-init pca --frozen-epochs 1",
    "short": "--student-init pca --frozen-epochs 0.2",
}
KEPT = ("mean", "domains", "val_recall_at_1", "step", "images", "cpu_seconds", "parameters")

# Runs ---------------------------------------------------------------------------------------------


def train(root: Path, method: str, start: str, seed: int, results: Path, runs: Path) -> None:
    place = Path(root.name, f"{method}-{start}", f"seed{seed}")
    words = f"{METHODS[method]} {STARTS[start]} {SCHEDULE} --seed {seed}"
    about = {"method": method, "start": start, "seed": seed}
    record(place, root, words, about, results, runs)


def record(
    place: Path,
    root: Path,
    words: str,
    about: dict,
    results: Path,
    runs: Path,
    further: Callable[[Path, dict], dict] = lambda run, result: {},
) -> None:
    """Trains and tests a run on the data directory `root` with the options `words`, and writes
    results/<place>.json, unless that exists. further: the directory of the run and its test
    results -> what replaces or joins them."""
    target = (results / place).with_suffix(".json")
    if target.exists():
        return
    options = ["--data", str(root), *shlex.split(words), "--workers", "0"]
    result = ablation.train(runs / place, options)
    command = f"python udon.py train {shlex.join(options)}".replace(str(root), root.name)
    command = command.replace(f"{runs}{os.sep}", "")
    about = {"data": root.name} | about | {"command": command}
    about |= {name: result[name] for name in KEPT} | {"backbone": result["backbone"]["mean"]}
    about |= further(runs / place, result)
    about |= {"version": ablation.version(), "machine": shared.machine("cpu")}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, about | {"date": time.strftime("%Y-%m-%d")})
    recall = 100 * result["mean"]["recall_at_1"]
    print(f"{time.strftime('%H:%M:%S')} {place}: R@1 {recall:.2f}", flush=True)


def cut(root: Path, out: Path, images: int, classes: int | None, domains: list | None) -> None:
    """Writes a data directory with the first `images` training images of the first `classes`
    classes of each domain; val and test stay. Its images are a link to those of `root`. Raises
    data.InputError unless `root` has the UnED layout, and `out` does not exist."""
    if not (root / "info_files").is_dir():
        raise data.InputError(f"--cut {root} has no info_files: give a directory in UnED layout")
    if out.exists():
        raise data.InputError(f"--cut {root} {out}: {out} exists, give a new directory")
    for domain in data.Benchmark(str(root), domains).domains:
        for name in ("train", "val", "test"):
            file = Path("info_files", domain, f"{name}.json")
            rows = json.loads((root / file).read_text(encoding="utf-8"))
            if name == "train":
                kept = {}
                for row in rows:
                    kept.setdefault(row["class_id"], []).append(row)
                kept = list(kept.values())[:classes]
                rows = [row for one in kept for row in one[:images]]
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            write_json(out / file, rows)
    os.symlink(root.resolve() / "images", out / "images", target_is_directory=True)


# Tables -------------------------------------------------------------------------------------------


def read(directory: Path, ablation_results: Path = ablation.RESULTS) -> dict[str, tables.Results]:
    """{data set: {"<method>-<start>": {seed: result}}}, the largest first. The ablation's runs of
    the same data sets are those with random heads. Raises data.InputError for a file that is no
    result."""
    found = {}
    for file in sorted(directory.glob("*/*/seed*.json")):
        result = result_of(file)
        rows = found.setdefault(file.parent.parent.name, {})
        rows.setdefault(file.parent.name, {})[result["seed"]] = result
    for method, name in itertools.product(METHODS, found):
        for file in sorted((ablation_results / method).glob("seed*.json")):
            result = result_of(file)
            if f"--data {name} " in result["command"]:
                found[name].setdefault(f"{method}-lecun", {})[result["seed"]] = result
    return dict(sorted(found.items(), key=lambda item: -size_of(item[1])))


def result_of(file: Path, *further: str) -> dict:
    """A recorded result, which has the values `further`. Raises data.InputError otherwise."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for name in ("mean", "images", "cpu_seconds", "command", "seed", *further):
            result[name]
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.InputError(
            f"{file} is not the result of a run ({type(error).__name__}: {error}): delete it "
            "and train it again"
        ) from None


def size_of(results: tables.Results) -> int:
    """The number of training images."""
    return sum(tables.first(tables.first(results))["images"].values())


def table(found: dict[str, tables.Results]) -> str:
    """One row per data set, method and start: both metrics, and their differences from random heads
    and from the backbone."""
    lines = []
    for (name, results), method, start in itertools.product(found.items(), METHODS, STARTS):
        row, random = f"{method}-{start}", f"{method}-{next(iter(STARTS))}"
        if row not in results:
            continue
        runs = list(results[row].values())
        differences = (
            tables.difference_cells(results, row, random) if random in results else ["", ""]
        )
        seconds = statistics.fmean(run["cpu_seconds"] for run in runs)
        cells = [*tables.metric_cells(results[row]), *differences, f"{seconds:.0f}", str(len(runs))]
        lines.append([f"`{name}`", tables.code(method), f"`{STARTS[start]}`", *cells])
    names = tables.NAMES.values()
    heading = ["data", "method", "start", *names, *(f"{name} − random" for name in names)]
    return f"{backbones(found)}\n\n{tables.markdown([*heading, 'CPU s', 'n'], lines)}\n"


def backbones(found: dict[str, tables.Results]) -> str:
    """The data sets, and what the backbone reaches without training."""
    lines = []
    for name, results in found.items():
        run = next(run for runs in results.values() for run in runs.values() if "data" in run)
        values = [f"{100 * run['backbone'][metric]:.1f}" for metric in tables.NAMES]
        lines.append([f"`{name}`", str(len(run["domains"])), *values])
    return tables.markdown(
        ["data", "domains", *(f"{n}, backbone" for n in tables.NAMES.values())], lines
    )


# Command line -------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Heads that start from images, beside random ones.")
    parser.add_argument("--data", nargs="+", type=Path, metavar="DIR", help="data directories")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M")
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=list(STARTS), metavar="START"
    )
    parser.add_argument("--seeds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: results/start)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: runs/start)")
    parser.add_argument("--cut", nargs=2, type=Path, metavar=("DIR", "OUT"))
    parser.add_argument("--images", type=positive, default=10, help="of a class (default: 10)")
    parser.add_argument("--classes", type=positive, help="of a domain (default: all)")
    parser.add_argument("--domains", nargs="+", metavar="D", help="(default: all)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if not (options.data or options.table or options.cut):
        parser.error("give --data to train, --cut to make a smaller data set or --table")
    with parser.sentences(udon.USER_ERRORS):
        if options.cut:
            cut(*options.cut, options.images, options.classes, options.domains)
        for root in options.data or ():
            data.Benchmark(str(root))
        grid = range(options.seeds), options.data or (), options.methods, options.starts
        for seed, root, method, start in itertools.product(*grid):
            train(root.absolute(), method, start, seed, options.results, options.runs.absolute())
        if options.table:
            tables.write(options.table, "start", lambda: table(read(options.results)))


if __name__ == "__main__":
    main()
