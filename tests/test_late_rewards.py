"""The late PPOTrainer's rewards (models, functions, endpoints) and datasets (ids, texts, conversations)."""

import http.server
import json
import re
import threading

import pytest
import torch
from late_cases import prompts, trainer, words
from sft_cases import make_model, make_tokenizer, sentences

from fastppo.engine.spec import Spec
from fastppo.experimental.ppo import rewards
from fastppo.experimental.ppo.prompts import PromptStream
from fastppo.experimental.ppo.rewards import FunctionReward, Judged
from fastppo.score import NonFinite

# --- rewards ----------------------------------------------------------------------------------------------------------


def test_reward_functions_get_texts_and_columns(tmp_path):
    seen = {}
    data = [{"prompt": text, "answer": i} for i, text in enumerate(sentences(8, 1))]

    def reward(prompts, completions, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.5] * len(prompts)

    def everything(prompts, completions, **columns):
        seen["all"] = set(columns)
        return torch.ones(len(prompts))

    run = trainer(tmp_path, reward=[reward, (everything, 2.0)], data=data, total_episodes=8)
    run.train()
    assert seen["prompts"] == [data[i]["prompt"] for i in seen["answer"]] and isinstance(seen["completions"][0], str)
    assert seen["all"] == {"prompt", "answer"}
    line = run.state.log_history[0]
    assert line["objective/scores"] == 2.5 and line["rewards/reward"] == 0.5 and line["rewards/everything"] == 1.0
    weighted = trainer(tmp_path, reward=[reward, everything], reward_weights=[1.0, -1.0], data=data, total_episodes=8)
    weighted.train()
    assert weighted.state.log_history[0]["objective/scores"] == -0.5


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "modules"])
def test_reward_model_scores_as_its_own_forward(tmp_path, engine):
    model = make_model("reward", 2)
    if not engine:
        model.score.register_forward_hook(lambda *_: None)  # what the engine does not run
    run = trainer(tmp_path, reward=model, stop_token="eos")
    assert isinstance(run._rewards.sources[0]._engine.read(), Spec) is engine
    rollout = run.rollout([torch.tensor(row["input_ids"]) for row in prompts(5)], seed=0)
    scores, named = run.judge(rollout, {})
    for prompt, response, score in zip(rollout.prompts, rollout.responses, scores, strict=True):
        with torch.no_grad():
            wanted = model(torch.cat([prompt, response])[None]).logits[0, 0]
        assert float(score) == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)
    assert named == {}


def test_missing_eos_penalty(tmp_path):
    run = trainer(
        tmp_path, reward=lambda prompts, completions: [1.0] * len(prompts), missing_eos_penalty=3.0, stop_token="eos"
    )
    rollout = run.rollout([torch.tensor([7, 8])] * 64, seed=0)
    scores, _ = run.judge(rollout, {})
    ended = torch.tensor([bool((response == 2).any()) for response in rollout.responses])
    assert 0 < ended.sum() < 64
    assert scores.tolist() == torch.where(ended, 1.0, -2.0).tolist()
    assert all(int((response == 2).sum()) <= 1 for response in rollout.responses)


def test_without_stop_token_every_response_is_full(tmp_path):
    run = trainer(tmp_path)
    rollout = run.rollout([torch.tensor([7, 8])] * 64, seed=0)
    assert rollout.mask_BT.shape == (64, 6) and bool(rollout.mask_BT.all())
    assert bool((rollout.tokens_BT == 2).any())


