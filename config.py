"""Every option of a training run, with its published default and when to change it.
Copy with: nothing but the standard library.

    Config(**options)     the values of one run: defaults < preset < method < what some options
                          imply (TIMM, FROZEN, EPOCHS, STEPS) < options
    PRESETS, METHODS      named overlays of the defaults: {name: {option: value}}
    add_options(parser)   adds the options to an argparse parser, in groups
    configuration(given, resume)    the Config of a command line
    origins(config)       what differs from the published setting, and what set it

`Config()` is the published setting: UDON with ViT-B/16 on UnED (paper section 4, arXiv:2406.08332).
`python udon.py train` uses the preset `mini` unless told otherwise.
"""

import argparse
import ast
import dataclasses
import inspect
import json
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class ConfigError(ValueError):
    """An option that cannot be used: its value, what is allowed and the remedy, in a sentence."""

    def __init__(self, message: str):
        printable = (c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__("".join(printable))  # values may hold line breaks


COMPACT = {
    "image_size": 48,
    "init": "compact",
    "batch_size": 32,
    "epochs": 6.0,
    "min_steps": 1000,
    "period": 100,
    "head_lr": 3e-3,
    "backbone_lr": 6e-4,
    "schedule": "cosine",
    "warmup_steps": 200,
    "frozen_epochs": 0.2,
    "student_init": "pca",
    "ema": 0.99,
}
PRESETS = {
    # Ours, chosen on validation splits, with the compact weights in weights/.
    "mini": {"model": "mini", **COMPACT},
    "micro": {"model": "micro", **COMPACT},
    # The published setting for each size; give public weights with --init.
    "uned-s16": {"model": "s16"},
    "uned-b16": {"model": "b16"},
    "uned-l16": {"model": "l16"},
    "uned-b16-clip": {"model": "b16", "init_statistics": "clip"},
}

SINGLE = {"weights": (0.0, 1.0, 0.0, 0.0), "sampler": "round_robin", "signal": "student"}
METHODS = {
    # The published method: a student and the teachers of all domains, trained together.
    "udon": {},
    # Ours: the student separates the classes of all domains, which a merged index needs.
    "udon-joint": {"negatives": "all", "domain_margin": 0.2, "sampler": "sqrt_size"},
    # Baselines of the paper: one student, with a classifier per domain or one joint classifier.
    "usc": SINGLE,
    "ujc": {**SINGLE, "negatives": "all"},
    # The teachers of all domains without a student.
    "teachers": {
        "weights": (1.0, 0.0, 0.0, 0.0),
        "sampler": "round_robin",
        "embedding": "teacher",
        "index": "separate",
    },
    # A student with a backbone of its own, distilled from frozen --teachers.
    "distill": {"weights": (0.0, 1.0, 1.0, 1.0), "sampler": "round_robin", "signal": "student"},
    # The backbone as it is: nothing is trained.
    "backbone": {
        "weights": (0.0, 0.0, 0.0, 0.0),
        "epochs": 0.0,
        "embedding": "backbone",
        "student_init": "lecun",  # no head is used
    },
}
MODELS = ("micro", "mini", "s16", "b16", "l16")  # sizes of the ViT
# A model of timm comes with its weights and image size, unless these are given.
TIMM = {"init": "timm", "image_size": 0}
# Steps on features take milliseconds: checkpoints, which hold the whole backbone, would take most
# of the time. With a running mean they would hold it twice.
FROZEN = {"save_every": 2000, "ema": 0.0}
# A run of a number of steps may be resumed with more, and then equals one of that length. Warm-up
# and a running mean would keep a short trial near its start.
STEPS = {"schedule": "constant", "warmup_steps": 0, "ema": 0.0}
EPOCHS = {"min_steps": 0}  # a number of epochs that is given is kept
Preset = Literal["mini", "micro", "uned-s16", "uned-b16", "uned-l16", "uned-b16-clip"]
Method = Literal["udon", "udon-joint", "usc", "ujc", "teachers", "distill", "backbone"]
DEMO = ("udon-joint", "usc")  # what `python udon.py train` compares with without other options

GROUPS = {  # the first field of each group of options
    "data": "data",
    "preset": "model",
    "method": "training",
    "weights": "losses",
    "sampler": "paper's variants",
}
MAY_CHANGE = (  # when a run is resumed
    *("steps", "workers", "device", "data", "out", "compare", "on_bad_image"),
    *("accumulate", "compile", "checkpoint_activations"),
)
LEAST = {  # the smallest value of numbers, 0 unless given
    **dict.fromkeys(("student_dim", "teacher_dim", "head_layers", "batch_size"), 1),
    **dict.fromkeys(("steps", "val_every", "save_every", "period", "accumulate"), 1),
    "margin": -math.inf,
}
MOST = {"head_layers": 100, "workers": 1024, "min_area": 1, "ema": 1, "views": 1000}
POSITIVE = ("min_area", "scale", "temperature")  # must be above 0


@dataclass(frozen=True, init=False)
class Config:
    """The options of a run. Values given override the method's, these the preset's, these the
    published defaults. None means that something is absent. Raises ConfigError for unknown
    names and for values that are of a wrong type, out of range or contradict each other."""

    # data

    data: str | None = None
    """Data directory: UnED layout or class folders; without it: procedural domains."""
    domains: tuple[str, ...] | None = None
    """Train and test on these domains only; without it: on all of them."""
    out: str | None = None
    """Directory of the run, which all machines of a run share; without it: a new one,
    runs/<date>-<time>."""
    min_area: float | None = None
    """Smallest share of the image that a random training crop covers, up to 1; set it, for example
    to 0.3, when a small data set overfits; without it: crops of a fixed size, 7/8 of the side
    (paper section 4)."""
    antialias: bool = True
    """Antialias when images are downscaled; turn it off to match features of the official code,
    which does not (TensorFlow's resize). Models of timm that need bicubic images refuse that."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Stop at an image that cannot be read, or skip up to 1 % of a split; those skipped are listed
    in skipped.json of the run."""
    workers: int = min(CPUS, 8)
    """Processes that load images which do not fit in memory; raise it when the time spent waiting
    for data, which is printed, is more than a few percent."""

    # model

    preset: Preset | None = None
    """Model size, starting weights and training schedule in one name: mini for most uses without a
    GPU, micro for quick trials, uned-* for the published setting with public weights (--init)."""
    model: str = "b16"
    """Backbone: a ViT of size micro, mini, s16, b16 (published) or l16, or timm:NAME for any model
    of the package timm; a larger one needs public weights and a GPU."""
    image_size: int = 224
    """Side of the images in pixels (paper section 4), divisible by 16; with --model timm:NAME 0,
    the default there, is the size at which that model was trained."""
    init: str = "scratch"
    """Initial weights of the backbone: a file of public ViT weights (published: AugReg or CLIP),
    compact for the project's own weights of models mini and micro, timm for those that timm
    downloads for --model timm:NAME (the default there), or scratch for random weights."""
    init_activation: Literal["gelu_tanh", "gelu", "quick_gelu"] | None = None
    """Activation of these weights; set it when a note says that the file does not tell, for example
    to gelu for the LAION weights of open_clip."""
    init_statistics: Literal["half", "imagenet", "clip"] | None = None
    """Mean and standard deviation that the images are normalised with: 0.5, ImageNet's or CLIP's;
    set it when a note says that the statistics of these weights were assumed."""
    freeze_backbone: bool = False
    """Train the heads alone, on features of the backbone that are computed once and kept in the
    directory of the run; the way to use a strong public backbone without a GPU. Steps are cheap:
    try more --epochs and a larger --head-lr, such as 20 and 1e-2."""
    views: int = 4
    """With --freeze-backbone: random training crops of each image that features are computed of,
    besides those of the test view."""
    student_dim: int = 64
    """Width of the universal embedding (paper section 4)."""
    student_init: Literal["lecun", "pca", "lda"] = "lecun"
    """What heads and classifiers start from: lecun, random numbers (official setting), or pca or
    lda, the training images as the backbone embeds them. With pca the heads hold the first
    principal axes, all of them if a head is wide enough, and a class starts at the mean of its
    images. With lda the same holds of whitened embeddings: what varies within classes counts
    less. From random heads, a small data set ends below the backbone alone."""
    teacher_dim: int = 256
    """Width of the teacher embeddings (paper section 4)."""
    head_layers: int = 1
    """Linear layers of each head, with LayerNorm and GELU in between (paper: 1; more are slightly
    worse)."""

    # training

    method: Method = "udon"
    """The published method is udon; udon-joint also separates the domains, for search across
    domains; baselines: usc and ujc (a student alone, with a classifier per domain or one for all),
    teachers (no student), distill (from frozen --teachers), backbone (untrained)."""
    compare: tuple[Method, ...] = ()
    """Methods to train afterwards with the same options, each in <out>/<method>, and to print in
    one table; without --data and --method: udon-joint usc."""
    batch_size: int = 128
    """Images per step, all of one domain (paper section 4)."""
    accumulate: int = 1
    """Pieces in which the images of a step are computed, so that only one needs memory at a time;
    the losses stay those of the whole batch, and the step takes up to half as long again."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the backbone in training: fp32 (on GPUs with TF32 products) or bf16, which
    needs a device that computes in it; heads, losses, weights and tests are always float32."""
    compile: bool = False
    """Compile the backbone with torch.compile: slower to start, faster steps; needs a C++ compiler
    on a CPU."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the backbone's blocks for the backward pass and compute the rest
    again: much less memory, a third more time."""
    epochs: float = 10.0
    """Training length, in passes over as many images as all domains have (paper section 4)."""
    min_steps: int = 0
    """Least training length in steps, which at most doubles the epochs (paper: 0): a small data set
    gains from more passes. With --epochs it is 0 unless given."""
    steps: int | None = None
    """Training steps, instead of --epochs."""
    head_lr: float = 1e-3
    """Learning rate of heads and classifiers (paper section 4)."""
    backbone_lr: float = 1e-5
    """Learning rate of the backbone (paper section 4, for public weights); raise it to about 6e-4
    for compact weights and 1e-3 for random ones."""
    frozen_epochs: float = 2.0
    """Epochs at the start that train the heads alone (paper section 4); set it to 0 with --init
    scratch."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of both learning rates (paper: constant). With --steps it is constant unless given,
    so that the run may be resumed with more steps."""
    warmup_steps: int = 0
    """Steps in which both learning rates rise from 0 (paper: 0); helps large rates, and keeps a run
    of few steps near the weights that it starts from. With --steps it is 0 unless given."""
    weight_decay: float = 1e-6
    """Decoupled weight decay of all parameters (official setting)."""
    ema: float = 0.0
    """Decay of a running mean of all weights, such as 0.99, which is validated, tested and kept in
    best.pt instead of the weights themselves (paper: 0, none); it keeps a run of few steps near the
    weights that it starts from. With --steps or --freeze-backbone it is 0 unless given."""
    seed: int = 0
    """Seed of initial weights, batches and sampler; vary it to measure a spread."""
    val_every: int | None = None
    """Steps between validations; without it: an epoch."""
    save_every: int = 200
    """Steps between checkpoints: at most so many are repeated after a crash; 2000 with
    --freeze-backbone, whose steps are short."""
    device: str = "auto"
    """Device such as cpu, cuda or cuda:1; auto: cuda where there is one, else cpu."""
    teachers: str | None = None
    """For --method distill: a checkpoint of teachers or udon, or a directory of runs of one domain
    each, <directory>/<domain>/best.pt."""

    # losses

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Weights of teacher classification, student classification, logit distillation and relational
    distillation (paper section 3); a loss of weight 0 is not computed."""
    classification: Literal["normface", "cosface", "arcface"] = "normface"
    """Classification loss of students and teachers (official setting: normface)."""
    margin: float = 0.0
    """Margin of cosface, in cosine units, or of arcface, in radians."""
    scale: float = 16.0
    """Factor of the cosines in the classification losses (official setting)."""
    temperature: float = 0.1
    """Divisor of the student's and teacher's cosines in logit distillation (official setting)."""
    relational_scale: float = 32.0
    """Factor of the relational loss (official setting at batch 128)."""
    negatives: Literal["domain", "all"] = "domain"
    """Classes that the student's classification loss separates: those of the batch's domain
    (published) or of all domains, which helps search across domains."""
    domain_margin: float = 0.0
    """With --negatives all: added to the cosines of other domains' classes (udon-joint: 0.2)."""

    # the paper's variants

    sampler: Literal["dynamic", "round_robin", "size", "sqrt_size", "balanced"] = "dynamic"
    """How the domain of the next batch is chosen (published: dynamic); round_robin and size,
    proportional to the training images, are the paper's static baselines; sqrt_size, proportional
    to their square roots, is between these two (udon-joint)."""
    period: int = 1000
    """Steps between two updates of the dynamic sampler's weights (official setting, of 221,180
    steps); at least ten updates in a run are useful."""
    signal: Literal["teacher", "student"] = "teacher"
    """Whose classification loss the dynamic sampler follows (published: the teacher's)."""
    distill_into_backbone: bool = False
    """Let the distillation losses train the backbone too, as the official code does and the paper
    does not."""
    inactive_heads: Literal["skip", "zero"] = "skip"
    """Heads of inactive domains are skipped by the optimizer, or get zero gradients as in the
    official code, where momentum and weight decay still move them."""
    embedding: Literal["student", "teacher", "backbone"] = "student"
    """Embedding that is validated and tested; teacher needs --index separate."""
    index: Literal["merged", "separate"] = "merged"
    """Search the images of all domains (the benchmark) or of the query's domain alone."""

    def __init__(self, **options):
        for name in options.keys() - DEFAULTS.keys():
            raise ConfigError(f"option {name!r} is unknown: use one of {', '.join(DEFAULTS)}")
        preset, method = options.get("preset"), options.get("method", "udon")
        check_value("preset", preset)
        check_value("method", method)
        for name, value in (overlaid(preset, method) | implied(options) | options).items():
            value = tuple(value) if isinstance(value, list) else value
            check_value(name, value)
            object.__setattr__(self, name, value)
        check_model(self)
        check_features(self)
        check_head(self)
        check_losses(self)
        check_evaluation(self)

    @property
    def trains_teachers(self) -> bool:
        """Whether the model has teachers of its own."""
        return self.weights[0] > 0


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def overlaid(preset: str | None, method: str) -> dict:
    """All values of a preset and a method, without any option."""
    names = {"preset": preset, "method": method}
    return DEFAULTS | PRESETS.get(preset, {}) | METHODS[method] | names


def implied(options: dict) -> dict:
    """The values that some of the options bring with them."""
    model = TIMM if str(options.get("model")).startswith("timm:") else {}
    frozen = FROZEN if options.get("freeze_backbone") is True else {}
    epochs = EPOCHS if options.get("epochs") is not None else {}
    steps = STEPS if options.get("steps") is not None else {}
    return model | frozen | epochs | steps


def check_value(name, value):
    """Raises ConfigError if a value is not of the type of the field `name`, or out of range."""
    kinds = alternatives(TYPES[name])
    if not any(is_of(value, kind) for kind in kinds):
        allowed = " or ".join(map(type_name, kinds))
        raise ConfigError(f"{flag(name)} is {shown(value)}: it must be {allowed}")
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            check_number(name, item)
        if item == "" or (isinstance(item, str) and "\0" in item):
            raise ConfigError(f"{flag(name)} is {item!r}: give a text without null characters")


def alternatives(kind):
    """The types of a union such as `int | None`, or the type itself."""
    unions = (types.UnionType, typing.Union)
    return typing.get_args(kind) if typing.get_origin(kind) in unions else (kind,)


def type_name(kind) -> str:
    """A type in words: of a Literal, its values."""
    if kind is types.NoneType:
        return "left out"
    values = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        count = "any number" if values[-1] is ... else str(len(values))
        return f"{count} of {type_name(values[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "one of " + ", ".join(values) if values else names[kind]


def is_of(value, kind) -> bool:
    """Whether a value is of an annotated type; an int is a float, too, but a bool is no int."""
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str) and value in items
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and (items[-1] is ... or len(items) == len(value))
            and all(is_of(item, items[0]) for item in value)
        )
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_number(name, value):
    least, most = LEAST.get(name, 0), MOST.get(name, 2**63 - 1)
    if not -(2**63) <= value < 2**63:  # neither is NaN
        raise ConfigError(f"{flag(name)} is {shown(value)}: it must be finite and below 2^63")
    if value > most:
        raise ConfigError(f"{flag(name)} is {value}: it must be {most} or less")
    if value < least:
        raise ConfigError(f"{flag(name)} is {value}: it must be {least} or more")
    if value == 0 and name in POSITIVE:
        raise ConfigError(f"{flag(name)} is {value}: it must be above 0")


