"""``study beliefs``: edit a small model of a known world, and hold its beliefs against an ideal reader's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.console.configs import find_config
from lit_edit.errors import ArgumentError
from lit_edit.files.changes import refuse_changes
from lit_edit.files.paths import write_json
from lit_edit.studies.frame import begin_study, folder_of, say, say_how_to_go_on, say_report

if TYPE_CHECKING:
    from lit_edit.studies.beliefs.agent import Agent
    from lit_edit.studies.beliefs.coherence import Case
    from lit_edit.studies.beliefs.testbed import Testbed, Trained

METHODS = ("method/d4s", "method/memit", "method/lora")
BEFORE, UNEDITED = "before", "unedited"
"""The rows without an editor: the model against the ideal reader before the edit, and behind it."""


def run_beliefs(args: list[str]) -> int:
    """Run the study; return the exit status."""
    options = _options(args)
    begin_study()
    methods = _methods(options.method)
    folder = folder_of(options.runs_dir, options.name)
    try:
        return _run(options, methods, folder)
    except TimeoutError as error:  # of the training, by --max-minutes
        say_how_to_go_on("beliefs", args, f"{error}:")
        return 1
    except KeyboardInterrupt:
        say_how_to_go_on("beliefs", args)
        return 130


def _run(options: argparse.Namespace, methods: Mapping[str, str], folder: Path) -> int:
    from lit_edit.runs.files import run_lock
    from lit_edit.studies.beliefs.report import write_report

    if options.gather:
        settings = _read_settings(folder)
    else:
        from lit_edit.studies.beliefs.agent import Agent
        from lit_edit.studies.beliefs.bench import check_methods
        from lit_edit.studies.beliefs.coherence import draw_cases
        from lit_edit.studies.beliefs.corpus import write_sentences
        from lit_edit.studies.beliefs.presets import PRESETS

        check_methods(methods, PRESETS[options.preset].layers, options.layers)
        testbed = _testbed(options)
        agent = Agent.of(testbed.world, write_sentences(testbed.world, testbed.corpus))
        cases = draw_cases(testbed.world, agent, options.edits, options.probes, options.seed)
        known = testbed.trained()
        if known is None:
            say(f"training a model of {len(testbed.world.facts)} facts, once ...")
        trained = known or testbed.train(options.max_minutes, progress=sys.stderr.isatty())
        made = f"trained in {trained.seconds / 60:.1f} minutes, {trained.cpu / 60:.1f} of CPU"
        where = f"{'from the cache' if trained.cached else made}: {trained.folder}"
        say(f"the model says {trained.accuracy:.1%} of all facts after {trained.steps} steps ({where})")
        if options.train_only:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        with run_lock(folder):
            settings = _keep_settings(folder, testbed, trained, options)
            _measure_all(folder / "cases", trained, methods, agent, cases, options.layers)
    say_report(write_report(folder, settings), folder, "beliefs")
    return 0


def _options(args: list[str]) -> argparse.Namespace:
    from lit_edit.studies.beliefs.presets import PRESETS

    parser = make_parser(
        "study beliefs",
        "How rational a model's beliefs are behind an edit (arXiv 2406.19354): makes a world of facts with known "
        "probabilities and text about it, trains a small decoder on it (once, then kept), makes each edit on the "
        "trained model, and compares its beliefs with those of an ideal reader, and with each other. What is done is "
        "not done again; what was cut goes on.",
    )
    add = parser.add_argument
    parser.add_limit("edits, each on the unedited model", "--edits", dest="edits", default=50)
    parser.add_method(list(METHODS), nargs="+", help="the editors: rome, or YAML files like configs/method/*")
    parser.add_layers("layers to edit; by default at the config's relative depth")
    add("--probes", type=positive, default=10, help="other subjects' facts asked behind an edit, of each of two kinds")
    add("--subjects", type=positive, default=None, help="of the generated world (200), with five facts each")
    parser.add_data("make the world of these: subject, relation, object with tabs", "--triples", dest="triples")
    add("--facts", type=positive, default=None, help="facts taken of --data, at most (1000)")
    add("--preset", choices=tuple(PRESETS), default="base", help="size of the decoder")
    add("--max-steps", type=positive, default=3000, help="steps of the training, at most")
    add("--max-minutes", type=float, default=None, help="stop the training after so long; given again, it goes on")
    parser.add_seed("seed of world, text, training, and edits")
    parser.add_runs("studies/<name>", "name of the study", default="beliefs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train-only", action="store_true", help="train the model, and measure nothing")
    what.add_argument("--gather", action="store_true", help="write table and figure of what is there; run nothing")
    options = parser.parse_args(args)
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise ArgumentError(f"--max-minutes must be positive, got {options.max_minutes}")
    if options.triples is not None and options.subjects is not None:
        raise ArgumentError("--subjects is of the generated world; with --data say --facts")
    if options.triples is None and options.facts is not None:
        raise ArgumentError("--facts is of --data; the generated world has five facts for each of --subjects")
    return options


def _methods(names: Sequence[str]) -> dict[str, str]:
    """Return the editors' configs by short name; one that is missing, or a name that is taken, is refused."""
    found: dict[str, str] = {}
    for name in names:
        find_config(name)
        label = Path(name).stem
        if label in found or label in (BEFORE, UNEDITED):
            raise ArgumentError(f"--method: {name}: the name {label!r} is taken; rename the file")
        found[label] = name
    return found


