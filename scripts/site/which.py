"""Write the table of docs/concepts/which.md: python -m scripts.site.which

Parameters and multiply-adds are computed. Memory is counted on meta tensors, as in benchmarks/counts.py. Accuracies
are read from MODEL_CARD.md.
"""

from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks import counts
from timm_nf.variants import VARIANTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "concepts" / "which.md"
START, END = "<!-- written by python -m scripts.site.which -->\n", "<!-- end of what it writes -->\n"
BATCH = 32
NAMES = (
    *(f"nfnet_f{i}" for i in range(7)), *(f"dm_nf_resnet{depth}" for depth in (50, 101, 152)),
    *(f"dm_nf_regnet_b{i}" for i in range(6)),
)  # fmt: skip
COLUMNS = (
    "network", "train / test px", "parameters, M", "multiply-adds, G", "top-1 %, paper", "top-1 %, timm",
    "memory of state, GB", f"saved for backward, batch {BATCH}, GB",
)  # fmt: skip


def quoted(label: str) -> dict[str, str]:
    """The rows of MODEL_CARD.md's table of accuracies, by network."""
    text = (ROOT / "MODEL_CARD.md").read_text()
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]
    header = next(line for line in lines if line[:2] == ["F0", "F1"])
    row = next(line for line in lines if line[0].startswith(label))
    return {f"nfnet_{name.lower()}": value for name, value in zip(header, row[1:], strict=True)}


def table() -> str:
    paper, timm = quoted("top-1 % in the paper"), quoted("top-1 % of these files")
    lines = [" | ".join(COLUMNS), "--- | --- " + "| --: " * (len(COLUMNS) - 2)]
    for name in track(NAMES, "counting", console=Console(stderr=True), transient=True):
        row = VARIANTS[name]
        parameters, macs = row.cfg.count(row.train_size)
        state = 3 * 4 * parameters / 1e9  # weights, gradients and momentum in float32
        saved = counts.step(name, BATCH, half=True, size=row.train_size).saved / 1e9
        lines.append(
            f"`{name}` | {row.train_size} / {row.test_size} | {parameters / 1e6:.1f} | {macs / 1e9:.2f} | "
            f"{paper.get(name, '-')} | {timm.get(name, '-')} | {state:.1f} | {saved:.1f}"
        )
    return "".join(f"| {line.strip()} |\n" for line in lines).replace("| |", "|")


def main() -> None:
    page = PAGE.read_text()
    before, after = page.index(START) + len(START), page.index(END)
    PAGE.write_text(f"{page[:before]}\n{table()}\n{page[after:]}")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
