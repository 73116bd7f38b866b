"""The probes: one function for each tool, which runs in the tool's environment.

    python -m scripts.check_tools.probes NAME

prints the tool's versions and its rows of the page, as one line of JSON. A probe makes the same calls with a network
with standardised weights and with the fused network. The verdict follows from both results. Every function imports its
tool.
"""

import contextlib
import copy
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_nf
from timm_nf._relative_error import relative_error
from timm_nf.env import machine

from .environments import MARK, Outcome

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "channels": (32, 64, 64, 64), "num_classes": 10}
EXACT = 1e-4  # relative error of float32 rounding, at most
QUANTISED = 0.15  # relative error of 8 bit weights and activations in a random network, at most


class Probe(NamedTuple):
    """A tool: its name on the page, its requirements for pip, and the function that tries it."""

    title: str
    requirements: tuple[str, ...]
    run: Callable[[], list[Outcome]]


class Measured(NamedTuple):
    """The result of a call in words, and whether it is right."""

    ok: bool
    text: str


PROBES: dict[str, Probe] = {}


def probe(title: str, *requirements: str) -> Callable[[Callable[[], list[Outcome]]], Callable[[], list[Outcome]]]:
    """Register a function in `PROBES` under its name."""

    def register(function: Callable[[], list[Outcome]]) -> Callable[[], list[Outcome]]:
        PROBES[function.__name__] = Probe(title, requirements, function)
        return function

    return register


# -- the network and the truth about it --------------------------------------------------------------------------------


