"""Broken transfers, damaged files, races and killed clients: nothing is lost, nothing is half published."""

import errno
import logging
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch

import timm_nf
from tests.support import GOLDEN
from tests.support.published import CARD, create, logits
from tests.support.stand_in_hub import TOKENS, Blob, answer, cut, flip
from timm_nf.hub import HubError, from_haiku

TOKEN = next(iter(TOKENS))


@pytest.fixture
def published(hub):
    """The stand-in Hub with one network in it, and what its logits are."""
    model = create()
    timm_nf.hub.push(model, "alice/net", card=CARD)
    return hub, logits(model)


def cached(hub: Any, name: str) -> Path:
    """The blob of a file of alice/net in the client's cache."""
    (file,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob(f"models--alice--net/snapshots/*/{name}")
    return file.resolve()


# -- up ----------------------------------------------------------------------------------------------------------------


def test_large_files_go_up_in_several_parts(hub):
    model = create()
    hub.part_size = 100_000
    written = timm_nf.hub.push(model, "alice/net", card=CARD)
    parts = -(-written.files["model.safetensors"] // 100_000)
    assert sum(line.startswith("PUT") for line, _ in hub.storage_requests) == parts == 7
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(model))


@pytest.mark.parametrize("regular", [False, True])
def test_the_token_stays_with_the_hub(hub, regular):
    hub.regular, hub.redirect = regular, True
    timm_nf.hub.push(create(), "alice/net", card=CARD, private=True)
    assert timm_nf.hub.pull("alice/net")
    assert {headers.get("authorization", headers.get("Authorization")) for _, headers in hub.requests[1:]} == {
        f"Bearer {TOKEN}"
    }
    assert bool(hub.storage_requests) != regular
    assert not [1 for _, headers in hub.storage_requests if TOKEN in str(headers)]


def test_what_is_there_is_not_uploaded_again(published):
    hub, _ = published
    before = len(hub.storage_requests)
    timm_nf.hub.push(create(), "alice/net", card={"license": "apache-2.0"}, overwrite_card=True)
    assert len(hub.storage_requests) == before
    assert len(hub.repos["alice/net"].log) == 3


@pytest.mark.parametrize("step", ["create", "validate-yaml", "preupload", "lfs/objects/batch", "verify", "commit/main"])
@pytest.mark.parametrize("status", [400, 500])
def test_a_push_that_fails_at_any_step_changes_nothing(published, step, status):
    hub, _ = published
    before = dict(hub.repos["alice/net"].refs)
    hub.fault(f"POST .*{step}", answer(status, message="out of order"), times=99)
    with pytest.raises(HubError) as caught:
        timm_nf.hub.push(create(), "alice/net", card=CARD, dtype=torch.float16, overwrite_card=True)
    assert len(str(caught.value).splitlines()) == 1
    assert hub.repos["alice/net"].refs == before


def test_the_storage_fails_once_and_the_client_tries_again(hub):
    hub.fault("PUT", answer(503))
    hub.fault("POST .*preupload", answer(429))
    timm_nf.hub.push(create(), "alice/net", card=CARD)
    assert len(hub.slept) == 2
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), logits(create()))


def test_what_arrives_damaged_is_not_published(hub):
    hub.fault("PUT", lambda handler: setattr(handler, "content", handler.content[:-1] + b"\0"), times=99)
    with pytest.raises(HubError):
        timm_nf.hub.push(create(), "alice/net", card=CARD)
    assert hub.repos["alice/net"].log == ["initial commit"]


def test_somebody_else_commits_in_between(published):
    hub, _ = published
    theirs = {"their.txt": b"theirs"}
    hub.fault("POST .*/preupload", lambda handler: hub.publish("alice/net", theirs))
    with pytest.raises(HubError, match="somebody else changed alice/net in the meantime"):
        timm_nf.hub.push(create(), "alice/net", card=CARD, dtype=torch.float16)
    assert hub.repos["alice/net"].files() == theirs


def test_of_two_pushes_at_once_one_wins_whole(published):
    hub, _ = published
    gate = threading.Barrier(2, timeout=600)
    hub.fault("POST .*/preupload", lambda handler: gate.wait() and None, times=2)  # both know the same parent by now

    def push(license: str) -> timm_nf.hub.Written | HubError:
        dtype = torch.float16 if license == "mit" else torch.bfloat16
        try:
            return timm_nf.hub.push(create(), "alice/net", card={"license": license}, dtype=dtype, overwrite_card=True)
        except HubError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(push, ("mit", "apache-2.0")))
    (won,) = [r for r in results if not isinstance(r, HubError)]
    (lost,) = [r for r in results if isinstance(r, HubError)]
    assert "push again" in str(lost)
    files = hub.repos["alice/net"].files()
    assert files["README.md"].decode() == won.card
    assert Blob(files["model.safetensors"], True).sha256 == won.sha256
    assert hub.repos["alice/net"].refs["main"] == won.commit


