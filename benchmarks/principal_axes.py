"""Could an exact search of real embeddings take less than the whole product? measured once on the embeddings of a trained student.

    python benchmarks/principal_axes.py CHECKPOINT --data DIR      # writes results/principal_axes.json

Turn the embeddings to the principal axes of the index, and multiply the first m of D coordinates alone. By Cauchy-Schwarz the rest
adds at most |q'| |r'|, the norms of what is left. A row whose bound is below the query's k-th best score needs no more work. The
bound is compared with the final k-th score, which a search knows only in the end: so these are the fewest rows that could be left.
Work is counted in products of all: m / D for the first coordinates, and for the rows left in groups of 16, which must be gathered
for each query, what gathering and multiplying takes here. Above 1 the whole product is faster.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shared import machine, output, positive  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from kernels import cosine_topk  # noqa: E402

GROUP, BLOCK, TURN = 16, 256, 32


def cost_of_gathering(index):
    """Processor time of a row gathered and multiplied for one query, in that of a row in a product; median of 9 turns."""
    queries, chosen = (
        index[:512],
        torch.randint(
            0, len(index) // GROUP, (TURN, 50), generator=torch.Generator().manual_seed(0)
        ),
    )
    rows = (chosen[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    tile, ratios = torch.empty(len(index), len(queries)), []
    for _ in range(9):
        started = time.process_time()
        torch.mm(index, queries.T, out=tile)
        product = (time.process_time() - started) / tile.numel()
        started = time.process_time()
        for _ in range(20):
            queries[:TURN, None] @ index.index_select(0, rows.flatten()).view(*rows.shape, -1).mT
        ratios.append((time.process_time() - started) / (20 * rows.numel()) / product)
    return statistics.median(ratios)


def main():
    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--k", type=positive, default=6)
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "principal_axes.json"))
    options = parser.parse_args()
    try:
        measure(options)
    except data.InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


@torch.inference_mode()
def measure(options):
    of, (model, checkpoint) = machine("cpu"), evaluate.load_checkpoint(options.checkpoint)
    if checkpoint.get("embedding", "student") != "student":
        raise data.InputError(
            f"checkpoint {options.checkpoint} has no trained student: give that of a run which trained one"
        )
    preprocessing, size = (
        checkpoint["preprocessing"],
        checkpoint["architecture"]["backbone"]["image_size"],
    )
    sets = evaluate.open_sets(
        data.Benchmark(options.data), "test", size, antialias=preprocessing["antialias"]
    )
    size = sum(len(part.index) for part in sets.values()) // GROUP * GROUP
    if size < TURN:
        raise data.InputError(
            f"--data {options.data} has an index of {size} images, in groups of {GROUP}: give {TURN} or more"
        )
    if options.k > size:
        raise data.InputError(
            f"--k is {options.k} with an index of {size} images, in groups of {GROUP}: give that or less"
        )
    embed = lambda images: evaluate.embed(
        model.embed, images, preprocessing["mean"], preprocessing["std"], "cpu"
    )
    index = torch.cat([embed(part.index) for part in sets.values()])
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:size]]
    queries = index[:: max(1, len(index) // 2048)][:2048]
    width = index.shape[1]

    variance, axes = torch.linalg.eigh(torch.cov(index.T.double()))
    variance, axes = variance.flip(0), axes.flip(1).float()  # descending
    near = (queries @ axes), (index @ axes)
    best = cosine_topk(queries, index, options.k)[0][:, -1]  # (Q,)
    rows, gathering = [], cost_of_gathering(index)
    print(f"a row gathered costs as much as {gathering:.0f} rows in a product")
    for m in range(8, width, 8):
        left = [part[:, m:].norm(dim=1) for part in near]
        survivors = groups = 0
        for top in range(0, len(queries), BLOCK):
            block = slice(top, top + BLOCK)
            bound = near[0][block, :m] @ near[1][:, :m].T + left[0][block, None] * left[1]
            alive = bound >= best[block, None] - 1e-5
            survivors += alive.sum().item()
            groups += alive.view(len(alive), -1, GROUP).any(2).sum().item() * GROUP
        pairs = len(queries) * len(index)
        rows.append(
            {
                "coordinates": m,
                "variance": round((variance[:m].sum() / variance.sum()).item(), 4),
                "rows_left": round(survivors / pairs, 4),
                "rows_left_in_groups": round(groups / pairs, 4),
                "work": round(m / width + gathering * groups / pairs, 3),
            }
        )
        print(rows[-1])
    evaluate.write_json(
        options.out,
        {
            "command": f"python benchmarks/principal_axes.py CHECKPOINT --data {Path(options.data).name} --k {options.k}",
            "checkpoint": options.checkpoint,
            "machine": of,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "index": len(index),
            "queries": len(queries),
            "width": width,
            "k": options.k,
            "cost_of_gathering": round(gathering, 1),
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
