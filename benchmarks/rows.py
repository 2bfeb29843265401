"""The rows of the ablation: each a name, a number of seeds and options of `python udon.py train`.

    SYSTEMS       {row: Row}: the systems of the paper and ours, in the order of the tables
    TEACHERS      {row: Row}: frozen teachers of the distilled students
    VARIATIONS    {row: Row}: one component of udon-joint, or the model, changed
    SETTINGS      {row: Row}: one setting changed
    TRIED         {row: (description, base row)}: results of code that is not part of the project
    START         further options of all rows
    config_of     the Config of a row

A variation or a setting is named after the row that it changes: udon-rr-scale-32 changes udon-rr.
"""

import functools
from typing import NamedTuple

import config
import udon
from config import Config

MAIN_SEEDS, SEEDS, SETTING_SEEDS = 5, 3, 2
# The defaults and the compact weights of the time; for those of now see benchmarks/defaults.py.
WEIGHTS = "weights/mini_22_epochs.pt"
SCHEDULE = (
    f"--init {WEIGHTS} --batch-size 64 --min-steps 0 --backbone-lr 3e-4 --schedule constant "
    "--warmup-steps 0 --ema 0"
)
UDON_JOINT = "--method udon-joint --sampler round_robin"
START = f"--student-init lecun --frozen-epochs 1 {SCHEDULE}"
BASELINE = "usc"


class Row(NamedTuple):
    """One system or setting.

    seeds     number of runs, with the seeds 0, 1, ...
    options   of `python udon.py train`; the preset is mini unless they name another
    about     description, for the table of systems
    teachers  the row whose runs are the frozen teachers
    base      the row that this one changes
    length    training images as a multiple of those of most rows; only specialists need it, whose
              length is not an option of theirs but their domain's share
    """

    seeds: int
    options: str
    about: str = ""
    teachers: str | None = None
    base: str | None = None
    length: int = 1


# Distillation may train the backbone here: a distilled student has a backbone of its own.
DISTILL = "--method distill --distill-into-backbone"
JOINT = "--negatives all --domain-margin 0.2"
SPECIALISTS = "specialists-256"

