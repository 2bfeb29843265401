"""The directory of a run: its owner, its files, and what must agree before it is resumed.
Copy with: checkpoint.py, model.py, torch.

    run_directory(out, resume)    a context: makes and locks the directory -> its path
    load_last(out)                -> model and contents of last.pt, checked against the other files
    Interruption(out)             a context in which SIGINT and SIGTERM ask for an orderly end
    MetricsLog(path, recorded)    metrics.jsonl, with a digest of its lines

    config.json     the options of the run
    metrics.jsonl   one JSON object per step and per validation
    last.pt         the checkpoint from which the run is resumed
    best.pt         the checkpoint of the best validation
    test.json       its test results, written at the end
    owner           the process that uses the directory, while it does
"""

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint
from model import UDON

FILES = ("config.json", "metrics.jsonl", "last.pt", "best.pt", "test.json")


class RunError(ValueError):
    """A directory of a run that cannot be used: one sentence with the remedy."""


@contextlib.contextmanager
def run_directory(out: str | None, resume: bool) -> Iterator[Path]:
    """Makes the directory `out`, or runs/<date>-<time>, locks it for this process and yields it.
    A directory in which nothing was written is removed again. Raises RunError if it cannot be
    written, does not fit `resume`, or is in use by another process."""
    if out is not None:
        check(Path(out), resume)
    path, made = make(out)
    try:
        with locked(path):
            yield path
    finally:
        for directory in made:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def check(out: Path, resume: bool) -> None:
    """Raises RunError for an --out that cannot be written or does not fit --resume."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunError(
            f"--out {out} cannot be written, because {existing} is a file or belongs to another "
            "user: give another directory"
        )
    found = [name for name in FILES if (out / name).exists()]
    if found and not resume:
        remedy = "resume it with --resume, or give" if "last.pt" in found else "give"
        raise RunError(f"--out {out} holds a run already ({found[0]}): {remedy} another directory")
    if resume and "last.pt" not in found:
        raise RunError(
            f"--out {out} holds no run to resume (no last.pt): leave out --resume, or correct the "
            "directory"
        )


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


@contextlib.contextmanager
def locked(path):
    """Holds a lock on a directory; the operating system releases it when the process ends, however
    it ends. Without such locks (on Windows) the directory is not protected."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    owner = path / "owner"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            process = owner.read_text(encoding="utf-8") if owner.exists() else "unknown"
            raise RunError(
                f"--out {path} is in use by another process ({process}): wait until it ends, or "
                "give another directory"
            ) from None
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM sets `requested`, the second stops at once.
    Until the training loop sets `polled`, the first one stops at once, too."""

    def __init__(self, out):
        self.out, self.requested, self.polled = out, None, False

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.request)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number, frame):
        if self.requested or not self.polled:
            raise SystemExit(128 + number)
        self.requested = number

    def stop(self):
        """Ends the process after its state has been saved."""
        print(
            f"interrupted; resume with: python udon.py train --out {shlex.quote(self.out)} --resume"
        )
        raise SystemExit(128 + self.requested)


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
        self.file.write(line)
        self.file.flush()

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
        self.file.close()


def load_last(out: Path) -> tuple[UDON, dict]:
    """`checkpoint.load` of the last.pt of a run. Raises RunError if it holds no state to resume
    from, or if best.pt belongs to another run or another step."""
    model, last = checkpoint.load(out / "last.pt")
    if "optimizer" not in last:
        raise RunError(
            f"{out / 'last.pt'} is a best.pt, which holds no optimizer: restore the run's own "
            "last.pt"
        )
    if last["validated"] is not None:
        best = checkpoint.read(out / "best.pt")
        # A run killed between writing best.pt and last.pt has a newer best.pt, written again soon.
        if best.get("run") != last["run"] or not (
            best["step"] == last["best"]["step"] or best["step"] > last["step"]
        ):
            raise RunError(
                f"{out / 'best.pt'} is of step {best['step']} of run {best.get('run')}, but "
                f"last.pt says step {last['best']['step']} of run {last['run']}: restore the "
                "run's own best.pt, or start a new run"
            )
    return model, last