def wake(model: nn.Module) -> nn.Module:
    """Set skip gains and classifier to values other than 0, as after training. Switch to evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("skipinit_gain"):
                p.fill_(0.5)
            elif name.endswith(("head.fc.weight", ".bias")):
                p.normal_(0, 0.1, generator=generator)
    return model.eval()


def network(name: str = "nfnet_f0", **kwargs: Any) -> Any:
    """A small network."""
    torch.manual_seed(0)
    fields = SMALL | kwargs
    if name.startswith("nfnet"):
        fields.setdefault("group_size", 16)
    return wake(timm.create_model(name, **fields))


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def truth(model: Any, x: Tensor | None = None) -> Tensor:
    """The logits in float64, computed in eager mode."""
    x = images() if x is None else x
    with torch.no_grad():
        return double(model)(x.double())


def error(got: Any, expected: Tensor) -> float:
    """Relative L2 error of a tensor, an array or a list."""
    return relative_error(torch.as_tensor(got), expected)


def off(value: float, bound: float = EXACT) -> Measured:
    """The error, and whether it is within the bound."""
    if value == 0:
        text = "equal"
    elif value < 0.01:
        text = f"{value:.0e}"
    else:
        text = f"{100 * value:.0f} % off"
    return Measured(value <= bound, text)


def share(value: float, of: float, what: str) -> Measured:
    """Part of a whole that should be all of it."""
    return Measured(abs(value / of - 1) < 0.02, f"{100 * value / of:.0f} % of the {what}")


def attempt(measure: Callable[[Any], Measured], model: Any) -> Measured:
    """The result of `measure`, or its exception in one line."""
    try:
        return measure(model)
    except Exception as raised:  # the tools have no common type of error
        line = " ".join(str(raised).split())
        short = line if len(line) <= 150 else f"{line[:147]}..."
        return Measured(False, f"{type(raised).__name__}: {short}")


def both(what: str, measure: Callable[[Any], Measured], create: Callable[[], Any] = network) -> Outcome:
    """Measure the network and the fused network."""
    unfused, fused = attempt(measure, create()), attempt(measure, timm_nf.fuse(create()))
    if unfused.ok:
        verdict = "as it is"
    elif fused.ok:
        verdict = "fuse first"
    else:
        verdict = "not"
    second = "the same" if fused.text == unfused.text else fused.text
    return Outcome(what, verdict, f"{unfused.text}; fused: {second}")


def alone(what: str, measure: Callable[[Any], Measured], create: Callable[[], Any] = network) -> Outcome:
    """Measure the network alone. The tool builds it by name, so it cannot be fused."""
    found = attempt(measure, create())
    return Outcome(what, "as it is" if found.ok else "not", found.text)


def multiply_adds() -> float:
    """Of one image through the small network, by torch's own counter."""
    model = timm_nf.fuse(network())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1))
    return counter.get_total_flops() / 2


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run_onnx(file: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


# -- torch and torchvision ---------------------------------------------------------------------------------------------


@probe("torch")
def torch_itself() -> list[Outcome]:
    def trace(model: Any) -> Measured:
        return off(error(torch.jit.trace(model, images())(images()), truth(model)))

    def saved_trace(model: Any) -> Measured:
        with folder() as place:
            torch.jit.trace(model, images()).save(place / "m.pt")
            return off(error(torch.jit.load(place / "m.pt")(images()), truth(model)))

    def saved_script(model: Any) -> Measured:
        with folder() as place:
            torch.jit.script(model).save(place / "m.pt")
            return off(error(torch.jit.load(place / "m.pt")(images()), truth(model)))

    def export(model: Any) -> Measured:
        return off(error(torch.export.export(model, (images(),)).module()(images()), truth(model)))

    def onnx(model: Any) -> Measured:
        with folder() as place, contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(model, (images(),), str(place / "m.onnx"), dynamo=False)
            return off(error(run_onnx(place / "m.onnx", images()), truth(model)))

    def prune(model: Any) -> Measured:
        from torch.nn.utils import prune as pruning

        convs = [module for name, module in model.named_modules() if name.startswith("stages") and is_conv(module)]
        for conv in convs:
            pruning.l1_unstructured(conv, "weight", 0.5)
            pruning.remove(conv, "weight")
        plain = model if getattr(model, "fused", False) else timm_nf.fuse(model)
        weights = [m.weight for name, m in plain.named_modules() if name.startswith("stages") and is_conv(m)]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        return Measured(zeros > 0.49, f"{100 * zeros:.0f} % zeros where 50 % were pruned")

    def fx_mode(model: Any) -> Measured:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images(),))
        prepared(images(8))
        return off(error(convert_fx(prepared)(images()), truth(model)), QUANTISED)

    return [
        both("`torch.jit.trace(model, x)`", trace),
        both("`torch.jit.trace(model, x).save(file)`", saved_trace),
        both("`torch.jit.script(model).save(file)`", saved_script),
        both("`torch.export.export`", export),
        both("`torch.onnx.export(..., dynamo=False)`, onnxruntime", onnx),
        both("`torch.nn.utils.prune`", prune),
        both("`torch.ao.quantization`, FX mode, int8", fx_mode),
    ]


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.weight[0].numel() > 1


@probe("torchvision")
def torchvision() -> list[Outcome]:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.ops import FeaturePyramidNetwork

    def features(model: Any) -> Measured:
        with torch.no_grad():
            extractor = create_feature_extractor(model, {"stages.0.0.conv1": "out", "stages.1": "stage"})
            got = extractor(images())
        kept: list[Tensor] = []
        reference = double(model)
        reference.stages[0][0].conv1.register_forward_hook(lambda module, args, out: kept.append(out.clone()))
        reference.stages[1].register_forward_hook(lambda module, args, out: kept.append(out.clone()))
        reference(images().double())
        return off(max(error(got["out"], kept[0]), error(got["stage"], kept[1])))

    class Pyramid(nn.Module):
        out_channels = 32

        def __init__(self, body: Any) -> None:
            super().__init__()
            self.body, self.fpn = body, FeaturePyramidNetwork(body.feature_info.channels()[2:], 32)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return self.fpn({str(i): out for i, out in enumerate(self.body(x)[2:])})

    def detector(body: Any) -> Measured:
        torch.manual_seed(0)
        anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
        model = FasterRCNN(Pyramid(body), 3, min_size=128, max_size=128, rpn_anchor_generator=anchors).train()
        target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
        losses: Any = sum(model([images(1, 128)[0]], [target]).values())
        losses.backward()
        finite = all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())
        return Measured(bool(losses.isfinite()) and finite, f"loss {float(losses):.1f}, a gradient everywhere")

    def body() -> Any:
        return wake(timm.create_model("nfnet_f0", features_only=True, **(SMALL | {"group_size": 16})))

    return [
        both("`create_feature_extractor` under `no_grad`", features),
        both("`FasterRCNN`, FPN on `features_only`, a training step", detector, body),
    ]


