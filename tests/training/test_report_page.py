"""The report's page in a browser, from a file, as its reader opens it. Skipped where there is no chromium."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import run_script
from support.report_run import HOSTILE, make_evaluations, make_result, make_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements/dev.txt)")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
SEEN = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report of two runs and three evaluations, in a folder whose name is hostile, too."""
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / 'run <img src=x onerror="window.hacked=1">', rollouts=True)
    other = make_run(folder / "other", steps=20, slower=0.5)
    metrics = other / "metrics.jsonl"  # its start model was evaluated, too
    metrics.write_text(json.dumps({"step": 0, "eval/accuracy_reward": 0.25}) + "\n" + metrics.read_text())
    results = [make_result(folder / f"{name}.json", right) for name, right in (("before", 10), ("after <b>", 30))]
    results.append(make_result(folder / "silent.json", 11, silent=True))
    run_script("report.py", run, "--compare", other, *results)
    run_script("report.py", run)  # what was compared once is compared again
    return run / "report.html"


def until(page, condition: str, seconds: float = 30.0) -> None:
    """Wait; ``wait_for_function`` would need the page's policy to allow eval."""
    ends = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < ends, f"never: {condition}"
        page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as control:
        # a sandbox needs rights that root in a container has not
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = control.chromium.launch(executable_path=BROWSER, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, report):
    """Opens the page, and fails the test if the page complains of anything or asks for anything."""
    contexts, complaints = [], []

    def open_with(scheme="light", width=1280, path=report):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or complaints.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_with
    for context in contexts:
        context.close()
    assert complaints == []


def test_it_is_small_and_quickly_seen(open_page, report):
    assert report.stat().st_size < 1_000_000
    times = []
    for _ in range(3):  # the quickest: others may be at work on the machine
        page = open_page()
        until(page, f"{SEEN} > 0")
        times.append(page.evaluate(SEEN))
    assert min(times) < 2_000, times


@pytest.mark.slow
def test_a_long_run_with_many_questions_is_below_8_mb(tmp_path):
    """1,000 steps, 1,000 evaluation items, and clips of 10 s, of which only some have room."""
    run = make_run(tmp_path / "run", steps=1000)
    make_evaluations(run, items=1000)
    noise = np.random.default_rng(0)
    for path in (run / "eval" / "rows").glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record["row"] < 100:  # each its own clip, whose noise is what compresses worst
                clip = tmp_path / f"{record['row']}.wav"
                record["audio_path"] = str(clip)
                if not clip.exists():
                    soundfile.write(clip, noise.standard_normal(160_000) * 0.1, 16_000)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    run_script("report.py", run)
    page = (run / "report.html").read_text()
    assert 2_000_000 < len(page) < 8_000_000
    assert "of 1,000 questions, one of each mistake, then of each question type and outcome in turn" in page


def test_curves_show_values_smoothed_zoomed_and_over_each_other(open_page):
    page = open_page()
    titles = page.locator("#panels h3").all_inner_texts()
    assert [title.split()[0] for title in titles[:3]] == ["Reward", "Accuracy", "Format"]
    assert len(page.locator("#panels canvas").all()) == len(titles)
    assert page.locator("#run-legend li").count() == 2
    assert "its sessions begin at step 13 (dashed lines)" in page.locator("#curves").inner_text()
    reward = page.get_by_role("slider", name="Reward: step")
    reward.focus()
    page.keyboard.press("Home")
    for _ in range(17):
        page.keyboard.press("ArrowRight")
    # 1 + 1 / (1 + e^(4 - 17 / 4)) = 1.56, and half as fast 1 + 1 / (1 + e^(4 - 17 / 8)) = 1.13
    spoken = reward.get_attribute("aria-valuetext")
    assert spoken.startswith("step 17:") and "1.56" in spoken and "1.13" in spoken
    accuracy = page.locator(".panel").nth(1)
    assert accuracy.locator(".at").inner_text() == "step 17"  # the cursor is shared
    page.keyboard.press("End")
    assert reward.get_attribute("aria-valuetext").endswith("–")  # the other run has ended
    page.locator("#smooth").fill("10")
    assert page.locator("#smooth-value").inner_text() == "mean of 10 steps"
    page.locator("#from").fill("5")
    page.locator("#to").fill("12")
    page.locator("#to").blur()
    reward.hover(position={"x": 60, "y": 60})
    step = int(accuracy.locator(".at").inner_text().split()[1])
    assert 5 <= step <= 7  # the left edge of the zoomed range
    page.get_by_role("button", name="All", exact=True).click()
    assert (page.locator("#from").input_value(), page.locator("#to").input_value()) == ("0", "30")
    page.locator("#more > summary").click()
    page.locator("#more-panels h3").first.wait_for()
    assert "my/own" in " ".join(page.locator("#more-panels h3").all_inner_texts())
    assert page.locator("#more-panels canvas").count() >= 3


