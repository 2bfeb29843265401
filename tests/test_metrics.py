"""metrics.py: golden rankings, python loops over integer vectors, exclusion, means, errors."""

import math
import tracemalloc
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import evaluate
import metrics
from metrics import Embeddings, retrieval_metrics

PROPERTY = settings(max_examples=120)
FEW = settings(max_examples=25)
STEP = 0.1  # radians between neighbours of the golden rankings

# Labels of the ranked index rows, the query's label, the rank of the query itself; R@1, mMP@5.
GOLDEN = {
    "n = 3, two of the first three": ([7, 7, 9, 7, 9], 7, None, 1, Fraction(2, 3)),
    "n = 10, three of the first five": ([7, 7, 9, 7, 9] + [7] * 7, 7, None, 1, Fraction(3, 5)),
    "n = 2, both first": ([7, 7, 7, 9, 9], 7, 0, 1, Fraction(1)),
    "n = 2, another class first": ([7, 9, 7, 7], 7, 0, 0, Fraction(1, 2)),
    "no other image of the class": ([7, 9, 8, 9], 7, 0, 0, Fraction(0)),
    "no such class": ([9, 8, 9, 8], 7, None, 0, Fraction(0)),
    "two labels, n = 4": ([7, 8, 9, 7, 8], [7, 8], None, 1, Fraction(3, 4)),
    # dropping rank 0 instead of the query would give 1, 1
    "the query behind its duplicates": ([9, 7, 7, 7, 9], 7, 2, 0, Fraction(1, 2)),
}


def in_order(labels, domains=None):
    """Embeddings that rank in the order given for the query [1, 0], at growing angles. The last row
    is the nearest."""
    domains = domains or ["a"] * len(labels)
    angles = STEP * torch.arange(1, len(labels) + 1, dtype=torch.float64).flip(0)
    return Embeddings(torch.stack([angles.cos(), angles.sin()], 1), labels[::-1], domains[::-1])


def query(label, domain="a"):
    return Embeddings(torch.tensor([[1.0, 0.0]]), [label], [domain])


# The oracle: python loops over integer vectors, ordered by exact arithmetic -----------------------


def as_set(label):
    return set(label) if isinstance(label, (list, tuple, frozenset)) else {label}


def ranking(vector, vectors, excluded):
    """Rows by descending cosine, rows of equal cosine ascending: by cos |cos|, which orders as the
    cosine does. `excluded` is one row or several."""

    def closeness(row):
        dot = sum(a * b for a, b in zip(vector, vectors[row]))
        squared = sum(b * b for b in vectors[row])
        return Fraction(dot * abs(dot), squared or 1)

    rows = [row for row in range(len(vectors)) if row not in as_set(excluded)]
    return sorted(rows, key=lambda row: (-closeness(row), row))


def cosine(one, other):
    """In float64; 0 for a vector of zeros."""
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other)) / norms if norms else 0.0


def by_hand(queries, index, exclude, k):
    """Per query: (R@1, mMP@k, neighbours padded with -1, number of relevant rows)."""
    results = []
    for vector, label, domain, excluded in zip(*queries, exclude):
        order = ranking(vector, index.vectors, excluded)
        relevant = {
            row
            for row in order
            if index.domains[row] == domain and as_set(index.labels[row]) & as_set(label)
        }
        depth = min(len(relevant), k)
        hits = sum(row in relevant for row in order[:depth])
        recall = float(order[:1] != [] and order[0] in relevant)
        mmp, neighbours = hits / depth if depth else 0.0, (order + [-1] * k)[:k]
        results.append((recall, mmp, neighbours, len(relevant)))
    return results


def mean_over_domains(values, domains):
    groups = [[v for v, d in zip(values, domains) if d == domain] for domain in set(domains)]
    return math.fsum(math.fsum(group) / len(group) for group in groups) / len(groups)


def as_tensors(side, width):
    vectors = torch.tensor(side.vectors, dtype=torch.float32)
    return side._replace(vectors=vectors.reshape(len(side.vectors), width))


LARGE = st.sampled_from((-(2**63), -1, 0, 2**40, 2**63 - 1))


