"""Set up a federation: make it, let sites in, renew, revoke, look at it.

The coordinator:
  python -m fedclaw.provision init federation=heart name=heart address=fl.example.org:9443
  python -m fedclaw.provision approve federation=heart request=site.csr
  python -m fedclaw.provision revoke federation=heart site=hospital-a
  python -m fedclaw.provision renew federation=heart
  python -m fedclaw.provision show federation=heart

A site (its private key never leaves its own directory):
  python -m fedclaw.provision request site=hospital-a name=hospital-a descriptor=federation.json
  python -m fedclaw.provision install site=hospital-a certificate=hospital-a.crt
  python -m fedclaw.provision renew site=hospital-a
  python -m fedclaw.provision show site=hospital-a

More keys:
  days=90               init, approve, renew federation: how long new certificates are good
  seal=mlkem768-x25519  init: seal updates so that a future quantum computer cannot open them (default x25519)
  addresses=[A,B]       init, renew federation: further names and IP addresses under which sites reach the server; its
                        certificate is for them too, and stays so when it is renewed
  fingerprint=...       approve, request: refuse any key but the one that the other side read out (the site's key for
                        approve, the federation's CA for request)
  rotate=true           renew site: make a new key as well
  release_key=URI       init, renew federation: the key that signs bundles is in a PKCS#11 token and never leaves it
                        (pkcs11:token=…;object=…, RFC 7512; made there if it is not there yet). See docs/encryption.md
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.provision", __doc__)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table

from fedclaw.cli import compose_settings, expanded, make_console, naming, run_main, split
from fedclaw.errors import ProvisionError, UsageError
from fedclaw.identity import federation_home, pki, provisioning
from fedclaw.identity.descriptor import DESCRIPTOR_FILE
from fedclaw.identity.overview import KeyStatus, Overview, State, federation_overview, site_overview
from fedclaw.identity.seal import SealSuite
from fedclaw.identity.site_home import SiteKeys, read_request
from fedclaw.protocol.frozen import Frozen

_MAX_DAYS = 398
_STYLES: dict[State, str] = {
    "valid": "green",
    "expires soon": "yellow",
    "expired": "bold red",
    "revoked": "red",
    "waiting": "cyan",
}


class ProvisionSettings(Frozen):
    """Everything that any command takes; conf/provision.yaml says what each key is."""

    federation: Path | None
    site: str | None
    name: str | None
    address: str | None
    addresses: tuple[str, ...]
    seal: SealSuite
    days: int = Field(ge=1, le=_MAX_DAYS)
    descriptor: Path | None
    request: Path | None
    certificate: Path | None
    fingerprint: str | None
    rotate: bool
    release_key: str | None


@dataclass(frozen=True)
class _Command:
    run: Callable[[ProvisionSettings, Console], None]
    needs: frozenset[str]
    takes: frozenset[str] = frozenset()
    one_of: frozenset[str] = frozenset()


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Run one command. Raises FedClawError."""
    line = split(arguments)
    if len(line.words) != 1 or line.words[0] not in _COMMANDS:
        given = " ".join(line.words) or "none"
        raise UsageError(f"give one command of {', '.join(_COMMANDS)} (given: {given})")
    word = line.words[0]
    command = _COMMANDS[word]
    settings = compose_settings("provision", line.overrides, ProvisionSettings)
    _check_keys(word, command, {override.lstrip("+").partition("=")[0] for override in line.overrides})
    try:
        with naming(**_read_by(word, settings)):
            command.run(settings, console or make_console())
    except OSError as error:
        raise ProvisionError(f"{error.filename or word}: {error.strerror}") from error


def _read_by(word: str, settings: ProvisionSettings) -> dict[str, Path | None]:
    """What the command reads, by its key: init and request make their directories, and revoke's site is a name."""
    paths = {"descriptor": settings.descriptor, "request": settings.request, "certificate": settings.certificate}
    if word != "init":
        paths["federation"] = settings.federation
    if word not in {"request", "revoke"} and settings.site is not None:
        paths["site"] = Path(settings.site)
    return paths


def _check_keys(word: str, command: _Command, given: set[str]) -> None:
    if superfluous := given - command.needs - command.takes - command.one_of:
        raise UsageError(f"{word} does not take {', '.join(sorted(superfluous))}")
    if missing := command.needs - given:
        raise UsageError(f"{word} needs {' '.join(f'{key}=...' for key in sorted(missing))}")
    if command.one_of and len(command.one_of & given) != 1:
        raise UsageError(f"{word} needs exactly one of {', '.join(f'{key}=...' for key in sorted(command.one_of))}")


def _init(settings: ProvisionSettings, console: Console) -> None:
    root = _path(settings.federation)
    name, address = _text(settings.name), _text(settings.address)
    home = provisioning.initialise(
        root, name, address, settings.seal, settings.days, settings.addresses, settings.release_key
    )
    console.print(
        f"Federation {home.name} is in {root} (keys are readable by you only; back them up).\n"
        f"CA fingerprint: {pki.fingerprint(pki.p384_key(home.ca, 'the CA'))}\n"
        f"Next: hand {root / DESCRIPTOR_FILE} to the sites and read the fingerprint to them;\n"
        "      they run request and send you their request file, you run approve."
    )


def _request(settings: ProvisionSettings, console: Console) -> None:
    root, name = _site_directory(settings), _text(settings.name)
    path = provisioning.request_site(root, _path(settings.descriptor), name, settings.fingerprint)
    overview = site_overview(root)
    console.print(
        f"{name} asks to join the federation {overview.descriptor.name}; its private key stays in {root}.\n"
        f"CA fingerprint:  {overview.ca_fingerprint}\n"
        f"Key fingerprint: {overview.entries[0].fingerprint}\n"
        "Compare both with the coordinator over the phone."
    )
    _print_next_request(root, path, console)


