"""Certificates and keys of a federation: one authority, one server certificate, a key pair for each site."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.wire.plain_text import SAFE_NAME, plain
from nanofed.files import check_private, write_atomically

HOST_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
LOOPBACK = ("localhost", "127.0.0.1")  # sites on the same machine call there
DAYS = 365  # of the server certificate
CA_DAYS = 3650
WARN_DAYS = 30.0
KEY_BYTES = 64 << 10  # of a public key's file
# Errors that say nothing of a key's file: no handle or memory left, a disk or a network disk that is away for a moment.
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_CLOCKS = datetime.timedelta(hours=1)  # a site's clock may be behind by so much


class Keys:
    """The folder of a federation's certificates and keys; private ones have mode 0600, folders 0700.

    A folder `handout/NAME` (`ca.pem` and `site.key`) goes to a site, by a safe way, and may be deleted here afterwards.

    Attributes:
        folder: The folder.
        ca: The authority's certificate, which a SuperNode takes as `--root-certificates`.
        ca_key: The authority's private key: needed only to issue a server certificate, so it may be kept elsewhere.
        certificate: The server's certificate.
        key: The server's private key.
        sites: The folder of the sites' public keys, `NAME.pub`.
        created: The files that `init` wrote, relative to the folder.
    """

    def __init__(self, folder: Path, created: Sequence[str] = ()) -> None:
        self.folder, self.created = folder, created
        self.ca, self.ca_key = folder / "ca.pem", folder / "ca.key"
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.sites = folder / "sites"

    def public_key(self, site: str) -> Path:
        """Return where a site's public key is, in OpenSSH's form: what `flwr supernode register` takes."""
        return self.sites / f"{site}.pub"

    def handout(self, site: str) -> Path:
        """Return the folder that goes to a site."""
        return self.folder / "handout" / site

    def private_key(self, site: str) -> Path:
        """Return where a site's private key is, in OpenSSH's form: `--auth-supernode-private-key` of a SuperNode."""
        return self.handout(site) / "site.key"

    def names(self) -> list[str]:
        """Return the sites that have a public key here."""
        return sorted(path.stem for path in self.sites.glob("*.pub"))

    def hosts(self) -> list[str]:
        """Return the names and addresses that the server certificate is for."""
        extension = read_certificate(self.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return [str(name.value) for name in extension.value]

    def expiry(self) -> datetime.datetime:
        """Return when the first of server certificate and authority ends, UTC."""
        return min(read_certificate(path).not_valid_after_utc for path in (self.certificate, self.ca))

    def warning(self, days: float = WARN_DAYS) -> str | None:
        """Return what to tell the operator where fewer than `days` are left of server certificate or authority, else None.

        Raises:
            ConfigError: One of the two cannot be read.
        """
        for path in (self.certificate, self.ca):
            ends = read_certificate(path).not_valid_after_utc
            left = (ends - _now()).total_seconds() / 86400
            if left <= days:
                when = f"ends in {left:.0f} days" if left > 0 else f"ended {-left:.0f} days ago"
                return f"the certificate {path} {when} ({ends:%Y-%m-%d}): issue a new one with --force"
        return None


def init(folder: Path, hosts: Sequence[str], sites: Sequence[str], *, days: int = DAYS, force: bool = False) -> Keys:
    """Write what is missing of an authority, a server certificate and a key pair for each site.

    Args:
        folder: where; made if need be.
        hosts: names and addresses by which sites call the server; localhost and 127.0.0.1 are added. Without any, a certificate
            that is issued anew is for those of the old one.
        sites: names of the sites.
        days: validity of the server certificate.
        force: issue the keys of `sites` anew, and the server certificate where `hosts` or no sites are named. The authority
            stays, so that the other sites notice nothing; for a new authority take a new folder. A running server takes the new
            keys over and refuses the old ones.

    Raises:
        ConfigError: a name that is no host's or site's; a server certificate that is there and not for `hosts`; an authority
            that is not whole, or ends.
        NanofedError: the folder cannot be written.
    """
    for site in sites:
        if not SAFE_NAME.fullmatch(site):
            raise ConfigError(f"{site!r:.80} is no name for a site: up to 64 letters, digits, '.', '_' and '-'")
    if twice := sorted({site for site in sites if list(sites).count(site) > 1}):
        raise ConfigError(f"the site {twice[0]} is named twice")
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"a certificate is valid for 1 to {CA_DAYS} days, not {days}")
    keys = Keys(folder)
    renewed = force and (bool(hosts) or not sites)
    named = hosts or (keys.hosts() if renewed and keys.certificate.is_file() else ())
    names = [_alternative(host) for host in dict.fromkeys((*named, *LOOPBACK))]
    created: list[Path] = []
    try:
        for part in (folder, keys.sites, keys.handout("x").parent):
            part.mkdir(parents=True, exist_ok=True)
            part.chmod(0o700)
        if not keys.ca.exists():
            created += _make_authority(keys)
        if renewed or not keys.certificate.exists():
            created += _make_server(keys, names, days)
        elif missing := [host for host in hosts if str(_alternative(host).value) not in keys.hosts()]:
            raise ConfigError(f"{keys.certificate} is not for {missing[0]}: add --force to issue it anew")
        for site in sites:
            if force or not keys.public_key(site).exists():
                created += _make_site(keys, site)
    except OSError as error:
        raise NanofedError(f"the keys cannot be written to {folder}: {error.strerror or error}") from error
    return Keys(folder, [path.relative_to(folder).as_posix() for path in created])


def load(folder: Path) -> Keys:
    """Return the keys of a folder that `init` wrote.

    Raises:
        ConfigError: something that a server needs is missing, damaged, or open to others, or the certificate has ended.
    """
    keys = Keys(folder)
    for path in (keys.ca, keys.certificate, keys.key):
        if not path.is_file():
            raise ConfigError(f"{path} is missing: `nanofed server init` writes it")
    check_private(keys.key)
    sites, unusable = read_sites(keys.sites)
    if not sites:
        said = "; ".join(unusable) or "add one with `nanofed server init`"
        raise ConfigError(f"{keys.sites} holds no site's key that can be used: {said}")
    try:
        read_certificate(keys.certificate).verify_directly_issued_by(read_certificate(keys.ca))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError(
            f"{keys.certificate} is not of the authority {keys.ca}: issue it anew with `nanofed server init {folder} --force`"
        ) from error
    if ended := keys.warning(0):
        raise ConfigError(ended)
    return keys


def read_sites(folder: Path) -> tuple[dict[bytes, str], list[str]]:
    """Return the name of each site by its public key, in the form in which a SuperNode sends it (PEM), and what is passed over.

    Files count one by one: that one of them cannot be used neither keeps a site in whose key was taken away nor any other out.

    Args:
        folder: The folder of the sites' public keys, `NAME.pub`; a folder that is missing holds none.

    Returns:
        The sites' keys; and for each file that is no key of an elliptic curve, or holds another site's, a line that says so.

    Raises:
        OSError: they cannot be read just now, which says nothing of them.
    """
    found: dict[bytes, str] = {}
    unusable: list[str] = []
    for path in sorted(folder.glob("*.pub")):
        try:
            status = path.stat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= KEY_BYTES else b""
            key = serialization.load_ssh_public_key(content)
        except FileNotFoundError:  # taken away just now
            continue
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            if getattr(error, "errno", None) in PASSING:
                raise
            unusable.append(f"{plain(path)} cannot be read as a public key of OpenSSH's form: {plain(error)}")
            continue
        if not isinstance(key, ec.EllipticCurvePublicKey) or not SAFE_NAME.fullmatch(path.stem):
            unusable.append(f"{plain(path)} must be a site's name and hold a key of an elliptic curve")
            continue
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        if pem in found:
            unusable.append(f"{path} holds the key of {found[pem]}: each site needs its own")
            continue
        found[pem] = path.stem
    return found, unusable


def read_certificate(path: Path) -> x509.Certificate:
    """Return a certificate.

    Raises:
        ConfigError: there is none in the file.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a certificate: {error}") from error


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST_NAME.fullmatch(host) or host.replace(".", "").isdigit():
            raise ConfigError(
                f"{host!r:.80} is neither a host's name nor an address (without scheme and port)"
            ) from None
        return x509.DNSName(host)


