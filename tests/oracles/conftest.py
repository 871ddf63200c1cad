"""What the comparisons with other libraries share, beside the fixtures of all tests.

`make oracles` runs this folder in an environment of its own. Nothing here needs the network.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import shutil
import zipfile

import pytest

from npgpt2.models import BUNDLED_FILE


@pytest.fixture(scope="session", params=["tiny", "storyteller", "gpt2-vocab"])
def vocabulary(request, tmp_path_factory):
    """A folder with `encoder.json` and `vocab.bpe`: a fixture's, the bundled model's, and GPT-2's where they are."""
    if request.param == "storyteller":
        folder = tmp_path_factory.mktemp("storyteller")
        with zipfile.ZipFile(BUNDLED_FILE) as model:
            model.extract("encoder.json", folder)
            model.extract("vocab.bpe", folder)
        return folder
    return request.getfixturevalue("fixtures" if request.param == "tiny" else "shared") / request.param


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window, for all files: driven by selenium, with the logs of its console and of its requests.

    Neither chromium nor chromedriver comes with a package of Python's (Debian: the packages chromium and
    chromium-driver).
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which drives the browser")
    chromium, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def screen(browser):
    """Make the screen as wide as this, and light or dark; afterwards as before."""

    def change(width, scheme):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    yield change
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
