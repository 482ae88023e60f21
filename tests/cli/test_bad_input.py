"""Bad input: one line on stderr that names the thing, the right exit code, and not a byte changed on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache

from nanofed import cli
from tests.cli.conftest import Corpus


@pytest.fixture
def closed_port() -> str:
    """An address on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def nothing_to_fall_back_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: str) -> None:
    """No caches, no network, an empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.setenv(name, closed_port)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def snapshot(*folders: Path) -> dict[str, str]:
    """Every file and folder below, with the hash of its bytes."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in folder.rglob("*")
    }


class Refusal:
    """Runs a command that must be refused, and compares what was said and what is on disk."""

    def __init__(self, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folders = (corpus.folder, tmp_path)
        self._capsys = capsys

    def __call__(self, argv: list[str], code: int, *fragments: str) -> None:
        before = snapshot(*self._folders)
        self._capsys.readouterr()
        assert cli.main(argv) == code
        captured = self._capsys.readouterr()
        line = captured.err
        assert line.startswith(f"nanofed {argv[0]}: ")
        assert line.count("\n") == 1, line
        assert len(line) < 400, line
        assert "Traceback" not in line and "usage:" not in line and "<class" not in line
        for fragment in fragments:
            assert fragment in line
        assert captured.out == ""
        assert snapshot(*self._folders) == before


@pytest.fixture
def refused(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(corpus, tmp_path, capsys)


def config_with(corpus: Corpus, tmp_path: Path, command: str, change: Callable[[dict[str, Any]], object]) -> str:
    """Write the corpus's config of a command with a change, and return its path."""
    content = yaml.safe_load(Path(corpus.start(command)[-1]).read_text())
    change(content)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


# --- the command line and the config file

OPTIONS: list[tuple[str, str, list[str]]] = [
    ("--nmae=x", "there is no option nmae; did you mean name?", ["fit", "federate"]),
    ("--depth=3", "there is no option depth; did you mean model.depth?", ["fit", "federate"]),
    ("--model.depht=3", "there is no option model.depht; did you mean model.depth?", ["fit", "federate"]),
    ("--model.recipe.batch_tokns=3", "did you mean model.recipe.batch_tokens?", ["fit", "federate"]),
    ("--fedration.clients=3", "did you mean federation.clients?", ["federate"]),
    ("--zzz.qqq=3", "there is no option zzz.qqq (--help lists them)", ["fit"]),
    ("--federation.clients=3", "there is no option federation.clients here: it is one of `nanofed federate`", ["fit"]),
    ("--trainer.devices=3", "there is no option trainer.devices here: it is one of `nanofed fit`", ["federate"]),
    ("--model.depth=deep", "model.depth must be int, not deep", ["fit", "federate"]),
    ("--model.recipe.num_steps=ten", "model.recipe.num_steps must be int or null, not ten", ["fit", "federate"]),
    ("--model.compute_dtype=float16", "must be one of 'auto', 'float32', 'bfloat16', not float16", ["fit"]),
    ("--federation.weighting=sum", "federation.weighting must be one of 'uniform', 'tokens', not sum", ["federate"]),
    ("--data.path", "argument --data.path: expected one argument", ["fit"]),
    ("--seed_everything=true", "seed_everything must be", ["fit", "federate"]),
    ("--data.sequence_len=64", "data.sequence_len follows model.sequence_len", ["fit", "federate"]),
    ("--model.vocab_size=7", "model.vocab_size follows data.* and cannot be set", ["fit"]),
    ("--model.recipe.horizon_tokens=5", "the horizon 2 times (num_steps, horizon_tokens)", ["fit", "federate"]),
    ("--model.recipe.num_steps=0", "model.recipe.num_steps must be at least 1, not 0", ["fit", "federate"]),
    ("--model.recipe.batch_tokens=700", "use 512 or 768", ["fit", "federate"]),
    ("--data.device_batch_size=6", "use 384 or 576, or data.device_batch_size 4 or 8", ["fit", "federate"]),
    ("--model.depth=100", ": take model.depth ", ["fit", "federate"]),  # some 200 GB of weights and states
    ("--model.depth=5", "depth 5 gives a width of 320, not 3 equal heads; take an even depth", ["fit", "federate"]),
    ("--data.packing=worst", "data.packing='worst' is unknown: choose contiguous or best_fit", ["fit", "federate"]),
    ("--name=a/b", "--name 'a/b' is not a plain folder name", ["fit", "federate"]),
    (f"--name={'n' * 300}", "cannot name a folder everywhere: up to 200 bytes of printable", ["fit", "federate"]),
    ("--name=a\nb", "--name 'a\\nb' cannot name a folder everywhere", ["fit", "federate"]),
    ("--name=\x1b[31m", "--name '\\x1b[31m' cannot name a folder", ["fit"]),
    ("--name=a\udcffb", "--name 'a\\udcffb' cannot name a folder", ["fit"]),
    (f"--runs_dir={'n' * 300}", "is too long a path", ["fit", "federate"]),
    (f"--data.path={'n' * 300}", "is too long a path", ["fit", "federate"]),
    (f"--data.tokenizer={'n' * 300}", "is too long a path", ["fit"]),
    (f"--ckpt_path={'n' * 300}", "is too long a path", ["fit", "federate"]),
    (f"--config={'n' * 300}", "is too long a path", ["fit", "federate"]),
    ("--name=..", "--name '..' is not a plain folder name", ["fit"]),
    ("--trainer.devices=3", "no multiple of 3 ranks x 8 rows x 32 tokens", ["fit"]),
    ("--trainer.accelerator=toaster", "trainer: You selected an invalid accelerator name", ["fit"]),
    ("--trainer.gradient_clip_val=1", "trainer.gradient_clip_val is not used: set model.recipe.clip", ["fit"]),
    ("--trainer.fast_dev_run=true", "trainer.fast_dev_run is not used: set model.recipe.num_steps", ["fit"]),
    ("--trainer.limit_val_batches=0.5", "trainer.limit_val_batches is not used: set data.eval_tokens", ["fit"]),
    ("--trainer.limit_train_batches=0.5", "trainer.limit_train_batches is not used: set model.", ["fit"]),
    ("--trainer.overfit_batches=2", "trainer.overfit_batches is not used: set data.num_shards", ["fit"]),
    ("--trainer.enable_checkpointing=true", "trainer.enable_checkpointing is not used: set --save_every", ["fit"]),
    ("--trainer.logger=WandbLogger", "wandb", ["fit"]),
    ("--trainer.logger=MLFlowLogger", "mlflow", ["fit"]),
    ("--trainer.logger=nope.Nope", "trainer.logger must be", ["fit"]),
    ("--trainer.profiler=nope", "only be one of ['simple', 'advanced', 'pytorch', 'xla'] (set: trainer.", ["fit"]),
    ("--trainer.strategy=nope", "trainer: You selected an invalid strategy name", ["fit"]),
    ("--trainer.strategy=deepspeed", "trainer: To use the `DeepSpeedStrategy`", ["fit"]),
    ("--trainer.strategy=fsdp", "trainer: The strategy `fsdp` requires a GPU", ["fit"]),
    ("--trainer.devices=0", "trainer: `Trainer(devices='0')` value is not a valid input", ["fit"]),
    ("--trainer.devices=x", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0", ["fit"]),
    ("--trainer.num_nodes=0", "trainer: `num_nodes` must be a positive integer, but got 0", ["fit"]),
    ("--trainer.plugins=nope", "trainer.plugins must be", ["fit"]),
    ("--trainer.plugins=TorchCheckpointIO", "trainer: ", ["fit"]),
    ("--trainer.callbacks=nope.Nope", "trainer.callbacks must be", ["fit"]),
    ("--trainer.callbacks=ModelCheckpoint", "trainer: ", ["fit"]),
    (
        "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: x}}]",
        "trainer.callbacks: EarlyStopping monitors 'x'; all there is is 'val/bpb'",
        ["fit"],
    ),
    ("--trainer.max_time=nope", "trainer: `Timer(duration='nope')` is not a valid duration", ["fit"]),
    ("--trainer.max_steps=5", "trainer.max_steps is not used: set model.recipe.num_steps", ["fit"]),
    ("--trainer.precision=16-true", "trainer.precision is not used: set model.compute_dtype", ["fit"]),
    ("--federation.client_speeds=[1,2,3]", "client_speeds names 3 speeds for 2 clients", ["federate"]),
    ("--federation.client_data=[a,b,c]", "client_data names 3 folders for 2 clients", ["federate"]),
    ("--federation.client_data=[a,b]", "set federation.sharding to local, not shards", ["federate"]),
    ("--federation.outer_momentum=2", "outer_momentum", ["federate"]),
    ("--federation.global_batch_tokens=513", "global_batch_tokens=513 is no multiple of 2 clients", ["federate"]),
    ("--federation.global_batch_tokens=1000", "global_batch_tokens=1,000 is no multiple of 2 clients x", ["federate"]),
    ("--fabric.devices=2", "a client trains on one device", ["federate"]),
]


@pytest.mark.parametrize(
    ("command", "option", "message"), [(command, *rest) for *rest, commands in OPTIONS for command in commands]
)
def test_a_wrong_option(
    command: str, option: str, message: str, corpus: Corpus, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # wandb is installed here; Lightning shall look for one that is not.
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=999"))
    refused(corpus.start(command, option), 2, message)


def test_a_server_has_no_text_of_its_sites(corpus: Corpus, refused: Refusal) -> None:
    own = ["--federation.sharding=local", "--federation.client_data=[a,b]"]
    refused(["server", *corpus.start("federate", *own)[1:]], 2, "a site names its own text with --data.path")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("command", "option"), [("fit", "--trainer.accelerator=gpu"), ("federate", "--fabric.accelerator=cuda")]
)
def test_a_device_that_is_not_there(command: str, option: str, corpus: Corpus, refused: Refusal) -> None:
    refused(corpus.start(command, option), 2, "accelerator" if command == "federate" else "gpu")


@pytest.mark.parametrize("command", ["fit", "federate", "validate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nmae: x\n", "there is no option nmae; did you mean name?"),
        (b"modle:\n  depth: 3\n", "there is no option modle.depth; did you mean model.depth?"),
        (b"model:\n  depht: 3\n", "there is no option model.depht; did you mean model.depth?"),
        (
            b"model: {recipe: {batch_tokns: 3}}\n",
            "no option model.recipe.batch_tokns; did you mean model.recipe.batch_",
        ),
        (b"model: {depth: deep}\n", "model.depth must be int, not deep"),
        (b"model: 3\n", "model is a section of keys and values, not 3"),
        (b"data: {path: [1\n", "is not valid YAML in line 2, column 1"),
        (b"\tname: x\n", "is not valid YAML in line 1, column 1"),
        (b"just text\n", "is no mapping of keys to values: it holds just text"),
        (b"", "is no mapping of keys to values: it holds nothing"),
        (b"\xff\xfe\x00a: 3", "cannot be read as UTF-8 text"),
    ],
)
def test_a_wrong_config_file(command: str, content: bytes, message: str, tmp_path: Path, refused: Refusal) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    refused([command, "--config", str(path)], 2, str(path), message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit"], "name a config: nanofed fit --config configs/tiny.yaml"),
        (["validate"], "name a config: nanofed validate --config configs/tiny.yaml"),
        (["fit", "--config"], "--config needs a file"),
        (["fit", "--config", "nope.yaml"], "there is no config file nope.yaml"),
        (["federate", "--config=nope.yaml"], "there is no config file nope.yaml"),
        (["fit", "--config", "."], "there is no config file ."),
        (["fit", "nope"], "there is no option nope"),
    ],
)
def test_no_config_file(argv: list[str], message: str, refused: Refusal) -> None:
    refused(argv, 2, message)


# --- data and tokenizer


def table(**columns: Any) -> Callable[[Path], None]:
    """Return what replaces a shard by a table, in a folder without hashes."""

    def write(shard: Path) -> None:
        (shard.parent / "dataset.json").unlink()
        pq.write_table(pa.table(columns), shard)

    return write


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def truncate_unlisted(shard: Path) -> None:
    (shard.parent / "dataset.json").unlink()
    truncate(shard)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


without_text = table(body=["a", "b"])
WITHOUT_TEXT = "shard_00001.parquet has no `text` column; its columns are body: `nanofed data pack "
# What is done to which file, and what is said; shard_00004 is for validation.
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("shard_00001.parquet", truncate, "shard_00001.parquet"),
    "truncated, no manifest": ("shard_00001.parquet", truncate_unlisted, "shard_00001.parquet"),
    "no text": ("shard_00001.parquet", without_text, WITHOUT_TEXT),
    "numbers": ("shard_00001.parquet", table(text=[1, 2]), "shard_00001.parquet"),
    "nulls": ("shard_00000.parquet", table(text=pa.array([None, "a"] * 30)), "shard_00000.parquet has a null"),
    "nulls at the end": (
        "shard_00004.parquet",
        table(text=pa.array(["a", None] * 30)),
        "shard_00004.parquet has a null",
    ),
    "blank": ("shard_00004.parquet", table(text=[""]), "shard_00004.parquet holds no text to score"),
    "missing shard": ("shard_00001.parquet", Path.unlink, "lacks shard_00001.parquet"),
    "manifest": ("dataset.json", lambda path: path.write_text("{"), "dataset.json cannot be read"),
    "empty": (".", empty, "holds no parquet shards"),
    "missing": (".", shutil.rmtree, "there is no data folder"),
}


