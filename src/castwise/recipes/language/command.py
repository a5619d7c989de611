"""`castwise sample`: a language model's checkpoint continues a prompt.

This room imports no torch; the command fetches its room when it runs.
"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("sample")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="What comes before.  [default: nothing]")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="How many tokens at most.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.8,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    help="Draw from so many likeliest tokens alone; 0: from all.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many texts, each by the next seed.",
)
def sample(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    count: int,
) -> int:
    """Let a trained language model write.

    CHECKPOINT is a file, or the folder of a run, whose best checkpoint is taken. It is
    data alone: settings, tokenizer and weights. The model computes in fp32.
    """
    from castwise.recipes import language_models

    loaded = language_models.load_model(checkpoint)
    for number in range(count):
        text = language_models.write(
            loaded,
            prompt,
            num_tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed + number,
        )
        click.echo(text)
    return 0
