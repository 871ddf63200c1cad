"""What the tests of the playground do with it: the page in a tab of the browser. Needs selenium."""

import json

from pages import ActionChains, Keys, WebDriverWait, find, find_all


class Page:
    """The page in a tab of the browser, and what one does with it."""

    def __init__(self, browser, port):
        self.browser, self.address = browser, f"http://127.0.0.1:{port}"

    def open(self, settings=None, tree=None):
        """With nothing saved but these settings, and what stands in the place of a tree."""
        self.browser.get("about:blank")  # so that the page before, whose server may be gone, asks no more
        for log in ("browser", "performance"):
            self.browser.get_log(log)  # of the page before
        stored = json.dumps(json.dumps({"max_tokens": 12, "temperature": 0.7} | (settings or {})))
        source = f"localStorage.clear(); sessionStorage.clear(); localStorage['npgpt2.settings'] = {stored}"
        if tree is not None:
            source += f"; localStorage['npgpt2.tree'] = {json.dumps(tree)}"
        first = self.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.browser.get(self.address)
        self.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", first)
        return self

    def ready(self):
        """Wait until the page knows what there is."""
        self.until("return document.body?.dataset.ready")
        return self

    def load(self):
        self.browser.get(self.address)
        self.ready()

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, what, *arguments, seconds=60):
        """Wait until a script, or a function, gives something true, and return that."""
        check = what if callable(what) else lambda: self.run(what, *arguments)
        return WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: check())

    def find(self, css):
        return find(self.browser, css)

    def all(self, css):
        return find_all(self.browser, css)

    def click(self, css):
        self.find(css).click()

    def press(self, *keys):
        """Keys held down together, wherever the focus is."""
        actions = ActionChains(self.browser)
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            actions.key_up(key)
        actions.perform()

    def type(self, text):
        self.find("#text").send_keys(text)

    def seed(self, seed):
        self.find("#seed").clear()
        self.find("#seed").send_keys(str(seed))

    @property
    def text(self):
        return self.run("return document.getElementById('text').value")

    def written(self):
        """Wait until the model doesn't write any more."""
        self.until("return document.getElementById('stop').disabled && !document.getElementById('write').disabled")

    def write(self, seed=7):
        """Have it written on with a seed; returns what came."""
        self.seed(seed)
        before, count = self.text, len(self.tree())
        self.click("#write")
        self.until(lambda: len(self.tree()) > count)
        self.written()
        return self.text[len(before) :]

    def known(self):
        """Wait until all tokens of the text have their probability, and what comes next is shown."""
        self.until("return document.getElementById('place').getAttribute('aria-busy') === 'false'")

    def tree(self):
        """The rows of the tree: what each says, at which depth, and whether it is the one that is shown."""
        return self.run(
            "return [...document.querySelectorAll('#tree li')].map(row => [row.querySelector('.said')?.textContent,"
            " Number(row.style.getPropertyValue('--depth')), row.getAttribute('aria-selected') === 'true'])"
        )

    def here(self):
        return next(said for said, _, chosen in self.tree() if chosen)

    def marks(self):
        """The tokens that are coloured: by number, how strongly."""
        found = self.run(
            "return [...document.querySelectorAll('.marks .token')].map(mark => [mark.dataset.at, mark.dataset.heat])"
        )
        return {int(at): float(heat) for at, heat in found}

    def cards(self):
        return self.run(
            "return [...document.querySelectorAll('.card')].map(card => [card.querySelector('h3').textContent,"
            " card.querySelector('.text').textContent, card.classList.contains('writing')])"
        )

    def notice(self):
        return self.find("#notice").text

    def saved(self):
        """The tree as it is saved."""
        return self.run("return JSON.parse(localStorage['npgpt2.tree'] ?? '{\"nodes\": {}}').nodes")

    def slide(self, name, value):
        """By typing the number."""
        if not self.find(f"#number-{name}").is_displayed():
            self.click("#others > summary")
        field = self.find(f"#number-{name}")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value))
