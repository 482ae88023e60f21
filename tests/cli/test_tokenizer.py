from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from nanofed.cli import main
from nanofed.data.writing import write_shards
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.training import train_tokenizer
from nanofed.tokenizer.vocabulary import SPLIT_PATTERN

TEXTS = [f"Document {n}: the quick brown fox jumps over the lazy dog, naïve café number {n * n}.\n" for n in range(60)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of two training shards and one for validation; no network and nothing in any cache."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    write_shards(TEXTS, tmp_path / "data", num_shards=2, rows_per_group=7)
    return tmp_path / "data"


def test_train_learns_from_the_training_shards_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "train", "--data", str(data), "--vocab_size", "300", "--output", str(data / "tok")]) == 0
    shards = [pq.read_table(data / f"shard_{n:05d}.parquet").column("text").to_pylist() for n in range(3)]
    expected = train_tokenizer([*shards[0], *shards[1]], vocab_size=300)
    trained = Tokenizer.load(data / "tok")
    assert trained.fingerprint == expected.fingerprint
    out = capsys.readouterr().out
    assert "vocabulary       300 tokens\n" in out
    assert "seconds" in out
    assert f"{trained.bytes_per_token(shards[2]):.3f} on shard_00002.parquet" in out


def test_train_takes_all_its_options_and_says_when_the_text_gives_fewer_tokens(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--vocab_size", "5000", "--max_chars", "200", "--doc_cap", "20", "--special_tokens", "<s>", "</s>"]
    pattern = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
    assert main(["tokenizer", "train", "--data", str(data), *options, "--split_pattern", pattern]) == 0
    trained = Tokenizer.load(tmp_path / "base" / "tokenizer")
    assert trained.vocab_size < 300
    assert list(trained.special_tokens) == ["<s>", "</s>"]
    assert trained.vocabulary.split_pattern == pattern
    captured = capsys.readouterr()
    line = f"vocabulary       {trained.vocab_size} tokens, not the 5,000 asked for: the text gives no more"
    assert line in captured.out


def test_train_replaces_one_only_by_force(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenizer", "train", "--data", str(data), "--output", str(tmp_path / "tok")]
    assert main([*command, "--vocab_size", "300"]) == 0
    assert main([*command, "--vocab_size", "280"]) == 2
    assert "has a tokenizer already" in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "tok").vocab_size == 300
    assert main([*command, "--vocab_size", "280", "--force"]) == 0
    assert Tokenizer.load(tmp_path / "tok").vocab_size == 280


def test_a_damaged_shard_leaves_nothing_behind(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "dataset.json").unlink()
    pq.write_table(pa.table({"text": ["a", None]}), data / "shard_00001.parquet")
    assert main(["tokenizer", "train", "--data", str(data), "--output", str(tmp_path / "tok")]) == 3
    assert "shard_00001.parquet" in capsys.readouterr().err
    assert not (tmp_path / "tok").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert main(["tokenizer", "train", "--data", str(data), "--output", str(locked / "tok")]) == 3
    assert "is not a folder that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--data", "nowhere"], 3, "nowhere"),
        (["train", "--vocab_size", "many"], 2, "--vocab_size"),
        (["train", "--vocab_size", "100"], 2, "vocab_size is 100"),
        (["train", "--split_pattern", "("], 2, "split_pattern"),
        (["train", "--split_pattern", "[a-z]+"], 2, "does not match every character"),
        (["train", "--doc_cap", "0"], 2, "--doc_cap must be at least 1, not 0"),
        (["eval", "--tokenizer", "nowhere"], 3, "no tokenizer in nowhere"),
        (["eval", "--max_chars", "0"], 2, "--max_chars must be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--data" in arguments else ["--data", str(data)]
    assert main(["tokenizer", *arguments, *given]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "base").exists()


def test_eval_offline_says_that_gpt2_is_missing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "train", "--data", str(data), "--vocab_size", "300"]) == 0
    capsys.readouterr()
    assert main(["tokenizer", "eval", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "no comparison: GPT-2's tokenizer is neither in tiktoken's cache nor to be had" in out
    assert "validation" in out
    assert "train" in out


def test_eval_compares_with_gpt2(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A stand-in that knows bytes only has 1 byte per token, so the gain is known.
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 256}
    stand_in = tiktoken.Encoding("gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=bytes_only, special_tokens=special)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in)
    output = tmp_path / "tok"
    assert main(["tokenizer", "train", "--data", str(data), "--vocab_size", "300", "--output", str(output)]) == 0
    capsys.readouterr()
    assert main(["tokenizer", "eval", "--data", str(data), "--tokenizer", str(output)]) == 0
    texts = pq.read_table(data / "shard_00002.parquet").column("text").to_pylist()
    ours = Tokenizer.load(output).bytes_per_token(texts)
    out = capsys.readouterr().out
    assert f"{'validation':<18}{ours:>10.3f}{1.0:>10.3f}  {ours - 1:+.1%} against gpt2\n" in out
    assert "no comparison" not in out
