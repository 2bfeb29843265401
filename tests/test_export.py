"""The student alone: checkpoint.py export, its model card, ONNX, and what reads such files."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import export
import images
import pretrained
import search
from model import UDON, ViT

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(student_run, tmp_path_factory):
    """student.pt and half.pt of the run."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint.export(student_run, folder / "student.pt")
    checkpoint.export(student_run / "best.pt", folder / "half.pt", half=True)
    return folder


def pixels(count, side=32, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)
    return torch.from_numpy(values)


@torch.no_grad()
def embedded(model, contents, batch):
    statistics = contents["preprocessing"]
    return model.embed(images.normalise(batch, statistics["mean"], statistics["std"]))


# The file -----------------------------------------------------------------------------------------


def test_the_student_is_that_of_the_run_bit_for_bit(student_run, exported):
    (full, written), (student, contents) = map(
        checkpoint.load, (student_run, exported / "student.pt")
    )
    assert torch.equal(*(embedded(m, written, pixels(5)) for m in (full, student)))
    assert {name.split(".")[0] for name in contents["model"]} == {"backbone", "student_head"}
    for name in ("preprocessing", "step", "run", "class_names"):
        assert contents[name] == written[name], name


def test_class_names_are_those_of_the_directories(student_run, class_folders):
    contents = checkpoint.load(student_run)[1]
    classes = contents["architecture"]["classes"]
    names = contents["class_names"]
    assert {domain: len(part) for domain, part in names.items()} == classes
    benchmark = data.Benchmark(class_folders)
    for domain, part in names.items():
        split = benchmark.split(domain, "train")
        for row in range(len(split)):
            assert split.paths[row].split("/")[0] == part[split.classes[row]]


def test_class_names_of_manifests_are_their_ids(uned):
    assert data.Benchmark(uned).split("birds", "val").class_names == ["4", "5", "6", "7"]


def test_no_path_of_this_machine_is_in_the_file(student_run, exported, class_folders):
    contents = checkpoint.load(exported / "student.pt")[1]
    assert contents["config"]["data"] == class_folders.name
    raw = (exported / "student.pt").read_bytes() + (exported / "student.md").read_bytes()
    assert not any(os.fsencode(path) in raw for path in (student_run.parent, class_folders.parent))


def test_half_precision_is_rounding_alone(student_run, exported):
    full, contents = checkpoint.load(student_run)
    half = checkpoint.load(exported / "half.pt")[0]
    assert next(half.parameters()).dtype == torch.float32
    sizes = [(exported / name).stat().st_size for name in ("half.pt", "student.pt")]
    assert sizes[0] < 0.6 * sizes[1]
    rounded = {name: x.half().float() for name, x in full.state_dict().items()}
    full.load_state_dict(rounded)
    assert torch.equal(embedded(full, contents, pixels(3)), embedded(half, contents, pixels(3)))


def test_a_checkpoint_of_an_older_version_without_class_names(student_run, tmp_path):
    contents = checkpoint.read(student_run / "best.pt")
    del contents["class_names"]
    checkpoint.save(tmp_path / "old.pt", contents)
    checkpoint.export(tmp_path / "old.pt", tmp_path / "new.pt")
    assert "class_names" not in checkpoint.load(tmp_path / "new.pt")[1]