def test_axes_make_runs_of_different_length_comparable(open_page):
    page = open_page()
    reward = page.get_by_role("slider", name="Reward: step")
    page.locator("#axis").select_option("share")
    assert page.locator("#to").input_value() == "100" and page.locator("#unit").inner_text() == "% of the run"
    reward.focus()
    page.keyboard.press("End")
    # both runs end here: 1 + 1 / (1 + e^(4 - 30 / 4)) = 1.97, and of the shorter, slower one 1 + 1 / (1 + e^1.5) = 1.18
    spoken = reward.get_attribute("aria-valuetext")
    assert spoken.startswith("100 % of the run:") and "1.97" in spoken and "1.18" in spoken
    page.locator("#axis").select_option("log")
    over = page.locator("#panels .u-over").first
    over.hover(position={"x": over.bounding_box()["width"] / 2, "y": 60})
    step = int(page.locator(".panel .at").first.inner_text().split()[1])
    assert 3 <= step <= 5  # 3.9: the middle of 1/2 (step 0) to 30 on this axis is the root of their product
    page.locator("#from").fill("0")  # shows all; zero itself is nowhere on this axis
    page.locator("#from").press("Enter")
    page.keyboard.press("Home")
    over.hover(position={"x": 0, "y": 60})
    assert page.locator(".panel .at").first.inner_text() == "step 0"


def test_clips_play(open_page):
    page = open_page()
    page.locator("#set").select_option(label="training: sampled rollouts")
    page.locator("#step").select_option(label="15")
    until(page, "document.querySelector('audio').readyState >= 1")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(0.8, abs=0.15)
    page.locator("#list button").first.focus()
    page.keyboard.press("p")
    until(page, "document.querySelector('audio').currentTime > 0.1")
    page.locator(".pictures").click(position={"x": 5, "y": 20})
    assert page.get_by_role("img", name="Waveform of 0.8 seconds").is_visible()
    mel = page.get_by_role("img", name="Mel spectrogram")
    assert mel.evaluate("image => image.complete && image.naturalWidth") > 100
    page.keyboard.press("j")
    until(page, "document.querySelector('audio').duration > 1")  # the next one has 1.2 s
    page.locator("#step").select_option(label="all")
    assert page.locator("#list button").count() == 6
    page.locator("#list button").nth(1).click()
    assert "No clip to play" in page.locator("#group .notice").inner_text()
    assert page.locator("audio").count() == 0


def test_rollouts_are_filtered_and_open_on_the_last_step(open_page):
    page = open_page()
    page.locator("#set").select_option(label="training: sampled rollouts")
    shown = page.locator("#list button")
    where = page.locator("#list .where")
    assert shown.count() == 6
    assert page.locator("#group h3").inner_text() == "Step 30, group 1"
    said = page.locator(".choices li").first.inner_text()
    assert " ".join(said.split()) == "bell ✓ right answer ● answered by 2 of 4"
    page.locator("#step").select_option(label="15")
    assert where.all_inner_texts() == ["step 15 · 1", "step 15 · 2"]
    page.get_by_role("radio", name="out of format").check()
    assert where.all_inner_texts() == ["step 15 · 1", "step 15 · 2"]
    assert page.locator(".responses tbody tr:not(.dim)").count() == 1
    page.locator("#step").select_option(label="1")
    assert shown.count() == 0 and "No question" in page.locator("#list").inner_text()
    page.locator("#step").select_option(label="all")
    assert shown.count() == 2
    page.locator("#kinds [value=wrong]").check()
    assert shown.count() == 6
    assert page.locator(".responses tbody tr:not(.dim) .verdict").first.inner_text() == "✗ wrong"


