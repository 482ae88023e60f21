"""A site runs only the nanofed that is installed on it: bundles are compared with it byte by byte, and never executed."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable

import pytest

from nanofed.federated.deploy.superlink import write_app
from nanofed.federated.wire.bundle import BundleError, check_bundle, code_hash

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from flwr.cli.build import build_fab_from_disk

    app = tmp_path_factory.mktemp("app")
    write_app(app)
    return build_fab_from_disk(app)


def changed(bundle: bytes, change: Callable[[dict[str, bytes]], object]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_our_own_bundle_is_run(bundle: bytes) -> None:
    check_bundle(bundle)
    check_bundle(changed(bundle, lambda files: files.update({"pyproject.toml": files["pyproject.toml"] + b"\n"})))


APP = "nanofed/federated/site/client.py"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda files: files.update({APP: files[APP] + b"#"}), APP),
        (lambda files: files.pop(APP), APP),
        (lambda files: files.update({"nanofed/more.py": b""}), "nanofed/more.py"),
        (lambda files: files.update({"sitecustomize.py": b"import os"}), "sitecustomize.py"),
        (lambda files: files.update({"nanofed/../evil.py": b""}), "evil.py"),
        (lambda files: files.update({"torch/__init__.py": b""}), "torch/__init__.py"),
    ],
    ids=["a byte more", "a file less", "a file more", "beside it", "outside", "another package"],
)
def test_another_bundle_is_refused(bundle: bytes, change: Callable[[dict[str, bytes]], object], named: str) -> None:
    with pytest.raises(BundleError, match="this site runs only the nanofed that is installed here") as raised:
        check_bundle(changed(bundle, change))
    assert named in str(raised.value)
    here, there = re.findall(r"\b[0-9a-f]{16}\b", str(raised.value))
    assert here == code_hash()[:16] != there


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        check_bundle(content)


def test_damaged_bundles_are_refused_or_the_same(bundle: bytes, count: Callable[[int, int], int]) -> None:
    import random

    generator = random.Random(0)
    refused = 0
    for _ in range(count(30, 1000)):
        content = bytearray(bundle)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        try:
            check_bundle(bytes(content))
        except BundleError:
            refused += 1
    assert refused  # some flips hit what does not count, such as a time
