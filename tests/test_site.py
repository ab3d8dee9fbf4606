"""The built site in a real browser: NATGRAD_SITE names its folder, and Chromium drives it."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

SITE = Path(os.environ.get("NATGRAD_SITE", ""))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

if not os.environ.get("NATGRAD_SITE"):
    pytest.skip("NATGRAD_SITE does not name a built site", allow_module_level=True)
if CHROMIUM is None or DRIVER is None:
    pytest.skip("Chromium and its driver are not installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")
axe = pytest.importorskip("axe_core_python.selenium")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

# ASV's own site loads scripts from elsewhere; the theme leaves a template among its files.
FILES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
FILES = [name for name in FILES if not name.startswith(("asv/", "_static/", "."))]
#: Pages of source code are many and alike.
PAGES = [page for page in FILES if not page.startswith("_modules/")]
#: One page of each kind.
AUDITED = [
    "index.html",
    "start.html",
    "concepts.html",
    "theory.html",
    "optimizers.html",
    "howto/index.html",
    "howto/cupy.html",
    "comparison.html",
    "support.html",
    "examples/index.html",
    "examples/plot_one_line.html",
    "performance.html",
    "api/index.html",
    "api/generated/natgrad_array.pinvh.html",
    "search.html",
]
PHONE, DESK = (390, 844), (1300, 900)


class Host(http.server.SimpleHTTPRequestHandler):
    """Serves files as static hosts do, text compressed, and says nothing."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if path.suffix not in (".html", ".css", ".js", ".svg") or not path.is_file():
            return super().do_GET()
        body = gzip.compress(path.read_bytes(), compresslevel=5)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Host, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def resize(browser: Any, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def theme(browser: Any, mode: str) -> None:
    browser.execute_script("localStorage.mode = localStorage.theme = arguments[0]", mode)


# ------------------------------------------------------------------------------ every page


class Links(HTMLParser):
    """Where a page points to, and what can be pointed to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("href", "src") and value:
                self.targets.append(value)
            elif key == "id" or (key == "name" and tag == "a"):
                self.places.add(value or "")


def test_no_dead_internal_links() -> None:
    pages = {name: Links((SITE / name).read_text(encoding="utf-8")) for name in FILES}
    dead = []
    for name, page in pages.items():
        for target in page.targets:
            if urlsplit(target).scheme or target.startswith("//"):
                continue
            path, place = urldefrag(urljoin(f"/{name}", target))
            path = unquote(urlsplit(path).path).lstrip("/")
            path = f"{path}index.html" if not path or path.endswith("/") else path
            known = (SITE / path).is_file() and (path not in pages or unquote(place) in pages[path].places)
            if not known:
                dead.append(f"{name}: {target}")
    assert not dead


def test_every_page_loads_on_a_phone(browser: Any, address: str) -> None:
    """Without a message on the console, a picture without words, or a page wider than the screen."""
    resize(browser, PHONE)
    wrong = []
    for name in PAGES:
        browser.get(address + name)
        state = browser.execute_script(
            """
            const images = [...document.images];
            images.forEach((image) => { image.loading = "eager"; });
            return [document.documentElement.scrollWidth, window.innerWidth,
                images.filter((image) => !image.hasAttribute("alt")).map((image) => image.src),
                [...document.querySelectorAll(".gallery-figure")].filter((image) => image.alt.length < 40).length]
            """
        )
        wide, screen, wordless, short = state
        messages = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        if wide > screen or wordless or short or messages:
            wrong.append((name, state, messages))
    assert not wrong


# --------------------------------------------------------------------------------- audits


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_nothing_serious_in_an_audit_of_accessibility(browser: Any, address: str, mode: str) -> None:
    resize(browser, DESK)
    browser.get(address)
    theme(browser, mode)
    found = []
    for name in AUDITED if mode == "light" else ("index.html", "examples/plot_one_line.html", "performance.html"):
        browser.get(address + name)
        assert browser.execute_script("return document.documentElement.dataset.theme") == mode
        for rule in axe.Axe().run(browser)["violations"]:
            if rule["impact"] in ("serious", "critical"):
                found += [(name, rule["id"], node["html"][:200]) for node in rule["nodes"]]
    theme(browser, "light")
    assert not found


@pytest.mark.parametrize("name", ["index.html", "performance.html"])
def test_the_keyboard_reaches_everything(browser: Any, address: str, name: str) -> None:
    resize(browser, DESK)
    browser.get(address + name)
    wanted = browser.execute_script(
        """
        window.reached = new Set();
        document.addEventListener("focusin", (event) => window.reached.add(event.target));
        window.wanted = [...document.querySelectorAll("main a[href], header a[href], main select, header button")]
            .filter((node) => node.checkVisibility({ visibilityProperty: true }) && node.tabIndex >= 0);
        return window.wanted.length
        """
    )
    assert wanted > 15
    for _ in range(wanted + 60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.execute_script("return window.wanted.every((node) => window.reached.has(node))"):
            return
    missed = (
        "return window.wanted.filter((node) => !window.reached.has(node)).map((node) => node.outerHTML.slice(0, 120))"
    )
    assert not browser.execute_script(missed)


def test_the_first_page_is_light(browser: Any, address: str) -> None:
    resize(browser, DESK)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    browser.get(address)
    browser.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": False})
    sizes = browser.execute_script(
        "const entries = ['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind));"
        "return entries.map((entry) => entry.transferSize)"
    )
    assert len(sizes) > 5
    assert 50_000 < sum(sizes) <= 1_000_000


def test_a_natural_gradient_is_on_the_first_page(browser: Any, address: str) -> None:
    browser.get(address)
    code = browser.find_element(By.CSS_SELECTOR, "main pre").text
    assert "natural_gradient(" in code
    assert len(code.strip().splitlines()) <= 15


# ------------------------------------------------------------------------ what scripts do


def test_search_finds_a_function(browser: Any, address: str) -> None:
    browser.get(f"{address}search.html?q=pinvh")
    found = WebDriverWait(browser, 20).until(
        lambda driver: [node.get_attribute("href") for node in driver.find_elements(By.CSS_SELECTOR, "ul.search a")]
    )
    assert any("natgrad_array.pinvh.html" in href for href in found)


def chart(browser: Any, kind: str) -> str:
    """The words of a chart, which has marks and a table with rows below it."""
    place = browser.find_element(By.ID, f"dashboard-{kind}")
    assert place.find_elements(By.CSS_SELECTOR, "svg.chart .mark")
    assert any(row.is_displayed() for row in browser.find_elements(By.CSS_SELECTOR, f"#table-{kind} tbody tr"))
    return str(place.find_element(By.CSS_SELECTOR, "svg.chart").get_attribute("aria-label"))


def test_dashboards_draw_and_switch(browser: Any, address: str) -> None:
    resize(browser, DESK)
    browser.get(f"{address}performance.html")
    before = chart(browser, "peers")
    for name in ("library", "operation", "dtype", "scale"):
        select = Select(browser.find_element(By.CSS_SELECTOR, f"#dashboard-peers select[name={name}]"))
        select.select_by_index(1)
        after = chart(browser, "peers")
        assert after != before, name
        before = after
    if browser.find_elements(By.ID, "dashboard-history"):
        before = chart(browser, "history")
        Select(browser.find_element(By.CSS_SELECTOR, "#dashboard-history select[name=benchmark]")).select_by_index(1)
        assert chart(browser, "history") != before


def test_tables_serve_without_scripts() -> None:
    text = (SITE / "performance.html").read_text(encoding="utf-8")
    assert text.count("<tr data-") > 100
