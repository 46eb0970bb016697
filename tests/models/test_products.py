"""The choice of the kernel that multiplies float32 matrices: exact, kept, and gone when the work is done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_edit.models import LanguageModel, ModelAdapter, products
from lit_edit.models.products import (
    KernelMeasurement,
    bfloat16_pays,
    choose_kernel,
    fastest_accurate,
    kept_measurement,
    measure_kernels,
    use_kernel,
)
from lit_edit.testing import tiny_model


@pytest.fixture
def measured() -> dict[str, KernelMeasurement]:
    return {
        "torch": KernelMeasurement(2e11, 2.5e-7),
        "onednn": KernelMeasurement(4e11, 4e-7),
        "bfloat16": KernelMeasurement(8e11, 2e-3),
    }


def test_what_is_measured_is_plausible() -> None:
    found = measure_kernels(tokens=96, d_in=64, d_out=48, tries=2)
    assert set(found) == {"torch", "onednn", "bfloat16"}
    assert all(value.rate > 1e6 for value in found.values())
    assert found["torch"].error < 1e-6
    assert 1e-4 < found["bfloat16"].error < 1e-1  # a measurement that cannot tell rounding would let it pass


@pytest.mark.parametrize(
    ("rate", "error", "chosen"),
    [(4e11, 4e-7, "onednn"), (4e11, 2e-3, "torch"), (2.1e11, 3e-7, "torch"), (1e11, 2e-7, "torch")],
)
def test_a_kernel_must_be_exact_and_clearly_faster(
    measured: dict[str, KernelMeasurement], rate: float, error: float, chosen: str
) -> None:
    measured["onednn"] = KernelMeasurement(rate, error)
    assert fastest_accurate(measured) == chosen


@pytest.mark.parametrize("kernel", ["torch", "onednn"])
def test_both_kernels_are_float32_here_and_leave_no_trace(kernel: products.Kernel) -> None:
    left, right = (torch.randn(n, 96, generator=torch.Generator().manual_seed(n)) for n in (200, 130))
    with use_kernel(kernel):
        product = torch.nn.functional.linear(left, right)
    exact = left.double() @ right.double().T
    if kernel == "torch" or measure_kernels(tries=1)["onednn"].error < 1e-6:
        assert (product.double() - exact).norm() / exact.norm() < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), use_kernel(kernel):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_choice_of_the_user_is_left_alone() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with use_kernel("onednn"):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_choice_by_backend_is_left_alone() -> None:
    # In a process of its own: PyTorch does not take such a choice back completely.
    code = (
        "import torch; torch.backends.mkldnn.matmul.fp32_precision = 'tf32'\n"
        "from lit_edit.models.products import use_kernel\n"
        "with use_kernel('onednn'): assert torch.backends.mkldnn.matmul.fp32_precision == 'tf32'\n"
        "assert torch.backends.mkldnn.matmul.fp32_precision == 'tf32'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_measurement_is_kept_for_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, KernelMeasurement]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(products, "measure_kernels", lambda: calls.append(1) or measured)
    file = tmp_path / "deep" / "products.json"
    kept_measurement.cache_clear()
    assert kept_measurement(2, file) == measured
    kept_measurement.cache_clear()
    assert kept_measurement(2, file) == measured
    assert len(calls) == 1
    assert kept_measurement(3, file) == measured  # other threads, another machine
    assert len(calls) == 2
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("damage", ["", "[]", "null", "{", '{"x": 1}', "\x00"])
def test_a_damaged_file_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, KernelMeasurement], damage: str
) -> None:
    monkeypatch.setattr(products, "measure_kernels", lambda: measured)
    file = tmp_path / "products.json"
    file.write_text(damage)
    kept_measurement.cache_clear()
    assert kept_measurement(2, file) == measured
    assert json.loads(file.read_text())


def test_a_folder_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, KernelMeasurement]
) -> None:
    monkeypatch.setattr(products, "measure_kernels", lambda: measured)
    (tmp_path / "file").write_text("not a folder")
    kept_measurement.cache_clear()
    assert kept_measurement(2, tmp_path / "file" / "products.json") == measured


def test_the_choice_reads_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {name: KernelMeasurement(1e11, 1e-7) for name in ("torch", "onednn", "bfloat16")}
    monkeypatch.setattr(products, "measure_kernels", lambda: slow)
    assert choose_kernel(2) == "torch"
    assert not bfloat16_pays(2)
    fast = slow | {"bfloat16": KernelMeasurement(2e11, 1e-3)}
    monkeypatch.setattr(products, "measure_kernels", lambda: fast)
    assert bfloat16_pays(5)


def test_only_float32_models_on_a_cpu_have_a_choice() -> None:
    for dtype, inside in ((torch.float32, "medium"), (torch.float64, "highest"), (torch.bfloat16, "highest")):
        adapter = ModelAdapter(tiny_model(dtype=dtype), products="onednn")
        with adapter.fast_products():
            assert torch.get_float32_matmul_precision() == inside


def test_the_setting_reaches_the_stream(own_cache: Path) -> None:
    from lit_edit import EditStream

    model = LanguageModel.of(tiny_model(), None)  # type: ignore[arg-type]
    stream = EditStream(model)
    stream.configure_model()
    assert stream.adapter.products == "auto"


def test_a_rounded_view_leaves_the_model_and_the_layers_below_alone() -> None:
    adapter = ModelAdapter(tiny_model())
    view = adapter.rounded(torch.bfloat16, 2)
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones_like(ids)
    below = adapter.read_keys(ids, mask, [1])[1]
    torch.testing.assert_close(view.read_keys(ids, mask, [1])[1], below, rtol=0, atol=0)
    assert {p.dtype for p in adapter.model.parameters()} == {torch.float32}
    own = adapter.logits(adapter.last_hidden(ids, mask))
    with view.fast_products():
        rounded = view.logits(view.last_hidden(ids, mask))
    error = float((rounded - own).norm() / own.norm())
    assert 1e-5 < error < 0.05
    assert rounded.dtype == torch.float32
