"""What a model's passes hold, found by running the model itself on tensors without storage (torch's FakeTensorMode).

No formula per architecture: transformers' own code runs, every tensor that it makes is counted while it lives, and
attention keeps what a flash kernel keeps (q, k, v, its output and log-sums). Nothing is computed, and where all layers are
alike two shallow models tell what a layer adds, so that 70 B parameters take seconds and no memory. Suffixes: N packed tokens, R response tokens of them, D hidden.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastppo.planner.live import Cached, Live

ATTENTION = "fastppo_plan"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NORMS_AND_BIASES = 1  # dimensions of parameters that no matrix product reads


class CannotPlan(ValueError):
    """The model's passes cannot be counted; the message says why."""


class Parameters(NamedTuple):
    """Numbers of parameters. matrices: what products read beside the head; head: of the output embedding;
    layer: of the largest decoder layer; outside: of everything that is in none."""

    all: int
    matrices: int
    head: int
    layer: int
    outside: int
    trained: int
    bytes: int  # of all
    trained_bytes: int


class Bytes(NamedTuple):
    """Bytes as a function of packed tokens: lines (per token, constant), of which the highest holds."""

    lines: tuple[tuple[float, float], ...]

    def __call__(self, tokens: int) -> float:
        return max(slope * tokens + constant for slope, constant in self.lines)


class Passes(NamedTuple):
    """kept: what forward leaves for backward; backward: the most during backward, with what is kept, without the
    parameters' gradients; scoring, rollout: the most of a pass without gradient, as each casts."""

    rollout: Bytes
    kept: Bytes
    backward: Bytes
    scoring: Bytes


class Run(NamedTuple):
    """Passes' numbers of one packed pass."""

    rollout: float
    kept: float
    backward: float
    scoring: float

    def at_depth(self, layers: int, deeper: "Run") -> "Run":
        """Of a model of more layers, from two of SHALLOW's. What backward adds is the deeper one's: where a few layers are
        deep enough that the most is held when it begins, it is the same with every further layer."""
        rollout, kept, _, scoring = (_at(layers, SHALLOW, pair) for pair in zip(self, deeper, strict=True))
        return Run(rollout, kept, kept + deeper.backward - deeper.kept, scoring)


class Measured(NamedTuple):
    """runs: for each of SAMPLES' pairs of sizes.   kv_bytes: of a token's keys and values."""

    runs: list[list[Run]]
    kv_bytes: float

    def at_depth(self, layers: int, deeper: "Measured") -> "Measured":
        both = zip(self.runs, deeper.runs, strict=True)
        runs = [[x.at_depth(layers, y) for x, y in zip(*pairs, strict=True)] for pairs in both]
        return Measured(runs, _at(layers, SHALLOW, (self.kv_bytes, deeper.kv_bytes)))

    def lines(self) -> Passes:
        def through(name: str) -> Bytes:
            pairs = zip(SAMPLES, self.runs, strict=True)
            return Bytes(tuple(_line(tokens, [getattr(run, name) for run in runs]) for tokens, runs in pairs))

        return Passes(*map(through, Passes._fields))


class Counted(NamedTuple):
    """A model as the planner needs it."""

    parameters: Parameters
    passes: Passes
    kv_bytes: int  # of one token, all layers
    layers: int
    hidden: int
    vocabulary: int
    intermediate: int


@dataclass(frozen=True)
class Setting:
    """How the passes run. weights: dtype of the parameters; autocast: bfloat16 beside float32 weights."""

    weights: torch.dtype = torch.float32
    autocast: bool = False
    lora_rank: int | None = None
    lora_targets: Any = None
    gradient_checkpointing: bool = False
    late: bool = False  # the late trainer rolls out under autocast and runs GELU in one kernel

    @contextlib.contextmanager
    def casting(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext():
            yield


# packed tokens of the runs that give a line each: where weights' own gradients are the most, and where tokens are
SAMPLES = ((256, 512), (16384, 32768))
# layers of the models that are run; 1 would hide what lies beside a layer's own in a layer's
SHALLOW = (2, 4)


_COUNTED: dict[tuple[str, Setting], Counted] = {}


def count(config, setting: Setting) -> Counted:
    """What `_count` finds, found once for each configuration and setting."""
    key = (config.to_json_string(), setting)
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, setting)
    return _COUNTED[key]


