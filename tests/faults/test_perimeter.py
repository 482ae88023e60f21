"""What a perimeter lets in and what it refuses, with a recorder behind it; and at the end a real SuperLink and SuperNode."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import ssl
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy.keys import Keys, init
from nanofed.federated.deploy.perimeter import Perimeter
from nanofed.federated.deploy.process import SupervisedProcess
from nanofed.federated.deploy.registration import read_nodes
from nanofed.federated.deploy.superlink import LINK, NODES, SuperLink
from nanofed.federated.flower import flower_environment
from tests.faults.perimeter import HOST, Client, Recorder, Running, Site, free_port, head, read_reply, wait_until

# Order of P-384 (SEC 2, 2.5.1): with (r, s), (r, n - s) is a signature too.
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return init(tmp_path_factory.mktemp("federation") / "keys", ["fed.example.org"], ["lab-a", "lab-b"])


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return init(tmp_path_factory.mktemp("strangers") / "keys", ["fed.example.org"], ["lab-a"])


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def client(recorder: Recorder, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Running(tmp_path_factory.mktemp("perimeter"), keys, recorder) as client:
        yield client


@pytest.fixture
def nothing_passes(client: Client, keys: Keys, recorder: Recorder) -> Iterator[None]:
    """Nothing of the test reaches what is behind; a site is still served after it."""
    before = len(recorder.requests)
    yield
    assert len(recorder.requests) == before
    assert client.send(Site(keys, "lab-b").request("pull-messages")).status == 200


PATH = "/v1/fleet/pull-messages"
PATHS = {  # all are signed
    # name: path, reason
    "control": ("/v1/control/list-runs", "control_call"),
    "control, a run started": ("/v1/control/start-run", "control_call"),
    "control, a node registered": ("/v1/control/register-node", "control_call"),
    "runtime": ("/v1/runtime/get-nodes", "runtime_call"),
    "runtime, weights": ("/v1/runtime/pull-object", "runtime_call"),
    "registering oneself": ("/v1/fleet/register-node", "registration"),
    "unregistering": ("/v1/fleet/unregister-node", "registration"),
    "documentation": ("/docs", "other_path"),
    "health": ("/health", "other_path"),
    "root": ("/", "other_path"),
    "two slashes": ("//v1/fleet/pull-messages", "other_path"),
    "a slash behind": ("/v1/fleet/pull-messages/", "other_path"),
    "dots": ("/v1/fleet/../control/list-runs", "control_call"),
    "dots behind a call": ("/v1/fleet/pull-messages/../../control/list-runs", "control_call"),
    "escaped dots": ("/v1/fleet/%2e%2e/control/list-runs", "control_call"),
    "escaped slash": ("/v1/fleet%2fpull-messages", "other_path"),
    "escaped letter": ("/v1/fleet/pull-message%73", "other_path"),
    "backslash": ("/v1/fleet\\..\\control\\list-runs", "control_call"),
    "capitals": ("/V1/FLEET/PULL-MESSAGES", "other_path"),
    "query": ("/v1/fleet/pull-messages?x=/v1/control", "control_call"),
    "parameter": ("/v1/fleet/pull-messages;x", "other_path"),
    "fragment": ("/v1/fleet/pull-messages#x", "other_path"),
    "absolute": ("https://127.0.0.1/v1/control/list-runs", "control_call"),
    "absolute, to a call": ("https://127.0.0.1/v1/fleet/pull-messages", "other_path"),
    "star": ("*", "other_path"),
}


@pytest.mark.parametrize(("path", "reason"), PATHS.values(), ids=list(PATHS))
def test_other_calls_of_a_site_are_refused(
    client: Client, keys: Keys, nothing_passes: None, path: str, reason: str
) -> None:
    with client.counts(reason):
        assert client.send(head(path, {**Site(keys, "lab-b").headers(), "content-length": "4"}) + b"body").status == 404


HIDDEN = head("/v1/control/list-runs", {"content-length": "0"})
SMUGGLED: dict[str, tuple[str, int, bytes, bytes]] = {
    # name: reason, status, lines after the signature, what follows the head
    "chunked": ("chunked", 411, b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "chunked with a length": (
        "chunked",
        411,
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"0\r\n\r\n" + HIDDEN,
    ),
    "a length with chunked": (
        "chunked",
        411,
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"0\r\n\r\n" + HIDDEN,
    ),
    "identity": ("malformed", 400, b"Transfer-Encoding: identity\r\nContent-Length: 0\r\n", HIDDEN),
    "another coding": ("malformed", 400, b"Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n", HIDDEN),
    "space before the colon": ("malformed", 400, b"Transfer-Encoding : chunked\r\nContent-Length: 0\r\n", HIDDEN),
    "folded": ("chunked", 411, b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 0\r\n", HIDDEN),
    "two lengths": ("malformed", 400, b"Content-Length: 0\r\nContent-Length: 9\r\n", HIDDEN),
    "no length": ("length", 411, b"", b""),
    "a negative length": ("malformed", 400, b"Content-Length: -1\r\n", b""),
    "a signed length": ("malformed", 400, b"Content-Length: +1\r\n", b"x"),
    "a hexadecimal length": ("malformed", 400, b"Content-Length: 0x1\r\n", b"x"),
    "an endless length": ("length", 411, b"Content-Length: " + b"9" * 20 + b"\r\n", b""),
    "a line feed in a value": (
        "chunked",
        411,
        b"Content-Length: 0\r\nflwr-x: a\nTransfer-Encoding: chunked\r\n",
        HIDDEN,
    ),
    "a bare return": ("malformed", 400, b"Content-Length: 0\r\nflwr-x: a\rTransfer-Encoding: chunked\r\n", HIDDEN),
    "a zero byte": ("malformed", 400, b"Content-Length: 0\r\nflwr-x: a\0b\r\n", b""),
    "no colon": ("malformed", 400, b"Content-Length: 0\r\nrubbish\r\n", b""),
    "a second key": ("header", 400, b"Content-Length: 0\r\nflwr-public-key: AAAA\r\n", b""),
    "a second type": ("header", 400, b"Content-Length: 0\r\nContent-Type: text/plain\r\n", b""),
    "upgrade to a websocket": (
        "header",
        400,
        b"Content-Length: 0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n",
        b"",
    ),
    "upgrade to HTTP/2": ("header", 400, b"Content-Length: 0\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\n", b""),
    "expect": ("header", 400, b"Content-Length: 4\r\nExpect: 100-continue\r\n", b""),
    "trailers": ("header", 400, b"Content-Length: 0\r\nTE: trailers\r\nTrailer: x\r\n", b""),
    "a packed body": ("header", 400, b"Content-Length: 0\r\nContent-Encoding: gzip\r\n", b""),
    "a head without end": ("head_too_large", 431, b"flwr-x: " + b"a" * (17 << 10), b""),
    "many headers": ("head_too_large", 431, b"".join(b"x-%d: a\r\n" % n for n in range(3000)), b""),
    "too large an object": ("body_too_large", 413, b"Content-Length: 4194305\r\n", b"x" * 4096),
}


@pytest.mark.parametrize(("reason", "status", "lines", "rest"), SMUGGLED.values(), ids=list(SMUGGLED))
def test_what_may_be_read_in_two_ways_is_refused(
    client: Client, keys: Keys, nothing_passes: None, reason: str, status: int, lines: bytes, rest: bytes
) -> None:
    with client.counts(reason):
        assert client.send(head(PATH, Site(keys, "lab-b").headers())[:-2] + lines + b"\r\n" + rest).status == status


FIRST_LINES = {
    "HTTP/1.0": ("POST /v1/fleet/pull-messages HTTP/1.0", "http_version", 505),
    "HTTP/2": ("PRI * HTTP/2.0", "http_version", 505),
    "HTTP/0.9": ("POST /v1/fleet/pull-messages", "malformed", 400),
    "GET": ("GET /v1/fleet/pull-messages HTTP/1.1", "method", 405),
    "an invented method": ("POSTER /v1/fleet/pull-messages HTTP/1.1", "method", 405),
    "CONNECT": ("CONNECT 127.0.0.1:22 HTTP/1.1", "other_path", 404),
    "OPTIONS": ("OPTIONS * HTTP/1.1", "other_path", 404),
    "two spaces": ("POST  /v1/fleet/pull-messages HTTP/1.1", "malformed", 400),
    "a space in the path": ("POST /v1/fleet/pull-messages x HTTP/1.1", "malformed", 400),
    "an empty line": ("", "malformed", 400),
}


@pytest.mark.parametrize(("line", "reason", "status"), FIRST_LINES.values(), ids=list(FIRST_LINES))
def test_other_first_lines_are_refused(
    client: Client, keys: Keys, nothing_passes: None, line: str, reason: str, status: int
) -> None:
    rest = head("", {**Site(keys, "lab-b").headers(), "content-length": "0"}).partition(b"\r\n")[2]
    with client.counts(reason):
        assert client.send(line.encode() + b"\r\n" + rest).status == status


def test_requests_on_one_connection_are_answered_one_by_one(client: Client, keys: Keys) -> None:
    site = Site(keys, "lab-b")
    with client.connection() as channel:
        for _ in range(5):
            channel.sendall(site.request("pull-messages"))
            assert read_reply(channel).status == 200


def test_a_request_behind_another_is_checked_like_any(client: Client, keys: Keys, recorder: Recorder) -> None:
    before = len(recorder.requests)
    with client.counts("control_call"), client.connection() as channel:
        channel.sendall(Site(keys, "lab-b").request("pull-messages") + HIDDEN)
        assert [read_reply(channel).status for _ in range(2)] == [200, 404]
    assert len(recorder.requests) == before + 1


def test_an_object_larger_than_the_cap_is_refused_before_it_is_sent(
    client: Client, keys: Keys, nothing_passes: None
) -> None:
    with client.counts("body_too_large"):
        reply = client.send(Site(keys, "lab-b").request("push-object", headers={"content-length": str((32 << 20) + 1)}))
    assert reply.status == 413
    assert b"33554433 bytes is more than the 33554432" in reply.body


def test_what_is_behind_sees_known_headers_only(client: Client, keys: Keys, recorder: Recorder) -> None:
    extra = {
        "x-forwarded-for": "127.0.0.1",
        "cookie": "a=b",
        "authorization": "Bearer x",
        "FLWR-Package-Version": "1.41.0",
        "connection": "keep-alive, flwr-signature",
    }
    assert client.send(Site(keys, "lab-a").request("push-object", b"body", extra)).status == 200
    path, headers, body = recorder.requests[-1]
    signature = {"flwr-public-key", "flwr-timestamp", "flwr-signature"}
    assert headers.keys() == {"content-type", "content-length", "flwr-package-version"} | signature
    assert (path, body) == ("/v1/fleet/push-object", b"body")


def test_a_replayed_signature_is_refused_in_whatever_form(client: Client, keys: Keys, recorder: Recorder) -> None:
    site, before = Site(keys, "lab-b"), len(recorder.requests)
    seen = site.headers()
    assert client.send(site.request("pull-messages", b"", seen)).status == 200
    r, s = decode_dss_signature(b64decode(seen["flwr-signature"]))
    other = {**seen, "flwr-signature": b64encode(encode_dss_signature(r, ORDER - s)).decode()}
    padded = {**seen, "flwr-public-key": loosen(seen["flwr-public-key"])}
    calls = [("pull-messages", seen), ("deactivate-node", seen), ("pull-messages", other), ("pull-messages", padded)]
    with client.counts("replayed_signature", len(calls)):
        for call, headers in calls:
            assert client.send(site.request(call, b"", headers)).status == 503  # Flower's client would sign anew
    assert len(recorder.requests) == before + 1


def loosen(text: str) -> str:
    """Return another base64 text of the same bytes, where there is one: its last letter has bits that do not count."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    bare = text.rstrip("=")
    if bare == text:
        return text
    other = bare[:-1] + letters[letters.index(bare[-1]) + 1] + text[len(bare) :]
    assert b64decode(other, validate=True) == b64decode(text)
    return other


