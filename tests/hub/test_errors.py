"""What goes wrong with the Hub is one line that says what to do, exit code 1, and no token in it."""

import argparse
import errno
import logging
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError

import timm_nf
from tests.support import small_nets
from tests.support.published import CARD, create
from tests.support.stand_in_hub import TOKENS, answer
from timm_nf.cli import main
from timm_nf.hub import HubError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as train.py writes it."""
    file = tmp_path_factory.mktemp("trained") / "last.pth.tar"
    model, averaged = create(), create()
    torch.nn.init.constant_(averaged.head.fc.bias, 0.25)
    kwargs = small_nets.keywords(small_nets.NETS["NFNet"])
    args = argparse.Namespace(
        model="nfnet_f0", num_classes=kwargs.pop("num_classes"), model_kwargs=kwargs, img_size=48, crop_pct=0.8,
        gp=None, lr=0.4, opt="agcsgd", eval_metric="top1", val_split="validation", dataset="hfds/user/pets",
        data_dir="/home/me/x", model_ema=True, model_ema_force_cpu=False, in_chans=None, interpolation="", mean=None,
        std=None, output="/secret",
    )  # fmt: skip
    content = {
        "epoch": 7, "arch": "nfnet_f0", "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
        "state_dict_ema": averaged.state_dict(), "args": args, "metric": 77.125, "optimizer": {}, "version": 2,
    }  # fmt: skip
    torch.save(content, file)
    return file


@pytest.fixture
def fails(capfd, caplog):
    """Runs a command line that has to fail, and returns its one line."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        captured = capfd.readouterr()
        assert stop.value.code == 1
        (line,) = captured.err.splitlines()
        assert line.startswith("timm-nf: error: ")
        chain, error = "", stop.value.__context__
        while error is not None:
            chain, error = f"{chain}\n{error!r}", error.__cause__ or error.__context__
        assert not [token for token in TOKENS if token in captured.out + captured.err + caplog.text + chain]
        return line

    caplog.set_level(logging.DEBUG)
    return run


def publish(hub: Any, tmp_path: Any, repo_id: str = "alice/net", **kwargs: bool) -> str:
    timm_nf.hub.write_folder(create(), tmp_path / "folder", card=CARD)
    return hub.publish(repo_id, {f.name: f.read_bytes() for f in (tmp_path / "folder").iterdir()}, **kwargs)


def push(checkpoint: Any, repo_id: str = "alice/net", *options: str) -> list[str]:
    return ["push", str(checkpoint), repo_id, "--model", "nfnet_f0", "--license", "mit", *options]


# -- the command line as it should go ----------------------------------------------------------------------------------


