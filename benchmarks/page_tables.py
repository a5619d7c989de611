"""Tables of the documentation that are written from records, and never by hand.

Between `<!-- table NAME -->` and `<!-- end of table -->` of a page stands what a record
says; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with each named table replaced.

    Raises:
        ValueError: The page has no place for one of them.
    """
    for name, table in tables.items():
        place = re.compile(
            rf"<!-- table {re.escape(name)} -->\n.*?<!-- end of table -->", re.DOTALL
        )
        text = f"<!-- table {name} -->\n\n{table}\n<!-- end of table -->"
        page, count = place.subn(lambda _, text=text: text, page)
        if count != 1:
            raise ValueError(f"need one place for the table {name!r}, got {count}")
    return page


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
