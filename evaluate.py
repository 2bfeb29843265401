"""Retrieval evaluation of a checkpoint (paper section 4): embed, search, R@1 and mMP@5 per domain.

    python evaluate.py runs/real/best.pt --data DIR --json out.json
    python evaluate.py runs/real/best.pt --per-query queries.csv --gallery page.html
    python evaluate.py runs/one/best.pt runs/two/best.pt       # side by side
    python evaluate.py --embeddings vectors.npz --data DIR     # of any other model

    open_sets(benchmark, split, size)    -> {domain: TestSet}: query and index images
    embed(network, images, ...)          -> (N, D) float32, the network's output for each image
    embed_features(network, features, ...)  -> the same, from the outputs of the backbone
    evaluate(model, sets, ...)           -> {"mean": ..., "domains": ...}, as in the JSON file
    retrieve({domain: embeddings}, ...)  -> {domain: Found}: what each query found
    table({name: results})               -> the results of one or several systems as text

A query is searched in the merged index of all domains (the benchmark) or in that of its own domain
("separate"). Where the index holds the query's own file, that is excluded from its result by the
rows of the file, never by rank. With --split all, every image of a data directory is a query and
searched among all of them, which includes the classes of training.

--embeddings takes a file of numpy.savez: vectors (N, D) floating point, any norm, and paths (N,)
text, absolute or below DIR/images (for class folders, below DIR). It must hold every query and
index image. `python search.py embed` writes such a file. Copy with: gallery, vectors, data,
folders, images, procedural, export, model, timm_backbone, checkpoint, metrics, distributed,
kernels/, torch, numpy, pillow.
"""

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data
import distributed
import gallery
from checkpoint import CheckpointError, write_json, write_text
from checkpoint import load as load_checkpoint
from gallery import Found
from kernels import cosine_topk, reference
from metrics import DEFINITIONS, Embeddings, retrieval_metrics
from vectors import FileVectors

EMBED_BATCH = 128  # fixed: the last digits of an embedding depend on the shape of its batch
METRICS = ("recall_at_1", "mmp_at_5")


class TestSet(NamedTuple):
    """Images of one domain; queries and index are one object where they are the same images."""

    queries: data.TestImages
    index: data.TestImages


TestSet.__test__ = False  # pytest must not collect it because of its name


class Embedded(NamedTuple):
    """Images and their embeddings, without images that were skipped as unreadable."""

    vectors: torch.Tensor  # (N, D) float32
    split: data.Split


def open_sets(
    benchmark: data.Benchmark, split: str, size: int, *, keep: bool = False, **resizing
) -> dict[str, TestSet]:
    """The test sets of split "val", "test" or "all" at `size` pixels; `resizing` as data.resizing
    returns it. With `keep` the decoded images stay in memory for repeated use, where all of them
    fit into data.MEMORY_LIMIT bytes."""
    splits = splits_of(benchmark, split)
    count = sum(len(part) for pair in splits.values() for part in set(pair))
    keep = keep and count * size * size * 3 <= data.MEMORY_LIMIT
    sets = {}
    for domain, pair in splits.items():
        images = {
            part: data.TestImages(part, size, keep=keep, **resizing) for part in dict.fromkeys(pair)
        }
        sets[domain] = TestSet(*map(images.get, pair))
    return sets


def splits_of(benchmark: data.Benchmark, split: str) -> dict[str, tuple[data.Split, data.Split]]:
    """The queries and the index of each domain, one object where they are the same images."""
    names = {domain: (split, benchmark.index_name(domain, split)) for domain in benchmark.domains}
    return {
        domain: tuple(benchmark.split(domain, name) for name in pair)
        for domain, pair in names.items()
    }


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


