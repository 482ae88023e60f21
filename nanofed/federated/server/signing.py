"""The key that signs nanofed's sources, so that sites which trust it take them up without hands."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.server.keys import write_private
from nanofed.federated.wire.signature import SIGNATURE, Signature, digest, installed

KEY, PUBLIC_KEY = "code.key", "code.pub"


def sign(folder: Path) -> Signature:
    """Sign the nanofed that is running, with the key of a folder, which is made if it is not there.

    It writes `code.key` (private), `code.pub` (what sites are given) and `signature.json` (what the server sends along). The
    private key is needed here only, so it may be kept on another machine with the same nanofed.

    Raises:
        ConfigError: the key cannot be read, or does not belong to the public one.
        NanofedError: the folder cannot be written.
    """
    key_file, public_file, signature_file = folder / KEY, folder / PUBLIC_KEY, folder / SIGNATURE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if key_file.exists():
            key = _read(key_file)
        elif public_file.exists():
            raise ConfigError(f"{public_file} is there and {key_file} is not: put it back, or take another folder")
        else:
            key = Ed25519PrivateKey.generate()
            form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            write_private(key_file, key.private_bytes(serialization.Encoding.PEM, form, none))
        form_of_public = serialization.PublicFormat.SubjectPublicKeyInfo
        public = key.public_key().public_bytes(serialization.Encoding.PEM, form_of_public)
        if public_file.exists() and public_file.read_bytes() != public:
            raise ConfigError(
                f"{key_file} is not the key of {public_file}: put the right one back, or take another folder"
            )
        write_private(public_file, public)
        before = _number(signature_file)
        signature = Signature.make(installed(), max(int(time.time()), before + 1), key)
        write_private(signature_file, signature.to_json().encode())
    except OSError as error:
        raise NanofedError(f"the signature cannot be written to {folder}: {error.strerror or error}") from error
    return signature


def signature_in(folder: Path) -> Signature | None:
    """Return the signature in a folder of keys; None where there is none.

    Raises:
        ConfigError: it cannot be read, or is of other sources than those that are running.
    """
    path = folder / SIGNATURE
    if not path.exists():
        return None
    try:
        signature = Signature.from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    if signature.digest != (here := digest(installed())):
        raise ConfigError(
            f"{path} is of the code {signature.digest[:16]}, and the nanofed that is running is {here[:16]}: sign it with "
            f"`nanofed server sign {folder}`, or delete the file to serve only sites that have the same code"
        )
    return signature


def _number(path: Path) -> int:
    """Return the number of the last signature, 0 where there is none that can be read."""
    try:
        return Signature.from_json(path.read_bytes()).number
    except (OSError, ValueError):
        return 0


def _read(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} cannot be read as a private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds another kind of key than `nanofed server sign` makes")
    return key
