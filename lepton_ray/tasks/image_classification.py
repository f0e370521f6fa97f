"""Image classification: one label per image. The model is the small CNN; the metric that decides is accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, FailFast, Field

from lepton_ray.data.encoded_images import decoded_images
from lepton_ray.data.order import mix64
from lepton_ray.errors import UsageError
from lepton_ray.tasks.classifying import Classifies
from lepton_ray.tasks.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    import torch
    from torchmetrics import Metric

MAX_PIXELS = 512 * 512 * 3
"""Most values of one image in a request."""


class ImageClassificationOptions(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Number of classes; from the labels of the training rows where none is given."""
    width: Annotated[int, Field(ge=1, le=1024)] = 24
    """Channels of the first convolution; the later layers follow from it."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Share of activations dropped before each fully connected layer in training."""
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = 10.0
    """Training images are turned by up to this many degrees either way."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Training images are scaled by up to this share either way."""
    shift: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.07
    """Training images are moved by up to this share of their side in each direction."""
    top_k: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Also evaluate the share of rows whose label is among this many most probable ones (metric `top_k`)."""


class ImageRequest(BaseModel):
    """One image: its pixel values 0 to 255, row by row (channels innermost), as many as the model was trained on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # FailFast: a wrong image is told by its first wrong value; all of a large one would take seconds
    image: Annotated[list[Annotated[int, Field(ge=0, le=255)]], FailFast(), Field(min_length=1, max_length=MAX_PIXELS)]


class ImageAnswer(BaseModel):
    """The most probable label and the probability of every label."""

    label: int
    probability: float
    probabilities: list[float]


