"""What is checked before a run writes anything: batch, data, tokenizer, and the checkpoint that it is to start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.evaluation.core.bundle import Bundle
from nanofed.generation.text import SAMPLE_TOKENS
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import (
    TOKENIZER,
    Manifest,
    check_model,
    find_checkpoint,
    read_manifest,
    say_once,
)
from nanofed.training.config_diff import check_resumed_config
from nanofed.training.memory import Place, check_memory
from nanofed.training.module import GPTModule
from nanofed.training.recipe import accumulation_steps
from nanofed.training.run_folder import check_usable, is_used, resume_checkpoint
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import CONFIG, SUMMARY, Summary
from nanofed.training.wandb_run import check_wandb

logger = logging.getLogger(__name__)

Use = Literal["resume", "init_from", "validate"]


def check_start(
    module: GPTModule,
    data: TokenDataModule,
    options: RunOptions,
    *,
    kind: str,
    batch_tokens: int,
    config: str,
    place: Place,
    training: bool = True,
) -> int:
    """Refuse what would end a run at its first step, and return the micro-batches of an optimizer step.

    The first batch of training and of validation is really made: a missing tokenizer, a damaged shard, a document that is
    null in the first row groups, or too little text shows here.

    Args:
        module: the model to be trained.
        data: the data that it is trained on.
        options: the run's options.
        kind: `fit` or `federated`: whose checkpoint can be resumed.
        batch_tokens: tokens in an optimizer step.
        config: the resolved config, YAML: a resumed run is compared with its own.
        place: ranks and device that share a step.
        training: whether the training shards here are what the run trains on.

    Raises:
        ConfigError: a value, a batch or a checkpoint that does not fit, more memory than there is.
        DataError: no data or no tokenizer, or one that is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    accumulation = accumulation_steps(
        batch_tokens, device_batch_size=data.device_batch_size, sequence_len=data.sequence_len, world_size=place.ranks
    )
    if runtime.is_first_rank():
        check_usable(options)
        check_samples(options, data, module)
        if options.core_every:
            check_tasks(options)
        if options.wandb_project:
            check_wandb(options)
        data.dataset.identity  # noqa: B018  (what the checkpoints record is what was there now)
        check_checkpoints(module, data, options, kind, config, training=training)
        check_memory(module, data, place, batch_tokens=batch_tokens, force=options.force)
        next(iter(data.validation_loader(world_size=place.ranks)))
        next(data.loader(world_size=place.ranks).take(1))  # one, and none made ahead
    return accumulation


def check_samples(options: RunOptions, data: TokenDataModule, module: GPTModule) -> None:
    """Refuse a prompt of text samples that the model could not read together with what is to follow it."""
    longest = module.config.max_positions - SAMPLE_TOKENS
    for prompt in options.sample_prompts if options.sample_every else ():
        if (length := 1 + len(data.tokenizer.encode(prompt))) > longest:
            raise ConfigError(
                f"--sample_prompts: {prompt[:40]!r}… has {length:,} tokens with the one that begins a document, and this model "
                f"can read {longest:,} before a sample of {SAMPLE_TOKENS}: shorten it"
            )


def check_tasks(options: RunOptions) -> None:
    """Refuse a bundle of CORE's tasks that is not there or damaged, and say what its score will lack."""
    bundle = Bundle.read(options.core_data)
    bundle.check(options.core_examples)
    if bundle.missing:
        logger.info("CORE will be partial: %s lacks %s", bundle.path, ", ".join(bundle.missing))


def check_checkpoints(
    module: GPTModule, data: TokenDataModule, options: RunOptions, kind: str, config: str, *, training: bool = True
) -> None:
    """Refuse a checkpoint to resume or start from that is not there, damaged, or of another model or training."""
    run = options.folder
    resume = resume_checkpoint(run, options.ckpt_path)
    if resume is not None:
        manifest = read_manifest(resume)
        if manifest.kind != kind:
            raise ConfigError(f"{resume} is a {manifest.kind} checkpoint: start from its weights with --init_from")
        if is_used(run) and resume.resolve() not in [path.resolve() for path in checkpoints(run)]:
            raise ConfigError(f"{run} already holds a run, and {resume} is not of it: choose another --name")
        by_content = manifest.data is not None
        check_resumed_config(resume.parent.parent / CONFIG, config, force=options.force, by_content=by_content)
        check_identity(resume, manifest, module, data, "resume", force=options.force, training=training)
        if (run / SUMMARY).is_file():
            Summary.read(run)
    elif options.init_from:
        path = find_checkpoint(options.init_from)
        check_identity(path, read_manifest(path), module, data, "init_from", force=options.force)
        if options.overwrite and path.resolve().is_relative_to(run.resolve()):
            raise ConfigError(
                f"--overwrite true would remove {path}, which --init_from is to start from: choose another --name"
            )


def check_identity(
    path: Path,
    manifest: Manifest,
    module: GPTModule,
    data: TokenDataModule,
    use: Use,
    *,
    force: bool = False,
    training: bool = True,
) -> None:
    """Refuse a checkpoint that is of another model, tokenizer or text than its use allows, by fingerprint and not by name.

    Every use needs the same model and tokenizer; a run that goes on needs the same training and validation text too.
    `force` lets a run start from weights of another tokenizer of the same size, and go on with other text; a model of another
    shape, and other ids for the optimizer state or the figure of a validation, it does not make good.

    Args:
        path: the checkpoint.
        manifest: the checkpoint's manifest.
        module: the model here.
        data: tokenizer and shards here; the shards are opened for `resume` only.
        use: what the checkpoint is wanted for.
        force: say what differs in the log instead, where that makes sense.
        training: whether the training shards here are what the run trains on.

    Raises:
        ConfigError: it differs; says in what, and what to do.
        DataError: a shard cannot be read.
    """
    if manifest.tokenizer != data.tokenizer.fingerprint:
        problem = f"{path} was trained with another tokenizer than data.tokenizer: its ids mean other texts"
        possible = use == "init_from" and manifest.model.vocab_size == data.vocab_size
        if not (possible and force):
            other = ", or start from the weights all the same with --force true" if possible else ""
            raise ConfigError(
                f"{problem}: copy the checkpoint's own, {path / TOKENIZER}, to a folder that stays, and name it with "
                f"--data.tokenizer{other}"
            )
        say_once(logging.WARNING, f"forced: {problem}")
    check_model(manifest, module.config, path)
    if use != "resume":
        return
    if manifest.data is None:
        older = f"{path} was imported, or saved by an older nanofed, and does not record its text"
        say_once(logging.INFO, f"{older}: that data.path holds the same is not checked")
        return
    differing = manifest.data.differences(data.dataset.identity, training=training)
    if not differing:
        return
    problem = f"{data.dataset.path} is not the text that {path} was trained with: {'; '.join(differing)}"
    if not force:
        raise ConfigError(f"{problem}: restore it, start another run with --init_from, or pass --force true")
    say_once(logging.WARNING, f"forced: {problem}")