# -- loading, offloading, adapting -------------------------------------------------------------------------------------


@probe("accelerate", "accelerate")
def accelerate() -> list[Outcome]:
    import accelerate as tool

    def cpu(model: Any) -> Measured:
        want = truth(model)
        with torch.no_grad():
            return off(error(tool.cpu_offload(model, execution_device=torch.device("cpu"))(images()), want))

    def disk(model: Any) -> Measured:
        want = truth(model)
        with folder() as place, torch.no_grad():
            offloaded = tool.disk_offload(model, str(place), execution_device=torch.device("cpu"))
            return off(error(offloaded(images()), want))

    def places() -> dict[str, str]:
        names = [name for name, _ in network().named_children()]
        return {name: "disk" if name == "stages" else "cpu" for name in names}

    def dispatch(model: Any) -> Measured:
        want = truth(model)
        with folder() as place, torch.no_grad():
            placed = tool.dispatch_model(model, places(), main_device="cpu", offload_dir=str(place))
            return off(error(placed(images()), want))

    def load(model: Any) -> Measured:
        from safetensors.torch import save_file

        want = truth(model)
        with folder() as place, torch.no_grad():
            save_file(model.state_dict(), place / "m.safetensors")
            with tool.init_empty_weights():
                empty = network()
                empty = timm_nf.fuse(empty) if getattr(model, "fused", False) else empty
            loaded = tool.load_checkpoint_and_dispatch(
                empty, str(place / "m.safetensors"), places(), offload_folder=str(place / "offloaded")
            )
            return off(error(loaded.eval()(images()), want))

    return [
        both("`cpu_offload`", cpu),
        both("`disk_offload`", disk),
        both("`dispatch_model`", dispatch),
        both("`load_checkpoint_and_dispatch`", load),
    ]


ADAPTED = r"stages\.\d+\.\d+\.(conv1|conv3|downsample\.conv)"


@probe("PEFT", "peft", "accelerate")
def peft() -> list[Outcome]:
    import peft as tool

    def adapted(model: Any, config: Any) -> tuple[Any, float, float]:
        """The adapted network, how much merging is off, and that over what the adapter changed."""
        base = truth(model)
        torch.manual_seed(2)
        changed = tool.get_peft_model(copy.deepcopy(model), config).eval()
        want = truth(changed)
        merged = truth(copy.deepcopy(changed).merge_and_unload())
        return changed, error(merged, want), float((merged - want).norm() / (want - base).norm())

    def merge(config: Any) -> Callable[[Any], Measured]:
        def measure(model: Any) -> Measured:
            _, whole, part = adapted(model, config)
            if whole <= EXACT:
                return Measured(True, f"merged: {whole:.0e}")
            return Measured(False, f"merged: {100 * part:.0f} % of the adaptation lost")

        return measure

    def round_trip(config: Any) -> Callable[[Any], Measured]:
        def measure(model: Any) -> Measured:
            changed, merged, _ = adapted(model, config)
            with folder() as place:
                changed.save_pretrained(str(place))
                loaded = tool.PeftModel.from_pretrained(copy.deepcopy(model), str(place)).eval()
            return off(max(merged, error(loaded.merge_and_unload()(images()), truth(changed))))

        return measure

    def linear() -> Any:
        torch.manual_seed(0)
        layers = nn.Flatten(), timm_nf.layers.ScaledStdLinear(3 * 64 * 64, 16), nn.ReLU(), nn.Linear(16, 10)
        return nn.Sequential(*layers).eval()

    common = {"target_modules": ADAPTED}
    lora: Any = {"r": 4, "init_lora_weights": False, **common}
    strided = tool.LoraConfig(**lora | {"target_modules": r"stem\.conv[14]"})
    return [
        both("LoRA: adapt, save, load, merge", round_trip(tool.LoraConfig(**lora))),
        both("LoRA on strided SAME convolutions", round_trip(strided)),
        both("DoRA: adapt, save, load, merge", round_trip(tool.LoraConfig(use_dora=True, **lora))),
        both("LoRA on `ScaledStdLinear`", merge(tool.LoraConfig(**lora | {"target_modules": ["1"]})), linear),
        both("LoHa", merge(tool.LoHaConfig(r=4, init_weights=False, **common))),
        both("LoKr", merge(tool.LoKrConfig(r=4, init_weights=False, **common))),
        both("OFT", merge(tool.OFTConfig(r=0, oft_block_size=4, init_weights=False, **common))),
        both("IA3", merge(tool.IA3Config(feedforward_modules=[], init_ia3_weights=False, **common))),
    ]


