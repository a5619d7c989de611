import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castwise.errors import DataError, SettingsError, StorageError
from castwise.report import (
    Bars,
    Column,
    DataTable,
    Drawing,
    Fact,
    Facts,
    HeatTable,
    Histogram,
    Lines,
    Marker,
    Measured,
    Note,
    Report,
    Section,
    Series,
    Tile,
    Verdict,
    read_report,
    render_page,
    write_report,
)
from castwise.report.document import from_json, to_json

EVIL = "<script>alert('x')</script> & \"quoted\" </title></script> {{ 7 * 7 }}"

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Reads a page, checking that every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        assert len(dict(attrs)) == len(attrs), f"an attribute stands twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Match it."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep the text with the element that holds it."""
        if self._open and data.strip():
            self.texts.append((self._open[-1], " ".join(data.split())))

    def text(self) -> str:
        """All visible text."""
        hidden = {"script", "style", "title", "desc"}
        return " ".join(text for tag, text in self.texts if tag not in hidden)

    def all(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of each element of a kind."""
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(*blocks: Any) -> Page:
    """Render blocks in a report of one section."""
    return Page(render_page(report_of(*blocks)))


def report_of(*blocks: Any) -> Report:
    """Put blocks into a report of one section."""
    section = Section(title="Only", blocks=blocks)
    return Report(title="t", verdict=Verdict(text="v"), sections=(section,))


def numbers(page: Page) -> list[float]:
    """Every coordinate of every picture."""
    found = []
    for tag, attributes in page.tags:
        names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d")
        if tag in {"rect", "line", "circle", "text", "path"}:
            for name in names:
                found += re.findall(
                    r"-?\d+(?:\.\d+)?|nan|inf", attributes.get(name) or ""
                )
    return [float(text) for text in found]


def test_the_page_says_everything_that_the_report_says(sample: Report) -> None:
    """Every text of every record stands on the page."""
    page = Page(render_page(sample))
    everything = " ".join(
        text for _, text in page.texts if _ not in {"script", "style"}
    )
    missing = [
        text
        for text in texts_of(sample)
        for part in re.split(r"\n\n", text)
        if " ".join(part.split()) not in everything
    ]
    assert missing == []


def texts_of(value: Any) -> list[str]:
    """Every text of a record that is meant for the reader."""
    silent = {"mark", "spelling", "y_spelling", "svg", "alt"}
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, tuple):
        return [text for item in value for text in texts_of(item)]
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.name not in silent]
        return [text for name in names for text in texts_of(getattr(value, name))]
    return []


def test_the_page_loads_nothing_and_runs_nothing(sample: Report) -> None:
    """No address, no script but data, no handler; a policy forbids them besides."""
    html = render_page(sample)
    page = Page(html)
    markup, _ = html.split('<script type="application/json"')  # data load nothing
    assert re.findall(r"https?:|@import|url\(|src=", markup) == []
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "img", "object", "embed", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href", "action"}:
                assert (value or "").startswith("#"), (tag, name, value)
    assert [script["type"] for script in page.all("script")] == ["application/json"]
    policy = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    targets = {a["href"] for a in page.all("a")}
    assert targets == {f"#{s['id']}" for s in page.all("section")}


def test_every_text_is_escaped() -> None:
    """Hostile texts in every place come out as texts."""
    page_texts = report_of(
        Facts(
            title=EVIL, facts=(Fact(name=EVIL, value=EVIL, asked=EVIL, because=EVIL),)
        ),
        DataTable(
            title=EVIL,
            caption=EVIL,
            columns=(Column(name=EVIL, unit=EVIL, spelling="text"),),
            rows=((EVIL,),),
        ),
        DataTable(title=EVIL, columns=(), rows=(), folded=True),
        Lines(
            title=EVIL,
            series=(
                Series(name=EVIL, xs=(1.0, 2.0), ys=(1.0, math.nan)),
                Series(name=EVIL, xs=(), ys=()),
            ),
            x_label=EVIL,
            y_label=EVIL,
            caption=EVIL,
            markers=(Marker(name=EVIL, x=1.0),),
        ),
        Bars(title=EVIL, names=(EVIL,), values=(Measured(value=1.0),), caption=EVIL),
        Histogram(title=EVIL, edges=(0.0, 1.0), counts=(1.0,), x_label=EVIL),
        HeatTable(
            title=EVIL, row_names=(EVIL,), column_names=(EVIL,), values=((0.5,),)
        ),
        Drawing(title=EVIL, svg="<svg><text>a &lt;b&gt;</text></svg>", alt=EVIL),
        Note(text=EVIL, mark="bad"),
    )
    hostile = dataclasses.replace(
        page_texts,
        title=EVIL,
        subtitle=EVIL,
        footer=EVIL,
        verdict=Verdict(text=EVIL, because=EVIL, mark="good"),
        tiles=(Tile(name=EVIL, value=EVIL, detail=EVIL),),
    )
    html = render_page(hostile)
    page = Page(html)
    assert len(page.all("script")) == 1
    assert html.count("<script") == 1
    assert "49" not in page.text()
    assert page.text().count("alert('x')") >= 25
    (data,) = [text for tag, text in page.texts if tag == "script"]
    assert repr(from_json(data)) == repr(hostile)  # repr: nan equals nan


