"""The proxy's caps, its life as a process, and a fuzz: behind it stands a recorder that takes all it gets at its word."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanofed.federated.deploy.keys import Keys, init
from nanofed.federated.deploy.proxy.guard import Bucket, Guard, Limits
from nanofed.federated.deploy.proxy.http import CALLS, PASSED
from tests.faults.perimeter import HOST, Perimeter, Recorder, Site, read_reply, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return init(tmp_path_factory.mktemp("federation") / "keys", ["fed.example.org"], ["lab-a"])


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


Start = Callable[..., Perimeter]
CLOSED = r"(?i)reset|eof|broken pipe"  # how a connection that is not let in ends, as it comes


@pytest.fixture
def start(keys: Keys, recorder: Recorder, tmp_path: Path) -> Iterator[Start]:
    """Start a proxy with limits of the test's own."""
    with contextlib.ExitStack() as stack:

        def start(own: Keys = keys, **limits: float) -> Perimeter:
            proxy = Perimeter(tmp_path, own, recorder.port, plain=True, limits=Limits(**limits))  # type: ignore[arg-type]
            return stack.enter_context(proxy.running())

        yield start


def served(proxy: Perimeter, keys: Keys) -> bool:
    return proxy.send(Site(keys, "lab-a").request("pull-messages")).status == 200


def from_address(proxy: Perimeter, address: str) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=10, source_address=(address, 0))


def test_a_slow_head_is_cut_off_and_others_are_served_meanwhile(start: Start, keys: Keys, recorder: Recorder) -> None:
    proxy = start(head_seconds=3.0)
    slow = Site(keys, "lab-a").request("pull-messages")
    with contextlib.ExitStack() as stack, proxy.counts("slow_head", 20):
        channels = [stack.enter_context(proxy.connection()) for _ in range(20)]
        began = time.monotonic()
        for byte in slow[:5]:
            for channel in channels:
                channel.sendall(bytes([byte]))
            assert served(proxy, keys)
            time.sleep(0.01)
        assert {read_reply(channel).status for channel in channels} == {408}
        assert time.monotonic() - began < 15
    assert len(recorder.requests) == 5


def test_a_slow_body_is_cut_off(start: Start, keys: Keys, recorder: Recorder) -> None:
    proxy = start(head_seconds=0.5, bytes_per_second=1000)
    with proxy.counts("slow_body"), proxy.connection() as channel:
        channel.sendall(Site(keys, "lab-a").request("push-object", headers={"content-length": "1000"}) + b"x" * 999)
        began = time.monotonic()
        assert read_reply(channel).status == 408
        assert 0.5 < time.monotonic() - began < 6
    assert served(proxy, keys)
    assert all(len(body) == 0 for _, body in recorder.requests[1:])


def test_silent_connections_end(start: Start, keys: Keys) -> None:
    proxy = start(head_seconds=0.5, handshake_seconds=0.5, idle_seconds=0.5)
    with proxy.counts("silent"), proxy.connection() as channel:
        assert channel.recv(1) == b""
    with proxy.counts("handshake"), from_address(proxy, HOST) as plain:
        assert plain.recv(1) == b""
    with proxy.connection() as channel:  # what has been idle after a request just ends
        channel.sendall(Site(keys, "lab-a").request("pull-messages"))
        assert read_reply(channel).status == 200
        assert channel.recv(1) == b""
    wait_until(lambda: proxy.figures()["connections"] == 0, 5, "no connection is left")


def test_a_client_that_does_not_read_is_cut_off(start: Start, keys: Keys, recorder: Recorder) -> None:
    size = 30_000_000  # more than the buffers of sockets hold
    recorder.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + bytes(size)
    proxy = start(head_seconds=0.5, bytes_per_second=1 << 30)
    with proxy.counts("slow_reader"), proxy.connection() as channel:
        channel.sendall(Site(keys, "lab-a").request("pull-object"))
        wait_until(lambda: proxy.refused("slow_reader"), 10, "who does not read is cut off")
    wait_until(lambda: proxy.figures()["connections"] == 0, 5, "no connection is left")


def test_connections_of_an_address_are_capped(start: Start, keys: Keys) -> None:
    proxy = start(address_connections=4)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            asked(stack.enter_context(proxy.connection()), keys)
        with proxy.counts("address_connections", 3):
            for _ in range(3):
                with pytest.raises(OSError, match=CLOSED), proxy.connection():
                    pass
        with from_address(proxy, "127.0.0.2") as plain:  # another address is not concerned
            proxy.trust.wrap_socket(plain, server_hostname="localhost").close()
    wait_until(lambda: served(proxy, keys), 5, "served again")