def test_a_killed_push_leaves_the_repository_as_it_was(published, client, tmp_path):
    hub, _ = published
    before = dict(hub.repos["alice/net"].refs)
    arrived, over = threading.Event(), threading.Event()

    def hold(handler: Any) -> None:
        arrived.set()
        over.wait(600)

    hub.fault("PUT", hold)
    process = client(
        "import timm_nf, torch; from tests.support.published import CARD, create; "
        "timm_nf.hub.push(create(), 'alice/net', card=CARD, dtype=torch.float16, revision='new')"
    )
    while process.poll() is None and not arrived.wait(1):
        pass
    assert arrived.is_set(), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    over.set()
    refs = hub.repos["alice/net"].refs
    assert refs in (before, before | {"new": before["main"]})
    timm_nf.hub.push(create(), "alice/net", card=CARD, dtype=torch.float16, revision="new")
    assert refs["new"] != before["main"]
    assert refs["main"] == before["main"]


# -- down --------------------------------------------------------------------------------------------------------------


def test_a_transfer_that_breaks_off_is_taken_up_again(published):
    hub, expected = published
    hub.fault("^GET .*model.safetensors", cut, times=2)
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), expected)
    assert hub.slept == [1, 1]


def test_a_transfer_that_keeps_breaking_off_is_an_error(published):
    hub, _ = published
    hub.fault("^GET .*model.safetensors", cut, times=99)
    with pytest.raises(HubError, match="cannot be reached or broke off"):
        timm_nf.hub.pull("alice/net")
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).glob("**/snapshots/*/model.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_byte_that_flips_on_the_way_is_seen_and_fetched_again(published, name, caplog):
    hub, expected = published
    hub.fault(f"^GET .*{name}", flip)
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), expected)
    assert f"{name} is damaged" in caplog.text
    assert hub.count(f"^GET .*{name}") == 2


def test_a_byte_that_always_flips_is_an_error_and_stays_nowhere(published, caplog):
    hub, _ = published
    hub.fault("^GET .*model.safetensors", flip, times=99)
    with pytest.raises(HubError, match=r"model.safetensors is damaged and was removed"):
        timm_nf.hub.pull("alice/net")
    assert hub.count("^GET .*model.safetensors") == 2
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).glob("**/snapshots/*/model.safetensors"))
    hub.faults.clear()
    assert timm_nf.hub.pull("alice/net")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_in_the_cache_is_named_and_fetched_once(published, name, caplog):
    hub, expected = published
    timm_nf.hub.pull("alice/net")
    with cached(hub, name).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    before = hub.count(f"^GET .*{name}")
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), expected)
    assert hub.count(f"^GET .*{name}") == before + 1
    (record,) = [r for r in caplog.records if r.name == "timm_nf.hub.client"]
    assert record.levelno == logging.WARNING
    assert f"{name} is damaged" in record.message


def test_a_cached_file_is_not_fetched_again(published):
    hub, _ = published
    timm_nf.hub.pull("alice/net")
    timm_nf.hub.pull("alice/net")
    assert hub.count("^GET .*/resolve/") == 2