def _testbed(options: argparse.Namespace) -> Testbed:
    from lit_edit.studies.beliefs.corpus import CorpusConfig
    from lit_edit.studies.beliefs.decoder import TrainingConfig
    from lit_edit.studies.beliefs.testbed import Testbed
    from lit_edit.studies.beliefs.world import WorldConfig, generate_world, read_triples, world_of_triples

    if options.triples is None:
        world = generate_world(WorldConfig(subjects=options.subjects or 200, seed=options.seed))
    else:
        world = world_of_triples(read_triples(options.triples), facts=options.facts or 1000, seed=options.seed)
    training = TrainingConfig(preset=options.preset, max_steps=options.max_steps, seed=options.seed)
    return Testbed(world, CorpusConfig(seed=options.seed), training)


# ---- what is kept -------------------------------------------------------------------------------------------------


def _keep_settings(folder: Path, testbed: Testbed, trained: Trained, options: argparse.Namespace) -> dict[str, Any]:
    """Note what the study is about; a folder about something else is refused."""
    fixed = {"testbed": testbed.settings, "probes": options.probes, "seed": options.seed, "layers": options.layers}
    path = folder / "settings.json"
    if path.is_file():
        then = _read_settings(folder)
        same = {name: then.get(name) for name in fixed}
        cure = "give the study another --name, or delete the folder"
        refuse_changes(f"{folder} was begun", same, json.loads(json.dumps(fixed)), cure)
    settings = {**fixed, "edits": options.edits, "facts": len(testbed.world.facts), "trained": trained.record}
    write_json(path, settings)
    return settings


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(f"there is nothing of this study in {folder} yet; leave --gather out") from None
    except ValueError as error:
        raise ArgumentError(f"{folder / 'settings.json'} is damaged ({error}): delete it") from None
    if not isinstance(found, dict) or not {"testbed", "facts", "trained", "edits"} <= set(found):
        raise ArgumentError(f"{folder / 'settings.json'} is damaged (fields are missing): delete the folder")
    return found


# ---- edits --------------------------------------------------------------------------------------------------------


def _measure_all(
    folder: Path,
    trained: Trained,
    methods: Mapping[str, str],
    agent: Agent,
    cases: Sequence[Case],
    layers: Sequence[int] | None,
) -> None:
    from tqdm import tqdm

    from lit_edit.console.fit_parser import FitParser
    from lit_edit.models import ModelAdapter
    from lit_edit.models.language_model import LanguageModel
    from lit_edit.studies.beliefs.bench import Bench, make_editor
    from lit_edit.studies.beliefs.cases import CaseFile
    from lit_edit.studies.beliefs.coherence import ModelBeliefs, measure_case, revised

    model, tokenizer = LanguageModel(str(trained.folder)).load()
    adapter = ModelAdapter(model)
    before, unedited = (CaseFile(folder / f"{name}.jsonl", {}) for name in (BEFORE, UNEDITED))
    beliefs = ModelBeliefs(adapter, tokenizer)
    for number, case in enumerate(cases):
        if number not in before.rows:
            before.add(number, measure_case(beliefs, case, agent, agent))
        if number not in unedited.rows:
            unedited.add(number, measure_case(beliefs, case, agent, revised(agent, case)))
    parser = FitParser()
    for label, method in methods.items():
        editor = make_editor(method, trained.folder, adapter.n_layers, layers, parser)
        bench = Bench(editor, adapter, tokenizer, trained.folder)
        file = CaseFile(folder / f"{label}.jsonl", editor.settings())
        left = [number for number in range(len(cases)) if number not in file.rows]
        for number in tqdm(left, label, len(cases), initial=len(cases) - len(left), unit="edit", disable=None):
            file.add(number, bench.measure(cases[number], number, agent))
        say(f"{label}: {len(file.rows)} edits measured")
