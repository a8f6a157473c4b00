"""attnd's server. The life of a request, in the order of the files:

gateway/<dialect>.py or rpc/server.py reads bytes into a request of domain.py, which validates itself; a Call says who
asks, until when, and how far it is. observed.py counts it, whatever its end, and passes it on through backend.py's
seam: to rpc/client.py, which asks a worker process, or to worker/local.py in this process.

There worker/classifier.py takes a place in the queue (or refuses, before any work), worker/tokenizer.py turns text into
tokens, worker/scheduler.py decides who runs next, a thread of worker/loop.py runs worker/engine.py on session.py, and
worker/scores.py turns logits into labels on the way back up.
"""
