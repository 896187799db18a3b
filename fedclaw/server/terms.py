"""A run's terms, and whether they can be kept, asked by the server before a run begins."""

from typing import TYPE_CHECKING

from fedclaw.errors import UsageError
from fedclaw.learning.compatibility import refusal
from fedclaw.learning.strategy import Strategy
from fedclaw.protocol.terms import Terms
from fedclaw.server.run_directory import RunRecord

if TYPE_CHECKING:
    import torch


def terms_of(record: RunRecord) -> Terms:
    """Those of a run that is made."""
    return Terms(
        strategy=record.strategy,
        model=record.model,
        rounds=record.rounds,
        training=record.training,
        privacy=record.privacy,
        central=record.central,
        secure=record.secure,
        distillation=record.distillation,
        compression=record.compression,
        weighting=record.weighting,
        weight_cap=record.weight_cap,
        rules=record.rules,
    )


def check_combination(record: RunRecord, strategy: Strategy, model: "torch.nn.Module") -> None:
    """Raise UsageError for a run of `record` with `strategy` and `model` that could not do what it promises."""
    if reason := refusal(terms_of(record), strategy, model):
        raise UsageError(f"strategy {strategy.name!r} {reason}")
