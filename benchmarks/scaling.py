"""Training on several processes: what two of them gain on this machine, and what many GPUs would.

    python -m benchmarks.scaling                                measures, into results/scaling.json
    python -m benchmarks.scaling --markdown results/scaling.md  writes the report from that file

Weak scaling: one process trains on batches of b images, two on batches of 2 b, each process on one
thread. Three contenders take turns: one process alone, two that train independently at the same
time, and two that train together. The second, which exchange nothing, tell the cost of sharing a
machine from the cost of communication. Ratios are taken within a round; medians over the rounds.
Also measured are the numbers behind the estimates in estimates.py: the time in which a step's
operators are started, images decoded per second, memory of the list of images, draws.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import tracemalloc
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import distributed
import images
import udon
from benchmarks import estimates, loader, step_overhead
from benchmarks.shared import machine, output, positive
from checkpoint import write_json
from model import SIZES
from sampler import DomainSampler

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "scaling.json"
BATCHES = {"mini": 60, "s16": 8}  # {model: images of a process}
GROUPS = {"alone": [0], "two alone": [0, 1], "together": [2, 3]}  # contender: its processes
PHOTOS = {"500 x 375": (500, 375, 90), "1,600 x 1,200": (1600, 1200, 90)}  # JPEGs of quality 90


# Weak scaling -------------------------------------------------------------------------------------


def worker(pipe, rank: int, count: int, port: int, model: str) -> None:
    """A process that trains, alone or with others, as it is told through the pipe."""
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with distributed.processes("cpu"):
        trainer = Trainer(model)
        while (order := pipe.recv()) is not None:
            pipe.send(getattr(trainer, order[0])(*order[1:]))


class Trainer:
    """A training run on random images, on all or on its share of each batch."""

    def __init__(self, model: str):
        share, size = BATCHES[model], SIZES[model]["image_size"]
        options = {"model": model, "image_size": size, "frozen_epochs": 0.0}
        options["batch_size"] = share * distributed.size()
        self.run = step_overhead.build_run("udon", "cpu", options)
        self.run.gradients = distributed.GradientSum(self.run.model.parameters())
        images = torch.randint(0, 256, (share, 3, size, size), dtype=torch.uint8)
        classes = self.run.architecture["classes"]
        labels = {name: torch.randint(0, count, (share,)) for name, count in classes.items()}
        self.batches = ((name, images, labels[name]) for name in iter(self.run.sampler.draw, None))

    def steps(self, count: int) -> tuple[float, float]:
        """Elapsed and CPU seconds of some steps."""
        elapsed, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            udon.training_step(self.run, self.batches)
        return time.perf_counter() - elapsed, time.process_time() - cpu

    def payload(self, count: int) -> dict[str, float]:
        """Bytes of a step that a process hands over, means over some steps."""
        sent, originals = {}, {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

        def all_reduce(tensor, **options):
            kind = "gradients" if options.get("async_op") else "losses"
            sent[kind] = sent.get(kind, 0) + tensor.nbytes
            return originals["all_reduce"](tensor, **options)

        def all_gather(parts, tensor):
            sent["embeddings"] = sent.get("embeddings", 0) + tensor.nbytes
            return originals["all_gather"](parts, tensor)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        self.steps(count)
        dist.all_reduce, dist.all_gather = originals.values()
        return {kind: round(value / count) for kind, value in sent.items()}

    def reduce(self, size: int) -> tuple[float, float]:
        """Elapsed and CPU seconds of the sums of a step's gradients, without the step."""
        whole, rest = divmod(size, distributed.BUCKET)
        buckets = [torch.zeros(part) for part in [*[distributed.BUCKET] * whole, rest]]
        elapsed, cpu = time.perf_counter(), time.process_time()
        for message in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            message.wait()
        return time.perf_counter() - elapsed, time.process_time() - cpu


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used since it started; 0 if unknown."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, *_ = file.read_text().split()[1:9]
    ticks = sum(map(int, (user, nice, system, interrupts, soft)))
    return ticks / os.sysconf("SC_CLK_TCK")


