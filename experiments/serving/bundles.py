"""Signed bundles to serve: two nets on handwritten digits, and versions of one that go wrong when they are asked.

All are made by the project's own export. What goes wrong is in the graph, as it would be in a bad model: nothing in the
server knows of it.

    cnn        6k parameters, images of 8x8 pixels (uint8)
    mlp        10M parameters, the same pixels as 64 numbers (float32)
    same       what cnn computes, in the bundle of another run; same-2 and so on are further ones
    disagrees  cnn's answers, each moved on to the next digit
    slow       cnn's answers, after work that tells nothing
    errs       cnn's answers, but an index out of range for images that are nearly white

Legend: N rows, C classes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedclaw.api.module import OWN, around
from fedclaw.clients.tabular import Mlp
from fedclaw.clients.vision import Cnn, CnnArguments
from fedclaw.errors import UsageError
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.source import load_source
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.provisioning import initialise
from fedclaw.learning.registry import WORKLOADS, lent, schema_class
from fedclaw.learning.workload import Floats, Schema
from fedclaw.protocol.terms import LocalTraining, ModelSpec, StrategyRecord
from fedclaw.server.run_directory import RunDirectory, RunRecord

FEDERATION = "serving"
LABELS = tuple(str(digit) for digit in range(10))
SIDE = 8
WIDTHS = (2215, 2215, 2215)
"""Hidden layers of `mlp`: 10 million parameters."""
WHITE = 0.9
"""Mean of the pixels, of 1, above which `errs` fails; that of a digit is about a third."""
STEPS, BATCH, LEARNING_RATE = 100, 64, 0.003
WASTED_SIDE, WASTED_CHANNELS, WASTED_LAYERS = 64, 32, 12
"""The work of `slow`: convolutions over maps of so many cells a side, some 10 ms a request."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits as a client has them, and what they are."""

    pixels: NDArray[np.uint8]
    """(N, 8, 8, 1)."""
    targets: NDArray[np.int64]
    """(N,)."""

    @classmethod
    def load(cls) -> "Digits":
        """Those that scikit-learn ships, 1,797."""
        from sklearn.datasets import load_digits

        found = load_digits()
        return cls(np.round(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target.astype(np.int64))

    @property
    def numbers(self) -> Floats:
        """(N, 64), pixels of 1."""
        scaled: Floats = self.pixels.reshape(len(self.pixels), -1).astype(np.float32) / np.float32(255)
        return scaled


@dataclass(frozen=True)
class _Kind:
    """One of the two nets, and the schema of what it is asked with."""

    schema: str
    definition: Mapping[str, object]
    make: Callable[[], nn.Module]

    def read_schema(self) -> Schema:
        """The schema itself."""
        return schema_class(self.schema).parse(json.dumps(self.definition), "benchmark")

    def inputs(self, digits: Digits) -> torch.Tensor:
        """(N, *D) as the net takes them."""
        return torch.from_numpy(digits.numbers.reshape(-1, *self.read_schema().input_shape))


KINDS = {
    "cnn": _Kind(
        "vision",
        {"shape": [1, SIDE, SIDE], "labels": LABELS},
        lambda: Cnn((1, SIDE, SIDE), CnnArguments(), len(LABELS)),
    ),
    "mlp": _Kind(
        "arrays",
        {"input_shape": [SIDE * SIDE], "labels": LABELS},
        lambda: Mlp(SIDE * SIDE, WIDTHS, len(LABELS)),
    ),
}


class Disagreeing(nn.Module):
    """(N, *D) -> (N, C): the logits of another net, each given to the next class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits: torch.Tensor = self.net(inputs)
        return torch.cat([logits[:, -1:], logits[:, :-1]], dim=1)


class Slow(nn.Module):
    """(N, K, H, W) -> (N, C): the logits of another net, moved by a billionth of what much work comes to."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.work = nn.Conv2d(WASTED_CHANNELS, WASTED_CHANNELS, 3, padding=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See the class."""
        cells = functional.interpolate(inputs, size=(WASTED_SIDE, WASTED_SIDE))
        maps = cells.repeat(1, WASTED_CHANNELS, 1, 1)
        for _ in range(WASTED_LAYERS):
            maps = torch.tanh(self.work(maps))
        logits: torch.Tensor = self.net(inputs)
        return logits + 1e-9 * maps.mean(dim=(1, 2, 3))[:, None]


class Failing(nn.Module):
    """(N, K, H, W) -> (N, C): the logits of another net; for a nearly white image the index of a row that is not there.

    ONNX Runtime refuses the whole batch then, with its own error.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.table = nn.Parameter(torch.zeros(1, len(LABELS)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See the class."""
        white = (inputs.mean(dim=(1, 2, 3)) > WHITE).long()
        logits: torch.Tensor = self.net(inputs)
        return logits + functional.embedding(7 * white, self.table)


_CHANGES: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "cnn": lambda net: net,
    "mlp": lambda net: net,
    "same": lambda net: net,
    "disagrees": Disagreeing,
    "slow": Slow,
    "errs": Failing,
}


class Foundry:
    """Makes bundles under `root`, all signed by one federation; one that is there already is not made again."""

    def __init__(self, root: Path, digits: Digits) -> None:
        self.digits = digits
        self._root = root
        self._nets: dict[str, nn.Module] = {}
        home = root / "coordinator"
        made = home.exists()
        self.home = FederationHome.open(home) if made else initialise(home, FEDERATION, "127.0.0.1:9443")

    @property
    def authority(self) -> Path:
        """The CA's certificate, for a server's `ca`."""
        return self.home.root / "ca.crt"

    def bundle(self, name: str) -> Path:
        """The bundle of that name, by the table above. Raises UsageError for another name."""
        base = name.partition("-")[0]
        if base not in _CHANGES:
            raise UsageError(f"there is no bundle {name!r}; there are: {', '.join(_CHANGES)}")
        target = self._root / name / "bundle"
        if not target.exists():
            self._export(name, "mlp" if base == "mlp" else "cnn", _CHANGES[base], target)
        return target

    def _export(self, name: str, kind: str, change: Callable[[nn.Module], nn.Module], target: Path) -> None:
        if kind not in self._nets:
            self._nets[kind] = trained(KINDS[kind], self.digits)
        torch.manual_seed(1)
        model, schema = change(self._nets[kind]).eval(), KINDS[kind].schema
        with lent({(WORKLOADS, schema): around(model, schema)}):
            source = load_source(_write_run(self._root / name, KINDS[kind], model))
        export_bundle(source, self.home.signer(), target, Request())


def trained(kind: _Kind, digits: Digits) -> nn.Module:
    """The net after a few steps on all of `digits`: enough to tell most of them apart."""
    torch.manual_seed(0)
    net = kind.make()
    inputs, targets = kind.inputs(digits), torch.from_numpy(digits.targets)
    optimiser = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(len(targets), (BATCH,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(net(inputs[chosen]), targets[chosen]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return net.eval()


def _write_run(root: Path, kind: _Kind, model: nn.Module) -> RunDirectory:
    """A finished run whose model is `model`."""
    record = RunRecord(
        run=root.name,
        federation=FEDERATION,
        workload=kind.schema,
        schema_text=kind.read_schema().to_json(),
        model=ModelSpec(name=OWN),
        strategy=StrategyRecord(name="fedavg"),
        rounds=1,
        training=LocalTraining(epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE),
        privacy=None,
    )
    directory = RunDirectory.create(root, record)
    directory.write_model({name: value.numpy() for name, value in model.state_dict().items()})
    directory.append_metrics(1, {"metrics": {"accuracy": 0.9}, "test_examples": 1})
    return directory
