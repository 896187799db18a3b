"""What a bundle calls its run and federation is printed: names, and nothing that a terminal obeys."""

import pytest
from pydantic import ValidationError

from fedclaw.export.layout import Manifest


@pytest.mark.parametrize("field", ["federation", "run", "workload"])
@pytest.mark.parametrize("value", ["a\x1b[2Jall is well", "a\nverified  by everybody", "a\u202eb", "x" * 1000, ""])
def test_a_name_that_a_terminal_would_obey_is_refused(field, value):
    with pytest.raises(ValidationError) as refused:
        Manifest.model_validate({field: value})
    assert [error["loc"] for error in refused.value.errors() if error["type"] != "missing"] == [(field,)]
