"""losses.py: agreement with float64 NumPy, zero at agreement, symmetries, ranges, gradients,
cosines at -1 and 1, half precision, invalid input."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

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
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative to the terms that are added
HALVES = [torch.float16, torch.bfloat16]

property_test = settings(max_examples=EXAMPLES)
seeds = st.integers(0, 2**32 - 1)
batches, classes, widths = st.integers(1, 9), st.integers(1, 12), st.integers(1, 10)
dtypes = st.sampled_from(list(TOLERANCE))


# ---- reference formulas in NumPy float64, random inputs ------------------------------------------


def float64(tensor):
    return tensor.detach().double().numpy()


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
    student = log_softmax(float64(student) / student_temperature)
    teacher = log_softmax(float64(teacher) / teacher_temperature)
    return (np.exp(teacher) * (teacher - student)).sum(axis=1).mean()


def exact_relational(student, teacher, scale):
    student = [row / math.sqrt((row**2).sum()) for row in float64(student)]
    teacher = [row / math.sqrt((row**2).sum()) for row in float64(teacher)]
    squares = [
        (np.dot(student[i], student[j]) - np.dot(teacher[i], teacher[j])) ** 2
        for i in range(len(student))
        for j in range(len(student))
    ]
    return scale * sum(squares) / len(squares)


def extremes(dtype):
    """-1, 0, 1, and the numbers of this dtype just inside and outside [-1, 1]."""
    eps = torch.finfo(dtype).eps
    return [-1 - eps, -1.0, -1 + eps / 2, 0.0, 1 - eps / 2, 1.0, 1 + eps]


def random_cosines(seed, batch, classes, dtype=torch.float64, extreme_share=0.0):
    """Cosines (B, C) and labels (B,). A share of the cosines is extreme, as many nearly so."""
    rng = np.random.default_rng(seed)
    cosines, lot = rng.uniform(-1, 1, (batch, classes)), rng.random((batch, classes))
    near = np.sign(cosines) * (1 - 10 ** rng.uniform(-7, -1, cosines.shape))
    cosines = np.where(lot > 1 - extreme_share, near, cosines)
    cosines = np.where(lot < extreme_share, rng.choice(extremes(dtype), cosines.shape), cosines)
    return torch.tensor(cosines, dtype=dtype), torch.tensor(rng.integers(0, classes, batch))


def random_pair(seed, batch, classes, dtype=torch.float64, extreme_share=0.0):
    """Student cosines (B, C), teacher cosines (B, C), labels (B,)."""
    student, labels = random_cosines(seed, batch, classes, dtype, extreme_share)
    teacher, _ = random_cosines(seed + 1, batch, classes, dtype, extreme_share)
    return student, teacher, labels


def random_embeddings(seed, batch, width, dtype=torch.float64):
    """(B, width) with row norms from 1e-3 to 1e3."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(batch, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.tensor(rows * 10 ** rng.uniform(-3, 3, (batch, 1)), dtype=dtype)


def embedding_pair(seed, batch, student_width, teacher_width, dtype=torch.float64):
    student = random_embeddings(seed, batch, student_width, dtype)
    return student, random_embeddings(seed + 1, batch, teacher_width, dtype)


def rotation(seed, width):
    return torch.tensor(np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0])


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert value.shape == () and value.isfinite(), f"{value} at {x}"
    assert x.grad.isfinite().all(), f"gradient {x.grad} at {x}"
    return value.detach(), x.grad


def assert_close(value, expected, tolerance, terms):
    """`tolerance` is relative to the value or to the `terms` whose difference the value is."""
    value, expected = float(value), float(expected)
    error, allowed = abs(value - expected), tolerance * max(abs(expected), terms)
    assert error <= allowed, f"{value!r}, not {expected!r}: off by {error:.2e}, not {allowed:.2e}"


# ---- agreement with the formulas -----------------------------------------------------------------


