"""udon.py: gradient flow, the step against a formula written out here, optimizer, schedules, resuming bit for bit, baselines."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import evaluate
import udon
from model import UDON, ViT

ROOT = Path(__file__).parents[1]
TINY = dict(image_size=16, patch_size=8, width=24, depth=2, heads=2)
CLASSES = {"birds": 5, "cars": 3}
QUICK = [
    "--init",
    "scratch",
    "--image-size",
    "32",
    "--batch-size",
    "4",
    "--period",
    "3",
    "--val-every",
    "5",
    "--save-every",
    "2",
    "--device",
    "cpu",
]


def tiny_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    return UDON(ViT(**TINY), CLASSES, student_dim=6, teacher_dim=10, **changes).to(dtype)


def tiny_batch(seed=0, dtype=torch.float64, size=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype), torch.randint(
        0, 5, (size,), generator=generator
    )


# The gradient-flow table, cell by cell ----------------------------------------------------------------------------------------

GROUPS = (
    "backbone.",
    "student_head.",
    "student_classifiers.birds.",
    "teacher_heads.birds.",
    "teacher_classifiers.birds.",
    "student_classifiers.cars.",
    "teacher_heads.cars.",
    "teacher_classifiers.cars.",
)
#                                  backbone  s_head  s_cls  t_head  t_cls   other domain
FLOW = {
    "teacher_classification": (True, False, False, True, True, False, False, False),
    "student_classification": (True, True, True, False, False, False, False, False),
    "logit_distillation": (False, True, True, False, False, False, False, False),
    "relational_distillation": (False, True, False, False, False, False, False, False),
}
OFFICIAL_FLOW = {
    **FLOW,
    "logit_distillation": (True, *FLOW["logit_distillation"][1:]),
    "relational_distillation": (True, *FLOW["relational_distillation"][1:]),
}


@pytest.mark.parametrize("into_backbone", [False, True])
@pytest.mark.parametrize("term", FLOW)
@pytest.mark.parametrize("cell", range(len(GROUPS)))
def test_gradient_flow(term, cell, into_backbone):
    model = tiny_model()
    losses = udon.compute_losses(model, *tiny_batch(), "birds", distill_into_backbone=into_backbone)
    getattr(losses, term).backward()
    reached = [
        p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in model.named_parameters()
        if name.startswith(GROUPS[cell])
    ]
    expected = (OFFICIAL_FLOW if into_backbone else FLOW)[term][cell]
    assert reached and any(reached) == expected, f"{term} -> {GROUPS[cell]}: {reached}"


def test_the_printed_table_is_the_tested_one():
    """The comment above compute_losses says what the test above checks."""
    lines = (ROOT / "udon.py").read_text().splitlines()
    columns = (
        "backbone",
        "student_head",
        "student_classifier",
        "teacher_head",
        "teacher_classifier",
    )
    heading = next(line for line in lines if all(column in line.split() for column in columns))
    for term, cells in FLOW.items():
        row = next(line for line in lines if line.startswith(f"#   {term}"))
        official = OFFICIAL_FLOW[term]
        for column, cell, other in zip(columns, cells, official):
            start = heading.index(f" {column}") + 1
            mark = row[start - 1 : start + len(column) + 1].strip()
            assert mark == ("x" if cell else "(x)" if other else ""), f"{term}, {column}: {mark!r}"


def losses_written_out(
    model,
    images,
    labels,
    domain,
    weights,
    relational_scale,
    into_backbone,
    scale=16,
    temperature=0.1,
):
    """The method from its formulas: KL, squared differences and cross-entropy by hand, with its own detaches."""
    parameters = dict(model.named_parameters())
    unit = lambda x: x / x.square().sum(1, keepdim=True).sqrt()
    backbone = unit(model.backbone(images))

    def head(name, x):
        return unit(x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"])

    def cosines(name, x):
        return x @ unit(parameters[f"{name}.{domain}.weight"]).T

    def cross_entropy(c):
        logits = scale * c
        return (torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels]).mean()

    student, teacher = head("student_head", backbone), head(f"teacher_heads.{domain}", backbone)
    student_cosines, teacher_cosines = (
        cosines("student_classifiers", student),
        cosines("teacher_classifiers", teacher),
    )
    again = student if into_backbone else head("student_head", backbone.detach())
    p, q = (
        (c / temperature).softmax(1)
        for c in (teacher_cosines.detach(), cosines("student_classifiers", again))
    )
    kl = (p * (p.log() - q.log())).sum(1).mean()
    relational = (
        relational_scale
        * ((again @ again.T - (teacher @ teacher.T).detach()) ** 2).sum()
        / len(labels) ** 2
    )
    terms = [cross_entropy(teacher_cosines), cross_entropy(student_cosines), kl, relational]
    return sum(w * t for w, t in zip(weights, terms)) / sum(weights), terms


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 1000),
    into_backbone=st.booleans(),
    weights=st.tuples(*[st.floats(0.1, 3)] * 4),
    relational_scale=st.floats(1, 64),
    others=st.just({})
    | st.fixed_dictionaries({"scale": st.floats(4, 64), "temperature": st.floats(0.05, 1)}),
)
def test_losses_and_all_gradients_of_a_step(seed, into_backbone, weights, relational_scale, others):
    model, (images, labels) = tiny_model(seed), tiny_batch(seed)
    losses = udon.compute_losses(
        model,
        images,
        labels,
        "birds",
        weights=weights,
        relational_scale=relational_scale,
        distill_into_backbone=into_backbone,
        **others,
    )
    total, terms = losses_written_out(
        model, images, labels, "birds", weights, relational_scale, into_backbone, **others
    )
    for ours, theirs in zip(losses, [total, *terms]):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    names, parameters = zip(*model.named_parameters())
    ours = torch.autograd.grad(losses.total, parameters, allow_unused=True)
    theirs = torch.autograd.grad(total, parameters, allow_unused=True)
    for name, a, b in zip(names, ours, theirs):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-11), (
            f"{name}: {abs(a - b).max()}"
        )


def test_there_are_four_weights():
    with pytest.raises(ValueError, match="give four"):
        udon.compute_losses(tiny_model(), *tiny_batch(), "birds", weights=(1, 1, 1))


def test_both_rules_give_the_same_losses():
    model = tiny_model()
    rules = [
        udon.compute_losses(model, *tiny_batch(), "birds", distill_into_backbone=rule)
        for rule in (False, True)
    ]
    assert [x.item() for x in rules[0]] == pytest.approx([x.item() for x in rules[1]], rel=1e-12)


# Optimizer and schedules ------------------------------------------------------------------------------------------------------


def resolved(**changes):
    return udon.resolve(udon.Config(**changes))


def test_each_parameter_is_in_exactly_one_group():
    model = tiny_model()
    groups = [
        {id(p) for p in group["params"]}
        for group in udon.build_optimizer(model, resolved()).param_groups
    ]
    assert groups[0] == {id(p) for p in model.backbone.parameters()}
    assert not groups[0] & groups[1] and groups[0] | groups[1] == {
        id(p) for p in model.parameters()
    }


def run_of(config, frozen_steps=0, steps=20):
    return udon.Run(steps, 10, frozen_steps, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "cpu")


@pytest.mark.parametrize(
    "schedule, warmup", [("constant", 0), ("constant", 4), ("cosine", 0), ("cosine", 4)]
)
def test_learning_rates(schedule, warmup):
    config = resolved(schedule=schedule, warmup_steps=warmup, head_lr=1e-3, backbone_lr=1e-4)
    for step in range(20):
        factor = min((step + 1) / (warmup + 1), 1) * (
            (1 + math.cos(math.pi * step / 20)) / 2 if schedule == "cosine" else 1
        )
        backbone, heads = udon.learning_rates(config, step, run_of(config, frozen_steps=7))
        assert heads == pytest.approx(1e-3 * factor) and backbone == pytest.approx(
            0 if step < 7 else 1e-4 * factor
        ), step


def endless(domains, size=4, classes=CLASSES):
    for step in range(10**6):
        domain = domains[step % len(domains)]
        generator = torch.Generator().manual_seed(step)
        yield (
            domain,
            torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8),
            torch.randint(0, classes[domain], (size,), generator=generator),
        )


class Deaf:
    """A sampler that is told the losses and keeps them."""

    def __init__(self):
        self.heard = []

    def observe(self, domain, loss):
        self.heard.append((domain, loss))


def steps_of(config, model, count, domains=("birds", "cars"), frozen_steps=0):
    optimizer, batches, sampler = udon.build_optimizer(model, config), endless(domains), Deaf()
    for step in range(count):
        yield (
            udon.training_step(
                step, model, batches, sampler, optimizer, config, run_of(config, frozen_steps)
            ),
            sampler,
        )


def test_frozen_backbone():
    model = tiny_model(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, _ in enumerate(steps_of(resolved(), model, 6, frozen_steps=4)):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert any(name.startswith("backbone.") for name in moved) == (step >= 4), step
        assert (model.backbone.cls_token.grad is not None) == (step >= 4), (
            "a frozen backbone costs no backward pass"
        )
        assert "student_head.weight" in moved


def test_the_sampler_hears_the_teacher():
    model = tiny_model(dtype=torch.float32)
    for (domain, losses, _), sampler in steps_of(resolved(), model, 3):
        assert (
            sampler.heard[-1]
            == (domain, losses.teacher_classification)
            != (domain, losses.student_classification)
        )


@pytest.mark.parametrize("inactive_heads", ["skip", "zero"])
def test_inactive_heads(inactive_heads):
    """One batch of birds, then 15 of cars: AdamW written out in numpy says where the birds' teacher ends."""
    config = resolved(inactive_heads=inactive_heads, weight_decay=0.01, head_lr=1e-3)
    model = tiny_model(dtype=torch.float32)
    weight = model.teacher_heads["birds"].weight
    images = endless(("birds",)).__next__()[1]
    labels = endless(("birds",)).__next__()[2]
    losses = udon.compute_losses(
        model, data.normalise(images, (0.5,) * 3, (0.5,) * 3), labels, "birds"
    )
    gradient = torch.autograd.grad(losses.total, weight)[0].double().numpy()
    w, m, v = weight.detach().double().numpy().copy(), 0.0, 0.0
    for t in range(1, 17 if inactive_heads == "zero" else 2):
        g = gradient if t == 1 else 0 * gradient
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - 1e-3 * 0.01) - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    for _ in steps_of(config, model, 16, domains=("birds",) + ("cars",) * 15):
        pass
    error = abs(weight.detach().numpy() - w).max()
    assert error < 2e-6, (
        f"off by {error}, of a movement of {abs(w - weight.detach().numpy()).max()}"
    )


