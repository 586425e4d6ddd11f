"""fastppo/generation/cuda_graphs.py on a CPU: a fake graph replays the Python function that a CUDA graph would have recorded.

Not run here: a real capture, the streams it waits on, and what it refuses (operations that wait for the host)."""

from types import SimpleNamespace

import pytest
import torch
from architectures import tiny
from host_waits import NoWaits

from fastppo.generation import cuda_graphs
from fastppo.generation.cuda_graphs import POLL, STEPS, DecodeGraphs, Step, bucket
from fastppo.kernels.sampling import SamplingOptions

CPU, V, D, BLOCK = torch.device("cpu"), 11, 3, 4
GREEDY = SamplingOptions(temperature=0)


class FakeGraph:
    def __init__(self, run, pool):
        self._run, self.replays = run, 0

    def replay(self):
        self.replays += 1
        self._run()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", FakeGraph)


class Counter:
    """A model whose next token is (token + position) % V; remembers the layouts that it saw."""

    def __init__(self):
        self.layouts = []

    def __call__(self, tokens_B, positions_B, layout):
        self.layouts.append((layout.slots_N.clone(), layout.context_lens_B.clone()))
        logits_BV = torch.nn.functional.one_hot((tokens_B + positions_B) % V, V).float()
        return logits_BV, positions_B[:, None].expand(-1, D).float()


def next_tokens(token: int, position: int, count: int, eos=()) -> list[int]:
    made = []
    for i in range(count):
        token = (token + position + i) % V
        made.append(token)
        if token in eos:
            break
    return made


def state(rows: list[tuple[int, int]], M: int = 3) -> SimpleNamespace:
    """rows: (last token, its position); sequence b has pages b * M, b * M + 1, ..."""
    tokens_B, positions_B = (torch.tensor(x) for x in zip(*rows, strict=True))
    tables_BM = torch.arange(len(rows) * M, dtype=torch.int32).view(len(rows), M)
    return SimpleNamespace(
        tokens_B=tokens_B, positions_B=positions_B, seeds_B=torch.zeros_like(tokens_B), block_tables_BM=tables_BM
    )


def graphs(forward, eos=(), enabled=True) -> DecodeGraphs:
    made = DecodeGraphs(CPU, enabled)
    made.begin(Step(forward, None, GREEDY, torch.tensor(eos, dtype=torch.int64), BLOCK, (D, torch.float32)), ())
    return made


def decode(made, rows, left, steps, *, stop_at_end=False, keep_hidden=False):
    drawn = made.decode(state(rows), left, steps, GREEDY, (), stop_at_end=stop_at_end, keep_hidden=keep_hidden)
    return drawn, [drawn.tokens_SB[:n, b].tolist() for b, n in enumerate(drawn.counts_B.tolist())]


@pytest.mark.parametrize(("count", "want"), [(1, 1), (2, 2), (3, 4), (32, 32), (33, 64), (256, 256), (257, 320)])
def test_buckets(count, want):
    assert bucket(count) == want


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("stop_at_end", [True, False])
def test_steps_are_those_of_a_plain_loop(fake, enabled, stop_at_end):
    """Three sequences in a bucket of four: one ends by eos, one by its length, one goes on."""
    rows, left, eos = [(1, 2), (5, 0), (3, 7)], [9, 2, 9], (6,)
    want = [next_tokens(*row, min(8, n), eos) for row, n in zip(rows, left, strict=True)]
    assert [len(x) for x in want] == [2, 2, 8]
    made = graphs(Counter(), eos, enabled)
    for _ in range(3):  # eager, captured, replayed
        _, tokens = decode(made, rows, left, 8, stop_at_end=stop_at_end)
        assert tokens == want
        _, tokens = decode(made, rows, [16, 16, 16], 16, stop_at_end=stop_at_end)
        assert len(tokens[2]) == (2 * POLL if stop_at_end else 16), (
            "one has ended: the others stop soon after, if asked"
        )
    assert made.captures == (1 if enabled else 0)


