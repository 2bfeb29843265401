"""distributed.py: n processes, or pieces of a batch, train and evaluate as one process does.

Run by torchrun, this file is a worker: it trains a tiny model in float64 and saves its weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed
import evaluate
import udon
from config import Config
from kernels import cosine_topk
from model import UDON, ViT
from sampler import DomainSampler

ROOT = Path(__file__).parents[1]
CLASSES = {"birds": 5, "cars": 3, "plants": 4}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BATCH, STEPS = 10, 30
QUICK = "--preset micro --image-size 32 --batch-size 6 --steps 8 --period 4 --frozen-epochs 0"


def torchrun(count, *command):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    finished = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


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
    torchrun(3, __file__, "udon-joint", 2, tmp_path / "weights.pt")
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_same_training(alone["udon-joint"], found)


@pytest.fixture(scope="module")
def runs(uned, tmp_path_factory):
    """The same run on one process and on two, and the evaluation of one checkpoint on three."""
    root = tmp_path_factory.mktemp("runs")
    command = ["udon.py", "train", "--data", uned, "--device", "cpu", *QUICK.split()]
    subprocess.run(
        [sys.executable, *map(str, command), "--out", str(root / "one")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=ENVIRONMENT,
    )
    printed = torchrun(2, *command, "--out", root / "two")
    torchrun(3, "evaluate.py", root / "one" / "best.pt", "--json", root / "three.json")
    return root, printed


def test_a_run_of_two_processes_equals_one(runs):
    root, printed = runs
    one, two = (torch.load(root / d / "last.pt", weights_only=True) for d in ("one", "two"))
    assert_close(one["model"], two["model"], 1e-3)
    names = sorted(path.name for path in (root / "one").iterdir())
    assert names == sorted(path.name for path in (root / "two").iterdir())
    assert one["sampler"]["step"] == two["sampler"]["step"] == 8
    assert printed.count("R@1: the nearest neighbour") == 1, "one process prints"


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


def test_processes_with_other_options_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "collected", lambda value: [value, {"the code": "b"}])
    with pytest.raises(
        distributed.DistributedError, match="the code is a on rank 0 but b on rank 1"
    ):
        distributed.require_same({"the code": "a"})


if __name__ == "__main__":
    with distributed.processes("cpu"):
        method, accumulate, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        found = trained(method, accumulate)
        if distributed.rank() == 0:
            torch.save(found, path)
