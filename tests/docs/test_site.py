"""The built site as a reader's browser has it: `make test-docs`. Everything is served from this machine; nothing else may be asked for."""

import functools, http.server, os, shutil, threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PAGES = sorted(str(f.relative_to(SITE)) for f in SITE.glob("**/*.html"))

LOOK = """() => ({
  links: [...document.querySelectorAll('a[href]')].map(a => a.href),
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  maths: document.querySelectorAll('.math').length,
  drawn: document.querySelectorAll('mjx-container').length,
  dollars: [...document.querySelectorAll('article :is(p, li, td, dd)')].filter(e => !e.closest('.cell_output') && [...e.childNodes].some(n => n.nodeType == 3 && n.data.includes('$'))).map(e => e.textContent.slice(0, 80)),
  wrong: [...document.querySelectorAll('[data-mml-node="merror"], mjx-merror')].map(e => e.textContent),
  blank: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
  nameless: [...document.images].filter(i => i.closest('article') && !i.alt && !i.closest('.cell_output')).map(i => i.src)})"""
WIDE = """() => {
  const scrolls = e => e && e.tagName != 'ARTICLE' && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const cut = [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e));
  return {width: document.scrollingElement.scrollWidth, room: innerWidth, cut: cut.slice(0, 5).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 60))} }"""
CONTRAST = """() => {
  const rgb = s => { const m = s.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const ground = e => { const c = e ? rgb(getComputedStyle(e).backgroundColor) : [255, 255, 255, 1]; return c[3] == 1 || !e ? c : over(c, ground(e.parentElement)) };
  const seen = [...document.querySelectorAll('article :is(p, li, td, th, h1, h2, pre, code, span, dt, text)')].filter(e => e.offsetParent && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  return seen.filter((_, i) => i % Math.ceil(seen.length / 200) == 0).map(e => {
    const under = ground(e), a = light(over(rgb(getComputedStyle(e).color), under)), b = light(under);
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + '.' + e.className, e.textContent.trim().slice(0, 40)] })}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    "The site's address."
    assert PAGES, "_site is empty; run `make docs`"
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        pytest.exit("test-docs: a browser is missing; apt install chromium", 1)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-sync",
                "--disable-component-update",
            ],
        )
        yield browser
        browser.close()


def drawn(page):
    "Wait until MathJax has drawn what there is."
    page.evaluate("() => window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 1) : 1")


@pytest.fixture(scope="session")
def visits(site, browser):
    "Every page opened once on a desk, then narrowed to a phone; what was seen there."
    seen = {}
    for name in PAGES:
        page, faults = browser.new_page(viewport=DESK), []
        page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: faults.append(f"error: {e}"))
        page.on("requestfailed", lambda r: faults.append(f"failed: {r.url}"))
        page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on(
            "request",
            lambda r: faults.append(f"leaves the machine: {r.url}") if not r.url.startswith((site, "data:")) else None,
        )
        status = page.goto(site + name, wait_until="networkidle").status
        drawn(page)
        seen[name] = page.evaluate(LOOK) | {"status": status, "faults": faults}
        page.set_viewport_size(PHONE)
        seen[name] |= page.evaluate(WIDE)
        page.close()
    return seen


def every(visits, what):
    return {name: v for name, v in ((n, what(v)) for n, v in visits.items()) if v}


def test_pages_open_without_a_fault(visits):
    assert not every(visits, lambda v: v["faults"] + ([v["status"]] if v["status"] != 200 else []))


def test_no_link_is_dead(visits, site):
    ids, dead = {site + n: set(v["ids"]) for n, v in visits.items()}, set()
    for name, v in visits.items():
        for url, anchor in (urldefrag(u) for u in v["links"] if u.startswith(site)):
            file = SITE / unquote(url.removeprefix(site) or "index.html")
            if not file.is_file():
                dead.add((name, url))
            elif anchor and unquote(anchor) not in ids.get(url, ids[site + "index.html"]):
                dead.add((name, f"{url}#{anchor}"))
    assert not dead


def test_equations_are_drawn(visits):
    assert not every(visits, lambda v: v["wrong"] + v["dollars"] + ["not drawn"] * (v["drawn"] < v["maths"]))
    assert visits["method/03_loss.html"]["drawn"] >= 10


def test_figures_are_there_and_have_words(visits):
    assert not every(visits, lambda v: v["blank"] + v["nameless"])


def test_no_page_is_wider_than_a_phone(visits):
    "Wide things scroll in boxes of their own; the theme's column would scroll as a whole, which does not count."
    assert not every(visits, lambda v: v["cut"] + [f"{v['width']} pixels"] * (v["width"] > v["room"]))


def test_figures_of_a_report_are_wide_and_lead_to_their_full_size(site, browser):
    page = browser.new_page(viewport=DESK)
    page.goto(site + "results/smol.html")
    seen = page.evaluate(
        "() => [...document.querySelectorAll('figure img')].map(i => [i.closest('a')?.href, i.src, i.width])"
    )
    assert len(seen) >= 10 and all(to == shown and width > 800 for to, shown, width in seen)
    page.close()


@pytest.mark.parametrize("view, kind", [(PHONE, "narrow"), (DESK, "wide")])
def test_the_picture_fits_without_scrolling(site, browser, view, kind):
    page = browser.new_page(viewport=view)
    page.goto(site + "index.html")
    seen = page.evaluate(
        "() => [...document.querySelectorAll('.picture')].filter(e => e.offsetParent).map(e => [e.className, e.querySelector('svg').getBoundingClientRect().right <= innerWidth, e.scrollWidth <= e.clientWidth])"
    )
    assert seen == [[f"picture {kind}", True, True]]
    page.close()


def test_search_finds_the_loss(site, browser):
    page = browser.new_page(viewport=DESK)
    page.goto(site + "index.html")
    page.fill("input[name=q]", "scir_loss")
    page.press("input[name=q]", "Enter")
    page.click("#search-results li.kind-object a")
    page.wait_for_load_state()
    assert "method/03_loss.html" in page.url and page.locator("dt#scir\\.method\\.loss\\.scir_loss").count() == 1
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(site, browser, scheme):
    faint, page = {}, browser.new_page(viewport=DESK, color_scheme=scheme)
    for name in PAGES:
        page.goto(site + name)
        if low := [c for c in page.evaluate(CONTRAST) if c[0] < 4.5]:
            faint[name] = low[:3]
        if name == "index.html":
            grounds = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.close()
    assert (grounds == "rgb(255, 255, 255)") == (scheme == "light")
    assert not faint


@pytest.mark.skipif(not os.environ.get("SHOTS"), reason="SHOTS names no folder for screenshots")
def test_screenshots(site, browser):
    "Pictures for a person to look at."
    folder = Path(os.environ["SHOTS"])
    for view, size, scheme in (("desk", DESK, "light"), ("phone", PHONE, "light"), ("dark", DESK, "dark")):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        for name in [
            n
            for n in PAGES
            if not n.startswith(("library", "run"))
            or n
            in (
                "00_recipe.html",
                "method/03_loss.html",
                "stages/05_consistency.html",
                "report/06_document.html",
                "run/03_judge.html",
            )
        ]:
            page.goto(site + name, wait_until="networkidle")
            drawn(page)
            (folder / view).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=folder / view / f"{name.replace('/', '-').removesuffix('.html')}.png")
        page.close()
    assert len(list(folder.glob("*/*.png"))) >= 36
