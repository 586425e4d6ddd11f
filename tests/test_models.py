"""Causal value-head models against TRL 0.11.4's numbers (fixtures/record_trl_models.py), their checkpoints and references."""

import copy
import json
import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel

from fastppo import models
from fastppo.models import AutoModelForCausalLMWithValueHead, PreTrainedModelWrapper, ValueHead, create_reference_model

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_models.json").read_text())
TOKENS, MASK = torch.tensor(RECORDED["tokens"]), torch.tensor(RECORDED["mask"])
# both sides compute in float32; the recorded numbers have 7 digits
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def wrap(name="llama", **kwargs):
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal(name), **kwargs)
    tiny_models.fill(wrapper.v_head)
    return wrapper


class Config:
    def __init__(self, **fields):
        self.__dict__.update(fields)


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_forward_and_generate_give_trls_numbers(name):
    wrapper = wrap(name).eval()
    with torch.no_grad():
        logits, loss, values = wrapper(TOKENS, attention_mask=MASK, labels=TOKENS)
    torch.testing.assert_close(logits, torch.tensor(RECORDED[name]["logits"]), **CLOSE)
    torch.testing.assert_close(values, torch.tensor(RECORDED[name]["values"]), **CLOSE)
    assert loss.item() == pytest.approx(RECORDED[name]["loss"], rel=1e-4)
    greedy = wrapper.generate(TOKENS[:1], max_new_tokens=8, do_sample=False)
    assert greedy.tolist() == RECORDED[name]["greedy"]
    assert sorted(wrapper.state_dict()) == RECORDED[name]["state_dict"]


def test_a_trained_model_gives_trls_numbers(shared):
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(shared / "models/stories260K").eval()
    tiny_models.fill(wrapper.v_head)
    expected = RECORDED["stories260K"]
    with torch.no_grad():
        _, loss, values = wrapper(TOKENS, attention_mask=MASK, labels=TOKENS)
    torch.testing.assert_close(values, torch.tensor(expected["values"]), **CLOSE)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert wrapper.generate(TOKENS[:1], max_new_tokens=8, do_sample=False).tolist() == expected["greedy"]


def test_forward_returns_three_things_or_four():
    wrapper = wrap()
    assert len(wrapper(TOKENS)) == 3 and wrapper(TOKENS)[1] is None
    *_, past = wrapper(TOKENS, return_past_key_values=True)
    logits, _, values = wrapper(TOKENS[:, :1], past_key_values=past)
    assert logits.shape == (2, 1, 96) and values.shape == (2, 1)


def test_half_precision_model_gives_float32_logits_and_values():
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal().bfloat16())
    logits, _, values = wrapper(TOKENS)
    assert logits.dtype == values.dtype == torch.float32
    assert wrapper.v_head.summary.weight.dtype == torch.float32


def test_wrapper_stands_in_for_the_wrapped_model():
    wrapper = wrap()
    inner = wrapper.pretrained_model
    assert wrapper.config is inner.config and not inner.training and wrapper.training and wrapper.v_head.training
    wrapper.gradient_checkpointing_enable()
    assert inner.is_gradient_checkpointing
    wrapper.gradient_checkpointing_disable()
    assert not inner.is_gradient_checkpointing
    wrapper.enable_input_require_grads()
    assert wrapper.prepare_inputs_for_generation(TOKENS)["input_ids"] is not None
    flags = (
        wrapper.is_loaded_in_8bit,
        wrapper.is_loaded_in_4bit,
        wrapper.is_sequential_parallel,
        wrapper.is_peft_model,
    )
    assert flags == (False,) * 4
    assert (
        wrapper.policy_adapter_name == "default" and wrapper.rm_adapter_name is None and not wrapper.supports_rm_adapter
    )


def test_class_attributes():
    causal, seq2seq = models.SUPPORTED_ARCHITECTURES
    assert causal.lm_head_namings == ["lm_head", "embed_out"]
    assert seq2seq.lm_head_namings == ["lm_head", "embed_out", "output_projection"] and seq2seq.is_encoder_decoder
    assert causal.supported_args == ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
    assert PreTrainedModelWrapper.supported_modules == ("v_head",) and PreTrainedModelWrapper.supported_rm_modules == (
        "score",
    )
    assert len(PreTrainedModelWrapper.supported_pretrained_model_architectures) == 3
    assert PreTrainedModelWrapper(torch.nn.Linear(1, 1), score_module=torch.nn.Linear(2, 1)).score.in_features == 2


# --- value head -------------------------------------------------------------------------------------------------------


