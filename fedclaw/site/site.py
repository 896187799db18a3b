"""What a site has while it serves: data, policy, ledger, and models and tensors that stay warm between messages."""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict

from fedclaw.errors import FedClawError, PluginError
from fedclaw.learning.step_loop import load_parameters
from fedclaw.learning.workload import Table, Workload
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.protocol.arrays import Arrays, all_finite, unpack
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import ModelSpec
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.policy.checks import check_size
from fedclaw.site.policy.policy import Policy
from fedclaw.site.settings import DataFiles
from fedclaw.site.shared_rows import are_held_out, shared_rows
from fedclaw.site.state import SiteStates

WARM_MODELS = 3
"""Models kept between messages: a student, its teacher, and one that is evaluated beside them."""


@dataclass(frozen=True)
class SiteData:
    """A site's tables and the fingerprints (SHA-256) of their content."""

    train: Table
    test: Table | None
    fingerprint: str
    """Of the training data."""
    test_fingerprint: str | None = None
    files: DataFiles | None = None
    """Where they were read from; None: made in memory."""


@dataclass
class Site:
    """One site, warm."""

    name: str
    federation: str
    workload: Workload
    schema_digest: str
    data: SiteData
    policy: Policy
    ledger: Ledger
    test_ledger: Ledger | None = None
    """Where evaluations are charged, on the test data, if the policy has metrics noised."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    source: GaussianSource = field(default_factory=GaussianSource)
    speed: StepSpeed = field(default_factory=StepSpeed)
    states: SiteStates = field(default_factory=SiteStates)
    """What strategies remember here from round to round."""
    outbound: OutboundLog | None = None
    preprocessing: str | None = field(default=None, init=False, repr=False)
    """The federation's constants that the tables are standardised by, if the schema takes any and they have come."""
    shared_test_rows: int = field(default=0, init=False)
    """Test rows that are training rows, in the data that the site began with: no server's constants change it."""
    _models: OrderedDict[str, torch.nn.Module] = field(default_factory=OrderedDict, init=False, repr=False)
    """Warm models, the least recently used one first."""
    _tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def shell(self, spec: ModelSpec) -> torch.nn.Module:
        """A model of `spec` for its names and shapes: what numbers it holds, if any, is not said. Raises Refusal."""
        asked = spec.model_dump_json()
        for key, model in self._models.items():
            if key.partition(" ")[2] == asked:
                return model
        try:
            with torch.device("meta"):
                shell = self.workload.build(spec)
        except PluginError as error:
            raise Refusal(RefusalCode.MODEL, str(error)) from error
        check_size(self.policy, sum(parameter.numel() for parameter in shell.parameters()))
        return shell

    def __post_init__(self) -> None:
        self.shared_test_rows = shared_rows(self.data.train, self.data.test)

    @property
    def is_tested_on_held_out_data(self) -> bool:
        """Whether metrics of the test data tell nothing that the training data's budget protects."""
        test = self.data.test
        return test is None or are_held_out(self.policy, self.shared_test_rows, len(test))

    def model(self, spec: ModelSpec, parameters: Arrays, role: str = "student") -> torch.nn.Module:
        """A warm model of `spec` with these parameters in it; takes no more memory than what arrived did.

        Raises Refusal when it is larger than the policy allows or the parameters are of another model.
        """
        check_size(self.policy, sum(array.size for array in parameters.values()))
        key = f"{role} {spec.model_dump_json()}"
        warm = self._models.get(key)
        shell = self.shell(spec) if warm is None else warm
        try:
            expected = {name: tuple(parameter.shape) for name, parameter in shell.named_parameters()}
            if expected != {name: array.shape for name, array in parameters.items()}:
                raise Refusal(RefusalCode.MODEL, f"the parameters sent are not those of model {spec.name!r}")
            while warm is None and len(self._models) >= WARM_MODELS:
                self._models.popitem(last=False)
            model = self.workload.build(spec).to(self.device) if warm is None else warm
        except PluginError as error:
            raise Refusal(RefusalCode.MODEL, str(error)) from error
        load_parameters(model, parameters)
        self._models[key] = model
        self._models.move_to_end(key)
        return model

    def use(self, data: SiteData, preprocessing: str) -> None:
        """Take `data`, standardised by these constants, in the place of what was there."""
        self.data, self.preprocessing = data, preprocessing
        self._tensors.clear()

    def on_device(self, split: str, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (N, *D) and targets (N,) of `table`, moved once; `split` is what it is kept under."""
        if split not in self._tensors:
            inputs, targets = torch.from_numpy(table.inputs), torch.from_numpy(table.targets)
            self._tensors[split] = inputs.to(self.device), targets.to(self.device)
        return self._tensors[split]


def sent_arrays(content: RecordDict, name: str) -> Arrays:
    """The arrays that came under `name`. Raises Refusal when there are none, they cannot be read or are not finite."""
    try:
        arrays = unpack(content.array_records[name])
    except (KeyError, FedClawError) as error:
        raise Refusal(RefusalCode.MALFORMED, f"the record {name!r} cannot be read: {error}") from error
    for label, array in arrays.items():
        if not all_finite(array):
            raise Refusal(
                RefusalCode.MALFORMED, f"the record {name!r} holds numbers that are not finite, in {label!r:.100}"
            )
    return arrays
