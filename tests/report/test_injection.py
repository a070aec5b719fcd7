"""Reports that were written to do harm: their words are shown, and never obeyed."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from sosp_hub.errors import HubError
from sosp_hub.report import page as page_room
from sosp_hub.report.card import _calibration, _recovery, render_card
from sosp_hub.report.facts import collect
from sosp_hub.report.figures import draw_recovery
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import new_console, show_files
from sosp_hub.report.markers import BEGIN, END, readdress
from sosp_hub.report.markup import Markdown, block, code, escaped
from sosp_hub.report.page import render_page, write_page
from sosp_hub.report.study import write_comparison
from sosp_hub.report.terminal import Report, show_result
from tests.hub.conftest import make_folder
from tests.report import reports
from tests.report.test_compared import results

HARM = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</details><b>",
    "<!-- a remark",
    "--><b>",
    END,
    "[click](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "](javascript:alert(1))",
    "[x]: https://example.org",
    "<https://example.org>",
    "<javascript:alert(1)>",
    "```",
    "````\n<script>",
    "`a` | b | c",
    "a\n\n# A heading\n\n- a list",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "---",
    "===",
    "    indented",
    "**bold** _emphasis_ __x__ ~~gone~~",
    "$x$ $$y$$",
    "&lt;b&gt; &#60;b&#62;",
    "\\",
    "\\<b>",
    "\\`x`",
    "{{ 7 * 7 }} {% raw %}",
    "[bold red]x[/bold red] [/nothing] [link=https://example.org]x[/link] :smile:",
    "\x1b[2J\x1b]0;owned\x07\x9b2J",
    "\u202ereversed\u2066",
    "a\x00b\rc",
    "snake_case_name",
    "x" * 3000,
    "",
)
_MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
_OWN_TAGS = {"<details>", "</details>", "<summary>", "</summary>"}


def tokens_of(text):
    found = []
    for token in _MARKDOWN.parse(text):
        found += [token, *(token.children or ())]
    return found


def plain(token):
    """The words of a line as a reader sees them."""
    kinds = ("text", "code_inline", "text_special")
    return "".join(child.content for child in token.children or () if child.type in kinds)


def check_card(text):
    """Nothing in it but what the template itself writes."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    for token in tokens_of(body):
        if token.type in ("html_block", "html_inline"):
            rest = re.sub(r"<!-- sosp_hub: [^<>]*-->", "", token.content)
            assert set(re.findall(r"<[^>]*>", rest)) <= _OWN_TAGS, token.content
        if token.type == "link_open":
            assert token.attrs["href"].startswith(
                ("https://huggingface.co/", "https://arxiv.org/", "sosp_report.json")
            ), token.attrs
        if token.type == "image":
            assert token.attrs["src"].startswith("figures/")
        assert token.type not in ("blockquote_open", "hr", "code_block", "ordered_list_open") or (
            token.type == "blockquote_open" and token.level == 0
        ), token
    headings = [t.content for t in tokens_of(body) if t.type == "inline" and t.level == 1]
    assert body.count(BEGIN) == body.count(END) == 1
    odd = [c for c in body if not (c.isprintable() or c == "\n")]
    assert not odd, odd
    return headings


def hostile(report, harm):
    """A report with the words in every place that a card shows."""
    report = copy.deepcopy(report)
    for stage in report["metrics"].values():
        if stage:
            stage[f"accuracy/{harm}"] = {
                "value": 0.9 if stage is report["metrics"]["dense"] else 0.1,
                "n": 36,
                "stderr": 0.05,
            }
            stage[f"top {harm}".replace("/", "|")] = {"value": 0.5, "n": 36, "stderr": 0.05}
    for group in report["groups"][:3]:
        group["name"] = f"{harm}{group['name']}"
    report["groups"][0]["kind"] = harm or "channel"
    report["plan"]["provenance"]["floors"] = [harm]
    report["criterion"] = {"name": harm, "options": {harm: harm, "list": [harm]}}
    report["calibration"] = {"data": harm, "num_samples": 10, "seed": 0}
    report["versions"] = {harm: harm}
    report["command"] = harm
    report["base"] = {"model": harm, "architecture": harm, "revision": harm}
    for when in ("before", "after"):
        report["latency"][when]["hardware"] = harm
        report["latency"][when]["dtype"] = harm
    return {
        **report,
        "recipe": f"model: {{id: {json.dumps(harm)}}}\ndata: {{id: {json.dumps(harm)}}}\n# {harm}",
    }


