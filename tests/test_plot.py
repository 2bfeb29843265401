"""plot.py: curves against python loops, pictures without overlap, event files, damaged runs."""

import itertools
import json
import math
import random
import sys

import numpy as np
import pytest
from PIL import Image

import plot

EIGHT = ("cars", "food2k", "gldv2", "inat", "inshop", "met", "rp2k", "sop")
ODD = ("$x_1$", "_hidden", "two\nlines", "undecodable \udcff", "n" * 60, "mean")


def write_run(path, domains, steps=200, period=40, seed=0, **changes):
    """metrics.jsonl as a run writes it."""
    rng, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        losses = {"total": rng.random(), "student_classification": 8 * rng.random()}
        spent = {"backbone_lr": 0.0, "head_lr": 1e-3, "seconds": 0.5, "cpu_seconds": 0.25}
        lines.append({"step": step, "domain": domains[step % len(domains)], **losses, **spent})
        if step % period == 0:
            table = {d: {"recall_at_1": rng.random(), "mmp_at_5": rng.random()} for d in domains}
            weights = {domain: rng.random() for domain in domains}
            mean = {"recall_at_1": rng.random(), "mmp_at_5": rng.random()}
            lines.append({"step": step, "val": mean, "val_domains": table})
            lines[-1] |= {"sampler_weights": weights, **changes}
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def picture(*paths):
    """The figure of runs, drawn."""
    pytest.importorskip("matplotlib")
    figure = plot.picture(plot.named([str(path) for path in paths]))
    figure.draw_without_rendering()
    return figure


# Curves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [8, 200, 1000])
def test_curves_equal_python_loops(tmp_path, steps):
    lines = write_run(tmp_path / "run", EIGHT[:3], steps, 4)
    run = plot.read(tmp_path / "run")
    assert (run.name, run.domains) == ("run", list(EIGHT[:3]))
    for domain in (*EIGHT[:3], None):
        own = [x for x in lines if "domain" in x and domain in (x["domain"], None)]
        size = math.ceil(len(own) / plot.POINTS)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        means = [
            [math.fsum(x[key] for x in part) / len(part) for part in parts]
            for key in ("step", "total")
        ]
        assert np.allclose(plot.losses(run, domain), means)
        validations = [line for line in lines if "val" in line]
        tables = [
            line["val"] if domain is None else line["val_domains"][domain] for line in validations
        ]
        expected = [
            [line["step"] for line in validations],
            [100 * x["recall_at_1"] for x in tables],
        ]
        assert np.allclose(plot.recalls(run, domain), expected)
        weights = [] if domain is None else [x["sampler_weights"][domain] for x in validations]
        assert np.allclose(plot.weights(run, domain)[1], weights)


def test_a_run_in_progress_and_one_of_an_older_version(tmp_path):
    """Its last line is incomplete; validations have no domains."""
    lines = write_run(tmp_path / "run", EIGHT[:2], 30, 20, val_domains={})
    file = tmp_path / "run" / "metrics.jsonl"
    with open(file, "a") as opened:
        opened.write('{"step": 31, "dom')
    run = plot.read(tmp_path / "run")
    assert len(run.steps) == 30 and len(run.validations) == 1
    assert [len(values) for values in plot.recalls(run, EIGHT[0])] == [0, 0]
    assert [len(values) for values in plot.recalls(run, None)] == [1, 1]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert picture(tmp_path / "run")


# Pictures -----------------------------------------------------------------------------------------


def boxes(figure):
    """(text, its box in pixels) of all visible texts but ticks."""
    from matplotlib.text import Text

    texts = [panel.title for panel in figure.axes] + [panel._left_title for panel in figure.axes]
    texts += [text for panel in figure.axes for text in panel.texts]
    texts += [panel.yaxis.label for panel in figure.axes] + figure.texts
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    shown = [text for text in texts if text.get_text() and text.get_visible()]
    return [(text.get_text(), Text.get_window_extent(text)) for text in shown]  # without arrows


SAME = {
    "sampler_weights": {domain: float(domain == "met") for domain in EIGHT},
    "val_domains": dict.fromkeys(EIGHT, {"recall_at_1": 1.0, "mmp_at_5": 1.0}),
}
RUNS = {  # domains of each run, changes
    "8 domains": ([EIGHT], {}),
    "8 domains of equal values": ([EIGHT], SAME),
    "1 domain": ([EIGHT[:1]], {}),
    "odd names": ([ODD], {}),
    "runs of other domains": ([EIGHT[:2], EIGHT[1:3], ODD[:2]], {}),
}


