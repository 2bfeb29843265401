"""Tables of R@1 and mMP@5 over seeds, in Markdown, with intervals and paired t-tests by scipy.

    read(directory)                 {row: {seed: result}} of the ablation
    read_times(path)                {row: training time of a step, relative to usc}
    ablation_tables(results, times) all tables of the ablation as one text
    write(path, name, text)         writes them into a file, between marks
    mean_interval(values)           "mean ± half width of the 95 % confidence interval", in %
    difference(results, row, ...)   mean difference of two rows, paired by seed, and its p-value

A result is what benchmarks/ablation.py writes: a dictionary with "row", "seed", "mean", "domains".
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import data
from benchmarks.rows import BASELINE, ROWS, SETTINGS, SYSTEMS, TRIED, VARIATIONS, config_of
from benchmarks.shared import fill
from evaluate import METRICS

Results = dict[str, dict[int, dict]]  # {row: {seed: result}}

NAMES = dict(zip(METRICS, ("R@1", "mMP@5")))

# Reading ------------------------------------------------------------------------------------------


def read(directory: Path) -> Results:
    """{row: {seed: result}} of all finished runs. Raises data.InputError for a file that is not a
    result, and if the baseline is missing."""
    results = {}
    for file in sorted(directory.glob("*/seed*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            for name in ("mean", "domains", "further", "parameters"):
                result[name]
            results.setdefault(result["row"], {})[result["seed"]] = result
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise data.InputError(
                f"{file} is not the result of a run ({type(error).__name__}: {error}): delete it "
                "and train its row again"
            ) from None
    if BASELINE not in results:
        raise data.InputError(
            f"--results {directory} holds no result of {BASELINE}, with which the tables compare: "
            "train that row, or give another directory"
        )
    return results


def read_times(path: Path) -> dict[str, dict[str, float]]:
    """{row: {"to_usc": ratio, "frozen_to_usc": ratio}} as written by step_overhead.py. Raises
    data.InputError for another file."""
    names = ("to_usc", "frozen_to_usc")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row: {name: float(times[name]) for name in names} for row, times in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.InputError(
            f"--times {path} is not a result of step_overhead.py ({type(error).__name__}: "
            f"{error}): write it with python -m benchmarks.step_overhead"
        ) from None


def write(path: Path, name: str, text: Callable[[], str]) -> None:
    """Writes text() between the lines <!-- name --> and <!-- end of name --> of a file. Raises
    data.InputError for a file without them."""
    try:
        fill(path, name, text)
    except data.InputError:
        raise
    except ValueError as error:
        raise data.InputError(str(error)) from None


# Statistics ---------------------------------------------------------------------------------------


def students_t(freedom: int):
    """Student's t distribution. Raises data.InputError if scipy is not installed."""
    try:
        from scipy.stats import t
    except ImportError:
        raise data.InputError(
            "scipy is not installed, but the tables need its confidence intervals: run "
            "pip install -e .[benchmark]"
        ) from None
    return t(freedom)


