"""The server's page in a browser. What answers is an echo, slow enough to be looked at."""

import json
import math
import re
import threading
import time
import urllib.request
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest

from scalegpt.data import conversations, tokenizer
from scalegpt.inference.sampling import Sampler
from scalegpt.server.slots import Drawn

DRIVER = Path("/usr/bin/chromedriver")
PACE = 0.015  # seconds of a token
STORY = b"Once upon a time. "
CODEC = tokenizer.load("byte").chat()
MARKS = CODEC.marks


class Echo:
    """Slots without a model: an answer is its question, byte by byte; a text without marks goes on
    with a story. Beside each byte, ! and the end are likely, too."""

    count = 2

    def __init__(self, codec):
        self.codec, self.texts, self.orders = codec, {}, []
        self.fails = False

    def open(self, slot, ids, sampler, seed, index):
        self.texts[slot] = ids.tolist()
        self.orders.append((CODEC.decode(ids, marks=True), sampler, seed, index))

    def close(self, slot):
        self.texts.pop(slot)

    def read(self, slot):
        return True

    def write(self, slots):
        time.sleep(PACE)
        if self.fails:
            raise RuntimeError("as the test wants it")
        return [self._next(self.texts[slot]) for slot in slots]

    def append(self, slot, token):
        self.texts[slot].append(token)

    def _next(self, ids):
        if not self.codec.marks:
            token = STORY[len(ids) % len(STORY)]
        else:
            turn = len(ids) - ids[::-1].index(MARKS["user"])
            question = ids[turn : ids.index(MARKS["end"], turn)]
            written = ids[::-1].index(MARKS["assistant"])
            token = [*question, MARKS["end"]][min(written, len(question))]
        end = MARKS["end"] if self.codec.marks else 0
        top = {token: 0.6, ord("!"): 0.2, end: 0.1, 195: 0.06, ord(" "): 0.04}
        return Drawn(token, math.log(0.6), [(i, math.log(p)) for i, p in top.items()])


@contextmanager
def serving(echo, feedback=None, key=None):
    """A server; yields its URL."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is of the extra chat")
    from scalegpt.server.app import Card, Service, application
    from scalegpt.server.bodies import Reader
    from scalegpt.server.generation import Generation
    from scalegpt.server.guard import Guard

    generation = Generation(echo)
    reader = Reader(echo.codec, 512, Sampler(), 400)
    service = Service(Card("echo", 7, 1.25, feedback), reader, generation)
    app = Guard(application(service), "127.0.0.1", key)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        generation.stop()
        thread.join()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A browser that notes each request and each message of its console."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is of the extra oracle")
    if not DRIVER.exists():
        pytest.skip(f"there is no {DRIVER}: Debian's chromium-driver has it")
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of an echo that answers: its echo, URL and file of feedback."""
    echo, file = Echo(CODEC), tmp_path_factory.mktemp("page") / "feedback.jsonl"
    with serving(echo, file) as url:
        yield echo, url, file


@pytest.fixture
def page(driver, server):
    with opened(driver, server[1]) as page:
        yield page


@contextmanager
def opened(driver, url):
    """The page with an empty memory. Afterwards nothing was said or asked that should not be."""
    page = Page(driver, url)
    driver.get(url)
    page.ready()
    driver.execute_script("talk.deleted = true; localStorage.clear(); sessionStorage.clear()")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(url)
    page.ready()
    yield page
    said = [m["message"] for m in driver.get_log("browser") if m["source"] != "network"]
    assert said == []
    notes = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [n for n in notes if n["method"] == "Network.requestWillBeSent"]
    asked = [note["params"]["request"]["url"] for note in asked]
    assert asked and all(at.startswith((url, f"blob:{url}", "data:")) for at in asked), asked


