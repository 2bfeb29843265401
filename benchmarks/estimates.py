"""Estimates of training on GPUs, from measured numbers, data sheets and stated assumptions.

    report(path)                          the text of results/scaling.md, from results/scaling.json
    step(gpu, count, classes, trained)    milliseconds of the parts of a training step

Nothing here has run on a GPU. What is measured comes from results/scaling.json, results/topk.csv
and results/uned_size.json; what is known of GPUs from the data sheets in GPUS; what is neither is
in ASSUMED. All three are printed with the estimates. Copy with: benchmarks.topk.
"""

import json
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

from benchmarks import topk

RESULTS = Path(__file__).resolve().parents[1] / "results"


class GPU(NamedTuple):
    """A GPU, and the machine of eight that it is usually sold in. Bandwidths in bytes/s."""

    flops: float  # bfloat16 products, dense
    memory: float  # bytes
    bandwidth: float  # of its memory
    link: float  # to the GPUs of its machine, one direction
    network: float  # of its machine to other machines, one direction
    host: float  # to the memory of its machine, one direction
    cores: float  # of its machine, for each GPU
    source: str


GPUS = {
    "A100": GPU(
        *(312e12, 80e9, 2.039e12, 300e9, 8 * 25e9, 32e9, 128 / 8),
        "NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB): 312 TFLOPS bfloat16, 2,039 GB/s, "
        "NVLink 600 GB/s in both directions, PCIe 4.0; DGX A100 data sheet: 8 GPUs, 128 cores, "
        "8 x 200 Gb/s",
    ),
    "H100": GPU(
        *(989e12, 80e9, 3.35e12, 450e9, 8 * 50e9, 64e9, 112 / 8),
        "NVIDIA H100 Tensor Core GPU data sheet (SXM): 1,979 TFLOPS bfloat16 with sparsity, half "
        "of it without, 3.35 TB/s, NVLink 900 GB/s in both directions, PCIe 5.0; DGX H100 data "
        "sheet: 8 GPUs, 112 cores, 8 x 400 Gb/s",
    ),
}
COUNTS = (1, 8, 64)
ASSUMED = {  # name: value, what it stands for
    "share of peak": (0.4, "of the bfloat16 products, reached in the backbone"),
    "share of bandwidth": (0.8, "of memory, links and network, reached by long transfers"),
    "overlap": (1.0, "of the backward pass of the backbone, during which gradients travel"),
}
UNED = {
    "steps": 221_180,
    "frozen steps": 44_236,
    "batch": 128,
    "train images": 2_831_222,
    # Of 10 validations and 2 tests, before and after training.
    "val images": 331_716,
    "test images": 1_413_476,
    "queries": 241_986,
    "index": 1_397_126,
}
CLASSES = {
    **{"cars": 78, "sop": 9_054, "inshop": 3_198, "inat": 4_552, "met": 224_408},
    **{"gldv2": 73_182, "food2k": 900, "rp2k": 1_074},
}
STUDENT, TEACHER, WIDTH, DEPTH, TOKENS = 64, 256, 768, 12, 197
BACKBONE = 85_798_656  # parameters of ViT-B/16 at 224 pixels
MORE_IMAGES, DOMAINS = 100, 1_000

# Reads and writes of float32 values outside of the products, for each trained parameter.
ADAMW = 7  # reads weight, gradient and two moments; writes weight and moments
NORM = 1  # of the gradient, which must be finite
BUCKETS = 4  # gradients are copied into messages and back: two reads, two writes
UNIT_ROWS = 5  # of classifiers: forward reads and writes, backward reads twice and writes


def multiply_adds() -> float:
    """Of an image in the forward pass of ViT-B/16: patches, products of weights, attention. The
    last block computes keys and values of all tokens, and the rest for the CLS token alone."""
    patches = (TOKENS - 1) * 3 * 16 * 16 * WIDTH
    block = TOKENS * 12 * WIDTH**2 + 2 * TOKENS**2 * WIDTH
    last = TOKENS * 3 * WIDTH**2 + 9 * WIDTH**2 + 2 * TOKENS * WIDTH
    return patches + (DEPTH - 1) * block + last


