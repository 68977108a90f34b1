"""The page of scripts/demo.py: its server, and the page itself in a headless Chromium."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.mt_driver import ENVIRONMENT, digits, train

pytest.importorskip("starlette", reason="the extra demo is not installed")
pytest.importorskip("uvicorn", reason="the extra demo is not installed")


def png(pixels):
    Image.fromarray(pixels).save(content := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def pixels_of(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The address of a page that serves a model of masked digits and their labels, trained for a moment."""
    folder = tmp_path_factory.mktemp("demo")
    train(
        digits(folder / "digits.npz"), folder / "run", "--iterations", 2, "--modalities", "masked:X,label:U"
    )
    words = ["--model_path", folder / "run", "--port", 0, "--max_upload", 0.05]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/demo.py"), *map(str, words)],
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = server.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+", line).group()
    finally:
        server.terminate()
        server.wait(20)


def ask(address, headers=None, **asked):
    """(status, the messages) of a drawing."""
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(f"{address}/draw", json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, [json.loads(line) for line in reply]
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def test_given_pixels_come_back_and_every_part_is_drawn(demo):
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., :3], image[..., 3] = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4, 255
    image[2:5, 2:5, 3] = 0
    status, messages = ask(demo, given={"masked": png(image)}, want=["image", "label"], steps=3, count=2)
    assert status == 200 and [m["step"] for m in messages if "step" in m] == [1, 2, 3]
    found = {one["name"]: one for one in messages[-1]["results"]}
    assert found["masked"]["given"] and not found["image"]["given"] and len(found["label"]["labels"]) == 2
    for url in found["image"]["images"]:
        known = image[..., 3] > 0
        assert (pixels_of(url)[known] == image[..., 0][known]).all()
    first = found["label"]["labels"][0]
    assert 0 < first[0][1] <= 1 and first[0][1] >= first[1][1]
    with Image.open(io.BytesIO(base64.b64decode(messages[-1]["film"].partition(",")[2]))) as film:
        assert film.format == "GIF" and film.n_frames == 3