def test_a_loss_that_is_not_finite_stops_the_run():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.teacher_classifiers["birds"].weight[0, 0] = math.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        data.InputError, match="(teacher_classification|total) is nan at step 0, domain birds"
    ):
        next(steps_of(resolved(), model, 1))
    assert all(
        torch.equal(p, before[name]) or name == "teacher_classifiers.birds.weight"
        for name, p in model.named_parameters()
    )


# Baselines --------------------------------------------------------------------------------------------------------------------


def test_single_model_losses():
    """usc: the domain's own classes. ujc: the classes of all domains side by side, in the order of the domains."""
    torch.manual_seed(0)
    model = UDON(ViT(**TINY), CLASSES, student_dim=6, teacher_dim=0)
    images, labels = tiny_batch(dtype=torch.float32)
    unit = {d: F.normalize(c.weight, dim=1) for d, c in model.student_classifiers.items()}
    for domain, method, weight, first in (
        ("birds", "usc", unit["birds"], 0),
        ("cars", "usc", unit["cars"], 0),
        ("birds", "ujc", torch.cat([unit["birds"], unit["cars"]]), 0),
        ("cars", "ujc", torch.cat([unit["birds"], unit["cars"]]), 5),
    ):
        labels = labels % CLASSES[domain]
        losses = udon.single_model_losses(
            model, images, labels, domain, negatives="all" if method == "ujc" else "domain"
        )
        expected = F.cross_entropy(16 * model.embed(images) @ weight.T, first + labels)
        assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6), (domain, method)
        assert (
            losses.teacher_classification is None and losses.student_classification is losses.total
        )
    assert not any("teacher" in name for name, _ in model.named_parameters())


