"""UDON, Universal Dynamic Online distillatioN (NeurIPS 2024): one embedding for many domains.

    python udon.py train                                 # procedural domains: nothing to download
    python udon.py train --data DIR --out runs/real      # your images: UnED layout or class folders
    python udon.py train --out runs/real --resume        # continues an interrupted run

A run ends with a table of R@1 and mMP@5 on test classes, beside the backbone as pre-trained:
`mean   ...   82.44   68.56   34.04   22.28`.

    compute_losses(model, images, labels, domain)   the method for one batch -> Losses
    training_step(run, batches)                     one step of Figure 2
    train(config)                                   a whole run -> the contents of test.json

B batch, D backbone width, S student width, T teacher width, C classes of the batch's domain.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import checkpoint
import config as options
import data
import distributed
import evaluate
import features
import plan
import pretrained
import rundir
from checkpoint import CheckpointError
from config import Config, ConfigError
from large_classes import MANY_CLASSES, large_class_losses
from losses import classification_loss, logit_distillation_loss, relational_distillation_loss
from model import UDON
from plan import Progress, describe, inference_parameters, spent
from run import (
    FrozenTeachers,
    NotFinite,
    Run,
    build_model,
    build_optimizer,
    build_run,
    copy_of,
    finite_numbers,
    learning_rates,
    products,
    update_average,
)

__all__ = [
    "Config",
    "FrozenTeachers",
    "Losses",
    "Run",
    "build_model",
    "build_optimizer",
    "build_run",
    "compute_losses",
    "learning_rates",
    "train",
    "training_step",
]

# The method ---------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Scalars; None for a loss that is not computed because its weight is 0."""

    total: torch.Tensor
    teacher_classification: torch.Tensor | None
    student_classification: torch.Tensor | None
    logit_distillation: torch.Tensor | None
    relational_distillation: torch.Tensor | None


# Which loss trains what (paper section 3). Classifiers and teacher head are those of the batch's
# domain. Those of other domains receive no gradient, except their student classifiers from
# student_classification where the negatives are those of all domains.
#
#                             backbone  student   student     teacher  teacher
#                                       head      classifier  head     classifier
#   teacher_classification       x                               x         x
#   student_classification       x         x          x
#   logit_distillation          (x)        x          x
#   relational_distillation     (x)        x
#
#   (x): only with distill_into_backbone, the official code's rule.


def compute_losses(
    model: UDON,
    images: torch.Tensor,
    labels: torch.Tensor,
    domain: str,
    *,
    weights: tuple[float, float, float, float] = (1, 1, 1, 1),
    relational_scale: float = 32.0,
    distill_into_backbone: bool = False,
    classification: str = "normface",
    margin: float = 0.0,
    scale: float = 16.0,
    temperature: float = 0.1,
    negatives: str = "domain",
    domain_margin: float = 0.0,
    teachers: Callable | None = None,
    part: float = 1.0,
    whole: Callable | None = None,
) -> Losses:
    """The losses of images (B, 3, H, W) and labels (B,) in 0..C-1, all of one domain.

    weights    of the losses in the order of `Losses`, whose total is the weighted mean; a loss of
               weight 0 is not computed
    negatives  "domain": the student's classification loss is over the domain's C classes, as
               published; "all": over those of all domains, with domain_margin added to the cosines
               of the others, so that the student separates the domains
    teachers   (images, domain) -> embedding (B, T), classifier with weights (C, T): frozen teachers
               to distil from instead of the model's own
    part       share of these images, and of their losses, in a batch that is computed in parts
    whole      (student, teacher) -> (A, S), (A, T) of the whole batch, for the relational loss
    The other arguments: see losses.py. Raises ValueError for weights that are not four, are all 0,
    need a teacher that the model does not have, or train frozen ones. Source: paper section 3.
    """
    backbone, student, teacher = model.embed_all(images, domain)  # backbone once, both heads
    own, others, teacher_classifier = classifiers_of(model, domain, negatives)
    if teachers is not None:
        teacher, teacher_classifier = teachers(images, domain)
    check_weights(weights, teacher, teachers is not None)
    distilled = student
    if not distill_into_backbone and any(weights[2:]):  # the same values, but no gradient beyond
        distilled = model.student_head(backbone.detach())
    batch = Batch(labels, student, distilled, teacher, own, others, teacher_classifier)
    is_large = sum(len(one.weight) for one in (own, *others)) > MANY_CLASSES
    losses = (large_losses if is_large else class_losses)(
        batch,
        weights,
        domain_margin,
        temperature,
        dict(scale=scale, margin=margin, kind=classification),
    )
    relational = None
    if weights[3] > 0:
        pair = whole and whole(distilled, teacher)
        relational = relational_distillation_loss(
            distilled, teacher, scale=relational_scale, whole=pair
        )
    losses = [*(loss if loss is None else part * loss for loss in losses), relational]
    total = sum(weight * loss for weight, loss in zip(weights, losses) if weight > 0)
    return Losses(total / sum(weights), *losses)


