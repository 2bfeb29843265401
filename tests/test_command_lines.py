"""The command lines as a user types them: end to end, and what they answer to mistakes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_uned

import checkpoint
import data
import evaluate
import pretrained
import udon

ROOT = Path(__file__).parents[1]
QUICK = "--preset micro --image-size 32 --batch-size 4 --steps 6 --period 8 --device cpu".split()


def run(*arguments, cwd=ROOT):
    """A process of its own -> exit status, stdout, stderr."""
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__"},
    )
    return finished.returncode, finished.stdout, finished.stderr


def train(*arguments):
    udon.main(["train", *map(str, arguments)])


def evaluated(path, *arguments):
    """The JSON file of an evaluation of the checkpoint `path`."""
    target = Path(path).with_suffix(".json")
    line = [path, "--device", "cpu", "--json", target, *arguments]
    evaluate.main([*map(str, line)])
    return json.loads(target.read_text())


def mean_row(text):
    """The cells of the first line of means in a table."""
    return next(line for line in text.splitlines() if line.startswith("mean ")).split()[1:]


def percentages(*results):
    values = [r["mean"][metric] for r in results for metric in ("recall_at_1", "mmp_at_5")]
    return [f"{100 * value:.2f}" for value in values]


# End to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(uned, tmp_path_factory):
    """The directory of a run, and what it printed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    status, stdout, stderr = run("udon.py", "train", "--data", uned, "--out", out, *QUICK)
    assert (status, stderr) == (0, ""), stderr
    return out, stdout


@pytest.fixture
def best(trained, tmp_path):
    """A checkpoint without its run, in a directory of its own."""
    return Path(shutil.copy(trained[0] / "best.pt", tmp_path / "model.pt"))


def test_training_ends_with_the_table(trained):
    out, stdout = trained
    result = json.loads((out / "test.json").read_text())
    assert mean_row(stdout) == percentages(result, result["backbone"])
    assert "R@1: the nearest neighbour" in stdout
    assert f"python evaluate.py {out / 'best.pt'} --data" in stdout.splitlines()[-1]


def test_evaluation_needs_the_checkpoint_alone_and_reproduces_the_table(trained, best, uned):
    """From another working directory; the data directory is named in the checkpoint."""
    target = best.with_name("out.json")
    status, stdout, stderr = run(
        ROOT / "evaluate.py", best.name, "--json", "out.json", cwd=best.parent
    )
    assert (status, stderr) == (0, ""), stderr
    assert str(uned) in stdout
    found, expected = (json.loads(p.read_text()) for p in (target, trained[0] / "test.json"))
    for name in ("mean", "domains", "split", "index", "embedding", "step", "data"):
        assert found[name] == expected[name], name
    for line in stdout.splitlines():
        if line.startswith(("birds", "cars", "mean")):
            assert any(other.startswith(line) for other in trained[1].splitlines()), line


@pytest.mark.parametrize(
    "embedding, index",
    [("student", "separate"), ("teacher", None), ("teacher", "separate"), ("backbone", "merged")],
)
def test_embeddings_and_indexes(best, uned, capsys, embedding, index):
    options = ["--split", "val", "--data", uned, "--embedding", embedding]
    result = evaluated(best, *options, *(["--index", index] if index else []))
    assert (result["index"], result["embedding"]) == (index or "separate", embedding)
    assert result["split"] == "val"
    cars = result["domains"]["cars"]
    assert cars["queries"] == cars["index"] == 20
    assert f"{embedding} embedding" in capsys.readouterr().out


def test_evaluation_uses_the_index_of_the_run(uned, tmp_path):
    train("--data", uned, "--out", tmp_path / "run", *QUICK, "--index", "separate")
    again = evaluated(tmp_path / "run" / "best.pt")
    expected = json.loads((tmp_path / "run" / "test.json").read_text(encoding="utf-8"))
    assert again["index"] == "separate" and again["mean"] == expected["mean"]


def test_evaluation_uses_the_embedding_and_index_of_the_method(uned, tmp_path):
    train("--data", uned, "--out", tmp_path / "run", *QUICK, "--method", "teachers")
    result = evaluated(tmp_path / "run" / "best.pt")
    assert (result["embedding"], result["index"]) == ("teacher", "separate")
    assert result["domains"] == json.loads((tmp_path / "run" / "test.json").read_text())["domains"]


