"""The layout: which file imports which, files copied alone, sizes, what is packaged."""

import ast
import functools
import os
import re
import shutil
import sys
import tomllib
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
IMPORTS = {  # of our own files; a file may import no others
    "config": "",
    "distributed": "",
    "export": "",
    "images": "",
    "kernels": "",
    "losses": "",
    "model": "",
    "pretrained": "",
    "procedural": "",
    "sampler": "",
    "timm_backbone": "",
    "folders": "images",
    "large_classes": "losses",
    "data": "distributed folders images procedural",
    "checkpoint": "export model timm_backbone",
    "metrics": "kernels",
    "rundir": "checkpoint distributed model",
    "gallery": "data",
    "search": "checkpoint data folders gallery images kernels",
    "hubconf": "search",
    "plot": "data",
    "vectors": "folders images",
    "evaluate": "checkpoint data distributed gallery kernels metrics vectors",
    "features": "checkpoint data distributed model",
    "plan": "config data distributed features large_classes sampler",
    "flax_weights": "checkpoint model pretrained timm_backbone",
    "heads": "checkpoint data evaluate model",
    "run": "checkpoint config data distributed evaluate heads model pretrained rundir sampler",
    "udon": "checkpoint config data distributed evaluate features large_classes losses model "
    "plan pretrained run rundir",
}
LONGEST_LINE, LONGEST_FUNCTION, README_LINES, KERNEL_LINES = 100, 60, 170, 700
PACKAGE_NAMES = {"PIL": "pillow"}  # where they differ from the names of modules
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")])
FILES += sorted(ROOT.glob("tests/*.py"))
NAMES = sorted([*(path.stem for path in ROOT.glob("*.py")), "kernels"])


def label(path):
    return str(path.relative_to(ROOT))


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


@functools.cache
def imported(name, everywhere=True):
    """The names of all modules that a file, or the files of a package, import; or only those that
    are imported where the file itself is."""
    path, names = ROOT / name, set()
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if everywhere else tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names


def needed(name):
    """A file and all of ours that it imports, directly or not."""
    names, pending = set(), [name]
    while pending:
        one = pending.pop()
        if one not in names:
            names.add(one)
            pending.extend(imported(one) & set(NAMES))
    return names


# Imports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_what_the_layout_allows(name):
    assert name in IMPORTS, "a new file: add what it may import"
    assert imported(name) & set(NAMES) - {name} <= set(IMPORTS[name].split())


def test_no_file_needs_itself():
    order = list(IMPORTS)
    for number, name in enumerate(order):
        assert set(IMPORTS[name].split()) <= set(order[:number]), name


def refuse(*_, **__):
    raise AssertionError("a device is queried at import")


def import_alone(directory, name):
    """Imports a copy in this process, a fork, in which no device may be queried."""
    for function in ("is_available", "is_initialized", "device_count", "current_device", "init"):
        setattr(torch.cuda, function, refuse)
    for module in [module for module in sys.modules if module.split(".")[0] in NAMES]:
        del sys.modules[module]
    sys.path[:] = [str(directory), *(path for path in sys.path if Path(path or ".") != ROOT)]
    os.chdir(directory)
    assert directory in Path(__import__(name).__file__).parents


@pytest.mark.parametrize("name", NAMES)
def test_a_file_copied_with_what_it_needs_can_be_imported(tmp_path, name):
    for one in needed(name):
        if (ROOT / one).is_dir():
            shutil.copytree(ROOT / one, tmp_path / one)
        else:
            shutil.copy(ROOT / f"{one}.py", tmp_path)
    process = os.fork()
    if not process:
        try:
            import_alone(tmp_path, name)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"kernels", "run", "udon"}))
def test_the_docstring_says_what_a_file_is_copied_with(name):
    """All other files of ours, and all packages, that it or these import."""
    docstring = " ".join(ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())).split())
    sentence = docstring.lower().partition("copy with: ")[2]
    modules = needed(name).union(*(imported(one, everywhere=False) for one in needed(name)))
    modules -= {name, *sys.stdlib_module_names}
    packages = {PACKAGE_NAMES.get(module, module) for module in modules}
    packages.discard("triton")  # on a GPU only
    missing = {package for package in packages if not re.search(rf"\b{package}\b", sentence)}
    assert not missing, f"not in its sentence: {sentence!r}"


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_has_a_docstring_narrow_lines_and_short_functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    wide = [i for i, line in enumerate(lines_of(path), 1) if len(line) > LONGEST_LINE]
    assert not wide, f"lines over {LONGEST_LINE} columns: {wide}"
    if path.parent.name != "kernels":
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
        long = {name: size for name, size in sizes.items() if size > LONGEST_FUNCTION}
        assert not long, f"functions over {LONGEST_FUNCTION} lines: {long}"


def test_the_kernels_stay_small():
    sizes = {label(path): len(lines_of(path)) for path in ROOT.glob("kernels/*.py")}
    assert sum(sizes.values()) <= KERNEL_LINES, sizes


def test_the_readme_stays_short_and_names_existing_files():
    text = lines_of(ROOT / "README.md")
    assert len(text) <= README_LINES
    rows = re.findall(r"^\| `([\w./]+)` \|", "\n".join(text), re.MULTILINE)
    assert rows and all((ROOT / name).exists() for name in rows), rows


def test_links_to_functions_lead_to_their_lines():
    """[`name`](file.py#L10): line 10 defines the function or class."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text)
    assert len(links) >= 5
    wrong = {}
    for name, file, line in links:
        starts = [f"def {name}(", f"class {name}(", f"class {name}:"]
        lines = [line.strip() for line in lines_of(ROOT / file)]
        found = [i for i, code in enumerate(lines, 1) if code.startswith(tuple(starts))]
        if int(line) not in found:
            wrong[f"{file} {name}"] = f"L{line} in README.md, defined in line {found}"
    assert not wrong, wrong


# Packaging ----------------------------------------------------------------------------------------


def test_every_file_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["py-modules"]) | set(settings["packages"]) == set(NAMES)
