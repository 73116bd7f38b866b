"""`timm_nf.recipes` and `timm-nf recipe`: settings that train.py knows, with the values of the sources."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms_factory import transforms_imagenet_eval
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import timm_nf
from tests.support import GOLDEN
from tests.support.small_nets import NETS, create, keywords
from tests.support.train_py_arguments import arguments, load
from timm_nf import augment, recipes
from timm_nf.cli import main
from timm_nf.variants import VARIANTS

RECORDED: dict[str, Any] = json.loads((GOLDEN / "train_py_arguments.json").read_text())
ALL = [(name, kind) for name in VARIANTS for kind in recipes.purposes(name)]
TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict}


def fits(value: Any, facts: dict[str, Any]) -> bool:
    """Whether train.py would make this very value of it on its command line."""
    values = value if facts["many"] and isinstance(value, list) and value else [value]
    right = all(type(v) is TYPES[facts["type"]] and (not facts["choices"] or v in facts["choices"]) for v in values)
    return right and facts["many"] == isinstance(value, list)


def namespace(name: str, kind: str = "scratch") -> argparse.Namespace:
    """train.py's arguments with the file as `--config`."""
    defaults = {key: facts["default"] for key, facts in RECORDED["arguments"].items()}
    return argparse.Namespace(**(defaults | yaml.safe_load(recipes.as_yaml(name, kind))))


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_every_key_and_value_is_one_of_train_pys_arguments(name, kind):
    for key, value in yaml.safe_load(recipes.as_yaml(name, kind)).items():
        assert key in RECORDED["arguments"], f"train.py would ignore {key}"
        assert fits(value, RECORDED["arguments"][key]), (key, value)


def test_a_wrong_key_or_value_would_be_noticed():
    known = RECORDED["arguments"]
    assert "epoch" not in known
    wrong = {"lr": "1e-5", "epochs": 355.0, "amp": "true", "device_modules": "timm_nf", "opt_kwargs": ["clip_factor"]}
    assert not [key for key, value in wrong.items() if fits(value, known[key])]
    assert not fits("linear", known["kd_distill_type"])  # not among its choices
    assert fits("logit", known["kd_distill_type"])


def test_the_recorded_arguments_are_those_of_the_script_where_it_is_found(tmp_path, monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}", RECORDED["commit"])
    assert len(RECORDED["arguments"]) > 150
    if timm_dir := os.environ.get("TIMM_DIR"):  # a clone of timm's repository
        assert arguments(load(timm_dir)) == RECORDED["arguments"]
        for name, kind in ALL:
            script = load(timm_dir)  # its parser keeps the defaults of the file before
            file = tmp_path / f"{name}-{kind}.yaml"
            file.write_text(recipes.as_yaml(name, kind))
            monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
            parsed, _ = script["_parse_args"]()
            assert vars(parsed) == vars(namespace(name, kind))


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_the_file_is_the_settings_below_a_header_of_comments(name, kind):
    text = recipes.as_yaml(name, kind)
    assert yaml.safe_load(text) == recipes.settings(name, kind)
    header, body = [[line for line in text.splitlines() if (line[0] == "#") == wanted] for wanted in (True, False)]
    assert text.splitlines() == header + body
    assert len(body) == len(recipes.settings(name, kind))
    assert all(len(line) <= 120 for line in header if not line.startswith("# python"))


# -- the values, against the authors' numbers --------------------------------------------------------------------------


