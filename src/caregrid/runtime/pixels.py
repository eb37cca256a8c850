"""Decodes the pixels of one DICOM object: every transfer syntax a scanner sends, decoded right or refused by name.

Frames are numbered from 1, as in DICOM. Decoders are C code on hostile input: call this only outside the receiving process.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames, get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from caregrid.runtime import _dcmtk, _frames
from caregrid.runtime._damage import DAMAGE
from caregrid.runtime._syntax import transfer_syntax, undecodable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

#: Decoder plug-ins per transfer syntax, best first (measured on one CT slice). pylibjpeg-libjpeg (GPL) is never asked.
_PLUGINS: dict[str, tuple[str, ...]] = {
    JPEGBaseline8Bit: ("pillow", "gdcm"),
    JPEGExtended12Bit: ("pillow", "gdcm"),
    JPEGLossless: ("gdcm",),
    JPEGLosslessSV1: ("gdcm",),
    JPEGLSLossless: ("pyjpegls", "gdcm"),
    JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    JPEG2000Lossless: ("gdcm", "pylibjpeg", "pillow"),
    JPEG2000: ("gdcm", "pylibjpeg", "pillow"),
    HTJ2KLossless: ("pylibjpeg",),
    HTJ2KLosslessRPCL: ("pylibjpeg",),
    HTJ2K: ("pylibjpeg",),
    RLELossless: ("pylibjpeg", "pydicom"),
}

#: Read by dcmtk alone: 12-bit Extended, and the retired spectral selection and full progression.
_BY_DCMTK = (JPEGExtended12Bit, UID("1.2.840.10008.1.2.4.53"), UID("1.2.840.10008.1.2.4.55"))

_END_OF_IMAGE = b"\xff\xd9"


def _damage_named(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turns what a damaged header raises into PixelsUndecodable. The first argument must be the data set."""

    @wraps(function)
    def named(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except DAMAGE as error:
            dataset = args[0] if args and isinstance(args[0], Dataset) else Dataset()
            reason = f"the header is damaged ({type(error).__name__})"
            raise undecodable(transfer_syntax(dataset), "broken", reason) from error

    return named


@_damage_named
def decode(dataset: Dataset, frame: int | None = None) -> NDArray[Any]:
    """The stored pixel values: (rows, columns), colour as RGB (rows, columns, 3); all frames: (frames, …) when there are several.

    frame: 1-based number of the one frame wanted. YBR is made RGB, palette colour is applied, unused high bits are dropped;
    grey values stay as stored (no rescale, MONOCHROME1 not inverted).
    Raises PixelsUndecodable naming the transfer syntax; its detail ``code`` is truncated, no-pixels, syntax or broken.
    """
    syntax = transfer_syntax(dataset)
    _check_frame(dataset, frame, syntax)
    if not any(dataset.get(keyword) for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise undecodable(syntax, "no-pixels", "the object holds no pixel data")
    _check_whole(dataset, frame, syntax)
    if _needs_dcmtk(dataset, syntax):
        dataset, syntax = _dcmtk.decompress(dataset, syntax), ExplicitVRLittleEndian
    array, meaning = _with_pydicom(dataset, frame, syntax)
    array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if meaning == "PALETTE COLOR":
        return _palette(array, dataset, syntax)
    return _rgb(array, meaning, syntax) if is_colour(dataset) else array


@_damage_named
def modality_values(dataset: Dataset, frame: int | None = None) -> NDArray[Any]:
    """The pixels in modality units (HU for CT), shapes as in ``decode``: int16 where every value fits, else float32.

    Applies the Modality LUT or rescale slope and intercept (PS3.3 C.11.1), per frame for enhanced objects.
    Colour is given back unchanged.
    """
    array = decode(dataset, frame)
    if is_colour(dataset):
        return array
    if dataset.get("ModalityLUTSequence"):
        return compact(apply_modality_lut(array, dataset))
    frames = [frame] if frame is not None else list(range(1, _frames.frame_count(dataset) + 1))
    scales = [rescale(dataset, number) for number in frames]
    if array.ndim == 2 or len(set(scales)) == 1:
        return scaled(array, *scales[0])
    return compact(np.stack([scaled(one, *scale).astype(np.float32) for one, scale in zip(array, scales, strict=True)]))


def rescale(dataset: Dataset, frame: int = 1) -> tuple[float, float]:
    """Slope and intercept of 1-based ``frame``; (1, 0) where the object has none."""
    slope = _frames.value(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _frames.value(dataset, frame, "PixelValueTransformationSequence", "RescaleIntercept")
    return (1.0 if slope in (None, "") else float(slope), 0.0 if intercept in (None, "") else float(intercept))


def scaled(array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """``array * slope + intercept`` as int16 when slope and intercept are whole and every value fits, else float32."""
    if array.dtype.kind in "iu" and fits_int16(int(array.min()), int(array.max()), slope, intercept):
        return (array.astype(np.int32) * int(slope) + int(intercept)).astype(np.int16)
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def fits_int16(low: int, high: int, slope: float, intercept: float) -> bool:
    """Whether stored values from ``low`` to ``high`` become whole numbers within int16."""
    if not (slope.is_integer() and intercept.is_integer()):
        return False
    ends = (low * slope + intercept, high * slope + intercept)
    return min(ends) >= -32768 and max(ends) <= 32767


def compact(array: NDArray[Any]) -> NDArray[Any]:
    """``array`` as int16 when every value is whole and fits, else as float32."""
    low, high = float(array.min()), float(array.max())
    whole = array.dtype.kind in "iu" or bool(np.all(array == np.rint(array)))
    if whole and low >= -32768 and high <= 32767:
        return array.astype(np.int16)
    return array.astype(np.float32)


@_damage_named
def display_image(dataset: Dataset, frame: int = 1, window: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """One frame as a picture: uint8 grey (rows, columns) or RGB (rows, columns, 3); MONOCHROME1 comes out white on black.

    window: (centre, width) in modality units; without it the object's VOI LUT or first window, else the range of its values.
    """
    if is_colour(dataset):
        return as_uint8(decode(dataset, frame))
    values = modality_values(dataset, frame).astype(np.float64)
    grey = _voi(values, dataset, frame, window)
    if str(dataset.get("PhotometricInterpretation", "")).strip() == "MONOCHROME1":
        grey = 1.0 - grey
    return np.asarray(np.rint(grey * 255.0), dtype=np.uint8)


def is_colour(dataset: Dataset) -> bool:
    """Whether ``decode`` gives RGB for this object."""
    return int(dataset.get("SamplesPerPixel") or 1) == 3 or _is_palette(dataset)


def as_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Whole-range integers brought to 8 bits by dropping the low ones."""
    if array.dtype == np.uint8:
        return array
    shift = 8 * (array.dtype.itemsize - 1)
    return np.asarray(array >> shift, dtype=np.uint8)


def is_compressed(dataset: Dataset) -> bool:
    """Whether the pixels have to be decompressed."""
    syntax = transfer_syntax(dataset)
    return syntax.is_transfer_syntax and syntax.is_encapsulated


def _check_frame(dataset: Dataset, frame: int | None, syntax: UID) -> None:
    count = _frames.frame_count(dataset)
    if frame is not None and not 1 <= frame <= count:
        raise undecodable(syntax, "no-pixels", f"there is no frame {frame}; frames are numbered 1 to {count}")


def _needs_dcmtk(dataset: Dataset, syntax: UID) -> bool:
    if syntax == JPEGExtended12Bit:
        return int(dataset.get("BitsAllocated") or 8) > 8
    return syntax in _BY_DCMTK


def _check_whole(dataset: Dataset, frame: int | None, syntax: UID) -> None:
    """Refuses a compressed frame that stops before its end marker: some decoders fill the rest with a flat grey."""
    if syntax == RLELossless or syntax not in (*_PLUGINS, *_BY_DCMTK):
        return
    count = _frames.frame_count(dataset)
    wanted = range(1, count + 1) if frame is None else range(frame, frame + 1)
    found = 0
    try:
        for coded in _coded_frames(dataset.PixelData, frame, count):
            if _END_OF_IMAGE not in coded.rstrip(b"\x00")[-16:]:
                raise undecodable(syntax, "truncated", f"frame {wanted[found]} of {count} stops before its end marker")
            found += 1
    except (ValueError, IndexError, EOFError, struct.error):
        found = min(found, len(wanted) - 1)
        raise undecodable(syntax, "truncated", f"frame {wanted[found]} of {count} is not there") from None
    if found < len(wanted):
        raise undecodable(syntax, "truncated", f"only {found} of {count} frames are there")


def _coded_frames(pixel_data: bytes, frame: int | None, count: int) -> Iterator[bytes]:
    if frame is None:
        return generate_frames(pixel_data, number_of_frames=count)
    return iter([get_frame(pixel_data, frame - 1, number_of_frames=count)])


def _with_pydicom(dataset: Dataset, frame: int | None, syntax: UID) -> tuple[NDArray[Any], str]:
    decoder = _decoder(syntax)
    plugins = _PLUGINS.get(syntax, ("",))
    index = None if frame is None else frame - 1
    reason: Exception | None = None
    for plugin in [name for name in plugins if not name or name in decoder.available_plugins]:
        try:
            # pydicom types these options as one dictionary.
            array, properties = decoder.as_array(dataset, index=index, decoding_plugin=plugin, as_rgb=False)  # type: ignore[arg-type]
            return array, str(properties["photometric_interpretation"])
        # C decoders raise whatever their wrappers think of. The next one may still read it; the first one's reason is told.
        except Exception as error:
            reason = reason or error
    raise undecodable(syntax, _code_of(reason), _reason_of(reason))


def _decoder(syntax: UID) -> Decoder:
    try:
        return get_decoder(syntax)
    except NotImplementedError:
        raise undecodable(syntax, "syntax", "no decoder for this transfer syntax is part of caregrid") from None


def _code_of(reason: Exception | None) -> str:
    text = str(reason).lower()
    short = ("less than", "doesn't match the expected", "truncated", "insufficient", "not enough", "too short", "unexpected end")
    return "truncated" if any(word in text for word in short) else "broken"


def _reason_of(reason: Exception | None) -> str:
    if reason is None:
        return "the decoder for this transfer syntax is not installed"
    # pydicom's first line only says that a plug-in failed; the last one says why.
    lines = str(reason).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(reason).__name__


def _rgb(array: NDArray[Any], meaning: str, syntax: UID) -> NDArray[Any]:
    """RGB of what the decoder gave. JPEG 2000's own colour transforms (ICT, RCT) are undone by the decoder already."""
    if meaning in ("RGB", "YBR_ICT", "YBR_RCT"):
        return array
    if meaning not in ("YBR_FULL", "YBR_FULL_422") or array.dtype != np.uint8:
        raise undecodable(syntax, "broken", f"colour model {meaning} at {8 * array.dtype.itemsize} bits is not supported")
    # Pillow's tables are those of libjpeg, and ten times as fast as the floating-point conversion of pydicom.
    size = (array.shape[-2], array.shape[-3])
    out = np.empty_like(array)
    for ycc, rgb in zip(array.reshape(-1, *array.shape[-3:]), out.reshape(-1, *array.shape[-3:]), strict=True):
        rgb[...] = np.asarray(Image.frombytes("YCbCr", size, ycc.tobytes()).convert("RGB"))
    return out


def _is_palette(dataset: Dataset) -> bool:
    return str(dataset.get("PhotometricInterpretation", "")).strip() == "PALETTE COLOR"


def _palette(array: NDArray[Any], dataset: Dataset, syntax: UID) -> NDArray[Any]:
    try:
        colour = np.asarray(apply_color_lut(array, _little_endian_palette(dataset, syntax))[..., :3])
    except (ValueError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        raise undecodable(syntax, "broken", f"the colour palette cannot be applied: {_reason_of(error)}") from error
    # Some scanners say 16 bits and fill only 8: taken at its word the picture would be black.
    return colour.astype(np.uint8) if colour.dtype == np.uint16 and colour.max(initial=0) < 256 else colour


def _little_endian_palette(dataset: Dataset, syntax: UID) -> Dataset:
    """pydicom reads plain palette tables as little endian whatever the object's own byte order is."""
    if syntax.is_little_endian or "RedPaletteColorLookupTableData" not in dataset:
        return dataset
    swapped = Dataset()
    for channel in ("Red", "Green", "Blue"):
        keyword = f"{channel}PaletteColorLookupTable"
        table = getattr(dataset, f"{keyword}Data")
        setattr(swapped, f"{keyword}Descriptor", getattr(dataset, f"{keyword}Descriptor"))
        setattr(swapped, f"{keyword}Data", np.frombuffer(table, dtype=np.uint16).byteswap().tobytes())
    return swapped


def _voi(values: NDArray[np.float64], dataset: Dataset, frame: int, window: tuple[float, float] | None) -> NDArray[np.float64]:
    """``values`` brought to 0…1 (PS3.3 C.11.2)."""
    if window is None and dataset.get("VOILUTSequence"):
        return _voi_lut(values, dataset.VOILUTSequence[0])
    function = "LINEAR"
    if window is None:
        window = _stated_window(dataset, frame)
        function = str(_frames.value(dataset, frame, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR").upper()
    if window is None:
        return _range_window(values, dataset)
    return _windowed(values, window[0], window[1], function)


def _stated_window(dataset: Dataset, frame: int) -> tuple[float, float] | None:
    centre = _first(_frames.value(dataset, frame, "FrameVOILUTSequence", "WindowCenter"))
    width = _first(_frames.value(dataset, frame, "FrameVOILUTSequence", "WindowWidth"))
    return None if centre is None or width is None or width <= 0 else (centre, width)


def _range_window(values: NDArray[np.float64], dataset: Dataset) -> NDArray[np.float64]:
    if int(dataset.get("BitsAllocated") or 16) == 8 and values.min() >= 0:
        return np.clip(values / 255.0, 0.0, 1.0)
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / max(float(high - low), 1e-6), 0.0, 1.0)


def _windowed(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -500, 500))))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    if width <= 1:
        return np.asarray(values > centre - 0.5, dtype=np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _voi_lut(values: NDArray[np.float64], item: Dataset) -> NDArray[np.float64]:
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item["LUTData"]
    raw = data.value
    if isinstance(raw, bytes):
        table = np.frombuffer(raw, dtype="<u1" if len(raw) == (entries or 65536) else "<u2")
    else:
        table = np.asarray(raw, dtype=np.int64) & 0xFFFF
    index = np.clip(values - first, 0, len(table) - 1).astype(np.intp)
    return np.clip(table[index] / float((1 << bits) - 1), 0.0, 1.0)


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
    except (TypeError, ValueError, IndexError):
        return None
