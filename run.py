"""The state of a training run: built from options and data, saved and restored.

    build_run(config, splits, state=None)   -> Run, new or as last.pt left it
    build_model(config, classes)            -> model, architecture, preprocessing
    build_optimizer(model, config)          -> AdamW, the backbone and the heads in two groups
    FrozenTeachers(models)                  trained models as teachers of the method `distill`
    keep_freed_memory()                     makes malloc keep memory from step to step, on a CPU
    learning_rates(run)                     of the backbone and the heads in the next step

`udon.py` holds the method and the training loop. Copy with: all that it imports.
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import math
import numbers
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import checkpoint
import config as options
import data
import distributed
import evaluate
import heads
import pretrained
import rundir
from config import Config, ConfigError
from distributed import GradientSum
from model import SIZES, UDON
from sampler import DomainSampler


@dataclass
class Run:
    """A training run: what it was started with, and the state that each step changes."""

    config: Config
    model: UDON
    architecture: dict  # arguments of checkpoint.build
    preprocessing: dict  # {"mean": (3), "std": (3), "interpolation": str, "antialias": bool}
    optimizer: torch.optim.Optimizer
    sampler: DomainSampler
    device: str
    steps_per_epoch: int  # as in the paper: training images of all domains // batch size
    digests: dict  # {domain: Split.digest() of its training images}
    teachers: Callable | None = None  # frozen ones, for the method `distill`
    average: UDON | None = None  # the running mean of the model's weights, with --ema
    class_names: dict = field(default_factory=dict)  # {domain: the names of its training classes}
    features: dict | None = None  # of test images, with --freeze-backbone: see evaluate.evaluate
    gradients: GradientSum = field(default_factory=lambda: GradientSum(()))
    step: int = 0  # steps done
    validated: int | None = None  # step of the last validation
    best: dict = field(default_factory=lambda: {"step": 0, "recall_at_1": -1.0, "mmp_at_5": -1.0})
    backbone: dict | None = None  # test results of the backbone as pre-trained
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def steps(self) -> int:
        """Length of the run; 0 if nothing is trained."""
        if self.config.steps is not None:
            return self.config.steps
        steps = self.config.epochs * self.steps_per_epoch
        return max(1, int(steps), min(self.config.min_steps, int(2 * steps))) if steps > 0 else 0

    @property
    def frozen_steps(self) -> int:
        if self.config.freeze_backbone:
            return self.steps
        return int(self.config.frozen_epochs * self.steps_per_epoch)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def evaluated(self) -> UDON:
        """The model that is validated and kept in best.pt."""
        return self.model if self.average is None else self.average

    @functools.cached_property
    def zeros(self) -> torch.Tensor:
        """(N,), as many as the largest head or classifier has; zero gradients are views of it."""
        parameters = self.optimizer.param_groups[1]["params"]
        return parameters[0].new_zeros(max(parameter.numel() for parameter in parameters))

    def inputs(self, batch: torch.Tensor) -> torch.Tensor:
        """What the model takes, float32 on the device: images (B, 3, H, W) uint8, normalised with
        the statistics of the backbone; or, with --freeze-backbone, its features (B, D) of them."""
        batch = batch.to(self.device, non_blocking=True)
        if self.config.freeze_backbone:
            return batch.float()
        return data.normalise(batch, self.preprocessing["mean"], self.preprocessing["std"])

    def contents(self) -> dict:
        """What best.pt holds."""
        return {
            "model": self.evaluated.state_dict(),
            "architecture": self.architecture,
            "preprocessing": self.preprocessing,
            "step": self.step,
            "embedding": self.config.embedding,
            "index": self.config.index,
            "config": dataclasses.asdict(self.config),
            "run": self.identity,
            "class_names": self.class_names,
        }

    def save(self, metrics: rundir.MetricsLog) -> None:
        """Writes last.pt, from which the run can be resumed. Raises InputError, and keeps the
        previous last.pt, if a weight is not finite. Of several processes, rank 0 writes."""
        self.check_finite()
        if distributed.rank() > 0:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "best": self.best,
            "validated": self.validated,
            "backbone": self.backbone,
            "metrics": metrics.recorded(),
            "digests": self.digests,
            "teachers": self.teachers and self.teachers.sources,
        }
        if self.average is not None:
            state["trained"] = self.model.state_dict()
        checkpoint.save(self.out / "last.pt", self.contents() | state)

    def check_finite(self) -> None:
        """Raises InputError if a weight is not finite."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise data.InputError(
                    f"parameter {name} is not finite after step {self.step}: lower --backbone-lr "
                    "or --head-lr; last.pt is the last good checkpoint"
                )

    @contextlib.contextmanager
    def freezing(self) -> Iterator[None]:
        """A context of steps that may freeze the backbone; after it, all of it trains again."""
        try:
            yield
        finally:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.requires_grad_()

    @property
    def needs_validation(self) -> bool:
        """Whether the present step is one that is validated and has not been yet. The start is,
        too: best.pt is never worse on the val queries than what training started from."""
        last = self.step >= self.steps
        due = self.step % (self.config.val_every or self.steps_per_epoch) == 0
        return (due or last) and self.validated != self.step

    def restore(self, state: dict) -> None:
        """Continues from the contents of last.pt. Raises RunError for a state of another model."""
        try:
            check_optimizer_state(self.optimizer, state["optimizer"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.model.load_state_dict(state["trained"])
            self.sampler.load_state_dict(state["sampler"])
            self.step, self.validated = state["step"], state["validated"]
            self.best, self.backbone = state["best"], state["backbone"]
            self.identity = state["run"]
        except checkpoint.MALFORMED as error:
            raise rundir.RunError(
                f"{self.out / 'last.pt'} holds no state of this run ({checkpoint.summary(error)}): "
                "restore the run's own last.pt, or start a new run"
            ) from None
        if state.get("teachers") != (self.teachers and self.teachers.sources):
            raise ConfigError(
                f"--teachers {self.config.teachers} are others than those that the run {self.out} "
                "was started with: restore them, or start a new run"
            )
        if self.step > self.steps:
            raise ConfigError(
                f"--steps is {self.steps}, but the run {self.out} has done {self.step}: give that "
                "or more"
            )


def learning_rates(run: Run) -> tuple[float, float]:
    """(backbone, heads) of the next step, a function of its number alone."""
    config, step = run.config, run.step
    factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / run.steps))
    return 0.0 if step < run.frozen_steps else factor * config.backbone_lr, factor * config.head_lr


