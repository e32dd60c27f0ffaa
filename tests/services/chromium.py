"""Drives a real Chromium without a window, over the pipe of its DevTools protocol: no port and no further package.

When the pipe closes, also because this process was killed, the browser ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests may run as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--lang=en-US",
)


def find_chromium() -> str | None:
    """The program, if one is installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """A browser with one page.

    Args:
        program: its path.
        profile: an empty folder.
        limit_s: for each answer.
    """

    def __init__(self, program: str, profile: Path, limit_s: float = 60.0) -> None:
        self._limit_s = limit_s
        its_read, self._write = os.pipe()
        self._read, its_write = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        opened = f'exec "$0" "$@" 3</dev/fd/{its_read} 4>/dev/fd/{its_write}'
        command = ["/bin/sh", "-c", opened, program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._errors = (profile.parent / f"{profile.name}.log").open("wb")
        self._process = subprocess.Popen(
            command,
            pass_fds=(its_read, its_write),
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
            env={**os.environ, "HOME": str(profile), "TZ": "UTC"},
        )
        os.close(its_read)
        os.close(its_write)
        self._arrived = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._is_open = True
        self._last = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def open_page(self) -> Page:
        """A page in a profile of its own; what an earlier one kept is not there."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, target)

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        with self._arrived:
            done = self._arrived.wait_for(lambda: number in self._answers or not self._is_open, self._limit_s)
            assert done, f"{method} was not answered within {self._limit_s} s"
            assert number in self._answers, f"the browser ended: {self._process.poll()}"
            answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _collect(self) -> None:
        rest = b""
        while chunk := os.read(self._read, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            with self._arrived:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self._arrived.notify_all()
        with self._arrived:
            self._is_open = False
            self._arrived.notify_all()

    def close(self) -> None:
        """End it, with all its processes."""
        with contextlib.suppress(OSError):
            os.close(self._write)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._reader.join(30)
            os.close(self._read)
            self._errors.close()


class Page:
    """One page, and what it complained about."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, **features: str) -> None:
        """Media features, such as ``prefers_color_scheme="dark"``."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def fill(self, selector: str, value: str) -> None:
        """Write into a field as a person does."""
        self.run(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input', {bubbles: true}));"
            "e.dispatchEvent(new Event('change', {bubbles: true}));})()"
        )

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def wait_for(self, script: str, limit_s: float = 60.0) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + limit_s
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not so within {limit_s} s: {script}\n{self.text('body')[:3000]}"
            time.sleep(0.1)
        return found

    def complaints(self) -> list[str]:
        """Errors and warnings in its console: of scripts, of the content security policy, of what was not found."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            of = event["params"]
            if event["method"] == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
                found.append(f"{of['entry']['text']} {of['entry'].get('url', '')}")
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(of["exceptionDetails"])[:1000])
            elif event["method"] == "Runtime.consoleAPICalled" and of["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(of["args"])[:1000])
        return found

    def screenshot(self, path: Path, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(b64decode(data))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser; nothing of it is left afterwards."""
    program = find_chromium()
    assert program is not None
    browser = Browser(program, profile)
    try:
        yield browser
    finally:
        browser.close()
