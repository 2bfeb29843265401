"""evaluate.py: results against python loops, exclusion of the query's file, teachers, tables."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_checkpoint import contents_of
from test_metrics import Embeddings, by_hand, ranking

import checkpoint
import data
import evaluate
from evaluate import TestSet

ROOT = Path(__file__).parents[1]
FEW = settings(max_examples=25)
ZERO = 9  # the pixel value that stands for the coordinate 0
# With these statistics the networks see pixel - ZERO.
PREPROCESSING = {"mean": (ZERO / 255,) * 3, "std": (1 / 255,) * 3}
SEEN = {"student": (1, 1, 0), "backbone": (1, 1, 1)}  # the coordinates that each embedding keeps
TEACHERS = {"a": (0, 1, 1), "b": (1, 0, 1), "c": (1, 1, 0)}
CHOICES = [
    ("merged", "student"),
    ("merged", "backbone"),
    ("separate", "student"),
    ("separate", "backbone"),
    ("separate", "teacher"),
]


class Colours(torch.nn.Module):
    """A model that embeds an image of one colour as that colour, in whole numbers, so that
    neighbours are known exactly."""

    def __init__(self):
        super().__init__()
        self.student_head = torch.nn.Parameter(torch.tensor(SEEN["student"], dtype=torch.float32))
        self.teacher_heads = {
            domain: functools.partial(torch.mul, torch.tensor(seen))
            for domain, seen in TEACHERS.items()
        }

    def embed_backbone(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return images.mean((2, 3)).round()

    def embed(self, images):
        return self.embed_backbone(images) * self.student_head


def images_of(colours, labels, domain="a", files=None):
    """data.TestImages of 2 x 2 pixels, each image of one colour: 3 integers from -ZERO on."""
    pixels = np.array(colours, dtype=np.int64).reshape(-1, 1, 1, 3) + ZERO
    pixels = pixels.repeat(2, 1).repeat(2, 2).astype(np.uint8)
    files = None if files is None else np.array(files, dtype=np.int64)
    return data.TestImages(data.Split(domain, "test", labels, pixels=pixels, files=files), 2)


def same(colours, labels, domain="a"):
    """A TestSet in which the queries are the index."""
    images = images_of(colours, labels, domain)
    return TestSet(images, images)


def results_of(sets, **options):
    return evaluate.evaluate(Colours(), sets, PREPROCESSING, **options)


def embedded_by_colour(sets):
    """The student's embeddings of all sets, as evaluate.retrieve takes them."""
    return evaluate.embed_sets(Colours(), sets, PREPROCESSING, "student")


def recalls(results):
    return [row["recall_at_1"] for row in results["domains"].values()]


# Against python loops -----------------------------------------------------------------------------


@st.composite
def benchmarks(draw):
    """{domain: (queries, index)}, each (colours, labels, files), files being numbers; index is None
    where the queries are the index."""
    pool = draw(st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=6))
    label = st.integers(0, 2)

    def side(labels, numbers):
        n = draw(st.integers(1, 5))
        parts = (st.sampled_from(pool), labels, numbers)
        return [draw(st.lists(part, min_size=n, max_size=n)) for part in parts]

    benchmark = {}
    for domain in draw(st.permutations("abc"))[: draw(st.integers(1, 3))]:
        first = 10 * ord(domain)
        numbers = st.integers(first, first + 5)
        if draw(st.booleans()):
            colours, labels, _ = side(label, numbers)
            queries = [colours, labels, list(range(first, first + len(labels)))]
            benchmark[domain] = queries, None
        else:
            several = st.lists(label, min_size=1, max_size=2).map(tuple)
            benchmark[domain] = side(several, numbers), side(label, numbers)
    return benchmark


def opened(benchmark):
    sets = {}
    for domain, (queries, index) in benchmark.items():
        first = images_of(*queries[:2], domain, queries[2])
        second = images_of(*index[:2], domain, index[2]) if index else first
        sets[domain] = TestSet(first, second)
    return sets


