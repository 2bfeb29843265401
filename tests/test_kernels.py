"""kernels.cosine_topk against exact arithmetic: order, ties, exclusion, norms, dtypes, blocks, memory and errors."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cosine_topk, cpu, direct, reference

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SCALES = (
    1.0,
    3.0,
    2.0**-100,
    2.0**100,
)  # 1e-30 to 1e30; exact in float32, so that a scaled row still ties
GRID = 2**24  # scores are whole multiples of 1 / GRID
TOLERANCE = 0.51 / GRID  # of a score: half a step of the grid, and noise
BLOCKS = ((1, 1), (1, 3), (2, 2), (3, 5), (2, 64), (64, 4), (1024, 2048))  # queries x index rows
SHAPES = (  # Q, G, D, k
    (1, 1, 1, 1),
    (1, 40, 6, 7),
    (9, 1, 5, 1),
    (9, 33, 1, 33),
    (17, 40, 6, 40),
    (13, 57, 16, 5),
)
PROPERTY = settings(deadline=None, max_examples=100)
SEVERAL_SEARCHES = settings(
    deadline=None, max_examples=30
)  # an example costs as much as five of the others


@contextmanager
def blocks(query_block, index_block):
    with patch.multiple(reference, QUERY_BLOCK=query_block, INDEX_BLOCK=index_block):
        yield


def random_search(seed, queries, rows, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
        for n in (queries, rows)
    ]


def cosines(queries, index):
    """(Q, G) float64 by numpy; a zero row has cosine 0."""
    sides = []
    for side in (queries, index):
        vectors = side.double().numpy()
        norms = np.sqrt((vectors * vectors).sum(1, keepdims=True))
        sides.append(vectors / np.where(norms == 0, 1, norms))
    return sides[0] @ sides[1].T


def same_bits(found, expected):
    """Of scores (the sign of a zero too) and rows."""
    return torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32)) and torch.equal(
        found[1], expected[1]
    )


def check(queries, index, k, exclude=None):
    """The result of a search, once it is what brute force with a stable sort gives."""
    scores, rows = cosine_topk(queries, index, k, exclude=exclude)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64
    assert scores.shape == rows.shape == (len(queries), k)
    truth = cosines(queries, index)
    for q in range(len(queries)):
        barred = -1 if exclude is None else int(exclude[q])
        order = [
            r for r in np.argsort(-np.rint(truth[q] * GRID), kind="stable").tolist() if r != barred
        ][:k]
        assert rows[q].tolist() == order, (
            f"query {q}, barred {barred}: rows {rows[q].tolist()}, should be {order}"
        )
        error = np.abs(scores[q].double().numpy() - truth[q][order]).max()
        assert error <= TOLERANCE, f"query {q}: a score is {error:.1e} from the cosine"
    assert (scores.diff(dim=1) <= 0).all(), "scores ascend"
    assert not len(scores) or scores.abs().max() <= 1
    return scores, rows


@st.composite
def searches(draw):
    """Integer vectors out of a small pool, so that equal rows and equal cosines abound: queries, index, exclude, k."""
    vector = st.tuples(*[st.integers(-3, 3)] * draw(st.integers(1, 3)))
    pool = draw(st.lists(vector, min_size=1, max_size=4))
    index = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=12))
    queries = draw(st.lists(st.sampled_from(pool) | vector, max_size=5))
    one_of_the_index = st.integers(-1, len(index) - 1)
    exclude = draw(
        st.none() | st.lists(one_of_the_index, min_size=len(queries), max_size=len(queries))
    )
    left = len(index) - any(row >= 0 for row in exclude or [])
    if not left:
        exclude, left = None, 1
    return queries, index, exclude, draw(st.integers(1, left))


def exact_rows(query, index, barred, k):
    """The k nearest rows in rational arithmetic: by cos |cos|, which orders as the cosine does, then by row."""

    def closeness(row):
        dot, squared = sum(a * b for a, b in zip(query, index[row])), sum(b * b for b in index[row])
        return Fraction(dot * abs(dot), squared or 1)  # the query's own norm changes no order

    return sorted(
        (row for row in range(len(index)) if row != barred), key=lambda row: (-closeness(row), row)
    )[:k]


def as_matrix(vectors, scales, width):
    return (
        torch.tensor(vectors, dtype=torch.float64).reshape(len(vectors), width)
        * torch.tensor(scales)[:, None]
    )


# Order ---------------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(searches(), st.sampled_from(BLOCKS), st.sampled_from(DTYPES[2:]), st.data())
def test_order_is_that_of_rational_arithmetic(search, sizes, dtype, data):
    queries, index, exclude, k = search
    width = len(index[0])
    scaled = [
        as_matrix(
            v, data.draw(st.lists(st.sampled_from(SCALES), min_size=len(v), max_size=len(v))), width
        ).to(dtype)
        for v in (queries, index)
    ]
    barred = None if exclude is None else torch.tensor(exclude, dtype=torch.int64)
    with blocks(*sizes):
        _, rows = cosine_topk(*scaled, k, exclude=barred)
    for q, query in enumerate(queries):
        expected = exact_rows(query, index, -1 if exclude is None else exclude[q], k)
        assert rows[q].tolist() == expected, (
            f"query {query}: rows {rows[q].tolist()}, should be {expected}"
        )


@PROPERTY
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.sampled_from(BLOCKS), st.booleans())
def test_random_data_equals_brute_force(seed, shape, sizes, with_exclusion):
    q, g, d, k = shape
    queries, index = random_search(seed, q, g, d)
    exclude = None
    if with_exclusion and g > 1:
        exclude, k = (
            torch.randint(-1, g, (q,), generator=torch.Generator().manual_seed(seed)),
            min(k, g - 1),
        )
    with blocks(*sizes):
        check(queries, index, k, exclude)


@pytest.mark.parametrize("k", range(1, 9))
def test_every_k_is_a_prefix_of_the_whole_ranking(k):
    queries, index = random_search(1, 5, 8, 4)
    scores, rows = check(queries, index, 8)
    for found, whole in zip(cosine_topk(queries, index, k), (scores, rows)):
        assert torch.equal(found, whole[:, :k])


def test_equal_rows_come_in_ascending_order_across_blocks():
    near, far = [3.0, 4.0], [4.0, -3.0]
    index = torch.tensor([far, near, far, far, near, near, far, near])
    for sizes in BLOCKS:
        with blocks(*sizes):
            scores, rows = cosine_topk(torch.tensor([near, far]), index, 8)
        assert rows.tolist() == [[1, 4, 5, 7, 0, 2, 3, 6], [0, 2, 3, 6, 1, 4, 5, 7]], (
            f"blocks {sizes}"
        )
        assert scores.tolist() == [[1.0] * 4 + [0.0] * 4] * 2


def test_many_equal_rows_score_equally_wherever_they_stand():
    """Over three blocks, the last one uneven: products of equal vectors differ in their last bits with their place in a block."""
    queries, index = random_search(2, 7, 1, 67)
    scores, rows = cosine_topk(queries, index.expand(4103, -1), 4103)
    assert torch.equal(rows, torch.arange(4103).expand(7, -1))
    assert (scores == scores[:, :1]).all()


def test_scores_are_multiples_of_the_grid():
    scores, _ = cosine_topk(*random_search(3, 8, 30, 7), 30)
    steps = scores.double() * GRID
    assert torch.equal(steps, steps.round())


def test_one_step_of_the_grid_is_an_order_and_less_is_a_tie():
    steps = torch.tensor(
        [2**23 + 4.2, 2**23 + 4, 2**23 + 5, 2**23 + 3.8, -(2**22) - 1, -(2**22)],
        dtype=torch.float64,
    )
    index = torch.stack([steps / GRID, (1 - (steps / GRID) ** 2).sqrt()], 1)
    scores, rows = cosine_topk(torch.tensor([[1.0, 0.0]]), index, 6)
    assert rows.tolist() == [[2, 0, 1, 3, 5, 4]]
    assert (scores.double() * GRID - 2**23).tolist() == [
        [5, 4, 4, 4, -(2**22) - 2**23, -(2**22) - 2**23 - 1]
    ]


# Exclusion -----------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(2, 12), st.sampled_from(BLOCKS), st.data())
def test_an_excluded_row_never_returns(rows, sizes, data):
    """Even where it is the best and all others are as far away as can be: k takes all that is left."""
    barred = data.draw(st.integers(0, rows - 1))
    index = -torch.ones(rows, 2)
    index[barred] = 1
    with blocks(*sizes):
        scores, found = cosine_topk(
            torch.ones(1, 2), index, rows - 1, exclude=torch.tensor([barred])
        )
    assert found[0].tolist() == [row for row in range(rows) if row != barred]
    assert (scores == -1).all()


def test_exclusion_is_by_row_not_by_value():
    index = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    _, rows = cosine_topk(index, index, 2, exclude=torch.arange(3))
    assert rows.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_minus_one_excludes_nothing():
    queries, index = random_search(4, 6, 20, 3)
    for found, plain in zip(
        cosine_topk(queries, index, 20, exclude=torch.full((6,), -1)),
        cosine_topk(queries, index, 20),
    ):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_exclude_of_every_integer_type(dtype):
    """A column's number in a later block is below zero, which the narrow types must survive."""
    queries, index = random_search(5, 5, 120, 3)
    rows = torch.tensor([0, 1, 20, 100, 119])
    with blocks(2, 16):
        found = cosine_topk(queries, index, 119, exclude=rows.to(dtype))
        expected = cosine_topk(queries, index, 119, exclude=rows)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("form", (list, tuple, np.array), ids=lambda form: form.__name__)
