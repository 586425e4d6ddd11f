"""`fastppo info`: every op and back end is told about, with a reason where it does not run."""

import json

import torch

from fastppo.cli import main
from fastppo.cli.info import gather, rooms
from fastppo.kernels._backend import BACKENDS, missing


def test_json_has_versions_and_every_back_end_of_every_op(capsys):
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["fastppo"]
    assert set(told["kernels"]) == set(rooms()) and rooms()
    device = torch.device(told["device"])
    for op, backends in told["kernels"].items():
        assert list(backends) == list(BACKENDS)
        assert backends["reference"] is None, op
        for name, reason in backends.items():
            assert reason in ("not written", missing(name, device)), (op, name)
    assert told["attention"]["sdpa"] is None
    assert told["cpu"]["threads"] == torch.get_num_threads()
    assert told["extension"]["loaded"] and told["extension"]["built_with_cuda"] in (True, False)


def test_the_page_says_why(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    told = gather()
    reasons = {
        r for b in [*told["kernels"].values(), told["attention"]] for r in b.values() if r not in (None, "not written")
    }
    for reason in reasons:
        assert reason in text
    assert "packed attention" in text and "built_with_cuda" in text


def test_a_missing_extension_is_told_with_what_to_do(monkeypatch, capsys):
    from fastppo.kernels import _backend

    why = "the extension fastppo._C was not built (run 'pip install .')"
    monkeypatch.setattr(_backend, "extension", lambda: why)
    assert main(["info"]) == 0
    assert why in capsys.readouterr().out
    assert gather()["kernels"][rooms()[0]]["cpu"] in (why, "not written")


def test_a_forced_back_end_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("FASTPPO_BACKEND", "reference")
    assert main(["info"]) == 0
    assert "FASTPPO_BACKEND=reference is set" in capsys.readouterr().out
