"""The classic trainer: its surface, what it refuses, generate, step, trackers, saving, and what it does about accidents."""

import inspect
import logging
import warnings

import numpy as np
import pytest
import torch
from golden_cases import SAMPLE, batch, changed, trainer, weights

import fastppo
from fastppo import PPOConfig, PPOTrainer

# TRL 0.11.4's signatures, less self
SIGNATURES = {
    "__init__": "config model ref_model tokenizer dataset optimizer data_collator num_shared_layers lr_scheduler training_data_collator",
    "generate": "query_tensor length_sampler batch_size return_prompt generate_ref_response generation_kwargs",
    "_generate_batched": "model query_tensors length_sampler batch_size return_prompt pad_to_multiple_of remove_padding generation_kwargs",
    "step": "queries responses scores response_masks",
    "log_stats": "stats batch rewards columns_to_log",
    "batched_forward_pass": "model queries responses model_inputs return_logits response_masks",
    "train_minibatch": "old_logprobs values logprobs logits vpreds mask advantages returns",
    "loss": "old_logprobs values logits vpreds logprobs mask advantages returns",
    "compute_rewards": "scores logprobs ref_logprobs masks",
    "compute_advantages": "values rewards mask",
    "prepare_model_inputs": "queries responses",
    "prepare_dataloader": "dataset data_collator",
    "record_step_stats": "kl_coef data",
    "gather_stats": "stats",
    "create_model_card": "path model_name",
    "_step_safety_checker": "batch_size queries responses scores masks",
    "_kl_penalty": "logprob ref_logprob",
    "_early_stop": "policykl",
    "_filter_kwargs": "kwargs target_func",
    "_remove_unused_columns": "dataset",
    "_set_signature_columns_if_needed": "",
    "_save_pretrained": "save_directory",
    "_show_tokens": "tokens masks",
    "_prepare_deepspeed": "model",
}
ATTRIBUTES = (
    "config model ref_model tokenizer accelerator current_device is_encoder_decoder is_peft_model is_distributed optimizer "
    "lr_scheduler dataset dataloader data_collator kl_ctl running current_step optional_peft_ctx model_params"
)


@pytest.fixture
def made():
    return trainer(fastppo, {})


# --- surface ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_take_trls_arguments(name):
    parameters = list(inspect.signature(getattr(PPOTrainer, name)).parameters)[1:]
    assert parameters == SIGNATURES[name].split()


def test_attributes_and_hub_methods(made):
    for name in ATTRIBUTES.split():
        assert hasattr(made, name), name
    for name in ("save_pretrained", "push_to_hub", "from_pretrained", "generate_model_card"):
        assert callable(getattr(PPOTrainer, name)), name
    assert (
        made.config.global_batch_size == 4 and made.config.world_size == 1 and made.config.is_encoder_decoder is False
    )
    assert isinstance(made.optimizer.optimizer, torch.optim.Adam)


def init(**changes):
    good = trainer(fastppo, {})
    arguments = {"config": good.config, "model": good.model, "ref_model": None, "tokenizer": good.tokenizer} | changes
    return PPOTrainer(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "config must be a PPOConfig, got <class 'dict'>"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a PreTrainedModelWrapper, got"),
        ({"ref_model": "gpt2"}, "ref_model must be a PreTrainedModelWrapper or `None`, got <class 'str'>"),
        ({"tokenizer": None}, "tokenizer must be a PreTrainedTokenizerBase like a PreTrainedTokenizer or"),
        ({"dataset": [1]}, "dataset must be a torch.utils.data.Dataset or datasets.Dataset"),
        ({"lr_scheduler": 3}, "lr_scheduler must be a torch.optim.lr_scheduler"),
        (
            {"optimizer": torch.optim.Adam},
            "optimizer must be None or .* over the model's parameters; got the class Adam itself",
        ),
        ({"optimizer": 0}, "optimizer must be None or a torch.optim.Optimizer .*; got 0"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, "holds none of the model's parameters"),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.ConstantLR(torch.optim.Adam([torch.zeros(1)]))},
            "another optimizer",
        ),
        ({"data_collator": 3}, "data_collator must be None or a function of a list of rows; got 3"),
        ({"training_data_collator": "x"}, "training_data_collator must be None or a function"),
        ({"num_shared_layers": 1.5}, "num_shared_layers must be None or a whole number of at least 0; got 1.5"),
        ({"config": PPOConfig(push_to_hub_if_best_kwargs={"a": 1})}, "You have to specify repo_id"),
    ],
)
def test_init_refuses(changes, message):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        init(**changes)


