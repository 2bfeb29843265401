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

METHODS = {  # what is trained, and by which embedding, in which index, it is validated and tested
    "udon": ("student", "merged"),  # student and the teachers of all domains, together
    "usc": (
        "student",
        "merged",
    ),  # a student with a classifier per domain; with one domain: a specialist
    "ujc": (
        "student",
        "merged",
    ),  # a student with one joint classifier, over the classes of all domains
    "teachers": ("teacher", "separate"),  # the teachers of all domains, without a student
    "distill": (
        "student",
        "merged",
    ),  # a student with a backbone of its own, from frozen --teachers
    "backbone": ("backbone", "merged"),  # nothing: the backbone as it is
}


# Configuration: every field is an option of the command line ---------------------------------------------------------------


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    data: str | None = option(None, "data folder; none: the procedural domains")
    out: str | None = option(None, "folder of the run; none: runs/<date>-<time>")
    domains: tuple[str, ...] | None = option(
        None, "train and test these domains alone; none: all of the folder"
    )
    method: str = option(
        "udon",
        "udon; baselines: usc, a student with a classifier per domain; ujc, with one joint classifier; "
        "teachers, without a student; distill, a student from frozen --teachers; backbone, nothing trained",
        tuple(METHODS),
    )
    teachers: str | None = option(
        None,
        "for distill: a checkpoint of teachers or udon, or a folder of specialists, usc runs of "
        "one domain each, <folder>/<domain>/best.pt",
    )
    beside: str | None = option(
        None,
        "baseline to train after it in the same way, into <out>/<baseline>, and to print beside "
        "it; none: usc for udon on the procedural domains",
        ("usc", "ujc", "nothing"),
    )
    model: str = option("mini", "size of the ViT (paper: b16)", tuple(SIZES))
    image_size: int | None = option(
        None,
        "pixels; none: the model's own, 48 for micro and mini, 224 for the others (paper: 224)",
    )
    init: str | None = option(
        None,
        "ViT weights to start from: a file (paper: AugReg or CLIP), the project's own micro or mini, "
        "or scratch; none: the model's own if it has some, else scratch",
    )
    init_activation: str | None = option(
        None,
        "activation of those weights where the file cannot tell, such as gelu for "
        "open_clip's LAION weights; none: the family's",
        tuple(ACTIVATIONS),
    )
    student_dim: int = option(64, "width of the universal embedding (paper: 64)")
    teacher_dim: int = option(256, "width of the teachers' embeddings (paper: 256)")
    head_layers: int = option(
        1, "linear layers of each head, LayerNorm and GELU between them (paper: 1)"
    )

    sampler: str | None = option(
        None,
        "which domain the next batch comes from; none: dynamic for udon (paper), round_robin for "
        "udon with micro and mini and for the other methods",
        STRATEGIES,
    )
    signal: str | None = option(
        None,
        "whose classification loss the dynamic sampler follows; none: the teacher's (paper), or "
        "the student's where no teacher is trained",
        ("teacher", "student"),
    )
    period: int = option(
        100,
        "steps between two updates of the dynamic sampler's weights (paper: 1000, of 221,180 steps)",
    )
    batch_size: int = option(64, "images a step, all of one domain (paper: 128)")
    epochs: float = option(6.0, "passes over as many images as all domains have (paper: 10)")
    steps: int | None = option(None, "training steps, in place of --epochs")

    head_lr: float | None = option(
        None,
        "learning rate of heads and classifiers; none: 1e-3 from public weights (paper), 3e-3 "
        "from micro and mini, 2e-3 from scratch",
    )
    backbone_lr: float | None = option(
        None,
        "learning rate of the backbone; none: 1e-5 from public weights (paper), 3e-4 from "
        "micro and mini, 1e-3 from scratch",
    )
    frozen_epochs: float | None = option(
        None,
        "epochs at the start that leave the backbone alone; none: 2 with public weights "
        "(paper), 1 with micro and mini, 0 from scratch",
    )
    schedule: str = option(
        "constant", "course of both learning rates (paper: constant)", ("constant", "cosine")
    )
    warmup_steps: int = option(0, "steps over which both learning rates rise from 0 (paper: 0)")
    weight_decay: float = option(1e-6, "decoupled, on all parameters (paper: 1e-6)")
    inactive_heads: str = option(
        "skip",
        "heads of the domains that a batch is not of: left alone, or (official code) given zero "
        "gradients, so that momentum and decay go on moving them",
        ("skip", "zero"),
    )

    classification: str = option(
        "normface",
        "classification loss of students and teachers (paper: normface)",
        ("normface", "cosface", "arcface"),
    )
    margin: float = option(0.0, "of cosface, in cosine units, or arcface, in radians")
    scale: float = option(16.0, "of the cosines in the classification losses (official: 16)")
    temperature: float = option(
        0.1, "of logit distillation, the student's and the teacher's (official: 0.1)"
    )
    weights: tuple[float, float, float, float] = option(
        (1.0, 1.0, 1.0, 1.0),
        "of the losses: teacher classification, student "
        "classification, logit and relational distillation (paper: all 1)",
    )
    relational_scale: float = option(
        32.0, "of the relational distillation loss (official: 32 at batch 128)"
    )
    negatives: str | None = option(
        None,
        "classes that the student's classification tells apart: the domain's own (paper), or "
        "those of all domains, as ujc does; none: all for udon and distill with micro and mini, "
        "else domain",
        ("domain", "all"),
    )
    domain_margin: float | None = option(
        None,
        "with the negatives of all domains: added to the cosines of other domains' "
        "classes, so that domains keep apart; none: 0.2 for udon and distill, 0 for ujc",
    )
    distill_into_backbone: bool = option(
        False, "let distillation train the backbone too, as the official code does (paper: no)"
    )

    min_area: float | None = option(
        None,
        "training crops of a random size and aspect, from this share of the image's area up; "
        "none: crops of a fixed size, 7/8 of the side (paper)",
    )
    antialias: bool = option(True, "antialias when images are made smaller (official code: no)")
    seed: int = option(0, "of weights, batches and sampler")
    val_every: int | None = option(None, "steps between validations; none: an epoch")
    save_every: int = option(
        200,
        "steps between checkpoints, beside those at validations: what a killed run repeats at most",
    )
    workers: int | None = option(
        None,
        "processes that load images; none: 0 if the images fit in memory, else one a processor, "
        "at most 8",
    )
    device: str | None = option(None, "cpu, cuda, cuda:1 ...; none: cuda where there is one")

    def __post_init__(self):
        """Raises data.InputError for a value outside its range."""
        for name, least in dict(
            image_size=1,
            student_dim=1,
            teacher_dim=1,
            head_layers=1,
            period=1,
            batch_size=1,
            steps=1,
            head_lr=0,
            backbone_lr=0,
            frozen_epochs=0,
            warmup_steps=0,
            weight_decay=0,
            relational_scale=0,
            domain_margin=0,
            seed=0,
            val_every=1,
            save_every=1,
            workers=0,
        ).items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise data.InputError(
                    f"{flag(name)} is {value}: it must be a finite number, {least} or more"
                )
        if self.min_area is not None and not 0 < self.min_area <= 1:
            raise data.InputError(
                f"--min-area is {self.min_area}: it must be above 0, and 1 or less"
            )
        if self.seed >= 2**63:
            raise data.InputError(f"--seed is {self.seed}: it must be below 2^63")
        for name in ("epochs", "scale", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise data.InputError(
                    f"{flag(name)} is {getattr(self, name)}: it must be a finite number above 0"
                )
        if min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise data.InputError(
                f"--weights are {self.weights}: they must be 0 or more, and not all 0"
            )
        if (self.negatives, self.method) in (("domain", "ujc"), ("all", "usc")):
            raise data.InputError(
                f"--negatives is {self.negatives} with --method {self.method}: usc has those of the domain, ujc "
                "those of all domains; leave it out, or use the other method"
            )
        if self.domain_margin and self.negatives == "domain":
            raise data.InputError(
                f"--domain-margin is {self.domain_margin} with --negatives domain: there are no other domains' "
                "classes, use --negatives all"
            )
        if (self.method == "distill") != (self.teachers is not None):
            raise data.InputError(
                f"--teachers is {self.teachers} with --method {self.method}: distill needs teachers, a "
                "checkpoint or a folder of specialists, and no other method takes them"
            )
        if self.method == "distill" and not sum(self.weights[1:]):
            raise data.InputError(
                f"--weights are {self.weights} with --method distill, which has no use for the first: one of the "
                "others must be above 0"
            )
        if self.signal == "teacher" and self.method not in ("udon", "teachers"):
            raise data.InputError(
                f"--signal is teacher with --method {self.method}: only udon and teachers train a teacher, use "
                "student"
            )
        if self.signal == "student" and self.method == "teachers":
            raise data.InputError(
                "--signal is student with --method teachers: there is no student, use teacher"
            )
        if (self.margin != 0) == (self.classification == "normface") or not math.isfinite(
            self.margin
        ):
            raise data.InputError(
                f"--margin is {self.margin} with --classification {self.classification}: normface takes none, "
                "cosface and arcface need one, such as 0.2"
            )


def flag(name):
    return "--" + name.replace("_", "-")


# The method ----------------------------------------------------------------------------------------------------------------


class Losses(typing.NamedTuple):
    total: torch.Tensor  # scalars; None for what a single-model baseline does not have
    teacher_classification: torch.Tensor
    student_classification: torch.Tensor
    logit_distillation: torch.Tensor
    relational_distillation: torch.Tensor


# Who receives gradient from which loss (paper section 3). All columns are of the batch's own domain; other domains' heads and
# classifiers receive none (but for their student classifiers from student_classification, with the negatives of all domains).
#
#                               backbone   student_head   student_classifier   teacher_head   teacher_classifier
#   teacher_classification         x                                                x                 x
#   student_classification         x            x                 x
#   logit_distillation            (x)           x                 x
#   relational_distillation       (x)           x
#
#   (x): with distill_into_backbone alone, the official code's rule.


def compute_losses(
    model,
    images,
    labels,
    domain,
    *,
    weights=(1, 1, 1, 1),
    relational_scale=32.0,
    distill_into_backbone=False,
    classification="normface",
    margin=0.0,
    scale=16.0,
    temperature=0.1,
    negatives="domain",
    domain_margin=0.0,
    teachers=None,
):
    """The four losses of one batch, images (B, 3, H, W) and labels (B,) in 0..C-1, all of `domain`; -> Losses.

    total = the mean of the four, weighted by `weights` in their order; scale, temperature: see losses.py. Source: paper section 3.
    negatives  "domain": the student's classification loss is over the domain's C classes, as published; "all": over those of
               all domains, domain_margin added to the others' cosines: the student keeps the domains apart, as a merged
               index needs
    teachers   (images, domain) -> embedding (B, T), cosines (B, C): others than the model's own to distil from. A model
               without teachers of its own has no teacher classification loss; the mean is then of three.
    """
    if len(weights) != 4:
        raise ValueError(f"weights are {weights}: give four, one for each loss")
    outputs = model(images, domain)  # backbone once, both heads, both classifiers
    teacher, teacher_cosines = (
        (outputs.teacher, outputs.teacher_cosines) if teachers is None else teachers(images, domain)
    )
    distilled, distilled_cosines = outputs.student, outputs.student_cosines
    if not distill_into_backbone:  # the same values, cut off from the backbone
        distilled = model.student_head(outputs.backbone.detach())
        distilled_cosines = model.student_classifiers[domain](distilled)
    settings = dict(scale=scale, margin=margin, kind=classification)
    losses = (
        teacher_classification(outputs, labels, **settings),
        student_classification(
            model, outputs, labels, domain, negatives, domain_margin, **settings
        ),
        logit_distillation_loss(
            distilled_cosines,
            teacher_cosines,  # detaches the teacher
            student_temperature=temperature,
            teacher_temperature=temperature,
        ),
        relational_distillation_loss(distilled, teacher, scale=relational_scale),
    )
    terms = [(weight, loss) for weight, loss in zip(weights, losses) if loss is not None]
    return Losses(
        sum(weight * loss for weight, loss in terms) / sum(weight for weight, _ in terms), *losses
    )


def teacher_classification(outputs, labels, **settings):
    return (
        None
        if outputs.teacher is None
        else classification_loss(outputs.teacher_cosines, labels, **settings)
    )


def student_classification(
    model, outputs, labels, domain, negatives="domain", domain_margin=0.0, **settings
):
    cosines = outputs.student_cosines  # (B, C)
    if negatives == "all":  # the domain's classes first, then those of all the others
        others = [
            classifier(outputs.student)
            for other, classifier in model.student_classifiers.items()
            if other != domain
        ]
        cosines = torch.cat([cosines, *(cosine + domain_margin for cosine in others)], dim=1)
    return classification_loss(cosines, labels, **settings)


def single_model_losses(
    model,
    images,
    labels,
    domain,
    *,
    classification="normface",
    margin=0.0,
    scale=16.0,
    negatives="domain",
    domain_margin=0.0,
):
    """The one loss of a baseline, no distillation: of the teachers where the model has some; else of the student, over the
    domain's classes (usc) or those of all domains (ujc); -> Losses."""
    outputs, settings = model(images, domain), dict(scale=scale, margin=margin, kind=classification)
    if outputs.teacher is not None:
        loss = teacher_classification(outputs, labels, **settings)
        return Losses(loss, loss, None, None, None)
    loss = student_classification(
        model, outputs, labels, domain, negatives, domain_margin, **settings
    )
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
    settings = {
        name: getattr(config, name)
        for name in ("classification", "margin", "scale", "negatives", "domain_margin")
    }
    if config.method in ("udon", "distill"):
        losses = compute_losses(
            model,
            images,
            labels,
            domain,
            weights=config.weights,
            relational_scale=config.relational_scale,
            distill_into_backbone=config.distill_into_backbone,
            temperature=config.temperature,
            teachers=run.teachers,
            **settings,
        )
    else:
        losses = single_model_losses(model, images, labels, domain, **settings)

    # 5  A loss that is not finite stops the run before it reaches the weights.
    values = Losses(*(None if loss is None else loss.item() for loss in losses))
    for term, value in values._asdict().items():
        if value is not None and not math.isfinite(value):
            raise data.InputError(
                f"loss {term} is {value} at step {step}, domain {domain}: lower {flag('backbone_lr')} or "
                f"{flag('head_lr')}, and look at the domain's images"
            )

    # 6  One backward pass; the table above says where each loss goes.
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()

    # 7  AdamW. Without a gradient a head stays as it is; with a zero gradient its momentum goes on moving it.
    if config.inactive_heads == "zero":
        for parameter in optimizer.param_groups[1]["params"]:
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    optimizer.step()

    # 8  The sampler hears how hard the domain still is for its teacher (or student: where there is no other).
    sampler.observe(domain, getattr(values, f"{config.signal}_classification"))
    return domain, values, waited


# The run -------------------------------------------------------------------------------------------------------------------


class Run(typing.NamedTuple):
    """What follows from configuration and data, and stays for the whole run."""

    steps: int
    steps_per_epoch: int  # as in the paper: training images of all domains // batch size
    frozen_steps: int
    preprocessing: dict  # {"mean": (3), "std": (3), "antialias": bool}, goes into every checkpoint
    device: str
    teachers: typing.Callable | None = None  # the frozen ones of `distill`

    @classmethod
    def of(cls, config, splits, preprocessing, teachers=None):
        steps_per_epoch = max(1, sum(map(len, splits.values())) // config.batch_size)
        steps = (
            0
            if config.method == "backbone"
            else config.steps or max(1, int(config.epochs * steps_per_epoch))
        )
        return cls(
            steps,
            steps_per_epoch,
            int(config.frozen_epochs * steps_per_epoch),
            preprocessing,
            config.device,
            teachers,
        )

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
    return (
        0.0 if step < run.frozen_steps else factor * config.backbone_lr
    ), factor * config.head_lr


def build_model(config, counts):
    """The untrained model for {domain: number of classes}, a function of the configuration; -> (model, architecture,
    preprocessing), the last two as they go into every checkpoint."""
    backbone = dict(SIZES[config.model])
    if config.image_size is not None:
        backbone["image_size"] = config.image_size
    architecture = {
        "backbone": backbone,
        "classes": counts,
        "student_dim": config.student_dim,
        "teacher_dim": config.teacher_dim if trains_teachers(config) else 0,
        "head_layers": config.head_layers,
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        torch.manual_seed(config.seed)
        try:
            model = evaluate.build(architecture)
            preprocessing = pretrained.HALF
            if config.init != "scratch":
                preprocessing = pretrained.load(
                    model.backbone,
                    pretrained.COMPACT.get(config.init, config.init),
                    activation=config.init_activation,
                )
        except ValueError as error:
            raise data.InputError(str(error)) from None
    for note in notes:
        print(f"note: {note.message}")
    architecture["backbone"] = model.backbone.architecture  # with what the weights' family fixed
    return model, architecture, {**preprocessing._asdict(), "antialias": config.antialias}


def trains_teachers(config):
    return config.method in ("udon", "teachers")


class FrozenTeachers:
    """The teachers of `distill`: (images (B, 3, H, W), domain) -> embedding (B, T) unit rows, cosines (B, C), no gradient.

    path   a checkpoint with a teacher for each domain, or a folder of runs <domain>/best.pt, each of one domain's specialist
    Raises data.InputError for teachers of other classes, or that want other images than the student.
    """

    def __init__(self, path, counts, size, preprocessing, device):
        self.models = {}
        if not Path(path).is_dir():
            self.models = dict.fromkeys(counts, evaluate.load_checkpoint(path, device))
        else:
            self.models = {
                d: evaluate.load_checkpoint(Path(path, d, "best.pt"), device) for d in counts
            }
        for domain, (model, checkpoint) in self.models.items():
            classes = checkpoint["architecture"]["classes"].get(domain)
            if classes != counts[domain]:
                raise data.InputError(
                    f"--teachers {path} know {classes or 'no'} classes of domain {domain}, which has "
                    f"{counts[domain]}: give teachers trained on the same data"
                )
            if (
                checkpoint["architecture"]["backbone"]["image_size"],
                checkpoint["preprocessing"],
            ) != (size, preprocessing):
                raise data.InputError(
                    f"--teachers {path} take images of other size or statistics than the student, {size} pixels "
                    f"and {preprocessing}: train them with the same --image-size and --init"
                )
        self.models = {domain: model for domain, (model, _) in self.models.items()}

    @torch.no_grad()
    def __call__(self, images, domain):
        model = self.models[domain]
        outputs = model(images, domain)
        if model.teacher_heads:
            return outputs.teacher, outputs.teacher_cosines
        return (
            outputs.student,
            outputs.student_cosines,
        )  # a specialist: its student is the domain's teacher


def build_optimizer(model, config):
    """AdamW with two groups: backbone, and heads and classifiers. Every parameter is in exactly one."""
    backbone = list(model.backbone.parameters())
    heads = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    assert len(backbone) + len(heads) == len(set(model.parameters()))
    return torch.optim.AdamW(
        [{"params": backbone}, {"params": heads}],
        lr=config.head_lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


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
    benchmark = data.Benchmark(config.data, config.domains)
    embedding, index = METHODS[config.method]
    splits = {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    counts = {domain: split.num_classes for domain, split in splits.items()}
    if resume:
        model, state = evaluate.load_checkpoint(out / "last.pt", config.device)
        if "optimizer" not in state:
            raise data.InputError(
                f"{out / 'last.pt'} is a best.pt, which holds no optimizer: give the run's own last.pt"
            )
        architecture, preprocessing = state["architecture"], state["preprocessing"]
        if state["classes"] != counts:
            raise data.InputError(
                f"--data {config.data} has the classes {counts}, the run {out} was started with "
                f"{state['classes']}: give it the data it was started with"
            )
    else:
        model, architecture, preprocessing = build_model(config, counts)
        model.to(config.device)
    optimizer = build_optimizer(model, config)
    try:
        sampler = DomainSampler(
            splits,
            config.sampler,
            period=config.period,
            sizes={d: len(s) for d, s in splits.items()},
            seed=config.seed,
        )
    except ValueError as error:
        raise data.InputError(str(error)) from None
    size = architecture["backbone"]["image_size"]
    teachers = None
    if config.method == "distill":
        teachers = FrozenTeachers(config.teachers, counts, size, preprocessing, config.device)
    run = Run.of(config, splits, preprocessing, teachers)
    describe(config, run, counts, splits, model)

    started = time.perf_counter()
    test_sets = evaluate.open_sets(benchmark, "test", size, antialias=config.antialias)
    val_sets = evaluate.open_sets(benchmark, "val", size, antialias=config.antialias, keep=True)
    batches = data.TrainBatches(
        splits,
        size,
        config.batch_size,
        config.seed,
        antialias=config.antialias,
        min_area=config.min_area,
    )
    workers = (
        config.workers
        if config.workers is not None
        else 0
        if batches.in_memory
        else min(data.processors(), 8)
    )
    print(
        f"training images decoded {'into memory' if batches.in_memory else 'as needed'}, {workers} workers; ready after "
        f"{time.perf_counter() - started:.1f} s"
    )

    if resume:
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        step, validated, best, untrained = (
            state["step"],
            state["validated"],
            state["best"],
            state["untrained"],
        )
        if step > run.steps:
            raise data.InputError(
                f"--steps is {run.steps}: the run {out} has done {step} already, give that or more"
            )
        print(f"resumed at step {step:,} of {run.steps:,}")
    else:
        untrained = evaluate.evaluate(
            model, test_sets, preprocessing, index=index, embedding=embedding
        )
        step, validated, best = 0, None, {"step": 0, "recall_at_1": -1.0}
        print(f"untrained: mean R@1 {100 * untrained['mean']['recall_at_1']:.2f} on test")

    def checkpoint():
        return {
            "model": model.state_dict(),
            "architecture": architecture,
            "preprocessing": preprocessing,
            "step": step,
            "embedding": embedding,
            "config": dataclasses.asdict(config),
        }

    def save_last():
        save(
            out / "last.pt",
            {
                **checkpoint(),
                "optimizer": optimizer.state_dict(),
                "sampler": sampler.state_dict(),
                "best": best,
                "validated": validated,
                "classes": counts,
                "untrained": untrained,
            },
        )

    out.mkdir(parents=True, exist_ok=True)
    evaluate.write_json(out / "config.json", dataclasses.asdict(config))
    keep_metrics_until(step, out / "metrics.jsonl")
    save_last()

    first, started, waited = step, time.perf_counter(), 0.0
    paused, said = 0.0, started  # paused: seconds of validation and checkpoints
    with open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1) as metrics:

        def validate():
            """Mean R@1 of the merged val index; the best so far goes to best.pt."""
            nonlocal best, validated
            results = evaluate.evaluate(
                model, val_sets, preprocessing, index=index, embedding=embedding
            )["mean"]
            model.train()
            validated, better = step, results["recall_at_1"] > best["recall_at_1"]
            if better:
                best = {"step": step, "recall_at_1": results["recall_at_1"]}
                save(out / "best.pt", checkpoint())
            metrics.write(
                json.dumps({"step": step, "val": results, "sampler_weights": sampler.weights})
                + "\n"
            )
            print(
                f"step {step:,} validation: mean R@1 {100 * results['recall_at_1']:.2f}, mMP@5 {100 * results['mmp_at_5']:.2f}"
                f"{' (best so far)' if better else ''}",
                flush=True,
            )

        model.train()
        stream = data.stream(batches, sampler, step, run.steps, workers)
        while step < run.steps:
            begun = time.perf_counter(), time.process_time()
            domain, losses, seconds = training_step(
                step, model, stream, sampler, optimizer, config, run
            )
            spent = {
                "seconds": time.perf_counter() - begun[0],
                "cpu_seconds": time.process_time() - begun[1],
            }
            waited += seconds
            step += 1
            values = {term: value for term, value in losses._asdict().items() if value is not None}
            rates = {
                "backbone_lr": optimizer.param_groups[0]["lr"],
                "head_lr": optimizer.param_groups[1]["lr"],
            }
            metrics.write(
                json.dumps({"step": step, "domain": domain, **values, **rates, **spent}) + "\n"
            )
            now = time.perf_counter()
            if now - said >= 5 or step == run.steps:
                said, training = now, now - started - paused
                rate = (step - first) / training
                print(
                    f"step {step:,} of {run.steps:,}   loss {losses.total:.3f} ({domain})   {rate * config.batch_size:,.0f} "
                    f"images/s   waiting for data {100 * waited / training:.1f} %   {clock((run.steps - step) / rate)} left",
                    flush=True,
                )
            if step % (config.val_every or run.steps_per_epoch) == 0:
                validate()
            if validated == step or step % config.save_every == 0:
                save_last()
                paused += time.perf_counter() - now
        if validated != step:
            validate()
            save_last()

    parameters = {
        "trained": sum(p.numel() for p in optimizer.state),
        "inference": inference_parameters(model, embedding),
    }
    model, best_checkpoint = evaluate.load_checkpoint(out / "best.pt", config.device)
    results = {
        **evaluate.evaluate(model, test_sets, preprocessing, index=index, embedding=embedding),
        "checkpoint": str(out / "best.pt"),
        "step": best_checkpoint["step"],
        "data": config.data,
        "split": "test",
        "index": index,
        "embedding": embedding,
        "untrained": untrained,
        "method": config.method,
        "val_recall_at_1": best["recall_at_1"],
        "parameters": parameters,
        **spent_on(out / "metrics.jsonl", splits, config.batch_size),
    }
    evaluate.write_json(out / "test.json", results)
    print(
        f"\n{out / 'best.pt'}, step {best_checkpoint['step']}: {embedding} embedding, test queries, {index} index"
    )
    print(evaluate.table(results, {"untrained": untrained}))
    arguments = [
        str(out / "best.pt"),
        *(["--data", config.data] if config.data else []),
        "--device",
        config.device,
    ]
    print(f"the same again: python evaluate.py {shlex.join(arguments)}")
    return results


def train_beside(config, results):
    """Trains the baseline config.beside with the same seed, data and budget, and prints the results of both in one table."""
    out = Path(config.out, config.beside)
    other = dataclasses.replace(
        config,
        method=config.beside,
        out=str(out),
        beside="nothing",
        sampler=None,
        signal=None,
        negatives=None,
        domain_margin=None,
        teachers=None,
    )
    print(f"\nthe baseline {config.beside}, in the same way:")
    baseline = train(other, resume=(out / "last.pt").exists())
    print(f"\n{config.method} and {config.beside}, test queries:")
    print(evaluate.table(results, {config.beside: baseline, "untrained": results["untrained"]}))


def describe(config, run, counts, splits, model):
    """Prints what is about to be trained: every option that differs from its default, the data, the sizes."""
    defaults = resolve(Config(out=config.out))
    different = [
        f"{flag(f.name)} {getattr(config, f.name)}"
        for f in dataclasses.fields(Config)
        if getattr(config, f.name) != getattr(defaults, f.name)
    ]
    print(
        f"{config.method} on {config.data or 'the procedural domains'} into {config.out}; differing from the defaults: "
        f"{', '.join(different) or 'nothing'}"
    )
    for domain, split in splits.items():
        print(f"  {domain:16}{len(split):9,} training images of {counts[domain]:,} classes")
    backbone = sum(p.numel() for p in model.backbone.parameters())
    heads = sum(p.numel() for p in model.parameters()) - backbone
    print(
        f"parameters: backbone {backbone / 1e6:.2f} M, heads and classifiers {heads / 1e6:.2f} M ({16 * heads / 1e6:,.0f} MB "
        f"with gradients and AdamW's moments); an epoch is {run.steps_per_epoch:,} steps, the run {run.steps:,}"
    )


def inference_parameters(model, embedding):
    """How many parameters are kept: of the backbone, and of the heads that embed."""
    heads = {"student": model.student_head, "teacher": model.teacher_heads, "backbone": None}[
        embedding
    ]
    return sum(
        p.numel() for part in (model.backbone, heads) if part is not None for p in part.parameters()
    )


def spent_on(path, domains, batch_size):
    """What metrics.jsonl says of the whole run: images given to each domain, seconds of the training steps, and the sampler's
    weights at each validation."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "domain" in line]
    return {
        "images": {
            domain: batch_size * sum(line["domain"] == domain for line in steps)
            for domain in domains
        },
        "seconds": sum(line["seconds"] for line in steps),
        "cpu_seconds": sum(line["cpu_seconds"] for line in steps),
        "sampler_weights": {
            line["step"]: line["sampler_weights"] for line in lines if "sampler_weights" in line
        },
    }


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def keep_metrics_until(step, path):
    """Drops the lines of steps that are about to be run again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            if (
                not line.endswith("\n") or json.loads(line)["step"] > step
            ):  # the last one may be cut short
                break
        except (ValueError, TypeError, KeyError):
            raise data.InputError(
                f"{path} is damaged at line {len(kept) + 1}, {line.strip()[:40]!r}: remove the lines that are no "
                "JSON objects with a step"
            ) from None
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


# Command line --------------------------------------------------------------------------------------------------------------

START = {  # head_lr, backbone_lr, frozen_epochs, by where the backbone's weights come from
    "scratch": (2e-3, 1e-3, 0.0),
    "compact": (3e-3, 3e-4, 1.0),  # chosen on val, with the weights in weights/
    "public": (1e-3, 1e-5, 2.0),  # paper section 4
}
MAY_CHANGE = ("steps", "workers", "device", "data", "out")  # on resuming


def resolve(config):
    """The configuration with every field that depends on another filled in."""
    compact = config.model in pretrained.COMPACT
    init = config.init or (config.model if compact else "scratch")
    kind = "compact" if init in pretrained.COMPACT else "scratch" if init == "scratch" else "public"
    head_lr, backbone_lr, frozen_epochs = START[kind]
    negatives = config.negatives or (
        "all"
        if config.method == "ujc" or compact and config.method in ("udon", "distill")
        else "domain"
    )
    margin = 0.2 if negatives == "all" and config.method != "ujc" else 0.0
    return dataclasses.replace(
        config,
        out=config.out or time.strftime("runs/%Y%m%d-%H%M%S"),
        init=init,
        sampler=config.sampler
        or ("dynamic" if config.method == "udon" and not compact else "round_robin"),
        beside=config.beside
        or ("usc" if config.method == "udon" and config.data is None else "nothing"),
        negatives=negatives,
        domain_margin=margin if config.domain_margin is None else config.domain_margin,
        signal=config.signal or ("teacher" if trains_teachers(config) else "student"),
        head_lr=head_lr if config.head_lr is None else config.head_lr,
        backbone_lr=backbone_lr if config.backbone_lr is None else config.backbone_lr,
        frozen_epochs=frozen_epochs if config.frozen_epochs is None else config.frozen_epochs,
        device=config.device or evaluate.default_device(),
    )


def configuration(given, resume):
    """The resolved Config of a run from the options given: a new run's, or with `resume` that of the run in --out."""
    out = Path(given.get("out") or "")
    if not resume:
        if given.get("out") and (out / "last.pt").exists():
            raise data.InputError(
                f"--out {out} holds a run already: go on with it by --resume, or give another folder"
            )
        config = resolve(Config(**given))
    else:
        if "out" not in given:
            raise data.InputError("--resume needs --out, the folder of the run to go on with")
        if not (out / "last.pt").exists():
            raise data.InputError(
                f"--out {out} holds no run to resume (no last.pt): leave out --resume, or correct the folder"
            )
        try:
            saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
            saved = Config(
                **{
                    name: tuple(value) if isinstance(value, list) else value
                    for name, value in saved.items()
                }
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise data.InputError(
                f"{out / 'config.json'} is no configuration of this version ({error}): start a new run"
            ) from None
        for name, value in given.items():
            if value != getattr(saved, name) and (
                name not in MAY_CHANGE or (name == "steps" and saved.schedule != "constant")
            ):
                raise data.InputError(
                    f"{flag(name)} is {value}, the run {out} was started with {getattr(saved, name)}: leave it "
                    "out, or start a new run in another folder"
                )
        config = dataclasses.replace(saved, **given)
    folder = next(
        p for p in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if p.exists()
    )
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise data.InputError(
            f"--out {config.out} cannot be written, since {folder} is a file or not yours: give another folder"
        )
    evaluate.check_device(config.device)
    return config


def command_line():
    """The parser of `udon.py train`; its options are Config's fields."""
    parser = evaluate.Parser(
        prog="udon.py",
        description="Trains one image embedding for many fine-grained domains (UDON).",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=evaluate.Parser)
    train_parser = commands.add_parser(
        "train",
        help="train, validate, print the test table",
        description="Trains, validates, and prints the test table.",
    )
    train_parser.add_argument(
        "--resume",
        action="store_true",
        help=f"go on with the run in --out as it was started; of its options only "
        f"{', '.join(map(flag, MAY_CHANGE))} may be given anew",
    )
    kinds = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind = (typing.get_args(kinds[f.name]) or (kinds[f.name],))[0]
        choices = f.metadata["choices"]
        settings = {
            "type": kind,
            "choices": choices,
            "metavar": None if choices else getattr(kind, "__name__", "").upper(),
        }
        if isinstance(f.default, tuple):
            settings["nargs"] = len(f.default)
        elif typing.get_origin(kind) is tuple:
            settings |= {"nargs": "+", "type": str, "metavar": f.name.upper().removesuffix("S")}
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"] + (
            f" (default: {shown})" if f.default is not None else ""
        )  # else it says what none means
        train_parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **settings)
    return parser


def main(arguments=None):
    parser = command_line()
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    given.pop("command")
    for name in {"weights", "domains"} & given.keys():
        given[name] = tuple(given[name])
    try:
        config = configuration(given, resume)
        results = train(config, resume)
        if config.beside != "nothing":
            train_beside(config, results)
    except data.InputError as error:
        parser.exit(2, f"udon.py: {error}\n")
    except OSError as error:  # no room, no permission: checkpoints are whole all the same
        place = error.filename or given.get("out", "runs")
        parser.exit(
            2,
            f"udon.py: {place} cannot be used ({error.strerror or error}): mend that, and go on with --resume\n",
        )
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # numpy's, torch's on a GPU, and on a CPU one without a name
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "allocate memory" not in str(error):
            raise
        parser.exit(
            2,
            f"udon.py: out of memory ({str(error).splitlines()[0][:200]}): lower --batch-size, --image-size, "
            "--student-dim or --teacher-dim, or take a smaller --model\n",
        )
    except KeyboardInterrupt:
        parser.exit(
            130,
            "\nudon.py: interrupted; a run folder goes on from its last checkpoint with --resume\n",
        )


if __name__ == "__main__":
    main()
