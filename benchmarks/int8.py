"""Compare int8 networks with float32, also with more types of nodes than convolutions in int8. It takes minutes.

    python -m benchmarks.int8 [--write] [--pictures 160]

With --write the tables go into docs/performance.md, between the two comments that name this file.

This repository has no weights. NFNet-F0 and NF-ResNet-50 get the synthetic parameters of the golden files. Their
classes mean nothing, but gains and skip gains are not 0. Their pictures are crops of three photographs that come with
matplotlib and scikit-learn. The third network is the demo's: it was trained on digits, and is compared on other digits.
"""

import argparse
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from rich.console import Console
from rich.progress import track as rich_track
from sklearn.datasets import load_sample_images
from torch import nn

import timm_nf
from timm_nf import demo
from timm_nf.env import machine
from timm_nf.inference import int8
from timm_nf.inference.int8 import QUANTIZED, Comparison
from timm_nf.verify.golden import golden_model

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- written by python -m benchmarks.int8 --write -->\n", "<!-- end of what it writes -->"
ELSE: dict[str, tuple[str, ...]] = {
    "convolutions": QUANTIZED,
    "and the classifier (`Gemm`)": (*QUANTIZED, "Gemm"),
    "and all that onnxruntime has": (*QUANTIZED, "Gemm", "Add", "Mul", "Sigmoid", "AveragePool", "MaxPool", "Pad"),
}


def track(items: Iterable[Any], description: str) -> Iterable[Any]:
    return rich_track(items, description, console=Console(stderr=True))


def crops(folder: Path, count: int) -> list[Path]:
    """Square crops of three photographs."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as portrait:
        photographs = [portrait.convert("RGB"), *map(Image.fromarray, load_sample_images().images)]
    draw = random.Random(0)
    files = []
    for i in range(count):
        whole = photographs[i % len(photographs)]
        side = draw.randint(128, min(whole.size))
        left, top = draw.randint(0, whole.width - side), draw.randint(0, whole.height - side)
        files.append(folder / f"{i:04}.png")
        whole.crop((left, top, left + side, top + side)).resize((256, 256)).save(files[-1])
    return files


def trained_on_digits(folder: Path) -> tuple[nn.Module, list[Path]]:
    """The demo's network, and the digits that were held out of its training."""
    facts = demo.run(folder / "demo", track=track)
    model = timm.create_model(f"local-dir:{facts.model_dir}", pretrained=True).eval()
    pixels, labels = demo.load_digits()
    held_out = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: facts.held_out_images]
    files = []
    for i in held_out.tolist():
        files.append(folder / f"{i:04}.png")
        Image.fromarray(pixels[i, 0].numpy()).save(files[-1])
    return model, files


def networks(folder: Path, count: int) -> Iterator[tuple[str, nn.Module, list[Path]]]:
    pictures = crops(folder, count)
    yield "NFNet-F0, golden parameters, 192 px", golden_model("nfnet_f0").float(), pictures
    yield "NF-ResNet-50, golden parameters, 224 px", golden_model("dm_nf_resnet50").float(), pictures
    (folder / "digits").mkdir()
    yield "the demo's network, trained, 28 px", *trained_on_digits(folder / "digits")


def cells(found: Comparison) -> list[str]:
    ratio = found.float_milliseconds / found.milliseconds
    return [
        f"{found.calibrated} / {found.compared}",
        f"{100 * found.same_class:.1f} %",
        f"{100 * found.error:.1f} %",
        f"{found.size / 1e6:.1f} / {found.float_size / 1e6:.1f} MB",
        f"{found.milliseconds:.1f} / {found.float_milliseconds:.1f} ms, {ratio:.1f}x",
    ]


def table(header: list[str], body: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body])


def tables(count: int) -> str:
    columns = ["calibrated / compared", "same best class", "logits", "size, int8 / float32", "time, int8 / float32"]
    rows, others = [], []
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name, "m.onnx")
        for label, model, pictures in networks(folder, count):
            fused = timm_nf.fuse(model)
            found = int8.write(fused, pictures, file, progress=track)
            rows.append([label, *cells(found)])
            kept = f"{label}: {', '.join(found.kept)} stay float32."
            if label.startswith("NFNet"):
                first = kept
                for what, op_types in ELSE.items():
                    if op_types != QUANTIZED:
                        found = int8.write(fused, pictures, file, op_types=op_types, progress=track)
                    others.append([what, *cells(found)[1:]])
    return TEXT.format(
        rows=table(["network", *columns], rows),
        others=table(["quantised", *columns[1:]], others),
        kept=first,
        machine=machine(),
        threads=torch.get_num_threads(),
    )


TEXT = """
{rows}

The columns *same best class* and *logits* (relative L2 error) compare with the float32 ONNX file, on the pictures that
were not used for calibration. The golden parameters are synthetic, with gains and skip gains that are not 0: they show
what rounding does to a network in which every part matters, and nothing about ImageNet. Times are medians for one
picture. The two times of a row were taken in turn, on a machine that did other work as well, so other rows do not
compare with them. The demo's small network gets slower.

What else could be in int8, NFNet-F0:

{others}

Quantising more than the convolutions gained little or no time, and the error of the logits grew. The best classes of so
few pictures decide nothing. So only convolutions are quantised, with those of squeeze-excite. Weights are int8, with a
scale for each output channel. Activations are uint8, with one scale for a tensor, from the smallest to the largest
value seen.

{kept}

{machine}, onnxruntime with {threads} threads.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--pictures", type=int, default=75, help="crops of photographs")
    arguments = parser.parse_args()
    text = tables(arguments.pictures)
    print(text)
    if arguments.write:
        before, rest = PAGE.read_text().split(START)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{START}{text}\n{END}{after}")


if __name__ == "__main__":
    main()
