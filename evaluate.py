"""Retrieval evaluation (paper section 4): embed, search, R@1 and mMP@5 per domain.

    python evaluate.py runs/real/best.pt --data DIR --json out.json

    load_checkpoint(path)                       -> model, checkpoint
    embed(network, images, ...)                 -> (N, D) float32, what the network says of each image
    retrieval_metrics(queries, index, ...)      -> Metrics: both metrics, per query and mean, and the neighbours
    evaluate(model, sets, ...)                  -> {"mean": ..., "domains": ...}, as in the JSON file

A query is searched in the merged index of all domains (the benchmark) or in its own domain's ("separate"). An index image is
relevant if it shares a label with the query AND is of the same domain. Where queries and index are the same images, the query
itself is excluded by its row in the index, never by its rank.
"""

import argparse
import json
import math
import numbers
import operator
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

import data
from kernels import cosine_topk
from model import UDON, ViT

EMBED_BATCH = 128  # fixed: the last digits of an embedding depend on the shape of its batch
CLASS_NUMBERS = 2**23  # up to here the numbers of classes may have gaps: their counts take 64 MB
DEFINITIONS = (
    "R@1: the nearest neighbour shares a class with the query, in the same domain.  mMP@5: with n such images in the "
    "index,\nthe share of them among the first min(n, 5) neighbours.  Means over queries, then over domains; in %."
)


class Embeddings(NamedTuple):
    vectors: torch.Tensor  # (N, D), any norm
    labels: (
        Sequence  # N 64-bit ints, or sequences or sets of them where an image has several classes
    )
    domains: Sequence[str]  # N


class Metrics(NamedTuple):
    recall_at_1: float  # in [0, 1], mean over each domain's queries, then over domains
    mmp_at_k: float
    per_query_recall: torch.Tensor  # (Q,) float64, 0 or 1
    per_query_mmp: torch.Tensor  # (Q,) float64 in [0, 1]
    neighbours: (
        torch.Tensor
    )  # (Q, k) int64 rows of the index, nearest first; -1 where the index has no more


def retrieval_metrics(queries, index, *, exclude=None, k=5):
    """R@1 and mMP@k of `queries` searched in `index`, both Embeddings.

    exclude: (Q,) integers, the index row that is the query itself and may not be returned, or -1.
    Relevant: any label equal and the same domain. R@1 is 1 if the nearest neighbour is relevant. mMP@k: with n relevant rows in
    the index, the excluded one aside, the relevant among the first min(n, k) neighbours divided by min(n, k); n = 0 gives 0, and
    counts. Rows of equal similarity rank in ascending order. Raises ValueError for lengths, shapes or values that do not fit.
    Source: mMP@k as in UnED (arXiv:2309.01858), with exclusion by identity.
    """
    vectors = [torch.as_tensor(side.vectors) for side in (queries, index)]
    for name, side, rows in zip(("queries", "index"), (queries, index), vectors):
        if (
            not len(rows) == len(side.labels) == len(side.domains)
            or not isinstance(k, numbers.Integral)
            or k < 1
        ):
            raise ValueError(
                f"{name} have {len(rows)} vectors, {len(side.labels)} labels, {len(side.domains)} domains, and k is "
                f"{k}: the three must be equally many, and k a whole number from 1 on"
            )
    if not len(vectors[0]):
        raise ValueError("there are no queries: give at least one")
    exclude = (
        torch.full((len(vectors[0]),), -1) if exclude is None else torch.as_tensor(exclude).cpu()
    )
    if (
        exclude.shape != vectors[0].shape[:1]
        or exclude.is_floating_point()
        or exclude.dtype == torch.bool
    ):
        raise ValueError(
            f"exclude is {tuple(exclude.shape)} {exclude.dtype}: it must hold one integer for each of the "
            f"{len(vectors[0])} queries"
        )
    exclude = exclude.long()
    outside = (exclude < -1) | (exclude >= len(vectors[1]))
    if outside.any():
        raise ValueError(
            f"exclude holds {int(exclude[outside][0])}: it must hold rows of the index, of which there are "
            f"{len(vectors[1])}, or -1"
        )

    query_ids, index_ids, own = _class_ids(queries, index)  # own: (Q,) domains
    n = (
        _count_sharing(query_ids, index_ids)
        - _share(query_ids, index_ids, exclude.numpy()[:, None])[:, 0]
    )
    n = np.minimum(n, k)  # (Q,)
    neighbours = torch.full((len(vectors[0]), k), -1, dtype=torch.int64)
    for group, left in (
        (exclude < 0, len(vectors[1])),
        (exclude >= 0, len(vectors[1]) - 1),
    ):  # what is left to a query
        if group.any() and left > 0:
            found = cosine_topk(
                vectors[0][group.to(vectors[0].device)],
                vectors[1],
                min(k, left),
                exclude=exclude[group],
            )[1]
            neighbours[group, : found.shape[1]] = found.cpu()

    relevant = _share(query_ids, index_ids, neighbours.numpy())  # (Q, k) bool
    hits = (relevant & (np.arange(k) < n[:, None])).sum(1)
    recall, mmp = relevant[:, 0].astype(float), hits / np.maximum(n, 1)
    mean = [
        float(np.mean([values[own == domain].mean() for domain in range(own.max() + 1)]))
        for values in (recall, mmp)
    ]
    return Metrics(*mean, torch.from_numpy(recall), torch.from_numpy(mmp), neighbours)


