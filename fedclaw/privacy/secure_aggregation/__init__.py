"""The sum of the sites' vectors, and nothing else, for the server: SecAgg+ without a transport.

Bell, Bonawitz, Gascon, Lepoint, Raykova 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
on the protocol of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning". Each
site adds to its vector (uint32, modulo 2^32) a mask of its own and one for each neighbour; the neighbours' cancel in
the sum. The secrets behind the masks are shared among the neighbours, so that they can be recovered when sites drop
out: the seed of the own mask of a site that stayed, the mask key of one that did not, never both. Shares come with
commitments (`dealing`), so that a wrong one is found before anybody pays, and its sender named by proof.

`Parameters` say who takes part; `SiteSession` (opened by `Sessions`) and `ServerSession` are the two halves;
`messages` is what goes between them. See `graph` for what is guaranteed against whom.
"""

from fedclaw.privacy.secure_aggregation.graph import Topology, neighbours_needed
from fedclaw.privacy.secure_aggregation.identity import CertificateVerifier, Signer, Verifier, local_identities
from fedclaw.privacy.secure_aggregation.messages import (
    Accusations,
    Advertisement,
    ConfigValue,
    Confirmation,
    Consent,
    KeyList,
    MaskedInput,
    Opening,
    Roster,
    ShareBundle,
    ShareDelivery,
    SurvivorList,
    Unmasking,
    UnmaskRequest,
)
from fedclaw.privacy.secure_aggregation.parameters import Parameters
from fedclaw.privacy.secure_aggregation.server import ServerSession
from fedclaw.privacy.secure_aggregation.sessions import Sessions
from fedclaw.privacy.secure_aggregation.site import SiteSession

__all__ = [
    "Accusations",
    "Advertisement",
    "CertificateVerifier",
    "ConfigValue",
    "Confirmation",
    "Consent",
    "KeyList",
    "MaskedInput",
    "Opening",
    "Parameters",
    "Roster",
    "ServerSession",
    "ShareBundle",
    "ShareDelivery",
    "Signer",
    "SiteSession",
    "Sessions",
    "SurvivorList",
    "Topology",
    "UnmaskRequest",
    "Unmasking",
    "Verifier",
    "local_identities",
    "neighbours_needed",
]
