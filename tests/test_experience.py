"""Prepare: masks, padded forward passes, packing, micro-batch plans, scores; packed equals padded."""

import pytest
import torch
from golden_cases import batches, trainer
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo import experience, packed, update
from fastppo.metrics import Clock
from fastppo.score import NonFinite, as_scores, score, shape_scores
from fastppo.trainer import RunningMoments


def ids(*numbers):
    return torch.tensor(numbers)


QUERIES, RESPONSES = [ids(5, 6, 7), ids(8, 9)], [ids(10, 11), ids(12)]


@pytest.mark.parametrize(
    ("side", "want"),
    [("right", [[0, 0, 1, 1], [0, 1, 0, 0]]), ("left", [[0, 0, 1, 1], [0, 0, 0, 1]])],
)
def test_response_mask_worked_by_hand(side, want):
    made = trainer(fastppo, {"side": side, "config": {"batch_size": 2}})
    inputs = made.prepare_model_inputs(QUERIES, RESPONSES)
    assert inputs["attention_mask"].tolist() == (
        [[1] * 5, [1, 1, 1, 0, 0]] if side == "right" else [[1] * 5, [0, 0, 1, 1, 1]]
    )
    mask = experience.response_mask(inputs["attention_mask"], QUERIES, RESPONSES, None, False)
    assert mask.int().tolist() == want
    holes = experience.response_mask(inputs["attention_mask"], QUERIES, RESPONSES, [ids(0, 1), ids(1)], False)
    assert holes.int().tolist()[0] == [0, 0, 0, 1]
    assert torch.equal(packed.sequences(QUERIES, RESPONSES, None, side == "left").mask_BT, mask)


def test_encoder_decoder_counts_from_the_third_token():
    mask = experience.response_mask(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), [ids(4), ids(4, 5)], [ids(0, 3, 4, 2), ids(0, 3, 2)], None, True)  # fmt: skip
    assert mask.int().tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("model", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("budget", [None, 9])
def test_packed_pass_equals_padded(model, budget):
    """Same log-probs and values at every response token; nothing elsewhere."""
    made = trainer(fastppo, {"model": model})
    assert type(made._path).__name__ == "PackedPath"
    queries, responses, _, _ = next(batches({}, 1))
    inputs = made.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        want = made.batched_forward_pass(made.model, queries, responses, inputs)
    sequences = packed.sequences(queries, responses, None, pad_left=False)
    with update.eval_mode(made.model):
        logprobs, values = packed.score_tokens(made.model, sequences, budget, with_values=True)
    for got, padded in ((logprobs, want.logprobs), (values, want.values)):
        torch.testing.assert_close(got[want.masks], padded[want.masks], rtol=1e-4, atol=1e-4)
        assert not got[~want.masks].any()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 120))
@settings(deadline=None, max_examples=30)
def test_plan_keeps_every_row_and_the_budget(lengths, budget):
    bins = packed.plan(lengths, range(len(lengths)), budget)
    assert sorted(sum(bins, [])) == list(range(len(lengths)))
    assert all(rows for rows in bins)
    loads = [sum(lengths[r] for r in rows) for rows in bins]
    assert all(load <= budget or len(rows) == 1 for load, rows in zip(loads, bins, strict=True))
    assert max(loads) - min(loads) <= max(lengths)  # balanced


def test_left_padding_gives_gpt2_its_positions():
    """TRL counts positions from the padding on; we from the first token: the same numbers as padded on the right."""
    results = []
    for side in ("right", "left"):
        made = trainer(fastppo, {"model": "gpt2", "side": side}, packed=False)
        queries, responses, _, _ = next(batches({}, 1))
        forward = made.batched_forward_pass(
            made.model, queries, responses, made.prepare_model_inputs(queries, responses)
        )
        results.append(torch.cat([forward.logprobs[i][forward.masks[i]] for i in range(4)]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_whitened_rewards_do_not_leak_from_padding():
    """A row's advantages before whitening don't depend on how far the batch is padded (TRL's do)."""
    mask = torch.tensor([[True, True, True, False]])
    values, rewards = torch.tensor([[0.1, 0.2, 0.3, 0.0]]), torch.tensor([[0.5, -0.5, 1.0, 0.0]])
    short = [x[:, :3] for x in (values, rewards, mask)]
    options = {"gamma": 0.9, "lam": 0.8, "whiten_rewards": True}
    long_result = experience.advantages_and_returns(values, rewards, mask, **options)
    for got, want in zip(long_result, experience.advantages_and_returns(*short, **options), strict=True):
        torch.testing.assert_close(got[:, :3], want)


# --- scores ---------------------------------------------------------------------------------------------------------------


def test_score_scaling_over_steps():
    """TRL 0.11.4 crashes here (its running std is a float that it calls .to() on)."""
    config = fastppo.PPOConfig(use_score_scaling=True, use_score_norm=True, score_clip=1.0)
    running, seen = RunningMoments(None), torch.empty(0)
    for step in range(3):
        scores = torch.randn(8, generator=torch.Generator().manual_seed(step)) + step
        seen = torch.cat([seen, scores])
        want = ((scores - seen.mean()) / seen.std()).clamp(-1, 1)
        torch.testing.assert_close(shape_scores(scores, config, running), want, rtol=1e-4, atol=1e-4)


def test_score_takes_callables_numbers_and_classifiers():
    prompts, responses = ["a ", "b "], ["x", "yy"]
    assert score(lambda p, r: [len(x) for x in r], prompts, responses).tolist() == [1.0, 2.0]
    assert score([torch.tensor(1), 2.5], prompts, responses).tolist() == [1.0, 2.5]
    with pytest.raises(ValueError, match="2 scores wanted, one per response; got 3"):
        score(lambda p, r: [0, 0, 0], prompts, responses)
    with pytest.raises(NonFinite, match=r"score is nan for sequence \[1\]|score is nan for sequences? \[1\]"):
        as_scores([0.0, float("nan")], 2)
    with pytest.raises(TypeError, match="judge must be"):
        score(3, prompts, responses)


def test_full_kl_of_packed_equals_padded():
    made = trainer(fastppo, {"config": {"kl_penalty": "full"}})
    queries, responses, scores, _ = next(batches({}, 1))
    batch = made._path.prepare(queries, responses, torch.stack(scores), None, Clock(made.current_device))
    padded = trainer(fastppo, {"config": {"kl_penalty": "full"}}, packed=False)
    want = padded._path.prepare(queries, responses, torch.stack(scores), None, Clock(made.current_device))
    mask = want.mask_BT
    torch.testing.assert_close(batch.kl_BT[mask], want.kl_BT[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.advantages_BT[mask], want.advantages_BT[mask], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("total", [None, lambda x: x])
def test_one_token_is_too_few_to_whiten_and_says_so(total):
    one = torch.tensor([[True, False]])
    arguments = torch.zeros(1, 2), torch.ones(1, 2), one
    with pytest.raises(
        NonFinite, match="one response token in the whole batch.* Take a larger batch or longer responses"
    ):
        experience.advantages_and_returns(*arguments, gamma=1.0, lam=0.95, whiten_rewards=False, total=total)
    two = torch.ones(1, 2, dtype=torch.bool)
    found = experience.advantages_and_returns(
        *arguments[:2], two, gamma=1.0, lam=0.95, whiten_rewards=True, total=total
    )
    assert all(x.isfinite().all() for x in found)
