"""The service around a SuperLink: `nanofed server` starts it and what faces the network, and keeps a run going."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.federated.flower import is_loopback
from nanofed.federated.processes import end_marked, ended_by_signals, started_as, undisturbed
from nanofed.federated.run import Federation
from nanofed.federated.runtimes.nodes import DEPOT, FOLDER, NODES, read_nodes
from nanofed.federated.runtimes.superlink import EXIT, LINK, SuperLink, raise_failure, write_app
from nanofed.federated.server.keys import Keys, load
from nanofed.federated.server.signing import signature_in
from nanofed.federated.wire.signature import SIGNATURE
from nanofed.files import write_atomically
from nanofed.training.checkpoint import checkpoints
from nanofed.training.run import Summary
from nanofed.training.run_folder import RunFolder, has_saved, is_used

logger = logging.getLogger(__name__)

SERVER_APP = "nanofed.federated.runtimes.deployment_app:server"
CLIENT_APP = "nanofed.federated.site.app:client"
WATCH_SECONDS = 0.5
GONE_SECONDS = 5.0  # an ended round loop has told Flower how by then
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # between crashes, doubled each time that no round was committed
LEAST_FREE = 4 << 20  # bytes, without which the SuperLink's database is at its end
CRASHES = 8  # in a row without a committed round, after which the run is given up


@dataclass(frozen=True)
class ServerOptions:
    """Where sites reach the server.

    Attributes:
        listen: `host:port`; without keys on loopback only.
        keys: folder that `nanofed server init` wrote: then sites come by TLS, each with its key.
    """

    listen: str = "127.0.0.1:9092"
    keys: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port.

        Raises:
            ConfigError: it is no `host:port`.
        """
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError(f"--listen must be host:port, not {self.listen!r}")
        return host.strip("[]"), int(port)

    def check(self) -> Keys | None:
        """Return the keys.

        Raises:
            ConfigError: sites would come from the network without TLS; keys that cannot be used.
        """
        host, _ = self.address
        if self.keys is not None:
            keys = load(runtime.user_path(self.keys).resolve())
            if warning := keys.warning():
                logger.warning("%s", warning)
            return keys
        if not is_loopback(host):
            raise ConfigError(
                f"--listen {self.listen} is reached from the network: that needs TLS and keys. Write them with "
                f"`nanofed server init KEYS --host {host} --site NAME …` and pass --keys KEYS, or listen on 127.0.0.1"
            )
        return None


def _alone(run: Path) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


def run_server(
    federation: Federation,
    options: ServerOptions,
    beside: Callable[[Path], AbstractContextManager[Callable[[], None]]] = _alone,
) -> Summary:
    """Serve a federation until its end, through crashes of the SuperLink and of the round loop.

    Started again after it was killed itself, it goes on from the run's last checkpoint.

    Args:
        federation: what to train.
        options: of the server.
        beside: what to do meanwhile: gets the run's folder once it is there, and yields what is called twice a second and may
            raise to end the run.

    Raises:
        ConfigError: a wrong option; another server works on the run.
        DataError: no shards or no tokenizer.
        NanofedError: the run crashed again and again.
    """
    keys = options.check()
    federation.config.runtime = "deployment"
    federation.anchor()
    folder = federation.folder / FOLDER
    leftovers = f"FLWR_HOME={folder / 'home'}"
    with ended_by_signals(), RunFolder(federation.folder, lambda: end_marked(leftovers)) as hold:
        run = _open(federation)
        hold.lend_rounds()
        folder.mkdir(exist_ok=True)
        with beside(run) as check:
            service = _Service(run, folder, options, keys, check, federation.start_options)
            try:
                service.serve()
            finally:
                service.stop()
    return Summary.read(run)


def _open(federation: Federation) -> Path:
    """Open the run: a new one, or one that goes on, from its last checkpoint or, where it has none yet, from its beginning."""
    options = federation.options
    if is_used(options.folder) and not options.overwrite and (has_saved(options.folder) or not options.ckpt_path):
        federation.config.ckpt_path = "last"
        logger.info("%s is there already: going on from its last checkpoint", options.folder)
    return federation.open()


