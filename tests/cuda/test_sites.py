"""A real site's rounds: training in each way, evaluation, what strategies keep, and memory that comes back."""

import gc
from contextlib import nullcontext

import pytest
import torch

from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.protocol.terms import CentralNoise, LocalTraining, ModelSpec, PrivacyRequest, StrategyRecord
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.site.device import SMALL_MODEL, choose_device, one_by_one
from fedclaw.site.evaluation import bounded_sums
from fedclaw.transport.in_process import local_grid, simulate
from tests.cuda.conftest import CPU, SAME_MODEL, apart, nothing_drawn
from tests.simulation.conftest import make_federation, make_record
from tests.simulation.test_modes import real_sites

PRIVACY = PrivacyRequest(epsilon=6, delta=1e-3, max_grad_norm=0.7)
SIZES = (31, 17)
SLOW = pytest.mark.slow
CENTRAL = {"noise_by": "server", "epsilon": 5, "delta": 1e-3, "clip": 0.5, "noise_multiplier": 1e-9}


def sites_on(device, kind, record, mode="auto", sizes=SIZES):
    federation = make_federation(kind, sizes)
    sites = dict(real_sites(federation, record))
    for number, site in enumerate(sites.values()):
        site.device, site.speed = device, StepSpeed(mode=mode)
        site.source = GaussianSource(insecure_fixed_key_for_tests=bytes([number]) * 32)
    return sites


@pytest.fixture
def play(tmp_path):
    """Runs two sites' rounds on a device; gives the outcome and the sites."""

    def go(kind, device, mode="auto", **changes):
        record = make_record(make_federation(kind, SIZES), kind, **changes)
        sites = sites_on(device, kind, record, mode)
        directory = RunDirectory.create(tmp_path / f"{device.type}-{len(list(tmp_path.iterdir()))}", record)
        initial, grid = initial_parameters(record), local_grid(sites, record.run)
        # Models are built on the CPU, whose generator gives them numbers that are overwritten.
        with nothing_drawn(device) if device.type != "cpu" else nullcontext():
            return run_rounds(grid, directory, initial), sites

    return go


@pytest.mark.parametrize("kind", [pytest.param("cnn", marks=SLOW), "mlp"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy": PRIVACY},
        {"central": CentralNoise(unit="site", **CENTRAL), "weighting": "uniform"},
        {
            "central": CentralNoise(unit="example", sample_rate=0.5, **CENTRAL),
            "training": LocalTraining(steps=1, batch_size=8, learning_rate=0.5),
        },
        {"strategy": StrategyRecord(name="scaffold")},
        {"strategy": StrategyRecord(name="ditto")},
        {"strategy": StrategyRecord(name="qfedavg")},
    ],
    ids=["plain", "private", "site", "example", "scaffold", "ditto", "qfedavg"],
)
def test_the_same_seed_leads_to_the_same_model_and_metrics(play, device, kind, changes):
    """vmap, for book-keeping on the CPU gives large sums their noise in another order."""
    (cpu, _), (there, sites) = play(kind, CPU, "vmap", **changes), play(kind, device, "vmap", **changes)
    assert apart(there.parameters, cpu.parameters) < SAME_MODEL
    assert there.metrics["accuracy"] == pytest.approx(cpu.metrics["accuracy"], abs=0.05)
    for site in sites.values():
        tensors = [tensor for pair in site._tensors.values() for tensor in pair]
        tensors += [parameter for model in site._models.values() for parameter in model.parameters()]
        assert {tensor.device.type for tensor in tensors} == {device.type}


@pytest.mark.parametrize("mode", ["bookkeeping", "opacus", pytest.param("compiled", marks=SLOW)])
def test_every_engine_trains_a_site(play, device, mode):
    outcome, _ = play("cnn", device, mode, privacy=PRIVACY)
    expected, _ = play("cnn", CPU, "vmap", privacy=PRIVACY)
    assert apart(outcome.parameters, expected.parameters) < SAME_MODEL


def test_metrics_with_noise_are_worked_out_row_by_row_there(device):
    """What is bounded of the test examples before noise: the same counts, and the same losses to a rounding."""
    record = make_record(make_federation("cnn", SIZES), "cnn")
    found = []
    for where in (CPU, device):
        site = next(iter(sites_on(where, "cnn", record).values()))
        torch.manual_seed(0)
        model = site.workload.build(record.model).to(where).eval()
        inputs, targets = (torch.from_numpy(part).to(where) for part in (site.data.test.inputs, site.data.test.targets))
        outputs = one_by_one(model, inputs)
        policy = site.policy.model_copy(update={"metrics_loss_bound": 10.0})
        found.append(bounded_sums(policy, site.workload, ("loss", "accuracy"), 8, outputs, targets))
    assert found[0].keys() == found[1].keys()
    for name, sums in found[0].items():
        assert found[1][name].values == pytest.approx(sums.values, rel=1e-5, abs=1)


def test_a_large_model_in_mixed_precision_leaves_float32(play, device):
    """Over SMALL_MODEL parameters a card's plain steps are in bfloat16: a step of its size, in the same direction."""
    wide = ModelSpec(name="mlp", args={"hidden": [1000, 1000]})
    changes = {"model": wide, "rounds": 1, "training": LocalTraining(steps=1, batch_size=64, learning_rate=0.1)}
    (cpu, _), (there, sites) = play("mlp", CPU, **changes), play("mlp", device, **changes)
    assert sum(array.size for array in cpu.parameters.values()) >= SMALL_MODEL
    assert {array.dtype.name for array in there.parameters.values()} == {"float32"}
    assert apart(there.parameters, cpu.parameters) < 0.01
    assert next(iter(sites.values())).device == device


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "opacus", "plain"])
def test_memory_comes_back_between_rounds(tmp_path, device, mode):
    """As much is held after the last round as after the second: not a byte more."""
    private = {} if mode == "plain" else {"privacy": PRIVACY}
    record = make_record(make_federation("cnn", SIZES), "cnn", rounds=5, **private)
    sites, held = sites_on(device, "cnn", record, "auto" if mode == "plain" else mode), []

    class Watch:
        def started(self, record, first_round): ...

        def finished(self, outcome): ...

        def finished_round(self, report):
            gc.collect()
            held.append(bytes_held(device))

    simulate(RunDirectory.create(tmp_path / "run", record), sites, [Watch()])
    assert len(held) == 5
    assert held[2:] == [held[1]] * 3
    assert held[1] > 0


def bytes_held(device):
    """Of tensors there: what torch has allocated on it, or, on the CPU, of storages that anything refers to."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
        return torch.get_device_module(device).memory_allocated(device)
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    # What torch.func wraps, an earlier test's too, has no storage of its own.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    storages = [tensor.untyped_storage() for tensor in tensors if not wrapped(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_auto_takes_the_card(device, wanted):
    assert choose_device("auto").type == choose_device(wanted).type == device.type
