"""evaluate.retrieval_metrics and evaluate.evaluate: golden rankings, brute force over integer vectors, self-exclusion, means."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import data
import evaluate
from evaluate import Embeddings, retrieval_metrics

PROPERTY = settings(deadline=None, max_examples=120)
FEW = settings(deadline=None, max_examples=25)
STEP = 0.1  # radians between neighbours of the golden rankings

GOLDEN = {  # labels of the ranked index rows, the query's label, where the query itself ranks; R@1, mMP@5
    "n = 3, two of the first three": ([7, 7, 9, 7, 9], 7, None, 1, Fraction(2, 3)),
    "n = 10, three of the first five": ([7, 7, 9, 7, 9] + [7] * 7, 7, None, 1, Fraction(3, 5)),
    "n = 2, both first": ([7, 7, 7, 9, 9], 7, 0, 1, Fraction(1)),
    "n = 2, a stranger first": ([7, 9, 7, 7], 7, 0, 0, Fraction(1, 2)),
    "no other of the class": ([7, 9, 8, 9], 7, 0, 0, Fraction(0)),
    "no such class": ([9, 8, 9, 8], 7, None, 0, Fraction(0)),
    "two labels, n = 4": ([7, 8, 9, 7, 8], [7, 8], None, 1, Fraction(3, 4)),
    "the query behind its duplicates": (
        [9, 7, 7, 7, 9],
        7,
        2,
        0,
        Fraction(1, 2),
    ),  # a dropped rank 0 would give 1, 1
}


def in_order(labels, domains):
    """Embeddings that rank, as seen from [1, 0], in the order given: at growing angles. The last row is the nearest."""
    angles = STEP * torch.arange(1, len(labels) + 1, dtype=torch.float64).flip(0)
    return Embeddings(torch.stack([angles.cos(), angles.sin()], 1), labels[::-1], domains[::-1])


def query(label, domain="a"):
    return Embeddings(torch.tensor([[1.0, 0.0]]), [label], [domain])


# The oracle: python loops over integer vectors, ordered by exact arithmetic ----------------------------------------------------


def as_set(label):
    return set(label) if isinstance(label, (list, tuple, frozenset)) else {label}


def ranking(vector, vectors, barred):
    """Rows by descending cosine, rows of equal cosine ascending: by cos |cos|, which orders as the cosine does."""

    def closeness(row):
        dot, squared = (
            sum(a * b for a, b in zip(vector, vectors[row])),
            sum(b * b for b in vectors[row]),
        )
        return Fraction(dot * abs(dot), squared or 1)

    return sorted(
        (row for row in range(len(vectors)) if row != barred),
        key=lambda row: (-closeness(row), row),
    )


def by_hand(queries, index, exclude, k):
    """Per query: (R@1, mMP@k, neighbours padded with -1)."""
    results = []
    for vector, label, domain, barred in zip(*queries, exclude):
        order = ranking(vector, index.vectors, barred)
        relevant = {
            row
            for row in order
            if index.domains[row] == domain and as_set(index.labels[row]) & as_set(label)
        }
        depth = min(len(relevant), k)
        hits = sum(row in relevant for row in order[:depth])
        results.append(
            (
                float(order[:1] != [] and order[0] in relevant),
                hits / depth if depth else 0.0,
                (order + [-1] * k)[:k],
            )
        )
    return results


def mean_over_domains(values, domains):
    means = [
        math.fsum(own) / len(own)
        for own in ([v for v, d in zip(values, domains) if d == domain] for domain in set(domains))
    ]
    return math.fsum(means) / len(means)


def as_tensors(side, width):
    return side._replace(
        vectors=torch.tensor(side.vectors, dtype=torch.float32).reshape(len(side.vectors), width)
    )


@st.composite
def searches(draw, labels=None):
    """queries, index (integer vectors, few enough to tie), exclude, k; k often reaches beyond the index."""
    width = draw(st.integers(1, 3))
    pool = draw(st.lists(st.tuples(*[st.integers(-3, 3)] * width), min_size=1, max_size=5))
    label = draw(
        st.sampled_from((st.integers(-1, 3), st.sampled_from((-(2**63), -1, 0, 2**40, 2**63 - 1))))
    )
    several = st.lists(label, max_size=4)
    labels = label | several.map(tuple) | several.map(frozenset) if labels is None else labels

    def side(least, most):
        n = draw(st.integers(least, most))
        return Embeddings(
            *(
                draw(st.lists(part, min_size=n, max_size=n))
                for part in (st.sampled_from(pool), labels, st.sampled_from("aab"))
            )
        )

    queries, index = side(1, 6), side(0, 9)
    n = len(queries.vectors)
    exclude = draw(st.lists(st.integers(-1, len(index.vectors) - 1), min_size=n, max_size=n))
    return queries, index, exclude, draw(st.integers(1, len(index.vectors) + 3)), width


# retrieval_metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    labels, label, itself, recall, mmp = GOLDEN[case]
    exclude = None if itself is None else [len(labels) - 1 - itself]
    metrics = retrieval_metrics(
        query(label), in_order(labels, ["a"] * len(labels)), exclude=exclude
    )
    assert metrics.recall_at_1 == recall
    assert metrics.mmp_at_k == pytest.approx(float(mmp), abs=1e-15)
    order = [row for row in reversed(range(len(labels))) if exclude is None or row != exclude[0]]
    assert metrics.neighbours.tolist() == [(order + [-1] * 5)[:5]]


@pytest.mark.parametrize(
    "domains, recall, mmp",
    (
        ("bbbbb", 0, 0),  # n = 0
        ("baaab", 0, 2 / 3),  # n = 3: ranks 2, 3 of the first three
        ("aabba", 1, 2 / 3),
    ),
)
def test_the_right_label_in_another_domain_is_not_relevant(domains, recall, mmp):
    metrics = retrieval_metrics(query(7), in_order([7] * 5, list(domains)))
    assert (metrics.recall_at_1, metrics.mmp_at_k) == (recall, pytest.approx(mmp, abs=1e-15))


@PROPERTY
@given(searches() | searches(labels=st.integers(-1, 3)), st.sampled_from((list, np.array)))
def test_equals_python_loops(search, form):
    queries, index, exclude, k, width = search
    sides = (
        as_tensors(side, width)._replace(domains=form(side.domains)) for side in (queries, index)
    )
    metrics = retrieval_metrics(*sides, exclude=exclude, k=k)
    recalls, mmps, neighbours = map(list, zip(*by_hand(queries, index, exclude, k)))
    assert metrics.neighbours.tolist() == neighbours
    assert metrics.per_query_recall.tolist() == recalls
    assert metrics.per_query_mmp.tolist() == pytest.approx(mmps, abs=1e-15)
    assert metrics.recall_at_1 == pytest.approx(
        mean_over_domains(recalls, queries.domains), abs=1e-12
    )
    assert metrics.mmp_at_k == pytest.approx(mean_over_domains(mmps, queries.domains), abs=1e-12)


@FEW
@given(searches())
def test_shapes_and_types(search):
    queries, index, exclude, k, width = search
    metrics = retrieval_metrics(
        as_tensors(queries, width), as_tensors(index, width), exclude=exclude, k=k
    )
    n = len(exclude)
    assert isinstance(metrics.recall_at_1, float) and isinstance(metrics.mmp_at_k, float)
    for values in (metrics.per_query_recall, metrics.per_query_mmp):
        assert values.shape == (n,) and values.dtype == torch.float64
        assert ((0 <= values) & (values <= 1)).all()
    assert metrics.neighbours.shape == (n, k) and metrics.neighbours.dtype == torch.int64


@PROPERTY
@given(searches(), st.data())
def test_permuting_the_queries_permutes_the_results(search, shuffle):
    queries, index, exclude, k, width = search
    order = shuffle.draw(st.permutations(range(len(exclude))))
    moved = Embeddings(*([part[i] for i in order] for part in queries))
    before = retrieval_metrics(
        as_tensors(queries, width), as_tensors(index, width), exclude=exclude, k=k
    )
    after = retrieval_metrics(
        as_tensors(moved, width), as_tensors(index, width), exclude=[exclude[i] for i in order], k=k
    )
    for one, other in zip(before[2:], after[2:]):
        assert torch.equal(one[order], other)
    assert after[:2] == pytest.approx(before[:2], abs=1e-12)


@PROPERTY
@given(searches(labels=st.integers(-1, 3)))
def test_a_label_alone_or_in_a_list_or_repeated_in_it_is_the_same(search):
    queries, index, exclude, k, width = search
    queries, index = as_tensors(queries, width), as_tensors(index, width)
    expected = retrieval_metrics(queries, index, exclude=exclude, k=k)
    for times in (1, 2):
        several = [
            side._replace(labels=[(label,) * times for label in side.labels])
            for side in (queries, index)
        ]
        for sides in (several, (queries, several[1]), (several[0], index)):
            for one, other in zip(retrieval_metrics(*sides, exclude=exclude, k=k), expected):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


FORMS = {
    "list": (list, list),
    "tuple": (tuple, tuple),
    "list of lists": (lambda labels: [[label] for label in labels],) * 2,
    "array": (np.array, np.array),
    "int32 array": (lambda labels: np.array(labels, dtype=np.int32),) * 2,
    "tensor": (torch.tensor, torch.tensor),
    "list and array": (list, np.array),
    "tensor and tuples": (torch.tensor, lambda labels: [(label, label) for label in labels]),
    "sets": (lambda labels: [{label} for label in labels],) * 2,
    "uint8 array and sets": (
        lambda labels: np.array(labels, dtype=np.uint8),
        lambda labels: [{label, 11} for label in labels],
    ),
    "ints, arrays and tensors": (
        lambda labels: [torch.tensor(labels[0]), np.array([labels[1], 6])],
        lambda labels: [np.int32(labels[0]), *labels[1:-1], torch.tensor([labels[-1], 8])],
    ),
    "matrix of an array": (lambda labels: np.array([labels, labels]).T,) * 2,
    "matrix of a tensor": (lambda labels: torch.tensor([labels, labels]).T,) * 2,
    "list and matrix of an array": (list, lambda labels: np.array([labels, labels]).T),
    "list and matrix of a tensor": (list, lambda labels: torch.tensor([labels, labels]).T),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels(form):
    """n = 3 and the ranking 7 7 9 7 9, in which a label that counted twice would show; the second query finds no 5."""
    index = in_order([7, 7, 9, 7, 9], ["a"] * 5)
    queries = Embeddings(np.array([[1.0, 0.0], [1.0, 0.0]]), [7, 5], ("a", "a"))
    of_queries, of_index = FORMS[form]
    metrics = retrieval_metrics(
        queries._replace(labels=of_queries([7, 5])), index._replace(labels=of_index(index.labels))
    )
    assert metrics.per_query_recall.tolist() == [1, 0]
    assert metrics.per_query_mmp.tolist() == pytest.approx([2 / 3, 0], abs=1e-15)


def test_duplicates_of_the_query_are_found():
    """Rows 0 to 2 are one and the same vector: whichever row the query is, the other two are its nearest."""
    index = Embeddings(torch.tensor([[2.0, 1.0]] * 3 + [[2.0, 1.5]]), [7, 7, 7, 9], ["a"] * 4)
    metrics = retrieval_metrics(index, index, exclude=torch.arange(4), k=2)
    assert metrics.neighbours.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert metrics.per_query_recall.tolist() == metrics.per_query_mmp.tolist() == [1, 1, 1, 0]


def test_a_duplicate_of_another_class_is_no_hit():
    index = Embeddings(torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.5]]), [9, 7, 7], ["a"] * 3)
    metrics = retrieval_metrics(index, index, exclude=[0, 1, 2], k=2)
    assert metrics.per_query_recall.tolist() == [
        0,
        0,
        0,
    ]  # the third has the 9 and its own 7 at one distance: row 0
    assert metrics.per_query_mmp.tolist() == [0, 0, 0]


def test_an_excluded_row_of_another_class_is_not_taken_from_n():
    """n = 2 stays 2 where what is excluded was not relevant, and drops to 1 where it was."""
    index = in_order([7, 9, 7], ["a"] * 3)  # rows 2, 1, 0
    mmp = [retrieval_metrics(query(7), index, exclude=[row]).mmp_at_k for row in (-1, 1, 2, 0)]
    assert mmp == [0.5, 1, 0, 1]


def test_excluded_and_free_queries_mix_where_all_rows_are_asked_for():
    """k = G: a free query gets all the rows, an excluded one all but one, then -1."""
    index = in_order([7, 9, 7], ["a"] * 3)
    queries = Embeddings(torch.tensor([[1.0, 0.0]] * 3), [7] * 3, ["a"] * 3)
    metrics = retrieval_metrics(queries, index, exclude=[-1, 2, 1], k=3)
    assert metrics.neighbours.tolist() == [[2, 1, 0], [1, 0, -1], [2, 0, -1]]


@pytest.mark.parametrize(
    "exclude, neighbours", (([0, -1], [[-1, -1], [0, -1]]), (None, [[0, -1], [0, -1]]))
)
def test_an_index_of_one(exclude, neighbours):
    one = Embeddings(torch.tensor([[1.0, 0.0]]), [7], ["a"])
    queries = Embeddings(torch.ones(2, 2), [7, 7], ["a", "a"])
    metrics = retrieval_metrics(queries, one, exclude=exclude, k=2)
    assert metrics.neighbours.tolist() == neighbours
    expected = [float(row[0] == 0) for row in neighbours]
    assert metrics.per_query_recall.tolist() == metrics.per_query_mmp.tolist() == expected


def test_an_empty_index_finds_nothing():
    metrics = retrieval_metrics(query(7), Embeddings(torch.zeros(0, 2), [], []), k=3)
    assert metrics[:2] == (0, 0) and metrics.neighbours.tolist() == [[-1, -1, -1]]


def test_means_are_over_queries_then_over_domains():
    """Domain a: 1, 1, 0 (its class is missing, and counts); domain b, in between: 0. The mean is 1/3, over queries 1/2."""
    index = in_order([7, 7], ["a", "a"])
    queries = Embeddings(torch.tensor([[1.0, 0.0]] * 4), [7, 7, 7, 5], ["a", "b", "a", "a"])
    metrics = retrieval_metrics(queries, index)
    assert metrics.per_query_recall.tolist() == metrics.per_query_mmp.tolist() == [1, 0, 1, 0]
    assert metrics[:2] == pytest.approx((1 / 3, 1 / 3), abs=1e-15)


def test_k_is_five_unless_told():
    index = in_order([7, 9, 9, 9, 9, 7] + [7] * 9, ["a"] * 15)
    assert retrieval_metrics(query(7), index).mmp_at_k == 1 / 5
    assert retrieval_metrics(query(7), index, k=6).mmp_at_k == pytest.approx(2 / 6, abs=1e-15)


TWO, FOUR = (Embeddings(torch.ones(n, 3), [7] * n, ["a"] * n) for n in (2, 4))


@pytest.mark.parametrize(
    "queries, index, options, sentence",
    (
        (
            TWO._replace(labels=[7]),
            FOUR,
            {},
            "queries have 2 vectors, 1 labels, 2 domains.*must be equally many",
        ),
        (
            TWO,
            FOUR._replace(domains=["a"]),
            {},
            "index have 4 vectors, 4 labels, 1 domains.*must be equally many",
        ),
        (
            TWO,
            FOUR._replace(vectors=torch.ones(3, 3)),
            {},
            "index have 3 vectors, 4 labels.*must be equally many",
        ),
        (TWO, FOUR, {"k": 0}, "k is 0.*from 1 on"),
        (TWO, FOUR, {"k": 2.5}, "k is 2.5.*a whole number"),
        (
            TWO._replace(labels=[1.2, 1.7]),
            FOUR,
            {},
            "labels are float64, such as .*1.2.*whole numbers",
        ),
        (TWO._replace(labels=["a", "b"]), FOUR, {}, "labels are .*whole numbers"),
        (TWO._replace(labels=[2**64 - 1, 0]), FOUR, {}, "labels are .*at most 64 bits"),
        (TWO._replace(labels=[2**70, 0]), FOUR, {}, "no whole number of at most 64 bits"),
        (TWO._replace(labels=[None, 1]), FOUR, {}, "no whole number of at most 64 bits"),
        (Embeddings(torch.ones(0, 3), [], []), FOUR, {}, "no queries: give at least one"),
        (
            TWO,
            FOUR._replace(vectors=torch.ones(4, 5)),
            {},
            "queries have 3 dimensions, the index has 5: .*must",
        ),
        (
            TWO,
            FOUR._replace(vectors=torch.full((4, 3), math.nan)),
            {},
            "index row 0 .*not finite.*must",
        ),
        (
            TWO,
            FOUR._replace(vectors=torch.ones(4, 3, dtype=torch.int64)),
            {},
            "index are .*int64.*must",
        ),
        (TWO, FOUR, {"exclude": [0, 4]}, "exclude holds 4: it must"),
        (TWO, FOUR, {"exclude": [-2, 0]}, "exclude holds -2: it must"),
        (TWO, FOUR, {"exclude": [0]}, "exclude .*must"),
        (TWO, FOUR, {"exclude": [0, 1, 2]}, "exclude .*must"),
        (TWO, FOUR, {"exclude": [[0], [1]]}, "exclude .*must"),
        (TWO, FOUR, {"exclude": [0.0, 1.5]}, "exclude .*must"),
        (TWO, FOUR, {"exclude": [True, False]}, "exclude .*must"),
        (
            TWO,
            Embeddings(torch.ones(1, 3), [7], ["a"]),
            {"exclude": [1, 1]},
            "exclude holds 1: it must",
        ),
        (
            TWO,
            Embeddings(torch.ones(0, 3), [], []),
            {"exclude": [0, -1]},
            "exclude holds 0: it must",
        ),
    ),
)
def test_errors_name_the_value_and_the_remedy(queries, index, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(queries, index, **options)


# evaluate --------------------------------------------------------------------------------------------------------------------

ZERO = 9  # the pixel value that stands for the coordinate 0
PREPROCESSING = {
    "mean": (ZERO / 255,) * 3,
    "std": (1 / 255,) * 3,
}  # with which the networks see pixel - ZERO
SEEN = {"student": (1, 1, 0), "backbone": (1, 1, 1)}  # which coordinates each embedding keeps
TEACHERS = {"a": (0, 1, 1), "b": (1, 0, 1), "c": (1, 1, 0)}


class Colours(torch.nn.Module):
    """A model whose embedding of an image of one colour is that colour, in whole numbers: what is near can be told by hand."""

    def __init__(self):
        super().__init__()
        self.student_head = torch.nn.Parameter(torch.tensor(SEEN["student"], dtype=torch.float32))
        self.teacher_heads = {
            d: lambda colours, seen=torch.tensor(seen): colours * seen
            for d, seen in TEACHERS.items()
        }

    def embed_backbone(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return images.mean((2, 3)).round()

    def embed(self, images):
        return self.embed_backbone(images) * self.student_head


def images_of(colours, labels, domain="a", split="test"):
    """data.TestImages of 2 x 2 pixels, each image of one colour (3 integers from -ZERO on)."""
    pixels = np.array(colours, dtype=np.int64).reshape(-1, 1, 1, 3).repeat(2, 1).repeat(2, 2) + ZERO
    return data.TestImages(data.Split(domain, split, labels, pixels=pixels.astype(np.uint8)), 2)


def same(colours, labels):
    images = images_of(colours, labels)
    return evaluate.TestSet(images, images)


@st.composite
def benchmarks(draw):
    """{domain: (colours, labels of the queries; of the index, or None where the queries are the index)}."""
    colour = st.tuples(*[st.integers(-2, 2)] * 3)
    pool = draw(st.lists(colour, min_size=1, max_size=6))
    label = st.integers(0, 2)

    def side(labels):
        n = draw(st.integers(1, 5))
        return draw(st.lists(st.sampled_from(pool), min_size=n, max_size=n)), draw(
            st.lists(labels, min_size=n, max_size=n)
        )

    made = {}
    for domain in draw(st.permutations("abc"))[: draw(st.integers(1, 3))]:
        own = draw(st.booleans())
        made[domain] = (
            (side(label), None)
            if own
            else (side(st.lists(label, min_size=1, max_size=2).map(tuple)), side(label))
        )
    return made


def opened(benchmark):
    sets = {}
    for domain, (queries, index) in benchmark.items():
        first = images_of(*queries, domain)
        sets[domain] = evaluate.TestSet(first, images_of(*index, domain) if index else first)
    return sets


def expected_results(benchmark, merged, embedding):
    domains = {}
    for domain, (queries, index) in benchmark.items():
        seen = TEACHERS[domain] if embedding == "teacher" else SEEN[embedding]
        colours, labels, names, start = [], [], [], None
        for other, (their_queries, their_index) in benchmark.items():
            if merged or other == domain:
                start = len(labels) if other == domain else start
                more, their_labels = their_index or their_queries
                colours, labels, names = (
                    colours + more,
                    labels + their_labels,
                    names + [other] * len(more),
                )
        n = len(queries[0])
        exclude = [-1] * n if index else [start + i for i in range(n)]
        searched = [
            Embeddings(
                [tuple(a * b for a, b in zip(colour, seen)) for colour in side],
                its_labels,
                its_domains,
            )
            for side, its_labels, its_domains in (
                (*queries, [domain] * n),
                (colours, labels, names),
            )
        ]
        recalls, mmps, _ = zip(*by_hand(*searched, exclude, 5))
        domains[domain] = {
            "recall_at_1": math.fsum(recalls) / n,
            "mmp_at_5": math.fsum(mmps) / n,
            "queries": n,
            "index": len((index or queries)[0]),
        }
    mean = {
        name: math.fsum(row[name] for row in domains.values()) / len(domains)
        for name in ("recall_at_1", "mmp_at_5")
    }
    return {"mean": mean, "domains": domains}


@pytest.mark.parametrize(
    "index, embedding",
    (
        ("merged", "student"),
        ("merged", "backbone"),
        ("separate", "student"),
        ("separate", "backbone"),
        ("separate", "teacher"),
    ),
)
@FEW
@given(benchmark=benchmarks())
def test_evaluate_equals_python_loops(index, embedding, benchmark):
    found = evaluate.evaluate(
        Colours(), opened(benchmark), PREPROCESSING, index=index, embedding=embedding
    )
    expected = expected_results(benchmark, index == "merged", embedding)
    assert found["mean"] == pytest.approx(expected["mean"], abs=1e-12)
    assert list(found["domains"]) == list(expected["domains"])
    for domain, row in expected["domains"].items():
        assert found["domains"][domain] == pytest.approx(row, abs=1e-12), f"domain {domain}"


def test_the_index_is_merged_and_the_embedding_the_students_unless_told():
    """To the student, which does not see z, all images are the same: the nearest is the first row, of the first domain."""
    sets = {domain: same([(1, 1, z)] * 2, [7, 7]) for z, domain in enumerate("cab")}
    found = [
        [
            row["recall_at_1"]
            for row in evaluate.evaluate(Colours(), sets, PREPROCESSING, **options)[
                "domains"
            ].values()
        ]
        for options in (
            {},
            {"index": "merged", "embedding": "student"},
            {"index": "separate"},
            {"embedding": "backbone"},
        )
    ]
    assert found == [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("index", ("merged", "separate"))
def test_no_query_finds_itself(index):
    """Every image is alone in its class: 0 all over, and 1 for a query that its own row answers."""
    colours, labels = [(1, 0, 0), (0, 1, 0), (1, 1, 0)], [4, 5, 6]
    sets = {d: same(colours, labels) for d in "abc"}
    results = evaluate.evaluate(Colours(), sets, PREPROCESSING, index=index)
    assert results["mean"] == {"recall_at_1": 0, "mmp_at_5": 0}
    sets["b"] = evaluate.TestSet(
        images_of(colours, labels), images_of(colours, labels)
    )  # an index split of its own
    results = evaluate.evaluate(Colours(), sets, PREPROCESSING, index="separate")
    assert [row["recall_at_1"] for row in results["domains"].values()] == [0, 1, 0]
    assert [row["mmp_at_5"] for row in results["domains"].values()] == [0, 1, 0]


def test_each_domain_has_its_own_teacher():
    """The three images of each index are those nearest to the query in the eyes of teachers a, b and c; the right one counts."""
    nearest = {"a": (-2, 1, 1), "b": (1, -2, 1), "c": (1, 1, -2)}
    sets = {
        domain: evaluate.TestSet(
            images_of([(1, 1, 1)], [7], domain),
            images_of(list(nearest.values()), [7 if d == domain else 9 for d in nearest], domain),
        )
        for domain in nearest
    }
    found = {}
    for embedding in ("teacher", "student"):  # the student sees what teacher c does
        results = evaluate.evaluate(
            Colours(), sets, PREPROCESSING, index="separate", embedding=embedding
        )
        found[embedding] = [row["recall_at_1"] for row in results["domains"].values()]
    assert found == {"teacher": [1, 1, 1], "student": [0, 0, 1]}


def test_results_are_plain_values_and_the_mean_is_not_rounded():
    """Domain a: 1 of 3, domain b: 2 of 7. The mean of the rounded values differs in the third digit."""
    sets = {
        "a": evaluate.TestSet(images_of([(1, 0, 0)] * 3, [7, 1, 2]), images_of([(1, 0, 0)], [7])),
        "b": evaluate.TestSet(
            images_of([(1, 0, 0)] * 7, [7, 7, 1, 2, 3, 4, 5]), images_of([(1, 0, 0)], [7])
        ),
    }
    results = evaluate.evaluate(Colours(), sets, PREPROCESSING, index="separate")
    assert results["mean"] == pytest.approx(
        {"recall_at_1": 13 / 42, "mmp_at_5": 13 / 42}, abs=1e-15
    )
    assert results["domains"]["b"] == {
        "recall_at_1": pytest.approx(2 / 7, abs=1e-15),
        "mmp_at_5": pytest.approx(2 / 7, abs=1e-15),
        "queries": 7,
        "index": 1,
    }
    assert json.loads(json.dumps(results)) == results
    for row in (results["mean"], *results["domains"].values()):
        assert {type(value) for value in row.values()} <= {int, float}


@pytest.mark.parametrize("batch", (1, 2, 3))
def test_images_stay_in_order_over_several_batches(batch):
    colours = [(x, y, 0) for x in range(-2, 3) for y in range(-1, 1)]
    images = images_of(colours, list(range(10)))
    with patch.object(evaluate, "EMBED_BATCH", batch):
        vectors = evaluate.embed(Colours().eval().embed, images, **PREPROCESSING, device="cpu")
    assert vectors.dtype == torch.float32 and vectors.tolist() == [
        list(colour) for colour in colours
    ]


def test_open_sets_shares_the_images_where_the_index_is_the_query_split():
    splits = {
        (d, s): images_of([(1, 0, 0)], [7], d, s).split for d in "ab" for s in ("test", "index")
    }
    benchmark = SimpleNamespace(
        domains=("a", "b"),
        split=lambda domain, name: splits[domain, name],
        index_name=lambda domain, name: "index" if domain == "b" else name,
    )
    sets = evaluate.open_sets(benchmark, "test", 2)
    assert list(sets) == ["a", "b"]
    assert sets["a"].queries is sets["a"].index and sets["a"].queries.split is splits["a", "test"]
    assert (
        sets["b"].queries.split is splits["b", "test"]
        and sets["b"].index.split is splits["b", "index"]
    )
