"""distributed.py: n processes, or pieces of a batch, train and evaluate as one process does.

Most tests run the processes as forks of this one; torchrun starts this file to test restarts.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_uned

import config as options
import data
import distributed
import evaluate
import run as run_module
import udon
from config import Config
from kernels import cosine_topk
from model import UDON, ViT
from sampler import DomainSampler

ROOT = Path(__file__).parents[1]
CLASSES = {"birds": 5, "cars": 3, "plants": 4}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BATCH, STEPS = 10, 30
QUICK = "--preset micro --image-size 32 --batch-size 6 --steps 8 --period 4 --frozen-epochs 0 "
QUICK += "--backbone-lr 3e-4"  # greater ones enlarge the rounding errors of float32


class Ended(NamedTuple):
    """How a process has ended: its exit status, minus the number of a signal, and its output."""

    status: int
    out: str
    err: str


def job(count, function, directory, stops=True):
    """Runs function(rank) in forks of this process, with what torchrun gives to its processes:
    environment variables, a store, and, if it `stops`, SIGTERM for the others when one fails."""
    torch.optim.AdamW([torch.zeros(1)])  # imports what each process would import otherwise
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    running, statuses, stopped = {}, {}, set()
    for rank in range(count):
        process = os.fork()
        if not process:
            be(rank, count, server.port, function, directory)
        running[rank] = process
    deadline = time.monotonic() + 120
    while running:
        time.sleep(0.1)  # torchrun's --monitor-interval
        ended = {rank: os.waitpid(process, os.WNOHANG) for rank, process in running.items()}
        for rank, (process, status) in ended.items():
            if process:
                del running[rank]
                statuses[rank] = os.waitstatus_to_exitcode(status)
        if stops and any(statuses.values()):
            for process in {*running.values()} - stopped:
                os.kill(process, signal.SIGTERM)
                stopped.add(process)
        if time.monotonic() > deadline:
            for process in running.values():
                os.kill(process, signal.SIGKILL)
            pytest.fail(f"ranks {list(running)} did not end")
    texts = [[(directory / f"{rank}.{x}").read_text() for x in "12"] for rank in range(count)]
    return [Ended(statuses[rank], *texts[rank]) for rank in range(count)]


def be(rank, count, port, function, directory):
    """The life of a forked process."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    environment |= {"LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    environment |= {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in environment.items()})
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(directory / f"{rank}.{number}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["udon.py"]
        function(rank)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(uned, out, *options):
    """A short run, in this process."""
    command = ["train", "--data", uned, "--device", "cpu", *QUICK.split(), "--out", out, *options]
    udon.main([str(word) for word in command])


def batches(sampler):
    """Images and labels of each step, those of this process."""
    for step in range(STEPS):
        domain, generator = sampler.draw(), torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, CLASSES[domain], (BATCH,), generator=generator)
        share = distributed.share(BATCH)
        yield domain, images[share], labels[share]


def trained(method, accumulate=1):
    """The weights of a tiny model after 30 steps in float64, all domains, backbone frozen first."""
    torch.manual_seed(0)
    options = {"negatives": "all", "domain_margin": 0.2} if method == "udon-joint" else {}
    config = Config(
        batch_size=BATCH, accumulate=accumulate, frozen_epochs=0.4, backbone_lr=1e-3, **options
    )
    backbone = ViT(image_size=16, patch_size=8, width=24, depth=2, heads=2)
    backbone.register_forward_pre_hook(lambda _, images: images[0].double())
    model = UDON(backbone, CLASSES, student_dim=6, teacher_dim=10).double()
    sampler = DomainSampler(CLASSES, period=6)
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    run = udon.Run(
        config=config,
        model=model,
        architecture={},
        preprocessing=statistics,
        optimizer=udon.build_optimizer(model, config),
        sampler=sampler,
        device="cpu",
        steps_per_epoch=10,
        digests={},
        gradients=distributed.GradientSum(model.parameters()),
    )
    stream = batches(sampler)
    losses = [udon.training_step(run, stream)[1].total for _ in range(STEPS)]
    return {"weights": model.state_dict(), "losses": losses, "sampler": sampler.state_dict()}


