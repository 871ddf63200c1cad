"""A notebook, executed as Jupyter does it, and what it shows of a trace in a real browser, as in test_inspect.py."""

import pytest
from test_inspect import Select, WebDriverWait, assert_percent, bars, find, find_all, label, set_slider

from npgpt2 import load
from npgpt2.sampling import Sampling

nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which executes notebooks")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat, which makes notebooks")
pytest.importorskip("ipykernel", reason="needs ipykernel, in which notebooks run")

TEXTS = ["Once upon a time there was a king who had three sons", "The wolf looked at the girl, and said </iframe><i>"]
CELLS = [
    "import npgpt2\nmodel = npgpt2.load()\nmodel",
    *(
        f"tokens = model.tokenizer.encode({text!r})\nmodel.trace(tokens, attention=True, residual=True)"
        for text in TEXTS
    ),
    "model.trace(tokens)",
    "pieces = model.stream('Once upon a time', length=3)\nprint(*pieces)\npieces.request",
]
# A page around the frames that would change them if it could, and in which they would leave what they have.
AROUND = """<!doctype html><meta charset="utf-8"><title>a notebook</title>
<style>* {{ color: rgb(1, 2, 3) !important }} .token, .bars li {{ display: none }} h1 {{ position: fixed }}</style>
<script>var data = "of the notebook", state = data, choose = data;</script>
<body style="max-width: 900px; margin: auto"><h1 id="about">A notebook</h1><p class="token">hidden</p>
<main style="overflow: auto">{}</main></body>"""


@pytest.fixture(scope="module")
def storyteller():
    return load()


@pytest.fixture(scope="module")
def outputs():
    """What each cell of the notebook ends with: its data by their types."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbclient.NotebookClient(notebook, timeout=300, startup_timeout=300).execute()
    nbformat.validate(notebook)
    results = [[one for one in cell.outputs if one.output_type == "execute_result"] for cell in notebook.cells]
    assert [len(result) for result in results] == [1] * len(CELLS)
    return [result[0].data for result in results]


def test_cells_show_lines_and_of_a_whole_trace_its_page(outputs, storyteller):
    model, first, second, plain, request = outputs
    assert model == {"text/plain": repr(storyteller)}
    assert request == {"text/plain": "<Request of 5 tokens: 3 more, ', when he', length>"}
    tokens = storyteller.tokenizer.encode(TEXTS[1])
    assert set(first) == set(second) == set(plain) == {"text/plain", "text/html"}
    whole = storyteller.trace(tokens, attention=True, residual=True)
    assert (second["text/plain"], second["text/html"]) == (repr(whole), whole._repr_html_())
    assert "residual=True" in plain["text/html"]
    assert "iframe" not in plain["text/html"]


@pytest.fixture(scope="module")
def page(outputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("notebook") / "notebook.html"
    path.write_text(AROUND.format("".join(data["text/html"] for data in outputs if "text/html" in data)), "utf-8")
    return path


@pytest.fixture
def frames(browser, page):
    """The frames of the page, in which the views have drawn themselves."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    frames = find_all(browser, "iframe")
    assert len(frames) == len(TEXTS)
    for frame in frames:
        browser.switch_to.frame(frame)
        WebDriverWait(browser, 120).until(lambda b: b.execute_script("return document.body.dataset.ready"))
        browser.switch_to.default_content()
    return frames


def test_the_views_draw_in_their_frames_with_the_librarys_figures(browser, frames, storyteller):
    for frame, text in zip(frames, TEXTS, strict=True):
        browser.switch_to.frame(frame)
        tokens = storyteller.tokenizer.encode(text)
        assert browser.execute_script("return document.getElementById('text').textContent") == text
        assert find(browser, "#about").text.startswith(f"storyteller · {len(tokens)} tokens")
        ids, probabilities = Sampling(temperature=1).candidates(storyteller.logits(tokens)[-1])
        shown = bars(browser)
        assert len(shown) == 40
        for (name, share), place in zip(shown, (-probabilities).argsort(kind="stable"), strict=False):
            assert name == label(storyteller, ids[place])
            assert_percent(share, probabilities[place], slack=1e-4)
        attention = storyteller.trace(tokens, attention=True).attention
        Select(find(browser, "#layer")).select_by_index(2)
        Select(find(browser, "#head")).select_by_visible_text("1")
        strongest = attention[2, 1, -1].argmax()
        assert find(browser, "#gathered .label").text.startswith(label(storyteller, tokens[strongest]))
        assert browser.execute_script(
            "const { width, height } = canvas; return new Set(canvas.getContext('2d')"
            ".getImageData(0, 0, width, height).data).size > 10"
        )
        assert len(find_all(browser, "#lens tbody tr")) == len(tokens)
        browser.switch_to.default_content()
    assert browser.get_log("browser") == []


def test_nothing_gets_into_a_frame_or_out_of_it(browser, frames):
    assert browser.execute_script("return [data, state, choose]") == ["of the notebook"] * 3
    assert browser.execute_script("return document.styleSheets.length") == 1
    assert find(browser, "#about").text == "A notebook"
    assert find_all(browser, "i") == []
    sizes = "const { scrollWidth, scrollHeight } = document.querySelector('main'); return [scrollWidth, scrollHeight]"
    room = "const { clientWidth, clientHeight } = document.querySelector('main'); return [clientWidth, clientHeight]"
    assert browser.execute_script(sizes) == browser.execute_script(room), "it fits its cell, which needs no scroll bars"
    assert browser.execute_script("return document.activeElement.tagName") == "BODY"
    assert browser.execute_script("return document.querySelector('iframe').contentDocument") is None
    browser.switch_to.frame(frames[0])
    reach = "try { return String(parent.document) } catch (error) { return error.name }"
    assert browser.execute_script(reach) == "SecurityError"
    assert browser.execute_script("return origin") == "null"
    token = find(browser, "#text .token")
    assert token.is_displayed()
    assert token.value_of_css_property("color") != "rgba(1, 2, 3, 1)"
    browser.switch_to.default_content()


def test_two_frames_do_not_disturb_each_other(browser, frames):
    def seen(frame):
        browser.switch_to.frame(frame)
        shown = [find(browser, f"#{name}").get_property("textContent") for name in ("figures", "summary")]
        browser.switch_to.default_content()
        return shown

    before = [seen(frame) for frame in frames]
    browser.switch_to.frame(frames[1])
    find_all(browser, "#text .token")[3].click()
    set_slider(browser, "top-k", 5)
    browser.switch_to.default_content()
    after = [seen(frame) for frame in frames]
    assert after[0] == before[0]
    assert after[1][0] != before[1][0]
    assert "5 of 4,096" in after[1][1]


def test_a_steps_link_leads_to_its_source_within_the_frame(browser, frames):
    browser.switch_to.frame(frames[0])
    find(browser, "a[href='#kernel-gelu']").click()
    WebDriverWait(browser, 30).until(lambda b: find(b, "#kernel-gelu pre").is_displayed())
    assert browser.execute_script("return [location.href, document.title]") == ["about:srcdoc", "npgpt2 inspect"]
    top = "return document.getElementById('kernel-gelu').getBoundingClientRect().top < innerHeight"
    assert browser.execute_script(top)
    browser.switch_to.default_content()