def expected_results(benchmark, merged, embedding):
    domains = {}
    for domain, (queries, index) in benchmark.items():
        seen = TEACHERS[domain] if embedding == "teacher" else SEEN[embedding]
        searched = [  # (colour, label, domain, file) of each row of the index
            (colour, label, other, file)
            for other, (their_queries, their_index) in benchmark.items()
            if merged or other == domain
            for colour, label, file in zip(*(their_index or their_queries))
        ]
        colours, labels, names, files = map(list, zip(*searched))
        exclude = [{row for row, f in enumerate(files) if f == file} for file in queries[2]]
        exclude = [tuple(rows) for rows in exclude]

        def projected(side, seen=seen):
            return [tuple(a * b for a, b in zip(colour, seen)) for colour in side]

        n = len(exclude)
        by_loops = by_hand(
            Embeddings(projected(queries[0]), queries[1], [domain] * n),
            Embeddings(projected(colours), labels, names),
            exclude,
            5,
        )
        recall, mmp, *_ = zip(*by_loops)
        sizes = {"queries": n, "index": len((index or queries)[0])}
        means = {"recall_at_1": math.fsum(recall) / n, "mmp_at_5": math.fsum(mmp) / n}
        domains[domain] = means | sizes
    mean = {
        name: math.fsum(row[name] for row in domains.values()) / len(domains)
        for name in ("recall_at_1", "mmp_at_5")
    }
    return {"mean": mean, "domains": domains}


@pytest.mark.parametrize("index, embedding", CHOICES)
@FEW
@given(benchmark=benchmarks())
def test_evaluate_equals_python_loops(index, embedding, benchmark):
    found = results_of(opened(benchmark), index=index, embedding=embedding)
    expected = expected_results(benchmark, index == "merged", embedding)
    assert found["mean"] == pytest.approx(expected["mean"], abs=1e-12)
    assert list(found["domains"]) == list(expected["domains"])
    for domain, row in expected["domains"].items():
        assert found["domains"][domain] == pytest.approx(row, abs=1e-12), domain


@pytest.mark.parametrize("domains", ["a", "abc"])
@settings(max_examples=10)
@given(data=st.data())
def test_the_domains_of_nearest_neighbours_equal_python_loops(domains, data):
    colours = st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=4)
    sides = {domain: data.draw(colours) for domain in domains}
    sets = {domain: same(side, [0] * len(side), domain) for domain, side in sides.items()}
    found = evaluate.confusion(evaluate.retrieve(embedded_by_colour(sets), "merged"))
    flat = [(domain, colour[:2]) for domain, side in sides.items() for colour in side]
    for row, domain in zip(found, domains):
        counts = dict.fromkeys(domains, 0)
        for query, (own, vector) in enumerate(flat):
            order = ranking(vector, [other for _, other in flat], query)
            if own == domain and order:
                counts[flat[order[0]][0]] += 1
        expected = [count / len(sides[domain]) for count in counts.values()]
        assert row.tolist() == pytest.approx(expected)


# The protocol, case by case -----------------------------------------------------------------------


def test_the_defaults_are_the_merged_index_and_the_student():
    """To the student, which does not see z, all images are equal: the nearest is the first row, of
    the first domain."""
    sets = {domain: same([(1, 1, z)] * 2, [7, 7], domain) for z, domain in enumerate("cab")}
    assert recalls(results_of(sets)) == [1, 0, 0]
    assert recalls(results_of(sets, index="merged", embedding="student")) == [1, 0, 0]
    assert recalls(results_of(sets, index="separate")) == [1, 1, 1]
    assert recalls(results_of(sets, embedding="backbone")) == [1, 1, 1]


@pytest.mark.parametrize("index", ["merged", "separate"])
def test_no_query_finds_itself(index):
    """Every image is alone in its class: 0, but 1 for a query that its own row answers."""
    colours, labels = [(1, 0, 0), (0, 1, 0), (1, 1, 0)], [4, 5, 6]
    sets = {domain: same(colours, labels, domain) for domain in "abc"}
    assert results_of(sets, index=index)["mean"] == {"recall_at_1": 0, "mmp_at_5": 0}
    sets["b"] = TestSet(images_of(colours, labels, "b"), images_of(colours, labels, "b"))
    assert recalls(results_of(sets, index="separate")) == [0, 1, 0], "other files with equal pixels"


def test_every_row_of_the_querys_own_file_is_excluded():
    """The index lists the query's file twice, once with another label."""
    queries = images_of([(1, 0, 0)], [4], files=[10])
    index = [(1, 0, 0)] * 2 + [(1, 1, 0), (0, 1, 0)]
    for files, recall in (([10, 10, 11, 12], 0), ([10, 13, 11, 12], 1)):
        sets = {"a": TestSet(queries, images_of(index, [4, 4, 9, 4], files=files))}
        assert recalls(results_of(sets)) == [recall]