def _approve(settings: ProvisionSettings, console: Console) -> None:
    root, request = _path(settings.federation), _path(settings.request)
    path = provisioning.approve(root, request, settings.days, settings.fingerprint)
    fingerprint = read_request(request, federation_home.FederationHome.open(root).name).fingerprint
    console.print(f"Approved {path.stem} for {settings.days} days.\nKey fingerprint: {fingerprint}")
    if settings.fingerprint is None:
        console.print(f"Compare it with the site over the phone. If it differs, revoke {path.stem} and send nothing.")
    console.print(
        f"Next: send {path} to the site, which runs:\n"
        f"      python -m fedclaw.provision install site=DIR certificate={path.name}"
    )


def _install(settings: ProvisionSettings, console: Console) -> None:
    root = _site_directory(settings)
    provisioning.accept(root, _path(settings.certificate))
    keys = SiteKeys.open(root)
    expires = f"{keys.certificate.not_valid_after_utc:%Y-%m-%d}"
    console.print(
        f"{keys.site_name} is a member of {keys.descriptor.name} until {expires}.\n"
        f"Next: python -m fedclaw.client site={root}"
    )


def _renew(settings: ProvisionSettings, console: Console) -> None:
    if settings.federation is not None:
        if settings.rotate:
            raise UsageError("rotate=true is for sites; the federation's keys stay")
        home = provisioning.renew_federation(
            _path(settings.federation), settings.days, settings.addresses or None, settings.release_key
        )
        console.print(
            f"Server and release certificates of {home.name} are good for {settings.days} more days.\n"
            "Next: restart the server; it reads its certificate when it starts."
        )
        return
    if settings.release_key is not None:
        raise UsageError("release_key= is the federation's: renew federation=DIR takes it")
    if settings.addresses:
        raise UsageError("addresses=[...] are the server's: renew federation=DIR takes them")
    root = _site_directory(settings)
    path = provisioning.renew_site(root, settings.rotate)
    console.print("The site goes on with its present certificate until the new one is installed.")
    _print_next_request(root, path, console)


def _revoke(settings: ProvisionSettings, console: Console) -> None:
    name = _text(settings.site)
    count = provisioning.revoke(_path(settings.federation), name)
    if count:
        console.print(f"Revoked {name} ({count} certificate{'s' if count > 1 else ''}); the server drops it now.")
    else:
        console.print(f"{name} was revoked before; nothing changed.")


def _show(settings: ProvisionSettings, console: Console) -> None:
    if settings.federation is not None:
        _print_overview(federation_overview(_path(settings.federation)), console)
    else:
        _print_overview(site_overview(_site_directory(settings)), console)


def _print_next_request(root: Path, path: Path, console: Console) -> None:
    console.print(
        f"Next: send {path} to the coordinator; when the certificate comes back, run:\n"
        f"      python -m fedclaw.provision install site={root} certificate=FILE"
    )


def _print_overview(overview: Overview, console: Console) -> None:
    descriptor = overview.descriptor
    console.print(
        f"Federation {descriptor.name} at {descriptor.address}, updates sealed with {descriptor.seal_suite}\n"
        f"CA fingerprint: {overview.ca_fingerprint}"
    )
    table = Table("name")
    table.add_column("key fingerprint", no_wrap=True)
    table.add_column("expires", no_wrap=True)
    for entry in overview.entries:
        state = f"[{_STYLES[entry.state]}]{entry.state}[/]"
        table.add_row(f"{entry.name}\n[dim]{entry.role}[/]", _two_lines(entry.fingerprint), f"{entry.expires}\n{state}")
    console.print(table, soft_wrap=False)
    for entry in overview.entries:
        if entry.remedy:
            console.print(_warning(entry), style="yellow", markup=False)


def _warning(entry: KeyStatus) -> str:
    if entry.days is None:
        return f"{entry.name} has no certificate for its key yet: {entry.remedy}"
    when = f"expires in {entry.days:.0f} days" if entry.days > 0 else "has expired"
    return f"the {entry.role} certificate of {entry.name} {when}: {entry.remedy}"


def _two_lines(fingerprint: str) -> str:
    half = len(fingerprint) // 2
    return f"{fingerprint[:half]}\n{fingerprint[half + 1 :]}"


def _path(path: Path | None) -> Path:
    if path is None:
        raise UsageError("a file or directory is given as null")
    return expanded(path)


def _text(text: str | None) -> str:
    if text is None:
        raise UsageError("a name or address is given as null")
    return text


def _site_directory(settings: ProvisionSettings) -> Path:
    return _path(Path(_text(settings.site)))


_COMMANDS = {
    "init": _Command(
        _init, frozenset({"federation", "name", "address"}), frozenset({"seal", "days", "addresses", "release_key"})
    ),
    "request": _Command(_request, frozenset({"site", "name", "descriptor"}), frozenset({"fingerprint"})),
    "approve": _Command(_approve, frozenset({"federation", "request"}), frozenset({"days", "fingerprint"})),
    "install": _Command(_install, frozenset({"site", "certificate"})),
    "renew": _Command(
        _renew,
        frozenset(),
        frozenset({"days", "rotate", "addresses", "release_key"}),
        frozenset({"federation", "site"}),
    ),
    "revoke": _Command(_revoke, frozenset({"federation", "site"})),
    "show": _Command(_show, frozenset(), frozenset(), frozenset({"federation", "site"})),
}

if __name__ == "__main__":
    run_main("fedclaw.provision", __doc__, main)
