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
from collections.abc import Iterable, Iterator
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
from nanofed.federated.wire.codec import CODECS, Array, WireError, hash_arrays
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
HEADERS = {"Content-Type": "application/octet-stream"}

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


def lay(store: WeightStore, values: dict[str, Array], seconds: float = 30.0) -> tuple[Any, StoredWeights]:
    """Lay weights down for one client and return what its message says."""
    round_weights = store.offer(store.encode(values, BF16), ["lab-a"], BF16.nbytes(values), seconds)
    stored = StoredWeights.found_in(round_weights.note("lab-a"))
    assert stored is not None and round_weights.message_bytes == 0
    return round_weights, stored


def until(stored: StoredWeights) -> float:
    """Return when the round is over, on the monotonic clock, for a message that has just come."""
    return time.monotonic() + stored.seconds


def call(port: int, path: str, headers: dict[str, str], body: bytes = b"", method: str = "POST") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, HEADERS | headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def test_weights_go_there_and_back_bit_for_bit(store: WeightStore, port: int, tmp_path: Path) -> None:
    values, answer = weights(), BF16.encode(weights(1))
    round_weights, stored = lay(store, values)
    weights_client = WeightsClient(f"127.0.0.1:{port}")
    for there, here in zip(weights_client.fetch(stored, until(stored)), BF16.encode(values), strict=True):
        np.testing.assert_array_equal(there, here)
    weights_client.deliver(stored, answer, until(stored))
    taken = round_weights.take("lab-a", NO_REPLY, BF16, values)
    for there, here in zip(taken, answer, strict=True):
        np.testing.assert_array_equal(there, here)
    round_weights.drop("lab-a")
    round_weights.close()
    assert not [path for name in (DOWN, UP) for path in (tmp_path / "weights" / name).iterdir()]


def test_lossless_weights_are_laid_down_as_they_are(store: WeightStore, port: int) -> None:
    values = weights()
    round_weights = store.offer(store.encode(values, FP32), ["lab-a"], 0, 30.0)
    stored = StoredWeights.found_in(round_weights.note("lab-a"))
    assert stored is not None and stored.answer == ""
    arrived = WeightsClient(f"127.0.0.1:{port}").fetch(stored, until(stored))
    for there, here in zip(arrived, values.values(), strict=True):
        np.testing.assert_array_equal(there, here)
    round_weights.close()


def test_what_was_taken_up_cannot_be_changed_any_more(store: WeightStore, port: int, tmp_path: Path) -> None:
    """Checked first and merged later: between the two nobody may write to it, not even who has the file open."""
    values, answer = weights(), BF16.encode(weights(1))
    round_weights, stored = lay(store, values)
    weights_client = WeightsClient(f"127.0.0.1:{port}")
    weights_client.deliver(stored, answer, until(stored))
    before = os.open(tmp_path / "weights" / UP / stored.answer, os.O_RDONLY)
    taken = round_weights.take("lab-a", NO_REPLY, BF16, values)
    with pytest.raises(RoundOver, match="its round is over"):
        weights_client.deliver(stored, BF16.encode(weights(2)), until(stored))
    path = Path(f"/proc/self/fd/{before}")  # opens the file that has no name any more, as who opened it before holds it
    with pytest.raises(HTTPException, match="its round is over"):
        weights_server._write(path, 0, b"x" * 100)
    for there, here in zip(taken, answer, strict=True):
        np.testing.assert_array_equal(there, here)
    round_weights.drop("lab-a")
    with pytest.raises(HTTPException, match="its round is over"):
        weights_server._write(path, 0, b"x" * 100)
    os.close(before)
    with pytest.raises(WireError, match="no room for its answer"):
        round_weights.take("lab-a", NO_REPLY, BF16, values)
    round_weights.close()


def test_a_round_that_is_over_has_no_files(store: WeightStore, port: int) -> None:
    round_weights, stored = lay(store, weights())
    round_weights.close()
    weights_client = WeightsClient(f"127.0.0.1:{port}")
    with pytest.raises(RoundOver):
        weights_client.fetch(stored, until(stored))
    with pytest.raises(RoundOver):
        weights_client.deliver(stored, BF16.encode(weights(1)), until(stored))