def test_exclude_of_other_sequences(form):
    queries, index = random_search(6, 4, 9, 3)
    rows = [3, -1, 0, 8]
    assert torch.equal(
        cosine_topk(queries, index, 8, exclude=form(rows))[1],
        cosine_topk(queries, index, 8, exclude=torch.tensor(rows))[1],
    )


# Values --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
def test_dtypes(query_dtype, index_dtype):
    """Half precision is taken as it is and computed in float64."""
    queries, index = random_search(7, 9, 50, 12)
    check(queries.to(query_dtype), index.to(index_dtype), 20)


@PROPERTY
@given(st.integers(0, 2**32), st.sampled_from(DTYPES[1:]), st.data())
def test_norms_from_1e_minus_30_to_1e30(seed, dtype, data):
    queries, index = random_search(seed, 3, 11, 5, torch.float64)
    exponents = data.draw(st.lists(st.floats(-30, 30), min_size=14, max_size=14))
    scale = 10 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    check((queries * scale[:3]).to(dtype), (index * scale[3:]).to(dtype), 11)


@pytest.mark.parametrize("scale", (2.0**-700, 2.0**700))
def test_norms_whose_square_leaves_float64(scale):
    queries, index = random_search(8, 4, 10, 3, torch.float64)
    expected = cosine_topk(queries, index, 10)
    for scaled in ((queries * scale, index), (queries, index * scale)):
        found = cosine_topk(*scaled, 10)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])


