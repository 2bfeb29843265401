"""The directory of a run: its owner, its files, and what must agree before it is resumed.
Copy with: checkpoint.py, distributed.py, export.py, model.py, timm_backbone.py, torch.

    run_directory(out, resume)    a context: makes and locks the directory -> its path
    load_last(out)                -> model and contents of last.pt, checked against the other files
    Interruption(out)             a context in which SIGINT and SIGTERM ask for an orderly end
    MetricsLog(path, recorded)    metrics.jsonl, with a digest of its lines

    config.json     the options of the run
    metrics.jsonl   one JSON object per step and per validation:
        step        number of steps done
        domain      of the batch; total, teacher_classification, ...: its losses, as of udon.Losses
        backbone_lr, head_lr   learning rates of the step
        seconds, cpu_seconds   of the step, with waiting for data; of this process
        val         {"recall_at_1", "mmp_at_5"}, means over the domains of the val queries
        val_domains            {domain: the same two of its queries}
        sampler_weights        {domain: its weight in the sampler}, at a validation
    last.pt         the checkpoint from which the run is resumed
    best.pt         the checkpoint of the best validation, by R@1 + mMP@5
    test.json       its test results, written at the end
    stopped.json    what is known about a loss or gradient that was not finite
    features/       with --freeze-backbone: of all images; computed again if it is deleted
    owner           the process that uses the directory, while it does
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

import checkpoint
import distributed
from model import UDON

FILES = ("config.json", "metrics.jsonl", "last.pt", "best.pt", "test.json")


class RunError(ValueError):
    """A directory of a run that cannot be used: one sentence with the remedy."""


@contextlib.contextmanager
def run_directory(out: str | os.PathLike | None, resume: bool) -> Iterator[Path]:
    """Makes the directory `out`, or runs/<date>-<time>, locks it for this process and yields it.
    A directory in which nothing was written is removed again. Raises RunError if it cannot be
    written, does not fit `resume`, or is in use by another process."""
    if out is not None:
        check(Path(out), resume)
    path, made = make(out)
    descriptor = lock(path)
    try:
        if out is not None:
            check(path, resume)  # again: another process may have used it before the lock
        for name in FILES:  # what a killed process left
            (path / f"{name}.partial").unlink(missing_ok=True)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        (path / "owner").write_text(owner, encoding="utf-8")
        yield path
    finally:
        (path / "owner").unlink(missing_ok=True)
        for directory in made:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()
        unlock(descriptor)


def check(out: Path, resume: bool) -> None:
    """Raises RunError for an --out that cannot be written or does not fit --resume."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunError(
            f"--out {out} cannot be written, because {existing} is a file or belongs to another "
            "user: give another directory"
        )
    found = [name for name in FILES if (out / name).exists()]
    if resume and "last.pt" not in found:
        raise RunError(
            f"--out {out} holds no run to resume (no last.pt): leave out --resume, or correct the "
            "directory"
        )
    # A run that was killed before its first last.pt leaves an empty metrics.jsonl.
    if not resume and found and (found != ["metrics.jsonl"] or (out / found[0]).stat().st_size):
        remedy = "resume it with --resume, or give" if "last.pt" in found else "give"
        raise RunError(f"--out {out} holds a run already ({found[0]}): {remedy} another directory")


def make(out):
    """-> the directory, and the directories that had to be made for it, deepest first."""
    name = out or time.strftime("runs/%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        path = Path(name if number == 1 else f"{name}-{number}")
        made = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=out is not None)
            return path, made
        except FileExistsError:
            continue  # another run began in the same second
        except OSError as error:
            raise RunError(
                f"--out {path} cannot be made ({error.strerror}): give another directory"
            ) from None


descriptors = set()  # of directories locked by this process


