"""Hugging Face's dialect: one route for all tasks, as `huggingface_hub.InferenceClient` speaks it.

`POST /models/{id}` does what that model is for; `POST /` what the first of classification, translation and generation
that is served here is for. A parameter that is not known, or cannot be honoured, is an error that names it.
"""
