"""`tfds:NAME`: any prepared TensorFlow Datasets set of pictures with masks or labels; no TensorFlow, no download.

The prepared folder is looked for first: asking TFDS for a set that is not there may wait minutes for the network.
"""

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynjax.config import DataConfig, UserError
from dynjax.data.files import IGNORE_255, class_names, count_classes
from dynjax.data.pairs import Pair, Pairs, PairSource, check_pairs
from dynjax.data.pictures import BadFile, one_line, read_image, read_mask

IMAGE_KEYS = ("image", "image_left")  # tried in this order, then the only feature that fits
MASK_KEYS = ("segmentation_mask", "segmentation_label", "mask", "annotation", "annotations", "label")
LABEL_KEYS = ("label",)
Target = Literal["mask", "label"]
HANDED = ("mnist", "emnist", "kmnist", "svhn_cropped")  # sets of characters: mirrored they are none


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """A split of the set tfds:NAME[/CONFIG][:VERSION] prepared under `config.path` (empty: TFDS's own folder). Raises
    UserError.

    A set with a mask is read for segmentation, 255 marks ignored pixels; one with a class label and no mask for
    classification, its picture grey or RGB. The number of classes is that of `classes`, `config.classes`, the set's
    features or, where these do not say, its masks. A set without val or test splits gives parts of what it has; see
    `splits_of`.
    """
    name = config.name.removeprefix("tfds:")
    builder = _builder(name, find_prepared(name, config.path))
    image_key, key, target = _keys(name, builder.info.features)
    parts = splits_of({key for key, info in builder.info.splits.items() if info.num_examples})
    reader = _Reader(_open(builder, parts[split]), f"{config.name} {split}", image_key, key, target)
    names = _names(builder.info.features[key], len(classes) if classes else config.classes)
    if names is None:
        others = [_Reader(_open(builder, part), "", image_key, key, target) for part in parts.values()]
        masks = [(each, index) for each in others for index in range(len(each.records))]
        names = class_names(count_classes(lambda mask: mask[0].mask(mask[1]), masks, f"data.name={config.name}"))
    pairs = Pairs(
        reader,
        len(reader.records),
        names,
        target=target,
        ignored=IGNORE_255 if target == "mask" else None,
        called=reader.called,
        handed=builder.name in HANDED,
    )
    return check_pairs(pairs, config, split)


def find_prepared(name: str, path: str) -> Path:
    """Folder of the newest prepared version of a set. Raises UserError that says how to prepare it."""
    match = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise UserError(f"data.name=tfds:{name}: write tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION")
    base, config, version = match.groups()
    root = Path(os.path.expanduser(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    inner = f"{base}/{config}" if config else base
    folders = [file.parent for depth in ("*", "*/*") for file in root.glob(f"{inner}/{depth}/features.json")]
    if (root / "features.json").is_file() and base in root.parts:  # the path of the version itself
        folders.append(root)
    found = {tuple(map(int, f.name.split("."))): f for f in folders if re.fullmatch(r"\d+\.\d+\.\d+", f.name)}
    if version:
        found = {key: folder for key, folder in found.items() if folder.name == version}
    if not found:
        raise UserError(f"data.name=tfds:{name}: no prepared set in {root / inner}; {_how_to_prepare(name, root)}")
    folder = found[max(found)]
    try:
        about = json.loads((folder / "dataset_info.json").read_text())
        formats = {str(about.get("fileFormat", "tfrecord")), *map(str, about.get("alternativeFileFormats", []))}
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the last two: not as TFDS writes it
        raise UserError(f"data.name=tfds:{name}: {folder / 'dataset_info.json'} cannot be read: {error}") from None
    if "array_record" not in formats:
        raise UserError(
            f"data.name=tfds:{name}: {folder} is stored as {', '.join(sorted(formats))}, which has no random access; "
            + _how_to_prepare(name, root)
        )
    return folder


def _how_to_prepare(name: str, root: Path) -> str:
    if name.split("/")[0].split(":")[0] == "camvid":
        return f"prepare it with: python -m dynjax.data.camvid_tfds CAMVID_FOLDER {root}"
    return (
        f'prepare it once, with tensorflow-cpu installed and a network: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record').download_and_prepare()\""
    )


def splits_of(available: Iterable[str]) -> dict[str, str]:
    """TFDS's name for the parts that serve as train, val and test; never does one picture serve as two of them.

    A set without test lends its validation split to test; what is then missing is a tenth each off the end of train.
    """
    available = set(available)
    validation = next((name for name in ("validation", "val") if name in available), None)
    test = "test" if "test" in available else validation
    val = None if test == validation else validation
    if "train" not in available:
        raise UserError(
            f"a set with the splits {', '.join(sorted(available)) or 'none'} cannot be used: it has no train"
        )
    parts = {"train": "train"} | {key: part for key, part in (("val", val), ("test", test)) if part is not None}
    cuts = [key for key in ("val", "test") if key not in parts]
    for position, key in enumerate(cuts):
        end = 100 - 10 * (len(cuts) - 1 - position)
        parts[key] = f"train[{end - 10}%:{end}%]"
    if cuts:
        parts["train"] = f"train[:{100 - 10 * len(cuts)}%]"
    return parts


def _builder(name: str, folder: Path) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data.name=tfds:{name} needs tensorflow-datasets: pip install dynjax[tfds] ({error})"
        ) from None
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever a damaged folder makes TFDS raise
        raise UserError(f"data.name=tfds:{name}: {folder} cannot be read: {one_line(error)}") from None


