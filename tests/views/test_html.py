"""The pages: what they hold, that they hold nothing from elsewhere, and that a browser shows them as meant."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import cache
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qft.documents.evaluation import EvalDocument, HarnessResult, LayerError, Score, SourceResult, TargetResult
from qft.documents.plan import DataPart, SourceFacts
from qft.documents.rows import Finding, RowLengths, ShownRow, ShownToken
from qft.documents.training import (
    Components,
    Evaluation,
    Evaluations,
    Loss,
    Memory,
    ModelPart,
    Phases,
    Report,
    Throughput,
)
from qft.measure.scores import Answer
from qft.views.html.page import Asked, evaluation_page, side_by_side, training_page
from qft.views.html.rows import rows_page
from tests.support.reports import GIB, report

pytestmark = pytest.mark.pictures

VOID = {"meta", "link", "br", "hr", "img", "input"}
Given = dict[str, tuple[str | None, bool | None]]
EVIL = "<script>alert('ö量😀')</script> & \"q\" $x$"


# ---------------------------------------------------------------------------------------------------------- documents


def training(steps: int = 40, **changes: Any) -> Report:
    """A run that learns, on a GPU of 24 GiB; `changes` by field of the document."""
    numbers = range(1, steps + 1)
    loss = [1 + math.exp(-n / 10) for n in numbers]
    before = Evaluation(step=0, loss=2.5, perplexity=12.18, tokens=900, rows=30, scores={"exact_match": 0.1})
    after = Evaluation(step=steps, loss=1.2, perplexity=3.32, tokens=900, rows=30, scores={"exact_match": 0.8})
    made = report(
        run="runs/first",
        result="runs/first/adapter",
        throughput__tokens_per_second=6123,
        throughput__padding_share=0.1,
        throughput__history=[(n, 6000.0 + n) for n in numbers],
        phases=Phases(data=0.05, forward=0.3, backward=0.6, optimizer=0.05),
        memory=memory(history=[(n, 7 * GIB, 18 * GIB) for n in numbers]),
        loss__history=[(n, x, 1e-4, 0.5) for n, x in enumerate(loss, 1)],
        eval=Evaluations(before=before, after=after),
        lengths=[(50, 10), (100, 20), (150, 0), (200, 3)],
        steps=steps,
        advice=["Take fewer steps."],
    )
    return made.model_copy(update=changes)


def memory(**changes: Any) -> Memory:
    made = Memory(
        peak_gpu_bytes=18 * GIB,
        peak_gpu_reserved_bytes=19 * GIB,
        peak_host_bytes=4 * GIB,
        device_bytes=24 * GIB,
        after_load_bytes=6 * GIB,
        after_first_step_bytes=7 * GIB,
        at_end_bytes=7 * GIB,
        growing=False,
        history=[],
        components=Components(
            base_weights=5 * GIB, trainable_weights=GIB, gradients=GIB, optimizer_state=GIB, activations=10 * GIB
        ),
    )
    return made.model_copy(update=changes)


def pairs(count: int) -> list[Asked]:
    """Every third answer is wrong after the training."""
    right, wrong = ("yes", True), ("no", False)
    return [
        Asked(f"rows.jsonl:{n}", f"Question {n}?", "yes", {"Before": wrong, "After": right if n % 3 else wrong})
        for n in range(1, count + 1)
    ]


def score(value: float, reach: float = 0.02) -> Score:
    return Score(value=value, low=value - reach, high=value + reach)


def target(name: str, number: int = 0, **changes: Any) -> TargetResult:
    perplexity = 7 + 0.1 * number
    fields: dict[str, Any] = {
        "name": name,
        "perplexity": perplexity,
        "perplexity_interval": score(perplexity, 0.3),
        "bits_per_byte": 0.7,
        "eval_tokens": 1000,
        "scores": {"exact_match": score(0.9 - 0.03 * number)},
        "by_source": [SourceResult(source="wiki.jsonl", perplexity=perplexity, eval_tokens=600)],
        "prefill_tokens_per_second": 5000,
        "decode_tokens_per_second": 40,
        "peak_bytes": 8 * GIB,
        "weight_bytes": (16 - number) * GIB,
        "disk_bytes": 0,
    }
    return TargetResult(**fields | changes)


def evaluation(targets: list[TargetResult]) -> EvalDocument:
    return EvalDocument(
        data=["wiki.jsonl"],
        rows=50,
        window=None,
        stride=None,
        reference=targets[0].name if targets else None,
        device="GPU",
        seed=0,
        versions={"torch": "2.10", "gptqmodel": None},
        targets=targets,
        wall_seconds=90,
    )


def layers(blocks: int, kinds: tuple[str, ...] = ("q_proj", "down_proj")) -> list[LayerError]:
    """The later the block, the higher the signal to noise."""
    return [
        LayerError(
            name=f"model.layers.{block}.{kind}",
            block=block,
            kind=kind,
            weight_error=0.1,
            output_snr_db=10.0 + 20 * block / blocks,
            outlier_share=0.01,
            bytes=GIB // 100,
        )
        for block in range(blocks)
        for kind in kinds
    ]


# ------------------------------------------------------------------------------------------------------------- reading


class Page(HTMLParser):
    """The elements of a page with their attributes and their own text; refuses tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, text = self.open.pop()
        assert opened == tag
        self.texts.append((tag, "".join(text)))
        if self.open:
            self.open[-1][1].extend(text)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1][1].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]

    def text(self, tag: str) -> list[str]:
        return [text for found, text in self.texts if found == tag]

    def svg(self, name: str) -> ET.Element:
        """The picture of that name; well-formed, or this raises."""
        for found in re.findall(r"<svg .*?</svg>", self.html, re.DOTALL):
            if f'id="{name}-t"' in found:
                return ET.fromstring(found)
        raise AssertionError(f"no picture {name}")

    def key(self, name: str) -> list[str]:
        """What stands under the picture of that name."""
        figure = next(f for f in re.findall(r"<figure>.*?</figure>", self.html, re.DOTALL) if f'id="{name}-t"' in f)
        return [unescape(text) for text in re.findall(r"</span>([^<]*)</li>", figure)]


