"""`fastppo plan`: memory per process, the largest micro-batch and tokens/s of a run, before a device is rented."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastppo.cli.errors import UserError, nearest
from fastppo.cli.options import parse

GIB = 2**30
_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
_QWEN2 = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
# name -> (transformers' model type, what its published configuration says)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "qwen2.5-0.5b": ("qwen2", _QWEN2 | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}),
    "qwen2.5-1.5b": ("qwen2", _QWEN2 | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960}),
    "qwen2.5-7b": ("qwen2", {"num_key_value_heads": 4, "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "intermediate_size": 18944, "tie_word_embeddings": False}),
    "llama-1b": ("llama", _LLAMA | {"head_dim": 64, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192, "tie_word_embeddings": True}),
    "llama-3b": ("llama", _LLAMA | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192, "tie_word_embeddings": True}),
    "llama-8b": ("llama", _LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336, "tie_word_embeddings": False}),
    "llama-70b": ("llama", _LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672, "tie_word_embeddings": False}),
}  # fmt: skip


@dataclass(frozen=True)
class PlanOptions:
    """Memory per process, the largest micro-batch that fits, and tokens/s from measured rates. Nothing is loaded or run."""

    model: str = "llama-8b"
    """A folder with config.json, the file itself, OWNER/NAME on the hub, or a preset (gpt2, gpt2-xl, qwen2.5-0.5b, -1.5b, -7b, llama-1b, -3b, -8b, -70b)."""

    gpus: int = 1
    """Processes, one per device."""

    gpu_memory: float = 80.0
    """GiB of one device; of one process's share of the machine with --device cpu."""

    headroom: float = 0.1
    """Share of it that is left free: CUDA's context, NCCL, what the allocator loses. An assumption, not a measurement."""

    strategy: Literal["ddp", "fsdp", "both"] = "both"
    """How accelerate spreads the model; fsdp is FSDP2."""

    trainer: Literal["classic", "late"] = "classic"
    """fastppo.PPOTrainer or fastppo.experimental.ppo.PPOTrainer."""

    device: Literal["cuda", "cpu"] = "cuda"
    """What it will run on."""

    precision: Literal["fp32", "bf16", "bf16-weights"] = "bf16"
    """bf16: mixed precision over float32 weights; bf16-weights: the model was loaded with dtype=bfloat16."""

    lora_rank: int | None = None
    """Adapters of this rank; the reference is then the model without them."""

    value_model: bool = False
    """Late trainer: a value model of its own, as large as the policy, in place of a value head."""

    gradient_checkpointing: bool = False
    """Activations are computed again in the backward pass."""

    batch_size: int = 64
    """Sequences of one process per step."""

    mini_batch_size: int = 16
    """Sequences of one process per optimizer step."""

    ppo_epochs: int = 4
    """Passes over a batch."""

    prompt_tokens: int = 256
    """Tokens of a prompt."""

    response_tokens: int = 256
    """Tokens of a response."""

    tokens_per_micro_batch: int | None = None
    """max_tokens_per_micro_batch; None: the largest that fits."""

    other_gb: float = 0.0
    """GiB of whatever else is on the device: a reward model, say."""

    matmul_tflops: float | None = None
    """Measured rate of the device's matrix products in --precision, for tokens/s."""

    bandwidth_gbs: float | None = None
    """Measured rate at which the device reads its memory, GB/s."""

    rates: Path | None = None
    """Rows of bench/ (a CSV file or a folder of them) to read both rates from, with --device-name."""

    device_name: str | None = None
    """Part of the device's name in those rows."""

    mfu: float = 1.0
    """Share of --matmul-tflops that training reaches, as a run's fastppo/optimise_mfu tells; 1: tokens/s are an upper bound."""

    json: bool = False
    """Print JSON."""


def configuration(name: str):
    """The transformers configuration of a preset, a folder, a config.json or a hub name. Raises UserError."""
    from transformers import AutoConfig

    if name in PRESETS:
        kind, values = PRESETS[name]
        return AutoConfig.for_model(kind, **values)
    path = Path(name)
    if not path.exists() and "/" not in name:
        raise UserError(f"--model {name!r} is no folder or file here, and no preset.{nearest(name, PRESETS)}")
    try:
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = "holds no configuration that transformers knows" if path.exists() else "could not be fetched from the hub"
        raise UserError(f"--model {name!r} {why}: {error}") from error


def check(options: PlanOptions) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            least = 0 if field.name in ("headroom", "other_gb") else 1 if isinstance(value, int) else 1e-9
            if not value >= least:
                raise UserError(f"--{field.name.replace('_', '-')} must be at least {least:g}; got {value}")
    if options.batch_size % options.mini_batch_size:
        raise UserError(
            f"--batch-size must be a multiple of --mini-batch-size; got {options.batch_size} and {options.mini_batch_size}"
        )
    if options.headroom >= 1 or options.mfu > 1:
        raise UserError("--headroom must be below 1 and --mfu at most 1")
    if options.value_model and options.trainer == "classic":
        raise UserError("--value-model belongs to --trainer late; the classic trainer has a value head")
    if (options.rates is None) != (options.device_name is None):
        raise UserError("--rates and --device-name go together")


