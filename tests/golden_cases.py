"""PPO steps that run the same under TRL 0.11.4 and fastppo: tests/golden/ppo.json holds what TRL's numbers were.

Record (an environment with trl==0.11.4):   python tests/golden_cases.py tests/golden/ppo.json
"""

import json
import math
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import CAUSAL, SEQ2SEQ, fill

BASE = {"seed": 1, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3}
WORDS = 96
# name -> model, padding side, adapter, response masks, steps, PPOConfig, and patches that mend TRL for the record
CASES = {
    "plain": {"model": "llama", "steps": 3},
    "gpt2": {"model": "gpt2"},
    "qwen2_left": {"model": "qwen2", "side": "left"},
    "abs": {"config": {"kl_penalty": "abs"}},
    "mse": {"config": {"kl_penalty": "mse"}},
    "full": {"config": {"kl_penalty": "full"}},
    "full_left_masks": {"side": "left", "masks": True, "config": {"kl_penalty": "full"}},
    "masks_with_holes": {"masks": True, "steps": 3},
    "masks_left": {"masks": True, "side": "left"},
    "masks_whiten_left": {"masks": True, "side": "left", "config": {"whiten_rewards": True}, "mend": "whiten_rewards"},
    "whiten_left": {"side": "left", "config": {"whiten_rewards": True}},
    "early_stopping": {"steps": 1, "config": {"early_stopping": True, "target_kl": 0.01, "ppo_epochs": 4}},
    "early_stopping_unmet": {"config": {"early_stopping": True, "target_kl": 5.0}},
    "ratio_threshold": {"config": {"ratio_threshold": 1.0, "ppo_epochs": 3}},
    "ratio_threshold_accumulation": {
        "config": {"ratio_threshold": 1.0, "mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 3}
    },
    "score_clip": {"config": {"score_clip": 0.5}},
    "accumulation": {"config": {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 3}},
    "accumulation_all": {"config": {"mini_batch_size": 1, "gradient_accumulation_steps": 4}},
    "accumulation_masks": {"masks": True, "config": {"mini_batch_size": 1, "gradient_accumulation_steps": 4}},
    "one_minibatch": {"config": {"mini_batch_size": 4, "ppo_epochs": 4}},
    "adaptive_kl": {"steps": 4, "config": {"target": 0.1, "horizon": 20, "init_kl_coef": 0.3}},
    "fixed_kl": {"steps": 3, "config": {"adap_kl_ctrl": False, "init_kl_coef": 0.7}},
    "gamma_lam": {"config": {"gamma": 0.9, "lam": 0.5}},
    "tight_clips": {"config": {"cliprange": 0.02, "cliprange_value": 0.02, "vf_coef": 1.0, "ppo_epochs": 4}},
    "one_sequence": {"config": {"batch_size": 1, "mini_batch_size": 1}},
    "lora": {"lora": True, "steps": 3},
    "lora_full": {"lora": True, "config": {"kl_penalty": "full"}},
    "t5": {"model": "t5", "steps": 3},
    "t5_full": {"model": "t5", "config": {"kl_penalty": "full"}},
    "bart": {"model": "bart", "steps": 3},
    "scheduler": {"steps": 3, "scheduler": True},
    "sgd": {"sgd": True, "steps": 3},
    # TRL differs from us here; beside its own numbers, "mended" holds those with the defect taken out
    "max_grad_norm": {"sgd": True, "config": {"max_grad_norm": 0.05}},
    "max_grad_norm_mended": {"sgd": True, "config": {"max_grad_norm": 0.05}, "mend": "model_params"},
    "whiten": {"config": {"whiten_rewards": True}},
    "whiten_mended": {"config": {"whiten_rewards": True}, "mend": "whiten_rewards"},
    "masks_whiten": {"masks": True, "config": {"whiten_rewards": True}},
    "masks_whiten_mended": {"masks": True, "config": {"whiten_rewards": True}, "mend": "whiten_rewards"},
    "gpt2_left": {"model": "gpt2", "side": "left"},
    "gpt2_left_mended": {"model": "gpt2", "side": "left", "mend": "position_ids"},
}


def tokenizer(side: str):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w3", "padding_side": side}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")), **special)


def language_model(name: str):
    import transformers

    kind, sizes = CAUSAL.get(name) or SEQ2SEQ[name]
    off = {key: 0.0 for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate", "attention_dropout")}
    config = getattr(transformers, kind)(**sizes | {k: v for k, v in off.items() if k not in sizes})
    auto = transformers.AutoModelForSeq2SeqLM if name in SEQ2SEQ else transformers.AutoModelForCausalLM
    return fill(auto.from_config(config))


def value_model(lib, case: dict, perturb: bool):
    name = case.get("model", "llama")
    wrapper = lib.AutoModelForSeq2SeqLMWithValueHead if name in SEQ2SEQ else lib.AutoModelForCausalLMWithValueHead
    options = {}
    if case.get("lora"):
        from peft import LoraConfig

        targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
        options["peft_config"] = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            target_modules=targets,
            fan_in_fan_out=name == "gpt2",
            task_type="CAUSAL_LM",
        )
    model = wrapper.from_pretrained(language_model(name), summary_dropout_prob=0.0, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            rng = torch.Generator().manual_seed(zlib.crc32(key.encode()) + 1)
            noise = torch.randn(parameter.shape, generator=rng)
            if key.startswith("v_head") or "lora_" in key:
                parameter.copy_(0.1 * noise)
            elif perturb and not case.get("lora"):
                parameter.add_(0.02 * noise)
    return model


def batches(case: dict, count: int):
    """(queries, responses, scores, masks) per step, the same everywhere."""
    rng = np.random.RandomState(7)
    size, seq2seq = case.get("config", {}).get("batch_size", BASE["batch_size"]), case.get("model") in SEQ2SEQ
    for _ in range(count):
        draw = lambda low, high: torch.tensor(rng.randint(3, WORDS, rng.randint(low, high)))  # noqa: E731
        queries, responses = [draw(2, 7) for _ in range(size)], [draw(3, 10) for _ in range(size)]
        if seq2seq:
            responses = [torch.cat([torch.tensor([0]), r]) for r in responses]
        scores = [torch.tensor(float(np.float32(rng.randn()))) for _ in range(size)]
        masks = [torch.tensor(rng.randint(0, 2, len(r))) for r in responses]
        for mask in masks:
            mask[rng.randint(len(mask))] = 1
        yield queries, responses, scores, masks if case.get("masks") else None


SAMPLE = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0, "max_new_tokens": 8}


