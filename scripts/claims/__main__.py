"""Tests the paper's claims on Fashion-MNIST with small networks, as docs/claims/plan.md says: runs, page, figures.

python -m scripts.claims            # makes the runs that docs/claims/runs.csv lacks; can be stopped and restarted
python -m scripts.claims --report   # writes docs/claims.md and its figures from the rows
python -m scripts.claims --quick    # decides three parts in minutes: `make claims-quick`
python -m scripts.claims --plan     # prints phases, runs, expected time, and which differences the rule finds
"""

import argparse
import csv
import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from scripts.claims.grid import (
    BATCHES,
    EXPLORED,
    PHASES,
    QUICK_PHASES,
    Phase,
    Rows,
    cost,
    next_runs,
    paired_spread,
    planned,
)
from scripts.claims.markdown import table
from scripts.claims.page import write_page
from scripts.claims.parts import quick as quick_parts
from scripts.claims.rule import power_table
from scripts.claims.training import Result, Run, load, train

FOLDER = Path(__file__).parents[2] / "docs" / "claims"
CSV = FOLDER / "runs.csv"


def read(file: Path) -> Rows:
    """Read the runs and their results from a CSV file. If there is no such file, there are none."""
    if not file.exists():
        return {}

    def typed(kind: Any, row: dict[str, str]) -> Any:
        return kind(**{field.name: field.type(row[field.name]) for field in fields(kind)})

    with file.open(encoding="utf-8", newline="") as lines:
        return {typed(Run, row): typed(Result, row) for row in csv.DictReader(lines)}


def write(file: Path, rows: Rows) -> None:
    """Write all rows in the order in which they were made. A reader never sees a part of the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for kind in (Run, Result) for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(run) | vars(result) for run, result in rows.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    os.replace(temporary, file)


def run_missing(phases: Sequence[Phase], file: Path, pool: Any, processes: int) -> Rows:
    """Make the runs without a row, phase by phase, and write the rows after every run.

    Progress is in expected processor seconds. Runs whose settings depend on other runs are counted, too.

    Args:
        phases: The phases, in their order.
        file: The CSV file of the rows.
        pool: The executor that makes the runs.
        processes: Number of runs at a time.
    """
    rows = read(file)
    running: dict[Future[Result], Run] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[runs]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as progress:
        bar = progress.add_task("runs", runs="", start=True)
        while True:
            phase, missing = next_runs(rows, phases)
            everything = planned(rows, phases)
            done = [run for run in everything if run in rows]
            count = f"{len(done)} of about {len(everything)} runs"
            progress.update(
                bar, description=phase or "done", runs=count, total=sum(map(cost, everything)),
                completed=sum(map(cost, done)),
            )  # fmt: skip
            waiting = [run for run in missing if run not in running.values()]
            running |= {pool.submit(train, run): run for run in waiting[: processes - len(running)]}
            if not running:
                return rows
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                rows[run] = future.result()
                write(file, rows)
                name = " ".join(str(v) for v in (run.net, run.depths, run.clip, run.factor) if v != "none")
                left = sum(cost(run) for run in everything if run not in rows) / 3600
                console.print(
                    f"{phase} | {count} | {name}, batch {run.batch}, rate {run.lr:g}, seed {run.seed}: "
                    f"{rows[run].accuracy:.1f} % in {rows[run].seconds:.0f} s | about {left:.1f} processor hours left",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip


def train_with(phases: Sequence[Phase], file: Path, processes: int) -> Rows:
    """`run_missing` in processes of one thread each.

    Raises:
        FileNotFoundError: if the data set is missing.
    """
    torch.set_num_threads(1)  # before forking: the processes could not use this process's threads
    load(train=True), load(train=False)  # read once, the processes inherit both
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        return run_missing(phases, file, pool, processes)


def quick(processes: int) -> int:
    """Decide three parts by new runs. The exit code is 1 if one of them does not hold, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        rows = train_with(QUICK_PHASES, Path(folder) / "runs.csv", processes)
    shown = Table("part", "difference, points", "verdict", title="test accuracy, three seeds each")
    verdicts = [(part.statement, *part.verdict(rows)) for part in quick_parts(rows)]
    for verdict in verdicts:
        shown.add_row(*verdict)
    Console().print(shown)
    return int(not all(verdict == "**holds**" for *_, verdict in verdicts))


def expected(rows: Rows) -> str:
    """A Markdown table of the phases, with their runs and their expected processor time."""
    seen: set[Run] = set()
    lines = []
    for phase in PHASES:
        new = [run for run in dict.fromkeys(phase.runs(rows)) if run not in seen]
        seen |= set(new)
        lines.append([phase.name, len(new), f"{sum(map(cost, new)) / 60:.0f}"])
    total = ["all", len(seen), f"{sum(map(cost, seen)) / 60:.0f}"]
    return table(["phase", "runs", "expected minutes of processor time"], [*lines, total])


def powers(rows: Rows) -> str:
    """A table of what the rule finds for known differences: % of simulated experiments, holds / does not hold."""
    return power_table({f"batch {b}": paired_spread(rows, b) for b in (BATCHES[0], BATCHES[2], BATCHES[-1])}, table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="decide three parts; exit 1 if one does not hold")
    what.add_argument("--report", action="store_true", help="write docs/claims.md and the figures from the rows")
    what.add_argument("--plan", action="store_true", help="print phases, times and the differences that the rule finds")
    parser.add_argument("--csv", type=Path, default=CSV, help="the rows, by default docs/claims/runs.csv")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    rows = read(args.csv)
    if not rows and (args.plan or args.report):
        print(f"expected rows in {args.csv}; python -m scripts.claims makes them", file=sys.stderr)
        return 1
    try:
        if args.plan:
            print(expected({}), powers(rows), sep="\n\n")
        elif args.quick:
            return quick(args.processes)
        elif args.report:
            write_page(rows, FOLDER)
        else:
            train_with((*PHASES, *EXPLORED), args.csv, args.processes)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
