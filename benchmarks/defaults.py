"""Whether training with the defaults helps: every method beside the start that it trains from.

    python -m benchmarks.defaults --data DIR... [--unseen DIR]   trains what is missing
    python -m benchmarks.defaults --table results/README.md      writes the tables, trains nothing

Each data set is trained with every method and several seeds, all else by default, on one thread.
`start` is the student before its first step: 64 principal axes of the backbone's embeddings of the
training images. -plain: six epochs, however few images there are, and the last weights instead of
their running mean; -lda: axes of embeddings that are whitened first; -rr: domains in turn; -size:
domains in proportion to their images; -no-distillation: without the distillation losses, so that
teachers reach the student through the backbone alone; -student-3: three times the weight for the
student's classification loss. `distill-8` is distilled from a separate teacher for each domain, and
its time includes theirs; `distill-8-joint` has the negatives and the margin of udon-joint, too.
Every student is tested on its own domains, and on those of --unseen. The result is
results/defaults/<data set>/<method>/seed<N>.json; an interrupted run is resumed from its checkpoint
in runs/defaults/.
"""

import argparse
import itertools
import json
import shlex
import statistics
from pathlib import Path

import data
import udon
from benchmarks import ablation, start, tables
from benchmarks.shared import positive

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "results" / "defaults", ROOT / "runs" / "defaults"
STILL = "--method usc --steps 1 --head-lr 1e-30"  # a step that changes nothing
DISTILL = "--method distill --distill-into-backbone"
TEACHER = "--method usc --student-dim 256 --epochs 6"  # of one domain; all see as many images
PLAIN = "--epochs 6 --ema 0"  # the defaults of 2026-11-29
METHODS = {
    "udon-joint": "--method udon-joint",
    "ujc": "--method ujc",
    "ujc-size": "--method ujc --sampler size",
    "udon": "--method udon",
    "udon-rr": "--method udon --sampler round_robin",
    "udon-rr-no-distillation": "--method udon --sampler round_robin --weights 1 1 0 0",
    "udon-rr-student-3": "--method udon --sampler round_robin --weights 1 3 1 1",
    "usc": "--method usc",
    "distill-8": DISTILL,
    "distill-8-joint": f"{DISTILL} --negatives all --domain-margin 0.2",
    "udon-joint-plain": f"--method udon-joint {PLAIN}",
    "udon-joint-plain-rr": f"--method udon-joint {PLAIN} --sampler round_robin",
    "udon-joint-plain-lda": f"--method udon-joint {PLAIN} --student-init lda",
    "ujc-plain": f"--method ujc {PLAIN}",
    "ujc-plain-size": f"--method ujc {PLAIN} --sampler size",
    "udon-plain": f"--method udon {PLAIN}",
    "usc-plain": f"--method usc {PLAIN}",
    "start": STILL,
    "start-lda": f"{STILL} --student-init lda",
}
PAIRS = (
    ("udon-joint", "ujc"),
    ("udon-joint", "ujc-size"),
    ("udon-joint", "distill-8"),
    ("udon-joint", "distill-8-joint"),
    ("udon", "usc"),
    ("udon", "udon-rr"),
    ("udon-rr", "udon-rr-no-distillation"),
    ("udon-rr-no-distillation", "usc"),
    ("udon-rr-student-3", "udon-rr"),
    ("udon-joint", "udon-joint-plain"),
    ("ujc", "ujc-plain"),
    ("udon", "udon-plain"),
    ("usc", "usc-plain"),
    ("ujc-size", "ujc-plain-size"),
    ("udon-joint-plain", "udon-joint-plain-rr"),
    ("udon-joint-plain-lda", "udon-joint-plain"),
)

# Runs ---------------------------------------------------------------------------------------------


def train(root: Path, unseen: Path | None, method: str, seed: int, results: Path, runs: Path):
    place, words = Path(root.name, method, f"seed{seed}"), f"{METHODS[method]} --seed {seed}"
    if (results / place).with_suffix(".json").exists():
        return
    benchmark, teacher_seconds = data.Benchmark(str(root)), 0.0
    if method.startswith("distill"):
        teachers = Path(root.name, "teachers", f"seed{seed}")
        teacher_seconds = train_teachers(runs / teachers, benchmark, seed)
        words += f" --teachers {shlex.quote(str(runs / teachers))}"

    def further(run, result):
        images = {name: len(benchmark.split(name, "train")) for name in benchmark.domains}
        about = {"images": images, "images_seen": sum(result["images"].values())}
        about["cpu_seconds"] = result["cpu_seconds"] + teacher_seconds
        if unseen:
            about["unseen"] = {"data": unseen.name, "mean": evaluated(run, unseen)}
        return about

    start.record(place, root, words, {"method": method, "seed": seed}, results, runs, further)


def train_teachers(place: Path, benchmark: data.Benchmark, seed: int) -> float:
    """Trains one teacher for each domain, place/<domain>, and returns their CPU seconds."""
    options = ["--data", benchmark.root, *TEACHER.split(), "--seed", seed, "--workers", 0]
    return sum(
        ablation.train(place / domain, [*options, "--domains", domain])["cpu_seconds"]
        for domain in benchmark.domains
    )


