"""`fastppo demo` in short, and the parts it is made of."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastppo.cli import main
from fastppo.cli.run_folder import read_metrics
from fastppo.cli.stories import HAPPY_WORDS, SAD_WORDS, SENTENCES, corpus, happiness, story
from fastppo.cli.tiny_lm import train_tokenizer


def test_happiness_counts_different_words():
    assert happiness("She smiled and laughed, smiled again.") == 2.0
    assert happiness(" He lost the hat and cried. A kind bee gave him a hug.") == 0.0
    assert happiness("") == happiness("The unhappy fox") == 0.0  # a part of a word is no word


def test_the_moods_of_the_grammar_are_what_the_reward_says():
    rng = random.Random(0)
    told = {mood: [] for mood in SENTENCES}
    for mood in SENTENCES:
        for template in SENTENCES[mood]:
            words = dict.fromkeys(("name", "animal", "thing", "thing2", "place", "place2", "colour", "colour2"), "x")
            words |= {"He": "He", "he": "he", "him": "him", "lovely": "lovely", "gloomy": "gloomy"}
            told[mood].append(happiness(template.format(**words)))
    assert set(told["happy"]) == {2.0} and set(told["plain"]) == {0.0} and set(told["sad"]) == {-2.0}
    assert not HAPPY_WORDS & SAD_WORDS
    assert abs(statistics.mean(happiness(rest) for _, rest in (story(rng) for _ in range(2000)))) < 0.3


def test_the_corpus_is_the_seeds():
    assert corpus(20, 1) == corpus(20, 1) != corpus(20, 2)
    assert not any(" a o" in text or " a a" in text for pair in corpus(300, 0) for text in pair)  # "an owl"


def test_the_tokenizer_returns_what_it_was_given():
    texts = [f"{opening} {rest}" for opening, rest in corpus(200, 0)]
    tokenizer = train_tokenizer(texts)
    for text in [*texts[:20], "Ünïcode, too: 猫!"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--steps", "14", "--lm-steps", "150", "--seed", "3", "--output-dir", str(folder)]) == 0
    return folder


def test_a_short_demo_makes_stories_happier(short_run):
    rewards = [row["env/reward_mean"] for row in read_metrics(short_run)]
    assert len(rewards) == 14
    first, last = statistics.mean(rewards[:3]), statistics.mean(rewards[-3:])
    assert last > first + 1.5, f"mean reward of steps 1-3: {first:.2f}, of steps 12-14: {last:.2f}"
    samples = json.loads((short_run / "samples.json").read_text())
    before, after = (statistics.mean(s["score"] for s in samples[name]) for name in ("before", "after"))
    assert after > before + 1.5, f"64 other prompts: {before:.2f} before, {after:.2f} after"


def test_a_demo_leaves_a_policy_numbers_and_curves(short_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastppo import AutoModelForCausalLMWithValueHead

    names = {path.name for path in short_run.iterdir()}
    assert names == {"config.yaml", "info.json", "metrics.jsonl", "samples.json", "tensorboard", "curves.png", "policy"}
    wanted = {
        "objective/kl",
        "env/reward_mean",
        "perf/response_tokens_per_second",
        "time/loop/generate",
        "ppo/loss/total",
    }
    assert all(wanted <= row.keys() for row in read_metrics(short_run))
    assert (short_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(short_run / "policy")
    tokenizer = AutoTokenizer.from_pretrained(short_run / "policy")
    prompt = tokenizer("Mia the fox had a red ball.", return_tensors="pt")
    torch.manual_seed(0)
    told = model.generate(**prompt, max_new_tokens=12, do_sample=True)
    assert told.shape[1] > prompt.input_ids.shape[1]
    assert AutoModelForCausalLMWithValueHead.from_pretrained(short_run / "policy").v_head.summary.weight.abs().sum() > 0


def test_curves_have_a_picture_in_them(short_run):
    from matplotlib.image import imread

    pixels = imread(short_run / "curves.png")
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    assert 0.01 < (pixels[..., :3].min(-1) < 0.95).mean() < 0.5  # ink, and more paper than ink


def test_the_folder_of_another_run_is_left_alone(short_run, capsys):
    assert main(["demo", "--output-dir", str(short_run)]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_ctrl_c_saves_what_was_trained_and_says_where(tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fastppo",
        "demo",
        "--steps",
        "2000",
        "--lm-steps",
        "5",
        "--output-dir",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "metrics.jsonl").exists() and read_metrics(folder):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert f"the policy so far is saved in {folder}/policy" in output
    assert (folder / "policy/model.safetensors").is_file() and (folder / "curves.png").is_file()


@pytest.mark.parametrize(("argv", "wanted"), [(["--steps", "0"], "--steps must be at least 1; got 0")])
def test_wrong_numbers_are_refused(argv, wanted, capsys):
    assert main(["demo", *argv]) == 1
    assert wanted in capsys.readouterr().err
