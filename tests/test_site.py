"""The website as readers meet it: built, served, and opened in a real browser.

ERA_S10_SITE names a folder with a site that has been built already; otherwise the `site` fixture builds it from a
copy of the checkout. Without Chromium the browser tests are skipped; with CI_BROWSER=1 they fail instead.
"""

import ast
import functools
import http.server
import os
import re
import shutil
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from project import NOTEBOOKS, ROOT, cells

pytestmark = pytest.mark.slow  # the site is built first

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
]


def page_name(notebook: Path) -> str:
    "Return the page of a notebook as nbdev names it, such as `utils.html`."
    return re.sub(r"^\d+[a-z0-9]*_", "", notebook.stem.lower()) + ".html"


PAGES = {page_name(notebook): notebook for notebook in NOTEBOOKS}
every_page = pytest.mark.parametrize("page", PAGES)

# The page that explains a term comes up when a reader searches for it
TERMS = {
    "overfit": "model.html",
    "mixed precision": "steps.html",
    "skip connection": "model.html",
    "reproducible": "utils.html",
    "deterministic": "utils.html",
    "grayscale": "cifar10.html",
    "early stopping": "backprop.html",
    "hyperparameter": "recipe.html",
    "data augmentation": "augment.html",
    "validation set": "datasets.html",
    "model card": "weights.html",
    "inference": "predict.html",
    "throughput": "benchmarks.html",
    "receptive field": "model.html",
    "cutout": "cifar10.html",
    "warmup": "recipe.html",
    "Experiment": "backprop.html",
}


def heading(notebook: Path) -> str:
    "Return the title of a notebook, without Markdown marks."
    for cell in cells(notebook):
        found = re.search(r"^#\s+(.+?)\s*$", cell["source"], flags=re.MULTILINE)
        if cell["cell_type"] == "markdown" and found:
            return re.sub(r"[`*]", "", found[1])
    raise AssertionError(f"{notebook.name} has no title")


def directives(source: str) -> set[str]:
    "Return the directives on the first lines of a code cell."
    top = re.match(r"(?:#\|.*\n?)*", source)[0]
    return set(re.findall(r"^#\|\s*([\w-]+)", top, flags=re.MULTILINE))


def exported_names(notebook: Path) -> list[str]:
    "List the public functions, classes and patched methods that a notebook exports."
    names = []
    for cell in cells(notebook):
        if cell["cell_type"] != "code" or not {"export", "exports"} & directives(
            cell["source"]
        ):
            continue
        for node in ast.parse(cell["source"]).body:
            kinds = ast.FunctionDef | ast.ClassDef
            if isinstance(node, kinds) and not node.name.startswith("_"):
                patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
                owner = (
                    f"{ast.unparse(node.args.args[0].annotation)}." if patched else ""
                )
                names.append(owner + node.name)
    return names


class Page(HTMLParser):
    "The links, anchors, images and title of a page."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.images = [], set(), []
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag in ("a", "link", "img", "script", "source"):
            self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        if tag == "img":
            self.images.append(attrs)


@pytest.fixture(scope="session")
def parsed(site) -> dict[str, Page]:
    "Every page of the site, parsed."
    return {p.name: Page(p.read_text(encoding="utf-8")) for p in site.glob("*.html")}


# ---------------------------------------------------------------- without a browser


def test_every_notebook_has_a_page_and_a_place_in_the_sidebar(parsed):
    assert set(parsed) == {*PAGES, "404.html"}
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    sections = sidebar["website"]["sidebar"]["contents"]
    listed = [name for section in sections for name in section["contents"]]
    assert sorted(listed) == sorted(notebook.name for notebook in NOTEBOOKS)
    titles = [section["section"] for section in sections]
    assert titles == [
        "Start here", "The six chapters", "Going further", "Under the hood", "Reference"
    ]  # fmt: skip


def broken_links(name: str, parsed: dict[str, Page], site: Path) -> list[str]:
    "Return the links of a page that lead nowhere."
    broken = []
    for link in parsed[name].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        here = "" if link.startswith("#") else "index.html"
        path = unquote(parts.path).removeprefix("./") or here
        anchor, target = unquote(parts.fragment), parsed.get(path or name)
        lost = anchor and target is not None and anchor not in target.anchors
        if lost or (path and not (site / path).is_file()):
            broken.append(link)
    return broken


