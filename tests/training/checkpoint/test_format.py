from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from safetensors.torch import save as save_bytes

from nanofed.errors import ConfigError
from nanofed.model import GPT, GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.folder import MANIFEST, checkpoints, prune_checkpoints, set_aside
from nanofed.training.checkpoint.format import (
    check_model,
    find_checkpoint,
    read_manifest,
    read_state,
    read_weights,
    write_checkpoint,
)
from nanofed.training.checkpoint.lightning_io import DirectoryCheckpointIO
from tests.small_checkpoint import CONFIG, small_tokenizer

STATE = {"clock": {"step": 3, "tokens": 96}, "momentum": torch.arange(5.0), "name": "x", "none": None}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    model = GPT(CONFIG)
    model.init_weights(0)
    return dict(model.state_dict())


@pytest.fixture
def save(tmp_path: Path, tokenizer: Tokenizer, weights: dict[str, torch.Tensor]) -> Callable[..., Path]:
    def write(name: str = "step_00000003", **changes: Any) -> Path:
        path = tmp_path / "run" / "checkpoints" / name
        path.parent.parent.mkdir(exist_ok=True)
        values: dict[str, Any] = {
            "kind": "fit",
            "weights": weights,
            "state": STATE,
            "config": CONFIG,
            "tokenizer": tokenizer,
            "step": 3,
            "tokens": 96,
            "metrics": {"val/bpb": 2.5},
        }
        write_checkpoint(path, **{**values, **changes})
        return path

    return write


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_what_was_saved_is_read_back(
    save: Callable[..., Path], weights: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    path = save()
    manifest = read_manifest(path)
    assert (manifest.kind, manifest.model, manifest.step, manifest.tokens) == ("fit", CONFIG, 3, 96)
    assert manifest.tokenizer == tokenizer.fingerprint and manifest.metrics == {"val/bpb": 2.5}
    assert {"model.safetensors", "state.pt"} < set(manifest.files) and len(manifest.files) == len(files(path)) - 1
    read = read_weights(path)
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)
    state = read_state(path)
    assert torch.equal(state.pop("momentum"), STATE["momentum"])  # type: ignore[arg-type]
    assert state == {name: value for name, value in STATE.items() if name != "momentum"}
    assert Tokenizer.load(path / "tokenizer").fingerprint == tokenizer.fingerprint
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left there"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "has format_version 2: this nanofed reads 1"),
        ({"format_version": None}, "has format_version None"),
        ({"surprise": 1}, "unknown fields"),
        ({"step": ...}, "missing or unknown fields"),
        ({"model": None}, "missing or unknown fields"),
        ({"model": {"depth": 4}}, "missing or unknown fields"),
        ({"model": {"n_layer": -1}}, "missing or unknown fields"),
        ({"files": {}}, "checksum differs"),
        ({"tokens": 97}, "checksum differs"),
        ({"kind": "federated"}, "checksum differs"),
        ({"checksum": ...}, "checksum differs"),
    ],
)
def test_a_manifest_of_something_else_is_refused(save: Callable[..., Path], changes: dict[str, Any], says: str) -> None:
    path = save()
    raw = json.loads((path / MANIFEST).read_text())
    raw = {name: value for name, value in {**raw, **changes}.items() if value is not ...}
    (path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=says):
        read_manifest(path)


@pytest.mark.parametrize("content", ["", "[]", "null", "3", "{", "\x00", '"manifest"'])
def test_a_manifest_that_is_none_is_refused(save: Callable[..., Path], content: str) -> None:
    path = save()
    (path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError):
        read_manifest(path)


def test_weights_that_are_none_are_named(save: Callable[..., Path]) -> None:
    path = save()
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_weights(path)


@pytest.mark.parametrize(
    "cut",
    ["format.write_safetensors", "format.torch.save", "format.json.dumps", "atomic.sync_folder"],
)
def test_an_interrupted_save_leaves_the_last_one(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    folder = save("step_00000001").parent

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("step_00000002", "step_00000001"):  # a new one, and the same step once more
        with monkeypatch.context() as patch:
            patch.setattr(f"nanofed.training.checkpoint.{cut}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                save(name)
        assert [path.name for path in folder.iterdir()] == ["step_00000001"], "nothing else is left there"
        read_manifest(find_checkpoint(folder.parent))
    save("step_00000002")
    assert [path.name for path in checkpoints(folder.parent)] == ["step_00000001", "step_00000002"]
    read_manifest(find_checkpoint(folder.parent))


def test_the_same_step_may_be_saved_again(save: Callable[..., Path]) -> None:
    path = save(state={"n": 1})
    assert save(state={"n": 2}) == path
    assert read_state(path) == {"n": 2} and [p.name for p in path.parent.iterdir()] == [path.name]
    read_manifest(path)


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (0, 0, [2, 5, 10, 100]),
        (1, 0, [100]),
        (2, 0, [10, 100]),
        (9, 0, [2, 5, 10, 100]),
        (1, 5, [5, 10, 100]),
        (1, 2, [2, 10, 100]),
        (2, 7, [10, 100]),
    ],
)
def test_pruning_keeps_the_newest_and_every_nth(
    save: Callable[..., Path], keep: int, every: int, left: list[int]
) -> None:
    for step in (2, 5, 10, 100):
        folder = save(f"step_{step:08d}").parent
    prune_checkpoints(folder.parent, keep, every)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in left]


