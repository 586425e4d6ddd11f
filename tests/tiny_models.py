"""Tiny language models whose weights follow from their parameter names: the same numbers in every transformers version."""

import zlib

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}

# name -> (configuration class, what differs from SIZES)
CAUSAL = {
    "gpt2": ("GPT2Config", {**{k: SIZES[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}}
             | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": None}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "phi3": ("Phi3Config", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "opt": ("OPTConfig", {**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "phi": ("PhiConfig", SIZES),  # a bias in the head
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
SEQ2SEQ = {
    "t5": ("T5Config", {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}),
    "bart": ("BartConfig", {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
                            "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2,
                            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}),
}  # fmt: skip


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Weights from their names; norms stay near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = 0.2 * torch.randn(parameter.shape, generator=rng, dtype=torch.float32)
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm_weight else noise)
    return model


def causal(name: str = "llama", **changes) -> torch.nn.Module:
    config, arguments = CAUSAL[name]
    config = getattr(transformers, config)(**{**arguments, **changes})
    return fill(transformers.AutoModelForCausalLM.from_config(config)).eval()


def seq2seq(name: str = "t5") -> torch.nn.Module:
    config, arguments = SEQ2SEQ[name]
    return fill(transformers.AutoModelForSeq2SeqLM.from_config(getattr(transformers, config)(**arguments))).eval()


def reward_adapter(folder) -> None:
    """A sequence-classification LoRA adapter for causal("llama"), as peft saves it."""
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(**{**CAUSAL["llama"][1], "num_labels": 1})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    fill(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8))).save_pretrained(str(folder))


WORDS = ["<unk>", "<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyzTU0123456789 .+-*'?:<>/="]
WORDS += ["<request>", "<call>", "<response>", "<submit>", "<Calc>", "<Broken>", "<Nope>"]


def tokenizer(with_bos: bool = False):
    """A character a token, and the tags of text environments."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("<[A-Za-z]+>|."), "isolated")
    backend.decoder = decoders.Fuse()
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Script(torch.nn.Module):
    """A model whose generate() says what it is told to, each row one reply, and keeps what it was asked."""

    class Inner:
        device = torch.device("cpu")

    pretrained_model = Inner()

    def __init__(self, tokenizer, replies: list[str]):
        super().__init__()
        self.tokenizer, self.replies, self.asked = tokenizer, list(replies), []

    def generate(self, input_ids, attention_mask, stopping_criteria, **kwargs):
        self.asked.append([input_ids.tolist(), attention_mask.tolist(), kwargs])
        said = [self.replies.pop(0) for _ in input_ids]
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids for text in said]
        for step in range(max(map(len, rows))):
            column = [row[step] if step < len(row) else self.tokenizer.pad_token_id for row in rows]
            input_ids = torch.cat([input_ids, torch.tensor(column)[:, None]], dim=1)
            if torch.as_tensor(stopping_criteria(input_ids, None)).all():
                break
        return input_ids


def calc(expression: str) -> str:
    return str(eval(expression))


def broken(argument: str) -> str:
    raise RuntimeError("no way")


# queries and the model's replies, turn by turn
EPISODES = {
    "one tool call": (["what is 1+2? "], ["<request><Calc>1+2<call>", "it is 3<submit>"]),
    "two at different speeds": (
        ["a", "bcd"],
        ["<request><Calc>1+2<call>", "<request><Calc>22+20<call>", "three<submit>", "fourty two<submit>"],
    ),
    "one is done, one goes on": (["a", "b"], ["a<submit>", "<request><Calc>2<call>", "b<submit>"]),
    "tool raises": (["q"], ["<request><Broken>x<call>", "ok<submit>"]),
    "no tool named": (["q"], ["<request>x<call>", "ok<submit>"]),
    "long answer, turns run out": (
        ["q"],
        ["<request><Calc>'a'*500<call>", "<request><Calc>1<call>", "<request><Calc>2<call>", "z<submit>"],
    ),
    "end of sequence": (["q"], ["abc</s>"]),
    "neither call nor submission": (["q"], ["abc"]),
    "call without request": (["q"], ["ab<call>"]),
    "text after submission": (["q"], ["ab<submit>cd"]),
    "argument with tag sign": (["q"], ["<request><Calc>3>2<call>", "yes<submit>"]),
}
CALLS = [
    "<request><Calc>1>2<call>",
    "<request>no<call>",
    "no",
    "<request><Calc>x<call><request><Broken>y<call>",
    "<call><request><Calc>x",
    "<request>\n<Calc>x\ny<call>",
]


def episode_rewards(texts, bonus=0):
    return [len(text) + bonus for text in texts]


def play(environment_class, queries, replies, with_bos):
    """One run, as JSON."""
    made_of = tokenizer(with_bos)
    model = Script(made_of, replies)
    tools = {"Calc": calc, "Broken": broken}
    environment = environment_class(
        model, made_of, tools, episode_rewards, "p: ", max_turns=3, generation_kwargs={"max_new_tokens": 9}
    )
    queries, responses, masks, rewards, histories = environment.run(queries, bonus=1)
    return {
        "queries": [tensor.tolist() for tensor in queries],
        "responses": [tensor.tolist() for tensor in responses],
        "masks": [tensor.tolist() for tensor in masks],
        "rewards": rewards,
        "texts": [history.text for history in histories],
        "ends": [[history.completed, history.truncated] for history in histories],
        "spans": [[list(map(list, h.text_spans)), list(map(list, h.token_spans)), h.system_spans] for h in histories],
        "asked": [[ids, mask] for ids, mask, _ in model.asked],
    }


def best_of_n(sampler_class, wrapper_class):
    """Texts of several kinds of queries, with sampling."""
    made_of = tokenizer()
    wrapper = wrapper_class.from_pretrained(causal("llama"))
    answers = []
    for query in ([5, 9, 33], [[5, 9, 33], [7, 8]], torch.tensor([5, 9]), [torch.tensor([5, 9]), torch.tensor([6])]):
        sampler = sampler_class(
            wrapper, made_of, lambda texts: [text.count("a") + len(set(text)) / 100 for text in texts], lambda: 12,
            sample_size=6, seed=4, n_candidates=2,
        )  # fmt: skip
        answers.append(sampler.generate(query, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=3))
    return answers