def the_authors(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, facts in json.loads((GOLDEN / "variants.json").read_text()).items():
        kind, level = key.rsplit("-", 1)
        if kind == family:
            name = f"nfnet_{level}" if family == "NFNet" else f"dm_nf_regnet_{level}"
            yield name.lower().replace("+", "_plus"), facts


def test_nfnets_from_scratch_have_the_papers_settings():
    seen = list(the_authors("NFNet"))
    assert len(seen) == 16
    for name, facts in seen:
        got = recipes.settings(name)
        assert got["drop"] == facts["drop_rate"]
        assert got["img_size"] == facts["train_imsize"]
        assert got["aa"].startswith(f"rand-m{int(facts['randaugment']) - 400}-n4-")  # 405: 4 layers of magnitude 5
        assert (got["batch_size"], got["lr"], got["weight_decay"]) == (4096, 1.6, 2e-5)
        assert (got["opt"], got["opt_kwargs"]) == ("agcsgd", {"clip_factor": 0.01, "clip_eps": 1e-3})
        assert (got["drop_path"], got["smoothing"], got["momentum"]) == (0.25, 0.1, 0.9)
        assert (got["mixup"], got["cutmix"]) == (0.2, 1.0)
        assert (got["mixup_prob"], got["mixup_switch_prob"], got["mixup_mode"]) == (1.0, 0.5, "elem")
        assert [got[f"model_ema{key}"] for key in ("", "_decay", "_warmup")] == [True, 0.99999, True]
        assert got["train_interpolation"] == "bicubic"
        assert (got["amp"], got["amp_dtype"]) == (True, "bfloat16")
        assert got["epochs"] + got["warmup_epochs"] == 360


def test_nf_regnets_have_the_authors_settings():
    seen = list(the_authors("NF-RegNet"))
    assert len(seen) == 9
    for level, (name, facts) in enumerate(seen):
        got = recipes.settings(name)
        assert (got["drop"], got["img_size"]) == (facts["drop_rate"], facts["train_imsize"])
        assert got["weight_decay"] == pytest.approx((5 + level) * 1e-5, rel=1e-15)
        assert (got["opt"], got["batch_size"], got["lr"], got["min_lr"]) == ("sgd", 1024, 0.4, 1e-3)
        assert (got["drop_path"], got["amp"]) == (0.1, False)
        assert not {"opt_kwargs", "aa"} & got.keys()


def test_fine_tuning_has_the_papers_settings():
    f0, resnet = recipes.settings("nfnet_f0", "finetune"), recipes.settings("dm_nf_resnet50", "finetune")
    for got in (f0, resnet):
        assert (got["batch_size"], got["lr"], got["pretrained"]) == (2048, 0.1, True)
        steps = 1_281_167 // 2048  # of an epoch; train.py drops what is left over
        assert steps * (got["epochs"] + got["warmup_epochs"]) == 15_000
        assert steps * got["warmup_epochs"] == 5_000
    assert [[got[f"model_ema{key}"] for key in ("", "_decay", "_warmup")] for got in (f0, resnet)] == [
        [True, 0.9999, True]
    ] * 2
    assert [f0[key] for key in ("weight_decay", "drop", "drop_path")] == [1e-5, 0.25, 0.1]
    assert [resnet[key] for key in ("weight_decay", "drop", "drop_path", "model_ema_decay")] == [0, 0, 0, 0.9999]
    assert "--pretrained-path" in recipes.as_yaml("dm_nf_resnet50", "finetune")
    assert "--pretrained-path" not in recipes.as_yaml("nfnet_f0", "finetune")


@pytest.mark.parametrize("name", ["nfnet_f3", "dm_nf_resnet101"])
def test_small_batches_are_not_clipped(name):
    got = recipes.settings(name, "small-batch")
    assert (got["opt"], got["batch_size"], got["lr"]) == ("sgd", 256, 0.1)
    assert "opt_kwargs" not in got


@pytest.mark.parametrize(("name", "kind"), [("nfnet_f0", "scratch"), ("dm_nf_regnet_b0", "scratch")])
def test_the_learning_rate_of_every_step_is_the_authors(name, kind):
    args, per_epoch = namespace(name, kind), 3
    network = timm.create_model("test_nfnet")  # the classifier is looked for in it
    optimizer = create_optimizer_v2(network, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=per_epoch)
    assert epochs == 360
    assert schedule is not None
    steps, warmup = 360 * per_epoch, 5 * per_epoch
    for step in range(steps):
        lr = optimizer.param_groups[0]["lr"]
        cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        expected = args.lr * step / warmup if step <= warmup else (args.lr - args.min_lr) * cosine + args.min_lr
        assert lr == pytest.approx(expected, rel=1e-9, abs=1e-12), step
        schedule.step_update(step + 1)


@pytest.mark.parametrize("family", NETS)
def test_the_optimizer_that_train_py_makes_of_it_clips_and_decays_as_stated(family):
    name = {"NFNet": "nfnet_f0", "NF_ResNet": "dm_nf_resnet50", "NF_RegNet": "dm_nf_regnet_b0"}[family]
    for kind in recipes.purposes(name):
        args, model = namespace(name, kind), create(family)
        optimizer: Any = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        assert type(optimizer).__name__ == ("AgcSGD" if args.opt == "agcsgd" else "SGD")
        for group in optimizer.param_groups:
            assert (group["lr"], group["momentum"], group["nesterov"]) == (args.lr, 0.9, True)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for n, p in model.named_parameters():
            assert decay[id(p)] == (args.weight_decay if n.endswith("weight") else 0.0), n
        factors = {group.get("clip_factor") for group in optimizer.param_groups}
        assert factors == ({0.01, None} if args.opt == "agcsgd" else {None})


def test_dropout_and_stochastic_depth_reach_the_network():
    args = namespace("nfnet_f0")
    model: Any = timm.create_model(
        args.model, drop_rate=args.drop, drop_path_rate=args.drop_path, **keywords(NETS["NFNet"])
    )
    assert model.head.drop.p == 0.2
    assert model.stages[3][0].drop_path.rate == pytest.approx(0.25 * 4 / 5)  # the last of five blocks


# -- the header, against timm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "magnitude"), [("nfnet_f0", 5), ("nfnet_f1", 10), ("nfnet_f6", 15)])
def test_randaugment_applies_every_layer_at_the_papers_magnitude(name, magnitude):
    augment: Any = rand_augment_transform(recipes.settings(name)["aa"], {"translate_const": 100})
    assert augment.num_layers == 4
    assert len(augment.ops) == 15  # the authors' sixteenth is Cutout
    for op in augment.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (1.0, magnitude, 0)
        assert magnitude <= op.magnitude_max  # where timm would clip it


def test_the_average_warms_up_as_the_header_says():
    average = ModelEmaV3(nn.Linear(1, 1), decay=0.99999, use_warmup=True)
    assert average.get_decay(1001) == pytest.approx(1 - 1001 ** (-2 / 3), rel=1e-12)
    assert "1-(1+t)^(-2/3)" in recipes.as_yaml("nfnet_f0")


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_the_header_tests_as_the_authors_do(name, kind):
    row = VARIANTS[name]
    (command,) = [line for line in recipes.as_yaml(name, kind).splitlines() if line.startswith("# python -m timm_nf")]
    found = re.search(r"--model (\S+) .*--img-size (\d+) --crop-mode (\S+) --crop-pct (\S+)$", command)
    assert found is not None
    model, size, mode, pct = found.groups()
    assert (model, int(size)) == (name, row.test_size)
    assert mode == ("squash" if name.startswith("nfnet") else "center")
    resize: Any = transforms_imagenet_eval(int(size), crop_pct=float(pct), crop_mode=mode).transforms[0]
    assert resize.size in (row.test_size + 32, (row.test_size + 32,) * 2)
    assert ("--use-ema" in command) == recipes.settings(name, kind)["model_ema"]


def test_the_header_lists_what_train_py_cannot_express():
    f0, resnet = recipes.as_yaml("nfnet_f0"), recipes.as_yaml("dm_nf_resnet50", "small-batch")
    for word in (
        "RandAugment",
        "MixUp and CutMix",
        "Warmup of the weight",
        "Stochastic depth",
        "Sharpness",
        "Evaluation",
    ):
        assert f"# - {word}" in f0
        assert (f"# - {word}" in resnet) == (word in ("Stochastic depth", "Evaluation"))


class Pictures(Dataset[Any]):
    """As many as ImageNet has, and nothing in them."""

    def __len__(self) -> int:
        return recipes.IMAGES


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 256), (8, 4096), (32, 4096), (8, 1008)])
def test_the_header_counts_updates_as_train_pys_loader_does(world_size, batch_size):
    share = batch_size // world_size
    sampler = DistributedSampler(Pictures(), world_size, rank=0)
    epoch = len(DataLoader(Pictures(), share, sampler=sampler, drop_last=True))  # timm's create_loader for training
    text = " ".join(recipes.as_yaml("nfnet_f0", "scratch", world_size, batch_size).replace("#", "").split())
    assert f"Updates: {360 * recipes.IMAGES // batch_size:,} there, {360 * epoch:,} here" in text


