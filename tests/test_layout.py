"""The house: files import as a tree, leaves stand alone, nothing touches a device at import, the README tells the truth."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"udon", "model", "pretrained", "losses", "sampler", "data", "evaluate", "kernels"}
IMPORTS = {"model": set(), "losses": set(), "sampler": set(), "data": set(), "pretrained": set(), "evaluate": {"data", "kernels", "model"},
           "udon": {"data", "evaluate", "pretrained", "losses", "model", "sampler"}}
NEEDS = {"model": {"torch"}, "losses": {"torch"}, "sampler": {"numpy"}, "data": {"torch", "numpy", "PIL"},
         "pretrained": {"torch", "numpy", "safetensors"}, "evaluate": {"torch", "numpy"}, "udon": {"torch"}}


def imported(file):
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_form_the_documented_tree(name):
    names = imported(ROOT / f"{name}.py")
    assert names & OURS == IMPORTS[name]
    assert names - OURS - set(sys.stdlib_module_names) == NEEDS[name]


@pytest.mark.parametrize("name", [name for name, ours in IMPORTS.items() if not ours] + ["kernels"])
def test_a_file_copied_alone_imports(tmp_path, name):
    source, target = (ROOT / name, tmp_path / name) if name == "kernels" else (ROOT / f"{name}.py", tmp_path / f"{name}.py")
    for file in source.glob("*.py") if source.is_dir() else [source]:
        (target / file.name if source.is_dir() else target).parent.mkdir(exist_ok=True)
        (target / file.name if source.is_dir() else target).write_text(file.read_text())
    subprocess.run([sys.executable, "-c", f"import {name}, torch; assert not torch.cuda.is_initialized()"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")) + sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_every_file_says_what_it_is_and_is_narrow(file):
    text = file.read_text()
    assert ast.get_docstring(ast.parse(text)), "line 1 is the docstring"
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 140]
    assert not long, f"lines over 140 characters: {long}"
