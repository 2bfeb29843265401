"""kernels.cosine_topk against exact arithmetic and float64 brute force: order, ties, exclusion,
norms, types, blocks, threads, adversarial data, memory and errors."""

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

from kernels import cosine_topk, cpu, reference

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Powers of two, about 1e-30 and 1e30: equal rows stay equal when they are scaled.
SCALES = (1.0, 3.0, 2.0**-100, 2.0**100)
GRID = 2**24  # scores are multiples of 1 / GRID
TOLERANCE = 0.51 / GRID  # of a score: half a step of the grid, and rounding errors
REFERENCE_BLOCKS = ((1, 1), (1, 3), (2, 64), (64, 4), (1024, 2048))  # queries x index rows
SHAPES = (  # Q, G, D, k
    (1, 1, 1, 1),
    (1, 40, 6, 7),
    (9, 1, 5, 1),
    (9, 33, 1, 33),
    (17, 40, 6, 40),
    (13, 57, 16, 5),
)
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
    "one cluster per query",
)
PROPERTY = settings(max_examples=100)
EXPENSIVE = settings(max_examples=40)


@contextmanager
def reference_blocks(queries, rows):
    with patch.multiple(reference, QUERY_BLOCK=queries, INDEX_BLOCK=rows):
        yield


@contextmanager
def small_blocks(tile=64, block=7, chunk=200, **others):
    """Makes a small search cross the borders of tiles, blocks of queries and chunks."""
    sizes = {"FEW": 0, "TILE": tile, "BLOCK": block, "CHUNK": chunk, **others}
    with patch.multiple(cpu, **sizes):
        yield


@contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_search(seed, queries, rows, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
        for n in (queries, rows)
    ]


