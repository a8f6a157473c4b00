"""protobuf <-> domain, one file a method as in service/domain/: the only files that know both.

Decoding what a caller sent raises `InvalidRequest`; what a worker sent is trusted to be well-formed.
"""
