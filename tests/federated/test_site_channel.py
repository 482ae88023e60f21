"""Both ends of the local channel, over real sockets, with clients and trainers that die."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanofed.errors import ConfigError
from nanofed.federated.site.channel import ChannelError, call, is_this_user, pack, read
from nanofed.federated.site.listener import Listener, Request
from tests.ranks import REPOSITORY

SLOW = 30.0  # seconds; what takes so long never comes


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nanofed-") as folder:  # the path of a socket must be short
        yield Path(folder) / "s"


@pytest.fixture
def listener(path: Path) -> Iterator[Listener]:
    def fail(config: dict[str, Any]) -> dict[str, Any]:
        raise OSError("the disk is gone")

    with Listener(path, {"ping": lambda config: {"heard": config}, "fail": fail}) as listener:
        yield listener


def in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start a call; what is returned waits for what came of it, an error too."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except ChannelError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(SLOW)
        assert outcome, "it does not end"
        return outcome[0]

    return wait


def fit(path: Path, config: dict[str, Any] | None = None, *arrays: Any, wait: float = SLOW) -> Callable[[], Any]:
    return in_background(lambda: call(path, "fit", config or {}, arrays, wait))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SLOW
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def child(code: str, *args: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


CLIENT = """
import sys
from pathlib import Path
import numpy as np
from nanofed.federated.site.channel import call
call(Path(sys.argv[1]), "fit", {}, [np.zeros(1 << 20)])
"""
TRAINER = """
import sys, time
from pathlib import Path
from nanofed.federated.site.listener import Listener
listener = Listener(Path(sys.argv[1]), {"ping": lambda config: {}})
print("listens", flush=True)
while True:
    request = listener.next()
    print("trains", flush=True)
    time.sleep(1000)
