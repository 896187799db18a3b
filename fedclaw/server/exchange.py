"""One exchange with a cohort: ask (`fedclaw.protocol.questions`), and add what comes back as it comes."""

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.learning import postprocess
from fedclaw.learning.tasks.base import Task
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.server.accumulator import RobustAggregate
from fedclaw.server.answers import CohortAnswers, Evaluated, Trained
from fedclaw.server.grids import CohortGrid, site_name

log = logging.getLogger(__name__)


def train(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    outgoing: Outgoing,
    deadline: float,
    robust: RobustAggregate | None = None,
) -> Trained:
    """Ask `nodes` to train by `plan`, and add up their answers or aggregate them robustly. `deadline` in seconds."""
    trained = Trained.for_plan(plan, outgoing.parameters, robust)
    if isinstance(grid, CohortGrid):
        grid.train_cohort(nodes, plan, outgoing, trained)
    else:
        asked = questions(nodes, plan.round, MessageType.TRAIN, training_question(plan, outgoing), deadline)
        ask(grid, asked, deadline, trained)
    trained.bytes_down = outgoing.nbytes * len(trained.answered)
    return trained


def training_question(plan: Plan, outgoing: Outgoing) -> RecordDict:
    """The question to train by `plan`, with the largest size of its answer. Raises PluginError."""
    return question(plan, outgoing, postprocess.answer_bytes(outgoing.parameters, plan))


def evaluate(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    parameters: Mapping[str, NDArray[np.float32]],
    deadline: float,
    task: Task,
) -> Evaluated:
    """Ask `nodes` to evaluate `parameters`, a model of `task`, on their own test data. `deadline` in seconds."""
    evaluated = Evaluated(wanted=plan.metrics, task=task, score_bins=plan.score_bins)
    if isinstance(grid, CohortGrid):
        grid.evaluate_cohort(nodes, plan, parameters, evaluated)
        return evaluated
    content = question(plan, Outgoing(parameters))
    ask(grid, questions(nodes, plan.round, MessageType.EVALUATE, content, deadline), deadline, evaluated)
    return evaluated


def ask(grid: Grid, messages: Sequence[Message], deadline: float, answers: CohortAnswers) -> None:
    """Send `messages`, one per site, and add the replies of the next `deadline` seconds to `answers`."""
    began = time.monotonic()
    waiting = {message.metadata.dst_node_id: site_name(grid, message.metadata.dst_node_id) for message in messages}
    for reply in grid.send_and_receive(messages, timeout=deadline):
        site = waiting.pop(reply.metadata.src_node_id, None)
        if site is None:
            log.warning("a second reply of node %d was dropped", reply.metadata.src_node_id)
        else:
            answers.add_reply(site, reply)
    answers.silent = sorted(waiting.values())
    answers.seconds = time.monotonic() - began
