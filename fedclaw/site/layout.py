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


def outbox_directory(root: Path) -> Path:
    """Replies that wait, or may be asked for again."""
    return state_directory(root) / "outbox"


def answers_directory(root: Path) -> Path:
    """The same on Flower's runtimes."""
    return state_directory(root) / "answers"


def mark_file(root: Path) -> Path:
    """What says, outside of the state, that a ledger was begun."""
    return root / "ledger.json"


def strategy_directory(root: Path) -> Path:
    """What strategies remember of each run."""
    return state_directory(root) / "strategy"
