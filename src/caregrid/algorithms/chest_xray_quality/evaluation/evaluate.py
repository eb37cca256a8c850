"""Measures chest-xray-quality on the X-rays of a clinic it was not trained on; prints the figures of the model card as JSON.

    python evaluate.py SOURCE_B_FOLDER             the figures
    python evaluate.py SOURCE_A_FOLDER --tune      the three exposure thresholds, from the training source alone

Every picture is shown in all eight turns, as it is and as negative: 16 cases a picture. Faults of exposure are made: clipped
bright (the upper third cut off), clipped dark (the lower third cut off), flat (a quarter of the contrast, but not of markers).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

PACKAGE = Path(__file__).parents[1]
sys.path.insert(0, str(PACKAGE / "code"))
from chest_xray_measures import exposure, grey, shrunk, spread  # noqa: E402
from chest_xray_thresholds import CLIPPED_BRIGHT_SHARE, CLIPPED_DARK_SHARE, FLAT_CONTRAST  # noqa: E402

CERTAIN = 0.8
Pixels = NDArray[np.float32]


def main() -> None:
    """Orientation and exposure figures, or thresholds."""
    paths = sorted(Path(sys.argv[1]).rglob("*.jpg"))
    pictures = [grey(np.asarray(Image.open(path)), False) for path in paths]
    tuning = "--tune" in sys.argv
    report: dict[str, Any] = {"pictures": len(pictures), "exposure": exposure_report(pictures, tuning)}
    if not tuning:
        report["orientation"] = orientation_report(pictures)
    json.dump(report, sys.stdout, indent=1)


def orientation_report(pictures: list[Pixels]) -> dict[str, Any]:
    """How often turn, mirror and negative are right, answered, and right when answered; with 95 % intervals by picture."""
    session = onnxruntime.InferenceSession(str(PACKAGE / "model.onnx"), providers=["CPUExecutionProvider"])
    right: dict[str, list[float]] = {}
    answered: dict[str, list[float]] = {}
    false_alarms: list[float] = []
    for picture in pictures:
        truth, turn, negative = _sixteen(session, shrunk(picture))
        shares = {
            "turned": (1 - turn[:, 0] - turn[:, 4], truth[:, 0] % 4 != 0),
            "mirrored": (turn[:, 4:].sum(axis=1), truth[:, 0] >= 4),
            "negative": (negative, truth[:, 1] == 1),
        }
        for name, (share, wanted) in shares.items():
            sure = (share >= CERTAIN) | (share <= 1 - CERTAIN)
            good = (share > 0.5) == wanted
            right.setdefault(name, []).append(float(good.mean()))
            answered.setdefault(name, []).append(float(sure.mean()))
            if sure.any():
                right.setdefault(f"{name}, when certain", []).append(float(good[sure].mean()))
        right.setdefault("all of turn and mirror", []).append(float((turn.argmax(axis=1) == truth[:, 0]).mean()))
        false_alarms.append(float(any(share[0] >= CERTAIN for share, _wanted in shares.values())))
    return {
        "right": {name: _with_interval(values) for name, values in right.items()},
        "answered with certainty": {name: round(float(np.mean(values)), 3) for name, values in answered.items()},
        "untouched pictures called faulty": round(float(np.mean(false_alarms)), 3),
    }


def _sixteen(session: onnxruntime.InferenceSession, small: Pixels) -> tuple[NDArray[np.int64], Pixels, Pixels]:
    """Truth (16, 2), turn (16, 8), negative (16,) of one picture in all its ways; the first is the untouched one."""
    ways = [(turn, negative) for turn in range(8) for negative in (0, 1)]
    shown = [np.rot90((1 - small if n else small)[:, ::-1] if t >= 4 else (1 - small if n else small), t % 4) for t, n in ways]
    turn, negative = session.run(["turn", "negative"], {"picture": np.stack(shown)[:, None].astype(np.float32)})
    return np.array(ways), turn, negative[:, 0]


def _with_interval(values: list[float]) -> list[float]:
    """Mean, and the 2.5th and 97.5th percentile of means over pictures drawn with replacement."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return [round(float(one), 3) for one in (np.mean(values), *np.percentile(draws, (2.5, 97.5)))]


def _clipped_bright(picture: Pixels) -> Pixels:
    return np.minimum(spread(picture), 0.67)


def _clipped_dark(picture: Pixels) -> Pixels:
    return np.maximum(spread(picture), 0.33)


def _flattened(picture: Pixels) -> Pixels:
    flat = 0.5 + 0.25 * (spread(picture) - 0.5)
    flat[:4, :4], flat[:4, -4:] = 0, 1
    return flat


#: Fault → (how to make it, score: higher is worse, threshold).
EXPOSURE: dict[str, tuple[Callable[[Pixels], Pixels], Callable[[Pixels], float], float]] = {
    "clipped bright": (_clipped_bright, lambda picture: exposure(picture).bright, CLIPPED_BRIGHT_SHARE),
    "clipped dark": (_clipped_dark, lambda picture: exposure(picture).dark, CLIPPED_DARK_SHARE),
    "flat": (_flattened, lambda picture: -exposure(picture).contrast, -FLAT_CONTRAST),
}


def exposure_report(pictures: list[Pixels], tuning: bool) -> dict[str, dict[str, float]]:
    """Area under the ROC curve, sensitivity and specificity at the thresholds; or the thresholds where their sum is largest."""
    report: dict[str, dict[str, float]] = {}
    for name, (make, score, limit) in EXPOSURE.items():
        clean, spoilt = np.array([score(one) for one in pictures]), np.array([score(make(one)) for one in pictures])
        if tuning:
            limits = np.sort(np.concatenate([clean, spoilt]))
            sums = [(spoilt > one).mean() + (clean <= one).mean() for one in limits]
            report[name] = {"threshold": round(float(limits[int(np.argmax(sums))]), 3), "youden": round(float(max(sums)) - 1, 3)}
            continue
        pairs = (spoilt[:, None] > clean[None]) + 0.5 * (spoilt[:, None] == clean[None])
        report[name] = {
            "auc": round(float(pairs.mean()), 3),
            "sensitivity": round(float((spoilt > limit).mean()), 3),
            "specificity": round(float((clean <= limit).mean()), 3),
        }
    return report


if __name__ == "__main__":
    main()
