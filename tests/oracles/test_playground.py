"""The page of `npgpt2 serve` as people use it: in a real browser, with mouse, finger and keyboard.

Each test begins with an empty page, and ends with a look at the browser's console, which has to be empty. What the page
shows is compared with what the library gives for the same text, settings and seed.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from asking import serving

import npgpt2
from npgpt2.engine import end_tokens
from npgpt2.samplers import Written
from npgpt2.sampling import Sampling, log_softmax

pytest.importorskip("selenium", reason="needs selenium, which drives the browser")
pytest.importorskip("waitress", reason="needs waitress, which serves the page")
from pages import ActionChains, Keys, Select, assert_percent, contrasts, label
from playground import Page

PROMPT = "There was once a King who had a daughter"
HOSTILE = (
    '</textarea><script>window.run = 1</script><img src=x onerror="window.run = 2">'
    "'; touch hacked; echo '$(touch hacked)"
)
# What no shell, no terminal and no literal may take for its own.
AWKWARD = 'It\'s "100%" `touch hacked` $HOME !! \\n \\ ünï 中 \U0001f600\n\tand \x1b[31m\u202e\u200b then'


@pytest.fixture(scope="module")
def port():
    with serving() as served:
        yield served.port


@pytest.fixture(scope="module")
def storyteller():
    return npgpt2.load()


ALLOWED = []


@pytest.fixture
def expected():
    """What a test expects on the console: patterns, of which each line has to match one."""
    ALLOWED.clear()
    yield ALLOWED
    ALLOWED.clear()


@pytest.fixture
def page(browser, port, expected):
    opened = Page(browser, port).open()
    opened.ready()
    yield opened
    lines = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in lines if not any(re.search(pattern, line) for pattern in expected)] == []


def assert_alike(shown, expected):
    """Texts that were written side by side, whose arithmetic is rounded a little otherwise: where a draw falls within a
    hair of the border between two tokens, one goes another way.
    """
    differing = [pair for pair in zip(shown, expected, strict=True) if pair[0] != pair[1]]
    assert len(differing) <= len(expected) // 4, differing


def generate(model, prompt, length=12, temperature=0.7, seed=7, **settings):
    settings = {"length": length, "temperature": temperature, "seed": seed} | settings
    return model.generate(prompt, allow_special=True, **settings)


# ---- Loading


def test_it_loads_without_an_error_and_asks_nobody_else(page, browser):
    page.type(PROMPT)
    page.write()
    page.known()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 15
    assert [url for url in asked if not url.startswith(f"{page.address}/")] == []


def test_everything_that_can_be_used_has_a_name(page):
    page.click("#others > summary")
    unnamed = [
        element.get_attribute("outerHTML")
        for element in page.all("button, input:not([type=file]), select, textarea, [role=tree], [role=toolbar]")
        if element.is_displayed() and not element.accessible_name
    ]
    assert unnamed == []


def test_a_hostile_text_runs_nothing(page):
    page.type(HOSTILE)
    page.write()
    page.known()
    page.press(Keys.ALT, "m")
    page.press("<img src=x onerror='window.run=3'>")
    page.press(Keys.ENTER)
    page.press(Keys.ALT, "g")
    page.press(Keys.ALT, "k")
    page.until("return document.getElementById('copy-dialog').open")
    assert page.run("return window.run") is None
    assert page.all("img") == []
    assert page.text.startswith(HOSTILE)


# ---- Writing


@pytest.mark.parametrize("way", ["button", "keys"])
def test_what_is_written_is_what_the_library_writes_with_the_seed_that_is_shown(page, storyteller, way):
    page.type(PROMPT)
    if way == "button":
        page.click("#write")
    else:
        page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text != PROMPT)
    page.written()
    seed = int(page.find("#seed").get_attribute("value"))
    first = generate(storyteller, PROMPT, seed=seed)
    assert page.text == PROMPT + first
    assert page.find("#fixed").is_selected() is False
    page.click("#fixed")
    page.press(Keys.ALT, "e")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text != PROMPT + first)
    page.written()
    assert page.text == PROMPT + first + generate(storyteller, PROMPT + first, seed=seed)
    assert f"seed {seed}" in page.find("[data-figure=with]").text


def test_pressing_twice_writes_once(page):
    page.type(PROMPT)
    page.run("document.getElementById('write').click(); document.getElementById('write').click();")
    page.until(lambda: len(page.tree()) == 3)
    page.written()
    page.known()
    assert len(page.tree()) == 3


def test_without_the_tick_each_text_has_a_seed_of_its_own(page):
    seeds = set()
    for _ in range(3):
        page.click("#new")
        count = len(page.tree())
        page.click("#write")
        page.until(lambda count=count: len(page.tree()) > count)
        page.written()
        seeds.add(page.find("#seed").get_attribute("value"))
    assert len(seeds) == 3


def test_from_nothing_it_begins_a_text(page, storyteller):
    assert page.write(3) == generate(storyteller, "<|endoftext|>", seed=3)


def test_figures_say_how_much_is_used_and_how_fast_it_went(page, storyteller):
    page.type(PROMPT)
    text = PROMPT + page.write()
    page.known()
    used = len(storyteller.tokenizer.encode(PROMPT)) + 12
    assert page.find("[data-figure=used]").text == f"{used} of 512 tokens"
    assert re.fullmatch(r"[\d,]+ tokens/s", page.find("[data-figure=speed]").text)
    assert re.fullmatch(r"first token after \d+ ms", page.find("[data-figure=wait]").text)
    assert page.text == text


@pytest.mark.parametrize("way", ["button", "keys"])
def test_it_stops_at_once_and_keeps_what_there_is(page, storyteller, way):
    page.slide("max_tokens", 400)
    page.seed(7)
    page.press(Keys.ALT, "e")
    page.type(PROMPT)
    page.click("#write")
    page.until(lambda: len(page.text) > len(PROMPT) + 20)
    if way == "button":
        page.click("#stop")
    else:
        page.press(Keys.ESCAPE)
    page.written()
    text = page.text
    whole = generate(storyteller, PROMPT, length=400)
    assert whole.startswith(text[len(PROMPT) :])
    assert len(text) < len(PROMPT + whole)
    assert "stopped" in [node.get("finish") for node in page.until(page.saved).values()]


def test_what_is_typed_while_the_model_writes_is_not_lost(page, storyteller):
    page.slide("max_tokens", 60)
    page.seed(7)
    page.press(Keys.ALT, "e")
    page.type(PROMPT)
    page.click("#write")
    page.until(lambda: len(page.text) > len(PROMPT) + 10)
    page.run("const t = document.getElementById('text'); t.focus(); t.setSelectionRange(5, 5)")
    page.press(" never")
    page.written()
    kept = page.text
    whole = PROMPT + generate(storyteller, PROMPT, length=60)
    assert kept.startswith("There never was once a King")
    assert whole.startswith(kept.replace(" never", "", 1))
    page.press(Keys.ALT, Keys.ARROW_UP)
    page.until(lambda: page.text == whole)  # the model's own branch went on meanwhile


def test_a_text_longer_than_the_window_goes_on_from_its_end(page, storyteller):
    story = storyteller.generate(PROMPT, length=430, temperature=0.8, seed=1, ignore_eot=True)
    long = f"{PROMPT}{story} {story}"
    page.run(
        "const t = document.getElementById('text'); t.value = arguments[0]; t.dispatchEvent(new Event('input'))", long
    )
    page.until("return document.querySelector('[data-figure=cut]')")
    tokens = storyteller.tokenizer.encode(long, True)
    assert page.find("[data-figure=used]").text == f"{len(tokens)} of 512 tokens"
    read = storyteller.tokenizer.decode(tokens[-500:])
    assert page.write() == generate(storyteller, read)


# ---- Colours


def surprisals(model, tokens):
    """Log-probabilities of all tokens but the first."""
    return [float(log_softmax(row)[token]) for row, token in zip(model.logits(tokens), tokens[1:], strict=False)]


@pytest.mark.parametrize("way", ["list", "keys"])
def test_tokens_of_prompt_and_answer_are_coloured_by_how_likely_they_were(page, storyteller, way):
    page.type(PROMPT)
    page.write()
    page.known()
    tokens = storyteller.tokenizer.encode(PROMPT)
    made = storyteller.generate_tokens(tokens, length=12, temperature=0.7, seed=7).tolist()
    logprobs = surprisals(storyteller, tokens + made)

    def turn(colour):
        if way == "list":
            Select(page.find("#colour")).select_by_value(colour)
        else:
            page.press(Keys.ALT, "c")
        page.until("return document.getElementById('colour').value === arguments[0]", colour)

    heats = page.marks()
    for colour, heat in (
        ("surprisal", lambda logprob: min(1, -logprob / np.log(2) / 16)),
        ("off", lambda logprob: 0),
        ("probability", np.exp),
    ):
        if colour != "surprisal":
            turn(colour)
            heats = page.until(lambda before=heats: (now := page.marks()) != before and now)
        assert heats.keys() == set(range(len(tokens) + 12))
        assert heats[0] == 0
        np.testing.assert_allclose([*heats.values()][1:], [heat(logprob) for logprob in logprobs], atol=1.1e-3)
        assert page.find("#scale").is_displayed() == (colour != "off")


def test_colours_lie_behind_their_words(page):
    """Each mark is where the same characters of the field are, which a copy of it in one piece shows."""
    page.type(f"{PROMPT} who was fine. The office\n\n")
    page.slide("max_tokens", 60)
    page.write()
    page.known()
    assert page.run(
        """
        const field = document.getElementById("text"), copy = document.createElement("div");
        const { left, top, width } = field.getBoundingClientRect();
        const { fontFamily, fontSize, lineHeight, padding } = getComputedStyle(field);
        Object.assign(copy.style, { fontFamily, fontSize, lineHeight, padding, position: "absolute",
          overflowWrap: "break-word", whiteSpace: "pre-wrap" });
        Object.assign(copy.style, { left: `${left}px`, top: `${top}px`, width: `${width}px` });
        copy.textContent = field.value;
        document.body.append(copy);
        const off = [...document.querySelectorAll(".marks .token")].map(mark => {
          const box = mark.getBoundingClientRect();
          const found = document.caretPositionFromPoint(box.left + 1, box.top + box.height / 2);
          copy.style.pointerEvents = "none";
          const under = document.caretPositionFromPoint(box.left + 1, box.top + box.height / 2);
          copy.style.pointerEvents = "";
          return Math.abs(found.offset - under.offset);
        });
        copy.remove();
        return [off.length > 50, Math.max(...off)];
        """
    ) == [True, 0]


# ---- What else could have come


def candidates(model, tokens, **settings):
    """Probabilities of the whole vocabulary after tokens, as the library draws."""
    logits = model.logits(tokens)[-1]
    written = Written(tokens, logits.size, end_tokens(model))
    ids, probabilities = Sampling(**settings).candidates(logits, written=written)
    everything = np.zeros(logits.size)
    everything[ids] = probabilities
    return everything


def choices(page):
    """The rows of the little window, once all of it is there."""
    page.until("return document.querySelector('#choices:not([hidden]) .choice .after')?.textContent.match(/%|cut/)")
    return page.run(
        "return [...document.querySelectorAll('.choice')].map(row => ['.label', '.before', '.after']"
        ".map(part => row.querySelector(part).textContent))"
    )


def point(page, at):
    marks = page.all(f".marks [data-at='{at}']")
    ActionChains(page.browser).move_to_element(marks[0]).perform()


@pytest.mark.parametrize("way", ["mouse", "keys", "finger"])
def test_the_ten_likeliest_are_shown_for_a_token_and_one_is_chosen(page, storyteller, way):
    page.slide("top_k", 5)
    page.press(Keys.ALT, "e")
    page.type(PROMPT)
    page.known()
    text = PROMPT + page.write()
    page.known()
    tokens = storyteller.tokenizer.encode(PROMPT)
    at = len(tokens) - 4
    start = len(storyteller.tokenizer.decode(tokens[:at]))
    page.run("const t = document.getElementById('text'); t.focus(); t.setSelectionRange(...arguments)", start, start)
    if way == "mouse":
        point(page, at)
    elif way == "keys":
        page.press(Keys.ALT, "p")
    else:
        box = page.find(f".marks [data-at='{at}']").rect
        spot = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        page.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [spot]})
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    rows = choices(page)
    before = candidates(storyteller, tokens[:at], temperature=1.0)
    after = candidates(storyteller, tokens[:at], temperature=0.7, top_k=5)
    order = np.argsort(-before, kind="stable")[:10]
    assert [name for name, _, _ in rows] == [label(storyteller, token) for token in order]
    for (_, own, drawn), token in zip(rows, order, strict=True):
        assert_percent(own, before[token], slack=1e-4 * before[token])
        if after[token]:
            assert_percent(drawn, after[token], slack=1e-4 * after[token])
        else:
            assert drawn == "cut off"
    rank = next(i for i, token in enumerate(order) if token != tokens[at])
    count = len(page.tree())
    if way == "keys":
        page.until("return document.activeElement.className.includes('choice')")
        page.press(Keys.HOME, *[Keys.ARROW_DOWN] * 0)
        for _ in range(rank):
            page.press(Keys.ARROW_DOWN)
        page.press(Keys.ENTER)
    else:
        page.all(".choice")[rank].click()
    page.until(lambda: len(page.tree()) == count + 2)
    page.written()
    chosen = storyteller.tokenizer.decode([*tokens[:at], order[rank]])
    page.until(lambda: len(page.text) > len(chosen))
    assert page.text == chosen + generate(storyteller, chosen, top_k=5)
    page.press(Keys.CONTROL, "z")
    page.press(Keys.CONTROL, "z")
    page.until(lambda: page.text == text)  # the branch before is still there


def test_the_window_closes_by_escape_and_gives_the_keyboard_back(page):
    page.type(PROMPT)
    page.known()
    page.press(Keys.ALT, "p")
    choices(page)
    page.press(Keys.ESCAPE)
    page.until("return document.getElementById('choices').hidden")
    assert page.run("return document.activeElement.id") == "text"


SETTINGS = [
    {},
    {"temperature": 1.3},
    {"temperature": 0},
    {"top_k": 7, "top_p": 0.8},
    {"min_p": 0.05, "temperature": 1.5},
    {"typical_p": 0.4},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 1, "temperature": 1.1},
    {"min_tokens": 5, "temperature": 3},
    {"presence_penalty": 1.5, "frequency_penalty": -1},  # which nothing has been written for yet
]


def test_the_live_distribution_is_that_of_the_library_for_every_sampler(page, storyteller):
    text = "The wolf said so, and the wolf said"
    page.type(text)
    page.known()
    tokens = storyteller.tokenizer.encode(text)
    order = np.argsort(-storyteller.logits(tokens)[-1], kind="stable")[:40]
    for settings in SETTINGS:
        page.press(Keys.ALT, "r")
        for name, value in ({"temperature": 1} | settings).items():
            page.slide(name, value)
        p = candidates(storyteller, tokens, **{"temperature": 1.0} | settings)
        assert_bars(page, p[order], settings)
        entropy = float(re.match(r"entropy ([\d.]+) bits", page.find("#summary").text)[1])
        assert abs(entropy + (p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum()) < 0.01
        left = int(re.search(r"([\d,]+) of 4,096 can come", page.find("#summary").text)[1].replace(",", ""))
        assert abs(left - (p > 0).sum()) <= (0.01 * (p > 0).sum() if (p > 0).sum() > 200 else 0)


def assert_bars(page, p, settings):
    shown = page.run("return [...document.querySelectorAll('#bars .value')].map(value => value.textContent)")
    assert len(shown) == len(p)
    for text, each in zip(shown, p, strict=True):
        if each:
            assert_percent(text, each, slack=1e-3 * each)
        else:
            assert text == "cut off", settings


def test_a_bias_counts_in_the_live_distribution_and_in_what_is_written(page, storyteller):
    page.type(PROMPT)
    page.known()
    tokens = storyteller.tokenizer.encode(PROMPT)
    order = np.argsort(-storyteller.logits(tokens)[-1], kind="stable")
    bias = {int(order[0]): -100.0, int(order[3000]): 12.0}
    page.click("#others > summary")
    page.find("#bias").send_keys(", ".join(f"{token}={value:g}" for token, value in bias.items()))
    p = candidates(storyteller, tokens, temperature=0.7, logit_bias=bias)
    wait = page.until
    wait(lambda: page.run("return document.querySelector('#summary').textContent").count("logit-bias changes 2 tokens"))
    wait(lambda: page.run("return document.querySelector('#bars .value').textContent") != "cut off" or p[order[0]] == 0)
    assert_bars_when_there(page, p[order[:40]])
    assert page.write() == generate(storyteller, PROMPT, logit_bias=bias)
    page.find("#bias").send_keys("x")
    assert page.run("return document.getElementById('bias').validity.valid") is False


def assert_bars_when_there(page, p):
    """The same, once the server has said what the new bias concerns."""

    def there():
        try:
            assert_bars(page, p, None)
        except AssertionError:
            return False
        return True

    page.until(there, seconds=20)


def test_sliders_move_by_keyboard_and_reset(page):
    page.press(Keys.ALT, "s")
    assert page.run("return document.activeElement.id") == "range-temperature"
    page.press(Keys.ARROW_RIGHT)
    assert page.find("#number-temperature").get_attribute("value") == "0.75"
    page.slide("top_p", 7)  # more than there is
    assert page.find("#number-top_p").get_attribute("aria-invalid") is not None
    assert page.run("return JSON.parse(localStorage['npgpt2.settings']).top_p") == 1
    page.slide("top_p", 0.5)
    page.load()
    assert page.find("#number-top_p").get_attribute("value") == "0.5"
    page.click("#reset")
    assert page.find("#number-top_p").get_attribute("value") == "1"
    assert page.find("#number-temperature").get_attribute("value") == "0.7"


def test_stops_and_the_end_of_a_text_are_heeded(page, storyteller):
    page.type(PROMPT)
    page.slide("max_tokens", 60)
    page.click("#others > summary")
    page.find("#stops").send_keys("\\n\n,")
    assert page.write() == generate(storyteller, PROMPT, length=60, stop=["\n", ","])


# ---- The tree


def grow(page):
    """A text, two continuations of it, and a change."""
    page.type(PROMPT)
    one = PROMPT + page.write(1)
    page.press(Keys.CONTROL, "z")
    page.until(lambda: page.text == PROMPT)
    two = PROMPT + page.write(2)
    page.press(Keys.ALT, "e")
    page.type(" Then")
    page.until(lambda: len(page.tree()) == 5)
    return one, two, f"{two} Then"


def test_every_generation_and_edit_is_a_node_and_undo_and_redo_go_along_the_way(page):
    one, two, three = grow(page)
    assert [depth for _, depth, _ in page.tree()] == [0, 0, 1, 1, 1]
    way = [three, two, PROMPT, one, PROMPT, ""]
    for undo, redo in (
        (lambda: page.click("#undo"), lambda: page.click("#redo")),
        (lambda: page.press(Keys.CONTROL, "z"), lambda: page.press(Keys.CONTROL, Keys.SHIFT, "z")),
        (lambda: page.press(Keys.CONTROL, "z"), lambda: page.press(Keys.CONTROL, "y")),
    ):
        page.press(Keys.ALT, "e")
        for text in way[1:3]:
            undo()
            page.until(lambda text=text: page.text == text)
        for text in way[1::-1]:
            redo()
            page.until(lambda text=text: page.text == text)


def test_there_is_a_way_back_to_every_node(page):
    one, two, three = grow(page)
    texts = ["", PROMPT, one, two, three]
    for number in (2, 4, 0, 3, 1):
        page.all("#tree li")[number].click()
        page.until(lambda number=number: page.text == texts[number])
    page.press(Keys.ALT, "t")
    for text in texts[2:]:
        page.press(Keys.ARROW_DOWN)
        page.until(lambda text=text: page.text == text)
    page.press(Keys.HOME)
    page.until(lambda: page.text == "")
    page.press(Keys.ALT, "e")
    for key, text in (
        (Keys.ARROW_DOWN, PROMPT),
        (Keys.ARROW_DOWN, two),
        (Keys.ARROW_LEFT, one),
        (Keys.ARROW_RIGHT, two),
        (Keys.ARROW_DOWN, three),
        (Keys.ARROW_UP, two),
        (Keys.ARROW_UP, PROMPT),
    ):
        page.press(Keys.ALT, key)
        page.until(lambda text=text: page.text == text)


def test_branches_have_names(page):
    grow(page)
    page.until(lambda: any(node["text"] == " Then" for node in page.saved().values()))
    before = {id: node["rev"] for id, node in page.saved().items()}
    page.click("#rename")
    page.press("a fine one")
    page.press(Keys.ENTER)
    page.until(lambda: page.here() == "a fine one")
    page.press(Keys.ALT, "m")
    page.press(Keys.CONTROL, "a")
    page.press("a better one")
    page.press(Keys.ENTER)
    page.until(lambda: page.here() == "a better one")
    page.press(Keys.F2)
    page.press("nothing")
    page.press(Keys.ESCAPE)
    page.until(lambda: page.here() == "a better one")
    page.until(lambda: any(node.get("name") == "a better one" for node in page.saved().values()))
    # Who names a node has no newer text than the tab that is just writing it.
    assert {id: node["rev"] for id, node in page.saved().items()} == before
    page.load()
    assert page.here() == "a better one"


def test_a_name_is_typed_to_its_end_while_another_tab_adds_to_the_tree(page):
    page.type(PROMPT)
    page.until(lambda: page.saved())
    page.press(Keys.ALT, "m")
    page.press("a fine")
    saved = page.run("return JSON.parse(localStorage['npgpt2.tree'])")
    saved["nodes"][A] = NODE | {"made": 1}
    page.run(
        "dispatchEvent(new StorageEvent('storage', { key: 'npgpt2.tree', newValue: arguments[0] }));"
        " localStorage['npgpt2.tree'] = arguments[0]",
        json.dumps(saved),
    )
    page.until(lambda: len(page.saved()) == 2)
    page.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.press(" one")
    page.press(Keys.ENTER)
    page.until(lambda: page.here() == "a fine one")
    assert len(page.tree()) == 3


def test_siblings_are_shown_side_by_side_and_one_is_taken(page):
    one, two, _ = grow(page)
    page.press(Keys.ALT, Keys.ARROW_UP)
    page.until(lambda: page.text == two)
    for opens in (lambda: page.click("#together"), lambda: page.press(Keys.ALT, "g")):
        opens()
        page.until(lambda: [text for _, text, _ in page.cards()] == [text[len(PROMPT) :] for text in (one, two)])
        page.press("1")
        page.until(lambda: page.text == one)
        page.click("#close")
        assert not page.find("#columns").is_displayed()
        page.press(Keys.ALT, "g")
        page.all(".card button")[1].click()
        page.until(lambda: page.text == two)


def test_a_new_text_begins_beside_the_others(page):
    page.type(PROMPT)
    page.until(lambda: len(page.tree()) == 2)
    page.click("#new")
    page.until(lambda: page.text == "")
    page.type("Another")
    page.until(lambda: len(page.tree()) == 3)
    page.press(Keys.ALT, "n")
    page.until(lambda: page.text == "")
    assert [said for said, _, _ in page.tree()[1:]] == [PROMPT, "Another"]


def test_changing_the_middle_keeps_what_was_there(page):
    page.type(PROMPT)
    whole = PROMPT + page.write()
    page.run("const t = document.getElementById('text'); t.focus(); t.setSelectionRange(17, 21)")
    page.press("Queen")
    page.until(lambda: page.text == whole[:17] + "Queen" + whole[21:])
    page.press(Keys.CONTROL, "z")
    page.until(lambda: page.text == whole)


# ---- Side by side


@pytest.mark.parametrize("way", ["button", "keys"])
def test_several_continuations_are_written_at_once(page, storyteller, way):
    page.type(PROMPT)
    page.seed(5)
    Select(page.find("#count")).select_by_value("8" if way == "button" else "3")
    if way == "button":
        page.click("#several")
    else:
        page.press(Keys.CONTROL, Keys.SHIFT, Keys.ENTER)
    count = 8 if way == "button" else 3
    page.until(lambda: len(page.cards()) == count)
    page.written()
    expected = [generate(storyteller, PROMPT, seed=5 + i) for i in range(count)]
    page.until(lambda: not any(writing for *_, writing in page.cards()))
    shown = [text for _, text, _ in page.cards()]
    assert_alike(shown, expected)
    if way == "button":
        page.all(".card button")[2].click()
    else:
        page.press(Keys.ARROW_RIGHT)
        page.press(Keys.ARROW_RIGHT)
        page.press(Keys.ENTER)
    page.until(lambda: page.text == PROMPT + shown[2])


@pytest.mark.parametrize("way", ["button", "keys"])
def test_the_ladder_shows_one_prompt_and_one_seed_at_eight_temperatures_streamed_together(page, storyteller, way):
    page.slide("max_tokens", 24)
    page.press(Keys.ALT, "e")
    page.type(PROMPT)
    page.seed(1)
    if way == "button":
        page.click("#ladder")
    else:
        page.press(Keys.ALT, "l")
    page.until(lambda: sum(writing and bool(text) for _, text, writing in page.cards()) == 8)
    assert "one seed (1)" in page.find("#columns-title").text
    page.written()
    temperatures = [0, 0.5, 0.7, 1, 1.1, 1.2, 1.3, 100]
    expected = [generate(storyteller, PROMPT, 24, temperature, 1) for temperature in temperatures]
    page.until(lambda: not any(writing for *_, writing in page.cards()))
    shown = [text.replace("␍", "\r") for _, text, _ in page.cards()]
    assert [head for head, *_ in page.cards()] == [f"{temperature:g}" for temperature in temperatures]
    assert shown[:3] == expected[:3]
    assert_alike(shown, expected)


@pytest.mark.parametrize("way", ["buttons", "keys"])
def test_two_settings_write_side_by_side_with_one_seed(page, storyteller, way):
    page.type(PROMPT)
    page.seed(4)
    if way == "buttons":
        page.click("#keep")
    else:
        page.press(Keys.ALT, "a")
    page.slide("temperature", 1.2)
    page.slide("top_k", 20)
    if way == "buttons":
        page.click("#compare")
    else:
        page.press(Keys.ALT, "b")
    page.until(lambda: len(page.cards()) == 2)
    page.written()
    expected = [generate(storyteller, PROMPT, seed=4), generate(storyteller, PROMPT, 12, 1.2, 4, top_k=20)]
    page.until(lambda: [text for _, text, _ in page.cards()] == expected)
    heads = [head for head, *_ in page.cards()]
    assert heads == ["A: temperature 0.7, top-k 0", "B: temperature 1.2, top-k 20"]


def test_comparing_needs_something_to_compare_with(page):
    page.click("#compare")
    page.until(lambda: "as A first" in page.notice())


@pytest.mark.parametrize("way", ["button", "keys"])
def test_looking_inside_shows_the_page_of_the_text(page, storyteller, way):
    page.type(PROMPT)
    page.known()
    if way == "button":
        page.click("#inspect")
    else:
        page.press(Keys.ALT, "i")
    frame = page.until(lambda: page.all("#inspect-place iframe"))[0]
    assert frame.get_attribute("sandbox") == "allow-scripts"
    page.browser.switch_to.frame(frame)
    page.until("return document.body?.dataset.ready")
    assert page.run("return document.getElementById('text').textContent") == PROMPT
    assert len(page.all(".lens tbody tr")) == len(storyteller.tokenizer.encode(PROMPT))
    page.browser.switch_to.default_content()
    page.click("#inspect-dialog [data-close]")
    assert page.all("#inspect-place iframe") == []


# ---- Keeping it


def test_a_reload_keeps_the_tree_and_the_place(page):
    grow(page)
    page.press(Keys.ALT, Keys.ARROW_UP)
    page.until(lambda: page.tree()[3][2])
    before = page.tree(), page.text
    page.load()
    assert (page.tree(), page.text) == before
    page.press(Keys.CONTROL, "z")
    page.until(lambda: page.tree()[4][2])


def test_a_reload_while_the_model_writes_loses_nothing(page, storyteller):
    page.slide("max_tokens", 80)
    page.seed(7)
    page.press(Keys.ALT, "e")
    page.type(PROMPT)
    page.click("#write")
    page.until(lambda: len(page.text) > len(PROMPT) + 20)
    page.load()
    assert len(page.text) > len(PROMPT) + 20
    page.until(lambda: page.text == PROMPT + generate(storyteller, PROMPT, length=80))
    page.written()
    assert len(page.tree()) == 3


@contextmanager
def another_tab(page, browser):
    """The page in a second tab, which is closed in the end; yields the first one's handle."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        page.load()
        yield first
    finally:
        for handle in browser.window_handles:
            if handle != first:
                browser.switch_to.window(handle)
                browser.close()
        browser.switch_to.window(first)