SYSTEMS = {
    "backbone": Row(1, "--method backbone", "backbone as pre-trained, full width"),
    "usc": Row(MAIN_SEEDS, "--method usc", "USC: one student, a classifier per domain"),
    "usc-size": Row(SEEDS, "--method usc --sampler size", "USC, domains sampled by size"),
    "ujc": Row(MAIN_SEEDS, "--method ujc", "UJC: one student, one joint classifier"),
    "ujc-size": Row(SEEDS, "--method ujc --sampler size", "UJC, domains sampled by size"),
    "ujc-margin": Row(
        MAIN_SEEDS, "--method ujc --domain-margin 0.2", "UJC with the domain margin of udon-joint"
    ),
    "distill-8": Row(
        MAIN_SEEDS, DISTILL, "student distilled from 8 separate teachers", teachers=SPECIALISTS
    ),
    "distill-8-joint": Row(
        MAIN_SEEDS,
        f"{DISTILL} {JOINT}",
        "distill-8 with the negatives and margin of udon-joint",
        teachers=SPECIALISTS,
    ),
    "distill-8-joint-twice": Row(
        MAIN_SEEDS,
        f"{DISTILL} {JOINT}",
        "distill-8-joint, teachers trained twice as long",
        teachers=f"{SPECIALISTS}-twice",
    ),
    "distill-1-joint": Row(
        MAIN_SEEDS,
        f"{DISTILL} {JOINT}",
        "student distilled from one separate model with 8 teacher heads",
        teachers="teachers",
    ),
    "udon-rr": Row(
        MAIN_SEEDS, "--method udon --sampler round_robin", "UDON with round-robin sampling"
    ),
    "udon": Row(MAIN_SEEDS, "--method udon", "UDON as published"),
    "udon-joint": Row(MAIN_SEEDS, UDON_JOINT, "UDON, student over all domains (ours)"),
    "udon-joint-twice": Row(
        MAIN_SEEDS, f"{UDON_JOINT} --epochs 12", "udon-joint, trained twice as long"
    ),
}
TEACHERS = {
    "specialists-64": Row(SEEDS, "--method usc --student-dim 64", "8 specialists, 64-d"),
    SPECIALISTS: Row(
        MAIN_SEEDS, "--method usc --student-dim 256", "8 specialists, 256-d: 8 separate teachers"
    ),
    f"{SPECIALISTS}-twice": Row(
        MAIN_SEEDS,
        "--method usc --student-dim 256",
        "specialists-256, trained twice as long",
        length=2,
    ),
    "teachers": Row(MAIN_SEEDS, "--method teachers", "one separate model with 8 teacher heads"),
}
CHANGES = {
    "dynamic": "--sampler dynamic",
    "dynamic-student": "--sampler dynamic --signal student",
    "no-margin": "--domain-margin 0",
    "no-logit": "--weights 1 1 0 1",
    "no-relational": "--weights 1 1 1 0",
    "no-distillation": "--weights 1 1 0 0",
    "into-backbone": "--distill-into-backbone",
    "mlp-heads": "--head-layers 2",
    "student-32": "--student-dim 32",
    "student-128": "--student-dim 128",
    "teacher-64": "--teacher-dim 64",
    "teacher-512": "--teacher-dim 512",
    "zero-gradients": "--inactive-heads zero",
}
VARIATIONS = {
    f"udon-joint-{name}": Row(SEEDS, f"{UDON_JOINT} {options}", base="udon-joint")
    for name, options in CHANGES.items()
} | {
    "micro-usc": Row(SEEDS, "--preset micro --init compact --method usc", base="udon-joint"),
    "micro-udon-joint": Row(
        SEEDS, f"--preset micro --init compact {UDON_JOINT}", base="udon-joint"
    ),
}
CHANGED_SETTINGS = {
    "udon-joint": (
        *("--backbone-lr 1e-4", "--backbone-lr 1e-3", "--head-lr 1e-3", "--head-lr 1e-2"),
        *("--frozen-epochs 0", "--frozen-epochs 2", "--schedule cosine", "--scale 8", "--scale 32"),
        *("--temperature 0.05", "--temperature 0.2"),
        *("--relational-scale 8", "--relational-scale 128", "--batch-size 32", "--batch-size 128"),
        *("--domain-margin 0.1", "--domain-margin 0.4", "--min-area 0.3"),
    ),
    "udon": ("--period 25", "--period 400"),
    "udon-rr": ("--scale 32",),
}
SETTINGS = {
    f"{base}-{setting[2:].replace(' ', '-')}": Row(
        SETTING_SEEDS, f"{SYSTEMS[base].options} {setting}", f"`{setting}`", base=base
    )
    for base, settings in CHANGED_SETTINGS.items()
    for setting in settings
}
ROWS = SYSTEMS | TEACHERS | VARIATIONS | SETTINGS

TRIED = {
    "udon-joint-decoupled-logit": (
        "decoupled logit distillation (arXiv:2203.08679), target + 2 x others",
        "udon-joint",
    ),
    "udon-joint-dynamic-relative": (
        "dynamic sampler that follows the teacher's loss / ln C",
        "udon-joint",
    ),
    "udon-joint-mean-teacher": (
        "teachers from a running mean of the network, decay 0.99",
        "udon-joint",
    ),
    "udon-joint-relational-memory": (
        "relational loss also against the domain's last 256 embeddings",
        "udon-joint",
    ),
    "udon-relative": ("dynamic sampler that follows the teacher's loss / ln C", "udon"),
}


def config_of(row: str, **defaults: object) -> Config:
    """The configuration of a row; `defaults` are options that the row does not set itself."""
    given = parsed(ROWS[row].options)
    if ROWS[row].teachers:
        given = given | {"teachers": ROWS[row].teachers}
    return config.configuration(parsed(START) | defaults | given, resume=False)


@functools.cache
def parsed(options: str) -> dict[str, object]:
    """{name: value} of command-line options."""
    given = vars(udon.command_line().parse_args(["train", *options.split()]))
    return {name: value for name, value in given.items() if name not in ("command", "resume")}