def update_average(run: Run) -> None:
    """Moves the running mean of the weights towards those after a step. From random weights the
    decay rises with the steps, so that the mean soon forgets them. Buffers, such as the statistics
    of BatchNorm, are copied."""
    if run.average is None:
        return
    decay = run.config.ema
    if run.config.student_init == "lecun" or run.config.init == "scratch":
        decay = min(decay, run.step / (run.step + 9))
    pairs = zip(run.average.parameters(), run.model.parameters())
    trained = [pair for pair in pairs if pair[1].requires_grad]  # a frozen backbone is its own mean
    get_ema_multi_avg_fn(decay)(*map(list, zip(*trained)), run.step)
    for mean, buffer in zip(run.average.buffers(), run.model.buffers()):
        mean.copy_(buffer)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Float32 products on GPUs: "high", in TF32, or "highest". A CPU has one precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep what a step frees for the next step, but for blocks above 32 MB. By
    default it returns memory to the system in every step, and getting it back takes up to a tenth
    of the time of a small model. Other C libraries are left as they are."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older versions take no more
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class NotFinite(data.InputError):
    """A loss or gradient that is not finite; `about` is {"step", "domain", "term", "value"}."""

    def __init__(self, message: str, about: dict):
        super().__init__(message)
        self.about = about


def finite_numbers(run: Run, domain: str, losses: dict) -> dict[str, float | None]:
    """The losses as numbers, read from the device at once. Raises NotFinite if one of them or the
    norm of the gradient is not finite."""
    computed = {name: loss.detach().float() for name, loss in losses.items() if loss is not None}
    sums = distributed.total(torch.stack(list(computed.values())))
    parameters = itertools.chain(*(group["params"] for group in run.optimizer.param_groups))
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    numbers = dict(zip([*computed, "gradient norm"], torch.cat([sums, norm[None]]).tolist()))
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise NotFinite(
                f"{name} is {value} at step {run.step}, domain {domain}: {likely_cause(run)}",
                {"step": run.step, "domain": domain, "term": name, "value": str(value)},
            )
    return {name: numbers.get(name) for name in losses}


def likely_cause(run) -> str:
    """Which option to change after a loss that is not finite."""
    config, limit = run.config, 1e30  # of float32, 3e38, with room for sums and squares
    if config.scale > limit or config.relational_scale > limit:
        return "lower --scale or --relational-scale"
    if config.temperature < 1 / limit:
        return "raise --temperature"
    if config.weight_decay * max(config.head_lr, config.backbone_lr) > 1:
        return "lower --weight-decay"
    if run.step == 0 and config.init != "scratch":
        return f"check the weights of --init {config.init} and the images of the domain"
    return "lower --backbone-lr or --head-lr, and check the images of the domain"


