"""gallery.py: the CSV file against python loops, odd file names, the page in a real browser."""

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from test_evaluate import SEEN, benchmarks, embedded_by_colour, opened
from test_metrics import Embeddings, as_set, by_hand, cosine

import checkpoint
import data
import evaluate
import gallery
from gallery import Found

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


# The CSV file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["merged", "separate"])
@settings(max_examples=12)
@given(benchmark=benchmarks())
def test_each_query_equals_python_loops(index, benchmark):
    found = evaluate.retrieve(embedded_by_colour(opened(benchmark)), index)
    lines = iter(rows_of(gallery.per_query(found)))
    for domain, (queries, _) in benchmark.items():
        searched = [  # (colour, label, domain, file, name) of each row of the index
            (colour, label, other, file, f"{other}/test row {row}")
            for other, sides in benchmark.items()
            if index == "merged" or other == domain
            for row, (colour, label, file) in enumerate(zip(*(sides[1] or sides[0])))
        ]
        colours, labels, domains, files, names = map(list, zip(*searched))
        seen = [[a * b for a, b in zip(colour, SEEN["student"])] for colour in colours]
        asked = [[a * b for a, b in zip(colour, SEEN["student"])] for colour in queries[0]]
        exclude = [tuple(r for r, f in enumerate(files) if f == file) for file in queries[2]]
        sides = (
            Embeddings(asked, queries[1], [domain] * len(asked)),
            Embeddings(seen, labels, domains),
        )
        results = by_hand(*sides, exclude, 5)
        for number, (recall, mmp, rows, relevant) in enumerate(results):
            line = next(lines)
            assert line["path"] == f"{domain}/test row {number}" and line["domain"] == domain
            assert line["class"] == " ".join(map(str, sorted(set(as_set(queries[1][number])))))
            assert (float(line["hit"]), int(line["relevant"])) == (recall, relevant)
            assert float(line["mmp_at_5"]) == pytest.approx(mmp, abs=1e-12)
            rows = [row for row in rows if row >= 0]
            assert line["nearest"] == (kind(rows[0], sides, number) if rows else "")
            for place in range(5):
                name, similarity = line[f"neighbour_{place + 1}"], line[f"similarity_{place + 1}"]
                if place >= len(rows):
                    assert name == similarity == ""
                    continue
                assert name == names[rows[place]]
                expected = cosine(asked[number], seen[rows[place]])
                assert float(similarity) == pytest.approx(expected, abs=1e-6)
    assert next(lines, None) is None


def kind(row, sides, query):
    queries, index = sides
    if index.domains[row] != queries.domains[query]:
        return "other domain"
    same = as_set(index.labels[row]) & as_set(queries.labels[query])
    return "same class" if same else "other class"


ODD_NAMES = [b"a, b", b'"quoted"', b"line\nbreak", b"undecodable \xff", b"<b>&amp;", b"=1+1", b"\r"]


@pytest.fixture
def odd(tmp_path):
    """A checkpoint and class folders whose files have odd names."""
    from test_checkpoint import contents_of

    rng, root = np.random.default_rng(0), tmp_path / "data"
    for label in range(7):
        folder = os.path.join(os.fsencode(root / "things <i>"), ODD_NAMES[label])
        os.makedirs(folder)
        for name in ODD_NAMES[:3]:
            picture(rng, label).save(os.fsdecode(os.path.join(folder, name + b".png")))
    checkpoint.save(tmp_path / "model.pt", contents_of())
    return tmp_path / "model.pt", root


