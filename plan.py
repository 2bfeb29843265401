"""What a run costs: parameters, memory and length before it starts, time left while it runs.

    describe(run, splits, losses)        prints options, data, parameters, memory and length
    step_memory(run, losses)             -> Memory: the bytes that training takes
    batches(run, splits, stop)           -> {domain: batches of the first `stop` steps}
    dry_run(run, splits, losses, step)   measures steps on generated images, for --dry-run
    training_splits(benchmark)           the training splits, without opening an image
    Progress(run)                        prints speed and time left
    spent(metrics, domains, batch_size)  what a run has taken
    inference_parameters(run)            parameters that the embedding needs

`run` is a run.Run, `losses` udon.compute_losses with the options of the run, `step` is
udon.training_step. Copy with: config, data, folders, images, procedural, distributed, sampler,
features, checkpoint, model, timm_backbone, export, large_classes, losses, torch, numpy, pillow.
"""

import collections
import contextlib
import copy
import math
import os
import shutil
import statistics
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config as options
import data
import distributed
import features
import large_classes
from sampler import DomainSampler

# Memory -------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """The bytes of a training run in its largest step, that of the domain with most classes. They
    are those of tensors; libraries, and on a GPU the CUDA context, take more."""

    domain: str
    images: int  # computed at a time by each process: a piece of the batch
    weights: int  # of the model, its running mean (--ema) and frozen teachers
    gradients: int
    moments: int  # of AdamW
    activations: int  # all else at the time when most is allocated
    trained: set[nn.Parameter]  # the parameters that some step trains

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations


def step_memory(run, losses: Callable) -> Memory:
    """The memory of the largest step, from all that a step on two images allocates and frees, and
    one on three: each tensor is constant or grows with the number of images."""
    config, model = run.config, run.model
    classes = {name: module.out_features for name, module in model.student_classifiers.items()}
    domain = max(classes, key=classes.get)
    share = -(-config.batch_size // distributed.size())
    piece = -(-share // min(config.accumulate, share))
    with large_classes.chunks_of(piece):
        (small, active), (large, _) = (traced_step(run, losses, domain, count) for count in (2, 3))
    now = peak = 4 * share * math.prod(input_shape(run))  # the images in float32
    for two, three in zip(small, large, strict=True):
        now += two + (three - two) * (piece - 2)
        peak = max(peak, now)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    gradients = sum(sizes[name] for name in active)
    kinds = {name.split(".")[0] for name in active}
    if config.inactive_heads == "zero":
        kinds |= {name.split(".")[0] for name in sizes} - {"backbone"}
    trained = {p for name, p in model.named_parameters() if name.split(".")[0] in kinds}
    models = [model, *([run.average] if run.average else []), *frozen_models(run)]
    weights = {p: p.nbytes for one in models for p in one.parameters()}
    moments = 2 * sum(p.nbytes for p in trained)
    activations = max(peak - gradients, 0)
    gradients *= 1 if distributed.size() == 1 else 2  # and their sums over the processes
    if config.inactive_heads == "zero":  # views of one tensor
        gradients += max(sizes[name] for name in sizes if not name.startswith("backbone."))
    return Memory(*(domain, piece, sum(weights.values()), gradients, moments, activations, trained))


def frozen_models(run) -> list[nn.Module]:
    """The teachers of the method distill."""
    return list(run.teachers.models.values()) if run.teachers else []


def input_shape(run) -> tuple[int, ...]:
    """The shape of an image, or with --freeze-backbone of its features."""
    side = run.architecture["backbone"]["image_size"]
    return (run.model.backbone.width,) if run.config.freeze_backbone else (3, side, side)


def traced_step(run, losses, domain: str, count: int) -> tuple[list[int], set[str]]:
    """A step on `count` blank images, or with --accumulate on two pieces of so many -> the bytes
    of each tensor that is allocated, or, as a negative number, freed, in order; and the names of
    the parameters that get a gradient. The run stays as it is."""
    config = run.config
    shared = {id(p): nn.Parameter(p.detach()) for p in run.model.parameters()}
    model = copy.deepcopy(run.model, shared).train()
    if config.freeze_backbone:
        model.backbone = nn.Identity()
    model.backbone.requires_grad_(run.steps > run.frozen_steps)
    images = torch.zeros(count, *input_shape(run), device=run.device)
    labels = torch.zeros(count, dtype=torch.int64, device=run.device)
    generators = [run.device] if run.device.startswith("cuda") else []
    models = [model, *frozen_models(run)]
    known = [tensor for one in models for tensor in (*one.parameters(), *one.buffers())]
    allocations = Allocations(known)
    with torch.random.fork_rng(generators), allocations:
        for _ in range(min(config.accumulate, 2)):  # the second one finds gradients
            losses(model, images, labels, domain).total.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    return allocations.sizes, names


class Allocations(TorchDispatchMode):
    """While it is entered, appends to `sizes` the bytes of the memory that an operation returns,
    and, as a negative number, that of memory which is freed. Memory of `tensors` is not counted."""

    def __init__(self, tensors: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return outputs

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.sizes.append(size)
            weakref.finalize(storage, self.free, key, size).atexit = False

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.sizes.append(-size)


# The table ----------------------------------------------------------------------------------------


def describe(run, splits: dict[str, data.Split], losses: Callable) -> Memory | None:
    """Prints what is about to be trained: options, data, parameters, memory and length."""
    config, memory = run.config, None
    place = f" into {config.out}" if config.out else ""
    print(f"{config.method} on {config.data or 'the procedural domains'}{place}")
    for origin, values in options.origins(config).items():
        changes = ", ".join(f"{name} {options.shown(value)}" for name, value in values.items())
        print(wrapped(f"  differs from the published setting by {origin}: {changes}"))
    for note in notes(run):
        print(wrapped(f"note: {note}"))
    if run.steps:
        try:
            memory = step_memory(run, losses)
        except Exception as error:  # an estimate must not stop a run
            reason = (str(error).splitlines() or [""])[0][:100]
            print(wrapped(f"note: memory is not estimated ({type(error).__name__}: {reason})"))
    for line in [*table(run, splits, memory), *summary(run, memory)]:
        print(line)
    return memory


def wrapped(text: str) -> str:
    """In lines of 100 columns."""
    return textwrap.fill(text, 100, subsequent_indent="    ", break_long_words=False)


def notes(run) -> list[str]:
    """What may be unexpected in the options of a run."""
    config, found = run.config, []
    own = run.architecture["backbone"].get("module")
    if own:
        found.append(f"the backbone is the module {own}, not --model with the weights of --init")
    elif config.init == "scratch" and run.steps:
        found.append(
            "the backbone starts from random weights; the published setting starts from public "
            "ones (--init FILE)"
        )
    if run.device.startswith("cuda") and config.precision == "fp32":
        found.append("products are computed in TF32 in training, in float32 in validation and test")
    if config.freeze_backbone:
        unused = "--backbone-lr and --frozen-epochs have no effect"
        found.append(f"the backbone is not trained: {unused}")
    elif 0 < run.steps <= run.frozen_steps:
        found.append(
            f"the backbone is not trained: it is frozen for the first {run.frozen_steps:,} steps, "
            f"and the run has {run.steps:,} (--frozen-epochs)"
        )
    return found


def table(run, splits: dict[str, data.Split], memory: Memory | None) -> list[str]:
    """Data, parameters (millions) and memory (MB), of the backbone, the student's head and, for
    each domain, its teacher's head and the classifiers of both."""
    model, batch = run.model, run.config.batch_size
    counts = batches(run, splits, run.steps)
    heading = f"{'images':>10}{'classes':>10}{'passes':>9}{'M params':>11}{'MB weights':>13}"
    lines = [f"{'':20}{heading}" + (f"{'gradients':>11}{'moments':>10}" if memory else "")]
    for name, module in {"backbone": model.backbone, "student head": model.student_head}.items():
        lines.append(f"{name:20}{'':29}{cells(run, [module], memory)}")
    for domain, split in splits.items():
        held = (model.student_classifiers, model.teacher_heads, model.teacher_classifiers)
        modules = [by_domain[domain] for by_domain in held if domain in by_domain]
        sizes = f"{len(split):10,}{split.num_classes:10,}{counts[domain] * batch / len(split):9.2f}"
        lines.append(f"{domain:20}{sizes}{cells(run, modules, memory)}")
    images = sum(map(len, splits.values()))
    classes = sum(split.num_classes for split in splits.values())
    sizes = f"{images:10,}{classes:10,}{run.steps * batch / images:9.2f}"
    return [*lines, f"{'all':20}{sizes}{cells(run, [model], memory)}"]


