"""The Triton kernels without a GPU: against the reference in Triton's interpreter, broken on purpose, and compiled for GPUs.

The interpreter is chosen when triton is imported, so its tests run in a process of their own, which one test here starts.
"""

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

triton = pytest.importorskip("triton", reason="triton is built for Linux alone")
from kernels import triton_topk  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts"
)
to_be_compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
GPUS = {  # shared memory of a block in bytes, instruction of the tensor cores
    ("cuda", 80, 32): (166912, "mma.sync"),
    ("cuda", 90, 32): (232448, "wgmma.mma_async"),
    ("hip", "gfx942", 64): (65536, "v_mfma"),
}
SMALL_TILES = dict.fromkeys(
    triton_topk.TILES, 3 * ((16, 64, 64),)
)  # for the interpreter: it computes what masks hide
SHAPES = (  # Q, G, D, k
    (1, 1, 1, 1),
    (3, 64, 7, 64),
    (17, 127, 65, 5),
    (2, 1025, 64, 6),  # the index in two parts
    (13, 129, 1024, 64),  # the largest D and k
)
KINDS = (("fp32", "tf32"), ("fp32", "ieee"), ("bf16", "half"))  # values, tile
CASES = (  # D, rows kept, are the strides as they come?
    (64, 32, False),  # the queries' tile stays on the chip
    (1024, 32, False),
    (1024, 128, False),
    (65, 16, False),
    (65, 128, True),
)
if INTERPRETED:
    triton_topk.TILES = SMALL_TILES


def search(q, g, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(g)
    return [torch.randn(n, d, generator=generator).to(dtype) for n in (q, g)]


def equals_reference(module, queries, index, k, exclude=None, precision="ieee"):
    found = module.topk(queries, index, k, exclude, precision)
    return torch.equal(found, reference.topk(queries, index, k, exclude))


def selects_the_best(module, queries, index, k, exclude):
    """Without the reference, which would put a broken selection right."""
    kept, worst = module._selected(queries, index, k, exclude, "ieee")
    count = min(kept.shape[1], len(index) - 1)
    expected = reference.result(reference.topk(queries, index, count, exclude))
    for row, ours, last, score in zip(expected[1], kept, worst, expected[0]):
        if set(row.tolist()) != set(ours[ours >= 0].tolist()):
            return False
        if count == kept.shape[1] and abs(float(last) - float(score[-1])) > 1e-5:
            return False
    return True


def with_the_excluded_row_in_another_part():
    """Queries, index and exclude: the nearest row is as far into its part as the one excluded is into the index."""
    queries, index = search(1, 1025, 40)
    index[-1] = queries[0]
    return (
        queries.repeat(16, 1),
        index,
        len(index) - 1 - 64 * torch.arange(1, 17),
    )  # parts are of whole tiles


@to_be_compiled
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


@in_the_interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape):
    q, g, d, k = shape
    queries, index = search(q, g, d)
    assert equals_reference(triton_topk, queries, index, k)
    if g > 1:
        exclude = torch.arange(q) % (g + 1) - 1
        assert equals_reference(triton_topk, queries, index, min(k, g - 1), exclude)
        assert k > 32 or selects_the_best(
            triton_topk, queries, index, min(k, g - 1), torch.arange(q) % g
        )


@in_the_interpreter
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
    queries, index = search(5, 150, 20)
    queries, index = queries.to(dtypes[0]), index.to(dtypes[1]).T.contiguous().T
    assert equals_reference(triton_topk, queries, index, 4, precision="tf32")


@in_the_interpreter
@pytest.mark.parametrize("scale", (1e-30, 1e30))
def test_norms(scale):
    queries, index = search(4, 90, 5)
    index[::7], index[1::2] = 0.0, scale * index[1::2]
    assert equals_reference(triton_topk, queries, index, 30)


@in_the_interpreter
def test_copies_come_in_ascending_order():
    queries, index = search(4, 10, 5)
    index = index.repeat(12, 1)
    for k in (3, 40):
        assert equals_reference(triton_topk, queries, index, k, torch.arange(4))
    found = cosine_topk(queries, index, 3, backend="triton")
    assert torch.equal(found[1], cosine_topk(queries, index, 3)[1])


@in_the_interpreter
@pytest.mark.parametrize(
    "distance, products, references", ((1, [4], 0), (1e-3, [4, 4], 0), (3e-7, [4, 4], 4))
)
def test_a_search_in_doubt_is_repeated_more_precisely(monkeypatch, distance, products, references):
    """Rows far apart; too near for tf32; too near for float32 as well."""
    queries, index = search(4, 200, 6)
    index, asked, whole = index[:1] + distance * index, [], []
    selected, topk = triton_topk._selected, reference.topk
    monkeypatch.setattr(
        triton_topk, "_selected", lambda *args: asked.append(len(args[0])) or selected(*args)
    )
    monkeypatch.setattr(reference, "topk", lambda *args: whole.append(len(args[0])) or topk(*args))
    found = triton_topk.topk(queries, index, 5)
    assert asked == products and sum(whole) == references
    assert torch.equal(found, topk(queries, index, 5))


@in_the_interpreter
@pytest.mark.parametrize(
    "exclude",
    (torch.arange(12).view(6, 2)[:, 0], torch.tensor(3).expand(6)),
    ids=("every second", "expanded"),
)
def test_strides_of_exclude(exclude):
    queries, index = search(6, 90, 8)
    assert equals_reference(triton_topk, queries, index, 4, exclude)
    assert selects_the_best(triton_topk, queries, index, 4, exclude.contiguous())
    assert torch.equal(
        cosine_topk(queries, index, 4, exclude=exclude, backend="triton")[1],
        cosine_topk(queries, index, 4, exclude=exclude)[1],
    )


