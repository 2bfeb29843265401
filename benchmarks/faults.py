"""Faults: runs that are killed and resumed, and mutated inputs; what is lost.

    python -m benchmarks.faults [--kills 200] [--mutations 100000] [--out results/faults.json]
    python -m benchmarks.faults --table results/README.md

Kills: a short run is ended by a signal at a random moment, or as soon as it writes a file, and then
resumed to its end. States of model, optimizer and sampler, best.pt, metrics and test results must
equal those of an undisturbed run bit for bit, and no other file may be left.

Mutations (mutations.py): each input must be used as it is or refused in one sentence. A kind of
fault is a traceback, a silent wrong result, a hang of more than 5 s, an error because more than
1 GiB of memory was needed, a file outside the run's directory, or a crash of the process.

Results are written as they come; the same command continues where it was stopped.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

import checkpoint
import udon
from benchmarks import mutations, shared

ROOT = Path(__file__).parents[1]
OUTCOMES = ("", "accepted", "refused", "traceback", "silent", "hang", "memory", "outside", "crash")
FAULTS = OUTCOMES[3:]
SECONDS, MEMORY = 5, 2**30  # allowed for each mutation
BATCH = 250  # mutations per process
PATIENCE = 120  # seconds for a run of a fraction of a second, on a busy machine


def fork(function: Callable, log: Path, directory: Path) -> int:
    """Runs function() in a process of its own, its output in `log` -> the process's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(directory)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w") for stream in (1, 2))
        function()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(pid: int, seconds: float) -> int | None:
    """The exit status of a process, minus the signal that ended it; None after `seconds`, when it
    is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


# Kills --------------------------------------------------------------------------------------------

KILLS = {  # {kind: (signal, whether it waits until a file is written, share of --kills)}
    "SIGKILL": (signal.SIGKILL, False, 0.5),
    "SIGKILL while a file is written": (signal.SIGKILL, True, 0.5),
    "SIGTERM": (signal.SIGTERM, False, 0.1),
    "SIGTERM while a file is written": (signal.SIGTERM, True, 0.05),
    "SIGINT": (signal.SIGINT, False, 0.1),
}
STEPS = ["--steps", "16"]


def train(*arguments) -> Callable:
    return lambda: udon.main(["train", *map(str, arguments)])


def killed_run(work: Path, kind: str, trial: int, duration: float) -> str:
    """Kills a run, once or several times, and resumes it to its end -> what was lost, or ""."""
    rng, out, log = Random(f"{kind} {trial}"), work / "killed", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    outside = listing(work)
    start = train(*mutations.SMALL, *STEPS, "--data", work / "data", "--out", out)
    resume = train("--resume", "--out", out)
    number, writing, _ = KILLS[kind]
    for _ in range(rng.choice((1, 1, 2, 3))):
        command = resume if (out / "last.pt").exists() else start
        pid = fork(command, log, work / "cwd")
        await_moment(rng, pid, out, duration, writing)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        status = wait(pid, PATIENCE)
        if status not in (0, -number, 128 + number):
            return f"status {status} after the signal: {log.read_text()[-500:]}"
        if status == 0 and not (out / "test.json").exists():
            return "the run ended without results"
    command = resume if (out / "last.pt").exists() else start
    status = wait(fork(command, log, work / "cwd"), PATIENCE)
    text = log.read_text()
    if status != 0 or "Traceback" in text or "Exception" in text:
        return f"status {status} when it was resumed: {text[-500:]}"
    if listing(out) != listing(work / "undisturbed"):
        return f"files {sorted(listing(out))}"
    if listing(work) - outside - {"killed", "log"} or listing(work / "cwd"):
        return f"files outside the directory of the run: {sorted(listing(work) - outside)}"
    return difference(work / "undisturbed", out)


def listing(directory):
    return {entry.name for entry in os.scandir(directory)}


def await_moment(rng, pid, out, duration, writing):
    """Waits for a random part of a run's duration; then, if asked, until it writes a file."""
    end = time.monotonic() + rng.uniform(0, duration)
    while time.monotonic() < end:
        time.sleep(0.001)
    end += 5
    while writing and time.monotonic() < end and not has_ended(pid):
        if out.is_dir() and any(name.endswith(".partial") for name in listing(out)):
            time.sleep(rng.choice((0, 0, 0.001, 0.004)))
            return


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def difference(first: Path, second: Path) -> str:
    """The first difference between two finished runs, except for paths and times, or ""."""
    for name in ("last.pt", "best.pt"):
        files = [torch.load(out / name, weights_only=True) for out in (first, second)]
        for part in ("model", "optimizer", "sampler", "step", "best", "validated", "backbone"):
            parts = [file.get(part) for file in files]
            if not same(*parts):
                return f"{part} of {name} differs"
    results = [json.loads((out / "test.json").read_text()) for out in (first, second)]
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (first, second)]
    lines = [[without_times(json.loads(line)) for line in part] for part in lines]
    if not same(*map(without_times, results)):
        return "test.json differs"
    return "" if same(*lines) else "metrics.jsonl differs"