def _class_ids(queries, index):
    """A class is a (domain, label). Numbers of the classes of queries (Q, L) and index rows (G + 1, M), int64, each once in its
    row, padded with -1, and of the queries' domains (Q,), from 0 on. Row -1 of the index, the last, has no class."""
    numbers, sides = defaultdict(count().__next__), (queries, index)
    domains = [_domain_ids(side.domains, numbers) for side in sides]
    several = [_label_matrix(side.labels) for side in sides]
    labels = np.concatenate([matrix.ravel() for matrix, _ in several])
    owners = np.concatenate(
        [np.repeat(own, matrix.shape[1]) for own, (matrix, _) in zip(domains, several)]
    )
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if (high - low + 1) * len(numbers) <= CLASS_NUMBERS:
        ids = (labels - low) * len(numbers) + owners
    else:
        ids = _consecutive(
            _consecutive(labels) * len(numbers) + owners
        )  # so that nothing overflows
    ids = np.split(ids, [several[0][0].size])
    for side, (matrix, known) in enumerate(several):
        ids[side] = np.sort(np.where(known, ids[side].reshape(matrix.shape), -1), axis=1)
        ids[side][:, 1:][ids[side][:, 1:] == ids[side][:, :-1]] = -1
    return ids[0], np.pad(ids[1], ((0, 1), (0, 0)), constant_values=-1), domains[0]


def _domain_ids(domains, numbers):
    """(N,) int64: a number for each image's domain. `numbers` gives them out."""
    if not isinstance(domains, np.ndarray):
        return np.fromiter(map(numbers.__getitem__, domains), np.int64, len(domains))
    ids = np.full(len(domains), -1)
    while (ids < 0).any():
        name = domains[(ids < 0).argmax()]
        ids[domains == name] = numbers[name]
    return ids


def _label_matrix(labels):
    """(N, L) int64, and which of it are labels and not padding: (N, L) bool, or True for all."""
    try:
        matrix = np.asarray(labels)
    except ValueError:  # differently many
        matrix = np.empty(len(labels), dtype=object)
    if matrix.dtype.kind in "ib" or not matrix.size:
        return matrix.reshape(len(matrix), math.prod(matrix.shape[1:])).astype(np.int64), True
    if matrix.dtype.kind != "O" and not (matrix.dtype.kind == "u" and matrix.max() < 2**63):
        raise ValueError(
            f"labels are {matrix.dtype}, such as {matrix.flat[0]!r}: they must be whole numbers of at most 64 bits"
        )
    several = [
        (label,)
        if isinstance(label, (int, np.integer))
        or not (np.ndim(label) or isinstance(label, (set, frozenset)))
        else label
        for label in labels
    ]
    lengths = np.fromiter(map(len, several), np.int64, len(several))
    known = np.arange(lengths.max()) < lengths[:, None]
    matrix = np.zeros(known.shape, dtype=np.int64)
    try:
        matrix[known] = np.fromiter(
            map(operator.index, chain.from_iterable(several)), np.int64, lengths.sum()
        )
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"a label is no whole number of at most 64 bits ({error}): all must be"
        ) from None
    return matrix, known


