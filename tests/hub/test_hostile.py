"""Repositories and names that were made to harm: a pull is refused in one line, or loads nothing but weights."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save
from torch.torch_version import TorchVersion

import timm_nf
from tests.support.published import CARD, create, logits
from tests.support.stand_in_hub import answer
from timm_nf.cli import main
from timm_nf.hub import HubError


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A small network in Hub layout."""
    folder = tmp_path_factory.mktemp("hostile") / "folder"
    timm_nf.hub.write_folder(create(), folder, card=CARD)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def repo(hub, files):
    """Publishes the network with other files. Returns the files as they were."""

    def publish(**changed: bytes) -> dict[str, bytes]:
        hub.publish("alice/net", files | {name.replace("_", "."): data for name, data in changed.items()})
        return files

    return publish


def refusal() -> str:
    with pytest.raises((ValueError, HubError, RuntimeError)) as caught:
        timm_nf.hub.pull("alice/net")
    return str(caught.value)


# -- config.json -------------------------------------------------------------------------------------------------------


def changed_config(files: dict[str, bytes], part: str, key: str, value: Any) -> bytes:
    config = json.loads(files["config.json"])
    (config[part] if part else config)[key] = value
    return json.dumps(config).encode()


ARGS = [
    ("checkpoint_path", "/etc/passwd"), ("pretrained", True), ("pretrained_cfg", {"file": "/etc/passwd"}),
    ("pretrained_cfg_overlay", {"url": "http://127.0.0.1:1"}), ("cache_dir", "/tmp/evil"), ("features_only", True),
    ("model_cls", "os.system"), ("act_layer", "os.system"), ("act_layer", ["x"]), ("__class__", "x"), ("self", 1),
    ("depths", []), ("depths", [-1, 2, 1, 1]), ("depths", [1e9, 1, 1, 1]), ("depths", "a"), ("channels", [10**12] * 4),
    ("channels", None), ("num_classes", -1), ("num_classes", "ten"), ("num_classes", 10**12), ("in_chans", 10**9),
    ("group_size", -3), ("bottle_ratio", 1e308), ("attn_kwargs", {"evil": 1}), ("drop_rate", 5), ("global_pool", "x"),
    ("fused", True), ("device", "evil"), ("dtype", "float64"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ARGS, ids=[f"{key}={str(value)[:20]}" for key, value in ARGS])
def test_arguments_that_are_not_the_weights_are_refused(repo, key, value):
    repo(config_json=changed_config(repo(), "model_args", key, value))
    assert "\n" not in refusal()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"NaN", b'"x"', b"[" * 100_000, b'{"architecture": ' + b"9" * 10_000 + b"}",
        b"\xef\xbb\xbf{}", b'{"architecture": "hf-hub:alice/net"}', b'{"architecture": "local-dir:/etc"}',
        b'{"architecture": ["nfnet_f0"]}', b'{"architecture": "nfnet_f0", "pretrained_cfg": {"evil": 1}}',
        b'{"architecture": "nfnet_f0", "pretrained_cfg": {}, "model_args": [1]}',
    ],
    ids=lambda data: repr(data[:40]),
)  # fmt: skip
def test_other_json_describes_no_network(repo, data):
    repo(config_json=data)
    assert "config.json of alice/net@" in refusal()


@pytest.mark.parametrize("key", ["file", "url", "state_dict", "hf_hub_filename", "hf_hub_id", "source"])
def test_a_config_cannot_name_another_source(repo, hub, key):
    repo(config_json=changed_config(repo(), "pretrained_cfg", key, "http://127.0.0.1:1/evil"))
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert torch.equal(logits(pulled), logits(create()))
    assert "evil" not in str(pulled.pretrained_cfg)
    assert pulled.pretrained_cfg["hf_hub_id"] == f"alice/net@{hub.repos['alice/net'].refs['main']}"


def test_a_config_with_two_architectures_is_the_outer_one(repo):
    repo(config_json=changed_config(repo(), "pretrained_cfg", "architecture", "resnet18"))
    pulled: Any = timm_nf.hub.pull("alice/net")
    assert pulled.pretrained_cfg["architecture"] == "nfnet_f0"
    assert timm_nf.hub.push(pulled, "alice/again", card=CARD).commit


@pytest.mark.parametrize("value", [5, ["head.fc", 3], "no.such", None, {}])
def test_whatever_a_config_calls_the_classifier(repo, value):
    repo(config_json=changed_config(repo(), "pretrained_cfg", "classifier", value))
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(create()))


# -- model.safetensors -------------------------------------------------------------------------------------------------