def test_rows_that_ended_or_pad_touch_no_page(fake):
    model = Counter()
    decode(graphs(model), [(1, 2), (5, 0), (3, 7)], [4, 1, 4], 4)
    slots, lens = (torch.stack(x) for x in zip(*model.layouts, strict=True))
    assert slots[:, 0].tolist() == [2, 3, 4, 5], "block 0, then block 1, of sequence 0"
    assert slots[:, 1].tolist() == [12, -1, -1, -1] and lens[:, 1].tolist() == [1, 0, 0, 0]
    assert slots[:, 2].tolist() == [31, 32, 33, 34] and lens[:, 2].tolist() == [8, 9, 10, 11]
    assert (slots[:, 3] == -1).all() and (lens[:, 3] == 0).all()


def test_numbers_and_hidden_states_of_each_step(fake):
    drawn, _ = decode(graphs(Counter()), [(1, 2), (5, 6)], [3, 3], 3, keep_hidden=True)
    assert drawn.hidden_SBD[:3, :, 0].tolist() == [[2, 6], [3, 7], [4, 8]]
    want = torch.nn.functional.one_hot(torch.tensor(0), V).float().log_softmax(0)[0]
    torch.testing.assert_close(drawn.numbers_3SB[1, :3], want.expand(3, 2))
    assert (drawn.numbers_3SB[0, :3] == 0).all(), "greedy: probability 1 under the distribution sampled from"


def test_a_graph_per_bucket_and_width(fake):
    made = graphs(Counter())
    for rows in ([(1, 0)] * 3, [(1, 0)] * 4, [(1, 0)] * 5):
        for _ in range(2):
            decode(made, rows, [5] * len(rows), 2)
    assert made.captures == 2, "three and four sequences share a bucket"


def test_what_moves_invalidates(fake):
    made, step = graphs(Counter()), None
    step = made.step
    for print_, captures in (((), 1), ((), 1), (("moved",), 2)):
        made.begin(step, print_)
        for _ in range(2):
            decode(made, [(1, 0)], [5], 2)
        assert made.captures == captures


def test_the_fingerprint_sees_storage_not_values():
    model, step = torch.nn.Linear(2, 2), graphs(None).step
    cache = SimpleNamespace(layers={0: (torch.zeros(2), torch.zeros(2))})
    before = cuda_graphs.fingerprint(model, cache, step)
    with torch.no_grad():
        model.weight.add_(1)
    assert cuda_graphs.fingerprint(model, cache, step) == before
    changed = step._replace(options=SamplingOptions(top_k=5))
    assert cuda_graphs.fingerprint(model, cache, changed) != before
    cache.layers[0] = (torch.zeros(2), cache.layers[0][1])
    after = cuda_graphs.fingerprint(model, cache, step)
    model.weight = torch.nn.Parameter(model.weight.detach().clone())
    assert before != after != cuda_graphs.fingerprint(model, cache, step)