def test_teachers_alone():
    model, (images, labels) = tiny_model(), tiny_batch()
    losses = udon.single_model_losses(model, images, labels, "birds")
    together = udon.compute_losses(model, images, labels, "birds")
    assert losses.total is losses.teacher_classification and losses.student_classification is None
    assert losses.total.item() == pytest.approx(together.teacher_classification.item(), rel=1e-12)


def test_the_negatives_of_all_domains():
    """They change the student's classification alone, and give the other domains' student classifiers a gradient."""
    model, (images, labels) = tiny_model(), tiny_batch()
    own, every = (
        udon.compute_losses(model, images, labels, "birds", negatives=n) for n in ("domain", "all")
    )
    same = ("teacher_classification", "logit_distillation", "relational_distillation")
    assert [getattr(own, name).item() for name in same] == [
        getattr(every, name).item() for name in same
    ]
    student = model.embed(images)
    own_cosines, others = (
        student @ F.normalize(model.student_classifiers[d].weight, dim=1).T
        for d in ("birds", "cars")
    )
    for margin in (0.0, 0.3):
        joint = F.cross_entropy(
            16 * torch.cat([own_cosines, others + margin], dim=1), labels
        ).item()
        losses = udon.compute_losses(
            model, images, labels, "birds", negatives="all", domain_margin=margin
        )
        assert losses.student_classification.item() == pytest.approx(joint, rel=1e-10)
        assert joint > own.student_classification.item()
    every.total.backward()
    assert model.student_classifiers["cars"].weight.grad.abs().sum() > 0
    assert model.teacher_classifiers["cars"].weight.grad is None


