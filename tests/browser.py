"""A headless browser, spoken to by the DevTools protocol over its pipe: no package and no port is needed."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next((found for found in map(shutil.which, NAMES) if found), None)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Browser:
    """A tab. `events` are what the browser has told of its own accord."""

    def __init__(self, send, receive):
        self._send, self._receive, self._received = send, receive, b""
        self._number, self._session, self.events = itertools.count(1), None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The result of a command; its error is raised."""
        number = next(self._number)
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": number, "method": method, "params": parameters} | session
        self._send.write(json.dumps(message).encode() + b"\0")
        return self._wait(lambda message: message.get("id") == number)["result"]

    def open(self, path):
        """Load a file, all of it; `events` start afresh."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, script):
        """What an expression of JavaScript gives in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def show(self, width, colours):
        """As on a screen of this width, "light" or "dark"."""
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])

    def named(self, *methods):
        """What the events of these names hold."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def _wait(self, wanted):
        while True:
            message = self._read()
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                assert "error" not in message, message
                return message

    def _read(self):
        while b"\0" not in self._received:
            assert select.select([self._receive], [], [], 120)[0], "the browser hangs"
            some = self._receive.read(1 << 16)
            assert some, "the browser has ended"
            self._received += some
        text, _, self._received = self._received.partition(b"\0")
        return json.loads(text)


@contextlib.contextmanager
def opened():
    """A browser of its own profile, ended at last."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PATH, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # Chromium reads from descriptor 3 and writes to 4; only some shells can name those above 9.
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(shell, pass_fds=(theirs_in, theirs_out), **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            with os.fdopen(ours_out, "wb", 0) as send, os.fdopen(ours_in, "rb", 0) as receive:
                yield Browser(send, receive)
        finally:
            process.kill()
            process.wait()