class Batch(NamedTuple):
    """What the losses over the classes of a domain are computed from. Classifiers give cosines."""

    labels: torch.Tensor  # (B,)
    student: torch.Tensor  # (B, S), trains the backbone, too
    distilled: torch.Tensor  # (B, S), the same values, for the distillation losses
    teacher: torch.Tensor | None  # (B, T), the target of distillation
    own: nn.Module  # the student's classifier of the domain
    others: list[nn.Module]  # those of other domains, if their classes are negatives, too
    teacher_classifier: nn.Module | None


def classifiers_of(model, domain, negatives) -> tuple[nn.Module, list[nn.Module], nn.Module | None]:
    """The last three fields of a Batch, with the model's own teacher."""
    own = model.student_classifiers[domain]
    others = [c for other, c in model.student_classifiers.items() if other != domain]
    teacher = model.teacher_classifiers[domain] if model.teacher_heads else None
    return own, others if negatives == "all" else [], teacher


def class_losses(batch: Batch, weights, domain_margin, temperature, settings) -> list:
    """Classification of the teacher and of the student, and logit distillation."""
    losses = [None] * 3
    if weights[0] > 0 or weights[2] > 0:
        teacher_cosines = batch.teacher_classifier(batch.teacher)  # (B, C)
    if weights[0] > 0:
        losses[0] = classification_loss(teacher_cosines, batch.labels, **settings)
    if weights[1] > 0:
        others = [other(batch.student) + domain_margin for other in batch.others]
        cosines = torch.cat([batch.own(batch.student), *others], dim=1)  # (B, C) or (B, all)
        losses[1] = classification_loss(cosines, batch.labels, **settings)
    if weights[2] > 0:  # detaches the teacher, as relational distillation does
        losses[2] = logit_distillation_loss(
            batch.own(batch.distilled),
            teacher_cosines,
            student_temperature=temperature,
            teacher_temperature=temperature,
        )
    return losses


def large_losses(batch: Batch, weights, domain_margin, temperature, settings) -> list:
    """class_losses for very many classes: in chunks, without a matrix (B, C)."""
    losses, targets = [None] * 3, ()
    if weights[0] > 0:
        losses[0], _ = large_class_losses(
            batch.teacher, [batch.teacher_classifier.weight], batch.labels, **settings
        )
    if weights[2] > 0:
        targets = batch.distilled, batch.teacher, batch.teacher_classifier.weight
    if weights[1] > 0 or weights[2] > 0:
        losses[1:] = large_class_losses(
            batch.student,
            [classifier.weight for classifier in (batch.own, *batch.others)],
            batch.labels if weights[1] > 0 else None,
            *targets,
            temperature=temperature,
            domain_margin=domain_margin,
            **settings,
        )
    return losses


def check_weights(weights, teacher, is_frozen):
    """Raises ValueError for weights that are not four, are all 0, need a teacher that is None or
    train a frozen one."""
    if len(weights) != 4 or not sum(weights) > 0:
        raise ValueError(f"weights are {weights}: give four, one for each loss, not all 0")
    if weights[0] > 0 and is_frozen:
        raise ValueError(f"weights are {weights}: with frozen teachers the first must be 0")
    if teacher is None and (weights[0] > 0 or any(weights[2:])):
        raise ValueError(f"weights are {weights}, but the model has no teachers: use (0, 1, 0, 0)")


