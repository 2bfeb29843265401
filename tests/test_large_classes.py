"""large_classes.py: values and gradients of the plain formulas, for chunks of any size; float32,
half precision and autocast; memory; invalid input."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import large_classes
from large_classes import large_class_losses
from losses import classification_loss, logit_distillation_loss

ROOT = Path(__file__).parents[1]
KINDS = [("normface", 0.0), ("cosface", 0.35), ("arcface", 0.5)]  # kind, margin
TERMS = [(True, False), (False, True), (True, True)]  # classification, distillation
DEFAULTS = dict(scale=16, temperature=0.1, domain_margin=0.2)


def cosines_of(x, weight):
    return x @ F.normalize(weight, dim=1).T


def unit_rows(count, width, generator=None, dtype=torch.float32):
    return F.normalize(torch.randn(count, width, generator=generator, dtype=dtype), dim=1)


def plain_losses(
    embeddings, weights, labels, distilled, targets, target_weight, **options
):  # the arguments of large_class_losses
    """The same from matrices of cosines."""
    temperature, domain_margin = options.pop("temperature"), options.pop("domain_margin")
    classification = distillation = None
    if labels is not None:
        own, *others = (cosines_of(embeddings, weight) for weight in weights)
        cosines = torch.cat([own, *(other + domain_margin for other in others)], dim=1)
        classification = classification_loss(cosines, labels, **options)
    if targets is not None:
        student = cosines_of(distilled, weights[0])
        teacher = cosines_of(targets, target_weight)
        both = dict(student_temperature=temperature, teacher_temperature=temperature)
        distillation = logit_distillation_loss(student, teacher, **both)
    return classification, distillation


def random_inputs(seed, batch, classes, widths, terms=(True, True), dtype=torch.float64):
    """The first six arguments: `classes` of the domain and of others, widths S and T; whether there
    are labels, and targets. The norms of the weights range from 0.01 to 100."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count, width, exponents=0.0):
        norms = 10 ** (exponents * (2 * torch.rand(count, 1, generator=generator) - 1))
        x = norms * unit_rows(count, width, generator, torch.float64)
        return x.to(dtype).requires_grad_()

    embeddings = rows(batch, widths[0])
    weights = [rows(count, widths[0], 2) for count in classes]
    labels = torch.randint(0, classes[0], (batch,), generator=generator)
    targets = rows(batch, widths[1]), rows(classes[0], widths[1], 2)
    distilled = embeddings.detach().clone().requires_grad_()
    targets = targets if terms[1] else (None, None)
    return embeddings, weights, labels if terms[0] else None, distilled, *targets


def converted(inputs, convert):
    """The inputs with all tensors of floating point converted."""
    embeddings, weights, labels, *others = inputs
    others = [None if x is None else convert(x) for x in others]
    return convert(embeddings), [convert(weight) for weight in weights], labels, *others


def values_and_gradients(function, inputs, **options):
    """[losses], [gradients of each loss, and of their sum, to each tensor]"""
    embeddings, weights, _, *others = inputs
    tensors = [embeddings, *weights, *(x for x in others if x is not None)]
    losses = [loss for loss in function(*inputs, **options) if loss is not None]
    gradients = [
        torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True)
        for loss in (*losses, sum(losses))
    ]
    return losses, [gradient for row in gradients for gradient in row]


def chunks(count, inputs):
    """A context in which chunks are of `count` classes."""
    embeddings, weights, _, _, _, target_weight = inputs
    width = max(weights[0].shape[1], 0 if target_weight is None else target_weight.shape[1])
    size = 8 if embeddings.dtype == torch.float64 else 4
    size *= 5 * len(embeddings) + 2 * width
    return mock.patch.object(large_classes, "BYTES", count * size)


