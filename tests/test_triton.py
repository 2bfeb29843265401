"""The Triton kernels without a GPU: compared with the reference in Triton's interpreter, broken on
purpose, and compiled for GPUs.

The interpreter is chosen when triton is imported, so its tests run in a separate process, which
one test of this file starts.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from kernels import cosine_topk, reference

triton = pytest.importorskip("triton", reason="triton is available for Linux only")
triton_topk = importlib.import_module("kernels.triton_topk")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts"
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
GPUS = {  # shared memory of a block in bytes, instruction of the tensor cores
    ("cuda", 80, 32): (166912, "mma.sync"),
    ("cuda", 90, 32): (232448, "wgmma.mma_async"),
    ("hip", "gfx942", 64): (65536, "v_mfma"),
}
# For the interpreter, which computes masked values too.
SMALL_TILES = dict.fromkeys(triton_topk.TILES, 3 * ((16, 64, 64),))
SHAPES = (  # Q, G, D, k
    (1, 1, 1, 1),
    (3, 64, 7, 64),
    (17, 127, 65, 5),
    (2, 1025, 64, 6),  # the index in two parts
    (13, 129, 1024, 64),  # the largest D and k
)
KINDS = (("fp32", "tf32"), ("fp32", "ieee"), ("bf16", "half"))  # values, tile
CASES = (  # D, kept rows, arbitrary strides
    (64, 32, False),  # the tile of queries stays on the chip
    (1024, 32, False),
    (1024, 128, False),
    (65, 16, False),
    (65, 128, True),
)
if INTERPRETED:
    triton_topk.TILES = SMALL_TILES


def random_search(q, g, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(g)
    return [torch.randn(n, d, generator=generator).to(dtype) for n in (q, g)]


def no_exclusion(queries):
    return torch.empty(len(queries), 0, dtype=torch.int64)


def equals_reference(module, queries, index, k, exclude=None, precision="ieee"):
    exclude = no_exclusion(queries) if exclude is None else exclude
    found = module.topk(queries, index, k, exclude, precision)
    return torch.equal(found, reference.topk(queries, index, k, exclude))


def column(rows):
    return torch.as_tensor(rows)[:, None]


def selects_the_best(module, queries, index, k, exclude):
    """The selection alone: the reference would correct a wrong one."""
    kept, worst = module._selected(queries, index, k, exclude, "ieee")
    count = min(kept.shape[1], len(index) - 1)
    expected = reference.result(reference.topk(queries, index, count, exclude))
    for row, ours, last, score in zip(expected[1], kept, worst, expected[0]):
        if set(row.tolist()) != set(ours[ours >= 0].tolist()):
            return False
        if count == kept.shape[1] and abs(float(last) - float(score[-1])) > 1e-5:
            return False
    return True


def excluded_in_another_part():
    """Queries, index, exclude: the nearest row has the position in its part that the excluded row
    has in the index. Parts consist of whole tiles."""
    queries, index = random_search(1, 1025, 40)
    index[-1] = queries[0]
    return queries.repeat(16, 1), index, column(len(index) - 1 - 64 * torch.arange(1, 17))


@compiled_only
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape):
    q, g, d, k = shape
    queries, index = random_search(q, g, d)
    assert equals_reference(triton_topk, queries, index, k)
    if g > 1:
        exclude = column(torch.arange(q) % (g + 1) - 1)
        assert equals_reference(triton_topk, queries, index, min(k, g - 1), exclude)
        exclude = column(torch.arange(q) % g)
        assert k > 32 or selects_the_best(triton_topk, queries, index, min(k, g - 1), exclude)


@interpreted
@pytest.mark.parametrize(
    "dtypes",
    (
        (torch.float16,) * 2,
        (torch.bfloat16,) * 2,
        (torch.float64,) * 2,
        (torch.float16, torch.float32),
    ),
    ids=str,
)
def test_types_and_strides(dtypes):
    queries, index = random_search(5, 150, 20)
    queries, index = queries.to(dtypes[0]), index.to(dtypes[1]).T.contiguous().T
    assert equals_reference(triton_topk, queries, index, 4, precision="tf32")


@interpreted
@pytest.mark.parametrize("scale", (1e-30, 1e30))
def test_norms(scale):
    queries, index = random_search(4, 90, 5)
    index[::7], index[1::2] = 0.0, scale * index[1::2]
    assert equals_reference(triton_topk, queries, index, 30)


@interpreted
def test_duplicates_come_in_ascending_order():
    queries, index = random_search(4, 10, 5)
    index = index.repeat(12, 1)
    for k in (3, 40):
        assert equals_reference(triton_topk, queries, index, k, column(range(4)))
    found = cosine_topk(queries, index, 3, backend="triton")
    assert torch.equal(found[1], cosine_topk(queries, index, 3)[1])


@interpreted
@pytest.mark.parametrize(
    "distance, products, references", ((1, [4], 0), (1e-3, [4, 4], 0), (3e-7, [4, 4], 4))
)
def test_an_uncertain_search_is_repeated_more_precisely(
    monkeypatch, distance, products, references
):
    """Rows far apart; too close for tf32; too close for float32 as well."""
    queries, index = random_search(4, 200, 6)
    index, selections, whole = index[:1] + distance * index, [], []
    selected, topk = triton_topk._selected, reference.topk
    monkeypatch.setattr(
        triton_topk, "_selected", lambda *args: selections.append(len(args[0])) or selected(*args)
    )
    monkeypatch.setattr(reference, "topk", lambda *args: whole.append(len(args[0])) or topk(*args))
    none = no_exclusion(queries)
    found = triton_topk.topk(queries, index, 5, none)
    assert selections == products and sum(whole) == references
    assert torch.equal(found, topk(queries, index, 5, none))


@interpreted
@pytest.mark.parametrize("kind", ("one", "every second", "expanded", "several"))
def test_exclusion(kind):
    queries, index = random_search(6, 90, 8)
    best = reference.result(reference.topk(queries, index, 3, no_exclusion(queries)))[1]  # (6, 3)
    exclude = {
        "one": best[:, 0],
        "every second": torch.arange(12).view(6, 2)[:, :1],
        "expanded": torch.tensor(3).expand(6, 1),
        "several": torch.cat([best, best[:, 1:], torch.tensor(-1).expand(6, 1)], dim=1),
    }[kind]
    rows = exclude if exclude.ndim == 2 else column(exclude)
    assert equals_reference(triton_topk, queries, index, 4, rows)
    kept, _ = triton_topk._selected(queries, index, 4, rows, "ieee")
    assert not (kept[:, :, None] == rows.where(rows >= 0, 90)[:, None]).any()
    found, expected = (
        cosine_topk(queries, index, 4, exclude=exclude, backend=backend)
        for backend in ("triton", "torch")
    )
    assert torch.equal(found[1], expected[1])


@interpreted
def test_exclusion_from_an_index_in_parts():
    queries, index, exclude = excluded_in_another_part()
    assert equals_reference(triton_topk, queries, index, 4, exclude)
    assert selects_the_best(triton_topk, queries, index, 4, exclude)


@interpreted
@pytest.mark.parametrize("strides", ((1, 2**30), (2**24, 1)), ids=str)
def test_offsets_beyond_31_bits(strides):
    """Between rows or between dimensions; only the pages that are touched take memory."""
    try:
        index = torch.empty(2**31 + 2**24, dtype=torch.float16).as_strided((129, 3), strides)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    queries, values = random_search(2, 129, 3, torch.float16)
    none = torch.full((2, 1), -1)
    assert selects_the_best(triton_topk, queries, index.copy_(values), 5, none)


@interpreted
@pytest.mark.parametrize(
    "side, value",
    (
        ("queries", float("nan")),
        ("queries", float("-inf")),
        ("index", float("nan")),
        ("index", float("inf")),
    ),
    ids=str,
)
def test_nonfinite_values_are_an_error(side, value):
    sides = dict(zip(("queries", "index"), random_search(3, 80, 5)))
    sides[side][2, 1] = value
    with pytest.raises(ValueError, match=f"{side} row 2 holds a value that is not finite"):
        cosine_topk(**sides, k=1, backend="triton")


@interpreted
@pytest.mark.parametrize("rows, k, left", ((1, 1, 0), (5, 5, 4), (5, 0, 4)), ids=str)
def test_k_above_the_rows_left_is_an_error(rows, k, left):
    sentence = f"k is {k}: it must be a whole number from 1 to {left}, " if left else "leaves none"
    with pytest.raises(ValueError, match=sentence):
        cosine_topk(torch.ones(2, 3), torch.ones(rows, 3), k, exclude=[-1, 0], backend="triton")


@interpreted
@pytest.mark.parametrize(
    "right, wrong",
    (
        ("(left + where)[:, None]", "where[:, None]"),
        ("left + where != excluded", "left + where + 1 != excluded"),
        ("left + columns < count", "left + columns < count - 1"),
        ("start + held_rows)", "held_rows)"),
        ("tl.sqrt(tl.where(g_norm", "(tl.where(g_norm"),
        ("held / tl.sqrt(", "held / ("),
        ("rows.flatten(1).gather(1, places)", "rows[:, 0]"),
        ("other=-1) - start", "other=-1)"),
        ("exclude + q * e_count + e,", "exclude + q * e_count,"),
    ),
    ids=str,
)
def test_a_broken_kernel_is_noticed(tmp_path, right, wrong):
    source = Path(triton_topk.__file__).read_text()
    assert source.count(right) == 1
    file = tmp_path / "broken.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken", file)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    broken.TILES = SMALL_TILES
    queries, index = random_search(2, 1025, 40)
    order = torch.randperm(1025, generator=torch.Generator().manual_seed(0))
    index *= torch.linspace(1, 5, 1025)[order][:, None]
    index[-1] = queries[0]
    nearest = reference.result(reference.topk(queries, index, 2, no_exclusion(queries)))[1]
    searches = (
        (queries, index, nearest[:, :1]),
        (queries, index, nearest),
        (queries, index, torch.full((2, 1), -1)),
        excluded_in_another_part(),
    )
    assert not all(selects_the_best(broken, *search[:2], 6, search[2]) for search in searches)


def compiled(kernel, gpu, types, constants, aligned, options):
    """The assembly of a kernel that fits the shared memory and spills no register."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        name: "constexpr" if name in constants else types.get(name, "i64")
        for name in kernel.arg_names
    }
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    result = triton.compile(
        ASTSource(kernel, types, constants, attributes), target=GPUTarget(*gpu), options=options
    )
    shared, available = result.metadata.shared, GPUS[gpu][0]
    assert shared <= available, f"{shared} bytes of shared memory, {available} available"
    if gpu[0] == "hip":
        text = result.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count: *0\b", text) and re.search(
            r"\.private_segment_fixed_size: *0\b", text
        )
        return text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        used = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
        ).stdout
    assert re.search(r"STACK:0\b", used), f"registers are spilled: {used}"
    return result.asm["ptx"]


