"""Retrieval evaluation of a checkpoint (paper section 4): embed, search, R@1 and mMP@5 per domain.

    python evaluate.py runs/real/best.pt --data DIR --json out.json

    open_sets(benchmark, split, size)    -> {domain: TestSet}: query and index images
    embed(network, images, ...)          -> (N, D) float32, the network's output for each image
    evaluate(model, sets, ...)           -> {"mean": ..., "domains": ...}, as in the JSON file
    table({name: results})               -> the results of one or several systems as text

A query is searched in the merged index of all domains (the benchmark) or in that of its own domain
("separate"). Where the index holds the query's own file, that is excluded from its result by the
rows of the file, never by rank. Copy with: data, folders, images, procedural, export, model,
timm_backbone, checkpoint, metrics, distributed, kernels/, torch, numpy, pillow.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data
import distributed
from checkpoint import CheckpointError, write_json
from checkpoint import load as load_checkpoint
from kernels import cosine_topk, reference
from metrics import DEFINITIONS, Embeddings, retrieval_metrics

EMBED_BATCH = 128  # fixed: the last digits of an embedding depend on the shape of its batch
METRICS = ("recall_at_1", "mmp_at_5")


class TestSet(NamedTuple):
    """Images of one domain; queries and index are one object where they are the same images."""

    queries: data.TestImages
    index: data.TestImages


TestSet.__test__ = False  # pytest must not collect it because of its name


def open_sets(
    benchmark: data.Benchmark, split: str, size: int, *, antialias: bool = True, keep: bool = False
) -> dict[str, TestSet]:
    """The test sets of split "val" or "test" at `size` pixels. With `keep` the decoded images stay
    in memory for repeated use, where all of them fit into data.MEMORY_LIMIT bytes."""
    splits = {}
    for domain in benchmark.domains:
        names = dict.fromkeys((split, benchmark.index_name(domain, split)))
        splits[domain] = [benchmark.split(domain, name) for name in names]
    count = sum(len(part) for parts in splits.values() for part in parts)
    keep = keep and count * size * size * 3 <= data.MEMORY_LIMIT
    sets = {}
    for domain, parts in splits.items():
        images = [data.TestImages(part, size, antialias=antialias, keep=keep) for part in parts]
        sets[domain] = TestSet(images[0], images[-1])
    return sets


def check_validation(sets: dict[str, TestSet]) -> None:
    """Prints a note for each domain whose validation can hardly tell good models from bad ones."""
    for domain, images in sets.items():
        labels = images.queries.split.labels
        classes = len({label for row in labels for label in np.atleast_1d(row).tolist()})
        if classes < 5 or classes == len(labels):
            print(
                f"note: the val split of {domain} has {len(labels)} images of {classes} classes: "
                "its R@1 hardly tells models apart, use at least 5 classes of 2 images or more"
            )


@torch.inference_mode()
def embed(
    network: Callable[[torch.Tensor], torch.Tensor],
    images: data.TestImages,
    preprocessing: dict,
    device: str | torch.device,
) -> torch.Tensor:
    """The outputs of `network`, (B, 3, H, W) -> (B, D), for all images: (N, D) float32 on the CPU.

    preprocessing: {"mean": (3), "std": (3)} of images in [0, 1].
    Raises data.InputError if an output is not finite.
    """
    mean, std = preprocessing["mean"], preprocessing["std"]
    share = distributed.share(
        -(-len(images) // EMBED_BATCH)
    )  # of the batches, so that all are whole
    vectors = [
        network(data.normalise(batch.to(device), mean, std)).float().cpu()
        for batch in images.batches(EMBED_BATCH, min(data.processors(), 8), share)
    ]
    vectors = torch.cat(list(itertools.chain(*distributed.collected(vectors))))
    share_bad_rows(images.split)
    if not vectors.isfinite().all():
        raise data.InputError(
            f"embeddings of domain {images.split.domain}, split {images.split.name}, are not "
            "finite: the weights have diverged, train with lower learning rates"
        )
    return vectors


def share_bad_rows(split: data.Split) -> None:
    """Tells all processes of the images that any has found unreadable. Raises data.InputError if
    together they are too many."""
    for bad_rows in distributed.collected(dict(split.bad_rows)):
        for row in bad_rows.keys() - split.bad_rows.keys():
            split.skip(row, data.InputError(bad_rows[row]))


def digests(sets: dict[str, TestSet]) -> dict[str, str]:
    """What must be the same on all processes, by name, for distributed.require_same."""
    found = {"the domains": " ".join(sets)}
    for domain, images in sets.items():
        for split in dict.fromkeys(part.split for part in images):
            found[f"the digest of the {split.name} images of {domain}"] = split.digest()[:16]
    return found


def network_of(model: nn.Module, embedding: str, domain: str) -> Callable:
    """The function (B, 3, H, W) -> (B, D) that computes an embedding for images of a domain."""
    if embedding == "student":
        return model.embed
    if embedding == "backbone":
        return model.embed_backbone
    return lambda images: model.teacher_heads[domain](model.embed_backbone(images))


def evaluate(
    model: nn.Module,
    sets: dict[str, TestSet],
    preprocessing: dict,
    *,
    index: str = "merged",
    embedding: str = "student",
) -> dict:
    """The results of a model as plain values: {"mean": {...}, "domains": {name: {...}}}.

    index      "merged": the images of all domains; "separate": each domain's own
    embedding  "student", "backbone", or "teacher": each domain by its own teacher, whose embedding
               spaces cannot be merged
    Raises ValueError for other values and for "teacher" with "merged".
    """
    choices = {"index": ("merged", "separate"), "embedding": ("student", "backbone", "teacher")}
    for name, value in (("index", index), ("embedding", embedding)):
        if value not in choices[name]:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(choices[name])}")
    if (index, embedding) == ("merged", "teacher"):
        raise ValueError("embedding is 'teacher' with index 'merged': use index 'separate'")
    model.eval()
    device = next(model.parameters()).device
    queries, indexes, excluded, sizes = {}, {}, {}, {}
    for domain, images in sets.items():
        network = network_of(model, embedding, domain)
        embedded = {
            part: usable(embed(network, part, preprocessing, device), part)
            for part in dict.fromkeys(images)
        }
        (queries[domain], query_split), (indexes[domain], index_split) = map(embedded.get, images)
        excluded[domain] = data.same_file_rows(query_split, index_split)
        sizes[domain] = {"queries": len(query_split), "index": len(index_split)}
    if index == "merged":
        scores = merged_scores(queries, indexes, excluded)
    else:
        scores = {
            domain: retrieval_metrics(
                queries[domain], indexes[domain], exclude=excluded[domain], search=search
            )
            for domain in sets
        }
        scores = {domain: (m.per_query_recall, m.per_query_mmp) for domain, m in scores.items()}
    domains = {}
    for domain, values in scores.items():
        domains[domain] = {name: part.mean().item() for name, part in zip(METRICS, values)}
        domains[domain] |= sizes[domain]
    means = {name: float(np.mean([row[name] for row in domains.values()])) for name in METRICS}
    return {"mean": means, "domains": domains}


def usable(vectors, images) -> tuple[Embeddings, data.Split]:
    """The embeddings and the split of the images that were not skipped as unreadable."""
    rows, split = images.usable_rows(), images.split
    if len(rows) < len(images):
        vectors, split = vectors[rows], split.select(rows)
    return Embeddings(vectors, split.labels, [split.domain] * len(rows)), split


def merged_scores(queries, indexes, excluded) -> dict:
    """{domain: (R@1, mMP@5) of each query} in one index of all domains."""
    offsets = np.cumsum([0] + [len(part.vectors) for part in indexes.values()])
    width = max(rows.shape[1] for rows in excluded.values())
    excluded = [
        np.pad(
            np.where(rows >= 0, rows + offset, -1),
            ((0, 0), (0, width - rows.shape[1])),
            constant_values=-1,
        )
        for rows, offset in zip(excluded.values(), offsets)
    ]
    counts = [len(part.vectors) for part in queries.values()]
    domains = list(queries)
    metrics = retrieval_metrics(
        joined(queries), joined(indexes), exclude=np.concatenate(excluded), search=search
    )
    parts = zip(metrics.per_query_recall.split(counts), metrics.per_query_mmp.split(counts))
    return dict(zip(domains, parts))


def search(queries, index, k, *, exclude):
    """kernels.cosine_topk, in which each process searches its share of the index."""
    parts = distributed.shares(len(index))
    part = parts[distributed.rank()]
    if len(parts) == 1 or len(index) // len(parts) < k + exclude.shape[1]:
        return cosine_topk(queries, index, k, exclude=exclude)
    inside = (exclude >= part.start) & (exclude < part.stop)
    local = np.where(inside, exclude - part.start, -1)
    scores, rows = cosine_topk(queries, index[part], k, exclude=local)
    results = distributed.collected((scores.cpu(), rows.cpu()))
    return reference.merged(results, [part.start for part in parts], k)


def joined(parts: dict[str, Embeddings]) -> Embeddings:
    """The embeddings of all domains in one; empties `parts`, so that their memory is freed."""
    vectors, labels, domains = zip(*parts.values())
    parts.clear()
    single = all(isinstance(part, np.ndarray) for part in labels)
    labels = np.concatenate(labels) if single else list(itertools.chain(*labels))
    return Embeddings(torch.cat(vectors), labels, list(itertools.chain(*domains)))


def table(systems: dict[str, dict]) -> str:
    """The results of one or several systems on the same queries, in %, with their definitions."""
    first = next(iter(systems.values()))
    lines = [f"{'':34}" + "".join(f"{name:>16}" for name in systems)] if len(systems) > 1 else []
    heading = f"{'domain':16}{'queries':>9}{'index':>9}" + f"{'R@1':>9}{'mMP@5':>7}" * len(systems)
    lines.append(heading)
    for domain, row in first["domains"].items():
        cells = "".join(percentages(results["domains"][domain]) for results in systems.values())
        lines.append(f"{domain:16}{row['queries']:9,}{row['index']:9,}{cells}")
    lines.append(f"{'mean':34}" + "".join(percentages(r["mean"]) for r in systems.values()))
    return "\n".join([*lines, DEFINITIONS])


def percentages(row) -> str:
    return f"{100 * row['recall_at_1']:9.2f}{100 * row['mmp_at_5']:7.2f}"


def find_device(name: str) -> str:
    """The device of a name, of several processes each its own. Raises data.InputError for one that
    cannot be used here."""
    return distributed.local_device(data.usable_device(name))


def choose_domains(options, config) -> data.Benchmark:
    """The data to evaluate on: as the options say, else as in training."""
    root, domains = options.data or config["data"], options.domains or config["domains"]
    if domains and not options.domains:
        available = data.Benchmark(root).domains
        if set(domains) - set(available):
            raise data.InputError(
                f"the run was trained on the domains {', '.join(domains)}, but {root} has "
                f"{', '.join(available)}: name those to evaluate with --domains"
            )
    return data.Benchmark(root, domains, on_bad_image=options.on_bad_image)


def report(options: argparse.Namespace) -> None:
    """Evaluates as the command line says: prints the table and writes the JSON file."""
    target = options.json and Path(options.json).absolute()
    if target and (not target.parent.is_dir() or target.is_dir()):
        raise data.InputError(f"--json {options.json} must be a file in a directory that exists")
    device = find_device(options.device)
    model, contents = load_checkpoint(options.checkpoint, device)
    embedding = options.embedding or contents["embedding"]
    index = options.index or ("separate" if embedding == "teacher" else "merged")
    if (embedding, index) == ("teacher", "merged"):
        raise data.InputError(
            "--embedding is teacher with --index merged, which would compare the embeddings of "
            "different teachers: use --index separate"
        )
    benchmark = choose_domains(options, contents["config"])
    untaught = [domain for domain in benchmark.domains if domain not in model.teacher_heads]
    if embedding == "teacher" and untaught:
        raise data.InputError(
            f"domain {untaught[0]!r} has no teacher in {options.checkpoint}, whose teachers are "
            f"{list(model.teacher_heads)}: use --embedding student"
        )
    preprocessing = contents["preprocessing"]
    size = contents["architecture"]["backbone"]["image_size"]
    sets = open_sets(benchmark, options.split, size, antialias=preprocessing["antialias"])
    root = None if benchmark.root is None else str(benchmark.root)
    same = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items()}
    same |= {"the checkpoint's run": contents["run"], "its step": contents["step"]}
    distributed.require_same(same | digests(sets))
    print(
        f"{options.checkpoint}, step {contents['step']:,}, on {root or 'the procedural domains'}: "
        f"{embedding} embedding, {options.split} queries, {index} index"
    )
    images = sum(len(part) for parts in sets.values() for part in set(parts))
    width = model.backbone.width
    if 4 * width * images > 1e8:
        print(f"{images:,} images, whose embeddings take up to {4 * width * images / 1e6:,.0f} MB")
    results = evaluate(model, sets, preprocessing, index=index, embedding=embedding)
    for note in benchmark.notes:
        print(f"note: {note}")
    for path, reason in benchmark.skipped.items():
        print(f"skipped {path}: {reason}")
    print(table({embedding: results}))
    if options.json and distributed.rank() == 0:
        about = {
            "checkpoint": str(options.checkpoint),
            "step": contents["step"],
            "data": root,
            "split": options.split,
            "index": index,
            "embedding": embedding,
            "skipped": benchmark.skipped,
        }
        write_json(options.json, results | about)


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Retrieval metrics of a checkpoint, per domain and mean.")
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument(
        "--data", metavar="DIR", help="data directory (default: that of the training run)"
    )
    parser.add_argument(
        "--domains", metavar="DOMAIN", nargs="+", help="(default: those of the training run)"
    )
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="the queries (default: test)"
    )
    parser.add_argument(
        "--index",
        choices=("merged", "separate"),
        help="search the images of all domains, or of the query's domain alone (default: merged; "
        "for teachers: separate)",
    )
    parser.add_argument(
        "--embedding",
        choices=("student", "teacher", "backbone"),
        help="(default: the one that the run validated)",
    )
    parser.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="stop at an image that cannot be read, or skip up to 1 %% of a split (default: stop)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    with parser.sentences((CheckpointError, distributed.DistributedError)):
        options = parser.parse_args(arguments)
        with distributed.processes(options.device):
            report(options)


if __name__ == "__main__":
    main()