def test_two_tabs_keep_what_both_write(page, browser):
    page.type("One")
    page.until(lambda: len(page.saved()) == 1)
    with another_tab(page, browser) as first:
        page.click("#new")
        page.type("Two")
        page.until(lambda: len(page.saved()) == 2)
        browser.switch_to.window(first)
        page.until(lambda: len(page.tree()) == 3)
        assert page.text == "One"
        page.type(" and more")
        page.until(lambda: any("and more" in node["text"] for node in page.saved().values()))
        texts = [node["text"] for node in page.saved().values()]
        assert "Two" in texts
        assert any("One" in text for text in texts)


def test_what_another_tab_saved_over_is_saved_again(page):
    page.type("One")
    page.until(lambda: page.saved())
    page.run(
        "localStorage['npgpt2.tree'] = arguments[0];"
        " dispatchEvent(new StorageEvent('storage', { key: 'npgpt2.tree', newValue: arguments[0] }))",
        json.dumps(tree_of()),
    )
    page.until(lambda: [node["text"] for node in page.saved().values()] == ["One"])


def test_another_tab_that_forgets_everything_leaves_one_to_write_on_in(page, browser):
    page.type("One")
    page.run(
        "const before = fetch; window.fetch = (path, more) => path !== 'v1/completions' || !/stream/.test(more.body)"
        " ? before(path, more) : new Promise((_, reject) => more.signal.addEventListener('abort', () =>"
        " reject(more.signal.reason)));"
    )
    page.click("#write")
    page.until(lambda: len(page.saved()) == 2)
    with another_tab(page, browser):
        page.click("#files")
        page.click("#clear")
        page.click("#clear-yes")
        page.until(lambda: not page.saved())
    page.until(lambda: len(page.tree()) == 1 and page.text == "")
    page.written()
    page.type("Two")
    page.until(lambda: any(node["text"] == "Two" for node in page.saved().values()))
    page.load()
    assert (page.text, page.notice()) == ("Two", "")


