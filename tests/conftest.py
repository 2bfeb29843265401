"""Shared fixtures: a small data directory in each layout, and real images where present."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import udon

settings.register_profile("udon", deadline=None)  # no test depends on the speed of the machine
settings.load_profile("udon")

# Real images beside the project; never part of it.
MINI_UNED = Path(__file__).parents[2] / "shared" / "mini_uned"

torch.set_num_threads(1)  # these sizes gain nothing from more, and suffer on a busy machine


def picture(rng, hue, width=24, height=20):
    """A noisy image of one colour: classes are easy to tell apart, no two images are equal."""
    pixels = np.full((height, width, 3), 40.0) + rng.normal(0, 20, (height, width, 3))
    pixels[..., hue % 3] += 60 * (1 + hue // 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_uned(root, domains=("birds", "cars"), classes=4, images=5, lists=True):
    """A directory in the UnED layout. With `lists`, the test split of `cars` has an index split of
    its own, and queries of several classes."""
    rng = np.random.default_rng(0)
    for number, domain in enumerate(domains):
        manifests = root / "info_files" / domain
        manifests.mkdir(parents=True)
        for order, split in enumerate(("train", "val", "test")):
            labels = range(order * classes, (order + 1) * classes)
            folder = root / "images" / domain / split
            folder.mkdir(parents=True)
            entries = []
            for label in labels:
                for i in range(images):
                    picture(rng, label + number).save(folder / f"{label}_{i}.png")
                    path = f"{domain}/{split}/{label}_{i}.png"
                    entries.append({"path": path, "class_id": label})
            if domain == "cars" and split == "test" and lists:
                (manifests / "index.json").write_text(json.dumps(entries[1::2]))
                entries = [{**e, "class_id": [e["class_id"], 99]} for e in entries[::2]]
            (manifests / f"{split}.json").write_text(json.dumps(entries))
    return root


@pytest.fixture(scope="session")
def uned(tmp_path_factory):
    return write_uned(tmp_path_factory.mktemp("uned"))


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(1)
    for domain in ("plants", "tools"):
        for label in range(7):
            folder = root / domain / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(4):
                picture(rng, label).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def student_run(class_folders, tmp_path_factory):
    """The directory of a short run on class folders."""
    out = tmp_path_factory.mktemp("student") / "run"
    options = {"image_size": 32, "batch_size": 4, "steps": 3, "period": 8, "device": "cpu"}
    config = udon.Config(
        preset="micro", method="udon-joint", data=str(class_folders), out=str(out), **options
    )
    udon.train(config)
    return out


@pytest.fixture
def mini_uned():
    if not MINI_UNED.is_dir():
        pytest.skip(f"no real images: {MINI_UNED.parent.name}/{MINI_UNED.name} beside the project")
    return MINI_UNED
