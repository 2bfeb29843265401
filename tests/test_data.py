"""data.py: layouts, labels, transforms against independent arithmetic, batches as functions of (seed, step), bad input."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_uned
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from sampler import DomainSampler

SIZE, BATCH, SEED = 16, 6, 3


# Layouts ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    root = write_uned(tmp_path)
    entry = json.loads((root / "info_files" / "birds" / "train.json").read_text())[0]
    image = Image.new("RGB", (9, 5), (200, 30, 30)).convert(mode)
    image.save(root / "images" / entry["path"], format="TIFF" if mode == "CMYK" else "PNG")
    assert np.asarray(data.Benchmark(root).split("birds", "train").image(0)).shape == (5, 9, 3)


# Transforms ------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(4, 48))
def test_prepared_shapes(width, height, size):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
    assert data.prepare_train(image, size).shape == (round(size * 8 / 7),) * 2 + (3,)
    for antialias in (True, False):
        assert data.prepare_test(image, size, antialias).shape == (size, size, 3)


def test_training_side_of_the_paper():
    assert data.train_side(224) == 256


@pytest.mark.parametrize(
    "width, height, left, top, scaled",
    [(60, 40, 4, 0, (24, 16)), (40, 61, 0, 4, (16, 24)), (16, 16, 0, 0, (16, 16))],
)
def test_centre_crop(width, height, left, top, scaled):
    """Short side to 16, other side int(ratio x 16), then the centre with floored offset."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
    whole = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
    assert (data.prepare_test(image, 16) == whole[top : top + 16, left : left + 16]).all()


