import pytest

from tvm_lowrank.errors import UserError
from tvm_lowrank.targets.profile import known_profiles, load_profile


def write(folder, text):
    path = folder / "board.toml"
    path.write_text(text)
    return str(path)


def test_bundled_profile_describes_this_machine():
    profile = load_profile("x86")
    assert profile.target["mcpu"] != "host"
    assert (profile.lanes, profile.registers) in {(16, 32), (8, 16), (4, 16)}
    assert int(profile.tvm_target(3).attrs["num-cores"]) == 3


def test_vector_file_follows_the_processor(tmp_path):
    vector = '[vector]\nlanes = "detect"\nregisters = "detect"\n'
    sizes = {}
    for cpu in ("haswell", "skylake-avx512"):
        path = write(tmp_path, f'[target]\nkind = "llvm"\nmtriple = "x86_64-linux-gnu"\nmcpu = "{cpu}"\n{vector}')
        profile = load_profile(path)
        sizes[cpu] = (profile.lanes, profile.registers)
    assert sizes == {"haswell": (8, 16), "skylake-avx512": (16, 32)}


def test_key_is_stable_and_tells_processors_apart(tmp_path):
    text = '[target]\nkind = "llvm"\nmcpu = "{}"\n[vector]\nlanes = 8\nregisters = 16\n'
    one, same, other = (load_profile(write(tmp_path, text.format(cpu))) for cpu in ("haswell", "haswell", "znver3"))
    assert one.key == same.key == "board-llvm-haswell-8x16"
    assert other.key != one.key


def test_unknown_target_lists_the_known():
    assert "x86" in known_profiles()
    with pytest.raises(UserError, match=r"unknown target 'vax'.*x86"):
        load_profile("vax")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[target", "not TOML"),
        ('[target]\nkind = "llvm"\n', "'vector' is missing"),
        ('[target]\nkind = "llvm"\n[vector]\nlanes = 0\nregisters = 16\n', "positive"),
        ('[target]\nkind = "vax"\n[vector]\nlanes = 8\nregisters = 16\n', "vax"),
    ],
)
def test_damaged_profile_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_profile(write(tmp_path, text))
    assert "board.toml" in str(error.value)
