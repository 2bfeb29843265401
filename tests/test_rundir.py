"""Directories of runs: one owner, files that agree, orderly ends, full disks, diverged weights."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import rundir
import udon
from benchmarks.faults import difference
from rundir import MetricsLog, RunError, run_directory

ROOT = Path(__file__).parents[1]
OPTIONS = "--preset micro --batch-size 4 --period 4 --workers 0 --device cpu"
OPTIONS = [*OPTIONS.split(), "--val-every", "4", "--save-every", "2", "--steps", "8"]


def train(*arguments):
    udon.main(["train", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    """The sentence with which a command line is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(*arguments)
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == 1, (end.value.code, stderr)
    return stderr


@pytest.fixture(scope="module")
def options(uned):
    return [*OPTIONS, "--data", uned]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(*options, "--out", out)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def rewritten(path, **changes):
    """Changes values of a checkpoint and gives it a new digest."""
    checkpoint.save(path, checkpoint.read(path) | changes)


# Names and locks ----------------------------------------------------------------------------------


def test_new_names_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "runs/now")
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(run_directory(None, False)) for _ in range(3)]
        assert sorted(map(str, paths)) == ["runs/now", "runs/now-2", "runs/now-3"]


def test_directory_of_a_failed_start_is_removed_again(tmp_path):
    (tmp_path / "kept").mkdir()
    for out in (tmp_path / "kept" / "a" / "b", tmp_path / "c"):
        with pytest.raises(KeyError), run_directory(out, False):
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_second_process_is_refused_until_the_first_ends(tmp_path):
    out = tmp_path / "run"
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with run_directory(out, False):
            os.write(write, b".")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        with pytest.raises(RunError, match=f"in use .*process {child} on {socket.gethostname()}"):
            run_directory(out, False).__enter__()
        assert (out / "owner").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with run_directory(out, False):  # the lock has ended with its process
        assert str(os.getpid()) in (out / "owner").read_text()
    assert not (out / "owner").exists()


def test_child_processes_do_not_keep_the_lock(tmp_path):
    read, write = os.pipe()
    with run_directory(tmp_path, False):
        child = os.fork()  # as a loader's worker, which may outlive its parent
        if not child:
            os.write(write, b".")
            time.sleep(60)
            os._exit(0)
        os.read(read, 1)
    try:
        with run_directory(tmp_path, False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["config.json", "best.pt", "test.json", "metrics.jsonl"])
def test_results_without_last_pt_are_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match=f"holds a run already .{name}.: give another"):
        run_directory(tmp_path, False).__enter__()
    with pytest.raises(RunError, match="no run to resume"):
        run_directory(tmp_path, True).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_run_killed_before_its_first_checkpoint_can_be_started_again(tmp_path):
    for name in ("metrics.jsonl", "last.pt.partial", "owner"):
        (tmp_path / name).touch()
    with run_directory(tmp_path, False):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "owner"]


def test_out_that_is_a_file_is_refused(tmp_path, options, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "file or belongs to another" in refusal(capsys, *options, "--out", out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_is_refused(tmp_path, options, capsys):
    tmp_path.chmod(0o500)
    assert "belongs to another" in refusal(capsys, *options, "--out", tmp_path / "run")


# What must agree before a run is resumed ----------------------------------------------------------


def write_lines(path, lines):
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("change", ["missing", "doubled", "shuffled", "cut", "edited", "deleted"])
def test_changed_metrics_are_found(copied, capsys, change):
    path = copied / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "missing": [*lines[:3], *lines[4:]],
        "doubled": [*lines[:3], *lines[2:]],
        "shuffled": [lines[1], lines[0], *lines[2:]],
        "cut": [*lines[:-1], lines[-1][:-5]],
        "edited": [lines[0].replace(b"1", b"2"), *lines[1:]],
        "deleted": [],
    }
    write_lines(path, changed[change])
    assert "metrics.jsonl does not begin" in refusal(capsys, "--out", copied, "--resume")


def test_lines_of_steps_that_are_repeated_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1})
    recorded = log.recorded()
    log.write({"step": 2})
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3')  # killed while writing
    log = MetricsLog(path, recorded)
    log.write({"step": 2.5})
    log.close()
    assert log.values() == [{"step": 1}, {"step": 2.5}]


