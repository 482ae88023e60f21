"""nanochat's checkpoints: what comes in goes out bit for bit, optimizer state too, and nothing in them is run."""

from __future__ import annotations

import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

import nanofed
from nanofed import cli
from nanofed.errors import ConfigError, DataError
from nanofed.formats import nanochat, nanochat_optimizers
from nanofed.model import GPT, GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.training import train_tokenizer
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.format import read_manifest, read_state, read_weights
from tests.cli.conftest import TEXTS, Corpus
from tests.optim.test_optimizer import assert_same

CHECKPOINT = Path("base_checkpoints/d2")


class RunsSomething:
    """Pickled in the place of tensors or of a tokenizer: unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def peer_optimizers(model: GPT, *, by_shape: bool = False) -> list[dict[str, Any]]:
    """Return what nanochat saves of its optimizers, torch's AdamW after a step and Muon in its groups.

    Every mean of gradients is twice the weight that it belongs to.
    """
    head, embedding = model.lm_head.weight, model.transformer.wte.weight
    adamw = torch.optim.AdamW(
        [{"params": [head], "lr": 0.01}, {"params": [embedding], "lr": 0.5}],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )
    for parameter in (head, embedding):
        parameter.grad = torch.randn_like(parameter)
    adamw.step()
    for parameter, state in adamw.state.items():
        state["exp_avg"] = 2 * parameter.detach()
    for group in adamw.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] *= 0.5
    matrices = list(model.transformer.h.parameters())
    kinds: list[Any] = list({p.shape for p in matrices} if by_shape else {p.numel() for p in matrices})
    buffers: dict[int, dict[str, torch.Tensor]] = {}
    groups = []
    for kind in sorted(kinds) if by_shape else kinds:
        params = [p for p in matrices if kind in (p.shape, p.numel())]
        indices = list(range(len(buffers), len(buffers) + len(params)))
        buffers |= {i: {"momentum_buffer": 2 * p.detach()} for i, p in zip(indices, params, strict=True)}
        momentum = (1 - 6 / 300) * 0.85 + 6 / 300 * 0.95
        rates = {"lr": 0.01, "initial_lr": 0.02, "momentum": momentum, "nesterov": True, "ns_steps": 5}
        groups.append({**rates, "params": indices})
    return [adamw.state_dict(), {"state": buffers, "param_groups": groups}]


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A `NANOCHAT_BASE_DIR` as nanochat leaves it after seven steps on a GPU: the embedding and its moments are bf16."""
    torch.manual_seed(0)
    base = tmp_path / "peer"
    (base / CHECKPOINT).mkdir(parents=True)
    (base / "tokenizer").mkdir()
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    config = GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.transformer.wte.to(dtype=torch.bfloat16)
    torch.save(peer_optimizers(model), base / CHECKPOINT / "optim_000007.pt")
    torch.save(model.state_dict(), base / CHECKPOINT / "model_000007.pt")
    meta = {"step": 7, "val_bpb": 2.5, "model_config": vars(config), "user_config": {"total_batch_size": 512}, "x": [1]}
    (base / CHECKPOINT / "meta_000007.json").write_text(json.dumps(meta, indent=2))
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(_pickled(tokenizer))
    torch.save(nanochat.token_bytes(tokenizer), base / "tokenizer" / "token_bytes.pt")
    return base


def _pickled(tokenizer: Tokenizer) -> bytes:
    vocabulary = tokenizer.vocabulary
    return pickle.dumps(
        tiktoken.Encoding(
            "rustbpe",
            pat_str=vocabulary.split_pattern,
            mergeable_ranks=vocabulary.ranks,
            special_tokens=tokenizer.special_tokens,
        )
    )


def assert_same_folders(a: Path, b: Path) -> None:
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".pt":
            assert_same(*(torch.load(folder / file, weights_only=True) for folder in (a, b)))
        else:
            assert (a / file).read_bytes() == (b / file).read_bytes()


def test_what_comes_in_goes_out_as_it_was(peer: Path, tmp_path: Path) -> None:
    imported = nanofed.import_model(peer, "peer", runs_dir=tmp_path / "runs")
    manifest = read_manifest(imported)
    assert (manifest.kind, manifest.step, manifest.tokens) == ("fit", 7, 7 * 512)
    assert manifest.metrics == {"val/bpb": 2.5}
    assert_same_folders(peer, nanofed.export(tmp_path / "runs/peer", tmp_path / "out", to="nanochat"))