@pytest.mark.parametrize("harm", HARM)
def test_a_card_shows_words_and_obeys_none(tmp_path, harm):
    folder = make_folder(tmp_path / "net", card=False)
    report, saliency = reports.image_report()
    reports.write(folder, hostile(report, harm), saliency)
    text = render_card(folder, run=False, figures=False).read_text()
    check_card(text)
    again = render_card(folder, run=False, figures=False).read_text()
    assert again == text
    assert readdress(text, "me/other").count("me/other") >= 2


def test_the_check_sees_what_is_wrong():
    for text in ("<b>x</b>", "[a](https://b)", "![a](https://b)", "- > a", "    a", "***"):
        with pytest.raises(AssertionError):
            check_card(f"---\na: 1\n---\n{BEGIN}\n\n{text}\n\n{END}")
    check_card(f"---\na: 1\n---\n{BEGIN}\n\nfine\n\n{END}")


@pytest.mark.parametrize("harm", HARM)
def test_words_read_in_markdown_as_they_were_written(harm):
    shown = escaped(harm, "markdown")
    inline = [t for t in _MARKDOWN.parse(f"x {shown} y") if t.type == "inline"]
    words = " ".join(escaped(harm, "terminal").split())
    assert len(inline) == 1
    assert " ".join(plain(inline[0]).split()) == f"x {words} y".replace("  ", " ")
    cell = Grid("", ("a", "b"), ((harm, "1"),)).markdown()
    table = [t for t in _MARKDOWN.parse(cell) if t.type == "inline"]
    assert len(table) == 4
    assert " ".join(plain(table[2]).split()) == words


@pytest.mark.parametrize("harm", [harm for harm in HARM if harm.strip()])
def test_code_reads_as_it_was_written(harm):
    (inline,) = [t for t in _MARKDOWN.parse(f"x {code(harm)} y") if t.type == "inline"]
    words = " ".join(escaped(harm, "terminal").split())
    assert " ".join(plain(inline).split()) == f"x {words} y"
    fenced = [t for t in _MARKDOWN.parse(block(harm, "text")) if t.type == "fence"]
    assert [t.content for t in fenced] == [escaped(harm, "terminal") + "\n"]


def test_markdown_that_is_ours_is_not_escaped_twice():
    assert Grid("", ("a",), ((Markdown("[x](y)"),),)).markdown().endswith("| [x](y) |")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, tuple(name for name, _ in attrs)))


def tags_of(text):
    parser = Tags()
    parser.feed(text)
    return parser.seen


IN_PAGES = tuple(h for h in HARM if h and any(c in h for c in "<>&\x1b\u202e\x00{"))


@pytest.fixture(scope="module")
def tags_of_a_page(tmp_path_factory):
    """Pictures are data in an address, in which nothing is a tag: they are not drawn here."""
    report, _ = reports.image_report()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_room, "pictures", lambda *_: [])
        yield tags_of(_page(tmp_path_factory.mktemp("page"), report, "word"))


def _page(folder, report, harm):
    return write_page(reports.write(folder, hostile(report, harm), {})).read_text()


@pytest.mark.parametrize("harm", IN_PAGES)
def test_a_page_shows_words_and_obeys_none(tmp_path, harm, tags_of_a_page):
    report, _ = reports.image_report()
    text = _page(tmp_path / "net", report, harm)
    assert tags_of(text) == tags_of_a_page
    assert not [c for c in text if not (c.isprintable() or c == "\n")]


