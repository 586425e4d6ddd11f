"""`fastppo sft | reward | ppo | pipeline` on tiny models: one command for all stages, skipping, resuming, clear errors."""

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fastppo.cli import main
from fastppo.cli.pipeline import split_flags
from fastppo.cli.run_folder import read_metrics
from fastppo.cli.stories import corpus, happiness
from fastppo.cli.tiny_lm import new_model, train_language_model, train_tokenizer

REWARDS = """
def vowels(completions): return [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in completions]
def columns(texts, answer): return [float(len(t) % a) for t, a in zip(texts, answer)]
def raises(completions): raise LookupError("no dictionary")
def nan(completions): return [float("nan")] * len(completions)
"""
QUICK = {
    "sft": {"learning_rate": "1e-3", "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 2},
    "reward": {"learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_steps": 8, "logging_steps": 2},
    "ppo": {"per_device_train_batch_size": 4, "total_episodes": 16, "response_length": 8, "stop_token": "eos"},
}
QUICK["ppo"] |= {"num_sample_generations": 0, "learning-rate": 1e-3, "temperature": 1.0, "probes": 2}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and data in several forms."""
    folder = tmp_path_factory.mktemp("stages")
    stories = corpus(120, 0)
    texts = [f"{opening} {rest}" for opening, rest in stories]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    model = new_model(tokenizer, hidden=32, layers=2)
    train_language_model(model, tokenizer, texts, 30, 0, lambda step, loss: None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "reviews.jsonl", [{"text": text, "label": int(happiness(text) > 0)} for text in texts])
    pairs = [{"prompt": a[0], "chosen": " " + a[1], "rejected": " " + b[1]} for a, b in zip(stories, stories[1:])]  # noqa: B905
    write(folder / "pairs.jsonl", pairs)
    write(folder / "prompts.jsonl", [{"query": opening, "answer": 3 + i % 3} for i, (opening, _) in enumerate(stories)])
    (folder / "empty.jsonl").write_text("")
    write(folder / "gap.jsonl", [pairs[0], {"chosen": "x", "rejected": None, "prompt": "y"}])
    write(folder / "mixed.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": [2]}])
    (folder / "rewards.py").write_text(REWARDS)
    for name in ("cut", "wider"):
        shutil.copytree(folder / "model", folder / name)
    weights = folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    config = json.loads((folder / "wider/config.json").read_text())
    (folder / "wider/config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def flags(stage: str, **more) -> list[str]:
    """QUICK[stage] as flags."""
    values = QUICK[stage] | more
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def weights(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model/model.safetensors")


def same(first: str, second: str) -> bool:
    one, two = weights(first), weights(second)
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


# --- the whole pipeline -----------------------------------------------------------------------------------------------


def test_one_command_runs_all_stages_and_a_second_start_skips_them(capsys):
    config = {"model": "model", "dataset": "reviews.jsonl", "pairs": 40, "seed": 3, **QUICK}
    Path("pipeline.yaml").write_text(yaml.safe_dump(config))
    command = ["pipeline", "--config", "pipeline.yaml", "--output-dir", "whole", "--ppo.total-episodes", "8"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1/3 sft" in said and "3/3 ppo" in said and "step 2/2  reward" in said
    results = json.loads(Path("whole/results.json").read_text())
    assert results["sft"]["steps"] == 6 and results["sft"]["loss_last"] < results["sft"]["loss_first"]
    assert 0 <= results["reward"]["eval_accuracy_last"] <= 1 and results["ppo"]["steps"] == 2
    for name in ("", "sft", "reward", "ppo"):
        assert Path("whole", name, "curves.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in Path("whole/data/reward.jsonl").read_text().splitlines()]
    labels = {json.loads(x)["text"]: json.loads(x)["label"] for x in Path("reviews.jsonl").read_text().splitlines()}
    assert len(rows) == 36 and all(labels[row["chosen"]] > labels[row["rejected"]] for row in rows)
    prompt = json.loads(Path("whole/data/ppo.jsonl").read_text().splitlines()[0])["prompt"]
    assert rows[0]["chosen"].startswith(prompt) and len(prompt.split()) == 5
    samples = json.loads(Path("whole/ppo/samples.json").read_text())
    assert len(samples["before"]) == len(samples["after"]) == 2
    # the stages feed each other: the reward of the samples is the trained reward model's
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    judge = AutoModelForSequenceClassification.from_pretrained("whole/reward/model")
    one = samples["after"][0]
    tokens = AutoTokenizer.from_pretrained("model")(one["prompt"], return_tensors="pt").input_ids
    assert judge(tokens).logits.shape == (1, 1)
    assert yaml.safe_load(Path("whole/ppo/config.yaml").read_text())["model"] == "whole/sft/model"
    stamps = {name: Path("whole", name, "model/model.safetensors").stat().st_mtime_ns for name in QUICK}
    assert main(command) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert stamps == {name: Path("whole", name, "model/model.safetensors").stat().st_mtime_ns for name in QUICK}
    # other options are refused, naming them; --overwrite starts anew
    assert main([*command, "--ppo.kl-coef", "0.5"]) == 1
    assert "other options (kl_coef was None, is 0.5)" in capsys.readouterr().err
    assert main([*command, "--pairs", "30"]) == 1
    assert "pairs was 40, is 30" in capsys.readouterr().err


def test_a_stage_can_be_left_out_and_rewarded_otherwise():
    config = {"model": "model", "dataset": "pairs.jsonl", "sft": False, "reward": False}
    config["ppo"] = QUICK["ppo"] | {"reward": "rewards.py:vowels", "total_episodes": 8}
    Path("ppo.yaml").write_text(yaml.safe_dump(config))
    assert main(["pipeline", "--config", "ppo.yaml", "--output-dir", "alone"]) == 0
    lines = read_metrics("alone/ppo")
    assert not Path("alone/sft").exists() and [line["step"] for line in lines] == [1, 2, 2]
    assert "eval_objective/scores" in lines[2] and "objective/scores" in lines[1]
    told = lines[1]  # what fastppo report draws of speed, memory and lengths
    assert 0 < told["time/loop/generate"] < 60 and told["time/loop/reward"] >= 0 < told["time/loop/step"]
    seconds = sum(told[f"time/loop/{phase}"] for phase in ("generate", "reward", "step"))
    tokens = told["perf/response_tokens_per_second"] * seconds
    assert tokens == pytest.approx(told["tokens/responses_len_mean"] * 4, rel=1e-3) and "time/loop/step" not in lines[2]
    assert told["fastppo/peak_memory_bytes"] > 1e7
    # the stage's own config.yaml does the stage again
    assert main(["ppo", "--config", "alone/ppo/config.yaml", "--output-dir", "again"]) == 0
    assert same("alone/ppo", "again")


# --- single stages ----------------------------------------------------------------------------------------------------


def test_adapters_are_merged_in_the_saved_model():
    from transformers import AutoModelForCausalLM

    command = ["sft", "--model", "model", "--dataset", "pairs.jsonl", *flags("sft"), "--lora-rank", "4"]
    assert main([*command, "--output-dir", "lora"]) == 0
    assert Path("lora/adapter/adapter_config.json").is_file() and not Path("lora/model/adapter_config.json").exists()
    tuned, before = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("lora/model", "model"))
    assert set(tuned) == set(before) and not all(torch.equal(tuned[name], before[name]) for name in before)
    lines = read_metrics("lora")
    assert [line["step"] for line in lines] == [2, 4, 6] and "mean_token_accuracy" in lines[0]


def test_ppo_gives_columns_to_the_reward_and_takes_a_value_model():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained("model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("critic")
    command = ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "rewards.py:columns", *flags("ppo")]
    assert main([*command, "--value-model", "critic", "--output-dir", "columns", "--no-ds3-gather-for-generation"]) == 0
    assert len(read_metrics("columns")) == 4
    kept = yaml.safe_load(Path("columns/config.yaml").read_text())
    assert kept["value_model"] == "critic" and kept["ds3_gather_for_generation"] is False and "vf_coef" not in kept


def test_a_classifier_with_other_tokens_reads_text():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = train_tokenizer(["a few other words"], vocab_size=280)
    config = AutoConfig.from_pretrained("model", num_labels=2, vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).save_pretrained("other")
    tokenizer.save_pretrained("other")
    command = ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "other", *flags("ppo")]
    assert main([*command, "--total-episodes", "4", "--output-dir", "judged"]) == 0
    assert len(read_metrics("judged")) == 1


@pytest.mark.parametrize(
    ("stage", "signals"),
    [
        ("sft", [signal.SIGINT]),
        ("reward", [signal.SIGTERM]),
        ("ppo", [signal.SIGINT]),
        ("sft", [signal.SIGINT, signal.SIGINT]),
        ("ppo", [signal.SIGTERM, signal.SIGINT]),
    ],
)
def test_ctrl_c_and_sigterm_save_and_the_same_command_goes_on(stage, signals, monkeypatch, capsys, tmp_path):
    """Signals in the second step; the final weights are those of a run without them. The second one stops at once."""
    from fastppo.cli.screen import Screen

    data = "prompts.jsonl" if stage == "ppo" else "pairs.jsonl"
    command = [stage, "--model", "model", "--dataset", data, *flags(stage, logging_steps=1, save_steps=1)]
    command += ["--reward", "rewards.py:vowels"] if stage == "ppo" else []
    plain, shown, cut, whole = Screen.step, [], str(tmp_path / "cut"), str(tmp_path / "whole")

    def step(self, told):
        plain(self, told)
        shown.append(told.number)
        for number in signals if len(shown) == 2 else ():
            signal.raise_signal(number)

    monkeypatch.setattr(Screen, "step", step)
    assert main([*command, "--output-dir", cut]) == 130
    said, at_once = capsys.readouterr().out, len(signals) == 2
    assert "Stopping after this step" in said and "The same command goes on from there" in said
    saved = max(int(path.name.partition("-")[2]) for path in Path(cut).glob("checkpoint-*"))
    assert saved == len(shown) - at_once and f"checkpoint-{saved} is saved" in said
    assert not Path(cut, "model").exists()
    assert main([*command, "--output-dir", cut]) == 0
    assert f"Going on after step {saved}" in capsys.readouterr().out
    assert main([*command, "--output-dir", whole]) == 0
    assert same(cut, whole)
    assert [line["step"] for line in read_metrics(cut)] == [line["step"] for line in read_metrics(whole)]


def test_a_broken_checkpoint_is_passed_over_and_said(capsys, tmp_path):
    command = ["sft", "--model", "model", "--dataset", "pairs.jsonl", *flags("sft", save_steps=1)]
    run = tmp_path / "run"
    assert main([*command, "--output-dir", str(run)]) == 0
    before = weights(str(run))
    (run / "results.json").unlink()  # killed before it was written
    newest = run / "checkpoint-6/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    assert main([*command, "--output-dir", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Passed over a checkpoint: {newest}" in said and "Going on after step 5" in said
    after = weights(str(run))
    assert all(torch.equal(before[name], after[name]) for name in before)
    for path in run.glob("checkpoint-*/manifest.json"):
        path.unlink()
    (run / "results.json").unlink()
    assert main([*command, "--output-dir", str(run)]) == 1
    assert "no checkpoint that can be loaded" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_a_model_is_loaded(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    command = ["sft", "--model", "model", "--dataset", "pairs.jsonl", *flags("sft")]
    assert main([*command, "--output-dir", str(tmp_path / "file/run")]) == 1
    said = capsys.readouterr().err
    assert f"cannot write {tmp_path}/file/run: Not a directory" in said and "Traceback" not in said


# --- what cannot work is named ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["sft", "--dataset", "pairs.jsonl"], "--model is required"),
        (["sft", "--model", "model"], "--dataset is required"),
        (["ppo", "--model", "model", "--dataset", "prompts.jsonl"], "--reward is required"),
        (["sft", "--model", "model", "--dataset", "nowhere.jsonl"], "--dataset: there is no file nowhere.jsonl"),
        (["sft", "--model", "model", "--dataset", "empty.jsonl"], "empty.jsonl is empty"),
        (["sft", "--model", "./none", "--dataset", "pairs.jsonl"], "--model: ./none is no folder here"),
        (["sft", "--model", "model", "--dataset", "prompts.jsonl"], "it has query, answer"),
        (
            ["reward", "--model", "model", "--dataset", "prompts.jsonl"],
            "needs the columns chosen + rejected or chosen_ids + rejected_ids or text + label; it has query, answer",
        ),
        (["reward", "--model", "model", "--dataset", "gap.jsonl"], "row 2 has no 'rejected', which the first row has"),
        (
            ["reward", "--model", "model", "--dataset", "pairs.jsonl", "--eval-dataset", "no.jsonl"],
            "--eval-dataset: there is no file no.jsonl",
        ),
        (["sft", "--model", "model", "--dataset", "mixed.jsonl"], "a column holds values of different kinds"),
        (["sft", "--model", "model", "--dataset", "pairs.jsonl", "--lora-rank", "0"], "--lora-rank must be at least 1"),
        (
            ["sft", "--model", "model", "--dataset", "pairs.jsonl", "--truncation-mode", "left"],
            "truncation_mode must be",
        ),
        (
            ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "rewards.py:vowel"],
            "Did you mean 'vowels'",
        ),
        (
            ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "rewards.py:raises"],
            "reward rewards.py:raises raised LookupError: no dictionary",
        ),
        (
            ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "rewards.py:nan"],
            "returned nan for response 0",
        ),
        (
            ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "rewards.py:vowels"]
            + ["--response-length", "250"],
            "smaller --response-length",
        ),
        (
            ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "rewards.py:vowels"]
            + ["--num-mini-batches", "3"],
            "multiple of `num_mini_batches`",
        ),
        (["sft", "--model", "cut", "--dataset", "pairs.jsonl"], "cut: a weights file is damaged or cut off"),
        (["reward", "--model", "cut", "--dataset", "pairs.jsonl"], "cut: a weights file is damaged or cut off"),
        (
            ["sft", "--model", "wider", "--dataset", "pairs.jsonl"],
            "wider: the weights have other shapes than config.json",
        ),
        (
            ["sft", "--model", "model", "--dataset", "pairs.jsonl", "--per-device-train-batch-size", "0"],
            "per_device_train_batch_size must be a whole number of at least 1; got 0",
        ),
        (
            ["ppo", "--model", "model", "--dataset", "prompts.jsonl", "--reward", "model"],
            "--reward: model is no trained sequence classifier: its weights lack score.weight",
        ),
        (["pipeline", "--model", "model"], "--dataset is required"),
        (["pipeline", "--model", "model", "--dataset", "gap.jsonl"], "row 2 has no 'rejected'"),
        (["pipeline", "--model", "model", "--dataset", "pairs.jsonl", "--pairs", "3"], "at least 10 pairs"),
    ],
)
def test_errors_name_the_flag_the_file_or_the_column(argv, wanted, capsys, tmp_path):
    assert main([*argv, "--output-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert wanted in " ".join(said.split()) and "Traceback" not in said
    assert not list(tmp_path.glob("run/**/model"))


def test_a_start_that_failed_does_not_block_its_folder(capsys, tmp_path):
    """The first command had the wrong file; the right one, with the last step on record whatever --logging-steps is."""
    run = ["sft", "--model", "model", "--output-dir", str(tmp_path / "run"), "--max-steps", "3"]
    assert main([*run, "--dataset", "prompts.jsonl"]) == 1
    assert main([*run, "--dataset", "pairs.jsonl", "--logging-steps", "2"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [2, 3]
    assert json.loads((tmp_path / "run/results.json").read_text())["steps"] == 3
    capsys.readouterr()
    assert main([*run, "--dataset", "reviews.jsonl"]) == 1
    assert "holds a run with other options (dataset was" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_loss_that_is_no_number_ends_the_run(stage, capsys, tmp_path):
    given = ["--model", "model", "--dataset", "pairs.jsonl", "--learning-rate", "1e30", "--max-steps", "12"]
    assert main([stage, *given, "--output-dir", str(tmp_path / "run")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "training diverged:" in said and "the loss is nan in step" in said and "Lower the learning rate" in said
    assert not (tmp_path / "run/model").exists() and not list(tmp_path.glob("run/checkpoint-*"))


def test_a_folder_takes_one_run_at_a_time(capsys, tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as another process's run holds it
    run = ["--model", "model", "--dataset", "pairs.jsonl", "--output-dir", str(tmp_path), "--max-steps", "1"]
    assert main(["sft", *run]) == 1
    train = ["train", *run[:-2], "--reward", "rewards.py:vowels"]
    assert main(train) == 1
    said = capsys.readouterr().err
    assert said.count("another run is writing to this folder") == 2 and not list(tmp_path.iterdir())
    os.close(other)
    assert main(["sft", *run]) == 0
    again = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of at the command's end
    os.close(again)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"modle": "model"}, "sets 'modle', which is no option. Did you mean 'model'?"),
        ({"sft": {"lerning-rate": 1}}, "section sft of the pipeline sets 'lerning_rate', which is no option. Did you"),
        ({"ppo": {"response_length": "long"}}, "section ppo of the pipeline: response_length must be int; got 'long'"),
        ({"ppo": {"kl_estimator": "k2"}}, "kl_estimator must be typing.Literal['k1', 'k3']; got 'k2'"),
        ({"reward": False}, "--reward is required"),
        ({"reward": 3}, "reward must hold 'name: value' lines, or be false; got 3"),
    ],
)
def test_errors_of_the_pipelines_file_come_before_any_stage(config, wanted, capsys, tmp_path):
    Path("wrong.yaml").write_text(yaml.safe_dump({"model": "model", "dataset": "pairs.jsonl", **config}))
    assert main(["pipeline", "--config", "wrong.yaml", "--output-dir", str(tmp_path / "run")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert wanted in said and not (tmp_path / "run").exists()


def test_a_wrong_flag_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", "--model", "m", "--dataset", "d", "--ppo.total-episode", "8"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "--total-episodes" in said.out + said.err


def test_flags_of_stages_are_told_apart():
    own, stages = split_flags(["--model", "m", "--sft.max-steps", "3", "--overwrite", "--ppo.no-x", "--seed=1"])
    assert own == ["--model", "m", "--overwrite", "--seed=1"]
    assert stages == {"sft": ["--max-steps", "3"], "reward": [], "ppo": ["--no-x"]}


def test_conversations_become_demonstrations_and_prompts():
    from fastppo.cli.pairs import demonstration, prompt_of

    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    whole = {"chosen": [question, answer], "rejected": [question]}
    assert demonstration(whole) == {"messages": [question, answer]} and prompt_of(whole, 5) == {"prompt": [question]}
    split = {"prompt": [question], "chosen": [answer], "rejected": [answer]}
    assert demonstration(split) == {"prompt": [question], "completion": [answer]}
    assert prompt_of(split, 5) == {"prompt": [question]}
    assert prompt_of({"chosen": "one two three"}, 2) == {"prompt": "one two"}