def build_model(
    config: Config, classes: dict[str, int], backbone: nn.Module | None = None
) -> tuple[UDON, dict, dict]:
    """The initial model for {domain: number of classes}, a function of the configuration and, where
    it is given, of a backbone of one's own
    -> model, architecture, preprocessing; the last two are part of every checkpoint."""
    if backbone is not None:
        check_own(backbone, config)
    architecture = {
        "backbone": {**description(config.model, backbone), "image_size": config.image_size},
        "classes": classes,
        "student_dim": config.student_dim,
        "teacher_dim": config.teacher_dim if config.trains_teachers else 0,
        "head_layers": config.head_layers,
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        torch.manual_seed(config.seed)
        try:
            model = checkpoint.build(architecture, backbone)
            preprocessing = pretrained.STATISTICS.get(config.init_statistics, pretrained.HALF)
            if backbone is None:
                preprocessing = load_initial_weights(model.backbone, config)
                architecture["backbone"] = model.backbone.architecture  # with its family's values
        except pretrained.WeightsError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for note in notes:
        print(f"note: {note.message}")
    is_clip = architecture["backbone"].get("pre_norm", False)
    if config.preset == "uned-b16-clip" and config.init != "scratch" and not is_clip:
        raise ConfigError(
            f"--preset uned-b16-clip takes weights of CLIP, which --init {config.init} does not "
            "hold: use --preset uned-b16"
        )
    return model, architecture, {**preprocessing._asdict(), "antialias": config.antialias}


def check_own(backbone: nn.Module, config: Config) -> None:
    """Raises ConfigError for a backbone of one's own that does not turn two black images into two
    vectors."""
    name, side = f"the backbone {type(backbone).__name__}", config.image_size
    width = getattr(backbone, "width", None)
    if not isinstance(width, numbers.Integral) or width < 1:
        raise ConfigError(f"{name} has the width {width}: set it to the number of its outputs")
    if config.model.startswith("timm:"):
        raise ConfigError(f"{name} is given with --model {config.model}: leave out one of them")
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ConfigError(f"{name} has no values, it is on the device meta: load its weights first")
    backbone.eval()
    try:
        with torch.no_grad():
            found = backbone(torch.zeros(2, 3, side, side, device=device))
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigError(
            f"{name} takes no float32 images (2, 3, {side}, {side}) ({checkpoint.summary(error)}): "
            "mend it, or give the --image-size that it takes"
        ) from None
    backbone.train()
    is_tensor = isinstance(found, torch.Tensor)
    if not is_tensor or found.shape != (2, width) or found.dtype != torch.float32:
        what = f"{found.dtype} {tuple(found.shape)}" if is_tensor else type(found).__name__
        raise ConfigError(
            f"{name} of width {width} turns two images into {what}: let it return a tensor of "
            f"float32 values (2, {width})"
        )


def check_divisible(backbone: nn.Module, config: Config) -> None:
    """Raises ConfigError for layers of a backbone of one's own whose results would change because
    batches are divided among processes, or by --accumulate."""
    if config.freeze_backbone or (distributed.size() == 1 and config.accumulate == 1):
        return
    backbone.train()
    for layer in backbone.modules():
        changes = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            changes = layer.p > 0
        elif isinstance(layer, nn.MultiheadAttention):
            changes = layer.dropout > 0
        if changes and layer.training:
            raise ConfigError(
                f"the backbone {type(backbone).__name__} has layers such as {layer}, whose results "
                "change when a batch is divided: replace them (BatchNorm by GroupNorm), keep them "
                "in evaluation mode in its method train(), or train with one process and "
                "--accumulate 1"
            )


def description(model: str, backbone: nn.Module | None) -> dict:
    """The backbone that --model names, or one's own, as checkpoint.build takes it."""
    if backbone is not None:
        return {"module": f"{type(backbone).__module__}.{type(backbone).__qualname__}"}
    is_timm = model.startswith("timm:")
    return {"timm": model.removeprefix("timm:")} if is_timm else SIZES[model]


def load_initial_weights(backbone, config) -> pretrained.Preprocessing:
    """Fills the backbone as --init says, with notes as warnings. Raises ConfigError where images
    cannot be resized for it."""
    if config.init == "timm":
        backbone.download()
    if config.init in ("timm", "scratch"):
        own = pretrained.HALF
        if config.model.startswith("timm:"):
            own = pretrained.Preprocessing(*backbone.statistics, backbone.interpolation)
        found = pretrained.STATISTICS.get(config.init_statistics, own)
        found = found._replace(interpolation=own.interpolation)
    else:
        found = pretrained.load(
            backbone,
            initial_weights(config),
            activation=config.init_activation,
            statistics=config.init_statistics,
        )
    if not config.antialias and found.interpolation != "bilinear":
        raise ConfigError(
            "--no-antialias resizes images with bilinear interpolation, but timm resizes those of "
            f"{config.model} with {found.interpolation} interpolation: leave it out"
        )
    return found


def initial_weights(config) -> str | Path:
    """The file that --init names; of the directory of a run, best.pt."""
    if config.init != "compact":
        return best if (best := Path(config.init) / checkpoint.BEST).is_file() else config.init
    if config.model not in pretrained.COMPACT:
        raise ConfigError(
            f"--init is compact with --model {config.model}: compact weights exist for "
            f"{' and '.join(pretrained.COMPACT)}; give a file of public weights, or scratch"
        )
    return pretrained.COMPACT[config.model]


class FrozenTeachers:
    """Trained models as teachers: (images (B, 3, H, W), domain) -> embedding (B, T), unit rows,
    and the classifier of the domain, T -> C; neither has a gradient.

    models   {domain: model.UDON}: its teacher of the domain, or its student where it has none
    sources  {domain: [run, step]}: the checkpoints of the models
    """

    def __init__(self, models: dict[str, UDON], sources: dict[str, list] | None = None):
        self.models, self.sources = models, sources or {}
        for model in models.values():
            model.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, domain: str) -> tuple[torch.Tensor, nn.Module]:
        model = self.models[domain]
        _, student, teacher = model.embed_all(images, domain)
        if teacher is None:
            return student, model.student_classifiers[domain]
        return teacher, model.teacher_classifiers[domain]