def test_zero_rows_have_similarity_zero_to_all():
    index = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    scores, rows = cosine_topk(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), index, 4)
    assert rows.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]
    assert scores.tolist() == [[1, 0, 0, -1], [0, 0, 0, 0]]


def test_closed_form_with_negative_cosines():
    degrees = [180, 60, 120, 0, 90]
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    scores, rows = cosine_topk(
        torch.tensor([[5.0, 0.0]]), torch.stack([angles.cos(), angles.sin()], 1), 5
    )
    assert rows.tolist() == [[3, 1, 4, 2, 0]]
    assert scores.tolist() == [[1.0, 0.5, 0.0, -0.5, -1.0]]


# What must change nothing --------------------------------------------------------------------------------------------------


@SEVERAL_SEARCHES
@given(st.integers(0, 2**32), st.sampled_from(BLOCKS), st.sampled_from(BLOCKS), st.integers(1, 39))
def test_block_sizes_change_nothing(seed, one, other, k):
    queries, index = random_search(seed, 7, 40, 8)
    index[::3] = index[0]
    exclude = torch.arange(-1, 6)
    with blocks(*one):
        expected = cosine_topk(queries, index, k, exclude=exclude)
    with blocks(*other):
        found = cosine_topk(queries, index, k, exclude=exclude)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@SEVERAL_SEARCHES
@given(st.integers(0, 2**32), st.lists(st.integers(0, 8), max_size=3))
def test_batching_of_queries_changes_nothing(seed, cuts):
    queries, index = random_search(seed, 8, 21, 5)
    exclude = torch.arange(-1, 7)
    scores, rows = cosine_topk(queries, index, 6, exclude=exclude)
    parts = list(zip(queries.tensor_split(sorted(cuts)), exclude.tensor_split(sorted(cuts))))
    found = [cosine_topk(part, index, 6, exclude=barred) for part, barred in parts]
    assert torch.equal(torch.cat([s for s, _ in found]), scores)
    assert torch.equal(torch.cat([r for _, r in found]), rows)


@SEVERAL_SEARCHES
@given(st.integers(0, 2**32), st.permutations(range(25)), st.sampled_from(BLOCKS))
def test_permuting_the_index_permutes_the_rows(seed, order, sizes):
    queries, index = random_search(seed, 6, 25, 9)  # without ties, whose order is that of the rows
    order = torch.tensor(order)
    exclude = torch.tensor([0, 3, -1, 24, 7, -1])
    scores, rows = cosine_topk(queries, index, 24, exclude=exclude)
    moved = torch.where(exclude < 0, -1, order.argsort()[exclude])
    with blocks(*sizes):
        new_scores, new_rows = cosine_topk(queries, index[order], 24, exclude=moved)
    assert torch.equal(new_scores, scores) and torch.equal(order[new_rows], rows)


