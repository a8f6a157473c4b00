"""gRPC <-> domain, in the order a request meets the files.

core.py        gRPC's core on the event loop: a port that accepts calls, a call's messages and its end
server.py      the process's gRPC port: finds each call's method, and drains
methods.py     what a method is, whatever carries it
inference.py   attnd.v1.Inference: its methods, over a Backend
together.py    the events of a generation that came together, in one message
health.py      grpc.health.v1.Health
reflection.py  grpc.reflection.v1 and v1alpha
codec/         protobuf <-> domain, one file a method
errors.py      the exception tree <-> status codes with google.rpc details
client.py      RemoteBackend: the seam again, answered by workers
channel.py     WorkerChannel: one of them, over its channel
pb/            generated from proto/ by `make proto`; never edited
"""
