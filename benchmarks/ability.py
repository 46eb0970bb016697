"""General ability of an unedited model, as docs/ability.md quotes it.

python benchmarks/ability.py --folder FOLDER --shots 0 --limit 60
"""

from __future__ import annotations

from time import perf_counter

import torch
from common import add_model, load_model, make_parser, write_result

from lit_edit.ability.files import load_task
from lit_edit.ability.measure import measure_task
from lit_edit.ability.tasks import all_tasks, find_tasks


def interval(record: dict, name: str) -> str:
    return f"{record[name]:.2f} [{record[f'{name}_low']:.2f}, {record[f'{name}_high']:.2f}]"


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument("--folder", default=None, help="a file per task; by default from the hub")
    parser.add_argument("--tasks", nargs="+", default=list(all_tasks()))
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--likelihood", action="store_true", help="do not let the model answer freely: half the time")
    options = parser.parse_args()
    tasks = [load_task(task, options.folder) for task in find_tasks(options.tasks)]
    adapter, tokenizer = load_model(options.model)
    print(f"{options.model}, {options.shots} shots, {options.limit} items a task, {torch.get_num_threads()} threads")
    print("| task | accuracy | F1 | MCC | said: accuracy | unparsable | always the same | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    records = []
    for data in tasks:
        start = perf_counter()
        record = measure_task(adapter, tokenizer, data, options.shots, options.limit, not options.likelihood)
        records.append(record)
        by, said = record["likelihood"], record.get("generation")
        answered = f"{interval(said, 'accuracy')} | {said['unparsable']} of {record['items']}" if said else "– | –"
        print(
            f"| {data.task.name} | {interval(by, 'accuracy')} | {interval(by, 'f1')} | {interval(by, 'mcc')} | "
            f"{answered} | {record['majority']:.2f} | {perf_counter() - start:.0f} |",
            flush=True,
        )
    write_result(options.json, records)


if __name__ == "__main__":
    main()