def test_what_is_typed_below_an_answer_that_never_comes_is_not_lost(page):
    page.type(PROMPT)
    page.run(
        "const before = fetch; window.fetch = (path, more) => path !== 'v1/completions' || !/stream/.test(more.body)"
        " ? before(path, more) : new Promise(resolve => { window.refuse = () =>"
        ' resolve(new Response(\'{"error": {"message": "no luck"}}\', { status: 400 })); });'
    )
    page.click("#write")
    page.until("return Boolean(window.refuse)")
    page.type(" and I")
    page.run("refuse()")
    page.until(lambda: page.notice() == "no luck")
    page.until(lambda: any(node["text"] == " and I" for node in page.saved().values()))
    assert page.text == PROMPT + " and I"
    page.load()
    assert (page.text, page.notice()) == (PROMPT + " and I", "")


@pytest.fixture
def downloads(browser, tmp_path):
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    return tmp_path


def downloaded(page, folder, suffix):
    def there():
        found = [path for path in folder.iterdir() if path.suffix == suffix]
        return found and found[0].stat().st_size and found[0]

    return page.until(there)


def test_text_and_tree_are_saved_as_files_and_opened_again(page, downloads):
    grow(page)
    text, rows = page.text, page.tree()
    page.click("#files")
    page.click("#export-text")
    assert downloaded(page, downloads, ".txt").read_text("utf-8") == text
    page.click("#export-tree")
    saved = downloaded(page, downloads, ".json")
    page.click("#clear")
    page.click("#clear-yes")
    page.until(lambda: len(page.tree()) == 1)
    page.press(Keys.ALT, "f")
    page.find("#file").send_keys(str(saved))
    page.until(lambda: len(page.tree()) == len(rows))
    assert [row[:2] for row in page.tree()] == [row[:2] for row in rows]
    page.until(lambda: page.text == text)
    (downloads / "some.txt").write_bytes(b"A text\r\nof two lines")
    page.press(Keys.ALT, "f")
    page.find("#file").send_keys(str(downloads / "some.txt"))
    page.until(lambda: page.text == "A text\nof two lines")