def assert_close(one, other, tolerance):
    """Equal to `tolerance` of each tensor's largest value. The bias of the attention's keys has no
    gradient but rounding errors, which AdamW enlarges."""
    for name, weights in one.items():
        error = (weights - other[name]).abs() / weights.abs().max().clamp(min=1e-9)
        if name.endswith("qkv.bias"):
            query, _, value = error.chunk(3)
            error = torch.cat([query, value])
        assert error.max() < tolerance, f"{name} differs by {error.max()}"


def assert_same_training(one, other):
    """Losses and weights in float64, which are summed in another order."""
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
    assert_close(one["weights"], other["weights"], 1e-12)


@pytest.fixture(scope="module")
def alone():
    return {method: trained(method) for method in ("udon", "udon-joint")}


@pytest.mark.parametrize("method", ["udon", "udon-joint"])
@pytest.mark.parametrize("pieces", [3, 10])
def test_pieces_of_a_batch_equal_the_batch(alone, method, pieces):
    assert_same_training(alone[method], trained(method, pieces))


def test_processes_equal_one_process(alone, tmp_path):
    """Three processes have 3, 3 and 4 images of a batch, which they take in two pieces."""

    def run(rank):
        with distributed.processes("cpu"):
            found = trained("udon-joint", 2)
        if rank == 0:
            torch.save(found, tmp_path / "weights.pt")

    ended = job(3, run, tmp_path)
    assert [process.status for process in ended] == [0, 0, 0], ended
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_same_training(alone["udon-joint"], found)


@pytest.fixture(scope="module")
def runs(uned, tmp_path_factory):
    """The same run on one process and on two, of which the second one would start from other
    weights, and the evaluation of one checkpoint on three."""
    root = tmp_path_factory.mktemp("runs")
    train(uned, root / "one")

    def run(rank):
        if rank == 1:
            change_start()
        train(uned, root / "two")

    two = job(2, run, root)
    command = [str(root / "one" / "best.pt"), "--json", str(root / "three.json")]
    three = job(3, lambda rank: evaluate.main(command), root)
    assert [process.status for process in (*two, *three)] == [0] * 5, (two, three)
    return root, two


def change_start():
    """Lets models start from other weights."""
    build = run_module.build_model

    def build_model(*arguments):
        model, *others = build(*arguments)
        for parameter in model.parameters():
            parameter.data += 0.1
        return model, *others

    run_module.build_model = build_model


def test_a_run_of_two_processes_equals_one(runs):
    root, ended = runs
    one, two = (torch.load(root / d / "last.pt", weights_only=True) for d in ("one", "two"))
    assert_close(one["model"], two["model"], 1e-3)
    names = sorted(path.name for path in (root / "one").iterdir())
    assert names == sorted(path.name for path in (root / "two").iterdir())
    assert one["sampler"]["step"] == two["sampler"]["step"] == 8
    assert ended[0].out.count("R@1: the nearest neighbour") == 1
    assert not ended[1].out and not any(process.err for process in ended)


def test_evaluation_on_three_processes_is_the_same(runs):
    root, _ = runs
    one = json.loads((root / "one" / "test.json").read_text())
    three = json.loads((root / "three.json").read_text())
    assert (one["mean"], one["domains"]) == (three["mean"], three["domains"])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_shares_cover_all_rows_once(monkeypatch, count):
    monkeypatch.setattr(distributed, "size", lambda: count)
    for total in (0, 1, 6, 10):
        rows = [row for part in distributed.shares(total) for row in range(total)[part]]
        assert rows == list(range(total))


