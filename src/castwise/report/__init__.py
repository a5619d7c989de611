"""Reports: plain records in, one self-contained HTML page out.

    report = Report(title="kenken", verdict=Verdict(...), sections=(Section(...),))
    write_report(report, "runs/7/report.html")      # and report.json beside it

Five rooms and the two files of the page:

    records.py        what a report may say: facts, tables, charts, drawings, notes
    document.py       the same as JSON, and back
    axes.py           scales, ticks and the spelling of numbers
    charts.py         pictures as SVG that follow the reader's light or dark theme
    page.py           the page: page.html.jinja and page.css, nothing from elsewhere

Records reach a report as values, so that it knows no recipe and no training loop.
"""

from __future__ import annotations

from castwise.report.document import read_report as read_report
from castwise.report.page import render_page as render_page
from castwise.report.page import write_report as write_report
from castwise.report.records import Band as Band
from castwise.report.records import Bars as Bars
from castwise.report.records import Column as Column
from castwise.report.records import DataTable as DataTable
from castwise.report.records import Drawing as Drawing
from castwise.report.records import Fact as Fact
from castwise.report.records import Facts as Facts
from castwise.report.records import HeatTable as HeatTable
from castwise.report.records import Histogram as Histogram
from castwise.report.records import Lines as Lines
from castwise.report.records import Marker as Marker
from castwise.report.records import Measured as Measured
from castwise.report.records import Note as Note
from castwise.report.records import Report as Report
from castwise.report.records import Section as Section
from castwise.report.records import Series as Series
from castwise.report.records import Tile as Tile
from castwise.report.records import Verdict as Verdict
