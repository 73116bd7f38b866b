"""Lightning's loop: run by test_other_loops.py, where Lightning is installed."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from examples import plain_loop
from examples.plain_loop import SETTINGS
from examples.with_lightning import Digits, main
from tests.support.formula_loop import assert_equal, differences, trajectory
from timm_nf import unitwise_norm

ROUNDING = 2e-6


def furthest(trainer, expected):
    return max(differences(trainer.lightning_module.net, expected).values())


def test_it_equals_the_formula_and_prints_what_was_clipped(capsys):
    expected = trajectory(4)[-1]
    trainer = main(4)
    assert "% of 1136 units clipped" in capsys.readouterr().out
    assert furthest(trainer, expected) < ROUNDING


def test_lookahead_equals_the_formula():
    assert furthest(main(12, Digits("lookahead_agcsgd")), trajectory(12, lookahead=6)[-1]) < ROUNDING


def test_in_bfloat16_it_equals_the_plain_loop_to_the_bit():
    trainer = main(2, precision="bf16-mixed")
    assert_equal(plain_loop.main(2, precision="bfloat16"), trainer.lightning_module.net)


def test_with_a_loss_scaler_it_equals_the_plain_loop_to_the_bit():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = main(3, plugins=plugin)
    assert_equal(plain_loop.main(3, precision="float16"), trainer.lightning_module.net)


def test_it_resumes_in_the_middle_to_the_bit(tmp_path):
    whole = main(2, max_epochs=2)
    main(2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = main(2, resume=tmp_path / "half.ckpt", max_epochs=2)
    assert_equal(whole.lightning_module, resumed.lightning_module)
    assert_equal_state(whole.optimizers[0], resumed.optimizers[0])


def assert_equal_state(optimizer, other):
    torch.testing.assert_close(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_the_exponential_average_is_that_of_the_formula():
    after = trajectory(4)
    average = after[0]  # the first update copies
    for step in after[1:]:
        average = {name: 0.75 * average[name] + 0.25 * p for name, p in step.items()}
    assert furthest(main(4, callbacks=EMAWeightAveraging(decay=0.75)), average) < ROUNDING


def test_stochastic_weight_averaging_is_that_of_the_formula():
    after = trajectory(2, epochs=3)
    swa = StochasticWeightAveraging(swa_lrs=SETTINGS["lr"], swa_epoch_start=2)
    trainer = main(2, max_epochs=3, callbacks=swa)  # averages as epochs begin: the second, the third
    expected = {name: (after[1][name] + after[3][name]) / 2 for name in after[0]}
    assert furthest(trainer, expected) < ROUNDING


def test_the_modules_classifier_alone_is_spared():
    module = Digits()
    (exempt,) = [g for g in module.configure_optimizers().param_groups if g["clip_factor"] is None]
    assert [id(p) for p in exempt["params"]] == [id(module.net.head.fc.weight)]


# Fine-tuning: a frozen backbone, which is unfrozen later


class Finetuned(Digits):
    """Clipped gradients are seen after every step of the optimizer."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleList([self.net.stem, self.net.stages, self.net.final_conv])
        self.clipped = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.clipped.append({n: p.grad for n, p in self.of_net()}))
        return optimizer

    def of_net(self):
        return [(n, p) for n, p in self.net.named_parameters() if p.grad is not None]


class Finetuning(BackboneFinetuning):
    """Lightning leaves a backbone frozen where it resumes after unfreezing it."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers[0].param_groups) == 3:
            self.make_trainable(pl_module.backbone)


def finetuned(*callbacks, **options):
    module = Finetuned()
    unfreeze = Finetuning(1, lambda _: 1.0, backbone_initial_ratio_lr=1.0, should_align=False, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", lambda *_, **__: clear(module))
        return main(1, module, max_epochs=3, callbacks=[unfreeze, *callbacks], enable_checkpointing=True, **options)


def clear(module):
    for p in module.parameters():
        p.grad = None


def exceeding(module):
    """Names of the weights with units beyond their limit in the last step: of those that are not clipped."""
    weights = {name: p.detach() for name, p in module.net.named_parameters() if name.endswith(".weight")}
    limit = SETTINGS["clip_factor"] * 1.5  # weights have moved by a step since
    return {
        name
        for name, weight in weights.items()
        if (unitwise_norm(module.clipped[-1][name]) > limit * unitwise_norm(weight).clamp(1e-3)).any()
    }


def test_an_unfrozen_backbone_is_clipped_as_in_one_go_also_after_resuming(tmp_path):
    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = finetuned(every_epoch)
    module = whole.lightning_module
    assert len(whole.optimizers[0].param_groups) == 3  # the head in two, and one that was added
    assert set(module.clipped[0]) == {"head.fc.weight", "head.fc.bias"}
    assert set(module.clipped[-1]) == {name for name, _ in module.net.named_parameters()}
    assert exceeding(module) == {"head.fc.weight"}
    for epoch in (0, 1):  # before and after the unfreezing
        resumed = finetuned(ModelCheckpoint(tmp_path / "again"), resume=tmp_path / f"epoch={epoch}.ckpt")
        assert exceeding(resumed.lightning_module) == {"head.fc.weight"}
        assert_equal(module.net, resumed.lightning_module.net)
