"""A checkpoint measured after its training: bits per byte on its run's own text, and CORE."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.evaluation.bits_per_byte import BitsPerByte, evaluate_bits_per_byte
from nanofed.training.checkpoint.format import Manifest
from nanofed.training.summary import CONFIG, MARKER

if TYPE_CHECKING:
    from nanofed.evaluation.core.score import CoreScore
    from nanofed.model import GPT
    from nanofed.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

TEXT = ("path", "validation_shard", "eval_tokens")  # the options of a run's data that say what its validation text is


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint came to.

    Attributes:
        checkpoint: the checkpoint's folder, or an exported model.
        step: optimizer steps it was trained for; None of an exported model.
        tokens: tokens it was trained on; None of an exported model.
        bpb: bits per byte, of several texts pooled by bytes; None where that was not asked for.
        core: CORE with its tasks; None where that was not asked for.
        texts: bits per byte of each text by name, where texts were named.
    """

    checkpoint: Path
    step: int | None
    tokens: int | None
    bpb: float | None = None
    core: CoreScore | None = None
    texts: Mapping[str, float] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return what JSON can say of it."""
        core = None if self.core is None else self.core.to_plain()
        where = {"checkpoint": str(self.checkpoint), "step": self.step, "tokens": self.tokens}
        return {**where, "bpb": self.bpb, "texts": dict(self.texts), "core": core}

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(self.to_plain(), indent=1)

    def text(self) -> str:
        """Return it for a terminal: a line for bits per byte, a table for CORE."""
        lines = [str(self.checkpoint)]
        if self.step is not None and self.tokens is not None:
            lines[0] += f": step {self.step:,}, {self.tokens / 1e6:,.2f} M tokens"
        lines += [] if self.bpb is None else [f"bits per byte {self.bpb:.4f}"]
        if len(self.texts) > 1:
            lines[-1] += f" ({', '.join(f'{name} {bpb:.4f}' for name, bpb in self.texts.items())})"
        lines += [] if self.core is None else [self.core.table()]
        return "\n".join(lines)


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the ranks that torchrun has started, for the block, and return this rank's device; a process alone joins nobody.

    Raises:
        ConfigError: another launcher than torchrun has started this process.
    """
    launch = runtime.launch()
    if not launch.by or (dist.is_available() and dist.is_initialized()):
        yield torch.device(device)
        return
    if launch.by not in {"torchrun", "env"}:
        raise ConfigError(f"evaluate: {launch.by} has started this process; start the ranks with torchrun")
    on_gpu = torch.device(device).type == "cuda"
    place = torch.device("cuda", launch.local_rank) if on_gpu else torch.device(device)
    if on_gpu:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()


def measure_bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    checkpoint: Path,
    manifest: Manifest | None,
    data: Sequence[str],
    eval_tokens: int | None,
) -> tuple[float, dict[str, float]]:
    """Return bits per byte of a checkpoint's model, over all ranks, on all texts pooled and by the name of each that is named.

    Args:
        model: the model with the checkpoint's weights.
        tokenizer: the checkpoint's.
        checkpoint: its folder, in the folder of its run; it may have been removed meanwhile.
        manifest: what the checkpoint says of itself; None of an exported model.
        data: datasets whose validation shards are scored: `demo`, `fineweb-edu` or folders; without any, it is the run's own.
        eval_tokens: targets to score of each; by default as many as the run scores, of another dataset as `TokenDataModule` does.

    Raises:
        ConfigError: no dataset is named, and the checkpoint lies in no run's folder or its run validated with another text.
        DataError: there is no validation shard, it is damaged, or holds no text.
    """
    lengths = torch.tensor(tokenizer.token_bytes)
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if dist.is_initialized() else {}
    pooled, found = BitsPerByte(lengths).to(model.device), {}
    for name in dict.fromkeys(data) or (None,):
        options: dict[str, Any] = _text_of_run(checkpoint, manifest) if name is None else {"path": name}
        options |= {} if eval_tokens is None else {"eval_tokens": eval_tokens}
        module = TokenDataModule(sequence_len=model.config.sequence_len, **options)
        module.tokenizer = tokenizer
        if name is None and manifest is not None:
            _check_text(checkpoint, manifest, module)
        metric = BitsPerByte(lengths)
        with closing(iter(module.validation_loader(**ranks))) as text:
            batches = ((batch.inputs, batch.targets) for batch in text)
            bpb = evaluate_bits_per_byte(model, batches, metric, model.device)
        pooled.merge_state(metric)
        if name is not None:
            found[name] = bpb
    nothing = torch.empty(0, device=model.device)
    pooled.update(nothing, nothing.long())  # sums that were merged are no update to the metric, which warns of that
    return float(pooled.compute()), found


def _check_text(checkpoint: Path, manifest: Manifest, module: TokenDataModule) -> None:
    """Refuse a text that is not what the checkpoint was validated with."""
    recorded = manifest.data
    if recorded is not None and (differing := recorded.differences(module.dataset.identity, training=False)):
        raise ConfigError(
            f"{module.dataset.path} is not what {checkpoint} was validated with: {'; '.join(differing)}; bring it back, or "
            "name a text with --data"
        )


def _text_of_run(checkpoint: Path, manifest: Manifest | None) -> dict[str, Any]:
    """Return the options that say what the validation text of a checkpoint's run is."""
    if manifest is None:
        raise ConfigError(
            f"{checkpoint} was exported, and does not say what text it was validated with: name one with --data"
        )
    path = checkpoint.resolve().parent.parent / CONFIG
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        return {name: data[name] for name in TEXT}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say what {checkpoint} was validated with ({error}): name a text with --data"
        ) from error


def write_into_run(checkpoint: Path, manifest: Manifest, core: CoreScore) -> None:
    """Write CORE into TensorBoard's files of a checkpoint's run, at its step and tokens; a lone checkpoint has no run.

    A run that cannot be written, somebody else's say, costs the points and not the score: a warning says so.
    """
    run = checkpoint.resolve().parent.parent
    if not (run / MARKER).is_file():
        return
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(str(run)) as writer:
            write_scalars(writer, core, manifest.step, manifest.tokens)
    except OSError as error:
        logger.warning("CORE is not in TensorBoard: %s cannot be written: %s", run, error.strerror or error)


def write_scalars(writer: Any, core: CoreScore, step: int, tokens: int) -> None:
    """Write CORE with a `SummaryWriter`, against steps and against tokens, so that runs of both paths overlay."""
    for tag, value in core.scalars().items():
        writer.add_scalar(tag, value, step)
    writer.add_scalar("core/metric_by_tokens", core.core, tokens)
