"""The website, as a reader meets it: built, served, and opened in a real browser.

ERA_S10_SITE names a folder where the site has been built already; else it is built here, in a copy of the
checkout. Without Chromium the browser's tests are skipped; CI_BROWSER=1 makes them fail instead.
"""

import ast
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from project import NOTEBOOKS, ROOT, cells, clean_copy

WIDE, NARROW = (1400, 900), (400, 800)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def page_name(
    notebook: Path,  # A notebook
) -> str:  # Its page, such as `utils.html`
    "Name a notebook's page as nbdev does."
    return re.sub(r"^\d+[a-z0-9]*_", "", notebook.stem.lower()) + ".html"


PAGES = {page_name(notebook): notebook for notebook in NOTEBOOKS}
every_page = pytest.mark.parametrize("page", PAGES)


def heading(
    notebook: Path,  # A notebook
) -> str:  # Its title
    "Read the first heading of a notebook, without its marks."
    for cell in cells(notebook):
        found = re.search(r"^#\s+(.+?)\s*$", cell["source"], flags=re.MULTILINE)
        if cell["cell_type"] == "markdown" and found:
            return re.sub(r"[`*]", "", found[1])
    raise AssertionError(f"{notebook.name} has no title")


def exported_names(
    notebook: Path,  # A notebook
) -> list[str]:  # Its public functions and classes
    "List what a notebook exports and shows with a signature."
    names = []
    for cell in cells(notebook):
        code = cell["source"]
        top = re.match(r"(?:#\|.*\n)+", code)
        directives = re.findall(
            r"^#\|\s*(\w+)", top[0] if top else "", flags=re.MULTILINE
        )
        if cell["cell_type"] != "code" or not {"export", "exports"} & set(directives):
            continue
        for node in ast.parse(code).body:
            if isinstance(
                node, ast.FunctionDef | ast.ClassDef
            ) and not node.name.startswith("_"):
                patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
                owner = node.args.args[0].annotation if patched else None
                names.append(
                    f"{ast.unparse(owner)}.{node.name}" if patched else node.name
                )
    return names


class Page(HTMLParser):
    "A page's links, anchors, and the text of its headings and code."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.title, self._in_title = [], set(), "", False
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag in ("a", "link", "img", "script", "source"):
            self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        self._in_title = tag == "title"

    def handle_endtag(self, tag):
        self._in_title = False

    def handle_data(self, data):
        self.title += data if self._in_title else ""


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The folder of the built site."
    if os.environ.get("ERA_S10_SITE"):
        return (ROOT / os.environ["ERA_S10_SITE"]).resolve()
    copy = clean_copy(tmp_path_factory.mktemp("site") / "era_s10")
    command = [sys.executable, "scripts/docs.py", "site"]
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "_docs"


@pytest.fixture(scope="session")
def parsed(site) -> dict[str, Page]:
    "Every page of the site, read."
    return {p.name: Page(p.read_text(encoding="utf-8")) for p in site.glob("*.html")}


def test_every_notebook_has_a_page_and_a_place_in_the_sidebar(parsed):
    assert set(parsed) == set(PAGES)
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    listed = []
    for entry in sidebar["website"]["sidebar"]["contents"]:
        listed += [entry] if isinstance(entry, str) else entry["contents"]
    assert sorted(listed) == [notebook.name for notebook in NOTEBOOKS]
    assert [n for n in listed if n[0].isdigit()] == sorted(
        n for n in listed if n[0].isdigit()
    )


@every_page
def test_no_link_inside_the_site_is_broken(page, parsed, site):
    broken = []
    for link in parsed[page].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        name = unquote(parts.path).removeprefix("./") or (
            "" if link.startswith("#") else "index.html"
        )
        anchor = unquote(parts.fragment)
        target = parsed.get(name or page)
        lost = anchor and target is not None and anchor not in target.anchors
        if lost or (name and not (site / name).is_file()):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(
    "page", [p for p, notebook in PAGES.items() if exported_names(notebook)]
)
def test_every_public_name_is_documented(page, parsed):
    missing = [
        n for n in exported_names(PAGES[page]) if n.lower() not in parsed[page].anchors
    ]
    assert not missing
    assert "blob/main/era_s10/" in parsed[page].text, (
        "no link from a signature to the source"
    )


