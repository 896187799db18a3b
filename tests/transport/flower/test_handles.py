"""A site that fails to answer on Flower's runtimes leaves nothing open behind, however often it is asked."""

from pathlib import Path

import pytest

from fedclaw.transport.flower import site as flower_site
from fedclaw.transport.flower.site import AnswerStore
from fedclaw.transport.flower.site_location import SiteLocation
from tests.site.conftest import Asker


def open_in(root: Path) -> list[str]:
    """The files below `root` that this process holds open."""
    targets = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
    return [target for target in targets if target.startswith(str(root))]


def no_room(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")


def damage(root: Path) -> None:
    """The outbound log says that something left of which the ledger knows nothing."""
    (root / "state" / "ledger.sqlite").unlink()


@pytest.mark.parametrize("cause", ["the answer cannot be stored", "the books do not agree"])
def test_a_failed_answer_leaves_no_file_open(root, monkeypatch, cause):
    asker = Asker(root)
    message = asker.message()
    asker.site.ledger.close()
    location = SiteLocation(root, asker.site.federation)
    if cause == "the answer cannot be stored":
        monkeypatch.setattr(AnswerStore, "store", no_room)
    else:
        assert not flower_site.answer_at(location, message).has_error()
        flower_site._forget(location)
        damage(root)
    open_before = len(open_in(root))
    for _ in range(3):
        assert flower_site.answer_at(location, message).has_error()
    assert len(open_in(root)) == open_before
