"""The command lines of benchmarks/: bad input gets one sentence before any work; small runs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_uned
from hypothesis import given
from hypothesis import strategies as st
from test_ablation import made_up
from test_distributed import job
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import config
import data
import distributed
import evaluate
import model
import timm_backbone
import udon
from benchmarks import (
    ablation,
    added_domain,
    choice,
    defaults,
    embedding,
    equivalence,
    estimates,
    frozen,
    jax_step,
    loader,
    pretraining,
    principal_axes,
    procedural,
    scaling,
    shared,
    start,
    step_overhead,
    tables,
    topk,
    topk_gpu,
    uned_size,
)

ROOT = Path(__file__).parents[1]
MARKED = "before\n<!-- {0} -->\nold\n<!-- end of {0} -->\nafter\n"


def run(module, arguments, monkeypatch):
    """`python -m benchmarks.<module>` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def error_of(module, arguments, monkeypatch, capfd):
    """The sentence on stderr of a command line that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run(module, arguments, monkeypatch)
    message = capfd.readouterr().err
    assert end.value.code == 2, message
    assert message.count("\n") == 1, message
    assert message.startswith(f"{Path(module.__file__).name}: ")
    return message


BAD = {
    ablation: (
        ("--seeds 0", "'0'"),
        ("--seeds -1", "-1"),
        ("--seeds two", "'two'"),
        ("--rows nonsense", "'nonsense'"),
        ("--rows udon", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --results topk.md", "--results"),
        ("--data {uned} --runs topk.md/x", "--runs"),
        ("--tables nowhere.md", "nowhere.md"),
        ("--tables reversed.md", "reversed.md"),
        ("--tables topk.md", "topk.md"),
        ("--tables ablation.md --results broken", "broken/udon/seed0.json"),
        ("--tables ablation.md --results bare", "bare/udon/seed0.json"),
        ("--tables ablation.md --results other", "usc"),
        ("--tables ablation.md --times nowhere.json", "nowhere.json"),
        ("--tables ablation.md --times foreign.csv", "foreign.csv"),
        ("--tables ablation.md --results nowhere", "nowhere"),
    ),
    procedural: (
        ("", "--table"),
        ("--table procedural.md --results nowhere", "nowhere/seed0/test.json"),
        ("--table procedural.md --results foreign.csv", "foreign.csv/seed0/test.json"),
    ),
    frozen: (
        ("", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --seeds 0", "'0'"),
        ("--data {uned} --out nowhere/x.json", "nowhere/x.json"),
        ("--table frozen.md --out foreign.csv", "foreign.csv"),
        ("--table frozen.md --out none.json", "none.json"),
    ),
    added_domain: (
        ("", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --new nothing", "nothing"),
        ("--data {uned} --out nowhere/x.json", "nowhere/x.json"),
        ("--table nowhere.md --out foreign.csv", "foreign.csv"),
    ),
    start: (
        ("", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --seeds 0", "'0'"),
        ("--cut nowhere out", "nowhere"),
        ("--cut {uned} empty", "empty exists"),
        ("--table start.md --results foreign", "foreign/uned/usc-pca/seed0.json"),
    ),
    defaults: (
        ("", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --unseen nowhere", "nowhere"),
        ("--data {uned} --seeds 0", "'0'"),
        ("--table defaults.md --results foreign", "foreign/uned/usc-pca/seed0.json"),
    ),
    choice: (
        ("", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --settings all", "'all'"),
        ("--data {uned} --seeds 0", "'0'"),
        ("--table choice.md --results unfinished", "unfinished/first/area/seed0.json"),
    ),
    topk: (
        *((f"--cases {case}", f"{case!r}") for case in ("5x5", "0x5x5", "5x-5x5", "5x5x5x5")),
        ("--cases 5x5xa", "'5x5xa'"),
        ("--cases 5x50x5 5x50x5_nonsense", "'5x50x5 nonsense'"),
        ("--k 0", "'0'"),
        ("--k 7 --cases 5x50x5 5x6x5 --out none.csv", "5x6x5"),
        ("--k 301 --out none.csv", "1x300x64"),
        ("--threads 0", "'0'"),
        ("--rounds -3", "-3"),
        ("--contenders nonsense", "'nonsense'"),
        ("--out nowhere/x.csv", "nowhere/x.csv"),
        ("--out empty", "'empty'"),
        ("--out foreign.csv", "foreign.csv"),
        ("--out topk.md", "topk.md"),
        ("--table topk.md --out none.csv", "none.csv"),
    ),
    uned_size: (
        ("--queries 0", "'0'"),
        ("--index 0", "'0'"),
        ("--dim -1", "-1"),
        ("--looped 0", "'0'"),
        ("--seed x", "'x'"),
        ("--dim 1.5", "'1.5'"),
        ("--out nowhere/x.json", "nowhere/x.json"),
        ("--nonsense", "--nonsense"),
    ),
    pretraining: (
        ("--data {uned}", "--out"),
        ("--data nowhere --out x.pt", "nowhere"),
        ("--data {uned} --out nowhere/x.pt", "nowhere/x.pt"),
        ("--data {uned} --out x.pt --batch-size 4 --init nowhere.pt", "nowhere.pt"),
        ("--data {uned} --out x.pt --epochs 0", "'0'"),
        ("--data {uned} --out x.pt --rate nan", "'nan'"),
        ("--data {uned} --out x.pt --batch-size 1000", "batch of 1000"),
    ),
    principal_axes: (
        ("topk.md", "--data"),
        ("topk.md --data {uned} --k 0", "'0'"),
        ("topk.md --data {uned} --out nowhere/x.json", "nowhere/x.json"),
    ),
    step_overhead: (
        ("--rounds 0", "'0'"),
        ("--rows backbone", "'backbone'"),
        ("--model nonsense", "'nonsense'"),
        ("--out nowhere/x.json", "nowhere/x.json"),
        ("--device nonsense", "nonsense"),
    ),
    jax_step: (
        ("--rounds 0", "'0'"),
        ("--domains nonsense", "'nonsense'"),
        ("--core 1000000", "1000000"),
        ("--out nowhere/x.json", "nowhere/x.json"),
        ("--table topk.md", "topk.md"),
        ("--table topk.md --out none.json", "none.json"),
        ("--table nowhere.md --out foreign.csv", "foreign.csv"),
    ),
    embedding: (
        ("--images 0", "'0'"),
        ("--models nonsense", "'nonsense'"),
        ("--core 1000000", "1000000"),
        ("--out nowhere/x.json", "nowhere/x.json"),
        ("--table nowhere.md --out foreign.csv", "foreign.csv"),
    ),
    loader: (
        ("--images 0", "'0'"),
        ("--out nowhere/x.json", "nowhere/x.json"),
        ("--table nowhere.md --out foreign.csv", "foreign.csv"),
    ),
    equivalence: (
        ("", "--data"),
        ("--data nowhere", "nowhere"),
        ("--data {uned} --out nowhere/x.json", "nowhere/x.json"),
        ("--table nowhere.md --out foreign.csv", "foreign.csv"),
    ),
    scaling: (
        ("--rounds 0", "'0'"),
        ("--out nowhere/x.json", "nowhere/x.json"),
        ("--markdown nowhere/x.md", "nowhere/x.md"),
        ("--markdown topk.md --out none.json", "none.json"),
        ("--markdown topk.md --out foreign.csv", "foreign.csv"),
    ),
    topk_gpu: (
        ("--k 0", "'0'"),
        ("--k 9 --index 8", "--index 8"),
        ("--dtype int8", "'int8'"),
        ("--out nowhere/x", "nowhere/x"),
    ),
}
CASES = [(module, *case) for module, cases in BAD.items() for case in cases]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory with a file of each kind, in which no measurement may start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    for name in ("ablation", "choice", "defaults", "frozen", "procedural", "start", "topk"):
        (tmp_path / f"{name}.md").write_text(MARKED.format(name))
    (tmp_path / "reversed.md").write_text("<!-- end of ablation -->\n<!-- ablation -->\n")
    contents = {"broken": "{", "other": json.dumps(made_up("udon", 0, 0.5)), "bare": "{}"}
    for name, text in contents.items():
        (tmp_path / name / "udon").mkdir(parents=True)
        (tmp_path / name / "udon" / "seed0.json").write_text(text)
    for place in ("foreign/uned/usc-pca", "unfinished/first/area"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "seed0.json").write_text("{}")
    for module, name in (
        (topk, "measure"),
        (uned_size, "synthetic"),
        (step_overhead, "stepper"),
        (jax_step, "measure"),
        (embedding, "measure"),
        (loader, "measure"),
        (frozen, "train"),
        (start.ablation, "train"),
        (principal_axes, "measure"),
        (ablation.Grid, "run"),
        (equivalence, "start"),
        (scaling, "measure"),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a measurement has started"))
    return tmp_path


@pytest.mark.parametrize(
    "module, options, named",
    CASES,
    ids=[f"{module.__name__.split('.')[1]} {options}" for module, options, _ in CASES],
)
def test_bad_options_get_one_sentence(module, options, named, directory, uned, monkeypatch, capfd):
    def contents():
        return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    before = contents()
    arguments = [part.replace("_", " ").format(uned=uned) for part in options.split()]
    assert named in error_of(module, arguments, monkeypatch, capfd)
    assert contents() == before


@pytest.fixture(scope="module")
def checkpoints(uned, tmp_path_factory):
    """{method: file}: a student, and teachers alone."""
    benchmark = data.Benchmark(uned)
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    files = {}
    for method in ("usc", "teachers"):
        options = config.Config(preset="micro", method=method, init="scratch", image_size=32)
        files[method] = tmp_path_factory.mktemp("checkpoints") / f"{method}.pt"
        checkpoint.save(files[method], udon.build_run(options, splits).contents())
    return files


def test_principal_axes_checks_checkpoint_and_data(uned, checkpoints, tmp_path, monkeypatch, capfd):
    out, larger = tmp_path / "out.json", write_uned(tmp_path / "larger", images=10)
    monkeypatch.setattr(evaluate, "embed", lambda *_: pytest.fail("a measurement has started"))
    for file, root, k, named in (
        ("nowhere.pt", larger, 1, "nowhere.pt"),
        (checkpoints["teachers"], larger, 1, "teachers.pt"),
        (checkpoints["usc"], "nowhere", 1, "nowhere"),
        (checkpoints["usc"], uned, 1, "of 16 "),
        (checkpoints["usc"], larger, 49, "--k is 49"),
    ):
        arguments = [file, "--data", root, "--k", k, "--out", out]
        assert named in error_of(principal_axes, arguments, monkeypatch, capfd)
        assert not out.exists()


def test_principal_axes(checkpoints, tmp_path, monkeypatch):
    out, larger = tmp_path / "out.json", write_uned(tmp_path / "larger", images=10)
    run(principal_axes, [checkpoints["usc"], "--data", larger, "--out", out], monkeypatch)
    result = json.loads(out.read_text())
    assert (result["index"], result["rows"][0]["coordinates"]) == (48, 8)
    assert (result["checkpoint"], result["torch"]) == (str(checkpoints["usc"]), torch.__version__)
    assert result["machine"] == shared.machine("cpu")


def test_pretraining(uned, tmp_path, monkeypatch, capfd):
    """An interrupted run ends with the weights of a whole one, and its state is then gone; a
    training run starts from them."""
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    arguments = f"--data {uned} --model micro --batch-size 4 --epochs 0.6 --out".split()
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 2)
    run(pretraining, [*arguments, whole], monkeypatch)

    losses, calls = pretraining.Network.losses, itertools.count()

    def interrupted(*inputs):
        return losses(*inputs) if next(calls) < 3 else 1 / 0

    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
        context.setattr(pretraining.Network, "losses", interrupted)
        run(pretraining, [*arguments, parts], context)
    changed = [*arguments, parts, "--rate", "0.1"]
    assert "other rate" in error_of(pretraining, changed, monkeypatch, capfd)
    state = tmp_path / "parts.pt.state"
    saved = state.read_bytes()
    state.write_bytes(saved[:100])
    assert "is damaged" in error_of(pretraining, [*arguments, parts], monkeypatch, capfd)
    state.write_bytes(saved)
    run(pretraining, [*arguments, parts], monkeypatch)
    assert "resumed at step 2 of 6" in capfd.readouterr().out
    models = [torch.load(file)["model"] for file in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert sorted(tmp_path.iterdir()) == [parts, whole]

    arguments = f"train --preset micro --data {uned} --batch-size 4 --steps 1 --device cpu".split()
    udon.main([*arguments, f"--init={whole}", f"--out={tmp_path}/run", "--workers=0"])


def test_crops_of_an_image_are_within_it_and_flipped_half_of_the_time():
    """Of a horizontal ramp: every crop is a ramp, of at least a quarter of its range."""
    ramp = torch.arange(48).mul(5).to(torch.uint8).expand(400, 3, 48, 48)
    pixels = pretraining.crops(ramp, torch.Generator().manual_seed(0))
    assert pixels.shape == ramp.shape and pixels.abs().max() <= 1
    slopes = (pixels[..., 1:] - pixels[..., :-1]).mean((1, 2, 3))
    assert 0.4 < (slopes > 0).float().mean() < 0.6
    assert pixels.std(2).max() < 1e-4  # rows are equal


@given(st.integers(0, 500), st.integers(1, 9))
def test_mixed_images_and_their_shares(step, count):
    """Of images of one value each, the mean value is that of the shares."""
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(count, generator=generator)
    images = values.view(-1, 1, 1, 1).expand(count, 3, 48, 48)
    partners, share, side = pretraining.mixing(step, count, 48, generator)
    result = pretraining.mixed(images, partners, share, side, generator)
    expected = share * values + (1 - share) * values[partners]
    torch.testing.assert_close(result.mean((1, 2, 3)), expected, atol=1e-4, rtol=1e-4)
    assert sorted(partners.tolist()) == list(range(count)) and 0 <= share <= 1


def test_step_overhead(tmp_path, monkeypatch):
    """Rows with teachers of their own, with frozen ones, and the baseline."""
    out = tmp_path / "times.json"
    options = "--rows udon distill-8 --model micro --image-size 32 --batch-size 4 --rounds 2"
    run(step_overhead, [*options.split(), "--out", out], monkeypatch)
    assert json.loads(out.read_text())["command"].endswith(f"step_overhead {options}")
    times = tables.read_times(out)
    assert list(times) == ["usc", "udon", "distill-8"]
    assert times["usc"]["to_usc"] == 1
    assert all(ratio > 0 for row in times.values() for ratio in row.values())


def test_shares_of_a_step():
    found = jax_step.shares(lambda domain: torch.ones(400, 400) @ torch.ones(400, 400), "met")
    assert found.keys() == jax_step.PARTS.keys() and sum(found.values()) <= 100.1
    assert found["matrix products"] > 50 and found["attention"] == 0


def measured(module, options, name, tmp_path, monkeypatch):
    """A small measurement and its table between marks -> the result, the table."""
    out, file = tmp_path / f"{name}.json", tmp_path / f"{name}.md"
    file.write_text(MARKED.format(name))
    affinity = getattr(os, "sched_getaffinity", lambda _: None)(0)
    threads = torch.get_num_threads()
    try:
        run(module, [*options.split(), "--out", out], monkeypatch)
    finally:
        torch.set_num_threads(threads)
        if affinity:
            os.sched_setaffinity(0, affinity)
    run(module, ["--out", out, "--table", file], monkeypatch)
    result, text = json.loads(out.read_text()), file.read_text()
    assert text == MARKED.format(name).replace("old\n", module.table(result))
    return result, text


@pytest.fixture
def torchvision():
    try:
        timm_backbone.import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


def test_embedding(torchvision, tmp_path, monkeypatch):
    """Outputs equal to timm's, which the benchmark asserts, and the table."""
    pytest.importorskip("timm")
    tiny = dict(image_size=160, patch_size=16, width=64, depth=6, heads=2, mlp_ratio=3)
    monkeypatch.setattr(embedding, "MODELS", {"tiny": "test_vit"})
    monkeypatch.setitem(model.SIZES, "tiny", tiny)
    options = "--models tiny --images 2 --rounds 1"
    result, text = measured(embedding, options, "embedding", tmp_path, monkeypatch)
    assert result["command"].endswith(f"embedding {options}")
    assert 0 < result["models"]["tiny"]["difference"] < embedding.TOLERANCE
    assert min(result["models"]["tiny"]["images_per_second"].values()) > 0
    assert "| `tiny` |" in text


