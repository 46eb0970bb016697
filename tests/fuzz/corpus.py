"""More than 500 broken inputs: data files, and configs with overrides. Made by rule and by seed, always the same.

Every one is broken beyond doubt: by construction or, where a seed picks the place, because a strict JSON parser refuses
what comes out. Each knows words that an error must hold to be of use, and the line that it must name.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SEED = 20241123
Change = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class BrokenFile:
    """A data file that cannot be used.

    Attributes:
        name: Unique.
        file: What it is called.
        content: What it holds.
        what: Words that the error must hold.
        line: The line that the error must name, where there is one.
        source: ``data.source``.
        good: How many records remain when broken ones are skipped; ``None`` where the whole file is lost.
        make: Makes something else in its place (a folder, a pipe) and returns the path to read.
    """

    name: str
    file: str
    content: bytes
    what: str
    line: int | None = None
    source: str = "file"
    good: int | None = None
    make: Callable[[Path], str] | None = None

    def write(self, folder: Path) -> str:
        """Put the file into a folder and return its path."""
        if self.make is not None:
            return self.make(folder)
        path = folder / self.file
        path.write_bytes(self.content)
        return str(path)


@dataclass(frozen=True)
class BrokenConfig:
    """A command line that cannot be run.

    Attributes:
        name: Unique.
        args: What stands behind a working command line; ``{folder}`` is where the files are.
        what: Words that the error must hold: the setting or the file, and what is wrong.
        files: Config files, by name.
        make: Makes other files in the folder, given that of a working model.
        command: Of ``lit-edit``.
    """

    name: str
    args: tuple[str, ...]
    what: str
    files: tuple[tuple[str, bytes], ...] = ()
    make: Callable[[Path, Path], None] | None = None
    command: str = "fit"

    def write(self, folder: Path, model: Path) -> list[str]:
        """Put the files into a folder and return the arguments."""
        for name, content in self.files:
            (folder / name).write_bytes(content)
        if self.make is not None:
            self.make(folder, model)
        return [arg.replace("{folder}", str(folder)) for arg in self.args]


# ---- data: what is good ----------------------------------------------------------------------------------------------


def fact(number: int) -> dict[str, Any]:
    """A record of our own form with every field; a letter of each takes two bytes."""
    city = ("Zürich", "Malmö", "Genève")[number]
    return {
        "id": f"f{number}",
        "prompt": f"The mayor of {city} is",
        "subject": city,
        "target_new": "Ada Lovelace",
        "target_true": "Émile Zola",
        "relation": "mayor",
        "paraphrases": [f"{city} is governed by"],
        "neighborhood": [{"prompt": "The mayor of Oslo is", "answer": "Henrik Ibsen"}],
        "portability": {"reasoning": [{"prompt": f"The mayor of {city} wrote", "answer": "programs"}]},
        "generation": [f"In {city} they say"],
    }


def counterfact(number: int) -> dict[str, Any]:
    """A record of CounterFact as published."""
    name = ("Léon Blum", "Sigrid Undset", "Ödön von Horváth")[number]
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "Greek", "id": "Q9129"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": name,
        },
        "paraphrase_prompts": [f"{name}, a native"],
        "neighborhood_prompts": ["The native language of Montesquieu is"],
        "generation_prompts": [f"{name} grew up"],
    }


def flat(number: int) -> dict[str, Any]:
    """A record of CounterFact in the flat form of EasyEdit."""
    name = ("Léon Blum", "Sigrid Undset", "Ödön von Horváth")[number]
    return {
        "case_id": number,
        "prompt": f"The mother tongue of {name} is",
        "target_new": "Greek",
        "subject": name,
        "ground_truth": "French",
        "rephrase_prompt": f"{name}, a native speaker of",
        "locality_prompt": "The religion of Edwin of Northumbria is",
        "locality_ground_truth": "Christianity",
    }


def zsre(number: int) -> dict[str, Any]:
    """A record of zsRE as prepared for MEND."""
    name = ("Watts Humphrey", "Émilie du Châtelet", "Kurt Gödel")[number]
    return {
        "id": number,
        "subject": name,
        "src": f"What university did {name} attend?",
        "rephrase": f"Where did {name} study?",
        "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss",
        "loc_ans": "Andrew Garfield",
    }


FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "facts": fact,
    "counterfact": counterfact,
    "flat": flat,
    "zsre": zsre,
}
ID = {"facts": "id", "counterfact": "case_id", "flat": "case_id", "zsre": "id"}
TABLE = ("id", "prompt", "subject", "target_new", "target_true", "paraphrases", "neighborhood")


def as_json(rows: Iterable[object]) -> str:
    """A list with a record per line, the first on line 2."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def as_jsonl(rows: Iterable[object]) -> str:
    """A record per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: Iterable[Iterable[str]]) -> str:
    """Rows of cells, all in quotes."""
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows)


def table(*changes: tuple[int, str, str]) -> list[list[str]]:
    """A CSV table of our own form: header and three rows; ``changes`` are ``(row, column, cell)``."""
    rows = [list(TABLE)]
    for number in range(3):
        record = fact(number)
        probe = record["neighborhood"][0]
        cells = [str(record[name]) for name in TABLE[:5]]
        rows.append([*cells, record["paraphrases"][0], f"{probe['prompt']} => {probe['answer']}"])
    for row, column, cell in changes:
        rows[row][TABLE.index(column)] = cell
    return rows


# ---- data: records that are broken -----------------------------------------------------------------------------------


def changed(path: str, value: object) -> Change:
    """Set a field; ``a.b`` is field ``b`` of object ``a``."""

    def change(record: dict[str, Any]) -> object:
        *parents, name = path.split(".")
        inner = record
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
        return record

    return change


def dropped(path: str) -> Change:
    """Leave a field out."""

    def change(record: dict[str, Any]) -> object:
        *parents, name = path.split(".")
        inner = record
        for parent in parents:
            inner = inner[parent]
        del inner[name]
        return record

    return change


def replaced(value: object) -> Change:
    """Put something else in the record's place."""
    return lambda record: value