def lock(path) -> int | None:
    """Locks a directory -> a file descriptor. The operating system releases the lock when the
    process ends, however it ends. Without such locks, on Windows and some network file systems,
    the directory is not protected."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        owner = path / "owner"
        name = owner.read_text(encoding="utf-8", errors="replace") if owner.exists() else "unknown"
        raise RunError(
            f"--out {path} is in use by another process ({name[:100]}): wait until it ends, or "
            "give another directory"
        ) from None
    except OSError:
        pass
    descriptors.add(descriptor)
    return descriptor


def unlock(descriptor) -> None:
    if descriptor in descriptors:
        descriptors.remove(descriptor)
        os.close(descriptor)


def unlock_all() -> None:
    for descriptor in list(descriptors):
        unlock(descriptor)


if hasattr(os, "register_at_fork"):  # loader workers may outlive a killed process for seconds
    os.register_at_fork(after_in_child=unlock_all)


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM sets `requested`, the second stops at once.
    Until the training loop sets `polled`, the first one stops at once, too. At the end it prints
    how to resume the run in `out`.

    The process ends by SystemExit with status 130 or 143. Of several processes, all end if one is
    interrupted; with PeerError if the signal only follows the end of another one.
    """

    def __init__(self, out: str | os.PathLike):
        self.out, self.requested, self.polled, self.status = Path(out), 0, False, None

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.request)
        return self

    def __exit__(self, kind, error, traceback):
        signalled, self.requested, self.polled = bool(self.requested), 0, True
        try:
            failure = error  # a PeerError says already why, also when a signal has followed it
            if self.status and not isinstance(error, distributed.PeerError):
                failure = distributed.failure()
            if isinstance(failure, distributed.PeerError):
                failure.stopped = signalled
                if failure.status not in (130, 143):
                    raise failure from None
                self.status = failure.status  # another process was interrupted
            if self.status:
                self.report()
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def report(self):
        """Prints how to resume the run, and ends the process."""
        distributed.first_to_end(self.status)
        if (self.out / "last.pt").exists():
            command = f"udon.py train --out {shlex.quote(str(self.out))} --resume"
            print(f"interrupted; resume with: {distributed.launcher()} {command}", flush=True)
        else:
            print("interrupted before the first checkpoint; start the run again", flush=True)
        raise SystemExit(self.status) from None  # torch hides exceptions of its callbacks

    def request(self, number, frame):
        again, self.requested = self.requested, number
        if again or not self.polled:
            self.stop()

    def stop(self):
        """Ends the process."""
        self.status = 128 + self.requested
        raise SystemExit(self.status)


class MetricsLog:
    """metrics.jsonl, opened for more lines.

    recorded  {"bytes", "sha256"} of the lines that last.pt knows: any others belong to steps that
              are about to be repeated, and are dropped. Without it the file starts empty.
    Raises RunError if the file does not begin with those lines.
    """

    def __init__(self, path: Path, recorded: dict | None = None):
        self.path, self.digest = path, hashlib.sha256()
        if recorded:
            lines = path.read_bytes()[: recorded["bytes"]] if path.exists() else b""
            self.digest.update(lines)
            if self.recorded(len(lines)) != recorded:
                raise RunError(
                    f"{path} does not begin with the lines that last.pt was written after, some "
                    "are missing or changed: restore the file, or start a new run"
                )
            os.truncate(path, len(lines))
        self.file = open(path, "ab" if recorded else "wb")

    def write(self, value: dict) -> None:
        line = json.dumps(value).encode() + b"\n"
        self.digest.update(line)
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def recorded(self, size: int | None = None) -> dict:
        """What last.pt must know of the lines so far."""
        if size is None:
            os.fsync(self.file.fileno())
            size = self.file.tell()
        return {"bytes": size, "sha256": self.digest.hexdigest()}

    def values(self) -> list[dict]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that write() has reported already
            self.file.close()


def load_last(out: Path, backbone: nn.Module | None = None) -> tuple[UDON, dict]:
    """`checkpoint.load` of the last.pt of a run. Raises RunError if it holds no state to resume
    from, or if best.pt belongs to another run or another step."""
    model, last = checkpoint.load(out / "last.pt", backbone=backbone)
    if "optimizer" not in last:
        raise RunError(
            f"{out / 'last.pt'} is a best.pt, which holds no optimizer: restore the run's own "
            "last.pt"
        )
    try:
        check_state(last)
    except checkpoint.MALFORMED as error:
        raise RunError(
            f"{out / 'last.pt'} holds no state of a run ({checkpoint.summary(error)}): restore the "
            "run's own last.pt, or start a new run"
        ) from None
    if last["validated"] is not None:
        best = checkpoint.read(out / "best.pt")
        # A run killed between writing best.pt and last.pt has a newer best.pt, written again soon.
        step, expected = best.get("step"), last["best"]["step"]
        is_newer = isinstance(step, int) and step >= last["step"]
        if best.get("run") != last["run"] or not (step == expected or is_newer):
            raise RunError(
                f"{out / 'best.pt'} is of step {step} of run {best.get('run')}, but last.pt says "
                f"step {expected} of run {last['run']}: restore the run's own best.pt, or start a "
                "new run"
            )
    return model, last


def check_state(last):
    """Raises an error for values that no run writes; the states of optimizer and sampler are
    checked later, where these are known."""
    numbers = [last["best"][name] for name in ("step", "recall_at_1", "mmp_at_5")]
    tables = [last["backbone"]["mean"], *last["backbone"]["domains"].values()]
    numbers += [row[name] for row in tables for name in ("recall_at_1", "mmp_at_5")]
    steps = [last["metrics"]["bytes"], last["best"]["step"]]
    steps += [] if last["validated"] is None else [last["validated"]]
    if not all(type(step) is int and step >= 0 for step in steps):
        raise ValueError("a step or a size is no whole number")
    if not all(map(math.isfinite, numbers)) or not isinstance(last["metrics"]["sha256"], str):
        raise ValueError("a metric is no finite number")
    if not isinstance(last["digests"], dict):
        raise TypeError("the digests of the data are of another type")
