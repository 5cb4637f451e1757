"""The pages of `distseg report`: what they say, and what a browser makes of them."""

import csv
import html
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distseg.commands.report import write_report
from distseg.config_files import config_as_yaml, load_config
from distseg.errors import DistsegError
from distseg.files import write_json
from distseg.pictures import LABEL_COLOURS
from distseg.reporting.charts import Axis, Dot, heat_map, scatter
from distseg.reporting.evaluated import read_splits
from distseg.reporting.page import UNDEFINED, label, shown
from distseg.reporting.probabilities import best_threshold, calibration, threshold_scores
from distseg.runs.trained import save_best
from distseg.scoring.evaluation import evaluate_run
from distseg.studies.grid import load_study
from distseg.studies.task import State, task_of, write_config
from distseg.tables import write_csv

REGIONS = {"lung": (1, 2), "infection": (2,)}
ONE = {"infection": (1,)}
FIVE = {
    "lung": (1, 2, 3, 4),
    "infection": (2, 3, 4),
    "ground_glass": (3,),
    "consolidation": (4,),
    "pleural_effusion": (5,),
}
PLAIN = {"threshold": 0.5, "seed_threshold": None, "components": None, "inside": None}
PIXEL = bytes.fromhex(  # a PNG of one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200817"
    "7cd72b60000000049454e44ae426082"
)
HOSTILE = "<script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training and `distseg evaluate` leave it, of thirty patients with long names."""
    root = tmp_path_factory.mktemp("report") / "unetplusplus_densenet161"
    write_run(root, n_patients=30)
    write_report(root)
    return root


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five regions."""
    root = tmp_path_factory.mktemp("report") / "five"
    write_run(root, n_patients=12, regions=FIVE)
    write_report(root)
    return root


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a single region."""
    root = tmp_path_factory.mktemp("report") / "one"
    write_run(root, n_patients=3, regions=ONE)
    write_report(root)
    return root


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders with two decoders: one run has a page, one has failed, one waits."""
    root = tmp_path_factory.mktemp("report") / "study"
    write_study(root)
    write_report(root)
    return root


def test_every_number_of_the_summary_is_on_the_page(run: Path) -> None:
    text = text_of(run)
    for split in ("val", "test"):
        summary = json.loads((run / f"eval/{split}/summary.json").read_text())
        for name, value in numbers(summary["regions"]):
            assert shown(value, name) in text, f"{split} {name} {value}"
        for heading, key in (
            ("Threshold", "threshold"),
            ("Patient resamples behind intervals", "bootstrap_resamples"),
            ("Volumes without spacing", "n_without_spacing"),
        ):
            assert f"{heading} {summary[key]}" in text
        assert f"of {summary['n_patients']} patient" in text


def test_scores_of_weights_that_are_no_longer_the_best_are_said_to_be(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old"))
    assert "Scored before the end" not in text_of(run)
    path = old / "eval/val/summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"model": {"step": "7"}}))
    shutil.copytree(old / "eval/val", old / "eval/.partial-1234-val")  # as a kill leaves it
    splits = [split.name for split in read_splits(old)]
    write_report(old)
    assert splits == ["val", "test"] and "Validation stale" in text_of(old)
    assert "Scored before the end: they are of the weights of step 7; the best are of step 60 now" in text_of(old)


def test_scores_that_are_older_than_the_post_processing_are_stale(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "a run"))
    rules = {region: PLAIN for region in REGIONS}
    summary = old / "eval/test/summary.json"
    write_json(old / "postprocessing.json", {"rules": rules})

    def stale() -> list[str]:
        return [split.name for split in read_splits(old) if split.stale]

    tuned = json.loads((old / "eval/val/summary.json").read_text()) | {"postprocessing": rules}
    write_json(old / "eval/val/summary.json", tuned)  # as `distseg evaluate --tune` leaves it
    assert stale() == ["test"]
    lines = write_report(old)
    assert [line for line in lines if "stale" in line] == [line for line in lines if line.startswith("test ")]
    text = text_of(old)
    assert text.count("Test stale") == 1 and f"distseg evaluate '{old}' --split test" in text
    assert text.index("Test stale") < text.index("Validation: 30 volumes"), "on top"
    # New scores, and those that were asked for without rules.
    for made_with in (rules, None):
        write_json(summary, json.loads(summary.read_text()) | {"postprocessing": made_with})
        assert stale() == []
    write_json(old / "postprocessing.json", {"rules": rules | {"lung": PLAIN | {"threshold": 0.4}}})
    assert stale() == ["val", "test"]
    (old / "postprocessing.json").write_text("{")  # `distseg evaluate` says what is wrong with it
    assert stale() == []


def test_the_summary_has_a_row_a_region_and_a_column_a_split(five: Path) -> None:
    page = (five / "report.html").read_text()
    table = page.split('aria-label="Summary')[1].split("</table>")[0]
    assert re.findall(r'<i class="swatch c(\d)"></i>([a-z_]+)<', table) == [
        (str(number), region) for number, region in enumerate(FIVE)
    ]
    assert re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', table) == ["Region", "Validation", "Test"]
    cells = re.findall(r"<strong>([\d.]+)</strong> <span>([^<]*)</span> <span>([^<]*)</span>", table)
    expected = []
    for region in FIVE:
        for split in ("val", "test"):
            dice = json.loads((five / f"eval/{split}/summary.json").read_text())["regions"][region]["dice"]
            ends = f"{shown(dice['ci95'][0])} to {shown(dice['ci95'][1])}" if dice["ci95"] else UNDEFINED
            expected.append((shown(dice["mean"]), ends, f"{dice['n']} volume{'s' if dice['n'] > 1 else ''}"))
    assert cells == expected
    assert page.index(table) < page.index('<h2 id="val"'), "on top"


def test_a_region_has_one_colour_in_all_charts(five: Path) -> None:
    page = (five / "report.html").read_text()
    assert all(f".c{n} {{ --c: {colour}; }}" in page for n, colour in enumerate(LABEL_COLOURS))
    for number, region in enumerate(FIVE):
        drawn = re.findall(rf'<g class="(c\d+|neutral)"><title>{region}(?:, training|, validation)?</title>', page)
        assert set(drawn) == {f"c{number}"} and len(drawn) >= 3  # training, validation, calibration


def test_every_patient_and_every_volume_has_a_row(run: Path) -> None:
    text = text_of(run)
    for name in ("per_case", "per_patient"):
        with (run / f"eval/val/{name}.csv").open() as file:
            for row in csv.DictReader(file):
                assert row["patient"] in text and (row["case"] in text or row["case"] == "all")
                assert shown(row["infection_dice"]) in text


def test_undefined_is_a_dash() -> None:
    assert [shown(value) for value in (None, "", math.nan)] == [UNDEFINED] * 3
    assert [shown(value, "hd95_mm") for value in (1234.5, -0.001)] == ["1,234.50", "0.00"]
    assert label("nsd_1mm") == "NSD at 1 mm" and label("hd95_mm") == "HD95, mm" and label("own_score") == "Own score"


def test_the_page_names_no_other_file(run: Path, study: Path) -> None:
    for folder in (run, study):
        page = (folder / "report.html").read_text()
        assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
        addresses = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)""", page)
        assert all(address.startswith(("data:image/png;base64,", "#", "runs/")) for address in addresses)


