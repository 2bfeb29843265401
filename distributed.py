"""What n processes add to one: shares of a batch, sums of losses and gradients. No-op on one.

    torchrun --nproc-per-node 2 udon.py train ...

    processes()               a context: joins the processes that torchrun has started
    rank(), size()            of this process, and their number; 0 and 1 without torchrun
    share(count)              slice of `count` rows that belong to this process
    total(tensor)             the sum over all processes
    gathered(rows, count)     the rows of all processes, in the order of the ranks, no gradient
    collected(value)          the values of all processes
    agreed(value)             the value of rank 0 on all processes
    require_same(values)      raises DistributedError unless all processes have the same values
    GradientSum(parameters)   sums gradients over the processes while the backward pass runs

Every process works on its share of each batch, all of one domain. Losses are means over the whole
batch, so each process scales its part by its share, and gradients are summed. Gradients are summed
by hand, not by DistributedDataParallel, because the parameters of a step change: the heads of
inactive domains get no gradient and cost no traffic, the backbone is frozen at first, and the
student's head is called outside of the model's forward pass. Copy with: torch.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**22  # gradient values that are summed in one message: 16 MB
TIMEOUT = datetime.timedelta(minutes=10)  # after which a process that waits for others gives up


class DistributedError(ValueError):
    """Processes that cannot work together: one sentence."""


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the processes of torchrun: with nccl on GPUs, else with gloo. Only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        with open(os.devnull, "w") if rank() else contextlib.nullcontext(sys.stdout) as out:
            with contextlib.redirect_stdout(out):
                yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str) -> str:
    """ "cuda" becomes the GPU of this process, numbered as on its machine."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if device == "cuda" and number is not None else device


def shares(count: int) -> list[slice]:
    """The rows of each process: contiguous and as equal as possible."""
    begins = [count * i // size() for i in range(size() + 1)]
    return [slice(begin, end) for begin, end in zip(begins, begins[1:])]


def share(count: int) -> slice:
    """The rows of this process."""
    return shares(count)[rank()]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, which is equal on all, bit for bit."""
    if size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def collected(value: object) -> list:
    """The values of all processes, in the order of the ranks."""
    values = [value]
    if size() > 1:
        values = [None] * size()
        dist.all_gather_object(values, value)
    return values


def gathered(rows: Tensor, count: int) -> Tensor:
    """(n, ...), the share of each process of `count` rows -> (count, ...). No gradient."""
    if size() == 1:
        return rows.detach()
    rows = rows.detach().contiguous()
    counts = [part.stop - part.start for part in shares(count)]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # messages must be of equal size
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def agreed(value: object) -> object:
    """The value of rank 0: plain Python values."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def require_same(values: dict) -> None:
    """Raises DistributedError, which names what differs, unless all processes have equal values."""
    everyone = collected(values)
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise DistributedError(
                    f"{name} is {value} on rank 0 but {theirs[name]} on rank {other}: start all "
                    "processes with the same code, options and data"
                )


class GradientSum:
    """Sums the gradients of a backward pass over all processes.

    A gradient is added to a bucket when the backward pass has computed it; full buckets are sent
    while the pass goes on. All processes compute the same losses of the same domain, so that their
    gradients, and with them the buckets, come in the same order.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.bucket, self.values, self.sent = [], 0, []
        self.active = True  # False until the last piece of a batch
        if size() > 1:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self.add)

    def add(self, parameter: torch.nn.Parameter) -> None:
        if not self.active:
            return
        self.bucket.append(parameter)
        self.values += parameter.numel()
        if self.values >= BUCKET:
            self.send()

    def send(self) -> None:
        flat = torch.cat([parameter.grad.flatten() for parameter in self.bucket])
        self.sent.append((self.bucket, flat, dist.all_reduce(flat, async_op=True)))
        self.bucket, self.values = [], 0

    def finish(self) -> None:
        """Waits for all sums and puts them in the place of the gradients."""
        if self.bucket:
            self.send()
        for bucket, flat, message in self.sent:
            message.wait()
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts):
                parameter.grad.copy_(part.view_as(parameter.grad))
        self.sent = []
