"""The endpoint client against servers of this process: retries, limits, deadlines, the cache, and where the key does not go."""

import logging
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from athanor.errors import UserError
from athanor.rewards import Entry, RewardService, RewardTable, make_reward
from athanor.rewards.endpoint import Endpoint, EndpointError
from athanor.samples import Problem, Sample

sys.path.insert(0, str(Path(__file__).parent))
from chat_server import server  # noqa: E402

KEY = "sk-very-secret-0123456789"


def endpoint(url, **settings):
    return Endpoint(**{"url": url, "model": "m", "backoff_s": 0.01, "timeout_s": 5.0} | settings)


def test_a_question_is_sent_as_the_protocol_wants_it(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with server(lambda prompt, _: f"to {prompt}") as (url, seen):
        assert endpoint(url + "/", key_env="JUDGE_KEY", max_tokens=7).ask("hello") == "to hello"
        endpoint(url, temperature=0.5).ask("hello", 3)
    first, second = seen
    assert (first["path"], first["model"], first["max_tokens"], first["temperature"]) == ("/v1/chat/completions", "m", 7, 0)
    assert first["messages"] == [{"role": "user", "content": "hello"}] and first["key"] == f"Bearer {KEY}" and "seed" not in first
    assert second["key"] is None and second["seed"] == 3


def test_what_may_pass_is_tried_again_with_growing_waits():
    failures = [(503, {}, b"busy"), (429, {"Retry-After": "0.3"}, b"slow down"), (200, {}, b"not json")]
    with server(lambda _, n: failures[n] if n < 3 else "fine") as (url, seen):
        assert endpoint(url, backoff_s=0.1).ask("x") == "fine"
    waits = np.diff([request["time"] for request in seen])
    assert len(waits) == 3 and waits[0] >= 0.1 and waits[1] >= 0.3 and waits[2] >= 0.4  # 0.1, Retry-After before 0.2, 0.4


def test_retries_end_and_what_will_not_pass_is_not_tried_again():
    with server(lambda *_: (500, {}, b"broken")) as (url, seen):
        with pytest.raises(EndpointError, match=r"HTTP 500 broken \(3 tries\)"):
            endpoint(url, retries=2).ask("x")
        assert len(seen) == 3
    with server(lambda *_: (404, {}, b"no such model")) as (url, seen):
        with pytest.raises(EndpointError, match="HTTP 404 no such model"):
            endpoint(url).ask("x")
        assert len(seen) == 1
    with pytest.raises(EndpointError, match="127.0.0.1.*2 tries"):  # nobody listens any more
        endpoint(url, retries=1).ask("x")


def drip(handler):
    """One byte at a time: no pause is ever long, and the end never comes."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize("slow", [drip, lambda handler: time.sleep(2.0)])
def test_a_slow_server_is_a_timeout_however_it_is_slow(slow):
    with server(lambda *_: slow) as (url, seen):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no reply in 0.2 s \(2 tries\)"):
            endpoint(url, timeout_s=0.2, retries=1).ask("x")
        assert time.monotonic() - start < 1.5 and len(seen) == 2


def test_replies_are_cached_by_question_round_and_settings(tmp_path):
    with server(lambda _, n: f"reply {n}") as (url, seen):
        for _ in range(2):
            kept = endpoint(url, cache=str(tmp_path / "replies"))
            assert [kept.ask("a"), kept.ask("a", 1), kept.ask("b"), kept.ask("a")] == ["reply 0", "reply 1", "reply 2", "reply 0"]
        assert len(seen) == 3
        assert endpoint(url, cache=str(tmp_path / "replies"), temperature=1.0).ask("a") == "reply 3"
        (tmp_path / "replies").rename(tmp_path / "old")
        for path in (tmp_path / "old").rglob("*.json"):
            path.write_text("{")
        assert endpoint(url, cache=str(tmp_path / "old")).ask("a") == "reply 4"  # a damaged file is no reply


def test_failures_are_not_cached(tmp_path):
    with server(lambda _, n: (404, {}, b"") if n == 0 else "fine") as (url, _):
        kept = endpoint(url, cache=str(tmp_path))
        with pytest.raises(EndpointError):
            kept.ask("a")
        assert kept.ask("a") == "fine"


def test_requests_of_many_threads_keep_to_the_rate():
    with server(lambda *_: "fine") as (url, seen):
        limited = endpoint(url, requests_per_minute=1200)
        threads = [threading.Thread(target=limited.ask, args=(f"{i}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    times = sorted(request["time"] for request in seen)
    assert times[-1] - times[0] >= 5 * 0.05 - 0.02  # 20 a second; what a request takes to arrive varies


def test_the_key_is_in_no_message_file_field_or_log(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = f"Incorrect API key provided: {KEY}".encode()
    with server(lambda prompt, _: (401, {}, echo) if prompt == "bad" else "fine") as (url, _):
        kept = endpoint(url, key_env="JUDGE_KEY", cache=str(tmp_path))
        with pytest.raises(EndpointError) as failure:
            kept.ask("bad")
        kept.ask("good")
    assert "Incorrect API key provided: ***" in str(failure.value) and failure.value.__cause__ is None
    assert KEY not in repr(kept) + caplog.text + "".join(path.read_text() for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("key", [f"{KEY}\nX-Evil: 1", f"{KEY} x", f"{KEY}é"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match="JUDGE_KEY holds") as failure:
        endpoint("http://127.0.0.1:1", key_env="JUDGE_KEY")
    assert "secret" not in str(failure.value)


def test_a_redirect_does_not_carry_the_key_elsewhere(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with server(lambda *_: "stolen") as (other, stolen), server(lambda *_: (307, {"Location": other}, b"")) as (url, _):
        with pytest.raises(EndpointError, match="HTTP 307"):
            endpoint(url, key_env="JUDGE_KEY").ask("x")
        assert not stolen


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"url": "localhost:8000"}, "wanted one such as http"),
        ({"url": f"http://user:{KEY}@host/v1"}, "has a user"),
        ({"url": f"http://host/v1?key={KEY}"}, "a query"),
        ({"key_env": KEY}, "never the key itself"),
        ({"key_env": "ATHANOR_TEST_UNSET"}, "ATHANOR_TEST_UNSET, which key_env names, is not set"),
        ({"model": ""}, "model is empty"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"retries": -1}, "retries is -1"),
        ({"api_key": KEY}, "unknown setting 'api_key'"),
    ],
)
def test_wrong_settings_are_refused_without_showing_a_key(settings, message):
    with pytest.raises(UserError, match=message) as failure:
        make_reward("judge", **{"url": "http://127.0.0.1:1/v1", "model": "m"} | settings)
    assert KEY not in str(failure.value)


# ---- the rewards


def sample(text, *, answer=None, **metadata):
    problem = Problem("Say hi.", answer, 0, "chat", "general", metadata={"reference": "Hello."} | metadata)
    return Sample(problem, text, np.zeros(1, np.int64), np.zeros(1, np.float32))


def judge(prompt, n):
    """Likes the longer reply, a little biased: the first one wins a draw.  Does not judge "odd"."""
    a, b = (prompt.split(f"<reply_{x}>")[1].split(f"</reply_{x}>")[0].strip() for x in "AB")
    if "odd" in (a, b):
        return "I would rather not say."
    if "late" in (a, b):
        return lambda handler: time.sleep(1.0)
    return "[[A>>B]]" if len(a) >= len(b) else "[[B>A]]"


def test_errors_and_timeouts_of_a_judge_are_counted_and_never_scores():
    with server(judge) as (url, seen):
        reward = make_reward("judge", url=url, model="m", timeout_s=0.3, retries=0)
        assert reward.__name__ == "judge" and reward.runs_in == "thread"
        given = [sample("Good day to you!"), sample("Hi"), sample("odd"), sample("late"), sample("x", answer="4"), sample("y", reference="")]
        with RewardService(RewardTable([Entry(reward), Entry(make_reward("format"), domain="code")]), num_workers=2) as service:
            for s in given:
                service.submit(s)
            scores = service.score(given)
            figures, first = service.measure()
    # first: (2 + 1) / 4, second: (-1 - 2) / 4, by hand from `judge`
    assert scores.parts["judge"] == [0.75, -0.75, None, None, None, None]
    assert scores.dropped.tolist() == [False, False, True, True, False, True] and scores.applied.tolist() == [True, True, *[False] * 4]
    assert (figures["reward_errors"], figures["reward_timeouts"]) == (2, 1) and first.startswith("judge: ")
    assert len(seen) == 2 + 2 + 2 + 1  # both orders; the late one fails at its first


def test_an_answer_that_no_rule_can_compare():
    with server(lambda prompt, _: "[[yes]]" if "city of Paris" in prompt else "[[no]]") as (url, seen):
        reward = make_reward("judge_answer", url=url, model="m")
        texts = ["<answer> the city of Paris </answer>", "<answer> Rome </answer>", "no answer block"]
        assert reward([sample(text, answer="Paris") for text in texts] + [sample("x")]) == [1.0, 0.0, 0.0, None]
        assert len(seen) == 2  # what has no answer is wrong without asking
