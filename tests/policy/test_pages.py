"""What the pages on formats and policies show is what really happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from castwise.errors import CastwiseError
from castwise.policy import ModuleFacts, Policy, json_schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["docs/formats.md", "docs/policy.md", "src/castwise/policy/README.md"]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


class Net(nn.Module):
    """A model with the modules that the page speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"norm": nn.LayerNorm(3)})
        self.solver = nn.ModuleDict({"propagator": nn.Linear(3, 3)})


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reader may paste every Python block, in order, into one session."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": Net()}
    found = blocks(page, "python")
    assert found
    for code in found:
        exec(code, names)  # noqa: S102 -- our own page
    printed = capsys.readouterr().out
    if page == "docs/policy.md":
        assert printed in blocks(page, "text")
    for code in found:
        for promised in re.findall(
            r"print\(.*\)\s+# (\w.*?)(?: \.\.\.\))?$", code, re.MULTILINE
        ):
            assert promised in printed


def test_the_policies_of_the_page_are_policies() -> None:
    """Every YAML block reads, and uses every key that the file has."""
    texts = blocks("docs/policy.md", "yaml")
    for text in texts:
        Policy.parse(text)
    keys = set(json_schema()["properties"])
    assert all(re.search(rf"^{key}:", texts[0], re.MULTILINE) for key in keys)


MISTAKES = [
    "  - modul: a\n    precision: fp32\n",
    "  - module: a\n    precision: c=bfloat16\n",
    "  - module: encodr.*\n    precision: fp32\n",
    (
        "  - module: solver.*\n    precision: fp32\n"
        "  - module: solver.*\n    precision: bf16\n"
    ),
]


def test_the_messages_of_the_page_are_real_ones() -> None:
    """Each message that the page quotes is raised by such a mistake."""
    facts = [ModuleFacts(fqn=fqn) for fqn in ("encoder.0", "encoder.1", "head")]
    messages = []
    for rules in MISTAKES:
        text = f"castwise: 1\ndefault: fp32\nrules:\n{rules}"
        with pytest.raises(CastwiseError) as caught:
            Policy.parse(text, where="policy.yaml").bind(facts)
        messages.append(str(caught.value))
    assert "\n".join(messages) + "\n" in blocks("docs/policy.md", "text")
