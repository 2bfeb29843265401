"""The house: files import as a tree, leaves stand alone, nothing touches a device at import, the README tells the truth."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"udon", "model", "pretrained", "losses", "sampler", "data", "evaluate", "kernels"}
IMPORTS = {
    "model": set(),
    "losses": set(),
    "sampler": set(),
    "data": set(),
    "pretrained": set(),
    "evaluate": {"data", "kernels", "model"},
    "udon": {"data", "evaluate", "pretrained", "losses", "model", "sampler"},
}
NEEDS = {
    "model": {"torch"},
    "losses": {"torch"},
    "sampler": {"numpy"},
    "data": {"torch", "numpy", "PIL"},
    "pretrained": {"torch", "numpy", "safetensors"},
    "evaluate": {"torch", "numpy"},
    "udon": {"torch"},
}


def imported(file):
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_form_the_documented_tree(name):
    names = imported(ROOT / f"{name}.py")
    assert names & OURS == IMPORTS[name]
    assert names - OURS - set(sys.stdlib_module_names) == NEEDS[name]


@pytest.mark.parametrize("name", [name for name, ours in IMPORTS.items() if not ours] + ["kernels"])
def test_a_file_copied_alone_imports(tmp_path, name):
    source, target = (
        (ROOT / name, tmp_path / name)
        if name == "kernels"
        else (ROOT / f"{name}.py", tmp_path / f"{name}.py")
    )
    for file in source.glob("*.py") if source.is_dir() else [source]:
        (target / file.name if source.is_dir() else target).parent.mkdir(exist_ok=True)
        (target / file.name if source.is_dir() else target).write_text(file.read_text())
    code = f"import {name}, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("[kbt]*/*.py")), ids=lambda file: file.name
)
def test_every_file_says_what_it_is_and_is_narrow(file):
    text = file.read_text()
    assert ast.get_docstring(ast.parse(text)), "line 1 is the docstring"
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 132]
    assert not long, f"lines over 132 characters: {long}"


# The README ------------------------------------------------------------------------------------------------------------------


def readme():
    return (ROOT / "README.md").read_text()


def lines_of(name):
    return len((ROOT / name).read_text().splitlines())


def test_line_counts():
    rows = re.findall(r"^\| `([\w./]+)` \| ([\d,]+) \|", readme(), re.MULTILINE)
    assert {name for name, _ in rows} == {f"{name}.py" for name in OURS - {"kernels"}} | {
        "kernels/"
    }
    counts = {
        name: sum(map(lines_of, (ROOT / name).glob("*.py")))
        if name == "kernels/"
        else lines_of(name)
        for name, _ in rows
    }
    assert {name: int(count) for name, count in rows} == counts
    method = (ROOT / "udon.py").read_text()
    method = method[method.index("# The method ---") : method.index("# The run ---")].count("\n")
    idea = method + lines_of("losses.py") + lines_of("sampler.py")
    assert f"The idea is {idea} lines" in readme(), idea


def procedural(seed, *, method=""):
    return json.loads(
        (ROOT / "results" / "procedural" / f"seed{seed}" / method / "test.json").read_text()
    )


def test_numbers_come_from_results():
    """Mean and spread over the seeds, the printed table, the overhead: as in the files that the commands wrote."""
    text = readme()
    for method, metric in (("", "recall_at_1"), ("", "mmp_at_5"), ("usc", "recall_at_1")):
        values = [100 * procedural(seed, method=method)["mean"][metric] for seed in range(3)]
        shown = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert shown in text, f"{method} {metric}: {shown}"
    mean = (
        procedural(0)["mean"],
        procedural(0, method="usc")["mean"],
        procedural(0)["untrained"]["mean"],
    )
    printed = next(line for line in text.splitlines() if line.startswith("mean "))
    assert printed.split()[1:] == [
        f"{100 * m[metric]:.2f}" for m in mean for metric in ("recall_at_1", "mmp_at_5")
    ]
    overhead = json.loads((ROOT / "results" / "step_overhead.json").read_text())
    shown = (
        f"**{overhead['rows']['udon']['to_usc']:.3f}**",
        overhead["command"],
        overhead["machine"],
    )
    assert [part for part in shown if part not in text] == []


def test_the_ablation_tables_come_from_results():
    """Every digit of them: written again from results/ablation/, they are the same."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import ablation

    made = ablation.tables(
        ablation.read(ablation.RESULTS), ablation.read_times(ROOT / "results" / "step_times.json")
    )
    assert made == readme().split("<!-- ablation -->\n")[1].split("<!-- end of")[0]


def test_retrieval_figures_come_from_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import topk

    table = readme().split("<!-- topk -->\n")[1].split("<!-- end of")[0]
    assert topk.table(topk.written(ROOT / "results" / "topk.csv")) == table
    size = json.loads((ROOT / "results" / "uned_size.json").read_text())
    shown = (
        f"{size['queries']:,} queries among {size['index']:,} rows",
        f"{size['search_seconds']:.0f} s of search on {size['threads']}",
        f"{size['beside_search_us_per_query']:.2f} µs",
        f"{size['peak_memory_mb']} MB",
    )
    assert [text for text in shown if text not in readme()] == []


def test_results_were_written_by_the_defaults_of_now():
    import dataclasses

    import udon

    for seed in range(3):
        config = json.loads(
            (ROOT / "results" / "procedural" / f"seed{seed}" / "config.json").read_text()
        )
        defaults = dataclasses.asdict(udon.resolve(udon.Config(seed=seed)))
        differing = {
            name for name in defaults if json.loads(json.dumps(defaults[name])) != config[name]
        }
        assert differing <= {"out", "device"}, differing
