"""Nothing is lost and nothing is done twice: kills at random moments, damaged files, a full disk, two searches."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.command import Run
from support.labelled_network import NETWORK
from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.choose.fitted import FittedNetworks
from tvm_lowrank.searching.journal import Journal
from tvm_lowrank.searching.latency.cache import Entry, KernelCache, Latency
from tvm_lowrank.targets.profile import load_profile

pytestmark = pytest.mark.slow

KILLS = 20
JOURNAL, MANIFEST, FITTED = "journal.jsonl", "manifest.json", "fitted"


@dataclass(frozen=True)
class Place:
    """A search's folder, cache and log of the epochs whose images were all used."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def epochs(self) -> Path:
        return self.root / "epochs"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "EPOCHS": str(self.epochs)}

    @property
    def arguments(self) -> list[str | Path]:
        network = self.root.parent / "net.py"
        return [
            *("search", "--budget", "5%", "--model", f"{network}:model", "--input-shape", "1,3,16,16"),
            *("--data", f"{network}:data", "--methods", "channel", "--trials", "1"),
            *("--finetune", f"{network}:training", "--epochs", "1"),
            *("--out", self.out, "--cache", self.root / "cache"),
        ]

    def start(self, *, file_limit: int | None = None) -> subprocess.Popen[str]:
        """The search in a process group of its own; no file that it writes may become longer than the limit."""

        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

        # Python imports from the current folder first: in a checkout that would not be the installed package
        return subprocess.Popen(
            [sys.executable, "-m", "tvm_lowrank.cli", *map(str, self.arguments), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=sys.prefix,
            env=self.environment,
            start_new_session=True,
            preexec_fn=limit,
        )

    def finish(self, *, file_limit: int | None = None) -> tuple[int, str]:
        """Run the search to its end; its exit code and what it said."""
        process = self.start(file_limit=file_limit)
        _, said = process.communicate(timeout=600)
        assert process.returncode is not None and "Traceback" not in said, said
        return process.returncode, said

    def kernels(self) -> list[str]:
        """The keys of the cache's lines."""
        return [line["key"] for path in (self.root / "cache").rglob("kernels.jsonl") for line in lines(path)]

    def trained(self) -> int:
        return len(self.epochs.read_text().splitlines()) if self.epochs.exists() else 0


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that another process may be writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def kill(process: subprocess.Popen[str]) -> None:
    """End a search and its workers at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill a search after so many seconds; False if it had ended before, successfully."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return True
    assert process.returncode == 0, said
    return False


def finished_epochs(place: Place) -> int:
    """Epochs that are in a checkpoint."""
    paths = (place.out / FITTED).glob("finetune-*.pt")
    return sum(len(torch.load(path, weights_only=True)["epochs"]) for path in paths)


def accuracies(place: Place) -> dict[str, Any]:
    return json.loads((place.out / MANIFEST).read_text())["accuracy"]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted search, its duration in seconds, and the cache that it found (and did not add to)."""

    place: Place
    seconds: float
    cache: Path

    def again(self, name: str) -> Place:
        """A place for the same search, with the same cache and the same measured latency of the dense network."""
        place = Place(self.place.root.parent / name)
        place.out.mkdir(parents=True)
        shutil.copytree(self.cache, place.root / "cache")
        known = [line for line in lines(self.place.out / JOURNAL) if line["key"] == "header" or line["kind"] == "dense"]
        (place.out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in known))
        return place


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The first search that measures no kernel, because those before it filled the cache."""
    root = tmp_path_factory.mktemp("killed")
    (root / "net.py").write_text(NETWORK)
    cache = root / "empty"
    cache.mkdir()
    for attempt in range(4):
        place = Place(root / f"reference{attempt}")
        shutil.copytree(cache, place.root / "cache")
        known, start = place.kernels(), time.monotonic()
        code, said = place.finish()
        assert code == 0, said
        if place.kernels() == known:
            return Reference(place, time.monotonic() - start, cache)
        cache = place.root / "cache"
    raise AssertionError("every search measured another kernel")


def assert_same_result(place: Place, reference: Reference) -> None:
    """A search ended as the reference did, and repeated nothing on its way."""
    assert (place.out / "plan.json").read_text() == (reference.place.out / "plan.json").read_text()
    assert accuracies(place) == accuracies(reference.place)
    entries = Counter((line["kind"], line["key"]) for line in lines(place.out / JOURNAL))
    assert max(entries.values()) == 1, entries
    assert entries == Counter((line["kind"], line["key"]) for line in lines(reference.place.out / JOURNAL))
    assert Counter(place.kernels()) == Counter(reference.place.kernels())
    assert max(Counter(place.kernels()).values()) == 1
    assert sorted(os.listdir(place.out)) == sorted(os.listdir(reference.place.out))
    assert FITTED not in os.listdir(place.out)


def test_killed_at_twenty_random_moments(reference: Reference) -> None:
    """Searches are killed and resumed until there were twenty kills; each that ends gives what the reference gave."""
    assert reference.place.trained() > 0, "the reference trains nothing"
    # a resumed search takes less time than the reference, and another load on the machine changes them all
    shares, seconds = 0.7 * np.random.default_rng(0).random(KILLS), reference.seconds
    kills = number = 0
    while kills < KILLS:
        place, excess, ended = reference.again(f"killed{number}"), 0, False
        while kills < KILLS and not ended:
            start = time.monotonic()
            ended = not killed_after(place.start(), seconds * shares[kills])
            if ended:
                seconds = min(seconds, time.monotonic() - start)
            else:
                kills += 1
            if not (place.out / MANIFEST).exists():
                # an epoch that was killed after its last image, and before its checkpoint, is repeated
                before, excess = excess, place.trained() - finished_epochs(place)
                assert 0 <= excess - before <= 1
        if not ended:
            code, said = place.finish()
            assert code == 0, said
        assert_same_result(place, reference)
        assert place.trained() == reference.place.trained() + excess
        number += 1
    assert number > 1


@pytest.fixture(scope="module")
def interrupted(reference: Reference) -> Place:
    """A search that was killed when it had evaluated a fine-tuned plan."""
    place = reference.again("interrupted")
    process, deadline = place.start(), time.monotonic() + 300
    while not any(line["key"].startswith("finetuned") for line in lines(place.out / JOURNAL)):
        assert process.poll() is None and time.monotonic() < deadline, "the search ended before it was killed"
        time.sleep(0.02)
    kill(process)
    assert list((place.out / FITTED).glob("*.npz")) and list((place.out / FITTED).glob("*.pt"))
    return place


def copied(place: Place, name: str) -> Place:
    return Place(Path(shutil.copytree(place.root, place.root.with_name(name))))


def tear_evaluation(place: Place) -> str:
    """Cut the journal off within the line of the fine-tuned plan's evaluation; returns the lines before it."""
    path = place.out / JOURNAL
    whole = path.read_text().splitlines(keepends=True)
    number = next(i for i, line in enumerate(whole) if json.loads(line)["key"].startswith("finetuned"))
    kept = "".join(whole[:number])
    path.write_text(kept + whole[number][:-9])
    return kept


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_torn_lines_and_truncated_networks_are_done_again(interrupted: Place, reference: Reference) -> None:
    place = copied(interrupted, "torn")
    tear_evaluation(place)
    for path in (place.root / "cache").rglob("*.jsonl"):
        with path.open("a") as file:
            file.write('{"key": "torn')
    for path in (place.out / FITTED).glob("*.npz"):
        halve(path)
    code, said = place.finish()
    assert code == 0, said
    assert "last line of" in said and "torn" in said and "ignoring an unfinished last line" in said
    assert_same_result(place, reference)
    assert place.trained() == reference.place.trained()  # the checkpoint has the training of what was truncated


