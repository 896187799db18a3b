"""What a guarantee promises, in the words that every document of FedClaw uses: one place for all of them.

A claim is made of typed fields that a receipt carries, never of a sentence that somebody sent. docs/privacy.md, a
site's own statement, a bundle's privacy.json, its model card and a release of statistics print these sentences as they
are, and docs/privacy.md holds the proofs.

A mechanism M is (epsilon, delta)-differentially private for a unit and a relation if for all data sets D, D' that
differ by one unit in that relation, in either order, and all sets S of outcomes, Pr[M(D) in S] <= e^epsilon
Pr[M(D') in S] + delta (Dwork, Kenthapadi, McSherry, Mironov, Naor 2006).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from fedclaw.errors import PrivacyError
from fedclaw.protocol.receipt import Trust
from fedclaw.protocol.terms import DataUnit, Relation, Unit

ClaimUnit = Unit | DataUnit
"""What is protected: an example, a person with all of their rows, or, by noise on the sum, a site."""

_SUBJECT: Mapping[ClaimUnit, str] = {
    "example": "One example of a site's data is protected",
    "person": "One person in a site's data is protected, with all rows of that person",
    "site": "One site is protected, with all of its data",
}
_CHANGE: Mapping[tuple[ClaimUnit, Relation], str] = {
    ("example", "zero-out"): "replacing it by nothing, while the number of examples stays public,",
    ("example", "add-or-remove"): "adding or removing it, while the number that is told stays what the site's operator "
    "declared,",
    ("person", "zero-out"): "replacing these rows by nothing, while the number of persons stays public,",
    ("person", "add-or-remove"): "adding or removing these rows, while the number that is told stays what the site's "
    "operator declared,",
    ("site", "zero-out"): "replacing what it sends by nothing, while it stays public that it took part and with what "
    "number of examples or persons,",
}
_BOUND = "makes no outcome more than e^epsilon times as likely or as unlikely, but for a probability of delta."
_NOBODY = (
    "Nobody in a site's data is protected: nothing bounds what can be concluded about them, up to reproducing their "
    "data."
)

_AGAINST: Mapping[Trust, str] = {
    "nobody": "The site adds the noise itself, before anything leaves it: this holds against everybody who sees what "
    "leaves, be it the server, another site or whoever holds the model.",
    "aggregation": "Every site adds a share of the noise inside secure aggregation: this holds against everybody, the "
    "server included, as long as no more sites leave out their noise, or tell it, than the plan allows for.",
    "server": "The server adds the noise: this holds against everybody but the server and whoever controls it.",
    "everybody": "No noise was added: this holds against nobody.",
}

_PEOPLE: Mapping[ClaimUnit, str] = {
    "example": "People with several rows: rows are protected, and people with several rows less. For k rows of one "
    "person epsilon is up to k times as large, and delta up to k e^((k-1) epsilon) times.",
    "person": "People whom the data do not tell as one: whoever is in it under k identifiers counts as k persons, for "
    "whom epsilon is up to k times as large, and delta up to k e^((k-1) epsilon) times.",
}
_ELSEWHERE = (
    "People whose data are at several sites: the claim is for each site by itself, and for them the epsilons and the "
    "deltas of these sites add up."
)
_NUMBER: Mapping[tuple[ClaimUnit, Relation], str] = {
    ("example", "zero-out"): "The number of examples of each site, which leaves with its answers as it is.",
    ("person", "zero-out"): "The number of persons of each site, which leaves with its answers as it is.",
    ("site", "zero-out"): "Which sites took part and when, and the number of examples or persons of each.",
}
_DECLARED = (
    "The number that a site's operator declared, which leaves with its answers: the claim holds if it was not worked "
    "out from the data, and stays when they change."
)
_ANYWAY = (
    "Facts about a population: what a model learns about a group holds for its members, whether or not they took part.",
    "Results on test data, and whether a site gives any: they leave without noise unless its policy asks for it, and "
    "are then charged to a budget of their own.",
    "Constants that prepare the data, if they were worked out from the data without noise.",
    "Choices made by looking at results (settings tried, the best of several models): a site's ledger counts every "
    "run, the epsilon of one run counts that run alone, and neither counts the choice.",
    "Side channels: rounding where noise is added to floats, times, memory and power; docs/privacy.md says what of "
    "them is closed.",
    "Whatever left a site by another way than this software, and the security of its machines.",
)


@dataclass(frozen=True)
class Claim:
    """What is promised for a unit, between which data sets, and whom that needs to be honest.

    Whose noise it is follows from `trust`. Raises PrivacyError for a unit and a relation that do not go together.
    """

    unit: ClaimUnit = "example"
    relation: Relation = "zero-out"
    trust: Trust = "nobody"

    def __post_init__(self) -> None:
        if (self.unit, self.relation) not in _CHANGE or self.trust not in _AGAINST:
            raise PrivacyError(f"no claim is made for unit {self.unit}, relation {self.relation}, trust {self.trust}")

    @property
    def protects(self) -> str:
        """The sentence about unit and relation."""
        if self.trust == "everybody":
            return _NOBODY
        return f"{_SUBJECT[self.unit]}: {_CHANGE[self.unit, self.relation]} {_BOUND}"

    @property
    def against(self) -> str:
        """The sentence about trust."""
        return _AGAINST[self.trust]

    @property
    def not_covered(self) -> tuple[str, ...]:
        """What the claim says nothing about, a sentence each."""
        people = () if self.unit == "site" else (_PEOPLE[self.unit],)
        return (*people, _ELSEWHERE, _NUMBER.get((self.unit, self.relation), _DECLARED), *_ANYWAY)


UNITS: tuple[ClaimUnit, ...] = ("example", "person", "site")


def every_claim() -> tuple[Claim, ...]:
    """All that are ever made."""
    return tuple(Claim(unit, relation, trust) for unit, relation in _CHANGE for trust in get_args(Trust))


class Promised(Protocol):
    """What carries a claim's fields: the receipt of a round, of an evaluation or of statistics."""

    @property
    def unit(self) -> ClaimUnit: ...  # noqa: D102

    @property
    def relation(self) -> Relation: ...  # noqa: D102

    @property
    def trust(self) -> Trust: ...  # noqa: D102


