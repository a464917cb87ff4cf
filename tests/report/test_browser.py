"""Pages in headless Chromium: clicked, slid, hovered, on a wide and on a narrow screen, in the dark and in the light.

Skipped where there is no Chromium with its driver. With LATENTCODEC_AXE, the path of an axe.min.js, pages are checked
for access as well.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from latentcodec.pixels import save_image
from latentcodec.report.build import build_page, write_result

selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DRIVER and BROWSER), reason="no Chromium with chromedriver"),
]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1")  # fmt: skip
TOO_WIDE = """
const width = document.documentElement.clientWidth;
const inside = element => element.closest(".wide, .stage, .pictures, svg, .hidden, thead");
return [...document.querySelectorAll("main *")]
  .filter(element => element.getBoundingClientRect().right > width + 1 && !inside(element))
  .map(element => element.outerHTML.slice(0, 80));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a tiny codec of 1 x 1 latents, which has every block."""
    from diffusers import AutoencoderKL

    from latentcodec.codec import LatentCodec
    from latentcodec.report import inspection

    place = tmp_path_factory.mktemp("page")
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        colour = torch.rand(3, 4, 4, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(colour[None], size=(16, 16), mode="bilinear")
        save_image(image, place / "images" / ("a" if number % 2 else "b") / f"{number}.png")
    vae = AutoencoderKL(block_out_channels=(8,) * 5, down_block_types=("DownEncoderBlock2D",) * 5, norm_num_groups=2,
                        up_block_types=("UpDecoderBlock2D",) * 5, latent_channels=3)  # fmt: skip
    codec = LatentCodec(vae)
    looked = inspection.open_images(place / "images", 3, 16)
    data = inspection.inspect_codec(codec, "tiny", place / "images", looked)
    return Path(write_result(data, place, "tiny")["html"]).as_uri()


def opened(browser, page, width=1400, theme="light"):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)
    return browser


@pytest.mark.parametrize(("width", "theme"), [(1400, "light"), (420, "dark")])
def test_nothing_is_cut_off_and_nothing_is_fetched(browser, page, width, theme):
    opened(browser, page, width, theme)
    browser.execute_script("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(TOO_WIDE) == []
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if theme == "light" else "rgb(13, 17, 23)")


def test_the_viewer_slides_flickers_subtracts_and_zooms(browser, page):
    opened(browser, page)
    viewer = browser.find_element(By.CSS_SELECTOR, ".viewer")
    over = viewer.find_element(By.CSS_SELECTOR, ".over")
    divider = viewer.find_element(By.CSS_SELECTOR, ".divider")
    before = over.value_of_css_property("clip-path")
    divider.send_keys(Keys.ARROW_RIGHT * 10)
    assert over.value_of_css_property("clip-path") != before

    def press(selector):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", viewer)
        viewer.find_element(By.CSS_SELECTOR, selector).click()

    press("[data-mode=difference]")
    assert over.value_of_css_property("mix-blend-mode") == "difference"
    press("[data-mode=flicker]")
    seen = {over.value_of_css_property("visibility") for _ in range(200)}
    assert seen <= {"visible", "hidden"}
    pan = viewer.find_element(By.CSS_SELECTOR, ".pan")
    press("[data-zoom='1']")
    assert pan.size["width"] == 16  # a pixel of the picture is one of the screen
    press("[data-zoom='8']")
    assert pan.size["width"] == 8 * 16
    shown = over.get_attribute("src")
    Select(viewer.find_element(By.CSS_SELECTOR, ".right")).select_by_index(2)
    assert over.get_attribute("src") != shown
    shown = over.get_attribute("src")
    viewer.find_elements(By.CSS_SELECTOR, ".samples button")[2].click()
    assert over.get_attribute("src") != shown


def test_pointing_at_the_map_shows_the_tile_under_it(browser, page):
    opened(browser, page)
    chart = browser.find_element(By.CSS_SELECTOR, ".atlas .map")
    tile = browser.find_element(By.CSS_SELECTOR, ".atlas .tile")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    places = []
    for offset in (-100, 100):
        selenium.ActionChains(browser).move_to_element_with_offset(chart, offset, 0).perform()
        places.append(tile.get_attribute("data-place"))
    assert None not in places
    assert places[0] != places[1]
    assert "data:image/webp" in tile.value_of_css_property("background-image")


def test_a_table_sorts_by_the_column_that_is_clicked(browser, page):
    opened(browser, page)
    browser.execute_script("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    table = browser.find_elements(By.CSS_SELECTOR, "table.sortable")[-1]
    button = table.find_element(By.CSS_SELECTOR, "th:nth-child(2) button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()

    def column():
        return [float(cell.text) for cell in table.find_elements(By.CSS_SELECTOR, "td:nth-child(2)")]

    rising = column()
    button.click()
    assert rising == sorted(rising)
    assert column() == rising[::-1]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(browser, page, theme):
    script = os.environ.get("LATENTCODEC_AXE")
    if not script:
        pytest.skip("LATENTCODEC_AXE names no axe.min.js")
    opened(browser, page, 420, theme)
    browser.execute_script(Path(script).read_text())
    found = browser.execute_async_script(
        "axe.run().then(result => arguments[0](result.violations.map(v => [v.id, v.impact, v.nodes[0].html])))"
    )
    assert found == []


def test_every_kind_of_committed_result_fits_a_narrow_screen(browser, tmp_path):
    import json

    for path in (Path(__file__).parents[2] / "bench/results").glob("*.json"):
        target = tmp_path / f"{path.stem}.html"
        target.write_text(build_page(json.loads(path.read_text())).render())
        opened(browser, target.as_uri(), 420, "dark")
        assert browser.execute_script(TOO_WIDE) == []
