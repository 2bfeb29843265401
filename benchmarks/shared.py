"""What the benchmarks share: types of options, the description of the machine, tables in Markdown.

    positive(text), natural(text) -> int; output(text) -> Path     types of options, for argparse
    processor(), machine(device) -> str
    fill(path, name, table)                         writes a table between its marks in a file
Copy with: torch for machine().
"""

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path


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


def fill(path: Path, name: str, table: Callable[[], str]) -> None:
    """Writes the result of table() between <!-- name --> and <!-- end of name --> in a file.

    Raises ValueError if the file lacks these lines.
    """
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise ValueError(
            f"{path} must be a file with the lines <!-- {name} --> and <!-- end of {name} -->: "
            "give one"
        )
    path.write_text(
        f"{before}{begin}{table()}{end}{after}", encoding="utf-8", errors="surrogateescape"
    )
