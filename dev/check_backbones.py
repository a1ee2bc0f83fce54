"""Which detectors load which weights, and which backbones go the whole way; tables with counts.

python dev/check_backbones.py zoo          # every config of Detectron2's model zoo x weights
python dev/check_backbones.py backbones    # pre-train 5 steps, convert, load, one detector step

Networks are thin and images small: names, strides, norms and inputs are what is looked at. A config
counts as loaded where every tensor of its backbone came from the file and the features of the fixed
picture are the pre-training's.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from tabulate import tabulate

import jigsaw_d2.modeling.meta_arch  # noqa: F401  (registers JigsawPretrainer)
from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.config import apply_metadata, load_detection_config
from jigsaw_d2.detection.lazy import load_lazy_config
from jigsaw_d2.io import JigsawError
from jigsaw_d2.tools import convert, extract, finetune, pretrain

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 8,
    "DATALOADER.NUM_WORKERS": 0,
}
THIN = {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 32}
WEIGHTS = {
    "R-50": {},
    "R-101": {"DEPTH": 101},
    "X-101": {"DEPTH": 101, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 2},
    "R-50 GN": {"NORM": "GN"},
    "R-50 DCN": {"DEFORM_ON_PER_STAGE": [False, True, True, True]},
    "R-18": {"DEPTH": 18, "WIDTH_PER_GROUP": 64},
}
# As wide as LazyConfigs are, which take no width from the weights.
WIDE = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 64}
LAZY_WEIGHTS = {"R-50, full width": WIDE, "R-101, full width": WIDE | {"DEPTH": 101}}
OWN = "a pre-training --backbone-from it"
# (builder's library or "detectron2", network, further keys)
BACKBONES = [
    ("detectron2", "R-50", ["MODEL.RESNETS.NORM", "BN"]),
    ("detectron2", "R-50 GN", ["MODEL.RESNETS.NORM", "GN"]),
    ("torchvision", "resnet18", []),
    ("torchvision", "convnext_tiny", []),
    ("torchvision", "swin_t", []),
    ("torchvision", "mobilenet_v3_small", []),
    ("torchvision", "regnet_y_400mf", []),
    ("timm", "convnext_atto", []),
    ("timm", "efficientnet_b0", []),
    ("timm", "swin_tiny_patch4_window7_224", [["strict_img_size", False]]),
    ("timm", "regnetx_002", []),
]
FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def flat(keys: dict) -> list:
    """KEY VALUE ... as on a command line."""
    return [str(part) for pair in keys.items() for part in pair]


def make_weights(folder: Path, name: str, keys: dict, more: dict | None = None) -> Path:
    """A converted file of random weights, as a pre-training would leave them.

    ``keys``: of MODEL.RESNETS; ``more``: others by their whole names.
    """
    keys = {**THIN, "NORM": "BN", **keys}
    resnets = {f"MODEL.RESNETS.{key}": value for key, value in keys.items()}
    overrides = {**resnets, "MODEL.DEVICE": "cpu", **(more or {})}
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", flat(overrides))
    cfg.MODEL.JIGSAW.NUM_CLASSES = 3
    torch.manual_seed(0)
    store = {"categories": ["a", "b", "c"], "dataset": "none", "image_ids_hash": "00"}
    record = {"config": cfg.dump(), "store": store, "images_seen": 0, "code_version": "0"}
    state = build_model(cfg).state_dict()
    torch.save({"model": state, "iteration": 0, "jigsaw": record}, folder / "c.pth")
    weights = folder / f"{name.replace(' ', '_')}.pkl"
    convert_checkpoint(folder / "c.pth", weights, force=True)
    return weights


def try_config(name: str, weights: Path) -> str:
    """ "loaded", or why not, in the first words."""
    try:
        if name.endswith(".py"):
            load_backbone(instantiate(load_lazy_config(name, weights).model), weights)
            return "loaded"
        cfg = load_detection_config(name, flat(SMALL))
        for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
            if "Sync" in cfg.MODEL[part].NORM:
                cfg.MODEL[part].NORM = "BN"
        apply_metadata(cfg, read_converted(weights)[1], match_architecture=True)
        load_backbone(build_model(cfg), weights)
    except JigsawError as error:
        lines = str(error).splitlines()
        reason = next((line.strip() for line in lines[1:] if line.startswith("    ")), lines[0])
        return f"refused: {reason[:90]}"
    except (AssertionError, ImportError) as error:
        return f"Detectron2 does not build it: {str(error)[:60]}"
    return "loaded"


def try_own(name: str, folder: Path) -> str:
    """As ``try_config`` of a LazyConfig, with weights of its own backbone."""
    feature = "s4" if "regnet" in name else "res5"
    keys = {"MODEL.BACKBONE.NAME": "build_lazy_backbone", "MODEL.JIGSAW.BACKBONE_FROM": name}
    try:
        weights = make_weights(folder, "own", {}, keys | {"MODEL.JIGSAW.IN_FEATURE": feature})
    except JigsawError as error:
        return f"refused: {str(error).partition(':')[2][:90]}"
    return try_config(name, weights)


def run_zoo(folder: Path) -> int:
    """Print how many configs came to what with each kind of weights; 1 where one crashed."""
    root = Path(model_zoo.__file__).parent / "configs"
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.*")) if p.is_file()]
    parts = {end: [n for n in names if n.endswith(end)] for end in (".yaml", ".py")}
    parts[".yaml"] = [name for name in parts[".yaml"] if "Base" not in name]
    parts[".py"] = [name for name in parts[".py"] if not name.startswith("common/")]
    rows, failed = [], 0
    for kind, keys in (WEIGHTS | LAZY_WEIGHTS | {OWN: {}}).items():
        names = parts[".yaml" if kind in WEIGHTS else ".py"]
        weights = make_weights(folder, kind, keys) if kind != OWN else None
        outcomes: Counter = Counter()
        for name in names:
            try:
                outcomes[try_config(name, weights) if weights else try_own(name, folder)] += 1
            except Exception as error:
                failed += 1
                outcomes[f"CRASHED {name}: {type(error).__name__}: {error}"[:150]] += 1
        rows += [[kind, outcome, count] for outcome, count in outcomes.most_common()]
        print(f"{kind}: {dict(outcomes)}", file=sys.stderr)
    counts = [f"{len(parts['.yaml'])} YAML configs x {len(WEIGHTS)} kinds of weights"]
    counts += [f"{len(parts['.py'])} LazyConfigs x {len(LAZY_WEIGHTS) + 1}"]
    print(f"{', '.join(counts)}\n")
    print(tabulate(rows, ["weights", "outcome", "configs"], tablefmt="github"))
    return int(failed > 0)


def draw_set(folder: Path) -> Path:
    """Eight images of 96 pixels, three boxes of two classes each."""
    rng, images, annotations = np.random.default_rng(0), [], []
    folder.mkdir()
    for n in range(8):
        picture = rng.integers(0, 80, (96, 96, 3), dtype=np.uint8)
        images.append({"id": n + 1, "file_name": f"{n}.png", "height": 96, "width": 96})
        for w, h in ((40, 36), (20, 50), (50, 18)):
            x, y = (int(v) for v in rng.integers(0, 40, 2))
            picture[y : y + h, x : x + w] += 100
            one = {"image_id": n + 1, "category_id": 1 + (w > 30), "bbox": [x, y, w, h]}
            annotations.append({**one, "area": w * h, "iscrowd": 0, "id": len(annotations) + 1})
        cv2.imwrite(str(folder / f"{n}.png"), picture)
    categories = [{"id": 1, "name": "tall"}, {"id": 2, "name": "wide"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def go_whole_way(library: str, network: str, more: list, folder: Path, data: Path) -> list:
    """Row of the table: parameters, loss of the last step, tensors loaded, detector's loss."""
    pretraining = {
        **{"DATASETS.TRAIN": f"('{data.parent / 'store'}',)", "OUTPUT_DIR": folder / "run"},
        **{"SOLVER.MAX_ITER": 5, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.REFERENCE_BATCH_SIZE": 0},
        **{"SOLVER.BASE_LR": 0.001, "SOLVER.AMP.ENABLED": False, "MODEL.DEVICE": "cpu", "SEED": 1},
        **{"MODEL.JIGSAW.ERF.NUM_IMAGES": 2, "MODEL.JIGSAW.ERF.FIGURES": False},
        **{"DATALOADER.NUM_WORKERS": 0, "MODEL.JIGSAW.CHANNELS_LAST": False},
        **{"INPUT.JIGSAW.TEMPLATE_SIZE": [96, 96], "INPUT.JIGSAW.TEMPLATE_SPLIT": [32, 32]},
    }
    options = flat(pretraining)
    if library != "detectron2":
        node = f"MODEL.{library.upper()}"
        options += ["MODEL.BACKBONE.NAME", f"build_{library}_backbone", f"{node}.NAME", network]
        options += [f"{node}.KWARGS", str(more)]
    else:
        options += [*flat({f"MODEL.RESNETS.{key}": value for key, value in THIN.items()}), *more]
    pretrain.main(["--config-file", "jigsaw_R_50.yaml", *options])
    weights = folder / "w.pkl"
    convert.main(["--input", str(folder / "run"), "--output", str(weights)])
    sets = {"DATASETS.TRAIN": "('drawn',)", "DATASETS.TEST": "()", "SOLVER.MAX_ITER": 1}
    files = [["drawn", str(data / "train.json"), str(data)]]
    sets |= {"DATASETS.COCO_FILES": files, "OUTPUT_DIR": folder / "detector", "SEED": 1}
    sets |= {"SOLVER.IMS_PER_BATCH": 1, "SOLVER.BASE_LR": 1e-4, "INPUT.MIN_SIZE_TRAIN": "(96,)"}
    arguments = ["--config-file", FPN, "--weights", str(weights), "--match-architecture"]
    finetune.main([*arguments, *flat({**SMALL, **sets})])
    losses = [_last(folder / run / "metrics.json")["total_loss"] for run in ("run", "detector")]
    arrays, metadata = read_converted(weights)
    return [len(arrays), f"{metadata.network['parameters'] / 1e6:.1f}", *losses]


def _last(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def run_backbones(folder: Path) -> int:
    """Print the table; 1 where a backbone did not arrive."""
    data, rows, failed = draw_set(folder / "set"), [], 0
    source = ["--json", str(data / "train.json"), "--images", str(data), "--workers", "0"]
    with contextlib.redirect_stdout(io.StringIO()):
        extract.main([*source, "--output", str(folder / "store")])
    for library, network, more in BACKBONES:
        place = folder / f"{library}_{network.replace(' ', '_')}"
        place.mkdir()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                row = go_whole_way(library, network, more, place, data)
            rows.append([library, network, *row])
        except Exception as error:
            failed += 1
            rows.append([library, network, f"{type(error).__name__}: {error}"[:120]])
        print(rows[-1], file=sys.stderr)
    head = ["from", "network", "tensors", "M parameters", "pre-training loss", "detector loss"]
    print(tabulate(rows, head, tablefmt="github", floatfmt=".3f"))
    return int(failed > 0)


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("zoo", "backbones"))
    what = parser.parse_args().what
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        return (run_zoo if what == "zoo" else run_backbones)(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
