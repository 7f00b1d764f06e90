"""The studio in a browser, as people meet it."""

import itertools

import pytest

from armchair.eval.ballot import Ballot
from armchair.sample.pipeline import load_artist
from armchair.serve.keys import Keys, add_key
from conftest import write_tiny_bundle
from serve.studio_app import studio

PROMPT = "a <i>red</i> circle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("ranked") / "tiny", ranked=True)


@pytest.fixture(scope="module")
def running(bundle, tmp_path_factory):
    with studio(bundle, tmp_path_factory.mktemp("data")) as (url, service):
        yield url, service


@pytest.fixture
def service(running):
    service = running[1]
    service.busy, service.queue, service.slow = None, (), 0.0
    return service


@pytest.fixture
def open_page(browser):
    """Opens pages, and fails where one asked anything of another host, or an error came up in it."""
    contexts, wrong = [], []

    def open(url: str, width: int = 1280, scheme: str = "light", ready: bool = True):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = (url, f"blob:{url}", "data:")
        page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
        page.goto(url)
        if ready:
            page.wait_for_selector("body[data-ready]")
        return page

    yield open
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(running, service, open_page):
    return open_page(running[0])


def draw(page, prompt: str = PROMPT, seed: str = "5") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", seed)
    with page.expect_response("**/studio/draw"):  # Stop stands in Draw's place before it is asked, for a moment perhaps
        page.press("#prompt", "Enter")
    page.wait_for_selector("#draw", state="visible")


def tiles(page):
    return page.locator("#pictures button.tile:not(:disabled)")


WATCH = """() => {
  window.heights = [];
  new MutationObserver(() => {
    const clips = [...document.querySelectorAll("#pictures img")].map(image => image.style.clipPath);
    if (clips.length !== 4 || !clips.every(clip => clip)) return;
    window.heights.push(clips.map(clip => 1 - parseFloat(clip.split("0px 0px ")[1]) / 100));
  }).observe(document.body, {subtree: true, attributes: true, attributeFilter: ["style"]});
}"""


def test_a_drawing_sharpens_row_by_row_and_ends_sorted(tmp_path, open_page):
    with studio(None, tmp_path) as (url, service):  # the shipped model, as the tiny one is done before one can look
        page = open_page(url)
        draw(page)  # opens the model
        page.evaluate(WATCH)
        draw(page)
        heights = page.evaluate("() => window.heights")
        page.wait_for_selector("#status:has-text('Done: 4 pictures, the best first')")
        for before, after in itertools.pairwise(heights):
            assert all(a <= b for a, b in zip(before, after, strict=True))
        shares = {height for at_once in heights for height in at_once}
        grid = service.models.artist().grid
        assert len(shares) >= 4 and 0 < min(shares) <= 0.5
        assert all(abs(share * grid - round(share * grid)) < 1e-3 for share in shares)  # whole rows of codes
        scores = [float(text) for text in page.locator("#pictures .score").all_inner_texts()]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert page.locator("#shown-prompt").inner_text() == PROMPT  # as words, not as HTML
        assert page.locator("#entries li").first.locator(".entry-prompt").inner_text() == PROMPT
        page.context.close()


def test_enlarged_saved_and_copied(page, bundle):
    draw(page, "a circle")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#place").inner_text() == "2 of 4"
    with page.expect_download() as saved:
        page.keyboard.press("s")
    assert saved.value.suggested_filename == "a-circle.png"
    page.keyboard.press("c")
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == f"armchair draw 'a circle' --model {bundle} --seed 5"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#place").inner_text() == "1 of 4"
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert tiles(page).first.evaluate("tile => tile === document.activeElement")


def test_stop_gives_up_the_place(page, service):
    service.slow, service.given_up = 1.0, 0
    page.fill("#prompt", "a circle")
    page.click("#draw")
    page.wait_for_selector("#status:has-text('Drawing')")
    page.click("#stop")
    page.wait_for_selector("#status:has-text('Stopped')")
    for _ in range(100):
        if service.given_up:
            break
        page.wait_for_timeout(50)
    assert service.given_up == 1