def adversarial_search(kind, seed, q, g, d):
    """Data that could mislead a search by groups: queries and index, float32."""
    queries, index = random_search(seed, q, g, d)
    generator = torch.Generator().manual_seed(seed)

    def choice(count):
        return torch.randint(0, max(1, count), (g,), generator=generator)

    if kind == "copies":
        index = index[choice(g // 25)]
    elif kind == "few copies":
        index = index[choice(g)]
    elif kind == "equal":
        index = index[:1].repeat(g, 1)
    elif kind == "clusters":
        index = index[choice(min(5, g))] + 0.1 * index
    elif kind == "near copies":  # closer than float32 can resolve, not closer than the grid
        index = index[:1] + 3e-7 * index
    elif kind == "sorted":
        index = index[(index @ queries[0]).argsort(descending=bool(seed % 2))]
    elif kind == "unit":
        index = torch.nn.functional.normalize(index, dim=1)
    elif kind == "zeros":
        index[::3], index[1::3] = 0.0, -0.0
    elif kind == "one cluster per query":  # consecutive rows
        size = max(1, g // q)
        index = queries[(torch.arange(g) // size).clamp(max=q - 1)] + 1e-4 * index
    return queries, index


def cosines(queries, index):
    """(Q, G) float64 by numpy; a zero row has cosine 0."""
    sides = []
    for side in (queries, index):
        vectors = side.double().numpy()
        norms = np.sqrt((vectors * vectors).sum(1, keepdims=True))
        sides.append(vectors / np.where(norms == 0, 1, norms))
    return sides[0] @ sides[1].T


def same_bits(found, expected):
    """Of scores, including the sign of zeros, and of rows."""
    scores = [side[0].view(torch.int32) for side in (found, expected)]
    return torch.equal(*scores) and torch.equal(found[1], expected[1])


def by_reference(queries, index, k, exclude=None):
    if exclude is None:
        exclude = torch.empty(len(queries), 0, dtype=torch.int64)
    exclude = exclude[:, None] if exclude.ndim == 1 else exclude
    return reference.result(reference.topk(queries, index, k, exclude))


def check(queries, index, k, exclude=None):
    """The result of a search, after comparison with numpy's stable sort in float64."""
    scores, rows = cosine_topk(queries, index, k, exclude=exclude)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64
    assert scores.shape == rows.shape == (len(queries), k)
    truth = cosines(queries, index)
    excluded = np.full((len(queries), 1), -1) if exclude is None else np.asarray(exclude)
    for q, without in enumerate(excluded.reshape(len(queries), -1)):
        order = np.argsort(-np.rint(truth[q] * GRID), kind="stable")
        order = order[~np.isin(order, without)][:k].tolist()
        found = rows[q].tolist()
        assert found == order, f"query {q} without {without}: rows {found}, should be {order}"
        error = np.abs(scores[q].double().numpy() - truth[q][order]).max()
        assert error <= TOLERANCE, f"query {q}: a score differs by {error:.1e} from the cosine"
    assert (scores.diff(dim=1) <= 0).all(), "scores ascend"
    assert not len(scores) or scores.abs().max() <= 1
    return scores, rows


# Order --------------------------------------------------------------------------------------------


@st.composite
def searches(draw):
    """Integer vectors from a small pool, so that equal rows and cosines abound: queries, index,
    exclude, k."""
    vector = st.tuples(*[st.integers(-3, 3)] * draw(st.integers(1, 3)))
    pool = draw(st.lists(vector, min_size=1, max_size=4))
    index = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=40))
    queries = draw(st.lists(st.sampled_from(pool) | vector, max_size=5))
    width = draw(st.integers(0, min(3, len(index) - 1)))
    row = st.lists(st.integers(-1, len(index) - 1), min_size=width, max_size=width)
    exclude = [draw(row) for _ in queries]
    left = len(index) - max((len(set(rows) - {-1}) for rows in exclude), default=0)
    return queries, index, exclude, draw(st.integers(1, left))


def exact_rows(query, index, excluded, k):
    """The k nearest rows in rational arithmetic: by cos |cos|, which has the order of cos."""

    def closeness(row):
        dot, squared = sum(a * b for a, b in zip(query, index[row])), sum(b * b for b in index[row])
        return Fraction(dot * abs(dot), squared or 1)  # the query's norm changes no order

    left = [row for row in range(len(index)) if row not in excluded]
    return sorted(left, key=lambda row: (-closeness(row), row))[:k]


@PROPERTY
@given(searches(), st.sampled_from(DTYPES[2:]), st.booleans(), st.data())
def test_order_is_that_of_rational_arithmetic(search, dtype, by_groups, data):
    queries, index, exclude, k = search
    sides = []
    for vectors in (queries, index):
        n = len(vectors)
        scales = data.draw(st.lists(st.sampled_from(SCALES), min_size=n, max_size=n))
        matrix = torch.tensor(vectors, dtype=torch.float64).reshape(n, len(index[0]))
        sides.append((matrix * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype))
    excluded = torch.tensor(exclude, dtype=torch.int64).reshape(len(queries), -1 if queries else 0)
    with small_blocks(tile=16, block=2, chunk=16) if by_groups else reference_blocks(2, 3):
        _, rows = cosine_topk(*sides, k, exclude=excluded)
    for q, query in enumerate(queries):
        expected = exact_rows(query, index, exclude[q], k)
        assert rows[q].tolist() == expected, f"query {query} should find rows {expected}"


@PROPERTY
@given(
    st.integers(0, 2**32),
    st.sampled_from(SHAPES),
    st.sampled_from(REFERENCE_BLOCKS),
    st.integers(0, 3),
)
def test_random_data_equals_brute_force(seed, shape, sizes, excluded):
    q, g, d, k = shape
    queries, index = random_search(seed, q, g, d)
    exclude = None
    if excluded and g > excluded:
        generator = torch.Generator().manual_seed(seed)
        exclude = torch.randint(-1, g, (q, excluded), generator=generator)
        k = min(k, g - excluded)
    with reference_blocks(*sizes):
        check(queries, index, k, exclude)


@pytest.mark.parametrize("k", range(1, 9))
def test_every_k_is_a_prefix_of_the_whole_ranking(k):
    queries, index = random_search(1, 5, 8, 4)
    whole = check(queries, index, 8)
    assert same_bits(cosine_topk(queries, index, k), [part[:, :k] for part in whole])


def test_equal_rows_come_in_ascending_order_across_blocks():
    near, far = [3.0, 4.0], [4.0, -3.0]
    index = torch.tensor([far, near, far, far, near, near, far, near])
    for sizes in REFERENCE_BLOCKS:
        with reference_blocks(*sizes):
            scores, rows = cosine_topk(torch.tensor([near, far]), index, 8)
        assert rows.tolist() == [[1, 4, 5, 7, 0, 2, 3, 6], [0, 2, 3, 6, 1, 4, 5, 7]]
        assert scores.tolist() == [[1.0] * 4 + [0.0] * 4] * 2


def test_equal_rows_score_equally_in_every_position():
    """The last bits of a product of equal vectors depend on their position in a block."""
    queries, index = random_search(2, 7, 1, 67)
    scores, rows = cosine_topk(queries, index.expand(4103, -1), 4103)
    assert torch.equal(rows, torch.arange(4103).expand(7, -1))
    assert (scores == scores[:, :1]).all()


def test_scores_are_multiples_of_the_grid():
    scores, _ = cosine_topk(*random_search(3, 8, 30, 7), 30)
    steps = scores.double() * GRID
    assert torch.equal(steps, steps.round())


def test_one_step_of_the_grid_is_an_order_and_less_is_a_tie():
    steps = [2**23 + 4.2, 2**23 + 4, 2**23 + 5, 2**23 + 3.8, -(2**22) - 1, -(2**22)]
    cosine = torch.tensor(steps, dtype=torch.float64) / GRID
    index = torch.stack([cosine, (1 - cosine**2).sqrt()], 1)
    scores, rows = cosine_topk(torch.tensor([[1.0, 0.0]]), index, 6)
    assert rows.tolist() == [[2, 0, 1, 3, 5, 4]]
    expected = [2**23 + 5, 2**23 + 4, 2**23 + 4, 2**23 + 4, -(2**22), -(2**22) - 1]
    assert (scores.double() * GRID).tolist() == [expected]


def test_there_is_no_negative_zero():
    """Including cosines in the middle between 0 and the next score, which are in doubt."""
    query = torch.tensor([[1.0, 0.0]])
    index = torch.tensor([[-1e-9, 1.0], [0.0, 1.0], [-0.5 / GRID, 1.0]])
    for dtype in (torch.float32, torch.float64):
        scores, _ = cosine_topk(query.to(dtype), index.to(dtype), 3)
        assert (scores.view(torch.int32) == 0).all()


def test_uncertain_roundings_are_settled_by_the_folded_sums():
    """Of six million pairs, some lie close to the middle between two scores."""
    queries, index = random_search(18, 3000, 2000, 64)
    steps = cosines(queries, index) * GRID
    pairs = np.argwhere(np.abs(np.abs(steps - np.rint(steps)) - 0.5) < 4e-7)
    assert len(pairs), "no pair is uncertain"
    for q, g in pairs:
        pair = queries[q : q + 1], index[g : g + 1]
        expected = reference.scores(*(side[:, None] for side in pair)).item()
        assert cosine_topk(*pair, 1)[0].item() * GRID == expected


def test_scores_of_a_pair_do_not_depend_on_its_block():
    queries, index = random_search(16, 5, 300, 77)
    together = reference.scores(queries[:, None], index[None])
    for q, g in ((0, 0), (3, 17), (4, 299)):
        alone = reference.scores(queries[q : q + 1, None], index[None, g : g + 1])
        assert alone.item() == together[q, g]


@EXPENSIVE
@given(
    st.integers(0, 2**32), st.lists(st.integers(1, 39), max_size=3, unique=True), st.integers(1, 40)
)
def test_merged_parts_of_an_index_are_the_whole(seed, cuts, k):
    queries, index = adversarial_search("few copies", seed, 5, 40, 3)
    parts = index.tensor_split(sorted(cuts))
    found = [cosine_topk(queries, part, min(k, len(part))) for part in parts]
    merged = reference.merged(found, [0, *sorted(cuts)], k)
    assert same_bits(merged, cosine_topk(queries, index, k))


# Exclusion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_groups", (False, True))
def test_an_excluded_row_never_returns(by_groups):
    """Not even if it is the best, and k takes all rows that are left."""
    for count, excluded in ((2, [1]), (40, [7]), (40, [0, 39, 20]), (40, [5, 5, -1])):
        index = -torch.ones(count, 2)
        index[excluded] = 1
        left = [row for row in range(count) if row not in excluded]
        if -1 in excluded:
            index[-1] = -1
        with small_blocks(tile=16, chunk=16) if by_groups else reference_blocks(1, 3):
            exclude = torch.tensor([excluded])
            scores, found = cosine_topk(torch.ones(1, 2), index, len(left), exclude=exclude)
        assert found[0].tolist() == left and (scores == -1).all()


def test_exclusion_is_by_row_not_by_value():
    index = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    _, rows = cosine_topk(index, index, 2, exclude=torch.arange(3))
    assert rows.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_one_column_is_one_row_each():
    queries, index = random_search(4, 6, 20, 3)
    rows = torch.arange(6)
    column = cosine_topk(queries, index, 19, exclude=rows[:, None])
    assert same_bits(column, cosine_topk(queries, index, 19, exclude=rows))


@pytest.mark.parametrize("shape", ((6,), (6, 0), (6, 1), (6, 3)))
def test_minus_one_excludes_nothing(shape):
    queries, index = random_search(4, 6, 20, 3)
    found = cosine_topk(queries, index, 20, exclude=torch.full(shape, -1))
    assert same_bits(found, cosine_topk(queries, index, 20))


def test_repeated_rows_count_once():
    queries, index = random_search(4, 2, 5, 3)
    exclude = torch.tensor([[3, 3, 3], [-1, 2, 2]])
    check(queries, index, 4, exclude)


def test_more_excluded_rows_than_groups():
    queries, index = random_search(33, 100, 3000, 40)
    generator = torch.Generator().manual_seed(33)
    check(queries, index, 5, torch.randint(-1, 3000, (100, 300), generator=generator))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_exclude_of_every_integer_type(dtype):
    """Positions relative to a later block are negative, which unsigned types cannot hold."""
    queries, index = random_search(5, 5, 120, 3)
    rows = torch.tensor([0, 1, 20, 100, 119])
    with reference_blocks(2, 16):
        found = cosine_topk(queries, index, 119, exclude=rows.to(dtype))
        assert same_bits(found, cosine_topk(queries, index, 119, exclude=rows))


@pytest.mark.parametrize("form", (list, tuple, np.array), ids=lambda form: form.__name__)
def test_exclude_of_other_sequences(form):
    queries, index = random_search(6, 4, 9, 3)
    rows = [3, -1, 0, 8]
    found = cosine_topk(queries, index, 8, exclude=form(rows))
    assert same_bits(found, cosine_topk(queries, index, 8, exclude=torch.tensor(rows)))


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
def test_dtypes(query_dtype, index_dtype):
    """Half precision is converted exactly and computed in float64."""
    queries, index = random_search(7, 9, 50, 12)
    queries, index = queries.to(query_dtype), index.to(index_dtype)
    check(queries, index, 20)
    with small_blocks():
        check(queries, index, 2)


@PROPERTY
@given(st.integers(0, 2**32), st.sampled_from(DTYPES[1:]), st.booleans(), st.data())
def test_norms_from_1e_minus_30_to_1e30(seed, dtype, by_groups, data):
    queries, index = random_search(seed, 3, 11, 5, torch.float64)
    exponents = data.draw(st.lists(st.floats(-30, 30), min_size=14, max_size=14))
    scale = 10 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    with small_blocks(tile=16) if by_groups else reference_blocks(1, 3):
        check((queries * scale[:3]).to(dtype), (index * scale[3:]).to(dtype), 11)


@pytest.mark.parametrize("scale", (2.0**-700, 2.0**700))
def test_norms_whose_square_leaves_float64(scale):
    queries, index = random_search(8, 4, 10, 3, torch.float64)
    expected = cosine_topk(queries, index, 10)
    assert same_bits(cosine_topk(queries * scale, index, 10), expected)
    assert same_bits(cosine_topk(queries, index * scale, 10), expected)


@pytest.mark.parametrize("scale", (1e-300, 1e-60, 1e-44, 1e-20, 1e20, 1e60, 1e300))
def test_float64_rows_may_have_any_norm(scale):
    """As float32, rows far outside its range would be zero or infinite."""
    queries, index = (rows.double() for rows in random_search(24, 400, 3000, 16))
    index[7] = scale * queries[0]
    expected = by_reference(queries, index, 6)
    assert expected[1][0, 0] == 7
    assert same_bits(cosine_topk(queries, index, 6), expected)
    queries[-1] *= scale
    assert same_bits(cosine_topk(queries, index, 6), expected)


@pytest.mark.parametrize("scale", (1e-44, 1e-38, 1e-25, 1e25))
def test_float32_rows_whose_squares_leave_float32(scale):
    """1e-38 and 1e-44 make denormal values. Zero rows stand beside them."""
    queries, index = random_search(25, 400, 3000, 16)
    index[7], index[9] = (scale * queries[0].double()).float(), 0
    expected = by_reference(queries, index, 6)
    assert expected[1][0, 0] == 7 or scale < 1e-40  # few bits are left of the values
    assert same_bits(cosine_topk(queries, index, 6), expected)


def test_zero_rows_have_similarity_zero_to_all():
    index = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    scores, rows = cosine_topk(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), index, 4)
    assert rows.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]
    assert scores.tolist() == [[1, 0, 0, -1], [0, 0, 0, 0]]


def test_closed_form_with_negative_cosines():
    angles = torch.deg2rad(torch.tensor([180, 60, 120, 0, 90], dtype=torch.float64))
    index = torch.stack([angles.cos(), angles.sin()], 1)
    scores, rows = cosine_topk(torch.tensor([[5.0, 0.0]]), index, 5)
    assert rows.tolist() == [[3, 1, 4, 2, 0]]
    assert scores.tolist() == [[1.0, 0.5, 0.0, -0.5, -1.0]]


@pytest.mark.parametrize("scale", (1e-4, 1e4))
def test_the_error_bound_does_not_depend_on_the_norm_of_a_query(scale):
    queries, index = random_search(1, 200, 3000, 64)
    index = index[:1] + 3e-5 * index
    found = cosine_topk(scale * queries, index, 6)
    assert same_bits(found, by_reference(scale * queries, index, 6))


# Invariance ---------------------------------------------------------------------------------------


@EXPENSIVE
@given(
    st.integers(0, 2**32),
    st.sampled_from(REFERENCE_BLOCKS),
    st.sampled_from(REFERENCE_BLOCKS),
    st.integers(1, 39),
)
def test_the_blocks_of_the_reference_change_nothing(seed, one, other, k):
    queries, index = random_search(seed, 7, 40, 8)
    index[::3] = index[0]
    exclude = torch.arange(-1, 6)
    with reference_blocks(*one):
        expected = cosine_topk(queries, index, k, exclude=exclude)
    with reference_blocks(*other):
        assert same_bits(cosine_topk(queries, index, k, exclude=exclude), expected)


@EXPENSIVE
@given(st.integers(0, 2**32), st.lists(st.integers(0, 8), max_size=3))
def test_batching_of_queries_changes_nothing(seed, cuts):
    queries, index = random_search(seed, 8, 21, 5)
    exclude = torch.arange(-1, 7)
    expected = cosine_topk(queries, index, 6, exclude=exclude)
    parts = zip(queries.tensor_split(sorted(cuts)), exclude.tensor_split(sorted(cuts)))
    found = [cosine_topk(part, index, 6, exclude=excluded) for part, excluded in parts]
    assert same_bits([torch.cat(side) for side in zip(*found)], expected)


@EXPENSIVE
@given(st.integers(0, 2**32), st.permutations(range(25)), st.booleans())
def test_permuting_the_index_permutes_the_rows(seed, order, by_groups):
    queries, index = random_search(seed, 6, 25, 9)  # without ties, which the row number orders
    order = torch.tensor(order)
    exclude = torch.tensor([0, 3, -1, 24, 7, -1])
    scores, rows = cosine_topk(queries, index, 5, exclude=exclude)
    moved = torch.where(exclude < 0, -1, order.argsort()[exclude])
    with small_blocks(tile=16) if by_groups else reference_blocks(2, 3):
        new_scores, new_rows = cosine_topk(queries, index[order], 5, exclude=moved)
    assert same_bits((new_scores, order[new_rows]), (scores, rows))


@pytest.mark.parametrize("q, g", ((6, 40), (600, 9001)))
def test_noncontiguous_inputs(q, g):
    queries, wide = random_search(9, q, g, 96)
    for cut in (
        lambda rows: rows[:, :64],
        lambda rows: rows[:, ::2],
        lambda rows: rows.T.contiguous().T[:, :64],
        lambda rows: rows[:, :1].expand(-1, 64),
    ):
        expected = cosine_topk(cut(queries).contiguous(), cut(wide).contiguous(), 6)
        assert same_bits(cosine_topk(cut(queries), cut(wide), 6), expected)


@pytest.mark.parametrize("by_groups", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_modified(dtype, by_groups):
    queries, index = random_search(10, 5, 70, 4, dtype)
    exclude = torch.tensor([0, -1, 5, 19, -1])
    before = [tensor.clone() for tensor in (queries, index, exclude)]
    with small_blocks() if by_groups else reference_blocks(2, 3):
        cosine_topk(queries, index, 1, exclude=exclude)
    assert all(map(torch.equal, (queries, index, exclude), before))


def test_no_gradient_is_kept():
    queries, index = (side.requires_grad_() for side in random_search(11, 4, 9, 3))
    scores, rows = cosine_topk(queries, index, 3, exclude=torch.arange(4))
    assert not scores.requires_grad
    expected = cosine_topk(queries.detach(), index.detach(), 3, exclude=torch.arange(4))
    assert same_bits((scores, rows), expected)


def test_no_queries():
    for exclude in (None, [], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3).long()):
        scores, rows = cosine_topk(torch.zeros(0, 3), torch.ones(5, 3), 5, exclude=exclude)
        assert scores.shape == rows.shape == (0, 5)
        assert scores.dtype == torch.float32 and rows.dtype == torch.int64


def test_no_dimensions():
    scores, rows = cosine_topk(torch.zeros(2, 0), torch.ones(5, 0), 4)
    assert rows.tolist() == [[0, 1, 2, 3]] * 2 and (scores == 0).all()


def test_auto_is_torch_on_a_cpu():
    queries, index = random_search(12, 4, 30, 6)
    found = cosine_topk(queries, index, 5, backend="torch")
    assert same_bits(found, cosine_topk(queries, index, 5, backend="auto"))


# The CPU algorithm against the reference ----------------------------------------------------------


@EXPENSIVE
@given(st.data())
def test_the_cpu_algorithm_equals_the_reference(data):
    """For all kinds of data, k, exclusion, types, strides, blocks and threads."""
    draw, one_of = data.draw, lambda *values: data.draw(st.sampled_from(values))
    q, g, d = draw(st.integers(1, 40)), draw(st.integers(1, 2500)), one_of(1, 2, 3, 17, 64, 300)
    seed = draw(st.integers(0, 2**32))
    queries, index = adversarial_search(one_of(*KINDS), seed, q, g, d)
    queries, index = queries.to(one_of(*DTYPES)), index.to(one_of(*DTYPES))
    index = index.T.contiguous().T if one_of(False, True) else index
    excluded = min(one_of(0, 1, 3), g - 1)
    generator = torch.Generator().manual_seed(seed)
    exclude = torch.randint(-1, g, (q, excluded), generator=generator)
    k = draw(st.integers(1, min(one_of(3, 70), g - excluded)))
    sizes = {
        "tile": one_of(16, 64, 1024),
        "block": one_of(1, 7, 512),
        "chunk": one_of(1, 700, 2**18),
        "PREPARED": one_of(0, 2**23),
        "GATHERING": one_of(1, 32, 2**20),  # every tile is computed again, some, none
        "SURVIVORS": one_of(0, 30, 1024),
        "ONEDNN": one_of(None, cpu.ONEDNN),
        "TIMED": one_of(0, 2**62),
    }
    with torch_threads(one_of(1, 2)), small_blocks(**sizes, THREADED=0):
        found = cosine_topk(queries, index, k, exclude=exclude)
    assert same_bits(found, by_reference(queries, index, k, exclude))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "q, g, d, k, threads",
    (
        (300, 3000, 16, 6, 1),
        (600, 9001, 16, 6, 2),  # several tiles, the last one incomplete; two blocks
        (520, 9001, 16, 130, 1),  # k above a quarter of the groups of groups
    ),
)
def test_adversarial_data_equals_the_reference(kind, q, g, d, k, threads):
    queries, index = adversarial_search(kind, 14, q, g, d)
    exclude = torch.stack([torch.arange(q) * 5, cosine_topk(queries, index, 1)[1][:, 0]], dim=1)
    with torch_threads(threads):
        found = cosine_topk(queries, index, k, exclude=exclude)
    assert same_bits(found, by_reference(queries, index, k, exclude))


