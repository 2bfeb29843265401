"""run.py: optimizer, learning rates, initial models, frozen teachers."""

import itertools
import math
import platform
import threading

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import pretrained
import run
import udon
from config import METHODS, Config, ConfigError
from model import SIZES, UDON, ViT

CLASSES = {"birds": 5, "cars": 3}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "antialias": True}
HALF["interpolation"] = "bilinear"
TINY = dict(image_size=16, patch_size=8, width=24, depth=2, heads=2)
SMALL = dict(preset="micro", init="scratch", image_size=32)


def tiny_model(seed=0, classes=CLASSES, **changes):
    torch.manual_seed(seed)
    return UDON(ViT(**TINY), classes, **{"student_dim": 6, "teacher_dim": 10, **changes})


def run_of(config, steps_per_epoch=10):
    model = tiny_model()
    return run.Run(
        config=config,
        model=model,
        architecture={},
        preprocessing=HALF,
        optimizer=run.build_optimizer(model, config),
        sampler=None,
        device="cpu",
        steps_per_epoch=steps_per_epoch,
        digests={},
    )


# Optimizer and learning rates ---------------------------------------------------------------------


def test_each_parameter_is_in_exactly_one_group():
    model = tiny_model()
    backbone, heads = run.build_optimizer(model, Config()).param_groups
    assert set(backbone["params"]) == set(model.backbone.parameters())
    assert not set(backbone["params"]) & set(heads["params"])
    assert set(backbone["params"]) | set(heads["params"]) == set(model.parameters())
    assert len(backbone["params"]) + len(heads["params"]) == len(list(model.parameters()))


def test_the_optimizer_is_the_published_one():
    for group in run.build_optimizer(tiny_model(), Config(weight_decay=0.3)).param_groups:
        values = [group[name] for name in ("betas", "eps", "weight_decay", "amsgrad")]
        assert values == [(0.9, 0.999), 1e-8, 0.3, False]


