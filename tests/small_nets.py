"""Federations of small networks on made tables, for what needs a body and a head, or a normalisation layer.

The sites, the loop and the wire between them are the real ones; a batch is all of a site's examples, so that nothing is
random but the tables and the first parameters, which are seeded.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from fedclaw.learning.workload import Table, Workload
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.early_checks import check_combination
from fedclaw.server.round_report import Outcome
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.session import make_strategy
from fedclaw.site.service import SiteService
from tests.least_squares import Bowls, asked, play, service

HIDDEN = 2


class SmallNets(Workload):
    """`parted`: a linear body and a linear head; `normed`: layer normalisation and a linear head. Two classes."""

    name: ClassVar[str] = "small_nets"

    def __init__(self, inputs: int) -> None:
        super().__init__(Bowls(inputs))
        self.inputs = inputs

    def default_model(self) -> ModelSpec:
        return ModelSpec(name="parted")

    def build(self, spec: ModelSpec) -> nn.Module:
        if spec.name == "normed":
            layers = {"norm": nn.LayerNorm(self.inputs), "head": nn.Linear(self.inputs, 2)}
        else:
            layers = {"body": nn.Linear(self.inputs, HIDDEN, bias=False), "head": nn.Linear(HIDDEN, 2)}
        return nn.Sequential(OrderedDict(layers))

    def spec_of(self, model: nn.Module) -> ModelSpec:
        return ModelSpec(name="normed" if "norm" in dict(model.named_children()) else "parted")


def nets(tables: Mapping[str, tuple[Table, Table]], root: Path | None = None) -> dict[str, SiteService]:
    """A site for each, by name, of (training data, test data)."""
    made = {}
    for name, (train, test) in tables.items():
        states = None if root is None else root / name
        made[name] = service(name, SmallNets(train.inputs.shape[1]), train, test=test, root=states)
    return made


def record_of(strategy: str, model: str, inputs: int, **changes: Any) -> RunRecord:
    """A run with what its strategy keeps at the sites, as the server makes it."""
    fields = {"workload": SmallNets.name, "model": ModelSpec(name=model), "metrics": ("accuracy",)}
    record = asked(strategy, **{**fields, **changes})
    chosen, built = make_strategy(record), SmallNets(inputs).build(record.model)
    check_combination(record, chosen, built)
    return record.model_copy(update={"personal": tuple(sorted(chosen.personal(built)))})


def first(model: str, inputs: int) -> Arrays:
    """The parameters that a run begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        built = SmallNets(inputs).build(ModelSpec(name=model))
    return {name: parameter.detach().numpy().copy() for name, parameter in built.named_parameters()}


def run(root: Path, record: RunRecord, sites: Mapping[str, SiteService], **options: Any) -> Outcome:
    """Run, or go on with, the run in `root`."""
    inputs = next(iter(sites.values())).data.train.inputs.shape[1]
    return play(root, record, sites, first(record.model.name, inputs), **options)


def own_labels(count: int = 6, inputs: int = 12, rows: int = 24) -> dict[str, tuple[Table, Table]]:
    """Sites that see the same two features of their inputs, each with its own half of that plane as class 1."""
    generator = np.random.default_rng(7)
    features = np.linalg.qr(generator.normal(size=(inputs, HIDDEN)))[0]
    tables = {}
    for number in range(count):
        angle = 2 * np.pi * number / count
        direction = features @ np.array([np.cos(angle), np.sin(angle)])
        drawn = [generator.normal(size=(size, inputs)).astype(np.float32) for size in (rows, 500)]
        train, test = (Table(inputs, (inputs @ direction > 0).astype(np.int64)) for inputs in drawn)
        tables[f"site-{number}"] = train, test
    return tables


def own_scales(count: int = 4, inputs: int = 8, rows: int = 60) -> dict[str, tuple[Table, Table]]:
    """Sites that measure the same things, and each some of them with the sign turned and on another scale."""
    generator = np.random.default_rng(11)
    direction = generator.normal(size=inputs)
    tables = {}
    for number in range(count):
        scale = np.where(np.arange(inputs) % count == number, -1.5, 1.0)
        drawn = [generator.normal(size=(size, inputs)) for size in (rows, 500)]
        labels = [(part @ direction > 0).astype(np.int64) for part in drawn]
        train, test = (Table((part * scale).astype(np.float32), y) for part, y in zip(drawn, labels, strict=True))
        tables[f"site-{number}"] = train, test
    return tables