@st.composite
def searches(draw, labels=None):
    """queries, index (integer vectors, few enough to tie), exclude (Q, E), k, width; k is often
    larger than the index."""
    width = draw(st.integers(1, 3))
    pool = draw(st.lists(st.tuples(*[st.integers(-3, 3)] * width), min_size=1, max_size=5))
    if labels is None:
        label = draw(st.sampled_from((st.integers(-1, 3), LARGE)))
        sequences = st.lists(label, max_size=4)
        labels = label | sequences.map(tuple) | sequences.map(frozenset)

    def side(least, most):
        n = draw(st.integers(least, most))
        parts = (st.sampled_from(pool), labels, st.sampled_from("aab"))
        return Embeddings(*(draw(st.lists(part, min_size=n, max_size=n)) for part in parts))

    queries, index = side(1, 6), side(0, 9)
    count = draw(st.integers(1, 3))
    rows = st.tuples(*[st.integers(-1, len(index.vectors) - 1)] * count)
    n = len(queries.vectors)
    exclude = draw(st.lists(rows, min_size=n, max_size=n))
    return queries, index, exclude, draw(st.integers(1, len(index.vectors) + 3)), width


# Rankings and counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    labels, label, rank, recall, mmp = GOLDEN[case]
    exclude = None if rank is None else [len(labels) - 1 - rank]
    found = retrieval_metrics(query(label), in_order(labels), exclude=exclude)
    assert found.recall_at_1 == recall
    assert found.mmp_at_k == pytest.approx(float(mmp), abs=1e-15)
    order = [row for row in reversed(range(len(labels))) if exclude is None or row != exclude[0]]
    assert found.neighbours.tolist() == [(order + [-1] * 5)[:5]]


@pytest.mark.parametrize(
    "domains, recall, mmp",
    [
        ("bbbbb", 0, 0),  # n = 0
        ("baaab", 0, 2 / 3),  # n = 3: ranks 2, 3 of the first three
        ("aabba", 1, 2 / 3),
    ],
)
def test_the_right_label_in_another_domain_is_not_relevant(domains, recall, mmp):
    found = retrieval_metrics(query(7), in_order([7] * 5, list(domains)))
    assert (found.recall_at_1, found.mmp_at_k) == (recall, pytest.approx(mmp, abs=1e-15))


@PROPERTY
@given(searches() | searches(labels=st.integers(-1, 3)), st.sampled_from((list, np.array)))
def test_equals_python_loops(search, form):
    queries, index, exclude, k, width = search
    sides = [as_tensors(s, width)._replace(domains=form(s.domains)) for s in (queries, index)]
    found = retrieval_metrics(*sides, exclude=exclude, k=k)
    recalls, mmps, neighbours, relevant = map(list, zip(*by_hand(queries, index, exclude, k)))
    assert found.neighbours.tolist() == neighbours
    assert found.relevant.tolist() == relevant
    cosines = [
        [cosine(vector, index.vectors[row]) if row >= 0 else -math.inf for row in rows]
        for vector, rows in zip(queries.vectors, neighbours)
    ]
    assert found.similarities.flatten().tolist() == pytest.approx(sum(cosines, []), abs=2**-23)
    assert found.per_query_recall.tolist() == recalls
    assert found.per_query_mmp.tolist() == pytest.approx(mmps, abs=1e-15)
    for mean, values in ((found.recall_at_1, recalls), (found.mmp_at_k, mmps)):
        assert mean == pytest.approx(mean_over_domains(values, queries.domains), abs=1e-12)


@FEW
@given(searches())
def test_one_excluded_row_may_be_given_as_a_vector(search):
    queries, index, exclude, k, width = search
    sides = as_tensors(queries, width), as_tensors(index, width)
    rows = [row[0] for row in exclude]
    one = retrieval_metrics(*sides, exclude=np.array(rows), k=k)
    other = retrieval_metrics(*sides, exclude=torch.tensor(rows)[:, None], k=k)
    for a, b in zip(one, other):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@FEW