@pytest.mark.parametrize(
    ("change", "reason", "status"),
    [
        ({"flwr-signature": b64encode(b"rubbish").decode()}, "bad_signature", 401),
        ({"flwr-signature": "?"}, "unsigned", 401),
        ({"flwr-signature": "\u00e9"}, "unsigned", 401),
        ({"flwr-public-key": ""}, "unknown_key", 401),
        ({"flwr-timestamp": "yesterday"}, "unsigned", 401),
        ({"flwr-timestamp": "2026-01-01T00:00:00"}, "unsigned", 401),
        ({"flwr-timestamp": "2026-01-01T00:00:00+00:00"}, "bad_signature", 401),
    ],
    ids=["rubbish", "no base64", "no ascii", "no key", "no time", "no zone", "another time"],
)
def test_what_is_not_signed_is_refused(
    client: Client, keys: Keys, nothing_passes: None, change: dict[str, str], reason: str, status: int
) -> None:
    with client.counts(reason):
        assert client.send(Site(keys, "lab-b").request("pull-messages", headers=change)).status == status


def test_a_request_without_signature_is_refused(client: Client, nothing_passes: None) -> None:
    with client.counts("unsigned"):
        assert client.send(head(PATH, {"content-length": "0"})).status == 401


@pytest.mark.parametrize(
    ("seconds", "reason", "status", "says"),
    [
        (-400, "stale_signature", 401, rb"lab-b signed this 4\d\d seconds ago: set its clock"),
        (60, "stale_signature", 401, rb"lab-b signed this \d\d seconds ahead: set its clock"),
        (-250, "early_signature", 503, rb"before this server began: sign anew"),
    ],
    ids=["old", "of the future", "from before the perimeter"],
)
def test_the_time_of_a_signature_counts(
    client: Client, keys: Keys, nothing_passes: None, seconds: int, reason: str, status: int, says: bytes
) -> None:
    site = Site(keys, "lab-b")
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    with client.counts(reason):
        reply = client.send(site.request("pull-messages", headers=site.headers(at)))
    assert reply.status == status
    assert re.search(says, reply.body), reply.body


