"""The late trainer's surface, line by line: signatures, what every field does, trackers, the hub, quantised models.

wandb, trackio, bitsandbytes and the hub are stand-ins that note what they were asked for.
"""

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from late_cases import prompts, trainer
from sft_cases import make_model, make_tokenizer, rows
from transformers import Trainer, TrainingArguments

from fastppo import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastppo.experimental.ppo import PPOConfig, PPOTrainer
from fastppo.experimental.ppo import ppo_trainer as module

ARGUMENTS = "args processing_class model ref_model reward_model train_dataset value_model data_collator eval_dataset "
ARGUMENTS += "optimizers callbacks peft_config"
METHODS = {
    "train": [],
    "generate_completions": ["sampling"],
    "get_train_dataloader": [],
    "get_eval_dataloader": [],
    "null_ref_context": [],
    "save_model": ["output_dir", "_internal_call"],
    "_save_checkpoint": ["model", "trial"],
}
FUNCTIONS = "generate batch_generation forward truncate_response masked_mean masked_var masked_whiten exact_div "
FUNCTIONS += "print_rich_table INVALID_LOGPROB OnlineTrainerState PolicyAndValueWrapper"


def test_names_and_signatures():
    assert issubclass(PPOTrainer, Trainer) and issubclass(PPOConfig, TrainingArguments)
    given = inspect.signature(PPOTrainer.__init__).parameters
    assert " ".join(given) == f"self {ARGUMENTS}"
    assert [n for n, p in given.items() if p.default is p.empty] == f"self {ARGUMENTS}".split()[:7]
    for name, arguments in METHODS.items():
        found = list(inspect.signature(getattr(PPOTrainer, name)).parameters)
        assert set(arguments) <= set(found), (name, found)
    assert set(FUNCTIONS.split()) <= set(dir(module)) and set(FUNCTIONS.split()) <= set(module.__all__)
    state = module.OnlineTrainerState()
    assert state.episode == 0 and state.global_step == 0


def test_two_backbones_in_one_module():
    policy, value = make_model(), make_model("reward", 1)
    both = module.PolicyAndValueWrapper(policy, value)
    tokens = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        output, values = both(input_ids=tokens, output_hidden_states=True)
        hidden = value.model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(output.logits, policy(tokens).logits)
        torch.testing.assert_close(values, value.score(hidden))
    with pytest.raises(ValueError, match="value_model must have a backbone"):
        module.PolicyAndValueWrapper(policy, torch.nn.Linear(2, 2))


# --- what the fields do -----------------------------------------------------------------------------------------------

CHANGES = {
    "num_mini_batches": 2,
    "total_episodes": 8,
    "response_length": 4,
    "stop_token_id": 4,
    "temperature": 1.3,
    "missing_eos_penalty": 2.0,
    "num_ppo_epochs": 1,
    "whiten_rewards": True,
    "kl_coef": 2.0,
    "kl_estimator": "k3",
    "cliprange": 1e-3,
    "vf_coef": 1.0,
    "cliprange_value": 1e-4,
    "gamma": 0.5,
    "lam": 0.2,
    "learning_rate": 2e-2,
    "seed": 1,
    "reward_weights": [3.0],
    "generation_kwargs": {"top_k": 3},
}
CHANGES_NOTHING = {"local_rollout_forward_batch_size": 3, "num_sample_generations": 5, "sft_model_path": "x"}
CHANGES_NOTHING |= {"reward_model_path": "x", "ds3_gather_for_generation": False, "old_logprobs": "recompute"}