def coordinates(path: str) -> list[tuple[float, float]]:
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def lines(svg: ET.Element, colour: str) -> list[list[tuple[float, float]]]:
    return [
        coordinates(path.get("d", ""))
        for path in svg.iter("path")
        if f"stroke: var(--{colour})" in path.get("style", "") and "fill: none" in path.get("style", "")
    ]


def text_boxes(svg: ET.Element) -> Iterator[tuple[str, float, float]]:
    for text in svg.iter("text"):
        yield "".join(text.itertext()), float(text.get("x", "")), float(text.get("y", ""))


def areas_of(svg: ET.Element) -> dict[str, list[float]]:
    """The heights of the corners of each filled area, by its colour; up is more."""
    shapes = {f"#{path.get('id')}": path.get("d", "") for path in svg.iter("path")}
    areas = {}
    for use in svg.iter("use"):
        colour = re.search(r"fill: var\(--(c\d)\)", use.get("style", ""))
        if colour:
            areas[colour[1]] = [-y for _, y in coordinates(shapes[str(use.get("href"))])]
    return areas


def rows_of_two() -> str:
    """Of two sources, with findings of both levels and rows whose tokens count differently."""
    source = SourceFacts(
        path="/data/rows.jsonl", part="train", format="messages", rows=90, unread={"id": 90}, skipped=1, truncated=2,
        tokens=9000, supervised_tokens=3000, longest=400, digest=None, unit="line", weight=2.0,
    )  # fmt: skip
    lengths = RowLengths(
        p5=10, p50=100, p95=300, p99=390, longest=400, padding_share=0.4, histogram=[(100, 50), (200, 0), (400, 40)]
    )
    told = [
        Finding(name=name, level=level, rows=2, places=["/data/rows.jsonl:3"], text="2 of 90 rows", remedy="mend them")
        for name, level in (("bos", "error"), ("secrets", "warn"))
    ]
    data = DataPart(
        train_rows=180, packed_rows=40, eval_rows=9, lengths=lengths, findings=told,
        sources=[source, source.model_copy(update={"part": "eval"})],
    )  # fmt: skip
    tokens = [ShownToken("<|user|>\n", False, 0.5), *[ShownToken("word ", True, 1.0)] * 30, ShownToken("0", True, 0.5)]
    shown = ShownRow(place="/data/rows.jsonl:1", text="", learnt=[], pieces=tokens, images=["cat.png"])
    return rows_page(data, [shown] * 6, "recipe.yaml")


