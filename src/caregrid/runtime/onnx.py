"""Runner ``onnx``, the part inside the sandbox: a model file between ``preprocess`` and ``postprocess`` of ``code/model.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from caregrid.domain.algorithm import Manifest
from caregrid.domain.images import AlgorithmInput
from caregrid.runtime.python import Entry, import_code


def load_entry(manifest: Manifest, package: Path) -> Entry:
    """A function that runs the model; the session is made here, once, and stays warm."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("CAREGRID_CPUS", "1"))
    options.log_severity_level = 3
    known = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"] if manifest.resources.gpu else ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in known]
    session = onnxruntime.InferenceSession(str(package / manifest.entry), options, providers=providers)
    names = [output.name for output in session.get_outputs()]
    module = import_code(package, "model")
    if hasattr(module, "load"):
        module.load(package)

    def run(given: AlgorithmInput) -> Any:
        outputs = session.run(names, module.preprocess(given))
        return module.postprocess(dict(zip(names, outputs, strict=True)), given)

    return run
