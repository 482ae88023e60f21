"""What server and site say to each other beside the weights: plain dataclasses that travel as one JSON string.

A message lives longer than its answer is waited for, so that a late answer arrives, is named and dropped.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

import nanofed
from nanofed.data.identity import DataIdentity
from nanofed.data.rows import RowRange
from nanofed.data.streams import DataState
from nanofed.federated.wire.bundle import code_hash
from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.plain_text import SAFE_NAME, plain
from nanofed.federated.wire.weights_calls import TICKET

if TYPE_CHECKING:
    from nanofed.data.datamodule import TokenDataModule
    from nanofed.training.module import GPTModule

KEY = "nanofed"  # of the JSON string in Flower's config and metrics dictionaries, where a message has no key of its own
MAX_JSON = 16 << 20  # bytes; a best-fit data state of 64 streams stays far below
MAX_TEXT = 200  # characters of a version or a shard's name
MAX_SHARDS = 4096  # of one site: the server looks at each of them for every lease
MAX_ROWS = 1 << 28  # of all shards of one site: the ledger takes a byte of memory for each that is on lease
MAX_TEXT_BYTES = 1 << 50  # of one shard
MAX_SPEED = 1e12  # tokens a second of one site
MAX_FAILURE = 500  # characters of a reason why a site gives no figure
MAX_ARRAYS = 1 << 16  # as which weights travel
LIFE = 2.0  # of a message, over the time for which its answer is waited for
SENT = ("batch_tokens", "num_steps", "horizon_tokens", "tokens_per_parameter", "horizon_flops")  # with every round


Int = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
Reason = Annotated[str, Field(max_length=MAX_FAILURE)]
Position = Annotated[
    DataState, PlainValidator(DataState.from_plain), PlainSerializer(DataState.to_plain, return_type=dict[str, Any])
]
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
Ticket = Annotated[str, Field(pattern=f"^{TICKET.pattern}$")]
ArrayLayout = (
    tuple[  # dtype and shape, of the dtypes that codecs make: NumPy would parse whatever else foreign bytes describe
        Annotated[str, Field(pattern=r"^(<f4|<u2|\|i1|\|u1)$")],
        Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=32)],
    ]
)


@dataclass(frozen=True)
class WireMessage:
    """A dataclass that travels as JSON; unknown and missing fields, and values of another kind, are refused by name."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")
    key: ClassVar[str] = KEY  # in Flower's dictionaries

    def to_config(self) -> dict[str, Any]:
        """Return the dictionary that Flower carries."""
        return {self.key: _adapter(type(self)).dump_json(self).decode()}

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Rebuild from what Flower carried.

        Raises:
            WireError: It is no JSON, too much JSON, or has other fields or values than this nanofed sends.
        """
        text = config.get(cls.key) if hasattr(config, "get") else None
        if not isinstance(text, str) or len(text) > MAX_JSON:
            raise WireError(f"a {cls.__name__} must be one JSON string of at most {MAX_JSON} bytes under {cls.key!r}")
        try:
            message: Self = _adapter(cls).validate_json(text.encode("utf-8", "replace"))
            message.check()
        except ValidationError as error:
            raise WireError(f"a {cls.__name__} cannot be read: {_first(error)}") from error
        except ValueError as error:
            raise WireError(f"a {cls.__name__} has a value out of range: {error}") from error
        return message

    @classmethod
    def found_in(cls, config: Mapping[str, Any]) -> Self | None:
        """Return the message of this kind among what Flower carried, None if there is none.

        Raises:
            WireError: There is one, in a form that cannot be read.
        """
        return cls.from_config(config) if cls.key in config else None

    def check(self) -> None:
        """Refuse values that no sender of this nanofed gives.

        Raises:
            ValueError: a value is out of its range; says which.
        """


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:  # making one takes milliseconds
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _first(error: ValidationError) -> str:
    """Return the first thing that is wrong, in a few plain words: what was sent may be of any size."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return plain(first["msg"])
    where = plain(".".join(map(str, first["loc"])), 80) or "it"
    if first["type"] == "missing":
        return f"it lacks the field {where}"
    if first["type"] == "unexpected_keyword_argument":
        return f"it has the unknown field {where}"
    return f"{where} is {plain(repr(first['input']), 80)}: {plain(first['msg'])}"