def test_the_header_has_the_largest_difference_of_rates():
    there, here = (112_602, 5 * recipes.IMAGES / 4096), (112_320, 1560)

    def rate(step: int, updates: float, warmup: float) -> float:
        return (
            min(step / warmup, 1.0)
            if step <= warmup
            else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (updates - warmup))
        )

    largest = max(abs(rate(step, *there) - rate(step, *here)) for step in range(112_320))
    assert f"differ by up to {100 * largest:.2f} % of the peak" in " ".join(
        recipes.as_yaml("nfnet_f0").replace("#", "").split()
    )


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_the_header_says_how_crops_and_resizing_differ(name, kind):
    text = recipes.as_yaml(name, kind)
    assert "# - Crops: " in text
    assert "# - Resizing: " in text
    assert ("# - Updates: " in text) == (kind != "finetune")
    assert ("AuthorsRandAugment" in text) == ("aa" in recipes.settings(name, kind))


@pytest.mark.parametrize(("name", "magnitude"), [("nfnet_f0", 5), ("nfnet_f1", 10), ("nfnet_f6", 15)])
def test_the_header_says_where_timms_operations_have_other_limits(name, magnitude):
    timms = auto_augment.LEVEL_TO_ARG["SolarizeAdd"](magnitude, {})[0]
    theirs = int(magnitude / 10 * 110)
    stated = f"RandAugment's SolarizeAdd: {theirs} is added there at this magnitude, {timms} here"
    assert (stated in recipes.as_yaml(name)) == (timms != theirs)
    grey = Image.new("RGB", (256, 128), (0, 0, 0))
    assert auto_augment.contrast(grey, 0.0).getpixel((0, 0)) == (0, 0, 0)  # the mean grey
    black = torch.zeros(3, 128, 256, dtype=torch.uint8)
    assert augment.contrast(black, 0.0).unique().tolist() == [128]  # 256 * 128 / 256
    augmented: Any = rand_augment_transform(recipes.settings(name)["aa"], {"img_mean": (1, 2, 3)})
    assert all(op.kwargs["fillcolor"] == (1, 2, 3) for op in augmented.ops)


