"""A rollout's peak memory on a CPU: packed weights once, the KV pages asked for, one micro-batch of prompt tokens, little else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny

from fastppo.generation import Generator, fast_path
from fastppo.kernels import _recycle
from fastppo.kernels._backend import missing

ROOT = Path(__file__).parent.parent
SLACK_MIB = 24  # the allocator's own, Python's lists, the record of what was sampled
MEASURE = """
import json
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from fastppo.attention.paged import KVCache
from fastppo.generation import Generator, fast_path
from fastppo.kernels import _recycle

def model(width, layers):
    sizes = dict(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=8000)
    return AutoModelForCausalLM.from_config(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

options = dict(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, seed=0)
prompts = [torch.randint(3, 8000, (64,), generator=torch.Generator().manual_seed(i)) for i in range(24)]
Generator(model(64, 1)).generate(prompts[:1], max_new_tokens=3, **options)  # what is imported and made on first use
policy, tokens = model(512, 4), 256
generator = Generator(policy, max_num_batched_tokens=tokens, num_blocks=100)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again here
before = memory("VmRSS")
generator.generate(prompts, max_new_tokens=32, **options)
growth = memory("VmHWM") - before
(program,) = fast_path._TRACES[policy].values()
packed = _recycle._kept[_recycle.WEIGHTS_OR_GRADIENTS].nbytes * 4 // 5  # the rest is never written
pages = generator.block_manager.num_blocks * KVCache.block_bytes(generator._layers, generator.block_size)
# a row of every buffer, and its widest one once more in three bf16 parts
batch = tokens * (4 * (sum(program.sizes) - program.sizes[program.logits]) + 6 * max(op.i[1] for op in program.ops if op.kind == "linear"))
weights = sum(x.numel() * x.element_size() for x in policy.parameters())
print(json.dumps(dict(growth=growth, packed=packed, pages=pages, batch=batch, weights=weights)))
"""


@pytest.mark.skipif(missing("cpu", torch.device("cpu")) is not None, reason="the extension is not built")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory")
def test_peak_memory_is_pages_packed_weights_and_one_micro_batch():
    command = [sys.executable, "-c", MEASURE]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {name: x / 2**20 for name, x in json.loads(run.stdout.splitlines()[-1]).items()}
    stated = found["packed"] + found["pages"] + found["batch"]
    assert found["packed"] <= 1.02 * found["weights"], found  # one copy, K and N padded to 32
    assert found["pages"] == 100 * 16 * 2 * 4 * 4 * 512 / 2**20, found  # pages, tokens, k and v, layers, bytes, width
    assert 0.9 * (found["packed"] + found["pages"]) <= found["growth"] <= stated + SLACK_MIB, found


@pytest.mark.skipif(missing("cpu", torch.device("cpu")) is not None, reason="the extension is not built")
def test_a_rollouts_memory_serves_the_next_one_and_nothing_of_it_is_read(monkeypatch):
    monkeypatch.setattr(_recycle, "WORTH_IT", 1)  # so few pages are fresh memory each time otherwise
    model, slots = tiny("llama"), (_recycle.WEIGHTS_OR_GRADIENTS, _recycle.PAGES_OR_ACTIVATIONS)
    generator, options = Generator(model), dict(max_new_tokens=24, do_sample=True, top_k=0, seed=3, eos_token_id=None)
    prompts = [torch.tensor([5, 6, 7]), torch.arange(1, 20)]
    first = generator.generate(prompts, **options)
    (program,) = fast_path._TRACES[model].values()
    workspace = program.workspace
    for name in slots:
        _recycle._kept[name].view("float32").fill(float("nan"))
    addresses = [
        _recycle._kept[name].ctypes.data for name in slots
    ]  # a name for an array would hold it back from the next rollout
    again = generator.generate(prompts, **options)
    assert torch.equal(again.tokens_BT, first.tokens_BT) and torch.equal(again.logprobs_BT, first.logprobs_BT)
    assert [_recycle._kept[name].ctypes.data for name in slots] == addresses and program.workspace is workspace
    fast_path.give_back(model)
    assert not set(slots) & set(_recycle._kept) and program.workspace is None
    assert torch.equal(generator.generate(prompts, **options).tokens_BT, first.tokens_BT)