def test_loader(torchvision, tmp_path, monkeypatch):
    """Batches of ours and torchvision's by two processes, and the table."""
    monkeypatch.setattr(loader, "PICTURES", ((60, 40, 90),))
    options = "--size 16 --images 8 --batch-size 2 --workers 2 --rounds 1"
    result, text = measured(loader, options, "loader", tmp_path, monkeypatch)
    for row in result["pictures"]["60 x 40"].values():
        assert min(row["images_per_second"].values()) > 0
        assert 0 < row["cpu"]["least"] <= row["cpu"]["most"]
    assert "| 60 x 40 | train |" in text


def test_random_starts_beside_those_from_images(uned, tmp_path, monkeypatch):
    """On a smaller copy of the data, with the runs of the ablation that are there."""
    quick = "--preset micro --init compact --steps 1 --batch-size 4 --period 4".split()
    monkeypatch.setattr(
        ablation, "call", lambda *words, log: udon.main([*map(str, words[1:]), *quick])
    )
    small, file = tmp_path / "small", tmp_path / "results.md"
    file.write_text(MARKED.format("start"))
    cut = ["--cut", uned, small, "--images", 3, "--classes", 2, "--domains", "birds"]
    places = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    run(start, cut, monkeypatch)
    arguments = ["--data", small, "--methods", "usc", "--seeds", 2, *places, "--table", file]
    run(start, arguments, monkeypatch)
    expected = [f"usc-{name}" for name in start.STARTS]
    (results,) = start.read(tmp_path / "results").values()
    assert {row: len(runs) for row, runs in results.items()} == dict.fromkeys(expected, 2)
    assert data.Benchmark(small).split("birds", "train").class_names == ["0", "1"]
    assert len(data.Benchmark(small).split("birds", "train")) == 6
    lines = [line for line in file.read_text().splitlines() if "`usc`" in line]
    assert len(lines) == 3 and all(line.startswith("| `small` | `usc` |") for line in lines)
    commands = {result["command"] for runs in results.values() for result in runs.values()}
    assert len(commands) == 6 and all("--data small " in command for command in commands)


