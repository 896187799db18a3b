"""What models and versions may be called: names stand in paths of URLs, in scopes, in logs and in the state store."""

from typing import Annotated

from pydantic import StringConstraints

LONGEST_NAME = 64
NAME = f"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}"
"""A regular expression, without anchors."""
ModelName = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
VersionName = ModelName