def test_undecodable_names_survive(student_run, tmp_path, capsys):
    """Of classes and domains, of the data, in the card and of the file itself."""
    odd = os.fsdecode(b"ros\xe9|\n")
    contents = checkpoint.read(student_run / "best.pt")
    contents |= {"class_names": {odd: [odd, "a\tb"]}}
    contents["config"]["data"] = f"/data/{odd}"
    contents["architecture"]["classes"][odd] = contents["architecture"]["classes"].pop("plants")
    for weights in [contents["model"]]:
        for key in [key for key in weights if ".plants." in key]:
            weights[key.replace("plants", odd)] = weights.pop(key)
    text = (student_run / "test.json").read_text().replace('"plants"', json.dumps(odd))
    (tmp_path / "test.json").write_text(text)
    checkpoint.save(tmp_path / "best.pt", contents)
    checkpoint.main(["export", str(tmp_path), f"{tmp_path}/{odd}.pt"])
    assert capsys.readouterr().out.count("\n") == 1
    assert checkpoint.load(f"{tmp_path}/{odd}.pt")[1]["class_names"] == contents["class_names"]
    card = Path(f"{tmp_path}/{odd}.md").read_text(encoding="utf-8")
    assert "| ros\\udce9\\|\\n | " in card and "Data: ros\\udce9|\\n." in card
    fails(capsys, "export", tmp_path, f"{tmp_path}/{odd}", named=["ros\\udce9"])


# What reads it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", ["student", "backbone"])
def test_evaluation_of_the_student_alone(student_run, exported, class_folders, tmp_path, embedding):
    results = []
    for number, source in enumerate((student_run, exported / "student.pt")):
        target = tmp_path / f"{number}.json"
        line = [source, "--data", class_folders, "--embedding", embedding, "--json", target]
        evaluate.main([*map(str, line)])
        results.append(json.loads(target.read_text()))
    assert results[0]["domains"] == results[1]["domains"]


@pytest.mark.parametrize(
    "more, named",
    [(["--embedding", "teacher"], "--embedding student"), ([], "data folder 'folders")],
)
def test_what_an_exported_student_cannot_be_evaluated_on(
    exported, class_folders, tmp_path, monkeypatch, capsys, more, named
):
    """Its teachers, and the data that it does not name by a path."""
    monkeypatch.chdir(tmp_path)
    data_option = ["--data", str(class_folders)] if more else []
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(exported / "student.pt"), *data_option, *more])
    sentence = capsys.readouterr().err
    assert stop.value.code == 2 and named in sentence and sentence.count("\n") == 1


@pytest.mark.parametrize("name", ["student.pt", "half.pt"])
def test_it_initialises_a_backbone(exported, name):
    model, contents = checkpoint.load(exported / name)
    vit = ViT(**contents["architecture"]["backbone"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has to be assumed
        statistics = pretrained.load(vit, exported / name)
    assert statistics.mean == tuple(contents["preprocessing"]["mean"])
    for key, value in vit.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key]), key


def test_the_lines_of_the_card_for_elsewhere(exported, tmp_path):
    """With a copy of model.py and nothing else of this project."""
    code = (exported / "half.md").read_text().split("```python\n")[2].split("```")[0]
    for path in (ROOT / "model.py", exported / "half.pt"):
        shutil.copy(path, tmp_path)
    model, contents = checkpoint.load(exported / "half.pt")
    batch = images.normalise(pixels(4), *(contents["preprocessing"][x] for x in ("mean", "std")))
    torch.save(batch, tmp_path / "images.pt")
    (tmp_path / "elsewhere.py").write_text(
        f"import torch\nimages = torch.load('images.pt')\n{code}\ntorch.save(vectors, 'out.pt')"
    )
    subprocess.run([sys.executable, "elsewhere.py"], cwd=tmp_path, check=True)
    with torch.no_grad():  # that process may use another number of threads
        assert torch.allclose(torch.load(tmp_path / "out.pt"), model.embed(batch), atol=1e-6)


# ONNX ---------------------------------------------------------------------------------------------


