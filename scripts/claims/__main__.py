"""The paper's claims, re-run on Fashion-MNIST with small networks: runs to a CSV, figures and docs/claims.md from it.

python -m scripts.claims            # the runs that are missing in docs/claims/runs.csv; may be stopped and restarted
python -m scripts.claims --report   # docs/claims.md and its figures from the rows
python -m scripts.claims --quick    # one seed of the first rows, compared with the committed ones: `make claims-quick`
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
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from scripts.claims.figures import ABOUT, draw
from scripts.claims.grid import Rows, plan
from scripts.claims.grid import quick as quick_runs
from scripts.claims.page import page
from scripts.claims.report import FLOOR, SPREADS, Cell, cell
from scripts.claims.training import Result, Run, load, train

FOLDER = Path(__file__).parents[2] / "docs" / "claims"
CSV = FOLDER / "runs.csv"


def read(file: Path) -> Rows:
    """The runs of a CSV with their results; none if there is no such file."""
    if not file.exists():
        return {}

    def typed(kind: Any, row: dict[str, str]) -> Any:
        return kind(**{field.name: field.type(row[field.name]) for field in fields(kind)})

    with file.open(newline="") as lines:
        return {typed(Run, row): typed(Result, row) for row in csv.DictReader(lines)}


def write(file: Path, rows: Rows) -> None:
    """All rows, in the order of the table; a reader sees the old file or the new one, never half of it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for kind in (Run, Result) for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) | asdict(result) for run, result in rows.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    os.replace(temporary, file)


def run_missing(runs: Sequence[Run], file: Path, pool: Any, title: str) -> Rows:
    """Run what has no row, two at a time, and write a row as soon as there is one.

    Args:
        runs: In their order.
        file: CSV that holds the rows.
        pool: Executor of the runs.
        title: Of the progress bar.
    """
    rows = read(file)
    running: dict[Future[Result], Run] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(title)
        while True:
            progress.update(bar, total=len(runs), completed=sum(run in rows for run in runs))
            waiting = [run for run in runs if run not in rows and run not in running.values()]
            running |= {pool.submit(train, run): run for run in waiting[: 2 - len(running)]}
            if not running:
                return rows
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                rows[running.pop(future)] = future.result()
                write(file, rows)


def train_with(runs: Sequence[Run], file: Path, title: str) -> Rows:
    """`run_missing` in two processes of one thread each.

    Raises:
        FileNotFoundError: there is no data.
    """
    torch.set_num_threads(1)  # before the processes are forked, which cannot use a thread pool of their parent
    load(train=True), load(train=False)  # the processes inherit them
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        return run_missing(runs, file, pool, title)


def compare(committed: Rows, now: Rows) -> list[tuple[Run, Cell | None, float, bool]]:
    """Each run of `now` with the committed mean over seeds, what it gave, and whether it is within three spreads."""
    found = []
    for run, result in now.items():
        before = cell(committed, run)
        allowed = SPREADS * max(before.spread, FLOOR) if before else 0.0
        found.append(
            (run, before, result.accuracy, before is not None and abs(result.accuracy - before.mean) <= allowed)
        )
    return found


def quick(committed: Rows) -> int:
    """One seed of the first rows of claims 1 and 2 against the committed ones: 0, or 1 where one is too far off."""
    with tempfile.TemporaryDirectory() as folder:
        now = train_with(quick_runs(), Path(folder) / "runs.csv", "claims 1 and 2, one seed")
    table = Table(
        "network", "clip factor", "batch", "committed", "now", f"within {SPREADS} spreads", title="test accuracy, %"
    )
    compared = compare(committed, now)
    for run, before, accuracy, within in compared:
        factor = f"{run.factor}" if run.clip == "unit" else "not clipped"
        table.add_row(run.net, factor, str(run.batch), str(before), f"{accuracy:.1f}", "yes" if within else "NO")
    Console().print(table)
    return int(not all(within for *_, within in compared))


def report(rows: Rows) -> None:
    """Write docs/claims.md and its figures."""
    (FOLDER.parent / "claims.md").write_text(page(rows))
    for index, (name, (plot, title, text)) in enumerate(ABOUT.items(), 1):
        draw(rows, plot, title, text, FOLDER / f"{index}_{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="compare a few runs with the rows; exit 1 if one is off")
    what.add_argument("--report", action="store_true", help="write docs/claims.md and the figures from the rows")
    parser.add_argument("--csv", type=Path, default=CSV, help="the rows, by default docs/claims/runs.csv")
    args = parser.parse_args()
    rows = read(args.csv)
    if not rows and (args.quick or args.report):
        print(f"expected rows in {args.csv}; python -m scripts.claims makes them", file=sys.stderr)
        return 1
    try:
        if args.quick:
            return quick(rows)
        if args.report:
            report(rows)
        else:
            train_with(plan(), args.csv, "runs")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
