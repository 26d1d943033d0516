"""A clean 64-bit ARM system with Python and numpy and nothing else, from Debian's packages and PyPI's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LIBRARIES = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8")
REMEDY = "needs: dpkg --add-architecture arm64 && apt-get update"


def make(root: Path) -> Path:
    """Fill a folder with the system; its Python is the name that is returned, numpy is in ``/packages``.

    The test is skipped, in CI failed, where apt does not know packages for 64-bit ARM.
    """
    version = _version()
    if version is None:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(REMEDY)
    python = (f"python{version}-minimal", f"libpython{version}-minimal", f"libpython{version}-stdlib")
    downloads = root / "downloads"
    downloads.mkdir(parents=True)
    wanted = [f"{name}:arm64" for name in (*LIBRARIES, *python)]
    # without root's usual other user, who may not write here
    subprocess.run(["apt-get", "-o", "APT::Sandbox::User=root", "download", "-q", *wanted], cwd=downloads, check=True)
    wheel = ["--only-binary=:all:", "--no-deps", "--python-version", version, "--platform", "manylinux_2_28_aarch64"]
    platforms = ["--platform", "manylinux_2_27_aarch64", "--platform", "manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(downloads), *wheel, *platforms]
    subprocess.run([*command, "numpy"], check=True)
    for path in downloads.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", str(path), str(root)], check=True)
    if not (root / "lib").exists():  # from Debian 13 on everything is in /usr
        (root / "lib").symlink_to("usr/lib")
    for path in downloads.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(root / "packages")
    shutil.rmtree(downloads)
    return Path("/usr/bin") / f"python{version}"


def _version() -> str | None:
    """The version of Debian's Python for 64-bit ARM, such as 3.11."""
    if shutil.which("apt-cache") is None:
        return None
    done = subprocess.run(["apt-cache", "show", "python3-minimal:arm64"], capture_output=True, text=True)
    found = re.search(r"^Version: (\d+\.\d+)", done.stdout, re.MULTILINE)
    return found[1] if found else None
