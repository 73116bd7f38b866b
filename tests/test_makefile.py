"""The Makefile: every target that its help names has all that it needs."""

import subprocess

import pytest

from tests.support import ROOT


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


TARGETS = [line.split()[0] for line in make("help").stdout.splitlines()]


def test_the_help_names_the_targets_of_the_readme():
    assert {"demo", "test", "docs"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_a_rule_for_all_that_a_target_needs(target: str):
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr


def test_a_target_without_a_rule_is_found():
    assert make("--dry-run", "no-such-target").returncode != 0
