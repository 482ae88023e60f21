"""Certificates and keys: what they are for, who may read them, and that none is overwritten."""

from __future__ import annotations

import datetime
import errno
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy import keys as keys_module
from nanofed.federated.deploy.keys import Keys, init, load, read_sites
from nanofed.federated.site.options import site_options

HOSTS = ["fed.example.org", "10.1.2.3", "2001:db8::7"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers_over_tls(keys: Keys, ca: Path, host: str) -> str:
    """Shake hands with a server that has the keys, as a client that trusts `ca` and calls it `host`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys.certificate, keys.key)
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as channel:
                channel.sendall(b"hello")
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=host) as channel:
            return channel.recv(5).decode()
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1"])
def test_certificate_is_for_every_host_and_loopback(tmp_path: Path, host: str) -> None:
    keys = init(tmp_path, HOSTS, ["lab-a"])
    assert answers_over_tls(keys, keys.handout("lab-a") / "ca.pem", host) == "hello"


def test_certificate_is_for_no_other_host_and_of_no_other_authority(tmp_path: Path) -> None:
    keys, other = init(tmp_path / "a", HOSTS, []), init(tmp_path / "b", HOSTS, [])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        answers_over_tls(keys, keys.ca, "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        answers_over_tls(keys, other.ca, "localhost")


def test_private_parts_are_for_their_owner_only(tmp_path: Path) -> None:
    init(tmp_path / "keys", HOSTS, ["lab-a"])
    for path in [tmp_path / "keys", *(tmp_path / "keys").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_site_is_added_and_nothing_else_changes(tmp_path: Path) -> None:
    init(tmp_path, HOSTS, ["lab-a"])
    before = contents(tmp_path)
    keys = init(tmp_path, HOSTS[:1], ["lab-a", "lab-b"])
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == set(keys.created)
    assert set(keys.created) == {"sites/lab-b.pub", "handout/lab-b/ca.pem", "handout/lab-b/site.key"}
    assert keys.names() == ["lab-a", "lab-b"]


def test_force_renews_the_server_and_the_named_sites_and_keeps_the_authority(tmp_path: Path) -> None:
    init(tmp_path, HOSTS, ["lab-a", "lab-b"])
    before = contents(tmp_path)
    keys = init(tmp_path, ["new.example.org"], ["lab-b"], force=True)
    changed = {name for name, content in contents(tmp_path).items() if before[name] != content}
    assert changed == {"server.pem", "server.key", "sites/lab-b.pub", "handout/lab-b/site.key"}
    assert keys.hosts() == ["new.example.org", "localhost", "127.0.0.1"]


def test_a_certificate_that_lacks_a_host_is_not_taken_for_one_that_has_it(tmp_path: Path) -> None:
    init(tmp_path, HOSTS, ["lab-a"])
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"server.pem is not for other.example.org: add --force"):
        init(tmp_path, [*HOSTS, "other.example.org"], ["lab-b"])
    assert contents(tmp_path) == before


NO_SITES = ["", ".", "../a", "a/b", "-a", "a b", "ä", "a" * 65, "a\n"]
NO_HOSTS = ["", "https://a.org", "a.org:443", "a..org", "-a.org", "10.1.2.999", "ä.org", "*"]


@pytest.mark.parametrize(
    ("hosts", "sites", "says"),
    [
        *((HOSTS, [site], "no name for a site") for site in NO_SITES),
        *(([host], [], "neither a host's name nor an address") for host in NO_HOSTS),
        (HOSTS, ["lab-a", "lab-a"], "lab-a is named twice"),
    ],
)
def test_a_site_has_one_plain_name_and_a_host_a_name_or_an_address(
    tmp_path: Path, hosts: list[str], sites: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        init(tmp_path / "keys", hosts, sites)
    assert not (tmp_path / "keys").exists()


def test_days_are_kept_and_their_end_is_warned_of(tmp_path: Path) -> None:
    keys = init(tmp_path, HOSTS, ["lab-a"], days=20)
    assert (keys.expiry() - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400 == pytest.approx(20, abs=0.01)
    assert keys.warning(days=10) is None
    assert re.search(r"server.pem ends in 20 days \(\d{4}-\d\d-\d\d\).*--force", str(keys.warning()))
    with pytest.raises(ConfigError, match="1 to 3650 days, not 0"):
        init(tmp_path, HOSTS, [], days=0)


def test_an_ended_certificate_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    with monkeypatch.context() as patch:
        patch.setattr(keys_module, "_now", lambda: past)
        keys = init(tmp_path, HOSTS, ["lab-a"])
    with pytest.raises(ConfigError, match=r"server.pem ended 35 days ago .*--force"):
        load(tmp_path)
    init(tmp_path, HOSTS, [], force=True)
    assert load(tmp_path).warning(days=300) is None
    assert keys.names() == ["lab-a"]


def test_an_authority_that_is_not_whole_signs_nothing(tmp_path: Path) -> None:
    keys = init(tmp_path / "a", HOSTS, ["lab-a"])
    other = init(tmp_path / "b", HOSTS, [])
    keys.ca_key.rename(tmp_path / "elsewhere")
    assert init(keys.folder, HOSTS, ["lab-b"]).names() == ["lab-a", "lab-b"]  # a site needs no signature
    with pytest.raises(ConfigError, match=r"ca.key is needed to issue a server certificate"):
        init(keys.folder, HOSTS, [], force=True)
    keys.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(ConfigError, match=r"ca.key is not the key of .*ca.pem"):
        init(keys.folder, HOSTS, [], force=True)
    keys.ca.unlink()
    with pytest.raises(ConfigError, match=r"ca.key is there and .*ca.pem is not"):
        init(keys.folder, HOSTS, [])


def test_load_names_what_is_missing_or_open(tmp_path: Path) -> None:
    keys = init(tmp_path, HOSTS, [])
    with pytest.raises(ConfigError, match="holds no site's key"):
        load(tmp_path)
    init(tmp_path, HOSTS, ["lab-a"])
    assert load(tmp_path).folder == tmp_path
    keys.key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"server.key can be read by others: chmod 600"):
        load(tmp_path)
    keys.key.unlink()
    with pytest.raises(ConfigError, match=r"server.key is missing: `nanofed server init`"):
        load(tmp_path)


def test_site_keys_are_read_by_the_key_that_a_supernode_sends(tmp_path: Path) -> None:
    keys = init(tmp_path, HOSTS, ["lab-a", "lab-b"])
    private = serialization.load_ssh_private_key(keys.private_key("lab-a").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert read_sites(keys.sites)[0][pem] == "lab-a"


def test_keys_that_cannot_be_used_are_named_and_keep_nobody_in_or_out(tmp_path: Path) -> None:
    keys = init(tmp_path, HOSTS, ["lab-a", "lab-b", "lab-z"])
    keys.public_key("lab-b").unlink()
    keys.public_key("lab-c").write_bytes(keys.public_key("lab-a").read_bytes())
    keys.public_key("lab-d").write_text("ssh-rubbish")
    keys.public_key("lab-e").mkdir()
    os.mkfifo(keys.public_key("lab-f"))
    keys.public_key("lab-g").write_bytes(b"ssh-ed25519 " + b"A" * 1_000_000)
    keys.public_key("a\x1bb").write_bytes(keys.public_key("lab-z").read_bytes())
    found, unusable = read_sites(keys.sites)
    assert sorted(found.values()) == ["lab-a", "lab-z"]
    assert [re.search(r"([^/]*)\.pub", line)[1] for line in unusable] == [  # type: ignore[index]
        r"a\x1bb", "lab-c", "lab-d", "lab-e", "lab-f", "lab-g"
    ]  # fmt: skip
    assert "holds the key of lab-a" in unusable[1]
    assert load(tmp_path).names()  # a server starts with the others
    for path in keys.sites.glob("lab-[acz].pub"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no site's key that can be used: .*lab-d.pub cannot be read"):
        load(tmp_path)
    assert read_sites(tmp_path / "missing") == ({}, [])


def test_a_disk_that_is_away_takes_no_key_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = init(tmp_path, HOSTS, ["lab-a", "lab-b"])

    def away(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(OSError, match="Input/output error"):
        read_sites(keys.sites)


def test_a_site_s_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keys = init(tmp_path, HOSTS, ["lab-a"])
    folder = keys.private_key("lab-a").parent
    assert site_options("server.example.org:9092", "lab-a", keys=folder).key == keys.private_key("lab-a")
    keys.private_key("lab-a").chmod(0o644)
    with pytest.raises(ConfigError, match=r"site.key can be read by others: chmod 600"):
        site_options("server.example.org:9092", "lab-a", keys=folder)


def test_a_site_s_key_is_renewed_alone_and_a_certificate_for_its_hosts(tmp_path: Path) -> None:
    init(tmp_path, HOSTS, ["lab-a", "lab-b"])
    before = contents(tmp_path)
    (tmp_path / "ca.key").rename(tmp_path / "kept elsewhere")
    keys = init(tmp_path, [], ["lab-b"], force=True)
    assert set(keys.created) == {"handout/lab-b/ca.pem", "handout/lab-b/site.key", "sites/lab-b.pub"}
    assert keys.certificate.read_bytes() == before["server.pem"]
    assert keys.public_key("lab-a").read_bytes() == before["sites/lab-a.pub"]
    (tmp_path / "kept elsewhere").rename(tmp_path / "ca.key")
    assert init(tmp_path, [], [], force=True).hosts() == [*HOSTS, "localhost", "127.0.0.1"]
    assert keys.certificate.read_bytes() != before["server.pem"]


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    keys, other = init(tmp_path / "a", HOSTS, ["lab-a"]), init(tmp_path / "b", HOSTS, ["lab-a"])
    keys.ca.write_bytes(other.ca.read_bytes())
    with pytest.raises(ConfigError, match=r"server.pem is not of the authority .*ca.pem: issue it anew"):
        load(keys.folder)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NanofedError, match="keys cannot be written to"):
        init(tmp_path / "file" / "keys", HOSTS, [])


def test_keys_are_made_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nanofed.federated.deploy.keys import init; "
        f"init(Path({str(tmp_path)!r}), ['a.org'], ['lab-a']); "
        "assert not {'torch', 'lightning', 'flwr', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
