import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_has_every_row_of_the_table_of_differences():
    rows = runpy.run_path(str(ROOT / "scripts" / "differences.py"))["ROWS"]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) >= 8
    assert not [what for what in rows if f"| {what} | " not in readme]
