"""What may happen to an update on its way: a postprocessor, in two halves."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import Arrays, Shapes
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.update import Update

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource


@dataclass(frozen=True)
class SiteContext:
    """What a site hands to its postprocessors beside the update and the plan: none of its data."""

    source: "GaussianSource"
    """Randomness that nobody else knows."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """By kind, what the site kept from its last update in this run."""


class Postprocessor(ABC):
    """One kind of processing. Either half may change the update's arrays in place and return them."""

    @abstractmethod
    def at_site(self, update: Update, plan: Plan, context: SiteContext) -> Update:
        """Before the update leaves. What the site is to keep goes into `Update.state`."""

    def stretch(self, update: Update, plan: Plan) -> float | None:
        """How many times further apart `at_site` brings two updates, at most; None: nobody knows."""
        return None

    def on_part(self, part: Part[Update], plan: Plan, context: SiteContext) -> Part[Update]:
        """`at_site`, with what it makes of where the update comes from. Raises PrivacyError."""
        stretch = self.stretch(part.value, plan)
        if stretch is None:
            return part.then(lambda update: self.at_site(update, plan, context))
        return part.scaled(stretch, lambda update: self.at_site(update, plan, context))

    @abstractmethod
    def at_server(self, total: Update, plan: Plan, shapes: Shapes) -> Update:
        """After all updates were added. Raises UpdateError when the sum cannot be used.

        `shapes` are those of the global parameters.
        """
