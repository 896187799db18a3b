"""Where things are in a site's directory, below what `fedclaw.site.directory` opens; imports nothing heavy."""

from pathlib import Path


def state_directory(root: Path) -> Path:
    """Where the client keeps what must survive it."""
    return root / "state"


def ledger_file(root: Path) -> Path:
    """The privacy ledger."""
    return state_directory(root) / "ledger.sqlite"


def outbound_file(root: Path) -> Path:
    """The outbound log."""
    return state_directory(root) / "outbound.jsonl"


def strategy_directory(root: Path) -> Path:
    """What strategies remember of each run."""
    return state_directory(root) / "strategy"
