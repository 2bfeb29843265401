"""hubconf.py: torch.hub loads the student into a program with modules of our names."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hubconf
import search
from checkpoint import CheckpointError

ROOT = Path(__file__).parents[1]
PROGRAM = """
import data  # of the program
import numpy, sys, torch
from PIL import Image

model, preprocess = torch.hub.load({root!r}, "udon", source="local", checkpoint={run!r})
numpy.save("vectors.npy", model.embed(preprocess(Image.open("a.png"))).detach().numpy())
import model as other

assert (data.name, other.name) == ("mine", "mine, too")
assert sys.modules["data"] is data and "search" not in sys.modules
"""


def test_the_student_in_another_program(student_run, class_folders, tmp_path):
    (tmp_path / "data.py").write_text("name = 'mine'")
    (tmp_path / "model.py").write_text("name = 'mine, too'")
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT), run=str(student_run)))
    photo = next(class_folders.glob("plants/*/*.jpg"))
    (tmp_path / "a.png").write_bytes(photo.read_bytes())
    line = [sys.executable, "program.py"]
    finished = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stderr
    expected = search.Embedder(student_run).embed([photo])
    assert np.abs(np.load(tmp_path / "vectors.npy") - expected).max() < 1e-6


def test_the_student_that_comes_with_the_project():
    if not (ROOT / "weights" / "student.pt").exists():
        with pytest.raises(ValueError, match="weights/student.pt does not exist"):
            hubconf.udon()
        pytest.skip("no weights/student.pt")
    model, preprocess = hubconf.udon()
    vector = model.embed(preprocess(np.zeros((60, 80, 3), np.uint8)))
    assert vector.shape == (1, 64) and abs(vector.norm().item() - 1) < 1e-5


def test_a_checkpoint_that_is_missing_is_named_and_nothing_stays_imported(tmp_path):
    before = dict(sys.modules)
    with pytest.raises(ValueError, match="no.pt does not exist") as error:
        hubconf.udon(tmp_path / "no.pt")
    assert type(error.value) is not CheckpointError, "the program's modules were used"
    assert all(sys.modules[name] is module for name, module in before.items())
