"""Images per second of embedding, beside a plain loop over the same model of timm.

    python -m benchmarks.embedding                            # writes results/embedding.json
    python -m benchmarks.embedding --table results/README.md  # writes the table between its marks

Ours is evaluate.embed, as evaluate.py and the features of --freeze-backbone use it. timm's loop
normalises each batch and takes the CLS token of forward_features. Weights, images (uint8, in
memory) and batches are the same, and so are the outputs, within TOLERANCE. All run in one process
on one core, in turns. Times are CPU time, ratios are taken within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import timm_backbone
import udon
from benchmarks import shared, tables
from checkpoint import write_json
from model import SIZES, ViT

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = {"s16": "vit_small_patch16_224", "b16": "vit_base_patch16_224"}  # ours: timm's
STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
TOLERANCE = 1e-4  # absolute, on outputs of a LayerNorm
PACKAGES = ("torch", "timm", "numpy")


def contenders(name: str, count: int) -> dict[str, Callable[[], torch.Tensor]]:
    """{"ours", "timm": a function that embeds `count` random images -> (count, D)}"""
    import timm

    network = timm.create_model(MODELS[name], num_classes=0).eval()
    vit = ViT(**SIZES[name], activation="gelu").eval()
    vit.load_state_dict(network.state_dict())
    size = vit.architecture["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    split = data.Split("random", "test", np.zeros(count, dtype=np.int32), pixels=pixels)
    images = data.TestImages(split, size, keep=True)

    @torch.inference_mode()
    def plain():
        vectors = []
        for batch in torch.from_numpy(images.pixels).split(evaluate.EMBED_BATCH):
            inputs = data.normalise(batch, **STATISTICS)
            vectors.append(network.forward_features(inputs)[:, 0])
        return torch.cat(vectors)

    return {"ours": lambda: evaluate.embed(vit, images, STATISTICS, "cpu"), "timm": plain}


def measure(name: str, count: int, rounds: int) -> dict:
    """{"images_per_second": {contender: median}, "ratio": timm's time / ours, as of shared.spread,
    "difference": the largest of the outputs}"""
    functions = contenders(name, count)
    times = {contender: [] for contender in functions}
    for turn in range(-1, rounds):  # the first warms up
        outputs = {}
        for contender, function in functions.items():
            started = time.process_time()
            outputs[contender] = function()
            if turn >= 0:
                times[contender].append(time.process_time() - started)
        difference = (outputs["ours"] - outputs["timm"]).abs().max().item()
        assert difference < TOLERANCE, (name, difference)
        print(f"{name}, round {turn + 1} of {rounds}", flush=True)
    medians = {contender: statistics.median(seconds) for contender, seconds in times.items()}
    return {
        "images_per_second": {key: round(count / value, 2) for key, value in medians.items()},
        "ratio": shared.spread(times["timm"], times["ours"]),
        "difference": difference,
    }


def table(result: dict) -> str:
    """Images per second, and timm's time as a multiple of ours: median (least to greatest)."""
    lines = [
        [f"`{name}`", *(f"{rate:.1f}" for rate in row["images_per_second"].values())]
        + [shared.spread_text(row["ratio"]), f"{row['difference']:.0e}"]
        for name, row in result["models"].items()
    ]
    heading = ["model", "ours, images/s", "timm, images/s", "timm's time / ours", "outputs differ"]
    return (
        f"{tables.markdown(heading, lines)}\n\n{result['rounds']} rounds; {result['machine']}, "
        f"timm {result['versions']['timm']}; {result['date']}; `{result['command']}`.\n"
    )


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Measures embedding beside a plain loop over timm's model.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--images", type=shared.positive, default=32, help="(default: 32)")
    parser.add_argument("--rounds", type=shared.positive, default=8, help="(default: 8)")
    parser.add_argument("--core", type=shared.natural, help="(default: the last)")
    parser.add_argument("--out", type=shared.output, default=RESULTS / "embedding.json")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="writes the table of --out between <!-- embedding --> and <!-- end of embedding -->",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences(udon.USER_ERRORS):
        if options.table:
            keys = ("models", "rounds", "machine", "versions", "date", "command")
            result = shared.recorded(options.out, "embedding", keys)
            return shared.fill(options.table, "embedding", lambda: table(result))
        versions = shared.versions(PACKAGES, "interop")
        timm_backbone.import_torchvision()
        shared.pin(options.core)
        torch.manual_seed(0)
        result = {
            "command": (
                f"python -m benchmarks.embedding --models {' '.join(options.models)} "
                f"--images {options.images} --rounds {options.rounds}"
            ),
            "machine": shared.machine("cpu"),
            "versions": versions,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": options.rounds,
            "models": {
                name: measure(name, options.images, options.rounds) for name in options.models
            },
        }
        write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
