"""Pictures of training runs, from their metrics.jsonl alone: losses, the sampler's weights, R@1.

    python plot.py runs/real --out curves.png             # a run, also while it is being trained
    python plot.py runs/one runs/two --out both.svg       # several, a row of panels per domain
    python plot.py runs/one runs/two --tensorboard logs   # event files, for tensorboard --logdir

    read(run)                 -> Metrics: the lines of a run
    picture(runs)             -> matplotlib.figure.Figure
    write_events(runs, ...)   event files of TensorBoard

Copy with: data, distributed, folders, images, procedural, torch, numpy, pillow, matplotlib.
"""

import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data

POINTS = 60  # of a curve of losses at most, each the mean of equally many steps
# Distinguishable for colour-blind readers and, by lines and markers, in grey; 56 combinations.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#777777", "#b08a00", "#332288")
MARKERS = "osD^vPX*"
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


class PlotError(ValueError):
    """A run that cannot be plotted: one sentence."""


class Metrics(NamedTuple):
    """The lines of metrics.jsonl, as rundir.py describes them."""

    name: str
    steps: list[dict]
    validations: list[dict]

    @property
    def domains(self) -> list[str]:
        return sorted({line["domain"] for line in self.steps})


# What a run has written ---------------------------------------------------------------------------


def read(run: str | os.PathLike) -> Metrics:
    """The lines of a run, given as its directory. A last line that is still being written is left
    out. Raises PlotError for a run without a step, and for a file that is missing or damaged."""
    file = Path(run) / "metrics.jsonl"
    try:
        text = file.read_bytes()
    except OSError as error:
        raise PlotError(
            f"{file} cannot be read ({error.strerror}): give the directory of a run"
        ) from None
    steps, validations = [], []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
            check(value)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise PlotError(
                f"{file} is damaged in line {number}: restore it, or take that line out"
            ) from None
        (steps if "domain" in value else validations).append(value)
    if not steps:
        raise PlotError(f"{file} has no training step yet: wait for the first one")
    return Metrics(Path(run).resolve().name, steps, validations)


def check(line: dict) -> None:
    """Raises an error for a line that no run writes."""
    numbers = [line["step"]]
    if "domain" in line:
        numbers += [value for name, value in line.items() if name != "domain"]
        numbers.append(line["total"])
    else:
        tables = [line["val"], *line.get("val_domains", {}).values()]
        numbers += [table[name] for table in tables for name in ("recall_at_1", "mmp_at_5")]
        numbers += line["sampler_weights"].values()
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise ValueError("a value is no finite number")
    if not isinstance(line.get("domain", ""), str):
        raise TypeError("a domain is no text")


# Curves: of a domain, or of all (None) -> (2, N), steps and values --------------------------------


