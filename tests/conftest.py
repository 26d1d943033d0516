"""Tests of other devices need compilers and an emulator, which are skipped where they are missing, but not in CI."""

from __future__ import annotations

import os
import shutil

import pytest

from support.command import run  # noqa: F401 - a fixture

# what `.ci/run` installs, by the program that a test looks for
PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "arm-linux-gnueabihf-g++": "g++-arm-linux-gnueabihf",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-arm-static": "qemu-user-static",
    "qemu-x86_64-static": "qemu-user-static",
    "clang": "clang",
    "ld.lld": "lld",
    "javac": "default-jdk-headless",
    "chromium": "chromium",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(program, ...): programs of the distribution that a test runs")
    config.addinivalue_line("markers", "slow: a search, a training, or more than some seconds of anything else")


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = {program for mark in item.iter_markers("needs") for program in mark.args}
    missing = sorted(PACKAGES[program] for program in wanted if shutil.which(program) is None)
    if missing:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"needs: apt-get install {' '.join(missing)}")
