import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "timm_nf", *arguments],
        env=environment, cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_script_runs_as_main_with_its_arguments_its_folder_and_our_names(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "neighbour.py").write_text("value = 7\n")
    (folder / "script.py").write_text(
        "import sys, timm, neighbour\n"
        "from timm.optim import list_optimizers\n"
        "assert __name__ == '__main__'\n"
        "print(sys.argv, neighbour.value, timm.is_model('dm_nf_resnet50'), 'agcsgd' in list_optimizers())\n"
        "sys.exit(3)\n"
    )
    done = run("scripts/script.py", "--lr", "1", cwd=tmp_path)
    assert done.stdout.strip() == "['scripts/script.py', '--lr', '1'] 7 True True"
    assert (done.returncode, done.stderr) == (3, "")


def test_a_missing_script_is_a_usage_error_in_one_line(tmp_path: Path) -> None:
    for arguments in ((), ("nowhere.py",)):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: python -m timm_nf SCRIPT")
        assert done.stderr.count("\n") == 1


def test_torchrun_starts_a_script_in_several_processes_with_our_names(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, sys, timm\n"
        "from pathlib import Path\n"
        "Path(os.environ['RANK']).write_text(f\"{sys.argv[1:]} {timm.is_model('dm_nf_resnet50')}\")\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *torchrun, "-m", "timm_nf", "script.py", "--lr", "1"],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["['--lr', '1'] True"] * 2