def test_the_same_content_stands_in_the_page_and_beside_it(
    sample: Report, tmp_path: Path
) -> None:
    """`report.json` reads back as the same value; so does the JSON in the page."""
    path = write_report(sample, tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    (data,) = [text for tag, text in Page(html).texts if tag == "script"]
    beside = read_report(tmp_path / "report.json")
    assert repr(beside) == repr(sample)  # repr: nan equals nan
    assert repr(from_json(data)) == repr(sample)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


def test_the_sample_uses_every_field_of_every_record(sample: Report) -> None:
    """So that the round trip and the page are tests of all of them."""
    used: dict[str, set[str]] = {}

    def visit(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                visit(item)
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                item = getattr(value, f.name)
                if item != f.default:
                    used.setdefault(type(value).__name__, set()).add(f.name)
                visit(item)

    visit(sample)
    from castwise.report import records

    for name, record in vars(records).items():
        if dataclasses.is_dataclass(record):
            assert used[name] == {f.name for f in dataclasses.fields(record)}, name


def test_pictures_are_named_and_described(sample: Report) -> None:
    """Who cannot see a chart hears what it shows."""
    page = Page(render_page(sample))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    charts = [svg for svg in page.all("svg") if svg.get("class") == "chart"]
    assert len(charts) == 2 * 4  # wide and narrow
    for chart in charts:
        assert chart["role"] == "img"
        assert set((chart["aria-labelledby"] or "").split()) <= set(ids)
    words = " ".join(text for tag, text in page.texts if tag == "desc")
    assert "training: 300 points, from 1.6" in words
    assert "1 of them not finite" in words
    assert "castwise small 95.4 %" in words
    (drawing,) = [svg for svg in page.all("svg") if "aria-label" in svg]
    assert drawing["aria-label"] == "A solved 4x4 puzzle"
    for head in page.all("th"):
        assert head["scope"] in {"col", "row"}


def test_numbers_are_set_flush_and_marked_by_sign_and_colour(sample: Report) -> None:
    """A column of numbers aligns; good and bad are never told by colour alone."""
    page = Page(render_page(sample))
    assert "99.0 %" in page.text() or "98.9 %" in page.text()
    cells = [cell["class"] or "" for cell in page.all("td") if "class" in cell]
    marked = [css for css in cells if re.search("good|bad", css)]
    signs = [s for s in page.all("span") if (s.get("class") or "").startswith("sign")]
    assert len(marked) >= 4
    assert len(signs) >= len(marked)
    assert all("number" in css for css in marked)
    assert all(sign["aria-label"] in {"good", "bad", "warning"} for sign in signs)


floats = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=100, deadline=None)
@given(
    ys=st.lists(floats, max_size=12),
    log=st.booleans(),
    spelling=st.sampled_from(["number", "percent", "bytes"]),
)
def test_any_values_can_be_drawn(ys: list[float], log: Any, spelling: Any) -> None:
    """No value breaks a chart, and none is drawn outside of it."""
    xs = tuple(float(i) for i in range(len(ys)))
    measured = tuple(Measured(value=y, low=y, high=y) for y in ys)
    page = page_of(
        Lines(
            title="l",
            series=(Series(name="s", xs=xs, ys=tuple(ys)),),
            log_y=log,
            y_spelling=spelling,
        ),
        Bars(title="b", names=("n",) * len(ys), values=measured, spelling=spelling),
        Histogram(
            title="h", edges=tuple(map(float, range(len(ys) + 1))), counts=tuple(ys)
        ),
        HeatTable(
            title="t",
            row_names=("r",),
            column_names=("c",) * len(ys),
            values=(tuple(ys),),
        ),
    )
    assert all(map(math.isfinite, numbers(page)))


@pytest.mark.parametrize(
    "ys", [(0.0,), (5.0, 5.0), (1e-300, 1e300), (-1.0, 0.0), (1e8, 1e8 + 1)]
)
@pytest.mark.parametrize("log", [False, True])
def test_a_curve_stays_inside_its_picture(ys: tuple[float, ...], log: Any) -> None:
    """Constant, extreme and negative values, on both kinds of axis."""
    xs = tuple(map(float, range(len(ys))))
    series = Series(name="s", xs=xs, ys=ys)
    page = page_of(Lines(title="l", series=(series,), log_y=log))
    assert all(-20 <= number <= 800 for number in numbers(page))
    if log and ys == (-1.0, 0.0):
        assert any(path.get("class") == "cross" for path in page.all("path"))


def test_long_curves_keep_their_extremes_in_few_points() -> None:
    """A spike of one step in 100,000 is seen, in a page of reasonable size."""
    ys = [1.0] * 100_000
    ys[54_321] = 9.0
    ys[70_000] = math.inf
    xs = tuple(map(float, range(len(ys))))
    page = page_of(Lines(title="l", series=(Series(name="s", xs=xs, ys=tuple(ys)),)))
    curve = next(p for p in page.all("path") if (p.get("class") or "") == "curve s-c1")
    points = re.findall(r"[ML]([\d.]+) ([\d.]+)", curve["d"] or "")
    heights = [float(y) for _, y in points]
    assert len(points) < 2000
    assert max(heights) - min(heights) > 150
    assert any(path.get("class") == "cross" for path in page.all("path"))


@pytest.mark.parametrize(
    "svg",
    [
        "<svg><script>1</script></svg>",
        "<svg onload='x'/>",
        "<svg><a href='#'/></svg>",
        "<svg><image href='x'/></svg>",
        "<svg><use href='#a'/></svg>",
        "<svg><style>*{}</style></svg>",
        "<svg><rect style='fill:red'/></svg>",
        "<svg><rect fill='url(http://x)'/></svg>",
        "<svg><foreignObject/></svg>",
        "<!DOCTYPE svg [<!ENTITY a 'b'>]><svg>&a;</svg>",
        "<?xml-stylesheet href='x'?><svg/>",
        "<svg><title><![CDATA[</title><script>1</script>]]></title></svg>",
        "<p/>",
        "<svg>",
        "",
        "text",
        "<html:svg xmlns:html='http://www.w3.org/1999/xhtml'/>",
    ],
)
def test_a_drawing_that_could_run_or_load_is_refused(svg: str) -> None:
    """Shapes and text only."""
    with pytest.raises(SettingsError, match="drawing 'd' needs one svg element"):
        Drawing(title="d", svg=svg, alt="a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Series(name="s", xs=(1.0,), ys=()), "as many xs as ys, got 1 and 0"),
        (lambda: Bars(title="b", names=("a",), values=()), "names as values"),
        (lambda: Histogram(title="h", edges=(1.0,), counts=(1.0,)), "one edge more"),
        (lambda: Histogram(title="h", edges=(1.0, 1.0), counts=(1.0,)), "ascending"),
        (
            lambda: DataTable(columns=(Column(name="c"),), rows=((1.0,), ())),
            "needs 1 cells in each row, got 0 in row 1",
        ),
        (
            lambda: HeatTable(
                title="t", row_names=("r",), column_names=(), values=((1.0,),)
            ),
            "1 rows of 0 values",
        ),
        (lambda: Marker(name="m", x=math.nan), "finite place"),
    ],
)
def test_records_that_contradict_themselves_are_refused(
    make: Any, message: str
) -> None:
    """When they are made, not when they are drawn."""
    with pytest.raises(SettingsError, match=message):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[]",
        "{}",
        '{"record": "Note", "text": "x"}',
        '{"record": "Nothing"}',
        '{"record": "Report"}',
        '{"record": "Report", "title": "t", "more": 1}',
        '{"record": "float", "value": "x"}',
        '{"record": "Series", "name": "s", "xs": [1], "ys": []}',
        "[" * 90000,
    ],
)
def test_a_foreign_report_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    """Whatever the JSON says."""
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"report\.json is no report of castwise"):
        read_report(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="no UTF-8"):
        read_report(path)


def test_storage_errors_are_one_sentence(sample: Report, tmp_path: Path) -> None:
    """A folder that is not there."""
    with pytest.raises(StorageError, match="create the folder first"):
        write_report(sample, tmp_path / "missing" / "report.html")
    with pytest.raises(StorageError, match="cannot read"):
        read_report(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_report_is_a_page() -> None:
    """Nothing but a title and a verdict."""
    empty = Report(title="Nothing", verdict=Verdict(text="Nothing ran."), sections=())
    page = Page(render_page(empty))
    assert "Nothing ran." in page.text()
    assert from_json(to_json(empty)) == empty