def test_best_pt_of_another_run_or_step_is_found(copied, capsys):
    best = (copied / "best.pt").read_bytes()
    for changes in ({"run": "another"}, {"step": 3}):
        rewritten(copied / "best.pt", **changes)
        assert "best.pt is of step" in refusal(capsys, "--out", copied, "--resume")
        (copied / "best.pt").write_bytes(best)
    (copied / "best.pt").unlink()
    assert "best.pt does not exist" in refusal(capsys, "--out", copied, "--resume")
    (copied / "best.pt").write_bytes(best)
    (copied / "last.pt").write_bytes(best)
    assert "last.pt is a best.pt" in refusal(capsys, "--out", copied, "--resume")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {}},
        {"sampler": None},
        {"best": []},
        {"metrics": {"bytes": "1", "sha256": ""}},
        {"validated": "4"},
        {"config": {"data": None, "domains": None, "nonsense": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_states_that_no_run_writes_are_refused(copied, capsys, change):
    rewritten(copied / "last.pt", **change)
    refusal(capsys, "--out", copied, "--resume", "--steps", 9)


def test_moments_of_another_shape_are_refused(copied, capsys):
    optimizer = checkpoint.read(copied / "last.pt")["optimizer"]
    next(iter(optimizer["state"].values()))["exp_avg"] = torch.zeros(3)
    rewritten(copied / "last.pt", optimizer=optimizer)
    sentence = refusal(capsys, "--out", copied, "--resume", "--steps", 9)
    assert "last.pt holds no state of this run (exp_avg" in sentence


@pytest.mark.parametrize(
    "change",
    [
        {"head_lr": 0.5},
        {"seed": 1},
        {"weights": [1, 1, 1, 0.5]},
        {"head_lr": "fast"},
        {"nonsense": 1},
        {"batch_size": 10**400},
    ],
    ids=lambda change: f"{next(iter(change))} {str(*change.values())[:9]}",
)
def test_edited_configuration_is_named(copied, capsys, change):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    sentence = refusal(capsys, "--out", copied, "--resume")
    assert next(iter(change)) in sentence.replace("-", "_")


def test_configuration_is_restored_from_last_pt(copied):
    before = json.loads((copied / "config.json").read_text())
    (copied / "config.json").unlink()
    train("--out", copied, "--resume")
    assert json.loads((copied / "config.json").read_text()) == before | {"out": str(copied)}


def test_other_training_images_are_named(copied, uned, tmp_path, capsys):
    root = Path(shutil.copytree(uned, tmp_path / "data"))
    train("--out", copied, "--resume", "--data", root)  # the same images in another place
    manifest = root / "info_files" / "birds" / "train.json"
    entries = json.loads(manifest.read_text())
    entries[0]["class_id"], entries[-1]["class_id"] = (
        entries[-1]["class_id"],
        entries[0]["class_id"],
    )
    manifest.write_text(json.dumps(entries))
    sentence = refusal(capsys, "--out", copied, "--resume", "--data", root)
    assert "other training images" in sentence and "birds" in sentence


def test_teachers_of_another_run_are_named(options, finished, tmp_path, capsys):
    teachers = Path(shutil.copyfile(finished / "best.pt", tmp_path / "teachers.pt"))
    out = ["--out", tmp_path / "distilled"]
    train(*options, "--method", "distill", "--teachers", teachers, *out)
    train(*out, "--resume")
    rewritten(teachers, run="another")
    assert "--teachers" in refusal(capsys, *out, "--resume")


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_flipped_bit_in_a_checkpoint_is_found(copied, capsys, name):
    raw = bytearray((copied / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copied / name).write_bytes(raw)
    assert f"{name} is not a checkpoint" in refusal(capsys, "--out", copied, "--resume")


def test_compare_resumes_only_its_own_configuration(options, finished, copied, capsys):
    def usc(out, *more):
        train(*options, "--method", "usc", *more, "--out", out)

    usc(copied / "usc", "--seed", 1)
    with pytest.raises(SystemExit):
        train("--out", copied, "--resume", "--compare", "usc")
    assert "--seed is 0, but" in capsys.readouterr().err
    shutil.rmtree(copied / "usc")
    train("--out", copied, "--resume", "--compare", "usc")
    assert (copied / "usc" / "test.json").exists()
    assert difference(finished, copied) == ""


# Interruptions ------------------------------------------------------------------------------------


def interrupt(monkeypatch, place, step, *numbers):
    """Sends signals to this process when udon's function `place` is called at a step."""
    original = getattr(udon, place)

    def function(run, *arguments):
        if run.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(run, *arguments)

    monkeypatch.setattr(udon, place, function)


@pytest.mark.parametrize(
    "number, place, step, status, saved",
    [
        (signal.SIGTERM, "training_step", 2, 143, 3),  # the step is finished
        (signal.SIGINT, "training_step", 4, 130, 5),
        (signal.SIGTERM, "validate", 4, 143, 4),
        (signal.SIGINT, "validate", 8, 130, 8),
        (signal.SIGTERM, "finish", 8, 143, 8),
    ],
)
def test_interrupted_run_prints_how_to_resume_it(
    options, finished, tmp_path, monkeypatch, capsys, number, place, step, status, saved
):
    with monkeypatch.context() as patch:
        interrupt(patch, place, step, number)
        with pytest.raises(SystemExit) as end:
            train(*options, "--out", tmp_path / "a run")
    assert end.value.code == status
    assert checkpoint.read(tmp_path / "a run" / "last.pt")["step"] == saved
    command = capsys.readouterr().out.splitlines()[-1].partition("python udon.py ")[2]
    udon.main(shlex.split(command))
    assert difference(finished, tmp_path / "a run") == ""
    assert {path.name for path in (tmp_path / "a run").iterdir()} == set(rundir.FILES)


def test_interrupted_comparison_is_resumed_as_a_whole(options, tmp_path, monkeypatch, capsys):
    out, validate = tmp_path / "run", udon.validate

    def interrupt_usc(run, *arguments):
        if run.config.method == "usc":
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(udon, "validate", interrupt_usc)
        train(*options, "--compare", "usc", "ujc", "--out", out)
    command = capsys.readouterr().out.splitlines()[-1].partition("python udon.py ")[2]
    assert shlex.split(command) == ["train", "--out", str(out), "--resume"]
    udon.main(shlex.split(command))
    assert "udon, usc, ujc beside the backbone" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*rundir.FILES, "usc", "ujc"}


def test_second_signal_stops_at_once(options, tmp_path, monkeypatch):
    interrupt(monkeypatch, "training_step", 3, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train(*options, "--out", tmp_path / "run")
    assert end.value.code == 143
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 2


def test_signal_before_the_first_checkpoint_leaves_nothing(options, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, "describe", 0, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train(*options, "--out", tmp_path / "run")
    assert end.value.code == 143 and "start the run again" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with rundir.Interruption("run"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# Disks, pipes, memory -----------------------------------------------------------------------------


class SmallDisk:
    """A file that refuses to hold more than `size` bytes."""

    def __init__(self, file, size):
        self.file, self.left = file, size

    def write(self, value):
        self.left -= memoryview(value).nbytes
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(value)

    def __getattr__(self, name):
        return getattr(self.file, name)


def limit_disk(monkeypatch, size):
    """Lets checkpoint.save fail after `size` bytes."""
    write_archive = checkpoint.write_archive

    def write(contents, file):
        write_archive(contents, SmallDisk(file, size))

    monkeypatch.setattr(checkpoint, "write_archive", write)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_full_disk_leaves_the_previous_checkpoint(copied, monkeypatch, capsys, share):
    before = (copied / "last.pt").read_bytes()
    limit_disk(monkeypatch, share * len(before))
    sentence = refusal(capsys, "--out", copied, "--resume", "--steps", 10)
    assert "No space left on device" in sentence and "--resume" in sentence
    assert (copied / "last.pt").read_bytes() == before
    assert not list(copied.glob("*.partial"))


def test_full_disk_at_any_byte_of_a_small_checkpoint(tmp_path):
    contents, path = {"numbers": torch.arange(3)}, tmp_path / "a.pt"
    checkpoint.save(path, contents)
    before = path.read_bytes()
    for size in range(0, len(before) - 100, 7):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
            limit_disk(patch, size)
            checkpoint.save(path, contents)
        assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_file_that_cannot_grow(options, tmp_path):
    """`ulimit -f` counts blocks of 1,024 bytes: metrics and best.pt fit, last.pt does not."""
    command = [sys.executable, "udon.py", "train", *options, "--out", tmp_path / "run"]
    command = f"ulimit -f 1500; exec {shlex.join(map(str, command))}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "cannot be used (File too large)" in run.stderr
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["config.json", "test.json"])
def test_json_that_cannot_be_written(options, copied, monkeypatch, capsys, name):
    write_text = Path.write_text

    def fail(path, *arguments, **keywords):
        if path.name == f"{name}.partial":
            write_text(path, "half")
            raise OSError(28, "No space left on device", str(path))
        return write_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "write_text", fail)
    before = (copied / name).read_bytes()
    sentence = refusal(capsys, "--out", copied, "--resume")
    assert f"{name} cannot be written (No space left on device)" in sentence
    assert not list(copied.glob("*.partial")) and (copied / name).read_bytes() == before


def test_full_disk_while_metrics_are_written(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No space left on device") as error:
        log.write({"step": 1})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    log.close()


def test_json_is_written_through_a_link(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")  # as /dev/stdout is
    checkpoint.write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "target").read_text()) == [1]


def test_reader_that_ends_early(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    command = f"{shlex.quote(sys.executable)} udon.py train --out {tmp_path}/run --resume"
    command = f"{{ {command}; echo $? >&2; }} | true"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr == f"{128 + signal.SIGPIPE}\n"


def test_memory_error_without_text_is_a_sentence(options, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(udon, "training_step", fail)
    assert "out of memory (MemoryError)" in refusal(capsys, *options, "--out", tmp_path / "run")


# Diverged weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["1e9", "1e38"])
def test_diverged_weights_never_reach_a_checkpoint(options, tmp_path, capsys, rate):
    out = tmp_path / "run"
    with contextlib.suppress(SystemExit):
        train(*options, "--save-every", 1, "--head-lr", rate, "--out", out)
    assert "Traceback" not in capsys.readouterr().err
    for path in out.glob("*.pt"):
        values = checkpoint.read(path)["model"].values()
        assert all(value.isfinite().all() for value in values)


def test_weights_that_diverge_in_the_last_step_are_refused(options, tmp_path, monkeypatch, capsys):
    step = udon.training_step

    def diverge(run, batches):
        result = step(run, batches)
        if run.step == 4:
            run.model.student_head.weight.data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(udon, "training_step", diverge)
    sentence = refusal(capsys, *options, "--out", tmp_path / "run")
    assert "student_head.weight is not finite after step 4" in sentence
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.parametrize("term", ["student_classification", "gradient norm"])
def test_loss_or_gradient_that_is_not_finite_stops_the_run(
    options, uned, tmp_path, monkeypatch, capsys, term
):
    compute = udon.compute_losses

    def diverge(model, images, labels, domain, **settings):
        losses = compute(model, images, labels, domain, **settings)
        if domain != "cars":
            return losses
        if term != "gradient norm":
            return losses._replace(**{term: losses.total * float("nan")})
        root = (model.student_head.weight * 0).sum().sqrt()  # 0, of infinite slope
        return losses._replace(total=losses.total + root)

    monkeypatch.setattr(udon, "compute_losses", diverge)
    sentence = refusal(capsys, *options, "--sampler", "round_robin", "--out", tmp_path / "run")
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert f"{term} is " in sentence and "step 1, domain cars: " in sentence
    assert (stopped["term"], stopped["domain"], stopped["step"]) == (term, "cars", 1)
    assert len(stopped["files"]) == 4
    assert all(uned / "images" in Path(file).parents for file in stopped["files"])
    assert all(Path(file).exists() for file in stopped["files"])

    monkeypatch.setattr(udon, "compute_losses", compute)
    train("--out", tmp_path / "run", "--resume")
    assert not (tmp_path / "run" / "stopped.json").exists()


@pytest.mark.parametrize("option", ["--scale", "--temperature", "--weight-decay"])
def test_option_at_fault_is_named(options, tmp_path, capsys, option):
    value = "1e-40" if option == "--temperature" else "1e38"
    assert option in refusal(capsys, *options, option, value, "--out", tmp_path / "run")


# Values that no computer can hold -----------------------------------------------------------------


@pytest.mark.parametrize("option", ["--batch-size", "--student-dim", "--workers", "--head-layers"])
@pytest.mark.parametrize("value", ["9" * 400, "9" * 18], ids=["400 digits", "18 digits"])
def test_absurd_sizes_are_refused(options, tmp_path, capsys, option, value):
    refusal(capsys, *options, option, value, "--out", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.partial"))


def test_worker_that_ends_is_a_sentence(options, tmp_path, monkeypatch, capsys):
    def end(dataset, key):
        os._exit(1)

    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(data.TrainBatches, "__getitem__", end)
    sentence = refusal(capsys, *options, "--workers", 1, "--out", tmp_path / "run")
    assert "a process that loads images has ended unexpectedly" in sentence
