"""The servers that attnd is compared with: one small script each, run in a virtual environment of its own.

Each listens on 127.0.0.1 at the port that it is given and answers POST requests with `{"label", "score"}` per text.
They share `bare.py`, the plainest right way to run the bundle with ONNX Runtime, and import nothing of attnd.
"""