@property_test
@given(
    seeds, batches, classes, dtypes, st.sampled_from(CLASSIFICATION), st.sampled_from([0.0, 0.3])
)
def test_classification_equals_numpy(seed, batch, classes, dtype, case, extreme_share):
    kind, margin, scale = case
    cosines, labels = random_cosines(seed, batch, classes, dtype, extreme_share)
    original = cosines.clone()
    value = classification_loss(cosines, labels, scale=scale, margin=margin, kind=kind)
    expected = exact_classification(cosines, labels, scale, margin, kind)
    assert_close(value, expected, TOLERANCE[dtype], scale)
    assert value.dtype == dtype
    assert torch.equal(cosines, original), "the input was modified"


@pytest.mark.parametrize("kind, margin, scale", CLASSIFICATION)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_classification_near_the_ends_equals_numpy(kind, margin, scale, dtype):
    """An epsilon that clamps the cosine to keep arccos differentiable shows near -1 and 1."""
    options = {"scale": scale, "margin": margin, "kind": kind}

    def check(cosines, labels, terms):
        value = classification_loss(cosines, labels, **options)
        expected = exact_classification(cosines, labels, **options)
        assert_close(value, expected, TOLERANCE[dtype], terms)

    check(*random_cosines(1, 32, 20, dtype), terms=0)
    for gap, sign in itertools.product([0, *10 ** np.linspace(-16, -1, 31)], [1, -1]):
        cosines = torch.tensor([[sign * (1 - gap), 0.9, -0.2]], dtype=dtype)
        check(cosines, torch.tensor([0]), terms=scale)


@property_test
@given(seeds, batches, classes, dtypes, st.sampled_from(TEMPERATURES))
def test_logit_distillation_equals_numpy_and_torch(seed, batch, classes, dtype, temperatures):
    student, teacher, _ = random_pair(seed, batch, classes, dtype)
    student_temperature, teacher_temperature = temperatures
    value = logit_distillation_loss(
        student,
        teacher,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    expected = exact_logit_distillation(student, teacher, *temperatures)
    assert_close(value, expected, TOLERANCE[dtype], 1 / min(temperatures))
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher.double() / teacher_temperature),
        torch.distributions.Categorical(logits=student.double() / student_temperature),
    )
    assert_close(value, divergence.mean(), TOLERANCE[dtype], 1 / min(temperatures))
    assert value.dtype == dtype


@property_test
@given(seeds, batches, widths, widths, dtypes, st.sampled_from([1.0, 32.0, 1000.0]))
def test_relational_equals_numpy(seed, batch, student_width, teacher_width, dtype, scale):
    student, teacher = embedding_pair(seed, batch, student_width, teacher_width, dtype)
    value = relational_distillation_loss(student, teacher, scale=scale)
    assert_close(value, exact_relational(student, teacher, scale), TOLERANCE[dtype], scale)
    assert value.dtype == dtype


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_defaults_are_the_official_setting(dtype):
    student, teacher, labels = random_pair(2, 32, 20, dtype)
    expected = exact_classification(student, labels, 16, 0, "normface")
    assert_close(classification_loss(student, labels), expected, TOLERANCE[dtype], 0)
    expected = exact_logit_distillation(student, teacher, 0.1, 0.1)
    assert_close(logit_distillation_loss(student, teacher), expected, TOLERANCE[dtype], 0)
    student, teacher = embedding_pair(4, 32, 8, 16, dtype)
    expected = exact_relational(student, teacher, 32)
    assert_close(relational_distillation_loss(student, teacher), expected, TOLERANCE[dtype], 0)


def test_relational_at_known_angles():
    axes, equal, opposite = torch.eye(2), torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    # two of the four pairs differ by 1, then by 2, the largest possible difference
    assert relational_distillation_loss(axes, 3 * equal) == 32 * 2 * 1 / 4
    assert relational_distillation_loss(5 * equal, opposite) == 32 * 2 * 4 / 4


# ---- zero at agreement ---------------------------------------------------------------------------


