"""Checkpoints of both paths: their format, how they are written whole or not at all, and which ones a run has."""
