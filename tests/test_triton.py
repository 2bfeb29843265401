"""The Triton kernels without a GPU: against the reference in Triton's interpreter, broken on purpose, and compiled for GPUs.

The interpreter is chosen when triton is imported, so its tests run in a process of their own, which one test here starts.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cosine_topk, reference

triton = pytest.importorskip("triton", reason="triton is built for Linux alone")
from kernels import triton_topk  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
to_be_compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
GPUS = {                       # shared memory of a block in bytes, instruction of the tensor cores
    ("cuda", 80, 32): (166912, "mma.sync"),
    ("cuda", 90, 32): (232448, "wgmma.mma_async"),
    ("hip", "gfx942", 64): (65536, "v_mfma"),
}
SMALL_TILES = {4: (16, 64, 64, 4, 1), 2: (16, 64, 64, 4, 1)}        # for the interpreter, which computes what masks hide
SHAPES = (                     # Q, G, D, k
    (1, 1, 1, 1),
    (3, 64, 7, 64),
    (17, 127, 65, 5),
    (2, 1025, 64, 6),          # the index in two parts
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


@to_be_compiled
def test_in_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__], capture_output=True,
                         text=True, cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "1"})
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
        assert k > 32 or selects_the_best(triton_topk, queries, index, min(k, g - 1), torch.arange(q) % g)


@in_the_interpreter
@pytest.mark.parametrize("dtypes", ((torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float64,) * 2,
                                    (torch.float16, torch.float32)), ids=str)
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
@pytest.mark.parametrize("right, wrong", (
    ("(left + where)[:, None]", "where[:, None]"),
    ("g[None, :] != barred[:, None]", "g[None, :] != barred[:, None] + 1"),
    ("tl.where((g < end)[None, :] &", "tl.where((g < end - 1)[None, :] &"),
    ("start + held_rows)", "held_rows)"),
    ("tl.sqrt(g_norm)", "g_norm"),
), ids=str)
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
    index *= torch.linspace(1, 5, 1025)[torch.randperm(1025, generator=torch.Generator().manual_seed(0))][:, None]
    index[-1] = queries[0]
    nearest = reference.result(reference.topk(queries, index, 1))[1][:, 0]
    none = torch.full((2,), -1)
    assert not all(selects_the_best(broken, queries, index, 6, barred) for barred in (nearest, none))


@to_be_compiled
@pytest.mark.parametrize("keep", (16, 128))
@pytest.mark.parametrize("size", triton_topk.TILES)
@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_compiles_for_gpus(gpu, size, keep):
    """Fits the shared memory, uses the tensor cores, spills no vector register where the compiler tells."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    bq, bg, bd, warps, stages = triton_topk.TILES[size]
    constants = dict(D=64, KEEP=keep, BQ=bq, BG=bg, BD=bd, PRECISION="tf32", q_step=1, g_step=1)
    value = {4: "*fp32", 2: "*bf16"}[size]
    types = dict(queries=value, index=value, exclude="*i64", best="*fp32", rows="*i64", q_count="i32", g_count="i64", part="i64",
                 q_stride="i64", g_stride="i64", **dict.fromkeys(constants, "constexpr"))
    names = triton_topk.select.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]]
               for name in ("queries", "index", "best", "rows", "q_stride", "g_stride")}
    compiled = triton.compile(ASTSource(triton_topk.select, {name: types[name] for name in names}, constants, aligned),
                              target=GPUTarget(*gpu), options={"num_warps": warps, "num_stages": stages})
    shared, instruction = GPUS[gpu]
    text = compiled.asm["ptx" if gpu[0] == "cuda" else "amdgcn"]
    assert compiled.metadata.shared <= shared
    assert instruction in text
    if gpu[0] == "hip":
        assert re.search(r"\.vgpr_spill_count: *0\b", text)


@to_be_compiled
def test_triton_is_not_imported_until_used():
    code = "import sys, kernels; assert 'triton' not in sys.modules and 'kernels.triton_topk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@to_be_compiled
def test_without_a_gpu_triton_is_an_error():
    with pytest.raises(ValueError, match="backend 'triton' .* on cpu: it needs .* use 'auto' or 'torch'"):
        cosine_topk(torch.ones(2, 3), torch.ones(4, 3), 1, backend="triton")


@in_the_interpreter
@pytest.mark.parametrize("width, k", ((3, 65), (1025, 1)))
def test_limits(width, k):
    with pytest.raises(ValueError, match="takes k to 64 and 1 to 1024 values; use backend 'torch'"):
        cosine_topk(torch.ones(2, width), torch.ones(99, width), k, backend="triton")