def shown(value) -> str:
    """A value as on the command line, shortened, on one line."""
    if value is None:
        return "not given"
    if isinstance(value, int) and value.bit_length() > 1000:  # str() refuses the longest
        return "a number of hundreds of digits"
    text = " ".join(map(shown, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require(condition, problem):
    if not condition:
        raise ConfigError(problem)


def check_model(config):
    """Raises ConfigError for an unknown model and for options that the model does not take."""
    is_timm, model = config.model.startswith("timm:"), f"--model is {shown(config.model)}"
    require(
        is_timm or config.model in MODELS,
        f"{model}: it must be one of {', '.join(MODELS)}, or timm:NAME, such as timm:resnet50",
    )
    require(
        is_timm or config.image_size > 0,
        f"--image-size is 0 but {model}: give 1 or more, or use a model of timm",
    )
    require(
        is_timm or config.init != "timm",
        f"--init is timm but {model}: give a file of weights, or use a model of timm",
    )
    require(
        not is_timm or config.init_activation is None,
        f"--init-activation is {config.init_activation} but {model}, whose activation is fixed: "
        "leave it out",
    )


def check_features(config):
    """Raises ConfigError for options that training on features of a frozen backbone rules out."""
    frozen, views = config.freeze_backbone, config.views
    require(
        frozen or views == DEFAULTS["views"],
        f"--views is {views} without --freeze-backbone, which it belongs to: give both or none",
    )
    require(
        not frozen or views > 0 or config.min_area is None,
        f"--min-area is {config.min_area} with --views 0, which takes no random crops: leave it "
        "out, or use --views 1 or more",
    )
    for name in ("distill_into_backbone", "checkpoint_activations"):
        require(
            not frozen or not getattr(config, name),
            f"{flag(name)} is given with --freeze-backbone, which computes no gradient of the "
            "backbone: leave one of them out",
        )
    require(
        not frozen or config.teachers is None,
        f"--teachers is {config.teachers} with --freeze-backbone, but frozen teachers have a "
        "backbone of their own and need the images: leave one of them out",
    )


def check_head(config):
    """Raises ConfigError for heads that the axes of embeddings cannot fill, and for a mean that
    would stay at these axes."""
    require(
        config.ema < 1 or config.student_init == "lecun",
        f"--ema is 1 with --student-init {config.student_init}, so that the mean stays at the "
        "start: use a value below 1, such as 0.99",
    )
    require(
        config.student_init == "lecun" or config.head_layers == 1,
        f"--student-init is {config.student_init} with --head-layers {config.head_layers}, and it "
        "fills a single layer: use --head-layers 1 or --student-init lecun",
    )


def check_losses(config):
    """Raises ConfigError for loss options that contradict each other or the training length."""
    teacher, student, *distillation = config.weights
    weights = f"--weights are {shown(config.weights)}"
    frozen_teachers = config.teachers is not None
    trains = config.steps is not None or config.epochs > 0
    require(
        any(config.weights) or not trains,
        f"{weights}, so that nothing is trained: raise one above 0, or use --method backbone "
        "without --steps and --epochs",
    )
    require(
        trains or not any(config.weights),
        f"--epochs is {config.epochs}: give a length above 0, or use --method backbone",
    )
    require(
        frozen_teachers or teacher > 0 or not any(distillation),
        f"{weights} and --teachers is not given, but distillation needs a teacher: raise the first "
        "weight above 0, or give frozen --teachers with --method distill",
    )
    require(
        not frozen_teachers or (teacher == 0 and any(distillation)),
        f"--teachers is {config.teachers} but {weights}: frozen teachers need the first weight 0 "
        "and the third or fourth above 0, use --method distill",
    )
    require(
        config.sampler != "dynamic"
        or not trains
        or (teacher if config.signal == "teacher" else student) > 0,
        f"--signal is {config.signal} with --sampler dynamic, but {weights}, which leave out that "
        "classification loss: use the other signal or another sampler",
    )
    require(
        config.domain_margin == 0 or config.negatives == "all",
        f"--domain-margin is {config.domain_margin} with --negatives domain, which has no classes "
        "of other domains: use --negatives all",
    )
    require(
        (config.margin == 0) == (config.classification == "normface"),
        f"--margin is {config.margin} with --classification {config.classification}: normface "
        "takes none, cosface and arcface need one, such as 0.2",
    )


def check_evaluation(config):
    """Raises ConfigError for an embedding that nothing trains or that cannot be searched."""
    weights = f"--weights are {shown(config.weights)}"
    require(
        config.embedding != "teacher" or config.index == "separate",
        "--embedding is teacher with --index merged, which would compare the embeddings of "
        "different teachers: use --index separate",
    )
    require(
        config.embedding != "teacher" or config.trains_teachers,
        f"--embedding is teacher, but {weights}, which trains none: use --method teachers or udon",
    )
    require(
        config.embedding != "student" or any(config.weights[1:]),
        f"--embedding is student, but {weights}, which trains none: use --method teachers, or "
        "--embedding backbone",
    )
    require(
        config.method not in config.compare,
        f"--compare names {config.method}, which is --method: name other methods",
    )
    require(
        len(set(config.compare)) == len(config.compare),
        f"--compare is {shown(config.compare)}: name each method once",
    )


def with_method(config: Config, method: str, out: Path) -> Config:
    """The configuration of a run to compare with: another method, and of the options those that
    differ from the values of the first run's preset and method."""
    place = {"method": method, "preset": config.preset, "compare": (), "out": str(out)}
    return Config(**options_of(config) | place)


def options_of(config: Config) -> dict:
    """The values of a configuration that differ from those of its preset and method, and from those
    that such values imply."""
    base = overlaid(config.preset, config.method)
    changed = {name: value for name, value in vars(config).items() if value != base[name]}
    base |= implied(changed)
    return {name: value for name, value in vars(config).items() if value != base[name]}


PLACES = (  # options that `origins` leaves out
    *("data", "domains", "out", "workers", "device", "preset", "method", "compare"),
    "on_bad_image",
)


def origins(config: Config) -> dict[str, dict]:
    """{"preset mini" | "method usc" | "options": {name: value}} of all values that differ from the
    published setting, by what set them."""
    preset, method = PRESETS.get(config.preset, {}), METHODS[config.method]
    found = {f"preset {config.preset}": {}, f"method {config.method}": {}, "options": {}}
    for name, default in DEFAULTS.items():
        value = getattr(config, name)
        if value == default or name in PLACES:
            continue
        if name in method and method[name] == value:
            found[f"method {config.method}"][name] = value
        elif name in preset and preset[name] == value:
            found[f"preset {config.preset}"][name] = value
        else:
            found["options"][name] = value
    return {origin: values for origin, values in found.items() if values}


def help_texts() -> dict[str, str]:
    """{field: the string that follows it in the source of Config}."""
    body = ast.parse(inspect.getsource(Config)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split()).removesuffix(".")
        for field, text in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign)
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of Config, in groups. Options that are not given are absent
    from the parsed namespace."""
    for name, text in help_texts().items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        default, mini = DEFAULTS[name], PRESETS["mini"].get(name)
        if name == "preset":
            text += " (default: mini)"
        elif mini is not None:
            text += f" (published: {shown(default)}; mini: {shown(mini)})"
        elif default not in (None, ()):
            text += f" (default: {shown(default)})"
        arguments = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        group.add_argument(flag(name), **arguments, **value_arguments(name))


def value_arguments(name) -> dict:
    """The arguments of argparse's add_argument that follow from a field's type."""
    kind = alternatives(TYPES[name])[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    arguments = {}
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        arguments["nargs"] = "*" if items[-1] is ... else len(items)
        kind = items[0]
    if typing.get_origin(kind) is typing.Literal:
        return arguments | {"choices": typing.get_args(kind)}
    metavar = {int: "N", float: "X"}.get(kind, name.upper())
    return arguments | {"type": whole if kind is int else kind, "metavar": metavar}


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is not a whole number") from None


def read(path: Path, remedy: str = "delete it, --resume will restore it from last.pt") -> Config:
    """The configuration in the file config.json of a run."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError("not a JSON object")
        if missing := sorted(DEFAULTS.keys() - values.keys()):
            raise ConfigError(f"{missing[0]} is missing")
        return Config(**values)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a configuration of this version ({error}): {remedy}"
        ) from None