class Page:
    """What a user sees and does."""

    ENTER, ESCAPE, SHIFT_ENTER = "\ue007", "\ue00c", "\ue008\ue007\ue000"

    def __init__(self, driver, url):
        self.driver, self.url = driver, url

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        return self.driver.find_element("css selector", css)

    def texts(self, css):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css
        )

    def until(self, condition, seconds=8):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, self.one("body").text
            time.sleep(0.02)
        return value

    def ready(self):
        """Wait until the page knows the server; before, it may be that it has not begun."""
        self.until(lambda: self.run("return typeof server === 'object' && server !== null"))

    def draft(self):
        return self.run("return document.getElementById('draft').value")

    def type(self, text):
        self.one("#draft").send_keys(text)

    def ask(self, text):
        """Ask, and wait for the whole answer; return it."""
        self.type(text + self.ENTER)
        return self.answered()

    def answered(self):
        self.until(lambda: self.all("article"))
        self.until(lambda: not self.all(".going"))
        return self.texts(".assistant .body")[-1]

    def press(self, word, within="article:last-child"):
        button = next(b for b in self.all(f"{within} button") if b.text == word)
        button.click()

    def words(self, within="article:last-child"):
        return [b.text for b in self.all(f"{within} button")]

    def hover(self, element):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()


def health(url):
    with urllib.request.urlopen(f"{url}health") as response:
        return json.load(response)


