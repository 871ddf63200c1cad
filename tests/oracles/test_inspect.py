"""The page of `npgpt2 inspect` as people use it: in a real browser, with mouse and keyboard, and on a narrow screen.

Its figures are compared with the library's for the same prompt. Needs chromium and chromedriver (Debian: the packages
chromium and chromium-driver), which no package of Python's brings along.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from npgpt2 import load
from npgpt2.cli import main
from npgpt2.samplers import Written
from npgpt2.sampling import Sampling
from npgpt2.study.report import make_report

pytest.importorskip("selenium", reason="needs selenium, which drives the browser")
from pages import (
    ActionChains,
    Keys,
    Select,
    WebDriverWait,
    assert_percent,
    contrasts,
    find,
    find_all,
    label,
    set_slider,
)

PROMPT = "Once upon a time there was a king who had three sons,\nand the youngest of them went into the forest — alone."
HOSTILE = """</script><script>window.run = 1</script><img src=x onerror="window.run = 2"><svg onload=window.run=3>"""


@pytest.fixture(scope="module")
def storyteller():
    return load()


@pytest.fixture(scope="module")
def tokens(storyteller):
    return storyteller.tokenizer.encode(PROMPT)


@pytest.fixture(scope="module")
def trace(storyteller, tokens):
    return storyteller.trace(tokens, attention=True, residual=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["inspect", PROMPT, "-o", str(path)]) == 0
    return path


def show(browser, path):
    """Open a page, and wait until it has drawn itself."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # of the page before
    browser.get(path.as_uri())
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return document.body.dataset.ready"))
    return browser


@pytest.fixture
def shown(browser, page):
    return show(browser, page)


def bars(browser):
    """The bars that are left: (label, percentage as text)."""
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#bars li')].map(li => [li.querySelector('.label').textContent,"
        " li.querySelector('.value').textContent, !!li.querySelector('.bar')])"
    )
    assert all((value == "cut off") != has_bar for _, value, has_bar in rows)
    return [(label, value) for label, value, has_bar in rows if has_bar]


def entropy(browser):
    return float(re.match(r"entropy ([\d.]+) bits", find(browser, "#summary").text)[1])


def choose(browser, position):
    """With a click; then the pointer goes to the margin, where nothing comes to lie under it when the page scrolls."""
    actions = ActionChains(browser)
    actions.click(find_all(browser, "#text .token")[position])
    actions.w3c_actions.pointer_action.move_to_location(2, 2)
    actions.perform()


# ---- Loading


def test_it_loads_without_an_error_and_asks_nothing_of_the_network(shown, page):
    assert shown.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked == {page.as_uri()}
    assert find(shown, "#problem").text == ""


def test_the_browser_would_have_noticed_an_error_and_a_request(browser, tmp_path):
    """The two logs do show what the test above looks for."""
    (tmp_path / "bad.html").write_text(
        "<body data-ready=yes><img src='http://127.0.0.1:9/x.png'><script>nothing()</script>"
    )
    show(browser, tmp_path / "bad.html")
    assert any("nothing is not defined" in entry["message"] for entry in browser.get_log("browser"))
    assert any("127.0.0.1:9/x.png" in entry["message"] for entry in browser.get_log("performance"))


def test_a_hostile_prompt_is_shown_and_runs_nothing(browser, tmp_path):
    assert main(["inspect", HOSTILE, "-o", str(tmp_path / "x.html")]) == 0
    show(browser, tmp_path / "x.html")
    assert browser.execute_script("return window.run") is None
    assert browser.execute_script("return document.getElementById('text').textContent") == HOSTILE
    assert find_all(browser, "img, svg, iframe") == []
    assert len(find_all(browser, "script")) == 2
    assert browser.get_log("browser") == []


