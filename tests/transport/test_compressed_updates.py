"""Compressed updates over the real wires: certificates, sealed answers, streams; the same as in one process."""

import numpy as np
import pytest

from tests.transport.federations import config_of, deal, grpc, local


@pytest.mark.parametrize("method", ["fp16", "topk", "int4"])
def test_a_compressed_run_over_grpc_is_the_local_one(tmp_path, method):
    """Full batches, so that nothing but int4's rounding is random; what travels is counted alike."""
    settings = f"privacy=none compression={method} training.batch_size=1000 training.learning_rate=0.2"
    finished = {}
    for name, runtime in (("local", local), ("grpc", grpc)):
        root = tmp_path / name
        sites = deal(root)
        with runtime(root, sites) as run:
            finished[name] = run(config_of(root, "compressed", settings))
    apart = 0.05 if method == "int4" else 1e-5
    for name, array in finished["local"].read_model().items():
        np.testing.assert_allclose(finished["grpc"].read_model()[name], array, rtol=0, atol=apart)
    lines = {name: directory.read_metrics() for name, directory in finished.items()}
    for here, there in zip(lines["local"], lines["grpc"], strict=True):
        assert not there["declined"]
        assert 0 < there["bytes_up"] == here["bytes_up"] < 0.6 * there["bytes_down"]