def test_search_in_shares_of_the_index_equals_the_search(monkeypatch):
    """The ranks one after another; rows that are equal across shares, several excluded rows."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 2, (50, 3), generator=generator).float()
    exclude = np.stack([np.arange(50), (np.arange(50) + 7) % 51 - 1], axis=1)
    parts = []
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed, "collected", lambda value: parts.append(value) or parts)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        if rank < 2:
            monkeypatch.setattr(evaluate.reference, "merged", lambda *_: None)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(distributed, "size", lambda: 3)
            monkeypatch.setattr(distributed, "rank", lambda: 2)
            monkeypatch.setattr(distributed, "collected", lambda value: [*parts, value])
        found = evaluate.search(index, index, 5, exclude=exclude)
    expected = cosine_topk(index, index, 5, exclude=exclude)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# Failures -----------------------------------------------------------------------------------------


def do_at(step, action, place="training_step"):
    """Lets udon's function `place` begin with an action at a step."""
    original = getattr(udon, place)

    def function(run, *arguments):
        if run.step == step:
            action(run)
        return original(run, *arguments)

    setattr(udon, place, function)


def raise_(error):
    raise error


def kill(number):
    return lambda *_: os.kill(os.getpid(), number)


def not_finite(run):
    run.model.student_head.bias.data.fill_(float("nan"))


def sentences(ended):
    """What the processes have written to stderr, which must be complete lines, no traceback."""
    lines = "".join(process.err for process in ended).splitlines()
    assert all(line.startswith("udon.py: ") for line in lines), lines
    return [line.removeprefix("udon.py: ") for line in lines]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("place", ["training_step", "validate", "describe"])
def test_a_killed_rank_ends_the_others_and_is_named(uned, tmp_path, place, count):
    def run(rank):
        if rank == 1:
            do_at({"validate": 6, "describe": 0}.get(place, 3), kill(signal.SIGKILL), place)
        train(uned, tmp_path / "run")

    ended = job(count, run, tmp_path)
    (sentence,) = sentences(ended)
    assert sentence.startswith("rank 1 has ended unexpectedly")
    assert ended[1].status == -signal.SIGKILL
    assert "interrupted" not in ended[0].out
    saved = {"training_step": 0, "validate": 6, "describe": None}[place]
    if saved is not None:
        assert torch.load(tmp_path / "run" / "last.pt")["step"] == saved
    assert not list(tmp_path.glob("run/*.partial"))


def test_a_rank_that_is_killed_on_another_machine_is_named(uned, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 1.0)

    def run(rank):
        distributed.socket.gethostname = lambda: f"machine{rank}"
        if rank == 1:
            do_at(3, kill(signal.SIGKILL))
        train(uned, tmp_path / "run")

    ended = job(2, run, tmp_path, stops=False)
    (sentence,) = sentences(ended)
    assert sentence.startswith("rank 1 does not answer (")
    assert sentence.endswith("): start all processes again") and ended[0].status == 1


def test_a_store_that_is_gone_ends_with_a_sentence(monkeypatch, capsys):
    def gone():
        raise RuntimeError("Broken pipe")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(distributed, "store", gone)
    monkeypatch.setattr(distributed, "PATIENCE", 0.0)
    with pytest.raises(distributed.PeerError, match=r"another process does not answer \(Broken"):
        distributed.awaited("device 0")
    assert capsys.readouterr().err.count("does not answer") == 1


def test_a_rank_that_never_joins_ends_the_others(uned, tmp_path):
    """As on a machine where --out holds no run to resume."""

    def run(rank):
        given = ["--resume", "--out", tmp_path / "nowhere"] if rank == 1 else []
        train(uned, tmp_path / "run", *given)

    started = time.monotonic()
    ended = job(2, run, tmp_path, stops=False)
    (sentence,) = sentences(ended)
    assert sentence.startswith("rank 1: --out ") and "holds no run to resume" in sentence
    assert [process.status for process in ended] == [2, 2]
    assert time.monotonic() - started < 60