def test_a_model_that_cannot_be_its_own_reference_and_one_that_cannot_learn():
    model = trainer(fastppo, {}).model
    with pytest.raises(ValueError, match="ref_model is the model itself: the KL between them would always be 0"):
        init(model=model, ref_model=model)
    with pytest.raises(ValueError, match="model has no parameter that trains"):
        init(model=model.requires_grad_(False))


def test_processes_that_were_launched_and_do_not_know_of_each_other_are_warned(monkeypatch, caplog):
    trainer(fastppo, {})  # accelerate has settled that there is one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer(fastppo, {})
    assert "2 processes were launched, but this one trains alone" in caplog.text


def test_init_warns():
    with pytest.warns(UserWarning, match="No dataset is provided"):
        init()
    good = trainer(fastppo, {})
    with pytest.warns(UserWarning, match="num_shared_layers is ignored"):
        init(ref_model=good.ref_model, num_shared_layers=1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, r, s: (q[:1], r, s), r"Batch size \(4\) does not match number of examples - but got 1 for: queries"),
        (
            lambda q, r, s: (torch.stack([q[0]] * 4), r, s),
            "queries must be a list of tensors - got <class 'torch.Tensor'>",
        ),
        (lambda q, r, s: (q, r, [1.0] * 4), "Elements in scores must be tensors - got <class 'float'>"),
        (lambda q, r, s: (q, r, [torch.zeros(2)] * 4), "Scores must be 1-dimensional"),
        (lambda q, r, s: ([torch.tensor([], dtype=torch.long), *q[1:]], r, s), r"queries\[0\] is empty"),
        (lambda q, r, s: (q, [x[:0] for x in r], s), "every response is empty"),
        (lambda q, r, s: (q, r, s, [torch.ones(1)] * 4), r"masks\[0\] must have the shape of its response"),
        (
            lambda q, r, s: (q, r, s, [torch.full(x.shape, 0.5) for x in r]),
            r"masks\[0\] must be 1 where a token counts",
        ),
        (
            lambda q, r, s: ([x.bool() for x in q], r, s),
            r"queries\[0\] must be a 1-D tensor of token ids, got torch.bool",
        ),
        (lambda q, r, s: (q, r, [x.to(torch.complex64) for x in s]), r"scores\[0\] must be a real number; got"),
        (lambda q, r, s: ([q[0].float(), *q[1:]], r, s), r"queries\[0\] must be a 1-D tensor of token ids"),
    ],
)
def test_step_refuses(made, spoil, message):
    queries, responses, scores, _ = batch()
    with pytest.raises(ValueError, match=message):
        made.step(*spoil(queries, responses, scores))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query_tensor": ["hello"]}, r"query_tensor\[0\] must be a 1-D tensor of token ids .*; got 'hello'"),
        ({"query_tensor": [[5, 6]]}, r"query_tensor\[0\] must be a 1-D tensor .*; got \[5, 6\]"),
        ({"length_sampler": 3}, "length_sampler must be a function; got 3"),
        ({"length_sampler": lambda: 0}, r"length_sampler\(\) must be a whole number of at least 1; got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1; got 2.5"),
        ({"return_prompt": "no"}, "return_prompt must be True or False; got 'no'"),
        ({"generate_ref_response": 2}, "generate_ref_response must be True or False; got 2"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number .*; got 2.5"),
        ({"max_new_tokens": [2, 2]}, r"or a list with one for each batch of prompts \(1 here\); got \[2, 2\]"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them .*; got 'x'"),
    ],
)
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_generate_refuses(model, given, message):
    given = {"query_tensor": [torch.tensor([5, 6])], "max_new_tokens": 2} | given
    with pytest.raises(ValueError, match=message):
        trainer(fastppo, {"model": model}).generate(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stats": {}}, "stats must be the dictionary that step"),
        ({"batch": None}, "batch must be a dictionary with the columns of the batch; got None"),
        ({"rewards": None}, "rewards must be a list of numbers, one per sequence, as handed to step"),
        ({"rewards": []}, "rewards must be a list of numbers"),
        ({"rewards": ["a"]}, r"rewards\[0\] must be a number; got 'a'"),
        ({"rewards": torch.ones(2, 2)}, r"rewards\[0\] must be a number; got a torch.float32 tensor of shape \(2,\)"),
        ({"columns_to_log": "query"}, "columns_to_log must be a list of column names; got 'query'"),
    ],
)
def test_log_stats_refuses(made, changes, message):
    given = {"stats": {"objective/kl": 0.0}, "batch": {"query": ["a"], "response": ["b"]}, "rewards": [1.0]}
    made.log_stats(**given)
    with pytest.raises(ValueError, match=message):
        made.log_stats(**given | changes)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("input_ids", "dataset has 3 rows, fewer than batch_size .4."),
        ("story", "none of its columns is an input of the"),
    ],
)
def test_a_dataset_that_makes_no_batch_is_refused(column, message):
    from datasets import Dataset

    with pytest.raises(ValueError, match=message):
        init(dataset=Dataset.from_dict({column: [[1]] * 3}))


