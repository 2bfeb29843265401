"""search.py: the index of a directory, neighbours and votes against brute force, the commands."""

import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import checkpoint
import evaluate
import folders
import images
import search
from model import UDON

ROOT = Path(__file__).parents[1]
ODD = os.fsdecode(b"caf\xe9 \ttab\nline")  # not UTF-8; a tab and a line break


def write(folder, names, seed=0):
    """Different pictures of these names below a folder."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, number % 5).save(path)
    return Path(folder)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    names = [f"{d}/{c}/{i}.png" for d in ("art", "birds") for c in "xyz" for i in range(4)]
    names += ["art/x/deeper/still/1.jpg", f"{ODD}/{ODD}/1.png", f"{ODD}/<b>&/2.png", "one.png"]
    folder = write(tmp_path_factory.mktemp("album"), names)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def embedder(student_run):
    return search.Embedder(student_run, "cpu")


@pytest.fixture(scope="module")
def index(student_run, album, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "photos.npz"
    search.main(["embed", str(student_run), str(album), "--out", str(path)])
    return path


def run(*arguments):
    search.main([*map(str, arguments)])


def fails(capsys, *arguments, named=()):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1, captured.err
    assert all(str(name) in captured.err for name in named), f"{named} not in {captured.err}"
    return captured


def table(capsys, *arguments):
    """The cells of the lines below the heading that a command prints."""
    capsys.readouterr()
    run(*arguments)
    heading, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) == len(heading) for line in lines), lines
    return lines


def contents(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def expected_vectors(run, paths):
    """One picture at a time, by the model itself."""
    model, about = checkpoint.load(run)
    statistics = about["preprocessing"]
    rows = []
    for path in paths:
        image, how = images.open_image(path), images.resizing(statistics)
        pixels = torch.tensor(images.prepare_test(image, 32, **how)).permute(2, 0, 1)
        batch = images.normalise(pixels[None], statistics["mean"], statistics["std"])
        with torch.no_grad():
            rows.append(model.embed(batch)[0].numpy())
    return np.stack(rows)


# Embedder -----------------------------------------------------------------------------------------


def test_files_images_and_arrays_have_the_same_vectors(student_run, embedder, album):
    paths = [album / "art/x/0.png", album / "one.png"]
    vectors = embedder.embed(paths)
    assert vectors.shape == (2, 64) and vectors.dtype == np.float32
    assert np.abs(vectors - expected_vectors(student_run, paths)).max() < 1e-6
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    opened = [Image.open(path) for path in paths]
    for pictures in (opened, [np.array(x) for x in opened], [str(paths[0]), opened[1]]):
        assert np.array_equal(embedder.embed(pictures), vectors)
    with torch.no_grad():
        assert np.abs(embedder.model.embed(embedder.images(paths)).numpy() - vectors).max() < 1e-6
    assert embedder.size == 32 and embedder.width == 64
    assert embedder.preprocessing == checkpoint.load(student_run)[1]["preprocessing"]


def test_one_picture_and_none(embedder, album):
    path = album / "one.png"
    for single in (path, str(path), Image.open(path)):
        assert np.array_equal(embedder.embed(single), embedder.embed([path]))
    assert embedder.embed([]).shape == (0, 64)


def test_an_open_image_is_embedded_as_a_viewer_shows_it(embedder, tmp_path):
    """Upright, transparency on white; the same as from its file."""
    rng, exif = np.random.default_rng(3), Image.Exif()
    exif[0x0112] = 6
    picture(rng, 2).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    transparent = picture(rng, 1).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(tmp_path / "clear.png")
    paths = [tmp_path / "turned.jpg", tmp_path / "clear.png"]
    assert np.array_equal(
        embedder.embed([Image.open(path) for path in paths]), embedder.embed(paths)
    )


@pytest.mark.parametrize(
    "bad, named",
    [
        ("missing.jpg", "missing.jpg cannot be read (it does not exist): .* (picture 1)"),
        (np.zeros((4, 4), np.uint8), r"(4, 4) of uint8: give (H, W, 3) uint8"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
        (3, "() of int64"),
    ],
    ids=["missing", "grey", "float", "empty", "number"],
)
def test_pictures_that_cannot_be_embedded(embedder, album, bad, named):
    pattern = re.escape(named).replace(r"\.\*", ".*")
    with pytest.raises(images.InputError, match=pattern):
        embedder.embed([album / "one.png", bad])


def test_weights_that_have_diverged(student_run, tmp_path, album):
    written = checkpoint.read(student_run / "best.pt")
    written["model"]["student_head.bias"].fill_(float("nan"))
    checkpoint.save(tmp_path / "a.pt", written)
    with pytest.raises(images.InputError, match="are not finite"):
        search.Embedder(tmp_path / "a.pt", "cpu").embed([album / "one.png"])


class Brightness(torch.nn.Module):
    width = 3

    def forward(self, images):
        return images.mean((2, 3))


def test_a_backbone_of_ones_own(student_run, album, tmp_path):
    written = checkpoint.read(student_run / "best.pt")
    model = UDON(Brightness(), {}, student_dim=5, teacher_dim=0)
    architecture = {"backbone": {"module": "m.Brightness", "image_size": 32}, "classes": {}}
    architecture |= {"student_dim": 5, "teacher_dim": 0, "head_layers": 1}
    written |= {"model": model.state_dict(), "architecture": architecture}
    checkpoint.save(tmp_path / "own.pt", written)
    embedder = search.Embedder(tmp_path / "own.pt", "cpu", Brightness())
    assert embedder.embed(album / "one.png").shape == (1, 5)
    with pytest.raises(checkpoint.CheckpointError, match="the module m.Brightness"):
        search.Embedder(tmp_path / "own.pt", "cpu")


def test_the_digest_is_of_what_determines_a_vector(student_run, embedder, album, tmp_path):
    """The same for the exported student; another one for other weights or preprocessing, which
    also changes the vectors."""
    checkpoint.export(student_run, tmp_path / "student.pt")
    checkpoint.export(student_run, tmp_path / "half.pt", half=True)
    written = checkpoint.read(student_run / "best.pt")
    for name, value in (("antialias", False), ("interpolation", "bicubic")):
        changed = written["preprocessing"] | {name: value}
        checkpoint.save(tmp_path / f"{name}.pt", written | {"preprocessing": changed})
    names, photo = ("student", "half", "antialias", "interpolation"), [album / "one.png"]
    others = {name: search.Embedder(tmp_path / f"{name}.pt", "cpu") for name in names}
    digests = [other.digest for other in others.values()]
    assert digests[0] == embedder.digest and len({*digests}) == 4
    for name in names[2:]:
        expected = expected_vectors(tmp_path / f"{name}.pt", photo)
        assert np.abs(others[name].embed(photo) - expected).max() < 1e-6
        assert np.abs(embedder.embed(photo) - expected).max() > 1e-4


# Domains and classes of a directory ---------------------------------------------------------------

TREES = {
    "flat": {"1.png": ("", ""), "2.png": ("", "")},
    "classes": {"cats/1.png": ("", "cats"), "dogs/deep/2.png": ("dogs", "deep")},
    "domains": {"art/x/1.png": ("art", "x"), "art/y/z/2.png": ("art", "y"), "3.png": ("", "")},
    "mixed": {
        "cats/1.png": ("", "cats"),
        "cats/more/2.png": ("", "cats"),
        "art/x/3.png": ("art", "x"),
    },
    "splits": {"train/x/1.png": ("", "x"), "test/y/deep/2.png": ("", "y"), "test/3.png": ("", "")},
    "splits of a domain": {
        "art/Train/x/1.png": ("art", "x"),
        "art/val/y/2.png": ("art", "y"),
        "art/val/3.png": ("art", ""),
        "birds/x/4.png": ("birds", "x"),
    },
    "no splits": {"train/1.png": ("", "train"), "test/2.png": ("", "test"), "b/3.png": ("", "b")},
}


@pytest.mark.parametrize("name", TREES)
def test_domains_and_classes(tmp_path, name):
    listing = folders.list_pictures(write(tmp_path, TREES[name]))
    assert listing.paths == sorted(TREES[name])
    found = dict(zip(listing.paths, zip(listing.domains, listing.classes)))
    assert found == TREES[name]


def test_other_files_are_noted_and_hidden_ones_are_not(tmp_path):
    write(tmp_path, ["a/1.png", ".thumbs/1.png", "__MACOSX/1.png", "a/.2.png"])
    (tmp_path / "a" / "3.heic").write_bytes(b"")
    assert folders.list_pictures(tmp_path) == (
        *(str(tmp_path), ["a/1.png"], [""], ["a"]),
        "ignored 1 .heic",
    )


def test_the_uned_layout(uned):
    """Every file once, with the labels of the manifests; the cars' queries have two each."""
    listing = folders.list_pictures(uned)
    entries = {}
    for file in sorted(uned.glob("info_files/*/*.json")):
        for entry in json.loads(file.read_text()):
            ids = entry["class_id"]
            text = "/".join(map(str, ids)) if isinstance(ids, list) else str(ids)
            entries[entry["path"]] = (file.parent.name, text)
    assert dict(zip(listing.paths, zip(listing.domains, listing.classes))) == entries
    assert listing.paths == sorted(entries) and "8/99" in listing.classes
    assert listing.folder == str(uned / "images")


