"""
A real browser for a test: headless Chromium, driven through Debian's chromedriver.

``Browser(test)`` starts one, which ends with the test, and whose files end with it. What a
test wants to do is selenium's, by ``browser.driver``; here stands what every test needs:
the window's size, dark or light, the console, pictures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from twisted.trial.unittest import SynchronousTestCase

from tests.integration.daemon import wait_until

__all__ = ["SCREENSHOTS", "Browser"]

SCREENSHOTS: Final = Path(
    os.environ.get("TASKD_SCREENSHOTS") or Path(tempfile.gettempdir()) / "taskd-screenshots"
)
"""Where pictures are saved, for who wants to see them."""

_CHROMIUM: Final = "/usr/bin/chromium"
_CHROMEDRIVER: Final = "/usr/bin/chromedriver"

_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-proxy-server",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """
    One browser, in a profile of its own.

    Args:
        test: Ends it, and fails if there is no Chromium.
        width: The page's width, in CSS pixels.
        height: Its height.
        is_dark: What the page is told that its reader likes.

    Attributes:
        driver: Selenium's.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        *,
        width: int = 1024,
        height: int = 800,
        is_dark: bool = False,
    ) -> None:
        for program in (_CHROMIUM, _CHROMEDRIVER):
            if not os.access(program, os.X_OK):
                test.fail(f"{program} is missing: apt-get install chromium chromium-driver")
        self._width, self._height, self._is_dark = width, height, is_dark
        self._console: list[dict[str, Any]] = []
        profile = Path(tempfile.mkdtemp(prefix="taskd-browser-"))
        # What has just ended may still write.
        test.addCleanup(wait_until, lambda: _is_removed(profile), what="the profile's end")
        options = webdriver.ChromeOptions()
        options.binary_location = _CHROMIUM
        for flag in (*_FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # With both paths given, selenium does not go and look for them in the network.
        service = Service(_CHROMEDRIVER, env={**os.environ, "HOME": str(profile)})
        self.driver = webdriver.Chrome(options, service)
        test.addCleanup(self.driver.quit)
        self.shape()

    def shape(self, *, width: int = 0, height: int = 0, is_dark: bool | None = None) -> None:
        """
        Change the size or the colours of the tab that is shown.

        A new tab begins without: it needs a call, which may be without arguments. Windows
        have a least width, which this goes below.

        Args:
            width: In CSS pixels; 0: as it was.
            height: Likewise.
            is_dark: None: as it was.
        """
        self._width, self._height = width or self._width, height or self._height
        self._is_dark = self._is_dark if is_dark is None else is_dark
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": self._width, "height": self._height, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def part(self, name: str) -> WebElement:
        """Give the element that has this id."""
        return self.driver.find_element("id", name)

    def wait_for_text(self, name: str, text: str) -> None:
        """Wait until the element of this id shows a text that has these words."""
        wait_until(lambda: text in self.part(name).text, what=f"{text!r} in #{name}")

    def fill(self, name: str, text: str) -> None:
        """Write into the field of this id, in the place of what was there."""
        self.part(name).clear()
        self.part(name).send_keys(text)

    def console(self) -> list[dict[str, Any]]:
        """
        Give what has been written to the console until now, since the start.

        Violations of a Content-Security-Policy, files that are not there and errors that
        nobody has caught are in it as well, with the ``level`` ``SEVERE``.
        """
        self._console += self.driver.get_log("browser")
        return list(self._console)

    def screenshot(self, name: str) -> Path:
        """Save a picture of what is shown now, and give its path."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        if not self.driver.save_screenshot(str(path)):
            raise OSError(f"{path} cannot be written")
        return path


def _is_removed(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    return not directory.exists()