class _Service:
    """A SuperLink, the proxy in front of it, and one run after another until one completes."""

    def __init__(
        self,
        run: Path,
        folder: Path,
        options: ServerOptions,
        keys: Keys | None,
        check: Callable[[], None],
        start_options: Sequence[str],
    ) -> None:
        self._run = run
        self._start_options = start_options
        self._folder = folder
        self._options = options
        self._keys = keys
        self._check = check
        self._log = folder / "flower.log"
        self._link = SuperLink(folder, self._log, authority=keys.ca if keys else None)
        self._app = folder / "app"
        self._database = folder / "superlink.db"
        self._proxy: subprocess.Popen[bytes] | None = None
        self._launcher = self._watched_launcher()

    def _watched_launcher(self) -> _Watched:
        """Watch a SuperLink's launcher of round loops, over all its runs: it may die between two of them."""
        return _Watched(self._link.marker, "flower-superexec")

    def serve(self) -> None:
        """Run to the end."""
        shutil.rmtree(self._app, ignore_errors=True)
        self._app.mkdir()
        write_app(self._app, SERVER_APP, CLIENT_APP)
        if self._keys is not None and (signature := signature_in(self._keys.folder)):
            (self._app / SIGNATURE).write_text(signature.to_json())
            logger.info("the code that sites are sent is signed as number %d", signature.number)
        settings = {
            "run_dir": str(self._run),
            "base_dir": str(runtime.base_dir().resolve()),
            "overrides": shlex.join(self._start_options),
        }
        crashes, before, ran = 0, self._round(), False
        while True:
            try:
                self._start()
                run_id, ran = self._link.submit(self._app, settings), True
                failure = self._watch(run_id)
            except (OSError, NanofedError, subprocess.SubprocessError) as error:
                if not ran or isinstance(error, (ConfigError, DataError)):
                    raise
                failure = " ".join(str(error).split())
            if failure is None:
                return
            if (match := EXIT.fullmatch(failure)) and int(match[1]) in (ConfigError.exit_code, DataError.exit_code):
                raise_failure(failure, failure)
            if (free := shutil.disk_usage(self._folder).free) < LEAST_FREE:  # it may have room again
                failure = f"{failure}; the disk of {self._folder} is full: {free:,} bytes are left"
            now = self._round()
            crashes = 1 if now > before else crashes + 1
            before = now
            if crashes >= CRASHES:
                raise_failure(
                    failure, f"the run ended {crashes} times without a round between ({failure}); see {self._log}"
                )
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (crashes - 1))
            logger.warning("the run ended (%s); it goes on from round %d in %.0f s", failure, now, pause)
            end_marked(self._link.marker, "flwr-serverapp")
            time.sleep(pause)

    def _round(self) -> int:
        """Return the number of the last committed round."""
        found = checkpoints(self._run)
        return int(found[-1].name.removeprefix("round_")) if found else 0

    def _start(self) -> None:
        """Start what is not there of SuperLink and proxy."""
        if not self._link.alive:
            self._link.stop()
            self._stop_proxy()  # it would go on calling the old port
            self._launcher = self._watched_launcher()
            options = ["--depot", str(self._folder / DEPOT), "--database", str(self._database)]
            options += ["--disable-runtime-dependency-installation"]
            if self._keys is None:
                (self._folder / NODES).unlink(missing_ok=True)
                self._link.start([*options, "--insecure"], port=self._options.address[1])
            else:
                secure = ["--ssl-ca-certfile", self._keys.ca, "--ssl-certfile", self._keys.certificate]
                secure += ["--ssl-keyfile", self._keys.key]
                self._link.start([*options, *map(str, secure), "--enable-supernode-auth"])
                self._register(self._keys)
        if self._keys is not None and not self._proxy_alive():
            self._start_proxy(self._keys)
        logger.info("serving sites on %s; Flower's own log is %s", self._options.listen, self._log)

    def _register(self, keys: Keys) -> None:
        """Register the keys of new sites, and write down which node is whose: a node's key is its identity."""
        known = read_nodes(self._folder) if self._database.exists() else {}
        for name in keys.names():
            digest = hashlib.sha256(keys.public_key(name).read_bytes()).hexdigest()
            if name in known and known[name]["key"] == digest:
                continue
            key = str(keys.public_key(name))
            said = self._link.command("supernode", "register", key, LINK, "--format", "json", check=False)
            if match := re.search(r'"node-id":\s*"?(\d+)', said):
                known[name] = {"node": match[1], "key": digest}
                logger.info("site %s may take part", name)
            else:
                logger.warning("site %s cannot be registered: %.300s", name, " ".join(said.split()))
        write_atomically(self._folder / NODES, json.dumps(known))

    def _start_proxy(self, keys: Keys) -> None:
        command = [sys.executable, "-m", "nanofed.federated.server.proxy", "--listen", self._options.listen]
        command += ["--upstream", f"127.0.0.1:{self._link.port}", "--upstream_ca", str(keys.ca)]
        command += ["--certificate", str(keys.certificate), "--key", str(keys.key), "--sites", str(keys.sites)]
        command += ["--status", str(self._folder / "proxy.json"), "--parent", str(os.getpid())]
        with (self._folder / "proxy.log").open("ab") as log:
            self._proxy = subprocess.Popen(
                command,
                env=runtime.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _stop_proxy(self) -> None:
        if self._proxy is not None:
            self._proxy.kill()  # it keeps nothing
            self._proxy.wait()

    def _proxy_alive(self) -> bool:
        return self._proxy is not None and self._proxy.poll() is None

    def _watch(self, run_id: int) -> str | None:
        """Wait until a run ends and return why it failed, None if it completed; restarts the proxy meanwhile."""
        said: list[str] = []
        follower = threading.Thread(target=lambda: said.append(self._link.follow(run_id)), daemon=True)
        follower.start()
        sites = self._keys.names() if self._keys else []
        # Flower notices a killed round loop by its missing heartbeats, which takes a minute; a killed launcher, not at all.
        loop = _Watched(self._link.marker, "flwr-serverapp")
        while follower.is_alive():
            follower.join(WATCH_SECONDS)
            self._check()
            if not self._link.alive:
                return "the SuperLink died"
            if self._keys is not None and not self._proxy_alive():
                logger.warning("the proxy died; it is started again")
                self._start_proxy(self._keys)
            if self._keys is not None and self._keys.names() != sites:
                self._register(self._keys)
                sites = self._keys.names()
            if self._launcher.is_gone():
                self._link.stop()
                return "the SuperLink's launcher died"
            if loop.is_gone():
                self._link.command("stop", str(run_id), LINK, check=False)
                return "the round loop died"
        if not self._link.alive:
            return "the SuperLink died"
        status, details = self._link.status(run_id)
        if status == "finished:completed":
            return None
        return (said[0] if said else "") or f"{status}: {details or 'no reason given'}"

    def stop(self) -> None:
        """Stop everything."""
        with undisturbed():
            self._stop_proxy()
            self._link.stop()
            end_marked(self._link.marker)


class _Watched:
    """A process that was there and may be gone.

    Args:
        marker: of the sessions in which to look for it.
        name: in its command line.
    """

    def __init__(self, marker: str, name: str) -> None:
        self._marker = marker
        self._name = name
        self._seen: float | None = None  # when it was there last

    def is_gone(self) -> bool:
        """Look, and tell whether it was there once and has not been for `GONE_SECONDS`."""
        now = time.monotonic()
        if started_as(self._marker, self._name):
            self._seen = now
        return self._seen is not None and now - self._seen >= GONE_SECONDS
