"""A module that only a notebook knows, as a signed bundle that others serve without it."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fedclaw
from fedclaw.identity.provisioning import initialise
from tests.api.conftest import Net, examples
from tests.conftest import environment

QUICK = {"rounds": 1, "learning_rate": 0.1}
PRIVATE = fedclaw.LocalPrivacy(epsilon=4, delta=1e-3, clip=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return initialise(tmp_path_factory.mktemp("federation") / "coordinator", "heart", "127.0.0.1:9443").root


class Twice(Net):
    """Its first layer is not trained, and the second it has under two names."""

    def __init__(self):
        super().__init__()
        self.hidden.requires_grad_(False)
        self.again = self.head


def test_arrays(federation, home, tmp_path):
    run = fedclaw.simulate(federation, Twice, **QUICK)
    bundle = run.export(tmp_path / "bundle", federation=home)
    assert repr(bundle).endswith("arrays model of 75 parameters, signed by heart, trusted=True)")
    assert (bundle.manifest.federation, bundle.manifest.workload, bundle.labels) == ("heart", "arrays", ("0", "1", "2"))
    x, y = examples(7, seed=3)
    wanted = torch.softmax(run.model()(torch.tensor(x, dtype=torch.float32)), 1).detach().numpy()
    np.testing.assert_allclose(bundle.predict(x), wanted, atol=1e-5)
    np.testing.assert_allclose(bundle.predict(pd.DataFrame(x)), wanted, atol=1e-5)
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    np.testing.assert_allclose(bundle.predict(tmp_path / "rows.npz"), wanted, atol=1e-5)
    np.savez(tmp_path / "wrong.npz", x=x[:, :4])
    with pytest.raises(fedclaw.DataError, match=r"wrong.npz: an example has the shape \(4,\); expected \(5,\)"):
        bundle.predict(tmp_path / "wrong.npz")
    np.savez(tmp_path / "nameless.npz", rows=x)
    with pytest.raises(fedclaw.DataError, match="has no array 'x'; it has rows"):
        bundle.predict(tmp_path / "nameless.npz")
    table = federation.schema.read_examples(tmp_path / "rows.npz")
    assert table.targets.tolist() == y.tolist()
    assert "trained in a simulation of 4 clients, signed by the federation heart" in bundle.card
    assert [warning[:10] for warning in bundle.privacy["warnings"]] == ["SIMULATED:", "NO DIFFERE"]


def patients(count=120):
    generator = np.random.default_rng(5)
    age = generator.integers(20, 90, count)
    ward = generator.choice(["heart", "lung"], count)
    stay = np.clip(age / 10 + 4 * (ward == "lung"), 0, 20)
    clinic, smoker = generator.choice(3, count), generator.random(count) < 0.3
    return pd.DataFrame({"age": age / 100, "ward": ward, "smoker": smoker, "clinic": clinic, "stay": stay})


def test_a_data_frame_is_served_from_its_own_columns_by_a_process_that_never_saw_the_module(home, tmp_path):
    frame = patients()
    federation = fedclaw.Federation.from_frame(frame, target="stay", by="clinic", value_range=(0, 20))
    model = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    run = fedclaw.simulate(federation, model, privacy=PRIVATE, **QUICK)
    bundle = run.export(tmp_path / "bundle", federation=home)
    assert bundle.manifest.workload == "tabular"
    rows = tmp_path / "rows.csv"
    frame.to_csv(rows, index=False)
    inputs = torch.tensor(
        np.stack([frame.age, frame.ward == "heart", frame.ward == "lung", frame.smoker], 1).astype(np.float32)
    )
    wanted = (10 + 10 * run.model()(inputs)).clamp(0, 20).detach().numpy()
    np.testing.assert_allclose(bundle.predict(rows), wanted, rtol=1e-4)
    assert np.array_equal(bundle.predict(frame), bundle.predict(rows)), "a frame is the file that it would be"
    assert np.array_equal(bundle.predict(frame[frame.columns[::-1]]), bundle.predict(rows)), "columns go by their names"
    with pytest.raises(fedclaw.DataError, match=r"^the frame, as a CSV file: line 4, column 'ward': 'skin'"):
        bundle.predict(frame.assign(ward=["skin" if row == 2 else ward for row, ward in enumerate(frame.ward)]))
    asked = [sys.executable, "-m", "fedclaw.predict", f"bundle={tmp_path / 'bundle'}", f"input={rows}"]
    asked += [f"ca={home / 'ca.crt'}", f"output={tmp_path / 'answers.csv'}"]
    done = subprocess.run(asked, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(pd.read_csv(tmp_path / "answers.csv")["value"], wanted[:, 0], rtol=1e-4)
    frame.assign(ward="skin").to_csv(rows, index=False)
    with pytest.raises(fedclaw.DataError, match="column 'ward': 'skin'; expected one of 'heart', 'lung'"):
        bundle.predict(rows)


class Untraceable(Net):
    def forward(self, inputs):
        return super().forward(inputs) if float(inputs.sum()) != 1.5 else self.head(self.hidden(inputs))


def test_what_cannot_be_exported_leaves_nothing(federation, home, tmp_path):
    run = fedclaw.simulate(federation, Untraceable, directory=tmp_path / "run", **QUICK)
    target = tmp_path / "bundle"
    with pytest.raises(fedclaw.FedClawError, match="the model cannot be exported: "):
        run.export(target, federation=home)
    with pytest.raises(fedclaw.FedClawError, match="is not a federation directory; make one with"):
        run.export(target, federation=tmp_path / "nowhere")
    again = fedclaw.read_run(tmp_path / "run")
    with pytest.raises(fedclaw.PluginError, match="give its class, model=MyNet"):
        again.export(target, federation=home)
    with pytest.raises(fedclaw.FedClawError, match=r"the shape|have shape"):
        again.export(target, federation=home, model=Net, inputs=np.ones((3, 4)))
    assert not target.exists()
    target.mkdir()
    with pytest.raises(fedclaw.FedClawError, match="already exists; pass overwrite=True to replace it, or target=…"):
        again.export(target, federation=home, model=Net)
    sites = json.loads((tmp_path / "run" / "run.json").read_text()) | {"simulated": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(sites))
    with pytest.raises(fedclaw.FedClawError, match=r"is a run of the federation 'simulation', but .* of 'heart'"):
        fedclaw.read_run(tmp_path / "run").export(tmp_path / "other", federation=home, model=Net)
