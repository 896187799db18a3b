"""Walk from a bundle back to the compression, runs, rounds, sites and ledgers that its model came from.

    python -m fedclaw.lineage BUNDLE [run=DIR] [federation=DIR] [sites=[DIR,…]] [ca=ca.crt] [json=true]

    run         the run's directory; by default the one that the bundle lies in
    federation  the coordinator's directory: its CA is trusted, and it has the sites' records; or the descriptor alone
    sites       what is at hand of the sites: their directories, their ledgers' files, or what
                python -m fedclaw.ledger show json=true entries=true printed; each receipt is held against its ledger
    ca, crl, expired   whom to trust, as python -m fedclaw.verify takes them
    key         of a bundle that is encrypted at rest, encryption.key that of a run (docs/encryption.md)
    json=true   for machines; output=FILE writes the same to a file

Each link is verified (by a signature, a digest, a hash chain, a figure worked out again), told by the bundle alone, not
at hand, or contradicted by what is.
Exit code 0: nothing at hand contradicts the bundle. 1: something does, or it does not verify. 2: wrong use.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.lineage", __doc__)

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from fedclaw.cli import compose_settings, make_console, naming, require_paths, run_main, split, visible
from fedclaw.errors import BundleError, UsageError
from fedclaw.export.check import load_trust
from fedclaw.export.lineage import AtHand, Link, State, lineage
from fedclaw.files import write_atomic
from fedclaw.identity.data_keys import EncryptionSettings, KeySetting
from fedclaw.protocol.frozen import Frozen

_STYLES: dict[State, str] = {"verified": "green", "told": "default", "not at hand": "yellow", "contradicts": "bold red"}


class LineageSettings(Frozen):
    """conf/lineage.yaml."""

    bundle: Path | None
    run: Path | None
    federation: Path | None
    sites: tuple[Path, ...]
    ca: Path | None
    crl: Path | None
    expired: Literal["accept", "refuse"]
    key: KeySetting | None
    as_json: bool = Field(alias="json")
    output: Path | None
    encryption: EncryptionSettings = EncryptionSettings()


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Walk by the command line. Raises BundleError where something at hand contradicts the bundle."""
    command = split(arguments)
    settings = compose_settings("lineage", command.overrides, LineageSettings)
    named = [Path(word) for word in command.words] + ([settings.bundle] if settings.bundle else [])
    if len(named) != 1:
        raise UsageError("name one bundle: python -m fedclaw.lineage BUNDLE")
    require_paths(bundle=named[0], run=settings.run, federation=settings.federation, ca=settings.ca, crl=settings.crl)
    for path in settings.sites:
        require_paths(sites=path)
    if settings.output is not None and settings.output.is_dir():
        raise UsageError(f"output={settings.output} is a directory; name a file")
    with naming(bundle=named[0], federation=settings.federation):
        descriptor = None if settings.ca is not None else settings.federation
        trust = load_trust(settings.ca, descriptor, settings.crl, settings.expired, settings.key)
        run_keys = settings.encryption.keyring()
        found = lineage(named[0], trust, AtHand(settings.run, settings.federation, settings.sites, run_keys))
    _tell(found, settings, console or make_console())
    if wrong := found.count()["contradicts"]:
        raise BundleError(f"{wrong} link(s) of the lineage of {named[0]} contradict what is at hand")


def _tell(found: Link, settings: LineageSettings, console: Console) -> None:
    text = found.model_dump_json(indent=2)
    if settings.output is not None:
        write_atomic(settings.output, text.encode() + b"\n")
    if settings.as_json:
        console.out(text, highlight=False)
        return
    console.print(_grown(found, Tree(_words(found))), soft_wrap=False)
    count = found.count()
    console.print(", ".join(f"{count[state]} {state}" for state in _STYLES), markup=False)


def _grown(link: Link, tree: Tree) -> Tree:
    for below in link.below:
        _grown(below, tree.add(_words(below)))
    return tree


def _words(link: Link) -> Text:
    """What the link is of, its state and what there is to say. What others named is no markup of ours, and no command
    to the terminal."""
    what, detail = visible(link.what), visible(f"  {link.detail}".rstrip())
    return Text.assemble((what, "bold"), "  ", (link.state, _STYLES[link.state]), detail)


if __name__ == "__main__":
    run_main("fedclaw.lineage", __doc__ or "", main)
