"""The training of `examples/`, written out: SGD with Nesterov momentum behind the paper's clipping, in float64."""

import torch
import torch.nn.functional as F

from examples.plain_loop import PARTS, SETTINGS, network, parts
from tests.support.small_problems import loop_of_the_formula


def trajectory(steps, epochs=1, dtype=None, lookahead=0, size=64):
    """The parameters by name after every step, in float64.

    Args:
        steps: Of an epoch.
        epochs: How often the same data come.
        dtype: That of autocast, where gradients are those of the parts of a batch; by default they are those of the
            whole batch in float64.
        lookahead: Every how many steps timm's Lookahead goes half of the way back; 0 for never.
        size: Of a batch.
    """
    model = network()
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # where a loss scaler begins
    data = list(parts(steps, size))
    if dtype is None:
        model = model.double()
        data = [tuple(map(torch.cat, zip(*data[i : i + PARTS], strict=True))) for i in range(0, len(data), PARTS)]
        data = [[(images.double(), labels)] for images, labels in data]
    else:
        data = [data[i : i + PARTS] for i in range(0, len(data), PARTS)]
    momenta, slow, after = {}, {}, []
    for step, batch in enumerate(data * epochs, 1):
        model.zero_grad()
        for images, labels in batch:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(images), labels) / len(batch)
            (loss * scale).backward()
        if all(p.grad.isfinite().all() for p in model.parameters()):
            for name, p in model.named_parameters():
                p.grad /= scale
                _step(name, p, momenta)
                if lookahead and step % lookahead == 0:
                    slow[name] = (slow.get(name, p.data) + p.data) / 2  # timm begins where it looks back first
                    p.data.copy_(slow[name])
        else:
            scale /= 2
        after.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
    return after


def _step(name, p, momenta):
    lr, momentum, decay, factor = (SETTINGS[key] for key in ("lr", "momentum", "weight_decay", "clip_factor"))
    grad = p.grad.double() if name == "head.fc.weight" else loop_of_the_formula(p, factor, 1e-3)[0]
    if p.ndim > 1 and name.rpartition(".")[2] not in ("gain", "skipinit_gain", "bias"):
        grad = grad + decay * p.detach().double()
    momenta[name] = momentum * momenta[name] + grad if name in momenta else grad
    p.data = (p.data.double() - lr * (grad + momentum * momenta[name])).to(p.dtype)


def differences(model, expected):
    """How far each parameter is from the expected one, relative to it."""
    actual = {name: p.detach().double() for name, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    return {
        name: ((p - expected[name]).norm() / expected[name].norm().clamp(1e-3)).item() for name, p in actual.items()
    }


def assert_equal(model, other):
    """Fail at the first parameter that is not the same to the bit."""
    for name, p in model.named_parameters():
        assert torch.equal(other.get_parameter(name), p), name