def test_defaults_beside_the_start_of_training(uned, tmp_path, monkeypatch):
    """On the domains that were trained on, and on others; the start has learned nothing."""
    pytest.importorskip("scipy")
    quick = "--preset micro --batch-size 4 --period 4".split()
    heads = {}

    def call(program, *words, log):
        if program == "evaluate.py":
            return evaluate.main([*map(str, words)])
        steps = [] if "--steps" in words else ["--steps", "2"]
        udon.main([*map(str, words), *quick, *steps])
        out = words[words.index("--out") + 1]
        heads[out.parent.name] = checkpoint.load(out / "last.pt")[0].student_head.weight

    monkeypatch.setattr(ablation, "call", call)
    file = tmp_path / "results.md"
    file.write_text(MARKED.format("defaults"))
    places = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    options = ["--data", uned, "--unseen", uned, "--seeds", 2]
    options += ["--methods", "usc", "distill-8", "start", "start-lda"]
    run(defaults, [*options, *places, "--table", file], monkeypatch)
    lines = [line for line in file.read_text().splitlines() if "| `" in line]
    assert len(lines) == 1 + 4 + 4 and f"| `{uned.name}` | `usc` |" in lines[1]
    splits = data.Benchmark(uned)
    images = {name: len(splits.split(name, "train")) for name in splits.domains}
    (results,) = defaults.read(tmp_path / "results").values()
    for runs in results.values():
        assert all(run["images"] == images for run in runs.values())
        assert all(run["unseen"]["mean"] == pytest.approx(run["mean"]) for run in runs.values())
    distilled, runs = results["distill-8"][1], tmp_path / "runs" / uned.name
    assert distilled["command"].endswith(f"--teachers {uned.name}/teachers/seed1 --workers 0")
    parts = [*(runs / "teachers" / "seed1").glob("*/test.json"), runs / "distill-8/seed1/test.json"]
    seconds = [json.loads(part.read_text())["cpu_seconds"] for part in parts]
    assert len(parts) == 3 and distilled["cpu_seconds"] == pytest.approx(sum(seconds))
    errors = {
        name: (axes @ axes.T - torch.eye(len(axes))).abs().max() for name, axes in heads.items()
    }
    assert errors["start"] < 1e-5 < 1e-3 < errors["start-lda"]  # principal axes, whitened ones
    moved = {name: (heads[name] - heads["start"]).abs().max() for name in ("start", "usc")}
    assert moved["start"] == 0 < 1e-3 < moved["usc"]


