"""The report in a real browser: drawn in full, without a network, on wide and narrow screens, light and dark."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_runs import make_outcome, write_full_run, write_nasty_run, write_own_run, write_run

from tune_amp.report.report import write_report
from tune_amp.trial.config import TrialStatus

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HEADINGS = [
    "What was searched",
    "What came out",
    "How the search went",
    "What early stopping saved",
    "The loss scale of every trial",
    "Validation by epoch",
    "Which settings mattered",
    "Settings and what they led to",
    "The best, on fresh seeds",
    "Use of the slot time",
    "Where this comes from",
]

# Functions, not expressions: those playwright would evaluate as text, which the page's own policy forbids.
DRAWN = """() => [...document.querySelectorAll('.plot')].every((plot) =>
    plot.querySelector('.main-svg') && plot.querySelector('.scatterlayer .trace path, .barlayer .trace path'))"""

# Text and its background by WCAG 2.1, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio; 3 is enough for large text.
FAINT = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    throw new Error('no background');
  };
  const faint = [];
  for (const element of document.querySelectorAll('main *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || element.tagName === 'SCRIPT') continue;
    const style = getComputedStyle(element);
    const inSvg = element instanceof SVGElement;
    const a = luminance(parse(inSvg ? style.fill : style.color)), b = luminance(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) faint.push([element.textContent.slice(0, 40), ratio]);
  }
  return faint;
}"""


class Visit:
    """A page and everything that went wrong on it."""

    def __init__(self, browser: "Browser", path: Path) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.resolve().as_uri()
        self.page.goto(self.address)
        self.page.wait_for_function(DRAWN, timeout=60_000)

    def check(self) -> None:
        """Nothing was asked of the network, and the browser has nothing to say."""
        assert self.messages == []
        assert [url for url in self.requests if url != self.address and not url.startswith(("data:", "blob:"))] == []


@pytest.fixture(scope="module")
def visit(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Visit:
    folder = tmp_path_factory.mktemp("run")
    return Visit(browser, write_report(write_full_run(folder)))


def test_the_page_is_whole_without_a_network(visit: Visit) -> None:
    visit.check()
    page = visit.page
    assert page.title() == "simple_net on mnist: 2026-03-01-mnist"
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h2").all_text_contents() == HEADINGS
    assert page.locator("h1").count() == 1
    assert page.locator(".plot").count() == 2 + 2 + 1 + 1 + 5 + 1 + 1
    assert page.locator(".plot:not([role=img][aria-label])").count() == 0
    assert all(page.locator("figcaption").all_text_contents())


def test_it_fits_wide_and_narrow_screens_in_light_and_dark(visit: Visit) -> None:
    page = visit.page
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_function(
                f"() => [...document.querySelectorAll('.main-svg')].every((s) => s.clientWidth <= {width})"
            )
            page.wait_for_function(DRAWN)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.wait_for_function(f"() => ({FAINT})().length === 0", timeout=10_000)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})
    visit.check()


def test_boxes_hide_groups_of_lines_and_their_marks(visit: Visit) -> None:
    page = visit.page
    count = "document.querySelectorAll('#scales-whole .scatterlayer .trace').length"
    before = page.evaluate(count)
    box = page.locator("#scales input[data-group=stopped]")
    box.uncheck()
    page.wait_for_function(f"() => {count} < {before}")
    hidden = page.evaluate(count)
    page.locator("#scales input[data-group=overflow]").uncheck()
    page.wait_for_function(f"() => {count} < {hidden}")
    page.locator("#scales input[data-group=overflow]").check()
    box.check()
    page.wait_for_function(f"() => {count} === {before}")
    visit.check()


def test_a_trial_under_the_pointer_stands_out_in_both_panels(visit: Visit) -> None:
    page = visit.page
    page.locator("#scales-whole").scroll_into_view_if_needed()
    place = page.evaluate(
        """() => {
          const plot = document.getElementById('scales-whole');
          const line = plot.data.find((trace) => trace.mode === 'lines' && trace.legendgroup === 'stopped');
          const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
          const last = line.x.length - 1;
          return [box.left + xaxis._offset + xaxis.d2p(line.x[last]),
                  box.top + yaxis._offset + yaxis.d2p(line.y[last])];
        }"""
    )
    page.mouse.move(place[0] - 40, place[1] - 40)
    page.mouse.move(place[0], place[1], steps=5)
    wide = """() => new Set(['scales-first', 'scales-whole'].map((id) => document.getElementById(id).data
        .filter((trace) => trace.mode === 'lines' && trace.line.width === 4).map((trace) => trace.meta[1]).join()))"""
    page.wait_for_function(f"() => {{ const found = ({wide})(); return found.size === 1 && !found.has(''); }}")
    assert page.locator("#scales-whole .hoverlayer .hovertext").count() == 1
    page.mouse.move(2, 2)
    page.wait_for_function(f"() => ({wide})().has('')")
    visit.check()


@pytest.mark.parametrize("name", ["epochs-plot", "importance-plot", "time-plot", "history-plot"])
def test_what_is_no_trials_line_stays_as_it_is_under_the_pointer(name: str, visit: Visit) -> None:
    page = visit.page
    page.locator(f"#{name}").scroll_into_view_if_needed()
    before = page.evaluate(f"JSON.stringify(document.getElementById('{name}').data)")
    place = page.evaluate(
        f"""() => {{
          const drawn = document.querySelector('#{name} .barlayer .point path, #{name} .scatterlayer .points path');
          const box = drawn.getBoundingClientRect();
          return [box.left + box.width / 2, box.top + box.height / 2];
        }}"""
    )
    page.mouse.move(place[0] - 3, place[1] - 3)
    page.mouse.move(place[0], place[1], steps=5)
    page.wait_for_function(f"() => document.querySelector('#{name} .hoverlayer .hovertext')")
    assert page.evaluate(f"JSON.stringify(document.getElementById('{name}').data)") == before
    page.mouse.move(2, 2)
    page.wait_for_function(f"() => !document.querySelector('#{name} .hoverlayer .hovertext')")
    visit.check()


def test_texts_of_files_are_shown_and_never_run(browser: "Browser", tmp_path: Path) -> None:
    visit = Visit(browser, write_report(write_nasty_run(tmp_path)))
    visit.page.locator("#history summary").click()
    assert visit.page.locator("#history td", has_text="<script>window.hacked = 1</script>").count() > 0
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    visit.check()
    visit.page.close()


@pytest.mark.parametrize("kind", ["nothing", "one trial", "all diverged", "several objectives", "own"])
def test_runs_with_little_to_show_are_drawn_without_a_complaint(kind: str, browser: "Browser", tmp_path: Path) -> None:
    if kind == "several objectives":
        write_run(tmp_path, objective="val_accuracy,train_seconds", sampler="nsga2", scheduler="none")
    elif kind == "own":
        write_own_run(tmp_path, "val_f1", [0.5, 0.75, 0.625])
    elif kind == "all diverged":
        write_run(tmp_path, [make_outcome(number, TrialStatus.DIVERGED, None, 1) for number in (1, 2, 3)])
    else:
        write_run(tmp_path, [make_outcome(1, TrialStatus.COMPLETED, 0.9, 4)] if kind == "one trial" else [])
    visit = Visit(browser, write_report(tmp_path))
    assert visit.page.locator("h2").count() == len(HEADINGS)
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    visit.check()
    visit.page.close()
