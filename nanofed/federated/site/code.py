"""The code that a site takes up from bundles: what a trusted key has signed, newer than all that it has signed before."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nanofed.federated.wire.signature import PACKAGE, SOURCE, Signature, digest, read_trusted
from nanofed.training.checkpoint_files import sync_folder

logger = logging.getLogger(__name__)

ACCEPTED = "accepted.json"  # the newest number, kept for good
NEXT = "next"  # what the site has yet to start anew with


class Untrusted(Exception):
    """A signature that does not make this site run a bundle; the message says why."""


class Code:
    """The folder of unpacked bundles: each in a folder named after its digest, private to this user.

    Args:
        folder: where.
        trusted: file of the public key.
    """

    def __init__(self, folder: Path, trusted: Path) -> None:
        self.folder = folder
        self.trusted = trusted

    def take(self, files: Mapping[str, bytes], signed: bytes | None) -> Signature:
        """Unpack a bundle that is signed, and leave word that the site is to go on with it.

        Args:
            files: its sources, by name.
            signed: its signature's file.

        Raises:
            Untrusted: it is not signed, by another key, for other files, or older than what this site has run; it cannot be kept.
        """
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
        try:
            newest = self._newest()
            if signature.number < newest:
                raise Untrusted(f"its number {signature.number} is older than {newest}, which this site has run")
            self._unpack(files, signature)
            self._write(ACCEPTED, json.dumps({"number": signature.number, "digest": signature.digest}))
            self._write(NEXT, signature.digest)
        except (OSError, ValueError, KeyError) as error:
            raise Untrusted(f"it is signed, and {self.folder} cannot be used for it: {error}") from error
        return signature

    def begin(self) -> None:
        """Forget what an earlier site has left word of: a site begins with the nanofed that it was started with."""
        (self.folder / NEXT).unlink(missing_ok=True)

    def following(self) -> Path | None:
        """Return the folder to go on with, to be first on the path, where there is word of one; its files are checked again."""
        word = self.folder / NEXT
        if not word.exists():
            return None
        name = word.read_text().strip()
        folder = self.folder / name
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
        if not name or digest(files) != name:
            word.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("%s is damaged: it is not run, and unpacked anew when it comes again", folder)
            return None
        return folder

    def _newest(self) -> int:
        path = self.folder / ACCEPTED
        return int(json.loads(path.read_text())["number"]) if path.exists() else 0

    def _unpack(self, files: Mapping[str, bytes], signature: Signature) -> None:
        final = self.folder / signature.digest
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix="."))  # mode 0700
        try:
            for name, content in files.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            if final.exists():  # perhaps damaged since
                shutil.rmtree(final)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.folder)

    def _write(self, name: str, content: str) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(content)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)