def job_of(options: PlanOptions, strategy: str):
    from fastppo.planner import Job

    return Job(
        configuration(options.model),
        trainer=options.trainer,
        strategy=strategy,
        processes=options.gpus,
        device=options.device,
        precision=options.precision,
        lora_rank=options.lora_rank,
        sequences=options.batch_size,
        mini_batch=options.mini_batch_size,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
        value_model=options.value_model,
        epochs=options.ppo_epochs,
        other_bytes=int(options.other_gb * GIB),
    )


def rates_of(options: PlanOptions):
    """Rates with their source, or why there are none, in words."""
    from fastppo.planner import NoRates, Rates, read_rates

    if options.matmul_tflops and options.bandwidth_gbs:
        return Rates(options.matmul_tflops, options.bandwidth_gbs, "as given: --matmul-tflops and --bandwidth-gbs")
    if options.rates is not None:
        try:
            return read_rates(
                options.rates, options.device_name, "float32" if options.precision == "fp32" else "bfloat16"
            )
        except (NoRates, OSError, ValueError) as error:
            raise UserError(f"--rates: {error}") from error
    ours = "" if options.device == "cpu" else ". fastppo ships none of a GPU: bench/gpu_suite.sh measures them on yours"
    return f"no measured rates were given (--matmul-tflops with --bandwidth-gbs, or --rates with --device-name){ours}"


def plan_one(options: PlanOptions, strategy: str, rates) -> dict[str, Any]:
    from fastppo.planner import CannotPlan, Planner, seconds, tokens_per_second

    job, memory = job_of(options, strategy), options.gpu_memory * GIB
    try:
        planner = Planner(job, int(memory))
    except CannotPlan as error:
        raise UserError(f"--model {options.model!r}: {error}") from error
    largest = planner.largest(int(memory * (1 - options.headroom)))
    shown = planner.plan(options.tokens_per_micro_batch) if options.tokens_per_micro_batch else largest
    plan = shown or planner.plan(job.length)  # nothing fits: what one sequence at a time would take
    told = {
        "strategy": strategy,
        "parameters": planner.counted.parameters.all,
        "always": plan.always,
        "stages": plan.stages,
        "totals": plan.totals,
        "peak": plan.peak,
        "fits": plan.peak <= memory * (1 - options.headroom),
        "tokens_per_micro_batch": plan.micro_tokens,
        "largest_micro_batch_tokens": largest.micro_tokens if largest else 0,
        "tokens_per_second": None,
        "rates": rates if isinstance(rates, str) else rates._asdict(),
    }
    if not isinstance(rates, str):
        spent = seconds(job, planner.counted, rates, options.mfu)
        told |= {"seconds": spent._asdict(), "tokens_per_second": tokens_per_second(job, spent)}
    return told


def render(plans: list[dict[str, Any]], options: PlanOptions, console) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("GiB per process")
    for plan in plans:
        table.add_column({"ddp": "DDP", "fsdp": "FSDP2"}[plan["strategy"]], justify="right")

    def row(title: str, values: list[int | None], style: str | None = None) -> None:
        table.add_row(title, *("" if x is None else f"{x / GIB:.2f}" for x in values), style=style)

    def rows(parts: list[dict[str, int]], indent: str) -> None:
        for name in dict.fromkeys(name for part in parts for name in part):
            row(f"{indent}{name}", [part.get(name) for part in parts])

    rows([plan["always"] for plan in plans], "")
    for stage in ("rollout", "scoring", "training"):
        row(f"while {stage}", [plan["totals"][stage] for plan in plans], "bold")
        rows([plan["stages"][stage] for plan in plans], "  ")
    row("peak", [plan["peak"] for plan in plans], "bold")
    length = options.prompt_tokens + options.response_tokens
    console.print(
        f"{options.model}: {plans[0]['parameters'] / 1e9:.3g} B parameters, {options.gpus} x {options.gpu_memory:g} GiB, {options.precision}"
    )
    console.print(table)
    for plan in plans:
        name, largest = plan["strategy"], plan["largest_micro_batch_tokens"]
        if largest:
            whole = " (a whole mini-batch)" if largest == options.mini_batch_size * length else ""
            console.print(
                f"{name}: the largest micro-batch that fits is {largest:,} tokens, {largest // length} sequences{whole}"
            )
        else:
            console.print(f"{name}: does not fit, not even one sequence at a time; the table shows that")
        if not plan["fits"] and largest:
            console.print(f"{name}: --tokens-per-micro-batch {plan['tokens_per_micro_batch']:,} does not fit")
        speed = plan["tokens_per_second"]
        if speed is not None and plan["fits"] and largest:
            bound = "at most " if options.mfu == 1 else ""
            console.print(
                f"{name}: {bound}{speed:,.0f} response tokens/s on all devices, communication and the reward left out"
            )
    source = plans[0]["rates"]
    console.print(
        f"tokens/s: {source}"
        if isinstance(source, str)
        else f"rates: {source['matmul_tflops']:g} TFLOP/s, {source['bandwidth_gbs']:g} GB/s ({source['source']})",
        soft_wrap=True,
    )


def run(argv: Sequence[str]) -> int:
    options = parse(PlanOptions, argv, "fastppo plan", __doc__)
    check(options)
    rates = rates_of(options)
    strategies = ("ddp", "fsdp") if options.strategy == "both" else (options.strategy,)
    plans = [plan_one(options, strategy, rates) for strategy in strategies]
    if options.json:
        print(json.dumps(plans, indent=1))
    else:
        from rich.console import Console

        render(plans, options, Console(highlight=False))
    return 0 if any(plan["fits"] for plan in plans) else 1
