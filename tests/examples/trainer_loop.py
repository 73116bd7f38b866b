"""The loop of transformers' Trainer: run by test_other_loops.py, where transformers is installed."""

from timm.optim import create_optimizer_v2
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from examples import plain_loop
from examples.with_trainer import main
from tests.support.formula_loop import assert_equal, differences, trajectory

ROUNDING = 2e-6


def test_it_equals_the_formula_and_has_the_statistics_inside(tmp_path):
    trainer = main(4, output_dir=tmp_path)
    assert max(differences(trainer.model.net, trajectory(4)[-1]).values()) < ROUNDING
    assert [row["units"] for row in trainer.optimizer.optimizer.clip_stats()] == [30, 1136, 0]


def test_lookahead_equals_the_formula(tmp_path):
    trainer = main(12, "lookahead_agcsgd", output_dir=tmp_path)
    assert max(differences(trainer.model.net, trajectory(12, lookahead=6)[-1]).values()) < ROUNDING


def test_in_bfloat16_it_equals_the_plain_loop_to_the_bit(tmp_path):
    trainer = main(2, output_dir=tmp_path, bf16=True)
    assert_equal(plain_loop.main(2, precision="bfloat16"), trainer.model.net)


def test_it_resumes_in_the_middle_to_the_bit(tmp_path):
    whole = main(4, output_dir=tmp_path, save_strategy="steps", save_steps=2)
    resumed = main(4, resume=tmp_path / "checkpoint-2", output_dir=tmp_path / "again")
    assert_equal(whole.model, resumed.model)


def test_the_classifier_inside_transformers_wrapper_alone_is_spared():
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=5))
    (exempt,) = [g for g in create_optimizer_v2(model, "agcsgd").param_groups if g["clip_factor"] is None]
    (weight,) = exempt["params"]
    assert [name for name, p in model.named_parameters() if p is weight] == ["timm_model.fc.weight"]