def test_pruning_goes_by_number_and_takes_what_is_no_longer_whole(save: Callable[..., Path]) -> None:
    for step in (9_999_999, 99_999_999, 100_000_000):
        path = save(f"step_{step:08d}")
    (path.parent / "step_00000003").mkdir()
    (path.parent / "notes_4").mkdir()
    prune_checkpoints(path.parent.parent, 2)
    assert {path.name for path in path.parent.iterdir()} == {"step_99999999", "step_100000000", "notes_4"}


def test_a_run_that_goes_on_from_an_earlier_one_has_no_later_ones(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Else the abandoned ones would be resumed, and pruning would take the one just saved for the oldest."""
    for step in (10, 20, 30):
        folder = save(f"step_{step:08d}").parent
    for path in (folder / "step_00000020", folder / "step_00000030"):
        (path / "state.pt").write_bytes(b"damaged")
    assert find_checkpoint(folder.parent).name == "step_00000010"
    save("step_00000015")
    prune_checkpoints(folder.parent, 2)
    assert [path.name for path in checkpoints(folder.parent)] == ["step_00000010", "step_00000015"]
    assert sorted(path.name for path in (folder / "superseded").iterdir()) == ["step_00000020", "step_00000030"]
    assert "step_00000030 is of a later step than step_00000015, where the run is now: moved to" in caplog.text
    for step in (20, 12):
        save(f"step_{step:08d}")
    assert find_checkpoint(folder.parent).name == "step_00000012"
    assert (folder / "superseded" / "step_00000020" / "state.pt").read_bytes() == b"damaged"
    later_abandoned = folder / "superseded" / "step_00000020.1" / "state.pt"
    assert later_abandoned.read_bytes() != b"damaged"
    set_aside(folder / "step_00000012")
    assert (folder / "superseded" / "step_00000012").is_dir() and not (folder / "step_00000012").exists()


def test_weights_are_those_that_safetensors_writes(save: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    tensors = {**weights, "half": weights["lm_head.weight"].bfloat16().T, "flags": torch.tensor([True, False, True])}
    path = save(weights=tensors)
    theirs = load(save_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}))
    for read in (read_weights(path), load((path / "model.safetensors").read_bytes())):
        assert read.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_a_state_of_all_kinds_goes_and_comes(save: Callable[..., Path]) -> None:
    shared = torch.arange(6.0)
    some = {"empty": torch.empty(0), "tuple": (1, "x"), "half": torch.ones(3).half(), "no": None}
    read: dict[Any, Any] = read_state(save(state={1: [shared, shared[2:4]], **some}))
    assert torch.equal(read[1][0], shared) and torch.equal(read[1][1], shared[2:4]) and read["empty"].shape == (0,)
    assert (read["tuple"], read["no"], read["half"].dtype) == ((1, "x"), None, torch.float16)


def test_finding_a_checkpoint(save: Callable[..., Path], tmp_path: Path) -> None:
    first, last = save("step_00000001"), save("step_00000020")
    assert find_checkpoint(first) == first and find_checkpoint(str(last.parent.parent)) == last
    for nothing in (tmp_path, tmp_path / "absent", first.parent / "step_9"):
        with pytest.raises(ConfigError, match="there is no checkpoint in"):
            find_checkpoint(nothing)


def test_another_model_or_kind_is_refused(save: Callable[..., Path], tokenizer: Tokenizer) -> None:
    path = save(kind="federated")
    other = GPTConfig(sequence_len=8, vocab_size=270, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
    with pytest.raises(ConfigError, match="holds another model: n_layer 1 there, 2 here; n_embd 8 there, 16 here"):
        check_model(read_manifest(path), other, path)
    with pytest.raises(ConfigError, match="holds another model"):
        DirectoryCheckpointIO(other, tokenizer).load_checkpoint(path)
    with pytest.raises(CheckpointError, match="is a federated checkpoint: start from its weights with --init_from"):
        DirectoryCheckpointIO(CONFIG, tokenizer).load_checkpoint(path)


def test_lightnings_dictionary_goes_and_comes(
    tmp_path: Path, tokenizer: Tokenizer, weights: dict[str, torch.Tensor]
) -> None:
    io = DirectoryCheckpointIO(CONFIG, tokenizer)
    dictionary = {
        "state_dict": {**{f"gpt.{n}": t for n, t in weights.items()}, "bits_per_byte.token_bytes": torch.ones(3)},
        "optimizer_states": [{"clock": {"tokens": 64, "step": 2}, "state": {0: torch.ones(2)}}],
        "global_step": 2,
        "data": {"rows": 4, "streams": []},
    }
    path = tmp_path / "checkpoints" / "step_00000002"
    io.save_checkpoint(dictionary, path)
    assert (read_manifest(path).step, read_manifest(path).tokens) == (2, 64)
    back = io.load_checkpoint(path)
    assert back["state_dict"].keys() == {f"gpt.{name}" for name in weights}
    assert back["data"] == dictionary["data"] and back["global_step"] == 2
    assert torch.equal(back["optimizer_states"][0]["state"][0], torch.ones(2))
    assert "state_dict" in dictionary, "Lightning's own dictionary is left alone"
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    assert not path.exists()
