"""The Android example without Android: its Java class and JNI functions on this machine's JVM, with a package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import tvm_lowrank
from support import packaged_network
from tvm_lowrank import Choice
from tvm_lowrank.bundle.library import Which
from tvm_lowrank.bundle.package import package

pytestmark = pytest.mark.slow

ANDROID = Path(__file__).resolve().parents[1] / "examples" / "android"
MAIN = ANDROID / "app" / "src" / "main"
NAMESPACE = "org.tvmlowrank.example"
JAVA = MAIN.joinpath("java", *NAMESPACE.split("."))
COUNT, SIZE = 5, 12
needs_java = pytest.mark.needs("javac")

RUN = """
import java.nio.ByteBuffer;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.util.Arrays;
import org.tvmlowrank.example.Classifier;

/** BUNDLE NETWORK THREADS IMAGES: the properties and the outputs of a network. */
public final class Run {
  public static void main(String[] arguments) throws Exception {
    FloatBuffer file = ByteBuffer.wrap(Files.readAllBytes(Paths.get(arguments[3]))).asFloatBuffer();
    float[] images = new float[file.remaining()];
    file.get(images);
    Classifier.Network network = Classifier.Network.valueOf(arguments[1]);
    try (Classifier classifier = new Classifier(arguments[0], network, Integer.parseInt(arguments[2]))) {
      System.out.println(Arrays.toString(classifier.inputShape()));
      System.out.println(classifier.outputSize());
      System.out.println(Arrays.toString(classifier.run(images)));
    }
  }
}
"""

MISUSE = """
import org.tvmlowrank.example.Classifier;

/** BUNDLE FLOATS: what each wrong use of a network, of whose image so many floats are, throws. */
public final class Misuse {
  public static void main(String[] arguments) {
    Classifier classifier = new Classifier(arguments[0], Classifier.Network.COMPRESSED, 1);
    float[] image = new float[Integer.parseInt(arguments[1])];
    attempt(() -> classifier.run(new float[image.length + 1]));
    attempt(() -> classifier.run(new float[0]));
    attempt(() -> classifier.run(null));
    attempt(() -> new Classifier(null, Classifier.Network.COMPRESSED, 1));
    attempt(() -> new Classifier(arguments[0], Classifier.Network.COMPRESSED, -1));
    System.out.println(classifier.run(image).length);
    classifier.close();
    classifier.close();
    attempt(() -> classifier.run(image));
    attempt(classifier::inputShape);
    attempt(classifier::outputSize);
  }

