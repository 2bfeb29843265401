"""folders.py: layouts, manifests, class folders, ignored files, and files under several names."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import write_uned
from PIL import Image

import data


def manifest(root, domain="birds", split="train"):
    return root / "info_files" / domain / f"{split}.json"


def change(root, edit, domain="birds", split="train"):
    """Rewrites a manifest: `edit` changes its entries in place, or returns new ones or a text."""
    file = manifest(root, domain, split)
    entries = json.loads(file.read_text())
    result = edit(entries)
    entries = entries if result is None else result
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))


def write_images(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (4, 4), (number % 256, number // 256, 0))
        image.save(root / path, format="PNG")


def sizes(benchmark, domain="d"):
    return {name: len(benchmark.split(domain, name)) for name in ("train", "val", "test")}


# The UnED layout ----------------------------------------------------------------------------------


def test_uned_layout(uned):
    benchmark = data.Benchmark(uned)
    assert benchmark.domains == ("birds", "cars")
    train = benchmark.split("birds", "train")
    assert (len(train), train.num_classes) == (20, 4) and train.labels.dtype == np.int32
    assert train.image(7).mode == "RGB" and train.image(7).size == (24, 20)
    assert train.paths[7] == "birds/train/1_2.png" and train.paths[-1] == "birds/train/3_4.png"
    queries = benchmark.split("cars", "test")
    assert queries.labels[0] == (8, 99) and len(queries) == 10
    assert [benchmark.index_name(d, s) for d in benchmark.domains for s in ("val", "test")] == [
        "val",
        "test",
        "val",
        "index",
    ]


def test_small_index_serves_val(tmp_path):
    root = write_uned(tmp_path)
    folder = root / "info_files" / "birds"
    (folder / "small_index.json").write_text((folder / "val.json").read_text())
    benchmark = data.Benchmark(root)
    assert (benchmark.index_name("birds", "val"), benchmark.index_name("birds", "test")) == (
        "small_index",
        "test",
    )
    assert len(benchmark.split("birds", "small_index")) == 20


def test_labels_are_renumbered_for_the_classifier(tmp_path):
    root = write_uned(tmp_path)
    file = root / "info_files" / "birds" / "train.json"
    entries = json.loads(file.read_text())
    for entry in entries:
        entry["class_id"] = {0: 900, 1: 7, 2: 2**31 - 1, 3: 8}[entry["class_id"]]
    file.write_text(json.dumps(entries))
    split = data.Benchmark(root).split("birds", "train")
    assert split.num_classes == 4 and split.labels[0] == 900
    assert split.classes[[0, 5, 10, 15]].tolist() == [2, 0, 3, 1]  # in the order of the ids


def test_class_folders_are_cut_without_overlap(class_folders):
    benchmark = data.Benchmark(class_folders)
    for domain in benchmark.domains:
        labels = {
            name: set(benchmark.split(domain, name).labels.tolist())
            for name in ("train", "val", "test")
        }
        assert {name: len(ids) for name, ids in labels.items()} == {"train": 4, "val": 1, "test": 2}
        assert len(set.union(*labels.values())) == 7, "each class is in exactly one split"
    assert len(data.Benchmark(class_folders).split("tools", "train")) == 16


def test_escaped_names_are_found(tmp_path):
    root = write_uned(tmp_path)
    file = root / "info_files" / "birds" / "train.json"
    entries = json.loads(file.read_text())
    (root / "images" / entries[0]["path"]).rename(root / "images" / "birds" / "caf#U00e9#U4e2d.png")
    entries[0]["path"] = "birds/caf\u00e9\u4e2d.png"
    file.write_text(json.dumps(entries))
    assert data.Benchmark(root).split("birds", "train").image(0).size == (24, 20)


def test_windows_manifests_are_read(tmp_path):
    """A byte order mark, and backslashes in paths."""
    root = write_uned(tmp_path)
    change(root, lambda e: [{**x, "path": x["path"].replace("/", "\\")} for x in e])
    text = manifest(root).read_text()
    manifest(root).write_text("\ufeff" + text, encoding="utf-8")
    split = data.Benchmark(root).split("birds", "train")
    assert len(split) == 20 and split.image(3).size == (24, 20)


BAD_MANIFESTS = {
    "not JSON": (lambda e: "[{", "not JSON"),
    "nested without end": (lambda e: "[" * 100_000, "not JSON"),
    "empty": (lambda e: [], "no list of images"),
    "an object": (lambda e: {"a": 1}, "no list of images"),
    "no path": (lambda e: e.__setitem__(2, {"class_id": 1}), "entry 2"),
    "a number for a path": (lambda e: e[2].update(path=5), "entry 2"),
    "no class": (lambda e: e.__setitem__(4, {"path": "a.png"}), "entry 4"),
    "a class in words": (lambda e: e[4].update(class_id="cat"), "cat"),
    "a negative class": (lambda e: e[4].update(class_id=-1), "-1"),
    "true for a class": (lambda e: e[4].update(class_id=True), "True"),
    "half a surrogate pair": (lambda e: e[3].update(path="a\ud800.png"), "entry 3"),
    "a zero byte": (lambda e: e[3].update(path="a\0.png"), "entry 3"),
    "not a number": (lambda e: e[4].update(class_id=float("nan")), "nan"),
    "a huge class": (lambda e: e[4].update(class_id=2**31), "2147483648"),
    "a number of 9,999 digits": (lambda e: '[{"class_id": ' + "9" * 9999 + "}]", "not JSON"),
    "a repeated key": (lambda e: '[{"path": "a", "path": "b", "class_id": 1}]', "key is repeated"),
    "a list in training": (lambda e: e[4].update(class_id=[1, 2]), "[1, 2]"),
    "an empty list": (lambda e: e[4].update(class_id=[]), "entry 4"),
    "a string for an entry": (lambda e: e.__setitem__(1, "x"), "entry 1"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_bad_manifest(tmp_path, name):
    edit, named = BAD_MANIFESTS[name]
    root = write_uned(tmp_path)
    change(root, edit)
    with pytest.raises(data.InputError) as error:
        data.Benchmark(root).split("birds", "train")
    message = str(error.value)
    assert named in message and "train.json" in message and "\n" not in message, message


def test_a_manifest_that_is_no_file(tmp_path):
    root = write_uned(tmp_path)
    manifest(root).unlink()
    with pytest.raises(data.InputError, match="train.json cannot be opened"):
        data.Benchmark(root).split("birds", "train")
    os.mkfifo(manifest(root))
    with pytest.raises(data.InputError, match="train.json is not a regular file"):
        data.Benchmark(root).split("birds", "train")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "dangling link"])
def test_missing_files_are_found_when_a_split_is_read(tmp_path, kind):
    root = write_uned(tmp_path)
    file = root / "images" / "birds" / "train" / "2_3.png"
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "dangling link":
        file.symlink_to("nothing")
    with pytest.raises(data.InputError, match="2_3.png .*train; 1 of its 20 images") as error:
        data.Benchmark(root).split("birds", "train")
    assert "\n" not in str(error.value)


# An image is a file -------------------------------------------------------------------------------


SPELLINGS = {
    "the same path": lambda path: path,
    "a leading dot": lambda path: f"./{path}",
    "two slashes": lambda path: path.replace("/", "//"),
    "up and down": lambda path: f"birds/../{path}",
    "an absolute path": lambda path: "ROOT/images/" + path,
    "a symbolic link": lambda path: "symbolic.png",
    "a linked directory": lambda path: path.replace("birds", "linked"),
    "a hard link": lambda path: "hard.png",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_names_of_one_file_count_once(tmp_path, name):
    root = write_uned(tmp_path)
    first = json.loads(manifest(root).read_text())[0]
    file = root / "images" / first["path"]
    (root / "images" / "symbolic.png").symlink_to(file)
    (root / "images" / "linked").symlink_to(root / "images" / "birds")
    os.link(file, root / "images" / "hard.png")
    path = SPELLINGS[name](first["path"]).replace("ROOT", str(root))
    change(root, lambda entries: entries.append({**first, "path": path}))
    benchmark = data.Benchmark(root)
    split = benchmark.split("birds", "train")
    assert len(split) == 20 and len(set(split.files.tolist())) == 20
    (note,) = benchmark.notes
    assert "domain birds, split train: 1 entries repeat" in note

    change(root, lambda entries: entries[-1].update(class_id=3))
    with pytest.raises(data.InputError, match="0_0.png has the labels 0 and 3 .domain birds"):
        data.Benchmark(root).split("birds", "train")


def test_rows_of_the_same_file_in_an_index(tmp_path):
    root = write_uned(tmp_path)
    test = json.loads(manifest(root, "cars", "test").read_text())
    index = json.loads(manifest(root, "cars", "index").read_text())
    shared = [{**entry, "path": "./" + entry["path"], "class_id": 8} for entry in test[:2]]
    change(root, lambda entries: shared[::-1] + index, "cars", "index")
    benchmark = data.Benchmark(root)
    queries, searched = benchmark.split("cars", "test"), benchmark.split("cars", "index")
    rows = data.same_file_rows(queries, searched)
    assert rows.dtype == np.int64
    assert rows[:, 0].tolist() == [1, 0] + [-1] * 8
    assert (data.same_file_rows(queries, queries)[:, 0] == np.arange(10)).all()
    several = data.Split("cars", "index", searched.labels[:3], paths=["a", "b", "a"], folder="/x")
    assert data.same_file_rows(several, several).tolist() == [[0, 2], [1, -1], [0, 2]]


def test_what_training_shares_with_test_is_noted(tmp_path):
    root = write_uned(tmp_path)
    train = json.loads(manifest(root).read_text())
    change(root, lambda entries: entries + train[:7], split="test")
    benchmark = data.Benchmark(root)
    benchmark.split("birds", "test"), benchmark.split("birds", "train")
    assert benchmark.notes == ["domain birds: train and test share 7 files and 2 classes"]


# Class folders ------------------------------------------------------------------------------------


def test_class_folders_are_read_at_any_depth(tmp_path):
    write_images(tmp_path, *(f"d/c{c}/{x}.jpg" for c in range(5) for x in ("1", "a/2", "a/b/3")))
    (tmp_path / "d" / "c0" / "loop").symlink_to(tmp_path / "d" / "c0")
    assert sum(sizes(data.Benchmark(tmp_path)).values()) == 15


def test_hidden_files_are_skipped_and_others_counted(tmp_path):
    write_images(tmp_path, *(f"d/c{c}/{x}.png" for c in range(5) for x in range(2)))
    skipped = ["d/c0/._0.png", "d/.cache/a.png", "d/__MACOSX/a.png", "__MACOSX/d/a.png", "d/.x/y/a"]
    write_images(tmp_path, *skipped)
    write_images(
        tmp_path, "d/c0/a.HEIC", "d/c1/b/c.heic", "d/c2/Thumbs.db", "d/c2/noext", "d/a.png"
    )
    benchmark = data.Benchmark(tmp_path)
    assert benchmark.domains == ("d",) and sum(sizes(benchmark).values()) == 10
    (note,) = benchmark.notes
    assert note.endswith("d: ignored 2 .heic, 1 .png, 1 .db, 1 without suffix"), note
    assert len(benchmark.ignored()) == 5


@pytest.mark.parametrize(
    "names", ["train val test", "Train Valid TEST", "training validation test"]
)
@pytest.mark.parametrize("below", ["", "d/"])
def test_split_folders_are_used(tmp_path, names, below):
    root = tmp_path / "d" if not below else tmp_path
    train, val, test = (f"{below}{name}" for name in names.split())
    write_images(root, *(f"{train}/c{c}/{x}.png" for c in range(3) for x in range(4)))
    write_images(root, *(f"{val}/c3/{x}.png" for x in range(3)))
    write_images(root, *(f"{test}/c{c}/{x}.png" for c in (0, 4) for x in range(2)))
    benchmark = data.Benchmark(root)
    assert benchmark.domains == ("d",) and sizes(benchmark) == {"train": 12, "val": 3, "test": 4}
    labels = {name: set(benchmark.split("d", name).labels.tolist()) for name in ("train", "test")}
    assert labels == {"train": {0, 1, 2}, "test": {0, 4}}
    assert benchmark.notes == ["domain d: train and test share 0 files and 1 classes"]


@pytest.mark.parametrize("other, noted", [("test", "no val folder"), ("val", "no test folder")])
def test_a_pair_of_split_folders(tmp_path, other, noted):
    write_images(tmp_path, *(f"d/{s}/{s}{c}/0.png" for s in ("train", other) for c in range(10)))
    benchmark = data.Benchmark(tmp_path)
    assert sizes(benchmark) == {"train": 9, "val": 1, "test": 10}
    assert noted in benchmark.notes[0]


def test_split_folders_beside_others_are_refused(tmp_path):
    write_images(tmp_path, *(f"d/{s}/c{c}/0.png" for s in ("train", "test", "ship") for c in "ab"))
    with pytest.raises(data.InputError, match=r"\(test, train\) and others \(ship\)"):
        data.Benchmark(tmp_path).split("d", "train")


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, *(f"d/{c}/{x}.png" for c in ("bus", "car", "train") for x in range(2)))
    assert sizes(data.Benchmark(tmp_path)) == {"train": 2, "val": 2, "test": 2}


def test_a_domain_in_place_of_the_data(tmp_path):
    write_images(tmp_path, *(f"d/c{c}/0.png" for c in range(5)))
    with pytest.raises(data.InputError, match=f"give its parent, {tmp_path}"):
        data.Benchmark(tmp_path / "d")


def test_undecodable_names(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    try:
        write_images(tmp_path, *(f"d{name}/c{c}{name}/{name}.png" for c in range(5)))
    except OSError:
        pytest.skip("this file system does not take arbitrary bytes as names")
    benchmark = data.Benchmark(tmp_path)
    assert sum(sizes(benchmark, f"d{name}").values()) == 5
    assert benchmark.split(f"d{name}", "train").image(0).size == (4, 4)
    file = next((tmp_path / f"d{name}").glob("*/*.png"))
    shutil.copyfile(__file__, file)
    (problem,) = data.check(tmp_path)["problems"]
    assert "\\udcff\\udcfe.png" in problem and problem.encode()


@pytest.mark.parametrize(
    "make", [lambda p: p / "missing", lambda p: p / "file", lambda p: p / "empty"]
)
def test_bad_folder(tmp_path, make):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.InputError, match=make(tmp_path).name):
        data.Benchmark(make(tmp_path))


def test_too_few_classes_for_three_splits(tmp_path):
    for label in "ab":
        (tmp_path / "domain" / label).mkdir(parents=True)
    with pytest.raises(data.InputError, match="2 class folders"):
        data.Benchmark(tmp_path).split("domain", "train")