NODE = {"parent": None, "keep": 0, "text": "x", "tokens": [], "kind": "edit", "made": 1, "rev": 0}
A, B = "nabcdefgh01", "nabcdefgh02"


def tree_of(**nodes):
    return {"format": "npgpt2 tree", "version": 1, "cleared": 0, "nodes": nodes}


BROKEN = {
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "another thing": {"a": 1},
    "an array": [1],
    "a later version": tree_of() | {"version": 2},
    "nothing": tree_of(),
    "no ids": tree_of(__proto__=NODE),
    "a parent that isn't there": tree_of(**{A: NODE | {"parent": B}}),
    "a parent that is none": tree_of(**{A: NODE | {"parent": "constructor"}}),
    "a circle": tree_of(**{A: NODE | {"parent": B}, B: NODE | {"parent": A}}),
    "more kept than there is": tree_of(**{A: NODE | {"keep": 1}}),
    "a negative place": tree_of(**{A: NODE | {"keep": -1}}),
    "a text that is none": tree_of(**{A: NODE | {"text": {"length": 5}}}),
    "tokens that say something else": tree_of(**{A: NODE | {"tokens": [[1, "y", -1]]}}),
    "tokens that are none": tree_of(**{A: NODE | {"tokens": [["<b>", "x", -1]]}}),
    "another kind": tree_of(**{A: NODE | {"kind": "<img>"}}),
    "a node that is none": tree_of(**{A: None}),
}


