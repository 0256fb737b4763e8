"""The report's page in a real browser: Debian's Chromium, headless."""

import base64
import json
import shutil

import pytest
from records import png, record

from advmoe.reports.captions import CAPTIONS
from advmoe.reports.claims import judge
from advmoe.reports.html import report_html
from advmoe.reports.paper_tables import tables
from advmoe.reports.verdict import verdict

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium with its driver here: make test-browser installs them", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: make test-browser installs it")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

EVIL = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
PHONE, DESKTOP = 390, 1280
CONTRAST = """
const lights = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
  .map((value) => value / 255).map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const luminance = (colour) => { const [r, g, b] = lights(colour); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const solid = (colour) => colour.startsWith("rgb(") ;
function background(element) {
  const colour = getComputedStyle(element).backgroundColor;
  return solid(colour) ? colour : background(element.parentElement);
}
document.querySelectorAll("details").forEach((details) => { details.open = true; });
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const low = [];
let seen = 0;
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
  if (!text || element.closest("script, select, .unseen") || !element.getClientRects().length) continue;
  const pair = [getComputedStyle(element).color, background(element)].map(luminance).sort((a, b) => b - a);
  const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
  seen += 1;
  if (ratio < 4.5) low.push([text.slice(0, 40), ratio]);
}
return [seen, low];
"""


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={DESKTOP},900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def write_page(folder, records):
    figure = folder / "figure.png"
    figure.write_bytes(base64.b64decode(png(0)))
    figures = dict.fromkeys(CAPTIONS, figure)
    page = folder / "report.html"
    page.write_text(report_html(records, tables(records), judge(records), verdict(records), figures), "utf-8")
    return page.as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page with three methods, one of them without RA-AA."""
    runs = [record("at_dense"), record("at_small_dense", ra_aa=...), record("advmoe"), record("advmoe", 0, 0.25, num_experts=4)]
    return write_page(tmp_path_factory.mktemp("report"), runs)


@pytest.fixture
def page(browser, address):
    """The browser on the page, in desktop width and light theme."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # drop the messages of earlier pages
    emulate(browser, DESKTOP, "light")
    browser.get(address)
    return browser


def emulate(browser, width, scheme, motion="reduce"):
    """By default without smooth scrolling, which a click would have to wait for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferences = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    features = [{"name": name, "value": value} for name, value in preferences.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


OVERVIEW = "table[aria-labelledby='table-1']"


def head(page, title):
    """The head of the column of this title in the table of all runs, and the column's number."""
    heads = page.find_elements(By.CSS_SELECTOR, f"{OVERVIEW} thead th")
    number = [cell.text for cell in heads].index(title)
    return heads[number], number


def column(page, number):
    rows = page.find_elements(By.CSS_SELECTOR, f"{OVERVIEW} tbody tr")
    return [row.find_elements(By.CSS_SELECTOR, "th, td")[number].text for row in rows]


def test_console_is_silent_and_nothing_is_requested(page, address):
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert address in requested
    assert [url for url in requested if url != address and not url.startswith("data:")] == []


def test_numbers_sort_downwards_first_and_missing_ones_stay_last(page):
    column_head, number = head(page, "RA-AA")
    assert column_head.get_attribute("aria-sort") is None
    column_head.find_element(By.TAG_NAME, "button").click()
    assert column(page, number) == ["55.50 [1]", "49.50 [1]", "47.00 [1]", "not measured"]
    assert column_head.get_attribute("aria-sort") == "descending"
    column_head.find_element(By.TAG_NAME, "button").click()
    assert column(page, number) == ["47.00 [1]", "49.50 [1]", "55.50 [1]", "not measured"]
    assert column_head.get_attribute("aria-sort") == "ascending"
    assert page.find_element(By.ID, "status").get_attribute("textContent") == "Sorted by RA-AA, ascending"


def test_keyboard_sorts_words_upwards_first(page):
    number_head, _ = head(page, "RA-AA")
    number_head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    column_head, number = head(page, "method")
    column_head.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert column(page, number) == ["AdvMoE", "AdvMoE", "AT (Dense)", "AT (S-Dense)"]
    assert column_head.get_attribute("aria-sort") == "ascending"
    assert number_head.get_attribute("aria-sort") is None


def test_rows_move_completely(page):
    _, worst = head(page, "RA-worst")
    before = dict(zip(column(page, worst), column(page, 1), strict=True))
    head(page, "RA-worst")[0].find_element(By.TAG_NAME, "button").click()
    assert list(before) != column(page, worst)
    assert dict(zip(column(page, worst), column(page, 1), strict=True)) == before


def visible_galleries(page):
    galleries = page.find_elements(By.CSS_SELECTOR, ".images")
    return [gallery.find_element(By.TAG_NAME, "h3").text for gallery in galleries if gallery.is_displayed()]


def test_gallery_shows_the_chosen_run(page):
    chooser = Select(page.find_element(By.ID, "run"))
    titles = [option.text for option in chooser.options]
    assert len(titles) == 4
    assert visible_galleries(page) == titles[:1]
    chooser.select_by_index(2)
    assert visible_galleries(page) == titles[2:3]
    page.find_element(By.ID, "run").send_keys(Keys.ARROW_DOWN)
    assert visible_galleries(page) == titles[3:4]