# -- sizes, and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "world_size", "batch_size", "share", "lr"),
    [
        ("nfnet_f0", "scratch", 32, None, 128, 1.6),
        ("nfnet_f0", "scratch", 8, 1024, 128, 0.1 * 1024 / 256),
        ("dm_nf_regnet_b2", "scratch", 2, 512, 256, 0.4),  # the authors' lr_scale_by_bs is off
        ("dm_nf_resnet50", "small-batch", 1, 7, 7, 0.1 * 7 / 256),  # odd, but nothing is mixed
        ("nfnet_f1", "finetune", 4, 256, 64, 0.1 * 256 / 2048),
    ],
)
def test_processes_share_the_batch_and_the_learning_rate_follows_it_where_the_authors_does(
    name, kind, world_size, batch_size, share, lr
):
    got = recipes.settings(name, kind, world_size, batch_size)
    assert (got["batch_size"], got["lr"]) == (share, pytest.approx(lr, rel=1e-9))
    same = recipes.settings(name, kind)
    assert {k: v for k, v in got.items() if k not in ("batch_size", "lr")} == {
        k: v for k, v in same.items() if k not in ("batch_size", "lr")
    }
    assert f"a batch of {batch_size or 4096} images in {world_size} process" in recipes.as_yaml(
        name, kind, world_size, batch_size
    )


def test_the_smallest_rate_keeps_its_share_of_the_peak(monkeypatch):
    for scales, times in ((True, 0.25), (False, 1.0)):
        regnet = dataclasses.replace(recipes.RECIPES["scratch"]["dm_nf_regnet"], lr_follows_batch=scales)
        monkeypatch.setitem(recipes.RECIPES["scratch"], "dm_nf_regnet", regnet)
        got = recipes.settings("dm_nf_regnet_b0", batch_size=256)
        assert (got["lr"], got["min_lr"]) == (pytest.approx(0.4 * times), pytest.approx(1e-3 * times))


def test_the_command_prints_the_file_and_nothing_else(capsys):
    main(["recipe", "nfnet_f2", "--kind", "small-batch", "--world-size", "4", "--batch-size", "128"])
    assert capsys.readouterr() == (timm_nf.recipes.as_yaml("nfnet_f2", "small-batch", 4, 128), "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vgg16"], "timm_nf has no network 'vgg16'; timm has; `timm-nf list` shows all 31"),
        (["nfnet_f9"], "timm_nf has no network 'nfnet_f9' (did you mean nfnet_f"),
        (["nfnet_f0.other"], "nfnet_f0 has no weights with the tag 'other'; it has dm_in1k"),
        (["dm_nf_resnet50"], "dm_nf_resnet50 has no recipe 'scratch'; it has finetune, small-batch"),
        (["nfnet_f0", "--kind", "jft"], "nfnet_f0 has no recipe 'jft'; it has scratch, finetune, small-batch"),
        (["nfnet_f0", "--world-size", "24"], "got 4096 for 24: give --batch-size 4080 or --batch-size 4128"),
        (["nfnet_f0", "--world-size", "8", "--batch-size", "4"], "got 4 for 8"),
        (
            ["nfnet_f0", "--world-size", "8", "--batch-size", "8"],
            "twice that as MixUp pairs images, got 8 for 8: give --batch-size 16",
        ),
        (["nfnet_f0", "--world-size", "0"], "--world-size"),
        (["nfnet_f0", "--batch-size", "-1"], "--batch-size"),
        ([], "NAME"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recipe", *argv])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


def test_the_command_for_several_processes_says_how_many():
    assert "torchrun --nproc-per-node 8 train.py" in recipes.as_yaml("nfnet_f0", world_size=8)
    assert "# python train.py" in recipes.as_yaml("nfnet_f0")


def test_the_function_refuses_no_process_at_all():
    with pytest.raises(ValueError, match="got 4096 for 0"):
        recipes.as_yaml("nfnet_f0", world_size=0)
