"""checkpoint.py: saving and loading, damage, absurd descriptions, all or nothing."""

import json
import os
import re
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
from checkpoint import CheckpointError
from model import UDON, ViT

ARCHITECTURE = {
    "backbone": ViT(image_size=16, patch_size=8, width=8, depth=2, heads=2).architecture,
    "classes": {"birds": 5, "cars.old": 3},
    "student_dim": 6,
    "teacher_dim": 10,
    "head_layers": 1,
}


def contents_of(seed=0, **changes):
    """What a run writes to best.pt."""
    torch.manual_seed(seed)
    return {
        "model": checkpoint.build(ARCHITECTURE).state_dict(),
        "architecture": ARCHITECTURE,
        "preprocessing": {"mean": (0.5,) * 3, "std": (0.25,) * 3, "antialias": True},
        "step": 7,
        "embedding": "student",
        "index": "merged",
        "config": {"data": None, "domains": None},
        "run": "1",
        **changes,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    checkpoint.save(path, contents_of())
    return path


# What is saved is loaded --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"teacher_dim": 0}, {"head_layers": 3}], ids=str)
def test_a_saved_model_is_loaded(tmp_path, changes):
    architecture = ARCHITECTURE | changes
    torch.manual_seed(1)
    model = checkpoint.build(architecture)
    written = contents_of(model=model.state_dict(), architecture=architecture)
    checkpoint.save(tmp_path / "best.pt", written)
    loaded, contents = checkpoint.load(tmp_path / "best.pt")
    assert isinstance(loaded, UDON) and not loaded.training
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        for one, other in zip(loaded(images, "cars.old"), model.eval()(images, "cars.old")):
            assert (one is None and other is None) or torch.equal(one, other)
    names = written.keys() - {"model"}
    assert {name: contents[name] for name in names} == {name: written[name] for name in names}
    assert isinstance(contents["version"], int)


def test_a_checkpoint_is_tensors_and_plain_values(saved):
    """A plain torch.load with weights_only reads it, digest and all."""
    contents = torch.load(saved, weights_only=True)
    assert contents["model"].keys() == checkpoint.build(ARCHITECTURE).state_dict().keys()


def test_a_model_keeps_the_family_of_its_weights(tmp_path):
    backbone = ViT(16, 8, 8, 2, 2, activation="quick_gelu", norm_eps=1e-5, pre_norm=True)
    architecture = ARCHITECTURE | {"backbone": backbone.architecture}
    model = checkpoint.build(architecture)
    written = contents_of(model=model.state_dict(), architecture=architecture)
    checkpoint.save(tmp_path / "best.pt", written)
    loaded, _ = checkpoint.load(tmp_path / "best.pt")
    assert loaded.backbone.architecture == backbone.architecture


# Damage -------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_a_flipped_bit_is_found(saved, data):
    raw = bytearray(saved.read_bytes())
    last = data.draw(st.booleans())  # the digest is at the end
    position = data.draw(st.integers(len(raw) - 100 if last else 0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path = saved.with_name("flipped.pt")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="flipped.pt is not a checkpoint of this version"):
        checkpoint.load(path)


@settings(max_examples=60)
@given(st.data())
def test_a_truncated_or_extended_file_is_found(saved, data):
    raw = saved.read_bytes()
    path = saved.with_name("other.pt")
    more = data.draw(st.binary(min_size=1, max_size=80))
    length = data.draw(st.integers(0, len(raw) - 1))
    for changed in (raw[:length], raw + more, more + raw):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="other.pt is not a checkpoint"):
            checkpoint.load(path)


class Malicious:
    """Unpickling it would make a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_unpickling_runs_no_code(tmp_path):
    checkpoint.save(tmp_path / "a.pt", contents_of(run=Malicious(tmp_path / "made")))
    with pytest.raises(CheckpointError, match="a.pt is not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [None, [], torch.zeros(3), {}, {"model": {}}], ids=str)
def test_other_files_are_no_checkpoints(tmp_path, value):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt is not a checkpoint of this version"):
        checkpoint.load(tmp_path / "a.pt")


def test_files_of_other_versions(tmp_path):
    torch.save(contents_of(), tmp_path / "old.pt")  # with "config", without "version"
    with pytest.raises(CheckpointError, match="old.pt was written by an older version"):
        checkpoint.load(tmp_path / "old.pt")
    for version in (1, 3, "2", None, 2.5):
        checkpoint.save(tmp_path / "new.pt", contents_of(version=version))
        with pytest.raises(CheckpointError, match="new.pt is not a checkpoint of this version"):
            checkpoint.load(tmp_path / "new.pt")


def test_paths_that_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "best.pt").mkdir()  # a directory stands for its best.pt
    for path in (tmp_path / "missing.pt", tmp_path / "best.pt", tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=f"checkpoint {re.escape(str(path))}.* does not"):
            checkpoint.load(path)


def test_the_directory_of_a_run_stands_for_its_best_checkpoint(saved):
    model, contents = checkpoint.load(saved.parent)
    assert contents["step"] == 7 and isinstance(model, UDON)


# Descriptions that no run writes ------------------------------------------------------------------

BACKBONE = {
    "depth": (10**6, 10**400, 0, -1, 1, 3, 2.0, "2", None, True),
    "width": (10**9, 16, 0, -8, 7, 8.0, "8", None, float("nan")),
    "image_size": (10**6, 10**18, 32, 17, 0, -16, 16.0, None),
    "patch_size": (1, 16, 0, -8, None),
    "heads": (10**9, 3, 0, -2, None),
    "mlp_ratio": (1e9, 10**400, -1, 3.9, float("nan"), float("inf"), None),
    "norm_eps": (0, -1e-6, 1, float("nan"), "1e-6", None),
    "activation": ("relu", None, 3, []),
    "stem": ("conv", "none", None),
    "pre_norm": (True,),
    "nonsense": (1,),
}
HEADS = {
    "backbone": ({}, None, [], 3, "b16"),
    "classes": (
        *({"birds": 5}, {"birds": 5, "cars.old": 4}, {"birds": 5, "cars.old": 10**12}),
        *({"birds": 5, "cars.old": 0}, {"birds": 5, "cars.old": -3}, {"birds": 5, "": 3}),
        *({"birds": 5, "cars.old": None}, {"birds": 5, 3: 3}, ["birds"], {}, None),
    ),
    "student_dim": (10**12, 7, 0, -6, 6.0, None),
    "teacher_dim": (10**12, 0, 9, -10, None),
    "head_layers": (10**6, 2, 0, None, "1"),
    "nonsense": (1,),
}
STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
DESCRIPTION = {
    "model": ({}, None, [], {"backbone.cls_token": 3}),
    "architecture": ({}, None, []),
    "step": (-1, "7", None, 7.5),
    "embedding": ("pixels", None, []),
    "index": ("all", None),
    "config": ({}, None, {"data": 3, "domains": None}, {"data": None, "domains": [1]}),
    "run": (None, 3),
    "class_names": (3, ["birds"], {"birds": 5}, {"birds": [3]}, {3: ["robin"]}),
    "preprocessing": (
        *({}, None, {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
        {"mean": (0.5,) * 2, "std": (0.5,) * 3, "antialias": True},
        {"mean": (0.5,) * 3, "std": (0.5, 0, 0.5), "antialias": True},
        {"mean": (float("nan"),) * 3, "std": (0.5,) * 3, "antialias": True},
        {"mean": ("a",) * 3, "std": (0.5,) * 3, "antialias": True},
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "antialias": "yes"},
        *(STATISTICS | {"antialias": True, "interpolation": x} for x in ("nearest", None, [], 2)),
        STATISTICS | {"antialias": False, "interpolation": "bicubic"},
    ),
}


def spoilt_descriptions():
    """Pairs of a name and the entries of a checkpoint that it stands for."""
    for name, values in BACKBONE.items():
        for value in values:
            backbone = ARCHITECTURE["backbone"] | {name: value}
            yield (
                f"backbone {name} {value}",
                {"architecture": {**ARCHITECTURE, "backbone": backbone}},
            )
    for name, values in HEADS.items():
        for value in values:
            yield f"{name} {value}", {"architecture": ARCHITECTURE | {name: value}}
    for name, values in DESCRIPTION.items():
        for value in values:
            yield f"{name} {value}", {name: value}


SPOILT = [pytest.param(changes, id=name[:60]) for name, changes in spoilt_descriptions()]


@pytest.mark.parametrize("changes", SPOILT)
def test_a_description_that_does_not_fit_is_refused(tmp_path, changes):
    """Before anything is built: a model of 10**6 layers would take hours."""
    checkpoint.save(tmp_path / "a.pt", contents_of(**changes))
    with pytest.raises(CheckpointError, match="a.pt is incomplete") as error:
        checkpoint.load(tmp_path / "a.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_interpolations(tmp_path):
    """Those that are known are loaded, another is named; older checkpoints have none."""
    for name in ("bilinear", "bicubic", "lanczos"):
        preprocessing = STATISTICS | {"antialias": True, "interpolation": name}
        checkpoint.save(tmp_path / "a.pt", contents_of(preprocessing=preprocessing))
        assert checkpoint.load(tmp_path / "a.pt")[1]["preprocessing"] == preprocessing
    older = contents_of()["preprocessing"]
    checkpoint.save(tmp_path / "a.pt", contents_of(preprocessing=older))
    assert checkpoint.load(tmp_path / "a.pt")[1]["preprocessing"] == older
    preprocessing["interpolation"] = "nearest"
    checkpoint.save(tmp_path / "a.pt", contents_of(preprocessing=preprocessing))
    with pytest.raises(
        CheckpointError, match="interpolation .* none of bilinear, bicubic, lanczos"
    ):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["model", "architecture", "preprocessing", "step", "config"])
def test_a_missing_entry_is_named(tmp_path, name):
    contents = contents_of()
    del contents[name]
    checkpoint.save(tmp_path / "a.pt", contents)
    with pytest.raises(CheckpointError, match=f"a.pt is incomplete .*{name}"):
        checkpoint.load(tmp_path / "a.pt")


def test_tensors_of_another_type_or_layout_are_refused(tmp_path):
    weights = contents_of()["model"]
    for change in (torch.Tensor.half, torch.Tensor.to_sparse):
        spoilt = weights | {"student_head.weight": change(weights["student_head.weight"])}
        checkpoint.save(tmp_path / "a.pt", contents_of(model=spoilt))
        with pytest.raises(CheckpointError, match="a.pt is incomplete"):
            checkpoint.load(tmp_path / "a.pt")


# All or nothing -----------------------------------------------------------------------------------


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_values_that_cannot_be_saved_leave_the_previous_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, contents_of())
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"function": lambda: 0})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_previous_file(tmp_path, monkeypatch, name):
    path = tmp_path / "last.pt"
    checkpoint.save(path, contents_of())
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, name, no_space)
        checkpoint.save(path, contents_of(seed=1))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_limit_of_the_operating_system_is_an_os_error(tmp_path):
    """torch.save makes a RuntimeError of it."""
    path = tmp_path / "last.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(path, {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_write_json(tmp_path):
    path, value = tmp_path / "a.json", {"a": [1, 2.5, None], "b": "ä"}
    checkpoint.write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    checkpoint.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and list(tmp_path.iterdir()) == [path]


def test_write_json_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, 1)
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(os, "replace", no_space)
        checkpoint.write_json(path, 2)
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


def test_write_json_names_a_path_that_cannot_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "a.json"):
        with pytest.raises(CheckpointError, match=f"file {re.escape(str(path))} cannot be written"):
            checkpoint.write_json(path, 1)
    assert not list(tmp_path.iterdir())


def test_write_json_writes_through_links_and_to_devices(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    checkpoint.write_json(link, 3)
    assert link.is_symlink() and target.read_text() == "3\n"
    checkpoint.write_json(os.devnull, 3)
    assert not os.path.isfile(os.devnull)