def session(path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    return onnxruntime.InferenceSession(path)


@pytest.fixture(scope="module", params=["half", "tiny"])
def network(request, exported):
    """An exported network: half, of the run with its convolutional stem; tiny, of a ViT as
    published, in single precision, on bicubic images. Its path,
    the model and the contents of its checkpoint."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    source = exported / f"{request.param}.pt"
    if request.param == "tiny":
        backbone = ViT(image_size=32, patch_size=16, width=16, depth=1, heads=2, pre_norm=True)
        model = UDON(backbone, {}, teacher_dim=0)
        architecture = {"backbone": backbone.architecture, "classes": {}, "teacher_dim": 0}
        architecture |= {"student_dim": 64, "head_layers": 1}
        contents = checkpoint.read(exported / "half.pt")
        contents |= {"model": model.state_dict(), "architecture": architecture}
        contents["preprocessing"] = contents["preprocessing"] | {"interpolation": "bicubic"}
        contents["card"] = export.card(contents, None)
        checkpoint.save(source, contents)
    checkpoint.export(source, source.with_suffix(".onnx"), half=request.param == "half")
    return source.with_suffix(".onnx"), *checkpoint.load(source)


def test_onnx_equals_torch_for_any_batch(network):
    path, model, contents = network
    onnx = session(path)
    for count in (1, 2, 5):
        batch = pixels(count, seed=count)
        (vectors,) = onnx.run(["vectors"], {"images": batch.numpy()})
        expected = embedded(model, contents, batch).numpy()
        assert vectors.dtype == np.float32 and vectors.shape == expected.shape
        assert np.abs(vectors - expected).max() < 1e-5
    about = onnx.get_modelmeta().custom_metadata_map
    for name in ("class_names", "step", "card"):
        assert json.loads(about[name]) == contents[name], name
    assert path.stat().st_size < 1.2 * path.with_suffix(".pt").stat().st_size + 50_000
    assert os.fsencode(str(ROOT)) not in path.read_bytes()


def test_the_lines_of_the_card_for_onnx(network, tmp_path, monkeypatch):
    path, model, contents = network
    session(path)
    assert f"pixels, {contents['preprocessing']['interpolation']}, with anti" in contents["card"]
    for file in (path, path.with_suffix(".md")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    picture = Image.fromarray(pixels(1, side=61)[0].permute(1, 2, 0).numpy())
    picture.resize((60, 41)).save("a.jpg", exif=exif)
    names = {}
    exec(Path(path.stem + ".md").read_text().split("```python\n")[3].split("```")[0], names)
    expected = search.Embedder(path.with_suffix(".pt"), "cpu").embed(["a.jpg"])
    assert np.abs(names["vectors"] - expected).max() < 1e-5


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(student_run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"{package}.*pip install -e '.\[export\]'"
    ):
        checkpoint.export(student_run, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported(student_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

    def refuse(*_, **__):
        raise NotImplementedError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(checkpoint.CheckpointError, match="no such operator.: export to .pt"):
        checkpoint.export(student_run, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


# The model card -----------------------------------------------------------------------------------


def test_the_card_has_the_numbers_of_the_test(student_run, exported):
    text = (exported / "student.md").read_text()
    results = json.loads((student_run / "test.json").read_text())
    for domain, row in results["domains"].items():
        cells = [results["images"][domain], row["queries"], row["index"]]
        cells += [f"{100 * row[x]:.2f}" for x in ("recall_at_1", "mmp_at_5")]
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {domain} |"))
        assert f"| {' | '.join(map(str, cells))} |" in line
    assert "before rounding" not in text and "before rounding" in (exported / "half.md").read_text()
    assert "method udon-joint" in text and "non-commercial research" in text
    assert "{" not in text.replace('{"images": images}', ""), "a name was not filled in"


@pytest.mark.parametrize("change", ["missing", "step", "damaged", "list"])
def test_results_of_another_checkpoint_are_left_out(student_run, tmp_path, change):
    shutil.copy(student_run / "best.pt", tmp_path)
    results = json.loads((student_run / "test.json").read_text())
    text = {
        "step": json.dumps(results | {"step": results["step"] + 1}),
        "damaged": "{",
        "list": "[]",
    }.get(change)
    if text:
        (tmp_path / "test.json").write_text(text)
    card = checkpoint.export(tmp_path, tmp_path / "student.pt").read_text()
    assert "Test results: none" in card and "R@1" not in card


@pytest.mark.parametrize(
    "init, named",
    [
        ("compact", "non-commercial research and education only"),
        ("scratch", "The terms of the training images apply."),
        ("B_16.npz", "initial weights, `B_16.npz`,"),
        ("timm", "timm's weights of timm:vit_tiny"),
    ],
)
def test_the_card_states_the_licence(student_run, init, named):
    contents = checkpoint.read(student_run / "best.pt")
    contents["config"] |= {"init": init, "model": "timm:vit_tiny"}
    assert named in export.card(contents, None).split("## Licence")[1]


def test_the_card_of_converted_weights(student_run):
    """flax_weights.py knows no option of theirs."""
    contents = checkpoint.read(student_run / "best.pt")
    text = export.card(contents | {"config": {"data": None, "domains": None}}, None)
    assert "Options: unknown" in text and "Data: unknown" in text
    assert "the authors of the weights" in text.split("## Licence")[1]


def test_the_card_of_a_timm_backbone_names_its_module(student_run):
    contents = checkpoint.read(student_run / "best.pt")
    contents["architecture"]["backbone"] = {"timm": "vit_tiny_patch16_224", "image_size": 64}
    text = export.card(contents, None)
    assert "from timm_backbone import TimmBackbone" in text and "(B, 3, 64, 64)" in text


# Mistakes -----------------------------------------------------------------------------------------


def fails(capsys, *arguments, named):
    with pytest.raises(SystemExit) as stop:
        checkpoint.main([*map(str, arguments)])
    sentence = capsys.readouterr().err
    assert stop.value.code == 2 and sentence.count("\n") == 1, sentence
    assert all(str(name) in sentence for name in named), sentence


def test_the_command(student_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.main(["export", str(student_run), "a.pt", "--half"])
    printed = capsys.readouterr().out
    assert printed.startswith("a.pt: ") and printed.endswith("a.md: its model card\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "a.pt"]


def test_mistakes(student_run, tmp_path, capsys):
    notes = tmp_path / "README.md"
    notes.write_text("mine")
    export_ = ("export", student_run)
    fails(capsys, named=["command"])
    fails(capsys, *export_, named=["FILE"])
    fails(capsys, *export_, tmp_path / "a.bin", named=["a.bin", ".onnx"])
    fails(capsys, *export_, tmp_path, named=[tmp_path])
    fails(capsys, *export_, tmp_path / "no" / "a.pt", named=["no/a.pt"])
    fails(capsys, *export_, tmp_path / "README.pt", named=[notes])
    fails(capsys, "export", tmp_path, tmp_path / "a.pt", named=[tmp_path / "best.pt"])
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    fails(capsys, "export", tmp_path, tmp_path / "a.pt", named=[tmp_path / "best.pt", "damaged"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "best.pt"]
    assert notes.read_text() == "mine"


def test_a_run_without_a_student(student_run, tmp_path, capsys):
    contents = checkpoint.read(student_run / "best.pt")
    contents["config"] |= {"weights": (1.0, 0.0, 0.0, 0.0), "method": "teachers"}
    checkpoint.save(tmp_path / "a.pt", contents)
    named = ["no trained student", "teachers", "udon-joint"]
    fails(capsys, "export", tmp_path / "a.pt", tmp_path / "b.pt", named=named)


def test_a_full_disk_leaves_nothing(student_run, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        fails(capsys, "export", student_run, tmp_path / "a.pt", named=["a.pt", "File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_model_without_heads_of_domains_is_valid():
    model = UDON(ViT(16, 8, 8, 1, 2), {}, student_dim=4, teacher_dim=0)
    assert model.embed(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_nothing_is_logged_without_torchvision(student_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    messages = []
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    monkeypatch.setattr(logger, "handle", messages.append)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    checkpoint.export(student_run, tmp_path / "a.onnx")
    assert not messages
