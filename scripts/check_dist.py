"""Build sdist and wheel, check their files, and use the wheel in an empty environment from another folder.

    python -m scripts.check_dist

The environment is made under .cache/ and removed at the end. pip installs torch and the other requirements into it. On
Linux these are gigabytes. Before that, the script checks that pip would not replace an older torch.
"""

import json
import shutil
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

from scripts.environments import PIP_INSTALL, python_of, run

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
LARGEST = 1_000_000  # bytes of the wheel
# An older torch, and the torchvision that requires exactly this torch. timm needs torchvision.
OLDER = {"torch": ("2.8.0", ""), "torchvision": ("0.23.0", "Requires-Dist: torch==2.8.0\n")}
# What is installed already, and what is added to `pip install .`
KEPT = [(("torch", "torchvision"), ()), (("torch",), ("torch==2.8.0",))]
SMOKE = """
import timm, torch, timm_nf
model = timm.create_model("nfnet_f0", depths=(1, 1, 1, 1), channels=(32, 64, 64, 64), group_size=16, num_classes=10)
optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1)
torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
optimizer.step()
print(timm_nf.__version__, timm_nf.__file__)
"""


def surplus(names: list[str]) -> list[str]:
    """The files in a wheel that do not belong to the package."""
    return [
        n
        for n in names
        if not n.startswith(("timm_nf/", "timm_nf-", "timm_nf_command.py")) or n.endswith((".md", ".ipynb", ".png"))
    ]


def environment(folder: Path) -> Path:
    """Make an environment with pip, and return its interpreter."""
    venv.create(folder, with_pip=True)
    return python_of(folder)


def pretend_installed(python: Path, packages: tuple[str, ...]) -> None:
    """Write only the metadata of an installed package, which is all that pip reads. The package has gigabytes."""
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in packages:
        version, requires = OLDER[name]
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}", encoding="utf-8"
        )
        (info / "RECORD").touch()


def replaced(report: dict[str, Any], packages: tuple[str, ...]) -> list[str]:
    """The packages that pip would install again, by the report of its dry run."""
    installed = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    return [f"{name} by {installed[name]}" for name in packages if name in installed]


def main() -> int:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, cwd=ROOT)  # the wheel is built from the sdist
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=ROOT)
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        names = archive.namelist()
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(names)} files")
        print(f"{sdist.name}: {sdist.stat().st_size:,} bytes, {len(source.getnames())} files")
    if wheel.stat().st_size > LARGEST or surplus(names):
        print(f"expected at most {LARGEST:,} bytes and the package alone, got also {surplus(names)}", file=sys.stderr)
        return 1
    (ROOT / ".cache").mkdir(exist_ok=True)
    for packages, named in KEPT:
        with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
            python = environment(Path(folder, "environment"))
            pretend_installed(python, packages)
            report = run(python, *PIP_INSTALL, "--dry-run", "--report", "-", wheel, *named, cwd=ROOT)
            lost = replaced(json.loads(report), packages)
        have = " and ".join(f"{name} {OLDER[name][0]}" for name in packages)
        outcome = f"replaces {', '.join(lost)}" if lost else "replaces nothing"
        print(f"pip install {' '.join(['.', *named])} beside {have}: {outcome}")
        if lost:
            return 1
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
        python = environment(Path(folder, "environment"))
        run(python, *PIP_INSTALL, f"{wheel}[cli]", cwd=ROOT)
        print(run(python, "-W", "error", "-c", SMOKE, cwd=Path(folder)), end="")
        print(run(python.with_name("timm-nf"), "list", "nfnet_f0", cwd=Path(folder)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
