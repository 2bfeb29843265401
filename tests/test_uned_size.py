"""benchmarks/uned_size.py: the synthetic data, a small run, and that it notices a wrong metric."""

import json
import sys

import numpy as np
import pytest
import torch

import metrics
from benchmarks import uned_size


def run(monkeypatch, out):
    monkeypatch.setattr(
        sys,
        "argv",
        ["uned_size.py", "--queries", "300", "--index", "4000", "--dim", "8", "--out", str(out)],
    )
    uned_size.main()


@pytest.mark.parametrize("q, g", ((700, 4000), (5, 4000), (60, 8)))
def test_synthetic_data(q, g):
    queries, index, exclude = uned_size.synthetic(q, g, 8, 3)
    for side, n in ((queries, q), (index, g)):
        assert len(side.vectors) == len(side.labels) == len(side.domains) == n
        assert torch.allclose(side.vectors.norm(dim=1), torch.ones(n), atol=1e-6)
    for query, row in enumerate(exclude.tolist()):
        if row >= 0:
            assert torch.equal(queries.vectors[query], index.vectors[row])
            assert queries.labels[query] == index.labels[row]
            assert queries.domains[query] == index.domains[row]
    again = uned_size.synthetic(q, g, 8, 3)
    assert torch.equal(again[1].vectors, index.vectors) and np.array_equal(again[2], exclude)


def test_the_default_size_is_that_of_uned():
    assert (uned_size.QUERIES, uned_size.INDEX) == (241_986, 1_397_126)
    for side, total in zip(zip(*uned_size.UNED.values()), (uned_size.QUERIES, uned_size.INDEX)):
        assert uned_size.shares(side, total) == list(side)


def test_a_small_run(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["queries"], result["index"], result["dim"]) == (300, 4000, 8)
    assert result["queries_equal_to_loop"] == 300 and 0 < result["excluded"] < 300
    assert 0 < result["recall_at_1"] < 1 and 0 < result["mmp_at_5"] < 1
    assert f"R@1 {100 * result['recall_at_1']:.2f}" in capsys.readouterr().out


def test_a_wrong_metric_stops_it(monkeypatch, tmp_path):
    counts = metrics.relevant_counts
    monkeypatch.setattr(metrics, "relevant_counts", lambda *sides: counts(*sides) + 1)
    with pytest.raises(AssertionError):
        run(monkeypatch, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_the_smallest_run(monkeypatch, tmp_path):
    options = "--queries 1 --index 1 --dim 1 --looped 1 --out".split()
    monkeypatch.setattr(sys, "argv", ["uned_size.py", *options, str(tmp_path / "o")])
    uned_size.main()
    assert json.loads((tmp_path / "o").read_text())["queries_equal_to_loop"] == 1
