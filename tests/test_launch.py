"""Who started this process as which rank: one answer, for us and for Lightning."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from lightning import Trainer

from nanofed import cli, runtime
from nanofed.errors import ConfigError
from nanofed.runtime import Launch
from nanofed.training.strategy import cluster_environment

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
JOB = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
OURS = ("SLURM_", "MASTER_", "OMPI_", "PMI_", "JSM_", "LSB_", "TORCHELASTIC_")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(OURS) or name in (*runtime.RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


def given(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "4", **ADDRESS}, Launch()),
        ({**TORCHRUN, "RANK": "3", "LOCAL_RANK": "1"}, Launch("torchrun", 3, 1)),
        ({**TORCHRUN, **STEP, "RANK": "0", "LOCAL_RANK": "0"}, Launch("torchrun", 0, 0)),  # inside of SLURM, too
        (STEP, Launch("srun", 3, 1)),
        ({**STEP, "SLURM_PROCID": "0"}, Launch("srun", 0, 1)),
        (JOB, Launch()),  # a shell in salloc -J train
        ({**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, Launch()),  # the script of sbatch
        ({**STEP, "SLURM_JOB_NAME": "bash"}, Launch()),  # srun --pty bash
        ({**STEP, "SLURM_JOB_NAME": "interactive"}, Launch()),
        ({"MASTER_PORT": "1", "LOCAL_RANK": "2"}, Launch("lightning", 2, 2)),  # forked by Lightning, in a notebook
        ({**ADDRESS, "NODE_RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, Launch("lightning", 1, 0)),
        ({**ADDRESS, "NODE_RANK": "1"}, Launch("lightning", 1, 0)),
        ({**ADDRESS, "RANK": "2", "WORLD_SIZE": "4"}, Launch("env", 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Launch()),
    ],
)
def test_how_it_was_started(variables: Mapping[str, str], launched: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, variables)
    assert runtime.launch() == launched
    assert runtime.is_first_rank() == (launched.rank == 0)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**TORCHRUN, **ADDRESS, "RANK": "3", "LOCAL_RANK": "1"},
        {**STEP, "SLURM_NNODES": "2"},
        {**JOB, "SLURM_PROCID": "0"},
        {**ADDRESS, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"},
    ],
    ids=["alone", "torchrun", "srun", "allocation", "lightning"],
)
def test_lightning_has_the_same_ranks(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, variables)
    environment, launched = cluster_environment(), runtime.launch()
    assert environment.local_rank() == launched.local_rank
    assert environment.creates_processes_externally == (launched.by != "")
    if launched.by != "lightning":  # which is told how many ranks a node has later on
        assert environment.global_rank() == launched.rank


def test_an_allocation_without_srun_trains_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given(monkeypatch, JOB)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        plugins=[cluster_environment()],
        default_root_dir=tmp_path,
    )
    assert (trainer.global_rank, trainer.world_size) == (0, 1)


@pytest.mark.parametrize("name", runtime.RANKS)
def test_a_stray_rank_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(ConfigError, match=rf"{name}=3 is set in the environment, .*`unset {name}`"):
        runtime.launch()
    assert runtime.seconds_to_hold_back() == 0


def test_a_rank_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {**TORCHRUN, "RANK": "first", "LOCAL_RANK": "0"})
    with pytest.raises(ConfigError, match="RANK=first, which is no rank"):
        runtime.launch()


def test_mpi_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="mpi4py is not installed"):
        runtime.launch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys.modules["os"].__spec__)
    assert runtime.launch() == Launch("mpirun", 2, 0)


@pytest.mark.parametrize("command", ["fit", "validate", "federate", "server", "site --superlink=localhost:1 --name=a"])
def test_every_command_that_trains_refuses_a_stray_rank(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "3")
    assert cli.main([*command.split(), "--config=c.yaml"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "RANK=3 is set in the environment" in said
    assert list(tmp_path.iterdir()) == []


def test_other_commands_do_not_mind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["status", "nowhere"]) != 0
    assert "RANK" not in capsys.readouterr().err
