"""The code that a site takes up from bundles: what a trusted key has signed, newer than all that it has signed before."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

import nanofed
from nanofed import runtime
from nanofed.federated.wire.signature import DIGEST, PACKAGE, SOURCE, Signature, digest, read_trusted
from nanofed.files import sync_folder, write_atomically

logger = logging.getLogger(__name__)

ACCEPTED = "accepted.json"  # the newest number and its digest, kept for good
NEXT = "next"  # what the site has yet to start anew with
TRIAL = (
    "import nanofed.cli.site, nanofed.federated.site.supervisor, nanofed.federated.site.worker; print(nanofed.__file__)"
)
TRIAL_SECONDS = 300.0  # the first import of torch from a cold disk


class Untrusted(Exception):
    """A signature that does not make this site run a bundle; the message says why."""


class Code:
    """The folder of unpacked bundles: each in a folder named after its digest, private to this user.

    Every message's process of a site may write here, and be killed at it.

    Args:
        folder: where.
        trusted: file of the public key.
    """

    def __init__(self, folder: Path, trusted: Path) -> None:
        self.folder = folder
        self.trusted = trusted
        self._unusable: set[str] = set()

    def take(self, files: Mapping[str, bytes], signed: bytes | None) -> Signature:
        """Unpack a bundle that is signed, and leave word that the site is to go on with it.

        Args:
            files: its sources, by name.
            signed: its signature's file.

        Raises:
            Untrusted: it is not signed, by another key, for other files, or older than what this site has run; it cannot be kept.
        """
        signature = self._check(files, signed)
        try:
            with self._lock():
                self._accept(signature)
                self._unpack(files, signature)
                self._write(NEXT, signature.digest)
        except (OSError, ValueError) as error:
            raise Untrusted(f"it is signed, and {self.folder} cannot be used for it: {error}") from error
        return signature

    def note(self, files: Mapping[str, bytes], signed: bytes | None) -> None:
        """Take note that the code that runs here is signed, if it is: none that was signed before it is taken from now on."""
        if signed is None:
            return
        try:
            signature = self._check(files, signed)
            with self._lock():
                self._accept(signature)
        except (Untrusted, OSError, ValueError) as error:  # it runs: it is what this site was started with
            logger.warning("the signature of the code that runs here: %s", error)

    def begin(self) -> None:
        """Forget what an earlier site has left: a site begins with the nanofed that it was started with."""
        (self.folder / NEXT).unlink(missing_ok=True)
        running = Path(nanofed.__file__).parent.parent
        for left in self.folder.glob("*/"):
            if left != running:
                shutil.rmtree(left, ignore_errors=True)

    def following(self) -> Path | None:
        """Return the folder to go on with, to be first on the path, where there is word of one that is whole and starts."""
        try:
            folder = self._next()
        except OSError:  # it is being written: there is another look
            return None
        if folder is None or not self._starts(folder):
            return None
        return folder

    def is_whole(self, folder: Path) -> bool:
        """Tell whether a folder of a bundle holds what its name says."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
        return digest(files) == folder.name

    def _check(self, files: Mapping[str, bytes], signed: bytes | None) -> Signature:
        if signed is None:
            raise Untrusted("it is not signed")
        try:
            signature = Signature.from_json(signed)
        except ValueError as error:
            raise Untrusted(str(error)) from error
        if not signature.verify(read_trusted(self.trusted)):
            raise Untrusted(f"it is not signed by the key that this site trusts ({self.trusted})")
        if signature.digest != digest(files):
            raise Untrusted("its signature is that of another bundle")
        if strange := [name for name in files if not SOURCE.fullmatch(name)]:
            raise Untrusted(f"it is signed, and holds what is no source of {PACKAGE}: {strange[0]!r:.100}")
        return signature

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(self.folder / ".lock")

    def _accept(self, signature: Signature) -> None:
        """Raise the number that all further ones have to reach."""
        path, newest, of = self.folder / ACCEPTED, 0, signature.digest
        if path.exists():
            try:
                plain = json.loads(path.read_bytes())
                newest, of = int(plain["number"]), str(plain["digest"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}); deleted, it no longer keeps older code of the same key away"
                ) from error
        if signature.number < newest:
            raise Untrusted(f"its number {signature.number} is older than {newest}, which this site has run")
        if signature.number == newest and signature.digest != of:
            raise Untrusted(
                f"its number {newest} is that of other code, which this site has run: it is to be signed again"
            )
        if signature.number > newest:
            self._write(ACCEPTED, json.dumps({"number": signature.number, "digest": signature.digest}))

    def _next(self) -> Path | None:
        word = self.folder / NEXT
        if not word.exists():
            return None
        name = word.read_text(errors="replace").strip()
        if not DIGEST.fullmatch(name) or name in self._unusable:
            word.unlink(missing_ok=True)
            return None
        folder = self.folder / name
        if not self.is_whole(folder):
            word.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("%s is damaged: it is not run, and unpacked anew when it comes again", folder)
            return None
        return folder

    def _starts(self, folder: Path) -> bool:
        """Try whether a nanofed can be imported here, and is the one that is: a site that ends for it does not come back."""
        environment = runtime.environment(PYTHONPATH=runtime.python_path(folder))
        try:
            tried = subprocess.run(
                runtime.python("-c", TRIAL),
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TRIAL_SECONDS,
                check=False,
            )
            said = (tried.stderr if tried.returncode else tried.stdout).strip().splitlines() or ["it said nothing"]
            if tried.returncode == 0 and Path(said[-1]).parent.parent == folder:
                return True
            reason = said[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        self._unusable.add(folder.name)
        logger.error("the signed nanofed in %s does not start here, so this site stays what it is: %s", folder, reason)
        return False

    def _unpack(self, files: Mapping[str, bytes], signature: Signature) -> None:
        final = self.folder / signature.digest
        if final.exists():
            if self.is_whole(final):  # it may be about to be run
                return
            shutil.rmtree(final)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix="."))  # mode 0700
        try:
            for name, content in files.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.folder)

    def _write(self, name: str, content: str) -> None:
        write_atomically(self.folder / name, content)
