"""What the simulated camera shows: synthetic scenes with their ground truth, a folder of pictures, or a video file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image as PilImage

from edgellm.errors import ConfigError, EdgeLLMError
from edgellm_ros.convert import RGB

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ANIMATIONS = {".gif", ".apng", ".webp"}
CACHED_PICTURES = 32


class FrameError(EdgeLLMError):
    """A source has no frame to give; one line."""


class FrameSource(Protocol):
    """Gives one frame after the other, without end."""

    def next(self, dt: float) -> tuple[RGB, dict[str, Any] | None]:
        """The frame `dt` seconds after the one before, uint8 [height, width, 3], and its truth where it is known."""


class SceneSource:
    """Coloured shapes that move and bounce; another scene every `period_s` seconds (0: the first one for ever)."""

    def __init__(self, width: int, height: int, seed: int, period_s: float) -> None:
        # Scenes are drawn with torch; imported here so that folders and videos do without it.
        import torch

        from edgellm_ros import scenes

        torch.set_num_threads(1)
        self._scenes = scenes
        self._no_grad = torch.inference_mode
        self._size, self._seed, self._period_s = (width, height), seed, period_s
        self._shown_s = 0.0
        self._scene = self._sample()

    def _sample(self) -> Any:
        width, height = self._size
        return self._scenes.sample_scene(self._scenes.scene_rng("live", self._seed), width / height)

    def next(self, dt: float) -> tuple[RGB, dict[str, Any] | None]:
        """See `FrameSource`; the truth is `scenes.ground_truth`."""
        self._shown_s += dt
        if self._period_s and self._shown_s >= self._period_s:
            self._shown_s, self._seed = 0.0, self._seed + 1
            self._scene = self._sample()
        self._scene.step(dt)
        with self._no_grad():
            frame: RGB = self._scenes.render([self._scene], self._size)[0].numpy()
        return frame, self._scenes.ground_truth(self._scene)


class FolderSource:
    """The pictures of a folder in the order of their names, over and over, one per frame."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
        if not self._files:
            raise ConfigError(f"parameter source: folder {folder} has no pictures ({', '.join(sorted(PICTURES))})")
        self._index = -1

    def next(self, dt: float) -> tuple[RGB, dict[str, Any] | None]:
        """See `FrameSource`. Raises FrameError for a picture that cannot be read; the next call gives the next one."""
        self._index = (self._index + 1) % len(self._files)
        return _read_picture(self._files[self._index]), None


@lru_cache(maxsize=CACHED_PICTURES)
def _read_picture(path: Path) -> RGB:
    try:
        with PilImage.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, PilImage.DecompressionBombError) as error:
        raise FrameError(f"cannot read {path}: {' '.join(str(error).split())}") from error


class AnimationSource:
    """An animated GIF, PNG or WebP file, over and over; read with PIL."""

    def __init__(self, path: Path) -> None:
        self._picture = PilImage.open(path)
        self._count = getattr(self._picture, "n_frames", 1)
        self._index = -1

    def next(self, dt: float) -> tuple[RGB, dict[str, Any] | None]:
        """See `FrameSource`."""
        self._index = (self._index + 1) % self._count
        self._picture.seek(self._index)
        return np.asarray(self._picture.convert("RGB")), None


class VideoSource:
    """A video file, over and over; read with OpenCV, which is optional."""

    def __init__(self, path: Path) -> None:
        try:
            import cv2
        except ImportError:
            raise ConfigError(
                f"parameter source: reading {path} takes OpenCV, which is not installed (python3-opencv, or "
                "pip install opencv-python-headless); a folder of pictures or an animated GIF works without"
            ) from None
        self._cv2, self._path = cv2, path
        self._video = cv2.VideoCapture(str(path))
        if not self._video.isOpened():
            raise ConfigError(f"parameter source: OpenCV cannot read {path} as a video")

    def next(self, dt: float) -> tuple[RGB, dict[str, Any] | None]:
        """See `FrameSource`. Raises FrameError when not even the first frame can be decoded."""
        good, frame = self._video.read()
        if not good:
            self._video.set(self._cv2.CAP_PROP_POS_FRAMES, 0)
            good, frame = self._video.read()
        if not good:
            raise FrameError(f"no frame of {self._path} can be decoded")
        return np.ascontiguousarray(frame[..., ::-1]), None


def open_source(source: str, width: int, height: int, seed: int, period_s: float) -> FrameSource:
    """The source named by the camera's parameter: "scenes", a folder, or a video file.

    Width, height, seed and period_s are for scenes. Raises ConfigError.
    """
    if source == "scenes":
        return SceneSource(width, height, seed, period_s)
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise ConfigError(f"parameter source is {source!r}: expected scenes, a folder of pictures or a video file")
    if path.suffix.lower() not in ANIMATIONS:
        return VideoSource(path)
    try:
        return AnimationSource(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"parameter source: cannot read {path}: {' '.join(str(error).split())}") from error