def test_half_of_the_connections_are_kept_for_addresses_of_sites(start: Start, keys: Keys) -> None:
    proxy = start(connections=8)
    assert served(proxy, keys)  # from 127.0.0.1
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            asked(stack.enter_context(proxy.connection()), keys)
        with (
            proxy.counts("connections"),
            from_address(proxy, "127.0.2.1") as plain,
            pytest.raises(OSError, match=CLOSED),
        ):
            proxy.trust.wrap_socket(plain, server_hostname="localhost")
        assert served(proxy, keys)
        assert proxy.figures()["refused_by_address"] == {"127.0.2.1": {"connections": 1}}


def asked(channel: ssl.SSLSocket, keys: Keys) -> None:
    """Make a connection one on which a site has asked for something."""
    channel.sendall(Site(keys, "lab-a").request("pull-messages"))
    assert read_reply(channel).status == 200


def test_silent_strangers_do_not_lock_out_a_site_that_has_not_called_yet(start: Start, keys: Keys) -> None:
    proxy = start(connections=8, address_connections=4)
    with contextlib.ExitStack() as stack:
        silent = []
        for n in range(4):
            plain = stack.enter_context(from_address(proxy, f"127.0.1.{n % 2 + 1}"))
            silent.append(stack.enter_context(proxy.trust.wrap_socket(plain, server_hostname="localhost")))
        with proxy.counts("silent"):
            assert served(proxy, keys)  # from another address
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""  # the oldest one went
        for channel in silent[1:]:
            channel.settimeout(0.1)
            with pytest.raises(TimeoutError):
                channel.recv(1)


def test_a_site_s_address_is_known_after_a_restart_until_its_key_is_taken_away(tmp_path: Path) -> None:
    file, limits = tmp_path / "known.json", Limits(connections=8)

    def is_let_in(guard: Guard) -> bool:
        """Whether it gets one of the connections that are kept for addresses of sites."""
        for n in range(4):
            guard.enter(f"10.0.1.{n}")
        return guard.enter("10.0.0.1") is not None

    first = Guard(limits, file)
    visitor = first.enter("10.0.0.1")
    assert visitor is not None
    first.know(visitor, "lab-a")
    first.keep_known()
    assert is_let_in(Guard(limits, file))
    for n in range(100):  # another site, which calls from everywhere, makes no difference
        elsewhere = Guard._visitor(first, f"10.1.0.{n}")
        first.know(elsewhere, "lab-b")
    first.keep_known()
    assert is_let_in(Guard(limits, file)) and file.stat().st_size < 2000
    first.forget_site("lab-a")
    first.keep_known()
    assert not is_let_in(Guard(limits, file))
    for content in ("", "{", "[]", '{"lab-a": 1}', '{"lab-a": {"10.0.0.1": "x"}}'):
        file.write_text(content)
        assert not is_let_in(Guard(limits, file))


def test_a_site_s_bodies_under_way_are_bounded(start: Start, tmp_path: Path) -> None:
    keys = init(tmp_path / "own", [], ["lab-a", "lab-b"])
    proxy = start(keys, site_bytes=1000)
    with proxy.connection() as busy:
        busy.sendall(Site(keys, "lab-a").request("push-messages", bytes(900))[:-100])
        wait_until(lambda: proxy.figures()["connections"], 5, "the first is there")
        with proxy.counts("site_bytes"):
            reply = proxy.send(Site(keys, "lab-a").request("push-messages", bytes(200)))
        assert reply.status == 503
        assert proxy.send(Site(keys, "lab-b").request("push-messages", bytes(900))).status == 200
        busy.sendall(bytes(100))
        assert read_reply(busy).status == 200
    assert served(proxy, keys)


