"""The command lines as a user types them: both commands end to end, and what they say and return to mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import pretrained
import udon

ROOT = Path(__file__).parents[1]
QUICK = [
    "--image-size",
    "32",
    "--batch-size",
    "4",
    "--steps",
    "6",
    "--period",
    "8",
    "--device",
    "cpu",
]


def run(*arguments, cwd=ROOT):
    """A process of its own: exit status, stdout, stderr."""
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__"},
    )
    return finished.returncode, finished.stdout, finished.stderr


@pytest.fixture(scope="module")
def trained(uned, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    status, stdout, stderr = run("udon.py", "train", "--data", uned, "--out", out, *QUICK)
    assert (status, stderr) == (0, ""), stderr
    return out, stdout


def test_training_ends_with_the_table(trained):
    out, stdout = trained
    lines = stdout.strip().splitlines()
    mean = next(line for line in lines if line.startswith("mean "))
    result = json.loads((out / "test.json").read_text())
    shown = [
        result["mean"]["recall_at_1"],
        result["mean"]["mmp_at_5"],
        result["untrained"]["mean"]["recall_at_1"],
        result["untrained"]["mean"]["mmp_at_5"],
    ]
    assert mean.split()[1:] == [f"{100 * x:.2f}" for x in shown]
    assert "R@1: the nearest neighbour" in stdout and lines[-1].startswith(
        "the same again: python evaluate.py"
    )


def test_evaluation_reproduces_the_table_to_the_last_digit(trained, uned, tmp_path):
    out, stdout = trained
    status, again, stderr = run(
        "evaluate.py", out / "best.pt", "--data", uned, "--json", tmp_path / "out.json"
    )
    assert (status, stderr) == (0, ""), stderr
    ours, runs = (
        json.loads((tmp_path / "out.json").read_text()),
        json.loads((out / "test.json").read_text()),
    )
    assert (ours["mean"], ours["domains"]) == (runs["mean"], runs["domains"])
    assert (ours["split"], ours["index"], ours["embedding"], ours["step"]) == (
        "test",
        "merged",
        "student",
        runs["step"],
    )
    for line in again.splitlines():
        if line.startswith(("birds", "cars", "mean")):
            assert any(other.startswith(line) for other in stdout.splitlines()), line


def test_evaluation_needs_the_checkpoint_alone(trained, uned, tmp_path):
    """Moved to another folder, without its run; the data folder is in the checkpoint."""
    copy = tmp_path / "model.pt"
    copy.write_bytes((trained[0] / "best.pt").read_bytes())
    status, stdout, _ = run(ROOT / "evaluate.py", copy, cwd=tmp_path)
    assert status == 0 and str(uned) in stdout


@pytest.mark.parametrize(
    "embedding, index",
    [("student", "separate"), ("teacher", None), ("teacher", "separate"), ("backbone", "merged")],
)
def test_embeddings_and_indexes(trained, uned, tmp_path, capsys, embedding, index):
    evaluate.main(
        [
            str(trained[0] / "last.pt"),
            "--data",
            str(uned),
            "--embedding",
            embedding,
            "--json",
            str(tmp_path / "o.json"),
            "--split",
            "val",
            "--device",
            "cpu",
            *(["--index", index] if index else []),
        ]
    )
    result = json.loads((tmp_path / "o.json").read_text())
    assert (
        result["index"] == (index or "separate")
        and result["embedding"] == embedding
        and result["split"] == "val"
    )
    assert result["domains"]["cars"]["queries"] == result["domains"]["cars"]["index"] == 20
    assert embedding in capsys.readouterr().out


def test_the_readmes_snippet(trained, uned, capsys):
    """It gives the embedding that evaluation gives the same image."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    picture = uned / "images" / "birds" / "test" / "8_0.png"
    names = {}
    exec(code.replace("runs/real", str(trained[0])).replace("picture.jpg", str(picture)), names)
    assert names["embedding"].shape == (1, 64) and abs(names["embedding"].norm().item() - 1) < 1e-6
    images = data.TestImages(data.Benchmark(uned).split("birds", "test"), 32)
    expected = evaluate.embed(
        names["model"].embed, images, names["statistics"]["mean"], names["statistics"]["std"], "cpu"
    )[:1]
    assert torch.allclose(names["embedding"], expected, atol=1e-5)