@probe("transformers", "transformers", "accelerate")
def transformers() -> list[Outcome]:
    import transformers as tool

    tool.logging.set_verbosity_error()

    def saved(model: Any, place: Path) -> str:
        model.pretrained_cfg["input_size"] = (3, 64, 64)
        timm_nf.hub.write_folder(model, place / "net", card={"license": "mit"})
        return str(place / "net")

    def classifier(model: Any) -> Measured:
        with folder() as place:
            loaded = tool.AutoModelForImageClassification.from_pretrained(saved(model, place)).eval()
        return off(error(loaded(images()).logits, truth(model)))

    def backbone(model: Any) -> Measured:
        with folder() as place:
            loaded = tool.AutoModel.from_pretrained(saved(model, place)).eval()
        return off(error(loaded(images()).last_hidden_state, double(model).forward_features(images().double())))

    def pipeline(model: Any) -> Measured:
        from PIL import Image

        picture = Image.fromarray((images(1)[0].permute(1, 2, 0).clamp(-2, 2) * 60 + 127).byte().numpy())
        with folder() as place:
            found = tool.pipeline("image-classification", saved(model, place), device="cpu")(picture, top_k=10)
        transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        want = truth(model, transform(picture)[None]).softmax(-1)[0].sort(descending=True).values
        return off(error([entry["score"] for entry in found], want))

    def trainer(model: Any) -> Measured:
        with folder() as place:
            loaded = tool.AutoModelForImageClassification.from_pretrained(saved(model, place))
            data = [{"pixel_values": x, "labels": i % 10} for i, x in enumerate(images(8))]
            arguments = tool.TrainingArguments(
                str(place / "out"), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
            )  # fmt: skip
            result = tool.Trainer(loaded, arguments, train_dataset=data).train()
        return Measured(result.training_loss < 20, f"3 steps, loss {result.training_loss:.2f}")

    return [
        both("`AutoModelForImageClassification.from_pretrained(folder)`", classifier),
        both("`AutoModel.from_pretrained(folder)`", backbone),
        both('`pipeline("image-classification", folder)`', pipeline),
        both("`Trainer`", trainer),
    ]


# -- explaining --------------------------------------------------------------------------------------------------------


