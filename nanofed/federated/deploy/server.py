"""The service around a SuperLink: `nanofed server` starts it and what faces the network, and keeps a run going."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError, DataError, NanofedError, in_one_line
from nanofed.federated.deploy.keys import Keys, load, read_sites
from nanofed.federated.deploy.process import LOG_BYTES, ended_by_signals, kill_marked, marked, pause_after, undisturbed
from nanofed.federated.deploy.superlink import DATABASE, FOLDER, LINK, SuperLink, write_app
from nanofed.federated.federation import Federation, Start
from nanofed.federated.flower import host_port, is_loopback
from nanofed.files import keep_short, write_atomically
from nanofed.training.checkpoint.folder import FOLDER as CHECKPOINTS
from nanofed.training.checkpoint.folder import checkpoints, set_aside_later
from nanofed.training.run_folder import has_saved, hold_run, is_used
from nanofed.training.summary import Summary

logger = logging.getLogger(__name__)

LAUNCHER, LOOP = "flower-superexec", "flwr-serverapp"  # of a SuperLink, by words of their command lines
WENT_BACK = "went_back"  # the file that says to which checkpoint
WATCH_SECONDS = 0.5
GONE_SECONDS = 5.0  # an ended round loop has told Flower how by then
LEAST_FREE = 4 << 20  # bytes, without which the SuperLink's database is at its end
CRASHES = 8  # in a row without a committed round, after which the run is given up


def run_server(
    federation: Federation,
    listen: str,
    keys: str | Path | None = None,
    beside: Callable[[Path], AbstractContextManager[Callable[[], None]]] = lambda run: nullcontext(lambda: None),
) -> Summary:
    """Serve a federation until its end, through crashes of the SuperLink and of the round loop.

    Started again after it was killed itself, it goes on from the run's last checkpoint.

    Args:
        federation: The federation to be trained.
        listen: `host:port` where sites reach the server; without keys on loopback only.
        keys: The folder that `nanofed server init` wrote: then sites come by TLS, each with its key.
        beside: A context that lasts as long as the run: it gets the run's folder, and yields a function that is called twice a
            second and may raise to end the run.

    Raises:
        ConfigError: a wrong option; another server works on the run.
        DataError: no shards or no tokenizer.
        NanofedError: the run crashed again and again.
    """
    address, held = host_port("--listen", listen), _usable(listen, keys)
    federation.config.runtime = "deployment"
    federation.anchor()
    folder = federation.folder / FOLDER
    link = SuperLink(folder, folder / "flower.log")
    with ended_by_signals(), hold_run(federation.folder, lambda: kill_marked(link.marker)) as rounds:
        run = _open(federation)
        rounds.release()
        folder.mkdir(exist_ok=True)
        with beside(run) as check:
            service = _Service(link, address, held, federation.start(keys=held is not None), check)
            try:
                service.serve()
            finally:
                service.stop()
    return Summary.read(run)


def _usable(listen: str, keys: str | Path | None) -> Keys | None:
    """Return the keys; without any the address must be on loopback."""
    host, _ = host_port("--listen", listen)
    if keys is not None:
        found = load(runtime.user_path(keys).resolve())
        if warning := found.warning():
            logger.warning("%s", warning)
        return found
    if not is_loopback(host):
        raise ConfigError(
            f"--listen {listen} is reached from the network: that needs TLS and keys. Write them with "
            f"`nanofed server init KEYS --host {host} --site NAME …` and pass --keys KEYS, or listen on 127.0.0.1"
        )
    return None


def _open(federation: Federation) -> Path:
    """Open the run: a new one, or one that goes on, from its last checkpoint or, where it has none yet, from its beginning.

    One that is to go back to an earlier checkpoint of its own has no later ones from here on: its round loops, however often they
    are started, go on from the last. It goes back once: started again with the same arguments it goes on, and a checkpoint of
    another run is where it began, before it had any.
    """
    options = federation.options
    run, named, back = options.folder, options.ckpt_path, None
    done = run / FOLDER / WENT_BACK
    if is_used(run) and not options.overwrite and (has_saved(run) or not named):
        where = "its last checkpoint"
        if named is not None and Path(named).resolve().parent == (run / CHECKPOINTS).resolve():
            if done.exists() and done.read_text(encoding="utf-8") == named:
                where += f"; it went back to {named} before, and does so again where {done} is removed"
            else:
                where, back = named, Path(named)
        if back is None:
            federation.config.ckpt_path = "last"
        logger.info("%s is there already: going on from %s", run, where)
    federation.open()
    if back is not None:
        set_aside_later(back)
        done.parent.mkdir(exist_ok=True)
        write_atomically(done, str(back))
        federation.config.ckpt_path = "last"
    return run


class _Service:
    """A SuperLink, and one round loop after another until the run is complete; without keys sites come without, too."""

    def __init__(
        self, link: SuperLink, address: tuple[str, int], keys: Keys | None, start: Start, check: Callable[[], None]
    ) -> None:
        self._link, self._folder = link, link.folder
        self._address, self._keys = address, keys
        self._start, self._check = start, check
        self._database = link.folder / DATABASE
        self._database_file = 0  # of the SuperLink that runs
        self._said: tuple[dict[bytes, str], list[str]] = ({}, [])  # of the sites' keys
        self._seen: dict[str, float] = {}  # when processes of the SuperLink were there last

    def serve(self) -> None:
        """Run to the end."""
        crashes, pauses, before, ran = 0, 0, self._round(), False
        while True:
            try:
                self._start_link()
                app = write_app(self._folder / "app")  # for each run: somebody may have changed it
                self._start.write(self._link.home)
                run_id, ran = self._link.submit(app), True
                return self._watch(run_id)
            except (ConfigError, DataError):
                raise
            except (OSError, NanofedError, subprocess.SubprocessError) as error:
                if not ran:
                    raise
                reason = in_one_line(error)
            full = False
            with suppress(OSError):  # somebody has removed the folder
                if full := (free := shutil.disk_usage(self._folder).free) < LEAST_FREE:  # it may have room again
                    reason += f"; the disk of {self._folder} is full: {free:,} bytes are left"
            now = self._round()
            crashes = 1 if now > before else crashes + (not full)
            pauses = 1 if now > before else pauses + 1
            before = now
            if crashes >= CRASHES:
                raise NanofedError(
                    f"the run ended {crashes} times without a round between ({reason}); see {self._link.log}"
                )
            pause = pause_after(pauses)
            logger.warning("the run ended (%s); it goes on from round %d in %.0f s", reason, now, pause)
            time.sleep(pause)
            kill_marked(self._link.marker, LOOP)  # now: one that was being started when the run ended has its name

    def _round(self) -> int:
        """Return the number of the last committed round."""
        found = checkpoints(Path(self._start.run))
        return int(found[-1].name.removeprefix("round_")) if found else 0

    def _start_link(self) -> None:
        """Start the SuperLink where it is not there."""
        self._folder.mkdir(exist_ok=True)
        host, port = self._address
        if not self._link.alive:
            self._link.stop()
            self._seen.clear()
            options = ["--folder", str(self._folder), "--disable-runtime-dependency-installation"]
            if self._keys is None:
                self._link.start(options, port=port)
            else:
                try:
                    load(self._keys.folder)
                except ConfigError as error:  # it ends no run that has begun, since it may be mended
                    raise NanofedError(str(error)) from error
                self._link.start([*options, "--keys", str(self._keys.folder), "--listen", host, str(port)])
            self._database_file = _identity(self._database)
        self._say_sites()
        logger.info("serving sites on %s:%d; Flower's own log is %s", host, port, self._link.log)

    def _say_sites(self) -> None:
        """Say which sites may take part from now on, which may not any more, and which keys cannot be used."""
        if self._keys is None:
            return
        try:
            now = read_sites(self._keys.sites)
        except OSError:  # of the moment, and whoever faces the network says so
            return
        (before, unusable), self._said = self._said, now
        for reason in now[1]:
            if reason not in unusable:
                logger.warning("passed over: %s", reason)
        for public in before.keys() - now[0].keys():
            renewed = before[public] in now[0].values()
            logger.warning("the %skey of site %s is refused from now on", "old " if renewed else "", before[public])
        for public in now[0].keys() - before.keys():
            logger.info("site %s may take part", now[0][public])

    def _watch(self, run_id: int) -> None:
        """Wait until a run is complete.

        Raises:
            NanofedError: It has failed.
        """
        follower = threading.Thread(target=self._link.follow, args=(run_id,), daemon=True)
        follower.start()
        self._seen.pop(LOOP, None)
        while follower.is_alive():
            follower.join(WATCH_SECONDS)
            self._check()
            self._say_sites()
            keep_short(self._link.log, LOG_BYTES)
            self._look(run_id)
        try:
            self._link.check(run_id)
        except NanofedError as error:
            if self._link.alive:
                raise
            raise NanofedError("the SuperLink died") from error

    def _look(self, run_id: int) -> None:
        """Look whether the SuperLink, its database and its processes are there.

        Flower notices a killed round loop by its missing heartbeats, which takes a minute; a killed launcher, not at all.

        Raises:
            NanofedError: One of them is not.
        """
        if not self._link.alive:
            raise NanofedError("the SuperLink died")
        if _identity(self._database) != self._database_file:
            self._link.stop()
            raise NanofedError(f"{self._database}, which the SuperLink was using, was removed or replaced")
        if self._is_gone(LAUNCHER):
            self._link.stop()
            raise NanofedError("the SuperLink's launcher died")
        if self._is_gone(LOOP):
            self._link.command("stop", str(run_id), LINK, check=False)
            raise NanofedError("the round loop died")

    def _is_gone(self, word: str) -> bool:
        """Tell whether a process of the SuperLink was there once and has not been for `GONE_SECONDS`."""
        if marked(self._link.marker, word):
            self._seen[word] = time.monotonic()
        return time.monotonic() - self._seen.get(word, math.inf) >= GONE_SECONDS

    def stop(self) -> None:
        """Stop everything."""
        with undisturbed():
            self._link.stop()
            kill_marked(self._link.marker)


def _identity(path: Path) -> int:
    """Return which file a path names, 0 where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0
