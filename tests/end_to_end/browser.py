"""Headless Chromium, driven over its DevTools protocol: open a page, wait, read, photograph."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from tests import debian

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--window-size=1900,1000",
    "--remote-debugging-port=0",
]


def find_chromium() -> str:
    """The browser's path; installs Debian's package if it is missing and we may."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    debian.install("chromium")
    path = shutil.which("chromium")
    assert path, (
        "this test needs Chromium: install it (Debian: apt-get install chromium), "
        "or set DESCENT_NO_BROWSER=1 to go without"
    )
    return path


def look(url: str, texts: list[str], screenshot: Path, timeout_s: float = 60) -> str:
    """Open `url`, wait until the page shows all `texts` (as text or attribute) and its images
    are loaded, save a PNG, return the page's HTML. Fails with what was there instead."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [find_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert browser.stderr is not None
            endpoint = next(
                match[1] for line in browser.stderr if (match := re.search(r"DevTools listening on (ws://\S+)", line))
            )
            return asyncio.run(_look(endpoint, url, texts, screenshot, timeout_s))
        finally:
            browser.kill()
            browser.wait()


async def _look(endpoint: str, url: str, texts: list[str], screenshot: Path, timeout_s: float) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(endpoint, max_msg_size=0) as socket,
    ):
        number = 0

        async def call(method: str, attach: str | None = None, **params: Any) -> Any:
            nonlocal number
            number += 1
            message = {"id": number, "method": method, "params": params}
            await socket.send_json(message | ({"sessionId": attach} if attach else {}))
            while True:
                reply = json.loads(await socket.receive_str(timeout=30))
                if reply.get("id") == number:
                    assert "error" not in reply, reply
                    return reply["result"]

        target = (await call("Target.createTarget", url=url))["targetId"]
        page = (await call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]

        async def evaluate(expression: str) -> Any:
            return (await call("Runtime.evaluate", page, expression=expression, returnByValue=True))["result"].get(
                "value"
            )

        deadline = time.monotonic() + timeout_s
        while True:
            html = await evaluate("document.documentElement.outerHTML") or ""
            loaded = await evaluate("[...document.images].every(i => i.complete)")
            if loaded and all(text in html for text in texts):
                break
            if time.monotonic() > deadline:
                missing = [text for text in texts if text not in html] or "all of its images"
                shown = await evaluate("document.body.innerText")
                raise AssertionError(f"{url} doesn't show {missing}; it shows:\n{shown}")
            await asyncio.sleep(0.25)
        await asyncio.sleep(1)  # lets animations end, for the picture only
        picture = await call("Page.captureScreenshot", page, format="png")
        screenshot.write_bytes(base64.b64decode(picture["data"]))
        return str(html)
