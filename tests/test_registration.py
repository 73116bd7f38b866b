"""What importing changes in timm, and that `timm_nf.unregister()` undoes it, each in a process of its own."""

import os
import subprocess
import sys

from tests.support import ROOT
from timm_nf.variants import VARIANTS

# All that timm keeps of models, optimizers and clipping, as one comparable value.
# Without empty lists, which older timm makes when it looks for a name.
SNAPSHOT = """
import json, warnings
import timm, timm.optim, timm.utils, timm.utils.agc, timm.utils.clip_grad
from timm.models import _registry as models
from timm.optim import _optim_factory as optimizers
def snapshot():
    kept = {name: vars(models)[name] for name in vars(models) if isinstance(vars(models)[name], (dict, set))}
    kept = {name: value for name, value in kept.items() if name.startswith(("_model", "_module"))}
    def plain(value):
        pairs = sorted((k, v) for k, v in value.items() if v != []) if isinstance(value, dict) else sorted(value)
        return repr(pairs)
    kept = {name: plain(value) for name, value in kept.items() if name != "_module_to_models"}
    kept["_module_to_models"] = repr(sorted((k, sorted(v)) for k, v in models._module_to_models.items()))
    kept["listed"] = repr((timm.list_models(), timm.list_pretrained()))
    registry = optimizers.default_registry
    kept["optimizers"] = repr(sorted(registry._optimizers.items()))
    kept["instance"] = repr(sorted(vars(registry)))
    for module in (timm.utils, timm.utils.agc, timm.utils.clip_grad):
        kept[module.__name__] = repr(sorted(vars(module).items(), key=lambda pair: pair[0]))
    kept["names"] = repr(timm.models.nfnet.__all__)
    kept["lookahead"] = repr(sorted(vars(timm.optim.Lookahead)))
    return kept
def changed(before, after):
    return sorted(name for name in before if before[name] != after[name])
before = snapshot()
import timm_nf
after = snapshot()
"""


STAYS = ": replaced by others since timm_nf was imported, so these stay as they are"


def run(code: str) -> list[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_unregister_makes_timm_what_it_was_and_register_does_it_again():
    lines = run("""
print({"listed", "optimizers", "instance", "timm.utils", "lookahead"} <= set(changed(before, after)))
model = timm.create_model("nfnet_f0", depths=(1, 1, 1, 1), channels=(16, 16, 16, 16), group_size=8)
print(timm_nf.unregister(), changed(before, snapshot()))
print(type(timm.create_model("nfnet_f0", drop_rate=0.0)).__module__, timm.is_model("dm_nf_resnet50"))
import torch
print(model(torch.zeros(1, 3, 32, 32)).shape[-1])
print(timm_nf.unregister(), changed(before, snapshot()))
timm_nf.register()
print(changed(after, snapshot()), type(timm.create_model("dm_nf_regnet_b0")).__module__)
print(len(timm_nf.nfnets.__all__) - len(set(timm_nf.nfnets.__all__)))
""")
    assert lines == [
        "True",
        "[] []",
        "timm.models.nfnet False",
        "1000",
        "[] []",
        "[] timm_nf.models.nfnets",
        "0",
    ]


def test_the_page_counts_the_networks():
    assert f"{len(VARIANTS)} names join" in (ROOT / "docs" / "importing.md").read_text(encoding="utf-8")


def test_what_others_have_put_in_our_place_stays_and_is_named():
    lines = run("""
def nfnet_f1(pretrained=False, **kwargs):
    return "somebody's"
def clip(*args, **kwargs):
    return None
warnings.simplefilter("ignore")
timm.models.register_model(nfnet_f1)
timm.utils.adaptive_clip_grad = clip
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    left = timm_nf.unregister()
print(left)
for warning in caught:
    print(warning.filename, warning.message)
print(timm.models.model_entrypoint("nfnet_f1")(), timm.utils.adaptive_clip_grad is clip)
print(timm.is_model("dm_nf_resnet50"), timm.models.model_entrypoint("nfnet_f2").__module__)
print(timm.utils.clip_grad.adaptive_clip_grad.__module__)
""")
    assert lines == [
        "['nfnet_f1', 'timm.utils.adaptive_clip_grad']",
        f"<string> nfnet_f1{STAYS}",
        f"<string> timm.utils.adaptive_clip_grad{STAYS}",
        "somebody's True",
        "False timm.models.nfnet",
        "timm.utils.agc",
    ]