PAGES: dict[str, Callable[[], str]] = {
    "rows": rows_of_two,
    "training": lambda: training_page(training(), pairs(4)),
    "resumed": lambda: training_page(training(1), pairs(1)),
    "evaluation": lambda: evaluation_page(
        evaluation([target(f"t{n}", n, layers=layers(12) if n else []) for n in range(3)]),
        [Asked("a:1", "p", "e", {"t0": ("g", True), "t1": ("x", False)})],
    ),
    "twelve": lambda: evaluation_page(evaluation([target(f"target {n}", n) for n in range(12)])),
    "empty": lambda: evaluation_page(evaluation([])),
}


@cache
def drawn(name: str) -> str:
    """That page; its pictures take a while."""
    return PAGES[name]()


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(drawn(request.param))


# --------------------------------------------------------------------------------------------------------------- tests


def test_a_page_is_one_file_that_loads_and_runs_nothing(page: Page) -> None:
    assert not page.all("script")
    references = [
        value for _, attributes in page.elements for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "srcset", "data") and value is not None
    ]  # fmt: skip
    assert references
    assert all(value.startswith("#") or value == "data:," for value in references)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "@import" not in page.html
    assert "http:" not in page.html
    assert "https:" not in page.html
    assert {f"#{i}" for i in re.findall(r"url\(#([^)]*)\)", page.html)} == set(re.findall(r"url\(([^)]*)\)", page.html))


def test_a_page_can_be_walked_without_seeing_it(page: Page) -> None:
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("nav")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = [a["href"] for a in page.all("a")] + [use["href"] for use in page.all("use")]
    assert {str(link)[1:] for link in pointed} <= set(ids)
    assert str(page.all("a")[0]["class"]) == "skip"
    assert {name for s in page.all("section") for name in str(s["aria-labelledby"]).split()} <= set(ids)
    assert len(page.text("caption")) == len(page.all("table"))
    assert all("scope" in th for th in page.all("th"))
    scrolling = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert len(scrolling) == len(page.all("table"))
    assert all(d["tabindex"] == "0" and d["role"] == "region" and d["aria-label"] for d in scrolling)
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= set(ids)
    assert len(page.text("title")) - 1 == len(page.text("desc")) == len(page.all("svg"))
    assert all(len(text) > 20 and text.endswith(".") for text in page.text("desc"))


def test_pictures_take_the_colours_and_the_font_of_the_page(page: Page) -> None:
    for found in re.findall(r"<svg .*?</svg>", page.html, re.DOTALL):
        ET.fromstring(found)
        assert not re.search(r"#[0-9a-f]{6}\b", found)
        assert "font-family" not in found
        assert set(re.findall(r"var\(--(\w+)\)", found)) <= set(re.findall(r"--(\w+):#", page.html))


@pytest.mark.parametrize("name", PAGES)
def test_the_same_document_gives_the_same_bytes(name: str) -> None:
    assert PAGES[name]() == drawn(name)


def test_the_figures_of_a_training_are_there() -> None:
    page = Page(training_page(training(), pairs(3)))
    headline = dict(zip(page.text("dt"), page.text("dd")[::2], strict=True))
    assert headline["Training loss"] == "1.000"
    assert headline["Held-out loss"] == "1.200"
    assert headline["Exact match"] == "80.0%"
    assert headline["Throughput"] == "6,123"
    assert headline["Peak memory, GPU"] == "18.0 GiB"
    names = {str(svg["aria-labelledby"]).split("-t")[0] for svg in page.all("svg")}
    assert names == {"loss", "rate", "memory", "throughput", "phases", "lengths"}
    assert page.text("li").count("Take fewer steps.") == 1
    everything = " ".join(page.text("td"))
    for figure in ("0.50%", "5.300", "18.0 GiB (19,327,352,832 bytes)", "3,000", "1.1 s", "60.00%", "10.00%"):
        assert figure in everything
    fields = set(page.text("th"))
    for part in (ModelPart, Throughput, Phases, Memory, Components, Loss):
        assert {name.replace("_", " ") for name in part.model_fields} - {"components"} <= fields