def evaluated(run: Path, unseen: Path) -> dict[str, float]:
    """The means of a run's student on all domains of another data directory."""
    domains = data.Benchmark(str(unseen)).domains
    words = ["--data", unseen, "--domains", *domains, "--json", run / "unseen.json"]
    ablation.call("evaluate.py", run, *words, log=run.with_suffix(".log"))
    return json.loads((run / "unseen.json").read_text(encoding="utf-8"))["mean"]


# Tables -------------------------------------------------------------------------------------------


def read(directory: Path) -> dict[str, tables.Results]:
    """{data set: {method: {seed: result}}}, the largest first. Raises data.InputError for a file
    that is no result."""
    found = {}
    for file in sorted(directory.glob("*/*/seed*.json")):
        result = start.result_of(file, "parameters", "images_seen")
        rows = found.setdefault(file.parent.parent.name, {})
        rows.setdefault(file.parent.name, {})[result["seed"]] = result
    return dict(sorted(found.items(), key=lambda item: -start.size_of(item[1])))


def of_unseen(results: tables.Results) -> tables.Results:
    """The results on the domains that were not trained on."""
    found = {}
    for method, runs in results.items():
        kept = {seed: run["unseen"] for seed, run in runs.items() if "unseen" in run}
        if kept:
            found[method] = kept
    return found


def table(found: dict[str, tables.Results]) -> str:
    """The data sets; then a row per data set and method, with the differences from the start."""
    names = tables.NAMES.values()
    sizes, seen, unseen = [], [], []
    for name, results in found.items():
        run = tables.first(tables.first(results))
        backbone = [f"{100 * run['backbone'][metric]:.1f}" for metric in tables.NAMES]
        sizes.append([f"`{name}`", f"{start.size_of(results):,}", str(len(run["domains"]))])
        sizes[-1] += backbone
        for method in filter(results.__contains__, METHODS):
            runs = list(results[method].values())
            cost = [""] * 3 if METHODS[method].startswith(STILL) else cost_of(runs)
            seen.append([*row(name, results, method), *cost, str(len(runs))])
        other = of_unseen(results)
        for method in filter(other.__contains__, METHODS):
            unseen.append([*row(name, other, method), str(len(other[method]))])
    backbones = (f"{name}, backbone" for name in names)
    heading = ["data", "method", *names, *(f"{name} − start" for name in names)]
    parts = [
        tables.markdown(["data", "training images", "domains", *backbones], sizes),
        "The domains that were trained on:",
        tables.markdown([*heading, "trainable, M", "images seen", "CPU s", "n"], seen),
        "Domains that were not trained on:",
        tables.markdown([*heading, "n"], unseen),
        "One method less another, on the domains that were trained on:",
        tables.markdown(["data", "methods", *names, "n"], differences(found)),
    ]
    return "\n\n".join(parts) + "\n"


def cost_of(runs: list[dict]) -> list[str]:
    """Trainable parameters, images seen, CPU seconds."""
    seconds = statistics.fmean(run["cpu_seconds"] for run in runs)
    millions = runs[0]["parameters"]["trained"] / 1e6
    return [f"{millions:.2f}", f"{runs[0]['images_seen']:,}", f"{seconds:.0f}"]


def row(name: str, results: tables.Results, method: str) -> list[str]:
    cells = [f"`{name}`", tables.code(method), *tables.metric_cells(results[method])]
    if "start" not in results:
        return [*cells, *[""] * len(tables.NAMES)]
    return cells + tables.difference_cells(results, method, "start")


def differences(found: dict[str, tables.Results]) -> list[list[str]]:
    lines = []
    for (name, results), (method, other) in itertools.product(found.items(), PAIRS):
        if method in results and other in results:
            cells = tables.difference_cells(results, method, other)
            seeds = results[method].keys() & results[other].keys()
            lines.append([f"`{name}`", f"`{method}` − `{other}`", *cells, str(len(seeds))])
    return lines


# Command line -------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Methods with the defaults, beside the start of training.")
    parser.add_argument("--data", nargs="+", type=Path, metavar="DIR", help="data directories")
    parser.add_argument("--unseen", type=Path, metavar="DIR", help="test on its domains, too")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M")
    parser.add_argument("--seeds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: results/defaults)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: runs/defaults)")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write the tables into this file"
    )
    parser.add_argument("--mark", default="defaults", help="its marks in FILE (default: defaults)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if not (options.data or options.table):
        parser.error("give --data to train, or --table")
    with parser.sentences(udon.USER_ERRORS):
        for root in (*(options.data or ()), *([options.unseen] if options.unseen else [])):
            data.Benchmark(str(root))
        unseen, runs = options.unseen and options.unseen.absolute(), options.runs.absolute()
        grid = range(options.seeds), options.data or (), options.methods
        for seed, root, method in itertools.product(*grid):
            train(root.absolute(), unseen, method, seed, options.results, runs)
        if options.table:
            tables.write(options.table, options.mark, lambda: table(read(options.results)))


if __name__ == "__main__":
    main()
