"""`fastppo train` on a small model: a whole run from a YAML file, chat and classifier rewards, and every clear error."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastppo.cli import main
from fastppo.cli.run_folder import read_metrics
from fastppo.cli.stories import corpus
from fastppo.cli.tiny_lm import new_model, train_language_model, train_tokenizer

REWARDS = """
calls = 0
def vowels(responses): return [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses]
def answers(responses, answer, prompts):
    assert all(isinstance(a, int) for a in answer) and len(prompts) == len(responses)
    return [float(len(r) % a) for r, a in zip(responses, answer)]
def third_time_raises(responses):
    global calls
    calls += 1
    if calls == 3: raise LookupError("no dictionary")
    return vowels(responses)
def nan(responses): return [float("nan")] * len(responses)
def short(responses): return [1.0]
def words(responses): return responses
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, prompts in several formats, and rewards."""
    folder = tmp_path_factory.mktemp("train")
    stories = corpus(300, 0)
    texts = [f"{opening} {rest}" for opening, rest in stories]
    tokenizer = train_tokenizer(texts)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    torch.manual_seed(0)
    model = new_model(tokenizer, hidden=32, layers=2)
    train_language_model(model, tokenizer, texts, 60, 0, lambda step, loss: None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": opening, "answer": 3 + i % 3} for i, (opening, _) in enumerate(stories[:40])]
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}], "answer": 2} for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "empty.jsonl").write_text("")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


SMALL = "--batch-size 8 --mini-batch-size 4 --ppo-epochs 1 --max-new-tokens 8 --probes 2 --steps 24".split()  # noqa: SIM905


def train(output: str, *argv: str) -> int:
    return main(["train", "--model", "model", "--output-dir", output, *SMALL, *argv])


def test_two_processes_are_one_run(place):
    """torchrun alone: accelerate joins processes on a CPU only when told, and each took the folder for its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastppo"]
    command += ["train", "--model", "model", "--output-dir", "processes", *SMALL, "--dataset", "prompts.jsonl"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([*command, "--reward", "rewards.py:vowels"], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3/3") == 1, done.stdout
    assert [row["step"] for row in read_metrics(place / "processes")] == [1, 2, 3]


def test_a_run_from_a_file_raises_its_reward(place):
    config = {"model": "model", "dataset": "prompts.jsonl", "reward": "rewards.py:vowels", "learning-rate": "1e-2"}
    config |= {"batch_size": 16, "mini_batch_size": 4, "steps": 100, "init_kl_coef": 0.001, "seed": 1}
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    assert (
        main(["train", "--config", "run.yaml", "--steps", "192", "--max-new-tokens", "8", "--output-dir", "one"]) == 0
    )
    rewards = [row["env/reward_mean"] for row in read_metrics("one")]
    assert len(rewards) == 12  # the flag's 192 prompts, not the file's 100
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:3]) + 0.02, rewards
    assert {p.name for p in Path("one").iterdir()} >= {"policy", "curves.png", "tensorboard", "samples.json"}
    # the run's own config.yaml does the same run again; after the first update, MKL's rounding (which depends on where
    # memory happens to lie) may change a sampled token at this learning rate
    assert main(["train", "--config", "one/config.yaml", "--output-dir", "two"]) == 0
    again = [row["env/reward_mean"] for row in read_metrics("two")]
    assert again[0] == pytest.approx(rewards[0], abs=1e-6) and len(again) == 12
    assert statistics.mean(again[-3:]) > statistics.mean(again[:3]) + 0.02, again


def test_chat_prompts_and_a_column_for_the_reward():
    assert train("chat", "--dataset", "chats.jsonl", "--reward", "rewards.py:answers") == 0
    samples = json.loads(Path("chat/samples.json").read_text())
    assert len(read_metrics("chat")) == 3 and len(samples["before"]) == len(samples["after"]) == 2