def test_the_figures_of_an_evaluation_are_there() -> None:
    other = target(
        "nf4", 2, kl_mean=0.0213, kl_p99=0.31, top1_agreement=0.953, perplexity_change=score(0.031, 0.004),
        score_changes={"exact_match": score(-0.06)}, disk_bytes=5 * GIB,
    )  # fmt: skip
    page = Page(evaluation_page(evaluation([target("bf16"), other])))
    cells = page.text("td")
    for figure in ("7.2006.900 to 7.500", "0.0213", "0.3100", "95.3%", "+3.1%+2.7% to +3.5%", "-6.0-8.0 to -4.0"):
        assert figure in cells
    for figure in ("84.0%82.0% to 86.0%", "0.7000", "5,000", "40.00", "14.0 GiB", "5.0 GiB", "in memory only"):
        assert figure in cells
    assert "7.200600 tokens" in cells
    assert "not installed" in cells
    assert dict(zip(page.text("dt"), page.text("dd")[1::2], strict=True))["Lowest perplexity"] == "bf16"


def test_the_tasks_of_the_harness_are_a_row_a_metric_with_the_targets_side_by_side() -> None:
    def result(value: float | None, **changes: Any) -> HarnessResult:
        fields = {"task": "arc", "version": "1.0", "metric": "acc", "filter": None, "stderr": 0.04, "samples": 1172}
        return HarnessResult(**fields | changes, value=value)

    first = [result(0.5), result(0.25, metric="exact_match", filter="strict", stderr=None)]
    targets = [target("bf16", harness=first), target("nf4", 1, harness=[result(None, stderr=None)])]
    page = Page(evaluation_page(evaluation(targets)))
    rows = re.findall(r"<tr><th scope=.row.>arc</th>(.*?)</tr>", page.html)
    assert [re.sub(r"(<.*?>)+", "|", row) for row in rows] == [
        "|acc|0.5000|± 0.0400|not finite|1,172|",
        "|exact_match|strict|0.2500|not measured|1,172|",
    ]


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    report = training(eval=Evaluations(), memory=memory(peak_gpu_bytes=0, peak_gpu_reserved_bytes=0, history=[]))
    page = Page(training_page(report))
    headline = dict(zip(page.text("dt"), page.text("dd")[::2], strict=True))
    assert headline["Held-out loss"] == "not measured"
    assert "held-out rows" not in page.key("loss")
    assert "The memory over the steps was not measured." in page.text("span")
    assert "Held-out rows: not measured." in page.text("span")
    assert "No answers were kept." in page.text("span")
    assert not [svg for svg in page.all("svg") if "memory" in str(svg["aria-labelledby"])]
    assert '>peak gpu bytes</th><td><span class="missing">not measured<' in page.html

    partial = Page(evaluation_page(evaluation([target("a"), target("b", 1, scores={}, by_source=[])])))
    assert [text for text, *_ in text_boxes(partial.svg("score0")) if text in "ab"] == ["a"]
    assert "For 1 of 2 targets it was not measured." in " ".join(partial.text("desc"))
    assert "The layers were not measured." in partial.text("span")
    assert "No task of lm-evaluation-harness was run." in partial.text("span")
    assert "not measured" in partial.text("td")


def test_empty_histories_make_no_pictures() -> None:
    report = training(
        throughput=training().throughput.model_copy(update={"history": []}),
        loss=training().loss.model_copy(update={"history": []}),
        eval=Evaluations(),
        memory=memory(),
        lengths=[],
        advice=[],
    )
    page = Page(training_page(report))
    assert [svg["aria-labelledby"] for svg in page.all("svg")] == ["phases-t phases-d"]
    said = " ".join(page.text("span"))
    for what in ("loss of each step", "learning rate", "memory over the steps", "throughput", "lengths of the rows"):
        assert what in said


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_a_short_or_constant_run_is_drawn(steps: int) -> None:
    flat = [(n, 1.5, 0.0, 0.0) for n in range(1, steps + 1)]
    loss = Loss(first=1.5, last=1.5, lowest=1.5, spikes=0, history=flat)
    page = Page(training_page(training(steps, loss=loss, eval=Evaluations())))
    svg = page.svg("loss")
    drawn = [y for path in lines(svg, "c1") + lines(svg, "c6") for _, y in path]
    marks = [float(use.get("y", "")) for use in svg.iter("use") if "var(--c" in use.get("style", "")]
    assert drawn or marks
    assert max(drawn + marks) - min(drawn + marks) < 0.1
    assert f"in {steps} step{'s' if steps > 1 else ''}." in " ".join(page.text("desc"))


