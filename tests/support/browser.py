"""A headless Chromium that a test drives by WebDriver's own protocol (W3C), if the machine has one."""

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request

_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--window-size=900,800",
]  # fmt: skip


def missing():
    """Why there is no browser here; an empty string where there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} on this machine" if absent else ""


class Browser:
    """One tab."""

    def __init__(self, place, port, profile):
        self._place = f"http://127.0.0.1:{port}/session"
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": place}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self._place += "/" + _ask(self._place, wanted)["sessionId"]

    def open(self, url):
        """Go to a page."""
        _ask(f"{self._place}/url", {"url": url})

    def run(self, script):
        """What a script returns."""
        return _ask(f"{self._place}/execute/sync", {"script": script, "args": []})

    def until(self, script, timeout_s=60):
        """The first true value that a script returns. Raises: AssertionError after a time."""
        ends = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            assert time.monotonic() < ends, f"never true: {script}; {self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return value

    def close(self):
        """End the browser."""
        request = urllib.request.Request(self._place, method="DELETE")
        urllib.request.urlopen(request, timeout=20).close()


@contextlib.contextmanager
def started(folder):
    """A `Browser`, with its profile and whatever it writes in a folder."""
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    driver = subprocess.Popen(
        [shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, text=True, env=os.environ | home
    )
    try:
        port = next(
            int(line.split("port ")[1].strip(" .\n")) for line in driver.stdout if "successfully on port" in line
        )
        browser = Browser(shutil.which("chromium"), port, folder / "profile")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(20)


def _ask(url, value):
    data = json.dumps(value).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