def test_a_stranger_s_key_is_refused(client: Client, strangers: Keys, nothing_passes: None) -> None:
    with client.counts("unknown_key"):
        assert client.send(Site(strangers, "lab-a").request("pull-messages")).status == 401


@pytest.mark.parametrize(
    "sent",
    [head(PATH, {"content-length": "0"}), b"\x16\x03\x01\xff\xff" + b"\0" * 100],
    ids=["plain HTTP", "rubbish"],
)
def test_what_is_no_tls_is_refused(client: Client, nothing_passes: None, sent: bytes) -> None:
    with socket.create_connection((HOST, client.port), timeout=10) as plain:
        plain.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"HTTP")


def test_old_tls_is_refused(client: Client, nothing_passes: None) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(client.keys.ca)
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((HOST, client.port), timeout=10) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol|alert"),
    ):
        old.wrap_socket(plain, server_hostname="localhost")


def test_a_client_that_trusts_another_authority_does_not_connect(
    client: Client, strangers: Keys, nothing_passes: None
) -> None:
    other = ssl.create_default_context(cafile=str(strangers.ca))
    with (
        socket.create_connection((HOST, client.port), timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"),
    ):
        other.wrap_socket(plain, server_hostname="localhost")


def test_an_ended_certificate_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    with monkeypatch.context() as then:
        then.setattr("nanofed.federated.deploy.keys._now", lambda: past)
        keys = init(tmp_path / "keys", [], ["lab-a"])
    with pytest.raises(
        ConfigError, match=r"the certificate .*server\.pem ended 35 days ago \(.*\): issue a new one with --force"
    ):
        Perimeter(Recorder(), (HOST, 0), keys, tmp_path)


def test_another_key_than_the_certificate_s_is_said_at_the_start(tmp_path: Path) -> None:
    keys = init(tmp_path / "keys", [], ["lab-a"])
    keys.key.write_bytes(keys.ca_key.read_bytes())
    with pytest.raises(ConfigError, match=r"server\.pem and .*server\.key do not go together"):
        Perimeter(Recorder(), (HOST, 0), keys, tmp_path)


def test_an_address_that_is_taken_is_said_at_the_start(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NanofedError, match=f"cannot listen on {HOST}, port {client.port}: Address already in use"):
        Perimeter(Recorder(), (HOST, client.port), client.keys, tmp_path)


class Flower:
    """A SuperLink behind a perimeter, as `nanofed server` starts it, and what it keeps."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.folder, self.keys, self.log = folder, keys, folder / "flower.log"
        self.link = SuperLink(folder, self.log)

    @contextlib.contextmanager
    def running(self) -> Iterator[Flower]:
        port = free_port()
        own = ["--folder", str(self.folder), "--keys", str(self.keys.folder), "--listen", HOST, str(port)]
        with self.link.running(own):
            self.client = Client(self.folder, self.keys, port)
            yield self

    def node(self, site: str) -> int:
        return read_nodes(self.folder / NODES)[site]

    def nodes(self) -> dict[int, str]:
        """The status of each node."""
        answer = self.link.command("supernode", "list", LINK, "--format", "json")
        return {int(node["node-id"]): node["status"] for node in json.loads(answer[answer.index("{") :])["nodes"]}

    def pull(self, site: str) -> bytes:
        """Return the request with which a site asks for its messages."""
        body = PullMessagesRequest(node=Node(node_id=self.node(site))).SerializeToString()
        return Site(self.keys, site).request("pull-messages", body)

    def loopback(self, *requests: bytes) -> list[int]:
        """Return the status of each answer on loopback, where there is neither TLS nor a perimeter."""
        with socket.create_connection((HOST, self.link.port), timeout=30) as channel:
            statuses = []
            for request in requests:
                channel.sendall(request)
                statuses.append(read_reply(channel).status)
            return statuses

    @contextlib.contextmanager
    def supernode(self, keys: Keys, site: str) -> Iterator[SupervisedProcess]:
        secure = ["--root-certificates", self.keys.ca, "--auth-supernode-private-key", keys.private_key(site)]
        address = ["--superlink", f"{HOST}:{self.client.port}", "--port", str(free_port()), "--max-retries", "1"]
        command = [str(Path(sys.executable).with_name("flower-supernode")), *map(str, [*address, *secure])]
        environment = flower_environment(self.folder / site)
        process = SupervisedProcess(f"SuperNode of {site}", command, environment, "FLWR_HOME", self.log)
        process.start()
        try:
            yield process
        finally:
            process.stop(30)


@pytest.fixture(scope="module")
def flower(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    with Flower(tmp_path_factory.mktemp("flower"), keys).running() as flower:
        yield flower


@pytest.mark.slow
def test_a_registered_supernode_comes_online_and_leaves(flower: Flower, keys: Keys) -> None:
    node, before = flower.node("lab-a"), flower.client.settled()
    with flower.supernode(keys, "lab-a"):
        wait_until(lambda: flower.nodes()[node] == "online", 120, f"lab-a is online ({flower.log})")
    wait_until(lambda: flower.nodes()[node] == "offline", 120, "lab-a is offline")
    assert flower.client.settled() == before
    figures = flower.client.figures()
    assert figures["sites"]["lab-a"]["requests"] >= 4
    assert {"activate-node", "send-node-heartbeat", "pull-messages", "deactivate-node"} <= set(figures["passed"])


@pytest.mark.slow
def test_a_supernode_with_an_unknown_key_is_refused(flower: Flower, strangers: Keys) -> None:
    before = flower.nodes()
    with flower.client.counts("unknown_key"), flower.supernode(strangers, "lab-a") as process:
        # Flower's client takes a 401 for its operator's Ctrl-C.
        wait_until(lambda: not process.running, 120, "the SuperNode has ended")
    assert set(flower.nodes()) == set(before)


@pytest.mark.slow
def test_another_site_s_messages_are_refused_by_flower(flower: Flower) -> None:
    reply = flower.client.send(flower.pull("lab-b"))
    assert reply.status == 200
    PullMessagesResponse.FromString(reply.body)
    theirs = PullMessagesRequest(node=Node(node_id=flower.node("lab-b"))).SerializeToString()
    assert flower.client.send(Site(flower.keys, "lab-a").request("pull-messages", theirs)).status == 401


@pytest.mark.slow
def test_control_calls_are_answered_on_loopback_only(flower: Flower) -> None:
    body = ListRunsRequest().SerializeToString()
    raw = (
        head("/v1/control/list-runs", {**Site(flower.keys, "lab-b").headers(), "content-length": str(len(body))}) + body
    )
    assert flower.loopback(raw) == [200]
    with flower.client.counts("control_call"):
        assert flower.client.send(raw).status == 404


@pytest.mark.slow
def test_flower_alone_takes_a_signature_twice(flower: Flower) -> None:
    """Why the perimeter counts them: this fails when Flower learns to."""
    seen = flower.pull("lab-b")
    assert flower.loopback(seen, seen) == [200, 200]
