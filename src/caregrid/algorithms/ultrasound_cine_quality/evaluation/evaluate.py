"""Measures how well ultrasound-cine-quality tells spoilt cines from unspoilt ones; prints the figures of the model card as JSON.

    python evaluate.py CLIPS_FOLDER            the figures
    python evaluate.py CLIPS_FOLDER --tune     the thresholds, from the tuning clips alone

CLIPS_FOLDER holds video files (us-lung). Needs imageio-ffmpeg, which the algorithm itself does not.
Tuning clips: file names beginning with Reg_pat (12 clips, one machine). Evaluation clips: all others (28, of several machines and
hospitals). A spoilt cine is an unspoilt one, spoilt here: half of it frozen (with noise of one grey level, as a converter adds
it), darkened to 35 %, brightened 2.5 times, blurred by a Gaussian of 2 pixels at 320 pixels a side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "code"))
from ultrasound_cine_measures import Measures, measure
from ultrasound_cine_thresholds import BRIGHT_SHARE, DARK_LEVEL, SHARP_LEVEL, STILL_SHARE

FRAMES = 60
Clip = NDArray[np.uint8]


def froze(clip: Clip) -> Clip:
    """Half of the frames are one frame, each with its own noise."""
    length = len(clip) // 2
    start = (len(clip) - length) // 3
    made = clip.astype(np.float32)
    made[start : start + length] = made[start] + np.random.default_rng(0).normal(0, 1, (length, *clip.shape[1:]))
    return np.clip(made, 0, 255).astype(np.uint8)


def dark(clip: Clip) -> Clip:
    """Gain far too low."""
    return (clip * 0.35).astype(np.uint8)


def bright(clip: Clip) -> Clip:
    """Gain far too high."""
    return np.clip(clip.astype(np.float32) * 2.5, 0, 255).astype(np.uint8)


def blurred(clip: Clip) -> Clip:
    """Out of focus."""
    width = 2.0 * max(clip.shape[1:]) / 320
    return np.stack([ndimage.gaussian_filter(frame.astype(np.float32), width) for frame in clip]).astype(np.uint8)


#: Fault → (how to make it, what it is judged by: higher is worse, threshold).
FAULTS: dict[str, tuple[Callable[[Clip], Clip], Callable[[Measures], float], float]] = {
    "frozen": (froze, lambda one: one.still_share, STILL_SHARE),
    "too dark": (dark, lambda one: -(one.dark or 0.0), -DARK_LEVEL),
    "too bright": (bright, lambda one: one.bright or 0.0, BRIGHT_SHARE),
    "unsharp": (blurred, lambda one: -(one.sharp or 0.0), -SHARP_LEVEL),
}


def main() -> None:
    """Scores of every clip, spoilt and not; then thresholds or figures."""
    tuning = "--tune" in sys.argv
    paths = [path for path in sorted(Path(sys.argv[1]).iterdir()) if path.name.startswith("Reg_pat") == tuning]
    clean, spoilt = scores([read_clip(path) for path in paths])
    report: dict[str, object] = {}
    for fault in FAULTS:
        pair = clean[fault], spoilt[fault]
        report[fault] = thresholds(*pair) if tuning else figures(fault, *pair)
    json.dump({"clips": len(paths), **report}, sys.stdout, indent=1)


def scores(clips: list[Clip]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Fault → score of every clip as it is, and when spoilt so."""
    as_they_are = [measure(clip, None) for clip in clips]
    clean = {fault: [score(one) for one in as_they_are] for fault, (_make, score, _limit) in FAULTS.items()}
    spoilt = {fault: [score(measure(make(clip), None)) for clip in clips] for fault, (make, score, _limit) in FAULTS.items()}
    return clean, spoilt


def thresholds(clean: list[float], spoilt: list[float]) -> float:
    """Half-way between the worst unspoilt and the best spoilt clip."""
    return round((max(clean) + min(spoilt)) / 2, 3)


def figures(fault: str, clean: list[float], spoilt: list[float]) -> dict[str, float]:
    """Area under the ROC curve, sensitivity and specificity at the threshold."""
    limit = FAULTS[fault][2]
    pairs = [(bad > good) + 0.5 * (bad == good) for bad in spoilt for good in clean]
    return {
        "auc": round(float(np.mean(pairs)), 3),
        "sensitivity": round(float(np.mean([bad > limit for bad in spoilt])), 3),
        "specificity": round(float(np.mean([good <= limit for good in clean])), 3),
    }


def read_clip(path: Path) -> Clip:
    """The first FRAMES frames in grey (frames, rows, columns)."""
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="gray", bits_per_pixel=8)
    width, height = next(reader)["size"]
    raw = [frame for _, frame in zip(range(FRAMES), reader, strict=False)]
    clip = np.stack([np.frombuffer(frame, np.uint8).reshape(height, width) for frame in raw])
    reader.close()
    return clip


if __name__ == "__main__":
    main()