def test_non_contiguous_inputs():
    queries, index = random_search(9, 6, 40, 10)
    wide, tall = torch.randn(40, 30), queries.T.contiguous()
    wide[:, 1::3] = index
    assert not wide[:, 1::3].is_contiguous() and not tall.T.is_contiguous()
    for found, expected in zip(
        cosine_topk(tall.T, wide[:, 1::3], 9), cosine_topk(queries, index, 9)
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_modified(dtype):
    """float64 needs no conversion, so there nothing else makes a copy."""
    queries, index = random_search(10, 5, 20, 4, dtype)
    exclude = torch.tensor([0, -1, 5, 19, -1])
    before = [tensor.clone() for tensor in (queries, index, exclude)]
    cosine_topk(queries, index, 7, exclude=exclude)
    for tensor, copy in zip((queries, index, exclude), before):
        assert torch.equal(tensor, copy)


def test_no_gradient_is_kept():
    queries, index = (side.requires_grad_() for side in random_search(11, 4, 9, 3))
    scores, rows = cosine_topk(queries, index, 3, exclude=torch.arange(4))
    assert not scores.requires_grad
    assert torch.equal(
        rows, cosine_topk(queries.detach(), index.detach(), 3, exclude=torch.arange(4))[1]
    )


def test_no_queries():
    for exclude in (None, torch.zeros(0, dtype=torch.int64)):
        scores, rows = cosine_topk(torch.zeros(0, 3), torch.ones(5, 3), 5, exclude=exclude)
        assert scores.shape == rows.shape == (0, 5)
        assert scores.dtype == torch.float32 and rows.dtype == torch.int64


def test_auto_is_torch():
    queries, index = random_search(12, 4, 30, 6)
    for found, expected in zip(
        cosine_topk(queries, index, 5, backend="torch"),
        cosine_topk(queries, index, 5, backend="auto"),
    ):
        assert torch.equal(found, expected)


# The CPU path against the reference ----------------------------------------------------------------------------------------


def made_search(kind, seed, q, g, d):
    """Data that a search by groups could stumble over: queries and index, float32."""
    queries, index = random_search(seed, q, g, d)
    generator = torch.Generator().manual_seed(seed)
    if kind == "copies":
        index = index[torch.randint(0, max(1, g // 25), (g,), generator=generator)]
    elif kind == "few copies":
        index = index[torch.randint(0, g, (g,), generator=generator)]
    elif kind == "equal":
        index = index[:1].repeat(g, 1)
    elif kind == "clusters":
        index = index[torch.randint(0, min(5, g), (g,), generator=generator)] + 0.1 * index
    elif kind == "near copies":  # closer than float32 scores can tell, not closer than the grid
        index = index[:1] + 3e-7 * index
    elif kind == "sorted":
        index = index[(index @ queries[0]).argsort(descending=bool(seed % 2))]
    elif kind == "unit":
        index = torch.nn.functional.normalize(index, dim=1)
    elif kind == "zeros":
        index[::3], index[1::3] = 0.0, -0.0
    return queries, index


KINDS = (
    "random",
    "copies",
    "few copies",
    "equal",
    "clusters",
    "near copies",
    "sorted",
    "unit",
    "zeros",
)


@SEVERAL_SEARCHES
@given(st.data())
def test_the_cpu_path_is_the_reference_bit_for_bit(data):
    """Whatever the data, k, exclusion, types, strides, blocks and threads."""
    draw = data.draw
    q, g, d = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 2500)),
        draw(st.sampled_from((1, 2, 3, 17, 64, 300))),
    )
    queries, index = made_search(draw(st.sampled_from(KINDS)), draw(st.integers(0, 2**32)), q, g, d)
    queries, index = (
        queries.to(draw(st.sampled_from(DTYPES))),
        index.to(draw(st.sampled_from(DTYPES))),
    )
    if draw(st.booleans()):
        index = index.T.contiguous().T
    exclude = torch.randint(-1, g, (q,)) if g > 1 and draw(st.booleans()) else None
    k = draw(st.integers(1, min(70, g - (exclude is not None))))
    sizes = {
        "QUERY_BLOCK": draw(st.sampled_from((1, 7, 512))),
        "TILE": draw(st.sampled_from((1, 2**14, 2**19))),
        "TILES": draw(st.sampled_from((1, 8))),
        "CHUNK": draw(st.sampled_from((1, 700, 2**18))),
        "MAXIMA": draw(st.sampled_from((1500, 2**19))),
        "NORMALISED": draw(st.sampled_from((2**12, 2**23))),
        "STATE": draw(st.sampled_from((100, 2**21))),
        "GATHERED": draw(st.sampled_from((2**15, 2**18))),
        "SCORES": draw(st.sampled_from((1, 5000, 2**20))),
        "SPARE": draw(st.sampled_from((2, 9))),
        "DIRECT": draw(st.sampled_from((0, 8192))),
        "ALIKE": draw(st.sampled_from((-600, 30, 2048))),
        "PREPARED": draw(st.sampled_from((2**10, 2**19))),
        "LINEAR": draw(st.sampled_from((None, cpu.LINEAR))),
    }
    threads = draw(st.sampled_from((1, 2)))
    try:
        torch.set_num_threads(threads)
        with patch.multiple(cpu, **sizes):
            found = cpu.topk(queries, index, k, exclude)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, reference.topk(queries, index, k, exclude))