def test_class_folders_are_trained_on(class_folders, tmp_path, capsys):
    udon.main(["train", "--data", str(class_folders), "--out", str(tmp_path / "run"), *QUICK])
    assert set(json.loads((tmp_path / "run" / "test.json").read_text())["domains"]) == {
        "plants",
        "tools",
    }


def test_without_data_the_procedural_domains_are_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the default --out is a folder of its own below runs/
    udon.main(["train", *QUICK[:4], "--steps", "1"])
    (out,) = (tmp_path / "runs").iterdir()
    result = json.loads((out / "test.json").read_text())
    assert len(result["domains"]) == 8
    baseline = json.loads((out / "usc" / "test.json").read_text())
    assert baseline["method"] == "usc" and baseline["untrained"] != result["domains"]
    last = capsys.readouterr().out.split("udon and usc")[-1]
    shown = [
        f"{100 * x[metric]:.2f}"
        for x in (result["mean"], baseline["mean"], result["untrained"]["mean"])
        for metric in ("recall_at_1", "mmp_at_5")
    ]
    assert next(line for line in last.splitlines() if line.startswith("mean ")).split()[1:] == shown
    evaluate.main([str(out / "best.pt"), "--device", "cpu"])
    assert "the procedural domains" in capsys.readouterr().out


def test_a_baseline_is_trained_beside_and_gone_on_with(uned, tmp_path, capsys):
    """With the same seed, data and budget; a run killed in the baseline goes on with it, and leaves the finished one alone."""
    out = tmp_path / "run"
    udon.main(
        ["train", "--data", str(uned), "--out", str(out), *QUICK, "--beside", "ujc", "--seed", "2"]
    )
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (out, out / "ujc")
    )
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"method", "out", "beside", "signal", "domain_margin"}
    before = (out / "ujc" / "test.json").read_text()
    (out / "ujc" / "test.json").unlink()
    udon.main(["train", "--out", str(out), "--resume"])
    again = json.loads((out / "ujc" / "test.json").read_text())
    assert (
        again["domains"] == json.loads(before)["domains"]
        and "udon and ujc" in capsys.readouterr().out
    )


def test_a_finished_run_can_be_resumed(trained, uned, capsys):
    before = (trained[0] / "test.json").read_text()
    udon.main(["train", "--out", str(trained[0]), "--resume"])
    assert (trained[0] / "test.json").read_text() == before


def test_help_lists_every_option():
    status, stdout, _ = run("udon.py", "train", "--help")
    assert status == 0 and all(
        udon.flag(name) in stdout for name in udon.Config.__dataclass_fields__
    )
    assert "(default: 64)" in stdout and "paper: 1000" in stdout
    assert run("evaluate.py", "--help")[0] == 0


# Mistakes: one sentence on stderr that names the value, exit status 2, nothing written ----------------------------------------


def fails(capsys, main, arguments, *named):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    sentence = captured.err.strip()
    assert stop.value.code == 2, (stop.value.code, sentence)
    assert "\n" not in sentence and "Traceback" not in sentence, sentence
    assert all(str(name) in sentence for name in named), f"{named} not in: {sentence}"


