"""Exact top-k by cosine similarity: the public call, what it accepts, and which backend computes it.

    cosine_topk(queries (Q, D), index (G, D), k, exclude=None, backend="auto") -> scores (Q, k) float32, rows (Q, k) int64

reference.py defines the scores, cpu.py and triton_topk.py find the same ones sooner.
"""

import contextlib
import numbers
import os
import warnings

import torch

from kernels import cpu, reference

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cosine_topk(queries, index, k, *, exclude=None, backend="auto"):
    """The k rows of `index` most similar to each query: exhaustive search, similarities told apart down to 2^-24.

    queries (Q, D), index (G, D): floating point, any norm (rows are L2-normalised inside; a zero row has similarity 0 to all).
    exclude: (Q,) integers, an index row that each query may not return, or -1.
    Returns scores (Q, k) float32 in [-1, 1], descending, and rows (Q, k) int64 on the queries' device. Rows of equal score come
    in ascending order. Scores are computed in float64 and rounded to multiples of 2^-24, so that rounding noise does not order
    equal vectors (unless their cosine is within 1e-9 of the middle between two multiples). The result is the same, bit for
    bit, whatever the blocks, the threads and the batches of queries. Memory beside inputs and result on a CPU: about 80 MB, and
    10 MB a thread; more where rows are wider than 512 values, and 24 bytes a row where rows stand in the index again and again.
    While a search is on, torch's number of threads is 1 in this process; a Python thread that first uses torch then keeps it.
    backend: "torch", "triton" (a GPU, or Triton's interpreter; k to 64, D to 1024), or "auto": triton where the queries are on a
    GPU and k and D allow it, else torch. The result is the same.
    Raises ValueError for shapes, types or values that do not fit, and for k above the number of rows left to a query.
    """
    queries, index = _plain("queries", queries), _plain("index", index)
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r} is unknown: use 'auto', 'torch' or 'triton'")
    exclude = _validated(queries, index, k, exclude)
    on_gpu = queries.is_cuda
    if backend == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' cannot compute on {queries.device}: it needs the queries on a GPU, or else "
            "TRITON_INTERPRET=1 in the environment; use 'auto' or 'torch'"
        )
    on_cpu = queries.is_cpu and index.is_cpu
    if (
        backend != "triton"
        and on_cpu
        and (found := cpu.few(queries, index, int(k), exclude)) is not None
    ):
        return found
    for name, matrix in (("queries", queries), ("index", index)):
        if not matrix.sum().isfinite():  # finite values may overflow it
            for top in range(0, len(matrix), 4096):
                wrong = (~matrix[top : top + 4096].isfinite().all(dim=1)).nonzero()
                if len(wrong):
                    raise ValueError(
                        f"{name} row {top + int(wrong[0])} holds a value that is not finite: all must be"
                    )
    if (
        backend == "triton"
        or backend == "auto"
        and on_gpu
        and k <= 64
        and 1 <= queries.shape[1] <= 1024
    ):
        from kernels.triton_topk import (
            topk as search,  # here: triton is slow to import, and not everywhere
        )
    else:
        search = cpu.topk if on_cpu else reference.topk
    # Inference mode is of one thread alone: others may not write into what was made in it.
    here = (
        queries.device if torch.get_default_device() != queries.device else contextlib.nullcontext()
    )
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(queries.device.type, enabled=False),
        here,
    ):
        return reference.result(search(queries, index, int(k), exclude))


def _plain(name, matrix):
    matrix = _tensor(name, matrix)
    return matrix.detach().resolve_neg() if matrix.requires_grad or matrix.is_neg() else matrix


def _tensor(name, values):
    if isinstance(values, torch.Tensor):
        return values
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The given NumPy array is not writable"
            )  # nothing writes into it
            return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name} cannot be taken as a tensor ({reason}): give a tensor or an array of numbers"
        ) from None


def _validated(queries, index, k, exclude):
    for name, matrix in (("queries", queries), ("index", index)):
        if matrix.ndim != 2 or matrix.dtype not in TYPES or matrix.layout != torch.strided:
            layout = "" if matrix.layout == torch.strided else f" {matrix.layout}"
            raise ValueError(
                f"{name} are {tuple(matrix.shape)} {matrix.dtype}{layout}: they must be two-dimensional, dense and "
                "floating point of 16, 32 or 64 bits"
            )
    if queries.shape[1] != index.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions, the index has {index.shape[1]}: they must have the same"
        )
    left = index.shape[0]
    if exclude is not None:
        exclude = _tensor("exclude", exclude).to(queries.device)
        exclude = exclude if exclude.numel() else exclude.long()  # an empty list is of floats
        if (
            exclude.shape != queries.shape[:1]
            or exclude.layout != torch.strided
            or exclude.is_floating_point()
            or exclude.is_complex()
            or exclude.dtype == torch.bool
        ):
            raise ValueError(
                f"exclude is {tuple(exclude.shape)} {exclude.dtype}: it must hold one integer for each of the "
                f"{len(queries)} queries"
            )
        lowest = 0 if exclude.dtype == torch.uint64 else -1
        exclude = exclude.long()
        outside = (exclude < lowest) | (exclude >= len(index))
        if outside.any():
            raise ValueError(
                f"exclude holds {int(exclude[outside][0])}: it must hold rows of the index, 0 to "
                f"{len(index) - 1}, or -1"
            )
        left -= int((exclude >= 0).any())
    if left < 1:
        raise ValueError(
            f"the index has {len(index)} rows, which leaves none to a query: give at least one more"
        )
    if not isinstance(k, (int, numbers.Integral)) or isinstance(k, bool) or not 1 <= k <= left:
        raise ValueError(
            f"k is {k!r}: it must be a whole number from 1 to {left}, the rows of the index less the excluded one"
        )
    return exclude
