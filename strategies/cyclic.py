"""Cyclical weight transfer: the model goes from site to site.

Chang, Balachandar, Lam, Yi, Brown, Beers, Rosen, Rubin, Kalpathy-Cramer 2018, "Distributed deep learning networks among
institutions for medical imaging", JAMIA 25(8), methods: "cyclical weight transfer"
(https://doi.org/10.1093/jamia/ocy017).
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from fedclaw.errors import Reason, Setting
from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import RoundRules, Terms


class Cyclic(Strategy):
    """Each round asks one site, which goes on from the model that the site before it left; nothing is averaged.

    For a few sites that cannot be asked at the same time. A cycle through N sites is N rounds, and the model leans
    towards the site that it came from last: take few local steps. Every round is evaluated at all sites.

    The order is by node number. With `order: shuffled` each cycle has an order of its own, drawn from the run's seed.
    A site that comes or goes in mid-cycle shifts those after it.

    The server, and whoever it sends the model to next, sees one site's model as that site left it. So a site takes part
    only if its policy says `minimum_cohort: 1`; and what counts on a sum of several, secure aggregation and noise on
    the sum, is refused. `sites.minimum` says how many must be connected, not how many are asked.
    """

    name: ClassVar[str] = "cyclic"

    order: Literal["fixed", "shuffled"] = "fixed"
    """Whether every cycle goes the same way."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Takes the whole delta: the model is the site's."""
        import torch

        return torch.optim.SGD(parameters, lr=1.0)

    def select_clients(self, number: int, connected: Sequence[int], seed: int) -> Sequence[int]:
        """The next site of the cycle that round `number` (from 1) is in."""
        cycle, place = divmod(number - 1, len(connected))
        if self.order == "shuffled":
            connected = random.Random(f"{seed}/{cycle}").sample(list(connected), len(connected))  # noqa: S311
        return [connected[place]]

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """What counts on several sites a round."""
        if terms.secure is not None:
            return Reason(
                "asks one site a round, and a secure sum of one hides nothing; take ", Setting("secure", "none")
            )
        if terms.central is not None:
            return Reason(
                "asks one site a round, so that noise on the sum is that site's own; take ", Setting("privacy", "dp")
            )
        return None

    def refuse_rules(self, rules: "RoundRules") -> str | None:
        """A fraction of the sites."""
        if rules.fraction < 1:
            return Reason("asks one site a round, whatever ", Setting("sites.fraction"), " says; leave it at 1")
        return None
