"""What the benchmarks share: types of options, which say what is wrong with a value; the machine's description; a table's place."""

import argparse
import os
import platform
from pathlib import Path


def positive(text, least=1):
    if not text.isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {least} to 2^63 - 1: give one"
        )
    return int(text)


def natural(text):
    return positive(text, 0)


def output(text):
    """The path of a file that can be written."""
    path = Path(text).absolute()
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a file in a folder that exists and is yours: make the folder first"
        )
    return Path(text)


def processor():
    """The processor's name, as far as the system tells it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine(device):
    """Device, threads, and torch's version."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} processors, torch {torch.__version__}"


def fill(path, name, table):
    """Writes what table() returns between the lines <!-- name --> and <!-- end of name --> of a file. ValueError without them."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise ValueError(
            f"{path} must be a file with the lines <!-- {name} --> and <!-- end of {name} -->: give one"
        )
    path.write_text(
        f"{before}{begin}{table()}{end}{after}", encoding="utf-8", errors="surrogateescape"
    )
