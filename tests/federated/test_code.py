"""What a site takes up from signed bundles: of the key that it trusts, whole, newer than what it has run; nothing else."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pytest import CaptureFixture, LogCaptureFixture

from nanofed.cli import main
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.server import signing
from nanofed.federated.site import code as code_module
from nanofed.federated.site.bundle import BundleError, check_bundle
from nanofed.federated.site.code import Code, Untrusted
from nanofed.federated.site.options import site_options
from nanofed.federated.wire.signature import SIGNATURE, Signature, digest, installed, read_trusted
from tests.federated.test_bundle import bundle, changed
from tests.ranks import REPOSITORY

__all__ = ["bundle"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's

FILES = {"nanofed/__init__.py": b"", "nanofed/cli/site.py": b"print()\n"}
Sign = Callable[..., bytes]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    signing.sign(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def sign(keys: Path) -> Sign:
    key = signing._read(keys / "code.key")

    def sign(files: dict[str, bytes] = FILES, number: int = 7) -> bytes:
        return Signature.make(files, number, key).to_json().encode()

    return sign


@pytest.fixture
def code(keys: Path, tmp_path: Path) -> Code:
    return Code(tmp_path / "code", keys / "code.pub")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unpacked here is no whole nanofed."""
    monkeypatch.setattr(code_module, "TRIAL", "import nanofed; print(nanofed.__file__)")


