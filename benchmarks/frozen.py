"""Heads on features of a frozen backbone (--freeze-backbone) beside the fine-tuned backbone.

    python -m benchmarks.frozen --data DIR                    trains and measures what is missing
    python -m benchmarks.frozen --table results/README.md     writes the table, trains nothing

Runs of usc and udon-joint, with features of the test view alone and of four random crops, too; the
fine-tuned ones are those of results/defaults. Then the images per second that one thread trains on:
images, with the backbone fine-tuned or frozen, and features; one after another in turns, CPU time.
An interrupted run is resumed from its checkpoint in runs/frozen/.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import data
import features
import udon
from benchmarks import ablation, defaults, shared, step_overhead, tables
from benchmarks.shared import output, positive
from checkpoint import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "results" / "frozen.json", ROOT / "runs" / "frozen"
METHODS = ("usc", "udon-joint")
VIEWS = (0, 4)
OPTIONS = "--preset mini --freeze-backbone --head-lr 1e-2 --epochs 20 --workers 0 --device cpu"
MODELS = {"mini": (64, 40), "b16": (8, 5)}  # images of a step that takes images, rounds
IMAGES = 2000  # of each domain, whose features are trained on


# Accuracy and cost of runs ------------------------------------------------------------------------


def options_of(root: str, views: int, seed: int) -> list[str]:
    """The command line of the methods' runs, which share their features."""
    options = ["--data", root, *OPTIONS.split(), "--views", str(views), "--seed", str(seed)]
    return [*options, "--method", METHODS[0], "--compare", *METHODS[1:]]


def train(root: str, runs: Path, seeds: int) -> list[dict]:
    """The results of all frozen runs."""
    results = []
    for views, seed in itertools.product(VIEWS, range(seeds)):
        print(f"{time.strftime('%H:%M:%S')} views {views}, seed {seed}", flush=True)
        directory = runs / f"views{views}" / f"seed{seed}"
        options = options_of(root, views, seed)
        if not (directory / METHODS[-1] / "test.json").exists():
            started = (directory / "last.pt").exists()
            words = ["--resume"] if started else options
            log = directory.with_suffix(".log")
            ablation.call("udon.py", "train", "--out", directory, *words, log=log)
        about = json.loads((directory / "features" / "about.json").read_text(encoding="utf-8"))
        for method in METHODS:
            path = directory / ("" if method == METHODS[0] else method) / "test.json"
            result = json.loads(path.read_text(encoding="utf-8"))
            results.append(
                {"method": method, "views": views, "seed": seed}
                | {name: result[name] for name in ("mean", "val_recall_at_1", "step")}
                | {"features_cpu_seconds": about["cpu_seconds"]}
                | {"steps_cpu_seconds": result["cpu_seconds"]}
                | {"command": " ".join(["python udon.py train", *options]).replace(root, "DIR")}
            )
    return results


def fine_tuned(directory: Path) -> list[dict]:
    """The results of the fine-tuned runs. Raises data.InputError if there are none."""
    results = []
    for method in METHODS:
        files = sorted((directory / method).glob("seed*.json"))
        if not files:
            raise data.InputError(
                f"{directory / method} has no result: train the fine-tuned runs with "
                f"python -m benchmarks.defaults --data DIR --methods {' '.join(METHODS)}"
            )
        for path in files:
            result = json.loads(path.read_text(encoding="utf-8"))
            seconds = {"steps_cpu_seconds": result["cpu_seconds"], "command": result["command"]}
            kept = {name: result[name] for name in ("seed", "mean")}
            results.append({"method": method, "views": None} | kept | seconds)
    return results


# Images per second --------------------------------------------------------------------------------


