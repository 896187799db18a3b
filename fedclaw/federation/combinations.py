"""Combinations of settings that cannot be right, told when a run is made and not in its last round."""

from typing import TYPE_CHECKING

from fedclaw.errors import UsageError
from fedclaw.federation.compression.request import RandomK, TopK
from fedclaw.federation.run_directory import RunRecord
from fedclaw.federation.strategy import Buffered, Strategy

if TYPE_CHECKING:
    import torch


def check_combination(record: RunRecord, strategy: Strategy, model: "torch.nn.Module") -> None:
    """Raise UsageError for a run of `record` with `strategy` and `model` that could not do what it promises."""
    if reason := _excluded(record, strategy, model) or strategy.refuse(record, model):
        raise UsageError(f"strategy {strategy.name!r} {reason}")


def _excluded(record: RunRecord, strategy: Strategy, model: "torch.nn.Module") -> str | None:
    """What follows from how a strategy works, whichever it is."""
    if strategy.needs_single_updates and record.secure is not None:
        return "has to see every update by itself, which secure aggregation hides; take another strategy or secure=none"
    if reason := _uncompressed(record, strategy):
        return reason
    if isinstance(strategy, Buffered):
        return _unbuffered(record, strategy)
    if record.central is None:
        return None
    if strategy.needs_single_updates:
        return "takes no mean of the updates, and noise on the sum is made for a mean; take privacy=dp, at the sites"
    sent = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    if strategy.extras(sent):
        return "sends more than updates, and noise on the sum is made for updates alone; take privacy=dp, at the sites"
    if strategy.personal_model:
        return (
            "trains a second model at each site, which noise on the sum does not cover; take privacy=dp, at the sites"
        )
    return None


def _uncompressed(record: RunRecord, strategy: Strategy) -> str | None:
    """What needs updates whose numbers can be compared, or added, one by one."""
    if strategy.needs_single_updates and isinstance(record.compression, TopK):
        return (
            "compares updates number by number, and with compression=topk each site sends other numbers: most of what "
            "is compared are zeros; take another compression"
        )
    if isinstance(strategy, Buffered) and isinstance(record.compression, RandomK):
        return "adds answers of several rounds, and compression=randk sends other positions in each; take another one"
    return None


def _unbuffered(record: RunRecord, strategy: Buffered) -> str | None:
    """What needs all of a round's sites to begin with the same parameters."""
    if record.secure is not None:
        return "adds answers to different questions, and a secure sum is over answers to one; take secure=none"
    if record.central is not None:
        return "discounts late answers, and noise on the sum is made for a plain mean; take privacy=dp, at the sites"
    if record.rules.minimum < strategy.size:
        return f"steps on {strategy.size} answers, so a run needs as many sites: sites.minimum={strategy.size}"
    return None
