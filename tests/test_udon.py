"""udon.py: who receives gradient, losses against formulas, training steps, whole runs."""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import data
import distributed
import evaluate
import run as run_module
import rundir
import udon
from benchmarks.faults import same
from config import METHODS, PRESETS, Config
from model import UDON, CosineClassifier, ViT

ROOT = Path(__file__).parents[1]
TINY = dict(image_size=16, patch_size=8, width=24, depth=2, heads=2)
CLASSES = {"birds": 5, "cars": 3}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "antialias": True}
QUICK = "--preset micro --init scratch --frozen-epochs 0 --image-size 32 --batch-size 4 --period 4"
QUICK += " --val-every 5 --workers 0 --device cpu"
TERMS = udon.Losses._fields[1:]
LIMITS = {"plain": udon.MANY_CLASSES, "in chunks": 0}


def tiny_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    return UDON(ViT(**TINY), CLASSES, **{"student_dim": 6, "teacher_dim": 10, **changes}).to(dtype)


def tiny_batch(seed=0, dtype=torch.float64, size=7):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype)
    return images, torch.randint(0, 5, (size,), generator=generator)


def values_of(losses):
    return [None if loss is None else loss.item() for loss in losses]


# The gradient-flow table, cell by cell ------------------------------------------------------------

COLUMNS = {
    "backbone": "backbone.",
    "student head": "student_head.",
    "student classifier": "student_classifiers.birds.",
    "teacher head": "teacher_heads.birds.",
    "teacher classifier": "teacher_classifiers.birds.",
    "other student classifier": "student_classifiers.cars.",
    "other teacher head": "teacher_heads.cars.",
    "other teacher classifier": "teacher_classifiers.cars.",
}
FLOW = {  # by the paper's rule; "(x)": only with distill_into_backbone
    "teacher_classification": ("x", "", "", "x", "x", "", "", ""),
    "student_classification": ("x", "x", "x", "", "", "", "", ""),
    "logit_distillation": ("(x)", "x", "x", "", "", "", "", ""),
    "relational_distillation": ("(x)", "x", "", "", "", "", "", ""),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("into_backbone", [False, True])
@pytest.mark.parametrize("term", FLOW)
@pytest.mark.parametrize("column", COLUMNS)
def test_gradient_flow(monkeypatch, term, column, into_backbone, limit):
    monkeypatch.setattr(udon, "MANY_CLASSES", LIMITS[limit])
    model = tiny_model()
    losses = udon.compute_losses(model, *tiny_batch(), "birds", distill_into_backbone=into_backbone)
    getattr(losses, term).backward()
    reached = [
        p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in model.named_parameters()
        if name.startswith(COLUMNS[column])
    ]
    mark = FLOW[term][list(COLUMNS).index(column)]
    assert reached and any(reached) == (mark == "x" or (mark == "(x)" and into_backbone))


def test_the_table_in_the_source_is_the_tested_one():
    lines = (ROOT / "udon.py").read_text().splitlines()
    top = next(i for i, line in enumerate(lines) if line.split()[:2] == ["#", "backbone"])
    starts = [match.start() for match in re.finditer(r"\w+", lines[top])]

    def cells(line):
        return tuple(line[start:end].strip() for start, end in zip(starts, [*starts[1:], None]))

    headings = [" ".join(pair).strip() for pair in zip(cells(lines[top]), cells(lines[top + 1]))]
    assert headings == list(COLUMNS)[:5]
    for term, marks in FLOW.items():
        row = next(line for line in lines if line.startswith(f"#   {term}"))
        assert cells(row) == marks[:5], term


@pytest.mark.parametrize("limit", LIMITS)
def test_negatives_of_all_domains_reach_other_student_classifiers_only(monkeypatch, limit):
    monkeypatch.setattr(udon, "MANY_CLASSES", LIMITS[limit])
    model = tiny_model()
    udon.compute_losses(model, *tiny_batch(), "birds", negatives="all").total.backward()
    assert model.student_classifiers["cars"].weight.grad.abs().sum() > 0
    assert model.teacher_heads["cars"].weight.grad is None
    assert model.teacher_classifiers["cars"].weight.grad is None


# The losses ---------------------------------------------------------------------------------------


def unit(x):
    return x / x.square().sum(1, keepdim=True).sqrt()


def losses_written_out(model, images, labels, weights, into_backbone, settings):
    """The method from its formulas for a batch of birds: cross-entropy, KL and squared differences
    by hand, with their own detaches."""
    parameters = dict(model.named_parameters())
    backbone = unit(model.backbone(images))

    def head(name, x):
        return unit(x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"])

    def cosines(name, x):
        return x @ unit(parameters[f"{name}.birds.weight"]).T

    def cross_entropy(cosines):
        logits = settings["scale"] * cosines
        return (torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels]).mean()

    student, teacher = head("student_head", backbone), head("teacher_heads.birds", backbone)
    teacher_cosines = cosines("teacher_classifiers", teacher)
    again = student if into_backbone else head("student_head", backbone.detach())
    p = (teacher_cosines.detach() / settings["temperature"]).softmax(1)
    q = (cosines("student_classifiers", again) / settings["temperature"]).softmax(1)
    difference = again @ again.T - (teacher @ teacher.T).detach()
    terms = [
        cross_entropy(teacher_cosines),
        cross_entropy(cosines("student_classifiers", student)),
        (p * (p.log() - q.log())).sum(1).mean(),
        settings["relational_scale"] * (difference**2).sum() / len(labels) ** 2,
    ]
    return sum(w * t for w, t in zip(weights, terms)) / sum(weights), terms


WEIGHTS = st.tuples(*[st.just(0.0) | st.floats(0.1, 3)] * 4).filter(sum)
SETTINGS = st.fixed_dictionaries(
    {
        "scale": st.floats(4, 64),
        "temperature": st.floats(0.05, 1),
        "relational_scale": st.floats(1, 64),
    }
)
OFFICIAL = {"scale": 16, "temperature": 0.1, "relational_scale": 32}


@pytest.mark.parametrize("limit", LIMITS)
@settings(max_examples=40)
@given(st.integers(0, 1000), st.booleans(), WEIGHTS, SETTINGS | st.just(None))
def test_losses_and_all_gradients_equal_their_formulas(
    limit, seed, into_backbone, weights, changes
):
    """For any weights, 0 included; without `changes` the defaults are the official constants."""
    model, (images, labels) = tiny_model(seed), tiny_batch(seed)
    options = {"weights": weights, "distill_into_backbone": into_backbone, **(changes or {})}
    with mock.patch.object(udon, "MANY_CLASSES", LIMITS[limit]):
        losses = udon.compute_losses(model, images, labels, "birds", **options)
    total, terms = losses_written_out(
        model, images, labels, weights, into_backbone, changes or OFFICIAL
    )
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-10)
    for weight, found, expected in zip(weights, losses[1:], terms):
        if weight == 0:
            assert found is None
        else:
            assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    names, parameters = zip(*model.named_parameters())
    # A gradient of None, for a parameter that is not used, is as good as zeros.
    gradients = [
        torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True)
        for x in (losses.total, total)
    ]
    for name, a, b in zip(names, *gradients):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), f"{name}: {abs(a - b).max()}"


