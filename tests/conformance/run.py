"""Runs timm's own published tests on our models and optimizers.

    python tests/conformance/run.py [--fetch | --large] [-- pytest arguments]

timm ships its tests in its source distribution. This fetches the one of the installed version (once; kept in
.cache/), and runs test_models.py and test_optim.py of it under plugin.py, which puts our names in place of theirs.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One of each family; the others differ in widths and depths only. With --large, all 31 take the test on meta tensors.
SMALL = ("nfnet_f0", "dm_nf_resnet50", "dm_nf_regnet_b0")
LARGE = ("nfnet_f1", "nfnet_f0_plus", "dm_nf_resnet101", "dm_nf_regnet_b1", "dm_nf_regnet_b5")


def fetch_tests(timm_version: str, cache: Path) -> Path:
    """Folder with timm's pyproject.toml and tests/ of that version; downloads only where it is not there yet."""
    folder = cache / f"timm-{timm_version}-tests"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        print(f"conformance: fetching the source distribution of timm {timm_version} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-binary=timm", f"timm=={timm_version}", f"--dest={temporary}"], check=True)
        (archive,) = Path(temporary).glob("timm-*.tar.gz")
        with tarfile.open(archive) as tar:
            # Without its timm/ folder: tests run from here must import the installed timm.
            wanted = [m for m in tar.getmembers() if m.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])]
            tar.extractall(temporary, members=wanted, filter="data")
        next(p for p in Path(temporary).iterdir() if p.is_dir()).rename(folder)  # last: a broken fetch leaves nothing
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", action="store_true", help="only make sure that timm's tests are here")
    parser.add_argument("--large", action="store_true", help="the larger variants instead of the small ones")
    parser.add_argument("pytest_args", nargs="*", help="passed on to pytest, after --")
    args = parser.parse_args()

    names = LARGE if args.large else SMALL
    selection = [f"--our-models={','.join(names)}", *(["--every-config"] if args.large else [])]
    suites = ["tests/test_models.py"] if args.large else ["tests/test_models.py", "tests/test_optim.py"]
    folder = fetch_tests(version("timm"), ROOT / ".cache")
    if args.fetch:
        return 0
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "TORCH_DEVICE": "cpu",  # timm's optimizer tests default to CUDA
        "HF_HUB_OFFLINE": "1",  # nothing here may depend on the network
        "OMP_NUM_THREADS": "1",  # one process per core beats two threads in each
    }
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "--disable-warnings"]
    command += [
        "-n",
        str(os.cpu_count() or 1),
        "--dist=worksteal",
        *selection,
        *suites,
        *args.pytest_args,
    ]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
