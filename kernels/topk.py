"""Exact top-k by cosine similarity: the public call, its checks, and the choice of a backend.
reference.py defines the result; cpu.py and triton_topk.py compute it faster.
Copy with: the folder kernels/, torch, numpy.
"""

import contextlib
import numbers
import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from kernels import cpu, reference

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_K, TRITON_WIDTH = 64, 1024  # the largest k and D of the Triton kernels


def cosine_topk(
    queries: torch.Tensor | np.ndarray,
    index: torch.Tensor | np.ndarray,
    k: int,
    *,
    exclude: torch.Tensor | np.ndarray | Sequence | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact search: the k rows of `index` most similar to each query.

    queries (Q, D), index (G, D): floating point of 16, 32 or 64 bits, any norm; rows are
    L2-normalised inside. exclude: (Q,) or (Q, E) integers, index rows that each query may not
    return, -1 for none. backend: "torch", "triton" (a GPU or Triton's interpreter, k to 64, D to
    1024) or "auto": triton for queries on a GPU where k and D allow it, torch otherwise.

    Returns scores (Q, k) float32 in [-1, 1], descending, and rows (Q, k) int64, on the queries'
    device; rows of equal score ascend. A score is the cosine in float64 rounded to a multiple of
    2^-24, 0 for a zero row. The result has the same bits for any backend, batching and threads.

    On 2 CPU threads, a search takes up to 128 MB beside inputs and result for k to 100, 25 MB more
    on each further one. Meanwhile torch's number of threads is 1, which a new thread may keep.
    Raises ValueError for shapes, types or values that do not fit, and k above the rows left.
    """
    queries, index = _matrix("queries", queries), _matrix("index", index)
    if queries.shape[1] != index.shape[1]:
        widths = f"queries have {queries.shape[1]} dimensions, the index has {index.shape[1]}"
        raise ValueError(f"{widths}: they must have the same number")
    exclude, left = _excluded(exclude, queries, len(index))
    if left < 1:
        rows = f"the index has {len(index)} rows, which leaves none to a query"
        raise ValueError(f"{rows}: add at least one")
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or not 1 <= k <= left:
        raise ValueError(
            f"k is {k!r}: it must be a whole number from 1 to {left}, the number of index rows "
            "less the excluded ones"
        )
    search = _search(backend, queries, index, k)
    _check_finite("queries", queries)
    _check_finite("index", index)
    device, default = queries.device, torch.get_default_device()
    # Worker threads may not write into tensors that were created in inference mode.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        with contextlib.nullcontext() if device == default else device:
            return reference.result(search(queries, index, int(k), exclude))


def _search(backend, queries, index, k):
    """The function that computes the keys."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r} is unknown: use 'auto', 'torch' or 'triton'")
    if backend == "triton" and not queries.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' cannot compute on {queries.device}: it needs the queries on a GPU, "
            "or TRITON_INTERPRET=1 in the environment; use 'auto' or 'torch'"
        )
    suits_triton = k <= TRITON_K and 1 <= queries.shape[1] <= TRITON_WIDTH
    if backend == "triton" and not suits_triton:
        raise ValueError(
            f"k is {k}, and the rows have {queries.shape[1]} values: the triton backend takes k "
            f"to {TRITON_K} and 1 to {TRITON_WIDTH} values; use backend 'torch'"
        )
    if backend == "triton" or backend == "auto" and queries.is_cuda and suits_triton:
        from kernels import triton_topk  # slow to import, and not available on every system

        return triton_topk.topk
    return cpu.topk if queries.is_cpu and index.is_cpu else reference.topk


def _tensor(name, values):
    if isinstance(values, torch.Tensor):
        return values
    try:
        with warnings.catch_warnings():  # nothing writes into the array
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = "give a tensor or an array of numbers"
        raise ValueError(f"{name} cannot be a tensor ({reason}): {remedy}") from None


def _matrix(name, values):
    """A detached matrix (n, D) of floating-point numbers."""
    matrix = _tensor(name, values)
    if matrix.ndim != 2 or matrix.dtype not in TYPES or matrix.layout != torch.strided:
        layout = "" if matrix.layout == torch.strided else f" {matrix.layout}"
        raise ValueError(
            f"{name} are {tuple(matrix.shape)} {matrix.dtype}{layout}: they must be "
            "two-dimensional, dense and floating point of 16, 32 or 64 bits"
        )
    return matrix.detach().resolve_neg() if matrix.requires_grad or matrix.is_neg() else matrix


def _excluded(exclude, queries, total):
    """-> exclude (Q, E) int64, and the number of index rows left to every query."""
    exclude = queries.new_empty(len(queries), 0, dtype=torch.int64) if exclude is None else exclude
    rows = _tensor("exclude", exclude).to(queries.device)
    rows = rows if rows.numel() else rows.long()  # an empty list is of floats
    integers = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    fits = rows.ndim in (1, 2) and len(rows) == len(queries) and rows.layout == torch.strided
    if not fits or not integers:
        raise ValueError(
            f"exclude is {tuple(rows.shape)} {rows.dtype}: it must hold integers, one or several "
            f"for each of the {len(queries)} queries"
        )
    lowest = 0 if rows.dtype == torch.uint64 else -1  # uint64 wraps around to negative numbers
    rows = rows.long() if rows.ndim == 2 else rows.long()[:, None]
    outside = rows[(rows < lowest) | (rows >= total)]
    if len(outside):
        raise ValueError(
            f"exclude holds {int(outside[0])}: it must hold rows of the index, 0 to {total - 1}, "
            "or -1"
        )
    ordered = rows.sort(dim=1).values
    distinct = ordered >= 0
    distinct[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return rows, total - int(distinct.sum(1).max() if len(rows) else 0)


def _check_finite(name, matrix):
    finite = matrix.sum().isfinite()  # finite values may overflow the sum
    for top in () if finite else range(0, len(matrix), 4096):
        wrong = (~matrix[top : top + 4096].isfinite().all(dim=1)).nonzero()
        if len(wrong):
            row = top + int(wrong[0])
            raise ValueError(f"{name} row {row} holds a value that is not finite: all must be")