@property_test
@given(seeds, batches, classes, dtypes, st.sampled_from([0.05, 0.1, 1.0]))
def test_logit_distillation_is_zero_at_agreement(seed, batch, classes, dtype, temperature):
    teacher, _ = random_cosines(seed, batch, classes, dtype)
    temperatures = {"student_temperature": temperature, "teacher_temperature": temperature}

    def loss(student):
        return logit_distillation_loss(student, teacher, **temperatures)

    value, gradient = value_and_gradient(loss, teacher)
    assert abs(value) <= TOLERANCE[dtype], value
    assert gradient.abs().max() <= TOLERANCE[dtype] / temperature, gradient
    # softmax is invariant to a constant added to a row, up to the rounding of the shifted logits
    shift = torch.linspace(-0.5, 0.5, batch, dtype=dtype)[:, None]
    value, gradient = value_and_gradient(loss, teacher + shift)
    assert abs(value) <= TOLERANCE[dtype] / temperature, value
    assert gradient.abs().max() <= TOLERANCE[dtype] / temperature**2, gradient


@property_test
@given(seeds, batches, widths, st.integers(0, 5), dtypes)
def test_relational_is_zero_at_agreement(seed, batch, width, added_width, dtype):
    """The embeddings agree up to a rotation into a wider space and the norm of each row."""
    student = F.normalize(random_embeddings(seed, batch, width), dim=1)
    norms = torch.logspace(-2, 2, batch, dtype=torch.float64)[:, None]
    teacher = norms * F.pad(student, (0, added_width)) @ rotation(seed, width + added_width)
    value, gradient = value_and_gradient(
        lambda x: relational_distillation_loss(x, teacher.to(dtype)), student.to(dtype)
    )
    assert 0 <= value <= 32 * TOLERANCE[dtype] ** 2, value
    rounding = 32 * 2 * 2 * TOLERANCE[dtype]  # scale x square x two factors x one cosine's rounding
    assert gradient.abs().max() <= rounding, gradient


# ---- symmetries, ranges, relations between the kinds ---------------------------------------------


@property_test
@given(seeds, batches, widths, widths)
def test_relational_is_invariant_to_rotations(seed, batch, student_width, teacher_width):
    student, teacher = embedding_pair(seed, batch, student_width, teacher_width)
    value = relational_distillation_loss(student, teacher)
    rotated = relational_distillation_loss(student @ rotation(seed, student_width), teacher)
    assert_close(rotated, value, 1e-12, 32)
    rotated = relational_distillation_loss(student, teacher @ rotation(seed, teacher_width))
    assert_close(rotated, value, 1e-12, 32)


@property_test
@given(seeds, batches, classes, st.sampled_from(KINDS))
def test_losses_are_invariant_to_the_order_of_the_batch(seed, batch, classes, case):
    kind, margin = case
    student, teacher, labels = random_pair(seed, batch, classes)
    order = torch.tensor(np.random.default_rng(seed).permutation(batch))
    options = {"kind": kind, "margin": margin}
    permuted = classification_loss(student[order], labels[order], **options)
    assert_close(permuted, classification_loss(student, labels, **options), 1e-12, 16)
    permuted = logit_distillation_loss(student[order], teacher[order])
    assert_close(permuted, logit_distillation_loss(student, teacher), 1e-12, 10)
    permuted = relational_distillation_loss(student[order], teacher[order])
    assert_close(permuted, relational_distillation_loss(student, teacher), 1e-12, 32)


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
    """Especially near agreement, where rounding exceeds the value."""
    teacher, other, _ = random_pair(seed, batch, classes, dtype)
    student_temperature, teacher_temperature = temperatures
    student = teacher * student_temperature / teacher_temperature + distance * other
    value = logit_distillation_loss(
        student,
        teacher,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    assert value >= -TOLERANCE[dtype] / min(temperatures), value.item()


@property_test
@given(seeds, batches, widths, widths, dtypes, st.sampled_from([1.0, 32.0]), st.booleans())
def test_relational_range(seed, batch, student_width, teacher_width, dtype, scale, collapsed):
    """Below 2 x scale: the product of two similarity matrices has a mean of at least 0."""
    student, teacher = embedding_pair(seed, batch, student_width, teacher_width, dtype)
    if collapsed:  # all student cosines 1, teacher cosines -1 or 1: reaches the upper end
        student, teacher = torch.ones_like(student), teacher[:, :1]
    value = relational_distillation_loss(student, teacher, scale=scale).item()
    assert 0 <= value <= 2 * scale * (1 + TOLERANCE[dtype]), value


@property_test
@given(seeds, batches, classes, st.sampled_from([0.1, 0.35, 0.5]), st.sampled_from([16.0, 64.0]))
def test_kinds_are_normface_of_shifted_cosines(seed, batch, classes, margin, scale):
    rng = np.random.default_rng(seed)
    angles = torch.tensor(rng.uniform(0.1, math.pi - 0.1, (batch, classes)))  # (B, C)
    labels = torch.tensor(rng.integers(0, classes, batch))
    true, cosines = F.one_hot(labels, classes).double(), angles.cos()

    def loss(cosines, kind="normface", margin=0.0):
        return classification_loss(cosines, labels, scale=scale, kind=kind, margin=margin)

    value, gradient = value_and_gradient(loss, cosines)
    assert_close(value, F.cross_entropy(scale * cosines, labels), 1e-12, scale)
    softmax = np.exp(log_softmax(scale * cosines.numpy()))
    expected = scale * (softmax - true.numpy()) / batch
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12 * scale)

    cosface, arcface = loss(cosines, "cosface", margin), loss(cosines, "arcface", margin)
    assert_close(cosface, loss(cosines - margin * true), 1e-12, scale)
    assert_close(arcface, loss((angles + margin * true).cos()), 1e-12, scale)
    for kind in ("cosface", "arcface"):
        other_value, other = value_and_gradient(partial(loss, kind=kind), cosines)
        assert_close(other_value, value, 1e-12, scale)
        np.testing.assert_allclose(other, gradient, rtol=0, atol=1e-12 * scale, err_msg=kind)


