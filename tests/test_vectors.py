"""vectors.py: files of embeddings, found by the images' files; damaged and incomplete ones."""

import os

import numpy as np
import pytest

import data
from vectors import FileVectors

IMAGES = 20  # of the test split of birds


@pytest.fixture
def birds(uned):
    return data.Benchmark(uned).split("birds", "test")


def write(path, vectors, paths):
    np.savez(path, vectors=vectors, paths=np.array(paths))
    return path


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_vectors_are_found_by_file(uned, birds, tmp_path, kind):
    """In any order, beside others, absolute or relative, through links and other spellings."""
    order = np.random.default_rng(0).permutation(IMAGES)
    numbers = np.arange(IMAGES, dtype=kind)[:, None] * [1, -1]
    paths = [birds.paths[row] for row in order]
    paths[0] = birds.path(order[0])
    paths[1] = f"./{paths[1]}".replace("birds/", "birds//../birds/")
    link = tmp_path / "link.png"
    link.symlink_to(birds.path(order[2]))
    paths[2] = str(link)
    paths += ["birds/train/0_0.png", "not/there.png"]
    vectors = np.concatenate([numbers[order], np.full((2, 2), 99, dtype=kind)]).astype(kind)
    file = FileVectors(write(tmp_path / "file.npz", vectors, paths), uned / "images")
    assert file.of(birds).tolist() == numbers.tolist()
    assert file.used.tolist() == [True] * IMAGES + [False] * 2


def test_paths_may_be_bytes_that_cannot_be_decoded(birds, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    with open(birds.path(0), "rb") as source, open(name, "wb") as target:
        target.write(source.read())
    split = data.Split("a", "test", [1], paths=[os.fsdecode(name)], folder="")
    for paths in ([name], [os.fsdecode(name)]):
        path = write(tmp_path / "file.npz", np.ones((1, 3)), paths)
        assert FileVectors(path, tmp_path).of(split).tolist() == [[1, 1, 1]]


def arrays(change, birds):
    """The arrays of a file that is damaged by a change."""
    vectors, paths = np.ones((IMAGES, 3)), list(birds.paths)
    if change == "missing":
        return {"vectors": vectors[3:], "paths": paths[3:]}
    if change == "none of them":
        return {"vectors": vectors, "paths": [f"{i}.png" for i in range(IMAGES)]}
    if change == "twice":
        return {"vectors": vectors, "paths": [*paths[1:], f"./{paths[1]}"]}
    if change == "not finite":
        vectors[4, 1] = np.nan
        return {"vectors": vectors, "paths": paths}
    return {
        "whole numbers": {"vectors": vectors.astype(int), "paths": paths},
        "another number": {"vectors": vectors[1:], "paths": paths},
        "one row": {"vectors": vectors[0], "paths": paths},
        "empty": {"vectors": vectors[:0], "paths": np.array([], dtype=str)},
        "no paths": {"vectors": vectors},
        "objects": {"vectors": vectors, "paths": np.array([{}] * IMAGES, dtype=object)},
        "numbers as paths": {"vectors": vectors, "paths": np.arange(IMAGES)},
    }[change]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("missing", "lacks 3 of the 20 images of domain birds, split test, such as .*8_0.png"),
        ("none of them", "lacks 20 of the 20 images"),
        ("twice", "names .*8_1.png twice"),
        ("not finite", "has values for .*8_4.png that are not finite"),
        ("whole numbers", r"shape \(20, 3\), int64"),
        ("another number", r"shape \(19, 3\) and paths of shape \(20,\)"),
        ("one row", r"shape \(3,\)"),
        ("empty", r"shape \(0, 3\)"),
        ("no paths", "does not hold the arrays"),
        ("objects", "does not hold the arrays"),
        ("numbers as paths", "paths of type int64"),
    ],
)
def test_files_that_cannot_be_used(uned, birds, tmp_path, change, sentence):
    np.savez(tmp_path / "file.npz", **arrays(change, birds))
    with pytest.raises(data.InputError, match=f"file .*file.npz .*{sentence}"):
        FileVectors(tmp_path / "file.npz", uned / "images").of(birds)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", None])
def test_files_that_are_no_archive(birds, tmp_path, content):
    path = tmp_path / "file.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.InputError, match="file .*file.npz .*give a file of numpy.savez"):
        FileVectors(path, tmp_path)
    np.save(tmp_path / "file.npy", np.ones((2, 2)))
    with pytest.raises(data.InputError, match="does not hold the arrays"):
        FileVectors(tmp_path / "file.npy", tmp_path)
    whole = write(tmp_path / "whole.npz", np.ones((IMAGES, 3)), list(birds.paths)).read_bytes()
    for size in (30, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(data.InputError, match="give a file of numpy.savez"):
            FileVectors(path, tmp_path)
