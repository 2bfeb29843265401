"""Images per second of opening and preparing JPEGs, beside the same without reduced decoding.

    python -m benchmarks.loader [--size 224] [--repetitions 20]

Pictures of 1,600 x 1,200 and 500 x 375 with the spectrum of photographs. One thread; CPU time, the
best of the repetitions, in which the systems take turns. Ours end with the uint8 pixels that the
loaders hand on, normalised later on the device; torchvision's, measured if it is installed, with
the usual ToTensor and Normalize.
Copy with: images, benchmarks.shared, torch, numpy, pillow.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import images
from benchmarks.shared import machine, positive

PICTURES = ((1600, 1200, 90), (1600, 1200, 75), (500, 375, 90))  # width, height, JPEG quality
FILES = 3  # of each size


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A random RGB picture whose amplitudes fall as 1 / frequency^1.2."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = rng.normal(size=(3, height, width)) + 1j * rng.normal(size=(3, height, width))
    levels = np.fft.ifft2(noise / frequency**1.2).real.transpose(1, 2, 0)
    levels = (levels - levels.min()) / (levels.max() - levels.min())
    return Image.fromarray((255 * levels).astype(np.uint8))


def systems(size: int) -> dict:
    """{name: function of a path -> (3, size, size), for training or evaluation}."""

    def system(prepare, needed):
        def run(path):
            image, box = images.open_reduced(path, needed)
            pixels = prepare(image, size, box=box)[:size, :size]
            return np.ascontiguousarray(pixels.transpose(2, 0, 1))

        return run

    return {
        "train, full scale": system(images.prepare_train, None),
        "train, as the loaders do": system(images.prepare_train, images.train_side(size)),
        "test, full scale": system(images.prepare_test, None),
        "test, as the loaders do": system(images.prepare_test, size),
        **torchvision_systems(size),
    }


def torchvision_systems(size: int) -> dict:
    """The same transforms by torchvision, if it is installed."""
    try:
        from torchvision import transforms
    except ImportError:
        return {}
    side = images.train_side(size)
    end = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    crop = [transforms.RandomCrop(size), transforms.RandomHorizontalFlip()]
    train = transforms.Compose([transforms.Resize((side, side)), *crop, *end])
    test = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), *end])

    def system(transform):
        return lambda path: transform(Image.open(path).convert("RGB"))

    return {"train, torchvision": system(train), "test, torchvision": system(test)}


def measure(functions: dict, paths: list[Path], repetitions: int) -> dict[str, float]:
    """{name: images per second}, each the best of the repetitions."""
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(repetitions):
        for name, function in functions.items():
            started = time.process_time()
            for path in paths:
                function(path)
            seconds[name] = min(seconds[name], time.process_time() - started)
    return {name: len(paths) / value for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=positive, default=224, help="(default: 224)")
    parser.add_argument("--repetitions", type=positive, default=20, help="(default: 20)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("cpu"))
    with tempfile.TemporaryDirectory() as directory:
        for width, height, quality in PICTURES:
            paths = [Path(directory, f"{width}_{number}.jpg") for number in range(FILES)]
            for number, path in enumerate(paths):
                photo(width, height, number).save(path, quality=quality)
            mean = sum(path.stat().st_size for path in paths) / FILES
            print(
                f"{width:,} x {height:,}, {mean / 1e3:,.0f} kB, at {options.size} pixels, images/s:"
            )
            rates = measure(systems(options.size), paths, options.repetitions)
            for name, rate in rates.items():
                base = rates[f"{name.split(',')[0]}, full scale"]
                print(f"  {name:30}{rate:8,.1f}   {rate / base:.2f} of full scale")


if __name__ == "__main__":
    main()
