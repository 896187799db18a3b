"""A server that dies in the middle of a round."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Crash(Exception):
    """The server dies."""


@contextmanager
def server_dies(*sites, in_round: int) -> Iterator[None]:
    """The block ends, and has to end, as soon as one of `sites` (anything with an `answer`) is asked in that round."""
    answers = [site.answer for site in sites]

    def dying(answer):
        def answer_or_die(message):
            if message.metadata.group_id == str(in_round):
                raise Crash
            return answer(message)

        return answer_or_die

    for site, answer in zip(sites, answers, strict=True):
        site.answer = dying(answer)
    try:
        with pytest.raises(Crash):
            yield
    finally:
        for site, answer in zip(sites, answers, strict=True):
            site.answer = answer
