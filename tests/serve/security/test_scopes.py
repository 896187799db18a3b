"""Which scope an action needs, and what a refusal gives away."""

import pytest

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.security.scopes import Action, require, visible


def who(*scopes: str) -> Principal:
    return Principal("clinic-a", frozenset(scopes))


@pytest.mark.parametrize(
    ("scope", "action", "what"),
    [
        ("predict:heart", "predict", "heart"),
        ("predict:*", "predict", "heart"),
        ("feedback:heart", "feedback", "heart"),
        ("admin:read", "admin", "read"),
        ("admin:publish", "admin", "publish"),
        ("admin:*", "admin", "route"),
    ],
)
def test_a_scope_allows_what_it_names(scope: str, action: Action, what: str) -> None:
    require(who(scope), action, what)


@pytest.mark.parametrize(
    ("scope", "action", "what"),
    [
        ("predict:heart", "predict", "lung"),
        ("predict:heart", "predict", "heart2"),
        ("predict:heart", "predict", "Heart"),
        ("predict:hea*", "predict", "heart"),
        ("predict:heart", "feedback", "heart"),
        ("feedback:*", "predict", "heart"),
        ("predict:*", "admin", "read"),
        ("predict:admin", "admin", "publish"),
        ("admin:read", "admin", "publish"),
        ("admin:publish", "admin", "route"),
        ("*", "predict", "heart"),
        ("*:*", "predict", "heart"),
        ("predict", "predict", "heart"),
        ("predict:heart", "predict", "*"),
        ("predict:", "predict", "heart"),
        ("PREDICT:heart", "predict", "heart"),
    ],
)
def test_a_scope_allows_nothing_else(scope: str, action: Action, what: str) -> None:
    with pytest.raises(ServeRefusal) as caught:
        require(who(scope), action, what)
    assert caught.value.code == "forbidden"
    assert caught.value.challenge is not None
    assert 'error="insufficient_scope"' in caught.value.challenge


def test_a_refusal_is_the_same_whatever_exists() -> None:
    said = set()
    for model in ("heart", "not-there", "secret-trial-of-another-clinic"):
        with pytest.raises(ServeRefusal) as caught:
            require(who("predict:lung"), "predict", model)
        said.add((str(caught.value), caught.value.challenge, caught.value.code))
    assert len(said) == 1
    assert "heart" not in str(said)


def test_a_list_shows_only_what_one_may_ask() -> None:
    models = ["heart", "kidney", "lung"]
    assert visible(who("predict:lung", "feedback:heart"), models) == ["lung"]
    assert visible(who("predict:*"), models) == models
    assert visible(who("admin:*"), models) == []