def test_value_head_starts_from_the_same_random_numbers_as_trls():
    torch.manual_seed(5)
    head = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal()).v_head
    torch.testing.assert_close(head.summary.weight.data, torch.tensor(RECORDED["default_head"]))
    torch.manual_seed(5)
    options = {"v_head_init_strategy": "normal", "v_head_initializer_range": 0.5}
    head = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal(), **options).v_head
    torch.testing.assert_close(head.summary.weight.data, torch.tensor(RECORDED["normal_head"]))
    assert head.summary.bias.item() == 0


@pytest.mark.parametrize(
    ("config", "arguments", "probability"),
    [
        (Config(hidden_size=4), {}, 0.1),
        (Config(hidden_size=4), {"summary_dropout_prob": 0.5}, 0.5),
        (Config(hidden_size=4, summary_dropout_prob=0.3), {"summary_dropout_prob": 0.5}, 0.3),
        (Config(hidden_size=4), {"summary_dropout_prob": 0.0}, None),
    ],
)
def test_value_head_dropout(config, arguments, probability):
    dropout = ValueHead(config, **arguments).dropout
    assert isinstance(dropout, torch.nn.Identity) if probability is None else dropout.p == probability


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (Config(hidden_size=4), 4),
        (Config(hidden_size=4, word_embed_proj_dim=6), 6),
        (Config(hidden_size=4, is_encoder_decoder=True, decoder=Config(hidden_size=9)), 9),
        (Config(text_config=Config(hidden_size=7)), 7),
    ],
)
def test_value_head_finds_the_hidden_size(config, size):
    assert ValueHead(config).summary.in_features == size


def test_value_head_bad_input():
    with pytest.raises(ValueError, match="Config names no hidden size"):
        ValueHead(Config())
    with pytest.raises(ValueError, match=r"v_head_init_strategy: one of \(None, 'normal'\) wanted; got 'uniform'"):
        wrap(v_head_init_strategy="uniform")


def test_value_head_by_hand():
    head = ValueHead(Config(hidden_size=2)).eval()
    head.load_state_dict({"summary.weight": torch.tensor([[2.0, -1.0]]), "summary.bias": torch.tensor([0.5])})
    assert head(torch.tensor([[[3.0, 1.0]]], dtype=torch.bfloat16)).tolist() == [[[5.5]]]


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_save_and_load(tmp_path, shards):
    wrapper = wrap("gpt2")
    wrapper.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors").exists() != bool(shards)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    for name, weight in wrapper.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
        assert name.startswith("v_head.") or torch.equal(plain.state_dict()[name], weight), name


def test_saved_names_have_no_prefix(tmp_path):
    wrap("llama").save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"model.embed_tokens.weight", "v_head.summary.weight", "v_head.summary.bias"} <= names
    assert not any(name.startswith("pretrained_model") for name in names)


def write_trl_folder(folder, shards: int) -> AutoModelForCausalLMWithValueHead:
    """What TRL 0.11.4's save_pretrained(safe_serialization=False) leaves: pickled weights, one file or several."""
    wrapper = wrap("llama")
    wrapper.config.save_pretrained(folder)
    weights = {name: weight.clone() for name, weight in wrapper.state_dict().items()}
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return wrapper
    names = sorted(weights)
    weight_map = {
        name: f"pytorch_model-{1 + at * shards // len(names):05d}-of-{shards:05d}.bin" for at, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return wrapper


# 30 shards: the head's weight and bias end up in different files
@pytest.mark.parametrize("shards", [1, 3, 30])
def test_load_trls_pickled_checkpoint(tmp_path, shards):
    wrapper = write_trl_folder(tmp_path, shards)
    with pytest.raises(OSError, match="is a pickle.*load it with allow_pickle=True"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), allow_pickle=True)
    for name, weight in wrapper.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_files_are_not_fetched_for_nothing():
    """gpt2's repository has model.safetensors and a pytorch_model.bin of the same weights."""
    from fastppo.models import checkpoint

    asked = []

    def find(name):
        asked.append(name)
        return name if name == "model.safetensors" else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_read_value_head", lambda file: {})
        assert checkpoint.load_value_head(find) == {}
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked


def test_a_missing_shard_is_named(tmp_path):
    from fastppo.models import checkpoint

    index = {"weight_map": {"v_head.summary.weight": "pytorch_model-00002-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00002.bin for the value head"):
        checkpoint.load_value_head(checkpoint.finder(str(tmp_path), {}))


def test_pickles_run_no_code(tmp_path):
    from fastppo.models import checkpoint

    class Harm:
        def __reduce__(self):
            return (print, ("ran code",))

    torch.save({"v_head.summary.weight": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        checkpoint.load_value_head(checkpoint.finder(str(tmp_path), {}), allow_pickle=True)
    with pytest.raises(OSError, match="pytorch_model.bin is a pickle"):
        checkpoint.load_value_head(checkpoint.finder(str(tmp_path), {}))


def test_no_value_head_in_the_folder_is_said(tmp_path, caplog):
    tiny_models.causal().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert "has no value head" in caplog.text


def test_weights_are_float32_unless_asked(tmp_path):
    """As in TRL with transformers 4; transformers 5 alone would take the checkpoint's bfloat16."""
    tiny_models.causal().bfloat16().save_pretrained(tmp_path)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert load(tmp_path).pretrained_model.dtype == torch.float32
    assert load(tmp_path, dtype=torch.bfloat16).pretrained_model.dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype="auto").pretrained_model.dtype == torch.bfloat16


def test_state_dict_round_trip():
    """TRL's wrapper cannot load its own state_dict()."""
    first, second = wrap("llama"), AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal())
    second.pretrained_model.lm_head.weight.data.zero_()
    assert str(second.load_state_dict(first.state_dict())) == "<All keys matched successfully>"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    # inside another module, as DistributedDataParallel holds it
    outer, target = torch.nn.ModuleDict({"module": first}), torch.nn.ModuleDict({"module": wrap("llama")})
    assert "module.v_head.summary.weight" in outer.state_dict() and "module.model.norm.weight" in outer.state_dict()
    target.load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        second.load_state_dict({**first.state_dict(), "nonsense": torch.zeros(1)})


def test_from_pretrained_bad_input():
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    with pytest.raises(ValueError, match="should be a string or a PreTrainedModel"):
        load(3)
    with pytest.raises(ValueError, match="should be a string or a PreTrainedModel"):
        load(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="does not have a language model head"):
        load(LlamaModel(tiny_models.causal().config))
    with pytest.raises(ValueError, match="peft_config should be .* got int"):
        load(tiny_models.causal(), peft_config=3)
    with pytest.raises(ValueError, match="device_map cannot be applied to a model that is loaded already"):
        load(tiny_models.causal(), device_map="auto")
    with pytest.raises(ValueError, match="use AutoModelForSeq2SeqLMWithValueHead"):
        load(tiny_models.seq2seq())
    with pytest.raises(
        ValueError, match="pretrained_model must be a transformers or PEFT language model .*; got 'gpt2'"
    ):
        AutoModelForCausalLMWithValueHead("gpt2")
    with pytest.raises(TypeError, match="arguments that it does not know: v_head_rang"):
        AutoModelForCausalLMWithValueHead(tiny_models.causal(), v_head_rang=0.1)
    with pytest.raises(ValueError, match="v_head_initializer_range must be a number of at least 0; got 'a'"):
        load(tiny_models.causal(), v_head_initializer_range="a")
    with pytest.raises(FileNotFoundError, match="there is no folder ./models/gpt2x"):
        load("./models/gpt2x")


def test_saving_where_a_file_is(tmp_path):
    """transformers logs an error and returns: the weights would not be written, and nobody the wiser."""
    (tmp_path / "policy").write_text("")
    with pytest.raises(NotADirectoryError, match="policy is a file; wanted a folder"):
        wrap("llama").save_pretrained(tmp_path / "policy")


def test_load_in_8bit_without_bitsandbytes(tmp_path, monkeypatch):
    tiny_models.causal().save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="load_in_8bit needs bitsandbytes: pip install"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, load_in_8bit=True)


def test_a_hub_id_is_read_from_the_cache(tmp_path):
    """Folders as huggingface_hub lays them out; no network."""
    repository = tmp_path / "models--someone--policy"
    wrapper = wrap("llama")
    wrapper.save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(
        "someone/policy", cache_dir=tmp_path, local_files_only=True
    )
    assert torch.equal(again.v_head.summary.weight, wrapper.v_head.summary.weight)


def test_load_in_4bit_asks_transformers_for_it(tmp_path, monkeypatch):
    asked = {}

    class Auto:
        @staticmethod
        def from_pretrained(path, **kwargs):
            asked.update(kwargs)
            return tiny_models.causal()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "transformers_parent_class", Auto)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, load_in_4bit=True, trust_remote_code=False)
    assert asked["quantization_config"].load_in_4bit and asked["trust_remote_code"] is False
    assert set(asked["device_map"]) == {""} and "dtype" not in asked and "load_in_4bit" not in asked
    with pytest.raises(ValueError, match="give load_in_4bit or quantization_config, not both"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, load_in_4bit=True, quantization_config=object())


