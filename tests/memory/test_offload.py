"""Offloaded activations come back bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from castwise.errors import SettingsError, StorageError
from castwise.memory.lifetimes import Ledger
from castwise.memory.offload import SpillFile, offload_saves
from memory_models import (
    ConvNet,
    Gpt,
    gpt_batch,
    gradients_of,
    image_batch,
    same_bits,
    token_loss,
)


@pytest.mark.parametrize("kind", ["gpt", "conv"])
def test_gradients_through_a_file_are_the_same_bits(kind: str, tmp_path: Path) -> None:
    """Attention with dropout, and convolutions with batch norm."""
    torch.manual_seed(3)
    model = Gpt(width=64) if kind == "gpt" else ConvNet()
    batch = gpt_batch(4, 32) if kind == "gpt" else image_batch(8, 15)
    wanted = gradients_of(model, batch)
    with offload_saves(model, folder=tmp_path) as offloaded:
        for _ in range(2):
            assert same_bits(gradients_of(model, batch), wanted)
        assert offloaded.bill.num_packed > 5
        assert offloaded.bill.after_bytes == 0
    assert same_bits(gradients_of(model, batch), wanted)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_almost_nothing_is_held_between_forward_and_backward(tmp_path: Path) -> None:
    """Only small tensors, masks and what others hold stay in memory."""
    model, batch = Gpt(width=64, dropout=0.0), gpt_batch(4, 32)

    def held() -> int:
        ledger = Ledger(model)
        with ledger:
            loss = token_loss(model(batch[0]), batch[1])
            ledger.begin("backward")
            loss.backward()
        model.zero_grad()
        return ledger.lifetimes().saved_bytes() or sum(
            a.num_bytes
            for a in ledger.lifetimes().alive(ledger.lifetimes().marks["backward"])
            if a.kind == "saved"
        )

    before = held()
    with offload_saves(model, folder=tmp_path):
        after = held()
    assert after < 0.2 * before


def test_the_room_of_the_file_is_used_anew(tmp_path: Path) -> None:
    """The file does not grow from step to step."""
    store = SpillFile(tmp_path)
    ends = []
    for _ in range(3):
        kept = [store.put(torch.randn(size)) for size in (1000, 63, 1)]
        ends.append(store.num_bytes)
        del kept
    assert ends == [4 * 1064] * 3


def test_a_model_on_the_cpu_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    """Host memory is where it is already; a missing folder is named."""
    with pytest.raises(SettingsError, match="give offload_saves a folder="):
        offload_saves(ConvNet())
    with pytest.raises(StorageError, match="No such file or directory"):
        offload_saves(ConvNet(), folder=tmp_path / "missing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_through_pinned_memory_are_the_same_bits() -> None:
    """Copies that do not block are ordered with the computation."""
    torch.manual_seed(3)
    model = Gpt(width=64).cuda()
    tokens, wanted_tokens = gpt_batch(4, 32)
    batch = tokens.cuda(), wanted_tokens.cuda()
    wanted = gradients_of(model, batch)
    with offload_saves(model) as offloaded:
        assert same_bits(gradients_of(model, batch), wanted)
    assert offloaded.bill.num_packed > 5