def cells(run, modules: list[nn.Module], memory: Memory | None) -> str:
    """The cells of some modules; without `memory` those about training are left out."""
    parameters = [p for module in modules for p in module.parameters()]
    weights = sum(p.nbytes for p in parameters) * (1 if run.average is None else 2)
    text = f"{sum(p.numel() for p in parameters) / 1e6:11.2f}{weights / 1e6:13,.1f}"
    if memory is None:
        return text
    gradients = sum(p.nbytes for p in parameters if p in memory.trained)
    return f"{text}{gradients / 1e6:11,.1f}{2 * gradients / 1e6:10,.1f}"  # AdamW has two moments


def summary(run, memory: Memory | None) -> list[str]:
    """The length of the run, what `passes` assumes, and the memory of the largest step."""
    config, frozen = run.config, min(run.frozen_steps, run.steps)
    lines = [
        f"length: {run.steps:,} steps, of which {frozen:,} with a frozen backbone; an epoch has "
        f"{run.steps_per_epoch:,} of {config.batch_size:,} images"
    ]
    if run.steps and config.sampler == "dynamic":
        lines.append("passes: with equal shares of all domains, from which the sampler starts")
    if memory:
        place = "" if distributed.size() == 1 else " in each process"
        lines.append(
            f"memory of the largest step, of {memory.domain}, {memory.images:,} images at a time"
            f"{place}:"
        )
        names = ("weights", "gradients", "moments", "activations")
        terms = [f"{name} {getattr(memory, name) / 1e6:,.1f}" for name in names]
        lines.append(f"  {' + '.join(terms)} = {memory.total / 1e6:,.1f} MB")
    return lines


