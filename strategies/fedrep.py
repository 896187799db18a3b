"""A shared representation: the head is fitted to it first, then it is moved.

Collins, Hassani, Mokhtari, Shakkottai 2021, "Exploiting Shared Representations for Personalized Federated Learning",
Algorithm 1 (https://arxiv.org/abs/2102.07078).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.errors import Reason, Setting
from fedclaw.learning.strategy import StepContext
from fedclaw.strategies.heads import SharedBody

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import Terms


class FedRep(SharedBody):
    """A round's local steps go to the head first, with the body as it is, then to the body, with the head as it is.

    For what FedPer is for, when there is little data a site or the labels differ much: the body moves only for a head
    that fits it, so that sites with odd heads do not pull it about. With a single local step, both move in it.

    The half that rests has its gradients set to zero, which keeps it still for plain SGD alone: momentum, weight decay
    and Adam are refused.
    """

    name: ClassVar[str] = "fedrep"
    elementwise: ClassVar[bool] = False
    # A stack's clients may be at different parts of their rounds.

    head_share: float = Field(default=0.5, gt=0, lt=1)
    """Part of the local steps that the head gets, at least one; the paper gives it most of them."""

    def client_fields(self) -> Mapping[str, float]:
        """`head_share`, for `correct_gradients`."""
        return {"head_share": self.head_share}

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """Local optimisers under which a parameter moves without a gradient."""
        training = terms.training
        if training.optimizer != "sgd" or training.momentum or training.weight_decay:
            return Reason(
                "holds half of the model still while the other learns, which momentum, weight decay and Adam undo; "
                "take ",
                Setting("training.optimizer", "sgd"),
                ", ",
                Setting("training.momentum", 0),
                " and ",
                Setting("training.weight_decay", 0),
            )
        if terms.central is not None and terms.central.unit == "example":
            return Reason(
                "takes its local steps in two parts, and ",
                Setting("central.unit", "example"),
                " is one step a round; take ",
                Setting("central.unit", "site"),
            )
        return super().refuse(terms, model)

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Raises KeyError if there is no `head_share`, and ValueError if it is not between 0 and 1."""
        if not 0 < fields["head_share"] < 1:
            raise ValueError(f"fedrep: head_share must lie between 0 and 1, got {fields['head_share']}")

    @classmethod
    def correct_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Set the gradients of the half that rests to zero."""
        if context.steps == 1:
            return
        first = min(max(1, round(context.fields["head_share"] * context.steps)), context.steps - 1)
        resting = context.step >= first
        for parameter, in_head in zip(parameters, context.personal, strict=True):
            if parameter.grad is not None and in_head == resting:
                parameter.grad.zero_()
