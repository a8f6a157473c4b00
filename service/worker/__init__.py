"""Text -> ids -> ONNX Runtime -> scores or text, for the bundles of one process. Without torch. Start at local.py."""
