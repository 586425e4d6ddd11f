"""Text environments and best-of-n against what TRL 0.11.4 did (fixtures/record_trl_extras.py), and what we do differently."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch

from fastppo import BestOfNSampler, TextEnvironment, TextHistory
from fastppo.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from fastppo.score import NonFinite

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_extras.json").read_text())


def environment(replies, tools=None, **kwargs):
    made_of = tiny_models.tokenizer()
    return TextEnvironment(
        tiny_models.Script(made_of, replies), made_of, tools, tiny_models.episode_rewards, "p: ", **kwargs
    )


# --- text environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.EPISODES)
def test_episodes_go_as_in_trl(name):
    ours = tiny_models.play(TextEnvironment, *tiny_models.EPISODES[name], with_bos=False)
    assert json.loads(json.dumps(ours)) == RECORDED["episodes"][name][0]


@pytest.mark.parametrize("name", tiny_models.EPISODES)
def test_only_queries_begin_with_the_begin_token(name):
    """TRL puts one in front of every tool answer too, in the tokens though not in the text."""
    ours = tiny_models.play(TextEnvironment, *tiny_models.EPISODES[name], with_bos=True)
    theirs = RECORDED["episodes"][name][1]
    assert ours["queries"] == theirs["queries"] and ours["texts"] == theirs["texts"]
    assert ours["responses"] == [[token for token in tokens if token != 1] for tokens in theirs["responses"]]
    assert any(1 in tokens for tokens in theirs["responses"]) == ("<response>" in theirs["texts"][-1])


def test_parse_tool_call():
    parsed = [list(environment([]).parse_tool_call(text)) for text in tiny_models.CALLS]
    assert parsed == RECORDED["calls"]


def test_unknown_tool_is_named():
    """TRL looks it up all the same and answers with the KeyError."""
    *_, histories = environment(["<request><Nope>x<call>", "ok<submit>"], {"Calc": tiny_models.calc}).run(["q"])
    assert histories[0].text == "p: q<request><Nope>x<call>Unknown tool Nope.<response>ok<submit>"


def test_responses_end_at_end_of_sequence():
    """TRL hands the padding that model.generate adds to PPO, as if the model had written it."""
    _, responses, masks, *_ = environment(["ab</s>", "abcdef<submit>"]).run(["q", "r"])
    made_of = tiny_models.tokenizer()
    assert [made_of.decode(response) for response in responses] == ["ab</s>", "abcdef<submit>"]
    assert [mask.tolist() for mask in masks] == [[1] * 3, [1] * 7]


def test_max_length_truncates():
    """TRL: TypeError."""
    *_, histories = environment(["abcdefgh<submit>", "a<submit>"], max_length=9).run(["q", "q"])
    assert [(h.completed, h.truncated) for h in histories] == [(True, True), (True, False)]


def test_generation_arguments_are_the_users():
    options = {"max_new_tokens": 5}
    env = environment(["a<submit>"], generation_kwargs=options)
    env.run(["q"])
    assert options == {"max_new_tokens": 5} and env.model.asked[0][2] == {"max_new_tokens": 5}


def test_batches_and_padding():
    env = environment(["a<submit>"] * 3)
    made_of = tiny_models.tokenizer()
    queries = [torch.tensor(made_of(text).input_ids) for text in ("abc", "a", "ab")]
    env._generate_batched(queries, batch_size=2, pad_to_multiple_of=4)
    (first, first_mask, _), (second, second_mask, _) = env.model.asked
    assert first == [[3, 4, 5, 6], [3, 3, 3, 4]] and first_mask == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert second == [[3, 3, 4, 5]] and second_mask == [[0, 0, 1, 1]]


def test_tools_as_a_list():
    class Search:
        def __call__(self, text):
            return text

    assert list(environment([], [Search(), tiny_models.calc]).tools) == ["Search", "calc"]
    assert environment([]).tools == {}


def test_environment_bad_input():
    with pytest.raises(ValueError, match="tokenizer, reward_fn must be given"):
        TextEnvironment(model=torch.nn.Linear(1, 1))
    for options, message in (
        ({"tools": [3]}, "tools must be functions .*; got"),
        ({"max_turns": "a"}, "max_turns must be a whole number of at least 1; got 'a'"),
        ({"max_tool_reponse": -1}, "max_tool_reponse must be a whole number of at least 3; got -1"),
        ({"generation_kwargs": {"max_new_tokens": "3"}}, "max_new_tokens must be a whole number .*; got '3'"),
    ):
        with pytest.raises(ValueError, match=message):
            environment([], **options)
    with pytest.raises(ValueError, match="queries must be a list of texts; got 'abc'"):
        environment([]).run("abc")
    with pytest.raises(ValueError, match="tokens must be a 1-D tensor of its tokens; got 'b'"):
        TextHistory("a", "b")
    env = environment(["a<submit>"] * 2)
    env.reward_fn = lambda texts: [1.0]
    with pytest.raises(ValueError, match="reward_fn gave 1 rewards for 2 episodes"):
        env.run(["q", "r"])


def test_run_of_nothing():
    assert environment([]).run([]) == ([], [], [], [], [])


@pytest.mark.parametrize(
    "wrapper",
    [
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal("gpt2")),
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_models.seq2seq("t5")),
    ],
    ids=["causal", "encoder-decoder"],
)
def test_with_a_language_model(wrapper):
    """Whatever random models say: the response is what generate says to the query alone, cut at the end of the turn."""
    made_of = tiny_models.tokenizer()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 3}
    env = TextEnvironment(wrapper.eval(), made_of, {}, tiny_models.episode_rewards, generation_kwargs=options)
    queries, responses, masks, rewards, histories = env.run(["abc", "what"])
    stops = {made_of.convert_tokens_to_ids(word) for word in ("<call>", "<submit>", "</s>")}
    for query, response, mask, history in zip(queries, responses, masks, histories, strict=True):
        alone = wrapper.generate(query[None], **options)[0]
        alone = (alone[1:] if env.is_encoder_decoder else alone[len(query) :]).tolist()
        end = next((at + 1 for at, token in enumerate(alone) if token in stops), len(alone))
        assert response.tolist() == alone[:end] and mask.all()
        assert history.text == made_of.decode(history.tokens)
    assert rewards == [len(history.last_text_segment) for history in histories]


# --- history ----------------------------------------------------------------------------------------------------------


def test_history():
    history = TextHistory("ab", torch.tensor([1, 2]))
    history.append_segment("cd", torch.tensor([3, 4, 5]), system=False)
    history.append_segment("e", torch.tensor([6]))
    assert history.text == "abcde" and history.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert history.token_masks.tolist() == [0, 0, 1, 1, 1, 0]
    assert history.text_spans == [(0, 2), (2, 4), (4, 5)] and history.token_spans == [(0, 2), (2, 5), (5, 6)]
    assert history.system_spans == [True, False, True] and history.last_text_segment == "e"
    query, response, mask = history.split_query_response_tokens()
    assert (query.tolist(), response.tolist(), mask.tolist()) == ([1, 2], [3, 4, 5, 6], [1, 1, 1, 0])
    assert not history.completed and history.reward == 0.0
    history.complete(truncated=True)
    assert history.completed and history.truncated


@pytest.mark.parametrize(("text", "tokens"), [("", [1]), ("x", [])])
def test_history_refuses_empty_segments(text, tokens):
    with pytest.raises(ValueError, match="Can't append empty text or token list to history"):
        TextHistory("ab", torch.tensor([1, 2])).append_segment(text, torch.tensor(tokens, dtype=torch.long))


def test_history_on_the_terminal(capsys):
    history = TextHistory("ab", torch.tensor([4, 5]))
    history.append_segment("c", torch.tensor([6]), system=False)
    history.reward = 1.5
    history.show_text(show_legend=True)
    assert capsys.readouterr().out == "abc\n\nReward: 1.5\n\n(Colour Legend: Prompt|System|Model|Reward)\n"
    history.show_tokens(tiny_models.tokenizer())
    assert capsys.readouterr().out == "a b c \n\nReward: 1.5\n"


# --- best of n --------------------------------------------------------------------------------------------------------


def test_best_of_n_picks_what_trl_picks():
    ours = tiny_models.best_of_n(BestOfNSampler, AutoModelForCausalLMWithValueHead)
    assert [len(texts) for texts in ours] == [1, 2, 1, 2] and all(len(best) == 2 for texts in ours for best in texts)
    assert ours == RECORDED["best_of_n"]


def sampler(**kwargs):
    defaults = {"model": AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal()), "sample_size": 5}
    scores = {"queries_to_scores": lambda texts: [-len(text) for text in texts], "length_sampler": lambda: 4}
    return BestOfNSampler(**{"tokenizer": tiny_models.tokenizer(), **scores, **defaults, **kwargs})


def test_best_of_n_takes_a_batch():
    """TRL: TypeError for a 2-D tensor."""
    texts = sampler().generate(torch.tensor([[5, 9, 33], [7, 8, 4]]), do_sample=True)
    assert len(texts) == 2 and all(isinstance(text, str) for best in texts for text in best)


def test_best_of_one_sample():
    """TRL: squeeze() takes the batch axis away and every token becomes a text of its own."""
    said = []
    one = sampler(sample_size=1, queries_to_scores=lambda texts: said.extend(texts) or [0.0] * len(texts))
    assert len(one.generate([5, 9, 33])[0]) == 1 and len(said) == 1


def test_best_of_n_bad_input():
    with pytest.raises(ValueError, match="tokenizer must be a transformers tokenizer; got str"):
        sampler(tokenizer="gpt2")
    with pytest.raises(
        ValueError, match="model must be an AutoModelForCausalLMWithValueHead or .*; got LlamaForCausalLM"
    ):
        sampler(model=tiny_models.causal())
    with pytest.raises(ValueError, match=r"n_candidates must be between 1 and sample_size \(5\); got 6"):
        sampler(n_candidates=6)
    with pytest.raises(ValueError, match="sample_size must be a whole number of at least 1; got 2.5"):
        sampler(sample_size=2.5)
    with pytest.raises(ValueError, match="length_sampler must be a function; got 3"):
        sampler(length_sampler=3)
    with pytest.raises(ValueError, match=r"length_sampler\(\) must be a whole number of at least 1; got 0"):
        sampler(length_sampler=lambda: 0).generate([5, 9])
    with pytest.raises(ValueError, match="tokenized_query must be token ids: .*; got 'hello'"):
        sampler().generate("hello")
    with pytest.raises(NonFinite, match="queries_to_scores.* is nan"):
        sampler(queries_to_scores=lambda texts: [float("nan")] * len(texts)).generate([5, 9])
    with pytest.raises(ValueError, match="queries_to_scores: 5 scores wanted, one per response; got 2"):
        sampler(queries_to_scores=lambda texts: [0.0, 1.0]).generate([5, 9])
    with pytest.raises(ValueError, match="tokenized_query is empty"):
        sampler().generate([])
