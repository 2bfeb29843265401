"""benchmarks/ablation.py, rows.py and tables.py: configurations, statistics, tables, runs."""

import json
import math
import statistics
import sys

import pytest

import config
import data
import evaluate
import udon
from benchmarks import ablation, rows, tables
from benchmarks.rows import Row

QUANTILES = {  # of Student's t at 97.5 %, by degrees of freedom
    1: 12.7062047364,
    2: 4.30265272991,
    4: 2.7764451052,
    9: 2.26215716274,
    30: 2.04227245630,
}
DOMAINS = ("birds", "cars")


# Configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", rows.ROWS)
def test_every_row_is_a_valid_configuration(row):
    options = rows.config_of(row, seed=7, data="/x")
    teachers = rows.ROWS[row].teachers
    assert (options.seed, options.data, options.teachers) == (7, "/x", teachers)
    assert teachers is None or teachers in rows.ROWS
    assert rows.ROWS[row].base in (None, *rows.SYSTEMS)


def test_rows_named_after_methods_are_these_methods():
    for method in set(config.METHODS) - {"distill"}:
        start = {"init": rows.WEIGHTS, "student_init": "lecun", "frozen_epochs": 1.0}
        start |= {"batch_size": 64, "backbone_lr": 3e-4, "schedule": "constant"}
        start |= {"warmup_steps": 0, "min_steps": 0, "ema": 0}
        sampler = {"sampler": "round_robin"} if method == "udon-joint" else {}
        expected = config.Config(preset="mini", method=method, **start, **sampler)
        assert rows.config_of(method) == expected


def test_a_setting_is_the_row_that_it_changes_with_one_option():
    changed, base = rows.config_of("udon-rr-scale-32"), rows.config_of("udon-rr")
    assert (changed.scale, base.scale) == (32, 16)
    assert (changed.sampler, changed.negatives) == (base.sampler, base.negatives)


# Statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", QUANTILES)
def test_half_width_of_an_interval(freedom):
    pytest.importorskip("scipy")
    values = [0.0] * freedom + [1.0]
    error = statistics.stdev(values) / math.sqrt(freedom + 1)
    assert tables.half_width(values) == pytest.approx(QUANTILES[freedom] * error, rel=1e-9)


def test_students_sleep_data():
    """Student (1908), differences of ten patients: p = 0.002833, interval 0.70 to 2.46."""
    pytest.importorskip("scipy")
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert tables.p_value(differences) == pytest.approx(0.002833, abs=1e-6)
    mean, half = statistics.fmean(differences), tables.half_width(differences)
    assert (mean - half, mean + half) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


def test_p_value_of_equal_differences():
    assert tables.p_value([2.0, 2.0]) == 0
    assert tables.p_value([0.0, 0.0]) == 1


def test_one_value_has_no_interval_and_no_p_value():
    assert tables.mean_interval([0.5]) == "50.0"
    results = {"a": {0: made_up("a", 0, 0.5)}, "b": {0: made_up("b", 0, 0.4)}}
    recall = tables.mean_of("recall_at_1")
    assert tables.difference(results, "a", "b", recall) == "+10.0"
    assert tables.difference(results, "a", "a", recall) == ""
    assert tables.difference(results, "a", "c", recall) == ""


