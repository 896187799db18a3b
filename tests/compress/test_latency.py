from fedclaw.compress.latency import WARM_UP, median_milliseconds


def test_the_calls_take_turns_after_a_warm_up():
    seen = []
    found = median_milliseconds([lambda: seen.append("a"), lambda: seen.append("b")], repeats=3)
    assert "".join(seen) == "ab" * (WARM_UP + 3)
    assert len(found) == 2
    assert all(took >= 0 for took in found)


def test_no_round_begins_after_the_limit_and_the_first_one_is_whole():
    seen = []
    found = median_milliseconds([lambda: seen.append("a"), lambda: seen.append("b")], repeats=1000, limit=0.0)
    assert "".join(seen) == "abab"
    assert len(found) == 2
