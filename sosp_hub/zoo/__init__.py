"""The model zoos: loading, example inputs, loss. The only room that knows timm and transformers."""
