"""Optional safety detector: NudeNet, whose ONNX model comes with its package (extra ``safety``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import BadInput
from ..images.decode import Pixels
from ..images.preprocess import Preprocess

SIDE = 320  # side of the model's input, in pixels
UNSAFE = (
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)


class NudeNetDetector:
    """Scores in [0, 1] by NudeNet's class names, of the unsafe classes only."""

    preprocess = Preprocess(SIDE, SIDE, "longest")

    def __init__(self) -> None:
        try:
            from nudenet import NudeDetector
        except ImportError as error:
            raise BadInput(f"--safety needs the package nudenet ({error}); pip install 'capipe[safety]'") from error
        self._detector: Any = NudeDetector(inference_resolution=SIDE)

    def detect(self, pixels: Sequence[Pixels]) -> list[dict[str, float]]:
        """For each image (320, 320, 3) RGB, the unsafe classes detected in it, each with its highest score."""
        detections = []
        for image in pixels:
            best: dict[str, float] = {}
            for detection in self._detector.detect(image[:, :, ::-1].copy()):  # BGR, as in OpenCV
                if detection["class"] in UNSAFE:
                    best[detection["class"]] = max(best.get(detection["class"], 0.0), float(detection["score"]))
            detections.append(best)
        return detections
