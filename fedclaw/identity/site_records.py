"""What the coordinator remembers of each approved site: sites/NAME.json, with every certificate it ever got."""

import datetime as dt
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationError

from fedclaw.errors import ProvisionError
from fedclaw.files import write_atomic
from fedclaw.identity.key_files import read_file
from fedclaw.identity.names import check_name
from fedclaw.protocol.frozen import Frozen, explain


class IssuedCertificate(Frozen):
    """One certificate that a site was given."""

    serial: str
    """Hexadecimal, as openssl shows it."""
    key_fingerprint: str
    issued: dt.datetime
    expires: dt.datetime


class SiteRecord(Frozen):
    """A site and its certificates, the newest last. Revoking a site revokes all of them."""

    version: int = 1
    name: Annotated[str, AfterValidator(check_name)]
    revoked: bool = False
    """Set by revoke, cleared when the name is approved for a new key."""
    certificates: tuple[IssuedCertificate, ...]

    @property
    def current(self) -> IssuedCertificate:
        """The newest certificate."""
        return self.certificates[-1]


def record_path(sites: Path, name: str) -> Path:
    """Where the record of the site `name` is."""
    return sites / f"{check_name(name)}.json"


def load_record(sites: Path, name: str) -> SiteRecord | None:
    """The record of a site, None if there never was one. Raises ProvisionError if it is damaged."""
    path = record_path(sites, name)
    if not path.exists():
        return None
    try:
        record = SiteRecord.model_validate_json(read_file(path, "the record of a site"))
    except ValidationError as error:
        raise ProvisionError(f"{path} is damaged: {explain(error)}; restore it from a backup") from None
    if record.name != name or not record.certificates:
        raise ProvisionError(f"{path} is damaged: it is not the record of {name!r}; restore it from a backup")
    return record


def load_records(sites: Path) -> tuple[SiteRecord, ...]:
    """All records, by name. Raises ProvisionError."""
    names = sorted(path.stem for path in sites.glob("*.json"))
    return tuple(record for name in names if (record := load_record(sites, name)) is not None)


def save_record(sites: Path, record: SiteRecord) -> None:
    """Write a record, whole or not at all."""
    write_atomic(record_path(sites, record.name), record.model_dump_json(indent=2).encode() + b"\n")