FUNCTIONS = ("classification_loss", "logit_distillation_loss", "relational_distillation_loss")


@pytest.mark.parametrize("method", ["udon", "udon-joint", "usc", "ujc", "teachers"])
def test_a_loss_of_weight_0_is_not_computed(monkeypatch, method):
    called = []
    for name in FUNCTIONS:
        function = getattr(udon, name)
        monkeypatch.setattr(
            *(udon, name),
            lambda *x, function=function, name=name, **y: called.append(name) or function(*x, **y),
        )
    weights = Config(method=method).weights
    losses = udon.compute_losses(tiny_model(), *tiny_batch(), "birds", weights=weights)
    names = [FUNCTIONS[max(0, i - 1)] for i in range(4) if weights[i]]
    assert called == names
    assert [loss is None for loss in losses[1:]] == [weight == 0 for weight in weights]


@pytest.mark.parametrize(
    "weights, sentence",
    [
        ((1, 1, 1), "give four"),
        ((1, 1, 1, 1, 1), "give four"),
        ((0, 0, 0, 0), "not all 0"),
        ((math.nan, 1, 1, 1), "not all 0"),
    ],
)
def test_weights_are_four_and_not_all_0(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        udon.compute_losses(tiny_model(), *tiny_batch(), "birds", weights=weights)


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)])
def test_a_model_without_teachers_has_none_to_train_or_distil_from(weights):
    model = tiny_model(teacher_dim=0)
    with pytest.raises(ValueError, match="no teachers: use .0, 1, 0, 0."):
        udon.compute_losses(model, *tiny_batch(), "birds", weights=weights)


def test_frozen_teachers_are_not_trained():
    frozen = run_module.FrozenTeachers(dict.fromkeys(CLASSES, tiny_model(1)))
    with pytest.raises(ValueError, match="with frozen teachers the first must be 0"):
        udon.compute_losses(tiny_model(), *tiny_batch(), "birds", teachers=frozen)


def test_both_rules_give_the_same_losses():
    model = tiny_model()
    rules = [
        values_of(
            udon.compute_losses(model, *tiny_batch(), "birds", distill_into_backbone=into_backbone)
        )
        for into_backbone in (False, True)
    ]
    assert rules[0] == pytest.approx(rules[1], rel=1e-12)


def cosines_of(model, images):
    """{domain: cosines of the student with its classes}."""
    student = model.embed(images)
    classifiers = model.student_classifiers.items()
    return {domain: student @ F.normalize(c.weight, dim=1).T for domain, c in classifiers}


@pytest.mark.parametrize("method", ["usc", "ujc"])
@pytest.mark.parametrize("domain", CLASSES)
def test_a_student_alone(method, domain):
    """usc: a classifier per domain. ujc: one over all classes, those of the domain first."""
    model, (images, labels) = tiny_model(teacher_dim=0), tiny_batch()
    labels = labels % CLASSES[domain]
    config = Config(method=method)
    options = {"weights": config.weights, "negatives": config.negatives}
    losses = udon.compute_losses(model, images, labels, domain, **options)
    cosines = cosines_of(model, images)
    own = cosines.pop(domain)
    joint = torch.cat([own, *cosines.values()] if method == "ujc" else [own], dim=1)
    expected = F.cross_entropy(16 * joint, labels).item()
    assert values_of(losses) == [pytest.approx(expected, rel=1e-10), None] + [
        pytest.approx(expected, rel=1e-10),
        None,
        None,
    ]


