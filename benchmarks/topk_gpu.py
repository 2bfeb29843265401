"""cosine_topk on a GPU: time, throughput and share of the data sheet's floor, against torch, and faiss and cuVS if installed.

    python benchmarks/topk_gpu.py --queries 16384 --index 1000000 --dim 64 --k 10        # appends to results/topk_gpu.csv

First the result must equal the torch backend's on a small case, bit for bit. Then all run in turn, round by round, so that a
change of the clock meets each; medians. "cosine_topk" is all of it, exact ranking included; "select, merge" its kernels alone.
The others get rows already normalised, and return neither exact scores nor ties in order. The floor: 2 Q G D operations, or the
inputs read once, whichever takes longer at the figures of PEAKS; GB/s counts the same bytes.
"""

import csv
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from shared import output, positive  # noqa: E402

import evaluate  # noqa: E402
from kernels import cosine_topk  # noqa: E402

PEAKS = {  # dense TFLOP/s in tf32 and in the 16-bit types, TB/s; as in kernels/README.md
    "A100-SXM4-80GB": (156, 312, 2.039),
    "H100 80GB HBM3": (494.7, 989.4, 3.35),
    "MI300X": (653.7, 1307.4, 5.3),
}
SCORES = 2**30  # of torch's blocks: 4 GB in float32


def contenders(queries, index, k):
    """Name -> a search, to be called without arguments."""
    from kernels import triton_topk

    unit_queries, unit_index = F.normalize(queries, dim=1), F.normalize(index, dim=1)
    none = torch.full((len(queries),), -1, device=queries.device)

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
        import faiss.contrib.torch_utils  # noqa: F401

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
    torch.cuda.synchronize()  # some have streams of their own
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main():
    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    for name, default in (
        ("queries", 16384),
        ("index", 10**6),
        ("dim", 64),
        ("k", 10),
        ("rounds", 20),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--out", type=output, default=str(ROOT / "results" / "topk_gpu.csv"))
    options = parser.parse_args()
    if options.k > options.index:
        parser.error(f"--k {options.k} is above --index {options.index}: give that or less")
    if not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no GPU, and this measures one: run it where torch.cuda.is_available() is True.",
            file=sys.stderr,
        )
        return 2
    import triton

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # for torch the same tensor cores
    queries, index = (
        torch.randn(n, options.dim, device="cuda").to(getattr(torch, options.dtype))
        for n in (options.queries, options.index)
    )
    try:
        ours, theirs = (
            cosine_topk(queries[:100], index[:20011], options.k, backend=name)
            for name in ("triton", "torch")
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not all(torch.equal(*pair) for pair in zip(ours, theirs)):
        print(
            "The triton backend's result differs from the torch backend's: there is nothing to measure.",
            file=sys.stderr,
        )
        return 1
    searches = contenders(queries, index, options.k)
    times = {name: [] for name in searches}
    for number in range(2 + options.rounds):
        for name, search in searches.items():
            taken = milliseconds(search)
            if number >= 2:
                times[name].append(taken)
    device = torch.cuda.get_device_name()
    operations = 2 * len(queries) * len(index) * options.dim
    size = (len(queries) + len(index)) * options.dim * queries.element_size()
    peak = next((figures for part, figures in PEAKS.items() if part in device), None)
    floor = peak and 1e3 * max(
        operations / (1e12 * peak[queries.element_size() == 2]), size / (1e12 * peak[2])
    )
    if not Path(options.out).exists():
        Path(options.out).write_text(
            "date,machine,torch,triton,method,queries,index,dim,k,dtype,rounds,ms,GB/s,TFLOP/s,of floor\n"
        )
    with open(options.out, "a", newline="") as file:
        for name, taken in times.items():
            median = statistics.median(taken)
            rates = (
                f"{size / median / 1e6:.1f}",
                f"{operations / median / 1e9:.2f}",
                f"{floor / median:.3f}" if floor else "",
            )
            csv.writer(file).writerow(
                (
                    time.strftime("%Y-%m-%d"),
                    device,
                    torch.__version__,
                    triton.__version__,
                    name,
                    options.queries,
                    options.index,
                    options.dim,
                    options.k,
                    options.dtype,
                    options.rounds,
                    f"{median:.4f}",
                    *rates,
                )
            )
            print(
                f"{name:16} {median:10.3f} ms {rates[0]:>8} GB/s {rates[1]:>7} TFLOP/s"
                + (
                    f"  {rates[2]} of the floor of {floor:.3f} ms"
                    if floor
                    else f"  no floor is known for {device}"
                )
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