def test_a_long_run_is_thinned_and_keeps_its_spike() -> None:
    steps = 20_000
    history = [(n, 9.0 if n == 12_345 else 1 + n * 7919 % 101 / 500, 1e-4, 0.5) for n in range(1, steps + 1)]
    html = training_page(training(steps, loss=Loss(first=2, last=1, lowest=1, spikes=1, history=history)), pairs(40))
    assert len(html.encode()) < 1_000_000
    page = Page(html)
    for found in re.findall(r"<svg .*?</svg>", html, re.DOTALL):
        for path in ET.fromstring(found).iter("path"):
            assert len(coordinates(re.sub("[A-Za-z]", "", path.get("d", "")))) <= 1210  # an area has two sides
    (raw,) = lines(page.svg("loss"), "c6")
    assert 100 < len(raw) <= 600
    x, top = min(raw, key=lambda point: point[1])
    others = sorted(y for _, y in raw)
    assert others[1] - top > 50
    left, right = raw[0][0], raw[-1][0]
    assert (x - left) / (right - left) == pytest.approx(12_345 / steps, abs=0.01)
    tables = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert max(table.count("<tr>") for table in tables) < 40
    assert "As a table: 25 of 20,000 rows" in page.text("summary")


def test_the_curve_is_the_data() -> None:
    losses = [(1, 1.0), (2, 3.0), (3, 2.0), (4, 2.0)]
    history = [(n, x, 1e-4, 1.0) for n, x in losses]
    report = training(4, loss=Loss(first=1, last=2, lowest=1, spikes=0, history=history), eval=Evaluations())
    (drawn,) = lines(Page(training_page(report)).svg("loss"), "c1")
    height = (drawn[0][1] - drawn[1][1]) / 2
    assert [(drawn[0][1] - y) / height for _, y in drawn] == pytest.approx([0, 2, 1, 1], abs=0.01)
    width = drawn[1][0] - drawn[0][0]
    assert [(x - drawn[0][0]) / width for x, _ in drawn] == pytest.approx([0, 1, 2, 3], abs=0.01)


def test_memory_is_stacked_up_to_the_measured_line() -> None:
    history = [(n, 7 * GIB, (12 + n) * GIB) for n in range(1, 7)]
    page = Page(training_page(training(memory=memory(history=history))))
    svg = page.svg("memory")
    areas = areas_of(svg)
    assert set(areas) == {"c1", "c2", "c3", "c4", "c5"}
    zero, top = min(areas["c3"]), max(areas["c1"])
    unit = (top - zero) / 18
    assert (max(areas["c3"]) - zero) / unit == pytest.approx(5, abs=0.05)
    assert (min(areas["c1"]) - zero) / unit == pytest.approx(8, abs=0.05)
    assert "activations: 10.0 GiB" in page.key("memory")
    assert "the device's limit: 24.0 GiB" in page.key("memory")
    away = Page(training_page(training(memory=memory(history=history, device_bytes=80 * GIB))))
    assert not [label for label in away.key("memory") if "limit" in label]
    assert "80.0 GiB, which is beyond the picture" in " ".join(away.text("desc"))


def test_what_a_process_holds_besides_its_parts_is_named() -> None:
    host = memory(peak_gpu_bytes=0, peak_host_bytes=22 * GIB, history=[(1, 8 * GIB, 22 * GIB), (2, 8 * GIB, 22 * GIB)])
    page = Page(training_page(training(2, memory=host)))
    assert "Memory of the process" in page.text("h3")
    assert "the rest of the process: 4.0 GiB" in page.key("memory")