def test_requests_over_the_rate_wait_and_then_are_refused(start: Start, keys: Keys, recorder: Recorder) -> None:
    proxy = start(requests=4.0, request_burst=4)
    began = time.monotonic()
    for _ in range(8):
        assert served(proxy, keys)
    assert time.monotonic() - began > 0.9  # four at once, four at four a second
    before, statuses = len(recorder.requests), []
    threads = [threading.Thread(target=lambda: statuses.append(served(proxy, keys))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = proxy.settled()
    assert refused == {"request_rate": statuses.count(False)}
    assert 3 <= statuses.count(True) < 9
    assert len(recorder.requests) - before == statuses.count(True)
    time.sleep(1.2)
    assert served(proxy, keys)


def test_handshakes_over_the_rate_are_refused(start: Start, keys: Keys) -> None:
    proxy = start(handshakes=2.0, handshake_burst=5)
    done = 0
    for _ in range(8):
        done += served(proxy, keys)
    assert 5 <= done < 8
    assert proxy.settled() == {"handshake_rate": 8 - done}
    wait_until(lambda: proxy.figures()["connections"] == 0, 5, "no connection is left")
    time.sleep(0.6)
    assert served(proxy, keys)


def test_what_arrives_behind_is_written_anew(start: Start, keys: Keys, recorder: Recorder) -> None:
    proxy = start()
    extra = {
        "host": "evil.example.org/v1/control/list-runs?",
        "x-forwarded-for": "127.0.0.1",
        "cookie": "a=b",
        "authorization": "Bearer x",
        "FLWR-Package-Version": "1.41.0",
        "connection": "keep-alive, flwr-signature",
    }
    assert proxy.send(Site(keys, "lab-a").request("push-object", b"body", extra)).status == 200
    ((top, body),) = recorder.requests
    lines = top.decode().split("\r\n")
    assert lines[0] == "POST /v1/fleet/push-object HTTP/1.1"
    names = [line.partition(":")[0].lower() for line in lines[1:-1]]
    assert sorted(names) == sorted(
        [
            "host",
            "content-type",
            "content-length",
            "flwr-public-key",
            "flwr-timestamp",
            "flwr-signature",
            "flwr-package-version",
        ]
    )
    assert f"host: {HOST}:{recorder.port}".lower() in top.decode().lower()
    assert body == b"body"


def test_a_body_passes_as_it_is_both_ways(start: Start, keys: Keys, recorder: Recorder) -> None:
    proxy = start()
    up, down = random.Random(1).randbytes(7_000_001), random.Random(2).randbytes(9_000_001)
    recorder.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(down) + down
    reply = proxy.send(Site(keys, "lab-a").request("push-object", up))
    assert reply.body == down
    assert recorder.requests[0][1] == up
    proxy.settled()
    site = proxy.figures()["sites"]["lab-a"]
    assert (site["requests"], site["bytes_up"], site["bytes_down"]) == (1, len(up), len(down))


@pytest.mark.parametrize(
    "answer",
    [
        b"rubbish\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 20000,
    ],
    ids=["no HTTP", "chunked", "no length", "two lengths", "long"],
)
def test_an_answer_that_is_none_is_the_superlink_s_fault(
    start: Start, keys: Keys, recorder: Recorder, answer: bytes
) -> None:
    proxy, good = start(), recorder.answer
    recorder.answer = answer
    with proxy.counts("upstream"):
        assert proxy.send(Site(keys, "lab-a").request("pull-messages")).status == 502
    recorder.answer = good
    assert served(proxy, keys)


def test_a_superlink_that_is_gone_is_said_and_may_come_back(keys: Keys, tmp_path: Path) -> None:
    recorder = Recorder()
    with Perimeter(tmp_path, keys, recorder.port, plain=True).running() as proxy:
        assert served(proxy, keys)
        recorder.close()
        with proxy.counts("upstream", 2):
            for _ in range(2):
                assert proxy.send(Site(keys, "lab-a").request("pull-messages")).status == 502
        with contextlib.closing(Recorder(recorder.port)):
            assert served(proxy, keys)


def test_a_superlink_that_does_not_answer_is_given_up(start: Start, keys: Keys, recorder: Recorder) -> None:
    recorder.wait = 3
    proxy = start(answer_seconds=0.5)
    with proxy.counts("upstream"):
        assert proxy.send(Site(keys, "lab-a").request("pull-messages")).status == 502


def test_keys_are_read_again(start: Start, tmp_path: Path) -> None:
    own = init(tmp_path / "own", [], ["lab-a", "lab-b"])
    proxy = start(own)
    assert served(proxy, own)
    away, first = own.public_key("lab-a").read_bytes(), certificate(proxy)
    own.public_key("lab-a").unlink()
    wait_until(lambda: proxy.send(Site(own, "lab-a").request("pull-messages")).status == 401, 5, "lab-a is shut out")
    own.public_key("lab-a").write_text("rubbish")  # said, and passed over
    wait_until(lambda: "lab-a.pub cannot be read" in proxy.log.read_text(), 5, "rubbish is said")
    assert proxy.send(Site(own, "lab-b").request("pull-messages")).status == 200
    other = own.public_key("lab-b").read_bytes()
    own.public_key("lab-b").unlink()  # rubbish beside it keeps no other in
    wait_until(lambda: proxy.send(Site(own, "lab-b").request("pull-messages")).status == 401, 5, "lab-b is shut out")
    own.public_key("lab-b").write_bytes(other)
    own.public_key("lab-a").write_bytes(away)
    wait_until(lambda: served(proxy, own), 5, "lab-a is back")
    init(own.folder, [], [], force=True)
    wait_until(lambda: certificate(proxy) != first, 5, "the new certificate is used")
    assert served(proxy, own)


def certificate(proxy: Perimeter) -> bytes | None:
    with proxy.connection() as channel:
        return channel.getpeercert(binary_form=True)


def test_requests_under_way_are_answered_before_the_end(start: Start, keys: Keys, recorder: Recorder) -> None:
    proxy = start()
    with proxy.connection() as idle, proxy.connection() as busy:
        idle.sendall(Site(keys, "lab-a").request("pull-messages"))
        assert read_reply(idle).status == 200
        recorder.wait = 2.0
        busy.sendall(Site(keys, "lab-a").request("pull-messages"))
        wait_until(lambda: len(recorder.requests) == 2, 5, "it is under way")
        proxy.process.terminate()
        assert idle.recv(1) == b""
        busy.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):  # not answered yet: who is idle did not have to wait for it
            busy.recv(1)
        busy.settimeout(10)
        assert read_reply(busy).status == 200
    assert proxy.process.wait(10) == 0


def test_an_answer_that_breaks_off_is_not_made_whole(start: Start, keys: Keys, recorder: Recorder) -> None:
    good, recorder.answer = recorder.answer, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 100
    proxy = start()
    with proxy.counts("upstream"), proxy.connection() as channel:
        channel.sendall(Site(keys, "lab-a").request("pull-object"))
        wait_until(lambda: recorder.requests, 5, "it is under way")
        time.sleep(0.2)
        recorder.hang_up()
        assert read_reply(channel).body == b"x" * 100
    recorder.answer = good
    assert served(proxy, keys)


def test_it_ends_with_its_parent(keys: Keys, recorder: Recorder, tmp_path: Path) -> None:
    proxy = Perimeter(tmp_path, keys, recorder.port, plain=True)
    code = (
        "import subprocess, sys, os, time; "
        "child = subprocess.Popen([*sys.argv[1:], '--parent', str(os.getpid())], start_new_session=True); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, *proxy.options.command()], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(proxy.status.exists, 20, "it starts")
        assert served(proxy, keys)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: ended(child), 10, "it ends")


def ended(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--listen": "nowhere"}, "'nowhere' is no address"),
        ({"--listen": "127.0.0.1:{taken}"}, "cannot listen on 127.0.0.1, port {taken}: Address already in use"),
        ({"--certificate": "/nowhere"}, "/nowhere cannot be read as a certificate"),
        ({"--key": "{ca_key}"}, "do not go together"),
    ],
    ids=["no address", "taken", "no certificate", "another key"],
)
def test_a_wrong_option_is_one_line(
    keys: Keys, recorder: Recorder, tmp_path: Path, change: dict[str, str], says: str
) -> None:
    words = {"taken": recorder.port, "ca_key": keys.ca_key}
    command = Perimeter(tmp_path, keys, recorder.port, plain=True).options.command()
    for option, value in change.items():
        command[command.index(option) + 1] = value.format(**words)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert says.format(**words) in line


