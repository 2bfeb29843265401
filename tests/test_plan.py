"""plan.py: memory and length against closed forms and measurements, progress, dry runs."""

import collections
import contextlib
import copy
import io
import itertools
import mmap
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import job
from torch import nn

import data
import model
import plan
import run as runs
import udon
from config import Config
from model import UDON, ViT
from sampler import DomainSampler

CLASSES = {"birds": 5, "cars": 70}
IMAGES = {"birds": 40, "cars": 360}
WIDTH, STUDENT, TEACHER = 24, 6, 10
QUICK = "--preset micro --init scratch --image-size 32 --batch-size 4 --period 4 --device cpu"


def run_of(backbone=None, image_size=16, **options):
    """A run of 100 steps an epoch on generated data."""
    config = Config(**{"batch_size": 4, "frozen_epochs": 0.0, "period": 10, **options})
    torch.manual_seed(0)
    backbone = backbone or ViT(image_size, 8, WIDTH, 2, 2)
    teacher_dim = TEACHER if config.trains_teachers else 0
    model = UDON(backbone, CLASSES, student_dim=STUDENT, teacher_dim=teacher_dim)
    return runs.Run(
        config=config,
        model=model,
        architecture={"backbone": {"image_size": image_size}},
        preprocessing={"mean": (0.5,) * 3, "std": (0.5,) * 3},
        optimizer=runs.build_optimizer(model, config),
        sampler=DomainSampler(CLASSES, config.sampler, period=config.period, sizes=IMAGES),
        device="cpu",
        steps_per_epoch=sum(IMAGES.values()) // config.batch_size,
        digests={},
        average=copy.deepcopy(model) if config.ema else None,
    )


def splits(counts=IMAGES):
    """{domain: a split of so many images, of which none exists}."""
    return {
        domain: data.Split(
            *(domain, "train", torch.arange(count).remainder(CLASSES.get(domain, 2)).int().numpy()),
            paths=[str(i) for i in range(count)],
            folder="none",
        )
        for domain, count in counts.items()
    }


def memory_of(run):
    return plan.step_memory(run, udon.losses_of(run))


# Parameters and memory, in closed form ------------------------------------------------------------

BACKBONE = 3 * 8 * 8 * WIDTH + WIDTH + WIDTH + (1 + 4) * WIDTH  # patches, CLS token, positions
BACKBONE += 2 * (4 * WIDTH + 12 * WIDTH**2 + 9 * WIDTH) + 2 * WIDTH  # two blocks, last norm
HEAD = WIDTH * STUDENT + STUDENT
TEACHER_HEAD = WIDTH * TEACHER + TEACHER
OF = {  # parameters of a domain's teacher head and two classifiers
    domain: TEACHER_HEAD + count * (STUDENT + TEACHER) for domain, count in CLASSES.items()
}
ALL = BACKBONE + HEAD + sum(OF.values())
LARGEST = max(WIDTH, *CLASSES.values()) * TEACHER  # zeros that the heads share
STUDENTS = BACKBONE + HEAD + STUDENT * sum(CLASSES.values())


