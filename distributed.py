"""What n processes add to one: shares of a batch, sums of losses and gradients. No-op on one.

    torchrun --nproc-per-node 2 udon.py train ...

    processes(device)         a context: joins the processes that torchrun has started
    rank(), size()            of this process, and their number; 0 and 1 without torchrun
    share(count)              slice of `count` rows that belong to this process
    total(tensor)             the sum over all processes
    largest(number)           the largest integer of all processes
    gathered(rows, count)     the rows of all processes, in the order of the ranks, no gradient
    collected(value)          the values of all processes
    agreed(value)             the value of rank 0 on all processes
    spread(tensors)           copies the tensors of rank 0 into those of all processes
    require_same(values)      raises DistributedError unless all processes have the same values
    GradientSum(parameters)   sums gradients over the processes while the backward pass runs
    first_to_end()            whether this process is the first to end early; that one says why
    failure()                 the PeerError of a process that has ended early

Every process works on its share of each batch, all of one domain. Losses are means over the whole
batch, so each process scales its part by its share, and gradients are summed. Gradients are summed
by hand, not by DistributedDataParallel, because the parameters of a step change: the heads of
inactive domains get no gradient and cost no traffic, the backbone is frozen at first, and the
student's head is called outside of the model's forward pass.

A process that ends early, by an error, a signal or a kill, ends the job: its connections close, the
messages of the others fail with PeerError, and torchrun stops what is left (a process that waits
for a GPU, after 30 seconds). One of the processes prints the reason. Copy with: torch.
"""

import contextlib
import datetime
import functools
import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**22  # gradient values that are summed in one message: 16 MB
TIMEOUT = datetime.timedelta(minutes=10)  # after which a process that waits for others gives up
PATIENCE = 5.0  # seconds in which the reason for a broken connection must show


class DistributedError(ValueError):
    """Processes that cannot work together: one sentence."""


class PeerError(DistributedError):
    """Another process has ended early, with `status`, so that this one cannot continue. It should
    end when torchrun has `stopped` it, because torchrun reports the process that ends first."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status, self.stopped = status, False


# Processes ----------------------------------------------------------------------------------------


def started() -> int:
    """The number of processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """How often torchrun has restarted the job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def restarts_allowed() -> int:
    """How often torchrun may do so, its --max-restarts."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def prefix() -> str:
    """What names this process in a sentence: "rank 1: ", or nothing if it is the only one."""
    return f"rank {os.environ['RANK']}: " if started() > 1 else ""


def launcher() -> str:
    """The command that has started this program."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", started()))
    machines = f" --nnodes {started() // local}" if local < started() else ""
    return "python" if started() == 1 else f"torchrun{machines} --nproc-per-node {local}"


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the processes of torchrun. They exchange tensors on GPUs by nccl and all else by gloo.
    Only rank 0 prints. An error that follows the end of another process becomes a PeerError."""
    if started() == 1 or dist.is_initialized():
        yield
        return
    try:
        join(device)
        with open(os.devnull, "w") if rank() else contextlib.nullcontext(sys.stdout) as out:
            with contextlib.redirect_stdout(out):
                yield
    except BaseException as error:
        first = first_to_end(130 if isinstance(error, KeyboardInterrupt) else 2)
        if first or isinstance(error, PeerError) or not isinstance(error, Exception):
            raise
        raise PeerError(f"another process has ended early; here: {error}") from None
    store().delete_key(f"process {rank()}")  # it may end before the others
    dist.destroy_process_group()  # after an error the others might not take part


def join(device: str) -> None:
    """Initialises the process group. Raises DistributedError unless all or none have a GPU."""
    number, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if device.split(":")[0] in ("auto", "cuda") else 0
    if device.startswith("cuda") or gpus:
        if ":" in device or local >= gpus:
            raise DistributedError(
                f"--device is {device} for {os.environ.get('LOCAL_WORLD_SIZE', started())} "
                f"processes on {socket.gethostname()}, which has {gpus} GPUs: start one process "
                "for each GPU with --device cuda, or give --device cpu"
            )
        torch.cuda.set_device(local)
    kind = "a GPU" if gpus else "the CPU"
    store().set(f"process {number}", f"{os.getpid()} {socket.gethostname()}")
    store().set(f"device {number}", kind)
    kinds = [awaited(f"device {other}") for other in range(started())]
    for other, found in enumerate(kinds):
        if found != kinds[0]:
            raise DistributedError(
                f"--device is {device}, which is {kinds[0]} on rank 0 but {found} on rank {other}: "
                "give all processes a GPU, or give --device cpu"
            )
    with messages():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            timeout=TIMEOUT,
            store=store(),
            rank=number,
            world_size=started(),
        )


@functools.cache
def kept_store() -> dist.Store:
    """Keys and values that all processes share, in the memory of torchrun, which keeps them."""
    return next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))[0]


def store() -> dist.Store:
    """Keys and values of the processes that torchrun has started at the same time."""
    return dist.PrefixStore(f"start {restarts()}", kept_store())


def awaited(key: str) -> str:
    """A text that another process sets. Raises PeerError if one has ended before it did so."""
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    with messages():
        while not store().check([key]):
            if cause := failure():
                raise cause
            if time.monotonic() > deadline:
                raise silence(f"{key} is not known after {TIMEOUT}")
            time.sleep(0.02)
        return store().get(key).decode()


