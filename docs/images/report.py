"""Makes the picture of a report, report.png, in a headless Chromium: `python docs/images/report.py [CHROMIUM]`.

What it shows is made up: a model of 62 layers of 32 tiny experts, and a copy of it in which some experts were moved,
later layers more. It takes a minute, the packages of the extra `test`, and 300 MB of room for temporary files.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

import minimax_jax as mj
from minimax_jax import synthetic

PICTURE = Path(__file__).resolve().with_name("report.png")
CONFIG = synthetic.config(layers=62, experts=32)
WIDTH, HEIGHT = 1200, 1740


def main():
    chromium = sys.argv[1] if len(sys.argv) > 1 else shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        base, tuned, page = (Path(name) for name in ("MiniMax-M2", "my-finetune", "report.html"))
        synthetic.synthesize(base, CONFIG)
        shutil.copytree(base, tuned)
        move(tuned)
        mj.report(base, tuned, output=page)
        shoot(page, chromium)


def move(folder):
    """Change the block scales of experts: of few in early layers, of many in late ones."""
    random = np.random.default_rng(0)
    layers, experts = CONFIG.num_hidden_layers, CONFIG.num_local_experts
    popularity = random.pareto(1.5, experts) * random.random((layers, experts))
    factors = 1 + 0.01 * popularity * (np.linspace(0.2, 1, layers) ** 2)[:, None]
    for file in folder.glob("*.safetensors"):
        data = np.memmap(file, mode="r+")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        for key in filter(is_expert_scale, header):
            layer, expert = (int(step) for step in key.split(".") if step.isdigit())
            scales = data[start:][slice(*header[key]["data_offsets"])].view(np.float32)
            scales *= np.float32(factors[layer, expert])


def is_expert_scale(key):
    return ".experts." in key and key.endswith("_scale_inv")


def shoot(page, chromium):
    """The top of the page."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("body[data-drawn]")
        tab.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
