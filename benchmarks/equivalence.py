"""One process and several: the same training, the same table; measured with torchrun.

    python -m benchmarks.equivalence --data DIR                  into results/equivalence.json
    python -m benchmarks.equivalence --table results/README.md   writes the table, trains nothing

Each case trains the compact model on the images in DIR twice, with the same options and the same
batches: on one process, and on several that share each batch. Written are, over all tensors of
last.pt, the largest difference of two weights relative to the tensor's largest weight, how many of
all weights differ by more than LIMIT, and the largest difference of two cells of the test tables,
in points. Sums are taken in another order:
weights in float64 agree to its precision; in float32 AdamW enlarges rounding errors where a
gradient is small, also on one process that takes its batches in pieces, the first case. Two cases
are exact: a run in which torchrun restarts killed processes beside the same run undisturbed, and
one checkpoint evaluated on 1, 2 and 3 processes.
Copy with: what udon.py needs, benchmarks.shared, benchmarks.tables.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import data
from benchmarks.shared import fill, machine, output, positive, recorded
from benchmarks.tables import code, markdown
from checkpoint import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "equivalence.json"
SETTING = "--device cpu --save-every 15"
LIMIT = 1e-4  # of a tensor's largest weight
TRAINED = "--frozen-epochs 0"  # by default, the backbone is frozen in more steps than 40
JOINT = f"{TRAINED} --method udon-joint"


class Case(NamedTuple):
    options: str  # of both runs
    processes: int
    further: str = ""  # options of the second run
    dtype: str = "float32"


CASES = (
    Case("", 1, "--accumulate 4"),
    Case("", 2),
    Case("", 3),
    Case("", 2, "--accumulate 4"),
    Case("--method udon-joint", 2),
    Case(TRAINED, 1, "--accumulate 4"),
    Case(TRAINED, 2),
    Case(TRAINED, 3),
    Case(TRAINED, 2, "--accumulate 4"),
    Case(JOINT, 2),
    Case(TRAINED, 2, dtype="float64"),
    Case(TRAINED, 3, "--accumulate 4", dtype="float64"),
    Case(JOINT, 2, dtype="float64"),
)
FLOAT64 = """
import torch
torch.set_default_dtype(torch.float64)
import data, udon

normalise = data.normalise
data.normalise = lambda *arguments: normalise(*arguments).double()
udon.main()
"""
KILLS = {0: (1, 20), 1: (0, 35)}  # {restarts so far: (rank, step) that is killed}
KILLED = f"""
import os, signal, distributed, udon

step_of_udon, kills = udon.training_step, {KILLS}

def training_step(run, batches):
    if kills.get(distributed.restarts()) == (distributed.rank(), run.step):
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of_udon(run, batches)

udon.training_step = training_step
udon.main()
"""


def start(processes: int, *words: object, restarts: int = 0) -> None:
    """Runs a script of the project to its end, on one thread for each process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, *map(str, words)],
        check=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pt", weights_only=True)["model"]


def weight_difference(one: Path, other: Path) -> dict:
    """The largest difference relative to the largest weight of its tensor, and the tensor; how many
    weights differ by more than LIMIT, of how many."""
    pairs, differences = weights(other), {}
    for name, values in weights(one).items():
        largest = values.abs().max().clamp(min=1e-30)
        differences[name] = (values - pairs[name]).abs() / largest
    name = max(differences, key=lambda name: differences[name].max())
    return {
        "weights": differences[name].max().item(),
        "tensor": name,
        "above_limit": sum((values > LIMIT).sum().item() for values in differences.values()),
        "of": sum(values.numel() for values in differences.values()),
    }


def cells(path: Path) -> list[float]:
    """The percentages of a table."""
    results = json.loads(path.read_text())
    rows = [*results["domains"].values(), results["mean"]]
    return [100 * row[name] for row in rows for name in ("recall_at_1", "mmp_at_5")]


def table_difference(one: Path, other: Path) -> float:
    """The largest difference of two cells, in points."""
    return max(abs(a - b) for a, b in zip(cells(one), cells(other), strict=True))


