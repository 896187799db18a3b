"""`fedclaw.read_bundle`: verified, then its answers, its price and its card."""

import numpy as np
import pytest

import fedclaw
from fedclaw.export.predictor import Predictor


def test_a_bundle_is_verified_and_predicts(bundle, home, tmp_path):
    ca = home.root / "federation.json"
    read = fedclaw.read_bundle(str(bundle), federation=ca)
    assert isinstance(read, fedclaw.Bundle)
    assert read.trusted
    assert read.labels == ("benign", "malignant")
    assert read.card.startswith("# ")
    assert read.privacy
    inputs = np.zeros((3, *read.manifest.inputs[0].shape[1:]))
    found = read.predict(inputs)
    np.testing.assert_array_equal(found, Predictor.open(bundle).predict(inputs.astype(np.float32)))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    (tmp_path / "rows.csv").write_text("age,smoker,ward\n30,true,surgery\n")
    assert read.predict(tmp_path / "rows.csv").shape == (1, 2)
    assert not fedclaw.read_bundle(bundle).trusted


def test_what_does_not_verify_or_fit_is_told(bundle, stranger):
    with pytest.raises(fedclaw.FedClawError, match="not the CA that you trust"):
        fedclaw.read_bundle(bundle, federation=stranger.root / "federation.json")
    read = fedclaw.read_bundle(bundle)
    with pytest.raises(fedclaw.DataError, match=r"an input has the shape \(2,\), and the model takes"):
        read.predict(np.zeros((1, 2)))
    with pytest.raises(fedclaw.DataError, match="not a finite number"):
        read.predict(np.full((1, *read.manifest.inputs[0].shape[1:]), np.nan))
    with pytest.raises(fedclaw.DataError, match=r"inputs holds <U1.*: give the path of a file"):
        read.predict([["a"]])
    (bundle / "privacy.json").write_text("{}")
    with pytest.raises(fedclaw.FedClawError, match=r"privacy\.json"):
        fedclaw.read_bundle(bundle)


def test_reading_one_needs_no_torch(process, bundle):
    program = "import sys, fedclaw; fedclaw.read_bundle(sys.argv[1]); assert 'torch' not in sys.modules"
    assert process("-c", program, str(bundle)).returncode == 0
