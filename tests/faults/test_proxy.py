"""A real SuperLink with TLS and node authentication behind the proxy: who is let in, what is attempted, and that it goes on."""

from __future__ import annotations

import contextlib
import datetime
import re
import socket
import ssl
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node

from nanofed.federated.deploy.keys import Keys, init
from tests.faults.perimeter import HOST, Flower, Perimeter, Site, free_port, head, read_reply, wait_until

pytestmark = pytest.mark.slow
# Order of P-384 (SEC 2, 2.5.1): with (r, s), (r, n - s) is a signature too.
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return init(
        tmp_path_factory.mktemp("federation") / "keys", ["fed.example.org"], ["lab-a", "lab-b", "not-registered"]
    )


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return init(tmp_path_factory.mktemp("strangers") / "keys", ["fed.example.org"], ["lab-a"])


@pytest.fixture(scope="module")
def flower(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    with Flower(tmp_path_factory.mktemp("flower"), keys).running() as flower:
        yield flower


@pytest.fixture(scope="module")
def proxy(flower: Flower, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Perimeter]:
    with Perimeter(tmp_path_factory.mktemp("proxy"), keys, flower.port).running() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def node(flower: Flower) -> int:
    """The node of lab-b."""
    return flower.register("lab-b")


@pytest.fixture
def serving(proxy: Perimeter, keys: Keys, node: int) -> Iterator[None]:
    """After the test the SuperLink still answers lab-b through the proxy."""
    yield
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    reply = proxy.send(Site(keys, "lab-b").request("pull-messages", body))
    assert reply.status == 200, reply
    PullMessagesResponse.FromString(reply.body)


def test_a_registered_supernode_comes_online_and_leaves(flower: Flower, proxy: Perimeter, keys: Keys) -> None:
    node = flower.register("lab-a")
    before = proxy.settled()
    process = flower.start(*supernode(keys, "lab-a", proxy))
    try:
        wait_until(lambda: flower.nodes()[node] == "online", 60, f"lab-a is online ({flower.log})")
    finally:
        process.terminate()
        assert process.wait(30) == 0
    wait_until(lambda: flower.nodes()[node] == "offline", 60, "lab-a is offline")
    assert proxy.settled() == before
    figures = proxy.figures()
    assert figures["sites"]["lab-a"]["requests"] >= 4
    assert {"activate-node", "send-node-heartbeat", "pull-messages", "deactivate-node"} <= set(figures["passed"])


def supernode(keys: Keys, site: str, proxy: Perimeter) -> list[str]:
    return [
        "flower-supernode",
        "--superlink",
        f"{HOST}:{proxy.port}",
        "--root-certificates",
        str(proxy.keys.ca),
        "--auth-supernode-private-key",
        str(keys.private_key(site)),
        "--port",
        str(free_port()),
        "--max-retries",
        "1",
    ]


def test_a_supernode_with_an_unknown_key_is_refused(
    flower: Flower, proxy: Perimeter, strangers: Keys, serving: None
) -> None:
    before = flower.nodes()
    with proxy.counts("unknown_key"):
        process = flower.start(*supernode(strangers, "lab-a", proxy))
        process.wait(60)  # with exit code 0: Flower's client takes a 401 for its operator's Ctrl-C
    assert set(flower.nodes()) == set(before)


def test_a_key_that_only_the_proxy_knows_is_refused_by_flower(
    proxy: Perimeter, keys: Keys, node: int, serving: None
) -> None:
    before = proxy.settled()
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()  # as another's node, too
    assert proxy.send(Site(keys, "not-registered").request("pull-messages", body)).status == 401
    assert proxy.settled() == before


def test_another_site_s_messages_are_refused_by_flower(proxy: Perimeter, keys: Keys, node: int, serving: None) -> None:
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    assert proxy.send(Site(keys, "lab-a").request("pull-messages", body)).status == 401


LIST_RUNS = ListRunsRequest().SerializeToString()
OTHER_CALLS = {
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


@pytest.mark.parametrize(("path", "reason"), OTHER_CALLS.values(), ids=list(OTHER_CALLS))
def test_other_calls_of_a_site_are_refused(proxy: Perimeter, keys: Keys, serving: None, path: str, reason: str) -> None:
    headers = {**Site(keys, "lab-b").headers(), "content-length": str(len(LIST_RUNS))}
    with proxy.counts(reason):
        assert proxy.send(head(path, headers) + LIST_RUNS).status == 404


def test_control_calls_are_answered_on_loopback_only(flower: Flower, proxy: Perimeter, keys: Keys) -> None:
    """Without this the test above would pass against a SuperLink that has no such call."""
    trust = ssl.create_default_context(cafile=str(keys.ca))
    with (
        socket.create_connection((HOST, flower.port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname=HOST) as channel,
    ):
        channel.sendall(head("/v1/control/list-runs", {"content-length": str(len(LIST_RUNS))}) + LIST_RUNS)
        assert read_reply(channel).status == 200


GOOD = ("/v1/fleet/pull-messages", {"content-length": "0"})


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
    "folded": ("malformed", 400, b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 0\r\n", HIDDEN),
    "two lengths": ("malformed", 400, b"Content-Length: 0\r\nContent-Length: 9\r\n", HIDDEN),
    "the same length twice": ("header", 400, b"Content-Length: 0\r\nContent-Length: 0\r\n", b""),
    "a list of lengths": ("length", 411, b"Content-Length: 0, 0\r\n", b""),
    "no length": ("length", 411, b"", b""),
    "a negative length": ("malformed", 400, b"Content-Length: -1\r\n", b""),
    "a signed length": ("malformed", 400, b"Content-Length: +1\r\n", b"x"),
    "a hexadecimal length": ("malformed", 400, b"Content-Length: 0x1\r\n", b"x"),
    "an endless length": ("length", 411, b"Content-Length: " + b"9" * 20 + b"\r\n", b""),
    "line feeds": ("malformed", 400, b"flwr-x: a\nContent-Length: 0\r\n", b""),
    "a line feed in a value": (
        "malformed",
        400,
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
def test_what_two_parsers_may_read_differently_is_refused(
    proxy: Perimeter, keys: Keys, serving: None, reason: str, status: int, lines: bytes, rest: bytes
) -> None:
    start = head(GOOD[0], Site(keys, "lab-b").headers())[:-2]
    with proxy.counts(reason):
        assert proxy.send(start + lines + b"\r\n" + rest).status == status


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
    proxy: Perimeter, keys: Keys, serving: None, line: str, reason: str, status: int
) -> None:
    rest = head("", {**Site(keys, "lab-b").headers(), "content-length": "0"}).partition(b"\r\n")[2]
    with proxy.counts(reason):
        assert proxy.send(line.encode() + b"\r\n" + rest).status == status


def test_a_request_before_the_answer_to_the_one_before_is_refused(
    proxy: Perimeter, keys: Keys, node: int, serving: None
) -> None:
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    site = Site(keys, "lab-b")
    with proxy.counts("pipelined"):
        assert proxy.send(site.request("pull-messages", body) + site.request("pull-messages", body)).status == 400


def test_two_requests_on_one_connection_are_answered(proxy: Perimeter, keys: Keys, node: int) -> None:
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    with proxy.connection() as channel:
        for _ in range(5):
            channel.sendall(Site(keys, "lab-b").request("pull-messages", body))
            assert read_reply(channel).status == 200


def test_an_object_larger_than_the_cap_is_refused_before_it_is_sent(
    proxy: Perimeter, keys: Keys, serving: None
) -> None:
    with proxy.counts("body_too_large"):
        reply = proxy.send(Site(keys, "lab-b").request("push-object", headers={"content-length": str((32 << 20) + 1)}))
    assert reply.status == 413
    assert b"33554433 bytes is more than the 33554432" in reply.body


def test_a_replayed_signature_is_refused_in_whatever_form(
    proxy: Perimeter, keys: Keys, node: int, serving: None
) -> None:
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    site = Site(keys, "lab-b")
    seen = site.headers()
    assert proxy.send(site.request("pull-messages", body, seen)).status == 200
    with proxy.counts("replayed_signature", 4):
        assert proxy.send(site.request("pull-messages", body, seen)).status == 503  # Flower's client would sign anew
        assert proxy.send(site.request("deactivate-node", b"", seen)).status == 503
        r, s = decode_dss_signature(b64decode(seen["flwr-signature"]))
        other = {**seen, "flwr-signature": b64encode(encode_dss_signature(r, ORDER - s)).decode()}
        assert proxy.send(site.request("pull-messages", body, other)).status == 503
        padded = {**seen, "flwr-public-key": loosen(seen["flwr-public-key"])}
        assert proxy.send(site.request("pull-messages", body, padded)).status == 503


def loosen(text: str) -> str:
    """Return another base64 text of the same bytes, where there is one: its last letter has bits that do not count."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    bare = text.rstrip("=")
    if bare == text:
        return text
    other = bare[:-1] + letters[letters.index(bare[-1]) + 1] + text[len(bare) :]
    assert b64decode(other, validate=True) == b64decode(text)
    return other


def test_flower_alone_takes_a_signature_twice(flower: Flower, keys: Keys, node: int) -> None:
    """Why the proxy counts them: this fails when Flower learns to."""
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    seen = Site(keys, "lab-b").request("pull-messages", body)
    trust = ssl.create_default_context(cafile=str(keys.ca))
    with (
        socket.create_connection((HOST, flower.port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname=HOST) as channel,
    ):
        for _ in range(2):
            channel.sendall(seen)
            assert read_reply(channel).status == 200


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
    proxy: Perimeter, keys: Keys, serving: None, change: dict[str, str], reason: str, status: int
) -> None:
    with proxy.counts(reason):
        raw = Site(keys, "lab-b").request("pull-messages", headers=change)
        assert proxy.send(raw).status == status


def test_a_request_without_signature_is_refused(proxy: Perimeter, serving: None) -> None:
    with proxy.counts("unsigned"):
        assert proxy.send(head(*GOOD)).status == 401


@pytest.mark.parametrize(
    ("seconds", "reason", "status", "says"),
    [
        (-400, "stale_signature", 401, rb"lab-b signed this 4\d\d seconds ago: set its clock"),
        (60, "stale_signature", 401, rb"lab-b signed this \d\d seconds ahead: set its clock"),
        (-250, "early_signature", 503, rb"before this proxy began: sign anew"),
    ],
    ids=["old", "of the future", "from before the proxy"],
)
def test_the_time_of_a_signature_counts(
    proxy: Perimeter, keys: Keys, serving: None, seconds: int, reason: str, status: int, says: bytes
) -> None:
    site = Site(keys, "lab-b")
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    with proxy.counts(reason):
        reply = proxy.send(site.request("pull-messages", headers=site.headers(at)))
    assert reply.status == status
    assert re.search(says, reply.body), reply.body


def test_a_stranger_s_key_is_refused(proxy: Perimeter, strangers: Keys, serving: None) -> None:
    with proxy.counts("unknown_key"):
        assert proxy.send(Site(strangers, "lab-a").request("pull-messages")).status == 401


def test_plain_http_is_refused(proxy: Perimeter, keys: Keys, serving: None) -> None:
    with proxy.counts("plain_http"), socket.create_connection((HOST, proxy.port), timeout=10) as plain:
        plain.sendall(Site(keys, "lab-b").request("pull-messages"))
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"HTTP")


def test_rubbish_instead_of_tls_is_refused(proxy: Perimeter, serving: None) -> None:
    with proxy.counts("handshake"), socket.create_connection((HOST, proxy.port), timeout=10) as plain:
        plain.sendall(b"\x16\x03\x01\xff\xff" + b"\0" * 100)
        with contextlib.suppress(ConnectionResetError):
            plain.recv(100)


def test_old_tls_is_refused(proxy: Perimeter, serving: None) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(proxy.keys.ca)
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        proxy.counts("handshake"),
        socket.create_connection((HOST, proxy.port), timeout=10) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol|alert"),
    ):
        old.wrap_socket(plain, server_hostname="localhost")


def test_a_client_that_trusts_another_authority_does_not_connect(
    proxy: Perimeter, strangers: Keys, serving: None
) -> None:
    other = ssl.create_default_context(cafile=str(strangers.ca))
    with (
        proxy.counts("handshake"),
        socket.create_connection((HOST, proxy.port), timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"),
    ):
        other.wrap_socket(plain, server_hostname="localhost")


def test_an_ended_certificate_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    monkeypatch.setattr("nanofed.federated.deploy.keys._now", lambda: past)
    keys = init(tmp_path / "keys", [], ["lab-a"])
    command = Perimeter(tmp_path, keys, 1).options.command()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(r"the certificate .*server\.pem ended 35 days ago \(.*\): issue a new one with --force", line)


def test_the_proxy_starts_without_torch_and_flower() -> None:
    code = (
        "import sys, nanofed.federated.deploy.proxy.__main__; "
        "assert not {'torch', 'lightning', 'flwr', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
