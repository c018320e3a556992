"""From an ONNX directory to an engine directory, one file per backend."""