def test_the_readmes_snippet(trained, uned, tmp_path, monkeypatch, capsys):
    """It embeds a picture as evaluation does, and trains a backbone of one's own."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    picture = uned / "images" / "birds" / "test" / "8_0.png"
    places = {"runs/real": trained[0], "picture.jpg": picture, "DIR": uned}
    for place, value in places.items():
        code = code.replace(f'"{place}"', f'"{value}"')
    code = code.replace("frozen_epochs=0.0", "frozen_epochs=0.0, batch_size=4, steps=3, period=4")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    exec(code, names)
    model, contents = checkpoint.load(trained[0] / "best.pt")
    images = data.TestImages(data.Benchmark(uned).split("birds", "test"), 32)
    expected = evaluate.embed(model.embed, images, contents["preprocessing"], "cpu")[:1]
    assert torch.allclose(torch.as_tensor(names["vectors"]), expected, atol=1e-5)
    assert names["model"].embed(torch.zeros(2, 3, 48, 48)).shape == (2, 64)
    assert "the backbone is the module snippet.Backbone" in capsys.readouterr().out


def test_class_folders_are_trained_on(class_folders, tmp_path):
    train("--data", class_folders, "--out", tmp_path / "run", *QUICK)
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    assert set(result["domains"]) == {"plants", "tools"}


def test_without_data_procedural_domains_are_trained_on_by_three_methods(
    tmp_path, monkeypatch, capsys
):
    """Into a new directory below runs/; at the end one table beside the pre-trained backbone."""
    monkeypatch.chdir(tmp_path)
    train(*"--domains symbols faces --image-size 32 --batch-size 4 --steps 1 --device cpu".split())
    (out,) = (tmp_path / "runs").iterdir()
    parts = [json.loads((out / p / "test.json").read_text()) for p in ("", "udon-joint", "usc")]
    assert [part["method"] for part in parts] == ["udon", "udon-joint", "usc"]
    assert all(set(part["domains"]) == {"faces", "symbols"} for part in parts)
    printed = capsys.readouterr().out
    table = printed[printed.rindex("udon, udon-joint, usc beside") :]
    assert mean_row(table) == percentages(*parts, parts[0]["backbone"])
    evaluated(out / "best.pt")
    assert "on the procedural domains" in capsys.readouterr().out


def test_compared_methods_differ_in_their_overlays_alone(uned, tmp_path, capsys):
    """A run killed in the comparison continues there, and leaves the finished one alone."""
    out = tmp_path / "run"
    train("--data", uned, "--out", out, *QUICK, "--compare", "ujc", "--seed", "2")
    first, other = (json.loads((p / "config.json").read_text()) for p in (out, out / "ujc"))
    differing = {name for name in first if first[name] != other[name]}
    overlay = {"weights", "sampler", "signal", "negatives"}
    assert differing == overlay | {"method", "out", "compare"}
    results = [json.loads((p / "test.json").read_text()) for p in (out, out / "ujc")]
    assert results[0]["backbone"] == results[1]["backbone"]
    (out / "ujc" / "test.json").unlink()
    train("--out", out, "--resume")
    again = json.loads((out / "ujc" / "test.json").read_text())
    assert again["domains"] == results[1]["domains"]
    assert "udon, ujc beside the backbone before training" in capsys.readouterr().out


def test_a_finished_run_can_be_resumed(trained):
    before = (trained[0] / "test.json").read_text()
    train("--out", trained[0], "--resume")
    assert (trained[0] / "test.json").read_text() == before


def test_unreadable_images_are_skipped_on_request(tmp_path, capsys):
    root, out = write_uned(tmp_path / "data", domains=("birds",), images=30), tmp_path / "run"
    broken = [root / "images" / "birds" / name for name in ("train/2_1.png", "test/9_3.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    arguments = ["--data", root, "--out", out, *QUICK]
    fails(capsys, udon.main, ["train", *arguments], broken[0], "cannot be read")
    train(*arguments, "--on-bad-image", "skip")
    skipped = json.loads((out / "skipped.json").read_text())
    assert set(skipped) == set(map(str, broken))
    result = json.loads((out / "test.json").read_text())["domains"]["birds"]
    assert (result["queries"], result["index"]) == (119, 119)
    fails(capsys, evaluate.main, [out / "best.pt"], broken[1], "cannot be read")
    again = evaluated(out / "best.pt", "--on-bad-image", "skip")
    assert again["domains"]["birds"] == result and set(again["skipped"]) == {str(broken[1])}


@pytest.mark.parametrize("main, line", [(udon.main, "train --help"), (evaluate.main, "--help")])
def test_help(capsys, main, line):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 0 and "usage: " in capsys.readouterr().out


def test_a_query_that_the_index_lists_too_is_not_its_own_neighbour(best, tmp_path):
    """Whether the index is the queries' own split or a file that lists the same images."""
    root = write_uned(tmp_path / "data")
    manifests = root / "info_files" / "birds"
    own = evaluated(best, "--data", root, "--domains", "birds")
    entries = json.loads((manifests / "test.json").read_text())
    entries = [{**entry, "path": f"./{entry['path']}"} for entry in entries]
    (manifests / "index.json").write_text(json.dumps(entries))
    assert evaluated(best, "--data", root, "--domains", "birds")["mean"] == own["mean"]