def test_the_round_loop_that_begins_finds_no_files_of_another(store: WeightStore, port: int, tmp_path: Path) -> None:
    _, stored = lay(store, weights())
    WeightStore(tmp_path / "weights")
    with pytest.raises(RoundOver):
        WeightsClient(f"127.0.0.1:{port}").fetch(stored, until(stored))


def test_an_answer_of_another_size_is_not_sent(store: WeightStore, port: int) -> None:
    round_weights, stored = lay(store, weights())
    with pytest.raises(WeightsError, match=r"the answer has 10 bytes, the server expects \d+"):
        WeightsClient(f"127.0.0.1:{port}").deliver(stored, [np.zeros(10, np.uint8)], until(stored))
    round_weights.close()


def test_calls_that_are_none(store: WeightStore, port: int, tmp_path: Path) -> None:
    round_weights, stored = lay(store, weights())
    size = (tmp_path / "weights" / UP / stored.answer).stat().st_size
    at = {OBJECT: stored.answer, OFFSET: "0"}
    down = {OBJECT: stored.ticket, OFFSET: "0", LENGTH: "10"}
    assert call(port, "/v1/fleet/get-run", {})[0] == 418
    assert call(port, PULL, down)[0] == 200
    assert call(port, PULL, down, method="GET")[0] == 405
    for wrong in ("", "../up", stored.ticket.upper() + "x", f"{stored.ticket}/"):
        assert call(port, PULL, down | {OBJECT: wrong})[0] == 400
    assert call(port, PULL, down | {OBJECT: stored.answer})[0] == 404  # what others deliver cannot be fetched
    assert call(port, PUSH, at | {OBJECT: stored.ticket}, b"x")[0] == 404  # nor the weights be changed
    for name, text in ((OFFSET, "-1"), (OFFSET, ""), (LENGTH, "ten"), (LENGTH, "1" * 16)):
        assert call(port, PULL, down | {name: text})[0] == 400
    assert call(port, PULL, down | {OFFSET: str(size), LENGTH: "1"})[0] == 416
    assert call(port, PUSH, at | {OFFSET: str(size - 1)}, b"xy")[0] == 413
    assert call(port, PUSH, at, b"x" * (PIECE_BYTES + 1))[0] == 413
    assert (tmp_path / "weights" / UP / stored.answer).stat().st_size == size
    round_weights.close()