def test_broken_files_are_refused_with_a_line_and_change_nothing(page, tmp_path):
    page.type(PROMPT)
    page.until(lambda: len(page.tree()) == 2)
    for name, content in BROKEN.items():
        path = tmp_path / f"{name.replace(' ', '-')}.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        if not page.find("#files-dialog").is_displayed():
            page.click("#files")
        page.find("#file").send_keys(str(path))
        said = page.until(lambda name=path.name: (text := page.find("#file-problem").text).startswith(name) and text)
        assert re.fullmatch(r"\S+ can't be opened: .+\.", said), name
        assert "\n" not in said
        assert len(page.tree()) == 2
    assert page.text == PROMPT


def test_what_is_wrong_in_a_request_of_a_file_is_left_out(page, tmp_path, storyteller):
    asked = {"max_tokens": 5, "temperature": "0; touch hacked", "seed": 1, "from": 0, "model": "m"}
    hostile = {"stop": ["'; touch hacked; '"], "logit_bias": {"1; touch": 3, "5": 1}, "top_k": "9", "ignore_eos": "x"}
    asked_well = asked | {"temperature": 0.5} | hostile
    kept_of_it = {"stop": hostile["stop"], "logit_bias": {"5": 1}, "top_k": 0, "ignore_eos": False}
    for count, (given, kept) in enumerate([(asked, None), (asked_well, kept_of_it)], 1):
        (tmp_path / "x.json").write_text(json.dumps(tree_of(**{A: NODE | {"kind": "write", "asked": given}})))
        page.press(Keys.ALT, "f")
        page.find("#file").send_keys(str(tmp_path / "x.json"))
        page.until(lambda: page.text == "x")
        nodes = page.until(lambda count=count: len(page.saved()) == count and page.saved())
        node = max(nodes.values(), key=lambda node: node["made"])
        assert (node.get("asked") and {name: node["asked"][name] for name in kept}) == kept


