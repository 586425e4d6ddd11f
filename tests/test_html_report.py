"""`fastppo report`: one self-contained page and PNGs, from whole, cut-off and broken runs."""

import html.parser
import json
import shutil
import subprocess
import warnings

import pytest

from fastppo.report import ReportError, column, read_run, trailing_mean, write_report
from fastppo.report.plots import COLOURS, PANELS, draw, thinned


def make_run(folder, steps=20, **columns):
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "env/reward_mean": step / steps,
                "objective/kl": 0.1 * step,
                "perf/response_tokens_per_second": 900.0,
            }
            file.write(json.dumps({**row, **columns}) + "\n")
    sample = {"prompt": "a <script>alert(1)</script>", "response": "b & c", "score": 0.5}
    (folder / "samples.json").write_text(json.dumps({"before": [sample], "after": [{**sample, "score": 2.0}]}))
    (folder / "config.yaml").write_text("learning_rate: 0.001\n")
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags, what they ask for, and the elements that are never closed or closed out of turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_one_page_holds_everything_and_asks_for_nothing(tmp_path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", steps=5)]
    text = write_report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/svg+xml") for source in page.sources)
    assert "script" not in page.tags, "text of samples is escaped"
    assert page.tags.count("img") == 3 == len(list((tmp_path / "report_plots").glob("*.png")))
    assert "first, second" in text and "0.05 → 1.00" not in text and "learning_rate: 0.001" in text
    assert not list(tmp_path.glob(".*writing"))


def test_numbers_on_the_tiles_are_the_runs_own(tmp_path):
    text = write_report([make_run(tmp_path / "run")], tmp_path / "r.html").read_text()
    # tenths of 20 steps: (1 + 2) / 40 = 0.075 and (19 + 20) / 40 = 0.975
    assert "0.07 → 0.97" in text or "0.08 → 0.97" in text or "0.08 → 0.98" in text


def test_a_line_cut_off_by_a_crash_is_left_out_and_null_is_a_gap(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "env/reward_mean": null}\n{"step": 5, "env/rew')
    assert [row["step"] for row in read_run(run).rows] == [1, 2, 3, 4]
    assert write_report([run], tmp_path / "r.html").is_file()


def test_steps_without_a_number_are_told_and_a_zero_has_no_sign(tmp_path):
    run = make_run(tmp_path / "run", steps=3, **{"objective/kl": -0.01})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "env/reward_mean": NaN}\n{"step": 5, "env/reward_mean": null}\n')
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "run: reward was NaN or infinite in 2 of 5 steps, step 5 the last." in text
    assert "0.0 → 0.0" in text and "-0.0 →" not in text and text.count("NaN or infinite") == 1


def test_a_legend_names_a_metric_where_there_is_another(tmp_path):
    """One metric of two that a panel can have: "training" beside the runs' names told nothing."""
    runs = [read_run(make_run(tmp_path / name, accuracy=0.5)) for name in ("first", "second")]
    panel = next(panel for panel in PANELS if panel.name == "accuracy")
    words = lambda runs: [text.get_text() for text in draw(panel, runs).legends[0].get_texts()]  # noqa: E731
    assert words(runs) == ["first", "second"]
    runs.append(read_run(make_run(tmp_path / "third", accuracy=0.5, eval_accuracy=0.25)))
    assert words(runs) == ["first", "second", "third", "training", "evaluation"]


@pytest.mark.parametrize(
    "content, words", [(None, "no metrics.jsonl"), ("", "not one finished step"), ("x\n{}\n", "line 1 is not JSON")]
)
def test_a_folder_that_is_no_run_is_named(tmp_path, content, words):
    (tmp_path / "odd").mkdir()
    if content is not None:
        (tmp_path / "odd" / "metrics.jsonl").write_text(content)
    with pytest.raises(ReportError, match=f"odd.*{words}"):
        write_report([tmp_path / "odd"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("sft", "ppo"):
        make_run(tmp_path / name, steps=1)
    with pytest.raises(ReportError, match="its folders are runs: fastppo report .*ppo .*sft$"):
        read_run(tmp_path)


def test_trailing_mean_by_hand():
    assert trailing_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_the_command_writes_a_page_and_names_a_folder_that_is_no_run(tmp_path, capsys):
    from fastppo.cli import main

    run = make_run(tmp_path / "run", steps=2)
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and "page.html" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "nothing: no metrics.jsonl" in capsys.readouterr().err


def png_pixels(path):
    """uint8 [height, width, 3]."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def render(page, picture, width, height):
    """What the browser's console said; the page as it looks is in `picture`."""
    command = [
        browser(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},{height}"]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert picture.is_file(), done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def share_of(pixels, colour, tolerance=12):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((abs(pixels.astype(int) - rgb).max(-1) <= tolerance).mean())


def test_the_page_looks_like_its_runs_in_a_browser(tmp_path):
    """Rendered where a browser is installed; everywhere, parsed, and its plots looked at as PNG."""
    names = ("first", "second", "third")
    runs = [make_run(tmp_path / name, steps=12, **{"env/reward_mean": i}) for i, name in enumerate(names)]
    page = write_report(runs, tmp_path / "report.html")
    parsed = Page(page.read_text())
    assert parsed.open == [], "every element is closed"
    assert all(source.startswith("data:image/svg+xml") for source in parsed.sources)
    for plot in (tmp_path / "report_plots").glob("*.png"):
        assert share_of(png_pixels(plot), COLOURS[2]) > 1e-3, f"{plot.name} shows no third run"
    if browser() is None:
        warnings.warn("no chromium or chrome here: the page was parsed, not rendered", stacklevel=1)
        return
    for width in (1280, 390):
        assert render(page, tmp_path / f"{width}.png", width, 1600) == []
        pixels = png_pixels(tmp_path / f"{width}.png")
        assert pixels.std() > 5, "not blank"
        assert all(share_of(pixels, colour) > 1e-5 for colour in COLOURS[:3]), "each run's line is drawn"


def test_runs_of_transformers_trainers_are_read_from_their_newest_whole_checkpoint(tmp_path):
    for step, whole in ((10, True), (20, True), (30, False)):
        folder = tmp_path / "sft" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        log = [{"step": i, "loss": 3.0 - i / 20, "mean_token_accuracy": i / 40} for i in range(10, step + 1, 10)]
        log.append({"step": step, "eval_loss": 2.5})
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}) if whole else '{"log_his')
    run = read_run(tmp_path / "sft")
    assert [row["step"] for row in run.rows] == [10, 20] and run.rows[-1]["eval_loss"] == 2.5
    page = Page(write_report([tmp_path / "sft"], tmp_path / "r.html").read_text())
    assert page.tags.count("img") == 3  # loss, evaluation loss, accuracy


def test_classic_and_late_runs_share_their_panels(tmp_path):
    classic = make_run(tmp_path / "classic", steps=3)
    (tmp_path / "late").mkdir()
    row = {"step": 1, "objective/scores": 0.5, "objective/kl": 2.0, "policy/clipfrac_avg": 0.1}
    (tmp_path / "late" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_report([classic, tmp_path / "late"], tmp_path / "r.html")
    plots = {path.stem for path in (tmp_path / "r_plots").glob("*.png")}
    assert plots == {"reward", "kl", "clip_fraction", "throughput"}


def test_memory_and_speed_by_phase_come_from_what_the_trainer_logs(tmp_path):
    columns = {"fastppo/peak_memory_bytes": 3 * 2**30, "time/loop/generate": 0.5, "time/loop/reward": 0.0}
    run = read_run(make_run(tmp_path / "run", steps=2, **columns, **{"time/loop/step": 1.5}))
    assert column(run, "report/peak_memory_gib") == ([1, 2], [3.0, 3.0])
    # 900 response tokens per second of the whole 2 s are 1,800 tokens, made in 0.5 s
    assert column(run, "report/generate_tokens_per_s")[1] == [3600.0, 3600.0]


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "env/reward_mean": 7.0}\n{"step": 4, "env/reward_mean": 8.0}\n')
    rows = read_run(run).rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[1]["env/reward_mean"] == 7.0


def test_settings_in_which_runs_differ_are_shown_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, steps=2) for name in ("a", "b")]
    (runs[1] / "config.yaml").write_text("learning_rate: 0.01\n")
    (runs[1] / "info.json").write_text('{"torch": "2.13.0"}')
    text = write_report(runs, tmp_path / "r.html").read_text()
    assert "<td>learning_rate</td><td>0.001</td><td>0.01</td>" in text
    assert "<td>torch</td><td>—</td><td>2.13.0</td>" in text
    assert "What differs" not in write_report(runs[:1], tmp_path / "one.html").read_text()
    bare = make_run(tmp_path / "bare", steps=1)
    (bare / "config.yaml").unlink()
    assert "What differs" not in write_report([runs[0], bare], tmp_path / "two.html").read_text()


