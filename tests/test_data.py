"""data.py: batches as functions of (seed, step), loading, bad images, the check of a directory."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import write_uned
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from sampler import DomainSampler

SIZE, BATCH, SEED = 16, 6, 3


# The split of all images --------------------------------------------------------------------------


def test_all_images_of_a_domain_each_once(tmp_path):
    """cars has an index split, whose first image the test split is given, too, with a class of its
    own; an image that is missing from one split is missing from all."""
    root = write_uned(tmp_path)
    manifests = root / "info_files" / "cars"
    entries = {path.stem: json.loads(path.read_text()) for path in manifests.iterdir()}
    shared = {
        **entries["index"][0],
        "path": f"./{entries['index'][0]['path']}",
        "class_id": [70, 30],
    }
    (manifests / "test.json").write_text(json.dumps([*entries["test"], shared]))
    benchmark = data.Benchmark(root)
    split = benchmark.split("cars", "all")
    labels = {}
    for entry in [*(entry for part in entries.values() for entry in part), shared]:
        path = entry["path"].removeprefix("./")
        labels.setdefault(path, set()).update(np.atleast_1d(entry["class_id"]).tolist())
    paths = [path.removeprefix("./") for path in split.paths]
    assert len(paths) == 60 and dict(zip(paths, map(set, split.labels))) == labels
    assert benchmark.split("cars", "all") is split and split.name == "all"
    assert benchmark.index_name("cars", "all") == "all" and not benchmark.notes


def test_all_images_in_memory():
    benchmark = data.Benchmark(domains=["count"])
    parts = [benchmark.split("count", name) for name in ("train", "val", "test")]
    split = benchmark.split("count", "all")
    assert np.array_equal(split.pixels, np.concatenate([part.pixels for part in parts]))
    assert np.array_equal(split.labels, np.concatenate([part.labels for part in parts]))
    assert split.path(3) == "count/all row 3"


def test_bad_images_of_all_splits_count_together(tmp_path):
    root = write_uned(tmp_path, images=30)
    (root / "images" / "birds" / "train" / "0_0.png").unlink()
    with pytest.raises(data.InputError, match="0_0.png"):
        data.Benchmark(root).split("birds", "all")
    benchmark = data.Benchmark(root, on_bad_image="skip")
    split = benchmark.split("birds", "all")
    assert len(split) == 359 and len(split.missing) == 1
    split.skip(0, data.InputError("truncated"))
    assert len(benchmark.skipped) == 2


# Batches ------------------------------------------------------------------------------------------


def batches_of(root, **changes):
    benchmark = data.Benchmark(root)
    return data.TrainBatches(
        {d: benchmark.split(d, "train") for d in benchmark.domains}, SIZE, BATCH, SEED, **changes
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@settings(max_examples=30)
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
    """Classes are red, green, blue and bright red."""
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
    """Every position of a batch gets its own crop and flip, also of a repeated picture."""
    split = data.Benchmark(uned).split("birds", "train")
    one = data.Split(
        "birds", "train", split.labels[:1], paths=[split.paths[0]], folder=split.folder
    )
    batches = data.TrainBatches({"birds": one}, SIZE, 64, SEED)
    images = batches[0, "birds"][0].numpy()
    whole = data.prepare_train(one.image(0), SIZE).transpose(2, 0, 1)
    starts = range(data.train_side(SIZE) - SIZE + 1)
    crops = {
        whole[:, top : top + SIZE, left : left + SIZE][:, :, ::step].tobytes()
        for top in starts
        for left in starts
        for step in (1, -1)
    }
    seen = {image.tobytes() for image in images}
    assert seen <= crops and len(seen) > 0.7 * len(crops), (
        f"{len(seen)} of {len(crops)} crops and flips"
    )


@pytest.mark.parametrize("keep", [False, True])
def test_images_and_crops_have_the_interpolation_of_the_model(uned, keep):
    split, how = data.Benchmark(uned).split("birds", "train"), {"interpolation": "bicubic"}
    tests = data.TestImages(split, SIZE, keep=keep, **how)
    expected = data.prepare_test(split.image(3), SIZE, **how).transpose(2, 0, 1)
    assert (tests[[3]].numpy()[0] == expected).all()
    batches = data.TrainBatches({"birds": split}, SIZE, 4, SEED, min_area=1.0, keep=keep, **how)
    whole = data.prepare_train(split.image(3), SIZE, **how)
    assert (batches._usable("birds", 3, (0,))[1] == whole.transpose(2, 0, 1)).all()
    boxes = batches._boxes(np.random.default_rng((SEED, 3)), 4)
    for crop, (left, top, width, height) in zip(batches.crops("birds", 3, 4), boxes):
        box = (left, top, left + width, top + height)
        crops = [
            data.resize(Image.fromarray(whole), SIZE, SIZE, True, box, **how)[:, ::step]
            for step in (1, -1)
        ]
        assert any((crop == other.transpose(2, 0, 1)).all() for other in crops)


@settings(max_examples=15)
@given(least=st.floats(0.05, 1.0), step=st.integers(0, 1000))
def test_resized_crops_keep_their_share(least, step):
    """Red grows to the right, green downwards: the edges of a crop tell which part was kept."""
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


# Bad images ---------------------------------------------------------------------------------------


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


def test_unknown_domain_and_split():
    with pytest.raises(data.InputError, match="'whales'"):
        data.Benchmark().split("whales", "train")
    with pytest.raises(data.InputError, match="'index'"):
        data.Benchmark().split("shape", "index")


def write_large(root, bad=()):
    """A domain with 200 training images, some of them bad: {number: contents, None for missing}."""
    write_uned(root, domains=("birds",), classes=4, images=50)
    files = sorted((root / "images" / "birds" / "train").iterdir())
    for number, contents in dict(bad).items():
        files[number].unlink()
        if contents is not None:
            files[number].write_bytes(contents)
    return [str(file) for file in files]


def skipping(root, **options):
    benchmark = data.Benchmark(root, on_bad_image="skip")
    splits = {"birds": benchmark.split("birds", "train")}
    return benchmark, data.TrainBatches(splits, SIZE, 64, SEED, **options)


def test_skipped_training_images_are_replaced(tmp_path, monkeypatch):
    """The batches are the same in memory, decoded as needed, and from any number of workers."""
    files = write_large(tmp_path, {11: b"no image", 40: None})
    benchmark, batches = skipping(tmp_path)
    assert len(batches.splits["birds"]) == 199
    assert set(benchmark.skipped) == {files[11], files[40]}
    keys = [(step, "birds") for step in range(20)]
    expected = [batches[key] for key in keys]
    assert all(images.amax((1, 2, 3)).min() > 0 for images, _ in expected), "a bad image is shown"
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    for workers in (0, 2):
        benchmark, batches = skipping(tmp_path)
        assert set(benchmark.skipped) == {files[40]}
        for (_, batch), wanted in zip(data.loaded(batches, [keys], workers), expected):
            assert same(batch, wanted)
        assert set(benchmark.skipped) == {files[11], files[40]}
        assert "cannot be read" in benchmark.skipped[files[11]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_more_than_one_percent_cannot_be_skipped(tmp_path, monkeypatch, in_memory, workers):
    write_large(tmp_path, dict.fromkeys((3, 5, 7), b"no image"))
    if not in_memory:
        monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    with pytest.raises(data.InputError, match="3 of 200 images of domain birds, split train"):
        _, batches = skipping(tmp_path)
        list(data.loaded(batches, [[(step, "birds") for step in range(20)]], workers))


def test_too_many_missing_files_cannot_be_skipped(tmp_path):
    write_large(tmp_path, dict.fromkeys((3, 5, 7)))
    with pytest.raises(data.InputError, match="3 of 200 images of domain birds, .* does not exist"):
        data.Benchmark(tmp_path, on_bad_image="skip").split("birds", "train")


@pytest.mark.parametrize("keep", [True, False])
def test_skipped_test_images_are_left_out(tmp_path, keep):
    files = write_large(tmp_path, {11: b"no image", 40: None})
    benchmark = data.Benchmark(tmp_path, on_bad_image="skip")
    images = data.TestImages(benchmark.split("birds", "train"), SIZE, keep=keep)
    batches = list(images.batches(64, 2))
    assert [len(batch) for batch in batches] == [64, 64, 64, 7]
    rows = images.usable_rows()
    usable = images.split.select(rows)
    assert len(usable) == 198 and set(benchmark.skipped) == {files[11], files[40]}
    assert torch.equal(torch.cat(batches)[rows], data.TestImages(usable, SIZE)[:])
    assert (usable.labels == images.split.labels[rows]).all()


# python data.py check -----------------------------------------------------------------------------


def run_check(capsys, *arguments):
    with pytest.raises(SystemExit) as status:
        data.main(["check", *map(str, arguments)])
    return status.value.code, *capsys.readouterr()


def test_check_of_good_data(uned, class_folders, capsys, tmp_path):
    for root in (uned, class_folders):
        status, out, _ = run_check(capsys, root, "--json", tmp_path / "report.json")
        assert status == 0 and out.endswith("0 problems\n"), out
    report = json.loads((tmp_path / "report.json").read_text())
    row = {"images": 16, "classes": 4, "classes_of_one_image": 0}
    assert report["domains"]["tools"]["train"] == row


def test_check_lists_everything(class_folders, capsys, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(class_folders, root)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    files = sorted((root / "plants").glob("*/*.jpg"))
    files[0].write_bytes(b"no image")
    files[5].write_bytes(files[5].read_bytes()[:-60])
    Image.new("RGB", (200, 100)).save(files[10])
    shutil.copyfile(files[15], files[20])
    for name in ("a.heic", "b.heic", "Thumbs.db"):
        (files[0].parent / name).write_bytes(b"x")
    status, out, _ = run_check(capsys, root, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 1 and out.endswith("3 problems\n")
    for file in (files[0], files[5], files[10]):
        assert sum(str(file) in problem for problem in report["problems"]) == 1
        assert out.count(str(file)) == 1
    assert [set(group) for group in report["copies"]] == [{str(files[15]), str(files[20])}]
    assert len(report["ignored"]) == 3 and all(f"ignored: {x}" in out for x in report["ignored"])
    assert any("ignored 2 .heic, 1 .db" in note for note in report["notes"])


def test_check_of_manifests(tmp_path, capsys):
    root = write_uned(tmp_path / "data")
    (root / "info_files" / "cars" / "val.json").write_text("[")
    file = root / "info_files" / "birds" / "train.json"
    entries = json.loads(file.read_text())
    contradictions = [{**entry, "class_id": 77} for entry in entries[:3]]
    file.write_text(json.dumps([*entries, *contradictions, {"path": "no.png", "class_id": 0}]))
    test = root / "info_files" / "birds" / "test.json"
    test.write_text(json.dumps(json.loads(test.read_text()) + entries[:4]))
    status, out, _ = run_check(capsys, root)
    assert status == 1 and out.endswith("5 problems\n"), out
    assert out.count("has the labels") == 3 and "no.png does not exist" in out
    assert "val.json is not JSON" in out and "4 files are shared by birds/train, birds/test" in out


@pytest.mark.parametrize("arguments", [["missing"], ["data", "--json", "no/such/file"], []])
def test_usage_mistakes_of_check(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write_uned(tmp_path / "data", images=1)
    status, _, error = run_check(capsys, *arguments)
    assert status == 2 and error.startswith("data.py") and error.count("\n") == 1, error
