"""How long a round should be and how weights should travel: computed from the sites' lines and speeds, before anything starts.

A round of seconds ends everywhere at the same time: a site trains for what transfers, its own work and the server's leave of it
(`server/scheduling.py`). So a longer round, or fewer bytes, is a larger share of training; and more steps between two merges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nanofed.errors import ConfigError
from nanofed.federated.config import Arguments
from nanofed.federated.server.scheduling import LEAST_SHARE, client_batch_tokens
from nanofed.federated.wire.codec import CODECS
from nanofed.model import GPT, GPTConfig
from nanofed.training.config_errors import read_yaml

# Down and up, from the most exact to the fewest bytes. Two clients ended within 0.005 % of fp32 in bits per byte with int8 up,
# and within 0.03 % with int4; changes that go down in int8 cost nothing that can be told from the spread of seeds
# (notebooks/LOG.md, 2026-11-29).
CODEC_PAIRS = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "int8"), ("int8", "int8"), ("int8", "int4"))
TARGET, NEAR = 0.95, 0.005  # of all seconds in training, and what makes no difference
# DiLoCo takes 500 inner steps a round and is as good as synchronous training (arXiv:2311.08105).
MOST_STEPS = 500
STEPS_MEASURED = 40  # inner steps a round with which nanofed itself has been measured (notebooks/LOG.md)
# Bytes of a body in each byte of a full Ethernet frame on a line: the rest is headers of TCP, IP and Ethernet.
GOODPUT = 1448 / 1514

Positive = Annotated[float, Field(gt=0, le=1e12)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Line:
    """A connection to the internet."""

    __pydantic_config__ = STRICT
    down_mbit: Positive  # the rate at which it receives, in Mbit/s (10^6 bits)
    up_mbit: Positive  # the rate at which it sends, in Mbit/s


@dataclass(frozen=True)
class PlannedSite(Line):
    """A site: its line, and how fast it trains."""

    # Tokens a second of all its devices together while they train, as `nanofed fit` logs them.
    tokens_per_second: Positive
    delay_ms: Annotated[float, Field(ge=0, le=1e6)]  # milliseconds to the server and back, as `ping` says them


@dataclass(frozen=True)
class Places:
    """Where a federation is to run."""

    __pydantic_config__ = STRICT
    sites: Annotated[dict[str, PlannedSite], Field(min_length=1)]  # the sites by name
    # The server's own line, which all sites share; None where it is faster than all of theirs together.
    server: Line | None = None

    @classmethod
    def read(cls, path: str) -> Self:
        """Read the YAML file that `nanofed federate --plan` takes.

        Raises:
            ConfigError: There is no such file, or a key is missing, unknown or out of range; the error names it.
        """
        try:
            return TypeAdapter(cls).validate_json(json.dumps(_plain(read_yaml(path)), default=str))
        except ValidationError as error:
            raise ConfigError(f"{path}: {_problem(error)}") from error


def _plain(value: Any) -> Any:
    """Return what YAML has read with text for all keys: a site's name may look like a date."""
    return {str(key): _plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _problem(error: ValidationError) -> str:
    """Return the first thing that is wrong in a file of sites, with its key."""
    first = error.errors(include_url=False)[0]
    key, message = ".".join(map(str, first["loc"])) or "it", first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return f"{key} is missing" + ("; `nanofed fit` logs it as tok/s" if key.endswith("tokens_per_second") else "")
    if first["type"] == "unexpected_keyword_argument":
        kind = Places if len(first["loc"]) == 1 else {"sites": PlannedSite, "server": Line}[str(first["loc"][0])]
        return f"there is no key {key}: known are {', '.join(field.name for field in fields(kind))}"
    return f"{key} is {first['input']!r:.60}: {message}"


@dataclass(frozen=True)
class Costs:
    """Seconds of a round that are neither training nor the lines': work of sites and server on weights and messages."""

    fixed: float  # seconds of any round, however small: messages, and polls for them
    round_trips: float  # how often a site waits for its delay in a round
    fetch: float  # seconds a GB (10^9 bytes) that weights take down where the line is faster than both its ends
    deliver: float  # seconds a GB that an update takes up there
    site: float  # seconds for a billion parameters of a site's own work: check, decode and encode
    merge: float  # seconds for a billion parameters of the server's work on each update: check and fold
    step: float  # seconds for a billion parameters of the server's work once a round: outer step, encode, hash


# Two sites and the server on two cores of an AMD EPYC beside other work: d12 over loopback and d4 over lines of 1,000 Mbit/s; d2
# with a delay and without (notebooks/LOG.md, 2026-11-29, the planner).
MEASURED = Costs(fixed=1.5, round_trips=14.0, fetch=8.0, deliver=15.0, site=13.5, merge=7.3, step=11.7)


@dataclass(frozen=True)
class Model:
    """What travels."""

    name: str  # what the model is called
    parameters: int  # how many it has
    payload_bytes: Mapping[str, int]  # the bytes of its weights on the wire, by codec

    @classmethod
    def of(cls, config: GPTConfig) -> Self:
        """Return it for a shape of the GPT."""
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
        like = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        sizes = {name: codec.nbytes(like) for name, codec in CODECS.items()}
        return cls(f"d{config.n_layer}", config.num_parameters, sizes)


@dataclass(frozen=True)
class Setting:
    """What is to be trained."""

    model: Model
    batch_tokens: int  # tokens of an optimizer step of one site
    horizon_tokens: int  # tokens of the run, over all sites
    round_seconds: float  # `federation.round_seconds` as it is set now
    notes: Sequence[str] = ()  # what the plan does not count, one sentence each

    @classmethod
    def of(cls, arguments: Arguments, sites: int) -> Self:
        """Return what the options of `nanofed federate` describe, for so many sites."""
        module, data = arguments.build()
        config, notes = arguments.federation, []
        batch_tokens = client_batch_tokens(config, module.recipe, data, sites)
        if config.evaluation == "sites":
            notes.append("Evaluations by the sites are not counted: how long they take is not known.")
        if config.merge != "mean":
            notes.append(
                f"What federation.merge={config.merge} takes longer than a mean is not counted: it is not known."
            )
        if config.round_steps is not None:
            notes.append(
                f"federation.round_steps={config.round_steps} is set: this is for rounds of seconds, without it."
            )
        model, horizon = Model.of(module.config), module.recipe.horizon(module.config)
        return cls(model, batch_tokens, horizon, config.seconds_at(1.0), notes)


@dataclass(frozen=True)
class Overhead:
    """Seconds of a round in which one site does not train."""

    down: float  # the weights' way to the site
    site: float  # the site's own work on them, and on its update
    up: float  # the update's way to the server
    server: float  # the server's work, messages, and delays

    @property
    def seconds(self) -> float:
        """All of them together: they follow each other."""
        return self.down + self.site + self.up + self.server


def overheads(model: Model, places: Places, down: str, up: str, costs: Costs = MEASURED) -> dict[str, Overhead]:
    """Return what a round costs each site beside training, with one pair of codecs."""
    sites, billions = places.sites, model.parameters / 1e9
    down_bytes, up_bytes = model.payload_bytes[down], model.payload_bytes[up]
    # A site's line and the server's meet: what one receives the other sends.
    receives, sends = (math.inf, math.inf) if (line := places.server) is None else (line.down_mbit, line.up_mbit)
    down_rates = shared({name: site.down_mbit for name, site in sites.items()}, sends)
    up_rates = shared({name: site.up_mbit for name, site in sites.items()}, receives)
    server = costs.fixed + billions * (costs.merge * len(sites) + costs.step)
    return {
        name: Overhead(
            down=max(transfer_seconds(down_bytes, down_rates[name]), costs.fetch * down_bytes / 1e9),
            site=costs.site * billions,
            up=max(transfer_seconds(up_bytes, up_rates[name]), costs.deliver * up_bytes / 1e9),
            server=server + costs.round_trips * site.delay_ms / 1e3,
        )
        for name, site in sites.items()
    }


def transfer_seconds(size: int, mbit: float) -> float:
    """Return the seconds that so many bytes take over a line of `mbit` Mbit/s."""
    return 8 * size / (mbit * 1e6 * GOODPUT)


def shared(rates: Mapping[str, float], whole: float) -> dict[str, float]:
    """Return the rate that each site gets of a server's line when all send at once: an equal share, or all that it can take."""
    out: dict[str, float] = {}
    for name in sorted(rates, key=lambda name: rates[name]):
        out[name] = min(rates[name], (whole - sum(out.values())) / (len(rates) - len(out)))
    return out


@dataclass(frozen=True)
class Round:
    """A round of any length with one pair of codecs."""

    down: str  # the codec of the weights
    up: str  # the codec of the updates
    overheads: Mapping[str, Overhead]  # what it costs each site beside training
    speeds: Mapping[str, float]  # tokens a second of each site
    batch_tokens: int  # tokens of an optimizer step of one site

    def training(self, length: float) -> dict[str, float]:
        """Return the seconds that each site trains in a round of `length` seconds, at least a tenth, as `Scheduler` has it."""
        return {name: max(length - overhead.seconds, LEAST_SHARE * length) for name, overhead in self.overheads.items()}

    def utilisation(self, length: float) -> dict[str, float]:
        """Return the share of its seconds that each site trains; a round lasts until its slowest site is done."""
        training = self.training(length)
        lasts = max(seconds + self.overheads[name].seconds for name, seconds in training.items())
        return {name: seconds / lasts for name, seconds in training.items()}

    def utilisation_of_all(self, length: float) -> float:
        """Return the share of all sites' tokens that are trained, of those that they would without rounds."""
        tokens = sum(share * self.speeds[name] for name, share in self.utilisation(length).items())
        return tokens / sum(self.speeds.values())

    def length_for(self, utilisation: float) -> float:
        """Return the shortest round, in seconds, of which so large a share over all sites is training."""
        mean = sum(self.speeds[name] * cost.seconds for name, cost in self.overheads.items()) / sum(
            self.speeds.values()
        )
        slowest = max(cost.seconds for cost in self.overheads.values())
        return max(mean / (1 - utilisation), slowest / (1 - LEAST_SHARE))

    def steps(self, length: float) -> dict[str, float]:
        """Return each site's optimizer steps in a round of `length` seconds."""
        return {
            name: seconds * self.speeds[name] / self.batch_tokens for name, seconds in self.training(length).items()
        }

    def length_of(self, steps: float) -> float:
        """Return the length of the round in which the first site takes so many steps, in seconds."""
        return min(
            cost.seconds + steps * self.batch_tokens / self.speeds[name] for name, cost in self.overheads.items()
        )


@dataclass(frozen=True)
class Plan:
    """What a federation is to expect, and the options that are recommended for it."""

    setting: Setting  # what is to be trained
    rounds: Sequence[Round]  # a round with each pair of codecs
    recommended: Round  # one of them
    round_seconds: float  # the length that is recommended for it, in seconds

    @classmethod
    def of(cls, setting: Setting, places: Places, costs: Costs = MEASURED) -> Self:
        """Return the plan for a setting at some places.

        The recommendation is the most exact pair of codecs with which 95 % of all seconds are training in rounds no longer than
        they are set now, of at most 500 steps; and the shortest such round. Where there is none, it is the pair with the shortest
        rounds of those that come as near to 95 % as any, by half a percent.
        """
        speeds = {name: site.tokens_per_second for name, site in places.sites.items()}
        rounds = [
            Round(down, up, overheads(setting.model, places, down, up, costs), speeds, setting.batch_tokens)
            for down, up in CODEC_PAIRS
        ]
        lengths = [_whole(one.length_for(TARGET), one.length_of(MOST_STEPS)) for one in rounds]
        shares = [min(TARGET, one.utilisation_of_all(length)) for one, length in zip(rounds, lengths, strict=True)]
        fitting = [n for n, share in enumerate(shares) if share > TARGET - 1e-9 and lengths[n] <= setting.round_seconds]
        near = [n for n, share in enumerate(shares) if share >= max(shares) - NEAR]
        best = fitting[0] if fitting else min(near, key=lambda n: lengths[n])
        return cls(setting, rounds, rounds[best], lengths[best])

    def text(self) -> str:
        """Return tables and a recommendation for people."""
        setting, best, length = self.setting, self.recommended, self.round_seconds
        now = f"in {setting.round_seconds:,.0f} s"
        header = ("down", "up", "MB down", "MB up", "s not training", now, f"{TARGET:.0%} from", "steps then")
        rows = []
        for one in self.rounds:
            costs = [cost.seconds for cost in one.overheads.values()]
            least = one.length_for(TARGET)
            sizes = [f"{setting.model.payload_bytes[codec] / 1e6:,.1f}" for codec in (one.down, one.up)]
            share = f"{one.utilisation_of_all(setting.round_seconds):.1%}"
            steps = _span(one.steps(least).values())
            rows.append((one.down, one.up, *sizes, _span(costs, 1), share, f"{least:,.0f} s", steps))
        sites = ("site", "s down", "s site", "s up", "s server", "s training", "training", "steps")
        training, shares, steps_of = best.training(length), best.utilisation(length), best.steps(length)
        by_site = [
            (
                name,
                *(f"{part:,.1f}" for part in (cost.down, cost.site, cost.up, cost.server, training[name])),
                f"{shares[name]:.1%}",
                f"{steps_of[name]:,.0f}",
            )
            for name, cost in best.overheads.items()
        ]
        most = max(steps_of.values())
        notes = [
            "Work of sites and server is counted as two busy CPU cores do it (notebooks/LOG.md); faster ones take less.",
            "With --federation.overlap=true sites also train while weights travel and the server works.",
            *setting.notes,
        ]
        if most > STEPS_MEASURED:
            notes.append(
                f"nanofed was measured with up to {STEPS_MEASURED} steps a round; DiLoCo takes {MOST_STEPS} "
                "(arXiv:2311.08105)."
            )
        return "\n".join(
            [
                f"{setting.model.name}, {setting.model.parameters:,} parameters, steps of {setting.batch_tokens:,} tokens, "
                f"{len(best.speeds)} sites",
                "",
                *_table(header, rows, left=2),
                "",
                f"{best.down} down, {best.up} up, rounds of {length:,.0f} s:",
                *_table(sites, by_site, left=1),
                "",
                self.sentence(),
                *notes,
            ]
        )

    def sentence(self) -> str:
        """Return the recommendation in one sentence, with the options to set."""
        best, length = self.recommended, self.round_seconds
        share, speed = best.utilisation_of_all(length), sum(best.speeds.values())
        hours = self.setting.horizon_tokens / (share * speed) / 3600
        why = "" if share >= TARGET - 1e-9 else f", and more would take more than {MOST_STEPS} steps a round"
        return (
            f"Set --federation.down_codec={best.down} --federation.up_codec={best.up} --federation.round_seconds={length:.0f}: "
            f"{share:.1%} of all seconds are training{why}, {_span(best.steps(length).values())} steps a round, "
            f"{math.ceil(hours * 3600 / length):,} rounds and {hours:,.1f} hours to the horizon."
        )


def _whole(wanted: float, most: float) -> float:
    """Return a length in whole seconds: one that is long enough, unless that is too long."""
    length = math.ceil(round(wanted, 6))
    return length if length <= most else max(1, math.floor(most))


def _span(values: Collection[float], digits: int = 0) -> str:
    low, high = (f"{bound(values):,.{digits}f}" for bound in (min, max))
    return low if low == high else f"{low}-{high}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lay rows out in columns; the first `left` of them are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            text.ljust(w) if n < left else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