def note_memory(sets: dict[str, TestSet], width: int) -> None:
    """Prints how much memory embeddings of up to `width` values take, where it is much."""
    images = sum(len(part) for parts in sets.values() for part in set(parts))
    if 4 * width * images > 1e8:
        print(f"{images:,} images, whose embeddings take up to {4 * width * images / 1e6:,.0f} MB")


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
    batches = -(-len(images) // EMBED_BATCH)
    vectors = [
        network(data.normalise(batch.to(device), mean, std)).float().cpu()
        for batch in images.batches(
            EMBED_BATCH, min(data.processors(), 8), distributed.share(batches)
        )
    ]
    width = distributed.largest(vectors[0].shape[1] if vectors else 0)
    whole = torch.zeros(len(vectors), EMBED_BATCH, width)  # the last batch of all may be smaller
    for rows, batch in zip(whole, vectors):
        rows[: len(batch)] = batch
    vectors = distributed.gathered(whole, batches).flatten(0, 1)[: len(images)]
    data.share_bad_rows(images.split)
    check_finite(vectors, images.split)
    return vectors


@torch.inference_mode()
def embed_features(
    network: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    split: data.Split,
    device: str | torch.device,
) -> torch.Tensor:
    """`embed` of images whose features (N, D), the outputs of the backbone, are known: in the same
    batches, so that the embeddings are the same bit for bit."""
    batches = features.split(EMBED_BATCH)
    vectors = torch.cat([network(batch.to(device)).float().cpu() for batch in batches])
    check_finite(vectors, split)
    return vectors


def check_finite(vectors: torch.Tensor, split: data.Split) -> None:
    """Raises data.InputError unless all embeddings of a split are finite."""
    if not vectors.isfinite().all():
        raise data.InputError(
            f"embeddings of domain {split.domain}, split {split.name}, are not finite: the weights "
            "have diverged, train with lower learning rates"
        )


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
    features: dict[data.TestImages, torch.Tensor] | None = None,
) -> dict:
    """The results of a model as plain values: {"mean": {...}, "domains": {name: {...}}}.

    index      "merged": the images of all domains; "separate": each domain's own
    embedding  "student", "backbone", or "teacher": each domain by its own teacher, whose embedding
               spaces cannot be merged
    features   {images: (N, D)}: outputs of a backbone that is frozen between several calls, which
               are used in place of the images, and added where they are missing
    Raises ValueError for other values and for "teacher" with "merged".
    """
    choices = {"index": ("merged", "separate"), "embedding": ("student", "backbone", "teacher")}
    for name, value in (("index", index), ("embedding", embedding)):
        if value not in choices[name]:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(choices[name])}")
    if (index, embedding) == ("merged", "teacher"):
        raise ValueError("embedding is 'teacher' with index 'merged': use index 'separate'")
    embedded = embed_sets(model, sets, preprocessing, embedding, features)
    return summary(retrieve(embedded, index))


def embed_sets(
    model: nn.Module,
    sets: dict[str, TestSet],
    preprocessing: dict,
    embedding: str,
    features: dict[data.TestImages, torch.Tensor] | None = None,
) -> dict[str, tuple[Embedded, Embedded]]:
    """The embeddings of the queries and the index of each domain; features as in `evaluate`."""
    model.eval()
    device = next(model.parameters()).device
    embedded = {}
    for domain, images in sets.items():
        network = network_of(model, embedding, domain)
        parts = {}
        for part in dict.fromkeys(images):
            if features is None:
                vectors = embed(network, part, preprocessing, device)
            else:
                if part not in features:
                    features[part] = embed(model.backbone, part, preprocessing, device)
                vectors = embed_features(network, features[part], part.split, device)
            parts[part] = usable(vectors, part)
        embedded[domain] = tuple(map(parts.get, images))
    return embedded


def usable(vectors, images) -> Embedded:
    """The embeddings and the split of the images that were not skipped as unreadable."""
    rows, split = images.usable_rows(), images.split
    if len(rows) < len(images):
        vectors, split = vectors[rows], split.select(rows)
    return Embedded(vectors, split)


# Search -------------------------------------------------------------------------------------------


def retrieve(embedded: dict[str, tuple[Embedded, Embedded]], index: str) -> dict[str, Found]:
    """What the queries of each domain find in the "merged" index of all domains or in "separate"
    ones. Empties `embedded`, so that the memory of its vectors is freed."""
    if index == "merged":
        return retrieve_together(embedded)
    found = {}
    for domain in list(embedded):
        found |= retrieve_together({domain: embedded.pop(domain)})
    return found


def retrieve_together(embedded: dict[str, tuple[Embedded, Embedded]]) -> dict[str, Found]:
    """What the queries of each domain find in one index of all of them; empties `embedded`."""
    splits = {domain: [part.split for part in pair] for domain, pair in embedded.items()}
    indexes = tuple(index for _, index in splits.values())
    sides = zip(*embedded.values())
    embedded.clear()
    queries, index = map(joined, sides)
    del sides
    exclude = own_rows(list(splits.values()))
    metrics = retrieval_metrics(queries, index, exclude=exclude, search=search)
    counts = [len(part) for part, _ in splits.values()]
    values = zip(*(part.split(counts) for part in metrics[2:]))
    return {
        domain: Found(part, indexes, *value)
        for (domain, (part, _)), value in zip(splits.items(), values)
    }


