"""What a site has while it serves: data, policy, ledger, and models and tensors that stay warm between messages.

Its data files are read as tables, and once more when the federation's constants come with a plan. What is read again
has to be what was read first: the ledger has charged that content, and charges it on.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from flwr.app import RecordDict

from fedclaw.errors import DataError, FedClawError, NoExamples, PluginError
from fedclaw.files import sha256_file
from fedclaw.learning.workload import Schema, Table, Workload, load_parameters
from fedclaw.privacy.claims import relation_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.protocol.arrays import Arrays, all_finite, unpack
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import ModelSpec, Relation
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
    public_examples: int | None = None
    """How many units of training data there are by the operator's declaration; None: they are counted."""
    public_test_examples: int | None = None
    """The same of the test data."""

    @property
    def tells_no_number(self) -> bool:
        """Whether the number of units of some of the data is declared, and the true one is not to be told."""
        return self.public_examples is not None or self.public_test_examples is not None


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
        """Raise DataError where what is answered would depend on rows that no number that is told covers."""
        self.shared_test_rows = shared_rows(self.data.train, self.data.test)
        if self.data.tells_no_number and not self.is_tested_on_held_out_data:
            # Elsewhere it decides what is refused and which budget pays: a row there or not could change that.
            raise DataError(
                f"{self.shared_test_rows} of {len(self.data.test or ())} test rows are training rows (the same values "
                "and label), more than maximum_shared_test_rows allows. Beside a declared number of examples "
                "(data.public_examples, data.public_test_examples) what is answered must not depend on that: take them "
                "out of one of the two files, or raise maximum_shared_test_rows if they are of different people"
            )

    @property
    def examples(self) -> int:
        """The stated number of units of training data: all that is worked out of a number is worked out of this one.

        It leaves with every answer. Where it is declared, the number that there are is for sampling alone.
        """
        return self.data.public_examples or self.data.train.units

    @property
    def relation(self) -> Relation:
        """Between which training data sets what leaves differs by little."""
        return relation_of(self.data.public_examples)

    @property
    def test_units(self) -> int:
        """The stated number of units of test data; 0: the site does not evaluate."""
        test = self.data.test
        return 0 if test is None else self.data.public_test_examples or test.units

    @property
    def examples_of_test_unit(self) -> int:
        """How many examples of each unit of test data metrics use."""
        test = self.data.test
        return 1 if test is None or test.persons is None else self.workload.schema.rows_per_person or 1

    @property
    def test_examples(self) -> int:
        """The stated number of test examples that metrics use: it leaves with them."""
        return self.test_units * self.examples_of_test_unit

    def tested(self) -> Table:
        """The test data as metrics use it: of each person as many examples (`Table.evenly`)."""
        test = self.data.test
        assert test is not None
        return test if test.persons is None else test.take(test.evenly(self.examples_of_test_unit))

    @property
    def test_relation(self) -> Relation:
        """The same of the test data, where its metrics leave with noise."""
        return relation_of(self.data.public_test_examples)

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

    def on_device(self, split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (N, *D) and targets (N,) of the training data, or of the test data that metrics use; moved once."""
        if split not in self._tensors:
            table = self.data.train if split == "train" else self.tested()
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


def fitted(files: DataFiles, agreed: Schema) -> tuple[Schema, Table]:
    """The schema with what it takes of the training data, and that data as it reads it. Raises DataError."""
    try:
        return agreed.fit_examples(files.train)
    except NoExamples:
        if files.public_examples is None:
            raise
        # Raises it again where the schema needs examples to standardise by.
        schema = agreed.fit(files.train)
        return schema, schema.provisional().no_examples()


def _read(schema: Schema, path: Path, declared: int | None) -> Table:
    """The labelled data in `path`; there may be none of it where its number is `declared`."""
    try:
        return schema.read_examples(path)
    except NoExamples:
        if declared is None:
            raise
        return schema.no_examples()


def load_data(files: DataFiles, schema: Schema, train: Table | None = None) -> SiteData:
    """The site's tables, `train` where it has been read already; provisional ones if the schema waits for the
    federation's constants. A file is read once: its fingerprint is that of the bytes that were read.

    Raises DataError, for no training examples too unless their number is declared: then whether there is one is not to
    be told.
    """
    reader = schema.provisional()
    train = train if train is not None else _read(reader, files.train, files.public_examples)
    if len(train) == 0 and files.public_examples is None:
        raise DataError(f"{files.train} holds no examples")
    test = _read(reader, files.test, files.public_test_examples) if files.test else None
    _require_other_persons(files, train, test)
    return SiteData(
        train=train,
        test=test,
        fingerprint=train.content or fingerprint(files.train),
        test_fingerprint=(test.content or fingerprint(files.test)) if test is not None and files.test else None,
        files=files,
        public_examples=files.public_examples,
        public_test_examples=files.public_test_examples,
    )


def _require_other_persons(files: DataFiles, train: Table, test: Table | None) -> None:
    """Raise DataError if a person is in both: what is told of the test data would tell of the training data."""
    names = () if test is None else test.person_names
    if both := len(set(names).intersection(train.person_names)):
        raise DataError(
            f"{both} of {len(names)} persons in {files.test} are in {files.train} too, and nobody may be in both: a "
            "metric of theirs would tell of training data. Split by person, or take their rows out of one of the files"
        )


def files_of(data: SiteData) -> DataFiles:
    """Where `data` was read from. Raises DataError when that is nowhere."""
    if data.files is None:
        raise DataError("this data was made in memory, so it cannot be read again in another form")
    return data.files


def require_same(path: Path, before: str | None, now: str | None) -> None:
    """Raise DataError if the fingerprint of what is at `path` is no longer what it was `before`."""
    if now != before:
        raise DataError(f"{path} has changed since the client read it; start the client again")


def check_constants(site: Site, preprocessing: str | None) -> None:
    """Raise Refusal for constants that are missing or superfluous, which does not depend on data."""
    schema = site.workload.schema
    if schema.needs_constants and preprocessing is None:
        raise Refusal(
            RefusalCode.SCHEMA,
            "the schema says standardise: federated, and the plan brings no constants: start the server with "
            "statistics=FILE",
        )
    if preprocessing is not None and not schema.needs_constants:
        # Whether the data can be read with constants of the server's choice would tell, uncharged, what they are.
        raise Refusal(RefusalCode.SCHEMA, "the plan brings constants, and this site's schema takes none")


def is_prepared(site: Site, preprocessing: str | None) -> bool:
    """Whether the tables are standardised by these constants, or need none."""
    return preprocessing is None or preprocessing == site.preprocessing


def prepare(site: Site, preprocessing: str | None) -> None:
    """Have the site's tables standardised by the constants that a plan sends; read again only if they are new.

    All data is read, so whoever calls it has made sure before that the site is going to answer. Raises Refusal if the
    constants are missing, superfluous or not such as the schema allows, which does not depend on data, and DataError if
    the files have changed.
    """
    check_constants(site, preprocessing)
    if preprocessing is None or is_prepared(site, preprocessing):
        return
    try:
        schema = site.workload.schema.with_constants(preprocessing, "the plan's preprocessing")
    except DataError as error:
        raise Refusal(RefusalCode.SCHEMA, str(error)) from error
    files = files_of(site.data)
    data = load_data(files, schema)
    require_same(files.train, site.data.fingerprint, data.fingerprint)
    require_same(files.test or files.train, site.data.test_fingerprint, data.test_fingerprint)
    declared = {name: getattr(site.data, name) for name in ("public_examples", "public_test_examples")}
    site.use(replace(data, **declared), preprocessing)


def fingerprint(path: Path) -> str:
    """SHA-256 of a data file's bytes, or of the names and bytes of all files in a folder."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()
