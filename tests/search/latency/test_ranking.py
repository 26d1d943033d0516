import numpy as np

from tvm_lowrank.codegen.schedule import Tiling, Workload
from tvm_lowrank.searching.latency.ranking import ALIKE, LEAST, Ranking
from tvm_lowrank.searching.latency.tiles import first_candidates, register_tiles

LANES, REGISTERS = 16, 32


def space(size, inside, outside):
    return Workload((1, size, size, outside), (3, 3, inside), outside, True)


def spaces(count, seed):
    generator = np.random.default_rng(seed)
    sizes, channels = generator.choice([7, 14, 28, 56], count), 16 * generator.integers(1, 20, (count, 2))
    return [space(int(s), int(i), int(o)) for s, (i, o) in zip(sizes, channels, strict=True)]


def milliseconds(tiling):
    """A processor that wants one vector of channels, eight positions and the channels inside."""
    positions = int(np.prod(tiling.tile[:-1]))
    vectors = tiling.tile[-1] // tiling.vector
    return 1 + 0.2 * (vectors - 1) + 0.05 * abs(positions - 8) + 0.1 * tiling.channels_first + 0.3 * (tiling.stripe > 0)


def taught(count):
    ranking = Ranking(lanes=LANES, registers=REGISTERS)
    trials = []
    for own in spaces(count, 1):
        tried = first_candidates(own, lanes=LANES, registers=REGISTERS, limit=12)
        tried += [Tiling(t.tile, t.vector, not t.channels_first, t.stripe) for t in tried]
        trials.append((own, {tiling: milliseconds(tiling) for tiling in tried}))
    ranking.learn(trials)
    return ranking


def test_what_other_shapes_taught_beats_the_count_of_instructions():
    ranking = taught(40)
    lost = []
    for own in spaces(20, 2):
        learnt = min(milliseconds(t) for t in ranking.best(own, 4))
        counted = min(milliseconds(t) for t in first_candidates(own, lanes=LANES, registers=REGISTERS, limit=4))
        lost.append(learnt / counted)
    assert np.median(lost) < 0.95 and max(lost) < 1.1


def test_little_data_says_nothing():
    ranking = taught(LEAST - 1)
    own = space(14, 64, 64)
    tiles = register_tiles(own, lanes=LANES, registers=REGISTERS)[:5]
    assert ranking.best(own, 5) == []
    assert ranking.order(own, tiles) == tiles


def test_first_schedules_are_distinct_and_of_several_tiles():
    found = taught(40).best(space(28, 128, 256), 8)
    assert len(set(found)) == 8
    assert max(sum(t.tile == other.tile for t in found) for other in found) <= ALIKE


def test_learning_is_deterministic():
    own = space(28, 96, 160)
    assert taught(30).best(own, 8) == taught(30).best(own, 8)
