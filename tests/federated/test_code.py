"""What a site takes up from signed bundles: of the key that it trusts, whole, newer than what it has run; nothing else."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pytest import CaptureFixture, LogCaptureFixture

from nanofed.cli import main
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.server import signing
from nanofed.federated.site.bundle import BundleError, check_bundle
from nanofed.federated.site.code import Code, Untrusted
from nanofed.federated.site.options import site_options
from nanofed.federated.wire.signature import SIGNATURE, Signature, digest, installed, read_trusted
from tests.federated.test_bundle import bundle, changed

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


def test_an_older_one_is_not_taken_again(code: Code, sign: Sign) -> None:
    newer = {**FILES, "nanofed/more.py": b""}
    code.take(FILES, sign())
    code.take(newer, sign(newer, 8))
    code.begin()
    with pytest.raises(Untrusted, match="its number 7 is older than 8, which this site has run"):
        code.take(FILES, sign())
    assert code.following() is None
    code.take(FILES, sign(number=9))  # what the operator goes back to, signed anew
    assert code.following() == code.folder / digest(FILES)


@pytest.mark.parametrize(
    ("files", "how", "why"),
    [
        (FILES, lambda signed: None, "not signed"),
        (FILES, lambda signed: b"", "no signature of a bundle"),
        (FILES, lambda signed: b"[" * 100_000, "no signature of a bundle"),
        (FILES, lambda signed: b'{"digest": 1, "number": 1, "signature": ""}', "no signature of a bundle"),
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
    assert code.following() is not None


def test_a_folder_that_cannot_be_used_is_a_refusal(code: Code, sign: Sign) -> None:
    code.folder.mkdir()
    (code.folder / "accepted.json").write_text("{")
    with pytest.raises(Untrusted, match="cannot be used for it"):
        code.take(FILES, sign())
    (code.folder / "accepted.json").unlink()
    code.folder.rmdir()
    code.folder.write_text("a file")
    with pytest.raises(Untrusted, match="cannot be used for it"):
        code.take(FILES, sign())


def test_a_bundle_is_taken_only_where_it_differs_and_a_key_is_trusted(bundle: bytes, code: Code, sign: Sign) -> None:
    newer = {**installed(), "nanofed/more.py": b""}
    signed = {SIGNATURE: sign(newer)}

    def more(files: dict[str, bytes]) -> None:
        files.update({"nanofed/more.py": b""} | signed)

    check_bundle(changed(bundle, lambda files: files.update(signed)), code)
    assert not code.folder.exists(), "the same sources need no signature, whatever there is of one"
    with pytest.raises(BundleError, match="this site runs only the nanofed that is installed here"):
        check_bundle(changed(bundle, more))
    with pytest.raises(BundleError, match=r"this site starts anew with code .*, signed as number 7"):
        check_bundle(changed(bundle, more), code)
    assert code.following() == code.folder / digest(newer)
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
