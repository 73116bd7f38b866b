"""Push and pull as they should go, with the real client and a stand-in Hub."""

import json
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import timm_nf
from tests.support import OLD_TIMM, small_nets
from tests.support.published import CARD, LABELS, create, logits
from tests.support.saving import save_for_hf
from timm_nf.inference.classify import labels
from timm_nf.inference.named import canonical_name

# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", small_nets.FAMILIES)
def test_what_is_pushed_is_pulled(hub, family):
    model = create(family)
    written = timm_nf.hub.push(model, "alice/net", card=CARD)
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert not pulled.training
    assert torch.equal(logits(pulled), logits(model))
    assert pulled.state_dict().keys() == model.state_dict().keys()
    assert all(p.requires_grad and p.data_ptr() % 64 == 0 for p in pulled.parameters())
    assert pulled.pretrained_cfg["crop_pct"] == 0.77
    assert pulled.pretrained_cfg["label_names"] == LABELS
    assert pulled.pretrained_cfg["hf_hub_id"] == f"alice/net@{written.commit}"


def test_timm_loads_what_is_pushed(hub):
    model = create()
    timm_nf.hub.push(model, "alice/net", card=CARD)
    loaded: Any = timm.create_model("hf-hub:alice/net", pretrained=True)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.pretrained_cfg["label_names"] == LABELS
    assert timm.create_model("hf-hub:alice/net", pretrained=True, num_classes=3).num_classes == 3


def test_what_timm_pushes_is_pulled(hub):
    model = create()
    timm.models.push_to_hf_hub(model, "alice/net", safe_serialization=True)
    if OLD_TIMM:  # it records no depths and widths
        with pytest.raises(ValueError, match="is of another architecture: of 233 names it lacks 119"):
            timm_nf.hub.pull("alice/net")
        return
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(model))


def test_pretrained_weights_come_through_timms_own_path(hub, tmp_path):
    model = timm.create_model("dm_nf_regnet_b0")
    save_for_hf(model, str(tmp_path / "regnet"), safe_serialization=True)
    hub.publish("timm/regnet", {f.name: f.read_bytes() for f in (tmp_path / "regnet").iterdir()})
    cfg = {"hf_hub_id": "timm/regnet"}
    loaded: Any = timm.create_model("dm_nf_regnet_b0", pretrained=True, pretrained_cfg_overlay=cfg)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_one_commit_has_three_files_and_no_pickle(hub):
    written = timm_nf.hub.push(create(), "alice/net", card=CARD, commit_message="first")
    repo = hub.repos["alice/net"]
    assert repo.log == ["initial commit", "first"]
    assert set(repo.files()) - {".gitattributes"} == {"model.safetensors", "config.json", "README.md"}
    assert repo.commits[repo.refs["main"]]["model.safetensors"].sha256 == written.sha256
    assert written.url == f"{hub.url}/alice/net/commit/{repo.refs['main']}"
    assert written.files == {name: len(data) for name, data in repo.files().items() if name != ".gitattributes"}


def test_config_has_what_is_not_the_default_and_the_key_that_stops_stock_timm(hub):
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    config = json.loads(hub.repos["alice/net"].files()["config.json"])
    net = small_nets.keywords(small_nets.NETS["NFNet"])
    assert net.pop("num_classes") == config["num_classes"]
    assert config["model_args"].items() >= {k: list(v) if isinstance(v, tuple) else v for k, v in net.items()}.items()
    assert config["model_args"]["fused"] is False
    assert config["label_names"] == LABELS
    # not the license and the tag of the published weights of this architecture
    assert config["pretrained_cfg"]["license"] == "mit"
    assert "tag" not in config["pretrained_cfg"]


def published_config(hub: Any) -> dict[str, Any]:
    return json.loads(hub.repos["alice/net"].files()["config.json"])


@pytest.mark.parametrize("num_classes", [0, 3, 10, 1000])
def test_the_number_of_classes_is_in_the_config_once_and_timm_reads_it_there(hub, num_classes):
    model = small_nets.create("NFNet", num_classes=num_classes, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    written = timm_nf.hub.push(model, "alice/net", card=CARD)
    assert published_config(hub)["num_classes"] == num_classes
    assert "num_classes" not in published_config(hub)["model_args"]
    loaded: Any = timm.create_model("hf-hub:alice/net", pretrained=True)
    assert loaded.num_classes == num_classes
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(model))
    assert (f"num_classes={num_classes}" in written.card) == (num_classes != 1000)


