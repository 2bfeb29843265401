"""losses.py: equality with float64 numpy, agreement, symmetries, ranges, derivatives, edge cosines, half precision, bad options."""

import ast
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import losses
from losses import classification_loss, logit_distillation_loss, relational_distillation_loss

EXAMPLES = 20  # of each property
CLASSIFICATION = [  # kind, margin, scale
    ("normface", 0.0, 16.0),
    ("normface", 0.0, 1.0),
    ("normface", 0.0, 64.0),
    ("cosface", 0.0, 16.0),
    ("cosface", 0.1, 16.0),
    ("cosface", 0.35, 64.0),
    ("cosface", -0.2, 16.0),
    ("arcface", 0.0, 16.0),
    ("arcface", 0.1, 16.0),
    ("arcface", 0.5, 64.0),
    ("arcface", 1.2, 30.0),
    ("arcface", -0.3, 16.0),
]
KINDS = [("normface", 0.0), ("cosface", 0.35), ("arcface", 0.5), ("arcface", 0.0)]  # kind, margin
TEMPERATURES = [(0.1, 0.1), (1.0, 1.0), (0.05, 0.2), (2.0, 0.1)]  # student, teacher
DTYPES = {
    torch.float32: 1e-6,
    torch.float64: 1e-12,
}  # the error allowed, relative to the terms that are added
HALVES = [torch.float16, torch.bfloat16]

property_test = settings(deadline=None, max_examples=EXAMPLES)
seeds = st.integers(0, 2**32 - 1)
batches, classes, widths = st.integers(1, 9), st.integers(1, 12), st.integers(1, 10)
dtypes = st.sampled_from(list(DTYPES))


# The same formulas in numpy float64, and material ---------------------------------------------------------------------------


def float64(tensor):
    return tensor.detach().double().numpy()


def extremes(dtype):
    """The ends of [-1, 1], the numbers of this dtype next to them on both sides, and 0."""
    eps = torch.finfo(dtype).eps
    return [-1 - eps, -1.0, -1 + eps / 2, 0.0, 1 - eps / 2, 1.0, 1 + eps]


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def exact_classification(cosines, labels, scale, margin, kind):
    cosines, rows = float64(cosines).copy(), np.arange(len(labels))
    true = cosines[rows, labels]
    cosines[rows, labels] = {
        "normface": true,
        "cosface": true - margin,
        "arcface": np.cos(np.arccos(np.clip(true, -1, 1)) + margin),
    }[kind]
    return -log_softmax(scale * cosines)[rows, labels].mean()


def exact_logit_distillation(student, teacher, student_temperature, teacher_temperature):
    student, teacher = (
        log_softmax(float64(student) / student_temperature),
        log_softmax(float64(teacher) / teacher_temperature),
    )
    return (np.exp(teacher) * (teacher - student)).sum(axis=1).mean()


def exact_relational(student, teacher, scale):
    student, teacher = (
        [row / math.sqrt((row**2).sum()) for row in float64(x)] for x in (student, teacher)
    )
    pairs = [
        (np.dot(student[i], student[j]) - np.dot(teacher[i], teacher[j])) ** 2
        for i in range(len(student))
        for j in range(len(student))
    ]
    return scale * sum(pairs) / len(pairs)


def random_cosines(seed, batch, classes, dtype=torch.float64, share=0.0):
    """(B, C) in [-1, 1]; a share of them from the extremes, as many close to them.  Labels (B,)."""
    rng = np.random.default_rng(seed)
    cosines, kind = rng.uniform(-1, 1, (batch, classes)), rng.random((batch, classes))
    near = np.sign(cosines) * (1 - 10 ** rng.uniform(-7, -1, cosines.shape))
    cosines = np.where(
        kind < share,
        rng.choice(extremes(dtype), cosines.shape),
        np.where(kind > 1 - share, near, cosines),
    )
    return torch.tensor(cosines, dtype=dtype), torch.tensor(rng.integers(0, classes, batch))