def test_settings_are_chosen_on_one_half_and_judged_on_the_other(uned, tmp_path, monkeypatch):
    """The validation of a half chooses; the table shows its test on the other half."""
    pytest.importorskip("scipy")
    values = {  # {(half, setting): (validation, test)}
        ("first", "before"): (0.5, 0.4),
        ("first", "area"): (0.6, 0.1),
        ("second", "before"): (0.7, 0.3),
        ("second", "area"): (0.6, 0.35),
    }
    trained = []

    def result(directory, options):
        half, setting = directory.parts[-3:-1]
        domains = options[options.index("--domains") + 1 : options.index("--method")]
        trained.append((half, setting, *domains))
        val, test = values[half, setting]
        mean = {"recall_at_1": test, "mmp_at_5": test / 2}
        seconds = 2.0 if setting == "area" else 1.0
        result = {"mean": mean, "domains": dict.fromkeys(domains), "step": 1, "images": {}}
        result |= {"val_recall_at_1": val, "cpu_seconds": seconds, "parameters": {}}
        return result | {"backbone": {"mean": mean}}

    monkeypatch.setattr(ablation, "train", result)
    file = tmp_path / "results.md"
    file.write_text(MARKED.format("choice"))
    options = ["--data", uned, "--settings", "before", "area", "--results", tmp_path / "results"]
    run(choice, [*options, "--table", file], monkeypatch)
    assert [parts[2:] for parts in trained] == [("birds",), ("cars",)] * 2
    text = file.read_text()
    assert "| `--min-area 0.3` | 1 | +10.0 | -30.0 | -15.0 | -10.0 | +5.0 | +2.5 | 2.00 |" in text
    chosen = "Chosen on the first half: `--min-area 0.3`. On the second half it changes"
    assert f"{chosen} R@1 +5.0 and mMP@5 +2.5." in text
    assert "Chosen on the second half: as before. On the first half nothing changes." in text