def claim_of(receipt: Promised) -> Claim:
    """The claim of a receipt, or of what stands for several."""
    return Claim(receipt.unit, receipt.relation, receipt.trust)


def claim_of_sum(noise_by: object) -> Claim:
    """What noise on the sum that is made for whole sites promises to each, by whose noise it is."""
    return Claim("site", trust="server" if noise_by == "server" else "aggregation")


def relation_of(declared: int | None) -> Relation:
    """That of data whose number of units is `declared`; None: it is counted."""
    return "zero-out" if declared is None else "add-or-remove"


def claim_in(receipt: Mapping[str, Any]) -> Claim:
    """The claim of a receipt's plain fields; one of before they were noted was for an example whose number left.

    Raises PrivacyError for fields that no receipt has.
    """
    return Claim(receipt.get("unit", "example"), receipt.get("relation", "zero-out"), receipt.get("trust", "nobody"))


def weakest(claims: Iterable[Claim]) -> Claim:
    """What holds wherever one of `claims` does: of relation and trust the weakest; at least one claim.

    Where a declared number is told, to replace a unit by nothing is to remove it: add-or-remove implies zero-out.
    Raises PrivacyError for claims of different units, whose epsilons cannot be compared.
    """
    several = list(claims)
    units = sorted({claim.unit for claim in several})
    if len(units) != 1:
        raise PrivacyError(f"claims for different units have no common bound: {', '.join(units) or 'there are none'}")
    order = get_args(Trust)
    return Claim(
        several[0].unit,
        "zero-out" if any(claim.relation == "zero-out" for claim in several) else "add-or-remove",
        max((claim.trust for claim in several), key=order.index),
    )
