"""What each query found: a CSV file of all queries, and a page that shows some of them.

    Found                                what the queries of a domain found in an index
    per_query(found)                     -> the CSV file as text, a line per query
    page(found, title, lines, count)     -> one self-contained HTML file as text

`found` is {domain: Found}. A neighbour is of the query's class (C), of another class of its domain
(O), or of another domain (D). Copy with: data, distributed, folders, images, procedural,
torch, numpy, pillow.
"""

import base64
import csv
import html
import io
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data

SIDE = 128  # pixels of the longer side of a thumbnail
KINDS = {"C": "same class", "O": "other class", "D": "other domain"}


class Found(NamedTuple):
    """What the Q queries of a domain found in an index of one or several splits."""

    queries: data.Split
    index: tuple[data.Split, ...]  # row i of the index is image i of these splits in sequence
    recall: torch.Tensor  # (Q,) 0 or 1
    mmp: torch.Tensor  # (Q,) in [0, 1]
    neighbours: torch.Tensor  # (Q, k) int64 rows of the index, nearest first; -1: no more
    similarities: torch.Tensor  # (Q, k) cosines
    relevant: torch.Tensor  # (Q,) number of images of the query's class in the index


class Neighbour(NamedTuple):
    split: data.Split
    row: int
    similarity: float
    kind: str  # of KINDS


def neighbours_of(found: Found, query: int) -> list[Neighbour]:
    """The neighbours of a query, nearest first."""
    ends = np.cumsum([len(split) for split in found.index])
    neighbours, classes = [], set(classes_of(found.queries, query))
    for row, similarity in zip(
        found.neighbours[query].tolist(), found.similarities[query].tolist()
    ):
        if row < 0:
            break
        part = int(np.searchsorted(ends, row, side="right"))
        split = found.index[part]
        row -= int(ends[part]) - len(split)
        same_class = bool(classes.intersection(classes_of(split, row)))
        kind = "D" if split.domain != found.queries.domain else "C" if same_class else "O"
        neighbours.append(Neighbour(split, row, similarity, kind))
    return neighbours


def class_text(split: data.Split, row: int) -> str:
    """The names of an image's classes, or the labels where they have none."""
    labels, names = classes_of(split, row), split.label_names
    return " ".join(str(label) if names is None else names[label] for label in labels)


def classes_of(split: data.Split, row: int) -> list[int]:
    return np.unique(split.labels[row]).tolist()


# The CSV file -------------------------------------------------------------------------------------


def per_query(found: dict[str, Found]) -> str:
    """A heading, and for each query: path, domain, class (several with spaces between them), hit
    (R@1), mMP@5, number of relevant images in the index, what the nearest neighbour is (of KINDS),
    and the neighbours' paths and similarities. Undecodable bytes of paths are as of os.fsdecode."""
    text = io.StringIO()
    depth = next(iter(found.values())).neighbours.shape[1]
    numbered = [(f"neighbour_{i}", f"similarity_{i}") for i in range(1, depth + 1)]
    names = ("path", "domain", "class", "hit", "mmp_at_5", "relevant", "nearest")
    # Not all versions of csv quote a name with a carriage return unless told to quote all text.
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow([*names, *itertools.chain(*numbered)])
    for domain, part in found.items():
        values = zip(part.recall.tolist(), part.mmp.tolist(), part.relevant.tolist())
        for query, (recall, mmp, relevant) in enumerate(values):
            neighbours = neighbours_of(part, query)
            nearest = KINDS[neighbours[0].kind] if neighbours else ""
            cells = [(n.split.path(n.row), round(n.similarity, 6)) for n in neighbours]
            cells += [("", "")] * (depth - len(cells))
            classes = class_text(part.queries, query)
            start = (part.queries.path(query), domain, classes, int(recall), mmp, relevant, nearest)
            table.writerow([*start, *itertools.chain(*cells)])
    return text.getvalue()


# Which queries a page shows -----------------------------------------------------------------------


