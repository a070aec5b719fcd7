"""The static page, opened in a real browser."""

import json
import re

import pytest

from sosp_hub.errors import HubError
from sosp_hub.report.page import write_page, write_study
from tests.browser import ACCESS, needs_browser, open_in_browser
from tests.report import reports

pytestmark = pytest.mark.slow

# the page's own policy forbids scripts; the copy that is tested may run this one
_PROBE = """<script>
window.onload = () => {
  const broken = [...document.images].filter(image => !image.complete || image.naturalWidth < 50);
  const wide = document.documentElement.scrollWidth > window.innerWidth;
  const asked = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"));
  document.title = JSON.stringify({
    images: document.images.length, broken: broken.length, wide: wide, asked: asked.length,
    rows: document.querySelectorAll("tbody tr").length,
    tiles: document.querySelectorAll(".numbers li").length,
    tileRows: new Set([...document.querySelectorAll(".numbers li")].map(
      tile => Math.round(tile.getBoundingClientRect().top))).size,
    cutOff: [...document.querySelectorAll(".numbers li")].some(
      tile => tile.scrollWidth > tile.clientWidth + 1)
  });
};
</script>"""


@pytest.fixture
def run(tmp_path):
    return reports.write(tmp_path / "digits-small", *reports.image_report())


@needs_browser
@pytest.mark.parametrize("make", [reports.image_report, reports.text_report])
def test_the_page_renders_without_a_console_error(tmp_path, make):
    page = write_page(reports.write(tmp_path / "net", *make()))
    seen, console = open_in_browser(page, tmp_path, script=_PROBE)
    assert console == []
    assert seen["images"] == 3
    assert seen["broken"] == 0
    assert seen["asked"] == 0
    assert seen["rows"] >= 4


@needs_browser
def test_the_page_fits_a_phone(tmp_path, run):
    seen, _ = open_in_browser(write_page(run), tmp_path, width=500, script=_PROBE)
    assert not seen["wide"]


@needs_browser
def test_five_numbers_stand_in_one_row_on_a_desk_and_are_whole_on_a_phone(tmp_path, run):
    report = json.loads((run / "sosp_report.json").read_text())
    report["peak_memory"] = {when: {"bytes": 3e8, "batch": 8} for when in ("before", "after")}
    (run / "sosp_report.json").write_text(json.dumps(report))
    page = write_page(run)
    for width, rows in ((1200, 1), (500, 5)):
        seen, _ = open_in_browser(page, tmp_path, width, script=_PROBE)
        assert seen["tiles"] == 5
        assert seen["tileRows"] <= rows, seen
        assert not seen["wide"]
        assert not seen["cutOff"]


@needs_browser
def test_a_study_compares_runs(tmp_path):
    runs = []
    for name, macs in (("magnitude", 0.3), ("sosp_h", 0.5)):
        report, saliency = reports.image_report()
        report["criterion"]["name"] = name
        report["cost"]["after"]["macs"] = int(macs * report["cost"]["before"]["macs"])
        runs.append(reports.write(tmp_path / name, report, saliency))
    page = write_study(runs, tmp_path / "study.html")
    seen, console = open_in_browser(page, tmp_path, script=_PROBE)
    assert console == []
    assert (seen["images"], seen["broken"], seen["rows"]) == (1, 0, 2)


def study_of_two(tmp_path):
    runs = [reports.write(tmp_path / name, *reports.image_report()) for name in ("one", "two")]
    return write_study(runs, tmp_path / "study.html")


PAGES = {
    "image": lambda path: write_page(reports.write(path / "net", *reports.image_report())),
    "text": lambda path: write_page(reports.write(path / "net", *reports.text_report())),
    "study": study_of_two,
}


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_a_page_can_be_read_by_everybody(tmp_path, make, dark):
    page = make(tmp_path)
    faults, _ = open_in_browser(page, tmp_path, script=ACCESS, dark=dark)
    assert faults == []
    assert not re.search(r"<th\b[^>]*></th>", page.read_text())


@needs_browser
@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_bad_contrast_and_a_picture_without_words_are_seen(tmp_path, run, scheme, dark):
    page = write_page(run)
    style = f"@media (prefers-color-scheme: {scheme}) {{ .small {{ color: #808080; }} }}"
    bad = f'<style>{style}</style><img src="data:image/png;base64,AAAA"></main>'
    page.write_text(page.read_text().replace("</main>", bad))
    faults, _ = open_in_browser(page, tmp_path, script=ACCESS, dark=dark)
    assert {fault[0] for fault in faults} == {"color-contrast", "image-alt"}


@needs_browser
def test_the_probe_sees_what_is_wrong(tmp_path, run):
    page = write_page(run)
    text = page.read_text().replace(
        "</main>",
        '<img src="data:image/png;base64,AAAA"><img src="https://example.org/x.png"></main>',
    )
    page.write_text(text)
    seen, console = open_in_browser(page, tmp_path, script=_PROBE)
    assert seen["broken"] == 2
    assert any("Content Security Policy" in line for line in console)


def test_the_page_needs_no_network_and_runs_no_script(run):
    text = write_page(run).read_text()
    assert "<script" not in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "default-src 'none'" in text


def test_words_of_a_report_are_not_read_as_markup(run):
    report = json.loads((run / "sosp_report.json").read_text())
    report["command"] = "<script>alert(1)</script> hf_abcdefghijkl1"
    (run / "sosp_report.json").write_text(json.dumps(report))
    text = write_page(run).read_text()
    assert "<script" not in text
    assert "hf_abc" not in text


def test_a_folder_without_a_report(tmp_path):
    with pytest.raises(HubError, match=r"no sosp_report.json"):
        write_page(tmp_path)


def test_runs_that_share_no_metric(tmp_path, run):
    other = reports.write(tmp_path / "other", *reports.text_report(2))
    with pytest.raises(HubError, match="share no metric"):
        write_study([run, other], tmp_path / "study.html")
