"""fit, profile, federate, plan, load, evaluate, generate, complete, export: what notebooks import and what commands call."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanofed import runtime
from nanofed.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from nanofed.federated.planning import Plan
    from nanofed.generation.engine import Engine
    from nanofed.generation.text import Completion
    from nanofed.model import GPT
    from nanofed.tokenizer.bpe import Tokenizer
    from nanofed.training.checkpoint.format import Manifest
    from nanofed.training.evaluate import Evaluation
    from nanofed.training.profile import StepProfile
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

    Example:
        >>> summary = nanofed.fit("configs/tiny.yaml", overrides={"name": "short", "model.recipe.num_steps": 50})
        >>> summary.curve[-1].step, summary.ended
        (50, 'the horizon is reached')
        >>> summary.bpb_end < summary.bpb_start  # bits per byte of the same text
        True
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

        return run_validate(FitCLI([*arguments(config, overrides or {}), *args], command="validate", signals=signals))


def profile(
    *,
    args: Sequence[str] = (),
    trace: str | Path = "trace.json.gz",
    warm_up: int = 3,
    steps: int = 5,
) -> StepProfile | None:
    """Return what an optimizer step of `fit` is spent on, and write a trace of some steps for the browser; nothing else is kept.

    Args:
        args: command-line arguments, as `nanofed fit` takes them.
        trace: the file of the trace, Chrome's format; it is compressed where its name ends in `.gz`.
        warm_up: steps before those that are timed.
        steps: steps that are timed, and as many that are traced after them.

    Returns:
        The figures on the first rank, None on the others.

    Raises:
        ConfigError: a wrong option, or a model that does not fit into the memory.
        DataError: no shards or no tokenizer.
    """
    from nanofed.training.signals import Signals

    path = runtime.user_path(trace)
    if not path.parent.is_dir():
        raise ConfigError(f"the trace cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"the trace cannot be written: {path} is a folder, name a file")
    with Signals() as signals:
        from nanofed.training.lightning_cli import FitCLI
        from nanofed.training.profile import run_profile

        cli = FitCLI(list(args), command="profile", signals=signals)
        return run_profile(cli, path, warm_up=warm_up, steps=steps)


@dataclass(frozen=True)
class Loaded:
    """A trained model with its tokenizer, and with the manifest of its checkpoint, which other formats have none of."""

    model: GPT
    tokenizer: Tokenizer
    path: Path
    manifest: Manifest | None = None

    @cached_property
    def engine(self) -> Engine:
        """Generates with the model's weights as they are when it is first used."""
        from nanofed.generation.engine import Engine

        return Engine(self.model)


