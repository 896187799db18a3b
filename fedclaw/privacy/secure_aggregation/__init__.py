"""Secure aggregation (SecAgg+): the server learns the sum of the sites' vectors and nothing else.

Bell, Bonawitz, Gascon, Lepoint, Raykova 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
on the protocol of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning". Each
site adds masks to its vector (uint32, modulo 2^32): one of its own and one for each neighbour. The masks of two
neighbours cancel in the sum. The secrets behind the masks are shared among the neighbours, so that they can be
recovered when sites drop out: the seed of the own mask for a site that stayed, the mask key for one that left, never
both. Shares come with commitments (`dealing`): a holder finds a wrong one before it has spent anything, and can prove
who sent it.

`Parameters` say who takes part. `SiteSession` (opened by `Sessions`) and `ServerSession` are the two halves, `messages`
is what they exchange. There is no transport here. See `parameters` for what is guaranteed, and against whom.
"""

from fedclaw.privacy.secure_aggregation.keys import CertificateVerifier, Signer, Verifier, local_identities
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
from fedclaw.privacy.secure_aggregation.parameters import Parameters, Topology, neighbours_needed
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
