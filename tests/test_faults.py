"""benchmarks/faults.py in short: killed runs and mutated inputs lose nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import faults, mutations

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = ["-m", "benchmarks.faults", "--kills", "2", "--mutations", "500", "--out", out]
    run = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", faults.KILLS)
def test_killed_runs_end_as_the_undisturbed_run(results, kind):
    row = results["kills"][kind]
    assert row["tried"] >= 1 and row["lost"] == 0, row["examples"]


@pytest.mark.parametrize("kind", mutations.CASES)
def test_mutated_inputs_are_used_as_they_are_or_refused(results, kind):
    row = results["mutations"][kind]
    assert row["tried"] == row["accepted"] + row["refused"] >= 1, row["examples"]


def test_table_has_a_row_for_each_kind(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- faults -->\n<!-- end of faults -->\n")
    out = tmp_path / "faults.json"
    out.write_text(json.dumps(results))
    faults.main(["--table", str(page), "--out", str(out)])
    lines = page.read_text().splitlines()
    for kind in (*faults.KILLS, *mutations.CASES):
        assert sum(line.startswith(f"| {kind} |") for line in lines) == 1


def test_each_kind_of_fault_is_counted():
    def raises(error):
        def attempt(rng):
            raise error

        return attempt

    rng = None
    assert faults.outcome(lambda rng: None, rng)[0] == "accepted"
    assert faults.outcome(lambda rng: "wrong labels", rng) == ("silent", "wrong labels")
    assert faults.outcome(raises(mutations.Refused("a sentence")), rng)[0] == "refused"
    assert faults.outcome(raises(mutations.Refused("two\nlines")), rng)[0] == "traceback"
    assert faults.outcome(raises(ZeroDivisionError()), rng)[0] == "traceback"
    assert faults.outcome(raises(MemoryError()), rng)[0] == "memory"
    assert faults.outcome(raises(faults.Hang()), rng)[0] == "hang"


def test_difference_of_a_bit_is_found():
    first = {"a": [torch.tensor([0.1, 0.2]), (1, "b")]}
    second = {"a": [torch.tensor([0.1, 0.2]), (1, "b")]}
    assert faults.same(first, second)
    second["a"][0].view(torch.int32)[0] ^= 1
    assert not faults.same(first, second)
    assert not faults.same({"a": 1}, {"a": 1.0})


def test_report_shows_the_committed_results():
    results = json.loads((ROOT / "results" / "faults.json").read_text(encoding="utf-8"))
    assert faults.table(results) in (ROOT / "results" / "README.md").read_text(encoding="utf-8")