@pytest.mark.parametrize("fault", [CUT, STALLED])
def test_a_link_that_breaks_or_stalls_costs_time_only(
    store: WeightStore, port: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanofed.federated.wire.weights_client.SILENCE_SECONDS", 1.0)
    values, answer = weights(), BF16.encode(weights(1))
    round_weights, stored = lay(store, values)
    link = Link(port)
    weights_client = WeightsClient(f"127.0.0.1:{link.port}")
    getattr(link, "cut" if fault == CUT else "stall")(after=PIECE_BYTES + PIECE_BYTES // 2)
    delivery = threading.Thread(target=weights_client.deliver, args=(stored, answer, until(stored)))
    delivery.start()
    while link.state != fault:
        time.sleep(0.01)
    time.sleep(1.5)
    link.heal()
    delivery.join(20)
    assert not delivery.is_alive()
    for there, here in zip(round_weights.take("lab-a", NO_REPLY, BF16, values), answer, strict=True):
        np.testing.assert_array_equal(there, here)
    round_weights.close()
    link.close()


def test_a_slow_line_carries_a_whole_piece(
    store: WeightStore, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A piece takes longer than a silence may, and then its end waits in buffers: neither is a silence."""
    monkeypatch.setattr("nanofed.federated.wire.weights_client.SILENCE_SECONDS", 0.5)
    values = {"w": weights()["big"][: PIECE_BYTES // 2 // 64]}
    answer = BF16.encode({"w": values["w"] + 1})
    round_weights, stored = lay(store, values, seconds=60.0)
    assert stored.answer_bytes == PIECE_BYTES
    link = Link(port)
    link.bytes_per_second = 3e6
    WeightsClient(f"127.0.0.1:{link.port}").deliver(stored, answer, until(stored))
    assert link.sent < 1.1 * PIECE_BYTES, "it went once"
    np.testing.assert_array_equal(round_weights.take("lab-a", NO_REPLY, BF16, values)[0], answer[0])
    round_weights.close()
    link.close()


def test_a_delivery_ends_with_its_round(store: WeightStore, port: int) -> None:
    """A line too slow for its piece is not sent to until the piece is through: the next round is waiting."""
    values = weights()
    round_weights, stored = lay(store, values, seconds=2.0)
    link = Link(port)
    link.bytes_per_second = 1e5
    started = time.monotonic()
    with pytest.raises(WeightsError, match="did not pass to or from"):
        WeightsClient(f"127.0.0.1:{link.port}").deliver(stored, BF16.encode(values), until(stored))
    assert time.monotonic() - started < 6
    link.close()
    round_weights.close()


@pytest.mark.parametrize("lasting", [False, True])
def test_a_server_that_cannot_is_asked_again_for_a_while(
    lasting: bool, store: WeightStore, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, answer = weights(), BF16.encode(weights(1))
    round_weights, stored = lay(store, values)
    tries, real = itertools.count(), os.pwrite

    def full(*args: Any) -> int:
        if lasting or next(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr("nanofed.federated.wire.weights_client.UNABLE_SECONDS", 1.0 if lasting else 10.0)
    weights_client = WeightsClient(f"127.0.0.1:{port}")
    if lasting:
        started = time.monotonic()
        with pytest.raises(WeightsError, match="the server's disk: No space left on device"):
            weights_client.deliver(stored, answer, until(stored))
        assert time.monotonic() - started < 6, "its round has 30 s"
    else:
        weights_client.deliver(stored, answer, until(stored))
        np.testing.assert_array_equal(round_weights.take("lab-a", NO_REPLY, BF16, values)[0], answer[0])
    round_weights.close()


def test_weights_take_the_machines_way_out(store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others are reached through an HTTP proxy, as Flower's own calls are."""
    keys = init(tmp_path / "keys", ["127.0.0.1"], ["lab-a"])
    values, answer = weights(), BF16.encode(weights(1))
    round_weights, stored = lay(store, values)
    with Running(tmp_path, keys, WeightsServer(behind, tmp_path / "weights")) as perimeter, wayout() as (outer, asked):
        weights_client = WeightsClient(f"127.0.0.1:{perimeter.port}", keys.ca, keys.private_key("lab-a"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@127.0.0.1:{outer}")
        weights_client.fetch(stored, until(stored))
        weights_client.deliver(stored, answer, until(stored))
        assert {line for line, _ in asked} == {f"CONNECT 127.0.0.1:{perimeter.port}"}
        assert {words for _, words in asked} == {"Basic " + b64encode(b"me:p@ss").decode()}
        count = len(asked)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        weights_client.fetch(stored, until(stored))
        assert len(asked) == count
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
        with pytest.raises(WeightsError, match="SOCKS"):
            weights_client.fetch(stored, until(stored))
    round_weights.close()


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


def test_writers_cannot_hold_up_who_takes_an_answer(store: WeightStore, port: int, tmp_path: Path) -> None:
    """A site that goes on sending, as fast as it can, does not keep the round loop from its other answers."""
    values = weights()
    round_weights, stored = lay(store, values)
    path, over = tmp_path / "weights" / UP / stored.answer, threading.Event()

    def write() -> None:
        with pytest.raises(HTTPException, match="its round is over"):
            while True:
                weights_server._write(path, 0, bytes(PIECE_BYTES))
        over.set()

    writers = [threading.Thread(target=write) for _ in range(6)]
    for writer in writers:
        writer.start()
    time.sleep(0.2)
    taking = threading.Thread(target=round_weights.take, args=("lab-a", NO_REPLY, BF16, values), daemon=True)
    taking.start()
    taking.join(10)
    assert not taking.is_alive() and over.is_set()
    for writer in writers:
        writer.join(10)
    round_weights.close()


def test_refused_answers_leave_neither_files_nor_memory(store: WeightStore, tmp_path: Path) -> None:
    """Nothing of a round may hang on a refusal: it would be unseen space on the disk, for as long as the process lives."""
    grid = Answering()
    exchange, events = Messenger(cast(Grid, grid), Events(), store), Events()
    replies.request()  # Message() reads what it sets
    with FrozenObjects():
        for number in range(1, 5):
            values = replies.weights()
            payload = store.encode(values, FP32)
            asked = replies.instructions(round=number, base_hash=hash_arrays(payload))
            nodes = {"client-0": 1, "client-1": 2}
            instructed = {client: replace(asked, client=client) for client in nodes}
            found = exchange.round(
                nodes,
                instructed,
                SentWeights(values, payload, FP32, FP32),
                streams=replies.STREAMS,
                most_pending=1,
                seconds=0.3,
            )
            for answer in found:
                assert isinstance(answer.result, RefusedReply)
                events.add(answer.result.kind, answer.client, answer.result, number)
            del payload, found, answer
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
        store = WeightStore(tmp_path / "weights")
        lay(store, weights())
    assert len(list((tmp_path / "disk" / DOWN).iterdir())) == 1


def test_a_depot_that_somebody_removes_is_made_anew_for_the_next_round(
    store: WeightStore, port: int, tmp_path: Path
) -> None:
    round_weights, first = lay(store, weights())
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(WireError, match="no room for its answer, or it was changed here"):
        round_weights.take("lab-a", NO_REPLY, BF16, weights())
    round_weights.drop("lab-a")
    round_weights.close()
    round_weights, second = lay(store, weights())
    assert second.ticket != first.ticket and (tmp_path / "weights" / DOWN / second.ticket).exists()
    for folder in (tmp_path / "weights", tmp_path / "weights" / DOWN, tmp_path / "weights" / UP):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.truncate(tmp_path / "weights" / UP / second.answer, 10)
    with pytest.raises(WireError, match="no room for its answer, or it was changed here"):
        round_weights.take("lab-a", NO_REPLY, BF16, weights())
    round_weights.close()


def test_a_depot_on_a_disk_that_is_not_mounted_is_named_and_used_again_when_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "weights").symlink_to(tmp_path / "disk")
    store = WeightStore(tmp_path / "weights")
    lay(store, weights())
    (tmp_path / "disk").rename(tmp_path / "away")
    for again in (lambda: store.encode(replies.weights(), FP32), lambda: WeightStore(tmp_path / "weights")):
        with pytest.raises(NanofedError, match=r"a link to .*disk, which is not there: is its disk mounted\?"):
            again()
    (tmp_path / "away").rename(tmp_path / "disk")
    lay(store, weights())


def test_weights_pass_the_perimeter_of_sites_that_it_knows_only(store: WeightStore, tmp_path: Path) -> None:
    keys = init(tmp_path / "keys", ["127.0.0.1"], ["lab-a"])
    strangers = init(tmp_path / "strangers", ["127.0.0.1"], ["lab-a"])
    values, answer = weights(), BF16.encode(weights(1))
    round_weights, stored = lay(store, values)
    with Running(tmp_path, keys, WeightsServer(behind, tmp_path / "weights")) as perimeter:
        server = f"127.0.0.1:{perimeter.port}"
        for weights_client, reason in (
            (
                WeightsClient(server, keys.ca, strangers.private_key("lab-a")),
                "the operator has not registered this key",
            ),
            (WeightsClient(server, keys.ca), "no SuperNode's signature"),
        ):
            with pytest.raises(WeightsError, match=reason):
                weights_client.fetch(stored, until(stored))
            with pytest.raises(WeightsError, match=reason):
                weights_client.deliver(stored, answer, until(stored))
        weights_client = WeightsClient(server, keys.ca, keys.private_key("lab-a"))
        for there, here in zip(weights_client.fetch(stored, until(stored)), BF16.encode(values), strict=True):
            np.testing.assert_array_equal(there, here)
        weights_client.deliver(stored, answer, until(stored))
        for there, here in zip(round_weights.take("lab-a", NO_REPLY, BF16, values), answer, strict=True):
            np.testing.assert_array_equal(there, here)
        perimeter.settled()
        site = perimeter.figures()["sites"]["lab-a"]
        assert site["bytes_up"] == site["bytes_down"] == stored.answer_bytes
    round_weights.close()


def test_a_fetch_that_breaks_off_says_why(store: WeightStore, port: int) -> None:
    round_weights, stored = lay(store, weights(), seconds=1.05)
    link = Link(port)
    link.bytes_per_second = 2e6  # in the middle of a piece, with no time for another try
    breaker = threading.Timer(1.0, link.close)
    breaker.start()
    with pytest.raises(WeightsError, match=r"did not pass to or from 127\.0\.0\.1"):
        WeightsClient(f"127.0.0.1:{link.port}").fetch(stored, until(stored))
    breaker.join()
    round_weights.close()


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