def test_a_bucket_gives_what_its_rate_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bucket = Bucket(rate=2.0, burst=3)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, None]
    assert bucket.take(patience=1.0) == pytest.approx(0.5)
    assert bucket.take(patience=1.0) == pytest.approx(1.0)
    assert bucket.take(patience=1.0) is None
    now[0] += 1000
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, None]


def test_addresses_without_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("nanofed.federated.deploy.proxy.guard.ADDRESSES", 100)
    guard = Guard(Limits())
    for n in range(2000):
        now[0] += 0.1
        visitor = guard.enter(f"2001:db8:{n >> 8:x}:{n & 255:x}::1")
        assert visitor is not None
        guard.refuse("handshake", visitor)
        guard.leave(visitor)
    assert guard.refused["handshake"] == 2000
    assert max(len(guard._visitors), len(guard._logged)) <= 200
    assert len(guard.refused_by_address) == 256
    assert "2001:db8:7:cf::/64" in guard.refused_by_address  # the last one


def test_an_ipv6_host_is_one_address_however_it_calls_itself() -> None:
    guard = Guard(Limits())
    names = ("2001:db8::1", "2001:db8::2", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0")
    first, second, third, fourth, _ = (guard.enter(name) for name in names)
    assert first is second
    assert third is fourth
    assert first is not third


TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"/", b"//", b"..", b"%2e", b"%00", b"?", b"#", b"\xff", b"\x80",
    b"Content-Length: 5\r\n", b"content-length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", b"\r\n\r\n",
    b"Upgrade: h2c\r\n", b"POST /v1/control/list-runs HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.0", b"HTTP/1.1",
    b"GET", b"CONNECT", b"/v1/control/start-run", b"/v1/runtime/pull-object", b"/v1/fleet/register-node",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"A" * 5000,
]  # fmt: skip


