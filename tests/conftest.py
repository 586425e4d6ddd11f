"""Kernel tests take `device` and `backend`; a back end that cannot run here is skipped, and says why.

Triton's interpreter needs TRITON_INTERPRET=1 before Python starts, so test_triton_interpreter.py runs the same files
again in a process of their own.
"""

import os

import pytest
import torch

from fastppo.kernels._backend import BACKENDS, missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    """`pytest -m gpu`: everything that runs on the GPU where there is one, which is what takes `device`."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "device" in getattr(item, "fixturenames", ()) and params.get("backend") != "cpu":
            item.add_marker("gpu")


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    op = request.module.__name__.removeprefix("test_")
    table = getattr(__import__(f"fastppo.kernels.{op}", fromlist=["BACKEND_TABLE"]), "BACKEND_TABLE", None)
    if table is not None and request.param not in table:
        pytest.skip(f"{op} has no {request.param} back end")
    if why := missing(request.param, device):
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.fixture(scope="session")
def shared():
    """The folder of recorded inputs beside the checkout, where there is one."""
    from pathlib import Path

    folder = Path(__file__).parent.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return folder


def pytest_report_header():
    able = {name: missing(name, torch.device(DEVICE)) or "ok" for name in BACKENDS}
    mode = " (Triton interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"fastppo back ends on {DEVICE}{mode}: " + "; ".join(f"{name}: {why}" for name, why in able.items())