def training_step(run: Run, batches: Iterator) -> tuple[str, Losses, float]:
    """One step of Figure 2 -> domain, Losses as numbers, seconds spent waiting for the batch."""
    config, optimizer = run.config, run.optimizer

    # 1. The sampler chooses the domain; all images of the batch belong to it.
    started = time.perf_counter()
    domain, images, labels = next(batches)
    waited = time.perf_counter() - started

    # 2. Images (B, 3, H, W) uint8 to the device, normalised with the statistics of the backbone.
    #    With --freeze-backbone features (B, D), which take the place of the images in the model.
    images = run.inputs(images)
    labels = labels.to(run.device, non_blocking=True)

    # 3. The learning rates of this step; a frozen backbone needs no gradient.
    for group, rate in zip(optimizer.param_groups, learning_rates(run)):
        group["lr"] = rate
    for parameter in optimizer.param_groups[0]["params"]:  # those of the backbone
        parameter.requires_grad_(run.step >= run.frozen_steps)

    # 4. Backbone -> student and teacher -> cosines with the domain's classifiers -> losses.
    #    Random layers of a backbone of one's own, such as dropout, draw a function of the step.
    # 5. Their gradients; the table above shows which loss trains what.
    torch.manual_seed(hash((config.seed, run.step)))
    optimizer.zero_grad(set_to_none=True)
    losses = losses_and_gradients(run, images, labels, domain)

    # 6. A loss or gradient that is not finite stops the run before it reaches the weights.
    values = Losses(**finite_numbers(run, domain, losses._asdict()))

    # 7. AdamW. A head without gradient is skipped; with a zero gradient its momentum moves it.
    if config.inactive_heads == "zero":
        for parameter in optimizer.param_groups[1]["params"]:
            if parameter.grad is None:
                parameter.grad = run.zeros[: parameter.numel()].view_as(parameter)
    optimizer.step()
    run.step += 1
    update_average(run)

    # 8. The sampler observes how hard the domain still is.
    signal = getattr(values, f"{config.signal}_classification")
    if signal is not None:
        run.sampler.observe(domain, signal)
    return domain, values, waited


def losses_and_gradients(run, images, labels, domain) -> Losses:
    """The losses of a batch, and the gradients of their total.

    The images are this process's share of the batch. With --accumulate they are taken in pieces, so
    that the activations of one piece at a time are in memory. The gradients are those of the whole
    batch in both cases: the relational loss, over all pairs, gets the embeddings of all. The losses
    that are returned are this process's share of those of the whole batch.
    """
    config = run.config
    count = len(labels) if distributed.size() == 1 else config.batch_size
    pieces = list(zip(images.chunk(config.accumulate), labels.chunk(config.accumulate)))
    whole = whole_batch(run, [piece for piece, _ in pieces], domain, count)
    sums = [None] * len(Losses._fields)
    for piece, piece_labels in pieces:
        run.gradients.active = piece is pieces[-1][0]
        losses = losses_of(run)(
            *(run.model, piece, piece_labels, domain), part=len(piece) / count, whole=whole
        )
        losses.total.backward()
        terms = [None if loss is None else loss.detach() for loss in losses]
        sums = [term if sum_ is None else sum_ + term for sum_, term in zip(sums, terms)]
    run.gradients.finish()
    return Losses(*sums)


def whole_batch(run, pieces, domain, count) -> Callable | None:
    """The `whole` of compute_losses for these pieces of `count` images on all processes."""
    if len(pieces) > 1 and run.config.weights[3] > 0:
        parts = zip(*(embed_pair(run, piece, domain) for piece in pieces))
        batch = [distributed.gathered(torch.cat(part), count) for part in parts]
        return lambda student, teacher: batch
    if distributed.size() > 1:
        return lambda *pair: [distributed.gathered(part, count) for part in pair]
    return None


def losses_of(run) -> Callable:
    """compute_losses with the options of a run."""
    settings = {name: getattr(run.config, name) for name in LOSS_OPTIONS}
    return functools.partial(compute_losses, teachers=run.teachers, **settings)


@torch.no_grad()
def embed_pair(run, images, domain):
    """The embeddings (B, S), (B, T) of the student and the teacher that it is distilled from."""
    _, student, teacher = run.model.embed_all(images, domain)
    return student, teacher if run.teachers is None else run.teachers(images, domain)[0]


LOSS_OPTIONS = (
    *("weights", "relational_scale", "distill_into_backbone", "classification", "margin"),
    *("scale", "temperature", "negatives", "domain_margin"),
)


