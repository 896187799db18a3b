"""The table of compressed updates: its rows by hand, its page and its plot, and one run of it."""

import pytest

from experiments.compression_table import page
from experiments.compression_table.__main__ import main
from experiments.compression_table.cells import CellResult, Store, run_cell
from experiments.compression_table.results import rows
from experiments.compression_table.settings import TableSettings, cells
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError

TINY = ["seeds=2", "~tasks.digits", "tasks.breast_cancer.rounds=3"]


@pytest.fixture
def settings(tmp_path) -> TableSettings:
    return compose_settings("compression_table", [*TINY, f"output={tmp_path}", f"runs={tmp_path}"], TableSettings)


def made(cell):
    """As it is: 2 MB a site and round. Everything else: half of it, and the target one round later."""
    plain = cell.run.compression is None
    accuracy = (0.5, 0.95, 0.96) if plain else (0.5, 0.6, 0.95)
    return CellResult(sites=2, bytes_up=(4_000_000 if plain else 2_000_000,) * 3, accuracy=accuracy)


def test_rows_by_hand(settings):
    found = rows(settings, [(cell, made(cell)) for cell in cells(settings)])
    plain, half = found[0], found[1]
    assert [row.method for row in found] == list(settings.methods)
    assert (plain.update, plain.share, half.share) == (2e6, 1, 0.5)
    assert plain.final == pytest.approx((0.803, 0.803), abs=1e-3)
    assert plain.curve == ((2, 0.5), (4, 0.95), (6, 0.96))
    assert (plain.to_target, half.to_target) == (4, 3)


def test_a_seed_that_never_gets_there_leaves_no_mean(settings):
    low = CellResult(sites=2, bytes_up=(4, 4, 4), accuracy=(0.1, 0.1, 0.1))
    pairs = [(cell, low if cell.seed == 2 else made(cell)) for cell in cells(settings)]
    found = rows(settings, pairs)
    assert {row.to_target for row in found} == {None}
    assert "| never |" in page.render(found, settings, "plot.png")


def test_page_and_plot_come_from_what_is_done(settings, tmp_path):
    overrides = [*TINY, f"output={tmp_path}", f"runs={tmp_path}"]
    with pytest.raises(UsageError, match="runs are not done"):
        main(["page", *overrides])
    store = Store(settings.runs)
    for cell in cells(settings):
        store.write(cell, made(cell))
    main(["page", *overrides])
    text = (tmp_path / "update_compression.md").read_text()
    assert "| top 5% | 1,000,000 | 50.0% | 68.3 ± 0.0 | 3000 |" in text
    assert (tmp_path / "update_compression.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="unknown command"):
        main(["pages", *overrides])


def test_a_cell_is_a_run_of_the_servers_loop(settings):
    cell = next(cell for cell in cells(settings) if cell.method == "int8")
    result = run_cell(cell)
    assert len(result.accuracy) == 3
    assert 0 < max(result.bytes_up) < 4 * result.sites * 4_600
    Store(settings.runs).write(cell, result)
    assert Store(settings.runs).result(cell) == result


def test_what_is_compared_with_has_to_be_there(settings):
    with pytest.raises(ValueError, match="has to be null"):
        TableSettings.model_validate({**settings.model_dump(), "methods": {"int8": {"method": "int8"}}})