@probe("captum", "captum")
def captum() -> list[Outcome]:
    from captum.attr import DeepLift, GuidedBackprop

    def guided(model: Any) -> Measured:
        x = images().double().requires_grad_()
        logits = double(model)(x)[:, 3].sum()
        nodes: list[Any] = [logits.grad_fn]
        seen = set()
        while nodes:  # the gradient is cut at every ReLU of the graph, whatever made it
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if "Relu" in node.name():
                node.register_hook(lambda grads, _: tuple(g if g is None else g.clamp(min=0) for g in grads))
            nodes += [parent for parent, _ in node.next_functions]
        (want,) = torch.autograd.grad(logits, x)
        return off(error(GuidedBackprop(model).attribute(images().requires_grad_(), target=3), want))

    def complete(model: Any) -> Measured:
        x, zero = images(), torch.zeros_like(images())
        got = DeepLift(model, eps=1e-10).attribute(x, zero, target=3).detach().flatten(1).sum(1)
        return off(error(got, (truth(model, x) - truth(model, zero))[:, 3]), 1e-2)

    def resnet() -> Any:
        return network("dm_nf_resnet50")

    def rectified() -> Any:
        torch.manual_seed(0)  # create_model drops an argument that is None
        return wake(timm.models.model_entrypoint("nfnet_f0")(**SMALL, group_size=16, act_layer="relu", attn_layer=None))

    return [
        both("`GuidedBackprop` on `dm_nf_resnet50`", guided, resnet),
        both("`DeepLift`, sum of attributions, ReLU, no squeeze-excite", complete, rectified),
    ]


@probe("zennit", "zennit")
def zennit() -> list[Outcome]:
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat

    def relevance(model: Any, x: Tensor) -> Tensor:
        with Gradient(model, EpsilonPlusFlat()) as attributor:
            return attributor(x, torch.eye(10, dtype=x.dtype)[[3, 3]])[1]

    def measure(model: Any) -> Measured:
        plain = double(model) if getattr(model, "fused", False) else timm_nf.fuse(double(model))
        return off(error(relevance(model, images()), relevance(plain, images().double())), 1e-3)

    return [both("relevance by `EpsilonPlusFlat`, against the fused network in float64", measure)]


@probe("grad-cam", "grad-cam")
def grad_cam() -> list[Outcome]:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def measure(model: Any) -> Measured:
        reference, kept = double(model), []
        reference.stages[2].register_forward_hook(lambda module, args, out: kept.append(out))
        logits = reference(images().double())[:, 3].sum()
        (grad,) = torch.autograd.grad(logits, kept)
        cam = (grad.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach().numpy()
        # It scales the map of a layer to the picture, and the mean of all layers once more.
        want = torch.as_tensor(scale_cam_image(scale_cam_image(cam, (64, 64)))).double()
        got = GradCAM(model, [model.stages[2]])(images(), [ClassifierOutputTarget(3)] * 2)
        return off(error(got, want), 1e-3)

    return [both("`GradCAM` of a stage", measure)]


# -- counting ----------------------------------------------------------------------------------------------------------


@probe("fvcore", "fvcore")
def fvcore() -> list[Outcome]:
    from fvcore.nn import FlopCountAnalysis

    logging.disable(logging.WARNING)
    return [
        both(
            "`FlopCountAnalysis`",
            lambda model: share(FlopCountAnalysis(model, images(1)).total(), multiply_adds(), "multiply-adds"),
        )
    ]


@probe("thop", "thop")
def thop() -> list[Outcome]:
    from thop import profile
    from thop.vision.basic_hooks import count_convNd

    def counted(model: Any, **options: Any) -> Measured:
        return share(profile(model, (images(1),), verbose=False, **options)[0], multiply_adds(), "multiply-adds")

    def told(model: Any) -> Measured:
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.Conv2d)}
        return counted(model, custom_ops=dict.fromkeys(kinds, count_convNd))

    return [
        both("`profile`", counted),
        both("`profile(..., custom_ops={type(conv): count_convNd, ...})`", told),
    ]


@probe("ptflops", "ptflops")
def ptflops() -> list[Outcome]:
    from ptflops import get_model_complexity_info

    def counted(backend: str) -> Callable[[Any], Measured]:
        def measure(model: Any) -> Measured:
            found = get_model_complexity_info(
                model, (3, 64, 64), as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend
            )[0]
            return share(found or 0, multiply_adds(), "multiply-adds")

        return measure

    return [
        both(f'`get_model_complexity_info(..., backend="{backend}")`', counted(backend))
        for backend in ("pytorch", "aten")
    ]


@probe("torchinfo", "torchinfo")
def torchinfo() -> list[Outcome]:
    from torchinfo import summary

    return [
        both(
            "`summary(...).total_mult_adds`",
            lambda model: share(
                summary(model, input_data=images(1), verbose=0).total_mult_adds, multiply_adds(), "multiply-adds"
            ),
        )
    ]