def test_files_of_any_name_are_in_the_csv_file_and_on_the_page(odd, tmp_path, capsys):
    model, root = odd
    table, page = tmp_path / "queries.csv", tmp_path / "page.html"
    files = ["--per-query", table, "--gallery", page]
    evaluate.main([str(x) for x in [model, "--data", root, "--split", "all", *files]])
    with open(table, encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 21 and len({line["path"] for line in lines}) == 21
    for line in lines:
        for column in ("path", *(f"neighbour_{i}" for i in range(1, 6))):
            assert os.path.isfile(line[column]), line[column]
    assert {os.fsencode(line["class"]) for line in lines} == set(ODD_NAMES)
    text = page.read_text(encoding="utf-8")  # decodable
    assert "things <i>" not in text and "<b>&" not in text and "\\udcff" in text


# Which queries ------------------------------------------------------------------------------------


def found_of(domain, recall, mmp, similarity, relevant, index=None):
    n = len(recall)
    queries = data.Split(domain, "test", np.arange(n), pixels=PIXELS[:n])
    neighbours = torch.tensor([[(i + 1) % n, -1] for i in range(n)])
    similarities = torch.tensor([[s, -torch.inf] for s in similarity])
    values = torch.tensor(recall), torch.tensor(mmp), neighbours, similarities
    return Found(queries, index or (queries,), *values, torch.tensor(relevant))


def staged():
    """Domain a has 5 queries, of which 1 cannot be answered; domain b has 2."""
    a = found_of("a", [1, 0, 0, 0, 1], [1, 0.2, 0, 0.2, 0.4], [9, 4, 3, 5, 8], [3, 5, 0, 2, 5])
    b = found_of("b", [0, 1], [0.0, 1.0], [0.5, 0.25], [1, 1])
    return {"a": a, "b": b}


def test_the_worst_queries_of_each_domain_in_turn_and_as_many_at_random():
    places = gallery.chosen(staged(), 12)
    worst = sorted((at["worst"], query) for query, at in places.items() if "worst" in at)
    order = [("a", 3), ("b", 0), ("a", 1), ("b", 1), ("a", 4), ("a", 0)]
    assert [query for _, query in worst] == order
    random = sorted((at["random"], query) for query, at in places.items() if "random" in at)
    assert [place for place, _ in random] == list(range(6))
    assert [domain for _, (domain, _) in random] == ["a", "b", "a", "b", "a", "a"]
    assert gallery.chosen(staged(), 12) == places
    others = [gallery.chosen(staged(), 12, seed) for seed in range(1, 9)]
    assert any(other != places for other in others)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_small_page(count):
    places = gallery.chosen(staged(), count)
    numbers = [sum(name in at for at in places.values()) for name in ("worst", "random")]
    assert numbers == [(count + 1) // 2, count // 2]


# The page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    return gallery.page(staged(), "runs/<one>", ["A & B."], 12)


def test_the_page_needs_no_other_file(page):
    assert "http:" not in page and "https:" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "default-src 'none'" in page and "runs/&lt;one&gt;" in page and "A &amp; B." in page
    assert "1 queries have no image of their class" in page
    assert "6 of the worst queries and 6 random ones" in page


def test_a_card_has_the_facts_of_its_query(page):
    cards = page.split("<article")[1:]
    assert len(cards) == 7
    card = next(card for card in cards if "<h2>a, class 1 " in card)
    assert "miss, mMP@5 20.0 %, 5 images of its class in the index" in card
    assert 'data-kind="O"' in card and "other class, 4.000" in card
    assert card.count("<figure") == 2 and 'class="Q"' in card and 'class="O"' in card


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


SCRIPT = """
const report = [], use = (name, value) => {
  form.elements[name].value = value;
  form.dispatchEvent(new Event("change"));
  report.push([shown.textContent, [...list.children].map(x => x.querySelector("h2").textContent)]);
};
use("order", "worst"); use("order", "random"); use("domain", "b"); use("order", "worst");
use("domain", ""); use("kind", "O"); use("kind", "C");
use("kind", "");
for (const key of "jjk") {
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  report.push([...list.children].indexOf(document.activeElement));
}
report.push([...document.images].filter(image => image.naturalWidth !== 8).length);
document.body.textContent = JSON.stringify(report);
"""


def test_the_page_in_a_browser(browser, page, tmp_path):
    """Order, filters and keys, by a script that is added to the page."""
    file = tmp_path / "page.html"
    script = f"<script>onload = () => {{{SCRIPT}}}</script></body>"
    file.write_text(page.replace("</body>", script), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    finished = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*)</body>", finished.stdout, re.DOTALL)
    assert body, finished.stderr[-2000:]
    worst, random, of_b, worst_of_b, again, other, same, everything, *moves = json.loads(
        html.unescape(body[1])
    )

    def queries(view):
        return [re.match(r"(\w), class (\d)", title).groups() for title in view[1]]

    assert queries(worst) == [*zip("ababaa", "301140")] and worst[0] == "6 queries"
    assert again == everything == worst
    assert len(random[1]) == 6 and [d for d, _ in queries(random)] == ["a", "b", "a", "b", "a", "a"]
    assert sorted(queries(of_b)) == [("b", "0"), ("b", "1")] and of_b[0] == "2 queries"
    assert queries(worst_of_b) == [("b", "0"), ("b", "1")]
    assert other == worst and same == ["0 queries", []], "all labels differ"
    assert moves == [0, 1, 0, 0]