@pytest.mark.parametrize("schedule, warmup", [*itertools.product(("constant", "cosine"), (0, 4))])
def test_learning_rates(schedule, warmup):
    rates = dict(head_lr=1e-3, backbone_lr=1e-4)
    options = dict(schedule=schedule, warmup_steps=warmup, steps=20, frozen_epochs=0.7)
    one = run_of(Config(**rates, **options))
    for one.step in range(20):
        factor = min((one.step + 1) / (warmup + 1), 1)
        if schedule == "cosine":
            factor *= (1 + math.cos(math.pi * one.step / 20)) / 2
        backbone, heads = run.learning_rates(one)
        assert heads == pytest.approx(1e-3 * factor), one.step
        assert backbone == pytest.approx(0 if one.step < 7 else 1e-4 * factor), one.step


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, 10 * 22118),  # facts of UnED: 44,236 of 221,180 steps are frozen
        ({"epochs": 0.5}, 11059),
        ({"epochs": 1e-9}, 1),
        ({"steps": 7}, 7),
        ({"steps": 7, "min_steps": 9}, 7),
        ({"min_steps": 221_179}, 221_180),
        ({"min_steps": 221_182}, 221_182),
        ({"min_steps": 500_000}, 2 * 221_180),
        ({"method": "backbone", "min_steps": 9}, 0),
        ({"method": "backbone"}, 0),
    ],
)
def test_the_length_of_a_run(options, steps):
    one = run_of(Config(**options), steps_per_epoch=2831222 // 128)
    assert (one.steps, one.frozen_steps) == (steps, 44236)


def test_validation_is_due_at_the_start_each_epoch_and_at_the_end():
    one = run_of(Config(steps=24))
    due = []
    for one.step in range(25):
        if one.needs_validation:
            due.append(one.step)
            one.validated = one.step
        assert not one.needs_validation
    assert due == [0, 10, 20, 24]


# Initial models -----------------------------------------------------------------------------------


def test_the_initial_model_is_a_function_of_the_configuration():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model, architecture, preprocessing = run.build_model(Config(**SMALL), CLASSES)
    assert torch.equal(torch.rand(3), expected), "the global random state has changed"
    again, other = (run.build_model(Config(**SMALL, seed=s), CLASSES)[0] for s in (0, 1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(model.student_head.weight, other.student_head.weight)
    rebuilt = checkpoint.build(architecture).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert preprocessing == HALF


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_train_teachers_have_them(method):
    teachers = {"teachers": "best.pt"} if method == "distill" else {}
    model, _, _ = run.build_model(Config(**SMALL, method=method, **teachers), CLASSES)
    assert set(model.teacher_heads) == (
        set(CLASSES) if method in ("udon", "udon-joint", "teachers") else set()
    )


@pytest.mark.parametrize("preset", ["mini", "micro"])
def test_compact_weights_are_the_start_of_the_presets(preset):
    model, architecture, _ = run.build_model(Config(preset=preset), CLASSES)
    scratch, _, _ = run.build_model(Config(preset=preset, init="scratch"), CLASSES)
    weight = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(
        model.backbone.state_dict()[weight], scratch.backbone.state_dict()[weight]
    )
    assert architecture["backbone"] == model.backbone.architecture


def test_public_weights_fill_the_backbone_and_its_preprocessing(tmp_path):
    torch.manual_seed(3)
    public = ViT(32, 16, 384, 12, 6)
    torch.save(public.state_dict(), tmp_path / "vit.pth")
    config = Config(model="s16", image_size=32, init=str(tmp_path / "vit.pth"))
    model, architecture, preprocessing = run.build_model(config, CLASSES)
    assert torch.equal(model.backbone.blocks[3].mlp.fc1.weight, public.blocks[3].mlp.fc1.weight)
    assert architecture["backbone"]["activation"] == "gelu" and preprocessing == HALF
    config = Config(
        model="s16", image_size=32, init=config.init, init_statistics="imagenet", antialias=False
    )
    preprocessing = run.build_model(config, CLASSES)[2]
    assert preprocessing["mean"] == (0.485, 0.456, 0.406) and preprocessing["antialias"] is False


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_activation_of_weights_that_do_not_tell_it(tmp_path, activation):
    public = ViT(32, 16, 384, 12, 6, pre_norm=True)
    torch.save(public.state_dict(), tmp_path / "clip.pth")
    options = dict(model="s16", image_size=32, init=str(tmp_path / "clip.pth"))
    config = Config(**options, init_activation=activation)
    assert run.build_model(config, CLASSES)[1]["backbone"]["activation"] == activation


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"image_size": 50}, "image size 50"),
        ({"model": "s16", "init": "compact"}, "--init is compact with --model s16"),
    ],
)
def test_models_that_cannot_be_built(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        run.build_model(Config(**{**SMALL, **options}), CLASSES)


def test_the_clip_preset_takes_weights_of_clip_alone(tmp_path):
    public = ViT(**SIZES["s16"] | {"image_size": 32})
    torch.save(public.state_dict(), tmp_path / "vit.pth")
    options = dict(preset="uned-b16-clip", model="s16", image_size=32)
    with pytest.raises(ConfigError, match="--preset uned-b16-clip takes weights of CLIP"):
        run.build_model(Config(**options, init=str(tmp_path / "vit.pth")), CLASSES)
    preprocessing = run.build_model(Config(**options), CLASSES)[2]
    assert preprocessing["mean"] == pretrained.CLIP.mean


def test_bf16_is_refused_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(run.Path, "exists", lambda path: False)
    with pytest.raises(ConfigError, match="--precision is bf16, which this CPU"):
        run.check_precision("bf16", "cpu")
    run.check_precision("fp32", "cpu")
    run.check_precision("bf16", "cuda:0")


def test_a_compiled_backbone_computes_the_same():
    model, images = tiny_model(), torch.rand(3, 3, 16, 16)
    expected = model.embed(images)
    run.prepare_backbone(model, Config(compile=True), "cpu")
    torch.testing.assert_close(model.embed(images), expected, rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_a_compiler_that_does_not_work(monkeypatch):
    def fail(function):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match=r"--compile cannot .*\(No working C\+\+ compiler"):
        run.prepare_backbone(tiny_model(), Config(compile=True), "cpu")


# Frozen teachers ----------------------------------------------------------------------------------


def specialists():
    """A model of one domain each, without teachers of its own."""
    return {
        domain: tiny_model(seed, {domain: count}, student_dim=12, teacher_dim=0)
        for seed, (domain, count) in enumerate(CLASSES.items(), 1)
    }


@pytest.mark.parametrize("kind", ["specialists", "one model of all domains"])
def test_distillation_from_frozen_teachers(kind):
    """Three losses of equal weight from their formulas; nothing of the teachers is trained."""
    if kind == "specialists":
        models = specialists()
        embed = models["cars"].embed
        classes = models["cars"].student_classifiers["cars"].weight
    else:
        teacher = tiny_model(1)
        models = dict.fromkeys(CLASSES, teacher)
        classes = teacher.teacher_classifiers["cars"].weight

        def embed(images):
            return teacher.teacher_heads["cars"](teacher.embed_backbone(images))

    model, teachers = tiny_model(teacher_dim=0), run.FrozenTeachers(models)
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 2, 1, 1, 2])
    options = dict(weights=Config(method="distill", teachers="x").weights, teachers=teachers)
    losses = udon.compute_losses(
        model, images, labels, "cars", distill_into_backbone=True, **options
    )
    vectors, student = embed(images), model.embed(images)
    cosines = student @ F.normalize(model.student_classifiers["cars"].weight, dim=1).T
    p = (10 * vectors @ F.normalize(classes, dim=1).T).softmax(1)
    terms = [
        F.cross_entropy(16 * cosines, labels),
        (p * (p / (10 * cosines).softmax(1)).log()).sum(1).mean(),
        32 * (student @ student.T - vectors @ vectors.T).square().mean(),
    ]
    expected = [x.item() for x in terms]
    assert losses.teacher_classification is None
    assert [x.item() for x in losses[2:]] == pytest.approx(expected, rel=1e-4)
    assert losses.total.item() == pytest.approx(sum(expected) / 3, rel=1e-4)
    losses.total.backward()
    assert all(p.grad is None for teacher in models.values() for p in teacher.parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("student_classifiers.birds"), name


def save(path, model, **changes):
    path.parent.mkdir(exist_ok=True)
    architecture = {
        "backbone": model.backbone.architecture,
        "classes": {domain: c.out_features for domain, c in model.student_classifiers.items()},
        "student_dim": 12,
        "teacher_dim": 0,
        "head_layers": 1,
    }
    contents = {
        "model": model.state_dict(),
        "architecture": architecture,
        "preprocessing": HALF,
        "step": 1,
        "embedding": "student",
        "index": "merged",
        "config": {"data": None, "domains": None},
        "run": "1",
    }
    checkpoint.save(path, contents | changes)


def test_teachers_are_loaded_from_a_directory_of_runs(tmp_path):
    older = {name: value for name, value in HALF.items() if name != "interpolation"}
    for (domain, model), preprocessing in zip(specialists().items(), (HALF, older)):
        save(tmp_path / domain / "best.pt", model, preprocessing=preprocessing)
    config = Config(method="distill", teachers=str(tmp_path))
    teachers = run.load_teachers(config, CLASSES, 16, HALF, "cpu")
    images = torch.randn(2, 3, 16, 16)
    for domain, model in specialists().items():
        vectors, classifier = teachers(images, domain)
        assert torch.equal(vectors, model.embed(images))
        assert torch.equal(classifier.weight, model.student_classifiers[domain].weight)
        assert not vectors.requires_grad and not classifier.weight.requires_grad


@pytest.mark.parametrize(
    "classes, size, preprocessing, sentence",
    [
        ({"birds": 5, "cars": 4}, 16, HALF, "know 3 classes of domain cars, which has 4"),
        ({"birds": 5}, 48, HALF, "take 16 pixels .* 48"),
        ({"birds": 5}, 16, {**HALF, "antialias": False}, "--init and --antialias"),
        ({"birds": 5}, 16, {**HALF, "interpolation": "bicubic"}, "bicubic.*the same .*--model"),
        ({"plants": 5}, 16, HALF, "plants"),
    ],
)
def test_teachers_of_other_data_or_images(tmp_path, classes, size, preprocessing, sentence):
    for domain, model in specialists().items():
        save(tmp_path / domain / "best.pt", model)
    config = Config(method="distill", teachers=str(tmp_path))
    with pytest.raises((ConfigError, checkpoint.CheckpointError), match=sentence):
        run.load_teachers(config, classes, size, preprocessing, "cpu")


def test_one_teacher_checkpoint_must_know_every_domain(tmp_path):
    save(tmp_path / "best.pt", specialists()["cars"])
    config = Config(method="distill", teachers=str(tmp_path / "best.pt"))
    with pytest.raises(ConfigError, match="know no classes of domain birds, which has 5"):
        run.load_teachers(config, CLASSES, 16, HALF, "cpu")


# Runs ---------------------------------------------------------------------------------------------


def test_the_sampler_needs_a_period_of_at_least_the_domains(uned, monkeypatch):
    """It is refused before the backbone sees all training images."""
    benchmark = data.Benchmark(uned)
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    config = Config(**SMALL, out="x", device="cpu", period=1)
    with monkeypatch.context() as context, pytest.raises(ConfigError, match="period"):
        context.setattr(run.heads, "start_from_images", lambda *_: pytest.fail("too late"))
        run.build_run(config, splits)
    one = run.build_run(Config(**SMALL, out="x", device="cpu", batch_size=4), splits)
    assert one.steps_per_epoch == 10 and one.model.student_classifiers.keys() == {"birds", "cars"}


def test_a_running_mean_needs_a_backbone_that_can_be_copied(uned):
    benchmark = data.Benchmark(uned)
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    own.width, own.lock = 8, threading.Lock()
    options = dict(image_size=32, device="cpu", out="x", student_init="lecun")
    with pytest.raises(ConfigError, match="--ema needs a copy .* give --ema 0"):
        run.build_run(Config(**options, ema=0.9), splits, backbone=own)
    assert run.build_run(Config(**options), splits, backbone=own).average is None


def test_without_training_there_is_no_running_mean(uned):
    benchmark = data.Benchmark(uned)
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    config = Config(preset="micro", method="backbone", device="cpu", out="x")
    assert run.build_run(config, splits).average is None


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_used_again():
    """40 MB in blocks of 8 MB, in the end without new pages from the system."""
    resource = pytest.importorskip("resource")
    run.keep_freed_memory()
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.zeros(2**21) for _ in range(5)]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del blocks
    assert faults[-1] < 1000, faults