def test_teachers_alone():
    model, batch = tiny_model(), tiny_batch()
    weights = Config(method="teachers").weights
    losses = udon.compute_losses(model, *batch, "birds", weights=weights)
    together = udon.compute_losses(model, *batch, "birds")
    teacher = pytest.approx(together.teacher_classification.item(), rel=1e-12)
    assert values_of(losses) == [teacher, teacher, None, None, None]


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_negatives_of_all_domains(margin):
    """They change the student's classification loss alone."""
    model, (images, labels) = tiny_model(), tiny_batch()
    options = {"negatives": "all", "domain_margin": margin}
    own = udon.compute_losses(model, images, labels, "birds")
    joint = udon.compute_losses(model, images, labels, "birds", **options)
    for term in TERMS:
        if term != "student_classification":
            assert getattr(own, term).item() == getattr(joint, term).item(), term
    cosines = cosines_of(model, images)
    logits = 16 * torch.cat([cosines["birds"], cosines["cars"] + margin], dim=1)
    expected = F.cross_entropy(logits, labels).item()
    assert joint.student_classification.item() == pytest.approx(expected, rel=1e-10)
    assert expected > own.student_classification.item()


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_margins_change_both_classification_losses(kind):
    model, batch = tiny_model(), tiny_batch()
    plain, harder = (
        values_of(udon.compute_losses(model, *batch, "birds", classification=c, margin=m))
        for c, m in (("normface", 0.0), (kind, 0.3))
    )
    assert harder[1] > plain[1] and harder[2] > plain[2] and harder[3:] == plain[3:]


# Many classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["udon", "udon-joint", "usc", "ujc", "teachers", "distill"])
def test_losses_in_chunks_equal_the_plain_ones(monkeypatch, method):
    """Losses and all gradients of every method, with margins, for part of a batch."""
    config = Config(method=method, **({"teachers": "x"} if method == "distill" else {}))
    frozen = run_module.FrozenTeachers(dict.fromkeys(CLASSES, tiny_model(1)))
    options = {
        "weights": config.weights,
        "negatives": config.negatives,
        "domain_margin": config.domain_margin,
        "teachers": frozen if method == "distill" else None,
        "classification": "arcface",
        "margin": 0.3,
        "part": 0.4,
    }
    found = []
    for limit in LIMITS.values():
        monkeypatch.setattr(udon, "MANY_CLASSES", limit)
        model = tiny_model(teacher_dim=10 if config.trains_teachers else 0)
        losses = udon.compute_losses(model, *tiny_batch(), "birds", **options)
        losses.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((values_of(losses), gradients))
    (plain, gradients), (chunked, others) = found
    assert chunked == [None if x is None else pytest.approx(x, rel=1e-10) for x in plain]
    assert gradients.keys() == others.keys(), "the optimizer skips what has no gradient"
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("negatives", ["domain", "all"])
@pytest.mark.parametrize("excess", [-2, -1, 0, 1])
def test_cosines_are_computed_up_to_the_limit_only(monkeypatch, negatives, excess, frozen):
    """The limit is of the classes that the student separates: here of birds and 2 more."""
    monkeypatch.setattr(CosineClassifier, "forward", mock.Mock(side_effect=InterruptedError))
    classes = {"birds": udon.MANY_CLASSES + excess, "cars": 2}
    model, (images, labels) = UDON(ViT(**TINY), classes), tiny_batch(dtype=torch.float32)
    options = {"negatives": negatives}
    if frozen:
        teachers = run_module.FrozenTeachers({"birds": copy.deepcopy(model)})
        options |= {"teachers": teachers, "weights": (0, 1, 1, 1)}
    plain = excess + 2 * (negatives == "all") <= 0
    with pytest.raises(InterruptedError) if plain else contextlib.nullcontext():
        udon.compute_losses(model, images, labels, "birds", **options)


# Steps --------------------------------------------------------------------------------------------


class Recorder:
    """A sampler that records what it observes."""

    def __init__(self):
        self.observed = []

    def observe(self, domain, loss):
        self.observed.append((domain, loss))


def endless(domains, size=4):
    step = 0
    while True:
        domain, generator = domains[step % len(domains)], torch.Generator().manual_seed(step)
        shape = (size, 3, 16, 16)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        yield domain, images, torch.randint(0, CLASSES[domain], (size,), generator=generator)
        step += 1


def run_of(config, model):
    """A run of 10 steps per epoch whose sampler only records."""
    return udon.Run(
        config=config,
        model=model,
        architecture={},
        preprocessing=HALF,
        optimizer=udon.build_optimizer(model, config),
        sampler=Recorder(),
        device="cpu",
        steps_per_epoch=10,
        digests={},
    )


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_preset_trains_the_published_losses(monkeypatch, preset):
    """A step passes compute_losses its own defaults, which are the official constants."""
    run = run_of(Config(preset=preset, model="b16"), tiny_model(dtype=torch.float32))
    passed, compute = {}, udon.compute_losses

    def record(*arguments, **options):
        passed.update(options)
        return compute(*arguments, **options)

    monkeypatch.setattr(udon, "compute_losses", record)
    udon.training_step(run, endless(["birds"]))
    parameters = inspect.signature(compute).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert passed == options


def test_the_backbone_is_frozen_at_first():
    model = tiny_model(dtype=torch.float32)
    run, batches = run_of(Config(frozen_epochs=0.4), model), endless(["birds", "cars"])
    for step in range(6):
        before = weights_of(model)
        udon.training_step(run, batches)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert any(name.startswith("backbone.") for name in moved) == (step >= 4), step
        has_gradient = model.backbone.cls_token.grad is not None
        assert has_gradient == (step >= 4), "a frozen backbone costs no backward pass"
        assert "student_head.weight" in moved and run.step == step + 1


@pytest.mark.parametrize("signal", ["teacher", "student"])
def test_the_sampler_observes_the_signal(signal):
    run = run_of(Config(signal=signal), tiny_model(dtype=torch.float32))
    batches = endless(["birds", "cars"])
    for _ in range(3):
        domain, losses, _ = udon.training_step(run, batches)
        assert losses.teacher_classification != losses.student_classification
        assert run.sampler.observed[-1] == (domain, getattr(losses, f"{signal}_classification"))


