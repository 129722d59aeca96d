"""The demo page: what it shows, and the page itself in a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from processes import ROOT
from recipe_runs import free_port

from demo.equilibrium import EVALUATIONS, approach, draw_approach, pcdeq_layers
from pcdeq_zoo import DATASETS, enclosure
from pcdeq_zoo.data import normalize


@pytest.mark.parametrize("name", ["pcdeq1_l_tanh_mnist", "pcdeq1_mc_softsign_mnist"])
def test_the_equilibrium_is_between_what_rises_and_what_falls(name: str, sample, tmp_path):
    model = timm.create_model(name, pretrained=True).eval()
    image = normalize(sample[0][:1], DATASETS["mnist"])
    layers = list(pcdeq_layers(model, image))
    assert len(layers) == (3 if "mc" in name else 1)
    for title, layer, u in layers:
        way = approach(layer, u)
        assert (way.below.diff(dim=0) >= -1e-12).all()
        assert (way.above.diff(dim=0) <= 1e-12).all()
        with torch.no_grad():
            lower, upper = enclosure(layer, u, tol=1e-9)
        # Of the float32 layer, whose W and x are rounded.
        assert (way.below[-1] <= upper[0].view_as(way.below[-1]) * (1 + 1e-5)).all()
        assert (way.above[-1] >= lower[0].view_as(way.above[-1]) * (1 - 1e-5)).all()
        assert len(way.gaps) == len(way.changes) == EVALUATIONS
        assert way.gaps[-1] < way.gaps[0]
        assert way.changes[-1] < way.gaps[-1]  # which is why a criterion of changes proves nothing
        draw_approach(way, title).savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["svhn", "cifar"])
def test_what_is_transparent_is_white(name: str, monkeypatch):
    """A canvas is transparent where nothing was drawn, and a stroke is black."""
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    monkeypatch.syspath_prepend(ROOT / "demo")  # a Space has it so
    from app import pixels_of

    drawn = Image.new("RGBA", (320, 320), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (140, 40, 180, 280))
    pixels, told = pixels_of(drawn, DATASETS[name])
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, 0, 0] == 255).all()
    assert (pixels[:, 16, 16] == 0).all()
    assert told == "320x320 RGBA"


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of a page that is served without a network."""
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    port = free_port()
    command = [sys.executable, str(ROOT / "demo" / "app.py"), "--port", str(port)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=offline)
    try:
        for _ in range(300):
            assert server.poll() is None, server.stdout.read().decode()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: make test-page")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver: Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    for flag in (*flags.split(), "disable-component-update", "enable-unsafe-swiftshader", f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 1600), (390, 1800)], ids=["desktop", "phone"])
def test_draw_press_and_read(page: str, browser, size: tuple[int, int], tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector: str) -> Any:
        wait = WebDriverWait(browser, 60)
        return wait.until(lambda it: next(iter(it.find_elements(By.CSS_SELECTOR, selector)), None))

    def read(selector: str, text: str) -> str:
        WebDriverWait(browser, 120).until(lambda _: text in find(selector).text)
        return find(selector).text

    browser.set_window_size(*size)
    browser.get(page)
    canvas = find("#drawing canvas")
    find('#drawing button[aria-label="Brush"]')
    time.sleep(2)  # the page takes the brush itself
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    stroke = ActionChains(browser).move_to_element_with_offset(canvas, -50, -70).click_and_hold()
    for across, down in [(10, 0)] * 10 + [(-4, 10)] * 14:  # a seven
        stroke = stroke.move_by_offset(across, down)
    stroke.release().perform()
    browser.execute_script("arguments[0].click()", find("#classify"))
    told = read("#told", "the label")
    assert told.startswith("A 7, from a picture of ")
    assert "deq3" in told
    assert find("#prediction").text.split()[1] == "7"
    assert find("#figure img").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1")

    if folder := os.environ.get("PCDEQ_SCREENSHOTS"):
        browser.execute_script("window.scrollTo(0, 0)")
        browser.save_screenshot(str(Path(folder) / f"demo-{size[0]}.png"))

    browser.execute_script("arguments[0].click()", find("#samples button.thumbnail-item"))
    assert read("#told", "from a picture of 28x28 L").startswith("A 0, ")
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