def test_a_region_is_drawn_anew(page):
    draw(page)
    tiles(page).first.click()
    page.keyboard.press("r")
    assert page.locator("#redraw").is_disabled()
    box = page.locator("#region").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.7, steps=4)
    page.mouse.up()
    assert "rows 2 to 3, columns 2 to 3 of 4" in page.locator("#region").get_attribute("aria-label")
    page.fill("#words", "a blue square")
    page.click("#redraw")
    options = page.locator("#alternatives button")
    options.nth(4).wait_for()
    assert options.count() == 5  # what was there, and four others
    before = page.locator("#large").get_attribute("src")
    options.nth(2).click()
    assert page.locator("#large").get_attribute("src") != before
    page.click("#tab-picture")
    assert page.locator("#viewer-title").inner_text() == "a blue square"
    assert "--redraw 4,4,12,12" in page.locator("#command").inner_text()


def test_a_region_by_keyboard(page):
    draw(page)
    tiles(page).first.press("Enter")
    page.keyboard.press("r")
    page.focus("#region")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowUp"):
        page.keyboard.press(key)
    assert "rows 2 to 2, columns 3 to 4 of 4" in page.locator("#region").get_attribute("aria-label")


def test_a_table_of_words(page):
    page.fill("#prompt", "a {red|green|blue} {circle|square}")
    page.wait_for_selector("#choices:has-text('3 × 2 = 6 pictures, as a table')")
    draw(page, "a {red|green|blue} {circle|square}")
    assert page.locator("#pictures tbody th").all_inner_texts() == ["red", "green", "blue"]
    assert page.locator("#pictures thead th").all_inner_texts() == ["circle", "square"]
    names = page.locator("#pictures td img").evaluate_all("all => all.map(image => image.alt)")
    assert names[:3] == ["a red circle", "a red square", "a green circle"] and len(names) == 6
    page.fill("#prompt", "a {red|green")
    page.wait_for_selector("#choices.wrong:has-text('without its')")


def test_history_survives_a_restart_and_is_searched_starred_and_undone(bundle, tmp_path, open_page):
    with studio(bundle, tmp_path) as (url, _):
        page = open_page(url)
        draw(page, "a red circle")
        draw(page, "a blue square")
        tiles(page).nth(2).click()
        page.keyboard.press("f")
        page.wait_for_selector("#star[aria-pressed=true]")
        page.context.close()
    with studio(bundle, tmp_path) as (url, _):
        page = open_page(url)
        lines = page.locator("#entries .entry-prompt")
        assert lines.all_inner_texts() == ["a blue square", "a red circle"]
        page.fill("#search", "red")
        page.wait_for_selector("#entries:not(:has-text('blue'))")
        assert lines.all_inner_texts() == ["a red circle"]
        page.fill("#search", "")
        page.click("#favourites")
        page.wait_for_selector("#entries:not(:has-text('red'))")
        assert lines.all_inner_texts() == ["a blue square"]
        assert page.locator("#entries img").count() == 1
        page.click("#favourites")
        page.wait_for_selector("#entries:has-text('red')")
        page.locator("#entries li").nth(1).hover()
        page.click("[aria-label='Delete a red circle from the history']")
        page.wait_for_selector("#entries:not(:has-text('red'))")
        page.click(".toast button")
        page.wait_for_selector("#entries:has-text('red')")
        assert lines.count() == 2
        page.context.close()


DROP = """([bytes, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  for (const type of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data}));
  }
}"""


def test_a_dropped_png_brings_its_words_and_settings_back(page, bundle, tmp_path):
    drawing = load_artist(bundle, "cpu").draw("a lost star", candidates=2, seed=987654321987654321, guidance=3.5)
    path = drawing.save(tmp_path / "lost.png")[0]
    page.evaluate(DROP, [list(path.read_bytes()), "lost.png"])
    page.wait_for_selector("#status:has-text('Draw makes it again')")
    assert page.locator("#prompt").input_value() == "a lost star"
    assert page.locator("#seed").input_value() == "987654321987654321"
    assert page.locator("#guidance").input_value() == "3.5"
    assert tiles(page).count() == 1
    page.evaluate(DROP, [list(b"GIF89a"), "cat.gif"])
    page.wait_for_selector("#problem:has-text('cat.gif: not a PNG')")


LISTEN = """() => {
  window.said = [];
  const status = document.getElementById("status");
  new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
}"""