# The run ------------------------------------------------------------------------------------------


def train(config: Config, resume: bool = False, backbone: nn.Module | None = None) -> dict:
    """Trains to the end, writes the directory of the run, prints the test table.

    backbone  a module of one's own, (B, 3, H, W) -> (B, D), with an attribute `width`, D, in place
              of config.model and config.init. Images have the side config.image_size and the
              statistics config.init_statistics, 0.5 without it. It is trained in place, and needed
              again to resume and for checkpoint.load(path, backbone=module). What of it does not
              require a gradient stays as it is, and must be the same to resume. With BatchNorm or
              dropout in training mode, batches cannot be divided among processes or by
              config.accumulate.

    Then trains the methods of config.compare with the same options, and prints all in one table.
    Returns the contents of test.json. With `resume`, continues from last.pt in config.out; the
    final weights equal those of an uninterrupted run bit for bit (on a CPU with the same number of
    threads). The first SIGINT or SIGTERM ends the step, saves and raises SystemExit. Raises
    ConfigError, RunError, InputError, CheckpointError or WeightsError for unusable input.
    """
    if resume and config.out is None:
        raise ConfigError("config.out is None: to resume, set it to the directory of the run")
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.processes(config.device))
        check_processes(config, resume)
        out = own_directory(stack, config.out, resume)
        distributed.remember("directory", str(config.out))
        config = dataclasses.replace(config, out=str(out))
        runs = [(config, resume)]
        for method in config.compare:  # checked and locked before hours of training
            other = options.with_method(config, method, out / method)
            started = (Path(other.out) / "last.pt").exists()
            own_directory(stack, other.out, started)
            if started:
                options.check_same(other, saved_config(Path(other.out)), other.out)
            runs.append((other, started))
        interruption = stack.enter_context(rundir.Interruption(out))
        benchmark = data.Benchmark(config.data, config.domains, on_bad_image=config.on_bad_image)
        results = {}
        copies = (copy_of(backbone, "--compare", "leave it out") for _ in config.compare)
        backbones = [backbone, *copies]
        for (one, started), own in zip(runs, backbones):
            if results:
                print(f"\n{one.method}, for comparison:")
            results[one.method] = train_one(one, started, interruption, benchmark, own)
        if config.compare:
            print(f"\n{', '.join(results)} beside the backbone before training, test queries:")
            print(evaluate.table(results | {"backbone": results[config.method]["backbone"]}))
    return results[config.method]


def check_processes(config: Config, resume: bool = False) -> None:
    """Raises DistributedError unless all processes have the same options, ConfigError unless each
    has an image of a batch."""
    values = {options.flag(name): value for name, value in dataclasses.asdict(config).items()}
    distributed.require_same(values | {"--resume": resume})
    if config.batch_size < distributed.size():
        raise ConfigError(
            f"--batch-size is {config.batch_size}, but there are {distributed.size()} "
            "processes, each of which takes an image or more: start fewer"
        )


def own_directory(stack: contextlib.ExitStack, out: str | None, resume: bool) -> Path:
    """Makes and locks the directory of a run, on rank 0 for all processes. Raises RunError if one
    of them does not see it."""
    if distributed.rank() == 0:
        out = stack.enter_context(rundir.run_directory(out, resume))
    out = distributed.agreed(out)
    owner = Path(out) / "owner"
    owners = distributed.collected(owner.read_text("utf-8") if owner.exists() else None)
    seen = [found == owners[0] for found in owners]
    if not all(seen):
        raise rundir.RunError(
            f"--out {out} of rank 0 is not there for rank {seen.index(False)}: give a directory "
            "that all machines share"
        )
    return out


