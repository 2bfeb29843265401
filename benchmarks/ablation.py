"""Every system of the paper and every ablation, over seeds, on one data folder; and the README's tables made of the results.

    python benchmarks/ablation.py --data DIR            # trains whatever is missing in results/ablation/, two runs at a time
    python benchmarks/ablation.py --data DIR --rows usc-rr udon
    python benchmarks/ablation.py --tables README.md    # writes the tables between the marks in the README

A row is a command: `python udon.py train` with the options in ROWS, one run a seed, each on one thread. A finished run is one
file, results/ablation/<row>/seed<N>.json; a run that was stopped goes on from its last checkpoint in runs/ablation/. Every row
is given the same number of images, the specialists all together, but for those whose names say twice.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shared import fill, positive  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import udon  # noqa: E402

RESULTS, RUNS = ROOT / "results" / "ablation", ROOT / "runs" / "ablation"
MAIN, SHORT = 5, 3  # seeds of a main row and of the others
BASELINE = "usc-rr"

# row -> (seeds, options of udon.py train, the row whose runs are its frozen teachers); `specialists` rows are one run a domain.
# Where nothing else is said a row has the defaults of `mini`: round robin, and for a student beside teachers or distilled from
# them the classes of all domains for negatives.
PAPER = "--negatives domain --sampler"
ROWS = {
    "usc-rr": (MAIN, "--method usc", None),
    "ujc-rr": (MAIN, "--method ujc", None),
    "ujc-margin": (MAIN, "--method ujc --domain-margin 0.2", None),
    "udon": (MAIN, "", None),
    "udon-paper": (MAIN, f"{PAPER} dynamic", None),
    "udon-paper-rr": (MAIN, f"{PAPER} round_robin", None),
    "specialists-256": (MAIN, "--method usc --student-dim 256", None),
    "teachers": (MAIN, "--method teachers", None),
    "distill-8": (MAIN, "--method distill --distill-into-backbone", "specialists-256"),
    "distill-8-paper": (
        MAIN,
        "--method distill --distill-into-backbone --negatives domain",
        "specialists-256",
    ),
    "distill-1": (MAIN, "--method distill --distill-into-backbone", "teachers"),
    "specialists-256-twice": (MAIN, "--method usc --student-dim 256", None),
    "distill-8-twice": (MAIN, "--method distill --distill-into-backbone", "specialists-256-twice"),
    "udon-twice": (MAIN, "--epochs 12", None),
    "backbone": (1, "--method backbone", None),
    "usc-size": (SHORT, "--method usc --sampler size", None),
    "ujc-size": (SHORT, "--method ujc --sampler size", None),
    "specialists-64": (SHORT, "--method usc --student-dim 64", None),
    "dynamic-teacher": (SHORT, "--sampler dynamic --signal teacher", None),
    "dynamic-student": (SHORT, "--sampler dynamic --signal student", None),
    "no-margin": (SHORT, "--domain-margin 0", None),
    "no-logit": (SHORT, "--weights 1 1 0 1", None),
    "no-relational": (SHORT, "--weights 1 1 1 0", None),
    "no-distillation": (SHORT, "--weights 1 1 0 0", None),
    "into-backbone": (SHORT, "--distill-into-backbone", None),
    "mlp-heads": (SHORT, "--head-layers 2", None),
    "student-32": (SHORT, "--student-dim 32", None),
    "student-128": (SHORT, "--student-dim 128", None),
    "teacher-64": (SHORT, "--teacher-dim 64", None),
    "teacher-512": (SHORT, "--teacher-dim 512", None),
    "zero-gradients": (SHORT, "--inactive-heads zero", None),
    "micro-usc-rr": (SHORT, "--model micro --method usc", None),
    "micro-udon": (SHORT, "--model micro", None),
}
# One setting of the default or of the published method changed, read on val; two seeds, of which the tables say how many are there.
FEW = 2
SETTINGS = {
    "backbone-lr-1e-4": "--backbone-lr 1e-4",
    "backbone-lr-1e-3": "--backbone-lr 1e-3",
    "head-lr-1e-3": "--head-lr 1e-3",
    "head-lr-1e-2": "--head-lr 1e-2",
    "frozen-0": "--frozen-epochs 0",
    "frozen-2": "--frozen-epochs 2",
    "cosine": "--schedule cosine",
    "scale-8": "--scale 8",
    "scale-32": "--scale 32",
    "temperature-0.05": "--temperature 0.05",
    "temperature-0.2": "--temperature 0.2",
    "relational-8": "--relational-scale 8",
    "relational-128": "--relational-scale 128",
    "batch-32": "--batch-size 32",
    "batch-128": "--batch-size 128",
    "domain-margin-0.1": "--domain-margin 0.1",
    "domain-margin-0.4": "--domain-margin 0.4",
    "crops-0.3": "--min-area 0.3",
    "paper-period-25": f"{PAPER} dynamic --period 25",
    "paper-period-400": f"{PAPER} dynamic --period 400",
    "paper-scale-32": f"{PAPER} round_robin --scale 32",
}
ROWS |= {row: (FEW, options, None) for row, options in SETTINGS.items()}
TIMES = {"specialists-256-twice": 2}


def config_of(row, **more):
    """The resolved configuration of a row, of its own options and `more`, where they say nothing."""
    given = vars(udon.command_line().parse_args(["train", *ROWS[row][1].split()]))
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    if teachers := ROWS[row][2]:
        given["teachers"] = teachers
    return udon.resolve(
        udon.Config(
            **{**more, **{name: given[name] for name in given if name not in ("command", "resume")}}
        )
    )


# Running ---------------------------------------------------------------------------------------------------------------------


def call(*arguments, log):
    """Runs a Python command line of the project on one thread, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.call(
            [sys.executable, *map(str, arguments)],
            stdout=file,
            stderr=file,
            env=environment,
            cwd=ROOT,
        )
    if code:
        raise data.InputError(
            f"{' '.join(map(str, arguments))} ended with status {code}: mend what the end of {log} says, and "
            "start again, which goes on with what is there"
        )


