"""The commands of `timm-nf` that use a network: classify, export, bench."""

from pathlib import Path
from typing import Annotated, Any

from .terminal import complain, console, examples, print_facts, print_table, track, typer

commands = typer.Typer()


@commands.command(
    epilog=examples("export nfnet_f0.dm_in1k -o f0.onnx --dynamic-batch", "export my_model/ -o my_model_fused/")
)
def export(
    model: Annotated[str, typer.Argument(help="As timm names it with its weights, or a folder in Hub layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File: .onnx, .pt2 or .ts (TorchScript); else a folder.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights instead of the published.", exists=True)] = None,
    license: Annotated[
        str | None, typer.Option(help="For a folder's card, as the Hub spells it; known for published weights.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width, by default as in training.")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Any number of images, not one.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Any height and width.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Bake standardised weights into plain convolutions and write the network for another run time.

    What was written is reloaded and compared with PyTorch on a photograph before it takes the file's name. A folder
    gets Hub layout (safetensors, config, card), which timm loads as the same architecture with `fused=True`.
    """
    from ..hub.folder import write_folder
    from ..inference import export as exporting
    from ..inference.classify import load_model
    from ..inference.fuse import fuse

    dtypes = {str(known).removeprefix("torch."): known for known in exporting.BOUNDS}
    if dtype not in dtypes:
        raise typer.BadParameter(f"expected --dtype {', '.join(dtypes)}, got {dtype}")
    to_folder = out.is_dir() or not out.suffix
    if not out.parent.is_dir() or not (to_folder or out.suffix in exporting.SUFFIXES):
        known = ", ".join(exporting.SUFFIXES)
        raise typer.BadParameter(
            f"expected for --out, in an existing folder, a file that ends in {known} or a folder, got {out}"
        )
    if to_folder and (size or dynamic_batch or dynamic_size):
        raise typer.BadParameter("a folder is for any number and size of images: no --size, no --dynamic-*")
    folder = Path(model).is_dir()
    if not folder and not exporting.is_known(model):
        raise typer.BadParameter(f"no network or folder is called {model!r}; `timm-nf list` shows ours")
    with console(stderr=True).status(f"loading {model}"):
        network: Any = load_model(f"local-dir:{model}" if folder else model, checkpoint)
    if to_folder:
        license = license or (None if folder or checkpoint else network.pretrained_cfg.get("license"))
        with console(stderr=True).status("fusing, writing, reading back"):
            written = write_folder(fuse(network), out, card={"license": license}, dtype=dtypes[dtype])
        rows = [*written.checks, *(("file", f"{name}, {size:,} bytes") for name, size in written.files.items())]
        print_facts([*rows, ("load it with", f'timm.create_model("local-dir:{out}", pretrained=True)')])
        return
    with console(stderr=True).status("exporting"):
        network = network if getattr(network, "fused", False) else fuse(network)
        checks = exporting.write(
            network, out, size=size, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size, dtype=dtypes[dtype]
        )
    print_table(("check", "measured"), [(check.name, check.measured) for check in checks])
    print_facts([("wrote", f"{out}, {out.stat().st_size / 1e6:.1f} MB, {exporting.SUFFIXES[out.suffix]}")])


@commands.command(epilog=examples("bench nfnet_f0", "bench nf_resnet50 --size 224 --batch 8 --json"))
def bench(
    model: Annotated[str, typer.Argument(help="One of our networks, or of timm's with standardised convolutions.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a run.")] = 1,
    size: Annotated[int, typer.Option(min=1, help="Their height and width.")] = 192,
    repeats: Annotated[int, typer.Option(min=3, help="Timed runs of each, in turn.")] = 11,
    device: Annotated[str | None, typer.Option(help="As torch names it; an accelerator if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time inference on this machine: timm's network, ours, fused, in bfloat16, compiled, and in onnxruntime."""
    import torch
    from timm.models import is_model

    from ..env import machine
    from ..inference.bench import contenders, time_inference

    if not is_model(model):
        raise typer.BadParameter(f"no network is called {model!r}; `timm-nf list` shows ours")
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    timings = time_inference(contenders(model, batch, size, device), repeats, device, track)
    first = next(iter(timings.values())).median
    if json:
        from dataclasses import asdict
        from json import dumps

        facts = {"model": model, "batch": batch, "size": size, "device": device, "machine": machine()}
        print(dumps(facts | {"milliseconds": {label: asdict(timing) for label, timing in timings.items()}}))
        return
    columns = ("", "median ms", "quartiles", f"ratio to {next(iter(timings))}")
    rows = [
        (n, f"{t.median:.1f}", f"{t.low:.1f} to {t.high:.1f}", f"{first / t.median:.2f}x") for n, t in timings.items()
    ]
    print_table(columns, rows, right=columns[1:])
    print_facts([("network", f"{model}, batch {batch}, {size} px, {device}"), ("machine", machine())])


@commands.command(
    epilog=examples("classify cat.jpg holiday/ --topk 3", "classify 7.png --model local-dir:demo_output/model")
)
def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files, or folders of them.")],
    model: Annotated[str, typer.Option(help="As timm names it: also hf-hub:USER/REPO, local-dir:FOLDER.")] = (
        "nfnet_f0.dm_in1k"
    ),
    checkpoint: Annotated[Path | None, typer.Option(help="File of weights instead of the published ones.")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes to show of each picture.")] = 5,
    device: Annotated[str, typer.Option(help="Where to run, as torch names it.")] = "cpu",
) -> None:
    """Classify pictures.

    A picture that cannot be read is reported on stderr and the others go on; the exit code is then 1.
    """
    from ..inference.classify import classify, load_model
    from ..inference.images import find_images

    paths = find_images(images)
    with console(stderr=True).status(f"loading {model}"):
        network = load_model(model, checkpoint)
    failed = 0
    for prediction in classify(network, paths, topk, device):
        if prediction.error is not None:
            failed += 1
            complain(f"{prediction.path}: {prediction.error}")
            continue
        console().print(str(prediction.path), style="bold", soft_wrap=True)
        for label, probability in prediction.classes:
            console().print(f"  {100 * probability:5.1f} %  {label}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)