@pytest.mark.parametrize(
    "options, weights, gradients, trained",
    [
        ({}, ALL, ALL - OF["birds"], ALL),
        ({"ema": 0.9}, 2 * ALL, ALL - OF["birds"], ALL),
        ({"inactive_heads": "zero"}, ALL, ALL - OF["birds"] + LARGEST, ALL),
        ({"frozen_epochs": 99.0}, ALL, HEAD + OF["cars"], ALL - BACKBONE),
        ({"freeze_backbone": True}, ALL, HEAD + OF["cars"], ALL - BACKBONE),
        ({"method": "udon-joint"}, ALL, ALL - TEACHER_HEAD - 50, ALL),
        ({"method": "usc"}, STUDENTS, STUDENTS - 30, STUDENTS),
        ({"method": "ujc"}, STUDENTS, STUDENTS, STUDENTS),
        (
            {"method": "teachers"},
            ALL,
            BACKBONE + TEACHER_HEAD + 70 * TEACHER,
            BACKBONE + 2 * TEACHER_HEAD + 75 * TEACHER,
        ),
        (
            {"method": "teachers", "inactive_heads": "zero"},
            ALL,
            BACKBONE + TEACHER_HEAD + 70 * TEACHER + LARGEST,
            ALL,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_weights_gradients_and_moments(options, weights, gradients, trained):
    memory = memory_of(run_of(**options))
    assert (memory.domain, memory.weights) == ("cars", 4 * weights)
    assert (memory.gradients, memory.moments) == (4 * gradients, 8 * trained)
    assert memory.total == sum(memory[2:6]) and memory.activations > 0


def test_frozen_teachers_count_once():
    run = run_of(method="distill", teachers="best.pt")
    teacher = run_of().model
    run.teachers = runs.FrozenTeachers(dict.fromkeys(CLASSES, teacher))
    assert memory_of(run).weights == 4 * (STUDENTS + ALL)


def test_the_table(capsys):
    run = run_of(epochs=3.0, frozen_epochs=1.0, sampler="size")
    plan.describe(run, splits(), udon.losses_of(run))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines), lines
    rows = {line[:20].strip(): line[20:].split() for line in lines if line[:1] != " "}
    assert rows["backbone"] == [f"{n:.{d}f}" for n, d in numbers(BACKBONE)]
    for domain, share in (("birds", 0.1), ("cars", 0.9)):
        passes = 300 * share * 4 / IMAGES[domain]
        expected = [str(IMAGES[domain]), str(CLASSES[domain]), f"{passes:.2f}"]
        assert rows[domain] == [*expected, *(f"{n:.{d}f}" for n, d in numbers(OF[domain]))]
    assert rows["all"][:3] == ["400", "75", "3.00"]
    length = "length: 300 steps, of which 100 with a frozen backbone; an epoch has 100 of 4 images"
    assert length in lines


def numbers(parameters):
    """Millions of parameters, MB of weights, gradients and moments, with the digits printed."""
    return zip([parameters / 1e6, *(parameters * n / 1e6 for n in (4, 4, 8))], (2, 1, 1, 1))


# Activations, against what a real step allocates --------------------------------------------------


FACTOR = 1.1  # operators take scratch memory that does not show


def allocated(run, images, domain):
    """The peak of what the forward and backward pass of a whole batch allocate, by torch's
    profiler."""
    run.model.train()
    run.model.backbone.requires_grad_(run.steps > run.frozen_steps)
    if run.config.freeze_backbone:
        run.model.backbone = nn.Identity()
    labels = torch.randint(0, CLASSES[domain], (len(images),))
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        udon.losses_and_gradients(run, images, labels, domain)
    events = profiler.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 4},
        {"accumulate": 1000, "batch_size": 8},
        {"checkpoint_activations": True},
        {"precision": "bf16"},
        {"method": "udon-joint"},
        {"method": "usc"},
        {"freeze_backbone": True},
        {"frozen_epochs": 99.0},
        {"batch_size": 3},
        {"batch_size": 129},
    ],
    ids=str,
)
def test_activations_are_those_of_a_real_step(options):
    run = run_of(ViT(32, 8, 48, 3, 4), 32, **{"batch_size": 32, **options})
    config = run.config
    run.model.precision = torch.bfloat16 if config.precision == "bf16" else None
    run.model.backbone.set_grad_checkpointing(config.checkpoint_activations)
    memory = memory_of(run)
    assert memory.images == max(config.batch_size // config.accumulate, 1)
    images = torch.rand(config.batch_size, *((48,) if config.freeze_backbone else (3, 32, 32)))
    estimate = memory.gradients + memory.activations
    peak = images.nbytes + allocated(run, images, memory.domain)
    assert peak / FACTOR <= estimate <= peak * FACTOR, estimate / peak


def test_activations_of_large_layers(monkeypatch):
    monkeypatch.setattr(model, "LARGE", 0)
    test_activations_are_those_of_a_real_step({})


@pytest.mark.parametrize("method", ["udon", "udon-joint", "usc", "distill"])
def test_activations_of_many_classes(monkeypatch, method):
    """Their losses are computed in chunks, whose number depends on the size of the batch; no tensor
    has a value for each image and class."""
    monkeypatch.setitem(CLASSES, "cars", 40_000)
    options = {"teachers": "best.pt"} if method == "distill" else {}
    run = run_of(ViT(32, 8, 48, 3, 4), 32, batch_size=48, method=method, **options)
    if method == "distill":
        teacher = run_of(ViT(32, 8, 192, 6, 4), 32).model  # its weights are not activations
        run.teachers = runs.FrozenTeachers(dict.fromkeys(CLASSES, teacher))
    memory, images = memory_of(run), torch.rand(48, 3, 32, 32)
    peak = images.nbytes + allocated(run, images, "cars")
    assert peak / FACTOR <= memory.gradients + memory.activations <= peak * FACTOR
    sizes, _ = plan.traced_step(run, udon.losses_of(run), "cars", 200)
    assert max(sizes) < 4 * 200 * 40_000


class Normalised(nn.Module):
    """A backbone with state, random numbers, and a shape of its own."""

    width = 8

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.norm(self.convolution(images))).mean((2, 3))