@settings(deadline=None, max_examples=40)
@given(width=st.integers(2, 60), height=st.integers(2, 60), side=st.integers(2, 60))
def test_resize_without_antialias_is_half_pixel_bilinear(width, height, side):
    """TensorFlow's bilinear resize: output pixel i looks at (i + 1/2) x ratio - 1/2, clamped to the image."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def sampling(old):
        """(side, old) weights of the old pixels in each new one."""
        at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
        return np.clip(1 - abs(at[:, None] - np.arange(old)), 0, None)

    exact = np.einsum("ih,jw,hwc->ijc", sampling(height), sampling(width), pixels.astype(float))
    error = abs(data.resize(Image.fromarray(pixels), side, side, antialias=False) - exact).max()
    assert error < 0.501, f"{error} levels, more than rounding"


def test_resize_with_antialias_is_torchs():
    pixels = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    ours = data.resize(Image.fromarray(pixels), 20, 24).astype(float)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    theirs = (
        F.interpolate(tensor, (24, 20), mode="bilinear", antialias=True, align_corners=False)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    assert abs(ours - theirs).max() <= 1.0


def test_normalise():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.5, 0.1)
    expected = (images.numpy().astype(np.float64) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(
        std, (3, 1, 1)
    )
    assert np.allclose(data.normalise(images, mean, std).numpy(), expected, atol=1e-6)


# Batches ---------------------------------------------------------------------------------------------------------------------


def batches_of(root, **changes):
    benchmark = data.Benchmark(root)
    return data.TrainBatches(
        {d: benchmark.split(d, "train") for d in benchmark.domains}, SIZE, BATCH, SEED, **changes
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 10**6), noise=st.integers(0, 100))
def test_a_batch_is_a_function_of_seed_and_step(uned, step, noise):
    batches = batches_of(uned)
    first = batches[step, "birds"]
    np.random.seed(noise), random.seed(noise), torch.manual_seed(noise)
    batches[step + 1, "cars"]
    assert same(first, batches[step, "birds"]) and same(first, batches_of(uned)[step, "birds"])
    assert not same(first, batches[step + 1, "birds"])
    images, labels = first
    assert images.shape == (BATCH, 3, SIZE, SIZE) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and 0 <= labels.min() and labels.max() < 4


def test_labels_belong_to_the_images(uned):
    """The colour of the picture tells its class: red, green and blue in turn, classes 0 and 3 by how bright the red is."""
    images, labels = batches_of(uned)[11, "birds"]
    levels = images.float().mean((2, 3))
    for level, label in zip(levels, labels.tolist()):
        assert int(level.argmax()) == label % 3 and (level.max() > 130) == (label == 3), (
            level,
            label,
        )


def test_a_batch_repeats_an_image_only_when_it_must(tmp_path):
    root = write_uned(tmp_path, classes=2, images=2)  # 4 images for a batch of 6
    images, _ = batches_of(root)[0, "birds"]
    assert len(images) == BATCH
    rng = np.random.default_rng((SEED, 5))
    benchmark = data.Benchmark()
    large = data.TrainBatches({"count": benchmark.split("count", "train")}, 64, 64, SEED)
    rows = rng.choice(len(large.splits["count"]), 64, replace=False)
    assert len(set(rows.tolist())) == 64
    assert torch.equal(large[5, "count"][1], torch.from_numpy(large.splits["count"].classes[rows]))


def test_crops_and_flips_vary(uned):
    """Every batch position gets its own crop and flip: a batch over one repeated picture is not one repeated picture."""
    split = data.Benchmark(uned).split("birds", "train")
    one = data.Split(
        "birds", "train", split.labels[:1], paths=[split.paths[0]], folder=split.folder
    )
    batches = data.TrainBatches({"birds": one}, SIZE, 64, SEED)
    images = batches[0, "birds"][0].numpy()
    whole = data.prepare_train(one.image(0), SIZE).transpose(2, 0, 1)
    side = data.train_side(SIZE)
    crops = {
        whole[:, t : t + SIZE, l : l + SIZE][:, :, ::step].tobytes()
        for t in range(side - SIZE + 1)
        for l in range(side - SIZE + 1)
        for step in (1, -1)
    }
    seen = {image.tobytes() for image in images}
    assert seen <= crops and len(seen) > 0.7 * len(crops), (
        f"{len(seen)} of {len(crops)} crops and flips"
    )


@settings(deadline=None, max_examples=15)
@given(least=st.floats(0.05, 1.0), step=st.integers(0, 1000))
def test_resized_crops_keep_their_share(least, step):
    """A picture whose red grows to the right and green downwards: the ends of a crop tell which part of it was kept."""
    size, side = 96, data.train_side(96)
    ramp = np.linspace(0, 255, side)
    whole = (
        np.stack(
            [*np.broadcast_arrays(ramp[None, :], ramp[:, None]), np.zeros((side, side))], axis=-1
        )
        .round()
        .astype(np.uint8)
    )
    split = data.Split("ramps", "train", np.zeros(1, dtype=np.int32), pixels=whole[None])
    images, _ = data.TrainBatches({"ramps": split}, size, 16, SEED, min_area=least)[step, "ramps"]
    red, green = images[:, 0].float().mean(1), images[:, 1].float().mean(2)  # (16, size) each
    width, height = (
        abs(x[:, -1] - x[:, 0]) / 255 * side / (side - 1) * size / (size - 1) for x in (red, green)
    )
    area, aspect, slack = width * height, width / height, 0.05
    whole_side = (width > 1 - slack) | (
        height > 1 - slack
    )  # a crop that would not fit is cut to the picture
    assert ((area >= least * (1 - slack) - 0.01) | whole_side).all(), (
        f"{area.min():.3f} kept, {least:.3f} promised"
    )
    assert ((0.75 - slack < aspect) & (aspect < 4 / 3 + slack) | whole_side).all()
    assert least > 0.9 or len(set(area.tolist())) > 8, "crops vary"


def test_a_folders_domains_can_be_chosen(uned):
    assert data.Benchmark(uned, ["cars"]).domains == ("cars",) and data.Benchmark(
        uned, None
    ).domains == ("birds", "cars")
    assert data.Benchmark(None, ["shape", "count", "shape"]).domains == ("count", "shape")
    with pytest.raises(data.InputError, match="'plants' is not in .*birds, cars"):
        data.Benchmark(uned, ["cars", "plants"])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(uned, monkeypatch, in_memory, workers):
    expected = []
    sampler, batches = DomainSampler(("birds", "cars"), period=4, seed=SEED), batches_of(uned)
    for step in range(10):
        domain = sampler.draw()
        expected.append((domain, *batches[step, domain]))
        sampler.observe(domain, step)

    if not in_memory:
        monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    sampler, batches = DomainSampler(("birds", "cars"), period=4, seed=SEED), batches_of(uned)
    assert batches.in_memory == in_memory
    count = 0
    for step, (domain, images, labels) in enumerate(data.stream(batches, sampler, 0, 10, workers)):
        assert domain == expected[step][0] and same((images, labels), expected[step][1:]), step
        sampler.observe(domain, step)
        count += 1
    assert count == 10


def test_real_images(mini_uned):
    benchmark = data.Benchmark(mini_uned)
    assert len(benchmark.domains) == 8
    train = {d: benchmark.split(d, "train") for d in benchmark.domains}
    assert (len(train["food"]), train["food"].num_classes) == (2196, 61)
    assert sum(map(len, train.values())) == 19276
    assert (
        benchmark.index_name("retail_goods", "test") == "index"
        and benchmark.index_name("food", "test") == "test"
    )
    images = data.TestImages(benchmark.split("emoji", "val"), 64)
    assert images[3:5].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_test_images_come_in_order_in_batches(uned, workers, keep):
    split = data.Benchmark(uned).split("birds", "test")
    images = data.TestImages(split, SIZE, keep=keep)
    batches = list(images.batches(6, workers))
    assert [batch.shape for batch in batches] == [(n, 3, SIZE, SIZE) for n in (6, 6, 6, 2)]
    whole = torch.cat(batches)
    expected = [data.prepare_test(split.image(row), SIZE) for row in range(20)]
    assert torch.equal(whole, torch.tensor(np.stack(expected)).permute(0, 3, 1, 2))
    for rows in (slice(3, 5), range(3, 5), [3, 4]):
        assert torch.equal(images[rows], whole[3:5])


def test_loaded_takes_a_plan_when_the_last_one_is_used(uned):
    """A later plan may depend on what was done with the items of an earlier one."""
    batches, used = batches_of(uned), []

    def plans():
        for number in range(3):
            assert len(used) == 2 * number
            yield [(number, "birds"), (number + 10, "cars")]

    for key, item in data.loaded(batches, plans(), 0):
        assert same(item, batches[key])
        used.append(key[0])
    assert used == [0, 10, 1, 11, 2, 12]


# Bad input: one sentence that names it ---------------------------------------------------------------------------------------


def spoil(root, edit):
    file = root / "info_files" / "birds" / "train.json"
    entries = json.loads(file.read_text())
    result = edit(entries)
    file.write_text(
        result if isinstance(result, str) else json.dumps(entries if result is None else result)
    )


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
    "a list in training": (lambda e: e[4].update(class_id=[1, 2]), "[1, 2]"),
    "an empty list": (lambda e: e[4].update(class_id=[]), "entry 4"),
    "a string for an entry": (lambda e: e.__setitem__(1, "x"), "entry 1"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_bad_manifest(tmp_path, name):
    edit, named = BAD_MANIFESTS[name]
    root = write_uned(tmp_path)
    spoil(root, edit)
    with pytest.raises(data.InputError) as error:
        data.Benchmark(root).split("birds", "train")
    message = str(error.value)
    assert named in message and "train.json" in message and "\n" not in message, message


@pytest.mark.parametrize("contents", [b"", b"no image", None, "half"])
def test_bad_image_is_named(tmp_path, contents):
    root = write_uned(tmp_path)
    file = root / "images" / "birds" / "train" / "1_0.png"
    if contents is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:300] if contents == "half" else contents)
    with pytest.raises(data.InputError, match="1_0.png") as error:
        batches_of(root)
    assert "\n" not in str(error.value)


def test_bad_image_is_named_by_a_worker(tmp_path, monkeypatch):
    root = write_uned(tmp_path)
    (root / "images" / "birds" / "train" / "1_0.png").write_bytes(b"no image")
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    sampler, batches = DomainSampler(("birds", "cars"), period=4), batches_of(root)
    with pytest.raises(data.InputError, match="^image .*1_0.png") as error:
        for _ in data.stream(batches, sampler, 0, 40, 2):
            pass
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


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


def test_unknown_domain_and_split():
    with pytest.raises(data.InputError, match="'whales'"):
        data.Benchmark().split("whales", "train")
    with pytest.raises(data.InputError, match="'index'"):
        data.Benchmark().split("shape", "index")