def test_push_and_pull(hub, checkpoint, capsys):
    main(push(checkpoint, "alice/net", "--use-ema"))
    out = capsys.readouterr().out
    assert "state_dict_ema" in out
    assert "top1 77.125 on user/pets, split validation, by train.py in epoch 7" in out
    assert f"{hub.url}/alice/net/commit/{hub.repos['alice/net'].refs['main']}" in out
    main(["pull", "alice/net"])
    out = capsys.readouterr().out
    assert f"alice/net@{hub.repos['alice/net'].refs['main']}" in out
    assert "152,303 in float32" in out
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert (pulled.head.fc.bias == 0.25).all()
    assert tuple(pulled.pretrained_cfg["input_size"]) == (3, 48, 48)  # below 1.0.31 timm leaves a list
    assert pulled.pretrained_cfg["crop_pct"] == 0.8
    card = huggingface_hub.ModelCard(hub.repos["alice/net"].files()["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 77.125
    assert card.data.datasets == ["user/pets"]
    assert "| `lr` | `0.4` |" in card.text
    assert "secret" not in str(card)


def test_the_metric_of_the_average_is_not_stated_of_the_other_weights(hub, checkpoint, capsys):
    main(push(checkpoint, "alice/net", "--dry-run"))
    out = capsys.readouterr().out
    assert "77.1" not in out
    assert "nothing was uploaded" in out
    assert "license: mit" in out
    assert hub.requests == []


def test_options_reach_the_hub(hub, checkpoint, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("\n".join(f"pet {i}" for i in range(10)) + "\n")
    main(push(checkpoint, "alice/net", "--private", "--dtype", "float16", "--labels", str(tmp_path / "labels.txt")))
    main(push(checkpoint, "alice/net", "--revision", "v2", "--message", "second", "--overwrite-card"))
    main(push(checkpoint, "alice/net", "--create-pr"))
    repo = hub.repos["alice/net"]
    assert repo.private
    assert set(repo.refs) == {"main", "v2", "refs/pr/1"}
    assert repo.log[2] == "second"
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert pulled.pretrained_cfg["label_names"][9] == "pet 9"
    assert next(pulled.parameters()).dtype == torch.float16


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_not_logged_in(hub, checkpoint, tmp_path, monkeypatch, fails):
    publish(hub, tmp_path, private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("timm_nf.cli.weights.read", None)  # the file is not read first
    assert "hf auth login" in fails(*push(checkpoint))
    assert "hf auth login" in fails("pull", "alice/net")
    assert hub.count("POST") == 0


def test_a_token_that_is_not_valid(hub, checkpoint, tmp_path, monkeypatch, fails):
    publish(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    for line in (fails(*push(checkpoint)), fails("pull", "alice/net")):
        assert "does not accept this login" in line
        assert "hf_expired" not in line


@pytest.mark.parametrize("token", ["hf_with space", "hf_with\nline", "hf_höher"])
@pytest.mark.parametrize("by", ["argument", "login"])
def test_a_token_that_no_header_can_carry_is_not_quoted(hub, token, by, monkeypatch):
    monkeypatch.setattr("timm_nf.hub.client.get_token", lambda: token if by == "login" else None)
    given = token if by == "argument" else None
    for call in (lambda: timm_nf.hub.pull("alice/net", token=given), lambda: push_with(given)):
        with pytest.raises(ValueError, match="printable") as caught:
            call()
        assert token not in repr(caught.value)
        assert caught.value.__cause__ is None


def push_with(token: str | None) -> None:
    timm_nf.hub.push(create(), "alice/net", card=CARD, token=token)


def test_no_such_repository(hub, fails):
    assert "no repository alice/nothing" in fails("pull", "alice/nothing")


@pytest.mark.parametrize("name", ["net with spaces", "a/b/c", "--", "alice/net@a@b"])
def test_no_name_of_a_repository(hub, name, checkpoint, fails):
    if name != "--":
        fails("pull", name)
        assert hub.count("resolve") == 0
    else:
        assert "user/name" in fails(*push(checkpoint, "alice/net--"))


def test_gated(hub, tmp_path, monkeypatch, fails):
    publish(hub, tmp_path, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_bobSecretToken")
    assert f"ask for access on {hub.url}/alice/net" in fails("pull", "alice/net")


def test_somebody_elses_private_repository(hub, checkpoint, tmp_path, monkeypatch, fails):
    publish(hub, tmp_path, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_bobSecretToken")
    assert "or this login has no access" in fails("pull", "alice/net")
    # the name is taken, and whose it is stays hidden
    assert "no repository alice/net" in fails(*push(checkpoint))


def test_no_write_right(hub, checkpoint, tmp_path, monkeypatch, fails):
    publish(hub, tmp_path)
    before = dict(hub.repos["alice/net"].refs)
    monkeypatch.setenv("HF_TOKEN", "hf_bobSecretToken")
    assert "may not do that with alice/net" in fails(*push(checkpoint))
    assert "may not do that with alice/new" in fails(*push(checkpoint, "alice/new"))
    assert hub.repos["alice/net"].refs == before


def test_name_taken(hub, checkpoint, fails):
    hub.publish("alice/net", {"a": b"a"})
    hub.fault("POST /api/models/alice/net/commit", answer(409, message="reserved"))
    assert "alice/net is taken (reserved): choose another name" in fails(*push(checkpoint))


def test_private_is_not_pushed_to_what_is_public(hub, checkpoint, fails):
    hub.publish("alice/net", {"a": b"a"})
    assert "public" in fails(*push(checkpoint, "alice/net", "--private"))
    assert hub.repos["alice/net"].log == ["published by the test"]


def test_revision_unknown(hub, tmp_path, fails):
    publish(hub, tmp_path)
    assert f"no revision 'v9': {hub.url}/alice/net/tree/main" in fails("pull", "alice/net@v9")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_file_is_missing(hub, tmp_path, missing, fails):
    publish(hub, tmp_path)
    files = hub.repos["alice/net"].files() | {"pytorch_model.bin": b"pickle"}
    del files[missing]
    hub.publish("alice/net", files)
    line = fails("pull", "alice/net")
    assert f"no file {missing}" in line
    assert ("pytorch_model.bin, but pickles are not read" in line) == (missing == "model.safetensors")
    assert hub.count("pytorch_model.bin") == 0


@pytest.mark.parametrize("status", [500, 503])
def test_the_hub_has_a_problem(hub, checkpoint, tmp_path, status, fails):
    publish(hub, tmp_path)
    hub.fault("/api/models/alice/net", answer(status), times=99)
    assert f"status {status}): try again later" in fails("pull", "alice/net")
    assert f"status {status}): try again later" in fails(*push(checkpoint))
    assert hub.repos["alice/net"].log == ["published by the test"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "may not do that with alice/net (not here)"),
        (407, "the Hub refuses what was sent about alice/net (status 407: not here)"),
        (500, "(status 500): try again later"),
    ],
)
def test_an_answer_about_a_file_is_told_as_one_about_the_repository(hub, tmp_path, status, message, file, fails):
    publish(hub, tmp_path)
    hub.fault(f"resolve/.*{file}", answer(status, message="not here"), times=99)
    assert message in fails("pull", "alice/net")


def test_a_status_without_a_reason_is_said_once(hub, tmp_path, fails):
    publish(hub, tmp_path)
    hub.fault("/api/models/alice/net", answer(451), times=99)
    assert fails("pull", "alice/net").endswith("the Hub refuses what was sent about alice/net (status 451)")


def test_rate_limited(hub, checkpoint, tmp_path, fails):
    publish(hub, tmp_path)
    hub.fault("/api/models/alice/net", answer(429, Retry_After="60"), times=99)
    assert "wait some minutes" in fails("pull", "alice/net")
    assert "wait some minutes" in fails(*push(checkpoint))


def test_the_server_is_down(hub, checkpoint, monkeypatch, fails):
    hub.stop()
    assert "cannot be reached" in fails("pull", "alice/net")
    assert "cannot be reached" in fails(*push(checkpoint))


def test_offline_and_not_in_the_cache(hub, monkeypatch, fails):
    with pytest.raises(HubError, match="not in the cache"):
        timm_nf.hub.pull("alice/net", local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "unset" in fails("pull", "alice/net")
    assert hub.requests == []


def test_the_disk_is_full(hub, checkpoint, tmp_path, monkeypatch, fails):
    publish(hub, tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/file")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert "the disk is full (/cache/file)" in fails("pull", "alice/net")
    monkeypatch.setattr("timm_nf.hub.folder.save_config_for_hf", full)
    assert "the disk is full (/cache/file)" in fails(*push(checkpoint))


def test_the_disk_is_full_for_safetensors_too(hub, checkpoint, monkeypatch, fails):
    def full(*args: Any, **kwargs: Any) -> None:  # in its words, seen under a limit of file sizes
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("timm_nf.hub.folder.save_file", full)
    assert "could not be written" in fails(*push(checkpoint, "alice/net", "--dry-run"))


def test_weights_of_another_architecture(hub, tmp_path, fails):
    publish(hub, tmp_path)
    files = hub.repos["alice/net"].files()
    hub.publish("alice/net", files | {"config.json": files["config.json"].replace(b'"nfnet_f0"', b'"dm_nf_resnet50"')})
    assert "another architecture" in fails("pull", "alice/net")
    hub.publish("alice/net", files | {"config.json": b'{"architecture": "no_such_net", "pretrained_cfg": {}}'})
    assert "no_such_net" in fails("pull", "alice/net")
    for broken in (b"", b"[1]", b"{}", b'{"architecture": 3}', b"\xff\xfe"):
        hub.publish("alice/net", files | {"config.json": broken})
        assert "config.json of alice/net@" in fails("pull", "alice/net")


def test_weights_that_are_no_weights(hub, tmp_path, fails):
    publish(hub, tmp_path)
    files = hub.repos["alice/net"].files()
    for broken in (b"", b"\0" * 100, files["model.safetensors"][:5000], b"\xff" * 8 + b"{}"):
        hub.publish("alice/net", files | {"model.safetensors": broken})
        assert "no safetensors file" in fails("pull", "alice/net")


def test_wrong_number_of_classes(hub, checkpoint, tmp_path, fails):
    assert "has 10 classes, the network 7" in fails(*push(checkpoint, "alice/net", "--num-classes", "7"))
    publish(hub, tmp_path)
    files = hub.repos["alice/net"].files()
    config = files["config.json"].replace(b'"num_classes": 10', b'"num_classes": 12')
    hub.publish("alice/net", files | {"config.json": config})
    assert "has 10 classes, the network 12" in fails("pull", "alice/net")


def test_weights_of_stock_timms_network_of_the_same_name(hub, tmp_path, fails):
    args = {
        "depths": (1, 1),
        "channels": (128, 128),
        "stem_chs": 64,  # as ours would have it, so that all convolutions are there
        "num_features": 64,
        "group_size": 8,
        "attn_kwargs": {"rd_ratio": 0.5},
    }
    stock = timm.models.nfnet.nfnet_f0(**args)
    timm.models.save_for_hf(stock, str(tmp_path), model_args=args, safe_serialization=True)
    hub.publish("alice/net", {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()})
    assert "timm's own nfnet_f*" in fails("pull", "alice/net")


def test_a_sha256_that_is_not_the_files(hub, tmp_path, fails):
    publish(hub, tmp_path)
    right = hub.repos["alice/net"].commits[hub.repos["alice/net"].refs["main"]]["model.safetensors"].sha256
    main(["pull", "alice/net", "--sha256", right.upper()])
    assert f"got {right}" in fails("pull", "alice/net", "--sha256", "0" * 64)
    assert "64 hexadecimal digits" in fails("pull", "alice/net", "--sha256", "abc")


def test_debug_shows_the_traceback(hub):
    with pytest.raises(HubError, match="no repository") as caught:
        main(["pull", "alice/nothing", "--debug"])
    assert type(caught.value.__cause__).__name__ == "RepositoryNotFoundError"


def test_without_a_license_nothing_is_written_or_asked_first(hub, monkeypatch):
    def written(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was written")

    monkeypatch.setattr("timm_nf.hub.client.write_folder", written)
    monkeypatch.setattr("timm_nf.hub.client.temporary_folder", written)
    monkeypatch.delenv("HF_TOKEN")
    for card in (None, {}, {"license": " "}, ModelCardData(tags=["mine"])):
        with pytest.raises(ValueError, match="license is required"):
            timm_nf.hub.push(create(), "alice/net", card=card)
    assert hub.requests == []


def test_what_cannot_be_saved_says_why(hub):
    def refuses(model: Any, match: str, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=match):
            timm_nf.hub.push(model, "alice/net", **({"card": CARD} | kwargs))

    refuses(create(), "license is required", card=None)
    refuses(create(), "license is required", card={"tags": ["mine"]})
    refuses(torch.nn.Linear(2, 2), "timm.create_model")
    refuses(create(), "not both", create_pr=True, revision="v1")
    refuses(create(), "knows no architecture", architecture="no_such_net")
    refuses(create(), "as resnet18", architecture="resnet18")
    refuses(create(), "floating", dtype=torch.int8)
    broken = create()
    torch.nn.init.constant_(broken.head.fc.bias, float("nan"))
    refuses(broken, "head.fc.bias is NaN or infinite")
    large = create()
    torch.nn.init.constant_(large.head.fc.bias, 1e30)
    refuses(large, "head.fc.bias is too large for torch.float16", dtype=torch.float16)
    mixed = create()
    mixed.head.half()
    refuses(mixed, "one floating dtype")
    refuses(small_nets.create("NFNet", device="meta"), "meta")
    stock = timm.create_model("nf_resnet50", depths=(1, 1), channels=(32, 48), num_classes=4)
    refuses(timm_nf.fuse(stock), r"timm's own nf_resnet50 .*timm-nf export")
    assert hub.requests == []