def _make_authority(keys: Keys) -> list[Path]:
    if keys.ca_key.exists():
        raise ConfigError(f"{keys.ca_key} is there and {keys.ca} is not: put it back, or take another folder")
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"nanofed federation {x509.random_serial_number():x}"[:40])]
    )
    certificate = _certificate(key.public_key(), name, name, key, days=CA_DAYS, authority=True)
    write_private(keys.ca_key, _private(key, serialization.PrivateFormat.PKCS8))
    write_private(keys.ca, certificate.public_bytes(serialization.Encoding.PEM))
    return [keys.ca_key, keys.ca]


def _make_server(keys: Keys, names: Sequence[x509.GeneralName], days: int) -> list[Path]:
    ca = read_certificate(keys.ca)
    if not keys.ca_key.is_file():
        raise ConfigError(f"{keys.ca_key} is needed to issue a server certificate: put it back for that")
    try:
        signer = serialization.load_pem_private_key(keys.ca_key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{keys.ca_key} cannot be read as a private key: {error}") from error
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != ca.public_key():
        raise ConfigError(f"{keys.ca_key} is not the key of {keys.ca}: put the right one back, or take another folder")
    if ca.not_valid_after_utc < _now() + datetime.timedelta(days=days):
        raise ConfigError(
            f"the authority {keys.ca} ends {ca.not_valid_after_utc:%Y-%m-%d}, before {days} days: ask for fewer, or make a new "
            "one in another folder"
        )
    # P-256 for the handshakes, of which there are many; clients know it everywhere.
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nanofed server")])
    certificate = _certificate(key.public_key(), name, ca.subject, signer, days=days, names=names)
    write_private(keys.key, _private(key, serialization.PrivateFormat.PKCS8))
    write_private(keys.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return [keys.key, keys.certificate]


def _make_site(keys: Keys, site: str) -> list[Path]:
    key = ec.generate_private_key(ec.SECP384R1())
    handout = keys.handout(site)
    handout.mkdir(exist_ok=True)
    handout.chmod(0o700)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_private(handout / "ca.pem", keys.ca.read_bytes())
    write_private(keys.private_key(site), _private(key, serialization.PrivateFormat.OpenSSH))
    write_private(keys.public_key(site), public + b" " + site.encode() + b"\n")  # last: a site without it is made anew
    return [handout / "ca.pem", keys.private_key(site), keys.public_key(site)]


def _certificate(
    public: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    *,
    days: int,
    names: Sequence[x509.GeneralName] = (),
    authority: bool = False,
) -> x509.Certificate:
    """Return a signed certificate with what RFC 5280 wants: Python 3.13 refuses an authority without it."""
    unused = "content_commitment key_encipherment data_encipherment key_agreement encipher_only decipher_only"
    usage = dict.fromkeys(unused.split(), False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCKS)
        .not_valid_after(_now() + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA384())


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, whole or not at all."""
    write_atomically(path, content, mode=0o600)
