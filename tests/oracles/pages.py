"""What the tests share that look at pages in a browser: finding, moving sliders, and reading figures as they are shown.

Needs selenium. The browser itself is a fixture of conftest.py.
"""

import re

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

__all__ = [
    "ActionChains",
    "Keys",
    "Select",
    "WebDriverWait",
    "assert_percent",
    "contrasts",
    "find",
    "find_all",
    "label",
    "set_slider",
]


def find(browser, css):
    return browser.find_element(By.CSS_SELECTOR, css)


def find_all(browser, css):
    return browser.find_elements(By.CSS_SELECTOR, css)


def set_slider(browser, name, value):
    """With the keyboard: to the least, then step by step."""
    slider = find(browser, f"#{name}")
    step, least = float(slider.get_attribute("step")), float(slider.get_attribute("min"))
    slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * round((value - least) / step))
    assert float(slider.get_attribute("value")) == pytest.approx(value)


def percent(text):
    """Of 100, and by how much it may be off, as it is rounded."""
    digits = re.fullmatch(r"([\d.]+(?:e-\d+)?) %", text)[1]
    mantissa, _, exponent = digits.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(digits), 0.51 * 10 ** (int(exponent or 0) - decimals)


def assert_percent(text, p, slack=0.0):
    value, rounding = percent(text)
    assert abs(value - 100 * p) <= rounding + 100 * slack, (text, p)


def label(model, token):
    """How the page writes a token: what is white space as a sign, and pieces of a character by their bytes."""
    raw = model.tokenizer.decode_bytes([token])
    try:
        return raw.decode().replace(" ", "␣").replace("\n", "↵")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const luminance = (...colours) => {
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const panel = getComputedStyle(document.querySelector(arguments[1])).backgroundColor;
return [...document.querySelectorAll(arguments[0])].map(element => {
  const style = getComputedStyle(element);
  const [a, b] = [luminance(panel, style.backgroundColor), luminance(style.color)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
"""


def contrasts(browser, css, panel):
    """Of the text of each element, how much it stands out from what is behind it, which lies on a `panel` (WCAG 2)."""
    return browser.execute_script(CONTRASTS, css, panel)