def test_the_seed_decides_and_a_class_is_given(demo):
    def images(seed):
        _, messages = ask(demo, given={"label": "3"}, want=["image"], steps=2, count=1, seed=seed)
        return messages[-1]["results"][0]["images"]

    assert images(5) == images(5) != images(6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(given={"label": "12"}), "there is no class '12'"),
        (dict(given={"picture": "x"}), "the model has no 'picture'"),
        (dict(given={"image": png(np.zeros((9, 9), np.uint8))}), "must have 8x8 pixels, not 9x9"),
        (dict(given={"image": "data:image/png;base64,AAAA"}), "no PNG image that can be read"),
        (dict(steps=41), "steps must be a whole number from 1 to 40"),
        (dict(count=17), "count must be a whole number from 1 to 16"),
        (dict(seed="7"), "seed must be a whole number"),
        (dict(strength=float("nan")), "strength must be a number"),
        (dict(sampler="euler"), "unknown sampler 'euler'"),
        (dict(given={"image": "A" * 60_000}), "more than 0.05 MiB"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(demo, asked, message):
    status, reply = ask(demo, **asked)
    assert status == 400 and message in reply["error"] and "\n" not in reply["error"]


def test_a_mistake_while_drawing_is_told(demo):
    status, messages = ask(demo, given={"label": "3"}, want=["image"], steps=2, guidance=3.0)
    assert status == 200 and "classifier-free guidance needs" in messages[-1]["error"]


def test_other_sites_cannot_ask(demo):
    """By another name of this machine, or as a form, which browsers send without asking."""
    assert ask(demo, {"Host": "elsewhere.example"})[0] == 400
    status, reply = ask(demo, {"Content-Type": "text/plain"})
    assert status == 400 and "application/json" in reply["error"]


def test_a_full_line_is_refused(tmp_path):
    import threading

    from guided_diffusion.errors import UserError
    from guided_diffusion.mt.page import Desk

    class Slow:
        def draw(self, wish, watch):
            self.go.wait(20)
            raise UserError("done")

    studio = Slow()
    studio.go = threading.Event()

    class Folder:
        def cleanup(self):
            pass

    desk = Desk(studio, most_waiting=1)
    desk.take(None, Folder()), desk.take(None, Folder())
    with pytest.raises(UserError, match="2 drawings are in line"):
        desk.take(None, Folder())
    studio.go.set()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, the system's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        with started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"]) as opened:
            yield opened


def test_load_paint_generate_and_see(demo, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(demo)
    page.wait_for_selector("body[data-ready=yes]")
    image = np.full((8, 8), 200, np.uint8)
    Image.fromarray(image).save(tmp_path / "given.png")
    page.check("#given-image")
    page.click("#go")
    page.locator("#error", has_text="image is given but empty").wait_for()
    (tmp_path / "notes.txt").write_text("not an image")
    page.set_input_files("#file-image", tmp_path / "notes.txt")
    page.locator("#error", has_text="cannot read that file").wait_for()
    page.set_input_files("#file-image", tmp_path / "given.png")
    page.wait_for_selector("#canvas-image[data-empty=false]")
    assert not page.locator("#error").is_visible()
    page.click("#hide-image")
    box = page.locator("#canvas-image").bounding_box()
    cell = box["width"] / 8
    page.mouse.move(box["x"] + 2.5 * cell, box["y"] + 4.5 * cell)
    page.mouse.down()
    page.mouse.move(box["x"] + 5.5 * cell, box["y"] + 4.5 * cell, steps=4)
    page.mouse.up()
    assert page.is_checked("#want-image")  # what is masked is wanted
    page.fill("#steps", "3")
    page.fill("#count", "2")
    page.click("#go")
    page.wait_for_selector("#results:visible", timeout=60_000)
    finished = page.locator("#status", has_text="Done.")
    finished.wait_for()
    made = [pixels_of(page.get_attribute(f"img[alt='image {k}']", "src")) for k in (1, 2)]
    for pixels in made:
        assert (pixels[:4] == 200).all() and (pixels[5:] == 200).all() and (pixels[4, 2:6] != 200).any()
    assert page.locator("#table .bars").count() == 2  # the labels of both
    assert page.locator("#film").is_visible() and page.locator("#beforeafter").is_visible()
    assert page.get_attribute("#gif", "href").startswith("data:image/gif")
    page.click("#play")
    # A mistake stands in the page, and the next drawing clears it.
    page.fill("#steps", "4000")
    page.click("#go")
    page.locator("#error", has_text="from 1 to 40").wait_for()
    page.fill("#steps", "2")
    page.uncheck("#given-image")
    page.check("#given-label")
    page.select_option("#value-label", "7")
    page.click("#go")
    finished.wait_for(timeout=60_000)
    assert not page.locator("#error").is_visible()
    page.fill("#steps", "40")
    page.fill("#count", "16")
    page.click("#go")
    page.locator("#status", has_text="Step").wait_for()
    page.click("#stop")
    page.locator("#status", has_text="Stopped.").wait_for()
    assert [w for w in wrong if "400" not in w] == []
    assert all(url.startswith((demo, "data:", "blob:")) for url in asked)  # nothing from elsewhere


def test_a_taken_port_is_one_line(demo, tmp_path):
    port = demo.rpartition(":")[2]
    words = [sys.executable, str(ROOT / "scripts/demo.py"), "--model_path", str(tmp_path), "--port", port]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "give another --port" in done.stderr


@pytest.mark.parametrize("kind", ["joint", "classes"])
def test_latent_models_are_drawn_too(kind, tmp_path):
    """The page's job on a run of main.py, image maps given or a class."""
    from guided_diffusion.mt.page import Job, Wish
    from ldm.page import LatentStudio
    from tests.ldm_models import CLASSES, unet_config
    from tests.test_ldm_scripts_sample import write_run

    if kind == "joint":
        spec = {"label_map": {"preset": "image", "variant": "X"}}
        folder, _ = write_run(tmp_path / "run", "joint.JointLatentDiffusion", modalities=spec)
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(tmp_path / "map.png")
        given = [f"label_map={tmp_path / 'map.png'}"]
    else:
        network = unet_config(use_spatial_transformer=True, context_dim=6)
        changes = dict(cond_stage_config=CLASSES, cond_stage_key="class_label", unet_config=network)
        folder, _ = write_run(tmp_path / "run", conditioning_key="crossattn", **changes)
        given = ["class_label=3"]
    studio = LatentStudio(str(folder))
    assert [part.name for part in studio.parts] == ["image", given[0].partition("=")[0]]
    assert (studio.parts[0].height, studio.parts[0].width, studio.timesteps) == (16, 16, 40)
    job = Job(Wish(given, ["image"], 2, 4, "ddim", 1.0, 1.0, 0, False), None, 0)
    job.run(studio)
    messages = []
    while (message := job._messages.get()) is not None:
        messages.append(message)
    assert "error" not in messages[-1], messages[-1]
    found = {one["name"]: one for one in messages[-1]["results"]}
    assert pixels_of(found["image"]["images"][1]).shape == (16, 16, 3)
    if kind == "joint":
        assert found["label_map"]["given"] and (pixels_of(found["label_map"]["images"][0]) == 9).all()
    assert [m["step"] for m in messages if "step" in m] == [1, 2, 3, 4]