@PROPERTY
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.integers(1, 700),
    st.sampled_from((1, 3, 64, 300)),
    st.data(),
)
def test_few_pairs_are_ranked_as_by_the_reference(kind, seed, q, g, d, data):
    queries, index = made_search(kind, seed, q, g, d)
    exclude = torch.randint(-1, g, (q,)) if g > 1 and data.draw(st.booleans()) else None
    k = data.draw(st.integers(1, min(40, g - (exclude is not None))))
    few, unthreaded = (
        data.draw(st.sampled_from((0, 2**20))),
        data.draw(st.sampled_from((1, 5000, 2**19))),
    )
    with patch.object(cpu, "FEW", few), patch.object(direct, "UNTHREADED", unthreaded):
        found = cosine_topk(queries, index, k, exclude=exclude)
    assert same_bits(found, reference.result(reference.topk(queries, index, k, exclude)))


def test_a_score_that_rounding_noise_leaves_in_doubt_is_the_references():
    """Of six million pairs some lie that near the middle of two scores; a search for all rows has them among its results."""
    queries, index = random_search(18, 3000, 2000, 64)
    steps = cosines(queries, index) * GRID
    q, g = next(zip(*np.nonzero(np.abs(np.abs(steps - np.rint(steps)) - 0.5) < 4e-7)))
    some = torch.tensor([g, *range(39)])
    for query in (queries[q : q + 1], queries[q : q + 1].repeat(2, 1)):
        with patch.object(cpu.reference, "scores", side_effect=reference.scores) as asked:
            found = cosine_topk(query, index[some], 40)
        assert asked.call_count == 1, f"the reference was asked {asked.call_count} times"
        assert same_bits(found, reference.result(reference.topk(query, index[some], 40)))


def test_a_score_in_doubt_is_scored_from_the_values_given():
    """Not from float64 copies of them, which the reference would scale first: a pair that tells the two apart."""
    query = torch.tensor([[-0.5561866164207458, -0.9104922413825989, -0.08157529681921005]])
    row = torch.tensor([[-0.3399828374385834, -1.0902106761932373, 1.3679170608520508]])
    expected = reference.scores(query[:, None], row[None])[0, 0].item()
    assert expected != reference.scores(query[:, None].double(), row[None].double())[0, 0].item(), (
        "the pair tells nothing"
    )
    for queries in (query, query.repeat(2, 1)):
        assert (cosine_topk(queries, row, 1)[0].double() * GRID == expected).all()


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize(
    "distinct, copies, q, d",
    ((900, 30, 500, 384), (512, 20, 300, 16), (9216, 3, 50, 16), (600, 20, 100, 256)),
)
def test_copies_of_more_rows_than_a_tail(threads, distinct, copies, q, d):
    """The distinct rows are searched by groups; what belongs to no group must not lie where other rows are gathered, and may be
    nothing."""
    queries, index = random_search(19, q, distinct, d)
    index = index.repeat(copies, 1)
    try:
        torch.set_num_threads(threads)
        found = cosine_topk(queries, index, 6)
    finally:
        torch.set_num_threads(1)
    assert same_bits(found, reference.result(reference.topk(queries, index, 6)))


@pytest.mark.parametrize("scale", (1e-300, 1e-60, 1e-44, 1e-20, 1e20, 1e60, 1e300))
@pytest.mark.parametrize("q, g", ((1, 300), (3, 300), (400, 300), (3, 12000)))
def test_float64_rows_may_be_of_any_norm(scale, q, g):
    """Float32 makes rows of zeros, or infinite ones, of those far outside its range."""
    queries, index = (rows.double() for rows in random_search(24, q, g, 16))
    index[7] = scale * queries[0]
    expected = reference.result(reference.topk(queries, index, 6))
    assert expected[1][0, 0] == 7
    assert same_bits(cosine_topk(queries, index, 6), expected)
    queries[-1] *= scale
    assert same_bits(cosine_topk(queries, index, 6), expected)


@pytest.mark.parametrize("q, g", ((1, 300), (3, 300), (400, 300), (3, 12000)))
def test_float32_rows_whose_squares_leave_float32(q, g):
    queries, index = random_search(25, q, g, 16)
    index[7], index[9] = 1e-25 * queries[0], 0
    expected = reference.result(reference.topk(queries, index, 6))
    assert expected[1][0, 0] == 7
    assert same_bits(cosine_topk(queries, index, 6), expected)


@pytest.mark.parametrize("scale", (1e-4, 1e4))
def test_the_noise_of_a_query_grows_with_its_norm(scale):
    for seed in range(200):
        queries, index = random_search(seed, 1, 300, 64)
        index = index[:1] + 3e-5 * index
        assert same_bits(
            cosine_topk(scale * queries, index, 6),
            reference.result(reference.topk(scale * queries, index, 6)),
        )


