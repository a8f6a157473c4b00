"""The servers that attnd is compared with: one small script each, run in a virtual environment of its own.

Each listens on 127.0.0.1 at the port that it is given. Those that classify answer POST requests with
`{"label", "score"}` per text and share `bare.py`, the plainest right way to run the bundle with ONNX Runtime; those
that generate answer in OpenAI's completions dialect and share `whole_batches.py`. They import nothing of attnd.
"""
