"""A coordinator that asks what no honest one would: it leaves out its own checks, and says what it likes in a plan."""

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from fedclaw.learning.workload import Table
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.terms import CentralNoise, LocalTraining, ModelSpec, Plan, PrivacyRequest, SecureAggregation
from fedclaw.server.session import make_plan, make_strategy
from fedclaw.site.service import SiteService
from tests.least_squares import asked, service
from tests.small_nets import SmallNets, first

DP = PrivacyRequest(epsilon=4, delta=1e-5, max_grad_norm=1)
ONE_STEP = LocalTraining(steps=1, batch_size=4, learning_rate=0.1)
SOME_STEPS = LocalTraining(steps=3, batch_size=4, learning_rate=0.1)


def central(unit: str, noise_by: str, **changes: Any) -> CentralNoise:
    fields = {"epsilon": 3, "delta": 1e-5, "clip": 1, "noise_multiplier": 2, "sample_rate": 0.5}
    if unit == "site":
        fields["sample_rate"] = 1
    return CentralNoise(**{"unit": unit, "noise_by": noise_by, **fields, **changes})


EXAMPLE, SITE = central("example", "server"), central("site", "server")


def session(**changes: Any) -> SecureAggregation:
    fields = {"sites": ("a", "b", "c"), "threshold": 2, "neighbours": 2, "minimum": 3, "length": 9, "step": 2**-20}
    return SecureAggregation(**{"session": "0" * 32, **fields, **changes})


def wary_site(root: Path | None = None, **policy: Any) -> SiteService:
    """One whose policy wants differential privacy, and takes the server's word for noise on the sum."""
    assume_server_identity(1)
    generator = np.random.default_rng(3)
    labels = (np.arange(20) % 2).astype(np.int64)
    table, test = (Table(generator.normal(size=(20, 3)).astype(np.float32), labels) for _ in range(2))
    rules = {"allow_training_without_privacy": False, "trust_server_noise": True, "epsilon": 100.0, "delta": 1e-5}
    return service("a", SmallNets(3), table, test=test, root=root, **{**rules, **policy})


def plan_for(site: SiteService, strategy: str, model: str = "parted", **changes: Any) -> Plan:
    """A round of three of a run with `strategy`, under local noise but for `changes`."""
    settings = changes.pop("settings", {})
    record = asked(strategy, rounds=5, workload=SmallNets.name, model=ModelSpec(name=model), settings=settings)
    chosen = make_strategy(record)
    fields = {
        "schema_digest": site.schema_digest,
        "personal": tuple(sorted(chosen.personal(SmallNets(3).build(record.model)))),
        "privacy": DP,
        "training": SOME_STEPS,
    }
    made = make_plan(record, chosen, 1, 3)
    return made.model_validate({**made.model_dump(), **fields, **changes})


def ask(site: SiteService, strategy: str, kind: str = "train", **changes: Any) -> Message:
    """The reply to a question of `kind` with `plan_for`'s plan, which has left."""
    plan = plan_for(site, strategy, **changes)
    parameters = first(plan.model.name, 3)
    sent = {"control": {name: np.zeros_like(array) for name, array in parameters.items()}}
    (message,) = questions([7], plan.round, kind, question(plan, Outgoing(parameters, None, sent)), 100.0)
    reply = site.answer(message)
    site.release(message, reply, 10, "00" * 32)
    return reply
