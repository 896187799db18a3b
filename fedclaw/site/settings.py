"""site.yaml: what a site's operator writes."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedclaw.errors import UsageError
from fedclaw.identity.data_keys import EncryptionSettings
from fedclaw.learning.workload import Delimiter, FileFormat
from fedclaw.privacy.speed import StepSpeed
from fedclaw.protocol.frozen import Written, explain
from fedclaw.protocol.limits import MOST_EXAMPLES
from fedclaw.site.policy.policy import Policy
from fedclaw.yaml_text import read_yaml

SITE_FILE = "site.yaml"


class DataFiles(Written):
    """Data files; a relative path starts at the site's directory."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """The data set's name, to which its privacy budget belongs for ever, whatever its files hold; null: the site's
    name. Give another name only to data on other people: see `Policy.epsilon`."""
    train: Path
    test: Path | None = None
    """Held-out examples for the federated evaluation; without it the site does not evaluate."""
    delimiter: Delimiter | None = None
    """Between the cells of these files; null: as the schema says."""
    decimal: Literal[".", ","] = "."
    encoding: Literal["utf-8", "utf-16", "latin-1", "windows-1252"] = "utf-8"
    title_lines: int = Field(default=0, ge=0, le=100)
    """Lines above the header; how else these files are written: `FileFormat`."""
    public_examples: int | None = Field(default=None, ge=1, le=MOST_EXAMPLES)
    """How many examples of training data there are, or persons where the schema names them, as the operator declares:
    a number that was known before the data was looked at (a study's planned size, a round figure), never counted in it,
    and the same for the data set's whole life. It leaves with every answer in the place of the true number, and nothing
    that leaves depends on that. null: they are counted, and their number leaves."""
    public_test_examples: int | None = Field(default=None, ge=1, le=MOST_EXAMPLES)
    """The same of the test data. Metrics then need the policy's `metrics_epsilon`: without noise they tell
    how many there are."""

    @model_validator(mode="after")
    def _of_some_test_data(self) -> Self:
        if self.public_test_examples is not None and self.test is None:
            raise ValueError("public_test_examples is the declared number of test examples, and there is no test file")
        return self

    @property
    def written(self) -> FileFormat:
        """How these files are written."""
        return FileFormat(
            delimiter=self.delimiter, decimal=self.decimal, encoding=self.encoding, title_lines=self.title_lines
        )


class SiteSettings(Written):
    """site.yaml, checked."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    workload: str
    schema_file: Path
    """The schema that the federation agreed on; a relative path starts at the site's directory."""
    data: DataFiles
    policy: Policy
    device: Literal["auto", "cpu", "cuda"] = "auto"
    speed: StepSpeed = StepSpeed()
    """How a private step is worked out; it changes no guarantee."""
    encryption: EncryptionSettings = EncryptionSettings()
    """What the client keeps of the site's data is encrypted at rest; a relative path starts at the site's directory."""

    @property
    def data_set(self) -> str:
        """The name under which the ledger charges the training data."""
        return self.data.name or self.name


def load_site_settings(root: Path) -> SiteSettings:
    """Read `root`/site.yaml, paths resolved. Raises UsageError naming the file and each wrong field."""
    path = root / SITE_FILE
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; a site directory holds {SITE_FILE}, see the README") from None
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        settings = SiteSettings.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, content, SiteSettings)}") from error
    files = {"train": root / settings.data.train, "test": settings.data.test and root / settings.data.test}
    data = settings.data.model_copy(update=files)
    return settings.model_copy(update={"schema_file": root / settings.schema_file, "data": data})


def require_name(root: Path, settings: SiteSettings, certified: str) -> None:
    """Raise UsageError unless site.yaml in `root` is for the site that its certificate names."""
    if settings.name != certified:
        raise UsageError(f"{root}: site.yaml says the name is {settings.name!r} and the certificate says {certified!r}")
