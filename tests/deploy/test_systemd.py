"""The systemd units: read by systemd itself, confined as it measures that, and of the settings that commands have."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedclaw.cli import compose_settings
from fedclaw.serve.settings import NodeSettings
from tests.conftest import environment

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ("fedclaw-node.service", "fedclaw-coordinator@.service", "fedclaw-site@.service")
EXPOSURE = 1.5
"""Of at most 10, as `systemd-analyze security` counts; a unit without any of this has 9.6."""
NEWER = ("RestartSteps", "RestartMaxDelaySec")
"""Keys of systemd 254, which an older one leaves out with a warning: it then waits as long each time."""

with_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def directives(unit: str) -> dict[str, str]:
    """The last value of each key, continued lines joined."""
    text = (UNITS / unit).read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.M))


def _verify(text: str, directory: Path) -> list[str]:
    """What systemd has to say of a unit whose commands are there."""
    installed = directory / "opt"
    for command in ("bin/python", "libexec/coordinator.sh"):
        (installed / command).parent.mkdir(parents=True, exist_ok=True)
        (installed / command).symlink_to(sys.executable)
    unit = directory / "fedclaw-made@.service"
    unit.write_text(text.replace("/opt/fedclaw/", f"{installed}/"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    return [line for line in done.stderr.splitlines() if not any(f"'{key}'" in line for key in NEWER)]


@with_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_reads_the_unit(name: str, tmp_path: Path):
    assert _verify((UNITS / name).read_text(), tmp_path) == []


@with_systemd
def test_what_systemd_would_pass_over_is_found(tmp_path: Path):
    text = (UNITS / NAMES[0]).read_text().replace("ProtectSystem=strict", "ProtectSytem=strict")
    assert len(_verify(text, tmp_path)) == 1


def _exposure(unit: Path) -> float:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


@with_systemd
@pytest.mark.parametrize("name", NAMES)
def test_the_unit_is_confined(name: str):
    assert _exposure(UNITS / name) <= EXPOSURE


@with_systemd
def test_a_unit_that_is_not_is_told(tmp_path: Path):
    text = (UNITS / NAMES[0]).read_text()
    (tmp_path / "open.service").write_text(re.sub(r"^(SystemCall|Capability).*\n", "", text, flags=re.M))
    assert _exposure(tmp_path / "open.service") > EXPOSURE


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_state_are_for_the_service_alone(name: str):
    unit = directives(name)
    assert unit["UMask"] == "0077"
    assert unit["StateDirectoryMode"] == "0700"
    assert unit.get("DynamicUser") == "yes" or unit.get("User") == "fedclaw"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_started_again_but_not_for_a_wrong_setting(name: str):
    unit = directives(name)
    assert unit["Restart"] == ("on-failure" if "coordinator" in name else "always")
    assert unit["RestartPreventExitStatus"] == "2"
    assert int(unit["StartLimitBurst"]) > 1


def test_arguments_of_the_node_are_its_settings():
    command = directives("fedclaw-node.service")["ExecStart"].split()
    assert command[:3] == ["/opt/fedclaw/bin/python", "-m", "fedclaw.serve"]
    given = {"${BUNDLE}": "/srv/bundle", "${MODEL}": "heart", "%S": "/var/lib", "%t": "/run", "$SETTINGS": ""}
    given |= {"${TOKEN_ISSUER}": "https://identity.example.org/", "${TOKEN_AUDIENCE}": "fedclaw-node"}
    arguments = [re.sub("|".join(map(re.escape, given)), lambda name: given[name[0]], word) for word in command[3:]]
    settings = compose_settings("serve", [word for word in arguments if word], NodeSettings)
    assert str(settings.state.parent) == f"/var/lib/{directives('fedclaw-node.service')['StateDirectory']}"
    assert settings.tls.private_key == Path("/run/fedclaw-node/tls.key")


_WITHOUT_NEW_CODE = """
import ctypes
from concurrent.futures import ThreadPoolExecutor
PR_SET_MDWE, REFUSE = 65, 1
system = ctypes.CDLL(None, use_errno=True)
if system.prctl(PR_SET_MDWE, REFUSE, 0, 0, 0):
    print("unknown"); raise SystemExit
import mmap
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    print("nan"); raise SystemExit
except PermissionError:
    pass
import cryptography.hazmat.primitives.asymmetric.ec as ec
import grpc, numpy as np, onnx, onnxruntime, uvloop
from onnx import TensorProto, helper, numpy_helper
ec.generate_private_key(ec.SECP256R1())
uvloop.new_event_loop().close()
server = grpc.server(ThreadPoolExecutor(1)); server.add_insecure_port("127.0.0.1:0"); server.start(); server.stop(0)
weights = numpy_helper.from_array(np.ones((64, 8, 3, 3), np.float32), "weights")
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "weights"], ["y"])], "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 16, 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64, 14, 14])], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(session.run(None, {"x": np.ones((32, 8, 16, 16), np.float32)})[0][0, 0, 0, 0])
"""


def test_what_a_node_runs_on_makes_no_code_while_it_runs():
    """The unit's MemoryDenyWriteExecute, asked of the kernel for a process with the node's libraries."""
    assert directives("fedclaw-node.service")["MemoryDenyWriteExecute"] == "yes"
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_NEW_CODE], capture_output=True, text=True, env=environment(), timeout=60
    )
    if done.stdout.strip() == "unknown":
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 72.0, "memory that is written and executed was to be had"
