"""Weights through a store: real files, a real web server and the site's own end of the way."""

from __future__ import annotations

import contextlib
import errno
import http.client
import itertools
import os
import shutil
import socket
import socketserver
import stat
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import uvicorn
from flwr.app import Message
from flwr.serverapp import Grid
from starlette.exceptions import HTTPException

from nanofed.errors import NanofedError
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.deploy.keys import init
from nanofed.federated.server.events import Events
from nanofed.federated.server.messenger import Messenger
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire import weights_server
from nanofed.federated.wire.codec import CODECS, Array, Arrays, WireError, hash_arrays
from nanofed.federated.wire.messages import Instructions, StoredWeights
from nanofed.federated.wire.weight_store import WeightStore
from nanofed.federated.wire.weights_calls import DOWN, LENGTH, OBJECT, OFFSET, PIECE_BYTES, PULL, PUSH, UP
from nanofed.federated.wire.weights_client import RoundOver, WeightsClient, WeightsError
from nanofed.federated.wire.weights_server import WeightsServer
from nanofed.training.gc_control import FrozenObjects
from tests.faults.link import CUT, STALLED, Link
from tests.faults.perimeter import Running
from tests.federated import replies

BF16, FP32 = CODECS["bf16"], CODECS["fp32"]
NO_REPLY = cast(Message, None)

pytestmark = pytest.mark.slow


