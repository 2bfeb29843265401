"""The command lines of benchmarks/: what they say and return to mistakes, before any work, and a contender that dies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import principal_axes  # noqa: E402
import shared  # noqa: E402
import step_overhead  # noqa: E402
import topk  # noqa: E402
import topk_gpu  # noqa: E402
import uned_size  # noqa: E402
from conftest import write_uned  # noqa: E402
from test_ablation import made_up  # noqa: E402

import evaluate  # noqa: E402
import udon  # noqa: E402

MARKED = "before\n<!-- {0} -->\nold\n<!-- end of {0} -->\nafter\n"


def refused(module, arguments, monkeypatch, capfd):
    """The sentence on stderr, which is one, of a command line that ends with status 2."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = capfd.readouterr().err
    assert (
        end.value.code == 2 and said.count("\n") == 1 and said.startswith(f"{module.__name__}.py: ")
    ), said
    return said


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of each kind; and nothing expensive may begin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    for name in ("ablation", "topk"):
        (tmp_path / f"{name}.md").write_text(MARKED.format(name))
    (tmp_path / "backwards.md").write_text(
        "<!-- end of ablation -->\n<!-- end of topk -->\n<!-- topk -->\n<!-- ablation -->\n"
    )
    for folder, text in (
        ("broken", "{"),
        ("other", json.dumps(made_up("udon", 0, 0.5))),
        ("bare", "{}"),
    ):
        (tmp_path / folder / "udon").mkdir(parents=True)
        (tmp_path / folder / "udon" / "seed0.json").write_text(text)
    for module, name in (
        (topk, "measure"),
        (uned_size, "made_up"),
        (step_overhead, "stepper"),
        (principal_axes, "measure"),
        (ablation.Grid, "run"),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("work has begun"))
    return tmp_path


BAD = [
    (module, options, named)
    for module, lines in {
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
            ("--tables backwards.md", "backwards.md"),
            ("--tables topk.md", "topk.md"),
            ("--tables ablation.md --results broken", "broken/udon/seed0.json"),
            ("--tables ablation.md --results bare", "bare/udon/seed0.json"),
            ("--tables ablation.md --results other", "usc-rr"),
            ("--tables ablation.md --times nowhere.json", "nowhere.json"),
            ("--tables ablation.md --times foreign.csv", "foreign.csv"),
            ("--tables ablation.md --results nowhere", "nowhere"),
        ),
        topk: (
            *(
                (f"--cases {case}", repr(case))
                for case in ("5x5", "0x5x5", "5x-5x5", "5x5x5x5", "5x5xa", "")
            ),
            ("--cases 5x50x5 5x50x5_folly", "'5x50x5 folly'"),
            ("--k 0", "'0'"),
            ("--k 7 --cases 5x50x5 5x6x5", "5x6x5"),
            ("--k 301", "1x300x64"),
            ("--threads 0", "'0'"),
            ("--rounds -3", "-3"),
            ("--contenders nonsense", "'nonsense'"),
            ("--out nowhere/x.csv", "nowhere/x.csv"),
            ("--out empty", "'empty'"),
            ("--out foreign.csv", "foreign.csv"),
            ("--out topk.md", "topk.md"),
            ("--table nowhere.md", "nowhere.md"),
            ("--table backwards.md", "backwards.md"),
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
        topk_gpu: (
            ("--k 0", "'0'"),
            ("--k 9 --index 8", "--index 8"),
            ("--dtype int8", "'int8'"),
            ("--out nowhere/x", "nowhere/x"),
        ),
    }.items()
    for options, named in lines
]


