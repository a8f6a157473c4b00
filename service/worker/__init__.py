"""Text -> ids -> batch -> ONNX Runtime -> scores, for the bundles of one process. Without torch."""