def bad_image(uned, directory, split, monkeypatch=None):
    """A copy of the data in which the last image of a split of birds is damaged -> its path."""
    root = shutil.copytree(uned, directory / "data")
    path = sorted((root / "images" / "birds" / split).iterdir())[-1]
    path.write_bytes(path.read_bytes()[:100])
    return root, path


def test_an_error_of_one_rank_ends_the_others_and_is_named(uned, tmp_path):
    """Test images are evaluated in batches; the only one is that of rank 1."""
    root, path = bad_image(uned, tmp_path, "test")
    ended = job(2, lambda rank: train(root, tmp_path / "run"), tmp_path)
    (sentence,) = sentences(ended)
    assert sentence.startswith(f"rank 1: image {path}"), sentence
    assert ended[1].status == 2
    assert not (tmp_path / "run").exists()


def no_memory(run):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(
    "rank, action, named",
    [
        (1, no_memory, "out of memory"),
        (0, no_memory, "out of memory"),
        (1, lambda run: raise_(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
        (1, lambda run: raise_(OSError(28, "No space left", "x.pt")), "x.pt cannot be used"),
    ],
)
def test_errors_of_one_rank(uned, tmp_path, rank, action, named):
    def run(own_rank):
        if own_rank == rank:
            do_at(3, action)
        train(uned, tmp_path / "run")

    ended = job(2, run, tmp_path)
    (sentence,) = sentences(ended)
    assert sentence.startswith(f"rank {rank}: {named}")
    assert ended[rank].status == 2 and "interrupted" not in ended[0].out


def test_weights_that_are_not_finite_on_one_rank(uned, tmp_path):
    """The losses are not finite on all ranks, then; one reports it."""

    def run(rank):
        if rank == 1:
            do_at(3, not_finite)
        train(uned, tmp_path / "run")

    ended = job(2, run, tmp_path)
    (sentence,) = sentences(ended)
    assert "not finite" in sentence or "is nan at step 3" in sentence
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["step"] == 3 and len(stopped["files"]) == 6
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 0


def test_a_defect_of_one_rank_is_one_traceback(uned, tmp_path):
    def run(rank):
        if rank == 1:
            do_at(3, lambda run: raise_(KeyError("a defect")))
        train(uned, tmp_path / "run")

    ended = job(2, run, tmp_path)
    assert ended[0].err == "" and "KeyError: 'a defect'" in ended[1].err


@pytest.mark.parametrize("option", ["--steps=-1", "--data=nowhere", "--head-lr=-7", "--init=x.pt"])
def test_an_error_of_all_ranks_is_printed_once(uned, tmp_path, option):
    ended = job(3, lambda rank: train(uned, tmp_path / "run", option), tmp_path)
    (sentence,) = sentences(ended)
    assert option.split("=")[1] in sentence
    assert 2 in [process.status for process in ended]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_more_processes_than_images_of_a_batch(uned, tmp_path, options):
    options = ["--batch-size", 2, *options]
    ended = job(3, lambda rank: train(uned, tmp_path / "run", *options), tmp_path)
    (sentence,) = sentences(ended)
    assert "--batch-size is 2, but there are 3 processes" in sentence


# Differences --------------------------------------------------------------------------------------


def other_seed(uned, out):
    train(uned, out, "--seed", "1")


def other_domains(uned, out):
    train(uned, out, "--domains", "birds")


def other_comparison(uned, out):
    train(uned, out, "--compare", "usc")


def other_data(split, *options):
    def function(uned, out):
        copy = shutil.copytree(uned, out.parent / "data")
        file = copy / "info_files" / "cars" / f"{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
        benchmark = data.Benchmark
        data.Benchmark = lambda root, *arguments, **others: benchmark(copy, *arguments, **others)
        train(uned, out, *options)

    return function


def other_code(uned, out):
    distributed.code_digest = lambda: "other"
    train(uned, out)


def no_gpu(uned, out):
    train(uned, out, "--device", "auto")


@pytest.mark.parametrize(
    "other, named",
    [
        (other_seed, "--seed is 0 on rank 0 but 1 on rank 1"),
        (other_domains, "--domains is None on rank 0 but ('birds',) on rank 1"),
        (other_comparison, "--compare is () on rank 0 but ('usc',) on rank 1"),
        (other_data("test"), "the digest of the test images of cars is "),
        (other_data("train"), "the digest of the train images of cars is "),
        (other_code, "the digest of the code is "),
    ],
)
def test_ranks_that_differ_are_refused(uned, tmp_path, other, named):
    run = tmp_path / "run"
    ended = job(2, lambda rank: (other if rank else train)(uned, run), tmp_path)
    (sentence,) = sentences(ended)
    assert named in sentence and "on rank 0 but" in sentence and "on rank 1" in sentence
    assert not run.exists()


def test_other_teachers_are_refused(uned, runs, tmp_path):
    """Two checkpoints of the same path, as on two machines."""
    options = ["--method", "distill", "--teachers", tmp_path / "best.pt", "--dry-run"]
    load = run_module.checkpoint.load

    def run(rank):
        path = runs[0] / ("one", "two")[rank] / "best.pt"
        run_module.checkpoint.load = lambda _, *others: load(path, *others)
        train(uned, tmp_path / "run", *options)

    (sentence,) = sentences(job(2, run, tmp_path))
    assert "the [run, step] of --teachers is {'birds': [" in sentence


@pytest.mark.parametrize("gpus, named", [((1, 1), "has 1 GPUs"), ((2, 0), "the CPU on rank 1")])
def test_ranks_without_a_gpu_are_refused(uned, tmp_path, gpus, named):
    def run(rank):
        torch.cuda.device_count = lambda: gpus[rank]
        torch.cuda.set_device = lambda number: None
        train(uned, tmp_path / "run", "--device", "auto")

    ended = job(2, run, tmp_path)
    (sentence,) = sentences(ended)
    assert sentence.startswith("rank ") and named in sentence
    assert 2 in [process.status for process in ended]


def test_evaluation_of_other_data_is_refused(runs, tmp_path):
    def run(rank):
        options = ["--split", "val"] if rank else []
        evaluate.main([str(runs[0] / "one" / "best.pt"), *options])

    (sentence,) = sentences(job(2, run, tmp_path))
    assert "--split is test on rank 0 but val on rank 1" in sentence


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, number, place, step, saved",
    [
        ((1,), signal.SIGTERM, "training_step", 2, 3),  # the step is finished
        ((0,), signal.SIGTERM, "training_step", 2, 3),
        ((0, 1), signal.SIGINT, "training_step", 4, 5),
        ((1,), signal.SIGINT, "validate", 6, 6),
        ((0, 1), signal.SIGTERM, "validate", 6, 6),
    ],
)
def test_interrupted_ranks_agree(uned, runs, tmp_path, ranks, number, place, step, saved):
    out = tmp_path / "run"

    def run(rank):
        if rank in ranks:
            do_at(step, kill(number), place)
        train(uned, out)

    ended = job(2, run, tmp_path)
    assert not sentences(ended)
    assert {process.status for process in ended} <= {128 + number, -number, -signal.SIGTERM}
    assert torch.load(out / "last.pt")["step"] == saved, ended
    command = ended[0].out.splitlines()[-1].partition("torchrun --nproc-per-node 2 udon.py ")[2]
    resumed = job(2, lambda rank: udon.main(shlex.split(command)), tmp_path)
    assert [process.status for process in resumed] == [0, 0], resumed[0].err
    assert_equal(out, runs[0] / "two")


def assert_equal(one, other):
    """Two runs have the same weights, moments and results."""
    one, other = (torch.load(run / "last.pt") for run in (one, other))
    for name, weights in one["model"].items():
        assert torch.equal(weights, other["model"][name]), name
    assert str(one["optimizer"]) == str(other["optimizer"])
    assert (one["best"], one["sampler"]) == (other["best"], other["sampler"])


def test_skipped_images_are_those_of_all_ranks(uned, tmp_path):
    """Also of a comparison, whose table is printed once."""
    write_uned(tmp_path / "data", images=30)
    damaged = []
    for name in ("train", "test"):
        path = sorted((tmp_path / "data" / "images" / "birds" / name).iterdir())[-1]
        path.write_bytes(path.read_bytes()[:100])
        damaged.append(str(path))

    def run(rank):
        data.MEMORY_LIMIT = 0
        options = ("--on-bad-image", "skip", "--workers", 0, "--steps", 40, "--compare", "usc")
        train(tmp_path / "data", tmp_path / "run", *options)

    ended = job(2, run, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended
    assert list(json.loads((tmp_path / "run" / "skipped.json").read_text())) == damaged
    assert "udon, usc beside the backbone" in ended[0].out and not ended[1].out


def test_skipped_images_of_all_ranks_count_together(monkeypatch):
    labels = np.repeat(np.arange(10, dtype=np.int32), 10)
    paths = [f"{row}.jpg" for row in range(100)]
    split = data.Split("birds", "train", labels, paths=paths, folder="", on_bad_image="skip")
    split.skip(3, data.InputError("3.jpg is damaged"))
    monkeypatch.setattr(distributed, "collected", lambda rows: [rows, {3: "damaged"}])
    data.share_bad_rows(split)
    assert list(split.bad_rows) == [3]
    monkeypatch.setattr(distributed, "collected", lambda rows: [rows, {7: "damaged"}])
    with pytest.raises(data.InputError, match="2 of 100 images of domain birds"):
        data.share_bad_rows(split)


# Restarts -----------------------------------------------------------------------------------------


def torchrun(count, *command):
    """Exit status, stdout and stderr of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(count), *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_torchrun_restarts_a_run_after_a_kill(uned, runs, tmp_path):
    """Rank 0, which holds the lock of the directory, is killed at step 5; the run is resumed from
    the checkpoint of step 4, and ends as if nothing had happened."""
    out = tmp_path / "run"
    command = ["train", "--data", uned, "--device", "cpu", *QUICK.split(), "--out", out]
    ended = torchrun(2, "--max-restarts", 2, __file__, *command, "--save-every", 2)
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step 4 of 8, restart 1 by torchrun" in ended.stdout
    assert f"{Path(__file__).name}: rank 0 has ended unexpectedly" in ended.stderr
    assert "Error" not in ended.stderr and "Traceback" not in ended.stderr
    assert_equal(out, runs[0] / "two")
    lines = [(run / "metrics.jsonl").read_text().count("\n") for run in (out, runs[0] / "two")]
    assert lines[0] == lines[1]


def restarted(uned, out, *options, known=None):
    """A run as torchrun starts it for the second time, after one in the directory `known`."""
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "2"}
    if known is not None:
        distributed.kept_store().set("directory", str(known))
    train(uned, out, *options)


def test_a_restart_before_the_first_checkpoint_starts_again(uned, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").touch()
    ended = job(2, lambda rank: restarted(uned, out, known=out), tmp_path)
    assert [process.status for process in ended] == [0, 0], ended
    assert (out / "test.json").exists() and "resumed" not in ended[0].out


def test_a_restart_resumes_no_other_run(uned, runs, tmp_path):
    """The first start was refused because the directory holds a run already; so is the second."""
    out = shutil.copytree(runs[0] / "two", tmp_path / "run")
    (sentence,) = sentences(job(2, lambda rank: restarted(uned, out), tmp_path))
    assert "holds a run already" in sentence


def test_restarts_need_a_directory(uned, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(options.ConfigError, match="--out is not given"):
        udon.run_command({"data": str(uned)}, False)


if __name__ == "__main__":
    if distributed.restarts() == 0 and os.environ["RANK"] == "0":
        do_at(5, kill(signal.SIGKILL))
    udon.main()