def _keys(name: str, features: Any) -> tuple[str, str, Target]:
    """Keys of the picture and of what is to be predicted, and which of the two kinds that is."""
    import tensorflow_datasets as tfds

    pictures = {key: feature for key, feature in features.items() if isinstance(feature, tfds.features.Image)}
    images = [key for key, feature in pictures.items() if feature.shape[-1] == 3]
    masks = [key for key, feature in pictures.items() if feature.shape[-1] == 1]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]

    def choose(fitting, preferred):
        known = [key for key in preferred if key in fitting]
        return known[0] if known else fitting[0] if len(fitting) == 1 else None

    target: Target = "label" if labels and not (images and masks) else "mask"
    if target == "label":
        image, key = choose(images or masks, IMAGE_KEYS), choose(labels, LABEL_KEYS)
    else:
        image, key = choose(images, IMAGE_KEYS), choose(masks, MASK_KEYS)
    if image is None or key is None:
        raise UserError(
            f"data.name=tfds:{name}: no set of pictures with masks or class labels: of its features "
            f"{', '.join(features)} none is clearly the {'picture' if image is None else target}"
        )
    return image, key, target


def _names(feature: Any, classes: int) -> tuple[str, ...] | None:
    known = getattr(feature, "num_classes", None)
    if known and classes in (0, known):
        try:
            return tuple(feature.names)
        except ValueError:  # TFDS knows the number alone
            return class_names(known)
    return class_names(classes) if classes else None


def _open(builder: Any, part: str) -> Any:
    """The records of a part, pictures still encoded: `_Reader` decodes the two that matter and says what is wrong."""
    import tensorflow_datasets as tfds

    pictures = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    try:
        return builder.as_data_source(part, decoders={key: tfds.decode.SkipDecoding() for key in pictures})
    except Exception as error:  # missing or damaged shards
        raise UserError(
            f"data.name=tfds:{builder.name}: {part} of {builder.data_dir} cannot be read: {one_line(error)}"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """`read` of `Pairs`."""

    records: Any
    name: str
    image_key: str
    key: str
    target: Target

    def called(self, index: int) -> str:
        return f"{self.name} example {index}"

    def record(self, index: int) -> dict[str, Any]:
        try:
            return self.records[index]
        except Exception as error:  # a damaged shard
            raise BadFile(f"{self.called(index)}: {one_line(error)}") from None

    def mask(self, index: int) -> np.ndarray:
        return read_mask(io.BytesIO(self.record(index)[self.key]), f"{self.called(index)}, {self.key}")

    def __call__(self, index: int) -> Pair:
        record = self.record(index)
        image = read_image(io.BytesIO(record[self.image_key]), f"{self.called(index)}, {self.image_key}")
        return image, self.mask(index) if self.target == "mask" else np.int32(record[self.key])
