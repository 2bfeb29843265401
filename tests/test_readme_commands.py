"""Every command of the READMEs: its arguments are accepted, and a test runs it or says why not."""

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "results/README.md", "weights/README.md", "kernels/README.md")
FILES += ("CONTRIBUTING.md", "results/scaling.md")
LONG = "trains or measures for minutes to days: "

# Beginning and options of commands -> the test that runs them at a small size, or the reason why
# none does. The longest entry that fits a command counts.
RUN = {
    "python udon.py train": "test_command_lines.py test_training_ends_with_the_table",
    "python udon.py train --resume": "test_command_lines.py test_a_finished_run_can_be_resumed",
    "python udon.py train --help": "test_command_lines.py test_help",
    "python udon.py train --init": "test_udon.py test_a_trained_run_is_continued_with_its_heads",
    "python udon.py train --dry-run": "test_plan.py "
    "test_a_dry_run_projects_the_time_and_writes_nothing",
    "python udon.py train --model timm:": "test_interop.py test_a_run_with_a_timm_model",
    "torchrun": "test_distributed.py test_a_run_of_two_processes_equals_one",
    "python data.py check": "test_data.py test_check_of_good_data",
    "python evaluate.py": "test_evaluate.py test_several_checkpoints_side_by_side",
    "python evaluate.py --gallery": "test_gallery.py "
    "test_files_of_any_name_are_in_the_csv_file_and_on_the_page",
    "python evaluate.py --embedding teacher": "test_command_lines.py test_embeddings_and_indexes",
    "python plot.py": "test_plot.py test_files",
    "python search.py embed": "test_search.py test_the_index_of_a_directory",
    "python search.py find": "test_search.py test_find_equals_brute_force",
    "python search.py label": "test_search.py test_labels_equal_a_vote_by_brute_force",
    "python checkpoint.py export": "test_export.py test_the_command",
    "python pretrained.py": "test_command_lines.py test_weights_are_not_written_onto_a_directory",
    "python -m benchmarks.ablation": "test_ablation.py test_results_of_a_grid_and_its_resumption",
    "python -m benchmarks.added_domain": "test_benchmarks.py test_a_domain_is_added",
    "python -m benchmarks.start": "test_benchmarks.py test_random_starts_beside_those_from_images",
    "python -m benchmarks.defaults": "test_benchmarks.py "
    "test_defaults_beside_the_start_of_training",
    "python -m benchmarks.choice": "test_benchmarks.py "
    "test_settings_are_chosen_on_one_half_and_judged_on_the_other",
    "python -m benchmarks.pretraining": "test_benchmarks.py test_pretraining",
    "python -m benchmarks.frozen": "test_benchmarks.py test_frozen_and_fine_tuned_backbones",
    "python -m benchmarks.procedural": "test_benchmarks.py test_procedural_table",
    "python -m benchmarks.step_overhead": "test_benchmarks.py test_step_overhead",
    "python -m benchmarks.embedding": "test_benchmarks.py test_embedding",
    "python -m benchmarks.loader": "test_benchmarks.py test_loader",
    "python -m benchmarks.topk": "test_benchmarks.py test_topk_measures_and_keeps_other_rows",
    "python -m benchmarks.principal_axes": "test_benchmarks.py test_principal_axes",
    "python -m benchmarks.uned_size": "test_uned_size.py test_a_small_run",
    "python -m benchmarks.faults --table": "test_faults.py test_table_has_a_row_for_each_kind",
}
NOT_RUN = {
    "python -m pytest": "this is it",
    "pip": "needs a download; the extras that it names are checked",
    "ruff": "a check of the sources, not part of the tests",
    "python udon.py train --preset uned-b16 --init B_16.npz": "needs a download",
    "python udon.py train --method distill": LONG + "test_udon.py has its parts",
    "python -m benchmarks.faults": LONG + "its results are tested",
    "python -m benchmarks.jax_step": LONG + "test_interop.py has its parts",
    "python -m benchmarks.one_step": LONG + "test_results.py compares its table",
    "python -m benchmarks.equivalence": LONG + "test_distributed.py has its parts",
    "python -m benchmarks.scaling": LONG + "test_benchmarks.py has its parts",
    "python -m benchmarks.topk_gpu": "needs a GPU",
}
PROGRAM = re.compile(r"(\w+=\S+ )?(python|pip|torchrun|ruff) ")


class Parsed(BaseException):
    """The arguments were accepted."""


def commands_of(text):
    """The commands in blocks without a language, and those in `code`."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in [*lines, *re.findall(r"`([^`\n]+)`", rest)]]
    return [" ".join(line.split()) for line in lines if PROGRAM.match(line)]


def all_commands():
    found = [c for name in FILES for c in commands_of((ROOT / name).read_text(encoding="utf-8"))]
    return [c for c in dict.fromkeys(found) if "NAME.py" not in c and "benchmarks.NAME" not in c]


COMMANDS = all_commands()


def entry(command):
    """The longest entry that fits: it starts the command, which has its options, in any order."""
    command = re.sub(r"^\w+=\S+ ", "", command)

    def fits(pattern):
        head, _, options = pattern.partition(" --")
        words = [f"--{option}" for option in options.split(" --") if option]
        starts = f"{command} ".startswith(head if head[-1] == ":" else f"{head} ")
        return starts and all(word in command for word in words)

    return max(filter(fits, [*RUN, *NOT_RUN]), key=len, default=None)


def test_commands_are_found():
    assert len(COMMANDS) >= 50
    assert {entry(command) for command in COMMANDS} == {*RUN, *NOT_RUN}, "an entry without command"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_run_by_a_test_or_marked_with_why_not(command):
    name = entry(command)
    assert name, "add the test that runs it, or the reason why none does"
    if name in RUN:
        file, function = RUN[name].split()
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {function}(" in source


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py " in c or "benchmarks." in c])
def test_the_arguments_of_a_command_are_accepted(command, monkeypatch):
    """By its own parser; nothing after it is run."""
    words = shlex.split(re.sub(r" \.\.\.|\.\.\.$", "", command).replace("$s", "0"))
    start = next(i for i, word in enumerate(words) if re.search(r"\.py$|^benchmarks\.", word))
    module = importlib.import_module(words[start].removesuffix(".py"))
    arguments = words[start + 1 :]
    if module.__name__ == "pretrained":  # two files and no options
        assert len(arguments) == 2
        return
    original = argparse.ArgumentParser.parse_args

    def parse(self, *given):
        original(self, *given)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [words[start], *arguments])
    takes = module.main.__code__.co_argcount
    is_help = "--help" in arguments
    with pytest.raises(SystemExit if is_help else Parsed) as ended:
        module.main(*[arguments][:takes])
    assert not is_help or not ended.value.code


def test_extras_of_the_commands_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = [names for c in COMMANDS for names in re.findall(r"\.\[([\w,]+)\]", c)]
    assert named and {name for names in named for name in names.split(",")} <= extras.keys()
