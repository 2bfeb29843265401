"""Pre-trains a compact backbone: what class an image has, and which two crops are of one image.

    python -m benchmarks.pretraining --data mini_imagenet --out weights/mini.pt

Trained to classify alone, a small network makes all images of a class alike, and loses what would
tell other classes apart. The loss here is the first of these and half of the second:

    classification   cross-entropy of 16 x cosines, of images that are mixed with others: mixup
                     (arXiv:1710.09412) and CutMix (arXiv:1905.04899), in turns
    instances        InfoNCE of two crops of each image among those of its batch, mixed in the same
                     way, with temperature 0.2 and a head of its own (arXiv:2002.05709)

The file holds the backbone in half precision, for --init. An interrupted run resumes from the file
OUT.state; batches are functions of the step.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import pretrained
import udon
from benchmarks.shared import output, positive
from model import SIZES, CosineClassifier, Head, ViT

SCALE, TEMPERATURE, INSTANCES = 16.0, 0.2, 0.5  # of cosines; of InfoNCE; its weight
AREA, RATIO, JITTER, GREY = 0.25, 4 / 3, 0.4, 0.2  # of crops and colours
WARMUP, WEIGHT_DECAY, NORM = 300, 0.05, 1.0
SAVE_EVERY = 1000  # steps

# Images -------------------------------------------------------------------------------------------


def crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """One crop of each image, flipped and changed in colour at random, in [-1, 1].

    images: (B, 3, H, W) uint8 -> (B, 3, H, W) float32.
    """

    def random(low, high):
        return torch.empty(len(images)).uniform_(low, high, generator=generator)

    area, ratio = random(AREA, 1), random(-math.log(RATIO), math.log(RATIO)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    places = torch.zeros(len(images), 2, 3)
    places[:, 0, 0] = width * random(-1, 1).sign()
    places[:, 1, 1] = height
    places[:, 0, 2] = random(-1, 1) * (1 - width)
    places[:, 1, 2] = random(-1, 1) * (1 - height)
    grid = F.affine_grid(places, images.shape, align_corners=False)
    pixels = images.float() / 255
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)

    brightness, contrast, saturation = (
        random(1 - JITTER, 1 + JITTER).view(-1, 1, 1, 1) for _ in range(3)
    )
    grey = (random(0, 1) >= GREY).view(-1, 1, 1, 1)
    pixels = pixels * brightness
    pixels = pixels.mean((1, 2, 3), keepdim=True).lerp(pixels, contrast)
    pixels = pixels.mean(1, keepdim=True).lerp(pixels, saturation * grey)
    return pixels.clamp(0, 1) * 2 - 1


def mixing(
    step: int, count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, float, int]:
    """How a batch of `count` images of `size` pixels is mixed -> (the partner of each (B,), the
    share that stays of an image itself, the side of the pasted square or 0 for mixup)."""
    partners = torch.randperm(count, generator=generator)
    concentration = 1.0 if step % 2 else 0.2  # of CutMix and mixup, as published
    share = float(np.random.default_rng(step).beta(concentration, concentration))
    if not step % 2:
        return partners, share, 0
    side = round(size * math.sqrt(1 - share))
    return partners, 1 - (side / size) ** 2, side


def mixed(
    images: Tensor, partners: Tensor, share: float, side: int, generator: torch.Generator
) -> Tensor:
    """Images (B, 3, H, W) mixed with those of their partners, as `mixing` says."""
    if not side:
        return images[partners].lerp(images, share)
    top, left = torch.randint(images.shape[-1] - side + 1, (2,), generator=generator).tolist()
    place = ..., slice(top, top + side), slice(left, left + side)
    images, others = images.clone(), images[partners]
    images[place] = others[place]
    return images


# Training -----------------------------------------------------------------------------------------


class Network(nn.Module):
    """A backbone with a head for each loss."""

    def __init__(self, backbone: ViT, classes: int) -> None:
        super().__init__()
        width = backbone.width
        self.backbone = backbone
        self.classifier = nn.Sequential(Head(width, width), CosineClassifier(width, classes))
        self.projector = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 64))

    def losses(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Of images (B, 3, H, W) uint8 with labels (B,): classification and instances."""
        generator = torch.Generator().manual_seed(step)
        mix = mixing(step, len(images), images.shape[-1], generator)
        views = [mixed(crops(images, generator), *mix, generator) for _ in range(2)]
        embeddings = self.backbone(torch.cat(views))  # (2 B, D)

        partners, share, _ = mix
        targets = F.one_hot(labels, self.classifier[1].out_features).float()
        targets = targets[partners].lerp(targets, share).repeat(2, 1)
        classification = F.cross_entropy(SCALE * self.classifier(embeddings), targets)

        one, other = F.normalize(self.projector(embeddings), dim=1).chunk(2)
        cosines, own = one @ other.T / TEMPERATURE, torch.arange(len(one))
        instances = (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2
        return classification, instances


def optimizer_of(network: nn.Module, rate: float) -> torch.optim.AdamW:
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True)


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate: a linear start, then a half cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1)))


