"""procedural.py: splits, class counts, and renderings that depend on nothing but their names."""

import numpy as np
import pytest

import procedural

IMAGES_OF_A_CLASS = {"val": 24, "test": 8}


@pytest.mark.parametrize("domain", procedural.DOMAINS)
def test_splits(domain):
    splits = {split: procedural.render(domain, split) for split in ("train", "val", "test")}
    classes = [set(labels.tolist()) for _, labels in splits.values()]
    assert len(set.union(*classes)) == sum(map(len, classes)), "a class is in two splits"
    for split, number in IMAGES_OF_A_CLASS.items():
        assert (np.unique(splits[split][1], return_counts=True)[1] == number).all()
    pixels, labels = splits["test"]
    assert pixels.shape == (len(labels), 64, 64, 3) and pixels.dtype == np.uint8
    assert labels.dtype == np.int32
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) == len(pixels), "equal images"


def test_domains_differ_in_size_and_one_is_long_tailed():
    assert len(procedural.DOMAINS) == 8 and list(procedural.DOMAINS) == sorted(procedural.DOMAINS)
    assert len({domain.classes[0] for domain in procedural.DOMAINS.values()}) > 4
    counts = np.unique(procedural.render("symbols", "train")[1], return_counts=True)[1]
    assert counts.max() >= 10 * np.median(counts), counts


def test_images_depend_on_the_names_alone():
    np.random.seed(1)
    pixels, labels = procedural.render("shape", "val")
    np.random.seed(2)
    again = procedural.render("shape", "val")
    assert (pixels == again[0]).all() and (labels == again[1]).all()


@pytest.mark.parametrize("domain", procedural.DOMAINS)
def test_classes_are_different_pictures(domain):
    """Two classes drawn from the same random stream are not the same picture."""
    make_classes, draw, counts, _ = procedural.DOMAINS[domain]
    classes = make_classes(np.random.default_rng(0), sum(counts))
    assert len(classes) == sum(counts)
    drawn = {draw(np.random.default_rng(5), description).tobytes() for description in classes}
    assert len(drawn) == len(classes), f"{len(classes) - len(drawn)} classes look like another"


@pytest.mark.parametrize("names", [("whales", "train"), ("shape", "index")])
def test_unknown_names(names):
    with pytest.raises(ValueError, match=f"'({names[0]}|{names[1]})'"):
        procedural.render(*names)
