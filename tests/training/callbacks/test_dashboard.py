"""TensorBoard's files, where a signal comes while they are closed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from nanofed.training.callbacks.dashboard import RunLogger
from nanofed.training.signals import Signals, Stopped


def test_a_signal_while_the_writer_closes_ends_the_run_by_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = RunLogger(tmp_path, name="run")
    logger.is_open = True
    logger.experiment.add_scalar("val/bpb", 2.0, 0)
    stop = _AsyncWriterThread.stop

    def interrupted(self: _AsyncWriterThread) -> None:
        signal.raise_signal(signal.SIGTERM)
        stop(self)

    with monkeypatch.context() as patch, Signals(), pytest.raises(Stopped):
        patch.setattr(_AsyncWriterThread, "stop", interrupted)
        logger.finalize("success")
    logger.finalize("failed")  # as Lightning does on the way out