@in_the_interpreter
def test_exclusion_from_an_index_in_parts():
    queries, index, exclude = with_the_excluded_row_in_another_part()
    assert equals_reference(triton_topk, queries, index, 4, exclude)
    assert selects_the_best(triton_topk, queries, index, 4, exclude)


@in_the_interpreter
@pytest.mark.parametrize("strides", ((1, 2**30), (2**24, 1)), ids=str)
def test_offsets_beyond_31_bits(strides):
    """Rows, or dimensions, so far apart; only the pages that are touched become memory."""
    try:
        index = torch.empty(2**31 + 2**24, dtype=torch.float16).as_strided((129, 3), strides)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    queries, values = search(2, 129, 3, torch.float16)
    assert selects_the_best(triton_topk, queries, index.copy_(values), 5, torch.full((2,), -1))


@in_the_interpreter
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
def test_values_that_are_not_finite_are_an_error(side, value):
    sides = dict(zip(("queries", "index"), search(3, 80, 5)))
    sides[side][2, 1] = value
    with pytest.raises(ValueError, match=f"{side} row 2 holds a value that is not finite"):
        cosine_topk(**sides, k=1, backend="triton")


@in_the_interpreter
@pytest.mark.parametrize("rows, k, left", ((1, 1, 0), (5, 5, 4), (5, 0, 4)), ids=str)
def test_k_beyond_what_exclusion_leaves_is_an_error(rows, k, left):
    sentence = (
        "leaves none to a query: give"
        if left < 1
        else f"k is {k}: it must be a whole number from 1 to {left}, the rows of"
    )
    with pytest.raises(ValueError, match=sentence):
        cosine_topk(torch.ones(2, 3), torch.ones(rows, 3), k, exclude=[-1, 0], backend="triton")


@in_the_interpreter
@pytest.mark.parametrize(
    "right, wrong",
    (
        ("(left + where)[:, None]", "where[:, None]"),
        ("left + where != barred", "left + where + 1 != barred"),
        ("left + columns < count", "left + columns < count - 1"),
        ("start + held_rows)", "held_rows)"),
        ("tl.sqrt(tl.where(g_norm", "(tl.where(g_norm"),
        ("held / tl.sqrt(", "held / ("),
        ("rows + q * parts * KEEP + where", "rows + q * KEEP + where"),
        ("other=-1) - start", "other=-1)"),
    ),
    ids=str,
)
def test_a_broken_kernel_is_noticed(tmp_path, right, wrong):
    source = Path(triton_topk.__file__).read_text()
    assert right in source
    file = tmp_path / "broken.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken", file)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    broken.TILES = SMALL_TILES
    queries, index = search(2, 1025, 40)
    index *= torch.linspace(1, 5, 1025)[
        torch.randperm(1025, generator=torch.Generator().manual_seed(0))
    ][:, None]
    index[-1] = queries[0]
    nearest = reference.result(reference.topk(queries, index, 1))[1][:, 0]
    none = torch.full((2,), -1)
    searches = (
        (queries, index, nearest),
        (queries, index, none),
        with_the_excluded_row_in_another_part(),
    )
    assert not all(selects_the_best(broken, *sides, 6, barred) for *sides, barred in searches)


def compiled(kernel, gpu, types, constants, aligned, options):
    """-> the assembly, once it is known to fit the shared memory and to keep all registers on the chip."""
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
    assert shared <= available, f"{shared} bytes of shared memory, {available} there are"
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


@to_be_compiled
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
    """Every tile: fits the shared memory, spills no register, uses the tensor cores, loads ahead."""
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
    if tile != "ieee":  # products of the type that was meant
        name = "tf32" if tile == "tf32" else {"bf16": "bf16", "fp16": "f16"}[value]
        assert re.search(
            rf"v_mfma_\w*{name.replace('tf', 'xf')}" if gpu[0] == "hip" else rf"mma\S*\.{name}\b",
            text,
        )
    if gpu[0] == "cuda" and regular:
        assert "cp.async.wait_group" in text


@to_be_compiled
@pytest.mark.parametrize("keep", (16, 128))
@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_merge_compiles_for_gpus(gpu, keep):
    types = dict(best="*fp32", rows="*i64", worst="*fp32", kept="*i64")
    compiled(triton_topk.merge, gpu, types, dict(KEEP=keep, WIDTH=triton_topk.MERGED), types, {})


@to_be_compiled
def test_triton_is_not_imported_until_used():
    code = "import sys, kernels; assert 'triton' not in sys.modules and 'kernels.triton_topk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@to_be_compiled
def test_without_a_gpu_triton_is_an_error():
    with pytest.raises(
        ValueError, match="backend 'triton' .* on cpu: it needs .* use 'auto' or 'torch'"
    ):
        cosine_topk(torch.ones(2, 3), torch.ones(4, 3), 1, backend="triton")


@to_be_compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_there_is_no_benchmark(tmp_path):
    file, out = Path(__file__).parents[1] / "benchmarks" / "topk_gpu.py", tmp_path / "topk_gpu.csv"
    run = subprocess.run([sys.executable, file, "--out", out], capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout and not out.exists()
    assert re.fullmatch(
        r"torch .* finds no GPU, and this measures one: run it where .*\.\n", run.stderr
    )


@in_the_interpreter
@pytest.mark.parametrize("width, k", ((3, 65), (1025, 1)))
def test_limits(width, k):
    with pytest.raises(ValueError, match="takes k to 64 and 1 to 1024 values; use backend 'torch'"):
        cosine_topk(torch.ones(2, width), torch.ones(99, width), k, backend="triton")