@pytest.mark.parametrize("harm", HARM)
def test_a_terminal_shows_words_and_obeys_none(tmp_path, capsys, harm):
    report, _ = reports.image_report()
    (tmp_path / "out").mkdir()
    show_result(hostile(report, harm), tmp_path / "out")
    shown = capsys.readouterr().out
    assert not [c for c in shown if not (c.isprintable() or c == "\n")]
    if len(harm) < 40 and "\n" not in harm and harm:
        assert escaped(harm, "terminal").split()[0] in shown


@pytest.mark.parametrize("harm", HARM)
def test_a_notebook_shows_words_and_obeys_none(harm):
    report, _ = reports.image_report()
    page = Report(hostile(report, harm))._repr_html_()
    usual = Report(report)._repr_html_()
    assert usual.count("<table>") == 3  # cost, quality, classes
    assert set(tags_of(page)) <= set(tags_of(usual))
    assert not [c for c in page if not (c.isprintable() or c == "\n")]


def test_names_of_files_do_not_move_the_cursor(tmp_path, capsys):
    (tmp_path / "a\x1b[2J.safetensors").write_bytes(b"x")
    (tmp_path / "[bold]x").write_bytes(b"x")
    show_files(new_console(), tmp_path)
    shown = capsys.readouterr().out
    assert "a\\x1b[2J.safetensors" in shown
    assert "[bold]x" in shown


@pytest.mark.parametrize("harm", [*HARM[:3], *HARM[6:8], "`a` | b | c", "a\n\n# A heading"])
def test_a_study_shows_words_and_obeys_none(tmp_path, harm):
    found = results({harm: [0.5, 0.7], "b": [0.6, 0.8]})
    write_comparison({**found, "model": harm, "command": harm, "recipe": harm}, tmp_path)
    body = (tmp_path / "table.md").read_text()
    for token in tokens_of(body):
        assert token.type not in ("html_block", "html_inline", "link_open"), token.content
        assert token.type != "image" or token.attrs["src"].endswith(".png")
    assert "<script" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_pictures_take_any_name(tmp_path):
    """All names in one report, which draws each picture once; metrics by three, as are shown."""
    names = ("$\\frac$", "a$b$c", "x" * 500, "漢字", "\x1b[2J", "a\nb")
    report, saliency = reports.image_report()
    for name, group in zip(names, report["groups"], strict=False):
        saliency[name] = saliency.pop(group["name"])
        report["plan"]["kept"][name] = report["plan"]["kept"].pop(group["name"])
        group |= {"name": name, "kind": name}
    folder = make_folder(tmp_path / "net", card=False)
    reports.write(folder, report, saliency)
    render_card(folder, run=False)
    odd = {"value": 0.5, "n": 10, "stderr": 0.1}
    for three in (names[:3], names[3:]):
        figure = draw_recovery({stage: dict.fromkeys(three, odd) for stage in ("dense", "final")})
        figure.savefig(tmp_path / "metrics.svg")