@pytest.mark.parametrize("inactive_heads", ["skip", "zero"])
def test_inactive_heads(inactive_heads):
    """One batch of birds, then 15 of cars: AdamW in numpy says where the birds' teacher ends."""
    config = Config(inactive_heads=inactive_heads, weight_decay=0.01, head_lr=1e-3, frozen_epochs=0)
    model = tiny_model(dtype=torch.float32)
    weight = model.teacher_heads["birds"].weight
    _, images, labels = next(endless(["birds"]))
    images = data.normalise(images, HALF["mean"], HALF["std"])
    losses = udon.compute_losses(model, images, labels, "birds")
    gradient = torch.autograd.grad(losses.total, weight)[0].double().numpy()
    w, m, v = weight.detach().double().numpy().copy(), 0.0, 0.0
    for t in range(1, 17 if inactive_heads == "zero" else 2):
        g = gradient if t == 1 else 0 * gradient
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - 1e-3 * 0.01) - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    run, batches = run_of(config, model), endless(["birds"] + ["cars"] * 15)
    for _ in range(16):
        udon.training_step(run, batches)
    error = abs(weight.detach().numpy() - w).max()
    assert error < 2e-6, f"off by {error}"


@pytest.mark.parametrize("init, start", [("file", "lecun"), ("scratch", "pca"), ("file", "pca")])
def test_the_running_mean_of_the_weights(init, start):
    model, decay = tiny_model(dtype=torch.float32), 0.5
    options = dict(ema=decay, frozen_epochs=0.5, head_lr=0.1, init=init, student_init=start)
    run = run_of(Config(**options), model)
    model.backbone.register_buffer("statistics", torch.zeros(3))
    run.average = copy.deepcopy(model)
    expected = {name: weight.double() for name, weight in weights_of(model).items()}
    for step, _ in enumerate(range(12), 1):
        model.backbone.statistics += 1
        udon.training_step(run, endless(["birds", "cars"]))
        is_random = init == "scratch" or start == "lecun"
        factor = min(decay, step / (step + 9)) if is_random else decay
        for name, weight in weights_of(model).items():
            expected[name] = factor * expected[name] + (1 - factor) * weight.double()
    for name, mean in run.average.named_parameters():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(mean, run.evaluated.get_parameter(name))
    assert torch.equal(run.average.backbone.statistics, torch.full((3,), 12.0))
    assert not torch.equal(run.average.student_head.weight, model.student_head.weight)


def losses_and_gradients(model):
    """Of one batch of birds."""
    _, images, labels = next(endless(["birds"]))
    images = data.normalise(images, HALF["mean"], HALF["std"])
    losses = udon.compute_losses(model, images, labels, "birds")
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_reduced_precision_is_the_backbones_alone():
    exact, reduced = (tiny_model(dtype=torch.float32).train() for _ in range(2))
    reduced.precision = torch.bfloat16
    _, images, _ = next(endless(["birds"]))
    images = data.normalise(images, HALF["mean"], HALF["std"])
    for output in reduced(images, "birds"):
        assert output.dtype == torch.float32
    backbone = reduced.embed_backbone(images)
    error = (backbone - exact.embed_backbone(images)).norm(dim=1)
    assert 0 < error.min() and error.max() < 0.02
    heads = [model.teacher_heads["birds"](backbone) for model in (exact, reduced)]
    assert torch.equal(*heads), "heads are computed in float32"
    assert torch.equal(reduced.eval().embed(images), exact.eval().embed(images))
    (losses, gradients), (expected, exact_gradients) = map(
        losses_and_gradients, (reduced.train(), exact.train())
    )
    for value, target in zip(losses, expected):
        assert abs(value - target) < 0.02 * target
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    both = [
        torch.cat([g[name].flatten() for name in exact_gradients])
        for g in (gradients, exact_gradients)
    ]
    assert (both[0] - both[1]).norm() < 0.1 * both[1].norm()


def test_activations_computed_again_change_nothing():
    saved, gradients = {}, {}
    for again in (False, True):
        model, sizes = tiny_model(dtype=torch.float32), []
        model.backbone.set_grad_checkpointing(again)

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gradients[again] = losses_and_gradients(model)
        saved[again] = sum(sizes)
    assert same(gradients[False], gradients[True])
    assert saved[True] < saved[False] / 2


def test_heads_of_inactive_domains_are_skipped():
    """Neither their weights nor the optimizer's state know of steps of another domain."""
    model = tiny_model(dtype=torch.float32)
    run, before = run_of(Config(weight_decay=0.1, frozen_epochs=0), model), weights_of(model)
    for _ in range(3):
        udon.training_step(run, endless(["birds"]))
    for name, parameter in model.named_parameters():
        active = ".cars." not in name
        assert (parameter in run.optimizer.state) == active, name
        assert torch.equal(parameter, before[name]) != active, name


@pytest.mark.parametrize("method", ["udon", "udon-joint"])
def test_steps_with_many_classes(monkeypatch, method):
    """Steps in chunks of classes, in pieces of the batch, equal plain steps of the whole batch."""
    found = []
    for limit, accumulate in ((udon.MANY_CLASSES, 1), (0, 2)):
        monkeypatch.setattr(udon, "MANY_CLASSES", limit)
        model = tiny_model(dtype=torch.float32)
        config = Config(method=method, accumulate=accumulate, frozen_epochs=0.1, batch_size=4)
        run, batches = run_of(config, model), endless(["birds", "cars"])
        losses = [values for _ in range(6) for values in udon.training_step(run, batches)[1]]
        found.append((losses, weights_of(model)))
    (losses, weights), (others, other_weights) = found
    assert others == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        assert torch.allclose(other_weights[name], weight, atol=1e-4), name


