"""features.py: features of a frozen backbone, runs that train on them, kills and refusals."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from conftest import write_uned
from test_distributed import job
from torch import nn

import checkpoint
import config
import data
import evaluate
import features
import udon
from benchmarks import faults
from config import Config, ConfigError
from run import build_model
from sampler import DomainSampler

VIEWS, SIZE = 2, 32
SMALL = dict(preset="micro", init="scratch", image_size=SIZE, batch_size=4, period=4, workers=0)
SMALL |= dict(views=VIEWS, device="cpu", val_every=5, steps=12, freeze_backbone=True)
SMALL |= dict(student_init="lecun")
SECONDS = 60  # for a run of about one, on a busy machine


def options_of(**changes) -> list[str]:
    """The command line of SMALL with changes."""
    words = []
    for name, value in {**SMALL, **changes}.items():
        words += [config.flag(name)] + ([] if value is True else [str(value)])
    return words


def train(out, **changes):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        udon.main(["train", *options_of(**changes), "--out", str(out)])
    return printed.getvalue()


def resume(out):
    udon.main(["train", "--out", str(out), "--resume"])


def rows_of(out):
    """{domain: features} of a run."""
    return {path.stem: np.load(path) for path in sorted((out / "features").glob("*.npy"))}


def assert_same_run(one, other):
    assert faults.difference(one, other) == ""
    assert_same_features(one, other)


def assert_same_features(one, other):
    one, other = rows_of(one), rows_of(other)
    assert one.keys() == other.keys()
    for domain, rows in one.items():
        assert np.array_equal(rows, other[domain]), domain


@pytest.fixture(autouse=True)
def short_batches(monkeypatch):
    """Four images at once: several batches of features in each domain."""
    monkeypatch.setattr(features, "PASSES", 4 * (1 + VIEWS))


@pytest.fixture(scope="module")
def finished(uned, tmp_path_factory):
    """An undisturbed run, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "PASSES", 4 * (1 + VIEWS))
        out = tmp_path_factory.mktemp("features") / "finished"
        return out, train(out, data=uned)


def start_of(uned, **changes):
    """The images, the initial model and the preprocessing of the run."""
    benchmark = data.Benchmark(uned)
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    settings = Config(**SMALL | changes)
    images = data.TrainBatches(splits, SIZE, 4, settings.seed, keep=False)
    classes = {domain: split.num_classes for domain, split in splits.items()}
    model, _, preprocessing = build_model(settings, classes)
    return images, model.eval(), preprocessing


# What the features are ----------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_those_of_the_test_view_and_of_training_crops(uned, finished):
    """The features of a view are among those of all 6 x 6 crops of the image and their mirror
    images, as the backbone embeds them, rounded to float16."""
    images, model, preprocessing = start_of(uned)
    statistics = preprocessing["mean"], preprocessing["std"]
    seen = set()
    for domain, rows in rows_of(finished[0]).items():
        split = images.splits[domain]
        assert rows.shape == (20, 1 + VIEWS, 96) and rows.dtype == np.float16
        tests = evaluate.embed(
            model.embed_backbone, data.TestImages(split, SIZE), preprocessing, "cpu"
        )
        assert (torch.from_numpy(rows[:, 0]) - tests).abs().max() < 2**-11
        for row in (0, 3, 7, 12, 19):
            whole = data.prepare_train(split.image(row), SIZE).transpose(2, 0, 1)
            crops = [whole[:, y : y + SIZE, x : x + SIZE] for y in range(6) for x in range(6)]
            crops = torch.from_numpy(np.stack([*crops, *(crop[:, :, ::-1] for crop in crops)]))
            embedded = model.embed_backbone(data.normalise(crops, *statistics)).numpy()
            for view in rows[row, 1:].astype(np.float32):
                errors = np.abs(embedded - view).max(1)
                assert errors.min() < 2**-11 < np.median(errors)
                seen.add(int(errors.argmin()))
    assert len(seen) > 6, "the crops vary"