def chosen(found: dict[str, Found], count: int, seed: int = 0) -> dict[tuple[str, int], dict]:
    """{(domain, query): {"worst": place, "random": place}} of about `count` queries: half of them
    the worst, half at random, of each domain in turn; some may be both.

    Worst are a low R@1, then a low mMP@5, then a nearest neighbour of high similarity. Queries
    without a relevant image in the index cannot be answered, and are not among the worst.
    """
    rng = np.random.default_rng(seed)
    worst, random = {}, {}
    for domain, part in found.items():
        answerable = np.flatnonzero(part.relevant > 0)
        order = np.lexsort((-part.similarities[:, 0], part.mmp, part.recall))
        worst[domain] = order[np.isin(order, answerable)]
        random[domain] = rng.permutation(len(part.queries))
    places = {}
    for name, queries, number in (
        ("worst", worst, (count + 1) // 2),
        ("random", random, count // 2),
    ):
        for place, query in enumerate(in_turn(queries, number)):
            places.setdefault(query, {})[name] = place
    return places


def in_turn(queries: dict[str, np.ndarray], count: int) -> list[tuple[str, int]]:
    """The first `count` of the first query of each domain, the second of each, and so on."""
    columns = ([(domain, int(query)) for query in rows] for domain, rows in queries.items())
    rounds = itertools.zip_longest(*columns)
    return list(itertools.islice(filter(None, itertools.chain(*rounds)), count))


# The page -----------------------------------------------------------------------------------------


def page(found: dict[str, Found], title: str, lines: list[str], count: int, seed: int = 0) -> str:
    """A page of about `count` queries with their neighbours, which needs no other file.

    lines: sentences above the pictures. Raises data.InputError for an image that cannot be read.
    """
    places = chosen(found, count, seed)
    counts = [sum(name in at for at in places.values()) for name in ("worst", "random")]
    shown = "{} of the worst queries and {} random ones, of each domain in turn.".format(*counts)
    lines = [*lines, shown]
    unanswerable = sum(int((part.relevant == 0).sum()) for part in found.values())
    if unanswerable:
        note = "queries have no image of their class in the index and are not among the worst."
        lines = [*lines, f"{unanswerable:,} {note}"]
    return PAGE.format(
        style=STYLE,
        script=SCRIPT,
        title=safe(title),
        lines="\n".join(f"<p>{safe(line)}</p>" for line in lines),
        domains="\n".join(f'<option value="{safe(d)}">{safe(d)}</option>' for d in found),
        cards="\n".join(card(found[domain], query, at) for (domain, query), at in places.items()),
    )


def card(found: Found, query: int, places: dict[str, int]) -> str:
    """The HTML of a query and its neighbours."""
    neighbours = neighbours_of(found, query)
    relevant = int(found.relevant[query])
    facts = (
        f"{'hit' if found.recall[query] else 'miss'}, mMP@5 {100 * found.mmp[query]:.1f} %, "
        f"{relevant:,} {'image' if relevant == 1 else 'images'} of its class in the index"
    )
    pictures = [picture(found.queries, query, "Q", "query")]
    for place, neighbour in enumerate(neighbours, 1):
        text = f"{KINDS[neighbour.kind]}, {neighbour.similarity:.3f}"
        pictures.append(picture(neighbour.split, neighbour.row, neighbour.kind, text, place))
    data_set = "".join(f' data-{name}="{place}"' for name, place in places.items())
    nearest = neighbours[0].kind if neighbours else ""
    return (
        f'<article tabindex="0" data-domain="{safe(found.queries.domain)}" data-kind="{nearest}"'
        f"{data_set}>\n<h2>{safe(name_of(found.queries, query))} <small>{facts}</small></h2>\n"
        f"<div>{''.join(pictures)}</div>\n</article>"
    )


def picture(split: data.Split, row: int, kind: str, text: str, place: int = 0) -> str:
    """The HTML of one image. kind: of KINDS, or Q for the query."""
    path, name = safe(split.path(row)), safe(name_of(split, row))
    tail = safe("/".join(Path(split.path(row)).parts[-2:]))
    image, _ = split.reduced_image(row, SIDE)
    label = f"neighbour {place}, {text}" if place else text
    return (
        f'<figure class="{kind}" title="{path}"><img src="{thumbnail(image)}" '
        f'alt="{label}: {path}"><figcaption><b>{kind}</b> {text}<br>{name}<i>{tail}</i>'
        "</figcaption></figure>"
    )


def name_of(split, row) -> str:
    return f"{split.domain}, class {class_text(split, row)}"


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """The data URI of an image at a longer side of at most `side` pixels."""
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def safe(text: str) -> str:
    """Text for HTML, without control characters and undecodable bytes."""
    return html.escape(data.printable(text))


STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 1000px; padding: 0 16px;
  color: #111; background: #fff; }
h1 { font-size: 22px; margin: 20px 0 8px; overflow-wrap: anywhere; }
p { margin: 4px 0; overflow-wrap: anywhere; }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 20px;
  align-items: center; padding: 10px 0; margin-top: 12px; background: #fff;
  border-bottom: 1px solid #888; }
fieldset { border: 0; margin: 0; padding: 0; }
select { font: inherit; max-width: 200px; }
article { padding: 10px 6px; border-bottom: 1px solid #ccc; scroll-margin-top: 90px; }
article:focus { outline: 2px solid #0b57d0; }
h2 { font-size: 16px; margin: 0 0 6px; overflow-wrap: anywhere; }
small { font-weight: normal; color: #444; font-size: 14px; }
article div { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 10px; }
figure { margin: 0; font-size: 12px; min-width: 0; }
figure img { display: block; box-sizing: border-box; width: 100%; aspect-ratio: 1;
  object-fit: contain; background: #eee; border: 5px solid #111; }
figure.Q img { border: 1px solid #111; padding: 4px; }
figure.C img { border: 5px solid #0072b2; }
figure.O img { border: 5px dashed #d55e00; }
figure.D img { border: 6px double #7a0177; }
figcaption { margin-top: 3px; overflow-wrap: anywhere; }
b { display: inline-block; min-width: 1.2em; text-align: center; color: #fff; background: #111; }
.C b { background: #0072b2; } .O b { background: #b34700; } .D b { background: #7a0177; }
i { display: block; font-style: normal; color: #555; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
@media (max-width: 640px) { article div { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
"""

SCRIPT = """
const form = document.forms[0], list = document.querySelector("main");
const cards = [...list.children], shown = document.querySelector("output");
function update() {
  const order = form.elements.order.value, domain = form.elements.domain.value;
  const kind = form.elements.kind.value;
  const chosen = cards.filter(({dataset}) => order in dataset
    && (!domain || dataset.domain === domain) && (!kind || dataset.kind === kind));
  chosen.sort((one, other) => one.dataset[order] - other.dataset[order]);
  list.replaceChildren(...chosen);
  shown.textContent = chosen.length === 1 ? "1 query" : chosen.length + " queries";
}
function move(event) {
  const step = {j: 1, k: -1}[event.key], cards = [...list.children];
  const inSelect = document.activeElement.matches("select");
  if (!step || event.ctrlKey || event.metaKey || event.altKey || inSelect) return;
  const now = cards.indexOf(document.activeElement);
  const next = cards[now < 0 ? 0 : Math.min(Math.max(now + step, 0), cards.length - 1)];
  if (next) next.focus();
}
form.addEventListener("change", update);
form.addEventListener("submit", event => event.preventDefault());
document.addEventListener("keydown", move);
update();
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{lines}
<p class="C"><b>C</b> solid frame: the query's class.</p>
<p class="O"><b>O</b> dashed frame: another class of the query's domain.</p>
<p class="D"><b>D</b> double frame: an image of another domain.</p>
<p>Numbers below the pictures are cosine similarities. Keys: j next query, k previous query.</p>
<form>
<fieldset><label><input type="radio" name="order" value="worst" checked> worst first</label>
<label><input type="radio" name="order" value="random"> at random</label></fieldset>
<label>domain <select name="domain"><option value="">all</option>
{domains}
</select></label>
<label>nearest is <select name="kind"><option value="">anything</option>
<option value="C">C same class</option><option value="O">O other class</option>
<option value="D">D other domain</option></select></label>
<output></output>
</form>
<main>
{cards}
</main>
<script>{script}</script>
</body>
</html>
"""