@pytest.mark.parametrize("keep", [True, False])
def test_dataset_becomes_full_shuffled_batches(keep):
    from datasets import Dataset

    rows = {"input_ids": [[1, i] for i in range(10)], "query": [str(i) for i in range(10)], "junk": list(range(10))}
    good = trainer(fastppo, {})
    good.config.remove_unused_columns = not keep
    collate = lambda data: {key: [d[key] for d in data] for key in data[0]}  # noqa: E731
    made = PPOTrainer(good.config, good.model, None, good.tokenizer, Dataset.from_dict(rows), data_collator=collate)
    seen = list(made.dataloader)
    assert [len(x["query"]) for x in seen] == [4, 4]
    assert set(seen[0]) == ({"input_ids", "query", "junk"} if keep else {"input_ids", "query"})
    assert sum((x["query"] for x in seen), []) != [str(i) for i in range(8)]


def test_filter_kwargs(made):
    assert made._filter_kwargs({"input_ids": 1, "foo": 2}, made.model.forward) == {"input_ids": 1}


def test_accumulation_does_not_end_with_the_dataloader():
    """In the last batch of a dataloader accelerate syncs every mini-batch; TRL then makes twice the optimizer steps."""
    case = {"config": {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 1}, "sgd": True}
    for packed in (True, False):
        made = trainer(fastppo, case, packed=packed)
        loader = made.accelerator.prepare(torch.utils.data.DataLoader(range(8), batch_size=4))
        counts, step = [], made.optimizer.optimizer.step
        for _ in loader:
            count = [0]

            def counting(*args, _count=count, _step=step, **kwargs):
                _count[0] += 1
                return _step(*args, **kwargs)

            made.optimizer.optimizer.step = counting
            made.step(*batch(case))
            counts.append(count[0])
        assert counts == [2, 2]


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_forms(made):
    queries = [torch.tensor([1, 5, 6]), torch.tensor([1, 7])]
    with pytest.raises(ValueError, match="must be a tensor of shape"):
        made.generate(torch.ones(2, 3, dtype=torch.long))
    one = made.generate(queries[0], **SAMPLE)
    assert one.dim() == 2 and one.shape[0] == 1 and one[0, :3].tolist() == [1, 5, 6]
    for prompt in (True, False):
        got = made.generate(queries, return_prompt=prompt, **SAMPLE)
        assert [x.dim() for x in got] == [1, 1]
        assert all((x[: len(q)].tolist() == q.tolist()) for x, q in zip(got, queries, strict=True)) or not prompt
        assert all(len(x) <= 8 + len(q) * prompt for x, q in zip(got, queries, strict=True))
    policy, reference = made.generate(queries, generate_ref_response=True, do_sample=False, max_new_tokens=5)
    assert len(policy) == len(reference) == 2