@pytest.mark.parametrize("command", ["fit", "federate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_data(command: str, damage: str, corpus: Corpus, tmp_path: Path, refused: Refusal) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus.data, data)
    name, change, message = DAMAGES[damage]
    change(data / name)
    config = config_with(corpus, tmp_path, command, lambda content: content["data"].update(path=str(data)))
    refused([command, "--config", config], 3, str(data), message)


@pytest.mark.parametrize(
    "argv", [["data", "list"], ["data", "verify"], ["tokenizer", "train"], ["tokenizer", "eval"]], ids=" ".join
)
def test_text_in_a_column_of_another_name(
    argv: list[str], corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The columns that are there are named, and the command that makes shards of the right one."""
    data = tmp_path / "data"
    shutil.copytree(corpus.data, data)
    without_text(data / "shard_00001.parquet")
    more = ["--tokenizer", str(corpus.tokenizer)] if argv[1] == "eval" else []
    assert cli.main([*argv, "--data", str(data), *more]) == 3
    captured = capsys.readouterr()
    assert f"{WITHOUT_TEXT}{data} --key NAME --output DIR` makes shards" in captured.out + captured.err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.num_shards=99", "has 4 training shards, 99 were asked for"),
        ("--data.validation_shard=x", "has no shard 'x'"),
    ],
)
def test_data_that_is_not_enough(option: str, message: str, corpus: Corpus, refused: Refusal) -> None:
    refused(corpus.start("fit", option), 3, message)


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_no_tokenizer(command: str, corpus: Corpus, tmp_path: Path, refused: Refusal) -> None:
    default = str(tmp_path / "base" / "tokenizer")
    refused(corpus.start(command, "--data.tokenizer=null"), 3, default, "nanofed tokenizer train")
    refused(corpus.start(command, "--data.tokenizer=nowhere"), 3, "there is no folder nowhere")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    damaged = f"--data.tokenizer={tmp_path / 'tokenizer'}"
    refused(corpus.start(command, damaged), 3, str(tmp_path / "tokenizer" / "tokenizer.json"), "is damaged")


def test_no_network(closed_port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "download", "-n", "1", "--base_url", f"{closed_port}/shards"]) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"cannot reach {closed_port}/shards" in line and "nanofed data demo" in line
    left = [path for path in (tmp_path / "base").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert left == []


# --- the run's folder


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_a_run_folder_that_cannot_be_made(command: str, corpus: Corpus, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "file.txt").write_text("a file")
    below = tmp_path / "file.txt" / "runs"
    refused(corpus.start(command, f"--runs_dir={below}", "--name=x"), 1, str(below), "Not a directory")
    (tmp_path / "x").write_text("a file in the place of the run")
    refused(corpus.start(command, f"--runs_dir={tmp_path}", "--name=x"), 1, str(tmp_path / "x"), "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_that_is_read_only(corpus: Corpus, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(corpus.start("fit", f"--runs_dir={tmp_path / 'locked'}"), 1, "Permission denied")


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_a_run_is_never_replaced_unasked(command: str, corpus: Corpus, runs: Path, refused: Refusal) -> None:
    here = corpus.start(command, f"--runs_dir={runs}")
    refused(here, 2, str(runs / command), "already holds a run", "--ckpt_path last", "--overwrite true")
    refused([*here, "--overwrite=true", "--ckpt_path=last"], 2, "--overwrite true would delete the run")
    # Nothing is deleted before the run that is to take its place has been checked.
    refused([*here, "--overwrite=true", "--data.path=nowhere"], 3, "there is no data folder nowhere")
    refused([*here, "--overwrite=true", "--model.recipe.batch_tokens=700"], 2, "use 512 or 768")


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_a_run_goes_on_as_it_began(command: str, corpus: Corpus, runs: Path, refused: Refusal) -> None:
    last = corpus.start(command, f"--runs_dir={runs}", "--ckpt_path=last")
    listed = "data.streams 8 -> 4; model.recipe.batch_tokens 512 -> 1024"
    changes = ["--data.streams=4", "--model.recipe.batch_tokens=1024", "--log_every=3"]
    refused([*last, *changes], 2, str(runs / command / "config.yaml"), listed, "--force true")


@pytest.mark.parametrize("command", ["fit", "federate"])
@pytest.mark.parametrize("key", ["ckpt_path", "init_from"])
def test_a_checkpoint_that_does_not_fit(command: str, key: str, corpus: Corpus, runs: Path, refused: Refusal) -> None:
    start = corpus.start(command, f"--runs_dir={runs}", "--name=new")
    refused([*start, f"--{key}=nonsense"], 2, "there is no checkpoint in nonsense")
    refused([*start, f"--{key}=https://example.org/run"], 2, "https://example.org/run is a URL")
    other = "holds another model: n_layer 1 there" if key == "init_from" else "model.depth 1 -> 2: take its values"
    refused([*start, f"--{key}={runs / command}", "--model.depth=2"], 2, other)


def test_a_checkpoint_of_the_other_path_or_of_another_run(corpus: Corpus, runs: Path, refused: Refusal) -> None:
    for command, other in (("fit", "federate"), ("federate", "fit")):
        start = corpus.start(command, f"--runs_dir={runs}", "--name=new")
        refused([*start, f"--ckpt_path={runs / other}"], 2, "start from its weights with --init_from")
    shutil.copytree(runs / "fit", runs / "copy")
    into = corpus.start("fit", f"--runs_dir={runs}", f"--ckpt_path={runs / 'copy'}")
    refused(into, 2, str(runs / "fit"), "already holds a run", "is not of it")


def test_a_run_is_not_replaced_by_one_that_starts_from_it(corpus: Corpus, runs: Path, refused: Refusal) -> None:
    for command in ("fit", "federate"):
        over = corpus.start(command, f"--runs_dir={runs}", f"--name={command}", "--overwrite=true")
        refused([*over, f"--init_from={runs / command}"], 2, "--overwrite true would remove", str(runs / command))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint(corpus: Corpus, runs: Path, refused: Refusal) -> None:
    for command in ("fit", "federate"):
        weights = newest(runs / command) / "model.safetensors"
        for path in (runs / command / "checkpoints").iterdir():  # with one that is whole, a run goes on from that
            flip(path / "model.safetensors")
        here = corpus.start(command, f"--runs_dir={runs}")
        says = (str(weights.parent.parent), f"{weights.parent.name}/model.safetensors", "SHA-256 differs")
        refused([*here, "--ckpt_path=last"], 1, *says)
        refused([*here, "--name=new", f"--init_from={runs / command}"], 1, *says)
        refused(corpus.start("validate", f"--ckpt_path={runs / command}"), 1, *says)
        refused(["generate", "--checkpoint", str(runs / command), "--prompt", "x"], 1, *says)
        refused(["generate", "--checkpoint", str(weights.parent), "--prompt", "x"], 1, str(weights), "SHA-256 differs")


def test_a_checkpoint_with_other_parts_damaged(corpus: Corpus, runs: Path, refused: Refusal) -> None:
    here = corpus.start("fit", f"--runs_dir={runs}", "--ckpt_path=last")
    summary, state = runs / "fit" / "summary.json", newest(runs / "fit") / "state.pt"
    whole = summary.read_text()
    summary.write_text("{")
    refused(here, 2, "no readable summary.json")
    summary.write_text(whole)
    state.write_bytes(state.read_bytes()[:100])
    refused(here, 1, "/".join(state.parts[-2:]), "another size")
    (newest(runs / "fit") / "manifest.json").write_text("{")
    refused(here, 1, "holds no checkpoint that is whole", "manifest.json cannot be read")


def test_validate_without_a_checkpoint(corpus: Corpus, refused: Refusal, tmp_path: Path) -> None:
    base = corpus.start("validate")
    refused(base, 2, "name what to validate: --ckpt_path")
    refused([*base, "--ckpt_path=last", f"--runs_dir={tmp_path}"], 2, f"there is no checkpoint in {tmp_path / 'fit'}")
    refused([*base, "--ckpt_path=nowhere"], 2, "there is no checkpoint in nowhere")


# --- the end of the process


@pytest.fixture
def interrupt() -> Iterator[Callable[[str], None]]:
    """Press Ctrl-C when a module of nanofed first says something."""
    handler = signal.getsignal(signal.SIGINT)
    pressed: list[tuple[logging.Logger, logging.Handler]] = []

    class CtrlC(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            signal.raise_signal(signal.SIGINT)

    def when(module: str) -> None:
        pressed.append((logging.getLogger(module), CtrlC()))
        pressed[-1][0].addHandler(pressed[-1][1])

    yield when
    for logger, key in pressed:
        logger.removeHandler(key)
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored


@pytest.mark.parametrize(
    ("command", "module"),
    [("fit", "nanofed.training.callbacks.progress"), ("federate", "nanofed.federated.server.metrics")],
)
def test_ctrl_c_is_130(
    command: str,
    module: str,
    corpus: Corpus,
    tmp_path: Path,
    interrupt: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(module)
    capsys.readouterr()
    assert cli.main(corpus.start(command, f"--runs_dir={tmp_path}")) == 130
    assert capsys.readouterr().err == f"nanofed {command}: interrupted\n"


@pytest.mark.slow
def test_as_a_process(corpus: Corpus, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    line = [sys.executable, "-m", "nanofed", "fit", "--config", str(corpus.fit), "--name=new", "--data.path=nowhere"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("nanofed fit: there is no data folder nowhere;")
    assert done.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_sigterm_is_143(corpus: Corpus, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "nanofed", "fit", "--config", str(corpus.fit), f"--runs_dir={tmp_path}"]
    process = subprocess.Popen(
        [*line, "--model.recipe.num_steps=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("first step"))
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")
