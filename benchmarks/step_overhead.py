"""What UDON's extra heads and losses cost: a training step of `udon` against one of `usc`, same backbone and batch.

    python benchmarks/step_overhead.py                 # writes results/step_overhead.json

Both run in one process, step by step in turn, so that a change of the machine's speed meets both; the ratio is taken pair by
pair. A step is all of udon.training_step but the loading of images: normalisation, forward, losses, backward, AdamW, sampler.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import udon  # noqa: E402
from shared import output, positive, processor  # noqa: E402
from sampler import DomainSampler  # noqa: E402

CLASSES = {f"domain{i}": count for i, count in enumerate((61, 118, 60, 49, 185, 973, 145, 59))}      # as in eight real domains


def machine(device):
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} processors, torch {torch.__version__}"


def steps(method, options):
    """Yields the seconds of one training step after another."""
    config = udon.resolve(udon.Config(method=method, model=options.model, image_size=options.image_size,
                                      batch_size=options.batch_size, device=options.device))
    model, _, preprocessing = udon.build_model(config, CLASSES)
    model.to(options.device).train()
    run = udon.Run(10**6, 1000, 0, preprocessing, options.device)
    optimizer, sampler = udon.build_optimizer(model, config), DomainSampler(CLASSES, period=len(CLASSES))

    def batches():
        while True:
            domain = sampler.draw()
            images = torch.randint(0, 256, (options.batch_size, 3, options.image_size, options.image_size), dtype=torch.uint8)
            yield domain, images, torch.randint(0, CLASSES[domain], (options.batch_size,))

    stream, step = batches(), 0
    while True:
        started = time.perf_counter()
        waited = udon.training_step(step, model, stream, sampler, optimizer, config, run)[2]
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        yield time.perf_counter() - started - waited
        step += 1


def main():
    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=udon.SIZES, default="s16")
    parser.add_argument("--image-size", type=positive, default=224)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--pairs", type=positive, default=24)
    parser.add_argument("--device", default=evaluate.default_device())
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "step_overhead.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        evaluate.check_device(options.device)
        ours, theirs = steps("udon", options), steps("usc", options)
        for _ in range(3):
            next(ours), next(theirs)
    except data.InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    pairs = []
    for i in range(options.pairs):                                           # who goes first changes from pair to pair
        order = (ours, theirs) if i % 2 == 0 else (theirs, ours)
        taken = [next(order[0]), next(order[1])]
        pairs.append(taken if i % 2 == 0 else taken[::-1])
    ratio = statistics.median(a / b for a, b in pairs)
    result = {"command": f"python benchmarks/step_overhead.py --model {options.model} --image-size {options.image_size} "
                         f"--batch-size {options.batch_size} --pairs {options.pairs}",
              "machine": machine(options.device), "date": time.strftime("%Y-%m-%d"), "ratio_udon_to_usc": round(ratio, 4),
              "udon_ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
              "usc_ms": round(1e3 * statistics.median(b for _, b in pairs), 1),
              "ratios": [round(a / b, 4) for a, b in pairs]}
    evaluate.write_json(options.out, result)
    print(f"udon {result['udon_ms']} ms, usc {result['usc_ms']} ms a step, ratio {ratio:.3f} (median of {len(pairs)} pairs); "
          f"{result['machine']}")


if __name__ == "__main__":
    main()