def without_times(values):
    return {k: v for k, v in values.items() if k not in ("checkpoint", "seconds", "cpu_seconds")}


def same(first, second) -> bool:
    """Whether two values are equal, tensors bit for bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def run_kills(work: Path, count: int, results: dict, save: Callable) -> None:
    """Fills results["kills"], {kind: {"tried", "lost", "examples"}}."""
    undisturbed = train(
        *mutations.SMALL, *STEPS, "--data", work / "data", "--out", work / "undisturbed"
    )
    started = time.monotonic()
    status = wait(fork(undisturbed, work / "log", work / "cwd"), PATIENCE)
    if status != 0:
        raise SystemExit(f"the undisturbed run failed: {(work / 'log').read_text()}")
    duration = time.monotonic() - started
    for kind, (_, _, share) in KILLS.items():
        row = results["kills"].setdefault(kind, {"tried": 0, "lost": 0, "examples": []})
        while row["tried"] < max(1, round(share * count)):
            lost = killed_run(work, kind, row["tried"], duration)
            row["tried"] += 1
            if lost:
                row["lost"] += 1
                row["examples"] = [*row["examples"], f"{row['tried'] - 1}: {lost}"][:5]
            save()
        print(f"{kind}: {row['tried']} runs, {row['lost']} lost", flush=True)


# Mutations ----------------------------------------------------------------------------------------


class Hang(BaseException):
    """A mutation took more than SECONDS."""


def outcome(attempt: Callable, rng: Random) -> tuple[str, str]:
    """One mutation -> one of OUTCOMES, and what is to be said about it."""
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        wrong = attempt(rng)
        result = ("silent", wrong) if wrong else ("accepted", "")
    except (*udon.USER_ERRORS, mutations.Refused) as error:
        text = str(error)
        is_sentence = text.strip() and "\n" not in text
        result = ("refused" if is_sentence else "traceback", f"no sentence: {text[:300]!r}")
    except Hang:
        result = ("hang", traceback.format_exc()[-600:])
    except MemoryError:
        result = ("memory", traceback.format_exc()[-600:])
    except BaseException:
        result = ("traceback", traceback.format_exc()[-600:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() - started > SECONDS:
        return "hang", result[1]
    return result


def mutate(kind: str, numbers: range, work: Path, codes: mmap.mmap) -> None:
    """Runs mutations of a kind; writes an outcome to each place of `codes`, as it comes."""

    def stop(*_):
        raise Hang

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, of odd values in files made by hand
    signal.signal(signal.SIGALRM, stop)
    attempt = mutations.CASES[kind][1](work / "case")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    surroundings = listing(work), listing(work / "cwd")
    for place, number in enumerate(numbers):
        result, text = outcome(attempt, Random(f"{kind} {number}"))
        if (listing(work), listing(work / "cwd")) != surroundings:
            result, text = "outside", str(sorted(listing(work) | listing(work / "cwd")))
            surroundings = listing(work), listing(work / "cwd")
        codes[place] = OUTCOMES.index(result)
        if result in FAULTS:
            print(json.dumps(f"{number}: {result}: {text}"), file=sys.stderr, flush=True)


def run_batch(kind: str, numbers: range, work: Path, row: dict) -> None:
    """Runs a batch in a process of its own and counts its outcomes; goes on after a crash."""
    while numbers:
        codes = mmap.mmap(-1, BATCH)
        log = work / "examples"
        log.write_text("")
        batch = functools.partial(mutate, kind, numbers, work, codes)
        pid = fork(batch, log, work / "cwd")
        status = wait(pid, PATIENCE + SECONDS * len(numbers))
        done = codes[: len(numbers)].rstrip(b"\0")
        counts = [OUTCOMES[code] for code in done]
        lines = [json.loads(line) for line in log.read_text().splitlines() if line[:1] == '"']
        if status != 0:
            counts.append("crash")
            lines.append(f"{numbers[0] + len(done)}: crash: {log.read_text()[-600:]}")
        for name in counts:
            row[name] += 1
        row["tried"] += len(counts)
        row["examples"] = [*row["examples"], *lines][:5]
        numbers = numbers[len(counts) :]


def run_mutations(work: Path, count: int, results: dict, save: Callable) -> None:
    """Fills results["mutations"], {kind: {"tried", "accepted", "refused", each of FAULTS}}."""
    (work / "case").mkdir()
    status = wait(fork(lambda: mutations.prepare(work / "case"), work / "log", work / "cwd"), 120)
    if status != 0:
        raise SystemExit(f"the inputs could not be made: {(work / 'log').read_text()}")
    for kind, (share, _) in mutations.CASES.items():
        empty = {"tried": 0, **dict.fromkeys(OUTCOMES[1:], 0), "examples": []}
        row = results["mutations"].setdefault(kind, empty)
        total = max(1, round(share * count))
        while row["tried"] < total:
            numbers = range(row["tried"], min(total, row["tried"] + BATCH))
            run_batch(kind, numbers, work, row)
            save()
        print(f"{kind}: {row['tried']} tried, {lost(row)} lost", flush=True)


def lost(row) -> int:
    return row["lost"] if "lost" in row else sum(row[name] for name in FAULTS)


# Results ------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """The lines between the marks of results/README.md."""
    lines = ["| killed by | runs | lost |", "|---|---|---|"]
    for kind, row in results["kills"].items():
        lines.append(f"| {kind} | {row['tried']:,} | {row['lost']} |")
    lines += ["", "| mutated | tried | used | refused | lost |", "|---|---|---|---|---|"]
    for kind, row in results["mutations"].items():
        used, refused = row["accepted"], row["refused"]
        lines.append(f"| {kind} | {row['tried']:,} | {used:,} | {refused:,} | {lost(row)} |")
    limits = f"{SECONDS} s and {MEMORY >> 30} GiB of memory beyond that of the loaded program"
    lines += [
        "",
        f"Limits of each mutation: {limits}. {results['date']}, {results['machine']}.",
        "",
    ]
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="faults.py", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=shared.natural, default=200, metavar="N")
    parser.add_argument("--mutations", type=shared.natural, default=100_000, metavar="N")
    parser.add_argument("--out", type=shared.output, default=ROOT / "results" / "faults.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table to this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = command_line().parse_args(arguments)
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.table:
        shared.fill(given.table, "faults", lambda: table(results))
        return
    results = {"kills": {}, "mutations": {}} | results
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # once, not two seconds in each process

    def save():
        results["date"] = datetime.date.today().isoformat()
        results["machine"] = shared.machine("cpu")
        checkpoint.write_json(given.out, results)

    work = Path(tempfile.mkdtemp(prefix="faults"))
    try:
        (work / "cwd").mkdir()
        mutations.write_data(work / "data")
        if given.kills:
            run_kills(work, given.kills, results, save)
        if given.mutations:
            run_mutations(work, given.mutations, results, save)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows = [*results["kills"].values(), *results["mutations"].values()]
    print(f"{sum(row['tried'] for row in rows):,} tried, {sum(map(lost, rows))} lost")


if __name__ == "__main__":
    main()
