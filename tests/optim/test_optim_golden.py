"""Three clipped steps against the paper's authors' own optimizer, in float64.

Where the numbers come from is told in tests/golden/README.md.
"""

import gzip
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import timm_nf
from tests.support import GOLDEN, golden_file
from timm_nf.verify.golden import fill, image

TREES = json.loads(gzip.decompress((GOLDEN / "haiku_trees.json.gz").read_bytes()))
TOLERANCE = 1e-9

# file: our name, haiku tree, (batch, height, width), learning rate
RUNS = {
    "sgd_agc_nfnet_F0_2x32x32": ("nfnet_f0", "NFNet-F0", (2, 32, 32), 0.02),
    "sgd_agc_nf_resnet_ResNet50_2x32x32": ("dm_nf_resnet50", "NF-ResNet50", (2, 32, 32), 0.001),
}


def synthetic_model(name, tree, num_classes=10):
    """The network in float64 with the synthetic parameters, its classifier cut to `num_classes`."""
    params = {}
    for module, entries in TREES[tree].items():
        is_classifier = module.endswith("/linear") and "squeeze_excite" not in module
        params[module] = {
            entry: fill((*shape[:-1], num_classes) if is_classifier else tuple(shape), module, entry)
            for entry, shape in entries.items()
        }
    model = timm.create_model(name, num_classes=num_classes).double()
    model.load_state_dict({k: v.double() for k, v in timm_nf.convert.haiku_to_timm(params).items()})
    return model.train()


def summary(array):
    """What the golden files hold of a tensor: its norm and its first three entries, in haiku's layout."""
    flat = np.asarray(array, dtype=np.float64).ravel()
    return np.r_[np.linalg.norm(flat), flat[:3]]


def assert_summaries(golden, prefix, tensors):
    """Compare every entry of `prefix`; relative to the tensor's norm, absolute below a norm of 1."""
    arrays = timm_nf.convert.timm_to_haiku({k: v.detach() for k, v in tensors.items()})
    keys = [key for key in golden.files if key.startswith(prefix + "|")]
    assert len(keys) == sum(len(entries) for entries in arrays.values())
    for key in keys:
        _, module, entry = key.split("|")
        error = np.abs(summary(arrays[module][entry]) - golden[key]).max() / max(1.0, abs(golden[key][0]))
        assert error <= TOLERANCE, f"{key}: {error:.1e}"


@pytest.mark.parametrize("stem", RUNS)
def test_golden_three_steps_equal_the_authors_optimizer(stem):
    name, tree, (n, h, w), lr = RUNS[stem]
    golden = np.load(golden_file(stem))
    model = synthetic_model(name, tree)
    optimizer = timm.optim.create_optimizer_v2(
        model, "agcsgd", lr=lr, weight_decay=2e-5, momentum=0.9, clip_factor=0.01, clip_eps=1e-3
    )
    x = image(n, h, w)
    labels = torch.arange(n) * 3 % 10
    losses = []
    for step in range(3):
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert_summaries(golden, "grad0", {name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
    losses.append(F.cross_entropy(model(x), labels).item())
    np.testing.assert_allclose(losses, golden["losses"], rtol=0, atol=TOLERANCE)
    assert_summaries(golden, "param3", dict(model.named_parameters()))