def half_width(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean of two or more values."""
    quantile = students_t(len(values) - 1).ppf(0.975)
    return float(quantile) * statistics.stdev(values) / math.sqrt(len(values))


def p_value(differences: list[float]) -> float:
    """Two-sided p-value of a paired t-test of two or more differences."""
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return float(mean == 0)
    t = mean / (deviation / math.sqrt(len(differences)))
    return 2 * float(students_t(len(differences) - 1).sf(abs(t)))


def mean_interval(values: Iterable[float]) -> str:
    """The mean of values in [0, 1], in %, with its confidence interval if there are several."""
    values = [100 * value for value in values]
    interval = f" ± {half_width(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{interval}"


def difference(results: Results, row: str, other: str, value: Callable[[dict], float]) -> str:
    """The mean of value(result of row) - value(result of other), in %, over the seeds that both
    have, with the p-value if there are several; empty if there is none."""
    if row == other:
        return ""
    runs, others = results[row], results.get(other, {})
    differences = [
        100 * (value(runs[seed]) - value(others[seed])) for seed in runs if seed in others
    ]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else ""
    p = p_value(differences)
    return f"{statistics.fmean(differences):+.1f} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}'})"


def relative_time(times: dict, row: str) -> float:
    """The time of a row's training steps and of its teachers', in steps of usc with a trainable
    backbone; NaN if it was not measured."""
    if row not in times:
        return math.nan
    config, teachers = config_of(row), ROWS[row].teachers
    frozen = config.frozen_epochs / config.epochs
    step = (1 - frozen) * times[row]["to_usc"] + frozen * times[row]["frozen_to_usc"]
    time = step * ROWS[row].length * config.epochs / config_of(BASELINE).epochs
    return time + relative_time(times, teachers) if teachers else time


# Parts of a table ---------------------------------------------------------------------------------


def mean_of(metric: str) -> Callable[[dict], float]:
    return lambda result: result["mean"][metric]


def of_domain(domain: str, metric: str) -> Callable[[dict], float]:
    return lambda result: result["domains"][domain][metric]


def first(runs: dict[int, dict]) -> dict:
    return next(iter(runs.values()))


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table; empty if it has no rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def code(row: str) -> str:
    return f"`{row}`"


def metric_cells(runs: dict[int, dict]) -> list[str]:
    return [mean_interval(map(mean_of(metric), runs.values())) for metric in METRICS]


def difference_cells(results: Results, row: str, other: str) -> list[str]:
    return [difference(results, row, other, mean_of(metric)) for metric in METRICS]


def time_cell(times: dict, row: str, other: str) -> str:
    ratio = relative_time(times, row) / relative_time(times, other)
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


def domain_table(results: Results, rows: Iterable[str]) -> str:
    """R@1 of each domain."""
    domains = list(first(results[BASELINE])["domains"])
    lines = []
    for row in rows:
        runs = results[row].values()
        cells = [mean_interval(map(of_domain(d, "recall_at_1"), runs)) for d in domains]
        lines.append([code(row), *cells])
    return markdown(["row", *domains], lines)


# The ablation's tables ----------------------------------------------------------------------------


def ablation_tables(results: Results, times: dict) -> str:
    """All tables as one text. Raises data.InputError if scipy is not installed."""
    systems = [row for row in SYSTEMS if row in results]
    variations = [row for row in VARIATIONS if row in results]
    settings = {row: (ROWS[row].about, ROWS[row].base) for row in SETTINGS if row in results}
    others = sorted(results.keys() - ROWS.keys())
    tried = {row: TRIED.get(row, (code(row), "udon-joint")) for row in others}
    by_domain = [row for row in systems if not row.endswith("-size")]
    compared = [BASELINE, "udon-joint"]
    sampler_title = (
        "The dynamic sampler: thousands of images of each domain, sampling weights, gain:"
    )
    tables = (
        ("The systems, and their options of `python udon.py train`:", system_options()),
        ("Merged index:", system_table(results, times, systems, [BASELINE])),
        ("Gain of three rows over each system, and ratio of time:", gain_table(results, times)),
        ("Variations of `udon-joint`:", system_table(results, times, variations, compared)),
        ("One setting changed:", change_table(results, settings)),
        ("Tried and not kept:", change_table(results, tried)),
        ("Each query in the index of its own domain (oracle):", oracle_table(results)),
        ("R@1 of each domain, merged index:", domain_table(results, by_domain)),
        (sampler_title, sampler_table(results)),
    )
    return "\n\n".join(f"{title}\n\n{table}" for title, table in tables if table) + "\n"


def system_options() -> str:
    """What each row of the tables is."""
    rows = [row for row in ROWS if ROWS[row].base is None]
    lines = []
    for row in rows:
        teachers = ROWS[row].teachers
        frozen = f" --teachers {teachers}" if teachers else ""
        lines.append([code(row), ROWS[row].about, code(ROWS[row].options + frozen)])
    return markdown(["row", "system", "options"], lines)


def system_table(results: Results, times: dict, rows: list[str], others: list[str]) -> str:
    """Metrics, differences to other rows, parameters and time."""
    differences = [f"{NAMES[metric]} − {code(other)}" for other in others for metric in METRICS]
    heading = ["row", *NAMES.values(), *differences]
    heading += ["trainable, M", "inference, M", "time", "n"]
    lines = []
    for row in rows:
        parameters = first(results[row])["parameters"]
        cells = [code(row), *metric_cells(results[row])]
        for other in others:
            cells += difference_cells(results, row, other)
        cells += [f"{parameters[name] / 1e6:.2f}" for name in ("trained", "inference")]
        lines.append([*cells, time_cell(times, row, BASELINE), str(len(results[row]))])
    return markdown(heading, lines)


def gain_table(results: Results, times: dict) -> str:
    """The differences of three rows to each system, paired by seed, and the ratios of time."""
    rows = [row for row in ("udon-joint", "udon-joint-twice", "udon-rr") if row in results]
    heading = ["over"]
    for row in rows:
        heading += [f"{code(row)}: R@1", "mMP@5", "time"]
    lines = []
    for other in SYSTEMS:
        if other not in results or other in ("udon-joint", "backbone"):
            continue
        cells = [code(other)]
        for row in rows:
            time = "" if row == other else time_cell(times, row, other)
            cells += [*difference_cells(results, row, other), time]
        lines.append(cells)
    return markdown(heading, lines)


def change_table(results: Results, changes: dict[str, tuple[str, str]]) -> str:
    """Rows beside the row that each changes: {row: (description, base row)}."""
    heading = ["change", "of", *NAMES.values(), "difference in val R@1", "R@1", "mMP@5", "n"]
    lines = []
    for row, (about, base) in changes.items():
        validation = difference(results, row, base, lambda result: result["val_recall_at_1"])
        cells = [about, code(base), *metric_cells(results[row]), validation]
        cells += difference_cells(results, row, base)
        lines.append([*cells, str(len(results[row]))])
    return markdown(heading, lines)


def oracle_table(results: Results) -> str:
    """Embeddings of specialists, teachers and students, searched in their own domain alone."""
    embeddings = {
        "8 specialists, 64-d": ("specialists-64", None),
        "8 specialists, 256-d": ("specialists-256", None),
        "8 specialists, 256-d, trained twice as long": ("specialists-256-twice", None),
        "one separate model with 8 teacher heads": ("teachers", None),
        "teachers of `udon-joint`": ("udon-joint", "teacher-separate"),
        "student of `udon-joint`": ("udon-joint", "student-separate"),
        f"student of {code(BASELINE)}": (BASELINE, "student-separate"),
    }
    lines = []
    for label, (row, further) in embeddings.items():
        runs = results.get(row, {}).values()
        if runs:
            means = [(run["further"][further] if further else run)["mean"] for run in runs]
            cells = [mean_interval(mean[metric] for mean in means) for metric in METRICS]
            lines.append([label, *cells, str(len(runs))])
    return markdown(["embedding", *NAMES.values(), "n"], lines)


def sampler_table(results: Results) -> str:
    """Images and weights of each domain under the dynamic sampler, and what it gains."""
    if not {"udon", "udon-rr"} <= results.keys():
        return ""
    runs = results["udon"].values()
    domains = list(first(results["udon"])["domains"])
    lines = []
    for row in ("udon-rr", "udon"):
        images = [[run["images"][domain] for run in results[row].values()] for domain in domains]
        cells = [f"{statistics.fmean(counts) / 1000:.1f}" for counts in images]
        lines.append([f"images, {code(row)}", *cells])
    for step in first(results["udon"])["sampler_weights"]:
        weights = [run["sampler_weights"][step] for run in runs]
        cells = [f"{100 * statistics.fmean(w[domain] for w in weights):.1f}" for domain in domains]
        lines.append([f"weight after step {step}, %", *cells])
    for metric in METRICS:
        cells = [difference(results, "udon", "udon-rr", of_domain(d, metric)) for d in domains]
        lines.append([f"{NAMES[metric]} − {code('udon-rr')}", *cells])
    return markdown(["", *domains], lines)
