"""Images per second of loaders with worker processes, beside torchvision's transforms.

    python -m benchmarks.loader                            # writes results/loader.json
    python -m benchmarks.loader --table results/README.md  # writes the table between its marks

Ours are data.TrainBatches and data.TestImages, which decode a JPEG at a reduced scale where that
suffices, and whose uint8 batches are normalised afterwards. torchvision's are the same transforms
with ToTensor and Normalize in a DataLoader of torch. Both read the same files, with the spectrum of
photographs, and end with normalised float32 batches. The loaders take turns, and a turn starts and
ends their processes; ratios are taken within a round, of wall time and of the CPU time of all
processes.
"""

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
import images
import timm_backbone
import udon
from benchmarks import shared, tables
from checkpoint import write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
PICTURES = ((1600, 1200, 90), (500, 375, 90))  # width, height, JPEG quality
FILES = 3  # of each size, which all are repeated
STATISTICS = (0.5,) * 3, (0.5,) * 3
PACKAGES = ("torch", "torchvision", "pillow", "numpy")

Loader = Callable[[], Iterator[torch.Tensor]]  # -> batches (B, 3, size, size) float32


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A random RGB picture whose amplitudes fall as 1 / frequency^1.2."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = rng.normal(size=(3, height, width)) + 1j * rng.normal(size=(3, height, width))
    levels = np.fft.ifft2(noise / frequency**1.2).real.transpose(1, 2, 0)
    levels = (levels - levels.min()) / (levels.max() - levels.min())
    return Image.fromarray((255 * levels).astype(np.uint8))


def ours(paths: list[Path], options: argparse.Namespace) -> dict[str, Loader]:
    """{"train", "test": loader}"""
    size, count, workers = options.size, options.batch_size, options.workers
    names, labels = [path.name for path in paths], np.zeros(len(paths), dtype=np.int32)
    split = data.Split("photos", "train", labels, paths=names, folder=paths[0].parent)
    keys = [(step, "photos") for step in range(len(paths) // count)]

    def train():
        batches = data.TrainBatches({"photos": split}, size, count, 0, keep=False)
        for _, (pixels, _) in data.loaded(batches, [keys], workers):
            yield images.normalise(pixels, *STATISTICS)

    def test():
        for pixels in data.TestImages(split, size).batches(count, workers):
            yield images.normalise(pixels, *STATISTICS)

    return {"train": train, "test": test}


class Files(Dataset):
    """Pictures as torchvision's datasets of folders open them."""

    def __init__(self, paths: list[Path], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def torchvisions(paths: list[Path], options: argparse.Namespace) -> dict[str, Loader]:
    """{"train", "test": loader}"""
    from torchvision import transforms

    size, side = options.size, images.train_side(options.size)
    end = [transforms.ToTensor(), transforms.Normalize(*STATISTICS)]
    crop = [transforms.RandomCrop(size), transforms.RandomHorizontalFlip()]
    steps = {
        "train": [transforms.Resize((side, side)), *crop, *end],
        "test": [transforms.Resize(size), transforms.CenterCrop(size), *end],
    }

    def loader(name):
        dataset = Files(paths, transforms.Compose(steps[name]))
        workers = {"num_workers": options.workers}
        return iter(DataLoader(dataset, options.batch_size, shuffle=name == "train", **workers))

    return {name: lambda name=name: loader(name) for name in steps}


def elapsed(loader: Loader, count: int) -> tuple[float, float]:
    """Seconds until all images are loaded and the processes have ended: wall time, CPU time."""

    def cpu():
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    started = time.perf_counter(), cpu()
    loaded = sum(len(batch) for batch in loader())
    assert loaded == count, (loaded, count)
    return time.perf_counter() - started[0], cpu() - started[1]


def measure(paths: list[Path], options: argparse.Namespace) -> dict[str, dict]:
    """{"train", "test": {"images_per_second": {contender: median}, "wall", "cpu": torchvision's
    time / ours, as of shared.spread}}"""
    loaders = {"ours": ours(paths, options), "torchvision": torchvisions(paths, options)}
    kinds = ("train", "test")
    times = {contender: [] for contender in itertools.product(kinds, loaders)}
    for turn, (kind, name) in itertools.product(range(-1, options.rounds), times):
        seconds = elapsed(loaders[name][kind], len(paths))
        if turn >= 0:  # the first warms up
            times[kind, name].append(seconds)

    def summary(kind):
        wall, cpu = zip(*(zip(*times[kind, name]) for name in loaders))
        medians = {name: statistics.median(x) for name, x in zip(loaders, wall)}
        return {
            "images_per_second": {name: round(len(paths) / x, 1) for name, x in medians.items()},
            "wall": shared.spread(wall[1], wall[0]),
            "cpu": shared.spread(cpu[1], cpu[0]),
        }

    return {kind: summary(kind) for kind in kinds}


def measured(options: argparse.Namespace) -> dict[str, dict]:
    """{"width x height": what `measure` returns}"""
    found = {}
    for width, height, quality in PICTURES:
        with tempfile.TemporaryDirectory() as directory:
            paths = [Path(directory, f"{number}.jpg") for number in range(options.images)]
            for number, path in enumerate(paths):
                if number < FILES:
                    photo(width, height, number).save(path, quality=quality)
                else:
                    path.write_bytes(paths[number % FILES].read_bytes())
            print(f"{width} x {height}, {paths[0].stat().st_size / 1e3:.0f} kB", flush=True)
            found[f"{width} x {height}"] = measure(paths, options)
    return found


def table(result: dict) -> str:
    """Images per second, and torchvision's times as multiples of ours: median (least to
    greatest)."""
    lines = [
        [picture, kind, *(f"{rate:,.0f}" for rate in row["images_per_second"].values())]
        + [shared.spread_text(row[name]) for name in ("wall", "cpu")]
        for picture, kinds in result["pictures"].items()
        for kind, row in kinds.items()
    ]
    heading = ["JPEG", "images for", "ours, images/s", "torchvision, images/s"]
    heading += ["torchvision's wall time / ours", "CPU time"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torchvision", "pillow"))
    return (
        f"{tables.markdown(heading, lines)}\n\n{result['rounds']} rounds; {result['machine']}, "
        f"{versions}; {result['date']}; `{result['command']}`.\n"
    )


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Measures loaders beside torchvision's transforms.")
    for name, default in (
        ("size", 224),
        ("images", 128),
        ("batch-size", 16),
        ("workers", 2),
        ("rounds", 8),
    ):
        options = {"type": shared.positive, "default": default, "help": f"(default: {default})"}
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--out", type=shared.output, default=RESULTS / "loader.json")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="writes the table of --out between <!-- loader --> and <!-- end of loader -->",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences(udon.USER_ERRORS):
        if options.table:
            keys = ("pictures", "rounds", "machine", "versions", "date", "command")
            result = shared.recorded(options.out, "loader", keys)
            return shared.fill(options.table, "loader", lambda: table(result))
        versions = shared.versions(PACKAGES, "interop")
        timm_backbone.import_torchvision()
        torch.set_num_threads(1)
        result = {
            "command": (
                f"python -m benchmarks.loader --size {options.size} --images {options.images} "
                f"--batch-size {options.batch_size} --workers {options.workers} "
                f"--rounds {options.rounds}"
            ),
            "machine": shared.machine("cpu"),
            "versions": versions,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": options.rounds,
            "pictures": measured(options),
        }
        write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