def test_runs_of_one_name_are_told_apart_and_old_plots_go(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    runs = [make_run(tmp_path / parent / "run", steps=2) for parent in ("x", "y")]
    (tmp_path / "r_plots").mkdir()
    (tmp_path / "r_plots" / "old.png").touch()
    assert "<h1>x/run, y/run, y/run (2)</h1>" in write_report([*runs, runs[1]], tmp_path / "r.html").read_text()
    assert not (tmp_path / "r_plots" / "old.png").exists()


def test_long_runs_keep_their_extremes():
    values = [float(i % 100 == 50) for i in range(10_000)]
    steps, kept = thinned(range(10_000), values, most=100)
    assert len(kept) <= 100 and max(kept) == 1.0 and min(kept) == 0.0 and steps == sorted(steps)


def test_the_same_runs_give_the_same_page(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    assert write_report([run], tmp_path / "1.html").read_text() == write_report([run], tmp_path / "2.html").read_text()


@pytest.mark.parametrize("name, text", [("samples.json", "[1]"), ("info.json", "{"), ("config.yaml", "a: [")])
def test_a_damaged_file_beside_the_metrics_is_named(tmp_path, name, text):
    run = make_run(tmp_path / "run", steps=1)
    (run / name).write_text(text)
    with pytest.raises(ReportError, match=name):
        write_report([run], tmp_path / "r.html")
