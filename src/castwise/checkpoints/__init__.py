"""Checkpoints: one versioned file format that survives a kill at any instant.

    save_checkpoint(path, tree, kind="kenken run")      # all of it, or nothing
    tree = load_checkpoint(path, kind="kenken run")     # bit for bit, or one sentence

Seven rooms:

    durable.py         a file that appears whole or not at all
    tree.py            nested Python values as JSON plus blobs of bytes
    container.py       the file: a safetensors file with a digest over every byte
    shelf.py           the last k checkpoints and the best one of a run
    parts.py           a folder to which every rank of a sharded run writes its part
    background.py      saves that go on while the run does
    contradictions.py  settings of a run that differ from those it resumes from

Loading parses JSON and copies bytes. There is no pickle, so that a checkpoint from a
stranger can at worst be refused.
"""

from __future__ import annotations

from castwise.checkpoints.container import CheckpointFacts as CheckpointFacts
from castwise.checkpoints.container import describe_checkpoint as describe_checkpoint
from castwise.checkpoints.container import load_checkpoint as load_checkpoint
from castwise.checkpoints.container import save_checkpoint as save_checkpoint
from castwise.checkpoints.contradictions import Contradiction as Contradiction
from castwise.checkpoints.contradictions import contradictions as contradictions
from castwise.checkpoints.contradictions import (
    refuse_contradictions as refuse_contradictions,
)
from castwise.checkpoints.durable import replace_file as replace_file
from castwise.checkpoints.shelf import CheckpointShelf as CheckpointShelf
from castwise.checkpoints.shelf import StoredCheckpoint as StoredCheckpoint