def train_one(
    config: Config,
    resume: bool,
    interruption: rundir.Interruption,
    benchmark: data.Benchmark,
    backbone: nn.Module | None = None,
) -> dict:
    """`train` without comparisons, in a directory that exists."""
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    state = rundir.load_last(Path(config.out), backbone) if resume else None
    run = build_run(config, splits, state, backbone)
    run.gradients = distributed.GradientSum(run.model.parameters())
    run.identity = distributed.agreed(run.identity)
    describe(run, splits, losses_of(run))
    size = run.architecture["backbone"]["image_size"]
    resizing = data.resizing(run.preprocessing)
    open_sets = functools.partial(evaluate.open_sets, benchmark, **resizing)
    repeated = not config.freeze_backbone  # whether images are decoded more than once
    if config.freeze_backbone:
        directory = interruption.out / "features" / "test"  # the runs of --compare share it
        run.features = features.TestFeatures(directory, run.model, run.preprocessing)
    test_sets, val_sets = open_sets("test", size), open_sets("val", size, keep=repeated)
    same = evaluate.digests(val_sets) | evaluate.digests(test_sets) | {"the step": run.step}
    distributed.require_same(same)
    evaluate.check_validation(val_sets)
    evaluate.note_memory(test_sets, run.model.backbone.width)
    batches = image_batches(config, splits, size, repeated, resizing)
    for note in benchmark.notes:
        print(f"note: {note}")
    if resume:
        how = f", restart {distributed.restarts()} by torchrun" if distributed.restarts() else ""
        print(f"resumed at step {run.step:,} of {run.steps:,}{how}")
    else:
        run.backbone = test(run, test_sets, "backbone")
        mean = 100 * run.backbone["mean"]["recall_at_1"]
        print(f"backbone before training: mean R@1 {mean:.2f} on test")
    if distributed.rank() == 0:
        metrics = rundir.MetricsLog(run.out / "metrics.jsonl", state and state[1]["metrics"])
    else:
        metrics = rundir.MetricsLog(Path(os.devnull))
    with contextlib.closing(metrics):
        run.save(metrics)
        if distributed.rank() == 0:
            write_config(config)
            (run.out / "stopped.json").unlink(missing_ok=True)
        gpus = [run.device] if run.device.startswith("cuda") else []
        with products("high"), run.freezing(), torch.random.fork_rng(gpus):
            if config.freeze_backbone and run.step < run.steps:
                batches = feature_batches(run, batches, interruption)
            with contextlib.closing(open_stream(run, batches)) as stream:  # ends the processes, too
                fit(run, batches, stream, val_sets, metrics, interruption)
        results = finish(run, test_sets, metrics)
    skipped = benchmark.skipped
    if skipped and distributed.rank() == 0:
        checkpoint.write_json(run.out / "skipped.json", skipped)
        print(f"skipped {len(skipped)} images, listed in {run.out / 'skipped.json'}")
    return results


def write_config(config: Config) -> None:
    checkpoint.write_json(Path(config.out) / "config.json", dataclasses.asdict(config))


def image_batches(config, splits, size, keep, resizing) -> data.TrainBatches:
    """The training batches of images; with `keep`, these stay in memory where they fit."""
    return data.TrainBatches(
        *(splits, size, config.batch_size, config.seed),
        min_area=config.min_area,
        share=distributed.share(config.batch_size),
        keep=keep,
        **resizing,
    )


def feature_batches(run, images, interruption) -> features.FeatureBatches:
    """The training batches as features of the frozen backbone, which are computed where they are
    missing; the runs of --compare share them."""
    config, directory = run.config, interruption.out / "features"
    settings = (config.views, run.preprocessing, config.workers, interruption)
    return features.FeatureBatches(
        images, features.computed(directory, run.model, images, *settings)
    )


def open_stream(run, batches) -> Iterator:
    """The batches of all steps to come."""
    workers = 0 if batches.in_memory else run.config.workers
    if not run.config.freeze_backbone:
        how = f"by {workers} processes" if workers else "once and kept in memory"
        print(f"training images decoded {how}")
    return data.stream(batches, run.sampler, run.step, run.steps, workers)


def fit(run: Run, batches: data.TrainBatches, stream, val_sets, metrics, interruption) -> None:
    """Trains from run.step to the end; writes metrics.jsonl, last.pt and best.pt."""
    config, progress = run.config, Progress(run)
    run.model.train()
    while True:
        if run.needs_validation:
            run.save(metrics)  # so that a signal during validation may end it at once
            interruption.polled = False
            if interruption.requested:
                interruption.stop()
            for split in batches.splits.values():
                data.share_bad_rows(split)
            started = time.perf_counter()
            validate(run, val_sets, metrics)
            progress.validated(time.perf_counter() - started)
            run.save(metrics)
        interruption.polled = True
        if run.step >= run.steps:
            break
        try:
            domain, losses, seconds, waited = logged_step(run, stream, metrics)
        except NotFinite as error:
            if distributed.rank() == 0:
                files = batches.files(run.step, error.about["domain"])
                checkpoint.write_json(run.out / "stopped.json", error.about | {"files": files})
            raise
        progress.add(domain, losses.total, seconds, waited)
        requested = distributed.largest(interruption.requested)  # by any process
        if requested or run.step % config.save_every == 0:
            run.save(metrics)
        if requested:
            distributed.agreed(None)  # rank 0 has saved: torchrun stops all when one has ended
            interruption.requested = requested
            interruption.stop()
    interruption.polled = False
    if interruption.requested:
        interruption.stop()


