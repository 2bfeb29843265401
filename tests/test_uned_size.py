"""benchmarks/uned_size.py: what it makes up, a run at a small size, and that it notices a metric that is wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import uned_size  # noqa: E402

import evaluate  # noqa: E402


def run(monkeypatch, out):
    monkeypatch.setattr(
        sys,
        "argv",
        ["uned_size.py", "--queries", "300", "--index", "4000", "--dim", "8", "--out", str(out)],
    )
    uned_size.main()


@pytest.mark.parametrize("q, g", ((700, 4000), (5, 4000), (60, 8)))
def test_what_is_made_up(q, g):
    queries, index, exclude = uned_size.made_up(q, g, 8, 3)
    for side, n in ((queries, q), (index, g)):
        assert len(side.vectors) == len(side.labels) == len(side.domains) == n
        assert torch.allclose(side.vectors.norm(dim=1), torch.ones(n), atol=1e-6)
    for row, itself in enumerate(exclude.tolist()):
        if itself >= 0:
            assert torch.equal(queries.vectors[row], index.vectors[itself])
            assert (queries.labels[row], queries.domains[row]) == (
                index.labels[itself],
                index.domains[itself],
            )
    again = uned_size.made_up(q, g, 8, 3)
    assert torch.equal(again[1].vectors, index.vectors) and np.array_equal(again[2], exclude)


def test_unless_told_it_has_the_size_of_uned():
    assert (uned_size.QUERIES, uned_size.INDEX) == (241_986, 1_397_126)
    for side, total in zip(zip(*uned_size.UNED.values()), (uned_size.QUERIES, uned_size.INDEX)):
        assert uned_size.shares(side, total) == list(side)


def test_a_small_run(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["queries"], result["index"], result["dim"], result["queries_equal_to_loop"]) == (
        300,
        4000,
        8,
        300,
    )
    assert (
        0 < result["excluded"] < 300
        and 0 < result["recall_at_1"] < 1
        and 0 < result["mmp_at_5"] < 1
    )
    assert f"R@1 {100 * result['recall_at_1']:.2f}" in capsys.readouterr().out


def test_a_wrong_metric_stops_it(monkeypatch, tmp_path):
    counts = evaluate._count_sharing
    monkeypatch.setattr(evaluate, "_count_sharing", lambda *sides: counts(*sides) + 1)
    with pytest.raises(AssertionError):
        run(monkeypatch, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_the_smallest_run(monkeypatch, tmp_path):
    options = "--queries 1 --index 1 --dim 1 --looped 1 --out".split()
    monkeypatch.setattr(sys, "argv", ["uned_size.py", *options, str(tmp_path / "o")])
    uned_size.main()
    assert json.loads((tmp_path / "o").read_text())["queries_equal_to_loop"] == 1