def load(
    checkpoint: str | Path, *, device: str | torch.device = "cpu", compute_dtype: torch.dtype | str | None = None
) -> Loaded:
    """Load model and tokenizer of a run (its newest checkpoint), of one checkpoint, or of an exported model.

    An exported model is what `export` makes, or its like: a folder of transformers' NanoChat, a checkpoint of nanochat's, or one
    safetensors file. Nothing in it is run.

    Args:
        checkpoint: the run folder, the checkpoint, or the exported folder or file.
        device: where the model runs.
        compute_dtype: dtype of the matmuls, or its name; None takes bf16 where the device multiplies it, else fp32.

    Raises:
        ConfigError: nothing there, or a dtype of another name than `float32` and `bfloat16`.
        CheckpointError: it is damaged, or of another architecture.
        DataError: it has no tokenizer, or one that is damaged.

    Example:
        >>> loaded = nanofed.load("runs/tiny")
        >>> ids = loaded.tokenizer.encode_document("The function returns")
        >>> logits = loaded.model(torch.tensor(ids[None].tolist()))  # (1, T, vocab)
        >>> logits.shape == (1, len(ids), loaded.tokenizer.vocab_size)
        True
    """
    from nanofed.formats.convert import read, to_dtype

    dtype = to_dtype(compute_dtype) if compute_dtype else runtime.default_compute_dtype(device)
    found = read(checkpoint)
    model = found.model(device, dtype)
    return Loaded(model, found.tokenizer, found.path, found.manifest)


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    to: Literal["hf", "nanochat", "torch"] = "hf",
    dtype: Literal["float32", "bfloat16"] = "float32",
    licence: str = "unknown",
    push: str | None = None,
) -> Path:
    """Write a trained model in another format, all of it or nothing, and return where it is.

    Args:
        checkpoint: a run folder (its newest checkpoint) or one checkpoint, of either path.
        output: the folder to make (`hf`, `nanochat`) or the file (`torch`); nothing may be there yet.
        to: `hf` is what transformers' `AutoModelForCausalLM` and `AutoTokenizer` load; `nanochat` a `NANOCHAT_BASE_DIR` with its
            checkpoint, optimizer state included where the checkpoint has one; `torch` one safetensors file.
        dtype: the dtype in which weights are written. `nanochat` has its own rule: fp32, but bf16 for an embedding that loses
            nothing by it.
        licence: the licence that the model card names, an identifier of the Hugging Face Hub's such as `apache-2.0`.
        push: `OWNER/NAME` of a repository on the Hugging Face Hub to upload the folder to as well; a new one is private.

    Raises:
        ConfigError: no checkpoint is there, something is at `output`, or the format cannot express the model.
        CheckpointError: the checkpoint is damaged.
        NanofedError: `output` cannot be written.
        DataError: the Hub cannot be reached, or refuses.

    Example:
        >>> path = nanofed.export("runs/tiny", "tiny.safetensors", to="torch")
        >>> nanofed.load(path).model.config == nanofed.load("runs/tiny").model.config
        True
    """
    from nanofed.formats import convert, huggingface
    from nanofed.training.checkpoint.format import find_checkpoint

    if push is not None:
        if to != "hf":
            raise ConfigError(f"--push uploads what transformers loads: export with --to hf, not {to}")
        huggingface.check_repository(push)
    path = runtime.user_path(output)
    convert.export(find_checkpoint(checkpoint), path, to, dtype=dtype, licence=licence, address=push or path.name)
    if push is not None:
        logger.info("uploaded to %s", huggingface.push(path, push))
    return path


def import_model(
    source: str | Path,
    name: str,
    *,
    runs_dir: str | Path = "runs",
    tokenizer: str | Path | None = None,
    step: int | None = None,
) -> Path:
    """Make a run of a model from elsewhere, for `fit` and `federate` to start from, and return its checkpoint.

    Args:
        source: a checkpoint of nanochat's of October 2025, a folder of transformers' NanoChat, or a safetensors file of `export`.
        name: the run's name; it may not be there yet.
        runs_dir: the folder of all runs.
        tokenizer: the folder of a nanochat checkpoint's tokenizer, where it lies in another place than nanochat's.
        step: which of several nanochat checkpoints; by default the last.

    Raises:
        ConfigError: nothing is there, or the run is there already.
        CheckpointError: it is damaged, or of another architecture; names what this GPT lacks.
        DataError: it has no tokenizer, or one that is damaged.

    Example:
        >>> folder = nanofed.export("runs/tiny", "tiny-hf")  # or any folder of transformers' NanoChat
        >>> checkpoint = nanofed.import_model(folder, "from-elsewhere")
        >>> summary = nanofed.fit("configs/tiny.yaml", overrides={"name": "on", "init_from": "runs/from-elsewhere"})
        >>> summary.bpb_start == nanofed.evaluate("runs/tiny").bpb
        True
    """
    from nanofed.formats.convert import import_run
    from nanofed.training.checkpoint.format import local_path
    from nanofed.training.run_options import RunOptions

    run = RunOptions(name=name, runs_dir=str(runs_dir)).folder
    own = None if tokenizer is None else local_path(tokenizer)
    return import_run(local_path(source), run, tokenizer=own, step=step)


