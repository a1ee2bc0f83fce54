"""Figures of samples and of the report are drawn for any store."""

from pathlib import Path

import numpy as np
import pytest
from helpers_figures import run_figure
from helpers_store import make_store

from jigsaw_d2.data.report import summarise
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.visualization.extraction_report import report_figure
from jigsaw_d2.visualization.samples import choose_samples, samples_figure


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return make_store(tmp_path_factory.mktemp("figures") / "store", n_per_group=4)


def test_groups_take_turns(store: SampleStore) -> None:
    chosen = choose_samples(store, 6, np.random.default_rng(0))
    assert store.groups[chosen].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(set(choose_samples(store, 99, np.random.default_rng(0)))) == 12


def test_boxes_lie_where_the_annotation_lies_in_the_sample(store: SampleStore) -> None:
    figure = samples_figure(store, np.array([4]))
    (patch,) = figure.axes[0].patches
    x0, y0, x1, y1 = store.gt_boxes[4] - np.tile(store.boxes[4, :2], 2)
    assert np.allclose(patch.get_bbox().extents + 0.5, [x0, y0, x1, y1])
    assert figure.axes[0].images[0].get_array().shape == (*store.sizes[4], 3)


def test_command_writes_the_figure(store: SampleStore, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "samples.png"
    words = [str(store.paths[0]), "--output", str(path)]
    for more in (["--count", "5"], ["--indices", "3", "0"]):
        assert run_figure("samples", [*words, *more]) == (0, f"{path}\n")
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keep", [12, 1, 0])
def test_report_figure_of_full_and_empty_groups(store: SampleStore, keep: int) -> None:
    index = store.index[:keep]
    report = summarise(index, store.categories, JigsawTemplate(), (0.8, 1.5))
    assert len(report_figure(report).axes) == 4