# The index ----------------------------------------------------------------------------------------


def test_the_index_of_a_directory(student_run, embedder, album, index):
    file, listing = contents(index), folders.list_pictures(album)
    assert [os.fsdecode(path) for path in file["paths"]] == listing.paths
    assert [os.fsdecode(name) for name in file["domains"]] == listing.domains
    assert [os.fsdecode(name) for name in file["classes"]] == listing.classes
    expected = expected_vectors(student_run, [album / path for path in listing.paths])
    assert file["vectors"].dtype == np.float32
    assert np.abs(file["vectors"] - expected).max() < 1e-6
    about = json.loads(str(file["about"]))
    assert about["digest"] == embedder.digest and about["folder"] == str(album)
    assert about["preprocessing"]["antialias"] is True and about["image_size"] == 32
    assert not Path(f"{index}.parts").exists()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(search, "BATCH", 4)
    monkeypatch.setattr(search, "PART", 8)


def interrupted_embedding(monkeypatch, student_run, album, out, batches):
    """Embeds until so many batches have been computed, then is interrupted."""
    original = search.Embedder.batches
    left = [batches]

    def limited(self, pictures):
        for item in original(self, pictures):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield item

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(search.Embedder, "batches", limited)
        run("embed", student_run, album, "--out", out)
    assert stop.value.code == 130


