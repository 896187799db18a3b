"""A site's data files as tables; and read once more, when the federation's constants come with a plan.

What is read again has to be what was read first: the ledger has charged that content, and charges it on.
"""

import hashlib
from pathlib import Path

from fedclaw.errors import DataError
from fedclaw.files import sha256_file
from fedclaw.learning.workload import Schema, Table
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.settings import DataFiles
from fedclaw.site.site import Site, SiteData


def load_data(files: DataFiles, schema: Schema, train: Table | None = None) -> SiteData:
    """The site's tables, `train` where it has been read already; provisional ones if the schema waits for the
    federation's constants. A file is read once: its fingerprint is that of the bytes that were read. Raises DataError.
    """
    reader = schema.provisional()
    train = train if train is not None else reader.read_examples(files.train)
    if len(train) == 0:
        raise DataError(f"{files.train} holds no examples")
    test = reader.read_examples(files.test) if files.test else None
    return SiteData(
        train=train,
        test=test,
        fingerprint=train.content or fingerprint(files.train),
        test_fingerprint=(test.content or fingerprint(files.test)) if test is not None and files.test else None,
        files=files,
    )


def files_of(data: SiteData) -> DataFiles:
    """Where `data` was read from. Raises DataError when that is nowhere."""
    if data.files is None:
        raise DataError("this data was made in memory, so it cannot be read again in another form")
    return data.files


def require_same(path: Path, before: str | None, now: str | None) -> None:
    """Raise DataError if the fingerprint of what is at `path` is no longer what it was `before`."""
    if now != before:
        raise DataError(f"{path} has changed since the client read it; start the client again")


def check_constants(site: Site, preprocessing: str | None) -> None:
    """Raise Refusal for constants that are missing or superfluous, which does not depend on data."""
    schema = site.workload.schema
    if schema.needs_constants and preprocessing is None:
        raise Refusal(
            RefusalCode.SCHEMA,
            "the schema says standardise: federated, and the plan brings no constants: start the server with "
            "statistics=FILE",
        )
    if preprocessing is not None and not schema.needs_constants:
        # Whether the data can be read with constants of the server's choice would tell, uncharged, what they are.
        raise Refusal(RefusalCode.SCHEMA, "the plan brings constants, and this site's schema takes none")


def is_prepared(site: Site, preprocessing: str | None) -> bool:
    """Whether the tables are standardised by these constants, or need none."""
    return preprocessing is None or preprocessing == site.preprocessing


def prepare(site: Site, preprocessing: str | None) -> None:
    """Have the site's tables standardised by the constants that a plan sends; read again only if they are new.

    All data is read, so whoever calls it has made sure before that the site is going to answer. Raises Refusal if the
    constants are missing, superfluous or not such as the schema allows, which does not depend on data, and DataError if
    the files have changed.
    """
    check_constants(site, preprocessing)
    if preprocessing is None or is_prepared(site, preprocessing):
        return
    try:
        fitted = site.workload.schema.with_constants(preprocessing, "the plan's preprocessing")
    except DataError as error:
        raise Refusal(RefusalCode.SCHEMA, str(error)) from error
    files = files_of(site.data)
    data = load_data(files, fitted)
    require_same(files.train, site.data.fingerprint, data.fingerprint)
    require_same(files.test or files.train, site.data.test_fingerprint, data.test_fingerprint)
    site.use(data, preprocessing)


def fingerprint(path: Path) -> str:
    """SHA-256 of a data file's bytes, or of the names and bytes of all files in a folder."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()