def test_a_domain_is_added(uned, tmp_path, monkeypatch):
    """All four students are tested on all domains; the old ones are continued."""
    pytest.importorskip("scipy")
    quick = "--preset micro --steps 1 --batch-size 4 --period 4".split()

    def call(program, *words, log):
        main = {"udon.py": udon.main, "evaluate.py": evaluate.main}[program]
        main([*map(str, words), *(quick if program == "udon.py" else [])])

    monkeypatch.setattr(ablation, "call", call)
    out, file = tmp_path / "added_domain.json", tmp_path / "results.md"
    file.write_text(MARKED.format("added domain"))
    arguments = ["--data", uned, "--new", "cars", "--runs", tmp_path / "runs", "--out", out]
    run(added_domain, [*arguments, "--table", file], monkeypatch)
    results = json.loads(out.read_text())["runs"]
    assert [result["row"] for result in results] == list(added_domain.ROWS)
    assert all(set(result["domains"]) == {"birds", "cars"} for result in results)
    assert str(tmp_path) not in out.read_text()
    assert all(f"| {name} |" in file.read_text() for name in added_domain.ROWS.values())


def test_frozen_and_fine_tuned_backbones(uned, tmp_path, monkeypatch):
    """Small runs and measurements in this process, and their table."""
    pytest.importorskip("scipy")
    monkeypatch.setattr(ablation, "call", lambda *words, log: udon.main([*map(str, words[1:])]))
    monkeypatch.setattr(frozen, "OPTIONS", frozen.OPTIONS.replace("mini", "micro") + " --steps 1")
    monkeypatch.setattr(frozen, "MODELS", {"micro": (4, 2)})
    monkeypatch.setattr(frozen, "IMAGES", 70)
    monkeypatch.setattr(defaults, "RESULTS", tmp_path / "defaults")
    for method, seed in itertools.product(frozen.METHODS, (0, 1)):
        path = tmp_path / "defaults" / uned.name / method / f"seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = made_up(method, seed, 0.4 + seed / 50)
        path.write_text(json.dumps(result | {"cpu_seconds": 1.0, "command": ""}))
    out, file = tmp_path / "frozen.json", tmp_path / "results.md"
    file.write_text(MARKED.format("frozen"))
    arguments = ["--data", uned, "--seeds", 1, "--runs", tmp_path / "runs", "--out", out]
    run(frozen, [*arguments, "--table", file], monkeypatch)
    values = json.loads(out.read_text())
    runs = [(x["method"], x["views"]) for x in values["runs"] if x["views"] is not None]
    assert runs == [("usc", 0), ("udon-joint", 0), ("usc", 4), ("udon-joint", 4)]
    assert str(uned) not in out.read_text()
    for rates in values["images_per_second"]["micro"].values():
        assert len(rates) == 4 and min(rates.values()) > 0
    assert "| `udon-joint` | fine-tuned | 41.0 ± 12.7 | " in file.read_text()