def test_the_page_makes_no_markup_of_text_and_names_no_other_place():
    files = {
        f.name: f.read_text() for f in resources.files("scalegpt.server").joinpath("page").iterdir()
    }
    assert sorted(files) == ["index.html", "page.css", "page.js"]
    for name, text in files.items():
        markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval\(|Function\("
        assert not re.search(markup, text), name
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text), name
    assert not re.search(r"<style|style=|\son[a-z]+=|<script(?! src)", files["index.html"])


@pytest.mark.slow
def test_an_answer_comes_bit_by_bit_and_stop_frees_its_slot(page, server):
    text = "A question so long that its answer can be looked at while it is being written. " * 2
    page.type(text + page.ENTER)
    seen = set()
    page.until(lambda: seen.update(page.texts(".going .body")) or len(seen) > 5)
    assert all(text.startswith(part) for part in seen)
    assert page.one("#send").text == "Stop" and health(page.url)["busy"] == 1
    page.type("typed meanwhile" + page.ENTER + page.ESCAPE)
    page.until(lambda: health(page.url)["busy"] == 0, 1)
    part = page.answered()
    assert max(seen, key=len) <= part < text and text.startswith(part)
    assert page.draft() == "typed meanwhile"
    assert "stopped" in page.texts(".facts")[-1]

    page.press("Continue")
    assert page.answered() == text and len(page.all("article")) == 2
    assert server[0].orders[-1][3] == len(part)  # by the ids that were there
    assert "Continue" not in page.words()
    assert re.search(r"\d+ tokens · \d+ tokens/s", page.texts(".facts")[-1])
    read = len(text) + 4  # bos, user, end, assistant
    used = read + len(text) + 1
    assert page.one("#left").text == f"context: {used} of 512 tokens used, {512 - used} left"
    assert page.one("#about").text.split("\n") == ["echo", "step 7 · val loss 1.2500"]
    assert page.one("#spoken").get_attribute("textContent") == text  # what is read aloud


@pytest.mark.slow
def test_branches_conversations_and_what_a_reload_keeps(page):
    assert page.ask("one") == "one"
    page.press("Regenerate")
    page.answered()
    assert page.texts(".assistant .bar span")[0] == "2/2"
    page.press("Copy")
    page.until(lambda: "Copied" in page.words())
    page.type("\ue009v\ue000")
    assert page.draft() == "one"
    page.one("#draft").clear()
    page.press("Edit", "article")
    area = page.one("article textarea")
    area.clear()
    area.send_keys("two" + page.ENTER)
    assert page.answered() == "two" and page.texts(".user .bar span")[0] == "2/2"
    assert page.ask("three") == "three" and len(page.all("article")) == 4
    page.press("<", ".user")
    assert page.texts(".body") == ["one", "one"]
    page.press("<")
    page.press(">", ".user")
    assert page.texts(".body") == ["two", "two", "three", "three"]

    page.one("#new").click()
    page.type("a draft")
    page.one("#talks .now button[title=Rename]").click()
    page.one("#talks input").send_keys("Mine" + page.ENTER)
    page.driver.refresh()
    page.ready()
    assert page.texts("#talks .title") == ["Mine", "two"]
    assert page.draft() == "a draft"
    page.all("#talks .title")[1].click()
    assert page.texts(".body") == ["two", "two", "three", "three"]
    page.press("<", ".user")
    assert page.texts(".assistant .bar span")[0] == "1/2"

    page.one("#talks .now button[title=Delete]").click()
    page.driver.switch_to.alert.accept()
    assert page.texts("#talks .title") == ["Mine"]
    page.driver.refresh()
    page.ready()
    assert page.texts("#talks .title") == ["Mine"]


@pytest.mark.slow
def test_markup_of_users_and_models_stays_text(page):
    attack = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
    text = f"{attack}\n\n```html\n<b>{attack}</b>\n```\nend"
    page.type(text.replace("\n", page.SHIFT_ENTER))
    answer = page.ask("")
    assert page.texts(".assistant p") == [attack, "end"]
    assert page.texts(".assistant pre") == [f"<b>{attack}</b>"] and attack in answer
    page.one("#look").click()
    assert page.texts(".assistant .tokens") == [text]
    assert attack.startswith(page.texts("#talks .title")[0])
    assert page.run("return [document.images.length, window.hit ?? 0]") == [0, 0]
    assert page.run("return document.scripts.length") == 1


@pytest.mark.slow
def test_what_goes_wrong_is_said_in_place_and_can_be_tried_again(page):
    offline = {"latency": 0, "throughput": 0}
    page.driver.set_network_conditions(offline=True, **offline)
    page.type("Is anybody there?" + page.ENTER)
    page.until(lambda: page.texts(".error"))
    assert page.texts(".error") == ["The server does not answer.Retry"]
    assert page.texts(".user .body") == ["Is anybody there?"]
    page.type("more" + page.ENTER)
    assert "empty" in page.one("#notice").text
    assert page.draft() == "more"
    page.driver.set_network_conditions(offline=False, **offline)
    page.press("Retry")
    assert page.answered() == "Is anybody there?" and not page.texts(".error")

    page.one("#set").click()
    page.one("input[name=temperature]").send_keys("-1" + page.ENTER)
    page.press("Regenerate")
    page.until(lambda: page.texts(".error"))
    assert "must be from 0, which is greedy" in page.texts(".error")[0]


@pytest.mark.slow
def test_an_answer_that_breaks_off_is_kept_and_is_no_success(driver):
    echo = Echo(CODEC)
    with serving(echo) as url, opened(driver, url) as page:
        page.type("The echo will break before its end" + page.ENTER)
        page.until(lambda: page.texts(".going .body") > ["T"])
        echo.fails = True
        page.until(lambda: page.texts(".error"))
        assert "before the end" in page.texts(".error")[0] and page.words()[0] == "Continue"
        assert page.texts(".assistant .body")[0].startswith("Th")


@pytest.mark.slow
def test_a_server_with_a_key_asks_for_it(driver):
    with serving(Echo(CODEC), key=b"secret") as url:
        driver.get(url)
        page = Page(driver, url)
        field = page.until(lambda: page.all("input[name=key]"))[0]
        assert "key" in page.one("#notice").text and page.one("#model").text == "scalegpt"
        field.send_keys("secret" + page.ENTER)
        page.ready()
        assert page.ask("Hello") == "Hello" and not page.all("input[name=key]")


@pytest.mark.slow
def test_settings_reach_the_model_and_regenerating_changes_the_seed(page, server):
    page.one("#set").click()
    assert page.one("input[name=top_k]").get_attribute("placeholder") == "200"
    page.one("textarea[name=system]").send_keys("Be brief.")
    for name, value in {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "max_tokens": 2,
        "seed": 5,
    }.items():
        page.one(f"input[name={name}]").send_keys(str(value))
    assert page.ask("abc") == "ab"
    assert "cut at its longest" in page.texts(".facts")[-1]
    prompt, sampler, seed, _ = server[0].orders[-1]
    assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>abc<|end|><|assistant|>"
    assert (sampler, seed) == (Sampler(0.5, 3, 0.9), 5)
    page.press("Regenerate")
    page.answered()
    assert server[0].orders[-1][2] == 6


@pytest.mark.slow
def test_exports_are_training_data_and_can_be_imported(page, tmp_path):
    from test_prepare import bins, module

    from scalegpt.data.chat import encode_conversation

    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.one("#set").click()
    page.one("textarea[name=system]").send_keys("Echo.")
    page.ask("Ünïcode ✓")
    page.ask("the second is cut")
    page.run("path(talk).at(-1).finish = 'stopped'")
    page.one("#new").click()
    page.ask("other")
    page.one("#new").click()
    page.type("never answered")
    page.one("#export").click()
    file = tmp_path / "conversations.jsonl"
    page.until(file.exists)
    assert page.one("#notice").text.startswith("1 of 3 left out")
    system = {"role": "system", "content": "Echo."}

    def turn(text, **more):
        user = {"role": "user", "content": text}
        return [user, {"role": "assistant", "content": text, **more}]

    rows = [
        {"messages": [system, *turn("other")]},
        {
            "messages": [
                system,
                *turn("Ünïcode ✓"),
                *turn("the second is cut", weight=0),
            ]
        },
    ]
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    argv = [f"--input={file}", f"--out={tmp_path / 'out'}", "--tokenizer=byte"]
    assert module("chat").main(argv) == 0
    ids, _ = bins(tmp_path / "out")
    wanted = [encode_conversation(CODEC, row["messages"]).tolist() for row in rows]
    assert sorted(part.tolist() for part in ids.values()) == sorted(wanted)

    page.run("localStorage.clear()")
    page.one("#file").send_keys(str(file))
    page.until(lambda: len(page.all("#talks li")) == 5)
    assert page.texts(".body") == ["other", "other"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'{json.dumps(rows[0])}\n{{"messages": [{{"role": "tool"}}]}}\n')
    page.one("#file").send_keys(str(bad))
    page.until(lambda: "line 2" in page.one("#notice").text)
    assert len(page.all("#talks li")) == 5


@pytest.mark.slow
def test_tokens_show_what_else_was_likely_and_the_answer_goes_on_from_it(page, server):
    page.ask("né ok")
    page.one("#look").click()
    assert page.texts(".tokens span") == ["n", "", "é", " ", "o", "k", ""]
    first = page.one(".tokens span")
    assert page.run("return arguments[0].style.getPropertyValue('--p')", first) == "0.6"
    colours = page.run("return getComputedStyle(arguments[0]).backgroundColor", first)
    assert colours != "rgba(0, 0, 0, 0)"
    assert "perplexity 1.67" in page.texts(".facts")[-1]
    page.hover(page.all(".tokens span")[4])
    page.until(lambda: page.one("#others").is_displayed())
    assert page.one("#others").text.split("\n") == [
        *("o", "60.0 %", "!", "20.0 %", "<|end|>", "10.0 %", "c3", "6.0 %", "␣", "4.0 %"),
        "Click one to continue from it.",
    ]
    page.all("#others button")[1].click()
    assert page.answered() == "né !k" and page.texts(".assistant .bar span")[0] == "2/2"
    assert server[0].orders[-1][0].endswith("<|assistant|>né !") and server[0].orders[-1][3] == 5
    page.hover(page.all(".tokens span")[3])
    page.until(lambda: page.one("#others").is_displayed())
    page.all("#others button")[2].click()  # the end
    assert page.texts(".assistant .body") == ["né"] and not page.all(".going")
    assert page.texts(".assistant .bar span")[0] == "3/3"
    # After a letter's first half: its second, and the first of another letter.
    page.press("<")
    for place, text in ((0, "né ok"), (3, "n\ufffd\ufffd ok")):
        page.hover(page.all(".tokens span")[2])
        page.until(lambda: "a9" in page.one("#others").text)
        page.all("#others button")[place].click()
        assert page.answered() == text and server[0].orders[-1][3] == 3
    # By keys: along the tokens, to the list, and back.
    page.one(".tokens span").send_keys("\ue014" + page.ENTER)
    assert page.run("return document.activeElement.parentNode.id") == "others"
    page.driver.switch_to.active_element.send_keys(page.ESCAPE)
    assert page.run("return document.activeElement.parentNode.className") == "tokens"
    assert not page.one("#others").is_displayed()


@pytest.mark.slow
def test_a_good_and_a_bad_answer_become_a_pair(page, server):
    page.ask("left")
    page.press("Good")
    assert not server[2].exists()
    page.press("Edit")
    page.one("article textarea").send_keys(" and right")
    page.press("Save")
    assert page.texts(".assistant .body") == ["left and right"] and page.words()[0] == "<"
    page.press("Bad")
    page.until(server[2].exists)
    (line,) = server[2].read_text().splitlines()
    user, good, bad = (
        {"role": role, "content": text}
        for role, text in (("user", "left"), ("assistant", "left"), ("assistant", "left and right"))
    )
    assert conversations.pair_of(conversations.parse(line)) == ([user, good], [user, bad])
    page.until(lambda: page.all(".assistant button[aria-pressed=true]:disabled"))


@pytest.mark.slow
def test_a_reader_is_not_scrolled_away_and_a_phone_has_room(page):
    def to_end():
        script = "const e = arguments[0]; return e.scrollHeight - e.scrollTop - e.clientHeight"
        return page.run(script, page.one("#log"))

    lines = page.SHIFT_ENTER.join(f"{n}" for n in range(50))
    page.type(lines + page.ENTER)
    page.until(lambda: len(page.texts(".going .body")[0]) > 60)
    assert page.run("return document.getElementById('log').scrollTop") > 0 and to_end() < 30
    page.run("document.getElementById('log').scrollTop = 100")
    page.answered()
    assert page.run("return document.getElementById('log').scrollTop") == 100 and to_end() > 30
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.run("return document.documentElement.scrollWidth") <= 390
        assert not page.one("#side").is_displayed()
        page.one("#menu").click()
        assert page.one("#side").is_displayed()
        page.one("#talks .title").click()
        assert not page.one("#side").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_a_base_model_gets_a_page_that_continues_text(driver):
    echo = Echo(tokenizer.load("byte"))
    with serving(echo) as url, opened(driver, url) as page:
        assert page.one("#send").text == "Continue" and not page.all("textarea[name=system]")
        page.type("Once " + page.ENTER)
        page.until(lambda: page.texts(".going .body") > ["upon a t"])
        page.type(page.ESCAPE)
        part = page.answered()
        page.type(page.ENTER)  # nothing typed: it goes on
        page.until(lambda: len(page.texts(".assistant .body")[0]) > len(part) + 3)
        page.type("And " + page.ESCAPE)
        longer = page.answered()
        assert ("upon a time. Once " * 20).startswith(longer) and longer.startswith(part)
        page.one("#look").click()
        assert "".join(page.texts(".tokens span")) == longer and len(page.all("article")) == 2
        page.type(page.ENTER)
        page.until(lambda: len(page.all("article")) == 4)
        page.type(page.ESCAPE)
        page.answered()
        prompt = echo.orders[-1][0]
        assert prompt == f"Once {longer}And "
        assert page.run("return row(talk)")["text"].startswith(prompt)
        page.run("server.block_size = 2")  # what was written is now too long to be kept whole
        page.press("Continue")
        page.until(lambda: len(echo.orders) == 4)
        page.type(page.ESCAPE)
        page.answered()
        assert echo.orders[-1][0].startswith(prompt) and echo.orders[-1][3] == 0
