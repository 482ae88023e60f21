"""What server and site say to each other beside the weights: plain dataclasses that travel as one JSON string."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import nanofed
from nanofed.data.identity import DataIdentity
from nanofed.data.rows import RowRange
from nanofed.data.streams import DataState
from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.names import SAFE_NAME

if TYPE_CHECKING:
    from nanofed.data.datamodule import TokenDataModule
    from nanofed.training.module import GPTModule

# In a client's failure: its next lease is longer.
LEASE_TOO_SHORT = "the leased rows hold too little text for one optimizer step"
KEY = "nanofed"  # of the JSON string in Flower's config and metrics dictionaries, where a note has no key of its own
UNWRITTEN = "unwritten"  # beside it where the site's disk did not take the optimizer state of the round
MAX_JSON = 16 << 20  # bytes; a best-fit data state of 64 streams stays far below
MAX_TEXT = 200  # characters of a version or a shard's name
MAX_SHARDS = 4096  # of one site: the server looks at each of them for every lease
MAX_ROWS = 1 << 28  # of all shards of one site: the ledger takes a byte of memory for each that is on lease
MAX_TEXT_BYTES = 1 << 50  # of one shard
MAX_SPEED = 1e12  # tokens a second of one site
SENT = ("batch_tokens", "num_steps", "horizon_tokens", "tokens_per_parameter", "horizon_flops")  # with every round


@cache
def code_hash() -> str:
    """Return the SHA-256 over the sources of the nanofed package that is running: both sides must run the same code."""
    root = Path(nanofed.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Note:
    """A dataclass that travels as JSON; unknown and missing fields, and values of another kind, are refused by name."""

    key: ClassVar[str] = KEY  # in Flower's dictionaries

    def to_config(self) -> dict[str, Any]:
        """Return the dictionary that Flower carries."""
        return {self.key: json.dumps(self._plain())}

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Rebuild from what Flower carried.

        Raises:
            WireError: no JSON, too much of it, or other fields than this nanofed has.
        """
        text = config.get(cls.key) if hasattr(config, "get") else None
        if not isinstance(text, str) or len(text) > MAX_JSON:
            raise WireError(f"a {cls.__name__} must be one JSON string of at most {MAX_JSON} bytes under {cls.key!r}")
        try:
            plain = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise WireError(f"a {cls.__name__} is no JSON: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(plain, dict):
            raise WireError(f"a {cls.__name__} is a JSON object, not a {type(plain).__name__}")
        if set(plain) != names:
            missing, unknown = sorted(names - set(plain)), sorted(set(plain) - names)
            raise WireError(f"a {cls.__name__} lacks the fields {missing}, has the unknown {unknown!s:.200}")
        try:
            for field in fields(cls):
                _check_kind(field.name, str(field.type), plain[field.name])
            return cls._build(plain)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise WireError(f"a {cls.__name__} has a field of the wrong kind: {error}") from error

    def _plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> Self:
        return cls(**plain)


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


JSON_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "dict[str, int]": (dict,),
    "dict[str, str]": (dict,),
    "tuple[SiteShard, ...]": (list,),
    "tuple[RowRange, ...]": (list,),
    "DataState": (dict,),
}


def _check_kind(name: str, kind: str, value: object) -> None:
    """Check a value as it came out of JSON; what is inside a structure is checked where that is built."""
    if value is None and kind.endswith(" | None"):
        return
    kinds = JSON_KINDS[kind.removesuffix(" | None")]
    too_large = isinstance(value, int) and abs(value) >= 1 << 63
    if type(value) not in kinds or too_large or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} is {repr(value)[:80]}, not {kind}")


def _range(plain: dict[str, Any]) -> RowRange:
    part = RowRange(**plain)
    for name, kind in (("shard", "str"), ("start", "int"), ("stop", "int"), ("epoch", "int")):
        _check_kind(f"lease {name}", kind, getattr(part, name))
    return part


@dataclass(frozen=True)
class SiteShard:
    """A shard as a site describes it: its name, how much is in it, and a fingerprint; nothing of its text."""

    name: str
    num_rows: int
    text_bytes: int
    fingerprint: str

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> SiteShard:
        shard = cls(**plain)
        for name, kind in (("name", "str"), ("num_rows", "int"), ("text_bytes", "int"), ("fingerprint", "str")):
            _check_kind(f"shard {name}", kind, getattr(shard, name))
        if not all(0 < len(text) <= MAX_TEXT and text.isprintable() for text in (shard.name, shard.fingerprint)) or (
            set("/\\") & set(shard.name)
        ):
            raise ValueError(f"shard {shard.name[:80]!r} has no plain name and fingerprint")
        if not 1 <= shard.num_rows <= shard.text_bytes <= MAX_TEXT_BYTES:  # every document has a byte
            raise ValueError(
                f"shard {shard.name!r} has {shard.num_rows} rows of {shard.text_bytes} bytes, of {MAX_TEXT_BYTES} at most"
            )
        return shard


