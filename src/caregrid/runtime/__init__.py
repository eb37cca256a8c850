"""How an algorithm is run: onnx, python, container and MAP behind one contract."""
