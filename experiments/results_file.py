"""What an experiment leaves as data: the page and the plot are made from it, again whenever somebody likes."""

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from fedclaw.errors import UsageError
from fedclaw.files import write_atomic
from fedclaw.protocol.frozen import Frozen, explain


class ResultsFile(Frozen):
    """An experiment's results as a JSON file."""

    def write(self, path: Path) -> None:
        """Write what `read` reads."""
        write_atomic(path, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The results in `path`. Raises UsageError."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}); run the experiment first") from error
        except ValidationError as error:
            raise UsageError(f"{path} is no result of this experiment: {explain(error)}") from error
