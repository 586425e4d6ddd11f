"""What a model's passes hold, found by running the model itself on tensors without storage (torch's FakeTensorMode).

No formula per architecture: transformers' own code runs, every tensor that it makes is counted while it lives, and
attention keeps what a flash kernel keeps (q, k, v, its output and log-sums). Nothing is computed, so that 70 B parameters
take seconds and no memory. Suffixes: N packed tokens, R response tokens of them, D hidden.
"""

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATTENTION = "fastppo_plan"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NORMS_AND_BIASES = 1  # dimensions of parameters that no matrix product reads


class CannotPlan(ValueError):
    """The model's passes cannot be counted; the message says why."""


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there were. apart: tensors that are not counted."""

    def __init__(self, apart: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._apart = {id(storage): storage for storage in (x.untyped_storage() for x in apart)}
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages or key in self._apart:
            return

        def gone(_):
            self.now -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_1HND, k_1KND, v_1KND):
        out = q_1HND.new_empty(1, q_1HND.shape[2], q_1HND.shape[1], v_1KND.shape[3])
        ctx.save_for_backward(q_1HND, k_1KND, v_1KND, out, q_1HND.new_empty(q_1HND.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@dataclass
class _Cached:
    """Bytes that a token's keys and values take, as the attention function sees them."""

    bytes_per_token: int = 0
    seen: set[int] = field(default_factory=set)

    def attend(self, module, q, k, v, attention_mask=None, **_) -> tuple[torch.Tensor, None]:
        if id(module) not in self.seen:
            self.seen.add(id(module))
            self.bytes_per_token += 2 * k.shape[1] * k.shape[3] * k.dtype.itemsize
        return _Attention.apply(q, k, v), None


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
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface

    from fastppo import attention

    if any(getattr(config.get_text_config(), name, None) for name in EXPERTS):
        raise CannotPlan("a mixture of experts sends tokens by their values, which fastppo plan does not have")
    cached = _Cached()
    AttentionInterface.register(ATTENTION, cached.attend)
    model = _make(config, setting)
    if why := attention.unsupported(model):
        raise CannotPlan(f"{why}: its sequences are padded, which fastppo plan does not count")
    attention.unwrap(model).set_attn_implementation(ATTENTION)
    with FakeTensorMode():
        _give_devices(model)
        parameters = _parameters(model)
        try:
            runs = [[_run(model, setting, tokens) for tokens in pair] for pair in SAMPLES]
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise CannotPlan(f"{type(model).__name__} could not be run without values: {error}") from error
    lines = [
        Bytes(tuple(_line(pair, [run[i] for run in two]) for pair, two in zip(SAMPLES, runs, strict=True)))
        for i in range(4)
    ]
    text = config.get_text_config()
    return Counted(
        parameters,
        Passes(*lines),
        cached.bytes_per_token,
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
    kinds = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [sum(p.numel() for p in m.parameters()) for m in inner.modules() if type(m).__name__ in kinds]
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


def _run(model, setting: Setting, tokens: int) -> tuple[int, int, int, int]:
    """Passes' numbers, for one packed pass."""
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
    return rollout.most, kept, training.most, scoring.most


def _line(tokens: tuple[int, int], values: list[int]) -> tuple[float, float]:
    slope = (values[1] - values[0]) / (tokens[1] - tokens[0])
    return slope, values[0] - slope * tokens[0]