@pytest.mark.parametrize(
    "values", (None, "abc", [[1.0], [2.0, 3.0]], np.ones((3, 2))[::-1], [2**70]), ids=str
)
def test_what_is_no_array_of_numbers_is_an_error(values):
    rows = torch.ones(3, 2)
    for sides in ((values, rows, None), (rows, values, None), (rows, rows, values)):
        if sides[2] is None and values is None:
            continue
        with pytest.raises(
            ValueError,
            match=r"(queries|index|exclude) (cannot be|are|is) .*: (give a tensor|they must|it must)",
        ):
            cosine_topk(*sides[:2], 1, exclude=sides[2])


def test_an_array_that_is_not_writable():
    queries, index = (rows.numpy() for rows in random_search(26, 3, 50, 8))
    index.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cosine_topk(queries, index, 4)
    assert same_bits(found, cosine_topk(torch.tensor(queries), torch.tensor(index), 4))


def test_exclude_of_complex_or_too_large_numbers_is_an_error():
    rows = torch.ones(2, 3)
    with pytest.raises(ValueError, match="exclude is .*complex"):
        cosine_topk(rows, rows, 1, exclude=torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="exclude holds"):
        cosine_topk(rows, rows, 1, exclude=np.full(2, 2**64 - 1, dtype=np.uint64))


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("q, g", ((3, 300), (300, 9001)))
def test_another_default_device(threads, q, g):
    queries, index = random_search(27, q, g, 16)
    expected = cosine_topk(queries, index, 5), cosine_topk(queries, index[: g // 9].repeat(9, 1), 5)
    try:
        torch.set_num_threads(threads)
        torch.set_default_device("meta")
        found = (
            cosine_topk(queries, index, 5),
            cosine_topk(queries, index[: g // 9].repeat(9, 1), 5),
        )
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(1)
    assert all(map(same_bits, found, expected))


def test_bounds_by_groups_with_exclusion_and_a_last_row_of_no_whole_group():
    """So many of so few rows are asked for that two products are made: the nearest row is the excluded one, the next the last."""
    queries, index = random_search(28, 150, 9001, 16)
    index[:150], index[-1], exclude = queries, queries[0], torch.arange(150)
    with patch.object(cpu, "_above", side_effect=cpu._above) as above:
        found = cosine_topk(queries, index, 40, exclude=exclude)
    assert above.call_count == 1
    expected = reference.result(reference.topk(queries, index, 40, exclude))
    assert expected[1][0, 0] == 9000 and same_bits(found, expected)


def test_there_is_no_negative_zero():
    """Nor of a cosine in the middle between 0 and the next score, which is in doubt."""
    queries, index = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[-1e-9, 1.0], [0.0, 1.0], [-0.5 / GRID, 1.0]]),
    )
    for dtype in (torch.float32, torch.float64):
        for some in (queries, queries.repeat(3, 1)):
            assert (cosine_topk(some.to(dtype), index.to(dtype), 3)[0].view(torch.int32) == 0).all()


@pytest.mark.parametrize("q", (1, 300))
@pytest.mark.parametrize("where", ("index", "queries"))
def test_a_row_of_zeros_costs_no_detour(where, q):
    sides = dict(zip(("queries", "index"), random_search(20, q, 300, 16)))
    sides[where][min(q, 8) - 1] = 0
    with patch.object(cpu, "_topk", side_effect=AssertionError("given up")):
        found = cosine_topk(sides["queries"], sides["index"], 6)
    assert same_bits(found, reference.result(reference.topk(sides["queries"], sides["index"], 6)))


@pytest.mark.parametrize("q, g", ((2, 300), (100, 3000), (300, 9001)))
def test_onednn_is_given_whole_matrices_alone(q, g):
    """With strides it takes hundreds of times as long."""
    if cpu.LINEAR is None:
        pytest.skip("this torch has no oneDNN")
    wide, index = random_search(21, q, g, 96)

    def product(left, right, *others):
        assert left.is_contiguous() and right.is_contiguous()
        return linear(left, right, *others)

    linear = cpu.LINEAR
    for cut in (
        lambda rows: rows[:, :64],
        lambda rows: rows[:, ::2],
        lambda rows: rows.T.contiguous().T,
    ):
        with patch.object(cpu, "LINEAR", product):
            found = cosine_topk(cut(wide), cut(index), 6)
        assert same_bits(found, cosine_topk(cut(wide).contiguous(), cut(index).contiguous(), 6))


def test_searches_at_the_same_time_leave_the_settings_as_they_were():
    """Several Python threads: the first in changes what is the process's, the last out resets it, and no other sees a change."""
    queries, index = random_search(22, 300, 3000, 64)
    expected, seen = cosine_topk(queries, index, 6), []
    of_many = direct.of_many

    def watched(*arguments):
        seen.append((torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision))
        return of_many(*arguments)

    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(2)
    try:
        with patch.object(direct, "of_many", watched), ThreadPoolExecutor(4) as pool:
            results = list(
                pool.map(
                    lambda _: (cosine_topk(queries, index, 6), torch.get_num_threads()), range(40)
                )
            )
        assert (
            torch.get_num_threads() == 2 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        )
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
    assert all(same_bits(found, expected) and threads == 2 for found, threads in results)
    assert set(seen) == {(1, "ieee")}


def test_an_inherited_precision_stays_inherited():
    queries, index = random_search(23, 300, 3000, 64)
    try:
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.fp32_precision = (
            "none",
            "bf16",
        )
        cosine_topk(queries, index, 6)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee", (
            "a search has made its own of it"
        )
    finally:
        torch.backends.mkldnn.fp32_precision = "none"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_scores_do_not_depend_on_the_default_type(dtype):
    queries, index = random_search(24, 300, 9001, 16)
    expected = cosine_topk(queries, index, 6)
    torch.set_default_dtype(dtype)
    try:
        found = cosine_topk(queries, index, 6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_path_as_it_is_called(kind):
    """Sizes that take the groups, and more than one block of queries."""
    queries, index = made_search(kind, 14, 600, 9001, 16)
    exclude = torch.arange(600) * 7
    found = cosine_topk(queries, index, 6, exclude=exclude)
    for one, other in zip(found, reference.result(reference.topk(queries, index, 6, exclude))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ("random", "copies", "equal", "unit"))
def test_the_cpu_path_needs_the_reference_for_few(kind):
    """Or it would be right and slow."""
    queries, index = made_search(kind, 15, 600, 9001, 16)
    with patch.object(cpu.reference, "topk", side_effect=reference.topk) as whole:
        cosine_topk(queries, index, 6)
    assert sum(len(call.args[0]) for call in whole.call_args_list if len(call.args[1]) == 9001) < 60


@SEVERAL_SEARCHES
@given(
    st.integers(0, 2**32), st.lists(st.integers(1, 39), max_size=3, unique=True), st.integers(1, 40)
)
def test_merged_parts_of_an_index_are_the_whole(seed, cuts, k):
    queries, index = made_search("few copies", seed, 5, 40, 3)
    parts = index.tensor_split(sorted(cuts))
    found = [cosine_topk(queries, part, min(k, len(part))) for part in parts]
    for one, other in zip(
        reference.merged(found, [0, *sorted(cuts)], k), cosine_topk(queries, index, k)
    ):
        assert torch.equal(one, other)


def test_scores_of_a_pair_are_the_same_in_any_company():
    queries, index = random_search(16, 5, 300, 77)
    together = reference.scores(queries[:, None], index[None])
    for q, g in ((0, 0), (3, 17), (4, 299)):
        assert (
            reference.scores(queries[q : q + 1, None], index[None, g : g + 1]).item()
            == together[q, g]
        )


def test_products_of_lower_precision_are_not_taken():
    queries, index = random_search(17, 300, 9001, 16)
    expected = cosine_topk(queries, index, 6)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = cosine_topk(queries, index, 6)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16", "the setting comes back"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# Memory --------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records how many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max(
            [
                self.elements,
                *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)),
            ]
        )
        return result