def load_teachers(config, classes, image_size, preprocessing, device) -> FrozenTeachers:
    """The teachers of --teachers. Raises ConfigError for teachers of other classes or images."""
    path, models, sources = Path(config.teachers), {}, {}
    shared = None if path.is_dir() else checkpoint.load(path, device)
    for domain, count in classes.items():
        model, contents = shared or checkpoint.load(path / domain / "best.pt", device)
        known = contents["architecture"]["classes"].get(domain)
        if known != count:
            raise ConfigError(
                f"--teachers {path} know {known or 'no'} classes of domain {domain}, which has "
                f"{count}: give teachers trained on the same data"
            )
        size = contents["architecture"]["backbone"]["image_size"]
        theirs, ours = (x | data.resizing(x) for x in (contents["preprocessing"], preprocessing))
        if (size, theirs) != (image_size, ours):
            raise ConfigError(
                f"--teachers {path} take {size} pixels and {theirs}, the student {image_size} and "
                f"{ours}: train them with the same --image-size, --model, --init and --antialias"
            )
        models[domain], sources[domain] = model, [contents["run"], contents["step"]]
    return FrozenTeachers(models, sources)


def copy_of(module: nn.Module, option: str, remedy: str) -> nn.Module:
    """A copy, which an option needs. Raises ConfigError for a backbone that cannot be copied."""
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever the copying of an object of the user's raises
        raise ConfigError(
            f"{option} needs a copy of the model, but the backbone cannot be copied ({error}): "
            f"{remedy}"
        ) from None