@pytest.mark.parametrize("name", ["nfnet_f0", "test_resnet"])
def test_what_transformers_calls_builds_the_network(hub, name):
    small = small_nets.keywords(small_nets.NETS["NFNet"]) if name == "nfnet_f0" else {"num_classes": 10}
    model = timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, 64, 64)}, **small)
    timm_nf.hub.push(model, "alice/net", card=CARD)
    config = published_config(hub)
    if OLD_TIMM and name == "test_resnet":  # nor anything of timm's own networks
        assert "model_args" not in config
        return
    # as TimmWrapperForImageClassification and, with 0 classes, TimmWrapperModel do
    for num_classes in (config["num_classes"], 0):
        built: Any = timm.create_model(
            config["architecture"], pretrained=False, num_classes=num_classes, **config["model_args"]
        )
        assert built.num_classes == num_classes
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        if not num_classes:
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith(("head.fc", "fc"))}
        assert {key: tensor.shape for key, tensor in built.state_dict().items()} == shapes


def test_a_classifier_that_was_replaced_is_loaded_with_its_own_number_of_classes(hub):
    model = create()
    model.reset_classifier(4)
    timm_nf.hub.push(model, "alice/net", card=CARD)
    loaded: Any = timm.create_model("hf-hub:alice/net", pretrained=True)
    assert loaded.num_classes == 4
    assert torch.equal(logits(loaded), logits(model))


def test_other_classes_than_the_saved_ones_keep_all_but_the_classifier(hub):
    model = create()
    timm_nf.hub.push(model, "alice/net", card=CARD)
    loaded: Any = timm.create_model("hf-hub:alice/net", pretrained=True, num_classes=7)
    kept = {name: tensor for name, tensor in loaded.state_dict().items() if not name.startswith("head.fc")}
    assert loaded.state_dict()["head.fc.weight"].shape[0] == 7
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())


def test_what_timm_saves_has_the_number_twice_and_is_pulled(hub, tmp_path):
    model = create()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    hub.publish("alice/net", {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()})
    assert published_config(hub)["model_args"]["num_classes"] == published_config(hub)["num_classes"] == 10
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(model))


def test_labels_of_the_weights_that_a_network_started_from_are_not_published(hub):
    model = create_with_labels([f"old {i}" for i in range(1000)])  # as many as the architecture's weights have
    timm_nf.hub.push(model, "alice/net", card=CARD)
    assert "label_names" not in json.loads(hub.repos["alice/net"].files()["config.json"])


WRONG_LABELS: list[tuple[Any, Any, str]] = [
    (LABELS[:9], None, "expected 10 labels in {}, one for each class, got 9"),
    ([*LABELS, "a", "b"], None, "expected 10 labels in {}, one for each class, got 12"),
    ([*LABELS[:9], 9], None, r"expected texts as labels in {}, got 9 \(int\)"),
    (dict.fromkeys(LABELS, 1), None, "expected label_names of {} as a list, got dict"),
    (LABELS, {LABELS[0]: "first"}, "expected a description of every label in {}, got none of 9, say 'kind 1'"),
    (LABELS, ["first"], "expected label_descriptions of {} by label, got list"),
]


@pytest.mark.parametrize(("names", "descriptions", "message"), WRONG_LABELS)
def test_labels_that_do_not_fit_are_refused_when_written_and_when_read(hub, tmp_path, names, descriptions, message):
    model = create_with_labels(names)
    model.pretrained_cfg["label_descriptions"] = descriptions
    with pytest.raises(ValueError, match=message.format("the model's config")):
        timm_nf.hub.write_folder(model, tmp_path / "net", card=None)
    assert list(tmp_path.glob("*net*")) == []
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    files = hub.repos["alice/net"].files()
    config = json.loads(files["config.json"]) | {"label_names": names, "label_descriptions": descriptions}
    hub.publish("alice/net", files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=message.format("config.json of alice/net@[0-9a-f]{40}")):
        timm_nf.hub.pull("alice/net")
    with pytest.raises(ValueError, match=message.format("the network's config")):
        labels(timm.create_model("hf-hub:alice/net", pretrained=True))


def test_labels_with_descriptions_are_kept(hub):
    model = create()
    model.pretrained_cfg["label_descriptions"] = {name: f"a {name}" for name in LABELS}
    timm_nf.hub.push(model, "alice/net", card=CARD)
    assert labels(timm_nf.hub.pull("alice/net"))[3] == "a kind 3"


def create_with_labels(labels: list[str]) -> Any:
    model = create()
    model.pretrained_cfg["label_names"] = labels
    return model


def test_a_pulled_network_pushed_again_states_its_base(hub):
    first = timm_nf.hub.push(create(), "alice/net", card=CARD)
    again = timm_nf.hub.push(timm_nf.hub.pull("alice/net"), "alice/tuned", card=CARD)
    card = ModelCard(again.card)
    assert card.data.base_model == "alice/net"
    assert f"alice/net@{first.commit}" in card.text
    # the registry's address of published weights is no statement about these
    assert ModelCard(first.card).data.base_model is None


