"""Time and memory of exporting a model as a signed bundle, beside those of its weights and of torch.onnx.export alone.

    python -m experiments.benchmarks.export [REPEATS]

Each export is measured in a fresh process. Time: from the model in memory to the bundle verified, of a model of 10M
parameters, by the time that torch.onnx.export takes to write the same model (the best of the repeats each); and the
same by the processors' time, which other work on the machine does not lengthen. Memory: how much higher the peak
(VmHWM) is with 100M parameters than with 10M, by how many bytes more the weights are.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.export", __doc__)

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.benchmarks.report import report
from fedclaw.errors import UsageError
from fedclaw.protocol.terms import LocalTraining, ModelSpec, StrategyRecord

if TYPE_CHECKING:
    from fedclaw.export.source import Source

COLUMNS, LABELS = 100, 2
WIDTHS = {10: (3050, 3180), 100: (7900, 8190, 4100)}
"""Hidden layers of a model with about so many million parameters."""
TIME_LIMIT, MEMORY_LIMIT = 3.0, 4.0
"""That the project promises."""
BYTES = 4


def export_whole(source: "Source", place: Path) -> None:
    """A bundle, as python -m fedclaw.export makes it."""
    from fedclaw.export.bundle import Request, export_bundle
    from fedclaw.identity.provisioning import initialise

    home = initialise(place / "coordinator", source.record.federation, "127.0.0.1:9443")
    export_bundle(source, home.signer(), place / "bundle", Request())


def export_alone(source: "Source", place: Path) -> None:
    """What torch does by itself: trace, translate, write one file."""
    import torch

    from fedclaw.export.graph import Linked, quiet
    from fedclaw.export.layout import BATCH, INPUT

    linked = Linked(source.model, source.schema.task).eval()
    shapes = {INPUT: {0: torch.export.Dim(BATCH)}}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            linked,
            (torch.zeros(3, *source.schema.input_shape),),
            str(place / "model.onnx"),
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )


WAYS: dict[str, Callable[["Source", Path], None]] = {"whole": export_whole, "alone": export_alone}


def write_run(root: Path, millions: int) -> None:
    """A finished run of a table's model with random weights."""
    import torch

    from fedclaw.learning.registry import schema_class, workload_class
    from fedclaw.server.run_directory import RunDirectory, RunRecord

    columns = [{"name": f"c{place}", "kind": "numeric", "range": [-5, 5]} for place in range(COLUMNS)]
    target = {"name": "y", "labels": [f"class {place}" for place in range(LABELS)]}
    schema = schema_class("tabular").parse(json.dumps({"columns": columns, "target": target}), "benchmark")
    spec = ModelSpec(name="mlp", args={"hidden": list(WIDTHS[millions])})
    record = RunRecord(
        run=root.name,
        federation="benchmark",
        workload="tabular",
        schema_text=schema.to_json(),
        model=spec,
        strategy=StrategyRecord(name="fedavg"),
        rounds=1,
        training=LocalTraining(epochs=1, batch_size=8, learning_rate=0.1),
        privacy=None,
    )
    directory = RunDirectory.create(root, record)
    torch.manual_seed(0)
    model = workload_class("tabular")(schema).build(spec)
    directory.write_model({name: value.numpy() for name, value in model.state_dict().items()})
    directory.append_metrics(1, {"metrics": {"accuracy": 0.5}, "test_examples": 10})


def measure_here(way: str, run: Path) -> dict[str, float]:
    """In this process: seconds, bytes at the peak, and bytes of the weights."""
    from fedclaw.export.source import load_source
    from fedclaw.server.run_directory import RunDirectory

    source = load_source(RunDirectory.open(run))
    with tempfile.TemporaryDirectory(dir=run.parent) as place:
        began, used = time.perf_counter(), time.process_time()
        WAYS[way](source, Path(place))
        seconds, processors = time.perf_counter() - began, time.process_time() - used
    return {"seconds": seconds, "processors": processors, "peak": _peak(), "weights": source.parameters * BYTES}


def _peak() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines["VmHWM"].split()[0]) * 1024


def measure(way: str, run: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.export", "child", way, str(run)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"an export failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> None:
    """Measure and report. Raises UsageError."""
    if arguments[:1] == ["child"]:
        print(json.dumps(measure_here(arguments[1], Path(arguments[2]))))
        return
    repeats = int(arguments[0]) if arguments and arguments[0].isdigit() else 3
    if repeats < 1 or len(arguments) > 1:
        raise UsageError("give the number of repeats, 1 or more")
    with tempfile.TemporaryDirectory(prefix="fedclaw-benchmark-") as name:
        place = Path(name)
        for millions in WIDTHS:
            write_run(place / f"run-{millions}", millions)
        pairs = [[measure(way, place / "run-10") for way in WAYS] for _ in range(repeats)]
        large, large_alone = (measure(way, place / "run-100") for way in WAYS)
    small, alone = zip(*pairs, strict=True)
    (own, theirs), (used, used_alone) = (
        [min(found[what] for found in runs) for runs in (small, alone)] for what in ("seconds", "processors")
    )
    more = large["weights"] - small[0]["weights"]
    growth = (large["peak"] - min(found["peak"] for found in small)) / more
    growth_alone = (large_alone["peak"] - min(found["peak"] for found in alone)) / more
    rows = [
        ("export, 10M parameters", f"{own:.1f} s", f"torch.onnx.export alone {theirs:.1f} s"),
        ("time by that of torch.onnx.export alone", f"{own / theirs:.2f}", f"at most {TIME_LIMIT:g}"),
        (
            "export, 100M parameters",
            f"{large['seconds']:.1f} s",
            f"torch.onnx.export alone {large_alone['seconds']:.1f} s",
        ),
        ("peak memory of 100M less that of 10M", f"{growth * more / 2**20:.0f} MiB", f"weights {more / 2**20:.0f} MiB"),
        (
            "by the difference of the weights",
            f"{growth:.2f}",
            f"at most {MEMORY_LIMIT:g}; torch alone {growth_alone:.2f}",
        ),
    ]
    figures = {
        "seconds": round(own, 2),
        "seconds of torch.onnx.export alone": round(theirs, 2),
        "time ratio": round(own / theirs, 3),
        "processor time ratio": round(used / used_alone, 3),
        "memory ratio": round(growth, 3),
        "memory ratio of torch.onnx.export alone": round(growth_alone, 3),
    }
    report(f"export of a signed bundle (best of {repeats})", rows, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