# Runs -------------------------------------------------------------------------------------------------------------------------


def train(root, out, *more):
    udon.main(["train", "--data", str(root), "--out", str(out), *QUICK, *more])


def everything(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same(one, other, path=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path} differs by {(one - other).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert one == other, f"{path}: {one} and {other}"


def steps_in(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "seconds" not in key}
        for line in lines
        if "domain" in line
    ]


@pytest.mark.parametrize(
    "method, options",
    [
        ("udon", []),
        ("udon", ["--inactive-heads", "zero", "--frozen-epochs", "0.5"]),
        ("usc", ["--sampler", "size"]),
        ("ujc", ["--sampler", "balanced", "--workers", "2"]),
    ],
)
def test_n_steps_and_n_more_equal_2n(uned, tmp_path, capsys, method, options):
    train(uned, tmp_path / "whole", "--method", method, "--steps", "14", *options)
    train(uned, tmp_path / "halves", "--method", method, "--steps", "7", *options)
    udon.main(["train", "--out", str(tmp_path / "halves"), "--resume", "--steps", "14"])
    whole, halves = everything(tmp_path / "whole"), everything(tmp_path / "halves")
    for part in ("model", "optimizer", "sampler", "step", "untrained"):
        assert_same(whole[part], halves[part], part)
    assert steps_in(tmp_path / "whole") == steps_in(tmp_path / "halves")
    assert [line["step"] for line in steps_in(tmp_path / "halves")] == list(range(1, 15))
    assert "resumed at step 7 of 14" in capsys.readouterr().out


def test_a_run_stopped_between_validations_is_validated_on_resuming(uned, tmp_path, capsys):
    """last.pt of step 2, no best.pt yet, and no step left to do."""
    train(uned, tmp_path / "run", "--steps", "4", "--val-every", "100")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save(
        {**state, "validated": None, "best": {"step": 0, "recall_at_1": -1.0}},
        tmp_path / "run" / "last.pt",
    )
    (tmp_path / "run" / "best.pt").unlink()
    udon.main(["train", "--out", str(tmp_path / "run"), "--resume"])
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 4


def test_a_killed_run_ends_with_the_same_weights(uned, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "udon.py"),
        "train",
        "--data",
        str(uned),
        *QUICK,
        "--steps",
        "40",
        "--out",
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    killed, metrics = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    for lines in (3, 20):  # killed twice, at whatever step it has come to
        process = subprocess.Popen(
            [*command, str(killed)]
            if lines == 3
            else [*command[:3], "--out", str(killed), "--resume"],
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not (
            metrics.exists() and metrics.read_text().count("\n") >= lines
        ):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        saved = everything(killed)["step"]
        assert 0.6 * lines <= saved < 40, (
            f"step {saved} saved after {lines} lines of metrics: checkpoints are due every 2 steps"
        )
    subprocess.run(
        [*command[:3], "--out", str(killed), "--resume"], check=True, stdout=subprocess.DEVNULL
    )
    assert_same(everything(tmp_path / "whole")["model"], everything(killed)["model"], "model")
    assert_same(
        everything(tmp_path / "whole")["optimizer"], everything(killed)["optimizer"], "optimizer"
    )
    assert steps_in(tmp_path / "whole") == steps_in(killed)


def test_a_run_folder(uned, tmp_path, capsys):
    out = tmp_path / "run"
    train(uned, out, "--steps", "11", "--seed", "5")
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "best.pt",
        "config.json",
        "last.pt",
        "metrics.jsonl",
        "test.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert (
        set(config) == {f.name for f in dataclasses.fields(udon.Config)}
        and config["seed"] == 5
        and config["backbone_lr"]
    )
    assert (
        "--seed 5" in printed
        and "images/s" in printed
        and "waiting for data" in printed
        and "left" in printed
    )
    result = json.loads((out / "test.json").read_text())
    assert set(result["domains"]) == {"birds", "cars"} and set(result["untrained"]["domains"]) == {
        "birds",
        "cars",
    }
    assert (result["domains"]["cars"]["queries"], result["domains"]["cars"]["index"]) == (10, 10)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["val"]["recall_at_1"] for line in lines if "val" in line}
    assert list(validated) == [5, 10, 11]
    best = torch.load(out / "best.pt", weights_only=True)
    assert validated[best["step"]] == max(validated.values()) and "optimizer" not in best
    assert best["step"] == min(
        step for step, recall in validated.items() if recall == max(validated.values())
    )
    last = everything(out)
    assert last["step"] == 11 and last["sampler"]["step"] == 11


