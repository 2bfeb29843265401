"""UDON, Universal Dynamic Online distillatioN (NeurIPS 2024): one 64-d image embedding for many fine-grained domains.

    python udon.py train                                    # procedural domains: nothing to download
    python udon.py train --data DIR --out runs/real         # your images: UnED layout, or <domain>/<class>/ folders
    python udon.py train --out runs/real --resume           # goes on where it stopped

A run ends with the test table: R@1 and mMP@5 on classes never trained on, beside the same network untrained.

    compute_losses(model, images, labels, domain)  -> Losses: the method, for one batch
    training_step(...)                             -> one step of Figure 2
    train(config)                                  -> writes config.json, metrics.jsonl, last.pt, best.pt, test.json to a folder
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import time
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
import evaluate
import pretrained
from losses import classification_loss, logit_distillation_loss, relational_distillation_loss
from model import ACTIVATIONS, SIZES
from sampler import STRATEGIES, DomainSampler

METHODS = ("udon", "usc", "ujc")


# Configuration: every field is an option of the command line ---------------------------------------------------------------


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    data: str | None = option(None, "data folder; none: the procedural domains")
    out: str | None = option(None, "folder of the run; none: runs/<date>-<time>")
    method: str = option("udon", "udon; baselines: usc, one student with a classifier per domain; ujc, with one joint classifier",
                         METHODS)
    model: str = option("mini", "size of the ViT (paper: b16)", tuple(SIZES))
    image_size: int | None = option(None, "pixels; none: the model's own, 48 for mini, 224 for the others (paper: 224)")
    init: str | None = option(None, "file of public ViT weights to start from (paper: AugReg or CLIP)")
    init_activation: str | None = option(None, "activation of those weights where the file cannot tell, such as gelu for "
                                               "open_clip's LAION weights; none: the family's", tuple(ACTIVATIONS))
    student_dim: int = option(64, "width of the universal embedding (paper: 64)")
    teacher_dim: int = option(256, "width of the teachers' embeddings (paper: 256)")

    sampler: str = option("dynamic", "which domain the next batch comes from (paper: dynamic)", STRATEGIES)
    period: int = option(100, "steps between two updates of the dynamic sampler's weights (paper: 1000, of 221,180 steps)")
    batch_size: int = option(32, "images a step, all of one domain (paper: 128)")
    epochs: float = option(24.0, "passes over as many images as all domains have (paper: 10)")
    steps: int | None = option(None, "training steps, in place of --epochs")

    head_lr: float | None = option(None, "learning rate of heads and classifiers; none: 1e-3 with --init (paper), 2e-3 without")
    backbone_lr: float | None = option(None, "learning rate of the backbone; none: 1e-5 with --init (paper), 1e-3 without")
    frozen_epochs: float | None = option(None, "epochs at the start that leave the backbone alone; none: 2 with --init (paper), "
                                                "else 0")
    schedule: str = option("constant", "course of both learning rates (paper: constant)", ("constant", "cosine"))
    warmup_steps: int = option(0, "steps over which both learning rates rise from 0 (paper: 0)")
    weight_decay: float = option(1e-6, "decoupled, on all parameters (paper: 1e-6)")
    inactive_heads: str = option("skip", "heads of the domains that a batch is not of: left alone, or (official code) given zero "
                                 "gradients, so that momentum and decay go on moving them", ("skip", "zero"))

    classification: str = option("normface", "classification loss of students and teachers (paper: normface)",
                                 ("normface", "cosface", "arcface"))
    margin: float = option(0.0, "of cosface, in cosine units, or arcface, in radians")
    weights: tuple[float, float, float, float] = option((1.0, 1.0, 1.0, 1.0), "of the losses: teacher classification, student "
                                                        "classification, logit and relational distillation (paper: all 1)")
    relational_scale: float = option(32.0, "of the relational distillation loss (official: 32 at batch 128)")
    distill_into_backbone: bool = option(False, "let distillation train the backbone too, as the official code does (paper: no)")

    antialias: bool = option(True, "antialias when images are made smaller (official code: no)")
    seed: int = option(0, "of weights, batches and sampler")
    val_every: int | None = option(None, "steps between validations; none: an epoch")
    save_every: int = option(200, "steps between checkpoints, beside those at validations: what a killed run repeats at most")
    workers: int | None = option(None, "processes that load images; none: 0 if the images fit in memory, else one a processor, "
                                        "at most 8")
    device: str | None = option(None, "cpu, cuda, cuda:1 ...; none: cuda where there is one")

    def __post_init__(self):
        """Raises data.InputError for a value outside its range."""
        for name, least in dict(image_size=1, student_dim=1, teacher_dim=1, period=1, batch_size=1, steps=1, head_lr=0,
                                backbone_lr=0, frozen_epochs=0, warmup_steps=0, weight_decay=0, relational_scale=0, seed=0,
                                val_every=1, save_every=1, workers=0).items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise data.InputError(f"{flag(name)} is {value}: it must be a finite number, {least} or more")
        if self.seed >= 2**63:
            raise data.InputError(f"--seed is {self.seed}: it must be below 2^63")
        if not 0 < self.epochs < math.inf:
            raise data.InputError(f"--epochs is {self.epochs}: it must be above 0")
        if min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise data.InputError(f"--weights are {self.weights}: they must be 0 or more, and not all 0")
        if (self.margin != 0) == (self.classification == "normface") or not math.isfinite(self.margin):
            raise data.InputError(f"--margin is {self.margin} with --classification {self.classification}: normface takes none, "
                                  "cosface and arcface need one, such as 0.2")


def flag(name):
    return "--" + name.replace("_", "-")


# The method ----------------------------------------------------------------------------------------------------------------


class Losses(typing.NamedTuple):
    total: torch.Tensor                              # scalars; None for what a single-model baseline does not have
    teacher_classification: torch.Tensor
    student_classification: torch.Tensor
    logit_distillation: torch.Tensor
    relational_distillation: torch.Tensor


# Who receives gradient from which loss (paper section 3). All rows are the batch's own domain; other domains receive none.
#
#                               backbone   student_head   student_classifier   teacher_head   teacher_classifier
#   teacher_classification         x                                                x                 x
#   student_classification         x            x                 x
#   logit_distillation            (x)           x                 x
#   relational_distillation       (x)           x
#
#   (x): with distill_into_backbone alone, the official code's rule.


def compute_losses(model, images, labels, domain, *, weights=(1, 1, 1, 1), relational_scale=32.0, distill_into_backbone=False,
                   classification="normface", margin=0.0):
    """The four losses of one batch, images (B, 3, H, W) and labels (B,) in 0..C-1, all of `domain`; -> Losses.

    total = the mean of the four, weighted by `weights` in the order of Losses' fields. Source: paper section 3.
    """
    if len(weights) != 4:
        raise ValueError(f"weights are {weights}: give four, one for each loss")
    outputs = model(images, domain)                                             # backbone once, both heads, both classifiers
    distilled, distilled_cosines = outputs.student, outputs.student_cosines
    if not distill_into_backbone:                                               # the same values, cut off from the backbone
        distilled = model.student_head(outputs.backbone.detach())
        distilled_cosines = model.student_classifiers[domain](distilled)
    losses = (
        classification_loss(outputs.teacher_cosines, labels, margin=margin, kind=classification),
        classification_loss(outputs.student_cosines, labels, margin=margin, kind=classification),
        logit_distillation_loss(distilled_cosines, outputs.teacher_cosines),    # detaches the teacher
        relational_distillation_loss(distilled, outputs.teacher, scale=relational_scale),
    )
    return Losses(sum(w * loss for w, loss in zip(weights, losses)) / sum(weights), *losses)


def single_model_loss(model, images, labels, classifier, *, classification="normface", margin=0.0):
    """The baselines' one loss, on the student with the named classifier: a domain's own (usc) or "joint" (ujc); -> Losses."""
    loss = classification_loss(model(images, classifier).student_cosines, labels, margin=margin, kind=classification)
    return Losses(loss, None, loss, None, None)


def training_step(step, model, batches, sampler, optimizer, config, run):
    """One step of Figure 2. Returns (domain, Losses as numbers, seconds spent waiting for the batch)."""
    # 1  The sampler says which domain; its batch is of that domain alone.
    started = time.perf_counter()
    domain, images, labels = next(batches)
    waited = time.perf_counter() - started

    # 2  Images (B, 3, H, W) to the device, normalised as the backbone's weights want them.
    images = data.normalise(images.to(run.device, non_blocking=True), run.mean, run.std)
    labels = labels.to(run.device, non_blocking=True)

    # 3  Learning rates of this step; a frozen backbone takes no gradient.
    for group, rate in zip(optimizer.param_groups, learning_rates(config, step, run)):
        group["lr"] = rate
    model.backbone.requires_grad_(step >= run.frozen_steps)

    # 4  Backbone once -> student and the domain's teacher -> cosines with the domain's classifiers -> four losses.
    if config.method == "udon":
        losses = compute_losses(model, images, labels, domain, weights=config.weights, relational_scale=config.relational_scale,
                                distill_into_backbone=config.distill_into_backbone, classification=config.classification,
                                margin=config.margin)
    else:
        classifier, first = run.classifier_of[domain]
        losses = single_model_loss(model, images, labels + first, classifier, classification=config.classification,
                                   margin=config.margin)

    # 5  A loss that is not finite stops the run before it reaches the weights.
    values = Losses(*(None if loss is None else loss.item() for loss in losses))
    for term, value in values._asdict().items():
        if value is not None and not math.isfinite(value):
            raise data.InputError(f"loss {term} is {value} at step {step}, domain {domain}: lower {flag('backbone_lr')} or "
                                  f"{flag('head_lr')}, and look at the domain's images")

    # 6  One backward pass; the table above says where each loss goes.
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()

    # 7  AdamW. Without a gradient a head stays as it is; with a zero gradient its momentum goes on moving it.
    if config.inactive_heads == "zero":
        for parameter in optimizer.param_groups[1]["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()

    # 8  The sampler hears how hard the domain still is for its teacher (for the baselines: for the student).
    sampler.observe(domain, values.teacher_classification if config.method == "udon" else values.student_classification)
    return domain, values, waited


# The run -------------------------------------------------------------------------------------------------------------------


class Run(typing.NamedTuple):
    """What follows from configuration and data, and stays for the whole run."""
    steps: int
    steps_per_epoch: int                         # as in the paper: training images of all domains // batch size
    frozen_steps: int
    classifier_of: dict                          # domain -> (its classifier, number of its first class there)
    preprocessing: dict                          # {"mean": (3), "std": (3), "antialias": bool}, goes into every checkpoint
    device: str

    @classmethod
    def of(cls, config, splits, preprocessing):
        steps_per_epoch = max(1, sum(map(len, splits.values())) // config.batch_size)
        classifier_of, first = {}, 0
        for domain, split in splits.items():
            classifier_of[domain] = ("joint", first) if config.method == "ujc" else (domain, 0)
            first += split.num_classes
        return cls(config.steps or max(1, int(config.epochs * steps_per_epoch)), steps_per_epoch,
                   int(config.frozen_epochs * steps_per_epoch), classifier_of, preprocessing, config.device)

    @property
    def mean(self):
        return self.preprocessing["mean"]

    @property
    def std(self):
        return self.preprocessing["std"]


def learning_rates(config, step, run):
    """(backbone, heads) at a step: 0..steps-1; a function of the step alone."""
    factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / run.steps))
    return (0.0 if step < run.frozen_steps else factor * config.backbone_lr), factor * config.head_lr


def build_model(config, counts):
    """The untrained model for {domain: number of classes}, a function of the configuration; -> (model, architecture,
    preprocessing), the last two as they go into every checkpoint."""
    backbone = dict(SIZES[config.model])
    if config.image_size is not None:
        backbone["image_size"] = config.image_size
    architecture = {"backbone": backbone, "classes": counts if config.method != "ujc" else {"joint": sum(counts.values())},
                    "student_dim": config.student_dim, "teacher_dim": config.teacher_dim if config.method == "udon" else 0}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        torch.manual_seed(config.seed)
        try:
            model = evaluate.build(architecture)
            preprocessing = pretrained.HALF
            if config.init:
                preprocessing = pretrained.load(model.backbone, config.init, activation=config.init_activation)
        except ValueError as error:
            raise data.InputError(str(error)) from None
    for note in notes:
        print(f"note: {note.message}")
    architecture["backbone"] = model.backbone.architecture                  # with what the weights' family fixed
    return model, architecture, {**preprocessing._asdict(), "antialias": config.antialias}


def build_optimizer(model, config):
    """AdamW with two groups: backbone, and heads and classifiers. Every parameter is in exactly one."""
    backbone = list(model.backbone.parameters())
    heads = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    assert len(backbone) + len(heads) == len(set(model.parameters()))
    return torch.optim.AdamW([{"params": backbone}, {"params": heads}], lr=config.head_lr, betas=(0.9, 0.999), eps=1e-8,
                             weight_decay=config.weight_decay, fused=True)


def save(path, contents):
    """A checkpoint, all of it or nothing, whatever kills the process meanwhile."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def train(config, resume=False):
    """Trains to the end, writes the run folder config.out, and prints the test table. Returns the contents of test.json.

    With `resume` the run goes on from its last.pt; the weights it ends with are those of an uninterrupted run, bit for bit
    (on a CPU with the same number of threads). Raises data.InputError for whatever the user can mend.
    """
    config = resolve(config)
    out = Path(config.out)
    benchmark = data.Benchmark(config.data)
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    counts = {domain: split.num_classes for domain, split in splits.items()}
    if resume:
        model, state = evaluate.load_checkpoint(out / "last.pt", config.device)
        if "optimizer" not in state:
            raise data.InputError(f"{out / 'last.pt'} is a best.pt, which holds no optimizer: give the run's own last.pt")
        architecture, preprocessing = state["architecture"], state["preprocessing"]
        if state["classes"] != counts:
            raise data.InputError(f"--data {config.data} has the classes {counts}, the run {out} was started with "
                                  f"{state['classes']}: give it the data it was started with")
    else:
        model, architecture, preprocessing = build_model(config, counts)
        model.to(config.device)
    optimizer = build_optimizer(model, config)
    try:
        sampler = DomainSampler(splits, config.sampler, period=config.period, sizes={d: len(s) for d, s in splits.items()},
                                seed=config.seed)
    except ValueError as error:
        raise data.InputError(str(error)) from None
    run = Run.of(config, splits, preprocessing)
    describe(config, run, counts, splits, model)

    size = architecture["backbone"]["image_size"]
    started = time.perf_counter()
    test_sets = evaluate.open_sets(benchmark, "test", size, antialias=config.antialias)
    val_sets = evaluate.open_sets(benchmark, "val", size, antialias=config.antialias, keep=True)
    batches = data.TrainBatches(splits, size, config.batch_size, config.seed, antialias=config.antialias)
    workers = config.workers if config.workers is not None else 0 if batches.in_memory else min(data.processors(), 8)
    print(f"training images decoded {'into memory' if batches.in_memory else 'as needed'}, {workers} workers; ready after "
          f"{time.perf_counter() - started:.1f} s")

    if resume:
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        step, validated, best, untrained = state["step"], state["validated"], state["best"], state["untrained"]
        if step > run.steps:
            raise data.InputError(f"--steps is {run.steps}: the run {out} has done {step} already, give that or more")
        print(f"resumed at step {step:,} of {run.steps:,}")
    else:
        untrained = evaluate.evaluate(model, test_sets, preprocessing)
        step, validated, best = 0, 0, {"step": 0, "recall_at_1": -1.0}
        print(f"untrained: mean R@1 {100 * untrained['mean']['recall_at_1']:.2f} on test")

    def checkpoint():
        return {"model": model.state_dict(), "architecture": architecture, "preprocessing": preprocessing, "step": step,
                "config": dataclasses.asdict(config)}

    def save_last():
        save(out / "last.pt", {**checkpoint(), "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict(), "best": best,
                               "validated": validated, "classes": counts, "untrained": untrained})

    out.mkdir(parents=True, exist_ok=True)
    evaluate.write_json(out / "config.json", dataclasses.asdict(config))
    keep_metrics_until(step, out / "metrics.jsonl")
    save_last()

    first, started, waited = step, time.perf_counter(), 0.0
    paused, said = 0.0, started                                          # paused: seconds of validation and checkpoints
    with open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1) as metrics:

        def validate():
            """Mean R@1 of the merged val index; the best so far goes to best.pt."""
            nonlocal best, validated
            results = evaluate.evaluate(model, val_sets, preprocessing)["mean"]
            model.train()
            validated, better = step, results["recall_at_1"] > best["recall_at_1"]
            if better:
                best = {"step": step, "recall_at_1": results["recall_at_1"]}
                save(out / "best.pt", checkpoint())
            metrics.write(json.dumps({"step": step, "val": results, "sampler_weights": sampler.weights}) + "\n")
            print(f"step {step:,} validation: mean R@1 {100 * results['recall_at_1']:.2f}, mMP@5 {100 * results['mmp_at_5']:.2f}"
                  f"{' (best so far)' if better else ''}", flush=True)

        model.train()
        stream = data.stream(batches, sampler, step, run.steps, workers)
        while step < run.steps:
            domain, losses, seconds = training_step(step, model, stream, sampler, optimizer, config, run)
            waited += seconds
            step += 1
            values = {term: value for term, value in losses._asdict().items() if value is not None}
            rates = {"backbone_lr": optimizer.param_groups[0]["lr"], "head_lr": optimizer.param_groups[1]["lr"]}
            metrics.write(json.dumps({"step": step, "domain": domain, **values, **rates}) + "\n")
            now = time.perf_counter()
            if now - said >= 5 or step == run.steps:
                said, training = now, now - started - paused
                rate = (step - first) / training
                print(f"step {step:,} of {run.steps:,}   loss {losses.total:.3f} ({domain})   {rate * config.batch_size:,.0f} "
                      f"images/s   waiting for data {100 * waited / training:.1f} %   {clock((run.steps - step) / rate)} left",
                      flush=True)
            if step % (config.val_every or run.steps_per_epoch) == 0:
                validate()
            if validated == step or step % config.save_every == 0:
                save_last()
                paused += time.perf_counter() - now
        if validated != step:
            validate()
            save_last()

    model, best_checkpoint = evaluate.load_checkpoint(out / "best.pt", config.device)
    results = {**evaluate.evaluate(model, test_sets, preprocessing), "checkpoint": str(out / "best.pt"),
               "step": best_checkpoint["step"], "data": config.data, "split": "test", "index": "merged", "embedding": "student",
               "untrained": untrained}
    evaluate.write_json(out / "test.json", results)
    print(f"\n{out / 'best.pt'}, step {best_checkpoint['step']}: student embedding, test queries, merged index")
    print(evaluate.table(results, results["untrained"]))
    arguments = [str(out / "best.pt"), *(["--data", config.data] if config.data else []), "--device", config.device]
    print(f"the same again: python evaluate.py {shlex.join(arguments)}")
    return results