class ImageClassification(Classifies, Task[ImageClassificationOptions, ImageRequest]):
    """One of a fixed number of labels for each image.

    Rows: `image` (binary, row-major uint8 pixels, channels innermost), `height`, `width`, `channels`, `label` (0 to
    classes - 1). All images of a table have one size.
    """

    name: ClassVar[str] = "image_classification"
    Options: ClassVar[type[BaseModel]] = ImageClassificationOptions
    Request: ClassVar[type[BaseModel]] = ImageRequest
    Answer: ClassVar[type[BaseModel]] = ImageAnswer
    columns: ClassVar[tuple[str, ...]] = ("image", "height", "width", "channels", "label")
    decides: ClassVar[tuple[str, Literal["max", "min"]]] = ("accuracy", "max")
    directions: ClassVar[Mapping[str, Literal["max", "min"]]] = {"loss": "min", **CLASSIFICATION}

    def fit(self, rows: pa.Table) -> dict[str, Any]:
        """Image size, number of classes, and mean and standard deviation of the pixel values (0..255)."""
        if rows.num_rows == 0:
            raise UsageError("training rows: there are none; ingest a table with rows")
        height, width, channels = (_only(rows, column) for column in ("height", "width", "channels"))
        if min(height, width) < 8:
            raise UsageError(f"images are {height}x{width}: the CNN needs at least 8x8; ingest larger images")
        if not pa.types.is_integer(rows["label"].type):
            kind = rows["label"].type
            raise UsageError(f"column label holds {kind}: expected whole numbers from 0; give each class its number")
        lowest, highest = pc.min_max(rows["label"]).values()
        if lowest.as_py() is None or lowest.as_py() < 0:
            raise UsageError(f"label is {lowest.as_py()}: expected 0 or more in every row; clean the table")
        classes = self.options.classes or highest.as_py() + 1
        if highest.as_py() >= classes:
            raise UsageError(
                f"task.options.classes is {classes}: the table has label {highest.as_py()}; "
                f"set it to {highest.as_py() + 1} or more, or leave it out"
            )
        if (self.options.top_k or 0) > max(2, classes):
            raise UsageError(f"task.options.top_k is {self.options.top_k}: there are {classes} classes; set it lower")
        pixels = _pixels(rows, height, width, channels)
        # float64 over blocks: exact enough for any size without a float copy of the whole table
        total = sum(int(block.sum(dtype=np.int64)) for block in np.array_split(pixels, max(1, len(pixels) // 4096)))
        mean = total / pixels.size
        squares = sum(
            float(np.square(block - mean).sum()) for block in np.array_split(pixels, max(1, len(pixels) // 1024))
        )
        deviation = max((squares / pixels.size) ** 0.5, 1e-6)
        return {
            "height": height, "width": width, "channels": channels, "classes": max(2, classes),
            "mean": mean, "deviation": deviation,
        }  # fmt: skip

    def build(self, transforms: Mapping[str, Any]) -> torch.nn.Module:
        """The small CNN for the fitted image size."""
        from lepton_ray.tasks.cnn import SmallCnn

        return SmallCnn(
            shape=(transforms["channels"], transforms["height"], transforms["width"]),
            classes=transforms["classes"],
            mean=transforms["mean"],
            deviation=transforms["deviation"],
            width=self.options.width,
            dropout=self.options.dropout,
        )

    def check_rows(self, rows: pa.Table, transforms: Mapping[str, Any]) -> None:
        """UsageError for an image of another size or a label outside the fitted classes."""
        _pixels(rows, transforms["height"], transforms["width"], transforms["channels"])
        labels = rows["label"].to_numpy()
        wrong = labels[~((labels >= 0) & (labels < transforms["classes"]))]
        if len(wrong):
            raise UsageError(f"label is {wrong[0]}: the model knows 0 to {transforms['classes'] - 1}; clean the table")

    def inputs(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Images as uint8 `[rows, channels, height, width]`."""
        import torch

        height, width, channels = transforms["height"], transforms["width"], transforms["channels"]
        pixels = _pixels(rows, height, width, channels).reshape(-1, height, width, channels)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def targets(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Labels as int64 `[rows]`."""
        import torch

        self.check_rows(rows, transforms)
        return torch.from_numpy(rows["label"].to_numpy().astype(np.int64))

    def augment(self, inputs: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> torch.Tensor:
        """Turned, scaled and shifted within the options; bilinear, black outside."""
        import torch
        from torch.nn import functional

        options = self.options
        if not (options.rotate or options.scale or options.shift):
            return inputs
        random = torch.from_numpy(_uniforms(seeds, 4))  # [rows, 4] in -1..1
        angle = random[:, 0] * (options.rotate * torch.pi / 180)
        size = 1 + random[:, 1] * options.scale
        cosine, sine = torch.cos(angle) * size, torch.sin(angle) * size
        shift = random[:, 2:] * (2 * options.shift)  # grid coordinates span -1..1
        rotation = torch.stack([cosine, -sine, sine, cosine], 1).reshape(-1, 2, 2)
        matrix = torch.cat([rotation, shift[:, :, None]], 2).float().to(inputs.device)
        grid = functional.affine_grid(matrix, list(inputs.shape), align_corners=False)
        return functional.grid_sample(inputs.float(), grid, align_corners=False)

    def metrics(self, transforms: Mapping[str, Any]) -> dict[str, Metric]:
        """F1, precision and recall; up to 100 classes ROC-AUC and the confusion matrix."""
        from lepton_ray.tasks.metrics import classification

        return classification(transforms["classes"], self.options.top_k)

    def rows_of(self, requests: Sequence[ImageRequest], transforms: Mapping[str, Any]) -> pa.Table:
        """Pixel lists as image rows; UsageError where the number of values is not that of the trained size."""
        height, width, channels = transforms["height"], transforms["width"], transforms["channels"]
        for position, request in enumerate(requests):
            if len(request.image) != height * width * channels:
                raise UsageError(
                    f"image of item {position} has {len(request.image)} values: expected "
                    f"{height * width * channels} ({height}x{width}x{channels})"
                )
        count = len(requests)
        return pa.table(
            {
                "image": pa.array([bytes(request.image) for request in requests], pa.binary()),
                "height": pa.array([height] * count, pa.int32()),
                "width": pa.array([width] * count, pa.int32()),
                "channels": pa.array([channels] * count, pa.int32()),
            }
        )

    def example(self, transforms: Mapping[str, Any]) -> ImageRequest:
        """A black image of the trained size."""
        return ImageRequest(image=[0] * (transforms["height"] * transforms["width"] * transforms["channels"]))

    def answers(self, outputs: torch.Tensor, transforms: Mapping[str, Any]) -> list[BaseModel]:
        """Softmax probabilities and the most probable label."""
        import torch

        probabilities = torch.softmax(outputs.float(), 1)
        best = probabilities.argmax(1)
        return [
            ImageAnswer(label=label, probability=row[label], probabilities=row)
            for label, row in zip(best.tolist(), probabilities.tolist(), strict=True)
        ]


def _only(rows: pa.Table, column: str) -> int:
    values = pc.unique(rows[column]).to_pylist()
    if len(values) != 1 or not isinstance(values[0], int) or values[0] < 1:
        raise UsageError(
            f"column {column} holds {str(values)[:60]}: expected one size for all images; resize them first"
        )
    return values[0]


def _pixels(rows: pa.Table, height: int, width: int, channels: int) -> npt.NDArray[np.uint8]:
    """The image column as uint8 `[rows, height * width * channels]`.

    Raises UsageError naming the first row whose image has another length.
    """
    rows = decoded_images(rows, height * width)
    length = height * width * channels
    lengths = pc.binary_length(rows["image"])
    if rows.num_rows and pc.any(pc.fill_null(pc.not_equal(lengths, length), True)).as_py():
        row = next(i for i, found in enumerate(lengths.to_pylist()) if found != length)
        raise UsageError(
            f"image of row {row} has {lengths[row]} bytes: expected {length} ({height}x{width}x{channels})"
        )
    parts = [_bytes_of(chunk, length) for chunk in rows["image"].chunks if len(chunk)]
    if not parts:
        return np.empty((0, length), np.uint8)
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(rows.num_rows, length)


def _bytes_of(images: pa.Array, length: int) -> npt.NDArray[np.uint8]:
    """The bytes of images of one length, one after the other, without an object for each: they lie so in Arrow."""
    _, offsets, data = images.buffers()
    kind = np.int64 if pa.types.is_large_binary(images.type) else np.int32
    first = int(np.frombuffer(offsets, kind)[images.offset])
    return np.frombuffer(data, np.uint8)[first : first + len(images) * length]


def _uniforms(seeds: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in -1..1 per seed, shape `[seeds, count]`."""
    with np.errstate(over="ignore"):  # the counter wraps modulo 2**64 on purpose
        counters = (seeds[:, None] + np.arange(1, count + 1, dtype=np.uint64)).astype(np.uint64, copy=False)
    return (mix64(counters) >> np.uint64(11)).astype(np.float64) / 2**52 - 1.0