"""


def test_arrays_come_back_as_they_were_sent(path: Path, listener: Listener) -> None:
    generator = np.random.default_rng(0)
    arrays: list[np.ndarray[Any, Any]] = [
        generator.normal(size=(3, 5)).astype(np.float32),
        generator.integers(0, 1 << 16, 7).astype(np.uint16),
        np.array(2.5),
        np.empty((0, 4), np.float32),
        generator.normal(size=(6, 4))[::2].T,  # in no order of memory
    ]
    answer = fit(path, {"a": [1, None, "ü"]}, *arrays)
    request = listener.next()
    assert request.config == {"a": [1, None, "ü"]}
    for sent, came in zip(arrays, request.arrays, strict=True):
        assert came.dtype == sent.dtype and came.shape == sent.shape and np.array_equal(came, sent)
        assert not came.size or not came.flags.writeable
    assert request.answer(request.arrays[::-1], 17, {"loss": 1.5})
    back, examples, metrics = answer()
    assert examples == 17 and metrics == {"loss": 1.5} and request.arrays == []
    assert all(np.array_equal(a, b) for a, b in zip(back, arrays[::-1], strict=True))


def test_errors_come_back_with_the_trainers_words(path: Path, listener: Listener) -> None:
    answer = fit(path)
    assert listener.next().refuse("the lease is too short")
    assert isinstance(error := answer(), ChannelError) and str(error) == "the lease is too short"
    with pytest.raises(ChannelError, match="OSError: the disk is gone"):
        call(path, "fail", {})
    assert call(path, "ping", {"x": 1}) == ([], 0, {"heard": {"x": 1}})


def test_no_trainer_is_said_and_a_late_one_is_waited_for(path: Path) -> None:
    with pytest.raises(ChannelError, match=rf"no trainer at {path}, and none came within 0\.3 s"):
        call(path, "ping", {}, wait=0.3)
    answer = fit(path, {}, np.arange(3))
    time.sleep(0.3)
    with Listener(path, {}) as listener:
        listener.next().answer([], 1, {})
        assert answer() == ([], 1, {})


def test_a_trainer_that_starts_does_not_take_a_round_up_in_time(path: Path, listener: Listener) -> None:
    with pytest.raises(ChannelError, match=r"did not take fit up within 0\.3 s"):
        call(path, "fit", {}, wait=0.3)
    answer = fit(path)  # the one that gave up is gone, and does not stand in its way
    assert listener.next().answer([], 0, {}) and answer() == ([], 0, {})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_trainer_that_dies_fails_its_client_at_once(path: Path, number: int) -> None:
    trainer = child(TRAINER, path)
    assert trainer.stdout is not None
    answer = fit(path, {}, np.zeros(10))
    assert trainer.stdout.readline() == b"listens\n" and trainer.stdout.readline() == b"trains\n"
    trainer.send_signal(number)
    trainer.wait()
    trainer.stdout.close()
    assert "died while it did fit" in str(answer())
    with Listener(path, {}) as replaced:  # the dead one's socket is in nobody's way
        answer = fit(path)
        assert replaced.next().answer([], 0, {}) and answer() == ([], 0, {})


def test_a_trainer_that_hangs_does_not_answer_a_ping(path: Path) -> None:
    trainer = child(TRAINER, path)
    assert trainer.stdout is not None and trainer.stdout.readline()
    call(path, "ping", {})
    trainer.send_signal(signal.SIGSTOP)
    with pytest.raises(ChannelError, match=r"did not take ping up within 0\.5 s"):
        call(path, "ping", {}, wait=0.5)
    trainer.send_signal(signal.SIGCONT)
    call(path, "ping", {})
    trainer.kill()
    trainer.communicate()


def test_a_client_that_is_killed_cancels_its_round(path: Path, listener: Listener) -> None:
    before = open_files()
    client = child(CLIENT, path)
    request = listener.next()
    client.kill()
    client.communicate()
    until(lambda: request.cancelled)
    assert request.cancelled == "its client is gone"
    assert not request.answer([np.zeros(1 << 20)], 1, {}), "nobody takes it"
    until(lambda: open_files() <= before)
    assert sorted(file.name for file in path.parent.iterdir()) == ["s", "s.lock"], "no array is left in a file"


def test_a_client_killed_before_its_turn_is_not_served(path: Path, listener: Listener) -> None:
    client = child(CLIENT, path)
    until(lambda: listener._waiting)
    waiting = listener._waiting
    assert isinstance(waiting, Request)
    client.kill()
    client.communicate()
    until(lambda: waiting.cancelled)
    answer = fit(path, {"n": 2})
    second = listener.next()
    assert second.config == {"n": 2}
    assert listener.abort("enough")
    second.refuse("enough")
    assert str(answer()) == "enough"


def test_a_newer_round_ends_those_before_it(path: Path, listener: Listener) -> None:
    first = fit(path, {"n": 1})
    running = listener.next()
    second = fit(path, {"n": 2})
    until(lambda: running.cancelled)
    assert running.cancelled == "a newer round arrived"
    third = fit(path, {"n": 3})
    assert str(second()) == "a newer round arrived", "it is refused before its turn"
    running.refuse(f"the round was aborted: {running.cancelled}")
    assert str(first()) == "the round was aborted: a newer round arrived"
    newest = listener.next()
    assert newest.config == {"n": 3} and newest.cancelled is None
    newest.answer([], 3, {})
    assert third() == ([], 3, {})
    assert not listener.abort("nothing is under way")


def test_an_abort_reaches_the_round_under_way(path: Path, listener: Listener) -> None:
    answer = fit(path)
    request = listener.next()
    assert listener.abort("it was told to stop") and request.cancelled == "it was told to stop"
    request.refuse(request.cancelled)
    assert str(answer()) == "it was told to stop"


def raw(path: Path, data: bytes, file: int | None = None) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SLOW)
        connection.connect(str(path))
        socket.send_fds(connection, [data], [] if file is None else [file])
        return read(connection)[0]


def framed(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text


def request(**changes: object) -> dict[str, object]:
    return {"kind": "fit", "config": {}, "arrays": [], **changes}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack(">I", 1 << 30), "a header of 1073741824 bytes is announced"),
        (framed(b"\xff{"), "is no JSON"),
        (framed(b"[" * 100_000), "is no JSON"),
        (framed([]), "a JSON object, not a list"),
        (framed({"kind": "fit"}), "a `kind` and a `config`"),
        (framed({"kind": 3, "config": {}}), "a `kind` and a `config`"),
        (framed(request(kind="exec")), "'exec' is no request"),
        (framed(request(arrays={})), "list of at most"),
        (framed(request(arrays=[["<f4", [2]]])), "1 arrays are announced and none came"),
        (framed(request(arrays=[["O", [1]]])), "describes no array"),
        (framed(request(arrays=[["<f4", [-1]]])), "describes no array"),
        (framed(request(arrays=[["<f4", [True]]])), "describes no array"),
        (framed(request(arrays=[["f4,f4", [1]]])), "describes no array"),
        (framed(request(arrays=[["<f4"]])), "describes no array"),
        (framed(request(arrays=[[[["a", "b", "c"]], [1]]])), "describes no array"),
    ],
)
def test_what_is_no_request_is_refused_with_a_reason(
    path: Path, listener: Listener, data: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason in raw(path, data)["error"]
    assert call(path, "ping", {})[2] == {"heard": {}}
    assert listener._waiting is None


def test_a_file_of_another_size_is_refused(path: Path, listener: Listener) -> None:
    layout, file = pack([np.zeros(8, np.float32)])
    assert file is not None and layout == [["<f4", [8]]]
    for wrong in ([["<f4", [9]]], [["<f4", [8]], ["<f4", [1]]], [["<f4", [1 << 40, 1 << 40]]]):
        assert "arrays of" in raw(path, framed(request(arrays=wrong)), file)["error"]
    reading, writing = os.pipe()
    assert "the file has 0" in raw(path, framed(request(arrays=[["<f4", [8]]])), reading)["error"]
    for number in (file, reading, writing):
        os.close(number)


def test_a_connection_that_says_nothing_holds_nobody_up(path: Path, listener: Listener) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as idle:
        idle.connect(str(path))
        idle.send(b"\0")
        assert call(path, "ping", {}, wait=SLOW)[2] == {"heard": {}}


def test_one_trainer_a_socket_and_its_folder_is_its_own(path: Path, listener: Listener) -> None:
    with pytest.raises(ConfigError, match="another trainer listens"):
        Listener(path, {})
    assert call(path, "ping", {})[2] == {"heard": {}}
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        Listener(path.with_name("other"), {})
    path.parent.chmod(0o700)
    with pytest.raises(ConfigError, match="choose another, of at most 100 letters"):
        Listener(path.with_name("x" * 200), {})


def test_a_socket_in_a_folder_that_may_be_another_user_s_is_not_used(
    path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = path.parent.with_name(f"{path.parent.name}-link")
    link.symlink_to(path.parent)
    try:
        with pytest.raises(ConfigError, match="is a link or no folder: remove it"):
            Listener(link / "other", {})
        with pytest.raises(ChannelError, match=r"cannot be trusted: .*is a link"):
            call(link / path.name, "ping", {})
    finally:
        link.unlink()
    path.parent.chmod(0o711)
    with pytest.raises(ChannelError, match=r"cannot be trusted: .*chmod 700"):
        call(path, "ping", {})
    path.parent.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ChannelError, match=r"cannot be trusted: .*is another user's"):
        call(path, "ping", {})
    with pytest.raises(ConfigError, match="is another user's"):
        Listener(path.with_name("other"), {})


def test_another_user_is_neither_answered_nor_asked(
    path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanofed.federated.site.listener.is_this_user", lambda connection: False)
    with pytest.raises(ChannelError, match="ended before it took ping up"):
        call(path, "ping", {}, wait=0.2)
    monkeypatch.undo()
    monkeypatch.setattr("nanofed.federated.site.channel.is_this_user", lambda connection: False)
    with pytest.raises(ChannelError, match="another user listens"):
        call(path, "ping", {})
    monkeypatch.undo()
    here, there = socket.socketpair()
    with here, there:
        assert is_this_user(here)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert not is_this_user(here)


def test_many_calls_leave_nothing_open(path: Path, listener: Listener) -> None:
    def serve() -> None:
        for _ in range(60):
            taken = listener.next()
            taken.answer(taken.arrays, 1, {})

    thread = threading.Thread(target=serve)
    thread.start()
    counts = []
    for _ in range(60):
        call(path, "fit", {}, [np.zeros(1000)])
        counts.append(open_files())
    thread.join(SLOW)
    assert not thread.is_alive()
    until(lambda: open_files() <= min(counts[:3]))
    assert max(counts) < min(counts) + 30


def test_the_client_app_loads_neither_torch_nor_lightning(record_property: Callable[[str, object], None]) -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import nanofed.federated.site.app\n"
        "print(time.perf_counter() - begin, *sorted({'torch', 'lightning', 'pyarrow'} & set(sys.modules)))"
    )
    process = child(code)
    output = process.communicate()[0].decode().split()
    assert process.returncode == 0
    record_property("import_seconds", float(output[0]))
    logging.getLogger(__name__).info("import of the client app: %s s", output[0])
    assert output[1:] == []


def test_the_client_passes_messages_through_and_names_its_site(path: Path, listener: Listener) -> None:
    from nanofed.federated.site.app import ChannelClient

    client = ChannelClient("lab-a", path, wait=SLOW)
    answer = in_background(lambda: client.fit([np.arange(3)], {"nanofed": "{}"}))
    request = listener.next()
    assert request.config == {"client": "lab-a", "message": {"nanofed": "{}"}}
    request.answer(request.arrays, 5, {"nanofed": "[]"})
    arrays, examples, metrics = answer()
    assert np.array_equal(arrays[0], np.arange(3)) and (examples, metrics) == (5, {"nanofed": "[]"})
    with pytest.raises(ChannelError, match="site lab-a: the trainer cannot read the request: 'get_properties' is no"):
        client.get_properties({})


@pytest.mark.parametrize(
    ("age", "kind", "refused"), [(29.0, "train", False), (31.0, "train", True), (31.0, "query", False)]
)
def test_a_round_that_is_over_when_it_arrives_is_not_trained(age: float, kind: str, refused: bool) -> None:
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from nanofed.federated.site.app import pass_over

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict(), 1, kind, ttl=60.0, group_id="7")
    message.metadata.__dict__["_created_at"] = time.time() - age
    context = Context(run_id=1, node_id=1, node_config={"name": "lab-a"}, state=RecordDict(), run_config={})
    if refused:
        with pytest.raises(ChannelError, match="site lab-a: round 7 arrived 31 s after it was sent: it is over"):
            pass_over(message, context, lambda message, context: message)
    else:
        assert pass_over(message, context, lambda message, context: message) is message


@pytest.mark.parametrize("config", [{}, {"name": "lab-a"}, {"trainer": "/s"}])
def test_a_node_without_name_or_trainer_is_refused(config: dict[str, str]) -> None:
    from flwr.app import Context, RecordDict

    from nanofed.federated.site.app import client_fn

    with pytest.raises(ValueError, match="the node's config lacks"):
        client_fn(Context(run_id=1, node_id=1, node_config=dict(config), state=RecordDict(), run_config={}))
