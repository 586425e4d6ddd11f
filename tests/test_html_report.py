"""`fastppo report`: one self-contained page and PNGs, from whole, cut-off and broken runs."""

import html.parser
import json

import pytest

from fastppo.report import ReportError, read_run, trailing_mean, write_report


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
    """Collects tags and checks that nothing outside the page is asked for."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
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


def test_trailing_mean_by_hand():
    assert trailing_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_the_command_writes_a_page_and_names_a_folder_that_is_no_run(tmp_path, capsys):
    from fastppo.cli import main

    run = make_run(tmp_path / "run", steps=2)
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and "page.html" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "nothing: no metrics.jsonl" in capsys.readouterr().err
