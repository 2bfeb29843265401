"""What a training step of each system costs beside one of `usc`: the rows of the ablation, with backbone trained and frozen.

    python benchmarks/step_overhead.py                 # all rows, `mini`; writes results/step_times.json, for the tables' times
    python benchmarks/step_overhead.py --rows udon --model s16 --image-size 224 --batch-size 8 --out results/step_overhead.json

All run in one process, step by step in turn, so that a change of the machine's speed meets all; ratios are taken round by round.
A step is all of udon.training_step but the loading of images: normalisation, forward, losses, backward, AdamW, sampler; of a
student that is distilled, its frozen teacher's forward too. Time is processor time; on a GPU, time.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ablation  # noqa: E402
from shared import machine, output, positive  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import udon  # noqa: E402
from sampler import DomainSampler  # noqa: E402

CLASSES = {
    f"domain{i}": count for i, count in enumerate((61, 118, 60, 49, 185, 973, 145, 59))
}  # as in eight real domains
ROWS = [row for row in ablation.ROWS if row != "backbone"]  # which trains nothing


def stepper(row, options):
    """A function: frozen -> milliseconds of one more training step of a row, the backbone trained or frozen, for 64 images."""
    asked = {
        name: getattr(options, name)
        for name in ("model", "image_size", "batch_size")
        if getattr(options, name)
    }
    config = ablation.config_of(row, device=options.device, **asked)
    model, _, preprocessing = udon.build_model(config, CLASSES)
    model.to(options.device).train()
    teachers = None
    if of := ablation.ROWS[row][2]:
        teacher = (
            udon.build_model(ablation.config_of(of, **asked), CLASSES)[0].to(options.device).eval()
        )
        teachers = object.__new__(udon.FrozenTeachers)  # without files to read
        teachers.models = dict.fromkeys(CLASSES, teacher)
    runs = {
        frozen: udon.Run(10**6, 1000, 10**6 * frozen, preprocessing, options.device, teachers)
        for frozen in (False, True)
    }
    optimizer, sampler = (
        udon.build_optimizer(model, config),
        DomainSampler(CLASSES, period=len(CLASSES)),
    )
    size, count = config.image_size or udon.SIZES[config.model]["image_size"], config.batch_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = {domain: torch.randint(0, classes, (count,)) for domain, classes in CLASSES.items()}
    stream = ((domain, images, labels[domain]) for domain in iter(sampler.draw, None))
    clock, steps = (
        time.perf_counter if options.device.startswith("cuda") else time.process_time,
        iter(range(10**6)),
    )

    def step(frozen):
        started = clock()
        udon.training_step(next(steps), model, stream, sampler, optimizer, config, runs[frozen])
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return 1e3 * (clock() - started) * 64 / count

    return step


def main():
    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=ROWS,
        metavar="ROW",
        help="besides usc-rr (default: all)",
    )
    parser.add_argument(
        "--model", choices=udon.SIZES, help="(default: the row's, mini if it says none)"
    )
    parser.add_argument("--image-size", type=positive, help="(default: the model's own)")
    parser.add_argument(
        "--batch-size", type=positive, help="(default: the row's, 64 if it says none)"
    )
    parser.add_argument("--rounds", type=positive, default=24)
    parser.add_argument("--device", default=evaluate.default_device())
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "step_times.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        evaluate.check_device(options.device)
        steppers = {
            row: stepper(row, options) for row in dict.fromkeys([ablation.BASELINE, *options.rows])
        }
    except data.InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    contenders = [(row, frozen) for row in steppers for frozen in (False, True)]
    taken = {contender: [] for contender in contenders}
    for turn in range(-2, options.rounds):  # two rounds to warm up; who goes first changes
        first = turn % len(contenders)
        for row, frozen in contenders[first:] + contenders[:first]:
            spent = steppers[row](frozen)
            if turn >= 0:
                taken[row, frozen].append(spent)

    def ratio(contender):
        pairs = zip(taken[contender], taken[ablation.BASELINE, False])
        return round(statistics.median(own / other for own, other in pairs), 4)

    given = [
        f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in vars(options).items()
        if value is not None and name not in ("device", "out") and value != parser.get_default(name)
    ]
    result = {
        "command": " ".join(["python benchmarks/step_overhead.py", *given]),
        "machine": machine(options.device),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "rows": {
            row: {
                "ms": round(statistics.median(taken[row, False]), 2),
                "to_usc": ratio((row, False)),
                "frozen_to_usc": ratio((row, True)),
            }
            for row in steppers
        },
    }
    evaluate.write_json(options.out, result)
    for row, measured in result["rows"].items():
        print(
            f"{row:24}{measured['ms']:10.2f} ms a step of 64 images, {measured['to_usc']:.3f} of usc's; with the backbone frozen "
            f"{measured['frozen_to_usc']:.3f}"
        )
    print(f"medians of {options.rounds} rounds; {result['machine']}")


if __name__ == "__main__":
    main()