def test_a_quantised_model_keeps_its_value_head_in_a_file_of_its_own(tmp_path, monkeypatch):
    """transformers writes what the quantiser says and ignores the state dict that it is given."""
    wrapper = wrap("llama")
    wrapper.pretrained_model.hf_quantizer = object()
    monkeypatch.setattr(type(wrapper.pretrained_model), "save_pretrained", lambda self, folder, **kwargs: None)
    wrapper.save_pretrained(tmp_path / "new")
    assert set(load_file(tmp_path / "new/value_head.safetensors")) == {"v_head.summary.weight", "v_head.summary.bias"}


def test_model_split_over_devices():
    split = tiny_models.causal()
    split.hf_device_map = {"model.layers.0": torch.device("cpu", 0), "lm_head": torch.device("cpu", 1)}
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(split)
    assert wrapper.is_sequential_parallel and wrapper(TOKENS)[2].shape == (2, 6)
    whole = tiny_models.causal()
    whole.hf_device_map = {"": "cpu"}
    assert not AutoModelForCausalLMWithValueHead.from_pretrained(whole).is_sequential_parallel
    split.hf_device_map = {"model.layers.0": 0, "lm_head": "disk"}
    with pytest.raises(ValueError, match="parts of the model are offloaded"):
        AutoModelForCausalLMWithValueHead.from_pretrained(split)


class FakeHub:
    """Takes the place of huggingface_hub.HfApi; keeps what was uploaded."""

    uploads = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        return Config(repo_id=f"someone/{repo_id}", private=private)

    def upload_folder(self, repo_id, folder_path, commit_message, **where):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.uploads.append((repo_id, self.token, commit_message, files, where))
        return "commit"


def test_push_to_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "uploads", [])
    wrapper = wrap("gpt2")
    assert wrapper.push_to_hub("policy", token="secret", private=True, create_pr=True) == "commit"
    wrapper.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="Step 3")
    files = ["config.json", "generation_config.json", "model.safetensors"]
    first = ("someone/policy", "secret", "Upload model", files, {"create_pr": True})
    assert FakeHub.uploads == [first, ("someone/mine", None, "Step 3", files, {})]


def test_pickles_are_not_written(tmp_path, caplog):
    wrap("gpt2").save_pretrained(tmp_path, safe_serialization=False)
    assert "safetensors are written" in caplog.text and (tmp_path / "model.safetensors").exists()


# --- reference --------------------------------------------------------------------------------------------------------


def test_reference_is_a_frozen_copy():
    model = wrap("gpt2").train()
    reference = create_reference_model(model)
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert not reference.training and model.training and not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(reference(TOKENS)[0], copy.deepcopy(model).eval()(TOKENS)[0])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shared_layers_are_those_that_trl_freezes_and_share_storage(name):
    """TRL freezes the same parameters but copies them."""
    model = wrap(name)
    reference = create_reference_model(model, num_shared_layers=1)
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == RECORDED[name]["frozen"]
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    shared = [key for key in mine if mine[key].data_ptr() == theirs[key].data_ptr()]
    assert shared == frozen
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = reference(TOKENS)[0]
    model(TOKENS)[0].square().mean().backward()
    optimizer.step()
    assert torch.equal(reference(TOKENS)[0], before)


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "bloom", "phi", "mixtral"])
def test_shared_layers_are_found_in_other_architectures(name):
    model = wrap(name)
    create_reference_model(model, num_shared_layers=1)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any(".0." in key for key in frozen) and not any(".layers.1." in key or ".h.1." in key for key in frozen)
    assert len(frozen) < len(list(model.parameters()))


def test_shared_layers_bad_input():
    model = wrap("llama")
    with pytest.raises(ValueError, match=r"model must be a model \(from_pretrained loads one by name\); got 'gpt2'"):
        create_reference_model("gpt2")
    with pytest.raises(ValueError, match="num_shared_layers must be None or a whole number of at least 0; got '2'"):
        create_reference_model(model, num_shared_layers="2")
    with pytest.raises(ValueError, match=r"no layer 7 of .*pretrained_model.model.layers.\{layer\} \(2 layers\)"):
        create_reference_model(model, num_shared_layers=7)
    with pytest.raises(ValueError, match=r"no layer 1 of blocks.\{layer\}"):
        create_reference_model(model, num_shared_layers=1, pattern="blocks.{layer}")
    assert all(parameter.requires_grad for parameter in model.parameters())
    create_reference_model(model, num_shared_layers=1, pattern="model.layers.{layer}")
    assert not model.pretrained_model.model.layers[0].mlp.up_proj.weight.requires_grad