@pytest.mark.parametrize("case", RUNS)
def test_texts_are_inside_the_picture_and_do_not_overlap(tmp_path, case):
    runs, changes = RUNS[case]
    paths = [tmp_path / name for name in ("_one", "two", "$3$ " + 60 * "x")[: len(runs)]]
    for path, domains in zip(paths, runs):
        write_run(path, domains, **changes)
    figure = picture(*paths)
    found, size = boxes(figure), figure.get_size_inches() * figure.dpi
    for text, box in found:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= size[0] + 1 and box.y1 <= size[1] + 1
        assert inside, f"{text!r} is cut off: {box.extents}, {size}"
    for (one, box), (other, box2) in itertools.combinations(found, 2):
        assert not box.padded(-2).overlaps(box2.padded(-2)), f"{one!r} and {other!r} overlap"
    widths = [panel.get_window_extent().width for panel in figure.axes]
    assert min(widths) > size[0] * (0.6 if len(paths) == 1 else 0.2), widths
    for panel in figure.axes:
        low, high = panel.get_window_extent().intervaly + np.array([-12, 12])
        own = [box for text, box in found if text in {x.get_text() for x in panel.texts}]
        assert sum(low < box.y0 and box.y1 < high for box in own) >= len(panel.texts)
    names = [text for text, _ in found]
    if len(paths) > 1:
        assert sum(name.startswith(" ") for name in names) == len(paths), "the legend"
    else:
        expected = {plot.shown(domain, 24): 3 for domain in runs[0]}
        expected["mean"] = expected.get("mean", 0) + (len(runs[0]) > 1)
        assert {name: names.count(name) for name in expected} == expected


def test_lines_of_a_panel_differ_in_grey(tmp_path):
    write_run(tmp_path / "run", [f"domain {i}" for i in range(20)], 400)
    for panel in picture(tmp_path / "run").axes:
        kinds = [
            (str(x._unscaled_dash_pattern), x.get_marker(), x.get_color()) for x in panel.lines
        ]
        assert len(kinds) >= 20 and len(set(kinds)) == len(kinds)
        assert len({kind[1] for kind in kinds[:8]}) == 8 and len({kind[0] for kind in kinds}) == 4


@pytest.mark.parametrize("name", ["a.png", "a.svg", "A.PDF"])
def test_files(tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", EIGHT[:1], 8, 4)
    plot.main([str(tmp_path / "run"), "--out", str(tmp_path / name)])
    content = (tmp_path / name).read_bytes()
    assert content.startswith(
        {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[-3:].lower()]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run", name}
    assert f"wrote {tmp_path / name}" in capsys.readouterr().out
    if name == "a.png":
        assert Image.open(tmp_path / name).size == (900, 1000)


# Event files --------------------------------------------------------------------------------------


def test_event_files_hold_all_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        lines = write_run(path, EIGHT[:2], 20, 10, seed)
    plot.main([*map(str, paths), "--tensorboard", str(tmp_path / "events")])
    written = EventAccumulator(str(tmp_path / "events" / str(paths[1]).strip("/")))
    written.Reload()
    expected = {}
    for line in lines:
        values = {}
        if "domain" in line:
            names = line.keys() - {"step", "domain"}
            values = {f"{name}/{line['domain']}": line[name] for name in names}
        else:
            for domain, table in {"mean": line["val"], **line["val_domains"]}.items():
                values |= {f"val_{name}/{domain}": value for name, value in table.items()}
            values |= {f"sampler_weight/{d}": x for d, x in line["sampler_weights"].items()}
        for tag, value in values.items():
            expected.setdefault(tag, []).append((line["step"], value))
    assert set(written.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        found = [(event.step, event.value) for event in written.Scalars(tag)]
        assert found == [(step, pytest.approx(value)) for step, value in values], tag
    assert not (tmp_path / "curves.png").exists()


# Mistakes -----------------------------------------------------------------------------------------


def fails(capsys, arguments, *named):
    with pytest.raises(SystemExit) as stop:
        plot.main([str(argument) for argument in arguments])
    sentence = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in sentence
    assert all(str(name) in sentence for name in named), sentence


STEP = '{"step": 2, "domain": "a", "total": 1.0}'
VAL = '{"step": 2, "val": {"recall_at_1": 0.5, "mmp_at_5": 0.5}, "sampler_weights": {"a": 1.0}}'


@pytest.mark.parametrize(
    "line",
    [
        *("", "text", "7", "null", "[]", "{}", "[" * 100_000, STEP[:-1], "\x00", "\udcff"),
        STEP.replace("1.0", '"1"'),
        STEP.replace("1.0", "NaN"),
        STEP.replace('"a"', "[]"),
        STEP.replace(', "total": 1.0', ""),
        STEP.replace("2", "null"),
        VAL.replace("0.5", "true"),
        VAL.replace('"a"', '"a": {}, "b"'),
        VAL.replace("{", '{"val_domains": {"a": 3}, ', 1),
        VAL.replace(', "sampler_weights": {"a": 1.0}', ""),
    ],
)
def test_a_damaged_line_is_named(tmp_path, capsys, line):
    text = "\n".join([STEP, line, VAL, ""])
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    fails(capsys, [tmp_path], tmp_path / "metrics.jsonl", "damaged in line 2")


def test_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", EIGHT)
    fails(capsys, [], "RUN")
    fails(capsys, ["nowhere"], "nowhere/metrics.jsonl cannot be read")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step"')
    fails(capsys, ["run", "new"], "new/metrics.jsonl has no training step yet")
    for name in ("curves", "curves.gif", "no/curves.png"):
        fails(capsys, ["run", "--out", name], f"--out {'' if '/' in name else 'is '}{name}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails(capsys, ["run"], "pip install -e '.[plot]'")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fails(capsys, ["run", "--tensorboard", "events"], "pip install -e '.[plot]'")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "new"}


def test_event_files_are_not_mixed_with_older_ones(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", EIGHT[:2], 4, 2)
    plot.main(["run", "--tensorboard", "events"])
    fails(capsys, ["run", "--tensorboard", "events"], "--tensorboard events/run exists")