def test_no_room_and_the_queue_are_told_in_words(page, service):
    service.busy = 2.0
    page.fill("#prompt", "a circle")
    page.click("#draw")
    page.wait_for_selector("#problem:has-text('Too much is being drawn right now. 16 requests are waiting already')")
    page.wait_for_selector("#again:disabled:has-text('Try again in')")
    service.busy, service.queue, service.slow = None, (3, 1), 0.1
    page.evaluate(LISTEN)
    page.click("#again:enabled")
    page.wait_for_selector("#status:has-text('Done')")
    said = page.evaluate("() => window.said")
    places = ["Asking …", "Waiting: 2 before yours", "Waiting: Yours is next", "Drawing"]
    assert said[:4] == places and said[-1].startswith("Done: 4 pictures")
    assert not page.locator("#problem").is_visible()


def test_looking_inside(page):
    draw(page, "red circle")
    tiles(page).first.click()
    page.keyboard.press("i")
    page.wait_for_selector("#cells [data-cell='15']")
    assert page.locator("#caption .word").all_inner_texts() == ["red", "circle"]
    page.click("#cells [data-cell='5']")
    assert page.locator("#cell-words").inner_text().startswith("Row 2, column 2: code ")
    page.keyboard.press("ArrowDown")
    assert page.locator("#cell-words").inner_text().startswith("Row 3, column 2: code ")
    page.click("#caption .word >> nth=1")
    page.wait_for_selector("#look-note:has-text('attended to “circle”')")
    heat = page.locator("#cells [data-cell]").evaluate_all("all => all.map(cell => cell.style.background)")
    assert len(set(heat)) > 4
    page.click("text=Surprise")
    page.wait_for_selector("#scale-high:has-text('bits')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_everything_fits_and_has_a_name(running, service, open_page, width, scheme):
    page = open_page(running[0], width, scheme)
    sideways = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    unnamed = """() => [...document.querySelectorAll("button, input, textarea, select, a")].filter(one =>
      one.offsetParent && !(one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim())
    ).map(one => one.outerHTML)"""
    assert page.evaluate(sideways) == 0
    draw(page, "a {red|green|blue} {circle|square}, {large|small} one")
    assert page.evaluate(sideways) == 0
    draw(page, "averyveryverylongwordthatdoesnotbreakanywhere" * 4)
    assert page.evaluate(sideways) == 0 and page.evaluate(unnamed) == []
    tiles(page).first.click()
    for tab in ("picture", "redraw", "look"):
        page.click(f"#tab-{tab}")
        assert page.evaluate(sideways) == 0 and page.evaluate(unnamed) == []
    page.click("#close")
    dark = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
    assert (int(dark[4:].split(",")[0]) < 60) == (scheme == "dark")


def test_a_key_is_asked_for_once_and_pictures_come_with_it(bundle, tmp_path, open_page):
    key = add_key(tmp_path / "keys", "me")
    with studio(bundle, tmp_path / "data", keys=Keys.read(tmp_path / "keys")) as (url, _):
        page = open_page(url, ready=False)
        page.fill("#key-value", "armchair-wrong")
        page.press("#key-value", "Enter")
        page.wait_for_selector("#key-note:has-text('not known here')")
        page.fill("#key-value", key)
        page.press("#key-value", "Enter")
        page.wait_for_selector("body[data-ready]")
        draw(page, "a circle")
        page.wait_for_selector("#pictures img[src^=blob]")
        page.wait_for_timeout(200)
        assert all(page.locator("#pictures img").evaluate_all("all => all.map(image => image.naturalWidth === 16)"))
        page.reload()
        page.wait_for_selector("#entries:has-text('a circle')")
        page.context.close()


def test_the_ballot_is_linked(bundle, tmp_path, open_page):
    from PIL import Image

    pictures = [Image.effect_noise((8, 8), 90).convert("RGB") for _ in range(2)]
    ballot = Ballot.create(tmp_path / "b.sqlite", ("a", "b"), ["one"], pictures[:1], pictures[1:])
    with studio(bundle, tmp_path / "data", ballot) as (url, _):
        page = open_page(url)
        page.click("#ballot")
        page.wait_for_selector("#pair img[src]")
        assert "one" in page.locator("#caption").inner_text()
        page.context.close()
