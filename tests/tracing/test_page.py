"""The page of a trace in a browser: Chromium from the path, or from the environment variable CHROMIUM."""

import os
import shutil

import pytest

from illada_jax.tracing import Trace, compare, write_page
from illada_jax.tracing.trace import Candidate
from tests.tracing.test_tracing import TOKENIZER, TRACE, lm  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        # Root, as in a container, has no sandbox.
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Writes traces and opens their page; at the end, nothing was on the console and nothing was fetched."""
    messages = []
    context = browser.new_context(viewport={"width": 1000, "height": 700}, offline=True)

    def call(traces):
        write_page(tmp_path / "p.html", traces)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        page.goto((tmp_path / "p.html").as_uri())
        return page

    yield call
    context.close()
    assert not messages


def text(page, card=0):
    """The answer that a card shows."""
    spans = page.locator(f".trace >> nth={card} >> .token:visible:not(.given):not(.after)")
    return "".join(spans.all_text_contents())


def test_the_slider_moves_and_candidates_show(open_page):
    page = open_page([TRACE])
    assert page.inner_text("#shown") == "step 3 of 3", "a lone text is shown whole"
    page.keyboard.press("Home")
    masked = page.locator(".canvas .masked:visible")
    assert page.inner_text("#shown") == "step 0 of 3" and masked.count() == 2
    page.locator("#step").press("ArrowRight")
    assert page.inner_text("#shown") == "step 1 of 3" and masked.count() == 1
    page.locator(".canvas .token >> nth=1").hover()
    tip = page.inner_text("#tip")
    assert "masked; candidates at step 2" in tip and "0.500" in tip and '"</script>"' in tip
    page.locator(".canvas .token >> nth=2").hover()
    assert "written at step 1, probability 0.250" in page.inner_text("#tip")
    page.mouse.move(1, 1)
    assert not page.locator("#tip").is_visible()


def test_play_goes_to_the_end_and_again_from_the_start(open_page):
    page = open_page([TRACE])
    for _ in range(2):
        page.locator("#play").click()
        assert page.get_attribute("#play", "aria-label") == "pause"
        page.wait_for_function("document.getElementById('shown').textContent === 'step 3 of 3'")
        assert page.get_attribute("#play", "aria-label") == "play"
        assert page.locator(".canvas").text_content() == "".join(TRACE.pieces)


def test_the_last_step_shows_the_output_of_both_strategies(open_page, lm):  # noqa: F811
    never = (*range(128, 256), TOKENIZER.eos_id)
    strategies = [{}, {"confidence": "random"}]
    page = open_page(compare(lm, "abc", strategies, suppressed_ids=never))
    assert page.locator(".strategy").all_text_contents() == ["confidence=low_confidence", "confidence=random"]
    assert page.locator(".count").all_text_contents() == ["12 tokens in 12 evaluations"] * 2
    page.keyboard.press("End")
    for card, strategy in enumerate(strategies):
        assert text(page, card) == lm.generate(["abc"], suppressed_ids=never, **strategy)[0].text
    boxes = [page.locator(f".trace >> nth={card}").bounding_box() for card in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.set_viewport_size({"width": 390, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_strategy_with_fewer_steps_waits_for_the_other(open_page):
    short = Trace("p", ["p", "a", "b"], [-1, 0, 0], [-1, 0, 0], [1, 1, 1], [3], [{1: [Candidate("a", 1.0)]}],
                  strategy="fast", nfe=1, end=2)
    page = open_page([TRACE, short])
    counts = page.locator(".count")
    assert counts.nth(1).text_content() == "1 token in 1 evaluation"
    page.keyboard.press("ArrowRight")
    assert counts.nth(1).text_content().endswith("· finished") and not counts.nth(0).text_content().endswith("finished")
    page.keyboard.press("End")
    assert text(page, 1) == "a" and page.locator(".after").text_content() == "b"


def test_keys_go_through_steps_and_tokens(open_page):
    page = open_page([TRACE])
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#shown") == "step 1 of 3"
    page.locator(".canvas").focus()
    page.keyboard.press("ArrowRight")
    assert "masked; candidates at step 2" in page.inner_text("#tip")  # the first token that was not given
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#shown") == "step 2 of 3" and "written at step 2" in page.inner_text("#tip")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#tip") == "given"
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.keyboard.press(" ")
    page.wait_for_function("document.getElementById('shown').textContent === 'step 3 of 3'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_ink_is_legible_on_every_shade(open_page, scheme):
    """Contrast of at least 4.5, the WCAG's AA, on the colours of order and of probability."""
    page = open_page([TRACE])
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.keyboard.press("End")
    for mode in ("order", "sure"):
        page.locator(f"#colour input[value={mode}]").check(force=True)
        worst = page.evaluate("""mode => {
          const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const light = (...colours) => {
            for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
            const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(byte => byte / 255)
              .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const card = getComputedStyle(document.querySelector(".trace")).backgroundColor;
          const ink = light(getComputedStyle(document.body).color);
          return Math.min(...[...document.querySelectorAll("#scale i")].map(cell => {
            const back = light(card, getComputedStyle(cell).backgroundColor);
            return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
          }));
        }""", mode)
        assert worst >= 4.5, (mode, worst)


def test_a_large_page_is_small_and_a_step_is_drawn_at_once(open_page, tmp_path):
    """128 tokens in one block of 128 steps, the most candidates that there can be, two strategies."""
    size = 128
    pieces = [f" word{n}" for n in range(size)]
    candidates = [{column: [Candidate(pieces[(column + n) % size], 0.1234 + n / 10) for n in range(5)]
                   for column in range(step, size)} for step in range(size)]
    trace = Trace("p", pieces, list(range(size)), [0] * size, [0.5] * size, [size] * size, candidates, strategy="s",
                  nfe=size)
    page = open_page([trace, trace])
    assert (tmp_path / "p.html").stat().st_size < 3e6
    milliseconds = page.evaluate("""() => {
      const start = performance.now();
      for (let step = 0; step <= 128; step++) { go(step); document.body.offsetHeight; }
      return (performance.now() - start) / 129;
    }""")
    print(f"{milliseconds:.2f} ms a step")