def weights(seed: int = 0) -> dict[str, Array]:
    """Two and a half pieces in bf16."""
    random = np.random.default_rng(seed)
    rows = PIECE_BYTES // 2 // 64
    shapes = {"big": (2 * rows, 64), "small": (3, 5), "more": (rows // 2, 64), "odd": (7,)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """Flower's application, which the weights' calls never reach."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 418, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A web server with the store of `tmp_path / "weights"`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = WeightsServer(behind, tmp_path / "weights")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights")


class Laid:
    """Weights that lie in a store for one client, and what the client does by what its message says."""

    def __init__(self, store: WeightStore, values: dict[str, Array] | None = None, seconds: float = 30.0) -> None:
        self.values = values or weights()
        self.answer: Arrays = BF16.encode({name: array + 1 for name, array in self.values.items()})
        payload = store.encode(self.values, BF16)
        self.round = store.offer({"lab-a": payload}, BF16.nbytes(self.values), seconds)
        stored = StoredWeights.found_in(self.round.note("lab-a"))
        assert stored is not None and self.round.message_bytes == 0
        self.stored = stored

    def fetch(self, client: WeightsClient) -> Arrays:
        return client.fetch(self.stored, until(self.stored))

    def deliver(self, client: WeightsClient) -> None:
        client.deliver(self.stored, self.answer, until(self.stored))

    def take(self) -> Arrays:
        return self.round.take("lab-a", NO_REPLY, BF16, self.values)


@pytest.fixture
def lay(store: WeightStore) -> Iterator[Callable[..., Laid]]:
    """Lays weights down; the round is closed at the end of the test."""
    with contextlib.ExitStack() as rounds:

        def made(*args: Any, **options: Any) -> Laid:
            laid = Laid(store, *args, **options)
            rounds.callback(laid.round.close)
            return laid

        yield made


@pytest.fixture
def laid(lay: Callable[..., Laid]) -> Laid:
    return lay()


@pytest.fixture
def client(port: int) -> WeightsClient:
    return WeightsClient(f"127.0.0.1:{port}")


@pytest.fixture
def link(port: int) -> Iterator[Link]:
    with contextlib.closing(Link(port)) as made:
        yield made


def same(there: Arrays, here: Iterable[Any]) -> None:
    for a, b in zip(there, here, strict=True):
        np.testing.assert_array_equal(a, b)


def until(stored: StoredWeights) -> float:
    """Return when the round is over, on the monotonic clock, for a message that has just come."""
    return time.monotonic() + stored.seconds


def call(port: int, path: str, headers: dict[str, str], body: bytes = b"", method: str = "POST") -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/octet-stream", **headers})
        return connection.getresponse().status


def test_weights_go_there_and_back_bit_for_bit(laid: Laid, client: WeightsClient, tmp_path: Path) -> None:
    same(laid.fetch(client), BF16.encode(laid.values))
    laid.deliver(client)
    same(laid.take(), laid.answer)
    laid.round.close()
    assert not [path for name in (DOWN, UP) for path in (tmp_path / "weights" / name).iterdir()]


def test_lossless_weights_are_laid_down_as_they_are(store: WeightStore, client: WeightsClient) -> None:
    values = weights()
    round_weights = store.offer({"lab-a": store.encode(values, FP32)}, 0, 30.0)
    stored = StoredWeights.found_in(round_weights.note("lab-a"))
    assert stored is not None and stored.answer == ""
    same(client.fetch(stored, until(stored)), values.values())
    round_weights.close()


def test_what_was_taken_up_cannot_be_changed_any_more(laid: Laid, client: WeightsClient, tmp_path: Path) -> None:
    """Checked first and merged later: between the two nobody may write to it, not even who has the file open."""
    laid.deliver(client)
    before = os.open(tmp_path / "weights" / UP / laid.stored.answer, os.O_RDONLY)
    taken = laid.take()
    with pytest.raises(RoundOver, match="its round is over"):
        client.deliver(laid.stored, BF16.encode(weights(2)), until(laid.stored))
    path = Path(f"/proc/self/fd/{before}")  # opens the file that has no name any more, as who opened it before holds it
    with pytest.raises(HTTPException, match="its round is over"):
        weights_server._write(path, 0, b"x" * 100)
    same(taken, laid.answer)
    laid.round.drop("lab-a")
    with pytest.raises(HTTPException, match="its round is over"):
        weights_server._write(path, 0, b"x" * 100)
    os.close(before)
    with pytest.raises(WireError, match="no room for its answer"):
        laid.take()


@pytest.mark.parametrize("ended_by", ["its end", "the next round loop"])
def test_a_round_that_is_over_has_no_files(ended_by: str, laid: Laid, client: WeightsClient, tmp_path: Path) -> None:
    laid.round.close() if ended_by == "its end" else WeightStore(tmp_path / "weights")
    with pytest.raises(RoundOver):
        laid.fetch(client)
    with pytest.raises(RoundOver):
        laid.deliver(client)


def test_an_answer_of_another_size_is_not_sent(laid: Laid, client: WeightsClient) -> None:
    laid.answer = [np.zeros(10, np.uint8)]
    with pytest.raises(WeightsError, match=r"the answer has 10 bytes, the server expects \d+"):
        laid.deliver(client)


def test_calls_that_are_none(laid: Laid, port: int, tmp_path: Path) -> None:
    stored, answer = laid.stored, tmp_path / "weights" / UP / laid.stored.answer
    size = answer.stat().st_size
    up = {OBJECT: stored.answer, OFFSET: "0"}
    down = {OBJECT: stored.ticket, OFFSET: "0", LENGTH: "10"}
    wrong: list[tuple[int, str, dict[str, str], bytes]] = [
        (418, "/v1/fleet/get-run", {}, b""),
        *((400, PULL, down | {OBJECT: name}, b"") for name in ("", "../up", f"{stored.ticket}X", f"{stored.ticket}/")),
        (404, PULL, down | {OBJECT: stored.answer}, b""),  # what others deliver cannot be fetched
        (404, PUSH, up | {OBJECT: stored.ticket}, b"x"),  # nor the weights be changed
        *((400, PULL, down | {OFFSET: text}, b"") for text in ("-1", "")),
        *((400, PULL, down | {LENGTH: text}, b"") for text in ("ten", "1" * 16)),
        (416, PULL, down | {OFFSET: str(size), LENGTH: "1"}, b""),
        (413, PUSH, up | {OFFSET: str(size - 1)}, b"xy"),
        (413, PUSH, up, b"x" * (PIECE_BYTES + 1)),
    ]
    assert call(port, PULL, down) == 200 and call(port, PULL, down, method="GET") == 405
    for status, path, headers, body in wrong:
        assert call(port, path, headers, body) == status, (path, headers)
    assert answer.stat().st_size == size


@pytest.mark.parametrize("fault", [CUT, STALLED])
def test_a_bad_link_costs_time_only(laid: Laid, link: Link, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanofed.federated.wire.weights_client.SILENCE_SECONDS", 1.0)
    (link.cut if fault == CUT else link.stall)(after=PIECE_BYTES + PIECE_BYTES // 2)
    delivery = threading.Thread(target=laid.deliver, args=(WeightsClient(f"127.0.0.1:{link.port}"),))
    delivery.start()
    while link.state != fault:
        time.sleep(0.01)
    time.sleep(1.5)
    link.heal()
    delivery.join(20)
    assert not delivery.is_alive()
    same(laid.take(), laid.answer)


def test_a_slow_line_carries_a_whole_piece(
    lay: Callable[..., Laid], link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece takes longer than a silence may, and then its end waits in buffers: neither is a silence."""
    monkeypatch.setattr("nanofed.federated.wire.weights_client.SILENCE_SECONDS", 0.5)
    laid = lay({"w": weights()["big"][: PIECE_BYTES // 2 // 64]}, seconds=60.0)
    assert laid.stored.answer_bytes == PIECE_BYTES
    link.bytes_per_second = 3e6
    laid.deliver(WeightsClient(f"127.0.0.1:{link.port}"))
    assert link.sent < 1.1 * PIECE_BYTES, "it went once"
    same(laid.take(), laid.answer)


def test_a_delivery_ends_with_its_round(lay: Callable[..., Laid], link: Link) -> None:
    """A line too slow for its piece is not sent to until the piece is through: the next round is waiting."""
    laid, started = lay(seconds=2.0), time.monotonic()
    link.bytes_per_second = 1e5
    with pytest.raises(WeightsError, match="did not pass to or from"):
        laid.deliver(WeightsClient(f"127.0.0.1:{link.port}"))
    assert time.monotonic() - started < 6


@pytest.mark.parametrize("lasting", [False, True])
def test_a_server_that_cannot_is_asked_again_for_a_while(
    lasting: bool, laid: Laid, client: WeightsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, real, started = itertools.count(), os.pwrite, time.monotonic()

    def full(*args: Any) -> int:
        if lasting or next(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr("nanofed.federated.wire.weights_client.UNABLE_SECONDS", 1.0 if lasting else 10.0)
    if lasting:
        with pytest.raises(WeightsError, match="the server's disk: No space left on device"):
            laid.deliver(client)
        assert time.monotonic() - started < 6, "its round has 30 s"
    else:
        laid.deliver(client)
        same(laid.take(), laid.answer)


def test_weights_take_the_machines_way_out(laid: Laid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others are reached through an HTTP proxy, as Flower's own calls are."""
    keys = init(tmp_path / "keys", ["127.0.0.1"], ["lab-a"])
    with Running(tmp_path, keys, WeightsServer(behind, tmp_path / "weights")) as perimeter, wayout() as (outer, asked):
        client = WeightsClient(f"127.0.0.1:{perimeter.port}", keys.ca, keys.private_key("lab-a"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@127.0.0.1:{outer}")
        laid.fetch(client)
        laid.deliver(client)
        words = "Basic " + b64encode(b"me:p@ss").decode()
        assert set(asked) == {(f"CONNECT 127.0.0.1:{perimeter.port}", words)}
        asked.clear()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        laid.fetch(client)
        assert not asked
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
        with pytest.raises(WeightsError, match="SOCKS"):
            laid.fetch(client)


@contextlib.contextmanager
def wayout() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Run an HTTP proxy that opens tunnels, and yield its port and what it was asked for, with the credentials."""
    asked: list[tuple[str, str]] = []

    class Tunnel(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode().rsplit(" ", 1)[0]
            headers = http.client.parse_headers(self.rfile)
            asked.append((line, headers["Proxy-Authorization"]))
            with socket.create_connection(("127.0.0.1", int(line.rpartition(":")[2]))) as there:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pass_on, args=(there, self.connection))
                back.start()
                pass_on(self.connection, there)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address[1], asked
        server.shutdown()


def pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_writers_cannot_hold_up_who_takes_an_answer(laid: Laid, tmp_path: Path) -> None:
    """A site that goes on sending, as fast as it can, does not keep the round loop from its other answers."""
    path, over = tmp_path / "weights" / UP / laid.stored.answer, threading.Event()

    def write() -> None:
        with pytest.raises(HTTPException, match="its round is over"):
            while True:
                weights_server._write(path, 0, bytes(PIECE_BYTES))
        over.set()

    writers = [threading.Thread(target=write) for _ in range(6)]
    for writer in writers:
        writer.start()
    time.sleep(0.2)
    taking = threading.Thread(target=laid.take, daemon=True)
    taking.start()
    taking.join(10)
    assert not taking.is_alive() and over.is_set()
    for writer in writers:
        writer.join(10)


def test_refused_answers_leave_neither_files_nor_memory(store: WeightStore, tmp_path: Path) -> None:
    """Nothing of a round may hang on a refusal: it would be unseen space on the disk, for as long as the process lives."""
    grid = Answering()
    exchange, events = Messenger(cast(Grid, grid), Events(), store, streams=replies.STREAMS, most_pending=1), Events()
    replies.request()  # Message() reads what it sets
    with FrozenObjects():
        for number in range(1, 5):
            values = replies.weights()
            payload = store.encode(values, FP32)
            asked = replies.instructions(round=number, base_hash=hash_arrays(payload))
            nodes = {"client-0": 1, "client-1": 2}
            instructed = {client: replace(asked, client=client) for client in nodes}
            sent = SentWeights(values, payload, FP32, FP32)
            exchange.send(nodes, instructed, sent, seconds=0.3)
            found = exchange.replies(number)
            for answer in found:
                assert isinstance(answer.result, RefusedReply)
                events.add(answer.result.kind, answer.client, answer.result, number)
            del payload, sent, found, answer
            assert events.total() == 2 * number
            assert not gone(), f"after round {number}"
    event = events.last("damaged", "client-0")
    assert event is not None and event.count == 4, "its file was read"


class Answering:
    """A grid whose first client delivers other weights than it announces, while the second says nothing."""

    def __init__(self) -> None:
        self._left: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        (message,) = messages
        if message.metadata.dst_node_id == 2:
            return ["silent"]
        config = message.content.config_records["fitins.config"]
        asked = Instructions.from_config(config)
        report = replies.report(round=asked.round, base_hash=asked.base_hash)
        reply = replies.reply([], report.to_config())
        reply.metadata.__dict__["_reply_to_message_id"] = f"message {asked.round}"
        self._left[f"message {asked.round}"] = reply
        return [f"message {asked.round}"]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._left.pop(name) for name in message_ids if name in self._left]


def gone() -> list[str]:
    """Return files of a weight store that this process maps or has open, and that have no name any more."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [line for line in maps + links if "/weights/" in line and "(deleted)" in line]


def test_the_folder_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "weights").symlink_to(tmp_path / "disk")
    for _ in range(2):
        Laid(WeightStore(tmp_path / "weights"))
    assert len(list((tmp_path / "disk" / DOWN).iterdir())) == 1


def test_a_store_that_somebody_removes_is_made_anew_for_the_next_round(
    lay: Callable[..., Laid], tmp_path: Path
) -> None:
    first, folder = lay(), tmp_path / "weights"
    shutil.rmtree(folder)
    with pytest.raises(WireError, match="no room for its answer, or it was changed here"):
        first.take()
    first.round.close()
    second = lay()
    assert second.stored.ticket != first.stored.ticket and (folder / DOWN / second.stored.ticket).exists()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / DOWN, folder / UP)} == {0o700}
    os.truncate(folder / UP / second.stored.answer, 10)
    with pytest.raises(WireError, match="no room for its answer, or it was changed here"):
        second.take()


def test_weights_stay_until_the_last_of_their_clients_has_answered(store: WeightStore, tmp_path: Path) -> None:
    """Where clients are merged one by one, several versions of the weights are under way."""
    down = tmp_path / "weights" / DOWN

    def files() -> set[str]:
        return {path.name for path in down.iterdir()}

    first = store.encode(replies.weights(), FP32)
    a, b = (store.offer({client: first}, 8, 30.0) for client in ("a", "b"))
    (old,) = files()
    a.close()
    second = store.encode(replies.weights(1), FP32)
    assert old in files() and len(files()) == 2
    c = store.offer({"a": second}, 8, 30.0)
    b.close()
    assert old not in files() and len(files()) == 1
    c.close()
    assert files() == set() == {path.name for path in (tmp_path / "weights" / UP).iterdir()}


def test_a_store_on_a_disk_that_is_not_mounted_is_named_and_used_again_when_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "weights").symlink_to(tmp_path / "disk")
    store = WeightStore(tmp_path / "weights")
    Laid(store)
    (tmp_path / "disk").rename(tmp_path / "away")
    for again in (lambda: store.encode(replies.weights(), FP32), lambda: WeightStore(tmp_path / "weights")):
        with pytest.raises(NanofedError, match=r"a link to .*disk, which is not there: is its disk mounted\?"):
            again()
    (tmp_path / "away").rename(tmp_path / "disk")
    Laid(store)


def test_weights_pass_the_perimeter_of_sites_that_it_knows_only(laid: Laid, tmp_path: Path) -> None:
    keys = init(tmp_path / "keys", ["127.0.0.1"], ["lab-a"])
    strange = init(tmp_path / "strangers", ["127.0.0.1"], ["lab-a"]).private_key("lab-a")
    with Running(tmp_path, keys, WeightsServer(behind, tmp_path / "weights")) as perimeter:
        server = f"127.0.0.1:{perimeter.port}"
        for key, reason in ((strange, "has not registered this key"), (None, "no SuperNode's signature")):
            for use in (laid.fetch, laid.deliver):
                with pytest.raises(WeightsError, match=reason):
                    use(WeightsClient(server, keys.ca, key))
        client = WeightsClient(server, keys.ca, keys.private_key("lab-a"))
        same(laid.fetch(client), BF16.encode(laid.values))
        laid.deliver(client)
        same(laid.take(), laid.answer)
        perimeter.settled()
        site = perimeter.figures()["sites"]["lab-a"]
        assert site["bytes_up"] == site["bytes_down"] == laid.stored.answer_bytes


def test_a_fetch_that_breaks_off_says_why(lay: Callable[..., Laid], link: Link) -> None:
    laid = lay(seconds=1.05)
    link.bytes_per_second = 2e6  # in the middle of a piece, with no time for another try
    breaker = threading.Timer(1.0, link.close)
    breaker.start()
    with pytest.raises(WeightsError, match=r"did not pass to or from 127\.0\.0\.1"):
        laid.fetch(WeightsClient(f"127.0.0.1:{link.port}"))
    breaker.join()


def test_a_server_that_is_not_there_is_given_up_when_the_round_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(WeightsError, match=rf"did not pass to or from 127.0.0.1:{port} in time: .*refused"):
        WeightsClient(f"127.0.0.1:{port}").fetch(StoredWeights("0" * 32, [("<u2", [8])], "", 0, 1.0), started + 1.0)
    assert time.monotonic() - started < 5


def test_no_room_for_the_weights(store: WeightStore, tmp_path: Path) -> None:
    with pytest.raises(NanofedError, match=r"the round's weights cannot be kept in .*weights"):
        store.encode({"w": np.broadcast_to(np.float32(0), (1 << 48,))}, BF16)
    assert not list((tmp_path / "weights" / DOWN).iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NanofedError, match="cannot be kept in"):
        WeightStore(tmp_path / "file" / "weights")


@pytest.mark.parametrize(
    "text", ["no JSON", "[]", "{}", '{"ticket": "../x", "layout": [], "answer": "", "answer_bytes": 0, "seconds": 1}']
)
def test_a_note_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a StoredWeights (cannot be read|has a value out of range)"):
        StoredWeights.found_in({StoredWeights.key: text})
    assert StoredWeights.found_in({}) is None
