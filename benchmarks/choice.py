"""Settings of udon-joint that are chosen on half of the domains, and what they do on the others.

    python -m benchmarks.choice --data DIR                   trains what is missing
    python -m benchmarks.choice --table results/README.md    writes the table, trains nothing

Every second domain of a data directory, in the order of their names, makes one half; the others
make the other half. Each half is trained with each setting on one thread, all else as the defaults
were (rows.SCHEDULE) or are now. The setting with the best validation of one half is then judged by
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
# {base: its options, {setting: what it changes}}; the settings of one base are compared
BASES = {
    "before": (
        f"{UDON_JOINT} {SCHEDULE} --student-init pca",
        {
            "batch-32": "--batch-size 32",
            "batch-32-area": "--batch-size 32 --min-area 0.4",
            "batch-32-cosine": "--batch-size 32 --backbone-lr 6e-4 --schedule cosine",
            "area": "--min-area 0.3",
            "fast-heads": "--head-lr 1e-2",
            "teacher-512": "--teacher-dim 512",
        },
    ),
    "now": (
        "--method udon-joint",
        {
            "round-robin": "--sampler round_robin",
            "size": "--sampler size",
        },
    ),
}
SETTINGS = {
    name: f"{options} {change}".rstrip()
    for base, (options, changes) in BASES.items()
    for name, change in ({base: ""} | changes).items()
}

# Runs ---------------------------------------------------------------------------------------------


def halves(root: Path) -> dict[str, tuple[str, ...]]:
    """{half: its domains}. Raises data.InputError for a directory with fewer than two."""
    domains = data.Benchmark(str(root)).domains
    if len(domains) < 2:
        raise data.InputError(f"--data {root} has one domain: give a directory with two or more")
    return {name: domains[i::2] for i, name in enumerate(HALVES)}


def train(root: Path, half: str, setting: str, seed: int, results: Path, runs: Path) -> None:
    words = f"--domains {shlex.join(halves(root)[half])} {SETTINGS[setting]} --seed {seed}"
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
    """For each base a row per setting: what it changes on both halves; then what choosing by one
    half does on the other."""
    names = ", ".join(
        f"the {half}: {', '.join(tables.first(tables.first(results))['domains'])}"
        for half, results in found.items()
        if results
    )
    parts = [f"Halves: {names}."]
    for base, (_, changes) in BASES.items():
        if all(base in found[half] for half in HALVES):
            parts += compared(found, base, {base: ""} | changes)
    return "\n\n".join(parts) + "\n"


def compared(found: dict[str, tables.Results], base: str, changes: dict[str, str]) -> list[str]:
    """The table of one base, and the outcomes of choosing."""
    heading = ["setting", "n"]
    for half in HALVES:
        heading += [f"{half} half: val R@1", *(f"test {tables.NAMES[name]}" for name in METRICS)]
    heading.append("CPU time")
    changes = {name: changes[name] for name in changes if all(name in found[h] for h in HALVES)}
    lines = [line(found, base, setting, change) for setting, change in changes.items()]
    pairs = HALVES, HALVES[::-1]
    outcomes = "\n".join(outcome(found, base, changes, *pair) for pair in pairs)
    return [tables.markdown(heading, lines), outcomes]


def named(base: str, change: str) -> str:
    return f"`{change}`" if change else f"as {base}"


def line(found, base: str, setting: str, change: str) -> list[str]:
    cells, seconds = [named(base, change), ""], []
    for half in HALVES:
        results = found[half]
        runs = results[setting].values()
        cells[1] = str(len(runs))
        if setting == base:
            cells.append(tables.mean_interval(map(validation, runs)))
            cells += tables.metric_cells(results[setting])
        else:
            cells.append(tables.difference(results, setting, base, validation))
            cells += tables.difference_cells(results, setting, base)
        seconds += [statistics.fmean(run["cpu_seconds"] for run in runs)]
        seconds[-1] /= statistics.fmean(r["cpu_seconds"] for r in results[base].values())
    return [*cells, f"{statistics.fmean(seconds):.2f}"]


def outcome(found, base: str, changes: dict[str, str], half: str, other: str) -> str:
    """What the setting that validation on `half` chooses does on the other half. Settings are
    compared by the seeds that all of them have."""
    seeds = set.intersection(*(set(found[half][name]) for name in changes))
    means = {
        name: statistics.fmean(validation(found[half][name][seed]) for seed in seeds)
        for name in changes
    }
    best = max(means, key=means.get)
    text = f"- Chosen on the {half} half: {named(base, changes[best])}. On the {other} half"
    if best == base:
        return f"{text} nothing changes."
    gains = tables.difference_cells(found[other], best, base)
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