@given(searches())
def test_shapes_and_types(search):
    queries, index, exclude, k, width = search
    sides = as_tensors(queries, width), as_tensors(index, width)
    found = retrieval_metrics(*sides, exclude=exclude, k=k)
    n = len(exclude)
    assert isinstance(found.recall_at_1, float) and isinstance(found.mmp_at_k, float)
    for values in (found.per_query_recall, found.per_query_mmp):
        assert values.shape == (n,) and values.dtype == torch.float64
        assert ((0 <= values) & (values <= 1)).all()
    assert found.neighbours.shape == (n, k) and found.neighbours.dtype == torch.int64
    assert found.similarities.shape == (n, k) and found.similarities.dtype == torch.float32
    assert found.relevant.shape == (n,) and found.relevant.dtype == torch.int64


@PROPERTY
@given(searches(), st.data())
def test_permuting_the_queries_permutes_the_results(search, data):
    queries, index, exclude, k, width = search
    order = data.draw(st.permutations(range(len(exclude))))
    moved = Embeddings(*([part[i] for i in order] for part in queries))
    index = as_tensors(index, width)
    before = retrieval_metrics(as_tensors(queries, width), index, exclude=exclude, k=k)
    rows = [exclude[i] for i in order]
    after = retrieval_metrics(as_tensors(moved, width), index, exclude=rows, k=k)
    for one, other in zip(before[2:], after[2:]):
        assert torch.equal(one[order], other)
    assert after[:2] == pytest.approx(before[:2], abs=1e-12)


def test_duplicates_of_the_query_are_found():
    """Rows 0 to 2 are equal: whichever row the query is, the other two are its nearest."""
    index = Embeddings(torch.tensor([[2.0, 1.0]] * 3 + [[2.0, 1.5]]), [7, 7, 7, 9], ["a"] * 4)
    found = retrieval_metrics(index, index, exclude=torch.arange(4), k=2)
    assert found.neighbours.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert found.per_query_recall.tolist() == found.per_query_mmp.tolist() == [1, 1, 1, 0]


def test_a_duplicate_of_another_class_is_no_hit():
    """The third query has row 0, of class 9, and row 1, of its own class, at one distance."""
    index = Embeddings(torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.5]]), [9, 7, 7], ["a"] * 3)
    found = retrieval_metrics(index, index, exclude=[0, 1, 2], k=2)
    assert found.per_query_recall.tolist() == found.per_query_mmp.tolist() == [0, 0, 0]


def test_an_excluded_row_of_another_class_does_not_lower_n():
    """n = 2 stays 2 where the excluded row was not relevant, and drops to 1 where it was."""
    index = in_order([7, 9, 7])  # rows 2, 1, 0
    mmp = [retrieval_metrics(query(7), index, exclude=[row]).mmp_at_k for row in (-1, 1, 2, 0)]
    assert mmp == [0.5, 1, 0, 1]


@pytest.mark.parametrize(
    "exclude, mmp",
    [([-1, -1], 2 / 3), ([3, 3], 1 / 2), ([3, 4], 0), ([4, 2], 1), ([2, 0], 1), ([1, 2], 1)],
)
def test_several_excluded_rows_each_lower_n_once(exclude, mmp):
    """Labels 7 7 9 7 9 in rows 4 to 0; a row that is named twice is excluded once."""
    found = retrieval_metrics(query(7), in_order([7, 7, 9, 7, 9]), exclude=[exclude])
    assert found.mmp_at_k == pytest.approx(mmp, abs=1e-15)
    assert not set(found.neighbours[0].tolist()) & set(exclude) - {-1}


def test_queries_with_and_without_exclusion_mix_where_k_is_the_size_of_the_index():
    queries = Embeddings(torch.tensor([[1.0, 0.0]] * 4), [7] * 4, ["a"] * 4)
    exclude = [[-1, -1], [2, -1], [1, -1], [0, 1]]
    found = retrieval_metrics(queries, in_order([7, 9, 7]), exclude=exclude, k=3)
    assert found.neighbours.tolist() == [[2, 1, 0], [1, 0, -1], [2, 0, -1], [2, -1, -1]]