def test_a_hostile_vocabulary_and_a_hostile_name_are_text_everywhere(browser, model, tmp_path):
    """Where each token is a whole element, which no prompt can make of a usual vocabulary."""

    class Hostile:
        def __contains__(self, token):
            return True

        def decode_bytes(self, tokens):
            return b"".join(b"</script><img/src=x/onerror=window.run=%d>" % token for token in tokens)

    trace = model.trace([1, 2, 3], attention=True, residual=True)
    (tmp_path / "x.html").write_text(make_report(trace, Hostile(), Hostile().decode_bytes([9]).decode()), "utf-8")
    show(browser, tmp_path / "x.html")
    choose(browser, 1)
    assert browser.execute_script("return window.run") is None
    assert find_all(browser, "img") == []
    assert browser.execute_script("return document.body.innerText").count("<img") > 40
    assert browser.get_log("browser") == []


def test_the_policy_stops_a_script_that_got_in_all_the_same(shown):
    """It isn't all that stands between a prompt and the browser, but it does stand."""
    shown.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.run = 4'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.run = 5\">')"
    )
    assert shown.execute_script("return window.run") is None
    assert any("Content Security Policy" in entry["message"] for entry in shown.get_log("browser"))


def test_the_smallest_prompts_have_a_page_too(browser, tmp_path, monkeypatch):
    for prompt in ("a", "", "\N{FAMILY}\u202e\x00\t\r\n"):
        path = tmp_path / "small.html"
        (tmp_path / "prompt.txt").write_text(prompt, "utf-8", newline="")
        assert main(["inspect", "--file", str(tmp_path / "prompt.txt"), "-o", str(path)]) == 0
        show(browser, path)
        assert browser.get_log("browser") == []
        assert len(bars(browser)) == 40


# ---- The text


def test_the_tokens_are_the_text(shown, storyteller, tokens):
    spans = shown.execute_script("return [...document.querySelectorAll('#text .token')].map(span => span.textContent)")
    assert [text.replace("\n", "").replace(" ", "␣") for text in spans] == [label(storyteller, id) for id in tokens]
    assert "".join(spans).replace("↵\n", "\n").replace(r"\xe2\x80\x94", "—") == PROMPT


@pytest.mark.parametrize("way", ["hover", "click", "keyboard"])
def test_pointing_at_a_token_shows_its_figures(shown, storyteller, tokens, trace, way):
    logits = trace.logits.astype(np.float64)
    for position in (1, 7, len(tokens) - 1, 0):
        token = find_all(shown, "#text .token")[position]
        if way == "hover":
            ActionChains(shown).move_to_element(token).perform()
        elif way == "click":
            token.click()
        else:
            find(shown, "#text [tabindex='0']").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * position)
        figures = {dd.get_attribute("data-figure"): dd.text for dd in find_all(shown, "#figures dd")}
        raw = storyteller.tokenizer.decode_bytes([tokens[position]])
        assert figures["id"] == str(tokens[position])
        assert figures["bytes"] == raw.hex(" ")
        assert figures["position"] == str(position)
        if position == 0:
            assert "nothing came before" in figures["probability"]
            continue
        before = logits[position - 1]
        p = np.exp(before[tokens[position]] - before.max()) / np.exp(before - before.max()).sum()
        assert_percent(figures["probability"], p, slack=1e-6)
        assert figures["rank"] == f"{1 + (before > before[tokens[position]]).sum():,} of 4,096"
        assert abs(float(figures["surprisal"].removesuffix(" bits")) + np.log2(p)) < 0.0051


def test_a_pointer_that_leaves_brings_back_the_chosen_token(shown):
    choose(shown, 3)
    ActionChains(shown).move_to_element(find_all(shown, "#text .token")[1]).perform()
    assert find(shown, "[data-figure=position]").text == "1"
    ActionChains(shown).move_to_element(find(shown, "h1")).perform()
    assert find(shown, "[data-figure=position]").text == "3"


# ---- What comes next