def _consecutive(values):
    return torch.unique(torch.from_numpy(values), return_inverse=True)[
        1
    ].numpy()  # numpy's own takes twice as long


def _share(query_ids, index_ids, rows):
    """(Q, m) bool: does query q share a class with row rows[q, m] of the index?"""
    share = np.zeros(rows.shape, dtype=bool)
    for mine in query_ids.T[:, :, None]:  # (Q, 1)
        for theirs in index_ids.T:  # (G + 1,)
            share |= (theirs[rows] == mine) & (mine >= 0)
    return share


def _count_sharing(query_ids, index_ids):
    """(Q,) int64: how many index rows share a class with each query."""
    sizes = np.bincount(index_ids[index_ids >= 0], minlength=query_ids.max(initial=-1) + 1)
    sizes = np.append(sizes, 0)  # number -1, no class, is the last
    counts = sizes[query_ids].sum(1)
    if index_ids.shape[1] > 1:  # an index row may share several classes with a query
        rows, columns = np.nonzero(index_ids >= 0)
        rows = rows[np.argsort(index_ids[rows, columns])]
        ends = sizes.cumsum()
        for q in np.flatnonzero((query_ids >= 0).sum(1) > 1):
            counts[q] = len(
                np.unique(
                    np.concatenate([rows[ends[c] - sizes[c] : ends[c]] for c in query_ids[q]])
                )
            )
    return counts


class TestSet(NamedTuple):
    """One domain to be evaluated: query images and index images, the same object where they are the same images."""

    queries: data.TestImages
    index: data.TestImages


TestSet.__test__ = False  # not a test class, whatever pytest makes of its name


def open_sets(benchmark, split, size, *, antialias=True, keep=False):
    """{domain: TestSet} of split "val" or "test" at `size` pixels; keep=True holds the decoded images in memory, for repeated use,
    where all of them fit into data.MEMORY_LIMIT bytes."""
    names = {
        domain: dict.fromkeys((split, benchmark.index_name(domain, split)))
        for domain in benchmark.domains
    }
    splits = {domain: [benchmark.split(domain, name) for name in names[domain]] for domain in names}
    keep = (
        keep
        and sum(len(part) for parts in splits.values() for part in parts) * size * size * 3
        <= data.MEMORY_LIMIT
    )
    sets = {}
    for domain, parts in splits.items():
        images = [data.TestImages(part, size, antialias=antialias, keep=keep) for part in parts]
        sets[domain] = TestSet(images[0], images[-1])
    return sets


@torch.inference_mode()
def embed(network, images, mean, std, device):
    """network (B, 3, H, W) -> (B, D), applied to a whole data.TestImages: (N, D) float32 on the CPU, in the images' order.
    Raises data.InputError where it says something that is not finite."""
    in_memory = images.pixels is not None or images.split.pixels is not None
    loader = DataLoader(
        images, EMBED_BATCH, num_workers=0 if in_memory else min(data.processors(), 8)
    )
    vectors = torch.cat(
        [network(data.normalise(batch.to(device), mean, std)).float().cpu() for batch in loader]
    )
    if not vectors.isfinite().all():
        raise data.InputError(
            f"embeddings of domain {images.split.domain}, split {images.split.name}, are not finite: the weights "
            "have diverged, train with lower learning rates"
        )
    return vectors


