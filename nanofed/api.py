"""fit, federate, plan, load, evaluate, generate: what notebooks import and what commands call."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanofed import runtime
from nanofed.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from nanofed.federated.planning import Plan
    from nanofed.model import GPT
    from nanofed.tokenizer.bpe import Tokenizer
    from nanofed.training.evaluate import Evaluation
    from nanofed.training.startup import Startup
    from nanofed.training.summary import Summary

logger = logging.getLogger(__name__)


def arguments(config: str | Path | None, overrides: Mapping[str, Any]) -> list[str]:
    """Turn a config file and keyword overrides into the command line that means the same.

    Raises:
        ConfigError: a value that no option can have; its key is named.
    """
    import json

    def plain(value: Any) -> Any:
        """Return what JSON knows in the place of what it does not know."""
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, os.PathLike):
            return os.fsdecode(value)
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, set | frozenset | range):
            return list(value)
        numbers = getattr(value, "tolist", None)  # of NumPy's scalars and arrays, and of tensors
        if callable(numbers) and not isinstance(value, type):
            return numbers()
        raise ConfigError(
            f"overrides: {key} is a {type(value).__name__}, which no option can be set to: {str(value)[:60]!r}"
        )

    args = ["--config", str(config)] if config is not None else []
    for key, value in overrides.items():
        text = json.dumps(value, default=plain, ensure_ascii=False)
        said = json.loads(text)
        args.append(f"--{key}={said if isinstance(said, str) else text}")
    return args


def fit(
    config: str | Path | None = None,
    *,
    args: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    startup: Startup | None = None,
) -> Summary:
    """Train on this machine or cluster with Lightning and return what the run came to.

    Args:
        config: YAML file such as `configs/tiny.yaml`.
        args: further command-line arguments, as `nanofed fit` takes them.
        overrides: dotted keys and values, such as `{"model.recipe.num_steps": 100}`.
        startup: counts the time to the first step; by default from this call on.

    Raises:
        ConfigError: a wrong option, or a run of that name is there already.
        DataError: no shards or no tokenizer.
    """
    from nanofed.training.signals import Signals
    from nanofed.training.startup import Startup

    startup = startup or Startup()
    with Signals() as signals:  # before what takes seconds to import
        from nanofed.training.fit import run_fit
        from nanofed.training.lightning_cli import FitCLI

        startup.done("imports")
        return run_fit(FitCLI([*arguments(config, overrides or {}), *args], signals=signals, startup=startup))


def validate(
    config: str | Path | None = None, *, args: Sequence[str] = (), overrides: dict[str, Any] | None = None
) -> float:
    """Return bits per byte of a checkpoint (`ckpt_path`, of either path) on the validation shard of the config's data."""
    from nanofed.training.signals import Signals

    with Signals() as signals:
        from nanofed.training.fit import run_validate
        from nanofed.training.lightning_cli import FitCLI

        return run_validate(FitCLI([*arguments(config, overrides or {}), *args], validate_only=True, signals=signals))


@dataclass(frozen=True)
class Loaded:
    """A trained model with its tokenizer."""

    model: GPT
    tokenizer: Tokenizer
    path: Path


def load(
    checkpoint: str | Path, *, device: str | torch.device = "cpu", compute_dtype: torch.dtype | None = None
) -> Loaded:
    """Load model and tokenizer from a run folder (its newest checkpoint) or from one checkpoint, of either path.

    Args:
        checkpoint: the run folder or the checkpoint.
        device: where the model runs.
        compute_dtype: dtype of the matmuls; None takes bf16 where the device multiplies it, else fp32.

    Raises:
        ConfigError: nothing there.
        CheckpointError: it is damaged.
    """
    import torch

    from nanofed.model import GPT
    from nanofed.tokenizer.bpe import Tokenizer
    from nanofed.training.checkpoint import TOKENIZER, find_checkpoint, read_manifest, read_weights

    path = find_checkpoint(checkpoint)
    manifest = read_manifest(path)
    with torch.device("meta"):
        model = GPT(manifest.model, compute_dtype=compute_dtype or runtime.default_compute_dtype(device))
    model.to_empty(device=device)
    model.load_state_dict(read_weights(path), strict=True)
    return Loaded(model.eval(), Tokenizer.load(path / TOKENIZER), path)