def test_a_browser_without_room_says_what_to_do(page):
    page.run("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    page.type("x")
    page.until(lambda: "save the tree as a file" in page.notice())
    page.write()


def test_what_is_saved_and_cannot_be_read_is_kept_aside(page):
    later = json.dumps(tree_of() | {"version": 2})
    page.open(tree=later).ready()
    said = "What this browser had saved can't be read: its version is 2, not 1. It is kept aside."
    page.until(lambda: page.notice() == said)
    page.type(PROMPT)
    page.until(lambda: page.saved())
    assert page.run("return localStorage['npgpt2.tree.unread']") == later


def test_what_there_is_no_room_to_keep_aside_stays_where_it_is(page):
    later = json.dumps(tree_of() | {"version": 2, "more": "x" * 3_000_000})
    page.open(tree=later).ready()
    page.type(PROMPT)
    page.until(lambda: "There is no room to keep it aside" in page.notice())
    page.run("dispatchEvent(new Event('pagehide'))")
    assert page.run("return localStorage['npgpt2.tree'].length") == len(later)
    page.click("#files")
    page.click("#clear")
    page.click("#clear-yes")
    page.type("x")
    page.until(lambda: page.saved())


def test_a_tree_that_grew_beyond_what_a_file_may_have_is_read(page):
    long = tree_of(**{A: NODE | {"text": "x" * 1_200_000}, B: NODE | {"parent": A, "keep": 1_100_000, "text": "y"}})
    page.open(tree=json.dumps(long | {"nodes": long["nodes"] | {f"n{i:09}": NODE for i in range(20_000)}})).ready()
    assert (page.notice(), len(page.saved())) == ("", 20_002)


def test_forgetting_everything_asks_first(page):
    page.type(PROMPT)
    page.until(lambda: page.saved())
    page.click("#files")
    page.click("#clear")
    page.click("#clear-dialog [data-close]")
    assert len(page.tree()) == 2
    page.click("#clear")
    page.click("#clear-yes")
    page.until(lambda: len(page.tree()) == 1 and page.text == "" and not page.saved())


# ---- The tree's functions


def test_the_text_of_random_trees_is_that_of_a_naive_way(page):
    """Edits at random, each with the whole text of its node beside it."""
    assert (
        page.browser.execute_async_script(
            """
        const done = arguments[arguments.length - 1];
        import("/tree.js").then(tree_ => {
          const { add, change, emptyTree, graft, holds, merge, parseTree, piecesOf, textOf, toJSON } = tree_;
          let state = 1;
          const random = n => (state = (state * 48271) % 2147483647) % n;
          const wrong = [];
          for (let round = 0; round < 50; round++) {
            const tree = emptyTree(), ids = [null], texts = new Map([[null, ""]]);
            for (let i = 0; i < 40; i++) {
              const parent = ids[random(ids.length)], before = texts.get(parent), keep = random(before.length + 1);
              const tokens = [...Array(random(4)).keys()].map(j => [j, "ab".repeat(random(3)), -1]);
              const text = tokens.map(token => token[1]).join("") + (random(2) ? "typed" : "");
              const id = add(tree, { parent, keep, text, tokens, kind: "edit" });
              ids.push(id);
              texts.set(id, before.slice(0, keep) + text);
            }
            for (const id of ids) {
              if (textOf(tree, id) !== texts.get(id)) wrong.push("text");
              const pieces = piecesOf(tree, id);
              if (pieces.map(piece => piece.text).join("") !== texts.get(id)) wrong.push("pieces");
              if (!pieces.every(({ start, text }) => texts.get(id).startsWith(text, start))) wrong.push("places");
            }
            const again = parseTree(toJSON(tree), () => undefined);
            if (!ids.every(id => textOf(again, id) === texts.get(id))) wrong.push("saved");
            const size = Object.keys(tree.nodes).length;
            graft(tree, again);
            if (Object.keys(tree.nodes).length !== 2 * size) wrong.push("grafted");
            if (!ids.every(id => textOf(tree, id) === texts.get(id))) wrong.push("grafted over");
            // Two that went on from the same, and what both have in the end, whoever goes first.
            const mine = structuredClone(again), theirs = structuredClone(again), [one, two] = ids.slice(1);
            change(mine, one, { name: "mine", named: 5 });
            change(theirs, two, { text: `${theirs.nodes[two].text}!` });
            const added = [add(mine, { kind: "edit", text: "m" }), add(theirs, { kind: "edit", text: "t" })];
            const both = merge(structuredClone(mine), structuredClone(theirs));
            const other = merge(structuredClone(theirs), structuredClone(mine));
            for (const merged of [both, other]) {
              if (!added.every(id => merged.nodes[id])) wrong.push("lost");
              if (merged.nodes[one].name !== "mine" || !merged.nodes[two].text.endsWith("!")) wrong.push("older");
            }
            if (!holds(both, mine) || !holds(both, theirs) || holds(mine, theirs)) wrong.push("not held");
            const ahead = emptyTree(Date.now() + 1e6), soon = add(ahead, { text: "s", kind: "edit" });
            if (!merge(ahead, emptyTree()).nodes[soon]) wrong.push("forgotten beforehand");
            // What was written below a node while another tab had that forgotten: a tree that can be read.
            const late = add(other, { parent: one, keep: textOf(other, one).length, text: "late", kind: "edit" });
            add(other, { parent: late, keep: textOf(other, late).length, kind: "edit" });
            const cleared = Date.now() + 1;
            for (const id of Object.keys(other.nodes).slice(-2)) other.nodes[id].made = cleared + 1;
            merge(other, emptyTree(cleared));
            if (textOf(parseTree(toJSON(other), () => undefined), late) !== "late") wrong.push("orphaned");
            if (Object.keys(merge(both, emptyTree(Date.now() + 1)).nodes).length) wrong.push("not forgotten");
          }
          done(wrong);
        });
        """
        )
        == []
    )


# ---- Elsewhere


@pytest.fixture
def shell(tmp_path):
    """A folder in which commands run, with `npgpt2` and a Python that has openai."""
    (tmp_path / "npgpt2").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m npgpt2 "$@"\n')
    (tmp_path / "npgpt2").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environ |= {"NPGPT2_API_KEY": "key", "NO_PROXY": "127.0.0.1", "LC_ALL": "C.UTF-8"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, check=True, timeout=120)
        assert not [*tmp_path.glob("hacked*")]
        return done.stdout.decode()

    return run


def commands(page):
    page.until("return document.getElementById('copy-dialog').open")
    found = page.run(
        "return [...document.querySelectorAll('#copy-list pre')].map(pre => [pre.dataset.way, pre.textContent])"
    )
    return dict(found)


def outputs(shell, given):
    """What each of the commands prints, as a text."""
    curl = json.loads(shell("bash", "-c", given["curl"]))["choices"][0]["text"]
    python = shell(sys.executable, "-c", given["Python (openai)"]).removesuffix("\n")
    command = shell("bash", "-c", given["npgpt2 generate"]).removesuffix("\n")
    return {"curl": curl, "python": python, "generate": command}


def put(page, text):
    """A text with what no keyboard has."""
    script = "const t = document.getElementById('text'); t.value = arguments[0]; t.dispatchEvent(new Event('input'))"
    page.run(script, text)
    page.until(lambda: len(page.tree()) > 1)


@pytest.mark.parametrize("way", ["button", "keys"])
def test_commands_give_the_text_of_the_page(page, shell, way):
    pytest.importorskip("openai", reason="needs openai, which the copied Python uses")
    page.slide("top_k", 50)
    page.slide("repetition_penalty", 1.1)
    page.slide("presence_penalty", -0.2)
    page.slide("min_p", 0.01)
    page.find("#stops").send_keys("it's; 'no'")
    page.find("#bias").send_keys("40=-3")
    text = PROMPT if way == "button" else AWKWARD + HOSTILE
    put(page, text)
    written = page.write()
    if way == "button":
        page.click("#copy")
    else:
        page.press(Keys.ALT, "k")
    given = commands(page)
    assert all(character.isprintable() or character == "\n" for each in given.values() for character in each)
    assert outputs(shell, given) == dict.fromkeys(("curl", "python", "generate"), written)


def test_commands_before_anything_is_written_say_what_write_will(page, shell):
    page.type(PROMPT)
    page.seed(3)
    page.press(Keys.ALT, "k")
    given = commands(page)
    page.press(Keys.ESCAPE)
    page.until("return !document.getElementById('copy-dialog').open")
    assert shell("bash", "-c", given["npgpt2 generate"]).removesuffix("\n") == page.write(3)


def test_a_command_for_a_text_with_a_zero_byte_goes_through_a_pipe(page, shell):
    put(page, "a\0b's 50% \\")
    written = page.write()
    page.click("#copy")
    given = commands(page)
    assert shell("bash", "-c", given["npgpt2 generate"]).removesuffix("\n") == written
    assert json.loads(shell("bash", "-c", given["curl"]))["choices"][0]["text"] == written


def test_copying_copies(page, browser):
    permission = {"permission": {"name": "clipboard-write"}, "setting": "granted", "origin": page.address}
    browser.execute_cdp_cmd("Browser.setPermission", permission)
    page.type(PROMPT)
    page.click("#copy")
    given = commands(page)
    page.click("#copy-list button")
    page.until(lambda: page.find("#copy-list button").text == "Copied")
    page.press(Keys.ESCAPE)
    page.until("return !document.getElementById('copy-dialog').open")
    page.click("#stops") if page.find("#stops").is_displayed() else page.click("#others > summary")
    page.click("#stops")
    page.press(Keys.CONTROL, "v")
    assert page.run("return document.getElementById('stops').value") == given["curl"]


# ---- The server


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# What a browser notes of a server that is not there, or that ends while it is asked.
REFUSED = r"net::ERR_CONNECTION_(REFUSED|RESET)"


def test_a_server_that_is_gone_is_said_to_be_and_the_text_goes_on_when_it_is_back(browser, storyteller, expected):
    port = free_port()
    with serving("--grace", 0, "--port", port) as served:
        page = Page(browser, served.port).open({"max_tokens": 120}).ready()
        page.type(PROMPT)
        page.known()
        page.seed(7)
        page.click("#write")
        page.until(lambda: len(page.text) > len(PROMPT) + 20)
        assert served.end() == 0
        page.until(lambda: "npgpt2 serve" in page.notice())
        typed = page.text
        assert len(typed) > len(PROMPT)
    with serving("--port", port):
        page.until(lambda: page.text == PROMPT + generate(storyteller, PROMPT, length=120))
        page.written()
        page.until(lambda: not page.notice())
        assert page.text.startswith(typed)
    lines = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in lines if not re.search(REFUSED, line)] == []


