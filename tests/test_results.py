"""The numbers in results/README.md and README.md are those of the files in results/."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

import config
import evaluate
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
    one_step,
    procedural,
    rows,
    start,
    tables,
    topk,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
REPORT = (RESULTS / "README.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def marked(name):
    return REPORT.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]


def missing(parts, text):
    return [part for part in parts if part not in text]


def recorded(path):
    return json.loads(path.read_text(encoding="utf-8"))


# results/README.md --------------------------------------------------------------------------------


def test_tables_of_the_ablation():
    pytest.importorskip("scipy")
    results, times = tables.read(ablation.RESULTS), tables.read_times(ablation.TIMES)
    assert marked("ablation") == tables.ablation_tables(results, times)


def test_table_of_the_procedural_domains():
    pytest.importorskip("scipy")
    assert marked("procedural") == procedural.table(procedural.read(procedural.RESULTS))


def test_table_of_pretrained_backbones():
    """In weights/README.md."""
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    for directory in (RESULTS / "pretraining").iterdir():
        means = [recorded(directory / f"{d}.json")["mean"] for d in ("mini_uned", "far_uned")]
        cells = [" / ".join(f"{100 * mean[m]:.1f}" for m in evaluate.METRICS) for mean in means]
        assert f"| `{directory.name}` | {' | '.join(cells)} |" in text


@pytest.mark.parametrize("name", ["defaults", "defaults_64_epochs"])
def test_tables_of_the_defaults(name):
    pytest.importorskip("scipy")
    assert marked(name) == defaults.table(defaults.read(RESULTS / name))


def test_table_of_choices():
    pytest.importorskip("scipy")
    assert marked("choice") == choice.table(choice.read(choice.RESULTS))


def test_table_of_a_frozen_backbone():
    pytest.importorskip("scipy")
    assert marked("frozen") == frozen.table(frozen.read(frozen.RESULTS))


def test_table_of_starts():
    pytest.importorskip("scipy")
    assert marked("start") == start.table(start.read(start.RESULTS))


def test_table_of_an_added_domain():
    pytest.importorskip("scipy")
    values = recorded(added_domain.RESULTS)
    assert marked("added domain") == added_domain.table(values)


def test_one_training_step():
    """The table is that of the file, and the file that of a step."""
    values = recorded(RESULTS / "one_step.json")
    assert marked("one step") == one_step.table(values)
    again = one_step.measure()
    assert again["losses"] == pytest.approx(values["losses"], rel=0.01)
    assert again["moved"] == pytest.approx(values["moved"], rel=0.05)
    for loss, sizes in values["gradients"].items():
        assert again["gradients"][loss] == pytest.approx(sizes, rel=0.01), loss
    assert {k: v[0] for k, v in again["tensors"].items()} == {
        k: v[0] for k, v in values["tensors"].items()
    }


@pytest.mark.parametrize("module", [jax_step, embedding, loader, equivalence])
def test_tables_of_one_file(module):
    name = module.__name__.split(".")[1].replace("_", " ")
    file = RESULTS / f"{name.replace(' ', '_')}.json"
    assert marked(name) == module.table(recorded(file))


def test_table_of_retrieval():
    assert marked("topk") == topk.table(topk.written(RESULTS / "topk.csv"))


def test_figures_at_the_size_of_uned():
    size = recorded(RESULTS / "uned_size.json")
    figures = (
        f"| {size['queries']:,} and {size['index']:,} |",
        f"| {size['search_seconds']:.0f} s on {size['threads']} threads |",
        f"| {size['beside_search_us_per_query']:.2f} µs per query |",
        f"| {size['peak_memory_mb']:,} MB |",
        f"| {size['machine']}; {size['date']} |",
    )
    assert not missing(figures, REPORT)


def test_figures_of_a_training_step():
    overhead = recorded(RESULTS / "step_overhead.json")
    row = overhead["rows"]["udon-joint"]
    figures = (
        f"| {row['to_usc']:.3f} (median of {overhead['rounds']} interleaved rounds) |",
        f"| {row['frozen_to_usc']:.3f} |",
        f"| {overhead['machine']}; {overhead['date']} |",
    )
    assert not missing(figures, REPORT)


def test_report_of_scaling():
    report = (RESULTS / "scaling.md").read_text(encoding="utf-8")
    assert report == estimates.report(RESULTS / "scaling.json")


# README.md ----------------------------------------------------------------------------------------


def test_printed_means_are_those_of_seed_0():
    results = {row: runs[0] for row, runs in procedural.read(procedural.RESULTS).items()}
    order = ("udon", "udon-joint", "usc", "backbone")
    lines = evaluate.table({row: results[row] for row in order}).splitlines()
    mean = next(line for line in lines if line.startswith("mean"))
    assert "\n".join([*lines[:2], mean]) in README


def test_mean_and_standard_deviation_of_the_procedural_domains():
    results = procedural.read(procedural.RESULTS)
    figures = []
    for row in ("udon", "udon-joint", "usc"):
        values = [100 * run["mean"]["recall_at_1"] for run in results[row].values()]
        spread = statistics.stdev(values)
        figures.append(f"`{row}` {statistics.fmean(values):.1f} ± {spread:.1f}")
    assert not missing(figures, " ".join(README.split()))


def test_results_of_the_readme():
    pytest.importorskip("scipy")
    results = defaults.read(defaults.RESULTS)["mini_uned"]
    section = README.split("## Results")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]
    backbone = tables.first(results["start"])["backbone"]
    expected = [[f"{100 * backbone[metric]:.1f}" for metric in evaluate.METRICS]]
    start_mean = tables.first(results["start"])["mean"]
    expected += [[f"{100 * start_mean[metric]:.1f}" for metric in evaluate.METRICS]]
    order = ("usc", "ujc", "udon", "udon-joint")
    assert cells == expected + [tables.metric_cells(results[row]) for row in order]
    (seeds,) = {len(results[row]) for row in order}
    spread = f"mean and 95 % interval of {seeds} seeds" if seeds > 1 else "one seed"
    assert spread in " ".join(section.split())


def test_ablation_in_the_readme():
    pytest.importorskip("scipy")
    results = tables.read(ablation.RESULTS)
    names = ("usc", "ujc", "udon", "distill-8", "udon-joint")
    means = [
        statistics.fmean(map(tables.mean_of("recall_at_1"), results[n].values())) for n in names
    ]
    text = "USC {:.1f}, UJC {:.1f}, UDON {:.1f}, distillation from 8 separate teachers {:.1f}, "
    text += "`udon-joint` {:.1f}"
    assert text.format(*(100 * mean for mean in means)) in " ".join(README.split())


# What was run is what the rows say ----------------------------------------------------------------

# Options that were spelt differently, or set by the method, when the results were recorded.
RESPELT = {"method", "weights", "init", "image_size", "beside", "teachers"}
PLACES = {"data", "out", "workers", "device", "seed"}


@pytest.mark.parametrize("row", sorted(set(rows.ROWS) - {"backbone"}))
def test_recorded_configurations_are_those_of_the_rows(row):
    options = dataclasses.asdict(rows.config_of(row))
    files = sorted((ablation.RESULTS / row).glob("seed*.json"))
    assert files
    for file in files:
        result = recorded(file)
        assert result["row"] == row
        assert result["seed"] == int(file.stem.removeprefix("seed"))
        for name, value in result.get("config", {}).items():
            if name not in RESPELT | PLACES:
                assert json.loads(json.dumps(options[name])) == value, (file.name, name)


def test_the_procedural_runs_had_the_defaults_of_now():
    for seed in procedural.SEEDS:
        for method in procedural.METHODS:
            path = procedural.RESULTS / f"seed{seed}"
            path = path if method == procedural.METHODS[0] else path / method
            default = config.Config(preset="mini", method=method, seed=seed)
            options = json.loads(json.dumps(dataclasses.asdict(default)))
            values = recorded(path / "config.json")
            changed = {name for name, value in values.items() if value != options.get(name)}
            assert changed <= PLACES | {"compare"}, path
