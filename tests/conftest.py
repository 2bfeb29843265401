"""What several test files need: a small data folder in each layout, and where the shared real images are if they are there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

MINI_UNED = (
    Path(__file__).parents[2] / "shared" / "mini_uned"
)  # real images, beside the project; never in it

torch.set_num_threads(
    1
)  # these sizes gain nothing from a second thread, and suffer from a busy machine


def picture(rng, hue, width=24, height=20):
    """A noisy picture of one colour: classes can be told apart, images are all different."""
    pixels = np.full((height, width, 3), 40.0) + rng.normal(0, 20, (height, width, 3))
    pixels[..., hue % 3] += 60 * (1 + hue // 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_uned(root, domains=("birds", "cars"), classes=4, images=5, lists=True):
    """A folder in the UnED layout; `cars` has a separate index split for test, and queries with several classes."""
    rng = np.random.default_rng(0)
    for number, domain in enumerate(domains):
        first = 0
        for split in ("train", "val", "test"):
            entries = []
            for label in range(first, first + classes):
                for i in range(images):
                    path = f"{domain}/{split}/{label}_{i}.png"
                    (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                    picture(rng, label + number).save(root / "images" / path)
                    entries.append({"path": path, "class_id": label})
            first += classes
            manifest = root / "info_files" / domain / f"{split}.json"
            manifest.parent.mkdir(parents=True, exist_ok=True)
            if domain == "cars" and split == "test" and lists:
                manifest.with_name("index.json").write_text(json.dumps(entries[1::2]))
                entries = [{**e, "class_id": [e["class_id"], 99]} for e in entries[::2]]
            manifest.write_text(json.dumps(entries))
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
            (root / domain / f"class {label}").mkdir(parents=True)
            for i in range(4):
                picture(rng, label).save(root / domain / f"class {label}" / f"{i}.jpg")
    return root


@pytest.fixture
def mini_uned():
    if not MINI_UNED.is_dir():
        pytest.skip(
            f"the real images are not here: {MINI_UNED.parent.name}/{MINI_UNED.name} beside the project"
        )
    return MINI_UNED
