"""`castwise init`: write an example of a target file, ready to be edited."""

from __future__ import annotations

from pathlib import Path

import click

from castwise.errors import StorageError

EXAMPLE = '''"""What castwise looks at: model, batches, loss, and perhaps an optimizer.

    castwise contract {name}:build
"""

import torch
from torch import nn
from torch.nn import functional


def build():
    """Return (model, batches, loss_fn, optimizer); the optimizer may be left out."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)
    )
    batches = [(torch.randn(16, 32), torch.randint(8, (16,))) for _ in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, batches, functional.cross_entropy, optimizer
'''


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default="my_model.py")
def command(path: Path) -> int:
    """Write an example target file; an existing file is never overwritten."""
    try:
        with path.open("x") as file:
            file.write(EXAMPLE.format(name=path.name))
    except FileExistsError:
        raise StorageError(f"{path} exists already; name another file") from None
    except OSError as error:
        raise StorageError(
            f"the example needs a file that can be written, and {path} cannot be: "
            f"{error.strerror or error}; name another one"
        ) from error
    click.echo(f"wrote {path}; try: castwise contract {path}:build")
    return 0