def test_a_truncated_checkpoint_is_named(interrupted: Place) -> None:
    place = copied(interrupted, "checkpoint")
    kept = tear_evaluation(place)
    for path in (place.out / FITTED).iterdir():
        halve(path)
    code, said = place.finish()
    assert code == 2 and "cannot read checkpoint" in said.splitlines()[-1] and "delete it" in said.splitlines()[-1]
    assert (place.out / JOURNAL).read_text() == kept


def test_a_full_disk_ends_the_search_and_room_lets_it_go_on(reference: Reference) -> None:
    """A limit to the length of files stands in for a disk that is full: the journal cannot grow any more."""
    place = reference.again("full")
    journal = place.out / JOURNAL
    first, second = (len(json.dumps(line)) for line in lines(reference.place.out / JOURNAL)[1:3])
    room = journal.stat().st_size + first + second // 2
    code, said = place.finish(file_limit=room)
    last = said.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and f"cannot write {journal}: File too large; make room" in last
    kinds = [line["kind"] for line in lines(journal)]
    assert kinds == ["run", "dense", "predicted"] and journal.read_text().endswith("\n")
    code, said = place.finish()
    assert code == 0, said
    assert "torn" not in said
    assert_same_result(place, reference)


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file can become longer than so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_the_journal_leaves_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, {})
    journal.record("probe", "a", 1)
    before = path.read_bytes()
    with little_room(len(before) + 5), pytest.raises(UserError, match="File too large; make room"):
        journal.once("probe", "b", lambda: 2)
    assert path.read_bytes() == before
    assert journal.once("probe", "b", lambda: 3) == 3
    journal.close()
    resumed = Journal(path, {})
    assert resumed.of_kind("probe") == {"a": 1, "b": 3} and not resumed.dropped
    resumed.close()


