"""A site runs only the nanofed that is installed on it: bundles are compared with it byte by byte, and never executed."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nanofed.federated.runtimes.deployment import CLIENT_APP, SERVER_APP
from nanofed.federated.runtimes.superlink import write_app
from nanofed.federated.site.bundle import BundleError, check_bundle, code_hash, guard
from nanofed.federated.wire.messages import code_hash as hash_of_hello
from nanofed.federated.wire.signature import installed

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from flwr.cli.build import build_fab_from_disk

    app = tmp_path_factory.mktemp("app")
    write_app(app, SERVER_APP, CLIENT_APP)
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
    assert code_hash(installed()) == hash_of_hello()


APP = "nanofed/federated/site/app.py"


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
    assert here == code_hash(installed())[:16] != there


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


def test_another_version_of_flower_runs_nothing() -> None:
    with pytest.raises(BundleError, match="cannot check"):
        guard(types.SimpleNamespace(install_from_fab=None))


def test_the_guard_takes_the_place_of_flowers_own_functions() -> None:
    """In a process of its own, as at a site; what it loads is light."""
    script = (
        "import sys\n"
        "from flwr.supernode.runtime import run_clientapp as flower\n"
        "from nanofed.federated.site.bundle import guard\n"
        "guard(flower)\n"
        "try:\n    flower.install_from_fab(b'', skip_prompt=True)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "app = flower.get_load_client_app_fn(default_app_ref='', app_path=None, multi_app=True)('a', 'b', 'c')\n"
        "print(type(app).__name__, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["BundleError", "ClientApp", "False"]


@pytest.mark.slow
def test_the_client_process_takes_the_arguments_of_flowers_and_loads_no_more_than_it_needs() -> None:
    script = (
        "import sys\n"
        "from nanofed.federated.site.bundle import main\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(*sorted({'torch', 'lightning', 'sqlalchemy', 'uvicorn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path("/"))
    *said, loaded = done.stdout.splitlines()
    assert loaded == "" and _options("\n".join(said)) - {"--code", "--trust"} == _options(_flowers_help())


def _flowers_help() -> str:
    command = "from flwr.supernode.cli import flwr_clientapp; flwr_clientapp()"
    return subprocess.run([sys.executable, "-c", command, "--help"], capture_output=True, text=True, check=True).stdout


def _options(said: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", said))