def test_the_best_checkpoint_is_not_the_last(uned, tmp_path, monkeypatch, capsys):
    """Validation results are put in: the best is step 10, the middle one."""
    true, results = evaluate.evaluate, iter([0.1, 0.3, 0.2])

    def staged(model, sets, preprocessing, **settings):
        outcome = true(model, sets, preprocessing, **settings)
        if len(sets["cars"].queries) == 20:  # the val split; test has 10
            outcome["mean"]["recall_at_1"] = next(results)
        return outcome

    monkeypatch.setattr(evaluate, "evaluate", staged)
    train(uned, tmp_path / "run", "--steps", "15")
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 10
    assert json.loads((tmp_path / "run" / "test.json").read_text())["step"] == 10


@pytest.mark.parametrize("method", ["udon", "usc", "ujc", "teachers", "distill"])
def test_a_small_set_is_learned(uned, tmp_path, capsys, method):
    """Each method overfits 40 pictures of 8 plain colours: losses fall far below those of an undecided classifier."""
    settings = [
        "--steps",
        "90",
        "--batch-size",
        "16",
        "--val-every",
        "1000",
        "--backbone-lr",
        "1e-3",
        "--head-lr",
        "1e-2",
    ]
    further = []
    if method == "distill":
        train(uned, tmp_path / "teachers", "--method", "teachers", *settings)
        further = ["--teachers", str(tmp_path / "teachers" / "best.pt")]
    if method in ("udon", "distill"):
        further += ["--negatives", "domain"]
    train(uned, tmp_path / "run", "--method", method, *settings, *further)
    losses = [
        line["teacher_classification" if method == "teachers" else "student_classification"]
        for line in steps_in(tmp_path / "run")
    ]
    undecided = math.log(8 if method == "ujc" else 4)
    assert np.mean(losses[-10:]) < 0.6 * undecided, (
        f"{np.mean(losses[:5]):.2f} -> {np.mean(losses[-10:]):.2f}"
    )


def test_the_backbone_as_it_is(uned, tmp_path, capsys):
    """Nothing is trained: the result is that of the untrained network's backbone, at full width, and costs nothing."""
    train(uned, tmp_path / "run", "--method", "backbone", "--seed", "3")
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    model, _, preprocessing = udon.build_model(
        resolved(method="backbone", init="scratch", image_size=32, seed=3), CLASSES
    )
    sets = evaluate.open_sets(data.Benchmark(uned), "test", 32)
    assert (
        result["domains"]
        == evaluate.evaluate(model, sets, preprocessing, embedding="backbone")["domains"]
    )
    assert (
        result["parameters"]["trained"] == 0
        and result["images"] == {"birds": 0, "cars": 0}
        and result["seconds"] == 0
    )
    assert result["parameters"]["inference"] == sum(p.numel() for p in model.backbone.parameters())