@property_test
@given(
    seeds,
    batches,
    st.integers(2, 12),
    st.sampled_from(["cosface", "arcface"]),
    st.sampled_from([0.05, 0.2, 0.5]),
)
def test_a_margin_raises_the_loss(seed, batch, classes, kind, margin):
    # arcface's cosine rises again where angle + margin exceeds pi
    rng = np.random.default_rng(seed)
    angles = torch.tensor(rng.uniform(0.3, math.pi - margin - 0.1, (batch, classes)))
    labels = torch.arange(batch) % classes
    without = classification_loss(angles.cos(), labels, kind=kind, margin=0.0).item()
    with_margin = classification_loss(angles.cos(), labels, kind=kind, margin=margin).item()
    assert with_margin > without


# ---- gradients -----------------------------------------------------------------------------------


@settings(max_examples=12)  # each example evaluates the loss 2 x B x C times
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(KINDS),
    st.sampled_from(TEMPERATURES),
)
def test_gradients_equal_finite_differences(seed, batch, width, case, temperatures):
    kind, margin = case
    student, teacher, labels = random_pair(seed, batch, width)
    student = (0.95 * student).requires_grad_()  # arcface has no derivative at -1 and 1

    def classification(x):
        return classification_loss(x, labels, kind=kind, margin=margin)

    def distillation(x):
        return logit_distillation_loss(
            x, teacher, student_temperature=temperatures[0], teacher_temperature=temperatures[1]
        )

    assert torch.autograd.gradcheck(classification, student)
    assert torch.autograd.gradcheck(distillation, student)
    student = F.normalize(random_embeddings(seed, batch, width), dim=1).mul(0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relational_distillation_loss(x, teacher), student)


@property_test
@given(seeds, batches, classes, dtypes)
def test_the_teacher_receives_no_gradient(seed, batch, classes, dtype):
    student, teacher, _ = random_pair(seed, batch, classes, dtype)
    for loss in (logit_distillation_loss, relational_distillation_loss):
        student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None and student.grad is not None, loss.__name__
        assert not loss(student.detach(), teacher).requires_grad, loss.__name__


@pytest.mark.parametrize("loss", [logit_distillation_loss, relational_distillation_loss])
def test_a_gradient_step_moves_the_student_towards_the_teacher(loss):
    student, teacher, _ = random_pair(0, 8, 6)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    assert gradient.norm() > 1e-2
    assert loss(student - 1e-3 * gradient, teacher) < value


