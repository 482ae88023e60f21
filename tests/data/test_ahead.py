"""Batches made ahead are the batches made in the step: same tokens, same states, whenever the run is stopped."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.packing import Tokens
from nanofed.data.rows import RowRange
from nanofed.data.shards import Dataset
from nanofed.data.streams import Batch, TokenLoader
from nanofed.errors import ConfigError, DataError
from nanofed.tokenizer.bpe import Tokenizer
from tests.data.corpus import Bytes, build, texts
from tests.data.test_streams import PACKINGS, epoch, lease, loader, same, through_json

DEPTHS = [1, 3, 64]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build(tmp_path_factory.mktemp("ahead") / "data", texts(160, 2), rows_per_group=16)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nanofed-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert workers() == []


class Data(TokenDataModule):
    """A data module over the small dataset and a tokenizer of bytes."""

    def __init__(self, small: Dataset, **options: Any) -> None:
        super().__init__(str(small.path), device_batch_size=4, sequence_len=16, streams=4, **options)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Bytes()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_batches_and_states_are_the_same_at_any_depth(dataset: Dataset, packing: str, depth: int) -> None:
    ahead = loader(dataset, packing=packing, prefetch=depth)
    same(itertools.islice(ahead, 150), itertools.islice(loader(dataset, packing=packing), 150))
    # Over a lease to its end, whose last state commits the ledger.
    plan = lease(dataset, RowRange(dataset.train[1].name, 3, 38), RowRange(dataset.train[0].name, 0, 17))
    finite, plain = loader(dataset, plan, packing=packing, prefetch=depth), loader(dataset, plan, packing=packing)
    found = list(finite)
    assert found
    same(found, list(plain))
    assert finite.state == plain.state == found[-1].state


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_what_was_made_but_not_taken_does_not_count(dataset: Dataset, packing: str, depth: int) -> None:
    expected = list(itertools.islice(loader(dataset, packing=packing), 60))
    stopped = loader(dataset, packing=packing, prefetch=depth)
    at = 0
    for taken in (1, 7, 2, 20):  # the same loader goes on; each iteration leaves a full queue behind
        same(itertools.islice(stopped, taken), expected[at : at + taken])
        at += taken
        assert stopped.state == expected[at - 1].state
    resumed = loader(dataset, packing=packing, prefetch=depth)
    resumed.load_state(through_json(expected[at - 1].state))
    same(itertools.islice(resumed, 20), expected[at : at + 20])


@pytest.mark.parametrize("depth", [0, 2])
def test_take_makes_no_more_than_its_limit(dataset: Dataset, depth: int) -> None:
    class Counted(Bytes):
        documents = 0

        def encode_document(self, text: str) -> Tokens:
            self.documents += 1
            return super().encode_document(text)

    def documents(depth: int, limit: int | None, taken: int) -> int:
        """Take batches, and count the documents that were encoded for them."""
        encoder = Counted()
        sizes: dict[str, Any] = {"sequence_len": 16, "device_batch_size": 4, "streams": 4, "prefetch": depth}
        made = TokenLoader(epoch(dataset), encoder, **sizes).take(limit)
        same(itertools.islice(made, taken), itertools.islice(loader(dataset, epoch(dataset)), 3))
        return encoder.documents

    # Asked for one batch more than there are, so that the thread has come to its end.
    assert documents(depth, limit=3, taken=4) == documents(0, limit=None, taken=3)


@pytest.mark.parametrize("depth", [1, 4])
def test_damage_is_reported_at_the_batch_that_would_need_it(tmp_path: Path, depth: int) -> None:
    damaged = build(tmp_path / "data", texts(160, 3), rows_per_group=16)
    good = list(itertools.islice(loader(damaged), 400))
    path = damaged.train[1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)

    def until_the_error(depth: int) -> list[Batch]:
        batches = []
        with pytest.raises(DataError, match=damaged.train[1].name):
            for batch in loader(damaged, prefetch=depth):
                batches.append(batch)
        return batches

    batches = until_the_error(depth)
    same(batches, good[: len(batches)])
    assert len(batches) == len(until_the_error(0)) > 10, "the first shard is whole"


def test_a_negative_prefetch_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"data\.prefetch=-1"):
        next(iter(loader(dataset, prefetch=-1)))


def test_the_wait_for_data_is_counted(dataset: Dataset) -> None:
    class Slow(Bytes):
        def encode_document(self, text: str) -> Tokens:
            time.sleep(0.003)
            return super().encode_document(text)

    def waited(depth: int, step: float) -> float:
        made = TokenLoader(epoch(dataset), Slow(), sequence_len=64, device_batch_size=4, streams=4, prefetch=depth)
        for number, _ in enumerate(made):
            if number == 0:
                made.wait.seconds = 0.0
            time.sleep(step)
        return made.wait.seconds

    in_the_step = waited(0, 0.0)
    assert in_the_step > 0.003 * 60
    assert waited(2, 0.0) > 0.5 * in_the_step, "nothing to do meanwhile: the thread is no faster"
    assert any(waited(2, 0.06) < 0.5 * in_the_step for _ in range(3)), "made while the step slept"


def test_the_data_module_counts_what_training_waits_not_validation(dataset: Dataset) -> None:
    data = Data(dataset, eval_tokens=128)
    assert data.prefetch > 0 and data.wait.seconds == 0
    validation = list(data.validation_loader())
    assert len(validation) == 8 and data.wait.seconds == 0
    same(data.validation_loader(), validation)
    same(Data(dataset, eval_tokens=128, prefetch=0).validation_loader(), validation)
    next(iter(data.loader()))
    assert data.wait.seconds > 0


class Recorder(LightningModule):
    """Remembers its batches; trains nothing of worth."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []
        self.validated = 0

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return self.weight * 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_gets_them_and_leaves_no_thread(dataset: Dataset, tmp_path: Path, fails: bool) -> None:
    class Failing(Recorder):
        def on_train_batch_end(self, *arguments: Any) -> None:
            if fails and len(self.batches) == 5:
                raise ValueError("in the step")

    data, module = Data(dataset, eval_tokens=128, prefetch=3), Failing()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options: dict[str, Any] = {"max_steps": 12, "val_check_interval": 4, "num_sanity_val_steps": 0, **quiet}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)
    if fails:
        with pytest.raises(ValueError, match="in the step"):
            trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, datamodule=data)
        assert module.validated == 3 * 8
    # `trainer`, `data` and `module` still live; the fixture below finds no thread.
    assert workers() == []
    same(module.batches, itertools.islice(loader(dataset), 5 if fails else 12))
    assert json.dumps(module.batches[-1].state.to_plain())


def test_no_cuda_is_opened_to_make_batches(dataset: Dataset) -> None:
    before = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    batch = next(iter(loader(dataset, prefetch=2)))
    assert torch.cuda.is_initialized() == before  # type: ignore[no-untyped-call]
    assert batch.inputs.is_pinned() == before if torch.cuda.is_available() else not before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
@pytest.mark.parametrize("depth", [0, 3])
def test_batches_for_cuda_are_pinned_and_arrive_whole(dataset: Dataset, depth: int) -> None:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    expected = list(itertools.islice(loader(dataset), 50))
    moved = []
    for batch in itertools.islice(loader(dataset, prefetch=depth), 50):
        assert batch.inputs.is_pinned() and batch.targets.is_pinned()
        moved.append(batch.to("cuda"))  # pinned blocks are reused only when their copy is done
    same([batch.to("cpu", non_blocking=False) for batch in moved], expected)