def batch(case: dict | None = None):
    """The first step's (queries, responses, scores, masks)."""
    return next(batches(case or {}, 1))


def weights(made) -> list[torch.Tensor]:
    return [p.detach().clone() for p in made.model.parameters()]


def changed(before: list[torch.Tensor], made) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))


def counting_tokens(case: dict) -> list[np.ndarray]:
    """bool [B, T] per step: True at the columns whose next token is a response token that counts."""
    found = []
    for queries, responses, _, masks in batches(case, case.get("steps", 2)):
        seq2seq = case.get("model") in SEQ2SEQ
        lengths = [len(r) if seq2seq else len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
        width = max(lengths) - 1
        mask = np.zeros((len(queries), width), dtype=bool)
        for row, length in enumerate(lengths):
            left = width + 1 - length if case.get("side") == "left" else 0
            count = len(responses[row]) - 2 * seq2seq
            counts = masks[row].numpy().astype(bool) if masks else True
            mask[row, left + length - 1 - count : left + length - 1] = counts
        found.append(mask)
    return found


def compared(case: dict, step: int, name: str, values) -> np.ndarray:
    """The numbers of one statistic that mean something: per-token arrays where a response token counts."""
    values, mask_BT = np.array(values, dtype=float), counting_tokens(case)[step]
    if name in ("objective/logprobs", "objective/ref_logprobs"):
        return values[mask_BT]
    if name in ("ppo/policy/ratio", "ppo/policy/advantages"):
        shuffle = np.random.RandomState(3)
        epochs = case.get("config", {}).get("ppo_epochs", BASE["ppo_epochs"])
        orders = [shuffle.permutation(len(mask_BT)) for _ in range((step + 1) * epochs)][step * epochs :]
        rows = np.concatenate(orders)[: values.size // mask_BT.shape[1]]
        return values.reshape(len(rows), -1)[mask_BT[rows]]
    return values


def trainer(lib, case: dict, **extra):
    config = lib.PPOConfig(**BASE | case.get("config", {}) | extra)
    model = value_model(lib, case, perturb=True)
    reference = None if case.get("lora") else value_model(lib, case, perturb=False)
    optimizer = scheduler = None
    if case.get("sgd"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if case.get("scheduler"):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lib.PPOTrainer(
            config, model, reference, tokenizer(case.get("side", "right")), optimizer=optimizer, lr_scheduler=scheduler
        )


def run(lib, case: dict, **extra) -> list[dict]:
    """Statistics and parameters after each step."""
    made = trainer(lib, case, **extra)
    if lib.__name__ == "trl":
        mend(made, case.get("mend"))
    shuffle = np.random.RandomState(3)
    real, np.random.permutation = np.random.permutation, lambda n: shuffle.permutation(n)
    steps = []
    try:
        for batch in batches(case, case.get("steps", 2)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stats = made.step(*batch)
            steps.append({"stats": plain(stats), "parameters": parameters(made), "kl_coef": made.kl_ctl.value})
    finally:
        np.random.permutation = real
    return steps


def mend(made, what: str | None) -> None:
    """Take a defect out of TRL's trainer."""
    if what == "model_params":
        made.model_params = [p for p in made.model.parameters() if p.requires_grad]
    if what == "whiten_rewards":
        from trl.core import masked_whiten

        made.config.whiten_rewards, compute = False, made.compute_advantages

        def whiten_then_compute(values, rewards, mask):
            return compute(values, masked_whiten(rewards * mask, mask, shift_mean=False) * mask, mask)

        made.compute_advantages = whiten_then_compute
    if what == "position_ids":
        for model in (made.model, made.ref_model):
            forward = model.forward

            def positioned(*args, _forward=forward, **kwargs):
                kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                return _forward(*args, **kwargs)

            model.forward = positioned


def plain(stats: dict) -> dict:
    skip = ("time/", "fastppo/")
    values = {k: np.asarray(v).astype(float).tolist() for k, v in stats.items() if not k.startswith(skip)}
    return {k: rounded(v) for k, v in values.items()}


def rounded(x):
    if isinstance(x, list):
        return [rounded(y) for y in x]
    return float(f"{x:.7g}") if math.isfinite(x) else None


def parameters(made) -> dict:
    """Norm and first two numbers of each trained parameter."""
    named = made.accelerator.unwrap_model(made.model).named_parameters()
    kept = {k: p.detach().double() for k, p in named if p.requires_grad}
    return {k: rounded([float(p.norm()), *p.flatten()[:2].tolist()]) for k, p in kept.items()}


if __name__ == "__main__":
    import trl

    torch.set_num_threads(1)
    record = {"trl": trl.__version__, "torch": torch.__version__, "cases": {}}
    for name, case in CASES.items():
        record["cases"][name] = run(trl, case)
        print(name, record["cases"][name][-1]["stats"]["ppo/loss/total"])
    Path(sys.argv[1]).write_text(json.dumps(record, separators=(",", ":")))
