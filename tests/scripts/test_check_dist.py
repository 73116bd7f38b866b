"""`python -m scripts.check_dist`: what it makes of pip's report, and of the files in a wheel."""

import sys
from importlib.metadata import distributions

from scripts import check_dist


def test_pip_takes_what_is_pretended_for_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(check_dist, "run", lambda *command: f"{tmp_path}\n")
    check_dist.pretend_installed(sys.executable, ("torch", "torchvision"))
    found = {d.name: (d.version, d.requires) for d in distributions(path=[str(tmp_path)])}
    assert found == {"torch": ("2.8.0", None), "torchvision": ("0.23.0", ["torch==2.8.0"])}


def test_what_pip_would_install_again_is_named():
    report = {"install": [{"metadata": {"name": name, "version": "9"}} for name in ("torch", "timm")]}
    assert check_dist.replaced(report, ("torch", "torchvision")) == ["torch by 9"]
    assert check_dist.replaced(report, ("torchvision",)) == []


def test_prose_and_what_lies_beside_the_package_is_surplus_in_a_wheel():
    wanted = ["timm_nf/a.py", "timm_nf-0.1.0.dist-info/METADATA", "timm_nf_command.py"]
    assert check_dist.surplus([*wanted, "tests/a.py", "timm_nf/page.md"]) == ["tests/a.py", "timm_nf/page.md"]