def test_what_goes_out_comes_in_as_it_was(wild: Path, tmp_path: Path) -> None:
    folder = nanofed.export(wild, tmp_path / "out", to="nanochat")
    imported = nanofed.import_model(folder, "back", runs_dir=tmp_path)
    assert_same(read_weights(imported), read_weights(wild))
    theirs, ours = read_state(imported)["optimizer_states"][0], read_state(wild)["optimizer_states"][0]
    assert_same(theirs["state"], ours["state"])
    for one, other in zip(theirs["param_groups"], ours["param_groups"], strict=True):
        assert {**one, "betas": tuple(one.get("betas", ()))} == {**other, "betas": tuple(other.get("betas", ()))}
    meta = json.loads((folder / "base_checkpoints/d3/meta_000002.json").read_text())
    assert (meta["step"], meta["val_bpb"], meta["model_config"]["n_kv_head"]) == (2, 3.25, 2)
    again = nanofed.export(imported, tmp_path / "again", to="nanochat")
    assert_same_folders(folder, again)


def test_the_tokenizer_is_one_that_nanochat_unpickles(wild: Path, tmp_path: Path) -> None:
    folder = nanofed.export(wild, tmp_path / "out", to="nanochat") / "tokenizer"
    encoding = pickle.loads((folder / "tokenizer.pkl").read_bytes())
    ours = nanofed.load(wild).tokenizer
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.n_vocab == ours.vocab_size
    assert [encoding.encode_ordinary(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    lengths = torch.load(folder / "token_bytes.pt", weights_only=True)
    for token in range(ours.vocab_size):
        special = token >= ours.bos_token_id
        assert lengths[token] == (0 if special else len(encoding.decode([token]).encode()))


@pytest.mark.slow
def test_a_run_goes_on_here(corpus: Corpus, fit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nanofed.export(fit_run, tmp_path / "out", to="nanochat")
    assert cli.main(["import", str(folder), "--name", "on", "--runs_dir", str(tmp_path)]) == 0
    more = ["--name=on", f"--runs_dir={tmp_path}", "--model.recipe.num_steps=6", "--ckpt_path=last"]
    assert cli.main(corpus.start("fit", *more)) == 0
    said = capsys.readouterr().out
    assert "the text begins anew" in said and "`nanofed fit --config CONFIG --name on --ckpt_path last`" in said
    assert "resuming from" in said
    state = read_state(tmp_path / "on" / "checkpoints" / "step_00000006")
    assert state["optimizer_states"][0]["clock"] == {"step": 6, "tokens": 6 * 512}
    assert state["optimizer_states"][0]["state"][0]["step"] == 6


@pytest.mark.parametrize("by_shape", [False, True], ids=["one process", "several"])
def test_every_mean_of_gradients_comes_to_its_own_weight(by_shape: bool, peer: Path) -> None:
    model = GPT(nanochat.read(peer).model.config)
    weights = [model.lm_head.weight, model.transformer.wte.weight, *model.transformer.h.parameters()]
    taken = nanochat_optimizers.read(peer_optimizers(model, by_shape=by_shape), model.config)
    assert [group["name"] for group in taken["param_groups"]] == ["head", "embedding", "matrices"]
    assert [index for group in taken["param_groups"] for index in group["params"]] == list(range(len(weights)))
    for index, weight in enumerate(weights):
        assert torch.equal(taken["state"][index]["exp_avg" if index < 2 else "momentum_buffer"], 2 * weight)


@pytest.mark.parametrize("lost", ["a matrix", "rows of the head"])
def test_the_state_of_one_rank_of_several_is_left_out_and_said(
    lost: str, peer: Path, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = peer / CHECKPOINT / "optim_000007.pt"
    adamw, muon = torch.load(path, weights_only=True)
    if lost == "a matrix":
        del muon["state"][3]
    else:
        adamw["state"][0]["exp_avg"] = adamw["state"][0]["exp_avg"][:150]
    torch.save([adamw, muon], path)
    with caplog.at_level(logging.INFO, "nanofed"):
        imported = nanofed.import_model(peer, "part", runs_dir=tmp_path)
    assert "not imported: optim_000007.pt holds the state of one rank of several" in caplog.text
    assert read_manifest(imported).kind == "weights"
    more = [f"--runs_dir={tmp_path}", "--name=part", "--ckpt_path=last"]
    with pytest.raises(ConfigError, match="start from its weights with --init_from"):
        nanofed.fit(corpus.fit, args=more)


@pytest.mark.parametrize(
    ("spoiled", "said"), [("moment", "a moment of weight 5 is NaN"), ("rate", "must be real number")]
)
def test_a_moment_or_a_rate_that_is_no_number_is_refused(spoiled: str, said: str, peer: Path, tmp_path: Path) -> None:
    path = peer / CHECKPOINT / "optim_000007.pt"
    adamw, muon = torch.load(path, weights_only=True)
    if spoiled == "moment":
        muon["state"][1]["momentum_buffer"][0, 0] = math.nan
    else:
        adamw["param_groups"][0]["lr"] = "x"
    torch.save([adamw, muon], path)
    with pytest.raises(CheckpointError, match=f"{path.name} does not hold nanochat's two optimizers.*{said}"):
        nanofed.import_model(peer, "spoiled", runs_dir=tmp_path)
    assert not (tmp_path / "spoiled").exists()


def test_there_is_no_optimizer_state_in_a_federation(
    federated_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nanofed"):
        folder = nanofed.export(federated_run, tmp_path / "out", to="nanochat")
    assert "no optimizer state is exported: in a federation it stays with the clients" in caplog.text
    assert [path.name.split("_")[0] for path in sorted((folder / "base_checkpoints/d1").iterdir())] == ["meta", "model"]


def test_a_later_recipe_is_refused_by_the_parts_that_are_missing_here(peer: Path) -> None:
    path = peer / CHECKPOINT / "model_000007.pt"
    torch.save({**torch.load(path, weights_only=True), "resid_lambdas": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="this GPT has no resid_lambdas"):
        nanofed.load(peer)
    meta_path = peer / CHECKPOINT / "meta_000007.json"
    meta = json.loads(meta_path.read_text())
    meta["model_config"]["window_pattern"] = "SSSL"
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="this GPT has no window_pattern, resid_lambdas"):
        nanofed.load(peer)


@pytest.mark.parametrize(
    "changes", [{"step": -1}, {"user_config": [1]}, {"user_config": {"total_batch_size": "auto"}}], ids=str
)
def test_counts_that_are_none_are_refused(changes: dict[str, Any], peer: Path, tmp_path: Path) -> None:
    meta = peer / CHECKPOINT / "meta_000007.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))
    with pytest.raises(CheckpointError, match="is no meta file of nanochat's"):
        nanofed.import_model(peer, "run", runs_dir=tmp_path)


@pytest.mark.parametrize("name", ["model_000007.pt", "optim_000007.pt"])
def test_nothing_in_a_checkpoint_is_run(name: str, peer: Path, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": RunsSomething(tmp_path / "ran")}, peer / CHECKPOINT / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it holds something else than tensors"):
        nanofed.import_model(peer, "hostile", runs_dir=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_in_a_tokenizer_is_run(peer: Path, tmp_path: Path) -> None:
    (peer / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(RunsSomething(tmp_path / "ran")))
    with pytest.raises(DataError, match=r"it asks for pathlib\S*\.Path"):
        nanofed.load(peer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model_000007.pt", "optim_000007.pt", "meta_000007.json"])
@pytest.mark.parametrize("content", [b"", b"no such thing", b'{"a": 1}'])
def test_a_damaged_file_is_named(name: str, content: bytes, peer: Path, tmp_path: Path) -> None:
    (peer / CHECKPOINT / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        nanofed.import_model(peer, "damaged", runs_dir=tmp_path)


def test_which_checkpoint_and_whose_tokenizer(peer: Path, tmp_path: Path) -> None:
    for name in ("model_{}.pt", "meta_{}.json"):
        (peer / CHECKPOINT / name.format("000003")).write_bytes(
            (peer / CHECKPOINT / name.format("000007")).read_bytes()
        )
    assert nanochat.read(peer / CHECKPOINT).meta["step"] == 7
    with pytest.raises(nanochat_optimizers.IncompleteError, match=r"there is no optim_000003\.pt"):
        nanochat.read(peer, step=3).optimizer()
    with pytest.raises(ConfigError, match="no checkpoint of step 5: it has 3, 7"):
        nanofed.import_model(peer, "five", runs_dir=tmp_path, step=5)
    alone = tmp_path / "alone"
    (peer / CHECKPOINT).rename(alone)
    with pytest.raises(DataError, match="name its folder with --tokenizer"):
        nanofed.load(alone)
    nanofed.import_model(alone, "alone", runs_dir=tmp_path / "runs", tokenizer=peer / "tokenizer")
    train_tokenizer(TEXTS, vocab_size=290).save(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"300 tokens and its tokenizer 290: they do not belong together"):
        nanofed.import_model(alone, "other", runs_dir=tmp_path / "runs", tokenizer=tmp_path / "other")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["alone"]
    for tag in ("d4", "d6"):
        (peer / "base_checkpoints" / tag).mkdir()
        (peer / "base_checkpoints" / tag / "model_000001.pt").touch()
    with pytest.raises(
        ConfigError, match="models in it: base_checkpoints/d4, base_checkpoints/d6; name the folder of one"
    ):
        nanofed.load(peer)