def test_the_estimate_changes_nothing(capsys):
    run = run_of(Normalised())
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    plan.describe(run, splits(), udon.losses_of(run))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in run.model.parameters())
    assert "not estimated" not in capsys.readouterr().out


def test_a_backbone_that_cannot_be_tried_is_described_without_memory(capsys):
    run = run_of(Normalised())
    run.model.backbone.forward = lambda images: images[:, :0].sum() + no_such_name  # noqa: F821
    plan.describe(run, splits(), udon.losses_of(run))
    printed = capsys.readouterr().out
    assert "memory is not estimated (NameError: name 'no_such_name' is not" in printed
    assert "cars" in printed and "activations" not in printed and "moments" not in printed


# Batches and passes -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    strategy=st.sampled_from(["dynamic", "round_robin", "size", "sqrt_size", "balanced"]),
    period=st.integers(3, 40),
    stop=st.integers(0, 150),
    counts=st.lists(st.integers(1, 10**6), min_size=3, max_size=3),
)
def test_batches_are_the_exact_draws_of_the_sampler(strategy, period, stop, counts):
    sizes = dict(zip("abc", counts))
    run = SimpleNamespace(config=Config(sampler=strategy, period=period, seed=3))
    sampler = DomainSampler("abc", strategy, period=period, sizes=sizes, seed=3)
    drawn = collections.Counter(sampler.draw() for _ in range(stop))
    held = {domain: range(count) for domain, count in sizes.items()}
    assert plan.batches(run, held, stop) == {domain: drawn[domain] for domain in "abc"}


def test_the_longest_published_run_is_counted_at_once():
    run = SimpleNamespace(config=Config())
    counts = plan.batches(run, dict.fromkeys("abcdefgh", range(9)), 221_180)
    assert sum(counts.values()) == 221_180 and max(counts.values()) - min(counts.values()) < 30


# While it runs ------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(steps=st.integers(1, 60), every=st.integers(1, 70), start=st.integers(0, 59))
def test_the_number_of_validations(steps, every, start):
    run = run_of(steps=steps, val_every=every)
    due = []
    for run.step in range(steps + 1):
        if run.needs_validation:
            due.append(run.step)
            run.validated = run.step
    assert plan.validations(run, start) == sum(step > start for step in due) or start >= steps


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(plan.time, "perf_counter", lambda: self.now)


def test_the_time_left(monkeypatch, capsys):
    """Steps of 1 s with a frozen backbone, then of 3 s; 1 s more around each, in which the state is
    saved; validations of 100 s at every tenth step."""
    clock = Clock(monkeypatch)
    run = run_of(steps=40, frozen_epochs=0.2, val_every=10)
    progress, printed = plan.Progress(run), {}
    for run.step in range(1, 41):
        seconds = 1 if run.step <= 20 else 3
        clock.now += 1 + seconds
        progress.add("cars", 0.5, seconds, seconds / 4)
        printed[run.step] = capsys.readouterr().out.strip()
        if run.step % 10 == 0:
            clock.now += 100
            progress.validated(100)
    assert printed[2] == ""
    line = "step {} of 40   loss 0.500 (cars)   {} images/s   waiting for data 25.0 %   {}"
    assert printed[3] == line.format(3, 4, "at least 0:01:14 left without validation")
    assert printed[14] == line.format(14, 4, "at least 0:05:52 left")
    assert printed[21] == line.format(21, 1, "0:04:17 left")
    assert printed[40] == line.format(40, 1, "0:01:40 left")


class Terminal(io.StringIO):
    """Text as a terminal shows it, of the two control sequences that are used."""

    def isatty(self):
        return True

    def shown(self):
        lines = [""]
        for part in re.split("(\x1b\\[2A\x1b\\[J|\n)", self.getvalue()):
            if part.startswith("\x1b"):
                del lines[-3:]
                lines.append("")
            elif part == "\n":
                lines.append("")
            else:
                lines[-1] += part
        return lines


