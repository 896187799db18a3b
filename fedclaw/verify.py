"""Check that a bundle is whole and signed by a federation.

    python -m fedclaw.verify BUNDLE [ca=ca.crt | federation=federation.json] [crl=revoked.crl] [expired=refuse] [key=…]

    ca          certificate of the CA that you trust, got in another way than the bundle
    federation  the federation's descriptor, which holds that CA
    crl         the CA's revocation list; a revoked release certificate is refused
    expired     accept (default): a bundle signed while its certificate was valid stays valid
                refuse: the certificate must be valid now
    key         what opens a bundle that is encrypted at rest: file:PATH, env:NAME or a PKCS#11 URI

Without ca= or federation= only wholeness is proved; compare a printed fingerprint with the coordinator.
Exit code 0: verified. 1: not verified, one line says which file and why.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.verify", __doc__)

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedclaw.cli import compose_settings, make_console, naming, run_main, split
from fedclaw.errors import UsageError
from fedclaw.export.check import TrustSettings, Verified, load_trust, verify_bundle
from fedclaw.export.layout import SIGNATURES, FormatVersion

SIGNATURE_FORMS: dict[FormatVersion, str] = {
    1: "over SHA256SUMS, as in bundles of format 1",
    2: "OpenSSF Model Signing 1.0",
}


class VerifySettings(TrustSettings):
    """conf/verify.yaml."""

    bundle: Path | None


def main(arguments: Sequence[str]) -> None:
    """Verify by the command line."""
    command = split(arguments)
    settings = compose_settings("verify", command.overrides, VerifySettings)
    named = [Path(word) for word in command.words] + ([settings.bundle] if settings.bundle else [])
    if len(named) != 1:
        raise UsageError("name one bundle: python -m fedclaw.verify BUNDLE")
    with naming(bundle=named[0], federation=settings.federation):
        trust = load_trust(settings.ca, settings.federation, settings.crl, settings.expired, settings.key)
        verified = verify_bundle(named[0], trust)
    report(verified, make_console())


def report(verified: Verified, console: Console) -> None:
    """Print what was proved, and what was not."""
    manifest, signer = verified.manifest, verified.signer
    console.print(f"verified  {verified.path}", style="bold green", markup=False)
    console.print(
        f"files     {len(verified.files)}, none changed, missing or added\n"
        f"model     {manifest.variant} {manifest.workload} model of run {manifest.run}, federation "
        f"{manifest.federation}, {manifest.parameters:,} parameters\n"
        f"signature {SIGNATURE_FORMS[manifest.format_version]} ({SIGNATURES[manifest.format_version]})\n"
        f"signed    by {signer.name}, {manifest.created:%Y-%m-%d %H:%M} UTC by its own clock\n"
        f"CA        certificate SHA-256 {signer.fingerprint}\n"
        f"          key SHA-256 {signer.key_fingerprint} (what provision show prints)",
        markup=False,
    )
    if verified.expired:
        console.print(f"note      the release certificate has expired since ({signer.expires:%Y-%m-%d})", markup=False)
    if verified.pinned:
        console.print("trust     this is the CA that you gave: the bundle comes from its federation", markup=False)
    else:
        console.print(
            "trust     the CA came with the bundle, so this proves only that the bundle is whole. Anybody can make a "
            "CA: compare a fingerprint above with the coordinator's, or pass ca=… or federation=…",
            style="yellow",
            markup=False,
        )


if __name__ == "__main__":
    run_main("fedclaw.verify", __doc__ or "", main)