def head_parameters(classes: int) -> int:
    """Of a domain's heads and classifiers, which a batch of the domain trains."""
    return (WIDTH + 1) * (STUDENT + TEACHER) + classes * (STUDENT + TEACHER)


def step(gpu: GPU, count: int, classes: int, trained: bool, launch_ms: dict) -> dict[str, float]:
    """Milliseconds of a training step on `count` GPUs, whose batch is of a domain of `classes`.

    products       of the forward pass, and twice that of the backward pass if `trained`
    launches       time in which the operators are started, measured: no step is faster
    memory         traffic of the optimizer and of what surrounds it, the same on every GPU
    communication  sums of gradients that the backward pass does not hide
    step           the larger of the first two, plus the others
    """
    share, bandwidth, overlap = (ASSUMED[name][0] for name in ASSUMED)
    images = UNED["batch"] / count
    backbone = 2 * multiply_adds() * images / (share * gpu.flops)
    head = 6 * classes * (STUDENT + TEACHER) * images / (share * gpu.flops)
    products = (3 if trained else 1) * backbone + head
    launches = launch_ms["trained" if trained else "frozen"] / 1e3
    parameters, passes = head_parameters(classes), ADAMW + NORM + (BUCKETS if count > 1 else 0)
    values = parameters * (passes + UNIT_ROWS) + (BACKBONE * passes if trained else 0)
    memory = 4 * values / (bandwidth * gpu.bandwidth)
    link = gpu.link if count <= 8 else min(gpu.link, gpu.network)
    sent = 4 * (parameters + (BACKBONE if trained else 0))
    sums = 2 * (count - 1) / count * sent / (bandwidth * link)
    hidden = overlap * 2 / 3 * max(products, launches) if trained else 0
    parts = {
        "products": products,
        "launches": launches,
        "memory": memory,
        "communication": max(0.0, sums - hidden),
    }
    parts["step"] = max(products, launches) + memory + parts["communication"]
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def run(gpu: GPU, count: int, results: dict) -> dict[str, float]:
    """The mean parts of a step over the phases and domains of UnED-b16, the parts of the whole run
    in hours, and the images per second that the loaders must deliver."""
    frozen = UNED["frozen steps"] / UNED["steps"]
    means = {}
    for trained, weight in ((False, frozen), (True, 1 - frozen)):
        for classes in CLASSES.values():
            for name, value in step(gpu, count, classes, trained, results["launch_ms"]).items():
                means[name] = means.get(name, 0) + weight * value / len(CLASSES)
    images = 10 * UNED["val images"] + 2 * UNED["test images"]
    seconds = 2 * multiply_adds() * images / (ASSUMED["share of peak"][0] * gpu.flops * count)
    return means | {
        "training hours": means["step"] * UNED["steps"] / 3.6e6,
        "evaluation hours": seconds / 3600,
        "images per second": 1e3 * UNED["batch"] / means["step"],
    }


def limit(parts: dict[str, float]) -> str:
    """The largest part of a step."""
    names = ("products", "launches", "memory", "communication")
    alternatives = dict(parts)
    if parts["products"] < parts["launches"]:
        del alternatives["products"]
    return max((name for name in names if name in alternatives), key=alternatives.get)


# Text ---------------------------------------------------------------------------------------------


