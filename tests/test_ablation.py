"""benchmarks/ablation.py: the statistics against known values, the tables from made-up results, a grid that stops and goes on."""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402

import data  # noqa: E402
import udon  # noqa: E402

QUANTILES = {
    1: 12.7062047364,
    2: 4.30265272991,
    3: 3.18244630528,
    4: 2.7764451052,
    5: 2.57058183661,
    8: 2.30600413503,
    9: 2.26215716274,
    30: 2.04227245630,
}  # of 97.5 %, degrees of freedom: tables of Student's t


@pytest.mark.parametrize("freedom", QUANTILES)
def test_students_t(freedom):
    assert ablation.within(QUANTILES[freedom], freedom) == pytest.approx(0.95, abs=1e-9)
    assert ablation.within(0.0, freedom) == 0 and ablation.within(1e6, freedom) == pytest.approx(
        1, abs=1e-5
    )


@settings(deadline=None, max_examples=30)
@given(freedom=st.integers(1, 40), t=st.floats(0, 20))
def test_students_t_is_the_integral_of_its_density(freedom, t):
    density = lambda x: (
        np.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
        / np.sqrt(freedom * np.pi)
        * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    )
    x = np.linspace(0, t, 20001)
    integral = 2 * np.sum((density(x[1:]) + density(x[:-1])) / 2) * (x[1] - x[0])
    assert ablation.within(t, freedom) == pytest.approx(integral, abs=1e-5)


def test_interval_and_p():
    """Student's sleep data (1908): differences of ten patients; p = 0.002833, interval of the mean 0.70 to 2.46."""
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert ablation.p_value(differences) == pytest.approx(0.002833, abs=1e-6)
    mean, half = statistics.fmean(differences), ablation.interval(differences)
    assert (mean - half, mean + half) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert ablation.interval([1.0]) == math.inf and ablation.p_value([2.0, 2.0]) == 0


def made_up(row, seed, recall, **changes):
    domains = {
        "birds": {"recall_at_1": recall, "mmp_at_5": recall / 2},
        "cars": {"recall_at_1": recall, "mmp_at_5": recall / 2},
    }
    further = {
        name: {"mean": domains["cars"], "domains": domains}
        for name in ("student-separate", "teacher-separate")
    }
    weights = {"5": {"birds": 0.5, "cars": 0.5}, "9": {"birds": 0.25, "cars": 0.75}}
    return {
        "row": row,
        "seed": seed,
        "mean": domains["birds"],
        "domains": domains,
        "further": further,
        "method": "udon",
        "parameters": {"trained": 2_000_000, "inference": 1_000_000},
        "images": {"birds": 1000, "cars": 3000},
        "cpu_seconds": 10.0,
        "val_recall_at_1": recall,
        "sampler_weights": weights,
        **changes,
    }


