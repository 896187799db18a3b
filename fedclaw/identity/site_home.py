"""A site's keys directory: the descriptor, its own key and certificate, and what they are used for."""

from pathlib import Path
from typing import Final

from cryptography import x509

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, Descriptor, load_descriptor
from fedclaw.identity.key_files import belongs, load_certificate, load_key
from fedclaw.identity.names import check_name, site_uri
from fedclaw.identity.seal import Sealer

KEYS: Final = "keys"
SITE_KEY: Final = f"{KEYS}/site.key"
NEXT_KEY: Final = f"{KEYS}/next.key"
"""The new key of a renewal, until its certificate is installed."""
SITE_CERTIFICATE: Final = f"{KEYS}/site.crt"
SITE_REQUEST: Final = f"{KEYS}/site.csr"


class SiteKeys:
    """A site's identity in its federation, opened and checked."""

    def __init__(self, root: Path, descriptor: Descriptor, certificate: x509.Certificate, key: pki.PrivateKey) -> None:
        self.root = root
        self.descriptor = descriptor
        self.certificate = certificate
        self.site_name = pki.common_name(certificate)
        self._key = key

    @classmethod
    def open(cls, path: Path) -> "SiteKeys":
        """Read and check a site directory. Raises ProvisionError saying what is missing and what to run."""
        if not path.is_dir():
            raise ProvisionError(f"{path} is not a site directory; see python -m fedclaw.provision --help")
        if not (path / DESCRIPTOR_FILE).exists():
            raise ProvisionError(
                f"{path / DESCRIPTOR_FILE} is missing: get it from the coordinator, then run: "
                f"python -m fedclaw.provision request site={path} name=NAME descriptor=FILE"
            )
        descriptor = load_descriptor(path / DESCRIPTOR_FILE)
        if not (path / SITE_CERTIFICATE).is_file():
            raise ProvisionError(
                f"{path / SITE_CERTIFICATE} is missing: send {path / SITE_REQUEST} to the coordinator, then run: "
                f"python -m fedclaw.provision install site={path} certificate=FILE"
            )
        certificate = load_certificate(path / SITE_CERTIFICATE, "the site's certificate")
        check_site_certificate(certificate, descriptor, str(path / SITE_CERTIFICATE), renew_advice(path))
        key = load_key(path / SITE_KEY, "the site's key")
        if not belongs(certificate, key):
            raise ProvisionError(
                f"{path / SITE_CERTIFICATE} is not for the key in {path / SITE_KEY}; install the certificate again, "
                f"or {renew_advice(path)}"
            )
        return cls(path, descriptor, certificate, key)

    def __repr__(self) -> str:
        return f"SiteKeys({self.site_name!r})"

    def tls(self) -> pki.TlsIdentity:
        """The site's end of a connection."""
        certificate = pki.pem_of(self.certificate)
        return pki.TlsIdentity(certificate, pki.key_pem(self._key), pki.pem_of(self.descriptor.ca))

    def sign(self, purpose: str, message: bytes) -> bytes:
        """The site's signature over `message` for `purpose`; `pki.check_signature` checks it."""
        return self._key.sign(pki.signed_content(purpose, message), pki.ECDSA)

    def sealer(self) -> Sealer:
        """Seals to the aggregator of the site's federation."""
        return self.descriptor.sealer()


def renew_advice(root: Path) -> str:
    """What to do about a certificate that is not good any more."""
    return (
        f"run: python -m fedclaw.provision renew site={root}, send {root / SITE_REQUEST} to the coordinator "
        "and install the certificate that comes back"
    )


def check_site_certificate(
    certificate: x509.Certificate, descriptor: Descriptor, origin: str, remedy: str, *, expired_ok: bool = False
) -> str:
    """The name of the site that `certificate` is for. Raises ProvisionError unless `descriptor`'s CA issued it."""
    pki.check_leaf(certificate, descriptor.ca, pki.Purpose.SITE, origin, remedy, expired_ok=expired_ok)
    try:
        name = check_name(pki.common_name(certificate))
        names = pki.alternative_names(certificate)
    except ValueError as error:
        raise ProvisionError(f"{origin} is not a site certificate: {error}") from None
    if names != [x509.UniformResourceIdentifier(site_uri(descriptor.name, name))]:
        raise ProvisionError(f"{origin} is not for a site of the federation {descriptor.name!r}")
    return name