def break_loss(model):
    model.teacher_classifiers["birds"].weight.data[0, 0] = math.nan


def break_gradient(model):
    """Adds the root of 0 to the student's weights: the loss is finite, its gradient is not."""
    forward = model.student_head.forward

    def rooted(x):
        weight = model.student_head.weight
        return forward(x) + (weight - weight.detach()).abs().sum().sqrt()

    model.student_head.forward = rooted


@pytest.mark.parametrize(
    "damage, term", [(break_loss, "(teacher_classification|total)"), (break_gradient, "gradient")]
)
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(damage, term):
    model = tiny_model(dtype=torch.float32)
    damage(model)
    run, before = run_of(Config(), model), weights_of(model)
    with pytest.raises(data.InputError, match=f"{term}.* is (nan|inf) at step 0, domain birds: "):
        udon.training_step(run, endless(["birds"]))
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)), name
    assert not run.optimizer.state and not run.sampler.observed and run.step == 0


# Runs ---------------------------------------------------------------------------------------------


def train(root, out, line=""):
    udon.main(["train", "--data", str(root), "--out", str(out), *f"{QUICK} {line}".split()])


def resume(out, line=""):
    udon.main(["train", "--out", str(out), "--resume", *line.split()])


def result_of(out):
    return json.loads((out / "test.json").read_text())


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    """The lines of training steps, without times."""
    return [
        {name: value for name, value in line.items() if "seconds" not in name}
        for line in lines_of(out)
        if "domain" in line
    ]


@pytest.mark.parametrize(
    "line",
    [
        "--method udon",
        "--method udon --inactive-heads zero --frozen-epochs 0.5 --warmup-steps 9",
        "--method udon-joint",
        "--method usc --sampler size",
        "--method ujc --sampler dynamic",
        "--method teachers --sampler balanced",
        "--method udon-joint --ema 0.9 --accumulate 2 --checkpoint-activations",
    ],
)
def test_n_steps_and_n_more_equal_2n(uned, tmp_path, capsys, line):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(uned, whole, f"{line} --steps 14")
    train(uned, halves, f"{line} --steps 7")
    resume(halves, "--steps 14")
    assert "resumed at step 7 of 14" in capsys.readouterr().out
    states = [checkpoint.read(out / "last.pt") for out in (whole, halves)]
    for part in ("model", "optimizer", "sampler", "step", "backbone"):
        assert same(*(state[part] for state in states)), part
    assert steps_of(whole) == steps_of(halves)
    assert [row["step"] for row in steps_of(halves)] == list(range(1, 15))


def test_the_running_mean_is_what_is_evaluated(uned, tmp_path):
    train(uned, tmp_path, "--steps 6 --ema 0.5 --val-every 6 --student-init lecun")
    last, best = (checkpoint.read(tmp_path / name) for name in ("last.pt", "best.pt"))
    assert same(best["model"], last["model"]) and not same(last["model"], last["trained"])
    model, contents = checkpoint.load(tmp_path / "best.pt")
    sets = evaluate.open_sets(data.Benchmark(uned), "test", 32)
    means = evaluate.evaluate(model, sets, contents["preprocessing"])["mean"]
    assert means == result_of(tmp_path)["mean"]


def test_a_trained_run_is_continued_with_its_heads(uned, tmp_path, capsys):
    """On its data and with another domain; without a step, everything is as it was."""
    train(uned, tmp_path / "first", "--steps 8 --domains birds --method udon-joint")
    capsys.readouterr()
    line = f"--steps 1 --head-lr 0 --backbone-lr 0 --method udon-joint --init {tmp_path / 'first'}"
    train(uned, tmp_path / "more", line.replace("/first", "/first/best.pt"))
    assert (
        "best.pt: the backbone; the student head; teacher heads of birds; student classifiers of "
        "birds; teacher classifiers of birds; all else is new"
    ) in capsys.readouterr().out
    first, more = (checkpoint.read(tmp_path / x / "best.pt")["model"] for x in ("first", "more"))
    for name, weight in first.items():
        assert torch.equal(more[name], weight), name
    assert any("cars" in name for name in more)
    train(uned, tmp_path / "narrow", f"{line} --student-dim 8 --teacher-dim 8")
    assert "best.pt: the backbone; all else is new" in capsys.readouterr().out


class Network(torch.nn.Module):
    """A backbone of one's own."""

    width = 12

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(3 * 8 * 8, self.width)

    def forward(self, images):
        return self.projection(F.adaptive_avg_pool2d(images, 8).flatten(1))


def test_a_backbone_of_ones_own(uned, tmp_path, capsys):
    options = dict(preset="micro", data=str(uned), batch_size=4, frozen_epochs=0.0, period=4)
    whole, halves = (Config(**options, steps=6, out=str(tmp_path / x)) for x in ("a", "b"))
    network = Network()
    start = network.projection.weight.detach().clone()
    results = udon.train(whole, backbone=network)
    assert "the backbone is the module test_udon.Network" in capsys.readouterr().out
    assert not torch.equal(network.projection.weight, start), "trained in place"
    udon.train(dataclasses.replace(halves, steps=3), backbone=Network())
    udon.train(halves, resume=True, backbone=Network())
    states = [checkpoint.read(Path(config.out) / "last.pt") for config in (whole, halves)]
    assert same(states[0]["model"], states[1]["model"])
    best = tmp_path / "a" / "best.pt"
    model, contents = checkpoint.load(best, backbone=Network())
    assert isinstance(model.backbone, Network)
    sets = evaluate.open_sets(data.Benchmark(uned), "test", 48)
    assert evaluate.evaluate(model, sets, contents["preprocessing"])["mean"] == results["mean"]
    with pytest.raises(checkpoint.CheckpointError, match=r"module test_udon\.Network.*backbone="):
        checkpoint.load(best)


