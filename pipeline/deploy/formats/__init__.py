"""The forms that a student ships in: ONNX, int8, OpenVINO, transformers.js."""
