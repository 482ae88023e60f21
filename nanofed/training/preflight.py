"""What is checked before a run writes anything: batch, data, tokenizer, and the checkpoint that it is to start from."""

from __future__ import annotations

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.data.packing import PACKERS
from nanofed.errors import ConfigError
from nanofed.generation.text import SAMPLE_TOKENS
from nanofed.training.checkpoint import check_model, checkpoints, find_checkpoint, read_manifest
from nanofed.training.fitting import Place, check_memory
from nanofed.training.module import GPTModule
from nanofed.training.options import RunOptions
from nanofed.training.recipe import accumulation_steps
from nanofed.training.resuming import check_resumed_config
from nanofed.training.run import CONFIG, SUMMARY, Summary
from nanofed.training.run_folder import check_usable, is_used, resume_checkpoint


def check_start(
    module: GPTModule,
    data: TokenDataModule,
    options: RunOptions,
    *,
    kind: str,
    batch_tokens: int,
    config: str,
    place: Place,
) -> int:
    """Refuse what would end a run at its first step, and return the micro-batches of an optimizer step.

    The first batch of training and of validation is really made: a missing tokenizer, a damaged shard, a document that is
    null in the first row groups, or too little text shows here.

    Args:
        module: the model to be trained.
        data: its data.
        options: of the run.
        kind: `fit` or `federated`: whose checkpoint can be resumed.
        batch_tokens: tokens of an optimizer step.
        config: the resolved config, YAML: a resumed run is compared with its own.
        place: ranks and device that share a step.

    Raises:
        ConfigError: a value, a batch or a checkpoint that does not fit, more memory than there is.
        DataError: no data or no tokenizer, or one that is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    check_data_options(data)
    accumulation = accumulation_steps(
        batch_tokens,
        device_batch_size=data.device_batch_size,
        sequence_len=data.sequence_len,
        world_size=place.ranks,
    )
    if runtime.is_first_rank():
        check_usable(options)
        check_samples(options, data, module)
        check_checkpoints(module, data, options, kind, config)
        check_memory(module, data, place, batch_tokens=batch_tokens, force=options.force)
        next(iter(data.validation_loader(world_size=place.ranks)))
        next(data.loader(world_size=place.ranks).take(1))  # one, and none made ahead
    return accumulation


def check_data_options(data: TokenDataModule) -> None:
    """Refuse numbers that are not positive, and a packing that is not known."""
    for name in ("device_batch_size", "streams", "eval_tokens"):
        if getattr(data, name) < 1:
            raise ConfigError(f"data.{name} must be at least 1, not {getattr(data, name)}")
    if data.packing not in PACKERS:
        raise ConfigError(f"data.packing={data.packing!r} is unknown: choose {' or '.join(PACKERS)}")


def check_samples(options: RunOptions, data: TokenDataModule, module: GPTModule) -> None:
    """Refuse a prompt of text samples that the model could not read together with what is to follow it."""
    longest = module.config.max_positions - SAMPLE_TOKENS
    for prompt in options.sample_prompts if options.sample_every else ():
        if (length := 1 + len(data.tokenizer.encode(prompt))) > longest:
            raise ConfigError(
                f"--sample_prompts: {prompt[:40]!r}… has {length:,} tokens with the one that begins a document, and this model "
                f"can read {longest:,} before a sample of {SAMPLE_TOKENS}: shorten it"
            )


def check_checkpoints(module: GPTModule, data: TokenDataModule, options: RunOptions, kind: str, config: str) -> None:
    """Refuse a checkpoint to resume or start from that is not there, damaged, or of another model or training."""
    run = options.folder
    resume = resume_checkpoint(run, options.ckpt_path)
    if resume is not None:
        manifest = read_manifest(resume)
        if manifest.kind != kind:
            raise ConfigError(f"{resume} is a {manifest.kind} checkpoint: start from its weights with --init_from")
        if is_used(run) and resume.resolve() not in [path.resolve() for path in checkpoints(run)]:
            raise ConfigError(f"{run} already holds a run, and {resume} is not of it: choose another --name")
        check_resumed_config(resume.parent.parent / CONFIG, config, force=options.force)
        check_model(manifest, module.config, resume)
        if manifest.tokenizer != data.tokenizer.fingerprint:
            raise ConfigError(
                f"{resume} was trained with another tokenizer than data.tokenizer: its ids mean other texts"
            )
        if (run / SUMMARY).is_file():
            Summary.read(run)
    elif options.init_from:
        path = find_checkpoint(options.init_from)
        check_model(read_manifest(path), module.config, path)
        if options.overwrite and path.resolve().is_relative_to(run.resolve()):
            raise ConfigError(
                f"--overwrite true would remove {path}, which --init_from is to start from: choose another --name"
            )
