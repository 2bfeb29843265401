"""What adding a domain does to a trained model.

    python -m benchmarks.added_domain --data DIR --new retail_goods    trains what is missing
    python -m benchmarks.added_domain --table results/README.md        writes the table

`udon-joint` is trained on all domains but one, then continued with --init for 2 epochs, on all
domains and on the new one alone; for comparison, it is trained on all domains from the start. All
students are tested on all domains, in one index. An interrupted run is resumed from its checkpoint
in runs/added_domain/.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import data
import udon
from benchmarks import ablation, shared, tables
from benchmarks.shared import output, positive, recorded
from checkpoint import write_json
from evaluate import METRICS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "results" / "added_domain.json", ROOT / "runs" / "added_domain"
ROWS = {
    "before": "trained without the domain",
    "all": "continued on all domains",
    "alone": "continued on the new domain alone",
    "together": "trained on all domains from the start",
}
CONTINUED = "--epochs 2"


def commands(new: str, old: list[str], seed: int) -> dict[str, str]:
    """{row: options of `python udon.py train`}; before is the directory of its run."""
    common = f"--data DIR --method udon-joint --seed {seed} --workers 0"
    return {
        "before": f"{common} --domains {' '.join(old)}",
        "all": f"{common} --init before {CONTINUED}",
        "alone": f"{common} --init before --domains {new} {CONTINUED}",
        "together": common,
    }


def measure(root: str, new: str, seeds: int, runs: Path) -> list[dict]:
    """One result per row and seed, {"row", "seed", "command", "cpu_seconds", "domains"}."""
    domains = data.Benchmark(root).domains
    old = [domain for domain in domains if domain != new]
    results = []
    for seed in range(seeds):
        for row, command in commands(new, old, seed).items():
            out, file = runs / f"seed{seed}" / row, runs / f"seed{seed}" / f"{row}.json"
            places = {"DIR": root, "before": out.with_name("before")}
            options = [places.get(word, word) for word in command.split()]
            result = ablation.train(out, options)
            words = ["evaluate.py", out, "--data", root, "--domains", *domains, "--json", file]
            ablation.call(*words, log=out.with_suffix(".log"))
            found = json.loads(file.read_text(encoding="utf-8"))["domains"]
            kept = {name: {m: found[name][m] for m in METRICS} for name in found}
            seconds = result["cpu_seconds"]
            about = {"row": row, "seed": seed, "command": f"python udon.py train {command}"}
            results.append(about | {"cpu_seconds": seconds, "domains": kept})
            recall = 100 * found[new][METRICS[0]]
            print(f"{time.strftime('%H:%M:%S')} {row} seed {seed}: R@1 {recall:.1f}", flush=True)
    return results


def table(values: dict) -> str:
    """Means over the old domains, and the new one."""
    new, lines = values["new"], []
    for row, name in ROWS.items():
        runs = [run for run in values["runs"] if run["row"] == row]
        cells = []
        for metric in METRICS:
            old = [
                statistics.fmean(v[metric] for d, v in run["domains"].items() if d != new)
                for run in runs
            ]
            cells += [old, [run["domains"][new][metric] for run in runs]]
        seconds = statistics.fmean(run["cpu_seconds"] for run in runs)
        lines.append([name, *map(tables.mean_interval, cells), f"{seconds:.0f}", str(len(runs))])
    names = [f"{metric}, {which}" for metric in ("R@1", "mMP@5") for which in ("old", f"`{new}`")]
    return tables.markdown(["student", *names, "CPU s", "n"], lines) + "\n"


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="What adding a domain does to a trained model.")
    parser.add_argument("--data", metavar="DIR", help="data directory; trains and measures")
    parser.add_argument("--new", metavar="DOMAIN", help="the domain that is added (default: last)")
    parser.add_argument("--seeds", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: runs/added_domain)")
    parser.add_argument("--out", type=output, default=str(RESULTS), help="(default: %(default)s)")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write the table of --out into this file"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if not (options.data or options.table):
        parser.error("give --data to measure or --table to write the table")
    with parser.sentences(udon.USER_ERRORS):
        if options.data:
            root = str(Path(options.data).absolute())
            new = options.new or data.Benchmark(root).domains[-1]
            data.Benchmark(root, [new])
            runs = measure(root, new, options.seeds, options.runs.absolute())
            about = {
                "new": new,
                "machine": shared.machine("cpu"),
                "version": ablation.version(),
                "date": time.strftime("%Y-%m-%d"),
            }
            write_json(options.out, about | {"runs": runs})
        if options.table:
            values = recorded(Path(options.out), "added_domain", ("new", "runs"))
            tables.write(options.table, "added domain", lambda: table(values))


if __name__ == "__main__":
    main()