def test_held_out_questions_are_filtered(open_page):
    page = open_page()
    shown = page.locator("#list button")
    assert page.locator("#set option").first.inner_text() == "held-out: evaluation data"
    assert shown.count() == 12
    until(page, "document.querySelector('audio').readyState >= 1")
    assert page.locator("#group .rounds tbody tr").count() == 3  # step 10, step 30, silence
    counts = dict(line.rsplit(None, 1) for line in page.locator("#kinds label").all_inner_texts())
    changed = {"became right": "7", "became wrong": "2"}
    assert counts == {"all": "12", "right": "8", "wrong": "4", "out of format": "1"} | changed
    page.locator("#kinds [value=gained]").check()
    assert shown.count() == 7
    page.locator("#type").select_option(label="drum")
    assert shown.count() == 4  # of the questions 3 to 9 those with an odd number
    assert page.locator("#kinds label", has_text="became right").inner_text().split()[-1] == "4"
    page.get_by_role("button", name="Listen to rain, answered no answer in the form").click()
    assert shown.count() == 1 and page.locator("#group h3").inner_text() == "Question 12"
    choices = page.locator(".choices li")
    assert " ".join(choices.nth(0).inner_text().split()) == "bell ○ answered: step 10 · step 30, in silence"
    assert choices.nth(1).inner_text().split("\n")[-1] == "✓ right answer"
    assert page.locator(".responses tbody tr:not(.dim) .verdict").all_inner_texts() == ["✗ wrong", "✗ out of form"]
    page.locator("#pair").click()
    assert shown.count() == 12


def test_accuracy_and_confusions_are_shown(open_page):
    page = open_page()
    assert page.locator("section").first.get_attribute("id") == "accuracy"  # before everything else
    text = page.locator("#accuracy").inner_text()
    assert "sampled training accuracy" in text and "in silence" in text and "8 of 12" in text
    table = page.locator("table.confusion").first
    assert table.locator("tbody tr").first.inner_text().split() == ["bell", "4", "3", "1"]
    assert "held-out accuracy 0.250 at step 10, 0.667 after step 30" in page.locator(".learned").first.inner_text()


def test_all_by_keyboard(open_page):
    page = open_page()
    page.locator("#set").select_option(label="training: sampled rollouts")
    page.locator("#list button").first.focus()
    title = page.locator("#group h3")
    assert title.inner_text() == "Step 30, group 1"
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    assert title.inner_text() == "Step 15, group 1"
    assert page.locator("#list [aria-current]").inner_text().startswith("step 15 · 1")
    page.keyboard.press("4")
    assert page.get_by_role("radio", name="out of format").is_checked()
    page.locator("#step").focus()
    page.keyboard.press("j")  # typed into a field it is no shortcut
    assert title.inner_text() == "Step 15, group 1"
    page.locator("#keys").uncheck()
    page.keyboard.press("1")
    assert page.get_by_role("radio", name="out of format").is_checked()
    page.get_by_role("button", name="Next question").press("Enter")
    assert title.inner_text() == "Step 15, group 2"
    assert page.evaluate("document.activeElement.tagName") != "BODY"  # the focus is not lost


def test_hostile_texts_are_texts(open_page):
    page = open_page()
    page.locator("#more > summary").click()
    page.locator("#set").select_option(label="training: sampled rollouts")
    page.locator("#list button").first.focus()
    texts = ""
    for _ in range(6):
        texts += page.locator("#group").inner_text()
        page.keyboard.press("j")
    assert HOSTILE[0] in texts and HOSTILE[1] in texts and HOSTILE[5] in texts
    assert "\u202e" not in texts and "U+202E" in texts and "U+0000" in texts and "U+D83D" in texts
    assert HOSTILE[0] in page.locator("#settings").inner_text()
    assert page.locator("h1").inner_text().endswith('run <img src=x onerror="window.hacked=1">')
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("img[src=x]").count() == 0


def test_the_policy_stops_scripts_that_are_not_the_pages(browser, report, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text().replace("<footer", "<script>window.hacked = 1</script><footer"))
    page = browser.new_page()
    page.goto(broken.as_uri())
    assert page.evaluate("document.scripts.length") == 3
    assert page.evaluate("window.hacked") is None
    page.close()


def test_comparisons_and_settings_are_shown(open_page):
    page = open_page()
    for summary in page.locator("#accuracy summary").all():
        summary.click()
    text = page.locator("#accuracy").inner_text()
    assert "10 of 40" in text and "+50.00" in text and "1.9e-06" in text and "unlikely (p < 0.05)" in text
    assert "cannot be ruled out" in text
    assert "wandb_run_name" in page.locator("#settings").inner_text()


@pytest.mark.parametrize(("scheme", "width"), VIEWS)
def test_accessible_and_nothing_sticks_out(open_page, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(scheme, width)
    for summary in page.locator("details > summary").all():
        summary.click()
    found = Axe().run(page).response["violations"]
    bad = [
        (v["id"], v["nodes"][0]["html"], v["nodes"][0]["failureSummary"])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert bad == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 19, 24)")