class Partial(Network):
    """One that keeps a part of it fixed, and has random layers."""

    def __init__(self):
        super().__init__()
        self.fixed = torch.nn.Linear(self.width, self.width).requires_grad_(False)
        self.counts = torch.nn.Parameter(torch.arange(3), requires_grad=False)
        self.norm, self.dropout = torch.nn.BatchNorm1d(self.width), torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.norm(self.fixed(super().forward(images))))


def own(uned, out, **given):
    options = dict(preset="micro", data=str(uned), batch_size=4, period=4, image_size=32)
    return Config(**options | {"frozen_epochs": 0.0, "out": str(out)} | given)


def test_a_backbone_of_ones_own_may_be_partly_fixed(uned, tmp_path):
    network = Partial()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    udon.train(own(uned, tmp_path, steps=3), backbone=network)
    after = checkpoint.read(tmp_path / "last.pt")["model"]
    changed = {name for name in before if not torch.equal(after[f"backbone.{name}"], before[name])}
    assert "projection.weight" in changed and not {"fixed.weight", "counts"} & changed
    learns = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learns == {"projection.weight", "projection.bias", "norm.weight", "norm.bias"}


def test_after_frozen_steps_a_backbone_requires_gradients_as_before(uned, tmp_path):
    network = Network()
    udon.train(own(uned, tmp_path, steps=2, frozen_epochs=9.0), backbone=network)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_random_layers_draw_a_function_of_the_step(uned, tmp_path):
    states = []
    for name, lengths in (("whole", [6]), ("again", [6]), ("halves", [3, 6])):
        for steps in lengths:
            torch.rand(7)
            config = own(uned, tmp_path / name, steps=steps)
            udon.train(config, resume=steps != lengths[0], backbone=Partial())
        states.append(checkpoint.read(tmp_path / name / "last.pt")["model"])
    assert same(states[0], states[1]) and same(states[0], states[2])


def test_batches_of_random_layers_cannot_be_divided(uned, tmp_path):
    config = own(uned, tmp_path, accumulate=2)
    with pytest.raises(
        udon.ConfigError, match=r"Partial has layers such as BatchNorm1d.*GroupNorm"
    ):
        udon.train(config, backbone=Partial())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "layer", [torch.nn.MultiheadAttention(12, 2, dropout=0.1), torch.nn.Dropout()]
)
def test_a_resumed_batch_of_random_layers_cannot_be_divided(uned, tmp_path, layer):
    whole, network = own(uned, tmp_path, steps=2), Network()
    network.layer = layer
    udon.train(whole, backbone=network)
    config = dataclasses.replace(whole, steps=4, accumulate=2)
    with pytest.raises(udon.ConfigError, match="has layers such as"):
        udon.train(config, resume=True, backbone=network)


def test_batches_of_other_layers_can_be_divided(uned, tmp_path):
    """Without dropout, in evaluation mode, or of a frozen backbone."""

    class Still(Partial):
        def train(self, mode=True):  # as some write it, without a return value
            torch.nn.Module.train(self, mode)
            self.norm.eval()
            self.dropout.eval()

    network = Network()
    network.dropout = torch.nn.Dropout(0.0)
    udon.train(own(uned, tmp_path / "a", steps=1, accumulate=2), backbone=network)
    udon.train(own(uned, tmp_path / "b", steps=1, accumulate=2), backbone=Still())
    frozen = own(uned, tmp_path / "c", steps=1, accumulate=2, freeze_backbone=True)
    udon.train(frozen, backbone=Partial())


def test_training_does_not_fix_the_random_numbers_of_the_program(uned, tmp_path):
    """Modules that are made after it are as different as before it."""
    networks, drawn = [Network(), Network()], []
    for seed, network in enumerate(networks):
        torch.manual_seed(seed)
        udon.train(own(uned, tmp_path / str(seed), steps=2), backbone=network)
        drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)


def test_resuming_needs_the_same_fixed_parameters(uned, tmp_path):
    config = own(uned, tmp_path, steps=2)
    udon.train(config, backbone=Partial())
    other = Partial()
    other.fixed.requires_grad_(True)
    with pytest.raises(rundir.RunError, match="parameters are trained, there"):
        udon.train(dataclasses.replace(config, steps=3), resume=True, backbone=other)


def returning(function, width=12):
    """A backbone that returns function(features)."""

    class Other(Network):
        def forward(self, images):
            return function(super().forward(images))

    backbone = Other()
    backbone.width = width
    return backbone


@pytest.mark.parametrize(
    "backbone, given, words",
    [
        (torch.nn.Linear(3, 3), {}, "Linear has the width None: set it"),
        (returning(lambda x: x, width=0), {}, "has the width 0: set it"),
        (returning(lambda x: x, width=9), {}, r"width 9 turns .* torch.float32 \(2, 12\): let it"),
        (returning(lambda x: x[..., None]), {}, r"into torch.float32 \(2, 12, 1\)"),
        (returning(lambda x: (x, x)), {}, "into tuple"),
        (returning(lambda x: x.double()), {}, "into torch.float64"),
        (returning(lambda x: x @ x), {}, r"takes no float32 images \(2, 3, 32, 32\) \(mat1"),
        (Network().to("meta"), {}, "Network has no values, it is on the device meta"),
        (Network(), {"model": "timm:test_vit"}, "Network is given with --model timm:test_vit"),
    ],
    ids=str,
)
def test_backbones_that_cannot_be_used(uned, tmp_path, backbone, given, words):
    with pytest.raises(udon.ConfigError, match=words):
        udon.train(own(uned, tmp_path, **given), backbone=backbone)
    assert not list(tmp_path.iterdir())