@compiled_only
@pytest.mark.parametrize(
    "value, tile, width, keep, strided",
    [kind + case for kind in KINDS for case in CASES]
    + [
        ("fp16", "half", *CASES[0]),
        ("fp32", "tf32", 64, 64, False),
        ("bf16", "half", 7, 64, True),
        ("fp32", "tf32", 48, 16, False),
    ],
)
@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_compiles_for_gpus(gpu, value, tile, width, keep, strided):
    """Every tile fits the shared memory, spills no register, uses tensor cores, loads ahead."""
    precision = "ieee" if tile == "ieee" else "tf32"
    regular = width % 16 == 0 and not strided
    bq, bg, bd = triton_topk._tile_sizes(tile, width, regular and keep <= triton_topk.FEW)
    constants = dict(
        D=width,
        KEEP=keep,
        BQ=bq,
        BG=bg,
        BD=bd,
        PRECISION=precision,
        **({} if strided else dict(q_step=1, g_step=1)),
    )
    types = dict(queries=f"*{value}", index=f"*{value}", exclude="*i64", best="*fp32", rows="*i64")
    aligned = [*types, "part"] + regular * ["q_stride", "g_stride"]
    text = compiled(triton_topk.select, gpu, types, constants, aligned, triton_topk.LAUNCH[gpu[0]])
    assert (GPUS[gpu][1] in text) == (precision == "tf32" or gpu[0] == "hip")
    if tile != "ieee":  # products of the intended type
        name = "tf32" if tile == "tf32" else {"bf16": "bf16", "fp16": "f16"}[value]
        cuda, hip = rf"mma\S*\.{name}\b", rf"v_mfma_\w*{name.replace('tf', 'xf')}"
        assert re.search(hip if gpu[0] == "hip" else cuda, text)
    if gpu[0] == "cuda" and regular:
        assert "cp.async.wait_group" in text


@compiled_only
def test_triton_is_not_imported_until_used():
    code = "import sys, kernels; assert not {'triton', 'kernels.triton_topk'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@compiled_only
def test_without_a_gpu_triton_is_an_error():
    with pytest.raises(
        ValueError, match="backend 'triton' .* on cpu: it needs .* use 'auto' or 'torch'"
    ):
        cosine_topk(torch.ones(2, 3), torch.ones(4, 3), 1, backend="triton")


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_benchmark_needs_a_gpu(tmp_path):
    out = tmp_path / "topk_gpu.csv"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.topk_gpu", "--out", out],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 2 and not run.stdout and not out.exists()
    assert re.fullmatch(
        r"torch .* finds no GPU, and this benchmark needs one: run it where .*\.\n", run.stderr
    )


@interpreted
@pytest.mark.parametrize("width, k", ((3, 65), (1025, 1)))
def test_limits(width, k):
    with pytest.raises(ValueError, match="takes k to 64 and 1 to 1024 values; use backend 'torch'"):
        cosine_topk(torch.ones(2, width), torch.ones(99, width), k, backend="triton")