# ---- edge cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALVES])
@pytest.mark.parametrize("kind, margin", KINDS)
def test_extreme_cosines_give_finite_losses_and_gradients(kind, margin, dtype):
    """Every pair of extremes as true and other class; 1e-6 is a half-precision product's error."""
    values = torch.tensor([*extremes(dtype), -1 - 1e-6, 1 + 1e-6], dtype=dtype)
    cosines = torch.cartesian_prod(values, values)[:, [0, 1, 1]]  # (81, 3)
    labels = torch.zeros(cosines.shape[0], dtype=torch.long)
    value_and_gradient(lambda x: classification_loss(x, labels, kind=kind, margin=margin), cosines)
    value_and_gradient(lambda x: logit_distillation_loss(x, cosines.flip(0)), cosines)


@property_test
@given(seeds, batches, classes, st.sampled_from([*TOLERANCE, *HALVES]), st.sampled_from(KINDS))
def test_extreme_cosines_among_others_are_finite(seed, batch, classes, dtype, case):
    kind, margin = case
    student, teacher, labels = random_pair(seed, batch, classes, dtype, extreme_share=0.5)
    value_and_gradient(lambda x: classification_loss(x, labels, kind=kind, margin=margin), student)
    value_and_gradient(lambda x: logit_distillation_loss(x, teacher), student)


@property_test
@given(seeds, batches, st.sampled_from(KINDS), dtypes)
def test_one_class_gives_zero_loss_and_gradient(seed, batch, case, dtype):
    kind, margin = case
    student, teacher, labels = random_pair(seed, batch, 1, dtype, extreme_share=0.3)
    for loss in (
        lambda x: classification_loss(x, labels, kind=kind, margin=margin),
        lambda x: logit_distillation_loss(x, teacher),
    ):
        value, gradient = value_and_gradient(loss, student)
        assert value == 0 and not gradient.any(), (value, gradient)


@property_test
@given(seeds, widths, widths, dtypes)
def test_one_image_has_no_relational_loss(seed, student_width, teacher_width, dtype):
    student, teacher = embedding_pair(seed, 1, student_width, teacher_width, dtype)
    value, gradient = value_and_gradient(
        lambda x: relational_distillation_loss(F.normalize(x, dim=1), teacher), student
    )
    assert value <= 32 * TOLERANCE[dtype] ** 2, value
    assert gradient.norm() * student.norm() <= 128 * TOLERANCE[dtype], gradient


# ---- precision -----------------------------------------------------------------------------------


def every_loss(batch, classes, seed, dtype):
    """(name, loss as a function of the student and a dtype for the teacher, student) for each."""
    student, teacher, labels = random_pair(seed, batch, classes, dtype, extreme_share=0.1)

    def classification(kind, margin):
        return lambda x, dtype: classification_loss(x, labels, kind=kind, margin=margin)

    for kind, margin in KINDS:
        yield kind, classification(kind, margin), student
    yield "logit", lambda x, dtype: logit_distillation_loss(x, teacher.to(dtype)), student
    embeddings, teacher_embeddings = embedding_pair(seed, batch, 7, 9)
    teacher_embeddings = teacher_embeddings.to(dtype)
    yield (
        "relational",
        lambda x, dtype: relational_distillation_loss(x, teacher_embeddings.to(dtype)),
        embeddings.clamp(-100, 100).to(dtype),
    )


def under_autocast(loss, x, dtype):
    with torch.autocast("cpu", torch.bfloat16):
        return loss(x, dtype)


@property_test
@given(seeds, batches, classes, st.sampled_from(HALVES))
def test_half_precision_is_computed_in_float32(seed, batch, classes, dtype):
    for name, loss, student in every_loss(batch, classes, seed, dtype):
        value, gradient = value_and_gradient(partial(loss, dtype=dtype), student)
        in_float32 = partial(loss, dtype=torch.float32)
        expected, expected_gradient = value_and_gradient(in_float32, student.float())
        assert value.dtype == torch.float32 and gradient.dtype == dtype, name
        assert torch.equal(value, expected), (name, value, expected)
        assert torch.equal(gradient, expected_gradient.to(dtype)), name