# Mistakes: one sentence on stderr that names the value, exit status 2, nothing written ------------


def fails(capsys, main, arguments, *named):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    sentence = capsys.readouterr().err.strip()
    assert stop.value.code == 2, (stop.value.code, sentence)
    assert "\n" not in sentence and "Traceback" not in sentence, sentence
    assert all(str(name) in sentence for name in named), f"{named} not in: {sentence}"


TRAIN_MISTAKES = [  # the command line, what the sentence must name
    ("", "command"),
    ("trian", "did you mean train?"),
    ("eval", "evaluate with python evaluate.py CHECKPOINT"),
    ("resume", "python udon.py train --out DIR --resume"),
    ("train --lr 1", "did you mean --backbone-lr or --head-lr?"),
    ("train --epoch 1", "did you mean --epochs?"),
    ("train --tensorboard logs", "python plot.py RUN --tensorboard DIR"),
    ("train --out /proc/run", "--out /proc/run"),
    ("train --config no.json", "no.json"),
    ("train --learning-rate 1", "--learning-rate"),
    ("train --step 4", "--step"),  # no abbreviations
    ("train --steps many", "many"),
    ("train --steps 0", "--steps is 0"),
    ("train --steps -4", "--steps is -4"),
    ("train --batch-size 0", "--batch-size is 0"),
    ("train --epochs 0", "--epochs is 0"),
    ("train --scale 0", "--scale is 0"),
    ("train --temperature nan", "--temperature is nan"),
    ("train --student-dim 1000000000000000", "out of memory"),
    ("train --head-lr nan", "--head-lr is nan"),
    ("train --backbone-lr inf", "--backbone-lr is inf"),
    ("train --seed -1", "--seed is -1"),
    ("train --seed 99999999999999999999", "--seed is 99999999999999999999"),
    ("train --weights 1 1 -1 1", "--weights is -1"),
    ("train --weights 1 1 1", "--weights"),
    ("train --weights 0 0 0 0", "--weights are 0"),
    ("train --preset nano", "nano"),
    ("train --method kd", "kd"),
    ("train --compare udon", "--compare names udon"),
    ("train --beside usc", "--beside"),
    ("train --model b/16", "b/16"),
    ("train --sampler random", "random"),
    ("train --domains birds plants", "plants"),
    ("train --teachers best.pt", "--teachers is best.pt"),
    ("train --method distill", "--teachers is not given"),
    ("train --method distill --teachers no.pt", "no.pt"),
    ("train --method usc --sampler dynamic --signal teacher", "--signal is teacher"),
    ("train --embedding teacher", "--index separate"),
    ("train --head-layers 0", "--head-layers is 0"),
    ("train --min-area 0", "--min-area is 0"),
    ("train --domain-margin 0.3", "--domain-margin is 0.3"),
    ("train --margin 0.2", "--margin is 0.2"),
    ("train --classification arcface", "--margin is 0.0"),
    ("train --period 1", "period 1"),
    ("train --image-size 50", "50"),
    ("train --device meta", "meta"),
    ("train --device abacus", "abacus"),
    ("train --data no/such/directory", "no/such/directory"),
    ("train --init no.npz --model s16", "no.npz"),
    ("train --model s16", "--init is compact"),
    ("train --resume", "--out"),
    ("train --resume --out nothing", "nothing"),
]


@pytest.mark.parametrize("line, named", TRAIN_MISTAKES)
def test_mistakes_in_training(uned, tmp_path, monkeypatch, capsys, line, named):
    monkeypatch.chdir(tmp_path)
    arguments = line.split()
    if arguments[:1] == ["train"] and not {"--data", "--resume"} & set(arguments):
        arguments += ["--data", uned]
    fails(capsys, udon.main, arguments, named)
    assert not list(tmp_path.iterdir()), "something was written"


def test_an_empty_name(capsys):
    fails(capsys, udon.main, ["train", "--data", ""], "--data is ''")