def logged_step(run, stream, metrics) -> tuple[str, Losses, float, float]:
    """A training step and its line in metrics.jsonl -> domain, losses, seconds of the step and of
    those the ones spent waiting for data."""
    started, cpu_started = time.perf_counter(), time.process_time()
    rates = dict(zip(("backbone_lr", "head_lr"), learning_rates(run)))
    domain, losses, waited = training_step(run, stream)
    seconds = time.perf_counter() - started
    times = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu_started}
    values = {name: value for name, value in losses._asdict().items() if value is not None}
    metrics.write({"step": run.step, "domain": domain, **values, **rates, **times})
    return domain, losses, seconds, waited


def validate(run, val_sets, metrics):
    """Writes R@1 and mMP@5 of the val queries to metrics.jsonl, the best model to best.pt."""
    run.check_finite()
    results = test(run, val_sets, run.config.embedding)
    means = results["mean"]
    run.model.train()
    # R@1 alone varies so much that it may choose an early step. Of equal scores, the later one.
    run.validated, better = run.step, score(means) >= score(run.best)
    if better:
        run.best = {"step": run.step, **means}
        if distributed.rank() == 0:
            checkpoint.save(run.out / "best.pt", run.contents())
    domains = {
        domain: {name: row[name] for name in evaluate.METRICS}
        for domain, row in results["domains"].items()
    }
    weights = run.sampler.weights
    metrics.write(
        {"step": run.step, "val": means, "val_domains": domains, "sampler_weights": weights}
    )
    print(
        f"step {run.step:,} validation: mean R@1 {100 * means['recall_at_1']:.2f}, "
        f"mMP@5 {100 * means['mmp_at_5']:.2f}{' (best so far)' if better else ''}",
        flush=True,
    )


def score(means: dict) -> float:
    """By which validations are compared: R@1 + mMP@5, in [0, 2]."""
    return means["recall_at_1"] + means["mmp_at_5"]


def test(run, sets, embedding):
    with products("highest"):
        return evaluate.evaluate(
            *(run.evaluated, sets, run.preprocessing),
            index=run.config.index,
            embedding=embedding,
            features=run.features,
        )


def finish(run: Run, test_sets: dict, metrics: rundir.MetricsLog) -> dict:
    """Tests best.pt, writes test.json and prints the table."""
    config, best = run.config, run.out / "best.pt"
    distributed.agreed(None)  # rank 0 has written best.pt
    trained = sum(parameter.numel() for parameter in run.optimizer.state)
    own = run.model.backbone if "module" in run.architecture["backbone"] else None
    run.model, contents = checkpoint.load(best, run.device, own)
    run.average = None
    if (contents["run"], contents["step"]) != (run.identity, run.best["step"]):
        raise CheckpointError(f"{best} is not of step {run.best['step']} of this run: restore it")
    results = test(run, test_sets, config.embedding) | {
        "checkpoint": str(best),
        "step": contents["step"],
        "data": config.data,
        "split": "test",
        "index": config.index,
        "embedding": config.embedding,
        "backbone": run.backbone,
        "method": config.method,
        "val_recall_at_1": run.best["recall_at_1"],
        "val_mmp_at_5": run.best["mmp_at_5"],
        "parameters": {"trained": trained, "inference": inference_parameters(run)},
        **spent(metrics, test_sets, config.batch_size),
    }
    results = distributed.agreed(results)
    if distributed.rank() == 0:
        checkpoint.write_json(run.out / "test.json", results)
    print(f"\n{best}, step {contents['step']:,}: test queries, {config.index} index")
    print(evaluate.table({config.method: results, "backbone": run.backbone}))
    if results["mean"]["recall_at_1"] <= run.backbone["mean"]["recall_at_1"] and run.steps:
        print(
            f"R@1 of the trained {config.embedding} embedding is not above that of the backbone "
            "alone; few images or classes are a common cause: try fewer --epochs or a lower "
            "--backbone-lr"
        )
    arguments = [str(best), *(["--data", config.data] if config.data else [])]
    if own is None:
        run_name = shlex.quote(str(run.out))
        print(f"search pictures: python search.py embed {run_name} DIR --out photos.npz")
        print(f"evaluate again: python evaluate.py {shlex.join(arguments)}")
    return results