@dataclass(frozen=True)
class SiteShard:
    """A shard as a site describes it: its name, how much is in it, and a fingerprint; nothing of its text."""

    name: str
    num_rows: Int
    text_bytes: Int
    fingerprint: str

    def check(self) -> None:
        """Refuse names and sizes that no shard has."""
        words = (self.name, self.fingerprint)
        if not all(0 < len(text) <= MAX_TEXT and text.isprintable() for text in words) or set("/\\") & set(self.name):
            raise ValueError(f"shard {self.name[:80]!r} has no plain name and fingerprint")
        if not 1 <= self.num_rows <= self.text_bytes <= MAX_TEXT_BYTES:  # every document has a byte
            raise ValueError(
                f"shard {self.name!r} has {self.num_rows} rows of {self.text_bytes} bytes, of {MAX_TEXT_BYTES} at most"
            )


@dataclass(frozen=True)
class Hello(WireMessage):
    """What a client says of itself before its first round."""

    name: str  # name of the client
    code: str  # hash of the sources of its nanofed
    model: dict[str, Int]  # sizes of its GPT
    tokenizer: str  # fingerprint of its tokenizer
    dataset: str  # fingerprint of its dataset
    streams: Int  # how many streams its data has
    training: dict[str, str]  # what else decides the arithmetic of a step: rates, decay, packing
    versions: dict[str, str]  # versions of Python and of the packages that matter
    devices: Int  # how many devices it trains on
    tokens_per_second: float | None  # its speed in its last round, None before it has trained any
    shards: tuple[SiteShard, ...]  # the training shards at the site

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

    def check(self) -> None:
        """Refuse words that are not plain, and counts that no site has."""
        if not SAFE_NAME.fullmatch(self.name):
            raise ValueError(f"name is {self.name[:80]!r}, no plain word")
        for section, words in (("training", self.training), ("versions", self.versions)):
            for name, text in words.items():
                if not (name.isprintable() and text.isprintable() and max(len(name), len(text)) <= MAX_TEXT):
                    raise ValueError(f"{section} {name[:40]!r} is no plain text")
        if not (self.devices >= 1 and 0 <= (self.tokens_per_second or 0) <= MAX_SPEED):
            raise ValueError(f"{self.devices} devices at {self.tokens_per_second} tokens a second")
        if self.devices > self.streams:  # every device reads streams of its own
            raise ValueError(f"{self.devices} devices read {self.streams} streams: each needs one of its own")
        for shard in self.shards:
            shard.check()
        if len(self.shards) > MAX_SHARDS:
            raise ValueError(f"{len(self.shards)} shards, of {MAX_SHARDS} at most: pack the text into larger ones")
        if (rows := sum(shard.num_rows for shard in self.shards)) > MAX_ROWS:
            raise ValueError(f"the shards have {rows} rows, of {MAX_ROWS} at most")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is named twice")


@dataclass(frozen=True)
class RoundMessage(WireMessage):
    """A message of one round to or from one client; the answer repeats these fields of what it answers."""

    run: str  # id of the run
    round: Int  # number of the round, from 1
    client: str  # name of the client, so that a reply cannot be taken for another's
    nonce: str  # a number of this message alone, in hexadecimal digits
    base_hash: str  # hash of the weights that the client has once it has the arrays that the server sends along

    def repeated(self) -> dict[str, Any]:
        """Return what the answer to this message repeats, by field."""
        return {field.name: getattr(self, field.name) for field in fields(RoundMessage)}


@dataclass(frozen=True)
class WeightsMessage(RoundMessage):
    """A message of one round with which weights go, or what changed in them."""

    # How weights travel. With `int8` and `int4` the client holds them, in bf16, until others take their place.
    down_codec: str
    # Hash of the weights that the client holds and to which the arrays have to be added; empty where the arrays are the weights
    # themselves.
    changed_from: str

    def described(self) -> dict[str, Any]:
        """Return what another message with the same weights says of them and of the round, by field."""
        return {field.name: getattr(self, field.name) for field in fields(WeightsMessage)}


