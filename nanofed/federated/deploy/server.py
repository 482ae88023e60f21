"""The service around a SuperLink: `nanofed server` starts it and what faces the network, and keeps a run going."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.federated.deploy.keys import Keys, load, read_sites
from nanofed.federated.deploy.nodes import DATABASE, FOLDER
from nanofed.federated.deploy.process import LOG_BYTES, ended_by_signals, kill_marked, marked, pause_after, undisturbed
from nanofed.federated.deploy.superlink import LINK, SuperLink, write_app
from nanofed.federated.federation import Federation
from nanofed.federated.flower import is_loopback
from nanofed.federated.outcome import Outcome
from nanofed.files import keep_short
from nanofed.training.checkpoint import checkpoints
from nanofed.training.run_folder import RunFolder, has_saved, is_used
from nanofed.training.summary import Summary

logger = logging.getLogger(__name__)

SERVER_APP, SERVER_APP_WITH_KEYS = (
    f"nanofed.federated.runtimes.deployment:{n}" for n in ("server", "server_with_keys")
)
CLIENT_APP = "nanofed.federated.runtimes.flower_app:client"  # named, never loaded: a site runs its own
LAUNCHER, LOOP = "flower-superexec", "flwr-serverapp"  # of a SuperLink, by words of their command lines
WATCH_SECONDS = 0.5
GONE_SECONDS = 5.0  # an ended round loop has told Flower how by then
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
        federation: The federation to be trained.
        options: The address on which the server listens, and its keys.
        beside: A context that lasts as long as the run: it gets the run's folder, and yields a function that is called twice a
            second and may raise to end the run.

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
    with ended_by_signals(), RunFolder(federation.folder, lambda: kill_marked(leftovers)) as hold:
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
    """A SuperLink, and one run after another until one completes."""

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
        self._link = SuperLink(folder, self._log)
        self._app = folder / "app"
        self._database = folder / DATABASE
        self._database_file = 0  # of the SuperLink that runs
        self._said: tuple[dict[bytes, str], list[str]] = ({}, [])  # of the sites' keys
        self._launcher = self._watched_launcher()

    def _watched_launcher(self) -> _Watched:
        """Watch a SuperLink's launcher of round loops, over all its runs: it may die between two of them."""
        return _Watched(self._link.marker, LAUNCHER)

    def serve(self) -> None:
        """Run to the end."""
        settings = {
            "run_dir": str(self._run),
            "base_dir": str(runtime.base_dir().resolve()),
            "overrides": shlex.join(self._start_options),
        }
        crashes, before, ran = 0, self._round(), False
        while True:
            try:
                self._start()
                self._write_app()
                run_id, ran = self._link.submit(self._app, settings), True
                failure = self._watch(run_id)
            except (OSError, NanofedError, subprocess.SubprocessError) as error:
                if not ran or isinstance(error, (ConfigError, DataError)):
                    raise
                failure = Outcome.of(error)
            if failure is None:
                return
            if failure.exit_code in (ConfigError.exit_code, DataError.exit_code):
                raise failure.error()
            reason = failure.reason
            with suppress(OSError):  # somebody has removed the folder
                if (free := shutil.disk_usage(self._folder).free) < LEAST_FREE:  # it may have room again
                    reason += f"; the disk of {self._folder} is full: {free:,} bytes are left"
            now = self._round()
            crashes = 1 if now > before else crashes + 1
            before = now
            if crashes >= CRASHES:
                raise NanofedError(f"the run ended {crashes} times without a round between ({reason}); see {self._log}")
            pause = pause_after(crashes)
            logger.warning("the run ended (%s); it goes on from round %d in %.0f s", reason, now, pause)
            time.sleep(pause)
            kill_marked(self._link.marker, LOOP)  # now: one that was being started when the run ended has its name

    def _write_app(self) -> None:
        """Write the bundle that Flower runs, of the sources that run here; for each run, since somebody may have changed it."""
        shutil.rmtree(self._app, ignore_errors=True)
        self._app.mkdir(parents=True)
        write_app(self._app, SERVER_APP if self._keys is None else SERVER_APP_WITH_KEYS, CLIENT_APP)

    def _round(self) -> int:
        """Return the number of the last committed round."""
        found = checkpoints(self._run)
        return int(found[-1].name.removeprefix("round_")) if found else 0

    def _start(self) -> None:
        """Start the SuperLink where it is not there."""
        self._folder.mkdir(exist_ok=True)
        if not self._link.alive:
            self._link.stop()
            self._launcher = self._watched_launcher()
            options = ["--folder", str(self._folder), "--disable-runtime-dependency-installation"]
            host, port = self._options.address
            if self._keys is None:
                self._link.start(options, port=port)
            else:
                self._check_keys(self._keys)
                self._link.start([*options, "--keys", str(self._keys.folder), "--listen", host, str(port)])
            self._database_file = _identity(self._database)
        self._say_sites()
        logger.info("serving sites on %s; Flower's own log is %s", self._options.listen, self._log)

    @staticmethod
    def _check_keys(keys: Keys) -> None:
        """Look at the keys as they are now; what is wrong with them ends no run that has begun, since it may be mended."""
        try:
            load(keys.folder)
        except ConfigError as error:
            raise NanofedError(str(error)) from error

    def _lost(self) -> str | None:
        """Return why the SuperLink cannot go on though its process lives, None where it can."""
        if _identity(self._database) != self._database_file:
            return f"{self._database}, which the SuperLink was using, was removed or replaced"
        return None

    def _say_sites(self) -> None:
        """Say which sites may take part from now on, which may not any more, and which keys cannot be used."""
        if self._keys is None:
            return
        now = read_sites(self._keys.sites)
        (before, unusable), self._said = self._said, now
        for reason in now[1]:
            if reason not in unusable:
                logger.warning("passed over: %s", reason)
        for public in before.keys() - now[0].keys():
            renewed = before[public] in now[0].values()
            logger.warning("the %skey of site %s is refused from now on", "old " if renewed else "", before[public])
        for public in now[0].keys() - before.keys():
            logger.info("site %s may take part", now[0][public])

    def _watch(self, run_id: int) -> Outcome | None:
        """Wait until a run ends and return why it failed, None if it completed."""
        follower = threading.Thread(target=self._link.follow, args=(run_id,), daemon=True)
        follower.start()
        # Flower notices a killed round loop by its missing heartbeats, which takes a minute; a killed launcher, not at all.
        loop = _Watched(self._link.marker, LOOP)
        while follower.is_alive():
            follower.join(WATCH_SECONDS)
            self._check()
            if not self._link.alive:
                return _crash("the SuperLink died")
            if lost := self._lost():
                self._link.stop()
                return _crash(lost)
            self._say_sites()
            keep_short(self._log, LOG_BYTES)
            if self._launcher.is_gone():
                self._link.stop()
                return _crash("the SuperLink's launcher died")
            if loop.is_gone():
                self._link.command("stop", str(run_id), LINK, check=False)
                return _crash("the round loop died")
        try:
            return self._link.outcome(run_id)
        except NanofedError:
            if self._link.alive:
                raise
            return _crash("the SuperLink died")

    def stop(self) -> None:
        """Stop everything."""
        with undisturbed():
            self._link.stop()
            kill_marked(self._link.marker)


def _crash(reason: str) -> Outcome:
    return Outcome(NanofedError.exit_code, reason)


def _identity(path: Path) -> int:
    """Return which file a path names, 0 where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


class _Watched:
    """A process that was there and may be gone.

    Args:
        marker: `NAME=value` in the environment of the session in which the process runs.
        name: A word of the process's command line.
    """

    def __init__(self, marker: str, name: str) -> None:
        self._marker = marker
        self._name = name
        self._seen: float | None = None  # when it was there last

    def is_gone(self) -> bool:
        """Look, and tell whether it was there once and has not been for `GONE_SECONDS`."""
        now = time.monotonic()
        if marked(self._marker, self._name):
            self._seen = now
        return self._seen is not None and now - self._seen >= GONE_SECONDS
