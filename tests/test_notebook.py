"""examples/quickstart.ipynb: its cells run in order, and what is stored beside them is what they print."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run_in_order(cells, capsys):
    """Like a notebook's kernel, with fewer steps."""
    import matplotlib.pyplot
    import torch

    matplotlib.pyplot.switch_backend("agg")
    threads, names = torch.get_num_threads(), {}
    try:
        for cell in cells:
            code = "".join(cell["source"]).replace(
                "LM_STEPS, PPO_STEPS, SEED = 200, 25, 0", "LM_STEPS, PPO_STEPS, SEED = 12, 2, 0"
            )
            exec(compile(code, NOTEBOOK.name, "exec"), names)
    finally:
        torch.set_num_threads(threads)
        matplotlib.pyplot.close("all")
    assert names["PPO_STEPS"] == 2 == len(names["history"]) and len(names["losses"]) == 12
    assert len(names["after"]) == len(names["held_out"]) == 16
    assert capsys.readouterr().out.endswith("True\n")


def test_stored_outputs_are_small_and_show_a_run_that_learnt(cells):
    assert NOTEBOOK.stat().st_size < 200_000
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    text = "".join("".join(output.get("text", "")) for output in outputs)
    rewards = [float(line.split("reward ")[1].split(",")[0]) for line in text.splitlines() if line.startswith("step ")]
    assert rewards[-1] > rewards[0] + 1, "the stored run shows PPO at work"
    assert all("execution_count" in cell for cell in cells)
