"""HTTP <-> domain.

The way in: server.py listens and drains, connection.py parses one client's bytes within limits.py, exchange.py is one
request and its reply, app.py puts the application together, middleware.py gives every reply its id and every error its
shape, routes.py says which path is whose, door.py who may come in, endpoint.py runs one classification and
generation.py one generation, in one piece or as the server-sent events of sse.py. native.py, attend.py (attention maps
and explanations), openai/ and huggingface/ are the dialects, bodies.py what their requests have in common. errors.py is
the table from errors to status codes.
"""
