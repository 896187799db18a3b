import json
import shlex
import shutil
from pathlib import Path

import pytest

from fedclaw.export import layout
from fedclaw.export.__main__ import verify_command


@pytest.fixture
def run(table_run, tmp_path):
    """A copy of the tabular run without its bundle."""
    return shutil.copytree(table_run.root, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))


def test_exports_with_real_inputs_and_says_so_quietly(process, run, home, tmp_path):
    rows = tmp_path / "real.csv"
    rows.write_text("age,smoker,ward\n61,yes,surgery\n20,no,medicine\n")
    result = process("-m", "fedclaw.export", f"run={run}", f"federation={home.root}", f"inputs={rows}")
    assert result.returncode == 0, result.stderr
    (loading,) = result.stderr.splitlines()
    assert loading.endswith("loading torch and ONNX")
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "bundle", "files", *["parity"] * 3, "signed", "next",
    ]  # fmt: skip
    told = result.stdout.splitlines()[1].removeprefix("files").strip()
    assert told.split(", ") == sorted(path.name for path in (run / "bundle").iterdir())
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("next"))
    assert command == ["python", "-m", "fedclaw.verify", str(run / "bundle"), f"ca={home.root / 'ca.crt'}"]
    manifest = json.loads((run / "bundle" / layout.MANIFEST).read_bytes())
    assert manifest["parity"]["inputs"] == "real"
    assert {name: figures["examples"] for name, figures in manifest["parity"]["files"].items()} == {
        layout.ONNX: 2, layout.PROGRAM: 2, layout.PIPELINE: 2,
    }  # fmt: skip
    assert manifest["pipeline"]["compared_on"] == "real"


@pytest.mark.parametrize("name", ["plain", "two words", "a=b", 'it\'s (here), "now"', "-dash", "~tilde", "5"])
def test_the_next_command_works_as_pasted(command, run, home, tmp_path, monkeypatch, name):
    """Relative to where the export was run, and whatever the names hold."""
    place = tmp_path / "place"
    place.mkdir()
    shutil.copytree(home.root, place / f"{name} home")
    monkeypatch.chdir(place)
    line = verify_command(Path(name), Path(f"{name} home") / "ca.crt")
    done = command(*shlex.split(line)[2:])
    # Read as it was meant, the bundle by its name, after the CA: there is none of that name.
    assert done.returncode == 2
    assert name in done.stderr
    assert "ca=" not in done.stderr


def test_mistakes_get_one_clear_line(command, run, home, tmp_path):
    good = {"run": run, "federation": home.root}
    mistakes = [
        ({"run": tmp_path / "nowhere"}, 2, "is not a run directory"),
        ({"federation": tmp_path / "nowhere"}, 2, "is not a federation directory"),
        ({"inputs": tmp_path / "missing.csv"}, 2, "missing.csv: no such file"),
        ({"tolerance": "-1"}, 2, "tolerance: Input should be greater than 0"),
        ({"model": "best"}, 2, "model: Input should be 'auto', 'final' or 'compressed'"),
        ({"model": "compressed"}, 2, "has no compressed model"),
        ({"floor": "1.1"}, 2, "floor: Input should be less than or equal to 1"),
        ({"floor": "true"}, 2, "floor: Input should be a number, not yes"),
        ({"floor": "0.9"}, 1, "the final model reaches accuracy 0.8750"),
        ({"ledgers": f"[{tmp_path / 'ledger'}]"}, 2, "ledger: no such file"),
        ({"ledgers": f"[{run}]"}, 2, "site.yaml"),
    ]
    for change, code, message in mistakes:
        result = command("fedclaw.export", *(f"{key}={value}" for key, value in {**good, **change}.items()))
        assert (result.returncode, result.stdout) == (code, "")
        assert message in result.stderr.splitlines()[0]
        assert "Traceback" not in result.stderr
    assert not (run / "bundle").exists()


def test_another_federations_keys_do_not_sign(command, run, home):
    record = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps({**record, "federation": "elsewhere"}))
    result = command("fedclaw.export", f"run={run}", f"federation={home.root}")
    assert result.returncode == 1
    assert "is a run of the federation 'elsewhere'" in result.stderr


def test_a_missing_exporter_names_the_extra(process, run, home):
    result = process("-m", "fedclaw.export", f"run={run}", f"federation={home.root}", broken=["onnxscript"])
    assert result.returncode == 2
    assert "pip install 'fedclaw[export]'" in result.stderr
    assert not (run / "bundle").exists()


def test_a_stated_licence_is_in_the_card_and_the_bill_and_a_name_on_two_lines_is_refused(command, run, home):
    result = command("fedclaw.export", f"run={run}", f"federation={home.root}", "license=Apache-2.0")
    assert result.returncode == 0, result.stderr
    assert "\nlicense: apache-2.0\n" in (run / "bundle" / layout.CARD).read_text()
    bill = json.loads((run / "bundle" / layout.SBOM).read_bytes())
    assert bill["metadata"]["component"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    result = command("fedclaw.export", f"run={run}", f"federation={home.root}", 'license="a\nb"', "overwrite=true")
    assert result.returncode == 2
    assert "license" in result.stderr.splitlines()[0]
