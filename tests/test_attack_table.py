"""The attack table: cells of real runs, kept by their configuration, and a page whose numbers are theirs."""

import pytest

from experiments.attack_table import __main__ as command
from experiments.attack_table import cells as kept
from experiments.attack_table import page
from experiments.attack_table.cells import CellResult, Store, run_cell
from experiments.attack_table.results import Results, collect, spread
from experiments.attack_table.settings import TableSettings, attacks, cells
from fedclaw.cli import compose_settings, make_console
from fedclaw.errors import UsageError

TINY = (
    "seeds=1",
    "workers=1",
    "rounds=2",
    "hostile=[1]",
    "~attacks.gaussian",
    "~attacks.label_flip",
    "~attacks.little_is_enough",
    "~attacks.inner_product",
    "strategies={fedavg: {}, median: {}}",
)


def settings_of(*overrides: str) -> TableSettings:
    return compose_settings("attack_table", overrides, TableSettings)


def test_the_table_has_every_strategy_under_every_attack() -> None:
    settings = settings_of()
    columns = list(attacks(settings))
    assert columns[0][0] == "none"
    assert len(columns) == 1 + len(settings.attacks) * len(settings.hostile)
    made = list(cells(settings, 3))
    assert len(made) == len(columns) * len(settings.strategies)
    assert len({cell.digest for seed in (1, 2) for cell in cells(settings, seed)}) == 2 * len(made)
    with pytest.raises(UsageError, match="10 of 10 sites cannot be hostile"):
        settings_of("hostile=[10]")


def test_a_run_is_kept_found_again_and_written_down(tmp_path, monkeypatch) -> None:
    settings = settings_of(*TINY, f"output={tmp_path}/docs", f"runs={tmp_path}/runs")
    console = make_console(stderr=True)
    results = command.run(settings, console)
    assert results.seeds == (1,)
    assert Results.read(tmp_path / "docs" / "robust.json") == results
    assert results.find("fedavg", "sign_flip", 1).accuracy[0] < results.find("median", "sign_flip", 1).accuracy[0]
    assert results.find("fedavg", "sign_flip", 1).backdoor is None
    text = (tmp_path / "docs" / "robust.md").read_text()
    assert f"{100 * results.find('median', 'sign_flip', 1).accuracy[0]:.1f} ± 0.0" in text
    assert (tmp_path / "docs" / "robust.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(kept, "run_cell", None)
    assert command.run(settings, console) == results
    store = Store(settings.runs)
    cell = next(cells(settings, 1))
    store.path(cell).write_text("{")
    assert store.result(cell) is None
    with pytest.raises(UsageError, match="no seed is done yet"):
        collect(settings, store)


def test_the_same_cell_gives_the_same_numbers() -> None:
    cell = next(cells(settings_of(*TINY), 1))
    first, again = run_cell(cell), run_cell(cell)
    assert first.accuracy == again.accuracy > 0.15


def test_a_model_that_overflows_is_an_attack_that_has_won() -> None:
    settings = settings_of(*TINY, "attacks.sign_flip.scale=1e25", "rounds=4")
    cell = next(cell for cell in cells(settings, 1) if cell.attack.name == "sign_flip" and cell.strategy == "fedavg")
    result = run_cell(cell)
    assert result.rounds < 4
    assert result.accuracy < 0.3


def test_the_page_says_how_many_seeds_it_has(tmp_path) -> None:
    settings = settings_of("seeds=3", f"runs={tmp_path}")
    store = Store(settings.runs)
    for seed in (1, 3):
        for cell in cells(settings, seed):
            door = 0.5 if cell.attack.name == "backdoor" else None
            store.write(cell, CellResult(accuracy=seed / 4, backdoor=door, rounds=8, seconds=60))
    results = collect(settings, store)
    assert results.seeds == (1, 3)
    text = page.render(results, "robust.png")
    assert "over 2 seeds" in text
    assert "50.0 ± 35.4" in text
    assert spread([0.25, 0.75]) == (0.5, pytest.approx(0.3536, abs=1e-4))