def test_names_and_answers_are_text_and_nothing_else() -> None:
    given: Given = {"Before": (EVIL, False), "After": (f"{EVIL}\x00\x1b\ud800", False)}
    model = training().model.model_copy(update={"path": EVIL, "device": EVIL})
    pages = [
        Page(training_page(training(run=EVIL, model=model, advice=[EVIL]), [Asked(EVIL, EVIL, EVIL, given)])),
        Page(
            evaluation_page(
                evaluation([target(EVIL, scores={EVIL: score(0.5)}, layers=layers(2, (EVIL,))), target("plain", 1)]),
                [Asked(EVIL, EVIL, EVIL, {EVIL: (EVIL, True)})],
            )
        ),
    ]
    for page in pages:
        assert not page.all("script")
        page.html.encode()
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.html)
    assert EVIL in pages[0].text("pre")
    assert f"{EVIL}\ufffd\ufffd\ufffd" in pages[0].text("pre")
    assert EVIL in pages[0].text("li")
    assert any(EVIL in text for text in pages[1].text("th"))
    assert any("$x$" in text for text in pages[1].text("text"))


def test_at_most_twenty_answers_are_shown_and_the_wrong_ones_first() -> None:
    page = Page(training_page(training(), pairs(50)))
    summaries = [text for text in page.text("summary") if text.startswith("rows.jsonl")]
    assert len(summaries) == 20
    verdicts = [re.findall("right|wrong", text)[-1] for text in summaries]
    assert verdicts == ["wrong"] * 16 + ["right"] * 4
    assert "20 of 50 rows, the wrong ones first." in page.text("p")
    resumed = Asked("a:1", "p" * 50_000, "e", {"Before": (None, None), "After": ("x", True)})
    long = Page(training_page(training(), [resumed]))
    assert "characters …]" in long.html
    assert len(long.html) < 200_000
    assert "not asked" in long.text("span")


def test_answers_of_targets_stand_side_by_side() -> None:
    right, wrong = (dict[str, Any]((name, (f"{name}{n}", n == 1)) for name in ("a", "b")) for n in (1, 2))
    answers = [Asked("r:1", "one", "e", right), Asked("r:2", "two", "e", wrong)]
    page = Page(evaluation_page(evaluation([target("a"), target("b", 1)]), answers))
    assert page.text("pre") == ["two", "e", "a2", "b2", "one", "e", "a1", "b1"]


def test_each_row_is_shown_once_with_the_answers_of_all() -> None:
    answers = {
        "a": [Answer(0, 1, "one", "e", "e"), Answer(0, 2, "two", "e", "x")],
        "b": [Answer(0, 2, "two", "e", "e")],
    }
    assert side_by_side(answers, lambda source, row: f"r:{row}") == [
        Asked("r:1", "one", "e", {"a": ("e", True), "b": (None, None)}),
        Asked("r:2", "two", "e", {"a": ("x", False), "b": ("e", True)}),
    ]


def test_scores_are_points_on_their_intervals() -> None:
    values = [0.5, 0.9, 0.7]
    targets = [target(f"t{n}", n, scores={"f1": score(value, 0.05)}) for n, value in enumerate(values)]
    svg = Page(evaluation_page(evaluation(targets))).svg("score0")
    bars = lines(svg, "c2") + lines(svg, "c1")  # the reference first
    marks = [
        float(use.get("x", "")) for use in svg.iter("use") if re.search(r"fill: var\(--c[12]\)", use.get("style", ""))
    ]
    assert [(bar[0][0] + bar[1][0]) / 2 for bar in bars] == pytest.approx(marks, abs=0.1)
    scale = (marks[1] - marks[0]) / 0.4
    assert marks[2] - marks[0] == pytest.approx(0.2 * scale, abs=0.1)
    assert [bar[1][0] - bar[0][0] for bar in bars] == pytest.approx([0.1 * scale] * 3, abs=0.1)