# -- quantising and converting -----------------------------------------------------------------------------------------


@probe("torchao", "torchao")
def torchao() -> list[Outcome]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    def weights(model: Any) -> Measured:
        want = truth(model)
        quantize_(model, Int8WeightOnlyConfig())
        found = off(error(model(images()), want), QUANTISED)
        return Measured(found.ok, f"{found.text}, classifier only")

    def pt2e(model: Any) -> Measured:
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (images(),)).module(), quantizer)
        prepared(images())
        converted = convert_pt2e(prepared)
        found = off(error(converted(images()), truth(model)), QUANTISED)
        whole = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
        done = sum(value.dtype == torch.int8 for value in converted.state_dict().values())
        return Measured(found.ok and done >= 0.5 * whole, f"{done} of {whole} weights in int8, {found.text}")

    return [both("`quantize_(model, Int8WeightOnlyConfig())`", weights), both("PT2E, x86 quantiser, int8", pt2e)]


@probe("optimum-quanto", "optimum-quanto")
def optimum_quanto() -> list[Outcome]:
    from optimum.quanto import freeze, qint8, quantize

    def measure(model: Any, exclude: list[str] | None = None) -> Measured:
        want = truth(model)
        quantize(model, weights=qint8, exclude=exclude)
        freeze(model)
        return off(error(model(images()), want), QUANTISED)

    def but_padded(model: Any) -> Measured:
        """Its convolution takes the place of one that pads by the size of the input, and does not pad."""
        padded = [name for name, module in model.named_modules() if getattr(module, "same_pad", False)]
        return measure(model, padded)

    return [
        both("`quantize(model, weights=qint8)`", measure),
        both("`quantize(model, weights=qint8, exclude=...)`, without strided SAME convolutions", but_padded),
    ]


@probe("nncf", "nncf")
def nncf() -> list[Outcome]:
    # It compiles a C++ extension in the first call. Its default limit for that is 60 seconds.
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "600"
    import nncf as tool

    def measure(model: Any) -> Measured:
        data = tool.Dataset([image[None] for image in images(8)])
        return off(error(tool.quantize(copy.deepcopy(model), data)(images()), truth(model)), QUANTISED)

    return [both("`quantize(model, dataset)`, with `NNCF_EXTENSION_LOAD_TIMEOUT=600`", measure)]


@probe("OpenVINO", "openvino")
def openvino() -> list[Outcome]:
    import openvino as tool

    def measure(model: Any) -> Measured:
        converted = tool.convert_model(model, example_input=images())
        hint = {"INFERENCE_PRECISION_HINT": "f32"}  # it rounds to bfloat16 where the processor can
        got = tool.compile_model(converted, "CPU", hint)(images().numpy())[0]
        return off(error(got, truth(model)))

    return [both("`convert_model(model, example_input=x)`", measure)]


@probe("onnxsim", "onnxsim")
def onnxsim() -> list[Outcome]:
    import onnx
    import onnxsim as tool

    def measure(model: Any) -> Measured:
        with folder() as place, contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(model, (images(),), place / "m.onnx", dynamo=True, external_data=False, verbose=False)
            before = onnx.load(place / "m.onnx")
            simple, checked = tool.simplify(before)
            onnx.save(simple, place / "s.onnx")
            found = off(error(run_onnx(place / "s.onnx", images()), truth(model)))
        nodes = f"{len(before.graph.node)} nodes become {len(simple.graph.node)}"
        return Measured(found.ok and checked, f"{nodes}, {found.text}")

    return [both("`simplify` of `torch.onnx.export(model)`", measure)]