def evaluate(model, sets, preprocessing, *, index="merged", embedding="student"):
    """Results of a model on {domain: TestSet}, as plain values: {"mean": {...}, "domains": {name: {...}}}.

    index      "merged": one index of all the domains' images; "separate": each domain's own
    embedding  "student", "backbone", or "teacher": each domain by its own teacher, whose spaces cannot be merged
    preprocessing  {"mean": (3), "std": (3)}
    """
    if (index, embedding) not in (
        ("merged", "student"),
        ("merged", "backbone"),
        ("separate", "student"),
        ("separate", "backbone"),
        ("separate", "teacher"),
    ):
        raise ValueError(
            f"index is {index!r} and embedding {embedding!r}: use merged or separate with student or backbone, or "
            "separate with teacher"
        )
    model.eval()
    device = next(model.parameters()).device
    queries, indexes, rows = {}, {}, {}
    for domain, (query_images, index_images) in sets.items():
        if embedding == "student":
            network = model.embed
        elif embedding == "backbone":
            network = model.embed_backbone
        else:
            network = lambda images: model.teacher_heads[domain](model.embed_backbone(images))
        embedded = {}
        for images in {query_images, index_images}:
            vectors = embed(network, images, preprocessing["mean"], preprocessing["std"], device)
            embedded[images] = Embeddings(vectors, images.split.labels, [domain] * len(images))
        queries[domain], indexes[domain] = embedded[query_images], embedded[index_images]
        rows[domain] = itself(query_images.split, index_images.split)
    if index == "merged":
        offsets = dict(zip(sets, np.cumsum([0] + [len(part.vectors) for part in indexes.values()])))
        exclude = np.concatenate([np.where(rows[d] >= 0, rows[d] + offsets[d], -1) for d in sets])
        cuts = np.cumsum([len(part.vectors) for part in queries.values()])[:-1].tolist()
        queries, indexes = (
            _joined(queries.values()),
            _joined(indexes.values()),
        )  # and the parts' memory is freed
        merged = retrieval_metrics(queries, indexes, exclude=exclude)
        recalls, mmps = (per_query.tensor_split(cuts) for per_query in merged[2:4])
    else:
        alone = [retrieval_metrics(queries[d], indexes[d], exclude=rows[d]) for d in sets]
        recalls, mmps = [m.per_query_recall for m in alone], [m.per_query_mmp for m in alone]
    domains = {
        d: {
            "recall_at_1": recall.mean().item(),
            "mmp_at_5": mmp.mean().item(),
            "queries": len(sets[d].queries),
            "index": len(sets[d].index),
        }
        for d, recall, mmp in zip(sets, recalls, mmps)
    }
    mean = {
        name: sum(row[name] for row in domains.values()) / len(domains)
        for name in ("recall_at_1", "mmp_at_5")
    }
    return {"mean": mean, "domains": domains}


def itself(queries, index):
    """(Q,) int64: the row of the index that is the query's own image, or -1."""
    if queries is index:
        return np.arange(len(queries))
    rows = (
        {} if index.paths is None else {path: row for row, path in enumerate(index.paths.tolist())}
    )
    return np.array(
        [
            rows.get(path, -1)
            for path in ([None] * len(queries) if queries.paths is None else queries.paths.tolist())
        ]
    )


def _joined(parts):
    vectors, labels, domains = zip(*parts)
    single = all(isinstance(part, np.ndarray) for part in labels)
    return Embeddings(
        torch.cat(vectors),
        np.concatenate(labels) if single else list(chain(*labels)),
        list(chain(*domains)),
    )


def table(results, beside=None):
    """The results as lines of text, in %; beside them others of the same queries, {name: results}."""
    beside = beside or {}

    def line(name, row, others):
        sizes = f"{row['queries']:9,}{row['index']:9,}" if "queries" in row else 18 * " "
        columns = [f"{100 * row['recall_at_1']:10.2f}{100 * row['mmp_at_5']:10.2f}"]
        columns += [
            f"{100 * other['recall_at_1']:16.2f}{100 * other['mmp_at_5']:8.2f}" for other in others
        ]
        return f"{name:16}{sizes}{''.join(columns)}"

    heading = f"{'domain':16}{'queries':>9}{'index':>9}{'R@1':>10}{'mMP@5':>10}"
    heading += "".join(f"{f'{name} R@1':>16}{'mMP@5':>8}" for name in beside)
    lines = [
        line(d, row, [other["domains"][d] for other in beside.values()])
        for d, row in results["domains"].items()
    ]
    return "\n".join(
        [
            heading,
            *lines,
            line("mean", results["mean"], [other["mean"] for other in beside.values()]),
            DEFINITIONS,
        ]
    )