class Endpoint(http.server.BaseHTTPRequestHandler):
    failures = 0
    bodies: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
        answer = json.dumps({"scores": [words(text, "cat") for text in body["completions"]]}).encode()
        self.send_response(404 if "nothing" in self.path else 200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(rewards.time, "sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.failures, Endpoint.bodies = 0, []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_reward_endpoint(tmp_path, endpoint):
    data = [{"prompt": text, "source": "x"} for text in sentences(8, 1)]
    Endpoint.failures = 2  # a server that restarts: tried again
    run = trainer(tmp_path, reward=f"{endpoint}/score", data=data, total_episodes=8)
    run.train()
    body = Endpoint.bodies[-1]
    assert set(body) == {"prompts", "completions", "prompt", "source"} and len(Endpoint.bodies) == 3
    wanted = sum(words(text, "cat") for text in body["completions"]) / 8
    assert run.state.log_history[0]["objective/scores"] == pytest.approx(wanted)
    with pytest.raises(RuntimeError, match="failed after 1 try: HTTP Error 404"):
        trainer(tmp_path, reward=f"{endpoint}/nothing", data=data).train()


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ({"score": [1, 2]}, "wanted a list or {\"scores\": [...]}; got {'score': [1, 2]}"),
        ([1.0], "wanted 2 numbers, one per completion; got 1 numbers in 1 entries: [1.0]"),
        ({"scores": [1.0, None]}, "got 1 numbers in 2 entries: [1.0, None]"),
    ],
)
def test_an_endpoints_wrong_answer_is_shown(answer, wanted, monkeypatch):
    source = rewards.EndpointReward("http://127.0.0.1:1/score")
    monkeypatch.setattr(source, "_post", lambda body: answer)
    judged = rewards.Judged(None, None, ["a", "b"], ["c", "d"], {})
    with pytest.raises(rewards.EndpointError, match=re.escape(f"reward endpoint {source.url}: ")) as raised:
        source(judged)
    assert wanted in str(raised.value)


def test_nan_score_stops_or_skips(tmp_path):
    def broken(prompts, completions):
        return [float("nan"), *[0.0] * (len(prompts) - 1)]

    with pytest.raises(NonFinite, match="nan for sequence"):
        trainer(tmp_path, reward=broken).train()
    run = trainer(tmp_path, reward=broken, on_nonfinite="skip")
    before = [p.clone() for p in run.model.parameters()]
    with pytest.warns(RuntimeWarning, match="nan"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


# --- data -------------------------------------------------------------------------------------------------------------


def test_text_and_conversations_become_prompts(tmp_path):
    question, answer = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
    rows = {
        "prompt": [{"prompt": "the cat"}],
        "chat": [{"prompt": [question]}],
        "messages": [{"messages": [question, answer]}],
        "text": [{"text": "the cat"}],
    }
    tokenizer = make_tokenizer()
    texts = {
        name: tokenizer.decode(trainer(tmp_path, data=data).train_dataset[0]["input_ids"])
        for name, data in rows.items()
    }
    assert texts["prompt"] == texts["text"] == "the cat"
    assert texts["chat"] == texts["messages"] == "<s> user the cat assistant"


def test_own_collator_and_its_padding(tmp_path):
    from transformers import DataCollatorWithPadding

    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    run = trainer(tmp_path, data_collator=DataCollatorWithPadding(tokenizer))
    own = next(iter(run.get_train_dataloader()))
    plain = next(iter(trainer(tmp_path).get_train_dataloader()))
    assert [x.tolist() for x in own.prompts] == [x.tolist() for x in plain.prompts]


def test_prompt_stream_covers_the_data_and_knows_its_place():
    whole = list(PromptStream(10, 4, 5, seed=1))
    assert sorted(sum(whole, [])[:10]) == sorted(sum(whole, [])[10:]) == list(range(10))
    resumed = PromptStream(10, 4, 5, seed=1)
    resumed.first = 3
    assert list(resumed) == whole[3:] and len(resumed) == 2
    parts = [list(PromptStream(10, 4, 5, seed=1, rank=rank, processes=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_functions_that_name_completions_elsewhere_get_them_by_name():
    judged = Judged(None, None, ["2 + 2 ="], ["4"], {"answer": ["4"], "level": ["easy"]})

    def first(completions, answer):
        return completions + answer

    def turned(completions, prompts):
        return completions + prompts

    def all_of_it(completions, **rest):
        return [completions, sorted(rest.items())]

    def keywords(*, completions):
        return completions

    def other_names(before, after, level):
        return before + after + level

    assert FunctionReward(first)(judged) == ["4", "4"]
    assert FunctionReward(turned)(judged) == ["4", "2 + 2 ="]
    rest = [("answer", ["4"]), ("level", ["easy"]), ("prompts", ["2 + 2 ="])]
    assert FunctionReward(all_of_it)(judged) == [["4"], rest]
    assert FunctionReward(keywords)(judged) == ["4"]
    assert FunctionReward(other_names)(judged) == ["2 + 2 =", "4", "easy"]