def _count(config, setting: Setting) -> Counted:
    """Run the model of `config` (a transformers configuration of a causal language model) under `setting`.

    Raises CannotPlan where it has no attention that packs, or looks at its tensors' values (experts).
    """
    from fastppo import attention

    if any(getattr(config.get_text_config(), name, None) for name in EXPERTS):
        raise CannotPlan("a mixture of experts sends tokens by their values, which fastppo plan does not have")
    model, text = _make(config, setting), config.get_text_config()
    if why := attention.unsupported(model):
        raise CannotPlan(f"{why}: its sequences are padded, which fastppo plan does not count")
    layers = text.num_hidden_layers
    if layers > max(SHALLOW) and _layers_are_alike(model, layers):
        few, more = (_passes(_make(_with_layers(config, depth), setting), setting) for depth in SHALLOW)
        found = few.at_depth(layers, more)
    else:
        found = _passes(model, setting)
    return Counted(
        _parameters(model),
        found.lines(),
        int(found.kv_bytes),
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    )


def _make(config, setting: Setting):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=setting.weights)
        if setting.lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=setting.lora_rank, task_type="CAUSAL_LM", target_modules=setting.lora_targets)
            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        model.eval()
        if setting.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    return model


def _layers_are_alike(model, layers: int) -> bool:
    sizes = _layer_sizes(model)
    return len(sizes) == layers and len(set(sizes)) == 1


def _layer_sizes(model) -> list[int]:
    """Numbers of parameters of the decoder layers."""
    from fastppo.attention import unwrap

    inner = unwrap(model)
    kinds = set(getattr(inner, "_no_split_modules", None) or ())
    return [sum(p.numel() for p in m.parameters()) for m in inner.modules() if type(m).__name__ in kinds]


def _with_layers(config, layers: int):
    """`config` for so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _passes(model, setting: Setting) -> Measured:
    """Run it at each of SAMPLES' sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface

    from fastppo import attention

    cached = Cached()
    AttentionInterface.register(ATTENTION, cached.attend)
    attention.unwrap(model).set_attn_implementation(ATTENTION)
    with FakeTensorMode():
        _give_devices(model)
        try:
            runs = [[_run(model, setting, tokens) for tokens in pair] for pair in SAMPLES]
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise CannotPlan(f"{type(model).__name__} could not be run without values: {error}") from error
    return Measured(runs, cached.bytes_per_token)


def _give_devices(model) -> None:
    """Tensors on "cpu" without storage for those on "meta", for which autocast does nothing; what is tied stays tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is None:
                    continue
                if id(x) not in made:
                    new = torch.empty(x.shape, dtype=x.dtype)
                    is_parameter = isinstance(x, torch.nn.Parameter)
                    made[id(x)] = torch.nn.Parameter(new, x.requires_grad) if is_parameter else new
                held[name] = made[id(x)]


def _parameters(model) -> Parameters:
    from fastppo.attention import unwrap

    inner = unwrap(model)
    named = list(model.parameters())
    head = inner.get_output_embeddings().weight
    apart = {id(head), id(inner.get_input_embeddings().weight)}
    layers = _layer_sizes(model)
    trained = [p for p in named if p.requires_grad]
    everything = sum(p.numel() for p in named)
    return Parameters(
        all=everything,
        matrices=sum(p.numel() for p in named if p.dim() > NORMS_AND_BIASES and id(p) not in apart),
        head=head.numel(),
        layer=max(layers, default=everything),
        outside=everything - sum(layers),
        trained=sum(p.numel() for p in trained),
        bytes=sum(p.nbytes for p in named),
        trained_bytes=sum(p.nbytes for p in trained),
    )


def _run(model, setting: Setting, tokens: int) -> Run:
    from fastppo.activations import fused_gelu
    from fastppo.models.head import backbone

    ids, places = torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, tokens, dtype=torch.int64)
    for parameter in model.parameters():
        # there already, so that only what a layer's backward holds on top is counted
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    def live() -> Live:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return Live([*model.parameters(), *model.buffers(), *grads])

    def forward():
        return backbone(model)(input_ids=ids, position_ids=places, use_cache=False)[0]

    with fused_gelu(model) if setting.late else contextlib.nullcontext():
        with setting.casting() if setting.late else contextlib.nullcontext(), torch.no_grad(), live() as rollout:
            forward()  # the first: what attention sees here is what pages hold
        with setting.casting(), torch.no_grad(), live() as scoring:
            forward()
        with live() as training:
            with setting.casting():
                hidden = forward()
            kept = training.now
            hidden.backward(torch.empty_like(hidden))
    return Run(rollout.most, kept, training.most, scoring.most)


def _line(at: tuple[int, int], values: Sequence[float]) -> tuple[float, float]:
    """(slope, value at 0) of the line through two points."""
    slope = (values[1] - values[0]) / (at[1] - at[0])
    return slope, values[0] - slope * at[0]


def _at(place: int, places: tuple[int, int], values: Sequence[float]) -> float:
    """What lies at `place` on the line through the values at two places."""
    slope, constant = _line(places, values)
    return slope * place + constant