def remember(key: str, text: str) -> None:
    """Keeps a text for the processes that torchrun starts if these fail."""
    if restarts_allowed():
        kept_store().set(key, text)


def recall(key: str) -> str | None:
    """The text that earlier processes have kept; None if there is none."""
    return kept_store().get(key).decode() if kept_store().check([key]) else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str) -> str:
    """ "cuda" becomes the GPU of this process, numbered as on its machine."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if device == "cuda" and number is not None else device


# The end of a process -----------------------------------------------------------------------------


def first_to_end(status: int = 2) -> bool:
    """Registers that this process ends early. True if it is the first one, which says why."""
    if not shared():
        return True
    number = os.environ["RANK"]
    try:
        first = store().compare_set("ended", "", f"{number} {status}")
    except RuntimeError:  # torchrun has ended
        return True
    return first.decode().split()[0] == number


def failure() -> PeerError | None:
    """The PeerError of a process that has ended early, None if there is none. A process that was
    killed could not say so: the first one that notices does."""
    if not shared():
        return None
    try:
        dead = [number for number in range(started()) if is_dead(number)]
        if not store().check(["ended"]):
            if not dead:
                return None
            cause = f"rank {dead[0]} has ended unexpectedly, perhaps killed for lack of memory"
            if first_to_end(1):
                return announced(cause)
        number, status = map(int, store().get("ended").split())
    except RuntimeError:  # torchrun has ended
        return None
    own = number == int(os.environ["RANK"])
    return None if own else PeerError(f"rank {number} has ended early", status)


def announced(cause: str) -> PeerError:
    """Prints why this process ends -> the error."""
    again = restarts() < restarts_allowed()
    remedy = "torchrun starts all processes again" if again else "start all processes again"
    print(f"{Path(sys.argv[0]).name}: {cause}: {remedy}", file=sys.stderr, flush=True)
    return PeerError(f"{cause}: {remedy}")


def shared() -> bool:
    """Whether there is a store that processes can use before they are joined."""
    return started() > 1 and ("TORCHELASTIC_RUN_ID" in os.environ or dist.is_initialized())


def is_dead(number: int) -> bool:
    """Whether a process on this machine has joined the others and exists no longer."""
    if not store().check([f"process {number}"]):
        return False
    process, _, host = store().get(f"process {number}").decode().partition(" ")
    status = Path(f"/proc/{process}/stat")
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return False
    try:
        return status.read_text().rpartition(")")[2].split()[0] in "ZX"  # ended, not yet reaped
    except OSError:
        return True


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """A context for messages between processes, which fail when one of them has ended. Raises
    PeerError."""
    try:
        yield
    except RuntimeError as error:  # of gloo, without a class
        deadline = time.monotonic() + PATIENCE
        while (cause := failure()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        raise cause or silence(str(error).splitlines()[0]) from None


def silence(reason: str) -> PeerError:
    """The PeerError of a message that has failed although no process is known to have ended, for
    example because one was killed on another machine. Every process that is left sets a key of the
    store; those without it are named."""
    try:
        store().set(f"left {os.environ['RANK']}", "")
        time.sleep(PATIENCE)
        silent = [str(n) for n in range(started()) if not store().check([f"left {n}"])]
    except RuntimeError:  # the machine that holds the store is gone
        silent = []
    who = " and ".join(f"rank {number}" for number in silent) or "another process"
    cause = f"{who} {'do' if len(silent) > 1 else 'does'} not answer ({reason})"
    return announced(cause) if first_to_end(1) else PeerError(cause)


# Shares and sums ----------------------------------------------------------------------------------


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
        with messages():
            dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """The largest of the integers of all processes, several times as fast as `collected`."""
    if size() > 1:
        value = torch.tensor(number)
        with messages():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        number = value.item()
    return number


def collected(value: object) -> list:
    """The values of all processes, in the order of the ranks."""
    values = [value]
    if size() > 1:
        values = [None] * size()
        with messages():
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
    with messages():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def agreed(value: object) -> object:
    """The value of rank 0: plain Python values."""
    values = [value]
    if size() > 1:
        with messages():
            dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def spread(tensors: Iterable[Tensor]) -> None:
    """Copies the tensors of rank 0 into those of all processes."""
    if size() > 1:
        for tensor in tensors:
            values = tensor.contiguous()
            with messages():
                dist.broadcast(values, 0)
            tensor.copy_(values)


def require_same(values: dict) -> None:
    """Raises DistributedError, which names what differs, unless all processes have equal values
    and run the same code."""
    everyone = collected({"the digest of the code": code_digest()} | values)
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise DistributedError(
                    f"{name} is {value} on rank 0 but {theirs.get(name)} on rank {other}: start "
                    "all processes with the same code, options and data"
                )


def code_digest() -> str:
    """A digest of the source of the project."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *root.glob("kernels/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


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
            for parameter in filter(lambda parameter: parameter.requires_grad, parameters):
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
        with messages():
            self.sent.append((self.bucket, flat, dist.all_reduce(flat, async_op=True)))
        self.bucket, self.values = [], 0

    def finish(self) -> None:
        """Waits for all sums and puts them in the place of the gradients."""
        if self.bucket:
            self.send()
        for bucket, flat, message in self.sent:
            with messages():
                message.wait()
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts):
                parameter.grad.copy_(part.view_as(parameter.grad))
        self.sent = []