def test_chunks_are_of_the_given_size():
    inputs = random_inputs(0, 3, (11,), (2, 5))
    with chunks(4, inputs):
        parts = list(large_classes._parts(inputs[0], inputs[1][0], inputs[5]))
    assert parts == [slice(0, 4), slice(4, 8), slice(8, 11)]


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 7),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.tuples(st.integers(3, 6), st.integers(1, 6)),  # arcface is ill-conditioned at width 1
    st.sampled_from(TERMS),
    st.sampled_from(KINDS),
    st.tuples(st.floats(1, 64), st.floats(0.05, 1), st.floats(-0.2, 0.4)),
    st.integers(1, 21),
)
def test_values_and_gradients_equal_the_plain_formulas(
    seed, batch, classes, widths, terms, kind, numbers, chunk
):
    inputs = random_inputs(seed, batch, classes, widths, terms)
    options = dict(zip(DEFAULTS, numbers)) | dict(zip(("kind", "margin"), kind))
    with chunks(chunk, inputs):
        losses, gradients = values_and_gradients(large_class_losses, inputs, **options)
    expected_losses, expected_gradients = values_and_gradients(plain_losses, inputs, **options)
    for loss, expected in zip(losses, expected_losses, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        error, most = (gradient - expected).abs().max(), expected.abs().max()
        assert error <= 1e-10 * most + 1e-12, f"off by {error}, of {most}"


@pytest.mark.parametrize("kind, margin", KINDS)
def test_float32_is_as_accurate_as_the_plain_formulas(kind, margin):
    """Against float64, with 5,000 classes in 5 chunks."""
    options = DEFAULTS | dict(kind=kind, margin=margin)
    exact = random_inputs(0, 16, (5000, 500), (64, 128))
    inputs = converted(exact, lambda x: x.detach().float().requires_grad_())
    reference = sum(values_and_gradients(plain_losses, exact, **options), [])

    def errors(function):
        found = sum(values_and_gradients(function, inputs, **options), [])
        return [float((a - b).detach().abs().max()) for a, b in zip(found, reference, strict=True)]

    with chunks(1000, inputs):
        chunked = errors(large_class_losses)
    for error, plain, exact in zip(chunked, errors(plain_losses), reference, strict=True):
        assert error <= 2 * plain + 1e-6 * exact.abs().max(), f"{error}, plain formulas {plain}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype):
    inputs = random_inputs(1, 6, (50, 20), (8, 12), dtype=dtype)
    with chunks(7, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            losses = large_class_losses(*inputs, **DEFAULTS)
        found = values_and_gradients(lambda *_: losses, inputs)

    def as_float32(*inputs, **options):
        return plain_losses(*converted(inputs, torch.Tensor.float), **options)

    expected = values_and_gradients(as_float32, inputs, **DEFAULTS)
    for value, other in zip(sum(found, []), sum(expected, []), strict=True):
        assert value.dtype == other.dtype
        tolerance = 32 * torch.finfo(other.dtype).eps
        assert (value - other).detach().abs().max() <= tolerance * other.abs().max()


# ---- memory --------------------------------------------------------------------------------------

EXCESS = """
import re, sys, torch
from large_classes import large_class_losses
from test_large_classes import plain_losses, unit_rows

def resident(name):  # VmRSS: now, VmHWM: at most
    return 1024 * int(re.search(name + ":(.*) kB", open("/proc/self/status").read())[1])

def excess(function, batch, classes):  # of a step of a teacher and a student
    teacher, student = (unit_rows(batch, width).requires_grad_() for width in (256, 64))
    distilled = student.detach().clone().requires_grad_()
    weights = [torch.empty(classes, width).uniform_(-1, 1).requires_grad_() for width in (256, 64)]
    labels, options = torch.arange(batch), dict(temperature=0.1, domain_margin=0.0)
    before = resident("VmRSS")
    losses = [
        *function(teacher, weights[:1], labels, None, None, None, **options),
        *function(student, weights[1:], labels, distilled, teacher, weights[0], **options),
    ]
    sum(loss for loss in losses if loss is not None).backward()
    gradients = sum(x.grad.nbytes for x in (teacher, student, distilled, *weights))
    return resident("VmHWM") - before - gradients

torch.set_num_threads(1)
excess(plain_losses, 8, 500)  # loads what the first step needs
for name in sys.argv[3:]:
    print(excess(globals()[name], *map(int, sys.argv[1:3])))
"""


def excess(batch, classes, *functions):
    """The most bytes that a step needs beyond its gradients, in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from /proc, which this system does not have")
    command = [sys.executable, "-c", EXCESS, str(batch), str(classes), *functions]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "MALLOC_TRIM_THRESHOLD_": str(2**20),  # freed tensors are returned to the system
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_memory_stays_below_the_stated_bytes_for_met():
    """At the published batch size: a matrix of cosines has 115 MB."""
    (found,) = excess(128, 224_408, "large_class_losses")
    assert found <= large_classes.BYTES, f"{found / 2**20:.1f} MB"


def test_memory_stays_below_the_stated_bytes_for_large_batches():
    """The plain formulas, with several matrices of 25 MB, show that the measure can fail."""
    found, plain = excess(1024, 6000, "large_class_losses", "plain_losses")
    assert found <= large_classes.BYTES, f"{found / 2**20:.1f} MB"
    assert plain > 4 * 4 * 1024 * 6000


# ---- invalid input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, classes, words",
    [
        (torch.tensor([0, 5, 1]), 5, "labels range from 0 to 5: with 5 classes"),
        (torch.tensor([0, -1, 1]), 5, "labels range from -1 to 1"),
        (torch.zeros(3), 5, "labels are torch.float32"),
        (torch.tensor([0, 1]), 5, "labels have shape (2,)"),
        (torch.tensor([0, 1, 2]), 6, "teacher cosines (3, 6)"),
    ],
)
def test_invalid_input_is_named_as_in_losses(labels, classes, words):
    embeddings, weights = torch.zeros(3, 2), [torch.ones(5, 2)]
    targets = embeddings, torch.ones(classes, 2)
    with pytest.raises(ValueError, match=re.escape(words)):
        large_class_losses(embeddings, weights, labels, embeddings, *targets)


def test_invalid_margins_are_named():
    inputs = random_inputs(0, 3, (5,), (3, 3))
    with pytest.raises(ValueError, match="normface has no margin"):
        large_class_losses(*inputs, margin=0.1)
    with pytest.raises(ValueError, match="'sphereface' is unknown"):
        large_class_losses(*inputs, kind="sphereface")
