"""What a lint says: findings with a figure and a remedy, and those that were silenced.

A finding is silenced by its check, or by its check at one place, always with a reason:
in the policy under `silences`, or where the lint is called:

    {"lost-update": "the master weights are kept elsewhere",
     "rounded-angle@rope.*": "positions end at 64 here"}

Silenced findings are not forgotten; the report lists them with their reasons, and those
silences that covered nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from castwise.policy.silences import Silence

_SHOWN_PLACES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One mistake, with what it costs and what to do."""

    check: str
    """Id of the check, a key of `CHECKS`."""

    place: str
    """fqn of the module, buffer or parameter; `loss` or `optimizer` outside of them."""

    where: str
    """The place for a person: with the operator and the source line, if known."""

    why: str
    """What goes wrong, one sentence without a period."""

    figure: str
    """The number that proves it."""

    remedy: str
    """What to change."""

    others: tuple[str, ...] = ()
    """Further places where the same goes wrong for the same reason."""

    @property
    def places(self) -> str:
        """Where, and the first of the further places."""
        if not self.others:
            return self.where
        listed = ", ".join(self.others[:_SHOWN_PLACES])
        hidden = len(self.others) - _SHOWN_PLACES
        more = f" and {hidden} more" if hidden > 0 else ""
        return f"{self.where} (also {listed}{more})"

    def __str__(self) -> str:
        said = f"{self.why}: {self.figure}; {self.remedy}"
        return f"{self.check}: {self.places}: {said}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Silenced:
    """A finding that somebody decided to live with."""

    finding: Finding
    """What was found."""

    key: str
    """The silence that covers it, `check` or `check@glob`."""

    reason: str
    """Why it is accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LintReport:
    """What a lint found before the first step."""

    policy: str
    """Name of the policy that was looked at."""

    findings: tuple[Finding, ...]
    """What has to change, or to be silenced with a reason."""

    silenced: tuple[Silenced, ...] = ()
    """What was found and is accepted."""

    unchecked: tuple[str, ...] = ()
    """What could not be looked at, and what it needs; one sentence each."""

    unused: tuple[str, ...] = ()
    """Silences that covered nothing: `check` or `check@glob`."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found that is not silenced."""
        return not self.findings

    def summary(self) -> str:
        """One line for logs and reports."""
        kinds = Counter(finding.check for finding in self.findings)
        named = ", ".join(f"{number} {check}" for check, number in kinds.items())
        found = f"found {named}" if named else "found nothing"
        accepted = f"; {len(self.silenced)} silenced" if self.silenced else ""
        return f"lint of {self.policy} {found}{accepted}"

    def of(self, check: str) -> tuple[Finding, ...]:
        """The findings of one check."""
        return tuple(each for each in self.findings if each.check == check)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LintReport:
        """Build a report from what `record` gave."""

        def finding(each: Mapping[str, Any]) -> Finding:
            return Finding(**{**each, "others": tuple(each["others"])})

        return cls(
            policy=record["policy"],
            findings=tuple(map(finding, record["findings"])),
            silenced=tuple(
                Silenced(**{**each, "finding": finding(each["finding"])})
                for each in record["silenced"]
            ),
            unchecked=tuple(record["unchecked"]),
            unused=tuple(record["unused"]),
        )


def silences_of(
    policy: Iterable[Silence], given: Mapping[str, str] | None
) -> dict[str, str]:
    """Return key -> reason of a policy's silences and those that a caller adds.

    What the caller says goes first, and in place of what the policy says of the same.

    Raises:
        RuleError: A silence names no check or gives no reason.
    """
    found = {}
    for key, reason in (given or {}).items():
        check, at, glob = key.partition("@")
        silence = Silence(
            check=check,
            at=glob if at else None,
            because=reason.strip(),
            where=f"silence {key}",
        )
        found[silence.key] = silence.because
    for silence in policy:
        found.setdefault(silence.key, silence.because)
    return found


def sorted_out(
    found: Iterable[Finding], silences: Mapping[str, str]
) -> tuple[tuple[Finding, ...], tuple[Silenced, ...]]:
    """Part findings from silenced ones, and join what says the same of many places."""
    by_key: dict[str | None, list[Finding]] = {}
    for finding in dict.fromkeys(found):
        by_key.setdefault(_covering(finding, silences), []).append(finding)
    silenced = tuple(
        Silenced(finding=finding, key=key, reason=silences[key])
        for key, group in by_key.items()
        if key is not None
        for finding in _joined(group)
    )
    return tuple(_joined(by_key.get(None, []))), silenced


def _covering(finding: Finding, silences: Mapping[str, str]) -> str | None:
    for key in silences:
        check, at, glob = key.partition("@")
        if check == finding.check and (not at or fnmatchcase(finding.place, glob)):
            return key
    return None


def _joined(findings: Iterable[Finding]) -> Iterable[Finding]:
    """One finding for each check, reason and remedy, with all of its places."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for each in findings:
        groups.setdefault((each.check, each.why, each.remedy), []).append(each)
    for group in groups.values():
        first, *rest = group
        places = tuple(dict.fromkeys(each.place for each in rest))
        yield replace(
            first, others=tuple(place for place in places if place != first.place)
        )