def build_optimizer(model: UDON, config: Config) -> torch.optim.AdamW:
    """AdamW with two groups, the backbone and the heads, without what does not require a gradient:
    parameters that a backbone of one's own keeps fixed."""
    trained = [item for item in model.named_parameters() if item[1].requires_grad]
    backbone = [parameter for name, parameter in trained if name.startswith("backbone.")]
    others = [parameter for name, parameter in trained if not name.startswith("backbone.")]
    return torch.optim.AdamW(
        [{"params": backbone}, {"params": others}],
        lr=config.head_lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Raises an error unless `state` is of an optimizer with the same parameters and settings:
    load_state_dict checks neither, and AdamW's kernel does not check the sizes of its moments."""
    for group, saved in zip(optimizer.state_dict()["param_groups"], state["param_groups"]):
        counts = len(group["params"]), len(saved["params"])
        if counts[0] != counts[1]:
            raise ValueError(f"{counts[0]} parameters are trained, there {counts[1]} were")
        if group | {"lr": None} != saved | {"lr": None}:
            raise ValueError("the settings of the optimizer are others")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        parameter, step = parameters[index], moments["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = moments[name]
            if moment.shape != parameter.shape or moment.dtype != parameter.dtype:
                raise ValueError(f"{name} of parameter {index} is of another shape or type")
            if moment.layout != torch.strided or not moment.isfinite().all():
                raise ValueError(f"{name} of parameter {index} is not finite")
        if step.shape != () or step.dtype != torch.float32 or not 0 <= step.item() <= 2**53:
            raise ValueError(f"the number of steps of parameter {index} is no number")


def check_precision(precision: str, device: str) -> None:
    """Raises ConfigError for bf16 on a device that has no such arithmetic."""
    if precision == "fp32" or device.startswith(("cuda", "mps", "xpu")):
        return
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if not {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags):
        raise ConfigError(
            "--precision is bf16, which this CPU has to emulate, about 17 times slower: use fp32"
        )


def prepare_backbone(model: UDON, config: Config, device: str) -> None:
    """Sets how the backbone computes. Raises ConfigError for what it or the device cannot do."""
    check_precision(config.precision, device)
    model.precision = torch.bfloat16 if config.precision == "bf16" else None
    if config.checkpoint_activations:
        try:
            model.backbone.set_grad_checkpointing()
        except (AttributeError, AssertionError, RuntimeError):
            name = getattr(model.backbone, "name", type(model.backbone).__name__)
            raise ConfigError(
                f"--checkpoint-activations is on, but the backbone {name} has no such mode: leave "
                "it out, and use --accumulate to save memory"
            ) from None
    if config.compile:
        try:
            torch.compile(torch.square)(torch.ones(2, device=device))
        except Exception as error:  # of the compiler's own classes
            raise ConfigError(
                f"--compile cannot be used here ({checkpoint.summary(error)}): install a C++ "
                "compiler, or leave it out"
            ) from None
        model.backbone.compile()


def start_model(config, splits, device, backbone) -> tuple[UDON, dict, dict]:
    """build_model, with what its heads start from."""
    classes = {domain: split.num_classes for domain, split in splits.items()}
    model, architecture, preprocessing = build_model(config, classes, backbone)
    filled = []
    if backbone is None and checkpoint.is_checkpoint(path := initial_weights(config)):
        filled = heads.continue_heads(model, path, splits)
    model.to(device)
    distributed.spread(model.parameters())  # other machines may round in another way
    if config.student_init != "lecun":
        size = architecture["backbone"]["image_size"]
        heads.start_from_images(
            model, splits, size, preprocessing, filled, config.seed, config.student_init
        )
        distributed.spread(model.parameters())
    return model, architecture, preprocessing


def build_run(
    config: Config,
    splits: dict[str, data.Split],
    state: tuple[UDON, dict] | None = None,
    backbone: nn.Module | None = None,
) -> Run:
    """The run of a configuration; with `state`, (model, contents) of last.pt, where that stands."""
    device = evaluate.find_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    if backbone is not None:
        check_divisible(backbone, config)
    classes = {domain: split.num_classes for domain, split in splits.items()}
    digests = {domain: split.digest() for domain, split in splits.items()}
    distributed.require_same(
        {f"the digest of the train images of {d}": text[:16] for d, text in digests.items()}
    )
    sizes = {domain: len(split) for domain, split in splits.items()}
    try:
        sampler = DomainSampler(
            splits, config.sampler, period=config.period, sizes=sizes, seed=config.seed
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if state is None:
        model, architecture, preprocessing = start_model(config, splits, device, backbone)
    else:
        model, contents = state
        options.check_same(config, Config(**contents["config"]), f"{config.out}/last.pt")
        architecture, preprocessing = contents["architecture"], contents["preprocessing"]
        changed = [name for name in splits if contents["digests"].get(name) != digests[name]]
        if changed or architecture["classes"] != classes:
            raise ConfigError(
                f"--data {config.data} has other training images than the run {config.out} was "
                f"started with (in {', '.join(changed) or 'its domains'}): give it that data, or "
                "start a new run"
            )
    model.to(device)
    average = None
    if config.ema and any(config.weights):
        average = copy_of(model, "--ema", "give --ema 0").eval()
    prepare_backbone(model, config, device)
    teachers = None
    if config.teachers is not None:
        size = architecture["backbone"]["image_size"]
        teachers = load_teachers(config, classes, size, preprocessing, device)
    sources = {"the [run, step] of --teachers": teachers and teachers.sources}
    sources |= {"the backbone": architecture["backbone"], "the preprocessing": preprocessing}
    distributed.require_same(sources)
    optimizer = build_optimizer(model, config)
    steps_per_epoch = max(1, sum(sizes.values()) // config.batch_size)
    run = Run(
        *(config, model, architecture, preprocessing, optimizer, sampler, device),
        *(steps_per_epoch, digests, teachers, average),
        {domain: split.class_names for domain, split in splits.items()},
    )
    if state is not None:
        run.restore(contents)
    return run
