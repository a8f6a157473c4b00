"""OpenAI's dialect: /v1/completions and /v1/chat/completions, as its own clients and what is built on them speak it.

What is sent falls in four kinds:
- fields that mean something here, under vLLM's names where OpenAI has none; null means not given;
- fields that change nothing about the text (user, metadata, ...), taken and ignored;
- fields that would change it but cannot be honoured (tools, a JSON response_format, ...), refused with 400 unless they
  have the value that asks for nothing;
- unknown fields, refused with 400, as OpenAI's own servers do: a misspelt option must not pass for one.
"""
