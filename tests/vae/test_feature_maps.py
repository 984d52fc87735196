import pytest
import torch

from tudsr_core.vae.feature_maps import FeatureMap, Joined, intervals

CPU = torch.device("cpu")


@pytest.mark.parametrize(("length", "side", "unit"), [(1, 8, 1), (17, 5, 1), (64, 64, 1), (65, 64, 1), (54, 9, 2)])
def test_intervals_partition_evenly(length, side, unit):
    cut = intervals(length, side, unit)
    assert cut[0][0] == 0 and cut[-1][1] == length
    assert all(a[1] == b[0] for a, b in zip(cut, cut[1:], strict=False))
    sizes = [b - a for a, b in cut]
    assert max(sizes) <= side + unit - 1 and max(sizes) - min(sizes) <= unit
    assert len(cut) == -(-length // side)
    assert all(a % unit == 0 for a, _ in cut)


def test_a_feature_map_gives_back_any_part_of_what_was_written(noise):
    whole, into = noise(1, 3, 70, 30), torch.empty
    feature_map = FeatureMap(3, 70, 30, torch.float32, CPU)
    for rows in intervals(70, 17):
        for columns in intervals(30, 11):
            feature_map.write(rows, columns, whole[..., slice(*rows), slice(*columns)])

    def part(rows, columns):
        return feature_map.read(rows, columns, into(1, 3, rows[1] - rows[0], columns[1] - columns[0]))

    for rows, columns in (((0, 70), (0, 30)), ((5, 66), (3, 4)), ((22, 24), (29, 30))):
        assert torch.equal(part(rows, columns), whole[..., slice(*rows), slice(*columns)])
    assert len(feature_map.rows) == 3
    feature_map.free(before=47)
    freed = [band is None for band in feature_map.bands]
    assert freed == [bottom <= 47 for _, bottom in feature_map.rows] == [True, True, False]
    assert torch.equal(part((47, 70), (0, 30)), whole[..., 47:, :])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_of_tiles_are_those_of_the_feature_map(offset, noise):
    """Also where tiles differ much and the mean is large against the deviation."""
    whole = noise(1, 12, 40, 50).double() + offset
    whole[..., 25:] += 3
    feature_map = FeatureMap(12, 40, 50, torch.float64, CPU)
    for rows in intervals(40, 13):
        for columns in intervals(50, 17):
            feature_map.add(feature_map.measure(whole[..., slice(*rows), slice(*columns)]))
    mean, variance = feature_map.moments(4)
    grouped = whole.view(4, -1)
    assert (mean - grouped.mean(1)).abs().max() < 1e-12 * max(1, offset)
    assert (variance / grouped.var(1, correction=0) - 1).abs().max() < 1e-9
    assert feature_map.finite()
    feature_map.add(feature_map.measure(torch.full((1, 12, 1, 1), torch.inf)))
    assert not feature_map.finite()


def test_joined_feature_maps_are_one_without_a_copy(noise):
    """Also where a group of channels has some of both, and tiles were cut differently."""
    whole, parts = noise(1, 12, 40, 50).double(), []
    for channels, side in ((slice(0, 5), 13), (slice(5, 12), 28)):
        own = FeatureMap.of(whole[0, channels].clone())
        for rows in intervals(40, side):
            own.add(own.measure(whole[:, channels, slice(*rows)]))
        parts.append(own)
    joined = Joined(*parts)
    mean, variance = joined.moments(4)
    assert (mean - whole.view(4, -1).mean(1)).abs().max() < 1e-12
    assert (variance - whole.view(4, -1).var(1, correction=0)).abs().max() < 1e-12
    part = joined.read((3, 37), (1, 9), torch.empty(1, 12, 34, 8, dtype=torch.float64))
    assert torch.equal(part, whole[..., 3:37, 1:9])
    joined.free(40)
    assert all(band is not None for one in parts for band in one.bands)
