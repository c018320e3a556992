"""Execution backends behind one protocol (`base.py`), one file each, imported when chosen."""

import os

# Without this, onnxruntime's official builds may report their use over the network. It is read on import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
