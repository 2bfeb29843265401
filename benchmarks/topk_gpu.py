"""cosine_topk on a GPU: time, throughput and share of the data sheet's limit, beside torch, and
faiss and cuVS where they are installed.

    python -m benchmarks.topk_gpu --queries 16384 --index 1000000 --dim 64 --k 10
                                                        # appends to results/topk_gpu.csv

First, the result of a small case must equal the torch backend's, bit for bit. Then all contenders
run in turn, round by round, so that a change of the clock affects each; medians. "cosine_topk"
includes the exact ranking; "select, merge" are its kernels alone. The other contenders are given
normalised rows, and return neither exact scores nor ordered ties. The limit: 2 Q G D operations,
or reading the inputs once, whichever takes longer at the figures of PEAKS; GB/s counts the same
bytes.
"""

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from benchmarks.shared import output, positive
from kernels import cosine_topk

ROOT = Path(__file__).parents[1]
PEAKS = {  # dense TFLOP/s in tf32 and in the 16-bit types, TB/s; as in kernels/README.md
    "A100-SXM4-80GB": (156, 312, 2.039),
    "H100 80GB HBM3": (494.7, 989.4, 3.35),
    "MI300X": (653.7, 1307.4, 5.3),
}
SCORES = 2**30  # of a block of torch's: 4 GB in float32
COLUMNS = (
    *("date", "machine", "torch", "triton", "method", "queries", "index", "dim", "k", "dtype"),
    *("rounds", "ms", "GB/s", "TFLOP/s", "of floor"),
)


def contenders(queries, index, k):
    """Name -> a search, a function without arguments."""
    from kernels import triton_topk

    unit_queries, unit_index = F.normalize(queries, dim=1), F.normalize(index, dim=1)
    none = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def product():
        step = max(1, SCORES // len(index))
        return [
            (unit_queries[top : top + step] @ unit_index.T).topk(k)
            for top in range(0, len(queries), step)
        ]

    found = {
        "cosine_topk": lambda: cosine_topk(queries, index, k, backend="triton"),
        "select, merge": lambda: triton_topk._selected(queries, index, k, none, "tf32"),
        f"torch {torch.__version__}": product,
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        importlib.import_module("faiss.contrib.torch_utils")  # makes faiss take tensors
        if hasattr(faiss, "GpuIndexFlatIP"):
            flat = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), index.shape[1])
            flat.add(unit_index.float())
            found[f"faiss {faiss.__version__}"] = lambda: flat.search(unit_queries.float(), k)
    if importlib.util.find_spec("cuvs"):
        import cuvs
        from cuvs.neighbors import brute_force

        built = brute_force.build(unit_index.float(), metric="inner_product")
        found[f"cuvs {cuvs.__version__}"] = lambda: brute_force.search(
            built, unit_queries.float(), k
        )
    return found


def milliseconds(search):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    search()
    torch.cuda.synchronize()  # some contenders have their own streams
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def command_line():
    parser = data.Parser(description=" ".join(__doc__.splitlines()[:2]))
    defaults = {"queries": 16384, "index": 10**6, "dim": 64, "k": 10, "rounds": 20}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "topk_gpu.csv"))
    return parser


def check_result(queries, index, k):
    """Exits if the triton backend's result for a small case differs from the torch backend's."""
    try:
        triton, reference = (
            cosine_topk(queries[:100], index[:20011], k, backend=name)
            for name in ("triton", "torch")
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if not all(map(torch.equal, triton, reference)):
        sys.exit("The results of the backends triton and torch differ: nothing is measured.")


def measured(searches, rounds):
    """Name -> milliseconds of each round."""
    times = {name: [] for name in searches}
    for number in range(2 + rounds):
        for name, search in searches.items():
            taken = milliseconds(search)
            if number >= 2:
                times[name].append(taken)
    return times


def report(options: argparse.Namespace, size: int, itemsize: int, times: dict):
    """Prints the rates of all contenders and appends them to the CSV file."""
    import triton

    device = torch.cuda.get_device_name()
    operations = 2 * options.queries * options.index * options.dim
    peak = next((figures for part, figures in PEAKS.items() if part in device), None)
    limit = None  # milliseconds
    if peak:
        limit = 1e3 * max(operations / (1e12 * peak[itemsize == 2]), size / (1e12 * peak[2]))
    if not Path(options.out).exists():
        Path(options.out).write_text(",".join(COLUMNS) + "\n")
    sizes = options.queries, options.index, options.dim, options.k, options.dtype
    with open(options.out, "a", newline="") as file:
        for name, taken in times.items():
            median = statistics.median(taken)
            rates = [f"{size / median / 1e6:.1f}", f"{operations / median / 1e9:.2f}"]
            rates.append(f"{limit / median:.3f}" if limit else "")
            run = time.strftime("%Y-%m-%d"), device, torch.__version__, triton.__version__, name
            csv.writer(file).writerow((*run, *sizes, options.rounds, f"{median:.4f}", *rates))
            share = f"no limit is known for {device}"
            if limit:
                share = f"{rates[2]} of the limit of {limit:.3f} ms"
            print(f"{name:16} {median:10.3f} ms {rates[0]:>8} GB/s {rates[1]:>7} TFLOP/s  {share}")


def main():
    parser = command_line()
    options = parser.parse_args()
    if options.k > options.index:
        parser.error(f"--k {options.k} is above --index {options.index}: give that or less")
    if not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no GPU, and this benchmark needs one: run it where "
            "torch.cuda.is_available() is True.",
            file=sys.stderr,
        )
        sys.exit(2)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # the same tensor cores for torch
    queries, index = (
        torch.randn(n, options.dim, device="cuda").to(getattr(torch, options.dtype))
        for n in (options.queries, options.index)
    )
    check_result(queries, index, options.k)
    times = measured(contenders(queries, index, options.k), options.rounds)
    size = (len(queries) + len(index)) * options.dim * queries.element_size()
    report(options, size, queries.element_size(), times)


if __name__ == "__main__":
    main()
