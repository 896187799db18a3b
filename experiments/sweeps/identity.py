"""What a run is: everything that its result depends on, and nothing else."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from fedclaw.files import sha256_file
from fedclaw.protocol.frozen import Frozen

IRRELEVANT = frozenset({"run", "runs", "resume", "tracking"}) | {
    f"runtime.{name}"
    for name in (
        *("workers", "mode", "device", "save_every"),
        *("address", "cpus", "cpus_per_site", "gpus_per_site", "object_store"),
    )
}
"""Settings of conf/run.yaml that no result depends on: names, places, and how fast. A new setting counts until it is
listed here: to run something twice is better than to take one result for another."""
_SINCE = frozenset({"data", "sites"})
"""Settings that came later: without a value a run is the one that it was before there were any."""
_DIGITS = 12
EXPERIMENT_FILE = "experiment.json"
"""In a run's directory: its `Identity`."""


class Identity(Frozen):
    """A run's configuration, and the digits that tell it from any other."""

    digest: str
    configuration: dict[str, JsonValue]


def identify(settings: Mapping[str, Any]) -> Identity:
    """The identity of a run with these settings (plain values, checked or not).

    A file that the settings name counts by its content where it can be read.
    """
    relevant = _relevant(settings, "")
    if (statistics := relevant.get("statistics")) is not None and Path(str(statistics)).is_file():
        relevant["statistics"] = f"sha256:{sha256_file(Path(str(statistics)))}"
    return Identity(digest=digest_of(relevant), configuration=relevant)


def is_relevant(key: str) -> bool:
    """Whether a result may depend on the setting `key`, written as on the command line."""
    return key not in IRRELEVANT and key.partition(".")[0] not in IRRELEVANT


def _relevant(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name: _relevant(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if is_relevant(f"{prefix}{name}") and not (value is None and f"{prefix}{name}" in _SINCE)
    }


def digest_of(values: Any) -> str:
    """Twelve hexadecimal digits of plain values, however their keys are ordered."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