def test_a_failed_capture_goes_on_eagerly_and_says_so_once(monkeypatch, caplog):
    def refuse(run, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    made = graphs(Counter())
    for _ in range(4):
        _, tokens = decode(made, [(1, 2)], [9], 5)
        assert tokens == [next_tokens(1, 2, 5)]
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.getMessage() and made.captures == 0


def test_a_capture_error_that_is_a_bug_is_raised(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", lambda run, pool: {}["no such"])
    made = graphs(Counter())
    decode(made, [(1, 2)], [9], 5)
    with pytest.raises(KeyError):
        decode(made, [(1, 2)], [9], 5)


def test_a_capture_reads_weights_and_not_autocasts_copies_of_them():
    """Under an autocast that is open around several steps, a copy cast before must not be what a graph reads."""
    layer, x = torch.nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with torch.no_grad():
            layer.weight.zero_()
        assert torch.equal(layer(x), before), "autocast's copy is stale"
        with cuda_graphs.no_autocast_cache():
            assert not layer(x).any() and not torch.is_autocast_cache_enabled()
        assert torch.is_autocast_cache_enabled() and not layer(x).any()


def test_stops_early_once_all_have_ended(fake):
    model = Counter()
    decode(graphs(model), [(1, 2), (4, 0)], [2, 1], STEPS)
    assert len(model.layouts) == 2, "the host knows how many tokens there can be"
    model, eos = Counter(), next_tokens(1, 2, 2)[1:]
    decode(graphs(model, eos), [(1, 2)], [STEPS], STEPS)
    assert len(model.layouts) == 2 * POLL, "counted after POLL steps, read POLL later"


def test_a_row_that_cannot_be_sampled_shows(fake):
    def broken(tokens_B, positions_B, layout):
        logits_BV = torch.zeros(len(tokens_B), V)
        logits_BV[1] = torch.nan
        return logits_BV, None

    drawn, _ = decode(graphs(broken), [(1, 0), (1, 0)], [4, 4], 4)
    assert drawn.tokens_SB[0, 1] < 0 and drawn.counts_B.tolist() == [1, 1], "it ends every row: the rollout raises"


def test_a_step_does_not_wait(fake):
    """The sampler's own launches are held to that by test_host_waits.py."""
    made = graphs(lambda *_: (torch.zeros(4, V), torch.zeros(4, D)), (6,))
    x = cuda_graphs.Static.empty(4, 4, (D, torch.float32), CPU)
    x.load(state([(1, 2), (5, 0)]), [3, 3])
    drawn = cuda_graphs.sampling(torch.zeros(4, V), x.seeds_B, x.positions_B, GREEDY)
    with pytest.MonkeyPatch.context() as patch, NoWaits():
        patch.setattr(cuda_graphs, "sampling", lambda *_, check: drawn)
        made.step.run(x)


# -- in a Generator ----------------------------------------------------------------------------------------------------


def generator(model, graphs: bool, **options):
    """Without the traced program, so that decoding takes the GPU's way; graphs False: one step at a time."""
    from fastppo.generation import Generator

    made = Generator(model, **options)
    made.graphs = DecodeGraphs(CPU) if graphs else None
    return made


@pytest.fixture
def no_program(monkeypatch):
    monkeypatch.setattr("fastppo.generation.generator.program_for", lambda *_: None)


ARGUMENTS = [
    dict(do_sample=False),
    dict(do_sample=True, top_k=20, top_p=0.9, temperature=0.8),
    dict(do_sample=True, repetition_penalty=1.3),  # needs the history: not in a graph
]


@pytest.mark.parametrize(("name", "arguments"), [*(("qwen3", x) for x in ARGUMENTS), ("gpt2", ARGUMENTS[1])])
def test_rollouts_are_those_of_single_steps(fake, no_program, name, arguments):
    """Ragged lengths, an end-of-sequence token, more prompts than run at once, and pages that run out."""
    model = tiny(name)
    torch.manual_seed(0)
    prompts = [torch.randint(3, 90, (n,)) for n in (3, 9, 17, 4, 6)]
    options = dict(max_new_tokens=[30, 3, 25, 30, 18], eos_token_id=7, pad_token_id=0, seed=3, **arguments)
    sizes = dict(block_size=4, max_num_seqs=4, num_blocks=30)
    plain = generator(model, False, **sizes).generate(prompts, **options)
    ours = generator(model, True, **sizes)
    for _ in range(2):  # the second time with the graphs of the first, where the pages lie where they lay
        made = ours.generate(prompts, **options)
        assert torch.equal(made.tokens_BT, plain.tokens_BT) and made.finish_reasons == plain.finish_reasons
        torch.testing.assert_close(made.logprobs_BT, plain.logprobs_BT)
    assert bool(ours.graphs._buckets) == ("repetition_penalty" not in arguments)
    assert ours.graphs.step is None, "the pages are let go"


def test_values_and_new_weights(fake, no_program):
    """An optimizer step in place is seen by the next rollout; values come along."""
    from fastppo import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny("qwen3"))
    prompts, options = (
        [torch.tensor([5, 6, 7])] * 2,
        dict(max_new_tokens=20, do_sample=True, top_k=0, seed=1, pad_token_id=0),
    )
    ours = generator(model, True)
    for _ in range(2):
        plain = generator(model, False).generate(prompts, **options)
        made = ours.generate(prompts, **options)
        assert torch.equal(made.tokens_BT, plain.tokens_BT)
        torch.testing.assert_close(made.values_BT, plain.values_BT)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    assert plain.values_BT is not None and plain.values_BT.abs().sum() > 0 and ours.graphs.captures > 0
