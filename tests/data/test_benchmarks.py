"""The benchmarks of data and tokenizer run, and their figures add up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanofed.tokenizer.training import train_tokenizer
from tests.benchmarks import data, tokenizer
from tests.data.corpus import build, texts


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bench")
    documents = texts(200, 5, longest=400)
    build(folder / "data", documents)
    train_tokenizer(documents, vocab_size=300).save(folder / "tokenizer")
    return [f"--data={folder / 'data'}", f"--tokenizer={folder / 'tokenizer'}"]


def run(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(arguments) == 0
    assert not capsys.readouterr().out.splitlines()[-1].startswith("{"), "a table for people"
    return result


def test_data(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--sequence_len=32", "--device_batch_size=4", "--tokens=20_000"]
    result = run(data.main, [*options, *small], capsys)
    assert set(result["packings"]) == {"contiguous", "best_fit"} and result["peak_memory_mb"] > 0
    for name, packing in result["packings"].items():
        assert sum(packing["share"].values()) == pytest.approx(1, abs=1e-3)
        assert 20_000 <= packing["delivered_tokens"] <= 20_000 + 20 * 4 * 32
        assert (packing["cropped_tokens"] > 0) == (name == "best_fit")
        used = packing["delivered_tokens"] + packing["cropped_tokens"]
        assert packing["cropped_share"] == pytest.approx(packing["cropped_tokens"] / used, abs=1e-3)
        alone, whole = packing["tokenizer_alone_per_cpu_second"], packing["encoded_per_cpu_second"]
        assert whole["median"] > 0 and alone["median"] > 0


def test_tokenizer(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--characters=5_000", "--repeats=2", "--train_characters=5_000", "--vocab_size=10_000"]
    result = run(tokenizer.main, [*options, *small], capsys)
    assert result["settings"]["characters"] >= 5_000 and result["encode"]["tokens"] > 0
    assert result["encode"]["ratio_to_hugging_face"]["Hugging Face tokenizers"] == 1
    assert result["train"]["vocab_size"] < result["train"]["asked_for"] == 10_000, "so little text has fewer merges"