class Processes:
    """Two processes that train alone and two that train together, idle until they are told."""

    def __init__(self, model: str):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank, count in ((0, 1), (0, 1), (0, 2), (1, 2)):
            pipe, other = context.Pipe()
            arguments = (other, rank, count, port, model)
            self.processes.append(context.Process(target=worker, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(pipe)

    def tell(self, contender: str, *order: object) -> list:
        """What the processes of a contender answer."""
        pipes = [self.pipes[number] for number in GROUPS[contender]]
        for pipe in pipes:
            pipe.send(order)
        return [pipe.recv() for pipe in pipes]

    def time(self, contender: str, *order: object) -> dict[str, float]:
        """Elapsed and CPU milliseconds of an order, the slowest process; and the processors that
        other programs used meanwhile."""
        busy, started = busy_seconds(), time.perf_counter()
        answers = self.tell(contender, *order)
        busy, elapsed = busy_seconds() - busy, time.perf_counter() - started
        own = sum(cpu for _, cpu in answers)
        return {
            "ms": 1e3 * max(seconds for seconds, _ in answers),
            "cpu_ms": 1e3 * max(cpu for _, cpu in answers),
            "others": max(0.0, (busy - own) / elapsed),
        }

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def weak_scaling(model: str, rounds: int, steps: int) -> dict:
    """Medians over the rounds, each of `steps` steps of every contender in turn."""
    processes, share = Processes(model), BATCHES[model]
    for contender in GROUPS:
        processes.tell(contender, "steps", 2)
    times = {contender: [] for contender in (*GROUPS, "sum")}
    payload = processes.tell("together", "payload", len(step_overhead.CLASSES))[0]
    order = list(GROUPS)
    for _ in range(rounds):
        order.append(order.pop(0))
        for contender in order:
            times[contender].append(processes.time(contender, "steps", steps))
        times["sum"].append(processes.time("together", "reduce", payload["gradients"] // 4))
    processes.end()

    def median(values):
        return round(statistics.median(values), 4)

    def ratio(one, other, clock):
        return median(a[clock] / b[clock] for a, b in zip(times[one], times[other]))

    milliseconds = {c: median(t["ms"] / steps for t in times[c]) for c in GROUPS}
    return {
        "batch": {"alone": share, "two alone": share, "together": 2 * share},
        "images_per_second": {
            c: round(1e3 * share * len(GROUPS[c]) / ms, 2) for c, ms in milliseconds.items()
        },
        "step_ms": milliseconds,
        "step_cpu_ms": {c: median(t["cpu_ms"] / steps for t in times[c]) for c in GROUPS},
        "efficiency": ratio("alone", "together", "ms"),
        "efficiency_of_two_alone": ratio("alone", "two alone", "ms"),
        "efficiency_beside_two_alone": ratio("two alone", "together", "ms"),
        "cpu_time_beside_two_alone": ratio("two alone", "together", "cpu_ms"),
        "processors_used_by_others": {c: median(t["others"] for t in times[c]) for c in GROUPS},
        "payload_bytes": payload,
        "gradient_sum_ms": median(t["ms"] for t in times["sum"]),
        "rounds": rounds,
        "steps_of_a_round": steps,
    }


# What the estimates need --------------------------------------------------------------------------


def step_ms(options: dict, classes: dict, rounds: int) -> float:
    """CPU milliseconds of a training step."""
    run, times = step_overhead.build_run("udon", "cpu", options, classes), []
    count, size = run.config.batch_size, run.config.image_size
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    batches = ((domain, images, labels) for domain in iter(run.sampler.draw, None))
    for _ in range(rounds + 2):
        started = time.process_time()
        udon.training_step(run, batches)
        times.append(1e3 * (time.process_time() - started))
    return round(statistics.median(times[2:]), 2)


def launch_ms(rounds: int) -> dict[str, float]:
    """CPU milliseconds of a step of ViT-B/16 that computes next to nothing, because its blocks have
    12 values for 768: what Python and torch take to start its operators."""
    small = SIZES["b16"] | {"width": 12, "image_size": 32}
    options = {"model": "b16", "image_size": 32, "batch_size": 2}
    with unittest.mock.patch.dict(SIZES, b16=small):
        return {
            phase: step_ms(options | {"frozen_epochs": epochs}, step_overhead.CLASSES, rounds)
            for phase, epochs in (("frozen", 1.0), ("trained", 0.0))
        }


def domains_ms(count: int, rounds: int) -> float:
    """CPU milliseconds of a step of the smallest model on 4 images, with so many domains."""
    classes = {f"domain{number}": 10 for number in range(count)}
    options = {"model": "micro", "batch_size": 4, "frozen_epochs": 0.0}
    return step_ms(options, classes, rounds)


def decoded_per_second(repetitions: int) -> dict[str, float]:
    """Images per second of one processor: JPEGs opened and prepared for training at 224 pixels."""
    rates = {}

    def prepare(path):
        image, box = images.open_reduced(path, images.train_side(224))
        images.prepare_train(image, 224, box=box)

    with tempfile.TemporaryDirectory() as directory:
        for name, (width, height, quality) in PHOTOS.items():
            paths = [Path(directory, f"{width}_{number}.jpg") for number in range(loader.FILES)]
            for number, path in enumerate(paths):
                loader.photo(width, height, number).save(path, quality=quality)
            rates[name] = round(best_rate(prepare, paths, repetitions), 1)
    return rates


def best_rate(function: Callable, paths: list[Path], repetitions: int) -> float:
    """Images per second of CPU time, the best of the repetitions."""
    seconds = float("inf")
    for _ in range(repetitions):
        started = time.process_time()
        for path in paths:
            function(path)
        seconds = min(seconds, time.process_time() - started)
    return len(paths) / seconds


def bytes_of_an_image(count: int = 100_000) -> float:
    """Memory of a process for each image of its list, with paths of 32 characters."""
    tracemalloc.start()
    paths = (f"domain/class{number % 5000:08}/{number:08}.jpg" for number in range(count))
    labels = np.arange(count, dtype=np.int32) % 5000
    files = np.arange(count, dtype=np.int64)
    split = data.Split("domain", "train", labels, paths=paths, folder="", files=files)
    held = tracemalloc.get_traced_memory()[0] / len(split)
    tracemalloc.stop()
    return round(held, 1)


def sampler_us(domains: int, period: int, draws: int = 20_000) -> float:
    """Microseconds of a draw and an observation."""
    sampler = DomainSampler([f"domain{number}" for number in range(domains)], period=period)
    sampler.draw()
    started = time.process_time()
    for _ in range(draws):
        sampler.observe(sampler.draw(), 1.0)
    return round(1e6 * (time.process_time() - started) / draws, 2)


def choice_us(count: int, batch: int = 128, repetitions: int = 200) -> float:
    """Microseconds of choosing the images of a batch among those of a domain."""
    started = time.process_time()
    for step in range(repetitions):
        np.random.default_rng((0, step)).choice(count, batch, replace=False)
    return round(1e6 * (time.process_time() - started) / repetitions, 1)


def measure(options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    count = estimates.UNED["train images"]
    return {
        "command": f"python -m benchmarks.scaling --rounds {options.rounds}",
        "machine": machine("cpu"),
        "date": time.strftime("%Y-%m-%d"),
        "weak_scaling": {
            "mini": weak_scaling("mini", options.rounds, 8),
            "s16": weak_scaling("s16", options.rounds, 1),
        },
        "launch_ms": launch_ms(options.rounds),
        "decoded_per_second": decoded_per_second(options.rounds),
        "bytes_of_an_image": bytes_of_an_image(),
        "domains_ms": {str(n): domains_ms(n, options.rounds) for n in (8, 1000)},
        "sampler_us": {"8": sampler_us(8, 1000), "1000": sampler_us(1000, 125_000)},
        "choice_us": {str(n): choice_us(n) for n in (count // 8, 100 * count // 1000)},
    }


def write_report(path: Path, target: Path) -> None:
    try:
        text = estimates.report(path)
    except (LookupError, TypeError, ValueError) as error:
        raise data.InputError(
            f"--out {path} is no result of this benchmark ({error!r}): measure it first"
        ) from None
    target.write_text(text, encoding="utf-8")


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=15, help="(default: 15)")
    parser.add_argument("--out", type=output, default=str(RESULTS), help="of the measurement")
    parser.add_argument(
        "--markdown", type=output, metavar="FILE", help="measure nothing, write the report"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences():
        if options.markdown:
            write_report(options.out, options.markdown)
            return
        result = measure(options)
        write_json(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