def contenders(model: str, method: str, count: int) -> dict[str, tuple[Callable, int]]:
    """{name: (a function that trains on a batch, its number of images)}; "backbone alone" embeds
    images without training."""

    def build(**options):
        return step_overhead.build_run(method, "cpu", {"model": model, **options})

    size = step_overhead.SIZES[model]["image_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    found = {}
    for name, epochs in (("fine-tuned", 0.0), ("frozen", 1.0)):
        run = build(image_size=size, batch_size=count, frozen_epochs=epochs)
        labels = torch.zeros(count, dtype=torch.int64)
        batches = ((domain, images, labels) for domain in iter(run.sampler.draw, None))
        found[name] = (step_of(run, batches), count)
    run = build(image_size=size, freeze_backbone=True)
    found["features"] = (step_of(run, feature_stream(run)), run.config.batch_size)
    inputs = data.normalise(images, (0.5,) * 3, (0.5,) * 3)
    backbone = build(image_size=size).model.eval().backbone
    found["backbone alone"] = (torch.inference_mode()(lambda: backbone(inputs)), count)
    return found


def step_of(run, batches) -> Callable:
    return lambda: udon.training_step(run, batches)


def feature_stream(run):
    """The batches of all steps, of random features."""
    rng, splits, arrays = np.random.default_rng(0), {}, {}
    for domain, classes in step_overhead.CLASSES.items():
        labels = (np.arange(IMAGES) % classes).astype(np.int32)
        pixels = np.zeros((IMAGES, 1, 1, 3), dtype=np.uint8)
        splits[domain] = data.Split(domain, "train", labels, pixels=pixels)
        shape = (IMAGES, 1 + max(VIEWS), run.model.backbone.width)
        arrays[domain] = rng.normal(size=shape).astype(np.float16)
    images = data.TrainBatches(splits, 1, run.config.batch_size, 0, keep=False)
    batches = features.FeatureBatches(images, arrays)
    return data.stream(batches, run.sampler, 0, step_overhead.STEPS_PER_EPOCH, 0)


def speeds(model: str, method: str, count: int, rounds: int) -> dict[str, float]:
    """{contender: images per second of CPU time}: medians over the rounds, after two to warm up."""
    torch.manual_seed(0)
    found = contenders(model, method, count)
    seconds = {name: [] for name in found}
    for turn, (name, (function, images)) in itertools.product(range(-2, rounds), found.items()):
        started = time.process_time()
        function()
        if turn >= 0:
            seconds[name].append((time.process_time() - started) / images)
    return {name: round(1 / statistics.median(values), 2) for name, values in seconds.items()}


# Table --------------------------------------------------------------------------------------------


def table(values: dict) -> str:
    """Means over the seeds with 95 % intervals; CPU time; images per second."""
    lines = []
    names = {None: "fine-tuned", 0: "frozen, test view", 4: "frozen, test view and 4 crops"}
    for method, views in itertools.product(METHODS, names):
        runs = [x for x in values["runs"] if (x["method"], x["views"]) == (method, views)]
        cells = [tables.mean_interval(r["mean"][name] for r in runs) for name in tables.NAMES]
        steps = statistics.fmean(run["steps_cpu_seconds"] for run in runs)
        once = statistics.fmean(run.get("features_cpu_seconds", 0) for run in runs)
        times = [f"{once:.0f} s" if once else "", f"{steps:.0f} s"]
        lines.append([tables.code(method), names[views], *cells, str(len(runs)), *times])
    columns = ["row", "backbone", *tables.NAMES.values(), "seeds", "CPU of features", "of steps"]
    rates, heads = [], []
    for model, method in itertools.product(values["images_per_second"], METHODS):
        row = values["images_per_second"][model][method]
        cells = [f"{rate:,.{0 if rate >= 10 else 1}f}" for rate in row.values()]
        rates.append([tables.code(model), tables.code(method), *cells])
        heads = ["model", "row", *row]
    return f"{tables.markdown(columns, lines)}\n\n{tables.markdown(heads, rates)}\n"


# Command line -------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """Raises data.InputError for a file that this program has not written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        table(values)
        return values
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise data.InputError(
            f"{path} is not a result of this program ({type(error).__name__}: {error}): write it "
            "with --data DIR"
        ) from None


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Heads on features of a frozen backbone: accuracy and cost.")
    parser.add_argument("--data", metavar="DIR", help="data directory; trains and measures")
    parser.add_argument("--seeds", type=positive, default=3, help="(default: 3)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: runs/frozen)")
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
            data.Benchmark(root)
            tuned = fine_tuned(defaults.RESULTS / Path(root).name)
            runs = train(root, options.runs, options.seeds)
            about = {
                "command": f"python -m benchmarks.frozen --data DIR --seeds {options.seeds}",
                "machine": shared.machine("cpu"),
                "version": ablation.version(),
                "date": time.strftime("%Y-%m-%d"),
            }
            rates = {
                model: {method: speeds(model, method, *sizes) for method in METHODS}
                for model, sizes in MODELS.items()
            }
            write_json(options.out, about | {"images_per_second": rates, "runs": tuned + runs})
        values = read(Path(options.out))
        if options.table:
            tables.write(options.table, "frozen", lambda: table(values))
    print(table(values))


if __name__ == "__main__":
    main()
