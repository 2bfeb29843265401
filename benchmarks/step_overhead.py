"""The cost of a training step of each row of the ablation, relative to a step of usc.

    python -m benchmarks.step_overhead          all rows, into results/step_times.json
    python -m benchmarks.step_overhead --rows udon --model s16 --batch-size 8 --out FILE

All rows run in one process, a step of each in turn, so that changes of the machine's speed affect
all alike; ratios are taken within a round, medians over the rounds. A step is all that
udon.training_step does except loading images: normalisation, forward, losses, backward, AdamW and
sampler, and the forward pass of the frozen teacher of a distilled student. Times are CPU time, on a
GPU elapsed time.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
import evaluate
import udon
from benchmarks import rows
from benchmarks.shared import machine, output, positive
from checkpoint import write_json
from model import SIZES
from sampler import DomainSampler

ROOT = Path(__file__).resolve().parents[1]
TRAINED = [row for row in rows.ROWS if row != "backbone"]
COUNTS = (61, 118, 60, 49, 185, 973, 145, 59)  # classes of eight real domains
CLASSES = {f"domain{number}": count for number, count in enumerate(COUNTS)}
STEPS_PER_EPOCH = 10**6  # more than are run


def build_run(row: str, device: str, options: dict, classes: dict = CLASSES) -> udon.Run:
    """The run of a row on domains of so many classes, from random weights: they take the same
    time."""
    config = rows.config_of(row, device=device, init="scratch", **options)
    model, architecture, preprocessing = udon.build_model(config, classes)
    model.to(device).train()
    teachers = None
    if rows.ROWS[row].teachers:
        teacher = build_run(rows.ROWS[row].teachers, device, options, classes).model.eval()
        teachers = udon.FrozenTeachers(dict.fromkeys(classes, teacher))
    return udon.Run(
        config=config,
        model=model,
        architecture=architecture,
        preprocessing=preprocessing,
        optimizer=udon.build_optimizer(model, config),
        sampler=DomainSampler(classes, period=len(classes)),
        device=device,
        steps_per_epoch=STEPS_PER_EPOCH,
        digests={},
        teachers=teachers,
    )


def stepper(row: str, device: str, options: dict) -> Callable[[bool], float]:
    """A function that runs another step of a row, with the backbone frozen or not, and returns the
    milliseconds that 64 images take."""
    run = build_run(row, device, options)
    runs = {}
    for frozen in (False, True):
        config = dataclasses.replace(run.config, frozen_epochs=float(frozen))
        runs[frozen] = dataclasses.replace(run, config=config)
    count, size = run.config.batch_size, run.config.image_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = {domain: torch.randint(0, classes, (count,)) for domain, classes in CLASSES.items()}
    batches = ((domain, images, labels[domain]) for domain in iter(run.sampler.draw, None))
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time

    def step(frozen: bool) -> float:
        started = clock()
        udon.training_step(runs[frozen], batches)
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (clock() - started) * 64 / count

    return step


def measure(steppers: dict[str, Callable], rounds: int) -> dict[str, dict[str, float]]:
    """{row: {"ms", "to_usc", "frozen_to_usc"}}: medians over the rounds, after two to warm up."""
    contenders = [(row, frozen) for row in steppers for frozen in (False, True)]
    times = {contender: [] for contender in contenders}
    for turn in range(-2, rounds):
        first = turn % len(contenders)  # the order rotates
        for row, frozen in contenders[first:] + contenders[:first]:
            milliseconds = steppers[row](frozen)
            if turn >= 0:
                times[row, frozen].append(milliseconds)

    def ratio(contender):
        pairs = zip(times[contender], times[rows.BASELINE, False])
        return round(statistics.median(own / other for own, other in pairs), 4)

    return {
        row: {
            "ms": round(statistics.median(times[row, False]), 2),
            "to_usc": ratio((row, False)),
            "frozen_to_usc": ratio((row, True)),
        }
        for row in steppers
    }


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Measures training steps of the ablation's rows.")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=TRAINED,
        default=TRAINED,
        metavar="ROW",
        help=f"besides {rows.BASELINE} (default: all)",
    )
    parser.add_argument("--model", choices=SIZES, help="(default: the row's)")
    parser.add_argument("--image-size", type=positive, help="(default: the model's)")
    parser.add_argument("--batch-size", type=positive, help="unless a row sets it (default: 64)")
    parser.add_argument("--rounds", type=positive, default=24, help="(default: 24)")
    parser.add_argument("--device", default="auto", help="(default: cuda where there is one)")
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "step_times.json"))
    return parser


def command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command line that is recorded."""
    words = ["python -m benchmarks.step_overhead"]
    for name in ("rows", "model", "image_size", "batch_size", "rounds"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    overrides = {"image_size": SIZES[options.model]["image_size"]} if options.model else {}
    for name in ("model", "image_size", "batch_size"):
        if getattr(options, name):
            overrides[name] = getattr(options, name)
    torch.manual_seed(0)
    with parser.sentences(udon.USER_ERRORS):
        device = evaluate.find_device(options.device)
        names = dict.fromkeys([rows.BASELINE, *options.rows])
        steppers = {row: stepper(row, device, overrides) for row in names}
        result = {
            "command": command(parser, options),
            "machine": machine(device),
            "date": time.strftime("%Y-%m-%d"),
            "rounds": options.rounds,
            "rows": measure(steppers, options.rounds),
        }
        write_json(options.out, result)
    for row, times in result["rows"].items():
        print(
            f"{row:36}{times['ms']:10.2f} ms per 64 images, {times['to_usc']:.3f} of usc; with "
            f"the backbone frozen {times['frozen_to_usc']:.3f}"
        )
    print(f"medians of {options.rounds} rounds; {result['machine']}")


if __name__ == "__main__":
    main()