@dataclass(frozen=True)
class Hello(Note):
    """What a client says of itself before its first round.

    Attributes:
        name: of the client.
        code: hash of its nanofed's sources.
        model: sizes of its GPT.
        tokenizer: fingerprint.
        dataset: fingerprint.
        streams: of its data.
        training: what else decides the arithmetic of a step: rates, decay, packing.
        versions: of Python and of the packages that matter.
        devices: it trains on.
        tokens_per_second: measured in its last round, None before it has trained any.
        shards: found at the site, training shards only.
    """

    name: str
    code: str
    model: dict[str, int]
    tokenizer: str
    dataset: str
    streams: int
    training: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    devices: int = 1
    tokens_per_second: float | None = None
    shards: tuple[SiteShard, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        module: GPTModule,
        data: TokenDataModule,
        *,
        devices: int = 1,
        tokens_per_second: float | None = None,
    ) -> Self:
        """Return what this process runs; both sides say it in the same way."""
        dataset = data.dataset
        recipe = {key: str(value) for key, value in vars(module.recipe).items() if key not in SENT}
        return cls(
            name=name,
            code=code_hash(),
            model=vars(module.config).copy(),
            tokenizer=data.tokenizer.fingerprint,
            dataset=dataset.fingerprint(),
            streams=data.streams,
            training={**recipe, "packing": data.packing},
            versions={"python": platform.python_version(), "nanofed": nanofed.__version__}
            | {package: version(package) for package in ("torch", "flwr")},
            devices=devices,
            tokens_per_second=tokens_per_second,
            shards=tuple(
                SiteShard(s.name, s.num_rows, s.text_bytes, dataset.identity.train[s.name].partition(":")[0])
                for s in dataset.train
            ),
        )

    @property
    def text(self) -> DataIdentity:
        """The training text; the hello says nothing of the validation shard but by `dataset`."""
        return DataIdentity({shard.name: shard.fingerprint for shard in self.shards}, "")

    def _plain(self) -> dict[str, Any]:
        return {**asdict(self), "shards": [asdict(shard) for shard in self.shards]}

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> Self:
        if not SAFE_NAME.fullmatch(plain["name"]):
            raise ValueError(f"name is {plain['name'][:80]!r}, no plain word")
        for name, size in plain["model"].items():
            _check_kind(f"model {name:.40}", "int", size)
        for section in ("training", "versions"):
            for name, text in plain[section].items():
                _check_kind(f"{section} {name:.40}", "str", text)
                if not (name.isprintable() and text.isprintable() and max(len(name), len(text)) <= MAX_TEXT):
                    raise ValueError(f"{section} {name[:40]!r} is no plain text")
        if not (plain["devices"] >= 1 and 0 <= (plain["tokens_per_second"] or 0) <= MAX_SPEED):
            raise ValueError(f"{plain['devices']} devices at {plain['tokens_per_second']} tokens a second")
        if plain["devices"] > plain["streams"]:  # every device reads streams of its own
            raise ValueError(f"{plain['devices']} devices read {plain['streams']} streams: each needs one of its own")
        if len(plain["shards"]) > MAX_SHARDS:
            raise ValueError(f"{len(plain['shards'])} shards, of {MAX_SHARDS} at most: pack the text into larger ones")
        shards = tuple(SiteShard._build(shard) for shard in plain["shards"])
        if (rows := sum(shard.num_rows for shard in shards)) > MAX_ROWS:
            raise ValueError(f"the shards have {rows} rows, of {MAX_ROWS} at most")
        if len({shard.name for shard in shards}) != len(shards):
            raise ValueError("a shard is named twice")
        return cls(**{**plain, "shards": shards})


@dataclass(frozen=True)
class Instructions(Note):
    """What a client is to do in a round.

    Attributes:
        run: id of the run.
        round: number of the round, from 1.
        client: name of the client, so that a reply cannot be taken for another's.
        nonce: of this message alone; the report returns it.
        base_hash: of the arrays that go with it.
        down_codec: of these arrays.
        up_codec: of those to be sent back.
        max_steps: optimizer steps at most (the round's, or what is left to the horizon).
        seconds: training budget on the client's own clock; None in a round of steps.
        deadline_seconds: from receipt, on the client's own clock: the answer has to be there by then, or it is worth nothing;
            None where clients have no clock of their own (in process).
        participants: clients in this round; the learning-rate clock runs so many times faster than one client trains.
        batch_tokens: tokens of this client's optimizer step.
        clock_step: optimizer steps of the run so far.
        clock_tokens: tokens merged so far.
        horizon_tokens: tokens of the whole run.
        lease: the rows this client may read, in order.
        data: where its streams stand in them, as merged; None at their begin. What a client trained that was not merged
            is leased anew, so the ledger says where to go on, not the client.
    """

    run: str
    round: int
    client: str
    nonce: str
    base_hash: str
    down_codec: str
    up_codec: str
    max_steps: int
    seconds: float | None
    deadline_seconds: float | None
    participants: int
    batch_tokens: int
    clock_step: int
    clock_tokens: int
    horizon_tokens: int
    lease: tuple[RowRange, ...]
    data: DataState | None = None

    def _plain(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        data = None if self.data is None else self.data.to_plain()
        return {**plain, "lease": [asdict(part) for part in self.lease], "data": data}

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> Self:
        data = None if plain["data"] is None else DataState.from_plain(plain["data"])
        return cls(**{**plain, "lease": tuple(map(_range, plain["lease"])), "data": data})


@dataclass(frozen=True)
class Report(Note):
    """What a client did in a round.

    Attributes:
        run: id of the run, from the instructions, like `round`, `client`, `nonce` and `base_hash`.
        round: see `run`.
        client: see `run`.
        nonce: see `run`.
        base_hash: see `run`.
        payload_hash: of the arrays that go with it.
        steps: full optimizer steps.
        tokens: tokens of them, over all ranks.
        seconds: training time on the client's own clock.
        loss_first: training loss of the first step, nats a token.
        loss_last: of the last.
        exhausted: the lease ended before the budget did.
        data: where every stream stands.
    """

    run: str
    round: int
    client: str
    nonce: str
    base_hash: str
    payload_hash: str
    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    exhausted: bool
    data: DataState

    def _plain(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "data": self.data.to_plain()}

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> Self:
        return cls(**{**plain, "data": DataState.from_plain(plain["data"])})
