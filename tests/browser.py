"""Pages in headless Chromium over its DevTools protocol, through two pipes (--remote-debugging-pipe): JSON messages, each with a zero byte behind it.

https://chromedevtools.github.io/devtools-protocol.  What a page logs, throws and asks for is kept, so that a test can say that there was none of it.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe")  # fmt: skip
DEADLINE_S = 240


def program() -> str | None:
    """The browser of this machine."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@dataclass
class Page:
    session: str
    console: list[str] = field(default_factory=list)  # what it logged or threw
    requests: list[str] = field(default_factory=list)  # URLs
    loaded: bool = False


class Browser:
    """`with Browser(empty folder) as browser: page = browser.open(path)`."""

    def __init__(self, profile: Path):
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()

        def pipes():  # it reads from descriptor 3 and writes to 4, each of which may be another end so far
            copies = [fcntl.fcntl(end, fcntl.F_DUPFD, 5) for end in (theirs_in, theirs_out)]
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        command = [program(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # close_fds would close the two; whatever else Python has opened does not outlive an exec anyway
        self._process = subprocess.Popen(command, close_fds=False, preexec_fn=pipes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                         start_new_session=True)  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._read, self._pages = 0, b"", {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._to)  # which ends it
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self._read:
            if not select.select([self._from], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser has ended with status {self._process.wait()}")
            self._read += part
        line, self._read = self._read.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict) -> None:
        page, what = self._pages.get(event.get("sessionId")), event.get("params", {})
        match event.get("method") if page else None:
            case "Runtime.consoleAPICalled":
                page.console.append(f"{what['type']}: {[x.get('value', x.get('description')) for x in what['args']]}")
            case "Runtime.exceptionThrown":
                page.console.append(f"exception: {what['exceptionDetails']['text']}")
            case "Log.entryAdded":
                page.console.append(f"{what['entry']['level']}: {what['entry']['text']}")
            case "Network.requestWillBeSent":
                page.requests.append(what["request"]["url"])
            case "Page.loadEventFired":
                page.loaded = True

    def call(self, method: str, page: Page | None = None, **parameters) -> dict:
        """One command and its result."""
        self._number += 1
        session = {"sessionId": page.session} if page else {}
        os.write(self._to, json.dumps({"id": self._number, "method": method, "params": parameters, **session}).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE_S
        while (answer := self._message(deadline)).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, width: int = 1280, height: int = 900) -> Page:
        """The page of that file, loaded; sizes in CSS pixels."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        self._pages[page.session] = page
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", page)
        self.resize(page, width, height)
        self.call("Page.navigate", page, url=path.absolute().as_uri())
        deadline = time.monotonic() + DEADLINE_S
        while not page.loaded:
            self._note(self._message(deadline))
        return page

    def resize(self, page: Page, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", page, width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, page: Page, javascript: str):
        """What the expression is in the page, as JSON."""
        return self.call("Runtime.evaluate", page, expression=javascript, returnByValue=True)["result"].get("value")

    def screenshot(self, page: Page) -> bytes:
        """PNG of what is in the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", page, format="png")["data"])