def test_progress_on_a_terminal_is_rewritten_until_a_validation(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    clock = itertools.count()
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock) / 2)  # seconds
    config = SimpleNamespace(batch_size=10, val_every=20)
    run = SimpleNamespace(step=0, steps=40, frozen_steps=0, config=config)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        progress = plan.Progress(run)
        progress.validated(0.0)
        for run.step in range(1, 41):
            run.needs_validation = run.step in (20, 40)
            progress.add("cars" if run.step % 2 else "birds", run.step % 2 + 1.0, 0.5, 0.05)
            if run.needs_validation:
                print("validation")
    assert terminal.shown() == [
        "[##########..........] step 20 of 40   0:00:10 left   20 images/s   w",
        "mean loss: cars 2.00, birds 1.00",
        "validation",
        "[####################] step 40 of 40   0:00:00 left   20 images/s   w",
        "mean loss: cars 2.00, birds 1.00",
        "validation",
        "",
    ]
    assert terminal.getvalue().count("mean loss") > 15


def test_progress_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(plan.time, "perf_counter", itertools.count().__next__)  # seconds
    config = SimpleNamespace(batch_size=10, val_every=20)
    run = SimpleNamespace(step=0, steps=12, frozen_steps=0, config=config)
    progress = plan.Progress(run)
    progress.validated(0.0)
    for run.step in range(1, 13):
        progress.add("cars", run.step / 4, 0.5, 0.05)
    start, end = "20 images/s   waiting for data 10.0 %   0:00:", " left"
    assert capsys.readouterr().out.splitlines() == [
        f"step 5 of 12   loss 1.250 (cars)   {start}06{end}",
        f"step 10 of 12   loss 2.500 (cars)   {start}01{end}",
        f"step 12 of 12   loss 3.000 (cars)   {start}00{end}",
    ]


# Before it runs: --dry-run ------------------------------------------------------------------------


@pytest.fixture
def manifests(uned, tmp_path):
    """A data directory that holds no image."""
    shutil.copytree(uned / "info_files", tmp_path / "data" / "info_files")
    return tmp_path / "data"


def files_below(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*"))


def dry_run(monkeypatch, capsys, directory, *options):
    """What a dry run in a directory prints, as lines; nothing may be left there."""
    monkeypatch.chdir(directory)
    before = files_below(directory)
    udon.main(["train", "--dry-run", *QUICK.split(), *map(str, options)])
    assert files_below(directory) == before
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines), lines
    return lines


def columns(lines):
    """{row: frozen steps, seconds, trained steps, seconds, hours, peak MB} of the second table."""
    first = next(i for i, line in enumerate(lines) if "s/step" in line) + 1
    last = next(i for i, line in enumerate(lines) if line.startswith("all ") and i > first)
    return {line.split()[0]: line.split()[1:] for line in lines[first : last + 1]}


def test_a_dry_run_projects_the_time_and_writes_nothing(manifests, tmp_path, monkeypatch, capsys):
    options = ("--epochs", 50, "--frozen-epochs", 20, "--compare", "usc", "--out", "out")
    lines = dry_run(monkeypatch, capsys, tmp_path, "--data", manifests, *options)
    rows = columns(lines)
    total = 0.0
    for domain in ("birds", "cars"):
        frozen, one, trained, other, hours, peak = (float(x.replace(",", "")) for x in rows[domain])
        assert (frozen, trained) == (100, 150) and 0 < one and 0 < other and peak > 50
        assert hours == pytest.approx((frozen * one + trained * other) / 3600, rel=0.01, abs=6e-4)
        total += hours
    assert rows["all"][:2] == ["200", "300"]
    assert float(rows["all"][2]) == pytest.approx(total, abs=2e-3)
    assert (
        "not included: loading images, 51 validations, tests, checkpoints, the runs of usc"
        in (lines[-2])
    )
    h, m, s = map(int, re.search(r"500 steps in (\d+):(\d+):(\d+); nothing", lines[-1]).groups())
    assert 3600 * h + 60 * m + s == pytest.approx(3600 * total, abs=8)