def rows(lines: list[list[object]]) -> str:
    """A table in Markdown; the first line is its head."""
    head, *body = ([str(cell) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def section(heading: str, *parts: str) -> str:
    """A section of paragraphs, which are wrapped, and tables, which are not."""
    texts = [p if p.startswith("|") else textwrap.fill(" ".join(p.split()), 100) for p in parts]
    return "\n\n".join([heading, *texts])


def report(path: Path) -> str:
    """The text of results/scaling.md. Raises OSError or ValueError for unusable files."""
    results = json.loads(path.read_text(encoding="utf-8"))
    size = json.loads((RESULTS / "uned_size.json").read_text(encoding="utf-8"))
    head = section(
        "# Training on several processes and GPUs",
        "Written by `python -m benchmarks.scaling --markdown results/scaling.md`. The first "
        "section is measured. **No GPU was used for the others: their numbers are computed** from "
        "measured numbers, data sheets and assumptions, which the last section lists.",
    )
    parts = [
        *(head, measured(results), gpus(results), domains(results), loaders(results)),
        *(larger(results, size), premises()),
    ]
    return "\n\n".join(parts) + "\n"


def measured(results: dict) -> str:
    names = {"alone": "one process", "two alone": "two, independent", "together": "two, together"}
    lines = [["model", "processes", "batch", "images/s", "step", "CPU time of a step", "others"]]
    payload = [["model", "gradients", "embeddings", "losses", "sum of the gradients, alone"]]
    sentences = []
    for model, row in results["weak_scaling"].items():
        for contender, name in names.items():
            lines.append(
                [
                    *(f"`{model}`", name, row["batch"][contender]),
                    f"{row['images_per_second'][contender]:,.2f}",
                    *(f"{row[x][contender]:,.0f} ms" for x in ("step_ms", "step_cpu_ms")),
                    f"{row['processors_used_by_others'][contender]:.2f}",
                ]
            )
        sent = row["payload_bytes"]
        payload.append(
            [
                *(f"`{model}`", f"{sent['gradients'] / 1e6:,.1f} MB"),
                *(f"{sent['embeddings'] / 1e3:,.1f} kB", f"{sent['losses']:,} B"),
                f"{row['gradient_sum_ms']:,.1f} ms",
            ]
        )
        sentences.append(
            f"`{model}`: two processes train {2 * row['efficiency']:.2f} times as many images per "
            f"second as one, and {2 * row['efficiency_of_two_alone']:.2f} times as many if they "
            "exchange nothing. The exchange makes a step "
            f"{100 / row['efficiency_beside_two_alone'] - 100:.0f} % longer and takes "
            f"{100 / row['cpu_time_beside_two_alone'] - 100:.0f} % more CPU time."
        )
    rounds = " and ".join(f"{r['rounds']} (`{m}`)" for m, r in results["weak_scaling"].items())
    scaling = results["weak_scaling"].values()
    others = max(used for row in scaling for used in row["processors_used_by_others"].values())
    if others > 0.1:
        sentences.append(
            f"Other programs used up to {others:.1f} processors meanwhile: two processes gained "
            "less than on a machine of their own. Two independent processes suffered alike, so "
            "that the cost of the exchange is what these numbers show."
        )
    return section(
        "## Measured: two processes on two processors",
        f"{results['machine']}, {results['date']}; gloo, one thread for each process, the backbone "
        f"is trained. Three contenders take turns; medians over {rounds} rounds. Others: "
        "processors that other programs used meanwhile, which our processes went without.",
        *(rows(lines), " ".join(sentences)),
        "What a process hands over in a step, of which a ring sends 2 (n - 1) / n times as much:",
        rows(payload),
        "The gradients are those of the backbone and of the heads of the batch's domain. Their "
        "sum is sent in buckets while the backward pass goes on; the last column is its time "
        "without one.",
    )


def gpus(results: dict) -> str:
    names = ("products", "launches", "memory", "communication", "step")
    lines = [["GPUs", "images/GPU", *names, "limit", "hours", "GPU hours"]]
    for name, gpu in GPUS.items():
        for count in COUNTS:
            parts = run(gpu, count, results)
            hours = parts["training hours"] + parts["evaluation hours"]
            lines.append(
                [
                    *(f"{count} x {name}", UNED["batch"] // count),
                    *(f"{parts[x]:.1f} ms" for x in names),
                    *(limit(parts), f"{hours:,.1f}", f"{hours * count:,.0f}"),
                ]
            )
    few, many = (run(GPUS["H100"], count, results) for count in (8, 64))
    return section(
        f"## Computed: UnED-b16, {UNED['steps']:,} steps of {UNED['batch']} images",
        f"ViT-B/16 at 224 pixels: {multiply_adds() / 1e9:.1f} G multiply-adds, "
        f"{2 * multiply_adds() / 1e9:.1f} GFLOP, in the forward pass of an image. The backbone is "
        "in bfloat16, the optimizer and the sums of gradients are in float32. The backbone is "
        f"frozen for the first {UNED['frozen steps']:,} steps. Means over both phases and over the "
        "eight domains, drawn equally often. A step takes the longer of products and launches, "
        "then memory and communication. The hours include 10 validations and 2 tests.",
        rows(lines),
        f"A batch has {UNED['batch']} images of one domain, however many GPUs share it. On 64 GPUs "
        f"each has {UNED['batch'] // 64}: their products take {many['products']:.1f} ms (H100), "
        f"but the CPU takes {many['launches']:.1f} ms to start the operators of a step, and the "
        f"traffic of the optimizer, {many['memory']:.1f} ms, is the same on every GPU. 64 H100 are "
        f"therefore {few['step'] / many['step']:.1f} times as fast as 8. `--compile` and CUDA "
        "graphs start fewer kernels; more GPUs need a larger batch, which is another setting than "
        "the published one.",
    )


def domains(results: dict) -> str:
    names = ("memory", "communication", "step")
    lines = [["domain", "classes", "parameters of its heads", "gradients", *names]]
    for domain in ("cars", "gldv2", "met"):
        classes = CLASSES[domain]
        parts = step(GPUS["H100"], 64, classes, False, results["launch_ms"])
        parameters = head_parameters(classes)
        lines.append(
            [
                *(domain, f"{classes:,}", f"{parameters / 1e6:.1f} M"),
                f"{4 * parameters / 1e6:,.0f} MB",
                *(f"{parts[name]:.1f} ms" for name in names),
            ]
        )
    total = sum(map(head_parameters, CLASSES.values()))
    return section(
        "## Computed: the classifiers",
        "Steps with a frozen backbone on 64 H100, where no backward pass hides the sums:",
        rows(lines),
        "Only the heads of the batch's domain are trained and sent. All heads together have "
        f"{total / 1e6:.1f} M parameters, {16e-9 * total:.1f} GB with gradients and moments.",
    )


def loaders(results: dict) -> str:
    sizes = results["decoded_per_second"]
    lines = [["GPUs", "images/s", *(f"needed for {size}" for size in sizes), "processors there"]]
    short = []
    for name, gpu in GPUS.items():
        for count in COUNTS:
            rate = run(gpu, count, results)["images per second"]
            needed = [rate / own for own in sizes.values()]
            cells = [f"{rate:,.0f}", *(f"{n:,.0f}" for n in needed), f"{gpu.cores * count:,.0f}"]
            lines.append([f"{count} x {name}", *cells])
            if max(needed) > gpu.cores * count:
                short.append(f"{count} x {name}")
    rates = " and ".join(f"{rate:,.0f} ({size})" for size, rate in sizes.items())
    verdict = "The processors suffice in all rows."
    if short:
        verdict = f"They are too few for the largest pictures with {', '.join(short)}."
    return section(
        "## Computed: the loader",
        f"One processor of the measuring machine opens JPEGs and prepares them for training at "
        f"{rates} per second. Processors that the loaders need to keep up with the GPUs:",
        rows(lines),
        f"{verdict} `--workers`, 8 unless given, is the number of processes that load the images "
        "of a GPU. The sizes of UnED's pictures are not known here.",
    )


def larger(results: dict, size: dict) -> str:
    lines = [["what", "needs", "so"], *needs_of_training(results), *needs_of_retrieval(results)]
    return section(
        f"## Computed: {MORE_IMAGES} times as many images, {DOMAINS:,} domains",
        rows(lines),
        f"The search is exact: {search_ms() / 1e3:.1f} s for 4,096 queries in 1.4 M rows on one "
        f"thread (`topk.csv`). All of UnED's queries took {size['search_seconds']:.0f} s on "
        f"{size['threads']} threads (`uned_size.json`).",
    )


def needs_of_training(results: dict) -> list[list[str]]:
    images = MORE_IMAGES * UNED["train images"]
    days = MORE_IMAGES * run(GPUS["H100"], 8, results)["training hours"] / 24
    listed = results["bytes_of_an_image"]
    mean = round(statistics.mean(CLASSES.values()))
    moved = 12e3 * head_parameters(mean) / GPUS["A100"].host
    draw, domains_ms = results["sampler_us"], results["domains_ms"]
    choice = list(results["choice_us"].values())
    return [
        [
            "training",
            f"{MORE_IMAGES * UNED['steps']:,} steps for 10 epochs: {days:,.0f} days on 8 H100",
            "larger batches, or a schedule in steps instead of epochs",
        ],
        [
            f"list of {images:,} images",
            f"{listed:.0f} B for each (measured): {listed * images / 1e9:.0f} GB in each process",
            "list them once on a machine, in shared memory",
        ],
        [
            f"classifiers of {DOMAINS:,} domains of {mean:,} classes",
            f"{16e-9 * DOMAINS * head_parameters(mean):,.0f} GB with gradients and moments, on "
            "every GPU",
            "more than a GPU holds: keep the heads of inactive domains in host memory, those of a "
            f"batch move in {moved:.0f} ms each way over PCIe 4.0",
        ],
        [
            "sampler",
            f"{draw['1000']:.1f} µs for a draw (measured; 8 domains: {draw['8']:.1f} µs)",
            f"`--period` {125 * DOMAINS:,} for as many batches of a domain as now; at 1,000 every "
            "domain gets one batch, and the sampler cannot favour any",
        ],
        [
            "choice of a batch's images",
            f"{choice[1]:,.0f} µs (measured; a domain of UnED: {choice[0]:,.0f} µs)",
            "nothing",
        ],
        [
            "loops over the parameters of all domains",
            f"{domains_ms['1000']:.1f} ms of CPU time for a step of the smallest model (measured; "
            f"8 domains: {domains_ms['8']:.1f} ms)",
            "loop over the parameters of the batch's domain alone",
        ],
    ]


def needs_of_retrieval(results: dict) -> list[list[str]]:
    index, queries = MORE_IMAGES * UNED["index"], MORE_IMAGES * UNED["queries"]
    pair = search_ms() / 1e3 / (4096 * 1.4e6)  # seconds
    hours = pair * UNED["queries"] * UNED["index"] / 3600
    return [
        [
            f"embeddings of {index:,} images",
            f"{4e-9 * STUDENT * index:.0f} GB in each process that evaluates",
            "keep in each process its own share alone",
        ],
        [
            f"search of {queries:,} queries",
            f"{pair * queries * index / 3600:,.0f} hours on one processor",
            f"{MORE_IMAGES**2:,} times UnED's {hours:.2f} hours; processes divide it evenly",
        ],
    ]


def search_ms() -> float:
    """Measured milliseconds for 4,096 queries in 1.4 M rows of 64 values, on one thread."""
    for row in topk.written(RESULTS / "topk.csv"):
        if (row["case"], row["contender"], row["threads"]) == ("4096x1400000x64", "ours", "1"):
            return float(row["wall_ms"])
    raise ValueError("topk.csv has no row 4096x1400000x64 of ours on 1 thread: measure it first")


def premises() -> str:
    sheets = [["GPU", "bfloat16", "memory", "link", "network of 8", "source"]]
    for name, gpu in GPUS.items():
        sheets.append(
            [
                *(name, f"{gpu.flops / 1e12:.0f} TFLOPS", f"{gpu.bandwidth / 1e12:.2f} TB/s"),
                *(f"{gpu.link / 1e9:.0f} GB/s", f"{gpu.network / 1e9:.0f} GB/s", gpu.source),
            ]
        )
    assumed = [["assumed, not measured", "value", "what it is"]]
    assumed += [[name, f"{value:g}", meaning] for name, (value, meaning) in ASSUMED.items()]
    return section(
        "## Data sheets and assumptions",
        *(rows(sheets), rows(assumed)),
        "Launches are the CPU time of the same step with blocks of 12 values in place of 768, "
        "measured; a GPU's own time for a launch is not in it, and the CPU is taken to be that of "
        f"the measuring machine. Each parameter that is trained costs {ADAMW} reads and writes of "
        f"4 bytes in AdamW, {NORM} for the norm of the gradient, {BUCKETS} for messages, and in a "
        f"classifier, whose rows are normalised, {UNIT_ROWS} more. Sums over n GPUs are rings, "
        "2 (n - 1) / n times the bytes: over the links of a GPU within a machine, over the network "
        "of the machine beyond.",
    )
