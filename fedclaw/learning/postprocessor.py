"""What may happen to an update on its way: a postprocessor, in two halves."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import Arrays, Shapes
from fedclaw.protocol.update import Update

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource


@dataclass(frozen=True)
class SiteContext:
    """What a site hands to its postprocessors beside the update: none of its data."""

    source: "GaussianSource"
    """Randomness that nobody else knows."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """By kind, what the site kept from its last update in this run."""


class Postprocessor(ABC):
    """One kind of processing, with its settings. Either half may change the arrays in place and return them."""

    @abstractmethod
    def at_site(self, part: Part[Update], context: SiteContext) -> Part[Update]:
        """Before the update leaves, with what becomes of where it comes from. Raises PrivacyError.

        What the site is to keep goes into `Update.state`.
        """

    def template(self, arrays: Arrays) -> Arrays:
        """Arrays of the shapes in which updates of the shapes of `arrays` are summed."""
        return arrays

    def at_server(self, total: Update, shapes: Shapes) -> Update:
        """After all updates were added. Raises UpdateError when the sum cannot be used.

        `shapes` are those of the global parameters.
        """
        return total