# 9.0 makes a number of an array of one element, which numpy 2.4 refuses
@probe("coremltools", "coremltools", "numpy<2.4")
def coremltools() -> list[Outcome]:
    import coremltools as tool

    def trace(model: Any) -> Measured:
        inputs = [tool.TensorType(name="images", shape=(2, 3, 64, 64))]
        return converted(torch.jit.trace(model, images()), inputs=inputs)

    def export(model: Any) -> Measured:
        return converted(torch.export.export(model, (images(),)).run_decompositions({}))

    def converted(source: Any, **options: Any) -> Measured:
        made = tool.convert(source, convert_to="mlprogram", skip_model_load=True, **options)
        operations = made.get_spec().mlProgram.functions["main"].block_specializations
        count = sum(len(block.operations) for block in operations.values())
        return Measured(True, f"converts to {count} operations; runs on macOS only, not run here")

    return [both("`convert` of a trace", trace), both("`convert` of an exported program", export)]


# -- pruning, private and other training -------------------------------------------------------------------------------


@probe("torch-pruning", "torch-pruning")
def torch_pruning() -> list[Outcome]:
    import torch_pruning as tool

    def measure(model: Any) -> Measured:
        """Channels that are 0 everywhere are taken out, so that nothing may change."""
        conv = model.stages[0][0].conv1  # the convolution after it has one group
        idle = list(range(conv.out_channels // 2, conv.out_channels))
        with torch.no_grad():
            conv.weight[idle], conv.bias[idle] = 0, 0
        want, before = truth(model), sum(p.numel() for p in model.parameters())
        graph = tool.DependencyGraph().build_dependency(model, images())
        graph.get_pruning_group(conv, tool.prune_conv_out_channels, idle).prune()
        after = sum(p.numel() for p in model.parameters())
        found = off(error(model(images()), want))
        return Measured(found.ok and after < before, f"{before - after} fewer parameters, {found.text}")

    return [both("channels that are 0 taken out by `DependencyGraph`", measure)]


@probe("opacus", "opacus")
def opacus() -> list[Outcome]:
    from opacus import GradSampleModule
    from torch.func import functional_call, grad, vmap

    def measure(model: Any) -> Measured:
        x, y = images(3).double(), torch.arange(3)
        model = model.double().train()
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(model, p, (one[None],)), label[None])

        want = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
        F.cross_entropy(GradSampleModule(model, loss_reduction="sum")(x), y, reduction="sum").backward()
        return off(max(error(p.grad_sample, want[name]) for name, p in model.named_parameters()))

    return [both("gradients of every example, `GradSampleModule`", measure)]


@probe("lightning", "lightning")
def lightning() -> list[Outcome]:
    import lightning as tool
    from torch.utils.data import DataLoader

    class Module(tool.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return timm.optim.create_optimizer_v2(self.model, "agcsgd", lr=0.05, momentum=0.9)

    def measure(model: Any) -> Measured:
        data = [(x, i % 10) for i, x in enumerate(images(12))]
        plain = copy.deepcopy(model).train()
        optimizer = timm.optim.create_optimizer_v2(plain, "agcsgd", lr=0.05, momentum=0.9)
        for x, y in DataLoader(data, 4):
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = tool.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
        trainer.fit(Module(model.train()), DataLoader(data, 4))
        return off(error(model.eval()(images()), plain.eval()(images()).detach().double()))

    return [both("`Trainer.fit` with `agcsgd`, against a plain loop", measure)]


@probe("fastai", "fastai")
def fastai() -> list[Outcome]:
    import fastai.callback.progress  # noqa: F401, gives Learner no_bar
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.vision.learner import create_timm_model
    from torch.utils.data import DataLoader

    def measure(model: Any) -> Measured:
        data = [(x, torch.tensor(i % 10)) for i, x in enumerate(images(8))]
        loaders = DataLoaders(DataLoader(data, 4), DataLoader(data, 4))
        learner = Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), lr=1e-2)
        with learner.no_bar(), learner.no_logging():
            before = learner.validate()[0]
            learner.fit(3)
            after = learner.validate()[0]
        return Measured(after < before, f"loss {before:.2f} to {after:.2f} in 3 epochs")

    def by_name(_: Any) -> Measured:
        small = {name: value for name, value in SMALL.items() if name != "num_classes"}
        model = create_timm_model("nfnet_f0", 10, pretrained=False, group_size=16, **small)
        model = model[0] if isinstance(model, tuple) else model
        shape = tuple(model.eval()(images()).shape)
        return Measured(shape == (2, 10), f"logits {shape}")

    return [both("`Learner.fit`", measure), alone('`create_timm_model("nfnet_f0")`, in `vision_learner`', by_name)]


