"""The sheet of Jigsaw images, from the command line and from a training batch."""

import numpy as np
import pytest
from helpers_figures import run_figure
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import build_jigsaw_train_loader
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.visualization.jigsaw import (
    PADDING_COLOUR,
    batch_figure,
    shade_padding,
    used_share,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("sheet") / "store", n_per_group=3, size_range=(20, 90)
    )


def test_padding_is_striped_and_samples_are_untouched():
    image = np.full((224, 224, 3), 9, np.uint8)
    boxes = np.array([[0, 0, 64, 64], [64, 0, 224, 64], [0, 64, 64, 224], [100, 100, 150, 150]])
    shaded = shade_padding(image, boxes)
    assert (shaded[100:150, 100:150] == 9).all() and (shaded[:64] == 9).all()
    striped = (shaded[150:, 64:] == PADDING_COLOUR).all(axis=2).mean()
    assert 0.4 < striped < 0.6 and (image == 9).all()
    # 64*64 + 160*64 + 64*160 + 50*50 of 224*224
    assert used_share(boxes, JigsawTemplate()) == pytest.approx(27076 / 50176)


@pytest.mark.parametrize("image_format, rank", [("RGB", 0), ("BGR", 1)])
def test_first_batch_of_training(store, tmp_path, image_format, rank):
    words = ["SOLVER.IMS_PER_BATCH", 6, "INPUT.FORMAT", image_format, "SEED", 0]
    cfg = get_jigsaw_cfg(overrides=[*words, "DATALOADER.NUM_WORKERS", 0])
    loader = build_jigsaw_train_loader(cfg, rank=rank, world_size=2, store=store)
    batch = next(iter(loader))
    panels = batch_figure(batch, loader).axes
    titles = [panel.get_title().split(":")[0] for panel in panels[:3]]
    assert titles == [f"image {rank + 2 * n}" for n in range(3)]
    order = slice(None) if image_format == "RGB" else slice(None, None, -1)
    image = batch["image"][0].permute(1, 2, 0).numpy()[..., order]
    assert (np.asarray(panels[0].images[0].get_array()) == image).mean() > 0.2


def test_command(store, tmp_path):
    output = tmp_path / "sheet.png"
    path = str(store.paths[0])
    args = [path, "--count", "2", "--output", str(output), "--opts", "INPUT.JIGSAW.FIT", "warp"]
    assert run_figure("jigsaw", args) == (0, f"{output}\n") and output.is_file()


def test_a_template_to_be_fitted_is_not_passed_over(store, tmp_path):
    """This store does not know its images' sizes, by which it would be fitted."""
    args = [str(store.paths[0]), "--output", str(tmp_path / "x.png")]
    status, said = run_figure("jigsaw", [*args, "--opts", "INPUT.JIGSAW.FIT_TO", "auto"])
    assert status == 2 and "how large its images are" in said and not (tmp_path / "x.png").exists()
