"""Writes the table of the procedural domains: `udon`, `udon-joint` and `usc` over three seeds.

    for s in 0 1 2; do
        OMP_NUM_THREADS=1 python udon.py train --seed $s --out results/procedural/seed$s
    done
    python -m benchmarks.procedural --table results/README.md

read(directory)    {row: {seed: result}} of these runs and of the backbone as pre-trained
table(results)     R@1 and mMP@5 of each row, R@1 of each domain, as text
"""

import argparse
import json
from pathlib import Path

import config
import data
from benchmarks import tables

RESULTS = Path(__file__).resolve().parents[1] / "results" / "procedural"
SEEDS = (0, 1, 2)
METHODS = ("udon", *config.DEMO)  # the first is trained in seed<N>, the others inside it


def read(directory: Path) -> tables.Results:
    """The results of all seeds. Raises data.InputError for a file that is missing or older."""
    results = {row: {} for row in ("backbone", "usc", "udon", "udon-joint")}
    for seed in SEEDS:
        for method in METHODS:
            path = directory / f"seed{seed}" / ("" if method == METHODS[0] else method)
            try:
                result = json.loads((path / "test.json").read_text(encoding="utf-8"))
                if result["method"] != method:
                    raise ValueError(f"method is {result['method']}")
                results["backbone"][seed] = result["backbone"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise data.InputError(
                    f"{path / 'test.json'} is not a result of {method} ({type(error).__name__}: "
                    f"{error}): run python udon.py train --seed {seed} --out {directory}/seed{seed}"
                ) from None
            results[method][seed] = result
    return results


def table(results: tables.Results) -> str:
    """Means over the seeds with 95 % intervals; differences to usc, paired by seed."""
    lines = []
    for row, runs in results.items():
        cells = [*tables.metric_cells(runs), *tables.difference_cells(results, row, "usc")]
        lines.append([tables.code(row), *cells])
    names = list(tables.NAMES.values())
    means = tables.markdown(["row", *names, *(f"{name} − `usc`" for name in names)], lines)
    return f"{means}\n\nR@1 of each domain:\n\n{tables.domain_table(results, results)}\n"


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Writes the table of the procedural domains into a file.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        required=True,
        help="file with the lines <!-- procedural --> and <!-- end of procedural -->",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    with parser.sentences():
        results = read(options.results)
        tables.write(options.table, "procedural", lambda: table(results))


if __name__ == "__main__":
    main()