def test_tables(tmp_path):
    results = {
        "usc-rr": [0.30, 0.32, 0.34],
        "udon": [0.35, 0.36, 0.40],
        "udon-paper": [0.33, 0.36, 0.36],
        "udon-paper-rr": [0.32, 0.33, 0.34],
        "no-logit": [0.31],
        "scale-32": [0.4],
        "paper-period-25": [0.5],
        "folly": [0.1],
    }
    for row, recalls in results.items():
        for seed, recall in enumerate(recalls):
            file = tmp_path / "results" / row / f"seed{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(made_up(row, seed, recall, cpu_seconds=10.0)))
    times = {
        "usc-rr": {"to_usc": 1.0, "frozen_to_usc": 0.4},
        "udon": {"to_usc": 1.5, "frozen_to_usc": 0.6},
    }
    (tmp_path / "times.json").write_text(json.dumps({"rows": times}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- ablation -->\nold\n<!-- end of ablation -->\nafter\n")
    sys.argv = [
        "ablation.py",
        "--tables",
        str(readme),
        "--results",
        str(tmp_path / "results"),
        "--times",
        str(tmp_path / "times.json"),
    ]
    ablation.main()
    text = readme.read_text()
    assert text.startswith("before\n<!-- ablation -->\n|") and text.endswith(
        "<!-- end of ablation -->\nafter\n"
    )
    assert "old" not in text
    half = 4.30265272991 * statistics.stdev([35, 36, 40]) / math.sqrt(3)
    row = next(line for line in text.splitlines() if line.startswith("| **UDON"))
    assert f"| 37.0 ± {half:.1f} |" in row and "| 1.50 | 3 |" in row and "| 2.00 | 1.00 |" in row
    differences = [5.0, 4.0, 6.0]
    assert f"+5.0 (p = {ablation.p_value(differences):.3f})" in row
    assert "| `no-logit` | 31.0 |" in text, "one seed has no interval"
    settings, gone = text.split("One setting changed")[1].split("Tried and not kept")
    assert (
        "| `--scale 32` | UDON, the default of `mini` | 40.0 | 20.0 | +5.0 | +5.0 | +2.5 | 1 |"
        in settings
    )
    assert (
        "| `--period 25` | UDON as published | 50.0 | 25.0 | +17.0 | +17.0 | +8.5 | 1 |" in settings
    )
    assert "scale-32" not in text.split("Variations")[1].split("One setting")[0]
    assert "| `folly` | UDON, the default of `mini` | 10.0 |" in gone, (
        "a row that has gone keeps its results"
    )
    assert (
        "| images, UDON as published | 1.0 | 3.0 |" in text
        and "| weight after step 9, % | 25.0 | 75.0 |" in text
    )
    gain = f"+2.0 (p = {ablation.p_value([1.0, 3.0, 2.0]):.3f})"
    assert f"| R@1 − round robin | {gain} | {gain} |" in text


def test_every_row_is_a_valid_command():
    for row, (seeds, options, teachers) in ablation.ROWS.items():
        config = ablation.config_of(row, seed=7, data="x")
        assert (config.seed, config.data, config.teachers) == (7, "x", teachers), (row, options)
        assert teachers is None or teachers in ablation.ROWS, row


def test_times_of_a_row():
    """Of 6 epochs, or of 12, one is frozen; a distilled student's teachers are trained before, or twice as long."""
    times = {
        row: {"to_usc": whole, "frozen_to_usc": frozen}
        for row, whole, frozen in (
            ("usc-rr", 1.0, 0.4),
            ("specialists-256", 1.0, 0.4),
            ("distill-8", 1.3, 0.7),
            ("specialists-256-twice", 1.0, 0.4),
            ("distill-8-twice", 1.3, 0.7),
            ("udon-twice", 1.1, 0.5),
            ("udon-paper", 1.2, 0.0),
            ("frozen-2", 1.2, 0.6),
        )
    }
    expected = {
        "usc-rr": 0.9,
        "distill-8": 0.9 + 1.2,
        "distill-8-twice": 1.8 + 1.2,
        "udon-twice": 2.1,
        "udon-paper": 1.0,
        "frozen-2": 1.0,
    }
    for row, time in expected.items():
        assert math.isclose(ablation.time_of(times, row), time), row
    assert math.isnan(ablation.time_of(times, "distill-1"))


def test_a_specialists_share(uned):
    """Of 6 steps in an epoch of 40 images, one frozen, each of two domains gets the half, in parts of its own epochs."""
    grid = ablation.Grid(argparse.Namespace(data=str(uned)))
    (_, steps), (_, frozen_epochs), (_, val_every) = zip(*[iter(grid.share("cars"))] * 2)
    run = udon.Run.of(
        udon.resolve(udon.Config()),
        {d: data.Benchmark(uned).split(d, "train") for d in ("birds", "cars")},
        None,
    )
    assert (steps, val_every) == (run.steps // 2, 1)
    assert frozen_epochs * 1 == run.frozen_steps / 2  # an epoch of one domain is one step too
    assert grid.share("cars", 2)[1::2] == [run.steps, run.frozen_steps, max(1, run.steps_per_epoch)]


def test_a_grid_that_stops_and_goes_on(uned, tmp_path, monkeypatch, capsys):
    """Two rows and their teachers; a second call trains nothing; a lost result is made again from the finished run."""
    quick = "--init scratch --image-size 32 --batch-size 4 --steps 6 --period 3 --val-every 3 --student-dim 8"
    monkeypatch.setattr(
        ablation,
        "ROWS",
        {
            "specialists-256": (1, f"--method usc {quick}", None),
            "distill-8": (1, f"--method distill {quick}", "specialists-256"),
            "udon": (2, quick, None),
        },
    )
    monkeypatch.setattr(ablation, "MAIN", 2)
    monkeypatch.setattr(ablation.Grid, "share", lambda self, domain, times: ["--steps", 3])
    arguments = [
        "ablation.py",
        "--data",
        str(uned),
        "--results",
        str(tmp_path / "results"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    ablation.main()
    files = sorted(
        str(p.relative_to(tmp_path / "results")) for p in (tmp_path / "results").rglob("*.json")
    )
    assert files == [
        "distill-8/seed0.json",
        "specialists-256/seed0.json",
        "udon/seed0.json",
        "udon/seed1.json",
    ]
    result = json.loads((tmp_path / "results" / "udon" / "seed1.json").read_text())
    assert result["config"]["seed"] == 1 and set(result["further"]) == {
        "student-separate",
        "teacher-separate",
        "backbone-merged",
    }
    assert str(uned) not in json.dumps(result) and result["config"]["data"] == uned.name
    assert (
        result["images"] == {"birds": 12, "cars": 12}
        and result["version"]
        and result["cpu_seconds"] > 0
    )
    distilled = json.loads((tmp_path / "results" / "distill-8" / "seed0.json").read_text())
    assert distilled["command"].endswith(
        f"--teachers {tmp_path / 'runs' / 'specialists-256' / 'seed0'}"
    )
    specialists = json.loads((tmp_path / "results" / "specialists-256" / "seed0.json").read_text())
    assert specialists["images"] == {"birds": 12, "cars": 12} and set(specialists["domains"]) == {
        "birds",
        "cars",
    }
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    lost = tmp_path / "results" / "udon" / "seed0.json"
    contents = json.loads(lost.read_text())
    lost.unlink()
    ablation.main()
    assert json.loads(lost.read_text()) == contents
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert all(after[p] == before[p] for p in before if p.suffix == ".pt"), (
        "nothing was trained again"
    )


@pytest.mark.parametrize("at_once", (1, 2))
def test_a_run_that_fails_stops_the_others(uned, tmp_path, monkeypatch, capsys, at_once):
    """What has not begun is not begun; one sentence names the log; no result is written."""
    monkeypatch.setattr(ablation, "ROWS", {f"row{i}": (1, "--method usc", None) for i in range(9)})
    begun = []
    monkeypatch.setattr(
        ablation.subprocess, "call", lambda command, **_: begun.append(command) or 3
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ablation.py",
            "--data",
            str(uned),
            "--results",
            str(tmp_path / "results"),
            "--runs",
            str(tmp_path / "runs"),
            "--at-once",
            str(at_once),
            "--rows",
            *ablation.ROWS,
        ],
    )
    with pytest.raises(SystemExit) as end:
        ablation.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and 1 <= len(begun) <= at_once
    assert said.count("\n") == 1 and "ended with status 3" in said and "seed0.log" in said
    assert not list((tmp_path / "results").rglob("*.json"))


def test_a_command_names_its_teachers(uned):
    """Without the folders of this machine."""
    grid = ablation.Grid(
        argparse.Namespace(data=str(uned), runs=ablation.RUNS, results=ablation.RESULTS)
    )
    of = {
        row: ablation.relative(" ".join(map(str, grid.command(row, 2))), grid.options.data)
        for row in ("distill-8", "distill-1")
    }
    assert of["distill-8"].startswith(f"--data {uned.name} --seed 2 --workers 0 --method distill")
    assert of["distill-8"].endswith("--teachers runs/ablation/specialists-256/seed2")
    assert of["distill-1"].endswith("--teachers runs/ablation/teachers/seed2/best.pt")