# Separate teachers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specialists(uned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("specialists")
    for domain in ("birds", "cars"):
        train(
            uned,
            folder / domain,
            "--method",
            "usc",
            "--domains",
            domain,
            "--student-dim",
            "12",
            "--steps",
            "6",
        )
    return folder


def test_a_specialist_knows_its_domain_alone(specialists, uned, capsys):
    result = json.loads((specialists / "cars" / "test.json").read_text())
    assert list(result["domains"]) == ["cars"] and result["images"] == {"cars": 24}
    model, checkpoint = evaluate.load_checkpoint(specialists / "cars" / "best.pt")
    assert list(model.student_classifiers) == ["cars"] and checkpoint["config"]["domains"] == (
        "cars",
    )
    capsys.readouterr()
    evaluate.main([str(specialists / "cars" / "best.pt"), "--device", "cpu"])
    assert "birds" not in capsys.readouterr().out
    evaluate.main(
        [str(specialists / "cars" / "best.pt"), "--device", "cpu", "--domains", "birds", "cars"]
    )
    assert "birds" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["specialists", "teachers", "udon"])
def test_distillation_from_frozen_teachers(uned, specialists, tmp_path, capsys, kind):
    """A step from its formulas: three losses of equal weight, the teachers' outputs as their checkpoints give them, all of the
    student trained, nothing of the teachers."""
    source = specialists
    if kind != "specialists":
        train(uned, tmp_path / kind, "--method", kind, "--teacher-dim", "12", "--steps", "6")
        source = tmp_path / kind / "best.pt"
    config = resolved(method="distill", init="scratch", image_size=32, teachers=str(source), seed=7)
    model, architecture, preprocessing = udon.build_model(config, {"birds": 4, "cars": 4})
    teachers = udon.FrozenTeachers(source, {"birds": 4, "cars": 4}, 32, preprocessing, "cpu")
    images, labels = (
        torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 3, 1, 1, 2]),
    )
    losses = udon.compute_losses(
        model, images, labels, "cars", teachers=teachers, distill_into_backbone=True
    )
    teacher, _ = evaluate.load_checkpoint(
        specialists / "cars" / "best.pt" if kind == "specialists" else source
    )
    head, classifier = (
        ("student_head", "student_classifiers")
        if kind == "specialists"
        else (None, "teacher_classifiers")
    )
    vectors = (teacher.student_head if head else teacher.teacher_heads["cars"])(
        F.normalize(teacher.backbone(images), dim=1)
    )
    cosines = vectors @ F.normalize(getattr(teacher, classifier)["cars"].weight, dim=1).T
    student = model.embed(images)
    student_cosines = student @ F.normalize(model.student_classifiers["cars"].weight, dim=1).T
    p, q = (10 * cosines).softmax(1), (10 * student_cosines).softmax(1)
    terms = [
        F.cross_entropy(16 * student_cosines, labels),
        (p * (p / q).log()).sum(1).mean(),
        32 * (student @ student.T - vectors @ vectors.T).square().mean(),
    ]
    assert losses.teacher_classification is None
    assert [x.item() for x in losses[2:]] == pytest.approx([x.item() for x in terms], rel=1e-4)
    assert losses.total.item() == pytest.approx(sum(x.item() for x in terms) / 3, rel=1e-4)
    losses.total.backward()
    assert all(p.grad is None for t in teachers.models.values() for p in t.parameters())
    assert all(
        p.grad is not None
        for name, p in model.named_parameters()
        if not name.startswith("student_classifiers.birds")
    )