def test_a_comparison_needs_a_backbone_that_can_be_copied(uned, tmp_path):
    network = Network()
    network.stream = (x for x in "ab")
    with pytest.raises(udon.ConfigError, match="--compare needs a copy .*: leave it out"):
        udon.train(own(uned, tmp_path, compare=("usc",)), backbone=network)


def test_a_backbone_without_checkpointed_activations_is_named(uned, tmp_path):
    config = own(uned, tmp_path, checkpoint_activations=True)
    with pytest.raises(udon.ConfigError, match="the backbone Network has no such mode"):
        udon.train(config, backbone=Network())


def test_all_processes_must_see_the_directory_of_the_run(uned, tmp_path, monkeypatch):
    collected = distributed.collected

    def elsewhere(value):
        return [value, None] if str(value).startswith("process") else collected(value)

    monkeypatch.setattr(distributed, "collected", elsewhere)
    with pytest.raises(rundir.RunError, match=r"of rank 0 is not there for rank 1: give a dir"):
        udon.train(own(uned, tmp_path / "run"), backbone=Network())
    assert not list(tmp_path.iterdir())


def test_resuming_in_python_needs_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(udon.ConfigError, match="config.out is None"):
        udon.train(Config(preset="micro"), resume=True)
    assert not list(tmp_path.iterdir())


def test_loader_processes_change_nothing(uned, tmp_path, monkeypatch, capsys):
    train(uned, tmp_path / "memory", "--steps 6")
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    train(uned, tmp_path / "workers", "--steps 6 --workers 2")
    assert "decoded by 2 processes" in capsys.readouterr().out
    assert steps_of(tmp_path / "memory") == steps_of(tmp_path / "workers")


def test_a_run_stopped_before_its_validation_is_validated_on_resuming(uned, tmp_path):
    """last.pt of the last step, no best.pt yet."""
    train(uned, tmp_path, "--steps 4 --val-every 100")
    state = checkpoint.read(tmp_path / "last.pt")
    best = {"step": 0, "recall_at_1": -1.0, "mmp_at_5": -1.0}
    checkpoint.save(tmp_path / "last.pt", {**state, "validated": None, "best": best})
    (tmp_path / "best.pt").unlink()
    resume(tmp_path)
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 4


@pytest.fixture(scope="module")
def finished(uned, tmp_path_factory):
    """The directory of a run of 11 steps, and what it printed."""
    out, printed = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(uned, out, "--steps 11 --seed 5 --sampler round_robin")
    return out, printed.getvalue()


