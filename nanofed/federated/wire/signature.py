"""What says that a bundle of nanofed's sources may be run where another nanofed is installed: a number and a key's signature."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import nanofed
from nanofed.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PACKAGE = "nanofed"
SIGNATURE = "signature.json"  # in a bundle
SOURCE = re.compile(rf"{PACKAGE}(/[A-Za-z0-9_]{{1,64}}){{1,8}}\.py")
DIGEST = re.compile("[0-9a-f]{64}")
MAX_NUMBER = 1 << 62


@cache
def installed() -> dict[str, bytes]:
    """Return the source files of the nanofed package that is running, by their names in a bundle."""
    root = Path(nanofed.__file__).parent
    return {f"{PACKAGE}/{path.relative_to(root).as_posix()}": path.read_bytes() for path in root.rglob("*.py")}


def digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over names and contents, in a form in which no two sets of files are the same."""
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Signature:
    """A signature under a bundle's sources.

    Attributes:
        digest: of the sources.
        number: larger than that of any older bundle of the same key, so that an old one that is sent again is known as such.
        signature: Ed25519 (RFC 8032), of both.
    """

    digest: str
    number: int
    signature: bytes

    @classmethod
    def make(cls, files: Mapping[str, bytes], number: int, key: Ed25519PrivateKey) -> Self:
        """Sign sources."""
        return cls(of := digest(files), number, key.sign(_signed(of, number)))

    def verify(self, key: Ed25519PublicKey) -> bool:
        """Tell whether `key` made it; that `digest` is that of the files is for the caller to see."""
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(self.signature, _signed(self.digest, self.number))
        except InvalidSignature:
            return False
        return True

    def to_json(self) -> str:
        """Return what stands in the file."""
        signature = base64.b64encode(self.signature).decode()
        return json.dumps({"digest": self.digest, "number": self.number, "signature": signature}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read it.

        Raises:
            ValueError: it is none.
        """
        try:
            plain = json.loads(text)
            of, number, signature = plain["digest"], plain["number"], plain["signature"]
            if not DIGEST.fullmatch(of) or type(number) is not int or not 0 < number < MAX_NUMBER:
                raise ValueError("a digest and a number are expected")
            return cls(of, number, base64.b64decode(signature, validate=True))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"no signature of a bundle: {error}") from error


def _signed(of: str, number: int) -> bytes:
    return f"nanofed bundle {number} {of}".encode()


def read_trusted(path: Path) -> Ed25519PublicKey:
    """Return the public key that `nanofed server sign` wrote.

    Raises:
        ConfigError: the file cannot be read as one.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} cannot be read as the public key of bundles: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} holds another kind of key than the one that `nanofed server sign` writes: code.pub")
    return key