def batches(run, splits: dict[str, data.Split], stop: int) -> dict[str, int]:
    """The number of batches of each domain in the first `stop` steps. Those of the dynamic sampler
    depend on losses; here, all domains are equally hard, as it assumes at the start."""
    config, counts, step = run.config, collections.Counter(), 0
    sizes = {domain: len(split) for domain, split in splits.items()}
    sampler = DomainSampler(
        splits, config.sampler, period=config.period, sizes=sizes, seed=config.seed
    )
    while step < stop:
        sampler.load_state_dict(sampler.state_dict() | {"step": step})
        draws = sampler.upcoming()[: stop - step]
        counts.update(draws)
        step += len(draws)
    return {domain: counts[domain] for domain in splits}


def inference_parameters(run) -> int:
    """The number of parameters that the embedding needs."""
    heads = {"student": [run.model.student_head], "teacher": [run.model.teacher_heads]}
    modules = [run.model.backbone, *heads.get(run.config.embedding, [])]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def spent(metrics, domains, batch_size) -> dict:
    """Images of each domain, seconds of all steps and the sampler's weights."""
    lines = metrics.values()
    steps = [line for line in lines if "domain" in line]
    images = {d: batch_size * sum(line["domain"] == d for line in steps) for d in domains}
    seconds = {name: sum(line[name] for line in steps) for name in ("seconds", "cpu_seconds")}
    weights = {x["step"]: x["sampler_weights"] for x in lines if "sampler_weights" in x}
    return {"images": images, **seconds, "sampler_weights": weights}


# While it runs ------------------------------------------------------------------------------------