def test_another_model_that_answers_is_noticed(browser, tiny, expected):
    port = free_port()
    with serving("--port", port) as served:
        page = Page(browser, served.port).open().ready()
        page.type(PROMPT)
        page.known()
        served.process.kill()
        served.process.wait(30)
    page.click("#write")
    page.until(lambda: "npgpt2 serve" in page.notice())
    with serving("-m", tiny, "--port", port):
        page.until(lambda: page.notice() == "Another model answers now: tiny.")
        assert page.find("#model").text == "tiny"
        assert page.text == PROMPT
    lines = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in lines if not re.search(REFUSED, line)] == []


def test_a_key_is_asked_for_where_one_is_needed(browser, storyteller):
    """A browser notes in its console whatever is answered with 401."""
    with serving(env={"NPGPT2_API_KEY": "sesame"}) as served:
        page = Page(browser, served.port).open()
        for key in ("wrong", "sesame"):
            page.until(
                "return document.getElementById('key-dialog')?.open && document.getElementById('key').value === ''"
            )
            page.find("#key").send_keys(key, Keys.ENTER)
        page.until("return document.body.dataset.ready")
        page.type(PROMPT)
        assert page.write() == generate(storyteller, PROMPT)
        page.press(Keys.ALT, "k")
        given = commands(page)
        assert "sesame" not in str(given)
        assert "$NPGPT2_API_KEY" in given["curl"]
        lines = [entry["message"] for entry in browser.get_log("browser")]
        assert [line for line in lines if "401" not in line] == []


def test_a_key_that_is_given_later_does_as_well(browser, storyteller):
    with serving(env={"NPGPT2_API_KEY": "sesame"}) as served:
        page = Page(browser, served.port).open()
        page.until("return document.getElementById('key-dialog')?.open")
        page.press(Keys.ESCAPE)
        page.until("return document.body.dataset.ready")
        page.type(PROMPT)
        page.seed(7)
        page.click("#write")
        page.until("return document.getElementById('key-dialog')?.open")
        page.find("#key").send_keys("sesame", Keys.ENTER)
        page.until(lambda: page.text == PROMPT + generate(storyteller, PROMPT))
        assert (page.notice(), page.find("#model").text) == ("", "storyteller")


# ---- Keys


