"""All commands, in one table: the help, the dispatch, docs/commands.md and the completion are made from it.

A new command is a line in :data:`COMMANDS`. Nothing is imported for a command but the module that it names, and that
only when the command is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

GROUPS = ("edit", "look", "take away", "compare and study", "models", "lit-edit itself")
"""What commands are for, in the order of the help."""


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str  # what is typed behind lit-edit
    group: str  # one of GROUPS
    line: str  # what it does
    example: str  # a call of it
    target: str  # module:function below lit_edit.cli

    def load(self) -> Callable[[list[str]], int | None]:
        """Return the function that runs it: from the arguments behind the name to the exit status (or ``None``)."""
        module, _, function = self.target.partition(":")
        found: Callable[[list[str]], int | None] = getattr(import_module(f"lit_edit.cli.{module}"), function)
        return found


def _table(group: str, *rows: tuple[str, str, str, str]) -> tuple[Command, ...]:
    return tuple(
        Command(name, group, line, f"lit-edit {name}{example}", target) for name, line, example, target in rows
    )


COMMANDS: tuple[Command, ...] = (
    *_table(
        "edit",
        ("fit", "edit a model", " --data facts.csv --run_name x", "fit:run_fit"),
        ("plan", "memory and time of a fit", " --config quickstart --devices 2 --tflops 400", "plan:run_plan"),
        ("undo", "take edits out again", " --run runs/x --edit 17 (or --last 3, --subject Italy)", "history:run_undo"),
        ("redo", "put them back", " --run runs/x --edit 17", "history:run_redo"),
    ),
    *_table(
        "look",
        ("ask", "compare answers", ' --run runs/x "The capital of Italy is"', "ask:run_ask"),
        ("log", "list a run's edits", " --run runs/x", "history:run_log"),
        ("report", "a run as a web page", " --run runs/x (several runs are compared)", "report:run_report"),
        ("validate", "measure without editing", " --config quickstart --ckpt_path LAST.ckpt", "fit:run_validate"),
        ("test", "the same, under Lightning's test loop", "", "fit:run_test"),
        ("ability", "tasks beside the edits", " --run runs/x --tasks sst2 mmlu --at 0 100 300", "ability:run_ability"),
        ("eval-harness", "both models in lm-eval", " --run runs/x --tasks sst2 mmlu", "eval_harness:run_eval_harness"),
    ),
    *_table(
        "take away",
        ("export", "take the edits away", " --run runs/x --as model (or delta, or lora)", "export:run_export"),
        ("apply", "put them into the base", " --delta edited.safetensors --model smollm2-135m", "export:run_apply"),
    ),
    *_table(
        "compare and study",
        ("compare", "editors on one stream", " --config compare --data counterfact.json", "compare:run_compare"),
        ("sweep", "run a grid of fits", " --config sweep/editors", "sweep:run_sweep"),
        ("study", "a question, answered", " mqd --limit 20", "study:run_study"),
        ("trace", "where facts are recalled", " --data known_facts.json --model smollm2-135m", "trace:run_trace"),
        ("mine-hard", "edits that break it", " --method rome --data counterfact.json", "mine_hard:run_mine_hard"),
        ("build", "make a data set", " mqd --out mqd", "build:run_build"),
    ),
    *_table(
        "models",
        ("models", "known models, what is cached, the configs that ship", "", "models:run_models"),
        ("editors", "the methods there are", " (or lit-edit editors D4S: one in full)", "editors:run_editors"),
        ("choose-layers", "for a new model", " --model OWNER/NAME --data FILE", "choose_layers:run_choose_layers"),
        ("stats", "key statistics ahead of a run", " --model smollm2-135m", "stats:run_stats"),
    ),
    *_table(
        "lit-edit itself",
        ("completion", "let Tab complete", " bash >> ~/.bashrc (or zsh, fish)", "completion:run_completion"),
        ("version", "print the version", "", "version:run_version"),
    ),
)
BY_NAME = MappingProxyType({command.name: command for command in COMMANDS})


def _help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    column = max(len(command.line) for command in COMMANDS if len(command.line) < 30)
    text = (
        "lit-edit: change facts in a language model, one after another, without wearing it out\n\n"
        "usage: lit-edit COMMAND [options]\n"
    )
    for group in GROUPS:
        text += f"\n{group}:\n"
        for command in (command for command in COMMANDS if command.group == group):
            bare = command.example == f"lit-edit {command.name}"
            line = command.line if bare else f"{command.line}:".ljust(column + 2) + command.example
            text += f"  {command.name.ljust(width)}  {line}\n"
    return f"""{text}
lit-edit COMMAND --help explains each; docs/commands.md has them all. A run leaves everything in runs/<name>/;
--run_name names it. --config takes a YAML file or the name of one that ships (lit-edit models lists them), several
times if you like. --accept-licence, with any command, says that the terms of a model that is fetched are accepted.
"""


HELP = _help()
"""What ``lit-edit --help`` says."""