@contextlib.contextmanager
def unchanged(directory):
    """Checks that no file of a directory changes."""
    before = {path: path.read_bytes() for path in directory.iterdir()}
    yield
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_mistakes_about_the_directory_of_a_run(trained, uned, class_folders, tmp_path, capsys):
    out = trained[0]
    with unchanged(out):
        fails(capsys, udon.main, ["train", "--data", uned, "--out", out], out, "--resume")
        for option, value, named in (
            ("--seed", 3, "--seed is 3"),
            ("--steps", 2, "--steps is 2"),
            ("--method", "usc", "--method is usc"),
            ("--data", "elsewhere", "elsewhere"),
            ("--data", class_folders, "other training images"),
        ):
            fails(capsys, udon.main, ["train", "--out", out, "--resume", option, value], named)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        fails(capsys, udon.main, ["train", "--data", uned, "--out", path], path)
    for name in ("last.pt", "config.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        source = "best.pt" if name == "last.pt" else name
        shutil.copy(out / source, tmp_path / "run" / name)
    arguments = ["train", "--out", tmp_path / "run", "--resume"]
    fails(capsys, udon.main, arguments, "last.pt", "optimizer")


def test_the_steps_of_a_cosine_schedule_cannot_change(uned, tmp_path, capsys):
    out = tmp_path / "run"
    train("--data", uned, "--out", out, *QUICK, "--schedule", "cosine")
    fails(capsys, udon.main, ["train", "--out", out, "--resume", "--steps", 12], "--steps is 12")


def test_a_compared_directory_of_another_run(uned, tmp_path, capsys):
    """Found before the first method is trained."""
    out = tmp_path / "run"
    train("--data", uned, "--out", out / "usc", *QUICK, "--method", "usc", "--seed", 4)
    arguments = ["train", "--data", uned, "--out", out, *QUICK, "--compare", "usc"]
    fails(capsys, udon.main, arguments, "--seed is 0", "usc")
    assert [path.name for path in out.iterdir()] == ["usc"]


def test_a_truncated_image_stops_before_anything_is_written(tmp_path, capsys):
    root = write_uned(tmp_path / "data")
    image = root / "images" / "birds" / "train" / "2_1.png"
    image.write_bytes(image.read_bytes()[:200])
    arguments = ["train", "--data", root, "--out", tmp_path / "run", *QUICK]
    fails(capsys, udon.main, arguments, "2_1.png")
    assert not (tmp_path / "run").exists()


EVALUATION_MISTAKES = [
    ("", "checkpoint"),
    ("missing.pt", "missing.pt"),
    ("{best} --split train", "train"),
    ("{best} --index all", "all"),
    ("{best} --embedding pixels", "pixels"),
    ("{best} --data no/such/directory", "no/such/directory"),
    ("{best} --domains plants", "plants"),
    ("{best} --embedding teacher --index merged", "--index separate"),
    ("{best} --data {folders} --embedding teacher", "'plants' has no teacher"),
    ("{best} --json no/out.json", "no/out.json"),
    ("{best} --json .", "--json . must be a file"),
    ("{best} --per-query no/out.csv", "--per-query no/out.csv must be a file"),
    ("{best} --gallery .", "--gallery . must be a file"),
    ("{best} --gallery out.html --gallery-size 0", "--gallery-size is 0: give 1 or more"),
    ("{best} {best} --per-query out.csv", "--per-query and --gallery are of one checkpoint"),
    ("{best} missing.pt", "missing.pt"),
    ("{best} --embeddings out.npz", "not both"),
    ("--embeddings out.npz", "--embeddings needs --data"),
    ("--embeddings out.npz --data {folders}", "out.npz cannot be read"),
    ("{best} --device abacus", "abacus"),
]


@pytest.mark.parametrize("line, named", EVALUATION_MISTAKES)
def test_mistakes_in_evaluation(trained, class_folders, tmp_path, monkeypatch, capsys, line, named):
    monkeypatch.chdir(tmp_path)
    line = line.format(best=trained[0] / "best.pt", folders=class_folders)
    fails(capsys, evaluate.main, line.split(), named)
    assert not list(tmp_path.iterdir()), "something was written"


def test_damaged_checkpoints(best, capsys):
    raw = best.read_bytes()
    damaged = {"empty": b"", "half": raw[: len(raw) // 2], "text": b"not a checkpoint"}
    for name, contents in damaged.items():
        path = best.with_name(f"{name}.pt")
        path.write_bytes(contents)
        fails(capsys, evaluate.main, [path], path, "best.pt or last.pt")
    torch.save(checkpoint.read(best) | {"architecture": {}}, path)
    fails(capsys, evaluate.main, [path], path)


def test_a_result_that_cannot_be_written(best, uned, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    target = best.with_name("out.json")
    fails(capsys, evaluate.main, [best, "--json", target], "out.json", "No space left")
    assert [path.name for path in best.parent.iterdir()] == [best.name]


def test_weights_are_not_written_onto_a_directory(best, capsys):
    target = best.with_name("directory.pt")
    target.mkdir()
    with pytest.raises(SystemExit) as stop:
        pretrained.main([str(best), str(target)])
    assert stop.value.code == 2 and "directory.pt cannot be written" in capsys.readouterr().err
    assert not list(target.iterdir())
