import ast
import re
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tests.support import ROOT
from timm_nf.cli import main
from timm_nf.hub import card

FACTS = {
    "architecture": "nfnet_f0", "arguments": {}, "source": "hf-hub:user/net", "parameters": 1234567, "dtype": "float32",
    "sha256": "ab" * 32, "size": 4938268, "versions": {"timm": "1.0", "torch": "2.0"},
}  # fmt: skip
RESULT = EvalResult("image-classification", "user/pets", "pets", "accuracy", 91.25)


def network(given: Any = None, **facts: Any) -> ModelCard:
    data = card.metadata(given or {"license": "mit"}, "net", "user/base" if facts.get("base") else None)
    return ModelCard(card.network_card(data, "user/net", card.Facts(**(FACTS | facts))))


def test_the_repositorys_card_comes_from_the_renderer():
    command = "python -m scripts.model_card"
    assert (ROOT / "MODEL_CARD.md").read_text() == card.zoo(), command
    assert command in (card.__doc__ or "")


def test_the_zoos_numbers_are_those_the_command_line_prints(capsys):
    main(["list"])
    printed = [line.replace(" / ", "/").split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| (\d+) / (\d+) \| (\S+) \|$", card.zoo(), re.M)
    assert [[name, params, macs, f"{a}/{b}", weights] for name, params, macs, a, b, weights in rows] == printed


def test_nothing_is_left_to_fill_in():
    assert "{" not in card.zoo()


@pytest.mark.parametrize("given", [None, {}, {"license": ""}, {"license": None}, ModelCardData(tags=["x"])])
def test_a_license_is_required_and_not_guessed(given):
    with pytest.raises(ValueError, match="license is required"):
        card.metadata(given, "net")


def test_metadata_is_what_was_given_and_what_timm_needs():
    data = network({"license": "cc-by-4.0", "tags": ["pets", "timm"], "datasets": ["user/pets"]}).data.to_dict()
    assert data == {
        "license": "cc-by-4.0", "library_name": "timm", "pipeline_tag": "image-classification",
        "tags": ["pets", "timm", "image-classification", "timm_nf"], "datasets": ["user/pets"],
    }  # fmt: skip


def test_given_metadata_is_not_changed():
    for given in ({"license": "mit", "eval_results": [RESULT]}, ModelCardData(license="mit", tags=["a"])):
        before = repr(given)
        card.metadata(given, "net", "user/base")
        assert repr(given) == before


def test_evaluation_results_are_a_model_index_and_a_table():
    made = network({"license": "mit", "eval_results": [RESULT]})
    (index,) = made.data.to_dict()["model-index"]
    assert index["name"] == "net"
    assert index["results"][0]["metrics"] == [{"type": "accuracy", "value": 91.25}]
    assert "| pets |  | accuracy | 91.25 |" in made.text
    assert "## Results" not in network().text


def test_facts_are_stated():
    text = network(recipe={"lr": 0.1, "opt_kwargs": {"clip_factor": 0.01}, "aa": "a|b"}).text
    for fact in ("1,234,567 parameters", "float32", "ab" * 32, "4,938,268 bytes", "timm 1.0, torch 2.0"):
        assert fact in text
    assert "| `lr` | `0.1` |" in text
    assert "| `aa` | `a\\|b` |" in text
    assert "| `opt_kwargs` | `{'clip_factor': 0.01}` |" in text


def test_other_arguments_than_the_default_are_stated():
    assert "`nfnet_f0` of timm_nf, 1,234" in network().text
    text = network(arguments={"depths": (1, 2), "act_layer": "relu"}).text
    assert "`nfnet_f0` of timm_nf with `depths=(1, 2), act_layer='relu'`, 1,234,567 parameters" in text


def test_the_base_is_stated_with_its_commit():
    made = network(base="user/base@" + "0" * 40)
    assert made.data.base_model == "user/base"
    assert "user/base@" + "0" * 40 in made.text
    assert network({"license": "mit", "base_model": "other/net"}, base="user/base@0").data.base_model == "other/net"


def test_only_our_networks_ask_for_our_import():
    assert "import timm_nf" in network().text
    stock = network(architecture="dm_nfnet_f0", deviation=0.0182).text
    assert "import timm_nf" not in stock
    assert "1.8e-02" in stock
    assert "equal logits" not in stock
    assert "equal logits" in network().text
    assert "import timm_nf" not in network(architecture="resnet18").text


@pytest.mark.parametrize("name", ["hub/card", "_variant_table", "variants"])
def test_it_needs_neither_torch_nor_a_network(name):
    source = ast.parse((ROOT / "timm_nf" / f"{name}.py").read_text())
    imported = {node.module or "" for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {
        "copy",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "typing",
        "collections.abc",
        "huggingface_hub",
        "variants",
        "_text",
        "_variant_table",
    }
    assert imported <= allowed