class Progress:
    """Prints the state of the training: in a log every five seconds, on a terminal in two lines,
    which are rewritten until the next validation.

    Images per second are those of the steps alone. The time left is that of the steps to come, with
    what goes along with them, such as saving, and of the validations to come, at the speed so far.
    It is without validations until one was timed, and always without the final test. Steps with a
    frozen backbone are faster, and say nothing about those that train it.
    """

    UP = "\x1b[2A\x1b[J"  # two lines up, and clears what follows

    def __init__(self, run):
        self.run, self.printed = run, time.perf_counter()
        self.validations: list[float] = []  # seconds
        self.losses = {}  # {domain: running mean}
        self.on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.start = ""
        self.restart(self.printed)

    def restart(self, now: float) -> None:
        self.began, self.steps, self.seconds, self.waited = now, 0, 0.0, 0.0

    def validated(self, seconds: float) -> None:
        self.validations.append(seconds)
        self.began += seconds

    def add(self, domain: str, loss: float, seconds: float, waited: float) -> None:
        """After a step, of which `waited` seconds were spent waiting for data."""
        run, now = self.run, time.perf_counter()
        if run.step == run.frozen_steps + 1:  # the first that trains the backbone
            self.restart(now - seconds)
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
        self.losses[domain] = 0.9 * self.losses.get(domain, loss) + 0.1 * loss
        is_last = run.step >= run.steps or (self.on_terminal and run.needs_validation)
        if now - self.printed < (0.2 if self.on_terminal else 5) and not is_last:
            return
        self.printed = now
        step, time_left = f"step {run.step:,} of {run.steps:,}   ", self.left(now)
        speed = (
            f"{self.steps * run.config.batch_size / self.seconds:,.0f} images/s   "
            f"waiting for data {100 * self.waited / self.seconds:.1f} %   "
        )
        if not self.on_terminal:
            print(f"{step}loss {loss:.3f} ({domain})   {speed}{time_left}", flush=True)
            return
        bar = f"[{'#' * (20 * run.step // run.steps):.<20}] "
        losses = ", ".join(f"{name} {mean:.2f}" for name, mean in self.losses.items())
        width = shutil.get_terminal_size().columns - 1
        print(f"{self.start}{f'{bar}{step}{time_left}   {speed}'[:width]}")
        print(f"mean loss: {losses}"[:width], flush=True)
        self.start = "" if is_last else self.UP

    def left(self, now: float) -> str:
        """The time left, in words."""
        run, count = self.run, validations(self.run, self.run.step - 1)
        seconds = (run.steps - run.step) * (now - self.began) / self.steps
        seconds += count * statistics.mean(self.validations or [0.0])
        least = "at least " if run.step <= run.frozen_steps < run.steps else ""
        without = "" if self.validations or not count else " without validation"
        return f"{least}{clock(seconds)} left{without}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 12:34:56."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def validations(run, step: int) -> int:
    """The number of validations after a step; -1: of all, with that of the start."""
    every = run.config.val_every or run.steps_per_epoch
    return run.steps // every - step // every + (run.steps % every > 0)


# Before it runs -----------------------------------------------------------------------------------


def training_splits(benchmark: data.Benchmark) -> dict[str, data.Split]:
    """The training split of each domain as its manifest or its class folders list it. No image is
    opened, and with manifests none needs to exist. Raises InputError as Benchmark.entries does."""
    if benchmark.root is None:
        return {domain: benchmark.split(domain, "train") for domain in benchmark.domains}
    splits = {}
    for domain in benchmark.domains:
        entries = benchmark.entries(domain, "train")
        labels = np.array(entries.labels, dtype=np.int32).reshape(-1)
        rows = np.arange(len(labels))
        splits[domain] = data.Split(
            *(domain, "train", labels),
            paths=entries.paths,
            folder=entries.folder,
            files=rows,
            label_names=None if benchmark.manifests else benchmark.class_folders(domain).classes,
        )
    return splits


class Measured(NamedTuple):
    """Steps of a domain: "frozen", with a frozen backbone, and "trained", which train it."""

    steps: dict[str, int]  # of the run
    seconds: dict[str, float]  # of one step, where the run has such steps
    memory: int  # bytes: the most in use in a process

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds[kind] * self.steps[kind] for kind in self.seconds)


