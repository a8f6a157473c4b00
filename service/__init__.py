"""attnd's server. The life of a request, in the order of the files:

gateway/<dialect>.py or rpc/inference.py reads bytes into a request of domain/, which validates itself; a Call says who
asks, until when, and how far it is. observed.py counts it, whatever its end, and passes it on through backend.py's
seam: to rpc/client.py, which asks a worker process, or to worker/local.py in this process.

There worker/classification/classifier.py takes a place in the queue (or refuses, before any work), worker/tokenizer.py
turns text into tokens, its scheduler.py decides who runs next, a thread of its loop.py runs its engine.py on
worker/session.py, and its scores.py turns logits into labels on the way back up.

For a text to write it is worker/generation/generator.py: prompts.py makes token ids of texts and chats, outputs.py
plans of what to write, lanes.py finds a lane for each (a chat has one, in a thread; a translation's are processes).
There scheduler.py plans a step for everything that is under way (a piece of some prompts, a token more of every
output), loop.py executes it on decoder.py or translator.py, output.py makes a token, text and an end of the logits,
and report.py is what comes back.
"""