@pytest.mark.usefixtures("starts")
def test_what_is_signed_is_unpacked_and_followed(code: Code, sign: Sign) -> None:
    assert code.following() is None
    assert code.take(FILES, sign()).number == 7
    folder = code.following()
    assert folder is not None and folder == code.folder / digest(FILES)
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")} == FILES
    assert stat.S_IMODE(code.folder.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    code.take(FILES, sign())  # the next message, before the site has looked
    assert code.following() == folder
    code.begin()
    assert code.following() is None, "a site begins with the nanofed that it was started with"


@pytest.mark.usefixtures("starts")
def test_an_older_one_is_not_taken_again(code: Code, sign: Sign) -> None:
    newer = {**FILES, "nanofed/more.py": b""}
    code.take(FILES, sign())
    code.take(newer, sign(newer, 8))
    code.begin()
    with pytest.raises(Untrusted, match="its number 7 is older than 8, which this site has run"):
        code.take(FILES, sign())
    assert code.following() is None
    with pytest.raises(Untrusted, match="its number 8 is that of other code"):
        code.take(FILES, sign(number=8))
    code.take(FILES, sign(number=9))  # what the operator goes back to, signed anew
    assert code.following() == code.folder / digest(FILES)


def test_what_runs_and_is_signed_counts_without_being_taken(code: Code, sign: Sign, caplog: LogCaptureFixture) -> None:
    code.note(FILES, None)
    code.note(FILES, b"")
    assert not code.folder.exists() and "no signature" in caplog.text
    code.note(FILES, sign(number=8))
    assert code.following() is None and not (code.folder / digest(FILES)).exists()
    with pytest.raises(Untrusted, match="its number 7 is older than 8"):
        code.take({**FILES, "nanofed/more.py": b""}, sign({**FILES, "nanofed/more.py": b""}))


@pytest.mark.parametrize(
    "source", [b"this is no Python", b"import of_a_package_that_is_not_here", b"raise SystemExit(3)"]
)
def test_what_does_not_start_is_not_followed(source: bytes, code: Code, sign: Sign, caplog: LogCaptureFixture) -> None:
    files = {**installed(), "nanofed/federated/site/worker.py": source}
    for _ in range(2):  # it comes with every message
        code.take(files, sign(files))
        assert code.following() is None
    assert caplog.text.count("does not start here, so this site stays what it is") == 1


@pytest.mark.parametrize("word", ["", "..", "0" * 63, "g" * 64, "/tmp"])
def test_word_of_no_bundle_costs_nothing(word: str, code: Code, sign: Sign) -> None:
    code.take(FILES, sign())
    (code.folder / "next").write_text(word)
    assert code.following() is None
    assert (code.folder / "accepted.json").exists() and (code.folder / digest(FILES)).exists()


@pytest.mark.slow
def test_two_processes_of_one_site_take_the_same_bundle(code: Code, sign: Sign) -> None:
    """Again and again, while a third one looks: whoever looks sees it whole."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nanofed.federated.site.code import Code\n"
        "from tests.federated.test_code import FILES\n"
        "for _ in range(50):\n    Code(Path(sys.argv[1]), Path(sys.argv[2])).take(FILES, sys.argv[3].encode())\n"
    )
    code.take(FILES, sign())
    command = [sys.executable, "-c", script, str(code.folder), str(code.trusted), sign().decode()]
    with subprocess.Popen(command, cwd=REPOSITORY) as one, subprocess.Popen(command, cwd=REPOSITORY) as other:
        while one.poll() is None or other.poll() is None:
            assert code.is_whole(code.folder / digest(FILES))
            time.sleep(0.01)
    assert one.returncode == other.returncode == 0


def test_a_site_begins_without_what_earlier_ones_have_left(code: Code, sign: Sign) -> None:
    code.take(FILES, sign())
    (code.folder / ".killed").mkdir()
    code.begin()
    assert sorted(path.name for path in code.folder.iterdir() if path.is_dir()) == []
    assert (code.folder / "accepted.json").exists()


@pytest.mark.parametrize(
    ("files", "how", "why"),
    [
        (FILES, lambda signed: None, "not signed"),
        (FILES, lambda signed: b"", "no signature of a bundle"),
        (FILES, lambda signed: b"[" * 100_000, "no signature of a bundle"),
        (FILES, lambda signed: b'{"digest": 1, "number": 1, "signature": ""}', "no signature of a bundle"),
        (FILES, lambda signed: b'{"digest": "\\ud800", "number": 1, "signature": ""}', "no signature of a bundle"),
        (FILES, lambda signed: signed.replace(b'"number": 7', b'"number": 7.0'), "no signature of a bundle"),
        (FILES, lambda signed: signed.replace(b'"number": 7', b'"number": 8'), "not signed by the key"),
        ({**FILES, "nanofed/more.py": b""}, lambda signed: signed, "that of another bundle"),
        ({"nanofed/__init__.py": b"", "nanofed/cli/site.py": b"print( )"}, lambda signed: signed, "of another bundle"),
    ],
)
def test_what_is_not_signed_leaves_nothing(
    files: dict[str, bytes], how: Callable[[bytes], bytes | None], why: str, code: Code, sign: Sign
) -> None:
    with pytest.raises(Untrusted, match=why):
        code.take(files, how(sign()))
    assert not code.folder.exists() and code.following() is None


def test_another_key_is_not_trusted(code: Code) -> None:
    signed = Signature.make(FILES, 7, Ed25519PrivateKey.generate()).to_json().encode()
    with pytest.raises(Untrusted, match="not signed by the key that this site trusts"):
        code.take(FILES, signed)
    mine = Signature.from_json(signed)
    assert not replace(mine, signature=b"").verify(read_trusted(code.trusted))


@pytest.mark.parametrize(
    "name",
    ["../evil.py", "nanofed/../../evil.py", "/evil.py", "nanofed/evil.so", "torch/__init__.py", "nanofed/.py", ""],
)
def test_even_signed_a_bundle_writes_nothing_but_sources_of_nanofed(name: str, code: Code, sign: Sign) -> None:
    files = {**FILES, name: b""}
    with pytest.raises(Untrusted, match="holds what is no source of nanofed"):
        code.take(files, sign(files))
    assert not code.folder.exists()


def test_no_two_sets_of_files_have_one_digest() -> None:
    assert (
        digest({"a": b"b\0c", "d": b""})
        != digest({"a": b"", "b\0c": b"", "d": b""})
        != digest({"ab": b"\0c", "d": b""})
    )
    assert digest({"a": b"1", "b": b"2"}) == digest({"b": b"2", "a": b"1"}) != digest({"a": b"2", "b": b"1"})


def test_what_was_damaged_since_is_not_run(code: Code, sign: Sign, caplog: LogCaptureFixture) -> None:
    code.take(FILES, sign())
    (code.folder / digest(FILES) / "nanofed" / "cli" / "site.py").write_bytes(b"print(1)\n")
    assert code.following() is None and "is damaged" in caplog.text
    code.take(FILES, sign())
    assert code.is_whole(code.folder / digest(FILES))


def test_a_folder_that_cannot_be_used_is_a_refusal(code: Code, sign: Sign) -> None:
    code.folder.mkdir()
    (code.folder / "accepted.json").write_text("{")
    with pytest.raises(Untrusted, match="cannot be used for it"):
        code.take(FILES, sign())
    (code.folder / "accepted.json").unlink()
    shutil.rmtree(code.folder)
    code.folder.write_text("a file")
    with pytest.raises(Untrusted, match="cannot be used for it"):
        code.take(FILES, sign())


@pytest.mark.slow
def test_a_bundle_is_taken_only_where_it_differs_and_a_key_is_trusted(bundle: bytes, code: Code, sign: Sign) -> None:
    newer = {**installed(), "nanofed/more.py": b""}
    signed = {SIGNATURE: sign(newer)}

    def more(files: dict[str, bytes]) -> None:
        files.update({"nanofed/more.py": b""} | signed)

    check_bundle(changed(bundle, lambda files: files.update(signed)), code)
    assert not code.folder.exists(), "the same sources need no signature, whatever there is of one"
    check_bundle(changed(bundle, lambda files: files.update({SIGNATURE: sign(installed(), 6)})), code)
    assert json.loads((code.folder / "accepted.json").read_text())["number"] == 6
    with pytest.raises(BundleError, match="this site runs only the nanofed that is installed here"):
        check_bundle(changed(bundle, more))
    with pytest.raises(BundleError, match=r"this site starts anew with code .*, signed as number 7"):
        check_bundle(changed(bundle, more), code)
    assert code.following() == code.folder / digest(newer), "it starts"
    with pytest.raises(BundleError, match="it is not signed; unsigned, this site runs only"):
        check_bundle(changed(bundle, lambda files: files.update({"nanofed/more.py": b""})), code)


class TestSigning:
    def test_numbers_rise_and_the_key_stays(self, keys: Path) -> None:
        before = (keys / "code.key").read_bytes()
        first = signing.signature_in(keys)
        second = signing.sign(keys)
        assert first is not None and second.number > first.number and second.verify(read_trusted(keys / "code.pub"))
        assert second.digest == digest(installed()) and signing.signature_in(keys) == second
        assert (keys / "code.key").read_bytes() == before
        assert stat.S_IMODE((keys / "code.key").stat().st_mode) == 0o600

    def test_a_signature_of_other_code_is_an_error_of_the_operator(self, keys: Path, sign: Sign) -> None:
        (keys / SIGNATURE).write_bytes(sign())
        with pytest.raises(ConfigError, match=r"is of the code .* sign it with `nanofed server sign"):
            signing.signature_in(keys)
        (keys / SIGNATURE).write_bytes(b"{}")
        with pytest.raises(ConfigError, match="cannot be used"):
            signing.signature_in(keys)
        (keys / SIGNATURE).unlink()
        assert signing.signature_in(keys) is None

    def test_keys_that_cannot_be(self, keys: Path) -> None:
        private = (keys / "code.key").read_bytes()
        (keys / "code.key").unlink()
        with pytest.raises(ConfigError, match="put it back"):
            signing.sign(keys)
        signing.sign(keys.parent / "other")
        shutil.copy(keys.parent / "other" / "code.key", keys / "code.key")
        with pytest.raises(ConfigError, match=r"is not the key of .*code.pub"):
            signing.sign(keys)
        (keys / "code.key").write_text("no key")
        with pytest.raises(ConfigError, match="cannot be read as a private key"):
            signing.sign(keys)
        (keys / "code.key").write_bytes(private)
        (keys / "file").write_text("")
        with pytest.raises(NanofedError, match="cannot be written"):
            signing.sign(keys / "file")

    def test_by_the_command(self, tmp_path: Path, capsys: CaptureFixture[str]) -> None:
        assert main(["server", "sign", str(tmp_path / "keys")]) == 0
        said = capsys.readouterr().out
        signature = json.loads((tmp_path / "keys" / SIGNATURE).read_text())
        assert f"signed code {signature['digest'][:16]} as number {signature['number']}" in said
        assert "nanofed site … --trust code.pub" in said

    @pytest.mark.parametrize("content", [None, "no key", "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"])
    def test_a_site_with_a_key_that_is_none(self, content: str | None, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "code.pub").write_text(content)
        with pytest.raises(ConfigError, match="cannot be read as the public key"):
            site_options("127.0.0.1:9092", "lab-a", state=tmp_path, trust=tmp_path / "code.pub")