@every_page
def test_no_link_inside_the_site_is_broken(page, parsed, site):
    assert not broken_links(page, parsed, site)


def test_public_names_have_a_signature_with_a_link_to_the_source(parsed):
    for page, notebook in PAGES.items():
        names = exported_names(notebook)
        missing = [name for name in names if name.lower() not in parsed[page].anchors]
        assert not missing, page
        if names:
            assert "blob/main/era_s10/" in parsed[page].text, page


def test_every_image_has_alt_text_and_a_size(parsed):
    for name, page in parsed.items():
        assert not [i["src"] for i in page.images if not i.get("alt", "").strip()], name
        figures = [i for i in page.images if i["src"].startswith("figures/")]
        assert all(int(i["width"]) > 0 and int(i["height"]) > 0 for i in figures), name


def test_figures_are_stored_at_double_density(site, parsed):
    import struct

    for name, page in parsed.items():
        for image in page.images:
            if image["src"].startswith("figures/"):
                content = (site / image["src"]).read_bytes()
                (pixels,) = struct.unpack(">I", content[16:20])
                assert pixels >= 2 * int(image["width"]) - 2, (name, image["src"])


def test_every_page_links_to_colab_to_its_source_and_to_the_notebook(parsed, site):
    for page, notebook in PAGES.items():
        links = parsed[page].links
        assert any(
            "colab.research.google.com" in k and notebook.name in k for k in links
        ), page
        assert any(k.endswith(f"/edit/main/nbs/{notebook.name}") for k in links), page
        assert f"notebooks/{notebook.name}" in links, page
        assert (site / "notebooks" / notebook.name).is_file()


def test_social_picture_and_page_for_missing_pages(parsed, site):
    assert (site / "images" / "social.png").is_file()
    assert 'property="og:image"' in parsed["index.html"].text
    assert "Page not found" in parsed["404.html"].text


def test_pages_load_nothing_from_other_hosts(parsed):
    loaded = r'<(?:script|img)[^>]*\bsrc="(https?://[^"]+)|<link[^>]*rel="stylesheet"[^>]*href="(http[^"]+)'
    for name, page in parsed.items():
        assert not re.findall(loaded, page.text), name


def test_formulas_are_mathml(parsed):
    assert "<math" in parsed["recipe.html"].text
    for name, page in parsed.items():
        assert not re.search(r'class="math[^"]*">\s*\\[(\[]', page.text), name


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def address(site):
    "The address of the site, served by this process."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium with its own profile."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "Chromium and ChromeDriver not found (Debian: apt install chromium chromium-driver)"
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
    browser, url: str, size: tuple[int, int] = WIDE, scheme: str = "light"
) -> None:
    "Open a page in a window of a given size, for a reader who prefers light or dark."
    metrics = {
        "width": size[0],
        "height": size[1],
        "deviceScaleFactor": 1,
        "mobile": False,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")
    browser.get(url)


def wait_for(browser, script: str, seconds: float = 15) -> object:
    "Wait until a script returns something true, and return it."
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: b.execute_script(script))


OPEN_FOLDED = "document.querySelectorAll('details').forEach(d => d.open = true)"
CLIPPED = """
return [...document.querySelectorAll('main pre')]
  .filter(p => !p.closest('.cell-output') || p.closest('.cell-output-markdown'))
  .filter(p => p.scrollWidth > p.clientWidth + 1).map(p => p.innerText.slice(0, 200))"""
SCROLLS = """
return [...document.querySelectorAll('main pre')].filter(p => p.scrollWidth > p.clientWidth + 1)
  .filter(p => !['auto', 'scroll'].includes(getComputedStyle(p).overflowX)
            || getComputedStyle(p).scrollbarWidth === 'none')
  .map(p => p.innerText.slice(0, 200))"""
LOW_CONTRAST = """
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m };
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
function background(e) {
  const layers = [];
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) layers.push(c);
    if (c[3] === 1) break;
  }
  let color = [255, 255, 255, 1];
  while (layers.length) color = over(layers.pop(), color);
  return color;
}
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const found = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement;
  if (!node.textContent.trim() || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(e.tagName)) continue;
  const style = getComputedStyle(e);
  if (!e.getClientRects().length || style.visibility === 'hidden' || style.opacity === '0') continue;
  const back = background(e), front = over(parse(style.color), back);
  const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) found.set(e.tagName + '.' + e.className, ratio.toFixed(2) + ' ' + node.textContent.trim().slice(0, 40));
}
return [...found].map(([k, v]) => k + ': ' + v)"""