@pytest.mark.parametrize(
    "q, g, d, k, sizes",
    (
        (60, 90, 4, 3, (10, 40)),
        (400, 30, 2, 5, (20, 10)),
        (20, 900, 2, 5, (10, 200)),
        (1500, 3000, 2, 2, None),  # the blocks of the module itself
    ),
    ids=str,
)
def test_memory_is_one_block_and_never_all_scores(q, g, d, k, sizes):
    queries, index = random_search(13, q, g, d)
    rows_a, rows_b = sizes or (1024, 2048)
    allowed = max(rows_a * rows_b, q * d, g * d, 2 * q * k)
    assert allowed < q * g / 2, "this size shows nothing"
    with blocks(*sizes or (reference.QUERY_BLOCK, reference.INDEX_BLOCK)), Largest() as largest:
        reference.topk(queries, index, k, torch.arange(q) % g)
    assert 0 < largest.elements <= allowed, (
        f"a tensor of {largest.elements} elements where {allowed} are allowed"
    )


@pytest.mark.parametrize("q, g, d, k", ((3000, 20000, 16, 6), (40, 9000, 256, 64)))
def test_memory_of_the_cpu_path(q, g, d, k):
    """No result of an operation is larger than the index, a tile or a chunk."""
    queries, index = random_search(18, q, g, d)
    with Largest() as largest:
        cpu.topk(queries, index, k)
    assert 0 < largest.elements <= max(g * d, q * d, 2**21, 2 * q * (k + cpu.SPARE)), (
        f"a tensor of {largest.elements} elements"
    )


def test_memory_of_the_process():
    """Beside an index of 102 MB, no more than is promised: 80 MB, and 10 MB a thread. A copy in float64 would be 205 MB."""
    code = """if True:
        import resource, sys, torch, kernels
        torch.set_num_threads(1)
        memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        index = torch.randn(400_000, 64)
        index /= torch.linalg.vector_norm(index, dim=1, keepdim=True)
        kernels.cosine_topk(index[:600], index[:20_000], 5)
        before = memory()
        kernels.cosine_topk(index[:600], index, 5)
        print(memory() - before)"""
    grown = float(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    )
    assert grown <= 90, grown