def test_images_are_drawn_and_changed_layers_are_marked_by_more_than_colour(page):
    (gallery,) = visible(page, ".images")
    images = gallery.find_elements(By.TAG_NAME, "img")
    seen = [image for image in images if image.is_displayed()]
    assert (len(images), len(seen)) == (4 * (1 + 2 * 6), 4 * 3)
    assert all(page.execute_script("return arguments[0].naturalWidth", image) == 28 for image in seen)
    (first, *_) = [route for route in gallery.find_elements(By.CSS_SELECTOR, ".route") if route.is_displayed()]
    first = first.find_elements(By.TAG_NAME, "li")
    texts = [layer.get_attribute("textContent").split() for layer in first]
    assert ["≠" in text for text in texts] == [number % 3 == 1 for number in range(8)]
    assert " ".join(texts[1]).startswith("layer 2: expert 1, under attack 0, changed")


def visible(page, selector):
    return [element for element in page.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_slider_steps_through_the_epsilons_by_keyboard(page, width):
    emulate(page, width, "light")
    (slider,) = visible(page, ".slider input")
    readings = []
    for key in (None, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.END):
        if key:
            slider.send_keys(key)
        (output,) = visible(page, ".slider output")
        assert output.text == slider.get_attribute("aria-valuetext")
        steps = {step.get_attribute("data-step") for step in visible(page, ".step")}
        assert steps == {slider.get_attribute("value")}
        changed = sum("≠" in layer.text for layer in visible(page, ".route")[0].find_elements(By.TAG_NAME, "li"))
        (attacked, *_) = visible(page, ".side.step .wrong, .side.step .right")
        readings.append((output.text, attacked.text, changed))
    assert readings == [
        ("epsilon 0.1", "✗ wrong", 3), ("epsilon 0", "✓ right", 0), ("1/4 of epsilon 0.1", "✓ right", 0),
        ("1/2 of epsilon 0.1", "✓ right", 0), ("2 of epsilon 0.1", "✗ wrong", 3),
    ]  # fmt: skip
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_each_run_has_its_own_slider(page):
    Select(page.find_element(By.ID, "run")).select_by_index(2)
    (slider,) = visible(page, ".slider input")
    slider.send_keys(Keys.HOME)
    assert {step.get_attribute("data-step") for step in visible(page, ".step")} == {"0"}
    Select(page.find_element(By.ID, "run")).select_by_index(0)
    assert {step.get_attribute("data-step") for step in visible(page, ".step")} == {"3"}


def test_the_pathway_lights_up_layer_by_layer_unless_motion_is_reduced(page):
    emulate(page, DESKTOP, "light", "no-preference")
    (slider,) = visible(page, ".slider input")
    counts = page.execute_async_script(
        "const [slider, done] = arguments, counts = [];"
        "const count = () => slider.closest('.images').querySelector('.route:not([hidden] *)').querySelectorAll('.unlit').length;"
        "slider.value = 5; slider.dispatchEvent(new Event('input'));"
        "const look = () => { counts.push(count()); if (counts.at(-1) === 0) { clearInterval(watch); done(counts); } };"
        "const watch = setInterval(look, 20);",
        slider,
    )
    assert counts[0] > counts[len(counts) // 2] > counts[-1] == 0
    assert counts == sorted(counts, reverse=True)


def test_cells_that_were_not_run_are_folded_until_requested(page):
    (folded, *_) = page.find_elements(By.CSS_SELECTOR, "section[aria-labelledby=tables] details")
    assert "not run" in folded.find_element(By.TAG_NAME, "summary").text
    assert not folded.find_element(By.TAG_NAME, "table").is_displayed()
    folded.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert folded.find_element(By.TAG_NAME, "table").is_displayed()


def test_runs_unfold_by_keyboard(page):
    run = page.find_element(By.CSS_SELECTOR, "details.run")
    assert not run.find_element(By.TAG_NAME, "pre").is_displayed()
    run.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert "backbone: resnet18" in run.find_element(By.TAG_NAME, "pre").text


def test_the_first_tab_reaches_the_skip_link(page):
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = page.switch_to.active_element
    assert skip.text == "Skip to the verdict"
    skip.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.tag_name == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_text_has_enough_contrast_and_the_page_never_scrolls_sideways(page, width, scheme):
    emulate(page, width, scheme)
    seen, low = page.execute_script(CONTRAST)
    assert seen > 300
    assert low == []
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_theme_follows_the_browsers(page):
    backgrounds = []
    for scheme in ("light", "dark"):
        emulate(page, DESKTOP, scheme)
        backgrounds.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_scrolling_is_not_smooth_with_reduced_motion(page):
    behaviours = []
    for motion in ("no-preference", "reduce"):
        emulate(page, DESKTOP, "light", motion)
        behaviours.append(page.execute_script("return getComputedStyle(document.documentElement).scrollBehavior"))
    assert behaviours == ["smooth", "auto"]


def test_hostile_records_run_no_script(page, tmp_path):
    page.get(write_page(tmp_path, [record("advmoe", classes=[EVIL] * 4, run=EVIL, dataset=EVIL)]))
    assert page.execute_script("return window.hit") is None
    assert EVIL in page.find_element(By.CSS_SELECTOR, ".card h4").text
    assert page.get_log("browser") == []


def test_policy_blocks_added_scripts_and_outside_requests(page):
    page.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.hit = 1'; document.body.append(script);"
        "const image = new Image(); image.src = 'http://127.0.0.1:9/far.png'; document.body.append(image);"
    )
    assert page.execute_script("return window.hit") is None
    refused = [entry["message"] for entry in page.get_log("browser")]
    assert len(refused) == 2
    assert all("Content Security Policy" in message for message in refused)
