"""Options that the commands on a user's own model share, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castwise.errors import SettingsError, StorageError

if TYPE_CHECKING:
    from castwise.policy import Policy
    from castwise.report import Report

DEFAULT_POLICY = "bf16-mixed"
SUCCESS, FAILURE = 0, 1

target_argument = click.argument("target", metavar="FILE.py:FUNCTION")
json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Also write the record, as JSON.",
)
report_option = click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path),
    help="Also write the report, one HTML file.",
)


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --policy and --preset; read them with `chosen_policy`."""
    command = click.option(
        "--policy", type=click.Path(path_type=Path), help="A policy file."
    )(command)
    return click.option(
        "--preset",
        metavar="NAME",
        help=f"A policy preset by its name.  [default: {DEFAULT_POLICY}]",
    )(command)


def evidence_command(
    name: str,
) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command that looks at a target under a policy, and writes what it saw.

    It is called with `target`, `policy`, `preset`, `report_path`, `json_path` and its
    own options; `write_evidence` does the writing.
    """

    def made(command: Callable[..., int]) -> click.Command:
        for add in (json_option, report_option, policy_options, target_argument):
            command = add(command)
        return click.command(name)(command)

    return made


def write_evidence(
    record: Any,
    json_path: Path | None,
    report: Callable[[], Report],
    report_path: Path | None,
) -> None:
    """Write the record and the page, where they are asked for.

    Raises:
        StorageError: A file cannot be written.
    """
    if json_path is not None:
        write_json(record, json_path)
    if report_path is not None:
        from castwise.report import write_report

        write_report(report(), report_path)


def chosen_policy(policy: Path | None, preset: str | None) -> Policy:
    """Return the policy that the flags name.

    Raises:
        SettingsError: Both were given.
        PolicyError: The preset is unknown or the file malformed.
        StorageError: The file cannot be read.
    """
    from castwise import policy as policies

    if policy is not None and preset is not None:
        raise SettingsError(
            "One flag decides the policy, and --policy and --preset were given; keep "
            "one of them."
        )
    if policy is not None:
        return policies.Policy.load(policy)
    return policies.preset(preset or DEFAULT_POLICY)


def write_json(record: Any, path: Path) -> None:
    """Write a record of plain values.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StorageError(
            f"the record needs a file that can be written, and {path} cannot be: "
            f"{error.strerror or error}; name another one"
        ) from error