TRAIN_MISTAKES = {
    "no command": ([], "command"),
    "unknown command": (["trian"], "trian"),
    "unknown option": (["train", "--learning-rate", "1"], "--learning-rate"),
    "a word for a number": (["train", "--steps", "many"], "many"),
    "no steps": (["train", "--steps", "0"], "--steps is 0"),
    "negative steps": (["train", "--steps", "-4"], "--steps is -4"),
    "no batch": (["train", "--batch-size", "0"], "--batch-size is 0"),
    "no epochs": (["train", "--epochs", "0"], "--epochs is 0"),
    "no scale": (["train", "--scale", "0"], "--scale is 0"),
    "a temperature that is no number": (["train", "--temperature", "nan"], "--temperature is nan"),
    "more than any memory": (["train", "--student-dim", str(10**15)], "out of memory"),
    "a rate that is no number": (["train", "--head-lr", "nan"], "--head-lr is nan"),
    "negative seed": (["train", "--seed", "-1"], "--seed is -1"),
    "negative weight": (["train", "--weights", "1", "1", "-1", "1"], "--weights are"),
    "three weights": (["train", "--weights", "1", "1", "1"], "--weights"),
    "no weight": (["train", "--weights", "0", "0", "0", "0"], "--weights are"),
    "unknown method": (["train", "--method", "kd"], "kd"),
    "unknown model": (["train", "--model", "b/16"], "b/16"),
    "unknown sampler": (["train", "--sampler", "random"], "random"),
    "unknown domain": (["train", "--domains", "colour", "plants"], "plants"),
    "teachers without need": (["train", "--teachers", "best.pt"], "--teachers is best.pt"),
    "teachers missing": (["train", "--method", "distill"], "--teachers is None"),
    "teachers that are not there": (
        ["train", "--method", "distill", "--teachers", "no.pt"],
        "no.pt",
    ),
    "a signal that is not there": (
        ["train", "--method", "usc", "--signal", "teacher"],
        "--signal is teacher",
    ),
    "no student to follow": (
        ["train", "--method", "teachers", "--signal", "student"],
        "--signal is student",
    ),
    "no layers": (["train", "--head-layers", "0"], "--head-layers is 0"),
    "crops of nothing": (["train", "--min-area", "0"], "--min-area is 0"),
    "a domain margin that is no number": (
        ["train", "--domain-margin", "nan"],
        "--domain-margin is nan",
    ),
    "a domain margin without others": (
        ["train", "--domain-margin", "0.3", "--negatives", "domain"],
        "--domain-margin is 0.3",
    ),
    "margin without need": (["train", "--margin", "0.2"], "--margin is 0.2"),
    "margin missing": (["train", "--classification", "arcface"], "--margin is 0.0"),
    "period below the domains": (["train", "--period", "7"], "period 7"),
    "image size": (["train", "--image-size", "50"], "50"),
    "seed too large": (
        ["train", "--seed", "99999999999999999999"],
        "--seed is 99999999999999999999",
    ),
    "a device that does not compute": (["train", "--device", "meta"], "meta"),
    "unknown device": (["train", "--device", "abacus"], "abacus"),
    "a rate without end": (["train", "--backbone-lr", "inf"], "--backbone-lr is inf"),
    "no name of data": (["train", "--data", ""], "data folder "),
    "missing data": (["train", "--data", "no/such/folder"], "no/such/folder"),
    "missing weights": (["train", "--init", "no.npz", "--model", "s16"], "no.npz"),
    "resume without a folder": (["train", "--resume"], "--out"),
    "resume of nothing": (["train", "--resume", "--out", "nothing"], "nothing"),
}