# -- forms of weights --------------------------------------------------------------------------------------------------


def test_channels_last_is_saved_and_left_as_it_was(hub):
    model = create().to(memory_format=torch.channels_last)
    timm_nf.hub.push(model, "alice/net", card=CARD)
    assert model.stages[0][0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    pulled = timm_nf.hub.pull("alice/net")
    assert torch.equal(logits(pulled), logits(model.to(memory_format=torch.contiguous_format)))


def test_a_model_in_training_stays_as_it_is(hub):
    model = create(drop_rate=0.5, drop_path_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timm_nf.hub.push(model, "alice/net", card=CARD, dtype=torch.bfloat16)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(hub, dtype):
    model = create()
    written = timm_nf.hub.push(model, "alice/net", card=CARD, dtype=dtype)
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert {p.dtype for p in pulled.parameters()} == {dtype}
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(pulled.parameters(), model.parameters(), strict=True))
    assert str(dtype).removeprefix("torch.") in written.card
    assert written.files["model.safetensors"] < 0.55 * sum(p.nbytes for p in model.parameters())


def test_double_precision(hub):
    model = create().double()
    timm_nf.hub.push(model, "alice/net", card=CARD)
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(model))


@pytest.mark.parametrize("wrapped_as", ["module", "_orig_mod"])  # by DistributedDataParallel, by torch.compile
def test_a_wrapped_model_is_saved_as_what_it_wraps(hub, wrapped_as):
    model, wrapper = create(), torch.nn.Module()
    setattr(wrapper, wrapped_as, model)
    timm_nf.hub.push(wrapper, "alice/net", card=CARD)
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(model))


def test_a_fused_network_comes_back_fused(hub):
    args = small_nets.keywords(small_nets.NETS["NFNet"])
    fused: Any = timm.create_model("nfnet_f0", fused=True, pretrained_cfg_overlay={"input_size": (3, 64, 64)}, **args)
    timm_nf.hub.push(fused, "alice/net", card=CARD)
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert pulled.fused
    assert torch.equal(logits(pulled), logits(fused))


def test_as_a_network_of_timm_the_card_states_the_deviation(hub):
    overlay = {"input_size": (3, 64, 64)}
    # timm derives the inner widths of the stem from the last, and has its own numbers for the others
    model = small_nets.create("NFNet", num_features=192, stem_chs=128, pretrained_cfg_overlay=overlay).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("skipinit_gain"):
            torch.nn.init.constant_(parameter, 0.7)
    written = timm_nf.hub.push(model, "alice/net", card=CARD, architecture="dm_nfnet_f0")
    ((_, value),) = [check for check in written.checks if "dm_nfnet_f0" in check[0]]
    loaded: Any = timm.create_model("hf-hub:alice/net", pretrained=True)
    assert type(loaded).__module__ == "timm.models.nfnet"
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = model(noise), loaded.eval()(noise)
    deviation = ((got - want).norm() / want.norm()).item()
    assert 1e-4 < deviation < 0.2
    assert value == f"{deviation:.1e}"
    assert value in written.card
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(loaded))


def test_buffers_that_no_file_has_are_there_after_a_pull(hub):
    model: Any = timm.create_model("test_vit3", num_classes=5).eval()
    timm_nf.hub.push(model, "alice/net", card=CARD)
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert not any(t.is_meta for t in [*pulled.parameters(), *pulled.buffers()])
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(pulled(x), model(x))


# -- where to ----------------------------------------------------------------------------------------------------------


def test_dry_run_does_everything_but_talk(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    written = timm_nf.hub.push(create(), "alice/net", card=CARD, dry_run=True)
    assert hub.requests == []
    assert written.url is None
    assert set(written.files) == {"model.safetensors", "config.json", "README.md"}
    assert [check[1] for check in written.checks] == ["114 of 114 equal", "equal to the bit"]


def test_private_stays_private(hub):
    timm_nf.hub.push(create(), "alice/net", card=CARD, private=True)
    assert hub.repos["alice/net"].private
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    assert hub.repos["alice/net"].private
    assert timm_nf.hub.pull("alice/net", token="hf_aliceSecretToken")


def test_a_branch_is_made_and_main_left_alone(hub):
    first = timm_nf.hub.push(create(), "alice/net", card=CARD)
    second = timm_nf.hub.push(create(), "alice/net", card=CARD, revision="with/slash", dtype=torch.float16)
    assert hub.repos["alice/net"].refs == {"main": first.commit, "with/slash": second.commit}
    half: Any = timm_nf.hub.pull("alice/net@with/slash")
    assert next(half.parameters()).dtype == torch.float16
    assert half.pretrained_cfg["hf_hub_id"] == f"alice/net@{second.commit}"
    whole: Any = timm_nf.hub.pull("alice/net", revision=first.commit)
    assert next(whole.parameters()).dtype == torch.float32


def test_a_pull_request_leaves_main_alone(hub, monkeypatch):
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    before = hub.repos["alice/net"].refs["main"]
    monkeypatch.setenv("HF_TOKEN", "hf_bobSecretToken")
    written = timm_nf.hub.push(create(), "alice/net", card=CARD, dtype=torch.float16, create_pr=True)
    assert hub.repos["alice/net"].refs == {"main": before, "refs/pr/1": written.commit}
    assert written.url == f"{hub.url}/alice/net/discussions/1"
    assert timm_nf.hub.pull("alice/net", revision="refs/pr/1")


def test_a_pull_request_that_is_there_is_updated(hub, monkeypatch):
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    before = hub.repos["alice/net"].refs["main"]
    monkeypatch.setenv("HF_TOKEN", "hf_bobSecretToken")
    timm_nf.hub.push(create(), "alice/net", card=CARD, dtype=torch.bfloat16, create_pr=True)
    written = timm_nf.hub.push(create(), "alice/net", card=CARD, dtype=torch.float16, revision="refs/pr/1")
    assert hub.repos["alice/net"].refs == {"main": before, "refs/pr/1": written.commit}
    assert written.url == f"{hub.url}/alice/net/discussions/1"
    assert hub.count("POST .*/branch/") == 0
    pulled: Any = timm_nf.hub.pull("alice/net@refs/pr/1")
    assert next(pulled.parameters()).dtype == torch.float16


def test_a_pull_request_that_is_not_there_is_not_made(hub):
    for repo_id, message in (("alice/net", "has no revision 'refs/pr/7'"), ("alice/new", "no repository alice/new")):
        if repo_id == "alice/net":
            timm_nf.hub.push(create(), repo_id, card=CARD)
        with pytest.raises(timm_nf.hub.HubError, match=message):
            timm_nf.hub.push(create(), repo_id, card=CARD, revision="refs/pr/7")
    assert "alice/new" not in hub.repos
    assert set(hub.repos["alice/net"].refs) == {"main"}


SPELLINGS = [
    *("hf-hub:alice/net", "hf_hub:alice/net", "alice/net/", "hf-hub:alice/net/"),
    *("https://huggingface.co/alice/net", "https://huggingface.co/alice/net/", "http://127.0.0.1:1/alice/net"),
    *("https://huggingface.co/alice/net/tree/main", "https://huggingface.co/alice/net?library=timm", "alice/net@main"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_repository_may_be_written_as_it_is_seen(hub, spelling):
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    pulled: Any = timm_nf.hub.pull(spelling)
    assert pulled.pretrained_cfg["hf_hub_id"] == f"alice/net@{hub.repos['alice/net'].refs['main']}"
    assert timm_nf.hub.push(create(), spelling, card=CARD, dry_run=True).url is None
    assert (
        canonical_name(spelling if ":" in spelling else f"hf-hub:{spelling}").removesuffix("@main")
        == "hf-hub:alice/net"
    )
    assert set(hub.repos) == {"alice/net"}


def test_an_existing_card_stays_unless_told_otherwise(hub):
    hub.publish("alice/net", {"README.md": b"---\nlicense: mit\n---\nmine"})
    written = timm_nf.hub.push(create(), "alice/net", card=CARD)
    assert hub.repos["alice/net"].files()["README.md"] == b"---\nlicense: mit\n---\nmine"
    assert "README.md" not in written.files
    timm_nf.hub.push(create(), "alice/net", card=CARD, overwrite_card=True)
    assert b"timm_nf" in hub.repos["alice/net"].files()["README.md"]


def test_a_folder_has_the_same_files_and_keeps_its_card(tmp_path):
    written = timm_nf.hub.write_folder(create(), tmp_path / "net", card=CARD)
    assert {f.name: f.stat().st_size for f in (tmp_path / "net").iterdir()} == written.files
    assert [f.name for f in tmp_path.iterdir()] == ["net"]
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)), logits(create()))
    (tmp_path / "net" / "README.md").write_text("mine")
    timm_nf.hub.write_folder(create(), tmp_path / "net", card=CARD)
    assert (tmp_path / "net" / "README.md").read_text() == "mine"
    timm_nf.hub.write_folder(create(), tmp_path / "net", card=CARD, overwrite_card=True)
    assert (tmp_path / "net" / "README.md").read_text() == written.card


def test_the_cards_snippet_runs(hub, tmp_path, monkeypatch):
    from PIL import Image

    written = timm_nf.hub.push(create(), "alice/net", card=CARD)
    code = written.card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 70), "teal").save("picture.png")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape == (1, 10)
