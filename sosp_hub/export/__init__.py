"""Files that other readers take: padded configs, torch.export, ONNX, GGUF."""