def random_embeddings(seed, batch, width, dtype=torch.float64):
    """(B, width), rows of norm 1e-3 to 1e3: never unit, never the same."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(batch, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.tensor(rows * 10 ** rng.uniform(-3, 3, (batch, 1)), dtype=dtype)


def rotation(seed, width):
    return torch.tensor(np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0])


def with_gradient(loss, x):
    """The loss at x and its gradient, both asserted to be finite."""
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert value.shape == () and value.isfinite(), f"{value} at {x}"
    assert x.grad.isfinite().all(), f"gradient {x.grad} at {x}"
    return value.detach(), x.grad


def close(value, expected, tolerance, terms):
    """Equal to `tolerance`, relative to the value or, as a loss is a difference, to the size of its `terms`."""
    error, allowed = (
        abs(float(value) - float(expected)),
        tolerance * max(abs(float(expected)), terms),
    )
    assert error <= allowed, (
        f"{float(value)!r} is not {float(expected)!r}: they differ by {error:.2e}, allowed {allowed:.2e}"
    )


# Equality with the formulas -------------------------------------------------------------------------------------------------


@property_test
@given(
    seeds, batches, classes, dtypes, st.sampled_from(CLASSIFICATION), st.sampled_from([0.0, 0.3])
)
def test_classification_equals_numpy(seed, batch, classes, dtype, case, share):
    kind, margin, scale = case
    cosines, labels = random_cosines(seed, batch, classes, dtype, share)
    before = cosines.clone()
    value = classification_loss(cosines, labels, scale=scale, margin=margin, kind=kind)
    close(value, exact_classification(cosines, labels, scale, margin, kind), DTYPES[dtype], scale)
    assert value.dtype == dtype and torch.equal(cosines, before), "the input is left as it was"


@pytest.mark.parametrize("kind, margin, scale", CLASSIFICATION)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_classification_case_equals_numpy(kind, margin, scale, dtype):
    """On a whole batch, and with the true cosine near +-1: there an epsilon that keeps an angle differentiable shows."""
    cosines, labels = random_cosines(1, 32, 20, dtype)
    options = {"scale": scale, "margin": margin, "kind": kind}
    close(
        classification_loss(cosines, labels, **options),
        exact_classification(cosines, labels, **options),
        DTYPES[dtype],
        terms=0,
    )
    for gap, sign in itertools.product([0, *10 ** np.linspace(-16, -1, 31)], [1, -1]):
        near, label = torch.tensor([[sign * (1 - gap), 0.9, -0.2]], dtype=dtype), torch.tensor([0])
        close(
            classification_loss(near, label, **options),
            exact_classification(near, label, **options),
            DTYPES[dtype],
            scale,
        )


@property_test
@given(seeds, batches, classes, dtypes, st.sampled_from(TEMPERATURES))
def test_logit_distillation_equals_numpy_and_torch(seed, batch, classes, dtype, temperatures):
    (student, _), (teacher, _) = (
        random_cosines(seed, batch, classes, dtype),
        random_cosines(seed + 1, batch, classes, dtype),
    )
    of_student, of_teacher = temperatures
    value = logit_distillation_loss(
        student, teacher, student_temperature=of_student, teacher_temperature=of_teacher
    )
    logits = max(1 / of_student, 1 / of_teacher)
    close(
        value,
        exact_logit_distillation(student, teacher, of_student, of_teacher),
        DTYPES[dtype],
        logits,
    )
    distributions = [
        torch.distributions.Categorical(logits=x.double() / t)
        for x, t in zip((teacher, student), temperatures[::-1])
    ]
    close(value, torch.distributions.kl_divergence(*distributions).mean(), DTYPES[dtype], logits)
    assert value.dtype == dtype


@property_test
@given(seeds, batches, widths, widths, dtypes, st.sampled_from([1.0, 32.0, 1000.0]))
def test_relational_equals_numpy(seed, batch, student_width, teacher_width, dtype, scale):
    student, teacher = (
        random_embeddings(seed + i, batch, w, dtype)
        for i, w in enumerate((student_width, teacher_width))
    )
    value = relational_distillation_loss(student, teacher, scale=scale)
    close(value, exact_relational(student, teacher, scale), DTYPES[dtype], scale)
    assert value.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_defaults_are_the_official_setting(dtype):
    (cosines, labels), (teacher, _) = (
        random_cosines(2, 32, 20, dtype),
        random_cosines(3, 32, 20, dtype),
    )
    close(
        classification_loss(cosines, labels),
        exact_classification(cosines, labels, 16, 0, "normface"),
        DTYPES[dtype],
        terms=0,
    )
    close(
        logit_distillation_loss(cosines, teacher),
        exact_logit_distillation(cosines, teacher, 0.1, 0.1),
        DTYPES[dtype],
        terms=0,
    )
    student, teacher = random_embeddings(4, 32, 8, dtype), random_embeddings(5, 32, 16, dtype)
    close(
        relational_distillation_loss(student, teacher),
        exact_relational(student, teacher, 32),
        DTYPES[dtype],
        terms=0,
    )


def test_relational_of_known_angles():
    axes, one, opposite = torch.eye(2), torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    assert (
        relational_distillation_loss(axes, 3 * one) == 32 * 2 / 4
    )  # two of the four pairs are apart by 1
    assert (
        relational_distillation_loss(5 * one, opposite) == 32 * 2 * 4 / 4
    )  # by 2: the largest value there is


# Agreement ------------------------------------------------------------------------------------------------------------------


@property_test
@given(seeds, batches, classes, dtypes, st.sampled_from([0.05, 0.1, 1.0]))
def test_logit_distillation_is_zero_at_agreement(seed, batch, classes, dtype, temperature):
    teacher, _ = random_cosines(seed, batch, classes, dtype)
    same = {"student_temperature": temperature, "teacher_temperature": temperature}
    value, gradient = with_gradient(
        lambda student: logit_distillation_loss(student, teacher, **same), teacher
    )
    assert abs(value) <= DTYPES[dtype] and gradient.abs().max() <= DTYPES[dtype] / temperature, (
        value,
        gradient,
    )
    shift = torch.linspace(-0.5, 0.5, batch, dtype=dtype)[
        :, None
    ]  # softmax does not see one number added to a row
    value, gradient = with_gradient(
        lambda student: logit_distillation_loss(student, teacher, **same), teacher + shift
    )
    terms = 1 / temperature  # rounding of the shifted logits
    assert (
        abs(value) <= DTYPES[dtype] * terms and gradient.abs().max() <= DTYPES[dtype] * terms**2
    ), (value, gradient)


@property_test
@given(seeds, batches, widths, st.integers(0, 5), dtypes)
def test_relational_is_zero_at_agreement(seed, batch, width, wider, dtype):
    """Agreement: the same directions up to a rotation into more dimensions and to the norm of each row."""
    student = F.normalize(random_embeddings(seed, batch, width), dim=1)
    norms = torch.logspace(-2, 2, batch, dtype=torch.float64)[:, None]
    teacher = norms * F.pad(student, (0, wider)) @ rotation(seed, width + wider)
    value, gradient = with_gradient(
        lambda x: relational_distillation_loss(x, teacher.to(dtype)), student.to(dtype)
    )
    assert 0 <= value <= 32 * DTYPES[dtype] ** 2, value
    assert gradient.abs().max() <= 128 * DTYPES[dtype], (
        gradient
    )  # 32 x 2 x 2 x the rounding of a cosine


# Symmetries, range, relations between the kinds -----------------------------------------------------------------------------


@property_test
@given(seeds, batches, widths, widths)
def test_relational_does_not_see_a_rotation(seed, batch, student_width, teacher_width):
    student, teacher = (
        random_embeddings(seed, batch, student_width),
        random_embeddings(seed + 1, batch, teacher_width),
    )
    value = relational_distillation_loss(student, teacher)
    close(
        relational_distillation_loss(student @ rotation(seed, student_width), teacher),
        value,
        1e-12,
        32,
    )
    close(
        relational_distillation_loss(student, teacher @ rotation(seed, teacher_width)),
        value,
        1e-12,
        32,
    )


@property_test
@given(seeds, batches, classes, st.sampled_from(KINDS))
def test_no_loss_sees_the_order_of_the_batch(seed, batch, classes, case):
    kind, margin = case
    (student, labels), (teacher, _) = (
        random_cosines(seed, batch, classes),
        random_cosines(seed + 1, batch, classes),
    )
    order = torch.tensor(np.random.default_rng(seed).permutation(batch))
    options = {"kind": kind, "margin": margin}
    close(
        classification_loss(student[order], labels[order], **options),
        classification_loss(student, labels, **options),
        1e-12,
        16,
    )
    close(
        logit_distillation_loss(student[order], teacher[order]),
        logit_distillation_loss(student, teacher),
        1e-12,
        10,
    )
    close(
        relational_distillation_loss(student[order], teacher[order]),
        relational_distillation_loss(student, teacher),
        1e-12,
        32,
    )


@property_test
@given(
    seeds,
    batches,
    classes,
    dtypes,
    st.sampled_from(TEMPERATURES),
    st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
)
def test_logit_distillation_is_not_negative(seed, batch, classes, dtype, temperatures, distance):
    """Near agreement most of all: there rounding is larger than the value."""
    (teacher, _), (other, _) = (
        random_cosines(seed, batch, classes, dtype),
        random_cosines(seed + 1, batch, classes, dtype),
    )
    of_student, of_teacher = temperatures
    student = teacher * of_student / of_teacher + distance * other
    value = logit_distillation_loss(
        student, teacher, student_temperature=of_student, teacher_temperature=of_teacher
    )
    assert value >= -DTYPES[dtype] / min(temperatures), value.item()


@property_test
@given(seeds, batches, widths, widths, dtypes, st.sampled_from([1.0, 32.0]), st.booleans())
def test_relational_range(seed, batch, student_width, teacher_width, dtype, scale, signs):
    """In [0, 4 x scale], and in fact below 2 x scale: the mean over all pairs of a product of two similarity matrices is >= 0."""
    student, teacher = (
        random_embeddings(seed + i, batch, w, dtype)
        for i, w in enumerate((student_width, teacher_width))
    )
    if signs:  # cosines of 1 and -1 alone: the far end
        student, teacher = torch.ones_like(student), teacher[:, :1]
    value = relational_distillation_loss(student, teacher, scale=scale).item()
    assert 0 <= value <= 2 * scale * (1 + DTYPES[dtype]), value


@property_test
@given(seeds, batches, classes, st.sampled_from([0.1, 0.35, 0.5]), st.sampled_from([16.0, 64.0]))
def test_classification_kinds_against_normface(seed, batch, classes, margin, scale):
    rng = np.random.default_rng(seed)
    angles = torch.tensor(
        rng.uniform(0.1, math.pi - 0.1, (batch, classes))
    )  # (B, C): cos(angle), no arccos needed
    labels = torch.tensor(rng.integers(0, classes, batch))
    true, cosines = F.one_hot(labels, classes).double(), angles.cos()
    plain = {"scale": scale, "kind": "normface"}
    value, gradient = with_gradient(lambda x: classification_loss(x, labels, **plain), cosines)
    close(value, F.cross_entropy(scale * cosines, labels), 1e-12, scale)
    softmax = np.exp(log_softmax(scale * cosines.numpy()))
    np.testing.assert_allclose(
        gradient, scale * (softmax - true.numpy()) / batch, rtol=0, atol=1e-12 * scale
    )

    cosface = classification_loss(cosines, labels, scale=scale, kind="cosface", margin=margin)
    close(cosface, classification_loss(cosines - margin * true, labels, **plain), 1e-12, scale)
    arcface = classification_loss(cosines, labels, scale=scale, kind="arcface", margin=margin)
    close(
        arcface, classification_loss((angles + margin * true).cos(), labels, **plain), 1e-12, scale
    )
    for kind in ("cosface", "arcface"):
        no_margin = with_gradient(
            lambda x: classification_loss(x, labels, scale=scale, kind=kind, margin=0.0), cosines
        )
        close(no_margin[0], value, 1e-12, scale)
        np.testing.assert_allclose(no_margin[1], gradient, rtol=0, atol=1e-12 * scale, err_msg=kind)


@property_test
@given(
    seeds,
    batches,
    st.integers(2, 12),
    st.sampled_from(["cosface", "arcface"]),
    st.sampled_from([0.05, 0.2, 0.5]),
)
def test_margin_raises_the_loss(seed, batch, classes, kind, margin):
    # angles up to pi - margin: beyond, angle + margin passes pi and the cosine turns back up
    angles = torch.tensor(
        np.random.default_rng(seed).uniform(0.3, math.pi - margin - 0.1, (batch, classes))
    )
    labels = torch.arange(batch) % classes
    without, with_margin = (
        classification_loss(angles.cos(), labels, kind=kind, margin=m).item() for m in (0.0, margin)
    )
    assert with_margin > without, f"{kind}: {with_margin} with margin {margin}, {without} without"


# Derivatives, and who receives them -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)  # each example evaluates the loss 2 x B x C times
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(KINDS),
    st.sampled_from(TEMPERATURES),
)
def test_gradients_equal_finite_differences(seed, batch, width, case, temperatures):
    kind, margin = case
    (student, labels), (teacher, _) = (
        random_cosines(seed, batch, width),
        random_cosines(seed + 1, batch, width),
    )
    student = (0.95 * student).requires_grad_()  # away from +-1, where arcface has no derivative
    of_student, of_teacher = temperatures
    assert torch.autograd.gradcheck(
        lambda x: classification_loss(x, labels, kind=kind, margin=margin), student
    )
    assert torch.autograd.gradcheck(
        lambda x: logit_distillation_loss(
            x, teacher, student_temperature=of_student, teacher_temperature=of_teacher
        ),
        student,
    )
    student = F.normalize(random_embeddings(seed, batch, width), dim=1).mul(0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relational_distillation_loss(x, teacher), student)


@property_test
@given(seeds, batches, classes, dtypes)
def test_the_teacher_never_receives_a_gradient(seed, batch, classes, dtype):
    (student, _), (teacher, _) = (
        random_cosines(seed, batch, classes, dtype),
        random_cosines(seed + 1, batch, classes, dtype),
    )
    for loss in (logit_distillation_loss, relational_distillation_loss):
        student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None and student.grad is not None, loss.__name__
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss(student.detach(), teacher).backward()


@pytest.mark.parametrize("loss", [logit_distillation_loss, relational_distillation_loss])
def test_distillation_moves_the_student_to_the_teacher(loss):
    (student, _), (teacher, _) = random_cosines(0, 8, 6), random_cosines(1, 8, 6)
    value, gradient = with_gradient(lambda x: loss(x, teacher), student)
    closer = loss(student - 1e-3 * gradient, teacher)
    assert gradient.norm() > 1e-2 and closer < value, (gradient.norm(), closer, value)


# Edges ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
@pytest.mark.parametrize("kind, margin", KINDS)
def test_extreme_cosines_are_finite(kind, margin, dtype):
    """Each row has one extreme at its true class and one at the others; 1e-6 is the error of a half-precision product."""
    values = [*extremes(dtype), -1 - 1e-6, 1 + 1e-6]
    pairs = torch.cartesian_prod(*2 * [torch.tensor(values, dtype=dtype)])  # (81, 2)
    cosines = pairs[:, [0, 1, 1]]
    with_gradient(
        lambda x: classification_loss(
            x, torch.zeros(len(x), dtype=torch.long), kind=kind, margin=margin
        ),
        cosines,
    )
    with_gradient(lambda x: logit_distillation_loss(x, cosines.flip(0)), cosines)


@property_test
@given(seeds, batches, classes, st.sampled_from([*DTYPES, *HALVES]), st.sampled_from(KINDS))
def test_extreme_cosines_among_others_are_finite(seed, batch, classes, dtype, case):
    kind, margin = case
    cosines, labels = random_cosines(seed, batch, classes, dtype, share=0.5)
    teacher, _ = random_cosines(seed + 1, batch, classes, dtype, share=0.5)
    with_gradient(lambda x: classification_loss(x, labels, kind=kind, margin=margin), cosines)
    with_gradient(lambda x: logit_distillation_loss(x, teacher), cosines)


@property_test
@given(seeds, batches, st.sampled_from(KINDS), dtypes)
def test_one_class_has_nothing_to_learn(seed, batch, case, dtype):
    kind, margin = case
    (cosines, labels), (teacher, _) = (
        random_cosines(seed, batch, 1, dtype, 0.3),
        random_cosines(seed + 1, batch, 1, dtype, 0.3),
    )
    for loss in (
        lambda x: classification_loss(x, labels, kind=kind, margin=margin),
        lambda x: logit_distillation_loss(x, teacher),
    ):
        value, gradient = with_gradient(loss, cosines)
        assert value == 0 and not gradient.any(), (value, gradient)


@property_test
@given(seeds, widths, widths, dtypes)
def test_one_image_has_no_relations(seed, student_width, teacher_width, dtype):
    student, teacher = (
        random_embeddings(seed, 1, student_width, dtype),
        random_embeddings(seed + 1, 1, teacher_width, dtype),
    )
    value, gradient = with_gradient(
        lambda x: relational_distillation_loss(F.normalize(x, dim=1), teacher), student
    )
    assert value <= 32 * DTYPES[dtype] ** 2, f"{value}: the one pair is an image with itself"
    assert (gradient.norm() * student.norm()) <= 128 * DTYPES[dtype], gradient


# Precision ------------------------------------------------------------------------------------------------------------------


def evaluations(batch, classes, seed, dtype):
    """Name, loss as a function of the student, student: every loss and kind on inputs of one dtype."""
    student, labels = random_cosines(seed, batch, classes, dtype, share=0.1)
    teacher, _ = random_cosines(seed + 1, batch, classes, dtype, share=0.1)
    for kind, margin in KINDS:
        yield (
            kind,
            lambda x, d, k=kind, m=margin: classification_loss(x, labels, kind=k, margin=m),
            student,
        )
    yield "logit", lambda x, d: logit_distillation_loss(x, teacher.to(d)), student
    embeddings = (
        random_embeddings(seed, batch, 7).clamp(-100, 100).to(dtype),
        random_embeddings(seed + 1, batch, 9).to(dtype),
    )
    yield (
        "relational",
        lambda x, d: relational_distillation_loss(x, embeddings[1].to(d)),
        embeddings[0],
    )


@property_test
@given(seeds, batches, classes, st.sampled_from(HALVES))
def test_half_precision_is_computed_in_float32(seed, batch, classes, dtype):
    for name, loss, student in evaluations(batch, classes, seed, dtype):
        value, gradient = with_gradient(lambda x: loss(x, dtype), student)
        upcast, upcast_gradient = with_gradient(lambda x: loss(x, torch.float32), student.float())
        assert value.dtype == torch.float32 and torch.equal(value, upcast), (
            f"{name}: {value} in {dtype}, {upcast} upcast"
        )
        assert gradient.dtype == dtype and torch.equal(gradient, upcast_gradient.to(dtype)), name


@property_test
@given(seeds, batches, classes, st.sampled_from([*DTYPES, *HALVES]))
def test_autocast_changes_nothing(seed, batch, classes, dtype):
    for name, loss, student in evaluations(batch, classes, seed, dtype):
        value, gradient = with_gradient(lambda x: loss(x, dtype), student)
        assert value.dtype == (torch.float32 if dtype in HALVES else dtype), (
            f"{name}: {value.dtype} of {dtype}"
        )

        def under_autocast(x):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(x, dtype)

        cast, cast_gradient = with_gradient(under_autocast, student)
        assert cast.dtype == value.dtype and torch.equal(cast, value), (
            f"{name}: {cast} under autocast, {value} without"
        )
        assert torch.equal(cast_gradient, gradient), name


@pytest.mark.parametrize("dtype", HALVES)
def test_one_half_and_one_float32_input(dtype):
    """As under autocast, where the student can come out of a matrix product and the teacher out of a norm."""
    (student, _), (teacher, _) = (
        random_cosines(0, 8, 6, dtype),
        random_cosines(1, 8, 6, torch.float32),
    )
    for loss in (logit_distillation_loss, relational_distillation_loss):
        assert torch.equal(loss(student, teacher), loss(student.float(), teacher))
        assert torch.equal(loss(teacher, student), loss(teacher, student.float()))


# What a user can get wrong, and copying the file out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "sphereface"}, ["'sphereface'", "use", "'normface'", "'cosface'", "'arcface'"]),
        ({"kind": "sphereface", "margin": 0.2}, ["'sphereface'", "use"]),
        ({"kind": ""}, ["''", "use"]),
        (
            {"kind": "normface", "margin": 0.35},
            ["0.35", "normface", "leave it 0", "'cosface'", "'arcface'"],
        ),
        ({"margin": -0.1}, ["-0.1", "normface", "leave it 0"]),
    ],
)
def test_bad_options_are_named_with_the_remedy(options, words):
    cosines, labels = random_cosines(0, 4, 3)
    with pytest.raises(ValueError) as error:
        classification_loss(cosines, labels, **options)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing and "\n" not in str(error.value), f"{missing} not in: {error.value}"


def test_the_file_works_alone_with_torch_only(tmp_path):
    source = Path(losses.__file__)
    shutil.copy(source, tmp_path)
    nodes = list(ast.walk(ast.parse(source.read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages == {"torch"}, f"losses.py imports {packages}"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import losses, torch\n"
        "assert losses.__file__.startswith(sys.argv[1]), losses.__file__\n"
        "print(losses.classification_loss(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)).item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(math.log(8)), (
        "cross-entropy of eight equal cosines"
    )
