"""The house itself: its map, its storeys' promises, its command line, its examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "castwise"


def rooms_of_the_tree() -> set[str]:
    """Every Python room below src/castwise, package markers aside."""
    return {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"}
    }


def rooms_of_the_map() -> set[str]:
    """Every Python room that the README's map names, with its folder."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```text\nsrc/castwise/\n(.*?)```", text, re.DOTALL)
    assert block, "the README needs a map that starts with src/castwise/"
    rooms: set[str] = set()
    folders: list[str] = []
    for line in block.group(1).splitlines():
        indent = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0] if line.split() else ""
        folders = folders[: max(indent, 0)]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            rooms.add("".join(folders) + name)
    return rooms


def test_the_map_in_the_readme_is_the_real_tree() -> None:
    """A newcomer finds every room on the map, and no room that does not exist."""
    assert rooms_of_the_map() == rooms_of_the_tree()


def test_basenames_say_what_a_room_is() -> None:
    """No room is called utils, common, misc, helpers or base, and none is numbered."""
    forbidden = re.compile(r"(utils?|common|misc|helpers?|base)|.*\d+")
    assert not [r for r in rooms_of_the_tree() if forbidden.fullmatch(Path(r).stem)]


def test_every_room_opens_by_teaching() -> None:
    """Every room starts with a docstring."""
    for room in rooms_of_the_tree():
        assert (SOURCE / room).read_text().startswith(('"""', 'r"""')), room


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_castwise_loads_no_torch_and_no_integration() -> None:
    """`import castwise` is free: torch, CUDA and integrations load when used."""
    code = (
        "import sys, castwise; "
        "print([m for m in ('torch', 'lightning', 'transformers', 'numba', "
        "'matplotlib') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_importing_the_command_line_loads_no_torch() -> None:
    """`castwise --help` answers at once because torch waits until a command runs."""
    assert python("import sys, castwise.cli; print('torch' in sys.modules)") == "False"


def test_using_the_library_starts_no_cuda() -> None:
    """Public names can be fetched without a CUDA context."""
    code = (
        "import castwise, torch; [getattr(castwise, n) for n in castwise.__all__]; "
        "print(torch.cuda.is_initialized())"
    )
    assert python(code) == "False"


def test_every_public_name_exists_and_is_documented() -> None:
    """The table of public names has no dead entry."""
    import castwise

    for name in castwise.__all__:
        thing = getattr(castwise, name)
        assert name == "__version__" or thing.__doc__, name


def help_of(*command: str) -> str:
    """Return the help text of a command, unwrapped."""
    done = subprocess.run(
        [sys.executable, "-m", "castwise", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    return done.stdout


def commands(group: click.Group, path: str = "castwise") -> Iterator[tuple[str, str]]:
    """Every command with its flags, groups that only hold others left out."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            options = [p for p in command.params if isinstance(p, click.Option)]
            flags = {flag for option in options for flag in option.opts}
            yield f"{path} {name}", " ".join(sorted({*flags, "--help"}))


def test_the_flags_of_the_command_line_are_frozen() -> None:
    """A flag is a promise: adding or dropping one changes tests/cli_flags.txt too."""
    from castwise.cli import root

    lines = (ROOT / "tests" / "cli_flags.txt").read_text().splitlines()
    frozen = {name.strip(): flags.strip() for name, _, flags in map(cut, lines)}
    assert dict(commands(root)) == frozen


def cut(line: str) -> tuple[str, str, str]:
    """Split a line of cli_flags.txt at its first colon."""
    return line.partition(":")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=str)
def test_documented_examples_run(example: Path) -> None:
    """Every file of examples/ runs to its end without a warning."""
    subprocess.run([sys.executable, "-W", "error", example], check=True, timeout=120)


def test_no_file_speaks_of_a_machine() -> None:
    """Tracked text names no absolute path of somebody's machine."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    bad = re.compile(r"(?<![\w.~])/(home|root|work|Users)/")
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt"}:
            text = path.read_text()
            if name != "tests/test_house.py":
                assert not bad.search(text), name