def test_the_map_of_layers_has_a_cell_a_layer_in_the_shade_of_its_level() -> None:
    found = [
        *layers(10),
        LayerError(**layers(1)[0].model_dump() | {"name": "lm_head", "block": None, "kind": "lm_head"}),
    ]
    del found[7]
    page = Page(evaluation_page(evaluation([target("bf16"), target("nf4", 1, layers=found)])))
    svg = page.svg("layers0")
    cells: dict[str, list[float]] = {}
    for path in svg.iter("path"):
        if shade := re.search(r"fill: var\(--(h\d)\)", path.get("style", "")):
            corners = [
                coordinates(part)[0]
                for part in re.split("M", path.get("d", ""))[1:]
                for part in [re.sub("[A-Za-z]", "", part)]
            ]
            cells[shade[1]] = [x for x, _ in corners]
    assert sum(map(len, cells.values())) == 19
    assert min(cells["h0"]) < min(cells["h7"])  # the lowest signal to noise has the strongest shade
    assert "not measured" in page.key("layers0")
    assert "lowest, 10.0 dB, in q_proj of block 0." in " ".join(page.text("desc"))
    assert any("lm_head" in text for text in page.text("th"))


def test_layers_that_are_all_alike_have_a_level_of_their_own() -> None:
    alike = [layer.model_copy(update={"output_snr_db": 20.0}) for layer in layers(3)]
    page = Page(evaluation_page(evaluation([target("nf4", layers=alike)])))
    assert len(page.key("layers0")) == len(set(page.key("layers0")))
    assert "20.0 dB at the median of 6 layers" in " ".join(page.text("desc"))


@pytest.mark.parametrize("count", [1, 2, 12])
def test_every_target_has_its_name_beside_its_point_and_on_no_other(count: int) -> None:
    targets = [target(f"a model of a name {n}", n % 5, weight_bytes=5 * GIB) for n in range(count)]
    names = [
        (x, y)
        for text, x, y in text_boxes(Page(evaluation_page(evaluation(targets))).svg("quality"))
        if text.startswith("a model")
    ]
    assert len(names) == count
    heights = sorted(y for _, y in names)
    assert all(b - a >= 12 for a, b in pairwise(heights))


def test_a_target_that_quantizing_broke_does_not_flatten_the_others() -> None:
    broken = target("2bit", 1, perplexity=90_000.0, perplexity_interval=score(90_000, 1000))
    page = Page(evaluation_page(evaluation([target("bf16"), target("nf4", 1), broken])))
    assert "perplexity, log scale" in {text for text, *_ in text_boxes(page.svg("quality"))}


def test_a_big_evaluation_stays_small() -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = [target(f"{n}: {EVIL}", n, layers=layers(40, kinds)) for n in range(12)]
    given: Given = {t.name: ("量" * 3000, False) for t in targets}
    answers = [Asked(f"r:{i}", "量" * 3000, "e", given) for i in range(30)]
    assert len(evaluation_page(evaluation(targets), answers).encode()) < 1_000_000


def test_importing_the_pages_is_cheap() -> None:
    code = "import sys, qft.views.html.page; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------- the browser

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
# Every element with text of its own: its colour against the first background behind it that is not transparent.
LOW_CONTRAST = """
const parse = colour => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = parse(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return parse(getComputedStyle(document.documentElement).backgroundColor);
};
const found = [];
let seen = 0;
for (const element of document.body.querySelectorAll('*')) {
  if (![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  if (['title', 'desc'].includes(element.tagName)) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(parse(element instanceof SVGElement ? style.fill : style.color)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  seen += 1;
  if (ratio < 4.5) found.push([element.tagName, element.textContent.slice(0, 30), ratio]);
}
return [seen, found, light(behind(document.body))];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    for needed in (CHROMIUM, DRIVER):
        if not needed.exists():
            pytest.skip(f"needs {needed}")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.mark.parametrize("name", ["training", "evaluation", "rows"])
def test_a_browser_shows_it_in_light_and_dark_and_on_a_phone(name: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / f"{name}.html"
    path.write_text(PAGES[name](), "utf-8")
    ground = {}
    for theme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for width in (1100, 360):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(path.as_uri())
            browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            seen, low, ground[theme] = browser.execute_script(LOW_CONTRAST)
            assert seen > 100
            assert low == []
            widths = "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
            assert min(browser.execute_script(widths)) > 250
    assert ground["light"] > 0.8
    assert ground["dark"] < 0.1
    browser.get(path.as_uri())
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    focused = browser.switch_to.active_element
    assert focused.get_attribute("class") == "skip"
    assert focused.rect["y"] >= 0
    focused.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "main"
    assert browser.get_log("browser") == []