def test_without_scipy(monkeypatch):
    for name in ("scipy", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(data.InputError, match=r"scipy is not installed.*pip install -e"):
        tables.mean_interval([0.5, 0.6])


# Tables -------------------------------------------------------------------------------------------


def made_up(row, seed, recall):
    metrics = {"recall_at_1": recall, "mmp_at_5": recall / 2}
    separate = {"mean": metrics, "domains": dict.fromkeys(DOMAINS, metrics)}
    return {
        "row": row,
        "seed": seed,
        **separate,
        "further": {"student-separate": separate, "teacher-separate": separate},
        "method": "udon",
        "parameters": {"trained": 2_000_000, "inference": 1_000_000},
        "images": {"birds": 1000, "cars": 3000},
        "val_recall_at_1": recall,
        "sampler_weights": {
            "5": {"birds": 0.5, "cars": 0.5},
            "9": {"birds": 0.25, "cars": 0.75},
        },
    }


RECALLS = {
    "usc": [0.30, 0.32, 0.34],
    "udon-joint": [0.35, 0.36, 0.40],
    "udon": [0.33, 0.36, 0.36],
    "udon-rr": [0.32, 0.33, 0.34],
    "udon-joint-no-logit": [0.31],
    "udon-joint-scale-32": [0.4],
    "udon-period-25": [0.5],
    "former": [0.1],
}


def test_tables(tmp_path):
    pytest.importorskip("scipy")
    for row, recalls in RECALLS.items():
        for seed, recall in enumerate(recalls):
            file = tmp_path / "results" / row / f"seed{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(made_up(row, seed, recall)))
    times = {
        "usc": {"to_usc": 1.0, "frozen_to_usc": 0.4},
        "udon-joint": {"to_usc": 1.5, "frozen_to_usc": 0.6},
    }
    (tmp_path / "times.json").write_text(json.dumps({"rows": times}))
    file = tmp_path / "tables.md"
    file.write_text("before\n<!-- ablation -->\nold\n<!-- end of ablation -->\nafter\n")
    options = ["--results", tmp_path / "results", "--times", tmp_path / "times.json"]
    ablation.main(["--tables", str(file), *map(str, options)])
    text = file.read_text()
    assert text.startswith("before\n<!-- ablation -->\n")
    assert text.endswith("|\n<!-- end of ablation -->\nafter\n")
    assert "old" not in text

    half = QUANTILES[2] * statistics.stdev([35, 36, 40]) / math.sqrt(3)
    gain = f"+5.0 (p = {tables.p_value([5.0, 4.0, 6.0]):.3f})"
    line = next(line for line in text.splitlines() if line.startswith("| `udon-joint` | 37.0"))
    assert line.startswith(f"| `udon-joint` | 37.0 ± {half:.1f} |")
    assert gain in line
    assert line.endswith("| 2.00 | 1.00 | 1.50 | 3 |")
    assert "| `udon-joint-no-logit` | 31.0 |" in text
    assert "| `--scale 32` | `udon-joint` | 40.0 | 20.0 | +5.0 | +5.0 | +2.5 | 1 |" in text
    assert "| `--period 25` | `udon` | 50.0 | 25.0 | +17.0 | +17.0 | +8.5 | 1 |" in text
    assert "| `former` | `udon-joint` | 10.0 |" in text.split("Tried and not kept")[1]
    assert "| images, `udon` | 1.0 | 3.0 |" in text
    assert "| weight after step 9, % | 25.0 | 75.0 |" in text
    gain = f"+2.0 (p = {tables.p_value([1.0, 3.0, 2.0]):.3f})"
    assert f"| R@1 − `udon-rr` | {gain} | {gain} |" in text


def test_time_relative_to_usc():
    """One of 6 epochs, or of 12, is frozen; the time of frozen teachers is added."""
    times = {
        row: {"to_usc": trained, "frozen_to_usc": frozen}
        for row, trained, frozen in (
            ("usc", 1.0, 0.4),
            ("specialists-256", 1.0, 0.4),
            ("distill-8", 1.3, 0.7),
            ("specialists-256-twice", 1.0, 0.4),
            ("distill-8-joint-twice", 1.3, 0.7),
            ("udon-joint-twice", 1.1, 0.5),
            ("udon", 1.2, 0.0),
            ("udon-joint-frozen-epochs-2", 1.2, 0.6),
        )
    }
    expected = {
        "usc": 0.9,
        "distill-8": 0.9 + 1.2,
        "distill-8-joint-twice": 1.8 + 1.2,
        "udon-joint-twice": 2.1,
        "udon": 1.0,
        "udon-joint-frozen-epochs-2": 1.0,
    }
    for row, time in expected.items():
        assert tables.relative_time(times, row) == pytest.approx(time), row
    assert math.isnan(tables.relative_time(times, "distill-1-joint"))


# Runs ---------------------------------------------------------------------------------------------


def test_specialists_share_the_steps_of_a_row(uned):
    grid = ablation.Grid(str(uned), ablation.RESULTS, ablation.RUNS)
    names, values = grid.share("cars")[::2], grid.share("cars")[1::2]
    splits = {domain: data.Benchmark(uned).split(domain, "train") for domain in DOMAINS}
    run = udon.build_run(rows.config_of("usc"), splits)
    assert names == ["--steps", "--frozen-epochs", "--val-every"]
    # An epoch of one of the two domains is one step, too.
    assert values == [run.steps // 2, run.frozen_steps / 2, 1]
    twice = [run.steps, run.frozen_steps, max(1, run.steps_per_epoch)]
    assert grid.share("cars", 2)[1::2] == twice


def test_options_name_the_teachers_without_directories_of_the_machine(uned):
    grid = ablation.Grid(str(uned), ablation.RESULTS, ablation.RUNS)
    options = {
        row: ablation.relative(" ".join(map(str, grid.options(row, 2))), str(uned))
        for row in ("distill-8", "distill-1-joint")
    }
    start = f"--data {uned.name} --seed 2 --workers 0 {rows.START} --method distill"
    assert options["distill-8"].startswith(start)
    assert options["distill-8"].endswith("--teachers runs/ablation/specialists-256/seed2")
    assert options["distill-1-joint"].endswith("--teachers runs/ablation/teachers/seed2/best.pt")


def test_a_failed_command_is_logged_and_reported(tmp_path):
    log = tmp_path / "logs" / "run.log"
    with pytest.raises(data.InputError, match=f"status 2.*{log}"):
        ablation.call("evaluate.py", tmp_path / "nowhere.pt", log=log)
    assert "nowhere.pt" in log.read_text()


def call_in_process(script, *arguments, log):
    """Saves the start of a Python process for each of many small runs."""
    module = {"udon.py": udon, "evaluate.py": evaluate}[script]
    module.main([str(argument) for argument in arguments])


@pytest.fixture
def small_rows(monkeypatch):
    """Three rows of few steps, of which udon-joint is a main row."""
    small = "--init scratch --image-size 32 --batch-size 4 --steps 6 --val-every 3 --student-dim 8"
    small_rows = {
        "specialists-256": Row(2, f"--method usc {small}"),
        "distill-8": Row(2, f"--method distill {small}", teachers="specialists-256"),
        "udon-joint": Row(1, f"{rows.UDON_JOINT} {small}"),
    }
    monkeypatch.setattr(rows, "ROWS", small_rows)
    monkeypatch.setattr(rows, "MAIN_SEEDS", 1)
    monkeypatch.setattr(ablation.Grid, "share", lambda self, domain, length: ["--steps", 3])
    return small_rows


def test_results_of_a_grid_and_its_resumption(uned, tmp_path, small_rows, monkeypatch):
    """A second call trains nothing; a lost result is written again from the finished run."""
    monkeypatch.setattr(ablation, "version", lambda: "0123456789")
    monkeypatch.setattr(ablation, "call", call_in_process)
    results, runs = tmp_path / "results", tmp_path / "runs"
    arguments = ["--data", str(uned), "--results", str(results), "--runs", str(runs)]
    arguments += ["--parallel", "1", "--rows", *small_rows]
    ablation.main(arguments)
    paths = {str(path.relative_to(results)) for path in results.rglob("*.json")}
    assert paths == {f"{row}/seed0.json" for row in small_rows}
    found = {path: json.loads((results / path).read_text()) for path in paths}

    joint = found["udon-joint/seed0.json"]
    assert joint["config"]["seed"] == 0
    assert set(joint["further"]) == {"student-separate", "teacher-separate", "backbone-merged"}
    assert str(uned) not in json.dumps(joint)
    assert joint["config"]["data"] == uned.name
    assert joint["images"] == {"birds": 12, "cars": 12}
    assert set(joint["backbone"]) == {"recall_at_1", "mmp_at_5"}
    assert joint["cpu_seconds"] > 0
    teachers = f"--teachers {runs / 'specialists-256' / 'seed0'}"
    assert found["distill-8/seed0.json"]["command"].endswith(teachers)
    specialists = found["specialists-256/seed0.json"]
    assert specialists["images"] == {"birds": 12, "cars": 12}
    assert set(specialists["domains"]) == set(DOMAINS)

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")}
    lost = results / "udon-joint" / "seed0.json"
    lost.unlink()
    ablation.main(arguments)
    assert json.loads(lost.read_text()) == found["udon-joint/seed0.json"]
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")}


@pytest.mark.parametrize("parallel", (1, 2))
def test_no_job_is_started_after_a_failure(uned, tmp_path, monkeypatch, capsys, parallel):
    names = [f"row{number}" for number in range(9)]
    monkeypatch.setattr(rows, "ROWS", {name: Row(1, "--method usc") for name in names})
    started = []

    def fail(command, **_):
        started.append(command)
        return 3

    monkeypatch.setattr(ablation.subprocess, "call", fail)
    results, runs = tmp_path / "results", tmp_path / "runs"
    arguments = ["--data", str(uned), "--results", str(results), "--runs", str(runs)]
    with pytest.raises(SystemExit) as end:
        ablation.main([*arguments, "--parallel", str(parallel), "--rows", *names])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert 1 <= len(started) <= parallel
    assert message.count("\n") == 1
    assert "ended with status 3" in message
    assert "seed0.log" in message
    assert not list(results.rglob("*.json"))