def load_checkpoint(path, device="cpu"):
    """-> (model.UDON in evaluation mode, the checkpoint's dict). Raises data.InputError for a file that is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise data.InputError(
            f"checkpoint {path} cannot be opened ({error.strerror}): give a best.pt or last.pt"
        ) from None
    except Exception:
        checkpoint = None  # torch raises errors of many kinds for files that it did not write
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    try:
        checkpoint["preprocessing"]["antialias"], checkpoint["config"]["data"], checkpoint["step"]
        model = build(checkpoint["architecture"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise data.InputError(
            f"file {path} is not a checkpoint of this version, or is damaged: give a best.pt or last.pt of a "
            "run"
        ) from None
    return model.to(device).eval(), checkpoint


def build(architecture):
    """The untrained model of {"backbone": ViT's arguments, "classes", "student_dim", "teacher_dim"}."""
    arguments = dict(architecture)
    return UDON(ViT(**arguments.pop("backbone")), arguments.pop("classes"), **arguments)


def write_json(path, value):
    """Writes all of the file or nothing."""
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise data.InputError(
            f"file {path} cannot be written ({error.strerror}): give another, or make room"
        ) from None


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device):
    """Raises data.InputError for a device that torch does not know or cannot compute on here."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise data.InputError(
            f"--device {device} cannot be used here ({reason}): use cpu"
        ) from None


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one sentence on stderr and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def report(options):
    """What the command line asks for: prints the table, writes the JSON file."""
    if options.json and (
        not Path(options.json).absolute().parent.is_dir() or Path(options.json).is_dir()
    ):
        raise data.InputError(
            f"--json {options.json} must be a file in a folder that exists: make the folder first"
        )
    check_device(options.device)
    model, checkpoint = load_checkpoint(options.checkpoint, options.device)
    embedding = options.embedding or checkpoint.get("embedding", "student")
    index = options.index or ("separate" if embedding == "teacher" else "merged")
    if (embedding, index) == ("teacher", "merged"):
        raise data.InputError(
            "--embedding teacher with --index merged compares what different teachers say: use --index separate"
        )
    root, domains = (
        options.data or checkpoint["config"]["data"],
        options.domains or checkpoint["config"].get("domains"),
    )
    if domains and not options.domains:
        there = data.Benchmark(root).domains
        if set(domains) - set(there):
            raise data.InputError(
                f"--domains is not given, so those of the run are meant, {', '.join(domains)}, but {root} has "
                f"{', '.join(there)}: name with --domains those to evaluate"
            )
    benchmark = data.Benchmark(root, domains)
    untaught = [d for d in benchmark.domains if d not in model.teacher_heads]
    if embedding == "teacher" and untaught:
        raise data.InputError(
            f"domain {untaught[0]!r} has no teacher in {options.checkpoint}, whose teachers are "
            f"{list(model.teacher_heads)}: use --embedding student"
        )
    preprocessing = checkpoint["preprocessing"]
    size = checkpoint["architecture"]["backbone"]["image_size"]
    sets = open_sets(benchmark, options.split, size, antialias=preprocessing["antialias"])
    print(
        f"{options.checkpoint}, step {checkpoint['step']}, on {root or 'the procedural domains'}: {embedding} embedding, "
        f"{options.split} queries, {index} index"
    )
    images = sum(len(part) for parts in sets.values() for part in set(parts))
    width = model.backbone.architecture["width"]
    print(
        f"{images:,} images; their embeddings take at most {4 * width * images / 1e6:,.0f} MB, the search about "
        f"{80 + 10 * torch.get_num_threads()} MB more"
    )
    results = evaluate(model, sets, preprocessing, index=index, embedding=embedding)
    print(table(results))
    if options.json:
        write_json(
            options.json,
            {
                **results,
                "checkpoint": str(options.checkpoint),
                "step": checkpoint["step"],
                "data": root,
                "split": options.split,
                "index": index,
                "embedding": embedding,
            },
        )


def main(arguments=None):
    parser = Parser(description="Retrieval metrics of a checkpoint, per domain and mean.")
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="data folder (default: the data that the checkpoint was trained on)",
    )
    parser.add_argument(
        "--domains",
        metavar="DOMAIN",
        nargs="+",
        help="(default: those that the run was told, else all)",
    )
    parser.add_argument(
        "--split",
        choices=("test", "val"),
        default="test",
        help="whose images are the queries (default: test)",
    )
    parser.add_argument(
        "--index",
        choices=("merged", "separate"),
        help="search all domains' images, or the query's domain alone (default: merged; for teachers: separate)",
    )
    parser.add_argument(
        "--embedding",
        choices=("student", "teacher", "backbone"),
        help="(default: the one that the run trained, the student where there is one)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")
    parser.add_argument("--device", default=default_device(), help="(default here: %(default)s)")
    try:
        report(parser.parse_args(arguments))
    except data.InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
