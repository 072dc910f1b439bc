"""The report of `dskd compare`, also in a real browser, and its link to MLflow."""

import json
import re
import shutil
import subprocess
import sys
from urllib.parse import parse_qs

import numpy as np
import pytest
from PIL import Image

from dskd.__main__ import main
from dskd.compare.mlflow_link import mlflow_link
from dskd.compare.pictures import paint
from dskd.config.reading import load_config
from dskd.tracking import read_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tracked, tmp_path_factory):
    """The report of the default selection, as the command writes it."""
    path = tmp_path_factory.mktemp("report") / "new folder" / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dskd", "compare", "--config", str(tracked[0]), "--html", str(path)])
        assert main() == 0
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path


def test_the_link_is_mlflows_own(tracked):
    path, ids = tracked
    config = load_config(path)
    runs = [run for run in read_runs(config) if run.name in ("kd-s0", "margin")]
    expected = {"runs": [ids["margin"], ids["kd-s0"]], "experiments": [runs[0].experiment_id]}
    local = mlflow_link(config, runs)
    assert local.command.endswith(f"mlflow ui --backend-store-uri sqlite:///{config.path('mlflow.db').resolve()}")
    served = mlflow_link(load_config(path, ["tracking.uri=https://me:secret@mlflow.example.org/base/"]), runs)
    assert served.command is None
    for link, server in ((local, "http://127.0.0.1:5000"), (served, "https://mlflow.example.org/base")):
        start, question = link.address.split("?")
        assert start == f"{server}/#/compare-runs"
        assert {key: json.loads(value) for key, (value,) in parse_qs(question).items()} == expected


def test_the_report_is_one_file_that_links_only_to_mlflow(report):
    page = report.read_text(encoding="utf-8")
    targets = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)""", page)
    outside = [target for target in targets if not target.startswith("#")]
    assert len(outside) == 1
    assert outside[0].startswith("http://127.0.0.1:5000/#/compare-runs?runs=")
    assert not re.search(r"<script|@import|url\((?!#)|<link|<iframe", page)
    assert "<b>words</b>" not in page
    assert "senses &amp; &lt;b&gt;words&lt;/b&gt;" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)  # those of one picture are not another's


@pytest.fixture(scope="module")
def browser():
    """A browser that shows a file and can neither resolve a name nor reach an address."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium; `make test` installs it where it is root: apt-get install chromium")

    def show(page, *options):
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return show


def test_a_browser_without_network_shows_the_report(report, browser, tmp_path):
    shown = browser(report, f"--screenshot={tmp_path / 'report.png'}", "--window-size=1280,2400", "--dump-dom")
    pixels = np.asarray(Image.open(tmp_path / "report.png").convert("RGB"))
    assert pixels.shape == (2400, 1280, 3)
    assert (pixels == 255).all(-1).mean() > 0.5  # dark on white
    assert (pixels.max(-1) < 90).mean() > 0.01  # text
    for number in range(2):  # bars, and not only the small squares before a group's name
        color = [int(paint(number)[0][at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - color).max(-1) < 3).sum() > 5000, number

    parts = ("held-out-text", "tests", "settings", "curves", "runs")
    assert [shown.count(f'<section id="{part}">') for part in parts] == [1] * 5
    assert len(re.findall(r"<figure[^>]*><svg [^>]*>", shown)) == 4  # bars, two kinds of tests, curves
    for cell in (r"kd</th>", r"<td[^>]*>loss\.sense_weight|<th[^>]*>loss\.sense_weight</th>", r"better</td>"):
        assert re.search(cell, shown), cell