@property_test
@given(seeds, batches, classes, st.sampled_from([*TOLERANCE, *HALVES]))
def test_autocast_changes_nothing(seed, batch, classes, dtype):
    for name, loss, student in every_loss(batch, classes, seed, dtype):
        expected, expected_gradient = value_and_gradient(partial(loss, dtype=dtype), student)
        assert expected.dtype == (torch.float32 if dtype in HALVES else dtype), name
        autocast_loss = partial(under_autocast, loss, dtype=dtype)
        value, gradient = value_and_gradient(autocast_loss, student)
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
        assert torch.equal(gradient, expected_gradient), name


@pytest.mark.parametrize("dtype", HALVES)
def test_half_and_float32_inputs_mix(dtype):
    """As under autocast, where a matrix product returns half precision and a norm float32."""
    student, _ = random_cosines(0, 8, 6, dtype)
    teacher, _ = random_cosines(1, 8, 6, torch.float32)
    for loss in (logit_distillation_loss, relational_distillation_loss):
        assert torch.equal(loss(student, teacher), loss(student.float(), teacher))
        assert torch.equal(loss(teacher, student), loss(teacher, student.float()))


# ---- invalid input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "sphereface"}, ["'sphereface'", "'normface'", "'cosface'", "'arcface'"]),
        ({"kind": "sphereface", "margin": 0.2}, ["'sphereface'"]),
        ({"kind": ""}, ["''"]),
        ({"kind": "normface", "margin": 0.35}, ["0.35", "normface", "'cosface'", "'arcface'"]),
        ({"margin": -0.1}, ["-0.1", "normface"]),
    ],
)
def test_invalid_options_are_named(options, words):
    with pytest.raises(ValueError) as caught:
        classification_loss(*random_cosines(0, 4, 3), **options)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


LABELS = {
    "negative": (torch.tensor([0, 1, 2, -1]), "-1"),
    "ignored by cross-entropy": (torch.tensor([0, 1, 2, -100]), "-100"),
    "too large": (torch.tensor([0, 1, 2, 3]), "3"),
    "unsigned, too large": (torch.tensor([0, 1, 2, 255], dtype=torch.uint8), "255"),
    "fractional": (torch.tensor([0.0, 1.5, 2.0, 0.0]), "torch.float32"),
    "whole floats": (torch.tensor([0.0, 1.0, 2.0, 0.0]), "torch.float32"),
    "half precision": (torch.zeros(4, dtype=torch.bfloat16), "torch.bfloat16"),
    "boolean": (torch.tensor([True, False, True, False]), "torch.bool"),
    "one-hot": (F.one_hot(torch.tensor([0, 1, 2, 0]), 3), "(4, 3)"),
    "a column": (torch.zeros(4, 1, dtype=torch.long), "(4, 1)"),
    "a scalar": (torch.tensor(0), "()"),
    "of another batch size": (torch.zeros(5, dtype=torch.long), "(5,)"),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("kind, margin", KINDS[:3])
def test_invalid_labels_are_named(kind, margin, case):
    labels, word = LABELS[case]
    with pytest.raises(ValueError, match="labels") as caught:
        classification_loss(torch.zeros(4, 3), labels, kind=kind, margin=margin)
    assert word in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(dtype):
    cosines, labels = random_cosines(0, 8, 6)
    for kind, margin in KINDS:
        value = classification_loss(cosines, labels.to(dtype), kind=kind, margin=margin)
        assert torch.equal(value, classification_loss(cosines, labels, kind=kind, margin=margin))


def test_labels_off_the_cpu_are_not_read():
    """Reading a tensor on an accelerator waits for it; a meta tensor cannot be read at all."""
    labels = torch.zeros(4, dtype=torch.long, device="meta")
    assert classification_loss(torch.zeros(4, 3, device="meta"), labels).shape == ()


@pytest.mark.parametrize("loss", [logit_distillation_loss, relational_distillation_loss])
def test_teacher_and_student_of_different_batches_are_rejected(loss):
    with pytest.raises(ValueError, match="same images"):
        loss(torch.zeros(4, 3), torch.zeros(5, 3))