class Runs:
    """Runs of udon.py with the same images and batches, in a temporary directory."""

    def __init__(self, options: argparse.Namespace, directory: Path):
        self.directory, self.done = directory, {}
        base = f"--steps {options.steps} --batch-size {options.batch_size} {SETTING}"
        self.base = ["train", "--data", options.data, *base.split()]
        self.scripts = {"float32": "udon.py"}
        for name, text in (("float64", FLOAT64), ("killed", KILLED)):
            self.scripts[name] = directory / f"{name}.py"
            self.scripts[name].write_text(text)

    def run(self, processes: int, options: str, script: str = "float32", restarts: int = 0) -> Path:
        """The directory of a run; the same one for the same arguments."""
        key = processes, options, script
        if key not in self.done:
            out = self.directory / f"run{len(self.done)}"
            words = (*self.base, *options.split(), "--out", out)
            start(processes, self.scripts[script], *words, restarts=restarts)
            self.done[key] = out
        return self.done[key]


def compared(runs: Runs, case: Case) -> dict:
    one = runs.run(1, case.options, case.dtype)
    other = runs.run(case.processes, f"{case.options} {case.further}".strip(), case.dtype)
    row = case._asdict() | weight_difference(one, other)
    row |= {"table": table_difference(one / "test.json", other / "test.json")}
    print(row, flush=True)
    return row


def restarted(runs: Runs) -> dict:
    """Two processes that are killed and restarted, beside two that are not."""
    one = runs.run(2, TRAINED)
    other = runs.run(2, TRAINED, "killed", restarts=len(KILLS))
    expected, found = weights(one), weights(other)
    return {
        "killed": [f"rank {rank} at step {step}" for rank, step in KILLS.values()],
        "equal_weights": all(torch.equal(expected[name], found[name]) for name in expected),
        "equal_tables": cells(one / "test.json") == cells(other / "test.json"),
    }


def evaluated(runs: Runs) -> dict:
    """One checkpoint on 1, 2 and 3 processes."""
    checkpoint = runs.run(1, TRAINED) / "best.pt"
    files = {count: runs.directory / f"evaluated{count}.json" for count in (1, 2, 3)}
    for count, file in files.items():
        start(count, "evaluate.py", checkpoint, "--json", file)
    first, *others = (json.loads(file.read_text()) for file in files.values())
    return {"processes": [*files], "equal_tables": all(first == other for other in others)}


def table(result: dict) -> str:
    heading = ["type", "options", "one process, and", "largest difference of a weight"]
    heading += [f"weights above {LIMIT}", "of the table, points"]
    lines = []
    for row in result["rows"]:
        beside = f"{row['processes']} process{'es' if row['processes'] > 1 else ''}"
        options, further = (code(row[x]) if row[x] else "" for x in ("options", "further"))
        lines.append([row["dtype"], options, f"{beside} {further}".strip()])
        lines[-1] += [f"{row['weights']:.1e}", f"{row['above_limit']:,} of {row['of']:,}"]
        lines[-1].append(f"{row['table']:.2f}")
    killed, counts = result["restarted"]["killed"], result["evaluated"]["processes"]
    equal = {True: "bit for bit", False: "not"}
    about = f"`{result['command']}`: {result['setting']}; {result['machine']}; {result['date']}."
    return (
        f"{markdown(heading, lines)}\n\nTwo processes, killed ({', '.join(killed)}) and restarted "
        f"by torchrun, equal two undisturbed ones {equal[result['restarted']['equal_weights']]}. "
        f"The tables of one checkpoint on {', '.join(map(str, counts))} processes are equal "
        f"{equal[result['evaluated']['equal_tables']]}. {about}\n"
    )


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="images, as for udon.py train")
    parser.add_argument("--steps", type=positive, default=40, help="(default: 40)")
    parser.add_argument("--batch-size", type=positive, default=60, help="(default: 60)")
    parser.add_argument("--out", type=output, default=RESULTS)
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if not (options.data or options.table):
        parser.error("give --data to train, or --table")
    with parser.sentences(), tempfile.TemporaryDirectory() as name:
        if options.table:
            keys = ("rows", "restarted", "evaluated", "command", "setting", "machine", "date")
            result = recorded(options.out, "equivalence", keys)
            return fill(options.table, "equivalence", lambda: table(result))
        options.data = Path(options.data).absolute()
        benchmark = data.Benchmark(options.data)
        runs = Runs(options, Path(name))
        result = {
            "command": "python -m benchmarks.equivalence --data DIR",
            "setting": f"{options.steps} steps of {options.batch_size} images of "
            f"{len(benchmark.domains)} domains, one thread for each process",
            "machine": machine("cpu"),
            "date": time.strftime("%Y-%m-%d"),
            "rows": [compared(runs, case) for case in CASES],
            "restarted": restarted(runs),
            "evaluated": evaluated(runs),
        }
        write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
