"""What the benchmarks share: types of options, the description of the machine, tables in Markdown.

    positive(text), natural(text) -> int; output(text) -> Path     types of options, for argparse
    processor(), machine(device) -> str
    versions(packages, extra)                       of installed packages
    pin(core)                                       keeps this process on one core and one thread
    spread(times, base), spread_text(values)        ratios of times that were measured in turns
    recorded(path, module)                          what a benchmark has written
    fill(path, name, table)                         writes a table between its marks in a file
Copy with: images; torch for machine() and pin().
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from images import InputError


def positive(text: str, least: int = 1) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {least} to 2^63 - 1: give one"
        )
    return int(text)


def natural(text: str) -> int:
    return positive(text, 0)


def output(text: str) -> Path:
    """The path of a file that can be written."""
    path = Path(text).absolute()
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a file in a writable directory: create the directory first"
        )
    return Path(text)


def processor() -> str:
    """The name of the CPU, as far as the system knows it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> str:
    """Device, threads, and torch's version."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    return f"{name}, {threads}, torch {torch.__version__}"


def versions(packages: Iterable[str], extra: str) -> dict[str, str]:
    """{package: version}. Raises InputError, which names the extra, if one is not installed."""
    try:
        return {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed, but is measured here: run pip install -e '.[{extra}]'"
        ) from None


def pin(core: int | None) -> None:
    """Keeps this process on one core of those that it may use, the last by default, and torch on
    one thread. Raises InputError for a core that it may not use."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        if core is not None and core not in cores:
            raise InputError(f"--core is {core}: use one of {', '.join(map(str, cores))}")
        os.sched_setaffinity(0, {max(cores) if core is None else core})
    torch.set_num_threads(1)


def spread(times: Iterable[float], base: Iterable[float]) -> dict[str, float]:
    """The median, least and greatest ratio of times to others that were measured in turns."""
    ratios = [own / other for own, other in zip(times, base)]
    values = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {name: round(value, 4) for name, value in values.items()}


def spread_text(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['least']:.2f} to {values['most']:.2f})"


def recorded(path: Path, module: str, keys: Iterable[str]) -> dict:
    """What `python -m benchmarks.module` has written. Raises InputError for another file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {key: result[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a result of {module}.py ({type(error).__name__}: {error}): write it "
            f"with python -m benchmarks.{module}"
        ) from None


def fill(path: Path, name: str, table: Callable[[], str]) -> None:
    """Writes the result of table() between <!-- name --> and <!-- end of name --> in a file.

    Raises InputError if the file lacks these lines.
    """
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise InputError(
            f"{path} must be a file with the lines <!-- {name} --> and <!-- end of {name} -->: "
            "give one"
        )
    path.write_text(
        f"{before}{begin}{table()}{end}{after}", encoding="utf-8", errors="surrogateescape"
    )
