"""``plan``: memory and time of a ``fit``, before anything is loaded."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.console.terminal import write_json
from lit_edit.console.words import check_names, expand_arguments, with_config
from lit_edit.errors import ArgumentError, UserError
from lit_edit.files.paths import expand
from lit_edit.files.paths import write_json as write_json_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_edit.data.datamodule import EditDataModule
    from lit_edit.editors.closed_form.engine import ClosedFormEditor
    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.planning.case import Case
    from lit_edit.planning.estimate import Speed
    from lit_edit.stream.edit_stream import EditStream

log = logging.getLogger(__name__)

ON_SCREEN = "-"
ASSUMED_BANDWIDTH = 2000e9  # bytes per second, where a rate is given and this is not

DESCRIPTION = """\
Say what lit-edit fit would need: memory on each device, time per edit, time for the key statistics. Takes the
configs and settings of fit (--config quickstart --data.limit 100 --model.language_model.name ...) and loads no
weights: a model needs its config.json only, and well-known ones not even that.
"""
EPILOG = """\
examples:
  lit-edit plan --config quickstart
  lit-edit plan --config quickstart --config model/llama3_8b --devices 2 --tflops 400 --device-memory 80GB
"""


def run_plan(args: list[str]) -> None:
    """Print the plan of a ``fit`` with the same arguments."""
    options, rest = _parser().parse_known_args(args)
    check_names("fit", rest)
    expand_arguments(with_config(rest))  # before anything heavy is imported

    from lit_edit.console.fit_parser import FitParser
    from lit_edit.console.messages import quieten
    from lit_edit.editors.closed_form.engine import ClosedFormEditor
    from lit_edit.planning.estimate import make_plan
    from lit_edit.planning.report import show_plan

    quieten()
    parser = FitParser()
    parser.parse(with_config(rest))
    made = parser.make(bare=True)  # no Trainer: the devices may be those of another machine
    editor = made.model.editor
    if not isinstance(editor, ClosedFormEditor):
        raise ArgumentError(
            f"lit-edit plan knows the closed-form editors (D4S, MEMIT), got model.editor={type(editor).__name__}: "
            "measure this one on a few edits"
        )
    case = _make_case(options, made.model, made.data, parser.config["fit"].trainer, editor)
    plan = make_plan(case.sizes, editor, case.setup, case.workload, case.speed)
    found = {**case.as_dict(), **plan.as_dict()}
    if options.json == ON_SCREEN:
        write_json(found)
        return
    if options.json is not None:
        write_json_file(Path(options.json), found)
    show_plan(case, plan, options.device_memory)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("plan", DESCRIPTION, settings=True, epilog=EPILOG)
    parser.usage = "%(prog)s [--config CONFIG ...] [options] [any setting of fit]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--devices", type=positive, help="devices of each node; by default trainer.devices")
    add("--nodes", type=positive, help="nodes; by default trainer.num_nodes")
    add(
        "--strategy",
        choices=("auto", "ddp", "fsdp2"),
        default="auto",
        help="ddp: every device holds the model; fsdp2: they share its layers; by default trainer.strategy",
    )
    add(
        "--accelerator",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="by default trainer.accelerator; where that is auto, gpu if --tflops is given, else what is here",
    )
    add("--tflops", type=_positive_number, help="rate of a device in TFLOP/s; by default measured here, in a second")
    add("--utilisation", type=_share, default=0.55, help="share of that rate that is reached (default: %(default)s)")
    add("--bandwidth", type=_positive_number, help="of a device's memory, in GB/s (default: 2000 with --tflops)")
    add("--link", type=_positive_number, default=100.0, help="between devices, in GB/s (default: %(default)s)")
    add("--device-memory", type=read_size, metavar="SIZE", help="of a device, say 80GB: does it fit, and if not, why")
    add("--model-config", metavar="FILE", help="a config.json, or a folder or hub id that has one, for the model's")
    text = "one JSON object instead of tables; with a name, it is written to that file beside them"
    add("--json", nargs="?", const=ON_SCREEN, metavar="FILE", help=text)
    return parser


def _positive_number(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return float(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return float(text)


def read_size(text: str) -> float:
    """Read an amount of memory, in bytes.

    Example:
        >>> read_size("80GB"), read_size("1.5 GiB"), read_size("24")
        (80000000000.0, 1610612736.0, 24000000000.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be an amount of memory like 80GB or 24GiB, got {text!r}")
    power = "KMGT".index((found[2] or "G").upper()) + 1
    return float(found[1]) * (1024.0 if found[3] else 1000.0) ** power


# ---- what fit would do --------------------------------------------------------------------------------------------


def _make_case(
    options: argparse.Namespace,
    stream: EditStream,
    data: EditDataModule,
    trainer: Any,
    editor: ClosedFormEditor,
) -> Case:
    """Put together what options and settings say."""
    import torch

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.models.known import find_architecture, make_meta_model
    from lit_edit.models.products import bfloat16_pays
    from lit_edit.planning.case import Case
    from lit_edit.planning.estimate import Setup
    from lit_edit.planning.sizes import ModelSizes
    from lit_edit.planning.workload import Workload

    language_model = stream.language_model
    config = find_architecture(language_model, options.model_config)
    model = make_meta_model(config, language_model.trust_remote_code)
    adapter = ModelAdapter(model, language_model.arch, products=language_model.products)
    sizes = ModelSizes.of(adapter, editor)
    gpu = _on_gpu(options, str(trainer.accelerator))
    dtype = _dtype(language_model.dtype, str(trainer.precision), model)
    speed = _speed(options, adapter, dtype, gpu)
    devices = _devices(options, trainer)
    precision = editor.target.precision
    fastest = precision == "fastest" and (gpu or bfloat16_pays(torch.get_num_threads()))
    window = data.target_window if editor.on_original else data.batch_size
    requests = _requests(data)
    setup = Setup(
        dtype=dtype,
        devices=devices,
        strategy=_strategy(options.strategy, trainer, devices),
        gpu=gpu,
        window=window if requests is None else min(window, len(requests)),
        batch=data.batch_size,
        edits=data.limit if requests is None else len(requests),
        statistics=stream.statistics.tokens,
        storage=editor.storage,
        rounded=dtype.itemsize > 2 and (precision == "bfloat16" or fastest),
    )
    contexts = _contexts(editor)
    tokenizer = _tokenizer(language_model, options.model_config) if requests else None
    workload = (
        Workload.typical(contexts, editor.target)
        if tokenizer is None or not requests
        else Workload.of(tokenizer, requests[: setup.window], contexts, editor.target)
    )
    return Case(options.model_config or language_model.name, editor, sizes, setup, workload, speed)


def _on_gpu(options: argparse.Namespace, accelerator: str) -> bool:
    import torch

    wanted = options.accelerator if options.accelerator != "auto" else accelerator
    if wanted != "auto":
        return wanted not in ("cpu",)
    return options.tflops is not None or torch.accelerator.is_available()


def _dtype(setting: str, precision: str, model: PreTrainedModel) -> torch.dtype:
    """Return the type that weights have in a run."""
    import torch

    found = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision)
    if found is not None:
        return found
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    stored = getattr(model.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _devices(options: argparse.Namespace, trainer: Any) -> int:
    """Return the number of devices over all nodes."""
    import torch

    devices = options.devices
    if devices is None:
        given = trainer.devices
        if isinstance(given, list):
            devices = len(given)
        elif str(given) in ("auto", "-1"):
            devices = torch.accelerator.device_count() if str(given) == "-1" else 1
        else:
            devices = len(str(given).strip(",").split(",")) if "," in str(given) else int(given)
    return max(1, int(devices)) * int(options.nodes or trainer.num_nodes or 1)


def _strategy(option: str, trainer: Any, devices: int) -> Any:
    """Return how several devices share the work."""
    if devices == 1:
        return "single"
    given = str(getattr(trainer.strategy, "class_path", trainer.strategy)) if option == "auto" else option
    return "fsdp2" if re.search(r"fsdp|ModelParallel", given, re.IGNORECASE) else "ddp"


def _contexts(editor: ClosedFormEditor) -> int:
    """Return how many contexts a prompt is seen in, beside none."""
    if isinstance(editor.contexts, str):
        return editor.context_count if editor.contexts == "sampled" else 0
    return sum(map(len, editor.contexts)) - 1


def _requests(data: EditDataModule) -> Any:
    """Return the edits, or ``None`` where they are not to be had here."""
    if data.source == "hub" or (data.source != "builtin" and not data.path):
        return None
    try:
        return data.read().requests
    except UserError as error:
        log.warning("the edits cannot be read; averages are taken (%s)", str(error).partition("\n")[0])
        return None


def _tokenizer(language_model: Any, source: str | None) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer if it is on this machine."""
    from transformers import AutoTokenizer

    from lit_edit.models.packaged import PACKAGED

    name = source or language_model.name
    folder = PACKAGED[name].folder if name in PACKAGED else expand(name)
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # broken files raise many kinds; a plan can do without
        log.warning("the tokenizer in %s cannot be read; averages are taken (%s)", folder, error)
        return None
    return tokenizer


def _speed(options: argparse.Namespace, adapter: ModelAdapter, dtype: torch.dtype, gpu: bool) -> Speed:
    """Return the speed of a device: as given, or as measured here."""
    from lit_edit.planning.estimate import Speed
    from lit_edit.planning.speed import measure_speed

    bandwidth = None if options.bandwidth is None else options.bandwidth * 1e9
    reached, link = options.utilisation, options.link * 1e9
    if options.tflops is not None:
        told, bandwidth = ("given", bandwidth) if bandwidth else ("assumed", ASSUMED_BANDWIDTH)
        source = f"{options.tflops:g} TFLOP/s given, {bandwidth / 1e9:g} GB/s {told}"
        return Speed(options.tflops * 1e12, bandwidth, reached, link, source=source)
    found = measure_speed(adapter, dtype, gpu)
    source = f"{found.rate / 1e12:.2g} TFLOP/s and {found.bandwidth / 1e9:.2g} GB/s measured here"
    return Speed(found.rate, bandwidth or found.bandwidth, reached, link, found.host, short=found.short, source=source)
