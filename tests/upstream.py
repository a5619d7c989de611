"""Whether a mistake of somebody else can still be reproduced: a note, never a failure.

A test of a named issue shows first what goes wrong without castwise. Where a newer
version no longer does it, the test says so in the summary of warnings, and goes on.
"""

from __future__ import annotations

import warnings


class FixedUpstreamWarning(UserWarning):
    """What an issue describes did not happen any more."""


def note_unless(still_there: bool, issue: str) -> None:
    """Say that an issue seems to be fixed, unless it was reproduced."""
    if still_there:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("default", FixedUpstreamWarning)
        warnings.warn(
            f"{issue} did not show without castwise; its test may be simpler now",
            FixedUpstreamWarning,
            stacklevel=2,
        )