def test_a_classifier_as_reward_and_adapters_as_policy():
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained("model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("judge")
    AutoTokenizer.from_pretrained("model").save_pretrained("judge")
    assert train("judged", "--dataset", "prompts.jsonl", "--reward", "judge", "--lora-rank", "4") == 0
    assert len(read_metrics("judged")) == 3 and Path("judged/policy/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("folder", "logs"), [("logs", ["--project-kwargs", "{logging_dir: logs}"]), ("logged/trackers", [])]
)
def test_tensorboard_tracking_by_the_trainer_goes_along(folder, logs):
    logs = ["--log-with", "tensorboard", "--overwrite", *logs]
    assert train("logged", "--dataset", "prompts.jsonl", "--reward", "rewards.py:vowels", *logs) == 0
    assert list(Path(folder).rglob("events.*"))


@pytest.mark.parametrize(
    ("reward", "wanted", "steps"),
    [
        ("third_time_raises", "reward rewards.py:third_time_raises raised LookupError: no dictionary", 1),
        ("nan", "returned nan for response 0", 0),
        ("short", "must return 2 numbers, one per response; got 1", 0),
        ("words", "must return numbers; got '", 0),
    ],
)
def test_a_broken_reward_is_named_and_what_was_trained_is_saved(reward, wanted, steps, capsys):
    # The probes before training are the first call: the third is in step 2.
    assert train(reward, "--dataset", "prompts.jsonl", "--reward", f"rewards.py:{reward}") == 1
    said = capsys.readouterr()
    assert wanted in said.err and "Traceback" not in said.err
    assert len(read_metrics(reward)) == steps and Path(reward, "policy").is_dir() is (steps > 0)
    assert (f"saved in {reward}/policy" in said.out) is (steps > 0)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--dataset", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--dataset", "empty.jsonl"], "empty.jsonl is empty"),
        (["--dataset", "prompts.jsonl", "--prompt-column", "promt"], "no column 'promt'. Did you mean 'prompt'"),
        (["--dataset", "prompts.jsonl", "--reward", "rewards.py:vowel"], "Did you mean 'vowels'"),
        (["--dataset", "prompts.jsonl", "--model", "./no-model"], "--model: ./no-model is no folder here"),
        (["--dataset", "prompts.jsonl", "--model", "."], "is a folder here and could not be loaded"),
        (["--dataset", "prompts.jsonl", "--max-new-tokens", "250"], "do not fit into the model's positions"),
        (["--dataset", "prompts.jsonl", "--mini-batch-size", "3"], "must be a multiple"),
        (
            ["--dataset", "prompts.jsonl", "--output-dir", "rewards.py/run"],
            "cannot write rewards.py/run: Not a directory",
        ),
        (["--dataset", "prompts.jsonl", "--output-dir", "rewards.py"], "rewards.py is a file; a folder is wanted"),
        (["--dataset", "prompts.jsonl", "--reward", "model"], "no trained sequence classifier: its weights lack"),
        (["--dataset", "prompts.jsonl", "--seed", "-1"], "seed must be a whole number from 0 to 2**32 - 1; got -1"),
    ],
)
def test_what_cannot_work_is_named_before_any_training(argv, wanted, capsys, tmp_path):
    given = [] if "--reward" in argv else ["--reward", "rewards.py:vowels"]
    assert train(str(tmp_path / "run"), *given, *argv) == 1
    said = capsys.readouterr().err
    assert wanted in said and "Traceback" not in said


def test_a_wrong_flag_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        train("x", "--learning-rat", "1")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "--learning-rate" in said.out + said.err


def test_the_readmes_quickstart_runs(place, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = readme.split("## Quickstart")[1].split("```python\n")[1].split("```")[0]
    assert code.count('"gpt2"') == 2
    exec(compile(code.replace('"gpt2"', '"model"'), "README.md", "exec"), {})
    kl, loss = capsys.readouterr().out.splitlines()[-1].split()
    assert float(kl) == pytest.approx(0.0, abs=1e-4) and float(loss) != 0.0
    assert (place / "my-policy/model.safetensors").is_file()
