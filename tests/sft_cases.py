"""Small SFT and reward runs that TRL 1.16.0 and fastppo both do, for recording and for comparing.

Record (in an environment with trl==1.16.0): python tests/sft_cases.py tests/fixtures/trl_1_16_sft_reward.json
"""

import importlib
import json
import sys
import tempfile

import torch

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "over",
    "mat",
    "tree",
    "house",
    "it",
    "was",
]
WORDS += ["good", "bad", "happy", "sad", "very", "and", "then", "we", "saw"]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} {{ eos_token }} {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "system", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(kind: str = "causal", seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )
    torch.manual_seed(seed)
    model = (LlamaForCausalLM if kind == "causal" else LlamaForSequenceClassification)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return model


def sentences(count: int, seed: int) -> list[str]:
    """`count` texts of 1 to 14 words."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (count,), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=draw).tolist()) for n in lengths]


def rows(kind: str) -> list[dict]:
    first, second, third = (sentences(22, seed) for seed in (1, 2, 3))
    chat = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in zip(first, second)]  # noqa: B905
    other = [{"role": "assistant", "content": c} for c in third]
    return {
        "text": [{"text": a} for a in first],
        "prompt_completion": [{"prompt": a, "completion": " " + b} for a, b in zip(first, second)],  # noqa: B905
        "messages": [{"messages": [q, a]} for q, a in chat],
        "chat_completion": [{"prompt": [q], "completion": [a]} for q, a in chat],
        "pairs": [{"chosen": a, "rejected": b} for a, b in zip(second, third)],  # noqa: B905
        "prompted_pairs": [
            {"prompt": a, "chosen": " " + b, "rejected": " " + c}
            for a, b, c in zip(first, second, third)  # noqa: B905
        ],
        "margin_pairs": [{"chosen": a, "rejected": b, "margin": len(a) / 50} for a, b in zip(second, third)],  # noqa: B905
        "chat_pairs": [
            {"prompt": [q], "chosen": [a], "rejected": [b]}
            for (q, a), b in zip(chat, other)  # noqa: B905
        ],
    }[kind]


# name -> (dataset, options of the configuration)
SFT_CASES = {
    "text": ("text", {}),
    "text_cut": ("text", {"max_length": 6}),
    "text_keep_end": ("text", {"max_length": 6, "truncation_mode": "keep_end"}),
    "accumulation": ("text", {"gradient_accumulation_steps": 3}),
    "completion": ("prompt_completion", {}),
    "prompt_and_completion": ("prompt_completion", {"completion_only_loss": False}),
    "messages": ("messages", {}),
    "assistant": ("messages", {"assistant_only_loss": True}),
    "chat_completion": ("chat_completion", {}),
    "packed": ("text", {"packing": True, "max_length": 16}),
    "packed_split": ("text", {"packing": True, "max_length": 8, "packing_strategy": "bfd_split"}),
    "packed_stream": ("text", {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}),
    "packed_completion": ("prompt_completion", {"packing": True, "max_length": 32}),
    "checkpointing_off": ("text", {"gradient_checkpointing": False}),
}
REWARD_CASES = {
    "pairs": ("pairs", {}),
    "cut": ("pairs", {"max_length": 10}),
    "prompted": ("prompted_pairs", {}),
    "margin": ("margin_pairs", {}),
    "centred": ("pairs", {"center_rewards_coefficient": 0.05}),
    "chat": ("chat_pairs", {"gradient_accumulation_steps": 2}),
}


def train(library: str, kind: str, case: str, **overrides) -> list[dict]:
    """The log of one run: 4 optimizer steps, evaluated after each second one."""
    from datasets import Dataset

    module = importlib.import_module(library)
    name, options = (SFT_CASES if kind == "SFT" else REWARD_CASES)[case]
    data = rows(name)
    with tempfile.TemporaryDirectory() as folder:
        common = dict(output_dir=folder, report_to="none", use_cpu=True, bf16=False, save_strategy="no", seed=3)
        common |= dict(max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2, disable_tqdm=True)
        common |= dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-2)
        trainer = getattr(module, f"{kind}Trainer")(
            model=make_model("causal" if kind == "SFT" else "reward"),
            args=getattr(module, f"{kind}Config")(**(common | options | overrides)),
            train_dataset=Dataset.from_list(data[:16]),
            eval_dataset=Dataset.from_list(data[16:]),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    timings = ("runtime", "per_second", "flos")
    return [{k: v for k, v in line.items() if not k.endswith(timings)} for line in trainer.state.log_history]


def main(path: str, library: str = "trl") -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions[library] = importlib.import_module(library).__version__
    runs = {f"SFT/{case}": train(library, "SFT", case) for case in SFT_CASES}
    runs |= {f"Reward/{case}": train(library, "Reward", case) for case in REWARD_CASES}
    with open(path, "w") as file:
        json.dump({"versions": versions, "runs": runs}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
