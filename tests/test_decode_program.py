"""The traced forward pass against the model's own, and the packed products against torch's."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, tiny
from test_generation_greedy import greedy_by_transformers, make_prompts

from fastppo.attention.layout import Packed
from fastppo.attention.paged import PagedPrefill
from fastppo.generation import Generator, fast_path
from fastppo.generation.decode_program import DecodeProgram
from fastppo.generation.model_runner import ModelRunner
from fastppo.generation.probe import probe
from fastppo.generation.row_program import UNARY, Untraceable
from fastppo.generation.trace import trace
from fastppo.kernels._backend import extension, missing

pytestmark = pytest.mark.skipif(missing("cpu", torch.device("cpu")) is not None, reason="the extension is not built")
TRACED = [name for name in ARCHITECTURES if name not in ("mixtral", "qwen2_moe")]


@pytest.mark.parametrize("half", [False, True])
# least; nothing divides; one strip of 16 rows, panels in pairs and alone; blocks of rows and of k
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 70, 19), (100, 300, 16), (96, 290, 300)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_packed_linear(shape, half, transposed, amx):
    if amx and not extension().amx_works():
        pytest.skip("this processor has no AMX tiles")
    N, K, M = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(K, N, generator=generator).T if transposed else torch.randn(N, K, generator=generator)
    x, bias = torch.randn(M, K, generator=generator), torch.randn(N, generator=generator)
    packed = torch.empty(extension().packed_size(N, K), dtype=torch.bfloat16 if half else torch.float32)
    strides = weight.stride()
    extension().pack_linear(weight.data_ptr(), False, *strides, N, K, packed.data_ptr(), half)
    out = torch.empty(M, N)

    def run(x, out):
        address = packed.data_ptr(), half, bias.data_ptr(), N, K, x.data_ptr(), out.data_ptr(), len(x), amx
        extension().packed_linear(*address)
        return out

    run(x, out)
    truth = x.double() @ weight.double().T + bias.double()
    plain = torch.nn.functional.linear(x, weight, bias)
    if half:
        plain = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()
    error, allowed = (out - truth).abs().max(), 2 * (plain - truth).abs().max() + 1e-5
    assert error <= allowed, f"{error} > {allowed}"
    for some in (slice(0, 1), slice(M // 2, M)):  # a row does not depend on the others, in any bit
        rows = x[some].contiguous()
        assert torch.equal(run(rows, torch.empty(len(rows), N)), out[some])


@pytest.mark.parametrize("name", TRACED)
def test_architectures_are_traced(name):
    program = trace(tiny(name))
    assert 0 < program.split < len(program.ops) <= 100


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_prompts_go_past_the_last_attention_only_where_a_token_is_wanted(name):
    model = tiny(name)
    runner = ModelRunner(model, None, probe(model), 2, 16)
    program = DecodeProgram(trace(model), runner.cache, torch.float32)
    tokens_N, lengths = torch.arange(3, 14), [4, 7]
    positions_N = torch.cat([torch.arange(n) for n in lengths])
    packed = Packed(torch.tensor([0, 4, 11], dtype=torch.int32), 7, lengths)
    slots_N = torch.cat([positions_N[:4], 16 + positions_N[4:]])
    tables_BM, lens_B = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    layout = PagedPrefill(runner.cache, packed, slots_N, tables_BM, lens_B, False)
    whole = program.forward(tokens_N, positions_N, layout, None)
    for keep in (torch.tensor([3, 10]), torch.tensor([10]), torch.tensor([], dtype=torch.int64)):
        for some, all_rows in zip(program.forward(tokens_N, positions_N, layout, keep), whole, strict=True):
            assert torch.equal(some, all_rows[keep])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_what_is_not_traced_says_why(name):
    with pytest.raises(Untraceable, match="it uses"):
        trace(tiny(name))


def test_forward_hooks_keep_the_model_on_its_own_code():
    model = tiny("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(Untraceable, match="forward hooks"):
        trace(model)


@pytest.fixture
def checks(monkeypatch):
    """The checks of programs so far: one entry each."""
    made, check = [], fast_path._error
    monkeypatch.setattr(fast_path, "_error", lambda *args: made.append(1) or check(*args))
    return made


def _scale_attention(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 5.0  # a number that the trace has burnt in


def _replace_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


def _replace_module(model):
    norm = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        norm.weight.neg_()
    model.model.norm = norm


def _replace_parameter(model):
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())


def _move_storage(model):
    model.lm_head.weight.data = -model.lm_head.weight.data


CHANGES = (_scale_attention, _replace_forward, _replace_module, _replace_parameter, _move_storage)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_model_is_checked_again(change, checks):
    model, prompts = tiny("llama"), make_prompts()
    generator, options = Generator(model), dict(max_new_tokens=6, do_sample=False, eos_token_id=None)

    def roll_out():
        responses = [x.tolist() for x in generator.generate(prompts, **options).responses]
        assert responses == greedy_by_transformers(model, prompts, 6)
        return responses

    before = roll_out()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # as an optimizer step does: other numbers in the same places
    stepped = roll_out()
    assert len(checks) == 1 and stepped != before
    change(model)
    assert roll_out() != stepped and len(checks) > 1


def test_hooks_dtype_and_time_call_for_a_check(checks):
    model, prompt = tiny("llama"), [torch.tensor([5, 6, 7])]
    generator = Generator(model)

    def roll_out():
        generator.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
        return len(checks)

    assert [roll_out() for _ in range(fast_path.CHECK_EVERY + 1)] == [1] * fast_path.CHECK_EVERY + [2]
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert roll_out() == 2 and seen  # the hook ran: through the model itself
    hook.remove()
    assert roll_out() == 2
    model.bfloat16()
    assert roll_out() > 2


def test_adapters_switched_off_have_their_own_check(checks):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    prompts, options = make_prompts(), dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    generator = Generator(model)
    on = [generator.generate(prompts, **options).tokens_BT for _ in range(2)]
    with model.disable_adapter():
        off = [generator.generate(prompts, **options).tokens_BT for _ in range(2)]
        assert [x.tolist() for x in off[0]] == greedy_by_transformers(model.get_base_model(), prompts, 6)
    assert len(checks) == 2 and torch.equal(*on) and torch.equal(*off) and not torch.equal(on[0], off[0])


def test_bf16_decode_weights_stay_close():
    model, prompts = tiny("llama", scale=0.5), [torch.tensor([5, 6, 7]), torch.tensor([9])]
    options = dict(max_new_tokens=8, do_sample=True, top_k=0, seed=0, eos_token_id=None)
    rollout = Generator(model, decode_weights=torch.bfloat16).generate(prompts, **options)
    for i, response in enumerate(rollout.responses):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompts[i], response])[None]).logits[0, len(prompts[i]) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        assert (rollout.logprobs_BT[i] - wanted).abs().max() < 0.15
    with pytest.raises(ValueError, match="decode_weights"):
        Generator(model, decode_weights=torch.float16)


@pytest.mark.parametrize(("weights", "programs"), [(torch.bfloat16, 1), (None, 0)])
def test_autocast_decodes_on_a_program_of_its_own_type(weights, programs, monkeypatch):
    model, made = tiny("llama", scale=0.5), []
    real = fast_path.DecodeProgram
    monkeypatch.setattr(fast_path, "DecodeProgram", lambda *args: made.append(args) or real(*args))
    with torch.autocast("cpu", torch.bfloat16):
        rollout = Generator(model, decode_weights=weights).generate([torch.tensor([5, 6, 7])], max_new_tokens=4)
    assert len(made) == programs and rollout.mask_BT.sum() > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_packing_keeps_nan_and_rounds_to_nearest_even(transposed):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    weight[3, 7], weight[39, 49] = float("nan"), 1 + 2**-8  # halfway between two bf16 numbers
    laid_out = weight.T.contiguous().T if transposed else weight
    packed = torch.empty(extension().packed_size(40, 50), dtype=torch.bfloat16)
    extension().pack_linear(laid_out.data_ptr(), False, *laid_out.stride(), 40, 50, packed.data_ptr(), True)
    found = (
        packed.view(2, 32, 32, 2).permute(0, 2, 1, 3).reshape(64, 64)
    )  # [panel][pair of k][column][2] -> [column][k]
    wanted = torch.zeros(64, 64, dtype=torch.bfloat16)
    wanted[:40, :50] = weight.bfloat16()
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_bf16_decode_weights_keep_pages_in_bf16(monkeypatch):
    made, real = [], fast_path.DecodeProgram
    monkeypatch.setattr(fast_path, "DecodeProgram", lambda *args: made.append(args[1]) or real(*args))
    model = tiny("llama", scale=0.5)
    for weights, pages in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        Generator(model, decode_weights=weights).generate([torch.tensor([5, 6, 7])], max_new_tokens=4)
        assert {x.dtype for pair in made[-1].layers.values() for x in pair} == {pages}


def test_written_out_activations_become_one_operation():
    for name, kind, mode in (("gpt2", "unary", UNARY.index("gelu_tanh")), ("llama", "rms_norm", 0)):
        model = tiny(name)
        found = [op for op in trace(model).ops if (op.kind, op.mode) == (kind, mode)]
        assert len(found) >= model.config.num_hidden_layers, f"{name}: {found}"
        assert not [op for op in trace(model).ops if (op.kind, op.mode) == ("unary", UNARY.index("tanh"))]
