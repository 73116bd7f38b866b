import gzip
import json
import pickle
import pickletools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support import GOLDEN
from tests.support.haiku_files import FORMS, SMALL, Call, dumps, loads
from tests.support.haiku_files import name as named
from timm_nf.convert import haiku_pickle
from timm_nf.convert.haiku_pickle import load_haiku

T0 = [GOLDEN / f"T0_haiku_{form}.npz" for form in ("plain", "flatmap", "jaxarrays")]


def assert_same(got: Any, expected: Any) -> None:
    assert {m: list(e) for m, e in got.items()} == {m: list(e) for m, e in expected.items()}
    for module, entries in expected.items():
        for name, array in entries.items():
            value = got[module][name]
            assert type(value) is np.ndarray
            assert value.shape == np.shape(array)
            assert value.dtype == array.dtype.newbyteorder("=")
            assert value.flags.aligned
            np.testing.assert_array_equal(value, array)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pickle_knows_numpy_2")
@pytest.mark.parametrize("path", T0, ids=lambda path: path.stem)
def test_the_authors_three_forms_hold_the_same_tree(path: Path) -> None:
    tree = load_haiku(path)
    assert_same(tree, pickle.loads(T0[0].read_bytes()))
    assert type(tree) is dict
    assert {type(entries) for entries in tree.values()} == {dict}


def test_neither_jax_nor_haiku_nor_dill_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("jax", "jax._src.array", "haiku", "haiku._src.data_structures", "dill", "dill._dill"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises
    for path in T0:
        assert len(load_haiku(path)) == 45
    with pytest.raises(ImportError):
        pickle.loads(T0[1].read_bytes())


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("form", [*FORMS, "olderjax"])
def test_every_form_is_read_in_every_protocol_that_has_bytes(form: str, protocol: int, tmp_path: Path) -> None:
    assert_same(loads(dumps(SMALL, form, protocol), tmp_path), SMALL)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_every_layout_of_an_array_is_read(dtype: str, protocol: int, tmp_path: Path) -> None:
    base = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype)
    arrays = {
        "c": base,
        "fortran": np.asfortranarray(base),
        "permuted": base.transpose(1, 0, 3, 2),
        "strided": base[:, ::2, :, 1],
        "scalar": base[1, 1, 1, 1],
        "0-d": np.array(base[1, 1, 1, 1]),
    }
    assert_same(loads(dumps({"module": arrays}, protocol=protocol), tmp_path), {"module": arrays})


@pytest.mark.parametrize("protocol", [3, 5])
def test_names_of_numpy_1_are_read(protocol: int, tmp_path: Path) -> None:
    tree = {"module": {"w": np.ones((2, 3), np.float32), "scalar": np.float32(2)}}
    data = dumps(tree, protocol=protocol)
    if protocol == 5:  # the replacement below changes the size of the frame, which only announces what follows
        assert data[2:3] == pickle.FRAME
        data = data[:2] + data[11:]
    length = {3: b"", 5: b"\x8c"}[protocol]
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        if length:
            new, old = (length + bytes([len(text)]) + text for text in (new, old))
        data = data.replace(new, old)
    assert b"_core" not in data
    assert b"numpy.core.multiarray" in data
    assert (b"numpy.core.numeric" in data) == (protocol == 5)
    assert_same(loads(data, tmp_path), tree)


def test_the_largest_tree_stays_far_from_the_limit_on_opcodes() -> None:
    trees = json.loads(gzip.decompress((GOLDEN / "haiku_trees.json.gz").read_bytes()))
    counts = {}
    for variant in ("NFNet-F7+", "NF-ResNet600", "NF-RegNet-B8"):
        small = {m: {n: np.zeros((1,) * len(s), np.float32) for n, s in e.items()} for m, e in trees[variant].items()}
        counts[variant] = max(sum(1 for _ in pickletools.genops(dumps(small, form))) for form in FORMS)
    assert 0 < max(counts.values()) < haiku_pickle._MAX_OPCODES / 3, counts


# -- what is not -------------------------------------------------------------------------------------------------------


def refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(ValueError, match="expected the authors' checkpoint") as error:
        loads(data, folder)
    message = str(error.value)
    assert message.startswith(str(folder / "file.npz"))
    assert "\n" not in message
    return message


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for form in FORMS:
        data = dumps(SMALL, form)
        assert_same(loads(data, tmp_path), SMALL)
        for length in range(len(data)):
            refusal(data[:length], tmp_path)
    data = T0[1].read_bytes()
    for length in (9, 11, 1000, 75_000, len(data) // 2, len(data) - 1):
        assert re.search("not enough data|frame|truncated|expected \\d+ bytes", refusal(data[:length], tmp_path))


def other_files(folder: Path) -> dict[str, bytes]:
    np.savez(folder / "a.npz", w=np.ones(3))
    np.save(folder / "a.npy", np.ones(3))
    torch.save({"w": torch.ones(3)}, folder / "a.pt")
    torch.save({"w": torch.ones(3)}, folder / "a.pth", _use_new_zipfile_serialization=False)
    save_file({"w": torch.ones(3)}, folder / "a.safetensors")
    written = {path.suffix: path.read_bytes() for path in folder.glob("a.*")}
    assert len(written) == 5
    return written | {".gz": gzip.compress(b"x"), ".html": b"<!DOCTYPE html>", ".txt": b"Not found", "": b""}


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        (".npz", "a zip archive, as np.savez"),
        (".npy", "a .npy file"),
        (".pt", "a zip archive, as np.savez and torch.save"),
        (".pth", "old torch.save"),
        (".safetensors", "a safetensors file"),
        (".gz", "a gzip file"),
        (".html", "a web page"),
        (".txt", "is refused|there is no opcode|it is truncated"),
        ("", "empty"),
    ],
)
def test_another_file_is_called_by_its_name(suffix: str, what: str, tmp_path: Path) -> None:
    assert re.search(what, refusal(other_files(tmp_path)[suffix], tmp_path))


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path) -> None:
    assert "not downloaded" in refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", tmp_path)


def test_a_file_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_haiku(tmp_path / "none.npz")


CYCLE: dict[str, Any] = {}
CYCLE["NFNet"] = CYCLE


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"m": {"w": np.array([None, 1], object)}}, "got dtype 'O8'"),
        ({"m": {"w": np.ones(2, np.int32)}}, "got dtype 'i4'"),
        ({"m": {"w": np.ones(2, np.complex64)}}, "got dtype 'c8'"),
        ({"m": {"w": np.zeros(2, [("a", "f4")])}}, "got dtype 'V4'"),
        ({"m": {"w": np.array(["text"])}}, "got dtype 'U4'"),
        ({"m": {"w": np.array([1, np.nan], np.float32)}}, "NaN or infinite ones in 'm/w'"),
        ({"m": {"w": np.array(-np.inf, ">f2")}}, "NaN or infinite ones in 'm/w'"),
        ({"m": {"w": np.ones((1,) * 5, np.float32)}}, "at most four axes"),
        ({"m": {"w": np.ones((2, 0), np.float32)}}, "empty"),
        ({"m": {"w": 3}}, "expected an array as 'm/w', got int"),
        ({"m": {"w": None}}, "expected an array as 'm/w', got NoneType"),
        ({"m": {"w": {"x": np.ones(2, np.float32)}}}, "expected an array as 'm/w', got dict"),
        ({"m": {1: np.ones(2, np.float32)}}, "keys that are not strings"),
        ({1: {}}, "keys that are not strings"),
        ({"m\n\x1b[2J": {}}, "keys that are not strings or not printable"),
        ({"m" * 1000: {}}, "keys that are not strings or not printable"),
        ({("m",): {}}, "keys that are not strings"),
        ({"m": np.ones(2, np.float32)}, "expected a tree"),
        (np.ones(2, np.float32), "expected a tree"),
        (({}, {}), "expected a tree"),
        (CYCLE, "expected an array as 'NFNet/NFNet', got dict"),
        ([{}], "EMPTY_LIST"),
        ({"m": {"w": 0.5}}, "BINFLOAT"),
    ],
)
def test_a_tree_of_anything_but_finite_arrays_is_refused(tree: Any, reason: str, tmp_path: Path) -> None:
    assert re.search(reason, refusal(dumps(tree), tmp_path))


def test_bfloat16_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with named("ml_dtypes", "bfloat16") as scalar_type:
        data = dumps({"m": {"w": Call(np.dtype, scalar_type, False, True)}})
    assert re.search("'ml_dtypes.bfloat16' is refused.*store the parameters as float32", refusal(data, tmp_path))


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_protocols_without_bytes_are_refused(protocol: int, tmp_path: Path) -> None:
    assert re.search(
        "opcode .* is refused|'_codecs.encode' is refused.*pickle it with protocol 3",
        refusal(dumps(SMALL, protocol=protocol), tmp_path),
    )


def test_an_array_that_stands_in_many_places_cannot_take_more_than_the_file(tmp_path: Path) -> None:
    array = np.ones(1000, np.float32)
    refusal(dumps({f"module {i}": {"w": array} for i in range(1000)}), tmp_path)
