"""What a site starts in place of Flower's `flwr-clientapp`: it runs no bundle but the nanofed that is installed here.

Whoever can submit a run to the SuperLink decides what the sites run; so a bundle is compared with the installed package, file
by file, and its own code is never executed: the message is handled by the installed one. A bundle that a key has signed which
the site was told to trust is unpacked, and the whole site starts anew with it (`site.code`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nanofed.federated.site.code import Code, Untrusted
from nanofed.federated.wire.signature import PACKAGE, SIGNATURE, installed

logger = logging.getLogger(__name__)

LISTING = ".info/CONTENT"  # Flower's
SETTINGS = "pyproject.toml"
MAX_BYTES = 64 << 20  # unpacked


class BundleError(Exception):
    """A bundle that this site does not run."""


def check_bundle(content: bytes, code: Code | None = None) -> None:
    """Refuse a bundle whose sources are not those of the nanofed that is running.

    Args:
        content: the bundle, a zip file.
        code: where signed bundles go, for a site that trusts a key.

    Raises:
        BundleError: no bundle, other files than the package's, or one that differs; also where it is signed, and the site
            starts anew with it: this process is of the code before.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise BundleError(f"the bundle is larger than {MAX_BYTES:,} bytes")
            files = {name: archive.read(name) for name in archive.namelist() if name not in (LISTING, SETTINGS)}
    except BundleError:
        raise
    except Exception as error:  # foreign bytes: zipfile raises a dozen kinds
        raise BundleError(f"the bundle cannot be read: {error}") from error
    here, signed = installed(), files.pop(SIGNATURE, None)
    if files == here:
        if code is not None:
            code.note(files, signed)
        return
    differing = sorted({name for name, source in files.items() if here.get(name) != source} | (here.keys() - files))
    reason = (
        f"this site runs only the nanofed that is installed here, code {code_hash(here)[:16]}: the bundle's is "
        f"{code_hash(files)[:16]} and differs in {len(differing)} files ({', '.join(differing[:3])}); "
        "server and sites need the same version"
    )
    if code is None:
        raise BundleError(reason)
    try:
        signature = code.take(files, signed)
    except Untrusted as refusal:
        raise BundleError(f"{refusal}; unsigned, {reason}") from refusal
    raise BundleError(f"this site starts anew with code {code_hash(files)[:16]}, signed as number {signature.number}")


def code_hash(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over a bundle's sources: of our own bundle, the one that a site says of itself in its hello."""
    digest = hashlib.sha256()
    for name in sorted(files, key=PurePosixPath):
        digest.update(name.removeprefix(f"{PACKAGE}/").encode() + b"\0")
        digest.update(files[name])
    return digest.hexdigest()


def guard(run_clientapp: Any, code: Code | None = None) -> None:
    """Make Flower's client process check its bundle instead of installing it, and load the installed ClientApp.

    Args:
        run_clientapp: Flower's module of that name.
        code: where signed bundles go, for a site that trusts a key.

    Raises:
        BundleError: this Flower is another one than the guard was made for: nothing may run unchecked.
    """
    if not all(hasattr(run_clientapp, name) for name in ("install_from_fab", "get_load_client_app_fn")):
        raise BundleError("this version of Flower loads bundles in another way: nanofed cannot check them")

    def check(content: bytes, *_: object, **__: object) -> None:
        check_bundle(content, code)

    def loader(*_: object, **__: object) -> Callable[[str, str, str], Any]:
        return lambda *_: importlib.import_module("nanofed.federated.site.app").client

    run_clientapp.install_from_fab = check
    run_clientapp.get_load_client_app_fn = loader


def main() -> None:
    """Handle one message, as `flwr-clientapp` does with the same arguments, and two of our own: --code and --trust.

    That command stands in a package whose import brings the SuperNode's database and web server along, a third of the time that
    this process takes to start (`bin/bench round`), so it is not gone through.
    """
    from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime import run_clientapp

    parser = argparse.ArgumentParser(prog="flwr-clientapp")
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser)
    parser.add_argument("--code", type=Path, help="folder for signed bundles")
    parser.add_argument("--trust", type=Path, help="public key of who signs them")
    args = parser.parse_args()
    guard(run_clientapp, Code(args.code, args.trust) if args.code and args.trust else None)
    certificates = validate_and_resolve_root_certificates(args.root_certificates, args.insecure)
    run_clientapp.run_clientapp(
        runtime_api_address=args.runtime_api_address,
        token=try_obtain_flwr_app_token(args),
        insecure=args.insecure,
        certificates=certificates,
        parent_pid=args.parent_pid,
        runtime_dependency_install=args.runtime_dependency_install,
    )


if __name__ == "__main__":
    main()