# Errors --------------------------------------------------------------------------------------------------------------------

Q, G = torch.ones(3, 4), torch.ones(6, 4)
NAN, INF = float("nan"), float("inf")


def with_value(matrix, row, value):
    matrix = matrix.clone()
    matrix[row, 1] = value
    return matrix


@pytest.mark.parametrize(
    "arguments, options, sentence",
    (
        ((Q, G, 0), {}, "k is 0: it must be a whole number from 1 to 6"),
        ((Q, G, -2), {}, "k is -2: it must be a whole number from 1 to 6"),
        ((Q, G, 7), {}, "k is 7: it must be a whole number from 1 to 6"),
        ((Q, G, 2.5), {}, "k is 2.5: .*must"),
        (
            (Q, G, 6),
            {"exclude": torch.tensor([-1, 2, -1])},
            "k is 6: it must be a whole number from 1 to 5",
        ),
        (
            (Q, G[:1], 1),
            {"exclude": torch.tensor([-1, 0, -1])},
            "the index has 1 rows, which leaves none",
        ),
        ((Q, G[:0], 1), {}, "the index has 0 rows, which leaves none"),
        ((Q, torch.ones(6, 5), 1), {}, "queries have 4 dimensions, the index has 5: .*must"),
        ((with_value(Q, 2, NAN), G, 1), {}, "queries row 2 .*must"),
        ((with_value(Q, 0, INF), G, 1), {}, "queries row 0 .*must"),
        ((Q, with_value(G, 5, NAN), 1), {}, "index row 5 .*must"),
        ((Q, with_value(G, 3, -INF), 1), {}, "index row 3 .*must"),
        ((Q[0], G, 1), {}, r"queries are \(4,\) .*must be two-dimensional"),
        ((Q, G[0], 1), {}, r"index are \(4,\) .*must be two-dimensional"),
        ((Q[None], G, 1), {}, r"queries are \(1, 3, 4\) .*must be two-dimensional"),
        ((Q.long(), G, 1), {}, "queries are .*int64: they must be .*floating point"),
        ((Q, G.int(), 1), {}, "index are .*int32: they must be .*floating point"),
        (
            (Q, G, 1),
            {"exclude": torch.tensor([0, 1])},
            r"exclude is \(2,\) .*must hold one integer for each of the 3",
        ),
        (
            (Q, G, 1),
            {"exclude": torch.tensor([[0], [1], [2]])},
            r"exclude is \(3, 1\) .*must hold one integer",
        ),
        ((Q, G, 1), {"exclude": 1}, r"exclude is \(\) .*must hold one integer"),
        ((Q, G, 1), {"exclude": torch.zeros(3)}, "exclude is .*float32: it must hold one integer"),
        (
            (Q, G, 1),
            {"exclude": torch.zeros(3, dtype=torch.bool)},
            "exclude is .*bool: it must hold one integer",
        ),
        (
            (Q, G, 1),
            {"exclude": torch.tensor([0, 6, 1])},
            "exclude holds 6: it must hold rows of the index, 0 to 5, or -1",
        ),
        (
            (Q, G, 1),
            {"exclude": torch.tensor([0, 1, -2])},
            "exclude holds -2: it must hold rows of the index, 0 to 5, or -1",
        ),
        ((Q.to_sparse(), G, 1), {}, "queries are .* torch.sparse_coo: they must be .*dense"),
        (
            (Q, G.to(torch.float8_e4m3fn), 1),
            {},
            "index are .*float8_e4m3fn: they must be .*floating point of 16, 32 or 64 bits",
        ),
        ((Q, G, True), {}, "k is True: it must be a whole number"),
        ((Q, G, 1), {"backend": "cuda"}, "backend 'cuda' is unknown: use 'auto', 'torch'"),
    ),
)
def test_errors_name_the_value_and_the_remedy(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        cosine_topk(*arguments, **options)


# Where it is called -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((2, 9, 4), (40, 300, 64), (600, 9001, 16)), ids=str)
@pytest.mark.parametrize("kind", ("random", "equal"))
def test_in_inference_mode_on_two_threads_and_with_another_default_type(kind, shape):
    """Inference mode is of one thread, and a default type is no reason for another product."""
    queries, index = made_search(kind, 20, *shape)
    expected = reference.result(reference.topk(queries, index, 3))
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            inside = cosine_topk(queries, index, 3)
            own = cosine_topk(queries * 2, index * 2, 3)
        torch.set_default_dtype(torch.float64)
        other = cosine_topk(queries, index, 3)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
    for found in (inside, own, other):
        assert all(map(torch.equal, found, expected))
