"""A training step of ours beside the same step in JAX: jitted, with optax, on one thread.

    python -m benchmarks.jax_step                            # writes results/jax_step.json
    python -m benchmarks.jax_step --table results/README.md  # writes the table between its marks

UDON as the official code trains it (inactive heads get zero gradients), with UnED's classes. The
step in JAX is in jax_udon.py; a test compares its losses, gradients and weights with ours. All run
in one process on one core, from the same weights and batches, a step of each in turn. Times are CPU
time, ratios are taken within a round, and medians over the rounds. The file is written after each.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import data
import udon
from benchmarks import shared, tables
from checkpoint import write_json
from model import UDON
from sampler import DomainSampler

RESULTS = Path(__file__).resolve().parents[1] / "results"
CLASSES = {  # of UnED's training images
    "food2k": 900,
    "cars": 78,
    "sop": 9_054,
    "inshop": 3_198,
    "inat": 4_552,
    "met": 224_408,
    "gldv2": 73_182,
    "rp2k": 1_074,
}
FORMS = {"JAX": False, "JAX, flat tokens": True}  # {name: jax_udon's `flat`}
PARTS = {  # of our step: operators of torch, by the beginning of their names
    "matrix products": ("mm", "addmm"),
    "attention": ("_scaled_dot_product",),
    "GELU": ("gelu",),
    "AdamW": ("_fused_adamw",),
}
PACKAGES = ("torch", "jax", "jaxlib", "optax", "numpy")
# XLA multiplies on the calling thread. JAX reads these variables when it is imported.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

Batch = tuple[torch.Tensor, torch.Tensor]  # pixels (B, 3, H, W) uint8, labels (B,)


def new_run(network: UDON, config: udon.Config) -> udon.Run:
    """The run of a network whose images are normalised to -1..1."""
    return udon.Run(
        config=config,
        model=network.train(),
        architecture={},
        preprocessing={"mean": (0.5,) * 3, "std": (0.5,) * 3},
        optimizer=udon.build_optimizer(network, config),
        sampler=DomainSampler(network.student_classifiers),
        device="cpu",
        steps_per_epoch=10**6,
        digests={},
    )


def random_batch(config: udon.Config, classes: int) -> Batch:
    count, size = config.batch_size, config.image_size
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return pixels, torch.randint(0, classes, (count,))


class JaxRun:
    """The same run in JAX, from the present weights of ours."""

    def __init__(self, run: udon.Run):
        import jax

        from benchmarks import jax_udon

        self.jax = jax
        config, network = run.config, run.model
        rates = config.backbone_lr, config.head_lr, config.weight_decay
        optimizer, heads = jax_udon.adamw(*rates), network.backbone.blocks[0].attn.heads
        self.steps = {
            form: jax_udon.build_step(optimizer, heads, flat) for form, flat in FORMS.items()
        }
        self.parameters = jax_udon.from_torch(
            {name: value.numpy() for name, value in network.state_dict().items()}
        )
        self.state = optimizer.init(self.parameters)

    def step(self, form: str, domain: str, batch: Batch) -> dict[str, float]:
        """Trains on a batch -> losses."""
        pixels, labels = batch
        images = self.jax.numpy.array(pixels.permute(0, 2, 3, 1).numpy())
        arguments = self.parameters, self.state, images, self.jax.numpy.array(labels.numpy())
        self.parameters, self.state, losses = self.steps[form](*arguments, domain)
        self.jax.block_until_ready((self.parameters, self.state))
        return {name: value.item() for name, value in losses._asdict().items()}


def measure(run: udon.Run, domains: list[str], rounds: int) -> Iterator[dict]:
    """Yields {"rounds": number, "domains": {domain: summary, and the shares of our step}} after
    each round."""
    jax_run, classes = JaxRun(run), run.model.student_classifiers
    batches = {d: random_batch(run.config, classes[d].out_features) for d in domains}
    steps = {"ours": lambda domain: udon.training_step(run, iter([(domain, *batches[domain])]))}
    for form in FORMS:
        steps[form] = lambda domain, form=form: jax_run.step(form, domain, batches[domain])
    times = {domain: {name: [] for name in steps} for domain in domains}
    for turn in range(-1, rounds):  # the first compiles
        for domain in domains:
            for name, step in steps.items():
                started = time.process_time()
                step(domain)
                if turn >= 0:
                    times[domain][name].append(time.process_time() - started)
        print(f"round {turn + 1} of {rounds}", flush=True)
        if turn >= 0:
            found = {d: summary(times[d]) | {"shares": shares(steps["ours"], d)} for d in domains}
            yield {"rounds": turn + 1, "domains": found}


def summary(times: dict[str, list[float]]) -> dict[str, dict]:
    """{"ms": {name: median}, "ratios": {name: time / ours, as of shared.spread}}"""
    return {
        "ms": {name: round(1e3 * statistics.median(x), 1) for name, x in times.items()},
        "ratios": {name: shared.spread(times[name], times["ours"]) for name in FORMS},
    }


def shares(step: Callable, domain: str) -> dict[str, float]:
    """{part: % of the CPU time of a step}"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(domain)
    times = {row.key: row.self_cpu_time_total for row in profile.key_averages()}
    found = {}
    for part, begins in PARTS.items():
        names = tuple(f"aten::{begin}" for begin in begins)
        own = sum(time for key, time in times.items() if key.startswith(names))
        found[part] = round(100 * own / sum(times.values()), 1)
    return found


