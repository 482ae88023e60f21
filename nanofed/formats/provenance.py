"""What is known of how a checkpoint came about: its run's options, its progress, its bits per byte, its text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nanofed.errors import ConfigError
from nanofed.training.checkpoint.folder import FOLDER
from nanofed.training.checkpoint.format import Manifest, read_manifest, read_state
from nanofed.training.summary import CONFIG, SUMMARY, Summary

WEIGHTS_ONLY = "weights"  # the kind of a checkpoint that a run can start from, and not go on with


@dataclass(frozen=True)
class Provenance:
    """How a checkpoint was trained.

    Attributes:
        name: the run's name.
        manifest: what the checkpoint says of itself.
        options: the run's resolved config; empty where the checkpoint lies outside of a run.
        bits_per_byte: the figure of these weights on the run's validation text; None where it was not measured.
        continued: whether the run began with the weights of another.
        rounds: rounds of a federation; None where one machine or cluster trained.
        clients: clients whose updates were merged; None as `rounds`.
    """

    name: str
    manifest: Manifest
    options: dict[str, Any]
    bits_per_byte: float | None
    continued: bool = False
    rounds: int | None = None
    clients: int | None = None

    @classmethod
    def of(cls, checkpoint: Path) -> Provenance:
        """Read what a checkpoint and the run that it lies in say.

        Raises:
            CheckpointError: the checkpoint is damaged.
            ConfigError: the run's config or summary cannot be read.
        """
        manifest = read_manifest(checkpoint)
        run = checkpoint.resolve().parent.parent if checkpoint.resolve().parent.name == FOLDER else None
        name = run.name if run else checkpoint.resolve().name
        rounds = clients = None
        if manifest.kind == "federated":
            state = read_state(checkpoint)
            rounds, clients = int(state["clock"]["round"]), len(state["pace"]["rounds"])
        summary = Summary.read(run) if run is not None and (run / SUMMARY).is_file() else None
        # The figure that was measured after as many tokens as the checkpoint has seen, if there is one.
        figures = [point.bpb for point in summary.curve if point.tokens == manifest.tokens] if summary else []
        bpb = figures[-1] if figures else manifest.metrics.get("val/bpb")
        return cls(name, manifest, _options(run), bpb, bool(summary and summary.init_from), rounds, clients)

    def option(self, *keys: str) -> Any:
        """Return an option of the run by its keys, `option("model", "recipe", "num_steps")`; None where it is not known."""
        value: Any = self.options
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def facts(self) -> dict[str, str]:
        """Return what is to be said of the training, by what it is: only what is known."""
        manifest, config = self.manifest, self.manifest.model
        recipe = self.option("model", "recipe") or {}
        federated, trained = self.rounds is not None, manifest.kind != WEIGHTS_ONLY
        data = manifest.data.fingerprint() if manifest.data else None
        known = {
            "parameters": f"{config.num_parameters:,}",
            "layers, width, heads": f"{config.n_layer}, {config.n_embd}, {config.n_head} of {config.head_dim}",
            "vocabulary, tokens in a row": f"{config.vocab_size:,}, {config.sequence_len:,}",
            "trained": f"across {self.clients} clients in {self.rounds:,} rounds" if federated else None,
            "began with": "the weights of another run or model" if self.continued else None,
            "optimizer steps": f"{manifest.step:,}" + " on every client's path" * federated if trained else None,
            "tokens": f"{manifest.tokens:,}" if trained else None,
            "tokens in a step": f"{recipe['batch_tokens']:,}" if "batch_tokens" in recipe else None,
            "recipe": ", ".join(
                f"{key} {recipe[key]}" for key in recipe if key.endswith(("_lr", "_scale", "_ratio", "clip"))
            )
            or None,
            "bits per byte, validation": None if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}",
            "data (fingerprint)": data,
            "tokenizer (fingerprint)": manifest.tokenizer,
        }
        return {name: said for name, said in known.items() if said is not None}


def _options(run: Path | None) -> dict[str, Any]:
    if run is None or not (run / CONFIG).is_file():
        return {}
    try:
        options = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{run / CONFIG} cannot be read: {error}") from error
    return options if isinstance(options, dict) else {}