def train(options: argparse.Namespace) -> None:
    benchmark = data.Benchmark(str(options.data))
    split = data.together([benchmark.split(domain, "train") for domain in benchmark.domains])
    count = options.batch_size
    steps, whole = int(options.epochs * len(split)) // count, len(split) // count
    if not (steps and whole):
        raise data.InputError(
            f"--data {options.data} has {len(split)} training images, too few for a batch of "
            f"{count}: give a smaller --batch-size, or more --epochs"
        )
    torch.manual_seed(0)
    backbone = ViT(**SIZES[options.model])
    preprocessing = pretrained.HALF
    if options.init != "scratch":
        preprocessing = pretrained.load(backbone, options.init)
    if preprocessing != pretrained.HALF:
        raise data.InputError(f"--init {options.init} is not a compact backbone: give one")
    network = Network(backbone, split.num_classes).train()
    optimizer = optimizer_of(network, options.rate)
    labels = torch.from_numpy(split.classes).long()
    names = ("model", "init", "epochs", "batch_size", "rate")
    settings = {name: getattr(options, name) for name in names} | {"images": split.digest()}
    state, first = Path(f"{options.out}.state"), 0
    if state.exists():
        first = resume(state, settings, network, optimizer)
        print(f"resumed at step {first:,} of {steps:,}", flush=True)
    images = data.TestImages(split, backbone.architecture["image_size"], keep=True)
    sums, started = [], time.process_time()
    for step in range(first, steps):
        epoch, place = divmod(step, whole)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(epoch))
        rows = order[place * count : (place + 1) * count]
        losses = network.losses(images[rows.numpy()], labels[rows], step)
        optimizer.zero_grad()
        (losses[0] + INSTANCES * losses[1]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), NORM)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_at(step, steps)
        optimizer.step()
        sums.append(torch.stack(losses).detach())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            classification, instances = torch.stack(sums).mean(0).tolist()
            print(
                f"step {step + 1:,} of {steps:,}   classification {classification:.3f}   "
                f"instances {instances:.3f}   CPU {time.process_time() - started:.0f} s",
                flush=True,
            )
            sums.clear()
            content = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            write(content | {"step": step + 1, "settings": settings}, state)
    weights = {f"backbone.{key}": value.half() for key, value in backbone.state_dict().items()}
    contents = {"model": weights, "architecture": {"backbone": backbone.architecture}}
    contents["preprocessing"] = preprocessing._asdict() | {"antialias": True}
    write(contents, options.out)
    state.unlink()


def resume(state: Path, settings: dict, network: nn.Module, optimizer) -> int:
    """Continues from the file of an interrupted run -> its step. Raises data.InputError if the file
    is damaged, or that run had other settings."""
    try:
        saved = torch.load(state, weights_only=True)
    except Exception:  # zip, pickle and torch share no class of errors
        raise data.InputError(f"{state} is damaged: delete it to start again") from None
    if other := [name for name in settings if settings[name] != saved["settings"][name]]:
        raise data.InputError(
            f"{state} is of a run with other {' and '.join(other)}: delete it, or change --out"
        )
    network.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def write(content: dict, path: Path) -> None:
    """Saves a file whole or not at all."""
    with checkpoint.replacing(path) as partial, open(partial, "wb") as file:
        checkpoint.write_archive(content, file)


# Command line -------------------------------------------------------------------------------------


def positive_number(text: str) -> float:
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0: give one")


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Pre-trains a compact backbone on labelled images.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data directory")
    parser.add_argument("--out", type=output, required=True, metavar="FILE", help="to write")
    parser.add_argument(
        "--model", choices=("mini", "micro"), default="mini", help="(default: mini)"
    )
    parser.add_argument("--init", default="scratch", help="weights, or scratch (default)")
    parser.add_argument("--epochs", type=positive_number, default=64.0, help="(default: 64)")
    parser.add_argument("--batch-size", type=positive, default=64, help="(default: 64)")
    parser.add_argument("--rate", type=positive_number, default=1e-3, help="(default: 1e-3)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences(udon.USER_ERRORS):
        train(options)


if __name__ == "__main__":
    main()