def test_the_site_fetches_nothing_from_elsewhere_to_show_a_page(parsed):
    loaded = r'<(?:script|img)[^>]*\bsrc="(https?://[^"]+)|<link[^>]*rel="stylesheet"[^>]*href="(http[^"]+)'
    for name, page in parsed.items():
        found = [a or b for a, b in re.findall(loaded, page.text)]
        assert not [f for f in found if "katex" not in f], name  # Formulas alone may


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def address(site):
    "The address of the site, served from this process."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def browser_paths() -> tuple[
    str | None, str | None
]:  # Chromium, and the program that drives it
    "Find a browser and its driver on this machine."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    return browser, shutil.which("chromedriver")


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium with a profile of its own."
    chromium, driver = browser_paths()
    if not (chromium and driver):
        reason = "no Chromium with chromedriver here (Debian: apt install chromium chromium-driver)"
        if os.environ.get("CI_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=driver)
        opened = webdriver.Chrome(options=options, service=service)
        opened.set_page_load_timeout(60)
        yield opened
        opened.quit()


def open_page(
    browser,  # The browser
    url: str,  # A page's address
    size: tuple[int, int] = WIDE,  # The window's width and height, in pixels
) -> None:
    "Open a page in a window of a given size, and forget what the console said before."
    metrics = {
        "width": size[0],
        "height": size[1],
        "deviceScaleFactor": 1,
        "mobile": False,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")
    browser.get(url)


def wait_for(
    browser,  # The browser
    script: str,  # JavaScript that returns something once it is there
    seconds: float = 15,  # How long to wait
) -> object:  # What it returned
    "Wait until a script returns something true."
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: b.execute_script(script))


@every_page
def test_a_page_shows_its_title_and_its_figures(page, browser, address):
    open_page(browser, address + page)
    title = heading(PAGES[page])
    assert browser.title.startswith(title)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('h1')].map(h => h.innerText.trim())"
    )
    assert shown == [title]
    wait_for(browser, "return [...document.images].every(i => i.complete)")
    unloaded = browser.execute_script(
        "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 100))"
    )
    assert not unloaded
    stored = sum(
        "image/png" in output.get("data", {})
        for cell in cells(PAGES[page])
        if cell["cell_type"] == "code"
        and not re.match(r"(#\|.*\n)*#\|\s*hide\b", cell["source"])
        for output in cell["outputs"]
    )
    assert browser.execute_script("return document.images.length") >= stored
    errors = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and address in entry["message"]
    ]
    assert not errors


@every_page
def test_a_page_fits_a_narrow_window(page, browser, address):
    open_page(browser, address + page, NARROW)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    if width > NARROW[0]:
        wide = browser.execute_script(
            "return [...document.querySelectorAll('main *')].filter(e => "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
        )
        pytest.fail(f"{width} pixels wide: {wide[:3]}")


def test_the_search_finds_the_experiment(browser, address):
    open_page(browser, address + "index.html")
    box = next(
        b for b in browser.find_elements("css selector", "input[type=search], .smalldocs-search input")
        if b.is_displayed()
    )  # fmt: skip
    box.send_keys("Experiment")
    links = wait_for(
        browser,
        "const r = [...document.querySelectorAll('.search-result')].map(a => a.href);"
        "return r.length ? r : null",
    )
    found = [link for link in links if urlsplit(link).path.endswith("/backprop.html")]
    assert found, links
    browser.get(found[0])
    assert browser.title.startswith(heading(PAGES["backprop.html"]))