SETTINGS = [
    (1, 0, 1),
    (0.5, 0, 1),
    (2.5, 0, 1),
    (1, 5, 1),
    (0.7, 40, 0.9),
    (1.5, 0, 0.5),
    (3, 100, 0.95),
    (1.2, 0, 0.97),
    (1, 0, 1, 0.005),
    (2, 0, 1, 0.1),
    (1, 0, 0.9, 0.02),
    (1, 0, 1, 0, 0.2),
    (1, 0, 1, 0, 0.9),
    (2.5, 0, 1, 0, 0.5),
    (0.5, 0, 1, 0, 0.01),
    (1.3, 60, 0.95, 0.01, 0.8),
    (1, 0, 1, 0, 1, 1.2),
    (0, 0, 1, 0, 1, 1.3),
    (2.5, 0, 1, 0, 1, 2),
    (1, 0, 1, 0, 1, 1, 1),
    (1, 0, 1, 0, 1, 1, 2),
    (1.4, 60, 0.95, 0, 1, 1.5, 1),
    (1, 100, 1, 0, 0.9, 2, 3),
    (0.7, 0, 0.9, 0.01, 1, 1.1, 2),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_bars_and_the_entropy_are_those_of_the_sampler(shown, storyteller, trace, tokens, settings):
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")
    settings = dict(zip(names, settings, strict=False))
    for name, value in settings.items():
        set_slider(shown, name.replace("_", "-"), value)
    for position in (4, len(tokens) - 1):
        choose(shown, position)
        written = Written(tokens[: position + 1], trace.logits.shape[1])
        ids, probabilities = Sampling(**settings).candidates(trace.logits[position], written=written)
        # Of the 40 tokens that have a bar, the likeliest before any cut, those that are left.
        shown_ids = np.argsort(-trace.logits[position], kind="stable")[:40]
        order = np.array([np.flatnonzero(ids == token)[0] for token in shown_ids if token in ids], np.intp)
        found = bars(shown)
        assert [name for name, _ in found] == [label(storyteller, token) for token in ids[order]]
        for (_, value), p in zip(found, probabilities[order], strict=True):
            assert_percent(value, p, slack=2e-4 * p)
        assert abs(entropy(shown) + (probabilities * np.log2(probabilities)).sum()) < 0.004
        count = int(re.search(r"([\d,]+) of 4,096 can come", find(shown, "#summary").text)[1].replace(",", ""))
        assert abs(count - len(ids)) <= (0.01 * len(ids) if len(ids) > 200 else 0)


OFTEN = ("repetition-penalty", "no-repeat-ngram-size")
VALUES = {
    "repetition_penalty": [1.05, 1.2, 2],
    "no_repeat_ngram_size": [1, 2, 3, 5, 10],
    "temperature": [0, 0.3, 0.9, 1.4, 3],
    "top_k": [1, 7, 40, 100],
    "top_p": [0.2, 0.63, 0.95],
    "min_p": [0.01, 0.1],
    "typical_p": [0.15, 0.6, 0.95],
}


def test_random_settings_all_over_a_text_in_circles_give_the_figures_of_the_library(browser, storyteller, tmp_path):
    """By the function that draws the bars, where tokens are banned that stand far down too."""
    prompt = 'The wolf said, "I have been so long, and I have been so long, and I have been so long here, and I'
    assert main(["inspect", prompt, "-o", str(tmp_path / "x.html")]) == 0
    show(browser, tmp_path / "x.html")
    off = browser.execute_script("return OFF")
    tokens = storyteller.tokenizer.encode(prompt)
    logits = storyteller.trace(tokens).logits
    rng = np.random.default_rng(0)
    lifted = 0
    for _ in range(300):
        settings = {name: values[rng.integers(len(values))] for name, values in VALUES.items() if rng.random() < 0.4}
        position = int(rng.integers(len(tokens)))
        pages = off | {name.replace("_", "-"): value for name, value in settings.items()}
        script = "const { p, entropy, tokens } = distribution(...arguments); return [p, entropy, tokens];"
        shown, entropy, count = browser.execute_script(script, position, pages)
        written = Written(tokens[: position + 1], logits.shape[1])
        sampling = Sampling(**{"temperature": 1.0} | settings)
        ids, probabilities = sampling.candidates(logits[position], written=written)
        everything = np.zeros(logits.shape[1])
        everything[ids] = probabilities
        likeliest = np.argsort(-logits[position], kind="stable")
        np.testing.assert_allclose(shown, everything[likeliest[:40]], rtol=2e-3, atol=1e-12, err_msg=str(settings))
        assert abs(entropy + (probabilities * np.log2(probabilities + 1e-300)).sum()) < 0.01
        assert abs(count - len(ids)) <= (0.01 * len(ids) if len(ids) > 200 else 0)
        lifted += everything[likeliest[40:]].sum() > 0.5
    assert lifted > 10  # since what the text has is less likely or banned


def test_a_penalty_and_a_ban_say_what_they_concern(browser, tmp_path):
    assert main(["inspect", "a b a b a", "-o", str(tmp_path / "x.html")]) == 0
    show(browser, tmp_path / "x.html")
    set_slider(browser, "repetition-penalty", 1.2)
    set_slider(browser, "no-repeat-ngram-size", 2)
    different = len({*browser.execute_script("return [...arrays.tokens.values]")})
    said = find(browser, "#summary").text
    assert f"repetition-penalty lowers {different} tokens · no-repeat-ngram-size bans 1 token" in said
    assert [find(browser, f"#{name}-value").text for name in OFTEN] == ["1.20", "2"]
    find(browser, "#reset").click()
    assert [find(browser, f"#{name}-value").text for name in OFTEN] == ["off"] * 2


def test_temperature_0_leaves_one_bar_of_100_percent_and_3_raises_the_entropy(shown):
    usual = entropy(shown)
    set_slider(shown, "temperature", 0)
    assert [value for _, value in bars(shown)] == ["100 %"]
    assert entropy(shown) == 0
    set_slider(shown, "temperature", 3)
    assert len(bars(shown)) == 40
    assert entropy(shown) > usual + 1
    find(shown, "#reset").click()
    assert entropy(shown) == usual


def test_top_k_5_leaves_five_bars_and_says_what_is_cut_off(shown, trace):
    set_slider(shown, "top-k", 5)
    assert len(bars(shown)) == 5
    rest = 1 - np.sort(Sampling(1).candidates(trace.logits[-1])[1])[-5:].sum()
    cut = re.search(r"top-k cuts off 4,091 tokens with ([\d.]+ %)", find(shown, "#summary").text)[1]
    assert_percent(cut, rest, slack=1e-5)


def test_each_cut_says_what_it_takes_of_what_the_one_before_left(shown, trace):
    for name, value in (("top-k", 50), ("top-p", 0.9), ("min-p", 0.05), ("typical-p", 0.5)):
        set_slider(shown, name, value)
    summary = find(shown, "#summary").text
    sizes = [50]
    for settings in ((1, 50, 0.9), (1, 50, 0.9, 0.05), (1, 50, 0.9, 0.05, 0.5)):
        sizes.append(Sampling(*settings).candidates(trace.logits[-1])[0].size)
    cut = dict(re.findall(r"([\w-]+) cuts off ([\d,]+) token", summary))
    assert cut == {
        name: f"{before - after:,}"
        for name, before, after in zip(("top-k", "top-p", "min-p", "typical-p"), [4096, *sizes], sizes, strict=False)
    }
    assert [find(shown, f"#{name}-value").text for name in cut] == ["50", "0.90", "0.050", "0.50"]
    find(shown, "#reset").click()
    assert [find(shown, f"#{name}-value").text for name in cut] == ["off"] * 4


def test_the_sliders_can_be_dragged(shown):
    slider = find(shown, "#temperature")
    ActionChains(shown).drag_and_drop_by_offset(slider, slider.size["width"], 0).perform()
    assert find(shown, "#temperature-value").text == "3.00"


# ---- Attention


def pixels(browser):
    return browser.execute_script(
        "const c = document.getElementById('canvas');"
        "return [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )


def test_choosing_layer_and_head_changes_the_picture_to_that_of_the_trace(shown, trace, tokens):
    seen = set()
    for layer, head in ((0, None), (0, 0), (0, 3), (5, 3), (2, None)):
        Select(find(shown, "#layer")).select_by_visible_text(f"h{layer}")
        Select(find(shown, "#head")).select_by_visible_text("average" if head is None else str(head))
        width, *data = pixels(shown)
        assert width == len(tokens)
        seen.add(tuple(data))
        drawn = (np.reshape(data, (width, width, 4))[:, :, 3] / 255) ** 2
        weights = trace.attention[layer].mean(0) if head is None else trace.attention[layer, head]
        assert np.abs(drawn - weights).max() < 0.009  # rounded twice: for the page, and for the screen
    assert len(seen) == 5


def test_arrow_keys_on_the_grid_read_out_weights(shown, storyteller, trace, tokens):
    Select(find(shown, "#layer")).select_by_visible_text("h3")
    Select(find(shown, "#head")).select_by_visible_text("1")
    choose(shown, 8)
    find(shown, "#grid").send_keys(Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    words = [label(storyteller, tokens[t]) for t in (7, 2)]
    text = find(shown, "#grid-readout").text
    found = re.fullmatch(
        rf"h3, head 1: {re.escape(words[0])} \(7\) gathers (.*) from {re.escape(words[1])} \(2\)", text
    )
    assert_percent(found[1], trace.attention[3, 1, 7, 2], slack=0.004)


def test_what_a_token_gathers_from_is_listed(shown, storyteller, trace, tokens):
    Select(find(shown, "#layer")).select_by_visible_text("h1")
    Select(find(shown, "#head")).select_by_visible_text("2")
    choose(shown, 12)
    weights = trace.attention[1, 2, 12]
    rows = [li.text.split() for li in find_all(shown, "#gathered li")]
    assert len(rows) == 8
    best = np.argmax(weights)
    assert rows[0][0] == label(storyteller, tokens[best])
    assert_percent(f"{rows[0][1]} %", weights[best], slack=0.004)


# ---- The logit lens and the shapes


def test_the_lens_says_what_each_layer_would(shown, storyteller, trace, tokens):
    said = [trace.lens(layer).argmax(-1) for layer in range(6)]
    rows = shown.execute_script(
        "return [...document.querySelectorAll('.lens tbody tr')].map(tr => [...tr.cells].map(c => c.textContent))"
    )
    words = [[label(storyteller, token) for token in layer] for layer in (tokens, *said)]
    assert rows == [list(row) for row in zip(*words, strict=True)]
    choose(shown, 5)
    find(shown, "#lens").send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    logits = trace.lens(4)[6].astype(np.float64)
    p = 1 / np.exp(logits - logits.max()).sum()
    assert_percent(re.search(r"with (.*)$", find(shown, "#lens-readout").text)[1], p, slack=1e-5)


def test_a_step_leads_to_the_source_of_its_kernel(shown, tokens):
    source = find(shown, "#kernel-gelu pre")
    assert not source.is_displayed()
    find(shown, "a[href='#kernel-gelu']").click()
    assert source.is_displayed()
    assert "np.tanh" in source.text
    assert f"({len(tokens)}, 1024) → ({len(tokens)}, 1024)" in find(shown, "#steps").text


# ---- Screens


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_screen(shown, screen, width):
    screen(width, "light")
    assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    for token in find_all(shown, "#text .token")[::5]:
        assert token.rect["x"] + token.rect["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_is_printed_on(shown, screen, scheme):
    """The contrast that WCAG 2 asks of text, also where it is coloured the most."""
    screen(1280, scheme)
    shown.execute_script(
        "document.querySelector('#text .token').style.setProperty('--heat', 1);"
        "document.querySelector('#seen .token').style.setProperty('--heat', 1);"
        "document.querySelector('.lens td').style.setProperty('--heat', 1)"
    )
    for css in ("#text .token", "#seen .token", ".lens td", ".dim", ".hint", ".bars .value", "a"):
        contrast = contrasts(shown, css, panel="section")
        assert contrast
        assert min(contrast) >= 4.5, (css, min(contrast))


def test_dark_screens_get_a_dark_page(shown, screen):
    colours = []
    for scheme in ("light", "dark"):
        screen(1280, scheme)
        colours.append(shown.execute_script("return getComputedStyle(document.body).backgroundColor"))
    light, dark = ([int(part) for part in re.findall(r"\d+", colour)] for colour in colours)
    assert min(light) > 200
    assert max(dark) < 60