def own_rows(splits: list[list[data.Split]]) -> np.ndarray:
    """(Q, E) int64: for all queries, the rows of their own file in the joined index, then -1."""
    offsets = np.cumsum([0] + [len(index) for _, index in splits])
    excluded = [data.same_file_rows(*pair) for pair in splits]
    width = max(rows.shape[1] for rows in excluded)
    padded = [
        np.pad(
            np.where(rows >= 0, rows + offset, -1),
            ((0, 0), (0, width - rows.shape[1])),
            constant_values=-1,
        )
        for rows, offset in zip(excluded, offsets)
    ]
    return np.concatenate(padded)


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


def joined(parts: tuple[Embedded, ...]) -> Embeddings:
    """The embeddings of all domains in one."""
    labels = [part.split.labels for part in parts]
    single = all(isinstance(part, np.ndarray) for part in labels)
    labels = np.concatenate(labels) if single else list(itertools.chain(*labels))
    domains = [[part.split.domain] * len(part.split) for part in parts]
    vectors = torch.cat([part.vectors for part in parts])
    return Embeddings(vectors, labels, list(itertools.chain(*domains)))


def summary(found: dict[str, Found]) -> dict:
    """The results as plain values: means over the queries of each domain, then over domains."""
    sizes = {split.domain: len(split) for part in found.values() for split in part.index}
    domains = {
        domain: {
            **dict(zip(METRICS, (part.recall.mean().item(), part.mmp.mean().item()))),
            "queries": len(part.queries),
            "index": sizes[domain],
        }
        for domain, part in found.items()
    }
    means = {name: float(np.mean([row[name] for row in domains.values()])) for name in METRICS}
    return {"mean": means, "domains": domains}


# Given embeddings ---------------------------------------------------------------------------------


def read_embeddings(
    path: str, benchmark: data.Benchmark, split: str
) -> dict[str, tuple[Embedded, Embedded]]:
    """The vectors of an .npz file for the queries and the index of each domain. Raises
    data.InputError for a file that cannot be used or lacks images."""
    file = FileVectors(path, benchmark.root / "images" if benchmark.manifests else benchmark.root)
    splits = splits_of(benchmark, split)
    embedded = {
        part: Embedded(file.of(part), part) for part in set(itertools.chain(*splits.values()))
    }
    others = int((~file.used).sum())
    if others:
        print(f"note: {others:,} of the {len(file.used):,} vectors are of other images")
    return {domain: tuple(map(embedded.get, pair)) for domain, pair in splits.items()}


# What is printed ----------------------------------------------------------------------------------


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


def confusion(found: dict[str, Found]) -> np.ndarray:
    """(domains, domains): the share of a row's queries whose nearest neighbour, in a merged index,
    is of a column's domain."""
    shares = []
    for part in found.values():
        ends = np.cumsum([len(split) for split in part.index])
        nearest = part.neighbours[:, 0].numpy()
        domains = np.searchsorted(ends, nearest[nearest >= 0], side="right")
        shares.append(np.bincount(domains, minlength=len(ends)) / len(nearest))
    return np.array(shares)


def confusion_table(domains: list[str], shares: np.ndarray) -> str:
    """Shares as of `confusion` as text, in %."""
    lines = [f"{'domain of the query':20}" + "".join(f"{i:7}" for i in range(1, len(domains) + 1))]
    for number, (domain, row) in enumerate(zip(domains, shares), 1):
        cells = "".join(f"{100 * share:7.1f}" if share else f"{'-':>7}" for share in row)
        lines.append(f"{number:3} {domain:16}{cells}")
    return "\n".join(lines)