def check_same(config: Config, started: Config, place: str) -> None:
    """Raises ConfigError if `config` cannot continue the run in `place`, started as `started`."""
    for name in DEFAULTS:
        value, before = getattr(config, name), getattr(started, name)
        ends = name == "steps" and started.schedule != "constant"
        if (ends or name not in MAY_CHANGE) and value != before:
            given = "without it" if before is None else f"with {shown(before)}"
            same = "leave it out" if before is None else "use that value"
            reason = ", and its cosine schedule fixes its length" if ends else ""
            other = "continue in a new run with --init RUN" if ends else "start a new run"
            raise ConfigError(
                f"{flag(name)} is {shown(value)}, but {place} was started {given}{reason}: "
                f"{same}, or {other}"
            )


def configuration(given: dict, resume: bool, started: Config | None = None) -> Config:
    """The Config of command-line options; with `resume`, that of the run in --out, `started` if it
    is known, with those of the options that may change. Without --data and --method, DEMO is
    compared with. The options of the file "config" come before those given."""
    given = dict(given)
    other = given.pop("config", None)
    if not resume:
        base = {"preset": "mini", "compare": () if given.keys() & {"data", "method"} else DEMO}
        if other is not None:
            started = read(Path(other), "give the config.json of a run of this version")
            base = options_of(started) | {"preset": started.preset, "method": started.method}
            base.pop("out", None)
            if "epochs" in given:
                base.pop("steps", None)  # which would come before them
        place = {"data": os.path.abspath(given["data"])} if given.get("data") else {}
        return Config(**base | given | place)
    if other is not None:
        raise ConfigError("--config is given with --resume, which keeps the options: leave it out")
    if "out" not in given:
        raise ConfigError("--resume needs --out, the directory of the run to resume")
    started = started or read(Path(given["out"]) / "config.json")
    config = dataclasses.replace(started, **given)
    check_same(config, started, f"the run {given['out']}")
    return config
