"""`nanofed fit` in real processes that start at once: forked from a server that has done the imports."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from nanofed import runtime
from nanofed.federated.flower import free_port
from nanofed.training.checkpoint.format import WEIGHTS, find_checkpoint, read_manifest, read_state
from nanofed.training.summary import SUMMARY
from tests.support import REPOSITORY, tiny_model

STEPS = 12


def arguments(corpus: Path, runs: Path, name: str, **changes: object) -> list[str]:
    """Return the options of a tiny run: accumulation 2 on one rank and on two."""
    ranks = int(str(changes.pop("ranks", 1)))
    options = tiny_model(corpus) | {"name": name, "runs_dir": runs, "eval_every": 4, "save_every": 0, "log_every": 3}
    options |= {"model.recipe.num_steps": STEPS, "data.packing": "best_fit", "data.eval_tokens": 1024}
    options |= {"data.device_batch_size": 8 // ranks, "trainer.accelerator": "cpu", "trainer.devices": ranks}
    options |= ({"trainer.strategy": "ddp"} if ranks > 1 else {}) | changes
    return [f"--{key}={value}" for key, value in options.items()]


def probe(**options: object) -> str:
    """Return the option that adds the probe to the Trainer."""
    return "--trainer.callbacks=" + json.dumps([{"class_path": "tests.faults.probe.Probe", "init_args": options}])


def _run(args: Sequence[str], output: str, environment: dict[str, str]) -> None:
    runtime._PARENT = os.getppid()  # it was imported by the server
    os.setsid()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    from nanofed import cli

    torch.set_num_threads(1)
    sys.exit(cli.main(["fit", *args]))


class Fit:
    """A fit on some ranks, each a process in a session of its own, as torchrun starts them."""

    def __init__(self, args: Sequence[str], folder: Path, *, ranks: int = 1) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nanofed.training.lightning_cli", "nanofed.training.fit", "tests.faults.probe"])
        self.outputs = [folder / f"output{rank}" for rank in range(ranks)]
        self.processes: list[BaseProcess] = []
        port = free_port()
        for rank in range(ranks):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            here = {name: str(number) for name, number in numbers.items()} | {"GROUP_RANK": "0"}
            here |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment = here if ranks > 1 else {}
            process = context.Process(target=_run, args=(list(args), str(self.outputs[rank]), environment), daemon=True)
            process.start()
            self.processes.append(process)

    def end(self, seconds: float = 120.0) -> list[int | None]:
        """Wait for all ranks and return their exit codes."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self) -> str:
        """Return what all ranks wrote, to both streams."""
        return "".join(Path(f"{output}.{stream}").read_text() for output in self.outputs for stream in (1, 2))


def fit(args: Sequence[str], folder: Path, *, ranks: int = 1, code: int = 0) -> str:
    """Run a fit to its end, which must be the exit code `code` on all ranks, and return what it said."""
    run = Fit(args, folder, ranks=ranks)
    codes = run.end()
    said = run.said()
    assert codes == [code] * ranks, f"{codes}: {said}"
    return said


def launched(command: Sequence[str], args: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start Python with `command` and the arguments of a fit as from a terminal: in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *command, "fit", *args]
    with log.open("wb") as file:
        return subprocess.Popen(
            line, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def processes_with(words: str) -> list[int]:
    """Return the living processes in whose command line `words` stand."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile
            if words in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append(process.pid)
    return found


def state(run: Path) -> dict[str, Any]:
    """Return all that a run's newest checkpoint holds but what depends on the clock on the wall, in comparable form."""
    path = find_checkpoint(run)
    saved = read_state(path)
    dashboard = saved["callbacks"]["Dashboard"]
    del dashboard["seconds"]
    dashboard["curve"] = [[point[0], point[1], point[3]] for point in dashboard["curve"]]
    saved["step"], saved["weights"] = read_manifest(path).step, read_manifest(path).files[WEIGHTS]["sha256"]
    return {"/".join(map(str, where)): value for where, value in _leaves(saved)}


def _leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, (*where, name))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, (*where, index))
    elif isinstance(value, torch.Tensor):
        yield where, (str(value.dtype), value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    else:
        yield where, value


def losses(file: Path) -> list[list[Any]]:
    """Return what the probe wrote, in the order of ranks and steps."""
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line[:2])


def curve(run: Path) -> list[tuple[int, float]]:
    """Return step and bits per byte of every validation."""
    return [(point["step"], point["bpb"]) for point in json.loads((run / SUMMARY).read_text())["curve"]]


class Cut:
    """A run that is cut short in a folder of its own, and has to end as the whole one did."""

    def __init__(
        self, corpus: Path, folder: Path, whole: Callable[[int], Path], *, ranks: int = 1, **changes: object
    ) -> None:
        folder.mkdir()
        self.folder, self.run, self.ranks = folder, folder / "cut", ranks
        self.args = arguments(corpus, folder, "cut", ranks=ranks, **changes)
        self._whole = whole

    def stop(self, code: int, *more: str, **moment: object) -> str:
        """Run it until the probe has stopped it with that exit code, and return what it said."""
        return fit([*self.args, *more, probe(**moment)], self.folder, ranks=self.ranks, code=code)

    @property
    def step(self) -> int:
        return read_manifest(find_checkpoint(self.run)).step

    def goes_on(self) -> None:
        """Resume it, and compare all that is left of it with what the whole run left."""
        fit([*self.args, "--ckpt_path=last"], self.folder, ranks=self.ranks)
        expected = self._whole(self.ranks)
        assert state(self.run) == state(expected)
        assert curve(self.run) == curve(expected)