def weights_after(tmp_path, **options) -> torch.Tensor:
    run = trainer(tmp_path, **{"learning_rate": 1e-2, **options})
    run.train()
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return weights_after(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_every_field_acts(tmp_path, usual, name, value):
    changed = weights_after(tmp_path, **{name: value})
    assert changed.isfinite().all() and (changed - usual).abs().max() > 1e-5


@pytest.mark.parametrize(("name", "value"), CHANGES_NOTHING.items())
def test_some_fields_change_no_result(tmp_path, usual, name, value):
    torch.testing.assert_close(weights_after(tmp_path, **{name: value}), usual, atol=2e-4, rtol=0)


def test_stop_token_eos_is_the_tokenizers(tmp_path):
    assert trainer(tmp_path, stop_token="eos").stop_token_id == make_tokenizer().eos_token_id
    assert trainer(tmp_path, stop_token_id=9).stop_token_id == 9 and trainer(tmp_path).stop_token_id is None


def test_an_optimizer_of_ones_own(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = trainer(tmp_path, policy=model, value=False, optimizers=(optimizer, None))
    before = [p.clone() for p in model.parameters()]
    run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- trackers, the hub ------------------------------------------------------------------------------------------------


def stand_in(monkeypatch, name: str) -> MagicMock:
    """A package that is there, takes every call and remembers it."""
    fake = MagicMock(name=name)
    fake.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


def test_wandb_gets_metrics_and_completions(tmp_path, monkeypatch):
    fake = stand_in(monkeypatch, "wandb")
    errors = SimpleNamespace(ConfigError=type("ConfigError", (Exception,), {}))
    for part, found in {"sdk": MagicMock(), "sdk.lib": MagicMock(), "sdk.lib.config_util": errors}.items():
        monkeypatch.setitem(sys.modules, f"wandb.{part}", found)
    trainer(tmp_path, evaluate=prompts(4), report_to="wandb", num_sample_generations=2).train()
    logged = [call.args[0] for call in fake.log.call_args_list]
    metrics = [line for line in logged if "train/objective/scores" in line]
    assert len(metrics) == 2 and all("train/loss/policy_avg" in line for line in metrics)
    assert sum("completions" in line for line in logged) == 2
    table = fake.Table.call_args.kwargs
    assert table["columns"] == ["query", "model response", "score"] and len(table["data"]) == 4


def test_trackio_gets_metrics(tmp_path, monkeypatch):
    fake = stand_in(monkeypatch, "trackio")
    fake.context_vars.current_space_id.get.return_value = None
    fake.__version__ = "0.21.1"
    off = {"trackio_static_space_id": False} if hasattr(TrainingArguments, "trackio_static_space_id") else {}
    trainer(tmp_path, report_to="trackio", **off).train()
    logged = [call.args[0] for call in fake.log.call_args_list]
    assert fake.init.called and sum("train/objective/scores" in line for line in logged) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    with pytest.raises(RuntimeError, match=name):
        trainer(tmp_path, report_to=name)


class Hub:
    """Notes what would be uploaded."""

    def __init__(self, monkeypatch):
        import transformers.trainer

        self.uploads = []
        if hasattr(transformers.trainer, "hf_api"):
            monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: self)
        else:
            monkeypatch.setattr(transformers.trainer, "create_repo", self.create_repo)
            monkeypatch.setattr(transformers.trainer, "upload_folder", self.upload_folder)

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, repo_id, commit_message, **options):
        from pathlib import Path

        self.uploads.append((repo_id, commit_message, {path.name for path in Path(folder_path).iterdir()}))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_push_to_hub_sends_the_policy_and_its_card(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    run = trainer(tmp_path / "happy", push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    run.train()
    assert [message for _, message, _ in hub.uploads] == [f"Training in progress, step {n}" for n in (1, 2)]
    run.push_to_hub(commit_message="done")
    name, message, files = hub.uploads[-1]
    assert (name, message) == ("me/happy", "done")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert "value.safetensors" not in files
    card = (tmp_path / "happy/README.md").read_text()
    assert "- ppo" in card and "- fastppo" in card and "model_name: happy" in card


# --- quantised base models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), [(SFTTrainer, SFTConfig), (RewardTrainer, RewardConfig)])
def test_quantization_config_reaches_from_pretrained(tmp_path, monkeypatch, kind, config):
    """bitsandbytes need not be there: what is asked for is what transformers is given."""
    from datasets import Dataset

    loaded = "causal" if kind is SFTTrainer else "reward"
    make_model(loaded).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options, name=name)
        return make_model(loaded)

    auto = {"causal": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}[loaded]
    monkeypatch.setattr(f"fastppo.{'sft' if loaded == 'causal' else 'reward'}.{auto}.from_pretrained", from_pretrained)
    data = Dataset.from_list(rows("text" if loaded == "causal" else "pairs"))
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs={"revision": "main"})
    quantised = object()
    kind(str(tmp_path / "base"), args, train_dataset=data, quantization_config=quantised)
    assert asked["quantization_config"] is quantised and asked["revision"] == "main" and asked["dtype"] == "auto"
    with pytest.raises(ValueError, match="quantization_config apply to a model given by name"):
        kind(make_model(loaded), args, train_dataset=data, quantization_config=quantised)


def test_quantised_base_without_bitsandbytes_says_so(tmp_path):
    from datasets import Dataset
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if is_bitsandbytes_available():
        pytest.skip("bitsandbytes is installed")
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    data = Dataset.from_list(rows("text"))
    with pytest.raises(ImportError, match="bitsandbytes"):
        SFTTrainer(
            str(tmp_path / "base"),
            SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=data,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )
