"""docs/agc.md: its snippets run in their order, and do what the page says around them."""

import re
import warnings

import pytest

import timm_nf
from tests.support import ROOT

PAGE = (ROOT / "docs" / "agc.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the snippets leave behind."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for snippet in SNIPPETS:
            exec(compile(snippet, "docs/agc.md", "exec"), found)
    return found


def exempt(model, optimizer):
    ids = {id(p) for group in optimizer.param_groups if group["clip_factor"] is None for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_every_snippet_runs_without_a_warning(names, capsys):
    assert len(SNIPPETS) == 8
    assert names["without_model"].param_groups[0]["clip_axis"] == (1, 2)


def test_skip_gains_are_spared_in_addition_to_the_classifier(names):
    optimizer = names["gains_spared"]
    assert exempt(names["model"], optimizer) == {f"stages.{i}.0.skipinit_gain" for i in range(4)}
    spared = [p for group in optimizer.param_groups if group["clip_factor"] is None for p in group["params"]]
    assert [len(p) for p in spared if p.dim() == 2] == [10]  # the classifier, which the page replaces later
    assert len(spared) == 5


def test_the_factor_that_was_set_after_loading_holds(names):
    assert [group["clip_factor"] for group in names["optimizer"].param_groups] == [0.02, 0.02, None]
    assert exempt(names["transformer"], names["optimizer"]) == {"head.weight"}


def test_the_segmentation_head_is_exempt_and_the_decoder_clipped_by_output_channel(names):
    segmenter = names["segmenter"]
    made = timm_nf.param_groups_agc(segmenter, clip_exempt="segmentation_head")
    (head,) = [group["params"] for group in made if group.get("clip_factor", 1) is None]
    (decoder,) = [group["params"] for group in made if group.get("clip_axis") == 1]
    assert head == [segmenter.segmentation_head.weight]
    assert decoder == [segmenter.decoder.weight]


def test_the_page_names_every_loop():
    loops = {*ROOT.glob("examples/with_*.py"), ROOT / "examples" / "plain_loop.py", ROOT / "examples" / "fsdp2.py"}
    assert {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\((\.\./examples/[^)]+)\)", PAGE)} == loops
    for loop in loops:
        (command,) = re.findall(rf"`([^`]* -m examples\.{loop.stem})`", PAGE)
        assert command in loop.read_text()