def test_each_domain_has_its_own_teacher():
    """The three images of each index are the nearest ones to the query as teachers a, b and c see
    them; only that of the domain's own teacher is relevant."""
    nearest = {"a": (-2, 1, 1), "b": (1, -2, 1), "c": (1, 1, -2)}
    sets = {}
    for domain in nearest:
        labels = [7 if other == domain else 9 for other in nearest]
        index = images_of(list(nearest.values()), labels, domain)
        sets[domain] = TestSet(images_of([(1, 1, 1)], [7], domain), index)
    assert recalls(results_of(sets, index="separate", embedding="teacher")) == [1, 1, 1]
    assert recalls(results_of(sets, index="separate", embedding="student")) == [0, 0, 1]


def test_results_are_plain_values_and_the_mean_is_not_rounded():
    """Domain a: 1 of 3, domain b: 2 of 7."""
    red = (1, 0, 0)
    sets = {
        "a": TestSet(images_of([red] * 3, [7, 1, 2], "a"), images_of([red], [7], "a")),
        "b": TestSet(images_of([red] * 7, [7, 7, *range(5)], "b"), images_of([red], [7], "b")),
    }
    results = results_of(sets, index="separate")
    both = pytest.approx({"recall_at_1": 13 / 42, "mmp_at_5": 13 / 42}, abs=1e-15)
    assert results["mean"] == both
    row = {"recall_at_1": 2 / 7, "mmp_at_5": 2 / 7, "queries": 7, "index": 1}
    assert results["domains"]["b"] == pytest.approx(row, abs=1e-15)
    assert json.loads(json.dumps(results)) == results
    for row in (results["mean"], *results["domains"].values()):
        assert {type(value) for value in row.values()} <= {int, float}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"index": "all"}, "index is 'all': use one of merged, separate"),
        ({"embedding": "pixels"}, "embedding is 'pixels': use one of student"),
        ({"embedding": "teacher"}, "'teacher' with index 'merged': use index 'separate'"),
    ],
)
def test_unknown_choices(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        results_of({"a": same([(1, 0, 0)], [7])}, **options)


def test_images_that_were_skipped_do_not_count():
    """Unreadable images are neither queries nor rows of the index."""
    colours, labels = [(1, 0, 0), (0, 1, 0), (1, 1, 0), (2, 1, 0), (0, 1, 0)], [4, 4, 5, 5, 4]
    kept = [0, 2, 3, 4]
    sets = {"a": same(colours, labels), "b": same(colours, labels, "b")}
    sets["b"].queries.split.bad_rows[1] = "truncated"
    expected = {
        "a": same(colours, labels),
        "b": same([colours[i] for i in kept], [labels[i] for i in kept], "b"),
    }
    for index in ("merged", "separate"):
        assert results_of(sets, index=index) == results_of(expected, index=index)


# Embedding ----------------------------------------------------------------------------------------


def test_images_stay_in_order_over_several_batches():
    colours = [(x, y, z) for x in range(-9, 9) for y in range(-9, 9) for z in (-1, 1)]
    images = images_of(colours, [0] * len(colours))
    vectors = evaluate.embed(Colours().eval().embed_backbone, images, PREPROCESSING, "cpu")
    assert vectors.dtype == torch.float32
    assert vectors.tolist() == [list(colour) for colour in colours]


def test_an_embedding_that_is_not_finite_is_an_error():
    images = images_of([(1, 0, 0)], [7], "birds")
    with pytest.raises(data.InputError, match="domain birds, split test, are not finite"):
        evaluate.embed(lambda x: x.mean((2, 3)) * math.nan, images, PREPROCESSING, "cpu")


def test_a_program_that_ends_in_the_middle_ends_its_loader_processes(uned):
    """An unexpected error, for example, whose traceback keeps the generator alive."""
    code = f"""
import data
split = data.Benchmark({str(uned)!r}).split("birds", "test")
batches = data.TestImages(split, 16).batches(4, workers=1)
next(batches)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_open_sets_shares_the_images_where_the_index_is_the_query_split():
    splits = {
        (domain, name): data.Split(domain, name, [7], pixels=np.zeros((1, 2, 2, 3), np.uint8))
        for domain in "ab"
        for name in ("test", "index")
    }
    benchmark = SimpleNamespace(
        domains=("a", "b"),
        split=lambda domain, name: splits[domain, name],
        index_name=lambda domain, name: "index" if domain == "b" else name,
    )
    sets = evaluate.open_sets(benchmark, "test", 2)
    assert list(sets) == ["a", "b"]
    assert sets["a"].queries is sets["a"].index and sets["a"].queries.split is splits["a", "test"]
    assert sets["b"].queries.split is splits["b", "test"]
    assert sets["b"].index.split is splits["b", "index"]


def test_the_checkpoint_names_are_offered():
    assert evaluate.load_checkpoint is checkpoint.load


# The command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two untrained models, as runs write them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("one", "two")):
        (root / name).mkdir()
        checkpoint.save(root / name / "best.pt", contents_of(seed, step=seed))
    return root


def run(directory, *arguments):
    """The JSON file of an evaluation."""
    evaluate.main([*map(str, arguments), "--json", str(directory / "out.json")])
    return json.loads((directory / "out.json").read_text())


def test_several_checkpoints_side_by_side(checkpoints, uned, tmp_path, capsys):
    names = ("one", "two")
    paths = [checkpoints / name / "best.pt" for name in names]
    alone = [run(tmp_path, path, "--data", uned) for path in paths]
    capsys.readouterr()
    assert run(tmp_path, *paths, "--data", uned) == {"systems": alone}
    assert alone[0]["mean"] != alone[1]["mean"] and alone[1]["checkpoint"] == str(paths[1])
    printed = capsys.readouterr().out
    assert evaluate.table(dict(zip(names, alone))) in printed
    assert all(f"Domains of the nearest neighbours of {name}, in %" in printed for name in names)


def test_a_checkpoint_trained_on_other_data_than_the_first_is_noted(uned, tmp_path, capsys):
    paths = [tmp_path / name for name in ("one.pt", "two.pt", "three.pt")]
    for path, root in zip(paths, (uned, "elsewhere", uned)):
        checkpoint.save(path, contents_of(config={"data": str(root), "domains": None}))
    evaluate.main([*map(str, paths)])
    printed = capsys.readouterr().out
    assert f"note: {paths[1]} was trained on other data" in printed
    assert printed.count("was trained on other data") == 1 and printed.count(f"on {uned}") == 3
    evaluate.main([*map(str, paths), "--data", str(uned)])
    assert "other data" not in capsys.readouterr().out


def test_all_images_are_queries_and_searched_among_all(checkpoints, uned, tmp_path, capsys):
    """60 images of each domain, in five splits; the results equal a search without any splits."""
    result = run(tmp_path, checkpoints / "one" / "best.pt", "--data", uned, "--split", "all")
    assert "all images as queries" in capsys.readouterr().out
    sizes = {domain: (row["queries"], row["index"]) for domain, row in result["domains"].items()}
    assert sizes == {"birds": (60, 60), "cars": (60, 60)}
    model, contents = checkpoint.load(checkpoints / "one" / "best.pt")
    labels = {}  # {path: (domain, classes)}
    for manifest in uned.glob("info_files/*/*.json"):
        for entry in json.loads(manifest.read_text()):
            classes = labels.setdefault(entry["path"], (manifest.parent.name, set()))[1]
            classes.update(np.atleast_1d(entry["class_id"]).tolist())
    split = data.Split("any", "all", [0] * len(labels), paths=labels, folder=uned / "images")
    images = data.TestImages(split, 16)
    vectors = evaluate.embed(model.embed, images, contents["preprocessing"], "cpu").double().numpy()
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -2)
    known = list(labels.values())
    hits = [
        known[row][0] == known[best][0] and bool(known[row][1] & known[best][1])
        for row, best in enumerate(similarities.argmax(1).tolist())
    ]
    for domain in sizes:
        own = [hit for hit, (name, _) in zip(hits, known) if name == domain]
        assert result["domains"][domain]["recall_at_1"] == pytest.approx(np.mean(own), abs=1e-12)


@pytest.mark.parametrize(
    "split, sentence",
    [("test", "80 of 120 images are in other splits"), ("val", "80 of 120 "), ("all", None)],
)
def test_images_that_the_split_leaves_out_are_counted(uned, split, sentence):
    sentences = list(evaluate.left_out(data.Benchmark(uned), split))
    assert len(sentences) == (sentence is not None)
    assert not sentences or sentences[0].startswith(sentence)


def test_embeddings_of_a_file_are_evaluated_as_those_of_the_model(checkpoints, uned, tmp_path):
    path = checkpoints / "two" / "best.pt"
    expected = run(tmp_path, path, "--data", uned)
    model, contents = checkpoint.load(path)
    vectors, paths = [], []
    for pair in evaluate.open_sets(data.Benchmark(uned), "test", 16).values():
        for part in dict.fromkeys(pair):
            vectors.append(evaluate.embed(model.embed, part, contents["preprocessing"], "cpu"))
            paths += part.split.paths
    file = tmp_path / "vectors.npz"
    np.savez(file, vectors=torch.cat(vectors).numpy(), paths=paths)
    table = tmp_path / "queries.csv"
    found = run(tmp_path, "--embeddings", file, "--data", uned, "--per-query", table)
    assert {name: found[name] for name in ("mean", "domains")} == {
        name: expected[name] for name in ("mean", "domains")
    }
    assert found["embeddings"] == str(file) and found["index"] == "merged"
    assert "checkpoint" not in found and "embedding" not in found
    assert len(table.read_text().splitlines()) == 1 + 20 + 10


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/a/best.pt", "runs/b/best.pt"], ["a", "b"]),
        (["a/best.pt", "a/last.pt"], ["a", "a/last.pt"]),
        (["x.pt", "runs/y.pt", "/z.pt"], ["x.pt", "runs/y.pt", "/z.pt"]),
        (["one/udon", "two/udon"], ["one", "two"]),
        (["a", "a"], ["1", "2"]),
        (["runs/of-december/1", "runs/of-november/1"], ["of-december", "of-november"]),
        (["a-very-long-name-1", "a-very-long-name-2"], ["…ry-long-name-1", "…ry-long-name-2"]),
        (["1-with-a-very-long-name", "2-with-a-very-long-name"], ["1", "2"]),
        (["best.pt"], ["best.pt"]),
    ],
)
def test_names_of_columns(paths, names):
    assert evaluate.column_names(paths) == names


# What is printed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("systems", [["udon"], ["udon", "udon-joint", "usc", "backbone"]])
def test_the_table(systems):
    rows = {"birds": 0.25, "cars": 0.5}
    results = {
        system: {
            "domains": {
                domain: {
                    "recall_at_1": value + number / 100,
                    "mmp_at_5": value / 2,
                    "queries": 1234,
                    "index": 56,
                }
                for domain, value in rows.items()
            },
            "mean": {"recall_at_1": 0.375 + number / 100, "mmp_at_5": 0.1875},
        }
        for number, system in enumerate(systems)
    }
    lines = evaluate.table(results).splitlines()
    if len(systems) > 1:
        assert lines.pop(0).split() == systems
    assert lines[0].split() == ["domain", "queries", "index", *["R@1", "mMP@5"] * len(systems)]
    for line, start, value in zip(
        lines[1:], (["birds", "1,234", "56"], ["cars", "1,234", "56"], ["mean"]), (25, 50, 37.5)
    ):
        numbers = [f"{x:.2f}" for i in range(len(systems)) for x in (value + i, value / 2)]
        assert line.split() == start + numbers
    assert len({len(line) for line in lines[:4]}) == 1, "columns are aligned"
    assert "R@1: the nearest neighbour" in lines[4] and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "labels, noted",
    [
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], False),
        ([0, 0, 1, 1, 2, 2, 3, 3], True),  # four classes
        ([0, 1, 2, 3, 4, 5], True),  # no class has two images
        ([(0, 1), (0, 2), (3, 4)], False),
    ],
)
def test_a_validation_that_cannot_choose_is_noted(capsys, labels, noted):
    images = images_of([(1, 0, 0)] * len(labels), labels, "birds")
    evaluate.check_validation({"birds": TestSet(images, images)})
    out = capsys.readouterr().out
    assert ("the val split of birds has" in out) == noted, out


def test_devices():
    assert evaluate.find_device("cpu") == "cpu" and evaluate.find_device("auto") in ("cpu", "cuda")
    for name in ("meta", "abacus", "cuda:99"):
        with pytest.raises(data.InputError, match=f"--device {name} cannot be used here .*use cpu"):
            evaluate.find_device(name)