def mutated(raw: bytes, choice: random.Random) -> bytes:
    for _ in range(choice.choice([0, 1, 1, 1, 2, 4, 8])):
        start = choice.randrange(len(raw) + 1)
        stop = min(len(raw), start + choice.choice([0, 0, 1, 2, 10, 60]))
        raw = raw[:start] + choice.choice([*TOKENS, choice.randbytes(3), b""]) + raw[stop:]
    return raw


FLEET_CALL = re.compile(rb"POST (%s) HTTP/1\.1\r\n([!-9;-~]+: [ -~\x80-\xff]*\r\n)+" % b"|".join(map(re.escape, CALLS)))


@pytest.mark.timeout(1800)
def test_fuzzed_requests_reach_nothing_but_the_fleet_s_calls(
    start: Start, keys: Keys, recorder: Recorder, count: Callable[[int, int], int], record_property: Callable[..., None]
) -> None:
    proxy = start(
        head_seconds=0.3, idle_seconds=0.2, handshakes=1e6, handshake_burst=10**6, requests=1e6, request_burst=10**6
    )
    assert served(proxy, keys)
    site, total = Site(keys, "lab-a"), count(500, 10_000)
    handles, memory = usage(proxy)
    calls = [call.decode().rpartition("/")[2] for call in CALLS]

    def attack(seed: int, times: int) -> None:
        choice = random.Random(seed)
        for _ in range(times):
            raw = mutated(site.request(choice.choice(calls), choice.randbytes(choice.choice([0, 5, 300]))), choice)
            cut = choice.randrange(len(raw)) if choice.random() < 0.1 else len(raw)
            with contextlib.suppress(OSError), proxy.connection(seconds=5) as channel:
                channel.sendall(raw[:cut])
                if cut == len(raw):
                    read_reply(channel)

    threads = [threading.Thread(target=attack, args=(seed, total // 10)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served(proxy, keys)
    refused = proxy.settled()
    record_property("refused", refused)
    record_property("passed", proxy.figures()["passed"])
    assert "internal" not in refused
    assert len(refused) > 8
    assert len(recorder.requests) > total // 20  # some mutations leave a request whole, or touch what is not passed
    for top, body in recorder.requests:
        assert FLEET_CALL.fullmatch(top), top
        names = [line.partition(b":")[0].lower() for line in top.split(b"\r\n")[1:-1]]
        assert len(names) == len(set(names))
        assert {"content-length", "flwr-signature", "host"} <= {name.decode() for name in names}
        assert all(name in (b"host", b"content-length", *PASSED) or name[:5] == b"flwr-" for name in names)
        (length,) = re.findall(rb"content-length: (\d+)\r\n", top.lower())
        assert len(body) <= int(length)  # less where the client has gone in the middle
    wait_until(lambda: proxy.figures()["connections"] == 0, 10, "no connection is left")
    handles_after, memory_after = usage(proxy)
    assert handles_after <= handles + 12  # idle connections to the recorder
    assert memory_after - memory < 60 << 20


def usage(proxy: Perimeter) -> tuple[int, int]:
    """File handles and resident bytes of the proxy."""
    pid = proxy.process.pid
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), resident


def test_large_bodies_pass_at_speed(
    start: Start, keys: Keys, recorder: Recorder, record_property: Callable[..., None]
) -> None:
    proxy, site, body = start(), Site(keys, "lab-a"), random.Random(1).randbytes(5_000_000)
    recorder.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with proxy.connection() as channel:
        before = cpu_seconds(proxy)
        for _ in range(20):
            channel.sendall(site.request("push-object", body))
            assert len(read_reply(channel).body) == len(body)
        seconds = cpu_seconds(proxy) - before
    rate = 20 * 2 * len(body) / seconds / 1e6
    record_property("megabytes_per_cpu_second", rate)
    assert rate > 100  # 300 to 500 on an idle core; a copy too many shows


def cpu_seconds(proxy: Perimeter) -> float:
    fields = Path(f"/proc/{proxy.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
