"""What the tests of the export share; the bundles are those of `tests/bundles.py`."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedclaw.export.__main__ as export_command
import fedclaw.lineage as lineage_command
import fedclaw.predict as predict_command
import fedclaw.verify as verify_command
from fedclaw.cli import run_main
from fedclaw.export.source import Source
from fedclaw.server.run_directory import SiteReceipt
from tests.bundles import BARE, FEDERATION, PRIVATE, RECEIPT, TABLE, make_run, training_rows
from tests.samples import receipt


@pytest.fixture(scope="session")
def samples() -> SimpleNamespace:
    """What tests build on; pytest's importlib mode does not let them import it."""
    return SimpleNamespace(
        federation=FEDERATION,
        table=TABLE,
        private=PRIVATE,
        bare=BARE,
        raw_receipt=RECEIPT,
        rows=training_rows(),
        receipt=receipt,
        make_run=make_run,
    )


@pytest.fixture
def bundle(table_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tabular bundle that a test may damage."""
    return Path(shutil.copytree(table_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def with_receipts(table_source: Source) -> Callable[..., Source]:
    """The tabular source as if its training run had left other receipts."""

    def change(by_site: dict[str, SiteReceipt]) -> Source:
        training = dataclasses.replace(table_source.receipts[0], by_site=by_site)
        return dataclasses.replace(table_source, receipts=(training,))

    return change


ENTRY_POINTS: dict[str, Callable[[Sequence[str]], None]] = {
    "fedclaw.export": export_command.main,
    "fedclaw.verify": verify_command.main,
    "fedclaw.lineage": lineage_command.main,
    "fedclaw.predict": predict_command.main,
}


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs an entry point as `python -m module ...` would, in this process: a new one imports torch for seconds."""

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_main(module, "usage", ENTRY_POINTS[module])
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return subprocess.CompletedProcess([module, *arguments], exit_.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ...` in a process of its own; packages named in `broken` cannot be imported there."""

    def run(*arguments: str, broken: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as trap:
            for name in broken:
                (Path(trap) / f"{name}.py").write_text(f"raise ImportError('not installed here', name={name!r})")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": trap}
            line = [sys.executable, *arguments]
            return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)

    return run
