"""Generation: prompts in chunks, then token by token, all requests in one step. Start reading at generator.py."""