def test_lines_that_are_run_take_no_code_from_a_config(tmp_path):
    """A card's load snippet is run: a size that is text must not become a line of it."""
    mark = tmp_path / "owned"
    evil = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    folder = make_folder(tmp_path / "net", card=False)
    for config in (
        {"architecture": "cifar_resnet20", "pretrained_cfg": {"input_size": [evil, 8, 8]}},
        {"architecture": "cifar_resnet20", "image_size": 8, "num_channels": evil},
        {"architectures": ["X"], "model_type": "x", "image_size": 8, "num_channels": evil},
        {"architecture": "cifar_resnet20", "pretrained_cfg": evil, "model_args": evil},
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(HubError):
            render_card(folder, figures=False)
        assert not mark.exists(), config


def test_lines_that_are_run_take_no_code_from_a_folder_name(tmp_path):
    mark = tmp_path / "owned"
    name = 'x"); __import__("os").mkdir("owned"); ("'
    folder = make_folder(tmp_path / name, card=False)
    with pytest.raises(HubError, match="does not run"):
        render_card(folder, figures=False)
    text = render_card(folder, figures=False, run=False).read_text()
    check_card(text)
    assert not mark.exists()


FRONT = {
    "a tag of Python": "!!python/object/apply:os.system [ls]",
    "a NUL": "license: \x00",
    "a list": "- a\n- b",
    "deep": "a: " + "[" * 5000,
    "a number as base": "base_model: 5",
    "a list as name": "model_name: [1]",
    "an index that is none": "model-index: 5",
    "an index of nothing": "model-index: [{name: x}]",
    "results of nothing": "model-index: [{name: x, results: [{}]}]",
    "results that are text": "model-index: [{name: x, results: y}]",
    "a key that is a number": "5: x",
    "tags that are a number": "tags: 5",
    "tags that are a map": "tags: {a: b}",
    "metrics that are a number": "metrics: 5",
    "a key of the class": "self: 5",
    "another key of the class": "ignore_metadata_errors: 5",
    "a licence that is a map": "license: {a: b}",
    "unbalanced": "a: [",
    "huge": "a: " + "9" * 100_000,
}


def few_words(error, *words):
    assert len(str(error)) < 3000
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("name", FRONT)
def test_odd_metadata_of_a_present_card_are_kept_or_refused(tmp_path, name):
    folder = make_folder(tmp_path / "net", card=False)
    before = f"---\n{FRONT[name]}\n---\n# My words\n"
    (folder / "README.md").write_text(before)
    try:
        text = render_card(folder, run=False, figures=False).read_text()
    except HubError as error:
        few_words(error, "metadata")
        unchanged = (folder / "README.md").read_text()
        assert unchanged == before
    else:
        assert "# My words" in text


@pytest.mark.parametrize("name", FRONT)
def test_odd_metadata_are_not_pushed_without_a_word(tmp_path, name):
    from sosp_hub.hub.contents import check_card as check_before_push

    folder = make_folder(tmp_path / "net", card=False)
    (folder / "README.md").write_text(f"---\n{FRONT[name]}\n---\n# My words\n")
    try:
        check_before_push(folder)
    except HubError as error:
        few_words(error)


MISSING = object()
ODD = (
    *(None, 5, -1, 1.5, True, "x", "\x1b[2J", [], [[]], [None], ["x"], {}, {"x": {}}),
    *(float("nan"), MISSING),
)


def places(record, above=()):
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        yield (*above, key)
        if isinstance(value, dict | list) and value:
            yield from places(value if isinstance(value, dict) else value[:1], (*above, key))


def few_entries():
    report, _ = reports.image_report()
    report["metrics"] = {
        stage: dict(list(found.items())[:3]) for stage, found in report["metrics"].items()
    }
    report["plan"]["kept"] = dict(list(report["plan"]["kept"].items())[:1])
    return report


@pytest.mark.slow
@pytest.mark.parametrize("make", [few_entries, reports.whole_report])
def test_any_odd_value_in_a_report_is_refused_or_told(make):
    """Each value of a report in turn is replaced, or left out: a typed error or all its words."""
    report, tried = make(), 0
    for path in places(report):
        for odd in ODD:
            changed = copy.deepcopy(report)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if odd is MISSING:
                del inner[path[-1]]
            else:
                inner[path[-1]] = odd
            try:
                facts = collect(changed)
            except HubError as error:
                few_words(error)
                continue
            tried += 1
            _recovery(changed)
            _calibration(changed.get("calibration") or {})
            grids = [facts.costs, facts.metrics, facts.drops, facts.curve, facts.rounds]
            if make is few_entries:
                render_page(
                    title="x", headline=facts.headline, tiles=(), tables=grids, drawn=(), parts=()
                )
            for grid in grids:
                grid.markdown()
    assert tried > 100
