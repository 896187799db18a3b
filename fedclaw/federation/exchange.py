"""One exchange with a cohort: ask, and add what comes back as it comes.

Questions have deterministic identities (a digest of what is asked of whom), so that a resumed or repeated round
asks the same question and a site answers it from its outbox instead of training, and paying, again.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.errors import UpdateError
from fedclaw.federation.aggregate import WeightedSum
from fedclaw.federation.arrays import pack, unpack
from fedclaw.federation.plan import Plan, Receipt, RefusalCode
from fedclaw.federation.run_directory import SiteReceipt
from fedclaw.frozen import explain
from fedclaw.runtime.base import StreamingGrid
from fedclaw.runtime.flower import assign_message_id

R = TypeVar("R")

log = logging.getLogger(__name__)

ARRAYS, PLAN, TEACHER, SUM, METRICS, RECEIPT, JSON = "arrays", "plan", "teacher", "sum", "metrics", "receipt", "json"
WEIGHT, EXAMPLES = "weight", "examples"


@dataclass(frozen=True)
class Declined:
    """A site that did not take part, and why: its own refusal, or an answer that could not be used."""

    site: str
    code: str
    reason: str


@dataclass
class Answers:
    """Who answered what in one exchange. `silent` are the sites that did not answer in time."""

    seconds: float = 0.0
    answered: list[str] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


@dataclass
class Trained(Answers):
    """The sum of the sites' weighted deltas, and the receipts by site."""

    total: WeightedSum = field(default_factory=lambda: WeightedSum({}))
    receipts: dict[str, SiteReceipt] = field(default_factory=dict)


@dataclass
class Evaluated(Answers):
    """Example-weighted means of the sites' metrics; a metric that no site sent is absent."""

    metrics: dict[str, float] = field(default_factory=dict)
    examples: int = 0


def site_name(grid: Grid, node_id: int) -> str:
    """The certified name where the runtime knows one, else the node's number."""
    return grid.site_name(node_id) if isinstance(grid, StreamingGrid) else str(node_id)


def train(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    parameters: Mapping[str, NDArray[np.float32]],
    teacher: Mapping[str, NDArray[np.float32]] | None,
    deadline: float,
) -> Trained:
    """Ask `nodes` to train by `plan` and sum their answers. `deadline` in seconds."""
    trained = Trained(total=WeightedSum(parameters))

    def add(site: str, content: RecordDict) -> None:
        weight, examples = _weights(content)
        receipt = _receipt(content)
        trained.total.add(unpack(_part(content.array_records, SUM)), weight)
        trained.receipts[site] = SiteReceipt(examples=examples, receipt=receipt)

    _ask(grid, nodes, _question(plan, parameters, teacher), MessageType.TRAIN, plan, deadline, trained, add)
    return trained


def evaluate(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    parameters: Mapping[str, NDArray[np.float32]],
    deadline: float,
) -> Evaluated:
    """Ask `nodes` to evaluate `parameters` on their own test data. `deadline` in seconds."""
    evaluated = Evaluated()
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}

    def add(_site: str, content: RecordDict) -> None:
        weight, examples = _weights(content)
        record = _part(content.metric_records, METRICS)
        values = {name: _number(record, name) for name in plan.metrics if name in record}
        evaluated.examples += examples
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
            weights[name] = weights.get(name, 0.0) + weight

    _ask(grid, nodes, _question(plan, parameters, None), MessageType.EVALUATE, plan, deadline, evaluated, add)
    evaluated.metrics = {name: sums[name] / weights[name] for name in sums}
    return evaluated


def _question(
    plan: Plan,
    parameters: Mapping[str, NDArray[np.float32]],
    teacher: Mapping[str, NDArray[np.float32]] | None,
) -> RecordDict:
    content = RecordDict({ARRAYS: pack(parameters), PLAN: ConfigRecord({JSON: plan.model_dump_json()})})
    if teacher is not None:
        content[TEACHER] = pack(teacher)
    return content


def _ask(
    grid: Grid,
    nodes: Sequence[int],
    content: RecordDict,
    kind: str,
    plan: Plan,
    deadline: float,
    answers: Answers,
    add: Callable[[str, RecordDict], None],
) -> None:
    """Push the question to `nodes` and hand each answer to `add`, which raises UpdateError for an unusable one."""
    began = time.monotonic()
    digest = _digest(content)
    messages = []
    for node in nodes:
        message = Message(content, dst_node_id=node, message_type=kind, group_id=str(plan.round), ttl=deadline)
        assign_message_id(message, hashlib.sha256(f"{kind}|{node}|{digest}".encode()).hexdigest()[:32])
        messages.append(message)
    waiting = {node: site_name(grid, node) for node in nodes}
    for reply in grid.send_and_receive(messages, timeout=deadline):
        site = waiting.pop(reply.metadata.src_node_id, None)
        if site is None:
            log.warning("a second reply of node %d in round %d was dropped", reply.metadata.src_node_id, plan.round)
            continue
        if reply.has_error():
            answers.declined.append(Declined(site, _code_name(reply.error.code), reply.error.reason or "no reason"))
            continue
        try:
            add(site, reply.content)
        except UpdateError as error:
            answers.declined.append(Declined(site, "unusable", str(error)))
        else:
            answers.answered.append(site)
    answers.silent = sorted(waiting.values())
    answers.seconds = time.monotonic() - began


def _digest(content: RecordDict) -> str:
    """SHA-256 of everything that is asked: plan and parameters."""
    digest = hashlib.sha256()
    for key, record in sorted(content.array_records.items()):
        for name, array in record.items():
            digest.update(f"{key}/{name}/{array.shape}|".encode())
            digest.update(array.data)
    digest.update(str(content.config_records[PLAN][JSON]).encode())
    return digest.hexdigest()


def _weights(content: RecordDict) -> tuple[float, int]:
    record = _part(content.metric_records, METRICS)
    weight, examples = _number(record, WEIGHT), _number(record, EXAMPLES)
    if examples < 0 or weight <= 0:
        raise UpdateError(f"the answer claims {examples:g} examples and weight {weight:g}")
    return weight, int(examples)


def _part(records: Mapping[str, R], name: str) -> R:
    if name not in records:
        raise UpdateError(f"the answer lacks its record {name!r}")
    return records[name]


def _number(record: MetricRecord, name: str) -> float:
    value = record.get(name)
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise UpdateError(f"the answer's {name!r} is {value!r}, expected a finite number")
    return float(value)


def _receipt(content: RecordDict) -> Receipt:
    try:
        return Receipt.model_validate_json(str(_part(content.config_records, RECEIPT).get(JSON)))
    except ValidationError as error:
        raise UpdateError(f"the privacy receipt is malformed: {explain(error)}") from error


def _code_name(code: int) -> str:
    try:
        return RefusalCode(code).name.lower()
    except ValueError:
        return f"error {code}"