def test_procedural_table(tmp_path, monkeypatch):
    """Seeds 0, 1, 2 of each method give one table; the backbone is that of the same runs."""
    pytest.importorskip("scipy")
    recalls = {"udon": 0.7, "udon-joint": 0.8, "usc": 0.6}
    for seed in range(3):
        for method, recall in recalls.items():
            path = tmp_path / f"seed{seed}" / ("" if method == "udon" else method)
            path.mkdir(parents=True, exist_ok=True)
            result = made_up(method, seed, recall + seed / 100)
            result |= {"method": method, "backbone": made_up("backbone", seed, 0.25)}
            (path / "test.json").write_text(json.dumps(result))
    file = tmp_path / "results.md"
    file.write_text(MARKED.format("procedural"))
    run(procedural, ["--table", file, "--results", tmp_path], monkeypatch)
    text = file.read_text()
    assert "old" not in text
    assert "| `backbone` | 25.0 ± 0.0 | 12.5 ± 0.0 | -36.0 (p < 0.001) |" in text
    assert "| `udon-joint` | 81.0 ± 2.5 | 40.5 ± 1.2 | +20.0 (p < 0.001) |" in text


def test_procedural_results_must_be_of_the_method(tmp_path, monkeypatch, capfd):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "test.json").write_text(json.dumps({"method": "usc"}))
    (tmp_path / "results.md").write_text(MARKED.format("procedural"))
    arguments = ["--table", tmp_path / "results.md", "--results", tmp_path]
    message = error_of(procedural, arguments, monkeypatch, capfd)
    assert "seed0/test.json is not a result of udon" in message