@pytest.mark.parametrize("regular", [False, True])
def test_offline_the_cache_is_used_and_checked(hub, regular, monkeypatch):
    hub.regular = regular
    written = timm_nf.hub.push(create(), "alice/net", card=CARD)
    expected = logits(timm_nf.hub.pull("alice/net"))
    name = cached(hub, "model.safetensors").name
    assert len(name) == (40 if regular else 64)
    hub.stop()
    offline: Any = timm_nf.hub.pull("alice/net", local_files_only=True)
    assert torch.equal(logits(offline), expected)
    assert offline.pretrained_cfg["hf_hub_id"] == f"alice/net@{written.commit}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert timm_nf.hub.pull(f"alice/net@{written.commit}", sha256=written.sha256)
    with cached(hub, "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(HubError, match=f"blobs/{name}|model.safetensors is damaged"):
        timm_nf.hub.pull("alice/net")


def test_a_repository_that_changes_while_it_is_pulled(published):
    hub, _ = published
    files = hub.repos["alice/net"].files()
    hub.fault("HEAD .*config.json", lambda handler: hub.publish("alice/net", files))
    with pytest.raises(HubError, match="while it was pulled: pull again"):
        timm_nf.hub.pull("alice/net")


def test_slow_answers_are_waited_for(published):
    hub, expected = published
    hub.fault("alice/net", lambda handler: time.sleep(0.3), times=5)
    assert torch.equal(logits(timm_nf.hub.pull("alice/net")), expected)


def test_a_pull_writes_only_to_the_cache_it_was_given(published, tmp_path):
    timm_nf.hub.pull("alice/net", cache_dir=tmp_path / "other")
    assert list((tmp_path / "other").glob("models--alice--net/snapshots/*/model.safetensors"))
    assert not Path(huggingface_hub.constants.HF_HUB_CACHE).exists()


def test_timm_does_not_see_a_flipped_byte(published):
    """Why pull compares hashes; if the client starts to, this can go."""
    import timm

    hub, expected = published
    hub.fault("^GET .*model.safetensors", flip)
    loaded = timm.create_model("hf-hub:alice/net", pretrained=True)
    assert not torch.equal(logits(loaded), expected)


# -- caches and folders that cannot do everything ----------------------------------------------------------------------


def test_without_links_an_offline_pull_works_after_an_online_one(published, monkeypatch):
    hub, _ = published
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(huggingface_hub.file_download, "_are_symlinks_supported_in_dir", {})
    with warnings.catch_warnings(action="ignore"):  # the client's, about links
        timm_nf.hub.pull("alice/net")
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    (weights,) = cache.rglob("model.safetensors")
    assert not weights.is_symlink()
    hub.stop()
    pulled = timm_nf.hub.pull("alice/net", local_files_only=True)
    assert torch.equal(logits(pulled), logits(create()))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(HubError, match="is damaged and was removed"):
        timm_nf.hub.pull("alice/net", local_files_only=True)


def test_a_proxy_that_drops_the_hubs_headers_is_named(published):
    hub, _ = published
    hub.drop_commit = True
    with pytest.raises(HubError, match=r"answers without headers .* X-Repo-Commit: a proxy or mirror drops them"):
        timm_nf.hub.pull("alice/net")


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "no", "/cache/x"), OSError(errno.EROFS, "no", "/cache/x")]
)
def test_a_cache_or_a_folder_that_cannot_be_written_says_what_to_do(published, error, monkeypatch, tmp_path):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.os.makedirs", refuse)
    with pytest.raises(HubError, match=r"/cache/x cannot be written: give another cache_dir .* local_files_only"):
        timm_nf.hub.pull("alice/net", cache_dir=tmp_path / "other")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "no", str(tmp_path))

    monkeypatch.setattr("timm_nf._temporary.TemporaryDirectory", refuse)
    with pytest.raises(HubError, match=f"{tmp_path} cannot be written: name a folder that can be written"):
        from_haiku.convert(GOLDEN / "T0_haiku_flatmap.npz", tmp_path / "t0")


def test_a_push_without_a_network_is_refused_before_anything_is_written(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("timm_nf.hub.client.write_folder", None)  # calling it would be another error
    monkeypatch.setattr("timm_nf.hub.from_haiku.write_folder", None)
    with pytest.raises(HubError, match="push needs a network"):
        timm_nf.hub.push(create(), "alice/net", card=CARD)
    with pytest.raises(HubError, match="push needs a network"):
        from_haiku.convert(GOLDEN / "T0_haiku_flatmap.npz", tmp_path / "t0", license="mit", repo_id="alice/net")
    assert hub.requests == []


def test_another_case_is_answered_with_the_hubs(published):
    hub, _ = published
    hub.ignore_case = True
    with pytest.raises(HubError, match="the Hub has no Alice/NET, but alice/net: write it so"):
        timm_nf.hub.pull("Alice/NET")
    before = dict(hub.repos["alice/net"].refs)
    with pytest.raises(HubError, match="the Hub has no alice/Net, but alice/net: write it so"):
        timm_nf.hub.push(create(), "alice/Net", card=CARD, revision="refs/pr/1")
    assert hub.repos["alice/net"].refs == before


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_tied_weights_and_views_are_written(tmp_path):
    model = create()
    first, second = model.stages[1][0], model.stages[1][1]
    second.conv3.weight = first.conv3.weight
    flat = torch.cat([model.head.fc.bias.data, model.head.fc.bias.data])
    model.head.fc.bias.data = flat[10:]
    timm_nf.hub.write_folder(model, tmp_path / "net", card=None)
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)), logits(model))
    assert second.conv3.weight is first.conv3.weight


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_nothing_computes_in_are_refused_when_written(dtype, tmp_path):
    model = create()
    model.head.fc.bias = torch.nn.Parameter(model.head.fc.bias.data.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"expected weights in .*, head.fc.bias is {dtype}"):
        timm_nf.hub.write_folder(model, tmp_path / "net", card=None)
    with pytest.raises(ValueError, match="expected a floating dtype"):
        timm_nf.hub.write_folder(create(), tmp_path / "net", card=None, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
