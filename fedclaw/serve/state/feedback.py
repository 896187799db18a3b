"""POST /feedback: what became of an answer, credited once, by whom it was given to.

    {"receipt": "…", "label": "ill"}                 the truth of one row; `labels` of several, null where not known
    {"receipt": "…", "value": 4.2}                   of a regression; `values` of several rows
    {"receipt": "…", "reward": 0.7}                  how good the answer was, in [0, 1]
    {"receipt": "…", "completed": true}              whether the task that it was for was completed
    {"receipt": "…", "satisfaction": 4}              from 1 to 5, or "up", "down"

Several of them may come together, but all at once: the second feedback on an answer is refused, or, if it is the same
word for word, answered as the first was, for a client that never saw that answer. Several answers to one request id of
one principal count as one.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import JsonValue

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.state.receipts import PredictionReceipt, ReceiptKeys
from fedclaw.serve.state.store import StateStore

Classes = Callable[[str, str], Sequence[str] | None]
"""The labels that a model and version can answer; None: it has none, or they are not known here."""
MAX_BODY = 64 * 1024
"""Bytes of the longest body."""
_OUTCOMES = ("label", "labels", "value", "values", "reward", "completed", "satisfaction")
_LONGEST_LABEL = 255
_LARGEST = 1e38  # About what a float32 holds; its square is still a number.
_BEST = 5
_SATISFIED = 4  # CSAT: 4 and 5 of 5 count as satisfied.


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What was credited, and is on disk. For the answer's body, with status 200."""

    model: str
    version: str
    repeated: bool
    """Whether the same feedback was credited before."""

    def body(self) -> dict[str, JsonValue]:
        """As JSON."""
        return {"model": self.model, "version": self.version, "credited": True, "repeated": self.repeated}


class FeedbackHandler:
    """Takes feedback for one database. Safe for threads; it waits for the database."""

    def __init__(self, store: StateStore, keys: ReceiptKeys, classes: Classes | None = None) -> None:
        """With `classes` a label that the model does not know is refused."""
        self._store, self._keys, self._classes = store, keys, classes

    def credit(self, principal: Principal, body: bytes) -> Acknowledgement:
        """Check and keep a body as above; durable on return.

        Raises ServeRefusal: bad_request or unprocessable for a body or receipt that is none, forbidden for another's
        receipt or without the scope feedback:MODEL, conflict if other feedback was credited before, unavailable if the
        database is away: then it may or may not have been credited, and the same body may be sent again.
        """
        said = _parsed(body)
        receipt = self._keys.check(said["receipt"], principal)
        if not principal.may("feedback", receipt.model):
            raise ServeRefusal("forbidden", f"the token has no scope feedback:{receipt.model}")
        kept = _outcome(said, receipt, None if self._classes is None else self._classes(receipt.model, receipt.version))
        kept["said"] = _digest(said)
        if self._store.credit(receipt.identity, receipt.model, receipt.version, kept):
            return Acknowledgement(receipt.model, receipt.version, repeated=False)
        before = self._store.credited(receipt.identity)
        if before is None or before.body.get("said") != kept["said"]:
            raise ServeRefusal("conflict", "feedback on this request was credited before")
        return Acknowledgement(before.model, before.version, repeated=True)


