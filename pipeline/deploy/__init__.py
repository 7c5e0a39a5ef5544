"""Student to ONNX, int8 and a model card; a runtime without torch."""