def generate(
    checkpoint: str | Path | Loaded,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 42,
    device: str | torch.device = "cpu",
) -> Iterator[str]:
    """Yield pieces of text that go on from `prompt`, as they are drawn and each of whole characters.

    Args:
        checkpoint: what `load` takes, or what it has returned.
        prompt: the text to go on from, which is not repeated.
        max_tokens: the most tokens to draw; the text ends earlier where the model ends the document.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among the k likeliest tokens, None for all.
        top_p: draw among the fewest of the likeliest tokens whose probabilities add up to this.
        stop: texts of tokens that end it, such as `<|assistant_end|>`.
        seed: the seed of the random draws: the same seed draws the same tokens.
        device: where a checkpoint is loaded to.

    Raises:
        ConfigError: there is no checkpoint, or an argument is out of its range.
        CheckpointError: the checkpoint is damaged.

    Example:
        >>> text = "".join(nanofed.generate("runs/tiny", "def main", max_tokens=20, seed=1))
        >>> text == "".join(nanofed.generate("runs/tiny", "def main", max_tokens=20, seed=1))
        True
    """
    from nanofed.generation.sampling import Sampling
    from nanofed.generation.text import stream

    sampling = Sampling(temperature, top_k, top_p, seed)
    _check_text(prompt)
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, device=device)
    return stream(loaded.engine, loaded.tokenizer, prompt, sampling, max_tokens=max_tokens, stop=stop)


def complete(
    checkpoint: str | Path | Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 42,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
) -> Iterator[Completion]:
    """Yield what follows each of many prompts, in their order, `batch_size` of them generated side by side.

    Each prompt draws with the seed by itself, so that it becomes the same beside any others, as far as rounding allows.
    Other arguments and errors are those of `generate`.

    Example:
        >>> completions = list(nanofed.complete("runs/tiny", ["def main", "import"], max_tokens=20))
        >>> [completion.prompt for completion in completions]
        ['def main', 'import']
        >>> all(completion.num_tokens <= 20 for completion in completions)
        True
    """
    from nanofed.generation.sampling import Sampling
    from nanofed.generation.text import complete as complete_texts

    sampling = Sampling(temperature, top_k, top_p, seed)
    if isinstance(prompts, str):  # whose letters would be taken for the prompts
        raise ConfigError(f"generate: prompts takes a list of texts, such as [{prompts!r:.80}]")
    prompts = list(prompts)
    for prompt in prompts:
        _check_text(prompt)
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, device=device)
    return complete_texts(
        loaded.engine, loaded.tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, batch_size=batch_size
    )