@probe("skorch", "skorch")
def skorch() -> list[Outcome]:
    from skorch import NeuralNetClassifier

    def measure(model: Any) -> Measured:
        net = NeuralNetClassifier(
            model, criterion=nn.CrossEntropyLoss, max_epochs=2, lr=0.01, train_split=None, verbose=0
        )
        x, y = images(8).numpy(), (torch.arange(8) % 10).numpy()
        net.fit(x, y)
        return off(error(net.predict_proba(images().numpy()), truth(net.module_.eval()).softmax(-1)))

    return [both("`NeuralNetClassifier`, `fit` and `predict_proba`", measure)]


@probe("segmentation_models_pytorch", "segmentation-models-pytorch")
def segmentation_models_pytorch() -> list[Outcome]:
    import segmentation_models_pytorch as tool

    def measure(_: Any) -> Measured:
        torch.manual_seed(0)
        small = {name: value for name, value in SMALL.items() if name != "num_classes"}
        model = wake(tool.Unet("tu-nfnet_f0", encoder_weights=None, classes=2, group_size=16, **small))
        with torch.no_grad():
            return off(error(model(images()), truth(model)))

    return [alone('`Unet("tu-nfnet_f0")`', measure)]


@probe("open_clip", "open_clip_torch")
def open_clip() -> list[Outcome]:
    from open_clip.timm_model import TimmModel

    def measure(_: Any) -> Measured:
        torch.manual_seed(0)
        tower = wake(TimmModel("nfnet_f0", 16, image_size=64, pool="avg", proj="linear", pretrained=False))
        with torch.no_grad():
            return off(error(tower(images()), truth(tower)))

    return [alone('image tower `TimmModel("nfnet_f0", ...)`', measure)]


@probe("lightly", "lightly")
def lightly() -> list[Outcome]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    def measure(model: Any) -> Measured:
        torch.manual_seed(0)
        model.reset_classifier(0)
        whole = nn.Sequential(model, SimCLRProjectionHead(model.num_features, 32, 16, batch_norm=False)).train()
        reference = double(whole)
        pair = (images(8), images(8).flip(-1))
        loss = NTXentLoss()(*map(whole, pair))
        loss.backward()
        NTXentLoss()(*(reference(x.double()) for x in pair)).backward()
        grads = zip(whole.parameters(), reference.parameters(), strict=True)
        return off(max(error(ours.grad, theirs.grad) for ours, theirs in grads), 1e-3)

    return [both("SimCLR, `NTXentLoss`: gradients", measure)]


@probe("kornia", "kornia")
def kornia() -> list[Outcome]:
    from kornia.enhance import Normalize

    def measure(model: Any) -> Measured:
        whole = nn.Sequential(Normalize(torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])), model)
        x, wide = images().requires_grad_(), images().double().requires_grad_()
        (got,) = torch.autograd.grad(whole(x)[:, 3].sum(), x)
        (want,) = torch.autograd.grad(double(whole)(wide)[:, 3].sum(), wide)
        return off(error(got, want))

    return [both("`Normalize` before the network: gradient of the picture", measure)]


def main() -> None:
    """Run the probe that the command names and print its answer."""
    warnings.simplefilter("ignore")
    name = sys.argv[1]
    found = PROBES[name]
    with contextlib.redirect_stdout(sys.stderr):
        rows = found.run()
    packages = [requirement.partition("=")[0] for requirement in found.requirements[:1]] or [found.title]
    versions = ", ".join(version(package).partition("+")[0] for package in packages)
    print(MARK + json.dumps({"versions": versions, "rows": rows, "machine": machine()}), flush=True)


if __name__ == "__main__":
    main()