  private static void attempt(Runnable use) {
    try {
      use.run();
      System.out.println("nothing");
    } catch (RuntimeException error) {
      System.out.println(error.getClass().getSimpleName() + ": " + error.getMessage());
    }
  }
}
"""


@dataclass(frozen=True)
class Made:
    """A package, and the example's classes and native library with two programs that use them."""

    package: Path
    jdk: Path
    classes: Path

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """A program on the JVM, which prints on stdout what a native function does against the rules of JNI."""
        command = [self.jdk / "bin" / "java", "-Xcheck:jni", "-cp", self.classes, f"-Djava.library.path={self.classes}"]
        # when it is loaded, TVM's library replaces the JVM's handler of SIGSEGV, but not if this one is there first
        environment = {**os.environ, "LD_PRELOAD": str(self.jdk / "lib" / "libjsig.so")}
        return subprocess.run(
            [*command, program, *arguments], capture_output=True, text=True, env=environment, timeout=120
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A batch of two, so that five images end with half of one."""
    folder = tmp_path_factory.mktemp("android")
    tvm_lowrank.decompose(
        model=f"{Path(packaged_network.__file__)}:model",
        plan={"2": Choice("spatial", 6)},
        input_shape=(1, 3, SIZE, SIZE),
        batch=2,
        trials=1,
        out=folder / "bundle",
        cache=folder / "cache",
    )
    out = package(folder / "bundle", folder / "package", with_runtime=True, cache_dir=folder / "cache")
    javac = shutil.which("javac")
    assert javac is not None
    jdk = Path(javac).resolve().parents[1]
    classes = folder / "classes"
    classes.mkdir()
    (folder / "Run.java").write_text(RUN)
    (folder / "Misuse.java").write_text(MISUSE)
    sources = [JAVA / "Classifier.java", folder / "Run.java", folder / "Misuse.java"]
    subprocess.run([jdk / "bin" / "javac", "-d", classes, *sources], check=True)
    include = [f"-I{path}" for path in (jdk / "include", jdk / "include" / "linux", out / "include")]
    command = ["cc", "-std=c99", "-Wall", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden", *include]
    link = [f"-L{out / 'lib'}", "-ltlr", f"-Wl,-rpath,{out / 'lib'}", "-Wl,--allow-shlib-undefined"]
    subprocess.run([*command, MAIN / "cpp" / "tlr_jni.c", "-o", classes / "libtlr_jni.so", *link], check=True)
    return Made(out, jdk, classes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in the order of bytes that Java reads."""
    path = tmp_path_factory.mktemp("images") / "images.f32"
    np.random.default_rng(0).standard_normal((COUNT, 3, SIZE, SIZE)).astype(">f4").tofile(path)
    return path


@needs_java
@pytest.mark.parametrize(("network", "which"), [("COMPRESSED", "model"), ("DENSE", "dense")])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_outputs_are_those_of_python(made: Made, images: Path, network: str, which: Which, threads: str) -> None:
    done = made.run("Run", made.package, network, threads, images)
    assert done.returncode == 0, done.stdout + done.stderr
    shape, size, outputs = map(json.loads, done.stdout.splitlines())
    assert (shape, size) == ([2, 3, SIZE, SIZE], 10)
    batch = np.fromfile(images, ">f4").reshape(COUNT, 3, SIZE, SIZE).astype("float32")
    expected = tvm_lowrank.load(made.package, which=which)(batch)
    scores = np.array(outputs).reshape(COUNT, size)
    assert scores.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def remove(bundle: Path) -> None:
    shutil.rmtree(bundle)


def flip(bundle: Path) -> None:
    content = bytearray((bundle / "model.so").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.so").write_bytes(content)


def cut(bundle: Path) -> None:
    content = (bundle / "model.so").read_bytes()
    (bundle / "model.so").write_bytes(content[: len(content) // 2])


@needs_java
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "cannot read {}/manifest.json; is it the folder of a bundle?"),
        (flip, "{}/model.so is not the file that the manifest describes; copy the bundle again"),
        (cut, "{}/model.so is not the file that the manifest describes; copy the bundle again"),
    ],
    ids=["missing", "changed", "cut"],
)
def test_an_unusable_bundle_is_an_exception(
    made: Made, images: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(made.package, bundle, ignore=shutil.ignore_patterns("lib", "include"))
    damage(bundle)
    done = made.run("Run", bundle, "COMPRESSED", "1", images)
    assert done.returncode == 1 and done.stdout == "", done.stdout + done.stderr
    assert f"java.lang.IllegalStateException: {message.format(bundle)}\n" in done.stderr


@needs_java
def test_misuse_is_an_exception(made: Made) -> None:
    floats = 3 * SIZE * SIZE
    done = made.run("Misuse", made.package, str(floats))
    assert done.returncode == 0, done.stdout + done.stderr
    closed = "IllegalStateException: the classifier is closed"
    number = f"IllegalArgumentException: an image has {floats} floats; {{}} are not a number of images"
    assert done.stdout.splitlines() == [
        number.format(floats + 1),
        number.format(0),
        number.format(0),
        "IllegalArgumentException: no bundle given",
        "IllegalStateException: the number of threads must not be negative",
        "10",
        closed,
        closed,
        closed,
    ]


def test_android_manifest() -> None:
    name = "{http://schemas.android.com/apk/res/android}name"
    manifest = ElementTree.parse(MAIN / "AndroidManifest.xml")
    assert [activity.get(name) for activity in manifest.iter("activity")] == [".MainActivity"]
    for source in ("MainActivity", "Classifier"):
        assert f"package {NAMESPACE};" in (JAVA / f"{source}.java").read_text()


def test_files_that_the_build_names_exist() -> None:
    assert re.findall(r"include ':(\w+)'", (ANDROID / "settings.gradle").read_text()) == ["app"]
    gradle = (ANDROID / "app" / "build.gradle").read_text()
    assert f"namespace '{NAMESPACE}'" in gradle
    [path] = re.findall(r"path '(\S+)'", gradle)
    cmake = ANDROID / "app" / path
    text = cmake.read_text()
    [interface] = re.findall(r'set\(TLR "\$\{CMAKE_CURRENT_SOURCE_DIR\}/(\S+)"', text)
    [(library, sources)] = re.findall(r"add_library\((\w+) SHARED (.*)\)", text)
    files = [cmake.parent / source.strip('"').replace("${TLR}", interface) for source in sources.split()]
    assert [file for file in files if not file.is_file()] == []
    assert {file.name for file in files} == {"tlr_jni.c", *(file.name for file in files[1].parent.glob("*.cc"))}
    assert f'System.loadLibrary("{library}")' in (JAVA / "Classifier.java").read_text()