def test_topk_measures_and_keeps_other_rows(tmp_path, monkeypatch):
    """A case that no machine can hold ends with one sentence and leaves the file as it was."""
    out, file = tmp_path / "out.csv", tmp_path / "results.md"
    command = [sys.executable, "-m", "benchmarks.topk", "--out", out, "--rounds", "1"]
    command += ["--contenders", "numpy", "numpy"]
    case = ["--cases", "3x50x4 copies"]
    subprocess.run([*command, *case], check=True, capture_output=True, cwd=ROOT)
    written = topk.written(out)
    assert [row["contender"] for row in written] == ["product", "ours", "numpy"]
    assert list(written[0]) == list(topk.COLUMNS)

    impossible = ["--cases", "1x9x999999999999999"]
    failed = subprocess.run([*command, *impossible], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "product died in case 1x9x999999999999999" in failed.stderr
    assert topk.written(out) == written
    assert list(tmp_path.iterdir()) == [out]

    file.write_text(MARKED.format("topk"))
    run(topk, ["--table", file, "--out", out], monkeypatch)
    assert file.read_text() == MARKED.format("topk").replace("old\n", topk.table(written))


def test_topk_writes_all_rows_or_none(tmp_path):
    out = tmp_path / "out.csv"
    row = dict.fromkeys(topk.COLUMNS, "1")
    topk.write(out, [row])
    with pytest.raises(ValueError):
        topk.write(out, [row, {**row, "unknown": 1}])
    assert topk.written(out) == [row]
    assert list(tmp_path.iterdir()) == [out]


# Several processes --------------------------------------------------------------------------------


def test_estimates_count_what_the_model_does():
    """Products by torch's own counter, parameters by the model."""
    with torch.device("meta"):
        vit = model.ViT(**model.SIZES["b16"])
        heads = model.UDON(model.ViT(**model.SIZES["b16"]), {"cars": 78})
    with FlopCounterMode(display=False) as counter:
        vit(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * estimates.multiply_adds()
    sizes = [sum(p.numel() for p in network.parameters()) for network in (vit, heads)]
    assert sizes[0] == estimates.BACKBONE
    assert sizes[1] - sizes[0] == estimates.head_parameters(78)


def test_estimates_of_a_step():
    gpu, launch_ms = estimates.GPUS["A100"], {"trained": 0, "frozen": 0}
    one, many = (estimates.step(gpu, count, 78, True, launch_ms) for count in (1, 8))
    # 3 x 128 x 32.9 GFLOP at 40 % of 312 TFLOPS; 8 reads and writes of 86.1 M values.
    assert one["products"] == pytest.approx(101.2, rel=0.01)
    assert one["memory"] == pytest.approx(4e3 * 8 * 86.1e6 / (0.8 * 2.039e12), rel=0.01)
    assert one["communication"] == 0
    assert many["products"] == pytest.approx(one["products"] / 8)
    frozen = estimates.step(gpu, 8, 224_408, False, launch_ms)
    assert frozen["communication"] == pytest.approx(
        1e3 * 1.75 * 4 * 72.1e6 / (0.8 * 300e9), rel=0.01
    )
    slow = estimates.step(gpu, 64, 78, True, {"trained": 50, "frozen": 0})
    assert slow["step"] >= slow["launches"] == pytest.approx(50)
    assert estimates.limit(slow) == "launches"


def test_payload_of_a_step(tmp_path, monkeypatch):
    """The gradients of the backbone and of one domain's heads, and the embeddings of a share."""
    monkeypatch.setattr(scaling, "BATCHES", {"micro": 2})

    def run(rank):
        with distributed.processes("cpu"):
            trainer = scaling.Trainer("micro")
            file = tmp_path / f"{rank}.json"
            file.write_text(json.dumps([trainer.payload(1), trainer.payload(1)]))

    ended = job(2, run, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended
    with torch.device("meta"):
        backbone = model.ViT(**model.SIZES["micro"])
    width, size = backbone.width, sum(p.numel() for p in backbone.parameters())
    for rank in range(2):
        for sent, classes in zip(
            json.loads((tmp_path / f"{rank}.json").read_text()), step_overhead.COUNTS[:2]
        ):
            assert sent["gradients"] == 4 * (size + (width + 1 + classes) * (64 + 256))
            assert sent["embeddings"] == 4 * 2 * (64 + 256)
