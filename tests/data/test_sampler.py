"""The draws: passes, ranks, balance, borrowing, and that a number alone gives the samples."""

import logging

import numpy as np
import pytest

from jigsaw_d2.data.sampler import JigsawSampler, repeat_factors
from jigsaw_d2.io import ConfigError, DataError

GROUPS = np.array([0] * 7 + [1] * 5 + [2] * 4, np.uint8)
SIZES = np.array([[10, 10]] * 7 + [[40, 10]] * 5 + [[10, 40]] * 4, np.int32)


def make_sampler(seed: int = 0, **options) -> JigsawSampler:
    return JigsawSampler(sizes=SIZES, groups=GROUPS, seed=seed, **options)


def draws(sampler: JigsawSampler, count: int) -> np.ndarray:
    """int64 (count, 4) quadruples S, S, T, W."""
    return np.stack([sampler.quadruple(p) for p in range(count)])


def test_slots_come_from_their_groups():
    quads = draws(make_sampler(), 50)
    assert quads.dtype == np.int64
    assert (GROUPS[quads] == [0, 0, 1, 2]).all()


def test_every_sample_once_before_any_twice():
    quads = draws(make_sampler(), 70)
    streams = {0: quads[:, :2].ravel(), 1: quads[:, 2], 2: quads[:, 3]}
    for group, length in ((0, 7), (1, 5), (2, 4)):
        members = np.flatnonzero(GROUPS == group).tolist()
        passes = [
            streams[group][k : k + length] for k in range(0, len(streams[group]) - length, length)
        ]
        assert all(sorted(one.tolist()) == members for one in passes)
        assert len({tuple(one.tolist()) for one in passes}) > 1  # freshly shuffled


def test_size_aware_draws_pair_the_halves_and_leave_no_sample_out():
    """7 samples of areas 1..7 a pass: its smaller ones on even draws, 4 of them or 3 in turn."""
    sizes = np.array([[n, 1] for n in range(1, 8)] + SIZES[7:].tolist(), np.int32)
    sampler = JigsawSampler(sizes=sizes, groups=GROUPS, seed=0, size_aware=True)
    stream = draws(sampler, 70)[:, :2].ravel()
    for start in range(0, 140, 7):
        own = stream[start : start + 7]
        even = own[start % 2 :: 2]
        assert sorted(own.tolist()) == list(range(7))
        assert sorted(even.tolist()) == list(range(len(even)))
    assert len({tuple(stream[start : start + 7]) for start in range(0, 140, 7)}) > 1


@pytest.mark.parametrize("options", [{}, {"repeat_factors": np.linspace(1, 3, 16)}])
def test_a_number_alone_gives_the_samples(options):
    walked = draws(make_sampler(**options), 200)
    for position in (199, 0, 63, 64, 5):
        assert (make_sampler(**options).quadruple(position) == walked[position]).all()
    assert not (draws(make_sampler(seed=1, **options), 200) == walked).all()


def test_leaps_over_passes_leave_nothing_behind():
    """A worker's batches are many passes apart where a store is small."""
    sampler = make_sampler()
    for position in range(0, 3000, 100):
        sampler.quadruple(position)
    assert len(sampler._passes) <= 9


def test_orders_are_equally_likely():
    # first draw of the W group over 4000 seeds: 4 samples, binomial(4000, 1/4), deviation 27
    first = [make_sampler(seed).quadruple(0)[3] for seed in range(4000)]
    assert np.abs(np.bincount(first, minlength=16)[12:] - 1000).max() < 4 * 28


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_two_ranks_never_share_a_sample_within_a_pass(world_size):
    sampler = make_sampler()
    # Draw d of group T belongs to image d, and image d to rank d % world_size; 5 draws a pass.
    owners = {}
    for position in range(100):
        key = (position // 5, int(sampler.quadruple(position)[2]))
        assert owners.setdefault(key, position % world_size) == position % world_size
        assert position // 5 == key[0]
    assert len(owners) == 100  # every draw of every pass is another sample


def test_replacements_are_the_next_of_the_group():
    sampler = make_sampler()
    quads = draws(sampler, 20)
    s_stream = quads[:, :2].ravel()
    assert list(sampler.replacements(0, 3)) == s_stream[7:14].tolist()
    assert list(sampler.replacements(1, 3)) == s_stream[8:15].tolist()
    assert list(sampler.replacements(2, 3)) == quads[4:9, 2].tolist()
    assert list(sampler.replacements(3, 3)) == quads[4:8, 3].tolist()


def test_class_balanced_passes_have_the_expected_counts():
    factors = np.ones(16)
    factors[[0, 8, 13]] = [2.5, 2.0, 1.25]
    sampler = make_sampler(repeat_factors=factors)
    assert [sampler.pass_length(g) for g in range(3)] == [9, 6, 5]  # ceil of 8.5, 6, 4.25
    counts = np.zeros(16)
    for number in range(400):
        for group, length in enumerate((9, 6, 5)):
            order = sampler.permutation(group, number)
            assert len(order) == length
            drawn = np.bincount(order, minlength=16)
            assert (drawn[GROUPS == group] >= 1).all()
            counts += drawn
    # Shares of a pass are in the proportion of the factors: 9 / 8.5 x 2.5 = 2.65 and so on.
    expected = factors * np.array([9 / 8.5] * 7 + [1] * 5 + [5 / 4.25] * 4)
    assert np.abs(counts / 400 - expected).max() < 0.1


def test_repeat_factors_by_hand():
    # class 0: 8 of 10, class 1: 1 of 10, class 3: 1 of 10; threshold 0.4: sqrt(0.4 / 0.1) = 2
    classes = np.array([0] * 8 + [1, 3])
    assert repeat_factors(classes, 0.4).tolist() == pytest.approx([1.0] * 8 + [2.0, 2.0])
    with pytest.raises(ConfigError, match="DATALOADER.REPEAT_THRESHOLD"):
        repeat_factors(classes, 0.0)


def test_empty_group_borrows_the_nearest_with_one_warning(caplog):
    # no W (> 1.5): the widest of 30 S samples, width / height 0.8 .. 1.38, stand in
    sizes = np.array([[100, 80 + 2 * k] for k in range(30)] + [[100, 30]], np.int32)
    groups = np.array([0] * 30 + [1], np.uint8)
    with caplog.at_level(logging.WARNING):
        sampler = JigsawSampler(sizes=sizes, groups=groups, seed=0)
    assert sorted(set(draws(sampler, 40)[:, 3].tolist())) == [26, 27, 28, 29]
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1
    words = ("group W", "1.5", "31", "4 nearest", "1.32 to 1.38")
    assert all(word in messages[0] for word in words)


@pytest.mark.parametrize("group, size", [(0, (10, 10)), (1, (50, 10)), (2, (10, 50))])
def test_one_sample_serves_all_slots(group, size, caplog):
    with caplog.at_level(logging.WARNING):
        sampler = JigsawSampler(sizes=np.array([size]), groups=np.array([group]), seed=3)
    assert len(caplog.records) == 2
    assert (draws(sampler, 9) == 0).all()


def test_no_sample_at_all_is_an_error():
    with pytest.raises(DataError, match="empty"):
        JigsawSampler(sizes=np.zeros((0, 2)), groups=np.zeros(0, np.uint8), seed=0)