def describe(config, run, counts, splits, model):
    """Prints what is about to be trained: every option that differs from its default, the data, the sizes."""
    defaults = resolve(Config(out=config.out, init=config.init))
    different = [f"{flag(f.name)} {getattr(config, f.name)}" for f in dataclasses.fields(Config)
                 if getattr(config, f.name) != getattr(defaults, f.name) or (f.name == "init" and config.init)]
    print(f"{config.method} on {config.data or 'the procedural domains'} into {config.out}; differing from the defaults: "
          f"{', '.join(different) or 'nothing'}")
    for domain, split in splits.items():
        print(f"  {domain:16}{len(split):9,} training images of {counts[domain]:,} classes")
    backbone = sum(p.numel() for p in model.backbone.parameters())
    heads = sum(p.numel() for p in model.parameters()) - backbone
    print(f"parameters: backbone {backbone / 1e6:.2f} M, heads and classifiers {heads / 1e6:.2f} M ({16 * heads / 1e6:,.0f} MB "
          f"with gradients and AdamW's moments); an epoch is {run.steps_per_epoch:,} steps, the run {run.steps:,}")


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def keep_metrics_until(step, path):
    """Drops the lines of steps that are about to be run again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        if not line.endswith("\n") or json.loads(line)["step"] > step:              # the last one may be cut short
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


# Command line --------------------------------------------------------------------------------------------------------------

MAY_CHANGE = ("steps", "workers", "device", "data", "out")                  # on resuming


def resolve(config):
    """The configuration with every field that depends on another filled in."""
    tuned = config.init is not None
    return dataclasses.replace(
        config, out=config.out or time.strftime("runs/%Y%m%d-%H%M%S"),
        head_lr=config.head_lr if config.head_lr is not None else 1e-3 if tuned else 2e-3,
        backbone_lr=config.backbone_lr if config.backbone_lr is not None else 1e-5 if tuned else 1e-3,
        frozen_epochs=config.frozen_epochs if config.frozen_epochs is not None else 2.0 if tuned else 0.0,
        device=config.device or evaluate.default_device())


def configuration(given, resume):
    """The resolved Config of a run from the options given: a new run's, or with `resume` that of the run in --out."""
    out = Path(given.get("out") or "")
    if not resume:
        if given.get("out") and (out / "last.pt").exists():
            raise data.InputError(f"--out {out} holds a run already: go on with it by --resume, or give another folder")
        config = resolve(Config(**given))
    else:
        if "out" not in given:
            raise data.InputError("--resume needs --out, the folder of the run to go on with")
        if not (out / "last.pt").exists():
            raise data.InputError(f"--out {out} holds no run to resume (no last.pt): leave out --resume, or correct the folder")
        try:
            saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
            saved = Config(**{**saved, "weights": tuple(saved["weights"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise data.InputError(f"{out / 'config.json'} is no configuration of this version ({error}): start a new run") from None
        for name, value in given.items():
            if value != getattr(saved, name) and (name not in MAY_CHANGE or (name == "steps" and saved.schedule != "constant")):
                raise data.InputError(f"{flag(name)} is {value}, the run {out} was started with {getattr(saved, name)}: leave it "
                                      "out, or start a new run in another folder")
        config = dataclasses.replace(saved, **given)
    folder = next(p for p in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise data.InputError(f"--out {config.out} cannot be written, since {folder} is a file or not yours: give another folder")
    evaluate.check_device(config.device)
    return config


def command_line():
    """The parser of `udon.py train`; its options are Config's fields."""
    parser = evaluate.Parser(prog="udon.py", description="Trains one image embedding for many fine-grained domains (UDON).")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=evaluate.Parser)
    train_parser = commands.add_parser("train", help="train, validate, print the test table",
                                       description="Trains, validates, and prints the test table.")
    train_parser.add_argument("--resume", action="store_true",
                              help=f"go on with the run in --out as it was started; of its options only "
                                   f"{', '.join(map(flag, MAY_CHANGE))} may be given anew")
    kinds = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind = (typing.get_args(kinds[f.name]) or (kinds[f.name],))[0]
        choices = f.metadata["choices"]
        settings = {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        if isinstance(f.default, tuple):
            settings["nargs"] = len(f.default)
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        train_parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **settings,
                                  help=f"{f.metadata['help']} (default: {shown})")
    return parser


def main(arguments=None):
    parser = command_line()
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    given.pop("command")
    if "weights" in given:
        given["weights"] = tuple(given["weights"])
    try:
        train(configuration(given, resume), resume)
    except data.InputError as error:
        parser.exit(2, f"udon.py: {error}\n")
    except OSError as error:                                  # no room, no permission: checkpoints are whole all the same
        place = error.filename or given.get("out", "runs")
        parser.exit(2, f"udon.py: {place} cannot be used ({error.strerror or error}): mend that, and go on with --resume\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nudon.py: interrupted; a run folder goes on from its last checkpoint with --resume\n")


if __name__ == "__main__":
    main()