def losses(metrics: Metrics, domain: str | None) -> np.ndarray:
    """The total loss, in means over consecutive steps."""
    lines = [x for x in metrics.steps if domain is None or x["domain"] == domain]
    curve = columns([(line["step"], line["total"]) for line in lines])
    size = max(1, -(-len(lines) // POINTS))
    starts = range(0, len(lines), size)
    return columns([curve[:, start : start + size].mean(1) for start in starts])


def weights(metrics: Metrics, domain: str | None) -> np.ndarray:
    """The sampler's weight at each validation."""
    lines = [x for x in metrics.validations if domain in x["sampler_weights"]]
    return columns([(line["step"], line["sampler_weights"][domain]) for line in lines])


def recalls(metrics: Metrics, domain: str | None) -> np.ndarray:
    """R@1 at each validation, in %. Runs of older versions have only the mean of the domains."""
    values = []
    for line in metrics.validations:
        table = line["val"] if domain is None else line.get("val_domains", {}).get(domain)
        values += [(line["step"], 100 * table["recall_at_1"])] if table else []
    return columns(values)


def columns(rows: list) -> np.ndarray:
    return np.array(rows, dtype=float).reshape(-1, 2).T


PANELS = {
    "total loss": losses,
    "weight in the sampler": weights,
    "R@1 on val queries, %": recalls,
}


# Pictures -----------------------------------------------------------------------------------------


def picture(runs: list[Metrics]):
    """A matplotlib.figure.Figure of the curves: a line per domain for one run, else a line per run
    in panels per domain. Raises PlotError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("matplotlib is not installed: pip install -e '.[plot]'") from None
    domains = sorted(set().union(*(run.domains for run in runs)))
    rows = [None, *domains] if len(domains) > 1 else domains
    if len(runs) == 1:
        figure = Figure(figsize=(9, 10), layout="constrained")
        draw_run(figure, runs[0], rows)
    else:
        figure = Figure(figsize=(12, 1 + 1.8 * len(rows)), layout="constrained")
        draw_runs(figure, runs, rows)
    return figure


def draw_run(figure, run: Metrics, rows: list[str | None]) -> None:
    """A panel per quantity, a line per domain, named at its end."""
    panels, labels = figure.subplots(len(PANELS), 1, sharex=True), []
    for panel, (quantity, curve) in zip(panels, PANELS.items()):
        ends = []
        for number, domain in enumerate(domain for domain in rows if domain is not None):
            ends += draw(panel, *curve(run, domain), shown(domain, 24), style(number))
        if None in rows and curve is recalls:
            ends += draw(panel, *curve(run, None), "mean", {"color": "black", "linewidth": 3})
        labels.append(ends)
        finish(panel, curve, quantity)
    panels[-1].set_xlabel("step")
    figure.suptitle(shown(run.name), parse_math=False)
    figure.draw_without_rendering()  # the places of labels depend on the sizes of the panels
    for panel, ends in zip(panels, labels):
        label_ends(panel, ends)


def draw_runs(figure, runs: list[Metrics], rows: list[str | None]) -> None:
    """A row of panels per domain, a column per quantity, a line per run."""
    panels = figure.subplots(len(rows), len(PANELS), sharex=True, squeeze=False)
    for row, domain in zip(panels, rows):
        for panel, (quantity, curve) in zip(row, PANELS.items()):
            for number, run in enumerate(runs):
                draw(panel, *curve(run, domain), "", style(number))
            finish(panel, curve, quantity if domain is rows[0] else "")
        if domain is None:
            row[1].set_axis_off()
            row[1].texts[0].set_text("all weights add up to 1")
        name = "all domains" if domain is None else shown(domain, 18)
        row[0].set_ylabel(name, parse_math=False)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    keys = [panels[0][0].plot([], [], **style(number))[0] for number in range(len(runs))]
    names = [f" {shown(run.name)}" for run in runs]  # matplotlib skips names that begin with "_"
    place = {"loc": "outside upper left", "ncols": min(3, len(runs)), "handlelength": 5}
    for text in figure.legend(keys, names, **place).get_texts():
        text.set_parse_math(False)


def style(number: int) -> dict:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
    }


def draw(panel, steps, values, name: str, style: dict) -> list[tuple]:
    """Draws a curve -> [(name, its end, its colour)], or [] for one without points."""
    if not len(steps):
        return []
    panel.plot(steps, values, markevery=max(1, len(steps) // 10), **style)
    return [(name, (steps[-1], values[-1]), style["color"])]


def finish(panel, curve, title: str) -> None:
    panel.set_title(title, loc="left")
    panel.grid(alpha=0.3)
    panel.margins(x=0.02)
    panel.locator_params(axis="x", integer=True)
    panel.spines[["top", "right"]].set_visible(False)
    if not panel.lines:
        panel.text(0.5, 0.5, "none recorded", transform=panel.transAxes, ha="center")
        panel.set_yticks([])
    elif curve is weights:
        panel.set_ylim(0, 1.1 * max(line.get_ydata().max() for line in panel.lines))


def label_ends(panel, ends: list[tuple]) -> None:
    """Writes names to the right of the ends of lines, moved apart where they would overlap."""
    gap = 12 / 72 * panel.figure.dpi / panel.get_window_extent().height  # share of the panel
    ends = sorted(ends, key=lambda end: end[1][1])
    to_share = panel.transData + panel.transAxes.inverted()
    heights = [to_share.transform(end)[1] for _, end, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else 1.0)
    for (name, end, colour), height in zip(ends, heights):
        panel.annotate(
            name,
            end,
            (1.03, height),
            textcoords="axes fraction",
            color=colour,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)},
            parse_math=False,
        )


def shown(name: str, limit: int = 40) -> str:
    name = data.printable(name)
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def save(figure, path: str | os.PathLike) -> None:
    """Writes all of a picture or nothing. Raises PlotError for a file that cannot be written."""
    path, contents = Path(path), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # boxes stand for such letters
        figure.savefig(contents, format=path.suffix[1:].lower(), dpi=100)
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(contents.getvalue())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PlotError(f"--out {path} cannot be written ({error.strerror})") from None


# TensorBoard --------------------------------------------------------------------------------------


def write_events(runs: list[Metrics], directory: str | os.PathLike) -> None:
    """Writes all values of the runs as event files of TensorBoard, in a directory per run. Raises
    PlotError without tensorboard, and if one of these directories exists."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PlotError("tensorboard is not installed: pip install -e '.[plot]'") from None
    for run in runs:
        path = Path(directory) / run.name
        if path.exists():
            raise PlotError(f"--tensorboard {path} exists: remove it, or give another directory")
    for run in runs:
        with SummaryWriter(str(Path(directory) / run.name)) as writer:
            for tag, value, step in values_of(run):
                writer.add_scalar(tag, value, step)


def values_of(run: Metrics) -> Iterator[tuple[str, float, int]]:
    """Yields (tag, value, step) of all numbers."""
    for line in run.steps:
        for name, value in line.items():
            if name not in ("step", "domain"):
                yield f"{name}/{line['domain']}", value, line["step"]
    for line in run.validations:
        for domain, value in line["sampler_weights"].items():
            yield f"sampler_weight/{domain}", value, line["step"]
        for domain, table in (("mean", line["val"]), *line.get("val_domains", {}).items()):
            for name, value in table.items():
                yield f"val_{name}/{domain}", value, line["step"]


# Command line -------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = data.Parser(prog="plot.py", description="Plots training runs from metrics.jsonl.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directory of a run")
    parser.add_argument("--out", metavar="FILE", help=".png, .svg or .pdf (default: curves.png)")
    parser.add_argument(
        "--tensorboard",
        metavar="DIR",
        help="write event files of TensorBoard into DIR; with --out, the picture, too",
    )
    with parser.sentences((PlotError,)):
        options = parser.parse_args(arguments)
        out = options.out or (None if options.tensorboard else "curves.png")
        if out and Path(out).suffix.lower() not in (".png", ".svg", ".pdf"):
            raise PlotError(f"--out is {out}: give a file that ends in .png, .svg or .pdf")
        runs = named(options.runs)
        if out:
            for run in runs:
                if any("val_domains" not in line for line in run.validations):
                    print(f"note: {run.name} has no R@1 per domain, it is of an older version")
            save(picture(runs), out)
            print(f"wrote {out}")
        if options.tensorboard:
            write_events(runs, options.tensorboard)
            print(f"wrote {options.tensorboard}: show it with tensorboard --logdir DIR")


def named(paths: list[str]) -> list[Metrics]:
    """The runs, those of equal names told apart by their paths."""
    runs = [read(path) for path in paths]
    names = [run.name for run in runs]
    return [
        run._replace(name=path.strip("/")) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths)
    ]


if __name__ == "__main__":
    main()