@pytest.mark.parametrize("name", TRAIN_MISTAKES)
def test_mistakes_in_training(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    arguments, named = TRAIN_MISTAKES[name]
    fails(capsys, udon.main, arguments, named)
    assert not list(tmp_path.iterdir()), "something was written"


def test_mistakes_about_the_run_folder(trained, uned, tmp_path, capsys):
    out = trained[0]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    fails(capsys, udon.main, ["train", "--data", uned, "--out", out], out, "--resume")
    fails(capsys, udon.main, ["train", "--out", out, "--resume", "--seed", "3"], "--seed is 3")
    fails(capsys, udon.main, ["train", "--out", out, "--resume", "--steps", "2"], "--steps is 2")
    fails(
        capsys, udon.main, ["train", "--out", out, "--resume", "--data", "elsewhere"], "elsewhere"
    )
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "file").write_text("x")
    fails(capsys, udon.main, ["train", "--out", tmp_path / "file"], "file")
    fails(capsys, udon.main, ["train", "--out", tmp_path / "file" / "run"], "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((out / "best.pt").read_bytes())
    (tmp_path / "run" / "config.json").write_bytes((out / "config.json").read_bytes())
    fails(
        capsys, udon.main, ["train", "--out", tmp_path / "run", "--resume"], "last.pt", "optimizer"
    )


def test_weights_that_diverge_stop_the_run(uned, tmp_path, capsys):
    fails(
        capsys,
        udon.main,
        [
            "train",
            "--data",
            uned,
            "--out",
            tmp_path / "run",
            *QUICK,
            "--init",
            "scratch",
            "--steps",
            "1",
            "--backbone-lr",
            "1e38",
        ],
        "not finite",
        "learning rates",
    )


def test_a_disk_that_refuses(uned, tmp_path, monkeypatch, capsys):
    def refuse(path, contents):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(udon, "save", refuse)
    fails(
        capsys,
        udon.main,
        ["train", "--data", uned, "--out", tmp_path / "run", *QUICK],
        "No space left",
        "last.pt",
    )


def test_resuming_on_other_data(trained, class_folders, capsys):
    fails(
        capsys,
        udon.main,
        ["train", "--out", trained[0], "--resume", "--data", class_folders],
        class_folders,
    )


def test_steps_of_a_cosine_schedule_cannot_change(uned, tmp_path, capsys):
    out = tmp_path / "run"
    udon.main(["train", "--data", str(uned), "--out", str(out), *QUICK, "--schedule", "cosine"])
    capsys.readouterr()
    fails(capsys, udon.main, ["train", "--out", out, "--resume", "--steps", "12"], "--steps is 12")


def test_a_damaged_checkpoint(trained, uned, tmp_path, capsys):
    best = (trained[0] / "best.pt").read_bytes()
    for name, contents in {
        "empty.pt": b"",
        "half.pt": best[: len(best) // 2],
        "text.pt": b"not a checkpoint",
    }.items():
        (tmp_path / name).write_bytes(contents)
        fails(capsys, evaluate.main, [tmp_path / name, "--data", uned], name)
    whole = torch.load(trained[0] / "best.pt", weights_only=True)
    for spoilt in (
        {"model": 1},
        {**whole, "model": {}},
        {**whole, "architecture": {"backbone": {"depth": 1, "size": 3}}},
    ):
        torch.save(spoilt, tmp_path / "other.pt")
        fails(capsys, evaluate.main, [tmp_path / "other.pt"], "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    fails(capsys, evaluate.main, [tmp_path / "tensor.pt"], "tensor.pt")
    fails(capsys, evaluate.main, [tmp_path / "missing.pt"], "missing.pt")


def test_mistakes_in_evaluation(trained, uned, class_folders, tmp_path, capsys):
    best = trained[0] / "best.pt"
    fails(capsys, evaluate.main, [], "checkpoint")
    fails(capsys, evaluate.main, [best, "--split", "train"], "train")
    fails(capsys, evaluate.main, [best, "--data", "no/such/folder"], "no/such/folder")
    fails(
        capsys,
        evaluate.main,
        [best, "--data", uned, "--embedding", "teacher", "--index", "merged"],
        "separate",
    )
    fails(
        capsys, evaluate.main, [best, "--data", class_folders, "--embedding", "teacher"], "plants"
    )
    fails(
        capsys,
        evaluate.main,
        [best, "--data", uned, "--json", tmp_path / "no" / "out.json"],
        "out.json",
    )
    fails(capsys, evaluate.main, [best, "--data", uned, "--json", tmp_path], tmp_path)
    fails(capsys, evaluate.main, [best, "--data", uned, "--device", "abacus"], "abacus")


def test_a_result_that_cannot_be_written(trained, uned, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.os, "replace", refuse)
    fails(
        capsys,
        evaluate.main,
        [trained[0] / "best.pt", "--data", uned, "--json", tmp_path / "out.json"],
        "No space left",
    )


def test_a_query_that_stands_in_the_index_too_is_not_its_own_neighbour(trained, tmp_path, capsys):
    """Whether the index is the queries' own split, or a file that lists the same images."""
    from conftest import write_uned

    root, found = write_uned(tmp_path / "data"), []
    for _ in range(2):
        evaluate.main(
            [
                str(trained[0] / "best.pt"),
                "--data",
                str(root),
                "--domains",
                "birds",
                "--json",
                str(tmp_path / "out.json"),
            ]
        )
        found.append(json.loads((tmp_path / "out.json").read_text())["mean"])
        shutil.copy(
            root / "info_files" / "birds" / "test.json",
            root / "info_files" / "birds" / "index.json",
        )
    assert found[0] == found[1]


def test_damaged_metrics(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(["rubbish\n", *lines]))
    fails(
        capsys,
        udon.main,
        ["train", "--out", tmp_path / "run", "--resume"],
        "metrics.jsonl is damaged at line 1",
    )


def test_weights_are_not_written_onto_a_folder(trained, tmp_path, capsys):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(SystemExit) as stop:
        pretrained.main([str(trained[0] / "best.pt"), str(tmp_path / "folder.pt")])
    assert stop.value.code == 2 and "folder.pt cannot be written" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["folder.pt"]


def test_a_truncated_image_stops_before_anything_is_written(tmp_path, capsys):
    from conftest import write_uned

    root = write_uned(tmp_path / "data")
    image = root / "images" / "birds" / "train" / "2_1.png"
    image.write_bytes(image.read_bytes()[:200])
    fails(
        capsys, udon.main, ["train", "--data", root, "--out", tmp_path / "run", *QUICK], "2_1.png"
    )
    assert not (tmp_path / "run").exists()