def dry_run(run, splits: dict[str, data.Split], losses: Callable, step: Callable) -> None:
    """Describes a run, measures its steps and prints what the whole of it will take. Writes nothing
    and opens no image; the weights of `run` change."""
    config, memory = run.config, describe(run, splits, losses)
    if not run.steps:
        print("dry run: nothing is trained")
        return
    print("dry run: steps on generated images, with a frozen backbone and with a trained one")
    heading = f"{'frozen':>10}{'s/step':>10}{'trained':>10}{'s/step':>10}{'hours':>10}"
    print(f"{'':20}{heading}{'peak MB':>10}", flush=True)
    rows = []
    for domain, row in measured(run, splits, step, memory):
        print(f"{domain:20}{measured_cells(row, row.total)}", flush=True)
        rows.append(row)
    steps = {kind: sum(row.steps[kind] for row in rows) for kind in rows[0].steps}
    seconds, peak = sum(row.total for row in rows), max(row.memory for row in rows)
    print(f"{'all':20}{measured_cells(Measured(steps, {}, peak), seconds)}")
    place = "tensors on the GPU" if run.device.startswith("cuda") else "all of the process"
    print(f"peak MB: {place}{'' if distributed.size() == 1 else ', the largest of several'}")
    omitted = ["loading images", f"{validations(run, -1)} validations", "tests", "checkpoints"]
    if config.compare:
        omitted.append(f"the runs of {', '.join(config.compare)} (--compare)")
    print(wrapped(f"not included: {', '.join(omitted)}"))
    if config.freeze_backbone:
        views = (1 + config.views) * sum(map(len, splits.values()))
        duration = clock(views * view_seconds(run) / distributed.size())
        print(f"features of the frozen backbone: {views:,} views of images in {duration}")
    print(f"the run: {run.steps:,} steps in {clock(seconds)}; nothing was written")


def view_seconds(run) -> float:
    """The seconds in which a process computes the features of one view of an image."""
    side = run.architecture["backbone"]["image_size"]
    views = torch.randint(0, 256, (1, features.PASSES, 3, side, side), dtype=torch.uint8)
    run.model.eval()
    features.embedded(run.model, views[:, :2], run.preprocessing)  # libraries start
    began = time.perf_counter()
    features.embedded(run.model, views, run.preprocessing)
    return (time.perf_counter() - began) / features.PASSES


def measured_cells(row: Measured, seconds: float) -> str:
    cells = ""
    for kind, count in row.steps.items():
        one = f"{row.seconds[kind]:.4f}" if kind in row.seconds else ""
        cells += f"{count:10,}{one:>10}"
    return f"{cells}{seconds / 3600:10,.3f}{row.memory / 1e6:10,.0f}"


def measured(run, splits, step: Callable, memory: Memory | None) -> Iterator[tuple[str, Measured]]:
    """Yields each domain and its steps, measured on generated images of full size."""
    frozen = min(run.frozen_steps, run.steps)
    spans = {"frozen": (0, frozen), "trained": (frozen, run.steps)}
    starts = {kind: start for kind, (start, stop) in spans.items() if start < stop}
    counts = {stop: batches(run, splits, stop) for stop in (0, frozen, run.steps)}
    if memory is not None:
        allocate_moments(run, memory.trained)
    for start in starts.values():  # first steps take longer, with --compile much longer
        timed(run, step, generated(run, splits, next(iter(splits))), start)
    for domain in splits:
        batch = generated(run, splits, domain)
        reset_peak(run.device)
        seconds = {kind: timed(run, step, batch, start) for kind, start in starts.items()}
        peak = distributed.largest(peak_memory(run.device))
        steps = {kind: counts[b][domain] - counts[a][domain] for kind, (a, b) in spans.items()}
        yield domain, Measured(steps, seconds, peak)


def allocate_moments(run, trained: set[nn.Parameter]) -> None:
    """Makes AdamW's moments of all parameters that the run trains, as after its first steps."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def generated(run, splits, domain: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A batch of random images, or features, and labels: the share of this process."""
    share = distributed.share(run.config.batch_size)
    shape = (share.stop - share.start, *input_shape(run))
    random = torch.Generator().manual_seed(run.config.seed)
    images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    labels = torch.randint(0, splits[domain].num_classes, shape[:1], generator=random)
    return domain, images, labels


def timed(run, step: Callable, batch: tuple, start: int) -> float:
    """The seconds that a step on `batch` takes as the step of number `start`."""
    run.step = start
    began = time.perf_counter()
    step(run, iter([batch]))
    if run.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # of Linux: the peak is what is in use now
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: of tensors on a GPU, else of the process. On Windows, where it is not known, 0."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