def packed(header: Any, body: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BROKEN = {
    "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 99 MB": struct.pack("<Q", 99_000_000) + b"{}",
    "header of nothing": struct.pack("<Q", 0),
    "nested": packed(b"[" * 100_000),
    "no text": packed(b'{"\xff": 1}'),
    "huge shape": packed({"a": TENSOR | {"shape": [2**62, 4]}}, b"1234"),
    "negative shape": packed({"a": TENSOR | {"shape": [-1]}}, b"1234"),
    "offsets past the end": packed({"a": TENSOR | {"data_offsets": [0, 8], "shape": [2]}}, b"1234"),
    "offsets backwards": packed({"a": TENSOR | {"data_offsets": [4, 0]}}, b"1234"),
    "overlap": packed({"a": TENSOR, "b": TENSOR}, b"1234"),
    "a name twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(TENSOR).encode(),) * 2), b"1234") + b"5678",
    "unknown dtype": packed({"a": TENSOR | {"dtype": "PICKLE"}}, b"1234"),
    "bytes that belong to nothing": packed({"a": TENSOR}, b"1234evil"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_no_safetensors_file(repo, what):
    repo(model_safetensors=BROKEN[what])
    assert "is no safetensors file" in refusal()


COMPLEX = pytest.param(
    torch.complex64,
    marks=pytest.mark.skipif(
        TorchVersion(safetensors.__version__) < "0.7", reason="safetensors below 0.7 knows no complex numbers"
    ),
)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, COMPLEX, torch.float8_e4m3fn])
def test_dtypes_that_no_network_computes_in_are_refused(repo, dtype):
    repo(model_safetensors=save({name: t.to(dtype) for name, t in create().state_dict().items()}))
    assert refusal().endswith(f"got {dtype}")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id",
    [
        "net", "", "/", "alice/", "/net", "alice/../net", "alice/..", "../net", "alice/n t",
        "alice/net%2Fx", "alice/nét", "alice/net\n", "alice/net.git", "datasets/alice/net",
        "https://huggingface.co/alice", "https://huggingface.co/datasets/alice/net", "local-dir:/tmp/x",
        "alice/" + "a" * 200,
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("work", ["pull", "push", "dry run", "upload"])
def test_what_is_no_repository_is_asked_of_nobody(hub, tmp_path, repo_id, work):
    works: dict[str, Any] = {
        "pull": lambda: timm_nf.hub.pull(repo_id),
        "push": lambda: timm_nf.hub.push(create(), repo_id, card=CARD),
        "dry run": lambda: timm_nf.hub.push(create(), repo_id, card=CARD, dry_run=True),
        "upload": lambda: timm_nf.hub.client.upload(tmp_path, None, repo_id),
    }
    with pytest.raises(HubError, match="expected a repository as user/name, got"):
        works[work]()
    assert hub.requests == []


def test_what_a_file_says_does_not_steer_the_terminal(repo, capsys):
    repo(config_json=changed_config(repo(), "", "architecture", "\x1b[2J\nevil\u202e"))
    with pytest.raises(SystemExit):
        main(["pull", "alice/net"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert "Unknown model (\\x1b[2J evil\\u202e)" in line


def test_what_the_hub_says_does_not_steer_the_terminal(hub, capsys):
    hub.fault("GET /api/models", answer(418, message="\x1b[2Jteapot"))
    with pytest.raises(SystemExit):
        main(["pull", "alice/net"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "\\x1b[2Jteapot" in line


# -- the cache ---------------------------------------------------------------------------------------------------------


def cached(name: str) -> Path:
    import huggingface_hub

    (file,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob(f"models--alice--net/snapshots/*/{name}")
    return file


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_cache_is_refused_and_what_it_points_to_stays(repo, tmp_path, name):
    repo()
    timm_nf.hub.pull("alice/net")
    (tmp_path / "mine").write_bytes(b"mine")
    link = cached(name)
    link.unlink()
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(HubError, match="cannot be checked: no hash of it is known here; pull it once with a network"):
        timm_nf.hub.pull("alice/net", local_files_only=True)
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(create()))
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_file_that_is_not_a_link_is_checked_with_the_hash_that_an_online_pull_recorded(repo):
    repo()
    timm_nf.hub.pull("alice/net")
    data = cached("model.safetensors").read_bytes()
    file = cached("model.safetensors")
    file.unlink()
    file.write_bytes(data)  # as where a system has no links
    with pytest.raises(HubError, match="cannot be checked"):
        timm_nf.hub.pull("alice/net", local_files_only=True)
    for local in (False, True):
        assert torch.equal(logits(timm_nf.hub.pull("alice/net", local_files_only=local)), logits(create()))
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(HubError, match="is damaged and was removed"):
        timm_nf.hub.pull("alice/net", local_files_only=True)


def test_weights_that_are_not_finite_are_named(repo):
    state = create().state_dict()
    for value in (float("nan"), float("inf"), -float("inf")):
        state["head.fc.bias"] = torch.full_like(state["head.fc.bias"], value)
        repo(model_safetensors=save(state))
        assert refusal().startswith("head.fc.bias of alice/net@")