def dry_run(config: Config) -> None:
    """Prints what `train` would take, measured on generated images. Writes nothing."""
    with distributed.processes(config.device), products("high"):
        check_processes(config)
        print("note: all weights are random here, which changes neither time nor memory")
        config = dataclasses.replace(config, init="scratch", student_init="lecun")
        splits = plan.training_splits(data.Benchmark(config.data, config.domains))
        run = build_run(config, splits)
        run.gradients = distributed.GradientSum(run.model.parameters())
        run.model.train()
        plan.dry_run(run, splits, losses_of(run), training_step)


# Command line -------------------------------------------------------------------------------------


def command_line():
    evaluation = "evaluate with python evaluate.py CHECKPOINT"
    parser = data.Parser(
        prog="udon.py",
        description="Trains one image embedding for many domains (UDON).",
        remedies={
            **dict.fromkeys(("eval", "evaluate", "test", "val"), evaluation),
            **dict.fromkeys(("search", "find", "embed"), "search with python search.py"),
            "export": "export with python checkpoint.py export RUN student.pt",
            "resume": "resume with python udon.py train --out DIR --resume",
            "check": "check a data directory with python data.py check DIR",
            "plot": "plot with python plot.py RUN",
            "--tensorboard": "after training, python plot.py RUN --tensorboard DIR",
        },
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "Trains, validates and prints the test table."
    train_parser = commands.add_parser("train", help=text, description=text)
    train_parser.add_argument(
        "--resume",
        action="store_true",
        help="resume the run in --out as it was started; of its options only "
        f"{', '.join(map(options.flag, options.MAY_CHANGE))} may change",
    )
    train_parser.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="measure the time and memory of steps on generated images of full size, print what "
        "the run would take, and stop; writes nothing, and of --data needs no image",
    )
    train_parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="config.json of another run, whose options are used where none are given here",
    )
    options.add_options(train_parser)
    return parser


USER_ERRORS = (
    distributed.DistributedError,
    *(ConfigError, data.InputError, CheckpointError),
    *(pretrained.WeightsError, rundir.RunError, features.FeaturesError),
)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    memory = "lower --batch-size, --image-size, --student-dim or --teacher-dim, or use a smaller "
    remedy = "fix this and rerun with --resume"  # checkpoints are whole all the same
    with parser.sentences(USER_ERRORS, memory + "--model", remedy):
        given = vars(parser.parse_args(arguments))
        given.pop("command")
        resume, dry = given.pop("resume"), given.pop("dry_run", False)
        if dry and resume:
            raise ConfigError("--dry-run is given with --resume: leave out one of them")
        if dry:
            dry_run(options.configuration(given, resume))
        else:
            run_command(given, resume)


def run_command(given: dict, resume: bool) -> None:
    """Trains as the options of the command line say. A run that torchrun restarts is resumed."""
    if distributed.restarts_allowed() and "out" not in given:
        raise ConfigError(
            "--out is not given, but torchrun may restart the run (--max-restarts): give the "
            "directory in which to resume it"
        )
    known = distributed.restarts() and distributed.recall("directory") == given["out"]
    resume = resume or (known and (Path(given["out"]) / "last.pt").exists())
    started = None
    if resume and "out" in given:
        rundir.check(Path(given["out"]), resume)
        started = saved_config(Path(given["out"]))
    train(options.configuration(given, resume, started), resume)


def saved_config(out: Path) -> Config:
    """The options that the run in a directory was started with."""
    if (out / "config.json").exists():
        return options.read(out / "config.json")
    saved = checkpoint.load(out / "last.pt")[1]["config"]  # deleted, or not yet written
    return Config(**saved | {"out": str(out)})


if __name__ == "__main__":
    main()