def test_length_is_drawn_per_chunk(made):
    lengths = iter([3, 6])
    greedy = {"do_sample": False, "eos_token_id": -1, "return_prompt": False}
    got = made.generate([torch.tensor([1, 5])] * 4, length_sampler=lambda: next(lengths), batch_size=2, **greedy)
    assert [len(x) for x in got] == [3, 3, 6, 6]


def test_eos_in_a_prompt_cuts_nothing(made):
    """TRL cuts the returned prompt at its own first end-of-sequence token."""
    query = torch.tensor([1, 2, 5])
    assert made.generate([query], **SAMPLE)[0][:3].tolist() == [1, 2, 5]


def test_responses_end_with_eos_and_padding_is_kept_on_request(made):
    options = SAMPLE | {"eos_token_id": list(range(48, 96)) + [2]}
    rows = made._generate_batched(
        made.model, [torch.tensor([1, 5])] * 4, remove_padding=False, return_prompt=False, **options
    )
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_in_every_rollout(training):
    """TRL leaves the model in training mode after the first step, and samples with dropout from then on."""
    made = trainer(fastppo, {"model": "gpt2"})
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    made.model.train(training)
    made.step(*batch())
    assert made.model.training is training
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1}
    first, second = (made.generate(torch.tensor([1, 5, 6]), **greedy) for _ in range(2))
    assert torch.equal(first, second)


def test_encoder_decoder_generates(made):
    made = trainer(fastppo, {"model": "t5"})
    got = made.generate([torch.tensor([5, 6, 2]), torch.tensor([7, 2])], max_new_tokens=4)
    assert [int(x[0]) for x in got] == [0, 0] and all(len(x) <= 5 for x in got)
    assert made.generate(torch.tensor([5, 6, 2]), max_new_tokens=4).dim() == 2


# --- step -------------------------------------------------------------------------------------------------------------


def test_inputs_and_forward_pass_have_trls_shapes(made):
    queries, responses, _, _ = batch()
    inputs = made.prepare_model_inputs(queries, responses)
    width = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, width)
    logprobs, logits, values, masks = made.batched_forward_pass(made.model, queries, responses, inputs, True)
    assert logprobs.shape == values.shape == masks.shape == (4, width - 1) and logits.shape == (4, width - 1, 96)
    assert made.batched_forward_pass(made.model, queries, responses, inputs)[1] is None


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "full"])
def test_kl_penalty_worked_by_hand(kind):
    made = trainer(fastppo, {"config": {"kl_penalty": kind}})
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    want = {"kl": p - q, "abs": (p - q).abs(), "mse": 0.5 * (p - q) ** 2, "full": (p.exp() * (p - q)).sum()}[kind]
    torch.testing.assert_close(made._kl_penalty(p, q), want)