def test_a_journal_for_which_there_is_no_room(tmp_path: Path) -> None:
    with little_room(5), pytest.raises(UserError, match="File too large; make room"):
        Journal(tmp_path / "j", {})
    Journal(tmp_path / "j", {}).close()


def test_what_does_not_fit_the_cache_leaves_the_others(tmp_path: Path) -> None:
    def entry(key: str) -> Entry:
        return Entry(key, key, Latency(1.0, 1.0, 1.0), None, 1)

    def opened() -> KernelCache:
        return KernelCache.open(tmp_path, load_profile("x86"), threads=1)

    cache = opened()
    cache.add(entry("a"))
    room = cache.path.stat().st_size + 5
    with little_room(room), pytest.raises(UserError, match=r"cannot use the cache .* File too large; make room"):
        cache.add(entry("b"))
    with pytest.warns(UserWarning, match="unfinished last line"):
        assert list(opened().entries) == ["a"]
        cache.add(entry("c"))
    assert list(opened().entries) == ["a", "c"]


def test_what_does_not_fit_the_fitted_networks(tmp_path: Path) -> None:
    module = tmp_path / "small.py"
    module.write_text("from torch import nn\ndef model():\n    return nn.Conv2d(3, 16, 3)\n")
    mod = import_model(f"{module}:model", input_shape=(1, 3, 8, 8))
    networks = FittedNetworks(mod, tmp_path / FITTED)
    with little_room(100), pytest.raises(UserError, match=r"cannot write .*npz: .*; make room"):
        networks.once(Plan(), "decomposed", lambda: mod)
    assert not list((tmp_path / FITTED).glob("*.npz"))
    networks.once(Plan(), "decomposed", lambda: mod)
    assert len(list((tmp_path / FITTED).glob("*.npz"))) == 1


@pytest.mark.parametrize("option", ["--resume", "--force"])
def test_a_second_search_leaves_the_first_alone(
    interrupted: Place, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    place = copied(interrupted, f"two{option}")
    monkeypatch.setenv("EPOCHS", str(place.epochs))
    before = {path: path.read_bytes() for path in place.out.rglob("*") if path.is_file()}
    header = lines(place.out / JOURNAL)[0]["value"]
    first = Journal(place.out / JOURNAL, header)
    done = run(*place.arguments, option, cwd=tmp_path)
    assert done.returncode == 2 and "is in use by another search" in done.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in place.out.rglob("*") if path.is_file()} == before
    first.record("probe", "later", 1)
    first.close()
    assert lines(place.out / JOURNAL)[-1]["key"] == "later"
