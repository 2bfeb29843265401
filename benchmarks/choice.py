"""Settings of udon-joint that are chosen on half of the domains, and what they do on the others.

    python -m benchmarks.choice --data DIR                   trains what is missing
    python -m benchmarks.choice --table results/README.md    writes the table, trains nothing

Every second domain of a data directory, in the order of their names, makes one half; the others
make the other half. Each half is trained with each setting, all else as the defaults were before
(rows.SCHEDULE), on one thread. The setting with the best validation of one half is then judged by
the test of the other half, so that no setting is tuned to the domains that it is tested on. The
result is results/choice/<half>/<setting>/seed<N>.json.
"""

import argparse
import itertools
import shlex
import statistics
from pathlib import Path

import data
import udon
from benchmarks import start, tables
from benchmarks.rows import SCHEDULE, UDON_JOINT
from benchmarks.shared import positive
from evaluate import METRICS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "results" / "choice", ROOT / "runs" / "choice"
HALVES = ("first", "second")
SETTINGS = {
    "before": "",
    "batch-32": "--batch-size 32",
    "batch-32-area": "--batch-size 32 --min-area 0.4",
    "batch-32-cosine": "--batch-size 32 --backbone-lr 6e-4 --schedule cosine",
    "area": "--min-area 0.3",
    "fast-heads": "--head-lr 1e-2",
    "teacher-512": "--teacher-dim 512",
}

# Runs ---------------------------------------------------------------------------------------------


def halves(root: Path) -> dict[str, tuple[str, ...]]:
    """{half: its domains}. Raises data.InputError for a directory with fewer than two."""
    domains = data.Benchmark(str(root)).domains
    if len(domains) < 2:
        raise data.InputError(f"--data {root} has one domain: give a directory with two or more")
    return {name: domains[i::2] for i, name in enumerate(HALVES)}


def train(root: Path, half: str, setting: str, seed: int, results: Path, runs: Path) -> None:
    words = f"--domains {shlex.join(halves(root)[half])} {UDON_JOINT} {SCHEDULE}"
    words = f"{words} --student-init pca {SETTINGS[setting]} --seed {seed}"
    about = {"half": half, "setting": setting, "seed": seed}
    start.record(Path(half, setting, f"seed{seed}"), root, words, about, results, runs)


# Tables -------------------------------------------------------------------------------------------


def read(directory: Path) -> dict[str, tables.Results]:
    """{half: {setting: {seed: result}}}. Raises data.InputError for a file that is no result."""
    found = {half: {} for half in HALVES}
    for half, setting in itertools.product(HALVES, SETTINGS):
        for file in sorted((directory / half / setting).glob("seed*.json")):
            result = start.result_of(file)
            found[half].setdefault(setting, {})[result["seed"]] = result
    return found


def validation(result: dict) -> float:
    return result["val_recall_at_1"]


def table(found: dict[str, tables.Results]) -> str:
    """One row per setting: what it changes on both halves; then what choosing by one half does on
    the other."""
    heading, lines = ["setting", "n"], []
    for half in HALVES:
        heading += [f"{half} half: val R@1", *(f"test {tables.NAMES[name]}" for name in METRICS)]
    heading.append("CPU time")
    for setting, options in SETTINGS.items():
        if all(setting in found[half] for half in HALVES):
            lines.append(line(found, setting, options))
    names = ", ".join(
        f"the {half}: {', '.join(tables.first(tables.first(results))['domains'])}"
        for half, results in found.items()
        if results
    )
    sentences = "\n".join(outcome(found, *pair) for pair in (HALVES, HALVES[::-1]))
    return f"Halves: {names}.\n\n{tables.markdown(heading, lines)}\n\n{sentences}\n"


def line(found, setting: str, options: str) -> list[str]:
    cells, seconds = [f"`{options}`" if options else "as before", ""], []
    for half in HALVES:
        results = found[half]
        runs = results[setting].values()
        cells[1] = str(len(runs))
        if setting == "before":
            cells.append(tables.mean_interval(map(validation, runs)))
            cells += tables.metric_cells(results[setting])
        else:
            cells.append(tables.difference(results, setting, "before", validation))
            cells += tables.difference_cells(results, setting, "before")
        seconds += [statistics.fmean(run["cpu_seconds"] for run in runs)]
        seconds[-1] /= statistics.fmean(r["cpu_seconds"] for r in results["before"].values())
    return [*cells, f"{statistics.fmean(seconds):.2f}"]


def outcome(found: dict[str, tables.Results], half: str, other: str) -> str:
    """What the setting that validation on `half` chooses does on the other half."""
    results = found[half]
    if not results.keys() & found[other].keys():
        return ""
    means = {
        name: statistics.fmean(map(validation, runs.values())) for name, runs in results.items()
    }
    best = max(means, key=means.get)
    name = f"`{SETTINGS[best]}`" if SETTINGS[best] else "as before"
    text = f"- Chosen on the {half} half: {name}. On the {other} half"
    if best == "before" or best not in found[other]:
        return f"{text} nothing changes."
    gains = tables.difference_cells(found[other], best, "before")
    pairs = (f"{tables.NAMES[name]} {gain}" for name, gain in zip(METRICS, gains))
    return f"{text} it changes {' and '.join(pairs)}."


# Command line -------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Settings chosen on one half of the domains.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data directory")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING"
    )
    parser.add_argument("--seeds", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: results/choice)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: runs/choice)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if not (options.data or options.table):
        parser.error("give --data to train, or --table")
    with parser.sentences(udon.USER_ERRORS):
        if options.data:
            halves(options.data)
            grid = range(options.seeds), options.settings, HALVES
            for seed, setting, half in itertools.product(*grid):
                root, runs = options.data.absolute(), options.runs.absolute()
                train(root, half, setting, seed, options.results, runs)
        if options.table:
            tables.write(options.table, "choice", lambda: table(read(options.results)))


if __name__ == "__main__":
    main()