def test_batches_hold_the_images_of_ordinary_batches(uned):
    """Numbers in place of features say which image and view a batch holds."""
    images, _, _ = start_of(uned)
    numbers = np.arange(20 * 3).reshape(20, 3, 1)
    batches = features.FeatureBatches(images, dict.fromkeys(images.splits, numbers))
    whole = [batches[step, "cars"] for step in range(30)]
    views = set()
    for step, (found, labels) in enumerate(whole):
        rows = images.rows(step, "cars")[1]
        assert (found[:, 0] // 3).tolist() == rows.tolist()
        assert labels.tolist() == images[step, "cars"][1].tolist()
        views |= set((found[:, 0] % 3).tolist())
    assert views == {0, 1, 2}
    images.share = slice(1, 3)  # of one of several processes
    for step, (found, labels) in enumerate(whole):
        part = batches[step, "cars"]
        assert torch.equal(part[0], found[1:3]) and torch.equal(part[1], labels[1:3])


@pytest.mark.parametrize("method", ["udon-joint", "usc"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_on_features_equal_steps_on_images(uned, method, accumulate):
    """In float32, the backbone frozen for the first epoch where the images are given."""
    states = []
    for frozen in (False, True):
        _, model, preprocessing = start_of(uned)
        about = dict(method=method, accumulate=accumulate, freeze_backbone=frozen, views=4)
        settings = Config(**SMALL | about)
        run = udon.Run(
            *(settings, model.train(), {}, preprocessing, udon.build_optimizer(model, settings)),
            *(DomainSampler(["birds", "cars"], period=4), "cpu", 10, {}),
        )
        generator = torch.Generator().manual_seed(0)
        shape = (6, 3, SIZE, SIZE)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 4, (6,), generator=generator)
        if frozen:
            with torch.no_grad():
                images = model.backbone(data.normalise(images, (0.5,) * 3, (0.5,) * 3))
        batches = iter([("cars", images, labels), ("birds", images, labels)])
        losses = [udon.training_step(run, batches)[1].total for _ in range(2)]
        for parameter in model.backbone.parameters():
            assert parameter.grad is None and parameter not in run.optimizer.state
        states.append(model.state_dict() | {"losses": torch.tensor(losses)})
    for name, value in states[0].items():
        assert (value - states[1][name]).abs().max() < 1e-6, name


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_says_what_it_costs_beforehand(finished):
    printed = finished[1]
    assert "features of 40 training images, 3 views of each: 120 images through the" in printed
    assert "0.0 MB in" in printed and "features 120 of 120" in printed
    assert "images/s   0:00:00 left" in printed
    assert "the backbone is not trained: --backbone-lr and --frozen-epochs have no" in printed


def test_results_equal_those_of_evaluate(finished, tmp_path):
    out, _ = finished
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.main([str(out / "best.pt"), "--json", str(tmp_path / "out.json")])
    found = json.loads((out / "test.json").read_text())
    expected = json.loads((tmp_path / "out.json").read_text())
    assert (found["mean"], found["domains"]) == (expected["mean"], expected["domains"])


def test_nothing_of_the_backbone_changes(uned, finished):
    _, model, _ = start_of(uned)
    initial, last = model.backbone.state_dict(), checkpoint.read(finished[0] / "last.pt")
    for name in ("best.pt", "last.pt"):
        model, contents = checkpoint.load(finished[0] / name)
        assert contents["step"] > 0
        assert faults.same(initial, model.backbone.state_dict()), name
        assert not faults.same(start_of(uned)[1].student_head.weight, model.student_head.weight)
    groups = last["optimizer"]["param_groups"]
    assert groups[0]["lr"] == 0 and not set(groups[0]["params"]) & last["optimizer"]["state"].keys()
    lines = map(json.loads, (finished[0] / "metrics.jsonl").read_text().splitlines())
    assert {line["backbone_lr"] for line in lines if "domain" in line} == {0.0}


def test_features_of_test_images_are_found_again(uned, tmp_path):
    """Those of the same images and backbone alone, unless the file is damaged."""
    _, model, preprocessing = start_of(uned)
    sets = evaluate.open_sets(data.Benchmark(uned), "val", SIZE)
    known = features.TestFeatures(tmp_path, model, preprocessing)
    expected = evaluate.evaluate(model, sets, preprocessing, features=known)
    assert expected == evaluate.evaluate(model, sets, preprocessing)
    known = features.TestFeatures(tmp_path, model, preprocessing)
    images = evaluate.open_sets(data.Benchmark(uned), "val", SIZE)["cars"].queries
    assert images in known and known[images].shape == (20, 96)
    assert data.TestImages(images.split, SIZE + 1) not in known
    assert evaluate.open_sets(data.Benchmark(uned), "test", SIZE)["cars"].queries not in known
    for change in ({"std": (0.4,) * 3}, {"interpolation": "bicubic"}):
        assert images not in features.TestFeatures(tmp_path, model, preprocessing | change)
    older = {name: preprocessing[name] for name in ("mean", "std", "antialias")}  # is bilinear
    assert images in features.TestFeatures(tmp_path, model, older)
    os.truncate(known.path(images), 500)
    known = features.TestFeatures(tmp_path, model, preprocessing)
    assert images not in known
    assert evaluate.evaluate(model, sets, preprocessing, features=known) == expected
    model.backbone.cls_token.data += 1
    assert images not in features.TestFeatures(tmp_path, model, preprocessing)


def test_images_are_embedded_once(uned, tmp_path, monkeypatch):
    """Those of validation, too, however often it comes; a run that is done needs no features."""
    counts, normalise = [], data.normalise
    monkeypatch.setattr(data, "normalise", lambda *x: counts.append(len(x[0])) or normalise(*x))
    train(tmp_path / "run", data=uned, val_every=2)
    assert sum(counts) == 40 * (1 + VIEWS) + 40 + (20 + 10 + 10)  # train, val, test and index
    counts.clear()
    udon.main(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "14"])
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 14 and not counts
    for path in (tmp_path / "run" / "features").glob("*.npy"):
        path.unlink()
    resume(tmp_path / "run")
    assert not counts and not list((tmp_path / "run" / "features").glob("*.npy"))


def test_compared_methods_share_the_features(uned, tmp_path):
    printed = train(tmp_path / "run", data=uned, method="udon-joint", compare="usc")
    assert printed.count("images through the backbone") == 1
    assert not (tmp_path / "run" / "usc" / "features").exists()
    assert (tmp_path / "run" / "usc" / "test.json").exists()


def test_a_backbone_of_ones_own(uned, tmp_path):
    """BatchNorm and dropout are those of evaluation, although the heads are in training."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten()
    own = nn.Sequential(*layers)
    own.width = 128
    before = {name: value.clone() for name, value in own.state_dict().items()}
    settings = Config(**SMALL | {"data": str(uned), "out": str(tmp_path / "run"), "ema": 0.9})
    with contextlib.redirect_stdout(io.StringIO()):
        found = udon.train(settings, backbone=own)
    assert faults.same(before, dict(own.state_dict()))
    model, contents = checkpoint.load(tmp_path / "run" / "best.pt", backbone=own)
    sets = evaluate.open_sets(data.Benchmark(uned), "test", SIZE)
    expected = evaluate.evaluate(model, sets, contents["preprocessing"])
    assert found["domains"] == expected["domains"]
    split = data.Benchmark(uned).split("cars", "train")
    tests = evaluate.embed(
        model.embed_backbone, data.TestImages(split, SIZE), contents["preprocessing"], "cpu"
    )
    assert np.abs(rows_of(tmp_path / "run")["cars"][:, 0] - tests.numpy()).max() < 2**-11


def train_on_two_processes(out, **changes):
    ended = job(2, lambda rank: train(out, **changes), out.parent)
    assert [process.status for process in ended] == [0, 0], ended


def test_two_processes_equal_one(uned, finished, tmp_path):
    """Features bit for bit; weights up to the order of sums."""
    out = tmp_path / "two"
    train_on_two_processes(out, data=uned)
    assert_same_features(finished[0], out)
    one, two = (checkpoint.read(path / "last.pt")["model"] for path in (finished[0], out))
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-3 * value.abs().max(), name


# Interruptions ------------------------------------------------------------------------------------


@contextlib.contextmanager
def signal_at(place, call, number):
    """Sends a signal to this process at one of the calls of a function, counted from 0."""
    module, name = place
    function, count = getattr(module, name), iter(range(10**6))

    def counted(*arguments):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        yield


COMPUTING, TRAINING = (features, "embedded"), (udon, "training_step")


@pytest.mark.parametrize(
    "place, call, number, rows",
    [
        (COMPUTING, 0, signal.SIGTERM, [4, 0]),  # the batch is finished
        (COMPUTING, 6, signal.SIGINT, [20, 8]),
        (COMPUTING, 9, signal.SIGTERM, [20, 20]),
        (TRAINING, 7, signal.SIGTERM, [20, 20]),
    ],
)
def test_an_interrupted_run_is_resumed(uned, finished, tmp_path, capsys, place, call, number, rows):
    out = tmp_path / "run"
    with signal_at(place, call, number), pytest.raises(SystemExit) as end:
        udon.main(["train", *options_of(data=uned), "--out", str(out)])
    assert end.value.code == 128 + number
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"interrupted; resume with: python udon.py train --out {out} --resume"
    about = json.loads((out / "features" / "about.json").read_text())
    assert list(about["rows"].values()) == rows
    resume(out)
    done = 3 * sum(rows)
    assert (f"{done:,} of them done" in capsys.readouterr().out) == (done < 120)
    assert_same_run(finished[0], out)


@pytest.mark.parametrize("place, call", [(COMPUTING, 1), (COMPUTING, 7), (TRAINING, 8)])
def test_a_killed_run_is_resumed(uned, finished, tmp_path, monkeypatch, place, call):
    """SIGKILL; the progress is saved after each batch, or not at all before."""
    monkeypatch.setattr(features, "SAVE_SECONDS", -1 if call == 7 else 1000)
    out = tmp_path / "run"

    def killed():
        with signal_at(place, call, signal.SIGKILL):
            train(out, data=uned)

    process = faults.fork(killed, tmp_path / "log", tmp_path)
    assert faults.wait(process, SECONDS) == -signal.SIGKILL
    resume(out)
    assert_same_run(finished[0], out)


def test_a_signal_to_a_process_that_waits_for_another_one(uned, tmp_path):
    embedded = features.embedded

    def run(rank):
        def first(*arguments):
            features.embedded = embedded
            if rank == 0:
                time.sleep(0.4)
            else:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return embedded(*arguments)

        features.embedded = first
        train(tmp_path / "run", data=uned)

    ended = job(2, run, tmp_path)
    assert ended[1].status == 143, ended
    about = json.loads((tmp_path / "run" / "features" / "about.json").read_text())
    assert 0 < sum(about["rows"].values()) < 40


def test_a_bad_image_is_skipped_and_stays_known(tmp_path, monkeypatch):
    """Batches have others in its place, also after an interruption, and it is listed at the end;
    likewise if the second of two processes finds it."""
    write_uned(tmp_path / "data", domains=("birds",), images=50)
    bad, row = tmp_path / "data" / "images" / "birds" / "train" / "0_21.png", 21
    bad_test = tmp_path / "data" / "images" / "birds" / "test" / "8_3.png"
    for path in (bad, bad_test):
        path.write_bytes(b"no image")
    changes = dict(data=tmp_path / "data", on_bad_image="skip", batch_size=50, workers=1)
    one, two, drawn = tmp_path / "one", tmp_path / "two", []
    getitem = features.FeatureBatches.__getitem__

    def recorded(self, key):
        rows, labels = getitem(self, key)
        drawn.append((rows.numpy()[:, None] == self.features["birds"][row]).all(2).any())
        return rows, labels

    with monkeypatch.context() as patch:
        patch.setattr(features.FeatureBatches, "__getitem__", recorded)
        with signal_at(TRAINING, 4, signal.SIGTERM), pytest.raises(SystemExit):
            train(one, **changes)
        resume(one)
    assert len(drawn) == 12 and not any(drawn)
    train_on_two_processes(two, **changes)
    for out in (one, two):
        assert json.loads((out / "skipped.json").read_text()).keys() == {str(bad), str(bad_test)}
        assert json.loads((out / "test.json").read_text())["domains"]["birds"]["queries"] == 199
        about = json.loads((out / "features" / "about.json").read_text())
        assert about["bad_rows"]["birds"].keys() == {str(row)}
    assert_same_features(one, two)


# Refusals -----------------------------------------------------------------------------------------


def refusal(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        udon.main(["train", *map(str, arguments)])
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == 1, (end.value.code, stderr)
    return stderr


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"seed": 1}, "the weights of the backbone and --seed are others"),
        ({"image_size": 48}, "--image-size"),
        ({"min_area": 0.5}, "--min-area are others"),
        ({"no_antialias": True}, "the preprocessing are others"),
        ({"domains": "birds"}, "the images are others"),
    ],
)
def test_features_of_another_run_are_refused(uned, finished, tmp_path, capsys, changes, name):
    """A directory of features may be used again for the same ones only."""
    (tmp_path / "features").symlink_to(finished[0] / "features")
    arguments = [*options_of(data=uned, **changes), "--out", tmp_path]
    sentence = refusal(capsys, *arguments)
    assert name in sentence and "delete that directory" in sentence


def test_features_of_an_equal_run_are_used_again(uned, finished, tmp_path):
    """Also those of an older version, whose bilinear preprocessing did not say so."""
    (tmp_path / "features").symlink_to(finished[0] / "features")
    identity = json.loads((tmp_path / "features" / "about.json").read_text())["identity"]
    assert identity["the preprocessing"].keys() == {"mean", "std", "antialias"}
    assert "through the backbone" not in train(tmp_path, data=uned, method="usc", head_lr=0.1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "cars.npy").unlink(),
        lambda folder: os.truncate(folder / "cars.npy", 1000),
        lambda folder: np.save(folder / "cars.npy", np.zeros((20, 3, 95), np.float16)),
        lambda folder: (folder / "about.json").write_text("{"),
        lambda folder: (folder / "about.json").write_text("[]"),
        lambda folder: change(folder / "about.json", rows={"birds": 20, "cars": 21}),
        lambda folder: change(folder / "about.json", bad_rows={"birds": {}, "cars": {"20": ""}}),
        lambda folder: change(folder / "about.json", cpu_seconds=None),
    ],
)
def test_damaged_features_are_refused(uned, finished, tmp_path, capsys, damage):
    shutil.copytree(finished[0] / "features", tmp_path / "features")
    damage(tmp_path / "features")
    sentence = refusal(capsys, *options_of(data=uned), "--out", tmp_path)
    assert "are damaged" in sentence and "delete that directory" in sentence


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_full_disk_is_a_sentence(uned, tmp_path, capsys):
    """last.pt fits, 1,000 views of 20 images do not, which shows before they are computed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        sentence = refusal(capsys, *options_of(data=uned, views=1000), "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "birds.npy cannot be used (File too large)" in sentence and "--resume" in sentence


class FullDisk(io.FileIO):
    def write(self, value):
        raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_later_is_a_sentence(uned, tmp_path, monkeypatch, capsys):
    """On systems that cannot set room aside beforehand."""
    opens = {"wb": open, "r+b": lambda path, mode: FullDisk(path, "r+")}
    monkeypatch.setattr(features, "open", lambda *x: opens[x[1]](*x), raising=False)
    sentence = refusal(capsys, *options_of(data=uned), "--out", tmp_path / "run")
    assert "birds.npy cannot be used (No space left on device)" in sentence


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(distill_into_backbone=True), ["--distill-into-backbone", "--freeze-backbone"]),
        (dict(checkpoint_activations=True), ["--checkpoint-activations", "--freeze-backbone"]),
        (dict(method="distill", teachers="x"), ["--teachers is x", "--freeze-backbone"]),
        (dict(views=0, min_area=0.3), ["--min-area is 0.3", "--views 0"]),
        (dict(freeze_backbone=False, views=3), ["--views is 3", "--freeze-backbone"]),
    ],
)
def test_contradictory_options(options, words):
    with pytest.raises(ConfigError) as error:
        Config(**{"freeze_backbone": True} | options)
    assert all(word in str(error.value) for word in words)


def test_defaults_of_a_frozen_backbone():
    assert Config(freeze_backbone=True).save_every == 2000
    assert Config(freeze_backbone=True, preset="mini").ema == 0
    assert Config(freeze_backbone=True, save_every=3).save_every == 3
    assert Config(freeze_backbone=True, views=0).views == 0