def test_the_teachers_stay_as_they_are(uned, specialists, tmp_path, capsys):
    before = {
        d: torch.load(specialists / d / "best.pt", weights_only=True)["model"]
        for d in ("birds", "cars")
    }
    train(
        uned,
        tmp_path / "run",
        "--method",
        "distill",
        "--teachers",
        str(specialists),
        "--steps",
        "6",
    )
    assert_same(
        before,
        {d: torch.load(specialists / d / "best.pt", weights_only=True)["model"] for d in before},
    )
    model, _ = evaluate.load_checkpoint(tmp_path / "run" / "best.pt")
    assert not any("teacher" in name for name, _ in model.named_parameters()), (
        "the student leaves its teachers behind"
    )


def test_teachers_of_other_data_or_images(uned, specialists, tmp_path):
    same = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "antialias": True}
    for counts, size, preprocessing, named in (
        ({"birds": 4, "cars": 5}, 32, same, "4 classes of domain cars, which has 5"),
        ({"birds": 4}, 48, same, "48 pixels"),
        ({"birds": 4}, 32, {**same, "antialias": False}, "statistics"),
        ({"plants": 4}, 32, same, "plants"),
    ):
        with pytest.raises(data.InputError, match=named):
            udon.FrozenTeachers(specialists, counts, size, preprocessing, "cpu")


def test_what_a_run_says_it_spent(uned, tmp_path, capsys):
    train(uned, tmp_path / "run", "--steps", "7", "--sampler", "round_robin")
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    assert (
        result["images"] == {"birds": 16, "cars": 12}
        and 0 < result["seconds"] < 100
        and result["cpu_seconds"] > 0
    )
    model, _ = evaluate.load_checkpoint(tmp_path / "run" / "best.pt")
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    assert result["parameters"]["trained"] == sum(numbers.values())
    kept = sum(
        number
        for name, number in numbers.items()
        if name.startswith(("backbone.", "student_head."))
    )
    assert result["parameters"]["inference"] == kept


@pytest.mark.parametrize("signal", ["teacher", "student"])
def test_the_sampler_hears_the_signal(uned, tmp_path, capsys, signal):
    train(
        uned,
        tmp_path / "run",
        "--steps",
        "6",
        "--period",
        "6",
        "--sampler",
        "dynamic",
        "--signal",
        signal,
        "--val-every",
        "6",
    )
    lines = steps_in(tmp_path / "run")
    means = {
        d: np.mean([line[f"{signal}_classification"] for line in lines if line["domain"] == d])
        for d in ("birds", "cars")
    }
    weights = json.loads((tmp_path / "run" / "test.json").read_text())["sampler_weights"]["6"]
    assert weights == pytest.approx({d: mean / sum(means.values()) for d, mean in means.items()})


# Starting points --------------------------------------------------------------------------------------------------------------


def test_init_fills_the_backbone_and_its_preprocessing(uned, tmp_path, capsys):
    torch.manual_seed(3)
    public = ViT(32, 16, 384, 12, 6)
    torch.save(public.state_dict(), tmp_path / "vit.pth")
    config = resolved(model="s16", image_size=32, init=str(tmp_path / "vit.pth"))
    model, architecture, preprocessing = udon.build_model(config, CLASSES)
    assert torch.equal(model.backbone.blocks[3].mlp.fc1.weight, public.blocks[3].mlp.fc1.weight)
    assert architecture["backbone"]["activation"] == "gelu" and preprocessing["mean"] == (
        0.5,
        0.5,
        0.5,
    )
    assert (config.backbone_lr, config.frozen_epochs) == (1e-5, 2.0), (
        "the paper's settings go with public weights"
    )
    assert (
        resolved().init == "mini"
        and resolved(model="s16").init == "scratch"
        and resolved(init="scratch").init == "scratch"
    )
    assert (
        resolved(init="scratch").frozen_epochs == 0 and resolved().backbone_lr < resolved().head_lr
    )


def test_the_activation_of_weights_that_do_not_tell_it(tmp_path):
    public = ViT(32, 16, 384, 12, 6, pre_norm=True)
    torch.save(public.state_dict(), tmp_path / "clip.pth")
    for given, expected in ((None, "gelu"), ("quick_gelu", "quick_gelu")):
        config = resolved(
            model="s16", image_size=32, init=str(tmp_path / "clip.pth"), init_activation=given
        )
        assert udon.build_model(config, CLASSES)[1]["backbone"]["activation"] == expected


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    udon.build_model(resolved(image_size=32), CLASSES)
    assert torch.equal(torch.rand(3), expected)
