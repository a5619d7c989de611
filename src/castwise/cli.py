"""The command line: `castwise train RECIPE`, `castwise contract FILE.py:FUNCTION`, ...

This room imports no torch: commands fetch what they need when they run, so that
`castwise --help` answers at once. Every mistake of a user ends here as one sentence on
standard error and exit code 2; a traceback that is still seen is a bug in castwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

import castwise
from castwise.commands import (
    bench,
    contract,
    diagnose,
    estimate,
    example,
    fit,
    gradients,
    lint,
    search,
    validate,
    watch,
)
from castwise.errors import CastwiseError
from castwise.recipes.kenken import command as kenken
from castwise.recipes.language import command as language
from castwise.recipes.resolvent_lm import command as resolvent_lm
from castwise.recipes.soliton_lm import command as soliton_lm

USER_ERROR = 2
INTERRUPTED = 130


@click.group()
@click.version_option(castwise.__version__, message="castwise %(version)s")
def root() -> None:
    """Mixed-precision training, planned by evidence, applied, and proved."""


@root.group()
def train() -> None:
    """Train a recipe on data that it makes itself."""


for recipe in (kenken, resolvent_lm, soliton_lm):
    train.add_command(recipe.train)
root.add_command(kenken.group)
root.add_command(language.sample)
for room in (
    bench,
    contract,
    diagnose,
    estimate,
    example,
    fit,
    gradients,
    lint,
    search,
    validate,
    watch,
):
    root.add_command(room.command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; turn every mistake of the user into one sentence."""
    # Threads of torch that spin while they wait lose whole time slices when something
    # else wants the core (steps of a small model took 8 times as long); threads that
    # sleep at once wake too late. A short spin is right in both cases. GNU's OpenMP
    # reads this when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = root.main(arguments, prog_name="castwise", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(USER_ERROR)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "castwise"
        _fail(f"{error.format_message().rstrip('.')}; see `{where} --help`.")
    except click.ClickException as error:
        _fail(error.format_message())
    except CastwiseError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped by the user.", code=INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)  # the reader of our output has left
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, *, code: int = USER_ERROR) -> NoReturn:
    if "TORCHELASTIC_RUN_ID" not in os.environ or not _was_said(sentence):
        click.echo(f"castwise: {' '.join(sentence.split())}", err=True)
    sys.exit(code)


def _was_said(sentence: str) -> bool:
    """Whether another of torchrun's processes makes the same mistake and tells it."""
    from castwise.distributed.ranks import somebody_said  # noqa: PLC0415 -- loads torch

    return somebody_said(sentence)