def test_a_name_cannot_become_part_of_the_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert HOSTILE not in page and html.escape(HOSTILE, quote=False) in page.replace("&#39;", "'")


def test_failures_are_listed_by_kind_with_their_numbers(run: Path) -> None:
    text = text_of(run).split("Failures")[1].split("All scores")[0]
    for kind in ("false alarm", "missed", "Dice below 0.5"):
        assert kind in text
    assert "Without spacing" in text and "patient-000_series-0" in text.split("Without spacing")[1]


def test_how_it_was_made_is_said(run: Path) -> None:
    text = text_of(run)
    assert "Leaky split." in text and "The store cannot be read any more" in text
    assert "the 2 largest components, inside lung" in text and "Test-time augmentation yes" in text
    assert "best: step 60" in text and "Expected calibration error: lung 0." in text and "in use 0.4" in text
    assert "encoder: densenet161" in text and '"precision": "bf16"' in text


def test_patients_are_named_where_the_store_is(small_run: Path, store: Path, tmp_path: Path) -> None:
    """On what training and `distseg evaluate` really leave."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns("checkpoints", "eval"))
    write_report(run)
    assert "Not scored yet" in text_of(run)
    summary = evaluate_run(run, "val")
    lines = write_report(run)
    assert lines == [f"val {name}: Dice {shown(entry['dice']['mean'])}" for name, entry in summary["regions"].items()]
    text = text_of(run)
    for name, value in numbers(summary["regions"]):
        assert shown(value, name) in text
    folds = json.loads((store / "store.json").read_text())["folds"]
    assert all(patient in text.split("Data Store")[1] for patient in (*folds["folds"][0], *folds["test"]))
    assert (run / "report.html").read_text().count("data:image/png;base64,") >= 3


def test_a_study_shows_best_failed_and_links_that_exist(study: Path) -> None:
    page, text = (study / "report.html").read_text(), text_of(study)
    links = re.findall(r'href="(runs/[^"]*)"', page)
    assert links == ["runs/unetplusplus_gernet_s_fold0_seed0/report.html"] and (study / links[0]).is_file()
    assert "Runs done 2 of 4" in text and "CUDA out of memory" in text.split("Failed runs")[-1]
    assert re.findall(r"<b>([\d.]+)<span", page) == ["0.960", "0.700"], "bold is the highest mean, once a region"
    assert page.count("<figcaption>Mean Dice") == 2 and page.count("<figcaption>Cost against Dice") == 2


def test_a_folder_that_is_neither_is_refused_in_one_line(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    done = run_command("distseg", "report", tmp_path, ok=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "without config.yaml or study.yaml; it must be the folder of a run or a study" in done.stderr
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(DistsegError, match="without best/weights.safetensors"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_thresholds_and_calibration_are_those_of_the_voxels() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(20_000)
    truth = rng.random(20_000) < probability**2
    bins = np.minimum((probability * 100).astype(int), 99)
    positive, negative = (np.bincount(bins[truth == inside], minlength=100).tolist() for inside in (True, False))
    for one in threshold_scores(positive, negative):
        mask = bins >= round(one.threshold * 100)
        tp, fp, fn = (mask & truth).sum(), (mask & ~truth).sum(), (~mask & truth).sum()
        assert one.dice == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert one.precision == pytest.approx(tp / (tp + fp)) and one.sensitivity == pytest.approx(tp / (tp + fn))
    found = calibration(positive, negative)
    assert found.error == pytest.approx(1 / 6, abs=0.02), "the mean of p - p^2"
    assert all(share == pytest.approx(middle**2, abs=0.06) for middle, share in found.points)
    perfect = calibration([0] * 99 + [10], [90] + [0] * 99)
    assert (perfect.error, perfect.error_above) == pytest.approx((0, 0), abs=1e-12)
    empty = [0] * 100
    assert math.isnan(calibration(empty, empty).error) and best_threshold(threshold_scores(empty, empty)) is None


def test_ticks_are_round_and_inside() -> None:
    assert Axis("x", 0, 1).ticks == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert Axis("x", 0, 1234).ticks == [0, 250, 500, 750, 1000]
    assert Axis("x", 3, 60, log=True).ticks == [5, 10, 20, 50]
    assert Axis("x", 0.18, 0.25, log=True).ticks == [0.18, 0.2, 0.22, 0.24]
    for values in ([], [5.0], [0.0, 0.0], [1e-6, 2e-6], [-3.0, 1e6]):
        axis = Axis.around("x", values)
        assert axis.low < axis.high and 1 <= len(axis.ticks) <= 12
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_charts_bear_what_is_undefined_and_what_is_hostile() -> None:
    x, y = Axis("x", 1, 10), Axis("y", 0, 1)
    drawn = scatter("t", x, y, [Dot(HOSTILE, 2, math.nan, "g"), Dot(HOSTILE, 3, 0.5, "g", label=HOSTILE)], ["g"])
    assert HOSTILE not in drawn and "nan" not in drawn and drawn.count('class="dot"') == 1
    cells = heat_map("t", ["a", HOSTILE], ["b"], {("a", "b"): math.nan})
    assert HOSTILE not in cells and cells.count("unknown") == 2


# What a browser makes of them.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium that can reach nothing but files."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: bash tests/run.sh installs it")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("Chromium is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    words = [
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "host-resolver-rules=MAP * ~NOTFOUND",
    ]
    for word in words:  # without a sandbox, for root has none; shared memory is small in containers
        options.add_argument(f"--{word}")
    local = {"no_proxy": "localhost,127.0.0.1", "NO_PROXY": "localhost,127.0.0.1"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in local.items():
            patched.setenv(name, value)
        driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=programs[1]))
        try:
            yield driver
        finally:
            driver.quit()


def test_a_click_and_a_key_sort_a_table(run: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, run)
    table = browser.find_element("css selector", "[aria-label='Volumes, Validation'] table")

    def column(n: int) -> list[str]:
        return browser.execute_script(
            f"return [...arguments[0].tBodies[0].rows].map(r => r.cells[{n}].innerText)", table
        )

    def sorts() -> list[str]:
        heads = table.find_elements("css selector", "th[data-column]")
        return [state for head in heads if (state := head.get_attribute("aria-sort")) != "none"]

    heads = table.find_elements("css selector", "th[data-column]")
    dice = next(head for head in heads[9:] if head.text.startswith("Dice"))
    place = int(dice.get_attribute("data-column"))
    before = column(place)
    assert sorts() == [] and UNDEFINED in before
    button = dice.find_element("css selector", "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
    button.click()
    ascending = column(place)
    defined = [float(text) for text in ascending if text != UNDEFINED]
    assert sorts() == ["ascending"] and ascending != before and sorted(ascending) == sorted(before)
    assert defined == sorted(defined) and ascending[len(defined) :] == [UNDEFINED] * (len(before) - len(defined))
    assert browser.switch_to.active_element == button
    button.send_keys(Keys.ENTER)
    descending = [text for text in column(place) if text != UNDEFINED]
    assert sorts() == ["descending"] and [float(text) for text in descending] == defined[::-1]
    assert column(place)[-1] == UNDEFINED, "undefined stays last"
    names = table.find_element("css selector", "th[data-column='0'] button")
    names.send_keys(Keys.SPACE)
    assert sorts() == ["ascending"] and column(0)[:2] == ["patient-000_series-0", "patient-001_series-0"]


@pytest.mark.parametrize("kind", ["run", "study"])
def test_the_page_loads_nothing_and_complains_of_nothing(kind: str, browser: Any, request: Any) -> None:
    browser.get_log("performance"), browser.get_log("browser")
    open_page(browser, request.getfixturevalue(kind))
    assert browser.title != "taken"
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:///", "data:image/png")) for url in asked)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("kind", ["one", "run", "five", "study"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_but_tables_and_pictures_scrolls_sideways(kind: str, width: int, browser: Any, request: Any) -> None:
    open_page(browser, request.getfixturevalue(kind), width=width, folded=False)
    wide = """
        const inside = box => box.closest(".scroll, .drawing, pre, .unseen");
        return [...document.querySelectorAll("body *")].filter(
            box => !inside(box) && box.getBoundingClientRect().right > innerWidth + 0.5).map(box => box.outerHTML.slice(0, 80))
    """
    beyond = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    assert browser.execute_script(beyond) == 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script(wide) == []


@pytest.mark.parametrize("kind", ["run", "study"])
def test_dark_and_light_differ_and_both_can_be_read(kind: str, browser: Any, request: Any) -> None:
    pages = {}
    for scheme in ("light", "dark"):
        open_page(browser, request.getfixturevalue(kind), scheme=scheme, folded=False)
        pages[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert browser.execute_script(POOR_CONTRAST) == [], scheme
    assert pages["light"] != pages["dark"]


@pytest.mark.parametrize("kind", ["run", "study"])
def test_the_page_is_whole_without_script(kind: str, browser: Any, request: Any) -> None:
    folder = request.getfixturevalue(kind)
    texts = []
    for disabled in (False, True):
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": disabled})
        try:
            open_page(browser, folder)
            texts.append(browser.execute_script("return document.body.innerText.replace(/\\s+/g, ' ')"))
            buttons = len(browser.find_elements("css selector", "button"))
        finally:
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        assert (buttons == 0) == disabled, "a button that does nothing is not shown"
    assert texts[0] == texts[1] and len(texts[0]) > 1000


@pytest.mark.parametrize("kind", ["run", "study"])
def test_the_page_can_be_heard_and_reached_by_keys(kind: str, browser: Any, request: Any) -> None:
    open_page(browser, request.getfixturevalue(kind), width=390, folded=False)
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    unnamed = """
        return [...document.querySelectorAll("img:not([alt]), svg:not([aria-label]):not([aria-hidden]), table")].filter(
            it => it.tagName !== "TABLE" || [...it.querySelectorAll("th")].some(th => !th.scope)).map(it => it.outerHTML)
    """
    assert browser.execute_script(unnamed) == []
    assert browser.execute_script("return document.documentElement.lang") == "en"
    unreachable = """
        return [...document.querySelectorAll(".scroll, pre, .drawing")].filter(
            box => box.scrollWidth > box.clientWidth && box.tabIndex !== 0).map(box => box.outerHTML.slice(0, 80))
    """
    assert browser.execute_script(unreachable) == []
    same = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert browser.execute_script(same) == 0
    anchors = "return [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).length"
    assert browser.execute_script(anchors) == 0
    outline = "const a = document.querySelector('nav a'); a.focus({focusVisible: true}); return getComputedStyle(a).outlineStyle"
    assert browser.execute_script(outline) == "solid"


# Text whose colour is less than 4.5 apart from what is behind it (WCAG 2.2, 1.4.3); in SVG, behind is the cell or the card.
POOR_CONTRAST = """
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                             return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = box => {
        const cell = box.closest("g.cell");
        if (cell) return rgba(getComputedStyle(cell.querySelector("rect")).fill);
        for (let at = box; at; at = at.parentElement) {
            const colour = rgba(getComputedStyle(at).backgroundColor);
            if (colour[3] === 255) return colour;
        }
    };
    const poor = [];
    for (const box of document.querySelectorAll("body *")) {
        if (![...box.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
        if (["SCRIPT", "STYLE", "title"].includes(box.tagName)) continue;
        const style = getComputedStyle(box);
        const [one, other] = [light(rgba(box instanceof SVGElement ? style.fill : style.color)), light(behind(box))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${box.outerHTML.slice(0, 90)}`);
    }
    return poor;
"""


def open_page(browser: Any, folder: Path, width: int = 1200, scheme: str = "light", folded: bool = True) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((folder / "report.html").as_uri())
    if not folded:
        browser.execute_script("for (const box of document.querySelectorAll('details')) box.open = true")


def text_of(folder: Path) -> str:
    """What is to be read on a page, on one line."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", (folder / "report.html").read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def numbers(values: dict[str, Any], name: str = "") -> Iterator[tuple[str, float | None]]:
    """(score, value) of all numbers in a summary."""
    for key, value in values.items():
        own = name if key in ("mean", "ci95", "n") else key
        if isinstance(value, dict):
            yield from numbers(value, own)
        elif isinstance(value, list):
            yield from ((own, end) for end in value)
        elif isinstance(value, float):
            yield own, value


def write_run(root: Path, n_patients: int, regions: Mapping[str, Sequence[int]] = REGIONS) -> None:
    told = json.dumps({name: list(labels) for name, labels in regions.items()})
    config = load_config(
        None,
        ["data.store=/gone/store", "data.leaky_slice_split=true", "model.encoder=densenet161", f"regions={told}"],
    )
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(config_as_yaml(config))
    write_json(root / "environment.json", {"precision": "bf16", "world_size": 2})
    save_best(root / "best/weights.safetensors", {"w": torch.zeros(1)}, {"step": "60", "mean_dice": "0.81"})
    rows = []
    for step in range(1, 101):
        known = {region: 0.95 - 0.12 * number - 0.5 / step for number, region in enumerate(regions)}
        dice = known | {"infection": None if step < 3 else known["infection"]}
        rows.append({"step": step, "epoch": step // 20, "split": "train", "loss": 1 / step, "dice": dice})
        if step % 20 == 0:
            rows.append(rows[-1] | {"split": "val", "mean_dice": 0.8})
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("val", "test"):
        write_evaluation(root / "eval" / split, split, n_patients if split == "val" else 1, list(regions))


def write_evaluation(folder: Path, split: str, n_patients: int, of: Sequence[str]) -> None:
    """All that evaluation.py lists, with made-up figures; the first patients fail in each way there is."""
    rng = np.random.default_rng(n_patients)
    rows = [case_row(rng, number, of) for number in range(n_patients)]
    own = [key.removeprefix("infection_") for key in rows[0] if key.startswith("infection_")]
    names = [name for name in own if name not in ("tp", "fp")]
    scores = [name for name in names if name not in ("fn", "tn")]
    overlaps = ("dice", "iou", "precision", "sensitivity", "specificity")

    def entry() -> dict[str, Any]:
        mean = float(rng.random())
        return {"mean": mean, "ci95": [mean * 0.9, mean * 1.1] if n_patients > 1 else None, "n": n_patients}

    regions = {
        region: {name: entry() for name in scores}
        | {"per_patient": {name: entry() for name in scores}, "per_slice": {name: entry() for name in overlaps}}
        | {"pooled": {name: float(rng.random()) for name in overlaps}, "n_empty_truth": 1, "n_empty_prediction": 2}
        for region in of
    }
    regions["infection"]["hd95_mm"] = {"mean": None, "ci95": None, "n": 0}
    rule = {"threshold": 0.4, "seed_threshold": None, "components": 2, "inside": "lung" if "lung" in of else None}
    summary = {
        "split": split, "fold": 0, "leaky_slice_split": split == "val", "threshold": 0.5, "tta": split == "val",
        "ensemble": [], "model": {"step": "60"}, "n_cases": n_patients, "n_patients": n_patients, "n_without_spacing": 1,
        "postprocessing": dict.fromkeys(of, {"threshold": 0.5}) | {"infection": rule} if split == "val" else None,
        "empty_masks": "exclude", "bootstrap_resamples": 2000, "regions": regions,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    write_csv(folder / "per_case.csv", rows)
    write_csv(folder / "per_patient.csv", [row | {"case": "all"} for row in rows])
    if split == "val":
        counts = rng.integers(0, 1000, (len(of), 2, 100)).tolist()
        of_regions = {name: {"positive": p, "negative": n} for name, (p, n) in zip(of, counts, strict=True)}
        write_json(folder / "probabilities.json", {"bins": 100, "regions": of_regions})
    for name in ("infection_worst", "infection_best", "lung_median"):
        (folder / "figures").mkdir(exist_ok=True)
        (folder / f"figures/{name}.png").write_bytes(PIXEL)


def case_row(rng: np.random.Generator, number: int, regions: Sequence[str]) -> dict[str, Any]:
    patient = HOSTILE if number == 5 else f"patient-{number:03}_of_a_hospital_with_a_long_name"
    row: dict[str, Any] = {"case": f"patient-{number:03}_series-0", "patient": patient}
    for region in regions:
        tp, fp, fn = (int(n) for n in rng.integers(500, 2000, 3))
        if region == "infection":
            ways = {1: (0, 40, 0), 2: (0, 0, 50), 3: (5, 100, 100), 4: (0, 0, 0)}  # false alarm, miss, poor, healthy
            tp, fp, fn = ways.get(number, (tp, fp, fn))
        overlap = f"{2 * tp / (2 * tp + fp + fn):.6f}" if tp + fp + fn else ""
        row |= {f"{region}_{name}": overlap for name in ("dice", "iou", "precision", "sensitivity", "specificity")}
        row |= {f"{region}_{name}": overlap for name in ("nsd_1mm", "nsd_2mm", "hd95_mm")}
        volumes = {"truth_ml": tp + fn, "predicted_ml": tp + fp, "volume_error_ml": fp - fn}
        row |= {f"{region}_{name}": "" if number == 0 else f"{n / 1000:.6f}" for name, n in volumes.items()}
        row |= {f"{region}_tp": tp, f"{region}_fp": fp, f"{region}_fn": fn, f"{region}_tn": 10**6}
    return row


def write_study(root: Path) -> None:
    root.mkdir(parents=True)
    grid = {"encoders": ["gernet_s", "densenet161"], "decoders": ["unetplusplus", "deeplabv3"]}
    (root / "spec.yaml").write_text(
        yaml.safe_dump(
            {"base": {"regions": {name: list(own) for name, own in REGIONS.items()}}, "output_dir": str(root), **grid}
        )
    )
    study = load_study(root / "spec.yaml")
    (root / "study.yaml").write_text(study.as_yaml())
    for number, run in enumerate(study.runs):
        task = task_of(study, run)
        write_config(task, run)
        if number == 2:
            task.write_state(State(task.fingerprint, error="training: CUDA out of memory"))
        if number > 1:
            continue
        dice = {"lung": [0.95, 0.97], "infection": [0.6 + 0.1 * number, 0.6 + 0.1 * number]}
        dice["lung"] = [value - 0.1 * number for value in dice["lung"]]
        write_scored_run(task.run, config_as_yaml(run.config), dice)
        known = task.fingerprint if number else "of a distseg with fewer settings"
        state = State(known, trained=True, scored=["val"], parameters_m=10.0 + number, gmacs=3.0 + number)
        task.write_state(state)
        if number == 0:
            (task.run / "report.html").write_text("a page")


def write_scored_run(folder: Path, config: str, dice: dict[str, list[float]]) -> None:
    entries = {
        region: {"dice": {"mean": float(np.mean(values)), "ci95": [min(values), max(values)], "n": len(values)},
                 "pooled": {"dice": values[0]}}
        for region, values in dice.items()
    }  # fmt: skip
    write_json(folder / "eval/val/summary.json", {"regions": entries})
    cases = [
        {"case": f"c{i}", "patient": f"p{i}"} | {f"{region}_dice": v[i] for region, v in dice.items()} for i in (0, 1)
    ]
    write_csv(folder / "eval/val/per_case.csv", cases)
    (folder / "config.yaml").write_text(config)
    write_json(folder / "environment.json", {"world_size": 1})
    rows: list[dict[str, Any]] = []
    for step in (10, 20):
        row = {"step": step, "loss": 0.5, "dice": {region: values[0] for region, values in dice.items()}}
        rows += [row | {"split": "train", "slices_per_s": 20.0}, row | {"split": "val", "mean_dice": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