def test_the_list_of_keys_is_what_has_keys(page):
    page.press(Keys.ALT, "h")
    page.until("return document.getElementById('keys-dialog').open")
    shown = page.run("return [...document.querySelectorAll('#keys-list kbd')].map(key => key.textContent)")
    page.press(Keys.ESCAPE)
    page.until("return !document.getElementById('keys-dialog').open")
    page.run("document.activeElement.blur()")
    page.press("?")
    page.until("return document.getElementById('keys-dialog').open")
    page.press(Keys.ESCAPE)
    named = page.run(
        "return [...document.querySelectorAll('[aria-keyshortcuts]')].map(e => e.getAttribute('aria-keyshortcuts'))"
    )
    buttons = {key.replace("Control", "Ctrl").replace("Escape", "Esc") for keys in named for key in keys.split()}
    assert buttons <= set(shown)
    page.slide("max_tokens", 1)
    page.press(Keys.ALT, "e")
    # All keys there could be, of which those that do something are kept from the browser.
    page.type("x")
    page.until(lambda: len(page.tree()) == 2)
    script = """
    const codes = [..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"].map(letter => [`Key${letter}`, letter.toLowerCase(), letter]);
    const others = { Enter: "Enter", Escape: "Esc", ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→",
      "?": "?", F1: "F1", Home: "Home" };
    for (const [key, name] of Object.entries(others)) codes.push([key, key, name]);
    const found = [];
    HTMLDialogElement.prototype.showModal = () => {};
    for (const held of [[], ["Ctrl"], ["Alt"], ["Shift"], ["Ctrl", "Shift"], ["Ctrl", "Alt"], ["Alt", "Shift"]]) {
      for (const [code, key, name] of codes) {
        document.getElementById("columns").hidden = false;
        const event = new KeyboardEvent("keydown", { code, key, cancelable: true, bubbles: true,
          ctrlKey: held.includes("Ctrl"), altKey: held.includes("Alt"), shiftKey: held.includes("Shift") });
        document.body.dispatchEvent(event);
        if (event.defaultPrevented) found.push([...held, name].join("+"));
      }
    }
    return found;
    """
    found = set(page.run(script)) - {"Shift+?"}  # which is how many keyboards have it
    assert found == set(shown)
    page.written()


def test_everything_is_reached_by_tab(page):
    page.type(PROMPT)
    page.known()
    page.click("#others > summary")
    reached = set()
    page.run("document.body.focus(); document.activeElement.blur()")
    for _ in range(80):
        page.press(Keys.TAB)
        reached.add(page.run("return document.activeElement.id"))
    ids = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.closest('dialog'))"
        ".filter(e => e.offsetParent && !e.disabled && e.id).map(e => e.id)"
    )
    assert set(ids) - reached == set()
    assert "bars" in reached


# ---- Screens


def test_light_and_dark_are_chosen_and_kept(page, screen):
    screen(1280, "light")
    colour = "return getComputedStyle(document.body).backgroundColor"

    def brightness():
        return max(int(part) for part in re.findall(r"\d+", page.run(colour)))

    assert brightness() > 200
    page.click("#theme")
    assert brightness() < 60
    page.load()
    assert brightness() < 60
    page.press(Keys.ALT, "d")
    assert brightness() > 200
    page.run("localStorage.removeItem('npgpt2.theme'); delete document.documentElement.dataset.theme")
    screen(1280, "dark")
    assert brightness() < 60


PANELS = {
    "body": (
        "h1",
        ".model",
        ".hint span",
        ".figures span",
        "#write",
        "#stop",
        "#undo",
        "#ladder",
        "#tree li",
        "#tree .how",
    ),
    ".settings": (
        ".row label",
        ".row input[type=number]",
        ".readout",
        ".legend",
        ".bars .value",
        ".bars .label",
        ".rest",
        "summary",
    ),
    ".columns": ("#columns-title", "#close"),
    ".card": (".card h3", ".card .how", ".card button"),
    "dialog": ("#copy-what", "#copy-dialog h3", "#copy-dialog pre", "#copy-dialog button"),
    ".choices": (".choice .label", ".choice .before", ".choice .after", ".choices .what b", ".choices .names span"),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_is_printed_on(page, screen, scheme):
    """The contrast that WCAG 2 asks of text, also where it is coloured the most."""
    screen(1280, scheme)
    page.type(PROMPT)
    page.slide("top_k", 3)
    page.slide("max_tokens", 4)
    page.write()
    page.press(Keys.ALT, "g")
    page.known()
    page.press(Keys.ALT, "e")
    page.press(Keys.ALT, "p")
    choices(page)
    low = {}
    for panel, elements in PANELS.items():
        if panel == "dialog":
            page.click("#copy")
            page.until("return document.getElementById('copy-dialog').open")
        for css in elements:
            found = contrasts(page.browser, css, panel)
            assert found, css
            if min(found) < 4.5:
                low[css] = round(min(found), 2)
    page.press(Keys.ESCAPE)
    for colour in ("surprisal", "probability"):
        Select(page.find("#colour")).select_by_value(colour)
        page.run("document.styleSheets[1].insertRule('.token { --heat: 1 !important; color: var(--ink) !important; }')")
        for css in (".marks .token", ".card .token"):
            if (least := min(contrasts(page.browser, css, ".sheet"))) < 4.5:
                low[f"{css} {colour}"] = round(least, 2)
    assert low == {}


def test_on_a_phone_nothing_is_wider_than_the_screen(page, screen):
    screen(400, "light")
    page.type(f"{PROMPT} {'long' * 40}")
    page.seed(1)
    page.press(Keys.ALT, "l")
    page.until(lambda: len(page.cards()) == 8)
    page.written()
    page.known()
    assert page.run("return document.documentElement.scrollWidth") <= 400
    for key in "khf":
        page.press(Keys.ALT, key)
        page.until("return document.querySelector('dialog[open]')")
        box = page.find("dialog[open]").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 400
        assert page.run("const d = document.querySelector('dialog[open]'); return d.scrollWidth <= d.clientWidth")
        page.press(Keys.ESCAPE)
        page.until("return !document.querySelector('dialog[open]')")
    page.press(Keys.ALT, "p")
    choices(page)
    box = page.find("#choices").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 400


def test_who_wants_no_motion_gets_none(page):
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page.run("document.querySelector('#tree li').className = 'writing'")
        style = "return getComputedStyle(document.querySelector('#tree .said'), '::after').animationName"
        assert page.run(style) == "none"
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert page.run(style) == "pulse"


@pytest.mark.skipif(
    not os.environ.get("NPGPT2_PICTURES"), reason="makes the README's picture where NPGPT2_PICTURES is set"
)
def test_the_picture_of_the_readme(page, screen):
    screen(1280, "light")
    page.type("The King said to the")
    page.slide("max_tokens", 40)
    page.write(4)
    page.known()
    page.slide("max_tokens", 24)
    page.seed(1)
    page.press(Keys.ALT, "l")
    page.until(lambda: len(page.cards()) == 8)
    page.written()
    page.known()
    page.run("document.activeElement.blur()")
    shot = page.browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "webp", "quality": 90})
    picture = b64decode(shot["data"])
    assert len(picture) < 200_000
    Path(__file__).with_name("playground.webp").write_bytes(picture)