def column_names(paths: list[str]) -> list[str]:
    """Names of 15 characters at most: the parts in which paths differ, or else numbers."""
    parts = [Path(path.removesuffix("/best.pt")).parts for path in paths]
    for side in (0, -1):
        while len({part[side] for part in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [part[1:] if side == 0 else part[:-1] for part in parts]
    names = [data.printable(os.path.join(*part)) for part in parts]
    names = [name if len(name) <= 15 else f"…{name[-14:]}" for name in names]
    return names if len(set(names)) == len(names) else [f"{i + 1}" for i in range(len(names))]


def left_out(benchmark: data.Benchmark, split: str) -> Iterator[str]:
    """A sentence if the data directory lists images that are neither queries nor in the index."""
    if benchmark.root is None or split == "all":
        return
    listed, others = 0, 0
    for domain in benchmark.domains:
        paths = {}
        for name in benchmark.split_names(domain):
            with contextlib.suppress(data.InputError):  # of a split that is not evaluated
                paths[name] = {*map(os.path.normpath, benchmark.entries(domain, name).paths)}
        everything = set().union(*paths.values())
        listed += len(everything)
        names = (split, benchmark.index_name(domain, split))
        others += len(everything.difference(*(paths[name] for name in names)))
    if others:
        yield (
            f"{others:,} of {listed:,} images are in other splits; --split all takes the images of "
            "all splits, training classes included"
        )


# Command line -------------------------------------------------------------------------------------


def find_device(name: str) -> str:
    """The device of a name, of several processes each its own. Raises data.InputError for one that
    cannot be used here."""
    return distributed.local_device(data.usable_device(name))


class System(NamedTuple):
    """What is evaluated: a checkpoint, or given embeddings, which have no model."""

    path: str
    index: str
    embedding: str | None = None
    model: nn.Module | None = None
    contents: dict | None = None  # of the checkpoint


def open_systems(options: argparse.Namespace) -> list[System]:
    """What the command line names. Raises data.InputError or CheckpointError."""
    if bool(options.embeddings) == bool(options.checkpoints):
        raise data.InputError("give one checkpoint or several, or --embeddings, not both")
    if options.embeddings:
        if not options.data or options.embedding:
            raise data.InputError("--embeddings needs --data, and takes no --embedding")
        return [System(options.embeddings, options.index or "merged")]
    if len(options.checkpoints) > 1 and (options.per_query or options.gallery):
        raise data.InputError("--per-query and --gallery are of one checkpoint: give one")
    device = find_device(options.device)
    systems = [open_checkpoint(path, options, device) for path in options.checkpoints]
    if len({system.index for system in systems}) > 1:
        raise data.InputError(
            "the runs of these checkpoints were validated in different indexes: give --index"
        )
    return systems


def open_checkpoint(path: str, options: argparse.Namespace, device: str) -> System:
    model, contents = load_checkpoint(path, device)
    embedding = options.embedding or contents["embedding"]
    usual = "separate" if embedding == "teacher" else "merged"
    index = options.index or (contents["index"] if embedding == contents["embedding"] else usual)
    if (embedding, index) == ("teacher", "merged"):
        raise data.InputError(
            "--embedding is teacher with --index merged, which would compare the embeddings of "
            "different teachers: use --index separate"
        )
    return System(path, index, embedding, model, contents)


def choose_domains(options: argparse.Namespace, system: System) -> data.Benchmark:
    """The data to evaluate on: as the options say, else as in training."""
    config = system.contents["config"] if system.contents else {"data": None, "domains": None}
    root, domains = options.data or config["data"], options.domains or config["domains"]
    if domains and not options.domains:
        available = data.Benchmark(root).domains
        if set(domains) - set(available):
            raise data.InputError(
                f"the run was trained on the domains {', '.join(domains)}, but {root} has "
                f"{', '.join(available)}: name those to evaluate with --domains"
            )
    return data.Benchmark(root, domains, on_bad_image=options.on_bad_image)


def other_data(systems: list[System]) -> list[str]:
    """The checkpoints that were trained on another data directory than the first."""
    roots = [system.contents and system.contents["config"]["data"] for system in systems]
    return [system.path for system, root in zip(systems, roots) if root != roots[0]]


def results_of(
    system: System, benchmark: data.Benchmark, options: argparse.Namespace
) -> dict[str, Found]:
    """Embeds and searches, and prints what."""
    on = str(benchmark.root or "the procedural domains")
    queries = "all images as" if options.split == "all" else options.split
    protocol = f"{queries} queries, {system.index} index"
    same = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items()}
    if system.model is None:
        distributed.require_same(same)
        print(f"{system.path} on {on}: {protocol}")
        return retrieve(read_embeddings(system.path, benchmark, options.split), system.index)
    contents = system.contents
    untaught = [domain for domain in benchmark.domains if domain not in system.model.teacher_heads]
    if system.embedding == "teacher" and untaught:
        raise data.InputError(
            f"domain {untaught[0]!r} has no teacher in {system.path}, whose teachers are "
            f"{list(system.model.teacher_heads)}: use --embedding student"
        )
    size = contents["architecture"]["backbone"]["image_size"]
    preprocessing = contents["preprocessing"]
    sets = open_sets(benchmark, options.split, size, **data.resizing(preprocessing))
    same |= {"the checkpoint's run": contents["run"], "its step": contents["step"]}
    distributed.require_same(same | digests(sets))
    print(
        f"{system.path}, step {contents['step']:,}, on {on}: {system.embedding} embedding, "
        f"{protocol}"
    )
    note_memory(sets, system.model.backbone.width)
    embedded = embed_sets(system.model, sets, preprocessing, system.embedding)
    return retrieve(embedded, system.index)


def report(options: argparse.Namespace) -> None:
    """Evaluates as the command line says: prints the tables and writes the files."""
    check_targets(options)
    systems = open_systems(options)
    benchmark = choose_domains(options, systems[0])
    for path in other_data(systems) if not options.data else ():
        print(f"note: {path} was trained on other data; all are evaluated on that of the first")
    is_merged = systems[0].index == "merged" and len(benchmark.domains) > 1
    results, tables = {}, []
    for name, system in zip(column_names([system.path for system in systems]), systems):
        found = results_of(system, benchmark, options)
        results[name] = summary(found)
        if is_merged:
            of_system = f" of {name}" if len(systems) > 1 else ""
            tables.append(f"\nDomains of the nearest neighbours{of_system}, in % of the queries:")
            tables.append(confusion_table(list(found), confusion(found)))
    for note in [*benchmark.notes, *left_out(benchmark, options.split)]:
        print(f"note: {note}")
    for path, reason in benchmark.skipped.items():
        print(f"skipped {path}: {reason}")
    print("\n".join([table(results), *tables]))
    if distributed.rank() == 0:
        write_files(options, systems, benchmark, list(results.values()), found)


def check_targets(options: argparse.Namespace) -> None:
    """Raises data.InputError for files that could not be written after the long work."""
    for name in ("json", "per_query", "gallery"):
        value = getattr(options, name)
        target = value and Path(value).absolute()
        if target and (not target.parent.is_dir() or target.is_dir()):
            flag = name.replace("_", "-")
            raise data.InputError(f"--{flag} {value} must be a file in a directory that exists")
    if options.gallery_size < 1:
        raise data.InputError(f"--gallery-size is {options.gallery_size}: give 1 or more")


def write_files(options, systems, benchmark, results, found) -> None:
    """Writes the files that the command line names; `found` is of the last system."""
    root = None if benchmark.root is None else str(benchmark.root)
    values = []
    for system, result in zip(systems, results):
        about = {"embeddings": system.path}
        if system.contents:
            about = {"checkpoint": system.path, "step": system.contents["step"]}
        about |= {"data": root, "split": options.split, "index": system.index}
        if system.contents:
            about["embedding"] = system.embedding
        values.append(result | about | {"skipped": benchmark.skipped})
    if options.json:
        write_json(options.json, values[0] if len(values) == 1 else {"systems": values})
    if options.per_query:
        write_text(options.per_query, gallery.per_query(found))
    if options.gallery:
        mean = values[0]["mean"]
        lines = [
            f"{options.split} queries of {root or 'the procedural domains'}, {systems[0].index} "
            f"index: mean R@1 {100 * mean['recall_at_1']:.2f}, mMP@5 {100 * mean['mmp_at_5']:.2f}."
        ]
        page = gallery.page(found, systems[0].path, lines, options.gallery_size)
        write_text(options.gallery, page)


def command_line() -> argparse.ArgumentParser:
    parser = data.Parser(description="Retrieval metrics of a checkpoint, per domain and mean.")
    parser.add_argument(
        "checkpoints",
        metavar="checkpoint",
        nargs="*",
        help="best.pt or last.pt of a run; several are printed side by side",
    )
    parser.add_argument(
        "--embeddings",
        metavar="FILE",
        help="evaluate vectors of any other model instead: an .npz file with vectors (N, D) and "
        "paths (N,), as search.py embed writes",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="data directory (default: that of the first training run)"
    )
    parser.add_argument(
        "--domains", metavar="DOMAIN", nargs="+", help="(default: those of the first training run)"
    )
    parser.add_argument(
        "--split",
        choices=("test", "val", "all"),
        default="test",
        help="the queries; all: the images of all splits, searched among all of them, the classes "
        "of training included (default: test)",
    )
    parser.add_argument(
        "--index",
        choices=("merged", "separate"),
        help="search the images of all domains, or of the query's domain alone (default: as the "
        "run did; another embedding: merged, for teachers separate)",
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
    add_outputs(parser)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)"
    )
    return parser


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    parser.add_argument(
        "--per-query",
        metavar="FILE",
        help="write a CSV file with the result and the five neighbours of each query",
    )
    parser.add_argument(
        "--gallery",
        metavar="FILE",
        help="write a page (HTML) of queries and their neighbours, half of them the worst of each "
        "domain, half at random",
    )
    parser.add_argument(
        "--gallery-size",
        metavar="N",
        type=int,
        default=100,
        help="number of queries of --gallery (default: 100)",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    with parser.sentences((CheckpointError, distributed.DistributedError)):
        options = parser.parse_args(arguments)
        with distributed.processes(options.device):
            report(options)


if __name__ == "__main__":
    main()