def test_the_directory_of_a_run(finished):
    out, _ = finished
    names = ["best.pt", "config.json", "last.pt", "metrics.jsonl", "test.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    values = json.loads((out / "config.json").read_text())
    assert values.keys() == {field.name for field in dataclasses.fields(Config)}
    assert (values["seed"], values["model"], values["out"]) == (5, "micro", str(out))
    last, best = (checkpoint.read(out / name) for name in ("last.pt", "best.pt"))
    assert last["step"] == last["sampler"]["step"] == 11
    assert "optimizer" in last and "optimizer" not in best
    assert Config(**last["config"]) == Config(**values)


def test_what_a_run_prints(finished):
    _, printed = finished
    for text in ("seed 5", "model micro", "images/s", "waiting for data", "left", "random weights"):
        assert text in printed, text
    assert re.search(r"^birds +20 +4 ", printed, re.MULTILINE), "20 training images of 4 classes"


def test_what_a_run_measures(finished):
    out, _ = finished
    result, (model, _) = result_of(out), checkpoint.load(out / "best.pt")
    assert result["domains"].keys() == result["backbone"]["domains"].keys() == {"birds", "cars"}
    cars = result["domains"]["cars"]
    assert (cars["queries"], cars["index"]) == (10, 10)
    assert result["images"] == {"birds": 24, "cars": 20}
    assert 0 < result["seconds"] < 1000 and result["cpu_seconds"] > 0
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    used = [n for name, n in sizes.items() if name.startswith(("backbone.", "student_head."))]
    assert result["parameters"] == {"trained": sum(sizes.values()), "inference": sum(used)}


def test_metrics_have_a_line_for_each_step_and_validation(finished):
    out, _ = finished
    lines = lines_of(out)
    assert [line["step"] for line in lines if "val" in line] == [0, 5, 10, 11]
    steps = [line for line in lines if "domain" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    expected = {"step", "domain", "total", *TERMS, "backbone_lr", "head_lr"}
    assert all(line.keys() == expected | {"seconds", "cpu_seconds"} for line in steps)
    weighted = [sum(line[term] for term in TERMS) / 4 for line in steps]
    assert [line["total"] for line in steps] == pytest.approx(weighted, rel=1e-5)


def test_metrics_have_the_validation_results_of_each_domain(finished, uned):
    """Those of the last validation are the results of the model in last.pt."""
    out, _ = finished
    lines = [line for line in lines_of(out) if "val" in line]
    for line in lines:
        assert line.keys() == {"step", "val", "val_domains", "sampler_weights"}
        for name, mean in line["val"].items():
            values = [row[name] for row in line["val_domains"].values()]
            assert mean == pytest.approx(sum(values) / 2, abs=1e-12)
    model, contents = checkpoint.load(out / "last.pt")
    sets = evaluate.open_sets(data.Benchmark(uned), "val", 32)
    expected = evaluate.evaluate(model, sets, contents["preprocessing"])["domains"]
    names = ("recall_at_1", "mmp_at_5")
    assert lines[-1]["val_domains"] == {
        domain: {name: row[name] for name in names} for domain, row in expected.items()
    }


RECALLS = {  # of each validation -> the step of best.pt
    "the largest sum": ([(0.0, 0.1), (0.4, 0.1), (0.3, 0.3), (0.1, 0.4)], 10),
    "equal R@1: the higher mMP@5": ([(0.0, 0.1), (0.3, 0.1), (0.3, 0.4), (0.3, 0.2)], 10),
    "equal: the later": ([(0.0, 0.1), (0.25, 0.125), (0.125, 0.25), (0.2, 0.1)], 10),
    "the start": ([(0.4, 0.1), (0.3, 0.1), (0.3, 0.1), (0.2, 0.2)], 0),
}


@pytest.mark.parametrize("case", RECALLS)
def test_the_best_checkpoint(uned, tmp_path, monkeypatch, case):
    """Validation results are staged."""
    values, best = RECALLS[case]
    true, staged = evaluate.evaluate, iter(values)

    def evaluated(model, sets, preprocessing, **options):
        result = true(model, sets, preprocessing, **options)
        if len(sets["cars"].queries) == 20:  # the val split; test has 10
            result["mean"] = dict(zip(("recall_at_1", "mmp_at_5"), next(staged)))
        return result

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    train(uned, tmp_path / "run", "--steps 15")
    assert checkpoint.read(tmp_path / "run" / "best.pt")["step"] == best
    result = result_of(tmp_path / "run")
    assert result["step"] == best
    assert (result["val_recall_at_1"], result["val_mmp_at_5"]) == values[best // 5]


def test_the_dynamic_sampler_follows_the_teachers_losses(uned, tmp_path):
    train(uned, tmp_path / "run", "--steps 6 --period 6 --val-every 6 --student-init lecun")
    losses = {"birds": [], "cars": []}
    for line in steps_of(tmp_path / "run"):
        losses[line["domain"]].append(line["teacher_classification"])
    means = {domain: np.mean(values) for domain, values in losses.items()}
    weights = result_of(tmp_path / "run")["sampler_weights"]["6"]
    assert weights == pytest.approx({d: mean / sum(means.values()) for d, mean in means.items()})


CLASSES_SEEN = {"ujc": 8, "udon-joint": 4 + 4 * math.exp(16 * 0.2)}  # other domains are raised


@pytest.mark.parametrize("method", [method for method in METHODS if method != "backbone"])
def test_a_small_set_is_learned(uned, specialists, tmp_path, method):
    """40 images of plain colours: losses fall far below those of equal cosines."""
    options = "--steps 90 --batch-size 16 --val-every 90 --backbone-lr 1e-3 --head-lr 3e-3"
    options += " --student-init lecun"
    if method == "distill":
        options += f" --teachers {specialists}"
    train(uned, tmp_path / "run", f"--method {method} {options}")
    term = "teacher" if method == "teachers" else "student"
    losses = [line[f"{term}_classification"] for line in steps_of(tmp_path / "run")]
    undecided = math.log(CLASSES_SEEN.get(method, 4))
    assert losses[0] > 0.9 * undecided and np.mean(losses[-10:]) < 0.6 * undecided, losses


def test_the_backbone_as_it_is(uned, tmp_path):
    """Nothing is trained: the result is that of the initial backbone, at full width."""
    train(uned, tmp_path / "run", "--method backbone --seed 3")
    result = result_of(tmp_path / "run")
    config = Config(preset="micro", init="scratch", image_size=32, seed=3)
    model, _, preprocessing = udon.build_model(config, CLASSES)
    sets = evaluate.open_sets(data.Benchmark(uned), "test", 32)
    expected = evaluate.evaluate(model, sets, preprocessing, embedding="backbone")
    assert result["domains"] == expected["domains"] == result["backbone"]["domains"]
    assert result["images"] == {"birds": 0, "cars": 0} and result["seconds"] == 0
    size = sum(p.numel() for p in model.backbone.parameters())
    assert result["parameters"] == {"trained": 0, "inference": size}


# Distillation from frozen teachers ----------------------------------------------------------------


@pytest.fixture(scope="module")
def specialists(uned, tmp_path_factory):
    """A directory of runs of one domain each."""
    root = tmp_path_factory.mktemp("specialists")
    for domain in ("birds", "cars"):
        line = f"--method usc --domains {domain} --student-dim 12 --steps 6"
        train(uned, root / domain, line)
    return root


def test_a_run_of_one_domain(specialists, capsys):
    best = specialists / "cars" / "best.pt"
    result = result_of(specialists / "cars")
    assert list(result["domains"]) == ["cars"] and result["images"] == {"cars": 24}
    model, contents = checkpoint.load(best)
    assert list(model.student_classifiers) == ["cars"]
    assert contents["config"]["domains"] == ("cars",)
    evaluate.main([str(best), "--device", "cpu"])
    assert "birds" not in capsys.readouterr().out
    evaluate.main([str(best), "--device", "cpu", "--domains", "birds", "cars"])
    assert "birds" in capsys.readouterr().out


def test_frozen_teachers_stay_as_they_are(uned, specialists, tmp_path):
    paths = [specialists / domain / "best.pt" for domain in ("birds", "cars")]
    before = [path.read_bytes() for path in paths]
    train(uned, tmp_path / "run", f"--method distill --teachers {specialists} --steps 6")
    assert [path.read_bytes() for path in paths] == before
    model, _ = checkpoint.load(tmp_path / "run" / "best.pt")
    assert not any("teacher" in name for name, _ in model.named_parameters())
