"""Models from outside load from safetensors only, by every way in, unless the user asks otherwise. No code of a pickle runs."""

import json

import pytest
import torch
from datasets import Dataset
from sft_cases import make_model, make_tokenizer, rows

import fastppo
from fastppo import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastppo.cli import main

REFUSED = "is a pickle, which can run code when it is read, and there is no safetensors file in its place"


class Harm:
    """A pickle of it prints when it is read without weights_only."""

    def __reduce__(self):
        return (print, ("ran code of the pickle",))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """causal/, classifier/: weights as pytorch_model.bin alone. base/: safetensors. adapter/: LoRA for it as .bin alone."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("pickles")
    for name, kind in (
        ("causal", "causal"),
        ("classifier", "reward"),
        ("base", "causal"),
        ("base_classifier", "reward"),
    ):
        model = make_model(kind)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        if not name.startswith("base"):
            (folder / name / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / name / "pytorch_model.bin")
    for name, base, task in (("adapter", "base", "CAUSAL_LM"), ("score_adapter", "base_classifier", "SEQ_CLS")):
        inner = make_model("causal" if base == "base" else "reward")
        inner.config._name_or_path = inner.name_or_path = str(folder / base)
        model = get_peft_model(inner, LoraConfig(r=2, task_type=task, target_modules=["q_proj"]))
        model.save_pretrained(folder / name)
        from safetensors.torch import load_file

        torch.save(load_file(folder / name / "adapter_model.safetensors"), folder / name / "adapter_model.bin")
        (folder / name / "adapter_model.safetensors").unlink()
    lines = [json.dumps(row) for row in rows("pairs")]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "words.py").write_text("def words(completions): return [float(len(c)) for c in completions]\n")
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def supervised(kind: str, model: str, tmp_path, **options):
    config, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (RewardConfig, RewardTrainer)
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    data = Dataset.from_list(rows("text" if kind == "sft" else "pairs"))
    return trainer(model, args, train_dataset=data, processing_class=make_tokenizer())


def wrapped(name: str, **options):
    return fastppo.AutoModelForCausalLMWithValueHead.from_pretrained(name, **options)


WAYS = {
    "policy": lambda out, **how: wrapped("causal", **how),
    "policy's adapter": lambda out, **how: wrapped("adapter", **how),
    "reward adapter": lambda out, **how: wrapped("base", peft_config=lora(), reward_adapter="score_adapter", **how),
    "SFTTrainer": lambda out, **how: supervised("sft", "causal", out, **how),
    "RewardTrainer": lambda out, **how: supervised("reward", "classifier", out, **how),
}


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])


@pytest.mark.parametrize("way", WAYS)
def test_pickles_are_refused_in_python_and_read_when_asked(way, tmp_path):
    with pytest.raises(OSError, match=REFUSED):
        WAYS[way](tmp_path)
    WAYS[way](tmp_path, allow_pickle=True)


TRAIN = (
    "train --dataset pairs.jsonl --prompt-column chosen --steps 4 --batch-size 4 --mini-batch-size 4 --max-new-tokens 3"
)
PPO = (
    "ppo --dataset pairs.jsonl --prompt-column chosen --total-episodes 4 --response-length 3 --use-cpu --report-to none"
)
PPO += " --per-device-train-batch-size 4 --num-sample-generations 0 --probes 0"
STAGE = "--dataset pairs.jsonl --max-steps 1 --use-cpu --report-to none"


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (f"{TRAIN} --probes 0 --model causal --reward words.py:words", "--model"),
        (f"{TRAIN} --probes 0 --model base --reward classifier", "--reward"),
        (f"{PPO} --model causal --reward words.py:words", "--model"),
        (f"{PPO} --model base --reward classifier", "--reward"),
        (f"{PPO} --model base --reward words.py:words --value-model classifier", "--value-model"),
        (f"sft {STAGE} --model causal", "causal"),
        (f"reward {STAGE} --model classifier", "classifier"),
    ],
)
def test_commands_refuse_pickles_and_read_them_when_asked(command, flag, tmp_path, capsys):
    assert main([*command.split(), "--output-dir", str(tmp_path / "run")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: {flag}: " in said and REFUSED in said and "--allow-pickle" in said and "Traceback" not in said
    assert main([*command.split(), "--output-dir", str(tmp_path / "run"), "--overwrite", "--allow-pickle"]) == 0


def test_asked_or_not_no_code_runs(tmp_path, capfd):
    make_model().config.save_pretrained(tmp_path)
    torch.save({"lm_head.weight": Harm()}, tmp_path / "pytorch_model.bin")
    for options in ({}, {"allow_pickle": True}):
        with pytest.raises(Exception, match="pickle|[Ww]eights.only"):
            wrapped(str(tmp_path), **options)
        with pytest.raises(Exception, match="pickle|[Ww]eights.only"):
            supervised("sft", str(tmp_path), tmp_path / "out", **options)
    assert "ran code" not in "".join(capfd.readouterr())
