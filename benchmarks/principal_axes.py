"""Whether an exact search of real embeddings could take less time than the whole product.

    python -m benchmarks.principal_axes CHECKPOINT --data DIR   # writes results/principal_axes.json

Rotate the embeddings to the principal axes of the index and multiply the first m of D coordinates
only. By Cauchy-Schwarz, the other ones add at most |q'| |r'|, the norms of the remainders. A row
whose bound is below the query's k-th best score needs no further work. The bound is compared with
the final k-th score, which a search knows only in the end: these are the fewest rows that could
remain. The unit of work is the whole product: m / D for the first coordinates, and for the
remaining rows in groups of 16, the measured cost of gathering and multiplying them for a query.
Above 1, the whole product is faster.
"""

import statistics
import time
from pathlib import Path

import torch

import checkpoint
import data
import evaluate
from benchmarks.shared import machine, output, positive
from kernels import cosine_topk

ROOT = Path(__file__).resolve().parents[1]
GROUP, BLOCK, TURN = 16, 256, 32


def cost_of_gathering(index):
    """Processor time to gather and multiply a row for one query, relative to a row in a product.

    The median of 9 measurements.
    """
    queries, generator = index[:512], torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(index) // GROUP, (TURN, 50), generator=generator)
    rows = (chosen[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    tile, ratios = torch.empty(len(index), len(queries)), []
    for _ in range(9):
        started = time.process_time()
        torch.mm(index, queries.T, out=tile)
        product = (time.process_time() - started) / tile.numel()
        started = time.process_time()
        for _ in range(20):
            near = index.index_select(0, rows.flatten()).view(*rows.shape, -1)
            queries[:TURN, None] @ near.mT
        ratios.append((time.process_time() - started) / (20 * rows.numel()) / product)
    return statistics.median(ratios)


def main():
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--k", type=positive, default=6)
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "principal_axes.json"))
    options = parser.parse_args()
    try:
        measure(options)
    except (data.InputError, checkpoint.CheckpointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def embedded(options):
    """The student embeddings (G, D) of all test images of the index, shuffled."""
    model, contents = checkpoint.load(options.checkpoint)
    if contents.get("embedding", "student") != "student":
        raise data.InputError(
            f"checkpoint {options.checkpoint} has no trained student: give one that has"
        )
    preprocessing = contents["preprocessing"]
    image_size = contents["architecture"]["backbone"]["image_size"]
    benchmark = data.Benchmark(options.data)
    sets = evaluate.open_sets(benchmark, "test", image_size, **data.resizing(preprocessing))
    size = sum(len(part.index) for part in sets.values()) // GROUP * GROUP
    if size < TURN:
        raise data.InputError(
            f"--data {options.data} has an index of {size} images in groups of {GROUP}: give "
            f"{TURN} or more"
        )
    if options.k > size:
        raise data.InputError(
            f"--k is {options.k}, and the index has {size} images in groups of {GROUP}: give that "
            "or less"
        )
    parts = [
        evaluate.embed(model.embed, part.index, preprocessing, "cpu") for part in sets.values()
    ]
    index = torch.cat(parts)
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:size]]


def remaining(queries, index, best, m):
    """-> the pairs whose bound by m coordinates reaches the k-th scores `best` (Q,), and the pairs
    of their groups."""
    rest = [part[:, m:].norm(dim=1) for part in (queries, index)]
    rows = groups = 0
    for top in range(0, len(queries), BLOCK):
        block = slice(top, top + BLOCK)
        bound = queries[block, :m] @ index[:, :m].T + rest[0][block, None] * rest[1]
        alive = bound >= best[block, None] - 1e-5
        rows += alive.sum().item()
        groups += alive.view(len(alive), -1, GROUP).any(2).sum().item() * GROUP
    return rows, groups


@torch.inference_mode()
def measure(options):
    index = embedded(options)
    queries, width = index[:: max(1, len(index) // 2048)][:2048], index.shape[1]
    variance, axes = torch.linalg.eigh(torch.cov(index.T.double()))
    variance, axes = variance.flip(0), axes.flip(1).float()  # descending
    rotated = queries @ axes, index @ axes
    best = cosine_topk(queries, index, options.k)[0][:, -1]  # (Q,)
    pairs, rows, gathering = len(queries) * len(index), [], cost_of_gathering(index)
    print(f"a gathered row costs as much as {gathering:.0f} rows of a product")
    for m in range(8, width, 8):
        left, left_in_groups = remaining(*rotated, best, m)
        rows.append(
            {
                "coordinates": m,
                "variance": round((variance[:m].sum() / variance.sum()).item(), 4),
                "rows_left": round(left / pairs, 4),
                "rows_left_in_groups": round(left_in_groups / pairs, 4),
                "work": round(m / width + gathering * left_in_groups / pairs, 3),
            }
        )
        print(rows[-1])
    arguments = f"CHECKPOINT --data {Path(options.data).name} --k {options.k}"
    result = {
        "command": f"python -m benchmarks.principal_axes {arguments}",
        "checkpoint": options.checkpoint,
        "machine": machine("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "index": len(index),
        "queries": len(queries),
        "width": width,
        "k": options.k,
        "cost_of_gathering": round(gathering, 1),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    checkpoint.write_json(options.out, result)


if __name__ == "__main__":
    main()