def train(folder, options):
    """The finished run in `folder`: trained, gone on with, or found."""
    if not (folder / "test.json").exists():
        arguments = ["--resume"] if (folder / "last.pt").exists() else options
        call("udon.py", "train", "--out", folder, *arguments, log=folder.with_suffix(".log"))
    return json.loads((folder / "test.json").read_text())


class Grid:
    """The rows on one data folder. `run(row, seed)` is the one entry; what other rows need is trained once."""

    def __init__(self, options):
        self.options, self.domains = options, data.Benchmark(options.data).domains
        self.locks, self.lock = {}, threading.Lock()

    def command(self, row, seed):
        command = [
            "--data",
            self.options.data,
            "--seed",
            seed,
            "--workers",
            0,
            *ROWS[row][1].split(),
        ]
        if teachers := ROWS[row][2]:
            of = self.options.runs / teachers / f"seed{seed}"
            command += ["--teachers", of if teachers.startswith("specialists") else of / "best.pt"]
        return command

    def runs(self, row, seed):
        """Folder, and {name: test.json} of the runs that make up one row with one seed."""
        with self.lock:
            lock = self.locks.setdefault((row, seed), threading.Lock())
        with lock:
            folder, command = self.options.runs / row / f"seed{seed}", self.command(row, seed)
            if row.startswith("specialists"):
                share = {domain: self.share(domain, TIMES.get(row, 1)) for domain in self.domains}
                return folder, {
                    domain: train(folder / domain, [*command, "--domains", domain, *share[domain]])
                    for domain in self.domains
                }
            if teachers := ROWS[row][2]:
                self.runs(teachers, seed)
            return folder, {row: train(folder, command)}

    def share(self, domain, times=1):
        """Options that give the specialist of one domain its part of a row's steps, of the frozen ones and of validations, or so
        many times as much."""
        config, parts = udon.resolve(udon.Config()), len(self.domains)
        splits = {d: data.Benchmark(self.options.data).split(d, "train") for d in self.domains}
        run = udon.Run.of(config, splits, None)
        epoch = udon.Run.of(config, {domain: splits[domain]}, None).steps_per_epoch
        return [
            "--steps",
            times * run.steps // parts,
            "--frozen-epochs",
            times * run.frozen_steps / parts / epoch,
            "--val-every",
            max(1, times * run.steps_per_epoch // parts),
        ]

    def run(self, row, seed):
        target = self.options.results / row / f"seed{seed}.json"
        if target.exists():
            return
        print(f"{time.strftime('%H:%M:%S')} {row} seed {seed}", flush=True)
        folder, parts = self.runs(row, seed)
        result = {
            "row": row,
            "seed": seed,
            "command": " ".join(map(str, ["python udon.py train", *self.command(row, seed)])),
            **combined(parts),
            "further": {},
        }
        if not row.startswith("specialists"):
            result["config"] = json.loads((folder / "config.json").read_text())
            further = (
                [("student", "separate"), ("backbone", "merged")]
                if ROWS[row][0] == MAIN and row != "teachers"
                else []
            )
            if further and result["method"] == "udon":
                further.append(("teacher", "separate"))
            for embedding, index in further:
                file = folder / f"{embedding}-{index}.json"
                call(
                    "evaluate.py",
                    folder / "best.pt",
                    "--embedding",
                    embedding,
                    "--index",
                    index,
                    "--json",
                    file,
                    log=folder.with_suffix(".log"),
                )
                measured = json.loads(file.read_text())
                result["further"][f"{embedding}-{index}"] = {
                    "mean": measured["mean"],
                    "domains": measured["domains"],
                }
        result |= {
            "version": version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, one thread a run",
            "date": time.strftime("%Y-%m-%d"),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".partial").write_text(
            relative(json.dumps(result, indent=1), self.options.data) + "\n"
        )
        os.replace(target.with_suffix(".partial"), target)
        print(
            f"{time.strftime('%H:%M:%S')} {row} seed {seed}: R@1 {100 * result['mean']['recall_at_1']:.2f}",
            flush=True,
        )


def relative(text, root):
    """Without the folders of this machine."""
    return text.replace(root, Path(root).name).replace(f"{ROOT}{os.sep}", "")


def combined(parts):
    """One result of the runs of one row: itself, or the specialists' domains side by side."""
    if len(parts) == 1:
        (result,) = parts.values()
        return {key: value for key, value in result.items() if key != "untrained"} | {
            "untrained": result["untrained"]["mean"]
        }
    domains = {domain: result["domains"][domain] for domain, result in parts.items()}
    mean = {metric: statistics.fmean(row[metric] for row in domains.values()) for metric in METRICS}
    return {
        "mean": mean,
        "domains": domains,
        "index": "separate",
        "embedding": "student",
        "method": "specialists",
        "parameters": {
            name: sum(r["parameters"][name] for r in parts.values())
            for name in ("trained", "inference")
        },
        "images": {domain: r["images"][domain] for domain, r in parts.items()},
        "seconds": sum(r["seconds"] for r in parts.values()),
        "cpu_seconds": sum(r["cpu_seconds"] for r in parts.values()),
    }


def version():
    """The commit of the code, marked where files differ from it."""
    git = lambda *arguments: subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    return git("rev-parse", "--short=10", "HEAD") + (
        "+" if git("status", "--porcelain", "*.py") else ""
    )


# Tables ----------------------------------------------------------------------------------------------------------------------


def within(t, freedom):
    """P(|T| <= t) of Student's t with `freedom` >= 1 degrees, in closed form (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for n in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (n - 1) / n * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def interval(values):
    """Half the width of the 95 % confidence interval of the mean (Student's t); infinite with one value."""
    if len(values) < 2:
        return math.inf
    low, high = 0.0, 1000.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, len(values) - 1) < 0.95 else (low, middle)
    return low * statistics.stdev(values) / math.sqrt(len(values))


def p_value(differences):
    """Two-sided p of a paired t-test: that the mean difference is 0."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return (
        0.0
        if spread == 0
        else 1 - within(abs(statistics.fmean(differences)) / spread, len(differences) - 1)
    )


def read(folder):
    """{row: {seed: result}} of all finished runs. Raises data.InputError for a file that is no result, and without the baseline."""
    found = {}
    for file in sorted(Path(folder).glob("*/seed*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            [result[name] for name in ("mean", "domains", "further", "parameters")]
            found.setdefault(result["row"], {})[result["seed"]] = result
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise data.InputError(
                f"{file} is no result of a run ({type(error).__name__}: {error}): delete it, and train its row "
                "again"
            ) from None
    if BASELINE not in found:
        raise data.InputError(
            f"--results {folder} holds no result of {BASELINE}, which the tables compare with: train that row, "
            "or give another folder"
        )
    return found


def read_times(path):
    """{row: {"to_usc": ratio, "frozen_to_usc": ratio}} of what step_overhead.py wrote. Raises data.InputError for another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            row: {name: float(times[name]) for name in ("to_usc", "frozen_to_usc")}
            for row, times in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.InputError(
            f"--times {path} is no result of step_overhead.py ({type(error).__name__}: {error}): write it by "
            "python benchmarks/step_overhead.py"
        ) from None


def shown(values):
    values = [100 * value for value in values]
    return f"{statistics.fmean(values):.1f}" + (
        f" ± {interval(values):.1f}" if len(values) > 1 else ""
    )


def difference(results, row, other, pick):
    """Mean difference of two rows over the seeds that both have, and its p-value, as text."""
    seeds = sorted(results[row].keys() & results.get(other, {}).keys())
    pairs = [100 * (pick(results[row][seed]) - pick(results[other][seed])) for seed in seeds]
    if row == other or len(pairs) < 2:
        return "" if row == other or not pairs else f"{pairs[0]:+.1f}"
    p = p_value(pairs)
    return f"{statistics.fmean(pairs):+.1f} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}'})"


def first_of(runs):
    return next(iter(runs.values()))


def millions(number):
    return f"{number / 1e6:.2f}"


LABELS = {
    "backbone": "backbone as pre-trained, full width",
    "usc-rr": "USC, round robin",
    "usc-size": "USC, by size",
    "ujc-rr": "UJC, round robin",
    "ujc-size": "UJC, by size",
    "ujc-margin": "UJC with UDON's domain margin",
    "distill-8": "distilled from 8 separate teachers",
    "distill-8-twice": "the same, teachers trained twice as long",
    "distill-8-paper": "the same, negatives as published",
    "distill-1": "distilled from 1 separate teacher model",
    "udon-paper": "UDON as published",
    "udon-paper-rr": "UDON as published, round robin",
    "udon": "**UDON, the default of `mini`**",
    "udon-twice": "UDON trained twice as long",
}
SYSTEMS = (
    "backbone",
    "usc-rr",
    "usc-size",
    "ujc-rr",
    "ujc-size",
    "ujc-margin",
    "distill-8",
    "distill-8-twice",
    "distill-8-paper",
    "distill-1",
    "udon-paper-rr",
    "udon-paper",
    "udon",
    "udon-twice",
)


def time_of(times, row):
    """Time of a row's training, its teachers' included, by that of usc on the images of a row, its backbone trained throughout; NaN
    where it was not measured."""
    if row not in times:
        return math.nan
    config = config_of(row)
    frozen = config.frozen_epochs / config.epochs
    own = (1 - frozen) * times[row]["to_usc"] + frozen * times[row]["frozen_to_usc"]
    own *= TIMES.get(row, 1) * config.epochs / udon.Config.epochs
    return own + (time_of(times, ROWS[row][2]) if ROWS[row][2] else 0)


def ratio_or_nothing(ratio):
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


TRIED = {  # not kept: row -> what it was, and the row that it changed
    "paper-relative": ("as published, sampler signal: the teacher's loss / ln C", "udon-paper"),
    "dynamic-relative": ("dynamic sampler, signal: the teacher's loss / ln C", "udon"),
    "decoupled-logit": (
        "decoupled logit distillation (arXiv:2203.08679), target + 2 x others",
        "udon",
    ),
    "relational-memory": ("relations to the domain's last 256 embeddings too", "udon"),
    "mean-teacher": ("teachers from a running mean of the network, decay 0.99", "udon"),
}


def pick(metric):
    return lambda result: result["mean"][metric]


def line(results, times, row, others=(BASELINE,)):
    """One row of a table of systems, beside other rows."""
    runs = results[row]
    first = first_of(runs)
    metrics = [shown(list(map(pick(metric), runs.values()))) for metric in METRICS]
    gains = [
        difference(results, row, other, pick(metric)) for other in others for metric in METRICS
    ]
    ratio = ratio_or_nothing(time_of(times, row) / time_of(times, BASELINE))
    return (
        "| "
        + " | ".join(
            [
                LABELS.get(row, f"`{row}`"),
                *metrics,
                *gains,
                millions(first["parameters"]["trained"]),
                millions(first["parameters"]["inference"]),
                ratio,
                str(len(runs)),
            ]
        )
        + " |"
    )


def changes(results, heading, rows):
    """A table of rows, {row: (label, the row that it changes)}, each beside the row that it changes; nothing without rows."""
    if not rows:
        return []
    text = [
        "",
        heading,
        "",
        "| change | row | R@1 | mMP@5 | val R@1 − row | R@1 − row | mMP@5 − row | n |",
        "|---" * 8 + "|",
    ]
    for row, (label, base) in rows.items():
        cells = [shown(list(map(pick(metric), results[row].values()))) for metric in METRICS]
        cells += [
            difference(results, row, base, of)
            for of in (lambda result: result["val_recall_at_1"], *map(pick, METRICS))
        ]
        text.append(
            f"| {label} | {LABELS[base].replace('*', '')} | {' | '.join(cells)} | {len(results[row])} |"
        )
    return text


METRICS = ("recall_at_1", "mmp_at_5")
HEADING = (
    "| system | R@1 | mMP@5 | R@1 − USC | mMP@5 − USC | trained, M | kept, M | time | n |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def tables(results, times):
    """The README's tables as one text; `times`: "rows" of what step_overhead.py wrote."""
    text = [HEADING, *(line(results, times, row) for row in SYSTEMS if row in results)]
    compared = [row for row in ("udon", "udon-twice", "udon-paper-rr") if row in results]
    text += [
        "",
        "UDON against each, paired by seed, and its time in the other's:",
        "",
        "| UDON − | "
        + " | ".join(f"{LABELS[row].replace('*', '')}: R@1 | mMP@5 | time" for row in compared)
        + " |",
        "|---" * (3 * len(compared) + 1) + "|",
    ]
    for other in (row for row in SYSTEMS if row in results and row not in ("udon", "backbone")):
        cells = [
            cell
            for row in compared
            for cell in (
                *(difference(results, row, other, pick(metric)) for metric in METRICS),
                ""
                if row == other
                else ratio_or_nothing(time_of(times, row) / time_of(times, other)),
            )
        ]
        text.append(f"| {LABELS[other]} | " + " | ".join(cells) + " |")
    others = [
        row
        for row in ROWS
        if row in results
        and row not in SYSTEMS
        and row not in SETTINGS
        and not row.startswith(("specialists", "teachers"))
    ]
    if others:
        heading = HEADING.replace("| trained", "| R@1 − UDON | mMP@5 − UDON | trained").replace(
            "---|---|", "---|---|---|---|", 1
        )
        text += [
            "",
            "Variations of UDON, the default of `mini`:",
            "",
            heading,
            *(line(results, times, row, (BASELINE, "udon")) for row in others),
        ]
    text += changes(
        results,
        "One setting changed, and the difference to the row changed:",
        {
            row: (
                f"`{' '.join(options.split()[-2:])}`",
                "udon"
                if not options.startswith(PAPER)
                else "udon-paper"
                if "dynamic" in options
                else "udon-paper-rr",
            )
            for row, options in SETTINGS.items()
            if row in results
        },
    )
    text += changes(
        results,
        "Tried and not kept, by the version that the results name:",
        {row: TRIED.get(row, (f"`{row}`", "udon")) for row in sorted(results.keys() - ROWS.keys())},
    )
    oracle = [
        ("specialists-64", None, "8 specialists, 64-d"),
        ("specialists-256", None, "8 specialists, 256-d: 8 separate teachers"),
        ("specialists-256-twice", None, "the same, trained twice as long"),
        ("teachers", None, "1 separate teacher model"),
        ("udon", "teacher-separate", "UDON's teachers"),
        ("udon", "student-separate", "UDON's student"),
        ("usc-rr", "student-separate", "USC's student"),
    ]
    text += [
        "",
        "Each query in its own domain's index (oracle):",
        "",
        "| embedding | R@1 | mMP@5 | n |",
        "|---|---|---|---|",
    ]
    for row, further, label in oracle:
        if row in results:
            means = [
                run["further"][further]["mean"] if further else run["mean"]
                for run in results[row].values()
            ]
            text.append(
                f"| {label} | "
                + " | ".join(shown([m[metric] for m in means]) for metric in METRICS)
                + f" | {len(means)} |"
            )
    shownrows = [row for row in SYSTEMS if row in results and not row.endswith("-size")]
    domains = list(first_of(results[BASELINE])["domains"])
    text += [
        "",
        "R@1 of each domain, merged index:",
        "",
        "| system | " + " | ".join(domains) + " |",
        "|---" * (len(domains) + 1) + "|",
    ]
    for row in shownrows:
        cells = [
            shown([run["domains"][domain]["recall_at_1"] for run in results[row].values()])
            for domain in domains
        ]
        text.append(f"| {LABELS[row]} | " + " | ".join(cells) + " |")
    if {"udon-paper", "udon-paper-rr"} <= results.keys():
        text += [
            "",
            "The dynamic sampler: thousands of images given to each domain, its weights, and what it gains.",
            "",
            "| | " + " | ".join(domains) + " |",
            "|---" * (len(domains) + 1) + "|",
        ]
        for row in ("udon-paper-rr", "udon-paper"):
            images = [
                statistics.fmean(run["images"][d] for run in results[row].values()) / 1000
                for d in domains
            ]
            text.append(
                f"| images, {LABELS[row]} | "
                + " | ".join(f"{count:.1f}" for count in images)
                + " |"
            )
        for step in first_of(results["udon-paper"])["sampler_weights"]:
            weights = [run["sampler_weights"][step] for run in results["udon-paper"].values()]
            text.append(
                f"| weight after step {step}, % | "
                + " | ".join(
                    f"{100 * statistics.fmean(w[d] for w in weights):.1f}" for d in domains
                )
                + " |"
            )
        for metric, name in (("recall_at_1", "R@1"), ("mmp_at_5", "mMP@5")):
            gains = [
                difference(
                    results, "udon-paper", "udon-paper-rr", lambda run: run["domains"][d][metric]
                )
                for d in domains
            ]
            text.append(f"| {name} − round robin | " + " | ".join(gains) + " |")
    return "\n".join(text) + "\n"


def main():
    parser = evaluate.Parser(
        description="Trains the rows of the ablation that are missing, or writes the tables."
    )
    parser.add_argument("--data", help="data folder of all rows")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="only these"
    )
    parser.add_argument("--seeds", type=positive, help="at most so many seeds of each row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument(
        "--times",
        type=Path,
        default=ROOT / "results" / "step_times.json",
        help="what step_overhead.py wrote, for the tables (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=RUNS,
        help="folder of logs and checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--at-once", type=int, choices=(1, 2), default=2, help="runs at the same time (default: 2)"
    )
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="README",
        help="write the tables into this file, between its marks, and train nothing",
    )
    options = parser.parse_args()
    if options.tables:
        try:
            fill(
                options.tables,
                "ablation",
                lambda: tables(read(options.results), read_times(options.times)),
            )
        except data.InputError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        except ValueError as error:
            parser.error(f"--tables {error}")
        return
    if not options.data:
        parser.error("--data is missing: give the folder that the rows are trained on")
    options.data = str(Path(options.data).resolve())
    options.results, options.runs = options.results.resolve(), options.runs.resolve()
    try:
        grid = Grid(options)
    except data.InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for name in ("results", "runs"):
        folder = getattr(options, name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(
                f"--{name} {folder} cannot be made ({error.strerror}): give another folder"
            )
    jobs = [
        (row, seed)
        for row in options.rows
        for seed in range(min(ROWS[row][0], options.seeds or MAIN))
    ]
    jobs.sort(
        key=lambda job: (ROWS[job[0]][0] != MAIN, job[1])
    )  # seed by seed, the main rows first
    failed = []

    def run(row, seed):
        try:
            if not failed:  # what has not begun when a run fails is not begun at all
                grid.run(row, seed)
        except BaseException as error:
            failed.append(error)
            if failed[0] is error and isinstance(
                error, data.InputError
            ):  # said at once: what runs beside it may take hours
                print(f"{parser.prog}: {error}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        for job in jobs:
            pool.submit(run, *job)
    if failed:
        raise SystemExit(2) if isinstance(failed[0], data.InputError) else failed[0]


if __name__ == "__main__":
    main()
