"""The model: relations and no positions, any size, any precision, learns."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import Mixture, PuzzleBatch, batch_of, draw_batch
from castwise.recipes.kenken.clues import OP_ADD, OP_NONE
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.model import (
    MODELS,
    ClueAttention,
    KenKenModel,
    ModelSettings,
    completion_loss,
    model_settings,
)
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet
from castwise.recipes.kenken.relations import Relations, relate

if TYPE_CHECKING:
    from torch import Tensor


@cache
def puzzles(size: int, mode: Mode, kind: Kind) -> PuzzleSet:
    """Make a few puzzles."""
    return generate_puzzle_set(size, mode, 40, 2, "train", kind=kind, workers=1)


def batch_for(size: int, count: int = 4, kind: Kind = Kind.KENKEN) -> PuzzleBatch:
    """Show puzzles of every mode with a few hints."""
    rng = np.random.default_rng(size)
    parts = [(puzzles(size, mode, kind), np.arange(count)) for mode in Mode]
    return batch_of(parts, rng.random((3 * count, size * size)) < 0.3)


def random_model(settings: ModelSettings, seed: int = 0) -> KenKenModel:
    """Make a model none of whose weights is zero."""
    torch.manual_seed(seed)
    model = KenKenModel(settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return model


def forward(model: KenKenModel, batch: PuzzleBatch, **kwargs: int) -> Tensor:
    """Run the model on a batch."""
    logits: Tensor = model(batch.tokens, batch.alphabet, batch.relations, **kwargs)
    return logits


def moved(batch: PuzzleBatch, cells: Tensor) -> PuzzleBatch:
    """Move cell cells[i] to place i, in tokens, cages and answers."""
    ids = batch.cage_ids[:, cells]
    arrays = (batch.modes, ids, batch.cage_ops, batch.cage_targets)
    return replace(
        batch,
        tokens=batch.tokens[:, cells],
        answers=batch.answers[:, cells],
        cage_ids=ids,
        relations=relate(*(array.numpy() for array in arrays)),
    )


@pytest.mark.parametrize("change", ["rows", "columns", "transpose", "all"])
def test_permuting_rows_and_columns_and_transposing_permutes_the_logits(
    change: str,
) -> None:
    """The model cannot tell such twins apart: equal to 1e-10 in fp64."""
    size = 5
    batch = batch_for(size)
    cells = torch.arange(size * size).view(size, size)
    order = torch.tensor([2, 0, 4, 1, 3])
    if change in {"rows", "all"}:
        cells = cells[order]
    if change in {"columns", "all"}:
        cells = cells[:, order.flip(0)]
    if change in {"transpose", "all"}:
        cells = cells.T
    cells = cells.reshape(-1)
    model = random_model(MODELS["tiny"]).double()
    twin = moved(batch, cells)
    widened = [
        replace(b, relations=Relations(*(_double(t) for t in b.relations)))
        for b in (batch, twin)
    ]
    before, after = (forward(model, b) for b in widened)
    assert before.std() > 1e-3
    torch.testing.assert_close(after, before[:, :, cells], rtol=0, atol=1e-10)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def test_a_permutation_that_breaks_lines_changes_the_logits() -> None:
    """The control: swapping two cells alone is no symmetry."""
    batch = batch_for(4)
    cells = torch.arange(16)
    cells[[0, 5]] = cells[[5, 0]]
    model = random_model(MODELS["tiny"])
    before, after = forward(model, batch), forward(model, moved(batch, cells))
    assert not torch.allclose(after, before[:, :, cells], atol=1e-3)


def test_latin_squares_look_alike_in_every_mode() -> None:
    """Without cages an alphabet is a set of names: logits of ranks are equal."""
    squares = [
        replace(puzzles(6, Mode.STANDARD, Kind.LATIN), mode=mode) for mode in Mode
    ]
    shown = np.random.default_rng(0).random((5, 36)) < 0.4
    model = random_model(MODELS["tiny"])
    first, *others = [
        forward(model, batch_of([(square, np.arange(5))], shown)) for square in squares
    ]
    assert all(torch.equal(first, other) for other in others)


def test_cages_tell_modes_apart() -> None:
    """The same clues on other digits mean something else."""
    batch = batch_for(4, kind=Kind.KENKEN)
    arrays = (batch.cage_ids, batch.cage_ops, batch.cage_targets)
    other = relate(np.full(len(batch), 1), *(array.numpy() for array in arrays))
    standard = batch.modes == 0
    model = random_model(MODELS["tiny"])
    changed = forward(model, replace(batch, relations=other))[:, standard]
    assert not torch.allclose(forward(model, batch)[:, standard], changed, atol=1e-3)


def test_cells_hear_the_ways_that_are_left_of_their_own_clue() -> None:
    """Without an opinion the ways of `+ 5` are left alike; who wants a 3 keeps one."""
    ids = np.array([[0, 0, 1, 1, 0, 1, 2, 2, 2]])
    ops, targets = np.array([[OP_ADD, OP_NONE, OP_NONE]]), np.array([[5, 0, 0]])
    cages = relate(np.array([0]), ids, ops, targets).by_cage()
    heads = ClueAttention(replace(MODELS["tiny"], num_clue_heads=1))
    with torch.no_grad():
        for weight in heads.parameters():
            weight.zero_()
        normed = torch.zeros(1, 9, 3, MODELS["tiny"].num_channels)
        blank = heads(normed, cages)[0]
        # levels of each rank in 1 + 1 + 3 and in 1 + 2 + 2, at even shares
        assert blank[0].tolist() == [[0.5, 0.5, 0], [0, 0.5, 0], [0.5, 0, 0]]
        assert torch.equal(blank[[0, 1, 4]], blank[[0, 0, 0]])
        assert not blank[[2, 3, 5, 6, 7, 8]].any()
        normed[:, :, 2] = 1.0
        heads.opinion.weight.fill_(1.0)
        heads.potential.weight[0] = 10.0  # a rank that is spoken of shall occur once
        left = heads(normed, cages)[0]
    assert left[4].tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert not left[5].any()


@pytest.mark.parametrize("size", [3, 6, 9, 16])
def test_one_model_reads_every_size(size: int) -> None:
    """Sequences are n * n long; one set of weights serves them all."""
    kind = Kind.KENKEN if size <= 6 else Kind.LATIN
    batch = batch_for(size, count=1, kind=kind)
    logits = forward(random_model(MODELS["tiny"]), batch)
    assert logits.shape == (3, 3, size * size, size)
    assert logits.isfinite().all()


def test_every_cell_hears_of_every_hint() -> None:
    """No causal mask: one revealed corner changes the logits of all cells."""
    batch = batch_for(4, count=1).select(torch.tensor([0]))
    empty = batch.with_tokens(torch.ones_like(batch.tokens))
    corner = empty.tokens.clone()
    corner[0, -1] = batch.answer_tokens[0, -1]
    model = random_model(MODELS["tiny"])
    change = forward(model, empty) - forward(model, empty.with_tokens(corner))
    assert (change[-1].abs().amax(dim=-1) > 1e-6).all()


def test_more_loops_continue_what_fewer_began() -> None:
    """The first loops of a longer run are the shorter run."""
    batch, model = batch_for(4), random_model(MODELS["tiny"])
    few, many = forward(model, batch), forward(model, batch, num_loops=7)
    assert len(many) == 7
    assert torch.equal(many[: len(few)], few)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_low_precision_autocast_stays_near_fp32(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Loss and every gradient are finite, and the loss is close."""
    batch = batch_for(5)
    model = random_model(MODELS["tiny"])
    exact = completion_loss(forward(model, batch), batch).item()
    with torch.autocast("cpu", dtype):
        logits = forward(model, batch)
    loss = completion_loss(logits.float(), batch)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=tolerance)
    grads = [weight.grad for weight in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_recompute_changes_no_gradient() -> None:
    """Bitwise: the same kernels run again."""
    batch = batch_for(5)
    gradients = []
    for recompute in (False, True):
        model = random_model(replace(MODELS["small"], recompute=recompute))
        completion_loss(forward(model, batch), batch).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    pairs = zip(*gradients, strict=True)
    assert all(a is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_preset_takes_a_step_that_helps(name: str) -> None:
    """A small step against the gradient lowers the loss; all weights take part."""
    torch.manual_seed(0)
    model, batch = KenKenModel(MODELS[name]), batch_for(4, count=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = completion_loss(forward(model, batch), batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(4))  # a new model says nothing
    assert losses[-1] < losses[0] - 1e-3


def test_a_tiny_model_learns_to_solve() -> None:
    """Thirty steps on size 3: the loss falls to less than a third of chance."""
    sets = {(3, mode, kind): puzzles(3, mode, kind) for mode in Mode for kind in Kind}
    mixture = Mixture(
        sizes=(3,), size_shares=(1.0,), cells_per_step=360, latin_share=0.0
    )
    torch.manual_seed(0)
    model = KenKenModel(MODELS["tiny"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    loss = torch.tensor(math.inf)
    for step in range(30):
        batch = draw_batch(sets, mixture, seed=0, step=step)
        loss = completion_loss(forward(model, batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < math.log(3) / 3


def test_the_loss_is_the_mean_over_hidden_cells_and_the_last_loops() -> None:
    """Against the definition, hint cells excluded; no hidden cell gives 0."""
    batch = batch_for(3, count=2)
    logits = forward(random_model(MODELS["tiny"]), batch)
    terms = []
    for loop in logits.log_softmax(dim=-1):
        own = loop.gather(2, batch.answers[:, :, None]).squeeze(2)
        terms.append(-own[batch.hidden])
    assert len(terms) == 3
    for num_scored, counted in ((1, 1), (2, 2), (3, 3), (None, 2)):
        torch.testing.assert_close(
            completion_loss(logits, batch, num_scored),
            torch.cat(terms[-counted:]).mean(),
        )
    full = batch.with_tokens(batch.answer_tokens)
    assert completion_loss(logits, full).item() == 0


def test_unknown_names_and_shapes_are_refused() -> None:
    """The message lists the presets, or names the setting."""
    with pytest.raises(SettingsError, match="tiny, small, base"):
        model_settings("huge")
    with pytest.raises(SettingsError, match="num_loops"):
        replace(MODELS["tiny"], num_loops=0)
