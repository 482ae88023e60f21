"""Checkpoints of both paths: their format, how they are written whole or not at all, and which ones a run has."""

from nanofed.training.checkpoint.atomic import CheckpointError, NoSpaceError, SaveError
from nanofed.training.checkpoint.folder import MANIFEST, checkpoints, prune_checkpoints
from nanofed.training.checkpoint.format import (
    STATE,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    check_model,
    find_checkpoint,
    local_path,
    newest_whole,
    read_manifest,
    read_state,
    read_weights,
    write_checkpoint,
)

__all__ = [
    "MANIFEST",
    "STATE",
    "TOKENIZER",
    "WEIGHTS",
    "CheckpointError",
    "Manifest",
    "NoSpaceError",
    "SaveError",
    "check_model",
    "checkpoints",
    "find_checkpoint",
    "local_path",
    "newest_whole",
    "prune_checkpoints",
    "read_manifest",
    "read_state",
    "read_weights",
    "write_checkpoint",
]