@pytest.mark.parametrize(
    "exclude, neighbours", [([0, -1], [[-1, -1], [0, -1]]), (None, [[0, -1], [0, -1]])]
)
def test_an_index_of_one(exclude, neighbours):
    one = Embeddings(torch.tensor([[1.0, 0.0]]), [7], ["a"])
    queries = Embeddings(torch.ones(2, 2), [7, 7], ["a", "a"])
    found = retrieval_metrics(queries, one, exclude=exclude, k=2)
    assert found.neighbours.tolist() == neighbours
    expected = [float(row[0] == 0) for row in neighbours]
    assert found.per_query_recall.tolist() == found.per_query_mmp.tolist() == expected


def test_an_empty_index_finds_nothing():
    found = retrieval_metrics(query(7), Embeddings(torch.zeros(0, 2), [], []), k=3)
    assert found[:2] == (0, 0) and found.neighbours.tolist() == [[-1, -1, -1]]


def test_means_are_over_queries_then_over_domains():
    """Domain a: 1, 1, 0 (a class that is not in the index counts); domain b: 0. The mean is 1/3,
    over queries alone 1/2."""
    queries = Embeddings(torch.tensor([[1.0, 0.0]] * 4), [7, 7, 7, 5], ["a", "b", "a", "a"])
    found = retrieval_metrics(queries, in_order([7, 7]))
    assert found.per_query_recall.tolist() == found.per_query_mmp.tolist() == [1, 0, 1, 0]
    assert found[:2] == pytest.approx((1 / 3, 1 / 3), abs=1e-15)


def test_k_is_five_by_default():
    index = in_order([7, 9, 9, 9, 9, 7] + [7] * 9)
    assert retrieval_metrics(query(7), index).mmp_at_k == 1 / 5
    assert retrieval_metrics(query(7), index, k=6).mmp_at_k == pytest.approx(2 / 6, abs=1e-15)


# Labels -------------------------------------------------------------------------------------------


@PROPERTY
@given(searches(labels=st.integers(-1, 3)))
def test_a_label_alone_or_in_a_list_or_repeated_in_it_is_the_same(search):
    queries, index, exclude, k, width = search
    queries, index = as_tensors(queries, width), as_tensors(index, width)
    expected = retrieval_metrics(queries, index, exclude=exclude, k=k)
    for times in (1, 2):
        in_lists = [
            side._replace(labels=[(label,) * times for label in side.labels])
            for side in (queries, index)
        ]
        for sides in (in_lists, (queries, in_lists[1]), (in_lists[0], index)):
            for one, other in zip(retrieval_metrics(*sides, exclude=exclude, k=k), expected):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def columns(labels):
    return np.array([labels, labels]).T


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
    "matrix of an array": (columns, columns),
    "matrix of a tensor": (lambda labels: torch.tensor(columns(labels)),) * 2,
    "list and matrix of an array": (list, columns),
    "list and matrix of a tensor": (list, lambda labels: torch.tensor(columns(labels))),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels(form):
    """n = 3 and the ranking 7 7 9 7 9, in which a label that counted twice would show; the second
    query finds no 5."""
    index = in_order([7, 7, 9, 7, 9])
    queries = Embeddings(np.array([[1.0, 0.0], [1.0, 0.0]]), [7, 5], ("a", "a"))
    of_queries, of_index = FORMS[form]
    found = retrieval_metrics(
        queries._replace(labels=of_queries([7, 5])), index._replace(labels=of_index(index.labels))
    )
    assert found.per_query_recall.tolist() == [1, 0]
    assert found.per_query_mmp.tolist() == pytest.approx([2 / 3, 0], abs=1e-15)


def test_one_image_of_many_classes_costs_its_own_classes_alone():
    """Memory is linear in the number of labels: 2,000 rows of 10**5 columns would be 1.6 GB."""
    labels = [[1]] * 1999 + [list(range(10**5))]
    many = Embeddings(torch.ones(2000, 2), labels, ["a"] * 2000)
    few = in_order([7, 10**6, 8])
    tracemalloc.start()
    try:
        as_queries, as_index = retrieval_metrics(many, few), retrieval_metrics(few, many)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"
    assert as_queries.per_query_mmp.tolist() == [0] * 1999 + [0.5]
    exclude = np.array([[1999], [0], [0]])
    assert retrieval_metrics(few, many, exclude=exclude).per_query_mmp.tolist() == [0, 0, 0]
    assert as_index.per_query_recall.tolist() == [0, 0, 0]  # all rows tie: row 0 is the nearest
    first = many._replace(labels=labels[::-1])
    assert retrieval_metrics(few, first).per_query_recall.tolist() == [1, 0, 1]


