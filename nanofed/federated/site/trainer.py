"""The trainer at a site: one model on its devices, driven by rounds, and what each client keeps between them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning import Fabric
from torch import Tensor

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.rows import RowPlan
from nanofed.errors import NanofedError
from nanofed.federated.wire.codec import CODECS, WireError, hash_arrays
from nanofed.federated.wire.messages import LEASE_TOO_SHORT, Hello, Instructions, Report
from nanofed.training.loop import Stopwatch, train_steps
from nanofed.training.module import GPTModule
from nanofed.training.recipe import accumulation_steps

logger = logging.getLogger(__name__)

Arrays = list[npt.NDArray[np.generic]]


class LocalTrainer(Protocol):
    """What a NumPyClient needs: a direct call in process and in simulation."""

    def hello(self, client: str) -> Hello:
        """Say who the client is and what it runs."""

    def fit(self, arrays: Sequence[npt.NDArray[np.generic]], instructions: Instructions) -> tuple[Arrays, Report]:
        """Train one round from the weights in `arrays`."""


@dataclass
class ClientState:
    """What a client keeps between rounds: its optimizer state after round `round`."""

    round: int = 0
    optimizer: defaultdict[Tensor, Any] = field(default_factory=lambda: defaultdict(dict))


class FabricTrainer:
    """Trains with Fabric, for one client or for several that take turns on the same model.

    Weights and data position come with every message, so clients in one process share the model and each keeps only its
    optimizer state: in memory, and on disk so that a stopped run goes on exactly and a Ray actor finds what another left.

    Args:
        module: the GPTModule, not yet configured.
        data: the shards and tokenizer.
        fabric: one device.
        folder: where the clients' states are kept.
        speed: client name -> its speed; 1 is this machine.
    """

    def __init__(
        self,
        module: GPTModule,
        data: TokenDataModule,
        fabric: Fabric,
        folder: Path,
        speed: Callable[[str], float] = lambda client: 1.0,
    ) -> None:
        with fabric.init_module():
            module.configure_model()
        self._module = module
        self._data = data
        self._fabric = fabric
        self._folder = folder
        self._speed = speed
        self._optimizer = module.configure_optimizers()
        self._fabric_module, self._fabric_optimizer = fabric.setup(module, self._optimizer)
        self._parameters: dict[str, Tensor] = dict(module.gpt.state_dict(keep_vars=True))
        # Names and shapes alone: arrays of no memory.
        self._like = {n: np.broadcast_to(np.float32(0), tuple(p.shape)) for n, p in self._parameters.items()}
        self._states: dict[str, ClientState] = {}

    def hello(self, client: str) -> Hello:
        """Say who the client is and what it runs."""
        return Hello.of(client, self._module, self._data)

    def fit(self, arrays: Sequence[npt.NDArray[np.generic]], instructions: Instructions) -> tuple[Arrays, Report]:
        """Train one round and return the local weights and the report.

        Raises:
            WireError: the weights are not the ones that the instructions describe.
            NanofedError: the training cannot be done (a batch that does not divide, a loss that is not finite).
        """
        module, optimizer = self._module, self._optimizer
        if hash_arrays(arrays) != instructions.base_hash:
            raise WireError("the weights that arrived do not have the hash that was announced")
        weights = CODECS[instructions.down_codec].decode(arrays, self._like)
        accumulation = accumulation_steps(
            instructions.batch_tokens,
            device_batch_size=self._data.device_batch_size,
            sequence_len=self._data.sequence_len,
            world_size=self._fabric.world_size,
        )
        state = self._state_before(instructions)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(np.array(weights[name])))
        optimizer.state = state.optimizer
        clock = module.clock
        clock.step, clock.tokens = instructions.clock_step, instructions.clock_tokens
        clock.step_tokens = instructions.batch_tokens * instructions.participants
        clock.horizon_tokens = instructions.horizon_tokens
        module.data_state = instructions.data
        plan = RowPlan(instructions.lease, self._data.dataset.train, repeat=False)
        stopwatch = Stopwatch(self._speed(instructions.client))
        result = train_steps(
            self._fabric,
            self._fabric_module,
            self._fabric_optimizer,
            self._data.loader(plan, state=instructions.data),
            accumulation=accumulation,
            step_tokens=instructions.batch_tokens,
            num_steps=instructions.max_steps,
            seconds=instructions.seconds,
            stopwatch=stopwatch,
        )
        if result.steps == 0 or module.data_state is None:
            raise NanofedError(LEASE_TOO_SHORT)
        if not np.isfinite(result.losses).all():
            step = int(np.argmin(np.isfinite(result.losses)))
            raise NanofedError(f"the training loss is {result.losses[step]} at step {step + 1} of the round")
        local = {name: p.detach().to("cpu", copy=True).numpy() for name, p in self._parameters.items()}
        if not all(np.isfinite(array).all() for array in local.values()):
            raise NanofedError("the weights are no longer finite after the last step of the round")
        self._keep(instructions, ClientState(instructions.round, optimizer.state))
        payload = CODECS[instructions.up_codec].encode(local)
        report = Report(
            run=instructions.run,
            round=instructions.round,
            client=instructions.client,
            nonce=instructions.nonce,
            base_hash=instructions.base_hash,
            payload_hash=hash_arrays(payload),
            steps=result.steps,
            tokens=result.tokens,
            seconds=result.seconds,
            loss_first=result.losses[0],
            loss_last=result.losses[-1],
            exhausted=result.exhausted,
            data=module.data_state,
        )
        return payload, report

    def _state_before(self, instructions: Instructions) -> ClientState:
        """Return the newest state from before this round: in memory, on disk, or a fresh one."""
        client, number = instructions.client, instructions.round
        kept = self._states.pop(client, None)  # training changes it in place: a failed round must not leave it behind
        files = {int(f.stem.removeprefix("round_")): f for f in self._client_folder(client).glob("round_*.pt")}
        newest = max((n for n in files if n < number), default=0)
        if kept is not None and newest <= kept.round < number:
            return kept
        if not newest:
            return ClientState()
        saved: dict[str, Any] = torch.load(files[newest], map_location=self._fabric.device, weights_only=True)
        if saved["run"] != instructions.run:
            raise NanofedError(f"{files[newest]} belongs to run {saved['run']}, not {instructions.run}: remove it")
        self._optimizer.state = defaultdict(dict)
        self._optimizer.load_state_dict(saved["optimizer"])
        return ClientState(newest, self._optimizer.state)

    def _keep(self, instructions: Instructions, state: ClientState) -> None:
        self._states[instructions.client] = state
        folder = self._client_folder(instructions.client)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".state.tmp"
        saved = {"run": instructions.run, "optimizer": self._optimizer.state_dict()}
        torch.save(saved, temporary)
        temporary.replace(folder / f"round_{instructions.round:08d}.pt")
        # Two stay: a server that lost its open round asks for the one before. Later ones are of a future that was lost.
        numbered = {int(f.stem.removeprefix("round_")): f for f in folder.glob("round_*.pt")}
        stay = sorted(number for number in numbered if number <= instructions.round)[-2:]
        for number, file in numbered.items():
            if number not in stay:
                file.unlink()

    def _client_folder(self, client: str) -> Path:
        return self._folder / client
