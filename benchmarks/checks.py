"""Types of the benchmarks' options for argparse: what is wrong with a value is said in one sentence, before any work."""

import argparse
import os
from pathlib import Path


def positive(text, least=1):
    if not text.isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2^63 - 1: give one")
    return int(text)


def natural(text):
    return positive(text, 0)


def output(text):
    """The path of a file that can be written."""
    path = Path(text).absolute()
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists and is yours: make the folder first")
    return Path(text)