@pytest.mark.parametrize("epochs, kind", [(0.0, 1), (99.0, 0)])
def test_a_run_with_steps_of_one_kind(manifests, tmp_path, monkeypatch, capsys, epochs, kind):
    options = ("--data", manifests, "--frozen-epochs", epochs, "--steps", 8)
    rows = columns(dry_run(monkeypatch, capsys, tmp_path, *options))
    for domain in ("birds", "cars"):
        counts = rows[domain][:3]
        counts = [counts[0], counts[1]] if kind else [counts[0], counts[2]]
        assert counts == (["0", "4"] if kind else ["4", "0"])


def test_a_dry_run_with_features(manifests, tmp_path, monkeypatch, capsys):
    """The heads train on features; the time to compute these is stated."""
    options = ("--data", manifests, "--freeze-backbone", "--views", 2, "--steps", 8)
    lines = dry_run(monkeypatch, capsys, tmp_path, *options)
    rows = columns(lines)
    assert rows["birds"][0] == "4" and rows["birds"][2] == "0"
    assert re.fullmatch(
        r"features of the frozen backbone: 120 views of images in 0:00:0\d", lines[-2]
    )
    head = next(line for line in lines if line.startswith("backbone "))
    assert head.split()[-2:] == ["0.0", "0.0"], "no gradients, no moments"


def test_a_dry_run_needs_no_weights(manifests, tmp_path, monkeypatch, capsys):
    options = ["--data", manifests, "--init", "absent.npz"]
    assert any("random" in line for line in dry_run(monkeypatch, capsys, tmp_path, *options))


def test_a_dry_run_without_steps(manifests, tmp_path, monkeypatch, capsys):
    options = ("--data", manifests, "--method", "backbone")
    assert dry_run(monkeypatch, capsys, tmp_path, *options)[-1] == "dry run: nothing is trained"


def test_a_dry_run_takes_class_folders(class_folders, tmp_path, monkeypatch, capsys):
    options = ("--data", class_folders, "--steps", 2)
    assert set(columns(dry_run(monkeypatch, capsys, tmp_path, *options))) == {
        *("plants", "tools", "all")
    }


def test_a_dry_run_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        udon.main(["train", "--dry-run", "--resume"])
    assert stop.value.code == 2
    assert "--dry-run is given with --resume: leave out one" in capsys.readouterr().err
    assert not files_below(tmp_path)


def test_moments_are_those_of_a_whole_run():
    """Before the measurement the optimizer holds what it will hold; no weight has moved."""
    run = run_of(weight_decay=0.5)
    before = [p.detach().clone() for p in run.model.parameters()]
    trained = memory_of(run).trained
    plan.allocate_moments(run, trained)
    states = run.optimizer.state
    held = sum(states[p][name].nbytes for p in states for name in ("exp_avg", "exp_avg_sq"))
    assert held == memory_of(run).moments == 8 * ALL
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before))
    assert all(p.grad is None for p in run.model.parameters())


def test_the_peak_of_memory_is_that_of_a_domain():
    """On Linux; elsewhere, it is that of the process so far."""
    held = {"birds": 150_000_000, "cars": 50_000_000}

    def step(run, batches):
        size = held[next(batches)[0]]
        with mmap.mmap(-1, size) as memory:  # malloc may have memory that other tests have freed
            memory[:: mmap.PAGESIZE] = b"1" * -(-size // mmap.PAGESIZE)

    rows = dict(plan.measured(run_of(), splits(), step, None))
    peaks = {domain: row.memory for domain, row in rows.items()}
    if Path("/proc/self/clear_refs").exists():
        assert peaks["birds"] - peaks["cars"] == pytest.approx(100e6, rel=0.2), peaks


def test_a_dry_run_of_two_processes(manifests, tmp_path):
    options = ["--data", str(manifests), "--steps", "4", "--frozen-epochs", "0"]
    command = ["train", "--dry-run", *QUICK.split(), *options]
    ended = job(2, lambda rank: udon.main(command), tmp_path)
    assert [process.status for process in ended] == [0, 0], ended
    assert not ended[1].out
    printed = ended[0].out
    assert "2 images at a time in each process" in printed
    weights, gradients = map(
        float, re.search(r"weights (\S+) \+ gradients (\S+)", printed).groups()
    )
    assert weights < gradients < 2 * weights, "with their sums over the processes"
    assert set(columns(printed.splitlines())) == {"birds", "cars", "all"}
    assert "peak MB: all of the process, the largest of several" in printed
