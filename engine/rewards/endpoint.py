"""Ask a model behind an OpenAI-compatible endpoint (`POST URL/chat/completions`), patiently and within bounds.

What may fail for a while (no connection, a timeout, HTTP 408, 425, 429, 5xx, a reply that is cut off) is tried again after `backoff_s`, twice that,
four times that, ... or what the server's Retry-After says.  Every try has a deadline of its own, for everything from connecting to the last byte.
Replies are kept on the disk, so that a resumed run asks nothing twice and hears the same words.

The key is read from the environment at the moment of asking.  It is in no field, file or message; where a server echoes it, it is blotted out.
Redirects are not followed, because they would carry the key elsewhere, and proxies of the environment are not used.
"""

import hashlib
import http.client
import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from athanor.errors import UserError
from athanor.rewards.base import Outcome
from athanor.rewards.verdicts import Question
from athanor.samples import Problem, Sample

MAX_WAIT_S = 60.0  # between two tries
MAX_REPLY_BYTES = 4 << 20
PASSING = {408, 425, 429, *range(500, 600)}  # HTTP statuses that may be gone at the next try


class EndpointError(OSError):
    """The endpoint gave no usable reply."""


class _Passing(EndpointError):
    """One that may be gone at the next try.  wait_s: what the server asked to wait."""

    def __init__(self, message: str, wait_s: float = 0.0, *, timed_out: bool = False):
        super().__init__(message)
        self.wait_s, self.timed_out = wait_s, timed_out


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One model behind one URL.  Safe to use from many threads; the rate limit counts this object's requests."""

    url: str
    """Base address such as "http://localhost:8000/v1"; requests go to URL/chat/completions."""
    model: str
    """The model's name there."""
    key_env: str = ""
    """Name of the environment variable that holds the key; "" = no key."""
    timeout_s: float = 120.0
    """Seconds of one try."""
    retries: int = 4
    """Further tries after a failure that may pass."""
    backoff_s: float = 1.0
    """Seconds before the first of them; doubled each time, at most 60."""
    requests_per_minute: float = 0.0
    """Requests of this process, tries included, evenly spread; 0 = no limit."""
    max_tokens: int = 1024
    """Longest reply in tokens."""
    temperature: float = 0.0
    """Softmax temperature of the replies."""
    cache: str = ""
    """Folder where replies are kept and looked up; "" = none."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _next: list[float] = field(default_factory=lambda: [0.0], init=False, repr=False, compare=False)  # when the next request may start

    def __post_init__(self):
        where, parts = "endpoint", urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{where}: url has no http:// or https:// address, wanted one such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise UserError(f"{where}: url for {parts.hostname} has a user, a query or a fragment, wanted none: keys belong in the variable key_env")
        if not self.model:
            raise UserError(f"{where}: model is empty, wanted its name at {self.url}")
        if self.key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,60}", self.key_env):
            raise UserError(f"{where}: key_env is no name of an environment variable; wanted one in capitals such as JUDGE_KEY, never the key itself")
        if self.key_env and not self._key():
            raise UserError(f"{where}: the environment variable {self.key_env}, which key_env names, is not set")
        least = {"timeout_s": 1e-3, "retries": 0, "backoff_s": 0, "requests_per_minute": 0, "max_tokens": 1, "temperature": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < 1e9:
                raise UserError(f"{where}: {name} is {getattr(self, name)}, wanted at least {bound}")

    def ask(self, prompt: str, round: int = 0) -> str:
        """The reply to one user message.  round: tells repeated questions apart, for the cache and, above temperature 0, for the server.

        Raises TimeoutError when the last try took too long, EndpointError when it failed otherwise.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self.max_tokens}
        body |= {"temperature": self.temperature} | ({"seed": round} if self.temperature else {})
        path = self._cached(body, round)
        if path is not None and path.is_file():
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["reply"])
            except (ValueError, KeyError):
                path.unlink(missing_ok=True)  # not ours, or damaged: ask again
        reply = self._patiently(json.dumps(body).encode())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")  # two ranks may ask the same at the same time
            part.write_text(json.dumps({"url": self.url, **body, "reply": reply}, ensure_ascii=False), encoding="utf-8")
            os.replace(part, path)
        return reply

    def _cached(self, body: dict, round: int) -> Path | None:
        if not self.cache:
            return None
        key = hashlib.sha256(json.dumps([self.url, body, round], sort_keys=True).encode()).hexdigest()
        return Path(self.cache) / key[:2] / f"{key}.json"

    def _patiently(self, body: bytes) -> str:
        for attempt in range(self.retries + 1):
            self._take_turn()
            try:
                return self._once(body)
            except _Passing as error:
                if attempt == self.retries:
                    message = f"{error} ({attempt + 1} tries)"
                    raise (TimeoutError if error.timed_out else EndpointError)(message) from None
                time.sleep(min(MAX_WAIT_S, max(error.wait_s, self.backoff_s * 2**attempt)))
        raise AssertionError("unreachable")

    def _take_turn(self) -> None:
        if not self.requests_per_minute:
            return
        with self._lock:
            start = max(time.monotonic(), self._next[0])
            self._next[0] = start + 60.0 / self.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))

    def _once(self, body: bytes) -> str:
        """One try."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        key = self._key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection = kind(parts.hostname, parts.port, timeout=self.timeout_s)
        late, watch, end = threading.Event(), None, time.monotonic() + self.timeout_s
        try:
            connection.connect()
            # A socket's timeout starts anew with every byte, and a server may send one at a time.
            watch = threading.Timer(max(0.0, end - time.monotonic()), _cut, (connection.sock, late))
            watch.daemon = True
            watch.start()
            connection.request("POST", parts.path.rstrip("/") + "/chat/completions", body, headers)
            response = connection.getresponse()
            status, asked_to_wait, data = response.status, response.headers.get("Retry-After", ""), response.read(MAX_REPLY_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            what = f"no reply in {self.timeout_s:g} s" if slow else f"{type(error).__name__}: {error}"
            raise _Passing(self._hidden(f"{parts.hostname}: {what}", key), timed_out=slow) from None
        finally:
            if watch is not None:
                watch.cancel()
            connection.close()
        if late.is_set():
            raise _Passing(f"{parts.hostname}: no reply in {self.timeout_s:g} s", timed_out=True)
        if status != 200:
            message = self._hidden(f"{parts.hostname}: HTTP {status} {data[:200].decode('utf-8', 'replace')}", key)
            raise _Passing(message, _seconds(asked_to_wait)) if status in PASSING else EndpointError(message)
        try:
            choice = json.loads(data)["choices"][0]
            reply = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _Passing(f"{parts.hostname}: HTTP 200 with {len(data)} bytes that are no chat completion") from None
        if not isinstance(reply, str):
            raise EndpointError(f"{parts.hostname}: the reply is a {type(reply).__name__}, wanted text")
        return reply

    def _key(self) -> str:
        """The key as the environment has it now.  UserError, without it, for what no HTTP header can hold."""
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"endpoint: the environment variable {self.key_env} holds a space, a line break or a letter beyond ASCII, wanted a key")
        return key

    @staticmethod
    def _hidden(message: str, key: str) -> str:
        return message.replace(key, "***") if key else message


@dataclass(frozen=True, kw_only=True)
class AskedEndpoint(Question, Endpoint):
    """A question whose judge is an endpoint: a thread of the reward pool waits for it (pool.py), so `reward_workers` ask at a time."""

    runs_in = "thread"

    def score(self, sample: Sample, problem: Problem) -> float | Outcome | None:
        decided = self.quick(sample, problem)
        if decided is not None:
            return decided
        prompts = self.prompts(sample, problem)
        asked: dict[str, int] = {}  # how often before
        replies = []
        for prompt in prompts:
            replies.append(self.ask(prompt, asked.get(prompt, 0)))
            asked[prompt] = asked.get(prompt, 0) + 1
        return self.value(replies)


def _cut(sock: socket.socket, late: threading.Event) -> None:
    """End a connection from another thread; the one that reads wakes up."""
    late.set()
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has just ended


def _seconds(text: str) -> float:
    """Seconds of a Retry-After header; dates count as none."""
    return float(text) if re.fullmatch(r"\d{1,6}(?:\.\d+)?", text.strip()) else 0.0