def _check_text(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise ConfigError(f"the prompt must be text, not {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is no text: it cannot be written as UTF-8 ({error.reason})") from error


def evaluate(
    checkpoint: str | Path,
    data: str | Sequence[str] | None = None,
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
        checkpoint: a run folder, one checkpoint of either path, or an exported model.
        data: a dataset whose validation shard is scored (`demo`, `fineweb-edu` or a folder), or several, of which each is scored
            and all are pooled by bytes; by default the run's own.
        bpb: measure bits per byte.
        core: measure CORE.
        core_data: the bundle of CORE's tasks; by default the one that `nanofed data download --core` brings.
        core_examples: how many examples of each task are asked, from the first one on; 0 asks all.
        eval_tokens: how many targets of each are scored for bits per byte; by default as many as the run scores.
        device: where the model runs.
        compute_dtype: dtype of the matmuls, as `load` takes it, or its name; only figures of one dtype can be compared.
        progress: draw a bar of CORE's examples where standard error is a terminal.

    Raises:
        ConfigError: there is no checkpoint, or its run does not say what text it was validated with.
        CheckpointError: the checkpoint is damaged.
        DataError: there is no validation shard or no bundle, or it is damaged.

    Example:
        >>> print(nanofed.evaluate("runs/tiny").text())
        runs/tiny/checkpoints/step_...: step ..., ... M tokens
        bits per byte ...
        >>> nanofed.evaluate("runs/tiny", core=True, core_data="my-bundle").core.core <= 1
        True
    """
    from nanofed.evaluation.core.bundle import Bundle
    from nanofed.evaluation.core.score import evaluate_core
    from nanofed.training.evaluate import Evaluation, measure_bits_per_byte, write_into_run

    bundle = Bundle.read(core_data) if core else None
    if bundle is not None:
        bundle.check(core_examples)  # rather now than after hours of other tasks
    loaded = load(checkpoint, device=device, compute_dtype=compute_dtype)
    manifest = loaded.manifest  # a run that trains meanwhile may have removed the file
    figure = score = None
    texts: Mapping[str, float] = {}
    if bpb:
        named, model = [data] if isinstance(data, str) else data or (), loaded.model
        figure, texts = measure_bits_per_byte(model, loaded.tokenizer, loaded.path, manifest, named, eval_tokens)
    if bundle is not None:
        score = evaluate_core(loaded.model, loaded.tokenizer, bundle, examples=core_examples, progress=progress)
        if manifest is not None and runtime.is_first_rank():
            write_into_run(loaded.path, manifest, score)
    step, tokens = (None, None) if manifest is None else (manifest.step, manifest.tokens)
    return Evaluation(loaded.path, step, tokens, figure, score, texts)


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

    Example:
        >>> summary = nanofed.federate("configs/tiny_federated.yaml", overrides={"name": "four", "federation.clients": 4})
        >>> summary.kind, summary.bpb_end < summary.bpb_start
        ('federated', True)
        >>> summary.bytes > 0  # of weights and updates, to and from all clients
        True
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


def plan(places: str | Path, *, args: Sequence[str] = (), serving: bool = False) -> Plan:
    """Return how long rounds should be at given sites, and how weights should travel; nothing is trained.

    Args:
        places: YAML file of the sites' speeds and lines, such as `configs/sites.yaml`.
        args: command-line arguments, as `nanofed federate` takes them.
        serving: the run is one of `serve`'s, which takes no config where none is named, and not `federate`'s.

    Raises:
        ConfigError: a wrong option, or a wrong key in the file of the sites.
        DataError: no shards or no tokenizer.
    """
    from nanofed.federated.config import Arguments
    from nanofed.federated.planning import Places, Plan, Setting

    known = Places.read(str(places))
    arguments_of_run = Arguments.from_args(list(args) if serving else _federation_arguments(None, args, None))
    return Plan.of(Setting.of(arguments_of_run, len(known.sites)), known)


def serve(
    *,
    args: Sequence[str] = (),
    listen: str = "127.0.0.1:9092",
    keys: str | Path | None = None,
) -> Summary:
    """Serve a federation of sites until its end and return what the run came to; a run that is there already goes on.

    Args:
        args: command-line arguments, as `nanofed federate` takes them.
        listen: `host:port` where sites reach the server.
        keys: folder that `nanofed server init` wrote; without one, loopback only.

    Raises:
        ConfigError: a wrong option, an address on the network without keys, another server on the run.
        DataError: no shards or no tokenizer.
        NanofedError: the run crashed again and again.
    """
    from nanofed.federated.deploy.server import run_server
    from nanofed.federated.federation import Federation

    federation = Federation.from_args(list(args))
    if federation.federation.client_data is not None:
        raise ConfigError(
            "federation.client_data is for clients of one machine: a site names its own text with --data.path"
        )
    return run_server(federation, listen, keys)


def join(
    *,
    superlink: str,
    name: str,
    args: Sequence[str] = (),
    keys: str | Path | None = None,
    devices: int = 1,
    state: str | Path | None = None,
) -> None:
    """Take part in a federation with this machine's devices until this process is told to stop.

    Args:
        superlink: `host:port` of the server.
        name: the site's name, the same as long as the site takes part.
        args: command-line arguments, as `nanofed federate` takes them.
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
    run_site(options, list(args))
