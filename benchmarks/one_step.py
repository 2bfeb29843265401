"""One training step of the published method, in shapes and numbers.

    python -m benchmarks.one_step --out results/one_step.json --table results/README.md

measure()       the first step of `python udon.py train`, on one of its domains -> plain values
table(values)   the same as text
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import udon
from benchmarks import shared, tables

RESULTS = Path(__file__).resolve().parents[1] / "results"
DOMAIN = "shape"
LOSSES = udon.Losses._fields[1:]
PARTS = {  # the columns of the gradient table in udon.py
    "backbone": "backbone.",
    "student head": "student_head.",
    "student classifier": f"student_classifiers.{DOMAIN}.",
    "teacher head": f"teacher_heads.{DOMAIN}.",
    "teacher classifier": f"teacher_classifiers.{DOMAIN}.",
}


def measure() -> dict:
    """Shapes, values and gradient norms of the first step; the backbone is trained at once."""
    config = udon.Config(preset="mini", out="runs/one-step", device="cpu", frozen_epochs=0.0)
    benchmark = data.Benchmark(domains=[DOMAIN])
    splits = {DOMAIN: benchmark.split(DOMAIN, "train")}
    run = udon.build_run(config, splits)
    run.model.train()
    batches = data.TrainBatches(splits, config.image_size, config.batch_size, config.seed)
    pixels, labels = batches[0, DOMAIN]
    images = data.normalise(pixels, run.preprocessing["mean"], run.preprocessing["std"])
    outputs = run.model(images, DOMAIN)
    losses = udon.compute_losses(run.model, images, labels, DOMAIN)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    gradients = {loss: gradient_norms(run.model, images, labels, loss) for loss in LOSSES}
    udon.training_step(run, iter([(DOMAIN, pixels, labels)]))
    moved = {
        part: norm(p - before[name] for name, p in run.model.named_parameters() if prefix in name)
        for part, prefix in PARTS.items()
    }
    return {
        "classes": splits[DOMAIN].num_classes,
        "tensors": tensors(pixels, outputs, labels),
        "losses": {name: value.item() for name, value in losses._asdict().items()},
        "gradients": gradients,
        "moved": moved,
        "machine": shared.machine("cpu"),
    }


def tensors(pixels: Tensor, outputs: udon.Losses, labels: Tensor) -> dict:
    """{name: [shape, what it holds]}"""
    found = {"images": [pixels.shape, f"uint8, {pixels.min()} to {pixels.max()}"]}
    for name in ("backbone", "student", "teacher"):
        rows = getattr(outputs, name)
        pairs = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
        found[name] = [rows.shape, f"unit rows; cosine of two images {spread(pairs)}"]
    for name in ("student_cosines", "teacher_cosines"):
        cosines = getattr(outputs, name)
        true = cosines.gather(1, labels[:, None])
        found[name] = [cosines.shape, f"all {spread(cosines)}; true class {spread(true)}"]
    return {name: [list(shape), text] for name, (shape, text) in found.items()}


def spread(values: Tensor) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.2f} ± {values.std():.2f}"


def gradient_norms(model, images, labels, loss: str) -> dict[str, float]:
    """{part of the model: norm of the gradient of one loss, as it is weighted in the total}"""
    weights = tuple(float(name == loss) for name in LOSSES)
    model.zero_grad()
    losses = udon.compute_losses(model, images, labels, DOMAIN, weights=weights)
    (losses.total / len(LOSSES)).backward()
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {
        part: norm(gradient for name, gradient in named if prefix in name)
        for part, prefix in PARTS.items()
    }


def norm(tensors_) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors_))


def table(values: dict) -> str:
    """Tensors, losses with the gradients that they send to each part, and the step of AdamW."""
    rows = [
        [f"`{name}`", " x ".join(map(str, shape)), text]
        for name, (shape, text) in values["tensors"].items()
    ]
    parts = tables.markdown(["tensor", "shape", "values"], rows)
    losses = [
        [f"`{name}`", f"{values['losses'][name]:.3f}"]
        + [f"{size:.4f}" if size else "" for size in values["gradients"][name].values()]
        for name in LOSSES
    ]
    losses.append(
        ["after AdamW: change of the weights", ""]
        + [f"{size:.4f}" for size in values["moved"].values()]
    )
    heading = ["loss", "value", *(f"gradient, {part}" for part in PARTS)]
    total = values["losses"]["total"]
    return (
        f"{parts}\n\nThe total, the mean of the four losses, is {total:.3f}. With "
        f"{values['classes']} classes, a classifier that knows nothing has a classification loss "
        f"of about ln {values['classes']} = {math.log(values['classes']):.2f}.\n\n"
        f"{tables.markdown(heading, losses)}\n"
    )


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Writes one training step in shapes and numbers.")
    parser.add_argument("--out", type=shared.output, default=RESULTS / "one_step.json")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="file with the lines <!-- one step --> and <!-- end of one step -->",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences((checkpoint.CheckpointError,)):
        values = measure()
        checkpoint.write_json(options.out, values)
        if options.table:
            tables.write(options.table, "one step", lambda: table(values))
        print(json.dumps(values["losses"]))


if __name__ == "__main__":
    main()
