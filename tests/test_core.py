"""fastppo.core against numbers recorded from TRL 0.11.4 (fixtures/record_trl_core.py), and where we differ on purpose."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from peft import PromptTuningConfig

from fastppo import core
from fastppo.models import AutoModelForCausalLMWithValueHead

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_core.json").read_text())
VALUES, MASK = torch.tensor(RECORDED["values"]), torch.tensor(RECORDED["mask"])
LOGITS, LABELS = torch.tensor(RECORDED["logits"]), torch.tensor(RECORDED["labels"])


def same(actual, name, tolerance=2e-6):
    expected = torch.tensor(RECORDED[name]) if isinstance(name, str) else torch.tensor(name)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_masked_statistics():
    same(core.masked_mean(VALUES, MASK), "masked_mean")
    same(core.masked_mean(VALUES, MASK.bool()), "masked_mean")
    same(core.masked_mean(VALUES, MASK, axis=1), "masked_mean_rows")
    same(core.masked_var(VALUES, MASK), "masked_var")
    same(core.masked_var(VALUES, MASK, unbiased=False), "masked_var_biased")
    same(core.masked_whiten(VALUES, MASK), "masked_whiten")
    same(core.masked_whiten(VALUES, MASK, shift_mean=False), "masked_whiten_keep_mean")
    same(core.whiten(VALUES), "whiten")
    same(core.whiten(VALUES, shift_mean=False), "whiten_keep_mean")


def test_masked_statistics_by_hand():
    values, mask = torch.tensor([[1.0, 5.0, 100.0]]), torch.tensor([[1, 1, 0]])
    assert core.masked_mean(values, mask).item() == 3
    assert core.masked_var(values, mask).item() == 8  # ((1-3)^2 + (5-3)^2) / (2-1)
    assert core.masked_var(values, mask, unbiased=False).item() == 4


def test_an_empty_mask_has_no_variance():
    with pytest.raises(ValueError, match="mask counts no value"):
        core.masked_var(VALUES, torch.zeros_like(MASK))


def test_logprobs_and_entropy():
    same(core.logprobs_from_logits(LOGITS, LABELS), "logprobs")
    same(core.logprobs_from_logits(LOGITS, LABELS, gather=False), "logprobs_full")
    same(core.entropy_from_logits(LOGITS), "entropy")


def test_entropy_of_filtered_logits_is_finite():
    """TRL: nan, because it multiplies 0 by -inf."""
    filtered = core.top_k_top_p_filtering(LOGITS, top_k=1)
    assert torch.equal(core.entropy_from_logits(filtered), torch.zeros(2, 4))


def test_clip_by_value_takes_tensors_and_numbers():
    """TRL says numbers in its signature and raises a TypeError for them."""
    half = torch.full_like(VALUES, 0.5)
    for low in (-0.5, -half):
        for high in (0.5, half):
            same(core.clip_by_value(VALUES, low, high), "clip")


@pytest.mark.parametrize(("options", "expected"), RECORDED["filters"])
def test_top_k_top_p_filtering(options, expected):
    before = LOGITS.clone()
    same(core.top_k_top_p_filtering(LOGITS[0], **options), expected)
    assert torch.equal(before, LOGITS)


def test_respond_to_batch_draws_what_trl_draws():
    class Table(torch.nn.Module):
        def forward(self, tokens):
            return (LOGITS.reshape(8, 6)[tokens % 8],)

    core.set_seed(11)
    drawn = core.respond_to_batch(Table(), torch.tensor([[1, 2], [3, 4]]), txt_len=6, top_k=4, top_p=0.9)
    assert drawn.tolist() == RECORDED["responses"]


def test_length_sampler_and_seed():
    core.set_seed(3)
    sampler = core.LengthSampler(2, 5)
    lengths = [sampler() for _ in range(20)]
    assert lengths == RECORDED["lengths"] and set(lengths) == {2, 3, 4} and type(lengths[0]) is int
    core.set_seed(7)
    assert [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()] == RECORDED["seeded"]


def test_length_sampler_of_nothing():
    with pytest.raises(ValueError, match=r"range\(2, 2\) is empty"):
        core.LengthSampler(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.set_seed("a"), "seed must be a whole number from 0 to 2\\*\\*32 - 1; got 'a'"),
        (lambda: core.set_seed(-1), "seed must be a whole number from 0 to .*; got -1"),
        (lambda: core.LengthSampler(1.5, 3), "min_value must be a whole number of at least 0; got 1.5"),
        (lambda: core.stack_dicts([]), r"stats_dicts must be a list; got \[\]"),
        (
            lambda: core.masked_mean(torch.ones(2, 3), torch.ones(3)),
            r"mask must have the shape of values \(2, 3\); got \(3,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dictionaries():
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == RECORDED["flatten"]
    assert core.flatten_dict({"a": {"b": 1}}, sep=".") == {"a.b": 1}
    rows = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}, {"a": torch.tensor([1.0]), "b": torch.tensor(4.0)}]
    stacked = core.stack_dicts(rows)
    assert {key: value.tolist() for key, value in stacked.items()} == RECORDED["stacked"]
    assert stacked["a"][1, 1] == core.WANDB_PADDING == -1


def test_stats_to_np_and_scalars():
    stats = {
        "vector": torch.tensor([1.0, 2.0], requires_grad=True),
        "half": torch.tensor(3.0, dtype=torch.bfloat16),
        "int": 2,
        "numpy": np.float32(3),
        "list": [1, 2],
        "one": torch.tensor([4.0]),
    }
    arrays = core.stats_to_np(stats)
    kinds = {"vector": np.ndarray, "half": np.ndarray, "int": float, "numpy": float, "list": list, "one": np.ndarray}
    assert {key: type(value) for key, value in arrays.items()} == kinds
    assert arrays["half"].dtype == np.float32
    scalars = core.convert_to_scalar(arrays)
    assert scalars["one"] == 4.0 and scalars["half"] == 3.0 and type(scalars["one"]) is float
    assert scalars["vector"] is arrays["vector"] and scalars["list"] == [1, 2]


def test_randn_tensor():
    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    same(core.randn_tensor((2, 3), seeded(1)), "randn_one")
    same(core.randn_tensor((2, 3), [seeded(1)]), "randn_one")
    same(core.randn_tensor((2, 3), [seeded(1), seeded(2)]), "randn_rows")
    assert core.randn_tensor((2, 3), dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="3 rows, 2 generators"):
        core.randn_tensor((3, 2), [seeded(1), seeded(2)])


def test_device_cache_context():
    assert core.PPODecorators.optimize_device_cache is False
    with core.PPODecorators.empty_device_cache():
        pass

    @core.PPODecorators.empty_device_cache()
    def twice(x):
        return 2 * x

    assert twice(2) == 4 and math.isfinite(twice(1.0))


class TestRespondToBatchWithALanguageModel:
    """These run on the paged generator: other random numbers than TRL's, the same distribution."""

    queries = torch.tensor([[5, 9, 33], [60, 7, 3]])

    def test_top_1_is_greedy_decoding(self):
        model = tiny_models.causal()
        greedy = model.generate(self.queries, max_new_tokens=6, do_sample=False, eos_token_id=-1)[:, 3:]
        assert core.respond_to_batch(model, self.queries, txt_len=6, top_k=1).tolist() == greedy.tolist()

    @pytest.mark.parametrize("wrap", [AutoModelForCausalLMWithValueHead.from_pretrained, lambda model: model])
    def test_end_of_sequence_does_not_stop(self, wrap):
        model = wrap(tiny_models.causal("gpt2", eos_token_id=list(range(96))))
        core.set_seed(0)
        first = core.respond_to_batch(model, self.queries, txt_len=7)
        assert first.shape == (2, 7) and first.dtype == torch.int64
        core.set_seed(0)
        assert torch.equal(core.respond_to_batch(model, self.queries, txt_len=7), first)

    def test_first_token_follows_the_models_distribution(self):
        model = tiny_models.causal()
        expected = model(self.queries[:1]).logits[0, -1].softmax(-1)
        core.set_seed(1)
        drawn = core.respond_to_batch(model, self.queries[:1].repeat(4000, 1), txt_len=1)[:, 0]
        frequencies = torch.bincount(drawn, minlength=96) / 4000
        assert (frequencies - expected).abs().max() < 5 * math.sqrt(0.25 / 4000)

    def test_virtual_tokens_count(self):
        model = tiny_models.causal()
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=config)
        tiny_models.fill(policy.pretrained_model)
        mask = torch.ones_like(self.queries)
        wanted = policy.generate(
            input_ids=self.queries, attention_mask=mask, max_new_tokens=1, do_sample=False, eos_token_id=-1
        )[:, -1:]
        assert core.respond_to_batch(policy.eval(), self.queries, txt_len=1, top_k=1).tolist() == wanted.tolist()