def stored_figures(notebook: Path) -> int:
    "Count the figures that a notebook stores in visible cells."
    return sum(
        "image/png" in output.get("data", {})
        for cell in cells(notebook)
        if cell["cell_type"] == "code" and "hide" not in directives(cell["source"])
        for output in cell["outputs"]
    )


def check_content(page: str, browser, address: str) -> None:
    "Check the title, the figures and the console of an open page."
    title = heading(PAGES[page])
    assert browser.title.startswith(title)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('h1')].map(h => h.innerText.trim())"
    )
    assert shown == [title]
    browser.execute_script(
        "document.querySelectorAll('img').forEach(i => i.loading = 'eager')"
    )
    wait_for(browser, "return [...document.images].every(i => i.complete)")
    unloaded = browser.execute_script(
        "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
    )
    assert not unloaded
    assert browser.execute_script("return document.images.length") >= stored_figures(
        PAGES[page]
    )
    log = browser.get_log("browser")
    assert not [
        e["message"] for e in log if e["level"] == "SEVERE" and address in e["message"]
    ]


@every_page
def test_page_reads_well_at_both_widths_light_and_dark(page, browser, address):
    for scheme in ("light", "dark"):
        for size in (WIDE, NARROW):
            open_page(browser, address + page, size, scheme)
            if (size, scheme) == (WIDE, "light"):
                check_content(page, browser, address)
            browser.execute_script(OPEN_FOLDED)
            if size == WIDE:
                assert not browser.execute_script(CLIPPED), (
                    "code is wider than its column"
                )
            width = browser.execute_script(
                "return document.documentElement.scrollWidth"
            )
            assert width <= size[0], f"the page is {width} pixels wide"
            assert not browser.execute_script(SCROLLS), (
                "code neither fits nor scrolls visibly"
            )
            assert not browser.execute_script(LOW_CONTRAST), (scheme, size)


def test_no_link_is_shown_as_text(site):
    raw = re.compile(r"\]\([\w./-]+\.(?:ipynb|html)")
    for page in site.glob("*.html"):
        text = re.sub(
            r"<(pre|script)\b.*?</\1>|<[^>]+>",
            "",
            page.read_text("utf-8"),
            flags=re.DOTALL,
        )
        assert not raw.search(text), page.name


def test_home_page_in_a_browser(browser, address):
    open_page(browser, address + "index.html")
    check_content("index.html", browser, address)
    assert not browser.execute_script(LOW_CONTRAST)
    light = browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor"
    )
    open_page(browser, address + "index.html", scheme="dark")
    assert not browser.execute_script(LOW_CONTRAST)
    dark = browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor"
    )
    assert light != dark


def test_navigation_leads_where_it_says(browser, address):
    open_page(browser, address + "index.html")
    script = "return [...document.querySelectorAll('#quarto-header .navbar-nav a.nav-link')].map(a => [a.innerText.trim(), a.href])"
    links = dict(browser.execute_script(script))
    for text, page in {
        "Tutorial": "tutorial.html",
        "Model": "model.html",
        "Training": "backprop.html",
        "Results": "results.html",
        "Commands": "commands.html",
        "Names A–Z": "names.html",
    }.items():
        browser.get(links[text])
        assert urlsplit(browser.current_url).path.endswith(page)
        assert browser.title.startswith(heading(PAGES[page]))


@pytest.mark.parametrize("term", TERMS)
def test_search_finds_a_term_on_the_page_that_explains_it(term, browser, address):
    open_page(browser, address + "index.html")
    boxes = browser.find_elements(
        "css selector", "input[type=search], .smalldocs-search input"
    )
    next(box for box in boxes if box.is_displayed()).send_keys(term)
    script = "const r = [...document.querySelectorAll('.search-result')].map(a => a.href); return r.length ? r : null"
    links = wait_for(browser, script)
    pages = [urlsplit(link).path.rsplit("/", 1)[-1] for link in links]
    assert TERMS[term] in pages, pages