def generate(
    checkpoint: str | Path | Loaded,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 42,
    device: str | torch.device = "cpu",
) -> Iterator[str]:
    """Yield pieces of text that go on from `prompt`; temperature 0 takes the likeliest token each time."""
    from nanofed.generation.text import generate as stream

    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is no text: it cannot be written as UTF-8 ({error.reason})") from error
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, device=device)
    return stream(
        loaded.model, loaded.tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    )


def evaluate(
    checkpoint: str | Path,
    data: str | None = None,
    *,
    bpb: bool = True,
    core: bool = False,
    core_data: str | Path | None = None,
    core_examples: int = 0,
    eval_tokens: int | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Return bits per byte and CORE of a checkpoint, over all ranks where a process group is there.

    CORE is the mean over tasks of accuracy, each centred by what a random answer is worth (Li et al. 2024, arXiv:2406.11794). It
    is written into the TensorBoard files of the checkpoint's run as well.

    Args:
        checkpoint: a run folder or one checkpoint, of either path.
        data: a dataset whose validation shard is scored (`demo`, `fineweb-edu` or a folder); by default the run's own.
        bpb: measure bits per byte.
        core: measure CORE.
        core_data: the bundle of CORE's tasks; by default the one that `nanofed data download --core` brings.
        core_examples: examples to ask of each task, the first ones; 0 asks all.
        eval_tokens: targets to score for bits per byte; by default the run's number.
        device: where the model runs.
        compute_dtype: dtype of the matmuls, as `load` takes it, or its name; only figures of one dtype can be compared.
        progress: draw a bar of CORE's examples where standard error is a terminal.

    Raises:
        ConfigError: there is no checkpoint, or its run does not say what text it was validated with.
        CheckpointError: the checkpoint is damaged.
        DataError: there is no validation shard or no bundle, or it is damaged.
    """
    from nanofed.evaluation.core.bundle import Bundle
    from nanofed.evaluation.core.score import evaluate_core
    from nanofed.training.checkpoint import read_manifest
    from nanofed.training.evaluate import Evaluation, measure_bits_per_byte, write_into_run
    from nanofed.training.module import DTYPES

    bundle = Bundle.read(core_data) if core else None
    dtype = DTYPES[compute_dtype] if isinstance(compute_dtype, str) else compute_dtype
    loaded = load(checkpoint, device=device, compute_dtype=dtype)
    manifest = read_manifest(loaded.path, verify=False)
    figure = score = None
    if bpb:
        figure = measure_bits_per_byte(loaded.model, loaded.tokenizer, loaded.path, data, eval_tokens)
    if bundle is not None:
        score = evaluate_core(loaded.model, loaded.tokenizer, bundle, examples=core_examples, progress=progress)
        if runtime.is_first_rank():
            write_into_run(loaded.path, manifest, score)
    return Evaluation(loaded.path, manifest.step, manifest.tokens, figure, score)


def ranks(device: str) -> AbstractContextManager[torch.device]:
    """Join the ranks that torchrun has started, for the block, and return this rank's device: `evaluate` divides its work."""
    from nanofed.training.evaluate import process_group

    return process_group(device)


def federate(
    config: str | Path | None = None, *, args: Sequence[str] = (), overrides: dict[str, Any] | None = None
) -> Summary:
    """Train the same model across clients with Flower and return what the run came to.

    Args:
        config: YAML file; by default nanofed's own `tiny_federated`, on the demo corpus, building what is missing.
        args: further command-line arguments, as `nanofed federate` takes them.
        overrides: dotted keys and values.

    Raises:
        ConfigError: a wrong option, or a run of that name is there already.
        DataError: no shards or no tokenizer.
    """
    from nanofed.federated.federation import Federation
    from nanofed.federated.runtimes.in_process import run_in_process

    federation = Federation.from_args(_federation_arguments(config, args, overrides))
    if federation.config.runtime == "simulation":
        from nanofed.federated.runtimes.simulation import run_simulation

        return run_simulation(federation)
    if federation.config.runtime == "deployment":
        from nanofed.federated.deploy.local_deployment import run_deployment

        return run_deployment(federation)
    return run_in_process(federation)


def _federation_arguments(
    config: str | Path | None, args: Sequence[str], overrides: dict[str, Any] | None
) -> list[str]:
    """Return the command line of a federation, which is `tiny_federated` where no config is named."""
    if config is None and not any(arg in ("-c", "--config") or arg.startswith("--config=") for arg in args):
        config = runtime.config_file("tiny_federated.yaml")
    return [*arguments(config, overrides or {}), *args]


def plan(
    places: str | Path,
    config: str | Path | None = None,
    *,
    args: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
) -> Plan:
    """Return how long rounds should be at given sites, and how weights should travel; nothing is trained.

    Args:
        places: YAML file of the sites' speeds and lines, such as `configs/sites.yaml`.
        config: YAML file of the federation, as `federate` takes it.
        args: further command-line arguments, as `nanofed federate` takes them.
        overrides: dotted keys and values.

    Raises:
        ConfigError: a wrong option, or a wrong key in the file of the sites.
        DataError: no shards or no tokenizer.
    """
    from nanofed.federated.config import Arguments
    from nanofed.federated.planning import Places, Plan, Setting

    known = Places.read(str(places))
    arguments_of_run = Arguments.from_args(_federation_arguments(config, args, overrides))
    return Plan.of(Setting.of(arguments_of_run, len(known.sites)), known)


def serve(
    config: str | Path | None = None,
    *,
    args: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    listen: str = "127.0.0.1:9092",
    keys: str | Path | None = None,
) -> Summary:
    """Serve a federation of sites until its end and return what the run came to; a run that is there already goes on.

    Args:
        config: YAML file.
        args: further command-line arguments, as `nanofed federate` takes them.
        overrides: dotted keys and values.
        listen: `host:port` where sites reach the server.
        keys: folder that `nanofed server init` wrote; without one, loopback only.

    Raises:
        ConfigError: a wrong option, an address on the network without keys, another server on the run.
        DataError: no shards or no tokenizer.
        NanofedError: the run crashed again and again.
    """
    from nanofed.federated.deploy.server import run_server
    from nanofed.federated.federation import Federation

    federation = Federation.from_args([*arguments(config, overrides or {}), *args])
    return run_server(federation, listen, keys)


def join(
    config: str | Path | None = None,
    *,
    superlink: str,
    name: str,
    args: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    keys: str | Path | None = None,
    devices: int = 1,
    state: str | Path | None = None,
) -> None:
    """Take part in a federation with this machine's devices until this process is told to stop.

    Args:
        config: YAML file: model and data as at the server.
        superlink: `host:port` of the server.
        name: the site's name, the same as long as the site takes part.
        args: further command-line arguments, as `nanofed federate` takes them.
        overrides: dotted keys and values.
        keys: the folder that was handed out to the site; without one, loopback only.
        devices: devices of this machine that train together.
        state: folder for what the site keeps; by default `sites/NAME` in the cache folder.

    Raises:
        ConfigError: a wrong option, an address on the network without keys, the same site running already.
        DataError: no shards or no tokenizer.
    """
    from nanofed.federated.deploy.site import run_site
    from nanofed.federated.site.options import site_options

    options = site_options(superlink, name, keys=keys, devices=devices, state=state)
    run_site(options, [*arguments(config, overrides or {}), *args])