@pytest.mark.parametrize(
    "module, options, named",
    BAD,
    ids=[f"{module.__name__} {options}" for module, options, _ in BAD],
)
def test_bad_options_get_one_sentence(module, options, named, here, uned, monkeypatch, capfd):
    files = lambda: {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    before = files()
    arguments = [part.replace("_", " ").format(uned=uned) for part in options.split(" ")]
    assert named in refused(module, arguments, monkeypatch, capfd)
    assert files() == before


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A student's, and one of teachers alone."""
    found = {}
    for method in ("usc", "teachers"):
        config = udon.resolve(
            udon.Config(method=method, model="micro", init="scratch", image_size=32)
        )
        model, architecture, preprocessing = udon.build_model(config, {"birds": 4, "cars": 4})
        found[method] = tmp_path_factory.mktemp("checkpoints") / f"{method}.pt"
        torch.save(
            {
                "model": model.state_dict(),
                "architecture": architecture,
                "preprocessing": preprocessing,
                "step": 0,
                "embedding": "teacher" if method == "teachers" else "student",
                "config": {"data": None},
            },
            found[method],
        )
    return found


def test_principal_axes(uned, checkpoints, tmp_path, monkeypatch, capfd):
    """What only the checkpoint and the data tell is refused before an image is embedded; then a run."""
    out, more = tmp_path / "out.json", write_uned(tmp_path / "more", images=10)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "embed", lambda *_: pytest.fail("work has begun"))
        for checkpoint, root, k, named in (
            ("nowhere.pt", more, 1, "nowhere.pt"),
            (checkpoints["teachers"], more, 1, "teachers.pt"),
            (checkpoints["usc"], "nowhere", 1, "nowhere"),
            (checkpoints["usc"], uned, 1, "of 16 "),
            (checkpoints["usc"], more, 49, "--k is 49"),
        ):
            arguments = [checkpoint, "--data", root, "--k", k, "--out", out]
            assert named in refused(principal_axes, arguments, patch, capfd)
            assert not out.exists()
    monkeypatch.setattr(
        sys,
        "argv",
        ["principal_axes.py", str(checkpoints["usc"]), "--data", str(more), "--out", str(out)],
    )
    principal_axes.main()
    result = json.loads(out.read_text())
    assert result["index"] == 48 and result["rows"][0]["coordinates"] == 8
    assert (result["checkpoint"], result["torch"], result["threads"]) == (
        str(checkpoints["usc"]),
        torch.__version__,
        1,
    )
    assert result["machine"] == shared.machine("cpu")


def test_step_times(tmp_path, monkeypatch, capfd):
    """Of a row with teachers of its own, one with frozen ones, and the one that all are compared with."""
    out = tmp_path / "times.json"
    arguments = (
        "--rows udon distill-8 --model micro --image-size 32 --batch-size 4 --rounds 2".split()
    )
    monkeypatch.setattr(sys, "argv", ["step_overhead.py", *arguments, "--out", str(out)])
    step_overhead.main()
    result = json.loads(out.read_text())
    assert result["command"] == "python benchmarks/step_overhead.py " + " ".join(arguments)
    times = ablation.read_times(out)
    assert list(times) == ["usc-rr", "udon", "distill-8"] and times["usc-rr"]["to_usc"] == 1
    assert all(0 < value["frozen_to_usc"] and 0 < value["to_usc"] for value in times.values())


def test_topk_measures_and_keeps_other_rows(tmp_path, monkeypatch, capfd):
    """A small case; then one that no machine holds, whose contender dies: one sentence, and the table as it was."""
    out, readme = tmp_path / "out.csv", tmp_path / "README.md"
    run = [
        sys.executable,
        ROOT / "benchmarks" / "topk.py",
        "--out",
        out,
        "--rounds",
        "1",
        "--contenders",
        "numpy",
        "numpy",
    ]
    subprocess.run([*run, "--cases", "3x50x4 copies"], check=True, capture_output=True)
    rows = topk.written(out)
    assert [row["contender"] for row in rows] == ["product", "ours", "numpy"] and list(
        rows[0]
    ) == list(topk.COLUMNS)
    died = subprocess.run([*run, "--cases", "1x9x999999999999999"], capture_output=True, text=True)
    assert (
        died.returncode == 2
        and died.stderr.count("\n") == 1
        and "product died in case 1x9x999999999999999" in died.stderr
    )
    assert topk.written(out) == rows and list(tmp_path.iterdir()) == [out]
    readme.write_text(MARKED.format("topk"))
    monkeypatch.setattr(sys, "argv", ["topk.py", "--table", str(readme), "--out", str(out)])
    topk.main()
    assert readme.read_text() == MARKED.format("topk").replace("old\n", topk.table(rows))


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out.csv"
    row = dict.fromkeys(topk.COLUMNS, "1")
    topk.write(out, [row])
    with pytest.raises(ValueError):
        topk.write(out, [row, {**row, "folly": 1}])
    assert topk.written(out) == [row] and list(tmp_path.iterdir()) == [out]