def table(result: dict) -> str:
    """Seconds of our step, and the steps in JAX as multiples of it: median (least to greatest); the
    shares of our step."""
    lines = [
        [f"`{domain}`", f"{CLASSES[domain]:,}", f"{row['ms']['ours'] / 1e3:.2f}"]
        + [shared.spread_text(row["ratios"][form]) for form in FORMS]
        for domain, row in result["domains"].items()
    ]
    heading = ["domain of the batch", "classes", "ours, s", *FORMS]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("jax", "optax"))
    parts = [
        [f"`{domain}`", *(f"{row['shares'][part]:.0f} %" for part in PARTS)]
        for domain, row in result["domains"].items()
    ]
    return (
        f"{tables.markdown(heading, lines)}\n\nCPU time of our step:\n\n"
        f"{tables.markdown(['domain of the batch', *PARTS], parts)}\n\n"
        f"{result['rounds']} rounds; {result['machine']}, {versions}; {result['date']}; "
        f"`{result['command']}`.\n"
    )


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Measures a training step beside the same step in JAX.")
    parser.add_argument(
        "--domains",
        nargs="+",
        choices=CLASSES,
        default=["inat", "met"],
        metavar="DOMAIN",
        help="of the batches (default: inat met)",
    )
    parser.add_argument("--model", choices=("s16", "b16", "l16"), default="s16")
    parser.add_argument("--batch-size", type=shared.positive, default=8, help="(default: 8)")
    parser.add_argument("--rounds", type=shared.positive, default=12, help="(default: 12)")
    parser.add_argument("--core", type=shared.natural, help="(default: the last)")
    parser.add_argument("--out", type=shared.output, default=RESULTS / "jax_step.json")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="writes the table of --out between <!-- jax step --> and <!-- end of jax step -->",
    )
    return parser


def command(options: argparse.Namespace) -> str:
    """The command line that is recorded."""
    return (
        f"python -m benchmarks.jax_step --domains {' '.join(options.domains)} "
        f"--model {options.model} --batch-size {options.batch_size} --rounds {options.rounds}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences(udon.USER_ERRORS):
        if options.table:
            keys = ("domains", "rounds", "machine", "versions", "date", "command")
            result = shared.recorded(options.out, "jax_step", keys)
            return shared.fill(options.table, "jax step", lambda: table(result))
        versions = shared.versions(PACKAGES, "interop")
        shared.pin(options.core)
        os.environ.update(ENVIRONMENT)
        torch.manual_seed(0)
        config = udon.Config(
            preset=f"uned-{options.model}",
            batch_size=options.batch_size,
            inactive_heads="zero",
            frozen_epochs=0.0,
            init="scratch",
            device="cpu",
            out="runs/jax-step",
        )
        run = new_run(udon.build_model(config, CLASSES)[0], config)
        about = {
            "command": command(options),
            "machine": shared.machine("cpu"),
            "versions": versions,
            "date": time.strftime("%Y-%m-%d"),
            "environment": ENVIRONMENT,
        }
        for measured in measure(run, options.domains, options.rounds):
            result = about | measured
            write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