def _parsed(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_BODY:
        raise ServeRefusal("too_large", f"feedback is at most {MAX_BODY} bytes")
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ServeRefusal("bad_request", "the body is not JSON") from None
    if not isinstance(said, dict):
        raise ServeRefusal("bad_request", 'the body is a JSON object: {"receipt": "…", "label": "…"}')
    if unknown := sorted(said.keys() - {"receipt", *_OUTCOMES}):
        raise _wrong(f"{unknown[0]:.60}", f"it is not known; known are receipt, {', '.join(_OUTCOMES)}")
    if not isinstance(said.get("receipt"), str):
        raise _wrong("receipt", "give what the answer's fedclaw-prediction said")
    if all(said.get(name) is None for name in _OUTCOMES):
        raise _wrong("body", f"it says nothing of the answer: give one or more of {', '.join(_OUTCOMES)}")
    return {name: value for name, value in said.items() if value is not None}


def _outcome(
    said: Mapping[str, Any], receipt: PredictionReceipt, classes: Sequence[str] | None
) -> dict[str, JsonValue]:
    """What is kept: what was predicted, what is true, and a reward in any case but that of a value's truth."""
    kept: dict[str, JsonValue] = {
        "rows": receipt.rows,
        "issued": receipt.issued,
        "propensity": receipt.propensity,
        "principal": receipt.principal,
        "key": receipt.key,
    }
    truth = _truth(said, receipt, classes)
    if truth is not None:
        kept["predicted"], kept["truth"] = list(receipt.predicted or ()), list(truth)
    if "completed" in said:
        kept["completed"] = _flag("completed", said["completed"])
    if "satisfaction" in said:
        kept |= _satisfaction(said["satisfaction"])
    rewards = _rewards(said, receipt, truth, kept)
    if (first := next(rewards, None)) is not None:
        kept["reward"], kept["reward_from"] = first
    return kept


def _truth(
    said: Mapping[str, Any], receipt: PredictionReceipt, classes: Sequence[str] | None
) -> Sequence[str | float | None] | None:
    given = [name for name in ("label", "labels", "value", "values") if name in said]
    if not given:
        return None
    if len(given) > 1:
        raise _wrong(given[1], f"give it or {given[0]}, not both")
    name = given[0]
    if receipt.predicted is None:
        raise _wrong(name, "the receipt does not say what was predicted; give a reward instead")
    numbers = name.startswith("value")
    if numbers != receipt.has_values:
        raise _wrong(name, f"the model answers {'labels' if numbers else 'numbers'}")
    truth = said[name] if name.endswith("s") else [said[name]]
    if not isinstance(truth, list) or len(truth) != receipt.rows:
        raise _wrong(name, f"the answer has {receipt.rows} rows: give a list of as many as labels or values")
    return [_number(name, one) for one in truth] if numbers else [_label(name, one, classes) for one in truth]


def _label(name: str, given: Any, classes: Sequence[str] | None) -> str | None:
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)  # Classes that are numbers in the table are written as such.
    if not isinstance(given, str) or not 0 < len(given) <= _LONGEST_LABEL:
        raise _wrong(name, f"a label is a text of 1 to {_LONGEST_LABEL} characters, or null")
    if classes is not None and given not in classes:
        raise _wrong(name, f"the model knows no label {given!r:.80}")
    return given


def _number(name: str, given: Any) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= _LARGEST:
        raise _wrong(name, f"the truth of a row is a number, at most {_LARGEST:g}, or null")
    return float(given)


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise _wrong(name, "it is true or false")
    return given


def _satisfaction(given: Any) -> dict[str, JsonValue]:
    if given in ("up", "down"):
        return {"satisfied": given == "up"}
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= _BEST:
        raise _wrong("satisfaction", f'it is a whole number from 1 to {_BEST}, "up" or "down"')
    return {"satisfied": given >= _SATISFIED, "score": given}


def _rewards(
    said: Mapping[str, Any],
    receipt: PredictionReceipt,
    truth: Sequence[str | float | None] | None,
    kept: Mapping[str, JsonValue],
) -> Iterator[tuple[float, str]]:
    """The reward that was given; else what else was said, as one: share of right labels, completed, satisfied."""
    if "reward" in said:
        given = said["reward"]
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
            raise _wrong("reward", "it is a number from 0 to 1")
        yield float(given), "reward"
    if truth is not None and not receipt.has_values:
        known = [
            one == other for one, other in zip(receipt.predicted or (), truth, strict=True) if None not in (one, other)
        ]
        if known:
            yield sum(known) / len(known), "label"
    if "completed" in kept:
        yield float(bool(kept["completed"])), "completed"
    if "satisfied" in kept:
        yield float(bool(kept["satisfied"])), "satisfaction"


def _wrong(field: str, what: str) -> ServeRefusal:
    return ServeRefusal("unprocessable", f"{field}: {what}")


def _digest(said: Mapping[str, Any]) -> str:
    """Of the outcomes alone: a second answer to the same request has another receipt."""
    outcomes = {name: said[name] for name in _OUTCOMES if name in said}
    return hashlib.sha256(orjson.dumps(outcomes, option=orjson.OPT_SORT_KEYS)).hexdigest()
