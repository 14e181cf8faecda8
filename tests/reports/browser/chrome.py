"""Chromium by its driver's own protocol (WebDriver over HTTP on loopback); no package is needed."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

WIDTHS = (390, 1440)
SCHEMES = ("light", "dark")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the standard gives a reference


def is_installed() -> bool:
    """Whether Debian's packages chromium and chromium-driver, or the like, are here."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Chrome:
    """One browser without a window. Enter it, then `open` pages."""

    def __enter__(self) -> "Chrome":
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._driver.stdout is not None
        found = None
        while found is None:
            line = self._driver.stdout.readline()
            assert line, "chromedriver ended"
            found = re.search(r"started successfully on port (\d+)", line)
        self._url = f"http://127.0.0.1:{found[1]}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        body = {"capabilities": {"alwaysMatch": wanted}}
        self._url += f"/session/{self._send('POST', '/session', body)['sessionId']}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._send("DELETE", "")
        finally:
            self._driver.kill()
            self._driver.wait()
            assert self._driver.stdout is not None
            self._driver.stdout.close()

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _post(self, path: str, **body: Any) -> Any:
        return self._send("POST", path, body)

    def _tell(self, command: str, **values: Any) -> Any:
        """A command of the developer tools."""
        return self._post("/goog/cdp/execute", cmd=command, params=values)

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Open a file as a reader with this width in pixels and this colour scheme sees it."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._tell("Emulation.setDeviceMetricsOverride", **screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._tell("Emulation.setEmulatedMedia", features=features)
        self._post("/url", url=page.as_uri())
        assert self.run("return document.documentElement.dataset.ready") == "yes"

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's `return`."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def hover(self, selector: str) -> str:
        """Move the pointer onto the first element of a selector; return what the page shows."""
        found = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            " return e",
            selector,
        )
        move = {"type": "pointerMove", "duration": 0, "origin": {_ELEMENT: found[_ELEMENT]}}
        away = {"type": "pointerMove", "duration": 0, "x": 1, "y": 1}
        actions = [away, move | {"x": 0, "y": 0}]
        self._post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])
        return self.tip()

    def tip(self) -> str:
        """The text of the tooltip; empty where it is hidden."""
        script = "const t = document.getElementById('tip'); return t.hidden ? '' : t.innerText"
        return str(self.run(script))

    def press(self, *keys: str) -> None:
        """Press keys, by their codes in the standard, one after the other."""
        pressed = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keys", "actions": pressed}])

    def requested(self) -> list[str]:
        """What has been asked for since the last call: the addresses of all requests."""
        found = []
        for entry in self._post("/se/log", type="performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found

    def errors(self) -> list[str]:
        """What the page has complained of since the last call."""
        return [entry["message"] for entry in self._post("/se/log", type="browser")]

    def picture(self) -> bytes:
        """The whole page as PNG."""
        size = self._tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])