@pytest.mark.parametrize("kind", ("random", "sorted"))
def test_several_chunks_equal_brute_force(kind):
    """The best rows are in the last chunk, or in all of them."""
    queries, index = adversarial_search(kind, 30, 20, 300_000, 8)
    check(queries, index, 6, torch.arange(20)[:, None] + torch.tensor([[0, 299_000]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gathering", (1, 2**20), ids=("gathered", "computed again"))
def test_both_ways_to_the_rows_of_a_group(gathering, kind):
    """In several chunks of several tiles; `gathering` is the assumed cost of a gathered row."""
    queries, index = adversarial_search(kind, 34, 20, 3000, 8)
    exclude = torch.arange(20)
    with small_blocks(chunk=500, GATHERING=gathering):
        found = cosine_topk(queries, index, 3, exclude=exclude)
    assert same_bits(found, by_reference(queries, index, 3, exclude))


def test_every_row_that_is_left_may_be_asked_for():
    queries, index = random_search(31, 100, 3000, 40)
    check(queries, index, 2999, torch.arange(100))


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("distinct, copies, q, d", ((900, 30, 500, 384), (9216, 3, 50, 16)))
def test_duplicates_beyond_a_tile(threads, distinct, copies, q, d):
    queries, index = random_search(19, q, distinct, d)
    index = index.repeat(copies, 1)
    with torch_threads(threads):
        found = cosine_topk(queries, index, 6)
    assert same_bits(found, by_reference(queries, index, 6))


@pytest.mark.parametrize("kind", ("random", "copies", "unit", "sorted", "clusters"))
def test_the_reference_searches_for_few_queries(kind):
    """Otherwise the search would be right but slow."""
    queries, index = adversarial_search(kind, 15, 600, 9001, 16)
    with patch.object(reference, "topk", side_effect=reference.topk) as whole:
        cosine_topk(queries, index, 6)
    assert sum(len(call.args[0]) for call in whole.call_args_list) < 60


def test_concurrent_searches_restore_the_settings():
    """The first search to enter changes settings of the process, the last to leave restores them,
    and each search computes on one thread in full precision."""
    queries, index = random_search(22, 300, 3000, 64)
    expected, seen = cosine_topk(queries, index, 6), []
    best = reference.best

    def watched(*arguments):
        seen.append((torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision))
        return best(*arguments)

    def search(_):
        return cosine_topk(queries, index, 6), torch.get_num_threads()

    torch.set_float32_matmul_precision("medium")
    try:
        with torch_threads(2):
            with patch.object(reference, "best", watched), ThreadPoolExecutor(4) as pool:
                results = list(pool.map(search, range(24)))
            assert torch.get_num_threads() == 2
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(same_bits(found, expected) and threads == 2 for found, threads in results)
    assert set(seen) == {(1, "ieee")}


def test_an_inherited_precision_stays_inherited():
    queries, index = random_search(23, 300, 3000, 64)
    backends = torch.backends.mkldnn
    try:
        backends.matmul.fp32_precision, backends.fp32_precision = "none", "bf16"
        cosine_topk(queries, index, 6)
        assert backends.matmul.fp32_precision == "bf16"
        backends.fp32_precision = "ieee"
        assert backends.matmul.fp32_precision == "ieee", "a search has replaced the setting"
    finally:
        backends.fp32_precision = "none"


def test_products_have_full_precision():
    queries, index = random_search(17, 300, 3000, 64)
    expected = cosine_topk(queries, index, 6)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = cosine_topk(queries, index, 6)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_the_default_type_changes_nothing(dtype):
    queries, index = random_search(24, 300, 9001, 16)
    expected = cosine_topk(queries, index, 6)
    torch.set_default_dtype(dtype)
    try:
        found = cosine_topk(queries, index, 6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found, expected)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("q, g", ((3, 300), (600, 9001)))
def test_the_default_device_changes_nothing(threads, q, g):
    queries, index = random_search(27, q, g, 16)
    exclude = list(range(q))
    expected = cosine_topk(queries, index, 5, exclude=torch.arange(q))
    with torch_threads(threads):
        torch.set_default_device("meta")
        try:
            found = cosine_topk(queries, index, 5, exclude=torch.tensor(exclude, device="cpu"))
        finally:
            torch.set_default_device(None)
    assert same_bits(found, expected)


@pytest.mark.parametrize("shape", ((2, 9, 4), (300, 3000, 16), (600, 9001, 16)), ids=str)
@pytest.mark.parametrize("kind", ("random", "equal"))
def test_inference_mode_with_two_threads(kind, shape):
    """Inference mode applies to the calling thread only."""
    queries, index = adversarial_search(kind, 20, *shape)
    expected = by_reference(queries, index, 3)
    with torch_threads(2), torch.inference_mode():
        assert same_bits(cosine_topk(queries, index, 3), expected)
        assert same_bits(cosine_topk(queries * 2, index * 2, 3), expected)


def test_a_read_only_array():
    queries, index = (rows.numpy() for rows in random_search(26, 3, 50, 8))
    index.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cosine_topk(queries, index, 4)
    assert same_bits(found, cosine_topk(torch.tensor(queries), torch.tensor(index), 4))


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, threads", (("unit", 1), ("scaled", 2), ("alike", 2), ("equal", 2)))
def test_memory_of_the_process(kind, threads):
    """At most 128 MB, where all scores would take 480 MB."""
    code = f"""if True:
        import resource, sys, torch, kernels
        torch.set_num_threads({threads})
        unit = 1e6 if sys.platform == "darwin" else 1e3
        memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        kind = {kind!r}
        index = torch.randn(50_000 if kind == "equal" else 200_000, 64)
        if kind == "alike":
            index.mul_(0.002).add_(torch.randn(64))
        queries = index[:600].clone()
        if kind == "equal":
            index[:] = index[0]
        if kind != "scaled":
            index /= torch.linalg.vector_norm(index, dim=1, keepdim=True)
        kernels.cosine_topk(queries, torch.randn(5_000, 64), 5)
        before = memory()
        kernels.cosine_topk(queries, index, 5)
        print(memory() - before)"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert float(run.stdout) <= 128, f"{run.stdout} MB"


# Errors -------------------------------------------------------------------------------------------

Q, G = torch.ones(3, 4), torch.ones(6, 4)
NAN, INF = float("nan"), float("inf")


def with_value(matrix, row, value):
    matrix = matrix.clone()
    matrix[row, 1] = value
    return matrix


def excluding(*rows, dtype=torch.int64):
    return {"exclude": torch.tensor(rows, dtype=dtype)}


@pytest.mark.parametrize(
    "arguments, options, sentence",
    (
        ((Q, G, 0), {}, "k is 0: it must be a whole number from 1 to 6"),
        ((Q, G, -2), {}, "k is -2: it must be a whole number from 1 to 6"),
        ((Q, G, 7), {}, "k is 7: it must be a whole number from 1 to 6"),
        ((Q, G, 2.5), {}, "k is 2.5: .*must"),
        ((Q, G, True), {}, "k is True: it must be a whole number"),
        ((Q, G, 6), excluding(-1, 2, -1), "k is 6: .* from 1 to 5"),
        ((Q, G, 4), excluding([-1, 2], [1, 1], [0, 5]), None),
        ((Q, G, 5), excluding([-1, 2], [1, 1], [0, 5]), "k is 5: .* from 1 to 4"),
        ((Q, G[:1], 1), excluding(-1, 0, -1), "the index has 1 rows, which leaves none"),
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
        ((Q.to_sparse(), G, 1), {}, "queries are .* torch.sparse_coo: they must be .*dense"),
        ((Q, G.to(torch.float8_e4m3fn), 1), {}, "index are .*of 16, 32 or 64 bits"),
        ((Q, G, 1), excluding(0, 1), r"exclude is \(2,\) .*must hold integers.* of the 3 queries"),
        ((Q, G, 1), {"exclude": Q[:, None].long()}, r"exclude is \(3, 1, 4\) .*must hold"),
        ((Q, G, 1), {"exclude": 1}, r"exclude is \(\) .*must hold integers"),
        ((Q, G, 1), {"exclude": torch.zeros(3)}, "exclude is .*float32: it must hold integers"),
        ((Q, G, 1), excluding(0, 1, 0, dtype=torch.bool), "exclude is .*bool: it must hold"),
        ((Q, G, 1), excluding(0, 1, 0, dtype=torch.complex64), "exclude is .*complex"),
        ((Q, G, 1), excluding(0, 6, 1), "exclude holds 6: .*rows of the index, 0 to 5, or -1"),
        ((Q, G, 1), excluding([0, 1], [1, -2], [0, 0]), "exclude holds -2: .* 0 to 5, or -1"),
        ((Q, G, 1), {"exclude": np.full(3, 2**64 - 1, dtype=np.uint64)}, "exclude holds"),
        ((Q, G, 1), {"backend": "cuda"}, "backend 'cuda' is unknown: use 'auto', 'torch'"),
    ),
)
def test_errors_name_the_value_and_the_remedy(arguments, options, sentence):
    if sentence is None:
        cosine_topk(*arguments, **options)
    else:
        with pytest.raises(ValueError, match=sentence):
            cosine_topk(*arguments, **options)


@pytest.mark.parametrize("q, g", ((3, 50), (600, 9001)))
def test_sums_that_overflow_are_not_errors(q, g):
    queries, index = random_search(32, q, g, 16)
    expected = cosine_topk(queries, index, 3)
    assert same_bits(cosine_topk(queries.double() * 1e307, index * 2.0**120, 3), expected)


@pytest.mark.parametrize(
    "values", (None, "abc", [[1.0], [2.0, 3.0]], np.ones((3, 2))[::-1], [2**70]), ids=str
)
def test_values_that_are_no_array_of_numbers(values):
    rows = torch.ones(3, 2)
    sentence = r"(queries|index|exclude) (cannot be|are|is) .*: (give a tensor|they must|it must)"
    positions = [(values, rows, None), (rows, values, None)]
    for sides in positions + [(rows, rows, values)] * (values is not None):
        with pytest.raises(ValueError, match=sentence):
            cosine_topk(*sides[:2], 1, exclude=sides[2])
