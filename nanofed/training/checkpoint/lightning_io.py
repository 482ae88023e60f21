"""Lightning's CheckpointIO, which saves and loads in nanofed's checkpoint format."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.io import CheckpointIO

from nanofed.data.datamodule import TokenDataModule
from nanofed.model import GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.training.checkpoint.atomic import CheckpointError, discard
from nanofed.training.checkpoint.format import (
    check_model,
    local_path,
    read_manifest,
    read_state,
    read_weights,
    write_checkpoint,
)

PREFIX = "gpt."  # of the GPT's names in the LightningModule


class DirectoryCheckpointIO(CheckpointIO):
    """Saves and loads Lightning's checkpoint dictionary in nanofed's format.

    Args:
        config: sizes of the GPT.
        tokenizer: it is saved with every checkpoint.
        data: the data module whose text is recorded; None records no text, and a run that goes on cannot compare it then.
    """

    def __init__(self, config: GPTConfig, tokenizer: Tokenizer, data: TokenDataModule | None = None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._data = data

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one checkpoint directory.

        Raises:
            SaveError: it could not be written.
            ConfigError: the path is a URL.
        """
        state = dict(checkpoint)
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.pop("state_dict").items()}
        optimizer = state["optimizer_states"][0] if state.get("optimizer_states") else {"clock": {"tokens": 0}}
        write_checkpoint(
            local_path(path),
            kind="fit",
            weights={name: tensor for name, tensor in weights.items() if not name.startswith("bits_per_byte.")},
            state=state,
            config=self._config,
            tokenizer=self._tokenizer,
            step=int(state["global_step"]),
            tokens=int(optimizer["clock"]["tokens"]),
            metrics=state.pop("metrics", None),
            data=self._data.dataset.identity if self._data else None,
        )

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint directory, verified, as Lightning's dictionary.

        Raises:
            CheckpointError: it is damaged, or of the federated path.
            ConfigError: it is of another model, or the path is a URL.
        """
        folder = local_path(path)
        manifest = read_manifest(folder)
        check_model(manifest, self._config, folder)
        if manifest.kind != "fit":
            raise CheckpointError(f"{folder} is a {manifest.kind} checkpoint: start from its weights with --init_from")
        weights = {PREFIX + name: tensor for name, tensor in read_weights(folder).items()}
        return {**read_state(folder), "state_dict": weights}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one checkpoint directory."""
        if local_path(path).exists():
            discard(local_path(path))
