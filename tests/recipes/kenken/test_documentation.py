from __future__ import annotations

import re
from pathlib import Path

import pytest

from castwise.errors import PuzzleError
from castwise.recipes.kenken.exact import Outcome, solve
from castwise.recipes.kenken.notation import parse_puzzles

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


def blocks(name: str, language: str) -> list[str]:
    """Read the fenced blocks of a page."""
    text = (DOCS / name).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("language", ["text", "json"])
def test_documented_puzzles_have_one_solution(language: str) -> None:
    """The examples of the format page are read and are real puzzles."""
    (puzzle,) = parse_puzzles(blocks("puzzle_format.md", language)[0])
    arrays = puzzle.arrays()
    verdict = solve(puzzle.mode, *arrays[:3], hints=arrays.hints)
    assert verdict.outcome is Outcome.UNIQUE


def test_the_documented_message_is_the_one_that_is_printed() -> None:
    """A target that nothing makes is refused in the words of the format page."""
    text = blocks("puzzle_format.md", "json")[0].replace('"2-"', '"3-"')
    with pytest.raises(PuzzleError) as raised:
        parse_puzzles(text, "puzzle.txt")
    sentence = str(raised.value).partition(": ")[2]
    assert sentence in blocks("puzzle_format.md", "text")[1]


@pytest.mark.parametrize(
    "page", [DOCS / "kenken_data.md", ROOT / "src/castwise/recipes/kenken/README.md"]
)
def test_documented_programs_run(page: Path) -> None:
    """What the pages show can be pasted."""
    programs = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert programs
    for program in programs:
        exec(compile(program, str(page), "exec"), {})  # noqa: S102 -- our own pages


def test_the_readme_names_every_room() -> None:
    """The map of the recipe's folder is the folder."""
    folder = ROOT / "src/castwise/recipes/kenken"
    named = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text()))
    named = {name for name in named if name != "kenken_data.py"}
    assert named == {path.name for path in folder.glob("[!_]*.py")}
