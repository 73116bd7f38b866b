"""The plain loop trains as the paper's formula says, unit by unit in float64."""

import torch
import torch.nn.functional as F

from examples import plain_loop
from tests.support.small_problems import loop_of_the_formula


def reference(steps):
    """Parameters in float64 after SGD with Nesterov momentum and the formula's clipping, written out."""
    model = plain_loop.network().double()
    lr, momentum, decay, factor = (plain_loop.SETTINGS[k] for k in ("lr", "momentum", "weight_decay", "clip_factor"))
    buffers = {}
    for images, labels in plain_loop.batches(steps):
        model.zero_grad()
        F.cross_entropy(model(images.double()), labels).backward()
        for name, p in model.named_parameters():
            grad = p.grad if name == "head.fc.weight" else loop_of_the_formula(p, factor, 1e-3)[0]
            last = name.rpartition(".")[2]
            if p.ndim > 1 and last not in ("gain", "skipinit_gain", "bias"):
                grad = grad + decay * p.detach()
            buffers[name] = momentum * buffers[name] + grad if name in buffers else grad
            p.data -= lr * (grad + momentum * buffers[name])
    return dict(model.named_parameters())


def test_it_equals_the_formula_in_float64(capsys):
    model, losses = plain_loop.main(steps=4)
    assert "units clipped" in capsys.readouterr().out
    assert len(losses) == 4
    expected = reference(4)
    for name, p in model.named_parameters():
        difference = (p.detach().double() - expected[name].detach()).norm() / expected[name].detach().norm().clamp(1e-3)
        assert difference < 1e-4, name
    assert not torch.equal(model.head.fc.weight, plain_loop.network().head.fc.weight)
