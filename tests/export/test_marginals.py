"""marginals.json: the noised distributions of a charged release, in the bundle, named in the privacy statement."""

import json
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from fedclaw.errors import BundleError
from fedclaw.export import layout
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.export.marginals import ColumnMarginal, Marginals, marginals_of, release_at_hand
from fedclaw.export.source import load_source
from fedclaw.export.statement import PrivacyStatement, state
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.statistics_release import write_release
from tests.samples import statistics_release


def test_without_noise_they_are_the_rows_own_shares(table_source, samples):
    rows = samples.rows
    release = statistics_release(table_source.record, table_source.schema, rows, deviation=0.0)
    found = marginals_of(release, table_source.record, table_source.schema)
    assert (found.release, found.examples.value) == ("release", pytest.approx(3000))
    age, ward = found.columns["age"], found.columns["ward"]
    expected = np.histogram(rows.columns["age"][300:], np.linspace(0, 120, 65))[0] / 2700
    assert (len(age.edges), age.edges[0], age.edges[-1], age.levels) == (65, 0.0, 120.0, ())
    assert age.shares == pytest.approx(expected, abs=1e-9)
    assert age.missing is not None
    assert age.missing.value == pytest.approx(0.1)
    assert ward.levels == ("surgery", "medicine")
    assert ward.shares == pytest.approx([1 - rows.columns["ward"].mean(), rows.columns["ward"].mean()])


def test_with_noise_they_say_how_much(table_source, samples):
    rows = samples.rows
    exact = marginals_of(
        statistics_release(table_source.record, table_source.schema, rows, 0.0),
        table_source.record,
        table_source.schema,
    )
    scores = []
    for seed in range(40):
        release = statistics_release(table_source.record, table_source.schema, rows, 2.0, seed=seed)
        noised = marginals_of(release, table_source.record, table_source.schema).columns["age"]
        scores += [
            (share - true) / noised.error
            for share, true in zip(noised.shares, exact.columns["age"].shares, strict=True)
        ]
    assert 0.9 < np.std(scores) < 1.1


def test_the_bundle_has_them_and_the_statement_counts_and_names_the_release(
    table_source, table_bundle, table_release, marginals_bundle, home
):
    trust = Trust(home.signer().ca_pem)
    assert layout.MARGINALS not in verify_bundle(table_bundle, trust).files
    kept = verify_bundle(marginals_bundle, trust, [layout.MARGINALS, layout.PRIVACY]).contents
    found = Marginals.model_validate_json(kept[layout.MARGINALS])
    assert found == marginals_of(table_release, table_source.record, table_source.schema)
    statement = PrivacyStatement.model_validate_json(kept[layout.PRIVACY])
    assert statement.marginals == table_release.use
    before = (table_bundle / layout.PRIVACY).read_bytes()
    bound = PrivacyStatement.model_validate_json(before).overall
    assert statement.overall.epsilon == pytest.approx(bound.epsilon + table_release.epsilon)
    assert "marginals" not in json.loads(before)


def test_a_release_that_was_used_before_is_charged_once(table_source, table_release):
    def bound(**used):
        return state(table_source.receipts, None, "none was done.", **used).overall

    assert bound(statistics=table_release.use, marginals=table_release.use) == bound(statistics=table_release.use)
    assert bound(marginals=table_release.use).epsilon == pytest.approx(bound().epsilon + table_release.epsilon)


def test_changed_marginals_are_refused_with_the_bundle(marginals_bundle, home, tmp_path):
    shutil.copytree(marginals_bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / layout.MARGINALS
    path.write_text(path.read_text().replace("surgery", "Surgery"))
    with pytest.raises(BundleError, match=r"marginals\.json in the bundle was changed"):
        verify_bundle(tmp_path / "bundle", Trust(home.signer().ca_pem))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": "other"}, "of federation 'other'"),
        ({"schema_digest": "00" * 32}, "another schema"),
    ],
)
def test_a_release_of_something_else_is_refused_and_nothing_is_left(
    table_source, home, table_release, tmp_path, changes, message
):
    other = table_release.model_copy(update=changes)
    with pytest.raises(BundleError, match=message):
        export_bundle(table_source, home.signer(), tmp_path / "bundle", Request(marginals=other))
    assert list(tmp_path.iterdir()) == []


def test_what_drowns_in_noise_is_left_out(table_source, samples):
    loud = statistics_release(table_source.record, table_source.schema, samples.rows, deviation=3000.0)
    with pytest.raises(BundleError, match="say too little"):
        marginals_of(loud, table_source.record, table_source.schema)


def test_the_runs_own_release_is_found_beside_it(table_run, samples, table_release, tmp_path):
    record = table_run.record().model_copy(update={"statistics": table_release.use})
    run = RunDirectory.create(tmp_path / "runs" / "table", record)
    schema = load_source(table_run).schema
    assert release_at_hand(run, schema) is None
    path = tmp_path / "runs" / "release" / "statistics.json"
    write_release(path, table_release)
    assert release_at_hand(run, schema) == table_release
    assert release_at_hand(table_run, schema) is None  # it used none
    write_release(path, table_release.model_copy(update={"epsilon": 0.25}))
    assert release_at_hand(run, schema) is None
    path.write_text("{}")
    assert release_at_hand(run, schema) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"shares": (0.5,)},
        {"edges": (0.0, 1.0, 1.0)},
        {"edges": (0.0, 2.0, 1.0)},
        {"levels": ("a", "b")},
        {"edges": (), "levels": ("a", "a")},
        {"edges": ()},
        {"shares": (0.5, float("nan"))},
        {"error": float("inf")},
    ],
)
def test_a_column_that_contradicts_itself_is_none(changes):
    fields = {"edges": (0.0, 1.0, 2.0), "shares": (0.5, 0.5), "error": 0.1, "missing": None}
    ColumnMarginal(**fields)
    with pytest.raises(ValidationError):
        ColumnMarginal(**{**fields, **changes})