def test_a_subclass_that_overrides_a_stage_gets_padded_tensors(caplog):
    class Doubled(PPOTrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
            assert logprobs.shape == masks.shape
            return super().compute_rewards([2 * s for s in scores], logprobs, ref_logprobs, masks)

    good = trainer(fastppo, {})
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Doubled(good.config, good.model, good.ref_model, good.tokenizer)
    assert "Doubled overrides compute_rewards" in caplog.text
    assert type(made._path).__name__ == "PaddedPath"
    assert np.isfinite(made.step(*batch())["ppo/loss/total"])


def test_other_models_take_the_padded_path_and_say_why(caplog):
    with caplog.at_level(logging.WARNING):
        made = trainer(fastppo, {"model": "bloom"})
    assert "step() runs padded batches: BloomForCausalLM" in caplog.text
    assert np.isfinite(made.step(*batch())["ppo/loss/total"])


@pytest.mark.parametrize("packed", [True, False])
def test_empty_and_one_token_responses(packed):
    """TRL crashes on a response without tokens; we learn from the others."""
    queries, responses, scores, _ = batch()
    responses[1], responses[2] = responses[1][:0], responses[2][:1]
    made = trainer(fastppo, {}, packed=packed)
    before = weights(made)
    stats = made.step(queries, responses, scores)
    assert np.isfinite(stats["ppo/loss/total"]) and changed(before, made)
    assert stats["objective/kl_dist"][1] == 0


def test_a_response_of_only_padding_is_tokens_like_any_other():
    """Who hands over pad tokens means them; response_masks is there for those that should not count."""
    stats = []
    for packed in (True, False):
        queries, responses, scores, _ = batch()
        made = trainer(fastppo, {}, packed=packed)
        responses[1] = torch.full_like(responses[1], made.tokenizer.pad_token_id)
        np.random.seed(0)
        stats.append(made.step(queries, responses, scores))
        assert stats[-1]["tokens/responses_dist"][1] == len(responses[1])
    for key in ("ppo/loss/total", "ppo/policy/approxkl", "objective/kl", "ppo/mean_non_score_reward"):
        assert stats[0][key] == pytest.approx(stats[1][key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_past_the_models_limit_is_refused(packed):
    made = trainer(fastppo, {}, packed=packed)
    queries, responses, scores, _ = batch()
    queries[2] = torch.ones(64, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"sequence 2 has 64 \+ {len(responses[2])} tokens, the model's limit is 64"):
        made.step(queries, responses, scores)


@pytest.mark.parametrize("token", [-1, 96])
def test_a_token_outside_the_vocabulary_is_refused(token):
    made = trainer(fastppo, {})
    queries, responses, scores, _ = batch()
    responses[1] = torch.tensor([5, token])
    with pytest.raises(ValueError, match=rf"tokens from .*{token}.*; the model's vocabulary is 0 .. 95"):
        made.step(queries, responses, scores)


def test_gradient_checkpointing_runs_and_changes_nothing():
    """TRL's forward passes are in eval mode, where layers ignore gradient checkpointing."""
    calls, stats = [], []
    for on in (False, True):
        made = trainer(fastppo, {"config": {"gradient_checkpointing": on}})
        for module in made.model.modules():
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
                function = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = lambda *a, f=function, **k: (calls.append(1), f(*a, **k))[1]
        np.random.seed(0)
        stats.append(made.step(*batch()))
    assert len(calls) >= 2 * 2 * 2  # layers x mini-batches x epochs
    assert stats[0]["ppo/loss/total"] == pytest.approx(stats[1]["ppo/loss/total"], rel=1e-4, abs=1e-6)
    assert stats[0]["ppo/policy/approxkl"] == pytest.approx(stats[1]["ppo/policy/approxkl"], rel=1e-3)


def test_bf16_computes_near_fp32_with_fp32_weights():
    from accelerate.state import AcceleratorState

    stats = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process, says accelerate
        made = trainer(fastppo, {}, mixed_precision=precision)
        np.random.seed(0)
        stats.append(made.step(*batch()))
        assert all(p.dtype == torch.float32 for p in made.model.parameters())
        wanted = torch.bfloat16 if precision == "bf16" else None
        assert made._generator(made.model).decode_weights is wanted
    for name in ("objective/entropy", "ppo/policy/entropy", "ppo/loss/value"):
        assert stats[0][name] == pytest.approx(stats[1][name], rel=0.05)
    assert stats[0]["objective/entropy"] != stats[1]["objective/entropy"]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_bf16_run_decodes_with_bf16_weights_within_the_allowed_mismatch():
    """generation={"decode_weights": None} keeps float32, and so does deterministic=True."""
    from accelerate.state import AcceleratorState

    found = {}
    for name, options in (
        ("bf16", {}),
        ("told", {"generation": {"decode_weights": None}}),
        ("exact", {"deterministic": True}),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = trainer(fastppo, {}, mixed_precision="bf16", **options)
        queries, _, scores, _ = batch()
        responses = made.generate(queries, return_prompt=False, max_new_tokens=6, pad_token_id=0)
        found[name] = made._generator(made.model).decode_weights, made.step(queries, responses, scores)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [weights for weights, _ in found.values()] == [torch.bfloat16, None, None]
    mismatch = found["bf16"][1]["fastppo/mismatch_mean"]
    assert 0 < mismatch <= made.config.max_mismatch, mismatch