REQUIRED = {
    "facts": ("prompt", "subject", "target_new"),
    "counterfact": ("requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new.str",
                    "requested_rewrite.target_true.str"),
    "flat": ("prompt", "subject", "target_new"),
    "zsre": ("src", "subject", "alt"),
}  # fmt: skip
NO_TEXT = (None, "", " \t ", ["Oslo"], {"str": "Oslo"}, True, float("inf"))
LISTS = {
    "facts": ("paraphrases", "generation"),
    "counterfact": ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts"),
    "zsre": ("answers",),
}
NO_LIST = (7, True, {"a": "b"}, [7], [None], [["x"]], [{"a": 1}])
OPTIONAL = {
    "facts": ("target_true", "relation"),
    "counterfact": ("requested_rewrite.relation_id",),
    "flat": ("rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    "zsre": ("rephrase", "loc", "loc_ans"),
}
PROBE = {"prompt": "The mayor of Bergen is", "answer": "Edvard Grieg"}


def broken_records() -> Iterator[tuple[str, str, Change, str]]:
    """Yield form, name, change and the words of the error."""
    for form, fields in REQUIRED.items():
        for field in fields:
            short = field.rpartition(".")[2]
            yield form, f"{field}-missing", dropped(field), short
            for value in NO_TEXT:
                yield form, f"{field}-{shown(value)}", changed(field, value), short
    for form, fields in LISTS.items():
        for field in fields:
            for value in NO_LIST:
                yield form, f"{field}-{shown(value)}", changed(field, value), f"{field} must be a list"
    for form, fields in OPTIONAL.items():
        for field in fields:
            for value in (["a"], {"a": "b"}, True):
                short = field.rpartition(".")[2]
                yield form, f"{field}-{shown(value)}", changed(field, value), f"{short} must be text"
    yield from broken_probes()
    yield from broken_texts()
    for form, name in ID.items():
        for value in ([1], {"a": 1}, True, float("-inf")):
            yield form, f"id-{shown(value)}", changed(name, value), "id must be text or a number"
        for empty in ("", "  "):
            yield form, f"id-{shown(empty)}", changed(name, empty), "id is empty"
    for value in (None, 7, "text", True, [1, 2], [], 1.5):
        yield "facts", f"record-{shown(value)}", replaced(value), "expected a record with fields"
    yield "facts", "record-empty", replaced({}), "missing field prompt, subject, target_new (the record has: none)"
    yield "facts", "record-of-another-kind", replaced({"question": "?", "a\ud800\nb": "!"}), "the record has: "
    yield "facts", "record-of-many-fields", replaced({f"field {i}": i for i in range(9000)}), "the record has: "


def broken_probes() -> Iterator[tuple[str, str, Change, str]]:
    """Probes without an answer, a prompt, or the right shape."""
    for value in (7, ["text"], [None], PROBE):
        yield "facts", f"neighborhood-{shown(value)}", changed("neighborhood", value), "neighborhood must be a list"
    for probe, what in (
        ({"prompt": "a"}, "missing field answer"),
        ({"answer": "a"}, "missing field prompt"),
        ({"prompt": " ", "answer": "b"}, "prompt is empty"),
        ({"prompt": "a", "answer": None}, "missing field answer"),
        ({"prompt": ["a"], "answer": "b"}, "prompt must be text"),
    ):
        what = f"neighborhood: {what}"
        yield "facts", f"neighborhood-{shown(probe)}", changed("neighborhood", [PROBE, probe]), what
    for value in ([], 7, "text", [PROBE]):
        yield "facts", f"portability-{shown(value)}", changed("portability", value), "portability must be an object"
    for value in ([{"a": "b"}], {"a": "b"}, True, [[["a"]]]):
        yield "flat", f"ground_truth-{shown(value)}", changed("ground_truth", value), "ground_truth must be text"
    for field in ("portability", "locality"):
        for value in ([], 7, "text", [PROBE]):
            yield "flat", f"{field}-{shown(value)}", changed(field, value), f"{field} must be an object"
        for value in (7, "text", None, ["a"], [{"ground_truth": "a"}], {"prompt": "a", "ground_truth": True}):
            yield "flat", f"{field}-kind-{shown(value)}", changed(field, {"kind": value}), f"{field}.kind"
    for value in (7, ["a"], PROBE, [{"prompt": "a"}]):
        yield "facts", f"portability-kind-{shown(value)}", changed("portability", {"kind": value}), "portability.kind"
    for form, field, other in (
        ("flat", "locality_prompt", "locality_ground_truth"),
        ("flat", "locality_ground_truth", "locality_prompt"),
        ("zsre", "loc", "loc_ans"),
        ("zsre", "loc_ans", "loc"),
    ):
        yield form, f"{other}-without-{field}", dropped(field), f"{other} has no {field}"


def broken_texts() -> Iterator[tuple[str, str, Change, str]]:
    """Texts that do not fit each other, or that cannot be tokenised."""
    for form, prompt, subject, new, true in (
        ("facts", "prompt", "subject", "target_new", "target_true"),
        ("counterfact", "requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new.str",
         "requested_rewrite.target_true.str"),
        ("flat", "prompt", "subject", "target_new", "ground_truth"),
        ("zsre", "src", "subject", "alt", ""),
    ):  # fmt: skip
        if form != "counterfact":  # there the prompt has a place for any subject
            yield form, "subject-elsewhere", changed(subject, "Atlantis"), "'Atlantis' does not occur in the prompt"
        yield form, "prompt-elsewhere", changed(prompt, "The weather is"), "does not occur in the prompt"
        yield form, "two-places", changed(prompt, "{} and {} are"), "does not occur in the prompt"
        yield form, "long-prompt", changed(prompt, "word " * 50_000), "does not occur in the prompt"
        yield form, "nul", changed(new, "a\x00b"), "holds a NUL character"
        yield form, "surrogate", changed(new, "a\ud83d"), "holds half a character"
        if true:
            both = changed(true, "Same")
            yield form, "nothing-to-edit", lambda r, b=both, n=new: changed(n, " Same ")(b(r)), "nothing to edit"  # type: ignore[misc, arg-type]
            yield form, "surrogate-in-truth", changed(true, "\udc00"), "holds half a character"
    yield "facts", "subject-not-filled-in", changed("subject", "{}"), "does not occur"
    yield "counterfact", "subject-not-filled-in", changed("requested_rewrite.subject", "{}"), "is not filled in"
    yield "facts", "nul-in-paraphrase", changed("paraphrases", ["a\x00"]), "paraphrases holds a NUL"
    yield "facts", "surrogate-in-probe", changed("neighborhood", [PROBE | {"answer": "\ud800"}]), "half a character"
    yield "facts", "surrogate-in-kind", changed("portability", {"\ud800": [PROBE]}), "half a character"
    for value in (None, [], "text", 7, {}):
        what = "missing field" if value == {} else "requested_rewrite must be an object"
        yield "counterfact", f"rewrite-{shown(value)}", changed("requested_rewrite", value), what
    for target in ("target_new", "target_true"):
        field = f"requested_rewrite.{target}"
        yield "counterfact", f"{target}-without-str", changed(field, {"id": "Q1"}), f"{target}: missing field str"
        yield "counterfact", f"{target}-a-list", changed(field, ["Greek"]), f"{target} must be text"


def shown(value: object) -> str:
    """A value in the name of a case."""
    return json.dumps(value).replace("\\", "")[:40]


def record_files() -> Iterator[BrokenFile]:
    """A broken record among good ones, in turn at each place of a JSON list or a JSONL file."""
    for index, (form, name, change, what) in enumerate(broken_records()):
        rows: list[object] = [FORMS[form](number) for number in range(3)]
        place = index % 3
        rows[place] = change(copy.deepcopy(FORMS[form](place)))
        kind = ("jsonl", "json")[index // 3 % 2]
        text = json.dumps(rows, indent=None) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        line = place + 1
        if kind == "json":
            text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
            line += 1
        # JSON has no infinity, but a number too large for a float is read as one.
        text = text.replace("-Infinity", "-1e999").replace("Infinity", "1e999")
        yield BrokenFile(f"{kind}-{form}-{name}", f"edits.{kind}", text.encode(), what, line, good=2)
    yield from other_record_files()


def other_record_files() -> Iterator[BrokenFile]:
    """Identical ids, a format that was named and is another one, and values that only JSON's text can have."""
    for form, make in FORMS.items():
        rows = [make(0), make(1), {**make(2), ID[form]: make(0)[ID[form]]}]
        text = as_jsonl(rows).encode()
        yield BrokenFile(f"jsonl-{form}-duplicate-id", "edits.jsonl", text, "duplicate id", 3, good=2)
    for source, form, what in (
        ("zsre", "facts", "missing field"),
        ("zsre", "counterfact", "missing field"),
        ("facts", "zsre", "missing field prompt, target_new"),
        ("facts", "counterfact", "missing field prompt, subject, target_new"),
        ("counterfact_flat", "zsre", "missing field prompt"),
        ("counterfact", "facts", "missing field requested_rewrite"),
        ("counterfact", "zsre", "missing field requested_rewrite"),
    ):
        text = as_json([FORMS[form](0)]).encode()
        yield BrokenFile(f"json-{form}-as-{source}", "edits.json", text, what, 2, source=source)
    line = json.dumps(fact(0))
    for name, row, what in (
        ("nan", line.replace('"f0"', "NaN"), "NaN is not JSON"),
        ("infinity", line.replace('"f0"', "-Infinity"), "-Infinity is not JSON"),
        ("key-twice", line.replace('"subject"', '"prompt"'), "'prompt' occurs twice"),
        ("deep-key-twice", line.replace('"answer"', '"prompt"'), "'prompt' occurs twice"),
        ("bad-escape", line.replace("mayor", "\\mayor"), "bad JSON: Invalid \\escape"),
        ("short-escape", line.replace("mayor", "\\u12"), "bad JSON: Invalid \\uXXXX escape"),
        ("single-quotes", line.replace('"', "'"), "bad JSON"),
        ("no-quotes", line.replace('"id"', "id"), "bad JSON"),
        ("python", line.replace('"f0"', "None"), "bad JSON"),
        ("comment", f"{line} // checked", "bad JSON: Extra data"),
        ("two-records", f"{line} {line}", "bad JSON: Extra data"),
        ("hex", line.replace('"f0"', "0x1F"), "bad JSON"),
        ("leading-zero", line.replace('"f0"', "007"), "bad JSON"),
        ("trailing-comma", line[:-1] + ",}", "bad JSON"),
        ("no-colon", line.replace('"id":', '"id"'), "bad JSON"),
        ("no-comma", line.replace('", "', '" "', 1), "bad JSON"),
        ("control-character", line.replace("mayor", "may\tor", 1), "bad JSON: Invalid control character"),
        ("huge-number", line.replace('"f0"', "9" * 5000), "bad JSON"),
        ("deep-list", line.replace('"f0"', "[" * 99_999 + "]" * 99_999), "bad JSON"),
        ("deep-object", line.replace('"f0"', '{"a":' * 99_999 + "1" + "}" * 99_999), "bad JSON"),
        ("csv", "f0,The mayor of Oslo is,Oslo,Ada", "bad JSON"),
    ):
        rows = [json.dumps(fact(1)), row, json.dumps(fact(2))]
        text = "\n".join(rows).encode()
        yield BrokenFile(f"jsonl-line-{name}", "edits.jsonl", text, what, 2, good=2)
        text = ("[\n" + ",\n".join(rows) + "\n]").encode()
        what = what if "Extra data" not in what and name != "csv" else "bad JSON"
        yield BrokenFile(f"json-line-{name}", "edits.json", text, what, 2 + 1)


# ---- data: files that are broken -------------------------------------------------------------------------------------


def is_json(data: bytes) -> bool:
    """Whether a strict parser takes it."""

    def refuse(name: str) -> object:
        raise ValueError(name)

    try:
        json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def cut_files() -> Iterator[BrokenFile]:
    """Files cut at a byte, as a full disk or a broken download leaves them."""
    chance = random.Random(SEED)
    for number, form in enumerate([*FORMS] * 3):
        whole = as_json(FORMS[form](i) for i in range(3)).encode()
        at = chance.randrange(2, len(whole) - 3)  # the last bracket is gone in any case
        yield BrokenFile(f"json-{form}-cut-{number}", "edits.json", whole[:at], "", None)
        rows = as_jsonl(FORMS[form](i) for i in range(3)).encode()
        last = rows.rindex(b"\n", 0, -1) + 1
        at = chance.randrange(last + 1, len(rows) - 2)
        yield BrokenFile(f"jsonl-{form}-cut-{number}", "edits.jsonl", rows[:at], "", 3)
    whole = as_csv(table()).encode()
    for number in range(4):
        row = whole.rindex(b"\n", 0, -1) + 2  # inside the first quoted cell of the last row, or a later one
        at = chance.choice([at for at in range(row, len(whole) - 2) if whole[row - 1 : at].count(b'"') % 2 == 1])
        yield BrokenFile(f"csv-cut-{number}", "edits.csv", whole[:at], "", 4)


def flipped_files() -> Iterator[BrokenFile]:
    """One bit of a brace, bracket, colon, comma or quote is another one, and a strict parser refuses the rest."""
    chance = random.Random(SEED + 1)
    for number, form in enumerate([*FORMS] * 4):
        kind = ("json", "jsonl")[number % 2]
        rows = [FORMS[form](i) for i in range(3)]
        whole = (as_json(rows) if kind == "json" else as_jsonl(rows)).encode()
        marks = [at for at, byte in enumerate(whole) if byte in b'{}[]:,"']
        while True:
            at, bit = chance.choice(marks), chance.randrange(8)
            broken = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
            parts = [broken] if kind == "json" else [row for row in broken.split(b"\n") if row.strip()]
            if not all(is_json(part) for part in parts):
                break
        yield BrokenFile(f"{kind}-{form}-bit-{bit}-at-{at}", f"edits.{kind}", broken, "")


def encoded_files() -> Iterator[BrokenFile]:
    """Other encodings than UTF-8, and packed files."""
    for kind, text in (
        ("json", as_json(fact(i) for i in range(3))),
        ("jsonl", as_jsonl(fact(i) for i in range(3))),
        ("csv", as_csv(table())),
    ):
        for code in ("latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp500", "mac-roman"):
            yield BrokenFile(f"{kind}-in-{code}", f"edits.{kind}", text.encode(code), "UTF-8")
        plain = text.encode("ascii", "ignore").decode()  # in UTF-16 every other byte is NUL, and all is valid UTF-8
        yield BrokenFile(f"{kind}-ascii-in-utf-16", f"edits.{kind}", plain.encode("utf-16-le"), "UTF-16", 1)
        yield BrokenFile(f"{kind}-nul-at-the-end", f"edits.{kind}", text.encode() + bytes(512), "NUL character")
        yield BrokenFile(f"{kind}-packed", f"edits.{kind}", gzip.compress(text.encode(), mtime=0), "UTF-8", 1)
        half = text.encode()[: text.encode().index("ü".encode()) + 1]
        yield BrokenFile(f"{kind}-half-a-letter", f"edits.{kind}", half, "UTF-8", None)


def json_files() -> Iterator[BrokenFile]:
    """Files that are something else than a list of records."""
    good, row = as_json(fact(i) for i in range(3)), json.dumps(fact(0))
    for name, text, what, line in (
        ("empty", "", "expected a JSON list", 1),
        ("blank", " \n\n ", "expected a JSON list", 3),
        ("mark-alone", "\ufeff", "expected a JSON list", 1),
        ("two-marks", "\ufeff\ufeff" + good, "expected a JSON list", 1),
        ("no-records", "[]", "no edits to make", None),
        ("object-of-lists", json.dumps({"data": [fact(0)]}), "expected a JSON list", 1),
        ("single-record", row, "expected a JSON list", 1),
        ("text", '"edits"', "expected a JSON list", 1),
        ("number", "17", "expected a JSON list", 1),
        ("null", "null", "expected a JSON list", 1),
        ("jsonl", as_jsonl(fact(i) for i in range(3)), "a record per line is named .jsonl", 1),
        ("csv", as_csv(table()), "expected a JSON list", 1),
        ("html", "<!DOCTYPE html>\n<html><body>404: Not Found</body></html>", "expected a JSON list", 1),
        ("lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "expected a JSON list", 1),
        ("xml", "<?xml version='1.0'?>\n<edits/>", "expected a JSON list", 1),
        ("yaml", "- prompt: The mayor of Oslo is\n  subject: Oslo\n", "expected a JSON list", 1),
        ("open", "[", "bad JSON", 1),
        ("open-twice", f"[{good}", "expected a record with fields, got list", 1),
        ("closed-twice", good + "]", "text after the end", 6),
        ("garbage-behind", good + "done", "text after the end", 6),
        ("garbage-behind-nothing", "[] done", "text after the end", 1),
        ("second-list", good + good, "text after the end", 6),
        ("trailing-comma", f"[\n{row},\n]", "bad JSON", 3),
        ("leading-comma", f"[\n,{row}]", "bad JSON", 2),
        ("two-commas", f"[\n{row},,\n{row}]", "bad JSON", 2),
        ("no-comma", f"[\n{row}\n{row}]", "expected ',' or ']'", 3),
        ("wrong-bracket", f"[\n{row}\n}}", "expected ',' or ']'", 3),
        ("list-of-lists", f"[\n[{row}]]", "expected a record with fields, got list", 2),
        ("deep", "[" * 200_000, "bad JSON", 1),
        ("comment", f"// edits\n{good}", "expected a JSON list", 1),
    ):
        yield BrokenFile(f"json-{name}", "edits.json", text.encode(), what, line)
    for name, text, what, line in (
        ("empty", "", "no edits to make", None),
        ("blank", "\n \n\n", "no edits to make", None),
        ("json", json.dumps([fact(0), fact(1)], indent=1), "bad JSON", 1),
        ("json-on-one-line", json.dumps([fact(0)]), "expected a record with fields, got list", 1),
        ("html", "<!DOCTYPE html>\n<html/>", "bad JSON", 1),
        ("csv", as_csv(table()), "bad JSON", 1),
        ("record-over-lines", json.dumps(fact(0), indent=1), "bad JSON", 1),
        ("comma-behind", f"{row},\n{row}", "bad JSON: Extra data", 1),
        ("garbage-behind", as_jsonl([fact(0), fact(1)]) + "done\n", "bad JSON", 3),
        ("cr-only", f"{row}\r{row}", "bad JSON: Extra data", 1),
    ):
        yield BrokenFile(f"jsonl-{name}", "edits.jsonl", text.encode(), what, line)


def csv_files() -> Iterator[BrokenFile]:
    """Tables as people make and spreadsheets save them."""
    head = "prompt,subject,target_new\n"
    row = "The mayor of Oslo is,Oslo,Ada\n"
    for name, text, what, line in (
        ("empty", "", "the file is empty", 1),
        ("blank", "\n\n\n", "the file is empty", 1),
        ("commas", ",,,\n,,,\n", "the file is empty", 1),
        ("header-alone", head, "no edits to make", None),
        ("no-header", row * 2, "the record has: Ada, Oslo", 2),
        ("semicolons", head.replace(",", ";") + row.replace(",", ";"), "expected commas between the columns", 1),
        ("tabs", head.replace(",", "\t") + row.replace(",", "\t"), "expected commas between the columns", 1),
        ("semicolons-and-commas", head.replace(",", ";") + row, "expected commas between the columns", 1),
        ("column-twice", "prompt,subject,target_new,subject\n" + row, "occurs twice: 'subject'", 1),
        ("column-twice-with-blanks", "prompt, subject ,target_new,subject\n" + row, "occurs twice: 'subject'", 1),
        ("column-renamed", head.replace("target_new", "target") + row, "missing field target_new", 2),
        ("column-in-capitals", head.upper() + row, "missing field prompt, subject, target_new", 2),
        ("column-missing", "prompt,subject\nThe mayor of Oslo is,Oslo\n", "missing field target_new", 2),
        ("quote-open", head + row + '"The mayor of Bergen is,Bergen,Ada\n' + row, "does not end", 3),
        ("quote-open-in-header", '"prompt,subject,target_new\n' + row, "does not end", 1),
        ("quote-open-at-the-end", head + row + 'The mayor of Bergen is,Bergen,"Ada', "does not end", 3),
        ("quote-inside", head + row + '"The mayor" of Bergen is,Bergen,Ada\n', "bad CSV", 3),
        ("huge-cell", head + row + "x" * 200_000 + ",x,y\n", "bad CSV: field larger than", 3),
        ("huge-quoted-cell", head + row + '"' + "x\n" * 100_000 + '",x,y\n', "bad CSV: field larger than", 3),
        ("json", as_json([fact(0)]), "", 2),
        ("html", "<!DOCTYPE html>\n<html><body>404</body></html>\n", "missing field", 2),
    ):
        yield BrokenFile(f"csv-{name}", "edits.csv", text.encode(), what, line)
    for name, cells, what in (
        ("too-many", "The mayor of Oslo is,Oslo,Ada,Grace", "more cells than the header has columns (3)"),
        ("comma-without-quotes", "In Oslo, Norway, the mayor is,Oslo,Ada", "more cells than the header"),
        ("too-few", "The mayor of Oslo is,Oslo", "missing field target_new"),
        ("one", "The mayor of Oslo is", "missing field subject, target_new"),
        ("blank-prompt", ",Oslo,Ada", "missing field prompt"),
        ("blank-subject", "The mayor of Oslo is,,Ada", "missing field subject"),
        ("blank-target", "The mayor of Oslo is,Oslo,", "missing field target_new"),
        ("spaces", "The mayor of Oslo is,Oslo,   ", "target_new is empty"),
        ("subject-elsewhere", "The mayor of Oslo is,Bergen,Ada", "'Bergen' does not occur in the prompt"),
        ("two-places", "{} and {} are,Oslo,Ada", "does not occur in the prompt"),
        ("shifted", "Oslo,Ada,The mayor of Oslo is", "'Ada' does not occur in the prompt"),
    ):
        text = head + row + cells + "\n" + row
        yield BrokenFile(f"csv-row-{name}", "edits.csv", text.encode(), what, 3, good=2)
    for column, cell, what in (
        ("id", "f0", "duplicate id 'f0'"),
        ("target_true", "Ada Lovelace", "nothing to edit"),
        ("neighborhood", "The mayor of Oslo is", "neighborhood: missing field answer"),
        ("neighborhood", "=> Henrik Ibsen", "neighborhood: prompt is empty"),
        ("neighborhood", "The mayor of Oslo is =>", "neighborhood: answer is empty"),
        ("neighborhood", "The mayor of Oslo is => Ibsen => Ada", "has more than one '=>'"),
        ("neighborhood", "The mayor of Oslo is => Ibsen | Ada", "neighborhood: missing field answer"),
    ):
        text = as_csv(table((2, column, cell)))
        yield BrokenFile(f"csv-cell-{column}-{cell[-12:]}", "edits.csv", text.encode(), what, 3, good=2)
    text = "prompt,subject,target_new,locality_prompt,locality_ground_truth\nOslo is in,Oslo,Asia,,Europe\n"
    yield BrokenFile("csv-flat-without-probe", "edits.csv", text.encode(), "has no locality_prompt", 2)
    text = "src,subject,alt,loc\nWhere is Oslo?,Oslo,Asia,where is rome\n"
    yield BrokenFile("csv-zsre-without-answer", "edits.csv", text.encode(), "loc has no loc_ans", 2)
    text = "src,subject,alt\nWhere is Oslo?,Oslo,\n"
    yield BrokenFile("csv-zsre-without-target", "edits.csv", text.encode(), "missing field alt", 2)


def odd_places() -> Iterator[BrokenFile]:
    """Paths at which there is no file to read."""

    def case(name: str, what: str, make: Callable[[Path], str]) -> BrokenFile:
        return BrokenFile(f"path-{name}", "", b"", what, make=make)

    def folder(at: Path) -> str:
        (at / "edits.json").mkdir()
        return str(at / "edits.json")

    def under_a_file(at: Path) -> str:
        (at / "file").write_text("x")
        return str(at / "file" / "edits.json")

    def pipe(at: Path) -> str:
        os.mkfifo(at / "edits.jsonl")
        return str(at / "edits.jsonl")

    def loop(at: Path) -> str:
        (at / "edits.csv").symlink_to(at / "edits.csv")
        return str(at / "edits.csv")

    def dangling(at: Path) -> str:
        (at / "edits.json").symlink_to(at / "gone.json")
        return str(at / "edits.json")

    def named(name: str) -> Callable[[Path], str]:
        def make(at: Path) -> str:
            (at / name).write_text(as_json([fact(0)]))
            return str(at / name)

        return make

    def unreadable(at: Path) -> str:
        (at / "edits.json").touch(mode=0)
        return str(at / "edits.json")

    if os.geteuid() != 0:  # root may read everything
        yield case("unreadable", "cannot be read: Permission denied", unreadable)
    yield case("missing", "no such file", lambda at: str(at / "edits.json"))
    yield case("missing-folder", "no such file", lambda at: str(at / "gone" / "edits.csv"))
    yield case("folder", "is a folder", folder)
    yield case("folder-without-suffix", "is a folder", str)
    yield case("under-a-file", "cannot be read: Not a directory", under_a_file)
    yield case("pipe", "is no ordinary file", pipe)
    yield case("loop", "cannot be read: Too many levels", loop)
    yield case("dangling", "no such file", dangling)
    yield case("long", "cannot be read: File name too long", lambda at: str(at / ("x" * 3000 + ".json")))
    yield case("nul", "cannot be read", lambda at: str(at / "a\x00b.json"))
    yield case("nobodys-home", "no such home folder", lambda at: "~nobody-of-that-name/edits.json")
    yield case("empty", "needs data.path", lambda at: "")
    for name in ("edits.txt", "edits", "edits.json.bak", "edits.xlsx", "edits.parquet", "edits.json ", ".json"):
        yield case(f"suffix-{name}", "unknown kind of file", named(name))


@cache
def broken_files() -> tuple[BrokenFile, ...]:
    """Return all broken data files."""
    groups = (record_files, cut_files, flipped_files, encoded_files, json_files, csv_files, odd_places)
    return tuple(case for group in groups for case in group())


# ---- configs ---------------------------------------------------------------------------------------------------------

EDITOR = "--model.editor.init_args"
D4S = "model:\n  editor:\n    class_path: lit_edit.editors.D4S\n    init_args:\n      "
CALLBACK = "trainer:\n  callbacks:\n    - class_path: {}\n      init_args: {{{}}}\n"
LOGGER = CALLBACK.replace("callbacks", "logger")


def config_files() -> Iterator[BrokenConfig]:
    """YAML files that cannot be read, or that hold something else than settings."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    for name, content, what in (
        ("empty", "", "own.yaml:1: expected settings by name"),
        ("comment", "# nothing yet\n", "own.yaml:1: expected settings by name"),
        ("null", "null\n", "own.yaml:1: expected settings by name"),
        ("list", "- data\n- model\n", "own.yaml:1: expected settings by name"),
        ("text", "quickstart\n", "own.yaml:1: expected settings by name"),
        ("number", "17\n", "own.yaml:1: expected settings by name"),
        ("csv", "prompt,subject,target_new\n", "own.yaml:1: expected settings by name"),
        ("html", "<!DOCTYPE html>\n<html/>\n", "own.yaml:1: expected settings by name"),
        ("equals", "data.limit = 3\n", "own.yaml:1: expected settings by name"),
        ("binary", bytes(range(1, 256)), "own.yaml:2: not UTF-8"),
        ("packed", gzip.compress(b"data:\n  limit: 3\n", mtime=0), "own.yaml:1: not UTF-8"),
        ("nul", b"data:\n  limit: 3\n\x00", "own.yaml:3: holds a NUL character"),
        ("latin-1", "data:\n  path: Zürich.csv\n".encode("latin-1"), "own.yaml:2: not UTF-8"),
        ("utf-16", "data:\n  limit: 3\n".encode("utf-16"), "own.yaml:1: not UTF-8"),
        ("utf-16-without-mark", "data:\n  limit: 3\n".encode("utf-16-le"), "own.yaml:1: holds a NUL character"),
        ("control-character", "data:\n  path: a\x07b\n", "own.yaml: bad YAML"),
        ("tab", "data:\n\tlimit: 3\n", "own.yaml:2: bad YAML"),
        ("indent", "data:\n  limit: 3\n source: builtin\n", "own.yaml:3: bad YAML"),
        ("open-list", f"{D4S}layers: [1, 2\ndata:\n  limit: 3\n", "own.yaml:6: bad YAML"),
        ("open-object", "data: {limit: 3\n", "own.yaml:2: bad YAML"),
        ("open-quote", "data:\n  path: 'facts.csv\n", "own.yaml:3: bad YAML"),
        ("colon-in-text", "data:\n  path: a: b\n", "own.yaml:2: bad YAML"),
        ("percent", "%data\n", "own.yaml:2: bad YAML"),
        ("at-sign", "data:\n  path: @facts\n", "own.yaml:2: bad YAML"),
        ("two-documents", "data:\n  limit: 3\n---\ndata:\n  limit: 4\n", "own.yaml:3: bad YAML"),
        ("merge-conflict", "data:\n<<<<<<< HEAD\n  limit: 3\n=======\n", "own.yaml:3: bad YAML"),
        ("key-twice", "data:\n  limit: 3\n  limit: 4\n", "own.yaml:3: bad YAML: found duplicate key limit"),
        ("section-twice", "data:\n  limit: 3\ndata:\n  offset: 4\n", "own.yaml:3: bad YAML: found duplicate key data"),
        ("no-such-anchor", "data: *defaults\n", "own.yaml:1: bad YAML: found undefined alias"),
        ("anchor-in-itself", "data: &data\n  path: *data\n", "own.yaml:1: bad YAML"),
        ("bomb", bomb, "own.yaml:1: bad YAML"),
        ("deep", "data: " + "[" * 3000 + "]" * 3000, "own.yaml: bad YAML: nested too deeply"),
        ("python-tag", "data:\n  path: !!python/object/apply:os.mkdir [x]\n", "own.yaml:2: bad YAML"),
        ("unknown-tag", "data: !include other.yaml\n", "own.yaml:1: bad YAML"),
        ("number-as-name", "1: 2\n", "own.yaml:1: the name of a setting must be text"),
        ("null-as-name", "~: 2\n", "own.yaml:1: the name of a setting must be text"),
        ("list-as-name", "? [a, b]\n: 2\n", "own.yaml:1: "),
        (
            "section-of-list",
            "model:\n  measure_each: true\ndata:\n  - limit: 3\n",
            "own.yaml:3: 'data' must hold settings",
        ),
        ("section-of-nothing", "trainer:\n", "own.yaml:1: 'trainer' must hold settings"),
        ("section-of-text", "data: builtin\n", "data: "),
        ("section-without-colon", "data:\n  limit 3\n", "data: "),
        ("no-such-reference", "data:\n  limit: ${nope}\n", "own.yaml: data.limit: Interpolation key 'nope' not found"),
        ("no-such-part", "data:\n  path: ${data.nope}\n", "own.yaml: data.path: Interpolation key 'data.nope'"),
        ("circle", "data:\n  limit: ${data.offset}\n  offset: ${data.limit}\n", "own.yaml: data.limit: Recursive"),
        ("circle-of-one", "data:\n  limit: ${data.limit}\n", "own.yaml: data.limit: Recursive"),
        ("no-such-variable", "data:\n  path: ${oc.env:LIT_EDIT_NOT_SET}\n", "own.yaml: data.path: "),
        ("no-such-resolver", "data:\n  path: ${nope:3}\n", "own.yaml: data.path: Unsupported interpolation type nope"),
        ("open-reference", "data:\n  path: ${data.\n", "own.yaml: data.path: "),
    ):
        raw = content if isinstance(content, bytes) else content.encode()
        yield BrokenConfig(f"file-{name}", ("--config={folder}/own.yaml",), what, (("own.yaml", raw),))


def config_places() -> Iterator[BrokenConfig]:
    """Configs that are not there."""
    for name, arg in (
        ("missing", "{folder}/gone.yaml"),
        ("folder", "{folder}"),
        ("empty", ""),
        ("unknown-name", "quickstrat"),
        ("way-out", "../pyproject"),
        ("nobodys-home", "~nobody-of-that-name/own.yaml"),
        ("long", "x" * 5000),
    ):
        yield BrokenConfig(f"config-{name}", (f"--config={arg}",), "no such file, and no config of that name ships")
    yield BrokenConfig("config-without-value", ("--config",), "--config: expected one argument")

    def pipe(folder: Path, model: Path) -> None:
        os.mkfifo(folder / "own.yaml")

    yield BrokenConfig("config-pipe", ("--config={folder}/own.yaml",), "own.yaml: no such file", make=pipe)


def config_settings() -> Iterator[BrokenConfig]:
    """Settings in a file that do not exist or are of another type."""
    for name, content, what in (
        ("section", "dtaa:\n  limit: 3\n", "there is no setting dtaa.limit; did you mean data.limit?"),
        ("data", "data:\n  limt: 3\n", "'data.limt'"),
        ("model", "model:\n  editr: x\n", "'model.editr'"),
        ("language-model", "model:\n  language_model:\n    path: x\n", "there is no setting model.language_model.path"),
        ("statistics", "model:\n  statistics:\n    token: 3\n", "'model.statistics.token'"),
        ("trainer", "trainer:\n  max_epoch: 1\n", "'trainer.max_epoch'"),
        ("editor", f"{D4S}lambda: 3\n", "model.editor: lit_edit.editors.D4S has no setting lambda"),
        ("editor-class", "model:\n  editor:\n    class: lit_edit.editors.D4S\n", "model.editor: "),
        ("target", f"{D4S}target:\n        learning_rate: 3\n", "'learning_rate'"),
        ("storage", f"{D4S}storage:\n        where: disk\n", "'where'"),
        ("arch", "model:\n  language_model:\n    arch:\n      layer: x\n", "model.language_model.arch: "),
        ("callback", CALLBACK.format("lit_edit.callbacks.LayerNorms", "evry: 2"), "'evry'"),
        ("logger", LOGGER.format("lit_edit.loggers.RunCSVLogger", "folder: x"), "has no setting folder"),
        ("callback-class", CALLBACK.format("lit_edit.callbacks.LayerNorm", ""), "no attribute 'LayerNorm'"),
        ("callback-of-editors", CALLBACK.format("lit_edit.editors.D4S", ""), "D4S does not correspond to a subclass"),
        ("callback-module", CALLBACK.format("no.such.Module", ""), "no.such.Module: No module named 'no'"),
        ("callback-null", "trainer:\n  callbacks:\n    - null\n", "trainer.callbacks: cannot be used"),
        ("callback-number", "trainer:\n  callbacks: 7\n", "trainer.callbacks: "),
        ("logger-class", LOGGER.format("lit_edit.loggers.Nope", ""), "lit_edit.loggers.Nope"),
        ("logger-number", "trainer:\n  logger: 7\n", "trainer.logger: "),
        ("every-zero", CALLBACK.format("lit_edit.callbacks.LayerNorms", "every: 0"), "LayerNorms: every must be at"),
        ("every-null", CALLBACK.format("lit_edit.callbacks.Retention", "every: null"), "Retention: every must be"),
        ("every-text", CALLBACK.format("lit_edit.callbacks.Retention", "every: often"), "every: expected int"),
        ("sample", CALLBACK.format("lit_edit.callbacks.Retention", "sample: -1"), "Retention: sample must not be"),
        ("refresh", CALLBACK.format("lit_edit.callbacks.EditProgressBar", "refresh_rate: -1"), "refresh_rate must"),
        ("keep", CALLBACK.format("lightning.pytorch.callbacks.ModelCheckpoint", "save_top_k: -5"), "save_top_k=-5"),
        ("save", CALLBACK.format("lightning.pytorch.callbacks.ModelCheckpoint", "every_n_train_steps: -5"), "steps=-5"),
        ("limit-text", "data:\n  limit: many\n", "data.limit: expected int; got many"),
        ("limit-date", "data:\n  limit: 2024-01-01\n", "data.limit: expected int"),
        ("limit-object", "data:\n  limit: {a: 1}\n", "data.limit: expected int"),
        ("path-list", "data:\n  path: [a, b]\n", "data.path: expected str"),
        ("layers-text", f"{D4S}layers: middle\n", "layers: expected Sequence"),
        ("steps-text", f"{D4S}target:\n        steps: few\n", "target.steps: expected int"),
        ("lr-text", f"{D4S}target:\n        lr: fast\n", "target.lr: expected float"),
        ("lr-null", f"{D4S}target:\n        lr: null\n", "lr"),
    ):  # fmt: skip
        yield BrokenConfig(f"setting-{name}", ("--config={folder}/own.yaml",), what, (("own.yaml", content.encode()),))


def config_overrides() -> Iterator[BrokenConfig]:
    """Settings on the command line."""
    for args, what in (
        ("--nonsense=3", "unrecognized arguments: --nonsense=3"),
        ("--data.nonsense=3", "there is no option --data.nonsense"),
        ("--model.nonsense=3", "there is no option --model.nonsense"),
        ("--trainer.nonsense=3", "there is no option --trainer.nonsense"),
        (f"{EDITOR}.nonsense=3", "has no setting nonsense; it has"),
        (f"{EDITOR}.target.nonsense=3", "--target.nonsense=3"),
        ("quickstart", "unrecognized arguments: quickstart"),
        ("--data.limit", "--data.limit: expected one argument"),
        ("--data.path=${nope}", "data.source"),
        ("--model.editor=17", "model.editor: "),
        ("--model.editor.class_path=lit_edit.editors.Nope", "there is no Nope in it"),
        ("--model.editor.class_path=no.such.Module", "model.editor: no.such.Module: No module named 'no'"),
        ("--model.editor.class_path=lit_edit.data.DataError", "does not correspond to a subclass of Editor"),
        ("--model.editor.class_path=lit_edit.data._private", "model.editor: "),
        ("--model.editor.class_path=", "model.editor: "),
        ("--model.editor.class_path=D5S", "model.editor: "),
        ("--model.measure_each=perhaps", "model.measure_each: expected bool; got perhaps"),
        ("--model.language_model.dtype=int8", "model.language_model.dtype: expected one of 'auto'"),
        ("--model.language_model.products=fast", "model.language_model.products: expected one of 'auto'"),
        (
            "--model.language_model.attn_implementation=flash",
            "model.language_model.attn_implementation: expected one of",
        ),
        ("--model.language_model.trust_remote_code=maybe", "model.language_model.trust_remote_code: expected bool"),
        ("--model.language_model.arch={family: mine}", "the following arguments are required: layers, down_proj"),
        (f"{EDITOR}.residual=most", "residual: expected one of 'shared', 'remeasured', 'uniform', 'root', 'ends'"),
        (f"{EDITOR}.contexts=some", "contexts: expected one of 'sampled', 'plain'"),
        (f"{EDITOR}.contexts=[]", "contexts must be groups"),
        (f"{EDITOR}.contexts=[['So: ']]", "a context template needs exactly one {}"),
        (f"{EDITOR}.contexts=[['So: {{}}']]", "the first context template must be the plain prompt"),
        (f"{EDITOR}.target.rule=sgd", "target.rule: expected one of 'adam', 'polyak'; got sgd"),
        (f"{EDITOR}.target.precision=int8", "target.precision: expected one of"),
        (f"{EDITOR}.storage.inverse=int8", "storage.inverse: expected one of"),
        (f"{EDITOR}.storage.offload=cloud", "storage.offload: expected one of"),
        (f"{EDITOR}.layers=[2,1]", "layers must be ascending, different and not negative, got [2, 1]"),
        (f"{EDITOR}.layers=[1,1]", "layers must be ascending, different and not negative, got [1, 1]"),
        (f"{EDITOR}.layers=[-1]", "layers must be ascending, different and not negative, got [-1]"),
        (f"{EDITOR}.layers=[]", "layers must be ascending, different and not negative, got []"),
        (f"{EDITOR}.layers=[1.5]", "layers: expected int; got 1.5"),
        (f"{EDITOR}.layers=[4]", "layer 4 does not exist: this model has layers 0 to 3"),
        (f"{EDITOR}.layers=[99999999999999999999]", "does not exist: this model has layers 0 to 3"),
        (f"{EDITOR}.target.loss_layer=99", "loss_layer 99 does not exist"),
        (f"{EDITOR}.target.loss_layer=-1", "loss_layer -1 does not exist"),
        (f"{EDITOR}.storage.offload=disk {EDITOR}.storage.folder={{folder}}/file/x", "file/x: Not a directory"),
        (f"{EDITOR}.contexts=sampled {EDITOR}.seed=99999999999999999999", "model.editor.init_args.seed"),
        ("--model.statistics.corpus=", "model.statistics.corpus='' is neither"),
        ("--model.statistics.corpus={folder}/gone.txt", "is neither 'sampled', nor an existing file"),
        ("--model.statistics.corpus={folder}", "is neither 'sampled', nor an existing file"),
        ("--model.statistics.corpus=owner/name", "hub data set 'owner/name'"),
        ("--model.statistics.cache={folder}/file/x", "file/x"),
        (
            "--model.statistics.cache=~nobody-of-that-name",
            "model.statistics.cache=~nobody-of-that-name: there is no such home",
        ),
        ("--data.source=excel", "data.source: expected one of 'builtin', 'file'"),
        ("--data.source=facts", "data.source=facts needs data.path"),
        ("--data.source=hub", "data.source=hub needs data.path"),
        ("--data.path=facts.csv", "data.path='facts.csv' needs data.source=file"),
        ("--data.source=hub --data.path=owner/name", "hub data set 'owner/name'"),
        ("--data.source=facts --data.path={folder}/gone.csv", "gone.csv: no such file"),
        ("--data.on_error=ignore", "data.on_error: expected one of 'raise', 'skip'"),
        ("--data.offset=9999", "no edits to make; nothing is left behind data.offset=9999"),
        ("--data.perplexity_path={folder}/gone.txt", "gone.txt: no such file"),
        ("--data.perplexity_path={folder}", "is a folder"),
        ("--data.perplexity_path=~nobody-of-that-name/x.txt", "data.perplexity_path=~nobody-of-that-name/x.txt"),
        ("--run_name=a/b", "--run_name 'a/b' must be a plain folder name"),
        ("--run_name=..", "--run_name '..' must be a plain folder name"),
        ("--run_name=", "--run_name '' must be a plain folder name"),
        (f"--run_name={'x' * 300}", "cannot be made: File name too long"),
        ("--runs_dir={folder}/file", "cannot be made: Not a directory"),
        ("--runs_dir=~nobody-of-that-name", "runs_dir=~nobody-of-that-name: there is no such home folder"),
        ("--overwrite=perhaps", "overwrite: expected bool"),
        ("--resume=perhaps", "resume: expected one of 'never', 'auto'"),
        ("--continue={folder}/gone", "there is no run folder"),
        ("--ckpt_path={folder}/gone.ckpt", "gone.ckpt: no such file"),
        ("--ckpt_path={folder}", "no such file"),
        ("--ckpt_path=", "--ckpt_path"),
        ("--ckpt_path=best", "--ckpt_path best: no such file"),
        ("--weights_only=perhaps", "weights_only: expected bool"),
        ("--seed_everything=many", "seed_everything: expected bool; expected int"),
        ("--seed_everything=-5", "seed_everything must be from 0 to 4294967295, got -5"),
        ("--seed_everything=99999999999", "seed_everything must be from 0 to 4294967295, got 99999999999"),
        ("--model.language_model.name=", "there is no model ''"),
        ("--model.language_model.name=no-such-model", "there is no model 'no-such-model'"),
        ("--model.language_model.name={folder}", "is no model folder: it holds no config.json"),
        ("--model.language_model.name=/etc/passwd", "there is no model '/etc/passwd'"),
        ("--model.language_model.name=owner/name", "the model 'owner/name' cannot be loaded"),
        ("--model.language_model.name=a/b/c", "the model 'a/b/c' cannot be loaded"),
        ("--model.language_model.name=~nobody-of-that-name/x", "there is no such home folder"),
    ):
        yield BrokenConfig(f"override-{args[:60]}", tuple(re.split(r" (?=--)", args)), what, (("file", b"x"),))
    for args, what in (
        ("--data.limit=0", "data.limit must be at least 1, got 0"),
        ("--ckpt_path=gone.ckpt", "--ckpt_path gone.ckpt: no such file"),
        ("--trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn"),
        ("--model.language_model.name=no-such-model", "there is no model 'no-such-model'"),
    ):
        for command in ("validate", "test"):
            yield BrokenConfig(f"{command}-{args}", (args,), what, command=command)


def config_numbers() -> Iterator[BrokenConfig]:
    """Every number out of its range, one after another: negative, zero where that is none, NaN and infinite."""
    wrong = {
        f"{EDITOR}.covariance_weight": ("-1", "0", ".nan", ".inf"),
        f"{EDITOR}.ridge": ("-1", ".nan"),
        f"{EDITOR}.context_count": ("-1", "0", "6", "1.5"),
        f"{EDITOR}.target.steps": ("-1", "0", "1.5", ".nan"),
        f"{EDITOR}.target.lr": ("-1", "0", ".nan", ".inf", "null"),
        f"{EDITOR}.target.weight_decay": ("-1", ".nan", ".inf"),
        f"{EDITOR}.target.clamp": ("-1", "0", ".nan"),
        f"{EDITOR}.target.kl_factor": ("-1", ".nan", ".inf"),
        f"{EDITOR}.target.loss_threshold": (".nan", ".inf", "-.inf"),
        f"{EDITOR}.target.probability": ("-0.1", "1", ".nan", ".inf"),
        f"{EDITOR}.target.trust": ("-1", "0", ".nan"),
        f"{EDITOR}.target.margin": ("-1", ".nan", ".inf"),
        "--model.statistics.tokens": ("-1", ".inf", "null"),
        "--data.limit": ("-1", "0", ".nan", "1.5", "true"),
        "--data.offset": ("-1", ".inf", "null"),
        "--data.batch_size": ("-1", "0", ".nan"),
        "--data.target_window": ("-1", "0", "1.5"),
        "--data.shuffle_seed": (".nan", "1.5"),
        "--trainer.max_epochs": ("-2", "many", "1.5"),
        "--trainer.max_steps": ("-2", ".nan"),
        "--trainer.min_epochs": ("-1",),
        "--trainer.min_steps": ("-1",),
        "--trainer.devices": ("0", "-1", "two", "[0,1]", "[]"),
        "--trainer.num_nodes": ("0", "-1"),
        "--trainer.limit_train_batches": ("-1", "0", "1.5", ".nan"),
        "--trainer.overfit_batches": ("-1", "1.5"),
        "--trainer.val_check_interval": ("-1", "1.5", "99"),
        "--trainer.check_val_every_n_epoch": ("-1", "0"),
        "--trainer.num_sanity_val_steps": ("-3",),
        "--trainer.log_every_n_steps": ("-1",),
        "--trainer.accumulate_grad_batches": ("-1", "0", "2"),
        "--trainer.gradient_clip_val": ("-1", "1"),
        "--trainer.reload_dataloaders_every_n_epochs": ("-1",),
        "--trainer.fast_dev_run": ("-1",),
    }
    for setting, values in wrong.items():
        for value in values:
            yield BrokenConfig(f"number-{setting[2:]}={value}", (f"{setting}={value}",), setting.rpartition(".")[2])


def config_trainers() -> Iterator[BrokenConfig]:
    """Trainers that this machine or a stream of edits does not have."""
    for setting, value, what in (
        ("precision", "nonsense", "trainer.precision: "),
        ("precision", "7", "trainer.precision: "),
        ("accelerator", "toaster", "accelerator='toaster'"),
        ("accelerator", "tpu", "accelerator='tpu'"),
        ("strategy", "nonsense", "trainer.strategy=nonsense"),
        ("strategy", "ddp_fork", "trainer.strategy=ddp_fork"),
        ("strategy", "fsdp", "trainer.strategy=fsdp"),
        ("strategy", "deepspeed", "trainer.strategy=deepspeed"),
        ("strategy", "ddp_spawn", "trainer.strategy=ddp_spawn"),
        ("max_time", "soon", "max_time='soon'"),
        ("max_time", "00:99", "max_time='00:99'"),
        ("gradient_clip_algorithm", "nonsense", "gradient_clip_algorithm"),
        ("deterministic", "perhaps", "trainer.deterministic: "),
        ("profiler", "nonsense", "profiler"),
        ("plugins", "nonsense", "trainer.plugins: "),
        ("enable_checkpointing", "perhaps", "trainer.enable_checkpointing: expected bool"),
        ("enable_checkpointing", "false", "enable_checkpointing"),
        ("inference_mode", "7", "trainer.inference_mode: expected bool"),
        ("barebones", "true", "barebones"),
        ("logger", "nonsense", "trainer.logger: "),
        ("callbacks", "nonsense", "trainer.callbacks: "),
    ):
        yield BrokenConfig(f"trainer-{setting}={value}", (f"--trainer.{setting}={value}",), what)


def config_models() -> Iterator[BrokenConfig]:
    """Folders of models that are damaged, and files of texts that are."""

    def copied(change: Callable[[Path], object]) -> Callable[[Path, Path], None]:
        def make(folder: Path, model: Path) -> None:
            change(Path(shutil.copytree(model, folder / "model")))

        return make

    def cut(name: str, size: int) -> Callable[[Path, Path], None]:
        return copied(lambda model: (model / name).write_bytes((model / name).read_bytes()[:size]))

    def gone(name: str) -> Callable[[Path, Path], None]:
        return copied(lambda model: (model / name).unlink())

    def deaf(prompt: str, subject: str, target: str) -> Callable[[Path, Path], None]:
        """A model whose tokenizer leaves snowmen out, and a fact with one."""

        def change(model: Path) -> None:
            state = json.loads((model / "tokenizer.json").read_text())
            state["normalizer"] = {"type": "Replace", "pattern": {"String": "☃"}, "content": ""}
            (model / "tokenizer.json").write_text(json.dumps(state))
            row = {"prompt": prompt, "subject": subject, "target_new": target}
            (model.parent / "facts.jsonl").write_text(as_jsonl([row]))

        return copied(change)

    name = ("--model.language_model.name={folder}/model",)
    own = (*name, "--data.source=facts", "--data.path={folder}/facts.jsonl")
    yield BrokenConfig("text-of-no-token", own, "makes no token of '☃'", make=deaf("Frosty is a", "Frosty", "☃"))
    lost = "no token covers the end of the subject 'Frosty ☃'"
    yield BrokenConfig("subject-of-no-token", own, lost, make=deaf("Frosty ☃ is a", "Frosty ☃", "snowman"))
    for case, make in (
        ("config-cut", cut("config.json", 40)),
        ("config-empty", cut("config.json", 0)),
        ("config-of-another-kind", copied(lambda model: (model / "config.json").write_text('{"model_type": "bread"}'))),
        ("weights-cut", cut("model.safetensors", 5000)),
        ("weights-empty", cut("model.safetensors", 0)),
        ("weights-gone", gone("model.safetensors")),
        ("tokenizer-cut", cut("tokenizer.json", 500)),
        ("tokenizer-gone", gone("tokenizer.json")),
    ):
        yield BrokenConfig(f"model-{case}", name, "cannot be loaded", make=make)
    for case, file, text, what in (
        ("empty", "a.txt", b"", "a.txt: holds no text"),
        ("one-word", "a.txt", b"Word\nWord\n", "a.txt: perplexity needs texts of two words"),
        ("latin-1", "a.txt", "Ein Satz.\nIn Zürich.\n".encode("latin-1"), "a.txt:2: not UTF-8"),
        ("jsonl", "a.jsonl", b'{"text": "One text."}\n{"text": ', "a.jsonl:2: bad JSON"),
        ("surrogate", "a.jsonl", b'{"text": "One text."}\n{"text": "half \\ud800"}\n', "a.jsonl:2: half a character"),
        ("json", "a.json", b'{"text": "One text."}', "a.json:1: expected a JSON list"),
        ("csv", "a.csv", b'text\nOne text.\n"Another', "a.csv:3: bad CSV"),
        ("other-field", "a.jsonl", b'{"body": "One text."}\n', "a.jsonl: holds no text"),
    ):
        args = (f"--data.perplexity_path={{folder}}/{file}",)
        yield BrokenConfig(f"texts-{case}", args, what, ((file, text),))


@cache
def broken_configs() -> tuple[BrokenConfig, ...]:
    """Return all broken configs."""
    groups = (config_files, config_places, config_settings, config_overrides, config_numbers, config_trainers)
    return tuple(case for group in (*groups, config_models) for case in group())