def embedded_pictures(monkeypatch, student_run, album, out):
    """Resumes -> the contents of the index, and how many pictures were embedded."""
    original, counts = search.Embedder.batches, []

    def counted(self, pictures):
        counts.append(len(pictures))
        return original(self, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(search.Embedder, "batches", counted)
        run("embed", student_run, album, "--out", out)
    return contents(out), sum(counts)


@pytest.mark.parametrize("change", ["none", "damaged part", "changed picture", "other student"])
def test_an_interrupted_embedding_is_resumed(
    student_run, tmp_path, monkeypatch, small_parts, change
):
    """With the result of an undisturbed one. What has changed is embedded again."""
    album, out, source = (
        write(tmp_path / "a", [f"{i:02}.png" for i in range(30)]),
        tmp_path,
        student_run,
    )
    (album / "03.png").write_bytes(b"nonsense")
    interrupted_embedding(monkeypatch, source, album, out / "a.npz", batches=5)  # 2 parts, 1 batch
    assert not (out / "a.npz").exists() and len(list((out / "a.npz.parts").iterdir())) == 2
    expected = 30 - 16
    if change == "damaged part":
        part = out / "a.npz.parts" / "0.npz"
        part.write_bytes(part.read_bytes()[:-40])
        expected += 8
    elif change == "changed picture":
        picture(np.random.default_rng(9), 3).save(album / "09.png")
        expected += 8
    elif change == "other student":
        source = checkpoint.export(student_run, tmp_path / "half.pt", half=True).with_suffix(".pt")
        expected = 30
    resumed, count = embedded_pictures(monkeypatch, source, album, out / "a.npz")
    undisturbed, total = embedded_pictures(monkeypatch, source, album, out / "b.npz")
    assert (count, total) == (expected, 30)
    assert resumed.keys() == undisturbed.keys()
    for name, values in undisturbed.items():
        assert np.array_equal(resumed[name], values), name
    assert sorted(path.name for path in out.glob("*.npz*")) == ["a.npz", "b.npz"]


def test_unreadable_pictures_are_left_out_and_listed(student_run, tmp_path, capsys):
    album = write(tmp_path / "album", ["a/1.png", "a/2.png", "b/3.png"])
    (album / "a" / "2.png").write_bytes(b"nonsense")
    os.mkfifo(album / "b" / "4.jpg")
    run("embed", student_run, album, "--out", tmp_path / "photos.npz")
    printed = capsys.readouterr().out
    assert "2 pictures of 2 classes, 2 left out" in printed
    for name in ("a/2.png", "b/4.jpg"):
        assert f"left out: image {album / name}" in printed
    file = contents(tmp_path / "photos.npz")
    assert file["paths"].tolist() == [b"a/1.png", b"b/3.png"]
    expected = expected_vectors(student_run, [album / "a" / "1.png", album / "b" / "3.png"])
    assert np.abs(file["vectors"] - expected).max() < 1e-6
    stop = ("embed", student_run, album, "--out", tmp_path / "b.npz", "--on-bad-image", "stop")
    fails(capsys, *stop, named=["a/2.png", "--on-bad-image skip"])
    assert not (tmp_path / "b.npz").exists()


def test_mistakes_in_embedding(student_run, album, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"nonsense")
    (tmp_path / "letter.txt").write_text("mine")
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as archive:
        archive.writestr("1.png", b"mine")
    out = ("--out", tmp_path / "a.npz")
    fails(capsys, "embed", tmp_path / "no.pt", album, *out, named=["no.pt"])
    fails(capsys, "embed", student_run, tmp_path / "nowhere", *out, named=["nowhere"])
    fails(capsys, "embed", student_run, tmp_path / "empty", *out, named=["holds no picture"])
    fails(capsys, "embed", student_run, tmp_path / "broken", *out, named=["none of 1 pictures"])
    fails(capsys, "embed", student_run, album, named=["--out"])
    fails(capsys, "embed", student_run, album, *out, "--device", "abacus", named=["abacus"])
    names = ("", "letter.txt", "album.zip", "no/a.npz", "/dev/full")
    for target in (tmp_path / name for name in names):
        fails(capsys, "embed", student_run, album, "--out", target, named=[f"--out {target}"])
    assert (tmp_path / "letter.txt").read_text() == "mine" and not (tmp_path / "a.npz").exists()


def test_a_full_disk_keeps_the_parts(student_run, album, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", refuse)
        fails(
            capsys,
            *("embed", student_run, album, "--out", tmp_path / "a.npz"),
            named=["a.npz", "No space left"],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz.parts"]


class Stub:
    """What open_index needs of an Embedder."""

    def __init__(self, embedder):
        self.path, self.digest, self.width = embedder.path, embedder.digest, embedder.width


@settings(max_examples=100)
@given(st.data())
def test_damage_to_an_index_is_found(embedder, index, data):
    """Or does not concern what it holds, such as the dates in its directory."""
    raw = bytearray(index.read_bytes())
    cut = data.draw(st.booleans())
    position = data.draw(st.integers(0, len(raw) - 1))
    if cut:
        raw = raw[:position]
    else:
        raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path = index.with_name("damaged.npz")
    path.write_bytes(raw)
    whole = search.open_index(index, Stub(embedder))
    try:
        found = search.open_index(path, Stub(embedder))
    except images.InputError as error:
        assert "damaged.npz cannot be read" in str(error) and "\n" not in str(error)
    else:
        assert not cut
        assert all(np.array_equal(one, other) for one, other in zip(found, whole))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize(
    "change",
    [
        {"paths": np.array([Malicious()] * 28)},
        {"vectors": np.zeros((28, 64))},
        {"vectors": np.zeros((27, 64), np.float32)},
        {"vectors": np.zeros((28, 63), np.float32)},
        {"vectors": np.zeros((0, 64), np.float32), "paths": np.zeros(0, "S1")},
        {"classes": np.array(["text"] * 28)},
        {"about": np.array("{}")},
        {"about": np.array("[]")},
        {"about": np.array("no json")},
    ],
    ids=lambda change: " ".join(f"{name} {x.dtype} {x.shape}" for name, x in change.items()),
)
def test_arrays_that_are_no_index(embedder, index, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "other.npz", **contents(index) | change)
    with pytest.raises(images.InputError, match="other.npz cannot be read"):
        search.open_index(tmp_path / "other.npz", embedder)
    assert not (tmp_path / "made").exists()


# Neighbours ---------------------------------------------------------------------------------------


def own_files(folder, file):
    return [
        os.path.samefile(file, os.path.join(folder, os.fsdecode(x))) for x in contents_of(folder)
    ]


def contents_of(folder):
    return folders.list_pictures(folder).paths


def brute_force(index, vector, excluded=()):
    """[(similarity, row)] of all rows in float64."""
    cosines = contents(index)["vectors"].astype(np.float64) @ vector.astype(np.float64)
    rows = [row for row in np.argsort(-cosines, kind="stable") if row not in excluded]
    return [(cosines[row], row) for row in rows]


def test_find_equals_brute_force(student_run, embedder, album, index, tmp_path, capsys):
    """For photos outside the index; and in it, whose own row is left out."""
    outside = write(tmp_path, ["new.png", "new.jpg"], seed=5)
    names = contents_of(album)
    photos = [outside / "new.png", outside / "new.jpg", album / names[3], album / names[20]]
    rows = table(capsys, "find", student_run, index, *photos, "--top", 7)
    assert len(rows) == 7 * len(photos)
    file, vectors = contents(index), embedder.embed(photos)
    for number, photo in enumerate(photos):
        own = [names.index(str(photo.relative_to(album)))] if number > 1 else []
        expected = brute_force(index, vectors[number], own)[:7]
        for rank, (cells, (cosine, row)) in enumerate(zip(rows[7 * number :], expected), 1):
            assert cells[:2] == [str(photo), str(rank)]
            assert abs(float(cells[2]) - cosine) < 1e-4
            texts = [os.fsdecode(file[name][row]) for name in ("paths", "domains", "classes")]
            assert cells[3:] == [images.printable(text) for text in texts]


def test_a_photo_is_excluded_by_its_file_under_any_name(student_run, tmp_path, capsys):
    """Also as a link; however many names the index has for it; a copy is another file."""
    album = write(tmp_path / "album", [f"{i}.png" for i in range(6)])
    for number in range(3):
        (album / f"soft {number}.png").symlink_to(album / "0.png")
        os.link(album / "0.png", album / f"hard {number}.png")
    (album / "copy.png").write_bytes((album / "0.png").read_bytes())
    (tmp_path / "elsewhere.png").symlink_to(album / "soft 1.png")
    run("embed", student_run, album, "--out", tmp_path / "photos.npz")
    rest = ["copy.png", *(f"{i}.png" for i in range(1, 6))]
    for photo in (
        album / "0.png",
        album / ".." / "album" / "hard 2.png",
        tmp_path / "elsewhere.png",
    ):
        line = ("find", student_run, tmp_path / "photos.npz", photo)
        found = [cells[3] for cells in table(capsys, *line, "--top", 6)]
        assert sorted(found) == sorted(rest) and found[0] == "copy.png"
        assert [cells[3] for cells in table(capsys, *line, "--top", 1)] == ["copy.png"]


def test_more_neighbours_than_there_are(student_run, index, album, capsys):
    rows = table(capsys, "find", student_run, index, album / "one.png", "--top", 1000)
    assert len(rows) == len(contents_of(album)) - 1
    run("find", student_run, index, album / "one.png", "--top", 1000)
    assert "--top is 1000, the index has 28 pictures" in capsys.readouterr().err


def test_directories_of_photos_and_unreadable_ones(student_run, index, tmp_path, capsys):
    photos = write(tmp_path, ["a/1.png", "a/b/2.png", "3.png"])
    (photos / "a" / "0.png").write_bytes(b"nonsense")
    line = ("find", student_run, index, photos / "3.png", photos / "a", "--top", 1)
    run(*line)
    captured = capsys.readouterr()
    order = [photos / "3.png", photos / "a/1.png", photos / "a/b/2.png"]
    assert [x.split("\t")[0] for x in captured.out.splitlines()[1:]] == [*map(str, order)]
    assert f"left out: image {photos / 'a/0.png'}" in captured.err
    fails(capsys, *line, "--on-bad-image", "stop", named=["a/0.png"])


def test_names_are_escaped_in_tables(student_run, index, album, capsys):
    """Three cells of one line, from which the name can be read again."""
    cells = table(capsys, "find", student_run, index, album / ODD / ODD / "1.png", "--top", 28)
    escaped = images.printable(ODD)
    assert {"\\t", "\\n", "\\udce9"} <= set(re.findall(r"\\[tn]|\\udc..", escaped))
    assert all(row[0] == f"{album}/{escaped}/{escaped}/1.png" for row in cells)
    (row,) = [row for row in cells if row[5] == "<b>&"]
    assert row[3:] == [f"{escaped}/<b>&/2.png", escaped, "<b>&"]


def test_labels_equal_a_vote_by_brute_force(student_run, embedder, album, index, tmp_path, capsys):
    """Among pictures with a class, weighted by exp(similarity / 0.05)."""
    photos = [album / name for name in contents_of(album)]
    outside = write(tmp_path, ["new.png"], seed=5) / "new.png"
    rows = table(capsys, "label", student_run, index, album, outside, "--top", 5)
    file, names = contents(index), contents_of(album)
    vectors = embedder.embed([*photos, outside])
    assert len(rows) == len(photos) + 1
    for cells, photo, vector in zip(rows, [*photos, outside], vectors):
        own = [names.index(str(photo.relative_to(album)))] if photo != outside else []
        without = np.flatnonzero(file["classes"] == b"").tolist()
        found = brute_force(index, vector, [*own, *without])[:5]
        weights = np.exp(np.array([cosine for cosine, _ in found]) / 0.05)
        pairs = [(file["domains"][row], file["classes"][row]) for _, row in found]
        totals = {pair: sum(w for w, p in zip(weights, pairs) if p == pair) for pair in pairs}
        best = max(totals, key=totals.get)
        nearest = max(cosine for (cosine, _), pair in zip(found, pairs) if pair == best)
        assert cells[0] == images.printable(str(photo))
        assert cells[1:3] == [images.printable(os.fsdecode(text)) for text in best]
        assert abs(float(cells[3]) - nearest) < 1e-4
        assert abs(float(cells[4]) - totals[best] / weights.sum()) < 1e-3


def test_labels_need_classes(student_run, tmp_path, capsys):
    album = write(tmp_path / "album", ["1.png", "2.png"])
    run("embed", student_run, album, "--out", tmp_path / "photos.npz")
    line = ("label", student_run, tmp_path / "photos.npz", album / "1.png")
    fails(capsys, *line, named=["photos.npz has no classes"])
    album = write(tmp_path / "second", ["a/1.png", "2.png"])
    run("embed", student_run, album, "--out", tmp_path / "photos.npz")
    run("label", student_run, tmp_path / "photos.npz", album / "a" / "1.png", album / "2.png")
    captured = capsys.readouterr()
    assert f"{album / 'a/1.png'}: the index has no other picture with a class" in captured.err
    assert captured.out.splitlines()[-1].split("\t")[1:3] == ["", "a"]


def test_an_exported_student_searches_the_index_of_its_run(
    student_run, index, album, tmp_path, capsys
):
    checkpoint.export(student_run, tmp_path / "student.pt")
    line = (index, album / "one.png", "--top", 3)
    rows = table(capsys, "find", tmp_path / "student.pt", *line)
    assert rows == table(capsys, "find", student_run, *line)


def test_mistakes_in_search(student_run, index, album, tmp_path, capsys):
    half = checkpoint.export(student_run, tmp_path / "half.pt", half=True).with_suffix(".pt")
    photo = album / "one.png"
    for command in ("find", "label"):
        named = [index, str(student_run), half, "another checkpoint"]
        assert not fails(capsys, command, half, index, photo, named=named).out
        line = (command, student_run)
        fails(capsys, *line, tmp_path / "no.npz", photo, named=["no.npz", "search.py embed"])
        fails(capsys, *line, half, photo, named=[half, "search.py embed"])
        fails(capsys, *line, tmp_path, photo, named=[tmp_path, "search.py embed"])
        fails(capsys, *line, index, named=["PHOTO"])
        fails(capsys, *line, index, photo, "--top", 0, named=["--top is 0"])
        fails(capsys, *line, index, photo, "--top", "many", named=["many"])
        missing = fails(capsys, *line, index, tmp_path / "no.jpg", named=["no.jpg", "not exist"])
        assert not missing.out
        fails(capsys, *line, index, tmp_path / "mnt", named=["mnt"])
    bad = write(tmp_path / "bad", ["1.png", "2.png"])
    for path in bad.iterdir():
        path.write_bytes(b"nonsense")
    with pytest.raises(SystemExit):
        run("find", student_run, index, bad)
    assert "none of 2 photos can be read" in capsys.readouterr().err


def test_vectors_that_are_not_finite(student_run, index, album, tmp_path, capsys):
    file = contents(index)
    file["vectors"][3, 5] = np.nan
    np.savez(tmp_path / "a.npz", **file)
    named = ["cannot be searched", "row 3"]
    fails(capsys, "find", student_run, tmp_path / "a.npz", album / "one.png", named=named)


# The page -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_the_page_is_self_contained(student_run, index, album, tmp_path, capsys):
    photos = [album / "one.png", album / ODD / "<b>&" / "2.png"]
    page = tmp_path / "page.html"
    rows = table(capsys, "find", student_run, index, *photos, "--top", 27, "--html", page)
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.tags.count("img") == 2 * (1 + 27) == len(parsed.sources)
    for source in parsed.sources:
        kind, _, pixels = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        Image.open(io.BytesIO(base64.b64decode(pixels))).verify()
    titles = [re.fullmatch(r"(\d+)\. (-?[\d.]+)", text) for text in parsed.text]
    shown = [match.groups() for match in titles if match]
    assert [rank for rank, _ in shown] == [cells[1] for cells in rows]
    for cells, (_, similarity) in zip(rows, shown):
        assert {*cells[3:4], " / ".join(filter(None, cells[4:]))} - {""} <= {*parsed.text}
        assert abs(float(cells[2]) - float(similarity)) < 1e-3
    assert images.printable(str(photos[1])) in parsed.text


def test_a_picture_that_is_gone(student_run, tmp_path):
    album = write(tmp_path / "album", ["1.png", "2.png"])
    run("embed", student_run, album, "--out", tmp_path / "photos.npz")
    (album / "2.png").unlink()
    line = ("find", student_run, tmp_path / "photos.npz", album / "1.png")
    run(*line, "--html", tmp_path / "page.html")
    assert "cannot be read" in Page((tmp_path / "page.html").read_text()).text


def test_a_page_that_cannot_be_written(student_run, index, album, tmp_path, capsys):
    line = ("find", student_run, index, album / "one.png", "--html")
    for target in ("/dev/full", tmp_path, tmp_path / "no" / "page.html"):
        fails(capsys, *line, target, named=[f"{target} cannot be written"])


# Processes, faiss, the project's own data ---------------------------------------------------------


def test_a_reader_that_ends_early(student_run, index, album):
    names = {"PYTHON": sys.executable, "SEARCH": ROOT / "search.py", "RUN": student_run}
    names |= {"INDEX": index, "ALBUM": album}
    command = '"$PYTHON" "$SEARCH" find "$RUN" "$INDEX" "$ALBUM" --top 27 | head -n 1'
    environment = os.environ | {name: str(value) for name, value in names.items()}
    finished = subprocess.run(["bash", "-c", command], env=environment, capture_output=True)
    assert finished.stdout.startswith(b"photo\trank\t") and finished.stderr == b""


def test_an_output_on_a_full_disk(student_run, index, album, monkeypatch, capsys):
    line = ["find", str(student_run), str(index), str(album), "--top", "27"]
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            search.main(line)
    sentence = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left" in sentence and sentence.count("\n") == 1


def test_the_lines_for_faiss(student_run, index, album, tmp_path, monkeypatch):
    """Those of the docstring find what the exact search finds."""
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    docstring = ast.get_docstring(ast.parse((ROOT / "search.py").read_text()))
    lines = re.findall(r"^    ((?:vectors|index|similarities).*)$", docstring, re.MULTILINE)
    assert len(lines) == 4
    monkeypatch.chdir(tmp_path)
    os.link(index, "photos.npz")
    os.link(album / "art" / "x" / "0.png", "photo.jpg")
    code = "\n".join(lines).replace("weights/student.pt", str(student_run))
    names = {"faiss": faiss, "numpy": np, "Embedder": search.Embedder}
    exec(code, names)
    expected = brute_force(index, search.Embedder(student_run, "cpu").embed("photo.jpg")[0])[:10]
    assert names["rows"][0].tolist() == [row for _, row in expected]
    assert np.abs(names["similarities"][0] - [cosine for cosine, _ in expected]).max() < 1e-5


def test_an_index_is_evaluated_as_its_student(student_run, uned, tmp_path):
    index, results = tmp_path / "photos.npz", []
    run("embed", student_run, uned, "--out", index)
    for number, source in enumerate(([student_run], ["--embeddings", index])):
        target = tmp_path / f"{number}.json"
        evaluate.main([*map(str, [*source, "--data", uned, "--json", target])])
        results.append(json.loads(target.read_text())["domains"])
    assert results[0] == results[1]


def test_help(capsys):
    for line in ("--help", "embed --help", "find --help", "label --help"):
        with pytest.raises(SystemExit) as stop:
            search.main(line.split())
        assert stop.value.code == 0 and "usage: search.py" in capsys.readouterr().out