@dataclass(frozen=True)
class Instructions(WeightsMessage):
    """What a client is to do in a round."""

    up_codec: str  # codec of the arrays that are to be sent back
    max_steps: Int  # optimizer steps at most: the round's, or what is left to the horizon
    seconds: float | None  # training budget on the client's own clock; None in a round of steps
    # Seconds from the receipt, on the client's own clock, by which the answer has to be at the server; None where clients have
    # no clock of their own.
    deadline_seconds: float | None
    # Clients in this round; the learning-rate clock runs so many times faster than one client trains.
    participants: Positive
    batch_tokens: Positive  # tokens of one optimizer step of this client
    clock_step: Int  # optimizer steps of the run so far
    clock_tokens: Int  # tokens merged so far
    horizon_tokens: Positive  # tokens of the whole run
    lease: tuple[RowRange, ...]  # the rows that this client may read, in order
    # Where the client's streams stand in the lease, as merged; None at its begin. What a client trained that was not merged is
    # leased anew, so the ledger says where to go on, not the client.
    data: Position | None
    overlap: bool  # train on when the round is over, until the next one is here; those steps are of the next one then


@dataclass(frozen=True)
class Report(RoundMessage):
    """What a client did in a round."""

    payload_hash: str  # hash of the arrays that go with the report
    steps: Int  # full optimizer steps
    tokens: Int  # tokens of these steps, over all ranks
    seconds: float  # training time on the client's own clock, from the weights' arrival
    loss_first: float  # training loss of the first step, nats a token
    loss_last: float  # training loss of the last step, nats a token
    exhausted: bool  # the lease ended before the budget did
    data: Position  # where every stream stands
    unwritten: bool  # the site's disk did not take the optimizer state of the round before
    ahead: Int  # how many of the steps the client had taken before the weights were there

    @property
    def training_seconds(self) -> float:
        """The time of all steps, those before the weights' arrival at the speed of the others."""
        return self.seconds * self.steps / max(1, self.steps - self.ahead)

    @property
    def tokens_per_second(self) -> float:
        """The speed of the training."""
        return self.tokens / self.training_seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Failure(RoundMessage):
    """Why a client sends no update, where the server can do something about it; any other failure is an error of Flower's."""

    key: ClassVar[str] = "nanofed.failure"

    # `lease`: the leased rows hold too little text for one optimizer step, and the next lease should be longer; or `weights`:
    # the client does not hold the weights that were changed, and should be sent them whole.
    kind: Literal["lease", "weights"]
    reason: str  # the failure in words


@dataclass(frozen=True)
class Evaluate(WeightsMessage):
    """What a client is to measure of the global weights, on text of its own.

    The text is that of the server's own evaluation, of the client's validation shard: its first `eval_tokens` targets in document
    order. Forward pass f of it (`nanofed.data.validation`) is this client's where f mod `shares` is `share`. So shares of one
    shard are disjoint and together all of it, and a pass gives the same sums wherever it is computed on the same hardware.
    """

    key: ClassVar[str] = "nanofed.evaluate"

    eval_tokens: Int  # the number of targets to score, all shares together
    share: Int  # the number of this client's share, from 0
    shares: Int  # the number of shares
    seconds: float  # the seconds after which the client gives the evaluation up, on its own clock

    def check(self) -> None:
        """Refuse a share that there is not."""
        if not (0 <= self.share < self.shares and self.eval_tokens >= 1 and self.seconds > 0):
            raise ValueError(
                f"share {self.share} of {self.shares} of {self.eval_tokens} tokens within {self.seconds} s"
            )


@dataclass(frozen=True)
class Evaluation(RoundMessage):
    """What a client measured: sums, since the sums of several sites pool exactly and their means do not."""

    key: ClassVar[str] = "nanofed.evaluation"

    nats: float  # the sum of the losses, in nats, of all targets that have bytes
    # The sum of these targets' UTF-8 lengths; 0 where the text has fewer forward passes than there are shares.
    bytes: Int
    seconds: float  # the seconds that the evaluation took, on the client's own clock
    failure: Reason  # the reason why there are no sums; empty where there are


@dataclass(frozen=True)
class StoredWeights(WireMessage):
    """Where the weights of a round are stored at the server, and the file there that takes one site's answer."""

    key: ClassVar[str] = "stored_weights"

    ticket: Ticket  # the name of the file that holds the weights
    # The dtype and shape of each array in it; their bytes follow each other.
    layout: Annotated[list[ArrayLayout], Field(max_length=MAX_ARRAYS)]
    answer: Ticket | Literal[""]  # the name of the file for the answer; empty where no weights are to be sent back
    answer_bytes: Annotated[Int, Field(ge=0)]  # the size of the answer
    # The seconds, from the arrival of the message, for which both files exist.
    seconds: Annotated[float, Field(gt=0, lt=1e9)]