# Errors -------------------------------------------------------------------------------------------

TWO, FOUR = (Embeddings(torch.ones(n, 3), [7] * n, ["a"] * n) for n in (2, 4))
NONE = Embeddings(torch.ones(0, 3), [], [])
NAN = float("nan")
ERRORS = [
    (TWO._replace(labels=[7]), FOUR, {}, "queries have 2 vectors, 1 labels and 2 domains"),
    (TWO, FOUR._replace(domains=["a"]), {}, "index have 4 vectors, 4 labels and 1 domains"),
    (TWO, FOUR._replace(vectors=torch.ones(3, 3)), {}, "index have 3 vectors, 4 labels"),
    (TWO, FOUR, {"k": 0}, "k is 0: it must be a whole number, 1 or more"),
    (TWO, FOUR, {"k": 2.5}, "k is 2.5: it must be a whole number"),
    (TWO._replace(labels=[1.2, 1.7]), FOUR, {}, "labels must be whole numbers"),
    (TWO._replace(labels=np.array([1.0, 2.0])), FOUR, {}, "labels must be whole numbers"),
    (TWO._replace(labels=[[1, 2.5], [1]]), FOUR, {}, "labels must be whole numbers"),
    (TWO._replace(labels=["a", "b"]), FOUR, {}, "labels must be whole numbers"),
    (TWO._replace(labels=[2**64 - 1, 0]), FOUR, {}, "labels .* at most 64 bits"),
    (TWO._replace(labels=[2**70, 0]), FOUR, {}, "labels .* at most 64 bits"),
    (TWO._replace(labels=[None, 1]), FOUR, {}, "labels must be whole numbers"),
    (TWO._replace(domains=["a", NAN]), FOUR, {}, "domains hold nan: they must be strings"),
    (TWO, FOUR._replace(domains=["a", 3, "a", "a"]), {}, "domains hold 3: they must be"),
    (TWO, FOUR._replace(domains=[None] * 4), {}, "domains hold None: they must be strings"),
    (NONE, FOUR, {}, "no queries: give at least one"),
    (TWO, FOUR._replace(vectors=torch.ones(4, 5)), {}, "3.* 5.*"),
    (TWO, FOUR._replace(vectors=torch.full((4, 3), NAN)), {}, "finite"),
    (TWO, FOUR._replace(vectors=torch.ones(4, 3, dtype=torch.int64)), {}, "int64"),
    (TWO, FOUR, {"exclude": [0, 4]}, "exclude holds 4: it must hold rows .* has 4, or -1"),
    (TWO, FOUR, {"exclude": [[0, 1], [2, 9]]}, "exclude holds 9: it must hold rows"),
    (TWO, FOUR, {"exclude": [-2, 0]}, "exclude holds -2: it must"),
    (TWO, FOUR, {"exclude": [0]}, "exclude is .*: it must hold integers, one or several"),
    (TWO, FOUR, {"exclude": [0, 1, 2]}, "exclude is .*: it must hold integers"),
    (TWO, FOUR, {"exclude": [[[0]], [[1]]]}, "exclude is .*: it must hold integers"),
    (TWO, FOUR, {"exclude": [0.0, 1.5]}, "exclude is .*float.*: it must hold integers"),
    (TWO, FOUR, {"exclude": [True, False]}, "exclude is .*bool: it must hold integers"),
    (TWO, TWO._replace(vectors=torch.ones(2, 3)), {"exclude": [1, 2]}, "exclude holds 2: it must"),
    (TWO, NONE, {"exclude": [0, -1]}, "exclude holds 0: it must"),
]


@pytest.mark.parametrize("queries, index, options, sentence", ERRORS, ids=range(len(ERRORS)))
def test_errors_name_the_value_and_the_remedy(queries, index, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(queries, index, **options)


def test_evaluate_offers_the_same_names():
    assert evaluate.retrieval_metrics is metrics.retrieval_metrics
    assert evaluate.Embeddings is metrics.Embeddings
