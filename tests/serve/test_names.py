"""One idea of what a name is, wherever it is asked."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedclaw.serve.names import LONGEST_NAME
from fedclaw.serve.proxies.haproxy import ASKED, SENT
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.releases import require_names
from fedclaw.serve.routing.plan import PlanError, new_plan, parse_plan
from fedclaw.serve.security.scopes import is_known_scope
from fedclaw.serve.settings import VersionSettings

NGINX = (Path(__file__).parents[2] / "deploy" / "nginx" / "fedclaw.conf").read_text()
NAMES = ["a", "0", "v1.2_3-b", "A" * LONGEST_NAME]
NO_NAMES = ["", "_a", ".a", "-a", "a/b", "a b", "a\n", "é", "A" * (LONGEST_NAME + 1)]


def nginx_lets_through(path: str) -> bool:
    return any(re.search(asked, path) for asked in re.findall(r'^    "~(\^/.*)" (?:read|sent);$', NGINX, re.M))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_to_all(name: str):
    assert VersionSettings(bundle=Path("b"), name=name).name == name
    require_names(name, name)
    plan = new_plan(name, name, "ann", 1.0)
    assert parse_plan(name, plan.document()) == plan
    assert is_known_scope(f"predict:{name}")
    path = f"/v2/models/{name}/versions/{name}"
    assert re.search(ASKED, path)
    assert re.search(SENT, f"{path}/infer")
    assert all(map(nginx_lets_through, (path, f"{path}/infer", f"/predict/{name}")))


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_none_to_all(name: str):
    with pytest.raises(ValidationError):
        VersionSettings(bundle=Path("b"), name=name)
    with pytest.raises(ServeRefusal):
        require_names("m", name)
    with pytest.raises(PlanError):
        new_plan("m", name, "ann", 1.0)
    with pytest.raises(PlanError):
        new_plan(name, "v1", "ann", 1.0)
    assert not is_known_scope(f"predict:{name}")
    path = f"/v2/models/{name}/infer"
    assert name.endswith("\n") or not (re.search(SENT, path) or nginx_lets_through(path))
