"""The command line as a client: `classify`, `generate`, `translate` and `attention`, for people in a terminal.

The same commands ask a model in this process or a server over HTTP. Requests, results and errors are the domain's; here
stands only how they are asked for and shown.
"""
